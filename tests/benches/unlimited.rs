//! How fast chunks move where no link limits them: two daemons in network namespaces of their own, a veth pair between them, and
//! nothing shaped. What limits them then is the machine, so `perf` tells what it was busy with, if it is installed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use layerfs_tests::case::{has_tool, output_of};
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, TwoHosts};

/// Where the files are from, and how many bytes of them.
const SOURCE: &str = "/usr/lib";
const BYTES: u64 = 800_000_000;
const RUNS: usize = 3;
const GOAL: f64 = 600.0;
const FLOOR: f64 = 300.0;
/// The busiest of the profile.
const LINES: usize = 24;

/// Measures and prints.
pub fn run() -> anyhow::Result<()> {
    let work = tempfile::Builder::new().prefix("layerfs-bench").tempdir()?;
    let tree = work.path().join("tree");
    fs::create_dir(&tree)?;
    let mut left = BYTES;
    gather(Path::new(SOURCE), &tree, &mut left, &mut 0)?;
    println!("files of {SOURCE} to an empty store, in MB of chunks' data a second (goal {GOAL}, floor {FLOOR})");
    for run in 0..RUNS {
        let hosts = TwoHosts::new()?;
        let import = hosts.a.import(&tree, "files", &[])?;
        // What files have in common is one chunk.
        let megabytes = (number(&import, "bytes_read")? - number(&import, "bytes_known")?) as f64 / 1e6;
        let before = used(&hosts)?;
        let profile = if run + 1 == RUNS { Profile::start(&hosts, &work.path().join("perf.data"))? } else { None };
        let started = Instant::now();
        let report = hosts.push(&["files"])?;
        let seconds = started.elapsed().as_secs_f64();
        let cpu = used(&hosts)? - before;
        println!(
            "{megabytes:.0} MB in {seconds:.2} s: {:.0} MB/s; {:.0} MB for each second of a processor; {} connections",
            megabytes / seconds,
            megabytes / cpu,
            number(&report, "connections")?
        );
        match profile {
            Some(profile) => println!("{}", profile.end()?),
            None if run + 1 == RUNS => println!("no profile: perf is not installed"),
            None => {}
        }
    }
    Ok(())
}

/// Copies files below `from` to `to`, one after the other, until there are so many bytes.
fn gather(from: &Path, to: &Path, left: &mut u64, count: &mut u32) -> anyhow::Result<()> {
    let mut paths: Vec<PathBuf> = fs::read_dir(from)?.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if *left == 0 {
            return Ok(());
        } else if metadata.is_dir() {
            gather(&path, to, left, count)?;
        } else if metadata.is_file() && metadata.size() > 0 {
            fs::copy(&path, to.join(format!("{count}"))).with_context(|| format!("cannot copy {}", path.display()))?;
            *left = left.saturating_sub(metadata.size());
            *count += 1;
        }
    }
    Ok(())
}

fn pids(hosts: &TwoHosts) -> anyhow::Result<Vec<u32>> {
    let pid = |host: &Host| Ok(host.daemon.as_ref().context("no daemon runs")?.pid());
    [&hosts.a, &hosts.b].into_iter().map(pid).collect()
}

/// The processor seconds of both daemons.
fn used(hosts: &TwoHosts) -> anyhow::Result<f64> {
    let mut seconds = 0.0;
    for pid in pids(hosts)? {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        ensure!(fields.len() > 12, "an odd /proc/{pid}/stat");
        // In ticks, of which Linux counts a hundred a second for everybody.
        seconds += (fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0;
    }
    Ok(seconds)
}

/// A recording of both daemons.
struct Profile {
    perf: Child,
    file: PathBuf,
}

impl Profile {
    fn start(hosts: &TwoHosts, file: &Path) -> anyhow::Result<Option<Profile>> {
        if !has_tool("perf") {
            return Ok(None);
        }
        let pids: Vec<String> = pids(hosts)?.iter().map(u32::to_string).collect();
        let mut command = Command::new("perf");
        command
            .args(["record", "-q", "-F", "997", "-p", &pids.join(","), "-o"])
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Some(Profile { perf: command.spawn()?, file: file.to_owned() }))
    }

    fn end(mut self) -> anyhow::Result<String> {
        output_of(Command::new("kill").args(["-INT", &self.perf.id().to_string()]))?;
        self.perf.wait()?;
        let mut command = Command::new("perf");
        command.args(["report", "--stdio", "-q", "--no-children", "--sort", "symbol", "-i"]).arg(&self.file);
        let text = output_of(command.stderr(Stdio::null()))?;
        let lines = text.lines().map(|line| line.trim_end_matches([' ', '-'])).filter(|line| !line.is_empty());
        Ok(lines.take(LINES).collect::<Vec<_>>().join("\n"))
    }
}
