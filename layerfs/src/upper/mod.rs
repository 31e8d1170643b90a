//! Uppers: the writable tops of mounts.
//!
//! An upper is a record, two tables of rows ([`table`]) in the store's database, and data files ([`data`]). It lies
//! on a *base*, the layer that it was made over or that it was last sealed into. Invariants: an upper has one user
//! at a time; a number that it gave to an inode is never given again, whatever crashes; an upper that has a record
//! keeps its base from being collected.

pub mod data;
pub mod growing;
pub mod hold;
pub mod journal;
pub(crate) mod lost;
pub mod opens;
mod promises;
mod ranged;
pub mod ranges;
mod removals;
pub mod table;
pub mod warm;

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::attr::{Attrs, Time};
use crate::codec::{Put, Reader};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino, LayerId, LayerName, UpperId};
use crate::inode::{Inode, Node};
use crate::store::Store;
use crate::store::db::{Batch, Cf, Db, Debt, Sync};
use crate::view::View;
use data::DataFolder;
use journal::Journal;
use opens::{OpenRecord, OpenSlot, OpenTable};
use removals::Removals;
use table::{Change, Stamp, Tables, UpperInode};
use warm::WarmCopies;

/// A file of so many bytes doesn't wait where there is little room: who removed it may write into its room next, past us.
pub const LARGE_BYTES: u64 = 64 << 10;
/// A disk with so much room is not filled before what is removed has gone.
const PLENTY_BYTES: u64 = 256 << 20;
/// How many inode numbers are reserved at a time.
const RESERVE: u64 = 1024;
/// How long whoever opens an upper waits for those who write to its data files still.
const WRITERS_WAIT: Duration = Duration::from_secs(1);
const WRITERS_LOOK: Duration = Duration::from_millis(10);
const COUNTER_KEY: &[u8] = b"c";

/// An upper's own record. FORMAT.md, "Uppers".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperRecord {
    /// Its number.
    pub id: UpperId,
    /// Its name; none if it belongs to one mount only. It has the form of a layer's name.
    pub name: Option<LayerName>,
    /// The layer that it lies on; none if it lies on nothing.
    pub base: Option<LayerId>,
    /// No inode of this number or above has ever been made in it.
    pub next_ino: Ino,
    /// When it was made.
    pub created: Time,
}

impl UpperRecord {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(96);
        out.put_u8(1);
        out.put_u64(self.id.0);
        out.put_bytes16(self.name.as_ref().map_or("", LayerName::as_str).as_bytes());
        out.put_u8(u8::from(self.base.is_some()));
        out.put_id(&self.base.map_or(ChunkId([0; 32]), |base| base.0));
        out.put_u64(self.next_ino.0);
        out.put_i64(self.created.seconds);
        out.put_u32(self.created.nanos);
        out
    }

    fn decode(row: &[u8]) -> Result<UpperRecord> {
        let mut reader = Reader::new("upper record", row);
        let version = reader.u8()?;
        if version != 1 {
            return Err(Error::Unsupported { what: "upper record", detail: format!("version {version}") });
        }
        let id = UpperId(reader.u64()?);
        let name = std::str::from_utf8(reader.bytes16()?).map_err(|_| reader.error("a name that isn't text"))?;
        let name = if name.is_empty() { None } else { Some(LayerName::new(name)?) };
        let has_base = reader.u8()? != 0;
        let base = Some(LayerId(reader.id()?)).filter(|_| has_base);
        let next_ino = Ino(reader.u64()?);
        let created = Time { seconds: reader.i64()?, nanos: reader.u32()? };
        reader.finish()?;
        Ok(UpperRecord { id, name, base, next_ino, created })
    }
}

fn record_key(id: UpperId) -> Vec<u8> {
    [&b"r"[..], &id.0.to_be_bytes()].concat()
}

fn writers_key(id: UpperId) -> Vec<u8> {
    [&b"w"[..], &id.0.to_be_bytes()].concat()
}

fn name_key(name: &LayerName) -> Vec<u8> {
    [&b"n"[..], name.as_str().as_bytes()].concat()
}

