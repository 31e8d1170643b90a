//! Which ranges of a file are the upper's, where the file was copied up by range.
//!
//! Hides how a set of granules (4 KiB each) is kept: a tree of *leaves* of 4,096 granules (16 MiB of the file) in memory,
//! at most 64 KiB for a GiB that was touched; rows of the database, for what survives the end of the machine; and a *map
//! file* beside the data file, for what survives the end of the process. FORMAT.md, "Uppers".
//!
//! Why both: the row of a granule may only become durable after the granule's bytes, and a write can't wait for the disk.
//! So rows are written when the data was synced (and for granules that were punched, which have no bytes), and the map
//! file, which is in the page cache as the data is, right after the bytes, before the write is answered. The data file
//! alone would not do, though its holes look like the answer: it has holes where something was punched, and
//! filesystems may zero blocks beside those that are written. After the machine has been started anew the map file tells
//! more than what reached the disk; then a granule counts if, besides, the data file has bytes there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

/// The unit of copying up, in bytes.
pub const GRANULE: u64 = 4096;
/// Granules of a leaf.
pub const LEAF: u64 = 4096;
const WORDS: usize = (LEAF / 64) as usize;

/// Which granules of a leaf are the upper's, a bit for each, the lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaf {
    /// All.
    Full,
    /// Those whose bits are set: some, and not all.
    Some(Arc<[u64; WORDS]>),
}

impl Leaf {
    fn word(leaf: Option<&Leaf>, index: usize) -> u64 {
        match leaf {
            None => 0,
            Some(Leaf::Full) => u64::MAX,
            Some(Leaf::Some(words)) => words[index],
        }
    }

    fn from_words(words: [u64; WORDS]) -> Option<Leaf> {
        match () {
            () if words.iter().all(|word| *word == 0) => None,
            () if words.iter().all(|word| *word == u64::MAX) => Some(Leaf::Full),
            () => Some(Leaf::Some(Arc::new(words))),
        }
    }

    /// The leaf with the bits of both.
    fn with(leaf: Option<&Leaf>, other: Option<&Leaf>) -> Option<Leaf> {
        Leaf::from_words(std::array::from_fn(|index| Leaf::word(leaf, index) | Leaf::word(other, index)))
    }

    /// The leaf and `granules`, counted from its begin.
    fn with_range(leaf: Option<&Leaf>, granules: Range<u64>) -> Option<Leaf> {
        let mut words = std::array::from_fn(|index| Leaf::word(leaf, index));
        set(&mut words, granules);
        Leaf::from_words(words)
    }

    fn count(leaf: Option<&Leaf>) -> u64 {
        (0..WORDS).map(|index| u64::from(Leaf::word(leaf, index).count_ones())).sum()
    }

    /// The first granule from `from` on that is the upper's, or is not; [`LEAF`] if there is none.
    fn first(leaf: Option<&Leaf>, from: u64, ours: bool) -> u64 {
        let mut at = from;
        while at < LEAF {
            let word = Leaf::word(leaf, (at / 64) as usize);
            let wanted = if ours { word } else { !word } >> (at % 64);
            if wanted != 0 {
                return at + u64::from(wanted.trailing_zeros());
            }
            at = (at / 64 + 1) * 64;
        }
        LEAF
    }

    /// The encoding in a row: 0 and the words, or 1.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Leaf::Full => vec![1],
            Leaf::Some(words) => std::iter::once(0).chain(words.iter().flat_map(|word| word.to_le_bytes())).collect(),
        }
    }

    /// Decodes a row; none if it can't be one.
    pub fn decode(row: &[u8]) -> Option<Leaf> {
        match row.split_first()? {
            (1, []) => Some(Leaf::Full),
            (0, bytes) => Leaf::from_bytes(bytes),
            _ => None,
        }
    }

    /// The leaf whose words are `bytes`; none if no bit is set, or these aren't a leaf's bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Leaf> {
        let words: &[[u8; 8]; WORDS] = bytes.as_chunks::<8>().0.try_into().ok().filter(|_| bytes.len() == WORDS * 8)?;
        Leaf::from_words(words.map(u64::from_le_bytes))
    }
}

/// Which granules of a file are the upper's. The others are as in the sealed file.
#[derive(Debug, Default)]
pub struct RangeMap(RwLock<State>);

#[derive(Debug, Default)]
struct State {
    leaves: BTreeMap<u64, Leaf>,
    /// How many granules there are.
    count: u64,
    /// The leaves as their rows are.
    rows: BTreeMap<u64, Leaf>,
    /// Leaves with a granule that their rows don't have.
    unsaved: BTreeSet<u64>,
}

