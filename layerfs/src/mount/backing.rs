//! Telling the kernel of data files that it may read and write without asking.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::fs::Backings;
use crate::upper::opens::Backing;

const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;

/// So many numbers below the newest may be those of requests that were being answered when a daemon died.
const NEWEST: u32 = 1024;

/// The argument of [`BACKING_OPEN`].
#[repr(C)]
struct BackingMap {
    descriptor: i32,
    flags: u32,
    padding: u64,
}

/// The backings of one mount.
#[derive(Debug)]
pub(super) struct Device {
    device: OwnedFd,
    /// Once the kernel has refused for want of rights, it isn't asked again.
    is_refused: AtomicBool,
}

impl Device {
    /// Those of the mount that `device` is the other end of.
    pub fn new(device: OwnedFd) -> Device {
        Device { device, is_refused: AtomicBool::new(false) }
    }

    pub(super) fn strike_out(&self, backing: Backing) -> std::io::Result<()> {
        // SAFETY: the request reads the number that its argument points to.
        #[allow(unsafe_code)]
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), BACKING_CLOSE, &raw const backing.0) };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Backings for Device {
    fn open(&self, file: &File) -> std::io::Result<Backing> {
        if self.is_refused.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        self.open_named(file).inspect_err(|error| {
            if !self.is_refused.swap(true, Ordering::Relaxed) {
                tracing::info!(%error, "files are not passed through; they are read and written by way of the daemon");
            }
        })
    }

    fn open_named(&self, file: &File) -> std::io::Result<Backing> {
        let map = BackingMap { descriptor: file.as_raw_fd(), flags: 0, padding: 0 };
        // SAFETY: the request reads its argument, which is as long as it says.
        #[allow(unsafe_code)]
        let number = unsafe { libc::ioctl(self.device.as_raw_fd(), BACKING_OPEN, &raw const map) };
        if number > 0 {
            return Ok(Backing(number as u32));
        }
        Err(std::io::Error::last_os_error())
    }

    fn close(&self, backing: Backing) {
        if let Err(error) = self.strike_out(backing) {
            tracing::debug!(backing = backing.0, %error, "the kernel has no such backing");
        }
    }

    fn close_leftovers(&self, recorded: &[Backing]) {
        // The kernel counts on: a new one has the newest number.
        let file = rustix::fs::memfd_create("newest", rustix::fs::MemfdFlags::CLOEXEC).map(File::from);
        let newest = file.map_err(std::io::Error::from).and_then(|file| self.open_named(&file));
        let Ok(newest) = newest else { return };
        let is_left = |number: &u32| !recorded.contains(&Backing(*number));
        let numbers = (newest.0.saturating_sub(NEWEST).max(1)..=newest.0).filter(is_left);
        let count = numbers.filter(|number| self.strike_out(Backing(*number)).is_ok()).count().saturating_sub(1);
        if count > 0 {
            tracing::debug!(count, "struck out files that a daemon which died had passed through last");
        }
    }
}
