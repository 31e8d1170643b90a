//! Holding back those who write to data files past us, for the moment of a seal.
//!
//! A file that is passed through is written to by the kernel, and nothing takes that right back. What can be had is the lock
//! that every write takes: somebody who writes to a file has its inode locked, also while the bytes that he writes have yet to be
//! fetched. So a thread for each file writes one byte that isn't there: its page is a userfault that nobody answers. When
//! the seal is over the page is made inaccessible and the write fails with EFAULT, having written nothing. If the process dies
//! the kernel ends the threads, and with them the locks. Reading takes no such lock on ext4 and others; seeking for holes and truncating
//! do. Where reading does too (XFS, NFS), a seal would wait for itself, so nothing is passed through there.
//!
//! What isn't held back: a direct write that was submitted and not waited for (`io_submit`, io_uring). It has set the file's times and
//! let go of the lock, and its bytes may come at any time until its descriptor is closed. So that a file's stamp is the same after a hold
//! says nothing as long as somebody had it open for writing.
//!
//! Side effect: the data files' times of change are those of the hold.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, IoSliceMut, Read, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::ReadWriteFlags;
use rustix::process::Pid;

const PAGE: usize = 4096;
/// How long a writer may keep its file's lock before a seal gives up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a held file's reader has to be found asleep, one look after the other, where it can't be asked whether reading waits.
const TRIAL_LOOKS: u32 = 30;
const TRIAL_LOOK: Duration = Duration::from_millis(10);
const STACK_BYTES: usize = 64 * 1024;

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;

/// A file to be held, and a place in it where it has data: in a hole, a write takes space before it fetches its bytes.
pub type Held = (Arc<File>, u64);

/// Pages that whoever touches them waits for.
#[derive(Debug)]
struct Pages {
    start: usize,
    bytes: usize,
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the threads that had pointers into it have ended.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.start as *mut libc::c_void, self.bytes);
        }
    }
}

/// Nobody writes to the files while this exists.
#[derive(Debug)]
pub struct Hold {
    faults: Option<File>,
    threads: Vec<JoinHandle<()>>,
    pages: Option<Pages>,
}

impl Hold {
    /// Whether this process may do so with files in `folder`, and held ones can be read. It is tried once for each filesystem.
    pub fn is_possible_in(folder: &Path) -> bool {
        static TRIED: Mutex<BTreeMap<u64, bool>> = Mutex::new(BTreeMap::new());
        let Ok(device) = folder.metadata().map(|about| about.dev()) else { return false };
        let mut tried = TRIED.lock();
        if let Some(is_possible) = tried.get(&device) {
            return *is_possible;
        }
        match is_read_while_held(folder) {
            Ok(is_possible) => {
                if !is_possible {
                    tracing::info!(folder = %folder.display(), "files that are held can't be read here: none are passed through");
                }
                tried.insert(device, is_possible);
                is_possible
            }
            Err(error) => {
                tracing::info!(folder = %folder.display(), %error, "files can't be held here: none are passed through");
                false
            }
        }
    }

    /// Waits for writes to `files` that are under way, and holds back others.
    ///
    /// # Errors
    /// Those of starting threads and of writing; a write that doesn't end.
    pub fn of(files: &[Held]) -> Result<Hold> {
        let mut hold = Hold { faults: None, threads: Vec::with_capacity(files.len()), pages: None };
        if files.is_empty() {
            return Ok(hold);
        }
        let faults = userfault()?;
        let pages = pages(&faults, files.len())?;
        let start = pages.start;
        (hold.faults, hold.pages) = (Some(faults), Some(pages));
        let (ended, has_ended) = channel();
        for (index, (file, at)) in files.iter().enumerate() {
            let (file, at, ended) = (file.clone(), *at, ended.clone());
            let page = start + index * PAGE;
            let thread = std::thread::Builder::new().name("layerfs-hold".to_owned()).stack_size(STACK_BYTES);
            hold.threads.push(thread.spawn(move || {
                let _ = ended.send(write_nothing(&file, at, page));
            })?);
        }
        drop(ended);
        hold.wait_for(files.len(), &has_ended)?;
        Ok(hold)
    }

