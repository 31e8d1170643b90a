//! What was pushed lazily and isn't all there yet: sent in the background, tried again until it is, also by the next
//! daemon. FORMAT.md, "Index database".
//!
//! Invariant: a layer that is still to be sent isn't collected here, whatever becomes of its name.

use std::collections::BTreeMap;
use std::sync::Arc;

use layerfs::LayerId;
use layerfs::codec::Put;
use layerfs::error::ErrorClass;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::store::{Pin, Store};
use tokio::task::spawn_blocking;

use super::{FIRST_PAUSE, Inner, LAST_PAUSE, Watched};
use crate::error::{Error, Result};
use crate::governor::Rate;
use crate::send::joined;

const PREFIX: &[u8] = b"pushing/";
const VERSION: u8 = 1;

fn key(layer: LayerId, peer: &str) -> Vec<u8> {
    [PREFIX, &layer.0.0, peer.as_bytes()].concat()
}

/// A layer that is still to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    layer: LayerId,
    /// Within this.
    limit: Option<Rate>,
}

/// A record's value. Daemons that knew no limits look at none.
fn encode(limit: Option<Rate>) -> Vec<u8> {
    let mut value = vec![VERSION];
    limit.iter().for_each(|limit| value.put_u64(limit.bytes_per_second()));
    value
}

/// The limit in a record's value. One that can't be read is none: what is to be sent is sent.
fn decode(value: &[u8]) -> Option<Rate> {
    let (version, limit) = value.split_first()?;
    let limit = u64::from_le_bytes(limit.try_into().ok()?);
    (*version == VERSION && limit > 0).then(|| Rate::new(limit))
}

/// Remembers that `layers` are to be sent to `peer`, within `limit`. Blocks.
fn add(store: &Store, layers: &[LayerId], peer: &str, limit: Option<Rate>) -> Result<()> {
    let mut batch = Batch::new();
    layers.iter().for_each(|layer| batch.put(Cf::Transfers, key(*layer, peer), encode(limit)));
    Ok(store.db().write(batch, Sync::Yes)?)
}

/// What is to be sent once a lazy push has succeeded.
pub(crate) struct Noted {
    layers: Vec<LayerId>,
    /// Of these, what wasn't to be sent anyway.
    new: Vec<LayerId>,
    peer: String,
    limit: Option<Rate>,
}

impl Noted {
    /// Remembers that `layers`, which are about to be offered, are to be sent to `peer`, within `limit`. Blocks.
    pub fn new(store: &Store, layers: Vec<LayerId>, peer: &str, limit: Option<Rate>) -> Result<Noted> {
        let known = list(store)?.remove(peer).unwrap_or_default();
        let is_known = |layer: &LayerId| known.iter().any(|rest| rest.layer == *layer);
        let new: Vec<LayerId> = layers.iter().copied().filter(|layer| !is_known(layer)).collect();
        add(store, &new, peer, limit)?;
        Ok(Noted { layers, new, peer: peer.to_owned(), limit })
    }

    /// The offer was taken, or may have been; or it is known that it was not. Blocks.
    pub fn settle(self, store: &Store, is_refused: bool) -> Result<()> {
        if is_refused {
            return forget(store, &self.new, &self.peer);
        }
        // The rest may have been tried and found to be nobody's before the offer was taken.
        add(store, &self.layers, &self.peer, self.limit)
    }
}

fn forget(store: &Store, layers: &[LayerId], peer: &str) -> Result<()> {
    let mut batch = Batch::new();
    layers.iter().for_each(|layer| batch.delete(Cf::Transfers, key(*layer, peer)));
    Ok(store.db().write(batch, Sync::Yes)?)
}

/// All that is still to be sent, by peer. Blocks.
pub(crate) fn list(store: &Store) -> Result<BTreeMap<String, Vec<Rest>>> {
    let mut all: BTreeMap<String, Vec<Rest>> = BTreeMap::new();
    for entry in store.db().iter(Cf::Transfers, PREFIX)? {
        let (key, value) = entry?;
        let malformed = || layerfs::Error::corrupt("push record", "its key is no layer's and peer's");
        let rest = key.get(PREFIX.len()..).ok_or_else(malformed)?;
        let (id, peer) = rest.split_first_chunk::<32>().ok_or_else(malformed)?;
        let peer = std::str::from_utf8(peer).map_err(|_| malformed())?;
        let rest = Rest { layer: LayerId(layerfs::ChunkId(*id)), limit: decode(&value) };
        all.entry(peer.to_owned()).or_default().push(rest);
    }
    Ok(all)
}

/// Sends to `peer` what it lacks, again and again until it lacks nothing.
pub(super) async fn run(inner: Arc<Inner>, peer: String) {
    let mut pause = FIRST_PAUSE;
    while !inner.is_stopped() {
        let (store, to) = (inner.node.store().clone(), peer.clone());
        let look = move || {
            let rests = list(&store)?.remove(&to).unwrap_or_default();
            let limit = rests.iter().filter_map(|rest| rest.limit).min();
            let (mut pins, mut left, mut gone) = (Vec::<Pin>::new(), Vec::new(), Vec::new());
            for Rest { layer, .. } in rests {
                match store.pin(layer) {
                    Ok(pin) => {
                        pins.push(pin);
                        left.push(layer);
                    }
                    Err(_) => gone.push(layer),
                }
            }
            forget(&store, &gone, &to)?;
            Ok((pins, left, limit))
        };
        let (_pins, layers, limit) = match joined(spawn_blocking(look).await) {
            Ok((_, layers, _)) if layers.is_empty() => break,
            Ok(found) => found,
            Err(error) => {
                tracing::error!(peer, %error, "what is to be pushed cannot be read");
                break;
            }
        };
        let watched = Arc::new(Watched::default());
        let transfer = inner.node.push_rest(&layers, &peer, limit, watched.clone());
        tokio::pin!(transfer);
        let result = tokio::select! {
            result = &mut transfer => result,
            () = inner.stopped() => {
                watched.cancel();
                transfer.await
            }
        };
        let is_over = match &result {
            Ok(_) => true,
            Err(Error::Store(layerfs::Error::Cancelled)) => !inner.is_stopped(),
            // The other side lacks nothing any more, or doesn't want it.
            Err(error) => matches!(error.class(), ErrorClass::NotFound | ErrorClass::Invalid | ErrorClass::Denied),
        };
        if is_over {
            let (store, to, layers) = (inner.node.store().clone(), peer.clone(), layers.clone());
            if let Err(error) = joined(spawn_blocking(move || forget(&store, &layers, &to)).await) {
                tracing::error!(peer, %error, "what was pushed cannot be recorded");
                break;
            }
            tracing::info!(peer, ok = result.is_ok(), "the rest of what was pushed lazily is through");
            continue;
        }
        if let Err(error) = result {
            tracing::warn!(peer, %error, "the rest of what was pushed lazily does not go; it is tried again");
        }
        inner.pause(std::future::pending(), pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
    inner.pushes.lock().remove(&peer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_limits_and_older_ones_have_none() {
        assert_eq!(encode(None), [VERSION]);
        assert_eq!(encode(Some(Rate::new(0x2_0100))), [VERSION, 0, 1, 2, 0, 0, 0, 0, 0]);
        for limit in [None, Some(Rate::new(5 << 20))] {
            assert_eq!(decode(&encode(limit)), limit);
        }
        assert_eq!(decode(&[]), None);
    }
}
