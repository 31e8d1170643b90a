//! What an inode is and carries besides its data: kind, mode, owner, times, extended attributes.

use serde::{Deserialize, Serialize};

/// The kind of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum FileKind {
    /// A regular file.
    File = 1,
    /// A folder.
    Folder = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A block device.
    BlockDevice = 4,
    /// A character device.
    CharDevice = 5,
    /// A named pipe.
    Fifo = 6,
    /// A socket.
    Socket = 7,
}

impl FileKind {
    /// The kind with code `code` (FORMAT.md, "Dentry records").
    pub fn from_code(code: u8) -> Option<FileKind> {
        use FileKind::*;
        const KINDS: [FileKind; 7] = [File, Folder, Symlink, BlockDevice, CharDevice, Fifo, Socket];
        KINDS.get(usize::from(code).checked_sub(1)?).copied()
    }

    /// The kind in the `S_IFMT` bits of `mode`.
    pub fn from_mode(mode: u32) -> Option<FileKind> {
        match mode & libc::S_IFMT {
            libc::S_IFREG => Some(FileKind::File),
            libc::S_IFDIR => Some(FileKind::Folder),
            libc::S_IFLNK => Some(FileKind::Symlink),
            libc::S_IFBLK => Some(FileKind::BlockDevice),
            libc::S_IFCHR => Some(FileKind::CharDevice),
            libc::S_IFIFO => Some(FileKind::Fifo),
            libc::S_IFSOCK => Some(FileKind::Socket),
            _ => None,
        }
    }

    /// The `S_IFMT` bits of this kind.
    pub fn type_bits(self) -> u32 {
        match self {
            FileKind::File => libc::S_IFREG,
            FileKind::Folder => libc::S_IFDIR,
            FileKind::Symlink => libc::S_IFLNK,
            FileKind::BlockDevice => libc::S_IFBLK,
            FileKind::CharDevice => libc::S_IFCHR,
            FileKind::Fifo => libc::S_IFIFO,
            FileKind::Socket => libc::S_IFSOCK,
        }
    }
}

/// A point in time: seconds since the epoch (may be negative) and nanoseconds (0 to 999,999,999).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

impl Time {
    /// The current time.
    pub fn now() -> Time {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Time { seconds: now.tv_sec, nanos: now.tv_nsec as u32 }
    }

    /// The time of the kernel's last tick, which is what the host's filesystem notes as time of a change at the earliest.
    pub fn of_last_tick() -> Time {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        Time { seconds: now.tv_sec, nanos: now.tv_nsec as u32 }
    }
}

/// The attributes of an inode, without its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attrs {
    /// Permission bits, with setuid, setgid and sticky: `mode & 0o7777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access, as far as it was set.
    pub atime: Time,
    /// Last change of the data.
    pub mtime: Time,
    /// Last change of the inode. On import it is the mtime: it can't be set on any host, and an import has to be
    /// reproducible.
    pub ctime: Time,
}

impl Attrs {
    /// Attributes of something imported: all times are `mtime`.
    pub fn imported(mode: u32, uid: u32, gid: u32, mtime: Time) -> Attrs {
        Attrs { permissions: (mode & 0o7777) as u16, uid, gid, atime: mtime, mtime, ctime: mtime }
    }
}

/// Extended attributes: full name (with its namespace) and value, sorted by name, no name twice.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// The extended attribute that holds the access control list that is checked.
pub const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
/// The extended attribute of a folder that holds the list that its new entries get.
pub const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// The longest name of an extended attribute, in bytes (Linux's limit).
pub const MAX_XATTR_NAME: usize = 255;
/// The longest value of an extended attribute, in bytes (Linux's limit).
pub const MAX_XATTR_VALUE: usize = 65536;
/// The longest file name, in bytes (Linux's limit).
pub const MAX_NAME: usize = 255;
/// The longest target of a symbolic link, in bytes (Linux's limit).
pub const MAX_SYMLINK: usize = 4095;

/// Whether `name` may stand in a folder: 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
pub fn is_valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| *b == b'/' || *b == 0)
}
