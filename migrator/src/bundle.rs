//! Several chunks as one zstd frame, with chunks that the other side has as prefix. PROTOCOL.md, "Bundles".
//!
//! In front of the chunks stands a table of them. Structure that names other chunks of the transfer leaves their ids out:
//! its table says where these belong, as *holes*, and whoever opens the bundle fills in what it has worked out itself.
//!
//! Hides zstd's contexts and windows. Invariants: what is unpacked has the lengths that were announced, within the
//! bundle's bounds, or is an error; nothing is allocated beyond those; a frame that decodes to other bytes than were
//! packed, or is filled with other ids, makes chunks with other ids, which nothing refers to.

use layerfs::chunk::{Class, MAX_CHUNK_BYTES};
use layerfs::codec::{Put, Reader};
use layerfs::{ChunkId, Error, Result};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, Strategy};

use crate::wire::{MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS, MAX_HOLES, MAX_NUMBERED};

/// The largest window that a frame may ask for, as a power of two: bases and chunks.
const WINDOW_LOG: u32 = 21;
/// The smallest that zstd knows.
const MIN_WINDOW_LOG: u32 = 10;
/// Below this level what is alike in a long prefix is found by long matches alone. Reading all of the prefix into the tables of the
/// levels takes several times as long as compressing against it.
const LEAST_WHOLE_LEVEL: i32 = 9;
/// From this level on matches are looked for with some care.
const LEAST_LAZY_LEVEL: i32 = 4;
/// A prefix up to so many bytes is read whole at any level.
const MAX_SHORT_PREFIX: usize = 128 * 1024;
/// The tables' sizes where long matches are looked for beside them, as powers of two: they are for what is new.
const QUICK_TABLE_LOG: u32 = 14;
const LAZY_TABLE_LOG: u32 = 15;
/// The shortest long match, in bytes, and one position in so many that is remembered, as a power of two.
const LONG_MATCH: u32 = 64;
const LONG_MATCH_RATE_LOG: u32 = 5;
/// A hole is as long as an id.
pub const HOLE_BYTES: usize = 32;
/// The most bytes that a table takes.
pub const MAX_TABLE_BYTES: usize = MAX_BUNDLE_CHUNKS * 4 + 3 + MAX_HOLES * 6;

/// Where the id of another chunk of the transfer belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// Its place in the chunks' bytes.
    pub at: u32,
    /// The number of the chunk whose id it is.
    pub number: u32,
}

/// What stands in front of a bundle's chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// What each chunk holds, and its plain length in bytes.
    pub chunks: Vec<(Class, u32)>,
    /// The holes, in order, none across the end of a chunk.
    pub holes: Vec<Hole>,
}

impl Table {
    /// The plain bytes of all chunks.
    pub fn chunk_bytes(&self) -> usize {
        self.chunks.iter().map(|(_, bytes)| *bytes as usize).sum()
    }

