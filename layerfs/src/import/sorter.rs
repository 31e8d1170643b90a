//! Sorts any number of records in bounded memory: what doesn't fit is spilled, in sorted runs, to a file.
//!
//! Hides: the spill file's format and the merge. Invariants: stable (records with equal keys come out in the
//! order in which they went in); the spill file has no name, so it vanishes with the process; input that is
//! sorted already costs no comparison beyond one per record.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One record in a sorter's memory: its key's first eight bytes, and where it lies.
#[derive(Clone, Copy, Debug)]
struct Slot {
    prefix: u64,
    offset: u32,
    key_bytes: u32,
    value_bytes: u32,
}

impl Slot {
    fn key<'a>(&self, records: &'a [u8]) -> &'a [u8] {
        let start = self.offset as usize;
        &records[start..start + self.key_bytes as usize]
    }

    fn value<'a>(&self, records: &'a [u8]) -> &'a [u8] {
        let start = self.offset as usize + self.key_bytes as usize;
        &records[start..start + self.value_bytes as usize]
    }

    fn bytes<'a>(&self, records: &'a [u8]) -> &'a [u8] {
        let start = self.offset as usize;
        &records[start..start + self.key_bytes as usize + self.value_bytes as usize]
    }
}

fn prefix(key: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let count = key.len().min(8);
    bytes[..count].copy_from_slice(&key[..count]);
    u64::from_be_bytes(bytes)
}

/// Where a sorted run lies in the spill file.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    end: u64,
}

/// Bytes in front of each spilled record: the lengths of key and value.
const HEADER_BYTES: usize = 8;

/// Takes records in any order.
#[derive(Debug)]
pub struct Sorter {
    folder: PathBuf,
    budget: usize,
    records: Vec<u8>,
    slots: Vec<Slot>,
    /// Whether `slots` is in order so far.
    in_order: bool,
    spill: Option<File>,
    spilled: u64,
    runs: Vec<Run>,
    /// The greatest key of the last run, if it may be continued.
    last_run_end: Vec<u8>,
    count: u64,
}

impl Sorter {
    /// A sorter that holds about `budget` bytes in memory and spills to a file without name in `folder`.
    pub fn new(folder: &Path, budget: usize) -> Sorter {
        Sorter {
            folder: folder.to_owned(),
            budget: budget.min(u32::MAX as usize / 2),
            records: Vec::new(),
            slots: Vec::new(),
            in_order: true,
            spill: None,
            spilled: 0,
            runs: Vec::new(),
            last_run_end: Vec::new(),
            count: 0,
        }
    }

    /// How many records were taken.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes a record.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let held = self.records.len() + self.slots.len() * size_of::<Slot>();
        if held + key.len() + value.len() > self.budget && !self.slots.is_empty() {
            self.spill()?;
        }
        if self.in_order && self.slots.last().is_some_and(|last| last.key(&self.records) > key) {
            self.in_order = false;
        }
        // Lengths fit: keys are paths and values are records, both bounded far below the budget's maximum.
        let too_long = |_| Error::invalid("a record of more than 4 GiB");
        let slot = Slot {
            prefix: prefix(key),
            offset: u32::try_from(self.records.len()).map_err(too_long)?,
            key_bytes: u32::try_from(key.len()).map_err(too_long)?,
            value_bytes: u32::try_from(value.len()).map_err(too_long)?,
        };
        self.records.extend_from_slice(key);
        self.records.extend_from_slice(value);
        self.slots.push(slot);
        self.count += 1;
        Ok(())
    }

    fn sort(&mut self) {
        if !self.in_order {
            let records = &self.records;
            self.slots.sort_unstable_by(|a, b| {
                let by_key = a.prefix.cmp(&b.prefix).then_with(|| a.key(records).cmp(b.key(records)));
                by_key.then(a.offset.cmp(&b.offset))
            });
            self.in_order = true;
        }
    }

    fn spill(&mut self) -> Result<()> {
        self.sort();
        let file = match self.spill.take() {
            Some(file) => file,
            None => tempfile::tempfile_in(&self.folder)
                .map_err(|e| Error::file("create a temporary file in", &self.folder, e))?,
        };
        let failed = |e| Error::file("write a temporary file in", &self.folder, e);
        let start = self.spilled;
        let mut out = BufWriter::with_capacity(128 * 1024, &file);
        for slot in &self.slots {
            out.write_all(&slot.key_bytes.to_le_bytes()).map_err(failed)?;
            out.write_all(&slot.value_bytes.to_le_bytes()).map_err(failed)?;
            out.write_all(slot.bytes(&self.records)).map_err(failed)?;
            self.spilled += (HEADER_BYTES + slot.key_bytes as usize + slot.value_bytes as usize) as u64;
        }
        out.flush().map_err(failed)?;
        drop(out);
        self.spill = Some(file);
        let first = self.slots.first().map_or(&[][..], |slot| slot.key(&self.records));
        match self.runs.last_mut() {
            Some(run) if self.last_run_end.as_slice() <= first => run.end = self.spilled,
            _ => self.runs.push(Run { start, end: self.spilled }),
        }
        self.last_run_end.clear();
        if let Some(last) = self.slots.last() {
            self.last_run_end.extend_from_slice(last.key(&self.records));
        }
        self.records.clear();
        self.slots.clear();
        Ok(())
    }

    /// Ends the input. What is still in memory is spilled if anything was, so that a sorted input waits outside.
    pub fn finish(mut self) -> Result<Sorted> {
        self.sort();
        if self.spill.is_some() && !self.slots.is_empty() {
            self.spill()?;
            self.records = Vec::new();
            self.slots = Vec::new();
        }
        let Sorter { folder, records, slots, spill, runs, count, .. } = self;
        Ok(Sorted { folder, records, slots, spill, runs, count })
    }
}

