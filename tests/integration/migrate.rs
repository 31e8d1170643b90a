//! Guests that move between two hosts while they run: real runtimes, a client that stays connected, and hosts that die on the way.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{self, Containers, Criu, Fuse, GuestTool, Kernel, Namespaces, Root, Tool};
use layerfs_tests::ctl::{Answer, Ctl};
use layerfs_tests::host::{Host, TwoHosts, run_in};
use layerfs_tests::network::inside;
use layerfs_tests::{case, fixtures};
use migrator::guest::programs::{DEFAULT_FOLDER, Programs};
use serde_json::Value;

use crate::moves::Ledger;

/// The longest that anything may take: on a busy machine a guest may stand still for many seconds, and its client's next try
/// comes as much later.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The name of a guest, which is another one in each test that runs at a time: runtimes call what they make on this machine after it.
/// What a test starts beside itself has to be given it.
pub fn guest() -> &'static str {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NAME: &'static str = format!("zoo{}", NEXT.fetch_add(1, SeqCst)).leak());
    NAME.with(|name| *name)
}

/// How often it goes to and fro, unless `LAYERFS_MIGRATIONS` says otherwise.
const TURNS: usize = 4;

/// The destination dies at these steps, one by one.
pub const STEPS: &[&str] = &["move.journalled:1", "move.journalled:2", "move.journalled:3"];
/// And a host at these, as it starts a guest.
pub const START_STEPS: &[&str] = &["guest.started"];

/// What guests of each driver need to move between two hosts.
pub const PROCESS: &[Need] = &[Root, Fuse, Namespaces, Tool("cc"), Criu];
pub const OCI: &[Need] = &[Root, Fuse, Containers, Namespaces, Tool("cc"), Criu, GuestTool("runc")];
pub const LXC: &[Need] = &[Root, Fuse, Containers, Namespaces, Tool("cc"), Criu, Tool("lxc-start")];
pub const QEMU: &[Need] = &[Root, Fuse, Namespaces, Tool("cc"), Tool("qemu-system-x86_64"), Kernel];

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("migrate::process_to_and_fro", PROCESS, process),
        Case::new("migrate::process_keeps_its_client", PROCESS, || container("process")),
        Case::new("migrate::oci_keeps_its_client", OCI, || container("oci")),
        Case::new("migrate::lxc_keeps_its_client", LXC, || container("lxc")),
        Case::new("migrate::qemu_keeps_its_client", QEMU, machine),
        Case::new("migrate::process_is_connected_when_its_criu_dies", PROCESS, criu_dies),
        Case::new("migrate::process_keeps_its_network", PROCESS, || keeps_its_network("process")),
        Case::new("migrate::oci_keeps_its_network", OCI, || keeps_its_network("oci")),
        Case::new("migrate::lxc_keeps_its_network", LXC, || keeps_its_network("lxc")),
        Case::new("migrate::process_goes_before_its_memory", PROCESS, || ahead_of_memory("process")),
        Case::new("migrate::oci_goes_before_its_memory", OCI, || ahead_of_memory("oci")),
        Case::new("migrate::lxc_goes_before_its_memory", LXC, || ahead_of_memory("lxc")),
        Case::new("migrate::a_restore_that_fails_gives_it_back", PROCESS, restore_fails),
        Case::new("migrate::a_container_goes_on_from_its_files", OCI, container_goes_back),
        Case::new("migrate::a_dump_that_fails_changes_nothing", PROCESS, dump_fails),
        Case::new("migrate::a_full_disk_leaves_it_running", PROCESS, disk_full),
        Case::new("migrate::a_store_behind_a_link_keeps_its_guests", PROCESS, behind_a_link),
        Case::new("migrate::the_link_is_cut_before_the_commit", PROCESS, cut_before),
        Case::new("migrate::the_link_is_cut_after_the_commit", PROCESS, cut_after),
        Case::new("migrate::the_source_dies_on_the_way", PROCESS, source_dies),
        Case::new("migrate::the_destination_dies_on_the_way", PROCESS, dies),
        Case::new("migrate::the_destination_dies_while_it_restores", PROCESS, || {
            dies_restoring("process", "criu", "restore")
        }),
        Case::new("migrate::lxc_destination_dies_while_it_restores", LXC, || {
            dies_restoring("lxc", "lxc-checkpoint", "-r")
        }),
        Case::new("migrate::oci_source_dies_while_it_dumps", OCI, || dies_dumping("oci", "runc", "checkpoint")),
        Case::new("migrate::lxc_source_dies_while_it_dumps", LXC, || dies_dumping("lxc", "lxc-checkpoint", "-s")),
        Case::new("migrate::oci_checkpoint_is_repeated_after_a_crash", OCI, || {
            checkpoint_is_repeated("oci", "runc", "checkpoint")
        }),
        Case::new("migrate::lxc_checkpoint_is_repeated_after_a_crash", LXC, || {
            checkpoint_is_repeated("lxc", "lxc-checkpoint", "-s")
        }),
        Case::new("migrate::oci_is_taken_out_of_the_freezer", OCI, || is_thawed(&RUNC_FREEZER)),
        Case::new("migrate::lxc_is_taken_out_of_the_freezer", LXC, || is_thawed(&LXC_FREEZER)),
        Case::new("migrate::process_accepts_its_clients_first", PROCESS, || accepts_first("process")),
        Case::new("migrate::oci_accepts_its_clients_first", OCI, || accepts_first("oci")),
        Case::new("migrate::lxc_accepts_its_clients_first", LXC, || accepts_first("lxc")),
        Case::new("migrate::process_start_outlives_the_daemon", PROCESS, || start_is_cut_off("process")),
        Case::new("migrate::qemu_start_outlives_the_daemon", QEMU, || start_is_cut_off("qemu")),
        Case::new("migrate::obstacles_and_mistakes_are_told", &[Root, Fuse, Namespaces, Tool("cc")], mistakes),
    ]
}

/// Two hosts that may move guests to each other; the guest is removed at the end, wherever it is.
pub struct Moving {
    /// The hosts.
    pub hosts: TwoHosts,
}

impl Drop for Moving {
    fn drop(&mut self) {
        for host in [&self.hosts.a, &self.hosts.b] {
            let _ = host.ctl.run(["guest", "remove", guest(), "--force"]);
        }
    }
}

