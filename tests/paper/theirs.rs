//! A cell by the paper's own method (its Figure 3): copies of folders, `rsync -az`, and the tools' own checkpoints.
//!
//! ```text
//! clone base as app · rsync app      (three layers, the application not found)
//! clone app, or base, as instance    (the guest runs)
//! suspend · rsync instance filesystem · rsync instance in-memory state · restore      (it stands still)
//! ```
//!
//! Where the paper leaves a choice, the one that is better for its method is taken: rsync's own daemon, without ssh; the network of
//! the destination is ready before the guest is suspended; clients are told at once where the guest is; layers that exist before the
//! migration are read from the disk's cache.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::output_of;
use layerfs_tests::network::{End, Link};
use tempfile::TempDir;

use crate::cell::{App, Case, Cell, Kind};
use crate::clients::Clients;
use crate::container::Container;
use crate::lan::Lan;
use crate::machine::Machine;
use crate::measure::Bound;
use crate::record::{Record, Stage};
use crate::{measure, roots};

/// The guest's hardware address, the same on both hosts.
pub const HARDWARE: &str = "02:00:00:00:00:02";
/// The port of rsync's daemon.
const RSYNC_PORT: u16 = 8730;
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest by its tools, on either host.
pub trait Tools {
    /// Starts it on the first host; its part of the file system is in place there.
    fn start(&mut self) -> anyhow::Result<()>;
    /// Makes ready at the second host what need not wait for the guest.
    fn prepare(&mut self) -> anyhow::Result<()>;
    /// Suspends it, with its memory in files.
    fn suspend(&mut self) -> anyhow::Result<()>;
    /// Restores it at the second host, from what was sent there, and tells its clients.
    fn restore(&mut self) -> anyhow::Result<()>;
}

/// Where things are on the hosts: `a/instance`, `a/state`, and the same under `b`.
pub struct Places {
    folder: TempDir,
}

impl Places {
    /// A path on host "a" or "b".
    pub fn at(&self, host: &str, what: &str) -> PathBuf {
        self.folder.path().join(host).join(what)
    }
}

/// The command `program` in the network of `end`.
pub fn in_net(end: &End, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", end.namespace)).arg("--").arg(program).stdin(Stdio::null());
    command
}

/// rsync's daemon on the second host. Dropping it ends it.
struct Rsync<'a> {
    server: Child,
    link: &'a Link,
    root: PathBuf,
    bound: Bound,
}

