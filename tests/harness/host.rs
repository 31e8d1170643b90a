//! Hosts: a store with its daemon, in a folder of its own, perhaps in a network namespace of its own.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::ctl::{Answer, Ctl};
use crate::network::{End, Link};

/// The port that a test's daemon listens on, inside its own namespace.
pub const PORT: u16 = 7440;
/// The longest that a daemon may take to answer, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `layerctl daemon --foreground …`, perhaps by another program, and waits until its socket answers.
    fn start(ctl: &Ctl, log: &Path, by: &[&str], args: &[&str]) -> anyhow::Result<Daemon> {
        let all = ["daemon", "--foreground"].iter().chain(args);
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = started_by(by, ctl.command(all));
        command.stdout(file.try_clone()?).stderr(file).stdin(Stdio::null());
        let mut daemon = Daemon {
            child: command.spawn().with_context(|| format!("cannot start {command:?}"))?,
            log: log.to_owned(),
        };
        let socket = ctl.store().join("control.sock");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("the daemon ended at its start: {status}\n{}", daemon.log_text());
            }
            if UnixStream::connect(&socket).is_ok() {
                return Ok(daemon);
            }
            ensure!(Instant::now() < deadline, "the daemon's socket does not answer\n{}", daemon.log_text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the daemon does not end\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The most memory that it ever held, in bytes.
    pub fn peak_memory_bytes(&self) -> anyhow::Result<u64> {
        peak_memory_of(self.pid())
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// `command` as the last words of `by`.
fn started_by(by: &[&str], command: Command) -> Command {
    let Some((first, rest)) = by.split_first() else { return command };
    let mut whole = Command::new(first);
    whole.args(rest).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    whole
}

/// The most memory that process `pid` ever held, in bytes.
pub fn peak_memory_of(pid: u32) -> anyhow::Result<u64> {
    memory_of(pid, "VmHWM")
}

/// What `/proc/PID/status` says of process `pid`'s memory under the name `field`, in bytes.
pub fn memory_of(pid: u32, field: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(name, _)| *name == field).with_context(|| format!("no {field}"))?;
    let kibibytes: u64 = value.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store, its daemon, and a folder for everything else. Dropping it ends the daemon, unmounts what lies under
/// the folder, and removes it.
#[derive(Debug)]
pub struct Host {
    /// The daemon, while one runs that we started.
    pub daemon: Option<Daemon>,
    /// `layerctl` for this host's store.
    pub ctl: Ctl,
    end: Option<End>,
    /// Where the daemon listens, if not at its end of the link.
    listen: Option<String>,
    folder: TempDir,
}

impl Host {
    /// A host without a network of its own, its daemon running.
    pub fn new() -> anyhow::Result<Host> {
        Host::within(None, &[])
    }

    /// A host whose daemon is not started.
    pub fn cold() -> anyhow::Result<Host> {
        let folder = tempfile::Builder::new().prefix("lfst").tempdir()?;
        let ctl = Ctl::new(&folder.path().join("store"), None)?;
        Ok(Host { daemon: None, ctl, end: None, listen: None, folder })
    }

    fn within(end: Option<End>, args: &[&str]) -> anyhow::Result<Host> {
        let mut host = Host::cold()?;
        host.ctl = Ctl::new(host.ctl.store(), end.as_ref().map(|end| end.namespace.as_str()))?;
        host.end = end;
        host.start(args)?;
        Ok(host)
    }

    /// Starts the daemon with further arguments.
    pub fn start(&mut self, args: &[&str]) -> anyhow::Result<()> {
        // What these daemons leave when they are killed is what a dead machine leaves.
        self.start_kept(&[&["--no-keeper"], args].concat())
    }

    /// The same, with a keeper, which holds the mounts of a daemon that is killed and starts another.
    pub fn start_kept(&mut self, args: &[&str]) -> anyhow::Result<()> {
        self.start_by(&[], args)
    }

    /// The same by a program that becomes it, with these words in front.
    pub fn start_by(&mut self, by: &[&str], args: &[&str]) -> anyhow::Result<()> {
        ensure!(self.daemon.is_none(), "the daemon runs already");
        let listen = self.listen.clone().or_else(|| self.end.as_ref().map(|end| format!("{}:{PORT}", end.address)));
        let mut all = Vec::new();
        if let Some(listen) = &listen {
            all.extend(["--listen", listen]);
        }
        all.extend(args);
        self.daemon = Some(Daemon::start(&self.ctl, &self.folder.path().join("daemon.log"), by, &all)?);
        Ok(())
    }

    /// Kills the daemon as `kill -9` does.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        daemon.child.kill()?;
        daemon.wait().map(drop)
    }

    /// The process id of the daemon that serves the store, whoever started it. One that was just killed has a successor soon: waits for it.
    pub fn serving_pid(&self) -> anyhow::Result<i32> {
        let began = Instant::now();
        loop {
            match self.ctl.json(["daemon", "status"]) {
                Ok(status) => return Ok(status["pid"].as_i64().context("no pid")? as i32),
                Err(error) if began.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Kills the daemon that serves the store as `kill -9` does; its keeper, if it has one, starts another.
    pub fn kill_serving(&self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_raw(self.serving_pid()?).context("no process")?;
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
    }

    /// Asks the daemon to end, and waits until it has.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        self.ctl.ok(["daemon", "stop"])?;
        let status = daemon.wait()?;
        ensure!(status.success(), "the daemon ended with {status}\n{}", daemon.log_text());
        Ok(())
    }

    /// Ends the daemon, whether or not a mount of its own keeps it busy.
    pub fn stop_or_kill(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        self.ctl.run(["daemon", "stop", "--force"])?;
        daemon.wait().map(drop)
    }

    /// Waits until the daemon has died of SIGKILL by its own hand, at a step that it was told to die at.
    pub fn wait_for_crash(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        let status = daemon.wait()?;
        ensure!(status.signal() == Some(9), "the daemon ended with {status} instead of dying\n{}", daemon.log_text());
        Ok(())
    }

    /// Whether the daemon that we started has ended.
    pub fn has_ended(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| matches!(daemon.child.try_wait(), Ok(Some(_))))
    }

    /// A path in this host's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new folder in this host's folder.
    pub fn new_folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// This host's end of the link.
    pub fn end(&self) -> anyhow::Result<&End> {
        self.end.as_ref().context("this host has no network")
    }

    /// Imports `source` as `name`, with further arguments.
    pub fn import(&self, source: &Path, name: &str, args: &[&str]) -> anyhow::Result<Value> {
        let fixed = [OsStr::new("import"), source.as_os_str(), OsStr::new(name)];
        self.ctl.json(fixed.into_iter().chain(args.iter().map(OsStr::new)))
    }

    /// Mounts `name` on a new folder `at`, with further arguments.
    pub fn mount(&self, name: &str, at: &str, args: &[&str]) -> anyhow::Result<PathBuf> {
        let folder = self.new_folder(at)?;
        let fixed = [OsStr::new("mount"), OsStr::new(name), folder.as_os_str()];
        self.ctl.ok(fixed.into_iter().chain(args.iter().map(OsStr::new)))?;
        Ok(folder)
    }

    /// Unmounts `folder`.
    pub fn umount(&self, folder: &Path) -> anyhow::Result<Answer> {
        self.ctl.ok([OsStr::new("umount"), folder.as_os_str()])
    }

    /// Seals the mount on `folder` as `name`.
    pub fn seal(&self, folder: &Path, name: &str) -> anyhow::Result<Value> {
        self.ctl.json([OsStr::new("seal"), folder.as_os_str(), OsStr::new(name)])
    }

    /// Exports `name` to `to`, with further arguments.
    pub fn export(&self, name: &str, to: &Path, args: &[&str]) -> anyhow::Result<Answer> {
        let fixed = [OsStr::new("export"), OsStr::new(name), to.as_os_str()];
        self.ctl.ok(fixed.into_iter().chain(args.iter().map(OsStr::new)))
    }

    /// Fails unless `fsck` finds nothing.
    pub fn fsck(&self) -> anyhow::Result<()> {
        self.ctl.ok(["fsck"]).map(drop)
    }

    /// Bytes that the packs of the store take on disk.
    pub fn pack_bytes(&self) -> anyhow::Result<u64> {
        let mut bytes = 0;
        for entry in std::fs::read_dir(self.ctl.store().join("packs"))? {
            bytes += entry?.metadata()?.len();
        }
        Ok(bytes)
    }

    /// The names in the store with their layers' ids.
    pub fn names(&self) -> anyhow::Result<std::collections::BTreeMap<String, String>> {
        let list = self.ctl.json(["list"])?;
        let rows = list["layers"].as_array().with_context(|| format!("`list --json` is no list: {list}"))?;
        let mut names = std::collections::BTreeMap::new();
        for row in rows {
            let id = row["id"].as_str().with_context(|| format!("no id in {row}"))?;
            for name in row["names"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                names.insert(name.to_owned(), id.to_owned());
            }
        }
        Ok(names)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The daemon first: a mount whose server is gone answers at once.
        self.daemon = None;
        // A store that is a mount itself stays until nobody serves it: else nobody could be asked to end.
        unmount_where(self.folder.path(), |point| !self.ctl.store().starts_with(point));
        stop_auto_started(&self.ctl);
        unmount_under(self.folder.path());
    }
}

/// Unmounts, lazily, everything that is mounted under `folder`, the last first.
pub fn unmount_under(folder: &Path) {
    unmount_where(folder, |_| true);
}

fn unmount_where(folder: &Path, is_wanted: impl Fn(&str) -> bool) {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    let points = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(folder) && is_wanted(point))
        .collect::<Vec<_>>();
    for point in points.into_iter().rev() {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
}

/// Ends a daemon that a command started by itself. (Not found through /proc: reading the command line of a process
/// that waits for a page of a broken mount would wait with it.)
fn stop_auto_started(ctl: &Ctl) {
    if UnixStream::connect(ctl.store().join("control.sock")).is_ok() {
        let _ = ctl.run(["daemon", "stop", "--force"]);
    }
}

/// Two hosts that know and allow each other, and the link between them.
#[derive(Debug)]
pub struct TwoHosts {
    /// The first host; it calls the other "b".
    pub a: Host,
    /// The second host; it calls the first "a".
    pub b: Host,
    /// The link, after the hosts: it must outlive their processes.
    pub link: Link,
}

impl TwoHosts {
    /// Two hosts on a link without a limit.
    pub fn new() -> anyhow::Result<TwoHosts> {
        let hosts = TwoHosts::strangers()?;
        hosts.introduce()?;
        Ok(hosts)
    }

    /// Two hosts that know each other on a link that was made for them, by its first path.
    pub fn on(link: Link) -> anyhow::Result<TwoHosts> {
        let hosts = TwoHosts::strangers_on(link)?;
        hosts.introduce()?;
        Ok(hosts)
    }

    /// Two hosts that know each other and listen on all their addresses.
    pub fn everywhere(link: Link) -> anyhow::Result<TwoHosts> {
        let mut hosts = TwoHosts::strangers_on(link)?;
        for host in [&mut hosts.a, &mut hosts.b] {
            host.stop()?;
            host.listen = Some(format!("0.0.0.0:{PORT}"));
            host.start(&[])?;
        }
        hosts.introduce()?;
        Ok(hosts)
    }

    /// Two hosts on a link, neither of which knows the other.
    pub fn strangers() -> anyhow::Result<TwoHosts> {
        TwoHosts::strangers_on(Link::new()?)
    }

    fn strangers_on(link: Link) -> anyhow::Result<TwoHosts> {
        let a = Host::within(Some(link.a.clone()), &[])?;
        let b = Host::within(Some(link.b.clone()), &[])?;
        Ok(TwoHosts { a, b, link })
    }

    /// Adds each host to the other's peers, as an operator would: one command on each side.
    pub fn introduce(&self) -> anyhow::Result<()> {
        for (me, other, name) in [(&self.a, &self.b, "b"), (&self.b, &self.a, "a")] {
            let key = public_key(other)?;
            let address = format!("{}:{PORT}", other.end()?.address);
            me.ctl.ok(["peer", "add", name, &address, "--key", &key])?;
        }
        Ok(())
    }

    /// Pushes `names` from the first to the second host and gives the report.
    pub fn push(&self, names: &[&str]) -> anyhow::Result<Value> {
        self.a.ctl.json(["push"].iter().chain(names).chain(&["b"]))
    }
}

/// A host's public key, as its peers are given it.
pub fn public_key(host: &Host) -> anyhow::Result<String> {
    let identity = host.ctl.json(["peer", "id"])?;
    identity["key"].as_str().map(str::to_owned).with_context(|| format!("no key in {identity}"))
}

/// Runs `program` to its end in the host's network.
pub fn run_in(host: &Host, program: &str, args: &[&str]) -> anyhow::Result<String> {
    let namespace = format!("--net=/run/netns/{}", host.end()?.namespace);
    crate::case::output_of(Command::new("nsenter").arg(namespace).arg("--").arg(program).args(args))
}
