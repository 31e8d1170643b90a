//! Guests that only exist in tests, and the world that watches them.
//!
//! A [`FakeGuest`] is a counter, a memory of pages, and a file on its disk, which all advance when the test says
//! [`World::tick`]: no threads, no clock. The [`World`] sees what a client would: every step that any host's copy took, and
//! every packet that one acknowledged. It tells what must never be: two running copies, a counter that goes back,
//! an acknowledged packet that is gone, a step taken by a copy whose epoch is over. A call can be made to fail before
//! or after it has done its work ([`World::fail`]).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use layerfs::export::{Destination, Format, export};
use layerfs::import::{ImportOptions, SourceSpec, import};
use layerfs::manifest::LayerKind;
use layerfs::monitor::{Monitor, Silent};
use layerfs::store::{Expect, Store};
use layerfs::{LayerId, LayerName};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::state::MEMORY_FILE;
use super::{
    Activity, Drivers, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Pipes, Side, Status, Surroundings,
    Written,
};
use crate::error::{Error, Result};

/// The driver's name in a [`super::GuestSpec`].
pub const DRIVER: &str = "fake";
const PAGE: usize = 4096;
/// What isn't memory.
const STATE_FILE: &str = "state.json";
/// What the guest writes on its disk: one line for each step.
pub const DISK_FILE: &str = "steps";

/// The options of a fake guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FakeOptions {
    /// Its memory, in pages of 4 KiB.
    pub pages: usize,
    /// How many pages a step changes.
    pub changed_pages: usize,
    /// How many bytes a step adds to its disk.
    pub disk_bytes: usize,
    /// It ends with its dump, and goes on from the files of that, as a container does.
    pub ends_with_dump: bool,
}

impl Default for FakeOptions {
    fn default() -> FakeOptions {
        FakeOptions { pages: 256, changed_pages: 4, disk_bytes: 16, ends_with_dump: false }
    }
}

/// A method of [`Guest`] or [`Host`] that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`Guest::preflight`]: an obstacle, no error.
    Preflight,
    /// [`Guest::start`].
    Start,
    /// [`Guest::stop`].
    Stop,
    /// [`Guest::status`].
    Status,
    /// [`Guest::scan`].
    Scan,
    /// [`Guest::dump`].
    Dump,
    /// [`Guest::resume`].
    Resume,
    /// [`Guest::discard`].
    Discard,
    /// [`Guest::restore`].
    Restore,
    /// [`Host::mount`].
    Mount,
    /// [`Host::seal`].
    Seal,
    /// [`Host::unmount`].
    Unmount,
}

/// When in a call the fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum When {
    /// Nothing is done.
    Before,
    /// It is done, and an error is returned all the same.
    After,
    /// Nothing is done, as CRIU has found what it can't save, and what passes by itself.
    InFlight,
}

