//! What a real change costs on the wire, beside the tools that move changes: the bytes, not the time.
//!
//! Ours and rsync's bytes are those at the interface, in both directions, headers included. casync and borg are judged by
//! what their stores have grown and their index, as if moving it cost nothing more; xdelta3 by its difference alone, made
//! with both versions at hand: no tool that doesn't have them can do much better. The link is shaped to
//! [`MEGABITS`], as bytes matter where links are slow, and ours compresses the harder the slower the link is.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use layerfs_tests::case::{has_tool, output_of, shell};
use layerfs_tests::debian;
use layerfs_tests::host::{TwoHosts, run_in};
use layerfs_tests::network;

use crate::Plan;
use crate::table::{Row, Table};
use crate::wire::{RsyncPair, pushed_bytes};

const MEGABITS: u32 = 10;
/// Ours may be so many times as large as xdelta3's.
const FLOOR: f64 = 1.5;

/// Packages with an older and a newer version in Debian's own archives.
const OPENSSL: [[&str; 2]; 2] = [
    ["openssl=3.0.20-1~deb12u2", "openssl=3.0.22-1~deb12u2"],
    ["libssl3=3.0.20-1~deb12u2", "libssl3=3.0.22-1~deb12u2"],
];
const UPGRADE: [[&str; 2]; 8] = [
    OPENSSL[0],
    OPENSSL[1],
    ["libc6=2.36-9+deb12u7", "libc6=2.36-9+deb12u14"],
    ["curl=7.88.1-10+deb12u5", "curl=7.88.1-10+deb12u15"],
    ["libcurl4=7.88.1-10+deb12u5", "libcurl4=7.88.1-10+deb12u15"],
    ["python3.11-minimal=3.11.2-6+deb12u8", "python3.11-minimal=3.11.2-6+deb12u9"],
    ["libpython3.11-minimal=3.11.2-6+deb12u8", "libpython3.11-minimal=3.11.2-6+deb12u9"],
    ["libpython3.11-stdlib=3.11.2-6+deb12u8", "libpython3.11-stdlib=3.11.2-6+deb12u9"],
];

/// Makes a change in a folder.
type Make = fn(&Path) -> anyhow::Result<Change>;
/// How many bytes another tool sends for a change, with a folder to work in.
type Measure = fn(&Change, &Path) -> anyhow::Result<u64>;

/// One change: a thing before and after, a folder or a file.
struct Change {
    what: &'static str,
    old: PathBuf,
    new: PathBuf,
    /// What it lies over, if it isn't a thing of its own.
    parent: Option<PathBuf>,
}