    /// Appends the encoding. PROTOCOL.md, "Bundles".
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.chunks.iter().for_each(|(class, _)| out.put_u8(*class as u8));
        self.chunks.iter().for_each(|(_, bytes)| put_varint(*bytes, out));
        put_varint(self.holes.len() as u32, out);
        let (mut end, mut next) = (0, 0);
        for hole in &self.holes {
            put_varint(hole.at - end, out);
            put_varint(zigzag(hole.number as i32 - next), out);
            end = hole.at + HOLE_BYTES as u32;
            next = hole.number as i32 + 1;
        }
    }

    /// Takes the table of `count` chunks off `reader`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything malformed.
    pub fn decode(reader: &mut Reader<'_>, count: u16) -> Result<Table> {
        let classes = reader.take(usize::from(count))?;
        let class = |code: &u8| Class::from_code(*code).ok_or_else(|| corrupt(format!("chunk class {code}")));
        let classes = classes.iter().map(class).collect::<Result<Vec<_>>>()?;
        let mut chunks = Vec::with_capacity(classes.len());
        for class in classes {
            let bytes = varint(reader)?;
            if !(1..=MAX_CHUNK_BYTES).contains(&(bytes as usize)) {
                return Err(corrupt(format!("a chunk of {bytes} plain bytes")));
            }
            chunks.push((class, bytes));
        }
        let mut table = Table { chunks, holes: Vec::new() };
        if table.chunk_bytes() > MAX_BUNDLE_BYTES {
            return Err(corrupt(format!("{} plain bytes", table.chunk_bytes())));
        }
        table.decode_holes(reader)?;
        Ok(table)
    }

    fn decode_holes(&mut self, reader: &mut Reader<'_>) -> Result<()> {
        let count = varint(reader)? as usize;
        if count > MAX_HOLES || count > reader.rest().len() {
            return Err(corrupt(format!("{count} holes")));
        }
        let mut ends = self.chunks.iter().scan(0, |end, (_, bytes)| {
            *end += bytes;
            Some(*end)
        });
        let mut chunk_end = ends.next().unwrap_or_default();
        let (mut end, mut next) = (0u32, 0i64);
        for _ in 0..count {
            let at = end.checked_add(varint(reader)?).filter(|at| *at as usize <= MAX_BUNDLE_BYTES);
            let at = at.ok_or_else(|| corrupt("a hole beyond the end".to_owned()))?;
            end = at + HOLE_BYTES as u32;
            while chunk_end <= at {
                chunk_end = ends.next().ok_or_else(|| corrupt("a hole beyond the end".to_owned()))?;
            }
            if end > chunk_end {
                return Err(corrupt("a hole across the end of a chunk".to_owned()));
            }
            let number = next + i64::from(unzigzag(varint(reader)?));
            let number = u32::try_from(number).ok().filter(|number| *number < MAX_NUMBERED);
            let number = number.ok_or_else(|| corrupt("a hole without a chunk".to_owned()))?;
            next = i64::from(number) + 1;
            self.holes.push(Hole { at, number });
        }
        Ok(())
    }
}

fn corrupt(detail: String) -> Error {
    Error::corrupt("bundle", detail)
}

fn put_varint(mut value: u32, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// Seven bits a byte, the lowest first; no more bytes than it needs, and no more than four.
fn varint(reader: &mut Reader<'_>) -> Result<u32> {
    let mut value = 0;
    for shift in [0, 7, 14, 21] {
        let byte = reader.u8()?;
        value |= u32::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if byte == 0 && shift > 0 {
                Err(corrupt("a number that is too long".to_owned()))
            } else {
                Ok(value)
            };
        }
    }
    Err(corrupt("a number that is too large".to_owned()))
}

fn zigzag(value: i32) -> u32 {
    ((value << 1) ^ (value >> 31)) as u32
}

fn unzigzag(value: u32) -> i32 {
    (value >> 1) as i32 ^ -((value & 1) as i32)
}

/// Compresses `table` and the chunks' bytes `plain` at `level` against `prefix`. Returns the frame and how many bytes it
/// holds, or nothing if zstd finds no memory.
pub fn pack(prefix: &[u8], table: &Table, plain: &[u8], level: i32) -> Option<(Vec<u8>, u32)> {
    let mut all = Vec::with_capacity(plain.len() + table.chunks.len() * 4 + table.holes.len() * 3 + 8);
    table.encode(&mut all);
    all.extend_from_slice(plain);
    Some((squeeze(prefix, &all, level)?, all.len() as u32))
}

/// Compresses `all` at `level` against `prefix`. Returns the frame, or nothing if zstd finds no memory.
pub fn squeeze(prefix: &[u8], all: &[u8], level: i32) -> Option<Vec<u8>> {
    debug_assert!(all.len() <= MAX_BUNDLE_BYTES && prefix.len() <= MAX_BUNDLE_BYTES);
    let span = (prefix.len() + all.len()).next_power_of_two().ilog2();
    let mut context = CCtx::try_create()?;
    context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
    context.set_parameter(CParameter::WindowLog(span.clamp(MIN_WINDOW_LOG, WINDOW_LOG))).ok()?;
    if level < LEAST_WHOLE_LEVEL && prefix.len() > MAX_SHORT_PREFIX {
        let (strategy, table_log) = if level < LEAST_LAZY_LEVEL {
            (Strategy::ZSTD_dfast, QUICK_TABLE_LOG)
        } else {
            (Strategy::ZSTD_lazy2, LAZY_TABLE_LOG)
        };
        context.set_parameter(CParameter::Strategy(strategy)).ok()?;
        context.set_parameter(CParameter::MinMatch(5)).ok()?;
        // zstd reads no more of a prefix into its own tables than they have room for.
        context.set_parameter(CParameter::HashLog(table_log)).ok()?;
        context.set_parameter(CParameter::ChainLog(table_log)).ok()?;
        context.set_parameter(CParameter::EnableLongDistanceMatching(true)).ok()?;
        context.set_parameter(CParameter::LdmMinMatch(LONG_MATCH)).ok()?;
        context.set_parameter(CParameter::LdmHashRateLog(LONG_MATCH_RATE_LOG)).ok()?;
    }
    if !prefix.is_empty() {
        context.ref_prefix(prefix).ok()?;
    }
    let mut frame = Vec::with_capacity(zstd::zstd_safe::compress_bound(all.len()));
    context.compress2(&mut frame, all).ok()?;
    Some(frame)
}

