//! Real mounts: what only the kernel brings in. They need the superuser and /dev/fuse.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};

use super::*;
use crate::error::Error;
use crate::mount::{Mount, MountOptions, Transport, UnmountOptions, UpperChoice, acl};
use crate::testing::{self, Spawn, nobody_spawns};

/// A store and a mount of its own, in a temporary folder.
struct Mounted {
    mount: Arc<Mount>,
    store: Arc<Store>,
    folder: tempfile::TempDir,
}

impl Mounted {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join("mnt").join(name)
    }

    fn seal(&self) -> SealReport {
        let options = SealOptions { name: unique_name("real"), expect: Expect::Absent, kind: LayerKind::Application };
        self.mount.seal(&options, &Silent).unwrap()
    }

    fn unmount(&self, options: &UnmountOptions) {
        unmount(&self.mount, options);
    }

    /// Mounts the same upper again, as after a restart.
    fn remount(mut self) -> Mounted {
        self.unmount(&UnmountOptions { keep_record: true, ..Default::default() });
        // What other tests have just started elsewhere may have a copy for a moment.
        self.mount.wait();
        let mut restored = crate::mount::restore(&self.store, &mut Default::default()).unwrap();
        assert_eq!(restored.len(), 1);
        self.mount = restored.remove(0).1.unwrap();
        self
    }
}

/// Unmounts what nobody uses: not while a child has a copy of something that was closed.
fn unmount(mount: &Mount, options: &UnmountOptions) {
    let _still = nobody_spawns();
    mount.unmount(options).unwrap();
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.mount.unmount(&UnmountOptions { lazy: true, ..Default::default() });
        // After a failure, what the test has open may keep the mount.
        if !std::thread::panicking() {
            self.mount.wait();
        }
    }
}

/// This file is compiled once for each transport.
fn transport() -> Transport {
    if module_path!().ends_with("io_uring") { Transport::Uring } else { Transport::Read }
}

/// None, and a word about it, where mounting isn't possible.
fn mounted() -> Option<Mounted> {
    if !rustix::process::geteuid().is_root() || File::open("/dev/fuse").is_err() {
        eprintln!("NOT RUN: a real mount needs the superuser and /dev/fuse");
        return None;
    }
    let folder = tempfile::Builder::new().prefix("layerfs-real-").tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let options = StoreOptions { cache_bytes: 8 << 20, ..StoreOptions::create() };
    let store = Store::open(&folder.path().join("store"), options).unwrap();
    crate::mount::attach(&store).unwrap();
    fs::create_dir(folder.path().join("mnt")).unwrap();
    let options = MountOptions { transport: transport(), ..Default::default() };
    let mount = match Mount::start(&store, None, "test", &folder.path().join("mnt"), &options) {
        Err(error @ Error::Platform { .. }) => {
            eprintln!("SKIPPED: {error}");
            return None;
        }
        mount => mount.unwrap(),
    };
    assert_eq!(mount.info().unwrap().serves_by, transport());
    Some(Mounted { mount, store, folder })
}

fn set_acl(path: &Path, spec: &str) {
    assert!(Command::new("setfacl").args(["-m", spec]).arg(path).status_locked().unwrap().success());
}

fn acl_of(path: &Path) -> String {
    let output = Command::new("getfacl").args(["-cpE"]).arg(path).output_locked().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn names(path: &Path) -> BTreeSet<String> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn files_survive_seals_and_remounts() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("folder")).unwrap();
    fs::write(m.path("folder/file"), vec![7; 300_000]).unwrap();
    fs::hard_link(m.path("folder/file"), m.path("link")).unwrap();
    symlink("folder/file", m.path("symlink")).unwrap();
    let ino = fs::metadata(m.path("link")).unwrap().ino();
    m.seal();
    assert_eq!(fs::read(m.path("symlink")).unwrap(), vec![7; 300_000]);
    // Copy-up through one name is seen through the other, and changes neither number nor link count.
    OpenOptions::new().append(true).open(m.path("link")).unwrap().write_all(b"more").unwrap();
    let stat = fs::metadata(m.path("folder/file")).unwrap();
    assert_eq!((stat.ino(), stat.nlink(), stat.len()), (ino, 2, 300_004));
    let m = m.remount();
    let stat = fs::metadata(m.path("folder/file")).unwrap();
    assert_eq!((stat.ino(), stat.nlink(), stat.len()), (ino, 2, 300_004));
    let report = m.seal();
    assert_eq!((report.inodes, report.dentries), (1, 0));
    let report = m.seal();
    assert!(!report.is_new);
    let m = m.remount();
    assert_eq!(fs::metadata(m.path("link")).unwrap().len(), 300_004);
    assert_eq!(names(&m.path("")), ["folder", "link", "symlink"].map(String::from).into());
}

#[test]
fn a_read_only_mount_shows_a_layer() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("file"), b"content").unwrap();
    fs::create_dir(m.path("empty")).unwrap();
    let report = m.seal();
    let dir = m.folder.path().join("ro");
    fs::create_dir(&dir).unwrap();
    let options = MountOptions { upper: UpperChoice::ReadOnly, transport: transport(), ..Default::default() };
    let read_only = Mount::start(&m.store, Some(report.layer), "test", &dir, &options).unwrap();
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"content");
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"content");
    assert_eq!(names(&dir), ["empty", "file"].map(String::from).into());
    assert_eq!(names(&dir.join("empty")), BTreeSet::new());
    let refused = fs::write(dir.join("file"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    fs::write(m.path("file"), b"changed").unwrap();
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"content");
    unmount(&read_only, &UnmountOptions::default());
    // What other tests have just started elsewhere may have a copy for a moment.
    assert!(within_seconds(60, || read_only.has_ended()));
}

/// What a mount was asked, by operation.
type Asked = BTreeMap<&'static str, u64>;