impl<'a> Rsync<'a> {
    fn start(link: &'a Link, places: &Places) -> anyhow::Result<Rsync<'a>> {
        let root = places.at("b", "");
        let config = places.folder.path().join("rsyncd.conf");
        let text = format!("use chroot = no\n[b]\npath = {}\nread only = no\nuid = root\ngid = root\n", root.display());
        std::fs::write(&config, text)?;
        let mut command = in_net(&link.b, "rsync");
        command.args(["--daemon", "--no-detach", "--address", &link.b.address, "--port", &RSYNC_PORT.to_string()]);
        command.arg("--config").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let server = command.spawn().context("cannot start rsync's daemon")?;
        let rsync = Rsync { server, link, root, bound: Bound(None) };
        let (began, address) = (Instant::now(), format!("{}:{RSYNC_PORT}", link.b.address));
        while layerfs_tests::network::inside(&link.a, || std::net::TcpStream::connect(&address)).is_err() {
            ensure!(began.elapsed() < PATIENCE, "rsync's daemon doesn't answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(rsync)
    }

    /// Brings `from` of the first host to `to` of the second: the content of a folder, or one file.
    fn send(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        let inside = to.strip_prefix(&self.root).context("not on the second host")?;
        let is_folder = from.is_dir();
        let end = if is_folder { "/" } else { "" };
        let mut command = in_net(&self.link.a, "rsync");
        // A file alone can't be told what to leave out beside it.
        command.arg("-az").args(is_folder.then_some("--delete"));
        command.arg(format!("{}{end}", from.display()));
        command.arg(format!("rsync://{}:{RSYNC_PORT}/b/{}{end}", self.link.b.address, inside.display()));
        let output = self.bound.output(&mut command)?;
        ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Rsync<'_> {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Takes times, stage by stage.
struct Stages(Vec<Stage>);

impl Stages {
    fn time(&mut self, name: &str, is_down: bool, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let began = Instant::now();
        work().with_context(|| name.to_owned())?;
        let seconds = began.elapsed().as_secs_f64();
        self.0.push(Stage { name: name.to_owned(), seconds, is_down });
        Ok(seconds)
    }
}

/// A layer of the paper's: a folder for a container, a disk for a machine.
fn layer(kind: Kind, app: App) -> anyhow::Result<PathBuf> {
    if kind == Kind::Kvm { roots::disk(app) } else { roots::tree(app) }
}

fn clone(from: &Path, to: &Path) -> anyhow::Result<()> {
    if from.is_dir() {
        return roots::copy(from, to);
    }
    output_of(Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to)).map(drop)
}

/// Measures `cell`, in which the migration takes `most` at most.
pub fn run(cell: Cell, most: Option<Duration>) -> anyhow::Result<Record> {
    ensure!(cell.kind != Kind::Process, "the paper's method is of LXC and KVM");
    let places = Places { folder: tempfile::Builder::new().prefix("lfsp").tempdir()? };
    for host in ["a", "b"] {
        std::fs::create_dir_all(places.at(host, "state"))?;
    }
    let link = Link::new()?;
    let lan = Lan::new(&link)?;
    let (base, app) = (layer(cell.kind, App::None)?, layer(cell.kind, cell.app)?);
    clone(&app, &places.at("a", "instance"))?;
    let mut guest: Box<dyn Tools + '_> = match cell.kind {
        Kind::Kvm => Box::new(Machine::new(&link, &places, cell.app)?),
        _ => Box::new(Container::new(&link, &places, cell.app)?),
    };
    let mut rsync = Rsync::start(&link, &places)?;
    guest.start()?;
    let clients = Clients::start(&lan.user, cell.app)?;
    measure::warm_up(cell, &clients);
    link.shape(cell.megabits)?;
    let (noise, busy) = measure::quiet(&clients)?;

    rsync.bound = Bound::after(most);
    let (before, began) = (measure::wire_bytes(&link)?, Instant::now());
    let mut stages = Stages(Vec::new());
    let (app_there, instance_there) = (places.at("b", "app"), places.at("b", "instance"));
    // What lies at the second host already is the same file or folder as at the first: it is only read.
    let below = match cell.case {
        Case::Two => base,
        Case::Found => app,
        Case::NotFound => {
            stages.time("Clone base as app", false, || clone(&base, &app_there))?;
            stages.time("rsync app filesystem", false, || rsync.send(&app, &app_there))?;
            app_there
        }
    };
    stages.time("Clone app as instance", false, || clone(&below, &instance_there))?;
    stages.time("Other remaining tasks", false, || guest.prepare())?;
    let dump_seconds = stages.time("Suspend instance", true, || guest.suspend())?;
    let stopped = measure::wire_bytes(&link)?;
    stages.time("rsync instance filesystem", true, || rsync.send(&places.at("a", "instance"), &instance_there))?;
    stages.time("rsync instance in-memory state", true, || {
        rsync.send(&places.at("a", "state"), &places.at("b", "state"))
    })?;
    let stopped_bytes = measure::wire_bytes(&link)? - stopped;
    let restore_seconds = stages.time("Restore instance", true, || {
        guest.restore()?;
        lan.learns(HARDWARE)
    })?;
    let total = began.elapsed();
    clients.settle(began)?;
    Ok(Record {
        cell: cell.to_string(),
        total_seconds: total.as_secs_f64(),
        wire_bytes: measure::wire_bytes(&link)? - before,
        downtime_seconds: clients.longest_gap(began).as_secs_f64(),
        first_program_seconds: clients.longest_gap_of_first(began).as_secs_f64(),
        noise_seconds: noise.as_secs_f64(),
        busy,
        dump_seconds,
        restore_seconds,
        stopped_bytes: Some(stopped_bytes),
        memory_bytes: None,
        stages: stages.0,
        notes: clients.notes(),
        machine: measure::machine()?,
        day: measure::day()?,
        build: measure::build()?,
    })
}
