//! Data files that hold ranges of a file, and the map files beside them: `<inode, hexadecimal>.map`.
//!
//! Hides the form of a map file (FORMAT.md, "Uppers"), and whose word counts after the machine was started anew.
//! Invariants: a granule that is the upper's has all its bytes in the data file; the data file is as long as the file;
//! what the data file holds in other granules is never looked at. A map file belongs to the start of the machine that
//! wrote it: with its page cache it is exact.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};

use rustix::fs::{AtFlags, Mode, OFlags, SeekFrom};

use super::data::{DataFolder, file_name};
use super::ranges::{GRANULE, LEAF, Leaf, RangeMap};
use crate::error::{Error, Result};
use crate::id::Ino;

/// The begin of a map file.
const MAGIC: &[u8; 8] = b"LAYERMAP";
/// The magic, a version and the machine's start, and zeros.
const HEADER_BYTES: usize = 4096;
const VERSION: u32 = 1;
const LEAF_BYTES: usize = (LEAF / 8) as usize;

/// What tells this start of the machine from others; none if that isn't known.
static BOOT: LazyLock<Option<[u8; 36]>> = LazyLock::new(|| {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    id.get(..36)?.try_into().ok()
});

fn map_name(ino: Ino) -> String {
    format!("{}.map", file_name(ino))
}

fn header(boot: Option<[u8; 36]>) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&boot.unwrap_or([0; 36]));
    header.resize(HEADER_BYTES, 0);
    header
}

/// What [`DataFolder::load_map`] found.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// The map file is of an earlier start of the machine: it can go once the rows are written.
    pub is_outdated: bool,
}

impl DataFolder {
    /// Makes an empty data file for `bytes` bytes of `ino`, none of them the upper's, and syncs that. Returns false if the
    /// host's filesystem can't hold ranges: its blocks are larger than granules, or it doesn't tell of holes.
    pub fn create_ranged(&self, ino: Ino, bytes: u64) -> Result<bool> {
        let file = self.create_empty(ino)?;
        let make = || {
            file.set_len(bytes).map_err(|e| self.failed("truncate", ino, e))?;
            let stat = rustix::fs::fstat(&file).map_err(|e| self.failed("stat", ino, e))?;
            let is_hole = bytes == 0 || rustix::fs::seek(&file, SeekFrom::Data(0)) == Err(rustix::io::Errno::NXIO);
            if stat.st_blksize as u64 > GRANULE || !is_hole {
                return Ok(false);
            }
            file.sync_all().map_err(|e| self.failed("sync", ino, e))?;
            Ok(true)
        };
        match make() {
            Ok(true) => {
                self.remove_map_file(ino);
                self.maps.write().insert(ino, Arc::default());
                self.keep_open(ino, Arc::new(file));
                Ok(true)
            }
            result => {
                self.remove(ino);
                result
            }
        }
    }

    /// Which ranges of `ino` are the upper's; none if the whole file is.
    pub fn map(&self, ino: Ino) -> Option<Arc<RangeMap>> {
        self.maps.read().get(&ino).cloned()
    }

    /// All of `ino` is the upper's from now on.
    pub fn forget_map(&self, ino: Ino) {
        self.let_map_go(ino);
        self.unlink_map(ino);
    }

    /// Forgets the map of `ino`, whose file stays until [`DataFolder::unlink_map`].
    pub(super) fn let_map_go(&self, ino: Ino) {
        if self.maps.write().remove(&ino).is_some() {
            self.open_maps.lock().pop(&ino);
            self.map_goes(ino);
        }
    }

    /// The map file of `ino` goes with its data file, or before.
    pub(super) fn map_goes(&self, ino: Ino) {
        self.maps_let_go.lock().insert(ino);
    }

    /// Removes the file of a map that was let go, if `ino` had one.
    pub(super) fn unlink_map(&self, ino: Ino) {
        if self.maps_let_go.lock().remove(&ino) {
            self.remove_map_file(ino);
        }
    }

    /// Makes `granules` of `ino` the upper's, whose bytes were written. That survives the end of the process.
    /// Whoever calls it holds the file's other writers back.
    pub fn mark(&self, ino: Ino, map: &RangeMap, granules: Range<u64>) -> Result<()> {
        if map.has(&granules) {
            return Ok(());
        }
        let (first, words) = map.words_with(granules.clone());
        let file = self.map_file(ino)?;
        let at = HEADER_BYTES as u64 + first * 8;
        file.write_all_at(&words, at).map_err(|e| self.failed("write the map of", ino, e))?;
        map.add(granules);
        Ok(())
    }

