//! Files that are passed through: the kernel reads and writes them past us, and nobody may notice.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::error::Error;
use crate::id::Ino;
use crate::monitor::Monitor;
use crate::mount::backing::Device;
use crate::mount::fs::Backings;
use crate::mount::{Mount, MountOptions, UnmountOptions, UpperChoice};
use crate::testing::{Spawn, elsewhere, nobody_spawns};
use crate::upper::hold::Hold;

const BYTES: usize = 300_000;

struct Mounted {
    mount: Arc<Mount>,
    _folder: tempfile::TempDir,
    dir: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _still = nobody_spawns();
        self.mount.unmount(&UnmountOptions { discard_upper: true, ..Default::default() }).unwrap();
    }
}

impl Mounted {
    /// Waits until the upper has so many data files and others. A copy of a descriptor that another test's child has until its program
    /// runs keeps a file open; whatever is asked after its closing finds it closed.
    fn comes_to(&self, counts: (u64, u64)) -> bool {
        within_seconds(60, || {
            fs::read_dir(&self.dir).unwrap();
            self.mount.fs().unwrap().upper_counts() == counts
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn seal(&self) -> (SealReport, Arc<View>) {
        self.seal_with(&Silent)
    }

    fn seal_with(&self, monitor: &dyn Monitor) -> (SealReport, Arc<View>) {
        let options = SealOptions { name: unique_name("passed"), expect: Expect::Absent, kind: LayerKind::Instance };
        let report = self.mount.seal(&options, monitor).unwrap();
        let view = View::open(store(), report.layer).unwrap();
        (report, view)
    }

    /// Closes `files`; when it returns, the daemon knows.
    fn close<T>(&self, files: T) {
        // Copies would keep them open.
        let still = nobody_spawns();
        drop(files);
        drop(still);
        fs::read_dir(&self.dir).unwrap();
    }

    /// Bytes that went by way of the daemon.
    fn written(&self) -> u64 {
        self.mount.fs().unwrap().written_bytes()
    }
}

fn mounted() -> Option<Mounted> {
    if !rustix::process::geteuid().is_root()
        || File::open("/dev/fuse").is_err()
        || !Hold::is_possible_in(&std::env::temp_dir())
    {
        eprintln!("NOT RUN: passing files through needs the superuser, /dev/fuse and userfaults");
        return None;
    }
    let folder = tempfile::Builder::new().prefix("layerfs-passed-").tempdir().unwrap();
    let dir = folder.path().join("mnt");
    fs::create_dir(&dir).unwrap();
    let mount = Mount::start(store(), None, "test", &dir, &MountOptions::default()).unwrap();
    let mounted = Mounted { mount, _folder: folder, dir };
    fs::write(mounted.path("probe"), b"probe").unwrap();
    if mounted.written() > 0 {
        eprintln!("NOT RUN: this kernel, or the filesystem of temporary files, passes nothing through");
        return None;
    }
    fs::remove_file(mounted.path("probe")).unwrap();
    // It is dropped when there is nothing else to do, and tests count what the upper has: the root.
    let fs = mounted.mount.fs().unwrap();
    assert!(within_seconds(60, || fs.upper_counts() == (1, 0)), "a removed file stays: {:?}", fs.upper_counts());
    Some(mounted)
}

fn open(path: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn sealed_bytes(view: &View, name: &str) -> Vec<u8> {
    let (ino, _) = view.lookup(Ino::ROOT, name.as_bytes()).unwrap().unwrap();
    let mut bytes = vec![0; 1 << 20];
    let count = view.read_at(ino, 0, &mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn what_a_daemon_has_not_recorded_is_struck_out() {
    let Some(mounted) = mounted() else { return };
    let device = Device::new(mounted.mount.descriptors.lock()[0].try_clone().unwrap());
    let file = tempfile::tempfile().unwrap();
    let backings: Vec<_> = (0..5).map(|_| device.open(&file).unwrap()).collect();
    device.close_leftovers(&backings[1..3]);
    let is_there: Vec<_> = backings.iter().map(|backing| device.strike_out(*backing).is_ok()).collect();
    assert_eq!(is_there, [false, true, true, false, false]);
}

#[test]
fn sizes_and_times_are_seen_at_once() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("file");
    let file = open(&path);
    let mut last = file.metadata().unwrap();
    for round in 1..20u64 {
        file.write_all_at(&[round as u8; 1000], round * 5000).unwrap();
        let (by_name, by_file) = (fs::metadata(&path).unwrap(), file.metadata().unwrap());
        assert_eq!((by_name.len(), by_file.len()), (round * 5000 + 1000, round * 5000 + 1000));
        let times = |seen: &fs::Metadata| (seen.mtime(), seen.mtime_nsec());
        assert_eq!(times(&by_name), times(&by_file), "round {round}");
        assert!(times(&by_file) > times(&last), "round {round}: {:?} is not after {:?}", times(&by_file), times(&last));
        last = by_file;
    }
    let set = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    file.set_modified(set).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), set);
    file.set_len(10).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 10);
    file.write_all_at(b"x", 10).unwrap();
    file.set_modified(set).unwrap();
    drop(file);
    let now = fs::metadata(&path).unwrap();
    assert_eq!((now.len(), now.modified().unwrap()), (11, set));
    assert_eq!(mounted.written(), 0, "it was not passed through");
}

#[test]
#[allow(unsafe_code)]
fn times_of_what_is_stored_through_a_mapping_are_seen() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("file");
    fs::write(&path, vec![1; BYTES]).unwrap();
    let times = || {
        let seen = fs::metadata(&path).unwrap();
        ((seen.mtime(), seen.mtime_nsec()), (seen.ctime(), seen.ctime_nsec()))
    };
    // The kernel knows them now, and nobody asks for them between opening and storing.
    let (mut modified, mut changed) = times();
    for _ in 0..3 {
        // What changes before the kernel's clock moves on has the same time.
        let coarse = || rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        while (coarse().tv_sec, coarse().tv_nsec) <= modified.max(changed) {
            std::thread::yield_now();
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        // SAFETY: it is used in the next line alone, and nobody shortens the file.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
        map[5] = map[5].wrapping_add(1);
        drop((map, file));
        let now = times();
        assert!(now.0 > modified && now.1 > changed, "{now:?} after {modified:?} and {changed:?}");
        (modified, changed) = now;
    }
    assert_eq!(mounted.written(), 0, "it was not passed through");
}

#[test]
fn readers_and_writers_of_all_kinds_see_the_same() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("file");
    fs::write(&path, vec![1; BYTES]).unwrap();
    mounted.seal();
    // A reader holds the sealed file, so the writer shares its cache.
    let reader = File::open(&path).unwrap();
    let mut byte = [0];
    reader.read_exact_at(&mut byte, 7).unwrap();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all_at(b"2", 7).unwrap();
    reader.read_exact_at(&mut byte, 7).unwrap();
    assert_eq!((byte, mounted.written()), (*b"2", 1));
    // Copies would keep them open.
    let _still = nobody_spawns();
    drop((reader, writer));
    // Now it is the upper's, and nobody has it open.
    let before = mounted.written();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    let reader = File::open(&path).unwrap();
    writer.write_all_at(b"3", 7).unwrap();
    reader.read_exact_at(&mut byte, 7).unwrap();
    assert_eq!((byte, mounted.written()), (*b"3", before));
    assert_eq!(fs::read(&path).unwrap()[7], b'3');
}

/// As `sealing::a_layer_is_the_tree_at_one_instant`, but the writer's files are passed through.
#[test]
fn a_seal_holds_writers_back() {
    let Some(mounted) = mounted() else { return };
    let files = [open(&mounted.path("first")), open(&mounted.path("second"))];
    let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let stops = Stops(&stop);
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let round = rounds.load(Ordering::Relaxed) + 1;
                for file in &files {
                    file.write_all_at(&[round as u8; BYTES], 0).unwrap();
                }
                rounds.store(round, Ordering::Relaxed);
            }
        });
        for _ in 0..15 {
            let before = rounds.load(Ordering::Relaxed);
            while rounds.load(Ordering::Relaxed) < before + 2 && !writer.is_finished() {
                std::thread::yield_now();
            }
            let (_, view) = mounted.seal();
            let (one, other) = (sealed_bytes(&view, "first"), sealed_bytes(&view, "second"));
            assert!(one.len() == BYTES && one.iter().all(|byte| *byte == one[0]), "half of a write is in the layer");
            assert!(
                other.len() == BYTES && other.iter().all(|byte| *byte == other[0]),
                "half of a write is in the layer"
            );
            assert!(one[0].wrapping_sub(other[0]) <= 1, "{} and {}: of different instants", one[0], other[0]);
        }
        drop(stops);
    });
    assert_eq!(mounted.written(), 0, "they were not passed through");
    let last = rounds.load(Ordering::Relaxed) as u8;
    assert_eq!(fs::read(mounted.path("second")).unwrap(), vec![last; BYTES]);
    drop(files);
    let (_, view) = mounted.seal();
    assert_eq!(sealed_bytes(&view, "first"), vec![last; BYTES]);
    assert!(mounted.comes_to((0, 0)), "{:?}", mounted.mount.fs().unwrap().upper_counts());
}

