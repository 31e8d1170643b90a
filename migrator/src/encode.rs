//! Wanted chunks into frames: as they lie in the packs, or compressed together against what the receiver holds.
//!
//! ```text
//! driver: chunks in order → groups → threads: read, decode, compress → in order again → the link
//! ```
//!
//! Hides threads, grouping and the choice of the encoding, which [`crate::level`] turns. Invariants: frames leave in the
//! order in which their chunks came, and End after all; at most [`GROUPS_PER_THREAD`] groups of at most 2 MiB per thread
//! are in memory; a base is used only if the planner names it; a bundle that isn't smaller than the chunks as stored
//! isn't sent.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel;
use layerfs::ChunkId;
use layerfs::chunk::{self, ChunkRead, Codec, StoredChunk};
use layerfs::monitor::Monitor;
use layerfs::store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::bundle;
use crate::error::Result;
use crate::level::{Cost, Effort, Gauge, Level};
use crate::link::Outbox;
use crate::plan::Candidate;
use crate::progress::Tally;
use crate::wire::{Bundle, ChunksWriter, MAX_BASES, MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS, Message, encode_bundle};

/// Groups that are under way, per thread.
const GROUPS_PER_THREAD: usize = 3;
/// The plain bytes of the first group; each is twice as large as the one before, up to [`GROUP_BYTES`], so that a slow
/// level is noticed early.
const FIRST_GROUP_BYTES: usize = 128 * 1024;
const GROUP_BYTES: usize = 768 * 1024;
/// What is taken for the length of a chunk that the structure doesn't tell.
const UNKNOWN_BYTES: u32 = 21 * 1024;
/// A bundle has to be smaller than the stored chunks by this part.
const WORTHWHILE: usize = 50;

/// What is to be sent.
pub(crate) enum Job {
    /// Chunks.
    Chunks(Vec<Candidate>),
    /// The end, which goes the way of the chunks.
    Last(Message),
}

/// What the encoder works with.
pub(crate) struct Work {
    pub store: Arc<Store>,
    pub outbox: Outbox,
    pub tally: Arc<Tally>,
    pub monitor: Arc<dyn Monitor>,
    /// Frames are counted instead of sent.
    pub is_dry: bool,
    /// Bytes of frames with chunks that nobody asked for.
    pub sent_ahead: Arc<AtomicU64>,
}

/// The threads that make frames.
pub(crate) struct Encoder {
    /// Takes what is to be sent.
    pub jobs: mpsc::Sender<Job>,
    /// Tells how many chunks have gone out.
    pub sent: mpsc::UnboundedReceiver<usize>,
    /// Ends when the queue of jobs does, or at the first failure.
    pub thread: JoinHandle<Result<()>>,
}

impl Encoder {
    /// Starts the threads; `queue` jobs wait at most.
    pub fn start(work: Work, queue: usize) -> Encoder {
        let (jobs, jobs_queue) = mpsc::channel(queue);
        let (report, sent) = mpsc::unbounded_channel();
        let thread = tokio::task::spawn_blocking(move || run(&work, jobs_queue, &report));
        Encoder { jobs, sent, thread }
    }
}

/// What one thread is given.
struct Group {
    number: u64,
    content: Content,
}

enum Content {
    Chunks(Vec<Candidate>),
    Last(Message),
}

/// What it makes of that.
struct Made {
    number: u64,
    frames: layerfs::Result<Vec<Frame>>,
    effort: Effort,
    work: Duration,
}

/// An encoded frame, with what is in it.
struct Frame {
    bytes: FrameBytes,
    chunks: usize,
    plain_bytes: u64,
    stored_bytes: u64,
    is_ahead: bool,
}

enum FrameBytes {
    Encoded(Bytes),
    Message(Message),
}

fn run(work: &Work, jobs: mpsc::Receiver<Job>, report: &mpsc::UnboundedSender<usize>) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    let level = Level::new(Effort::FIRST);
    let (give_group, take_group) = channel::bounded::<Group>(threads);
    let (give_made, take_made) = channel::unbounded::<Made>();
    let (give_ticket, take_ticket) = channel::bounded::<()>(threads * GROUPS_PER_THREAD);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (take_group, give_made, level) = (take_group.clone(), give_made.clone(), &level);
            scope.spawn(move || {
                for group in take_group {
                    if give_made.send(make(work, group, level.get())).is_err() {
                        break;
                    }
                }
            });
        }
        drop((take_group, give_made));
        let sender = scope.spawn({
            let level = &level;
            move || send_all(work, take_made, take_ticket, report, Gauge::new(threads), level)
        });
        Dispatcher { groups: give_group, tickets: give_ticket, next: 0, target: FIRST_GROUP_BYTES }.run(jobs);
        sender
            .join()
            .unwrap_or_else(|_| Err(crate::Error::refused(layerfs::error::ErrorClass::Io, "the sending thread failed")))
    })
}

