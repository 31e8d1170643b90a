//! What a seal needs of a filesystem: to hold its changes back, to look at its tables, to switch what is below.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use super::super::errno::{Errno, FsResult};
use super::super::hidden::Quiet;
use super::opens::InUse;
use super::{ChangedFile, Fs, State};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::Node;
use crate::upper::Upper;
use crate::upper::hold::Hold;
use crate::upper::table::{Change, Stamp, Tables, UpperInode};
use crate::view::View;

/// How often a seal looks again for the holes of files that are being filled, before it reads them as zeros.
const HOLD_ATTEMPTS: u32 = 5;

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
    in_use: InUse,
    held: HashMap<Ino, HeldFile>,
    _quiet: Option<Quiet>,
    /// Dropped before changes may go on.
    _hold: Hold,
    _gate: ClosedGate<'fs>,
}

/// Changes wait while this exists. What nobody was let do meanwhile is done when it is dropped.
struct ClosedGate<'fs> {
    fs: &'fs Fs,
    gate: Option<RwLockWriteGuard<'fs, ()>>,
}

impl<'fs> ClosedGate<'fs> {
    fn new(fs: &'fs Fs) -> ClosedGate<'fs> {
        ClosedGate { fs, gate: Some(fs.gate.write()) }
    }
}

impl Drop for ClosedGate<'_> {
    fn drop(&mut self) {
        self.gate = None;
        // Who left something to do looked at the gate after that: one of us sees what the other did.
        fence(Ordering::SeqCst);
        self.fs.idle();
    }
}

/// A file whose writers past us are held back. Seeking in it would wait until they are not.
#[derive(Debug, Default)]
pub struct HeldFile {
    /// Where its data is, if it has holes and that is known.
    pub data: Option<Vec<Range<u64>>>,
    /// Whether nobody has it open any more, whatever we have heard of: then no write is under way that the hold doesn't hold back.
    pub(super) is_ours_alone: bool,
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
        let _gate = ClosedGate::new(self);
        // What others write past us, or have mapped: a page that is dirty already changes without anybody's knowing.
        *self.changed.lock() = Some(upper.data().all_known().into_iter().collect());
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
        let _gate = self.changes();
        let mut state = self.state.write();
        if let Err(errno) = self.catch_up_all(upper, &mut state) {
            tracing::warn!(?errno, "cannot tell what became of files that were written to");
        }
        let unsaved = state.tables.unsaved();
        upper.save(&mut state.tables, &unsaved)
    }
}

impl<'fs> Sealing<'fs> {
    /// The upper.
    pub fn upper(&self) -> &'fs Upper {
        self.upper
    }

    /// What is below.
    pub fn view(&self) -> Arc<View> {
        self.fs.state.read().view.clone()
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

    /// The content that the sealed layers have of a file in use, if it has not changed since the last seal.
    pub fn sealed_content(&self, ino: Ino) -> Option<Content> {
        self.fs.sealed_content(self.upper, ino)
    }

    /// Waits for the changes that are under way, and holds back others, also those who write to files past us. Returns too
    /// the files whose data may have changed since this began.
    ///
    /// # Errors
    /// A writer that can't be held back.
    pub fn freeze(&self) -> Result<(Frozen<'fs>, HashSet<Ino>)> {
        let (fs, upper) = (self.fs, self.upper);
        // Before changes wait, since what is written back is one.
        let quiet = fs.quiet()?;
        let gate = ClosedGate::new(fs);
        let in_use = fs.close_ways(upper);
        let held = fs.hold(upper, &in_use.written);
        let (hold, held) = held.inspect_err(|_| fs.open_ways())?;
        let mut changed = fs.changed.lock().take().unwrap_or_default();
        changed.extend(&in_use.written);
        Ok((Frozen { fs, upper, in_use, held, _quiet: quiet, _hold: hold, _gate: gate }, changed))
    }
}

impl Drop for Sealing<'_> {
    fn drop(&mut self) {
        *self.fs.changed.lock() = None;
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.fs.open_ways();
    }
}

