//! What drivers of containers have in common: where a container's things are, and the life of one whose runtime dumps it
//! by ending it.
//!
//! A runtime ([`Engine`]) starts a container, ends it with a dump, and restores it; [`Container`] makes a [`Guest`] of that.
//! Rolling back a dump restores it from the files that were just written. Meanwhile nothing is heard of it: its network is
//! held back before, and outlives it.
//!
//! Hides how the runtime is called. Invariant: `dumped` in the run folder names the state of a container that stands still,
//! and is there as long as it does.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::network::Link;
use super::options::ContainerOptions;
use super::processes::{Process, status_bytes};
use super::programs::{Programs, complaint};
use super::{
    Activity, ExecOutput, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Side, Status, Surroundings, Written,
    exec, lazy_pages, preflight, scan, state,
};
use crate::error::{Error, Result};

/// How long a container gets to do what it was told.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What came of something, or what went wrong, in words.
pub(super) type Outcome<T> = std::result::Result<T, String>;

/// A container's things on this host.
pub(super) struct Site {
    /// The guest.
    pub name: GuestName,
    /// What it is.
    pub options: ContainerOptions,
    /// Other programs.
    pub programs: Arc<Programs>,
    /// What its driver keeps of it.
    pub run: PathBuf,
    /// Its root.
    pub root: PathBuf,
}

impl Site {
    /// That of the guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that containers don't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<Site> {
        let name = record.spec.name.clone();
        let options = ContainerOptions::read(&record.spec.options)?;
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(Site { name, options, programs, run, root })
    }

    /// Makes an error of what went wrong with `action`.
    pub fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        move |detail| Error::guest(action, &self.name, detail)
    }

    /// Its connection, if it has one.
    pub fn link(&self) -> Option<Link<'_>> {
        Link::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    /// The name that it sees as its host's.
    pub fn hostname(&self) -> String {
        self.options.hostname.clone().unwrap_or_else(|| self.name.to_string())
    }

    /// What stands in the way of a container on this host, beside its runtime.
    pub fn preflight(&self, side: Side, first: Option<&Process>) -> Vec<Obstacle> {
        let mut found = preflight::host(&self.programs, side);
        if let Some(link) = self.link() {
            found.extend(preflight::network(&self.programs, link.bridge(), link.has_bridge()));
        }
        if let (Side::Source, Some(process)) = (side, first) {
            found.extend(preflight::processes(&process.tree()));
        }
        found
    }

    /// Makes its connection, through which nothing passes yet.
    pub fn connect(&self) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.make())
    }

    /// Lets everything pass, and tells the neighbours.
    pub fn release(&self) -> Outcome<()> {
        let Some(link) = self.link() else { return Ok(()) };
        link.release()?;
        link.announce();
        Ok(())
    }

    /// Lets nothing in from the network.
    pub fn hold(&self) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.hold())
    }

    /// Lets nothing out any more either.
    pub fn shut(&self) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.shut())
    }

    /// Sends after it what came for it while it was held.
    pub fn send_kept(&self) {
        if let Some(link) = self.link() {
            link.send_kept();
        }
    }

    /// Removes its connection, if there is any of it.
    pub fn disconnect(&self) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.remove())
    }

    fn dumped(&self) -> PathBuf {
        self.run.join("dumped")
    }
}

/// What a command inside of a guest did.
pub(super) fn exec_output(output: Output) -> ExecOutput {
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    ExecOutput { code, stdout: output.stdout, stderr: output.stderr }
}

/// The memory of a process and its descendants, in bytes.
pub(super) fn memory_bytes(first: &Process) -> u64 {
    first.tree().iter().filter_map(|pid| status_bytes(*pid, "VmRSS")).sum()
}

/// A runtime, for one container.
pub(super) trait Engine: Send + Sync {
    /// The container's things.
    fn site(&self) -> &Site;

    /// The runtime's program, and the Debian package that has it.
    fn program(&self) -> (&'static str, &'static str);

    /// Its first process, if it runs.
    fn first(&self) -> Outcome<Option<Process>>;

    /// Starts it; its connection is there.
    fn launch(&self) -> Outcome<()>;

    /// A command that runs `argv` inside of it.
    fn command(&self, argv: &[OsString]) -> Outcome<Command>;

    /// Whether that command's `output` is the runtime's own complaint.
    fn has_failed(&self, output: &Output) -> bool;

    /// Writes its state into `into`, and ends it.
    fn save(&self, into: &Path) -> Outcome<()>;

    /// Lets it go on from the state in `from`; its connection is there.
    fn load(&self, from: &Path, manner: Manner) -> Outcome<()>;

