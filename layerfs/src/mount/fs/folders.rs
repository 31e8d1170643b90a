//! Listing folders, in an order that stays while entries come and go.
//!
//! Hides how an entry's position (its *cookie*, what `telldir` gives) is found again. Names from below have the
//! positions of the sealed listing, which never changes, whether or not the upper hides them; names that the upper
//! added come after them, by their slot's order. So a position means the same in every descriptor, and removing
//! entries moves none. A listing ends with what was there when it began: who renames what it lists comes to an end. Only a seal changes what is below: folders that are open then keep their old listing.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use super::super::errno::{FsResult, fail};
use super::super::watch::Op;
use super::giving::is_small;
use super::{Fs, Stat, State};
use crate::attr::FileKind;
use crate::id::Ino;
use crate::inode::Target;

/// What `opendir` gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FolderHandle(pub u64);

/// An entry of a listing.
#[derive(Debug)]
pub struct Item<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// The inode that it refers to.
    pub ino: Ino,
    /// That inode's kind.
    pub kind: FileKind,
    /// Where a listing goes on behind it.
    pub cookie: u64,
    /// What `stat` tells of it, if that was asked for; not for `.` and `..`.
    pub stat: Option<Stat>,
}

/// The cookie of the first entry from below; 1 and 2 are `.` and `..`.
const FIRST_BELOW: u64 = 3;
/// Added to a slot's order to give the cookie of a name that the upper added.
const ADDED: u64 = 1 << 62;
const CURSORS: NonZeroUsize = NonZeroUsize::new(512).unwrap();

type Name = Box<[u8]>;
/// Names by cookie.
type Listing = Vec<(u64, Name)>;

/// The open folders.
pub(super) struct Folders {
    next: AtomicU64,
    open: Mutex<HashMap<FolderHandle, Open>>,
    /// The name that has a cookie, for the cookies at which listings were broken off lately.
    cursors: Mutex<LruCache<(Ino, u64), Name>>,
}

impl Default for Folders {
    fn default() -> Folders {
        // A daemon that takes a mount over must not give a handle that another has given.
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let next = AtomicU64::new(since_epoch.as_nanos() as u64);
        Folders { next, open: Mutex::default(), cursors: Mutex::new(LruCache::new(CURSORS)) }
    }
}

struct Open {
    folder: Ino,
    /// Names and cookies as they were before a seal.
    frozen: Option<Arc<Listing>>,
    /// Names that the upper added with this order or a later one came after the listing began.
    until: u64,
}

impl Fs {
    /// Opens a folder for listing.
    pub fn open_folder(&self, folder: Ino) -> FolderHandle {
        let handle = FolderHandle(self.folders.next.fetch_add(1, Ordering::Relaxed));
        if self.upper.is_some() {
            let until = self.state.read().tables.next_order();
            self.folders.open.lock().insert(handle, Open { folder, frozen: None, until });
        }
        handle
    }

    /// Closes a folder.
    pub fn release_folder(&self, handle: FolderHandle) {
        self.folders.open.lock().remove(&handle);
    }

    /// Lists `folder` from behind the entry with cookie `after` on (0: from the start), until `emit` returns false.
    /// An item that it took counts as looked up if `with_stat` is set, but for `.` and `..`.
    pub fn list(
        &self,
        folder: Ino,
        handle: FolderHandle,
        after: u64,
        with_stat: bool,
        emit: &mut dyn FnMut(&Item<'_>) -> bool,
    ) -> FsResult<()> {
        let _seen = self.seen(Op::Readdir, folder, None);
        let state = self.state.read();
        let small = (with_stat && self.giving.is_on()).then(Vec::new);
        let (frozen, until) = self.begun(&state, folder, handle, after);
        let mut lister = Lister { fs: self, state: &state, folder, with_stat, emit, small, until };
        if after < 1 && !lister.dot(b".", folder, 1) {
            return Ok(());
        }
        if after < 2 && !lister.dot(b"..", self.parent(folder), 2) {
            return Ok(());
        }
        match frozen {
            Some(frozen) => lister.frozen(&frozen, after)?,
            None => lister.merged(after)?,
        }
        let small = lister.small.take();
        drop(state);
        if let Some(small) = small {
            self.giving.listed(folder, after == 0, &small);
        }
        Ok(())
    }

    /// The listing that a seal has left to `handle`, unless it starts anew, and with which order what came later begins.
    fn begun(&self, state: &State, folder: Ino, handle: FolderHandle, after: u64) -> (Option<Arc<Listing>>, u64) {
        if self.upper.is_none() {
            return (None, 0);
        }
        let until = state.tables.next_order();
        let mut open = self.folders.open.lock();
        // It may have been opened when another daemon served the mount.
        let open = open.entry(handle).or_insert(Open { folder, frozen: None, until });
        if after == 0 {
            (open.frozen, open.until) = (None, until);
        }
        (open.frozen.clone(), open.until)
    }

    /// The sealed layers are about to change: gives every open folder its listing as it is.
    pub(super) fn freeze_listings(&self, state: &State) {
        let mut made: HashMap<Ino, Arc<Listing>> = HashMap::new();
        for open in self.folders.open.lock().values_mut().filter(|open| open.frozen.is_none()) {
            let frozen = match made.get(&open.folder) {
                Some(frozen) => frozen.clone(),
                None => {
                    let mut entries = Vec::new();
                    let mut emit = |item: &Item<'_>| {
                        entries.push((item.cookie, Box::from(item.name)));
                        true
                    };
                    let (folder, until) = (open.folder, u64::MAX);
                    Lister { fs: self, state, folder, with_stat: false, emit: &mut emit, small: None, until }
                        .merged(2)
                        .unwrap_or_else(|errno| tracing::warn!(%folder, ?errno, "a listing is cut short"));
                    made.entry(open.folder).or_insert(Arc::new(entries)).clone()
                }
            };
            open.frozen = Some(frozen);
        }
        self.folders.cursors.lock().clear();
    }

