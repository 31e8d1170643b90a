//! Requests by reading the device, answers by writing to it.
//!
//! Threads share one descriptor, which outlives the daemon in the keeper's hands: what a daemon that died has read and not
//! answered comes again from it. One thread reads at a time and serves what it has read ([`Role`]); before what may take long,
//! and while more is waiting than one thread gets done, another reads on. Memory: a thread has room for the largest request and the
//! largest answer, 2 MiB, of which what was once used is resident, and all that requests need once a large one has come. A thread that stands aside doesn't count: there are as many more
//! then, which end when it is back.
//!
//! A request that the kernel can't copy whole fails, and who asked gets EIO: so it is if a thread is killed while a page of its room is
//! made for that. Invariant: the pages that a request goes to are there before it is read, but for the first large one of a mount.
//!
//! Whoever finds nothing to read looks for a short time again and again before it sleeps, as long as that has paid: to wake a
//! thread on a halted processor takes longer than most answers. Invariant: looking gives way to any other thread that has work, costs
//! a mount that is idle nothing, and isn't done where there is one processor.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::abi::{ANSWER_HEADER_BYTES, Operation, Request, answer_header};
use super::awake::Pace;
use super::front::Front;
use super::leader::{Role, Turn};
use super::requests;
use crate::patience::{self, Wait};

/// The most that a request writes, or an answer reads.
pub(super) const DATA_BYTES: usize = 1 << 20;
/// The headers of a request and of what it asks for have more than enough room in it.
const HEADERS_BYTES: usize = 4096;
/// The largest request.
pub(super) const REQUEST_BYTES: usize = DATA_BYTES + HEADERS_BYTES;
const PAGE_BYTES: usize = 4096;
/// Larger ones don't come to most mounts.
const USUAL_REQUEST_BYTES: usize = 16 << 10;
/// Another reads on if so many requests were there as soon as they were asked for.
const BACKLOG: u32 = 4;
/// Reading or writing more than this at once takes long.
const SMALL_BYTES: u32 = 64 << 10;
/// For how long to look before sleeping.
const LOOKS_FOR: Duration = Duration::from_micros(100);
/// Looking that was in vain is left out up to so often, as a power of two, while nothing comes as soon as that.
const IN_VAIN_MAX: u32 = 6;
const PAUSES: usize = 4;

/// Serves the mount until it ends, with up to `limit` threads; the calling one is the first.
pub(super) fn serve(front: &Arc<Front>, device: BorrowedFd<'_>, limit: usize) -> io::Result<()> {
    let device = device.try_clone_to_owned()?;
    let flags = rustix::fs::fcntl_getfl(&device)?;
    rustix::fs::fcntl_setfl(&device, flags | OFlags::NONBLOCK)?;
    let looks = std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
    let served = Served {
        front: front.clone(),
        device,
        role: Arc::new(Role::new(limit)),
        looks,
        pace: Pace::new(),
        at_once: AtomicU32::new(0),
        in_vain: AtomicU32::new(0),
        left_out: AtomicU32::new(0),
        made: AtomicUsize::new(1),
        // Of a mount that goes on nobody knows.
        has_large: AtomicBool::new(front.fs.is_resumed()),
    };
    let role = served.role.clone();
    served.front.fs.says_when_idle();
    Arc::new(served).work();
    role.join()
}

/// What all threads of a mount share. The counters are the leader's: they are of use if they are about right.
struct Served {
    front: Arc<Front>,
    device: OwnedFd,
    role: Arc<Role>,
    /// Whether looking before sleeping can pay.
    looks: bool,
    pace: Pace,
    /// How many requests were there as soon as they were asked for, in a row.
    at_once: AtomicU32,
    /// How often in a row it looked in vain, and how often it will not look.
    in_vain: AtomicU32,
    left_out: AtomicU32,
    made: AtomicUsize,
    /// Whether large requests come.
    has_large: AtomicBool,
}

/// What a thread works with.
struct Hands {
    request: Vec<u8>,
    /// So many bytes of it have their pages.
    there: usize,
    answer: Room,
    /// While it serves as the leader: its turn.
    turn: Rc<Cell<Option<Turn>>>,
}

/// Where an answer is made: its header and its payload lie one after the other, as the kernel takes each page for itself. So a short
/// answer lies in one page, and what is read begins with one.
struct Room {
    bytes: Vec<u8>,
    /// Where the first page begins.
    start: usize,
    /// Where the payload begins.
    at: usize,
}

