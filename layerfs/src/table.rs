//! A sealed layer's tables as one mapped file: found by binary search, never parsed as a whole, no heap per entry.
//!
//! FORMAT.md, "Table files". The file is derived from the layer's manifest and chunks: a missing or damaged one is
//! built again. It is verified against its checksum whenever it is opened. Layout, all numbers little-endian:
//!
//! ```text
//! header          128 bytes, see encode_header
//! dentries        the dentry records, byte for byte as in the layer's table
//! inodes          the inode records, likewise
//! dentry offsets  u64 × dentries: where each record starts in the run
//! inode index     (u64 number, u64 offset in the run) × inodes
//! folder index    (u64 folder, u64 index of its first dentry) × folders that have dentries
//! ```
//!
//! Invariants: a table file is only ever replaced whole, so a mapping stays valid; the records in it have been
//! decoded once and their order and counts checked when it was built.

mod build;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::chunk::ChunkRead;
use crate::closure::{MIN_DENTRY_BYTES, MIN_INODE_BYTES};
use crate::codec::{Put, Reader};
use crate::durable;
use crate::error::{Error, ErrorClass, Result};
use crate::id::{Ino, LayerId};
use crate::inode::{DentryRef, Inode, Stat, Target};
use crate::manifest::Manifest;

const MAGIC: &[u8; 4] = b"LFTB";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 128;
/// Small enough that what is read is still in the processor's cache when it is hashed.
const READ_BYTES: usize = 128 * 1024;

/// Mapped pages count as the process's memory. So that a tree of any size stays cheap, what reads much of larger
/// tables than this gives their pages back after so many steps.
pub(crate) const KEPT_BYTES: u64 = 32 * 1024 * 1024;
/// The steps.
pub(crate) const RELEASE_EVERY: u64 = 1 << 15;

/// Where the parts of a table file lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    dentry_bytes: u64,
    inode_bytes: u64,
    dentry_count: u64,
    inode_count: u64,
    folder_count: u64,
}

impl Layout {
    /// The layout for `manifest`, folders not counted yet.
    fn of_manifest(manifest: &Manifest) -> Result<Layout> {
        let layout = Layout {
            dentry_bytes: manifest.dentries.len(),
            inode_bytes: manifest.inodes.len(),
            dentry_count: manifest.dentry_count,
            inode_count: manifest.inode_count,
            folder_count: 0,
        };
        let fits = |count: u64, least: u64, bytes: u64| count.checked_mul(least).is_some_and(|needed| needed <= bytes);
        let plausible = fits(layout.dentry_count, MIN_DENTRY_BYTES, layout.dentry_bytes)
            && fits(layout.inode_count, MIN_INODE_BYTES, layout.inode_bytes);
        if plausible { Ok(layout) } else { Err(Error::corrupt("manifest", "more records than its tables can hold")) }
    }

    /// The region of `count` items of `width` bytes after `start`.
    fn region(start: u64, count: u64, width: u64) -> Result<Range<u64>> {
        let end = count.checked_mul(width).and_then(|bytes| start.checked_add(bytes));
        let end = end.filter(|end| *end <= i64::MAX as u64);
        Ok(start..end.ok_or_else(|| Error::corrupt("table file", "impossible sizes"))?)
    }

    fn dentries(&self) -> Result<Range<u64>> {
        Layout::region(HEADER_BYTES as u64, self.dentry_bytes, 1)
    }

    fn inodes(&self) -> Result<Range<u64>> {
        Layout::region(self.dentries()?.end, self.inode_bytes, 1)
    }

    fn dentry_offsets(&self) -> Result<Range<u64>> {
        Layout::region(self.inodes()?.end, self.dentry_count, 8)
    }

    fn inode_index(&self) -> Result<Range<u64>> {
        Layout::region(self.dentry_offsets()?.end, self.inode_count, 16)
    }

    fn folder_index_start(&self) -> Result<u64> {
        Ok(self.inode_index()?.end)
    }

    fn end(&self) -> Result<u64> {
        Ok(Layout::region(self.folder_index_start()?, self.folder_count, 16)?.end)
    }
}

