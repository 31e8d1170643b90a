//! The filesystem, with no kernel in the loop: every operation of a mount, over a [`View`] and an optional [`Upper`].
//!
//! Hides where an inode's truth is (the upper's tables, its data files, the sealed layers). It checks no
//! permissions: the kernel does, before a request is sent. Invariants:
//!
//! - An operation that fails has changed nothing; one that returned survives the end of the process.
//! - Locks are taken in this order: `sealing`, `gate`, a data stripe, `state`, the small ones. `gate` is held for reading by
//!   whatever changes something, and for writing by a seal. No data is read or written under `state`.
//! - An inode without a name lives on in the upper until it is forgotten.

mod attrs;
mod behind;
mod edit;
mod files;
mod folders;
mod giving;
mod handles;
mod late;
mod names;
mod neighbours;
mod opens;
mod orphans;
mod ranges;
mod sealing;
mod warm;
mod xattrs;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};

pub use attrs::{SetAttr, SetTime};
pub use files::Written;
pub use folders::{FolderHandle, Item};
pub use giving::Pages;
pub use opens::Backings;
pub use ranges::ChangedFile;
pub use sealing::{Frozen, FrozenState, HeldFile, Sealing};

use super::errno::{Errno, FsResult, fail};
use super::hidden::Hidden;
use super::watch::{Activity, Op, Running, Seen, Watch, shown};
use crate::attr::{Attrs, FileKind, MAX_NAME, is_valid_name};
use crate::id::Ino;
use crate::inode::{Inode, Node, Target};
use crate::patience;
use crate::readahead::{FetchPool, FileReader};
use crate::store::trace::Recorder;
use crate::upper::Upper;
use crate::upper::table::{Tables, UpperInode};
use crate::view::View;

/// What `stat` tells of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its number.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// How many names it has.
    pub nlink: u32,
    /// Mode, owner, times.
    pub attrs: Attrs,
    /// Its size in bytes.
    pub size: u64,
    /// What it allocates, in units of 512 bytes; for a sealed file, its data that isn't in holes.
    pub blocks: u64,
    /// `st_rdev`.
    pub rdev: u64,
    /// Whether its size and times may change without the kernel's knowledge.
    pub may_change: bool,
}

/// What is told of a folder's size: it is not a number of anything.
const FOLDER_BYTES: u64 = 4096;
const STRIPES: usize = 64;
const SHARDS: usize = 16;
const READERS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// What a mount holds of files ahead of those who read them, in bytes, and how many threads fetch it.
const AHEAD_BYTES: usize = 16 << 20;
const AHEAD_THREADS: usize = 2;
/// From this size on a file is copied up by range: copying less than that costs about as much as one sync.
const RANGES_FROM: u64 = 1 << 20;
/// To say what a request is about, the tables are waited for so long, and so many folders climbed.
const DESCRIBED_WITHIN: Duration = Duration::from_millis(100);
const DESCRIBED_STEPS: usize = 100;

/// The filesystem of one mount.
pub struct Fs {
    state: RwLock<State>,
    upper: Option<Upper>,
    gate: RwLock<()>,
    stripes: [Mutex<()>; STRIPES],
    lookups: Lookups,
    /// The folder that each folder is in, as far as anybody has looked it up. A writable filesystem keeps it for as
    /// long as the folder exists: a folder must not be moved into itself, whoever asks.
    parents: RwLock<HashMap<Ino, Ino>>,
    /// Readers of sealed files. Their contents are those of the view: emptied when that changes.
    readers: Mutex<LruCache<Ino, Arc<FileReader>>>,
    /// Fetches chunks for them.
    pool: Arc<FetchPool>,
    folders: folders::Folders,
    opens: opens::Opens,
    giving: giving::Giving,
    orphans: orphans::Orphans,
    warming: warm::Warming,
    /// Set if files can be passed through.
    backings: OnceLock<Box<dyn Backings>>,
    /// Set if large files of lower layers can be passed through too.
    hidden: OnceLock<Arc<Hidden>>,
    /// Files that have had no name yet, and may get one.
    unnamed: Mutex<HashSet<Ino>>,
    /// Held by a seal from its begin to its end.
    sealing: Mutex<()>,
    /// While a seal reads ahead: the files whose data has changed since it began to.
    changed: Mutex<Option<HashSet<Ino>>>,
    /// Files of so many bytes are copied up by range, smaller ones whole.
    ranges_from: u64,
    /// What is asked of it.
    watch: Watch,
    /// Whether a daemon before this one served the mount: the kernel may know any inode, and any may be open.
    is_resumed: bool,
    keeps_listings: AtomicBool,
}

