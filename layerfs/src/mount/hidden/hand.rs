//! The hand: a process of its own that asks the hidden mount what the daemon may not ask itself.
//!
//! What makes the kernel ask (opening, truncating, syncing) is done by a [`helper`] that has nothing but the mount's root: if the
//! daemon dies, the next answers what the hand waits for; then it finds that nobody is there any more, and ends. Invariants: the hand has
//! no descriptor of the device; what it is told may be done twice, since a hand that died is replaced by another, which is told again; but
//! nothing that changes a file is done late, for a daemon that died: who serves the hidden mount takes that of its own hand only
//! ([`Hand::process`]).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::sync::WaitGroup;
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, Mode, OFlags, XattrFlags};
use rustix::net::Shutdown;
use serde::{Deserialize, Serialize};

use crate::error::io_errno;
use crate::mount::helper::{self, Part};
use crate::packets::{receive, send};
use crate::patience;

const STACK_BYTES: usize = 128 * 1024;
/// So many hands may die of one order.
const TRIES: usize = 5;
/// The attribute that a hold asks for. The answer comes when the hold ends.
pub(super) const HOLD_NAME: &str = "user.layerfs.hold";

/// What the hand does with a file of the hidden mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::mount) enum Order {
    /// Hands back a descriptor that only names the file.
    Open,
    /// Writes back what is dirty, and lets the file go.
    Close,
    /// Sets its length.
    Truncate(u64),
    /// `fsync`.
    Sync,
    /// Writes back what is dirty.
    WriteBack,
    /// `fallocate`.
    Allocate { mode: i32, offset: u64, bytes: u64 },
    /// Writes back what is dirty, and tells what could not be written since it was told last.
    Flush,
    /// Takes the lock that writers take, until the filesystem answers.
    Hold,
}

/// What the hand is told: to do `order` to `node`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Told {
    id: u64,
    node: u64,
    order: Order,
}

/// What came of the order of number `id`; 0 if all went well.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    id: u64,
    errno: i32,
}

/// What the hand has open.
struct Grip {
    socket: OwnedFd,
    root: OwnedFd,
    files: Mutex<HashMap<u64, Arc<File>>>,
}

/// The hand's process: does what it is told through `socket` until nobody is at the other end. The mount's root is handed to it.
///
/// # Errors
/// If it isn't.
pub(in crate::mount) fn run(socket: OwnedFd, descriptors: Vec<OwnedFd>) -> Result<()> {
    let root = descriptors.into_iter().next().ok_or(ErrorKind::InvalidData)?;
    let grip = Arc::new(Grip { root, socket, files: Mutex::default() });
    let all = WaitGroup::new();
    while let Ok(Some((told, _))) = receive::<Told>(grip.socket.as_fd()) {
        let (doing, working) = (grip.clone(), all.clone());
        let obey = move || {
            doing.reply(told.id, doing.obey(told));
            drop(working);
        };
        // Each in a thread of its own: any of them may wait for long.
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(obey) {
            grip.reply(told.id, Err(error));
        }
    }
    // A thread that ends while the kernel saves times leaves that behind as an error, which the next who syncs would be told.
    all.wait();
    Ok(())
}

impl Grip {
    fn reply(&self, id: u64, result: Result<Option<OwnedFd>>) {
        let (errno, descriptor) = match result {
            Ok(descriptor) => (0, descriptor),
            Err(error) => (io_errno(&error), None),
        };
        let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        // If nobody is there any more, the reader of orders finds out too.
        let _ = send(self.socket.as_fd(), &Done { id, errno }, &descriptors);
    }

