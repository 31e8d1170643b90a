//! Transfers over several connections, some of which are lost; and transfers that are tried again.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use layerfs::LayerId;
use layerfs::error::ErrorClass;
use layerfs::monitor::Counting;
use layerfs::store::GcOptions;

use super::pair::*;
use super::relay::Relay;
use crate::dial::Transport;
use crate::link::Patience;
use crate::paths::Connections;
use crate::peers::{Rights, Visible};
use crate::retry::RetryFor;
use crate::transfers::State;
use crate::{NodeOptions, PathOptions, PullOptions, PushOptions, TransferReport};

/// A path is held up after so many bytes. Of these all is kept in the end but TLS, ids, and on each of three connections a part of
/// a frame, which has 2 MiB at the most.
const HELD_AT: u64 = 40 << 20;
const KEPT_AT_LEAST: u64 = 32 << 20;
/// What a transfer of a layer with some hundred files takes beside the data: TLS, frames, ids, the structure.
const OVERHEAD: u64 = 2 << 20;
/// The data of the layers that are cut: a large file, and small ones.
const LARGE: u64 = 60 << 20;
const DATA: u64 = LARGE + 200 * 3040;

/// Two hosts, with relays between them.
struct Paths {
    here: Host,
    there: Host,
    relays: Vec<Relay>,
    _listener: crate::Listener,
}

fn exactly(count: u8) -> PathOptions {
    PathOptions { connections: Some(Connections::Exactly(count)), ..PathOptions::default() }
}

impl Paths {
    async fn new(relays: usize, rights: Rights) -> Paths {
        let patience = Patience { keep_alive: Duration::from_millis(500), ..Patience::default() };
        let options = NodeOptions { patience, ..NodeOptions::default() };
        let (here, there) = (Host::with(options.clone()), Host::with(options));
        let listener = there.node.listen(([127, 0, 0, 1], 0).into()).await.unwrap();
        let mut paths = Paths { here, there, relays: Vec::new(), _listener: listener };
        let mut addresses = Vec::new();
        for _ in 0..relays {
            let relay = Relay::to(paths._listener.address()).await;
            addresses.push(relay.address());
            paths.relays.push(relay);
        }
        paths.here.know("there", paths.there.node.public_key(), Some(addresses.join(",")), Rights::default());
        paths.there.know("here", paths.here.node.public_key(), None, rights);
        paths
    }

    async fn push(&self, called: &str, paths: PathOptions) -> crate::Result<TransferReport> {
        let options = PushOptions { paths, ..PushOptions::default() };
        self.here.node.push(&[name(called)], "there", options, silent()).await
    }

    async fn pull(&self, called: &str, paths: PathOptions) -> crate::Result<TransferReport> {
        let options = PullOptions { paths, ..PullOptions::default() };
        self.here.node.pull(&[name(called)], "there", options, silent()).await
    }