impl Room {
    fn new() -> Room {
        let bytes = vec![0; 2 * PAGE_BYTES + DATA_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Room { bytes, start, at: start + ANSWER_HEADER_BYTES }
    }

    /// For the payload of the answer to `operation`.
    fn payload(&mut self, operation: Operation) -> &mut [u8] {
        let before = if operation == Operation::Read { PAGE_BYTES } else { ANSWER_HEADER_BYTES };
        self.at = self.start + before;
        &mut self.bytes[self.at..][..DATA_BYTES]
    }

    /// The answer with the first `bytes` of the payload.
    fn whole(&mut self, number: u64, errno: i32, bytes: usize) -> &[u8] {
        let whole = &mut self.bytes[self.at - ANSWER_HEADER_BYTES..][..ANSWER_HEADER_BYTES + bytes];
        whole[..ANSWER_HEADER_BYTES].copy_from_slice(&answer_header(number, errno, bytes));
        whole
    }
}

impl Served {
    /// What a thread does. Once it has left the role it holds nothing of the mount any more.
    fn work(self: Arc<Served>) {
        let role = self.role.clone();
        self.take_turns();
        patience::on_waits(|_| {});
        drop(self);
        role.leave();
    }

    fn take_turns(self: &Arc<Served>) {
        let request = vec![0; REQUEST_BYTES];
        let mut hands = Hands { request, there: 0, answer: Room::new(), turn: Rc::default() };
        let (served, turn) = (self.clone(), hands.turn.clone());
        patience::on_waits(move |wait| {
            match wait {
                Wait::Begins => {}
                Wait::StandsAside => served.stand_aside(),
                Wait::IsBack => return served.role.come_back(),
            }
            if let Some(turn) = turn.take() {
                served.give(turn);
            }
        });
        while let Some(taken) = self.role.wait() {
            if taken.wants_thread {
                self.add_thread();
            }
            let led = catch_unwind(AssertUnwindSafe(|| self.lead(&mut hands, taken.turn)));
            if let Some(result) = led.unwrap_or_else(|_| Some(Err(io::Error::other("a mistake")))) {
                self.role.end(result);
            }
        }
    }

    fn add_thread(self: &Arc<Served>) {
        let served = self.clone();
        let name = format!("fuse-{}", self.made.fetch_add(1, Ordering::Relaxed));
        if let Err(error) = std::thread::Builder::new().name(name).spawn(move || served.work()) {
            tracing::warn!(%error, "a mount gets no more threads");
            self.role.leave();
        }
    }

    fn give(self: &Arc<Served>, turn: Turn) {
        self.at_once.store(0, Ordering::Relaxed);
        if self.role.give(turn) {
            self.add_thread();
        }
    }

    fn stand_aside(self: &Arc<Served>) {
        if self.role.stand_aside() {
            self.add_thread();
        }
    }

    /// Reads and serves until the role is lost; returns how the mount ended, if it did.
    fn lead(self: &Arc<Served>, hands: &mut Hands, mut turn: Turn) -> Option<io::Result<()>> {
        loop {
            let needed = if self.has_large.load(Ordering::Relaxed) { REQUEST_BYTES } else { USUAL_REQUEST_BYTES };
            if hands.there < needed {
                hands.request[hands.there..needed].fill(0);
                hands.there = needed;
            }
            let bytes = match self.next(&mut hands.request) {
                Ok(bytes) => bytes,
                Err(rustix::io::Errno::NODEV | rustix::io::Errno::CONNABORTED) => return Some(Ok(())),
                Err(errno) => return Some(Err(errno.into())),
            };
            if bytes > USUAL_REQUEST_BYTES {
                self.has_large.store(true, Ordering::Relaxed);
            }
            let request = Request::whole(&hands.request[..bytes]);
            // Whoever closed a file doesn't wait, and what it does next must find it closed.
            let in_order = matches!(&request, Ok(request) if request.operation == Operation::Release);
            let is_slow = matches!(&request, Ok(request) if may_take_long(request));
            let is_forget = matches!(&request, Ok(request) if request.operation.is_forget());
            // The kernel says so many of these that they tell nothing of how many programs wait.
            if is_forget {
                self.at_once.store(0, Ordering::Relaxed);
            } else {
                self.pace.request();
            }
            let serving = self.role.serves(turn, in_order);
            if is_slow || (!in_order && self.has_backlog()) {
                self.give(serving);
            } else {
                hands.turn.set(Some(serving));
            }
            match request {
                Ok(request) => self.answer(&request, &mut hands.answer),
                Err(_) => self.refuse(&hands.request[..bytes]),
            }
            hands.turn.set(None);
            let reads = self.role.reads(serving);
            if reads.is_none() && is_forget {
                // Who reads now may have found nothing to do before this one's inode was put aside.
                self.front.fs.idle();
            }
            turn = reads?;
        }
    }

