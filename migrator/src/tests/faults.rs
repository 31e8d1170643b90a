//! Many transfers over links on which everything goes wrong: cut, damaged, delayed and reordered at message boundaries and
//! at random bytes, with either end killed. `LAYERFS_FAULT_RUNS` says how many; `make faults` does 1,000.
//!
//! Two connections each, without TLS, so that damage reaches the protocol itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use layerfs::chunk::ChunkRead;
use layerfs::{ChunkId, LayerId};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::Notify;

use super::pair::*;
use crate::group::{Token, Trunk};
use crate::link::{Link, Patience};
use crate::peers::Visible;
use crate::progress::Tally;
use crate::receive::{self, Terms};
use crate::send;
use crate::wire::Message;

const DEFAULT_RUNS: u64 = 200;
const PATIENCE: Patience =
    Patience { connect: Duration::from_secs(5), idle: Duration::from_secs(2), keep_alive: Duration::from_millis(300) };
/// A side that waits for bytes that damage has made up gives up no later.
const LONGEST: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Both ways end.
    Cut,
    /// A bit is flipped.
    Flip(u8),
    /// Nothing comes for a while.
    Delay,
    /// So many bytes come after those that follow them.
    Swap(usize),
    /// The sender dies.
    KillSender,
    /// The receiver dies, with what it hasn't made durable.
    KillReceiver,
}

/// What goes wrong, on which of the connections and ways, after how many bytes.
#[derive(Clone, Copy, Debug)]
struct Fault {
    kind: Kind,
    first: bool,
    forth: bool,
    at: usize,
    /// At the end of the frame that begins before `at`, not in its middle.
    at_boundary: bool,
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }

    fn fault(&mut self, bytes: usize) -> Fault {
        let kind = match self.next(8) {
            0 | 1 => Kind::Cut,
            2 => Kind::Flip(self.next(8) as u8),
            3 => Kind::Delay,
            4 | 5 => Kind::Swap(1 + self.next(2000)),
            6 => Kind::KillSender,
            _ => Kind::KillReceiver,
        };
        let forth = self.next(3) > 0;
        let at = self.next(if forth { bytes } else { 2000 });
        Fault { kind, first: self.next(3) > 0, forth, at, at_boundary: self.next(2) == 0 }
    }
}

/// Tells where frames end in a stream that comes in pieces.
#[derive(Default)]
struct Frames {
    header: Vec<u8>,
    left: usize,
}

impl Frames {
    /// How many of `bytes` belong to frames that end within them.
    fn boundary(&mut self, bytes: &[u8]) -> Option<usize> {
        let (mut at, mut last) = (0, None);
        while at < bytes.len() {
            if self.left == 0 {
                self.header.push(bytes[at]);
                at += 1;
                if let Some(length) = self.header.first_chunk::<4>() {
                    self.left = u32::from_le_bytes(*length) as usize;
                    self.header.clear();
                }
            } else {
                let count = self.left.min(bytes.len() - at);
                (at, self.left) = (at + count, self.left - count);
                if self.left == 0 {
                    last = last.or(Some(at));
                }
            }
        }
        last
    }
}

