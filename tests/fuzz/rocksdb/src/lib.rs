//! Stands in for RocksDB in the fuzz targets: as much of its interface as `layerfs/src/store/db.rs` uses, in memory.
//!
//! What one open database holds is gone when it is dropped.
#![allow(missing_docs, clippy::all)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

#[derive(Debug)]
pub struct Error(String);

impl Error {
    pub fn into_string(self) -> String {
        self.0
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

pub struct Cache;

impl Cache {
    pub fn new_lru_cache(_: usize) -> Cache {
        Cache
    }
}

pub enum DBRecoveryMode {
    SkipAnyCorruptedRecord,
    TolerateCorruptedTailRecords,
}

pub enum LogLevel {
    Warn,
}

pub enum Direction {
    Forward,
}

pub enum IteratorMode<'a> {
    From(&'a [u8], Direction),
}

macro_rules! settings {
    ($type:ident { $($name:ident($argument:ty)),* $(,)? }) => {
        #[derive(Default)]
        pub struct $type;
        impl $type {
            $(pub fn $name(&mut self, _: $argument) {})*
        }
    };
}

settings!(Options {
    create_if_missing(bool),
    create_missing_column_families(bool),
    set_wal_recovery_mode(DBRecoveryMode),
    set_db_write_buffer_size(usize),
    set_max_total_wal_size(u64),
    set_write_buffer_size(usize),
    set_manifest_preallocation_size(usize),
    set_max_open_files(i32),
    set_max_background_jobs(i32),
    set_keep_log_file_num(usize),
    set_max_log_file_size(usize),
    set_log_level(LogLevel),
    set_stats_dump_period_sec(u32),
    set_skip_stats_update_on_db_open(bool),
    set_block_based_table_factory(&BlockBasedOptions),
    set_max_write_buffer_number(i32),
    set_target_file_size_base(u64),
    set_level_compaction_dynamic_level_bytes(bool),
});

#[derive(Default)]
pub struct BlockBasedOptions;

impl BlockBasedOptions {
    pub fn set_block_cache(&mut self, _: &Cache) {}
    pub fn set_cache_index_and_filter_blocks(&mut self, _: bool) {}
    pub fn set_pin_l0_filter_and_index_blocks_in_cache(&mut self, _: bool) {}
    pub fn set_format_version(&mut self, _: i32) {}
    pub fn set_bloom_filter(&mut self, _: f64, _: bool) {}
}

settings!(ReadOptions { fill_cache(bool) });
settings!(WriteOptions { set_sync(bool) });

pub struct ColumnFamilyDescriptor(String);

impl ColumnFamilyDescriptor {
    pub fn new(name: impl Into<String>, _: Options) -> ColumnFamilyDescriptor {
        ColumnFamilyDescriptor(name.into())
    }
}

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

pub struct ColumnFamily {
    name: String,
    index: usize,
}

#[derive(Default)]
pub struct WriteBatch(Vec<(usize, Vec<u8>, Option<Vec<u8>>)>);

impl WriteBatch {
    pub fn put_cf(&mut self, family: &ColumnFamily, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.0.push((family.index, key.as_ref().to_vec(), Some(value.as_ref().to_vec())));
    }

    pub fn delete_cf(&mut self, family: &ColumnFamily, key: impl AsRef<[u8]>) {
        self.0.push((family.index, key.as_ref().to_vec(), None));
    }
}

pub struct DB {
    families: Vec<ColumnFamily>,
    rows: Mutex<Vec<Rows>>,
}

impl DB {
    pub fn open_cf_descriptors(
        _: &Options,
        folder: impl AsRef<Path>,
        families: impl IntoIterator<Item = ColumnFamilyDescriptor>,
    ) -> Result<DB, Error> {
        std::fs::create_dir_all(folder).map_err(|error| Error(error.to_string()))?;
        let family = |(index, descriptor): (usize, ColumnFamilyDescriptor)| ColumnFamily { name: descriptor.0, index };
        let families: Vec<ColumnFamily> = families.into_iter().enumerate().map(family).collect();
        let rows = Mutex::new(families.iter().map(|_| Rows::new()).collect());
        Ok(DB { families, rows })
    }

    pub fn open_cf_descriptors_read_only(
        options: &Options,
        folder: impl AsRef<Path>,
        families: impl IntoIterator<Item = ColumnFamilyDescriptor>,
        _: bool,
    ) -> Result<DB, Error> {
        DB::open_cf_descriptors(options, folder, families)
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, Vec<Rows>> {
        self.rows.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn cf_handle(&self, name: &str) -> Option<&ColumnFamily> {
        self.families.iter().find(|family| family.name == name)
    }

    pub fn get_cf(&self, family: &ColumnFamily, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.rows()[family.index].get(key.as_ref()).cloned())
    }

    pub fn get_pinned_cf(&self, family: &ColumnFamily, key: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
        self.get_cf(family, key)
    }

    pub fn multi_get_cf<'a, K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = (&'a ColumnFamily, K)>,
    ) -> Vec<Result<Option<Vec<u8>>, Error>> {
        keys.into_iter().map(|(family, key)| self.get_cf(family, key)).collect()
    }

    pub fn write_opt(&self, batch: WriteBatch, _: &WriteOptions) -> Result<(), Error> {
        let mut rows = self.rows();
        for (family, key, value) in batch.0 {
            match value {
                Some(value) => rows[family].insert(key, value),
                None => rows[family].remove(&key),
            };
        }
        Ok(())
    }

    pub fn flush_wal(&self, _: bool) -> Result<(), Error> {
        Ok(())
    }

    pub fn iterator_cf_opt(
        &self,
        family: &ColumnFamily,
        _: ReadOptions,
        mode: IteratorMode<'_>,
    ) -> std::vec::IntoIter<Result<(Box<[u8]>, Box<[u8]>), Error>> {
        let IteratorMode::From(start, Direction::Forward) = mode;
        let rows = self.rows();
        let entries = rows[family.index].range(start.to_vec()..);
        let copied: Vec<_> =
            entries.map(|(key, value)| Ok((key.clone().into_boxed_slice(), value.clone().into_boxed_slice()))).collect();
        copied.into_iter()
    }

    pub fn property_int_value_cf(&self, family: &ColumnFamily, _: &str) -> Result<Option<u64>, Error> {
        Ok(Some(self.rows()[family.index].len() as u64))
    }
}