fn asked(mount: &Mount) -> Asked {
    mount.fs().unwrap().activity().ops.into_iter().map(|op| (op.op.as_str(), op.count)).collect()
}

/// What `mount` is asked while `work` is done, as soon as that is `expected`, or what it is if it doesn't become that. The kernel tells of a closing
/// when it comes to it.
fn asked_by(mount: &Mount, expected: &[(&'static str, u64)], work: impl FnOnce()) -> Asked {
    let before = asked(mount);
    work();
    let news = || {
        let mut news = asked(mount);
        news.iter_mut().for_each(|(op, count)| *count -= before.get(op).copied().unwrap_or(0));
        news.retain(|_, count| *count > 0);
        news
    };
    within_seconds(60, || news() == expected.iter().copied().collect::<Asked>());
    // What comes too often comes soon.
    std::thread::sleep(Duration::from_millis(50));
    news()
}

#[test]
fn a_warm_mount_is_asked_only_what_it_must_be() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("folder")).unwrap();
    fs::write(m.path("folder/file"), vec![7; 5000]).unwrap();
    fs::write(m.path("folder/larger"), vec![8; 300_000]).unwrap();
    symlink("file", m.path("folder/link")).unwrap();
    let report = m.seal();
    let below = m.folder.path().join("ro");
    fs::create_dir(&below).unwrap();
    let options = MountOptions { upper: UpperChoice::ReadOnly, transport: transport(), ..Default::default() };
    let read_only = Mount::start(&m.store, Some(report.layer), "test", &below, &options).unwrap();
    let stat = |dir: &Path| {
        for name in ["", "folder", "folder/file", "folder/larger", "folder/link"] {
            fs::symlink_metadata(dir.join(name)).unwrap();
        }
        assert!(fs::metadata(dir.join("folder/nothing")).is_err());
    };
    let list = |dir: &Path| assert_eq!(names(&dir.join("folder")).len(), 3);
    let read = |dir: &Path| {
        assert_eq!(fs::read(dir.join("folder/file")).unwrap(), [7; 5000]);
        assert_eq!(fs::read_link(dir.join("folder/link")).unwrap(), Path::new("file"));
    };
    let all = |dir: &Path| {
        stat(dir);
        list(dir);
        read(dir);
        assert_eq!(fs::read(dir.join("folder/larger")).unwrap(), vec![8; 300_000]);
    };
    for dir in [&below, &m.path("")] {
        // The second time there is something to be found in the caches.
        (0..3).for_each(|_| all(dir));
    }
    // Closings of the last pass may still be on their way.
    let is_settled = || {
        let (once, again) = (asked(&m.mount), asked_by(&m.mount, &[], || {}));
        again.is_empty() && asked(&m.mount) == once
    };
    assert!(within_seconds(60, is_settled));
    // A copy of what is closed here would keep the closing from the mount.
    let _still = nobody_spawns();
    assert_eq!(asked_by(&read_only, &[], || all(&below)), Asked::new());
    let opened = [("open", 1), ("release", 1)];
    let listed = [("opendir", 1), ("releasedir", 1)];
    let dir = m.path("");
    assert_eq!(asked_by(&m.mount, &[], || stat(&dir)), Asked::new());
    assert_eq!(asked_by(&m.mount, &listed, || list(&dir)), listed.into());
    assert_eq!(asked_by(&m.mount, &opened, || read(&dir)), opened.into());
    unmount(&read_only, &UnmountOptions::default());
}

/// Another process that has a file mapped. It can't be this one: a page fault there may wait for the mount while it
/// holds the lock that the mount's threads need for their own memory.
pub(super) struct Mapper {
    child: std::process::Child,
    input: std::process::ChildStdin,
    output: BufReader<std::process::ChildStdout>,
}

const MAPPED: &str = "LAYERFS_TEST_MAPPED";

/// Not a test: what [`Mapper`] starts.
#[test]
#[ignore = "started by another test"]
fn map_a_file() {
    let Some(path) = std::env::var_os(MAPPED) else { return };
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: nobody truncates the file while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    let mut file = Some(file);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        match line.split_once(' ') {
            Some((offset, text)) => {
                let offset: usize = offset.parse().unwrap();
                map[offset..offset + text.len()].copy_from_slice(text.as_bytes());
            }
            None if line == "close" => drop(file.take()),
            None => map.flush().unwrap(),
        }
        let mut out = std::io::stdout().lock();
        out.write_all(b"\ndone\n").unwrap();
        out.flush().unwrap();
    }
}

impl Mapper {
    pub fn start(path: &Path) -> Mapper {
        Mapper::start_by(Command::new(std::env::current_exe().unwrap()), path)
    }

    /// In a mount namespace of its own.
    fn start_elsewhere(mount: &Path, path: &Path) -> Mapper {
        let mut command = Command::new(testing::elsewhere());
        command.args([mount, &std::env::current_exe().unwrap()]);
        Mapper::start_by(command, path)
    }

    fn start_by(mut command: Command, path: &Path) -> Mapper {
        command.args(["mount::tests::real::map_a_file", "--exact", "--ignored", "--nocapture"]).env(MAPPED, path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn_locked().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Mapper { child, input, output }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
        assert!((&mut self.output).lines().any(|line| line.unwrap() == "done"));
    }

    pub fn end(mut self) {
        drop(self.input);
        // What it says of itself: a pipe that nobody reads were an error.
        self.output.read_to_end(&mut Vec::new()).unwrap();
        self.child.wait().unwrap();
    }
}

/// A process in a mount namespace of its own with a copy of `mount`, which ends when what is returned with it is dropped.
fn elsewhere(mount: &Path) -> (Child, ChildStdin) {
    let mut other = Command::new(testing::elsewhere());
    other.arg(mount).arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut other = other.spawn_locked().unwrap();
    let (mut input, mut output) = (other.stdin.take().unwrap(), other.stdout.take().unwrap());
    // Once it answers, it has its namespace.
    input.write_all(b"?").unwrap();
    output.read_exact(&mut [0]).unwrap();
    (other, input)
}

#[test]
fn a_copy_in_another_namespace_holds_nobody_up() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("file"), b"there").unwrap();
    let (mut other, input) = elsewhere(&m.path(""));
    m.unmount(&UnmountOptions { keep_record: true, ..Default::default() });
    assert!(!m.mount.has_ended() && m.mount.is_left() && !m.path("file").exists());
    // What other tests have just started elsewhere has a copy too, until it has left all mounts but its own.
    let is_only_it = || m.mount.processes() == [other.id()];
    assert!(within_seconds(60, is_only_it), "{:?}, not {}", m.mount.processes(), other.id());
    drop(input);
    other.wait().unwrap();
    m.mount.wait();
    let m = m.remount();
    assert_eq!(fs::read(m.path("file")).unwrap(), b"there");
}

