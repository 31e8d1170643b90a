//! The records of a sealed layer's two tables. FORMAT.md, "Inode records" and "Dentry records".
//!
//! Invariants: inodes are sorted by number, dentries by (folder's number, name bytes); neither repeats a key.

use crate::attr::{Attrs, FileKind, MAX_SYMLINK, MAX_XATTR_NAME, MAX_XATTR_VALUE, Time, Xattrs, is_valid_name};
use crate::codec::{Put, Reader};
use crate::content::Content;
use crate::error::Result;
use crate::id::Ino;

/// The longest record of a table, in bytes.
pub const MAX_RECORD_BYTES: usize = 16 * 1024 * 1024;
/// Of that, what is for extended attributes; the rest is more than everything else together takes.
const MAX_XATTRS_BYTES: usize = MAX_RECORD_BYTES - 16 * 1024;

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A regular file.
    File(Content),
    /// A folder.
    Folder,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A block device and its number, as Linux's `dev_t`.
    BlockDevice(u64),
    /// A character device and its number, as Linux's `dev_t`.
    CharDevice(u64),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl Node {
    /// Its kind.
    pub fn kind(&self) -> FileKind {
        match self {
            Node::File(_) => FileKind::File,
            Node::Folder => FileKind::Folder,
            Node::Symlink(_) => FileKind::Symlink,
            Node::BlockDevice(_) => FileKind::BlockDevice,
            Node::CharDevice(_) => FileKind::CharDevice,
            Node::Fifo => FileKind::Fifo,
            Node::Socket => FileKind::Socket,
        }
    }
}

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// How many dentries of the merged tree refer to it; for a folder 2 and one for each folder in it.
    pub nlink: u32,
    /// Mode, owner, times.
    pub attrs: Attrs,
    /// Extended attributes, POSIX ACLs among them.
    pub xattrs: Xattrs,
    /// Kind and data.
    pub node: Node,
}

impl Inode {
    /// Its kind.
    pub fn kind(&self) -> FileKind {
        self.node.kind()
    }

    /// `st_mode`.
    pub fn mode(&self) -> u32 {
        self.kind().type_bits() | u32::from(self.attrs.permissions)
    }

    /// `st_size`.
    pub fn size(&self) -> u64 {
        match &self.node {
            Node::File(content) => content.len(),
            Node::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }

    /// `st_rdev`.
    pub fn rdev(&self) -> u64 {
        match &self.node {
            Node::BlockDevice(number) | Node::CharDevice(number) => *number,
            _ => 0,
        }
    }

    /// The value of the extended attribute `name`.
    pub fn xattr(&self, name: &[u8]) -> Option<&[u8]> {
        let found = self.xattrs.binary_search_by(|(other, _)| other.as_slice().cmp(name)).ok()?;
        Some(&self.xattrs[found].1)
    }

    /// Whether its extended attributes fit in a record.
    pub fn fits_record(&self) -> bool {
        xattrs_fit_record(&self.xattrs)
    }

    /// Appends the record, with its length in front.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u32(0);
        out.put_u64(self.ino.0);
        out.put_u32(self.mode());
        out.put_u32(self.nlink);
        out.put_u32(self.attrs.uid);
        out.put_u32(self.attrs.gid);
        for time in [self.attrs.atime, self.attrs.mtime, self.attrs.ctime] {
            out.put_i64(time.seconds);
            out.put_u32(time.nanos);
        }
        out.put_u16(self.xattrs.len() as u16);
        for (name, value) in &self.xattrs {
            out.put_bytes16(name);
            out.put_bytes32(value);
        }
        match &self.node {
            Node::File(content) => content.encode(out),
            Node::Symlink(target) => out.put_bytes16(target),
            Node::BlockDevice(number) | Node::CharDevice(number) => out.put_u64(*number),
            Node::Folder | Node::Fifo | Node::Socket => {}
        }
        let bytes = (out.len() - start - 4) as u32;
        out[start..start + 4].copy_from_slice(&bytes.to_le_bytes());
    }

    /// Takes a record off `reader`.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Inode> {
        let mut record = Reader::new("inode record", reader.bytes32()?);
        let inode = Inode::decode_body(&mut record)?;
        record.finish()?;
        Ok(inode)
    }

    fn decode_body(record: &mut Reader<'_>) -> Result<Inode> {
        let (ino, kind, nlink, attrs) = decode_fixed(record)?;
        let xattrs = decode_xattrs(record)?;
        let node = match kind {
            FileKind::File => Node::File(Content::decode(record)?),
            FileKind::Folder => Node::Folder,
            FileKind::Symlink => {
                let target = record.bytes16()?;
                if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) {
                    return Err(record.error("an impossible link target"));
                }
                Node::Symlink(target.to_vec())
            }
            FileKind::BlockDevice => Node::BlockDevice(record.u64()?),
            FileKind::CharDevice => Node::CharDevice(record.u64()?),
            FileKind::Fifo => Node::Fifo,
            FileKind::Socket => Node::Socket,
        };
        Ok(Inode { ino, nlink, attrs, xattrs, node })
    }
}

/// The part of an inode record that has a fixed width: everything before the extended attributes.
fn decode_fixed(record: &mut Reader<'_>) -> Result<(Ino, FileKind, u32, Attrs)> {
    let ino = Ino(record.u64()?);
    let mode = record.u32()?;
    let kind = FileKind::from_mode(mode).filter(|_| mode & !(libc::S_IFMT | 0o7777) == 0);
    let kind = kind.ok_or_else(|| record.error(format!("mode {mode:o}")))?;
    let nlink = record.u32()?;
    let (uid, gid) = (record.u32()?, record.u32()?);
    let mut times = [Time::default(); 3];
    for time in &mut times {
        *time = Time { seconds: record.i64()?, nanos: record.u32()? };
        if time.nanos >= 1_000_000_000 {
            return Err(record.error(format!("{} nanoseconds", time.nanos)));
        }
    }
    if ino.0 == 0 {
        return Err(record.error("inode number 0"));
    }
    let [atime, mtime, ctime] = times;
    Ok((ino, kind, nlink, Attrs { permissions: (mode & 0o7777) as u16, uid, gid, atime, mtime, ctime }))
}

