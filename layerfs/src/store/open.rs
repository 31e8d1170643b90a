//! Opening and creating a store. FORMAT.md, "Store folder".
//!
//! Invariants: the file `format` is written last when a store is made, and read first when it is opened; nobody
//! opens a store of a later version; two processes never own one store.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::FlockOperation;

use crate::durable;
use crate::error::{Error, ErrorClass, Result};
use crate::store::Store;
use crate::store::cache::ChunkCache;
use crate::store::db::{Db, DbOptions};
use crate::store::gc::Collector;
use crate::store::index::Index;
use crate::store::packs::{self, Packs};
use crate::store::partial::Partials;
use crate::store::pins::Roots;
use crate::store::space;
use crate::store::spare::Spares;
use crate::store::suspects::Suspects;
use crate::store::tier::Tier;

const FORMAT_PREFIX: &str = "layerfs store ";
const FORMAT_VERSION: u32 = 1;
const FOLDERS: [&str; 5] = ["packs", "index", "tables", "uppers", "tmp"];

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Whether to make the store if there is none.
    pub create: bool,
    /// Whether to open it for reading only (a store on a read-only disk).
    pub read_only: bool,
    /// Plain bytes of chunks kept in memory.
    pub cache_bytes: usize,
    /// The index database's cache in bytes.
    pub block_cache_bytes: usize,
    /// The size of each of the index database's write buffers in bytes.
    pub write_buffer_bytes: usize,
    /// The zstd level at which chunks are compressed.
    pub compression_level: i32,
    /// How many threads compress and verify; 0 stands for one per processor.
    pub threads: usize,
    /// What plain copies of large files that are read often may take of the disk, in bytes; 0: there are none.
    pub warm_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            create: false,
            read_only: false,
            cache_bytes: 32 << 20,
            block_cache_bytes: 16 << 20,
            write_buffer_bytes: 8 << 20,
            compression_level: 3,
            threads: 0,
            warm_bytes: 4 << 30,
        }
    }
}

impl StoreOptions {
    /// Options that make the store if there is none.
    pub fn create() -> StoreOptions {
        StoreOptions { create: true, ..StoreOptions::default() }
    }

    /// How many threads compress and verify.
    pub fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(2, usize::from),
            count => count,
        }
    }
}

impl Store {
    /// Opens the store in `folder`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none and none shall be made, [`Error::Busy`] if another process owns it,
    /// [`Error::Unsupported`] if it is of a later version, [`Error::Invalid`] if the folder is something else.
    pub fn open(folder: &Path, options: StoreOptions) -> Result<Arc<Store>> {
        let found = read_format(folder)?;
        if !found && !options.create {
            return Err(Error::NotFound { what: "store", name: folder.display().to_string() });
        }
        if !found {
            check_may_become_store(folder)?;
            make_folder(folder)?;
        }
        let lock = take_lock(folder, options.read_only)?;
        Store::open_locked(folder, options, found, lock)
    }

    /// Opens the store in `folder`, which `lock` is held on; `found` says whether it is one already.
    pub(crate) fn open_locked(
        folder: &Path,
        options: StoreOptions,
        found: bool,
        lock: Option<StoreLock>,
    ) -> Result<Arc<Store>> {
        if !found {
            FOLDERS.iter().try_for_each(|name| make_folder(&folder.join(name)))?;
        }
        if !options.read_only {
            empty_folder(&folder.join("tmp"))?;
            remove_half_made(&folder.join("tables"))?;
            packs::remove_half_fetched(&folder.join("packs"))?;
        }
        let index = folder.join("index");
        let open = || Db::open(&index, DbOptions { create: !found, ..db_options(&options) });
        let opened = if options.read_only { open() } else { space::lend(&index, open) };
        let db = opened.map_err(|error| match error {
            Error::Index(text) if Error::Index(text.clone()).class() == ErrorClass::NoSpace => {
                Error::Index(format!("{text}; make some room on its disk"))
            }
            error if error.class() == ErrorClass::Denied => denied(&error),
            Error::Index(text) if found => {
                Error::Index(format!("{text}; `layerctl fsck --rebuild` makes the index anew from the packs"))
            }
            other => other,
        })?;
        if !options.read_only {
            db.go_on_holding_space()?;
        }
        let db = Arc::new(db);
        let partials = Partials::load(&db)?;
        let store = Store {
            folder: folder.to_owned(),
            options,
            index: Index::new(db.clone()),
            packs: Packs::open(folder.join("packs"), Tier::open(db.clone())?, Some(db.clone()))?,
            db,
            cache: ChunkCache::new(options.cache_bytes),
            suspects: Suspects::default(),
            partials,
            roots: Roots::default(),
            names_change: Mutex::new(()),
            sessions: Mutex::default(),
            collector: Collector::default(),
            spares: Spares::new(options.warm_bytes),
            _lock: lock,
        };
        if !found {
            store.db.sync()?;
            durable::write(&folder.join("format"), format!("{FORMAT_PREFIX}{FORMAT_VERSION}\n").as_bytes(), 0o644)?;
            durable::sync_parent(folder)?;
        }
        if !options.read_only {
            match store.recover_staged() {
                Ok(0) => {}
                Ok(chunks) => tracing::info!(chunks, "chunks of a transfer that was cut off by a kill are found again"),
                // They come again with the next attempt.
                Err(error) => tracing::warn!(%error, "what a transfer brought that was cut off by a kill is lost"),
            }
        }
        Ok(Arc::new(store))
    }
}