/// The header, its checksum zero. FORMAT.md, "Table files".
fn encode_header(layer: LayerId, layout: &Layout) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.put_u16(VERSION);
    header.put_u16(0);
    header.put_id(&layer.0);
    header.put_u64(layout.dentry_bytes);
    header.put_u64(layout.inode_bytes);
    header.put_u64(layout.dentry_count);
    header.put_u64(layout.inode_count);
    header.put_u64(layout.folder_count);
    header.resize(HEADER_BYTES, 0);
    header
}

/// BLAKE3 of the header up to its checksum, and of everything after it. Reads the file, as pages that are mapped
/// for that alone would count as the process's memory.
fn checksum_of(header: &[u8], file: &File, path: &Path) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..HEADER_BYTES - 32]);
    let mut buffer = vec![0; READ_BYTES];
    let mut position = HEADER_BYTES as u64;
    loop {
        match file.read_at(&mut buffer, position).map_err(|e| Error::file("read", path, e))? {
            0 => return Ok(hasher.finalize()),
            count => {
                hasher.update(&buffer[..count]);
                position += count as u64;
            }
        }
    }
}

/// The file of `layer`'s table in the folder `tables`.
pub fn table_path(tables: &Path, layer: LayerId) -> PathBuf {
    tables.join(format!("{layer}.table"))
}

/// The mapped tables of one sealed layer.
#[derive(Debug)]
pub struct Table {
    map: Mmap,
    layout: Layout,
    dentries: Range<usize>,
    inodes: Range<usize>,
    dentry_offsets: Range<usize>,
    inode_index: Range<usize>,
    folder_index: Range<usize>,
}

impl Table {
    /// Opens the table of `layer` in the folder `tables`, building it from `chunks` if it isn't there or is damaged.
    /// If the folder can't be written to (no space, no permission, a read-only disk), the table is kept in memory.
    ///
    /// # Errors
    /// Those of `chunks`, and [`Error::Corrupt`] if the layer's records are malformed.
    pub fn open(chunks: &dyn ChunkRead, tables: &Path, layer: LayerId, manifest: &Manifest) -> Result<Table> {
        let path = table_path(tables, layer);
        match File::open(&path) {
            Ok(file) => match Table::map(&file, &path, layer, manifest) {
                Ok(table) => return Ok(table),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the table file is unusable and is built again")
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the table file can't be opened and is built again")
            }
        }
        match Table::build_at(chunks, &path, layer, manifest) {
            Err(error @ (Error::File { .. } | Error::Io { .. }))
                if matches!(error.class(), ErrorClass::Denied | ErrorClass::NoSpace | ErrorClass::NotFound) =>
            {
                tracing::warn!(path = %path.display(), %error, "the table can't be stored and is kept in memory");
                Table::build_in_memory(chunks, layer, manifest)
            }
            done => done,
        }
    }

    fn build_at(chunks: &dyn ChunkRead, path: &Path, layer: LayerId, manifest: &Manifest) -> Result<Table> {
        let (file, temporary) = durable::create_temporary(path, 0o600)?;
        let built = build::write(chunks, layer, manifest, &file, &temporary)
            .and_then(|()| durable::persist(&file, &temporary, path))
            .and_then(|()| Table::map(&file, path, layer, manifest));
        if built.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        built
    }

