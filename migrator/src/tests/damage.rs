//! A link that is cut or damaged anywhere: nothing wrong is accepted, nothing half is named, the next attempt goes on.
//!
//! Over a stream without TLS, so that damage reaches the protocol itself.

use std::sync::Arc;
use std::time::Duration;

use layerfs::LayerId;
use layerfs::monitor::Counting;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::time::timeout;

use super::pair::*;
use crate::link::{Link, Patience};
use crate::peers::Visible;
use crate::progress::Tally;
use crate::receive::{self, Terms};
use crate::send;

/// What happens to the bytes on their way.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// Both ways end after so many bytes of this way (`true`: from the sender to the receiver).
    Cut(bool, usize),
    /// This bit of this byte of this way is flipped.
    Flip(bool, usize, u8),
}

const PATIENCE: Patience =
    Patience { connect: Duration::from_secs(5), idle: Duration::from_secs(2), keep_alive: Duration::from_millis(500) };

async fn relay(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    forth: bool,
    fault: Fault,
) -> Vec<u8> {
    let mut seen = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mut bytes = &mut buffer[..count];
        let mut is_cut = false;
        match fault {
            Fault::Cut(way, at) if way == forth && seen.len() + bytes.len() >= at => {
                bytes = &mut bytes[..at - seen.len()];
                is_cut = true;
            }
            Fault::Flip(way, at, bit) if way == forth && (seen.len()..seen.len() + bytes.len()).contains(&at) => {
                bytes[at - seen.len()] ^= 1 << bit;
            }
            _ => {}
        }
        seen.extend_from_slice(bytes);
        if to.write_all(bytes).await.is_err() || is_cut {
            break;
        }
    }
    let _ = to.shutdown().await;
    seen
}

/// One transfer from `here` to `there` through a faulty stream. Returns both sides' results and what went each way.
async fn transfer(
    here: &Host,
    there: &Host,
    fault: Fault,
) -> (crate::Result<u16>, crate::Result<u16>, Vec<u8>, Vec<u8>) {
    let ((near, near_end), (far_end, far)) = (duplex(64 * 1024), duplex(64 * 1024));
    let ((near_in, near_out), (far_in, far_out)) = (split(near_end), split(far_end));
    let is_cut = matches!(fault, Fault::Cut(..));
    let relays = tokio::spawn(async move {
        let forth = relay(near_in, far_out, true, fault);
        let back = relay(far_in, near_out, false, fault);
        tokio::pin!(forth, back);
        // A cut takes both ways at once.
        tokio::select! {
            seen = &mut forth => if is_cut { (seen, Vec::new()) } else { (seen, back.await) },
            seen = &mut back => if is_cut { (Vec::new(), seen) } else { (forth.await, seen) },
        }
    });
    let sending = async {
        let prepared = send::prepare(here.store(), &[name("x")], &Visible::All, false).unwrap();
        let mut link = Link::start(near, "there", PATIENCE);
        let result = send::run(&mut link, here.store(), &prepared, &Arc::new(Tally::new()), &silent()).await;
        match &result {
            Ok(_) => link.close().await,
            Err(error) => link.close_with(error).await,
        }
        result
    };
    let receiving = async {
        let mut link = Link::start(far, "here", PATIENCE);
        let terms = Terms {
            visible: Visible::All,
            wanted: None,
            kept: None,
            lazy: false,
            limit: None,
            completes: Vec::new(),
            peer: "there".to_owned(),
        };
        let result = receive::run(&mut link, there.store(), terms, None, &Arc::new(Tally::new()), &silent()).await;
        match &result {
            Ok(_) => link.close().await,
            Err(error) => link.close_with(error).await,
        }
        result.map(|(_, changed)| changed)
    };
    // A damaged length can make a side wait for bytes that never come, as long as the other says that it is alive.
    let both = async { tokio::join!(sending, receiving) };
    let late = || Err(crate::Error::Timeout { action: "the test", peer: "both".to_owned(), seconds: 4 });
    let (sent, received) = timeout(Duration::from_secs(4), both).await.unwrap_or_else(|_| (late(), late()));
    let (forth, back) = relays.await.unwrap();
    (sent, received, forth, back)
}

fn assert_nothing_half(there: &Host, layer: LayerId) {
    for (called, record) in there.store().names().unwrap() {
        assert_eq!(record.layer, layer);
        assert!(there.has_whole(called.as_str(), layer));
    }
}

/// Where frames end in `bytes`.
fn boundaries(bytes: &[u8]) -> Vec<usize> {
    let mut ends = vec![0];
    let mut at = 0;
    while let Some(length) = bytes[at..].first_chunk::<4>() {
        at += 4 + u32::from_le_bytes(*length) as usize;
        ends.push(at);
    }
    ends
}

