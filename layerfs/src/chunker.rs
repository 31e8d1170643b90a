//! Cuts content into chunks and holes.
//!
//! Three chunkers, pinned by golden vectors: [`Chunker::Tree`] (FastCDC v2020, 16/64/256 KiB,
//! normalization level 1; a file of up to 16 KiB is one chunk) for file trees, [`Chunker::Aligned`]
//! (pieces of 64 KiB at multiples of 64 KiB) for disk images, and [`Chunker::Named`] for memory, whose pieces follow
//! addresses that the file itself doesn't show.
//!
//! Holes: every block of [`HOLE_BLOCK`] bytes at a multiple of that from the file's start (or shorter, at its
//! end) that is all zero is a hole, whether the source stored it or not, so that the same content gives the
//! same chunks from every source. Cutting starts afresh after a hole.

use crate::chunk::MAX_CHUNK_BYTES;

/// Holes start and end at multiples of this many bytes (or at the file's end).
pub const HOLE_BLOCK: usize = 4096;
/// The size of [`Chunker::Aligned`]'s pieces in bytes.
pub const ALIGNED_BYTES: usize = 64 * 1024;

const TREE_MIN: usize = 16 * 1024;
const TREE_AVG: usize = 64 * 1024;
const TREE_MAX: usize = 256 * 1024;

/// How content is cut. The code is part of the format (FORMAT.md, "Chunkers").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Chunker {
    /// FastCDC, for files in trees.
    Tree = 0,
    /// Aligned pieces, for disk images.
    Aligned = 1,
    /// Whole records, for a layer's tables; cut by [`crate::manifest::TableWriter`], not by [`Chunker::cut`].
    Records = 2,
    /// At places that whoever imports the file names ([`Cutter::named`]), for images of memory.
    Named = 3,
}

impl Chunker {
    /// The chunker with code `code`.
    pub fn from_code(code: u8) -> Option<Chunker> {
        match code {
            0 => Some(Chunker::Tree),
            1 => Some(Chunker::Aligned),
            2 => Some(Chunker::Records),
            3 => Some(Chunker::Named),
            _ => None,
        }
    }

    /// The length of the next chunk of `data`, which starts at `offset` in its file and holds no hole.
    /// `data` must hold [`MAX_CHUNK_BYTES`] bytes, or everything up to the next hole or the end.
    pub fn cut(self, offset: u64, data: &[u8]) -> usize {
        match self {
            Chunker::Tree if data.len() <= TREE_MIN => data.len(),
            Chunker::Tree => {
                let window = &data[..data.len().min(MAX_CHUNK_BYTES)];
                let mut cutter = fastcdc::v2020::FastCDC::new(window, TREE_MIN, TREE_AVG, TREE_MAX);
                cutter.next().map_or(window.len(), |chunk| chunk.length)
            }
            // A file that was changed later has no places named any more.
            Chunker::Aligned | Chunker::Records | Chunker::Named => {
                let to_boundary = ALIGNED_BYTES - (offset % ALIGNED_BYTES as u64) as usize;
                data.len().min(to_boundary)
            }
        }
    }
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A chunk's plain bytes.
    Data(&'a [u8]),
    /// So many zero bytes.
    Hole(u64),
}

/// Cuts a stream: bytes and known holes in, pieces out. Holds at most 516 KiB.
///
/// The pieces depend on the content alone, not on how it is fed. Adjacent holes come out as one.
#[derive(Debug)]
pub struct Cutter<'a> {
    chunker: Chunker,
    /// The named places that are still ahead; only for [`Chunker::Named`].
    cuts: &'a [u64],
    /// Where `run` starts in the file.
    offset: u64,
    /// Whole blocks of data, none zero, not yet cut.
    run: Vec<u8>,
    /// Zero bytes seen since the last data; `run` is empty while there are any.
    hole: u64,
    /// The begin of the block that is not complete yet.
    partial: Vec<u8>,
    /// So many bytes are left of the block that the cutter began in, which is data whatever they are.
    block_left: usize,
}

