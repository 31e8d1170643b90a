//! `kill -9` of the process that serves a mount, while programs write and at each step of a seal: whatever an
//! operation had answered is there afterwards.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};

use super::real::Mapper;
use super::*;
use crate::failpoint;
use crate::mount::hidden::place::Place;
use crate::mount::{Mount, MountOptions, helper, point};
use crate::packets::{receive, send};
use crate::testing::{Spawn, noise};

/// Where the served process finds its folder, at which step of a seal it dies, whether it goes on with what is kept, and whether it
/// has a hidden mount.
const FOLDER: &str = "LAYERFS_TEST_FOLDER";
const DIES_AT: &str = "LAYERFS_TEST_DIES_AT";
const GOES_ON: &str = "LAYERFS_TEST_GOES_ON";
const WRITEBACK: &str = "LAYERFS_TEST_WRITEBACK";

/// Where the test listens that keeps a mount.
const KEEPER: &str = "keeper.sock";

/// Not a test: what the tests below start and kill. It mounts what was mounted, or something new; a line on its
/// standard input makes it seal, hold changes back from now on, or give away what connects it to the kernel.
#[test]
#[ignore = "started by other tests"]
fn serve() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    helper::is_started_by(arguments_for("obey").map(Into::into).to_vec());
    let store = Store::open(&folder.join("store"), StoreOptions::create()).unwrap();
    crate::mount::attach(&store).unwrap();
    let mut kept = HashMap::new();
    if std::env::var_os(GOES_ON).is_some() {
        let keeper = UnixStream::connect(folder.join(KEEPER)).unwrap();
        kept.insert(folder.join("mnt"), receive::<()>(keeper.as_fd()).unwrap().unwrap().1);
    }
    let options = MountOptions { writeback: std::env::var_os(WRITEBACK).is_some(), ..Default::default() };
    let mount = match crate::mount::restore(&store, &mut kept).unwrap().pop() {
        Some((_, mount)) => mount.unwrap(),
        None => Mount::start(&store, None, "test", &folder.join("mnt"), &options).unwrap(),
    };
    if let Ok(step) = std::env::var(DIES_AT) {
        assert!(failpoint::arm(&step, 1));
    }
    say("ready");
    for line in std::io::stdin().lines() {
        match line.unwrap().trim() {
            "keep" => {
                let keeper = UnixStream::connect(folder.join(KEEPER)).unwrap();
                let descriptors = mount.descriptors().unwrap();
                send(keeper.as_fd(), &(), &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
                mount.is_kept_by(std::os::unix::process::parent_id());
            }
            "hold" => {
                let fs = mount.fs().unwrap();
                std::thread::spawn(move || {
                    let sealing = fs.begin_seal().unwrap();
                    let _frozen = sealing.freeze().unwrap();
                    say("held");
                    loop {
                        std::thread::park();
                    }
                });
            }
            name => {
                let name = LayerName::new(name).unwrap();
                let options = SealOptions { name, expect: Expect::Absent, kind: LayerKind::Instance };
                mount.seal(&options, &Silent).unwrap();
                say("sealed");
            }
        }
    }
}

