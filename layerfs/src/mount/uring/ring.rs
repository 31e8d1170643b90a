//! An io_uring of one thread, as far as FUSE needs it.
//!
//! Hides the system calls and the two queues that are shared with the kernel. Invariants: only the thread that made a ring
//! uses it (the type is not `Send`); what the kernel writes is read after its tail was.

#![allow(unsafe_code)] // system calls, and memory that is shared with the kernel

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_SQE128: u32 = 1 << 10;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const FEAT_SINGLE_MMAP: u32 = 1;
const OFFSET_QUEUES: i64 = 0;
const OFFSET_ENTRIES: i64 = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1;
const OP_POLL_ADD: u8 = 6;
const OP_URING_CMD: u8 = 46;
const ENTRY_BYTES: usize = 128;
const COMMAND_AT: usize = 48;
/// A thread has at most two requests under way, and one that is queued.
const ENTRIES: u32 = 4;

#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq: SubmissionOffsets,
    cq: CompletionOffsets,
}

#[repr(C)]
#[derive(Default)]
struct SubmissionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_address: u64,
}

#[repr(C)]
#[derive(Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    overflow: u32,
    entries_at: u32,
    flags: u32,
    reserved: u32,
    user_address: u64,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    /// What the entry was queued with.
    pub tag: u64,
    /// Negative: an error number.
    pub result: i32,
}

/// A mapping of the ring's memory.
struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, bytes: usize, offset: i64) -> io::Result<Mapping> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping, wherever the kernel finds room.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::Unsupported)?;
        Ok(Mapping { start, bytes })
    }

    /// A pointer to `offset`, where `bytes` bytes have room.
    fn at(&self, offset: usize, bytes: usize) -> io::Result<NonNull<u8>> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) || !offset.is_multiple_of(4) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: it stays within the mapping.
        Ok(unsafe { self.start.cast::<u8>().add(offset) })
    }

    fn word(&self, offset: u32) -> io::Result<NonNull<AtomicU32>> {
        Ok(self.at(offset as usize, 4)?.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more: it is owned by the ring.
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// The ring.
pub(super) struct Ring {
    fd: OwnedFd,
    sq_tail: NonNull<AtomicU32>,
    sq_mask: u32,
    sq_array: NonNull<u32>,
    entries: NonNull<u8>,
    cq_head: NonNull<AtomicU32>,
    cq_tail: NonNull<AtomicU32>,
    cq_mask: u32,
    completions: NonNull<u8>,
    queued: u32,
    _maps: [Mapping; 2],
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Ring {
    /// A ring for the calling thread.
    pub fn new() -> io::Result<Ring> {
        let flags = SETUP_SQE128 | SETUP_SINGLE_ISSUER | SETUP_COOP_TASKRUN;
        let mut params = Params { flags, ..Params::default() };
        // SAFETY: the parameters are those of the system call, which fills them.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut params) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is new, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        if params.features & FEAT_SINGLE_MMAP == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let array_end = params.sq.array as usize + params.sq_entries as usize * 4;
        let completions_end = params.cq.entries_at as usize + params.cq_entries as usize * 16;
        let queues = Mapping::new(fd.as_fd(), array_end.max(completions_end), OFFSET_QUEUES)?;
        let entry_bytes = params.sq_entries as usize * ENTRY_BYTES;
        let entries = Mapping::new(fd.as_fd(), entry_bytes, OFFSET_ENTRIES)?;
        Ok(Ring {
            fd,
            sq_tail: queues.word(params.sq.tail)?,
            sq_mask: params.sq_entries - 1,
            sq_array: queues.at(params.sq.array as usize, params.sq_entries as usize * 4)?.cast(),
            entries: entries.at(0, entry_bytes)?,
            cq_head: queues.word(params.cq.head)?,
            cq_tail: queues.word(params.cq.tail)?,
            cq_mask: params.cq_entries - 1,
            completions: queues.at(params.cq.entries_at as usize, params.cq_entries as usize * 16)?,
            queued: 0,
            _maps: [queues, entries],
        })
    }

    /// Queues a wait for `other`, another ring, to have something to read.
    pub fn watch(&mut self, other: BorrowedFd<'_>, tag: u64) {
        let mut entry = entry(OP_POLL_ADD, other, tag);
        entry[28..32].copy_from_slice(&u32::from(libc::POLLIN as u16).to_ne_bytes());
        self.push(&entry);
    }

    /// Queues command `operation` to the driver behind `file`. What `buffers` describes has to be valid until [`Ring::enter`]
    /// has returned.
    pub fn command(&mut self, file: BorrowedFd<'_>, operation: u32, command: &[u8], buffers: &[libc::iovec], tag: u64) {
        let mut entry = entry(OP_URING_CMD, file, tag);
        entry[8..12].copy_from_slice(&operation.to_ne_bytes());
        if !buffers.is_empty() {
            entry[16..24].copy_from_slice(&(buffers.as_ptr() as u64).to_ne_bytes());
            entry[24..28].copy_from_slice(&(buffers.len() as u32).to_ne_bytes());
        }
        entry[COMMAND_AT..COMMAND_AT + command.len()].copy_from_slice(command);
        self.push(&entry);
    }

    fn push(&mut self, entry: &[u8; ENTRY_BYTES]) {
        // SAFETY: the pointers lie in the mappings that this ring owns; only this thread writes entries and the tail, and the kernel
        // reads an entry once the tail is past it. There is room: `queued` entries are fewer than the ring has.
        unsafe {
            let tail = self.sq_tail.as_ref().load(Ordering::Relaxed);
            let index = tail & self.sq_mask;
            let at = self.entries.add(index as usize * ENTRY_BYTES);
            std::ptr::copy_nonoverlapping(entry.as_ptr(), at.as_ptr(), ENTRY_BYTES);
            self.sq_array.add(index as usize).write(index);
            self.sq_tail.as_ref().store(tail.wrapping_add(1), Ordering::Release);
        }
        self.queued += 1;
    }

    /// Hands what is queued to the kernel; waits for a completion if `waits` is set.
    pub fn enter(&mut self, waits: bool) -> io::Result<()> {
        let none = std::ptr::null::<c_void>();
        loop {
            let (least, flags) = (u32::from(waits), ENTER_GETEVENTS);
            let (ring, size) = (self.fd.as_raw_fd(), 0usize);
            // SAFETY: the entries are complete, and what they refer to is valid, as their makers promise.
            let taken = unsafe { libc::syscall(libc::SYS_io_uring_enter, ring, self.queued, least, flags, none, size) };
            if taken >= 0 {
                self.queued = self.queued.saturating_sub(taken as u32);
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The next completion, if there is one.
    pub fn completion(&mut self) -> Option<Completion> {
        // SAFETY: as in `push`; the kernel doesn't touch a completion again that lies before the tail, until the head is past it.
        unsafe {
            let head = self.cq_head.as_ref().load(Ordering::Relaxed);
            if head == self.cq_tail.as_ref().load(Ordering::Acquire) {
                return None;
            }
            let at = self.completions.add((head & self.cq_mask) as usize * 16);
            let completion = Completion { tag: at.cast::<u64>().read(), result: at.add(8).cast::<i32>().read() };
            self.cq_head.as_ref().store(head.wrapping_add(1), Ordering::Release);
            Some(completion)
        }
    }
}

fn entry(operation: u8, file: BorrowedFd<'_>, tag: u64) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[0] = operation;
    entry[4..8].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
    entry[32..40].copy_from_slice(&tag.to_ne_bytes());
    entry
}