    /// Sees to it that the runtime knows nothing any more of one whose processes have ended.
    fn settle(&self) -> Outcome<()>;
}

/// A guest whose runtime is `E`.
pub struct Container<E>(pub(super) E);

impl<E: Engine> Container<E> {
    fn running(&self, action: &'static str) -> Result<Process> {
        let failed = self.0.site().failed(action);
        self.0.first().map_err(&failed)?.ok_or_else(|| failed("it isn't running".to_owned()))
    }

    fn must_be_absent(&self, action: &'static str) -> Result<()> {
        match self.status()?.activity {
            Activity::Absent => Ok(()),
            _ => Err(self.0.site().failed(action)("it runs already".to_owned())),
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed(action));
        if let Some(process) = self.0.first().map_err(&failed)? {
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("process {} does not end", process.pid)));
            }
        }
        self.0.settle().map_err(&failed)?;
        lazy_pages::stop(&site.run);
        let _ = fs::remove_file(site.dumped());
        site.disconnect().map_err(&failed)
    }

    /// Has it come to life by `work`, on a connection made for it. If that fails nothing is left.
    fn bring_up(&self, action: &'static str, work: impl FnOnce() -> Outcome<()>) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed(action));
        self.must_be_absent(action)?;
        self.end(action)?;
        site.connect().map_err(&failed)?;
        let up = work().and_then(|()| site.release());
        if up.is_err() {
            // The failure is what counts.
            let _ = self.end(action);
        }
        up.map_err(&failed)
    }
}

impl<E: Engine> Guest for Container<E> {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let (site, (program, package)) = (self.0.site(), self.0.program());
        let mut found: Vec<Obstacle> = preflight::missing(&site.programs, program, package).into_iter().collect();
        // Without its runtime it doesn't run here.
        let first = self.0.first().ok().flatten();
        found.extend(site.preflight(side, first.as_ref()));
        Ok(found)
    }

    fn surroundings(&self) -> Result<Surroundings> {
        Ok(Surroundings::of_processes())
    }

    fn start(&self) -> Result<()> {
        self.bring_up("start", || self.0.launch())
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString]) -> Result<ExecOutput> {
        self.running("run a command in")?;
        let failed = self.0.site().failed("run a command in");
        let mut command = self.0.command(argv).map_err(&failed)?;
        let output = exec::output(&mut command)
            .map_err(|error| failed(format!("{} cannot be run: {error}", self.0.program().0)))?;
        if self.0.has_failed(&output) {
            return Err(failed(complaint(&output)));
        }
        Ok(exec_output(output))
    }

    fn status(&self) -> Result<Status> {
        let site = self.0.site();
        let process = self.0.first().map_err(site.failed("look at"))?;
        let activity = match &process {
            Some(_) => Activity::Running,
            None if site.dumped().exists() => Activity::Frozen,
            None => Activity::Absent,
        };
        let memory_bytes = process.as_ref().map(memory_bytes);
        Ok(Status { activity, pid: process.map(|process| process.pid), memory_bytes })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let process = self.running("scan")?;
        scan::tree(&process, into).map_err(self.0.site().failed("scan"))
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let process = self.running("dump")?;
        let (site, failed) = (self.0.site(), self.0.site().failed("dump"));
        lazy_pages::wait(&site.run).map_err(&failed)?;
        site.hold().map_err(&failed)?;
        let began = Instant::now();
        if let Err(error) = self.0.save(into) {
            site.release().map_err(&failed)?;
            return Err(failed(error));
        }
        let frozen = began.elapsed();
        fs::write(site.dumped(), into.as_os_str().as_encoded_bytes())
            .map_err(|error| failed(format!("cannot note that it stands still: {error}")))?;
        site.shut().map_err(&failed)?;
        if !process.wait_gone(PATIENCE) {
            return Err(failed("it was dumped and does not end".to_owned()));
        }
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen, has_ended: true })
    }

    fn resume(&self) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed("resume"));
        if self.0.first().map_err(&failed)?.is_none() {
            let from = fs::read(site.dumped()).map_err(|_| failed("there is nothing left of it".to_owned()))?;
            self.0.load(Path::new(&OsString::from_vec(from)), Manner::Whole).map_err(&failed)?;
        }
        let _ = fs::remove_file(site.dumped());
        site.release().map_err(&failed)
    }

    fn discard(&self) -> Result<()> {
        self.0.site().send_kept();
        self.end("discard")
    }

    fn restore(&self, from: &Path, manner: Manner) -> Result<()> {
        self.bring_up("restore", || {
            if manner == Manner::Lazily {
                lazy_pages::serve(&self.0.site().programs, &self.0.site().run, from)?;
            }
            self.0.load(from, manner)
        })
    }
}