    fn map_file(&self, ino: Ino) -> Result<Arc<File>> {
        let mut open = self.open_maps.lock();
        if let Some(file) = open.get(&ino) {
            return Ok(file.clone());
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&self.folder, map_name(ino), flags, Mode::RUSR | Mode::WUSR);
        let file = Arc::new(File::from(opened.map_err(|e| self.failed("open the map of", ino, e))?));
        let failed = |e| self.failed("write the map of", ino, e);
        if file.metadata().map_err(failed)?.len() < HEADER_BYTES as u64 {
            file.write_all_at(&header(*BOOT), 0).map_err(failed)?;
        }
        open.put(ino, file.clone());
        Ok(file)
    }

    pub(super) fn remove_map_file(&self, ino: Ino) {
        let mut open = self.open_maps.lock();
        open.pop(&ino);
        match rustix::fs::unlinkat(&self.folder, map_name(ino), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => tracing::warn!(%ino, %errno, "cannot remove a map file"),
        }
    }

    /// Takes in the map of `ino`: what its rows have, and what the map file has besides and can be believed.
    pub(super) fn load_map(&self, ino: Ino, rows: Vec<(u64, Leaf)>) -> Result<Loaded> {
        let map = RangeMap::from_rows(rows);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME;
        let loaded = match rustix::fs::openat(&self.folder, map_name(ino), flags, Mode::empty()) {
            Ok(file) => self.load_map_file(ino, &File::from(file), &map)?,
            Err(rustix::io::Errno::NOENT) => Loaded::default(),
            Err(errno) => return Err(self.failed("open the map of", ino, errno)),
        };
        self.maps.write().insert(ino, Arc::new(map));
        Ok(loaded)
    }

    fn load_map_file(&self, ino: Ino, file: &File, map: &RangeMap) -> Result<Loaded> {
        let failed = |e: std::io::Error| self.failed("read the map of", ino, e);
        let mut found = vec![0; HEADER_BYTES];
        if read_full(file, &mut found, 0).map_err(failed)? < HEADER_BYTES {
            return Ok(Loaded::default());
        }
        let is_now = BOOT.is_some() && found == header(*BOOT);
        if !is_now && found[..12] != header(None)[..12] {
            return Err(Error::corrupt("map file", format!("{} doesn't begin as one", map_name(ino))));
        }
        let mut bytes = vec![0; LEAF_BYTES];
        let mut index = 0;
        while let Some(next) = next_leaf(file, index).map_err(failed)? {
            bytes.fill(0);
            read_full(file, &mut bytes, HEADER_BYTES as u64 + next * LEAF_BYTES as u64).map_err(failed)?;
            if let Some(leaf) = Leaf::from_bytes(&bytes) {
                if is_now {
                    map.add_leaf(next, &leaf);
                } else {
                    self.add_what_is_there(ino, map, next, leaf)?;
                }
            }
            index = next + 1;
        }
        if !is_now {
            self.file(ino)?.sync_data().map_err(|e| self.failed("sync", ino, e))?;
        }
        Ok(Loaded { is_outdated: !is_now })
    }

    /// Adds those granules of `leaf` to `map` whose bytes the data file has.
    fn add_what_is_there(&self, ino: Ino, map: &RangeMap, index: u64, leaf: Leaf) -> Result<()> {
        let said = RangeMap::from_rows([(index, leaf)]);
        let file = self.file(ino)?;
        let bytes = self.stat(ino)?.bytes;
        let (mut at, end) = (index * LEAF * GRANULE, ((index + 1) * LEAF * GRANULE).min(bytes));
        while at < end {
            let (ours, until) = said.run(at, end);
            let mut from = at;
            while ours && from < until {
                let start = match rustix::fs::seek(&*file, SeekFrom::Data(from)) {
                    Ok(start) if start < until => start,
                    Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                    Err(errno) => return Err(self.failed("seek in", ino, errno)),
                };
                let hole =
                    rustix::fs::seek(&*file, SeekFrom::Hole(start)).map_err(|e| self.failed("seek in", ino, e))?;
                // The file's last granule is there if it is up to the file's end.
                let last = if hole >= bytes { until.div_ceil(GRANULE) } else { hole.min(until) / GRANULE };
                let first = start.div_ceil(GRANULE);
                if first < last {
                    map.add(first..last);
                }
                from = hole.max(start + 1);
            }
            at = until;
        }
        Ok(())
    }

