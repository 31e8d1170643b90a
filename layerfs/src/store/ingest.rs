//! The way in for many files: read and cut here, hash and compress in parallel, store in order.
//!
//! ```text
//! caller: read, cut → batches of 1 MiB → workers: hash, look up, compress → caller: append in order, build contents
//! ```
//!
//! It hides the threads. Invariants: contents come out in the order in which files went in, and chunks lie in
//! packs in that order; the sink runs on the caller's thread; at most [`MAX_JOBS`] batches per worker are in
//! memory, and of tags that wait [`MAX_TAG_BYTES`] and one more, whatever the files are.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::chunk::{Class, Verified};
use crate::chunker::{Chunker, Cutter, Piece};
use crate::content::{Content, ContentBuilder, Extent, INLINE_MAX};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::splice::{Changed, Spliced, splice};
use crate::store::session::{Inner, Session};
use crate::store::source::{Source, SourcePiece};

/// A batch is sent to the workers once it has this many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// The most batches per worker that are under way.
const MAX_JOBS: usize = 3;
/// The most events that wait for chunks.
const MAX_EVENTS: usize = 16 * 1024;
/// The most bytes that the tags among them hold, but for the last one.
const MAX_TAG_BYTES: usize = 4 << 20;
const READ_BYTES: usize = 256 * 1024;

/// What happens in order once the chunks in front of it are there.
enum Event<T> {
    Begin(T, Chunker),
    Data,
    Hole(u64),
    /// A chunk that the file had before.
    Kept(Extent),
    End,
    Whole(T, Option<Content>),
}

/// Plain chunks, one after the other.
#[derive(Default)]
struct Job {
    number: u64,
    plain: Vec<u8>,
    /// Where each chunk ends in `plain`.
    ends: Vec<usize>,
}

/// A chunk's id and plain length; the chunk itself if it is new.
type Ready = (ChunkId, u32, Option<Verified>);

struct Done {
    number: u64,
    /// To be filled again.
    plain: Vec<u8>,
    chunks: Result<Vec<Ready>>,
}

