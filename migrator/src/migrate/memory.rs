//! A guest's memory at its destination: kept as each round brings it, so that only what changed last is read while the guest stands
//! still.
//!
//! For guests whose states have a file of memory ([`MEMORY_FILE`]). It lies in a file without a name, which becomes the guest's own memory
//! or goes with this process. Invariant: it is what the layer that it is of has, or it is dropped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use layerfs::LayerId;
use layerfs::content::{Content, Extent, Extents, get_sized};
use layerfs::id::Ino;
use layerfs::inode::Node;
use layerfs::store::Store;
use layerfs::view::View;
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use tokio::task::spawn_blocking;

use super::Migrations;
use crate::error::Result;
use crate::guest::GuestName;
use crate::guest::state::MEMORY_FILE;

/// The names of rounds' states, after `guest/NAME/`, which are used in turn.
const ROUNDS: [&str; 2] = ["round-0", "round-1"];
/// So often it is looked whether a round has come.
const LOOKS: Duration = Duration::from_millis(100);

/// Memory as a state has it.
pub(super) struct Memory {
    pub layer: LayerId,
    content: Content,
    file: File,
}

impl Memory {
    /// The memory of state `layer`, made of `last`, that of an earlier one. None if that state has no file of memory, or if the host has not
    /// twice as much room for it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn of(store: &Arc<Store>, layer: LayerId, last: Option<Memory>) -> Result<Option<Memory>> {
        let view = View::open(store, layer)?;
        let Some((ino, _)) = view.lookup(Ino::ROOT, MEMORY_FILE.as_bytes())? else { return Ok(None) };
        let Node::File(content) = view.expect_inode(ino)?.node else { return Ok(None) };
        let is_as_long = |last: &Memory| last.content.len() == content.len();
        let (file, had) = match last.filter(is_as_long) {
            Some(last) => (last.file, last.content),
            None if !has_room(content.len()) => return Ok(None),
            None => {
                let failed = |error| layerfs::Error::io("taking memory for a guest", error);
                let file =
                    File::from(memfd_create("layerfs-memory", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
                file.set_len(content.len()).map_err(failed)?;
                (file, Content::empty())
            }
        };
        update(&**store, &file, &had, &content)?;
        Ok(Some(Memory { layer, content, file }))
    }

    /// The file, as long as the state's.
    pub fn into_file(self) -> File {
        self.file
    }
}

/// The memory of a guest that is on its way.
#[derive(Default)]
pub(super) struct Kept {
    memory: Option<Memory>,
    /// The last state is there: nothing more is to be brought here.
    is_over: bool,
}

impl Kept {
    /// The memory of `state`, the last one, if any was kept. It isn't here any more.
    pub fn finish(&mut self, store: &Arc<Store>, state: LayerId) -> Option<Memory> {
        self.is_over = true;
        let made = Memory::of(store, state, Some(self.memory.take()?));
        made.unwrap_or_else(|error| {
            tracing::warn!(%state, %error, "memory that was kept is read once more");
            None
        })
    }
}

impl Migrations {
    /// Has the memory of guest `name` follow its rounds as long as there is what is returned.
    pub(super) fn keep_memory(&self, name: &GuestName) -> Arc<Mutex<Kept>> {
        let kept = Arc::new(Mutex::new(Kept::default()));
        let (weak, me, name) = (Arc::downgrade(&kept), Arc::downgrade(&self.0), name.clone());
        let mut seen = rounds_of(self.0.guests.store(), &name);
        self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(LOOKS).await;
                let Some(store) = Migrations::of(&me).map(|me| me.0.guests.store().clone()) else { return };
                let there = rounds_of(&store, &name);
                let new = there.into_iter().flatten().find(|layer| !seen.contains(&Some(*layer)));
                seen = there;
                let weak = weak.clone();
                if spawn_blocking(move || follow(&weak, &store, new)).await.unwrap_or(true) {
                    return;
                }
            }
        });
        kept
    }
}

/// The states of the last rounds of guest `name`.
fn rounds_of(store: &Store, name: &GuestName) -> [Option<LayerId>; 2] {
    ROUNDS.map(|round| store.name(&name.layer(round).ok()?).ok()?.map(|record| record.layer))
}

/// Brings what is kept to what `layer` has. Returns whether that was the last time.
fn follow(kept: &Weak<Mutex<Kept>>, store: &Arc<Store>, layer: Option<LayerId>) -> bool {
    let Some(kept) = kept.upgrade() else { return true };
    let mut kept = kept.lock();
    if let (Some(layer), false) = (layer, kept.is_over) {
        let last = kept.memory.take();
        match Memory::of(store, layer, last) {
            Ok(memory) => kept.memory = memory,
            Err(error) => tracing::warn!(%layer, %error, "the memory of a guest that comes isn't kept"),
        }
    }
    kept.is_over
}

/// Makes `file`, which has what `old` says (nothing: zeroes), have what `new` says.
fn update(store: &Store, file: &File, old: &Content, new: &Content) -> layerfs::Result<()> {
    let failed = |error| layerfs::Error::io("writing a guest's memory", error);
    let mut had = Extents::new(store, old, 0)?;
    let mut last = had.next().transpose()?;
    if let Content::Inline(bytes) = new {
        return file.write_all_at(bytes, 0).map_err(failed);
    }
    for extent in Extents::new(store, new, 0)? {
        let (at, extent) = extent?;
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

/// Whether twice as much memory as that is free.
fn has_room(bytes: u64) -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.is_some_and(|kilobytes| kilobytes << 10 > 2 * bytes)
}

#[cfg(test)]
mod tests {
    use layerfs::LayerName;
    use layerfs::monitor::Silent;
    use layerfs::store::StoreOptions;

    use super::*;
    use crate::guest::state;

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
            last = Some(memory);
        }
        // Another length is another memory.
        plain.truncate(3 << 20);
        let new = state(&plain, layer);
        let memory = Memory::of(&store, new, last).unwrap().unwrap();
        assert_eq!(memory.file.metadata().unwrap().len(), 3 << 20);
        let mut kept = Kept { memory: Some(memory), is_over: false };
        assert!(kept.finish(&store, new).is_some() && kept.finish(&store, new).is_none());
        std::fs::remove_file(folder.path().join("folder").join(MEMORY_FILE)).unwrap();
        std::fs::write(folder.path().join("folder/pages-1.img"), b"another kind of guest").unwrap();
        let other = state::import(&store, &folder.path().join("folder"), &name, None, &Silent).unwrap().0;
        assert!(Memory::of(&store, other, None).unwrap().is_none());
    }
}
