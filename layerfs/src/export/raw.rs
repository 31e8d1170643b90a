//! Export of an imported disk: the file `disk.raw` in the root of its layer, as a sparse file.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::bounded;
use parking_lot::Mutex;

use super::{ExportReport, place, spread};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::import::DISK_NAME;
use crate::inode::Node;
use crate::monitor::Monitor;
use crate::view::View;

const GROUP_BYTES: u64 = 1024 * 1024;

/// Exports the disk in `view` to the file `destination`, which mustn't exist.
///
/// # Errors
/// [`Error::Invalid`] if the layer holds no disk.
pub fn export(view: &View, destination: &Path, monitor: &dyn Monitor) -> Result<ExportReport> {
    let none = || Error::invalid("the layer holds no disk.raw; only an imported disk image can be exported as raw");
    let (ino, _) = view.lookup(Ino::ROOT, DISK_NAME.as_bytes())?.ok_or_else(none)?;
    let Node::File(content) = view.expect_inode(ino)?.node else { return Err(none()) };
    let data_bytes = place::new_file(destination, |file| write(view, &content, file, destination, monitor))?;
    monitor.items(1);
    Ok(ExportReport { entries: 1, data_bytes, ..ExportReport::default() })
}

/// Writes `content` into the empty `file` by several threads. Returns the bytes of data.
fn write(view: &View, content: &Content, file: &File, destination: &Path, monitor: &dyn Monitor) -> Result<u64> {
    let chunks = &**view.chunks();
    let path = || destination.to_owned();
    let failed = |e| Error::file("write", destination, e);
    file.set_len(content.len()).map_err(failed)?;
    if let Content::Inline(bytes) = content {
        spread::write_sparsely(file, 0, bytes).map_err(failed)?;
        return Ok(bytes.len() as u64);
    }
    let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let (groups, queue) = bounded::<Vec<spread::Piece>>(threads * 2);
    let failure = Mutex::new(None);
    let is_stopped = AtomicBool::new(false);
    let data_bytes = AtomicU64::new(0);
    let fail = |error| {
        is_stopped.store(true, Ordering::Relaxed);
        failure.lock().get_or_insert(error);
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            let queue = queue.clone();
            scope.spawn(|| {
                for group in queue {
                    if is_stopped.load(Ordering::Relaxed) {
                        continue;
                    }
                    match spread::write_pieces(chunks, file, &group, monitor, &path) {
                        Ok(written) => drop(data_bytes.fetch_add(written.bytes, Ordering::Relaxed)),
                        Err(error) => fail(error),
                    }
                }
            });
        }
        drop(queue);
        let listed = spread::pieces(chunks, content, GROUP_BYTES, |group| {
            let is_sent = !is_stopped.load(Ordering::Relaxed) && groups.send(group).is_ok();
            if is_sent { Ok(()) } else { Err(Error::Cancelled) }
        });
        drop(groups);
        listed.unwrap_or_else(&fail);
    });
    // A worker's failure comes first; the lister's "cancelled" follows from it.
    match failure.into_inner() {
        Some(error) => Err(error),
        None => Ok(data_bytes.into_inner()),
    }
}
