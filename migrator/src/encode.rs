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

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel;
use layerfs::ChunkId;
use layerfs::chunk::{self, ChunkRead, Class, Codec, StoredChunk};
use layerfs::monitor::Monitor;
use layerfs::store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::bundle;
use crate::error::Result;
use crate::level::{Cost, Effort, Gauge, Level};
use crate::link::Outbox;
use crate::plan::{Base, Candidate};
use crate::progress::Tally;
use crate::similar::{self, Similar};
use crate::wire::{
    BaseName, Bundle, CHUNKS_TARGET_BYTES, ChunksWriter, MAX_BASES, MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS, Message,
    encode_bundle,
};

/// Groups that are under way, per thread.
const GROUPS_PER_THREAD: usize = 3;
/// The plain bytes of the first group; each is twice as large as the one before, up to [`GROUP_BYTES`], so that a slow
/// level is noticed early.
const FIRST_GROUP_BYTES: usize = 128 * 1024;
const GROUP_BYTES: usize = 768 * 1024;
/// Frames with chunks as stored are so large at least.
const LEAST_FRAME_BYTES: usize = 64 * 1024;
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
    /// Finds bases for what the planner has none for.
    pub similar: Arc<Similar>,
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
        let thread = tokio::task::spawn_blocking(move || run(&work, jobs_queue, report));
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

fn run(work: &Work, jobs: mpsc::Receiver<Job>, report: mpsc::UnboundedSender<usize>) -> Result<()> {
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
            // That this sender goes when it ends tells the driver, which then closes the queue of jobs.
            move || send_all(work, take_made, take_ticket, &report, Gauge::new(threads), level)
        });
        let dispatcher = Dispatcher {
            groups: give_group,
            tickets: give_ticket,
            next: 0,
            target: FIRST_GROUP_BYTES,
            level: &level,
            similar: &work.similar,
        };
        dispatcher.run(jobs);
        let result = sender.join().unwrap_or_else(|_| {
            Err(crate::Error::refused(layerfs::error::ErrorClass::Io, "the sending thread failed"))
        });
        work.similar.give_up();
        result
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
                if let Some(rate) = gauge.link_rate() {
                    work.similar.set_link_rate(rate);
                }
            }
            let _ = tickets.recv();
            link_waited_since = Instant::now();
        }
    }
    Ok(())
}

/// Cuts the stream of chunks into groups.
struct Dispatcher<'a> {
    groups: channel::Sender<Group>,
    tickets: channel::Sender<()>,
    next: u64,
    target: usize,
    level: &'a Level,
    similar: &'a Arc<Similar>,
}

impl Dispatcher<'_> {
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
        if self.level.get().searches() {
            chunks.iter().filter(|chunk| is_searched_for(chunk)).for_each(|chunk| self.similar.expect(chunk.bytes));
        }
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

/// Whether bases for it are looked for by content.
fn is_searched_for(chunk: &Candidate) -> bool {
    chunk.bases.is_none() && chunk.class == Class::Data
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
        Content::Chunks(chunks) => {
            // The last of several connections shall not be busy with its frame long after the others.
            let frame_bytes = (CHUNKS_TARGET_BYTES / work.outbox.connections()).max(LEAST_FRAME_BYTES);
            catch_unwind(AssertUnwindSafe(|| encode(&work.store, &work.similar, &chunks, effort, frame_bytes)))
                .unwrap_or_else(|_| Err(layerfs::Error::Index("a thread that compresses panicked".to_owned())))
        }
    };
    Made { number, frames, effort, work: started.elapsed() }
}

/// Chunks that go into one bundle.
#[derive(Default)]
struct Together {
    chunks: Vec<StoredChunk>,
    plain: Vec<u8>,
    bases: Vec<BaseName>,
    prefix: Vec<u8>,
    known: HashSet<ChunkId>,
}

