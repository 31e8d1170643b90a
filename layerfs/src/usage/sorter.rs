//! Groups (chunk, layer) pairs by chunk, however many there are, in bounded memory.
//!
//! Hides the external sort: sorted runs in unnamed temporary files, merged when everything is in. Repeated pairs
//! come out once. The sorted file is read through one small buffer per run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::id::ChunkId;

type Pair = (ChunkId, u32);
const PAIR_BYTES: usize = 36;
const RUN_BUFFER_BYTES: usize = 64 * 1024;
/// With this many runs, they are merged into one: descriptors and buffers stay few.
const MOST_RUNS: usize = 64;

pub(super) struct Sorter {
    folder: PathBuf,
    pairs: Vec<Pair>,
    most_pairs: usize,
    runs: Vec<File>,
}

impl Sorter {
    /// A sorter that holds `most_bytes` in memory and spills to files in `folder`.
    pub(super) fn new(folder: &Path, most_bytes: usize) -> Sorter {
        let most_pairs = (most_bytes / size_of::<Pair>()).max(16);
        Sorter { folder: folder.to_owned(), pairs: Vec::new(), most_pairs, runs: Vec::new() }
    }

    pub(super) fn push(&mut self, chunk: ChunkId, layer: u32) -> Result<()> {
        if self.pairs.len() >= self.most_pairs {
            self.shrink();
            if self.pairs.len() >= self.most_pairs / 2 {
                self.spill()?;
            }
        }
        self.pairs.push((chunk, layer));
        Ok(())
    }

    fn shrink(&mut self) {
        self.pairs.sort_unstable();
        self.pairs.dedup();
    }

    /// Writes what is in memory, which is sorted, as a run.
    fn spill(&mut self) -> Result<()> {
        let pairs = std::mem::take(&mut self.pairs);
        let run = self.write_run(|write| pairs.iter().try_for_each(write))?;
        self.pairs = pairs;
        self.pairs.clear();
        self.runs.push(run);
        if self.runs.len() >= MOST_RUNS {
            let runs = std::mem::take(&mut self.runs);
            let merged = self.write_run(|write| merge(runs, Vec::new(), write))?;
            self.runs.push(merged);
        }
        Ok(())
    }

    fn write_run(&self, fill: impl FnOnce(&mut dyn FnMut(&Pair) -> Result<()>) -> Result<()>) -> Result<File> {
        let failed = |e| Error::file("write a temporary file in", &self.folder, e);
        let file = tempfile::tempfile_in(&self.folder).map_err(failed)?;
        let mut out = BufWriter::with_capacity(RUN_BUFFER_BYTES, file);
        fill(&mut |(id, layer)| {
            out.write_all(&id.0).and_then(|()| out.write_all(&layer.to_le_bytes())).map_err(failed)
        })?;
        let mut file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok(file)
    }

    /// Shows each chunk with its layers, both in order.
    pub(super) fn groups(mut self, mut visit: impl FnMut(ChunkId, &[u32]) -> Result<()>) -> Result<()> {
        self.shrink();
        let mut current: Option<ChunkId> = None;
        let mut layers = Vec::new();
        merge(self.runs, self.pairs, &mut |(id, layer)| {
            if current != Some(*id) {
                if let Some(done) = current.replace(*id) {
                    visit(done, &layers)?;
                }
                layers.clear();
            }
            layers.push(*layer);
            Ok(())
        })?;
        current.map_or(Ok(()), |last| visit(last, &layers))
    }
}

/// Merges `runs` and the sorted `rest` into `visit`, each pair once.
fn merge(runs: Vec<File>, rest: Vec<Pair>, visit: &mut dyn FnMut(&Pair) -> Result<()>) -> Result<()> {
    let mut readers: Vec<_> = runs.into_iter().map(|run| BufReader::with_capacity(RUN_BUFFER_BYTES, run)).collect();
    let mut rest = rest.into_iter();
    let from_memory = readers.len();
    let mut next_of = |source: usize| match readers.get_mut(source) {
        Some(reader) => next_pair(reader),
        None => Ok(rest.next()),
    };
    let mut heap = BinaryHeap::new();
    for source in 0..=from_memory {
        heap.extend(next_of(source)?.map(|pair| Reverse((pair, source))));
    }
    let mut last = None;
    while let Some(Reverse((pair, source))) = heap.pop() {
        if last != Some(pair) {
            visit(&pair)?;
            last = Some(pair);
        }
        heap.extend(next_of(source)?.map(|pair| Reverse((pair, source))));
    }
    Ok(())
}

fn next_pair(reader: &mut BufReader<File>) -> Result<Option<Pair>> {
    let mut bytes = [0; PAIR_BYTES];
    match reader.read_exact(&mut bytes) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(Error::io("reading a temporary file", e)),
    }
    let (id, layer) = bytes.split_at(32);
    let (mut chunk, mut number) = ([0; 32], [0; 4]);
    chunk.copy_from_slice(id);
    number.copy_from_slice(layer);
    Ok(Some((ChunkId(chunk), u32::from_le_bytes(number))))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn pairs_are_grouped_whatever_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        for most_bytes in [0, 3_000, 1 << 20] {
            let mut sorter = Sorter::new(folder.path(), most_bytes);
            let mut expected: BTreeMap<ChunkId, BTreeSet<u32>> = BTreeMap::new();
            let mut state = 1u64;
            for _ in 0..5_000 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let (id, layer) = (ChunkId::of(&[(state >> 40) as u8]), (state >> 50) as u32 % 5);
                sorter.push(id, layer).unwrap();
                expected.entry(id).or_default().insert(layer);
            }
            let mut found = BTreeMap::new();
            sorter
                .groups(|id, layers| {
                    assert!(found.insert(id, layers.iter().copied().collect()).is_none());
                    Ok(())
                })
                .unwrap();
            assert_eq!(found, expected);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
