//! What a seal needs of a filesystem: to hold its changes back, to look at its tables, to switch what is below.

use std::sync::Arc;

use parking_lot::{RwLockReadGuard, RwLockWriteGuard};

use super::super::errno::FsResult;
use super::{ChangedFile, Fs, State};
use crate::error::Result;
use crate::id::Ino;
use crate::upper::Upper;
use crate::upper::table::{Change, Tables};
use crate::view::View;

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
    /// Waits for the changes that are under way, and holds back others.
    ///
    /// # Errors
    /// `EROFS` if there is no upper.
    pub fn freeze(&self) -> FsResult<Frozen<'_>> {
        let upper = self.writable_upper()?;
        Ok(Frozen { fs: self, upper, _gate: self.gate.write() })
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
    pub fn changed_file(&self, ino: Ino) -> FsResult<Option<ChangedFile>> {
        // Whoever asks may hold the tables for reading.
        let state = self.fs.state.read_recursive();
        let Some(ranged) = self.fs.ranged(&state, ino)? else { return Ok(None) };
        let data = self.upper.data().reader(ino)?;
        Ok(Some(ChangedFile::new(ranged, state.view.chunks().clone(), data)))
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
