//! The memory in which the kernel puts requests and finds answers, one slot for each thread.
//!
//! It is a file in memory (memfd) which outlives the daemon as the keeper has it too, and it is mapped where the kernel
//! knows it to be: at the same address in each daemon after the first, which the first page says. So a request that was under way when
//! a daemon died is there for the next, and can be answered in its place. Hides the layout. Invariants:
//!
//! - Before anything of a request is overwritten, as much of it as an answer can overwrite has been kept beside.
//! - A slot's `answered` is the request's number only while the answer is whole.
//! - All of it is resident from the start, so that the kernel never has to wait for a page: `queues` × `depth` × 264 KiB, 64 MiB at
//!   most.

#![allow(unsafe_code)] // memory that is shared with the kernel

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

use super::super::abi::HEADER_BYTES;
use crate::error::Result;

/// The largest piece of data in a request or an answer.
pub(in super::super) const PAYLOAD_BYTES: usize = 256 << 10;
const PAGE: usize = 4096;
const SLOT_BYTES: usize = PAGE + PAYLOAD_BYTES;
const MAX_BYTES: usize = 64 << 20;
const MAX_DEPTH: usize = 16;
const MIN_DEPTH: usize = 4;

/// Where mappings are put: nothing else is ever mapped there, so that the next daemon can do the same. Small enough for the
/// smallest address spaces (39 bits), above what programs without randomized addresses use.
const FIRST_ADDRESS: usize = 0x10_0000_0000;
const ADDRESS_STEP: usize = MAX_BYTES * 2;
const ADDRESSES: usize = 512;

/// The first page: magic, queues, depth, bytes of a slot, address, device.
const MAGIC: u64 = u64::from_le_bytes(*b"lfs-ring");
const WORD_QUEUES: usize = 1;
const WORD_DEPTH: usize = 2;
const WORD_SLOT_BYTES: usize = 3;
const WORD_ADDRESS: usize = 4;
const WORD_DEVICE: usize = 5;

/// A slot's first page. The kernel's part: the header (in: the request's, out: the answer's), the operation's own
/// structure, the number of the request, how many bytes of the payload count.
const AT_OPERATION: usize = 128;
pub(super) const OPERATION_BYTES: usize = 128;
const AT_NUMBER: usize = 264;
const AT_PAYLOAD_BYTES: usize = 272;
/// What the kernel is told of it.
const KERNELS_BYTES: usize = 288;
/// Our part.
const AT_ANSWERED: usize = 512;
const AT_KEPT: usize = 520;
const AT_KEPT_PAYLOAD_BYTES: usize = 528;
const AT_KEPT_HEADER: usize = 576;
const AT_KEPT_PAYLOAD: usize = 1024;
/// How much of the payload is kept: two names. An answer to a request with a longer one has to be shorter than this.
pub(super) const KEPT_PAYLOAD_BYTES: usize = 1024;

/// The memory of one mount.
#[derive(Debug)]
pub(in super::super) struct Memory {
    file: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
    queues: usize,
    depth: usize,
    was_left: bool,
}

