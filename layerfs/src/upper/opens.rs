//! Which files of a mount programs have open, and how: in memory that outlives the daemon, as the keeper has it too.
//!
//! FORMAT.md, "Uppers". A mount outlives its daemon, and the next one has to go on as the kernel remembers it: a file that is
//! passed through has one backing until its last descriptor is closed, and nobody can ask the kernel for its number.
//!
//! Invariants: a record is written before the kernel hears of the opening, and cleared after it told of the closing, so what
//! the kernel has open is here; whenever the daemon is killed, a place has the record from before a change or the one from after it.
//! Writing a record is no system call, as one is written for each file that is opened and for each that is closed.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags, SealFlags};

use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::id::Ino;

/// The file beside the data files that daemons of versions before had instead.
pub(super) const NAME: &str = "opens";
const MEMORY_NAME: &str = "layerfs-opens";
const RECORD_BYTES: usize = 32;
/// A record as words; the last has the turn.
const WORDS: usize = RECORD_BYTES / 8;
/// A place has two records.
const PLACE_BYTES: usize = 2 * RECORD_BYTES;
/// The memory grows by so many places; there are never more than the most.
const PLACES_MORE: u32 = 1024;
const PLACES_MOST: u32 = 1 << 22;
/// Where the last word has the turn, of two bits.
const TURN_AT: u32 = 30;
const TURNS: u64 = 4;
const PASSED: u32 = 1;
const MAPPED: u32 = 2;
const READABLE: u32 = 4;
const WARM: u32 = 8;
const MISCOUNTED: u32 = 16;

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
    /// Whether the kernel asked or told of a descriptor for the second time, so that `count` may be too high: its forgetting the inode
    /// says more.
    pub is_miscounted: bool,
    /// The file of the hidden mount that it is passed through to; 0 if it is its own data file.
    pub node: u32,
}

impl OpenRecord {
    /// That nobody has `ino` open.
    pub fn none(ino: Ino) -> OpenRecord {
        let (count, writers, mappers) = (0, 0, 0);
        OpenRecord {
            ino,
            backing: None,
            count,
            writers,
            mappers,
            is_passed: false,
            is_mapped: false,
            is_readable: false,
            is_warm: false,
            is_miscounted: false,
            node: 0,
        }
    }

    /// Whether somebody may write to its data file without our hearing of it.
    pub fn is_written_past_us(&self) -> bool {
        self.is_passed && !self.is_warm && self.node == 0 && (self.writers > 0 || self.is_mapped)
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        let how = flag(self.is_passed, PASSED) | flag(self.is_mapped, MAPPED) | flag(self.is_readable, READABLE);
        let how = how | flag(self.is_warm, WARM) | flag(self.is_miscounted, MISCOUNTED);
        let backing = self.backing.map_or(0, |backing| backing.0);
        let numbers = [backing, self.count, self.writers, self.mappers, how, self.node];
        let mut out = [0; RECORD_BYTES];
        out[..8].copy_from_slice(&self.ino.0.to_le_bytes());
        for (place, number) in out[8..].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
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
        let (is_readable, is_warm, is_miscounted) = (is_set(READABLE), is_set(WARM), is_set(MISCOUNTED));
        let node = reader.u32()?;
        let record = OpenRecord {
            ino,
            backing,
            count,
            writers,
            mappers,
            is_passed,
            is_mapped,
            is_readable,
            is_warm,
            is_miscounted,
            node,
        };
        Ok(Some(record).filter(|record| record.ino.0 != 0))
    }
}

/// A place for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenSlot(u32);

/// The records.
#[derive(Debug)]
pub struct OpenTable {
    kept_in: KeptIn,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    free: Vec<u32>,
    /// Slots from here on have never been used.
    next: u32,
}

impl Slots {
    /// Those that `rows`, in order, leave, and what is in the others.
    fn of(rows: impl Iterator<Item = Result<Option<OpenRecord>>>) -> Result<(Slots, Vec<(OpenSlot, OpenRecord)>)> {
        let (mut records, mut slots) = (Vec::new(), Slots::default());
        for (slot, row) in (0..).zip(rows) {
            match row? {
                Some(record) => records.push((OpenSlot(slot), record)),
                None => slots.free.push(slot),
            }
            slots.next = slot + 1;
        }
        // The first ones are given first: the memory doesn't grow without need.
        slots.free.reverse();
        Ok((slots, records))
    }
}

#[derive(Debug)]
enum KeptIn {
    Memory(Memory),
    /// As a daemon of a version before had it, whose mount goes on: the keeper takes no more descriptors of that.
    File(File),
}

impl OpenTable {
    /// An empty one, for the upper in `folder`.
    pub(super) fn create(folder: &OwnedFd) -> Result<OpenTable> {
        let _ = rustix::fs::unlinkat(folder, NAME, AtFlags::empty());
        let memory = Memory::new().map_err(|e| Error::io("making memory for the list of open files", e))?;
        Ok(OpenTable { kept_in: KeptIn::Memory(memory), slots: Mutex::default() })
    }