    /// The folders that are open.
    pub(super) fn open_folders(&self) -> Vec<Ino> {
        self.folders.open.lock().values().map(|open| open.folder).collect()
    }
}

struct Lister<'a> {
    fs: &'a Fs,
    state: &'a State,
    folder: Ino,
    with_stat: bool,
    emit: &'a mut dyn FnMut(&Item<'_>) -> bool,
    /// The small sealed files among them, if they are of interest.
    small: Option<Vec<Ino>>,
    /// Of what the upper added, only what has a lower order.
    until: u64,
}

impl Lister<'_> {
    fn dot(&mut self, name: &[u8], ino: Ino, cookie: u64) -> bool {
        (self.emit)(&Item { name, ino, kind: FileKind::Folder, cookie, stat: None })
    }

    fn item(&mut self, name: &[u8], ino: Ino, kind: FileKind, cookie: u64) -> FsResult<bool> {
        let stat = if self.with_stat { Some(self.fs.stat(self.state, ino)?) } else { None };
        let has_stat = stat.is_some();
        let is_small = stat.as_ref().is_some_and(|stat| is_small(stat.kind, stat.size));
        let taken = (self.emit)(&Item { name, ino, kind, cookie, stat });
        if taken && has_stat {
            self.fs.remember(self.folder, ino, kind);
        }
        if let Some(small) = &mut self.small
            && taken
            && is_small
            && self.state.tables.inode(ino).is_none()
        {
            small.push(ino);
        }
        Ok(taken)
    }

    fn merged(&mut self, after: u64) -> FsResult<()> {
        if after < ADDED && !self.below(after)? {
            return Ok(());
        }
        let Some(names) = self.state.tables.folder(self.folder) else { return Ok(()) };
        let from = after.checked_sub(ADDED).map_or(1, |order| order + 1);
        let until = self.until;
        for (order, name, target) in names.added_from(from).take_while(|(order, ..)| *order < until) {
            if let Target::Inode { ino, kind } = target
                && !self.item(name, ino, kind, ADDED + order)?
            {
                break;
            }
        }
        Ok(())
    }

    /// The names from below, as the upper has them. Returns whether there was room for all.
    fn below(&mut self, after: u64) -> FsResult<bool> {
        if self.folder >= self.state.view.next_ino() {
            return Ok(true);
        }
        let names = self.state.tables.folder(self.folder);
        let mut cookie = after.max(FIRST_BELOW - 1);
        let start = if cookie < FIRST_BELOW { None } else { Some(self.name_at(cookie)?) };
        let mut last: Option<(u64, &[u8])> = None;
        for entry in self.state.view.read_folder(self.folder, start.as_deref())? {
            let entry = entry?;
            cookie += 1;
            let (ino, kind) = match names.and_then(|names| names.get(entry.name)) {
                None => (entry.ino, entry.kind),
                Some(slot) => match slot.target {
                    Target::Inode { ino, kind } => (ino, kind),
                    Target::Whiteout => continue,
                },
            };
            if !self.item(entry.name, ino, kind, cookie)? {
                if let Some((cookie, name)) = last {
                    self.fs.folders.cursors.lock().put((self.folder, cookie), name.into());
                }
                return Ok(false);
            }
            last = Some((cookie, entry.name));
        }
        Ok(true)
    }

    /// The name from below that has `cookie`.
    fn name_at(&self, cookie: u64) -> FsResult<Box<[u8]>> {
        if let Some(name) = self.fs.folders.cursors.lock().get(&(self.folder, cookie)) {
            return Ok(name.clone());
        }
        let mut entries = self.state.view.read_folder(self.folder, None)?;
        match entries.nth((cookie - FIRST_BELOW) as usize) {
            Some(entry) => Ok(entry?.name.into()),
            // Behind the last one: nothing follows the greatest name there can be.
            None => Ok(Box::from([0xff; 256])),
        }
    }

    fn frozen(&mut self, entries: &Listing, after: u64) -> FsResult<()> {
        let start = entries.partition_point(|(cookie, _)| *cookie <= after);
        let end = ADDED.saturating_add(self.until);
        for (cookie, name) in entries[start..].iter().take_while(|(cookie, _)| *cookie < end) {
            if let Some((ino, kind)) = self.state.lookup(self.folder, name)?
                && !self.item(name, ino, kind, *cookie)?
            {
                break;
            }
        }
        Ok(())
    }
}

impl Fs {
    /// Fails unless `ino` is a folder.
    pub fn check_folder(&self, ino: Ino) -> FsResult<()> {
        match self.stat(&self.state.read(), ino)?.kind {
            FileKind::Folder => Ok(()),
            _ => fail(libc::ENOTDIR),
        }
    }
}