/// What was in a bundle.
#[derive(Debug)]
pub struct Unpacked {
    table: Table,
    /// All plain bytes, the table's too.
    plain: Vec<u8>,
    /// Where the chunks begin.
    start: usize,
}

impl Unpacked {
    /// Chunks without holes.
    pub(crate) fn of(table: Table, plain: Vec<u8>) -> Unpacked {
        debug_assert!(table.holes.is_empty() && table.chunk_bytes() == plain.len());
        Unpacked { table, plain, start: 0 }
    }

    /// The numbers of the chunks whose ids are wanted, without those of the bundle itself, whose first is `first`.
    pub fn wanted(&self, first: Option<u32>) -> impl Iterator<Item = u32> + '_ {
        let own = first.map_or(0..0, |first| first..first + self.table.chunks.len() as u32);
        self.table.holes.iter().map(|hole| hole.number).filter(move |number| !own.contains(number))
    }

    /// Shows each chunk, in order, with its class, its holes filled: with ids from `others`, or those of chunks before
    /// it in the bundle, whose first has number `first`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a hole wants what isn't known.
    pub fn visit(
        &mut self,
        first: Option<u32>,
        others: &dyn Fn(u32) -> Option<ChunkId>,
        visit: &mut dyn FnMut(ChunkId, Class, &[u8]),
    ) -> Result<()> {
        let Unpacked { table, plain, start } = self;
        let mut holes = table.holes.iter().peekable();
        let mut own = Vec::with_capacity(table.chunks.len());
        let mut at = *start;
        for (class, bytes) in &table.chunks {
            let end = at + *bytes as usize;
            while let Some(hole) = holes.next_if(|hole| *start + (hole.at as usize) < end) {
                let place = first.and_then(|first| hole.number.checked_sub(first));
                let id = place.and_then(|place| own.get(place as usize).copied()).or_else(|| others(hole.number));
                let id: ChunkId = id.ok_or_else(|| corrupt(format!("a hole for chunk {}, unknown", hole.number)))?;
                let from = *start + hole.at as usize;
                plain[from..from + HOLE_BYTES].copy_from_slice(&id.0);
            }
            let chunk = &plain[at..end];
            let id = ChunkId::of(chunk);
            visit(id, *class, chunk);
            own.push(id);
            at = end;
        }
        Ok(())
    }
}

/// What `frame` holds: `chunks` chunks, with their table `plain_bytes` bytes, packed against `prefix`.
///
/// # Errors
/// [`Error::Corrupt`] if the frame doesn't hold just these.
pub fn unpack(prefix: &[u8], frame: &[u8], chunks: u16, plain_bytes: u32) -> Result<Unpacked> {
    let plain = expand(prefix, frame, plain_bytes as usize)?;
    let mut reader = Reader::new("bundle", &plain);
    let table = Table::decode(&mut reader, chunks)?;
    let start = plain.len() - reader.rest().len();
    if table.chunk_bytes() != plain.len() - start {
        return Err(corrupt(format!("chunks of {} bytes in {}", table.chunk_bytes(), plain.len() - start)));
    }
    Ok(Unpacked { table, plain, start })
}

