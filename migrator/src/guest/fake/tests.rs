//! The fake keeps its word, so that tests over it mean something.

use std::sync::atomic::AtomicBool;

use layerfs::monitor::Monitor;
use layerfs::store::StoreOptions;

use super::*;
use crate::guest::checkpoint::{Hosted, States};
use crate::guest::{GuestSpec, GuestState, Guests, dump, state};

struct Here {
    _folder: tempfile::TempDir,
    store: Arc<Store>,
    world: World,
    hosts: Vec<Arc<FakeHost>>,
    name: GuestName,
    base: LayerId,
}

fn here() -> Here {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), "base").unwrap();
    let options = ImportOptions::new(LayerName::new("base").unwrap());
    let report = import(&store, SourceSpec::Path(tree), &options, &Silent).unwrap();
    let world = World::new();
    let host = |label: &str| FakeHost::new(label, store.clone(), &folder.path().join(label), &world);
    let hosts = vec![host("a"), host("b")];
    let name = GuestName::new("web").unwrap();
    Here { store, world, hosts, name, base: report.layers[0].id, _folder: folder }
}

impl Here {
    fn guest(&self, host: usize, epoch: u64) -> Arc<dyn Guest> {
        let spec = GuestSpec {
            name: self.name.clone(),
            driver: DRIVER.to_owned(),
            stack: LayerName::new("base").unwrap(),
            options: serde_json::json!({ "pages": 64 }),
        };
        let record = GuestRecord { epoch, ..GuestRecord::new(spec) };
        let label = self.hosts[host].label.clone();
        FakeDrivers { label, world: self.world.clone() }.guest(&record, self.hosts[host].clone()).unwrap()
    }

    /// Whether states are left on the first host.
    fn has_scratch(&self) -> bool {
        self.hosts[0].folder.join(self.name.as_str()).join("scratch").exists()
    }

    /// Moves it from `a` to `b`, without ending it at `a`.
    fn moved(&self) -> (Arc<dyn Guest>, Arc<dyn Guest>) {
        let (a, b) = (self.guest(0, 0), self.guest(1, 1));
        self.hosts[0].mount(&self.name, self.base).unwrap();
        a.start().unwrap();
        self.world.tick();
        assert!(self.world.send(&self.name, 7));
        let into = self.hosts[0].scratch(&self.name, 0).unwrap();
        a.dump(&into).unwrap();
        let instance = self.hosts[0].seal(&self.name, &self.name.layer("instance").unwrap()).unwrap();
        let (state, _) = state::import(&self.store, &into, &self.name.layer("state").unwrap(), None, &Silent).unwrap();
        self.hosts[1].mount(&self.name, instance).unwrap();
        b.restore(&self.hosts[1].open_layer(&self.name, state).unwrap(), Manner::Whole).unwrap();
        (a, b)
    }
}

#[test]
fn a_guest_moves_with_its_memory_and_its_disk() {
    let here = here();
    let (a, b) = here.moved();
    a.discard().unwrap();
    here.world.tick();
    assert_eq!(b.status().unwrap().activity, Activity::Running);
    assert_eq!(a.status().unwrap().activity, Activity::Absent);
    assert_eq!(here.world.counter("b", &here.name), Some(2));
    let steps = std::fs::read_to_string(here.hosts[1].root(&here.name).join(DISK_FILE)).unwrap();
    assert_eq!(steps, "000000000000001\n000000000000002\n");
    assert_eq!(here.world.violations(), Vec::<String>::new());
}

#[test]
fn what_must_never_be_is_noticed() {
    let here = here();
    let (a, b) = here.moved();
    a.resume().unwrap();
    here.world.tick();
    assert!(here.world.violations().iter().any(|text| text == "2 copies of web run"));
    b.discard().unwrap();
    a.discard().unwrap();
    assert!(here.world.violations().iter().any(|text| text == "web has lost packet 7"));
}

#[test]
fn a_frozen_one_answers_nobody_and_faults_come_when_they_shall() {
    let here = here();
    here.hosts[0].mount(&here.name, here.base).unwrap();
    let guest = here.guest(0, 0);
    here.world.fail("a", Call::Start, When::Before);
    assert!(guest.start().is_err());
    assert_eq!(guest.status().unwrap().activity, Activity::Absent);
    guest.start().unwrap();
    here.world.fail("a", Call::Dump, When::After);
    assert!(guest.dump(&here.hosts[0].scratch(&here.name, 0).unwrap()).is_err());
    assert_eq!(here.world.frozen(&here.name), ["a"]);
    assert!(!here.world.send(&here.name, 1));
    here.world.tick();
    assert_eq!(here.world.counter("a", &here.name), Some(0));
    guest.resume().unwrap();
    here.world.tick();
    assert_eq!(here.world.counter("a", &here.name), Some(1));
    assert_eq!(here.world.violations(), Vec::<String>::new());
}