impl State {
    fn set_leaf(&mut self, index: u64, leaf: Option<Leaf>) {
        let before = Leaf::count(self.leaves.get(&index));
        let after = Leaf::count(leaf.as_ref());
        if let Some(leaf) = leaf.filter(|_| after > before) {
            self.count += after - before;
            self.leaves.insert(index, leaf);
            self.unsaved.insert(index);
        }
    }
}

/// The granules that `range` of bytes touches.
pub fn touching(range: Range<u64>) -> Range<u64> {
    range.start / GRANULE..range.end.div_ceil(GRANULE)
}

impl RangeMap {
    /// The map that rows had.
    pub fn from_rows(rows: impl IntoIterator<Item = (u64, Leaf)>) -> RangeMap {
        let rows: BTreeMap<u64, Leaf> = rows.into_iter().collect();
        let count = rows.values().map(|leaf| Leaf::count(Some(leaf))).sum();
        RangeMap(RwLock::new(State { leaves: rows.clone(), count, rows, unsaved: BTreeSet::new() }))
    }

    /// Whether byte `at` is the upper's, and up to where that holds, but at most to `end`.
    pub fn run(&self, at: u64, end: u64) -> (bool, u64) {
        let state = self.0.read();
        let granule = at / GRANULE;
        let mut index = granule / LEAF;
        let mut leaf = state.leaves.get(&index);
        let ours = Leaf::first(leaf, granule % LEAF, true) == granule % LEAF;
        let mut from = granule % LEAF;
        let last = end.div_ceil(GRANULE);
        loop {
            let found = Leaf::first(leaf, from, !ours);
            let until = index * LEAF + found;
            if found < LEAF || until >= last {
                return (ours, (until * GRANULE).min(end));
            }
            index += 1;
            from = 0;
            if !ours && !state.leaves.contains_key(&index) {
                match state.leaves.range(index..).next() {
                    Some((next, _)) => index = *next,
                    None => return (ours, end),
                }
            }
            leaf = state.leaves.get(&index);
        }
    }

    /// Whether nothing between the bytes `from` and `to` is the upper's.
    pub fn is_clean(&self, from: u64, to: u64) -> bool {
        from >= to || self.run(from, to) == (false, to)
    }

    /// Whether all of `granules` are the upper's.
    pub fn has(&self, granules: &Range<u64>) -> bool {
        let end = granules.end * GRANULE;
        granules.is_empty() || self.run(granules.start * GRANULE, end) == (true, end)
    }

    /// How many granules are the upper's.
    pub fn count(&self) -> u64 {
        self.0.read().count
    }

    /// Makes `granules` the upper's.
    pub fn add(&self, granules: Range<u64>) {
        let mut state = self.0.write();
        for (index, part) in by_leaf(granules) {
            let leaf = Leaf::with_range(state.leaves.get(&index), part);
            state.set_leaf(index, leaf);
        }
    }

    /// Adds what a map file had for leaf `index`.
    pub fn add_leaf(&self, index: u64, leaf: &Leaf) {
        let mut state = self.0.write();
        let both = Leaf::with(state.leaves.get(&index), Some(leaf));
        state.set_leaf(index, both);
    }

