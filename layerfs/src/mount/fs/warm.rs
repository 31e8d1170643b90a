//! Large sealed files that are read again: a thread of the mount writes warm copies of them, and the kernel reads those past us.
//!
//! Hides which files get one, and what becomes of it when the file is written to. Invariants: a copy gets its name under the file's
//! stripe, when its bytes are those of the view that is below then; a file that is passed through to a copy has no writer; nobody who
//! asks for something waits for a copy to be made.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use lru::LruCache;
use parking_lot::Mutex;

use super::super::errno::{Errno, FsResult, fail};
use super::attrs::may_lose_bits;
use super::edit::Edit;
use super::giving::Once;
use super::opens::PASSED_MAX;
use super::{Fs, State};
use crate::content::Content;
use crate::id::Ino;
use crate::inode::Node;
use crate::patience;
use crate::upper::Upper;
use crate::upper::table::Backed;

/// Smaller files are read fast enough, and there are many of them.
const FROM: u64 = 8 << 20;
/// So many files are remembered to have been read through.
const READ_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// So many wait for their copy; others come when they are opened again.
const WAITING_MAX: usize = 16;
/// So often a mount that has copies looks whether the disk has room for them still.
const LOOKS: Duration = Duration::from_secs(1);
/// The lowest priority of a thread.
const NICE: i32 = 19;

/// What was read of a sealed file.
#[derive(Clone, Copy, Default)]
struct WasRead {
    bytes: u64,
    /// All of it, and then it was opened again.
    is_wanted: bool,
}

/// The making of one mount's copies.
pub(super) struct Warming {
    from: u64,
    /// What was read of those that were read lately.
    read: Mutex<LruCache<Ino, WasRead>>,
    jobs: Mutex<Option<Sender<Ino>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    is_stopped: Arc<AtomicBool>,
}

impl Default for Warming {
    fn default() -> Warming {
        Warming {
            from: FROM,
            read: Mutex::new(LruCache::new(READ_MAX)),
            jobs: Mutex::default(),
            thread: Mutex::default(),
            is_stopped: Arc::default(),
        }
    }
}

impl Warming {
    fn is_fit(&self, content: &Content) -> bool {
        matches!(content, Content::Extents { .. }) && (self.from..=PASSED_MAX).contains(&content.len())
    }

    /// `count` bytes of `content`, which is what `ino` has, were read.
    pub fn was_read(&self, ino: Ino, content: &Content, count: usize) {
        if self.is_fit(content) && self.jobs.lock().is_some() {
            self.read.lock().get_or_insert_mut(ino, WasRead::default).bytes += count as u64;
        }
    }

    /// Nobody has `ino` open any more: if a copy of it is wanted, it is made now, when who reads isn't held up by it.
    pub fn was_closed(&self, ino: Ino) {
        if !self.read.lock().peek_mut(&ino).is_some_and(|read| std::mem::take(&mut read.is_wanted)) {
            return;
        }
        if let Some(jobs) = &*self.jobs.lock() {
            // Else the next who opens it says so.
            let _ = jobs.try_send(ino);
        }
    }
}

impl Fs {
    /// From now on files that are read again get warm copies, until [`Fs::stop_warming`]. Of use only where files are passed through.
    pub(in crate::mount) fn keep_warm(self: &Arc<Fs>) {
        if !self.upper.as_ref().is_some_and(|upper| upper.warm().is_on()) {
            return;
        }
        let (send, receive) = bounded(WAITING_MAX);
        let (fs, is_stopped) = (Arc::downgrade(self), self.warming.is_stopped.clone());
        let thread = std::thread::Builder::new().name("layerfs-warm".to_owned());
        match thread.spawn(move || make_copies(&fs, &receive, &is_stopped)) {
            Ok(thread) => {
                *self.warming.thread.lock() = Some(thread);
                *self.warming.jobs.lock() = Some(send);
            }
            Err(error) => tracing::warn!(%error, "cannot start a thread that makes warm copies"),
        }
    }

    /// Ends what [`Fs::keep_warm`] began.
    pub(in crate::mount) fn stop_warming(&self) {
        self.warming.is_stopped.store(true, Ordering::Relaxed);
        *self.warming.jobs.lock() = None;
        if let Some(thread) = self.warming.thread.lock().take() {
            let _ = thread.join();
        }
    }

    /// `ino` is opened for reading. If all of it was read before it gets a copy once it is closed, for those who open it later.
    pub(super) fn is_read_again(&self, upper: &Upper, ino: Ino) {
        let Some(WasRead { bytes: read, .. }) = self.warming.read.lock().peek(&ino).copied() else { return };
        if upper.warm().may_be_there(ino) {
            return;
        }
        let Ok(Some(content)) = self.warm_content(&self.state.read(), ino) else { return };
        if read >= content.len()
            && let Some(read) = self.warming.read.lock().peek_mut(&ino)
        {
            read.is_wanted = true;
        }
    }

    /// What `ino` has, if it may have a copy.
    fn warm_content(&self, state: &State, ino: Ino) -> FsResult<Option<Content>> {
        let inode = state.inode(ino)?;
        if inode.backed.is_some() || may_lose_bits(&inode) {
            return Ok(None);
        }
        Ok(match inode.inode.node {
            Node::File(content) if self.warming.is_fit(&content) => Some(content),
            _ => None,
        })
    }