/// Something that a client or an operator could notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A copy was started anew.
    Started(String),
    /// A copy took a step.
    Step {
        /// On which host.
        host: String,
        /// Its record's epoch when it was started or restored.
        epoch: u64,
        /// The counter after it.
        counter: u64,
    },
    /// A copy stood still.
    Frozen(String),
    /// A copy went on after it stood still.
    Resumed(String),
    /// A copy was restored.
    Restored(String),
    /// A copy ended, by [`Guest::stop`] or [`Guest::discard`].
    Ended(String),
    /// Something that must never be.
    Violation(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Inside {
    counter: u64,
    /// The packets that it has acknowledged.
    received: Vec<u64>,
    seed: u64,
}

#[derive(Clone, Debug)]
struct Copy {
    inside: Inside,
    memory: Vec<u8>,
    options: FakeOptions,
    root: PathBuf,
    epoch: u64,
    is_frozen: bool,
}

#[derive(Default)]
struct Seen {
    /// By host and guest.
    copies: BTreeMap<(String, GuestName), Copy>,
    /// Those that have ended with a dump, and the files that it wrote.
    dumped: BTreeMap<(String, GuestName), (Copy, PathBuf)>,
    events: Vec<Event>,
    /// The highest counter that anybody saw, by guest.
    counters: BTreeMap<GuestName, u64>,
    epochs: BTreeMap<GuestName, u64>,
    acknowledged: BTreeMap<GuestName, Vec<u64>>,
    faults: BTreeMap<(String, Call), Vec<When>>,
    /// What hosts are like, by name.
    surroundings: BTreeMap<String, Surroundings>,
    /// How much memory is left on hosts, if it is another amount than what pre-flight finds.
    left: BTreeMap<String, u64>,
}

/// Everything outside of the hosts' programs. Clones share it.
#[derive(Clone, Default)]
pub struct World(Arc<Mutex<Seen>>);

impl World {
    /// A world without guests.
    pub fn new() -> World {
        World::default()
    }

    /// Lets the next call of `call` on `host` fail; several are used up one after the other.
    pub fn fail(&self, host: &str, call: Call, when: When) {
        self.0.lock().faults.entry((host.to_owned(), call)).or_default().push(when);
    }

    /// Takes back the faults that haven't come yet.
    pub fn heal(&self) {
        self.0.lock().faults.clear();
    }

    /// Makes `host` what guests run on.
    pub fn furnish(&self, host: &str, surroundings: Surroundings) {
        self.0.lock().surroundings.insert(host.to_owned(), surroundings);
    }

    /// Leaves `bytes` of memory on `host`, which its pre-flight doesn't see yet.
    pub fn leave(&self, host: &str, bytes: u64) {
        self.0.lock().left.insert(host.to_owned(), bytes);
    }

    /// Lets every running copy take a step.
    pub fn tick(&self) {
        let mut seen = self.0.lock();
        let running: Vec<_> =
            seen.copies.iter().filter(|(_, copy)| !copy.is_frozen).map(|(key, _)| key.clone()).collect();
        for key in running {
            seen.step(&key);
        }
    }

    /// Lets the frozen copy of `guest` on `host` go on, as if what held it had been killed.
    pub fn thaw(&self, host: &str, guest: &GuestName) {
        if let Some(copy) = self.0.lock().copies.get_mut(&(host.to_owned(), guest.clone())) {
            copy.is_frozen = false;
        }
    }

    /// A client sends packet `number`. Returns whether a copy acknowledged it; if not, the client would send it again.
    pub fn send(&self, guest: &GuestName, number: u64) -> bool {
        let mut seen = self.0.lock();
        let running = |((_, name), copy): &(&(String, GuestName), &mut Copy)| name == guest && !copy.is_frozen;
        let Some((_, copy)) = seen.copies.iter_mut().find(running) else { return false };
        copy.inside.received.push(number);
        seen.acknowledged.entry(guest.clone()).or_default().push(number);
        true
    }

    /// What happened so far.
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().events.clone()
    }

    /// On which hosts `guest` runs.
    pub fn running(&self, guest: &GuestName) -> Vec<String> {
        self.hosts(guest, false)
    }

    /// On which hosts `guest` stands still.
    pub fn frozen(&self, guest: &GuestName) -> Vec<String> {
        self.hosts(guest, true)
    }

    fn hosts(&self, guest: &GuestName, is_frozen: bool) -> Vec<String> {
        let seen = self.0.lock();
        let chosen = seen.copies.iter().filter(|((_, name), copy)| name == guest && copy.is_frozen == is_frozen);
        chosen.map(|((host, _), _)| host.clone()).collect()
    }

    /// The counter of the copy on `host`.
    pub fn counter(&self, host: &str, guest: &GuestName) -> Option<u64> {
        self.0.lock().copies.get(&(host.to_owned(), guest.clone())).map(|copy| copy.inside.counter)
    }

    /// What must never be and was, with what is wrong now: packets that were acknowledged and that no copy has.
    pub fn violations(&self) -> Vec<String> {
        let seen = self.0.lock();
        let mut found: Vec<String> = seen
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Violation(text) => Some(text.clone()),
                _ => None,
            })
            .collect();
        for (guest, packets) in &seen.acknowledged {
            let copies = || seen.copies.iter().filter(|((_, name), _)| name == guest).map(|(_, copy)| copy);
            let is_lost = |packet: &&u64| !copies().any(|copy| copy.inside.received.contains(packet));
            found.extend(packets.iter().filter(is_lost).map(|packet| format!("{guest} has lost packet {packet}")));
        }
        found
    }

    /// Ends everything on `host`, as a power cut does.
    pub fn crash(&self, host: &str) {
        let mut seen = self.0.lock();
        seen.copies.retain(|(there, _), _| there != host);
        seen.dumped.retain(|(there, _), _| there != host);
    }

    fn fault(&self, host: &str, call: Call, when: When) -> Option<Error> {
        let mut seen = self.0.lock();
        let faults = seen.faults.get_mut(&(host.to_owned(), call))?;
        if faults.first() != Some(&when) {
            return None;
        }
        faults.remove(0);
        let detail = match when {
            When::InFlight => "unix: Found a closed in-flight socket to 0x7".to_owned(),
            _ => format!("{call:?} was made to fail"),
        };
        Some(Error::Guest { action: "reach", guest: host.to_owned(), detail })
    }

    fn guarded<T>(&self, host: &str, call: Call, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Some(fault) = [When::Before, When::InFlight].into_iter().find_map(|when| self.fault(host, call, when)) {
            return Err(fault);
        }
        let done = work()?;
        self.fault(host, call, When::After).map_or(Ok(done), Err)
    }
}

