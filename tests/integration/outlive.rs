//! A mount outlives its daemon: killed again and again under programs that check every answer, frozen, replaced.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, bail, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::host::Host;
use layerfs_tests::scene::{Scene, until};
use layerfs_tests::tree::Random;
use rustix::fs::{CWD, FlockOperation, RenameFlags, XattrFlags, flock, removexattr, renameat_with, setxattr};

/// How often the daemon is killed by default; `LAYERFS_KILLS` says otherwise.
const KILLS: u64 = 12;
/// Operations of all workers together between one kill and the next.
const OPERATIONS: u64 = 400;
const WORKERS: u64 = 3;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("outlive::kills_under_load", &[Root, Fuse], kills),
        Case::new("outlive::another_daemon_takes_over", &[Root, Fuse], handed_over),
        Case::new("outlive::read_only_mounts", &[Root, Fuse], read_only),
        Case::new("outlive::nothing_is_kept_that_has_ended", &[Root, Fuse], ended),
    ]
}

/// A mounted layer with some small files. The daemon starts by itself, and has a keeper.
fn mounted(args: &[&str]) -> anyhow::Result<Scene> {
    let files = (0..40).map(|number| (format!("below{number}"), Random::new(number).bytes(3000)));
    Scene::new(Host::cold()?, files, args)
}

/// By reading, unless `LAYERFS_TRANSPORT` says otherwise.
fn kills() -> anyhow::Result<()> {
    let transport = std::env::var("LAYERFS_TRANSPORT").unwrap_or_else(|_| "read".to_owned());
    let Scene { host, mnt, .. } = mounted(&["--transport", &transport])?;
    let kills = std::env::var("LAYERFS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut held = Held::open(&mnt)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                let (done, stop, mnt) = (&done, &stop, &mnt);
                scope.spawn(move || {
                    let mut worker = Worker::new(mnt, number)?;
                    while !stop.load(Ordering::Relaxed) {
                        worker.step().with_context(|| format!("worker {number}, step {}", worker.steps))?;
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    worker.compare()
                })
            })
            .collect();
        let killed = (0..kills).try_for_each(|_| {
            let target = done.load(Ordering::Relaxed) + OPERATIONS;
            while done.load(Ordering::Relaxed) < target {
                ensure!(!workers.iter().any(std::thread::ScopedJoinHandle::is_finished), "a worker has failed");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            host.kill_serving()
        });
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        killed
    })?;
    held.check()?;
    drop(held);
    host.umount(&mnt)?;
    host.fsck()
}

/// Descriptors that are held throughout: of a file without a name, with a lock, of a folder.
struct Held {
    nameless: File,
    locked: File,
    mnt: PathBuf,
}

impl Held {
    fn open(mnt: &Path) -> anyhow::Result<Held> {
        let open = |name: &str| OpenOptions::new().read(true).write(true).create_new(true).open(mnt.join(name));
        let (mut nameless, locked) = (open("nameless")?, open("locked")?);
        nameless.write_all(&Random::new(1).bytes(200_000))?;
        fs::remove_file(mnt.join("nameless"))?;
        flock(&locked, FlockOperation::LockExclusive)?;
        // One from below that is only read, and is removed while it is open.
        Ok(Held { nameless, locked, mnt: mnt.to_owned() })
    }

    fn check(&mut self) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        self.nameless.seek(SeekFrom::Start(0))?;
        self.nameless.read_to_end(&mut bytes)?;
        ensure!(bytes == Random::new(1).bytes(200_000), "a file without a name has lost its bytes");
        ensure!(self.nameless.metadata()?.nlink() == 0, "a file without a name has got one");
        let other = File::open(self.mnt.join("locked"))?;
        let taken = flock(&other, FlockOperation::NonBlockingLockExclusive);
        ensure!(taken == Err(rustix::io::Errno::WOULDBLOCK), "a lock was lost: {taken:?}");
        self.locked.write_all(b"still there")?;
        Ok(())
    }
}

