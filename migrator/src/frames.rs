//! One group of chunks into frames: as they lie in the packs, as bundles, or as the pages that have changed.
//!
//! Hides which of the two, what goes together, and which bases help. Invariants: a base is used only if the planner or the
//! search names it; a bundle that isn't smaller than the chunks as stored isn't sent, unless nobody knows the ids; at
//! most [`MAX_WAITING`] bundles of a transfer have holes.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use layerfs::ChunkId;
use layerfs::chunk::{self, ChunkRead, Class, Codec, StoredChunk};
use layerfs::store::Store;
use parking_lot::Mutex;

use crate::bundle::{self, Hole, MAX_TABLE_BYTES, Table};
use crate::level::Effort;
use crate::numbers::{Named, Numbers};
use crate::patch;
use crate::plan::{Base, Candidate};
use crate::similar::{self, Similar};
use crate::wire::{
    BaseName, Bundle, ChunksWriter, MAX_BASES, MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS, MAX_HOLES, MAX_WAITING, Message,
    base_name, encode_bundle,
};

/// A bundle has to be smaller than the stored chunks by this part.
const WORTHWHILE: usize = 50;
/// The most plain bytes of a bundle's chunks: its table needs some.
const MAX_PLAIN_BYTES: usize = MAX_BUNDLE_BYTES - MAX_TABLE_BYTES;
/// zstd's level for what has bases while somebody waits: what it shares with them is found by long matches, at once.
const HURRIED_LEVEL: i32 = 3;
/// Bundles of structure are of this size, so that all ids in one can be left out.
const STRUCTURE_BYTES: usize = MAX_HOLES * 32;

/// An encoded frame, with what is in it.
pub(crate) struct Frame {
    pub bytes: FrameBytes,
    pub chunks: usize,
    pub plain_bytes: u64,
    pub stored_bytes: u64,
    /// Nobody asked for it.
    pub is_ahead: bool,
}

/// What a frame consists of.
pub(crate) enum FrameBytes {
    Encoded(Bytes),
    Message(Message),
}

impl Frame {
    /// One that carries no chunks.
    pub fn message(message: Message) -> Frame {
        Frame { bytes: FrameBytes::Message(message), chunks: 0, plain_bytes: 0, stored_bytes: 0, is_ahead: false }
    }
}

/// What frames are made from.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub store: &'a Store,
    pub similar: &'a Arc<Similar>,
    /// What went in bundles.
    pub numbers: &'a Mutex<Numbers>,
    /// Frames with chunks as stored have about so many bytes.
    pub frame_bytes: usize,
    /// Somebody waits for the end.
    pub is_in_a_hurry: bool,
}

/// Whether bases for it are looked for by content.
pub(crate) fn is_searched_for(chunk: &Candidate) -> bool {
    chunk.bases.is_none() && chunk.class == Class::Data
}

/// Chunks that go into one bundle.
struct Together {
    chunks: Vec<StoredChunk>,
    named: Vec<Named>,
    plain: Vec<u8>,
    holes: Vec<Hole>,
    may_have_holes: bool,
    /// The first chunk's number, if it has one already.
    first: Option<u32>,
    bases: Vec<BaseName>,
    prefix: Vec<u8>,
    known: HashSet<ChunkId>,
    /// Whether all of them resemble their bases.
    is_near: bool,
    /// Whether nobody asked for one of them.
    is_ahead: bool,
}

impl Together {
    fn new() -> Together {
        Together {
            chunks: Vec::new(),
            named: Vec::new(),
            plain: Vec::new(),
            holes: Vec::new(),
            may_have_holes: false,
            first: None,
            bases: Vec::new(),
            prefix: Vec::new(),
            known: HashSet::new(),
            is_near: true,
            is_ahead: false,
        }
    }

    /// Adds those of `bases` that aren't there yet, as far as they fit.
    fn add_bases(&mut self, store: &Store, bases: &[Base]) {
        for base in bases {
            if self.bases.len() == MAX_BASES || !self.known.insert(base.id) {
                continue;
            }
            // What is damaged here may be whole there, but can't help.
            let Ok(plain) = store.get(&base.id) else { continue };
            if self.prefix.len() + plain.len() <= MAX_BUNDLE_BYTES {
                self.bases.push(base_name(&base.id));
                self.prefix.extend_from_slice(&plain);
            }
        }
    }

