//! Export as one tar that GNU tar, bsdtar and the OCI tools read.
//!
//! Decisions hidden here: which pax records stand for what ustar lacks (nanoseconds, extended attributes and ACLs
//! by star's names, sparse files by GNU's format 1.0). Invariants: the tar depends on the tree alone; entries come
//! in the order of the walk, each folder before what is in it; the first name of an inode carries it, the others
//! are hard links to that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;

use super::attrs::{Loss, Losses};
use super::compress::{Compression, Compressor};
use super::feed::{self, Feed};
use super::header::{self, Header, Kind};
use super::{ExportReport, acl};
use crate::chunk::ChunkRead;
use crate::content::{Content, Extent, Extents};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::{Inode, Node};
use crate::monitor::{self, Monitor};
use crate::view::View;
use crate::walk::Walker;

/// Tars end at a multiple of this many bytes (20 blocks), as tar programs expect.
const RECORD: u64 = 20 * header::BLOCK as u64;

/// Writes the merged tree of `view` to `out`.
pub fn export(
    view: &View,
    compression: Compression,
    out: &mut dyn Write,
    monitor: &dyn Monitor,
) -> Result<ExportReport> {
    let failed = |e| Error::io("writing the tar", e);
    let mut compressor = Compressor::new(out, compression).map_err(failed)?;
    let losses = Losses::default();
    let (entries, data_bytes) = feed::run(
        &**view.chunks(),
        monitor,
        |feed| write_tree(view, TarWriter::new(&**view.chunks(), feed, &losses, monitor, Style::Tar)),
        |piece| compressor.write_all(piece).map_err(failed),
    )?;
    compressor.finish().map_err(failed)?;
    Ok(ExportReport { entries, data_bytes, warnings: losses.report(monitor), oci_manifest: None })
}

fn write_tree(view: &View, mut tar: TarWriter<'_, '_>) -> Result<(u64, u64)> {
    tar.inode(b"", &view.expect_inode(Ino::ROOT)?)?;
    let mut walker = Walker::new(view);
    while let Some(entry) = walker.next_entry()? {
        let inode = view.expect_inode(entry.ino)?;
        tar.inode(entry.path, &inode)?;
    }
    tar.finish()
}

/// For whom a tar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// For tar programs: paths start with `./`, ACLs are text.
    Tar,
    /// For container tools: paths start with their first part, ACLs are extended attributes like others.
    Oci,
}

/// Writes entries of a tar into a feed.
pub struct TarWriter<'a, 'f> {
    chunks: &'a dyn ChunkRead,
    feed: &'a mut Feed<'f>,
    losses: &'a Losses,
    monitor: &'a dyn Monitor,
    style: Style,
    /// The first path of each inode that has more names to come, and how many.
    links: HashMap<Ino, (Vec<u8>, u32)>,
    written: u64,
    entries: u64,
    data_bytes: u64,
}

impl<'a, 'f> TarWriter<'a, 'f> {
    /// A writer of a tar in `style`.
    pub fn new(
        chunks: &'a dyn ChunkRead,
        feed: &'a mut Feed<'f>,
        losses: &'a Losses,
        monitor: &'a dyn Monitor,
        style: Style,
    ) -> TarWriter<'a, 'f> {
        let (links, written, entries, data_bytes) = (HashMap::new(), 0, 0, 0);
        TarWriter { chunks, feed, losses, monitor, style, links, written, entries, data_bytes }
    }

    /// Appends `inode` under `path`, which has no slash at either end and is empty for the root.
    pub fn inode(&mut self, path: &[u8], inode: &Inode) -> Result<()> {
        monitor::check(self.monitor)?;
        let mut full = self.full(path);
        let (kind, link, device): (_, &[u8], _) = match &inode.node {
            Node::File(_) => (Kind::File, b"", 0),
            Node::Folder => (Kind::Folder, b"", 0),
            Node::Symlink(target) => (Kind::Symlink, target, 0),
            Node::BlockDevice(number) => (Kind::BlockDevice, b"", *number),
            Node::CharDevice(number) => (Kind::CharDevice, b"", *number),
            Node::Fifo => (Kind::Fifo, b"", 0),
            Node::Socket => {
                self.losses.add(Loss::Socket, || String::from_utf8_lossy(path).into_owned());
                return Ok(());
            }
        };
        if kind == Kind::Folder && !full.ends_with(b"/") {
            full.push(b'/');
        }
        self.entries += 1;
        self.monitor.items(1);
        let (uid, gid, mtime, permissions) =
            (inode.attrs.uid, inode.attrs.gid, inode.attrs.mtime, inode.attrs.permissions);
        let (records, sparse_size, size) = (Vec::new(), None, 0);
        let mut header =
            Header { path: &full, kind, link, permissions, uid, gid, size, mtime, device, records, sparse_size };
        if kind != Kind::Folder
            && inode.nlink > 1
            && let Some(first) = self.earlier_name(inode, &full)
        {
            return self.put(&Header { kind: Kind::HardLink, link: &first, device: 0, ..header }.encode());
        }
        header.records = xattr_records(inode, self.style)?;
        match &inode.node {
            Node::File(content) => self.file(header, content),
            _ => self.put(&header.encode()),
        }
    }

