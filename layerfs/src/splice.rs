//! The content of a file of which little has changed, from its old content and the changed ranges.
//!
//! Hides where cutting has to begin again and where it can stop. The pieces are those that cutting the whole file would
//! give: a chunk is kept if it begins where the cutter would begin one and neither it nor the block behind it has changed (what
//! cuts a chunk is in it, but for a hole or the end of the file behind it). So cutting begins at the first old piece that
//! can't be kept, and goes on until it comes to the begin of one that can. Work and reading: what has changed and a few
//! chunks around; besides, a look at each entry of the old list.

use crate::chunk::ChunkRead;
use crate::chunker::{Chunker, Cutter, HOLE_BLOCK, Piece};
use crate::content::{Content, Extent, Extents};
use crate::error::Result;
use crate::store::SourcePiece;

/// A changed file.
pub trait Changed {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether all between `from` and `to` is as in the old file. May be false though it is.
    fn is_clean(&self, from: u64, to: u64) -> bool;

    /// What the changed file has at `at`.
    fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<SourcePiece>;
}

/// A piece of the new content.
#[derive(Debug)]
pub enum Spliced<'a> {
    /// As in the old content.
    Kept(Extent),
    /// New.
    New(Piece<'a>),
}

const READ_BYTES: usize = 256 * 1024;

/// Gives `emit` the pieces of `file`, which was `old`, as `chunker` would cut it; `old` was cut by the same.
pub fn splice(
    chunks: &dyn ChunkRead,
    old: &Content,
    chunker: Chunker,
    file: &mut dyn Changed,
    emit: &mut dyn FnMut(Spliced<'_>) -> Result<()>,
) -> Result<()> {
    let mut extents = Old { extents: Extents::new(chunks, old, 0)?, next: None, bytes: old.len() };
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < file.len() {
        match extents.kept_at(at, file)? {
            Some(extent) => {
                at += extent.len();
                emit(Spliced::Kept(extent))?;
            }
            None => at = cut(&mut extents, chunker, file, at, &mut buffer, emit)?,
        }
    }
    Ok(())
}

/// Cuts `file` from `from` on, where a piece ends, until a piece can be kept again. Returns where that is.
fn cut(
    extents: &mut Old<'_>,
    chunker: Chunker,
    file: &mut dyn Changed,
    from: u64,
    buffer: &mut [u8],
    emit: &mut dyn FnMut(Spliced<'_>) -> Result<()>,
) -> Result<u64> {
    let mut cutter = Cutter::at(chunker, from);
    let mut cut_until = from;
    let mut read_until = from;
    let mut is_done = false;
    loop {
        let piece = file.read(read_until, buffer)?;
        let mut take = |piece: Piece<'_>| -> Result<()> {
            if is_done {
                return Ok(());
            }
            cut_until += match piece {
                Piece::Data(data) => data.len() as u64,
                Piece::Hole(bytes) => bytes,
            };
            emit(Spliced::New(piece))?;
            is_done = extents.kept_at(cut_until, file)?.is_some();
            Ok(())
        };
        match piece {
            SourcePiece::Data(count) => {
                cutter.data(&buffer[..count], &mut take)?;
                read_until += count as u64;
            }
            SourcePiece::Hole(bytes) => {
                cutter.hole(bytes, &mut take)?;
                read_until += bytes;
            }
            SourcePiece::End => {
                cutter.finish(&mut take)?;
                return Ok(cut_until);
            }
        }
        if is_done {
            return Ok(cut_until);
        }
    }
}

/// The old file's extents.
struct Old<'a> {
    extents: Extents<'a, dyn ChunkRead + 'a>,
    next: Option<(u64, Extent)>,
    bytes: u64,
}