impl Together {
    /// Adds those of `bases` that aren't there yet, as far as they fit.
    fn add_bases(&mut self, store: &Store, bases: &[Base]) {
        for base in bases {
            if self.bases.len() == MAX_BASES || !self.known.insert(base.id) {
                continue;
            }
            // What is damaged here may be whole there, but can't help.
            let Ok(plain) = store.get(&base.id) else { continue };
            if self.prefix.len() + plain.len() <= MAX_BUNDLE_BYTES {
                let mut name = [0; 8];
                name.copy_from_slice(&base.id.0[..8]);
                self.bases.push(name);
                self.prefix.extend_from_slice(&plain);
            }
        }
    }

    /// Whether bases for another chunk might not fit.
    fn is_full(&self) -> bool {
        self.prefix.len() > MAX_BUNDLE_BYTES - MAX_BUNDLE_BYTES / 4
    }
}

/// Held chunks like `plain`, wherever they lie.
fn search(similar: &Arc<Similar>, candidate: &Candidate, plain: &[u8]) -> Vec<Base> {
    if !is_searched_for(candidate) {
        // Of the others it was known before.
        similar.expect(candidate.bytes);
    }
    similar.find(plain)
}

/// Whether `bases` are what the chunk comes from.
fn is_near(store: &Store, plain: &[u8], bases: &[Base]) -> bool {
    let mut all = Vec::new();
    // As if it weren't there.
    bases.iter().filter_map(|base| store.get(&base.id).ok()).for_each(|base| all.extend_from_slice(&base));
    !bases.is_empty() && similar::resembles(plain, &all)
}

/// The frames for `group`; those with chunks as stored have about `frame_bytes`.
fn encode(
    store: &Store,
    similar: &Arc<Similar>,
    group: &[Candidate],
    effort: Effort,
    frame_bytes: usize,
) -> layerfs::Result<Vec<Frame>> {
    // Nobody waits for these ids, so they go by their bytes alone.
    let is_ahead = group.first().is_some_and(|first| first.is_certain);
    let mut as_stored = Vec::new();
    let mut together = Together::default();
    let mut frames = Vec::new();
    for candidate in group {
        let stored = store.read_stored(&candidate.id)?;
        // What didn't compress in the pack won't now.
        let repacks =
            (stored.codec != Codec::Raw || stored.plain_bytes < 512) && effort.repacks(stored.plain_bytes as usize);
        let has_bases = effort.uses_bases() && candidate.bases.is_some();
        let searches = effort.searches() && candidate.class == Class::Data;
        if !(is_ahead || repacks || searches || has_bases) {
            as_stored.push(stored);
            continue;
        }
        let plain = chunk::verify(stored.clone())?.0;
        let named = candidate.bases.as_deref().filter(|_| has_bases).unwrap_or_default();
        let found = match searches && !is_near(store, &plain, named) {
            true => search(similar, candidate, &plain),
            false => Vec::new(),
        };
        if !(is_ahead || repacks || has_bases) && found.is_empty() {
            as_stored.push(stored);
            continue;
        }
        if together.is_full() || together.plain.len() + plain.len() > MAX_BUNDLE_BYTES {
            close(&mut together, effort, is_ahead, &mut frames, &mut as_stored)?;
        }
        together.add_bases(store, &found);
        // What stands in the same place is of no use where something else was found to be.
        if found.is_empty() {
            together.add_bases(store, named);
        }
        together.plain.extend_from_slice(&plain);
        together.chunks.push(stored);
    }
    close(&mut together, effort, is_ahead, &mut frames, &mut as_stored)?;
    frames.extend(stored_frames(&as_stored, frame_bytes));
    Ok(frames)
}

