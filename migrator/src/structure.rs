//! What a layer consists of besides its data: the manifest, the tables' list nodes and pieces, the files' list nodes.
//!
//! That is what a mount needs before any byte of a file is read, so a lazy transfer asks for it first, and for nothing
//! else. Memory: half an id for each chunk of structure, up to a bound; beyond it some are asked for twice.

use std::collections::HashSet;

use layerfs::chunk::{ChunkRead, Class};
use layerfs::closure::{Opened, Part, Records, walk_new};
use layerfs::inode::Node;
use layerfs::manifest::Manifest;
use layerfs::{ChunkId, LayerId, Result};

use crate::plan::Candidate;

/// The most ids that are remembered.
const MAX_KNOWN: usize = 500_000;

/// Gives the structure of `layers` to `sink`, each chunk after the one that refers to it.
///
/// # Errors
/// Those of `sink` and of reading.
pub fn candidates(
    chunks: &dyn ChunkRead,
    layers: &[LayerId],
    sink: &mut dyn FnMut(Candidate) -> Result<()>,
) -> Result<()> {
    let mut known: HashSet<[u8; 16]> = HashSet::new();
    let mut once = |id: ChunkId, bytes: u32, class: Class| {
        let mut half = [0; 16];
        half.copy_from_slice(&id.0[..16]);
        if known.contains(&half) {
            return Ok(());
        }
        if known.len() < MAX_KNOWN {
            known.insert(half);
        }
        sink(Candidate { class, ..Candidate::new(id, bytes) })
    };
    // Of files less is given than of tables.
    let (mut of_tables, mut of_files) = (Opened::default(), Opened::default());
    for layer in layers {
        let bytes = chunks.get(&layer.0)?;
        once(layer.0, bytes.len() as u32, Class::Manifest)?;
        let manifest = Manifest::decode(&bytes)?;
        let image = manifest.image.iter().map(|image| (image, Class::Data));
        for (content, class) in
            [(&manifest.dentries, Class::Table), (&manifest.inodes, Class::Table)].into_iter().chain(image)
        {
            walk_new(chunks, content, &mut of_tables, &mut |part| {
                match part {
                    Part::Chunk(id, bytes) => once(id, bytes, class)?,
                    Part::Node(id) => once(id, 0, Class::List)?,
                }
                Ok(true)
            })?;
        }
        let mut inodes = Records::inodes(chunks, &manifest)?;
        while let Some(inode) = inodes.next_inode()? {
            if let Node::File(content) = &inode.node {
                walk_new(chunks, content, &mut of_files, &mut |part| match part {
                    Part::Node(id) => once(id, 0, Class::List).map(|()| true),
                    Part::Chunk(..) => Ok(true),
                })?;
            }
        }
    }
    Ok(())
}