#[test]
fn a_mount_ends_everywhere_if_it_shall() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("mapped"), vec![0; 100_000]).unwrap();
    m.seal();
    let mut mapper = Mapper::start(&m.path("mapped"));
    mapper.tell("50000 mmap");
    mapper.end();
    let (mut other, input) = elsewhere(&m.path(""));
    let ending = UnmountOptions { keep_record: true, everywhere: true, ..Default::default() };
    m.unmount(&ending);
    assert!(m.mount.has_ended() && !m.mount.is_left());
    let m = m.remount();
    assert_eq!(&fs::read(m.path("mapped")).unwrap()[50_000..50_004], b"mmap");
    // One that was left before, with what a program has stored and nobody has asked for.
    m.seal();
    let mut mapper = Mapper::start_elsewhere(&m.path(""), &m.path("mapped"));
    mapper.tell("70000 left");
    m.unmount(&UnmountOptions { keep_record: true, ..Default::default() });
    assert!(!m.mount.has_ended());
    m.unmount(&ending);
    assert!(m.mount.has_ended());
    let m = m.remount();
    assert_eq!(&fs::read(m.path("mapped")).unwrap()[70_000..70_004], b"left");
    mapper.end();
    drop(input);
    other.wait().unwrap();
}

#[test]
fn what_lies_on_its_folder_now_stays() {
    let Some(m) = mounted() else { return };
    let mnt = m.path("");
    let cover = || {
        assert!(Command::new("mount").args(["-t", "tmpfs", "theirs"]).arg(&mnt).status_locked().unwrap().success());
        fs::write(mnt.join("theirs"), b"theirs").unwrap();
    };
    let uncover = || {
        let _still = nobody_spawns();
        rustix::mount::unmount(&mnt, rustix::mount::UnmountFlags::empty()).unwrap();
    };
    let (mut other, input) = elsewhere(&m.path(""));
    let ending = UnmountOptions { keep_record: true, everywhere: true, ..Default::default() };
    m.unmount(&UnmountOptions { everywhere: false, ..ending });
    cover();
    m.unmount(&ending);
    assert!(m.mount.has_ended());
    assert_eq!(fs::read(mnt.join("theirs")).unwrap(), b"theirs");
    uncover();
    drop(input);
    other.wait().unwrap();
    // Over it, while it is there.
    let m = m.remount();
    cover();
    assert!(matches!(m.mount.unmount(&ending), Err(Error::Invalid(_))));
    assert_eq!(fs::read(mnt.join("theirs")).unwrap(), b"theirs");
    uncover();
}

/// Which filesystem it is only its record tells.
#[test]
fn a_mount_that_was_left_is_known_to_the_next_daemon() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("file"), b"there").unwrap();
    let layer = m.seal().layer;
    let dir = m.folder.path().join("read-only");
    fs::create_dir(&dir).unwrap();
    let options = MountOptions { upper: UpperChoice::ReadOnly, ..Default::default() };
    let first = Mount::start(&m.store, Some(layer), "test", &dir, &options).unwrap();
    let (mut other, input) = elsewhere(&dir);
    unmount(&first, &UnmountOptions { keep_record: true, ..Default::default() });
    assert!(first.is_left());
    let mut kept = [(dir.clone(), first.descriptors().unwrap())].into();
    let restored = crate::mount::restore(&m.store, &mut kept).unwrap();
    let (_, next) = restored.into_iter().find(|(record, _)| record.dir == dir).unwrap();
    let next = next.unwrap();
    assert!(next.is_left() && next.places().is_empty());
    assert_eq!(next.record().device, first.record().device);
    let is_only_it = || next.processes() == [other.id()];
    assert!(within_seconds(60, is_only_it), "{:?}, not {}", next.processes(), other.id());
    unmount(&next, &UnmountOptions { everywhere: true, ..Default::default() });
    assert!(next.has_ended());
    first.wait();
    drop(input);
    other.wait().unwrap();
}

#[test]
fn mappings_and_programs_work() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("mapped"), vec![0; 100_000]).unwrap();
    m.seal();
    let mut mapper = Mapper::start(&m.path("mapped"));
    mapper.tell("50000 mmap");
    mapper.tell("flush");
    assert_eq!(&fs::read(m.path("mapped")).unwrap()[50_000..50_004], b"mmap");
    // Without a flush, a seal has it all the same.
    mapper.tell("60000 seal");
    m.seal();
    let fs_ = m.mount.fs().unwrap();
    let (ino, _) = fs_.view().lookup(crate::id::Ino::ROOT, b"mapped").unwrap().unwrap();
    let mut sealed = [0; 4];
    fs_.view().read_at(ino, 60_000, &mut sealed).unwrap();
    assert_eq!(&sealed, b"seal");
    mapper.tell("60000 more");
    mapper.end();
    assert_eq!(&fs::read(m.path("mapped")).unwrap()[60_000..60_004], b"more");

    // Not by this process: a descriptor that another test's child inherits would keep it from running.
    assert!(Command::new("cp").arg("/bin/true").arg(m.path("program")).status_locked().unwrap().success());
    assert!(Command::new(m.path("program")).status_locked().unwrap().success());
    m.seal();
    assert!(Command::new(m.path("program")).status_locked().unwrap().success());
}

