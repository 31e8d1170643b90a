//! Which files of a mount programs have open, and how: the file `opens` beside an upper's data files.
//!
//! FORMAT.md, "Uppers". A mount outlives its daemon, and the next one has to go on as the kernel remembers it: a file that is
//! passed through has one backing until its last descriptor is closed, and nobody can ask the kernel for its number.
//! Invariant: a record is written before the kernel hears of the opening, and cleared after it told of the closing, so what
//! the kernel has open is here. The file lives in the page cache: it need not survive the machine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};

use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::Ino;

pub(super) const NAME: &str = "opens";
const RECORD_BYTES: usize = 32;
const PASSED: u32 = 1;
const MAPPED: u32 = 2;
const READABLE: u32 = 4;
const WARM: u32 = 8;

/// The kernel's number of a file that it reads and writes without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing(pub u32);

/// How programs have a file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenRecord {
    /// The file.
    pub ino: Ino,
    /// Its backing, if it is passed through and has a descriptor.
    pub backing: Option<Backing>,
    /// How many descriptors it has, at least as many as the kernel thinks.
    pub count: u32,
    /// How many of them can write.
    pub writers: u32,
    /// How many of them can read and write, and so be mapped for writing.
    pub mappers: u32,
    /// Whether its descriptors are passed through; if not, they use the kernel's cache of this mount.
    pub is_passed: bool,
    /// Whether it may be mapped still though its descriptors are closed: a mapping of a file that is passed through isn't ours.
    pub is_mapped: bool,
    /// Whether a descriptor could read since it was first opened.
    pub is_readable: bool,
    /// Whether it is passed through to a warm copy of its sealed bytes, rather than to its data file: nobody writes to it.
    pub is_warm: bool,
    /// The file of the hidden mount that it is passed through to; 0 if it is its own data file.
    pub node: u32,
}

impl OpenRecord {
    /// That nobody has `ino` open.
    pub fn none(ino: Ino) -> OpenRecord {
        let (count, writers, mappers) = (0, 0, 0);
        let (is_passed, is_mapped, is_readable, is_warm) = (false, false, false, false);
        OpenRecord { ino, backing: None, count, writers, mappers, is_passed, is_mapped, is_readable, is_warm, node: 0 }
    }

    /// Whether somebody may write to its data file without our hearing of it.
    pub fn is_written_past_us(&self) -> bool {
        self.is_passed && !self.is_warm && self.node == 0 && (self.writers > 0 || self.is_mapped)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(RECORD_BYTES);
        let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        out.put_u64(self.ino.0);
        out.put_u32(self.backing.map_or(0, |backing| backing.0));
        out.put_u32(self.count);
        out.put_u32(self.writers);
        out.put_u32(self.mappers);
        let how = flag(self.is_passed, PASSED) | flag(self.is_mapped, MAPPED) | flag(self.is_readable, READABLE);
        out.put_u32(how | flag(self.is_warm, WARM));
        out.put_u32(self.node);
        out
    }

    fn decode(row: &[u8]) -> Result<Option<OpenRecord>> {
        let mut reader = Reader::new("record of an open file", row);
        let ino = Ino(reader.u64()?);
        let backing = Some(Backing(reader.u32()?)).filter(|backing| backing.0 != 0);
        let (count, writers, mappers) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let flags = reader.u32()?;
        let is_set = |bit: u32| flags & bit != 0;
        let (is_passed, is_mapped) = (is_set(PASSED), is_set(MAPPED));
        let (is_readable, is_warm) = (is_set(READABLE), is_set(WARM));
        let node = reader.u32()?;
        let record =
            OpenRecord { ino, backing, count, writers, mappers, is_passed, is_mapped, is_readable, is_warm, node };
        Ok(Some(record).filter(|record| record.ino.0 != 0))
    }
}

/// A place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenSlot(u32);

/// The file.
#[derive(Debug)]
pub struct OpenTable {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    free: Vec<u32>,
    /// Slots from here on have never been used.
    next: u32,
}

