//! The driver "qemu": a machine by QEMU, its disk a file on the mounted stack.
//!
//! Its memory is a file that it shares with us ([`machine_memory`](super::machine_memory)): each page has its place, whatever else is in it, so the same
//! memory is cut into the same pieces of 64 KiB in every state, dumped or scanned, and QEMU need not save nor load it. Where it isn't
//! shared QEMU saves it in place ("mapped-ram"). A dumped machine stands still in its QEMU and goes on there if it is resumed.
//!
//! In a state: `memory.raw`, `devices` (what QEMU saves beside the memory, if that is shared), `accel`.
//!
//! In the run folder: `qmp` (QEMU's control socket), `process.json`, `console` (what the machine writes on its serial line). Invariant:
//! a QEMU is known there, or by `starting.json` and `pid`, from before it does anything; whoever comes after a daemon that died finds it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::failpoint;
use layerfs::import::DISK_NAME;
use layerfs::monitor::Monitor;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::errand::{self, Errand, Note, WORK_PATIENCE};
use super::machine::{self, AUTO, MachineOptions};
use super::machine_memory::{Held, Memory};
use super::mapped_ram::{self, Layout};
use super::network::Tap;
use super::options::Network;
use super::process::place;
use super::processes::{Process, status_bytes, wait_until};
use super::programs::{Programs, complaint};
use super::qmp::Qmp;
use super::state::{self, MEMORY_FILE};
use super::{
    Activity, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Pipes, Side, Status, Surroundings, Written, exec,
    preflight, surroundings,
};
use crate::error::{Error, Result};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
/// What it is called with when it is to go on from a state.
const INCOMING: &str = "-incoming";
/// What it is called with when it has a disk.
const BLOCKDEV: &str = "-blockdev";
/// How long saving or loading memory may take.
const MEMORY_PATIENCE: Duration = Duration::from_secs(3600);
/// More than any memory or disk can be read.
const NO_LIMIT: u64 = 1 << 40;
const MEGABYTE: u64 = 1 << 20;
/// What a machine is called that has run and that QEMU has stopped by itself: as its disk was full, for one. One that we have stopped, or not let
/// go on yet, is called otherwise.
const STOPPED_BY_ITSELF: [&str; 6] =
    ["suspended", "io-error", "internal-error", "guest-panicked", "watchdog", "shutdown"];
/// Where it stands what emulates a machine, or did.
const ACCEL: &str = "accel";
/// What a state has beside shared memory.
const DEVICES_FILE: &str = "devices";
/// What has QEMU save pages in place, and leave out shared memory.
const MAPPED_RAM: &str = "mapped-ram";
const IGNORE_SHARED: &str = "x-ignore-shared";
/// From this version on QEMU maps a file that it can't write.
const MAPS_FILES: (u32, u32) = (8, 2);
/// A socket's path can't be longer.
const MAX_SOCKET_PATH: usize = 107;

type Outcome<T> = std::result::Result<T, String>;

/// A state that is about to be loaded.
struct Incoming {
    /// What QEMU loads.
    file: PathBuf,
    /// How it was saved.
    capability: &'static str,
    /// The machine's type.
    machine: String,
    /// What emulated it, which is part of what was saved.
    accel: String,
}

/// Where a machine's memory is to lie.
enum Backing {
    /// In this file, which it shares.
    Shared(Memory),
    /// In the state's file, from this place on, until it is touched.
    Lazy(PathBuf, u64),
}

/// A guest of this driver.
pub struct QemuGuest {
    name: GuestName,
    options: MachineOptions,
    programs: Arc<Programs>,
    run: PathBuf,
    root: PathBuf,
}