    fn add(&mut self, candidate: &Candidate, stored: StoredChunk, plain: &[u8]) {
        self.plain.extend_from_slice(plain);
        self.named.push(named(candidate));
        self.chunks.push(stored);
        self.is_ahead |= candidate.is_certain;
    }

    /// Whether bases for another chunk might not fit.
    fn is_full(&self) -> bool {
        self.prefix.len() > MAX_BUNDLE_BYTES - MAX_BUNDLE_BYTES / 4
    }

    /// Whether a chunk of so many bytes doesn't fit.
    fn is_full_for(&self, plain_bytes: usize, most: usize) -> bool {
        self.is_full() || self.plain.len() + plain_bytes > most || self.chunks.len() == MAX_BUNDLE_CHUNKS
    }
}

/// Chunks of which only pages go.
#[derive(Default)]
struct Patched {
    chunks: Vec<StoredChunk>,
    named: Vec<Named>,
    bases: Vec<BaseName>,
    pages: Vec<u16>,
    /// The pages as they are there, and as they are.
    old: Vec<u8>,
    new: Vec<u8>,
    plain_bytes: usize,
    is_ahead: bool,
}

impl Patched {
    /// Takes a chunk of memory if it differs from one of its bases in a few pages. Returns whether it does.
    fn take(&mut self, store: &Store, candidate: &Candidate, stored: &StoredChunk, plain: &[u8]) -> bool {
        // Memory is cut into chunks of this length. Of files cut by their content few chunks would go so, and cost a frame of their own.
        if plain.len() != patch::MAX_BYTES || candidate.class != Class::Data {
            return false;
        }
        if self.plain_bytes + plain.len() > MAX_BUNDLE_BYTES || self.bases.len() == MAX_BASES {
            return false;
        }
        let named = candidate.bases.as_deref().unwrap_or_default().iter();
        let differing = |base: &Base| {
            let old = store.get(&base.id).ok()?;
            let pages = patch::differing(plain, &old).filter(|pages| patch::are_few(*pages, plain.len()))?;
            Some((pages, base.id, old))
        };
        let as_long = named.filter(|base| base.bytes as usize == plain.len());
        let Some((pages, id, old)) = as_long.filter_map(differing).min_by_key(|(pages, ..)| pages.count_ones()) else {
            return false;
        };
        self.bases.push(base_name(&id));
        self.pages.push(pages);
        patch::put(&old, pages, &mut self.old);
        patch::put(plain, pages, &mut self.new);
        self.plain_bytes += plain.len();
        self.named.push(self::named(candidate));
        self.chunks.push(stored.clone());
        self.is_ahead |= candidate.is_certain;
        true
    }

    /// Makes a frame of them; unless they must go so, only if that is a gain.
    fn close(
        self,
        source: Source<'_>,
        effort: Effort,
        must: bool,
        frames: &mut Vec<Frame>,
        as_stored: &mut Vec<StoredChunk>,
    ) -> layerfs::Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let frame =
            bundle::squeeze(&self.old, &self.new, effort.level_of_pages(source.is_in_a_hurry)).ok_or_else(no_memory)?;
        if !must && !is_worthwhile(frame.len() + self.bases.len() * 10, &self.chunks) {
            as_stored.extend(self.chunks);
            return Ok(());
        }
        let first = source.numbers.lock().assign(&self.named);
        let bundle = Bundle {
            chunks: self.bases.len() as u16,
            bases: self.bases,
            pages: self.pages,
            first,
            plain_bytes: self.new.len() as u32,
            frame: frame.into(),
        };
        frames.push(frame_of(&bundle, self.plain_bytes, self.is_ahead));
        Ok(())
    }
}

fn frame_of(bundle: &Bundle, plain_bytes: usize, is_ahead: bool) -> Frame {
    Frame {
        chunks: usize::from(bundle.chunks),
        plain_bytes: plain_bytes as u64,
        stored_bytes: bundle.frame.len() as u64,
        bytes: FrameBytes::Encoded(encode_bundle(bundle)),
        is_ahead,
    }
}

fn no_memory() -> layerfs::Error {
    layerfs::Error::Index("zstd found no memory".to_owned())
}