impl Seen {
    fn step(&mut self, key: &(String, GuestName)) {
        let others = self.copies.iter().filter(|(other, copy)| other.1 == key.1 && !copy.is_frozen).count();
        let Some(copy) = self.copies.get_mut(key) else { return };
        copy.step();
        let (counter, epoch, host) = (copy.inside.counter, copy.epoch, key.0.clone());
        let highest = self.counters.entry(key.1.clone()).or_default();
        let latest = self.epochs.entry(key.1.clone()).or_default();
        let mut wrong = Vec::new();
        if others > 1 {
            wrong.push(format!("{others} copies of {} run", key.1));
        }
        if counter <= *highest {
            wrong.push(format!("{} counts to {counter} again on {host}, after {highest}", key.1));
        }
        if epoch < *latest {
            wrong.push(format!("{} runs on {host} in epoch {epoch}, after {latest}", key.1));
        }
        *highest = counter.max(*highest);
        *latest = epoch.max(*latest);
        self.events.push(Event::Step { host, epoch, counter });
        self.events.extend(wrong.into_iter().map(Event::Violation));
    }
}

impl Copy {
    fn step(&mut self) {
        self.inside.counter += 1;
        let pages = self.options.pages.max(1) as u64;
        for _ in 0..self.options.changed_pages {
            let seed = &mut self.inside.seed;
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = ((*seed >> 33) % pages) as usize * PAGE;
            let noise = seed.to_le_bytes();
            self.memory[at..at + PAGE].chunks_mut(8).enumerate().for_each(|(number, word)| {
                word.copy_from_slice(&noise);
                word[0] = word[0].wrapping_add(number as u8);
            });
        }
        let line = format!("{:0width$}\n", self.inside.counter, width = self.options.disk_bytes.saturating_sub(1));
        let mut steps = std::fs::read(self.root.join(DISK_FILE)).unwrap_or_default();
        steps.extend_from_slice(line.as_bytes());
        // A test's folder that can't be written shows in the test.
        let _ = std::fs::write(self.root.join(DISK_FILE), steps);
    }
}

/// A guest on a fake host.
pub struct FakeGuest {
    record: GuestRecord,
    options: FakeOptions,
    host: Arc<dyn Host>,
    label: String,
    world: World,
}

impl FakeGuest {
    fn key(&self) -> (String, GuestName) {
        (self.label.clone(), self.record.spec.name.clone())
    }

    fn failed(&self, action: &'static str, detail: &str) -> Error {
        Error::guest(action, &self.record.spec.name, detail)
    }

    fn note(&self, event: fn(String) -> Event) {
        self.world.0.lock().events.push(event(self.label.clone()));
    }

