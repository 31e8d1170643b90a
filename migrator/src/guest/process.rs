//! The driver "process": a process tree in namespaces of its own on the mounted stack, dumped and restored by CRIU directly.
//!
//! What it keeps is in the run folder: the first process (`process.json`), what [`Criu`] has there, and `commands`, which is locked by
//! whatever runs a command in the guest. Invariants: it is known there, or by [`Criu::restoring`], from before it does anything; whoever
//! comes after a daemon that died finds the one that there is. While it is dumped no command of [`Guest::exec`] runs in it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use layerfs::failpoint;
use layerfs::monitor::Monitor;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::container::{PATIENCE, Site, memory_bytes};
use super::criu::Criu;
use super::errand::{self, Errand};
use super::launch::{Orders, Start};
use super::processes::{Process, wait_until};
use super::programs::Programs;
use super::{
    Activity, Guest, GuestRecord, Host, Manner, Obstacle, Pipes, Side, Status, Surroundings, Written, exec, lazy_pages,
    scan, state,
};
use crate::error::{Error, Result};

/// How long a dump waits for commands that run in it, and a command for a dump.
const COMMAND_PATIENCE: Duration = Duration::from_secs(3);
const BUSY: &str = "a command of `guest exec` runs in it, which would go on while it stands still: wait for it, or end it by Ctrl-C \
                    where it was begun; `layerctl daemon status` shows it";

/// A guest of this driver.
pub struct ProcessGuest {
    site: Site,
}

impl ProcessGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: Arc<dyn Host>, programs: Arc<Programs>) -> Result<ProcessGuest> {
        Ok(ProcessGuest { site: Site::new(record, host, programs)? })
    }

    fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        self.site.failed(action)
    }

    fn saved(&self) -> PathBuf {
        self.site.run.join("process.json")
    }

    fn first(&self) -> Option<Process> {
        Process::load(&self.saved()).filter(Process::is_alive)
    }

    /// Finds out what came of a start or a restore whose beginner has died meanwhile.
    fn settle(&self) -> Result<()> {
        let failed = self.failed("look at");
        let note = self.criu().restoring();
        let Some(errand) = Errand::orphaned(&note) else { return Ok(()) };
        errand.wait().map_err(&failed)?;
        let _held = errand::settling();
        if Errand::load(&note).as_ref() != Some(&errand) {
            return Ok(());
        }
        match self.made_by(&errand) {
            Some(process) if self.is_at_home(&process) => {
                process.save(&self.saved())?;
                self.site.release().map_err(&failed)?;
            }
            // Its root has gone with the daemon that mounted it.
            Some(process) => self.kill("look at", &process)?,
            None => {}
        }
        let _ = std::fs::remove_file(note);
        Ok(())
    }

    /// The first process that `errand` has made, if that is there: what has neither its root nor its network is somebody else's, which
    /// has got its number since.
    fn made_by(&self, errand: &Errand) -> Option<Process> {
        let is_it = |process: &Process| {
            let network = self.site.link().and_then(|link| place(&link.namespace()));
            let is_in_it =
                || network.is_some() && network == place(Path::new(&format!("/proc/{}/ns/net", process.pid)));
            errand.has_root(process) || self.is_at_home(process) || is_in_it()
        };
        self.criu().restored(errand).filter(is_it)
    }

    /// Whether its root is what is mounted here for it.
    fn is_at_home(&self, process: &Process) -> bool {
        let root = place(Path::new(&format!("/proc/{}/root", process.pid)));
        root.is_some() && root == place(&self.site.root)
    }

    fn kill(&self, action: &'static str, process: &Process) -> Result<()> {
        // The kernel ends the rest of its namespace with it.
        process.kill();
        match process.wait_gone(PATIENCE) {
            true => Ok(()),
            false => Err(self.failed(action)(format!("process {} does not end", process.pid))),
        }
    }

    fn running(&self, action: &'static str) -> Result<Process> {
        self.settle()?;
        match self.first() {
            Some(process) if !self.criu().is_held() => Ok(process),
            Some(_) => Err(self.failed(action)("it stands still after a dump".to_owned())),
            None => Err(self.failed(action)("it isn't running".to_owned())),
        }
    }

    /// The lock that commands share and a dump has alone: a command isn't of the tree that CRIU freezes, and would go on changing files
    /// that have been sealed. Nothing that is started gets it, so it ends with this process at the latest; what a command leaves running
    /// is of the tree. None if it isn't to be had.
    fn lock_commands(&self, how: FlockOperation) -> io::Result<Option<File>> {
        let path = self.site.run.join("commands");
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let mut taken = Ok(());
        wait_until(COMMAND_PATIENCE, || {
            taken = flock(&file, how);
            !matches!(taken, Err(Errno::WOULDBLOCK | Errno::INTR))
        });
        match taken {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn criu(&self) -> Criu<'_> {
        let network = self.site.link().map(|link| link.namespace());
        Criu { programs: &self.site.programs, run: &self.site.run, root: &self.site.root, network }
    }

    fn keep(&self, action: &'static str, pid: u32) -> Result<()> {
        let gone = || self.failed(action)("it ended at once; see its log, if it has one".to_owned());
        let process = Process::of(pid).ok_or_else(gone)?;
        let saved = process.save(&self.saved());
        if saved.is_err() {
            // Nothing else knows it.
            self.kill(action, &process)?;
        }
        Ok(saved?)
    }

    /// Keeps in mind what has `come` to life, and connects it. If that fails nothing is left.
    fn come_up(&self, action: &'static str, come: Result<u32>) -> Result<()> {
        let kept = come.and_then(|pid| self.keep(action, pid));
        let linked = kept.and_then(|()| self.site.release().map_err(self.failed(action)));
        match &linked {
            Ok(()) => drop(std::fs::remove_file(self.criu().restoring())),
            // The failure is what counts.
            Err(_) => drop(self.end(action)),
        }
        linked
    }

    fn must_be_absent(&self, action: &'static str) -> Result<()> {
        self.settle()?;
        match self.first() {
            Some(_) => Err(self.failed(action)("it runs already".to_owned())),
            None => Ok(()),
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let note = self.criu().restoring();
        if let Some(errand) = Errand::load(&note) {
            if errand.is_orphaned() {
                errand.end().map_err(self.failed(action))?;
            }
            if let Some(process) = self.made_by(&errand) {
                self.kill(action, &process)?;
            }
            let _ = std::fs::remove_file(note);
        }
        if let Some(process) = Process::load(&self.saved()) {
            self.kill(action, &process)?;
            let _ = std::fs::remove_file(self.saved());
        }
        lazy_pages::stop(&self.site.run);
        self.site.disconnect().map_err(self.failed(action))
    }
}

/// What tells a file from all others.
pub(super) fn place(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).map(|there| (there.dev(), there.ino())).ok()
}