struct Workers {
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    fn start(inner: &Arc<Inner>) -> Result<Workers> {
        let (jobs, take_job) = unbounded::<Job>();
        let (give_done, done) = unbounded();
        let mut workers = Workers { jobs: Some(jobs), done, threads: Vec::new() };
        for _ in 0..inner.store().options().thread_count() {
            let (inner, take_job, give_done) = (inner.clone(), take_job.clone(), give_done.clone());
            let work = move || {
                take_job.iter().for_each(|job| {
                    let _ = give_done.send(run(&inner, job));
                });
            };
            let thread = std::thread::Builder::new().name("ingest".to_owned()).spawn(work);
            workers.threads.push(thread.map_err(|e| Error::io("starting a thread", e))?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn run(inner: &Inner, job: Job) -> Done {
    let prepare = || {
        let mut start = 0;
        let chunk = |end: &usize| {
            let plain = &job.plain[start..*end];
            start = *end;
            let (id, chunk) = inner.prepare(Class::Data, plain)?;
            Ok((id, plain.len() as u32, chunk))
        };
        job.ends.iter().map(chunk).collect()
    };
    let chunks = catch_unwind(AssertUnwindSafe(prepare))
        .unwrap_or_else(|_| Err(Error::Index("a thread of the store panicked".to_owned())));
    Done { number: job.number, plain: job.plain, chunks }
}

/// Takes files in and hands their contents to a sink, in order. Made by [`Session::ingest`].
pub struct Ingest<'s, T, F: FnMut(T, Option<Content>) -> Result<()>> {
    session: &'s Session,
    sink: F,
    events: VecDeque<Event<T>>,
    /// What a tag holds in memory besides itself, in bytes.
    weigh: fn(&T) -> usize,
    /// What those hold that are in `events`.
    tag_bytes: usize,
    /// The batch that is being filled.
    job: Job,
    next_job: u64,
    workers: Option<Workers>,
    under_way: usize,
    /// Batches that came back before an earlier one.
    early: BTreeMap<u64, Done>,
    next_done: u64,
    ready: std::vec::IntoIter<Ready>,
    current: Option<(T, ContentBuilder)>,
    buffer: Vec<u8>,
    spare: Vec<Vec<u8>>,
}

impl Session {
    /// Begins to take in files. `sink` gets each file's tag and content in the order in which they went in.
    pub fn ingest<T, F: FnMut(T, Option<Content>) -> Result<()>>(&self, sink: F) -> Ingest<'_, T, F> {
        Ingest {
            session: self,
            sink,
            events: VecDeque::new(),
            weigh: |_| 0,
            tag_bytes: 0,
            job: Job::default(),
            next_job: 0,
            workers: None,
            under_way: 0,
            early: BTreeMap::new(),
            next_done: 0,
            ready: Vec::new().into_iter(),
            current: None,
            buffer: vec![0; READ_BYTES],
            spare: Vec::new(),
        }
    }
}

impl<T, F: FnMut(T, Option<Content>) -> Result<()>> Ingest<'_, T, F> {
    /// Has `weigh` tell what a tag holds in memory besides itself, in bytes, so that this is bounded too. Without it,
    /// only the number of tags is.
    pub fn weighing(mut self, weigh: fn(&T) -> usize) -> Self {
        self.weigh = weigh;
        self
    }

    /// Takes in a file whose content `source` yields, cut by `chunker`. Once this has failed, the session is of no
    /// more use.
    pub fn file(&mut self, tag: T, chunker: Chunker, source: &mut dyn Source) -> Result<()> {
        self.file_cut(tag, chunker, Cutter::new(chunker), source)
    }

    /// Takes in a file that is cut at the offsets `cuts`, which ascend.
    pub fn file_at(&mut self, tag: T, cuts: &[u64], source: &mut dyn Source) -> Result<()> {
        self.file_cut(tag, Chunker::Named, Cutter::named(cuts), source)
    }

    fn file_cut(&mut self, tag: T, chunker: Chunker, cutter: Cutter<'_>, source: &mut dyn Source) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.read_file(tag, chunker, cutter, source, &mut buffer);
        self.buffer = buffer;
        result
    }

    /// Takes in a file that was `old`, cut by the same chunker, reading little more than what has changed. The layer with
    /// `old` must be kept by something else, as its chunks are counted on.
    pub fn changed(&mut self, tag: T, chunker: Chunker, old: &Content, file: &mut dyn Changed) -> Result<()> {
        self.event(Event::Begin(tag, chunker))?;
        let store = self.session.store().clone();
        splice(&*store, old, chunker, file, &mut |piece| match piece {
            Spliced::Kept(extent) => self.event(Event::Kept(extent)),
            Spliced::New(piece) => self.piece(piece),
        })?;
        self.event(Event::End)
    }

    /// Lets a file whose content is known already keep its place in the order.
    pub fn known(&mut self, tag: T, content: Content) -> Result<()> {
        self.event(Event::Whole(tag, Some(content)))
    }

    /// Lets something without content of its own keep its place in the order: the sink gets `tag` and `None`.
    pub fn pass(&mut self, tag: T) -> Result<()> {
        self.event(Event::Whole(tag, None))
    }

    /// Waits for everything that is under way.
    pub fn finish(mut self) -> Result<()> {
        if !self.job.ends.is_empty() {
            if self.workers.is_some() {
                self.send()?;
            } else {
                // So little that starting threads isn't worth it.
                let done = run(self.session.inner(), std::mem::take(&mut self.job));
                self.ready = done.chunks?.into_iter();
            }
        }
        while !self.events.is_empty() {
            self.pump(true)?;
        }
        Ok(())
    }

    fn read_file(
        &mut self,
        tag: T,
        chunker: Chunker,
        mut cutter: Cutter<'_>,
        source: &mut dyn Source,
        buffer: &mut [u8],
    ) -> Result<()> {
        let mut count = 0;
        let mut pending_hole = 0;
        while count <= INLINE_MAX && pending_hole == 0 {
            match source.next(&mut buffer[count..])? {
                SourcePiece::Data(more) => count += more,
                SourcePiece::Hole(zeros) if zeros <= (INLINE_MAX - count) as u64 => {
                    buffer[count..count + zeros as usize].fill(0);
                    count += zeros as usize;
                }
                SourcePiece::Hole(zeros) => pending_hole = zeros,
                SourcePiece::End => {
                    return self.event(Event::Whole(tag, Some(Content::Inline(buffer[..count].to_vec()))));
                }
            }
        }
        self.event(Event::Begin(tag, chunker))?;
        cutter.data(&buffer[..count], &mut |piece| self.piece(piece))?;
        cutter.hole(pending_hole, &mut |piece| self.piece(piece))?;
        loop {
            match source.next(buffer)? {
                SourcePiece::Data(count) => cutter.data(&buffer[..count], &mut |piece| self.piece(piece))?,
                SourcePiece::Hole(zeros) => cutter.hole(zeros, &mut |piece| self.piece(piece))?,
                SourcePiece::End => break,
            }
        }
        cutter.finish(&mut |piece| self.piece(piece))?;
        self.event(Event::End)
    }

    fn piece(&mut self, piece: Piece<'_>) -> Result<()> {
        let data = match piece {
            Piece::Hole(bytes) => return self.event(Event::Hole(bytes)),
            Piece::Data(data) => data,
        };
        self.job.plain.extend_from_slice(data);
        self.job.ends.push(self.job.plain.len());
        self.event(Event::Data)?;
        if self.job.plain.len() >= BATCH_BYTES { self.send() } else { Ok(()) }
    }

    fn event(&mut self, event: Event<T>) -> Result<()> {
        self.tag_bytes += self.weight(&event);
        self.events.push_back(event);
        if self.events.len() < MAX_EVENTS && self.tag_bytes < MAX_TAG_BYTES {
            return Ok(());
        }
        if !self.job.ends.is_empty() {
            self.send()?;
        }
        while self.events.len() >= MAX_EVENTS / 2 || self.tag_bytes >= MAX_TAG_BYTES / 2 {
            self.pump(true)?;
        }
        Ok(())
    }

    fn weight(&self, event: &Event<T>) -> usize {
        match event {
            Event::Begin(tag, _) | Event::Whole(tag, _) => (self.weigh)(tag),
            Event::Data | Event::Hole(_) | Event::Kept(_) | Event::End => 0,
        }
    }

    /// Sends the batch to the workers, and waits while too many are under way.
    fn send(&mut self) -> Result<()> {
        let workers = match &mut self.workers {
            Some(workers) => workers,
            none => none.insert(Workers::start(self.session.inner())?),
        };
        let limit = MAX_JOBS * workers.threads.len();
        let fresh = || Vec::with_capacity(BATCH_BYTES + crate::chunk::MAX_CHUNK_BYTES);
        let plain = self.spare.pop().unwrap_or_else(fresh);
        let next = Job { number: self.next_job + 1, plain, ends: Vec::new() };
        let job = std::mem::replace(&mut self.job, next);
        self.next_job += 1;
        self.under_way += 1;
        let gone = || Error::Index("the store's threads are gone".to_owned());
        workers.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        self.pump(false)?;
        while self.under_way >= limit {
            self.pump(true)?;
        }
        Ok(())
    }

    /// Does what can be done in order now; if that is nothing and `wait`, waits for a batch.
    fn pump(&mut self, mut wait: bool) -> Result<()> {
        loop {
            self.run_events()?;
            let done = match self.early.remove(&self.next_done) {
                Some(done) => done,
                None => match self.receive(wait)? {
                    Some(done) if done.number == self.next_done => done,
                    Some(done) => {
                        self.early.insert(done.number, done);
                        continue;
                    }
                    None => return Ok(()),
                },
            };
            wait = false;
            self.next_done += 1;
            self.under_way -= 1;
            let mut plain = done.plain;
            plain.clear();
            self.spare.push(plain);
            self.ready = done.chunks?.into_iter();
        }
    }

    fn receive(&self, wait: bool) -> Result<Option<Done>> {
        let Some(workers) = self.workers.as_ref().filter(|_| self.under_way > self.early.len()) else {
            return Ok(None);
        };
        if !wait {
            return Ok(workers.done.try_recv().ok());
        }
        workers.done.recv().map(Some).map_err(|_| Error::Index("the store's threads are gone".to_owned()))
    }

    /// Runs events up to the first that wants a chunk that isn't there yet.
    fn run_events(&mut self) -> Result<()> {
        while let Some(event) = self.events.front() {
            let chunk = match event {
                Event::Data => match self.ready.next() {
                    Some(chunk) => Some(chunk),
                    None => return Ok(()),
                },
                _ => None,
            };
            let Some(event) = self.events.pop_front() else { return Ok(()) };
            self.tag_bytes -= self.weight(&event);
            self.run_event(event, chunk)?;
        }
        Ok(())
    }

    fn run_event(&mut self, event: Event<T>, chunk: Option<Ready>) -> Result<()> {
        match (event, chunk, &mut self.current) {
            (Event::Begin(tag, chunker), ..) => self.current = Some((tag, ContentBuilder::new(chunker))),
            (Event::Whole(tag, content), ..) => (self.sink)(tag, content)?,
            (Event::Kept(extent), _, Some((_, builder))) => builder.push(extent, self.session)?,
            (Event::Hole(bytes), _, Some((_, builder))) => builder.push(Extent::Hole { bytes }, self.session)?,
            (Event::Data, Some((id, bytes, new)), Some((_, builder))) => {
                if let Some(chunk) = new {
                    self.session.inner().append(chunk.stored(), false)?;
                }
                builder.push(Extent::Chunk { id, bytes }, self.session)?;
            }
            (Event::End, ..) => {
                if let Some((tag, builder)) = self.current.take() {
                    let content = builder.finish(self.session)?;
                    (self.sink)(tag, Some(content))?;
                }
            }
            (Event::Hole(_) | Event::Kept(_) | Event::Data, ..) => unreachable!("a piece outside of a file"),
        }
        Ok(())
    }
}