    fn appear(&self, action: &'static str, inside: Inside, memory: Vec<u8>) -> Result<()> {
        let mut seen = self.world.0.lock();
        if seen.copies.contains_key(&self.key()) {
            return Err(self.failed(action, "there is one already"));
        }
        let root = self.host.root(&self.record.spec.name);
        if !root.is_dir() {
            return Err(self.failed(action, "its root isn't mounted"));
        }
        let (options, epoch) = (self.options.clone(), self.record.epoch);
        let copy = Copy { inside, memory, options, root, epoch, is_frozen: false };
        seen.copies.insert(self.key(), copy);
        Ok(())
    }

    fn write(&self, action: &'static str, copy: &Copy, into: &Path) -> Result<Written> {
        let state = serde_json::to_vec(&copy.inside).map_err(|e| self.failed(action, &e.to_string()))?;
        let save = |name: &str, bytes: &[u8]| {
            let path = into.join(name);
            std::fs::write(&path, bytes).map_err(|e| layerfs::Error::file("write", path, e))
        };
        save(MEMORY_FILE, &copy.memory)?;
        save(STATE_FILE, &state)?;
        let (memory_bytes, other_bytes) = (copy.memory.len() as u64, state.len() as u64);
        Ok(Written { memory_bytes, other_bytes, frozen: Duration::ZERO, has_ended: false })
    }

    fn end(&self) {
        let mut seen = self.world.0.lock();
        let was_there = seen.copies.remove(&self.key()).is_some() | seen.dumped.remove(&self.key()).is_some();
        drop(seen);
        if was_there {
            self.note(Event::Ended);
        }
    }
}

impl Guest for FakeGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let fault = self.world.fault(&self.label, Call::Preflight, When::Before);
        Ok(fault.map(|_| Obstacle::new(format!("{side:?} was made to fail"), "call heal")).into_iter().collect())
    }

    fn surroundings(&self) -> Result<Surroundings> {
        Ok(self.world.0.lock().surroundings.get(&self.label).cloned().unwrap_or_default())
    }

    fn start(&self) -> Result<()> {
        self.world.guarded(&self.label, Call::Start, || {
            let memory = vec![0; self.options.pages * PAGE];
            self.appear("start", Inside { counter: 0, received: Vec::new(), seed: 1 }, memory)?;
            // A program that begins anew may count anew.
            self.world.0.lock().counters.remove(&self.record.spec.name);
            self.note(Event::Started);
            Ok(())
        })
    }

    fn stop(&self) -> Result<()> {
        self.world.guarded(&self.label, Call::Stop, || {
            self.end();
            Ok(())
        })
    }

    fn exec(&self, argv: &[OsString], pipes: Pipes, _: &dyn Monitor) -> Result<i32> {
        match self.status()?.activity {
            Activity::Running => {
                let words: Vec<_> = argv.iter().map(|word| word.to_string_lossy()).collect();
                let written = File::from(pipes.stdout).write_all(words.join(" ").as_bytes());
                written.map_err(|error| self.failed("run a command in", &error.to_string()))?;
                Ok(0)
            }
            _ => Err(self.failed("run a command in", "it isn't running")),
        }
    }

    fn status(&self) -> Result<Status> {
        self.world.guarded(&self.label, Call::Status, || {
            let seen = self.world.0.lock();
            let copy = seen.copies.get(&self.key());
            let is_dumped = || seen.dumped.get(&self.key()).is_some_and(|(_, files)| files.join(STATE_FILE).exists());
            let activity = match copy {
                None if is_dumped() => Activity::Frozen,
                None => Activity::Absent,
                Some(copy) if copy.is_frozen => Activity::Frozen,
                Some(_) => Activity::Running,
            };
            Ok(Status { activity, pid: None, memory_bytes: copy.map(|copy| copy.memory.len() as u64) })
        })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        self.world.guarded(&self.label, Call::Scan, || {
            let copy = self.world.0.lock().copies.get(&self.key()).cloned();
            let copy = copy.ok_or_else(|| self.failed("scan", "it isn't running"))?;
            self.write("scan", &copy, into)
        })
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        self.world.guarded(&self.label, Call::Dump, || {
            let mut seen = self.world.0.lock();
            let copy = seen.copies.get_mut(&self.key()).ok_or_else(|| self.failed("dump", "it isn't running"))?;
            copy.is_frozen = true;
            let copy = copy.clone();
            seen.events.push(Event::Frozen(self.label.clone()));
            if self.options.ends_with_dump {
                seen.copies.remove(&self.key());
                seen.dumped.insert(self.key(), (copy.clone(), into.to_owned()));
            }
            drop(seen);
            let written = self.write("dump", &copy, into)?;
            Ok(Written { has_ended: self.options.ends_with_dump, ..written })
        })
    }

    fn resume(&self) -> Result<()> {
        self.world.guarded(&self.label, Call::Resume, || {
            let mut seen = self.world.0.lock();
            if let Some((copy, files)) = seen.dumped.remove(&self.key())
                && files.join(STATE_FILE).exists()
            {
                seen.copies.insert(self.key(), copy);
            }
            let copy = seen.copies.get_mut(&self.key()).ok_or_else(|| self.failed("resume", "there is none"))?;
            if std::mem::take(&mut copy.is_frozen) {
                seen.events.push(Event::Resumed(self.label.clone()));
            }
            Ok(())
        })
    }

    fn discard(&self) -> Result<()> {
        self.world.guarded(&self.label, Call::Discard, || {
            self.end();
            Ok(())
        })
    }

    fn restore(&self, from: &Path, _: Manner) -> Result<()> {
        self.restored(from, &from.join(MEMORY_FILE))
    }

    fn restore_with(&self, from: &Path, memory: File) -> Result<()> {
        self.restored(from, Path::new(&format!("/proc/self/fd/{}", memory.as_raw_fd())))
    }
}

