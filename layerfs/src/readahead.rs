//! Reading files ahead of whoever reads them in order: chunks are fetched and decompressed in parallel.
//!
//! Hides how far ahead, and who fetches: a reader that comes to a chunk which nobody has begun fetches it itself.
//! Memory: all readers of one [`FetchPool`] together hold at most its budget ahead, whatever their number; a reader
//! without a share of it still reads, chunk by chunk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex};

use crate::chunk::ChunkRead;
use crate::content::{self, Content, Extent, Extents, List, get_sized};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::patience;
use crate::store::trace::Recorder;

/// How far ahead of a sequential reader chunks are fetched, at first and at most, in bytes.
const FIRST_WINDOW_BYTES: u64 = 512 * 1024;
const LAST_WINDOW_BYTES: u64 = 4 * 1024 * 1024;
/// How far from where the last read ended one still counts as its successor: the kernel sends several at once.
const SLACK_BYTES: u64 = 2 * 1024 * 1024;
/// Where chunks come from another host, they are announced to it so many times farther ahead, as their number, not
/// their bytes, is what that takes here: up to 32 MiB, enough for 1 Gbit/s and 250 ms.
const REMOTE_FACTOR: u64 = 8;

/// Threads that fetch chunks ahead, and the budget of bytes that they may hold.
#[derive(Debug)]
pub struct FetchPool {
    chunks: SharedChunks,
    jobs: Option<Sender<Arc<Slot>>>,
    workers: Vec<std::thread::JoinHandle<()>>,
    budget: Arc<Budget>,
    /// Nothing is fetched ahead.
    is_scattered: AtomicBool,
    /// Notes what readers come to.
    recorder: Option<Arc<Recorder>>,
}

/// Chunks whose reading is noted.
struct Noted<'a> {
    chunks: &'a dyn ChunkRead,
    recorder: Option<&'a Recorder>,
}

impl ChunkRead for Noted<'_> {
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        if let Some(recorder) = self.recorder {
            recorder.note(id);
        }
        self.chunks.get(id)
    }
}

#[derive(Clone)]
struct SharedChunks(Arc<dyn ChunkRead>);

impl std::fmt::Debug for SharedChunks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("chunks")
    }
}

#[derive(Debug)]
struct Budget {
    left: AtomicUsize,
}

/// A share of the budget, given back when it is dropped.
#[derive(Debug)]
struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    fn take(self: &Arc<Budget>, bytes: usize) -> Option<Permit> {
        let taken = self.left.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |left| left.checked_sub(bytes));
        taken.ok().map(|_| Permit { budget: self.clone(), bytes })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// A chunk that is wanted soon.
#[derive(Debug)]
struct Slot {
    id: ChunkId,
    bytes: u32,
    state: Mutex<SlotState>,
    changed: Condvar,
    _permit: Option<Permit>,
}

#[derive(Debug)]
enum SlotState {
    Waiting,
    Fetching,
    Ready(Bytes),
    /// Whoever needs it tries again and gets the error.
    Failed,
}

impl Slot {
    /// The chunk's bytes, as soon as they are there.
    fn wait(&self, chunks: &dyn ChunkRead) -> Result<Bytes> {
        let mut state = self.state.lock();
        loop {
            match &*state {
                SlotState::Ready(plain) => return Ok(plain.clone()),
                SlotState::Failed => break,
                SlotState::Fetching => {
                    patience::waits();
                    if self.changed.wait_for(&mut state, patience::ASK_EVERY).timed_out() && patience::is_given_up() {
                        return Err(Error::GivenUp(self.id));
                    }
                }
                SlotState::Waiting => {
                    *state = SlotState::Fetching;
                    drop(state);
                    return self.fetch(chunks);
                }
            }
        }
        drop(state);
        get_sized(chunks, &self.id, self.bytes)
    }