pub(super) struct State {
    pub(super) view: Arc<View>,
    pub(super) tables: Tables,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs").field("upper", &self.upper).finish_non_exhaustive()
    }
}

impl Fs {
    /// A filesystem that can't be written to.
    pub fn read_only(view: Arc<View>) -> Fs {
        Fs::new(view, None, Tables::new())
    }

    /// A filesystem with `upper` on top, which lies on `view`.
    pub fn writable(view: Arc<View>, upper: Upper, tables: Tables) -> Fs {
        Fs::new(view, Some(upper), tables)
    }

    /// The filesystem of a mount that goes on after its daemon died; with an upper and what is in it, if it is
    /// writable.
    pub fn resumed(view: Arc<View>, upper: Option<(Upper, Tables)>) -> Fs {
        let (upper, tables) = upper.map_or((None, Tables::new()), |(upper, tables)| (Some(upper), tables));
        let records = upper.as_ref().map(Upper::take_resumed_opens).unwrap_or_default();
        Fs { is_resumed: true, opens: opens::Opens::resumed(records), ..Fs::new(view, upper, tables) }
    }

    /// Whether a daemon before this one served the mount.
    pub(in crate::mount) fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    fn new(view: Arc<View>, upper: Option<Upper>, tables: Tables) -> Fs {
        let recorder = Some(Arc::new(Recorder::default()));
        let pool = FetchPool::with_recorder(view.chunks().clone(), AHEAD_THREADS, AHEAD_BYTES, recorder);
        Fs {
            state: RwLock::new(State { view, tables }),
            upper,
            gate: RwLock::new(()),
            stripes: [const { Mutex::new(()) }; STRIPES],
            lookups: Lookups::default(),
            parents: RwLock::default(),
            readers: Mutex::new(LruCache::new(READERS_MAX)),
            pool,
            folders: folders::Folders::default(),
            opens: opens::Opens::default(),
            giving: giving::Giving::default(),
            orphans: orphans::Orphans::default(),
            warming: warm::Warming::default(),
            backings: OnceLock::new(),
            hidden: OnceLock::new(),
            unnamed: Mutex::default(),
            sealing: Mutex::new(()),
            changed: Mutex::new(None),
            ranges_from: RANGES_FROM,
            watch: Watch::default(),
            is_resumed: false,
            keeps_listings: AtomicBool::new(true),
        }
    }

    /// The same, but files of `bytes` bytes or more are copied up by range (normally those of 1 MiB or more).
    #[must_use]
    pub fn with_ranges_from(self, bytes: u64) -> Fs {
        Fs { ranges_from: bytes, ..self }
    }

    /// What is read of it is read here and there: see [`FetchPool::expect_scattered`].
    pub fn expect_scattered(&self) {
        self.pool.expect_scattered();
    }