/// What `stat` tells of an inode: decoded without allocating.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Its number.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// How many dentries of the merged tree refer to it.
    pub nlink: u32,
    /// Mode, owner, times.
    pub attrs: Attrs,
    /// `st_size` in bytes.
    pub size: u64,
    /// How much of a file isn't in holes, in bytes.
    pub data_bytes: u64,
    /// `st_rdev`.
    pub rdev: u64,
    /// Whether it has extended attributes.
    pub has_xattrs: bool,
}

impl Stat {
    /// Takes what `stat` needs off an inode record, and leaves `reader` after the record.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Stat> {
        let mut record = Reader::new("inode record", reader.bytes32()?);
        let (ino, kind, nlink, attrs) = decode_fixed(&mut record)?;
        let xattr_count = record.u16()?;
        for _ in 0..xattr_count {
            record.bytes16()?;
            record.bytes32()?;
        }
        let mut stat = Stat { ino, kind, nlink, attrs, size: 0, data_bytes: 0, rdev: 0, has_xattrs: xattr_count > 0 };
        match kind {
            FileKind::File => (stat.size, stat.data_bytes) = Content::decode_lengths(&mut record)?,
            FileKind::Symlink => stat.size = record.bytes16()?.len() as u64,
            FileKind::BlockDevice | FileKind::CharDevice => stat.rdev = record.u64()?,
            FileKind::Folder | FileKind::Fifo | FileKind::Socket => {}
        }
        Ok(stat)
    }

    /// `st_mode`.
    pub fn mode(&self) -> u32 {
        self.kind.type_bits() | u32::from(self.attrs.permissions)
    }
}

impl From<&Inode> for Stat {
    fn from(inode: &Inode) -> Stat {
        let data_bytes = match &inode.node {
            Node::File(content) => content.data_bytes(),
            _ => 0,
        };
        Stat {
            ino: inode.ino,
            kind: inode.kind(),
            nlink: inode.nlink,
            attrs: inode.attrs.clone(),
            size: inode.size(),
            data_bytes,
            rdev: inode.rdev(),
            has_xattrs: !inode.xattrs.is_empty(),
        }
    }
}

/// Whether `xattrs` fit in a record.
pub(crate) fn xattrs_fit_record(xattrs: &[(Vec<u8>, Vec<u8>)]) -> bool {
    let bytes: usize = xattrs.iter().map(|(name, value)| 2 + name.len() + 4 + value.len()).sum();
    bytes <= MAX_XATTRS_BYTES && xattrs.len() <= usize::from(u16::MAX)
}

fn decode_xattrs(record: &mut Reader<'_>) -> Result<Xattrs> {
    let count = record.u16()?;
    let mut xattrs = Xattrs::new();
    for _ in 0..count {
        let name = record.bytes16()?.to_vec();
        let value = record.bytes32()?.to_vec();
        let in_order = xattrs.last().is_none_or(|(last, _)| *last < name);
        if name.is_empty() || name.len() > MAX_XATTR_NAME || value.len() > MAX_XATTR_VALUE || !in_order {
            return Err(record.error("an impossible extended attribute"));
        }
        xattrs.push((name, value));
    }
    Ok(xattrs)
}

/// What a dentry says of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The name refers to this inode.
    Inode {
        /// Its number.
        ino: Ino,
        /// Its kind.
        kind: FileKind,
    },
    /// The name that a lower layer has is gone.
    Whiteout,
}

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dentry {
    /// The folder.
    pub folder: Ino,
    /// The name in it.
    pub name: Vec<u8>,
    /// What it refers to.
    pub target: Target,
}

impl Dentry {
    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (ino, kind) = match self.target {
            Target::Inode { ino, kind } => (ino.0, kind as u8),
            Target::Whiteout => (0, 0),
        };
        out.put_u64(self.folder.0);
        out.put_u64(ino);
        out.put_u8(kind);
        out.put_u8(self.name.len() as u8);
        out.extend_from_slice(&self.name);
    }

    /// Takes a record off `reader`.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Dentry> {
        let DentryRef { folder, name, target } = DentryRef::decode(reader)?;
        Ok(Dentry { folder, name: name.to_vec(), target })
    }
}

/// A [`Dentry`] whose name is borrowed from the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DentryRef<'a> {
    /// The folder.
    pub folder: Ino,
    /// The name in it.
    pub name: &'a [u8],
    /// What it refers to.
    pub target: Target,
}

impl<'a> DentryRef<'a> {
    /// Takes a record off `reader`.
    pub fn decode(reader: &mut Reader<'a>) -> Result<DentryRef<'a>> {
        let folder = Ino(reader.u64()?);
        let ino = Ino(reader.u64()?);
        let kind = reader.u8()?;
        let count = reader.u8()?;
        let name = reader.take(usize::from(count))?;
        if !is_valid_name(name) || folder.0 == 0 {
            return Err(reader.error("an impossible name or folder"));
        }
        let target = match (ino.0, kind) {
            (0, 0) => Target::Whiteout,
            (0, _) => return Err(reader.error("inode number 0")),
            (_, code) => {
                let kind = FileKind::from_code(code).ok_or_else(|| reader.error(format!("kind {code}")))?;
                Target::Inode { ino, kind }
            }
        };
        Ok(DentryRef { folder, name, target })
    }
}