/// The last upper's number; 0 if there was none.
fn counter(db: &Db) -> Result<u64> {
    let last = db.get(Cf::Uppers, COUNTER_KEY)?;
    last.map_or(Ok(0), |value| Reader::new("counter of uppers", &value).u64())
}

/// The records of all uppers, by number.
pub fn list(db: &Db) -> Result<Vec<UpperRecord>> {
    db.iter(Cf::Uppers, b"r")?.map(|row| UpperRecord::decode(&row?.1)).collect()
}

/// The layers that uppers lie on: roots for the garbage collection.
pub fn roots(db: &Db) -> Result<Vec<LayerId>> {
    Ok(list(db)?.into_iter().filter_map(|record| record.base).collect())
}

/// The record of upper `id`.
pub fn record(db: &Db, id: UpperId) -> Result<Option<UpperRecord>> {
    db.get(Cf::Uppers, record_key(id))?.map(|row| UpperRecord::decode(&row)).transpose()
}

/// The record of the upper that is called `name`.
pub fn find(db: &Db, name: &LayerName) -> Result<Option<UpperRecord>> {
    let Some(id) = db.get(Cf::Uppers, name_key(name))? else { return Ok(None) };
    let id = UpperId(Reader::new("upper's name", &id).u64()?);
    record(db, id)
}

/// How much an upper holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperSize {
    /// Inodes that it made or changed.
    pub inodes: u64,
    /// Names that it set or removed.
    pub dentries: u64,
    /// What its data files allocate, in bytes.
    pub allocated_bytes: u64,
}

/// How much upper `id` holds, whether or not it is in use.
pub fn size(store: &Store, id: UpperId) -> Result<UpperSize> {
    let count = |prefix: Vec<u8>| -> Result<u64> { Ok(store.db().iter(Cf::Uppers, &prefix)?.count() as u64) };
    let mut allocated_bytes = 0;
    if let Ok(files) = std::fs::read_dir(folder_path(store, id)) {
        use std::os::unix::fs::MetadataExt;
        let data = files.flatten().filter(|file| file.file_name() != opens::NAME && !warm::is_name(&file.file_name()));
        allocated_bytes = data.filter_map(|file| file.metadata().ok()).map(|stat| stat.blocks() * 512).sum();
    }
    let (inodes, dentries) = (count(table::inode_prefix(id))?, count(table::dentry_prefix(id))?);
    Ok(UpperSize { inodes, dentries, allocated_bytes })
}

/// Whether nothing was changed in upper `id`, or it was sealed since.
pub fn is_empty(store: &Store, id: UpperId) -> Result<bool> {
    let has = |prefix: Vec<u8>| -> Result<bool> { Ok(store.db().iter(Cf::Uppers, &prefix)?.next().is_some()) };
    Ok(!has(table::inode_prefix(id))? && !has(table::dentry_prefix(id))?)
}

/// Removes upper `id` and everything in it.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Busy`] if it is in use.
pub fn remove(store: &Store, id: UpperId) -> Result<()> {
    let missing = || Error::NotFound { what: "upper", name: id.to_string() };
    let record = record(store.db(), id)?.ok_or_else(missing)?;
    let path = folder_path(store, id);
    let _lock = DataFolder::open(&path, record.next_ino)?;
    let mut batch = Batch::new();
    batch.delete(Cf::Uppers, record_key(id));
    if let Some(name) = &record.name {
        batch.delete(Cf::Uppers, name_key(name));
    }
    store.db().write(batch, Sync::Yes)?;
    remove_rows(store.db(), id)?;
    data::remove_folder(&path)
}

/// Removes the rows of upper `id`, in batches of bounded size: it has no record any more.
fn remove_rows(db: &Db, id: UpperId) -> Result<()> {
    let tables = [table::inode_prefix(id), table::dentry_prefix(id), table::leaf_prefix(id)];
    for prefix in tables.into_iter().chain([journal::prefix(id), writers_key(id)]) {
        let mut batch = Batch::new();
        for row in db.iter(Cf::Uppers, &prefix)? {
            batch.delete(Cf::Uppers, row?.0);
            if batch.len() >= 10_000 {
                db.write(std::mem::take(&mut batch), Sync::No)?;
            }
        }
        db.write(batch, Sync::No)?;
    }
    Ok(())
}

