//! `layerfs-bench mount [ROW…]`: the mount beside ext4, the kernel's overlay and fuse-overlayfs, on the same tree and disk.
//!
//! Everybody takes turns, run for run; each figure is the median, each ratio is to the kernel's overlay: of times ours by the
//! overlay's (below 1 is faster), of rates as well (above 1 is faster). Rows are picked by words in their names.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use layerfs_tests::case::output_of;
use layerfs_tests::host::Host;
use layerfs_tests::tree::{self, Random};

use crate::measure::middle;

const USAGE: &str = "usage: layerfs-bench mount [--runs N] [--files N] [--large GB] [--seconds N] [--both] [ROW…]\n\
    \n  --runs N      runs per figure, of which the median counts [default: 5]\
    \n  --files N     files of the tree [default: 21000]\
    \n  --large GB    the large file's length [default: 4]\
    \n  --seconds N   how long the sustained row writes [default: 60]\
    \n  --both        also mounts whose requests come by io_uring\
    \n  ROW           only rows whose names hold one of these words; list shows the names";

/// Where the reads and writes of the rate rows go to, in bytes.
const FILE_BYTES: u64 = 512 << 20;
const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext4,
    Overlay,
    FuseOverlayfs,
    Layerfs,
    ByRing,
    ReadOnly,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Overlay => "overlay",
            Kind::FuseOverlayfs => "fuse-overlayfs",
            Kind::Layerfs => "layerfs",
            Kind::ByRing => "layerfs, by io_uring",
            Kind::ReadOnly => "layerfs, read-only",
        }
    }
}

/// What a row's figure is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Seconds,
    /// Bytes or operations in a second.
    Rate,
}

/// Does a row's work once in the mount's folder, and tells the figure.
type Work = fn(&Bench, &Path) -> anyhow::Result<f64>;

struct Row {
    name: &'static str,
    unit: Unit,
    /// The lower layer: the tree, or the large file.
    lower: &'static str,
    /// Who takes part, beside the two overlays and our writable mount.
    others: &'static [Kind],
    /// The ratio to reach, and the one not to miss.
    goal: (f64, f64),
    work: Work,
}

const ROWS: &[Row] = &[
    Row {
        name: "find-first",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.2, 1.5),
        work: find,
    },
    Row {
        name: "find-second",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.0, 1.3),
        work: twice_find,
    },
    Row {
        name: "tar-first",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (2.0, 3.0),
        work: tar,
    },
    Row {
        name: "tar-second",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.2, 1.7),
        work: twice_tar,
    },
    Row {
        name: "open-read-close",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.5, 2.0),
        work: open_read_close,
    },
    Row { name: "untar", unit: Unit::Seconds, lower: "large", others: &[Kind::Ext4], goal: (2.0, 3.5), work: untar },
    Row { name: "remove", unit: Unit::Seconds, lower: "large", others: &[Kind::Ext4], goal: (2.0, 3.5), work: remove },
    Row {
        name: "first-write",
        unit: Unit::Seconds,
        lower: "large",
        others: &[],
        goal: (0.01, 0.05),
        work: first_write,
    },
    Row {
        name: "sustained-random-write",
        unit: Unit::Rate,
        lower: "large",
        others: &[],
        goal: (0.9, 0.5),
        work: sustained,
    },
    Row {
        name: "read-sealed",
        unit: Unit::Rate,
        lower: "large",
        others: &[Kind::ReadOnly],
        goal: (0.9, 0.7),
        work: read_sealed,
    },
    Row { name: "read-own", unit: Unit::Rate, lower: "tree", others: &[Kind::Ext4], goal: (1.0, 0.9), work: read_own },
    Row {
        name: "write-buffered",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: write_buffered,
    },
    Row {
        name: "write-fsync",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: write_fsync,
    },
    Row {
        name: "random-read",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: random_read,
    },
    Row {
        name: "random-write",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: random_write,
    },
];

struct Bench {
    runs: usize,
    both: bool,
    seconds: u64,
    large_bytes: u64,
    host: Host,
    archive: PathBuf,
}

/// The command line of this part.
pub fn run(arguments: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let (mut runs, mut files, mut large, mut seconds, mut both, mut words) = (5, 21_000, 4, 60, false, Vec::new());
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut number = || -> anyhow::Result<u64> {
            let value = arguments.next().with_context(|| format!("{argument} wants a value\n{USAGE}"))?;
            value.parse().with_context(|| format!("{argument} wants a number"))
        };
        match argument.as_str() {
            "--runs" => runs = number()?.max(1) as usize,
            "--files" => files = number()?,
            "--large" => large = number()?,
            "--seconds" => seconds = number()?,
            "--both" => both = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            "list" => {
                ROWS.iter().for_each(|row| println!("{}", row.name));
                return Ok(());
            }
            word if word.starts_with('-') => bail!("unknown argument {word:?}\n{USAGE}"),
            word => words.push(word.to_owned()),
        }
    }
    let wanted = |row: &&Row| words.is_empty() || words.iter().any(|word| row.name.contains(word.as_str()));
    let rows: Vec<&Row> = ROWS.iter().filter(wanted).collect();
    ensure!(!rows.is_empty(), "no row has such a name\n{USAGE}");
    let bench = Bench { both, ..Bench::prepare(&rows, runs, files, large << 30, seconds)? };
    println!("{:<24} {:<20} {:>14} {:>9}  goal (floor)", "", "", "median", "ratio");
    rows.into_iter().try_for_each(|row| bench.measure(row))
}