/// Whether a frame of so many bytes is noticeably smaller than `chunks` as they are stored.
fn is_worthwhile(bytes: usize, chunks: &[StoredChunk]) -> bool {
    let stored: usize = chunks.iter().map(|chunk| chunk.stored.len() + ChunksWriter::CHUNK_HEADER_BYTES).sum();
    bytes * (WORTHWHILE + 1) <= stored * WORTHWHILE
}

fn named(candidate: &Candidate) -> Named {
    (candidate.id, candidate.bases.as_ref().and_then(|bases| bases.first()).map(|base| base.id))
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

/// The pages of memory that none of `bases` has at their places; all of it if none is as long.
fn news(store: &Store, plain: &[u8], bases: &[Base]) -> Vec<u8> {
    let as_long = bases.iter().filter(|base| base.bytes as usize == plain.len());
    let differing = as_long.filter_map(|base| patch::differing(plain, &store.get(&base.id).ok()?));
    let mut pages = Vec::new();
    match differing.min_by_key(|pages| pages.count_ones()) {
        Some(few) => patch::put(plain, few, &mut pages),
        None => pages.extend_from_slice(plain),
    }
    pages
}

/// The frames for `group`.
pub(crate) fn encode(source: Source<'_>, group: &[Candidate], effort: Effort) -> layerfs::Result<Vec<Frame>> {
    let Source { store, similar, .. } = source;
    // Nobody waits for these ids, so they go by their bytes alone.
    let is_ahead = group.first().is_some_and(|first| first.is_certain);
    let mut as_stored = Vec::new();
    let (mut together, mut patched) = (Together::new(), Patched::default());
    let mut frames = Vec::new();
    // A whole chunk is compressed against all of its base, and so to fewer bytes than its changed pages, but far more slowly.
    let by_pages = source.is_in_a_hurry || effort.saves_work();
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
        // What has come to a chunk that was there may be what the receiver has elsewhere.
        let is_moved = searches && !named.is_empty() && similar.knows(&news(store, &plain, named));
        if by_pages && has_bases && !is_moved && patched.take(store, candidate, &stored, &plain) {
            continue;
        }
        let is_near = searches && !is_moved && is_near(store, &plain, named);
        let found = if searches && !is_near { search(similar, candidate, &plain) } else { Vec::new() };
        if !(is_ahead || repacks || has_bases) && found.is_empty() {
            as_stored.push(stored);
            continue;
        }
        if together.is_full_for(plain.len(), MAX_PLAIN_BYTES) {
            close(source, &mut together, effort, is_ahead, &mut frames, &mut as_stored)?;
        }
        together.is_near &= is_near || !found.is_empty();
        together.add_bases(store, &found);
        // What stands in the same place is of no use where something else was found to be, unless that is only a part of it.
        if found.is_empty() || is_moved {
            together.add_bases(store, named);
        }
        together.add(candidate, stored, &plain);
    }
    patched.close(source, effort, is_ahead, &mut frames, &mut as_stored)?;
    close(source, &mut together, effort, is_ahead, &mut frames, &mut as_stored)?;
    frames.extend(stored_frames(&as_stored, source.frame_bytes));
    Ok(frames)
}

/// The frames for structure, children before what names them: the ids of what went before in bundles are left out.
pub(crate) fn encode_structure(
    source: Source<'_>,
    chunks: &[Candidate],
    effort: Effort,
) -> layerfs::Result<Vec<Frame>> {
    let mut frames = Vec::new();
    let mut together = Together::new();
    let mut waiting = 0;
    for candidate in chunks {
        let stored = source.store.read_stored(&candidate.id)?;
        let mut plain = chunk::verify(stored.clone())?.0.to_vec();
        if together.is_full_for(plain.len(), STRUCTURE_BYTES) {
            close(source, &mut together, effort, true, &mut frames, &mut Vec::new())?;
        }
        together.add_bases(source.store, candidate.bases.as_deref().unwrap_or_default());
        let mut numbers = source.numbers.lock();
        if together.chunks.is_empty() {
            together.may_have_holes = waiting < MAX_WAITING && numbers.left() > MAX_BUNDLE_CHUNKS;
        }
        if together.may_have_holes {
            let most = MAX_HOLES - together.holes.len();
            let start = together.plain.len() as u32;
            let holes = numbers.punch(&mut plain, most);
            waiting += usize::from(together.holes.is_empty() && !holes.is_empty());
            together.holes.extend(holes.into_iter().map(|hole| Hole { at: start + hole.at, ..hole }));
            // So that what follows can name this one.
            let number = numbers.assign(&[named(candidate)]);
            together.first = together.first.or(number);
        }
        drop(numbers);
        together.add(candidate, stored, &plain);
    }
    close(source, &mut together, effort, true, &mut frames, &mut Vec::new())?;
    Ok(frames)
}

