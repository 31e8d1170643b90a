//! Migrations that go well, and those that end before they begin.

use super::*;
use crate::guest::fake::DISK_FILE;
use crate::handover::journal::{MAX_EPOCH, Side};
use crate::migrate::learnt::DOWN_STAGES;
use crate::node::{Knowing, PushOptions};
use crate::wire::Prepare;
use layerfs::error::ErrorClass;
use layerfs::store::Expect;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_there_and_back_and_there() {
    let two = Two::new().await;
    (0..60).for_each(|_| two.world.tick());
    for turn in 0..4u64 {
        let report = two.migrate(turn % 2 == 1, MigrateOptions::default()).await.unwrap();
        assert_eq!(two.check(), if turn % 2 == 0 { "b" } else { "a" });
        assert!(two.world.send(&two.name, 10 + turn));
        assert_eq!(report.outcome, "moved");
        assert!(DOWN_STAGES.iter().all(|name| report.stage(name).is_some_and(|stage| stage.is_down)), "{report:?}");
        assert!(report.downtime.is_some() && report.predicted.is_some());
    }
    two.settle().await;
    assert_eq!(two.a.state(&two.name), Some((GuestState::Running, 4)));
    let steps = std::fs::read_to_string(two.a.host.root(&two.name).join(DISK_FILE)).unwrap();
    assert_eq!(steps.lines().count() as u64, two.world.counter("a", &two.name).unwrap());
    assert_eq!(report::load(&two.a.store).unwrap().len(), 2);
    // The memory that was there already isn't sent again.
    let reports = report::load(&two.a.store).unwrap();
    assert!(reports[1].rounds[0].bytes < reports[0].rounds[0].bytes, "{reports:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_has_read_goes_along_with_it() {
    let two = Two::with_pages(1024, |address| address).await;
    let app = two.a.store.name(&layer_name("app")).unwrap().unwrap().layer;
    let mut read = Vec::new();
    let mut note = |id, _| {
        read.push(id);
        Ok(())
    };
    two.a.store.data_in_order(app, &mut note).unwrap();
    assert!(read.len() > 1);
    let traces = |site: &Site| {
        let all = site.store.traces().unwrap();
        all.into_iter().map(|trace| site.store.trace(trace.layer).unwrap()).collect::<Vec<_>>()
    };
    two.migrate(false, MigrateOptions::default()).await.unwrap();
    assert_eq!(traces(&two.b), Vec::<Vec<_>>::new(), "a mount notes what is read, and there is none here");
    // As a mount would note it of the layer that the guest came with.
    let came_with = two.b.store.name(&two.name.layer("instance").unwrap()).unwrap().unwrap().layer;
    two.b.store.add_trace(came_with, &read).unwrap();
    for turn in 0..2 {
        two.migrate(turn == 0, MigrateOptions::default()).await.unwrap();
        let there = if turn == 0 { &two.a } else { &two.b };
        assert!(traces(there).contains(&read), "move {turn}");
        two.settle().await;
    }
    two.check();
    // Of a peer that may not move guests here nothing is kept.
    two.a.node.peers().change("b", |peer| peer.rights.guests = false).unwrap();
    let planted = vec![(app, read)];
    let (knowing, names) = (Knowing { traces: planted, ..Knowing::default() }, [layer_name("app")]);
    let pushed = two.b.node.push_knowing(&names, "a", PushOptions::default(), knowing, Arc::new(Silent));
    pushed.await.unwrap();
    assert!(two.a.store.trace(app).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_changes_nothing_and_tells_what_is_in_the_way() {
    let two = Two::new().await;
    let dry = MigrateOptions { dry_run: true, ..MigrateOptions::default() };
    let report = two.migrate(false, dry).await.unwrap();
    assert!(report.obstacles.is_empty() && report.predicted.is_some_and(|down| down.seconds > 0.0));
    assert!(two.a.migrations.moves().unwrap().is_empty() && two.b.migrations.moves().unwrap().is_empty());
    assert!(two.b.store.names().unwrap().is_empty());
    for (host, back) in [("a", false), ("b", false)] {
        two.fail(host, Call::Preflight, When::Before);
        let report = two.migrate(back, dry).await.unwrap();
        assert_eq!(report.obstacles.len(), 1, "{host}");
        two.fail(host, Call::Preflight, When::Before);
        let error = two.migrate(back, MigrateOptions::default()).await.unwrap_err();
        assert!(error.class() == ErrorClass::Unsupported && error.to_string().contains("call heal"), "{error}");
        assert_eq!(two.check(), "a");
    }
    assert!(two.a.migrations.moves().unwrap().is_empty() && two.b.migrations.moves().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_needs_the_right_to_move_guests_here() {
    let two = Two::new().await;
    two.b.node.peers().change("a", |peer| peer.rights.guests = false).unwrap();
    let error = two.migrate(false, MigrateOptions::default()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied);
    assert!(error.to_string().contains("--allow-guests"), "{error}");
    assert_eq!(two.check(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_is_fenced_off_and_names_that_are_taken_are_told() {
    let two = Two::new().await;
    two.migrate(false, MigrateOptions::default()).await.unwrap();
    // A host that was set back to before the move.
    let old = two.b.guests.get(&two.name).unwrap();
    let stale = GuestRecord { epoch: 0, state: GuestState::Running, ..old };
    two.a.guests.remove(&two.name).unwrap();
    two.a.guests.add(&stale).unwrap();
    let root = two.a.host.mount(&two.name, two.a.store.name(&layer_name("app")).unwrap().unwrap().layer).unwrap();
    assert!(root.is_dir());
    let drivers = FakeDrivers { label: "a".to_owned(), world: two.world.clone() };
    drivers.guest(&stale, two.a.host.clone()).unwrap().start().unwrap();
    let dry = MigrateOptions { dry_run: true, ..MigrateOptions::default() };
    let report = two.migrate(false, dry).await.unwrap();
    assert!(report.obstacles.iter().any(|obstacle| obstacle.what.contains("later epoch")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_long_a_downtime_leaves_it_where_it_is_and_post_copy_moves_it() {
    let two = Two::new().await;
    let none = MigrateOptions { max_downtime: Some(Duration::from_millis(1)), ..MigrateOptions::default() };
    let error = two.migrate(false, none).await.unwrap_err();
    assert!(error.to_string().contains("--max-downtime"), "{error}");
    two.settle().await;
    assert_eq!(two.check(), "a");
    assert!(!two.world.events().contains(&crate::guest::fake::Event::Frozen("a".to_owned())));
    let report = two.migrate(false, MigrateOptions { post_copy: true, ..none }).await.unwrap();
    assert_eq!((report.outcome.as_str(), two.check().as_str()), ("moved", "b"));
    assert!(report.decisions.iter().any(|why| why.contains("post-copy")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_asks_to_wait_is_waited_for_but_not_for_ever() {
    let two = Two::new().await;
    let file = two.a.host.root(&two.name).join(inhibit::FILE);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "defer").unwrap();
    let options = MigrateOptions { defer: Duration::from_millis(120), ..MigrateOptions::default() };
    let report = two.migrate(false, options).await.unwrap();
    assert!(report.stage("defer").is_some_and(|stage| stage.seconds >= 0.12), "{report:?}");
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_layers_and_a_number_of_rounds_are_obeyed() {
    let two = Two::new().await;
    let options = MigrateOptions { rounds: Rounds::Exactly(3), ahead: Ahead::Base, ..MigrateOptions::default() };
    let report = two.migrate(false, options).await.unwrap();
    assert_eq!(report.rounds.len(), 3);
    let none = MigrateOptions { rounds: Rounds::Exactly(0), ..MigrateOptions::default() };
    assert_eq!(two.migrate(true, none).await.unwrap().rounds.len(), 0);
    assert_eq!(two.check(), "a");
    // What earlier moves have left there is in nobody's way.
    let two_layers = MigrateOptions { ahead: Ahead::Base, ..MigrateOptions::default() };
    for (back, runs) in [(false, "b"), (true, "a"), (false, "b")] {
        two.migrate(back, two_layers).await.unwrap();
        assert_eq!(two.check(), runs);
    }
    // A name that is somebody else's isn't taken from him.
    let other = two.a.store.name(&two.name.layer("instance").unwrap()).unwrap().unwrap().layer;
    two.a.store.set_name(&layer_name("app"), other, Expect::Any).unwrap();
    let error = two.migrate(true, two_layers).await.unwrap_err().to_string();
    assert!(error.contains("app stands for another layer"), "{error}");
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cant_be_asked_says_by_itself_that_its_guest_still_comes() {
    let mut two = Two::new().await;
    // As between hosts of which one has no address for the other.
    two.b.node.peers().change("a", |peer| peer.address = None).unwrap();
    // The lease is kept alive in time also on a machine that does nothing for some seconds, and the guest is waited for longer.
    let timing = Timing { lease: Duration::from_secs(5), ..timing() };
    let world = two.world.clone();
    two.a.migrations = migrations("a", &two.a.node, &two.a.guests, &two.a.host, &world, timing);
    two.b.migrations = migrations("b", &two.b.node, &two.b.guests, &two.b.host, &world, timing);
    let file = two.a.host.root(&two.name).join(inhibit::FILE);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "defer").unwrap();
    let options = MigrateOptions { defer: Duration::from_millis(6500), ..MigrateOptions::default() };
    let report = two.migrate(false, options).await.unwrap();
    assert!(report.stage("defer").is_some_and(|stage| stage.seconds >= 6.5), "{report:?}");
    assert_eq!(two.check(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_move_that_came_to_nothing_left_goes_after_a_while() {
    let two = Two::new().await;
    two.fail("b", Call::Mount, When::Before);
    two.migrate(false, MigrateOptions::default()).await.unwrap_err();
    two.settle().await;
    assert_eq!((two.check(), two.b.state(&two.name)), ("a".to_owned(), None));
    // Somebody keeps a name there that no move has to do with.
    let other = GuestName::new("other").unwrap();
    let some = two.b.store.name(&layer_name("app")).unwrap().unwrap().layer;
    two.b.store.set_name(&other.layer("state").unwrap(), some, Expect::Any).unwrap();
    let left = |site: &Site| {
        let names = site.store.names().unwrap().into_iter().map(|(name, _)| name.to_string());
        names.filter(|name| name.starts_with("guest/")).collect::<Vec<_>>()
    };
    let expire = |site: &Site, age| {
        let gone = Mutex::new(Vec::new());
        site.migrations.expire(age, vec![other.clone()], |name| gone.lock().push(name.clone())).unwrap();
        gone.into_inner()
    };
    assert!(left(&two.b).contains(&"guest/web/instance".to_owned()), "{:?}", left(&two.b));
    // A folder without a record or a move is nobody's at once.
    assert_eq!(expire(&two.b, Duration::from_secs(3600)), std::slice::from_ref(&other));
    assert!(left(&two.b).contains(&"guest/web/instance".to_owned()));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(expire(&two.b, Duration::ZERO), [other.clone(), two.name.clone()]);
    assert_eq!(left(&two.b), ["guest/other/state"]);
    // Where it ended meanwhile its layers may lie below what it has written.
    let ended = |record: &mut GuestRecord| {
        record.state = GuestState::Created;
        Ok(())
    };
    two.a.guests.update(&two.name, ended).unwrap();
    assert!(left(&two.a).len() > 1, "{:?}", left(&two.a));
    assert_eq!(expire(&two.a, Duration::ZERO), std::slice::from_ref(&other));
    assert_eq!(left(&two.a), ["guest/web/instance"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_no_guest_comes_to_is_refused() {
    let two = Two::new().await;
    let (peer, record) = (two.b.node.peers().get("a").unwrap(), two.a.guests.get(&two.name).unwrap());
    let stack = two.a.store.name(&layer_name("app")).unwrap().unwrap().layer;
    let prepare = |epoch| Prepare {
        id: MoveId([9; 16]),
        epoch,
        dry_run: false,
        gives_back: true,
        post_copy: false,
        stack,
        spec: serde_json::to_string(&record.spec).unwrap(),
        surroundings: "{}".to_owned(),
    };
    let ask = |epoch| two.b.migrations.serve(&peer, Message::Prepare(Box::new(prepare(epoch))));
    assert!(ask(u64::MAX).await.is_err() && ask(MAX_EPOCH + 1).await.is_err());
    assert!(two.b.migrations.moves().unwrap().is_empty());
    assert!(matches!(ask(MAX_EPOCH).await, Ok(Message::Prepared { obstacles }) if obstacles.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_ends_the_program_waits_for_a_step_but_not_for_ever() {
    let two = Two::new().await;
    let migrations = two.a.migrations.clone();
    assert!(migrations.wait_until_rests(Duration::ZERO));
    let lock = migrations.lock_of(&two.name);
    let held = lock.lock();
    assert!(!migrations.wait_until_rests(Duration::from_millis(50)));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| migrations.wait_until_rests(Duration::from_secs(60)));
        drop(held);
        assert!(waiting.join().unwrap());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_guests_only_come_to_forgets_old_moves_too() {
    let two = Two::new().await;
    let (spec, peer) = (two.a.guests.get(&two.name).unwrap().spec, two.b.node.peers().get("a").unwrap());
    let journal = &two.b.migrations.0.journal;
    for _ in 0..300 {
        let mut row = Row::destination(MoveId::random().unwrap(), spec.clone(), &peer, 1, false);
        if let Side::Destination { phase, .. } = &mut row.side {
            *phase = crate::handover::destination::Phase::Cleared;
        }
        journal.write(&row).unwrap();
    }
    assert_eq!(two.b.migrations.moves().unwrap().len(), 300);
    two.b.migrations.expire(Duration::from_secs(3600), Vec::new(), |_| ()).unwrap();
    assert_eq!(two.b.migrations.moves().unwrap().len(), 256);
}