/// Sends what is made, in order; ends at the first failure, or when the link is gone (which is the driver's to tell).
fn send_all(
    work: &Work,
    made: channel::Receiver<Made>,
    tickets: channel::Receiver<()>,
    report: &mpsc::UnboundedSender<usize>,
    mut gauge: Gauge,
    level: &Level,
) -> Result<()> {
    let mut early = BTreeMap::new();
    let mut would_send = 0;
    let mut next = 0;
    let mut link_waited_since = Instant::now();
    for one in made {
        early.insert(one.number, one);
        while let Some(Made { frames, effort, work: spent, .. }) = early.remove(&next) {
            next += 1;
            let link_waited = link_waited_since.elapsed();
            let mut cost = Cost {
                effort,
                plain_bytes: 0,
                wire_bytes: 0,
                work: spent,
                link_waited,
                waited_for_link: Duration::ZERO,
            };
            for frame in frames? {
                let before = Instant::now();
                let bytes = match &frame.bytes {
                    FrameBytes::Encoded(bytes) => bytes.len() as u64,
                    FrameBytes::Message(_) => 0,
                };
                let sent = match frame.bytes {
                    FrameBytes::Encoded(bytes) if work.is_dry => {
                        would_send += bytes.len() as u64;
                        Ok(())
                    }
                    FrameBytes::Encoded(bytes) => work.outbox.blocking_send_frame(bytes),
                    FrameBytes::Message(mut message) => {
                        if let Message::End { chunks } = &mut message
                            && work.is_dry
                        {
                            work.tally.would_send_bytes.store(would_send, Relaxed);
                            *chunks = would_send;
                        }
                        work.tally.phase("commit");
                        work.monitor.phase("verifying", None);
                        work.outbox.blocking_send(message)
                    }
                };
                if sent.is_err() {
                    return Ok(());
                }
                cost.waited_for_link += before.elapsed();
                cost.plain_bytes += frame.plain_bytes;
                cost.wire_bytes += bytes;
                if frame.chunks > 0 {
                    work.tally.chunks.fetch_add(frame.chunks as u64, Relaxed);
                    work.tally.plain_bytes.fetch_add(frame.plain_bytes, Relaxed);
                    work.tally.stored_bytes.fetch_add(frame.stored_bytes, Relaxed);
                    work.monitor.advance(frame.plain_bytes);
                    work.monitor.items(frame.chunks as u64);
                    if frame.is_ahead {
                        work.sent_ahead.fetch_add(bytes, Relaxed);
                    }
                    // Nobody listens any more: the transfer has failed, and what is left of the queue is void.
                    if report.send(frame.chunks).is_err() {
                        return Ok(());
                    }
                }
            }
            // Nothing is learnt of a link that carries nothing.
            if !work.is_dry {
                gauge.note(cost, level);
            }
            let _ = tickets.recv();
            link_waited_since = Instant::now();
        }
    }
    Ok(())
}

/// Cuts the stream of chunks into groups.
struct Dispatcher {
    groups: channel::Sender<Group>,
    tickets: channel::Sender<()>,
    next: u64,
    target: usize,
}

impl Dispatcher {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            let is_open = match job {
                Job::Chunks(chunks) => self.chunks(chunks),
                Job::Last(message) => self.give(Content::Last(message)),
            };
            if !is_open {
                break;
            }
        }
    }

    /// Returns whether there is still somebody who sends.
    fn chunks(&mut self, chunks: Vec<Candidate>) -> bool {
        let mut group: Vec<Candidate> = Vec::new();
        let mut plain = 0;
        let mut bases: HashMap<ChunkId, u32> = HashMap::new();
        for chunk in chunks {
            let bytes = if chunk.bytes == 0 { UNKNOWN_BYTES } else { chunk.bytes } as usize;
            let fresh = |bases: &HashMap<ChunkId, u32>| {
                let new =
                    chunk.bases.iter().flat_map(|bases| bases.iter()).filter(|base| !bases.contains_key(&base.id));
                new.map(|base| (base.id, base.bytes)).collect::<Vec<_>>()
            };
            let mut more = fresh(&bases);
            let base_bytes =
                bases.values().chain(more.iter().map(|(_, bytes)| bytes)).map(|b| *b as usize).sum::<usize>();
            let is_full = plain + bytes > self.target
                || base_bytes > MAX_BUNDLE_BYTES
                || bases.len() + more.len() > MAX_BASES
                || group.len() == MAX_BUNDLE_CHUNKS
                || group.first().is_some_and(|first| first.is_certain != chunk.is_certain);
            if is_full && !group.is_empty() {
                if !self.give(Content::Chunks(std::mem::take(&mut group))) {
                    return false;
                }
                plain = 0;
                bases.clear();
                more = fresh(&bases);
            }
            plain += bytes;
            bases.extend(more);
            group.push(chunk);
        }
        group.is_empty() || self.give(Content::Chunks(group))
    }

    fn give(&mut self, content: Content) -> bool {
        if self.tickets.send(()).is_err() {
            return false;
        }
        let number = self.next;
        self.next += 1;
        self.target = (self.target * 2).min(GROUP_BYTES);
        self.groups.send(Group { number, content }).is_ok()
    }
}