impl<'a> Cutter<'a> {
    /// A cutter at the start of a file.
    pub fn new(chunker: Chunker) -> Cutter<'a> {
        Cutter::at(chunker, 0)
    }

    /// A cutter at a place where a piece of the file ends. If that is within a block, the block holds data.
    pub fn at(chunker: Chunker, offset: u64) -> Cutter<'a> {
        let within = (offset % HOLE_BLOCK as u64) as usize;
        let block_left = if within == 0 { 0 } else { HOLE_BLOCK - within };
        Cutter { chunker, cuts: &[], offset, run: Vec::new(), hole: 0, partial: Vec::new(), block_left }
    }

    /// A cutter at the start of a file that is cut at the offsets `cuts`, which ascend, and besides that wherever a piece
    /// would become longer than [`ALIGNED_BYTES`].
    pub fn named(cuts: &'a [u64]) -> Cutter<'a> {
        Cutter { cuts, ..Cutter::new(Chunker::Named) }
    }

    /// The length of the next chunk of `run[start..]`.
    fn next_cut(&mut self, start: usize) -> usize {
        if self.chunker != Chunker::Named {
            return self.chunker.cut(self.offset, &self.run[start..]);
        }
        self.cuts = &self.cuts[self.cuts.partition_point(|cut| *cut <= self.offset)..];
        let to_cut = self.cuts.first().map_or(u64::MAX, |cut| cut - self.offset);
        let longest = (self.run.len() - start).min(ALIGNED_BYTES);
        usize::try_from(to_cut).map_or(longest, |to_cut| longest.min(to_cut))
    }

    /// Feeds `data`; finished pieces go to `emit`.
    pub fn data<E>(&mut self, mut data: &[u8], emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        if self.block_left > 0 {
            let (now, later) = data.split_at(data.len().min(self.block_left));
            self.run.extend_from_slice(now);
            self.block_left -= now.len();
            data = later;
        }
        if !self.partial.is_empty() {
            let (now, later) = data.split_at(data.len().min(HOLE_BLOCK - self.partial.len()));
            self.partial.extend_from_slice(now);
            data = later;
            if self.partial.len() < HOLE_BLOCK {
                return Ok(());
            }
            let block = std::mem::take(&mut self.partial);
            self.block(&block, emit)?;
        }
        let blocks = data.chunks_exact(HOLE_BLOCK);
        self.partial.extend_from_slice(blocks.remainder());
        blocks.into_iter().try_for_each(|block| self.block(block, emit))
    }

    /// Feeds `bytes` zero bytes.
    pub fn hole<E>(&mut self, mut bytes: u64, emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        if self.block_left > 0 {
            let now = bytes.min(self.block_left as u64);
            self.data(&ZEROS[..now as usize], emit)?;
            bytes -= now;
        }
        if !self.partial.is_empty() {
            let now = bytes.min((HOLE_BLOCK - self.partial.len()) as u64);
            self.data(&ZEROS[..now as usize], emit)?;
            bytes -= now;
        }
        let rest = bytes % HOLE_BLOCK as u64;
        if bytes > rest {
            self.open_hole(bytes - rest, emit)?;
        }
        self.data(&ZEROS[..rest as usize], emit)
    }

    /// Ends the file: the rest goes to `emit`.
    pub fn finish<E>(mut self, emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        let block = std::mem::take(&mut self.partial);
        if !block.is_empty() {
            self.block(&block, emit)?;
        }
        self.cut_run(0, emit)?;
        self.close_hole(emit)
    }

    fn block<E>(&mut self, block: &[u8], emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        if is_zero(block) {
            return self.open_hole(block.len() as u64, emit);
        }
        self.close_hole(emit)?;
        self.run.extend_from_slice(block);
        if self.run.len() >= 2 * MAX_CHUNK_BYTES { self.cut_run(MAX_CHUNK_BYTES - 1, emit) } else { Ok(()) }
    }

    fn open_hole<E>(&mut self, bytes: u64, emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        self.cut_run(0, emit)?;
        self.hole += bytes;
        Ok(())
    }

    fn close_hole<E>(&mut self, emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        match std::mem::take(&mut self.hole) {
            0 => Ok(()),
            bytes => {
                self.offset += bytes;
                emit(Piece::Hole(bytes))
            }
        }
    }

    /// Cuts `run` into chunks until at most `keep` bytes are left: a cut wants MAX_CHUNK_BYTES in view, or the run's end.
    fn cut_run<E>(&mut self, keep: usize, emit: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut start = 0;
        while self.run.len() - start > keep {
            let length = self.next_cut(start);
            emit(Piece::Data(&self.run[start..start + length]))?;
            self.offset += length as u64;
            start += length;
        }
        self.run.drain(..start);
        Ok(())
    }
}

static ZEROS: [u8; HOLE_BLOCK] = [0; HOLE_BLOCK];

