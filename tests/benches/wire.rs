//! Pushes between two hosts: speed against rsync's daemon, use of a shaped link, bytes for what changed.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use layerfs_tests::case::has_tool;
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, TwoHosts, run_in};
use layerfs_tests::{network, tree};

use crate::Plan;
use crate::measure::{Contestant, medians, middle};
use crate::table::{Row, Table};

const MEGABITS: u32 = 100;
const BIG: u64 = 100_000_000;

/// The rows of this part.
pub fn rows(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    network::usable()?;
    cold_push(plan, table)?;
    shaped_push(plan, table)?;
    small_changes(table)
}

/// Two hosts, the first of which holds the tree.
fn hosts_with_tree(plan: &Plan) -> anyhow::Result<TwoHosts> {
    let hosts = TwoHosts::new()?;
    hosts.a.import(&plan.tree, "tree", &[])?;
    Ok(hosts)
}

fn cold_push(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    let push = |hosts: &mut TwoHosts| hosts.push(&["tree"]).map(drop);
    let rsync = if has_tool("rsync") { Some(RsyncPair::new()?) } else { None };
    let mut contestants = vec![Contestant::new("layerfs", || hosts_with_tree(plan), push)];
    match &rsync {
        Some(rsync) => {
            contestants.push(Contestant::new("rsync daemon", || rsync.empty(), |()| rsync.run(&plan.tree)));
        }
        None => table.skipped("rsync", "not installed: run scripts/setup bench"),
    }
    let mut peers = medians(plan.runs, &mut contestants)?;
    let (_, ours) = peers.remove(0);
    let met = peers.first().map(|(_, theirs)| theirs / ours >= 3.0);
    let goal = "3 times as fast as rsync".into();
    table.add(Row { what: "cold push, unshaped".into(), unit: "s", ours, peers, goal, met });
    Ok(())
}

/// A running rsync daemon, ended when dropped.
struct Rsyncd(Child);

impl Drop for Rsyncd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two hosts on a link of their own, with an rsync daemon on the second.
pub struct RsyncPair {
    _daemon: Rsyncd,
    target: PathBuf,
    /// Where rsync finds the target.
    pub address: String,
    /// The hosts, without layers.
    pub hosts: TwoHosts,
}

impl RsyncPair {
    /// Starts the daemon and waits until it answers.
    pub fn new() -> anyhow::Result<RsyncPair> {
        let hosts = TwoHosts::strangers()?;
        let (config, target) = (hosts.b.path("rsyncd.conf"), hosts.b.new_folder("target")?);
        let text = "use chroot = no\nuid = 0\ngid = 0\n[tree]\nread only = no\npath = ";
        std::fs::write(&config, format!("{text}{}\n", target.display()))?;
        let namespace = format!("--net=/run/netns/{}", hosts.link.b.namespace);
        let mut daemon = Command::new("nsenter");
        daemon.arg(namespace).args(["--", "rsync", "--daemon", "--no-detach", "--address", &hosts.link.b.address]);
        daemon.arg("--config").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let address = format!("rsync://{}/tree/", hosts.link.b.address);
        let pair = RsyncPair { _daemon: Rsyncd(daemon.spawn()?), target, address, hosts };
        let started = Instant::now();
        while run_in(&pair.hosts.a, "rsync", &[&pair.address]).is_err() {
            ensure!(started.elapsed().as_secs() < 10, "the rsync daemon does not answer");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(pair)
    }

    fn empty(&self) -> anyhow::Result<()> {
        std::fs::remove_dir_all(&self.target)?;
        std::fs::create_dir(&self.target).context("cannot empty the target")
    }

    fn run(&self, tree: &Path) -> anyhow::Result<()> {
        let from = format!("{}/", tree.display());
        run_in(&self.hosts.a, "rsync", &["-aHAXS", "--numeric-ids", &from, &self.address]).map(drop)
    }
}

fn shaped_push(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    let mut uses = Vec::new();
    for _ in 0..plan.runs.min(3) {
        let hosts = hosts_with_tree(plan)?;
        hosts.link.shape(MEGABITS)?;
        let before = hosts.link.a.shaped_bytes()?;
        let started = Instant::now();
        hosts.push(&["tree"])?;
        let seconds = started.elapsed().as_secs_f64();
        let bits = (hosts.link.a.shaped_bytes()? - before) as f64 * 8.0;
        uses.push(bits / seconds / (f64::from(MEGABITS) * 1e6) * 100.0);
    }
    let ours = middle(uses).context("no runs")?;
    table.add(Row {
        what: format!("cold push, use of a {MEGABITS} Mbit/s link"),
        unit: "%",
        ours,
        peers: Vec::new(),
        goal: "at least 95".into(),
        met: Some(ours >= 95.0),
    });
    Ok(())
}

/// Pushes `name`; bytes at the interface in both directions.
pub fn pushed_bytes(hosts: &TwoHosts, name: &str) -> anyhow::Result<u64> {
    let count = || anyhow::Ok(hosts.link.a.sent_bytes()? + hosts.link.a.received_bytes()?);
    let before = count()?;
    let report = hosts.push(&[name])?;
    number(&report, "bytes_sent")?;
    Ok(count()? - before)
}

fn change(path: &Path, offset: u64) -> anyhow::Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset).context("cannot change a byte")
}

fn small_changes(table: &mut Table) -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let source = hosts.a.path("tree");
    tree::fill(&source, 9, 50_000, 700)?;
    tree::big_file(&source.join("big"), 10, BIG)?;
    hosts.a.import(&source, "v1", &[])?;
    hosts.push(&["v1"])?;
    let bytes = |what: &str, ours: u64, most: u64, goal: &str| Row {
        what: what.into(),
        unit: "bytes",
        ours: ours as f64,
        peers: Vec::new(),
        goal: goal.into(),
        met: Some(ours <= most),
    };
    table.add(bytes("push of what is there", pushed_bytes(&hosts, "v1")?, 10_000, "under 10,000"));

    let three_chunks = (3 * 256 + 64) << 10;
    let goal = "three chunks and 64 KiB";
    change(&source.join("big"), BIG / 2)?;
    hosts.a.import(&source, "v2", &[])?;
    table.add(bytes("push of one byte of 100 MB, imported afresh", pushed_bytes(&hosts, "v2")?, three_chunks, goal));
    table.add(sealed_change(&hosts, |ours| bytes("push of one byte of 100 MB, sealed", ours, three_chunks, goal))?);
    Ok(())
}

fn sealed_change(hosts: &TwoHosts, row: impl Fn(u64) -> Row) -> anyhow::Result<Row> {
    let host: &Host = &hosts.a;
    let mounted = host.mount("v1", "mounted", &[])?;
    change(&mounted.join("big"), BIG / 3)?;
    host.seal(&mounted, "v3")?;
    let ours = pushed_bytes(hosts, "v3")?;
    host.umount(&mounted)?;
    Ok(row(ours))
}
