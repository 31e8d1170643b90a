//! What drivers of containers have in common: where a container's things are, and the life of one whose runtime dumps it
//! by ending it.
//!
//! A runtime ([`Engine`]) starts a container, ends it with a dump, and restores it; [`Container`] makes a [`Guest`] of that.
//! Rolling back a dump restores it from the files that were just written. Meanwhile nothing is heard of it: its network is
//! held back before, and outlives it.
//!
//! Hides how the runtime is called. Invariants: from before a dump begins until the container has gone on or is gone, `dumped` in the
//! run folder names the state's folder and who writes it; a container that doesn't run and whose state there is complete, and of this
//! run of the machine, stands still. Whether it runs isn't decided while a complete dump is ending it. What a dump leaves in the freezer
//! goes on unless it was there before, which `paused` in the run folder says.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::monitor::Monitor;

use super::criu::has_died;
use super::errand::{self, Errand, Note};
use super::network::Link;
use super::network_setup::Inside;
use super::options::ContainerOptions;
use super::processes::{Process, status_bytes};
use super::programs::Programs;
use super::{
    Activity, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Pipes, Side, Status, Surroundings, Written, exec,
    lazy_pages, preflight, scan, state,
};
use crate::error::{Error, Result};

/// How long a container gets to do what it was told.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// So long what is killed takes that nothing holds up.
const SOON: Duration = Duration::from_secs(2);

/// What CRIU says of a dump, in the run folder or the state's.
pub(super) const DUMP_LOG: &str = "dump.log";
/// What CRIU writes last into a state; only then it ends what it has dumped.
const LAST_FILE: &str = "inventory.img";

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
    host: Arc<dyn Host>,
}

