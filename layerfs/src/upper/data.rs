//! The data files of an upper: plain files `<store>/uppers/<upper>/<inode, hexadecimal>` on the host's filesystem.
//!
//! Hides how many descriptors are open; files that were copied up by range have more in [`super::ranged`]. Invariants: no
//! descriptor is kept for an inode beyond bounded caches; a data file that came from a sealed file is synced before a row
//! refers to it, so that a crash of the machine can't replace old bytes by none; holes stay holes.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom};

use crate::attr::Time;
use crate::chunk::ChunkRead;
use crate::content::{Content, Extent, Extents, get_sized};
use crate::error::{Error, ErrorClass, Result};
use crate::id::Ino;
use crate::store::db::Debtor;
use crate::upper::promises::Promises;
use crate::upper::ranges::RangeMap;
use crate::upper::table::Stamp;
use crate::upper::warm::WarmCopies;

/// The most data files that an upper keeps open.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::new(512).unwrap();
/// The most map files that it keeps open.
const OPEN_MAPS_MAX: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// So many files are made durable one by one, each in a commit of the host's filesystem's journal; more all at once, with what else there
/// is.
const PAID_SINGLY: usize = 64;

/// Chooses the signal for a lease that is broken. Not in `libc` for all platforms.
const F_SETSIG: i32 = 10;

/// What `stat` tells of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataStat {
    /// Its length in bytes.
    pub bytes: u64,
    /// What it allocates, in units of 512 bytes.
    pub blocks: u64,
    /// Its `st_mtime`.
    pub mtime: Time,
}

/// The folder with an upper's data files, locked against a second user.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    pub(super) folder: OwnedFd,
    open: Mutex<LruCache<Ino, Arc<File>>>,
    pub(super) open_maps: Mutex<LruCache<Ino, Arc<File>>>,
    /// Of the files that were copied up by range.
    pub(super) maps: RwLock<HashMap<Ino, Arc<RangeMap>>>,
    /// Maps whose files go with their data files.
    pub(super) maps_let_go: Mutex<HashSet<Ino>>,
    /// Of the files that others write to past us: the data file's stamp that the tables go by.
    known: RwLock<HashMap<Ino, Stamp>>,
    /// Data files were created since the folder was last synced.
    created: AtomicBool,
    syncing: Mutex<()>,
    promises: Promises,
    /// Shared by those who unlink data files, which takes as long as they are large.
    unlinking: RwLock<()>,
}

pub(super) fn file_name(ino: Ino) -> String {
    format!("{:x}", ino.0)
}

impl Drop for DataFolder {
    /// A child that is just being started shares the descriptor, and with it the lock, until it runs its program.
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.folder, FlockOperation::Unlock);
    }
}