/// Whether all of `data` is zero.
pub fn is_zero(data: &[u8]) -> bool {
    data.first().is_none_or(|byte| *byte == 0) && data.chunks(HOLE_BLOCK).all(|block| block == &ZEROS[..block.len()])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::ChunkId;

    #[derive(Clone, Debug, PartialEq)]
    enum Owned {
        Data(Vec<u8>),
        Hole(u64),
    }

    fn collect(
        chunker: Chunker,
        feed: impl FnOnce(&mut Cutter<'_>, &mut dyn FnMut(Piece<'_>) -> Result<(), ()>),
    ) -> Vec<Owned> {
        collect_from(Cutter::new(chunker), feed)
    }

    fn collect_from(
        mut cutter: Cutter<'_>,
        feed: impl FnOnce(&mut Cutter<'_>, &mut dyn FnMut(Piece<'_>) -> Result<(), ()>),
    ) -> Vec<Owned> {
        let mut pieces = Vec::new();
        let mut emit = |piece: Piece<'_>| {
            pieces.push(match piece {
                Piece::Data(data) => Owned::Data(data.to_vec()),
                Piece::Hole(bytes) => Owned::Hole(bytes),
            });
            Ok(())
        };
        feed(&mut cutter, &mut emit);
        cutter.finish(&mut emit).unwrap();
        pieces
    }

    /// The golden vectors' content: a fixed linear congruential sequence.
    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 1u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u8
        })
        .take(bytes)
        .collect()
    }

    #[test]
    fn golden_cuts() {
        let lengths = |chunker| {
            let data = noise(1_000_000);
            collect(chunker, |cutter, emit| cutter.data(&data, &mut |p| emit(p)).unwrap())
                .iter()
                .map(|piece| match piece {
                    Owned::Data(data) => data.len(),
                    Owned::Hole(_) => 0,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(ChunkId::of(&noise(1_000_000)).short(), "c81602fb9865");
        let expected = [21751, 163970, 154814, 70987, 76450, 72989, 119377, 82306, 58727, 67165, 59474, 51990];
        assert_eq!(lengths(Chunker::Tree), expected);
        assert_eq!(lengths(Chunker::Aligned), [vec![65536; 15], vec![16960]].concat());
    }

    #[test]
    fn named_places_are_cut_however_the_file_is_fed() {
        let mut content = noise(300_000);
        content[8192..20_480].fill(0);
        let cuts = [4096, 40_960, 40_960, 290_816, 400_000];
        let lengths = |step: usize| {
            collect_from(Cutter::named(&cuts), |cutter, emit| {
                content.chunks(step).for_each(|part| cutter.data(part, &mut |piece| emit(piece)).unwrap());
            })
            .iter()
            .map(|piece| match piece {
                Owned::Data(data) => data.len() as i64,
                Owned::Hole(bytes) => -(*bytes as i64),
            })
            .collect::<Vec<_>>()
        };
        // The hole ends a piece; from a named place on, no piece is longer than 64 KiB.
        let expected = [4096, 4096, -12_288, 20_480, 65_536, 65_536, 65_536, 53_248, 9184];
        assert_eq!(lengths(300_000), expected);
        assert_eq!(lengths(1000), expected);
        assert_eq!(lengths(65_536), expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_depend_on_content_alone(
            runs in prop::collection::vec((any::<bool>(), 1usize..300_000), 0..6),
            feed in prop::collection::vec(1usize..200_000, 1..8),
            aligned in any::<bool>(),
        ) {
            let chunker = if aligned { Chunker::Aligned } else { Chunker::Tree };
            let mut content = Vec::new();
            for (zero, bytes) in &runs {
                content.extend(if *zero { vec![0; *bytes] } else { noise(*bytes) });
            }
            let whole = collect(chunker, |cutter, emit| cutter.data(&content, &mut |p| emit(p)).unwrap());
            let fed = collect(chunker, |cutter, emit| {
                let mut rest = &content[..];
                for length in feed.iter().cycle() {
                    if rest.is_empty() { break; }
                    let (now, later) = rest.split_at((*length).min(rest.len()));
                    if is_zero(now) {
                        cutter.hole(now.len() as u64, &mut |p| emit(p)).unwrap();
                    } else {
                        cutter.data(now, &mut |p| emit(p)).unwrap();
                    }
                    rest = later;
                }
            });
            prop_assert_eq!(&whole, &fed);
            let mut back = Vec::new();
            for piece in &whole {
                match piece {
                    Owned::Data(data) => {
                        prop_assert!(data.len() <= MAX_CHUNK_BYTES && !is_zero(data));
                        back.extend(data);
                    }
                    Owned::Hole(bytes) => back.resize(back.len() + *bytes as usize, 0),
                }
            }
            prop_assert!(back == content);
        }
    }
}
