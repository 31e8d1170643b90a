//! Keeps some space free on the store's disk, so that a full disk fails in one well-defined way.
//!
//! Invariant: packs are refused while less than [`PACK_RESERVE_BYTES`] is free, so that the index database can
//! still write and a removal can still be recorded; the database is refused while less than
//! [`DB_RESERVE_BYTES`] is free, because it stops for good when a write of its own fails.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// What packs leave free, in bytes.
pub(crate) const PACK_RESERVE_BYTES: u64 = 16 << 20;
/// What the index database leaves free, in bytes.
pub(crate) const DB_RESERVE_BYTES: u64 = 4 << 20;

/// Free bytes on the disk of `path`.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::file("look at the free space of", path, e))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Fails with "no space" if less than `reserve` bytes are free on the disk of `path`.
pub(crate) fn require(path: &Path, reserve: u64) -> Result<()> {
    if free_bytes(path)? < reserve {
        return Err(Error::file("write to", path, std::io::Error::from_raw_os_error(libc::ENOSPC)));
    }
    Ok(())
}

/// Watches the database's disk.
#[derive(Debug)]
pub(crate) struct SpaceGuard {
    folder: PathBuf,
    scarce: AtomicBool,
}

impl SpaceGuard {
    pub(crate) fn new(folder: &Path) -> SpaceGuard {
        SpaceGuard { folder: folder.to_owned(), scarce: AtomicBool::new(false) }
    }

    /// Whether the last check failed.
    pub(crate) fn was_scarce(&self) -> bool {
        self.scarce.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let result = require(&self.folder, DB_RESERVE_BYTES);
        self.scarce.store(result.is_err(), Ordering::Relaxed);
        result
    }
}
