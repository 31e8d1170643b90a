//! The hidden mount as the kernel sees it: a FUSE filesystem with the writeback cache, in no folder.
//!
//! Hides how such a mount is made and greeted. It is never attached: no path leads there, no table of mounts shows it, and it ends
//! with the last descriptor. Invariant: it passes nothing through itself, so that files of another mount can be passed through
//! to it.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use super::DATA_BYTES;
use crate::mount::abi::{self, HEADER_BYTES};

const INIT: u32 = 26;
const MAJOR: u32 = 7;
/// The version of the kernel's interface that is spoken. Newer kernels speak it too.
const MINOR: u32 = 40;
const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIRECT: u32 = 1 << 15;
const WRITEBACK_CACHE: u32 = 1 << 16;
const MAX_PAGES: u32 = 1 << 22;
/// [`DATA_BYTES`] as an option has it.
const MOST: &str = "262144";
const PAGES: u16 = (DATA_BYTES / 4096) as u16;
const BACKGROUND: u16 = 64;
/// How far ahead the kernel reads, in KiB.
const READ_AHEAD: &str = "1024";

/// The two ends of a hidden mount.
#[derive(Debug)]
pub(in crate::mount) struct Place {
    pub device: OwnedFd,
    pub root: OwnedFd,
}

impl Place {
    /// Makes one, and says hello to the kernel.
    ///
    /// # Errors
    /// Without the superuser's rights, on kernels without detached mounts, and where the limits of a FUSE filesystem's dirty pages
    /// can't be lifted, with which nothing is gained.
    pub fn make() -> Result<Place> {
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let number = device.as_raw_fd().to_string();
        let options = [
            ("source", "layerfs"),
            ("fd", number.as_str()),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
            ("max_read", MOST),
        ];
        for (key, value) in options {
            fsconfig_set_string(context.as_fd(), key, value)?;
        }
        fsconfig_set_flag(context.as_fd(), "allow_other")?;
        fsconfig_create(context.as_fd())?;
        let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)?;
        greet(&device)?;
        lift_limits(root.as_fd())?;
        Ok(Place { device, root })
    }
}

/// Answers the kernel's first request.
fn greet(device: &OwnedFd) -> Result<()> {
    let mut request = vec![0; DATA_BYTES + 4096];
    let bytes = rustix::io::read(device, &mut request)?;
    let short = |_| Error::from(ErrorKind::InvalidData);
    let request = &request[..bytes];
    let offered = abi::word(request, HEADER_BYTES + 12).map_err(short)?;
    let wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIRECT | WRITEBACK_CACHE | MAX_PAGES;
    if abi::word(request, 4).map_err(short)? != INIT || offered & wanted != wanted {
        return Err(ErrorKind::Unsupported.into());
    }
    let mut answer = Vec::with_capacity(64);
    for word in [MAJOR, MINOR, DATA_BYTES as u32, wanted] {
        answer.extend_from_slice(&word.to_ne_bytes());
    }
    for half in [BACKGROUND, BACKGROUND / 4 * 3] {
        answer.extend_from_slice(&half.to_ne_bytes());
    }
    answer.extend_from_slice(&(DATA_BYTES as u32).to_ne_bytes());
    answer.extend_from_slice(&1u32.to_ne_bytes());
    answer.extend_from_slice(&PAGES.to_ne_bytes());
    answer.resize(64, 0);
    let header = abi::answer_header(abi::long(request, 8).map_err(short)?, 0, answer.len());
    rustix::io::write(device, &[&header[..], &answer].concat())?;
    Ok(())
}

/// Lets the mount have as many dirty pages as any filesystem: of FUSE the kernel trusts nobody with more than a hundredth.
fn lift_limits(root: BorrowedFd<'_>) -> Result<()> {
    // Without asking the filesystem, which nobody serves yet.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(root, "", flags, StatxFlags::empty())?;
    let folder = format!("/sys/class/bdi/{}:{}", found.stx_dev_major, found.stx_dev_minor);
    for (name, value) in [("strict_limit", "0"), ("max_ratio", "100"), ("read_ahead_kb", READ_AHEAD)] {
        std::fs::write(format!("{folder}/{name}"), value)?;
    }
    Ok(())
}
