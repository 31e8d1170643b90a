//! How much an import is going to read, as far as that is cheap to know: for progress only.
//!
//! Invariants: never fails and never takes longer than [`PATIENCE`]; what can't be told is `None`.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::import::detect::Opened;

/// A folder that takes longer to walk is imported without knowing its end.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of file content that importing `source` into the store at `store` will read.
pub fn bytes(source: &Opened, store: &Path, one_filesystem: bool) -> Option<u64> {
    match source {
        Opened::Folder(path) => folder_bytes(path, store, one_filesystem),
        Opened::RawFile(path) => file_bytes(path),
        _ => None,
    }
}

fn file_bytes(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|metadata| data_bytes(&metadata))
}

/// Holes aren't read. Small files may lie beside their blocks.
fn data_bytes(metadata: &std::fs::Metadata) -> u64 {
    let stored = metadata.blocks().saturating_mul(512).max(64 * 1024);
    metadata.len().min(stored)
}

fn folder_bytes(top: &Path, store: &Path, one_filesystem: bool) -> Option<u64> {
    let began = Instant::now();
    let store = std::fs::metadata(store).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let device = std::fs::metadata(top).ok()?.dev();
    let mut folders: Vec<PathBuf> = vec![top.to_owned()];
    let mut links = HashSet::new();
    let mut total = 0u64;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).ok()? {
            let Ok(metadata) = entry.as_ref().map_err(|_| ()).and_then(|entry| entry.metadata().map_err(|_| ())) else {
                continue;
            };
            if metadata.is_dir() && store == Some((metadata.dev(), metadata.ino())) {
                continue;
            }
            if metadata.is_dir() && (!one_filesystem || metadata.dev() == device) {
                folders.extend(entry.map(|entry| entry.path()));
            } else if metadata.is_file() && (metadata.nlink() == 1 || links.insert((metadata.dev(), metadata.ino()))) {
                total = total.saturating_add(data_bytes(&metadata));
            }
        }
        if began.elapsed() > PATIENCE {
            return None;
        }
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_added_up_with_each_file_once_and_no_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        std::fs::write(path("sub/a"), vec![1; 10_000]).unwrap();
        std::fs::hard_link(path("sub/a"), path("b")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("c")).unwrap();
        std::fs::File::create(path("hole")).unwrap().set_len(1 << 30).unwrap();
        let ahead = |source: Opened| bytes(&source, &path("store"), true);
        assert_eq!(ahead(Opened::Folder(folder.path().to_owned())), Some(10_000 + 65_536));
        assert_eq!(ahead(Opened::RawFile(path("sub/a"))), Some(10_000));
        assert_eq!(ahead(Opened::RawFile(path("nowhere"))), None);
        std::fs::create_dir(path("store")).unwrap();
        std::fs::write(path("store/pack"), vec![1; 10_000]).unwrap();
        assert_eq!(ahead(Opened::Folder(folder.path().to_owned())), Some(10_000 + 65_536));
    }
}
