//! Guests that move again and again: what piles up, how long they stand still, and how well that is foretold.
//!
//! Short by default. `make migrations` asks for more by `LAYERFS_MIGRATIONS` (moves of each driver's guest), `LAYERFS_MEMORY`
//! (MiB of the one that uses its memory) and `LAYERFS_MEMORY_MOVES`, and shows what is printed here.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::host::Host;
use serde_json::Value;

use crate::migrate::{Moving, POST_COPY, PROCESS, folder, guest, memory_of, turns, went_before};

/// So many moves come first: only then everything is there that stays.
const WARM_UP: usize = 2;
/// So many reports of its own a host has to have seen before its predictions count.
const SEEN: usize = 5;
/// The most layers that moving a guest may leave it with: its base, those that aren't made one yet, and those of one move.
const MOST_LAYERS: u64 = 12;
/// A daemon may have so many files more open than at first.
const SOME_FILES: usize = 24;
/// A move that takes so many seconds has its stages shown.
const SLOW: f64 = 5.0;
/// So many moves at each end are compared.
const SOME_MOVES: usize = 10;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("moves::nothing_is_left_behind", PROCESS, to_and_fro),
        Case::new("moves::memory_in_use_costs_little", PROCESS, memory),
        Case::new("moves::a_guest_that_is_faster_than_the_link_ends_by_its_rules", PROCESS, too_fast),
    ]
}

/// A number from the environment.
fn number(variable: &str, or: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(or)
}

/// One move.
struct Turn {
    seconds: f64,
    downtime: f64,
    predicted: f64,
    bytes: u64,
}

/// Writes down what the moves of a guest did, and what they leave.
pub struct Ledger<'a> {
    moving: &'a Moving,
    turns: Vec<Turn>,
    /// The mounts that have been the guest's root, by device.
    devices: BTreeSet<String>,
    /// The control groups that it has been in.
    groups: BTreeSet<PathBuf>,
    before: Vec<Left>,
}

