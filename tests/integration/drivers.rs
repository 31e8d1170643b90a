//! Guests on one host and between two: real runtimes, and a program that notices whatever a checkpoint loses.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs::LayerName;
use layerfs::import::{ImportOptions, SourceSpec, import};
use layerfs::monitor::Silent;
use layerfs::store::{Store, StoreOptions};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Containers, Criu, Fuse, GuestTool, Kernel, Root, Tool};
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::{ctl, fixtures};
use migrator::guest::fake::{FakeHost, World};
use migrator::guest::programs::Programs;
use migrator::guest::{Drivers, Guest, GuestName, GuestRecord, GuestSpec, Host as _, HostDrivers, state};
use serde_json::Value;

use crate::migrate::{LXC, OCI, PROCESS};

/// The longest that a guest may take to do something.
const PATIENCE: Duration = Duration::from_secs(60);

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("drivers::process_goes_on_from_checkpoints", &[Root, Fuse, Tool("cc"), Criu], process),
        Case::new("drivers::process_goes_on_elsewhere", PROCESS, process_elsewhere),
        Case::new(
            "drivers::oci_goes_on_from_checkpoints",
            &[Root, Fuse, Containers, Tool("cc"), Criu, GuestTool("runc")],
            oci,
        ),
        Case::new("drivers::oci_goes_on_elsewhere", OCI, oci_elsewhere),
        Case::new(
            "drivers::qemu_goes_on_from_checkpoints",
            &[Root, Fuse, Tool("cc"), Tool("qemu-system-x86_64"), Kernel],
            machine,
        ),
        Case::new(
            "drivers::lxc_goes_on_from_checkpoints",
            &[Root, Fuse, Containers, Tool("cc"), Criu, Tool("lxc-start")],
            lxc,
        ),
        Case::new("drivers::lxc_goes_on_elsewhere", LXC, lxc_elsewhere),
        Case::new("drivers::a_scan_has_the_chunks_of_a_dump", &[Root, Tool("cc"), Criu], scan),
        Case::new("drivers::process_outlives_the_daemon", &[Root, Fuse, Tool("cc")], outlives),
        Case::new("drivers::mistakes_are_told", &[Root, Fuse, Tool("cc")], mistakes),
    ]
}

/// A guest that is removed when this is dropped, whatever has become of it.
struct Zoo<'a> {
    host: &'a Host,
    name: String,
}

impl Drop for Zoo<'_> {
    fn drop(&mut self) {
        let _ = self.host.ctl.run(["guest", "remove", &self.name, "--force"]);
    }
}

