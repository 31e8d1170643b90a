//! Packs: append-only files of stored chunks. FORMAT.md, "Packs".
//!
//! It hides how chunks lie on disk. Invariants: a record's header stands in front of its bytes and carries all
//! that the index knows, so that packs alone can rebuild it; a pack has one writer at a time; nothing before
//! [`PackWriter::synced_end`] is ever written again; what lies behind a crash's last whole record is ignored.
//!
//! ```text
//! header   magic "LFPK" | version u16 | flags u16 | pack id u64                                    16 bytes
//! record   magic "LFCR" | class u8 | codec u8 | plain u32 | stored u32 | id [32] | crc32 u32       50 bytes
//!          then `stored` bytes; the crc32 is of the 46 bytes in front of it
//! ```

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use bytes::Bytes;

use crate::chunk::{Class, Codec, MAX_CHUNK_BYTES, MAX_STORED_BYTES, StoredChunk};
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::id::ChunkId;
use crate::store::index::Location;
use crate::store::space;

/// A pack's header, in bytes.
pub(crate) const HEADER_BYTES: usize = 16;
/// A record's header, in bytes.
pub(crate) const RECORD_BYTES: usize = 50;
/// A pack that has this many bytes gets no more records.
pub(crate) const TARGET_BYTES: u64 = 64 << 20;
/// What a writer gathers before it writes, in bytes.
const BUFFER_BYTES: usize = 1 << 20;

const MAGIC: &[u8; 4] = b"LFPK";
pub(crate) const RECORD_MAGIC: &[u8; 4] = b"LFCR";
const VERSION: u16 = 1;

/// A pack's number within its store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct PackId(pub u64);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The header of pack `id`.
pub(crate) fn encode_header(id: PackId) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend_from_slice(MAGIC);
    out.put_u16(VERSION);
    out.put_u16(0);
    out.put_u64(id.0);
    out
}

/// Checks that `bytes` is the header of pack `id`.
pub(crate) fn check_header(bytes: &[u8], id: PackId) -> Result<()> {
    let mut reader = Reader::new("pack header", bytes);
    if reader.take(4)? != MAGIC {
        return Err(reader.error(format!("pack {id} doesn't begin with LFPK")));
    }
    let (version, flags) = (reader.u16()?, reader.u16()?);
    if version != VERSION || flags != 0 {
        return Err(Error::Unsupported {
            what: "pack",
            detail: format!("{id} of version {version} with flags {flags:x}"),
        });
    }
    match reader.u64()? {
        found if found == id.0 => Ok(()),
        found => Err(reader.error(format!("pack {id} says that it is {}", PackId(found)))),
    }
}

/// What stands in front of a record's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub class: Class,
    pub codec: Codec,
    pub plain_bytes: u32,
    pub stored_bytes: u32,
    pub id: ChunkId,
}

impl RecordHeader {
    pub fn of(chunk: &StoredChunk) -> RecordHeader {
        RecordHeader {
            class: chunk.class,
            codec: chunk.codec,
            plain_bytes: chunk.plain_bytes,
            stored_bytes: chunk.stored.len() as u32,
            id: chunk.id,
        }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(RECORD_MAGIC);
        out.put_u8(self.class as u8);
        out.put_u8(self.codec as u8);
        out.put_u32(self.plain_bytes);
        out.put_u32(self.stored_bytes);
        out.put_id(&self.id);
        let sum = crc32fast::hash(&out[start..]);
        out.put_u32(sum);
    }

