//! Reads tar archives: V7, ustar, GNU and pax, with sparse files, long names, extended attributes and ACLs.
//!
//! Hides how an archive says all that; what comes out are entries. Invariants: nothing of the host is touched;
//! an entry is taken only after its header's checksum, and lengths are bounded before anything is allocated; an
//! archive that ends before its end marker is damaged, unless its reader says otherwise.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use crate::attr::{Attrs, FileKind, MAX_SYMLINK, Time};
use crate::error::{Error, Result};
use crate::import::entry::Entry;
use crate::import::feed::Feed;
use crate::import::path::{TreePath, show};
use crate::import::tar::header::{BLOCK, Header};
use crate::import::tar::pax::Pax;
use crate::import::tar::sparse::{Segment, SparseMap};
use crate::inode::Node;
use crate::store::{Source, SourcePiece};

pub(super) use header::looks_like_header;

/// The most bytes that one extended header (pax, GNU long name) may take.
const MAX_EXTENDED: u64 = 8 * 1024 * 1024;
/// The most entries of a sparse file's map.
const MAX_SEGMENTS: usize = 1 << 20;

/// How an archive is to be understood.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TarOptions {
    /// Whether `.wh.` names are whiteouts, as in OCI layers.
    pub whiteouts: bool,
    /// Whether the end marker may lack: what holds the archive vouches for its length.
    pub may_end_early: bool,
}

/// A member of an archive.
#[derive(Debug)]
pub(super) struct Member {
    /// Its path as written.
    pub name: Vec<u8>,
    pub kind: MemberKind,
    pub attrs: Attrs,
    pub xattrs: crate::attr::Xattrs,
    /// How many bytes follow in the archive, without padding.
    pub stored_bytes: u64,
    /// Where its data lies in the file; none for a plain one.
    sparse: Option<SparseMap>,
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MemberKind {
    File,
    Folder,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Device(FileKind, u64),
    Fifo,
}

/// Reads the members of an archive one after the other.
pub(super) struct Archive<R> {
    input: R,
    position: u64,
    /// What is left of the current member: its data, and the padding after it.
    data_left: u64,
    padding: u64,
    global: Pax,
    may_end_early: bool,
}

pub(super) fn damaged(detail: impl Into<String>) -> Error {
    Error::corrupt("archive", detail)
}

/// What the failure to read an archive means: a decoder's complaint has no number of the operating system's.
pub(super) fn read_error(error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        damaged("it is cut off")
    } else if error.raw_os_error().is_some() {
        Error::io("reading the archive", error)
    } else {
        damaged(error.to_string())
    }
}

impl<R: Read> Archive<R> {
    pub fn new(input: R, may_end_early: bool) -> Archive<R> {
        Archive { input, position: 0, data_left: 0, padding: 0, global: Pax::default(), may_end_early }
    }

    /// How many bytes of the archive have been read.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Reads what is left after the end marker, so that the decoder checks its sums and a pipe's writer may end.
    pub fn drain(&mut self) -> Result<()> {
        io::copy(&mut self.input, &mut io::sink()).map_err(read_error)?;
        Ok(())
    }

    fn exactly(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input.read_exact(buffer).map_err(read_error)?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    /// Reads the next block; false at the very end of the input.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        let mut count = 0;
        while count < BLOCK {
            match self.input.read(&mut block[count..]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(read_error(e)),
            }
        }
        self.position += count as u64;
        match count {
            0 => Ok(false),
            BLOCK => Ok(true),
            _ => Err(damaged("it is cut off")),
        }
    }

    /// Reads the data of an extended header.
    fn extended(&mut self, bytes: u64) -> Result<Vec<u8>> {
        if bytes > MAX_EXTENDED {
            return Err(Error::invalid(format!("an extended header of {bytes} bytes is more than an archive needs")));
        }
        let mut data = vec![0; bytes as usize];
        self.exactly(&mut data)?;
        self.data_left = 0;
        self.padding = padding(bytes);
        self.skip()?;
        Ok(data)
    }

