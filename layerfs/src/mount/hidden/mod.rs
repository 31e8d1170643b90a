//! A second, hidden mount with the kernel's writeback cache, for large files that lower layers have: decision 23.
//!
//! On the mount that people see such a file is passed through to the hidden one. What is written lies in the hidden file's page cache, and
//! reaches us in large pieces when the kernel writes back. Hides which hidden file stands for which inode, and who
//! may ask the kernel what. Invariants:
//!
//! - No thread of this process waits for the hidden mount: it looks at what the kernel knows without asking ([`Hidden::live`]), and has
//!   everything else done by the [`hand`].
//! - Threads that serve the hidden mount ([`serve`]) take the filesystem's locks; so who waits for the hand holds none of them.
//! - A hidden file is there from before its inode is opened until the kernel has forgotten it, which it does when nobody has it open or
//!   mapped and all of it is written back. While it is there, the inode is opened in no other way.
//! - A node's number is not used again.

pub(super) mod hand;
mod nodes;
pub(super) mod place;
mod serve;

use std::collections::HashSet;
use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError, unbounded};
use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, StatxFlags};

use super::fs::Fs;
use super::helper;
use crate::attr::Time;
use crate::id::Ino;
use crate::patience;
use crate::upper::table::Stamp;
use hand::{Hand, Order};
pub(super) use nodes::Pin;
use nodes::{Nodes, Waiting};
use place::Place;

/// The most that the kernel reads or writes back at once.
const DATA_BYTES: usize = 256 << 10;
/// How long a writer may keep its file's lock before a seal gives up.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOKS: Duration = Duration::from_millis(50);

/// A hidden mount.
pub(super) struct Hidden {
    device: Arc<OwnedFd>,
    root: OwnedFd,
    hand: Hand,
    nodes: Arc<Nodes>,
    /// Inodes that are just being opened or truncated.
    turns: Mutex<HashSet<Ino>>,
    turned: Condvar,
    /// The kernel doesn't take its files to pass others through to.
    is_refused: AtomicBool,
    /// Nodes to be let go.
    closing: Sender<u64>,
    closed: Mutex<Option<Receiver<u64>>>,
}

/// Nobody else opens or truncates the inode while this exists.
pub(super) struct Turn<'a> {
    hidden: &'a Hidden,
    ino: Ino,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.hidden.turns.lock().remove(&self.ino);
        self.hidden.turned.notify_all();
    }
}

/// Nobody writes to hidden files while this exists; for their mappings that doesn't hold.
pub(super) struct Quiet {
    nodes: Arc<Nodes>,
    device: Arc<OwnedFd>,
}

impl std::fmt::Debug for Quiet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Quiet").finish_non_exhaustive()
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        for Waiting(number) in self.nodes.end_hold() {
            serve::let_go(&self.device, number);
        }
    }
}

impl Hidden {
    /// Makes one.
    ///
    /// # Errors
    /// Where such a mount can't be had, or no hand.
    pub fn new() -> Result<Arc<Hidden>> {
        if !helper::is_possible() {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let Place { device, root } = Place::make()?;
        Hidden::over(device, root)
    }

    /// Goes on with the one that a daemon which died has left.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn resumed(device: OwnedFd, root: OwnedFd) -> Result<Arc<Hidden>> {
        let hidden = Hidden::over(device, root)?;
        super::descriptor::resend(&hidden.device)?;
        Ok(hidden)
    }

    fn over(device: OwnedFd, root: OwnedFd) -> Result<Arc<Hidden>> {
        let hand = Hand::new(root.try_clone()?);
        let (closing, closed) = unbounded();
        Ok(Arc::new(Hidden {
            device: Arc::new(device),
            root,
            hand,
            nodes: Arc::default(),
            turns: Mutex::default(),
            turned: Condvar::new(),
            is_refused: AtomicBool::new(false),
            closing,
            closed: Mutex::new(Some(closed)),
        }))
    }

    /// What the next daemon needs to go on.
    pub fn descriptors(&self) -> Result<[OwnedFd; 2]> {
        Ok([self.device.try_clone()?, self.root.as_fd().try_clone_to_owned()?])
    }