/// Removes the rows and data files of uppers that have no record: what a crash during [`remove`] leaves. Where records
/// were lost with the index, files are put aside instead.
pub fn remove_leftovers(store: &Store) -> Result<()> {
    lost::settle(store)?;
    let alive: HashSet<UpperId> = list(store.db())?.into_iter().map(|record| record.id).collect();
    let folder = store.uppers_folder();
    let entries = std::fs::read_dir(&folder).map_err(|e| Error::file("list", &folder, e))?;
    for entry in entries.flatten() {
        let id = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(UpperId);
        if let Some(id) = id.filter(|id| !alive.contains(id)) {
            remove_rows(store.db(), id)?;
            data::remove_folder(&entry.path())?;
        }
    }
    Ok(())
}

fn folder_path(store: &Store, id: UpperId) -> PathBuf {
    store.uppers_folder().join(id.to_string())
}

/// Waits until nobody writes to the data files of upper `id` any more who began when it was mounted, but not for long: the next mount
/// wouldn't hear of it, nor a seal hold it back.
fn wait_for_writers(db: &Db, id: UpperId, data: &DataFolder) -> Result<()> {
    let Some(row) = db.get(Cf::Uppers, writers_key(id))? else { return Ok(()) };
    let mut reader = Reader::new("list of files that are written to", &row);
    let mut inos = Vec::new();
    while !reader.is_empty() {
        inos.push(Ino(reader.u64()?));
    }
    let begun = Instant::now();
    loop {
        inos.retain(|ino| data.is_others_too(*ino));
        if inos.is_empty() {
            return db.delete(Cf::Uppers, writers_key(id));
        }
        if begun.elapsed() > WRITERS_WAIT {
            return Err(Error::Busy(format!(
                "the mount of upper {id} was cut off, but programs that have {} of its files open from then still write to them; end \
                 those first",
                inos.len()
            )));
        }
        std::thread::sleep(WRITERS_LOOK);
    }
}

/// Held while a number for a new upper is taken.
static NUMBERING: Mutex<()> = Mutex::new(());

/// An upper in use.
pub struct Upper {
    id: UpperId,
    store: Arc<Store>,
    /// These two before `data`: they end first.
    removals: Removals,
    _debt: Debt,
    data: Arc<DataFolder>,
    warm: WarmCopies,
    journal: Journal,
    opens: OpenTable,
    /// What a daemon before this one left open, until somebody takes it.
    resumed_opens: Mutex<Vec<(OpenSlot, OpenRecord)>>,
    numbers: Mutex<Numbers>,
}

/// Who had an upper before.
#[derive(Debug)]
enum Past {
    /// A mount that has ended.
    Ended,
    /// A daemon that died, whose mount goes on: programs still have files open, without a name too. With the memory that tells which,
    /// if the keeper has it.
    GoesOn(Option<OwnedFd>),
}

struct Numbers {
    record: UpperRecord,
    next: Ino,
}