/// Not a test: the helper of the process that serves.
#[test]
#[ignore = "started by other tests"]
fn obey() {
    if std::env::var_os(FOLDER).is_some() {
        helper::run(std::io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap();
    }
}

/// What makes this program do what `test` does, and nothing else.
fn arguments_for(test: &str) -> [String; 5] {
    let options = ["--exact", "--ignored", "--nocapture", "--test-threads=1"].map(str::to_owned);
    let [exact, ignored, nocapture, one] = options;
    [format!("mount::tests::killed::{test}"), exact, ignored, nocapture, one]
}

/// Past the test harness, which keeps what is printed.
fn say(word: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{word}").unwrap();
    out.flush().unwrap();
}

struct Server {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    dir: PathBuf,
}

impl Server {
    fn start(folder: &Path, dies_at: Option<&str>) -> Server {
        let mut server = Server::begin(folder, dies_at.map(|step| (DIES_AT, step)));
        assert!(server.hears("ready"), "the process that serves the mount didn't start");
        server
    }

    fn begin(folder: &Path, variable: Option<(&str, &str)>) -> Server {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments_for("serve")).env(FOLDER, folder);
        for name in [DIES_AT, GOES_ON, WRITEBACK] {
            command.env_remove(name);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).envs(variable);
        let mut child = command.spawn_locked().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Server { child, input, output, dir: folder.join("mnt") }
    }

    /// Whether the process says `word` before it ends.
    fn hears(&mut self, word: &str) -> bool {
        let mut lines = (&mut self.output).lines();
        lines.any(|line| line.unwrap().trim() == word)
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn seal(&mut self, name: &str) -> bool {
        self.tell(name);
        self.hears("sealed")
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::mount::unmount(&self.dir, rustix::mount::UnmountFlags::DETACH);
    }
}

impl Server {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn folder() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() || fs::File::open("/dev/fuse").is_err() {
        eprintln!("NOT RUN: a real mount needs the superuser and /dev/fuse");
        return None;
    }
    let folder = tempfile::Builder::new().prefix("layerfs-killed-").tempdir().unwrap();
    fs::create_dir(folder.path().join("mnt")).unwrap();
    Some(folder)
}

/// Every file's path, number, content and time of change.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (u64, Vec<u8>, i64, i64)> {
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stat = fs::symlink_metadata(&path).unwrap();
        if stat.is_dir() {
            seen.extend(snapshot(&path));
        } else {
            seen.insert(path.clone(), (stat.ino(), fs::read(&path).unwrap(), stat.mtime(), stat.mtime_nsec()));
        }
    }
    seen
}

#[test]
fn what_was_answered_survives_a_kill() {
    let Some(folder) = folder() else { return };
    let mut server = Server::start(folder.path(), None);
    fs::write(server.path("lower"), vec![1; 100_000]).unwrap();
    for round in 0..4u8 {
        assert!(server.seal(&format!("round-{round}")));
        fs::create_dir(server.path(&format!("folder-{round}"))).unwrap();
        for number in 0..40 {
            let path = server.path(&format!("folder-{round}/{number}"));
            fs::write(&path, vec![round; number * 100]).unwrap();
            match number % 4 {
                0 => fs::rename(&path, server.path(&format!("moved-{round}-{number}"))).unwrap(),
                1 => fs::hard_link(&path, server.path(&format!("linked-{round}-{number}"))).unwrap(),
                2 => fs::remove_file(&path).unwrap(),
                _ => {}
            }
        }
        // Left open and unlinked: gone afterwards. Left open while written: what was written is there.
        let unlinked = fs::File::create(server.path("unlinked")).unwrap();
        fs::remove_file(server.path("unlinked")).unwrap();
        let lower = OpenOptions::new().write(true).open(server.path("lower")).unwrap();
        lower.write_all_at(&[round + 2; 5000], u64::from(round) * 30_000).unwrap();
        let log = OpenOptions::new().append(true).create(true).open(server.path("log")).unwrap();
        (&log).write_all(b"a line\n").unwrap();
        let mut before = snapshot(&server.dir);
        before.remove(&server.path("log"));
        let dir = server.dir.clone();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        drop((unlinked, lower, log));
        std::mem::forget(std::mem::replace(&mut server, Server::start(folder.path(), None)));
        let mut after = snapshot(&server.dir);
        assert_eq!(after.remove(&server.path("log")).unwrap().1, b"a line\n".repeat(usize::from(round) + 1));
        for (path, seen) in &before {
            let now = &after[path];
            assert_eq!((now.0, &now.1), (seen.0, &seen.1), "{}", path.display());
            // The time of a file that was being written is its data file's, which is as good but not the same.
            if !path.ends_with("lower") {
                assert_eq!((now.2, now.3), (seen.2, seen.3), "{}", path.display());
            }
        }
        assert_eq!(before.len(), after.len());
    }
    server.kill();
}