/// Makes a bundle of what is `together`; unless it must go so (as nobody knows the ids), only if that is a gain.
fn close(
    together: &mut Together,
    effort: Effort,
    must: bool,
    frames: &mut Vec<Frame>,
    as_stored: &mut Vec<StoredChunk>,
) -> layerfs::Result<()> {
    let Together { chunks, plain, bases, prefix, .. } = std::mem::take(together);
    if chunks.is_empty() {
        return Ok(());
    }
    let no_memory = || layerfs::Error::Index("zstd found no memory".to_owned());
    let frame = bundle::pack(&prefix, &plain, effort.level()).ok_or_else(no_memory)?;
    let stored: usize = chunks.iter().map(|chunk| chunk.stored.len() + ChunksWriter::CHUNK_HEADER_BYTES).sum();
    let around = bases.len() * 8 + chunks.len() * 5;
    if !must && (frame.len() + around) * (WORTHWHILE + 1) > stored * WORTHWHILE {
        as_stored.extend(chunks);
        return Ok(());
    }
    let lengths: Vec<_> = chunks.iter().map(|chunk| (chunk.class, chunk.plain_bytes)).collect();
    frames.push(Frame {
        chunks: chunks.len(),
        plain_bytes: plain.len() as u64,
        stored_bytes: frame.len() as u64,
        bytes: FrameBytes::Encoded(encode_bundle(&Bundle { bases, chunks: lengths, frame: frame.into() })),
        is_ahead: must,
    });
    Ok(())
}

/// Frames of about `frame_bytes` with chunks as they lie in the packs.
fn stored_frames(as_stored: &[StoredChunk], frame_bytes: usize) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut writer = ChunksWriter::default();
    let mut waiting: Vec<&StoredChunk> = Vec::new();
    for (at, chunk) in as_stored.iter().enumerate() {
        writer.push(chunk);
        waiting.push(chunk);
        if writer.is_full_at(frame_bytes) || at + 1 == as_stored.len() {
            frames.push(Frame {
                bytes: FrameBytes::Encoded(std::mem::take(&mut writer).finish()),
                chunks: waiting.len(),
                plain_bytes: waiting.iter().map(|chunk| u64::from(chunk.plain_bytes)).sum(),
                stored_bytes: waiting.iter().map(|chunk| chunk.stored.len() as u64).sum(),
                is_ahead: false,
            });
            waiting.clear();
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use layerfs::LayerId;

    use super::*;
    use crate::tests::pair::{Host, Tree, add_layer, noise, tree};

    /// The bytes that the groups of a transfer of `new` take for a receiver that holds `old`.
    fn bytes_of(host: &Host, old: LayerId, new: LayerId) -> (usize, usize) {
        let similar = Similar::new(host.store().clone(), vec![new], vec![old]);
        let mut all = Vec::new();
        crate::plan::candidates(host.store().as_ref(), &[new], &[old], &mut |candidate| {
            all.push(candidate);
            Ok(())
        })
        .unwrap();
        all.iter().filter(|one| is_searched_for(one)).for_each(|one| similar.expect(one.bytes));
        let frames = all
            .chunks(8)
            .flat_map(|group| encode(host.store(), &similar, group, Effort::FIRST, CHUNKS_TARGET_BYTES).unwrap());
        let length = |frame: &Frame| match &frame.bytes {
            FrameBytes::Encoded(bytes) => bytes.len(),
            FrameBytes::Message(_) => 0,
        };
        let plain = all.iter().map(|one| one.bytes as usize).sum();
        (plain, frames.map(|frame| length(&frame)).sum())
    }

    #[test]
    fn what_was_renamed_and_rebuilt_is_found_by_its_content() {
        let host = Host::new();
        let mut files: Tree = tree(300, 1 << 20);
        files.insert("libfoo.so.1.2".to_owned(), noise(77, 3 << 20));
        let old = add_layer(host.store(), "one", &files);
        let mut library = files.remove("libfoo.so.1.2").unwrap();
        (0..library.len()).step_by(5000).for_each(|at| library[at] ^= 1);
        // Another name and with it another inode number, and its parts in another order.
        library.rotate_left(1_000_000);
        files.insert("zz-libfoo.so.1.3".to_owned(), library);
        let new = add_layer(host.store(), "two", &files);
        let (plain, sent) = bytes_of(&host, old, new);
        assert!(plain > 3 << 20 && sent < 100_000, "{plain} {sent}");
    }
}
