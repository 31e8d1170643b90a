//! The files of an image: in a folder, or in an archive.
//!
//! Invariants: a file of a folder is opened only if it really lies in it; an archive's members are found by one
//! pass over its headers; what goes into memory is bounded.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result};
use crate::import::decode::Input;
use crate::import::path::{TreePath, names, show};
use crate::import::tar::{Archive, MemberKind};

/// The largest JSON document of an image, in bytes.
const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;
/// The most members of an image's archive.
const MAX_MEMBERS: usize = 100_000;
/// The most bytes of the paths of those and of what the links among them refer to.
const MAX_PATHS_BYTES: usize = 32 * 1024 * 1024;
/// The longest chain of links among an archive's members.
const MAX_LINKS: usize = 8;

/// An image's files, by their paths.
pub(super) enum Bundle {
    Folder(PathBuf),
    Archive { file: Arc<File>, members: HashMap<TreePath, Found> },
}

/// Where a member of an archive is.
pub(super) enum Found {
    Data { offset: u64, bytes: u64 },
    Link(TreePath),
}

impl Bundle {
    /// Finds the members of the archive `file`, which starts at its beginning.
    pub fn index(file: File) -> Result<Bundle> {
        let file = Arc::new(file);
        let mut archive = Archive::new(Section { file: file.clone(), at: 0, end: u64::MAX }, true);
        let mut members = HashMap::new();
        let mut paths_bytes = 0;
        while let Some(member) = archive.next_member()? {
            if members.len() >= MAX_MEMBERS {
                return Err(Error::invalid("the image's archive has more members than an image needs"));
            }
            let path = TreePath::parse(&member.name)?;
            let found = match &member.kind {
                MemberKind::File => Found::Data { offset: archive.position(), bytes: member.stored_bytes },
                MemberKind::HardLink(target) => Found::Link(TreePath::parse(target)?),
                MemberKind::Symlink(target) => match beside(&path, target) {
                    Some(target) => Found::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            paths_bytes += path.key().len();
            if let Found::Link(target) = &found {
                paths_bytes += target.key().len();
            }
            if paths_bytes > MAX_PATHS_BYTES {
                return Err(Error::invalid("the image's archive has longer paths than an image needs"));
            }
            members.insert(path, found);
        }
        Ok(Bundle::Archive { file, members })
    }

    /// Whether there is a file `name`.
    pub fn has(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    /// Opens file `name`.
    pub fn open(&self, name: &str) -> Result<Input> {
        let path = TreePath::parse(name.as_bytes())?;
        match self {
            Bundle::Folder(root) => Ok(Box::new(open_within(root, &path)?)),
            Bundle::Archive { file, members } => {
                let mut path = &path;
                for _ in 0..MAX_LINKS {
                    match members.get(path) {
                        None => break,
                        Some(Found::Link(target)) => path = target,
                        Some(Found::Data { offset, bytes }) => {
                            let end = offset.saturating_add(*bytes);
                            return Ok(Box::new(Section { file: file.clone(), at: *offset, end }));
                        }
                    }
                }
                Err(Error::NotFound { what: "image file", name: name.to_owned() })
            }
        }
    }

    /// All of the JSON document `name`.
    pub fn document(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(name)?
            .take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io("reading the image", e))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(Error::invalid(format!("{} is larger than an image's documents are", show(name.as_bytes()))));
        }
        Ok(bytes)
    }
}

fn open_within(root: &Path, path: &TreePath) -> Result<File> {
    let folder = File::open(root).map_err(|e| Error::file("open", root, e))?;
    let relative = names(path.key()).collect::<Vec<_>>().join(&b'/');
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::openat2(&folder, relative.as_slice(), flags, Mode::empty(), ResolveFlags::BENEATH);
    let host_path = || root.join(String::from_utf8_lossy(&relative).as_ref());
    let file = File::from(fd.map_err(|e| Error::file("open", host_path(), e))?);
    let metadata = file.metadata().map_err(|e| Error::file("look at", host_path(), e))?;
    if !metadata.is_file() {
        return Err(Error::invalid(format!("{} is not a regular file", host_path().display())));
    }
    Ok(file)
}

/// What the symbolic link `path` in an archive refers to, if that is in the archive.
fn beside(path: &TreePath, target: &[u8]) -> Option<TreePath> {
    let mut found = path.clone();
    found.pop();
    for name in target.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => found.pop(),
            name => found.push(name).ok()?,
        }
    }
    Some(found)
}

/// A part of a file, read without moving the file's position.
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = (self.end - self.at).min(buffer.len() as u64) as usize;
        let count = self.file.read_at(&mut buffer[..want], self.at)?;
        if count == 0 && want > 0 && self.end != u64::MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += count as u64;
        Ok(count)
    }
}