#[test]
fn a_seal_that_is_killed_is_done_or_not_done() {
    let Some(folder) = folder() else { return };
    let steps = [
        "seal.frozen",
        "pack.appended",
        "manifest.stored",
        "seal.chunked",
        "pack.synced",
        "index.written",
        "seal.before-switch",
        "name.before",
        "name.after",
        "seal.after-switch",
    ];
    for (round, step) in steps.into_iter().enumerate() {
        let mut server = Server::start(folder.path(), Some(step));
        fs::write(server.path(&format!("new-{round}")), noise(3 << 20, round as u64)).unwrap();
        let changed = OpenOptions::new().write(true).create(true).truncate(false).open(server.path("changed")).unwrap();
        changed.write_all_at(step.as_bytes(), round as u64 * 1000).unwrap();
        drop(changed);
        let before: Vec<_> = snapshot(&server.dir).into_iter().map(|(path, seen)| (path, seen.0, seen.1)).collect();
        assert!(!server.seal(&format!("step-{round}")), "{step} was not reached");
        std::mem::forget(std::mem::replace(&mut server, Server::start(folder.path(), None)));
        let after: Vec<_> = snapshot(&server.dir).into_iter().map(|(path, seen)| (path, seen.0, seen.1)).collect();
        assert!(before == after, "the tree differs after a kill at {step}");
        if matches!(step, "name.after" | "seal.after-switch") {
            assert!(server.seal(&format!("again-{round}")));
        } else {
            // The name isn't there: sealing under it works.
            assert!(server.seal(&format!("step-{round}")), "{step}");
        }
        let sealed: Vec<_> = snapshot(&server.dir).into_iter().map(|(path, seen)| (path, seen.0, seen.1)).collect();
        assert!(before == sealed, "the tree differs after a seal that followed a kill at {step}");
        server.kill();
    }
}

/// Ends the connection of the mount on a folder if this isn't dropped in time: nothing hangs then that hangs now.
struct Rescue(Option<Sender<()>>);

impl Rescue {
    fn new(dir: &Path) -> Rescue {
        let (dir, number) = (dir.to_owned(), point::device(dir).unwrap());
        let (send, receive) = channel();
        std::thread::spawn(move || {
            let is_late = receive.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout);
            if is_late && point::device(&dir) == Some(number) {
                eprintln!("the mount on {} hangs: it is ended", dir.display());
                point::end_everywhere(number).unwrap();
            }
        });
        Rescue(Some(send))
    }
}

impl Drop for Rescue {
    fn drop(&mut self) {
        self.0 = None;
    }
}

/// The folders below `dir` that are numbers: processes, or threads.
fn numbered(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_number = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().is_ok();
    entries.filter(is_number).map(|entry| entry.path()).collect()
}