impl<'a> Zoo<'a> {
    /// Makes a guest of `driver` that runs the zoo, and starts it.
    fn start(host: &'a Host, name: &str, driver: &str) -> anyhow::Result<Zoo<'a>> {
        let tree = host.path("tree");
        fixtures::build("zoo", &tree.join("bin/zoo"))?;
        host.import(&tree, "zoo", &["--kind", "base"])?;
        let create =
            ["guest", "create", name, "--driver", driver, "--on", "zoo", "--", "/bin/zoo", "/zoo says", "8", "0"];
        host.ctl.ok(create)?;
        let zoo = Zoo { host, name: name.to_owned() };
        zoo.ok(&["start"])?;
        Ok(zoo)
    }

    fn ok(&self, words: &[&str]) -> anyhow::Result<Value> {
        let (action, rest) = words.split_first().context("no action")?;
        self.host.ctl.json(["guest", action, &self.name].iter().chain(rest))
    }

    fn root(&self) -> PathBuf {
        self.host.ctl.store().join("guests").join(&self.name).join("root")
    }

    /// What the zoo counts to, if it has lost nothing.
    fn count(&self) -> anyhow::Result<u64> {
        let text = fs::read_to_string(self.root().join("zoo says")).context("the zoo says nothing")?;
        let (count, rest) = text.trim().split_once(' ').with_context(|| format!("the zoo says {text:?}"))?;
        ensure!(rest == "ok", "the zoo says {text:?}");
        Ok(count.parse()?)
    }

    /// Waits until the zoo counts beyond `count`, and returns to what.
    fn passes(&self, count: u64) -> anyhow::Result<u64> {
        let began = Instant::now();
        loop {
            // While its file is rewritten, or not written yet, it says nothing.
            match self.count() {
                Ok(now) if now > count => return Ok(now),
                Err(error) if format!("{error:#}").contains("bad") => return Err(error),
                state => ensure!(began.elapsed() < PATIENCE, "the zoo does not count beyond {count}: {state:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn activity(&self) -> anyhow::Result<String> {
        let info = self.ok(&["show"])?;
        Ok(info["activity"].as_str().context("no activity")?.to_owned())
    }
}

fn process() -> anyhow::Result<()> {
    goes_on("process")
}

fn oci() -> anyhow::Result<()> {
    goes_on("oci")
}

fn lxc() -> anyhow::Result<()> {
    goes_on("lxc")
}

/// Checkpoints that the guest survives, checkpoints that end it, and going back to each.
fn goes_on(driver: &str) -> anyhow::Result<()> {
    let host = Host::new()?;
    let zoo = Zoo::start(&host, "zoo", driver)?;
    let early = zoo.passes(0)?;
    let made = zoo.ok(&["checkpoint", "--tag", "first"])?;
    ensure!(made["memory_bytes"].as_u64() > Some(8 << 20), "the checkpoint lacks memory: {made}");
    let later = zoo.passes(early + 5)?;
    // The same memory again costs next to nothing.
    let again = zoo.ok(&["checkpoint", "--stop"])?;
    ensure!(again["bytes_stored"].as_u64() < Some(2 << 20), "memory was stored twice: {again}");
    ensure!(zoo.activity()? == "absent", "it runs after a checkpoint that ends it");
    let twice = host.ctl.run(["guest", "checkpoint", "zoo"])?.failed_with(5)?;
    ensure!(twice.contains("isn't running"), "{twice}");

    zoo.ok(&["restore"])?;
    let restored = zoo.passes(later)?;
    ensure!(
        !zoo.root()
            .join("zoo")
            .read_dir()?
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("link_remap")),
        "CRIU's links are left"
    );
    let running = host.ctl.run(["guest", "restore", "zoo"])?.failed_with(5)?;
    ensure!(running.contains("guest stop zoo"), "{running}");
    zoo.ok(&["stop"])?;
    zoo.ok(&["restore", "--tag", "first"])?;
    let first = zoo.passes(early)?;
    ensure!(first < restored, "it goes on from {first}, not from its first checkpoint");
    zoo.ok(&["stop"])?;
    zoo.ok(&["start"])?;
    zoo.passes(0)?;
    zoo.ok(&["remove", "--force"])?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&*host.ctl.store().to_string_lossy()), "a removed guest leaves mounts");
    ensure!(!host.ctl.store().join("guests/zoo").exists(), "a removed guest leaves files");
    host.fsck()
}

fn process_elsewhere() -> anyhow::Result<()> {
    elsewhere("process")
}

fn oci_elsewhere() -> anyhow::Result<()> {
    elsewhere("oci")
}

fn lxc_elsewhere() -> anyhow::Result<()> {
    elsewhere("lxc")
}

/// Reads a quiet guest's memory as it runs, then dumps it: nearly nothing of the dump is new to the store.
fn scan() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(&folder.path().join("store"), StoreOptions::create())?;
    let tree = folder.path().join("tree");
    fixtures::build("zoo", &tree.join("bin/zoo"))?;
    let options = ImportOptions::new(LayerName::new("zoo")?);
    let base = import(&store, SourceSpec::Path(tree), &options, &Silent)?.layers[0].id;
    let host = FakeHost::new("host", store.clone(), &folder.path().join("guests"), &World::new());
    let programs = Programs::new(fixtures::guest_tools(), ctl::binary()?, std::env::var_os("PATH"));
    let spec = GuestSpec {
        name: GuestName::new("zoo")?,
        driver: "process".to_owned(),
        stack: LayerName::new("zoo")?,
        options: serde_json::json!({ "command": ["/bin/zoo", "/zoo says", "64", "0"] }),
    };
    let name = spec.name.clone();
    let root = host.mount(&name, base)?;
    let guest = HostDrivers { programs: Arc::new(programs) }.guest(&GuestRecord::new(spec), host.clone())?;
    guest.start()?;
    let outcome = scanned(&store, &host, &*guest, &name, &root);
    guest.stop()?;
    outcome
}