impl QemuGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<QemuGuest> {
        let name = record.spec.name.clone();
        let options = MachineOptions::read(&record.spec.options)?;
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(QemuGuest { name, options, programs, run, root })
    }

    fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        move |detail| Error::guest(action, &self.name, detail)
    }

    fn saved(&self) -> PathBuf {
        self.run.join("process.json")
    }

    fn socket(&self) -> PathBuf {
        self.run.join("qmp")
    }

    fn process(&self) -> Option<Process> {
        Process::load(&self.saved()).filter(Process::is_alive)
    }

    /// Where it is noted who starts QEMU.
    fn starting(&self) -> PathBuf {
        self.run.join("starting.json")
    }

    /// Where QEMU writes its number.
    fn pidfile(&self) -> PathBuf {
        self.run.join("pid")
    }

    /// The QEMU that `errand` has started, if it came so far and that is there: one with this guest's own words.
    fn started_by(&self, errand: &Errand) -> Option<Process> {
        let pidfile = self.pidfile();
        let process = Process::of(fs::read_to_string(&pidfile).ok()?.trim().parse().ok()?)?;
        let is_its = has_word(&process, pidfile.as_os_str().as_bytes());
        (is_its && process.is_younger_than(errand.program())).then_some(process)
    }

    /// Finds out what came of a QEMU whose beginner has died while it came up.
    fn settle(&self) -> Result<()> {
        let note = self.starting();
        let Some(errand) = Errand::orphaned(&note) else { return Ok(()) };
        errand.wait().map_err(self.failed("look at"))?;
        let _held = errand::settling();
        if Errand::load(&note).as_ref() != Some(&errand) {
            return Ok(());
        }
        match self.started_by(&errand) {
            // It has nothing in it yet.
            Some(process) if has_word(&process, INCOMING.as_bytes()) => {
                process.kill();
                process.wait_gone(PATIENCE);
            }
            Some(process) => process.save(&self.saved())?,
            None => {}
        }
        let _ = fs::remove_file(note);
        Ok(())
    }

    fn must_be_absent(&self, action: &'static str) -> Result<()> {
        self.settle()?;
        match self.process() {
            Some(_) => Err(self.failed(action)("it runs already".to_owned())),
            None => Ok(()),
        }
    }

    fn qmp(&self) -> Outcome<Qmp> {
        Qmp::connect(&self.socket())
    }

    /// What QEMU says of the machine.
    fn state(&self) -> Outcome<Value> {
        self.qmp()?.call("query-status", json!({}))
    }

    fn tap(&self) -> Option<Tap<'_>> {
        Tap::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    /// A file of the stack, as the host has it. Links lead nowhere else: the stack may be somebody's whom the host's files are none of.
    fn at(&self, path: &Path) -> Outcome<Option<PathBuf>> {
        let failed = |error: Errno| format!("cannot open {} in its stack: {error}", path.display());
        let (folder, flags) = (OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, OFlags::PATH | OFlags::CLOEXEC);
        let root = rustix::fs::open(&self.root, folder, Mode::empty()).map_err(failed)?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let file = match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(failed)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(format!("{} in its stack is no file", path.display()));
        }
        let found = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        found.map(Some).map_err(|error| format!("cannot find {} in its stack: {error}", path.display()))
    }

    /// Where its stack has its disk, if it has one.
    fn disk_path(&self) -> &Path {
        self.options.disk.as_deref().unwrap_or(Path::new(DISK_NAME))
    }

    fn disk(&self) -> Outcome<Option<PathBuf>> {
        self.at(self.disk_path())
    }

    /// Whether the disk that `process` has open is the one that is mounted here for it.
    fn has_its_disk(&self, process: &Process) -> bool {
        if !has_word(process, BLOCKDEV.as_bytes()) {
            return true;
        }
        let disk = self.disk().ok().flatten().and_then(|disk| place(&disk));
        let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
        disk.is_some() && open.map(|file| place(&file.path())).any(|place| place == disk)
    }

    /// What it runs by; what is best here if it doesn't run.
    fn accel(&self) -> String {
        if self.options.accel != AUTO {
            return self.options.accel.clone();
        }
        let chosen = || fs::read_to_string(self.run.join(ACCEL)).ok().filter(|_| self.process().is_some());
        chosen().or_else(|| self.accels().into_iter().next()).unwrap_or_else(|| "tcg".to_owned())
    }

    /// What can emulate a machine here, the best first.
    fn accels(&self) -> Vec<String> {
        self.programs.find(PROGRAM).map(|program| machine::accels(&program)).unwrap_or_default()
    }

    fn version(&self) -> Option<(u32, u32)> {
        let output = exec::answer(Command::new(self.programs.find(PROGRAM)?).arg("--version")).ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        surroundings::version(text.split_once("version ")?.1)
    }

    fn command(&self, memory: &Backing, incoming: Option<&Incoming>) -> Outcome<Command> {
        let program = self.programs.find(PROGRAM).ok_or("there is no QEMU: run scripts/setup guests")?;
        let mut command = self.programs.waiting(program);
        let (options, megabytes) = (&self.options, self.options.memory / MEGABYTE);
        command.args(["-name", self.name.as_str(), "-nodefaults", "-display", "none", "-no-user-config", "-daemonize"]);
        command.arg("-pidfile").arg(self.pidfile());
        let accel = incoming.map_or_else(|| self.accel(), |incoming| incoming.accel.clone());
        fs::write(self.run.join(ACCEL), &accel).map_err(|error| format!("cannot note what emulates it: {error}"))?;
        // A state fits the type of machine that it is of, which a newer QEMU knows by its name.
        let kind = incoming.map_or("q35", |incoming| incoming.machine.as_str());
        command.arg("-machine").arg(format!("{kind},accel={accel},memory-backend=memory"));
        // The same on every host, so that a state fits all of them.
        command.args(["-cpu", "qemu64", "-m", &format!("{megabytes}M"), "-smp", &options.cpus.to_string()]);
        let place = match memory {
            Backing::Shared(memory) => format!("mem-path={},share=on", memory.path().display()),
            Backing::Lazy(file, at) => {
                format!("mem-path={},offset={at},share=off,readonly=on,rom=off", file.display())
            }
        };
        command.arg("-object").arg(format!("memory-backend-file,id=memory,size={megabytes}M,{place}"));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.socket().display()));
        let console = self.run.join("console");
        command.arg("-chardev").arg(format!("file,id=console,path={},append=on", console.display()));
        command.args(["-serial", "chardev:console"]);
        for (option, path) in [("-kernel", &options.kernel), ("-initrd", &options.initrd)] {
            if let Some(path) = path {
                let found = self.at(path)?.ok_or_else(|| format!("there is no {} in its stack", path.display()))?;
                command.arg(option).arg(found);
            }
        }
        if let Some(append) = &options.append {
            command.arg("-append").arg(append);
        }
        if let Some(disk) = self.disk()? {
            let file =
                json!({ "driver": "file", "node-name": "file0", "filename": disk, "cache": { "direct": false } });
            let raw = json!({ "driver": "raw", "node-name": "disk0", "file": "file0" });
            command.args([BLOCKDEV, &file.to_string(), BLOCKDEV, &raw.to_string()]);
            command.args(["-device", "virtio-blk-pci,drive=disk0"]);
        }
        if let Some(tap) = self.tap() {
            let (name, hardware) = (tap.name(), Network::hardware_address(&self.name));
            command.args(["-netdev", &format!("tap,id=net0,ifname={name},script=no,downscript=no")]);
            command.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={hardware}")]);
        }
        if incoming.is_some() {
            command.args([INCOMING, "defer"]);
        }
        Ok(command)
    }

    /// Starts QEMU, which returns when its socket answers.
    fn launch(&self, memory: &Backing, incoming: Option<&Incoming>) -> Outcome<()> {
        if self.socket().as_os_str().len() > MAX_SOCKET_PATH {
            let path = self.socket();
            return Err(format!("{} is too long for a socket: use a store with a shorter path", path.display()));
        }
        if let Some(tap) = self.tap() {
            tap.make()?;
        }
        let _ = fs::remove_file(self.pidfile());
        let mut command = self.command(memory, incoming)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let note = Note { file: self.starting(), into: None, root: None };
        let failed = |error: &dyn std::fmt::Display| format!("{PROGRAM} cannot be run: {error}");
        let child = note.begin(&mut command, b"\n").map_err(|error| failed(&error))?;
        let output = exec::ended(child, WORK_PATIENCE).map_err(|error| format!("{PROGRAM}: {error}"))?;
        if !output.status.success() {
            return Err(format!("{PROGRAM} failed: {}", complaint(&output)));
        }
        failpoint::hit("guest.started");
        let pid = fs::read_to_string(self.pidfile()).ok().and_then(|text| text.trim().parse().ok());
        let process = pid.and_then(Process::of).ok_or("QEMU ended at once")?;
        process.save(&self.saved()).map_err(|error| error.to_string())?;
        let _ = fs::remove_file(self.starting());
        Ok(())
    }

    fn release(&self) -> Outcome<()> {
        self.tap().map_or(Ok(()), |tap| tap.release())
    }

    /// Has QEMU tell the neighbours where the machine is now. They learn it late if that fails, from its own packets.
    fn announce(&self, qmp: &mut Qmp) {
        let Some(tap) = self.tap() else { return };
        tap.announce();
        let times = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        if let Err(error) = qmp.call("announce-self", times) {
            tracing::debug!(guest = %self.name, %error, "the neighbours weren't told where a machine is");
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let failed = self.failed(action);
        if let Some(tap) = self.tap() {
            tap.shut_if_there().map_err(&failed)?;
        }
        let starting = Errand::load(&self.starting());
        if let Some(errand) = starting.as_ref().filter(|errand| errand.is_orphaned()) {
            errand.end().map_err(&failed)?;
        }
        let started = starting.as_ref().and_then(|errand| self.started_by(errand));
        for process in started.into_iter().chain(Process::load(&self.saved())) {
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("QEMU (process {}) does not end", process.pid)));
            }
        }
        for path in [self.starting(), self.saved(), self.socket()] {
            let _ = fs::remove_file(path);
        }
        self.tap().map_or(Ok(()), |tap| tap.remove().map_err(&failed))
    }

    /// What QEMU needs to know before a machine is saved or loaded by `capability`.
    fn prepare(qmp: &mut Qmp, capability: &str) -> Outcome<()> {
        let all = [MAPPED_RAM, IGNORE_SHARED];
        let wanted = all.map(|name| json!({ "capability": name, "state": name == capability }));
        qmp.call("migrate-set-capabilities", json!({ "capabilities": wanted }))
            .map_err(|error| format!("{error} (saving machines needs QEMU 9.0 or later)"))?;
        qmp.call("migrate-set-parameters", json!({ "max-bandwidth": NO_LIMIT })).map(|_| ())
    }

    /// Waits until memory is saved or loaded.
    fn wait_memory(qmp: &mut Qmp) -> Outcome<()> {
        let mut outcome = Ok(());
        let is_over = wait_until(MEMORY_PATIENCE, || match qmp.call("query-migrate", json!({})) {
            Ok(state) => match state["status"].as_str() {
                Some("completed") => true,
                Some("failed" | "cancelled") => {
                    outcome = Err(state["error-desc"].as_str().unwrap_or("QEMU does not say why").to_owned());
                    true
                }
                _ => false,
            },
            Err(error) => {
                outcome = Err(error);
                true
            }
        });
        if is_over { outcome } else { Err("QEMU does not come to an end with its memory".to_owned()) }
    }

    /// The memory of QEMU's process.
    fn held(&self) -> Outcome<Held> {
        let process = self.process().ok_or("it isn't running")?;
        Held::by(process.pid, self.options.memory).map_err(|error| format!("its memory cannot be read: {error}"))
    }

    fn copy(&self, held: &Held, into: &Path) -> Outcome<()> {
        held.copy(self.options.memory, into).map_err(|error| format!("its memory cannot be copied: {error}"))
    }

    fn save(&self, into: &Path) -> Outcome<()> {
        let (mut qmp, held) = (self.qmp()?, self.held()?);
        qmp.call("stop", json!({}))?;
        fs::write(into.join(ACCEL), self.accel()).map_err(|error| format!("cannot write its state: {error}"))?;
        let (file, capability) =
            if held.is_shared() { (DEVICES_FILE, IGNORE_SHARED) } else { (MEMORY_FILE, MAPPED_RAM) };
        Self::prepare(&mut qmp, capability)?;
        qmp.call("migrate", json!({ "uri": format!("file:{}", into.join(file).display()) }))?;
        Self::wait_memory(&mut qmp)?;
        // Saving the devices may still have changed it.
        if held.is_shared() { self.copy(&held, into) } else { Ok(()) }
    }

    /// What is in a state's folder, and where its memory is to lie; `ahead` has it already.
    fn incoming(&self, from: &Path, manner: Manner, ahead: Option<File>) -> Outcome<(Backing, Incoming)> {
        let unread = |error: std::io::Error| format!("its state cannot be read: {error}");
        let accel = fs::read_to_string(from.join(ACCEL)).unwrap_or_else(|_| self.accel());
        if !self.accels().contains(&accel) {
            return Err(format!("it ran by {accel:?}, which this host does not have"));
        }
        let (path, devices) = (from.join(MEMORY_FILE), from.join(DEVICES_FILE));
        let (file, expected) = (File::open(&path).map_err(unread)?, self.options.memory);
        let check = |bytes: u64| match bytes == expected {
            true => Ok(()),
            false => Err(format!("its state has {bytes} bytes of memory, not {expected}")),
        };
        if devices.exists() {
            check(file.metadata().map_err(unread)?.len())?;
            let machine = mapped_ram::machine_of(&File::open(&devices).map_err(unread)?)?;
            let memory = match (manner, ahead) {
                (Manner::Lazily, _) => Backing::Lazy(path, 0),
                (Manner::Whole, Some(ahead)) => Backing::Shared(Memory::of(ahead, expected).map_err(unread)?),
                (Manner::Whole, None) => Backing::Shared(Memory::read(&file, expected).map_err(unread)?),
            };
            return Ok((memory, Incoming { file: devices, capability: IGNORE_SHARED, machine, accel }));
        }
        let layout = Layout::read(&file)?;
        check(layout.bytes)?;
        let incoming = |file| Incoming { file, capability: MAPPED_RAM, machine: layout.machine.clone(), accel };
        if manner == Manner::Whole {
            return Ok((Backing::Shared(Memory::new(expected).map_err(unread)?), incoming(path)));
        }
        // The memory is mapped where it lies; QEMU loads the rest.
        let rest = self.rest();
        layout.write_rest(&file, &rest).map_err(|error| format!("the devices' states cannot be read: {error}"))?;
        Ok((Backing::Lazy(path, layout.pages), incoming(rest)))
    }

    /// Where the devices of a state lie that has them in one file with the memory.
    fn rest(&self) -> PathBuf {
        self.run.join("devices.raw")
    }

    fn load(&self, from: &Path, manner: Manner, ahead: Option<File>) -> Outcome<()> {
        let (memory, incoming) = self.incoming(from, manner, ahead)?;
        self.launch(&memory, Some(&incoming))?;
        let mut qmp = self.qmp()?;
        Self::prepare(&mut qmp, incoming.capability)?;
        qmp.call("migrate-incoming", json!({ "uri": format!("file:{}", incoming.file.display()) }))?;
        Self::wait_memory(&mut qmp)?;
        // Before it goes on, so that the first packet that it sends arrives.
        self.release()?;
        qmp.call("cont", json!({}))?;
        self.announce(&mut qmp);
        let _ = fs::remove_file(self.rest());
        Ok(())
    }

    fn restored(&self, from: &Path, manner: Manner, ahead: Option<File>) -> Result<()> {
        let failed = self.failed("restore");
        self.must_be_absent("restore")?;
        let loaded = self.load(from, manner, ahead);
        if loaded.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        loaded.map_err(&failed)
    }
}

