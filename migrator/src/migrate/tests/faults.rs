//! What goes wrong while a guest moves: every call fails, every program dies at every write, every message is lost. In each
//! case exactly one copy runs in the end, nothing that was acknowledged is gone, and nobody was in anybody's way.

use super::*;
use crate::handover::Fate;
use crate::handover::destination::Event;
use layerfs::store::Expect;
use layerfs::store::db::{Batch, Cf, Sync};

/// Calls at each side that a migration makes.
const CALLS: [(&str, Call); 9] = [
    ("a", Call::Status),
    ("a", Call::Scan),
    ("a", Call::Dump),
    ("a", Call::Seal),
    ("a", Call::Discard),
    ("a", Call::Unmount),
    ("b", Call::Mount),
    ("b", Call::Restore),
    ("b", Call::Status),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_call_may_fail() {
    for (host, call) in CALLS {
        for when in [When::Before, When::After] {
            let two = Two::new().await;
            two.fail(host, call, when);
            let outcome = two.migrate(false, MigrateOptions::default()).await;
            two.settle().await;
            two.world.heal();
            let runs = two.check();
            let expected = match (call, when) {
                (Call::Discard | Call::Unmount, _) | (Call::Restore, When::After) => "b",
                _ => "a",
            };
            assert_eq!(runs, expected, "{host} {call:?} {when:?}: {outcome:?}");
            // And the next time it moves.
            if runs == "a" {
                two.migrate(false, MigrateOptions::default()).await.unwrap();
                assert_eq!(two.check(), "b", "{host} {call:?} {when:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cant_be_restored_goes_back_or_waits_for_a_word() {
    let two = Two::new().await;
    two.fail("b", Call::Restore, When::Before);
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("gave it back"), "{error}");
    two.settle().await;
    assert_eq!(two.check(), "a");
    assert_eq!(
        (two.a.state(&two.name), two.b.state(&two.name).map(|b| b.1)),
        (Some((GuestState::Running, 2)), Some(1))
    );

    let stays = MigrateOptions { gives_back: false, ..MigrateOptions::default() };
    // Whoever asked the source because it was silent for a while tries again too.
    (0..100).for_each(|_| two.fail("b", Call::Restore, When::Before));
    let error = two.migrate(false, stays).await.unwrap_err();
    assert!(error.to_string().contains("guest resolve"), "{error}");
    assert_eq!((two.world.running(&two.name), two.world.frozen(&two.name)), (vec![], vec!["a".to_owned()]));
    two.world.heal();
    // The operator there tries again, unless that was faster.
    let (there, name) = (two.b.migrations.clone(), two.name.clone());
    let tried = spawn_blocking(move || there.resolve(&name, Resolution::RunHere)).await.unwrap();
    two.settle().await;
    assert_eq!(two.check(), "b", "{tried:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_die_at_every_write() {
    for side in ["a", "b"] {
        for after in [false, true] {
            for write in 1..=8 {
                let mut two = Two::new().await;
                let faults = if side == "a" { two.a.faults() } else { two.b.faults() };
                faults.die_at(write, after);
                let outcome = two.migrate(false, MigrateOptions::default()).await;
                let died = if side == "a" { two.a.faults().is_dead() } else { two.b.faults().is_dead() };
                let world = two.world.clone();
                world.tick();
                if died {
                    if side == "a" { two.a.restart(&world).await } else { two.b.restart(&world).await }
                }
                two.settle().await;
                let runs = two.check();
                let told = two.reported().await;
                assert!(if runs == "b" { told == "moved" } else { told != "moved" }, "{side} {after} {write}: {told}");
                if !died {
                    assert_eq!(runs, "b", "{side} {after} {write}: {outcome:?}");
                    break;
                }
                if runs == "a" {
                    two.migrate(false, MigrateOptions::default()).await.unwrap();
                    assert_eq!(two.check(), "b");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_its_program_doesnt_see_the_end_of_is_reported_all_the_same() {
    // Before anything is written; before it stops; stopped, with layers; before it is released, and after.
    for (write, after, ends) in
        [(1, false, "aborted"), (2, false, "aborted"), (3, true, "aborted"), (4, false, "aborted"), (4, true, "moved")]
    {
        let mut two = Two::new().await;
        two.a.faults().die_at(write, after);
        assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
        assert_eq!(report::find(&two.a.store, "").unwrap().outcome, "running", "{write} {after}");
        let world = two.world.clone();
        two.a.restart(&world).await;
        two.settle().await;
        assert_eq!(two.reported().await, ends, "{write} {after}");
        let report = report::find(&two.a.store, "").unwrap();
        assert!(report.decisions.iter().any(|why| why.contains("daemon ended")), "{report:?}");
        assert_eq!(report.rounds.is_empty(), write < 2, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_a_write_leaves_no_move_to_nobody() {
    for side in ["a", "b"] {
        for is_restored in [true, false] {
            for write in 1..=8 {
                let two = Two::new().await;
                if !is_restored {
                    (0..10_000).for_each(|_| two.fail("b", Call::Restore, When::Before));
                }
                let faults = if side == "a" { two.a.faults() } else { two.b.faults() };
                faults.fill_at(write);
                let outcome = two.migrate(false, MigrateOptions::default()).await;
                let was_full = faults.is_full();
                two.world.tick();
                faults.make_room();
                two.settle().await;
                let runs = two.check();
                let case = format!("{side} {is_restored} {write}: {outcome:?}");
                if !was_full {
                    assert_eq!(runs, if is_restored { "b" } else { "a" }, "{case}");
                    break;
                }
                assert!(write < 8, "{case}");
                assert!(two.a.migrations.0.unsure.lock().is_empty(), "{case}");
                assert!(two.b.migrations.0.unsure.lock().is_empty(), "{case}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_went_on_and_ended_while_the_disk_is_full_stays_so() {
    for side in ["a", "b"] {
        let mut went_on = 0;
        for resolution in [None, Some(Resolution::RunHere), Some(Resolution::GiveUp)] {
            for write in 1..=8 {
                let two = Two::new().await;
                let site = if side == "a" { &two.a } else { &two.b };
                site.faults().fill_at(write);
                let _ = two.migrate(false, MigrateOptions::default()).await;
                if !site.faults().is_full() {
                    break;
                }
                let (here, name) = (site.migrations.clone(), two.name.clone());
                let open = here.0.journal.open_of(&name).unwrap();
                let row = open.filter(|row| row.layers.is_some() && two.world.running(&name) == [side]);
                if let Some(row) = &row {
                    went_on += 1;
                    two.world.tick();
                    if let Some(resolution) = resolution {
                        let (here, name) = (here.clone(), name.clone());
                        assert!(spawn_blocking(move || here.resolve(&name, resolution)).await.unwrap().is_err());
                        assert_eq!(two.world.running(&two.name), [side], "it was ended");
                    }
                    here.guest_of(row).unwrap().stop().unwrap();
                }
                site.faults().make_room();
                two.settle().await;
                let runs = two.world.running(&name);
                let there = (runs.len(), two.world.frozen(&name));
                assert_eq!(there, (usize::from(row.is_none()), vec![]), "{side} {write} {row:?}");
            }
        }
        assert!(went_on > 0, "{side}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_went_on_is_ended_for_its_source_that_took_it_though_the_row_is_missing() {
    let two = Two::new().await;
    // It has been restored, which can't be written.
    two.b.faults().fill_at(4);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    assert_eq!(two.world.running(&two.name), ["b"]);
    let (here, name) = (two.a.migrations.clone(), two.name.clone());
    spawn_blocking(move || here.resolve(&name, Resolution::RunHere)).await.unwrap().unwrap();
    while two.world.running(&two.name) != ["a"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    two.b.faults().make_room();
    two.settle().await;
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_went_on_at_its_source_and_died_unwritten_isnt_brought_back_over_its_newer_disk() {
    for has_written in [false, true] {
        let mut two = Two::new().await;
        // That it is released can't be written, nor that it has gone on.
        two.a.faults().fill_at(4);
        assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
        assert_eq!(two.world.running(&two.name), ["a"]);
        if has_written {
            two.world.tick();
        }
        two.reboot_a().await;
        if !has_written {
            assert_eq!(two.check(), "a");
            continue;
        }
        assert_eq!(two.world.running(&two.name), Vec::<String>::new());
        assert_eq!(two.a.state(&two.name).map(|(state, _)| state), Some(GuestState::Created));
        let row = &two.a.migrations.moves().unwrap()[0];
        assert!(row.note.contains("newer than that state") && row.note.contains("guest start"), "{row:?}");
        let steps = std::fs::read(two.a.host.root(&two.name).join(crate::guest::fake::DISK_FILE)).unwrap();
        assert_eq!(steps.len(), 2 * 16, "its disk is lost");
        assert_eq!(two.b.state(&two.name), None);
        let is_wrong = |event: &crate::guest::fake::Event| matches!(event, crate::guest::fake::Event::Violation(_));
        assert!(!two.world.events().iter().any(is_wrong), "{:?}", two.world.events());
    }
}

/// A guest that has been restored at `b`, which can't be written there; it has changed its disk, and died with its machine.
async fn died_unwritten(has_written: bool) -> Two {
    let mut two = Two::new().await;
    two.b.faults().fill_at(4);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    assert_eq!(two.world.running(&two.name), ["b"]);
    if has_written {
        two.world.tick();
    }
    two.world.crash("b");
    let world = two.world.clone();
    two.b.restart(&world).await;
    two
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_went_on_and_died_unwritten_isnt_brought_back_over_its_newer_disk_unless_somebody_decides() {
    let two = died_unwritten(false).await;
    two.settle().await;
    assert_eq!(two.check(), "b");
    for (resolution, runs) in [(Resolution::RunHere, None), (Resolution::GiveUp, Some("a"))] {
        let two = died_unwritten(true).await;
        let decide = |resolution| {
            let (there, name) = (two.b.migrations.clone(), two.name.clone());
            spawn_blocking(move || there.resolve(&name, resolution))
        };
        // The source says that it is released.
        let row = decide(Resolution::Ask).await.unwrap().unwrap();
        assert_eq!((row.fate(), two.world.running(&two.name)), (Fate::Committed, vec![]));
        assert!(row.note.contains("newer than that state") && row.note.contains("--give-up"), "{row:?}");
        assert_eq!(two.world.frozen(&two.name), ["a"]);
        decide(resolution).await.unwrap().unwrap();
        two.settle().await;
        let running = two.world.running(&two.name);
        assert_eq!((running.first().map(String::as_str), two.world.frozen(&two.name)), (runs, vec![]));
        if runs.is_none() {
            assert_eq!(two.b.state(&two.name).map(|(state, _)| state), Some(GuestState::Created));
            let steps = std::fs::read(two.b.host.root(&two.name).join(crate::guest::fake::DISK_FILE)).unwrap();
            assert_eq!(steps.len(), 2 * 16, "its disk is lost");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_whose_disk_nothing_can_be_said_isnt_given_back() {
    let mut two = Two::new().await;
    two.b.faults().fill_at(4);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    two.world.tick();
    two.world.crash("b");
    (0..10_000).for_each(|_| two.fail("b", Call::Mount, When::Before));
    let world = two.world.clone();
    two.b.restart(&world).await;
    let (there, name) = (two.b.migrations.clone(), two.name.clone());
    let row = spawn_blocking(move || there.resolve(&name, Resolution::Ask)).await.unwrap().unwrap();
    assert_eq!((row.fate(), two.world.running(&two.name)), (Fate::Committed, vec![]));
    let steps = std::fs::read(two.b.host.root(&two.name).join(crate::guest::fake::DISK_FILE)).unwrap();
    assert_eq!(steps.len(), 2 * 16, "its disk is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_that_came_to_nothing_has_left_on_the_disk_goes_before_the_next() {
    let two = Two::new().await;
    (0..10_000).for_each(|_| two.fail("b", Call::Restore, When::Before));
    let stays = MigrateOptions { gives_back: false, ..MigrateOptions::default() };
    assert!(two.migrate(false, stays).await.is_err());
    let steps = two.b.host.root(&two.name).join(crate::guest::fake::DISK_FILE);
    let before = std::fs::read(&steps).unwrap();
    std::fs::write(&steps, "what it did before that failed").unwrap();
    two.world.heal();
    let (there, name) = (two.b.migrations.clone(), two.name.clone());
    let _ = spawn_blocking(move || there.resolve(&name, Resolution::RunHere)).await.unwrap();
    two.settle().await;
    assert_eq!(std::fs::read(&steps).unwrap(), before);
    assert_eq!(two.check(), "b");
}

/// Spoils the row of a move when its guest is taken back, and keeps what it was.
struct Spoils {
    store: Arc<Store>,
    journal: crate::handover::journal::Journal,
    name: GuestName,
    kept: Mutex<Option<(Vec<u8>, Vec<u8>)>>,
}

impl Spoils {
    fn put(&self, key: &[u8], row: &[u8]) {
        let mut batch = Batch::new();
        batch.put(Cf::Transfers, key, row);
        self.store.db().write(batch, Sync::Yes).unwrap();
    }

    fn mend(&self) {
        let (key, row) = self.kept.lock().take().unwrap();
        self.put(&key, &row);
    }
}

impl layerfs::monitor::Monitor for Spoils {
    fn phase(&self, name: &str, _: Option<u64>) {
        if name == "taking it back" {
            let row = self.journal.open_of(&self.name).unwrap().unwrap();
            let key = [&b"move/"[..], &row.id.0].concat();
            let bytes = self.store.db().get(Cf::Transfers, &key).unwrap().unwrap();
            self.put(&key, b"nothing");
            *self.kept.lock() = Some((key, bytes));
        }
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_row_cant_be_read_when_it_is_taken_back_goes_on_as_soon_as_it_can() {
    let two = Two::new().await;
    two.fail("a", Call::Dump, When::After);
    let (store, journal) = (two.a.store.clone(), two.a.migrations.0.journal.clone());
    let monitor = Arc::new(Spoils { store, journal, name: two.name.clone(), kept: Mutex::default() });
    let (migrations, name, spoils) = (two.a.migrations.clone(), two.name.clone(), monitor.clone());
    let moved = spawn_blocking(move || migrations.migrate(&name, "b", MigrateOptions::default(), spoils));
    assert!(moved.await.unwrap().is_err());
    assert_eq!(two.world.frozen(&two.name), ["a"]);
    monitor.mend();
    two.settle().await;
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_at_the_destination_may_take_longer_than_it_may_be_out_of_reach() {
    struct Slow;
    impl Hooks for Slow {
        fn run(&self, point: HookPoint, _: &Row) -> Result<()> {
            if point == HookPoint::BeforeRestore {
                std::thread::sleep(timing().frozen_patience + Duration::from_secs(1));
            }
            Ok(())
        }
    }
    let mut two = Two::new().await;
    let drivers = Arc::new(FakeDrivers { label: "b".to_owned(), world: two.world.clone() });
    let b = &mut two.b;
    b.migrations = Migrations::new(&b.node, &b.guests, drivers, b.host.clone(), Arc::new(Slow), timing());
    two.migrate(false, MigrateOptions::default()).await.unwrap();
    two.settle().await;
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_may_be_written_or_not_rests_until_the_program_begins_anew() {
    for side in ["a", "b"] {
        for (is_restored, is_done) in [(true, true), (true, false), (false, true), (false, false)] {
            for write in 1..=8 {
                let mut two = Two::new().await;
                if !is_restored {
                    (0..10_000).for_each(|_| two.fail("b", Call::Restore, When::Before));
                }
                let faults = if side == "a" { two.a.faults() } else { two.b.faults() };
                faults.doubt_at(write, is_done);
                let outcome = two.migrate(false, MigrateOptions::default()).await;
                let was_doubtful = faults.doubtful_at.load(SeqCst) == 0;
                let world = two.world.clone();
                world.tick();
                // Whatever the background does meanwhile, it doesn't do it by a row that may not hold.
                tokio::time::sleep(Duration::from_millis(50)).await;
                world.tick();
                let case = format!("{side} {is_restored} {is_done} {write}: {outcome:?}");
                if was_doubtful {
                    if (side, write) == ("a", 4) {
                        assert_eq!((world.running(&two.name), world.frozen(&two.name)), (vec![], vec!["a".to_owned()]));
                    }
                    if side == "a" { two.a.restart(&world).await } else { two.b.restart(&world).await }
                }
                two.settle().await;
                let runs = two.check();
                if !was_doubtful {
                    assert_eq!(runs, if is_restored { "b" } else { "a" }, "{case}");
                    break;
                }
                assert!(write < 8, "{case}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_after_the_end_is_written_isnt_in_doubt() {
    /// Cancels the copying; what the guest does isn't known then.
    struct Cancelled(World, AtomicBool);
    impl layerfs::monitor::Monitor for Cancelled {
        fn phase(&self, name: &str, _: Option<u64>) {
            if name.starts_with("ahead") && !self.1.swap(true, SeqCst) {
                self.0.fail("a", Call::Status, When::Before);
            }
        }
        fn advance(&self, _: u64) {}
        fn items(&self, _: u64) {}
        fn warn(&self, _: &str) {}
        fn is_cancelled(&self) -> bool {
            self.1.load(SeqCst)
        }
    }
    let two = Two::new().await;
    let (migrations, name) = (two.a.migrations.clone(), two.name.clone());
    let monitor = Arc::new(Cancelled(two.world.clone(), AtomicBool::new(false)));
    let moved = spawn_blocking(move || migrations.migrate(&name, "b", MigrateOptions::default(), monitor));
    let error = moved.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("runs on here"), "{error}");
    assert!(two.a.migrations.0.unsure.lock().is_empty());
    two.settle().await;
    assert_eq!(two.check(), "a");
    // It was told so, and hasn't given up waiting.
    assert_eq!(two.b.migrations.moves().unwrap()[0].note, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_doubt_nothing_starts_and_the_operator_decides() {
    // The source dies when it has released the guest, before it could say so.
    let mut two = Two::new().await;
    two.a.faults().die_at(4, true);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    let (there, name) = (two.b.migrations.clone(), two.name.clone());
    assert!(there.open_move(&name).unwrap().is_in_doubt());
    assert_eq!((two.world.running(&name), two.world.frozen(&name)), (vec![], vec!["a".to_owned()]));
    assert_eq!(two.b.state(&name), Some((GuestState::Arriving, 0)));
    let asked = spawn_blocking({
        let (there, name) = (there.clone(), name.clone());
        move || there.resolve(&name, Resolution::Ask)
    });
    assert!(asked.await.unwrap().unwrap().is_in_doubt(), "the source doesn't answer");
    assert!(two.world.running(&name).is_empty());
    two.world.leave("b", 0);
    let forced = spawn_blocking({
        let name = name.clone();
        move || there.resolve(&name, Resolution::RunHere)
    });
    forced.await.unwrap().unwrap();
    assert_eq!(two.world.running(&name), ["b"], "whatever is thought of its room");
    let world = two.world.clone();
    two.a.restart(&world).await;
    two.settle().await;
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_destination_leaves_the_source_frozen_until_it_is_told_to_go_on() {
    let mut two = Two::new().await;
    // It has committed, and dies before it restores.
    two.b.faults().die_at(3, true);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    assert_eq!((two.world.running(&two.name), two.world.frozen(&two.name)), (vec![], vec!["a".to_owned()]));
    let (here, name) = (two.a.migrations.clone(), two.name.clone());
    spawn_blocking(move || here.resolve(&name, Resolution::RunHere)).await.unwrap().unwrap();
    assert_eq!(two.world.running(&two.name), ["a"]);
    // When it comes back, it hears that it was given up, and keeps away.
    let world = two.world.clone();
    two.b.restart(&world).await;
    two.settle().await;
    assert_eq!(two.check(), "a");
    assert_eq!(two.a.state(&two.name), Some((GuestState::Running, 2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_dies_with_its_guest_restores_it_from_its_state() {
    // The destination refuses, and meanwhile the frozen copy is lost.
    let mut two = Two::new().await;
    two.a.faults().die_at(4, true);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    let (there, name) = (two.b.migrations.clone(), two.name.clone());
    spawn_blocking(move || there.resolve(&name, Resolution::GiveUp)).await.unwrap().unwrap();
    two.reboot_a().await;
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_dies_before_the_release_goes_on_from_the_layers() {
    // What the stop left is noted, and the machine dies with the frozen copy.
    let mut two = Two::new().await;
    two.a.faults().die_at(3, true);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    two.reboot_a().await;
    assert_eq!(two.check(), "a");
}

/// A guest that ends with its dump.
async fn ending() -> Two {
    Two::with_options(serde_json::json!({ "pages": 64, "ends_with_dump": true }), |address| address).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_has_ended_with_its_dump_goes_on_from_its_files_whatever_fails_then() {
    for fails_to_resume in [0, 5] {
        let two = ending().await;
        two.fail("a", Call::Dump, When::After);
        (0..fails_to_resume).for_each(|_| two.fail("a", Call::Resume, When::Before));
        let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err();
        assert!(error.to_string().contains("made to fail"), "{error}");
        two.settle().await;
        assert_eq!(two.check(), "a", "{fails_to_resume}: {error}");
        assert!(!two.a.folder.join("guests/web/scratch").exists(), "its state is left");
        two.migrate(false, MigrateOptions::default()).await.unwrap();
        assert_eq!(two.check(), "b");
        assert!(!two.a.folder.join("guests/web/scratch").exists(), "its state is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_in_memory_goes_when_another_program_ends_the_move() {
    // It has noted what the stop left; it has released the guest.
    for (write, runs) in [(3, "a"), (4, "b")] {
        let mut two = ending().await;
        two.a.faults().die_at(write, true);
        assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
        let world = two.world.clone();
        two.a.restart(&world).await;
        two.settle().await;
        assert_eq!(two.check(), runs);
        assert!(!two.a.folder.join("guests/web/scratch").exists(), "{write}: its state is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_never_began_leaves_the_state_that_a_guest_may_go_on_from() {
    let two = ending().await;
    let drivers = FakeDrivers { label: "a".to_owned(), world: two.world.clone() };
    let guest = drivers.guest(&two.a.guests.get(&two.name).unwrap(), two.a.host.clone()).unwrap();
    guest.dump(&two.a.host.scratch(&two.name, 0).unwrap()).unwrap();
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("doesn't run"), "{error}");
    guest.resume().unwrap();
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_which_nothing_is_left_ends_its_move_and_may_be_started() {
    let two = ending().await;
    two.fail("a", Call::Dump, When::After);
    (0..1000).for_each(|_| two.fail("a", Call::Resume, When::Before));
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    std::fs::remove_dir_all(two.a.folder.join("guests/web/scratch")).unwrap();
    two.world.heal();
    two.settle().await;
    assert_eq!(two.a.state(&two.name).map(|(state, _)| state), Some(GuestState::Created));
    let rows = two.a.migrations.moves().unwrap();
    assert!(rows[0].note.contains("is lost here") && rows[0].note.contains("guest start"), "{:?}", rows[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cant_go_on_here_may_be_given_up_and_begun_anew() {
    let two = ending().await;
    two.fail("a", Call::Dump, When::After);
    (0..10_000).for_each(|_| two.fail("a", Call::Resume, When::Before));
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    let give_up = || {
        let (here, name) = (two.a.migrations.clone(), two.name.clone());
        spawn_blocking(move || here.resolve(&name, Resolution::GiveUp))
    };
    // What can't be done is told to the operator, who may say it again.
    (0..3).for_each(|_| two.fail("a", Call::Stop, When::Before));
    assert!(give_up().await.unwrap().is_err());
    assert!(!two.a.migrations.open_move(&two.name).unwrap().is_ended());
    let row = give_up().await.unwrap().unwrap();
    assert!(row.is_ended() && row.note.contains("guest start"), "{row:?}");
    assert_eq!((row.fate(), two.world.running(&two.name)), (Fate::Aborted, vec![]));
    assert_eq!(two.a.state(&two.name).map(|(state, _)| state), Some(GuestState::Created));
    assert!(!two.a.folder.join("guests/web/scratch").exists(), "its state is left");
    two.settle().await;
    assert_eq!(two.b.state(&two.name), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_a_guest_that_was_taken_back_and_given_up() {
    let mut two = Two::new().await;
    // It has committed, and dies before it restores.
    two.b.faults().die_at(3, true);
    assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
    let decide = |resolution| {
        let (here, name) = (two.a.migrations.clone(), two.name.clone());
        spawn_blocking(move || here.resolve(&name, resolution))
    };
    // It goes on, and that fails all the same.
    (0..10_000).for_each(|_| two.fail("a", Call::Resume, When::After));
    assert!(decide(Resolution::RunHere).await.unwrap().is_err());
    assert_eq!(two.world.running(&two.name), ["a"]);
    (0..3).for_each(|_| two.fail("a", Call::Discard, When::Before));
    assert!(decide(Resolution::GiveUp).await.unwrap().is_err());
    assert_eq!(two.a.migrations.open_move(&two.name).unwrap().fate(), Fate::Aborted);
    let row = decide(Resolution::GiveUp).await.unwrap().unwrap();
    assert_eq!((row.fate(), two.world.running(&two.name)), (Fate::Released, vec![]));
    // The destination may have it now.
    let world = two.world.clone();
    two.b.restart(&world).await;
    two.settle().await;
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_lacks_what_the_guest_may_use_is_found_before_anything_changes() {
    let two = Two::new().await;
    let with = |abilities: &[&str], kernel| Surroundings {
        abilities: abilities.iter().map(|ability| (*ability).to_owned()).collect(),
        kernel: Some(kernel),
        ..Surroundings::default()
    };
    two.world.furnish("a", with(&["avx2", "avx512f"], (6, 18)));
    two.world.furnish("b", with(&["avx2"], (6, 1)));
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("avx512f") && error.contains("6.1"), "{error}");
    assert_eq!((two.check(), two.b.state(&two.name)), ("a".to_owned(), None));
    // An older kernel may be enough; a processor that lacks something isn't.
    let forced = MigrateOptions { any_kernel: true, ..MigrateOptions::default() };
    let error = two.migrate(false, forced).await.unwrap_err().to_string();
    assert!(error.contains("avx512f") && !error.contains("6.1"), "{error}");
    two.world.furnish("b", with(&["avx2", "avx512f", "amx_tile"], (6, 1)));
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("6.1") && error.contains("--force-kernel"), "{error}");
    let report = two.migrate(false, forced).await.unwrap();
    assert!(report.decisions.iter().any(|why| why.contains("kernel")), "{report:?}");
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_not_come_where_its_memory_has_no_room() {
    let two = Two::new().await;
    let with = |memory| Surroundings { memory: Some(memory), ..Surroundings::default() };
    two.world.furnish("a", with(6 << 30));
    two.world.furnish("b", with(2 << 30));
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("6144 MiB") && error.contains("2048 MiB") && error.contains("--postcopy"), "{error}");
    assert_eq!((two.check(), two.b.state(&two.name)), ("a".to_owned(), None));
    // Something else takes it while the guest is on its way, of which nothing is kept there yet.
    two.world.furnish("a", with(1 << 20));
    two.world.furnish("b", with(1 << 20));
    two.world.leave("b", 0);
    let at_once = MigrateOptions { rounds: Rounds::Exactly(0), ..MigrateOptions::default() };
    let error = two.migrate(false, at_once).await.unwrap_err().to_string();
    assert!(error.contains("1 MiB of memory") && error.contains("end something here"), "{error}");
    two.settle().await;
    assert_eq!(two.check(), "a");
    // The same once it is the destination's: it goes back, unless it can't. Then it is tried.
    let takes = |options: MigrateOptions| {
        two.world.leave("b", 1 << 40);
        let (world, migrations, name) = (two.world.clone(), two.a.migrations.clone(), two.name.clone());
        let monitor = At("restore", AtomicBool::new(false), move || world.leave("b", 0));
        spawn_blocking(move || migrations.migrate(&name, "b", options, Arc::new(monitor)))
    };
    let error = takes(at_once).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("gave it back") && error.contains("end something here"), "{error}");
    two.settle().await;
    assert_eq!(two.check(), "a");
    takes(MigrateOptions { gives_back: false, ..at_once }).await.unwrap().unwrap();
    assert_eq!(two.check(), "b");
    two.settle().await;
    two.migrate(true, at_once).await.unwrap();
    two.settle().await;
    assert_eq!(two.check(), "a");
    // What it needs not have at once may come later.
    let max_downtime = Some(std::time::Duration::from_millis(1));
    let lazily = MigrateOptions { post_copy: true, max_downtime, ..MigrateOptions::default() };
    two.world.furnish("a", with(6 << 30));
    two.migrate(false, lazily).await.unwrap();
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_question_and_answer_may_be_lost_for_a_while_or_for_long() {
    // Prepare twice (dry, then not), Stage, Commit; then Abort, if it comes to that.
    for question in 1..=4 {
        for answer in [false, true] {
            for stays in [false, true] {
                let two = Two::new().await;
                two.a.faults().cut.cut_at(question, answer, stays);
                two.b.faults().cut.set_down(stays);
                let outcome = two.migrate(false, MigrateOptions::default()).await;
                let case = format!("question {question}, answer {answer}, stays {stays}: {outcome:?}");
                assert_eq!(two.world.violations(), Vec::<String>::new(), "{case}");
                let runs = two.world.running(&two.name);
                let expected: &[&str] = match (stays, question) {
                    (false, _) => &["b"],
                    (true, 1..=3) => &["a"],
                    // Whether it has heard is what nobody here knows.
                    (true, _) if answer => &["b"],
                    (true, _) => &[],
                };
                assert_eq!(runs, expected, "{case}");
                assert_eq!(outcome.is_ok(), !stays, "{case}");
                two.world.tick();
                two.a.faults().cut.set_down(false);
                two.b.faults().cut.set_down(false);
                two.settle().await;
                let expected = if stays && question < 4 { "a" } else { "b" };
                assert_eq!(two.check(), expected, "{case}");
                // A move that never began leaves none.
                let told = if stays && question == 1 { None } else { Some(two.reported().await) };
                assert_eq!(told.is_some_and(|told| told == "moved"), expected == "b", "{case}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_leaves_it_where_it_is() {
    struct Cancelled(&'static str, AtomicBool);
    impl layerfs::monitor::Monitor for Cancelled {
        fn phase(&self, name: &str, _: Option<u64>) {
            self.1.fetch_or(name.starts_with(self.0), SeqCst);
        }
        fn advance(&self, _: u64) {}
        fn items(&self, _: u64) {}
        fn warn(&self, _: &str) {}
        fn is_cancelled(&self) -> bool {
            self.1.load(SeqCst)
        }
    }
    for (phase, runs) in
        [("ahead", "a"), ("round 1", "a"), ("stopping", "a"), ("send", "a"), ("stage", "a"), ("restore", "b")]
    {
        let two = Two::new().await;
        let (migrations, name) = (two.a.migrations.clone(), two.name.clone());
        let monitor = Arc::new(Cancelled(phase, AtomicBool::new(false)));
        let _ =
            spawn_blocking(move || migrations.migrate(&name, "b", MigrateOptions::default(), monitor)).await.unwrap();
        two.settle().await;
        assert_eq!(two.check(), runs, "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_taken_back_isnt_started_by_a_destination_that_comes_back_as_a_stranger() {
    for is_renamed in [true, false] {
        let mut two = Two::new().await;
        // It has committed, and dies before it restores.
        two.b.faults().die_at(3, true);
        assert!(two.migrate(false, MigrateOptions::default()).await.is_err());
        let (here, name) = (two.a.migrations.clone(), two.name.clone());
        let row = spawn_blocking(move || here.resolve(&name, Resolution::RunHere)).await.unwrap().unwrap();
        assert_eq!(two.world.running(&two.name), ["a"]);
        if is_renamed {
            let peers = two.a.node.peers();
            let old = peers.remove("b").unwrap();
            peers.add(Peer { name: PeerName::new("c").unwrap(), ..old }).unwrap();
        } else {
            let mut batch = Batch::new();
            batch.delete(Cf::Transfers, [&b"move/"[..], &row.id.0].concat());
            two.a.store.db().write(batch, Sync::Yes).unwrap();
        }
        let world = two.world.clone();
        two.b.restart(&world).await;
        if !is_renamed {
            let decide = |resolution| {
                let (there, name) = (two.b.migrations.clone(), two.name.clone());
                spawn_blocking(move || there.resolve(&name, resolution))
            };
            let asked = decide(Resolution::Ask).await.unwrap().unwrap();
            assert_eq!((asked.fate(), two.world.running(&two.name)), (Fate::Committed, vec!["a".to_owned()]));
            decide(Resolution::GiveUp).await.unwrap().unwrap();
        }
        two.settle().await;
        assert_eq!(two.check(), "a");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_isnt_expected_any_more_isnt_stopped() {
    for (event, why) in [(Event::Expired, "nothing was heard of a for"), (Event::GiveUp, "an operator gave it up")] {
        let two = Two::new().await;
        let file = two.a.host.root(&two.name).join(inhibit::FILE);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "defer").unwrap();
        let options = MigrateOptions { defer: Duration::from_secs(60), ..MigrateOptions::default() };
        let forget = async {
            while two.b.migrations.open_move(&two.name).is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let (there, row) = (two.b.migrations.clone(), two.b.migrations.open_move(&two.name).unwrap());
            spawn_blocking(move || there.arrive_on(row.id, event)).await.unwrap().unwrap();
            std::fs::write(&file, "now").unwrap();
        };
        let (outcome, ()) = tokio::join!(two.migrate(false, options), forget);
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        two.settle().await;
        assert_eq!(two.check(), "a");
        assert!(!two.world.events().contains(&crate::guest::fake::Event::Frozen("a".to_owned())), "{event:?}");
    }
}

/// Does something when a phase begins whose name begins so, once.
struct At<F>(&'static str, AtomicBool, F);

impl<F: Fn() + Send + std::marker::Sync> layerfs::monitor::Monitor for At<F> {
    fn phase(&self, name: &str, _: Option<u64>) {
        if name.starts_with(self.0) && !self.1.swap(true, SeqCst) {
            self.2();
        }
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Moves it to `b`, and does something when the phase `phase` begins.
async fn migrate_and(
    two: &Two,
    phase: &'static str,
    what: impl Fn() + Send + std::marker::Sync + 'static,
) -> Result<Report> {
    let (migrations, name) = (two.a.migrations.clone(), two.name.clone());
    let monitor = Arc::new(At(phase, AtomicBool::new(false), what));
    let moved = spawn_blocking(move || migrations.migrate(&name, "b", MigrateOptions::default(), monitor));
    moved.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_goes_on_by_itself_before_it_is_released_stays() {
    for phase in ["pack", "send", "stage"] {
        let two = Two::new().await;
        let (world, name) = (two.world.clone(), two.name.clone());
        let outcome = migrate_and(&two, phase, move || {
            world.thaw("a", &name);
            world.tick();
            assert!(world.send(&name, 7));
        });
        let error = outcome.await.unwrap_err().to_string();
        assert!(error.contains("runs again") && error.contains("runs on here"), "{phase}: {error}");
        two.settle().await;
        assert_eq!(two.check(), "a", "{phase}");
        two.migrate(false, MigrateOptions::default()).await.unwrap();
        assert_eq!(two.check(), "b", "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_by_itself_before_it_is_released_goes_on_from_its_state_here() {
    let two = Two::new().await;
    let world = two.world.clone();
    let error = migrate_and(&two, "stage", move || world.crash("a")).await.unwrap_err().to_string();
    assert!(error.contains("has ended meanwhile") && error.contains("runs on here"), "{error}");
    two.settle().await;
    assert_eq!(two.check(), "a");
}

/// Does `change` to all gates of what `a` sends.
fn at_gates(two: &Two, change: impl Fn(&crate::governor::Gate)) {
    let transfers = two.a.node.transfers();
    let running = transfers.list().into_iter().filter(|info| info.state == crate::transfers::State::Running);
    running.for_each(|info| change(transfers.get(info.id).unwrap().gate()));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_pauses_what_a_guest_that_stands_still_waits_for() {
    let two = Arc::new(Two::new().await);
    let inner = two.clone();
    let moved = migrate_and(&two, "stopped", move || {
        at_gates(&inner, |gate| {
            gate.change(|controls| controls.paused = true);
            // As if the destination said so.
            gate.asked(crate::governor::Pace { paused: true, ..Default::default() });
        });
    });
    tokio::time::timeout(Duration::from_secs(60), moved).await.expect("it waits").unwrap();
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_last_bytes_crawl_goes_on_here() {
    let mut two = Two::new().await;
    let timing = Timing { sending_patience: Duration::from_secs(1), ..timing() };
    two.a.migrations = migrations("a", &two.a.node, &two.a.guests, &two.a.host, &two.world, timing);
    let two = Arc::new(two);
    let (inner, began) = (two.clone(), Arc::new(Mutex::new(None)));
    let stopped = began.clone();
    // What it wrote last, more than goes in an hour.
    let file = two.a.host.root(&two.name).join("last");
    std::fs::write(&file, "").unwrap();
    let error = migrate_and(&two, "pack", move || {
        std::fs::write(&file, crate::tests::pair::noise(9, 4 << 20)).unwrap();
        *stopped.lock() = Some(std::time::Instant::now());
        let governor = inner.a.node.transfers().governor().clone();
        governor.set_limit(Some(Rate::new(1)));
    });
    let error = tokio::time::timeout(Duration::from_secs(60), error).await.expect("it waits").unwrap_err().to_string();
    assert!(error.contains("was not at b after") && error.contains("--max-downtime"), "{error}");
    assert!(error.contains("runs on here"), "{error}");
    assert!(began.lock().unwrap().elapsed() < Duration::from_secs(30));
    two.a.node.transfers().governor().set_limit(None);
    two.settle().await;
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_go_only_when_it_has_stopped_are_given_their_time() {
    let mut two = Two::new().await;
    let timing = Timing { sending_patience: Duration::from_millis(500), ..timing() };
    two.a.migrations = migrations("a", &two.a.node, &two.a.guests, &two.a.host, &two.world, timing);
    // A base, an application, and what the guest has written.
    let mut parent = None;
    for (number, bytes) in [(1, 1 << 20), (2, 14 << 20)] {
        let tree = two.a.folder.join(format!("layer-{number}"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("data"), crate::tests::pair::noise(number, bytes)).unwrap();
        let options = ImportOptions { parent, expect: Expect::Any, ..ImportOptions::new(layer_name("app")) };
        parent = Some(import(&two.a.store, SourceSpec::Path(tree), &options, &Silent).unwrap().layers[0].id);
    }
    std::fs::write(two.a.host.root(&two.name).join("last"), crate::tests::pair::noise(9, 8 << 20)).unwrap();
    // Less than is assumed of a link that nobody has measured, which this may stay, and more than a quarter of it.
    two.a.node.transfers().governor().set_limit(Some(Rate::new(4 << 20)));
    let two_layers = MigrateOptions { ahead: Ahead::Base, ..MigrateOptions::default() };
    let report = two.migrate(false, two_layers).await.unwrap();
    assert_eq!(two.check(), "b");
    let (sent, predicted) = (report.stage("send").unwrap(), report.predicted.unwrap());
    assert!(sent.bytes > 22 << 20 && sent.seconds > 4.0 * predicted.seconds, "{sent:?}, {predicted:?}");
}
