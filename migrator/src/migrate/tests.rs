//! Two hosts with real stores and real links, and a guest that only the test's world knows.

mod faults;
mod whole;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use layerfs::LayerId;
use layerfs::import::{ImportOptions, SourceSpec, import};
use layerfs::monitor::Silent;
use layerfs::store::{Store, StoreOptions};

use super::*;
use crate::guest::fake::{Call, DRIVER, FakeDrivers, FakeHost, When, World};
use crate::guest::{GuestSpec, GuestState, Surroundings};
use crate::peers::{PeerName, Rights};
use crate::tests::pair::name as layer_name;
use crate::wire::Message;
use crate::{Listener, NodeOptions};

/// Lets a host's program die at a journal's write, or that fail.
#[derive(Default)]
pub(super) struct Faults {
    is_dead: AtomicBool,
    /// The write at which it dies; 0: none. Counted down.
    at: AtomicU32,
    /// After it, not before.
    after: AtomicBool,
    /// The write at which its disk is full; 0: none. Counted down.
    full_at: AtomicU32,
    is_full: AtomicBool,
    /// The write of which it isn't told whether it was done; 0: none. Counted down.
    doubtful_at: AtomicU32,
    /// It was done.
    is_done: AtomicBool,
    pub cut: Arc<Cut>,
}

/// Cuts the way to the other host at one of this host's questions.
#[derive(Default)]
pub(super) struct Cut {
    /// The question at which; 0: none. Counted down.
    at: AtomicU32,
    /// Its answer is lost, not the question.
    answer: AtomicBool,
    /// Nothing gets through from then on.
    stays: AtomicBool,
    is_down: AtomicBool,
}

impl Cut {
    pub fn cut_at(&self, question: u32, answer: bool, stays: bool) {
        self.at.store(question, SeqCst);
        self.answer.store(answer, SeqCst);
        self.stays.store(stays, SeqCst);
    }

    pub fn set_down(&self, is_down: bool) {
        self.is_down.store(is_down, SeqCst);
    }

    fn gone<T>(&self) -> Result<T> {
        Err(Error::Closed { peer: "beyond the cut".to_owned() })
    }

    /// Returns whether the answer will be lost. What only asks isn't counted: nobody knows how often that is.
    pub fn before(&self, message: &Message) -> Result<bool> {
        if self.is_down.load(SeqCst) {
            return self.gone();
        }
        if matches!(message, Message::Inquire { .. }) {
            return Ok(false);
        }
        if self.at.load(SeqCst) == 0 || self.at.fetch_sub(1, SeqCst) != 1 {
            return Ok(false);
        }
        self.set_down(self.stays.load(SeqCst));
        if self.answer.load(SeqCst) { Ok(true) } else { self.gone() }
    }

    pub fn after(&self, is_lost: bool) -> Result<()> {
        if is_lost { self.gone() } else { Ok(()) }
    }
}

impl Faults {
    pub fn die_at(&self, write: u32, after: bool) {
        self.at.store(write, SeqCst);
        self.after.store(after, SeqCst);
    }

    /// Refuses that write and all others, until there is room again.
    pub fn fill_at(&self, write: u32) {
        self.full_at.store(write, SeqCst);
    }

    pub fn is_full(&self) -> bool {
        self.is_full.load(SeqCst)
    }

    pub fn make_room(&self) {
        self.full_at.store(0, SeqCst);
        self.is_full.store(false, SeqCst);
    }

    /// Fails that write as a disk does that fills while the engine writes.
    pub fn doubt_at(&self, write: u32, is_done: bool) {
        self.doubtful_at.store(write, SeqCst);
        self.is_done.store(is_done, SeqCst);
    }

    pub fn die(&self) {
        self.is_dead.store(true, SeqCst);
    }

    pub fn is_dead(&self) -> bool {
        self.is_dead.load(SeqCst)
    }

    pub fn alive(&self) -> Result<()> {
        // As the other side sees it: the connection is gone.
        if self.is_dead() { Err(Error::Closed { peer: "a dead host".to_owned() }) } else { Ok(()) }
    }