    /// Fetches the chunk unless somebody has begun to.
    fn work(&self, chunks: &dyn ChunkRead) {
        let mut state = self.state.lock();
        if matches!(*state, SlotState::Waiting) {
            *state = SlotState::Fetching;
            drop(state);
            let _ = self.fetch(chunks);
        }
    }

    fn fetch(&self, chunks: &dyn ChunkRead) -> Result<Bytes> {
        /// Wakes those who wait even if fetching panics.
        struct Settle<'a>(&'a Slot, SlotState);
        impl Drop for Settle<'_> {
            fn drop(&mut self) {
                *self.0.state.lock() = std::mem::replace(&mut self.1, SlotState::Failed);
                self.0.changed.notify_all();
            }
        }
        let mut settle = Settle(self, SlotState::Failed);
        let plain = get_sized(chunks, &self.id, self.bytes)?;
        settle.1 = SlotState::Ready(plain.clone());
        Ok(plain)
    }
}

impl FetchPool {
    /// A pool of `threads` threads over `chunks` that holds at most `budget_bytes` ahead. Where threads can't be had,
    /// readers fetch for themselves.
    pub fn new(chunks: Arc<dyn ChunkRead>, threads: usize, budget_bytes: usize) -> Arc<FetchPool> {
        FetchPool::with_recorder(chunks, threads, budget_bytes, None)
    }

    /// As [`FetchPool::new`]; what readers come to is noted by `recorder`.
    pub fn with_recorder(
        chunks: Arc<dyn ChunkRead>,
        threads: usize,
        budget_bytes: usize,
        recorder: Option<Arc<Recorder>>,
    ) -> Arc<FetchPool> {
        let (jobs, queue) = unbounded::<Arc<Slot>>();
        let mut workers = Vec::with_capacity(threads);
        for _ in 0..threads {
            let (queue, chunks): (Receiver<Arc<Slot>>, _) = (queue.clone(), chunks.clone());
            let worker = std::thread::Builder::new().name("layerfs-fetch".to_owned()).spawn(move || {
                for slot in queue {
                    // If nobody else holds it, its reader has gone: before it begins, or while it waits for a chunk.
                    let held = slot.clone();
                    let is_given_up = move || Arc::strong_count(&held) <= 2;
                    if !is_given_up() {
                        patience::unless(is_given_up, || slot.work(&*chunks));
                    }
                }
            });
            match worker {
                Ok(worker) => workers.push(worker),
                Err(error) => tracing::warn!(%error, "cannot start a thread that reads ahead"),
            }
        }
        let budget = Arc::new(Budget { left: AtomicUsize::new(budget_bytes) });
        let is_scattered = AtomicBool::new(false);
        Arc::new(FetchPool { chunks: SharedChunks(chunks), jobs: Some(jobs), workers, budget, is_scattered, recorder })
    }

    /// From now on files are read here and there, and what follows a read is no guess of what is read next: as by a guest that runs on
    /// memory which is still on its way, where every byte that nobody waits for holds up one that somebody does.
    pub fn expect_scattered(&self) {
        self.is_scattered.store(true, Ordering::Relaxed);
    }

    /// Whether a reader that begins now couldn't read ahead, because others hold the budget.
    pub fn is_exhausted(&self) -> bool {
        self.budget.left.load(Ordering::Relaxed) < FIRST_WINDOW_BYTES as usize
    }

    /// Where the chunks come from.
    pub fn chunks(&self) -> &Arc<dyn ChunkRead> {
        &self.chunks.0
    }

