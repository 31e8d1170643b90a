//! The index database: a thin typed wrapper, so that no other file names RocksDB.
//!
//! It hides which engine keeps the index, the names, the uppers' inode tables and the peers, and how its memory
//! is bounded. Invariants: a [`Batch`] is applied whole or not at all, over all families; what was written with
//! [`Sync::Yes`], and everything written before it, survives a power cut, and what its debtors owed before; nothing is written when the disk is
//! so full that the engine itself could fail.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, IteratorMode,
    LogLevel, Options, PrefixRange, ReadOptions, WriteBatch, WriteOptions,
};

use crate::error::{Error, Result};
use crate::store::space::{Share, SpaceGuard};

/// A family of keys. FORMAT.md, "Index database".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cf {
    /// Chunk id → where the chunk lies.
    Chunks,
    /// Layer name → layer.
    Names,
    /// The uppers' records and inode tables.
    Uppers,
    /// What is mounted where.
    Mounts,
    /// Transfers that are under way.
    Transfers,
    /// Peers and their keys.
    Peers,
    /// Everything else: counters, the last garbage collection.
    Meta,
}

impl Cf {
    /// All families.
    pub const ALL: [Cf; 7] = [Cf::Chunks, Cf::Names, Cf::Uppers, Cf::Mounts, Cf::Transfers, Cf::Peers, Cf::Meta];

    /// Its name in the database.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Cf::Chunks => "chunks",
            Cf::Names => "names",
            Cf::Uppers => "uppers",
            Cf::Mounts => "mounts",
            Cf::Transfers => "transfers",
            Cf::Peers => "peers",
            Cf::Meta => "meta",
        }
    }
}

/// Whether a write has to survive a power cut before it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Yes; so does everything written before.
    Yes,
    /// It survives the end of the process, not that of the machine.
    No,
}

#[derive(Debug)]
struct Op {
    cf: Cf,
    key: Box<[u8]>,
    /// `None` deletes.
    value: Option<Box<[u8]>>,
}

/// Changes that are applied together, in order.
#[derive(Debug, Default)]
pub struct Batch {
    ops: Vec<Op>,
    bytes: usize,
    share: Share,
    takes_back: bool,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Sets `key` to `value`.
    pub fn put(&mut self, cf: Cf, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let (key, value) = (key.as_ref(), value.as_ref());
        self.bytes += key.len() + value.len();
        self.ops.push(Op { cf, key: key.into(), value: Some(value.into()) });
    }

    /// Removes `key`.
    pub fn delete(&mut self, cf: Cf, key: impl AsRef<[u8]>) {
        let key = key.as_ref();
        self.bytes += key.len();
        self.ops.push(Op { cf, key: key.into(), value: None });
    }

    /// It is part of what gives space back, or of what takes none: it may use its share of what is held for that.
    pub(crate) fn may_take(&mut self, share: Share) {
        self.share = self.share.max(share);
    }

    /// It takes a removal back that was just written: what would be lost otherwise is worth more than the space left.
    pub(crate) fn takes_back(&mut self) {
        self.takes_back = true;
    }

    /// Whether it is one of those by which one gets space again.
    fn gives_space(&self) -> bool {
        self.takes_back || self.ops.iter().all(|op| op.value.is_none())
    }

    /// Appends the changes of `other`.
    pub fn append(&mut self, mut other: Batch) {
        self.bytes += other.bytes;
        self.ops.append(&mut other.ops);
    }

    /// How many changes there are.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The size of its keys and values in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// How the database bounds its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DbOptions {
    pub block_cache_bytes: usize,
    pub write_buffer_bytes: usize,
    pub read_only: bool,
    pub create: bool,
    /// Whether to skip damaged records of the log: for reading what is left.
    pub lenient: bool,
}

/// Why a batch isn't applied, and whether that is sure.
#[derive(Debug)]
pub enum WriteError {
    /// It was refused before the engine got it: nothing is applied.
    NotWritten(Error),
    /// The engine failed with it, on a full disk too: it may be in the log all the same, and then holds when the database is
    /// opened anew.
    Unsure(Error),
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Error {
        match error {
            WriteError::NotWritten(error) | WriteError::Unsure(error) => error,
        }
    }
}

/// Somebody whose rows are of use only with bytes that lie beside the database.
pub(crate) trait Debtor: Send + std::marker::Sync {
    /// Makes durable what has to be so before the rows are that are there now. Nobody else calls it meanwhile: who finds nothing
    /// owed has waited for whoever paid.
    fn pay(&self);
}

/// Empty once its debt has ended.
type Slot = Arc<Mutex<Option<Arc<dyn Debtor>>>>;

/// One debtor each. Nobody waits for the list while somebody pays.
type Debtors = Arc<Mutex<Vec<Slot>>>;

/// As long as there is this, each sync is preceded by its debtor's payment.
pub(crate) struct Debt {
    debtors: Debtors,
    slot: Slot,
}

