//! Starting a guest's first process, in a program of its own: namespaces can't be entered by a daemon with threads.
//!
//! ```text
//! daemon ──guest-launch──▶ outside: namespaces ──▶ inside: pid 1, mounts, new root ──exec──▶ the guest's program
//! ```
//!
//! The orders come as JSON on standard input. Hides what CRIU wants of a guest that it shall dump: a session of its own,
//! standard streams that were opened inside, no other open files, `lo` up. Invariants: when the outer stage ends well,
//! the guest's program has been executed; when it doesn't, nothing of it is left; what of it there is, is in its pidfile.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, Mode};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::programs;

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Orders {
    /// Start a guest: make its namespaces, and go inside.
    Start(Start),
    /// Be its first process. Only the outer stage orders this.
    Inside(Start),
    /// Run a program with mounts of its own.
    Private(Private),
}

/// A guest to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Its root, which is a mount.
    pub root: PathBuf,
    /// Its program and the arguments.
    pub command: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// Its working folder.
    pub folder: PathBuf,
    /// The name that it sees as its host's.
    pub hostname: String,
    /// Where its output goes, in it.
    pub log: Option<PathBuf>,
    /// The network namespace that it gets; a new one if none.
    pub network: Option<PathBuf>,
    /// Where the number of its first process is written before that does anything.
    pub pidfile: PathBuf,
}

/// A program to run with mounts of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Private {
    /// A mount that becomes one of the program's own.
    pub root: PathBuf,
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// A file that the program gets open, as its standard input.
    pub input: Option<PathBuf>,
}

type Outcome<T> = Result<T, String>;

fn failed<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> String + '_ {
    move |error| format!("cannot {what}: {error}")
}

/// Takes orders from `input` and obeys. Returns what to print: the number of the guest's first process.
///
/// # Errors
/// What went wrong, in words.
pub fn main(input: impl Read) -> Outcome<Option<u32>> {
    close_others();
    match serde_json::from_reader(input).map_err(failed("understand the orders"))? {
        Orders::Start(start) => outside(start).map(Some),
        Orders::Inside(start) => Err(inside(&start)),
        Orders::Private(private) => Err(private_mounts(&private)),
    }
}

fn outside(start: Start) -> Outcome<u32> {
    if let Some(network) = &start.network {
        let namespace = File::open(network).map_err(failed("open the guest's network"))?;
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(failed("enter the guest's network"))?;
    } else {
        unshare(UnshareFlags::NEWNET)?;
        // Before the process namespace: the first process in that is to be the guest's.
        programs::run(Command::new("ip").args(["link", "set", "lo", "up"])).map_err(failed("set lo up"))?;
    }
    unshare(UnshareFlags::NEWPID | UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC)?;
    // Not by its path, which another root's mounts hide, or an upgrade.
    let mut child = Command::new("/proc/self/exe")
        .arg("guest-launch")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed("start the guest's first process"))?;
    // It waits for its orders.
    let noted = std::fs::write(&start.pidfile, child.id().to_string());
    if let Err(error) = noted {
        drop(child.stdin.take());
        let _ = child.wait();
        return Err(failed("note the guest's first process")(error));
    }
    let orders = serde_json::to_vec(&Orders::Inside(start)).map_err(failed("write the orders"))?;
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(&orders).map_err(failed("write the orders"))?;
    }
    let mut said = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        // Ends when the guest's program is executed, or with the last words of a failure.
        pipe.read_to_string(&mut said).map_err(failed("hear the guest's first process"))?;
    }
    if said.trim().is_empty() {
        return Ok(child.id());
    }
    let _ = child.wait();
    // The same program says it, and says again whose words these are.
    Err(said.trim().trim_start_matches("layerctl: ").to_owned())
}

/// Only what is wrong comes back.
fn inside(start: &Start) -> String {
    match enter(start) {
        Ok(never) => never,
        Err(error) => error,
    }
}

