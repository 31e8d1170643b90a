//! Large sealed files that are read again: a thread of the mount writes warm copies of them, and the kernel reads those past us.
//!
//! Hides which files get one, when, and what becomes of it when the file is written to. Who reads a file through for the first time leaves
//! a copy on trial; where there is no memory for that, the file gets one when it was opened again. Invariants: a copy gets its name under the
//! file's stripe, when its bytes are those of the view that is below then; a file that is passed through to a copy has no writer; nobody who
//! asks for something waits for the thread that makes copies.

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
use crate::content::{self, Content};
use crate::id::Ino;
use crate::inode::Node;
use crate::patience;
use crate::readahead::FileReader;
use crate::upper::Upper;
use crate::upper::growing::Growing;
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

/// A reader who has come so far from the begin, in order, is likely to read all: who looks at a file's head leaves no copy.
const HEAD: u64 = 2 << 20;
/// How far from where the last read ended the next may begin: the kernel sends several at once.
const SLACK: u64 = 4 << 20;
const PIECE: usize = 1 << 20;

/// What was read of a sealed file.
#[derive(Default)]
struct WasRead {
    bytes: u64,
    /// Up to where it was read in order.
    end: u64,
    /// All of it, and then it was opened again.
    is_wanted: bool,
    /// A copy on trial was begun, or there was no room for it.
    was_tried: bool,
    growing: Option<Arc<Growing>>,
}

/// What the thread that makes copies is told.
#[derive(Clone, Copy)]
enum Job {
    /// To make one.
    Copy(Ino),
    /// That there is one on trial, whole or not, for which the time runs.
    Look,
}

/// The making of one mount's copies.
pub(super) struct Warming {
    from: u64,
    /// What was read of those that were read lately.
    read: Mutex<LruCache<Ino, WasRead>>,
    jobs: Mutex<Option<Sender<Job>>>,
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

    /// Nobody has `ino` open any more: if a copy of it is wanted, it is made now, when who reads isn't held up by it. One on trial that
    /// isn't whole goes.
    pub fn was_closed(&self, ino: Ino) {
        let mut all = self.read.lock();
        let Some(read) = all.peek_mut(&ino) else { return };
        let (is_wanted, growing) = (std::mem::take(&mut read.is_wanted), read.growing.take());
        drop(all);
        // Not under the lock: it may be large.
        drop(growing);
        if is_wanted {
            self.tell(Job::Copy(ino));
        }
    }

    fn tell(&self, job: Job) {
        if let Some(jobs) = &*self.jobs.lock() {
            // If there are too many, the next who opens the file says so again, and the thread doesn't sleep.
            let _ = jobs.try_send(job);
        }
    }

    /// `ino` is passed through to its copy: another has to be earned anew.
    pub fn is_passed(&self, ino: Ino) {
        self.read.lock().pop(&ino);
    }

    fn stop_growing(&self, ino: Ino) {
        let growing = self.read.lock().peek_mut(&ino).and_then(|read| read.growing.take());
        drop(growing);
    }

    /// Gives up all copies on trial that aren't whole and are as `is_meant` says.
    fn stop_growing_all(&self, is_meant: impl Fn(&Growing) -> bool) {
        let take = |read: &mut WasRead| read.growing.take_if(|growing| is_meant(growing));
        let all: Vec<_> = self.read.lock().iter_mut().filter_map(|(_, read)| take(read)).collect();
        drop(all);
    }

    fn is_growing(&self) -> bool {
        self.read.lock().iter().any(|(_, read)| read.growing.is_some())
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
        self.warming.stop_growing_all(|_| true);
        if let Some(thread) = self.warming.thread.lock().take() {
            let _ = thread.join();
        }
    }