    /// The one that a daemon left which died: in `memory`, or in a file in `folder`.
    pub(super) fn resume(
        folder: &OwnedFd,
        memory: Option<OwnedFd>,
    ) -> Result<(OpenTable, Vec<(OpenSlot, OpenRecord)>)> {
        let failed = |error| Error::io("reading which files are open", error);
        let (kept_in, (slots, records)) = match memory {
            Some(memory) => {
                let memory = Memory::left(memory).map_err(failed)?;
                let read = Slots::of((0..memory.places.load(Ordering::Relaxed)).map(|slot| memory.read(slot)))?;
                (KeptIn::Memory(memory), read)
            }
            None => {
                let file = open(folder)?;
                let bytes = file.metadata().map_err(failed)?.len() as usize / RECORD_BYTES * RECORD_BYTES;
                let mut rows = vec![0; bytes];
                file.read_exact_at(&mut rows, 0).map_err(failed)?;
                let read = Slots::of(rows.chunks_exact(RECORD_BYTES).map(OpenRecord::decode))?;
                (KeptIn::File(file), read)
            }
        };
        Ok((OpenTable { kept_in, slots: Mutex::new(slots) }, records))
    }

    /// What the daemon after this one needs to [`resume`](OpenTable::resume), if it isn't in the folder: another descriptor of the
    /// memory, by which [`is_memory`] knows it.
    ///
    /// # Errors
    /// Those of duplicating a descriptor.
    pub fn descriptor(&self) -> std::io::Result<Option<OwnedFd>> {
        match &self.kept_in {
            KeptIn::Memory(memory) => memory.file.try_clone().map(Some),
            KeptIn::File(_) => Ok(None),
        }
    }

    /// A place that nobody has.
    pub fn take(&self) -> OpenSlot {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.free.pop() {
            return OpenSlot(slot);
        }
        let slot = slots.next;
        slots.next += 1;
        if let KeptIn::Memory(memory) = &self.kept_in
            && let Err(error) = memory.have(slot)
        {
            tell(&error);
        }
        OpenSlot(slot)
    }

    /// Writes a record.
    pub fn put(&self, slot: OpenSlot, record: &OpenRecord) {
        self.write(slot, record.encode());
    }

    /// Clears a record, and gives the place back.
    pub fn give_back(&self, slot: OpenSlot) {
        self.write(slot, [0; RECORD_BYTES]);
        self.slots.lock().free.push(slot.0);
    }

    fn write(&self, slot: OpenSlot, record: [u8; RECORD_BYTES]) {
        match &self.kept_in {
            KeptIn::Memory(memory) => memory.write(slot.0, &record),
            KeptIn::File(file) => {
                if let Err(error) = file.write_all_at(&record, u64::from(slot.0) * RECORD_BYTES as u64) {
                    tell(&error);
                }
            }
        }
    }
}

fn tell(error: &std::io::Error) {
    tracing::warn!(%error, "cannot note that a file was opened; if this daemon dies, the next may refuse to open it");
}

fn open(folder: &OwnedFd) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, NAME, flags, Mode::RUSR | Mode::WUSR);
    opened.map(File::from).map_err(|errno| Error::io("opening the list of open files", errno))
}

/// Whether `descriptor` is one of the memory of a table.
pub fn is_memory(descriptor: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    link.is_ok_and(|link| link.to_string_lossy().starts_with(&format!("/memfd:{MEMORY_NAME}")))
}

/// Places in a file in memory (memfd).
///
/// A place has two records, and the one that was written later counts: its last word has the next turn, and is written last. So there is
/// a whole one whenever the writer is killed.
#[derive(Debug)]
struct Memory {
    file: OwnedFd,
    /// Of as many places as there may be; there is memory behind the first ones.
    map: MmapRaw,
    places: AtomicU32,
}

impl Memory {
    fn new() -> std::io::Result<Memory> {
        let file = rustix::fs::memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        // Who has the mapping relies on it.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
        Memory::map(file, 0)
    }

    fn left(file: OwnedFd) -> std::io::Result<Memory> {
        let bytes = rustix::fs::fstat(&file)?.st_size as u64;
        Memory::map(file, (bytes / PLACE_BYTES as u64).min(PLACES_MOST.into()) as u32)
    }

    fn map(file: OwnedFd, places: u32) -> std::io::Result<Memory> {
        let map = MmapOptions::new().len(PLACES_MOST as usize * PLACE_BYTES).map_raw(&file)?;
        Ok(Memory { file, map, places: AtomicU32::new(places) })
    }

    /// Sees to it that there is the place `slot`.
    fn have(&self, slot: u32) -> std::io::Result<()> {
        let places = self.places.load(Ordering::Acquire);
        if slot < places {
            return Ok(());
        }
        if slot >= PLACES_MOST {
            return Err(std::io::Error::other(format!("{PLACES_MOST} files are open")));
        }
        let places = (slot + PLACES_MORE).min(PLACES_MOST);
        rustix::fs::ftruncate(&self.file, u64::from(places) * PLACE_BYTES as u64)?;
        self.places.store(places, Ordering::Release);
        Ok(())
    }