    /// The chunks of the sealed layers that were read through it.
    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.pool.recorder()
    }

    /// Whether it can be written to.
    pub fn is_writable(&self) -> bool {
        self.upper.is_some()
    }

    /// The upper, if there is one.
    pub fn upper(&self) -> Option<&Upper> {
        self.upper.as_ref()
    }

    /// The view below the upper, as it is now.
    pub fn view(&self) -> Arc<View> {
        self.state.read().view.clone()
    }

    /// How many inodes and names the upper holds.
    pub fn upper_counts(&self) -> (u64, u64) {
        let state = self.state.read();
        (state.tables.inode_count() as u64, state.tables.dentry_count() as u64)
    }

    /// Whether requests can be answered: nothing holds the tables for longer than `limit`.
    pub fn answers_within(&self, limit: Duration) -> bool {
        self.state.try_read_for(limit).is_some()
    }

    /// Bytes that programs wrote.
    pub fn written_bytes(&self) -> u64 {
        self.watch.written_bytes()
    }

    /// What was asked of it so far, and how long the answers took.
    pub fn activity(&self) -> Activity {
        self.watch.activity()
    }

    /// What it has been working on for at least `longer`; with `untold`, only what no such look has met before.
    pub fn running(&self, longer: Duration, untold: bool) -> Vec<Running> {
        self.watch.running(longer, untold, |op, about, name| self.describe(op, about, name))
    }

    /// A request begins; it ends when what this returns is dropped.
    pub(in crate::mount) fn seen(
        &self,
        op: Op,
        about: Ino,
        name: Option<&[u8]>,
    ) -> Seen<'_, impl Fn(Op, u64, Option<&[u8]>) -> String> {
        self.watch.begin(op, about.0, name, |op, about, name| self.describe(op, about, name))
    }

    /// What a request is about, in words. It must not wait for what holds the request up.
    fn describe(&self, _: Op, about: u64, name: Option<&[u8]>) -> String {
        let about = Ino(about);
        let state = self.state.try_read_for(DESCRIBED_WITHIN);
        let found = state.and_then(|state| Some((state.view.clone(), state.way_to(about)?)));
        // Without the tables: layers may have any number of names to look through.
        let path = found.and_then(|(view, (from, names))| {
            let mut path = view.path_of(from).ok().flatten()?;
            for name in names {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&name);
            }
            Some(format!("/{}", path.escape_ascii()))
        });
        let path = path.unwrap_or_else(|| format!("inode {about}"));
        match name {
            None => path,
            Some(name) => format!("{}/{}", path.trim_end_matches('/'), shown(name)),
        }
    }

    fn writable_upper(&self) -> FsResult<&Upper> {
        self.upper.as_ref().ok_or(Errno(libc::EROFS))
    }

    /// Held by whatever changes something; a seal waits for it, and then makes others wait.
    fn enter(&self) -> FsResult<(&Upper, RwLockReadGuard<'_, ()>)> {
        Ok((self.writable_upper()?, self.changes()))
    }

    /// Holds seals back.
    fn changes(&self) -> RwLockReadGuard<'_, ()> {
        let gate = self.gate.try_read().unwrap_or_else(|| {
            // A seal waits for writers past us, who may wait for a read.
            let _aside = patience::stands_aside();
            self.gate.read()
        });
        self.close_late();
        gate
    }

    /// Held by whatever changes the data of `ino`.
    fn stripe(&self, ino: Ino) -> &Mutex<()> {
        &self.stripes[(ino.0 % STRIPES as u64) as usize]
    }

    /// The data of `ino` is about to change: whoever changes it says so, with `gate` held.
    fn data_changes(&self, ino: Ino) {
        if let Some(changed) = &mut *self.changed.lock() {
            changed.insert(ino);
        }
    }

    /// What `name` in `folder` refers to; none if nothing. The kernel remembers the inode until
    /// [`Fs::forget`].
    pub fn lookup(&self, folder: Ino, name: &[u8]) -> FsResult<Option<Stat>> {
        let _seen = self.seen(Op::Lookup, folder, Some(name));
        check_name_length(name)?;
        // By path the kernel finds these itself.
        match name {
            b"." => return self.by_number(folder).map(Some),
            b".." => return self.parent_by_number(folder).map(Some),
            _ => {}
        }
        let state = self.state.read();
        let Some((ino, kind)) = state.lookup(folder, name)? else { return Ok(None) };
        let stat = self.stat(&state, ino)?;
        self.remember(folder, ino, kind);
        Ok(Some(stat))
    }

    /// Counts that the kernel knows `ino` now, which lies in `folder`. Call it with `state` held.
    fn remember(&self, folder: Ino, ino: Ino, kind: FileKind) {
        if kind == FileKind::Folder && self.parents.read().get(&ino) != Some(&folder) {
            self.parents.write().insert(ino, folder);
        }
        if self.upper.is_some() {
            self.lookups.add(ino);
        }
    }

    /// Whether programs may have `ino` open, or the kernel know it.
    fn may_be_in_use(&self, ino: Ino) -> bool {
        self.is_resumed || self.lookups.is_known(ino)
    }

    /// The kernel forgets `count` of the look-ups of `ino`. An inode without a name ends with the last.
    pub fn forget(&self, ino: Ino, count: u64) {
        let Some(upper) = &self.upper else {
            self.parents.write().remove(&ino);
            return;
        };
        if !self.lookups.take(ino, count) {
            return;
        }
        if self.surely_closed(upper, ino) {
            self.drop_if_orphan(upper, ino);
        }
    }

    /// Whether the kernel may go on with the listings that it has. Not from a seal's switch until it was told which are old:
    /// the rest of such a listing would be asked for by a position of before.
    pub(in crate::mount) fn keeps_listings(&self) -> bool {
        self.keeps_listings.load(Ordering::Acquire)
    }

    /// The kernel has been told which listings are old.
    pub(in crate::mount) fn listings_told(&self) {
        self.keeps_listings.store(true, Ordering::Release);
    }

    /// An inode is gone for good, whose data file, if it had one, was `bytes` long.
    fn removed(&self, upper: &Upper, ino: Ino, bytes: Option<u64>) {
        if let Some(hidden) = self.hidden.get() {
            hidden.removed(ino);
        }
        upper.remove_data(ino, bytes);
        self.orphans.gone(ino);
        upper.warm().remove_idle(ino);
        self.parents.write().remove(&ino);
        self.unnamed.lock().remove(&ino);
    }

    /// What `stat` tells of `ino`.
    pub fn getattr(&self, ino: Ino) -> FsResult<Stat> {
        let _seen = self.seen(Op::Getattr, ino, None);
        self.stat(&self.state.read(), ino)
    }

    fn stat(&self, state: &State, ino: Ino) -> FsResult<Stat> {
        let Some(inode) = state.tables.inode(ino) else {
            let found = state.view.stat(ino)?.ok_or(Errno(libc::ESTALE))?;
            let size = if found.kind == FileKind::Folder { FOLDER_BYTES } else { found.size };
            let (kind, nlink, attrs, rdev) = (found.kind, found.nlink, found.attrs, found.rdev);
            let blocks = found.data_bytes.div_ceil(512);
            return Ok(self.as_it_is(Stat { ino, kind, nlink, attrs, size, blocks, rdev, may_change: false }));
        };
        self.stat_upper(inode)
    }

    fn stat_upper(&self, inode: &UpperInode) -> FsResult<Stat> {
        let ino = inode.inode.ino;
        let upper = self.writable_upper()?;
        let may_change = self.may_change(upper, inode);
        let caught_up = self.caught_up(upper, inode)?;
        let inode = caught_up.as_ref().map_or(inode, |(inode, _)| inode);
        let blocks = match (&inode.inode.node, inode.backed) {
            (Node::File(content), None) => content.data_bytes().div_ceil(512),
            (Node::File(content), Some(backed)) => {
                let data = upper.data();
                let own = data.stat(ino)?.blocks;
                let base_bytes = content.data_bytes().min(backed.base_bytes);
                data.map(ino).map_or(own, |map| ranges::blocks(base_bytes, &map, own))
            }
            _ => 0,
        };
        let kind = inode.inode.kind();
        let size = if kind == FileKind::Folder { FOLDER_BYTES } else { inode.size() };
        let (nlink, attrs, rdev) = (inode.inode.nlink, inode.inode.attrs.clone(), inode.inode.rdev());
        Ok(self.as_it_is(Stat { ino, kind, nlink, attrs, size, blocks, rdev, may_change }))
    }

    /// The target of symbolic link `ino`.
    pub fn readlink(&self, ino: Ino) -> FsResult<Vec<u8>> {
        let _seen = self.seen(Op::Readlink, ino, None);
        match self.state.read().inode(ino)?.inode.node {
            Node::Symlink(target) => Ok(target),
            _ => fail(libc::EINVAL),
        }
    }

    /// The folder that `folder` is in, as far as it is known.
    fn parent(&self, folder: Ino) -> Ino {
        self.parents.read().get(&folder).copied().unwrap_or(folder)
    }

    /// Whether `folder` is `ancestor` or lies below it.
    fn is_below(&self, folder: Ino, ancestor: Ino) -> bool {
        let parents = self.parents.read();
        let mut at = folder;
        loop {
            if at == ancestor {
                return true;
            }
            match parents.get(&at) {
                Some(parent) if at != Ino::ROOT => at = *parent,
                _ => return false,
            }
        }
    }
}