    /// What readers came to is noted here.
    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.recorder.as_ref()
    }

    fn note(&self, id: &ChunkId) {
        if let Some(recorder) = &self.recorder {
            recorder.note(id);
        }
    }

    /// A slot for a chunk, queued, if there is budget for it.
    fn slot(&self, id: ChunkId, bytes: u32) -> Option<Arc<Slot>> {
        let permit = self.budget.take(bytes as usize)?;
        let state = Mutex::new(SlotState::Waiting);
        let slot = Arc::new(Slot { id, bytes, state, changed: Condvar::new(), _permit: Some(permit) });
        if let Some(jobs) = &self.jobs {
            // A pool without workers never fails here: the receiver lives in none, and the readers do the work.
            let _ = jobs.send(slot.clone());
        }
        Some(slot)
    }

    /// A slot that whoever waits for it fills.
    fn slot_without_budget(id: ChunkId, bytes: u32) -> Arc<Slot> {
        let state = Mutex::new(SlotState::Waiting);
        Arc::new(Slot { id, bytes, state, changed: Condvar::new(), _permit: None })
    }
}

impl Drop for FetchPool {
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// A run of the file, with its chunk under way.
#[derive(Clone, Debug)]
struct Ahead {
    offset: u64,
    extent: Extent,
    /// None for a hole.
    slot: Option<Arc<Slot>>,
}

impl Ahead {
    fn end(&self) -> u64 {
        self.offset + self.extent.len()
    }
}

/// Consecutive runs of a file, being fetched.
#[derive(Debug, Default)]
struct Window {
    runs: VecDeque<Ahead>,
    /// Where the next run to be queued starts.
    frontier: u64,
    /// Up to where chunks were announced to where they come from.
    announced: u64,
}

impl Window {
    /// Empties the window; it will start with the run that holds `offset`.
    fn restart(&mut self, offset: u64) {
        self.runs.clear();
        self.frontier = offset;
        self.announced = offset;
    }

    /// Announces the chunks from the window's end to `until`, if they may be on another host.
    fn announce(&mut self, pool: &FetchPool, content: &Content, until: u64) -> Result<()> {
        let until = until.min(content.len());
        // Not for each chunk, as each time costs a look at the list.
        if !pool.chunks.0.is_remote() || self.announced >= until.saturating_sub((until - self.frontier.min(until)) / 2)
        {
            return Ok(());
        }
        let mut ids = Vec::new();
        for next in Extents::new(&*pool.chunks.0, content, self.announced)? {
            let (offset, extent) = next?;
            if let Extent::Chunk { id, .. } = extent {
                ids.push(id);
            }
            self.announced = offset + extent.len();
            if self.announced >= until {
                break;
            }
        }
        pool.chunks.0.soon(&ids);
        Ok(())
    }

    /// Queues runs until the window reaches `until` or the budget is used up.
    fn fill(&mut self, pool: &FetchPool, content: &Content, until: u64) -> Result<()> {
        if self.frontier >= until.min(content.len()) {
            return Ok(());
        }
        for next in Extents::new(&*pool.chunks.0, content, self.frontier)? {
            let (offset, extent) = next?;
            let slot = match extent {
                Extent::Hole { .. } => None,
                Extent::Chunk { id, bytes } => match pool.slot(id, bytes) {
                    Some(slot) => Some(slot),
                    None if self.runs.is_empty() => Some(FetchPool::slot_without_budget(id, bytes)),
                    None => return Ok(()),
                },
            };
            self.runs.push_back(Ahead { offset, extent, slot });
            self.frontier = offset + extent.len();
            if self.frontier >= until {
                break;
            }
        }
        Ok(())
    }
}

/// Reads one file at any offset, ahead of the reader while it reads in order. May be shared by threads.
#[derive(Debug)]
pub struct FileReader {
    pool: Arc<FetchPool>,
    content: Content,
    state: Mutex<ReaderState>,
}

#[derive(Debug, Default)]
struct ReaderState {
    window: Window,
    window_bytes: u64,
    last_end: u64,
}

impl FileReader {
    /// A reader of `content`.
    pub fn new(pool: Arc<FetchPool>, content: Content) -> FileReader {
        let state = ReaderState { window_bytes: FIRST_WINDOW_BYTES / 2, ..ReaderState::default() };
        FileReader { pool, content, state: Mutex::new(state) }
    }

