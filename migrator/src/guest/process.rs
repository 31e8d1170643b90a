//! The driver "process": a process tree in namespaces of its own on the mounted stack, dumped and restored by CRIU directly.
//!
//! What it keeps is in the run folder: the first process (`process.json`), and what [`Criu`] has there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::container::{PATIENCE, Site, exec_output, memory_bytes};
use super::criu::Criu;
use super::launch::{Orders, Start};
use super::processes::Process;
use super::programs::Programs;
use super::{
    Activity, ExecOutput, Guest, GuestRecord, Host, Manner, Obstacle, Side, Status, Surroundings, Written, exec,
    lazy_pages, scan, state,
};
use crate::error::{Error, Result};

/// A guest of this driver.
pub struct ProcessGuest {
    site: Site,
}

impl ProcessGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<ProcessGuest> {
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

    fn running(&self, action: &'static str) -> Result<Process> {
        match self.first() {
            Some(process) if !self.criu().is_held() => Ok(process),
            Some(_) => Err(self.failed(action)("it stands still after a dump".to_owned())),
            None => Err(self.failed(action)("it isn't running".to_owned())),
        }
    }

    fn criu(&self) -> Criu<'_> {
        let network = self.site.link().map(|link| link.namespace());
        Criu { programs: &self.site.programs, run: &self.site.run, root: &self.site.root, network }
    }

    fn keep(&self, action: &'static str, pid: u32) -> Result<()> {
        let gone = || self.failed(action)("it ended at once; see its log, if it has one".to_owned());
        Ok(Process::of(pid).ok_or_else(gone)?.save(&self.saved())?)
    }

    fn must_be_absent(&self, action: &'static str) -> Result<()> {
        match self.first() {
            Some(_) => Err(self.failed(action)("it runs already".to_owned())),
            None => Ok(()),
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        if let Some(process) = Process::load(&self.saved()) {
            // The kernel ends the rest of its namespace with it.
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(self.failed(action)(format!("process {} does not end", process.pid)));
            }
            let _ = std::fs::remove_file(self.saved());
        }
        lazy_pages::stop(&self.site.run);
        self.site.disconnect().map_err(self.failed(action))
    }
}

impl Guest for ProcessGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        Ok(self.site.preflight(side, self.first().as_ref()))
    }

    fn surroundings(&self) -> Result<Surroundings> {
        Ok(Surroundings::of_processes())
    }

    fn start(&self) -> Result<()> {
        self.must_be_absent("start")?;
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
        };
        let started =
            self.site.programs.obey(&Orders::Start(start)).and_then(|said| {
                said.trim().parse::<u32>().map_err(|_| format!("its launcher said {:?}", said.trim()))
            });
        let kept = started.map_err(&failed).and_then(|pid| self.keep("start", pid));
        let linked = kept.and_then(|()| self.site.release().map_err(&failed));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("start");
        }
        linked
    }

    fn stop(&self) -> Result<()> {
        let criu = self.criu();
        if criu.is_held() {
            criu.discard().map_err(self.failed("stop"))?;
        }
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString]) -> Result<ExecOutput> {
        let process = self.running("run a command in")?;
        let failed = self.failed("run a command in");
        let enter = self
            .site
            .programs
            .find("nsenter")
            .ok_or_else(|| failed("there is no nsenter: install util-linux".into()))?;
        let mut command = Command::new(enter);
        command.args(["--target", &process.pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]);
        command.arg(format!("--wd=/proc/{}/root", process.pid)).arg("--").args(argv);
        command.env_clear().envs(self.site.options.environment());
        let output = exec::output(&mut command).map_err(|error| failed(format!("nsenter cannot be run: {error}")))?;
        Ok(exec_output(output))
    }

    fn status(&self) -> Result<Status> {
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
        self.site.hold().map_err(&failed)?;
        let began = match self.criu().dump(process.pid, into) {
            Ok(began) => began,
            Err(error) => {
                self.site.release().map_err(&failed)?;
                return Err(failed(error));
            }
        };
        let frozen = began.elapsed();
        self.site.shut().map_err(&failed)?;
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen, has_ended: false })
    }

    fn resume(&self) -> Result<()> {
        let failed = self.failed("resume");
        self.criu().resume().map_err(&failed)?;
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
        let failed = self.failed("restore");
        self.site.connect().map_err(&failed)?;
        let at_unlock = self.site.link().map(|link| link.release_line());
        let restored = self.criu().restore(from, manner, at_unlock.as_deref()).map_err(&failed);
        let kept = restored.and_then(|pid| self.keep("restore", pid));
        let linked = kept.and_then(|()| self.site.release().map_err(&failed));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        linked
    }
}