impl Site {
    /// That of the guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that containers don't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: Arc<dyn Host>, programs: Arc<Programs>) -> Result<Site> {
        let name = record.spec.name.clone();
        let options = ContainerOptions::read(&record.spec.options)?;
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(Site { name, options, programs, run, root, host })
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
            if let (Side::Source, Some(_)) = (side, first) {
                found.extend(link.uncarried());
            }
        }
        if let (Side::Source, Some(process)) = (side, first) {
            found.extend(preflight::processes(&process.tree()));
            found.extend(lazy_pages::complaint(&self.run).map(|what| Obstacle::new(what, lazy_pages::FIX)));
        }
        found
    }

    /// What it may depend on of this host if `first` runs here, else what it would find here.
    pub fn surroundings(&self, first: Option<&Process>) -> Surroundings {
        let nft = match (first, self.link()) {
            (Some(_), link) => link.is_some_and(|link| link.has_tables()),
            (None, _) => self.programs.find("nft").is_some(),
        };
        Surroundings { nft, ..Surroundings::of_processes(first.map(Process::own_bytes)) }
    }

    /// Makes its connection, through which nothing passes yet.
    pub fn connect(&self) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.make())
    }

    /// The same for one that goes on from the state in `from`, with what it had set up in its network.
    pub fn connect_from(&self, from: &Path) -> Outcome<()> {
        let Some(link) = self.link() else { return Ok(()) };
        link.make()?;
        let loaded = link.load(from);
        if loaded.is_err() {
            // The failure is what counts.
            let _ = link.remove();
        }
        loaded
    }

    /// Adds to a state's folder what it has set up in its network.
    pub fn save_network(&self, into: &Path) -> Outcome<()> {
        self.link().map_or(Ok(()), |link| link.save(into))
    }

    /// Lets the connections of the container work again, whose first process is `first`, if a CRIU that dumped it has died before it did so.
    pub fn unlock(&self, first: &Process) -> Outcome<()> {
        let dump = Errand::load(&self.dumped());
        let logs = [Some(self.run.as_path()), dump.as_ref().and_then(Errand::folder)];
        if !logs.into_iter().flatten().any(|folder| has_died(&folder.join(DUMP_LOG))) {
            return Ok(());
        }
        let own = || format!("/proc/{}/ns/net", first.pid).into();
        let namespace = self.link().map_or_else(own, |link| link.namespace());
        Inside { programs: &self.programs, namespace }.unlock()?;
        // It is said of no other one.
        let _ = fs::remove_file(self.run.join(DUMP_LOG));
        Ok(())
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

    fn restoring(&self) -> PathBuf {
        self.run.join("restoring.json")
    }

    /// The note of a dump into `into`.
    pub fn dump_to<'a>(&self, into: &'a Path) -> Note<'a> {
        Note { file: self.dumped(), into: Some(into), root: None }
    }

    /// The note of a restore.
    pub fn restore(&self) -> Note<'static> {
        Note { file: self.restoring(), into: None, root: None }
    }

    /// Where the whole state of a dump lies that ended the container. What was dumped in an earlier run of the machine doesn't go on:
    /// neither its files nor what was written last on its disk need have got there.
    fn whole_state(&self) -> Option<PathBuf> {
        let errand = Errand::load(&self.dumped()).filter(|errand| errand.program().is_of_this_boot())?;
        let into = errand.folder()?.to_owned();
        into.join(LAST_FILE).exists().then_some(into)
    }

    /// Whether a dump has written all of `first`, which is what it ends then, and not what goes on from that state.
    fn has_dumped(&self, first: &Process) -> bool {
        let is_of = |dump: Errand| dump.program().is_younger_than(first);
        self.whole_state().is_some() && Errand::load(&self.dumped()).is_some_and(is_of)
    }

    /// Where it is noted that it was in the freezer before it was dumped.
    fn paused(&self) -> PathBuf {
        self.run.join("paused")
    }

    /// Forgets a dump: with the state, if nobody is there any more who would remove that.
    fn forget_dump(&self) {
        if let Some(into) = Errand::orphaned(&self.dumped()).as_ref().and_then(Errand::folder)
            && let Err(error) = self.host.remove_scratch(&self.name, into)
        {
            tracing::warn!(guest = %self.name, %error, "a state that nobody needs wasn't removed");
        }
        let _ = fs::remove_file(self.dumped());
        let _ = fs::remove_file(self.paused());
    }

    fn forget_restore(&self) {
        let _ = fs::remove_file(self.restoring());
    }
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

    /// Whether it runs and is in the freezer.
    fn is_paused(&self) -> Outcome<bool>;

    /// Takes it out of the freezer, in which it is.
    fn unpause(&self) -> Outcome<()>;

    /// Starts it; its connection is there.
    fn launch(&self) -> Outcome<()>;

    /// A command that runs `argv` inside of it.
    fn command(&self, argv: &[OsString]) -> Outcome<Command>;

    /// Writes its state into `into`, and ends it. Who does it is noted in [`Site::dump_to`], which stays.
    fn save(&self, into: &Path) -> Outcome<()>;

    /// Lets it go on from the state in `from`; its connection is there. Who does it is noted in [`Site::restore`], which stays.
    fn load(&self, from: &Path, manner: Manner) -> Outcome<()>;

    /// Sees to it that the runtime knows nothing any more of one whose processes have ended.
    fn settle(&self) -> Outcome<()>;
}

/// A guest whose runtime is `E`.
pub struct Container<E>(pub(super) E);

impl<E: Engine> Container<E> {
    fn running(&self, action: &'static str) -> Result<Process> {
        self.settle()?;
        let failed = self.0.site().failed(action);
        self.0.first().map_err(&failed)?.ok_or_else(|| failed("it isn't running".to_owned()))
    }

