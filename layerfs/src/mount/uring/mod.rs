//! Requests by io_uring (Linux 6.14): a second way beside reading and writing the device, and many times cheaper.
//!
//! The kernel puts the requests of programs that run on a processor into that processor's queue, and copies each to a slot of our
//! memory in the context of the thread that waits for it there: client and server take turns on one processor, and one system
//! call answers a request and waits for the next. A thread has one slot and one ring. FORGET and INTERRUPT still come by reading the
//! device. ADR 0017 has the measurements, and why a daemon's death loses nothing:
//!
//! - The slots are in [`Memory`] that outlives the daemon. What the kernel had put there is answered by the next one,
//!   in the same slot ([`Left::Request`]); an answer that was whole is handed in again ([`Left::Answer`]).
//! - A dying thread gives its slot back before the kernel stops copying for it, because it waits for a ring too: such requests are
//!   cancelled first of all, and FUSE's along with them. Else requests would get lost in between.
//! - What came while nobody was there waits in the queue; the kernel looks at it when a request of that queue is answered, so a new
//!   daemon makes one.

mod memory;
mod ring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crossbeam::sync::WaitGroup;
use rustix::thread::{CpuSet, sched_setaffinity};

pub(super) use memory::{Memory, PAYLOAD_BYTES};

use super::abi::{Request, answer_header};
use super::front::Front;
use super::requests::perform;
use memory::{KEPT_PAYLOAD_BYTES, Left, Parts, Slot};
use ring::Ring;

use crate::error::{Error, Result};

const ENABLED: &str = "/sys/module/fuse/parameters/enable_uring";
const PROCESSORS: &str = "/sys/devices/system/cpu/possible";
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;
const TAG_GUARD: u64 = 0;
const TAG_REGISTER: u64 = 1;
const TAG_COMMIT: u64 = 2;
/// What is read from the device: the largest is a batch of FORGET; but if the kernel should give up io_uring, everything comes that way.
const READ_BYTES: usize = PAYLOAD_BYTES + 4096;

/// That there is no io_uring for FUSE here, and why.
pub(super) fn unsupported(why: &str) -> Error {
    Error::Platform { what: "FUSE over io_uring", detail: why.to_owned() }
}

/// How many queues the kernel will have.
fn queues() -> Result<usize> {
    let enabled =
        std::fs::read_to_string(ENABLED).map_err(|_| unsupported("this kernel lacks it (Linux 6.14 has it)"))?;
    if enabled.trim() != "Y" {
        return Err(unsupported(&format!("it is switched off; `echo Y > {ENABLED}` switches it on")));
    }
    // A seccomp filter may forbid what the kernel could do.
    Ring::new().map_err(|error| unsupported(&format!("io_uring failed: {error}")))?;
    let possible =
        std::fs::read_to_string(PROCESSORS).map_err(|e| Error::io("reading which processors there are", e))?;
    let count = count_of(possible.trim());
    count.ok_or_else(|| unsupported(&format!("the processors {:?} aren't numbered without gaps", possible.trim())))
}

/// The number of processors of a list like `0-3`; none if numbers are missing.
fn count_of(list: &str) -> Option<usize> {
    match list.split_once('-') {
        None => (list == "0").then_some(1),
        Some(("0", last)) => last.parse::<usize>().ok()?.checked_add(1),
        Some(_) => None,
    }
}

/// Serves the mount on `dir` until it ends. `device` is the connection to the kernel, which has agreed to io_uring.
pub(super) fn serve(front: &Front, memory: &Memory, device: BorrowedFd<'_>, dir: &Path) -> io::Result<()> {
    // Nobody ever writes to it: whoever waits for it waits until he dies.
    let guard = Ring::new()?;
    let (guard, ready) = (guard.as_fd(), WaitGroup::new());
    std::thread::scope(|scope| {
        for (index, (queue, slot)) in memory.slots().enumerate() {
            let ready = ready.clone();
            let serve = move || {
                let served = Served { front, device, queue, slot };
                let served = catch_unwind(AssertUnwindSafe(|| served.run(guard, ready)));
                if let Err(error) = served.unwrap_or_else(|_| Err(io::Error::other("a mistake"))) {
                    tracing::error!(dir = %dir.display(), queue, %error, "a mount's thread ended");
                    give_up(dir);
                }
            };
            let thread = std::thread::Builder::new().name(format!("fuse-{queue}-{index}"));
            thread.spawn_scoped(scope, serve).inspect_err(|_| give_up(dir))?;
        }
        if memory.was_left() {
            for queue in 0..memory.queues() {
                let ready = ready.clone();
                let wake = move || {
                    ready.wait();
                    wake(queue, memory, dir);
                };
                let thread = std::thread::Builder::new().name(format!("fuse-wake-{queue}"));
                thread.spawn_scoped(scope, wake).inspect_err(|_| give_up(dir))?;
            }
        }
        drop(ready);
        read(front, device)
    })
}

/// Ends a mount whose requests would wait for ever.
fn give_up(dir: &Path) {
    if let Err(error) = super::point::unmount(dir, true) {
        tracing::error!(dir = %dir.display(), %error, "cannot unmount");
    }
}

