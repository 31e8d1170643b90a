//! What a seal needs of a filesystem: to hold its changes back, to look at its tables, to switch what is below.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use super::super::errno::{Errno, FsResult};
use super::{ChangedFile, Fs, State};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::Node;
use crate::upper::Upper;
use crate::upper::table::{Change, Tables, UpperInode};
use crate::view::View;

/// A filesystem that is about to be sealed: everything goes on, and it is noted which files' data changes.
pub struct Sealing<'fs> {
    fs: &'fs Fs,
    upper: &'fs Upper,
    _only: MutexGuard<'fs, ()>,
}

/// A filesystem whose changes wait until this is dropped. Look-ups and reads go on.
pub struct Frozen<'fs> {
    fs: &'fs Fs,
    upper: &'fs Upper,
    _gate: RwLockWriteGuard<'fs, ()>,
}

/// The tables of a frozen filesystem, and the view that they lie on.
pub struct FrozenState<'a>(RwLockReadGuard<'a, State>);

impl FrozenState<'_> {
    /// The upper's tables.
    pub fn tables(&self) -> &Tables {
        &self.0.tables
    }

    /// What is below.
    pub fn view(&self) -> &Arc<View> {
        &self.0.view
    }
}

impl Fs {
    /// Waits for another seal to end, and for the changes that are under way, and begins to note others.
    ///
    /// # Errors
    /// `EROFS` if there is no upper.
    pub fn begin_seal(&self) -> FsResult<Sealing<'_>> {
        let upper = self.writable_upper()?;
        let only = self.sealing.lock();
        let _gate = self.gate.write();
        *self.changed.lock() = Some(HashSet::new());
        Ok(Sealing { fs: self, upper, _only: only })
    }

    /// The file of `ino`, if it was copied up by range.
    fn changed_file(&self, upper: &Upper, ino: Ino) -> Result<Option<ChangedFile>> {
        // Whoever asks may hold the tables for reading.
        let state = self.state.read_recursive();
        if state.tables.inode(ino).is_none() {
            return Err(Error::NotFound { what: "file in the upper", name: ino.to_string() });
        }
        let failed = |errno: Errno| Error::io("reading a changed file", std::io::Error::from_raw_os_error(errno.0));
        let Some(ranged) = self.ranged(&state, ino).map_err(failed)? else { return Ok(None) };
        let data = upper.data().reader(ino)?;
        Ok(Some(ChangedFile::new(ranged, state.view.chunks().clone(), data)))
    }

    /// Writes what memory knows better than the upper's rows, as before unmounting.
    pub fn save(&self) -> Result<()> {
        let Some(upper) = &self.upper else { return Ok(()) };
        let _gate = self.gate.read();
        let mut state = self.state.write();
        let unsaved = state.tables.unsaved();
        upper.save(&mut state.tables, &unsaved)
    }

    /// Drops the inodes that nobody can reach any more, because nobody has the mount any more.
    pub fn drop_orphans(&self) {
        let Some(upper) = &self.upper else { return };
        let _gate = self.gate.read();
        let mut state = self.state.write();
        let orphans = state.tables.inodes().filter(|inode| inode.inode.nlink == 0).map(|inode| inode.inode.ino);
        let orphans: Vec<Ino> = orphans.collect();
        orphans.into_iter().for_each(|ino| self.reap(upper, &mut state, ino));
    }
}

impl<'fs> Sealing<'fs> {
    /// The upper.
    pub fn upper(&self) -> &'fs Upper {
        self.upper
    }

    /// The files that have names and bytes in the upper, now.
    pub fn files(&self) -> Vec<UpperInode> {
        let state = self.fs.state.read();
        let files = state.tables.inodes().filter(|inode| inode.backed.is_some() && inode.inode.nlink > 0);
        files.cloned().collect()
    }

    /// As [`Frozen::changed_file`], while everything goes on.
    pub fn changed_file(&self, ino: Ino) -> Result<Option<ChangedFile>> {
        self.fs.changed_file(self.upper, ino)
    }

    /// Waits for the changes that are under way, and holds back others. Returns too the files whose data has changed
    /// since this began.
    pub fn freeze(&self) -> (Frozen<'fs>, HashSet<Ino>) {
        let gate = self.fs.gate.write();
        let changed = self.fs.changed.lock().take().unwrap_or_default();
        (Frozen { fs: self.fs, upper: self.upper, _gate: gate }, changed)
    }
}

impl Drop for Sealing<'_> {
    fn drop(&mut self) {
        *self.fs.changed.lock() = None;
    }
}

impl Frozen<'_> {
    /// The upper.
    pub fn upper(&self) -> &Upper {
        self.upper
    }

    /// The tables.
    pub fn state(&self) -> FrozenState<'_> {
        FrozenState(self.fs.state.read())
    }

    /// The file of `ino`, if it was copied up by range.
    pub fn changed_file(&self, ino: Ino) -> Result<Option<ChangedFile>> {
        self.fs.changed_file(self.upper, ino)
    }

    /// Whether a file that has no name any more, but is open, has bytes that only the layers below keep.
    pub fn has_sealed_orphans(&self) -> bool {
        let state = self.fs.state.read();
        state.tables.inodes().any(|inode| {
            inode.inode.nlink == 0 && matches!(&inode.inode.node, Node::File(content) if content.len() > 0)
        })
    }

    /// Puts `view` below, whose tree is that of the view that is there, number for number. Nobody notices.
    pub fn rest_on(self, view: Arc<View>) {
        let mut state = self.fs.state.write();
        state.view = view;
        self.fs.readers.lock().clear();
    }

    /// Puts `view` below, which holds all that `dropped` takes out of the upper; the rows have been written. Returns
    /// the folders whose listings the kernel must not go on with.
    pub fn switch(self, view: Arc<View>, dropped: Change) -> Vec<Ino> {
        let mut state = self.fs.state.write();
        self.fs.freeze_listings(&state);
        let mut folders: Vec<Ino> = state.tables.folders().map(|(folder, _)| folder).collect();
        folders.extend(self.fs.open_folders());
        let backed = state.tables.inodes().filter(|inode| inode.backed.is_some() && inode.inode.nlink > 0);
        let backed: Vec<Ino> = backed.map(|inode| inode.inode.ino).collect();
        state.tables.apply(dropped);
        state.view = view;
        self.fs.readers.lock().clear();
        drop(state);
        backed.into_iter().for_each(|ino| self.upper.data().remove(ino));
        folders.sort_unstable();
        folders.dedup();
        folders
    }
}
