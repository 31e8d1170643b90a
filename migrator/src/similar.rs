//! Held chunks that resemble others by content, wherever they lie: for what was renamed, moved within a disk image, or
//! built anew.
//!
//! Of each chunk of the held layers some short windows are remembered: those whose hash says so, about one in 2 KiB, so
//! that the same bytes are remembered wherever they stand. A chunk resembles those with which it shares windows. Hides
//! when that is worth its time: the held layers are read by a thread of their own, begun with the first chunk that has
//! no base; whoever needs the answer waits for it no longer than the link would take for what is at stake. What a guest has
//! read of its stack is known, and often lies in its memory, so that these chunks alone are read, once for all of its rounds.
//! Memory: up to [`MAX_SAMPLES`] windows of 16 bytes, and an id for each chunk that they are from.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use layerfs::closure::{Opened, Part, Records, walk_new};
use layerfs::inode::Node;
use layerfs::manifest::Manifest;
use layerfs::store::Store;
use layerfs::{ChunkId, LayerId, Result};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::plan::Base;
use crate::wire::base_name;

/// So many windows are remembered at most; what is read after that isn't found.
const MAX_SAMPLES: usize = 3_000_000;
/// So many chunks of held layers are remembered by their names at most, where it is said which are to be read (48 bytes each).
const MAX_HELD: usize = 400_000;
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
/// The same for chunks that are read once for several transfers.
const CHUNKS_WAIT: Duration = Duration::from_secs(2);

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

    /// Whether at least half of the windows of `plain` stand in some chunk.
    fn knows(&self, plain: &[u8]) -> bool {
        let (mut known, mut all) = (0, 0);
        samples(plain, usize::MAX, &mut |name| {
            known += usize::from(self.windows.contains_key(&name));
            all += 1;
        });
        known > 0 && known * 2 >= all
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

/// Where similar chunks are looked for.
#[derive(Debug)]
enum Among {
    /// In the layers `held`, for what `lacking` have.
    Layers { lacking: Vec<LayerId>, held: Vec<LayerId> },
    /// Among these chunks, as far as they are of the layers `held`.
    Chunks { chunks: HashSet<ChunkId>, held: Vec<LayerId> },
}

/// Finds held chunks by content. Does nothing until it is asked for the first time.
pub(crate) struct Similar {
    store: Arc<Store>,
    among: Among,
    sketches: RwLock<Sketches>,
    /// Of [`Among::Chunks`]: all that the layers hold, and whether it was read.
    held: Mutex<HashMap<ChunkId, (u32, bool)>>,
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
        Similar::among(store, Among::Layers { lacking, held })
    }

    /// Looks among those of `chunks` that the layers `held` have, for several transfers one after the other. Begins to read them at
    /// once.
    pub fn of_chunks(store: Arc<Store>, chunks: HashSet<ChunkId>, held: Vec<LayerId>) -> Arc<Similar> {
        let similar = Similar::among(store, Among::Chunks { chunks, held });
        similar.begin();
        similar
    }

    fn among(store: Arc<Store>, among: Among) -> Arc<Similar> {
        Arc::new(Similar {
            store,
            among,
            sketches: RwLock::default(),
            held: Mutex::default(),
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
        if plain_bytes >= MIN_BYTES {
            self.begin();
        }
    }

    /// Whether it is known which chunks may be alike, so that most of what is looked for will be found.
    pub fn is_known(&self) -> bool {
        matches!(self.among, Among::Chunks { .. })
    }

    fn is_empty(&self) -> bool {
        match &self.among {
            Among::Layers { held, .. } => held.is_empty(),
            Among::Chunks { chunks, .. } => chunks.is_empty(),
        }
    }

    fn begin(self: &Arc<Similar>) {
        let mut state = self.state.lock();
        if state.began.is_some() || self.is_empty() {
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

    /// This transfer won't ask any more.
    pub fn give_up(&self) {
        // The chunks are for the next one too.
        if !self.is_known() {
            self.is_given_up.store(true, Relaxed);
        }
    }

    /// Whether most of `plain` is known to stand in held chunks. Always no where whole layers would have to be read for that.
    pub fn knows(&self, plain: &[u8]) -> bool {
        if self.is_empty() || !self.is_known() {
            return false;
        }
        self.wait();
        self.sketches.read().knows(plain)
    }

    /// Held chunks that resemble `plain`. Waits a while if they are still being looked for.
    pub fn find(&self, plain: &[u8]) -> Vec<Base> {
        if self.is_empty() || (plain.len() as u64) < u64::from(MIN_BYTES) {
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
        let most = match self.among {
            Among::Layers { .. } => Duration::from_secs_f64(seconds).clamp(LEAST_WAIT, MOST_WAIT),
            Among::Chunks { .. } => CHUNKS_WAIT,
        };
        let mut state = self.state.lock();
        let Some(began) = state.began else { return };
        while !state.is_over && began.elapsed() < most {
            self.changed.wait_for(&mut state, most.saturating_sub(began.elapsed()));
        }
    }

    /// The held layers, those first that stand where one of the lacking does: an application's last version before the
    /// system that it lies on.
    fn kin_first(&self, lacking: &[LayerId], held: &[LayerId]) -> Result<Vec<Manifest>> {
        let load = |id: &LayerId| Manifest::load(self.store.as_ref(), *id);
        let lacking = lacking.iter().map(load).collect::<Result<Vec<_>>>()?;
        let mut held = held.iter().map(load).collect::<Result<Vec<_>>>()?;
        held.sort_by_key(|manifest| !lacking.iter().any(|other| other.parent == manifest.parent));
        Ok(held)
    }

    fn read(&self) -> Result<()> {
        match &self.among {
            Among::Layers { lacking, held } => self.read_layers(lacking, held),
            Among::Chunks { chunks, held } => self.read_chunks(chunks, held),
        }
    }

    fn read_chunks(&self, chunks: &HashSet<ChunkId>, held: &[LayerId]) -> Result<()> {
        for layer in held {
            self.store.data_in_order(*layer, &mut |id, bytes| {
                let mut held = self.held.lock();
                if held.len() < MAX_HELD {
                    held.entry(id).or_insert((bytes, false));
                }
                drop(held);
                if chunks.contains(&id) {
                    self.read_chunk(id);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn read_chunk(&self, id: ChunkId) {
        let bytes = match self.held.lock().get_mut(&id) {
            Some((bytes, is_read)) if !*is_read => {
                *is_read = true;
                *bytes
            }
            _ => return,
        };
        let is_full = self.sketches.read().is_full();
        // What can't be read can't be a base.
        if !is_full && let Ok(plain) = self.store.get_uncached(&id) {
            self.sketches.write().add(Base { id, bytes }, &plain);
        }
    }

    /// Looks among these chunks too, as far as the layers hold them: reads at once those that are new. Blocks.
    pub fn add(&self, chunks: impl IntoIterator<Item = ChunkId>) {
        if self.is_known() {
            self.wait();
            chunks.into_iter().for_each(|id| self.read_chunk(id));
        }
    }

    fn read_layers(&self, lacking: &[LayerId], held: &[LayerId]) -> Result<()> {
        let store = self.store.as_ref();
        let mut seen: HashSet<[u8; 8]> = HashSet::new();
        let mut bytes_read = 0;
        let mut opened = Opened::default();
        for manifest in self.kin_first(lacking, held)? {
            let mut inodes = Records::inodes(store, &manifest)?;
            while let Some(inode) = inodes.next_inode()? {
                let Node::File(content) = &inode.node else { continue };
                walk_new(store, content, &mut opened, &mut |part| {
                    if self.is_given_up.load(Relaxed) {
                        return Err(layerfs::Error::Cancelled);
                    }
                    let Part::Chunk(id, bytes) = part else { return Ok(true) };
                    if bytes < MIN_BYTES || !seen.insert(base_name(&id)) {
                        return Ok(true);
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
    use super::*;
    use crate::tests::pair::add_layer;

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
    fn chunks_are_looked_among_again_and_again() {
        let host = crate::tests::pair::Host::new();
        let files: Vec<Vec<u8>> = (0..8).map(|n| noise(n, 12_000)).collect();
        let tree = files.iter().enumerate().map(|(at, file)| (format!("{at}"), file.clone())).collect();
        let layer = add_layer(host.store(), "files", &tree);
        // One of another layer, or of none, isn't there.
        let ids: HashSet<ChunkId> = files[1..].iter().map(|file| ChunkId::of(file)).collect();
        let ids = ids.into_iter().chain([ChunkId::of(b"elsewhere")]).collect::<HashSet<_>>();
        let of = |ids: &HashSet<ChunkId>, held| Similar::of_chunks(host.store().clone(), ids.clone(), held);
        let similar = of(&ids, vec![layer]);
        for _ in 0..2 {
            // Some out of the middle of one, beside something new.
            let page = &files[3][1000..11_000];
            assert!(similar.knows(page) && similar.knows(&[page, &noise(100, 2000)].concat()));
            assert!(!similar.knows(&noise(101, 64 << 10)) && !similar.knows(&[0; 4096]));
            let found: Vec<ChunkId> = similar.find(page).into_iter().map(|base| base.id).collect();
            assert_eq!(found, [ChunkId::of(&files[3])]);
            similar.give_up();
        }
        assert!(!similar.knows(&files[0]), "it was never read");
        similar.add([ChunkId::of(&files[0]), ChunkId::of(b"elsewhere")]);
        assert!(similar.knows(&files[0]));
        assert!(!of(&ids, Vec::new()).knows(&files[3]), "nobody holds it");
        assert!(!of(&HashSet::new(), vec![layer]).knows(&files[3]));
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
