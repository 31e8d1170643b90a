//! A machine's memory: a file without a name that QEMU maps and whoever looks at it reads, and how it is copied.
//!
//! Hides the ways in which QEMU may hold it. *Shared*, in a file of ours: QEMU saves and loads the devices alone, and the file is the
//! memory of the state, byte for byte. *Anonymous*, in a file of QEMU's own, by an earlier version of this program; *private*, as
//! changes to the file of a state that it goes on from (post-copy). The pages of those stand in QEMU's file of the state
//! ([`mapped_ram`]), and in copies at the same place.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::mapped_ram;
use super::state::MEMORY_FILE;

/// So much is copied at a time, in bytes: what was read is in the processor's cache still when it is written.
const PIECE: usize = 256 << 10;
/// A state's chunk, in bytes.
const SMALL_PIECE: usize = 64 << 10;

/// Memory that a machine is about to have.
#[derive(Debug)]
pub(super) struct Memory(File);

impl Memory {
    /// Nothing but zeroes.
    pub fn new(bytes: u64) -> io::Result<Memory> {
        let file = File::from(rustix::fs::memfd_create("layerfs-memory", rustix::fs::MemfdFlags::CLOEXEC)?);
        Memory::of(file, bytes)
    }

    /// What is in `file`, which becomes as long as it is to be.
    pub fn of(file: File, bytes: u64) -> io::Result<Memory> {
        file.set_len(bytes)?;
        Ok(Memory(file))
    }

    /// As a state has it whose memory wasn't given as a file.
    pub fn read(from: &File, bytes: u64) -> io::Result<Memory> {
        let memory = Memory::new(bytes)?;
        copy(from, &memory.0, 0, bytes)?;
        Ok(memory)
    }

    /// Where another process can open it as long as this exists.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }
}

/// The memory of a machine that there is.
#[derive(Debug)]
pub(super) enum Held {
    Shared(File),
    Anonymous(File),
    /// It begins at this address of the process.
    Private(File, u64),
}

impl Held {
    /// That of QEMU's process `pid`, which has so many `bytes` of it.
    pub fn by(pid: u32, bytes: u64) -> io::Result<Held> {
        for link in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|entry| entry.path()) {
            let Ok(target) = fs::read_link(&link) else { continue };
            let target = target.to_string_lossy();
            if target.starts_with("/memfd:layerfs-memory") {
                return Ok(Held::Shared(File::open(link)?));
            }
            if target.starts_with("/memfd:memory-backend-memfd") {
                return Ok(Held::Anonymous(File::open(link)?));
            }
        }
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let start = maps.lines().find_map(|line| {
            let (range, _) = line.split_once(' ').filter(|_| line.ends_with(MEMORY_FILE))?;
            let (start, end) = range.split_once('-')?;
            let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
            (end - start == bytes).then_some(start)
        });
        let start = start.ok_or_else(|| io::Error::other("it can't be found: start the guest again"))?;
        Ok(Held::Private(File::open(format!("/proc/{pid}/mem"))?, start))
    }

    /// Whether QEMU leaves it out of what it saves.
    pub fn is_shared(&self) -> bool {
        matches!(self, Held::Shared(_))
    }

    /// Copies its `bytes`, without what was never used, to where a state in the folder `into` has them.
    pub fn copy(&self, bytes: u64, into: &Path) -> io::Result<()> {
        let to = File::create(into.join(MEMORY_FILE))?;
        let base = if self.is_shared() { 0 } else { mapped_ram::pages_of(bytes) };
        to.set_len(base + bytes)?;
        match self {
            Held::Shared(memory) | Held::Anonymous(memory) => copy(memory, &to, base, bytes),
            Held::Private(memory, start) => {
                let mut buffer = vec![0; SMALL_PIECE];
                for at in (0..bytes).step_by(SMALL_PIECE) {
                    memory.read_exact_at(&mut buffer, start + at)?;
                    if buffer.iter().any(|byte| *byte != 0) {
                        to.write_all_at(&buffer, base + at)?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// Copies `bytes` of `from`, but for its holes, to `to`, `shift` bytes further on there: by two threads, as a guest waits for it.
fn copy(from: &File, to: &File, shift: u64, bytes: u64) -> io::Result<()> {
    let middle = (bytes / 2).next_multiple_of(PIECE as u64).min(bytes);
    std::thread::scope(|scope| {
        let rest = scope.spawn(|| copy_part(from, to, shift, middle, bytes));
        copy_part(from, to, shift, 0, middle)?;
        rest.join().unwrap_or_else(|_| Err(io::Error::other("copying panicked")))
    })
}

fn copy_part(from: &File, to: &File, shift: u64, mut at: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    while at < end {
        // Descriptors share their position, which seeking for data doesn't need.
        let begin = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        if begin >= end {
            break;
        }
        let hole = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(begin))?.min(end);
        at = begin;
        while at < hole {
            let piece = &mut buffer[..(hole - at).min(PIECE as u64) as usize];
            from.read_exact_at(piece, at)?;
            to.write_all_at(piece, shift + at)?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_is_the_same_and_holes_stay() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let bytes = 9 * PIECE as u64;
        from.set_len(bytes).unwrap();
        let places = [0, PIECE as u64 * 3 + 4096, bytes / 2 - 4096, bytes / 2 + 8192, bytes - 4096];
        for (number, at) in places.into_iter().enumerate() {
            from.write_all_at(&[number as u8 + 1; 4096], at).unwrap();
        }
        to.set_len(4096 + bytes).unwrap();
        copy(&from, &to, 4096, bytes).unwrap();
        let read = |file: &File, at| {
            let mut read = vec![0; bytes as usize];
            file.read_exact_at(&mut read, at).unwrap();
            read
        };
        assert!(read(&from, 0) == read(&to, 4096));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&to.metadata().unwrap());
        assert!(blocks * 512 < bytes / 2, "{blocks} blocks");
    }

    #[test]
    fn memory_that_was_read_can_be_opened_by_its_path() {
        let from = tempfile::tempfile().unwrap();
        from.write_all_at(b"what it was", 70_000).unwrap();
        from.set_len(1 << 20).unwrap();
        let memory = Memory::read(&from, 1 << 20).unwrap();
        let read = fs::read(memory.path()).unwrap();
        assert!(read.len() == 1 << 20 && read[70_000..].starts_with(b"what it was"));
    }
}
