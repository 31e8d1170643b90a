//! What a running guest has changed of its memory between two looks at it, page by page, from the files that scans have written.
//!
//! Hides where pages lie in such files: a mapping that grew moves all that follows it. What two looks tell is how much would have to
//! go if the guest stopped now, and which pages it writes anew all the time, so that sending them before it stops is for nothing.
//! Invariants: pages are compared by their addresses; of each look at most [`PIECE`] bytes are in memory at a time, and a sample.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::bundle::squeeze;
use crate::guest::pagemap::{PAGE, Pagemap};
use crate::guest::state::MEMORY_FILE;

/// So much is compared at a time, in bytes.
const PIECE: usize = 1 << 20;
const PAGE_BYTES: usize = PAGE as usize;
/// So many bytes of changed pages are compressed, to know what the others would come to.
const SAMPLE: usize = 512 << 10;
const LEVEL: i32 = 3;
/// A page is written anew if so many of its words of eight bytes are others: less is told as a difference, for a few bytes.
const REWRITTEN: usize = PAGE_BYTES / 8 / 4;
/// What stands for a page that is left out. No zeros, which would be a hole, and cut its chunk in two.
const LEFT_OUT: [u8; PAGE_BYTES] = [0xa5; PAGE_BYTES];

/// What is other than it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Bytes of memory, whole pages.
    pub memory_bytes: u64,
    /// About what they come to on the wire, in bytes.
    pub wire_bytes: u64,
}

/// Pages that follow one another in a file of the later look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    /// Where they are, in bytes.
    new: u64,
    /// Where the same addresses are in the earlier look's file, if they were there.
    old: Option<u64>,
    bytes: u64,
}

/// A file of the later look, and the earlier one's with the same part of the memory.
struct Pair {
    new: PathBuf,
    old: PathBuf,
    spans: Vec<Span>,
}

/// What differs between the looks in the folders `old` and `new`.
///
/// # Errors
/// Those of reading; what isn't a scan's file is refused.
pub fn between(old: &Path, new: &Path) -> io::Result<Changes> {
    let mut sample = Sample::default();
    let mut memory_bytes = 0;
    visit(old, new, &mut |_, _, was, is| {
        memory_bytes += PAGE;
        sample.take(was, is);
        Ok(())
    })?;
    Ok(Changes { memory_bytes, wire_bytes: (memory_bytes as f64 * sample.ratio()) as u64 })
}

/// Puts something that costs nothing for the pages of the look in `new` which are written anew since the one in `old`, or weren't
/// there, up to `most` bytes of them. Returns how many bytes.
///
/// # Errors
/// Those of reading and writing; what isn't a scan's file is refused.
pub fn leave_out(old: &Path, new: &Path, most: u64) -> io::Result<u64> {
    let mut bytes = 0;
    visit(old, new, &mut |file, at, was, is| {
        if bytes + PAGE <= most && is_rewritten(was, is) {
            bytes += PAGE;
            file.write_all_at(&LEFT_OUT, at)?;
        }
        Ok(())
    })?;
    Ok(bytes)
}

fn is_rewritten(was: &[u8], is: &[u8]) -> bool {
    was.is_empty() || was.chunks_exact(8).zip(is.chunks_exact(8)).filter(|(was, is)| was != is).count() >= REWRITTEN
}

/// Called with a file of the later look, a page's place in it, what was at its address (nothing if it wasn't there), and what is.
type Visit<'a> = dyn FnMut(&File, u64, &[u8], &[u8]) -> io::Result<()> + 'a;