    /// What it reads.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Whether it holds a share of the pool's budget.
    pub fn holds_budget(&self) -> bool {
        !self.state.lock().window.runs.is_empty()
    }

    /// Gives up what was fetched ahead, and its share of the pool's budget: for readers that pause.
    pub fn release(&self) {
        *self.state.lock() = ReaderState { window_bytes: FIRST_WINDOW_BYTES / 2, ..ReaderState::default() };
    }

    /// Reads up to `buffer.len()` bytes at `offset`; returns how many there were.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let left = self.content.len().saturating_sub(offset);
        let count = (buffer.len() as u64).min(left) as usize;
        let end = offset + count as u64;
        let runs = match self.content {
            Content::Inline(_) => None,
            // There is nothing ahead.
            Content::Extents { list: List::Direct(ref extents), .. } if extents.len() == 1 => None,
            Content::Extents { .. } => self.runs(offset, end)?,
        };
        let Some(runs) = runs else {
            let chunks = Noted { chunks: &*self.pool.chunks.0, recorder: self.pool.recorder.as_deref() };
            return content::read_at(&chunks, &self.content, offset, buffer);
        };
        for run in runs {
            let (from, to) = (run.offset.max(offset), run.end().min(end));
            let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            match &run.slot {
                None => target.fill(0),
                Some(slot) => {
                    self.pool.note(&slot.id);
                    let plain = slot.wait(&*self.pool.chunks.0)?;
                    target.copy_from_slice(&plain[(from - run.offset) as usize..(to - run.offset) as usize]);
                }
            }
        }
        Ok(count)
    }