    /// The words of the two records at `slot`; none if there is no such place.
    fn pair(&self, slot: u32) -> Option<&[[AtomicU64; WORDS]; 2]> {
        if slot >= self.places.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: the mapping begins at a page and has this place, and there is memory behind it, which nobody can take away (the seal). It
        // is only ever accessed as atomics.
        #[allow(unsafe_code)]
        Some(unsafe { &*self.map.as_ptr().add(slot as usize * PLACE_BYTES).cast() })
    }

    /// The index of the record that counts, and its turn.
    fn latest(pair: &[[AtomicU64; WORDS]; 2]) -> (usize, u64) {
        let [first, second] =
            pair.each_ref().map(|words| words[WORDS - 1].load(Ordering::SeqCst) >> TURN_AT & (TURNS - 1));
        if second == (first + 1) % TURNS { (1, second) } else { (0, first) }
    }

    fn write(&self, slot: u32, record: &[u8; RECORD_BYTES]) {
        // It was told of when the place was taken.
        let Some(pair) = self.pair(slot) else { return };
        let (latest, turn) = Memory::latest(pair);
        let (words, _) = record.as_chunks::<8>();
        let place = &pair[1 - latest];
        for (place, word) in place.iter().zip(&words[..WORDS - 1]) {
            place.store(u64::from_le_bytes(*word), Ordering::SeqCst);
        }
        let last = u64::from_le_bytes(words[WORDS - 1]) | ((turn + 1) % TURNS) << TURN_AT;
        place[WORDS - 1].store(last, Ordering::SeqCst);
    }

    fn read(&self, slot: u32) -> Result<Option<OpenRecord>> {
        let Some(pair) = self.pair(slot) else { return Ok(None) };
        let words = pair[Memory::latest(pair).0].each_ref().map(|word| word.load(Ordering::SeqCst).to_le_bytes());
        OpenRecord::decode(words.as_flattened())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(ino: u64) -> OpenRecord {
        OpenRecord { count: 2, writers: 1, is_passed: true, backing: Some(Backing(7)), ..OpenRecord::none(Ino(ino)) }
    }

    fn folder() -> OwnedFd {
        OwnedFd::from(File::open(tempfile::tempdir().unwrap().path()).unwrap())
    }

    #[test]
    fn the_next_daemon_finds_what_is_open() {
        let table = OpenTable::create(&folder()).unwrap();
        // More than the memory has at first.
        let slots: Vec<OpenSlot> = (1..=3000)
            .map(|ino| {
                let slot = table.take();
                table.put(slot, &record(ino));
                slot
            })
            .collect();
        for times in 0..5 {
            table.put(slots[0], &OpenRecord { count: times, ..record(1) });
        }
        slots[1..2999].iter().for_each(|slot| table.give_back(*slot));
        let memory = table.descriptor().unwrap().unwrap();
        assert!(is_memory(&memory) && !is_memory(&folder()));
        drop(table);
        let (table, found) = OpenTable::resume(&folder(), Some(memory)).unwrap();
        let first = OpenRecord { count: 4, ..record(1) };
        assert_eq!(found, [(slots[0], first), (slots[2999], record(3000))]);
        assert_eq!(table.take(), slots[1]);
    }

    #[test]
    fn a_record_that_was_half_written_counts_for_nothing() {
        let table = OpenTable::create(&folder()).unwrap();
        let slot = table.take();
        let KeptIn::Memory(memory) = &table.kept_in else { panic!() };
        // Whatever the turn: a killed writer has written all of it but the last word.
        for count in 0..9 {
            let now = OpenRecord { count, ..record(8) };
            table.put(slot, &now);
            let pair = memory.pair(slot.0).unwrap();
            let other = &pair[1 - Memory::latest(pair).0];
            other[..WORDS - 1].iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
            assert_eq!(memory.read(slot.0).unwrap(), Some(now));
        }
        table.give_back(slot);
        assert_eq!(memory.read(slot.0).unwrap(), None);
    }

    #[test]
    fn what_an_earlier_version_left_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        std::fs::write(&path, [[0; RECORD_BYTES], record(3).encode()].concat()).unwrap();
        let folder = OwnedFd::from(File::open(folder.path()).unwrap());
        for also in [None, Some(record(4))] {
            let (table, found) = OpenTable::resume(&folder, None).unwrap();
            assert!(table.descriptor().unwrap().is_none());
            let first = also.map(|record| (OpenSlot(0), record));
            assert_eq!(found, first.into_iter().chain([(OpenSlot(1), record(3))]).collect::<Vec<_>>());
            if also.is_none() {
                let slot = table.take();
                table.put(slot, &record(4));
            }
        }
        OpenTable::create(&folder).unwrap();
        assert!(!path.exists(), "a later daemon would believe it");
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
        let miscounted = OpenRecord { is_miscounted: true, ..record };
        assert_eq!(miscounted.encode()[24..28], [0b1_0101, 0, 0, 0]);
        assert_eq!(OpenRecord::decode(&miscounted.encode()).unwrap(), Some(miscounted));
        let hex = record.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex, "01000000000000000200000003000000040000000500000005000000".to_owned() + "06000000");
        assert_eq!(OpenRecord::decode(&record.encode()).unwrap(), Some(record));
    }
}