    /// Whether there is more to read than who serves one request after the other gets done: another request waits now, as others did
    /// lately. One program alone may have closed a file and asked for another since we last looked, but then waits for us.
    fn has_backlog(&self) -> bool {
        if self.at_once.load(Ordering::Relaxed) < BACKLOG {
            return false;
        }
        let mut device = [PollFd::new(&self.device, PollFlags::IN)];
        let waits = poll(&mut device, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
        if !waits {
            self.at_once.store(0, Ordering::Relaxed);
        }
        waits
    }

    /// The next request: waits for it.
    fn next(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        if let Some(bytes) = self.read(buffer)? {
            self.at_once.fetch_add(1, Ordering::Relaxed);
            return Ok(bytes);
        }
        self.at_once.store(0, Ordering::Relaxed);
        // Whoever was just answered may be waiting for this processor.
        std::thread::yield_now();
        if let Some(bytes) = self.read(buffer)? {
            return Ok(bytes);
        }
        if let Some(bytes) = self.look(buffer)? {
            return Ok(bytes);
        }
        self.front.fs.idle();
        let begun = Instant::now();
        loop {
            let limit = self.pace.until_lull().map(|lull| Timespec { tv_sec: 0, tv_nsec: lull.subsec_nanos().into() });
            match poll(&mut [PollFd::new(&self.device, PollFlags::IN)], limit.as_ref()) {
                Ok(0) => self.pace.lull(),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            if let Some(bytes) = self.read(buffer)? {
                if begun.elapsed() < LOOKS_FOR {
                    // Looking would have found it.
                    self.in_vain.store(0, Ordering::Relaxed);
                    self.left_out.store(0, Ordering::Relaxed);
                }
                return Ok(bytes);
            }
        }
    }

    /// Looks for a request for a short time, if that seems to pay.
    fn look(&self, buffer: &mut [u8]) -> rustix::io::Result<Option<usize>> {
        let left_out = self.left_out.load(Ordering::Relaxed);
        if !self.looks || left_out > 0 {
            self.left_out.store(left_out.saturating_sub(1), Ordering::Relaxed);
            return Ok(None);
        }
        let begun = Instant::now();
        while begun.elapsed() < LOOKS_FOR {
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
            if let Some(bytes) = self.read(buffer)? {
                self.in_vain.store(0, Ordering::Relaxed);
                return Ok(Some(bytes));
            }
            std::thread::yield_now();
        }
        let in_vain = (self.in_vain.load(Ordering::Relaxed) + 1).min(IN_VAIN_MAX);
        self.in_vain.store(in_vain, Ordering::Relaxed);
        self.left_out.store(1 << in_vain, Ordering::Relaxed);
        Ok(None)
    }

    /// A request, if there is one.
    fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.device, &mut *buffer) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                // Who asked has gone while it was read.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn answer(&self, request: &Request<'_>, room: &mut Room) {
        let payload = room.payload(request.operation);
        let Some((errno, bytes)) = requests::perform(&self.front, request, payload) else { return };
        self.write(request.asked.number, room.whole(request.asked.number, errno, bytes));
    }

    /// Answers what can't be understood.
    fn refuse(&self, bytes: &[u8]) {
        if let Ok(number) = super::abi::long(bytes, 8) {
            self.write(number, &answer_header(number, libc::EINVAL, 0));
        }
    }

    /// Gives the kernel an answer to request `number`.
    fn write(&self, number: u64, answer: &[u8]) {
        match rustix::io::write(&self.device, answer) {
            // Who asked has gone, or the mount.
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => {}
            Err(error) => {
                tracing::warn!(%error, "the kernel didn't take an answer");
                let _ = rustix::io::write(self.device.as_fd(), &answer_header(number, libc::EIO, 0));
            }
        }
    }
}

/// Whether others should not wait until `request` is done.
fn may_take_long(request: &Request<'_>) -> bool {
    match request.operation {
        Operation::Fsync | Operation::Fsyncdir | Operation::Fallocate | Operation::Lseek | Operation::CopyFileRange => {
            true
        }
        Operation::Read | Operation::Write => request.word(16) > SMALL_BYTES,
        _ => false,
    }
}
