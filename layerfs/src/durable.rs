//! Crash-safe writing of small files: temporary file, fsync, rename, fsync of the folder.
//!
//! Invariant: nothing else in this project renames a file into place or decides when a folder is synced.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Replaces the file at `path` by one with `bytes` and mode `mode`: after a crash it has its old or its new
/// content, whole.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let (mut file, temporary) = create_temporary(path, mode)?;
    let written = file.write_all(bytes).map_err(|e| Error::file("write", &temporary, e));
    match written.and_then(|()| persist(&file, &temporary, path)) {
        Ok(()) => Ok(()),
        Err(error) => {
            let _ = fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Creates the temporary sibling of `path` that [`persist`] turns into it. Each call makes one of its own.
pub fn create_temporary(path: &Path, mode: u32) -> Result<(File, PathBuf)> {
    static CREATED: AtomicU64 = AtomicU64::new(0);
    let mut options = OpenOptions::new();
    // A name that a process with our id left behind, or that somebody planted, is passed by.
    options.read(true).write(true).create_new(true).mode(mode);
    loop {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".{}-{number}.tmp", rustix::process::getpid().as_raw_nonzero()));
        let temporary = path.with_file_name(name);
        match options.open(&temporary) {
            Ok(file) => return Ok((file, temporary)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::file("create", &temporary, e)),
        }
    }
}

/// Syncs `file`, which lies at `temporary`, renames it to `path` and syncs the folder.
pub fn persist(file: &File, temporary: &Path, path: &Path) -> Result<()> {
    file.sync_all().map_err(|e| Error::file("sync", temporary, e))?;
    fs::rename(temporary, path).map_err(|e| Error::file("rename", temporary, e))?;
    sync_parent(path)
}

/// Moves a file that is synced already. Its folder is still to be synced, by [`sync_folder`]: for many files at once.
pub fn move_synced(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::file("rename", from, e))
}

/// Removes the file at `path`, if there is one, durably.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::file("remove", path, e)),
    }
}

/// Makes the entry of `path` in its folder durable.
pub fn sync_parent(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_folder(folder)
}

/// Makes the entries of `folder` durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let file = File::open(folder).map_err(|e| Error::file("open", folder, e))?;
    file.sync_all().map_err(|e| Error::file("sync", folder, e))
}