impl Guest for QemuGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let mut found = Vec::new();
        if self.programs.find(PROGRAM).is_none() {
            let fix = "run scripts/setup guests, or apt-get install qemu-system-x86 (9.0 or later)";
            found.push(Obstacle::new("there is no QEMU for x86-64 machines", fix));
        }
        if self.options.accel == "kvm" && !self.accels().contains(&self.options.accel) {
            let fix = "turn virtualization on in the machine's firmware, or make the guest with --accel auto";
            found.push(Obstacle::new("KVM does not work here", fix));
        }
        if side == Side::PostCopy && self.version().is_some_and(|version| version < MAPS_FILES) {
            let fix = "install QEMU 8.2 or later, or move without --postcopy";
            found.push(Obstacle::new("this QEMU can't run on a state's file", fix));
        }
        if let Some(tap) = self.tap() {
            found.extend(preflight::missing(&self.programs, "ip", "iproute2"));
            found.extend(preflight::network(&self.programs, tap.bridge(), tap.has_bridge()));
        }

        Ok(found)
    }

    fn boots_from(&self) -> Option<&Path> {
        // Without a kernel the firmware starts what is on its disk, or in its network.
        let MachineOptions { kernel, network, .. } = &self.options;
        (kernel.is_none() && *network == Network::None).then(|| self.disk_path())
    }

    fn surroundings(&self) -> Result<Surroundings> {
        let here = if self.process().is_some() { vec![self.accel()] } else { self.accels() };
        Ok(Surroundings {
            arch: Some(std::env::consts::ARCH.to_owned()),
            accels: self.options.accels_of(here),
            emulator: self.version(),
            memory: self.process().as_ref().map(Process::own_bytes).or_else(super::memory::obtainable),
            ..Surroundings::default()
        })
    }

    fn start(&self) -> Result<()> {
        let failed = self.failed("start");
        self.must_be_absent("start")?;
        if let Some(path) = self.boots_from()
            && self.disk().map_err(&failed)?.is_none()
        {
            return Err(failed(format!("it has nothing to start from: there is no {}", path.display())));
        }
        let memory = Memory::new(self.options.memory).map_err(|error| format!("there is no memory for it: {error}"));
        let started = memory.and_then(|memory| self.launch(&Backing::Shared(memory), None));
        let started = started.and_then(|()| self.release());
        if started.is_err() {
            // The failure is what counts.
            let _ = self.end("start");
        }
        started.map_err(&failed)
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, _: &[OsString], _: Pipes, _: &dyn Monitor) -> Result<i32> {
        Err(self.failed("run a command in")("a machine has no way in for that: use ssh".to_owned()))
    }

    fn status(&self) -> Result<Status> {
        self.settle()?;
        let Some(process) = self.process() else {
            return Ok(Status { activity: Activity::Absent, pid: None, memory_bytes: None });
        };
        let state = self.state().map_err(self.failed("look at"))?;
        let activity = if state["running"] == true { Activity::Running } else { Activity::Frozen };
        Ok(Status { activity, pid: Some(process.pid), memory_bytes: status_bytes(process.pid, "VmRSS") })
    }

    fn has_run(&self) -> Result<bool> {
        let state = self.state().map_err(self.failed("look at"))?;
        Ok(state["status"].as_str().is_some_and(|status| STOPPED_BY_ITSELF.contains(&status)))
    }

    fn has_memory_file(&self) -> bool {
        self.held().is_ok_and(|held| held.is_shared())
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let failed = self.failed("scan");
        self.held().and_then(|held| self.copy(&held, into)).map_err(&failed)?;
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen: Duration::ZERO, has_ended: false })
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let failed = self.failed("dump");
        if self.status()?.activity != Activity::Running {
            return Err(failed("it isn't running".to_owned()));
        }
        if let Some(tap) = self.tap() {
            tap.hold().map_err(&failed)?;
        }
        let began = Instant::now();
        if let Err(error) = self.save(into) {
            self.resume()?;
            return Err(failed(error));
        }
        let frozen = began.elapsed();
        if let Some(tap) = self.tap() {
            tap.shut().map_err(&failed)?;
        }
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen, has_ended: false })
    }

    fn has_its_root(&self) -> bool {
        self.process().is_none_or(|process| self.has_its_disk(&process))
    }

    fn resume(&self) -> Result<()> {
        let failed = self.failed("resume");
        if self.process().is_none() {
            return Err(failed("there is nothing left of it".to_owned()));
        }
        self.release().map_err(&failed)?;
        let mut qmp = self.qmp().map_err(&failed)?;
        // It would say that it goes on, and wait for ever for what no daemon sends it any more.
        if qmp.call("query-status", json!({})).map_err(&failed)?["status"] == "inmigrate" {
            return Err(failed("its memory hasn't come".to_owned()));
        }
        qmp.call("cont", json!({})).map_err(&failed)?;
        self.announce(&mut qmp);
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        if let Some(tap) = self.tap() {
            tap.send_kept();
        }
        self.end("discard")
    }

    fn restore(&self, from: &Path, manner: Manner) -> Result<()> {
        self.restored(from, manner, None)
    }

    fn restore_with(&self, from: &Path, memory: File) -> Result<()> {
        self.restored(from, Manner::Whole, Some(memory))
    }
}