impl DataFolder {
    /// Opens the folder at `path`, which is made if it isn't there. `next` is the number of the next new inode.
    ///
    /// # Errors
    /// [`Error::Busy`] if another mount uses it.
    pub fn open(path: &Path, next: Ino) -> Result<DataFolder> {
        let failed = |action, errno: rustix::io::Errno| Error::file(action, path, errno);
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) => crate::durable::sync_parent(path)?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(failed("create", errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed("open", e))?;
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::Busy("the upper is in use by another mount; unmount that first".to_owned()));
            }
            Err(errno) => return Err(failed("lock", errno)),
        }
        Ok(DataFolder {
            path: path.to_owned(),
            folder,
            open: Mutex::new(LruCache::new(OPEN_MAX)),
            open_maps: Mutex::new(LruCache::new(OPEN_MAPS_MAX)),
            maps: RwLock::default(),
            maps_let_go: Mutex::default(),
            known: RwLock::default(),
            // A daemon that died may have made some.
            created: AtomicBool::new(true),
            syncing: Mutex::new(()),
            promises: Promises::new(next),
            unlinking: RwLock::default(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn failed(&self, action: &'static str, ino: Ino, source: impl Into<std::io::Error>) -> Error {
        Error::file(action, self.path.join(file_name(ino)), source)
    }

    /// The data file of `ino`.
    ///
    /// The lock is held while it is opened: else a seal and a new copy-up could come in between, and the descriptor of
    /// the removed file would take the place of the new one's, and its writes.
    pub fn file(&self, ino: Ino) -> Result<Arc<File>> {
        let mut open = self.open.lock();
        if let Some(file) = open.get(&ino) {
            return Ok(file.clone());
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&self.folder, file_name(ino), flags, Mode::empty());
        let file = Arc::new(File::from(opened.map_err(|e| self.failed("open", ino, e))?));
        open.put(ino, file.clone());
        Ok(file)
    }

    /// The data file of `ino` through a descriptor of its own, for reading all of it, and its path for messages.
    pub fn reader(&self, ino: Ino) -> Result<(File, PathBuf)> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&self.folder, file_name(ino), flags, Mode::empty());
        Ok((File::from(opened.map_err(|e| self.failed("open", ino, e))?), self.path.join(file_name(ino))))
    }

    /// Makes the data file of `ino`, with the first `limit` bytes of `content`, and syncs it if that is anything.
    ///
    /// # Errors
    /// Those of the disk and of `chunks`; no file is left then.
    pub fn create(&self, ino: Ino, chunks: &dyn ChunkRead, content: &Content, limit: u64) -> Result<Arc<File>> {
        let file = self.create_empty(ino)?;
        match self.fill(&file, ino, chunks, content, limit) {
            Ok(()) => {
                let file = Arc::new(file);
                self.keep_open(ino, file.clone());
                Ok(file)
            }
            Err(error) => {
                self.remove(ino);
                Err(error)
            }
        }
    }

    pub(super) fn create_empty(&self, ino: Ino) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOATIME;
        let opened = rustix::fs::openat(&self.folder, file_name(ino), flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(opened.map_err(|e| self.failed("create", ino, e))?);
        self.created.store(true, Ordering::Release);
        Ok(file)
    }

    pub(super) fn keep_open(&self, ino: Ino, file: Arc<File>) {
        self.open.lock().put(ino, file);
    }

    fn fill(&self, file: &File, ino: Ino, chunks: &dyn ChunkRead, content: &Content, limit: u64) -> Result<()> {
        let limit = limit.min(content.len());
        if limit == 0 {
            return Ok(());
        }
        let wrote = |result: std::io::Result<()>| result.map_err(|e| self.failed("write", ino, e));
        wrote(file.set_len(limit))?;
        if let Content::Inline(bytes) = content {
            wrote(file.write_all_at(&bytes[..limit as usize], 0))?;
        } else {
            for next in Extents::new(chunks, content, 0)? {
                let (offset, extent) = next?;
                if offset >= limit {
                    break;
                }
                if let Extent::Chunk { id, bytes } = extent {
                    let plain = get_sized(chunks, &id, bytes)?;
                    let count = plain.len().min((limit - offset) as usize);
                    wrote(file.write_all_at(&plain[..count], offset))?;
                }
            }
        }
        file.sync_data().map_err(|e| self.failed("sync", ino, e))
    }

    /// Removes the data file of `ino`, if there is one: no row that a lost machine may bring back needs it. A failure leaves a file that the
    /// next opening removes.
    pub fn remove(&self, ino: Ino) {
        self.let_go(ino);
        self.unlink(ino);
    }

    /// Forgets all that is known of the data file of `ino`, which stays until [`DataFolder::unlink`], and its map file with it: a row that
    /// a lost machine brings back needs both.
    pub(super) fn let_go(&self, ino: Ino) {
        self.let_map_go(ino);
        self.unknow(ino);
        self.promises.gone(ino);
        self.open.lock().pop(&ino);
    }

    /// Removes a data file that was let go.
    pub(super) fn unlink(&self, ino: Ino) {
        self.open.lock().pop(&ino);
        let _unlinking = self.unlinking.read();
        match rustix::fs::unlinkat(&self.folder, file_name(ino), AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => tracing::warn!(%ino, %errno, "cannot remove a data file"),
        }
        self.unlink_map(ino);
        // Somebody may have opened it meanwhile.
        self.open.lock().pop(&ino);
    }

    /// Waits until those are gone that are just being removed.
    pub(super) fn await_unlinks(&self) {
        drop(self.unlinking.write());
    }

    /// What `stat` tells of the data file of `ino`.
    pub fn stat(&self, ino: Ino) -> Result<DataStat> {
        let stat = match self.open.lock().peek(&ino) {
            Some(file) => rustix::fs::fstat(file),
            None => rustix::fs::statat(&self.folder, file_name(ino), AtFlags::SYMLINK_NOFOLLOW),
        };
        let stat = stat.map_err(|e| self.failed("stat", ino, e))?;
        Ok(DataStat {
            bytes: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            mtime: Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
        })
    }

    /// The stamp that goes with what the tables say of `ino`: the data file's, unless others write to it past us.
    pub fn stamp(&self, ino: Ino) -> Result<Stamp> {
        if let Some(known) = self.known(ino) {
            return Ok(known);
        }
        let stat = self.stat(ino)?;
        Ok(Stamp { bytes: stat.bytes, mtime: stat.mtime })
    }

    /// The stamp of `ino` that the tables go by, if others write to it past us.
    pub fn known(&self, ino: Ino) -> Option<Stamp> {
        let known = self.known.read();
        if known.is_empty() { None } else { known.get(&ino).copied() }
    }

    /// The tables go by `stamp`, and others write to `ino` past us.
    pub fn know(&self, ino: Ino, stamp: Stamp) {
        self.known.write().insert(ino, stamp);
    }

    /// Nobody writes to `ino` past us any more.
    pub fn unknow(&self, ino: Ino) {
        if self.known(ino).is_some() {
            self.known.write().remove(&ino);
        }
    }

    /// The files that others write to past us.
    pub fn all_known(&self) -> Vec<Ino> {
        self.known.read().keys().copied().collect()
    }

    /// Whether nobody but us has the data file of `ino` open or mapped.
    pub fn is_ours_alone(&self, ino: Ino) -> bool {
        self.file(ino).map_or(true, |file| is_alone(&file))
    }

    /// Whether somebody else surely has the data file of `ino` open or mapped.
    pub fn is_others_too(&self, ino: Ino) -> bool {
        self.file(ino).is_ok_and(|file| lease(&file).is_err_and(|error| error.kind() == ErrorKind::WouldBlock))
    }

    /// Makes the warm copy of `ino`, which is in use, its data file too, and durable that there is such a file: no sync of another
    /// file need carry a second name along. False if there is no such copy.
    ///
    /// # Errors
    /// Those of the disk; there is no data file then.
    pub fn adopt(&self, ino: Ino, copies: &WarmCopies) -> Result<bool> {
        let Some(file) = copies.link_as(ino, &file_name(ino))? else { return Ok(false) };
        self.created.store(true, Ordering::Release);
        self.keep_open(ino, file);
        self.sync_folder().inspect_err(|_| self.remove(ino))?;
        Ok(true)
    }

    /// Starts to write what programs have mapped of `ino`, and waits for it: later stores change the file's times again.
    pub fn write_back(&self, ino: Ino) -> Result<()> {
        // An error is told once for each descriptor. That of `sync` stays for those who sync, who are told what was lost since it was
        // opened: so it is opened first.
        let _synced = self.file(ino)?;
        let (file, _) = self.reader(ino)?;
        let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        // SAFETY: a plain system call on a descriptor that is open.
        #[allow(unsafe_code)]
        let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
        if result == 0 { Ok(()) } else { Err(self.failed("write", ino, std::io::Error::last_os_error())) }
    }

    /// Makes the bytes of `ino` durable, and that there is such a file.
    pub fn sync(&self, ino: Ino) -> Result<()> {
        let (file, stamp) = (self.file(ino)?, self.stamp_now(ino)?);
        file.sync_data().map_err(|e| self.failed("sync", ino, e))?;
        self.promises.keep(ino, Some(stamp));
        self.sync_folder()
    }

    fn stamp_now(&self, ino: Ino) -> Result<Stamp> {
        let stat = self.stat(ino)?;
        Ok(Stamp { bytes: stat.bytes, mtime: stat.mtime })
    }

    /// What this upper has promised of its data files.
    pub(super) fn promises(&self) -> &Promises {
        &self.promises
    }

    /// Somebody counts on the bytes of `ino` from now on: the kernel makes them durable without telling us, or another takes its place.
    pub fn is_counted_on(&self, ino: Ino) {
        self.promises.keep(ino, None);
    }

    /// A name that had another file's bytes is about to have those of `ino`: each sync that begins from here on makes them durable before the
    /// name. Returns whether they may have to be written; if so, [`DataFolder::begin_write_back`] is to be called once there is the name, for
    /// a sync that is under way may take the name along.
    pub fn owe(&self, ino: Ino) -> bool {
        let synced = self.promises.synced(ino);
        let is_clean = synced.is_some_and(|synced| self.stamp_now(ino).is_ok_and(|now| now == synced));
        if !is_clean {
            self.promises.owe(ino);
        }
        !is_clean
    }

    /// Has the bytes of `ino` written, as they are now, without waiting for it.
    pub fn begin_write_back(&self, ino: Ino) {
        if let Ok(file) = self.file(ino) {
            // SAFETY: a plain system call on a descriptor that is open.
            #[allow(unsafe_code)]
            unsafe {
                libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE);
            }
        }
    }

    /// `ino` had bytes and has none now.
    pub fn was_emptied(&self, ino: Ino) {
        self.promises.emptied(ino);
    }

    /// Somebody who wrote to `ino` has closed it. Returns whether it was emptied before: then what it has now is owed, as after
    /// [`DataFolder::owe`].
    pub fn is_refilled(&self, ino: Ino) -> bool {
        self.promises.take_emptied(ino) && self.owe(ino)
    }

    /// Makes durable which data files there are.
    pub fn sync_folder(&self) -> Result<()> {
        // Who finds nothing to do has waited for whoever does it.
        let _syncing = self.syncing.lock();
        if self.created.swap(false, Ordering::AcqRel)
            && let Err(errno) = rustix::fs::fsync(&self.folder)
        {
            self.created.store(true, Ordering::Release);
            return Err(Error::file("sync", &self.path, errno));
        }
        Ok(())
    }

    /// Changes the length of `ino`'s data file.
    pub fn set_len(&self, ino: Ino, bytes: u64) -> Result<()> {
        self.file(ino)?.set_len(bytes).map_err(|e| self.failed("truncate", ino, e))
    }

    /// `fallocate` with the raw mode bits of Linux.
    pub fn allocate(&self, ino: Ino, mode: i32, offset: u64, bytes: u64) -> Result<()> {
        let flags = FallocateFlags::from_bits_retain(mode as u32);
        rustix::fs::fallocate(&*self.file(ino)?, flags, offset, bytes).map_err(|e| self.failed("allocate", ino, e))
    }

    /// The blocks of `ino`'s data file, and where its data is, if it has holes.
    pub fn layout(&self, ino: Ino) -> Result<(u64, Option<Vec<Range<u64>>>)> {
        let stat = self.stat(ino)?;
        if stat.blocks * 512 >= stat.bytes {
            return Ok((stat.blocks, None));
        }
        let file = self.file(ino)?;
        let (mut ranges, mut at) = (Vec::new(), 0);
        while let Ok(start) = rustix::fs::seek(&*file, SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&*file, SeekFrom::Hole(start)).map_err(|e| self.failed("seek", ino, e))?;
            ranges.push(start..end);
            at = end;
        }
        Ok((stat.blocks, Some(ranges)))
    }

    /// The numbers of all data files.
    pub fn inos(&self) -> Result<Vec<Ino>> {
        self.numbers(|name| Some(name))
    }

    /// The numbers in those names of the folder that `digits` finds digits in.
    pub(super) fn numbers(&self, digits: impl Fn(&str) -> Option<&str>) -> Result<Vec<Ino>> {
        let failed = |e: rustix::io::Errno| Error::file("list", &self.path, e);
        let mut inos = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_str().unwrap_or_default();
            inos.extend(digits(name).and_then(|digits| u64::from_str_radix(digits, 16).ok()).map(Ino));
        }
        Ok(inos)
    }

    /// What all data files allocate, in bytes.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let inos = self.inos()?;
        Ok(inos.into_iter().filter_map(|ino| self.stat(ino).ok()).map(|stat| stat.blocks * 512).sum())
    }

    /// The host filesystem's figures, for `statfs`.
    pub fn space(&self) -> Result<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(&self.folder).map_err(|e| Error::file("stat", &self.path, e))
    }
}