#[test]
fn what_is_stored_through_a_mapping_while_a_seal_reads_ahead_is_noticed() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("mapped"), vec![b'-'; 8192]).unwrap();
    let ino = crate::Ino(fs::metadata(m.path("mapped")).unwrap().ino());
    let mut mapper = Mapper::start(&m.path("mapped"));
    mapper.tell("0 before");
    mapper.tell("close");
    let fs_ = m.mount.fs().unwrap();
    let sealing = fs_.begin_seal().unwrap();
    // Its page is dirty already: no time changes, and nobody is told.
    mapper.tell("0 during");
    mapper.end();
    let (frozen, changed) = sealing.freeze().unwrap();
    assert!(changed.contains(&ino), "it would be sealed as it was read ahead");
    drop((frozen, sealing));
    m.seal();
    assert_eq!(&fs::read(m.path("mapped")).unwrap()[..6], b"during");
}

#[test]
fn unlinked_files_live_while_they_are_open() {
    let Some(m) = mounted() else { return };
    for sealed in [false, true] {
        fs::write(m.path("file"), b"content").unwrap();
        if sealed {
            m.seal();
        }
        let mut file = OpenOptions::new().read(true).write(true).open(m.path("file")).unwrap();
        fs::remove_file(m.path("file")).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        file.write_all(b"CON").unwrap();
        m.seal();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "CONtent");
        file.set_len(2).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2);
    }
    let fs_ = m.mount.fs().unwrap();
    drop(fs_);
    let folder = m.path("gone");
    fs::create_dir(&folder).unwrap();
    let handle = File::open(&folder).unwrap();
    fs::remove_dir(&folder).unwrap();
    assert_eq!(handle.metadata().unwrap().nlink(), 0);
    let inside = format!("/proc/self/fd/{}/x", handle.as_raw_fd());
    assert_eq!(fs::write(inside, b"").unwrap_err().kind(), std::io::ErrorKind::NotFound);
    drop(handle);
    // What was unlinked is gone from the upper once the kernel forgets it.
    let m = m.remount();
    let data = m.folder.path().join("store/uppers");
    let files = fs::read_dir(data).unwrap().flat_map(|upper| fs::read_dir(upper.unwrap().path()).unwrap());
    let left: Vec<_> = files.map(Result::unwrap).filter(|file| file.file_name() != "opens").collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Makes an entry of each kind at `path`.
fn make(kind: &str, path: &Path) {
    match kind {
        "file" => fs::write(path, b"x").unwrap(),
        "folder" => fs::create_dir(path).unwrap(),
        "full" => {
            fs::create_dir(path).unwrap();
            fs::write(path.join("inside"), b"y").unwrap();
        }
        "symlink" => symlink("nowhere", path).unwrap(),
        "fifo" => {
            rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        }
        _ => {}
    }
}

fn rename_errno(from: &Path, to: &Path, flags: RenameFlags) -> i32 {
    let cwd = rustix::fs::CWD;
    rustix::fs::renameat_with(cwd, from, cwd, to, flags).map_or_else(|errno| errno.raw_os_error(), |()| 0)
}

#[test]
fn everything_is_renamed_onto_everything_as_on_the_host() {
    let Some(m) = mounted() else { return };
    let host = tempfile::Builder::new().prefix("layerfs-host-").tempdir().unwrap();
    let kinds = ["file", "folder", "full", "symlink", "fifo", "nothing"];
    let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE, RenameFlags::WHITEOUT];
    for sealed in [false, true] {
        for flag in flags {
            for from in kinds {
                for to in kinds {
                    let root = format!("{from}-{to}-{}-{sealed}", flag.bits());
                    let mut outcomes = Vec::new();
                    for base in [m.path(&root), host.path().join(&root)] {
                        fs::create_dir_all(base.join("sub")).unwrap();
                        make(from, &base.join("from"));
                        make(to, &base.join("sub/to"));
                        if sealed && base.starts_with(m.path("")) && flag == RenameFlags::empty() {
                            m.seal();
                        }
                        let errno = rename_errno(&base.join("from"), &base.join("sub/to"), flag);
                        outcomes.push((errno, tree(&base)));
                    }
                    assert_eq!(outcomes[0], outcomes[1], "{root}");
                }
            }
        }
    }
}

/// Paths, modes, link counts and device numbers below `base`.
fn tree(base: &Path) -> Vec<(PathBuf, u32, u64, u64)> {
    let mut seen = Vec::new();
    let mut left = vec![base.to_owned()];
    while let Some(path) = left.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        if stat.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        seen.push((path.strip_prefix(base).unwrap().to_owned(), stat.mode(), stat.nlink(), stat.rdev()));
    }
    seen.sort();
    seen
}