impl FakeGuest {
    fn restored(&self, from: &Path, memory: &Path) -> Result<()> {
        self.world.guarded(&self.label, Call::Restore, || {
            let load = |path: &Path| std::fs::read(path).map_err(|e| layerfs::Error::file("read", path, e));
            let inside: Inside = serde_json::from_slice(&load(&from.join(STATE_FILE))?)
                .map_err(|e| layerfs::Error::corrupt("fake guest's state", e.to_string()))?;
            self.appear("restore", inside, load(memory)?)?;
            self.note(Event::Restored);
            Ok(())
        })
    }
}

/// A host with plain folders in the place of mounts: a stack is exported into its folder, and sealing imports it again.
pub struct FakeHost {
    label: String,
    store: Arc<Store>,
    folder: PathBuf,
    world: World,
    /// What each guest's root lies on, and what was on its disk then.
    mounted: Mutex<BTreeMap<GuestName, (LayerId, Vec<u8>)>>,
}

impl FakeHost {
    /// The host called `label` in the `world`, with guests' files in `folder`.
    pub fn new(label: &str, store: Arc<Store>, folder: &Path, world: &World) -> Arc<FakeHost> {
        let (label, folder, world) = (label.to_owned(), folder.to_owned(), world.clone());
        Arc::new(FakeHost { label, store, folder, world, mounted: Mutex::default() })
    }

    fn made(&self, guest: &GuestName, part: &str) -> Result<PathBuf> {
        let path = self.folder.join(guest.as_str()).join(part);
        std::fs::create_dir_all(&path).map_err(|e| layerfs::Error::file("make", &path, e))?;
        Ok(path)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(layerfs::Error::file("remove", path, e).into()),
            _ => Ok(()),
        }
    }

    fn steps(&self, guest: &GuestName) -> Vec<u8> {
        std::fs::read(self.root(guest).join(DISK_FILE)).unwrap_or_default()
    }

    fn export(&self, layer: LayerId, to: &Path) -> Result<()> {
        self.remove(to)?;
        if let Some(above) = to.parent() {
            std::fs::create_dir_all(above).map_err(|e| layerfs::Error::file("make", above, e))?;
        }
        let to = Destination { path: to.to_owned(), format: Format::Folder, tag: None };
        export(&self.store, layer, &to, &Silent)?;
        Ok(())
    }
}

impl Host for FakeHost {
    fn root(&self, guest: &GuestName) -> PathBuf {
        self.folder.join(guest.as_str()).join("root")
    }

    fn run_folder(&self, guest: &GuestName) -> Result<PathBuf> {
        self.made(guest, "run")
    }

