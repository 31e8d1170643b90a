//! `layerfs-bench mount [ROW…]`: the mount beside ext4, the kernel's overlay and fuse-overlayfs, on the same tree and disk.
//!
//! Everybody takes turns, run for run; each figure is the median, each ratio is to the kernel's overlay: of times ours by the
//! overlay's (below 1 is faster), of rates as well (above 1 is faster). Rows are picked by words in their names.

mod held;
mod stack;
mod work;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// The length of the file that is read cold, and how many crates are compiled.
const COLD_BYTES: u64 = 512 << 20;
/// The sealed file that is read warm.
const SEALED_BYTES: u64 = 1 << 30;
const CRATES: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext4,
    Overlay,
    FuseOverlayfs,
    Layerfs,
    ByRing,
    ReadOnly,
    WriteThrough,
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
            Kind::WriteThrough => "layerfs, writeback off",
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
    /// The lower layer: the tree, the large file, or one that is just small enough for a warm copy.
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
        work: work::find,
    },
    Row {
        name: "find-second",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.0, 1.3),
        work: work::twice_find,
    },
    Row {
        name: "tar-first",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (2.0, 3.0),
        work: work::tar,
    },
    Row {
        name: "tar-second",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.2, 1.7),
        work: work::twice_tar,
    },
    Row {
        name: "open-read-close",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.5, 2.0),
        work: work::open_read_close,
    },
    Row {
        name: "four-clients",
        unit: Unit::Seconds,
        lower: "tree",
        others: &[Kind::ReadOnly],
        goal: (1.5, 2.0),
        work: work::clients,
    },
    Row { name: "compile", unit: Unit::Seconds, lower: "crates", others: &[], goal: (1.05, 1.15), work: work::compile },
    Row {
        name: "untar",
        unit: Unit::Seconds,
        lower: "large",
        others: &[Kind::Ext4],
        goal: (2.0, 3.5),
        work: work::untar,
    },
    Row {
        name: "remove",
        unit: Unit::Seconds,
        lower: "large",
        others: &[Kind::Ext4],
        goal: (2.0, 3.5),
        work: work::remove,
    },
    Row {
        name: "first-write",
        unit: Unit::Seconds,
        lower: "large",
        others: &[Kind::WriteThrough],
        goal: (0.01, 0.05),
        work: work::first_write,
    },
    Row {
        name: "sustained-write",
        unit: Unit::Rate,
        lower: "large",
        others: &[Kind::WriteThrough],
        goal: (0.9, 0.5),
        work: work::sustained,
    },
    Row {
        name: "read-sealed",
        unit: Unit::Rate,
        lower: "sealed",
        others: &[Kind::ReadOnly],
        goal: (0.9, 0.7),
        work: work::read_sealed,
    },
    Row {
        name: "read-warm",
        unit: Unit::Rate,
        lower: "sealed",
        others: &[Kind::ReadOnly],
        goal: (0.9, 0.7),
        work: work::read_warm,
    },
    Row {
        name: "read-often",
        unit: Unit::Rate,
        lower: "sealed",
        others: &[Kind::ReadOnly],
        goal: (0.9, 0.7),
        work: work::read_often,
    },
    Row {
        name: "read-cold",
        unit: Unit::Rate,
        lower: "cold",
        others: &[Kind::ReadOnly],
        goal: (1.5, 0.9),
        work: work::read_cold,
    },
    Row {
        name: "read-own",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: work::read_own,
    },
    Row {
        name: "write-buffered",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: work::write_buffered,
    },
    Row {
        name: "write-fsync",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: work::write_fsync,
    },
    Row {
        name: "random-read",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: work::random_read,
    },
    Row {
        name: "random-write",
        unit: Unit::Rate,
        lower: "tree",
        others: &[Kind::Ext4],
        goal: (1.0, 0.9),
        work: work::random_write,
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
                println!("{}", stack::NAME);
                return Ok(());
            }
            word if word.starts_with('-') => bail!("unknown argument {word:?}\n{USAGE}"),
            word => words.push(word.to_owned()),
        }
    }
    let wanted = |row: &&Row| words.is_empty() || words.iter().any(|word| row.name.contains(word.as_str()));
    let rows: Vec<&Row> = ROWS.iter().filter(wanted).collect();
    let wants_stack = words.is_empty() || words.iter().any(|word| stack::NAME.contains(word.as_str()));
    ensure!(wants_stack || !rows.is_empty(), "no row has such a name\n{USAGE}");
    if wants_stack {
        stack::measure(runs)?;
    }
    if rows.is_empty() {
        return Ok(());
    }
    let bench = Bench { both, ..Bench::prepare(&rows, runs, files, large << 30, seconds)? };
    println!("{:<24} {:<20} {:>14} {:>9}  goal (floor)", "", "", "median", "ratio");
    rows.into_iter().try_for_each(|row| bench.measure(row))
}

