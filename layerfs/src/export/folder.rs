//! Export to a folder: the calling thread walks the tree and makes the names, several threads write the files.
//!
//! Decisions hidden here: files are written in the order of the walk, which is the order of their chunks in the
//! packs; a large file is written by all threads at once; a folder gets its attributes when the last thing in it
//! is done; every inode with several names has one more in the workspace until the end, so that no path has to be
//! remembered. Invariants: each name is made relative to its open folder, must not exist, and nothing is followed;
//! memory and descriptors don't grow with the number of files.

mod maker;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crossbeam::channel::bounded;
use parking_lot::{Condvar, Mutex};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::ExportReport;
use super::attrs::{self, Losses, Setter, Subject};
use super::place::Workspace;
use super::spread::{self, Piece, Written};
use crate::chunker::is_zero;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::{Inode, Node};
use crate::monitor::Monitor;
use crate::view::View;
use maker::Maker;

/// How much of a large file is written at a time.
const GROUP_BYTES: u64 = 1024 * 1024;
const QUEUE: usize = 4;

/// Exports `view` to the folder `destination`, which must be absent or empty.
pub fn export(view: &View, destination: &Path, monitor: &dyn Monitor) -> Result<ExportReport> {
    let root = view.expect_inode(Ino::ROOT)?;
    let workspace = Workspace::create(destination)?;
    let export = Export {
        view,
        monitor,
        destination: workspace.destination().to_owned(),
        setter: Setter { kept_mode: workspace.kept_mode, owner: workspace.owner, losses: Losses::default() },
        failure: Mutex::new(None),
        is_stopped: AtomicBool::new(false),
        waiting: Mutex::new(()),
        changed: Condvar::new(),
        data_bytes: AtomicU64::new(0),
    };
    let entries = export.tree(&workspace)?;
    let destination = export.destination.clone();
    let folder = workspace.commit()?;
    export.setter.apply(Subject::Open(folder.as_fd()), &root, false, &|| destination.clone())?;
    let warnings = export.setter.losses.report(monitor);
    Ok(ExportReport { entries, data_bytes: export.data_bytes.into_inner(), warnings, oci_manifest: None })
}

/// A folder that isn't finished: something is still to come into it.
struct Folder {
    parent: Option<Arc<Folder>>,
    name: Vec<u8>,
    /// None while the walk is far below: whoever still works here has it from before.
    fd: Mutex<Option<Arc<OwnedFd>>>,
    /// None for the root, which is finished in its final place.
    inode: Option<Inode>,
}

impl Folder {
    fn new(parent: Option<Arc<Folder>>, name: &[u8], fd: OwnedFd, inode: Option<Inode>) -> Arc<Folder> {
        Arc::new(Folder { parent, name: name.to_vec(), fd: Mutex::new(Some(Arc::new(fd))), inode })
    }

    /// The open folder. The walk is here, or was here last.
    fn fd(&self) -> Result<Arc<OwnedFd>> {
        let open = self.fd.lock().clone();
        open.ok_or_else(|| Error::io("using a folder that is closed", Errno::BADF))
    }

    /// The path of `name` in this folder, from the root.
    fn path(&self, name: &[u8]) -> Vec<u8> {
        let mut parts = vec![name];
        let mut folder = self;
        while let Some(parent) = &folder.parent {
            parts.push(&folder.name);
            folder = parent;
        }
        parts.reverse();
        parts.join(&b'/')
    }
}

/// A small file to be written by one thread.
struct NewFile {
    folder: Arc<Folder>,
    folder_fd: Arc<OwnedFd>,
    name: Vec<u8>,
    inode: Inode,
    /// Open already if it has several names.
    file: Option<File>,
}

/// A file that is written by several threads; the last finishes it.
struct LargeFile {
    folder: Arc<Folder>,
    name: Vec<u8>,
    inode: Inode,
    file: File,
}

enum Job {
    Files(Vec<NewFile>),
    Group(Arc<LargeFile>, Vec<Piece>),
    /// All groups of a large file were handed over.
    EndOf(Arc<LargeFile>),
}

struct Export<'a> {
    view: &'a View,
    monitor: &'a dyn Monitor,
    destination: PathBuf,
    setter: Setter,
    failure: Mutex<Option<Error>>,
    is_stopped: AtomicBool,
    waiting: Mutex<()>,
    changed: Condvar,
    data_bytes: AtomicU64,
}