    /// Skips what is left of the current member.
    fn skip(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.data_left) + std::mem::take(&mut self.padding);
        let copied = io::copy(&mut (&mut self.input).take(bytes), &mut io::sink()).map_err(read_error)?;
        self.position += copied;
        if copied == bytes { Ok(()) } else { Err(damaged("it is cut off")) }
    }

    /// Goes to the next member; none after the end marker.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        self.skip()?;
        let mut local = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let mut block = [0; BLOCK];
            let is_end = !self.block(&mut block)?;
            if is_end && !self.may_end_early {
                return Err(damaged("it ends without an end marker: it is cut off"));
            }
            if is_end || block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            let header = Header::parse(&block)?;
            match header.kind {
                b'x' | b'X' => local = Pax::parse(&self.extended(header.size)?)?,
                b'g' => {
                    let more = self.extended(header.size)?;
                    self.global.add_global(&more)?;
                }
                b'L' => long_name = Some(until_nul(self.extended(header.size)?)),
                b'K' => long_link = Some(until_nul(self.extended(header.size)?)),
                b'V' => {
                    self.data_left = header.size;
                    self.padding = padding(header.size);
                    self.skip()?;
                }
                _ => {
                    let pax = self.global.overlaid(local);
                    return self.member(header, pax, long_name, long_link).map(Some);
                }
            }
        }
    }

    fn member(
        &mut self,
        header: Header,
        mut pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Member> {
        let name = pax.sparse.name.take().or(pax.path.take()).or(long_name).unwrap_or(header.name);
        let link = pax.link.take().or(long_link).unwrap_or(header.link);
        let kind = match header.kind {
            b'0' | 0 | b'7' if name.ends_with(b"/") && !pax.sparse.is_used() => MemberKind::Folder,
            b'0' | 0 | b'7' | b'S' => MemberKind::File,
            b'1' => MemberKind::HardLink(link),
            b'2' => MemberKind::Symlink(link),
            b'3' => MemberKind::Device(FileKind::CharDevice, header.device),
            b'4' => MemberKind::Device(FileKind::BlockDevice, header.device),
            b'5' | b'D' => MemberKind::Folder,
            b'6' => MemberKind::Fifo,
            other => {
                let detail = format!("member {} of type \"{}\"", show(&name), other.escape_ascii());
                return Err(Error::Unsupported { what: "archive", detail });
            }
        };
        let mtime = pax.mtime.unwrap_or(Time { seconds: header.mtime, nanos: 0 });
        let attrs = Attrs::imported(header.mode, pax.uid.unwrap_or(header.uid), pax.gid.unwrap_or(header.gid), mtime);
        // What isn't a file has no data, whatever its header says of the size of what it refers to.
        let has_data = kind == MemberKind::File || header.kind == b'D';
        let stored_bytes = if has_data { pax.size.unwrap_or(header.size) } else { 0 };
        if stored_bytes > i64::MAX as u64 {
            return Err(damaged(format!("member {} has {stored_bytes} bytes, more than any file", show(&name))));
        }
        self.data_left = stored_bytes;
        self.padding = padding(stored_bytes);
        let too_many = || format!("member {} has more extended attributes than a file can have", show(&name));
        let xattrs = self.global.xattrs_below(pax.take_xattrs()).ok_or_else(|| Error::invalid(too_many()))?;
        let mut member = Member { name, kind, attrs, xattrs, stored_bytes, sparse: None };
        if header.kind == b'S' {
            member.sparse = Some(self.old_gnu_map(header.sparse, header.real_size, header.is_extended)?);
        } else if member.kind == MemberKind::File && pax.sparse.is_used() {
            if let Some(major @ 2..) = pax.sparse.major {
                let detail = format!("member {} with a sparse map of version {major}", show(&member.name));
                return Err(Error::Unsupported { what: "archive", detail });
            }
            member.sparse = Some(self.pax_map(pax.sparse)?);
        }
        if let Some(map) = &member.sparse {
            map.check(self.data_left)?;
        }
        Ok(member)
    }

    fn old_gnu_map(&mut self, mut segments: Vec<Segment>, size: u64, mut more: bool) -> Result<SparseMap> {
        // The maps' blocks are not part of the member's size.
        while more {
            let mut block = [0; BLOCK];
            self.exactly(&mut block)?;
            let (next, is_extended) = header::sparse_block(&block)?;
            segments.extend(next);
            if segments.len() > MAX_SEGMENTS {
                return Err(Error::invalid("a sparse file's map is larger than an archive needs"));
            }
            more = is_extended;
        }
        Ok(SparseMap { size, segments })
    }

    fn pax_map(&mut self, sparse: pax::PaxSparse) -> Result<SparseMap> {
        let size = sparse.size.ok_or_else(|| damaged("a sparse file without its size"))?;
        if sparse.major != Some(1) {
            return Ok(SparseMap { size, segments: sparse.segments });
        }
        // The map stands in front of the data, as decimal lines, padded to whole blocks.
        let mut numbers = Vec::new();
        let mut wanted = 1;
        let mut current: Option<u64> = None;
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            self.data_left =
                self.data_left.checked_sub(BLOCK as u64).ok_or_else(|| damaged("a sparse map is cut off"))?;
            self.exactly(&mut block)?;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let grown =
                            current.unwrap_or(0).checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                        current = Some(grown.ok_or_else(|| damaged("a sparse map's number is too large"))?);
                    }
                    b'\n' if numbers.len() < wanted => {
                        numbers.push(current.take().ok_or_else(|| damaged("a sparse map has an empty line"))?);
                        if numbers.len() == 1 {
                            let count = numbers[0];
                            if count > MAX_SEGMENTS as u64 {
                                return Err(Error::invalid("a sparse file's map is larger than an archive needs"));
                            }
                            wanted = 1 + 2 * count as usize;
                        }
                    }
                    0 if numbers.len() == wanted => {}
                    _ => return Err(damaged("a sparse map has something else than numbers")),
                }
            }
        }
        let segments = numbers[1..].chunks_exact(2).map(|pair| Segment { offset: pair[0], bytes: pair[1] }).collect();
        Ok(SparseMap { size, segments })
    }

    /// The content of the current member, a file.
    pub fn content<'m>(&'m mut self, member: &'m Member) -> Content<'m, R> {
        let size = member.sparse.as_ref().map_or(member.stored_bytes, |map| map.size);
        let segments = member.sparse.as_ref().map(|map| map.segments.as_slice());
        Content { archive: self, segments, next: 0, at: 0, size, segment_left: 0 }
    }
}