impl Old<'_> {
    /// The old extent that begins at `at`, if it can be kept.
    fn kept_at(&mut self, at: u64, file: &dyn Changed) -> Result<Option<Extent>> {
        while self.next.is_none_or(|(start, _)| start < at) {
            match self.extents.next() {
                Some(next) => self.next = Some(next?),
                None => return Ok(None),
            }
        }
        let Some((_, extent)) = self.next.filter(|(start, _)| *start == at) else { return Ok(None) };
        let end = at + extent.len();
        let is_kept = if end == self.bytes {
            file.len() == end && file.is_clean(at, end)
        } else {
            let behind = (end + HOLE_BLOCK as u64).min(self.bytes);
            file.len() >= behind && file.is_clean(at, behind)
        };
        Ok(is_kept.then_some(extent))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunk::{ChunkWrite, Class, MemoryChunks};
    use crate::content::ContentBuilder;
    use crate::error::Error;
    use crate::testing::noise;

    /// A changed file in memory; `dirty` are the blocks that may differ.
    struct InMemory {
        bytes: Vec<u8>,
        dirty: Vec<bool>,
        as_before: u64,
        read: u64,
    }

    impl Changed for InMemory {
        fn len(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn is_clean(&self, from: u64, to: u64) -> bool {
            let blocks = (from as usize / HOLE_BLOCK)..(to as usize).div_ceil(HOLE_BLOCK);
            to <= self.as_before && !self.dirty[blocks].iter().any(|dirty| *dirty)
        }

        fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<SourcePiece> {
            let rest = &self.bytes[at as usize..];
            if rest.is_empty() {
                return Ok(SourcePiece::End);
            }
            let zeros = rest.iter().take_while(|byte| **byte == 0).count();
            if zeros > 10_000 {
                return Ok(SourcePiece::Hole(zeros as u64));
            }
            let count = rest.len().min(buffer.len());
            self.read += count as u64;
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(SourcePiece::Data(count))
        }
    }

    fn whole(chunks: &MemoryChunks, chunker: Chunker, bytes: &[u8]) -> Content {
        let mut builder = ContentBuilder::new(chunker);
        let mut cutter = Cutter::new(chunker);
        let mut put = |piece: Piece<'_>| push(chunks, &mut builder, piece);
        cutter.data(bytes, &mut put).unwrap();
        cutter.finish(&mut put).unwrap();
        builder.finish(chunks).unwrap()
    }

    fn push(chunks: &MemoryChunks, builder: &mut ContentBuilder, piece: Piece<'_>) -> Result<(), Error> {
        let extent = match piece {
            Piece::Hole(bytes) => Extent::Hole { bytes },
            Piece::Data(data) => Extent::Chunk { id: chunks.put(Class::Data, data)?, bytes: data.len() as u32 },
        };
        builder.push(extent, chunks)
    }

    fn spliced(chunks: &MemoryChunks, chunker: Chunker, old: &Content, file: &mut InMemory) -> (Content, u64) {
        let mut builder = ContentBuilder::new(chunker);
        let mut kept = 0;
        splice(chunks, old, chunker, file, &mut |piece| match piece {
            Spliced::Kept(extent) => {
                kept += extent.len();
                builder.push(extent, chunks)
            }
            Spliced::New(piece) => push(chunks, &mut builder, piece),
        })
        .unwrap();
        (builder.finish(chunks).unwrap(), kept)
    }

    #[derive(Clone, Debug)]
    enum Edit {
        Write(usize, usize, u64),
        Zero(usize, usize),
        Truncate(usize),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        let at = prop_oneof![0usize..1_500_000, (0usize..366).prop_map(|block| block * 4096)];
        let count = prop_oneof![1usize..10, 4000usize..4200, 1usize..70_000, Just(4096)];
        let counts = prop_oneof![count.clone(), Just(40_960), Just(200_704)];
        prop_oneof![
            6 => (at.clone(), count, 0u64..9).prop_map(|(at, count, seed)| Edit::Write(at, count, seed)),
            3 => (at.clone(), counts).prop_map(|(at, count)| Edit::Zero(at, count)),
            1 => at.prop_map(Edit::Truncate),
        ]
    }

    fn apply(file: &mut InMemory, edit: &Edit) {
        let touch = |file: &mut InMemory, at: usize, end: usize| {
            let length = file.bytes.len().max(end);
            file.bytes.resize(length, 0);
            file.dirty.resize(file.dirty.len().max(length.div_ceil(HOLE_BLOCK)), false);
            file.dirty[at / HOLE_BLOCK..end.div_ceil(HOLE_BLOCK)].fill(true);
        };
        match *edit {
            Edit::Write(at, count, seed) => {
                touch(file, at, at + count);
                file.bytes[at..at + count].copy_from_slice(&noise(count, seed));
            }
            Edit::Zero(at, count) => {
                let (at, end) = (at.min(file.bytes.len()), (at + count).min(file.bytes.len()));
                touch(file, at, end);
                file.bytes[at..end].fill(0);
            }
            Edit::Truncate(bytes) => {
                file.bytes.resize(bytes, 0);
                file.as_before = file.as_before.min(bytes as u64);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]
        #[test]
        fn gives_what_cutting_the_whole_file_gives(
            runs in prop::collection::vec((0u8..4, prop_oneof![1usize..300_000, Just(4096), Just(65_536)]), 1..8),
            edits in prop::collection::vec(edit(), 0..6),
            aligned in any::<bool>(),
        ) {
            let chunker = if aligned { Chunker::Aligned } else { Chunker::Tree };
            let mut bytes = Vec::new();
            for (kind, count) in runs {
                bytes.extend(if kind == 0 { vec![0; count] } else { noise(count, u64::from(kind)) });
            }
            let chunks = MemoryChunks::default();
            let old = whole(&chunks, chunker, &bytes);
            let as_before = bytes.len() as u64;
            let dirty = vec![false; bytes.len().div_ceil(HOLE_BLOCK)];
            let mut file = InMemory { bytes, dirty, as_before, read: 0 };
            edits.iter().for_each(|edit| apply(&mut file, edit));
            let expected = whole(&chunks, chunker, &file.bytes);
            let (found, _) = spliced(&chunks, chunker, &old, &mut file);
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_small_change_reads_little() {
        for chunker in [Chunker::Tree, Chunker::Aligned] {
            let chunks = MemoryChunks::default();
            let bytes = noise(20_000_000, 1);
            let old = whole(&chunks, chunker, &bytes);
            let (as_before, dirty) = (bytes.len() as u64, vec![false; bytes.len().div_ceil(HOLE_BLOCK)]);
            let mut file = InMemory { bytes, dirty, as_before, read: 0 };
            apply(&mut file, &Edit::Write(9_000_000, 4096, 7));
            let (_, kept) = spliced(&chunks, chunker, &old, &mut file);
            assert!(file.read < 2_000_000 && kept > 19_000_000, "{} read, {kept} kept", file.read);
        }
    }
}
