//! What a node keeps of its links beyond its life: the common limit, and how fast each peer was when last measured.
//!
//! FORMAT.md, "Index database", family `meta`. Invariant: what is kept is for estimates and wishes; nothing breaks if it
//! is lost or cannot be read.

use layerfs::codec::{Put, Reader};
use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::{Error, Result};
use serde::Serialize;

use crate::governor::{Rate, Way};
use crate::identity::PublicKey;

const LIMIT: &[u8] = b"transfers.limit";
const RECORD_VERSION: u8 = 1;

/// How fast the link to a peer was, as far as it was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// To the peer, in bytes per second.
    pub out_rate: Option<u64>,
    /// From the peer.
    pub in_rate: Option<u64>,
    /// A round trip, in microseconds.
    pub round_trip_micros: Option<u64>,
}

impl Measured {
    /// What was measured `way`.
    pub fn rate(&self, way: Way) -> Option<u64> {
        match way {
            Way::Out => self.out_rate,
            Way::In => self.in_rate,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = vec![RECORD_VERSION];
        let values = [self.out_rate, self.in_rate, self.round_trip_micros];
        values.iter().for_each(|value| out.put_u64(value.unwrap_or(0)));
        out
    }

    fn decode(record: &[u8]) -> Result<Measured> {
        let mut reader = Reader::new("link record", record);
        let version = reader.u8()?;
        if version != RECORD_VERSION {
            return Err(Error::Unsupported { what: "link record", detail: format!("version {version}") });
        }
        let mut value = || Ok::<_, Error>(Some(reader.u64()?).filter(|value| *value > 0));
        let measured = Measured { out_rate: value()?, in_rate: value()?, round_trip_micros: value()? };
        reader.finish()?;
        Ok(measured)
    }
}

fn key_of(peer: &PublicKey) -> Vec<u8> {
    [b"link.", &peer.0[..]].concat()
}

/// How fast `peer` was. Blocks.
pub fn load(store: &Store, peer: &PublicKey) -> Measured {
    let record = store.db().get(Cf::Meta, key_of(peer)).ok().flatten();
    record.and_then(|record| Measured::decode(&record).ok()).unwrap_or_default()
}

/// Remembers what of `new` was measured. Blocks.
///
/// # Errors
/// Those of the index.
pub fn remember(store: &Store, peer: &PublicKey, new: Measured) -> Result<()> {
    let old = load(store, peer);
    let merged = Measured {
        out_rate: new.out_rate.or(old.out_rate),
        in_rate: new.in_rate.or(old.in_rate),
        round_trip_micros: new.round_trip_micros.or(old.round_trip_micros),
    };
    let mut batch = Batch::new();
    batch.put(Cf::Meta, key_of(peer), merged.encode());
    store.db().write(batch, Sync::No)
}

/// The common limit that a user set; the outer `None` if none ever did, the inner if it was lifted. Blocks.
///
/// # Errors
/// Those of the index.
pub fn load_limit(store: &Store) -> Result<Option<Option<Rate>>> {
    let Some(record) = store.db().get(Cf::Meta, LIMIT)? else { return Ok(None) };
    let mut reader = Reader::new("limit record", &record);
    let limit = reader.u64()?;
    reader.finish()?;
    Ok(Some(Some(limit).filter(|limit| *limit > 0).map(Rate::new)))
}

/// Remembers the common limit; the outer `None` forgets it. Blocks.
///
/// # Errors
/// Those of the index.
pub fn save_limit(store: &Store, limit: Option<Option<Rate>>) -> Result<()> {
    let mut batch = Batch::new();
    match limit {
        Some(limit) => batch.put(Cf::Meta, LIMIT, limit.map_or(0, Rate::bytes_per_second).to_le_bytes()),
        None => batch.delete(Cf::Meta, LIMIT),
    }
    store.db().write(batch, Sync::Yes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_are_pinned() {
        let measured = Measured { out_rate: Some(0x0102), in_rate: None, round_trip_micros: Some(200_000) };
        let record = measured.encode();
        assert_eq!(record, [&[1, 2, 1, 0, 0, 0, 0, 0, 0][..], &[0; 8], &[0x40, 0x0d, 3, 0, 0, 0, 0, 0]].concat());
        assert_eq!(Measured::decode(&record).unwrap(), measured);
        assert!((0..record.len()).all(|cut| Measured::decode(&record[..cut]).is_err()));
    }
}
