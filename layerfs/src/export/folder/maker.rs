//! The walking side of a folder's export: makes names, and hands the files over to be written.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam::channel::Sender;
use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::{Export, Folder, GROUP_BYTES, Job, LargeFile, NewFile, create, open_folder};
use crate::attr::FileKind;
use crate::error::{Error, Result};
use crate::export::attrs::{Loss, Subject};
use crate::export::place::Workspace;
use crate::export::spread;
use crate::id::Ino;
use crate::inode::{Inode, Node};
use crate::monitor;
use crate::walk::{WalkEntry, Walker};

/// Files with more data than this are written by several threads.
const LARGE_BYTES: u64 = 2 * 1024 * 1024;
/// How many small files are handed over at a time, and how many bytes of them.
const BATCH_FILES: usize = 32;
const BATCH_BYTES: u64 = 1024 * 1024;
/// How many folders on the way down stay open: a tree may be deeper than a process may have descriptors.
const OPEN_FOLDERS: usize = 100;

/// The walking side.
pub(super) struct Maker<'a, 'e> {
    export: &'a Export<'e>,
    workspace: &'a Workspace,
    jobs: Sender<Job>,
    batch: Vec<NewFile>,
    batch_bytes: u64,
    entries: u64,
}

impl<'a, 'e> Maker<'a, 'e> {
    /// Makes the names of `export` in `workspace`, and hands the files over to `jobs`.
    pub(super) fn new(export: &'a Export<'e>, workspace: &'a Workspace, jobs: Sender<Job>) -> Maker<'a, 'e> {
        Maker { export, workspace, jobs, batch: Vec::new(), batch_bytes: 0, entries: 0 }
    }

    /// Walks all of the tree; returns the number of entries.
    pub(super) fn walk(mut self) -> Result<u64> {
        let root = rustix::io::dup(&self.workspace.root).map_err(|e| Error::io("duplicating a descriptor", e))?;
        let mut open: Vec<(Ino, Arc<Folder>)> = vec![(Ino::ROOT, Folder::new(None, b"", root, None))];
        let mut walker = Walker::new(self.export.view);
        while let Some(entry) = walker.next_entry()? {
            monitor::check(self.export.monitor)?;
            if self.export.is_stopped.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            while let Some((_, folder)) = open.pop_if(|(ino, _)| *ino != entry.folder) {
                self.go_up(folder)?;
            }
            let Some((_, folder)) = open.last() else {
                return Err(Error::corrupt("layer", format!("folder {} is not where its entries are", entry.folder)));
            };
            self.entries += 1;
            if let Some(inner) = self.entry(folder, &entry)? {
                open.push((entry.ino, inner));
                if let Some(above) = open.len().checked_sub(OPEN_FOLDERS) {
                    *open[above].1.fd.lock() = None;
                }
            }
        }
        while let Some((_, folder)) = open.pop() {
            self.go_up(folder)?;
        }
        self.submit()?;
        Ok(self.entries)
    }

    /// Leaves a folder for its parent. If that is closed, waits until this one is finished, which opens it again: so
    /// no more folders are open than on the way down.
    fn go_up(&mut self, folder: Arc<Folder>) -> Result<()> {
        let closed = folder.parent.clone().filter(|parent| parent.fd.lock().is_none());
        if closed.is_some() {
            self.submit()?;
        }
        self.export.leave(folder)?;
        if let Some(parent) = closed {
            self.export.wait_for(&parent)?;
        }
        Ok(())
    }

    /// Makes one entry; returns it if it is a folder.
    fn entry(&mut self, folder: &Arc<Folder>, entry: &WalkEntry<'_>) -> Result<Option<Arc<Folder>>> {
        let inode = self.export.view.expect_inode(entry.ino)?;
        if inode.kind() != entry.kind {
            return Err(Error::corrupt("layer", format!("inode {} is not what its name says", entry.ino)));
        }
        let name = entry.name;
        let export = self.export;
        let path = || export.path(folder, name);
        let failed = |action, errno: Errno| Error::file(action, path(), errno);
        let folder_fd = folder.fd()?;
        if inode.kind() == FileKind::Folder {
            let fd = make_folder(&folder_fd, name).map_err(|e| failed("create folder", e))?;
            return Ok(Some(Folder::new(Some(Arc::clone(folder)), name, fd, Some(inode))));
        }
        let is_shared = inode.nlink > 1;
        if is_shared && self.link_again(&folder_fd, name, entry.ino).map_err(|e| failed("link", e))? {
            export.monitor.items(1);
            return Ok(None);
        }
        if matches!(inode.node, Node::File(_)) {
            self.file(folder, folder_fd, name, inode)?;
        } else if self.special(folder, &folder_fd, name, &inode).map_err(|e| failed("create", e))? {
            export.setter.apply(Subject::Named(folder_fd.as_fd(), name), &inode, false, &path)?;
            if is_shared {
                self.remember(&folder_fd, name, entry.ino).map_err(|e| failed("link", e))?;
            }
            export.monitor.items(1);
        }
        Ok(None)
    }

