//! Writes a table file from a layer's chunks, in one pass and in bounded memory.
//!
//! Hides the order in which the file comes to be: five regions grow side by side, the header with the checksum
//! is written last. What a table's readers rely on, counts, order and numbers, is checked by [`Records`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{HEADER_BYTES, Layout, checksum_of, encode_header};
use crate::chunk::ChunkRead;
use crate::closure::Records;
use crate::error::{Error, Result};
use crate::id::LayerId;
use crate::manifest::Manifest;

const REGION_BUFFER_BYTES: usize = 256 * 1024;

/// Part of the file that is written from its start to its end.
struct Region<'a> {
    file: &'a File,
    path: &'a Path,
    at: u64,
    buffer: Vec<u8>,
}

impl<'a> Region<'a> {
    fn new(file: &'a File, path: &'a Path, at: u64) -> Region<'a> {
        Region { file, path, at, buffer: Vec::new() }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= REGION_BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn push_u64(&mut self, value: u64) -> Result<()> {
        self.push(&value.to_le_bytes())
    }

    fn flush(&mut self) -> Result<()> {
        self.file.write_all_at(&self.buffer, self.at).map_err(|e| Error::file("write", self.path, e))?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// Writes the table of `layer` to the empty `file`, which `path` names in errors.
pub(super) fn write(
    chunks: &dyn ChunkRead,
    layer: LayerId,
    manifest: &Manifest,
    file: &File,
    path: &Path,
) -> Result<()> {
    let mut layout = Layout::of_manifest(manifest)?;
    write_inodes(chunks, manifest, &layout, file, path)?;
    layout.folder_count = write_dentries(chunks, manifest, &layout, file, path)?;
    let length = layout.end()?;
    file.set_len(length).map_err(|e| Error::file("extend", path, e))?;
    let mut header = encode_header(layer, &layout);
    let checksum = checksum_of(&header, file, path)?;
    header[HEADER_BYTES - 32..].copy_from_slice(checksum.as_bytes());
    file.write_all_at(&header, 0).map_err(|e| Error::file("write", path, e))
}

fn write_inodes(chunks: &dyn ChunkRead, manifest: &Manifest, layout: &Layout, file: &File, path: &Path) -> Result<()> {
    let mut run = Region::new(file, path, layout.inodes()?.start);
    let mut index = Region::new(file, path, layout.inode_index()?.start);
    let mut records = Records::inodes(chunks, manifest)?;
    let mut position = 0u64;
    while let Some(inode) = records.next_inode()? {
        run.push(records.record())?;
        index.push_u64(inode.ino.0)?;
        index.push_u64(position)?;
        position += records.record().len() as u64;
    }
    run.flush()?;
    index.flush()
}

/// Returns the number of folders that have dentries.
fn write_dentries(
    chunks: &dyn ChunkRead,
    manifest: &Manifest,
    layout: &Layout,
    file: &File,
    path: &Path,
) -> Result<u64> {
    let mut run = Region::new(file, path, layout.dentries()?.start);
    let mut offsets = Region::new(file, path, layout.dentry_offsets()?.start);
    let mut folders = Region::new(file, path, layout.folder_index_start()?);
    let mut records = Records::dentries(chunks, manifest)?;
    let (mut count, mut position, mut folder_count) = (0u64, 0u64, 0u64);
    let mut last_folder = None;
    while let Some(dentry) = records.next_dentry()? {
        if last_folder != Some(dentry.folder) {
            folders.push_u64(dentry.folder.0)?;
            folders.push_u64(count)?;
            folder_count += 1;
            last_folder = Some(dentry.folder);
        }
        offsets.push_u64(position)?;
        run.push(records.record())?;
        position += records.record().len() as u64;
        count += 1;
    }
    run.flush()?;
    offsets.flush()?;
    folders.flush()?;
    Ok(folder_count)
}