fn scanned(
    store: &Arc<Store>,
    host: &FakeHost,
    guest: &dyn Guest,
    name: &GuestName,
    root: &Path,
) -> anyhow::Result<()> {
    let began = Instant::now();
    while !fs::read_to_string(root.join("zoo says")).is_ok_and(|text| text.contains("ok")) {
        ensure!(began.elapsed() < PATIENCE, "the zoo says nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    let folder = host.scratch(name, 0)?;
    let scan = guest.scan(&folder)?;
    let layer = name.layer("state")?;
    let (first, _) = state::import(store, &folder, &layer, None, &Silent)?;
    let folder = host.scratch(name, 0)?;
    let dump = guest.dump(&folder)?;
    let (_, report) = state::import(store, &folder, &layer, Some(first), &Silent)?;
    guest.resume()?;
    // What isn't memory (the deleted file of 5 MiB, registers) is in the dump only.
    let new = report.new_plain_bytes.saturating_sub(dump.other_bytes);
    ensure!(scan.memory_bytes > 64 << 20, "the scan lacks memory: {scan:?}");
    ensure!(
        new * 100 <= dump.memory_bytes,
        "{new} of {} bytes of memory are new after a scan: {report:?}",
        dump.memory_bytes
    );
    Ok(())
}

/// From one host to another by nothing but a push of its layers, and back.
fn elsewhere(driver: &str) -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let here = Zoo::start(&hosts.a, "zoo", driver)?;
    let before = here.passes(3)?;
    let made = here.ok(&["checkpoint", "--stop"])?;
    let layers = |made: &Value| anyhow::Ok([text(made, "state")?, text(made, "instance")?]);
    let names = layers(&made)?;
    hosts.a.ctl.ok(["push", &names[0], &names[1], "b"])?;
    hosts.b.ctl.ok(["guest", "restore", "zoo"])?;
    let there = Zoo { host: &hosts.b, name: "zoo".to_owned() };
    let after = there.passes(before)?;
    let made = there.ok(&["checkpoint", "--tag", "back", "--stop"])?;
    let names = layers(&made)?;
    let report = hosts.b.ctl.json(["push", &names[0], &names[1], "a"])?;
    // What is there from before isn't sent again.
    ensure!(report["bytes_sent"].as_u64() < Some(2 << 20), "the way back is not a difference: {report}");
    here.ok(&["restore", "--tag", "back"])?;
    here.passes(after)?;
    Ok(())
}

fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    Ok(value[key].as_str().with_context(|| format!("no {key} in {value}"))?.to_owned())
}

/// A machine that counts on its console: it goes on with its memory whole, from each of its checkpoints.
fn machine() -> anyhow::Result<()> {
    let host = Host::new()?;
    fixtures::machine(&host.path("tree"))?;
    host.import(&host.path("tree"), "machine", &[])?;
    let create = ["guest", "create", "vm", "--driver", "qemu", "--on", "machine", "--memory", "192M"];
    let boot = ["--kernel", "/vmlinuz", "--initrd", "/initrd", "--append", "console=ttyS0 quiet panic=-1"];
    host.ctl.ok(create.iter().chain(&boot))?;
    let vm = Zoo { host: &host, name: "vm".to_owned() };
    vm.ok(&["start"])?;
    let early = ticks_beyond(&host, 3)?;
    let first = vm.ok(&["checkpoint", "--tag", "first"])?;
    ensure!(first["memory_bytes"].as_u64() > Some(32 << 20), "the checkpoint lacks memory: {first}");
    let later = ticks_beyond(&host, early + 3)?;
    let again = vm.ok(&["checkpoint", "--stop"])?;
    let (before, now) = (first["bytes_stored"].as_u64(), again["bytes_stored"].as_u64().map(|bytes| 4 * bytes));
    ensure!(now < before, "memory was stored twice: {first}, then {again}");
    vm.ok(&["restore"])?;
    ticks_beyond(&host, later)?;
    let said = host.ctl.run(["guest", "exec", "vm", "--", "/init"])?.failed_with(1)?;
    ensure!(said.contains("ssh"), "{said}");
    vm.ok(&["stop"])?;
    fs::write(host.ctl.store().join("guests/vm/run/console"), "")?;
    vm.ok(&["restore", "--tag", "first"])?;
    let back = ticks_beyond(&host, 0)?;
    ensure!(back <= later, "it goes on from {back}, not from its first checkpoint");
    vm.ok(&["remove", "--force"])?;
    host.fsck()
}

