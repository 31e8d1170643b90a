//! Warm copies: plain copies of large sealed files, `<inode, hexadecimal>.warm` beside an upper's data files.
//!
//! Hides where they lie and whether they are there still. What lets the kernel read such a file past us is this copy of its bytes, until it
//! is in nobody's way to make it the data file. Invariants: while there is a copy of an inode its bytes are sealed ones and are the copy's, so whoever
//! changes them takes the copy away first, or makes it the data file; a copy in use stays. None is durable: an upper
//! that is opened has only those that programs have open.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags};

use super::data::{DataFolder, file_name, is_alone};
use super::growing::{self, Growing};
use crate::chunk::ChunkRead;
use crate::content::{Content, Extent, Extents, get_sized};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::store::Store;
use crate::store::spare::{Room, SpareId};

/// So much is written at once.
const PIECE_BYTES: u64 = 4 << 20;
/// One part in so many of the filesystem stays free.
const FREE_PART: u64 = 10;
const SUFFIX: &str = ".warm";

fn name_of(ino: Ino) -> String {
    format!("{}{SUFFIX}", file_name(ino))
}

/// Whether a file beside an upper's data files is a warm copy, by its name.
pub(super) fn is_name(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().ends_with(SUFFIX.as_bytes())
}

/// The warm copies of one upper.
#[derive(Debug)]
pub struct WarmCopies {
    store: Arc<Store>,
    folder: Arc<OwnedFd>,
    path: PathBuf,
    copies: Mutex<HashMap<Ino, SpareId>>,
    /// Whose copy the disk has failed to take. A second sync would tell of nothing, so it never becomes a data file.
    lost: Mutex<HashSet<Ino>>,
}

/// A copy that nobody knows yet.
#[derive(Debug)]
pub struct Made {
    pub(super) file: Arc<File>,
    pub(super) room: Room,
}