/// More than there are threads: each wants to change something, and waits.
#[test]
fn look_ups_and_reads_go_on_however_many_wait_for_a_seal() {
    const CREATORS: usize = 40;
    let Some(mounted) = mounted() else { return };
    let fs = mounted.mount.fs().unwrap();
    // In a folder of its own each: the kernel makes one file in a folder at a time.
    let folders: Vec<_> = (0..CREATORS).map(|number| mounted.path(&number.to_string())).collect();
    folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let sealed = mounted.path("sealed");
    mounted.close(fs::write(&sealed, vec![5; BYTES]));
    mounted.seal();
    let (send, answers) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        let create = |folder: &PathBuf| fs::write(folder.join("new"), b"new").unwrap();
        let creators: Vec<_> = folders.iter().map(|folder| scope.spawn(move || create(folder))).collect();
        let all_wait = within_seconds(20, || fs.running(Duration::ZERO, false).len() == CREATORS);
        let path = mounted.path("absent");
        let sealed = &sealed;
        scope.spawn(move || send.send((fs::exists(path).unwrap(), fs::read(sealed).unwrap())));
        let answer = answers.recv_timeout(Duration::from_secs(20));
        let still_wait = creators.iter().all(|creator| !creator.is_finished());
        // Before anything fails: who waits can't be joined else.
        drop(frozen);
        assert!(all_wait, "not all are heard");
        assert_eq!(answer.expect("nobody answers while a seal goes on"), (false, vec![5; BYTES]));
        assert!(still_wait, "a change got through");
    });
    for folder in folders {
        assert_eq!(fs::read(folder.join("new")).unwrap(), b"new");
    }
}