    fn build_in_memory(chunks: &dyn ChunkRead, layer: LayerId, manifest: &Manifest) -> Result<Table> {
        let path = Path::new("memory");
        let memory = rustix::fs::memfd_create("layerfs-table", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(memory.map_err(|e| Error::io("creating a file in memory", e))?);
        build::write(chunks, layer, manifest, &file, path)?;
        Table::map(&file, path, layer, manifest)
    }

    /// Maps `file` after checking all of it.
    fn map(file: &File, path: &Path, layer: LayerId, manifest: &Manifest) -> Result<Table> {
        let damaged = |detail: &str| Error::corrupt("table file", detail);
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|e| Error::file("read", path, e))?;
        let layout = decode_header(&header, layer)?;
        let length = file.metadata().map_err(|e| Error::file("examine", path, e))?.len();
        if layout.end()? != length {
            return Err(damaged("its length is not what its header says"));
        }
        if (Layout { folder_count: 0, ..layout }) != Layout::of_manifest(manifest)? {
            return Err(damaged("its counts are not the manifest's"));
        }
        if checksum_of(&header, file, path)?.as_bytes() != &header[HEADER_BYTES - 32..] {
            return Err(damaged("its checksum is wrong"));
        }
        // SAFETY: the file is private to the store, and table files are replaced by renaming and never written or
        // truncated in place, so the mapped bytes don't change.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(file) }.map_err(|e| Error::file("map", path, e))?;
        let region = |range: Range<u64>| range.start as usize..range.end as usize;
        Ok(Table {
            dentries: region(layout.dentries()?),
            inodes: region(layout.inodes()?),
            dentry_offsets: region(layout.dentry_offsets()?),
            inode_index: region(layout.inode_index()?),
            folder_index: region(layout.folder_index_start()?..layout.end()?),
            layout,
            map,
        })
    }

    /// Inode records.
    pub fn inode_count(&self) -> u64 {
        self.layout.inode_count
    }

    /// Dentry records, whiteouts included.
    pub fn dentry_count(&self) -> u64 {
        self.layout.dentry_count
    }

    /// Bytes of the mapped file.
    pub fn mapped_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Gives the pages that reading has mapped back to the page cache; they come again when they are read.
    pub fn release_pages(&self) {
        // SAFETY: the mapping is a read-only one of a file, so that its pages are never lost.
        #[allow(unsafe_code)]
        let released = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        if let Err(error) = released {
            tracing::debug!(%error, "the kernel keeps a table's pages mapped");
        }
    }

    fn u64_at(&self, region: &Range<usize>, index: usize) -> u64 {
        let at = region.start + index * 8;
        let bytes = self.map.get(at..at + 8).and_then(|bytes| bytes.first_chunk::<8>());
        // Out of range only if the checksum lied: a number that is found nowhere.
        bytes.map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Where `key` stands in the sorted index of (key, value) pairs in `region`.
    ///
    /// Keys ascend strictly, so entry `i` is at least `first + i` and at most `last - (count - 1 - i)`: in a dense
    /// index, and most are nearly dense, that leaves one place to look at.
    fn find(&self, region: &Range<usize>, key: u64) -> Option<usize> {
        let count = region.len() / 16;
        let key_at = |index: usize| self.u64_at(region, index * 2);
        if count == 0 || key < key_at(0) || key > key_at(count - 1) {
            return None;
        }
        let mut low = (count as u64 - 1).saturating_sub(key_at(count - 1) - key) as usize;
        let mut high = (key - key_at(0)).min(count as u64 - 1) as usize;
        while low <= high {
            let middle = low + (high - low) / 2;
            match key_at(middle).cmp(&key) {
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle.checked_sub(1)?,
            }
        }
        None
    }

    fn run(&self, run: &Range<usize>, offset: u64) -> Result<&[u8]> {
        let start = usize::try_from(offset).ok().and_then(|offset| run.start.checked_add(offset));
        let start = start.filter(|start| *start <= run.end);
        start
            .map(|start| &self.map[start..run.end])
            .ok_or_else(|| Error::corrupt("table file", "an offset beyond its records"))
    }

    /// Where inode `ino` stands among the inode records.
    pub fn inode_position(&self, ino: Ino) -> Option<u64> {
        self.find(&self.inode_index, ino.0).map(|index| index as u64)
    }

    fn inode_reader(&self, position: u64) -> Result<Reader<'_>> {
        let offset = self.u64_at(&self.inode_index, position as usize * 2 + 1);
        Ok(Reader::new("inode table", self.run(&self.inodes, offset)?))
    }

    /// The inode at `position`, below [`Table::inode_count`].
    pub fn inode_at(&self, position: u64) -> Result<Inode> {
        Inode::decode(&mut self.inode_reader(position)?)
    }

    /// What `stat` tells of the inode at `position`, below [`Table::inode_count`].
    pub fn stat_at(&self, position: u64) -> Result<Stat> {
        Stat::decode(&mut self.inode_reader(position)?)
    }

