//! A guest's state as a layer: the way from checkpoint files into the store.
//!
//! Hides which of a state's files hold memory. Invariants: the same memory gives the same chunks in every state of a
//! guest, whether it was dumped or only scanned; files keep their inode numbers from one state to the next, so that the
//! next one can be told as a difference from the last.

use std::path::Path;
use std::sync::Arc;

use layerfs::chunker::Chunker;
use layerfs::import::{ImportOptions, ImportReport, SourceSpec, import as import_layer};
use layerfs::manifest::LayerKind;
use layerfs::monitor::Monitor;
use layerfs::store::{Expect, Store};
use layerfs::{LayerId, LayerName, Result};

use super::pagemap;

/// The name of a file that is memory and nothing else, from the guest's first address on, with holes where it has none.
pub const MEMORY_FILE: &str = "memory.raw";

/// Whether a state's file of this name is memory.
pub(super) fn is_memory(name: &[u8]) -> bool {
    name.starts_with(b"pages-") || name == MEMORY_FILE.as_bytes()
}

/// Makes the files in `folder` a layer called `name`, whatever that was before. `previous` is an earlier state of the same
/// guest.
///
/// # Errors
/// Those of an import; the name is as it was then.
pub fn import(
    store: &Arc<Store>,
    folder: &Path,
    name: &LayerName,
    previous: Option<LayerId>,
    monitor: &dyn Monitor,
) -> Result<(LayerId, ImportReport)> {
    let options = ImportOptions {
        expect: Expect::Any,
        kind: Some(LayerKind::Instance),
        like: previous,
        chunker: Some(Chunker::Aligned),
        cuts: pagemap::cuts_in(folder)?,
        format: Some(layerfs::import::Format::Folder),
        ..ImportOptions::new(name.clone())
    };
    let report = import_layer(store, SourceSpec::Path(folder.to_owned()), &options, monitor)?;
    let top = report.layers.last().map(|layer| layer.id);
    let top = top.ok_or_else(|| layerfs::Error::invalid(format!("{} holds no state", folder.display())))?;
    Ok((top, report))
}

/// The bytes of memory in a state's folder, and those of everything else.
///
/// # Errors
/// Those of the disk.
pub fn sizes(folder: &Path) -> Result<(u64, u64)> {
    let failed = |error: std::io::Error| layerfs::Error::file("read", folder, error);
    let (mut memory, mut other) = (0, 0);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        let name = entry.file_name();
        let is_memory = is_memory(name.as_encoded_bytes());
        // Of a file with holes only what is there counts.
        let bytes = metadata.len().min(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512);
        *(if is_memory { &mut memory } else { &mut other }) += bytes;
    }
    Ok((memory, other))
}
