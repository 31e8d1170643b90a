//! The fake keeps its word, so that tests over it mean something.

use layerfs::store::StoreOptions;

use super::*;
use crate::guest::{GuestSpec, state};

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

#[test]
fn a_guest_whose_checkpoint_fails_goes_on() {
    for ends_with_dump in [false, true] {
        let here = here();
        let options = serde_json::json!({ "pages": 64, "ends_with_dump": ends_with_dump });
        let (driver, stack) = (DRIVER.to_owned(), LayerName::new("base").unwrap());
        let record = GuestRecord::new(GuestSpec { name: here.name.clone(), driver, stack, options });
        let guests = crate::guest::Guests::new(here.store.clone());
        guests.add(&record).unwrap();
        let drivers = FakeDrivers { label: "a".to_owned(), world: here.world.clone() };
        let host = here.hosts[0].clone();
        host.mount(&here.name, here.base).unwrap();
        drivers.guest(&record, host.clone()).unwrap().start().unwrap();
        let hosted = crate::guest::checkpoint::Hosted { guests: &guests, drivers: &drivers, host: host.clone() };
        for (call, when) in [(Call::Dump, When::Before), (Call::Dump, When::After), (Call::Seal, When::Before)] {
            here.world.fail("a", call, when);
            assert!(hosted.checkpoint(&here.name, "evening", false, &Silent).is_err());
            assert_eq!(here.world.running(&here.name), ["a"], "{call:?} {when:?}");
            here.world.tick();
        }
        hosted.checkpoint(&here.name, "evening", false, &Silent).unwrap();
        assert_eq!(here.world.violations(), Vec::<String>::new());
    }
}