impl Debtor for DataFolder {
    /// Makes durable what is owed. What can't be written is told to whoever syncs that file.
    fn pay(&self) {
        let (owed, owes_more) = self.promises.take_owed();
        if owes_more || owed.len() > PAID_SINGLY {
            // The stamps first: what is written meanwhile may not be among it.
            let stamps: Vec<_> = owed.iter().filter_map(|ino| Some((*ino, self.stamp_now(*ino).ok()?))).collect();
            match rustix::fs::syncfs(&self.folder) {
                Ok(()) => return stamps.into_iter().for_each(|(ino, stamp)| self.promises.keep(ino, Some(stamp))),
                Err(errno) => {
                    tracing::warn!(%errno, "the filesystem below could not be synced: its files are, one by one");
                    if owes_more {
                        self.promises.owe_more();
                    }
                }
            }
        }
        for ino in owed {
            // As in `write_back`: the error stays for those who sync.
            let synced = self.file(ino).and_then(|_| {
                let (stamp, (file, _)) = (self.stamp_now(ino)?, self.reader(ino)?);
                file.sync_data().map_err(|e| self.failed("sync", ino, e))?;
                Ok(stamp)
            });
            match synced {
                Ok(stamp) => self.promises.keep(ino, Some(stamp)),
                Err(error) if error.class() == ErrorClass::NotFound => {}
                Err(error) => {
                    tracing::warn!(%ino, %error, "a file that took another's place could not be written");
                    self.promises.owe(ino);
                }
            }
        }
    }
}

/// Whether nobody has `file` open or mapped but by this descriptor. That a lease can be had says so; whoever would break it waits for
/// us to answer first.
pub(super) fn is_alone(file: &File) -> bool {
    lease(file).is_ok()
}

/// Takes a lease on `file`, and gives it back.
fn lease(file: &File) -> std::io::Result<()> {
    let control = |command, argument: i32| {
        // SAFETY: these requests take a number, and change only how the open file behaves.
        #[allow(unsafe_code)]
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // Rather than the signal that ends a process: this one is ignored.
    let taken = control(F_SETSIG, libc::SIGURG).and_then(|()| control(libc::F_SETLEASE, libc::F_WRLCK));
    let _ = control(libc::F_SETLEASE, libc::F_UNLCK);
    taken
}

/// Removes the data files of an upper that nobody uses, and their folder.
pub fn remove_folder(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::file("remove", path, e)),
    }
}