#[test]
fn access_control_lists_are_inherited_and_follow_the_mode() {
    let Some(m) = mounted() else { return };
    let host = tempfile::Builder::new().prefix("layerfs-host-").tempdir().unwrap();
    for base in [m.path("acl"), host.path().join("acl")] {
        fs::create_dir(&base).unwrap();
        set_acl(&base, "d:u:1000:rwx,d:g:100:r-x,d:m:rwx,u:1001:rw-");
    }
    let mut seen = Vec::new();
    for (round, base) in [m.path("acl"), host.path().join("acl")].into_iter().enumerate() {
        if round == 0 {
            m.seal();
        }
        let (file, folder) = (base.join("file"), base.join("folder"));
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&file).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("deep"), b"").unwrap();
        symlink("x", base.join("symlink")).unwrap();
        let mut lists = vec![acl_of(&base), acl_of(&file), acl_of(&folder), acl_of(&folder.join("deep"))];
        fs::set_permissions(&file, Permissions::from_mode(0o604)).unwrap();
        fs::set_permissions(&base, Permissions::from_mode(0o2750)).unwrap();
        lists.extend([acl_of(&file), acl_of(&base)]);
        set_acl(&file, "u:7:r--");
        lists.push(format!("{:o}", fs::metadata(&file).unwrap().mode()));
        assert!(Command::new("setfacl").args(["-b"]).arg(&file).status_locked().unwrap().success());
        lists.push(acl_of(&file));
        lists.push(format!("{:o}", fs::metadata(&file).unwrap().mode()));
        // A list that says no more than the mode is none.
        set_acl(&folder.join("deep"), "g::r--");
        lists.push(acl_of(&folder.join("deep")));
        seen.push(lists);
    }
    assert_eq!(seen[0], seen[1]);
    let value = rustix::fs::getxattr(m.path("acl"), OsStr::from_bytes(acl::DEFAULT), &mut vec![0; 200][..]);
    assert!(value.is_ok());
}

#[test]
fn setgid_and_sticky_folders_work() {
    let Some(m) = mounted() else { return };
    let folder = m.path("shared");
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(0), Some(2000)).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o3777)).unwrap();
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("file"), b"").unwrap();
    assert_eq!(fs::metadata(folder.join("sub")).unwrap().gid(), 2000);
    assert_eq!(fs::metadata(folder.join("sub")).unwrap().mode() & 0o7777, 0o2755);
    assert_eq!(fs::metadata(folder.join("file")).unwrap().gid(), 2000);
    let as_user = |script: &str| {
        let status = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", script])
            .current_dir(&folder)
            .status_locked();
        status.unwrap().success()
    };
    assert!(as_user("echo x > mine"));
    assert!(!as_user("rm -f file 2>/dev/null"), "sticky");
    assert!(as_user("rm mine"));
    // A write by somebody else clears setuid, in the kernel's cache too.
    fs::write(folder.join("program"), b"x").unwrap();
    fs::set_permissions(folder.join("program"), Permissions::from_mode(0o6777)).unwrap();
    assert!(as_user("echo y >> program"));
    assert_eq!(fs::metadata(folder.join("program")).unwrap().mode() & 0o7777, 0o777);
    fs::set_permissions(folder.join("program"), Permissions::from_mode(0o6777)).unwrap();
    assert!(as_user("truncate -s 0 program"));
    assert_eq!(fs::metadata(folder.join("program")).unwrap().mode() & 0o7777, 0o777);
    fs::set_permissions(folder.join("program"), Permissions::from_mode(0o6777)).unwrap();
    assert!(as_user(": > program"));
    assert_eq!(fs::metadata(folder.join("program")).unwrap().mode() & 0o7777, 0o777);
    // The user's descriptor, closed a moment ago, counts no more: else the file would be passed through, and nobody know who
    // writes.
    fs::set_permissions(folder.join("program"), Permissions::from_mode(0o6777)).unwrap();
    fs::write(folder.join("program"), b"by root").unwrap();
    assert_eq!(fs::metadata(folder.join("program")).unwrap().mode() & 0o7777, 0o6777);
    assert!(as_user("fallocate -l 5000 program"));
    assert_eq!(fs::metadata(folder.join("program")).unwrap().mode() & 0o7777, 0o777);
    // Attributes of `trusted` are the administrator's.
    rustix::fs::setxattr(folder.join("file"), "trusted.x", b"1", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(folder.join("file"), "user.x", b"1", XattrFlags::empty()).unwrap();
    assert!(as_user("test \"$(getfattr -m - file 2>/dev/null | grep -c trusted)\" = 0"));
}