// The figures are for whoever runs it to see them.
#[allow(clippy::print_stderr)]
impl<'a> Ledger<'a> {
    /// An empty one.
    pub fn new(moving: &'a Moving) -> Ledger<'a> {
        Ledger { moving, turns: Vec::new(), devices: BTreeSet::new(), groups: BTreeSet::new(), before: Vec::new() }
    }

    /// Moves it away from the first host, or back to it. Returns the report.
    pub fn migrate(&mut self, to_first: bool, options: &[&str]) -> anyhow::Result<Value> {
        if self.turns.len() == WARM_UP {
            self.before = self.look()?;
        }
        let report = self.moving.migrate(to_first, options)?;
        let turn = self.turns.len();
        ensure!(report["outcome"] == "moved", "turn {turn}: {report}");
        let seconds = |value: &Value| value["seconds"].as_f64().with_context(|| format!("no seconds in {report}"));
        let done = Turn {
            seconds: seconds(&report)?,
            downtime: seconds(&report["downtime"])?,
            predicted: seconds(&report["predicted"])?,
            bytes: report["bytes"].as_u64().context("no bytes")?,
        };
        eprintln!(
            "turn {turn}: took {:.2} s, {} bytes, stood still for {:.3} s, predicted {:.3} s",
            done.seconds, done.bytes, done.downtime, done.predicted
        );
        if !is_near(&done) || done.seconds > SLOW {
            eprintln!("  {}; {}", stages(&report), report["link"]);
        }
        self.turns.push(done);
        self.note(to_first)?;
        Ok(report)
    }

    /// What a client saw of the last move.
    pub fn waited(&self, gap: Duration) {
        eprintln!("  the client waited {:.3} s", gap.as_secs_f64());
    }

    /// Remembers by what the guest would be known later.
    fn note(&mut self, on_first: bool) -> anyhow::Result<()> {
        let host = self.moving.host(on_first);
        let device = fs::metadata(folder(host).join("root"))?.dev();
        self.devices.insert(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
        let Some(pid) = self.moving.show(on_first)?["pid"].as_u64() else { return Ok(()) };
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let groups =
            text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(|path| path.trim_start_matches('/'));
        for group in groups.filter(|group| !group.is_empty()) {
            let hierarchies = fs::read_dir("/sys/fs/cgroup")?.flatten().map(|entry| entry.path());
            let places = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).map(|folder| folder.join(group));
            // Those that were there before the first guest are nobody's here.
            self.groups.extend(places.filter(|path| path.is_dir() && group.contains(guest())));
        }
        Ok(())
    }

    fn look(&self) -> anyhow::Result<Vec<Left>> {
        [true, false].map(|is_first| Left::on(self.moving.host(is_first), &self.devices)).into_iter().collect()
    }

    /// Says how the moves went, and fails if anything has piled up. The guest has to be where it was after the first moves.
    pub fn close(&self) -> anyhow::Result<()> {
        self.say_downtime();
        self.say_predictions();
        let counted = self.turns.len().saturating_sub(WARM_UP);
        if counted == 0 || counted % 2 == 1 {
            return Ok(());
        }
        let after = self.look()?;
        for (name, (before, after)) in ["a", "b"].iter().zip(self.before.iter().zip(&after)) {
            eprintln!("on {name}, before: {before:?}");
            eprintln!("on {name}, after {counted} moves: {after:?}");
            after.is_no_more_than(before, counted as u64).with_context(|| format!("on {name}"))?;
        }
        let groups: Vec<&PathBuf> = self.groups.iter().filter(|group| group.is_dir()).collect();
        eprintln!("control groups that it was in: {}, of which there are {}", self.groups.len(), groups.len());
        // Those that it is in now.
        let here = self.moving.show(true)?["pid"]
            .as_u64()
            .map_or(String::new(), |pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default());
        let is_left = |group: &&PathBuf| {
            let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
            !here.contains(&name)
        };
        let left: Vec<&PathBuf> = groups.into_iter().filter(is_left).collect();
        ensure!(left.is_empty(), "control groups are left: {left:?}");
        Ok(())
    }

    fn say_downtime(&self) {
        let downtimes: Vec<f64> = self.turns.iter().map(|turn| turn.downtime).collect();
        let (Some(first), Some(last)) = (downtimes.first(), downtimes.last()) else { return };
        let some = SOME_MOVES.min(downtimes.len());
        eprintln!(
            "{} moves; downtime: first {first:.3} s, median {:.3} s, last {last:.3} s",
            downtimes.len(),
            median(&downtimes)
        );
        eprintln!(
            "  median of the first {some} {:.3} s, of the last {some} {:.3} s; in all: first {:.2} s, last {:.2} s",
            median(&downtimes[..some]),
            median(&downtimes[downtimes.len() - some..]),
            self.turns[0].seconds,
            self.turns[self.turns.len() - 1].seconds
        );
    }

    fn say_predictions(&self) {
        // Each host has its own reports.
        let counted: Vec<&Turn> = self.turns.iter().skip(2 * SEEN).collect();
        let near = counted.iter().filter(|turn| is_near(turn)).count();
        if !counted.is_empty() {
            eprintln!("predicted within 30% or 150 ms: {near} of {}, after {SEEN} on each side", counted.len());
        }
    }
}

/// Whether it was foretold well.
fn is_near(turn: &Turn) -> bool {
    let off = (turn.predicted - turn.downtime).abs();
    off <= 0.15 || off <= 0.3 * turn.downtime
}

/// The stages of a report in short.
fn stages(report: &Value) -> String {
    let stages = report["stages"].as_array().into_iter().flatten();
    let one = |stage: &Value| {
        format!("{} {:.2}", stage["name"].as_str().unwrap_or("?"), stage["seconds"].as_f64().unwrap_or(0.0))
    };
    stages.map(one).collect::<Vec<_>>().join(", ")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// What there is of a host's and of the guest's making that could pile up.
#[derive(Debug)]
struct Left {
    mounts: usize,
    /// Of other programs, for the guest.
    processes: usize,
    /// Namespaces of mounts in which the guest's root is, or was.
    namespaces: usize,
    /// Network namespaces, and ends of pairs.
    networks: usize,
    names: Vec<String>,
    uppers: usize,
    files_in_memory: usize,
    open_files: usize,
    /// Of the guest's instance.
    depth: u64,
    /// That a collection of garbage leaves: what names, mounts, uppers and pins refer to.
    layers: u64,
    pack_bytes: u64,
}

impl Left {
    fn on(host: &Host, devices: &BTreeSet<String>) -> anyhow::Result<Left> {
        let store = host.ctl.store().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| line.contains(&store)).count();
        let (processes, namespaces) = processes(&store, devices)?;
        let instance = format!("guest/{}/instance", guest());
        // Of the last move's rounds one or two stay, until the guest moves again.
        let names: Vec<String> = host.names()?.into_keys().filter(|name| !name.contains("/round-")).collect();
        let depth = match names.contains(&instance) {
            true => host.ctl.json(["log", &instance])?["layers"].as_array().map_or(0, Vec::len) as u64,
            false => 0,
        };
        let layers = host.ctl.json(["gc"])?["live_layers"].as_u64().context("no live_layers")?;
        let daemon = host.daemon.as_ref().context("no daemon")?.pid();
        Ok(Left {
            mounts,
            processes,
            namespaces,
            networks: networks(host)?,
            names,
            uppers: entries(&host.ctl.store().join("uppers")),
            files_in_memory: walk(&memory_of(host)),
            open_files: entries(Path::new(&format!("/proc/{daemon}/fd"))),
            depth,
            layers,
            pack_bytes: host.pack_bytes()?,
        })
    }

    /// Fails if something of this has piled up in so many `moves` since `before`.
    fn is_no_more_than(&self, before: &Left, moves: u64) -> anyhow::Result<()> {
        for (what, now, then) in [
            ("mounts", self.mounts, before.mounts),
            ("processes", self.processes, before.processes),
            ("namespaces", self.namespaces, before.namespaces),
            ("networks", self.networks, before.networks),
            ("uppers", self.uppers, before.uppers),
            ("files in memory", self.files_in_memory, before.files_in_memory),
        ] {
            ensure!(now == then, "there are {now} {what} after {moves} moves, {then} before");
        }
        ensure!(self.names == before.names, "names: {:?}, before {:?}", self.names, before.names);
        let most = before.depth.max(MOST_LAYERS);
        ensure!(self.depth <= most, "the stack has {} layers", self.depth);
        ensure!(self.layers <= before.layers + most, "{} layers are kept, {} before", self.layers, before.layers);
        ensure!(
            self.open_files <= before.open_files + SOME_FILES,
            "{} files are open, {} before",
            self.open_files,
            before.open_files
        );
        // The guest writes its own small files all the time; packs that are partly dead are rewritten later.
        let allowed = before.pack_bytes + (8 << 20) + moves * (128 << 10);
        ensure!(self.pack_bytes < allowed, "packs grew from {} to {} bytes", before.pack_bytes, self.pack_bytes);
        Ok(())
    }
}

/// How many programs but the daemon work for the guests of `store`, and in how many namespaces there is a mount on one of `devices`:
/// none unless it runs alone, as the numbers of devices that are gone are used again, in namespaces of other tests too.
fn processes(store: &str, devices: &BTreeSet<String>) -> anyhow::Result<(usize, usize)> {
    let is_alone = std::env::var_os("LAYERFS_MIGRATIONS").is_some();
    let own = fs::read_link("/proc/self/ns/mnt")?;
    // Devices' numbers are used again: what is mounted here elsewhere is somebody else's.
    let here = fs::read_to_string("/proc/self/mountinfo")?;
    let device = |line: &str| line.split(' ').nth(2).map(str::to_owned);
    let others: BTreeSet<String> = here.lines().filter(|line| !line.contains(store)).filter_map(device).collect();
    let mut namespaces = BTreeSet::new();
    let mut count = 0;
    for entry in
        fs::read_dir("/proc")?.flatten().filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
    {
        let line = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).unwrap_or_default()).into_owned();
        count += usize::from(line.contains(store) && !line.contains("foreground"));
        let Some(namespace) = fs::read_link(entry.path().join("ns/mnt")).ok().filter(|other| *other != own) else {
            continue;
        };
        let mounts = fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        let is_one =
            |line: &str| device(line).is_some_and(|device| devices.contains(&device) && !others.contains(&device));
        if is_alone && mounts.lines().any(is_one) {
            namespaces.insert(namespace);
        }
    }
    Ok((count, namespaces.len()))
}