impl Fs {
    /// Holds back those who write to `files` past us. The tables know then what was written.
    fn hold(&self, upper: &Upper, files: &[Ino]) -> Result<(Hold, HashMap<Ino, HeldFile>)> {
        let failed = |errno: Errno| Error::io("looking at open files", std::io::Error::from_raw_os_error(errno.0));
        self.catch_up_all(upper, &mut self.state.write()).map_err(failed)?;
        let mut attempts = 0;
        let (hold, mut held) = loop {
            let (hold, held, is_known) = hold_once(upper, files)?;
            attempts += 1;
            if is_known || attempts == HOLD_ATTEMPTS {
                break (hold, held);
            }
        };
        for ino in files {
            let stat = upper.data().stat(*ino)?;
            let stamp = Stamp { bytes: stat.bytes, mtime: stat.mtime };
            let mut state = self.state.write();
            if upper.data().known(*ino).is_some_and(|known| known.bytes != stamp.bytes) {
                // Something was written just now.
                self.catch_up(upper, &mut state, *ino).map_err(failed)?;
            }
            // The time is the hold's own.
            upper.data().know(*ino, stamp);
            state.tables.touch(*ino, |_| {});
            drop(state);
            upper.data().write_back(*ino)?;
        }
        // Who has it from now on can't write before the hold ends.
        held.iter_mut().for_each(|(ino, file)| file.is_ours_alone = upper.data().is_ours_alone(*ino));
        Ok((hold, held))
    }
}

/// Holds back the writers of `files`. Tells of each where its data is, and whether that is known of all.
fn hold_once(upper: &Upper, files: &[Ino]) -> Result<(Hold, HashMap<Ino, HeldFile>, bool)> {
    let before = files.iter().map(|ino| upper.data().layout(*ino)).collect::<Result<Vec<_>>>()?;
    let place = |data: &Option<Vec<Range<u64>>>| data.as_ref().and_then(|data| Some(data.first()?.start)).unwrap_or(0);
    let opened = files.iter().zip(&before).map(|(ino, (_, data))| Ok((upper.data().file(*ino)?, place(data))));
    let hold = Hold::of(&opened.collect::<Result<Vec<_>>>()?);
    let hold = hold.map_err(|error| Error::io("holding back the writers of open files", error))?;
    let mut held = HashMap::with_capacity(files.len());
    let mut is_known = true;
    for (ino, (blocks, data)) in files.iter().zip(before) {
        // Where no space was taken since, no hole was filled.
        let is_same = upper.data().stat(*ino)?.blocks == blocks;
        is_known &= data.is_none() || is_same;
        held.insert(*ino, HeldFile { data: data.filter(|_| is_same), is_ours_alone: false });
    }
    Ok((hold, held, is_known))
}

impl Frozen<'_> {
    /// Set if writers to `ino` past us are held back.
    pub fn held(&self, ino: Ino) -> Option<&HeldFile> {
        self.held.get(&ino)
    }

    /// Whether the data file of `ino` is in use, so that it stays in the upper.
    pub fn is_in_use(&self, ino: Ino) -> bool {
        self.in_use.all.contains(&ino)
    }

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
            inode.inode.nlink == 0 && matches!(&inode.inode.node, Node::File(content) if !content.is_empty())
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
        // In this order: whoever opens a folder, and hears that listings are kept, is among those that are frozen.
        self.fs.keeps_listings.store(false, Ordering::Release);
        self.fs.freeze_listings(&state);
        let mut folders: Vec<Ino> = state.tables.folders().map(|(folder, _)| folder).collect();
        folders.extend(self.fs.open_folders());
        let backed = state.tables.inodes().filter(|inode| inode.backed.is_some() && inode.inode.nlink > 0);
        let backed = backed.map(|inode| inode.inode.ino).filter(|ino| !self.is_in_use(*ino));
        let backed: Vec<Ino> = backed.collect();
        state.tables.apply(dropped);
        state.view = view;
        self.fs.readers.lock().clear();
        drop(state);
        backed.into_iter().for_each(|ino| self.upper.data().remove(ino));
        self.fs.were_sealed(self.upper, &self.in_use.all, &self.held);
        folders.sort_unstable();
        folders.dedup();
        folders
    }
}