#[test]
fn odd_entries_work() {
    let Some(m) = mounted() else { return };
    let long = "n".repeat(255);
    fs::write(m.path(&long), b"long").unwrap();
    assert_eq!(fs::write(m.path("n".repeat(256)), b"").unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    assert_eq!(fs::metadata(m.path("n".repeat(256))).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    fs::write(m.path(OsStr::from_bytes(b"not\xffutf\n8")), b"odd").unwrap();
    let cwd = rustix::fs::CWD;
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(cwd, m.path(name), kind, Mode::from_raw_mode(0o644), device).unwrap();
    };
    node("whiteout", FileType::CharacterDevice, 0);
    node("disk", FileType::BlockDevice, libc::makedev(259, 70_000));
    node("pipe", FileType::Fifo, 0);
    node("null", FileType::CharacterDevice, libc::makedev(1, 3));
    drop(std::os::unix::net::UnixListener::bind(m.path("socket")).unwrap());
    symlink("x".repeat(4095), m.path("far")).unwrap();
    rustix::fs::lsetxattr(m.path("far"), "trusted.t", b"v", XattrFlags::empty()).unwrap();
    let m = {
        m.seal();
        m.remount()
    };
    assert_eq!(fs::read_dir(m.path("")).unwrap().count(), 8);
    assert_eq!(fs::metadata(m.path("disk")).unwrap().rdev(), libc::makedev(259, 70_000));
    assert_eq!(fs::metadata(m.path("whiteout")).unwrap().rdev(), 0);
    fs::write(m.path("null"), b"gone").unwrap();
    assert_eq!(fs::read_link(m.path("far")).unwrap().as_os_str().len(), 4095);
    let mut value = [0; 8];
    assert_eq!(rustix::fs::lgetxattr(m.path("far"), "trusted.t", &mut value[..]).unwrap(), 1);
    assert_eq!(fs::read(m.path(OsStr::from_bytes(b"not\xffutf\n8"))).unwrap(), b"odd");
    fs::remove_file(m.path("whiteout")).unwrap();
    assert!(fs::symlink_metadata(m.path("whiteout")).is_err());
}

#[test]
fn times_have_nanoseconds_before_the_epoch_too() {
    let Some(m) = mounted() else { return };
    fs::write(m.path("file"), b"").unwrap();
    for (seconds, nanos) in
        [(1_700_000_000, 123_456_789), (-2, 800_000_000), (-1, 1), (0, 999_999_999), (5_000_000_000, 1)]
    {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(rustix::fs::CWD, m.path("file"), &times, AtFlags::empty()).unwrap();
        let check = |m: &Mounted| {
            let stat = fs::metadata(m.path("file")).unwrap();
            assert_eq!((stat.mtime(), stat.mtime_nsec()), (seconds, nanos));
            assert_eq!((stat.atime(), stat.atime_nsec()), (seconds, nanos));
        };
        check(&m);
        m.seal();
        check(&m);
    }
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(1);
    fs::write(m.path("file"), b"x").unwrap();
    assert!(fs::metadata(m.path("file")).unwrap().mtime() >= before.as_secs() as i64);
}

#[test]
fn sparse_files_stay_sparse() {
    let Some(m) = mounted() else { return };
    let file = File::create(m.path("sparse")).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&[1; 4096], 1 << 30).unwrap();
    assert_eq!(fs::metadata(m.path("sparse")).unwrap().blocks(), 8);
    drop(file);
    let report = m.seal();
    assert!(report.stored.new_plain_bytes < 100_000, "{report:?}");
    let m = m.remount();
    let stat = fs::metadata(m.path("sparse")).unwrap();
    assert_eq!((stat.len(), stat.blocks()), (1 << 40, 8));
    let mut file = OpenOptions::new().read(true).write(true).open(m.path("sparse")).unwrap();
    let seek = |file: &File, to| rustix::fs::seek(file, to);
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap(), 1 << 30);
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Hole(1 << 30)).unwrap(), (1 << 30) + 4096);
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Data((1 << 30) + 4096)).unwrap_err().raw_os_error(), libc::ENXIO);
    file.seek(SeekFrom::Start(5)).unwrap();
    file.write_all(b"copied up").unwrap();
    assert!(fs::metadata(m.path("sparse")).unwrap().blocks() <= 16);
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Data(8192)).unwrap(), 1 << 30);
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        1 << 30,
        4096,
    )
    .unwrap();
    assert_eq!(fs::metadata(m.path("sparse")).unwrap().blocks(), 8);
}

#[test]
fn a_change_of_names_has_its_time_though_the_file_is_being_written() {
    let Some(m) = mounted() else { return };
    let ctime = |file: &File| {
        let stat = file.metadata().unwrap();
        UNIX_EPOCH + Duration::new(stat.ctime() as u64, stat.ctime_nsec() as u32)
    };
    type Change<'a> = &'a dyn Fn(&Path, &Path);
    let changes: [(&str, Change<'_>); 5] = [
        ("rename", &|a, b| fs::rename(a, b).unwrap()),
        ("link", &|a, b| fs::hard_link(a, b).unwrap()),
        ("unlink", &|a, _| fs::remove_file(a).unwrap()),
        ("replace", &|a, b| {
            fs::write(b, b"new").unwrap();
            fs::rename(b, a).unwrap();
        }),
        ("exchange", &|a, b| {
            fs::write(b, b"other").unwrap();
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags).unwrap();
        }),
    ];
    for (name, change) in changes {
        let (a, b) = (m.path(format!("{name}-a")), m.path(format!("{name}-b")));
        let mut file = File::create(&a).unwrap();
        file.write_all(b"written").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        // Times are those of the last tick.
        let before = SystemTime::now() - Duration::from_millis(10);
        change(&a, &b);
        assert!(ctime(&file) >= before, "{name}");
        let still_there = if name == "unlink" || name == "replace" { None } else { Some(b) };
        drop(file);
        if let Some(b) = still_there {
            assert!(ctime(&File::open(b).unwrap()) >= before, "{name}, closed");
        }
    }
}

#[test]
fn huge_folders_can_be_listed_and_removed() {
    let Some(m) = mounted() else { return };
    let folder = m.path("huge");
    fs::create_dir(&folder).unwrap();
    let count = 5000;
    for number in 0..count {
        File::create(folder.join(format!("file-{number}"))).unwrap();
    }
    m.seal();
    for number in 0..count {
        symlink("x", folder.join(format!("new-{number}"))).unwrap();
    }
    let mut listed: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(listed.len(), 2 * count);
    listed.sort();
    listed.dedup();
    assert_eq!(listed.len(), 2 * count);
    // Removing while listing, with other listings filling the kernel's cache, and a seal in between.
    let mut removed = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.ino() > 1);
        fs::remove_file(entry.path()).unwrap();
        removed += 1;
        if removed == 3000 {
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 2 * count - removed);
            m.seal();
        }
    }
    assert_eq!(removed, 2 * count);
    fs::remove_dir(&folder).unwrap();
    assert_eq!(names(&m.path("")), BTreeSet::new());
}

#[test]
fn positions_in_a_folder_stay() {
    let Some(m) = mounted() else { return };
    let folder = m.path("folder");
    fs::create_dir(&folder).unwrap();
    (0..300).for_each(|number| drop(File::create(folder.join(format!("a{number:03}"))).unwrap()));
    m.seal();
    (0..300).for_each(|number| drop(File::create(folder.join(format!("b{number:03}"))).unwrap()));
    let open = || rustix::fs::Dir::read_from(File::open(&folder).unwrap()).unwrap();
    let mut entries = Vec::new();
    for entry in open() {
        let entry = entry.unwrap();
        entries.push((entry.offset(), entry.file_name().to_owned()));
    }
    for (index, (offset, _)) in entries.iter().enumerate().step_by(7) {
        if index > 2 && index + 1 < entries.len() {
            let _ = fs::remove_file(folder.join(OsStr::from_bytes(entries[index - 1].1.to_bytes())));
        }
        let mut dir = open();
        dir.seek(*offset).unwrap();
        let next = dir.next().map(|entry| entry.unwrap().file_name().to_owned());
        assert_eq!(next.as_ref(), entries.get(index + 1).map(|(_, name)| name));
    }
}