impl State {
    /// The names of a way to `ino` as far as the upper says, and where it begins: in the root, or where the upper says
    /// nothing else than the layers. A search through all names of the upper.
    fn way_to(&self, ino: Ino) -> Option<(Ino, Vec<Vec<u8>>)> {
        let (mut from, mut names) = (ino, Vec::new());
        for _ in 0..=DESCRIBED_STEPS {
            let leads_there = |target| matches!(target, Target::Inode { ino: target, .. } if target == from);
            let entry = self.tables.folders().filter(|_| from != Ino::ROOT).find_map(|(folder, entries)| {
                let (name, _) = entries.iter().find(|(_, slot)| leads_there(slot.target))?;
                Some((folder, name.to_vec()))
            });
            match entry {
                None => {
                    names.reverse();
                    return Some((from, names));
                }
                Some((folder, name)) => {
                    from = folder;
                    names.push(name);
                }
            }
        }
        None
    }

    /// What `name` in `folder` refers to.
    pub(super) fn lookup(&self, folder: Ino, name: &[u8]) -> FsResult<Option<(Ino, FileKind)>> {
        match self.tables.folder(folder).and_then(|names| names.get(name)) {
            Some(slot) => Ok(match slot.target {
                Target::Inode { ino, kind } => Some((ino, kind)),
                Target::Whiteout => None,
            }),
            None => self.lookup_below(folder, name),
        }
    }