/// Makes a request in `queue`, when threads wait there, so that the kernel looks at what has come before.
fn wake(queue: usize, memory: &Memory, dir: &Path) {
    if !stay_on(queue) {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(device) = memory.device() {
        // By the device's number: the mount may have no path any more.
        let mut answer = [0u64; 8];
        // SAFETY: the answer has 32 bytes.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_ustat, device, answer.as_mut_ptr()) };
        if result == 0 {
            return;
        }
    }
    let _ = (memory.device(), rustix::fs::statfs(dir));
}

/// Keeps the calling thread on a processor; false if that can't be used.
fn stay_on(processor: usize) -> bool {
    if processor >= CpuSet::MAX_CPU {
        return false;
    }
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set).is_ok()
}

/// Reads what doesn't come by io_uring, until the mount ends.
fn read(front: &Front, device: BorrowedFd<'_>) -> io::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    let mut room = vec![0; PAYLOAD_BYTES];
    loop {
        let count = match rustix::io::read(device, &mut buffer) {
            Ok(count) => count,
            Err(rustix::io::Errno::NODEV) => return Ok(()),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::NOENT) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let Ok(request) = Request::whole(&buffer[..count]) else { continue };
        if let Some((errno, bytes)) = perform(front, &request, &mut room) {
            let header = answer_header(request.asked.number, errno, bytes);
            // The request may be gone, with who asked.
            let _ = rustix::io::write(device, &[&header[..], &room[..bytes]].concat());
        }
    }
}

/// What has come to a thread.
enum Come {
    /// A request in its slot; `again` if a daemon before this one may have performed it.
    Request { again: bool },
    /// The end of the mount, or of the slot's use.
    End,
}

/// What a thread serves.
struct Served<'m> {
    front: &'m Front,
    device: BorrowedFd<'m>,
    queue: usize,
    slot: Slot<'m>,
}

impl Served<'_> {
    fn run(mut self, guard: BorrowedFd<'_>, ready: WaitGroup) -> io::Result<()> {
        // Where that isn't possible, it is slower.
        stay_on(self.queue);
        let started = self.start(guard);
        drop(ready);
        let (mut ring, mut come) = started?;
        loop {
            match come {
                Some(Come::Request { again }) => {
                    self.answer(again);
                    self.commit(&mut ring);
                }
                Some(Come::End) => return Ok(()),
                None => {}
            }
            ring.enter(true)?;
            come = self.next(&mut ring)?;
        }
    }

    /// Makes the ring, and the slot known to the kernel, or goes on with what is in it.
    fn start(&mut self, guard: BorrowedFd<'_>) -> io::Result<(Ring, Option<Come>)> {
        let mut ring = Ring::new()?;
        ring.watch(guard, TAG_GUARD);
        let left = self.slot.left();
        match left {
            Left::Nothing => self.register(&mut ring)?,
            Left::Answer => self.commit(&mut ring),
            Left::Request => {}
        }
        ring.enter(false)?;
        let come = match left {
            Left::Request => Some(Come::Request { again: true }),
            _ => self.next(&mut ring)?,
        };
        Ok((ring, come))
    }

    /// What has come, if something has.
    fn next(&self, ring: &mut Ring) -> io::Result<Option<Come>> {
        let mut come = None;
        while let Some(done) = ring.completion() {
            match (done.tag, -done.result) {
                (TAG_GUARD, _) => {}
                (_, libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED) => return Ok(Some(Come::End)),
                // It had been answered.
                (TAG_COMMIT, libc::ENOENT) => self.register(ring)?,
                (TAG_REGISTER, errno) if errno > 0 => {
                    // Others do its work, or the kernel goes back to the device if there are none.
                    let error = io::Error::from_raw_os_error(errno);
                    tracing::warn!(queue = self.queue, %error, "the kernel doesn't take memory for requests");
                    return Ok(Some(Come::End));
                }
                (_, errno) if errno > 0 => return Err(io::Error::from_raw_os_error(errno)),
                _ => come = Some(Come::Request { again: false }),
            }
        }
        Ok(come)
    }

    fn register(&self, ring: &mut Ring) -> io::Result<()> {
        ring.command(self.device, REGISTER, &command(0, self.queue), &self.slot.buffers(), TAG_REGISTER);
        // While the buffers' description is there.
        ring.enter(false)
    }

    fn commit(&self, ring: &mut Ring) {
        let command = command(self.slot.number(), self.queue);
        ring.command(self.device, COMMIT_AND_FETCH, &command, &[], TAG_COMMIT);
    }

    /// Answers the request in the slot; `again` if a daemon before this one may have performed it.
    fn answer(&mut self, again: bool) {
        self.slot.keep();
        let number = self.slot.number();
        let mut spare = [0; KEPT_PAYLOAD_BYTES];
        let Parts { header, operation, payload, room } = self.slot.parts(&mut spare);
        let (errno, bytes) = match Request::of_parts(header, operation, payload) {
            Ok(mut request) => {
                if again {
                    request.asked.number = super::descriptor::again(number);
                }
                perform(self.front, &request, room).unwrap_or((0, 0))
            }
            Err(_) => (libc::EIO, 0),
        };
        let header = answer_header(number, errno, bytes);
        let elsewhere = (!self.slot.has_room()).then(|| &spare[..bytes]);
        self.slot.finish(&header, bytes, elsewhere);
    }
}

/// `struct fuse_uring_cmd_req`.
fn command(number: u64, queue: usize) -> [u8; 24] {
    let mut command = [0; 24];
    command[8..16].copy_from_slice(&number.to_ne_bytes());
    command[16..18].copy_from_slice(&(queue as u16).to_ne_bytes());
    command
}

#[cfg(test)]
mod tests;