#[test]
fn many_threads_at_once() {
    let Some(m) = mounted() else { return };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let m = &m;
            scope.spawn(move || {
                for number in 0..150 {
                    let folder = m.path(format!("{}", number % 5));
                    let _ = fs::create_dir(&folder);
                    let path = folder.join(format!("{thread}-{number}"));
                    fs::write(&path, vec![number as u8; 5000]).unwrap();
                    let moved = m.path(format!("{thread}-{number}"));
                    fs::rename(&path, &moved).unwrap();
                    assert_eq!(fs::read(&moved).unwrap(), vec![number as u8; 5000]);
                    if number % 3 == 0 {
                        fs::remove_file(&moved).unwrap();
                    }
                }
            });
        }
        for _ in 0..6 {
            m.seal();
        }
    });
    m.seal();
    let m = m.remount();
    let files = names(&m.path("")).into_iter().filter(|name| name.contains('-')).count();
    assert_eq!(files, 4 * 100);
    for name in names(&m.path("")).into_iter().filter(|name| name.contains('-')) {
        let number: u8 = name.split('-').nth(1).unwrap().parse().unwrap();
        assert_eq!(fs::read(m.path(&name)).unwrap(), vec![number; 5000], "{name}");
    }
}

#[test]
fn mounts_refuse_what_they_must() {
    let Some(m) = mounted() else { return };
    let start = |layer, dir: &Path, upper| {
        Mount::start(&m.store, layer, "test", dir, &MountOptions { upper, ..Default::default() }).map(drop)
    };
    let nowhere = m.folder.path().join("nowhere");
    assert_eq!(start(None, &nowhere, UpperChoice::Fresh).unwrap_err().class(), crate::error::ErrorClass::NotFound);
    let id = m.mount.record().upper.unwrap();
    let other = m.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let busy = start(None, &other, UpperChoice::Existing(id)).unwrap_err();
    assert_eq!(busy.class(), crate::error::ErrorClass::Busy);
    let held = File::open(m.path("")).unwrap();
    assert_eq!(m.mount.unmount(&UnmountOptions::default()).unwrap_err().class(), crate::error::ErrorClass::Busy);
    drop(held);
    assert!(m.mount.info().unwrap().upper_size.is_some());
    // An upper without a name and without content goes with its mount.
    assert_eq!(crate::upper::list(m.store.db()).unwrap().len(), 1);
}

#[test]
fn setting_or_removing_what_changes_nothing_succeeds_as_on_ext4() {
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("folder")).unwrap();
    fs::write(m.path("file"), b"x").unwrap();
    let ctime = |name: &str| fs::metadata(m.path(name)).map(|stat| (stat.ctime(), stat.ctime_nsec())).unwrap();
    // Programs that reset a list (`setfacl -b`, `cp -p`) remove it without asking whether there is one.
    rustix::fs::removexattr(m.path("file"), "system.posix_acl_access").unwrap();
    rustix::fs::removexattr(m.path("folder"), "system.posix_acl_default").unwrap();
    let missing = rustix::fs::removexattr(m.path("file"), "user.a").unwrap_err();
    assert_eq!(missing, rustix::io::Errno::NODATA);
    let unnamed = rustix::fs::setxattr(m.path("file"), "user.", b"1", XattrFlags::empty()).unwrap_err();
    assert_eq!(unnamed, rustix::io::Errno::INVAL);
    rustix::fs::setxattr(m.path("file"), "user.a", b"1", XattrFlags::empty()).unwrap();
    let before = ctime("file");
    rustix::fs::setxattr(m.path("file"), "user.a", b"1", XattrFlags::empty()).unwrap();
    assert_eq!(ctime("file"), before);
    rustix::fs::setxattr(m.path("file"), "user.a", b"2", XattrFlags::empty()).unwrap();
    assert_ne!(ctime("file"), before);
}

#[test]
fn files_without_a_name_get_one_or_end() {
    let Some(mounted) = mounted() else { return };
    let open =
        |flags| OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE | flags).open(mounted.path(""));
    let counts = || mounted.mount.fs().unwrap().upper_counts();
    let link = |file: &File, name: &str| {
        rustix::fs::linkat(file, "", rustix::fs::CWD, mounted.path(name), AtFlags::EMPTY_PATH)
    };
    let before = counts();
    let (mut file, other, exclusive) = (open(0).unwrap(), open(0).unwrap(), open(libc::O_EXCL).unwrap());
    file.write_all(b"its bytes").unwrap();
    assert_eq!((file.metadata().unwrap().nlink(), other.metadata().unwrap().nlink()), (0, 0));
    assert_eq!(link(&exclusive, "never"), Err(rustix::io::Errno::NOENT));
    mounted.seal();
    file.write_all(b", and more").unwrap();
    link(&file, "named").unwrap();
    assert_eq!(fs::read(mounted.path("named")).unwrap(), b"its bytes, and more");
    assert_eq!(file.metadata().unwrap().nlink(), 1);
    link(&file, "twice").unwrap();
    fs::remove_file(mounted.path("named")).unwrap();
    fs::remove_file(mounted.path("twice")).unwrap();
    assert_eq!(link(&file, "again"), Err(rustix::io::Errno::NOENT), "it has lost its last name");
    drop((file, other));
    let kept = open(0).unwrap();
    link(&kept, "kept").unwrap();
    drop((kept, exclusive));
    let mounted = mounted.remount();
    assert_eq!(fs::read_dir(mounted.path("")).unwrap().count(), 1);
    let (inodes, _) = mounted.mount.fs().unwrap().upper_counts();
    assert!(inodes <= before.0 + 2, "{inodes}: the folder and the file");
}

