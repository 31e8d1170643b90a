//! Writes a table file from a layer's chunks, in one pass and in bounded memory.
//!
//! Hides the order in which the file comes to be: five regions grow side by side, the header with the checksum
//! is written last. Everything that a table's readers rely on is checked here: counts, order, kinds, numbers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::records::Records;
use super::{HEADER_BYTES, Layout, checksum_of, encode_header};
use crate::chunk::ChunkRead;
use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::id::{Ino, LayerId};
use crate::inode::{DentryRef, Inode, Target};
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
    let wrong = |detail: String| Error::corrupt("inode table", detail);
    let mut run = Region::new(file, path, layout.inodes()?.start);
    let mut index = Region::new(file, path, layout.inode_index()?.start);
    let mut records = Records::inodes(chunks, &manifest.inodes)?;
    let (mut count, mut position, mut last) = (0u64, 0u64, Ino(0));
    while let Some(record) = records.next_record()? {
        let mut reader = Reader::new("inode record", record);
        let inode = Inode::decode(&mut reader)?;
        reader.finish()?;
        if inode.ino <= last || inode.ino >= manifest.next_ino {
            return Err(wrong(format!("inode {} after {last}, below {}", inode.ino, manifest.next_ino)));
        }
        count += 1;
        if count > manifest.inode_count {
            return Err(wrong(format!("more than {} records", manifest.inode_count)));
        }
        run.push(record)?;
        index.push_u64(inode.ino.0)?;
        index.push_u64(position)?;
        position += record.len() as u64;
        last = inode.ino;
    }
    if count != manifest.inode_count || position != layout.inode_bytes {
        return Err(wrong(format!("{count} records instead of {}", manifest.inode_count)));
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
    let wrong = |detail: String| Error::corrupt("dentry table", detail);
    let mut run = Region::new(file, path, layout.dentries()?.start);
    let mut offsets = Region::new(file, path, layout.dentry_offsets()?.start);
    let mut folders = Region::new(file, path, layout.folder_index_start()?);
    let mut records = Records::dentries(chunks, &manifest.dentries)?;
    let (mut count, mut position, mut folder_count) = (0u64, 0u64, 0u64);
    let mut last = (Ino(0), Vec::new());
    while let Some(record) = records.next_record()? {
        let mut reader = Reader::new("dentry record", record);
        let dentry = DentryRef::decode(&mut reader)?;
        reader.finish()?;
        check_dentry(&dentry, (last.0, &last.1), manifest)?;
        if count == manifest.dentry_count {
            return Err(wrong(format!("more than {count} records")));
        }
        if dentry.folder != last.0 {
            folders.push_u64(dentry.folder.0)?;
            folders.push_u64(count)?;
            folder_count += 1;
            last.0 = dentry.folder;
        }
        last.1.clear();
        last.1.extend_from_slice(dentry.name);
        offsets.push_u64(position)?;
        run.push(record)?;
        position += record.len() as u64;
        count += 1;
    }
    if count != manifest.dentry_count || position != layout.dentry_bytes {
        return Err(wrong(format!("{count} records instead of {}", manifest.dentry_count)));
    }
    run.flush()?;
    offsets.flush()?;
    folders.flush()?;
    Ok(folder_count)
}

fn check_dentry(dentry: &DentryRef<'_>, last: (Ino, &[u8]), manifest: &Manifest) -> Result<()> {
    let in_order = (dentry.folder, dentry.name) > last;
    let in_range = |ino: Ino| ino < manifest.next_ino;
    let target_in_range = match dentry.target {
        Target::Inode { ino, .. } => in_range(ino) && ino != Ino::ROOT,
        Target::Whiteout => manifest.parent.is_some(),
    };
    if in_order && target_in_range && in_range(dentry.folder) {
        return Ok(());
    }
    let name = dentry.name.escape_ascii();
    Err(Error::corrupt(
        "dentry table",
        format!("\"{name}\" in folder {} is out of order or refers to nothing", dentry.folder),
    ))
}
