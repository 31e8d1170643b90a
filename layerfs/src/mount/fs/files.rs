//! The data of regular files: reading, writing, copy-up.
//!
//! Invariant: whoever changes a file's data holds its stripe. A reader holds nothing but the data file, which it gets while the tables
//! say that there is one: a seal that takes it away afterwards leaves it as it was.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::super::caller::Caller;
use super::super::errno::{Errno, FsResult, fail};
use super::super::watch::Op;
use super::attrs::{clear_foreign_sgid, clear_privileges};
use super::edit::Edit;
use super::opens::IsWarm;
use super::ranges::{Ranged, seek_file};
use super::{Fs, State};
use crate::attr::Time;
use crate::chunker::Chunker;
use crate::content::{Content, Extent, Extents};
use crate::error::ErrorClass;
use crate::id::Ino;
use crate::inode::Node;
use crate::patience;
use crate::readahead::FileReader;
use crate::upper::Upper;
use crate::upper::opens::Backing;
use crate::upper::table::Backed;

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// How many bytes it wrote.
    pub bytes: usize,
    /// Whether it cleared setuid, setgid or capabilities: what the kernel has cached of the inode is wrong then.
    pub cleared_privileges: bool,
    /// Why they were no more, if they were fewer than asked for.
    pub failure: Option<Errno>,
}

/// What was put into a file.
pub(super) struct Put {
    /// How many bytes.
    pub bytes: usize,
    /// Where they end.
    pub end: u64,
    /// Why they were no more, if they were fewer than given.
    pub failure: Option<Errno>,
}

/// Where a file's bytes are.
enum Source {
    /// In its data file.
    Backed(Arc<File>),
    /// In its data file where that has them, else below.
    Ranged(Ranged),
    /// Below.
    Sealed(Arc<FileReader>),
}

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const COPY_BYTES: usize = 1 << 20;

impl Fs {
    fn source(&self, state: &State, ino: Ino) -> FsResult<Source> {
        let above = state.tables.inode(ino);
        if let Some(backed) = above.and_then(|inode| inode.backed) {
            let data = self.writable_upper()?.data();
            let map = if backed.base_bytes > 0 { data.map(ino) } else { None };
            let Some(map) = map else { return Ok(Source::Backed(data.file(ino)?)) };
            let base = self.reader(state, ino)?;
            return Ok(Source::Ranged(Ranged { base, base_bytes: backed.base_bytes, bytes: backed.bytes, map }));
        }
        self.reader(state, ino).map(Source::Sealed)
    }

    /// The file `ino`, if it was copied up by range.
    pub(super) fn ranged(&self, state: &State, ino: Ino) -> FsResult<Option<Ranged>> {
        match self.source(state, ino)? {
            Source::Ranged(ranged) => Ok(Some(ranged)),
            _ => Ok(None),
        }
    }

    /// The reader of the sealed file `ino`, or of what lies below it where it was copied up by range.
    fn reader(&self, state: &State, ino: Ino) -> FsResult<Arc<FileReader>> {
        if let Some(reader) = self.readers.lock().get(&ino) {
            return Ok(reader.clone());
        }
        let node = match state.tables.inode(ino) {
            Some(inode) => inode.inode.node.clone(),
            None => state.inode_below(ino)?.node,
        };
        match node {
            Node::File(content) => {
                let reader = Arc::new(FileReader::new(self.pool.clone(), content));
                self.readers.lock().put(ino, reader.clone());
                Ok(reader)
            }
            Node::Folder => fail(libc::EISDIR),
            _ => fail(libc::EINVAL),
        }
    }