    /// The runs that cover `offset..end`, if this read is one of a sequence and the window holds them all.
    fn runs(&self, offset: u64, end: u64) -> Result<Option<Vec<Ahead>>> {
        if self.pool.is_scattered.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut state = self.state.lock();
        let ReaderState { window, window_bytes, last_end } = &mut *state;
        let in_order = offset.abs_diff(*last_end) <= SLACK_BYTES;
        *last_end = if in_order { end.max(*last_end) } else { end };
        if !in_order {
            window.restart(offset);
            *window_bytes = FIRST_WINDOW_BYTES / 2;
            return Ok(None);
        }
        if window.runs.is_empty() {
            window.restart(offset);
        }
        while window.runs.front().is_some_and(|run| run.end() + SLACK_BYTES <= offset) {
            window.runs.pop_front();
        }
        if window.frontier < end.saturating_add(*window_bytes / 2) {
            *window_bytes = (*window_bytes * 2).min(LAST_WINDOW_BYTES);
            // First, so that they are on their way, in few requests, before the first of them is waited for.
            let far = end.saturating_add(*window_bytes * REMOTE_FACTOR);
            window.announce(&self.pool, &self.content, far)?;
            window.fill(&self.pool, &self.content, end.saturating_add(*window_bytes))?;
        }
        let starts = window.runs.front().is_some_and(|run| run.offset <= offset);
        if !starts || window.frontier < end {
            return Ok(None);
        }
        Ok(Some(window.runs.iter().filter(|run| run.offset < end && run.end() > offset).cloned().collect()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunk::{ChunkWrite, Class, MemoryChunks};
    use crate::chunker::Chunker;
    use crate::content::ContentBuilder;

    fn file(chunks: &MemoryChunks, runs: &[(bool, u32)]) -> (Content, Vec<u8>) {
        let mut builder = ContentBuilder::new(Chunker::Tree);
        let mut expected = Vec::new();
        for (index, (hole, bytes)) in runs.iter().enumerate() {
            if *hole {
                builder.push(Extent::Hole { bytes: u64::from(*bytes) }, chunks).unwrap();
                expected.resize(expected.len() + *bytes as usize, 0);
            } else {
                let plain = vec![index as u8 + 1; *bytes as usize];
                let id = chunks.put(Class::Data, &plain).unwrap();
                builder.push(Extent::Chunk { id, bytes: *bytes }, chunks).unwrap();
                expected.extend(plain);
            }
        }
        (builder.finish(chunks).unwrap(), expected)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn reads_are_right_in_any_order_and_budget(
            runs in prop::collection::vec((prop::bool::weighted(0.2), 1u32..200_000), 0..40),
            reads in prop::collection::vec((prop::option::weighted(0.3, 0.0f64..1.1), 1usize..300_000), 1..40),
            budget in prop_oneof![Just(0usize), Just(300_000), Just(64_000_000)],
            threads in 0usize..3,
        ) {
            let chunks = MemoryChunks::default();
            let (content, expected) = file(&chunks, &runs);
            let pool = FetchPool::new(Arc::new(chunks), threads, budget);
            let reader = FileReader::new(pool.clone(), content);
            let mut at = 0;
            for (jump, bytes) in reads {
                if let Some(jump) = jump {
                    at = (jump * expected.len() as f64) as usize;
                }
                let mut buffer = vec![9; bytes];
                let count = reader.read_at(at as u64, &mut buffer).unwrap();
                let start = at.min(expected.len());
                prop_assert!(buffer[..count] == expected[start..(start + bytes).min(expected.len())]);
                at += count;
            }
            drop(reader);
            let budget_state = pool.budget.clone();
            drop(pool);
            prop_assert_eq!(budget_state.left.load(Ordering::Relaxed), budget);
        }
    }

    /// Chunks of another host, with what was announced to it.
    struct Remote(MemoryChunks, Mutex<Vec<ChunkId>>, AtomicUsize);

    impl ChunkRead for Remote {
        fn get(&self, id: &ChunkId) -> Result<Bytes> {
            self.2.fetch_add(1, Ordering::Relaxed);
            self.0.get(id)
        }
        fn is_remote(&self) -> bool {
            true
        }
        fn soon(&self, ids: &[ChunkId]) {
            self.1.lock().extend(ids);
        }
    }

    #[test]
    fn nothing_is_fetched_ahead_of_scattered_reads() {
        let chunks = MemoryChunks::default();
        let (content, expected) = file(&chunks, &[(false, 65_536); 64]);
        let read = |is_scattered: bool| {
            let remote = Arc::new(Remote(MemoryChunks::default(), Mutex::default(), AtomicUsize::new(0)));
            let (content, _) = file(&remote.0, &[(false, 65_536); 64]);
            // Without threads of its own, what is fetched is what was waited for.
            let pool = FetchPool::new(remote.clone(), 0, 64_000_000);
            if is_scattered {
                pool.expect_scattered();
            }
            let reader = FileReader::new(pool, content);
            let mut buffer = vec![0; 65_536];
            for at in 0..4 {
                assert_eq!(reader.read_at(at * 65_536, &mut buffer).unwrap(), buffer.len());
                assert!(buffer == expected[at as usize * 65_536..][..65_536]);
            }
            let announced = remote.1.lock().len();
            (announced, remote.2.load(Ordering::Relaxed))
        };
        assert_eq!(content.len(), 64 * 65_536);
        assert!(read(false).0 > 32);
        assert_eq!(read(true).0, 0);
    }

    #[test]
    fn a_missing_chunk_is_an_error_every_time() {
        let chunks = MemoryChunks::default();
        let (content, _) = file(&chunks, &[(false, 1000), (false, 2000), (false, 3000)]);
        for (id, bytes) in chunks.ids() {
            if bytes == 2000 {
                chunks.forget(&id);
            }
        }
        let pool = FetchPool::new(Arc::new(chunks), 2, 1 << 20);
        let reader = FileReader::new(pool, content);
        for _ in 0..2 {
            assert_eq!(reader.read_at(0, &mut [0; 1000]).unwrap(), 1000);
            assert!(matches!(reader.read_at(500, &mut [0; 1000]), Err(Error::ChunkMissing(_))));
        }
    }
}