/// What is in a name of the worker's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    File { bytes: Vec<u8>, has_attribute: bool },
    Folder,
    Link(String),
}

/// Does random operations in a folder of its own and knows what must be there. Every operation has to succeed, the first
/// time: one that is done twice, or not at all, shows.
struct Worker {
    folder: PathBuf,
    random: Random,
    model: BTreeMap<String, Entry>,
    steps: u64,
}

impl Worker {
    fn new(mnt: &Path, number: u64) -> anyhow::Result<Worker> {
        let folder = mnt.join(format!("worker{number}"));
        fs::create_dir(&folder)?;
        Ok(Worker { folder, random: Random::new(1000 + number), model: BTreeMap::new(), steps: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn pick(&mut self, wanted: impl Fn(&Entry) -> bool) -> Option<String> {
        let names: Vec<&String> = self.model.iter().filter(|(_, entry)| wanted(entry)).map(|(name, _)| name).collect();
        let count = names.len() as u64;
        (count > 0).then(|| names[self.random.below(count) as usize].clone())
    }

    fn step(&mut self) -> anyhow::Result<()> {
        self.steps += 1;
        let fresh = format!("n{}", self.steps);
        let is_file = |entry: &Entry| matches!(entry, Entry::File { .. });
        match self.random.below(11) {
            0 => {
                fs::create_dir(self.path(&fresh))?;
                self.model.insert(fresh, Entry::Folder);
            }
            1 => {
                symlink("somewhere", self.path(&fresh))?;
                self.model.insert(fresh, Entry::Link("somewhere".to_owned()));
            }
            2 | 3 => {
                let length = self.random.below(20_000) as usize;
                let bytes = self.random.bytes(length);
                OpenOptions::new().write(true).create_new(true).open(self.path(&fresh))?.write_all(&bytes)?;
                self.model.insert(fresh, Entry::File { bytes, has_attribute: false });
            }
            4 => {
                if let Some(name) = self.pick(|_| true) {
                    match &self.model[&name] {
                        Entry::Folder => fs::remove_dir(self.path(&name))?,
                        _ => fs::remove_file(self.path(&name))?,
                    }
                    self.model.remove(&name);
                }
            }
            5 => {
                if let Some(name) = self.pick(|_| true) {
                    renameat_with(CWD, self.path(&name), CWD, self.path(&fresh), RenameFlags::NOREPLACE)?;
                    let entry = self.model.remove(&name).context("the model has it")?;
                    self.model.insert(fresh, entry);
                }
            }
            6 => {
                if let (Some(one), Some(other)) = (self.pick(|_| true), self.pick(|_| true))
                    && one != other
                {
                    renameat_with(CWD, self.path(&one), CWD, self.path(&other), RenameFlags::EXCHANGE)?;
                    let (first, second) = (self.model[&one].clone(), self.model[&other].clone());
                    self.model.extend([(one, second), (other, first)]);
                }
            }
            7 => {
                if let Some(name) = self.pick(is_file) {
                    // A link is made and the old name goes, so that each name has an inode of its own.
                    fs::hard_link(self.path(&name), self.path(&fresh))?;
                    fs::remove_file(self.path(&name))?;
                    let entry = self.model.remove(&name).context("the model has it")?;
                    self.model.insert(fresh, entry);
                }
            }
            8 => self.attribute()?,
            9 => {
                if let Some(name) = self.pick(is_file) {
                    let (offset, length) = (self.random.below(30_000) as usize, self.random.below(5000) as usize);
                    let piece = self.random.bytes(length);
                    OpenOptions::new().write(true).open(self.path(&name))?.write_all_at(&piece, offset as u64)?;
                    if let (Some(Entry::File { bytes, .. }), true) = (self.model.get_mut(&name), length > 0) {
                        bytes.resize(bytes.len().max(offset + length), 0);
                        bytes[offset..offset + length].copy_from_slice(&piece);
                    }
                }
            }
            _ => {
                if let Some(name) = self.pick(is_file) {
                    let length = self.random.below(10_000);
                    OpenOptions::new().write(true).open(self.path(&name))?.set_len(length)?;
                    if let Some(Entry::File { bytes, .. }) = self.model.get_mut(&name) {
                        bytes.resize(length as usize, 0);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets an attribute that must not be there, or removes one that must.
    fn attribute(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.pick(|entry| matches!(entry, Entry::File { .. })) else { return Ok(()) };
        let path = self.path(&name);
        if let Some(Entry::File { has_attribute, .. }) = self.model.get_mut(&name) {
            match *has_attribute {
                true => removexattr(&path, "user.x")?,
                false => setxattr(&path, "user.x", b"value", XattrFlags::CREATE)?,
            }
            *has_attribute = !*has_attribute;
        }
        Ok(())
    }

    fn compare(&self) -> anyhow::Result<()> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let path = entry.path();
            let what = if kind.is_dir() {
                Entry::Folder
            } else if kind.is_symlink() {
                Entry::Link(fs::read_link(&path)?.to_string_lossy().into_owned())
            } else {
                ensure!(entry.metadata()?.nlink() == 1, "{} has more than one name", path.display());
                let mut value = [0u8; 16];
                let has_attribute = rustix::fs::getxattr(&path, "user.x", &mut value[..]).is_ok();
                Entry::File { bytes: fs::read(&path)?, has_attribute }
            };
            found.insert(entry.file_name().to_string_lossy().into_owned(), what);
        }
        if let Some((name, _)) = self.model.iter().find(|(name, entry)| found.get(*name) != Some(*entry)) {
            bail!("{name} in {} isn't what was put there", self.folder.display());
        }
        ensure!(found.len() == self.model.len(), "{} has names that nobody made", self.folder.display());
        Ok(())
    }
}

fn handed_over() -> anyhow::Result<()> {
    let Scene { host, mnt, .. } = mounted(&[])?;
    let mut held = Held::open(&mnt)?;
    fs::write(mnt.join("before"), "x")?;
    let first = host.serving_pid()?;
    host.ctl.ok(["daemon", "restart"])?;
    ensure!(host.serving_pid()? != first, "the same daemon goes on");
    held.check()?;
    fs::rename(mnt.join("before"), mnt.join("after"))?;
    // What was done before and after is sealed together.
    host.seal(&mnt, "sealed")?;
    host.export("sealed", &host.path("out"), &[])?;
    ensure!(
        fs::read(host.path("out/after"))? == b"x" && !host.path("out/before").exists(),
        "the seal missed something"
    );
    ensure!(!host.path("out/nameless").exists(), "a file without a name was sealed");
    Ok(())
}

fn read_only() -> anyhow::Result<()> {
    let Scene { host, mnt, .. } = mounted(&["--read-only"])?;
    let file = File::open(mnt.join("below7"))?;
    host.kill_serving()?;
    let mut bytes = vec![0; 3000];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == Random::new(7).bytes(3000), "other bytes after the daemon was replaced");
    ensure!(fs::read_dir(&mnt)?.count() == 40, "the listing isn't whole");
    ensure!(
        fs::write(mnt.join("new"), "x").is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem),
        "it was written"
    );
    Ok(())
}

fn ended() -> anyhow::Result<()> {
    let Scene { host, mnt, .. } = mounted(&[])?;
    let keeper = host.ctl.json(["daemon", "status"])?["keeper"].as_i64().context("nothing keeps the mount")?;
    host.umount(&mnt)?;
    host.ctl.ok(["daemon", "stop"])?;
    // With nothing to keep and no daemon it goes.
    let process = PathBuf::from(format!("/proc/{keeper}"));
    until("the end of the keeper", || Ok(!process.exists()))?;
    ensure!(!host.ctl.store().join("keeper.sock").exists(), "its socket stays");
    // Nobody comes back: a command starts a daemon as if there had never been a keeper.
    host.mount("base", "mnt", &[])?;
    ensure!(fs::read_dir(&mnt)?.count() == 40, "the mount isn't there");
    Ok(())
}