    /// The words that the map file has for `granules` once they are the upper's, and which word the first is.
    pub fn words_with(&self, granules: Range<u64>) -> (u64, Vec<u8>) {
        let state = self.0.read();
        let first = granules.start / 64;
        let count = granules.end.div_ceil(64) - first;
        let mut words: Vec<u64> = (first..first + count)
            .map(|word| Leaf::word(state.leaves.get(&(word / WORDS as u64)), (word % WORDS as u64) as usize))
            .collect();
        set(&mut words, granules.start - first * 64..granules.end - first * 64);
        (first, words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// The leaves that differ from their rows.
    pub fn unsaved(&self) -> Vec<(u64, Leaf)> {
        let state = self.0.read();
        state.unsaved.iter().filter_map(|index| Some((*index, state.leaves.get(index)?.clone()))).collect()
    }

    /// What the row of leaf `index` has to be so that it has the granules of `leaf` too. Other granules that aren't in the row
    /// yet stay out of it: their bytes may not be on the disk.
    pub fn row_with(&self, index: u64, leaf: &Leaf) -> Option<Leaf> {
        Leaf::with(self.0.read().rows.get(&index), Some(leaf))
    }

    /// The same for `granules` of the leaf, counted from its begin.
    pub fn row_with_range(&self, index: u64, granules: Range<u64>) -> Option<Leaf> {
        Leaf::with_range(self.0.read().rows.get(&index), granules)
    }

    /// The row of leaf `index` is `row` now, and what it has is the upper's.
    pub fn saved(&self, index: u64, row: Leaf) {
        let mut state = self.0.write();
        let both = Leaf::with(state.leaves.get(&index), Some(&row));
        state.set_leaf(index, both);
        if state.leaves.get(&index) == Some(&row) {
            state.unsaved.remove(&index);
            // One memory for both.
            state.leaves.insert(index, row.clone());
        } else {
            state.unsaved.insert(index);
        }
        state.rows.insert(index, row);
    }

    /// The leaves that have rows.
    pub fn rows(&self) -> Vec<u64> {
        self.0.read().rows.keys().copied().collect()
    }
}

/// `granules`, leaf by leaf: the leaf's index, and its granules counted from its begin.
pub fn by_leaf(granules: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let leaves = granules.start / LEAF..granules.end.div_ceil(LEAF);
    leaves.filter_map(move |index| {
        let first = index * LEAF;
        let part = granules.start.max(first) - first..granules.end.min(first + LEAF).saturating_sub(first);
        (!part.is_empty()).then_some((index, part))
    })
}

fn set(words: &mut [u64], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let until = bits.end.min((at / 64 + 1) * 64);
        let mask = u64::MAX >> (64 - (until - at)) << (at % 64);
        words[(at / 64) as usize] |= mask;
        at = until;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn granules() -> impl Strategy<Value = Range<u64>> {
        let start = prop_oneof![0u64..200, 4000u64..4200, 0u64..20_000];
        (start, prop_oneof![1u64..3, 1u64..200, 1u64..9000]).prop_map(|(start, count)| start..start + count)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn is_a_set_of_granules(
            adds in prop::collection::vec((granules(), any::<bool>()), 0..12),
            probes in prop::collection::vec(granules(), 1..12),
        ) {
            let mut map = RangeMap::default();
            let mut model = BTreeSet::new();
            let mut file = vec![0u8; 32_768 / 8];
            for (range, save) in adds {
                let (first, words) = map.words_with(range.clone());
                file[first as usize * 8..][..words.len()].copy_from_slice(&words);
                map.add(range.clone());
                model.extend(range);
                if save {
                    let mut rows = Vec::new();
                    for (index, leaf) in map.unsaved() {
                        map.saved(index, map.row_with(index, &leaf).unwrap());
                    }
                    prop_assert!(map.unsaved().is_empty());
                    for index in map.rows() {
                        let row = map.row_with_range(index, 0..0).unwrap();
                        rows.push((index, Leaf::decode(&row.encode()).unwrap()));
                    }
                    map = RangeMap::from_rows(rows);
                }
            }
            prop_assert_eq!(map.count(), model.len() as u64);
            let from_file = RangeMap::default();
            for (index, bytes) in file.chunks(WORDS * 8).enumerate() {
                Leaf::from_bytes(bytes).into_iter().for_each(|leaf| from_file.add_leaf(index as u64, &leaf));
            }
            prop_assert_eq!(from_file.count(), map.count());
            for range in probes {
                let (at, end) = (range.start * GRANULE + 7, range.end * GRANULE - 5);
                let (ours, until) = map.run(at, end);
                prop_assert_eq!(from_file.run(at, end), (ours, until));
                prop_assert_eq!(ours, model.contains(&range.start));
                let expected = range.clone().find(|granule| model.contains(granule) != ours);
                prop_assert_eq!(until, expected.map_or(end, |granule| granule * GRANULE));
                prop_assert_eq!(map.has(&range), range.clone().all(|granule| model.contains(&granule)));
                prop_assert_eq!(map.is_clean(at, end), !range.clone().any(|granule| model.contains(&granule)));
            }
        }
    }

    #[test]
    fn golden_rows() {
        let map = RangeMap::default();
        map.add(1..3);
        map.add(LEAF..2 * LEAF);
        let mut expected = vec![0; 513];
        expected[1] = 0b110;
        let rows: Vec<_> = map.unsaved().into_iter().map(|(index, leaf)| (index, leaf.encode())).collect();
        assert_eq!(rows, [(0, expected), (1, vec![1])]);
        assert!(Leaf::decode(&[]).is_none() && Leaf::decode(&[1, 0]).is_none() && Leaf::decode(&[0; 512]).is_none());
    }

    #[test]
    fn a_row_has_only_what_was_on_the_disk_when_it_was_made() {
        let map = RangeMap::default();
        map.add(5..6);
        let before = map.unsaved();
        map.add(9..10);
        for (index, leaf) in before {
            map.saved(index, map.row_with(index, &leaf).unwrap());
        }
        assert_eq!(map.unsaved().len(), 1);
        let row = map.row_with_range(0, 20..21).unwrap();
        map.saved(0, row.clone());
        let saved = RangeMap::from_rows([(0, row)]);
        assert!(saved.has(&(5..6)) && saved.has(&(20..21)) && saved.count() == 2);
        assert!(map.has(&(9..10)) && map.has(&(20..21)) && map.count() == 3);
        assert_eq!(map.unsaved().len(), 1);
    }
}