/// Makes a bundle of what is `together`; unless it must go so (as nobody knows the ids), only if that is a gain.
fn close(
    source: Source<'_>,
    together: &mut Together,
    effort: Effort,
    must: bool,
    frames: &mut Vec<Frame>,
    as_stored: &mut Vec<StoredChunk>,
) -> layerfs::Result<()> {
    let Together { chunks, named, plain, holes, first, bases, prefix, is_near, is_ahead, .. } =
        std::mem::replace(together, Together::new());
    if chunks.is_empty() {
        return Ok(());
    }
    let lengths = chunks.iter().map(|chunk| (chunk.class, chunk.plain_bytes)).collect();
    let level = match (prefix.is_empty(), source.is_in_a_hurry) {
        (false, true) => HURRIED_LEVEL,
        (false, false) if is_near && source.similar.is_known() => effort.level_when_known(),
        (false, false) if is_near => effort.level_when_near(),
        _ => effort.level(),
    };
    let packed = bundle::pack(&prefix, &Table { chunks: lengths, holes }, &plain, level);
    let (frame, plain_bytes) = packed.ok_or_else(no_memory)?;
    if !must && !is_worthwhile(frame.len() + bases.len() * 8, &chunks) {
        as_stored.extend(chunks);
        return Ok(());
    }
    let first = first.or_else(|| source.numbers.lock().assign(&named));
    let bundle =
        Bundle { bases, pages: Vec::new(), first, chunks: chunks.len() as u16, plain_bytes, frame: frame.into() };
    frames.push(frame_of(&bundle, plain.len(), is_ahead));
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
    use layerfs::chunk::ChunkWrite;

    use super::*;
    use crate::tests::pair::{Host, Tree, add_layer, noise, tree};
    use crate::wire::CHUNKS_TARGET_BYTES;

    /// The bytes that the groups of a transfer of `new` take for a receiver that holds `old`.
    fn bytes_of(host: &Host, old: LayerId, new: LayerId, is_in_a_hurry: bool) -> (usize, usize) {
        let similar = Similar::new(host.store().clone(), vec![new], vec![old]);
        let numbers = Mutex::default();
        let source = Source {
            store: host.store(),
            similar: &similar,
            numbers: &numbers,
            frame_bytes: CHUNKS_TARGET_BYTES,
            is_in_a_hurry,
        };
        let mut all = Vec::new();
        crate::plan::candidates(host.store().as_ref(), &[new], &[old], &mut |candidate| {
            all.push(candidate);
            Ok(())
        })
        .unwrap();
        all.iter().filter(|one| is_searched_for(one)).for_each(|one| similar.expect(one.bytes));
        let (data, mut structure): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|one| one.class == Class::Data);
        structure.reverse();
        let mut frames: Vec<Frame> =
            data.chunks(8).flat_map(|group| encode(source, group, Effort::FIRST).unwrap()).collect();
        frames.extend(encode_structure(source, &structure, Effort::FIRST).unwrap());
        let length = |frame: &Frame| match &frame.bytes {
            FrameBytes::Encoded(bytes) => bytes.len(),
            FrameBytes::Message(_) => 0,
        };
        let plain = all.iter().map(|one| one.bytes as usize).sum();
        (plain, frames.iter().map(length).sum())
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
        let (plain, sent) = bytes_of(&host, old, new, false);
        assert!(plain > 3 << 20 && sent < 100_000, "{plain} {sent}");
    }

    #[test]
    fn structure_costs_no_ids_of_what_is_sent_anyway() {
        let host = Host::new();
        let mut files: Tree = [("image".to_owned(), noise(5, 40 << 20))].into();
        let old = add_layer(host.store(), "one", &files);
        let image = files.get_mut("image").unwrap();
        (0..image.len()).step_by(50_000).for_each(|at| image[at] ^= 1);
        let new = add_layer(host.store(), "two", &files);
        let (plain, sent) = bytes_of(&host, old, new, false);
        // Nearly every chunk has changed, by a byte or two: with the ids of 600 chunks it would be 19,000 more.
        assert!(plain > 35 << 20 && sent < 24_000, "{plain} {sent}");
    }

    #[test]
    fn what_came_into_a_chunk_from_a_known_file_is_told_by_it() {
        let host = Host::new();
        let film = noise(8, 300_000);
        let layer = add_layer(host.store(), "film", &[("film".to_owned(), film.clone())].into());
        let mut ids = HashSet::new();
        let mut note = |id, _| {
            ids.insert(id);
            Ok(())
        };
        host.store().data_in_order(layer, &mut note).unwrap();
        let known = Similar::of_chunks(host.store().clone(), ids, vec![layer]);
        let nothing = Similar::new(host.store().clone(), Vec::new(), Vec::new());
        let old = noise(9, patch::MAX_BYTES);
        let mut new = old.clone();
        // Four pages of the film, which aren't pages there.
        let pages = 5 * patch::PAGE..9 * patch::PAGE;
        new[pages.clone()].copy_from_slice(&film[100_001..][..pages.len()]);
        let session = host.store().session("test");
        let base = Base { id: session.put(Class::Data, &old).unwrap(), bytes: old.len() as u32 };
        let id = session.put(Class::Data, &new).unwrap();
        session.commit().unwrap();
        let candidate = Candidate { bases: Some(vec![base].into()), ..Candidate::new(id, new.len() as u32) };
        let bytes = |similar: &Arc<Similar>, effort, is_in_a_hurry| {
            let (numbers, store) = (Mutex::default(), host.store());
            let source = Source { store, similar, numbers: &numbers, frame_bytes: CHUNKS_TARGET_BYTES, is_in_a_hurry };
            let frames = encode(source, std::slice::from_ref(&candidate), effort).unwrap();
            frames.iter().map(|frame| frame.stored_bytes).sum::<u64>()
        };
        for (effort, is_in_a_hurry) in [(Effort::FIRST, false), (Effort::FIRST, true), (Effort::LEAST_REPACKED, false)]
        {
            let (with, without) = (bytes(&known, effort, is_in_a_hurry), bytes(&nothing, effort, is_in_a_hurry));
            assert!(with < 1000 && without > 4 * patch::PAGE as u64, "{with} of {without} bytes");
        }
    }

    #[test]
    fn pages_of_memory_go_alone_where_frames_are_waited_for() {
        let host = Host::new();
        let memory = noise(5, patch::MAX_BYTES * 3 / 2);
        let kinds = |bytes: std::ops::Range<usize>, effort, is_in_a_hurry| {
            let mut changed = memory[bytes.clone()].to_vec();
            changed[5000] ^= 1;
            let session = host.store().session("test");
            let base = Base { id: session.put(Class::Data, &memory[bytes]).unwrap(), bytes: changed.len() as u32 };
            let id = session.put(Class::Data, &changed).unwrap();
            session.commit().unwrap();
            let candidate = Candidate { bases: Some(vec![base].into()), ..Candidate::new(id, changed.len() as u32) };
            let (similar, numbers) = (Similar::new(host.store().clone(), Vec::new(), Vec::new()), Mutex::default());
            let (store, frame_bytes) = (host.store(), CHUNKS_TARGET_BYTES);
            let source = Source { store, similar: &similar, numbers: &numbers, frame_bytes, is_in_a_hurry };
            let kind = |frame: &Frame| match &frame.bytes {
                FrameBytes::Encoded(bytes) => bytes[4],
                FrameBytes::Message(_) => 0,
            };
            encode(source, &[candidate], effort).unwrap().iter().map(kind).collect::<Vec<_>>()
        };
        let (bundle, patches) = ([0x19], [0x3c]);
        assert_eq!(kinds(0..patch::MAX_BYTES, Effort::FIRST, false), bundle);
        assert_eq!(kinds(0..patch::MAX_BYTES, Effort::FIRST, true), patches);
        assert_eq!(kinds(0..patch::MAX_BYTES, Effort::LEAST_REPACKED, false), patches);
        assert_eq!(kinds(0..patch::MAX_BYTES * 3 / 2, Effort::FIRST, true), bundle, "a file's chunk");
    }
}