#[test]
fn a_file_in_use_goes_on_after_a_seal_and_leaves_the_upper_when_it_is_closed() {
    let Some(mounted) = mounted() else { return };
    let counts = || mounted.mount.fs().unwrap().upper_counts();
    let (written, read) = (mounted.path("written"), mounted.path("read"));
    fs::write(&read, vec![5; BYTES]).unwrap();
    let (reader, writer) = (File::open(&read).unwrap(), open(&written));
    writer.write_all_at(&[1; BYTES], 0).unwrap();
    mounted.seal();
    assert_eq!(counts(), (2, 0), "data files in use have to stay");
    writer.write_all_at(&[2; 10], 100).unwrap();
    let mut bytes = [0; 10];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 10]);
    assert_eq!(fs::read(&written).unwrap()[99..111], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
    drop(reader);
    assert!(mounted.comes_to((1, 0)), "{:?}: the data file stays though nobody has it open", counts());
    writer.write_all_at(&[2; 1], 100).unwrap();
    let (report, view) = mounted.seal();
    assert_eq!(sealed_bytes(&view, "written")[100], 2);
    assert_eq!(report.inodes, 1);
    mounted.close(writer);
    assert_eq!(fs::read(&written).unwrap()[99..102], [1, 2, 2]);
    let (report, _) = mounted.seal();
    assert!(!report.is_new, "nothing was written");
    assert!(mounted.comes_to((0, 0)), "{:?}: what could be written to during a seal leaves with the next", counts());
}