#[test]
fn who_changes_a_file_of_another_group_clears_its_setgid() {
    let Some(m) = mounted() else { return };
    let plain = tempfile::Builder::new().prefix("layerfs-plain-").tempdir().unwrap();
    fs::set_permissions(plain.path(), Permissions::from_mode(0o755)).unwrap();
    let commands = [
        &["fallocate", "-o", "65536", "-l", "65536"][..],
        &["truncate", "-s", "1000"],
        &["sh", "-c", "printf x 1<> $0"],
        &["sh", "-c", "> $0"],
    ];
    let changed = |path: PathBuf, mode: u32, group: &str, command: &[&str]| {
        fs::write(&path, vec![1; 200_000]).unwrap();
        std::os::unix::fs::chown(&path, Some(0), Some(5678)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let mut as_user = Command::new("setpriv");
        as_user.args(["--reuid", "1234", "--regid", group, "--clear-groups", "--"]);
        assert!(as_user.args(command).arg(&path).status_locked().unwrap().success());
        fs::metadata(&path).unwrap().mode() & 0o7777
    };
    for command in commands {
        for mode in [0o6666, 0o6676, 0o6766, 0o2666, 0o2677] {
            for group in ["1234", "5678"] {
                let ours = changed(m.path("file"), mode, group, command);
                let theirs = changed(plain.path().join("file"), mode, group, command);
                assert_eq!(
                    ours, theirs,
                    "{command:?} of a file with mode {mode:o} by group {group}: {ours:o}, {theirs:o}"
                );
            }
        }
    }
}

#[test]
fn a_listing_ends_though_what_it_lists_is_renamed() {
    const FILES: usize = 3000;
    let Some(m) = mounted() else { return };
    fs::create_dir(m.path("folder")).unwrap();
    for n in 0..FILES {
        File::create(m.path(format!("folder/{n}"))).unwrap();
    }
    for round in 0..3 {
        if round == 1 {
            m.seal();
        }
        let mut seen = BTreeSet::new();
        for (count, entry) in fs::read_dir(m.path("folder")).unwrap().enumerate() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            fs::rename(m.path(format!("folder/{name}")), m.path(format!("folder/{name}x"))).unwrap();
            seen.insert(name);
            assert!(count < FILES, "it lists what was renamed meanwhile");
            if round == 2 && count == FILES / 2 {
                m.seal();
            }
        }
        assert_eq!(seen.len(), FILES);
        assert_eq!(names(&m.path("folder")), seen.iter().map(|name| format!("{name}x")).collect());
    }
}

/// A file handle as the kernel gives it: its length, its type, its bytes.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    of: [u8; 64],
}

#[allow(unsafe_code)]
impl Handle {
    fn of(path: &Path) -> Handle {
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut handle = Handle { bytes: 64, kind: 0, of: [0; 64] };
        let mut mount = 0;
        // SAFETY: the structure is as the kernel wants it, with room for as many bytes as it says.
        let result = unsafe {
            let to = (&raw mut handle).cast();
            libc::name_to_handle_at(libc::AT_FDCWD, name.as_ptr(), to, &raw mut mount, 0)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        handle
    }

    fn open(&mut self, m: &Mounted, flags: i32) -> std::io::Result<File> {
        let root = File::open(m.path("")).unwrap();
        // SAFETY: the structure is one that the kernel gave.
        let opened = unsafe { libc::open_by_handle_at(root.as_raw_fd(), (&raw mut *self).cast(), flags) };
        if opened < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: nobody else has the descriptor.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(opened) })
    }
}

#[test]
fn handles_lead_to_what_has_a_name() {
    let Some(m) = mounted() else { return };
    fs::create_dir_all(m.path("a/b")).unwrap();
    for name in ["a/b/kept", "a/b/removed", "a/b/linked", "a/moved"] {
        fs::write(m.path(name), name).unwrap();
    }
    fs::hard_link(m.path("a/b/linked"), m.path("a/second")).unwrap();
    fs::create_dir(m.path("a/gone")).unwrap();
    fs::write(m.path("a/gone/too"), "").unwrap();
    let mut handles =
        ["a/b/kept", "a/b/removed", "a/b/linked", "a/moved", "a/gone/too", "a/b"].map(|n| Handle::of(&m.path(n)));
    let mut m = m;
    // As the upper's files, as sealed ones, and as ones that the upper has changed.
    for round in 0..3 {
        if round == 1 {
            m.seal();
        }
        // The kernel knows none of them any more.
        m = m.remount();
        let [kept, .., folder] = &mut handles;
        let mut text = String::new();
        kept.open(&m, libc::O_RDONLY).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "a/b/kept");
        let opened = folder.open(&m, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
        let path = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).unwrap();
        assert_eq!(path, m.path("a/b"));
        drop(opened);
        m = m.remount();
        let [_, removed, linked, moved, too, _] = &mut handles;
        if round < 2 {
            for handle in [removed, linked, moved, too] {
                handle.open(&m, libc::O_RDONLY).unwrap();
            }
            if round == 1 {
                fs::remove_file(m.path("a/b/removed")).unwrap();
                fs::remove_file(m.path("a/b/linked")).unwrap();
                fs::remove_dir_all(m.path("a/gone")).unwrap();
                fs::rename(m.path("a/moved"), m.path("moved")).unwrap();
            }
            continue;
        }
        let errno = |handle: &mut Handle| handle.open(&m, libc::O_RDONLY).unwrap_err().raw_os_error();
        assert_eq!((errno(removed), errno(too)), (Some(libc::ESTALE), Some(libc::ESTALE)));
        for (handle, name) in [(linked, "a/b/linked"), (moved, "a/moved")] {
            let mut text = String::new();
            handle.open(&m, libc::O_RDWR).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, name);
        }
    }
}