impl WarmCopies {
    /// Those beside the data files of `data`. Copies that a user before left are removed, but for those of `in_use`.
    pub(super) fn open(store: &Arc<Store>, data: &DataFolder, in_use: &[Ino]) -> Result<WarmCopies> {
        let path = data.path().to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&data.folder, ".", flags, Mode::empty());
        let folder = Arc::new(folder.map_err(|errno| Error::file("open", &path, errno))?);
        let copies =
            WarmCopies { store: store.clone(), folder, path, copies: Mutex::default(), lost: Mutex::default() };
        for ino in data.numbers(|name| name.strip_suffix(SUFFIX))? {
            if in_use.contains(&ino) {
                copies.find(ino)?;
            } else {
                (copies.remover(ino))();
            }
        }
        Ok(copies)
    }

    /// Goes on with the copy of `ino`, which programs have open.
    fn find(&self, ino: Ino) -> Result<()> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&*self.folder, name_of(ino), flags, Mode::empty());
        let file = File::from(opened.map_err(|errno| self.failed("open", ino, errno))?);
        let bytes = file.metadata().map_err(|error| self.failed("stat", ino, error))?.len();
        let id = self.store.spares().found(Arc::new(file), bytes, self.remover(ino));
        self.copies.lock().insert(ino, id);
        Ok(())
    }

    fn failed(&self, action: &'static str, ino: Ino, source: impl Into<std::io::Error>) -> Error {
        Error::file(action, self.path.join(name_of(ino)), source)
    }

    /// What takes away the name of the copy of `ino`.
    fn remover(&self, ino: Ino) -> impl FnOnce() + Send + 'static {
        let folder = self.folder.clone();
        move || match rustix::fs::unlinkat(&*folder, name_of(ino), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => tracing::warn!(%ino, %errno, "cannot remove a warm copy"),
        }
    }

    fn id(&self, ino: Ino) -> Option<SpareId> {
        self.copies.lock().get(&ino).copied()
    }

    /// Whether there may be any.
    pub fn is_on(&self) -> bool {
        self.store.spares().is_on()
    }

    /// Whether there is a copy of `ino`, or was one a moment ago.
    pub fn may_be_there(&self, ino: Ino) -> bool {
        self.id(ino).is_some()
    }

    /// Whether there are any, as far as is known.
    pub fn are_there(&self) -> bool {
        !self.copies.lock().is_empty()
    }

    /// What they take of the disk, in bytes.
    pub fn bytes(&self) -> u64 {
        let ids: Vec<SpareId> = self.copies.lock().values().copied().collect();
        self.store.spares().bytes_of(ids.into_iter())
    }

    /// Writes a copy of `content`, as long as `goes_on` says so. None if there is no room for it.
    ///
    /// # Errors
    /// Those of the disk and of `chunks`; nothing is left then.
    pub fn make(&self, chunks: &dyn ChunkRead, content: &Content, goes_on: impl Fn() -> bool) -> Result<Option<Made>> {
        if !self.leaves_free(content.data_bytes()).map_err(|errno| self.not_written(errno))? {
            return Ok(None);
        }
        let Some(room) = self.store.spares().room(content.len()) else { return Ok(None) };
        let file = self.new_file(content)?;
        let mut pieces = Pieces { file: &file, at: 0, bytes: Vec::with_capacity(PIECE_BYTES as usize) };
        for next in Extents::new(chunks, content, 0)? {
            if !goes_on() {
                return Ok(None);
            }
            let (offset, extent) = next?;
            if let Extent::Chunk { id, bytes } = extent {
                let put = pieces.put(offset, &get_sized(chunks, &id, bytes)?);
                put.map_err(|error| self.not_written(error))?;
            }
        }
        pieces.write().map_err(|error| self.not_written(error))?;
        Ok(Some(Made { file: Arc::new(file), room }))
    }

    /// Begins a copy of `content` on trial. None if memory or the disk has no room for it.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn grow(&self, content: &Content) -> Result<Option<Growing>> {
        if !self.leaves_free(content.data_bytes()).map_err(|errno| self.not_written(errno))? {
            return Ok(None);
        }
        let Some(room) = self.store.spares().room_on_trial(content.len(), growing::most_bytes()) else {
            return Ok(None);
        };
        Ok(Some(Growing::new(self.new_file(content)?, content, room)))
    }

    /// Copies on trial that nobody came to read go when their time is over.
    pub fn end_trials(&self) {
        self.store.spares().end_trials();
    }

    /// A file without a name, as long as `content`.
    fn new_file(&self, content: &Content) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&*self.folder, ".", flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(opened.map_err(|errno| self.not_written(errno))?);
        file.set_len(content.len()).map_err(|error| self.not_written(error))?;
        Ok(file)
    }

    fn not_written(&self, source: impl Into<std::io::Error>) -> Error {
        Error::file("write a warm copy in", &self.path, source)
    }

    /// Whether the part of the filesystem that copies leave free is free still when another `bytes` are taken.
    fn leaves_free(&self, bytes: u64) -> rustix::io::Result<bool> {
        let space = rustix::fs::fstatvfs(&*self.folder)?;
        let least = bytes.saturating_add(space.f_blocks.saturating_mul(space.f_frsize) / FREE_PART);
        Ok(space.f_bavail.saturating_mul(space.f_frsize) >= least)
    }

    /// Others have filled the disk: copies that nobody uses go until a part of it is free, the least recently used first; those of the
    /// store's other uppers too.
    pub fn keep_free(&self) {
        let spares = self.store.spares();
        while spares.has_idle() && self.leaves_free(0) == Ok(false) && spares.remove_oldest() {}
    }

    /// There is no room: all copies go that nobody uses. False if there are none.
    pub fn make_room(&self) -> bool {
        let spares = self.store.spares();
        let mut has_made = false;
        while spares.remove_oldest() {
            has_made = true;
        }
        has_made
    }

    /// From now on `made` is the copy of `ino`, whose stripe is held.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn put(&self, ino: Ino, made: Made) -> Result<()> {
        if !self.remove_idle(ino) {
            return Ok(());
        }
        let link = || rustix::fs::linkat(&*made.file, "", &*self.folder, name_of(ino), AtFlags::EMPTY_PATH);
        link().map_err(|errno| self.failed("create", ino, errno))?;
        let id = self.store.spares().put(made.room, made.file, self.remover(ino));
        self.copies.lock().insert(ino, id);
        Ok(())
    }

    /// The copy of `ino`, from now on in use; none if there is none.
    pub fn begin_use(&self, ino: Ino) -> Option<Arc<File>> {
        if self.is_lost(ino) {
            self.remove_idle(ino);
        }
        let id = self.id(ino)?;
        let file = self.store.spares().begin_use(id);
        if file.is_none() {
            let mut copies = self.copies.lock();
            if copies.get(&ino) == Some(&id) {
                copies.remove(&ino);
            }
        }
        file
    }

    /// Nobody has the copy of `ino` open or mapped any more.
    pub fn end_use(&self, ino: Ino) {
        if let Some(id) = self.id(ino) {
            self.store.spares().end_use(id);
        }
    }

    /// Whether nobody but us has the copy of `ino` open or mapped.
    pub fn is_ours_alone(&self, ino: Ino) -> bool {
        let used = self.id(ino).and_then(|id| self.store.spares().used(id));
        used.is_none_or(|file| is_alone(&file))
    }

    /// Removes the copy of `ino`, if there is one. False if it is in use: it stays.
    pub fn remove_idle(&self, ino: Ino) -> bool {
        let Some(id) = self.id(ino) else { return true };
        let is_gone = self.store.spares().remove_idle(id);
        if is_gone {
            self.copies.lock().remove(&ino);
            self.lost.lock().remove(&ino);
        }
        is_gone
    }

    fn is_lost(&self, ino: Ino) -> bool {
        self.lost.lock().contains(&ino)
    }

    /// Gives the copy of `ino`, whose stripe is held and which is in use, a second name: the data file's. It is durable then. None if there is no
    /// copy.
    ///
    /// # Errors
    /// Those of the disk; there is no data file then.
    pub(super) fn link_as(&self, ino: Ino, name: &str) -> Result<Option<Arc<File>>> {
        let Some(file) = self.id(ino).and_then(|id| self.store.spares().used(id)) else { return Ok(None) };
        if self.is_lost(ino) || file.sync_data().is_err() {
            self.lost.lock().insert(ino);
            // Not told as a lack of room: then it would be tried again.
            return Err(self.failed("sync", ino, std::io::Error::from_raw_os_error(libc::EIO)));
        }
        match rustix::fs::unlinkat(&*self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(self.failed("link", ino, errno)),
        }
        let linked = rustix::fs::linkat(&*self.folder, name_of(ino), &*self.folder, name, AtFlags::empty());
        linked.map_err(|errno| self.failed("link", ino, errno))?;
        Ok(Some(file))
    }

    /// The copy of `ino` has become something else: its name goes.
    pub fn has_become_data(&self, ino: Ino) {
        if let Some(id) = self.copies.lock().remove(&ino) {
            self.store.spares().give_up(id);
            (self.remover(ino))();
        }
    }
}

