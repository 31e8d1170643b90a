//! A state's memory, for drivers that take it as a file ([`Guest::restore_with`]): read from the store, not through a mount.
//!
//! Invariant: the file is what the layer has, or it is dropped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use layerfs::LayerId;
use layerfs::content::{Content, Extent, Extents, get_sized};
use layerfs::id::Ino;
use layerfs::inode::Node;
use layerfs::store::Store;
use layerfs::view::View;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::state::{self, MEMORY_FILE};
use super::{Guest, Manner};
use crate::error::Result;

/// What this machine can give to programs without swapping, in bytes, if it says so.
pub fn available() -> Option<u64> {
    meminfo("MemAvailable")
}

/// The same, and what it can still swap out for it: who asks for more ends somebody.
pub fn obtainable() -> Option<u64> {
    Some(available()?.saturating_add(meminfo("SwapFree").unwrap_or(0)))
}

fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Whether the memory of state `layer` is more than `room` bytes, and if so how much it is.
///
/// # Errors
/// Those of the store.
pub fn exceeds(store: &Arc<Store>, layer: LayerId, room: u64) -> Result<Option<u64>> {
    let view = View::open(store, layer)?;
    let (mut bytes, mut raw) = (0u64, None);
    for entry in view.read_folder(Ino::ROOT, None)? {
        let entry = entry?;
        if !state::is_memory(entry.name) {
            continue;
        }
        if let Node::File(content) = view.expect_inode(entry.ino)?.node {
            bytes = bytes.saturating_add(content.len());
            raw = if entry.name == MEMORY_FILE.as_bytes() { Some(content) } else { raw };
        }
    }
    if let Some(content) = raw.filter(|_| bytes > room) {
        // What it has never touched are holes, which take none.
        for extent in Extents::new(store.as_ref(), &content, 0)? {
            if let (_, Extent::Hole { bytes: hole }) = extent? {
                bytes = bytes.saturating_sub(hole);
            }
        }
    }
    Ok((bytes > room).then_some(bytes))
}

/// Lets `guest` go on from the state `layer`, which is open at `path`, with all of its memory, of which `last` is an earlier one.
///
/// # Errors
/// Those of [`Guest::restore`], and of the store.
pub fn restore(
    guest: &dyn Guest,
    store: &Arc<Store>,
    (layer, path): (LayerId, &Path),
    last: Option<Memory>,
) -> Result<()> {
    match Memory::of(store, layer, last)? {
        Some(memory) => guest.restore_with(path, memory.file),
        None => guest.restore(path, Manner::Whole),
    }
}

/// Memory as a state has it.
pub struct Memory {
    layer: LayerId,
    content: Content,
    file: File,
}

impl Memory {
    /// How long the memory of state `layer` is, if that has a file of memory.
    ///
    /// # Errors
    /// Those of the store.
    pub fn bytes_of(store: &Arc<Store>, layer: LayerId) -> Result<Option<u64>> {
        Ok(content_of(store, layer)?.map(|content| content.len()))
    }

