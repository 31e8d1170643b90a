//! `make bench`: the figures that layerfs is judged by, each beside its peers, measured in the same run.
//!
//! Every time is the median of several runs after one that warms the caches, everybody on the same tree and disk.
//! Prints one table and writes the same as JSON.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bytes;
mod lazy;
mod link;
mod measure;
mod mount;
mod peers;
mod storage;
mod table;
mod unlimited;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use layerfs_tests::case::output_of;
use layerfs_tests::{compare, debian, tree};
use tempfile::TempDir;

use crate::table::Table;

const USAGE: &str = "usage: layerfs-bench [--tree DIR] [--runs N] [--json FILE] [--only WORD]\n\
    \n  --tree DIR    measure on this tree [default: a Debian root, or a made-up tree]\
    \n  --runs N      runs per figure, of which the median counts [default: 3]\
    \n  --json FILE   where to write the figures [default: bench.json]\
    \n       layerfs-bench link [CELL] [--alone]  how much of a link is used: all cells, or one, such as 100/20/1, or paths, or unlimited;\
    \n                                      --alone leaves the peers out\
    \n       layerfs-bench mount [ROW…]    the mount beside the kernel's overlay and fuse-overlayfs; mount --help says more\
    \n  --only WORD   only the parts whose name holds WORD: speed, wire, bytes, lazy, storage, memory\
    \n  --row WORD    of bytes only the rows whose name holds WORD: package, disk image, memory image, database, tree\
    \n  --alone       of bytes only our own figures";

/// What is measured, and how.
pub struct Plan {
    /// The tree that everybody works on.
    pub tree: PathBuf,
    /// Bytes of its files.
    pub tree_bytes: u64,
    /// How many runs count.
    pub runs: usize,
    /// Only the rows of changes whose name holds this.
    pub row: String,
    /// Leave out other tools where a change's bytes are counted.
    pub alone: bool,
    /// A folder for everything that is made, on a real disk.
    pub work: TempDir,
}

type Part = fn(&Plan, &mut Table) -> anyhow::Result<()>;

struct Options {
    tree: Option<PathBuf>,
    runs: usize,
    json: PathBuf,
    only: String,
    row: String,
    alone: bool,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let part = match words.next().as_deref() {
        Some("link") => {
            let (flags, cells): (Vec<_>, Vec<_>) = words.by_ref().partition(|word| word == "--alone");
            Some(link::run(cells.first().map(String::as_str), !flags.is_empty()))
        }
        Some("mount") => Some(mount::run(words)),
        _ => None,
    };
    if let Some(result) = part {
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("layerfs-bench: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    match parse().and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("some goals were missed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("layerfs-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> anyhow::Result<Options> {
    let mut options = Options {
        tree: None,
        runs: 3,
        json: "bench.json".into(),
        only: String::new(),
        row: String::new(),
        alone: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} wants a value\n{USAGE}"));
        match argument.as_str() {
            "--tree" => options.tree = Some(value()?.into()),
            "--runs" => options.runs = value()?.parse().context("--runs wants a number")?,
            "--json" => options.json = value()?.into(),
            "--only" => options.only = value()?,
            "--row" => options.row = value()?,
            "--alone" => options.alone = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            other => bail!("unknown argument {other:?}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> anyhow::Result<bool> {
    let work = tempfile::Builder::new().prefix("layerfs-bench").tempdir()?;
    let tree = chosen_tree(options, work.path())?;
    let tree_bytes: u64 = size_of(&tree)?;
    let plan =
        Plan { tree, tree_bytes, runs: options.runs.max(1), row: options.row.clone(), alone: options.alone, work };
    eprintln!("measuring on {} ({} MB), {} runs each", plan.tree.display(), tree_bytes / 1_000_000, plan.runs);

    let mut table = Table::new(&plan)?;
    let parts: [(&str, Part); 6] = [
        ("speed", peers::speed),
        ("wire", wire::rows),
        ("bytes", bytes::rows),
        ("lazy", lazy::rows),
        ("storage", storage::rows),
        ("memory", storage::memory),
    ];
    for (name, part) in parts.iter().filter(|(name, _)| name.contains(&options.only)) {
        eprintln!("… {name}");
        if let Err(error) = part(&plan, &mut table) {
            table.skipped(name, &format!("{error:#}"));
        }
    }
    println!("{}", table.text());
    std::fs::write(&options.json, table.json()).with_context(|| format!("cannot write {}", options.json.display()))?;
    eprintln!("written to {}", options.json.display());
    Ok(table.all_met())
}

fn chosen_tree(options: &Options, work: &Path) -> anyhow::Result<PathBuf> {
    if let Some(tree) = &options.tree {
        return tree.canonicalize().with_context(|| format!("cannot use {}", tree.display()));
    }
    match debian::root() {
        Ok(root) => Ok(root.to_owned()),
        Err(error) => {
            eprintln!("no Debian root ({error:#}): a made-up tree instead");
            let made = work.join("tree");
            tree::fill(&made, 1, 8000, 25_000)?;
            Ok(made)
        }
    }
}

/// Bytes of the files under `root`.
pub fn size_of(root: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    compare::walk(root, &mut |_, metadata| {
        if metadata.is_file() {
            bytes += metadata.len();
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// The kernel's release and how many processors there are.
pub fn machine() -> anyhow::Result<(String, usize)> {
    let kernel = output_of(Command::new("uname").arg("-r"))?.trim().to_owned();
    Ok((kernel, std::thread::available_parallelism().map_or(1, usize::from)))
}
