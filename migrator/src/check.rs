//! Whether a received layer is whole and well formed: the last step before it gets a name.
//!
//! Invariant: a layer that passes has every chunk that it refers to, its tables are sorted and complete, and its
//! numbers fit its parent's, so that nothing that reads it later meets a surprise.

use layerfs::chunk::ChunkRead;
use layerfs::content::Content;
use layerfs::inode::{Dentry, Inode, Node, Target};
use layerfs::manifest::Manifest;
use layerfs::{ChunkId, Error, Ino, LayerId, Result};

use crate::scan::{Part, Piece, Records, table_pieces, walk_content};

/// Presence is asked for in batches of this many ids.
const BATCH: usize = 1024;

/// Says which of some chunks are there (and allowed to be referred to).
pub type Present<'a> = dyn FnMut(&[ChunkId]) -> Result<Vec<bool>> + 'a;

/// Checks layer `id`, whose parent (if any) was checked before or is held.
///
/// # Errors
/// [`Error::ChunkMissing`] or [`Error::LayerMissing`] if something isn't there, [`Error::Corrupt`] if it is malformed.
pub fn check_layer<R: ChunkRead + ?Sized>(chunks: &R, id: LayerId, present: &mut Present<'_>) -> Result<()> {
    let mut check = Check { chunks, present, batch: Vec::with_capacity(BATCH) };
    check.need(id.0)?;
    check.flush()?;
    let manifest = Manifest::decode(&chunks.get(&id.0)?)?;
    check_parent(chunks, &manifest)?;
    check.dentries(&manifest)?;
    check.inodes(&manifest)?;
    check.flush()
}

fn check_parent<R: ChunkRead + ?Sized>(chunks: &R, manifest: &Manifest) -> Result<()> {
    let Some(parent) = manifest.parent else { return Ok(()) };
    let below = Manifest::decode(&chunks.get(&parent.0)?)?;
    if manifest.depth != below.depth + 1 || manifest.next_ino < below.next_ino {
        return Err(Error::corrupt("manifest", "its depth or its inode numbers don't fit its parent's"));
    }
    Ok(())
}

struct Check<'a, 'b, R: ChunkRead + ?Sized> {
    chunks: &'a R,
    present: &'a mut Present<'b>,
    batch: Vec<ChunkId>,
}

impl<R: ChunkRead + ?Sized> Check<'_, '_, R> {
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

    /// The table's pieces, all of them there.
    fn pieces(&mut self, table: &Content) -> Result<Vec<Piece>> {
        let mut nodes = Vec::new();
        let mut node = |id| {
            nodes.push(id);
            Ok(())
        };
        let pieces = table_pieces(self.chunks, table, &mut node, &mut |_, _| Ok(true))?;
        nodes.into_iter().try_for_each(|id| self.need(id))?;
        pieces.iter().try_for_each(|piece| self.need(piece.id))?;
        self.flush()?;
        Ok(pieces)
    }

    fn dentries(&mut self, manifest: &Manifest) -> Result<()> {
        let mut records: Records<'_, Dentry, R> = Records::new(self.chunks, self.pieces(&manifest.dentries)?);
        let mut count = 0;
        let mut last: Option<(Ino, Vec<u8>)> = None;
        while let Some(dentry) = records.next_record()? {
            count += 1;
            let in_range = match dentry.target {
                Target::Inode { ino, .. } => ino < manifest.next_ino && ino != Ino::ROOT,
                Target::Whiteout => manifest.parent.is_some(),
            };
            let key = (dentry.folder, dentry.name);
            if !in_range || key.0 >= manifest.next_ino || last.as_ref().is_some_and(|last| *last >= key) {
                return Err(Error::corrupt("dentry table", format!("the entry in folder {} is out of order", key.0)));
            }
            last = Some(key);
        }
        expect("dentries", count, manifest.dentry_count)
    }

    fn inodes(&mut self, manifest: &Manifest) -> Result<()> {
        let chunks = self.chunks;
        let mut records: Records<'_, Inode, R> = Records::new(chunks, self.pieces(&manifest.inodes)?);
        let (mut count, mut file_bytes) = (0, 0u64);
        let mut last: Option<Ino> = None;
        let mut has_root = false;
        while let Some(inode) = records.next_record()? {
            count += 1;
            if inode.ino >= manifest.next_ino || last.is_some_and(|last| last >= inode.ino) {
                return Err(Error::corrupt("inode table", format!("inode {} is out of order", inode.ino)));
            }
            last = Some(inode.ino);
            has_root |= inode.ino == Ino::ROOT && matches!(inode.node, Node::Folder);
            if let Node::File(content) = &inode.node {
                file_bytes = file_bytes.saturating_add(content.len());
                walk_content(chunks, content, &mut |part| {
                    let (Part::Node(id) | Part::Chunk(id, _)) = part;
                    self.need(id)?;
                    // What a node refers to can be read only if it is there.
                    if matches!(part, Part::Node(_)) {
                        self.flush()?
                    }
                    Ok(true)
                })?;
            }
        }
        if manifest.parent.is_none() && !has_root {
            return Err(Error::corrupt("inode table", "a layer without parent has no root folder"));
        }
        expect("inodes", count, manifest.inode_count)?;
        expect("bytes of files", file_bytes, manifest.file_bytes)
    }
}

fn expect(what: &str, found: u64, stated: u64) -> Result<()> {
    if found == stated {
        return Ok(());
    }
    Err(Error::corrupt("manifest", format!("it states {stated} {what}, there are {found}")))
}
