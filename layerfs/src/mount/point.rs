//! Mount points on the host: making sure that one is fit, unmounting, syncing.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags, fsconfig_create, fsmount, fsopen};

use crate::error::{Error, Result};

/// The absolute path of the folder `dir`. Mounts on it whose daemon is gone are taken away first.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Invalid`] if it is no folder.
pub(super) fn prepare(dir: &Path) -> Result<PathBuf> {
    let missing = || Error::NotFound { what: "folder", name: dir.display().to_string() };
    // Its parent, not itself: a dead mount can't be looked into.
    let dir = match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            parent.canonicalize().map_err(|_| missing())?.join(name)
        }
        _ => dir.canonicalize().map_err(|_| missing())?,
    };
    // More than one may lie on top of each other; more than that is something else.
    for _ in 0..16 {
        // Not `stat`: the kernel would answer that from its cache, for a dead mount too.
        match rustix::fs::statfs(&dir) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => {
                tracing::info!(dir = %dir.display(), "taking away a mount whose daemon is gone");
                unmount(&dir, true)?;
                continue;
            }
            Err(Errno::NOENT) => return Err(missing()),
            Err(errno) => return Err(Error::file("look at", &dir, errno)),
            Ok(_) => {}
        }
        let dir = dir.canonicalize().map_err(|e| Error::file("look at", &dir, e))?;
        if !dir.is_dir() {
            return Err(Error::invalid(format!("{} is not a folder", dir.display())));
        }
        if is_layerfs(&dir) {
            let text = format!("a layerfs is mounted on {} already; unmount it first", dir.display());
            return Err(Error::Busy(text));
        }
        return Ok(dir);
    }
    Err(Error::Busy(format!("the mounts on {} can't be taken away", dir.display())))
}

/// Whether a layerfs is mounted on `dir` itself.
fn is_layerfs(dir: &Path) -> bool {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let is_there = fields.nth(4).is_some_and(|point| unescape(point) == dir.as_os_str().as_bytes());
        is_there && fields.skip_while(|field| *field != b"-").nth(1) == Some(b"fuse.layerfs")
    })
}

/// Whether the filesystem with this device number is mounted somewhere, as this process sees it. Asks nothing of the filesystem.
pub(super) fn is_mounted(device: u64) -> bool {
    std::fs::read("/proc/self/mountinfo").map_or(true, |table| mounts(&table, device))
}

/// Whether a table of mounts has the filesystem with this device number.
fn mounts(table: &[u8], device: u64) -> bool {
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let mut lines = table.split(|byte| *byte == b'\n');
    lines.any(|line| line.split(|byte| *byte == b' ').nth(2) == Some(number.as_bytes()))
}

/// The processes in whose mount namespaces that filesystem is mounted, as far as this user may see them.
pub(super) fn processes(device: u64) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| std::fs::read(format!("/proc/{pid}/mountinfo")).is_ok_and(|table| mounts(&table, device)))
        .collect()
}

/// Ends the kernel's connection for the filesystem with this device number, wherever it is mounted.
///
/// # Errors
/// [`Error::Denied`] for an ordinary user.
pub(super) fn end_everywhere(device: u64) -> Result<()> {
    // Connections are files of a filesystem of their own, which is shown to nobody here.
    let end = || -> rustix::io::Result<()> {
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        let all = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let name = format!("{}/abort", libc::minor(device));
        let abort = rustix::fs::openat(&all, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&abort, b"1").map(drop)
    };
    match end() {
        // It has ended by itself.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::PERM | Errno::ACCESS) => {
            Err(Error::Denied("only root may end a mount that other mount namespaces have copies of".to_owned()))
        }
        Err(errno) => Err(Error::io("ending a mount everywhere", errno)),
    }
}

/// A field of `mountinfo`: space, tab, newline and backslash stand there as `\ooo`.
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal =
            (*first == b'\\').then(|| tail.get(..3)).flatten().and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Unmounts `dir`; with `lazy`, even if it is in use.
pub(super) fn unmount(dir: &Path, lazy: bool) -> Result<()> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() } | UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(dir, flags) {
        Ok(()) => Ok(()),
        // It isn't mounted (any more).
        Err(Errno::INVAL) => Ok(()),
        Err(Errno::BUSY) => Err(Error::Busy(format!(
            "{} is in use; leave it, or unmount it lazily (`layerctl umount --lazy`)",
            dir.display()
        ))),
        Err(Errno::PERM) => unmount_by_helper(dir, lazy),
        Err(errno) => Err(Error::file("unmount", dir, errno)),
    }
}

fn unmount_by_helper(dir: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.args(if lazy { &["-u", "-q", "-z"][..] } else { &["-u", "-q"][..] }).arg("--").arg(dir);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(Error::Busy(format!("fusermount3 could not unmount {}; is it in use?", dir.display()))),
        Err(e) => Err(Error::file("run fusermount3 to unmount", dir, e)),
    }
}

/// The device number of the mount on `dir`.
pub(super) fn device(dir: &Path) -> Option<u64> {
    std::fs::metadata(dir).ok().map(|found| found.dev())
}

/// Makes the kernel begin to send what programs wrote through mappings. A mount that can't be reached by its path any more
/// has been left by them.
pub(super) fn sync(dir: &Path, device: Option<u64>) {
    let Ok(folder) = std::fs::File::open(dir) else { return };
    if folder.metadata().ok().map(|found| found.dev()) == device
        && let Err(errno) = rustix::fs::syncfs(&folder)
    {
        tracing::warn!(dir = %dir.display(), %errno, "cannot sync a mount");
    }
}

/// How far ahead the kernel reads, in KiB: cold data should come in large pieces. Only the superuser may set it.
pub(super) const READ_AHEAD_KIB: u32 = 1024;
/// The same where files are read here and there: a piece that lies in one chunk, as a rule.
pub(super) const SCATTERED_KIB: u32 = 16;

pub(super) fn set_read_ahead(device: Option<u64>, kib: u32) {
    let Some(device) = device else { return };
    let (major, minor) = (libc::major(device), libc::minor(device));
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        tracing::debug!(path, %error, "cannot set how far the kernel reads ahead");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(b"/a\\040b\\134c\\"), b"/a b\\c\\");
    }
}