    /// How much memory it takes now, in bytes.
    pub fn held_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
    }

    /// The memory of state `layer`, made of `last`, that of an earlier one. None if that state has no file of memory.
    ///
    /// # Errors
    /// Those of the store; then `last` is gone too.
    pub fn of(store: &Arc<Store>, layer: LayerId, last: Option<Memory>) -> Result<Option<Memory>> {
        if last.as_ref().is_some_and(|last| last.layer == layer) {
            return Ok(last);
        }
        let Some(content) = content_of(store, layer)? else { return Ok(None) };
        let (file, had) = match last.filter(|last| last.content.len() == content.len()) {
            Some(last) => (last.file, last.content),
            None => {
                let failed = |error| layerfs::Error::io("taking memory for a guest", error);
                let file =
                    File::from(memfd_create("layerfs-memory", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
                file.set_len(content.len()).map_err(failed)?;
                (file, Content::empty())
            }
        };
        // By two threads, as a guest may wait for it.
        let (bytes, middle) = (content.len(), content.len() / 2);
        std::thread::scope(|scope| {
            let rest = scope.spawn(|| update(store, &file, (&had, &content), (middle, bytes)));
            update(store, &file, (&had, &content), (0, middle))?;
            let panicked =
                |_| Err(layerfs::Error::io("writing a guest's memory", std::io::Error::other("it panicked")));
            rest.join().unwrap_or_else(panicked)
        })?;
        Ok(Some(Memory { layer, content, file }))
    }
}

fn content_of(store: &Arc<Store>, layer: LayerId) -> Result<Option<Content>> {
    let view = View::open(store, layer)?;
    let Some((ino, _)) = view.lookup(Ino::ROOT, MEMORY_FILE.as_bytes())? else { return Ok(None) };
    match view.expect_inode(ino)?.node {
        Node::File(content) => Ok(Some(content)),
        _ => Ok(None),
    }
}

/// Makes `file`, which has what `old` says (nothing: zeroes), have what `new` says, of what begins in the given part.
fn update(
    store: &Store,
    file: &File,
    (old, new): (&Content, &Content),
    (from, end): (u64, u64),
) -> layerfs::Result<()> {
    let failed = |error| layerfs::Error::io("writing a guest's memory", error);
    if let Content::Inline(bytes) = new {
        return file.write_all_at(bytes, 0).map_err(failed);
    }
    let mut had = Extents::new(store, old, from)?;
    let mut last = had.next().transpose()?;
    for extent in Extents::new(store, new, from)? {
        let (at, extent) = extent?;
        if at >= end {
            break;
        }
        while last.is_some_and(|(begin, extent)| begin + extent.len() <= at) {
            last = had.next().transpose()?;
        }
        // What begins elsewhere is written again: pieces of memory have their places.
        if last == Some((at, extent)) {
            continue;
        }
        match extent {
            Extent::Chunk { id, bytes } => file.write_all_at(&get_sized(store, &id, bytes)?, at).map_err(failed)?,
            Extent::Hole { .. } if old.is_empty() => {}
            Extent::Hole { bytes } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, at, bytes).map_err(|error| failed(error.into()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use layerfs::LayerName;
    use layerfs::monitor::Silent;
    use layerfs::store::StoreOptions;

    use super::super::state;
    use super::*;

    #[test]
    fn memory_is_what_the_last_state_has() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let name = LayerName::new("state").unwrap();
        let bytes = 4 << 20;
        let mut plain: Vec<u8> =
            (0..bytes / 4).flat_map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        plain[1 << 20..2 << 20].fill(0);
        let state = |plain: &[u8], previous| {
            let state = folder.path().join("folder");
            std::fs::create_dir_all(&state).unwrap();
            std::fs::write(state.join(MEMORY_FILE), plain).unwrap();
            state::import(&store, &state, &name, previous, &Silent).unwrap().0
        };
        let whole = |memory: &Memory| {
            let mut read = vec![0; bytes as usize];
            memory.file.read_exact_at(&mut read, 0).unwrap();
            read
        };
        let mut last: Option<Memory> = None;
        let mut layer = None;
        for round in 0..6usize {
            // Pages change, pieces become zero, and holes are filled.
            plain[round * 300_000..][..5000].fill(round as u8 + 1);
            plain[(round + 7) * 200_000..][..150_000].fill(0);
            plain[(1 << 20) + round * 70_000..][..100].fill(7);
            let new = state(&plain, layer);
            layer = Some(new);
            let memory = Memory::of(&store, new, last.take()).unwrap().unwrap();
            assert!(memory.layer == new && whole(&memory) == plain, "round {round}");
            // Holes take none, as little as in the file.
            let held = memory.held_bytes();
            let needed = exceeds(&store, new, 0).unwrap().unwrap();
            assert!(held < u64::from(bytes) && needed < u64::from(bytes), "{held} {needed}");
            assert_eq!(exceeds(&store, new, needed).unwrap(), None);
            assert_eq!(exceeds(&store, new, needed - 1).unwrap(), Some(needed));
            last = Some(memory);
        }
        // Another length is another memory.
        plain.truncate(3 << 20);
        let new = state(&plain, layer);
        let memory = Memory::of(&store, new, last).unwrap().unwrap();
        assert_eq!(memory.file.metadata().unwrap().len(), 3 << 20);
        std::fs::remove_file(folder.path().join("folder").join(MEMORY_FILE)).unwrap();
        std::fs::write(folder.path().join("folder/pages-1.img"), b"another kind of guest").unwrap();
        let other = state::import(&store, &folder.path().join("folder"), &name, None, &Silent).unwrap().0;
        assert!(Memory::of(&store, other, None).unwrap().is_none());
    }
}