    /// The record of the inode at `position`, without its length, to be compared with another.
    pub fn inode_bytes_at(&self, position: u64) -> Result<&[u8]> {
        self.inode_reader(position)?.bytes32()
    }

    /// The number of the inode at `position`, below [`Table::inode_count`].
    pub fn ino_at(&self, position: u64) -> Ino {
        Ino(self.u64_at(&self.inode_index, position as usize * 2))
    }

    /// Inode `ino`, if this layer has it.
    pub fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        self.inode_position(ino).map(|position| self.inode_at(position)).transpose()
    }

    /// Where the dentries of `folder` stand among the dentry records: sorted by name; empty if this layer has none.
    pub fn folder(&self, folder: Ino) -> Range<u64> {
        match self.find(&self.folder_index, folder.0) {
            None => 0..0,
            Some(index) => {
                let last = index + 1 == self.folder_index.len() / 16;
                let end = if last { self.layout.dentry_count } else { self.u64_at(&self.folder_index, index * 2 + 3) };
                self.u64_at(&self.folder_index, index * 2 + 1)..end
            }
        }
    }

    /// The folders that this layer has dentries of.
    pub fn folders(&self) -> impl Iterator<Item = Ino> {
        (0..self.layout.folder_count as usize).map(|index| Ino(self.u64_at(&self.folder_index, index * 2)))
    }

    /// The dentry at `position`, below [`Table::dentry_count`].
    pub fn dentry_at(&self, position: u64) -> Result<DentryRef<'_>> {
        if position >= self.layout.dentry_count {
            return Err(Error::corrupt("table file", "a dentry beyond its records"));
        }
        let offset = self.u64_at(&self.dentry_offsets, position as usize);
        DentryRef::decode(&mut Reader::new("dentry table", self.run(&self.dentries, offset)?))
    }

    /// The name of the dentry at `position`, without a look at the rest: for searching.
    fn name_at(&self, position: u64) -> Result<&[u8]> {
        let record = self.run(&self.dentries, self.u64_at(&self.dentry_offsets, position as usize))?;
        let name = record.get(17).and_then(|bytes| record.get(18..18 + usize::from(*bytes)));
        name.ok_or_else(|| Error::corrupt("table file", "a dentry beyond its records"))
    }

    /// All dentries, by folder and name. The pages of a large table are released as it goes.
    pub fn dentries(&self) -> impl DoubleEndedIterator<Item = Result<DentryRef<'_>>> {
        (0..self.layout.dentry_count).map(|position| {
            if position % RELEASE_EVERY == RELEASE_EVERY - 1 && self.mapped_bytes() > KEPT_BYTES {
                self.release_pages();
            }
            self.dentry_at(position)
        })
    }

    /// The first position in `range`, which is one folder's, whose name is not less than `name`.
    pub fn lower_bound(&self, range: Range<u64>, name: &[u8]) -> Result<u64> {
        let Range { start: mut low, end: mut high } = range;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.name_at(middle)? < name { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    /// What this layer says of `name` in `folder`.
    pub fn lookup(&self, folder: Ino, name: &[u8]) -> Result<Option<Target>> {
        let range = self.folder(folder);
        let position = self.lower_bound(range.clone(), name)?;
        if position >= range.end {
            return Ok(None);
        }
        let dentry = self.dentry_at(position)?;
        Ok((dentry.name == name).then_some(dentry.target))
    }
}

fn decode_header(header: &[u8], layer: LayerId) -> Result<Layout> {
    let mut reader = Reader::new("table file", header);
    if reader.take(4)? != MAGIC {
        return Err(reader.error("it doesn't begin with LFTB"));
    }
    let (version, flags) = (reader.u16()?, reader.u16()?);
    if version != VERSION || flags != 0 {
        return Err(Error::Unsupported { what: "table file", detail: format!("version {version}, flags {flags:x}") });
    }
    if reader.id()? != layer.0 {
        return Err(reader.error("it belongs to another layer"));
    }
    Ok(Layout {
        dentry_bytes: reader.u64()?,
        inode_bytes: reader.u64()?,
        dentry_count: reader.u64()?,
        inode_count: reader.u64()?,
        folder_count: reader.u64()?,
    })
}
