//! Whether a received layer is whole and well formed: the last step before it gets a name.
//!
//! Invariant: a layer that passes has every chunk that it refers to, its tables are sorted and complete, and its
//! numbers fit its parent's, so that nothing that reads it later meets a surprise.

use layerfs::chunk::ChunkRead;
use layerfs::closure::{Opened, Part, Records, walk_new};
use layerfs::content::Content;
use layerfs::inode::Node;
use layerfs::manifest::Manifest;
use layerfs::{ChunkId, Error, Ino, LayerId, Result};

/// Presence is asked for in batches of this many ids.
const BATCH: usize = 1024;

/// Says which of some chunks are there (and allowed to be referred to).
pub type Present<'a> = dyn FnMut(&[ChunkId]) -> Result<Vec<bool>> + 'a;

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything.
    Whole,
    /// Everything but the files' data.
    Structure,
}

/// Checks layer `id`, whose parent (if any) was checked before or is held.
///
/// # Errors
/// [`Error::ChunkMissing`] or [`Error::LayerMissing`] if something isn't there, [`Error::Corrupt`] if it is malformed.
pub fn check_layer(chunks: &dyn ChunkRead, id: LayerId, present: &mut Present<'_>) -> Result<()> {
    check_extent(chunks, id, Extent::Whole, present)
}

/// [`check_layer`] of as much as `extent` says.
///
/// # Errors
/// As [`check_layer`].
pub fn check_extent(chunks: &dyn ChunkRead, id: LayerId, extent: Extent, present: &mut Present<'_>) -> Result<()> {
    let mut check = Check { chunks, present, batch: Vec::with_capacity(BATCH), opened: Opened::default() };
    check.need(id.0)?;
    check.flush()?;
    let manifest = Manifest::load(chunks, id)?;
    check_parent(chunks, &manifest)?;
    for content in manifest.contents() {
        check.content(content, Extent::Whole)?;
    }
    // In a file less may be looked at.
    check.opened = Opened::default();
    check.flush()?;
    let mut dentries = Records::dentries(chunks, &manifest)?;
    while dentries.next_dentry()?.is_some() {}
    check.inodes(&manifest, extent)?;
    check.flush()
}

fn check_parent(chunks: &dyn ChunkRead, manifest: &Manifest) -> Result<()> {
    let Some(parent) = manifest.parent else { return Ok(()) };
    let below = Manifest::load(chunks, parent)?;
    if Some(manifest.depth) != below.depth.checked_add(1) || manifest.next_ino < below.next_ino {
        return Err(Error::corrupt("manifest", "its depth or its inode numbers don't fit its parent's"));
    }
    Ok(())
}

struct Check<'a, 'b> {
    chunks: &'a dyn ChunkRead,
    present: &'a mut Present<'b>,
    batch: Vec<ChunkId>,
    /// List nodes that are well formed, and what they refer to is there.
    opened: Opened,
}

impl Check<'_, '_> {
    /// `id` has to be there.
    fn need(&mut self, id: ChunkId) -> Result<()> {
        self.batch.push(id);
        if self.batch.len() == BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let present = (self.present)(&self.batch)?;
        let missing = self.batch.iter().zip(present).find(|(_, present)| !present);
        if let Some((id, _)) = missing {
            return Err(Error::ChunkMissing(*id));
        }
        self.batch.clear();
        Ok(())
    }

    /// All chunks of `content`, or all its list nodes, have to be there.
    fn content(&mut self, content: &Content, extent: Extent) -> Result<()> {
        let mut opened = std::mem::take(&mut self.opened);
        walk_new(self.chunks, content, &mut opened, &mut |part| {
            if extent == Extent::Whole || matches!(part, Part::Node(_)) {
                self.need(part.id())?;
            }
            // What a node refers to can be read only if it is there.
            if matches!(part, Part::Node(_)) {
                self.flush()?;
            }
            Ok(true)
        })?;
        self.opened = opened;
        Ok(())
    }

    fn inodes(&mut self, manifest: &Manifest, extent: Extent) -> Result<()> {
        let mut records = Records::inodes(self.chunks, manifest)?;
        let mut file_bytes = 0u64;
        let mut has_root = false;
        while let Some(inode) = records.next_inode()? {
            has_root |= inode.ino == Ino::ROOT && matches!(inode.node, Node::Folder);
            if let Node::File(content) = &inode.node {
                file_bytes = file_bytes.saturating_add(content.len());
                self.content(content, extent)?;
            }
        }
        if manifest.parent.is_none() && !has_root {
            return Err(Error::corrupt("inode table", "a layer without parent has no root folder"));
        }
        if file_bytes != manifest.file_bytes {
            let detail = format!("it states {} bytes of files, there are {file_bytes}", manifest.file_bytes);
            return Err(Error::corrupt("manifest", detail));
        }
        Ok(())
    }
}