/// Shows `visit` each page of `new` that isn't as it was in `old`. Pages of zeros that weren't there are as they were.
fn visit(old: &Path, new: &Path, visit: &mut Visit<'_>) -> io::Result<()> {
    let (mut was, mut is) = (vec![0; PIECE], vec![0; PIECE]);
    for pair in pairs(old, new)? {
        let file = File::options().read(true).write(true).open(&pair.new)?;
        let before = if pair.spans.iter().any(|span| span.old.is_some()) { Some(File::open(&pair.old)?) } else { None };
        for span in pair.spans {
            for done in (0..span.bytes).step_by(PIECE) {
                let length = (span.bytes - done).min(PIECE as u64) as usize;
                file.read_exact_at(&mut is[..length], span.new + done)?;
                let there = match (span.old, &before) {
                    (Some(at), Some(before)) => {
                        before.read_exact_at(&mut was[..length], at + done)?;
                        true
                    }
                    _ => false,
                };
                for at in (0..length).step_by(PAGE_BYTES) {
                    let end = (at + PAGE_BYTES).min(length);
                    let is = &is[at..end];
                    let was = if there { &was[at..end] } else { &[][..] };
                    let is_same = if there { was == is } else { is.iter().all(|byte| *byte == 0) };
                    if !is_same {
                        visit(&file, span.new + done + at as u64, was, is)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn pairs(old: &Path, new: &Path) -> io::Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for entry in fs::read_dir(new)? {
        let name = entry?.file_name();
        if name == MEMORY_FILE {
            let (new, old) = (new.join(&name), old.join(&name));
            let there = fs::metadata(&old).map_or(0, |metadata| metadata.len());
            let spans = data_of(&File::open(&new)?)?;
            // In a file of another length things may be at other places.
            let is_alike = fs::metadata(&new)?.len() == there;
            let spans = spans.into_iter().map(|span| Span { old: span.old.filter(|_| is_alike), ..span }).collect();
            pairs.push(Pair { new, old, spans });
        } else if name.as_encoded_bytes().starts_with(b"pagemap-") {
            let load = |folder: &Path| {
                let bytes = fs::read(folder.join(&name))?;
                Pagemap::parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
            };
            let is = load(new)?;
            let was = match load(old) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                loaded => Some(loaded?),
            };
            let pages = |map: &Pagemap| format!("pages-{}.img", map.pages_id);
            let old = was.as_ref().map_or_else(|| old.to_owned(), |was| old.join(pages(was)));
            pairs.push(Pair { new: new.join(pages(&is)), old, spans: spans(&is, was.as_ref()) });
        }
    }
    Ok(pairs)
}

/// The parts of `file` that hold data, at the same place in both looks.
fn data_of(file: &File) -> io::Result<Vec<Span>> {
    use rustix::fs::{SeekFrom, seek};
    let (mut spans, mut at) = (Vec::new(), 0);
    loop {
        let begin = match seek(file, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => return Ok(spans),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(begin))?;
        spans.push(Span { new: begin, old: Some(begin), bytes: at - begin });
    }
}

/// The runs of `is`, cut where it begins or ends that `was` has the same addresses.
fn spans(is: &Pagemap, was: Option<&Pagemap>) -> Vec<Span> {
    // By address: where the run begins, where it ends, and its place in the file.
    let mut there: Vec<(u64, u64, u64)> = Vec::new();
    let mut offset = 0;
    for run in was.iter().flat_map(|map| &map.runs) {
        there.push((run.address, run.address + run.pages * PAGE, offset));
        offset += run.pages * PAGE;
    }
    there.sort_unstable();
    let (mut spans, mut new) = (Vec::new(), 0);
    for run in &is.runs {
        let (mut address, end) = (run.address, run.address + run.pages * PAGE);
        while address < end {
            let next = there.partition_point(|(_, end, _)| *end <= address);
            let (old, until) = match there.get(next) {
                Some((begin, until, offset)) if *begin <= address => (Some(offset + (address - begin)), *until),
                Some((begin, ..)) => (None, *begin),
                None => (None, end),
            };
            let bytes = until.min(end) - address;
            spans.push(Span { new, old, bytes });
            (address, new) = (address + bytes, new + bytes);
        }
    }
    spans
}

/// Some of the changed pages, evenly spread.
#[derive(Default)]
struct Sample {
    was: Vec<u8>,
    is: Vec<u8>,
    seen: u64,
    /// One in so many is taken, as a power of two.
    thinned: u32,
}

impl Sample {
    fn take(&mut self, was: &[u8], is: &[u8]) {
        let number = self.seen;
        self.seen += 1;
        if is.len() != PAGE_BYTES || number.trailing_zeros() < self.thinned {
            return;
        }
        if self.is.len() == SAMPLE {
            self.thinned += 1;
            for pages in [&mut self.was, &mut self.is] {
                let kept: Vec<u8> = pages.chunks(PAGE_BYTES).step_by(2).flatten().copied().collect();
                *pages = kept;
            }
            if number.trailing_zeros() < self.thinned {
                return;
            }
        }
        self.is.extend_from_slice(is);
        self.was.extend_from_slice(if was.is_empty() { &[0; PAGE_BYTES] } else { was });
    }

    /// What a byte of the changed pages comes to on the wire, compared with what was at its place.
    fn ratio(&self) -> f64 {
        let Some(frame) = squeeze(&self.was, &self.is, LEVEL) else { return 1.0 };
        frame.len() as f64 / self.is.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::pagemap::Run;
    use crate::tests::pair::noise;

    /// Writes a look at a process: runs of pages by their addresses, and what is in each page.
    fn look(folder: &Path, runs: &[Run], page: impl Fn(u64) -> Vec<u8>) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("pagemap-1.img"), Pagemap { pages_id: 1, runs: runs.to_vec() }.encode()).unwrap();
        let addresses = runs.iter().flat_map(|run| (0..run.pages).map(|page| run.address + page * PAGE));
        fs::write(folder.join("pages-1.img"), addresses.flat_map(page).collect::<Vec<u8>>()).unwrap();
    }

    fn page_of(seed: u64) -> Vec<u8> {
        noise(seed, PAGE_BYTES)
    }

    #[test]
    fn pages_are_compared_by_their_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        let run = |address, pages| Run { address: address * PAGE, pages };
        look(&old, &[run(16, 8), run(100, 4)], |address| page_of(address / PAGE));
        // Two pages before the first, one in the gap, and one that is another.
        let changed = |address: u64| if address == 101 * PAGE { page_of(7) } else { page_of(address / PAGE) };
        look(&new, &[run(14, 10), run(60, 1), run(100, 4)], changed);
        let found = between(&old, &new).unwrap();
        assert_eq!(found.memory_bytes, 4 * PAGE);
        // It is noise: nothing of it can be saved.
        assert!((4 * PAGE..5 * PAGE).contains(&found.wire_bytes), "{found:?}");
        assert_eq!(between(&new, &new).unwrap(), Changes::default());
        assert_eq!(leave_out(&old, &new, u64::MAX).unwrap(), 4 * PAGE);
        let pages = fs::read(new.join("pages-1.img")).unwrap();
        let is_left_out = |at: usize| pages[at * PAGE_BYTES..][..PAGE_BYTES] == LEFT_OUT;
        let left_out: Vec<usize> = (0..pages.len() / PAGE_BYTES).filter(|at| is_left_out(*at)).collect();
        assert_eq!(left_out, [0, 1, 10, 12]);
    }

    #[test]
    fn what_changes_a_little_is_cheap_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        let runs = [Run { address: 0, pages: 1000 }];
        look(&old, &runs, page_of);
        look(&new, &runs, |address| {
            let mut page = page_of(address);
            page[100] ^= 1;
            page
        });
        let found = between(&old, &new).unwrap();
        assert_eq!(found.memory_bytes, 1000 * PAGE);
        assert!(found.wire_bytes < 1000 * PAGE / 20, "{found:?}");
        assert_eq!(leave_out(&old, &new, u64::MAX).unwrap(), 0);
        look(&new, &runs, |address| page_of(address + 1));
        assert_eq!(leave_out(&old, &new, 10 * PAGE + 1).unwrap(), 10 * PAGE);
    }

    #[test]
    fn a_machine_s_memory_has_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        let write = |folder: &Path, pages: &[(u64, u64)]| {
            fs::create_dir_all(folder).unwrap();
            let file = File::create(folder.join(MEMORY_FILE)).unwrap();
            file.set_len(64 << 20).unwrap();
            pages.iter().for_each(|(at, seed)| file.write_all_at(&page_of(*seed), at << 20).unwrap());
        };
        write(&old, &[(1, 1), (2, 2), (40, 3)]);
        write(&new, &[(1, 1), (2, 9), (41, 4)]);
        assert_eq!(between(&old, &new).unwrap().memory_bytes, 2 * PAGE);
        assert_eq!(leave_out(&old, &new, u64::MAX).unwrap(), 2 * PAGE);
        // Holes are still holes.
        let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(new.join(MEMORY_FILE)).unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks}");
    }
}