/// Waits until the machine counts beyond `count` on its console.
fn ticks_beyond(host: &Host, count: u64) -> anyhow::Result<u64> {
    let began = Instant::now();
    loop {
        let text = fs::read(host.ctl.store().join("guests/vm/run/console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(!text.contains(" bad"), "the machine has lost memory: {text}");
        let ticks = text.lines().filter_map(|line| line.trim().strip_prefix("tick ")?.strip_suffix(" ok"));
        match ticks.filter_map(|tick| tick.parse().ok()).next_back() {
            Some(tick) if tick > count => return Ok(tick),
            _ => ensure!(began.elapsed() < PATIENCE, "the machine does not count beyond {count}: {text}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A guest whose daemon ends, and another daemon that knows it.
fn outlives() -> anyhow::Result<()> {
    let mut host = Host::new()?;
    let zoo = Zoo::start(&host, "zoo", "process")?;
    zoo.passes(0)?;
    let pid = zoo.ok(&["show"])?["pid"].clone();
    std::mem::forget(zoo);
    host.kill()?;
    host.start(&[])?;
    let zoo = Zoo { host: &host, name: "zoo".to_owned() };
    let info = zoo.ok(&["show"])?;
    ensure!(info["pid"] == pid && info["activity"] == "running", "the new daemon says {info}");
    zoo.ok(&["stop"])?;
    ensure!(zoo.activity()? == "absent", "the new daemon did not end it");
    Ok(())
}

fn mistakes() -> anyhow::Result<()> {
    let host = Host::new()?;
    fixtures::build("zoo", &host.path("tree/bin/zoo"))?;
    host.import(&host.path("tree"), "zoo", &[])?;
    let create = |words: &[&str]| host.ctl.run(["guest", "create", "x", "--on", "zoo"].iter().chain(words));
    for (words, code, part) in [
        (&["--driver", "vax", "--", "/bin/zoo"][..], 2, "process"),
        (&["--", "zoo"], 2, "whole path"),
        (&[], 2, "no command"),
        (&["--network", "bridge:br0", "--", "/bin/zoo"], 2, "bridge:BRIDGE"),
    ] {
        let said = create(words)?.failed_with(code)?;
        ensure!(said.contains(part), "{words:?}: {said}");
    }
    let said = host.ctl.run(["guest", "create", "x", "--on", "zo", "--", "/bin/zoo"])?.failed_with(3)?;
    ensure!(said.contains("zoo"), "{said}");
    create(&["--", "/bin/nothing"])?.ok()?;
    let guest = Zoo { host: &host, name: "x".to_owned() };
    let said = host.ctl.run(["guest", "start", "x"])?.failed_with(1)?;
    ensure!(said.contains("/bin/nothing"), "{said}");
    ensure!(guest.activity()? == "absent", "a guest that could not be started runs");
    create(&["--", "/bin/zoo"])?.failed_with(4)?;
    guest.ok(&["remove"])?;
    create(&["--network", "bridge:nosuchbridge,10.0.0.2/24", "--", "/bin/zoo", "/says"])?.ok()?;
    let said = host.ctl.run(["guest", "start", "x"])?.failed_with(7)?;
    ensure!(said.contains("ip link add nosuchbridge type bridge"), "{said}");
    Ok(())
}
