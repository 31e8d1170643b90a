//! `make paper`: the experiment of the paper that this project goes back to, by its own method and by ours, in the same run.
//!
//! A cell is one migration ([`cell`]); what was measured of it ([`record`]) is kept in a file, so that a run can be cut off and goes
//! on where it was. The tables and pictures are written from those files, whichever are there.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod cell;
mod clients;
mod container;
mod figure;
mod lan;
mod machine;
mod measure;
mod ours;
mod printed;
mod probe;
mod record;
mod roots;
mod table;
mod theirs;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use layerfs_tests::case::Need::{self, Containers, Criu, Fuse, Kernel, Namespaces, Root, Tool};

use crate::cell::{Cell, Kind, Method};
use crate::record::Records;

const USAGE: &str = "usage: layerfs-paper [CELL…] [--again] [--to DIR]\n\
    \n  CELL         only these, such as lxc/ram/found/ours, or all whose name begins so: lxc/ram;\
    \n               lxc/ram/found/rounds is ours without post-copy, and in no table\
    \n  --again      also what was measured before\
    \n  --renew      also what was measured by another build of layerctl\
    \n  --most S     give a cell up whose migration isn't over after so many seconds\
    \n  --list       say what the cells are called and which are measured, and end\
    \n  --tables     measure nothing: write the tables and pictures again\
    \n  --to DIR     where figures are kept and tables are written [default: docs/results/paper]";

struct Options {
    cells: Vec<String>,
    again: bool,
    renew: bool,
    most: Option<Duration>,
    list: bool,
    tables: bool,
    to: PathBuf,
}

fn main() -> ExitCode {
    match parse().and_then(|options| run(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("layerfs-paper: {failed} cells failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("layerfs-paper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> anyhow::Result<Options> {
    let mut options = Options {
        cells: Vec::new(),
        again: false,
        renew: false,
        most: None,
        list: false,
        tables: false,
        to: "docs/results/paper".into(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--again" => options.again = true,
            "--renew" => options.renew = true,
            "--most" => {
                let seconds = arguments.next().and_then(|word| word.parse().ok());
                let seconds = seconds.with_context(|| format!("--most wants a number of seconds\n{USAGE}"))?;
                options.most = Some(Duration::from_secs(seconds));
            }
            "--list" => options.list = true,
            "--tables" => options.tables = true,
            "--to" => options.to = arguments.next().with_context(|| format!("--to wants a folder\n{USAGE}"))?.into(),
            "-h" | "--help" => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            word if word.starts_with('-') => bail!("unknown option {word:?}\n{USAGE}"),
            word => options.cells.push(word.to_owned()),
        }
    }
    Ok(options)
}

/// The cells that were asked for: by whole names, or by what names begin with.
fn chosen(words: &[String]) -> anyhow::Result<Vec<Cell>> {
    if words.is_empty() {
        return Ok(Cell::all());
    }
    let mut cells = Vec::new();
    for word in words {
        let begin = format!("{}/", word.trim_end_matches('/'));
        let found: Vec<Cell> = Cell::all().into_iter().filter(|cell| cell.to_string().starts_with(&begin)).collect();
        match found.is_empty() {
            true => cells.push(word.parse::<Cell>()?),
            false => cells.extend(found),
        }
    }
    Ok(cells)
}

/// Measures what is asked for; the number of cells that failed.
fn run(options: &Options) -> anyhow::Result<usize> {
    let records = Records(options.to.clone());
    let cells = chosen(&options.cells)?;
    let build = if options.renew { Some(measure::build()?) } else { None };
    let is_there = |cell: Cell| {
        let record = records.get(cell)?;
        anyhow::Ok(record.is_some_and(|record| build.as_ref().is_none_or(|build| record.build == *build)))
    };
    if options.list {
        for cell in cells {
            println!("{cell}{}", if is_there(cell)? { "  measured" } else { "" });
        }
        return Ok(0);
    }
    let mut failed = 0;
    for cell in cells.into_iter().filter(|_| !options.tables) {
        if !options.again && is_there(cell)? {
            continue;
        }
        if let Some(reason) = needs(cell).iter().find_map(|need| need.unmet()) {
            eprintln!("{cell}: SKIPPED: {reason}");
            continue;
        }
        eprint!("{cell}: ");
        let measured = match cell.method {
            Method::Ours | Method::Rounds => ours::run(cell, options.most),
            Method::Paper => theirs::run(cell, options.most),
        };
        match measured {
            Ok(record) => {
                eprintln!(
                    "{:.1} s in all, {:.1} MB, the client without an answer for {:.2} s (of which dump {:.2}, restore {:.2})",
                    record.total_seconds,
                    record.wire_bytes as f64 / 1e6,
                    record.downtime_seconds,
                    record.dump_seconds,
                    record.restore_seconds
                );
                records.put(cell, &record)?;
            }
            Err(error) => {
                eprintln!("failed: {error:#}");
                failed += 1;
            }
        }
    }
    table::write(&records)?;
    figure::write(&records)?;
    eprintln!("tables and pictures are in {}", options.to.display());
    Ok(failed)
}

fn needs(cell: Cell) -> &'static [Need] {
    match cell.kind {
        Kind::Process => &[Root, Fuse, Namespaces, Tool("cc"), Criu],
        Kind::Lxc => &[Root, Fuse, Namespaces, Containers, Tool("cc"), Tool("rsync"), Tool("lxc-start"), Criu],
        Kind::Kvm => {
            &[Root, Fuse, Namespaces, Tool("cc"), Tool("rsync"), Tool("qemu-system-x86_64"), Tool("mke2fs"), Kernel]
        }
    }
}