    /// Opens `ino`: checks that it can be opened so, and empties it if the flags say so. Returns the backing if it is to be
    /// passed through. [`Fs::release`] closes it.
    pub fn open(&self, ino: Ino, flags: i32, caller: Caller) -> FsResult<Option<Backing>> {
        if flags & libc::O_TRUNC != 0 {
            let set = super::SetAttr { size: Some(0), ..Default::default() };
            self.setattr(ino, set, caller)?;
        }
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            self.clear_the_way(self.writable_upper()?);
        }
        let prepared = self.prepare(ino, flags)?;
        let opened = loop {
            match self.opened_as(ino, flags, &prepared) {
                Ok(backing) => break Ok(backing),
                Err(IsWarm) => {
                    if let Err(errno) = self.make_warm_own(ino) {
                        break Err(errno);
                    }
                }
            }
        };
        self.was_opened(ino, prepared);
        opened
    }

    /// Up to `buffer.len()` bytes of `ino` at `offset`; fewer at its end only.
    pub fn read(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        let _seen = self.seen(Op::Read, ino, None);
        let count = self.read_now(ino, offset, buffer)?;
        self.watch.read(count);
        Ok(count)
    }

    fn read_now(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        loop {
            let state = self.state.read();
            let source = self.source(&state, ino)?;
            drop(state);
            match source {
                Source::Sealed(reader) => return self.read_sealed(ino, &reader, offset, buffer),
                Source::Backed(file) => return read_file(&file, offset, buffer),
                Source::Ranged(ranged) => {
                    if let Some(count) = self.read_ranged(self.writable_upper()?, ino, &ranged, offset, buffer)? {
                        return Ok(count);
                    }
                }
            }
        }
    }

    fn read_sealed(&self, ino: Ino, reader: &FileReader, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        if self.pool.is_exhausted() {
            // Somebody may have stopped in the middle of a file, and nobody tells us when they close it.
            let readers = self.readers.lock();
            let idle = readers.iter().rev().find(|(other, reader)| **other != ino && reader.holds_budget());
            if let Some((_, idle)) = idle {
                idle.release();
            }
        }
        if offset == 0 {
            self.giving.asked(ino);
        }
        let count = reader.read_at(offset, buffer)?;
        self.was_read(ino, reader, offset, &buffer[..count]);
        if offset + count as u64 >= reader.content().len() {
            reader.release();
        }
        Ok(count)
    }

    /// Writes `data` at `offset`. Setuid and setgid go if it is somebody, `by`, who can't keep them (capabilities always do).
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8], by: Option<Caller>) -> FsResult<Written> {
        let _seen = self.seen(Op::Write, ino, None);
        let (upper, _gate) = self.enter()?;
        let _stripe = self.stripe(ino).lock();
        let Put { bytes, end, failure } = self.put(upper, ino, offset, data)?;
        let cleared_privileges = self.data_changed(upper, ino, end, by)?;
        Ok(Written { bytes, cleared_privileges, failure })
    }

    /// Puts `data` into the upper's file of `ino`, whose stripe is held; the caller updates the inode.
    ///
    /// # Errors
    /// If not a byte could be written.
    pub(super) fn put(&self, upper: &Upper, ino: Ino, offset: u64, data: &[u8]) -> FsResult<Put> {
        let end =
            offset.checked_add(data.len() as u64).filter(|end| *end <= i64::MAX as u64).ok_or(Errno(libc::EFBIG))?;
        self.data_changes(ino);
        let ranged = self.copy_up(upper, ino, u64::MAX)?;
        let write = |at: u64, rest: &[u8]| match &ranged {
            Some(ranged) => self.write_ranged(upper, ino, ranged, at, rest),
            None => Ok(write_file(&*upper.data().file(ino)?, at, rest)),
        };
        let (mut written, mut failure) = write(offset, data)?;
        if failure.is_some_and(Errno::is_no_space) && self.make_room() {
            let (more, again) =
                write(offset + written as u64, &data[written..]).unwrap_or_else(|errno| (0, Some(errno)));
            (written, failure) = (written + more, again);
        }
        if let (0, Some(errno)) = (written, failure) {
            return Err(errno);
        }
        self.watch.written(written);
        Ok(Put { bytes: written, end: end - (data.len() - written) as u64, failure })
    }

    /// The data of `ino` changed and reaches at least to `end`. Returns whether privileges were cleared.
    fn data_changed(&self, upper: &Upper, ino: Ino, end: u64, by: Option<Caller>) -> FsResult<bool> {
        let now = Time::now();
        let mut state = self.state.write();
        let mut cleared = false;
        if upper.data().known(ino).is_some() {
            // Others write to it too: only the data file knows.
            self.catch_up(upper, &mut state, ino)?;
            return Ok(false);
        }
        state.tables.touch(ino, |inode| {
            if let Some(backed) = &mut inode.backed {
                backed.bytes = backed.bytes.max(end);
            }
            inode.inode.attrs.mtime = now;
            inode.inode.attrs.ctime = now;
            cleared = clear_privileges(inode, || by.is_some());
            cleared |= by.is_some_and(|by| clear_foreign_sgid(inode, by));
        });
        if cleared {
            upper.save(&mut state.tables, &[ino])?;
        }
        Ok(cleared)
    }

    /// Makes sure that the upper has the first `limit` bytes of `ino`, whose stripe is held: in a data file, or, if there
    /// are many, in one where they show through from below. Returns the file if it is of the latter kind.
    pub(super) fn copy_up(&self, upper: &Upper, ino: Ino, limit: u64) -> FsResult<Option<Ranged>> {
        let state = self.state.read();
        let reader = match self.source(&state, ino)? {
            Source::Backed(_) => return Ok(None),
            Source::Ranged(ranged) => return Ok(Some(ranged)),
            Source::Sealed(reader) => reader,
        };
        let view = state.view.clone();
        drop(state);
        upper.make_way(ino)?;
        let content = reader.content();
        if self.leave_warm(upper, ino, content)? {
            return Ok(None);
        }
        let bytes = content.len().min(limit);
        let is_ranged = match content {
            Content::Extents { .. } if bytes >= self.ranges_from => upper.data().create_ranged(ino, bytes)?,
            _ => false,
        };
        if !is_ranged {
            upper.data().create(ino, &**view.chunks(), content, limit)?;
        }
        let chunker = match content {
            Content::Extents { chunker, .. } => *chunker,
            Content::Inline(_) => Chunker::Tree,
        };
        let mut edit = Edit::new(self, upper);
        let mut inode = edit.inode(ino)?;
        if !is_ranged {
            inode.inode.node = Node::File(Content::empty());
        }
        let base_bytes = if is_ranged { bytes } else { 0 };
        inode.backed = Some(Backed { bytes, chunker, base_bytes });
        edit.set(inode);
        match edit.commit() {
            Ok(_) if is_ranged => {
                let map = upper.data().map(ino).ok_or(Errno(libc::EIO))?;
                Ok(Some(Ranged { base: reader, base_bytes, bytes, map }))
            }
            Ok(_) => {
                self.readers.lock().pop(&ino);
                Ok(None)
            }
            Err(errno) => {
                upper.data().remove(ino);
                Err(errno)
            }
        }
    }

    /// Changes the length of the data of `ino`, whose stripe is held; the caller updates the inode.
    pub(super) fn truncate_data(&self, upper: &Upper, ino: Ino, size: u64) -> FsResult<()> {
        if size > i64::MAX as u64 {
            return fail(libc::EFBIG);
        }
        self.data_changes(ino);
        let state = self.state.read();
        let source = self.source(&state, ino)?;
        drop(state);
        let ranged = match source {
            Source::Sealed(reader) if reader.content().len() == size => return Ok(()),
            Source::Sealed(_) => self.copy_up(upper, ino, size)?,
            Source::Ranged(ranged) => Some(ranged),
            Source::Backed(_) => None,
        };
        upper.data().set_len(ino, size)?;
        if ranged.is_some_and(|ranged| size < ranged.base_bytes) {
            // The row must not say that less shows through while the disk has the old length.
            upper.data().sync(ino)?;
        }
        Ok(())
    }

    /// `fallocate` with Linux's mode bits.
    pub fn allocate(&self, ino: Ino, mode: i32, offset: u64, bytes: u64) -> FsResult<()> {
        let _seen = self.seen(Op::Fallocate, ino, None);
        let (upper, _gate) = self.enter()?;
        let _stripe = self.stripe(ino).lock();
        let known = KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !known != 0 {
            return fail(libc::EOPNOTSUPP);
        }
        let end = offset.checked_add(bytes).filter(|end| *end <= i64::MAX as u64).ok_or(Errno(libc::EFBIG))?;
        self.data_changes(ino);
        let has_changed = match self.copy_up(upper, ino, u64::MAX)? {
            Some(ranged) => self.allocate_ranged(upper, ino, &ranged, mode, offset..end)?,
            None => upper.data().allocate(ino, mode, offset, bytes).map(|()| true)?,
        };
        let end = if mode & KEEP_SIZE != 0 { 0 } else { end };
        self.data_changed(upper, ino, end, None)?;
        if !has_changed {
            // Else the data file would tell a daemon that comes after this one that there was a change, and when.
            upper.save(&mut self.state.write().tables, &[ino])?;
        }
        Ok(())
    }

    /// `SEEK_DATA` (if `data`) or `SEEK_HOLE` from `offset`.
    pub fn seek(&self, ino: Ino, offset: u64, data: bool) -> FsResult<u64> {
        let _seen = self.seen(Op::Lseek, ino, None);
        let state = self.state.read();
        let source = self.source(&state, ino)?;
        let view = state.view.clone();
        let reader = match source {
            Source::Backed(file) => {
                drop(state);
                // A seal may hold the file, and wait for writers who wait for a read.
                let no_seal = self.gate.try_read();
                let _aside = no_seal.is_none().then(patience::stands_aside);
                return seek_file(&file, offset, u64::MAX, data)?.ok_or(Errno(libc::ENXIO));
            }
            Source::Ranged(ranged) => {
                let file = self.writable_upper()?.data().file(ino)?;
                drop(state);
                return ranged.seek(&**view.chunks(), &file, offset, data);
            }
            Source::Sealed(reader) => reader,
        };
        drop(state);
        let content = reader.content();
        if offset >= content.len() {
            return fail(libc::ENXIO);
        }
        if let Content::Inline(bytes) = content {
            return Ok(if data { offset } else { bytes.len() as u64 });
        }
        for next in Extents::new(&**view.chunks(), content, offset)? {
            let (at, extent) = next?;
            if matches!(extent, Extent::Chunk { .. }) == data {
                return Ok(at.max(offset));
            }
        }
        if data { fail(libc::ENXIO) } else { Ok(content.len()) }
    }

    /// Copies bytes between files (or within one); returns how many.
    pub fn copy_range(&self, from: (Ino, u64), to: (Ino, u64), bytes: u64) -> FsResult<u64> {
        let _seen = self.seen(Op::Copy, from.0, None);
        let mut buffer = vec![0; COPY_BYTES.min(bytes as usize)];
        let mut copied = 0;
        while copied < bytes {
            let wanted = buffer.len().min((bytes - copied) as usize);
            let count = match self.read(from.0, from.1 + copied, &mut buffer[..wanted]) {
                Ok(0) => break,
                Ok(count) => count,
                Err(_) if copied > 0 => break,
                Err(errno) => return Err(errno),
            };
            match self.write(to.0, to.1 + copied, &buffer[..count], None) {
                Ok(written) => copied += written.bytes as u64,
                Err(_) if copied > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(copied)
    }

    /// Makes the data and attributes of `ino` durable, and with them everything that was done to names before.
    pub fn fsync(&self, ino: Ino) -> FsResult<()> {
        let _seen = self.seen(Op::Fsync, ino, None);
        let Some(upper) = &self.upper else { return Ok(()) };
        let _gate = self.changes();
        let mut state = self.state.write();
        self.catch_up(upper, &mut state, ino)?;
        let is_backed = state.tables.inode(ino).is_some_and(|inode| inode.backed.is_some());
        if state.tables.is_unsaved(ino) {
            match upper.save(&mut state.tables, &[ino]) {
                // After a crash the data file tells its size and times, as it does without any sync.
                Err(error) if is_backed && error.class() == ErrorClass::NoSpace => {}
                saved => saved?,
            }
        }
        drop(state);
        match upper.data().map(ino) {
            Some(map) => self.sync_ranged(upper, ino, &map, || upper.data().sync(ino))?,
            None if is_backed => upper.data().sync(ino)?,
            None => {}
        }
        Ok(upper.sync()?)
    }
}

/// Writes `data` at `offset`: how much was written, and what ended it early.
pub(super) fn write_file(file: &File, offset: u64, data: &[u8]) -> (usize, Option<Errno>) {
    let mut written = 0;
    while written < data.len() {
        match file.write_at(&data[written..], offset + written as u64) {
            Ok(0) => return (written, Some(Errno(libc::EIO))),
            Ok(count) => written += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Some(error.into())),
        }
    }
    (written, None)
}

/// Reads until `buffer` is full or the file ends; returns how much that was.
pub(super) fn read_file(file: &File, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}
