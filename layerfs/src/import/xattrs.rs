//! Reads extended attributes of the host's files, in one system call for a file that has none.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;

use crate::attr::{MAX_XATTR_VALUE, Xattrs};

/// Where a file is found again.
#[derive(Clone, Copy)]
enum At<'a> {
    Open(BorrowedFd<'a>),
    Path(&'a CStr),
}

impl At<'_> {
    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            At::Open(fd) => rustix::fs::flistxattr(fd, buffer),
            At::Path(path) => rustix::fs::llistxattr(*path, buffer),
        }
    }

    fn get(&self, name: &CStr, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            At::Open(fd) => rustix::fs::fgetxattr(fd, name, buffer),
            At::Path(path) => rustix::fs::lgetxattr(*path, name, buffer),
        }
    }
}

/// Reads extended attributes, with buffers that serve for many files.
#[derive(Debug, Default)]
pub(super) struct Reader {
    names: Vec<u8>,
    value: Vec<u8>,
    path: Vec<u8>,
}

impl Reader {
    /// Those of the open file `fd`.
    pub fn of_open(&mut self, fd: BorrowedFd<'_>) -> rustix::io::Result<Xattrs> {
        self.read(At::Open(fd))
    }

    /// Those of `name` in the open folder `folder`, without following a symbolic link. Needs /proc, else
    /// [`Errno::NOENT`].
    pub fn of_name(&mut self, folder: RawFd, name: &[u8]) -> rustix::io::Result<Xattrs> {
        let mut path = std::mem::take(&mut self.path);
        path.clear();
        path.extend_from_slice(format!("/proc/self/fd/{folder}/").as_bytes());
        path.extend_from_slice(name);
        path.push(0);
        let result = match CStr::from_bytes_with_nul(&path) {
            Ok(path) => self.read(At::Path(path)),
            Err(_) => Err(Errno::INVAL),
        };
        self.path = path;
        result
    }

    /// Those of the file at `path`, without following a symbolic link.
    pub fn of_path(&mut self, path: &Path) -> rustix::io::Result<Xattrs> {
        let mut bytes = path.as_os_str().as_bytes().to_vec();
        bytes.push(0);
        self.read(At::Path(CStr::from_bytes_with_nul(&bytes).map_err(|_| Errno::INVAL)?))
    }

    fn read(&mut self, at: At<'_>) -> rustix::io::Result<Xattrs> {
        self.names.resize(64 * 1024, 0);
        let count = match at.list(&mut self.names) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
            Ok(count) => count,
            Err(e) => return Err(e),
        };
        self.value.resize(MAX_XATTR_VALUE, 0);
        let mut xattrs = Xattrs::new();
        for name in self.names[..count].split_inclusive(|byte| *byte == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            match at.get(name, &mut self.value) {
                Ok(count) => xattrs.push((name.to_bytes().to_vec(), self.value[..count].to_vec())),
                // Removed since, or not for everybody's eyes.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }
}