fn enter(start: &Start) -> Outcome<String> {
    rustix::process::setsid().map_err(failed("begin a session"))?;
    rustix::system::sethostname(start.hostname.as_bytes()).map_err(failed("set the host's name"))?;
    own_mounts(&start.root)?;
    std::env::set_current_dir(&start.root).map_err(failed("enter the guest's root"))?;
    // The old root comes to lie on the new one, and is taken off.
    rustix::process::pivot_root(".", ".").map_err(failed("change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("leave the old root"))?;
    std::env::set_current_dir("/").map_err(failed("enter the guest's root"))?;
    usual_mounts()?;
    let entered = std::env::set_current_dir(&start.folder);
    entered.map_err(failed(&format!("enter the guest's working folder {}", start.folder.display())))?;
    let null = || File::options().read(true).write(true).open("/dev/null").map_err(failed("open /dev/null"));
    let output = match &start.log {
        None => null()?,
        Some(log) => File::options()
            .append(true)
            .create(true)
            .open(log)
            .map_err(failed(&format!("open the guest's log {}", log.display())))?,
    };
    // What tells of a failure survives until the program is executed, and no longer.
    let report: OwnedFd = io::stderr().as_fd().try_clone_to_owned().map_err(failed("keep the report"))?;
    let errors = output.try_clone().map_err(failed("open the guest's log"))?;
    let (program, arguments) = start.command.split_first().ok_or("the guest has no command")?;
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(&start.env)
        .stdin(null()?)
        .stdout(output)
        .stderr(errors)
        .exec();
    let _ = writeln!(File::from(report), "cannot execute {program} in the guest: {error}");
    // The standard streams are the guest's by now, so this is seen by nobody.
    Ok(String::new())
}

/// Nothing that is mounted here from now on is seen elsewhere, and `root` is a mount.
fn own_mounts(root: &Path) -> Outcome<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("have mounts of its own"))?;
    rustix::mount::mount_bind_recursive(root, root).map_err(failed("bind the root"))
}

fn usual_mounts() -> Outcome<()> {
    let folder = |path: &str, mode: u32| match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(format!("cannot make {path} in the guest: {error}")),
    };
    let mount = |kind: &str, path: &str, flags: MountFlags, data: &str| {
        let data = std::ffi::CString::new(data).unwrap_or_default();
        let data = (!data.is_empty()).then_some(data.as_c_str());
        rustix::mount::mount(kind, path, kind, flags, data).map_err(|error| format!("cannot mount {path}: {error}"))
    };
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (path, mode) in [("/proc", 0o555), ("/sys", 0o555), ("/dev", 0o755), ("/tmp", 0o1777)] {
        folder(path, mode)?;
    }
    mount("proc", "/proc", strict, "")?;
    mount("sysfs", "/sys", strict | MountFlags::RDONLY, "")?;
    mount("tmpfs", "/dev", MountFlags::NOSUID, "mode=755,size=64k")?;
    for (name, major, minor) in [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)] {
        let path = format!("/dev/{name}");
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
            .and_then(|()| rustix::fs::chmod(&path, Mode::from_raw_mode(0o666)))
            .map_err(|error| format!("cannot make {path} in the guest: {error}"))?;
    }
    for (target, path) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        std::os::unix::fs::symlink(target, path).map_err(|error| format!("cannot make {path}: {error}"))?;
    }
    folder("/dev/shm", 0o1777)?;
    mount("tmpfs", "/dev/shm", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")
}

/// Only what is wrong comes back.
fn private_mounts(private: &Private) -> String {
    let prepare = || -> Outcome<Command> {
        unshare(UnshareFlags::NEWNS)?;
        own_mounts(&private.root)?;
        let (program, arguments) = private.command.split_first().ok_or("there is no program to run")?;
        let input = match &private.input {
            Some(path) => Stdio::from(File::open(path).map_err(failed("open the guest's network"))?),
            None => Stdio::null(),
        };
        let mut command = Command::new(program);
        command.args(arguments).stdin(input);
        Ok(command)
    };
    match prepare() {
        Ok(mut command) => {
            let error = command.exec();
            format!("cannot execute {}: {error}", command.get_program().to_string_lossy())
        }
        Err(error) => error,
    }
}

/// Lets no file that this process was given stay open in what it executes: CRIU couldn't find it again.
fn close_others() {
    // SAFETY: only marks descriptors; none is closed while this program runs.
    #[allow(unsafe_code)]
    let marked = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    if marked != 0 {
        tracing::debug!("descriptors could not be marked: {}", io::Error::last_os_error());
    }
}

fn unshare(flags: UnshareFlags) -> Outcome<()> {
    // SAFETY: this process has one thread, and nothing in it relies on sharing what is unshared: not its open files.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(flags) };
    unshared.map_err(failed("make the guest's namespaces"))
}