async fn relay(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    fault: Option<Fault>,
    kill: Arc<Notify>,
) {
    let (mut seen, mut buffer, mut frames, mut fault) = (0, vec![0; 16 * 1024], Frames::default(), fault);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let boundary = frames.boundary(&buffer[..count]);
        let mut bytes = buffer[..count].to_vec();
        let due = fault.filter(|fault| seen + count > fault.at && (!fault.at_boundary || boundary.is_some()));
        seen += count;
        if let Some(Fault { kind, at, at_boundary, .. }) = due {
            fault = None;
            let within =
                if at_boundary { boundary.unwrap_or(0) } else { (at + count).saturating_sub(seen).min(count - 1) };
            match kind {
                Kind::Cut => {
                    let _ = to.write_all(&bytes[..within]).await;
                    return;
                }
                Kind::Flip(bit) => bytes[within.min(count - 1)] ^= 1 << bit,
                Kind::Delay => tokio::time::sleep(Duration::from_millis(20)).await,
                Kind::Swap(length) => {
                    let end = (within + 2 * length).min(count);
                    let half = (end - within) / 2;
                    bytes[within..within + 2 * half].rotate_left(half);
                }
                Kind::KillSender | Kind::KillReceiver => kill.notify_one(),
            }
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// A connection with a fault, if so. Its relays end with both its ends.
fn connection(fault: Option<Fault>, kill: &Arc<Notify>) -> (DuplexStream, DuplexStream) {
    let ((near, near_end), (far_end, far)) = (duplex(32 * 1024), duplex(32 * 1024));
    let ((near_in, near_out), (far_in, far_out)) = (split(near_end), split(far_end));
    let of = |forth| fault.filter(|fault| fault.forth == forth);
    let (forth, back) =
        (relay(near_in, far_out, of(true), kill.clone()), relay(far_in, near_out, of(false), kill.clone()));
    tokio::spawn(async move {
        // A cut takes both ways.
        tokio::pin!(forth, back);
        let is_cut = fault.is_some_and(|fault| fault.kind == Kind::Cut);
        tokio::select! {
            () = &mut forth => if !is_cut { back.await },
            () = &mut back => if !is_cut { forth.await },
        }
    });
    (near, far)
}

async fn join(link: DuplexStream, peer: &str, trunk: Arc<Trunk>, says_join: bool) {
    let mut link = Link::start_joining(link, peer, PATIENCE);
    let began =
        if says_join { link.send(Message::Join { token: Token([7; 16]) }).await } else { link.recv().await.map(drop) };
    if began.is_ok() {
        let _ = trunk.carry(link).await;
    }
}

struct Outcome {
    is_sent: bool,
    is_received: bool,
    sent_bytes: u64,
}

/// One attempt to push `called`.
async fn attempt(here: &Host, there: &Host, called: &str, fault: Option<Fault>) -> Outcome {
    let kill = Arc::new(Notify::new());
    let (near, far) = connection(fault.filter(|fault| fault.first), &kill);
    let (near_joined, far_joined) = connection(fault.filter(|fault| !fault.first), &kill);
    let tally = Arc::new(Tally::new());
    let sending = async {
        let prepared = send::prepare(here.store(), &[name(called)], &Visible::All, false).unwrap();
        let mut link = Link::start(near, "there", PATIENCE);
        let joined = tokio::spawn(join(near_joined, "there", link.open_group().unwrap(), true));
        let result = send::run(&mut link, here.store(), &prepared, &tally, &silent()).await;
        close(link, &result).await;
        let _ = joined.await;
        result.is_ok()
    };
    let receiving = async {
        let mut link = Link::start(far, "here", PATIENCE);
        let joined = tokio::spawn(join(far_joined, "here", link.open_group().unwrap(), false));
        let terms = Terms {
            visible: Visible::All,
            wanted: None,
            kept: None,
            lazy: false,
            limit: None,
            completes: Vec::new(),
            peer: "here".to_owned(),
        };
        let result = receive::run(&mut link, there.store(), terms, None, &Arc::new(Tally::new()), &silent()).await;
        close(link, &result).await;
        let _ = joined.await;
        result.is_ok()
    };
    let dies = |which| {
        let (kill, is_due) = (kill.clone(), fault.is_some_and(|fault| fault.kind == which));
        async move { if is_due { kill.notified().await } else { std::future::pending().await } }
    };
    let sending = async {
        tokio::select! { sent = sending => sent, () = dies(Kind::KillSender) => false }
    };
    let receiving = async {
        tokio::select! { got = receiving => got, () = dies(Kind::KillReceiver) => false }
    };
    let both = async { tokio::join!(sending, receiving) };
    let (is_sent, is_received) = tokio::time::timeout(LONGEST, both).await.unwrap_or((false, false));
    Outcome { is_sent, is_received, sent_bytes: tally.plain_bytes.load(Relaxed) }
}

async fn close<T>(link: Link, result: &crate::Result<T>) {
    match result {
        Ok(_) => link.close().await,
        Err(error) => link.close_with(error).await,
    }
}

/// The chunks of `layer`, and their lengths.
fn chunks_of(host: &Host, layer: LayerId) -> HashMap<ChunkId, u64> {
    let mut ids = HashMap::new();
    let mut add = |candidate: crate::plan::Candidate| {
        ids.insert(candidate.id, host.store().get(&candidate.id)?.len() as u64);
        Ok(())
    };
    crate::plan::candidates(host.store().as_ref(), &[layer], &[], &mut add).unwrap();
    ids
}

/// The bytes of `chunks` that `host` lacks.
fn lacking(host: &Host, chunks: &HashMap<ChunkId, u64>) -> u64 {
    let ids: Vec<ChunkId> = chunks.keys().copied().collect();
    let there = host.store().contains_many(&ids).unwrap();
    ids.iter().zip(there).filter(|(_, there)| !there).map(|(id, _)| chunks[id]).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_the_link_nothing_is_lost_and_nothing_wrong_accepted() {
    let runs = std::env::var("LAYERFS_FAULT_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(DEFAULT_RUNS);
    let (here, there) = (Host::new(), Host::new());
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let (mut sent, mut again, mut failures, mut wanted) = (0, 0, 0u64, 0);
    for run in 0..runs {
        let mut files: Tree = (0..8).map(|n| (format!("f{n}"), noise(run * 100 + n, 3000))).collect();
        files.insert("large".to_owned(), noise(run * 100 + 99, 700_000));
        let called = format!("x{run}");
        let layer = add_layer(here.store(), &called, &files);
        let ids = chunks_of(&here, layer);
        wanted += ids.values().sum::<u64>();
        let mut tries = 0;
        loop {
            let fault = (tries < 4 && random.next(4) > 0 || tries == 0).then(|| random.fault(350_000));
            let before = lacking(&there, &ids);
            let outcome = attempt(&here, &there, &called, fault).await;
            sent += outcome.sent_bytes;
            again += outcome.sent_bytes.saturating_sub(before);
            // The last word may be lost, but the sender never believes what isn't so.
            let is_named = there.store().name(&name(&called)).unwrap().is_some();
            assert!(is_named || !outcome.is_sent && !outcome.is_received, "run {run}: believed in vain, {fault:?}");
            if is_named {
                assert!(there.has_whole(&called, layer), "run {run}: {fault:?}");
                for id in ids.keys() {
                    let (ours, theirs) = (here.store().get(id).unwrap(), there.store().get(id).unwrap());
                    assert_eq!(ours, theirs, "run {run}: {fault:?}");
                }
                break;
            }
            failures += 1;
            tries += 1;
            assert!(tries < 20, "run {run} doesn't come to an end: {fault:?}");
        }
    }
    let named = there.store().names().unwrap().len() as u64;
    assert_eq!(named, runs, "names that nobody pushed, or too few");
    // What a side had when it failed or died was in flight; what the receiver had kept is not sent again.
    assert!(again * 100 <= sent, "{again} of {sent} bytes were sent though the receiver had them");
    assert!(failures * 8 > runs, "only {failures} attempts of {runs} transfers failed: the faults have no effect");
    eprint_summary(runs, failures, wanted, sent, again);
}

#[allow(clippy::print_stderr)] // Shown by `make faults`.
fn eprint_summary(runs: u64, failures: u64, wanted: u64, sent: u64, again: u64) {
    eprintln!(
        "{runs} transfers, {failures} attempts failed; {wanted} bytes wanted, {sent} sent, {again} sent though they were there"
    );
}
