//! Wanted chunks into frames: as they lie in the packs, or compressed together against what the receiver holds.
//!
//! ```text
//! driver: chunks in order → groups → threads: read, decode, compress → in order again → the link
//! ```
//!
//! Hides threads, grouping and the choice of the encoding, which [`crate::level`] turns. Invariants: frames leave in the
//! order in which their chunks came, but that structure which resembles the receiver's comes last, so that it need not
//! name what was sent before; End after all; at most [`GROUPS_PER_THREAD`] groups of at most 2 MiB per thread are in
//! memory, and [`MAX_LAST`] candidates that come last.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam::channel;
use layerfs::ChunkId;
use layerfs::chunk::Class;
use layerfs::monitor::Monitor;
use layerfs::store::Store;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::Result;
use crate::frames::{self, Frame, FrameBytes, Source, is_searched_for};
use crate::level::{Cost, Effort, Gauge, Level};
use crate::link::Outbox;
use crate::numbers::Numbers;
use crate::plan::Candidate;
use crate::progress::Tally;
use crate::similar::Similar;
use crate::wire::{CHUNKS_TARGET_BYTES, MAX_BASES, MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS, Message};

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
/// So many pieces of structure come last; what is beyond goes in its turn, with the ids that it names.
const MAX_LAST: usize = 1024;

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
    /// Somebody waits for the end.
    pub is_in_a_hurry: bool,
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
    Structure(Vec<Candidate>),
    Last(Message),
}

/// What it makes of that.
struct Made {
    number: u64,
    frames: layerfs::Result<Vec<Frame>>,
    effort: Effort,
    work: Duration,
}

fn run(work: &Work, jobs: mpsc::Receiver<Job>, report: mpsc::UnboundedSender<usize>) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    let level = Level::new(if work.similar.is_known() { Effort::FIRST_KNOWING } else { Effort::FIRST });
    let numbers = Mutex::new(Numbers::default());
    let (give_group, take_group) = channel::bounded::<Group>(threads);
    let (give_made, take_made) = channel::unbounded::<Made>();
    let (give_ticket, take_ticket) = channel::bounded::<()>(threads * GROUPS_PER_THREAD);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (take_group, give_made, level, numbers) = (take_group.clone(), give_made.clone(), &level, &numbers);
            scope.spawn(move || {
                for group in take_group {
                    if give_made.send(make(work, numbers, group, level.get())).is_err() {
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
            most_tickets: threads * GROUPS_PER_THREAD,
            last: Vec::new(),
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
                work.tally.link_idle_micros.fetch_add(cost.link_waited.as_micros() as u64, Relaxed);
                work.tally.link_full_micros.fetch_add(cost.waited_for_link.as_micros() as u64, Relaxed);
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
    most_tickets: usize,
    /// Structure that comes last.
    last: Vec<Candidate>,
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
                Job::Last(message) => self.structure() && self.give(Content::Last(message)),
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
            let resembles = chunk.class != Class::Data && chunk.bases.is_some();
            if resembles && self.level.get().uses_bases() && self.last.len() < MAX_LAST {
                self.last.push(chunk);
                continue;
            }
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

    /// Gives what comes last, once all else is made and has its numbers.
    fn structure(&mut self) -> bool {
        let mut last = std::mem::take(&mut self.last);
        if last.is_empty() {
            return true;
        }
        // Whoever has all tickets is alone.
        if (0..self.most_tickets).any(|_| self.tickets.send(()).is_err()) {
            return false;
        }
        // The planner finds what names others before those.
        last.reverse();
        self.give_at_once(Content::Structure(last))
    }

    fn give(&mut self, content: Content) -> bool {
        self.tickets.send(()).is_ok() && self.give_at_once(content)
    }

    fn give_at_once(&mut self, content: Content) -> bool {
        let number = self.next;
        self.next += 1;
        self.target = (self.target * 2).min(GROUP_BYTES);
        self.groups.send(Group { number, content }).is_ok()
    }
}

/// Runs on one of the threads.
fn make(work: &Work, numbers: &Mutex<Numbers>, group: Group, effort: Effort) -> Made {
    let Group { number, content } = group;
    let started = Instant::now();
    // The last of several connections shall not be busy with its frame long after the others.
    let frame_bytes = (CHUNKS_TARGET_BYTES / work.outbox.connections()).max(LEAST_FRAME_BYTES);
    let Work { store, similar, is_in_a_hurry, .. } = work;
    let source = Source { store, similar, numbers, frame_bytes, is_in_a_hurry: *is_in_a_hurry };
    let encode = || match content {
        Content::Last(message) => Ok(vec![Frame::message(message)]),
        Content::Chunks(chunks) => frames::encode(source, &chunks, effort),
        Content::Structure(chunks) => frames::encode_structure(source, &chunks, effort),
    };
    let frames = catch_unwind(AssertUnwindSafe(encode))
        .unwrap_or_else(|_| Err(layerfs::Error::Index("a thread that compresses panicked".to_owned())));
    Made { number, frames, effort, work: started.elapsed() }
}