impl Drop for WarmCopies {
    /// Programs may go on with those in use, by the next daemon.
    fn drop(&mut self) {
        for (_, id) in self.copies.lock().drain() {
            if !self.store.spares().remove_idle(id) {
                self.store.spares().give_up(id);
            }
        }
    }
}

/// What is written to a file in order, in pieces that begin and end at multiples of their size, as the kernel then keeps it in large folios:
/// written chunk by chunk a file was read at 0.8 of the rate.
struct Pieces<'f> {
    file: &'f File,
    /// Where `bytes` go.
    at: u64,
    bytes: Vec<u8>,
}

impl Pieces<'_> {
    fn put(&mut self, mut offset: u64, mut bytes: &[u8]) -> std::io::Result<()> {
        if offset != self.at + self.bytes.len() as u64 {
            self.write()?;
            self.at = offset;
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min((PIECE_BYTES - offset % PIECE_BYTES) as usize));
            self.bytes.extend_from_slice(now);
            offset += now.len() as u64;
            bytes = later;
            if offset.is_multiple_of(PIECE_BYTES) {
                self.write()?;
            }
        }
        Ok(())
    }

    /// Writes what there is. Never more than two pieces wait for the disk: others have to write too.
    fn write(&mut self) -> std::io::Result<()> {
        self.file.write_all_at(&self.bytes, self.at)?;
        let end = self.at + self.bytes.len() as u64;
        write_out(self.file, self.at.saturating_sub(PIECE_BYTES)..self.at, true);
        write_out(self.file, self.at..end, false);
        self.at = end;
        self.bytes.clear();
        Ok(())
    }
}