fn padding(bytes: u64) -> u64 {
    bytes.wrapping_neg() % BLOCK as u64
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// The content of a file in an archive.
pub(super) struct Content<'m, R> {
    archive: &'m mut Archive<R>,
    segments: Option<&'m [Segment]>,
    next: usize,
    at: u64,
    size: u64,
    segment_left: u64,
}

impl<R: Read> Source for Content<'_, R> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        let Some(segments) = self.segments else {
            self.segment_left = self.size - self.at;
            return self.data(buffer);
        };
        while self.segment_left == 0 {
            let segment = segments.get(self.next).copied();
            let start = segment.map_or(self.size, |segment| segment.offset);
            if start > self.at {
                let bytes = start - self.at;
                self.at = start;
                return Ok(SourcePiece::Hole(bytes));
            }
            match segment {
                None => return Ok(SourcePiece::End),
                Some(segment) => {
                    self.next += 1;
                    self.segment_left = segment.bytes;
                }
            }
        }
        self.data(buffer)
    }
}

impl<R: Read> Content<'_, R> {
    fn data(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        let want = self.segment_left.min(buffer.len() as u64) as usize;
        if want == 0 {
            return Ok(SourcePiece::End);
        }
        let count = loop {
            match self.archive.input.read(&mut buffer[..want]) {
                Ok(0) => return Err(damaged("it is cut off within a file")),
                Ok(count) => break count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(read_error(e)),
            }
        };
        self.archive.position += count as u64;
        self.archive.data_left -= count as u64;
        self.at += count as u64;
        self.segment_left -= count as u64;
        Ok(SourcePiece::Data(count))
    }
}

/// Feeds all members of the archive in `input`, and reads it to its end.
pub(super) fn read(input: impl Read, options: TarOptions, feed: &mut Feed<'_>) -> Result<()> {
    let mut archive = Archive::new(input, options.may_end_early);
    while let Some(member) = archive.next_member()? {
        if options.whiteouts && whiteout(&member.name, feed)? {
            continue;
        }
        let path = TreePath::parse(&member.name)?;
        let node = match &member.kind {
            MemberKind::File => {
                let (attrs, xattrs) = (member.attrs.clone(), member.xattrs.clone());
                feed.file(path, attrs, xattrs, &mut archive.content(&member))?;
                continue;
            }
            MemberKind::HardLink(target) => {
                let target = TreePath::parse(target)?;
                feed.entry(path, Entry::HardLink(target))?;
                continue;
            }
            MemberKind::Folder => Node::Folder,
            MemberKind::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) => {
                return Err(Error::invalid(format!("symbolic link {path} has an impossible target")));
            }
            MemberKind::Symlink(target) => Node::Symlink(target.clone()),
            MemberKind::Device(FileKind::CharDevice, number) => Node::CharDevice(*number),
            MemberKind::Device(_, number) => Node::BlockDevice(*number),
            MemberKind::Fifo => Node::Fifo,
        };
        feed.entry(path, Entry::Node { attrs: member.attrs, xattrs: member.xattrs, node })?;
    }
    archive.drain()
}

/// Takes `name` as the whiteout that it may be. OCI image specification, "Whiteouts".
fn whiteout(name: &[u8], feed: &mut Feed<'_>) -> Result<bool> {
    let parts: Vec<&[u8]> = name.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
    let Some((last, folders)) = parts.split_last() else { return Ok(false) };
    let folder = || TreePath::parse(&folders.join(&b'/'));
    if *last == b".wh..wh..opq" {
        feed.entry(folder()?, Entry::Opaque)?;
    } else if parts.iter().any(|part| part.starts_with(b".wh..wh.")) {
        // The bookkeeping of a filesystem that the convention comes from.
    } else if let Some(hidden) = last.strip_prefix(b".wh.") {
        feed.entry(folder()?.join(hidden)?, Entry::Whiteout)?;
    } else {
        return Ok(false);
    }
    Ok(true)
}
