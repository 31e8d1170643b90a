//! What a source says of a path, and which of several statements on one path holds.
//!
//! Invariant: of the entries of one path the last wins; an entry that was made before a non-folder took the
//! place of one of its folders is gone, as it would be after extraction.

use crate::attr::{Attrs, FileKind, Xattrs};
use crate::codec::{Put, Reader};
use crate::error::Result;
use crate::id::Ino;
use crate::import::path::{TreePath, is_below};
use crate::import::sorter::{Records, Sorted};
use crate::inode::{Inode, Node};

/// What a source says of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An inode.
    Node {
        /// Mode, owner, times.
        attrs: Attrs,
        /// Extended attributes, sorted by name.
        xattrs: Xattrs,
        /// Kind and data.
        node: Node,
    },
    /// Another name of what stands at this path, in the source or in the parent.
    HardLink(TreePath),
    /// What the parent has at the path is gone.
    Whiteout,
    /// What the parent has in the folder at the path, and the source doesn't, is gone.
    Opaque,
}

const NODE: u8 = 0;
const HARD_LINK: u8 = 1;
const WHITEOUT: u8 = 2;
const OPAQUE: u8 = 3;

impl Entry {
    /// Writes the sorter's record of the `sequence`th entry to `out`.
    pub(super) fn encode(self, sequence: u64, out: &mut Vec<u8>) {
        out.clear();
        out.put_u64(sequence);
        match self {
            Entry::Node { attrs, xattrs, node } => {
                out.put_u8(NODE);
                out.put_u8(node.kind() as u8);
                Inode { ino: Ino::ROOT, nlink: 1, attrs, xattrs, node }.encode(out);
            }
            Entry::HardLink(target) => {
                out.put_u8(HARD_LINK);
                out.extend_from_slice(target.key());
            }
            Entry::Whiteout => out.put_u8(WHITEOUT),
            Entry::Opaque => out.put_u8(OPAQUE),
        }
    }
}

/// What holds at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Only marks (whiteout, opaque).
    Nothing,
    /// An inode of this kind; [`Winners::inode`] decodes it.
    Node(FileKind),
    /// A hard link; [`Winners::link_target`] has the key.
    HardLink,
}

/// Reads sorted entries, one path at a time, with what holds there.
pub(super) struct Winners<'a> {
    records: Records<'a>,
    /// Whether `records` stands on a record that belongs to no path yet.
    ahead: bool,
    /// The folders above the current path that a non-folder replaced for a time: key's length, and when last.
    replaced: Vec<(usize, u64)>,
    /// The current path's key.
    pub key: Vec<u8>,
    /// What holds at it.
    pub held: Held,
    /// Whether it is whited out in the parent.
    pub whiteout: bool,
    /// Whether the parent's folder is hidden.
    pub opaque: bool,
    body: Vec<u8>,
}

impl<'a> Winners<'a> {
    pub fn new(entries: &'a Sorted) -> Result<Winners<'a>> {
        let mut records = entries.read()?;
        let ahead = records.advance()?;
        Ok(Winners {
            records,
            ahead,
            replaced: Vec::new(),
            key: Vec::new(),
            held: Held::Nothing,
            whiteout: false,
            opaque: false,
            body: Vec::new(),
        })
    }

    /// Goes to the next path at which anything holds; false at the end.
    pub fn advance(&mut self) -> Result<bool> {
        while self.ahead {
            if self.next_path()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn next_path(&mut self) -> Result<bool> {
        let previous = std::mem::replace(&mut self.key, self.records.key().to_vec());
        let key = &self.key;
        debug_assert!(previous <= *key);
        while self
            .replaced
            .last()
            .is_some_and(|(bytes, _)| !(previous.len() >= *bytes && is_below(key, &previous[..*bytes])))
        {
            self.replaced.pop();
        }
        let gone_before = self.replaced.iter().map(|(_, sequence)| *sequence).max().unwrap_or(0);
        (self.held, self.whiteout, self.opaque) = (Held::Nothing, false, false);
        let (mut last_leaf, mut held_since) = (0, 0);
        while self.ahead && self.records.key() == self.key {
            let mut value = Reader::new("temporary record", self.records.value());
            let sequence = value.u64()?;
            let tag = value.u8()?;
            match tag {
                WHITEOUT => self.whiteout = true,
                OPAQUE => self.opaque = true,
                _ if sequence < gone_before || sequence < held_since => {}
                HARD_LINK if value.rest() == self.key && self.held != Held::Nothing => {}
                _ => {
                    self.held = match tag {
                        NODE => {
                            let code = value.u8()?;
                            Held::Node(FileKind::from_code(code).ok_or_else(|| value.error(format!("kind {code}")))?)
                        }
                        _ => Held::HardLink,
                    };
                    held_since = sequence;
                    if self.held != Held::Node(FileKind::Folder) {
                        last_leaf = sequence;
                    }
                    self.body.clear();
                    self.body.extend_from_slice(value.rest());
                }
            }
            self.ahead = self.records.advance()?;
        }
        if last_leaf > 0 {
            self.replaced.push((self.key.len(), last_leaf));
        }
        Ok(self.held != Held::Nothing || self.whiteout || self.opaque)
    }

    /// The inode that holds, with number 1 and one link; only for [`Held::Node`].
    pub fn inode(&self) -> Result<Inode> {
        Inode::decode(&mut Reader::new("temporary record", &self.body))
    }

    /// The key of the path that the hard link means; only for [`Held::HardLink`].
    pub fn link_target(&self) -> &[u8] {
        &self.body
    }
}

/// Changes the path that a hard link's record refers to as `moved` says; none if it stays.
pub(super) fn rewrite(value: &[u8], moved: &impl Fn(&[u8]) -> Result<Option<Vec<u8>>>) -> Result<Option<Vec<u8>>> {
    let (head, target) = value.split_at(value.len().min(9));
    if head.last() != Some(&HARD_LINK) {
        return Ok(None);
    }
    Ok(moved(target)?.map(|target| [head, &target].concat()))
}