impl Drop for Debt {
    /// The last payment. Whoever makes the debtor pay just now is waited for: nobody else has it then.
    fn drop(&mut self) {
        if let Some(debtor) = self.slot.lock().take() {
            debtor.pay();
        }
        self.debtors.lock().retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

/// The open database.
pub struct Db {
    db: DB,
    read_only: bool,
    space: SpaceGuard,
    debtors: Debtors,
    /// Whether something was written since the last sync.
    #[cfg(test)]
    is_unsynced: std::sync::atomic::AtomicBool,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

impl Db {
    pub(crate) fn open(folder: &Path, options: DbOptions) -> Result<Db> {
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        let general = general_options(&options);
        let families =
            || Cf::ALL.map(|cf| ColumnFamilyDescriptor::new(cf.name(), family_options(cf, &cache, &options)));
        let db = if options.read_only {
            DB::open_cf_descriptors_read_only(&general, folder, families(), false)?
        } else {
            DB::open_cf_descriptors(&general, folder, families())?
        };
        Ok(Db {
            db,
            read_only: options.read_only,
            space: SpaceGuard::new(folder),
            debtors: Debtors::default(),
            #[cfg(test)]
            is_unsynced: Default::default(),
        })
    }

    fn handle(&self, cf: Cf) -> Result<&ColumnFamily> {
        self.db.cf_handle(cf.name()).ok_or_else(|| Error::Index(format!("family {} is not open", cf.name())))
    }

    /// The value of `key`.
    pub fn get(&self, cf: Cf, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>> {
        Ok(self.db.get_cf(self.handle(cf)?, key)?)
    }

    /// Whether `key` has a value.
    pub fn contains(&self, cf: Cf, key: impl AsRef<[u8]>) -> Result<bool> {
        Ok(self.db.get_pinned_cf(self.handle(cf)?, key)?.is_some())
    }

    /// The values of `keys`, in their order.
    pub fn get_many<K: AsRef<[u8]> + Copy>(&self, cf: Cf, keys: &[K]) -> Result<Vec<Option<Vec<u8>>>> {
        let handle = self.handle(cf)?;
        let found = self.db.multi_get_cf(keys.iter().map(|key| (handle, key.as_ref())));
        found.into_iter().map(|value| value.map_err(Error::from)).collect()
    }

    /// Sets one key, unsynced.
    pub fn put(&self, cf: Cf, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<()> {
        let mut batch = Batch::new();
        batch.put(cf, key, value);
        self.write(batch, Sync::No)
    }

    /// Removes one key, unsynced.
    pub fn delete(&self, cf: Cf, key: impl AsRef<[u8]>) -> Result<()> {
        let mut batch = Batch::new();
        batch.delete(cf, key);
        self.write(batch, Sync::No)
    }

    /// Applies `batch`.
    ///
    /// # Errors
    /// That of the disk. Whether it isn't applied for sure is told by [`Db::apply`].
    pub fn write(&self, batch: Batch, sync: Sync) -> Result<()> {
        Ok(self.apply(batch, sync)?)
    }

    /// The same, for those to whom it matters whether what failed may hold all the same.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn apply(&self, batch: Batch, sync: Sync) -> Result<(), WriteError> {
        if sync == Sync::Yes && !self.read_only {
            self.pay();
        }
        let changes = self.changes(&batch).map_err(WriteError::NotWritten)?;
        let mut options = WriteOptions::default();
        options.set_sync(sync == Sync::Yes);
        #[cfg(test)]
        self.is_unsynced.store(sync == Sync::No, std::sync::atomic::Ordering::Relaxed);
        self.db.write_opt(changes, &options).map_err(|error| WriteError::Unsure(error.into()))
    }

    /// What the engine is to apply, if it may.
    fn changes(&self, batch: &Batch) -> Result<WriteBatch> {
        if self.read_only {
            return Err(Error::Denied("the store is open for reading only".to_owned()));
        }
        // Removals may use the reserve.
        if batch.gives_space() {
            let _ = self.space.check(Share::All);
        } else {
            self.space.check(batch.share)?;
        }
        let mut changes = WriteBatch::default();
        for op in &batch.ops {
            let handle = self.handle(op.cf)?;
            match &op.value {
                Some(value) => changes.put_cf(handle, &op.key, value),
                None => changes.delete_cf(handle, &op.key),
            }
        }
        Ok(changes)
    }

    /// `debtor` pays before each sync, whoever asks for it: all share one log.
    pub(crate) fn owes(&self, debtor: Arc<dyn Debtor>) -> Debt {
        let slot = Slot::new(Mutex::new(Some(debtor)));
        self.debtors.lock().push(slot.clone());
        Debt { debtors: self.debtors.clone(), slot }
    }

    /// Makes all debtors pay, as the next sync would: for whoever is about to keep others waiting for one.
    pub fn pay(&self) {
        let slots = self.debtors.lock().clone();
        for slot in slots {
            if let Some(debtor) = slot.lock().as_deref() {
                debtor.pay();
            }
        }
    }

    /// Makes durable what was written until now.
    pub fn sync(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.pay();
        self.db.flush_wal(true)?;
        #[cfg(test)]
        self.is_unsynced.store(false, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// Whether all that was written survives a power cut.
    #[cfg(test)]
    pub(crate) fn is_synced(&self) -> bool {
        !self.is_unsynced.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// All entries whose key begins with `prefix`, in order of their keys, as of now.
    pub fn iter<'a>(&'a self, cf: Cf, prefix: &[u8]) -> Result<impl Iterator<Item = Result<Entry>> + use<'a>> {
        let mut options = ReadOptions::default();
        // Where it ends: else it would look for the next entry beyond, over all that was removed there.
        options.set_iterate_range(PrefixRange(prefix));
        self.entries(cf, options, IteratorMode::Start)
    }

    /// All entries from key `start` on, in order of their keys, as of now.
    pub fn iter_from<'a>(&'a self, cf: Cf, start: &[u8]) -> Result<impl Iterator<Item = Result<Entry>> + use<'a>> {
        self.entries(cf, ReadOptions::default(), IteratorMode::From(start, Direction::Forward))
    }

    /// All entries in the reverse order of their keys, as of now.
    pub(crate) fn iter_back<'a>(&'a self, cf: Cf) -> Result<impl Iterator<Item = Result<Entry>> + use<'a>> {
        self.entries(cf, ReadOptions::default(), IteratorMode::End)
    }

    fn entries<'a>(
        &'a self,
        cf: Cf,
        mut options: ReadOptions,
        mode: IteratorMode<'_>,
    ) -> Result<impl Iterator<Item = Result<Entry>> + use<'a>> {
        options.fill_cache(false);
        let entries = self.db.iterator_cf_opt(self.handle(cf)?, options, mode);
        Ok(entries.map(|entry| entry.map_err(Error::from)))
    }

    /// About how many keys `cf` holds.
    pub fn estimated_count(&self, cf: Cf) -> Result<u64> {
        let count = self.db.property_int_value_cf(self.handle(cf)?, "rocksdb.estimate-num-keys")?;
        Ok(count.unwrap_or(0))
    }

    /// Refuses from now on what needs space, as if the disk were full.
    #[cfg(test)]
    pub(crate) fn fill_disk(&self) {
        self.space.fill();
    }

    /// Holds some space on its disk from now on, for what makes room when there is none.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn hold_space(&self) -> Result<()> {
        self.space.hold()
    }

    /// The same, if another process did before.
    pub(crate) fn go_on_holding_space(&self) -> Result<()> {
        self.space.go_on_holding()
    }

    /// Whether another process would find room to open it.
    ///
    /// # Errors
    /// [`Error::Full`] if not.
    pub fn check_reopening(&self) -> Result<()> {
        self.space.check_reopening()
    }
}