    /// Starts to serve it with `threads` threads, which end with the mount, or when there is no `fs` any more.
    pub fn start(&self, fs: &Arc<Fs>, threads: usize) -> Result<()> {
        for number in 0..threads {
            let (nodes, device) = (self.nodes.clone(), self.device.clone());
            let served = serve::Served::new(nodes, device, Arc::downgrade(fs), self.hand.process());
            std::thread::Builder::new().name(format!("hidden-{number}")).spawn(move || served.work())?;
        }
        if let Some(closed) = self.closed.lock().take() {
            let fs = Arc::downgrade(fs);
            std::thread::Builder::new().name("hidden-close".to_owned()).spawn(move || let_all_go(&fs, &closed))?;
        }
        Ok(())
    }

    /// The kernel doesn't take its files to pass others through to: some versions want files that are open.
    pub fn refused(&self, error: &std::io::Error) {
        if !self.is_refused.swap(true, Ordering::Relaxed) {
            tracing::info!(%error, "large files of lower layers are written to without a cache");
        }
    }

    /// Whether files can be passed through to it, as far as is known.
    pub fn is_of_use(&self) -> bool {
        !self.is_refused.load(Ordering::Relaxed)
    }

    /// Waits until nobody else opens or truncates `ino`.
    pub fn turn(&self, ino: Ino) -> Turn<'_> {
        let mut turns = self.turns.lock();
        if turns.contains(&ino) {
            // Who has it may wait for the end of a seal.
            let _aside = parking_lot::MutexGuard::unlocked(&mut turns, patience::stands_aside);
            while turns.contains(&ino) {
                self.turned.wait(&mut turns);
            }
        }
        turns.insert(ino);
        drop(turns);
        Turn { hidden: self, ino }
    }

    /// The hidden file of `ino`, if it has one.
    pub fn node(&self, ino: Ino) -> Option<u64> {
        self.nodes.of(ino)
    }

    /// Whether `ino` has a hidden file by which it is open, or was. One by which it never was isn't used any more.
    pub fn was_kept(&self, ino: Ino) -> bool {
        self.nodes.kept(ino).is_some()
    }

    /// Whether `node` is there still.
    pub fn is_there(&self, node: u64) -> bool {
        self.nodes.is_there(node)
    }

    /// The files that there are, and their inodes.
    pub fn all(&self) -> Vec<(u64, Ino)> {
        self.nodes.all()
    }

    /// The hidden file of `ino`, made if it has none by which it was open; with a descriptor that names it. As the tables have it, `ino` is as `stamp` says.
    /// While what is returned exists the file stays. Hold the turn of `ino`.
    ///
    /// # Errors
    /// Those of the hand. A file that was made for this isn't there then.
    pub fn pin(&self, ino: Ino, stamp: Stamp) -> Result<Pin> {
        let (pin, file) = Nodes::pin(&self.nodes, ino, stamp);
        if file.is_none() {
            self.look_at(pin.node())?;
        }
        Ok(pin)
    }

    /// `node`, which an earlier daemon made, is the hidden file of `ino`.
    pub fn find(&self, node: u64, ino: Ino, stamp: Stamp) {
        Nodes::pin_again(&self.nodes, node, ino, stamp).keep();
    }

    /// From now on [`Hidden::live`] looks at `node`.
    ///
    /// # Errors
    /// Those of the hand.
    pub fn look_at(&self, node: u64) -> Result<()> {
        let opened = self.hand.call(node, Order::Open)?;
        self.nodes.opened(node, opened.ok_or(std::io::ErrorKind::InvalidData)?);
        Ok(())
    }

    /// What [`Hidden::pin`] gave wasn't used.
    pub fn not_used(&self, node: u64) {
        let _ = self.closing.send(node);
    }

    /// The last descriptor of `node`'s inode was closed.
    pub fn idle(&self, node: u64) {
        self.nodes.idle(node);
        let _ = self.closing.send(node);
    }

    /// The length and the time of change of `ino`, if the kernel knows better than the tables; and whether the time isn't that which the
    /// tables were last told.
    pub fn live(&self, ino: Ino) -> Option<(Stamp, bool)> {
        let (file, known) = self.nodes.file(ino)?;
        let stamp = look(file.as_fd()).ok()?;
        Some((stamp, stamp.mtime != known))
    }

    /// The tables have been told of `mtime`.
    pub fn told(&self, ino: Ino, mtime: Time) {
        self.nodes.told(ino, mtime);
    }

    /// Nobody can reach `ino` any more: what comes of it is of no use.
    pub fn removed(&self, ino: Ino) {
        self.nodes.removed(ino);
    }

    /// Has the hand do `order`. Hold none of the filesystem's locks.
    ///
    /// # Errors
    /// What it came to.
    pub fn order(&self, node: u64, order: Order) -> Result<()> {
        // A seal that goes on has the lock that most of them take.
        let _aside = patience::stands_aside();
        self.hand.call(node, order).map(drop)
    }

    /// Has all dirty pages written back.
    ///
    /// # Errors
    /// Of the first that could not be.
    pub fn write_back_all(&self) -> Result<()> {
        let orders: Vec<_> =
            self.all().into_iter().map(|(node, _)| (node, self.hand.begin(node, Order::WriteBack))).collect();
        for (node, begun) in orders {
            let done = match begun?.recv() {
                Ok(done) => done.map(drop),
                Err(_) => self.order(node, Order::WriteBack),
            };
            // What the kernel has forgotten meanwhile is written back.
            let is_gone = |error: &std::io::Error| error.raw_os_error() == Some(libc::ENOENT) && !self.is_there(node);
            match done {
                Err(error) if is_gone(&error) => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Holds back those who write to hidden files, and has all that they wrote written back.
    ///
    /// # Errors
    /// A writer that doesn't end; bytes that can't be written.
    pub fn quiet(&self) -> Result<Quiet> {
        let nodes: Vec<u64> = self.all().into_iter().map(|(node, _)| node).collect();
        self.nodes.begin_hold(&nodes);
        let quiet = Quiet { nodes: self.nodes.clone(), device: self.device.clone() };
        let mut holds = Vec::with_capacity(nodes.len());
        for node in nodes {
            holds.push((node, self.hand.begin(node, Order::Hold)?));
        }
        let begun = Instant::now();
        while !self.nodes.are_held(LOOKS) {
            if begun.elapsed() > PATIENCE {
                let what = "a write into a file doesn't end";
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what));
            }
            for (node, hold) in &mut holds {
                // The hand died, or came to the end of it before we heard of it.
                let has_ended = !matches!(hold.try_recv(), Err(TryRecvError::Empty));
                if has_ended && self.nodes.is_hold_wanted(*node) {
                    *hold = self.hand.begin(*node, Order::Hold)?;
                }
            }
        }
        self.write_back_all()?;
        Ok(quiet)
    }

    /// Writes back what is left of `node`, unless somebody has it open again. False if so.
    pub fn finish(&self, node: u64) -> bool {
        if self.nodes.is_busy(node) {
            return false;
        }
        if let Err(error) = self.order(node, Order::Close) {
            tracing::warn!(node, %error, "what was written to a file could not be written back");
        }
        true
    }

    /// Lets go of `node`, unless somebody has it open again.
    pub fn let_go(&self, node: u64) {
        self.nodes.let_go(node);
    }

    /// The seen mount has ended, and all is written back: lets go of all files, also of those whose closing nobody told.
    pub fn end(&self) {
        drop(self.nodes.take_files());
    }
}

/// What the kernel knows of a hidden file, which it isn't asked to ask us for.
fn look(file: BorrowedFd<'_>) -> Result<Stamp> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(file, "", flags, StatxFlags::SIZE | StatxFlags::MTIME)?;
    let mtime = Time { seconds: found.stx_mtime.tv_sec, nanos: found.stx_mtime.tv_nsec };
    Ok(Stamp { bytes: found.stx_size, mtime })
}

/// Lets go of files that nobody has open, when they are written back.
fn let_all_go(fs: &Weak<Fs>, closed: &Receiver<u64>) {
    while let Ok(node) = closed.recv() {
        let Some(fs) = fs.upgrade() else { return };
        fs.let_hidden_go(node);
    }
}