impl Bench {
    fn prepare(rows: &[&Row], runs: usize, files: u64, large_bytes: u64, seconds: u64) -> anyhow::Result<Bench> {
        let host = Host::new()?;
        let (tree, large) = (host.path("tree"), host.new_folder("large")?);
        tree::fill(&tree, 1, files as u32, 23_000)?;
        let archive = host.path("tree.tar");
        output_of(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg("."))?;
        if rows.iter().any(|row| row.lower == "large") {
            // The same 64 MiB over and over: who copies it copies all, and the store doesn't need the space.
            let piece = Random::new(9).bytes(64 << 20);
            let mut file = File::create(large.join("file"))?;
            (0..large_bytes / piece.len() as u64).try_for_each(|_| file.write_all(&piece))?;
            host.import(&large, "large", &[])?;
        }
        if rows.iter().any(|row| row.lower == "tree") {
            host.import(&tree, "tree", &[])?;
        }
        Ok(Bench { runs, both: false, seconds, large_bytes, host, archive })
    }

    fn measure(&self, row: &Row) -> anyhow::Result<()> {
        let mut kinds = vec![Kind::Overlay, Kind::FuseOverlayfs, Kind::Layerfs];
        kinds.extend(self.both.then_some(Kind::ByRing));
        kinds.extend(row.others);
        if Command::new("fuse-overlayfs").arg("--version").output().is_err() {
            kinds.retain(|kind| *kind != Kind::FuseOverlayfs);
        }
        let mut figures = vec![Vec::new(); kinds.len()];
        for run in 0..self.runs {
            for (kind, figures) in kinds.iter().zip(&mut figures) {
                let mounted = Mounted::new(self, *kind, row.lower, run)?;
                rustix::fs::sync();
                let figure =
                    (row.work)(self, &mounted.dir).with_context(|| format!("{} on {}", row.name, kind.name()))?;
                figures.push(figure);
            }
        }
        let medians: Vec<f64> = figures.into_iter().filter_map(middle).collect();
        for (kind, median) in kinds.iter().zip(&medians) {
            let shown = match row.unit {
                Unit::Seconds => format!("{median:.4} s"),
                Unit::Rate if row.name.contains("random") => format!("{median:.0}/s"),
                Unit::Rate => format!("{:.0} MB/s", median / 1e6),
            };
            let (goal, floor) = row.goal;
            let goal = if *kind == Kind::Layerfs { format!("{goal} ({floor})") } else { String::new() };
            println!("{:<24} {:<20} {shown:>14} {:>9.3}  {goal}", row.name, kind.name(), median / medians[0]);
        }
        Ok(())
    }
}

/// A mount of one kind; taken down at the end.
struct Mounted<'a> {
    bench: &'a Bench,
    kind: Kind,
    dir: PathBuf,
    folder: PathBuf,
}

impl<'a> Mounted<'a> {
    fn new(bench: &'a Bench, kind: Kind, lower: &str, run: usize) -> anyhow::Result<Mounted<'a>> {
        let folder = bench.host.path(format!("{kind:?}-{run}"));
        let dir = folder.join("mnt");
        for name in ["mnt", "upper", "work"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let options = || {
            let (lower, folder) = (bench.host.path(lower), folder.display());
            format!("lowerdir={},upperdir={folder}/upper,workdir={folder}/work", lower.display())
        };
        match kind {
            Kind::Ext4 => {}
            Kind::Overlay => {
                output_of(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options()]).arg(&dir))?;
            }
            Kind::FuseOverlayfs => {
                output_of(Command::new("fuse-overlayfs").args(["-o", &options()]).arg(&dir))?;
            }
            Kind::Layerfs => {
                bench.host.ctl.ok(["mount", lower, &dir.to_string_lossy()])?;
            }
            Kind::ByRing => {
                bench.host.ctl.ok(["mount", lower, &dir.to_string_lossy(), "--transport", "uring"])?;
            }
            Kind::ReadOnly => {
                bench.host.ctl.ok(["mount", lower, &dir.to_string_lossy(), "--read-only"])?;
            }
        }
        Ok(Mounted { bench, kind, dir, folder })
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let dir = self.dir.to_string_lossy().into_owned();
        let ended = match self.kind {
            Kind::Ext4 => Ok(()),
            Kind::Overlay | Kind::FuseOverlayfs => output_of(Command::new("umount").arg(&self.dir)).map(drop),
            Kind::Layerfs | Kind::ByRing => self.bench.host.ctl.ok(["umount", &dir, "--discard"]).map(drop),
            Kind::ReadOnly => self.bench.host.ctl.ok(["umount", &dir]).map(drop),
        };
        if let Err(error) = ended.and_then(|()| Ok(fs::remove_dir_all(&self.folder)?)) {
            eprintln!("cannot take down {dir}: {error:#}");
        }
    }
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn shell(dir: &Path, line: &str) -> anyhow::Result<()> {
    output_of(Command::new("sh").args(["-c", line]).current_dir(dir)).map(drop)
}

fn find(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| shell(dir, "find . -printf '%s %m %u %T@\\n' >/dev/null"))
}

