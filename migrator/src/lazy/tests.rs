//! Two hosts: what is read before it has come, who brings it, and what happens when nobody can.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use layerfs::chunk::{ChunkRead, ChunkWrite, Class};
use layerfs::error::ErrorClass;
use layerfs::patience;
use layerfs::store::{FsckOptions, GcOptions, Store};
use layerfs::{ChunkId, LayerId};

use super::{Lazy, LazyOptions};
use crate::access::Access;
use crate::governor::Rate;
use crate::guest::{GuestName, GuestRecord, GuestSpec, GuestState, Guests};
use crate::node::Manner;
use crate::peers::{Rights, Visible};
use crate::tests::pair::{Host, Pair, add_layer, add_layer_over, name, noise, silent, tree};
use crate::tests::relay::Relay;
use crate::transfers::{Role, State};
use crate::wanted::Wanted;
use crate::{PullOptions, PushOptions};

fn push_options() -> PushOptions {
    PushOptions { lazy: true, ..PushOptions::default() }
}

async fn pull_lazily(pair: &Pair, called: &str) -> crate::Result<crate::TransferReport> {
    pair.here.node.pull(&[name(called)], "there", PullOptions { lazy: true, ..PullOptions::default() }, silent()).await
}

/// The ids of `layer`'s data, in order.
fn data(store: &Store, layer: LayerId) -> Vec<ChunkId> {
    let mut ids = Vec::new();
    let mut keep = |id, _| {
        ids.push(id);
        Ok(())
    };
    store.data_in_order(layer, &mut keep).unwrap();
    ids
}

async fn read(store: &Arc<Store>, id: ChunkId) -> layerfs::Result<usize> {
    let store = store.clone();
    tokio::task::spawn_blocking(move || store.get(&id).map(|plain| plain.len())).await.unwrap()
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen");
}

fn patient(milliseconds: u64) -> LazyOptions {
    LazyOptions { timeout: Duration::from_millis(milliseconds) }
}

/// From now on `here` reaches `there` by a path that can be shut. (A listener's port, once closed, may be another test's.)
async fn by_relay(pair: &Pair) -> Relay {
    let relay = Relay::to(pair.listens()).await;
    pair.here.node.peers().change("there", |peer| peer.address = Some(relay.address())).unwrap();
    relay
}