fn sample_tree() -> Tree {
    let mut files = tree(300, 1 << 20);
    files.insert("xattr".to_owned(), noise(5, 20_000));
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_every_message_loses_nothing_and_the_next_attempt_goes_on() {
    let here = Host::new();
    let layer = add_layer(here.store(), "x", &sample_tree());
    let (sent, received, forth, back) = transfer(&here, &Host::new(), Fault::None).await;
    assert_eq!((sent.unwrap(), received.unwrap()), (1, 1));
    for (way, bytes) in [(true, forth), (false, back)] {
        for boundary in boundaries(&bytes) {
            let there = Host::new();
            let (sent, received, ..) = transfer(&here, &there, Fault::Cut(way, boundary)).await;
            // The last word may be lost, but the sender never believes what isn't so.
            assert!(sent.is_err() || received.is_ok(), "cut at {boundary}, {way}");
            assert_nothing_half(&there, layer);
            let (sent, ..) = transfer(&here, &there, Fault::None).await;
            sent.unwrap();
            assert!(there.has_whole("x", layer));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_at_random_bytes_end_once_the_link_holds() {
    let here = Host::new();
    let layer = add_layer(here.store(), "x", &sample_tree());
    let there = Host::new();
    let mut at = 1000usize;
    let mut cuts = 0;
    loop {
        at = at * 1103 % 1_300_000 + at / 2;
        let (sent, ..) = transfer(&here, &there, Fault::Cut(true, at)).await;
        assert_nothing_half(&there, layer);
        cuts += 1;
        if sent.is_ok() || cuts == 40 {
            break;
        }
    }
    transfer(&here, &there, Fault::None).await.0.unwrap();
    assert!(there.has_whole("x", layer));
}

/// Every byte of the small messages, and some of the chunks.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_refused_or_harmless() {
    let here = Host::new();
    let layer = add_layer(here.store(), "x", &tree(30, 100_000));
    let (.., forth, back) = transfer(&here, &Host::new(), Fault::None).await;
    let there = Host::new();
    let positions =
        (0..forth.len()).step_by(forth.len() / 60).chain(forth.len() - 16..forth.len()).map(|at| (true, at));
    let back_positions = (0..back.len()).step_by(3).map(|at| (false, at));
    for (way, at) in positions.chain(back_positions) {
        // Flips in the lengths' high bytes only make a side wait: one of them is enough.
        let (_, received, ..) = transfer(&here, &there, Fault::Flip(way, at, (at % 8) as u8)).await;
        for (called, record) in there.store().names().unwrap() {
            assert!(received.is_ok(), "named, but not reported: {way} {at}");
            assert!(there.has_whole(called.as_str(), record.layer));
            assert_eq!(record.layer, layer);
            there.store().remove_name(&called).unwrap();
        }
    }
}

/// Stops once enough was sent.
struct StopAfter(Counting, u64);

impl layerfs::monitor::Monitor for StopAfter {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, bytes: u64) {
        self.0.advance(bytes);
    }
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        self.0.bytes.load(std::sync::atomic::Ordering::Relaxed) >= self.1
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_or_killed_push_names_nothing_and_its_chunks_are_used_again() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.here.store(), "x", &tree(100, 400 << 20));
    let monitor = Arc::new(StopAfter(Counting::default(), 8 << 20));
    let result = pair.here.node.push(&[name("x")], "there", Default::default(), monitor).await;
    assert_eq!(result.unwrap_err().class(), layerfs::error::ErrorClass::Busy);
    assert!(pair.there.store().names().unwrap().is_empty());

    let counting = Arc::new(Counting::default());
    let (node, monitor) = (pair.here.node.clone(), counting.clone());
    let task = tokio::spawn(async move { node.push(&[name("x")], "there", Default::default(), monitor).await });
    while counting.bytes.load(std::sync::atomic::Ordering::Relaxed) < 64 << 20 {
        tokio::task::yield_now().await;
    }
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(pair.there.store().names().unwrap().is_empty());

    let report = pair.push("x").await.unwrap();
    assert!(pair.there.has_whole("x", layer));
    assert!(report.chunks_reused > 0, "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What isn't asked for is there: the candidates and the held layer's chunks together make the lacking layer.
    #[test]
    fn a_plan_leaves_nothing_out(
        sizes in prop::collection::vec(0usize..40_000, 1..60),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..6),
        dropped in prop::option::of(any::<prop::sample::Index>()),
        large in 0usize..3_000_000,
        xattrs in 0usize..4,
    ) {
        use std::collections::HashSet;
        let chunks = layerfs::chunk::MemoryChunks::default();
        let mut old: Tree = sizes.iter().enumerate().map(|(n, size)| (format!("f{n:03}"), noise(n as u64, *size))).collect();
        old.insert("large".to_owned(), noise(9, large));
        old.extend((0..xattrs).map(|n| (format!("xattr{n}"), noise(n as u64, 15_000 + n * 7000))));
        let mut new = old.clone();
        for (at, seed) in &changes {
            let bytes = new.values_mut().nth(at.index(old.len())).unwrap();
            if !bytes.is_empty() {
                let at = *seed as usize % bytes.len();
                bytes[at] = bytes[at].wrapping_add(1);
            }
        }
        if let Some(at) = dropped {
            let gone = new.keys().nth(at.index(new.len())).unwrap().clone();
            new.remove(&gone);
        }
        let (old, new) = (write_layer(&chunks, &old, None, 2), write_layer(&chunks, &new, None, 2));
        let all = |lacking, held: &[LayerId]| {
            let mut ids = HashSet::new();
            crate::plan::candidates(&chunks, &[lacking], held, &mut |candidate| {
                assert!(ids.insert(candidate.id), "asked twice");
                Ok(())
            }).unwrap();
            ids
        };
        let (of_old, of_new, asked) = (all(old, &[]), all(new, &[]), all(new, &[old]));
        prop_assert!(of_new.iter().all(|id| asked.contains(id) || of_old.contains(id)));
        let present: HashSet<_> = of_old.union(&asked).copied().collect();
        let mut has = |ids: &[layerfs::ChunkId]| Ok(ids.iter().map(|id| present.contains(id)).collect());
        crate::check::check_layer(&chunks, new, &mut has).unwrap();
        // And the check notices each missing chunk.
        for missing in of_new.iter().take(20) {
            let mut lacks = |ids: &[layerfs::ChunkId]| Ok(ids.iter().map(|id| id != missing).collect());
            prop_assert!(crate::check::check_layer(&chunks, new, &mut lacks).is_err());
        }
    }
}