/// A key and its value.
pub type Entry = (Box<[u8]>, Box<[u8]>);

fn general_options(options: &DbOptions) -> Options {
    let mut general = Options::default();
    general.create_if_missing(options.create);
    general.create_missing_column_families(options.create);
    // A torn last record is what a crash leaves; damage elsewhere must not drop synced writes in silence.
    general.set_wal_recovery_mode(if options.lenient {
        DBRecoveryMode::SkipAnyCorruptedRecord
    } else {
        DBRecoveryMode::TolerateCorruptedTailRecords
    });
    general.set_db_write_buffer_size(3 * options.write_buffer_bytes);
    general.set_max_total_wal_size(8 * options.write_buffer_bytes as u64);
    // Logs and manifest are preallocated: by a buffer of the default family, which holds nothing here, and by this.
    // With RocksDB's sizes an index of nothing would take 28 MiB, too much of a disk that is nearly full.
    general.set_write_buffer_size(1 << 20);
    general.set_manifest_preallocation_size(64 << 10);
    general.set_max_open_files(128);
    general.set_max_background_jobs(2);
    general.set_keep_log_file_num(2);
    general.set_max_log_file_size(1 << 20);
    general.set_log_level(LogLevel::Warn);
    general.set_stats_dump_period_sec(0);
    general.set_skip_stats_update_on_db_open(true);
    general
}

fn family_options(cf: Cf, cache: &Cache, options: &DbOptions) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(5);
    if cf == Cf::Chunks {
        table.set_bloom_filter(10.0, false);
    }
    let mut family = Options::default();
    family.set_block_based_table_factory(&table);
    family.set_write_buffer_size(options.write_buffer_bytes);
    family.set_max_write_buffer_number(2);
    family.set_target_file_size_base(16 << 20);
    family.set_level_compaction_dynamic_level_bytes(true);
    family
}
