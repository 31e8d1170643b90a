//! A mounted layer beside the tree that it was made of: what tests of mounts begin with, and what they look at.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::case::output_of;
use crate::host::Host;

/// How long to wait for what has to come about, on a slow machine that others use too.
const PATIENCE: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Waits until `is_so`, but not for ever. It asks less and less often: what asking holds up must come about too.
pub fn until(what: &str, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
    while !is_so()? {
        ensure!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
    Ok(())
}

/// Sends a signal to process `pid`.
pub fn signal(pid: i32, signal: Signal) -> anyhow::Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process")?, signal)?)
}

/// Opens a file for reading and writing.
pub fn open(path: &Path) -> anyhow::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.with_context(|| format!("opening {}", path.display()))
}

/// The layer `base`, mounted writable, and its plain twin. The store has no other upper.
#[derive(Debug)]
pub struct Scene {
    /// Whose store it is.
    pub host: Host,
    /// Where it is mounted.
    pub mnt: PathBuf,
    /// What it was imported from. Whatever is done to the mount is done here too.
    pub tree: PathBuf,
}

impl Scene {
    /// Imports a tree of `files`, each with its name, and mounts it with further arguments. The daemon of a host that has none starts by
    /// itself, and has a keeper.
    pub fn new<N: AsRef<Path>>(
        host: Host,
        files: impl IntoIterator<Item = (N, Vec<u8>)>,
        args: &[&str],
    ) -> anyhow::Result<Scene> {
        let tree = host.new_folder("tree")?;
        files.into_iter().try_for_each(|(name, bytes)| fs::write(tree.join(name), bytes))?;
        host.import(&tree, "base", &[])?;
        let mnt = host.mount("base", "mnt", args)?;
        Ok(Scene { host, mnt, tree })
    }

    /// Mounts `base` again.
    pub fn mount(&self, args: &[&str]) -> anyhow::Result<()> {
        self.host.mount("base", "mnt", args).map(drop)
    }

    /// A file of the mount.
    pub fn ours(&self, name: &str) -> PathBuf {
        self.mnt.join(name)
    }

    /// Its twin.
    pub fn plain(&self, name: &str) -> PathBuf {
        self.tree.join(name)
    }

    /// Both, open for reading and writing.
    pub fn both(&self, name: &str) -> anyhow::Result<[File; 2]> {
        Ok([open(&self.ours(name))?, open(&self.plain(name))?])
    }

    /// What the upper has of a file.
    pub fn data_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let ino = fs::metadata(self.ours(name))?.ino();
        Ok(self.host.ctl.store().join(format!("uppers/1/{ino:x}")))
    }

    /// Seals the mount.
    pub fn seal(&self, name: &str) -> anyhow::Result<()> {
        self.host.seal(&self.mnt, name).map(drop)
    }

    /// Fails unless the files of the tree have the same bytes on the mount.
    pub fn is_same(&self, what: &str) -> anyhow::Result<()> {
        self.is_same_in(&self.mnt, what)
    }

    /// Seals the mount, and compares what the layer has.
    pub fn is_sealed_as_it_is(&self, name: &str) -> anyhow::Result<()> {
        self.seal(name)?;
        let exported = self.host.path(format!("exported-{name}"));
        self.host.export(name, &exported, &[])?;
        self.is_same_in(&exported, name)
    }

    fn is_same_in(&self, folder: &Path, what: &str) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.tree)? {
            let name = entry?.file_name();
            let (ours, plain) = (fs::read(folder.join(&name))?, fs::read(self.tree.join(&name))?);
            let name = name.display();
            ensure!(ours.len() == plain.len(), "{what}: {name} has {} bytes, not {}", ours.len(), plain.len());
            let differs = ours.iter().zip(&plain).position(|(ours, plain)| ours != plain);
            ensure!(differs.is_none(), "{what}: {name} differs at {differs:?}");
        }
        Ok(())
    }
}

/// A tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one that takes `mebibytes` on `folder`.
    pub fn on(folder: &Path, mebibytes: u64) -> anyhow::Result<Tmpfs> {
        let size = format!("size={mebibytes}M");
        output_of(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder))?;
        Ok(Tmpfs(folder.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A shared mapping of the begin of a file.
#[derive(Debug)]
pub struct Map {
    start: *mut u8,
    bytes: usize,
    is_writable: bool,
}

impl Map {
    /// Maps `bytes` of `file`, which has as many, for reading.
    pub fn of(file: &File, bytes: usize) -> anyhow::Result<Map> {
        Map::with(file, bytes, false)
    }

    /// The same, for writing too.
    pub fn writable(file: &File, bytes: usize) -> anyhow::Result<Map> {
        Map::with(file, bytes, true)
    }

    fn with(file: &File, bytes: usize, is_writable: bool) -> anyhow::Result<Map> {
        let access = if is_writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping, of a file that is as long.
        #[allow(unsafe_code)]
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        ensure!(start != libc::MAP_FAILED, "mapping a file: {}", std::io::Error::last_os_error());
        Ok(Map { start: start.cast(), bytes, is_writable })
    }

    /// The byte at `at`.
    pub fn get(&self, at: usize) -> u8 {
        assert!(at < self.bytes);
        // SAFETY: within the mapping, whose file is not shorter.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(at).read_volatile()
        }
    }

    /// Sets the byte at `at`.
    pub fn put(&self, at: usize, byte: u8) {
        assert!(at < self.bytes && self.is_writable);
        // SAFETY: within the mapping, which is written to by nobody else just now.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(at).write_volatile(byte)
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.start.cast(), self.bytes);
        }
    }
}