/// How many of the guest's networks there are on this host, by the names that its driver gives them.
fn networks(host: &Host) -> anyhow::Result<usize> {
    let run = folder(host).join("run");
    let name = format!("lg{}", &blake3::hash(run.as_os_str().as_encoded_bytes()).to_hex()[..10]);
    let links = layerfs_tests::host::run_in(host, "ip", &["-o", "link", "show"])?;
    let links = links.lines().filter(|line| line.contains(&name)).count();
    Ok(links + usize::from(Path::new("/run/netns").join(&name).exists()))
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, Iterator::count)
}

/// The files below `folder`.
fn walk(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.map(|path| if path.is_dir() { walk(&path) } else { 1 }).sum()
}

/// Many moves to and fro: what is there after them is what was there after the first few.
fn to_and_fro() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let mut count = moving.passes(true, 3)?;
    let mut ledger = Ledger::new(&moving);
    // An even number, so that it ends where it was when it was looked for the first time.
    for turn in 0..turns().next_multiple_of(2) + WARM_UP {
        let to_first = turn % 2 == 1;
        ledger.migrate(to_first, &[])?;
        count = moving.passes(to_first, count)?;
    }
    ledger.close()?;
    moving.end()
}

/// The zoo, and beside it a program that rewrites so many whole pages a second of so many MiB, with what can't be compressed.
fn busy(megabytes: u64, pages: u64) -> [String; 9] {
    let words = ["/bin/pair", "/bin/ramsim", "", "", "--", "/bin/zoo", "/zoo-says", "1", "0"];
    let mut words = words.map(str::to_owned);
    (words[2], words[3]) = (megabytes.to_string(), pages.to_string());
    words
}

