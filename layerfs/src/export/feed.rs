//! A stream put together from chunks: fetched by several threads, consumed in order.
//!
//! One thread produces (walks the tree and says what comes next), several fetch and verify chunks, the calling
//! thread consumes. Memory: [`QUEUE`] batches of about [`BATCH_BYTES`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, bounded};

use crate::chunk::ChunkRead;
use crate::content;
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::monitor::{self, Monitor};

const BATCH_BYTES: usize = 512 * 1024;
const QUEUE: usize = 12;

enum Item {
    Bytes(Vec<u8>),
    Chunk { id: ChunkId, bytes: u32 },
}

type Fetched = Result<Vec<Bytes>>;
type Job = (Vec<Item>, Sender<Fetched>);

/// Where the producer puts what comes next in the stream.
pub struct Feed<'a> {
    batch: Vec<Item>,
    batch_bytes: usize,
    work: Sender<Job>,
    order: Sender<Receiver<Fetched>>,
    stopped: &'a AtomicBool,
    monitor: &'a dyn Monitor,
}

impl Feed<'_> {
    /// The stream goes on with `bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(Item::Bytes(last)) = self.batch.last_mut() {
            last.extend_from_slice(bytes);
        } else {
            self.batch.push(Item::Bytes(bytes.to_vec()));
        }
        self.grown(bytes.len())
    }

    /// The stream goes on with `count` zero bytes: padding, not holes.
    pub fn zeros(&mut self, count: usize) -> Result<()> {
        self.bytes(&vec![0; count])
    }

    /// The stream goes on with chunk `id` of `bytes` plain bytes.
    pub fn chunk(&mut self, id: ChunkId, bytes: u32) -> Result<()> {
        self.batch.push(Item::Chunk { id, bytes });
        self.grown(bytes as usize)
    }

    fn grown(&mut self, bytes: usize) -> Result<()> {
        self.batch_bytes += bytes;
        if self.batch_bytes >= BATCH_BYTES { self.submit() } else { Ok(()) }
    }

    fn submit(&mut self) -> Result<()> {
        monitor::check(self.monitor)?;
        if self.batch.is_empty() {
            return Ok(());
        }
        let (reply, fetched) = bounded(1);
        self.batch_bytes = 0;
        let sent = self.work.send((std::mem::take(&mut self.batch), reply)).is_ok() && self.order.send(fetched).is_ok();
        if sent && !self.stopped.load(Ordering::Relaxed) { Ok(()) } else { Err(Error::Cancelled) }
    }
}

/// Runs `produce` and gives what it feeds to `consume`, in order. The first error ends it, wherever it comes from.
pub fn run<T: Send>(
    chunks: &dyn ChunkRead,
    monitor: &dyn Monitor,
    produce: impl FnOnce(&mut Feed<'_>) -> Result<T> + Send,
    mut consume: impl FnMut(&[u8]) -> Result<()>,
) -> Result<T> {
    let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let stopped = Arc::new(AtomicBool::new(false));
    let (work, jobs) = bounded::<Job>(QUEUE);
    let (order, fetched) = bounded::<Receiver<Fetched>>(QUEUE);
    thread::scope(|scope| {
        for _ in 0..threads {
            let jobs = jobs.clone();
            scope.spawn(move || {
                for (batch, reply) in jobs {
                    let _ = reply.send(fetch(chunks, batch));
                }
            });
        }
        drop(jobs);
        let stopped_too = Arc::clone(&stopped);
        let producer = scope.spawn(move || {
            let mut feed = Feed { batch: Vec::new(), batch_bytes: 0, work, order, stopped: &stopped_too, monitor };
            let produced = produce(&mut feed)?;
            feed.submit()?;
            Ok(produced)
        });
        let mut consumed = Ok(());
        for batch in &fetched {
            consumed = consume_batch(&batch, &mut consume);
            if consumed.is_err() {
                break;
            }
        }
        stopped.store(true, Ordering::Relaxed);
        drop(fetched);
        let produced = producer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // A consumer's failure stops the producer, which then says "cancelled".
        consumed.and(produced)
    })
}

fn consume_batch(batch: &Receiver<Fetched>, consume: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let pieces = batch.recv().map_err(|_| Error::Cancelled)??;
    pieces.iter().try_for_each(|piece| consume(piece))
}

fn fetch(chunks: &dyn ChunkRead, batch: Vec<Item>) -> Fetched {
    let fetch_one = |item| match item {
        Item::Bytes(bytes) => Ok(Bytes::from(bytes)),
        Item::Chunk { id, bytes } => content::get_sized(chunks, &id, bytes),
    };
    batch.into_iter().map(fetch_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{ChunkWrite, Class, MemoryChunks};
    use crate::monitor::{Counting, Silent};

    #[test]
    fn the_stream_keeps_its_order() {
        let chunks = MemoryChunks::default();
        let mut expected = Vec::new();
        let mut list = Vec::new();
        for n in 0..300u32 {
            let plain: Vec<u8> = (0..n * 97 + 1).flat_map(|k| (k ^ n).to_le_bytes()).collect();
            list.push((chunks.put(Class::Data, &plain).unwrap(), plain.len() as u32));
            expected.extend_from_slice(b"header");
            expected.extend_from_slice(&plain);
        }
        let mut got = Vec::new();
        run(
            &chunks,
            &Silent,
            |feed| list.iter().try_for_each(|(id, bytes)| feed.bytes(b"header").and_then(|()| feed.chunk(*id, *bytes))),
            |piece| {
                got.extend_from_slice(piece);
                Ok(())
            },
        )
        .unwrap();
        assert!(got == expected);
    }

    #[test]
    fn every_side_can_fail() {
        let chunks = MemoryChunks::default();
        let endless = |feed: &mut Feed<'_>| -> Result<()> {
            loop {
                feed.zeros(1 << 16)?;
            }
        };
        let refused = run(&chunks, &Silent, endless, |_| Err(Error::invalid("enough")));
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
        let monitor = Counting::default();
        monitor.cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(run(&chunks, &monitor, endless, |_| Ok(())), Err(Error::Cancelled)));
        let missing = run(&chunks, &Silent, |feed| feed.chunk(ChunkId([1; 32]), 5), |_| Ok(()));
        assert!(matches!(missing, Err(Error::ChunkMissing(_))), "{missing:?}");
        let stumbles = run(&chunks, &Silent, |_| Err::<(), _>(Error::invalid("no")), |_| Ok(()));
        assert!(matches!(stumbles, Err(Error::Invalid(_))), "{stumbles:?}");
    }
}