    pub fn journal(&self, after: bool) -> Result<(), WriteError> {
        let strikes = |at: &AtomicU32| at.load(SeqCst) > 0 && at.fetch_sub(1, SeqCst) == 1;
        let lives = || match self.is_dead() {
            true => Err(WriteError::Unsure(layerfs::Error::Busy("the host is dead".to_owned()))),
            false => Ok(()),
        };
        lives()?;
        if !after && (strikes(&self.full_at) || self.is_full()) {
            self.is_full.store(true, SeqCst);
            let full = layerfs::Error::file("write to", "index", rustix::io::Errno::NOSPC);
            return Err(WriteError::NotWritten(full));
        }
        if self.is_done.load(SeqCst) == after && strikes(&self.doubtful_at) {
            return Err(WriteError::Unsure(layerfs::Error::Index("No space left on device".to_owned())));
        }
        if self.after.load(SeqCst) == after && strikes(&self.at) {
            self.die();
        }
        lives()
    }
}

pub(super) struct Site {
    pub label: &'static str,
    pub folder: PathBuf,
    pub store: Arc<Store>,
    pub node: Node,
    pub guests: Guests,
    pub host: Arc<FakeHost>,
    pub migrations: Migrations,
    pub listener: Listener,
}

pub(super) struct Two {
    pub world: World,
    pub a: Site,
    pub b: Site,
    pub name: GuestName,
    _folder: tempfile::TempDir,
}

pub(super) fn timing() -> Timing {
    Timing {
        lease: Duration::from_millis(300),
        // Longer than a busy machine stands still; a host that is dead is waited for as long.
        patience: Duration::from_millis(5000),
        frozen_patience: Duration::from_millis(5000),
        sending_patience: Duration::from_secs(60),
        commit_patience: Duration::from_millis(5000),
        pauses: (Duration::from_millis(10), Duration::from_millis(50)),
    }
}

fn migrations(
    label: &str,
    node: &Node,
    guests: &Guests,
    host: &Arc<FakeHost>,
    world: &World,
    timing: Timing,
) -> Migrations {
    let drivers = Arc::new(FakeDrivers { label: label.to_owned(), world: world.clone() });
    let hooks = Arc::new(HookFolder(PathBuf::from("/nonexistent")));
    Migrations::new(node, guests, drivers, host.clone(), hooks, timing)
}

async fn site(label: &'static str, folder: PathBuf, world: &World) -> Site {
    let store = Store::open(&folder.join("store"), StoreOptions::create()).unwrap();
    let node = Node::open(store.clone(), NodeOptions::default()).unwrap();
    let guests = Guests::new(store.clone());
    let host = FakeHost::new(label, store.clone(), &folder.join("guests"), world);
    let migrations = migrations(label, &node, &guests, &host, world, timing());
    let listener = node.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
    Site { label, folder, store, node, guests, host, migrations, listener }
}

impl Site {
    /// The program is started anew.
    pub async fn restart(&mut self, world: &World) {
        self.migrations.0.faults.die();
        self.migrations = migrations(self.label, &self.node, &self.guests, &self.host, world, timing());
        let migrations = self.migrations.clone();
        spawn_blocking(move || migrations.recover()).await.unwrap().unwrap();
    }

    pub fn faults(&self) -> &Faults {
        &self.migrations.0.faults
    }

    fn base(&self) -> LayerId {
        let tree = self.folder.join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("program"), crate::tests::pair::noise(1, 100_000)).unwrap();
        let options = ImportOptions::new(layer_name("app"));
        import(&self.store, SourceSpec::Path(tree), &options, &Silent).unwrap().layers[0].id
    }

    fn know(&self, called: &str, other: &Site, address: String) {
        let rights = Rights { guests: true, ..Rights::default() };
        let (name, key) = (PeerName::new(called).unwrap(), other.node.public_key());
        self.node.peers().add(Peer { name, address: Some(address), key, rights }).unwrap();
    }

    pub fn state(&self, name: &GuestName) -> Option<(GuestState, u64)> {
        self.guests.find(name).unwrap().map(|record| (record.state, record.epoch))
    }
}