/// Runs `work` on a guest that runs on the first host, one that stays there with its dump and one that ends with it.
fn with_each_kind(work: impl Fn(&Here, &Hosted<'_>, &dyn Guest)) {
    for ends_with_dump in [false, true] {
        let here = here();
        let options = serde_json::json!({ "pages": 64, "ends_with_dump": ends_with_dump });
        let (driver, stack) = (DRIVER.to_owned(), LayerName::new("base").unwrap());
        let spec = GuestSpec { name: here.name.clone(), driver, stack, options };
        let record = GuestRecord { state: GuestState::Running, ..GuestRecord::new(spec) };
        let guests = Guests::new(here.store.clone());
        guests.add(&record).unwrap();
        let drivers = FakeDrivers { label: "a".to_owned(), world: here.world.clone() };
        let host = here.hosts[0].clone();
        host.mount(&here.name, here.base).unwrap();
        let guest = drivers.guest(&record, host.clone()).unwrap();
        guest.start().unwrap();
        work(&here, &Hosted { guests: &guests, drivers: &drivers, host }, &*guest);
        assert_eq!(here.world.violations(), Vec::<String>::new());
    }
}

/// Cancels a checkpoint when its state is about to be stored.
#[derive(Default)]
struct Cancels(AtomicBool);

impl Monitor for Cancels {
    fn phase(&self, name: &str, _: Option<u64>) {
        self.0.fetch_or(name == "storing", Ordering::Relaxed);
    }

    fn advance(&self, _: u64) {}

    fn items(&self, _: u64) {}

    fn warn(&self, _: &str) {}

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[test]
fn a_guest_whose_checkpoint_fails_goes_on() {
    with_each_kind(|here, hosted, _| {
        for (call, when) in [(Call::Dump, When::Before), (Call::Dump, When::After), (Call::Seal, When::Before)] {
            here.world.fail("a", call, when);
            assert!(hosted.checkpoint(&here.name, "evening", false, &Silent).is_err());
            assert_eq!(here.world.running(&here.name), ["a"], "{call:?} {when:?}");
            here.world.tick();
        }
        hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap();
    });
}

#[test]
fn an_earlier_checkpoint_is_whole_until_the_next_one_is() {
    with_each_kind(|here, hosted, _| {
        let names = Hosted::names(&here.name, "evening").unwrap();
        let layers = || [&names.0, &names.1].map(|name| here.store.name(name).unwrap().map(|record| record.layer));
        let named = || here.store.names().unwrap().len();
        hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap();
        let (before, count) = (layers(), named());
        here.world.tick();
        for cancels in [false, true] {
            let cancelled = Cancels::default();
            if !cancels {
                here.world.fail("a", Call::Resume, When::Before);
            }
            let monitor: &dyn Monitor = if cancels { &cancelled } else { &Silent };
            assert!(hosted.checkpoint(&here.name, "evening", false, monitor).is_err());
            assert_eq!((layers(), named()), (before, count), "{cancels}");
            here.world.tick();
        }
        hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap();
        let after = layers();
        assert!(after.iter().zip(&before).all(|(after, before)| after.is_some() && after != before), "{after:?}");
        assert_eq!(named(), count);
    });
}

#[test]
fn a_guest_ends_only_when_its_state_is_stored() {
    with_each_kind(|here, hosted, _| {
        here.world.tick();
        assert!(here.world.send(&here.name, 1));
        assert!(hosted.checkpoint(&here.name, "evening", true, &Cancels::default()).is_err());
        assert_eq!(here.world.running(&here.name), ["a"]);
        assert!(!here.has_scratch());
        here.world.tick();
        // One that can't be removed stands still, and may go on.
        here.world.fail("a", Call::Discard, When::Before);
        assert!(hosted.checkpoint(&here.name, "evening", true, &Silent).is_err());
        assert!(here.world.running(&here.name).is_empty());
        hosted.wake(&hosted.guests.get(&here.name).unwrap()).unwrap();
        assert_eq!(here.world.running(&here.name), ["a"]);
        assert!(!here.has_scratch());
        here.world.tick();
        hosted.checkpoint(&here.name, "evening", true, &Silent).unwrap();
        assert!(here.world.running(&here.name).is_empty() && !here.has_scratch());
        let (state, _) = Hosted::names(&here.name, "evening").unwrap();
        let layer = here.store.name(&state).unwrap().unwrap().layer;
        hosted.restore(&here.name, layer, Some(state)).unwrap();
        here.world.tick();
        assert_eq!(here.world.counter("a", &here.name), Some(4));
    });
}

#[test]
fn a_move_hides_no_checkpoint() {
    with_each_kind(|here, hosted, _| {
        let latest = || hosted.latest(&here.name, hosted.guests.find(&here.name).unwrap().as_ref()).unwrap();
        assert_eq!(latest(), None);
        for tag in ["evening", "morning"] {
            hosted.checkpoint(&here.name, tag, false, &Silent).unwrap();
        }
        assert_eq!(latest(), Some(Hosted::names(&here.name, "morning").unwrap()));
        // As a move puts it on record, whose state says not what it is of.
        let (state, instance) = (here.name.layer("state").unwrap(), here.name.layer("instance").unwrap());
        let on_record = || {
            let change = |record: &mut GuestRecord| {
                (record.state_layer, record.instance) = (Some(state.clone()), Some(instance.clone()));
                Ok(())
            };
            hosted.guests.update(&here.name, change).unwrap();
        };
        on_record();
        assert_eq!(latest(), Some(Hosted::names(&here.name, "morning").unwrap()), "it came to nothing");
        here.store.set_name(&state, here.base, Expect::Any).unwrap();
        assert_eq!(latest(), Some(Hosted::names(&here.name, "morning").unwrap()));
        here.store.remove_name(&Hosted::names(&here.name, "morning").unwrap().0).unwrap();
        assert_eq!(latest(), Some(Hosted::names(&here.name, "evening").unwrap()));
        // Many are looked for at once; the names of others, and of what is no state, are none of it.
        let states = States::new(&here.store);
        for other in ["guest/web/state", "guest/web2/noon/state", "guest/web/noon/instance", "web/noon/state"] {
            here.store.set_name(&LayerName::new(other).unwrap(), here.base, Expect::Any).unwrap();
        }
        let record = hosted.guests.get(&here.name).unwrap();
        assert_eq!(hosted.latest_of(&here.name, Some(&record), &states).unwrap(), latest());
        here.store.set_name(&LayerName::new("guest/web/noon/state").unwrap(), here.base, Expect::Any).unwrap();
        assert_eq!(latest(), hosted.latest_of(&here.name, Some(&record), &states).unwrap());
        let other = GuestName::new("other").unwrap();
        assert_eq!(hosted.latest_of(&other, None, &states).unwrap(), None);
        // Nobody has it on record where its layers were pushed to.
        assert_eq!(hosted.latest(&here.name, None).unwrap(), latest());
        let layer = here.store.name(&latest().unwrap().0).unwrap().unwrap().layer;
        hosted.guest(&hosted.guests.get(&here.name).unwrap()).unwrap().stop().unwrap();
        hosted.restore(&here.name, layer, latest().map(|(state, _)| state)).unwrap();
        assert_eq!(here.world.running(&here.name), ["a"]);
    });
}

#[test]
fn a_checkpoint_that_was_cut_off_loses_nothing() {
    with_each_kind(|here, hosted, guest| {
        here.world.tick();
        assert!(here.world.send(&here.name, 1));
        // The program that did this has died.
        guest.dump(&here.hosts[0].scratch(&here.name, 0).unwrap()).unwrap();
        assert!(here.world.running(&here.name).is_empty());
        hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap();
        assert_eq!(here.world.running(&here.name), ["a"]);
        assert!(!here.has_scratch());
        here.world.tick();
        assert_eq!(here.world.counter("a", &here.name), Some(2));
        // One that doesn't go on keeps what it may go on from.
        for _ in 0..2 {
            here.world.fail("a", Call::Resume, When::Before);
        }
        let error = hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap_err();
        assert!(error.to_string().contains("guest start web"), "{error}");
        assert!(here.has_scratch());
        hosted.wake(&hosted.guests.get(&here.name).unwrap()).unwrap();
        assert_eq!(here.world.running(&here.name), ["a"]);
        assert!(!here.has_scratch());
        here.world.tick();
    });
}

#[test]
fn a_dump_is_tried_again_if_what_was_in_the_way_passes() {
    let cancelled = Cancels(AtomicBool::new(true));
    let here = here();
    here.hosts[0].mount(&here.name, here.base).unwrap();
    let guest = here.guest(0, 0);
    guest.start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (mut told, into) = (Vec::new(), folder.path());
    let fails = |times: usize, when: When| (0..times).for_each(|_| here.world.fail("a", Call::Dump, when));
    let activity = || guest.status().unwrap().activity;

    fails(1, When::Before);
    assert!(dump(&*guest, into, &Silent, |error| told.push(error.to_string())).is_err());
    assert_eq!((told.len(), activity()), (0, Activity::Running));

    // What an attempt has left is no part of the state.
    std::fs::create_dir(into.join("left")).unwrap();
    std::fs::write(into.join("left/behind"), "").unwrap();
    fails(2, When::InFlight);
    dump(&*guest, into, &Silent, |error| told.push(error.to_string())).unwrap();
    assert!(told.len() == 2 && told[0].contains("in-flight") && !into.join("left").exists(), "{told:?}");
    assert_eq!(activity(), Activity::Frozen);
    guest.resume().unwrap();

    // Not for ever, and not for whom has given up.
    fails(20, When::InFlight);
    let error = dump(&*guest, into, &Silent, |_| {}).unwrap_err();
    assert!(error.to_string().contains("in-flight"), "{error}");
    let error = dump(&*guest, into, &cancelled, |_| panic!("it is tried again")).unwrap_err();
    assert!(matches!(error, Error::Store(layerfs::Error::Cancelled)), "{error}");
    assert_eq!(activity(), Activity::Running);
    here.world.heal();
    dump(&*guest, into, &cancelled, |_| {}).unwrap();
}
