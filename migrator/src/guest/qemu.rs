//! The driver "qemu": a machine by QEMU, its disk a file on the mounted stack.
//!
//! Memory is saved in place ("mapped-ram"): each page has its place in the file, whatever else is in it, so the same memory is cut
//! into the same pieces of 64 KiB in every state, and in a scan of the memory that QEMU shares with whoever looks. A dumped
//! machine stands still in its QEMU and goes on there if it is resumed.
//!
//! In the run folder: `qmp` (QEMU's control socket), `process.json`, `console` (what the machine writes on its serial line).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::import::DISK_NAME;
use serde_json::json;

use super::machine::{self, AUTO, MachineOptions};
use super::mapped_ram::{self, Layout};
use super::network::Tap;
use super::options::Network;
use super::processes::{Process, status_bytes, wait_until};
use super::programs::{Programs, run};
use super::qmp::Qmp;
use super::state::{self, MEMORY_FILE};
use super::{
    Activity, ExecOutput, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Side, Status, Surroundings, Written,
    preflight, surroundings,
};
use crate::error::{Error, Result};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
/// How long saving or loading memory may take.
const MEMORY_PATIENCE: Duration = Duration::from_secs(3600);
/// More than any memory or disk can be read.
const NO_LIMIT: u64 = 1 << 40;
/// So much of the memory is copied at a time, in bytes.
const PIECE: usize = 1 << 20;
/// A state's chunk, in bytes.
const SMALL_PIECE: usize = 64 << 10;
const MEGABYTE: u64 = 1 << 20;
/// Where it stands what emulates a machine, or did.
const ACCEL: &str = "accel";
/// From this version on QEMU maps a file that it can't write.
const MAPS_FILES: (u32, u32) = (8, 2);
/// A socket's path can't be longer.
const MAX_SOCKET_PATH: usize = 107;

type Outcome<T> = std::result::Result<T, String>;

/// A state that is about to be loaded.
struct Incoming {
    file: PathBuf,
    layout: Layout,
    /// What emulated it, which is part of what was saved.
    accel: String,
    /// Whether the memory stays in the file until it is touched.
    is_lazy: bool,
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

    fn qmp(&self) -> Outcome<Qmp> {
        Qmp::connect(&self.socket())
    }

    fn tap(&self) -> Option<Tap<'_>> {
        Tap::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    /// A path in the stack, as the host has it.
    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn disk(&self) -> Option<PathBuf> {
        let disk = self.at(self.options.disk.as_deref().unwrap_or(Path::new(DISK_NAME)));
        disk.exists().then_some(disk)
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
        let output = Command::new(self.programs.find(PROGRAM)?).arg("--version").stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        surroundings::version(text.split_once("version ")?.1)
    }