impl Two {
    /// A guest runs on `a`.
    pub async fn new() -> Two {
        Two::reaching(|address| address).await
    }

    /// The same; `a` reaches `b` at another address than it listens on.
    pub async fn reaching(address_of_b: impl FnOnce(String) -> String) -> Two {
        Two::with_pages(64, address_of_b).await
    }

    /// The same, of a guest with so many pages of memory.
    pub async fn with_pages(pages: usize, address_of_b: impl FnOnce(String) -> String) -> Two {
        Two::with_options(serde_json::json!({ "pages": pages, "changed_pages": 2 }), address_of_b).await
    }

    /// The same, of a guest with these options.
    pub async fn with_options(options: serde_json::Value, address_of_b: impl FnOnce(String) -> String) -> Two {
        let folder = tempfile::tempdir().unwrap();
        let world = World::new();
        let a = site("a", folder.path().join("a"), &world).await;
        let b = site("b", folder.path().join("b"), &world).await;
        a.know("b", &b, address_of_b(b.listener.address().to_string()));
        b.know("a", &a, a.listener.address().to_string());
        let name = GuestName::new("web").unwrap();
        let base = a.base();
        let spec = GuestSpec { name: name.clone(), driver: DRIVER.to_owned(), stack: layer_name("app"), options };
        let record = GuestRecord { state: GuestState::Running, ..GuestRecord::new(spec) };
        a.guests.add(&record).unwrap();
        a.host.mount(&name, base).unwrap();
        let drivers = FakeDrivers { label: "a".to_owned(), world: world.clone() };
        drivers.guest(&record, a.host.clone()).unwrap().start().unwrap();
        world.tick();
        assert!(world.send(&name, 1));
        Two { world, a, b, name, _folder: folder }
    }

    /// Moves it from `a` to `b`, or the other way.
    pub async fn migrate(&self, back: bool, options: MigrateOptions) -> Result<Report> {
        let (from, to) = if back { (&self.b, "a") } else { (&self.a, "b") };
        let (migrations, name) = (from.migrations.clone(), self.name.clone());
        spawn_blocking(move || migrations.migrate(&name, to, options, Arc::new(Silent))).await.unwrap()
    }

    /// Waits until neither side has anything left to do. That takes as long as it takes; a test that hangs here has
    /// found a move that never ends.
    pub async fn settle(&self) {
        loop {
            let open = |site: &Site| site.migrations.0.journal.open_of(&self.name).unwrap();
            let (a, b) = (open(&self.a), open(&self.b));
            if a.is_none() && b.is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The machine of `a` dies with all that runs on it, and comes back; waits until neither side has anything left to do.
    pub async fn reboot_a(&mut self) {
        self.world.crash("a");
        self.a.restart(&self.world).await;
        self.settle().await;
    }

    /// Nothing was ever wrong, and just one copy runs, which its records know. Returns where.
    pub fn check(&self) -> String {
        self.world.tick();
        assert!(self.world.send(&self.name, 99), "nobody answers");
        let what = format!("{:?} {:?} {:?}", self.world.events(), self.a.state(&self.name), self.b.state(&self.name));
        assert_eq!(self.world.violations(), Vec::<String>::new(), "{what}");
        let running = self.world.running(&self.name);
        assert_eq!(running.len(), 1, "{what}");
        assert_eq!(self.world.frozen(&self.name), Vec::<String>::new(), "{what}");
        let (here, there) = if running[0] == "a" { (&self.a, &self.b) } else { (&self.b, &self.a) };
        assert_eq!(here.state(&self.name).map(|(state, _)| state), Some(GuestState::Running), "{what}");
        assert!(there.state(&self.name).is_none_or(|(state, _)| state == GuestState::Away), "{what}");
        running[0].clone()
    }

    /// How the latest move from `a` ended, as its report says.
    pub async fn reported(&self) -> String {
        loop {
            let report = report::find(&self.a.store, "").unwrap();
            if !report.is_open() {
                return report.outcome;
            }
            // It says so a moment after the journal does.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn fail(&self, host: &str, call: Call, when: When) {
        self.world.fail(host, call, when);
    }
}