    /// Finds out what came of dumps and restores whose beginner has died meanwhile.
    fn settle(&self) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed("look at"));
        for note in [site.restoring(), site.dumped()] {
            let Some(errand) = Errand::orphaned(&note) else { continue };
            errand.wait().map_err(&failed)?;
            // Not while others wait for theirs.
            self.left().map_err(&failed)?;
            let _held = errand::settling();
            if Errand::load(&note).as_ref() != Some(&errand) {
                continue;
            }
            if let Some(first) = self.0.first().map_err(&failed)? {
                self.thaw().map_err(&failed)?;
                site.unlock(&first).map_err(&failed)?;
                site.release().map_err(&failed)?;
            } else if errand.folder().is_some() && site.whole_state().is_some() {
                // It stands still.
                continue;
            }
            match errand.folder() {
                Some(_) => site.forget_dump(),
                None => site.forget_restore(),
            }
        }
        Ok(())
    }

    /// Its first process, if that runs on: CRIU ends what it has dumped only when all of it is written, and that takes a moment.
    fn left(&self) -> Outcome<Option<Process>> {
        let is_left = |first: &Process| !self.0.site().has_dumped(first) || !first.wait_gone(PATIENCE);
        Ok(self.0.first()?.filter(is_left))
    }

    /// Takes it out of the freezer if it is there by a dump that came to nothing. What was put there otherwise stays there.
    fn thaw(&self) -> Outcome<()> {
        let site = self.0.site();
        match site.dumped().exists() && !site.paused().exists() && self.0.is_paused()? {
            true => self.0.unpause(),
            false => Ok(()),
        }
    }

    fn must_be_absent(&self, action: &'static str) -> Result<()> {
        match self.status()?.activity {
            Activity::Absent => Ok(()),
            _ => Err(self.0.site().failed(action)("it runs already".to_owned())),
        }
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed(action));
        for errand in [site.restoring(), site.dumped()].iter().filter_map(|note| Errand::orphaned(note)) {
            errand.end().map_err(&failed)?;
        }
        if let Some(process) = self.0.first().map_err(&failed)? {
            process.kill();
            if !process.wait_gone(SOON) && self.0.is_paused() == Ok(true) {
                // In some freezers it ends when it is taken out, which is looked at next.
                let _ = self.0.unpause();
            }
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("process {} does not end", process.pid)));
            }
        }
        self.0.settle().map_err(&failed)?;
        lazy_pages::stop(&site.run);
        site.forget_restore();
        site.forget_dump();
        site.disconnect().map_err(&failed)
    }

    /// Has it come to life by `work`, on a connection made for it, as the state in `from` has it. If that fails nothing is left.
    fn bring_up(&self, action: &'static str, from: Option<&Path>, work: impl FnOnce() -> Outcome<()>) -> Result<()> {
        let (site, failed) = (self.0.site(), self.0.site().failed(action));
        self.must_be_absent(action)?;
        self.end(action)?;
        from.map_or_else(|| site.connect(), |from| site.connect_from(from)).map_err(&failed)?;
        let up = work().and_then(|()| site.release());
        match &up {
            Ok(()) => site.forget_restore(),
            // The failure is what counts.
            Err(_) => drop(self.end(action)),
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
        // Without its runtime it doesn't run here.
        Ok(self.0.site().surroundings(self.0.first().ok().flatten().as_ref()))
    }

    fn start(&self) -> Result<()> {
        self.bring_up("start", None, || self.0.launch())
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString], pipes: Pipes, monitor: &dyn Monitor) -> Result<i32> {
        self.running("run a command in")?;
        let failed = self.0.site().failed("run a command in");
        let mut command = self.0.command(argv).map_err(&failed)?;
        let code = exec::run(&mut command, pipes, monitor);
        let code = code.map_err(|error| failed(format!("{} cannot be run: {error}", self.0.program().0)))?;
        Ok(code.ok_or(layerfs::Error::Cancelled)?)
    }

    fn status(&self) -> Result<Status> {
        self.settle()?;
        let site = self.0.site();
        let process = self.0.first().map_err(site.failed("look at"))?;
        let activity = match &process {
            Some(_) => Activity::Running,
            None if site.whole_state().is_some() => Activity::Frozen,
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
        match self.0.is_paused().map_err(&failed)? {
            true => fs::write(site.paused(), "")
                .map_err(|error| failed(format!("cannot note that it is paused: {error}")))?,
            false => drop(fs::remove_file(site.paused())),
        }
        site.hold().map_err(&failed)?;
        let began = Instant::now();
        if let Err(error) = self.0.save(into) {
            // What ended all the same stands still.
            if let Some(first) = self.left().map_err(&failed)? {
                self.thaw().map_err(|second| failed(format!("{error}; and it stays in the freezer: {second}")))?;
                site.unlock(&first).map_err(|second| failed(format!("{error}; and {second}")))?;
                site.forget_dump();
                site.release().map_err(&failed)?;
            }
            return Err(failed(error));
        }
        // Its network outlives its processes.
        let saved = site.save_network(into);
        let frozen = began.elapsed();
        site.shut().map_err(&failed)?;
        if !process.wait_gone(PATIENCE) {
            return Err(failed("it was dumped and does not end".to_owned()));
        }
        saved.map_err(|error| failed(format!("{error}; it stands still and can be resumed")))?;
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen, has_ended: true })
    }

    fn resume(&self) -> Result<()> {
        self.settle()?;
        let (site, failed) = (self.0.site(), self.0.site().failed("resume"));
        if let Some(first) = self.left().map_err(&failed)? {
            self.thaw().map_err(&failed)?;
            site.unlock(&first).map_err(&failed)?;
        } else {
            let from = site.whole_state().ok_or_else(|| failed("there is nothing left of it".to_owned()))?;
            self.0.load(&from, Manner::Whole).map_err(&failed)?;
        }
        site.forget_dump();
        site.release().map_err(&failed)?;
        site.forget_restore();
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        self.0.site().send_kept();
        self.end("discard")
    }

    fn restore(&self, from: &Path, manner: Manner) -> Result<()> {
        self.bring_up("restore", Some(from), || {
            if manner == Manner::Lazily {
                lazy_pages::serve(&self.0.site().programs, &self.0.site().run, from)?;
            }
            self.0.load(from, manner)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Child;
    use std::sync::atomic::{AtomicBool, Ordering};

    use layerfs::store::{Store, StoreOptions};
    use parking_lot::Mutex;

    use super::*;
    use crate::guest::GuestSpec;
    use crate::guest::criu::write_script;
    use crate::guest::fake::{FakeHost, World};

    /// A runtime whose container is a program that sleeps.
    struct Sleeper {
        site: Site,
        runs: Mutex<Option<Child>>,
        dumps: How,
        is_paused: AtomicBool,
    }

    /// What comes of a dump.
    #[derive(Clone, Copy, PartialEq)]
    enum How {
        /// The container has ended.
        Well,
        /// The same, but it fails then.
        Late,
        /// It fails, and the container ends a moment later.
        Early,
        /// It fails, has written nothing, and leaves the container in the freezer.
        Frozen,
        /// The runtime is killed, and the CRIU that it has begun goes on.
        Orphaned,
    }

    impl Sleeper {
        fn end(&self) {
            if let Some(mut child) = self.runs.lock().take() {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.end();
        }
    }

    impl Engine for Sleeper {
        fn site(&self) -> &Site {
            &self.site
        }

        fn program(&self) -> (&'static str, &'static str) {
            ("sleep", "coreutils")
        }

        fn first(&self) -> Outcome<Option<Process>> {
            Ok(self.runs.lock().as_ref().and_then(|child| Process::of(child.id())).filter(Process::is_alive))
        }

        fn is_paused(&self) -> Outcome<bool> {
            Ok(self.is_paused.load(Ordering::SeqCst))
        }

        fn unpause(&self) -> Outcome<()> {
            assert!(self.is_paused.swap(false, Ordering::SeqCst));
            Ok(())
        }

        fn launch(&self) -> Outcome<()> {
            *self.runs.lock() = Some(Command::new("sleep").arg("600").spawn().unwrap());
            Ok(())
        }

        fn command(&self, _: &[OsString]) -> Outcome<Command> {
            Err("it takes none".to_owned())
        }

        fn save(&self, into: &Path) -> Outcome<()> {
            let first = if self.dumps == How::Frozen { "false" } else { "true" };
            if self.dumps == How::Orphaned {
                let (criu, first) = (self.site.run.join("criu"), self.first()?.unwrap());
                let text = format!("sleep 0.3; : >{}/{LAST_FILE}; kill -9 {}", into.display(), first.pid);
                write_script(&criu, &format!("#!/bin/sh\n{text}\n"))?;
                let mut command = Command::new("sh");
                command.args(["-c", &format!("read -r line; {} & kill -9 $$", criu.display())]).process_group(0);
                let status = self.site.dump_to(into).run(&mut command)?;
                return Err(format!("it ended with {status}"));
            }
            self.site.dump_to(into).run(&mut writes(into, first))?;
            match self.dumps {
                How::Well | How::Late => self.end(),
                How::Early => {
                    let first = self.first()?.unwrap();
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(300));
                        first.kill();
                    });
                }
                How::Frozen | How::Orphaned => self.is_paused.store(true, Ordering::SeqCst),
            }
            if self.dumps == How::Well { Ok(()) } else { Err("it was made to fail".to_owned()) }
        }

        fn load(&self, from: &Path, _: Manner) -> Outcome<()> {
            self.site.restore().run(&mut writes(from, "false"))?;
            assert!(from.join(LAST_FILE).exists());
            self.launch()
        }

        fn settle(&self) -> Outcome<()> {
            self.end();
            Ok(())
        }
    }

    /// What writes a state into `folder` after `first`.
    fn writes(folder: &Path, first: &str) -> Command {
        let mut command = Command::new("sh");
        let script = format!("read -r line && {first} && touch {}/{LAST_FILE}", folder.display());
        command.args(["-c", &script]);
        command
    }

    struct Here {
        _folder: tempfile::TempDir,
        host: Arc<FakeHost>,
        guest: Container<Sleeper>,
    }

    impl Here {
        /// It runs.
        fn new(dumps: How) -> Here {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
            let host = FakeHost::new("a", store, folder.path(), &World::new());
            let spec = GuestSpec {
                name: GuestName::new("web").unwrap(),
                driver: "oci".to_owned(),
                stack: layerfs::LayerName::new("app").unwrap(),
                options: serde_json::json!({ "command": ["/bin/prog"] }),
            };
            let programs = Arc::new(Programs::new(folder.path().into(), "layerctl".into(), None));
            let site = Site::new(&GuestRecord::new(spec), host.clone(), programs).unwrap();
            let guest = Container(Sleeper { site, runs: Mutex::default(), dumps, is_paused: AtomicBool::default() });
            guest.start().unwrap();
            Here { _folder: folder, host, guest }
        }

        fn scratch(&self) -> PathBuf {
            self.host.scratch(&self.guest.0.site.name, 0).unwrap()
        }

        fn activity(&self) -> Activity {
            self.guest.status().unwrap().activity
        }

        /// A dump by a daemon that has died is over; whether it has written all.
        fn was_dumped(&self, is_whole: bool) -> PathBuf {
            let (into, first) = (self.scratch(), if is_whole { "true" } else { "false" });
            let note = self.guest.0.site.dump_to(&into);
            assert_eq!(note.run(&mut writes(&into, first)).unwrap().success(), is_whole);
            errand::orphan(&note.file);
            into
        }

        fn is_paused(&self) -> bool {
            self.guest.0.is_paused().unwrap()
        }

        fn is_noted(&self) -> bool {
            self.guest.0.site.dumped().exists() || self.guest.0.site.restoring().exists()
        }
    }

    #[test]
    fn a_dump_that_fails_after_its_end_leaves_it_standing_still() {
        for dumps in [How::Late, How::Early, How::Orphaned] {
            let here = Here::new(dumps);
            assert!(here.guest.dump(&here.scratch()).is_err());
            assert_eq!(here.activity(), Activity::Frozen);
            here.guest.resume().unwrap();
            assert_eq!(here.activity(), Activity::Running);
            assert!(!here.is_noted());
        }
    }

    #[test]
    fn one_whose_whole_dump_is_still_ending_it_is_waited_for() {
        // Who looks at it, and who lets it go on.
        for is_resumed in [false, true] {
            let here = Here::new(How::Well);
            let into = here.was_dumped(true);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(300));
                    here.guest.0.end();
                });
                if !is_resumed {
                    assert_eq!(here.activity(), Activity::Frozen);
                    assert!(into.join(LAST_FILE).exists());
                }
                here.guest.resume().unwrap();
            });
            assert_eq!(here.activity(), Activity::Running);
            assert!(!into.exists() && !here.is_noted());
        }
    }

    #[test]
    fn one_that_goes_on_from_its_state_is_not_taken_for_what_was_dumped() {
        let here = Here::new(How::Well);
        let into = here.scratch();
        here.guest.dump(&into).unwrap();
        // The daemon dies when that is done.
        std::thread::sleep(Duration::from_millis(50));
        here.guest.0.launch().unwrap();
        errand::orphan(&here.guest.0.site.dumped());
        let began = Instant::now();
        assert_eq!(here.activity(), Activity::Running);
        assert!(began.elapsed() < PATIENCE, "it was waited for");
        assert!(!into.exists() && !here.is_noted());
    }

    #[test]
    fn what_a_failed_dump_leaves_in_the_freezer_goes_on() {
        let here = Here::new(How::Frozen);
        assert!(here.guest.dump(&here.scratch()).is_err());
        assert_eq!((here.activity(), here.is_paused(), here.is_noted()), (Activity::Running, false, false));
        // That of a daemon that has died.
        here.was_dumped(false);
        here.guest.0.is_paused.store(true, Ordering::SeqCst);
        assert_eq!((here.activity(), here.is_paused(), here.is_noted()), (Activity::Running, false, false));
    }

    #[test]
    fn what_was_in_the_freezer_without_a_dump_stays_there() {
        let here = Here::new(How::Frozen);
        here.guest.0.is_paused.store(true, Ordering::SeqCst);
        here.guest.resume().unwrap();
        assert!(here.is_paused());
        assert!(here.guest.dump(&here.scratch()).is_err());
        assert_eq!((here.activity(), here.is_paused(), here.is_noted()), (Activity::Running, true, false));
        assert!(!here.guest.0.site.paused().exists());
    }

    #[test]
    fn a_dump_that_outlives_its_daemon_is_waited_for() {
        // Whether the container ends with it, and whether the state gets whole.
        for (ends, is_whole) in [(true, true), (true, false), (false, false)] {
            let here = Here::new(How::Well);
            let into = here.scratch();
            let first = if is_whole { "sleep 0.3" } else { "sleep 0.3 && false" };
            let note = here.guest.0.site.dump_to(&into);
            let mut dumps = note.begin(&mut writes(&into, first), b"\n").unwrap();
            errand::orphan(&note.file);
            if ends {
                here.guest.0.end();
            }
            let expected = match (ends, is_whole) {
                (false, _) => Activity::Running,
                (true, true) => Activity::Frozen,
                (true, false) => Activity::Absent,
            };
            assert_eq!(here.activity(), expected);
            assert!(dumps.try_wait().unwrap().is_some(), "it wasn't waited for");
            if expected == Activity::Frozen {
                assert!(into.exists());
                here.guest.resume().unwrap();
                assert_eq!(here.activity(), Activity::Running);
            }
            // Nobody else knows of the state.
            assert!(!into.exists() && !here.is_noted(), "{ends} {is_whole}");
        }
    }

    #[test]
    fn a_restore_that_outlives_its_daemon_is_waited_for() {
        let here = Here::new(How::Well);
        let note = here.guest.0.site.restore();
        let mut restores = note.begin(&mut writes(&here.scratch(), "sleep 0.3"), b"\n").unwrap();
        errand::orphan(&note.file);
        assert!(here.guest.restore(&here.scratch(), Manner::Whole).is_err(), "a second one was begun");
        assert!(restores.try_wait().unwrap().is_some(), "it wasn't waited for");
        assert_eq!((here.activity(), here.is_noted()), (Activity::Running, false));
    }

    #[test]
    fn what_stood_still_when_the_machine_ended_is_gone() {
        let here = Here::new(How::Well);
        let into = here.scratch();
        here.guest.dump(&into).unwrap();
        assert_eq!(here.activity(), Activity::Frozen);
        errand::reboot(&here.guest.0.site.dumped());
        assert_eq!(here.activity(), Activity::Absent);
        assert!(here.guest.resume().is_err());
        assert!(!into.exists() && !here.is_noted(), "nobody else knows of the state");
        here.guest.start().unwrap();
        assert_eq!(here.activity(), Activity::Running);
    }

    #[test]
    fn without_its_state_there_is_nothing_left_of_it() {
        let here = Here::new(How::Well);
        let into = here.scratch();
        here.guest.dump(&into).unwrap();
        assert_eq!(here.activity(), Activity::Frozen);
        fs::remove_dir_all(&into).unwrap();
        assert_eq!(here.activity(), Activity::Absent);
        assert!(here.guest.resume().is_err());
        here.guest.start().unwrap();
        assert!(!here.is_noted());
    }
}
