//! The driver "lxc": a container by LXC's own tools, so that `lxc-ls`, `lxc-attach` and `lxc-info` see it too.
//!
//! As with runc, a dump ends the container and rolling back restores it from the files that were just written; its network is
//! ours and outlives it.
//!
//! In the run folder, which is LXC's path (`lxc-ls -P`): `NAME/config`, `dumped` (where the state of a container that stands
//! still is), `home/` (CRIU's settings).

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::criu::with_criu;
use super::network::Link;
use super::options::ContainerOptions;
use super::processes::{Process, status_bytes, wait_until};
use super::programs::{Programs, complaint};
use super::{
    Activity, ExecOutput, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Side, Status, Written, preflight,
    scan, state,
};
use crate::error::{Error, Result};

/// What LXC calls the log of CRIU's restoring.
const RESTORE_LOG: &str = "restore.log";
const PATIENCE: Duration = Duration::from_secs(30);

type Outcome<T> = std::result::Result<T, String>;

/// A guest of this driver.
pub struct LxcGuest {
    name: GuestName,
    options: ContainerOptions,
    programs: Arc<Programs>,
    run: PathBuf,
    root: PathBuf,
}

impl LxcGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<LxcGuest> {
        let name = record.spec.name.clone();
        let options = ContainerOptions::read(&record.spec.options)?;
        let has_line_end = |text: &String| text.contains('\n');
        if options.command.iter().chain(options.env.values()).chain(options.env.keys()).any(has_line_end) {
            let detail = "a word of an LXC guest's command holds a line's end, which its configuration can't";
            return Err(layerfs::Error::invalid(detail).into());
        }
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(LxcGuest { name, options, programs, run, root })
    }

    fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        move |detail| Error::guest(action, &self.name, detail)
    }

    fn link(&self) -> Option<Link<'_>> {
        Link::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    fn dumped(&self) -> PathBuf {
        self.run.join("dumped")
    }

    fn tool(&self, name: &str) -> Outcome<Command> {
        let program = self.programs.find(name).ok_or_else(|| format!("there is no {name}: apt-get install lxc"))?;
        // CRIU reads its settings there; LXC has no option for what they say.
        let home = self.run.join("home");
        let settings = "network-lock nftables\nghost-limit 64M\nlink-remap\nfile-locks\ntcp-established\n";
        let settings = format!("{settings}work-dir {}\n", self.run.display());
        fs::create_dir_all(home.join(".criu"))
            .and_then(|()| fs::write(home.join(".criu/default.conf"), settings))
            .map_err(|error| format!("cannot write CRIU's settings to {}: {error}", home.display()))?;
        let mut command = self.programs.command(program);
        command.env("HOME", home).arg("-P").arg(&self.run).arg("-n").arg(self.name.as_str());
        Ok(command)
    }

    /// Runs one of LXC's tools; what it has to say goes to a log.
    fn call(&self, name: &str, words: &[&str], folder: Option<(&str, &Path)>) -> Outcome<()> {
        let log = self.run.join("lxc.log");
        let _ = fs::remove_file(&log);
        let mut command = self.tool(name)?;
        command.args(words).arg("-o").arg(&log).args(["-l", "ERROR"]).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((option, folder)) = folder {
            command.arg(option).arg(folder);
        }
        let status = command.status().map_err(|error| format!("{name} cannot be run: {error}"))?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let lines = said.lines().filter_map(|line| line.split_once("ERROR").map(|(_, rest)| rest.trim()));
        let first = lines.take(3).collect::<Vec<_>>().join("; ");
        Err(format!("{name} failed: {}", if first.is_empty() { "it ended without a word" } else { &first }))
    }

    fn first(&self) -> Outcome<Option<Process>> {
        if !self.run.join(self.name.as_str()).exists() {
            return Ok(None);
        }
        let mut command = self.tool("lxc-info")?;
        let output = command.args(["-p", "-H"]).output().map_err(|error| format!("lxc-info cannot be run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let pid = text.trim().parse::<u32>().ok().filter(|pid| *pid > 0);
        Ok(pid.and_then(Process::of).filter(Process::is_alive))
    }

    fn running(&self, action: &'static str) -> Result<Process> {
        let failed = self.failed(action);
        self.first().map_err(&failed)?.ok_or_else(|| failed("it isn't running".to_owned()))
    }

    /// Writes the container's configuration.
    fn configure(&self) -> Outcome<()> {
        let folder = self.run.join(self.name.as_str());
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(folder.join("config"), self.config()))
            .map_err(|error| format!("cannot write the container's configuration: {error}"))
    }

    fn config(&self) -> String {
        let mut text = format!("lxc.rootfs.path = dir:{}\n", self.root.display());
        let hostname = self.options.hostname.clone().unwrap_or_else(|| self.name.to_string());
        let mut put = |key: &str, value: &str| {
            // Writing to memory can't fail.
            let _ = writeln!(text, "{key} = {value}");
        };
        put("lxc.uts.name", &hostname);
        match self.link() {
            // A namespace of ours: LXC leaves it as it is.
            Some(link) => put("lxc.namespace.share.net", &link.namespace().display().to_string()),
            None => put("lxc.net.0.type", "empty"),
        }
        for (key, value) in SETTINGS {
            put(key, value);
        }
        // Named without need, it keeps CRIU from restoring where there is no AppArmor.
        if fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y')) {
            put("lxc.apparmor.profile", "unconfined");
        }
        put("lxc.init.cwd", &self.options.folder.display().to_string());
        for (name, value) in self.options.environment() {
            put("lxc.environment", &format!("{name}={value}"));
        }
        put("lxc.init.cmd", &self.command());
        text
    }

    /// The command as LXC splits it again, with its output sent to its log.
    fn command(&self) -> String {
        let words: Vec<String> = self.options.command.iter().map(|word| quoted(word)).collect();
        let words = words.join(" ");
        let to = self.options.log.as_ref().map_or_else(|| "/dev/null".to_owned(), |log| log.display().to_string());
        match &self.options.log {
            None => words,
            Some(_) => format!("/bin/sh -c {}", quoted(&format!("exec {words} >>{} 2>&1", quoted(&to)))),
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let failed = self.failed(action);
        if let Some(process) = self.first().map_err(&failed)? {
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("process {} does not end", process.pid)));
            }
        }
        self.wait_stopped().map_err(&failed)?;
        let _ = fs::remove_file(self.dumped());
        self.link().map_or(Ok(()), |link| link.remove().map_err(&failed))
    }

    /// Waits until LXC's monitor has ended too: until then a new container would be refused.
    fn wait_stopped(&self) -> Outcome<()> {
        if !self.run.join(self.name.as_str()).exists() {
            return Ok(());
        }
        let mut state = String::new();
        let is_stopped = wait_until(PATIENCE, || {
            let asked = self.tool("lxc-info").and_then(|mut command| {
                command.args(["-s", "-H"]).output().map_err(|error| format!("lxc-info cannot be run: {error}"))
            });
            state =
                asked.map_or_else(|error| error, |output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
            state == "STOPPED"
        });
        if is_stopped { Ok(()) } else { Err(format!("LXC says that it is {state}")) }
    }

    /// LXC has CRIU write a log beside the state's files, which may be read-only. Every state of ours has a file of its name,
    /// over which one of the run folder is mounted for the while.
    fn with_log<T>(&self, from: &Path, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let (log, there) = (self.run.join(RESTORE_LOG), from.join(RESTORE_LOG));
        fs::write(&log, "").map_err(|error| format!("cannot write {}: {error}", log.display()))?;
        rustix::mount::mount_bind(&log, &there)
            .map_err(|error| format!("cannot mount over {}: {error}", there.display()))?;
        let outcome = work();
        let unmounted = rustix::mount::unmount(&there, rustix::mount::UnmountFlags::DETACH);
        unmounted.map_err(|error| format!("cannot unmount {}: {error}", there.display()))?;
        outcome
    }

    fn restore_from(&self, from: &Path) -> Outcome<()> {
        self.configure()?;
        self.wait_stopped()?;
        self.with_log(from, || self.call("lxc-checkpoint", &["-r"], Some(("-D", from))))
            .map_err(|error| with_criu(error, &self.run.join(RESTORE_LOG)))?;
        let mut found = None;
        wait_until(PATIENCE, || {
            found = self.first().ok().flatten();
            found.is_some()
        });
        found.map(|_| ()).ok_or_else(|| "LXC restored it, and it is gone".to_owned())
    }
}