/// Stops the export when the thread that holds it panics.
struct StopOnPanic<'a, 'e>(&'a Export<'e>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

impl Export<'_> {
    /// Makes everything but the root's attributes. Returns the number of entries.
    fn tree(&self, workspace: &Workspace) -> Result<u64> {
        let threads = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
        let (jobs, queue) = bounded::<Job>(QUEUE);
        let walked = thread::scope(|scope| {
            for _ in 0..threads {
                let queue = queue.clone();
                scope.spawn(move || {
                    let _guard = StopOnPanic(self);
                    for job in queue {
                        if !self.is_stopped.load(Ordering::Relaxed) {
                            self.run(job).unwrap_or_else(|error| self.fail(error));
                        }
                    }
                });
            }
            drop(queue);
            let walked = Maker::new(self, workspace, jobs).walk();
            if walked.is_err() {
                self.stop();
            }
            walked
        });
        match self.failure.lock().take() {
            Some(error) => Err(error),
            None => walked,
        }
    }

    /// Remembers the first failure and stops the others.
    fn fail(&self, error: Error) {
        self.failure.lock().get_or_insert(error);
        self.stop();
    }

    fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Wakes the walk, which may wait for a folder.
    fn wake(&self) {
        drop(self.waiting.lock());
        self.changed.notify_all();
    }

    /// Waits until `folder` is open again.
    fn wait_for(&self, folder: &Folder) -> Result<()> {
        let mut waiting = self.waiting.lock();
        while folder.fd.lock().is_none() {
            if self.is_stopped.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.changed.wait(&mut waiting);
        }
        Ok(())
    }

    fn path(&self, folder: &Folder, name: &[u8]) -> PathBuf {
        attrs::below(&self.destination, &folder.path(name))
    }

    fn run(&self, job: Job) -> Result<()> {
        match job {
            Job::Files(files) => files.into_iter().try_for_each(|file| self.write_file(file)),
            Job::Group(large, group) => {
                let path = || self.path(&large.folder, &large.name);
                let written = spread::write_pieces(&**self.view.chunks(), &large.file, &group, self.monitor, &path)?;
                self.data_bytes.fetch_add(written.bytes, Ordering::Relaxed);
                self.end_large(large)
            }
            Job::EndOf(large) => self.end_large(large),
        }
    }

    fn end_large(&self, large: Arc<LargeFile>) -> Result<()> {
        let Some(LargeFile { folder, name, inode, file }) = Arc::into_inner(large) else { return Ok(()) };
        file.set_len(inode.size()).map_err(|e| Error::file("write", self.path(&folder, &name), e))?;
        self.finish_file(folder, &name, &inode, &file, false)
    }

    fn write_file(&self, new: NewFile) -> Result<()> {
        let NewFile { folder, folder_fd, name, inode, file } = new;
        let path = || self.path(&folder, &name);
        let (is_final, mode) = self.setter.creation_mode(&inode);
        let (file, is_final) = match file {
            Some(file) => (file, false),
            None => (create(&folder_fd, &name, mode).map_err(|e| Error::file("create", path(), e))?, is_final),
        };
        let Node::File(content) = &inode.node else { return Ok(()) };
        let chunks = &**self.view.chunks();
        let mut written = Written::default();
        match content {
            // Inline zero bytes: the source may have had a hole there.
            Content::Inline(bytes) if is_zero(bytes) => {}
            Content::Inline(bytes) => {
                spread::write_sparsely(&file, 0, bytes).map_err(|e| Error::file("write", path(), e))?;
                self.monitor.advance(bytes.len() as u64);
                written = Written { bytes: bytes.len() as u64, end: bytes.len() as u64 };
            }
            Content::Extents { .. } => spread::pieces(chunks, content, GROUP_BYTES, |group| {
                let more = spread::write_pieces(chunks, &file, &group, self.monitor, &path)?;
                written = Written { bytes: written.bytes + more.bytes, end: written.end.max(more.end) };
                Ok(())
            })?,
        }
        self.data_bytes.fetch_add(written.bytes, Ordering::Relaxed);
        if written.end != content.len() {
            file.set_len(content.len()).map_err(|e| Error::file("write", path(), e))?;
        }
        self.finish_file(folder, &name, &inode, &file, is_final)
    }

    /// Sets a written file's attributes, and lets go of its folder.
    fn finish_file(
        &self,
        folder: Arc<Folder>,
        name: &[u8],
        inode: &Inode,
        file: &File,
        is_mode_set: bool,
    ) -> Result<()> {
        let path = || self.path(&folder, name);
        self.setter.apply(Subject::Open(file.as_fd()), inode, is_mode_set, &path)?;
        self.monitor.items(1);
        self.leave(folder)
    }

    /// Lets go of a folder. Whoever does so last sets its attributes, and lets go of its parent.
    fn leave(&self, folder: Arc<Folder>) -> Result<()> {
        let mut next = Arc::into_inner(folder);
        while let Some(Folder { parent, name, fd, inode }) = next {
            if let (Some(inode), Some(parent)) = (&inode, &parent) {
                let path = || self.path(parent, &name);
                let fd = fd.into_inner().ok_or_else(|| Error::file("finish", path(), Errno::BADF))?;
                self.setter.apply(Subject::Open(fd.as_fd()), inode, false, &path)?;
                let mut parent_fd = parent.fd.lock();
                if parent_fd.is_none() {
                    // Nobody else can enter the workspace: nothing was moved, and `..` is where we came from.
                    let opened = open_folder(&fd, b"..").map_err(|e| Error::file("open", path(), e))?;
                    *parent_fd = Some(Arc::new(opened));
                    drop(parent_fd);
                    self.wake();
                }
            }
            next = parent.and_then(Arc::into_inner);
        }
        Ok(())
    }
}

/// Makes a file that doesn't exist.
fn create(folder: &OwnedFd, name: &[u8], mode: Mode) -> Result<File, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, mode).map(File::from)
}

fn open_folder(at: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::openat(at, name, flags, Mode::empty())
}