impl Guest for ProcessGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        Ok(self.site.preflight(side, self.first().as_ref()))
    }

    fn surroundings(&self) -> Result<Surroundings> {
        Ok(self.site.surroundings(self.first().as_ref()))
    }

    fn start(&self) -> Result<()> {
        self.must_be_absent("start")?;
        // What is said of an earlier one's memory isn't said of this.
        lazy_pages::stop(&self.site.run);
        let failed = self.failed("start");
        self.site.connect().map_err(&failed)?;
        let start = Start {
            root: self.site.root.clone(),
            command: self.site.options.command.clone(),
            env: self.site.options.environment(),
            folder: self.site.options.folder.clone(),
            hostname: self.site.hostname(),
            log: self.site.options.log.clone(),
            network: self.site.link().map(|link| link.namespace()),
            pidfile: self.criu().pidfile(),
        };
        let started = self.site.programs.obey(&Orders::Start(start), &self.criu().note());
        let started = started
            .and_then(|said| said.trim().parse::<u32>().map_err(|_| format!("its launcher said {:?}", said.trim())));
        failpoint::hit("guest.started");
        self.come_up("start", started.map_err(&failed))
    }

    fn stop(&self) -> Result<()> {
        let criu = self.criu();
        if criu.is_held() {
            criu.discard().map_err(self.failed("stop"))?;
        }
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString], pipes: Pipes, monitor: &dyn Monitor) -> Result<i32> {
        let failed = self.failed("run a command in");
        let locked = self.lock_commands(FlockOperation::NonBlockingLockShared);
        let locked = locked.map_err(|error| failed(format!("it cannot be kept from being dumped: {error}")))?;
        let _shared = locked.ok_or_else(|| failed("it is being dumped; try again later".to_owned()))?;
        let process = self.running("run a command in")?;
        let enter = self
            .site
            .programs
            .find("nsenter")
            .ok_or_else(|| failed("there is no nsenter: install util-linux".into()))?;
        let mut command = Command::new(enter);
        command.args(["--target", &process.pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]);
        command.arg(format!("--wd=/proc/{}/root", process.pid)).arg("--").args(argv);
        command.env_clear().envs(self.site.options.environment());
        let code = exec::run(&mut command, pipes, monitor);
        let code = code.map_err(|error| failed(format!("nsenter cannot be run: {error}")))?;
        Ok(code.ok_or(layerfs::Error::Cancelled)?)
    }

    fn status(&self) -> Result<Status> {
        self.settle()?;
        let Some(process) = self.first() else {
            return Ok(Status { activity: Activity::Absent, pid: None, memory_bytes: None });
        };
        let activity = if self.criu().is_held() { Activity::Frozen } else { Activity::Running };
        Ok(Status { activity, pid: Some(process.pid), memory_bytes: Some(memory_bytes(&process)) })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let process = self.running("scan")?;
        scan::tree(&process, into).map_err(self.failed("scan"))
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let process = self.running("dump")?;
        let failed = self.failed("dump");
        lazy_pages::wait(&self.site.run).map_err(&failed)?;
        let locked = self.lock_commands(FlockOperation::NonBlockingLockExclusive);
        let locked = locked.map_err(|error| failed(format!("commands cannot be kept from it: {error}")))?;
        let _alone = locked.ok_or_else(|| failed(BUSY.to_owned()))?;
        self.site.hold().map_err(&failed)?;
        let began = match self.criu().dump(process.pid, into) {
            Ok(began) => began,
            Err(error) => {
                self.site.release().map_err(&failed)?;
                return Err(failed(error));
            }
        };
        if let Err(error) = self.site.save_network(into) {
            self.resume()?;
            return Err(failed(error));
        }
        let frozen = began.elapsed();
        self.site.shut().map_err(&failed)?;
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen, has_ended: false })
    }

    fn has_its_root(&self) -> bool {
        self.first().is_none_or(|process| self.is_at_home(&process))
    }

    fn resume(&self) -> Result<()> {
        let failed = self.failed("resume");
        self.criu().resume(self.first().map(|first| first.pid)).map_err(&failed)?;
        if self.first().is_none() {
            return Err(failed("there is nothing left of it".to_owned()));
        }
        self.site.release().map_err(&failed)
    }

    fn discard(&self) -> Result<()> {
        self.site.send_kept();
        self.criu().discard().map_err(self.failed("discard"))?;
        self.end("discard")
    }

    fn restore(&self, from: &Path, manner: Manner) -> Result<()> {
        self.must_be_absent("restore")?;
        lazy_pages::stop(&self.site.run);
        let failed = self.failed("restore");
        self.site.connect_from(from).map_err(&failed)?;
        let at_unlock = self.site.link().map(|link| link.release_line());
        let restored = self.criu().restore(from, manner, at_unlock.as_deref()).map_err(&failed);
        self.come_up("restore", restored)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Child, Stdio};
    use std::time::Instant;

    use layerfs::monitor::Silent;
    use layerfs::store::{Store, StoreOptions};

    use super::*;
    use crate::guest::criu::write_script;
    use crate::guest::errand::Note;
    use crate::guest::fake::{FakeHost, World};
    use crate::guest::{GuestName, GuestSpec};

    /// The first process of a namespace of processes, and who made it; none if that can't be had.
    fn first_process() -> Option<(Process, Child)> {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "sleep", "600"]).stderr(Stdio::null());
        let mut child = unshare.spawn().ok()?;
        let began = Instant::now();
        while began.elapsed() < PATIENCE && child.try_wait().unwrap().is_none() {
            if let Some(first) = Process::of(child.id()).and_then(|outer| Process::of(*outer.tree().get(1)?)) {
                return Some((first, child));
            }
        }
        None
    }

    fn guest_in(folder: &Path) -> ProcessGuest {
        guest_by(folder, "layerctl")
    }

    /// The same; `own` is run to start it.
    fn guest_by(folder: &Path, own: impl Into<PathBuf>) -> ProcessGuest {
        let store = Store::open(&folder.join("store"), StoreOptions::create()).unwrap();
        let host = FakeHost::new("a", store, folder, &World::new());
        let spec = GuestSpec {
            name: GuestName::new("web").unwrap(),
            driver: "process".to_owned(),
            stack: layerfs::LayerName::new("app").unwrap(),
            options: serde_json::json!({ "command": ["/bin/prog"] }),
        };
        let programs = Arc::new(Programs::new(folder.into(), own.into(), None));
        ProcessGuest::new(&GuestRecord::new(spec), host, programs).unwrap()
    }

    #[test]
    fn it_is_not_dumped_while_a_command_runs_in_it_nor_does_one_begin_while_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let guest = guest_in(folder.path());
        let mut first = Command::new("sleep").arg("600").spawn().unwrap();
        Process::of(first.id()).unwrap().save(&guest.saved()).unwrap();
        let lock = |how| guest.lock_commands(how).unwrap();
        let (shared, alone) = (FlockOperation::NonBlockingLockShared, FlockOperation::NonBlockingLockExclusive);
        let commands = (lock(shared).unwrap(), lock(shared).unwrap());
        let refused = guest.dump(folder.path()).unwrap_err().to_string();
        assert!(refused.contains("guest exec"), "{refused}");
        assert!(first.try_wait().unwrap().is_none());
        assert_eq!(guest.status().unwrap().activity, Activity::Running);
        drop(commands);
        let dump = lock(alone).unwrap();
        let refused = exec::output(&guest, &["true".into()], &Silent).unwrap_err().to_string();
        assert!(refused.contains("being dumped"), "{refused}");
        drop(dump);
        assert!(lock(shared).is_some());
        first.kill().unwrap();
        first.wait().unwrap();
    }

    #[test]
    fn what_was_wrong_with_the_memory_of_an_earlier_one_is_not_said_of_one_that_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        write_script(&own, "#!/bin/sh\ncat >/dev/null\nsleep 600 </dev/null >/dev/null 2>&1 &\necho $!\n").unwrap();
        let guest = guest_by(folder.path(), own);
        let run = &guest.site.run;
        let mut ended = Command::new("true").spawn().unwrap();
        Process::of(ended.id()).unwrap().save(&run.join("lazy-pages.json")).unwrap();
        ended.wait().unwrap();
        fs::write(run.join("lazy-pages.log"), "(31.2) Error (criu/uffd.c:1): 7-12: failed reading pages at 7f00\n")
            .unwrap();
        assert!(lazy_pages::wait(run).is_err());
        // It has ended by itself: nobody has ended it.
        guest.start().unwrap();
        lazy_pages::wait(run).unwrap();
        guest.stop().unwrap();
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn what_a_dead_daemon_has_brought_to_life_is_taken_over_or_ended_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let guest = guest_in(folder.path());
        let activity = || guest.status().unwrap().activity;
        // Whether its root is what the guest's was, and what it is.
        for (was_home, is_at_home) in [(false, false), (true, false), (false, true), (true, true)] {
            let root = was_home.then_some(Path::new("/"));
            let note = Note { file: guest.criu().restoring(), into: None, root };
            let _ = fs::remove_file(&guest.site.root);
            let mut wait = Command::new("sh");
            // Before that which it makes.
            let mut criu = note.begin(wait.args(["-c", "read -r line && exec sleep 0.3"]), b"\n").unwrap();
            let Some((first, mut outer)) = first_process() else {
                eprintln!("SKIPPED: a namespace of processes can't be had here (it needs root)");
                criu.wait().unwrap();
                return;
            };
            fs::write(guest.site.run.join("pid"), first.pid.to_string()).unwrap();
            if is_at_home {
                std::os::unix::fs::symlink("/", &guest.site.root).unwrap();
            }
            // As long as whoever began it lives it isn't anybody else's.
            assert_eq!(activity(), Activity::Absent);
            errand::orphan(&note.file);
            assert_eq!(activity(), if is_at_home { Activity::Running } else { Activity::Absent });
            assert!(criu.try_wait().unwrap().is_some(), "it wasn't waited for");
            // One that only has the number is somebody else's.
            let is_left = is_at_home || !was_home;
            assert_eq!(first.is_alive(), is_left, "{was_home} {is_at_home}");
            assert!(!note.file.exists());
            // A second one is refused; without CRIU there is none anyway.
            assert!(guest.restore(folder.path(), Manner::Whole).is_err());
            assert_eq!(first.is_alive(), is_left, "it was harmed");
            if is_at_home {
                assert!(guest.has_its_root());
                fs::remove_file(&guest.site.root).unwrap();
                assert!(!guest.has_its_root());
            }
            guest.stop().unwrap();
            assert_eq!(first.is_alive(), !is_at_home && !was_home);
            first.kill();
            outer.wait().unwrap();
        }
        // One that can't be kept in mind is ended.
        let (first, mut outer) = first_process().unwrap();
        fs::create_dir_all(guest.saved()).unwrap();
        assert!(guest.keep("restore", first.pid).is_err());
        assert!(!first.is_alive());
        outer.wait().unwrap();
    }
}
