//! Held chunks that resemble others by content, wherever they lie: for what was renamed, moved within a disk image, or
//! built anew.
//!
//! Of each chunk of the held layers some short windows are remembered: those whose hash says so, about one in 2 KiB, so
//! that the same bytes are remembered wherever they stand. A chunk resembles those with which it shares windows. Hides
//! when that is worth its time: the held layers are read by a thread of their own, begun with the first chunk that has
//! no base; whoever needs the answer waits for it no longer than the link would take for what is at stake. Memory: up to
//! [`MAX_SAMPLES`] windows of 16 bytes, and an id for each chunk that they are from.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use layerfs::closure::{Part, Records, walk_content};
use layerfs::inode::Node;
use layerfs::manifest::Manifest;
use layerfs::store::Store;
use layerfs::{LayerId, Result};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::plan::Base;
use crate::wire::base_name;

/// So many windows are remembered at most; what is read after that isn't found.
const MAX_SAMPLES: usize = 3_000_000;
/// So many bytes of held layers are read at most.
const MAX_READ_BYTES: u64 = 16 << 30;
/// One window in so many, as a power of two.
const SAMPLE_BITS: u32 = 11;
/// How long a window is.
const WINDOW: usize = 32;
/// A chunk has so many windows remembered at most.
const MAX_PER_CHUNK: usize = 128;
/// Chunks smaller than this aren't worth it.
const MIN_BYTES: u32 = 1024;
/// A chunk gets so many bases at most.
const MAX_FOUND: usize = 4;
/// How fast a link is thought to be until it was the slower side, in bytes per second.
const UNKNOWN_RATE: f64 = 100e6;
/// What anybody waits at least, and at most.
const LEAST_WAIT: Duration = if cfg!(test) { MOST_WAIT } else { Duration::from_millis(60) };
const MOST_WAIT: Duration = Duration::from_secs(20);

/// Random numbers, one for each byte.
static GEAR: [u32; 256] = gear();

const fn gear() -> [u32; 256] {
    let mut table = [0; 256];
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut at = 0;
    while at < 256 {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        table[at] = (mixed >> 32) as u32;
        at += 1;
    }
    table
}

