//! The one error type of this crate: what failed, on what, and what the user can do.
//!
//! Invariants: a message never repeats its source's text; it is lower case without a full stop. Each error
//! has an [`ErrorClass`], which the command line turns into its exit code, and an errno for the mount.

use std::io;
use std::path::{Path, PathBuf};

use crate::id::{ChunkId, LayerId};

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is; exit codes and HTTP statuses derive from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorClass {
    /// The request is wrong: a bad argument, a malformed archive.
    Invalid,
    /// A name, path, layer or chunk that is asked for is not there.
    NotFound,
    /// A name or folder is taken.
    Exists,
    /// Something uses what would have to change.
    Busy,
    /// Stored or received bytes are damaged.
    Corrupt,
    /// The store or a peer speaks a version that this program doesn't, or the machine lacks what was asked for.
    Unsupported,
    /// No space, or quota exceeded.
    NoSpace,
    /// Not allowed: file permissions, a read-only disk, a peer's rights.
    Denied,
    /// The link or the peer failed.
    Network,
    /// The operating system failed in another way.
    Io,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation on a file failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// The verb: "open", "write", "sync".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// An operation without a path of its own failed.
    #[error("{action} failed")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The index database failed.
    #[error("the index database failed: {0}")]
    Index(String),
    /// A disk is full but for what is kept on it.
    #[error(
        "no space: {free} bytes are free on the disk of {path}, and {kept} are kept so that something can be removed",
        path = path.display()
    )]
    Full {
        /// Where something was to be written.
        path: PathBuf,
        /// How many bytes are free.
        free: u64,
        /// How many stay so.
        kept: u64,
    },
    /// The argument or the input is not acceptable.
    #[error("{0}")]
    Invalid(String),
    /// What was asked for isn't there.
    #[error("{what} {name:?} not found")]
    NotFound {
        /// "layer", "path", "peer".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// None of what there is is what was asked for; says what there is.
    #[error("{0}")]
    NoneFits(String),
    /// A name is taken.
    #[error("{what} {name:?} exists already; choose another name or remove it first")]
    Exists {
        /// "layer", "peer".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Something is in use.
    #[error("{0}")]
    Busy(String),
    /// A chunk that a manifest needs is in no pack.
    #[error("chunk {0} is missing from the store; `layerctl fsck` lists what needs it")]
    ChunkMissing(ChunkId),
    /// A chunk of a partial layer didn't come from its source in time.
    #[error("chunk {id} is not here yet and could not be fetched: {detail}")]
    Absent {
        /// The chunk.
        id: ChunkId,
        /// From whom, and why not.
        detail: String,
    },
    /// The process that waited for a chunk of a partial layer has been killed.
    #[error("whoever waited for chunk {0} has been killed")]
    GivenUp(ChunkId),
    /// A chunk's bytes don't have its id.
    #[error("chunk {id} is damaged ({detail}); `layerctl scrub --heal PEER` fetches it again")]
    ChunkDamaged {
        /// The id that was asked for.
        id: ChunkId,
        /// What is wrong with it.
        detail: String,
    },
    /// A layer isn't in the store.
    #[error("layer {0} is not in the store")]
    LayerMissing(LayerId),
    /// A stored or received structure is malformed.
    #[error("{what} is damaged: {detail}")]
    Corrupt {
        /// Which structure: "manifest", "pack header", "inode record".
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// A structure is of a version or has a feature that this program doesn't know.
    #[error("{what} {detail} is not supported by this version; use a newer layerfs")]
    Unsupported {
        /// Which structure.
        what: &'static str,
        /// Version or feature.
        detail: String,
    },
    /// This machine lacks something, or has it switched off.
    #[error("{what} can't be had here: {detail}")]
    Platform {
        /// What was asked for: "FUSE over io_uring".
        what: &'static str,
        /// What is missing, and what the user can do.
        detail: String,
    },
    /// The second tier failed.
    #[error("{action} {place} failed: {detail}")]
    Tier {
        /// "reading from", "uploading to".
        action: &'static str,
        /// The bucket.
        place: String,
        /// The class of failure.
        class: ErrorClass,
        /// What happened, and what the user can do.
        detail: String,
    },
    /// The rights don't suffice.
    #[error("{0}")]
    Denied(String),
    /// The work was cancelled by whoever asked for it.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Wraps an I/O error on `path`.
    pub fn file(action: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Error {
        Error::File { action, path: path.as_ref().to_owned(), source: source.into() }
    }

    /// Wraps an I/O error without a path.
    pub fn io(action: &'static str, source: impl Into<io::Error>) -> Error {
        Error::Io { action, source: source.into() }
    }

    /// A malformed structure.
    pub fn corrupt(what: &'static str, detail: impl Into<String>) -> Error {
        Error::Corrupt { what, detail: detail.into() }
    }

    /// A wrong argument or input.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::Invalid(message.into())
    }

    /// Which class of failure this is.
    pub fn class(&self) -> ErrorClass {
        match self {
            Error::File { source, .. } | Error::Io { source, .. } => io_class(source),
            Error::Full { .. } => ErrorClass::NoSpace,
            Error::Index(text) if text.contains("No space left") => ErrorClass::NoSpace,
            Error::Index(text) if text.contains("Permission denied") => ErrorClass::Denied,
            Error::Index(text) if text.contains("Corruption") => ErrorClass::Corrupt,
            Error::Index(_) => ErrorClass::Io,
            Error::Invalid(_) => ErrorClass::Invalid,
            Error::NotFound { .. } | Error::NoneFits(_) | Error::LayerMissing(_) => ErrorClass::NotFound,
            Error::Exists { .. } => ErrorClass::Exists,
            Error::Busy(_) | Error::Cancelled | Error::GivenUp(_) => ErrorClass::Busy,
            Error::Absent { .. } => ErrorClass::Network,
            Error::ChunkMissing(_) | Error::ChunkDamaged { .. } | Error::Corrupt { .. } => ErrorClass::Corrupt,
            Error::Tier { class, .. } => *class,
            Error::Unsupported { .. } | Error::Platform { .. } => ErrorClass::Unsupported,
            Error::Denied(_) => ErrorClass::Denied,
        }
    }

    /// The errno that a program on a mount sees for this error.
    pub fn errno(&self) -> i32 {
        match self {
            Error::File { source, .. } | Error::Io { source, .. } => io_errno(source),
            // Whatever it is: to a program that reads a file it is the disk that fails.
            Error::Tier { .. } => libc::EIO,
            Error::GivenUp(_) => libc::EINTR,
            _ => match self.class() {
                ErrorClass::Invalid => libc::EINVAL,
                ErrorClass::NotFound => libc::ENOENT,
                ErrorClass::Exists => libc::EEXIST,
                ErrorClass::Busy => libc::EBUSY,
                ErrorClass::NoSpace => libc::ENOSPC,
                ErrorClass::Denied => libc::EPERM,
                ErrorClass::Unsupported => libc::EOPNOTSUPP,
                ErrorClass::Corrupt | ErrorClass::Network | ErrorClass::Io => libc::EIO,
            },
        }
    }
}

/// The errno of `error`; EIO if it didn't come from the system.
pub(crate) fn io_errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn io_class(error: &io::Error) -> ErrorClass {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorClass::NoSpace,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorClass::Denied,
        Some(libc::ENOENT) => ErrorClass::NotFound,
        Some(libc::EEXIST) => ErrorClass::Exists,
        Some(libc::EBUSY) => ErrorClass::Busy,
        Some(libc::EINVAL | libc::ENOTDIR | libc::EISDIR) => ErrorClass::Invalid,
        _ if error.kind() == io::ErrorKind::UnexpectedEof => ErrorClass::Corrupt,
        _ => ErrorClass::Io,
    }
}

impl From<rocksdb::Error> for Error {
    fn from(error: rocksdb::Error) -> Error {
        Error::Index(error.into_string())
    }
}