impl OpenTable {
    /// An empty one, in the upper's `folder`.
    pub(super) fn create(folder: &OwnedFd) -> Result<OpenTable> {
        let file = open(folder, OFlags::TRUNC)?;
        Ok(OpenTable { file, slots: Mutex::default() })
    }

    /// The one that a daemon left which died.
    pub(super) fn resume(folder: &OwnedFd) -> Result<(OpenTable, Vec<(OpenSlot, OpenRecord)>)> {
        let file = open(folder, OFlags::empty())?;
        let failed = |error| Error::io("reading which files are open", error);
        let bytes = file.metadata().map_err(failed)?.len() as usize / RECORD_BYTES * RECORD_BYTES;
        let mut rows = vec![0; bytes];
        file.read_exact_at(&mut rows, 0).map_err(failed)?;
        let (mut records, mut slots) = (Vec::new(), Slots::default());
        for (slot, row) in (0..).zip(rows.chunks_exact(RECORD_BYTES)) {
            match OpenRecord::decode(row)? {
                Some(record) => records.push((OpenSlot(slot), record)),
                None => slots.free.push(slot),
            }
            slots.next = slot + 1;
        }
        Ok((OpenTable { file, slots: Mutex::new(slots) }, records))
    }

    /// A place that nobody has.
    pub fn take(&self) -> OpenSlot {
        let mut slots = self.slots.lock();
        OpenSlot(slots.free.pop().unwrap_or_else(|| {
            slots.next += 1;
            slots.next - 1
        }))
    }

    /// Writes a record.
    pub fn put(&self, slot: OpenSlot, record: &OpenRecord) {
        self.write(slot, &record.encode());
    }

    /// Clears a record, and gives the place back.
    pub fn give_back(&self, slot: OpenSlot) {
        self.write(slot, &[0; RECORD_BYTES]);
        self.slots.lock().free.push(slot.0);
    }

    fn write(&self, slot: OpenSlot, bytes: &[u8]) {
        if let Err(error) = self.file.write_all_at(bytes, u64::from(slot.0) * RECORD_BYTES as u64) {
            tracing::warn!(%error, "cannot note that a file was opened or closed; if this daemon dies, the next may refuse to open it");
        }
    }
}

fn open(folder: &OwnedFd, flags: OFlags) -> Result<File> {
    let flags = flags | OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, NAME, flags, Mode::RUSR | Mode::WUSR);
    opened.map(File::from).map_err(|errno| Error::io("opening the list of open files", errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_daemon_finds_what_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let folder = OwnedFd::from(File::open(folder.path()).unwrap());
        let table = OpenTable::create(&folder).unwrap();
        let record = |ino| OpenRecord {
            count: 2,
            writers: 1,
            is_passed: true,
            backing: Some(Backing(7)),
            ..OpenRecord::none(Ino(ino))
        };
        let slots: Vec<OpenSlot> = (1..=3)
            .map(|ino| {
                let slot = table.take();
                table.put(slot, &record(ino));
                slot
            })
            .collect();
        table.give_back(slots[1]);
        drop(table);
        let (table, found) = OpenTable::resume(&folder).unwrap();
        assert_eq!(found, [(slots[0], record(1)), (slots[2], record(3))]);
        assert_eq!(table.take(), slots[1]);
        assert_eq!(table.take(), OpenSlot(3));
    }

    #[test]
    fn golden_record() {
        let record = OpenRecord {
            backing: Some(Backing(2)),
            count: 3,
            writers: 4,
            mappers: 5,
            is_passed: true,
            is_mapped: false,
            is_readable: true,
            node: 6,
            ..OpenRecord::none(Ino(1))
        };
        let warm = OpenRecord { is_warm: true, node: 0, writers: 0, is_mapped: true, ..record };
        assert_eq!(warm.encode()[24..28], [0b1111, 0, 0, 0]);
        assert!(OpenRecord::decode(&warm.encode()).unwrap() == Some(warm) && !warm.is_written_past_us());
        let hex = record.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex, "01000000000000000200000003000000040000000500000005000000".to_owned() + "06000000");
        assert_eq!(OpenRecord::decode(&record.encode()).unwrap(), Some(record));
    }
}