/// Has the disk take `range` of `file`; waits for it if `wait`. Only so that it is done early: errors come back with the sync.
fn write_out(file: &File, range: Range<u64>, wait: bool) {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let flags = if wait { all } else { libc::SYNC_FILE_RANGE_WRITE };
    let (offset, bytes) = (range.start as i64, (range.end - range.start) as i64);
    if bytes > 0 {
        // SAFETY: a plain system call on a descriptor that is open.
        #[allow(unsafe_code)]
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), offset, bytes, flags);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    #[test]
    fn pieces_are_where_they_belong() {
        let file = tempfile::tempfile().unwrap();
        let mut expected = vec![0; 20 << 20];
        let mut pieces = Pieces { file: &file, at: 0, bytes: Vec::new() };
        let (mut offset, mut number) = (0, 0usize);
        while offset + (5 << 20) < expected.len() {
            number += 1;
            // Of all lengths, also longer than a piece, and holes between some.
            let bytes = vec![number as u8; 1 + number * 977_777 % (5 << 20)];
            pieces.put(offset as u64, &bytes).unwrap();
            assert!(pieces.bytes.len() < PIECE_BYTES as usize);
            expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
            offset += bytes.len() + if number % 3 == 0 { 1_234_567 } else { 0 };
        }
        pieces.write().unwrap();
        let end = expected.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let mut written = vec![1; end];
        file.read_exact_at(&mut written, 0).unwrap();
        assert!(written == expected[..end] && number > 4, "{number}");
        assert_eq!(file.metadata().unwrap().len(), end as u64);
    }

    /// A copy of inode 7 that somebody reads, made of `bytes`.
    fn in_use(copies: &WarmCopies, bytes: &[u8]) -> Arc<File> {
        let room = copies.store.spares().room(bytes.len() as u64).unwrap();
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        let file = File::from(rustix::fs::openat(&*copies.folder, ".", flags, Mode::RUSR).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        copies.put(Ino(7), Made { file: Arc::new(file), room }).unwrap();
        copies.begin_use(Ino(7)).unwrap()
    }

    #[test]
    fn what_the_disk_has_lost_never_becomes_a_data_file() {
        let folder = tempfile::tempdir().unwrap();
        let options = StoreOptions { warm_bytes: 1 << 20, ..StoreOptions::create() };
        let store = Store::open(&folder.path().join("store"), options).unwrap();
        let data = DataFolder::open(&folder.path().join("data"), Ino(1)).unwrap();
        let copies = WarmCopies::open(&store, &data, &[]).unwrap();
        let has = |name: &str| folder.path().join("data").join(name).exists();

        drop(in_use(&copies, b"whole"));
        assert!(data.adopt(Ino(7), &copies).unwrap() && has("7"));
        copies.has_become_data(Ino(7));
        data.remove(Ino(7));

        // As after a sync that failed.
        drop(in_use(&copies, b"lost"));
        copies.lost.lock().insert(Ino(7));
        for _ in 0..2 {
            let error = data.adopt(Ino(7), &copies).unwrap_err();
            assert_eq!(error.errno(), libc::EIO);
            assert!(!has("7") && has("7.warm"));
        }
        // Those who read it already go on; nobody begins to when they have gone, and another may come.
        assert!(copies.begin_use(Ino(7)).is_some());
        copies.end_use(Ino(7));
        assert!(copies.begin_use(Ino(7)).is_none() && !has("7.warm"));
        drop(in_use(&copies, b"anew"));
        assert!(data.adopt(Ino(7), &copies).unwrap() && has("7"));
    }
}