    /// Decodes the [`RECORD_BYTES`] bytes in front of a record.
    pub fn decode(bytes: &[u8]) -> Result<RecordHeader> {
        let mut reader = Reader::new("pack record", bytes);
        let fields = reader.take(RECORD_BYTES - 4)?;
        if reader.u32()? != crc32fast::hash(fields) {
            return Err(reader.error("wrong checksum"));
        }
        let mut reader = Reader::new("pack record", fields);
        if reader.take(4)? != RECORD_MAGIC {
            return Err(reader.error("it doesn't begin with LFCR"));
        }
        let (class, codec) = (reader.u8()?, reader.u8()?);
        let unsupported =
            |field: &str, code| Error::Unsupported { what: "pack record", detail: format!("{field} {code}") };
        let header = RecordHeader {
            class: Class::from_code(class).ok_or_else(|| unsupported("class", class))?,
            codec: Codec::from_code(codec).ok_or_else(|| unsupported("codec", codec))?,
            plain_bytes: reader.u32()?,
            stored_bytes: reader.u32()?,
            id: reader.id()?,
        };
        let plausible = (1..=MAX_CHUNK_BYTES).contains(&(header.plain_bytes as usize))
            && (1..=MAX_STORED_BYTES).contains(&(header.stored_bytes as usize));
        if plausible { Ok(header) } else { Err(reader.error("impossible lengths")) }
    }

    pub fn location(&self, pack: PackId, offset: u32) -> Location {
        Location {
            pack,
            offset,
            stored_bytes: self.stored_bytes,
            plain_bytes: self.plain_bytes,
            class: self.class,
            codec: self.codec,
        }
    }
}

/// Reads from a pack's file.
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    #[cfg(test)]
    bad_blocks::check(file, at..at + bytes.len() as u64)?;
    file.read_exact_at(bytes, at)
}

/// Parts of files that can't be read, as of a disk that is about to die.
#[cfg(test)]
pub(crate) mod bad_blocks {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::ops::Range;
    use std::os::unix::fs::MetadataExt;

    use parking_lot::Mutex;

    /// Device and inode.
    type Key = (u64, u64);

    static BAD: Mutex<BTreeMap<Key, Range<u64>>> = Mutex::new(BTreeMap::new());

    fn key(file: &File) -> Key {
        let metadata = file.metadata().unwrap();
        (metadata.dev(), metadata.ino())
    }

    /// Reads of `file` fail that touch `range`, until they get an empty one.
    pub fn set(file: &File, range: Range<u64>) {
        BAD.lock().insert(key(file), range);
    }

    pub fn check(file: &File, range: Range<u64>) -> std::io::Result<()> {
        match BAD.lock().get(&key(file)) {
            Some(bad) if !bad.is_empty() && bad.start < range.end && range.start < bad.end => {
                Err(std::io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }
}

/// Reads the record of `id` at `location`, unverified but for its header.
pub(crate) fn read_record(file: &File, id: &ChunkId, location: &Location) -> Result<StoredChunk> {
    let damaged = |detail: String| Error::ChunkDamaged { id: *id, detail };
    let mut bytes = vec![0; RECORD_BYTES + location.stored_bytes as usize];
    read_exact_at(file, &mut bytes, u64::from(location.offset)).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged(format!("pack {} ends before it does", location.pack)),
        _ => Error::io("reading a pack", e),
    })?;
    check_record(bytes.into(), id, location)
}

/// The record of `id` that `bytes` are said to be, unverified but for its header.
pub(crate) fn check_record(bytes: Bytes, id: &ChunkId, location: &Location) -> Result<StoredChunk> {
    let damaged = |detail: String| Error::ChunkDamaged { id: *id, detail };
    if bytes.len() as u64 != location.record_bytes() {
        return Err(damaged(format!("pack {} ends before it does", location.pack)));
    }
    let header = RecordHeader::decode(&bytes[..RECORD_BYTES]).map_err(|e| damaged(e.to_string()))?;
    if header.id != *id || header.location(location.pack, location.offset) != *location {
        return Err(damaged(format!("pack {} holds something else in its place", location.pack)));
    }
    let stored = bytes.slice(RECORD_BYTES..);
    Ok(StoredChunk { id: *id, class: header.class, codec: header.codec, plain_bytes: header.plain_bytes, stored })
}

/// Appends to one pack.
#[derive(Debug)]
pub(crate) struct PackWriter {
    id: PackId,
    path: PathBuf,
    file: File,
    /// Where `buffer` will stand in the file.
    written_end: u64,
    synced_end: u64,
    buffer: Vec<u8>,
    /// Whether the pack's entry in its folder is durable.
    folder_synced: bool,
    /// What it leaves free on the disk, in bytes.
    reserve: u64,
}

impl PackWriter {
    /// Creates pack `id` at `path`, which leaves `reserve` bytes free on the disk. What is there already stays, and is an
    /// error.
    pub fn create(id: PackId, path: PathBuf, reserve: u64) -> Result<PackWriter> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        space::require(path.parent().unwrap_or(&path), reserve)?;
        let file = options.open(&path).map_err(|e| Error::file("create", &path, e))?;
        let buffer = encode_header(id);
        let mut writer =
            PackWriter { id, path, file, written_end: 0, synced_end: 0, buffer, folder_synced: false, reserve };
        // What this call made, and nothing else.
        writer.write_out().inspect_err(|_| drop(std::fs::remove_file(&writer.path)))?;
        failpoint::hit("pack.created");
        Ok(writer)
    }