impl Guest for LxcGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let mut found = preflight::host(&self.programs, side);
        found.extend(preflight::missing(&self.programs, "lxc-start", "lxc"));
        if let Some(link) = self.link() {
            found.extend(preflight::network(&self.programs, link.bridge(), link.has_bridge()));
        }
        if let (Side::Source, Ok(Some(process))) = (side, self.first()) {
            found.extend(preflight::processes(&process.tree()));
        }
        Ok(found)
    }

    fn start(&self) -> Result<()> {
        let failed = self.failed("start");
        if self.status()?.activity != Activity::Absent {
            return Err(failed("it runs already".to_owned()));
        }
        self.end("start")?;
        if let Some(link) = self.link() {
            link.make().map_err(&failed)?;
        }
        let started = self.configure().and_then(|()| self.call("lxc-start", &["-d"], None));
        let linked = started.and_then(|()| self.link().map_or(Ok(()), |link| link.release()));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("start");
        }
        linked.map_err(&failed)
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString]) -> Result<ExecOutput> {
        use std::os::unix::process::ExitStatusExt;
        self.running("run a command in")?;
        let failed = self.failed("run a command in");
        let mut command = self.tool("lxc-attach").map_err(&failed)?;
        command.arg("--clear-env").arg("--").args(argv);
        let output = command.output().map_err(|error| failed(format!("lxc-attach cannot be run: {error}")))?;
        if output.status.code() == Some(1) && output.stdout.is_empty() && complaint(&output).contains("lxc-attach: ") {
            return Err(failed(complaint(&output)));
        }
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        Ok(ExecOutput { code, stdout: output.stdout, stderr: output.stderr })
    }

    fn status(&self) -> Result<Status> {
        let process = self.first().map_err(self.failed("look at"))?;
        let activity = match &process {
            Some(_) => Activity::Running,
            None if self.dumped().exists() => Activity::Frozen,
            None => Activity::Absent,
        };
        let memory =
            process.as_ref().map(|process| process.tree().iter().filter_map(|pid| status_bytes(*pid, "VmRSS")).sum());
        Ok(Status { activity, pid: process.map(|process| process.pid), memory_bytes: memory })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let process = self.running("scan")?;
        scan::tree(&process, into).map_err(self.failed("scan"))
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let process = self.running("dump")?;
        let failed = self.failed("dump");
        if let Some(link) = self.link() {
            link.hold().map_err(&failed)?;
        }
        let began = Instant::now();
        let dumped = self.call("lxc-checkpoint", &["-s"], Some(("-D", into)));
        let frozen = began.elapsed();
        if let Err(error) = dumped {
            if let Some(link) = self.link() {
                link.release().map_err(&failed)?;
            }
            return Err(failed(with_criu(error, &into.join("dump.log"))));
        }
        // No part of the state; but the other log's place is.
        let _ = fs::remove_file(into.join("dump.log"));
        fs::write(into.join(RESTORE_LOG), "").map_err(|error| failed(format!("cannot write the state: {error}")))?;
        fs::write(self.dumped(), into.as_os_str().as_encoded_bytes())
            .map_err(|error| failed(format!("cannot note that it stands still: {error}")))?;
        if !process.wait_gone(PATIENCE) {
            return Err(failed("it was dumped and does not end".to_owned()));
        }
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen })
    }

    fn resume(&self) -> Result<()> {
        use std::os::unix::ffi::OsStringExt;
        let failed = self.failed("resume");
        if self.first().map_err(&failed)?.is_none() {
            let from = fs::read(self.dumped()).map_err(|_| failed("there is nothing left of it".to_owned()))?;
            self.restore_from(Path::new(&OsString::from_vec(from))).map_err(&failed)?;
        }
        let _ = fs::remove_file(self.dumped());
        self.link().map_or(Ok(()), |link| link.release().map_err(&failed))
    }

    fn discard(&self) -> Result<()> {
        self.end("discard")
    }

    fn restore(&self, from: &Path, _: Manner) -> Result<()> {
        let failed = self.failed("restore");
        if self.status()?.activity != Activity::Absent {
            return Err(failed("it runs already".to_owned()));
        }
        self.end("restore")?;
        if let Some(link) = self.link() {
            link.make().map_err(&failed)?;
        }
        let restored = self.restore_from(from);
        let linked = restored.and_then(|()| self.link().map_or(Ok(()), |link| link.release()));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        linked.map_err(&failed)
    }
}

fn quoted(word: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&b);
    if !word.is_empty() && word.bytes().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// What a container that CRIU shall dump has to be like, and what every one of ours has.
const SETTINGS: [(&str, &str); 8] = [
    ("lxc.console.path", "none"),
    ("lxc.tty.max", "0"),
    ("lxc.pty.max", "1"),
    ("lxc.mount.auto", "proc:rw sys:rw"),
    ("lxc.autodev", "1"),
    ("lxc.signal.halt", "SIGKILL"),
    ("lxc.signal.stop", "SIGKILL"),
    ("lxc.monitor.unshare", "0"),
];