    /// Makes a copy of `ino`, unless something is against it. `goes_on`: whether it is still wanted. A file that got one, or
    /// failed to, has to be read through again before it gets another; one that there was no room for hasn't.
    fn warm(&self, ino: Ino, goes_on: impl Fn() -> bool) -> FsResult<()> {
        let upper = self.writable_upper()?;
        let (content, view) = {
            let state = self.state.read();
            let Some(content) = self.warm_content(&state, ino)? else { return Ok(()) };
            (content, state.view.clone())
        };
        // What has to come from another host isn't fetched for this.
        let is_written = self.opens.get(ino).is_some_and(|open| open.record.writers > 0);
        if is_written || upper.warm().may_be_there(ino) || view.chunks().is_remote() {
            return Ok(());
        }
        let Some(made) = upper.warm().make(&Once(&**view.chunks()), &content, goes_on)? else { return Ok(()) };
        // Who has it changes the file.
        let Some(_stripe) = self.stripe(ino).try_lock() else { return Ok(()) };
        let is_same = self.warm_content(&self.state.read(), ino)?.as_ref() == Some(&content);
        if is_same {
            upper.warm().put(ino, made)?;
        }
        self.warming.read.lock().pop(&ino);
        Ok(())
    }

    /// Before `ino`, a sealed file whose stripe is held and which has `content`, is changed: its copy goes. If it is in use it becomes the data
    /// file; returns whether.
    pub(super) fn leave_warm(&self, upper: &Upper, ino: Ino, content: &Content) -> FsResult<bool> {
        let Content::Extents { chunker, .. } = content else { return Ok(false) };
        loop {
            if upper.warm().remove_idle(ino) {
                return Ok(false);
            }
            patience::waits();
            // Those who read it may have closed it just now.
            if upper.data().adopt(ino, upper.warm())? {
                break;
            }
        }
        let mut edit = Edit::new(self, upper);
        let change = |edit: &mut Edit<'_>| -> FsResult<()> {
            let mut inode = edit.inode(ino)?;
            inode.inode.node = Node::File(Content::empty());
            inode.backed = Some(Backed { bytes: content.len(), chunker: *chunker, base_bytes: 0 });
            edit.set(inode);
            Ok(())
        };
        match change(&mut edit).and_then(|()| edit.commit()) {
            Ok(state) => {
                // Under the state: who opens the file finds both or neither.
                self.opens.is_no_longer_warm(upper, ino);
                upper.warm().has_become_data(ino);
                drop(state);
                self.readers.lock().pop(&ino);
                Ok(true)
            }
            Err(errno) => {
                upper.data().remove(ino);
                Err(errno)
            }
        }
    }

    /// Before somebody opens `ino` for writing while others read its copy: it becomes the data file, which all have then.
    pub(super) fn make_warm_own(&self, ino: Ino) -> FsResult<()> {
        let (upper, _gate) = self.enter()?;
        let _stripe = self.stripe(ino).lock();
        let is_warm = || self.opens.get(ino).is_some_and(|open| open.record.is_warm);
        if is_warm() {
            self.data_changes(ino);
            self.copy_up(upper, ino, u64::MAX)?;
        }
        // Somebody took the copy away from us.
        if is_warm() { fail(libc::EIO) } else { Ok(()) }
    }

    /// The disk is full: what was removed goes at once, and copies that nobody uses. False if there are none.
    pub(super) fn make_room(&self) -> bool {
        let Some(upper) = &self.upper else { return false };
        patience::waits();
        let was_removed = self.await_removed();
        was_removed | upper.free_removed() | upper.warm().make_room()
    }

    /// Does `work`; if room was what it lacked, and it `can_be_repeated`, once more when removed files or copies could go for it.
    pub(in crate::mount) fn with_room<T>(
        &self,
        can_be_repeated: bool,
        mut work: impl FnMut() -> FsResult<T>,
    ) -> FsResult<T> {
        match work() {
            Err(errno) if can_be_repeated && errno.is_no_space() && (self.drop_waiting() | self.make_room()) => work(),
            done => done,
        }
    }

    /// What the copies of this mount take of the disk, in bytes.
    pub fn warm_bytes(&self) -> u64 {
        self.upper.as_ref().map_or(0, |upper| upper.warm().bytes())
    }
}

fn make_copies(fs: &Weak<Fs>, jobs: &Receiver<Ino>, is_stopped: &AtomicBool) {
    // SAFETY: a plain system call; 0 is this thread.
    #[allow(unsafe_code)]
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
    let has_copies = || fs.upgrade().and_then(|fs| Some(fs.upper()?.warm().are_there())).unwrap_or_default();
    loop {
        // Programs fill the disk past us.
        let job = match has_copies() {
            true => jobs.recv_timeout(LOOKS),
            false => jobs.recv().map_err(RecvTimeoutError::from),
        };
        let Some(fs) = fs.upgrade() else { return };
        if let (Err(RecvTimeoutError::Timeout), Some(upper)) = (job, fs.upper()) {
            upper.warm().keep_free();
        }
        let ino = match job {
            Ok(ino) => ino,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Err(Errno(errno)) = fs.warm(ino, || !is_stopped.load(Ordering::Relaxed)) {
            fs.warming.read.lock().pop(&ino);
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::debug!(%ino, %error, "a file that is read often gets no copy");
        }
    }
}