    /// Does an order, again if something interrupted it: all of them may be done twice.
    fn obey(&self, told: Told) -> Result<Option<OwnedFd>> {
        loop {
            match self.perform(told.order, told.node) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    fn open(&self, node: u64, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(&self.root, node.to_string(), flags, Mode::empty())?)
    }

    fn file(&self, node: u64) -> Result<Arc<File>> {
        if let Some(file) = self.files.lock().get(&node) {
            return Ok(file.clone());
        }
        // Not under the lock: others shall not wait for this file.
        let file = Arc::new(File::from(self.open(node, OFlags::RDWR | OFlags::NOATIME)?));
        Ok(self.files.lock().entry(node).or_insert(file).clone())
    }

    fn perform(&self, order: Order, node: u64) -> Result<Option<OwnedFd>> {
        if order == Order::Open {
            return self.open(node, OFlags::PATH).map(Some);
        }
        let file = self.file(node)?;
        match order {
            Order::Open => {}
            Order::Close => {
                let written = write_back(&file);
                self.files.lock().remove(&node);
                written?;
            }
            Order::Truncate(bytes) => file.set_len(bytes)?,
            Order::Sync => file.sync_all()?,
            Order::WriteBack => write_back(&file)?,
            Order::Allocate { mode, offset, bytes } => {
                rustix::fs::fallocate(&*file, FallocateFlags::from_bits_retain(mode as u32), offset, bytes)?;
            }
            Order::Flush => flush(&file)?,
            Order::Hold => {
                // It is answered when the hold ends; that it fails then is as it should be.
                let _ = rustix::fs::fsetxattr(&*file, HOLD_NAME, b"", XattrFlags::empty());
            }
        }
        Ok(None)
    }
}

fn write_back(file: &File) -> Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: a plain system call on a descriptor that is open.
    #[allow(unsafe_code)]
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// What `close` tells of a file that stays open.
fn flush(file: &File) -> Result<()> {
    let twin = file.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor is new and owned by nobody else.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close(twin) };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

type Answer = Result<Option<OwnedFd>>;

/// The connection to one hand.
struct Link {
    socket: OwnedFd,
    next: AtomicU64,
    /// Who waits for which answer; none once the hand is gone.
    waiting: Mutex<Option<HashMap<u64, Sender<Answer>>>>,
}

/// The daemon's side: a hand that is started when it is needed, and again if it dies.
pub(super) struct Hand {
    root: OwnedFd,
    link: Mutex<Option<Arc<Link>>>,
    /// The newest hand.
    process: Arc<AtomicU32>,
}

impl Hand {
    /// One for the mount whose root is `root`.
    pub fn new(root: OwnedFd) -> Hand {
        Hand { root, link: Mutex::new(None), process: Arc::default() }
    }

    /// The process of the hand that there is now; 0 before the first.
    pub fn process(&self) -> Arc<AtomicU32> {
        self.process.clone()
    }

    /// Has `order` done to `node`, and waits for it. Hold no lock of the filesystem's, and serve no request of the hidden mount.
    pub fn call(&self, node: u64, order: Order) -> Answer {
        patience::waits();
        for _ in 0..TRIES {
            if let Ok(answer) = self.begin(node, order)?.recv() {
                return answer;
            }
            // It died, with what it was told done or not.
        }
        Err(Error::new(ErrorKind::BrokenPipe, "the process that asks the hidden mount ends again and again"))
    }

    /// As [`Hand::call`], without waiting. If the hand dies, the answer never comes.
    pub fn begin(&self, node: u64, order: Order) -> Result<Receiver<Answer>> {
        let (sender, receiver) = bounded(1);
        let mut link = self.link.lock();
        for _ in 0..2 {
            let current = match &*link {
                Some(current) => current.clone(),
                None => link.insert(start(&self.root, &self.process)?).clone(),
            };
            let id = current.next.fetch_add(1, Ordering::Relaxed);
            let is_there = match &mut *current.waiting.lock() {
                Some(waiting) => waiting.insert(id, sender.clone()).is_none(),
                None => false,
            };
            if is_there && send(current.socket.as_fd(), &Told { id, node, order }, &[]).is_ok() {
                break;
            }
            current.end();
            *link = None;
        }
        Ok(receiver)
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        if let Some(link) = self.link.lock().take() {
            link.end();
        }
    }
}

impl Link {
    fn end(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    fn read_answers(&self) {
        while let Ok(Some((Done { id, errno }, descriptors))) = receive(self.socket.as_fd()) {
            let sender = self.waiting.lock().as_mut().and_then(|waiting| waiting.remove(&id));
            let answer = match errno {
                0 => Ok(descriptors.into_iter().next()),
                errno => Err(Error::from_raw_os_error(errno)),
            };
            if let Some(sender) = sender {
                let _ = sender.try_send(answer);
            }
        }
        // Whoever waits finds that no answer comes.
        *self.waiting.lock() = None;
    }
}

/// Starts a hand for the mount whose root is `root`.
fn start(root: &OwnedFd, process: &AtomicU32) -> Result<Arc<Link>> {
    let (ours, mut child) = helper::start(&Part::Hand, &[root.as_fd()])?;
    process.store(child.id(), Ordering::Release);
    let link = Arc::new(Link { socket: ours, next: AtomicU64::new(1), waiting: Mutex::new(Some(HashMap::new())) });
    let reading = link.clone();
    std::thread::Builder::new().name("hidden-hand".to_owned()).spawn(move || {
        reading.read_answers();
        let _ = child.wait();
    })?;
    Ok(link)
}
