//! The one place where this crate's errors become what a program on a mount sees.

use crate::error::{Error, io_errno};

/// An error number of Linux.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl Errno {
    /// Whether the disk is full, or what somebody may take of it.
    pub fn is_no_space(self) -> bool {
        self.0 == libc::ENOSPC || self.0 == libc::EDQUOT
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Errno {
        let errno = error.errno();
        match errno {
            // What a program does wrong, or the disk's owner: they learn it from the number.
            libc::ENOSPC | libc::EDQUOT | libc::ENXIO | libc::EFBIG | libc::EINVAL | libc::EOPNOTSUPP => {}
            _ => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(%error, cause, "a request on a mount failed");
            }
        }
        // A store that is damaged must not look like a file that isn't there.
        if errno == libc::ENOENT || errno == libc::EEXIST { Errno(libc::EIO) } else { Errno(errno) }
    }
}

impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        Errno(io_errno(&error))
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

/// The result of an operation of the filesystem.
pub type FsResult<T> = Result<T, Errno>;

/// Fails with `errno`.
pub fn fail<T>(errno: i32) -> FsResult<T> {
    Err(Errno(errno))
}