fn assert_clean(host: &Host) {
    let report = host.store().fsck(&layerfs::monitor::Silent, FsckOptions::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_pull_brings_the_structure_then_what_is_read_then_the_rest() {
    let pair = Pair::new().await;
    let base = add_layer(pair.there.store(), "base", &tree(400, 6 << 20));
    let top = add_layer_over(pair.there.store(), "app", &tree(50, 1 << 20), base, 10_000);
    let report = pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store().clone();
    assert_eq!(store.name(&name("app")).unwrap().unwrap().layer, top);
    let partials = store.partials_of_stack(top).unwrap();
    assert_eq!(partials.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(), [top, base]);
    assert!(partials.iter().all(|(_, partial)| partial.sources == ["there"] && !partial.pushed));
    let ids = data(&store, base);
    let presence = store.presence(base).unwrap();
    assert!(presence.here_bytes == 0 && presence.total_bytes > 6 << 20, "{presence:?}");
    assert!(report.bytes_received < presence.total_bytes / 10, "{} bytes for the structure", report.bytes_received);
    // It is what it is: no damage, nothing to collect, nothing to hand on.
    assert_clean(&pair.here);
    store.gc(&layerfs::monitor::Silent, GcOptions::default()).unwrap();
    assert!(
        !Access::new(&store, &Visible::All, &Wanted::default()).unwrap().holds(&base),
        "a partial layer is held by nobody"
    );
    let onward = pair.here.node.push(&[name("app")], "there", PushOptions::default(), silent()).await.unwrap_err();
    assert_eq!(onward.class(), ErrorClass::Busy, "{onward}");
    assert!(read(&store, ids[0]).await.is_err(), "nobody fetches yet");

    let lazy = Lazy::start(&pair.here.node, patient(30_000));
    assert!(read(&store, *ids.last().unwrap()).await.unwrap() > 0);
    // Whoever fetched it leaves a moment after the last chunk.
    until("the rest", || !store.has_partials() && lazy.sources().is_empty()).await;
    assert!(pair.here.has_whole("app", top));
    assert_eq!(store.presence(base).unwrap().percent(), 100);
    assert_clean(&pair.here);
}

/// Also those of an earlier daemon.
#[tokio::test(flavor = "multi_thread")]
async fn the_rest_keeps_to_the_limit_that_was_asked_for() {
    let pair = Pair::new().await;
    let limit = Some(Rate::new(64 << 10));
    let manner = Manner { limit, ..Manner::default() };
    let layer = add_layer(pair.there.store(), "app", &tree(10, 8 << 20));
    let lazily = PullOptions { lazy: true, manner, ..PullOptions::default() };
    pair.here.node.pull(&[name("app")], "there", lazily, silent()).await.unwrap();
    assert_eq!(pair.here.store().partial(layer).unwrap().limit, 64 << 10);
    add_layer(pair.here.store(), "mine", &[("other".to_owned(), noise(1, 8 << 20))].into());
    let options = PushOptions { manner, ..push_options() };
    for is_first in [true, false] {
        let lazy = Lazy::start(&pair.here.node, patient(30_000));
        if is_first {
            lazy.push(&[name("mine")], "there", options, silent()).await.unwrap();
        }
        let found = |role| {
            let mut all = pair.here.node.transfers().list().into_iter();
            all.find(|one| one.state == State::Running && one.role == role).map(|one| one.controls.limit)
        };
        until("the rests", || found(Role::Receiving).is_some() && found(Role::Sending).is_some()).await;
        assert_eq!((found(Role::Receiving), found(Role::Sending)), (Some(limit), Some(limit)));
        drop(lazy);
        until("their end", || found(Role::Receiving).is_none() && found(Role::Sending).is_none()).await;
    }
    // What is pulled without is without.
    pull_lazily(&pair, "app").await.unwrap();
    assert_eq!(pair.here.store().partial(layer).unwrap().limit, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_of_a_lazy_transfer_is_one_of_all_that_it_would_bring() {
    let pair = Pair::new().await;
    add_layer(pair.there.store(), "app", &tree(30, 2 << 20));
    add_layer(pair.here.store(), "mine", &[("large".to_owned(), noise(9, 2 << 20))].into());
    let mut costs = Vec::new();
    for lazy in [false, true] {
        let pull = PullOptions { lazy, dry_run: true, ..PullOptions::default() };
        let report = pair.here.node.pull(&[name("app")], "there", pull, silent()).await.unwrap();
        assert!(report.dry_run && report.names_changed == 1, "{report:?}");
        let push = PushOptions { lazy, dry_run: true, ..PushOptions::default() };
        let sent = pair.here.node.push(&[name("mine")], "there", push, silent()).await.unwrap();
        assert!(sent.dry_run && sent.names_changed == 1, "{sent:?}");
        costs.push((report.would_send_bytes, sent.would_send_bytes));
        for (host, called) in [(&pair.here, "app"), (&pair.there, "mine")] {
            assert!(host.store().name(&name(called)).unwrap().is_none() && !host.store().has_partials());
        }
    }
    // The data, which hardly shrinks, is in all of them.
    assert!(costs.iter().all(|(pulled, pushed)| *pulled.min(pushed) > 2 << 20), "{costs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_brought_does_not_come_again() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.there.store(), "app", &tree(300, 8 << 20));
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store();
    let ids = data(store, layer);
    // As a reader's connection does: nothing of it is in the index yet.
    let session = store.session("reader");
    for id in ids.iter().step_by(2) {
        session.put(Class::Data, &pair.there.store().get(id).unwrap()).unwrap();
    }
    let report = pair.here.node.complete(&[layer], "there", silent()).await.unwrap();
    assert_eq!(report.chunks_sent as usize, ids.len() / 2, "{report:?}");
    assert!(!store.has_partials());
    // The index knows of all of it, whatever becomes of that session.
    assert!(store.contains_many(&ids).unwrap().iter().all(|here| *here));
    drop(session);
    assert!(pair.here.has_whole("app", layer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_goes_costs_its_readers_the_stated_time_and_returns() {
    let pair = Pair::new().await;
    let relay = by_relay(&pair).await;
    let layer = add_layer(pair.there.store(), "app", &tree(10, 4 << 20));
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store().clone();
    let ids = data(&store, layer);
    relay.shut();

    let lazy = Lazy::start(&pair.here.node, patient(400));
    for _ in 0..2 {
        let error = read(&store, ids[3]).await.unwrap_err();
        assert!(matches!(error, layerfs::Error::Absent { .. }), "{error}");
        assert_eq!(error.errno(), 5, "EIO");
    }
    assert!(lazy.sources()[0].error.is_some());
    // A chunk that no partial layer has is missing at once, not after a while.
    let error = read(&store, ChunkId::of(b"nowhere")).await.unwrap_err();
    assert!(matches!(error, layerfs::Error::ChunkMissing(_)), "{error}");

    relay.mend();
    let mut outcome = read(&store, ids[3]).await;
    while outcome.is_err() {
        outcome = read(&store, ids[3]).await;
        tokio::task::yield_now().await;
    }
    until("the rest", || !store.has_partials()).await;
    assert!(pair.here.has_whole("app", layer));
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cancels_the_rest_of_one_layer_gets_that_of_others_and_again_that_one() {
    let pair = Pair::new().await;
    let first = add_layer(pair.there.store(), "first", &tree(10, 3 << 20));
    let other = add_layer(pair.there.store(), "other", &tree(12, 1 << 20));
    let transfers = pair.here.node.transfers();
    let store = pair.here.store().clone();
    pull_lazily(&pair, "first").await.unwrap();
    transfers.governor().set_limit(Some(crate::Rate::new(1024)));
    let lazy = Lazy::start(&pair.here.node, patient(30_000));
    until("the rest", || {
        let rest = transfers.list().into_iter().filter(|info| info.names == ["first"]);
        let running = rest.filter_map(|info| transfers.get(info.id).ok()).collect::<Vec<_>>();
        running.iter().for_each(|transfer| transfer.cancel());
        !running.is_empty()
    })
    .await;
    until("the word of it", || lazy.sources().iter().any(|source| source.error.is_some())).await;
    transfers.governor().set_limit(None);
    pull_lazily(&pair, "other").await.unwrap();
    until("the other's rest", || store.partial(other).is_none()).await;
    assert!(pair.here.has_whole("other", other));
    assert!(store.partial(first).is_some());
    assert!(lazy.sources()[0].error.as_ref().is_some_and(|error| error.contains("cancelled")));
    pull_lazily(&pair, "first").await.unwrap();
    until("its rest", || !store.has_partials()).await;
    assert!(pair.here.has_whole("first", first));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_layer_keeps_no_other_from_its_source() {
    let pair = Pair::new().await;
    let damaged = add_layer(pair.there.store(), "damaged", &tree(30, 1 << 20));
    let layer = add_layer(pair.there.store(), "app", &[("large".to_owned(), noise(1, 2 << 20))].into());
    pull_lazily(&pair, "damaged").await.unwrap();
    pull_lazily(&pair, "app").await.unwrap();
    let mut pieces = Vec::new();
    let manifest = layerfs::manifest::Manifest::load(pair.here.store().as_ref(), damaged).unwrap();
    layerfs::closure::walk_content(pair.here.store().as_ref(), &manifest.inodes, &mut |part| {
        pieces.push(part.id());
        Ok(true)
    })
    .unwrap();
    pair.here.damage_chunk(pieces.last().unwrap());
    let Pair { here, there, listener } = pair;
    let pair = Pair { here: here.restarted(), there, listener };
    let store = pair.here.store().clone();
    let ids = data(&store, layer);
    assert!(store.data_in_order(damaged, &mut |_, _| Ok(())).is_err());
    // The rest would bring it too, in the end.
    pair.here.node.transfers().governor().set_limit(Some(crate::Rate::new(100_000)));
    let lazy = Lazy::start(&pair.here.node, patient(30_000));
    for id in ids.iter().rev().take(3) {
        assert!(read(&store, *id).await.unwrap() > 0);
    }
    pair.here.node.transfers().governor().set_limit(None);
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_waits_for_its_state_as_long_as_it_takes() {
    let pair = Pair::new().await;
    let relay = by_relay(&pair).await;
    let layer = add_layer(pair.there.store(), "guest/web/state", &tree(10, 4 << 20));
    let mut other = tree(0, 0);
    other.insert("other".to_owned(), noise(1, 1 << 20));
    let other = add_layer(pair.there.store(), "app", &other);
    pull_lazily(&pair, "guest/web/state").await.unwrap();
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store().clone();
    let state_ids = data(&store, layer);
    let others = data(&store, other);
    relay.shut();
    let guest = GuestName::new("web").unwrap();
    let spec = GuestSpec {
        name: guest.clone(),
        driver: "fake".to_owned(),
        stack: name("app"),
        options: serde_json::json!({}),
    };
    let state_layer = Some(name("guest/web/state"));
    let guests = Guests::new(store.clone());
    guests.add(&GuestRecord { state: GuestState::Arriving, state_layer, ..GuestRecord::new(spec) }).unwrap();

    let lazy = Lazy::start(&pair.here.node, patient(200));
    let error = read(&store, state_ids[3]).await.unwrap_err();
    assert!(matches!(error, layerfs::Error::Absent { .. }), "it doesn't run yet: {error}");
    guests
        .update(&guest, |record| {
            record.state = GuestState::Running;
            Ok(())
        })
        .unwrap();
    let waits = tokio::spawn({
        let (store, id) = (store.clone(), state_ids[3]);
        async move { read(&store, id).await }
    });
    let is_dead = Arc::new(AtomicBool::new(false));
    let dies = tokio::task::spawn_blocking({
        let (store, id, is_dead) = (store.clone(), state_ids[4], is_dead.clone());
        move || patience::unless(move || is_dead.load(Ordering::SeqCst), || store.get(&id).map(drop))
    });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!waits.is_finished() && !dies.is_finished());
    is_dead.store(true, Ordering::SeqCst);
    assert!(matches!(dies.await.unwrap(), Err(layerfs::Error::GivenUp(_))));
    let error = read(&store, others[0]).await.unwrap_err();
    assert!(matches!(error, layerfs::Error::Absent { .. }), "nothing runs on that: {error}");

    relay.mend();
    assert!(waits.await.unwrap().unwrap() > 0);
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_lazily_waits_for_the_stream_or_asks_back() {
    for asks_back in [false, true] {
        let pair = Pair::new().await;
        let back = pair.here.node.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        if asks_back {
            pair.there.node.peers().remove("here").unwrap();
            let address = Some(back.address().to_string());
            pair.there.know("here", pair.here.node.public_key(), address, Rights::default());
        }
        let layer = add_layer(pair.here.store(), "app", &tree(20, 3 << 20));
        let run = data(pair.here.store(), layer);
        pair.here.store().add_trace(layer, &run[..2]).unwrap();
        pair.here.node.push(&[name("app")], "there", push_options(), silent()).await.unwrap();
        let store = pair.there.store().clone();
        assert!(store.partial(layer).unwrap().pushed);
        let lazy = Lazy::start(&pair.there.node, patient(if asks_back { 30_000 } else { 200 }));
        let outcome = read(&store, run[5]).await;
        assert_eq!(outcome.is_ok(), asks_back, "{outcome:?}");
        assert!(store.has_partials(), "only the pusher brings the rest");
        pair.here.node.push_rest(&[layer], "there", None, silent()).await.unwrap();
        assert!(pair.there.has_whole("app", layer) && !store.has_partials());
        assert_eq!(store.trace(layer).unwrap(), run[..2], "the trace came along");
        assert!(read(&store, run[6]).await.is_ok());
        let again = pair.here.node.push_rest(&[layer], "there", None, silent()).await.unwrap_err();
        assert_eq!(again.class(), ErrorClass::NotFound, "{again}");
        drop(lazy);
    }
}

/// Looks whether anything is noted when the first attempt begins.
struct Looks {
    store: Arc<Store>,
    noted: AtomicBool,
}

impl layerfs::monitor::Monitor for Looks {
    fn phase(&self, name: &str, _: Option<u64>) {
        if name == "connecting" {
            self.noted.store(!super::pushes::list(&self.store).unwrap().is_empty(), Ordering::SeqCst);
        }
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_lazy_push_is_noted_before_it_is_offered_and_only_if_it_may_have_been_taken() {
    let visible = Visible::Matching(vec!["mine/*".to_owned()]);
    let mut pair = Pair::new().await;
    let store = pair.here.store().clone();
    let layer = add_layer(&store, "app", &tree(20, 3 << 20));
    let lazy = Lazy::start(&pair.here.node, patient(30_000));
    let looks = Arc::new(Looks { store: store.clone(), noted: AtomicBool::new(false) });
    let push = lazy.push(&[name("app")], "there", push_options(), looks.clone());
    let pushed = push.await.unwrap();
    assert!(looks.noted.load(Ordering::SeqCst) && pushed.names_changed == 1);
    // The name goes on to something else: what was pushed under it goes all the same.
    let other = add_layer(&store, "other", &tree(3, 30_000));
    store.set_name(&name("app"), other, layerfs::store::Expect::Any).unwrap();
    until("the rest", || !pair.there.store().has_partials()).await;
    assert!(pair.there.has_whole("app", layer));
    until("the note going", || super::pushes::list(&store).unwrap().is_empty()).await;

    // A dry run notes nothing, and neither stays what is refused, or doesn't get there.
    let dry = PushOptions { dry_run: true, ..push_options() };
    let looks = Arc::new(Looks { store: store.clone(), noted: AtomicBool::new(false) });
    lazy.push(&[name("other")], "there", dry, looks.clone()).await.unwrap();
    assert!(!looks.noted.load(Ordering::SeqCst));
    pair.there.node.peers().change("here", |peer| peer.rights.visible = visible).unwrap();
    let refused = lazy.push(&[name("other")], "there", push_options(), silent()).await.unwrap_err();
    assert_eq!(refused.class(), ErrorClass::Denied, "{refused}");
    assert!(super::pushes::list(&store).unwrap().is_empty());
    let elsewhere = pair.there.node.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
    std::mem::replace(&mut pair.listener, elsewhere).close().await;
    lazy.push(&[name("other")], "there", push_options(), silent()).await.unwrap_err();
    assert!(super::pushes::list(&store).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_of_the_source_comes_along_and_an_own_one_outlives_the_layer() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.there.store(), "app", &tree(20, 3 << 20));
    let run: Vec<ChunkId> = data(pair.there.store(), layer).into_iter().rev().take(5).collect();
    pair.there.store().add_trace(layer, &run).unwrap();
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store().clone();
    let lazy = Lazy::start(&pair.here.node, patient(30_000));
    until("the trace", || store.trace(layer).unwrap() == run).await;
    until("the rest", || !store.has_partials()).await;
    drop(lazy);
    store.remove_name(&name("app")).unwrap();
    // What a connection that is just ending has brought stays until it has ended.
    until("the collection", || {
        store.gc(&layerfs::monitor::Silent, GcOptions::default()).unwrap();
        !store.contains(&run[0]).unwrap()
    })
    .await;
    assert_eq!(store.trace(layer).unwrap(), run);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_partial_layer_is_given_up() {
    let mut pair = Pair::new().await;
    let layer = add_layer(pair.there.store(), "app", &tree(10, 3 << 20));
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store().clone();
    let elsewhere = pair.there.node.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
    std::mem::replace(&mut pair.listener, elsewhere).close().await;
    let lazy = Lazy::start(&pair.here.node, patient(200));
    store.remove_name(&name("app")).unwrap();
    until("the mark going", || store.partial(layer).is_none()).await;
    store.gc(&layerfs::monitor::Silent, GcOptions::default()).unwrap();
    assert!(!store.contains(&layer.0).unwrap());
    assert_clean(&pair.here);
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread")]
async fn partial_layers_are_completed_by_any_whole_transfer_and_survive_a_restart() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.there.store(), "app", &tree(10, 3 << 20));
    pull_lazily(&pair, "app").await.unwrap();
    pull_lazily(&pair, "app").await.unwrap();
    let store = pair.here.store();
    assert_eq!(store.partial(layer).unwrap().sources, ["there"]);
    pair.pull("app").await.unwrap();
    assert!(store.partial(layer).is_none() && pair.here.has_whole("app", layer));
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_cannot_come_by_others_chunks_lazily() {
    let visible = Visible::Matching(vec!["mine/*".to_owned()]);
    let pair = Pair::with_rights(Rights { visible, ..Rights::default() }).await;
    add_layer(pair.here.store(), "mine/app", &tree(10, 1 << 20));
    let refused = pair.here.node.push(&[name("mine/app")], "there", push_options(), silent()).await.unwrap_err();
    assert_eq!(refused.class(), ErrorClass::Denied, "{refused}");
    // To look at what may be seen is another thing.
    let layer = add_layer(pair.there.store(), "mine/other", &tree(12, 1 << 20));
    let secret = add_layer(pair.there.store(), "secret", &tree(1, 2 << 20));
    pull_lazily(&pair, "mine/other").await.unwrap();
    let error = pair.here.node.complete(&[secret], "there", silent()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::NotFound, "{error}");
    pair.here.node.complete(&[layer], "there", silent()).await.unwrap();
    assert!(pair.here.has_whole("mine/other", layer));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_all_here_needs_no_source_unless_that_is_restricted() {
    for is_restricted in [true, false] {
        let pair = Pair::new().await;
        let layer = add_layer(pair.there.store(), "app", &tree(30, 2 << 20));
        pull_lazily(&pair, "app").await.unwrap();
        let store = pair.here.store();
        let ids = data(store, layer);
        let session = store.session("import");
        for id in &ids[1..] {
            session.put(Class::Data, &pair.there.store().get(id).unwrap()).unwrap();
        }
        session.commit().unwrap();
        let visible = if is_restricted { Visible::Matching(vec!["app".to_owned()]) } else { Visible::All };
        let gone = |peer: &mut crate::Peer| (peer.address, peer.rights.visible) = (None, visible.clone());
        pair.here.node.peers().change("there", gone).unwrap();
        let lazy = Lazy::start(&pair.here.node, patient(100));
        until("an attempt", || lazy.sources().iter().any(|source| source.error.is_some())).await;
        assert!(store.partial(layer).is_some(), "a chunk is lacking");
        session.put(Class::Data, &pair.there.store().get(&ids[0]).unwrap()).unwrap();
        session.commit().unwrap();
        if is_restricted {
            tokio::time::sleep(Duration::from_secs(4)).await;
            assert!(store.partial(layer).is_some(), "it may be somebody else's that is here");
        } else {
            until("the mark's end", || !store.has_partials()).await;
            assert!(pair.here.has_whole("app", layer));
            assert_clean(&pair.here);
        }
    }
}