/// Gives the windows of `plain` that are remembered, up to so many, to `found`.
fn samples(plain: &[u8], most: usize, found: &mut dyn FnMut(u32)) {
    let mut hash = 0u32;
    let mut count = 0;
    for (at, byte) in plain.iter().enumerate() {
        // The highest bits depend on the last 32 bytes.
        hash = (hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
        if hash >> (32 - SAMPLE_BITS) == 0 && at + 1 >= WINDOW {
            let window = &plain[at + 1 - WINDOW..=at];
            if let Some(name) = name_of(window) {
                found(name);
                count += 1;
                if count == most {
                    return;
                }
            }
        }
    }
}

/// A number for a window; none for one that says nothing (a run of one byte).
fn name_of(window: &[u8]) -> Option<u32> {
    if window.iter().all(|byte| *byte == window[0]) {
        return None;
    }
    let mut name = 0xCBF2_9CE4_8422_2325u64;
    for eight in window.chunks_exact(8) {
        let mut word = [0; 8];
        word.copy_from_slice(eight);
        name = (name ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        name ^= name >> 29;
    }
    Some((name >> 16) as u32)
}

/// Whether most of `plain`'s windows stand in `base` too.
pub(crate) fn resembles(plain: &[u8], base: &[u8]) -> bool {
    let mut there = HashSet::new();
    samples(base, usize::MAX, &mut |name| {
        there.insert(name);
    });
    let (mut shared, mut all) = (0, 0);
    samples(plain, usize::MAX, &mut |name| {
        shared += usize::from(there.contains(&name));
        all += 1;
    });
    // Too short to have any: only trying would tell.
    all < 2 || shared * 3 >= all * 2
}

/// The windows of many chunks.
#[derive(Debug, Default)]
struct Sketches {
    /// A window's number → the first chunk that has it.
    windows: HashMap<u32, u32>,
    chunks: Vec<Base>,
}

impl Sketches {
    fn add(&mut self, base: Base, plain: &[u8]) {
        let number = self.chunks.len() as u32;
        let windows = &mut self.windows;
        samples(plain, MAX_PER_CHUNK, &mut |name| {
            if windows.len() < MAX_SAMPLES {
                windows.entry(name).or_insert(number);
            }
        });
        self.chunks.push(base);
    }

    fn is_full(&self) -> bool {
        self.windows.len() >= MAX_SAMPLES
    }

    /// The chunks that share the most with `plain`, most first.
    fn similar(&self, plain: &[u8]) -> Vec<Base> {
        let mut shared: HashMap<u32, u32> = HashMap::new();
        samples(plain, MAX_PER_CHUNK, &mut |name| {
            if let Some(number) = self.windows.get(&name) {
                *shared.entry(*number).or_default() += 1;
            }
        });
        let mut found: Vec<(u32, u32)> = shared.into_iter().map(|(number, count)| (count, number)).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        // One window may be chance where there are many.
        let least = if found.first().is_some_and(|(count, _)| *count > 4) { 2 } else { 1 };
        let found = found.into_iter().take(MAX_FOUND).filter(|(count, _)| *count >= least);
        found.filter_map(|(_, number)| self.chunks.get(number as usize).copied()).collect()
    }
}

/// Finds held chunks by content. Does nothing until it is asked for the first time.
pub(crate) struct Similar {
    store: Arc<Store>,
    lacking: Vec<LayerId>,
    held: Vec<LayerId>,
    sketches: RwLock<Sketches>,
    /// When reading began, and whether it is over.
    state: Mutex<State>,
    changed: Condvar,
    /// Plain bytes of chunks without bases until now.
    at_stake: AtomicU64,
    /// Bytes a second of the link; 0 as long as nobody knows.
    link_rate: AtomicU64,
    is_given_up: AtomicBool,
}

#[derive(Default)]
struct State {
    began: Option<Instant>,
    is_over: bool,
}

impl Similar {
    /// Looks for chunks of the layers `lacking` among those of `held`.
    pub fn new(store: Arc<Store>, lacking: Vec<LayerId>, held: Vec<LayerId>) -> Arc<Similar> {
        Arc::new(Similar {
            store,
            lacking,
            held,
            sketches: RwLock::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            at_stake: AtomicU64::new(0),
            link_rate: AtomicU64::new(0),
            is_given_up: AtomicBool::new(false),
        })
    }

    /// A chunk of file data of so many plain bytes will be sent that has no base. Starts reading.
    pub fn expect(self: &Arc<Similar>, plain_bytes: u32) {
        self.at_stake.fetch_add(u64::from(plain_bytes), Relaxed);
        let mut state = self.state.lock();
        if state.began.is_some() || self.held.is_empty() || plain_bytes < MIN_BYTES {
            return;
        }
        state.began = Some(Instant::now());
        let this = self.clone();
        let thread = std::thread::Builder::new().name("similar".to_owned()).spawn(move || {
            if let Err(error) = this.read() {
                // Without it only more bytes are sent.
                tracing::debug!(%error, "held layers could not be searched for similar chunks");
            }
            this.state.lock().is_over = true;
            this.changed.notify_all();
        });
        state.is_over = thread.is_err();
    }

    /// The link takes so many bytes a second.
    pub fn set_link_rate(&self, rate: f64) {
        self.link_rate.store(rate as u64, Relaxed);
    }

    /// Nobody will ask any more.
    pub fn give_up(&self) {
        self.is_given_up.store(true, Relaxed);
    }

    /// Held chunks that resemble `plain`. Waits a while if they are still being looked for.
    pub fn find(&self, plain: &[u8]) -> Vec<Base> {
        if self.held.is_empty() || (plain.len() as u64) < u64::from(MIN_BYTES) {
            return Vec::new();
        }
        self.wait();
        self.sketches.read().similar(plain)
    }

    fn wait(&self) {
        let rate = match self.link_rate.load(Relaxed) {
            0 => UNKNOWN_RATE,
            known => known as f64,
        };
        let seconds = self.at_stake.load(Relaxed) as f64 / rate / 3.0;
        let most = Duration::from_secs_f64(seconds).clamp(LEAST_WAIT, MOST_WAIT);
        let mut state = self.state.lock();
        let Some(began) = state.began else { return };
        while !state.is_over && began.elapsed() < most {
            self.changed.wait_for(&mut state, most.saturating_sub(began.elapsed()));
        }
    }

    /// The held layers, those first that stand where one of the lacking does: an application's last version before the
    /// system that it lies on.
    fn kin_first(&self) -> Result<Vec<Manifest>> {
        let load = |id: &LayerId| Manifest::load(self.store.as_ref(), *id);
        let lacking = self.lacking.iter().map(load).collect::<Result<Vec<_>>>()?;
        let mut held = self.held.iter().map(load).collect::<Result<Vec<_>>>()?;
        held.sort_by_key(|manifest| !lacking.iter().any(|other| other.parent == manifest.parent));
        Ok(held)
    }

    fn read(&self) -> Result<()> {
        let store = self.store.as_ref();
        let mut seen: HashSet<[u8; 8]> = HashSet::new();
        let mut bytes_read = 0;
        for manifest in self.kin_first()? {
            let mut inodes = Records::inodes(store, &manifest)?;
            while let Some(inode) = inodes.next_inode()? {
                let Node::File(content) = &inode.node else { continue };
                walk_content(store, content, &mut |part| {
                    let Part::Chunk(id, bytes) = part else { return Ok(true) };
                    if bytes < MIN_BYTES || !seen.insert(base_name(&id)) {
                        return Ok(true);
                    }
                    if self.is_given_up.load(Relaxed) {
                        return Err(layerfs::Error::Cancelled);
                    }
                    // What can't be read can't be a base.
                    if let Ok(plain) = store.get_uncached(&id) {
                        self.sketches.write().add(Base { id, bytes }, &plain);
                        bytes_read += u64::from(bytes);
                    }
                    Ok(true)
                })?;
                if bytes_read > MAX_READ_BYTES || self.sketches.read().is_full() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use layerfs::ChunkId;

    use super::*;

    fn noise(seed: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn moved_and_mixed_bytes_are_found() {
        let mut sketches = Sketches::default();
        let chunks: Vec<Vec<u8>> = (0..100).map(|n| noise(n, 64 << 10)).collect();
        for chunk in &chunks {
            sketches.add(Base { id: ChunkId::of(chunk), bytes: chunk.len() as u32 }, chunk);
        }
        // Two halves of two chunks, at other places, with something new between.
        let mixed = [&chunks[7][1000..30_000], &noise(1000, 5000), &chunks[42][20_000..50_000]].concat();
        let found: Vec<ChunkId> = sketches.similar(&mixed).into_iter().map(|base| base.id).collect();
        assert_eq!(found.len(), 2);
        assert!(found.contains(&ChunkId::of(&chunks[7])) && found.contains(&ChunkId::of(&chunks[42])));
        assert!(sketches.similar(&noise(5000, 64 << 10)).is_empty());
        assert!(sketches.similar(&vec![0; 64 << 10]).is_empty());
    }

    #[test]
    fn small_edits_don_t_hide_a_chunk() {
        let mut sketches = Sketches::default();
        let old = noise(1, 60_000);
        sketches.add(Base { id: ChunkId::of(&old), bytes: 60_000 }, &old);
        let mut new = old.clone();
        // A byte in two hundred: one window in six is hit.
        (0..new.len()).step_by(200).for_each(|at| new[at] ^= 0x55);
        assert_eq!(sketches.similar(&new).len(), 1);
    }
}
