//! Which chunk of a transfer has which number: what lets structure go without the ids that the receiver works out itself.
//! PROTOCOL.md, "Holes".
//!
//! Invariants: a number means one chunk as long as the transfer lasts; memory is at most [`MAX_NUMBERED`] entries on
//! either side (about 10 MiB at the sender, 3 MiB at the receiver).

use std::collections::HashMap;

use layerfs::ChunkId;

use crate::bundle::{HOLE_BYTES, Hole};
use crate::wire::MAX_NUMBERED;

/// The begin of an id, by which ids are looked for in structure.
type Begin = [u8; 8];

/// The sender's side: what went in bundles.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    next: u32,
    of: HashMap<Begin, Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    id: ChunkId,
    number: u32,
    /// What stands in its place in the version that the receiver holds.
    predecessor: Option<ChunkId>,
}

/// A chunk that gets a number, and what stands in its place in the version that the receiver holds.
pub(crate) type Named = (ChunkId, Option<ChunkId>);

fn begin(id: &[u8]) -> Begin {
    let mut begin = [0; 8];
    begin.copy_from_slice(&id[..8]);
    begin
}

impl Numbers {
    /// Numbers `chunks`, one after the other, and returns the first's number; nothing once there are no more numbers.
    pub fn assign(&mut self, chunks: &[Named]) -> Option<u32> {
        let first = self.next;
        if self.left() <= chunks.len() {
            return None;
        }
        for (number, (id, predecessor)) in (first..).zip(chunks) {
            self.of.insert(begin(&id.0), Known { id: *id, number, predecessor: *predecessor });
            self.next = number + 1;
        }
        Some(first)
    }

    /// How many chunks may still get one.
    pub fn left(&self) -> usize {
        (MAX_NUMBERED - self.next) as usize
    }

    /// Takes the ids of numbered chunks out of `chunk`, up to so many, and tells where they stood. In their place comes
    /// what stands there in the older version, so that both look alike.
    pub fn punch(&self, chunk: &mut [u8], most: usize) -> Vec<Hole> {
        let mut holes = Vec::new();
        let mut at = 0;
        while at + HOLE_BYTES <= chunk.len() && holes.len() < most {
            let place = &mut chunk[at..at + HOLE_BYTES];
            match self.of.get(&begin(place)) {
                Some(known) if known.id.0 == *place => {
                    place.copy_from_slice(&known.predecessor.map_or([0; HOLE_BYTES], |id| id.0));
                    holes.push(Hole { at: at as u32, number: known.number });
                    at += HOLE_BYTES;
                }
                _ => at += 1,
            }
        }
        holes
    }
}

/// The receiver's side: what has come in bundles.
#[derive(Debug, Default)]
pub(crate) struct Arrived(HashMap<u32, ChunkId>);

impl Arrived {
    /// The chunks of a bundle whose first has number `first`.
    pub fn insert(&mut self, first: u32, ids: impl IntoIterator<Item = ChunkId>) {
        self.0.extend((first..MAX_NUMBERED).zip(ids));
    }

    /// The chunks with `numbers`, if all have come.
    pub fn find(&self, numbers: impl Iterator<Item = u32>) -> Option<HashMap<u32, ChunkId>> {
        numbers.map(|number| Some((number, *self.0.get(&number)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> ChunkId {
        ChunkId::of(&number.to_le_bytes())
    }

    #[test]
    fn ids_are_taken_out_wherever_they_stand() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.assign(&[(id(1), Some(id(100))), (id(2), None)]), Some(0));
        assert_eq!(numbers.assign(&[(id(3), None)]), Some(2));
        let mut chunk = [b"abc", &id(3).0[..], &id(7).0, &id(1).0, b"d", &id(2).0[..31]].concat();
        let holes = numbers.punch(&mut chunk, 100);
        assert_eq!(holes, [Hole { at: 3, number: 2 }, Hole { at: 67, number: 0 }]);
        assert_eq!(chunk, [b"abc", &[0; 32][..], &id(7).0, &id(100).0, b"d", &id(2).0[..31]].concat());
        assert_eq!(numbers.punch(&mut id(1).0.to_vec(), 0), []);
    }

    #[test]
    fn numbers_end() {
        let mut numbers = Numbers::default();
        let all: Vec<Named> = (0..MAX_NUMBERED - 10).map(|n| (id(n), None)).collect();
        assert_eq!(numbers.assign(&all), Some(0));
        assert_eq!(numbers.assign(&vec![(id(MAX_NUMBERED), None); 11]), None);
        assert_eq!(numbers.assign(&[(id(MAX_NUMBERED), None)]), Some(MAX_NUMBERED - 10));
    }

    #[test]
    fn what_has_not_come_is_not_found() {
        let mut arrived = Arrived::default();
        arrived.insert(5, [id(5), id(6)]);
        assert_eq!(arrived.find([5, 6, 5].into_iter()).unwrap(), [(5, id(5)), (6, id(6))].into());
        assert!(arrived.find([5, 7].into_iter()).is_none());
    }
}