/// Sorted records, which may be read several times.
#[derive(Debug)]
pub struct Sorted {
    folder: PathBuf,
    records: Vec<u8>,
    slots: Vec<Slot>,
    spill: Option<File>,
    runs: Vec<Run>,
    count: u64,
}

impl Sorted {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Reads them from the first on.
    pub fn read(&self) -> Result<Records<'_>> {
        let buffer_bytes = (4 * 1024 * 1024 / self.runs.len().max(1)).clamp(8 * 1024, 128 * 1024);
        let mut cursors = Vec::with_capacity(self.runs.len());
        if let Some(file) = &self.spill {
            for run in &self.runs {
                let mut cursor = Cursor::new(file, &self.folder, *run, buffer_bytes);
                if cursor.advance()? {
                    cursors.push(cursor);
                }
            }
        }
        let mut records =
            Records { sorted: self, next_slot: 0, heap: (0..cursors.len()).collect(), cursors, started: false };
        for position in (0..records.heap.len() / 2).rev() {
            records.sift_down(position);
        }
        Ok(records)
    }
}

/// Reads one run.
#[derive(Debug)]
struct Cursor<'a> {
    file: &'a File,
    folder: &'a Path,
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    /// Where the current record lies in `buffer`: header, key, value.
    at: usize,
    key_bytes: usize,
    value_bytes: usize,
    buffer_bytes: usize,
}

impl<'a> Cursor<'a> {
    fn new(file: &'a File, folder: &'a Path, run: Run, buffer_bytes: usize) -> Cursor<'a> {
        Cursor {
            file,
            folder,
            next: run.start,
            end: run.end,
            buffer: Vec::new(),
            at: 0,
            key_bytes: 0,
            value_bytes: 0,
            buffer_bytes,
        }
    }

    fn key(&self) -> &[u8] {
        let start = self.at + HEADER_BYTES;
        &self.buffer[start..start + self.key_bytes]
    }

    fn value(&self) -> &[u8] {
        let start = self.at + HEADER_BYTES + self.key_bytes;
        &self.buffer[start..start + self.value_bytes]
    }

    /// Goes to the next record (from a new cursor: the first); false at the end.
    fn advance(&mut self) -> Result<bool> {
        if !self.buffer.is_empty() {
            self.at += HEADER_BYTES + self.key_bytes + self.value_bytes;
        }
        if self.buffer.len() - self.at < HEADER_BYTES && !self.fill(HEADER_BYTES)? {
            return Ok(false);
        }
        let length = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.buffer[at..at + 4]);
            u32::from_le_bytes(bytes) as usize
        };
        (self.key_bytes, self.value_bytes) = (length(self.at), length(self.at + 4));
        let wanted = HEADER_BYTES + self.key_bytes + self.value_bytes;
        if self.buffer.len() - self.at < wanted && !self.fill(wanted)? {
            return Err(Error::corrupt("temporary file", "a record is cut off"));
        }
        Ok(true)
    }

    /// Makes at least `wanted` bytes from `at` on available; false if the run ends before.
    fn fill(&mut self, wanted: usize) -> Result<bool> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let held = self.buffer.len();
        let more = ((self.end - self.next) as usize).min(self.buffer_bytes.max(wanted) - held);
        self.buffer.resize(held + more, 0);
        let failed = |e| Error::file("read a temporary file in", self.folder, e);
        self.file.read_exact_at(&mut self.buffer[held..], self.next).map_err(failed)?;
        self.next += more as u64;
        Ok(self.buffer.len() >= wanted)
    }
}