/// Whether it was called with `word`.
fn has_word(process: &Process, word: &[u8]) -> bool {
    let words = fs::read(format!("/proc/{}/cmdline", process.pid));
    words.is_ok_and(|words| words.split(|byte| *byte == 0).any(|other| other == word))
}

#[cfg(test)]
mod tests {
    use std::process::Child;

    use layerfs::store::{Store, StoreOptions};

    use super::*;
    use crate::guest::GuestSpec;
    use crate::guest::fake::{FakeHost, World};

    /// A program that waits, with `words` among its own.
    fn waits(words: &[&Path]) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r line; exit", "sh"]).args(words).stdin(Stdio::piped());
        command.spawn().unwrap()
    }

    fn guest_in(folder: &Path) -> QemuGuest {
        let store = Store::open(&folder.join("store"), StoreOptions::create()).unwrap();
        let host = FakeHost::new("a", store, folder, &World::new());
        let spec = GuestSpec {
            name: GuestName::new("vm").unwrap(),
            driver: "qemu".to_owned(),
            stack: layerfs::LayerName::new("app").unwrap(),
            options: json!({ "memory": 16 * MEGABYTE }),
        };
        let programs = Arc::new(Programs::new(folder.into(), "layerctl".into(), None));
        QemuGuest::new(&GuestRecord::new(spec), &*host, programs).unwrap()
    }

    #[test]
    fn a_machine_whose_disk_is_not_the_mounted_one_has_not_its_root() {
        let folder = tempfile::tempdir().unwrap();
        let guest = guest_in(folder.path());
        fs::create_dir_all(&guest.root).unwrap();
        let disk = guest.root.join(DISK_NAME);
        fs::write(&disk, "").unwrap();
        let has_its_root = |word: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", "read -r line; exit", "sh", word]);
            command.stdin(Stdio::piped()).stdout(File::open(&disk).unwrap());
            let mut runs = command.spawn().unwrap();
            let process = Process::of(runs.id()).unwrap();
            process.save(&guest.saved()).unwrap();
            // It is there a moment before its words are.
            assert!(wait_until(PATIENCE, || has_word(&process, word.as_bytes())));
            let before = guest.has_its_root();
            fs::rename(&disk, folder.path().join("disk")).unwrap();
            let without = guest.has_its_root();
            fs::write(&disk, "another").unwrap();
            let with_another = guest.has_its_root();
            runs.kill().unwrap();
            runs.wait().unwrap();
            (before, without, with_another)
        };
        assert_eq!(has_its_root(BLOCKDEV), (true, false, false));
        assert_eq!(has_its_root("-nodefaults"), (true, true, true));
    }

    #[test]
    fn a_machine_does_not_start_without_the_disk_that_it_boots() {
        let folder = tempfile::tempdir().unwrap();
        let mut guest = guest_in(folder.path());
        fs::create_dir_all(&guest.root).unwrap();
        assert_eq!(guest.boots_from(), Some(Path::new(DISK_NAME)));
        let refused = |guest: &QemuGuest| guest.start().unwrap_err().to_string();
        assert!(refused(&guest).contains("there is no disk.raw"), "{}", refused(&guest));
        // Whether its disk came with its stack or was written since; this one's QEMU can't be run then.
        fs::write(guest.root.join(DISK_NAME), "").unwrap();
        guest.options.accel = "none".to_owned();
        assert!(!refused(&guest).contains("nothing to start from"), "{}", refused(&guest));
        guest.options.disk = Some("other.raw".into());
        assert!(refused(&guest).contains("there is no other.raw"), "{}", refused(&guest));
        // Others have something else to start from.
        guest.options.kernel = Some("vmlinuz".into());
        assert_eq!(guest.boots_from(), None);
        guest.options.kernel = None;
        guest.options.network = Network::parse("bridge:br0,10.0.0.2/24").unwrap();
        assert_eq!(guest.boots_from(), None);
    }

    #[test]
    fn what_a_dead_daemon_has_started_is_taken_over_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let guest = guest_in(folder.path());
        let (pidfile, incoming) = (guest.pidfile(), Path::new(INCOMING));
        // What is to go on from a state has nothing in it yet.
        let cases: [(&[&Path], bool, bool); 3] =
            [(&[&pidfile], true, true), (&[&pidfile, incoming], false, true), (&[folder.path()], false, false)];
        for (words, is_taken, is_its) in cases {
            let note = Note { file: guest.starting(), into: None, root: None };
            let mut wait = Command::new("sh");
            let mut starts = note.begin(wait.args(["-c", "read -r line && exec sleep 0.3"]), b"\n").unwrap();
            let mut started = waits(words);
            fs::write(guest.pidfile(), started.id().to_string()).unwrap();
            // As long as whoever began it lives it isn't anybody else's.
            guest.settle().unwrap();
            assert!(guest.process().is_none());
            errand::orphan(&note.file);
            assert_eq!(guest.must_be_absent("start").is_err(), is_taken);
            assert!(starts.try_wait().unwrap().is_some(), "it wasn't waited for");
            assert_eq!(guest.process().map(|process| process.pid), is_taken.then_some(started.id()));
            guest.stop().unwrap();
            assert_eq!(started.try_wait().unwrap().is_some(), is_its);
            started.kill().unwrap();
            started.wait().unwrap();
        }
    }
}