    fn scratch(&self, guest: &GuestName, _: u64) -> Result<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.made(guest, &format!("scratch/{}", NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    fn remove_scratch(&self, _: &GuestName, path: &Path) -> Result<()> {
        self.remove(path)?;
        // What else is in the folder above is somebody else's.
        let _ = path.parent().map(std::fs::remove_dir);
        Ok(())
    }

    fn remove_scratches(&self, guest: &GuestName) -> Result<()> {
        self.remove(&self.folder.join(guest.as_str()).join("scratch"))
    }

    fn memory(&self) -> Option<u64> {
        let seen = self.world.0.lock();
        seen.left.get(&self.label).copied().or_else(|| seen.surroundings.get(&self.label)?.memory)
    }

    fn mount(&self, guest: &GuestName, stack: LayerId) -> Result<PathBuf> {
        self.world.guarded(&self.label, Call::Mount, || {
            let root = self.root(guest);
            let mut mounted = self.mounted.lock();
            match mounted.get(guest) {
                Some((there, _)) if *there == stack => return Ok(root),
                Some(_) => return Err(layerfs::Error::Busy(format!("{guest} lies on another stack")).into()),
                None => {}
            }
            self.export(stack, &root)?;
            mounted.insert(guest.clone(), (stack, self.steps(guest)));
            Ok(root)
        })
    }

    fn has_changed(&self, guest: &GuestName, stack: LayerId) -> Result<bool> {
        if self.mounted.lock().get(guest).is_some_and(|(there, _)| *there != stack) {
            return Ok(true);
        }
        self.mount(guest, stack)?;
        Ok(self.mounted.lock().get(guest).is_none_or(|(_, steps)| *steps != self.steps(guest)))
    }

    fn seal(&self, guest: &GuestName, name: &LayerName) -> Result<LayerId> {
        self.world.guarded(&self.label, Call::Seal, || {
            let mut mounted = self.mounted.lock();
            let below = mounted.get(guest).ok_or_else(|| Error::guest("seal", guest, "it isn't mounted"))?.0;
            let options = ImportOptions {
                expect: Expect::Any,
                kind: Some(LayerKind::Instance),
                parent: Some(below),
                whole: true,
                ..ImportOptions::new(name.clone())
            };
            let report = import(&self.store, SourceSpec::Path(self.root(guest)), &options, &Silent)?;
            let top = report.layers.last().map_or(below, |layer| layer.id);
            mounted.insert(guest.clone(), (top, self.steps(guest)));
            Ok(top)
        })
    }

    fn fold(&self, _: &GuestName, _: &LayerName, _: usize) -> Result<Option<LayerId>> {
        Ok(None)
    }

    fn unmount(&self, guest: &GuestName, _: bool) -> Result<()> {
        self.world.guarded(&self.label, Call::Unmount, || {
            if self.mounted.lock().remove(guest).is_some() {
                self.remove(&self.root(guest))?;
            }
            Ok(())
        })
    }

    fn open_layer(&self, guest: &GuestName, layer: LayerId) -> Result<PathBuf> {
        let path = self.made(guest, "state")?;
        self.export(layer, &path)?;
        Ok(path)
    }

    fn close_layer(&self, guest: &GuestName) -> Result<()> {
        self.remove(&self.folder.join(guest.as_str()).join("state"))
    }
}

/// The fakes of one host.
pub struct FakeDrivers {
    /// The host's name in the world.
    pub label: String,
    /// Where they live.
    pub world: World,
}

impl Drivers for FakeDrivers {
    fn guest(&self, record: &GuestRecord, host: Arc<dyn Host>) -> Result<Arc<dyn Guest>> {
        if record.spec.driver != DRIVER {
            return Err(layerfs::Error::invalid(format!("there is no driver {:?} here", record.spec.driver)).into());
        }
        let options = serde_json::from_value(record.spec.options.clone())
            .map_err(|e| layerfs::Error::invalid(format!("a fake guest's options: {e}")))?;
        let (label, world) = (self.label.clone(), self.world.clone());
        Ok(Arc::new(FakeGuest { record: record.clone(), options, host, label, world }))
    }
}

#[cfg(test)]
mod tests;