/// The `total` bytes that `frame` holds, packed against `prefix`.
///
/// # Errors
/// [`Error::Corrupt`] if it doesn't hold as many.
pub fn expand(prefix: &[u8], frame: &[u8], total: usize) -> Result<Vec<u8>> {
    if total == 0 || total > MAX_BUNDLE_BYTES || prefix.len() > MAX_BUNDLE_BYTES {
        return Err(corrupt(format!("{total} plain bytes over {} of bases", prefix.len())));
    }
    let zstd_error = |code| corrupt(format!("zstd: {}", zstd::zstd_safe::get_error_name(code)));
    let mut context = DCtx::try_create().ok_or_else(|| corrupt("no memory for it".to_owned()))?;
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).map_err(zstd_error)?;
    if !prefix.is_empty() {
        context.ref_prefix(prefix).map_err(zstd_error)?;
    }
    let mut plain = Vec::with_capacity(total);
    context.decompress(&mut plain, frame).map_err(zstd_error)?;
    if plain.len() != total {
        return Err(corrupt(format!("{} plain bytes instead of {total}", plain.len())));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table_of(pieces: &[Vec<u8>], holes: Vec<Hole>) -> Table {
        Table { chunks: pieces.iter().map(|piece| (Class::Data, piece.len() as u32)).collect(), holes }
    }

    fn opened(mut unpacked: Unpacked, others: &dyn Fn(u32) -> Option<ChunkId>) -> Result<Vec<Vec<u8>>> {
        let mut chunks = Vec::new();
        unpacked.visit(Some(100), others, &mut |id, _, plain| {
            assert_eq!(id, ChunkId::of(plain));
            chunks.push(plain.to_vec());
        })?;
        Ok(chunks)
    }

    #[test]
    fn a_table_has_its_bytes() {
        let holes = vec![Hole { at: 5, number: 3 }, Hole { at: 300, number: 4 }, Hole { at: 332, number: 2 }];
        let table = Table { chunks: vec![(Class::List, 364), (Class::Data, 65_536)], holes };
        let mut bytes = Vec::new();
        table.encode(&mut bytes);
        // Classes, lengths, count, then gap and step of each.
        assert_eq!(bytes, [1, 0, 0xec, 2, 0x80, 0x80, 4, 3, 5, 6, 0x87, 2, 0, 0, 5]);
        let mut reader = Reader::new("table", &bytes);
        assert_eq!(Table::decode(&mut reader, 2).unwrap(), table);
        reader.finish().unwrap();
    }

    #[test]
    fn holes_lie_within_chunks_and_name_numbers() {
        let decode = |bytes: &[u8]| Table::decode(&mut Reader::new("table", bytes), 2);
        // Two chunks of 40 and 33 bytes, a hole in each.
        assert!(decode(&[0, 0, 40, 33, 2, 8, 0, 1, 0]).is_ok());
        // Across the first's end; beyond the second's; below number 0; a number of too many bytes; an unknown class.
        for bad in [
            &[0, 0, 40, 33, 1, 9, 0][..],
            &[0, 0, 40, 33, 1, 42, 0],
            &[0, 0, 40, 33, 1, 100, 0],
            &[0, 0, 40, 33, 1, 8, 1],
            &[0, 0, 40, 33, 1, 0x88, 0, 0],
            &[9, 0, 40, 33, 0],
            &[0, 0, 0, 33, 0],
        ] {
            assert!(decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn holes_are_filled_with_ids_of_this_bundle_and_of_others() {
        let (other, leaf) = (ChunkId::of(b"other"), [b"leaf ".as_slice(), &[7; 32]].concat());
        let whole_leaf = [b"leaf ".as_slice(), &other.0].concat();
        let root = [b"root".as_slice(), &[9; 32], b"!"].concat();
        let whole_root = [b"root".as_slice(), &ChunkId::of(&whole_leaf).0, b"!"].concat();
        let table =
            table_of(&[leaf.clone(), root.clone()], vec![Hole { at: 5, number: 70 }, Hole { at: 41, number: 100 }]);
        let (frame, bytes) = pack(b"", &table, &[leaf, root].concat(), 3).unwrap();
        let unpack = || unpack(b"", &frame, 2, bytes).unwrap();
        assert_eq!(unpack().wanted(Some(100)).collect::<Vec<_>>(), [70]);
        assert_eq!(unpack().wanted(None).collect::<Vec<_>>(), [70, 100]);
        let others = |number| (number == 70).then_some(other);
        assert_eq!(opened(unpack(), &others).unwrap(), [whole_leaf, whole_root]);
        assert!(opened(unpack(), &|_| None).is_err());
        assert!(unpack().visit(None, &others, &mut |_, _, _| ()).is_err());
        // A chunk can't name itself, nor what follows it.
        assert!(unpack().visit(Some(99), &others, &mut |_, _, _| ()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn what_is_packed_unpacks(
            pieces in prop::collection::vec(prop::collection::vec(0u8..4, 1..3000), 1..20),
            prefix in prop::collection::vec(0u8..4, 0..20_000),
            level in 1i32..20,
        ) {
            let (frame, bytes) = pack(&prefix, &table_of(&pieces, Vec::new()), &pieces.concat(), level).unwrap();
            let count = pieces.len() as u16;
            let unpacked = unpack(&prefix, &frame, count, bytes).unwrap();
            prop_assert_eq!(opened(unpacked, &|_| None).unwrap(), pieces);
            // Other counts and lengths than were packed are seen.
            prop_assert!(unpack(&prefix, &frame, count + 1, bytes).is_err());
            prop_assert!(unpack(&prefix, &frame, count, bytes + 1).is_err());
        }

        #[test]
        fn tables_round_trip(
            lengths in prop::collection::vec(40u32..9000, 1..30),
            holes in prop::collection::vec((any::<prop::sample::Index>(), 0u32..MAX_NUMBERED), 0..30),
        ) {
            let mut at = 0;
            let mut table = Table { chunks: Vec::new(), holes: Vec::new() };
            for length in lengths {
                table.chunks.push((Class::Table, length));
                if let Some((place, number)) = holes.get(table.chunks.len()) {
                    table.holes.push(Hole { at: at + place.index(length as usize - HOLE_BYTES) as u32, number: *number });
                }
                at += length;
            }
            let mut bytes = Vec::new();
            table.encode(&mut bytes);
            prop_assert!(bytes.len() <= MAX_TABLE_BYTES);
            let mut reader = Reader::new("table", &bytes);
            prop_assert_eq!(Table::decode(&mut reader, table.chunks.len() as u16).unwrap(), table);
            prop_assert!(reader.finish().is_ok());
        }

        #[test]
        fn damaged_frames_never_panic_and_keep_their_lengths(
            flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
            prefix in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            let plain: Vec<u8> = prefix.iter().rev().copied().chain((0..3000u32).flat_map(u32::to_le_bytes)).collect();
            let table = table_of(std::slice::from_ref(&plain), vec![Hole { at: 100, number: 0 }]);
            let (mut frame, bytes) = pack(&prefix, &table, &plain, 5).unwrap();
            for (at, bit) in flips {
                let at = at.index(frame.len());
                frame[at] ^= 1 << bit;
            }
            if let Ok(unpacked) = unpack(&prefix, &frame, 1, bytes) {
                let chunks = opened(unpacked, &|_| Some(ChunkId([1; 32]))).unwrap();
                prop_assert_eq!(chunks.len(), 1);
            }
        }
    }

    #[test]
    fn a_prefix_as_long_as_may_be_is_reached_to_its_begin() {
        let mut prefix = vec![0; MAX_BUNDLE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut prefix);
        for level in [1, 3, 9, 19] {
            // A copy: zstd takes no match from where it reads.
            let pieces: Vec<Vec<u8>> = prefix[..MAX_BUNDLE_BYTES - 64].chunks(1 << 18).map(<[u8]>::to_vec).collect();
            let (frame, bytes) = pack(&prefix, &table_of(&pieces, Vec::new()), &pieces.concat(), level).unwrap();
            assert!(frame.len() < 2000, "{} bytes at level {level}", frame.len());
            let unpacked = unpack(&prefix, &frame, 4, bytes).unwrap();
            assert!(opened(unpacked, &|_| None).unwrap() == pieces);
        }
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let pieces = vec![vec![0; 1 << 18]; 3];
        let (frame, bytes) = pack(&[], &table_of(&pieces, Vec::new()), &pieces.concat(), 3).unwrap();
        assert!(frame.len() < 1000);
        assert!(unpack(&[], &frame, 3, 1000).is_err());
        assert!(unpack(&[], &frame, 3, bytes - 1).is_err());
        assert!(unpack(&[], &frame, 3, u32::MAX).is_err());
    }
}