// SAFETY: what is shared between threads is accessed by atomic operations, the rest by one thread each, which has the slot.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Memory {
    /// Memory for a new mount which `threads` threads shall serve, or some more: there is a queue for each processor, and none of
    /// them may be without.
    ///
    /// # Errors
    /// [`Error::Platform`](crate::Error::Platform) if this machine can't do it, and why.
    pub fn new(threads: usize) -> Result<Memory> {
        let queues = super::queues()?;
        let most = (MAX_BYTES / SLOT_BYTES / queues).min(MAX_DEPTH);
        let depth = threads.div_ceil(queues).max(MIN_DEPTH).min(most);
        if depth == 0 {
            return Err(super::unsupported(&format!("with {queues} processors it would need too much memory")));
        }
        let made = Memory::make(queues, depth);
        made.map_err(|error| super::unsupported(&format!("no memory for its requests: {error}")))
    }

    fn make(queues: usize, depth: usize) -> io::Result<Memory> {
        let file = memfd_create("layerfs-requests", MemfdFlags::CLOEXEC)?;
        let bytes = PAGE + queues * depth * SLOT_BYTES;
        ftruncate(&file, bytes as u64)?;
        let addresses = (0..ADDRESSES).map(|at| FIRST_ADDRESS + at * ADDRESS_STEP);
        let mut failure = io::Error::from(io::ErrorKind::OutOfMemory);
        for address in addresses {
            match map(&file, bytes, address) {
                Ok(start) => {
                    let memory = Memory { file, start, bytes, queues, depth, was_left: false };
                    for (word, value) in [
                        (0, MAGIC),
                        (WORD_QUEUES, queues as u64),
                        (WORD_DEPTH, depth as u64),
                        (WORD_SLOT_BYTES, SLOT_BYTES as u64),
                        (WORD_ADDRESS, address as u64),
                    ] {
                        memory.word(word * 8).store(value, Ordering::Relaxed);
                    }
                    return Ok(memory);
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => failure = error,
                Err(error) => return Err(error),
            }
        }
        Err(failure)
    }

    /// The memory that a daemon left which died, with the requests that it had not answered.
    pub fn left(file: &OwnedFd) -> io::Result<Memory> {
        let file = file.try_clone()?;
        let mut head = [0; 8 * 6];
        if rustix::io::pread(&file, &mut head, 0)? != head.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (words, _) = head.as_chunks::<8>();
        let word = |at: usize| u64::from_ne_bytes(words[at]) as usize;
        let (queues, depth) = (word(WORD_QUEUES), word(WORD_DEPTH));
        let slots = queues.checked_mul(depth).filter(|slots| (1..=MAX_BYTES / SLOT_BYTES).contains(slots));
        let bytes = slots.map(|slots| PAGE + slots * SLOT_BYTES);
        let is_ours = word(0) as u64 == MAGIC && word(WORD_SLOT_BYTES) == SLOT_BYTES;
        let bytes = bytes.filter(|bytes| is_ours && fstat(&file).is_ok_and(|stat| stat.st_size == *bytes as i64));
        let bytes = bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no memory for requests"))?;
        let start = map(&file, bytes, word(WORD_ADDRESS))?;
        Ok(Memory { file, start, bytes, queues, depth, was_left: true })
    }

    pub(super) fn queues(&self) -> usize {
        self.queues
    }

    /// Whether a daemon before this one had it.
    pub(super) fn was_left(&self) -> bool {
        self.was_left
    }

    /// Its slots, and the queue that each is for. Each is to be used by one thread only.
    pub(super) fn slots(&self) -> impl Iterator<Item = (usize, Slot<'_>)> {
        (0..self.queues * self.depth).map(|index| {
            // SAFETY: it lies in the mapping.
            let start = unsafe { self.start.add(PAGE + index * SLOT_BYTES) };
            (index / self.depth, Slot { start, memory: PhantomData })
        })
    }

    /// The number of the filesystem's device, once it is known.
    pub(super) fn device(&self) -> Option<u64> {
        Some(self.word(WORD_DEVICE * 8).load(Ordering::Relaxed)).filter(|device| *device != 0)
    }

    /// Tells the daemons after this one the number of the filesystem's device.
    pub fn set_device(&self, device: u64) {
        self.word(WORD_DEVICE * 8).store(device, Ordering::Relaxed);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: it lies in the first page, is aligned, and is only accessed as an atomic.
        unsafe { self.start.add(offset).cast().as_ref() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: slots borrow the memory, so that nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

fn map(file: &OwnedFd, bytes: usize, address: usize) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    let (hint, protection) = (address as *mut libc::c_void, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: without replacing anything.
    let start = unsafe { libc::mmap(hint, bytes, protection, flags, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    match NonNull::new(start.cast()) {
        Some(start) if start.addr().get() == address => Ok(start),
        _ => {
            // SAFETY: it was just made. (Kernels before 4.17 take the address for a hint.)
            unsafe { libc::munmap(start, bytes) };
            Err(io::ErrorKind::Unsupported.into())
        }
    }
}

/// One slot, in the hands of one thread. While a request is in it, the kernel leaves it alone.
pub(super) struct Slot<'m> {
    start: NonNull<u8>,
    memory: PhantomData<&'m Memory>,
}

// SAFETY: nobody else has this slot.
unsafe impl Send for Slot<'_> {}

/// What a slot holds when a daemon takes it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing, ever.
    Nothing,
    /// A request that isn't answered.
    Request,
    /// A whole answer, which the kernel may have taken or not.
    Answer,
}

impl Slot<'_> {
    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: it lies in the slot, is aligned, and is only accessed as an atomic while a request is in the slot.
        unsafe { self.start.add(offset).cast().as_ref() }
    }

    fn bytes(&self, offset: usize, count: usize) -> &[u8] {
        debug_assert!(offset + count <= SLOT_BYTES);
        // SAFETY: it lies in the slot, which is borrowed, and the kernel doesn't write to it now.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), count) }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        debug_assert!(offset + bytes.len() <= SLOT_BYTES);
        // SAFETY: it lies in the slot, which is borrowed for writing; `bytes` may lie in it too.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.start.as_ptr().add(offset), bytes.len()) };
    }

    /// What the kernel is told: the part that it fills with headers, and the payload.
    pub fn buffers(&self) -> [libc::iovec; 2] {
        // SAFETY: it lies in the slot.
        let payload = unsafe { self.start.add(PAGE) };
        [(self.start, KERNELS_BYTES), (payload, PAYLOAD_BYTES)]
            .map(|(start, iov_len)| libc::iovec { iov_base: start.as_ptr().cast(), iov_len })
    }

    /// The number of the request that came last; 0 if none has come.
    pub fn number(&self) -> u64 {
        self.word(AT_NUMBER).load(Ordering::Acquire)
    }

    /// What the last daemon left in it.
    pub fn left(&self) -> Left {
        match self.number() {
            0 => Left::Nothing,
            number if number == self.word(AT_ANSWERED).load(Ordering::Acquire) => Left::Answer,
            _ => Left::Request,
        }
    }

    /// Keeps what an answer can overwrite of the request that has come; or, if that has been done by a daemon before this one,
    /// leaves it. The request is read from what is kept.
    pub fn keep(&mut self) {
        let number = self.number();
        if self.word(AT_KEPT).load(Ordering::Acquire) == number {
            return;
        }
        let bytes = self.bytes(AT_PAYLOAD_BYTES, 4).try_into().map_or(0, u32::from_ne_bytes) as usize;
        let bytes = bytes.min(PAYLOAD_BYTES);
        let slot = self.start.as_ptr();
        // SAFETY: all of it lies in the slot, apart from each other.
        unsafe {
            std::ptr::copy_nonoverlapping(slot, slot.add(AT_KEPT_HEADER), HEADER_BYTES);
            let kept = bytes.min(KEPT_PAYLOAD_BYTES);
            std::ptr::copy_nonoverlapping(slot.add(PAGE), slot.add(AT_KEPT_PAYLOAD), kept);
        }
        self.word(AT_KEPT_PAYLOAD_BYTES).store(bytes as u64, Ordering::Relaxed);
        self.word(AT_KEPT).store(number, Ordering::Release);
    }

    /// The kept request, and room for the answer's payload; `spare` is that where the request itself is in the way.
    pub fn parts<'a>(&'a mut self, spare: &'a mut [u8; KEPT_PAYLOAD_BYTES]) -> Parts<'a> {
        let bytes = (self.word(AT_KEPT_PAYLOAD_BYTES).load(Ordering::Relaxed) as usize).min(PAYLOAD_BYTES);
        let slot = self.start.as_ptr();
        // SAFETY: all of it lies in the slot, which is borrowed for writing; the one part that is to be written to doesn't overlap
        // the others.
        unsafe {
            let header = std::slice::from_raw_parts(slot.add(AT_KEPT_HEADER), HEADER_BYTES);
            let operation = std::slice::from_raw_parts(slot.add(AT_OPERATION), OPERATION_BYTES);
            let (payload, room) = if bytes <= KEPT_PAYLOAD_BYTES {
                let kept = std::slice::from_raw_parts(slot.add(AT_KEPT_PAYLOAD), bytes);
                (kept, std::slice::from_raw_parts_mut(slot.add(PAGE), PAYLOAD_BYTES))
            } else {
                // Its beginning may have been overwritten by an answer that wasn't finished.
                std::ptr::copy_nonoverlapping(slot.add(AT_KEPT_PAYLOAD), slot.add(PAGE), KEPT_PAYLOAD_BYTES);
                (std::slice::from_raw_parts(slot.add(PAGE), bytes), &mut spare[..])
            };
            Parts { header, operation, payload, room }
        }
    }

    /// Makes the answer whole: `payload_bytes` in the payload, or all of `payload` if it was made elsewhere.
    pub fn finish(&mut self, header: &[u8], payload_bytes: usize, payload: Option<&[u8]>) {
        if let Some(payload) = payload {
            self.put(PAGE, payload);
        }
        self.put(AT_PAYLOAD_BYTES, &(payload_bytes as u32).to_ne_bytes());
        self.put(0, header);
        let number = self.number();
        self.word(AT_ANSWERED).store(number, Ordering::Release);
    }

    /// Whether the room for an answer is the payload itself, and not a spare.
    pub fn has_room(&self) -> bool {
        self.word(AT_KEPT_PAYLOAD_BYTES).load(Ordering::Relaxed) as usize <= KEPT_PAYLOAD_BYTES
    }
}

/// A request in a slot.
pub(super) struct Parts<'a> {
    pub header: &'a [u8],
    pub operation: &'a [u8],
    pub payload: &'a [u8],
    /// Where the answer's payload goes.
    pub room: &'a mut [u8],
}