    pub fn id(&self) -> PackId {
        self.id
    }

    /// Where the next record will stand.
    pub fn end(&self) -> u64 {
        self.written_end + self.buffer.len() as u64
    }

    /// Up to where the pack is known to be good and durable.
    pub fn synced_end(&self) -> u64 {
        self.synced_end
    }

    /// Whether the file still has a name.
    pub fn is_linked(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
    }

    pub fn is_full(&self) -> bool {
        self.end() >= TARGET_BYTES
    }

    /// Appends `chunk`.
    pub fn append(&mut self, chunk: &StoredChunk) -> Result<Location> {
        let header = RecordHeader::of(chunk);
        let location = header.location(self.id, self.end() as u32);
        self.buffer.reserve(RECORD_BYTES + chunk.stored.len());
        header.encode(&mut self.buffer);
        self.buffer.extend_from_slice(&chunk.stored);
        if self.buffer.len() >= BUFFER_BYTES {
            self.write_out()?;
            failpoint::hit("pack.appended");
        }
        Ok(location)
    }

    /// Writes what was gathered, without making it durable.
    pub fn write_out(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        space::require(&self.path, self.reserve)?;
        let written = self.file.write_all_at(&self.buffer, self.written_end);
        written.map_err(|e| Error::file("write", &self.path, e))?;
        self.written_end += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Makes everything appended durable.
    pub fn sync(&mut self) -> Result<()> {
        self.write_out()?;
        if self.synced_end < self.written_end {
            self.file.sync_data().map_err(|e| Error::file("sync", &self.path, e))?;
            if !self.folder_synced {
                crate::durable::sync_parent(&self.path)?;
                self.folder_synced = true;
            }
            self.synced_end = self.written_end;
            failpoint::hit("pack.synced");
        }
        Ok(())
    }

    /// Reads back what was appended, synced or not.
    pub fn read(&mut self, id: &ChunkId, location: &Location) -> Result<StoredChunk> {
        self.write_out()?;
        read_record(&self.file, id, location)
    }

    /// Takes back what was appended since the last sync. Returns whether the pack may be appended to again.
    pub fn roll_back(&mut self) -> bool {
        self.buffer = Vec::new();
        let is_whole = self.written_end == self.synced_end || self.file.set_len(self.synced_end).is_ok();
        self.written_end = self.synced_end;
        is_whole && self.synced_end >= HEADER_BYTES as u64
    }

    /// Fails from now on as if the disk were full.
    #[cfg(test)]
    pub fn refuse_writes(&mut self) {
        self.reserve = u64::MAX;
    }

    /// Readies it for its next owner: gives up what memory isn't needed until then.
    pub fn rest(&mut self) {
        self.buffer = Vec::new();
        self.reserve = space::PACK_RESERVE_BYTES;
    }
}