/// The rows of this part.
pub fn rows(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    network::usable()?;
    for tool in ["rsync", "casync", "borg", "xdelta3"].into_iter().filter(|tool| !has_tool(tool)) {
        table.skipped(tool, "not installed: run scripts/setup bench");
    }
    let changes: [(&str, Make); 5] = [
        ("package", package),
        ("disk image", disk_image),
        ("memory image", memory_image),
        ("database", database),
        ("tree", tree_again),
    ];
    for (name, make) in changes.into_iter().filter(|(name, _)| name.contains(&plan.row)) {
        let folder = plan.work.path().join(format!("bytes-{}", name.replace(' ', "-")));
        std::fs::create_dir_all(&folder)?;
        let result = make(&folder).and_then(|change| row(plan, &change, &folder));
        match result {
            Ok(row) => table.add(row),
            Err(error) => table.skipped(name, &format!("{error:#}")),
        }
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

fn row(plan: &Plan, change: &Change, work: &Path) -> anyhow::Result<Row> {
    let ours = ours(change)? as f64;
    let mut peers = Vec::new();
    let tools: [(&'static str, Measure); 4] =
        [("rsync", rsync), ("casync", casync), ("borg", borg), ("xdelta3", xdelta)];
    for (name, tool) in tools.into_iter().filter(|(name, _)| !plan.alone && has_tool(name)) {
        peers.push((name, tool(change, work).context(name)? as f64));
    }
    let met = peers.iter().all(|(name, theirs)| match *name {
        "xdelta3" => ours <= theirs * FLOOR,
        _ => ours <= *theirs,
    });
    let goal = format!("no more than any; at most {FLOOR} xdelta3");
    Ok(Row { what: change.what.into(), unit: "bytes", ours, peers, goal, met: Some(met).filter(|_| !plan.alone) })
}

fn ours(change: &Change) -> anyhow::Result<u64> {
    let hosts = TwoHosts::new()?;
    let mut parent: &[&str] = &[];
    if let Some(below) = &change.parent {
        hosts.a.import(below, "below", &[])?;
        parent = &["--parent", "below"];
    }
    hosts.a.import(&change.old, "old", parent)?;
    hosts.push(&["old"])?;
    hosts.a.import(&change.new, "new", &[parent, &["--like", "old"]].concat())?;
    hosts.link.shape(MEGABITS)?;
    pushed_bytes(&hosts, "new")
}

fn rsync(change: &Change, _: &Path) -> anyhow::Result<u64> {
    let pair = RsyncPair::new()?;
    let slash = if change.old.is_dir() { "/" } else { "" };
    let name = if change.old.is_dir() { "" } else { "file" };
    let send = |from: &Path| {
        let (from, to) = (format!("{}{slash}", from.display()), format!("{}{name}", pair.address));
        run_in(&pair.hosts.a, "rsync", &["-az", "--inplace", "--numeric-ids", "--delete", &from, &to])
    };
    send(&change.old)?;
    let link = &pair.hosts.link.a;
    let before = link.sent_bytes()? + link.received_bytes()?;
    send(&change.new)?;
    Ok(link.sent_bytes()? + link.received_bytes()? - before)
}

fn casync(change: &Change, work: &Path) -> anyhow::Result<u64> {
    let (store, ending) = (work.join("casync"), if change.old.is_dir() { "caidx" } else { "caibx" });
    let make = |name: &str, source: &Path| {
        let index = work.join(format!("{name}.{ending}"));
        let mut command = Command::new("casync");
        command.arg("make").arg(format!("--store={}", store.display())).arg(&index).arg(source);
        output_of(&mut command).map(|_| index)
    };
    make("old", &change.old)?;
    let before = crate::size_of(&store)?;
    let index = make("new", &change.new)?;
    Ok(crate::size_of(&store)? - before + index.metadata()?.len())
}

fn borg(change: &Change, work: &Path) -> anyhow::Result<u64> {
    let repository = work.join("borg");
    let run = |line: &str, source: &Path| {
        let mut command = Command::new("sh");
        command.args(["-euc", line]).env("repo", &repository).env("source", source);
        command.env("BORG_BASE_DIR", work.join("borg-base")).env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        output_of(&mut command)
    };
    // The same name for both, as for a file that has changed.
    let create = |name: &str, source: &Path| {
        let link = work.join("source");
        std::fs::rename(source, &link)?;
        let made = run(&format!("borg create --compression zstd,9 \"$repo\"::{name} \"$source\""), &link);
        std::fs::rename(&link, source)?;
        made
    };
    run("borg init -e none \"$repo\"", work)?;
    create("old", &change.old)?;
    let before = crate::size_of(&repository)?;
    create("new", &change.new)?;
    Ok(crate::size_of(&repository)? - before)
}

fn xdelta(change: &Change, work: &Path) -> anyhow::Result<u64> {
    let file = |path: &Path, name: &str| {
        if path.is_file() {
            return Ok(path.to_owned());
        }
        let tar = work.join(name);
        let sorted = ["--sort=name", "--numeric-owner", "-cf"];
        output_of(Command::new("tar").args(sorted).arg(&tar).arg("-C").arg(path).arg(".")).map(|_| tar)
    };
    let (old, new, delta) = (file(&change.old, "old.tar")?, file(&change.new, "new.tar")?, work.join("xdelta"));
    let mut command = Command::new("xdelta3");
    command.args(["-e", "-f", "-9", "-S", "lzma", "-B", &old.metadata()?.len().max(1 << 20).to_string(), "-s"]);
    output_of(command.arg(&old).arg(&new).arg(&delta))?;
    Ok(delta.metadata()?.len())
}

/// Unpacks the older or newer of each of `packages` to `to`.
fn unpack(packages: &[[&str; 2]], version: usize, to: &Path) -> anyhow::Result<()> {
    let cache = debian::cache_folder().join("packages");
    std::fs::create_dir_all(&cache)?;
    for package in packages {
        let (name, number) = package[version].split_once('=').context("a package without version")?;
        // As apt names the files.
        let file = cache.join(format!("{name}_{}_amd64.deb", number.replace(':', "%3a")));
        if !file.is_file() {
            output_of(Command::new("apt-get").current_dir(&cache).args(["download", "-q", package[version]]))?;
        }
        ensure!(file.is_file(), "{} was not downloaded", file.display());
        output_of(Command::new("dpkg-deb").arg("-x").arg(&file).arg(to))?;
    }
    Ok(())
}

fn package(work: &Path) -> anyhow::Result<Change> {
    let (old, new) = (work.join("before"), work.join("after"));
    for (version, folder) in [&old, &new].into_iter().enumerate() {
        std::fs::create_dir(folder)?;
        unpack(&OPENSSL, version, folder)?;
    }
    Ok(Change {
        what: "a package upgraded in an application layer",
        old,
        new,
        parent: Some(debian::root()?.to_owned()),
    })
}

/// A file system image of 1 GB, mounted for the upgrade, so that ext4 itself chooses where the new blocks go.
fn disk_image(work: &Path) -> anyhow::Result<Change> {
    let (tree, raw, old, new) =
        (work.join("tree"), work.join("disk.raw"), work.join("before.qcow2"), work.join("after.qcow2"));
    output_of(Command::new("cp").arg("-a").arg(debian::root()?).arg(&tree))?;
    unpack(&UPGRADE, 0, &tree)?;
    let convert =
        |to: &Path| output_of(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(to));
    shell(&format!("mke2fs -q -t ext4 -d '{}' '{}' 1000M", tree.display(), raw.display()))?;
    convert(&old)?;
    let mounted = work.join("mounted");
    std::fs::create_dir(&mounted)?;
    output_of(Command::new("mount").args(["-o", "loop"]).arg(&raw).arg(&mounted))?;
    let upgraded = unpack(&UPGRADE, 1, &mounted);
    output_of(Command::new("umount").arg(&mounted))?;
    upgraded?;
    convert(&new)?;
    std::fs::remove_dir_all(&tree)?;
    Ok(Change { what: "an upgrade inside a 1 GB qcow2", old, new, parent: None })
}

/// What a process with many objects has in memory, twice.
fn memory_image(work: &Path) -> anyhow::Result<Change> {
    const PROGRAM: &str = "
import random, time
random.seed(1)
def thing(i): return ('name-%d' % i, [random.random() for _ in range(6)], {'id': i, 'tag': 'x%d' % (i % 99)})
things = {i: thing(i) for i in range(440000)}
print('ready', flush=True)
while True:
    for _ in range(3):
        i = random.randrange(len(things))
        things[i] = thing(i)
    time.sleep(0.001)
";
    let mut process = Command::new("python3").args(["-c", PROGRAM]).stdout(Stdio::piped()).spawn()?;
    let result = (|| {
        let mut line = String::new();
        let output = process.stdout.take().context("no output")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
        let (old, new) = (work.join("before.mem"), work.join("after.mem"));
        let ranges = writable(process.id())?;
        dump(process.id(), &ranges, &old)?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        dump(process.id(), &ranges, &new)?;
        Ok(Change { what: "a memory image of 330 MB, two seconds later", old, new, parent: None })
    })();
    process.kill()?;
    process.wait()?;
    result
}

/// Where a process has memory of its own.
fn writable(pid: u32) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let (range, rest) = line.split_once(' ').context("an odd map")?;
        if rest.starts_with("rw-p") && !line.contains("[stack]") {
            let (from, to) = range.split_once('-').context("an odd range")?;
            ranges.push((u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?));
        }
    }
    Ok(ranges)
}

fn dump(pid: u32, ranges: &[(u64, u64)], to: &Path) -> anyhow::Result<()> {
    let signal = |name: &str| output_of(Command::new("kill").args([name, &pid.to_string()]));
    signal("-STOP")?;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let file = std::fs::File::create(to)?;
    let mut at = 0;
    for (from, end) in ranges {
        let mut piece = vec![0; (end - from) as usize];
        // What the process has given back meanwhile is zero.
        let _ = memory.read_exact_at(&mut piece, *from);
        file.write_all_at(&piece, at)?;
        at += end - from;
    }
    signal("-CONT").map(drop)
}

fn database(work: &Path) -> anyhow::Result<Change> {
    let (old, new) = (work.join("before"), work.join("after"));
    std::fs::create_dir(&old)?;
    let sql = "PRAGMA page_size = 4096; CREATE TABLE account (id INTEGER PRIMARY KEY, name TEXT, note TEXT, balance REAL, changed INTEGER); \
               WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000) \
               INSERT INTO account SELECT i, 'customer ' || i, hex(randomblob(60)), i * 1.5, 1700000000 + i FROM n; \
               CREATE INDEX by_name ON account (name);";
    let run = |folder: &Path, sql: &str| {
        let script = work.join("sql");
        std::fs::write(&script, sql)?;
        let input = std::fs::File::open(&script)?;
        output_of(Command::new("sqlite3").arg(folder.join("data.sqlite")).stdin(input))
    };
    run(&old, sql)?;
    output_of(Command::new("cp").arg("-a").arg(&old).arg(&new))?;
    let update = "UPDATE account SET balance = balance + abs(random() % 1000), changed = 1800000000 + abs(random() % 1000), \
                  note = hex(randomblob(60)) WHERE id = (SELECT 1 + abs(random() % 400000));";
    run(&new, &format!("BEGIN; {} COMMIT;", update.repeat(1000)))?;
    // Of the same size and changed in the same second: rsync would take it for unchanged.
    output_of(Command::new("touch").args(["-d", "2025-03-04 05:06:07"]).arg(new.join("data.sqlite")))?;
    Ok(Change { what: "an SQLite database after 1,000 updates", old, new, parent: None })
}

/// The tree, taken apart and put together again by another machine: every time is another, nothing else.
fn tree_again(work: &Path) -> anyhow::Result<Change> {
    let (old, new) = (debian::root()?.to_owned(), work.join("after"));
    output_of(Command::new("cp").arg("-a").arg(&old).arg(&new))?;
    // Files of a second lie together, as when an archive is unpacked.
    shell(&format!(
        "cd '{}'; find . -print0 | sort -z | xargs -0 -n 100 sh -c 'touch -h -d @$((1741064767 + $$ % 60)) \"$@\"' touch",
        new.display()
    ))?;
    Ok(Change { what: "a tree with all its times changed", old, new, parent: None })
}
