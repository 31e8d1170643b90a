//! Writes a file's content sparsely: chunks where they belong, nothing where there is a hole.
//!
//! Invariant: a file that is written here allocates no block that is all zero, at multiples of
//! [`HOLE_BLOCK`] bytes, whatever the chunks hold.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::chunk::ChunkRead;
use crate::chunker::{HOLE_BLOCK, is_zero};
use crate::content::{self, Content, Extent, Extents};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::monitor::{self, Monitor};

/// A chunk and where it belongs.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// The chunk.
    pub id: ChunkId,
    /// Its plain length in bytes.
    pub bytes: u32,
}

/// Gives the chunks of `content` to `take`, in groups of about `group_bytes`.
pub fn pieces(
    chunks: &dyn ChunkRead,
    content: &Content,
    group_bytes: u64,
    mut take: impl FnMut(Vec<Piece>) -> Result<()>,
) -> Result<()> {
    let mut group = Vec::new();
    let mut bytes_in_group = 0;
    for extent in Extents::new(chunks, content, 0)? {
        if let (offset, Extent::Chunk { id, bytes }) = extent? {
            group.push(Piece { offset, id, bytes });
            bytes_in_group += u64::from(bytes);
            if bytes_in_group >= group_bytes {
                take(std::mem::take(&mut group))?;
                bytes_in_group = 0;
            }
        }
    }
    if group.is_empty() { Ok(()) } else { take(group) }
}

/// What was written to a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of content, zero blocks among them.
    pub bytes: u64,
    /// Where the last write ended: the file's length, if its writes came in order.
    pub end: u64,
}

/// Writes `group` into `file`; `path` tells its path for messages.
pub fn write_pieces(
    chunks: &dyn ChunkRead,
    file: &File,
    group: &[Piece],
    monitor: &dyn Monitor,
    path: &dyn Fn() -> PathBuf,
) -> Result<Written> {
    let mut written = Written::default();
    for piece in group {
        monitor::check(monitor)?;
        let plain = content::get_sized(chunks, &piece.id, piece.bytes)?;
        let end = write_sparsely(file, piece.offset, &plain).map_err(|e| Error::file("write", path(), e))?;
        monitor.advance(u64::from(piece.bytes));
        written.bytes += u64::from(piece.bytes);
        written.end = end.unwrap_or(written.end);
    }
    Ok(written)
}

/// Writes `data` at `offset` but for the whole blocks in it that are zero. Returns where the last write ended, if
/// there was one.
pub fn write_sparsely(file: &File, offset: u64, data: &[u8]) -> std::io::Result<Option<u64>> {
    let block = HOLE_BLOCK as u64;
    let to_boundary = ((block - offset % block) % block) as usize;
    let mut last_end = None;
    let mut write = |from: usize, to: usize| {
        if from < to {
            file.write_all_at(&data[from..to], offset + from as u64)?;
            last_end = Some(offset + to as u64);
        }
        std::io::Result::Ok(())
    };
    let mut run_start = 0;
    let mut at = to_boundary.min(data.len());
    // A short block at the end of the data may go on in the next chunk: it is written.
    while at + HOLE_BLOCK <= data.len() {
        let end = at + HOLE_BLOCK;
        if is_zero(&data[at..end]) {
            write(run_start, at)?;
            run_start = end;
        }
        at = end;
    }
    write(run_start, data.len())?;
    Ok(last_end)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zero_blocks_are_not_allocated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = File::create_new(&path).unwrap();
        let mut data = vec![7u8; 5 * HOLE_BLOCK];
        data[100..100 + 2 * HOLE_BLOCK].fill(0);
        let offset = HOLE_BLOCK as u64 - 100;
        assert_eq!(write_sparsely(&file, offset, &data).unwrap(), Some(offset + data.len() as u64));
        assert_eq!(write_sparsely(&file, 1 << 20, &[0; HOLE_BLOCK]).unwrap(), None);
        file.sync_all().unwrap();
        let mut expected = vec![0; offset as usize];
        expected.extend_from_slice(&data);
        assert!(std::fs::read(&path).unwrap() == expected);
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 * HOLE_BLOCK as u64);
    }
}