    /// Waits until `count` threads have come to their pages.
    fn wait_for(&mut self, count: usize, has_ended: &Receiver<Result<()>>) -> Result<()> {
        let Some(faults) = &mut self.faults else { return Ok(()) };
        let started = Instant::now();
        let mut arrived = 0;
        while arrived < count {
            let mut message = [0; MESSAGE_BYTES];
            match faults.read(&mut message) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => arrived += 1,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if let Ok(ended) = has_ended.try_recv() {
                        return Err(ended.err().unwrap_or_else(|| Error::other("a file was written to for nothing")));
                    }
                    if started.elapsed() > PATIENCE {
                        return Err(Error::new(ErrorKind::TimedOut, "a write into a file doesn't end"));
                    }
                    let mut poll = [rustix::event::PollFd::new(&*faults, rustix::event::PollFlags::IN)];
                    let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                    let _ = rustix::event::poll(&mut poll, Some(&wait));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(pages) = &self.pages {
            // SAFETY: the mapping is ours. Nobody has a reference into it: the threads gave its address to the kernel.
            #[allow(unsafe_code)]
            unsafe {
                libc::mprotect(pages.start as *mut libc::c_void, pages.bytes, libc::PROT_NONE);
            }
        }
        // Wakes whoever waits; they find that they may not read the page.
        self.faults = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Whether a file without a name in `folder` can be read while it is held.
fn is_read_while_held(folder: &Path) -> Result<bool> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = Arc::new(File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?));
    file.write_all_at(&[0; PAGE], 0)?;
    let hold = Hold::of(&[(file.clone(), 0)])?;
    // What was just written is in memory, so that only a lock makes a reader wait.
    let mut byte = [0];
    if rustix::io::preadv2(&*file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT) == Ok(1) {
        return Ok(true);
    }
    // Not every filesystem can be asked so.
    let (begin, has_begun) = channel();
    let (send, is_read) = channel();
    let reader = std::thread::Builder::new().name("layerfs-trial".to_owned()).stack_size(STACK_BYTES);
    let reader = reader.spawn(move || {
        let _ = begin.send(rustix::thread::gettid());
        let _ = send.send(file.read_at(&mut [0], 0).is_ok_and(|count| count == 1));
    })?;
    let is_read = match has_begun.recv() {
        Ok(thread) => is_read_in_time(&is_read, || is_asleep(thread)),
        Err(_) => false,
    };
    drop(hold);
    let _ = reader.join();
    Ok(is_read)
}

/// What comes of a trial, false if it waits. One that could go on, if only it were given a processor, isn't waiting, however long it takes.
fn is_read_in_time(is_read: &Receiver<bool>, is_asleep: impl Fn() -> bool) -> bool {
    let mut asleep = 0;
    loop {
        match is_read.recv_timeout(TRIAL_LOOK) {
            Ok(is_read) => return is_read,
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => {}
        }
        asleep = if is_asleep() { asleep + 1 } else { 0 };
        if asleep == TRIAL_LOOKS {
            return false;
        }
    }
}

/// Whether a thread of this process waits for something, by the kernel's word.
fn is_asleep(thread: Pid) -> bool {
    let about = std::fs::read_to_string(format!("/proc/self/task/{}/stat", thread.as_raw_nonzero()));
    // The name before it may have any characters.
    let state = about.ok().and_then(|about| about.rsplit_once(") ")?.1.chars().next());
    state != Some('R')
}

/// A descriptor for faults of this process.
fn userfault() -> Result<File> {
    // SAFETY: a plain system call; the descriptor is new and owned by nobody else.
    #[allow(unsafe_code)]
    let faults = unsafe {
        let number = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        if number < 0 {
            return Err(Error::last_os_error());
        }
        File::from(OwnedFd::from_raw_fd(number as i32))
    };
    control(&faults, UFFDIO_API, &mut [UFFD_API, 0, 0])?;
    Ok(faults)
}

fn control(faults: &File, request: libc::c_ulong, argument: &mut [u64]) -> Result<()> {
    // SAFETY: both requests read and write as many bytes as their argument has, and no more.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(faults.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn pages(faults: &File, count: usize) -> Result<Pages> {
    let bytes = count * PAGE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping of memory that belongs to nothing.
    #[allow(unsafe_code)]
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    let pages = Pages { start: start as usize, bytes };
    control(faults, UFFDIO_REGISTER, &mut [pages.start as u64, bytes as u64, MODE_MISSING, 0])?;
    Ok(pages)
}

/// Begins to write the byte at `page`, which isn't there, to `file`, and fails when it never comes.
fn write_nothing(file: &File, at: u64, page: usize) -> Result<()> {
    // SAFETY: the page is mapped as long as this thread lives, and nobody else has its address. The slice is never read here;
    // the kernel finds no byte there.
    #[allow(unsafe_code)]
    let byte = unsafe { std::slice::from_raw_parts(page as *const u8, 1) };
    match file.write_at(byte, at) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        Err(error) => Err(error),
        Ok(count) => {
            tracing::error!(count, "a byte was written that must not exist");
            Err(Error::other("a byte was written that must not exist"))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stderr)] // a test that can't run says so

    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_trial_that_is_not_run_is_waited_for_and_one_that_sleeps_is_not() {
        let (send, is_read) = channel();
        let looks = AtomicU32::new(0);
        let runs_late = || {
            if looks.fetch_add(1, Ordering::Relaxed) > TRIAL_LOOKS {
                send.send(true).unwrap();
            }
            false
        };
        assert!(is_read_in_time(&is_read, runs_late));
        let (_send, is_read) = channel();
        assert!(!is_read_in_time(&is_read, || true));
    }

    #[test]
    fn writers_wait_and_readers_do_not() {
        let folder = tempfile::tempdir().unwrap();
        if !Hold::is_possible_in(folder.path()) {
            eprintln!("NOT RUN: files can't be held here");
            return;
        }
        let files: Vec<Held> = (0..3)
            .map(|number| {
                let path = folder.path().join(format!("{number}"));
                std::fs::write(&path, vec![number; number as usize * 5000]).unwrap();
                (Arc::new(File::options().read(true).write(true).open(path).unwrap()), 0)
            })
            .collect();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let hold = Hold::of(&files).unwrap();
            let writers: Vec<_> = files
                .iter()
                .map(|(file, _)| {
                    let is_over = &is_over;
                    scope.spawn(move || {
                        file.write_all_at(b"x", 0).unwrap();
                        assert!(is_over.load(Ordering::SeqCst), "a write got through");
                    })
                })
                .collect();
            for (number, (file, _)) in files.iter().enumerate() {
                let mut bytes = vec![9; 20_000];
                let count = file.read_at(&mut bytes, 0).unwrap();
                assert!(count == number * 5000 && bytes[..count].iter().all(|byte| *byte == number as u8));
                assert_eq!(file.metadata().unwrap().len(), number as u64 * 5000);
            }
            assert!(writers.iter().all(|writer| !writer.is_finished()));
            is_over.store(true, Ordering::SeqCst);
            drop(hold);
        });
        let mut first = [0; 2];
        assert_eq!(files[0].0.read_at(&mut first, 0).unwrap(), 1);
        assert_eq!(files[2].0.read_at(&mut first, 0).unwrap(), 2);
        assert_eq!(first, *b"x\x02");
    }
}