/// The last who closes it has only read it; the mapping was there before, and has ended.
#[test]
fn what_is_stored_through_a_mapping_after_a_seal_stays_when_a_reader_closes_the_file() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("mapped");
    let file = open(&path);
    file.write_all_at(&[1; BYTES], 0).unwrap();
    // SAFETY: it is used below alone, and nobody shortens the file.
    #[allow(unsafe_code)]
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    mounted.close(file);
    let reader = File::open(&path).unwrap();
    mounted.seal();
    map[7] = 2;
    drop(map);
    mounted.close(reader);
    assert_eq!(fs::read(&path).unwrap()[6..9], [1, 2, 1]);
    let (_, view) = mounted.seal();
    assert_eq!(sealed_bytes(&view, "mapped")[6..9], [1, 2, 1]);
}

/// Does something once while changes wait, when the layer has been written.
struct Meanwhile<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Monitor for Meanwhile<F> {
    fn phase(&self, name: &str, _: Option<u64>) {
        if name == "switching"
            && let Some(work) = self.0.lock().take()
        {
            work();
        }
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

#[test]
fn who_reads_a_file_and_closes_it_while_changes_wait_leaves_nothing_in_the_upper() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("file");
    let writer = open(&path);
    writer.write_all_at(&[5; BYTES], 0).unwrap();
    mounted.close(writer);
    let reader = File::open(&path).unwrap();
    let (_, view) = mounted.seal_with(&Meanwhile(Mutex::new(Some(|| mounted.close(reader)))));
    assert_eq!(sealed_bytes(&view, "file"), vec![5; BYTES]);
    assert!(mounted.comes_to((0, 0)), "{:?}", mounted.mount.fs().unwrap().upper_counts());
    assert_eq!(fs::read(&path).unwrap(), vec![5; BYTES]);
    // Its data file waits to be removed, and another is made.
    open(&path).write_all_at(&[6; 10], 0).unwrap();
    mounted.mount.fs().unwrap().upper().unwrap().free_removed();
    assert_eq!(fs::read(&path).unwrap(), [vec![6; 10], vec![5; BYTES - 10]].concat());
}

/// A direct write that nobody waits for sets the file's times and lets go of its lock when it is submitted: no seal holds it back, and nothing
/// tells that it has come to its end after one.
#[test]
fn a_write_that_ends_after_a_seal_is_there_and_in_the_next() {
    let Some(mounted) = mounted() else { return };
    let fs = mounted.mount.fs().unwrap();
    for has_reader in [false, true] {
        let path = mounted.path(if has_reader { "read" } else { "closed" });
        let writer = open(&path);
        writer.write_all_at(&[1; BYTES], 0).unwrap();
        let reader = has_reader.then(|| File::open(&path).unwrap());
        mounted.seal();
        // As such a write that was submitted before.
        let data = fs.upper().unwrap().data().file(Ino(writer.metadata().unwrap().ino())).unwrap();
        let before = data.metadata().unwrap().modified().unwrap();
        data.write_all_at(&[2; 10], 100).unwrap();
        data.set_modified(before).unwrap();
        drop(data);
        mounted.close(writer);
        assert_eq!(fs::read(&path).unwrap()[99..111], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1], "it is lost: {path:?}");
        let (_, view) = mounted.seal();
        assert_eq!(sealed_bytes(&view, path.file_name().unwrap().to_str().unwrap())[100], 2, "a seal left it out");
        mounted.close(reader);
        assert!(mounted.comes_to((0, 0)), "{:?}", fs.upper_counts());
    }
    assert_eq!(mounted.written(), 0, "they were not passed through");
}

