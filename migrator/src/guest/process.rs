//! The driver "process": a process tree in namespaces of its own on the mounted stack, dumped and restored by CRIU directly.
//!
//! What it keeps is in the run folder: the first process (`process.json`), and what [`Criu`] and [`Link`] have there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::criu::Criu;
use super::launch::{Orders, Start};
use super::network::Link;
use super::options::ContainerOptions;
use super::processes::{Process, status_bytes};
use super::programs::Programs;
use super::{
    Activity, ExecOutput, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Side, Status, Written, preflight, scan,
};
use crate::error::{Error, Result};

/// How long a guest gets to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest of this driver.
pub struct ProcessGuest {
    name: GuestName,
    options: ContainerOptions,
    programs: Arc<Programs>,
    run: PathBuf,
    root: PathBuf,
}

impl ProcessGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<ProcessGuest> {
        let name = record.spec.name.clone();
        let options = ContainerOptions::read(&record.spec.options)?;
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(ProcessGuest { name, options, programs, run, root })
    }

    fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        move |detail| Error::guest(action, &self.name, detail)
    }

    fn saved(&self) -> PathBuf {
        self.run.join("process.json")
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

    fn link(&self) -> Option<Link<'_>> {
        Link::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    fn criu(&self) -> Criu<'_> {
        let network = self.link().map(|link| link.namespace());
        Criu { programs: &self.programs, run: &self.run, root: &self.root, network }
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
        if let Some(link) = self.link() {
            link.remove().map_err(self.failed(action))?;
        }
        Ok(())
    }
}

impl Guest for ProcessGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let mut found = preflight::host(&self.programs, side);
        if let Some(link) = self.link() {
            found.extend(preflight::network(&self.programs, link.bridge(), link.has_bridge()));
        }
        if let (Side::Source, Some(process)) = (side, self.first()) {
            found.extend(preflight::processes(&process.tree()));
        }
        Ok(found)
    }

    fn start(&self) -> Result<()> {
        self.must_be_absent("start")?;
        let failed = self.failed("start");
        if let Some(link) = self.link() {
            link.make().map_err(&failed)?;
        }
        let start = Start {
            root: self.root.clone(),
            command: self.options.command.clone(),
            env: self.options.environment(),
            folder: self.options.folder.clone(),
            hostname: self.options.hostname.clone().unwrap_or_else(|| self.name.to_string()),
            log: self.options.log.clone(),
            network: self.link().map(|link| link.namespace()),
        };
        let started = self
            .programs
            .obey(&Orders::Start(start))
            .and_then(|said| said.trim().parse::<u32>().map_err(|_| format!("its launcher said {:?}", said.trim())));
        let kept = started.map_err(&failed).and_then(|pid| self.keep("start", pid));
        let linked = kept.and_then(|()| self.link().map_or(Ok(()), |link| link.release().map_err(&failed)));
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
        use std::os::unix::process::ExitStatusExt;
        let process = self.running("run a command in")?;
        let failed = self.failed("run a command in");
        let enter =
            self.programs.find("nsenter").ok_or_else(|| failed("there is no nsenter: install util-linux".into()))?;
        let mut command = Command::new(enter);
        command.args(["--target", &process.pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--root"]);
        command.arg(format!("--wd=/proc/{}/root", process.pid)).arg("--").args(argv);
        command.env_clear().envs(self.options.environment()).stdin(std::process::Stdio::null());
        let output = command.output().map_err(|error| failed(format!("nsenter cannot be run: {error}")))?;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        Ok(ExecOutput { code, stdout: output.stdout, stderr: output.stderr })
    }

    fn status(&self) -> Result<Status> {
        let Some(process) = self.first() else {
            return Ok(Status { activity: Activity::Absent, pid: None, memory_bytes: None });
        };
        let activity = if self.criu().is_held() { Activity::Frozen } else { Activity::Running };
        let memory = process.tree().iter().filter_map(|pid| status_bytes(*pid, "VmRSS")).sum();
        Ok(Status { activity, pid: Some(process.pid), memory_bytes: Some(memory) })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let process = self.running("scan")?;
        scan::tree(&process, into).map_err(self.failed("scan"))
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let process = self.running("dump")?;
        let failed = self.failed("dump");
        let link = self.link();
        if let Some(link) = &link {
            link.hold().map_err(&failed)?;
        }
        let dumped = self.criu().dump(process.pid, into);
        let began = match dumped {
            Ok(began) => began,
            Err(error) => {
                if let Some(link) = &link {
                    link.release().map_err(&failed)?;
                }
                return Err(failed(error));
            }
        };
        let (memory_bytes, other_bytes) = super::state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen: began.elapsed() })
    }

    fn resume(&self) -> Result<()> {
        let failed = self.failed("resume");
        self.criu().resume().map_err(&failed)?;
        if self.first().is_none() {
            return Err(failed("there is nothing left of it".to_owned()));
        }
        self.link().map_or(Ok(()), |link| link.release().map_err(&failed))
    }

    fn discard(&self) -> Result<()> {
        self.criu().discard().map_err(self.failed("discard"))?;
        self.end("discard")
    }

    fn restore(&self, from: &Path, _: Manner) -> Result<()> {
        self.must_be_absent("restore")?;
        let failed = self.failed("restore");
        let link = self.link();
        if let Some(link) = &link {
            link.make().map_err(&failed)?;
        }
        let at_unlock = link.as_ref().map(Link::release_line);
        let restored = self.criu().restore(from, at_unlock.as_deref()).map_err(&failed);
        let kept = restored.and_then(|pid| self.keep("restore", pid));
        let linked = kept.and_then(|()| link.as_ref().map_or(Ok(()), |link| link.release().map_err(&failed)));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        linked
    }
}