/// Sorted records, one at a time.
#[derive(Debug)]
pub struct Records<'a> {
    sorted: &'a Sorted,
    next_slot: usize,
    cursors: Vec<Cursor<'a>>,
    /// The cursors that are not at their end; the one with the smallest record first.
    heap: Vec<usize>,
    started: bool,
}

impl Records<'_> {
    /// Goes to the next record (at first: to the first); false at the end.
    pub fn advance(&mut self) -> Result<bool> {
        if self.sorted.spill.is_none() {
            // All in memory: `next_slot` is one past the current record.
            self.next_slot += 1;
            return Ok(self.next_slot <= self.sorted.slots.len());
        }
        if std::mem::replace(&mut self.started, true) {
            let Some(first) = self.heap.first().copied() else { return Ok(false) };
            if !self.cursors[first].advance()? {
                self.heap.swap_remove(0);
            }
            self.sift_down(0);
        }
        Ok(!self.heap.is_empty())
    }

    /// The current record's key; only after [`Records::advance`] returned true.
    pub fn key(&self) -> &[u8] {
        match self.heap.first() {
            Some(first) => self.cursors[*first].key(),
            None => self.sorted.slots[self.next_slot - 1].key(&self.sorted.records),
        }
    }

    /// The current record's value; only after [`Records::advance`] returned true.
    pub fn value(&self) -> &[u8] {
        match self.heap.first() {
            Some(first) => self.cursors[*first].value(),
            None => self.sorted.slots[self.next_slot - 1].value(&self.sorted.records),
        }
    }

    fn order(&self, a: usize, b: usize) -> Ordering {
        let (a, b) = (self.heap[a], self.heap[b]);
        self.cursors[a].key().cmp(self.cursors[b].key()).then(a.cmp(&b))
    }

    fn sift_down(&mut self, mut position: usize) {
        loop {
            let mut least = position;
            for child in [2 * position + 1, 2 * position + 2] {
                if child < self.heap.len() && self.order(child, least) == Ordering::Less {
                    least = child;
                }
            }
            if least == position {
                return;
            }
            self.heap.swap(position, least);
            position = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn sorted(pairs: &Pairs, budget: usize) -> Pairs {
        let folder = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(folder.path(), budget);
        pairs.iter().for_each(|(key, value)| sorter.push(key, value).unwrap());
        let sorted = sorter.finish().unwrap();
        let mut first = Pairs::new();
        for round in 0..2 {
            let mut found = Pairs::new();
            let mut records = sorted.read().unwrap();
            while records.advance().unwrap() {
                found.push((records.key().to_vec(), records.value().to_vec()));
            }
            if round == 0 {
                first = found;
            } else {
                assert_eq!(first, found);
            }
        }
        first
    }

    proptest! {
        #[test]
        fn sorts_stably_whatever_the_memory(
            keys in prop::collection::vec(prop::collection::vec(0u8..3, 0..12), 0..300),
            budget in prop::sample::select(vec![1usize, 100, 1000, 1 << 20]),
        ) {
            let pairs: Pairs = keys.into_iter().enumerate().map(|(i, key)| (key, i.to_string().into_bytes())).collect();
            let mut expected = pairs.clone();
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(sorted(&pairs, budget), expected);
        }
    }

    #[test]
    fn sorted_input_makes_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(folder.path(), 1000);
        for i in 0..1000u32 {
            sorter.push(&i.to_be_bytes(), &[7; 100]).unwrap();
        }
        assert_eq!(sorter.finish().unwrap().runs.len(), 1);
    }
}
