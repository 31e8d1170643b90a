//! Sets of chunk ids in little memory, which may answer yes wrongly but never no.
//!
//! Used where "yes" only keeps a chunk for longer: by the garbage collector for what it has marked, by each session
//! for what it has mentioned.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::id::ChunkId;

const BITS_PER_ID: u64 = 16;
const PROBES: u64 = 8;

/// A Bloom filter over chunk ids. An id is a hash already, so its own bytes choose the bits.
#[derive(Debug)]
pub(crate) struct IdFilter {
    words: Vec<AtomicU64>,
}

impl IdFilter {
    /// A filter that answers wrongly in less than one case of a thousand while it holds up to `capacity` ids.
    pub fn new(capacity: u64) -> IdFilter {
        let words = (capacity.max(64) * BITS_PER_ID).div_ceil(64);
        IdFilter { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    fn bits(&self, id: &ChunkId) -> impl Iterator<Item = u64> + use<> {
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| id.0[at + i]));
        let (first, step) = (half(0), half(8) | 1);
        let bits = self.words.len() as u64 * 64;
        (0..PROBES).map(move |probe| first.wrapping_add(probe.wrapping_mul(step)) % bits)
    }

    /// Adds `id`.
    pub fn insert(&self, id: &ChunkId) {
        for bit in self.bits(id) {
            self.words[(bit / 64) as usize].fetch_or(1 << (bit % 64), Ordering::SeqCst);
        }
    }

    /// Whether `id` was added, perhaps.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.bits(id).all(|bit| self.words[(bit / 64) as usize].load(Ordering::SeqCst) & (1 << (bit % 64)) != 0)
    }

    fn capacity(&self) -> u64 {
        self.words.len() as u64 * 64 / BITS_PER_ID
    }
}

/// A filter that grows with what is added, up to [`Touched::MAX_IDS`]; beyond, it errs more often.
#[derive(Debug)]
pub(crate) struct Touched {
    levels: RwLock<Vec<IdFilter>>,
    count: AtomicU64,
}

impl Touched {
    /// 4 million ids in 8 MiB.
    const MAX_IDS: u64 = 4 << 20;
    const FIRST_LEVEL: u64 = 4096;

    pub fn new() -> Touched {
        Touched { levels: RwLock::new(vec![IdFilter::new(Self::FIRST_LEVEL)]), count: AtomicU64::new(0) }
    }

    /// Adds `id`.
    pub fn insert(&self, id: &ChunkId) {
        let room = {
            let levels = self.levels.read();
            if let Some(last) = levels.last() {
                last.insert(id);
            }
            levels.iter().map(IdFilter::capacity).sum::<u64>()
        };
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if count > room && room < Self::MAX_IDS {
            let mut levels = self.levels.write();
            if levels.iter().map(IdFilter::capacity).sum::<u64>() == room {
                levels.push(IdFilter::new(room));
            }
        }
    }

    /// Whether `id` was added, perhaps.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.levels.read().iter().any(|level| level.contains(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_forgets_and_seldom_invents() {
        let id = |number: u32| ChunkId::of(&number.to_le_bytes());
        let touched = Touched::new();
        (0..50_000).for_each(|number| touched.insert(&id(number)));
        assert!((0..50_000).all(|number| touched.contains(&id(number))));
        let invented = (50_000..150_000).filter(|number| touched.contains(&id(*number))).count();
        assert!(invented < 500, "{invented} of 100000");
    }
}