    /// Hands a regular file over. It is made here already if it will get more names, or is written by several.
    fn file(&mut self, folder: &Arc<Folder>, folder_fd: Arc<OwnedFd>, name: &[u8], inode: Inode) -> Result<()> {
        let Node::File(content) = &inode.node else { return Ok(()) };
        let failed = |action, errno: Errno| Error::file(action, self.export.path(folder, name), errno);
        let data_bytes = content.data_bytes();
        let is_large = data_bytes > LARGE_BYTES;
        let mut file = None;
        if inode.nlink > 1 || is_large {
            let mode = Mode::RUSR | Mode::WUSR;
            file = Some(create(&folder_fd, name, mode).map_err(|e| failed("create", e))?);
        }
        if inode.nlink > 1 {
            self.remember(&folder_fd, name, inode.ino).map_err(|e| failed("link", e))?;
        }
        let (folder, name) = (Arc::clone(folder), name.to_vec());
        match file {
            Some(file) if is_large => self.large(LargeFile { folder, name, inode, file }),
            file => self.small(NewFile { folder, folder_fd, name, inode, file }, data_bytes),
        }
    }

    /// Makes a link, device, pipe or socket; false if only root could.
    fn special(&self, folder: &Folder, folder_fd: &OwnedFd, name: &[u8], inode: &Inode) -> Result<bool, Errno> {
        let mode = Mode::RUSR | Mode::WUSR;
        let made = match &inode.node {
            Node::Symlink(target) => rustix::fs::symlinkat(&target[..], folder_fd, name),
            Node::BlockDevice(number) => rustix::fs::mknodat(folder_fd, name, FileType::BlockDevice, mode, *number),
            Node::CharDevice(number) => rustix::fs::mknodat(folder_fd, name, FileType::CharacterDevice, mode, *number),
            Node::Fifo => rustix::fs::mknodat(folder_fd, name, FileType::Fifo, mode, 0),
            Node::Socket => rustix::fs::mknodat(folder_fd, name, FileType::Socket, mode, 0),
            Node::File(_) | Node::Folder => Ok(()),
        };
        let is_device = matches!(inode.kind(), FileKind::BlockDevice | FileKind::CharDevice);
        match made {
            Ok(()) => Ok(true),
            Err(Errno::PERM) if is_device => {
                let path = || self.export.path(folder, name).display().to_string();
                self.export.setter.losses.add(Loss::Device, path);
                Ok(false)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Keeps a name of a new inode that will get more.
    fn remember(&self, folder: &OwnedFd, name: &[u8], ino: Ino) -> Result<(), Errno> {
        rustix::fs::linkat(folder, name, &self.workspace.links, format!("{:x}", ino.0), AtFlags::empty())
    }

    /// Gives an inode that was made before another name; false if it wasn't.
    fn link_again(&self, folder: &OwnedFd, name: &[u8], ino: Ino) -> Result<bool, Errno> {
        let kept = format!("{:x}", ino.0);
        match rustix::fs::linkat(&self.workspace.links, &kept, folder, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            // The kept name is one too many for the filesystem: it becomes the last.
            Err(Errno::MLINK) => rustix::fs::renameat(&self.workspace.links, &kept, folder, name).map(|()| true),
            Err(errno) => Err(errno),
        }
    }

    fn small(&mut self, file: NewFile, data_bytes: u64) -> Result<()> {
        self.batch.push(file);
        self.batch_bytes += data_bytes;
        let is_full = self.batch.len() >= BATCH_FILES || self.batch_bytes >= BATCH_BYTES;
        if is_full { self.submit() } else { Ok(()) }
    }

    fn large(&mut self, file: LargeFile) -> Result<()> {
        let Node::File(content) = &file.inode.node else { return Ok(()) };
        let content = content.clone();
        let file = Arc::new(file);
        spread::pieces(&**self.export.view.chunks(), &content, GROUP_BYTES, |group| {
            self.send(Job::Group(Arc::clone(&file), group))
        })?;
        self.send(Job::EndOf(file))
    }

    fn submit(&mut self) -> Result<()> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() { Ok(()) } else { self.send(Job::Files(batch)) }
    }

    fn send(&self, job: Job) -> Result<()> {
        if self.export.is_stopped.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        self.jobs.send(job).map_err(|_| Error::Cancelled)
    }
}

fn make_folder(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
    open_folder(parent, name)
}