impl Moving {
    pub fn new() -> anyhow::Result<Moving> {
        let hosts = TwoHosts::new()?;
        hosts.a.ctl.ok(["peer", "set", "b", "--allow-guests"])?;
        hosts.b.ctl.ok(["peer", "set", "a", "--allow-guests"])?;
        Ok(Moving { hosts })
    }

    /// A zoo runs on the first host.
    pub fn zoo() -> anyhow::Result<Moving> {
        let moving = Moving::new()?;
        moving.start("process", &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
        Ok(moving)
    }

    /// A machine with a service runs on the first host; both have a bridge in one subnet.
    pub fn machine() -> anyhow::Result<Moving> {
        let moving = Moving::new()?;
        connect_bridges(&moving.hosts)?;
        fixtures::machine(&moving.hosts.a.path("tree"))?;
        let boot = ["--kernel", "/vmlinuz", "--initrd", "/initrd", "--append"];
        let append = "console=ttyS0 quiet panic=-1 address=10.77.0.2";
        let options = ["--memory", "192M", "--network", NETWORK];
        moving.start("qemu", &[], &[&options[..], &boot, &[append]].concat())?;
        Ok(moving)
    }

    /// Starts the guest of `driver` with `programs` in its root.
    pub fn start(&self, driver: &str, programs: &[&str], options: &[&str]) -> anyhow::Result<()> {
        let a = &self.hosts.a;
        for program in programs {
            fixtures::build(program, &a.path("tree/bin").join(program))?;
        }
        a.import(&a.path("tree"), "app", &["--kind", "base"])?;
        let create = ["guest", "create", guest(), "--driver", driver, "--on", "app"];
        a.ctl.ok(create.iter().chain(options))?;
        a.ctl.ok(["guest", "start", guest()])?;
        Ok(())
    }

    pub fn host(&self, is_first: bool) -> &Host {
        if is_first { &self.hosts.a } else { &self.hosts.b }
    }

    /// Moves it away from the first host, or back to it.
    pub fn migrate(&self, to_first: bool, options: &[&str]) -> anyhow::Result<Value> {
        let peer = if to_first { "a" } else { "b" };
        self.host(!to_first).ctl.json(["migrate", guest(), peer].iter().chain(options))
    }

    pub fn show(&self, is_first: bool) -> anyhow::Result<Value> {
        self.host(is_first).ctl.json(["guest", "show", guest()])
    }

    /// What the zoo counts to there, if it has lost nothing.
    fn count(&self, is_first: bool) -> anyhow::Result<u64> {
        let file = folder(self.host(is_first)).join("root/zoo-says");
        let text = fs::read_to_string(file).context("the zoo says nothing")?;
        let (count, rest) = text.trim().split_once(' ').with_context(|| format!("the zoo says {text:?}"))?;
        ensure!(rest == "ok", "bad: the zoo says {text:?}");
        Ok(count.parse()?)
    }

    /// Waits until the zoo there counts beyond `count`, and returns to what.
    pub fn passes(&self, is_first: bool, count: u64) -> anyhow::Result<u64> {
        let began = Instant::now();
        loop {
            // While its file is rewritten it says nothing.
            match self.count(is_first) {
                Ok(now) if now > count => return Ok(now),
                Err(error) if format!("{error:#}").contains("bad") => return Err(error),
                state => ensure!(began.elapsed() < PATIENCE, "the zoo doesn't count beyond {count}: {state:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the guest from both hosts, on which nothing of it stays.
    pub fn end(&self) -> anyhow::Result<()> {
        for is_first in [true, false] {
            let removed = self.host(is_first).ctl.run(["guest", "remove", guest(), "--force"])?;
            // It may never have come there.
            ensure!(matches!(removed.code, 0 | 3), "it isn't removed: {removed:?}");
            left_nothing(self, is_first)?;
            let folder = folder(self.host(is_first));
            ensure!(removed.code == 3 || !folder.exists(), "a removed guest leaves {}", folder.display());
        }
        Ok(())
    }

    /// Where it runs, once nothing is left to do: exactly one host.
    pub fn settled(&self) -> anyhow::Result<bool> {
        let began = Instant::now();
        loop {
            let mut runs = Vec::new();
            let mut is_open = false;
            for is_first in [true, false] {
                let ctl = &self.host(is_first).ctl;
                is_open |= ctl.run(["guest", "resolve", guest()])?.code == 0;
                let shown = ctl.run(["guest", "show", guest(), "--json"])?;
                let info: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
                if info["activity"] == "running" {
                    runs.push(is_first);
                }
            }
            ensure!(runs.len() < 2, "it runs on both");
            if let (false, &[is_first]) = (is_open, &runs[..]) {
                return Ok(is_first);
            }
            ensure!(began.elapsed() < PATIENCE, "it is not settled: open {is_open}, runs on {runs:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where `host` keeps what belongs to the guest: its root, and what its runtime leaves.
pub fn folder(host: &Host) -> PathBuf {
    host.ctl.store().join("guests").join(guest())
}

/// Where `host` keeps states that are being written, as long as there are any.
pub fn memory_of(host: &Host) -> PathBuf {
    PathBuf::from(format!(
        "/dev/shm/layerfs{}",
        host.ctl.store().display().to_string().replace('_', "__").replace('-', "_-").replace('/', "-")
    ))
}

/// Waits until no state is left in the memory of `host`.
fn leaves_memory(host: &Host) -> anyhow::Result<()> {
    let began = Instant::now();
    while memory_of(host).exists() {
        ensure!(began.elapsed() < PATIENCE, "a state is left in memory");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// How often a guest goes to and fro.
pub fn turns() -> usize {
    std::env::var("LAYERFS_MIGRATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(TURNS)
}

fn process() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let mut count = moving.passes(true, 3)?;
    let mut is_first = true;
    for turn in 0..turns() {
        let report = moving.migrate(!is_first, &[])?;
        ensure!(report["outcome"] == "moved", "turn {turn}: {report}");
        is_first = !is_first;
        count = moving.passes(is_first, count)?;
        ensure!(moving.show(!is_first)?["state"] == "away", "turn {turn}: the other host keeps it");
        ensure!(moving.show(!is_first)?["activity"] == "absent", "turn {turn}: the other host runs it");
        if turn > 0 {
            // All but the base was there before, and the memory that hasn't changed.
            let bytes = report["bytes"].as_u64().context("no bytes")?;
            ensure!(bytes < 8 << 20, "turn {turn}: {bytes} bytes for what is there already");
        }
    }
    left_nothing(&moving, !is_first)?;
    let listed = moving.hosts.a.ctl.json(["report"])?;
    ensure!(listed["reports"].as_array().is_some_and(|reports| !reports.is_empty()), "no reports: {listed}");
    let page = moving.hosts.a.ctl.ok(["report", "latest", "--html", "-"])?.text();
    ensure!(page.contains("<svg ") && page.contains("restore"), "the page shows nothing: {page}");
    moving.end()?;
    moving.host(true).fsck()?;
    moving.host(false).fsck()
}

/// Fails if anything of the guest is mounted where it isn't.
fn left_nothing(moving: &Moving, on_first: bool) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let guests = moving.host(on_first).ctl.store().join("guests");
    ensure!(!mounts.contains(&*guests.to_string_lossy()), "a guest that went leaves mounts");
    let memory = memory_of(moving.host(on_first));
    ensure!(!memory.exists(), "a guest that went leaves {}", memory.display());
    Ok(())
}

/// Puts a program at a point of a move on `host`.
pub fn hook(host: &Host, point: &str, script: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = host.ctl.store().join("hooks");
    fs::create_dir_all(&folder)?;
    let path = folder.join(point);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// CRIU can't restore it, as a file that it needs is gone: it goes on where it was.
fn restore_fails() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let count = moving.passes(true, 3)?;
    let program = folder(&moving.hosts.b).join("root/bin/zoo");
    hook(&moving.hosts.b, "before-restore", &format!("rm {}", program.display()))?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(1)?;
    ensure!(said.contains("gave it back") && said.contains("zoo"), "{said}");
    ensure!(moving.settled()?, "it runs elsewhere");
    let count = moving.passes(true, count)?;
    fs::remove_file(moving.hosts.b.ctl.store().join("hooks/before-restore"))?;
    moving.migrate(false, &[])?;
    moving.passes(false, count)?;
    moving.end()
}

/// The same for a container whose processes end with the dump: it goes on from the files that were written.
fn container_goes_back() -> anyhow::Result<()> {
    let moving = Moving::new()?;
    moving.start("oci", &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let count = moving.passes(true, 0)?;
    hook(&moving.hosts.b, "before-restore", "exit 3")?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(1)?;
    ensure!(said.contains("before-restore") && said.contains("runs on here"), "{said}");
    moving.passes(true, count)?;
    moving.end()
}

/// CRIU can't dump it, as it can't write its log.
fn dump_fails() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let count = moving.passes(true, 3)?;
    let log = folder(&moving.hosts.a).join("run/dump.log");
    fs::create_dir(&log)?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(1)?;
    ensure!(said.contains("dump") && said.contains("runs on here"), "{said}");
    let count = moving.passes(true, count)?;
    fs::remove_dir(&log)?;
    moving.migrate(false, &[])?;
    moving.passes(false, count)?;
    moving.end()
}

/// The destination's disk is full: it runs on, and goes when there is room.
fn disk_full() -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let b = &mut moving.hosts.b;
    b.stop()?;
    let store = b.ctl.store().to_owned();
    let aside = b.path("aside");
    fs::rename(&store, &aside)?;
    fs::create_dir(&store)?;
    let tmpfs = ["-t", "tmpfs", "-o", "size=40M,mode=700", "store"];
    case::output_of(std::process::Command::new("mount").args(tmpfs).arg(&store))?;
    case::shell(&format!("cp -a {}/. {}", aside.display(), store.display()))?;
    b.start(&[])?;
    moving.start("process", &["zoo"], &["--", "/bin/zoo", "/zoo-says", "96", "0"])?;
    let count = moving.passes(true, 0)?;
    let refused = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?;
    ensure!(refused.code != 0, "it went to a full disk: {refused:?}");
    ensure!(moving.settled()?, "it doesn't run here");
    let count = moving.passes(true, count)?;
    case::output_of(std::process::Command::new("mount").args(["-o", "remount,size=1G"]).arg(&store))?;
    moving.migrate(false, &[])?;
    moving.passes(false, count)?;
    moving.end()
}

/// The store's path has a symbolic link: what a guest lies on is found by it, and isn't unmounted with the rest.
fn behind_a_link() -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let a = &mut moving.hosts.a;
    a.stop()?;
    let (store, place) = (a.ctl.store().to_owned(), a.path("place"));
    fs::rename(&store, &place)?;
    std::os::unix::fs::symlink(&place, &store)?;
    a.start(&[])?;
    moving.start("process", &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let count = moving.passes(true, 0)?;
    let answer = moving.hosts.a.ctl.json(["umount", "--all"])?;
    ensure!(answer["unmounted"].as_array().is_some_and(Vec::is_empty), "the guest lost its root: {answer}");
    moving.passes(true, count)?;
    ensure!(moving.show(true)?["root"].is_string(), "its root isn't known: {}", moving.show(true)?);
    moving.hosts.a.ctl.ok(["guest", "stop", guest()])?;
    ensure!(!fs::read_to_string("/proc/self/mountinfo")?.contains(&*place.to_string_lossy()), "its root stays mounted");
    moving.hosts.a.ctl.ok(["guest", "start", guest()])?;
    moving.passes(true, 0)?;
    Ok(())
}

/// The destination's hook at `point` cuts the link.
fn cut_at(moving: &Moving, point: &str) -> anyhow::Result<()> {
    let end = &moving.hosts.link.b;
    hook(&moving.hosts.b, point, &format!("ip -n {} link set {} down", end.namespace, end.interface))
}

/// The link is cut while it is staged: the source never hears that, and goes on; the destination learns it when the link is mended.
fn cut_before() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let count = moving.passes(true, 3)?;
    let end = &moving.hosts.link.b;
    cut_at(&moving, "before-restore")?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?;
    ensure!(said.code != 0, "{said:?}");
    let count = moving.passes(true, count)?;
    fs::remove_file(moving.hosts.b.ctl.store().join("hooks/before-restore"))?;
    run_in(&moving.hosts.b, "ip", &["link", "set", &end.interface, "up"])?;
    ensure!(moving.settled()?, "it runs elsewhere");
    moving.migrate(false, &[])?;
    moving.passes(false, count)?;
    moving.end()
}

/// The link is cut when it runs at the destination: the source starts nothing, and hears of it when the link is mended.
fn cut_after() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let count = moving.passes(true, 3)?;
    let end = &moving.hosts.link.b;
    cut_at(&moving, "after-restore")?;
    let ctl = moving.hosts.a.ctl.clone();
    let asking = asking(ctl, ["migrate", guest(), "b"]);
    let count = moving.passes(false, count)?;
    ensure!(moving.show(true)?["activity"] != "running", "it runs on both");
    ensure!(moving.show(true)?["state"] == "away", "the source takes it for its own");
    // It runs a moment before the program at that point does.
    let began = Instant::now();
    while !run_in(&moving.hosts.b, "ip", &["link", "show", &end.interface])?.contains("state DOWN") {
        ensure!(began.elapsed() < PATIENCE, "the link is not cut");
        std::thread::sleep(Duration::from_millis(5));
    }
    run_in(&moving.hosts.b, "ip", &["link", "set", &end.interface, "up"])?;
    asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
    ensure!(!moving.settled()?, "it runs at the source");
    moving.passes(false, count)?;
    moving.end()
}

/// The source's program is killed at each write of its journal, its mounts and the frozen guest held on; and started anew.
fn source_dies() -> anyhow::Result<()> {
    // Moving, stopping, with layers; released, gone.
    for (step, stays) in [(1, true), (2, true), (3, true), (4, false), (5, false)] {
        let mut moving = Moving::new()?;
        let a = &mut moving.hosts.a;
        a.stop()?;
        a.start_kept(&["--crash-at", &format!("move.journalled:{step}")])?;
        moving.start("process", &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
        let count = moving.passes(true, 3)?;
        let ctl = moving.hosts.a.ctl.clone();
        let asking = asking(ctl, ["migrate", guest(), "b"]);
        moving.hosts.a.wait_for_crash()?;
        // Its keeper starts another.
        let is_first = moving.settled().with_context(|| format!("step {step}"))?;
        asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
        ensure!(is_first == stays, "step {step}: on the first: {is_first}");
        leaves_memory(&moving.hosts.a).with_context(|| format!("step {step}"))?;
        let count = moving.passes(is_first, count)?;
        let report = moving.migrate(!is_first, &[])?;
        ensure!(report["outcome"] == "moved", "step {step}: {report}");
        moving.passes(!is_first, count)?;
        moving.end()?;
    }
    Ok(())
}

/// Bridges on both hosts with a cable of their own between them, so that a guest keeps its address.
pub fn connect_bridges(hosts: &TwoHosts) -> anyhow::Result<()> {
    let (a, b) = (&hosts.link.a.namespace, &hosts.link.b.namespace);
    let add = ["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b];
    case::output_of(std::process::Command::new("ip").args(add))?;
    for (host, address) in [(&hosts.a, "10.77.0.101/24"), (&hosts.b, "10.77.0.102/24")] {
        for line in [
            "link add br0 type bridge forward_delay 0".to_owned(),
            "link set cable master br0".to_owned(),
            format!("addr add {address} dev br0"),
            "link set br0 up".to_owned(),
            "link set cable up".to_owned(),
        ] {
            run_in(host, "ip", &line.split(' ').collect::<Vec<_>>())?;
        }
    }
    Ok(())
}

/// Connects from `host` to a guest, as soon as it answers.
pub fn connect(host: &Host, address: &str) -> anyhow::Result<TcpStream> {
    let began = Instant::now();
    loop {
        match inside(host.end()?, || TcpStream::connect(address)) {
            Ok(stream) => return Ok(stream),
            Err(error) => ensure!(began.elapsed() < PATIENCE, "the guest doesn't answer: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A client on the first host that asks the guest again and again, over one connection.
pub struct Client {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    /// The longest that it waited, in microseconds.
    longest: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Client {
    pub fn start(host: &Host, address: &str) -> anyhow::Result<Client> {
        let stream = connect(host, address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let longest = Arc::new(AtomicU64::new(0));
        let (stopped, seen, waited) = (stop.clone(), answers.clone(), longest.clone());
        let thread = std::thread::spawn(move || {
            let mut reader = BufReader::new(stream.try_clone()?);
            let mut number = 0u64;
            while !stopped.load(SeqCst) {
                number += 1;
                let asked = Instant::now();
                (&stream).write_all(format!("line {number}\n").as_bytes())?;
                let mut answer = String::new();
                reader.read_line(&mut answer)?;
                ensure!(answer == format!("{number} line {number}\n"), "line {number} was answered by {answer:?}");
                waited.fetch_max(asked.elapsed().as_micros() as u64, SeqCst);
                seen.store(number, SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        Ok(Client { stop, answers, longest, thread })
    }

    /// Waits for `more` answers.
    pub fn hears(&self, more: u64) -> anyhow::Result<()> {
        let (began, until) = (Instant::now(), self.answers.load(SeqCst) + more);
        while self.answers.load(SeqCst) < until && !self.thread.is_finished() {
            ensure!(began.elapsed() < PATIENCE, "the client hears nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The longest that it waited for an answer since this was asked last.
    fn longest(&self) -> Duration {
        Duration::from_micros(self.longest.swap(0, SeqCst))
    }

    /// The longest that it waited since then.
    pub fn end(self) -> anyhow::Result<Duration> {
        let longest = self.longest();
        self.stop.store(true, SeqCst);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        Ok(longest)
    }
}

/// The address at which the guest serves, and how it gets it.
pub const ADDRESS: &str = "10.77.0.2:7777";
pub const NETWORK: &str = "bridge:br0,10.77.0.2/24";

/// A container with a service and a zoo in it.
fn container(driver: &str) -> anyhow::Result<()> {
    let moving = Moving::new()?;
    connect_bridges(&moving.hosts)?;
    let command = ["/bin/pair", "/bin/echo", "7777", "--", "/bin/zoo", "/zoo-says", "8", "0"];
    let options = ["--network", NETWORK, "--"];
    moving.start(driver, &["pair", "echo", "zoo"], &[&options[..], &command].concat())?;
    let mut count = moving.passes(true, 0)?;
    serves(&moving, None, |is_first| {
        count = moving.passes(is_first, count)?;
        Ok(())
    })
}

/// One that has given itself a further address, a route and a firewall: it has them wherever it goes on, and doesn't go with what can't be
/// carried.
fn keeps_its_network(driver: &str) -> anyhow::Result<()> {
    let moving = Moving::new()?;
    connect_bridges(&moving.hosts)?;
    let command = ["/bin/pair", "/bin/echo", "7777", "--", "/bin/zoo", "/zoo-says", "8", "0"];
    let options = ["--network", NETWORK, "--"];
    moving.start(driver, &["pair", "echo", "zoo"], &[&options[..], &command].concat())?;
    let mut count = moving.passes(true, 0)?;
    let says = |is_first: bool, words: &str| {
        let pid = moving.show(is_first)?["pid"].as_u64().context("it has no process")?;
        let mut enter = std::process::Command::new("nsenter");
        enter.args(["--target", &pid.to_string(), "--net", "--"]).args(words.split(' '));
        case::output_of(&mut enter)
    };
    for words in [
        "ip address add 10.78.0.2/24 dev eth0",
        "ip route add 10.79.0.0/16 via 10.78.0.9",
        "nft add table inet guard",
        "nft add chain inet guard in { type filter hook input priority 0; policy accept; }",
        "nft add rule inet guard in tcp dport 9999 drop",
        "sysctl -qw net.ipv4.ip_forward=1",
    ] {
        says(true, words)?;
    }
    let all = |is_first: bool| {
        let looks = ["ip -o -4 address show", "ip route", "nft list ruleset", "sysctl net.ipv4.ip_forward"];
        let said = looks.iter().map(|look| says(is_first, look)).collect::<anyhow::Result<Vec<_>>>()?.join("");
        // The interface's number and its other end are the host's affair.
        Ok::<_, anyhow::Error>(said.lines().filter(|line| !line.contains("eth0@")).collect::<Vec<_>>().join("\n"))
    };
    let before = all(true)?;
    ensure!(before.contains("10.78.0.2/24") && before.contains("dport 9999 drop"), "it isn't set up: {before}");
    for is_first in [false, true] {
        moving.migrate(is_first, &[])?;
        count = moving.passes(is_first, count)?;
        let now = all(is_first)?;
        ensure!(now == before, "on the first: {is_first}: it had\n{before}\nand has\n{now}");
        connect(moving.host(is_first), ADDRESS)?;
    }
    // From a checkpoint, too, whose guest runs on as it was.
    let ctl = &moving.hosts.a.ctl;
    ctl.ok(["guest", "checkpoint", guest()])?;
    ensure!(all(true)? == before, "a checkpoint changed it: {}", all(true)?);
    ctl.ok(["guest", "stop", guest()])?;
    ctl.ok(["guest", "restore", guest()])?;
    count = moving.passes(true, 0)?;
    ensure!(all(true)? == before, "a checkpoint has lost it: {}", all(true)?);
    says(true, "ip tuntap add dev vpn0 mode tun")?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(7)?;
    ensure!(said.contains("vpn0 (tun)") && said.contains("link del vpn0"), "{said}");
    let said = ctl.run(["guest", "checkpoint", guest()])?;
    ensure!(said.code != 0 && said.stderr.contains("vpn0 (tun)"), "{said:?}");
    moving.passes(true, count)?;
    connect(&moving.hosts.a, ADDRESS)?;
    moving.end()
}

/// The CRIU that holds it is killed: it goes on by itself, and isn't left behind CRIU's lock. Connections that it had then are lost, as CRIU
/// had taken them out of service.
fn criu_dies() -> anyhow::Result<()> {
    let moving = Moving::new()?;
    connect_bridges(&moving.hosts)?;
    // No zoo: what a CRIU that dies leaves of files that were deleted is seen by who counts their names.
    moving.start("process", &["echo"], &["--network", NETWORK, "--", "/bin/echo", "7777"])?;
    connect(&moving.hosts.a, ADDRESS)?;
    let holder = folder(&moving.hosts.a).join("run/criu.json");
    let kill = format!("kill -9 $(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {}); sleep 0.5; exit 3", holder.display());
    hook(&moving.hosts.a, "after-stop", &kill)?;
    let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(1)?;
    ensure!(said.contains("after-stop"), "{said}");
    ensure!(moving.settled()?, "it runs elsewhere");
    connect(&moving.hosts.a, ADDRESS)?;
    let client = Client::start(&moving.hosts.a, ADDRESS)?;
    client.hears(20)?;
    ensure!(!holder.exists(), "a CRIU that has died is still noted");
    fs::remove_file(moving.hosts.a.ctl.store().join("hooks/after-stop"))?;
    moving.migrate(false, &[])?;
    client.hears(20)?;
    client.end()?;
    moving.end()
}

/// A machine with a service, that checks its memory.
fn machine() -> anyhow::Result<()> {
    let moving = Moving::machine()?;
    // It goes once before its memory, too.
    serves(&moving, Some(2), |is_first| {
        let console = folder(moving.host(is_first)).join("run/console");
        let began = Instant::now();
        loop {
            let text = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
            ensure!(!text.contains("bad"), "the machine has lost memory: {text}");
            if text.lines().any(|line| line.ends_with(" ok")) {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "the machine says nothing: {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    })
}

/// A container, with its memory still at the source at first; and back again.
fn ahead_of_memory(driver: &str) -> anyhow::Result<()> {
    let moving = Moving::new()?;
    moving.start(driver, &["zoo"], &["--", "/bin/zoo", "/zoo-says", "32", "0"])?;
    let count = moving.passes(true, 0)?;
    let report = moving.migrate(false, POST_COPY)?;
    went_before(&report)?;
    reads_little_ahead(moving.host(false))?;
    let count = moving.passes(false, count)?;
    moving.migrate(true, &[])?;
    let count = moving.passes(true, count)?;
    left_nothing(&moving, false)?;
    // Ended where its state is still open.
    moving.migrate(false, POST_COPY)?;
    moving.passes(false, count)?;
    moving.hosts.b.ctl.ok(["guest", "stop", guest()])?;
    left_nothing(&moving, false)?;
    moving.end()
}

/// What lets a guest go before its memory, whatever that would save.
pub const POST_COPY: &[&str] = &["--postcopy", "--max-downtime", "1", "--rounds", "0"];

/// Who waits for a page of a state that is still coming doesn't wait for what lies around it too.
fn reads_little_ahead(host: &Host) -> anyhow::Result<()> {
    let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(folder(host).join("state"))?);
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let kib: u32 = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"))?.trim().parse()?;
    ensure!(kib <= 64, "the kernel reads {kib} KiB ahead of whoever runs on that state");
    Ok(())
}

pub fn went_before(report: &Value) -> anyhow::Result<()> {
    let has = |field: &str, part: &str| report[field].to_string().contains(part);
    ensure!(has("outcome", "moved") && has("decisions", "post-copy") && has("stages", "rest"), "{report}");
    Ok(())
}

/// Moves the guest to and fro with a client connected throughout; in turn `lazily` before its memory. `check` says whether it
/// is unharmed there.
fn serves(
    moving: &Moving,
    lazily: Option<usize>,
    mut check: impl FnMut(bool) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let client = Client::start(&moving.hosts.a, ADDRESS)?;
    client.hears(20)?;
    check(true)?;
    let mut ledger = Ledger::new(moving);
    for turn in 0..turns().next_multiple_of(2) {
        let to_first = turn % 2 == 1;
        let report = ledger.migrate(to_first, if lazily == Some(turn) { POST_COPY } else { &[] })?;
        if lazily == Some(turn) {
            went_before(&report)?;
        }
        client.hears(20)?;
        ensure!(!client.thread.is_finished(), "the client has lost its connection: {:?}", client.thread.join());
        check(to_first)?;
        ledger.waited(client.longest());
    }
    client.end()?;
    ledger.close()?;
    moving.end()
}

/// The destination's program is killed at each write of its journal, and started anew. (The source's would take the guest's mount
/// with it, as these daemons have no keeper.)
fn dies() -> anyhow::Result<()> {
    for (step, stays) in STEPS.iter().zip([true, false, false]) {
        let mut moving = Moving::zoo()?;
        let count = moving.passes(true, 3)?;
        moving.hosts.b.stop()?;
        moving.hosts.b.start(&["--crash-at", step])?;
        let ctl = moving.hosts.a.ctl.clone();
        let asking = asking(ctl, ["migrate", guest(), "b"]);
        moving.hosts.b.wait_for_crash()?;
        moving.hosts.b.start(&[])?;
        let ended = asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
        let is_first = moving.settled().with_context(|| format!("{step}: {ended:?}"))?;
        ensure!(is_first == stays && (ended.code == 0) != stays, "{step}: on the first: {is_first}, {ended:?}");
        let count = moving.passes(is_first, count)?;
        // And it can move again.
        let report = moving.migrate(!is_first, &[])?;
        ensure!(report["outcome"] == "moved", "{step}: {report}");
        moving.passes(!is_first, count)?;
        moving.end()?;
    }
    Ok(())
}

/// A program that stands still as soon as it has begun.
struct Slow {
    /// It makes this then,
    begun: PathBuf,
    /// and goes on once this is there.
    go: PathBuf,
}

impl Slow {
    /// Kills the daemon that serves `host`. The program goes on when the next one answers, which finds it at work.
    fn outlives_daemon(&self, host: &Host) -> anyhow::Result<()> {
        let killed = self.kills_daemon(host)?;
        self.goes_on_after(host, killed)
    }

    /// The first half: returns which daemon was killed.
    fn kills_daemon(&self, host: &Host) -> anyhow::Result<i32> {
        wait_for(&self.begun)?;
        let killed = host.serving_pid()?;
        host.kill_serving()?;
        Ok(killed)
    }

    fn goes_on_after(&self, host: &Host, killed: i32) -> anyhow::Result<()> {
        let began = Instant::now();
        while host.serving_pid()? == killed {
            ensure!(began.elapsed() < PATIENCE, "no other daemon answers");
        }
        Ok(fs::write(&self.go, "")?)
    }
}

/// Starts a daemon on `host`, with a keeper, for which `program` stands still when it is told `word`.
fn slow_down(host: &mut Host, program: &str, word: &str) -> anyhow::Result<Slow> {
    let (begun, go) = (host.path("begun"), host.path("go"));
    // A test that has failed removes the first file without having made the second.
    let lines = format!(
        ": >{begun}; while [ -e {begun} ] && ! [ -e {go} ]; do sleep 0.05; done",
        begun = begun.display(),
        go = go.display()
    );
    put_before(host, program, word, &lines)?;
    Ok(Slow { begun, go })
}

/// Starts a daemon on `host`, with a keeper, for which `program` does what a shell's `lines` say first when it is told `word`.
fn put_before(host: &mut Host, program: &str, word: &str, lines: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::var("PATH")?;
    let (real, folder) = (real(program)?, host.new_folder("before")?);
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' --help '*) ;; *' {word} '*) {lines} ;; esac\nexec {} \"$@\"\n",
        real.display()
    );
    fs::write(folder.join(program), script)?;
    fs::set_permissions(folder.join(program), fs::Permissions::from_mode(0o755))?;
    host.stop()?;
    host.start_by(&["env", &format!("PATH={}:{path}", folder.display())], &[])
}

/// Where a program is that guests' drivers run.
fn real(program: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("LAYERFS_GUEST_TOOLS").map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from);
    let found = Programs::new(folder, "layerctl".into(), std::env::var_os("PATH")).find(program);
    found.context("no such program")
}

/// Runs a command beside the test.
fn asking(ctl: Ctl, words: [&'static str; 3]) -> JoinHandle<anyhow::Result<Answer>> {
    std::thread::spawn(move || ctl.run(words))
}

fn wait_for(file: &std::path::Path) -> anyhow::Result<()> {
    let began = Instant::now();
    while !file.exists() {
        ensure!(began.elapsed() < PATIENCE, "there is no {}", file.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// How many copies of the zoo run on what is mounted for it on `host`.
fn copies(host: &Host) -> anyhow::Result<usize> {
    let device = |path: PathBuf| fs::metadata(path).map(|root| std::os::unix::fs::MetadataExt::dev(&root)).ok();
    let root = device(folder(host).join("root")).context("no root")?;
    let is_copy = |process: &PathBuf| {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        let is_first = line("NSpid:").split_whitespace().nth(1) == Some("1");
        line("Name:") == "zoo" && is_first && device(process.join("root")) == Some(root)
    };
    Ok(fs::read_dir("/proc")?.flatten().map(|entry| entry.path()).filter(is_copy).count())
}

/// The destination's program is killed while CRIU restores, which goes on without it: the next one takes over what that has made.
fn dies_restoring(driver: &str, program: &str, word: &str) -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let slow = slow_down(&mut moving.hosts.b, program, word)?;
    moving.start(driver, &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let count = moving.passes(true, 3)?;
    ensure!(copies(&moving.hosts.a)? == 1, "copies aren't counted");
    let ctl = moving.hosts.a.ctl.clone();
    let asking = asking(ctl, ["migrate", guest(), "b"]);
    wait_for(&slow.begun)?;
    let said = moving.hosts.b.ctl.run(["daemon", "restart"])?.failed_with(5)?;
    ensure!(said.contains("hand over guest"), "{said}");
    slow.outlives_daemon(&moving.hosts.b)?;
    ensure!(!moving.settled()?, "it runs at the source");
    asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
    let count = moving.passes(false, count)?;
    // None comes later, either.
    std::thread::sleep(Duration::from_secs(1));
    ensure!(copies(&moving.hosts.b)? == 1, "{} copies run", copies(&moving.hosts.b)?);
    ensure!(moving.passes(false, count)? > count && !folder(&moving.hosts.b).join("run/restoring.json").exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let state = folder(&moving.hosts.b).join("state");
    ensure!(!mounts.contains(&*state.to_string_lossy()), "what it was restored from is still open");
    moving.hosts.b.ctl.ok(["guest", "stop", guest()])?;
    moving.end()
}

/// The program is killed while the runtime dumps for a checkpoint, and the checkpoint is asked for again at once.
fn checkpoint_is_repeated(driver: &str, program: &str, word: &str) -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let slow = slow_down(&mut moving.hosts.a, program, word)?;
    moving.start(driver, &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let count = moving.passes(true, 3)?;
    let ctl = moving.hosts.a.ctl.clone();
    let asking = asking(ctl, ["guest", "checkpoint", guest()]);
    let a = &moving.hosts.a;
    let killed = slow.kills_daemon(a)?;
    std::thread::scope(|scope| {
        let goes_on = scope.spawn(|| slow.goes_on_after(a, killed));
        let began = Instant::now();
        loop {
            let again = a.ctl.run(["guest", "checkpoint", guest()])?;
            match again.code {
                0 => break,
                // The next daemon comes up, or lets it go on.
                3 | 5 | 10 => ensure!(began.elapsed() < PATIENCE, "{again:?}"),
                _ => anyhow::bail!("{again:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        goes_on.join().map_err(|_| anyhow::anyhow!("waiting for the next daemon panicked"))?
    })?;
    asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
    let count = moving.passes(true, count)?;
    ensure!(copies(&moving.hosts.a)? == 1, "{} copies run", copies(&moving.hosts.a)?);
    leaves_memory(&moving.hosts.a)?;
    ensure!(!folder(&moving.hosts.a).join("run/dumped").exists(), "the dump is still on record");
    moving.hosts.a.ctl.ok(["guest", "checkpoint", guest(), "--stop"])?;
    moving.hosts.a.ctl.ok(["guest", "restore", guest()])?;
    moving.passes(true, count)?;
    moving.end()
}

/// How a container of a driver gets into its freezer and out of it: a shell's lines, with `$name` for the guest, `$run` for its run folder
/// and `$runc` for the runtime.
struct Freezer {
    driver: &'static str,
    /// What dumps it, and the word by which that is told to.
    dumps: (&'static str, &'static str),
    freeze: &'static str,
    thaw: &'static str,
    state: &'static str,
    /// What that says of one that is in it.
    frozen: &'static str,
}

const LXC_FREEZER: Freezer = Freezer {
    driver: "lxc",
    dumps: ("lxc-checkpoint", "-s"),
    freeze: "lxc-freeze -P $run -n $name",
    thaw: "lxc-unfreeze -P $run -n $name",
    state: "lxc-info -P $run -n $name -s -H",
    frozen: "FROZEN",
};

const RUNC_FREEZER: Freezer = Freezer {
    driver: "oci",
    dumps: ("runc", "checkpoint"),
    freeze: "$runc --root $run/runc pause $($runc --root $run/runc list -q)",
    thaw: "$runc --root $run/runc resume $($runc --root $run/runc list -q)",
    state: "$runc --root $run/runc state $($runc --root $run/runc list -q)",
    frozen: "\"paused\"",
};

impl Freezer {
    /// The lines with what they are about.
    fn lines(&self, host: &Host, lines: &str) -> anyhow::Result<String> {
        let runc = if self.driver == "oci" { real("runc")? } else { PathBuf::new() };
        let run = folder(host).join("run");
        Ok(format!("name={}; run={}; runc={}; {lines}", guest(), run.display(), runc.display()))
    }

    fn run(&self, host: &Host, lines: &str) -> anyhow::Result<String> {
        // LXC's own sockets are found in the network only that its daemon is in.
        run_in(host, "sh", &["-c", &self.lines(host, lines)?])
    }

    fn is_frozen(&self, host: &Host) -> anyhow::Result<bool> {
        Ok(self.run(host, self.state)?.contains(self.frozen))
    }
}

/// A container that a dump has left in its freezer, as it failed, or was cut off with the program, goes on; one that its owner has put there
/// stays there.
fn is_thawed(freezer: &Freezer) -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let (begun, hangs) = (moving.hosts.a.path("begun"), moving.hosts.a.path("hangs"));
    let dump = format!(
        "{}; {} >{begun}.new; mv {begun}.new {begun}; while [ -e {} ]; do sleep 0.05; done; exit 1",
        freezer.freeze,
        freezer.state,
        hangs.display(),
        begun = begun.display(),
    );
    let dump = freezer.lines(&moving.hosts.a, &dump)?;
    put_before(&mut moving.hosts.a, freezer.dumps.0, freezer.dumps.1, &dump)?;
    moving.start(freezer.driver, &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let mut count = moving.passes(true, 3)?;
    let was_frozen = || -> anyhow::Result<()> {
        let state = fs::read_to_string(&begun).context("nothing was dumped")?;
        ensure!(state.contains(freezer.frozen), "it wasn't in the freezer: {state}");
        Ok(fs::remove_file(&begun)?)
    };
    for words in [&["guest", "checkpoint", guest()][..], &["migrate", guest(), "b"]] {
        let failed = moving.hosts.a.ctl.run(words)?;
        ensure!(failed.code != 0, "{words:?}: {failed:?}");
        was_frozen()?;
        ensure!(!freezer.is_frozen(&moving.hosts.a)?, "{words:?} leaves it in the freezer: {failed:?}");
        count = moving.passes(true, count)?;
    }
    fs::write(&hangs, "")?;
    let ctl = moving.hosts.a.ctl.clone();
    let asking = asking(ctl, ["guest", "checkpoint", guest()]);
    wait_for(&begun)?;
    moving.hosts.a.kill_serving()?;
    fs::remove_file(&hangs)?;
    asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
    was_frozen()?;
    let (began, dumped) = (Instant::now(), folder(&moving.hosts.a).join("run/dumped"));
    while freezer.is_frozen(&moving.hosts.a)? || dumped.exists() {
        ensure!(began.elapsed() < PATIENCE, "the next program leaves it in the freezer, or the dump on record");
        std::thread::sleep(Duration::from_millis(20));
    }
    count = moving.passes(true, count)?;
    freezer.run(&moving.hosts.a, freezer.freeze)?;
    let failed = moving.hosts.a.ctl.run(["guest", "checkpoint", guest()])?;
    ensure!(failed.code != 0 && freezer.is_frozen(&moving.hosts.a)?, "it was taken out of the freezer: {failed:?}");
    freezer.run(&moving.hosts.a, freezer.thaw)?;
    moving.passes(true, count)?;
    moving.end()
}

/// The program is killed when it has started the guest, before it could note that: the next one knows it, and starts no other.
fn start_is_cut_off(driver: &str) -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let a = &mut moving.hosts.a;
    a.stop()?;
    a.start_kept(&["--crash-at", START_STEPS[0]])?;
    let is_machine = driver == "qemu";
    let options: &[&str] = match is_machine {
        true => {
            fixtures::machine(&a.path("tree"))?;
            const BOOT: &[&str] = &["--memory", "192M", "--kernel", "/vmlinuz", "--initrd", "/initrd"];
            BOOT
        }
        false => {
            fixtures::build("zoo", &a.path("tree/bin/zoo"))?;
            &["--", "/bin/zoo", "/zoo-says", "8", "0"]
        }
    };
    a.import(&a.path("tree"), "app", &["--kind", "base"])?;
    a.ctl.ok(["guest", "create", guest(), "--driver", driver, "--on", "app"].iter().chain(options))?;
    // Its command may or may not hear of the next daemon.
    a.ctl.run(["guest", "start", guest()])?;
    a.wait_for_crash()?;
    // Its keeper starts another.
    a.serving_pid()?;
    let found = moving.show(true)?;
    ensure!(found["activity"] == "running", "it isn't known: {found}");
    let again = moving.hosts.a.ctl.run(["guest", "start", guest()])?;
    ensure!(matches!(again.code, 0 | 5), "{again:?}");
    let now = moving.show(true)?;
    ensure!(now["pid"] == found["pid"] && now["state"] == "running", "another one was started: {found}, then {now}");
    if !is_machine {
        moving.passes(true, 0)?;
        ensure!(copies(&moving.hosts.a)? == 1, "{} copies run", copies(&moving.hosts.a)?);
    }
    moving.hosts.a.ctl.ok(["guest", "stop", guest()])?;
    ensure!(moving.show(true)?["activity"] == "absent", "the one that was found did not end");
    moving.end()
}

/// The source's program is killed while the runtime dumps, which goes on without it and ends the container: it goes on from the state that
/// was written.
fn dies_dumping(driver: &str, program: &str, word: &str) -> anyhow::Result<()> {
    let mut moving = Moving::new()?;
    let slow = slow_down(&mut moving.hosts.a, program, word)?;
    moving.start(driver, &["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
    let count = moving.passes(true, 3)?;
    let ctl = moving.hosts.a.ctl.clone();
    let asking = asking(ctl, ["migrate", guest(), "b"]);
    slow.outlives_daemon(&moving.hosts.a)?;
    ensure!(moving.settled()?, "it runs elsewhere");
    asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
    let count = moving.passes(true, count)?;
    ensure!(copies(&moving.hosts.a)? == 1, "{} copies run", copies(&moving.hosts.a)?);
    leaves_memory(&moving.hosts.a)?;
    ensure!(!folder(&moving.hosts.a).join("run/dumped").exists(), "the dump is still on record");
    moving.migrate(false, &[])?;
    moving.passes(false, count)?;
    moving.end()
}

/// A guest has a client that it hasn't accepted, which can't be saved, when it is to move, and accepts it a moment later.
fn accepts_first(driver: &str) -> anyhow::Result<()> {
    for kind in ["unix", "tcp"] {
        let moving = Moving::new()?;
        moving.start(driver, &["queue"], &["--", "/bin/queue", "/zoo-says", kind])?;
        let count = moving.passes(true, 3)?;
        let report = moving.migrate(false, &[]).context(kind)?;
        ensure!(report["outcome"] == "moved", "{kind}: {report}");
        moving.passes(false, count)?;
        moving.end()?;
    }
    Ok(())
}

fn mistakes() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let moving = Moving { hosts };
    let a = &moving.hosts.a;
    let said = a.ctl.run(["migrate", "nobody", "b"])?.failed_with(3)?;
    ensure!(said.contains("nobody"), "{said}");
    fixtures::build("zoo", &a.path("tree/bin/zoo"))?;
    a.import(&a.path("tree"), "app", &[])?;
    a.ctl.ok(["guest", "create", guest(), "--on", "app", "--", "/bin/zoo", "/zoo-says", "1", "0"])?;
    let said = a.ctl.run(["migrate", guest(), "b"])?.failed_with(5)?;
    ensure!(said.contains("only a running one"), "{said}");
    let said = a.ctl.run(["guest", "resolve", guest()])?.failed_with(3)?;
    ensure!(said.contains("unfinished move"), "{said}");
    a.ctl.ok(["guest", "start", guest()])?;
    let said = a.ctl.run(["migrate", guest(), "nowhere"])?.failed_with(3)?;
    ensure!(said.contains("nowhere"), "{said}");
    let refused = a.ctl.run(["migrate", guest(), "b"])?;
    ensure!(refused.code != 0 && refused.text().is_empty(), "a peer without the right to took it");
    ensure!(moving.show(true)?["activity"] == "running", "it doesn't run on");
    Ok(())
}