/// The descriptor through which a file was mapped is closed: nobody tells us of the mapping, and stores into it go on.
#[test]
fn mappings_outlive_their_descriptors_and_seals() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("mapped");
    let file = open(&path);
    file.set_len(8192).unwrap();
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of 8192 bytes, used only below, by this thread.
    #[allow(unsafe_code)]
    let map = unsafe {
        let map = libc::mmap(std::ptr::null_mut(), 8192, access, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(map, libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(map.cast::<u8>(), 8192)
    };
    map[0] = 1;
    drop(file);
    for round in 2..6 {
        let before = fs::metadata(&path).unwrap();
        map[0] = round;
        map[5000] = round;
        assert_eq!(fs::read(&path).unwrap()[0], round);
        let (_, view) = mounted.seal();
        assert_eq!(sealed_bytes(&view, "mapped")[5000], round);
        let after = fs::metadata(&path).unwrap();
        assert!((after.mtime(), after.mtime_nsec()) >= (before.mtime(), before.mtime_nsec()));
        // Another descriptor, by which it is changed.
        let other = open(&path);
        other.write_all_at(&[round + 100], 1).unwrap();
        assert_eq!(map[1], round + 100);
    }
    // SAFETY: nothing refers to the mapping any more.
    #[allow(unsafe_code)]
    unsafe {
        libc::munmap(map.as_mut_ptr().cast(), 8192);
    }
    mounted.seal();
    drop(open(&path));
    mounted.seal();
    assert_eq!(fs::read(&path).unwrap()[5000], 5);
}

#[test]
fn what_is_written_to_runs_with_no_other_rights() {
    let Some(mounted) = mounted() else { return };
    let path = mounted.path("program");
    let file = open(&path);
    file.write_all_at(b"one", 0).unwrap();
    let mode = |bits| fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
    mode(0o4755);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4755);
    file.write_all_at(b"two", 0).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
    mode(0o4755);
    // Copies would keep it open.
    let _still = nobody_spawns();
    drop(file);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4755);
    // A descriptor that was closed a moment ago counts no more.
    let before = mounted.written();
    fs::write(&path, b"three").unwrap();
    assert_eq!(mounted.written(), before + 5, "a setuid file that can be written to was passed through");
}

#[test]
fn holes_and_large_lengths_are_no_burden_to_a_seal() {
    let Some(mounted) = mounted() else { return };
    let file = open(&mounted.path("sparse"));
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"far", 1 << 39).unwrap();
    let (_, view) = mounted.seal();
    let (ino, _) = view.lookup(Ino::ROOT, b"sparse").unwrap().unwrap();
    let mut bytes = [0; 3];
    view.read_at(ino, 1 << 39, &mut bytes).unwrap();
    assert_eq!((bytes, view.stat(ino).unwrap().unwrap().size), (*b"far", 1 << 40));
}

/// The connection is cut, but what is passed through goes on: a mount that knew nothing of it would lose it.
#[test]
fn who_writes_past_the_end_keeps_the_upper_back() {
    let Some(mut mounted) = mounted() else { return };
    let path = mounted.path("file");
    fs::write(&path, b"one").unwrap();
    let mut other = Command::new(elsewhere());
    other.arg(&mounted.dir).args(["sh", "-c", "exec 3<>\"$0\"; echo; read line; echo \"$line\" >&3; echo; cat"]);
    let mut other = other.arg(&path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn_locked().unwrap();
    let (mut input, mut output) = (other.stdin.take().unwrap(), other.stdout.take().unwrap());
    // Once it answers, it has the file open.
    output.read_exact(&mut [0]).unwrap();
    let still = nobody_spawns();
    mounted.mount.unmount(&UnmountOptions { everywhere: true, ..Default::default() }).unwrap();
    drop(still);
    input.write_all(b"another\n").unwrap();
    output.read_exact(&mut [0]).unwrap();
    let options =
        MountOptions { upper: UpperChoice::Existing(mounted.mount.record().upper.unwrap()), ..Default::default() };
    let refused = Mount::start(store(), None, "test", &mounted.dir, &options);
    assert!(matches!(&refused, Err(Error::Busy(_))), "{refused:?}");
    drop(input);
    other.wait().unwrap();
    mounted.mount = Mount::start(store(), None, "test", &mounted.dir, &options).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"another\n");
    assert_eq!(fs::metadata(&path).unwrap().len(), 8);
}
