//! In which order a partial layer's data lies: what to ask for along with a chunk that is being waited for.
//!
//! Hides that hardly any program reads one chunk: after a file's first chunk come the others, and those of the files
//! that were made next to it. Memory: about 60 bytes for each chunk, up to [`MAX_CHUNKS`] for all layers together;
//! chunks beyond are fetched one by one.

use std::collections::HashMap;

use layerfs::store::Store;
use layerfs::{ChunkId, LayerId, Result};

/// The most chunks that are known of one layer: 30 MB.
const MAX_CHUNKS: usize = 500_000;

/// A layer's chunks of data, each at its first place.
#[derive(Debug, Default)]
pub(super) struct Order {
    chunks: Vec<(ChunkId, u32)>,
    places: HashMap<[u8; 8], u32>,
    /// Whether there are more than are known.
    is_cut: bool,
}

fn short(id: &ChunkId) -> [u8; 8] {
    let mut short = [0; 8];
    short.copy_from_slice(&id.0[..8]);
    short
}

impl Order {
    /// That of `layer`. Reads its tables; blocks.
    pub fn of(store: &Store, layer: LayerId) -> Result<Order> {
        let mut order = Order::default();
        store.data_in_order(layer, &mut |id, bytes| {
            if order.chunks.len() == MAX_CHUNKS {
                order.is_cut = true;
            } else if !order.places.contains_key(&short(&id)) {
                order.places.insert(short(&id), order.chunks.len() as u32);
                order.chunks.push((id, bytes));
            }
            Ok(())
        })?;
        Ok(order)
    }

    /// Whether the layer may refer to `id`.
    pub fn may_have(&self, id: &ChunkId) -> bool {
        self.is_cut || self.places.contains_key(&short(id))
    }

    /// The plain length of `id`, if it is known.
    pub fn bytes(&self, id: &ChunkId) -> Option<u32> {
        Some(self.chunks[*self.places.get(&short(id))? as usize].1)
    }

    /// What follows `id`, up to `bytes` plain bytes.
    pub fn after(&self, id: &ChunkId, bytes: u32) -> &[(ChunkId, u32)] {
        let Some(place) = self.places.get(&short(id)) else { return &[] };
        let rest = &self.chunks[*place as usize + 1..];
        let mut sum = 0u32;
        let count = rest.iter().take_while(|(_, length)| {
            sum = sum.saturating_add(*length);
            sum <= bytes
        });
        &rest[..count.count()]
    }
}