    fn command(&self, incoming: Option<&Incoming>) -> Outcome<Command> {
        let program = self.programs.find(PROGRAM).ok_or("there is no QEMU: run scripts/setup guests")?;
        let mut command = self.programs.command(program);
        let options = &self.options;
        let memory = options.memory / MEGABYTE;
        command.args(["-name", self.name.as_str(), "-nodefaults", "-display", "none", "-no-user-config", "-daemonize"]);
        command.arg("-pidfile").arg(self.run.join("pid"));
        let accel = incoming.map_or_else(|| self.accel(), |incoming| incoming.accel.clone());
        fs::write(self.run.join(ACCEL), &accel).map_err(|error| format!("cannot note what emulates it: {error}"))?;
        // A state fits the type of machine that it is of, which a newer QEMU knows by its name.
        let kind = incoming.map_or("q35", |incoming| incoming.layout.machine.as_str());
        command.arg("-machine").arg(format!("{kind},accel={accel},memory-backend=memory"));
        // The same on every host, so that a state fits all of them.
        command.args(["-cpu", "qemu64", "-m", &format!("{memory}M"), "-smp", &options.cpus.to_string()]);
        command.arg("-object").arg(match incoming.filter(|incoming| incoming.is_lazy) {
            None => format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
            Some(Incoming { file, layout, .. }) => format!(
                "memory-backend-file,id=memory,size={memory}M,mem-path={},offset={},share=off,readonly=on,rom=off",
                file.display(),
                layout.pages
            ),
        });
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.socket().display()));
        let console = self.run.join("console");
        command.arg("-chardev").arg(format!("file,id=console,path={},append=on", console.display()));
        command.args(["-serial", "chardev:console"]);
        for (option, path) in [("-kernel", &options.kernel), ("-initrd", &options.initrd)] {
            if let Some(path) = path {
                command.arg(option).arg(self.at(path));
            }
        }
        if let Some(append) = &options.append {
            command.arg("-append").arg(append);
        }
        if let Some(disk) = self.disk() {
            let file =
                json!({ "driver": "file", "node-name": "file0", "filename": disk, "cache": { "direct": false } });
            let raw = json!({ "driver": "raw", "node-name": "disk0", "file": "file0" });
            command.args(["-blockdev", &file.to_string(), "-blockdev", &raw.to_string()]);
            command.args(["-device", "virtio-blk-pci,drive=disk0"]);
        }
        if let Some(tap) = self.tap() {
            let (name, hardware) = (tap.name(), Network::hardware_address(&self.name));
            command.args(["-netdev", &format!("tap,id=net0,ifname={name},script=no,downscript=no")]);
            command.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={hardware}")]);
        }
        if incoming.is_some() {
            command.args(["-incoming", "defer"]);
        }
        Ok(command)
    }

    /// Starts QEMU, which returns when its socket answers.
    fn launch(&self, incoming: Option<&Incoming>) -> Outcome<()> {
        if self.socket().as_os_str().len() > MAX_SOCKET_PATH {
            let path = self.socket();
            return Err(format!("{} is too long for a socket: use a store with a shorter path", path.display()));
        }
        if let Some(tap) = self.tap() {
            tap.make()?;
        }
        let pidfile = self.run.join("pid");
        let _ = fs::remove_file(&pidfile);
        run(self.command(incoming)?.stdout(Stdio::piped()))?;
        let pid = fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
        let process = pid.and_then(Process::of).ok_or("QEMU ended at once")?;
        process.save(&self.saved()).map_err(|error| error.to_string())
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
            tap.hold_if_there().map_err(&failed)?;
        }
        if let Some(process) = Process::load(&self.saved()) {
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("QEMU (process {}) does not end", process.pid)));
            }
            let _ = fs::remove_file(self.saved());
        }
        let _ = fs::remove_file(self.socket());
        self.tap().map_or(Ok(()), |tap| tap.remove().map_err(&failed))
    }

    /// What QEMU needs to know before memory is saved or loaded.
    fn prepare_memory(qmp: &mut Qmp) -> Outcome<()> {
        let capability = json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
        qmp.call("migrate-set-capabilities", capability)
            .map_err(|error| format!("{error} (saving memory in place needs QEMU 9.0 or later)"))?;
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

    fn save(&self, into: &Path) -> Outcome<()> {
        let mut qmp = self.qmp()?;
        qmp.call("stop", json!({}))?;
        Self::prepare_memory(&mut qmp)?;
        fs::write(into.join(ACCEL), self.accel()).map_err(|error| format!("cannot write its state: {error}"))?;
        let file = into.join(MEMORY_FILE);
        qmp.call("migrate", json!({ "uri": format!("file:{}", file.display()) }))?;
        Self::wait_memory(&mut qmp)
    }

    fn load(&self, from: &Path, manner: Manner) -> Outcome<()> {
        let mut file = from.join(MEMORY_FILE);
        let opened = File::open(&file).map_err(|error| format!("its state cannot be read: {error}"))?;
        let layout = Layout::read(&opened)?;
        if layout.bytes != self.options.memory {
            return Err(format!("its state has {} bytes of memory, not {}", layout.bytes, self.options.memory));
        }
        let accel = fs::read_to_string(from.join(ACCEL)).unwrap_or_else(|_| self.accel());
        if !self.accels().contains(&accel) {
            return Err(format!("it ran by {accel:?}, which this host does not have"));
        }
        let incoming = Incoming { file: file.clone(), layout, accel, is_lazy: manner == Manner::Lazily };
        if incoming.is_lazy {
            // The memory is mapped where it lies; QEMU loads the rest.
            file = self.run.join("devices.raw");
            let written = incoming.layout.write_rest(&opened, &file);
            written.map_err(|error| format!("the devices' states cannot be read: {error}"))?;
        }
        self.launch(Some(&incoming))?;
        let mut qmp = self.qmp()?;
        Self::prepare_memory(&mut qmp)?;
        qmp.call("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }))?;
        Self::wait_memory(&mut qmp)?;
        // Before it goes on, so that the first packet that it sends arrives.
        self.release()?;
        qmp.call("cont", json!({}))?;
        self.announce(&mut qmp);
        let _ = fs::remove_file(self.run.join("devices.raw"));
        Ok(())
    }

    /// Copies the memory that QEMU shares, without what it never used.
    fn copy_memory(&self, pid: u32, into: &Path) -> Outcome<()> {
        let failed = |error: io::Error| format!("its memory cannot be copied: {error}");
        let mut links = fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)?.flatten().map(|entry| entry.path());
        let is_memory = |path: &PathBuf| {
            fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
        };
        let Some(link) = links.find(is_memory) else { return self.copy_private(pid, into) };
        let (memory, copy) = (File::open(link).map_err(failed)?, File::create(into.join(MEMORY_FILE)).map_err(failed)?);
        let bytes = memory.metadata().map_err(failed)?.len();
        let base = mapped_ram::pages_of(bytes);
        copy.set_len(base + bytes).map_err(failed)?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < bytes {
            let begin = match rustix::fs::seek(&memory, rustix::fs::SeekFrom::Data(at)) {
                Ok(begin) => begin,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(failed(error.into())),
            };
            let end =
                rustix::fs::seek(&memory, rustix::fs::SeekFrom::Hole(begin)).map_err(|error| failed(error.into()))?;
            at = begin;
            while at < end {
                let piece = &mut buffer[..(end - at).min(PIECE as u64) as usize];
                memory.read_exact_at(piece, at).map_err(failed)?;
                copy.write_all_at(piece, base + at).map_err(failed)?;
                at += piece.len() as u64;
            }
        }
        Ok(())
    }

    /// Copies memory that lies on a state's file, of one that came by post-copy.
    fn copy_private(&self, pid: u32, into: &Path) -> Outcome<()> {
        let failed = |error: io::Error| format!("its memory cannot be copied: {error}");
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed)?;
        let start = maps.lines().find_map(|line| {
            let (range, _) = line.split_once(' ').filter(|_| line.ends_with(MEMORY_FILE))?;
            let (start, end) = range.split_once('-')?;
            let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
            (end - start == self.options.memory).then_some(start)
        });
        let start = start.ok_or("its memory cannot be found: start it again")?;
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed)?;
        let copy = File::create(into.join(MEMORY_FILE)).map_err(failed)?;
        let base = mapped_ram::pages_of(self.options.memory);
        copy.set_len(base + self.options.memory).map_err(failed)?;
        let mut buffer = vec![0; SMALL_PIECE];
        for at in (0..self.options.memory).step_by(SMALL_PIECE) {
            memory.read_exact_at(&mut buffer, start + at).map_err(failed)?;
            if buffer.iter().any(|byte| *byte != 0) {
                copy.write_all_at(&buffer, base + at).map_err(failed)?;
            }
        }
        Ok(())
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

    fn surroundings(&self) -> Result<Surroundings> {
        let here = if self.process().is_some() { vec![self.accel()] } else { self.accels() };
        Ok(Surroundings {
            arch: Some(std::env::consts::ARCH.to_owned()),
            accels: self.options.accels_of(here),
            emulator: self.version(),
            ..Surroundings::default()
        })
    }

    fn start(&self) -> Result<()> {
        let failed = self.failed("start");
        if self.process().is_some() {
            return Err(failed("it runs already".to_owned()));
        }
        let started = self.launch(None).and_then(|()| self.release());
        if started.is_err() {
            // The failure is what counts.
            let _ = self.end("start");
        }
        started.map_err(&failed)
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, _: &[OsString]) -> Result<ExecOutput> {
        Err(self.failed("run a command in")("a machine has no way in for that: use ssh".to_owned()))
    }

    fn status(&self) -> Result<Status> {
        let Some(process) = self.process() else {
            return Ok(Status { activity: Activity::Absent, pid: None, memory_bytes: None });
        };
        let state = self.qmp().and_then(|mut qmp| qmp.call("query-status", json!({})));
        let state = state.map_err(self.failed("look at"))?;
        let activity = if state["running"] == true { Activity::Running } else { Activity::Frozen };
        Ok(Status { activity, pid: Some(process.pid), memory_bytes: status_bytes(process.pid, "VmRSS") })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let failed = self.failed("scan");
        let process = self.process().ok_or_else(|| failed("it isn't running".to_owned()))?;
        self.copy_memory(process.pid, into).map_err(&failed)?;
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
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen: began.elapsed(), has_ended: false })
    }

    fn resume(&self) -> Result<()> {
        let failed = self.failed("resume");
        if self.process().is_none() {
            return Err(failed("there is nothing left of it".to_owned()));
        }
        self.release().map_err(&failed)?;
        let mut qmp = self.qmp().map_err(&failed)?;
        qmp.call("cont", json!({})).map_err(&failed)?;
        self.announce(&mut qmp);
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        self.end("discard")
    }

    fn restore(&self, from: &Path, manner: Manner) -> Result<()> {
        let failed = self.failed("restore");
        if self.process().is_some() {
            return Err(failed("it runs already".to_owned()));
        }
        let loaded = self.load(from, manner);
        if loaded.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        loaded.map_err(&failed)
    }
}