    /// Pushes "x", which is `layer`, over a first path that is cut in the middle, when what has come is kept there. Returns what
    /// came of it, how many bytes had passed by then, and how much of the layer's data was kept.
    ///
    /// First the path is held up: what is in queues and sockets and being verified would else be an unknown part of what
    /// has passed, or all might be over before anybody looks.
    async fn push_and_cut(&self, layer: LayerId, paths: PathOptions) -> (crate::Result<TransferReport>, u64, u64) {
        self.relays[0].hold_at(HELD_AT);
        let mut data = Vec::new();
        let mut note = |id, bytes: u32| {
            data.push((id, u64::from(bytes)));
            Ok(())
        };
        self.here.store().data_in_order(layer, &mut note).unwrap();
        let is_kept = async {
            loop {
                let kept = tokio::task::block_in_place(|| {
                    let store = self.there.store();
                    store.flush_sessions();
                    let ids: Vec<_> = data.iter().map(|(id, _)| *id).collect();
                    let has = store.contains_many(&ids).unwrap();
                    data.iter().zip(has).filter(|(_, has)| *has).map(|((_, bytes), _)| bytes).sum::<u64>()
                });
                if kept >= KEPT_AT_LEAST {
                    return kept;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let push = self.push("x", paths);
        tokio::pin!(push);
        let kept = tokio::select! {
            ended = &mut push => panic!("it ended though it was held up: {ended:?}"),
            kept = is_kept => kept,
        };
        let passed = self.relays[0].bytes();
        self.relays[0].cut();
        (push.await, passed, kept)
    }

    /// Chunks that went over more than once.
    fn sent_again(&self, report: &TransferReport, layer: LayerId) -> u64 {
        let mut all = 0;
        let store = self.here.store();
        crate::plan::candidates(store.as_ref(), &[layer], &[], &mut |_| {
            all += 1;
            Ok(())
        })
        .unwrap();
        report.chunks_sent.saturating_sub(all)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_connections_share_a_push_and_a_pull() {
    let paths = Paths::new(1, Rights::default()).await;
    let pushed = add_layer(paths.here.store(), "x", &tree(300, 60 << 20));
    let report = paths.push("x", exactly(4)).await.unwrap();
    assert!(paths.there.has_whole("x", pushed));
    assert!((2..=4).contains(&report.connections) && report.retries == 0, "{report:?}");
    assert_eq!(paths.sent_again(&report, pushed), 0);

    let pulled = add_layer(paths.there.store(), "y", &tree(1, 61 << 20));
    let report = paths.pull("y", exactly(3)).await.unwrap();
    assert!(paths.here.has_whole("y", pulled));
    assert!((2..=3).contains(&report.connections), "{report:?}");
    let single = paths.push("x", exactly(1)).await.unwrap();
    assert_eq!((single.connections, single.chunks_sent), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_path_changes_nothing_but_the_speed() {
    for (is_push, is_silent) in [(true, false), (false, false), (true, true)] {
        let paths = Paths::new(3, Rights::default()).await;
        let holder = if is_push { &paths.here } else { &paths.there };
        let layer = add_layer(holder.store(), "x", &tree(200, 80 << 20));
        // Only who isn't told has to be given up; healthy connections must not be, on a machine that is busy for a while.
        let idle = is_silent.then_some(Duration::from_secs(15));
        let options = PathOptions { idle, ..exactly(3) };
        let transfer = async { if is_push { paths.push("x", options).await } else { paths.pull("x", options).await } };
        let disturb = async {
            loop {
                // The first connection has the first path: that of another is to be lost.
                if let Some(busy) = paths.relays.iter().skip(1).find(|relay| relay.bytes() > 3 << 20) {
                    return if is_silent { busy.hold() } else { busy.shut() };
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::pin!(transfer);
        let report = tokio::select! {
            report = &mut transfer => report,
            () = disturb => transfer.await,
        };
        let report = report.unwrap();
        assert!(if is_push { &paths.there } else { &paths.here }.has_whole("x", layer));
        assert!(report.connections >= 2 && report.retries == 0, "{is_push} {is_silent} {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_whose_first_connection_is_lost_goes_on_by_itself() {
    for connections in [1, 3] {
        let paths = Paths::new(1, Rights::default()).await;
        let layer = add_layer(paths.here.store(), "x", &tree(200, LARGE as usize));
        let (report, passed, kept) = paths.push_and_cut(layer, exactly(connections)).await;
        let report = report.unwrap();
        assert!(paths.there.has_whole("x", layer));
        assert_eq!(report.retries, 1, "{report:?}");
        // The report counts what was given to the sockets, which may be all of it by then: what the second attempt took is what
        // has passed since.
        let second = paths.relays[0].bytes() - passed;
        let rest = DATA - kept;
        assert!(second < rest + OVERHEAD, "the second attempt took {second} bytes for {rest}: {report:?}");
        assert!(report.chunks_reused > 0, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_leaves_what_a_broken_transfer_brought() {
    let paths = Paths::new(1, Rights::default()).await;
    let layer = add_layer(paths.here.store(), "x", &tree(200, LARGE as usize));
    let never = PathOptions { retry_for: Some(RetryFor::Time(Duration::ZERO)), ..exactly(1) };
    let (broken, _, kept) = paths.push_and_cut(layer, never).await;
    broken.unwrap_err();
    // The other side notices by itself.
    let transfers = paths.there.node.transfers();
    while transfers.list().iter().any(|transfer| transfer.state == State::Running) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let report = paths.there.store().gc(&layerfs::monitor::Silent, GcOptions::default()).unwrap();
    assert!(report.staged_bytes > 10 << 20, "{report:?}");
    let again = paths.push("x", never).await.unwrap();
    assert!(paths.there.has_whole("x", layer));
    assert!(again.chunk_plain_bytes < DATA - kept + OVERHEAD && again.chunks_reused > 100, "{kept} {again:?}");
    let after = paths.there.store().gc(&layerfs::monitor::Silent, GcOptions::default()).unwrap();
    assert_eq!((after.staged_bytes, after.dead_chunks), (0, 0), "it is whole now");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_tried_again_too_and_over_another_address() {
    let paths = Paths::new(2, Rights::default()).await;
    let layer = add_layer(paths.there.store(), "x", &tree(200, 60 << 20));
    paths.relays[0].shut_at(20 << 20);
    let report = paths.pull("x", exactly(1)).await.unwrap();
    assert!(paths.here.has_whole("x", layer));
    assert_eq!(report.retries, 1, "{report:?}");
    assert!(paths.relays[1].bytes() > 20 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restricted_peer_need_not_send_again_what_arrived() {
    let visible = Visible::Matching(vec!["x*".to_owned()]);
    let paths = Paths::new(1, Rights { visible, ..Rights::default() }).await;
    let layer = add_layer(paths.here.store(), "x", &tree(200, LARGE as usize));
    let (report, passed, kept) = paths.push_and_cut(layer, exactly(1)).await;
    let report = report.unwrap();
    assert!(paths.there.has_whole("x", layer));
    assert!(report.retries == 1 && report.chunks_reused > 0, "{report:?}");
    let (second, rest) = (paths.relays[0].bytes() - passed, DATA - kept);
    assert!(second < rest + OVERHEAD, "the second attempt took {second} bytes for {rest}: {report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_and_hosts_that_never_answered_are_not_tried_again() {
    let rights = Rights { push: false, ..Rights::default() };
    let paths = Paths::new(1, rights).await;
    add_layer(paths.here.store(), "x", &tree(10, 1000));
    let long = PathOptions { retry_for: Some(RetryFor::Time(Duration::from_secs(3600))), ..exactly(1) };
    assert_eq!(paths.push("x", long).await.unwrap_err().class(), ErrorClass::Denied);
    assert_eq!(paths.relays[0].connections(), 1);
    paths.relays[0].shut();
    assert_eq!(paths.push("x", exactly(1)).await.unwrap_err().class(), ErrorClass::Network);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_patience_gets_it() {
    let paths = Paths::new(1, Rights::default()).await;
    let layer = add_layer(paths.here.store(), "x", &tree(10, 100_000));
    paths.relays[0].shut();
    let long = PathOptions {
        retry_for: Some(RetryFor::Time(Duration::from_secs(600))),
        transport: Some(Transport::Tcp),
        ..PathOptions::default()
    };
    let monitor = Arc::new(Counting::default());
    let options = PushOptions { paths: long, ..PushOptions::default() };
    let names = [name("x")];
    let push = paths.here.node.push(&names, "there", options, monitor.clone());
    let mend = async {
        while paths.relays[0].turned_away() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        paths.relays[0].mend();
    };
    let (report, ()) = tokio::join!(push, mend);
    assert!(report.unwrap().retries > 0);
    assert!(paths.there.has_whole("x", layer) && monitor.bytes.load(Relaxed) > 0);
}
