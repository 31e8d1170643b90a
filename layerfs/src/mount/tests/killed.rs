//! `kill -9` of the process that serves a mount, while programs write and at each step of a seal: whatever an
//! operation had answered is there afterwards.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::failpoint;
use crate::mount::{Mount, MountOptions};
use crate::testing::{Spawn, noise};

/// Where the served process finds its folder, and at which step of a seal it dies.
const FOLDER: &str = "LAYERFS_TEST_FOLDER";
const DIES_AT: &str = "LAYERFS_TEST_DIES_AT";

/// Not a test: what the tests below start and kill. It mounts what was mounted, or something new; a line on its
/// standard input makes it seal.
#[test]
#[ignore = "started by other tests"]
fn serve() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let store = Store::open(&folder.join("store"), StoreOptions::create()).unwrap();
    crate::mount::attach(&store).unwrap();
    let mount = match crate::mount::restore(&store, &mut HashMap::new()).unwrap().pop() {
        Some((_, mount)) => mount.unwrap(),
        None => Mount::start(&store, None, "test", &folder.join("mnt"), &MountOptions::default()).unwrap(),
    };
    if let Ok(step) = std::env::var(DIES_AT) {
        assert!(failpoint::arm(&step, 1));
    }
    say("ready");
    for line in std::io::stdin().lines() {
        let name = LayerName::new(line.unwrap().trim()).unwrap();
        let options = SealOptions { name, expect: Expect::Absent, kind: LayerKind::Instance };
        mount.seal(&options, &Silent).unwrap();
        say("sealed");
    }
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
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["mount::tests::killed::serve", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(FOLDER, folder).env_remove(DIES_AT).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.envs(dies_at.map(|step| (DIES_AT, step)));
        let mut child = command.spawn_locked().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut server = Server { child, input, output, dir: folder.join("mnt") };
        assert!(server.hears("ready"), "the process that serves the mount didn't start");
        server
    }

    /// Whether the process says `word` before it ends.
    fn hears(&mut self, word: &str) -> bool {
        let mut lines = (&mut self.output).lines();
        lines.any(|line| line.unwrap().trim() == word)
    }

    fn seal(&mut self, name: &str) -> bool {
        writeln!(self.input, "{name}").unwrap();
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