pub(crate) fn db_options(options: &StoreOptions) -> DbOptions {
    DbOptions {
        block_cache_bytes: options.block_cache_bytes,
        write_buffer_bytes: options.write_buffer_bytes,
        read_only: options.read_only,
        create: false,
        lenient: false,
    }
}

/// Whether there is a store in `folder` that this version can read.
pub(crate) fn read_format(folder: &Path) -> Result<bool> {
    let path = folder.join("format");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::file("read", path, e)),
    };
    let version = std::str::from_utf8(&text).ok().and_then(|text| text.strip_prefix(FORMAT_PREFIX));
    match version.map(|version| version.trim_end().parse::<u32>()) {
        Some(Ok(FORMAT_VERSION)) => Ok(true),
        Some(Ok(version)) => Err(Error::Unsupported { what: "store", detail: format!("of version {version}") }),
        _ => Err(Error::corrupt("the store's format file", "it doesn't say \"layerfs store 1\"")),
    }
}

/// What the root of a filesystem of its own has from the beginning.
const LOST_AND_FOUND: &str = "lost+found";

/// A folder becomes a store only if it is empty or holds what an interrupted creation leaves.
fn check_may_become_store(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::file("list", folder, e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| Error::file("list", folder, e))?.file_name();
        let ours = |known: &str| name == *known || name.to_string_lossy().starts_with("daemon.");
        if !FOLDERS.into_iter().chain(["lock", "host.key", "control.sock", LOST_AND_FOUND]).any(ours)
            && !name.to_string_lossy().ends_with(".tmp")
        {
            return Err(Error::invalid(format!(
                "{} is neither a store nor empty: it holds {name:?}; choose another folder",
                folder.display()
            )));
        }
    }
    Ok(())
}

fn make_folder(folder: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| Error::file("create", folder, e))
}

/// The lock on a store, for as long as it lives.
#[derive(Debug)]
pub(crate) struct StoreLock(File);

impl Drop for StoreLock {
    /// A child that is just being started shares the descriptor, and with it the lock, until it runs its program.
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

pub(crate) fn take_lock(folder: &Path, read_only: bool) -> Result<Option<StoreLock>> {
    let path = folder.join("lock");
    let mut options = OpenOptions::new();
    if read_only {
        options.read(true);
    } else {
        options.write(true).create(true).truncate(false).mode(0o600);
    }
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(e) if read_only && e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::file("open", path, e)),
    };
    let how = if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(Some(StoreLock(file))),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Busy(format!(
            "the store {} is in use by another process; talk to its daemon or stop it with `layerctl daemon stop`",
            folder.display()
        ))),
        Err(e) => Err(Error::file("lock", path, e)),
    }
}

fn empty_folder(folder: &Path) -> Result<()> {
    make_folder(folder)?;
    let failed = |e| Error::file("empty", folder, e);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        removed.map_err(|e| Error::file("remove", &path, e))?;
    }
    Ok(())
}

/// Removes what a crash left of files that were being written.
fn remove_half_made(folder: &Path) -> Result<()> {
    make_folder(folder)?;
    let failed = |e| Error::file("list", folder, e);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e))?;
        }
    }
    Ok(())
}

/// `error`, by which the index may not be read, with the way out.
pub(super) fn denied(error: &Error) -> Error {
    Error::Denied(format!("{error}; become the user whom the store belongs to, or give its files back to him"))
}
