//! Parcels: packs that hold a stack's chunks outside of any store. FORMAT.md, "Parcels".
//!
//! It hides where a parcel ends. Invariants: what is in a parcel depends on the chunks alone, so that runs of equal
//! chunks give equal parcels, whichever stack they are for; nothing that is read from one is verified yet.

use std::fs::File;
use std::path::Path;

use crate::chunk::{MAX_CHUNK_BYTES, StoredChunk};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::store::pack::{HEADER_BYTES, PackId, RECORD_BYTES, RecordHeader, encode_header, read_record};
use crate::store::scan::{Found, PackScan};

/// The number that stands in every parcel's header.
const NUMBER: PackId = PackId(0);
/// A parcel has at least so many bytes, but for the last one.
const LEAST_BYTES: usize = 4 << 20;
/// A parcel that has this many bytes gets no more records.
const MOST_BYTES: usize = 32 << 20;
/// No parcel has more bytes.
pub const MAX_PARCEL_BYTES: usize = MOST_BYTES + RECORD_BYTES + MAX_CHUNK_BYTES;
/// About every so manieth chunk may end a parcel.
const END_MASK: u8 = 63;

/// A parcel that is being filled, in memory.
#[derive(Debug)]
pub struct Parcel {
    bytes: Vec<u8>,
    chunks: Vec<ChunkId>,
    ends: bool,
}

impl Default for Parcel {
    fn default() -> Parcel {
        Parcel { bytes: encode_header(NUMBER), chunks: Vec::new(), ends: false }
    }
}

impl Parcel {
    /// Appends a chunk. Returns whether the parcel ends with it.
    pub fn push(&mut self, chunk: &StoredChunk) -> bool {
        RecordHeader::of(chunk).encode(&mut self.bytes);
        self.bytes.extend_from_slice(&chunk.stored);
        self.chunks.push(chunk.id);
        let may_end = self.bytes.len() >= LEAST_BYTES && chunk.id.0[0] & END_MASK == 0;
        self.ends = may_end || self.bytes.len() >= MOST_BYTES;
        self.ends
    }

    /// Its bytes, and the chunks in it.
    pub fn finish(self) -> (Vec<u8>, Vec<ChunkId>) {
        (self.bytes, self.chunks)
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == HEADER_BYTES
    }
}

/// Gives every chunk of the parcel at `path`, unverified, to `take`.
///
/// # Errors
/// Those of `take`; [`Error::Corrupt`] for anything that isn't a whole record.
pub fn read_parcel(path: &Path, take: &mut dyn FnMut(StoredChunk) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    for found in PackScan::open(NUMBER, path.to_owned())? {
        match found? {
            Found::Record(offset, header) => take(read_record(&file, &header.id, &header.location(NUMBER, offset))?)?,
            Found::Damage { from, .. } | Found::Tail { from } => {
                return Err(Error::corrupt("parcel", format!("from byte {from} on it holds no record")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{Class, encode};

    fn chunk(seed: u64) -> StoredChunk {
        let mut plain = vec![0; 60_000];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut plain);
        encode(ChunkId::of(&plain), Class::Data, &plain, 3).stored().clone()
    }

    fn parcels(seeds: impl Iterator<Item = u64>) -> Vec<Vec<u8>> {
        let (mut all, mut parcel) = (Vec::new(), Parcel::default());
        for seed in seeds {
            if parcel.push(&chunk(seed)) {
                all.push(std::mem::take(&mut parcel).finish().0);
            }
        }
        all.push(parcel.finish().0);
        all
    }

    #[test]
    fn equal_runs_of_chunks_give_equal_parcels() {
        let (one, other) = (parcels(0..600), parcels(std::iter::once(9999).chain(0..600)));
        assert!(one.len() > 3, "{}", one.len());
        let shared = one.iter().filter(|parcel| other.contains(parcel)).count();
        assert!(shared + 1 >= one.len(), "{shared} of {}", one.len());
    }

    #[test]
    fn what_goes_in_comes_out_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parcel");
        let bytes = parcels(0..3).remove(0);
        assert_eq!(bytes[..16], *b"LFPK\x01\0\0\0\0\0\0\0\0\0\0\0");
        std::fs::write(&path, &bytes).unwrap();
        let mut found = Vec::new();
        let mut take = |chunk: StoredChunk| {
            found.push(crate::chunk::verify(chunk)?.1.stored().id);
            Ok(())
        };
        read_parcel(&path, &mut take).unwrap();
        assert_eq!(found, (0..3).map(|seed| chunk(seed).id).collect::<Vec<_>>());
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(read_parcel(&path, &mut |_| Ok(())).is_err());
        let mut damaged = bytes.clone();
        damaged[20] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert!(read_parcel(&path, &mut |_| Ok(())).is_err());
    }
}