    /// `bytes` of the sealed file `ino`, which `reader` reads, were read at `offset`: they go into the copy on trial, if it is to have one.
    pub(super) fn was_read(&self, ino: Ino, reader: &FileReader, offset: u64, bytes: &[u8]) {
        let content = reader.content();
        if bytes.is_empty() || !self.warming.is_fit(content) || self.warming.jobs.lock().is_none() {
            return;
        }
        let mut all = self.warming.read.lock();
        let read = all.get_or_insert_mut(ino, WasRead::default);
        read.bytes += bytes.len() as u64;
        if offset <= read.end + SLACK {
            read.end = read.end.max(offset + bytes.len() as u64);
        }
        let mut head = 0;
        if !read.was_tried && read.end >= HEAD {
            // Under the lock, as others read what comes next, and it must have that.
            (read.was_tried, head) = (true, read.end);
            let begun = self.upper.as_ref().and_then(|upper| upper.warm().grow(content).ok()?);
            read.growing = begun.map(Arc::new);
        }
        let growing = read.growing.clone();
        drop(all);
        let Some(growing) = growing.filter(|growing| growing.content() == content) else { return };
        if head > 0 {
            self.warming.tell(Job::Look);
        }
        if head > 0 && !self.may_get_copy(ino, content) {
            self.warming.stop_growing(ino);
        } else if let Err(Errno(errno)) = self.grow(ino, &growing, head, offset, bytes) {
            self.warming.stop_growing(ino);
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::debug!(%ino, %error, "a file that was read gets no copy on trial");
        }
    }

    /// Whether `ino`, which has `content`, may get a copy now.
    fn may_get_copy(&self, ino: Ino, content: &Content) -> bool {
        let is_written = self.opens.get(ino).is_some_and(|open| open.record.writers > 0);
        let is_there = self.upper.as_ref().is_none_or(|upper| upper.warm().may_be_there(ino));
        let state = self.state.read();
        let is_fit = self.warm_content(&state, ino).is_ok_and(|found| found.as_ref() == Some(content));
        // What has to come from another host isn't fetched for this.
        is_fit && !is_written && !is_there && !state.view.chunks().is_remote()
    }

    /// Adds `bytes`, which are at `offset`, to a copy on trial; before that what was read up to `head`, where it begins.
    fn grow(&self, ino: Ino, growing: &Growing, head: u64, offset: u64, bytes: &[u8]) -> FsResult<()> {
        let mut whole = None;
        if head > 0 {
            let chunks = self.state.read().view.chunks().clone();
            let mut piece = vec![0; PIECE];
            for at in (0..head).step_by(PIECE) {
                let count = content::read_at(&Once(&*chunks), growing.content(), at, &mut piece)?;
                whole = whole.or(growing.add(at, &piece[..count])?);
            }
        }
        let Some(made) = whole.or(growing.add(offset, bytes)?) else { return Ok(()) };
        self.warming.stop_growing(ino);
        // Who has it changes the file.
        let Some(_stripe) = self.stripe(ino).try_lock() else { return Ok(()) };
        let is_same = self.warm_content(&self.state.read(), ino)?.as_ref() == Some(growing.content());
        if is_same {
            self.writable_upper()?.warm().put(ino, made)?;
            self.warming.tell(Job::Look);
        }
        Ok(())
    }

    /// `ino` is opened for reading. If all of it was read before it gets a copy once it is closed, for those who open it later.
    pub(super) fn is_read_again(&self, upper: &Upper, ino: Ino) {
        let Some(read) = self.warming.read.lock().peek(&ino).map(|read| read.bytes) else { return };
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
        if !self.may_get_copy(ino, &content) {
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
        self.warming.stop_growing_all(|_| true);
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

fn make_copies(fs: &Weak<Fs>, jobs: &Receiver<Job>, is_stopped: &AtomicBool) {
    // SAFETY: a plain system call; 0 is this thread.
    #[allow(unsafe_code)]
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
    let has_copies = || {
        let are_there = |fs: &Fs| fs.upper().is_some_and(|upper| upper.warm().are_there()) || fs.warming.is_growing();
        fs.upgrade().is_some_and(|fs| are_there(&fs))
    };
    loop {
        // Programs fill the disk past us.
        let job = match has_copies() {
            true => jobs.recv_timeout(LOOKS),
            false => jobs.recv().map_err(RecvTimeoutError::from),
        };
        let Some(fs) = fs.upgrade() else { return };
        if let (Err(RecvTimeoutError::Timeout), Some(upper)) = (job, fs.upper()) {
            fs.warming.stop_growing_all(Growing::is_late);
            upper.warm().end_trials();
            upper.warm().keep_free();
        }
        let ino = match job {
            Ok(Job::Copy(ino)) => ino,
            Ok(Job::Look) | Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Err(Errno(errno)) = fs.warm(ino, || !is_stopped.load(Ordering::Relaxed)) {
            fs.warming.read.lock().pop(&ino);
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::debug!(%ino, %error, "a file that is read often gets no copy");
        }
    }
}