/// The state of a process or a thread, and its parent.
fn state(task: &Path) -> Option<(char, u32)> {
    let text = fs::read_to_string(task.join("stat")).ok()?;
    // They follow the name, which may have anything in it.
    let mut fields = text.rsplit(") ").next()?.split(' ');
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn children(of: u32) -> Vec<PathBuf> {
    let is_child = |process: &PathBuf| state(process).is_some_and(|(_, parent)| parent == of);
    numbered(Path::new("/proc")).into_iter().filter(is_child).collect()
}

/// The thread of process `of` or of one of its children that waits for something and can't be killed, if there is one.
fn unkillable(of: u32) -> Option<PathBuf> {
    let processes = children(of).into_iter().chain([PathBuf::from(format!("/proc/{of}"))]);
    let mut threads = processes.flat_map(|process| numbered(&process.join("task")));
    threads.find(|thread| state(thread).is_some_and(|(state, _)| state == 'D'))
}

/// What came to the keeper's socket, or goes from there with `given`.
fn keep(listener: &UnixListener, given: Option<&[OwnedFd]>) -> Vec<OwnedFd> {
    listener.set_nonblocking(true).unwrap();
    let caller = std::cell::OnceCell::new();
    let comes = || listener.accept().is_ok_and(|(socket, _)| caller.set(socket).is_ok());
    assert!(within_seconds(30, comes), "nobody calls the keeper");
    let socket = caller.into_inner().unwrap();
    socket.set_nonblocking(false).unwrap();
    match given {
        Some(given) => {
            send(socket.as_fd(), &(), &given.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
            Vec::new()
        }
        None => receive::<()>(socket.as_fd()).unwrap().unwrap().1,
    }
}

/// A file is mapped that isn't passed through, and a seal waits until the kernel has written back its pages: for writes, that is, which
/// the process doesn't answer any more when it is killed.
struct Fetching {
    server: Server,
    mapper: Mapper,
    kept: Vec<OwnedFd>,
    /// Where the thread that waits is to be seen.
    waits: PathBuf,
    // Ends what hangs, so that the others end too.
    _rescue: Rescue,
}

impl Fetching {
    fn begin(folder: &Path, keeper: Option<&UnixListener>) -> Fetching {
        let mut server = Server::start(folder, None);
        let rescue = Rescue::new(&server.dir);
        fs::write(server.path("mapped"), noise(2 << 20, 1)).unwrap();
        assert!(server.seal("below"));
        let kept = keeper.map_or_else(Vec::new, |keeper| {
            server.tell("keep");
            keep(keeper, None)
        });
        let mut mapper = Mapper::start(&server.path("mapped"));
        mapper.tell("5000 written");
        server.tell("hold");
        assert!(server.hears("held"));
        server.tell("above");
        // One that waits for a disk doesn't for long.
        let process = server.child.id();
        let stays = |thread: PathBuf| {
            let is_there = || unkillable(process).as_ref() == Some(&thread);
            let stays = (0..20).all(|_| {
                std::thread::sleep(Duration::from_millis(10));
                is_there()
            });
            stays.then_some(thread)
        };
        let found = std::cell::OnceCell::new();
        let looks = || unkillable(process).and_then(stays).is_some_and(|thread| found.set(thread).is_ok());
        assert!(within_seconds(30, looks), "nobody waits for pages: nothing is tried");
        Fetching { server, mapper, kept, waits: found.into_inner().unwrap(), _rescue: rescue }
    }

    /// Kills the process that serves the mount.
    fn kill(&mut self) {
        self.server.child.kill().unwrap();
        let child = std::cell::RefCell::new(&mut self.server.child);
        let has_ended = || child.borrow_mut().try_wait().unwrap().is_some();
        assert!(within_seconds(30, has_ended), "the process can't die");
    }

    /// Whether the thread that waited has gone, but for whoever may have to reap it.
    fn has_waited(&self) -> bool {
        within_seconds(30, || state(&self.waits).is_none_or(|(state, _)| state == 'Z'))
    }
}

#[test]
fn who_is_killed_while_a_seal_fetches_pages_dies_and_ends_the_mount() {
    let Some(folder) = folder() else { return };
    let mut fetching = Fetching::begin(folder.path(), None);
    fetching.kill();
    let dir = fetching.server.dir.clone();
    let (send, receive) = channel();
    std::thread::spawn(move || send.send(fs::read_dir(dir).unwrap_err().raw_os_error()));
    let heard = receive.recv_timeout(Duration::from_secs(30));
    // The former if it was asked before the end.
    assert!(matches!(heard, Ok(Some(libc::ECONNABORTED | libc::ENOTCONN))), "the mount hangs: {heard:?}");
    assert!(fetching.has_waited(), "who waited for pages waits still");
    fetching.mapper.end();
}

#[test]
fn who_is_killed_while_a_seal_fetches_pages_leaves_the_mount_to_the_next() {
    let Some(folder) = folder() else { return };
    let keeper = UnixListener::bind(folder.path().join(KEEPER)).unwrap();
    let mut fetching = Fetching::begin(folder.path(), Some(&keeper));
    fetching.kill();
    let mut next = Server::begin(folder.path(), Some((GOES_ON, "1")));
    keep(&keeper, Some(&fetching.kept));
    assert!(next.hears("ready"), "nobody can go on");
    assert!(fetching.has_waited(), "who waited for pages waits still");
    fetching.mapper.tell("9000 more");
    assert!(next.seal("after"));
    let sealed = fs::read(next.path("mapped")).unwrap();
    assert_eq!((&sealed[5000..5007], &sealed[9000..9004]), (&b"written"[..], &b"more"[..]));
    fetching.mapper.end();
    next.kill();
}

#[test]
fn a_helper_serves_as_hand() {
    let Some(folder) = folder() else { return };
    if Place::make().is_err() {
        eprintln!("NOT RUN: a hidden mount can't be had");
        return;
    }
    let mut server = Server::begin(folder.path(), Some((WRITEBACK, "1")));
    assert!(server.hears("ready"));
    let _rescue = Rescue::new(&server.dir);
    fs::write(server.path("large"), noise(2 << 20, 2)).unwrap();
    assert!(server.seal("below") && children(server.child.id()).is_empty());
    let large = OpenOptions::new().read(true).write(true).open(server.path("large")).unwrap();
    assert_eq!(children(server.child.id()).len(), 1, "no hand was started");
    large.write_all_at(b"written", 5000).unwrap();
    large.sync_all().unwrap();
    assert!(server.seal("above"));
    drop(large);
    assert_eq!(fs::read(server.path("large")).unwrap()[5000..5007], *b"written");
    server.kill();
}