fn twice_find(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    find(bench, dir)?;
    find(bench, dir)
}

fn tar(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| shell(dir, "tar -cf - . | cat >/dev/null"))
}

fn twice_tar(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    tar(bench, dir)?;
    tar(bench, dir)
}

/// A second pass over the first 2,000 files.
fn open_read_close(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let mut files = Vec::new();
    layerfs_tests::compare::walk(dir, &mut |path, metadata| {
        if metadata.is_file() && files.len() < 2000 {
            files.push(path.to_owned());
        }
        Ok(())
    })?;
    let mut buffer = vec![0; 1 << 20];
    let mut pass = || -> anyhow::Result<()> {
        for file in &files {
            let _ = File::open(dir.join(file))?.read(&mut buffer)?;
        }
        Ok(())
    };
    pass()?;
    timed(|| (0..5).try_for_each(|_| pass()))
}

fn untar(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let new = dir.join("new");
    fs::create_dir(&new)?;
    timed(|| shell(&new, &format!("tar -xf {}", bench.archive.display())))
}

fn remove(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    untar(bench, dir)?;
    timed(|| shell(dir, "rm -rf new"))
}

/// The first write into a file that is below, from opening it on: the overlay copies it then.
fn first_write(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| {
        let file = OpenOptions::new().write(true).open(dir.join("file"))?;
        Ok(file.write_all_at(&[7; BLOCK], 123_456 * BLOCK as u64)?)
    })
}

/// Random writes into a file that was below, for as long as is asked for, after a first one.
fn sustained(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    first_write(bench, dir)?;
    let file = OpenOptions::new().write(true).open(dir.join("file"))?;
    let blocks = bench.large_bytes / BLOCK as u64;
    random(bench.seconds, blocks, |offset, block| Ok(file.write_all_at(block, offset)?))
}

/// How often in a second `one` is done at random places of `blocks` blocks.
fn random(seconds: u64, blocks: u64, mut one: impl FnMut(u64, &mut [u8]) -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut random = Random::new(17);
    let mut block = random.bytes(BLOCK);
    let (started, mut count) = (Instant::now(), 0u64);
    while started.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..64 {
            one(random.below(blocks) * BLOCK as u64, &mut block)?;
        }
        count += 64;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

fn read_all(path: &Path, bytes: u64) -> anyhow::Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let mut pass = || -> anyhow::Result<()> {
        let file = File::open(path)?;
        let mut at = 0;
        while at < bytes {
            at += file.read_at(&mut buffer, at)?.max(1) as u64;
        }
        Ok(())
    };
    pass()?;
    Ok(bytes as f64 / timed(pass)?)
}

fn read_sealed(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    read_all(&dir.join("file"), bench.large_bytes.min(1 << 30))
}

fn write_whole(dir: &Path) -> anyhow::Result<(File, f64)> {
    let path = dir.join("written");
    let piece = Random::new(3).bytes(1 << 20);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    let seconds = timed(|| Ok((0..FILE_BYTES >> 20).try_for_each(|at| file.write_all_at(&piece, at << 20))?))?;
    Ok((file, seconds))
}

fn read_own(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    write_whole(dir)?;
    read_all(&dir.join("written"), FILE_BYTES)
}

fn write_buffered(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    Ok(FILE_BYTES as f64 / write_whole(dir)?.1)
}

fn write_fsync(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (file, seconds) = write_whole(dir)?;
    Ok(FILE_BYTES as f64 / (seconds + timed(|| Ok(file.sync_all()?))?))
}

fn random_read(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    write_whole(dir)?;
    let file = File::open(dir.join("written"))?;
    random(3, FILE_BYTES / BLOCK as u64, |offset, block| Ok(file.read_exact_at(block, offset)?))
}

fn random_write(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (file, _) = write_whole(dir)?;
    random(3, FILE_BYTES / BLOCK as u64, |offset, block| Ok(file.write_all_at(block, offset)?))
}