impl Bench {
    fn prepare(rows: &[&Row], runs: usize, files: u64, large_bytes: u64, seconds: u64) -> anyhow::Result<Bench> {
        let host = Host::new()?;
        let tree = host.path("tree");
        tree::fill(&tree, 1, files as u32, 23_000)?;
        let archive = host.path("tree.tar");
        output_of(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg("."))?;
        let is_wanted = |lower| rows.iter().any(|row| row.lower == lower);
        for (lower, bytes) in [("large", large_bytes), ("sealed", SEALED_BYTES)] {
            let folder = host.new_folder(lower)?;
            if is_wanted(lower) {
                // The same 64 MiB over and over: who copies it copies all, and the store doesn't need the space.
                let piece = Random::new(9).bytes(64 << 20);
                let mut file = File::create(folder.join("file"))?;
                (0..bytes / piece.len() as u64).try_for_each(|_| file.write_all(&piece))?;
                host.import(&folder, lower, &[])?;
            }
        }
        if is_wanted("cold") {
            let mut random = Random::new(10);
            let mut file = File::create(host.new_folder("cold")?.join("file"))?;
            (0..COLD_BYTES >> 20).try_for_each(|_| file.write_all(&random.text(1 << 20)))?;
            host.import(&host.path("cold"), "cold", &[])?;
        }
        if is_wanted("crates") {
            let folder = host.new_folder("crates")?;
            write_crates(&folder)?;
            host.import(&folder, "crates", &[])?;
        }
        if is_wanted("tree") {
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
        if row.lower == "cold" {
            // Its server isn't held to the rate.
            kinds.retain(|kind| *kind != Kind::FuseOverlayfs);
        }
        let mut figures = vec![Vec::new(); kinds.len()];
        for run in 0..self.runs {
            // Each is the first as often: memory that others have just given back is faster, or slower, than what comes after it.
            for place in (0..kinds.len()).map(|place| (place + run) % kinds.len()) {
                let (kind, figures) = (&kinds[place], &mut figures[place]);
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
                Unit::Rate if row.name.contains("random") || row.name.contains("sustained") => format!("{median:.0}/s"),
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
            Kind::WriteThrough => {
                bench.host.ctl.ok(["mount", lower, &dir.to_string_lossy(), "--writeback", "off"])?;
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
            Kind::Layerfs | Kind::ByRing | Kind::WriteThrough => {
                self.bench.host.ctl.ok(["umount", &dir, "--discard"]).map(drop)
            }
            Kind::ReadOnly => self.bench.host.ctl.ok(["umount", &dir]).map(drop),
        };
        if let Err(error) = ended.and_then(|()| Ok(fs::remove_dir_all(&self.folder)?)) {
            eprintln!("cannot take down {dir}: {error:#}");
        }
    }
}

/// A Rust project of [`CRATES`] crates, each of which depends on three before it.
fn write_crates(folder: &Path) -> anyhow::Result<()> {
    let mut random = Random::new(11);
    for number in 0..CRATES {
        let sources = folder.join(format!("crates/part{number}/src"));
        fs::create_dir_all(&sources)?;
        let below: Vec<usize> = (number.saturating_sub(3)..number).collect();
        let dependencies: String =
            below.iter().map(|other| format!("part{other} = {{ path = \"../part{other}\" }}\n")).collect();
        let manifest = format!(
            "[package]\nname = \"part{number}\"\nversion = \"0.1.0\"\nedition = \"2021\"\n\n[dependencies]\n{dependencies}"
        );
        fs::write(sources.with_file_name("Cargo.toml"), manifest)?;
        let mut source: String =
            below.iter().map(|other| format!("pub use part{other}::Thing0 as Of{other};\n")).collect();
        for thing in 0..30 {
            let factor = random.below(1000);
            source.push_str(&format!(
                "/// A thing.\n#[derive(Clone, Debug, PartialEq)]\npub struct Thing{thing} {{ pub name: String, pub parts: Vec<u64> }}\n\
                 impl Thing{thing} {{\n    pub fn sum(&self) -> u64 {{ self.parts.iter().map(|part| part * {factor}).sum() }}\n    \
                 pub fn sorted(mut self) -> Self {{ self.parts.sort_unstable_by_key(|part| part % {factor}.max(1)); self }}\n}}\n"
            ));
        }
        fs::write(sources.join("lib.rs"), source)?;
    }
    fs::write(folder.join("Cargo.toml"), "[workspace]\nresolver = \"2\"\nmembers = [\"crates/*\"]\n")?;
    Ok(())
}
