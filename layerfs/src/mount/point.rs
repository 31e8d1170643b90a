//! Mount points on the host: making sure that one is fit, unmounting, syncing.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create, fsmount, fsopen,
};

use super::descriptor;
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

/// A line of a table of mounts.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    dir: Vec<u8>,
    device: u64,
    is_layerfs: bool,
}

/// The mounts of this process's namespace: of those on one folder the uppermost last. None if that can't be read.
fn seen() -> Option<Vec<Listed>> {
    Some(list(&std::fs::read("/proc/self/mountinfo").ok()?))
}

fn list(table: &[u8]) -> Vec<Listed> {
    table.split(|byte| *byte == b'\n').filter_map(listed).collect()
}

fn listed(line: &[u8]) -> Option<Listed> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let device = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
    let dir = unescape(fields.nth(1)?);
    let is_layerfs = fields.skip_while(|field| *field != b"-").nth(1) == Some(b"fuse.layerfs");
    Some(Listed { dir, device, is_layerfs })
}

impl Listed {
    fn is_on(&self, dir: &Path) -> bool {
        self.dir == dir.as_os_str().as_bytes()
    }

    /// Numbers are used again: by other filesystems too.
    fn is_of(&self, device: u64) -> bool {
        self.is_layerfs && self.device == device
    }
}

/// Whether a layerfs is mounted on `dir` itself.
pub(super) fn is_layerfs(dir: &Path) -> bool {
    device(dir).is_some()
}

/// The device number of the layerfs on `dir`. Asks nothing of the filesystem.
pub(super) fn device(dir: &Path) -> Option<u64> {
    let mut seen = seen()?.into_iter().rev();
    seen.find(|mount| mount.is_layerfs && mount.is_on(dir)).map(|mount| mount.device)
}

/// Where the layerfs with this device number is mounted, as this process sees it; none if that isn't known.
pub(super) fn places(device: u64) -> Option<Vec<PathBuf>> {
    let ours = seen()?.into_iter().filter(|mount| mount.is_of(device));
    Some(ours.map(|mount| PathBuf::from(OsString::from_vec(mount.dir))).collect())
}

/// The processes in whose mount namespaces it is mounted, as far as this user may see them.
pub(super) fn processes(device: u64) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_there = |table: Vec<u8>| list(&table).iter().any(|mount| mount.is_of(device));
    pids.filter(|pid| std::fs::read(format!("/proc/{pid}/mountinfo")).is_ok_and(is_there)).collect()
}

/// Ends the connection of `device`, which has this device number, as [`end_everywhere`] does; also for the user who mounted it, where the
/// system shows connections. Returns whether it has ended.
pub(super) fn cut(device: BorrowedFd<'_>, number: u64) -> bool {
    // While it has not, nothing else has the number.
    if descriptor::has_ended(device).unwrap_or(false) {
        return true;
    }
    let abort = format!("/sys/fs/fuse/connections/{}/abort", libc::minor(number));
    end_everywhere(number).is_ok() || std::fs::write(abort, "1").is_ok()
}

/// Ends the kernel's connection for the filesystem with this device number, wherever it is mounted. False if there is no such
/// connection.
///
/// # Errors
/// [`Error::Denied`] for an ordinary user; [`Error::Invalid`] if that is no number of a FUSE filesystem.
pub(super) fn end_everywhere(device: u64) -> Result<bool> {
    if libc::major(device) != 0 {
        let (major, minor) = (libc::major(device), libc::minor(device));
        return Err(Error::invalid(format!("{major}:{minor} is a disk, not a mount of layerfs")));
    }
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
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
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

/// Unmounts the layerfs with this device number from `dir`, if it lies there; with `lazy`, even if it is in use.
///
/// # Errors
/// [`Error::Busy`] if it is in use; [`Error::Invalid`] if something else lies over it.
pub(super) fn unmount_own(dir: &Path, device: Option<u64>, lazy: bool) -> Result<()> {
    let Some(seen) = seen() else { return unmount(dir, lazy) };
    let is_ours = |mount: &Listed| device.map_or(mount.is_layerfs, |device| mount.is_of(device));
    let here: Vec<Listed> = seen.into_iter().filter(|mount| mount.is_on(dir)).collect();
    match here.last() {
        Some(top) if is_ours(top) => unmount(dir, lazy),
        Some(_) if here.iter().any(is_ours) => {
            Err(Error::invalid(format!("something else is mounted over {}; unmount that first", dir.display())))
        }
        _ => Ok(()),
    }
}

/// Unmounts `dir`, whatever lies there; with `lazy`, even if it is in use.
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

/// Sets what the kernel keeps of the mount of the layerfs with this device number on `dir`: all of it but how times of access are
/// kept, which stays if nothing is said of it.
///
/// # Errors
/// [`Error::Invalid`] if it doesn't lie there, or something else lies over it; [`Error::File`]: only root may.
pub(super) fn set_flags(dir: &Path, device: Option<u64>, flags: MountFlags) -> Result<()> {
    let is_ours = |mount: &Listed| device.map_or(mount.is_layerfs, |device| mount.is_of(device));
    let top = seen().and_then(|seen| seen.into_iter().rfind(|mount| mount.is_on(dir)));
    if !top.as_ref().is_some_and(is_ours) {
        return Err(Error::invalid(format!("what lies on {} is not this mount", dir.display())));
    }
    let set = rustix::mount::mount_remount(dir, flags | MountFlags::BIND, "");
    set.map_err(|errno| Error::file("set the mount options of", dir, errno))
}

/// Makes the kernel begin to send what programs wrote through mappings. A mount that can't be reached by its path any more
/// has been left by them. Asks the filesystem, and may wait until it has answered all of that.
pub(super) fn sync(dir: &Path, device: Option<u64>) -> std::io::Result<()> {
    let folder = match std::fs::File::open(dir) {
        Ok(folder) if folder.metadata().ok().map(|found| found.dev()) == device => folder,
        _ => return Ok(()),
    };
    Ok(rustix::fs::syncfs(&folder)?)
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

    #[test]
    fn tables_of_mounts_are_read() {
        let table = b"36 35 8:1 / /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
            90 36 0:45 / /mnt/a\\040b rw - fuse.layerfs base rw,user_id=0\n\
            91 90 0:45 /sub / rw shared:2 master:1 - tmpfs fuse.layerfs rw\nrubbish\n";
        let line = |dir: &[u8], device, is_layerfs| Listed { dir: dir.to_vec(), device, is_layerfs };
        let (disk, number) = (libc::makedev(8, 1), libc::makedev(0, 45));
        let lines = [line(b"/mnt", disk, false), line(b"/mnt/a b", number, true), line(b"/", number, false)];
        assert_eq!(list(table), lines);
        assert!(lines[1].is_of(number) && !lines[2].is_of(number), "a number that is used again");
    }

    #[test]
    fn what_is_on_a_disk_is_not_ended() {
        assert!(matches!(end_everywhere(libc::makedev(8, 1)), Err(Error::Invalid(_))));
    }
}