/// Runs on one of the threads.
fn make(work: &Work, group: Group, effort: Effort) -> Made {
    let Group { number, content } = group;
    let started = Instant::now();
    let frames = match content {
        Content::Last(message) => Ok(vec![Frame {
            bytes: FrameBytes::Message(message),
            chunks: 0,
            plain_bytes: 0,
            stored_bytes: 0,
            is_ahead: false,
        }]),
        Content::Chunks(chunks) => catch_unwind(AssertUnwindSafe(|| encode(&work.store, &chunks, effort)))
            .unwrap_or_else(|_| Err(layerfs::Error::Index("a thread that compresses panicked".to_owned()))),
    };
    Made { number, frames, effort, work: started.elapsed() }
}

/// The frames for `group`.
fn encode(store: &Store, group: &[Candidate], effort: Effort) -> layerfs::Result<Vec<Frame>> {
    // Nobody waits for these ids, so they go by their bytes alone.
    let is_ahead = group.first().is_some_and(|first| first.is_certain);
    let mut as_stored = Vec::new();
    let mut together = Vec::new();
    let mut bases: Vec<ChunkId> = Vec::new();
    for candidate in group {
        let stored = store.read_stored(&candidate.id)?;
        let own_bases = candidate.bases.as_deref().filter(|_| effort.uses_bases()).unwrap_or_default();
        // What didn't compress in the pack won't now.
        let repack = stored.codec != Codec::Raw || stored.plain_bytes < 512;
        if !is_ahead && own_bases.is_empty() && !(repack && effort.repacks(stored.plain_bytes as usize)) {
            as_stored.push(stored);
            continue;
        }
        own_bases.iter().for_each(|base| {
            if !bases.contains(&base.id) {
                bases.push(base.id);
            }
        });
        together.push(stored);
    }
    let mut frames = Vec::new();
    if !together.is_empty() {
        match bundle(store, &bases, &together, effort.level(), is_ahead)? {
            Some(frame) => frames.push(Frame { is_ahead, ..frame }),
            None => as_stored.extend(together),
        }
    }
    let mut writer = ChunksWriter::default();
    let mut waiting: Vec<&StoredChunk> = Vec::new();
    for (at, chunk) in as_stored.iter().enumerate() {
        writer.push(chunk);
        waiting.push(chunk);
        if writer.is_full() || at + 1 == as_stored.len() {
            frames.push(Frame {
                bytes: FrameBytes::Encoded(std::mem::take(&mut writer).finish()),
                chunks: waiting.len(),
                plain_bytes: waiting.iter().map(|chunk| u64::from(chunk.plain_bytes)).sum(),
                stored_bytes: waiting.iter().map(|chunk| chunk.stored.len() as u64).sum(),
                is_ahead,
            });
            waiting.clear();
        }
    }
    Ok(frames)
}

/// `chunks` as one bundle over `bases`; unless they `must` go so, only if that is a gain.
fn bundle(
    store: &Store,
    bases: &[ChunkId],
    chunks: &[StoredChunk],
    level: i32,
    must: bool,
) -> layerfs::Result<Option<Frame>> {
    let mut prefix = Vec::new();
    let mut names = Vec::new();
    for id in bases {
        // What is damaged here may be whole there, but can't help.
        let Ok(base) = store.get(id) else { continue };
        if prefix.len() + base.len() <= MAX_BUNDLE_BYTES && names.len() < MAX_BASES {
            let mut name = [0; 8];
            name.copy_from_slice(&id.0[..8]);
            names.push(name);
            prefix.extend_from_slice(&base);
        }
    }
    let mut plain = Vec::new();
    let mut stored_bytes = 0;
    for chunk in chunks {
        stored_bytes += chunk.stored.len() + ChunksWriter::CHUNK_HEADER_BYTES;
        plain.extend_from_slice(&chunk::verify(chunk.clone())?.0);
    }
    let no_memory = || layerfs::Error::Index("zstd found no memory".to_owned());
    let frame = bundle::pack(&prefix, &plain, level).ok_or_else(no_memory)?;
    let around = names.len() * 8 + chunks.len() * 5;
    if !must && (frame.len() + around) * (WORTHWHILE + 1) > stored_bytes * WORTHWHILE {
        return Ok(None);
    }
    let stored = frame.len() as u64;
    let lengths = chunks.iter().map(|chunk| (chunk.class, chunk.plain_bytes)).collect();
    let encoded = encode_bundle(&Bundle { bases: names, chunks: lengths, frame: frame.into() });
    Ok(Some(Frame {
        bytes: FrameBytes::Encoded(encoded),
        chunks: chunks.len(),
        plain_bytes: plain.len() as u64,
        stored_bytes: stored,
        is_ahead: false,
    }))
}