    /// What the sealed layers say of `name` in `folder`.
    fn lookup_below(&self, folder: Ino, name: &[u8]) -> FsResult<Option<(Ino, FileKind)>> {
        if folder >= self.view.next_ino() { Ok(None) } else { Ok(self.view.lookup(folder, name)?) }
    }

    /// Inode `ino` as the upper has it, or would have it after copying it up.
    pub(super) fn inode(&self, ino: Ino) -> FsResult<UpperInode> {
        match self.tables.inode(ino) {
            Some(inode) => Ok(inode.clone()),
            None => Ok(UpperInode::sealed(self.inode_below(ino)?)),
        }
    }

    fn inode_below(&self, ino: Ino) -> FsResult<Inode> {
        self.view.inode(ino)?.ok_or(Errno(libc::ESTALE))
    }
}

fn check_name_length(name: &[u8]) -> FsResult<()> {
    if name.len() > MAX_NAME { fail(libc::ENAMETOOLONG) } else { Ok(()) }
}

fn check_new_name(name: &[u8]) -> FsResult<()> {
    check_name_length(name)?;
    match name {
        b"." | b".." => fail(libc::EEXIST),
        _ if is_valid_name(name) => Ok(()),
        _ => fail(libc::EINVAL),
    }
}

/// How often the kernel has looked up each inode and not forgotten it.
#[derive(Default)]
struct Lookups {
    shards: [Mutex<HashMap<Ino, u64>>; SHARDS],
}

impl Lookups {
    fn shard(&self, ino: Ino) -> &Mutex<HashMap<Ino, u64>> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    fn add(&self, ino: Ino) {
        *self.shard(ino).lock().entry(ino).or_insert(0) += 1;
    }

    /// Takes `count` off; true if nothing is left.
    fn take(&self, ino: Ino, count: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(left) = shard.get_mut(&ino) else { return true };
        *left = left.saturating_sub(count);
        let is_zero = *left == 0;
        if is_zero {
            shard.remove(&ino);
        }
        is_zero
    }

    fn is_known(&self, ino: Ino) -> bool {
        self.shard(ino).lock().contains_key(&ino)
    }
}
