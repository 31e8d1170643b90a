//! The records of mounts: what a daemon that starts again has to mount. FORMAT.md, "Mounts".
//!
//! Invariant: a mount that is up has a record; one that somebody unmounted has none.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Flags, Transport};
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId, UpperId};
use crate::store::db::{Batch, Cf, Db, Entry, Sync};

/// What is mounted where, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MountRecord {
    /// The mount point, absolute.
    pub dir: PathBuf,
    /// What the user asked for: a layer's name. It is the mount's source in `/proc/mounts`.
    pub source: String,
    /// The layer that a read-only mount shows; that of a writable one is its upper's base.
    pub layer: Option<LayerId>,
    /// The upper; none if the mount is read-only.
    pub upper: Option<UpperId>,
    /// Whether users other than the one who mounted may use it.
    pub allow_other: bool,
    /// How many threads serve it.
    pub threads: u16,
    /// How requests shall come.
    pub transport: Transport,
    /// Whether large files of lower layers shall have the kernel's writeback cache.
    pub writeback: bool,
    /// The filesystem's device number: where it was unmounted but has copies nothing else tells it. Records of earlier versions don't.
    pub device: Option<u64>,
    /// What the kernel shall keep of the mount.
    pub flags: Flags,
}

/// Beside how requests shall come: the writeback cache.
const WRITEBACK: u8 = 1 << 7;

impl MountRecord {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(96);
        // An earlier version, which doesn't know of flags, reads what has none.
        out.put_u8(if self.flags.is_empty() { 2 } else { 3 });
        out.put_bytes16(self.source.as_bytes());
        out.put_u8(u8::from(self.layer.is_some()));
        out.put_id(&self.layer.map_or(ChunkId([0; 32]), |layer| layer.0));
        out.put_u64(self.upper.map_or(0, |upper| upper.0));
        out.put_u8(u8::from(self.allow_other));
        out.put_u16(self.threads);
        let transport = match self.transport {
            Transport::Auto => 0,
            Transport::Uring => 1,
            Transport::Read => 2,
        };
        out.put_u8(transport | if self.writeback { WRITEBACK } else { 0 });
        out.put_u64(self.device.unwrap_or(0));
        if !self.flags.is_empty() {
            out.put_u16(self.flags.bits());
        }
        out
    }

    fn decode(dir: &[u8], row: &[u8]) -> Result<MountRecord> {
        let mut reader = Reader::new("mount record", row);
        let version = reader.u8()?;
        if !(1..=3).contains(&version) {
            return Err(Error::Unsupported { what: "mount record", detail: format!("version {version}") });
        }
        let source = String::from_utf8_lossy(reader.bytes16()?).into_owned();
        let has_layer = reader.u8()? != 0;
        let layer = Some(LayerId(reader.id()?)).filter(|_| has_layer);
        let upper = Some(UpperId(reader.u64()?)).filter(|upper| upper.0 != 0);
        let (allow_other, threads) = (reader.u8()? != 0, reader.u16()?);
        let manner = reader.u8()?;
        let writeback = manner & WRITEBACK != 0;
        let transport = match manner & !WRITEBACK {
            1 => Transport::Uring,
            2 => Transport::Read,
            _ => Transport::Auto,
        };
        let device = if version == 1 { 0 } else { reader.u64()? };
        let device = Some(device).filter(|device| *device != 0);
        let flags = if version < 3 { Flags::default() } else { Flags::from_bits(reader.u16()?)? };
        reader.finish()?;
        let dir = PathBuf::from(OsStr::from_bytes(dir));
        Ok(MountRecord { dir, source, layer, upper, allow_other, threads, transport, writeback, device, flags })
    }
}

/// All records, by mount point.
pub fn list(db: &Db) -> Result<Vec<MountRecord>> {
    let row = |row: Result<Entry>| row.and_then(|(dir, row)| MountRecord::decode(&dir, &row));
    db.iter(Cf::Mounts, b"/")?.map(row).collect()
}

/// The layers that mounts show: roots for the garbage collection.
pub fn roots(db: &Db) -> Result<Vec<LayerId>> {
    Ok(list(db)?.into_iter().filter_map(|record| record.layer).collect())
}

/// Keeps a record, durably.
pub fn put(db: &Db, record: &MountRecord) -> Result<()> {
    let mut batch = Batch::new();
    batch.put(Cf::Mounts, record.dir.as_os_str().as_bytes(), record.encode());
    db.write(batch, Sync::Yes)
}

/// Drops the record of the mount on `dir`, durably.
pub fn remove(db: &Db, dir: &Path) -> Result<()> {
    let mut batch = Batch::new();
    batch.delete(Cf::Mounts, dir.as_os_str().as_bytes());
    db.write(batch, Sync::Yes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip() {
        let record = MountRecord {
            dir: PathBuf::from(OsStr::from_bytes(b"/mnt/a\xff")),
            source: "debian".to_owned(),
            layer: Some(LayerId(ChunkId::of(b"x"))),
            upper: Some(UpperId(9)),
            allow_other: true,
            threads: 4,
            transport: Transport::Uring,
            writeback: true,
            device: Some(libc::makedev(0, 45)),
            flags: Flags::NO_SUID.and(Flags::READ_ONLY),
        };
        let (transport, flags) = (Transport::Read, Flags::default());
        let bare = MountRecord {
            layer: None,
            upper: None,
            transport,
            writeback: false,
            device: None,
            flags,
            ..record.clone()
        };
        for record in [record, bare] {
            let dir = record.dir.as_os_str().as_bytes().to_vec();
            assert_eq!(MountRecord::decode(&dir, &record.encode()).unwrap(), record);
        }
    }

    #[test]
    fn golden_record() {
        let layer = Some(LayerId(ChunkId([0xee; 32])));
        let (dir, source) = (PathBuf::from("/mnt"), "x".to_owned());
        let (upper, transport) = (Some(UpperId(9)), Transport::Uring);
        let (allow_other, threads, writeback, device) = (true, 4, true, Some(0x2d));
        let flags = Flags::default();
        let record =
            MountRecord { dir, source, layer, upper, allow_other, threads, transport, writeback, device, flags };
        let hex = |record: &MountRecord| record.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let body = format!("010078{}{}09000000000000000104{}", "01", "ee".repeat(32), "0081");
        assert_eq!(hex(&record), format!("02{body}2d00000000000000"));
        let protected = MountRecord { flags: Flags::NO_SUID.and(Flags::NO_EXEC), ..record.clone() };
        assert_eq!(hex(&protected), format!("03{body}2d000000000000000a00"));
        let bytes = format!("01{body}");
        let digits = (0..bytes.len()).step_by(2).map(|at| u8::from_str_radix(&bytes[at..at + 2], 16).unwrap());
        let earlier = MountRecord::decode(b"/mnt", &digits.collect::<Vec<u8>>()).unwrap();
        assert_eq!(earlier, MountRecord { device: None, ..record });
    }
}