    fn full(&self, path: &[u8]) -> Vec<u8> {
        match self.style {
            Style::Oci if !path.is_empty() => path.to_vec(),
            _ => [b"./", path].concat(),
        }
    }

    /// Appends an empty file at `path`: a whiteout.
    pub fn marker(&mut self, path: &[u8]) -> Result<()> {
        let full = self.full(path);
        let (kind, mtime, records) = (Kind::File, Default::default(), Vec::new());
        let (link, permissions, uid, gid, size, device, sparse_size) = (&b""[..], 0o600, 0, 0, 0, 0, None);
        let header =
            Header { path: &full, kind, link, permissions, uid, gid, size, mtime, device, records, sparse_size };
        self.entries += 1;
        self.put(&header.encode())
    }

    /// Ends the tar. Returns the number of entries and the bytes of data.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        let ended = self.written + 2 * header::BLOCK as u64;
        self.zeros((ended.next_multiple_of(RECORD) - self.written) as usize)?;
        Ok((self.entries, self.data_bytes))
    }

    /// The name under which `inode` was written before; if there is none, `path` is it from now on.
    fn earlier_name(&mut self, inode: &Inode, path: &[u8]) -> Option<Vec<u8>> {
        match self.links.entry(inode.ino) {
            Entry::Vacant(vacant) => {
                vacant.insert((path.to_vec(), inode.nlink - 1));
                None
            }
            Entry::Occupied(mut occupied) => {
                let (first, to_come) = occupied.get_mut();
                *to_come -= 1;
                Some(if *to_come == 0 { occupied.remove().0 } else { first.clone() })
            }
        }
    }

    fn file(&mut self, mut header: Header<'_>, content: &Content) -> Result<()> {
        if content.data_bytes() < content.len() {
            return self.sparse_file(header, content);
        }
        header.size = content.len();
        self.put(&header.encode())?;
        match content {
            Content::Inline(bytes) => {
                self.put(bytes)?;
                self.advance(bytes.len() as u64);
            }
            Content::Extents { .. } => self.data(content)?,
        }
        self.zeros(header::padding(content.len()))
    }

    /// A file with holes: its map comes first, as decimal lines padded to a block, then its data without the holes.
    fn sparse_file(&mut self, mut header: Header<'_>, content: &Content) -> Result<()> {
        let mut count = 0u64;
        let mut map_bytes = 0;
        sparse_runs(self.chunks, content, |offset, bytes| {
            count += 1;
            map_bytes += map_line(offset).len() + map_line(bytes).len();
            Ok(())
        })?;
        let count_line = map_line(count);
        map_bytes += count_line.len();
        let map_padding = header::padding(map_bytes as u64);
        header.sparse_size = Some(content.len());
        header.size = (map_bytes + map_padding) as u64 + content.data_bytes();
        let (head, chunks) = (header.encode(), self.chunks);
        self.put(&head)?;
        self.put(&count_line)?;
        sparse_runs(chunks, content, |offset, bytes| self.put(&[map_line(offset), map_line(bytes)].concat()))?;
        self.zeros(map_padding)?;
        self.data(content)?;
        self.zeros(header::padding(content.data_bytes()))
    }

    fn data(&mut self, content: &Content) -> Result<()> {
        for extent in Extents::new(self.chunks, content, 0)? {
            if let (_, Extent::Chunk { id, bytes }) = extent? {
                self.feed.chunk(id, bytes)?;
                self.written += u64::from(bytes);
                self.advance(u64::from(bytes));
            }
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) {
        self.data_bytes += bytes;
        self.monitor.advance(bytes);
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.feed.bytes(bytes)
    }

    fn zeros(&mut self, count: usize) -> Result<()> {
        self.written += count as u64;
        self.feed.zeros(count)
    }
}

/// Gives the runs of data in `content`, and an empty one at the end of a file that ends in a hole.
fn sparse_runs(chunks: &dyn ChunkRead, content: &Content, mut take: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let mut run: Option<(u64, u64)> = None;
    for extent in Extents::new(chunks, content, 0)? {
        let (at, extent) = extent?;
        match (extent, &mut run) {
            (Extent::Chunk { bytes, .. }, Some((_, length))) => *length += u64::from(bytes),
            (Extent::Chunk { bytes, .. }, None) => run = Some((at, u64::from(bytes))),
            (Extent::Hole { .. }, _) => {
                if let Some((offset, length)) = run.take() {
                    take(offset, length)?;
                }
            }
        }
    }
    let (offset, length) = run.unwrap_or((content.len(), 0));
    take(offset, length)
}

fn map_line(number: u64) -> Vec<u8> {
    format!("{number}\n").into_bytes()
}

/// The pax records of an inode's extended attributes.
fn xattr_records(inode: &Inode, style: Style) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let record = |(name, value): &(Vec<u8>, Vec<u8>)| {
        let key: &[u8] = match name.as_slice() {
            acl::ACCESS if style == Style::Tar => b"SCHILY.acl.access",
            acl::DEFAULT if style == Style::Tar => b"SCHILY.acl.default",
            _ => return Ok(header::xattr_record(name, value)),
        };
        Ok((key.to_vec(), acl::to_text(value)?.into_bytes()))
    };
    inode.xattrs.iter().map(record).collect()
}