impl std::fmt::Debug for Upper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upper").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Upper {
    /// Makes a new upper over `view`.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name is taken.
    pub fn create(store: &Arc<Store>, view: &View, name: Option<LayerName>) -> Result<(Upper, Tables)> {
        let db = store.db();
        db.hold_space()?;
        let numbering = NUMBERING.lock();
        if let Some(name) = &name
            && find(db, name)?.is_some()
        {
            return Err(Error::Exists { what: "upper", name: name.to_string() });
        }
        let id = UpperId(counter(db)? + 1);
        let record = UpperRecord { id, name, base: view.top(), next_ino: view.next_ino(), created: Time::now() };
        let mut batch = Batch::new();
        batch.put(Cf::Uppers, COUNTER_KEY, id.0.to_le_bytes());
        batch.put(Cf::Uppers, record_key(id), record.encode());
        if let Some(name) = &record.name {
            batch.put(Cf::Uppers, name_key(name), id.0.to_le_bytes());
        }
        let path = folder_path(store, id);
        data::remove_folder(&path)?;
        let data = Arc::new(DataFolder::open(&path, record.next_ino)?);
        db.write(batch, Sync::Yes)?;
        drop(numbering);
        let next = record.next_ino;
        let numbers = Mutex::new(Numbers { record, next });
        let (journal, opens) = (Journal::start(db, id)?, OpenTable::create(&data.folder)?);
        let warm = WarmCopies::open(store, &data, &[])?;
        let (store, resumed_opens) = (store.clone(), Mutex::default());
        let removals = Removals::new(store.clone(), data.clone());
        let debt = store.db().owes(data.clone());
        let upper = Upper { id, store, removals, _debt: debt, data, warm, journal, opens, resumed_opens, numbers };
        let mut tables = Tables::new();
        if view.inode(Ino::ROOT)?.is_none() {
            upper.make_root(&mut tables)?;
        }
        Ok((upper, tables))
    }

    /// Its mount has ended, but somebody goes on writing to the data files of `inos`: nobody opens it until that is over.
    ///
    /// # Errors
    /// Those of the database.
    pub fn note_writers(&self, inos: &[Ino]) -> Result<()> {
        if inos.is_empty() {
            return Ok(());
        }
        tracing::warn!(upper = %self.id, files = inos.len(), "programs write to files of a mount that was cut off");
        let mut row = Vec::with_capacity(inos.len() * 8);
        inos.iter().for_each(|ino| row.put_u64(ino.0));
        let mut batch = Batch::new();
        batch.put(Cf::Uppers, writers_key(self.id), row);
        self.store.db().write(batch, Sync::Yes)
    }

    fn make_root(&self, tables: &mut Tables) -> Result<()> {
        let attrs = Attrs::imported(0o755, 0, 0, Time::now());
        let mut change = Change::new();
        let root = Inode { ino: Ino::ROOT, nlink: 2, attrs, xattrs: Vec::new(), node: Node::Folder };
        change.inode(UpperInode::sealed(root));
        self.commit(tables, change)
    }

    /// Opens upper `id` as its last user left it, or as that user's crash did.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Busy`] if it is in use, [`Error::Corrupt`].
    pub fn open(store: &Arc<Store>, id: UpperId) -> Result<(Upper, Tables)> {
        Upper::open_after(store, id, Past::Ended)
    }

    /// Opens upper `id` for a mount that goes on, though its daemon died. `opens` is what [`OpenTable::descriptor`] gave that one.
    ///
    /// # Errors
    /// As [`Upper::open`].
    pub fn resume(store: &Arc<Store>, id: UpperId, opens: Option<OwnedFd>) -> Result<(Upper, Tables)> {
        Upper::open_after(store, id, Past::GoesOn(opens))
    }

    fn open_after(store: &Arc<Store>, id: UpperId, past: Past) -> Result<(Upper, Tables)> {
        let missing = || Error::NotFound { what: "upper", name: id.to_string() };
        let record = record(store.db(), id)?.ok_or_else(missing)?;
        store.db().hold_space()?;
        let next = record.next_ino;
        let data = Arc::new(DataFolder::open(&folder_path(store, id), next)?);
        let has_ended = matches!(past, Past::Ended);
        if has_ended {
            wait_for_writers(store.db(), id, &data)?;
        }
        let (journal, (opens, resumed)) = match past {
            Past::Ended => (Journal::start(store.db(), id)?, (OpenTable::create(&data.folder)?, Vec::new())),
            Past::GoesOn(memory) => (Journal::resume(store.db(), id)?, OpenTable::resume(&data.folder, memory)?),
        };
        let written = resumed.iter().filter(|(_, record)| record.is_written_past_us());
        // From before the rows are read: what they are told of a file's times is of that moment.
        written.for_each(|(_, record)| data.know(record.ino, Stamp::default()));
        // Nobody knows any more which of these were emptied before they were written to.
        let writable = resumed.iter().filter(|(_, record)| record.writers > 0);
        writable.for_each(|(_, record)| data.was_emptied(record.ino));
        let numbers = Mutex::new(Numbers { record, next });
        let is_warm = |(_, record): &&(OpenSlot, OpenRecord)| record.is_warm;
        let in_use: Vec<Ino> = resumed.iter().filter(is_warm).map(|(_, record)| record.ino).collect();
        let warm = WarmCopies::open(store, &data, &in_use)?;
        let (store, resumed_opens) = (store.clone(), Mutex::new(resumed));
        let removals = Removals::new(store.clone(), data.clone());
        if !has_ended {
            // As [`Upper::owes_more`].
            data.promises().owe_more();
        }
        let debt = store.db().owes(data.clone());
        let upper = Upper { id, store, removals, _debt: debt, data, warm, journal, opens, resumed_opens, numbers };
        let mut tables = Tables::new();
        let (mut repairs, outdated_maps) = upper.load(&mut tables, has_ended)?;
        // Without the mount nothing on it could be removed.
        repairs.makes_room();
        upper.commit(&mut tables, repairs)?;
        upper.settle_warm(&tables);
        outdated_maps.into_iter().for_each(|ino| upper.data.remove_map_file(ino));
        Ok((upper, tables))
    }

    /// Reads the rows. Returns what a crash left to be repaired: files without a name that nobody can have open, times
    /// of files that were being written; and whose map files can go once that is done.
    fn load(&self, tables: &mut Tables, has_ended: bool) -> Result<(Change, Vec<Ino>)> {
        let mut repairs = Change::new();
        let mut backed_inos = HashSet::new();
        let mut ranged_inos = HashSet::new();
        let mut base = None;
        for row in self.store.db().iter(Cf::Uppers, &table::inode_prefix(self.id))? {
            let (mut inode, stamp) = table::decode_inode(&row?.1)?;
            let ino = inode.inode.ino;
            if inode.inode.nlink == 0 && has_ended {
                repairs.forget(ino);
                continue;
            }
            if let (Some(backed), Some(stamp)) = (&mut inode.backed, stamp) {
                match self.data.stat(ino) {
                    Ok(stat) => {
                        backed.bytes = stat.bytes;
                        if self.data.known(ino).is_some() {
                            self.data.know(ino, Stamp { bytes: stat.bytes, mtime: stat.mtime });
                        }
                        backed_inos.insert(ino);
                        // A truncation may have been cut off before its row was written.
                        backed.base_bytes = backed.base_bytes.min(stat.bytes);
                        if backed.base_bytes > 0 {
                            ranged_inos.insert(ino);
                        } else if inode.inode.node != Node::File(Content::empty()) {
                            inode.inode.node = Node::File(Content::empty());
                            repairs.inode(inode.clone());
                        }
                        if (stat.bytes, stat.mtime) != (stamp.bytes, stamp.mtime) {
                            inode.inode.attrs.mtime = stat.mtime;
                            inode.inode.attrs.ctime = stat.mtime;
                            repairs.inode(inode.clone());
                        }
                    }
                    Err(error) if error.class() == crate::error::ErrorClass::NotFound && backed.base_bytes > 0 => {
                        tracing::warn!(upper = %self.id, %ino, "a data file was lost in a crash; the sealed bytes show again");
                        backed.bytes = backed.base_bytes;
                        self.data.create_ranged(ino, backed.bytes)?;
                        backed_inos.insert(ino);
                        repairs.inode(inode.clone());
                    }
                    Err(error) if error.class() == crate::error::ErrorClass::NotFound => {
                        let sealed = self.sealed_content(&mut base, ino)?;
                        let shows =
                            if sealed.is_some() { "the sealed bytes show again" } else { "the file is empty now" };
                        tracing::warn!(upper = %self.id, %ino, "a data file was lost in a crash; {shows}");
                        inode.backed = None;
                        inode.inode.node = Node::File(sealed.unwrap_or_else(Content::empty));
                        repairs.inode(inode.clone());
                    }
                    Err(error) => return Err(error),
                }
            }
            tables.load_inode(inode);
        }
        let outdated_maps = self.load_maps(&ranged_inos, &mut repairs)?;
        for row in self.store.db().iter(Cf::Uppers, &table::dentry_prefix(self.id))? {
            let (key, value) = row?;
            let (folder, name) = table::decode_dentry_key(&key)?;
            tables.load_dentry(folder, name, table::decode_slot(&value)?);
        }
        let mut leftovers = self.data.inos()?;
        leftovers.retain(|ino| !backed_inos.contains(ino));
        // Where the daemon died, and not the machine, it may not be durable that their rows are gone, nor the bytes of what replaced them.
        if has_ended && !leftovers.is_empty() {
            self.owes_more();
            self.sync()?;
        }
        for ino in self.data.map_inos()?.into_iter().filter(|ino| !ranged_inos.contains(ino)) {
            self.data.map_goes(ino);
            if !leftovers.contains(&ino) {
                self.data.unlink_map(ino);
            }
        }
        for ino in leftovers {
            if has_ended {
                self.data.remove(ino);
            } else {
                // Nobody waits for that before the mount goes on.
                let bytes = self.data.stat(ino).map_or(0, |stat| stat.bytes);
                self.removals.put(ino, bytes, true);
            }
        }
        Ok((repairs, outdated_maps))
    }

    /// What the layers below have of file `ino`, if they have it; they are opened as `base` when that is asked for first.
    fn sealed_content(&self, base: &mut Option<Arc<View>>, ino: Ino) -> Result<Option<Content>> {
        let Some(layer) = self.record().base else { return Ok(None) };
        let view = match base {
            Some(view) => view,
            None => base.insert(View::open(&self.store, layer)?),
        };
        Ok(view.inode(ino)?.and_then(|below| match below.node {
            Node::File(content) => Some(content),
            _ => None,
        }))
    }

    /// Takes in the maps of `ranged_inos`, the files that were copied up by range. Returns whose rows have to be written.
    fn load_maps(&self, ranged_inos: &HashSet<Ino>, repairs: &mut Change) -> Result<Vec<Ino>> {
        let mut rows: HashMap<Ino, Vec<_>> = HashMap::new();
        for row in self.store.db().iter(Cf::Uppers, &table::leaf_prefix(self.id))? {
            let (key, value) = row?;
            let (ino, index, leaf) = table::decode_leaf(&key, &value)?;
            if ranged_inos.contains(&ino) {
                rows.entry(ino).or_default().push((index, leaf));
            } else {
                repairs.leaf(ino, index, None);
            }
        }
        let mut outdated = Vec::new();
        for ino in ranged_inos {
            let loaded = self.data.load_map(*ino, rows.remove(ino).unwrap_or_default())?;
            if let Some(map) = self.data.map(*ino).filter(|_| loaded.is_outdated) {
                for (index, leaf) in map.unsaved() {
                    map.saved(index, leaf.clone());
                    repairs.leaf(*ino, index, Some(leaf));
                }
                outdated.push(*ino);
            }
        }
        Ok(outdated)
    }

    /// Where the daemon before this one had made a warm copy the data file, and noted that in the tables only, the open files' records are
    /// told.
    fn settle_warm(&self, tables: &Tables) {
        for (slot, record) in self.resumed_opens.lock().iter_mut().filter(|(_, record)| record.is_warm) {
            if tables.inode(record.ino).is_some_and(|inode| inode.backed.is_some()) {
                record.is_warm = false;
                self.opens.put(*slot, record);
                self.warm.has_become_data(record.ino);
            }
        }
    }

    /// Its number.
    pub fn id(&self) -> UpperId {
        self.id
    }

    /// Its record.
    pub fn record(&self) -> UpperRecord {
        self.numbers.lock().record.clone()
    }

    /// Its data files.
    pub fn data(&self) -> &DataFolder {
        &self.data
    }

    /// The host filesystem's figures, for `statfs`. What warm copies take that nobody uses counts as free: they go when there is no
    /// other room.
    pub fn space(&self) -> Result<rustix::fs::StatVfs> {
        let mut space = self.data.space()?;
        let idle = self.store.spares().idle_bytes() / space.f_frsize.max(1);
        space.f_bfree = space.f_bfree.saturating_add(idle).min(space.f_blocks);
        space.f_bavail = space.f_bavail.saturating_add(idle).min(space.f_blocks);
        Ok(space)
    }

    /// Its warm copies.
    pub fn warm(&self) -> &WarmCopies {
        &self.warm
    }

    /// Its journal.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Where it is noted which files are open.
    pub fn opens(&self) -> &OpenTable {
        &self.opens
    }

    /// What was open when the daemon before this one died; once.
    pub fn take_resumed_opens(&self) -> Vec<(OpenSlot, OpenRecord)> {
        std::mem::take(&mut *self.resumed_opens.lock())
    }

    /// The store that it is in.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// A number for a new inode. The [`Upper::commit`] that follows makes it taken for ever.
    pub fn take_ino(&self) -> Ino {
        let mut numbers = self.numbers.lock();
        let ino = numbers.next;
        numbers.next = Ino(ino.0 + 1);
        ino
    }

    /// The number that the next new inode gets.
    pub fn next_ino(&self) -> Ino {
        self.numbers.lock().next
    }

    /// Applies `change`: its rows in one atomic batch, then memory. It survives the end of the process.
    ///
    /// # Errors
    /// Those of the database; nothing is changed then.
    pub fn commit(&self, tables: &mut Tables, change: Change) -> Result<()> {
        let mut batch = Batch::new();
        change.rows(self.id, &mut batch, &self.data)?;
        let mut numbers = self.numbers.lock();
        let mut reserved = None;
        if numbers.next > numbers.record.next_ino {
            let record = UpperRecord { next_ino: Ino(numbers.next.0 + RESERVE), ..numbers.record.clone() };
            batch.put(Cf::Uppers, record_key(self.id), record.encode());
            reserved = Some(record);
        }
        if !batch.is_empty() {
            self.journal.note(self.id, change.answer(), &mut batch);
            self.store.db().write(batch, Sync::No)?;
        }
        if let Some(record) = reserved {
            numbers.record = record;
        }
        drop(numbers);
        tables.apply(change);
        Ok(())
    }

    /// Writes the rows of all inodes that memory knows better.
    pub fn save(&self, tables: &mut Tables, inos: &[Ino]) -> Result<()> {
        let mut change = Change::new();
        inos.iter().filter_map(|ino| tables.inode(*ino)).for_each(|inode| change.inode(inode.clone()));
        self.commit(tables, change)
    }

    /// A daemon that died may have owed the bytes of any of its files.
    pub fn owes_more(&self) {
        self.data.promises().owe_more();
    }

    /// Makes durable everything that was committed, and the bytes that names depend on before.
    pub fn sync(&self) -> Result<()> {
        self.data.promises().age(self.next_ino());
        self.removals.sync()
    }

    /// Inode `ino` has gone for good, by a change that was committed; its data file, if it has one, of `bytes` bytes, goes now or soon. A row
    /// that a lost machine brings back has its file, unless that is so new that it could be empty anyway.
    pub fn remove_data(&self, ino: Ino, bytes: Option<u64>) {
        let is_kept = bytes.is_some() && self.data.promises().is_kept(ino, self.next_ino());
        self.data.let_go(ino);
        let Some(bytes) = bytes else { return };
        if !is_kept {
            self.data.unlink(ino);
            return;
        }
        self.removals.put(ino, bytes, false);
        self.give_back_soon();
    }

    /// Where there is little room, those who write past us need what was removed, and can't wait for it.
    fn give_back_soon(&self) {
        if !self.has_plenty() {
            self.removals.hurry();
        }
    }

    /// Inode `ino` is the sealed layers' again, by a change that was committed; its data file, of `bytes` bytes, goes soon. Its stripe is held.
    pub fn remove_sealed_data(&self, ino: Ino, bytes: u64) {
        self.data.let_go(ino);
        self.removals.put(ino, bytes, true);
        self.give_back_soon();
    }

    /// There is to be a data file of `ino`, which a sealed layer has and whose stripe is held: one that is to go does so first.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn make_way(&self, ino: Ino) -> Result<()> {
        self.removals.clear(ino)
    }

    /// Whether the disk has so much room that nobody has to wait for what is being removed.
    pub fn has_plenty(&self) -> bool {
        self.data.space().is_ok_and(|space| space.f_bavail.saturating_mul(space.f_frsize) >= PLENTY_BYTES)
    }

    /// Whether data files wait to be removed.
    pub fn has_removals(&self) -> bool {
        !self.removals.is_empty()
    }

    /// Gives back the room of all that was removed; waits for the disk. False if nothing waited for it.
    pub fn free_removed(&self) -> bool {
        let had_any = self.removals.flush();
        self.data.await_unlinks();
        had_any
    }

    /// Appends to `batch` that the upper lies on `base` now, and has lost the rows that `dropped` names.
    pub fn rebase_rows(&self, base: LayerId, dropped: &Change, batch: &mut Batch) -> Result<UpperRecord> {
        let numbers = self.numbers.lock();
        let record = UpperRecord { base: Some(base), next_ino: numbers.next, ..numbers.record.clone() };
        batch.put(Cf::Uppers, record_key(self.id), record.encode());
        dropped.rows(self.id, batch, &self.data)?;
        Ok(record)
    }

    /// The batch that [`Upper::rebase_rows`] filled has been written.
    pub fn rebased(&self, record: UpperRecord) {
        self.numbers.lock().record = record;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    #[test]
    fn golden_record() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let record = UpperRecord {
            id: UpperId(3),
            name: Some(LayerName::new("up").unwrap()),
            base: Some(LayerId(ChunkId([0xee; 32]))),
            next_ino: Ino(0x0102),
            created: Time { seconds: 5, nanos: 6 },
        };
        let fields = ["01", "0300000000000000", "02007570", "01", &"ee".repeat(32), "0201000000000000"];
        let expected = fields.concat() + "0500000000000000" + "06000000";
        assert_eq!(hex(&record.encode()), expected);
        let bare = UpperRecord { name: None, base: None, ..record.clone() };
        for record in [record, bare] {
            assert_eq!(UpperRecord::decode(&record.encode()).unwrap(), record);
        }
        assert_eq!(hex(&record_key(UpperId(1))), "720000000000000001");
    }

    #[test]
    fn what_a_daemon_that_died_has_removed_goes_with_its_map_and_nobody_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let (upper, _) = Upper::create(&store, &View::empty(store.clone()), None).unwrap();
        let (id, files) = (upper.id, ["77", "77.map"].map(|name| upper.data.path().join(name)));
        drop(upper);
        let leave = || files.iter().for_each(|file| std::fs::write(file, "x").unwrap());
        let are_there = || files.iter().map(|file| file.exists()).collect::<Vec<_>>();
        leave();
        let (upper, _) = Upper::resume(&store, id, None).unwrap();
        assert!(upper.has_removals() && are_there() == [true, true], "it may not be durable that its row has gone");
        assert!(upper.free_removed());
        assert_eq!(are_there(), [false, false]);
        drop(upper);
        leave();
        let (upper, _) = Upper::open(&store, id).unwrap();
        assert!(!upper.has_removals() && are_there() == [false, false]);
    }

    #[test]
    fn whoever_syncs_what_is_owed_is_paid_before() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let create = || Upper::create(&store, &View::empty(store.clone()), None).unwrap().0;
        let (upper, other) = (create(), create());
        let ino = Ino(77);
        let owe = || {
            std::fs::write(upper.data.path().join("4d"), "new").unwrap();
            assert!(upper.data.owe(ino));
        };
        let is_paid = || upper.data.promises().synced(ino).is_some();
        owe();
        other.sync().unwrap();
        assert!(is_paid());
        owe();
        assert!(!is_paid());
        let mut batch = Batch::new();
        batch.put(Cf::Meta, b"somebody", b"else");
        store.db().write(batch, Sync::Yes).unwrap();
        assert!(is_paid());
        owe();
        store.db().put(Cf::Meta, b"without", b"a sync").unwrap();
        assert!(!is_paid());
        let (id, alone) = (upper.id, Arc::downgrade(&upper.data));
        drop(upper);
        assert!(alone.upgrade().is_none(), "the next who opens it wants it alone");
        other.sync().unwrap();
        Upper::open(&store, id).unwrap();
    }
}