    /// The numbers of all map files.
    pub(super) fn map_inos(&self) -> Result<Vec<Ino>> {
        self.numbers(|name| name.strip_suffix(".map"))
    }
}

/// The next leaf from `index` on that isn't a hole of the map file.
fn next_leaf(file: &File, index: u64) -> std::io::Result<Option<u64>> {
    let at = HEADER_BYTES as u64 + index * LEAF_BYTES as u64;
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok(Some((found.max(at) - HEADER_BYTES as u64) / LEAF_BYTES as u64)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn read_full(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, DataFolder) {
        let folder = tempfile::tempdir().unwrap();
        let data = DataFolder::open(&folder.path().join("1"), Ino(1)).unwrap();
        (folder, data)
    }

    /// A file of 100 granules with two runs written, the second without its bytes, as after a lost machine.
    fn marked(data: &DataFolder, ino: Ino) {
        assert!(data.create_ranged(ino, 100 * GRANULE).unwrap(), "the host's filesystem doesn't tell of holes");
        let map = data.map(ino).unwrap();
        data.file(ino).unwrap().write_all_at(&[7; 3 * GRANULE as usize], 5 * GRANULE).unwrap();
        data.mark(ino, &map, 5..8).unwrap();
        data.mark(ino, &map, 20..30).unwrap();
    }

    #[test]
    fn a_map_file_is_exact_until_the_machine_starts_anew() {
        let (_folder, data) = folder();
        let ino = Ino(0x1f);
        marked(&data, ino);
        assert!(!data.load_map(ino, Vec::new()).unwrap().is_outdated);
        let map = data.map(ino).unwrap();
        assert!(map.has(&(5..8)) && map.has(&(20..30)) && map.count() == 13);
        assert_eq!(map.unsaved().len(), 1);
    }

    #[test]
    fn a_map_file_goes_with_its_data_file() {
        let (folder, data) = folder();
        let ino = Ino(0x1f);
        marked(&data, ino);
        let (file, map) = (folder.path().join("1/1f"), folder.path().join("1/1f.map"));
        data.let_go(ino);
        assert!(data.map(ino).is_none() && file.exists() && map.exists());
        data.unlink(ino);
        assert!(!file.exists() && !map.exists());
        marked(&data, ino);
        assert_eq!(data.map(ino).unwrap().count(), 13);
        data.remove(ino);
        assert!(!file.exists() && !map.exists());
    }

    #[test]
    fn after_a_new_start_only_bytes_that_are_there_count() {
        let (folder, data) = folder();
        let ino = Ino(0x1f);
        marked(&data, ino);
        let path = folder.path().join("1/1f.map");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&header(Some([b'x'; 36])), 0).unwrap();
        // Of the rows it is known that the data was there first, or that there is none.
        let rows = RangeMap::default();
        rows.add(40..42);
        let rows = rows.unsaved();
        assert!(data.load_map(ino, rows).unwrap().is_outdated);
        let map = data.map(ino).unwrap();
        assert!(map.has(&(5..8)) && map.has(&(40..42)) && map.count() == 5, "{map:?}");
    }

    #[test]
    fn golden_map_file() {
        let (folder, data) = folder();
        marked(&data, Ino(0x1f));
        let bytes = std::fs::read(folder.path().join("1/1f.map")).unwrap();
        assert_eq!(&bytes[..12], b"LAYERMAP\x01\0\0\0");
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap();
        assert_eq!(bytes[12..48], boot[..36]);
        assert!(bytes[48..4096].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[4096..], (0b111u64 << 5 | 0x3ff << 20).to_le_bytes());
        assert_eq!((data.inos().unwrap(), data.map_inos().unwrap()), (vec![Ino(0x1f)], vec![Ino(0x1f)]));
    }

    #[test]
    fn damaged_map_files_are_refused_and_short_ones_are_new() {
        let (folder, data) = folder();
        marked(&data, Ino(1));
        let path = folder.path().join("1/1.map");
        std::fs::write(&path, [9; 5000]).unwrap();
        assert!(data.load_map(Ino(1), Vec::new()).is_err());
        std::fs::write(&path, b"LAYER").unwrap();
        assert!(!data.load_map(Ino(1), Vec::new()).unwrap().is_outdated);
    }
}