fn start_busy(moving: &Moving, megabytes: u64, pages: u64) -> anyhow::Result<u64> {
    let words = busy(megabytes, pages);
    let options: Vec<&str> = std::iter::once("--").chain(words.iter().map(String::as_str)).collect();
    moving.start("process", &["pair", "ramsim", "zoo"], &options)?;
    // What it has yet to fill would look like memory that is rewritten.
    let began = Instant::now();
    while moving.show(true)?["memory_bytes"].as_u64().context("no memory")? < megabytes << 20 {
        ensure!(began.elapsed() < Duration::from_secs(60), "{megabytes} MiB aren't filled in a minute");
        std::thread::sleep(Duration::from_millis(100));
    }
    moving.passes(true, 0)
}

/// What a move takes while its guest stands still whatever that has rewritten: the runtime's own state, what else its processes change.
const STILL_BYTES: f64 = 512.0 * 1024.0;

/// For how long a guest has changed its memory when it stands still, since the last round began to read it.
fn seconds_since_last_round(report: &Value) -> anyhow::Result<f64> {
    let seconds = |value: &Value, field: &str| value[field].as_f64().with_context(|| format!("no {field}: {report}"));
    let last = report["rounds"].as_array().and_then(|rounds| rounds.last()).context("no rounds")?;
    let mut stages = report["stages"].as_array().into_iter().flatten();
    let dump = stages.find(|stage| stage["name"] == "dump").context("no dump")?;
    // It may run on while its dump is being prepared.
    Ok(seconds(dump, "at")? + seconds(dump, "seconds")? - seconds(last, "at")?)
}

/// A guest that uses its memory: what goes while it stands still is a small part of it.
// The figures are for whoever runs it to see them.
#[allow(clippy::print_stderr)]
fn memory() -> anyhow::Result<()> {
    let megabytes = number("LAYERFS_MEMORY", 48);
    let moves = number("LAYERFS_MEMORY_MOVES", 1);
    let moving = Moving::new()?;
    moving.hosts.link.shape(100)?;
    // 500 of 330 MiB, and as many for each MiB of less.
    let pages = (megabytes * 500 / 330).max(50);
    let mut count = start_busy(&moving, megabytes, pages)?;
    let mut ledger = Ledger::new(&moving);
    for turn in 0..moves {
        let to_first = turn % 2 == 1;
        let report = ledger.migrate(to_first, &[])?;
        count = moving.passes(to_first, count)?;
        let bytes = report["downtime"]["bytes"].as_u64().context("no bytes")?;
        let part = bytes as f64 / (megabytes << 20) as f64 * 100.0;
        eprintln!("  {bytes} bytes while it stood still, {part:.2}% of {megabytes} MiB; {}", stages(&report));
        eprintln!("  {}; {}; rounds {}", report["link"], report["decisions"], report["rounds"]);
        // More than that only if the machine took its time: then it is what the guest has rewritten since the last round began.
        let dirtied = seconds_since_last_round(&report)? * (pages * 4096) as f64;
        let most = ((megabytes << 20) as f64 * 0.05).max(dirtied * 1.05 + STILL_BYTES);
        ensure!(
            bytes as f64 <= most,
            "{part:.2}% of the memory went while it stood still, and {dirtied} bytes were rewritten since the last round: {report}"
        );
    }
    ledger.close()
}

/// One that changes its memory faster than the link carries it stays if the downtime would be too long, goes before its memory, or
/// ends its rounds and says why.
// The figures are for whoever runs it to see them.
#[allow(clippy::print_stderr)]
fn too_fast() -> anyhow::Result<()> {
    let megabytes = number("LAYERFS_MEMORY", 48) / 3;
    let moving = Moving::new()?;
    // 8 MiB a second, of which the link carries 2.4.
    moving.hosts.link.shape(20)?;
    let count = start_busy(&moving, megabytes, 2000)?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b", "--max-downtime", "100"])?.failed_with(5)?;
    ensure!(said.contains("--max-downtime") && said.contains("link carries"), "{said}");
    ensure!(said.contains("runs on here"), "{said}");
    eprintln!("--max-downtime 100: {}", said.trim());
    let count = moving.passes(true, count)?;
    let report = moving.migrate(false, &["--max-downtime", "100", "--postcopy"])?;
    went_before(&report)?;
    eprintln!("--max-downtime 100 --postcopy: {}; {}", report["downtime"], report["decisions"]);
    let count = moving.passes(false, count)?;
    let report = moving.migrate(true, &[])?;
    let why = report["decisions"].to_string();
    ensure!(why.contains("as fast as it can be sent"), "{report}");
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    ensure!((1..=4).contains(&rounds), "{rounds} rounds: {report}");
    eprintln!("without either: {rounds} rounds; {}; {why}", report["downtime"]);
    moving.passes(true, count)?;
    // And at once, if it is asked for.
    went_before(&moving.migrate(false, POST_COPY)?)?;
    moving.end()
}
