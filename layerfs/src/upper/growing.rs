//! Warm copies on trial: they grow while somebody reads their file for the first time.
//!
//! Hides what a copy has already, and who still writes to it. Invariants: a copy is handed out when it has all bytes of its file, and nobody
//! writes to it any more: later it may become a data file, with other bytes. It is in memory only, and never reaches the disk if it goes soon.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::warm::Made;
use crate::content::Content;
use crate::store::spare::Room;

/// So much is written at once. Larger pieces are kept in larger folios, which are read 5% faster; but large blocks of memory are those that
/// a virtual machine has given back to its host, and with them the first reading takes half as long again.
const PIECE_BYTES: usize = 128 << 10;
/// Who reads a file for longer than this leaves no copy.
const GROWS: Duration = Duration::from_secs(7);
/// Who reads it in more places at once doesn't either.
const PARTS_MAX: usize = 64;

/// Copies take one part in so many of the memory that we can have: they are in nothing else, and the kernel begins to write to the disk when
/// a tenth of it waits for that.
const MEMORY_PART: u64 = 16;

/// How many bytes all copies on trial together may take.
pub(super) fn most_bytes() -> u64 {
    let available = read("/proc/meminfo").and_then(|text| {
        let kibibytes = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(kibibytes.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    });
    let group = read("/proc/self/cgroup").and_then(|text| {
        let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        limit_of(Path::new("/sys/fs/cgroup"), Path::new(group))
    });
    available.unwrap_or(0).min(group.unwrap_or(u64::MAX)) / MEMORY_PART
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The least limit of memory, in bytes, of a control group below `root` and of those that it is in; none if there is none.
fn limit_of(root: &Path, group: &Path) -> Option<u64> {
    group.ancestors().filter_map(|group| read(root.join(group).join("memory.max"))?.trim().parse().ok()).min()
}

/// A copy that isn't whole yet.
#[derive(Debug)]
pub struct Growing {
    file: Arc<File>,
    content: Content,
    begun: Instant,
    /// None once it was handed out or given up.
    work: Mutex<Option<Work>>,
}

#[derive(Debug)]
struct Work {
    room: Room,
    has: Parts,
    /// How many are writing to it.
    writers: usize,
}

impl Growing {
    /// One of `content`, to be written into `file`.
    pub(super) fn new(file: File, content: &Content, room: Room) -> Growing {
        let work = Work { room, has: Parts::default(), writers: 0 };
        Growing { file: Arc::new(file), content: content.clone(), begun: Instant::now(), work: Mutex::new(Some(work)) }
    }

    /// What it is to become a copy of.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Whether it takes too long.
    pub fn is_late(&self) -> bool {
        self.begun.elapsed() > GROWS
    }

    /// `bytes` of the file, which are at `offset`, were read. Returns the copy when it is whole, once.
    ///
    /// # Errors
    /// Those of the disk; it takes too long. It is given up then.
    pub fn add(&self, offset: u64, bytes: &[u8]) -> Result<Option<Made>> {
        let range = offset..offset + bytes.len() as u64;
        match &mut *self.work.lock() {
            Some(work) if !work.has.have(&range) => work.writers += 1,
            _ => return Ok(None),
        }
        let written = self.write(offset, bytes);
        let mut work = self.work.lock();
        let Some(now) = &mut *work else { return Ok(None) };
        now.writers -= 1;
        now.has.add(range);
        if written.is_err() || now.has.0.len() > PARTS_MAX || self.is_late() {
            *work = None;
            return written.and(Err(ErrorKind::TimedOut.into()));
        }
        if now.writers > 0 || !now.has.have(&(0..self.content.len())) {
            return Ok(None);
        }
        Ok(work.take().map(|work| Made { file: self.file.clone(), room: work.room }))
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let pieces = (offset..).step_by(PIECE_BYTES).zip(bytes.chunks(PIECE_BYTES));
        // Holes stay holes.
        let mut pieces = pieces.filter(|(_, piece)| piece.iter().any(|byte| *byte != 0));
        pieces.try_for_each(|(at, piece)| self.file.write_all_at(piece, at))
    }
}

/// Ranges in order, of which no two touch.
#[derive(Debug, Default)]
struct Parts(Vec<Range<u64>>);

impl Parts {
    fn have(&self, range: &Range<u64>) -> bool {
        self.0.iter().any(|part| part.start <= range.start && range.end <= part.end)
    }

    fn add(&mut self, mut range: Range<u64>) {
        let first = self.0.partition_point(|part| part.end < range.start);
        let last = self.0.partition_point(|part| part.start <= range.end);
        for part in &self.0[first..last] {
            range = range.start.min(part.start)..range.end.max(part.end);
        }
        self.0.splice(first..last, [range]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunker::Chunker;
    use crate::content::List;
    use crate::store::spare::Spares;

    proptest! {
        #[test]
        fn parts_are_what_was_added(ranges in prop::collection::vec((0u64..200, 1u64..40), 0..40)) {
            let (mut parts, mut model) = (Parts::default(), [false; 240]);
            for (start, bytes) in ranges {
                parts.add(start..start + bytes);
                model[start as usize..(start + bytes) as usize].fill(true);
                prop_assert!(parts.0.windows(2).all(|two| two[0].end < two[1].start));
                for from in (0..240).step_by(7) {
                    for to in (from + 1..=240).step_by(11) {
                        prop_assert_eq!(parts.have(&(from as u64..to as u64)), model[from..to].iter().all(|is| *is));
                    }
                }
            }
        }
    }

    const BYTES: usize = 3 << 20;

    fn growing(spares: &Spares) -> Growing {
        let list = List::Direct(Vec::new());
        let content = Content::Extents { bytes: BYTES as u64, data_bytes: BYTES as u64, chunker: Chunker::Tree, list };
        Growing::new(tempfile::tempfile().unwrap(), &content, spares.room_on_trial(BYTES as u64, u64::MAX).unwrap())
    }

    /// Many read the same at once. Whoever gets the copy changes it, and nobody writes what was read over that.
    #[test]
    fn nobody_writes_to_a_copy_that_was_handed_out() {
        let expected: Vec<u8> = (0..BYTES as u32).map(|at| (at % 251) as u8).collect();
        for _ in 0..50 {
            let spares = Spares::new(1 << 30);
            let growing = growing(&spares);
            let made = std::thread::scope(|scope| {
                let read = || {
                    let mut made = None;
                    for (at, piece) in (0u64..).step_by(100_000).zip(expected.chunks(100_000)) {
                        if let Some(whole) = growing.add(at, piece).unwrap() {
                            let mut bytes = vec![0; BYTES];
                            whole.file.read_exact_at(&mut bytes, 0).unwrap();
                            assert!(bytes == expected, "it isn't whole");
                            whole.file.write_all_at(&[255; BYTES], 0).unwrap();
                            made = Some(whole);
                        }
                    }
                    made
                };
                let readers: Vec<_> = (0..6).map(|_| scope.spawn(read)).collect();
                readers.into_iter().filter_map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(made.len(), 1);
            let mut bytes = vec![0; BYTES];
            made[0].file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 255), "what was read was written later");
        }
    }

    #[test]
    fn the_least_limit_counts() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
        let limit = || limit_of(folder.path(), Path::new("a/b/c"));
        assert_eq!(limit(), None);
        for (group, text, least) in
            [("a/b/c", "max\n", None), ("a", "5000\n", Some(5000)), ("a/b", "7000\n", Some(5000))]
        {
            std::fs::write(folder.path().join(group).join("memory.max"), text).unwrap();
            assert_eq!(limit(), least);
        }
        assert!(most_bytes() > 0);
    }

    #[test]
    fn what_is_given_up_gives_its_room_back() {
        let spares = Spares::new(BYTES as u64);
        let first = growing(&spares);
        assert!(spares.room_on_trial(1, u64::MAX).is_none());
        // In too many places at once.
        let mut places = (0..).map(|number| number * 8192).map(|at| first.add(at, &[1]));
        assert!(places.by_ref().take(PARTS_MAX).all(|added| added.is_ok_and(|made| made.is_none())));
        assert_eq!(places.next().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(first.add(0, &vec![1; BYTES]).unwrap().is_none(), "it was given up");
        drop(growing(&spares));
        assert!(spares.room(BYTES as u64).is_some());
    }
}
