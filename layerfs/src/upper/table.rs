//! The upper's inode and dentry tables: in memory, with every change mirrored by one atomic batch of rows.
//!
//! Hides how the rows are keyed and encoded (FORMAT.md, "Uppers"). Invariants: memory never holds what the
//! database refused; a [`Change`] is applied whole or not at all; the rows alone give the tables back after the
//! process was killed, but for the times of files that were being written, which their data files' stamps give.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::attr::{FileKind, Time, is_valid_name};
use crate::chunker::Chunker;
use crate::codec::{Put, Reader};
use crate::content::Content;
use crate::error::Result;
use crate::id::{Ino, UpperId};
use crate::inode::{Inode, Node, Target};
use crate::store::db::{Batch, Cf};
use crate::store::space::Share;
use crate::upper::data::DataFolder;
use crate::upper::ranges::Leaf;

/// Where a regular file's bytes are that the upper has copied up or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backed {
    /// Its length in bytes.
    pub bytes: u64,
    /// What cut the content that it was copied up from; sealing uses it again.
    pub chunker: Chunker,
    /// How much of the sealed file shows where the upper has nothing, in bytes, if the file was copied up by range; 0 if
    /// all is the upper's. At most `bytes`; what is behind is the upper's.
    pub base_bytes: u64,
}

/// An inode that the upper has made or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpperInode {
    /// Attributes and, unless `backed` is set, content. The content of a backed file stands here as empty, or, if it was
    /// copied up by range, as the content that shows through.
    pub inode: Inode,
    /// Set if the file's bytes are in a data file.
    pub backed: Option<Backed>,
}

impl UpperInode {
    /// An inode whose content is sealed or isn't a file's.
    pub fn sealed(inode: Inode) -> UpperInode {
        UpperInode { inode, backed: None }
    }

    /// `st_size`.
    pub fn size(&self) -> u64 {
        self.backed.map_or_else(|| self.inode.size(), |backed| backed.bytes)
    }
}

/// A data file's length and time of last change when its inode's row was written. A file that differs was written
/// to afterwards: then it, and not the row, has the size and the times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The data file's length in bytes.
    pub bytes: u64,
    /// Its `st_mtime`.
    pub mtime: Time,
}

/// What the upper says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// An inode, or that the name below is gone.
    pub target: Target,
    /// 0 if the layers below have the name too; else the name's place in listings, after all names from below.
    pub order: u64,
}

/// The names of a folder that the upper has set.
#[derive(Clone, Debug, Default)]
pub struct UpperFolder {
    names: BTreeMap<Box<[u8]>, Slot>,
    added: BTreeMap<u64, Box<[u8]>>,
}

impl UpperFolder {
    /// What the upper says of `name`, if anything.
    pub fn get(&self, name: &[u8]) -> Option<Slot> {
        self.names.get(name).copied()
    }

    /// All names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], Slot)> {
        self.names.iter().map(|(name, slot)| (&**name, *slot))
    }

    /// The names that the layers below lack, in the order in which they were added, from `order` on.
    pub fn added_from(&self, order: u64) -> impl Iterator<Item = (u64, &[u8], Target)> {
        self.added.range(order..).filter_map(|(order, name)| Some((*order, &**name, self.names.get(name)?.target)))
    }

    fn set(&mut self, name: &[u8], slot: Option<Slot>) {
        if let Some(old) = self.names.remove(name) {
            self.added.remove(&old.order);
        }
        if let Some(slot) = slot {
            if slot.order != 0 {
                self.added.insert(slot.order, name.into());
            }
            self.names.insert(name.into(), slot);
        }
    }
}

/// Both tables.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    inodes: HashMap<Ino, UpperInode>,
    folders: HashMap<Ino, UpperFolder>,
    /// Inodes whose times or size are newer here than in their rows.
    unsaved: HashSet<Ino>,
    next_order: u64,
}

impl Tables {
    /// Empty tables.
    pub fn new() -> Tables {
        Tables { next_order: 1, ..Tables::default() }
    }

    /// The upper's inode `ino`.
    pub fn inode(&self, ino: Ino) -> Option<&UpperInode> {
        self.inodes.get(&ino)
    }

    /// All inodes, in no order.
    pub fn inodes(&self) -> impl Iterator<Item = &UpperInode> {
        self.inodes.values()
    }

    /// What the upper says of `folder`'s names.
    pub fn folder(&self, folder: Ino) -> Option<&UpperFolder> {
        self.folders.get(&folder)
    }

    /// All folders with names in the upper, in no order.
    pub fn folders(&self) -> impl Iterator<Item = (Ino, &UpperFolder)> {
        self.folders.iter().map(|(ino, folder)| (*ino, folder))
    }

    /// Whether nothing was ever changed.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.folders.is_empty()
    }

    /// How many inodes there are.
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// How many names there are, whiteouts included.
    pub fn dentry_count(&self) -> usize {
        self.folders.values().map(|folder| folder.names.len()).sum()
    }

    /// The place that [`Tables::take_order`] gives next.
    pub fn next_order(&self) -> u64 {
        self.next_order
    }

    /// A place in listings for a new name.
    pub fn take_order(&mut self) -> u64 {
        let order = self.next_order;
        self.next_order += 1;
        order
    }

    /// Changes the inode in memory only, and remembers that its row is stale. For writes into data files, whose
    /// stamp tells after a crash what the row doesn't.
    pub fn touch(&mut self, ino: Ino, change: impl FnOnce(&mut UpperInode)) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            change(inode);
            self.unsaved.insert(ino);
        }
    }

    /// Whether the row of `ino` is stale.
    pub fn is_unsaved(&self, ino: Ino) -> bool {
        self.unsaved.contains(&ino)
    }

    /// The inodes whose rows are stale.
    pub fn unsaved(&self) -> Vec<Ino> {
        self.unsaved.iter().copied().collect()
    }

    /// Applies `change` to memory; its rows have been written.
    pub fn apply(&mut self, change: Change) {
        for (ino, inode) in change.inodes {
            self.unsaved.remove(&ino);
            match inode {
                Some(inode) => drop(self.inodes.insert(ino, inode)),
                None => drop(self.inodes.remove(&ino)),
            }
        }
        for (folder, name, slot) in change.dentries {
            let names = self.folders.entry(folder).or_default();
            names.set(&name, slot);
            if names.names.is_empty() {
                self.folders.remove(&folder);
            }
        }
    }

    /// Takes in a row that [`Change::rows`] wrote.
    pub(super) fn load_inode(&mut self, inode: UpperInode) {
        self.inodes.insert(inode.inode.ino, inode);
    }

    /// Takes in a row that [`Change::rows`] wrote.
    pub(super) fn load_dentry(&mut self, folder: Ino, name: &[u8], slot: Slot) {
        self.next_order = self.next_order.max(slot.order + 1);
        self.folders.entry(folder).or_default().set(name, Some(slot));
    }
}

/// What one operation changes.
#[derive(Debug, Default)]
pub struct Change {
    inodes: Vec<(Ino, Option<UpperInode>)>,
    dentries: Vec<(Ino, Box<[u8]>, Option<Slot>)>,
    leaves: Vec<(Ino, u64, Option<Leaf>)>,
    answer: Option<Ino>,
    share: Share,
}

impl Change {
    /// Nothing yet.
    pub fn new() -> Change {
        Change::default()
    }

    /// Sets an inode. A later setting of the same one wins.
    pub fn inode(&mut self, inode: UpperInode) {
        let ino = inode.inode.ino;
        self.inodes.retain(|(other, _)| *other != ino);
        self.inodes.push((ino, Some(inode)));
    }

    /// The inode as this change sets it.
    pub fn pending(&self, ino: Ino) -> Option<&UpperInode> {
        self.inodes.iter().find(|(other, _)| *other == ino).and_then(|(_, inode)| inode.as_ref())
    }

    /// Drops an inode from the upper.
    pub fn forget(&mut self, ino: Ino) {
        self.inodes.retain(|(other, _)| *other != ino);
        self.inodes.push((ino, None));
    }

    /// [`Change::forget`] for an inode that this change doesn't mention otherwise: for changes of many.
    pub fn forget_unchecked(&mut self, ino: Ino) {
        self.inodes.push((ino, None));
    }

    /// It gives space back, so that it can be made though the disk is full.
    pub fn makes_room(&mut self) {
        self.share = Share::All;
    }

    /// It takes no more space, so that it can be made though the disk is full, unless removals may need what is left.
    pub fn takes_no_room(&mut self) {
        self.share = self.share.max(Share::First);
    }

    /// The answer to whoever asked for the change is about inode `ino`.
    pub fn answer_with(&mut self, ino: Ino) {
        self.answer = Some(ino);
    }

    /// The inode that the answer is about; 0 if about none.
    pub(super) fn answer(&self) -> Ino {
        self.answer.unwrap_or(Ino(0))
    }

    /// Sets or clears what the upper says of a name.
    pub fn dentry(&mut self, folder: Ino, name: &[u8], slot: Option<Slot>) {
        self.dentries.push((folder, name.into(), slot));
    }

    /// Sets or removes the row of leaf `index` of an inode's map.
    pub fn leaf(&mut self, ino: Ino, index: u64, leaf: Option<Leaf>) {
        self.leaves.push((ino, index, leaf));
    }

    /// Appends the rows of upper `id` to `batch`, whose data files are `data`.
    pub(super) fn rows(&self, id: UpperId, batch: &mut Batch, data: &DataFolder) -> Result<()> {
        batch.may_take(self.share);
        for (ino, inode) in &self.inodes {
            let key = inode_key(id, *ino);
            let is_ranged = inode.as_ref().and_then(|inode| inode.backed).is_some_and(|backed| backed.base_bytes > 0);
            if let Some(map) = data.map(*ino).filter(|_| !is_ranged) {
                map.rows().into_iter().for_each(|index| batch.delete(Cf::Uppers, leaf_key(id, *ino, index)));
            }
            match inode {
                Some(inode) => {
                    let stamp = if inode.backed.is_some() { data.stamp(*ino)? } else { Stamp::default() };
                    batch.put(Cf::Uppers, key, encode_inode(inode, stamp));
                }
                None => batch.delete(Cf::Uppers, key),
            }
        }
        for (ino, index, leaf) in &self.leaves {
            let key = leaf_key(id, *ino, *index);
            match leaf {
                Some(leaf) => batch.put(Cf::Uppers, key, leaf.encode()),
                None => batch.delete(Cf::Uppers, key),
            }
        }
        for (folder, name, slot) in &self.dentries {
            let key = dentry_key(id, *folder, name);
            match slot {
                Some(slot) => batch.put(Cf::Uppers, key, encode_slot(*slot)),
                None => batch.delete(Cf::Uppers, key),
            }
        }
        Ok(())
    }
}

/// The prefix of the keys of all inode rows of upper `id`.
pub fn inode_prefix(id: UpperId) -> Vec<u8> {
    [&b"i"[..], &id.0.to_be_bytes()].concat()
}

/// The prefix of the keys of all dentry rows of upper `id`.
pub fn dentry_prefix(id: UpperId) -> Vec<u8> {
    [&b"d"[..], &id.0.to_be_bytes()].concat()
}

/// The key of an inode row.
pub fn inode_key(id: UpperId, ino: Ino) -> Vec<u8> {
    [&b"i"[..], &id.0.to_be_bytes(), &ino.0.to_be_bytes()].concat()
}

/// The key of a dentry row.
pub fn dentry_key(id: UpperId, folder: Ino, name: &[u8]) -> Vec<u8> {
    [&b"d"[..], &id.0.to_be_bytes(), &folder.0.to_be_bytes(), name].concat()
}

/// The prefix of the keys of all rows of maps of upper `id`.
pub fn leaf_prefix(id: UpperId) -> Vec<u8> {
    [&b"m"[..], &id.0.to_be_bytes()].concat()
}

/// The key of the row of leaf `index` of an inode's map.
pub fn leaf_key(id: UpperId, ino: Ino, index: u64) -> Vec<u8> {
    [&b"m"[..], &id.0.to_be_bytes(), &ino.0.to_be_bytes(), &index.to_be_bytes()].concat()
}

/// Takes the inode and the leaf's index off the key of a map's row, and decodes the row.
pub fn decode_leaf(key: &[u8], row: &[u8]) -> Result<(Ino, u64, Leaf)> {
    let reader = Reader::new("row of an upper's map", row);
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    match (key.len(), Leaf::decode(row)) {
        (25, Some(leaf)) => Ok((Ino(number(&key[9..17])), number(&key[17..]), leaf)),
        _ => Err(reader.error("an impossible key or value")),
    }
}

/// Takes the folder and the name off the key of a dentry row.
pub fn decode_dentry_key(key: &[u8]) -> Result<(Ino, &[u8])> {
    let reader = Reader::new("upper's dentry key", key);
    let (Some(folder), Some(name)) = (key.get(9..17), key.get(17..)) else { return Err(reader.error("too short")) };
    let folder = Ino(folder.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
    if !is_valid_name(name) || folder.0 == 0 {
        return Err(reader.error("an impossible name or folder"));
    }
    Ok((folder, name))
}

fn encode_inode(inode: &UpperInode, stamp: Stamp) -> Vec<u8> {
    let mut out = Vec::with_capacity(160);
    match inode.backed {
        None => out.put_u8(0),
        Some(backed) => {
            out.put_u8(if backed.base_bytes > 0 { 2 } else { 1 });
            out.put_u8(backed.chunker as u8);
            out.put_u64(stamp.bytes);
            out.put_i64(stamp.mtime.seconds);
            out.put_u32(stamp.mtime.nanos);
            if backed.base_bytes > 0 {
                out.put_u64(backed.base_bytes);
            }
        }
    }
    inode.inode.encode(&mut out);
    out
}

/// Decodes an inode row; for a backed file its stamp comes along, and `bytes` is the stamp's.
pub fn decode_inode(row: &[u8]) -> Result<(UpperInode, Option<Stamp>)> {
    let mut reader = Reader::new("upper's inode row", row);
    let backed = match reader.u8()? {
        0 => None,
        tag @ (1 | 2) => {
            let code = reader.u8()?;
            let chunker = Chunker::from_code(code).ok_or_else(|| reader.error(format!("unknown chunker {code}")))?;
            let bytes = reader.u64()?;
            let mtime = Time { seconds: reader.i64()?, nanos: reader.u32()? };
            let base_bytes = if tag == 2 { reader.u64()? } else { 0 };
            if (tag == 2 && base_bytes == 0) || base_bytes > i64::MAX as u64 {
                return Err(reader.error(format!("{base_bytes} bytes that show through")));
            }
            Some((Backed { bytes, chunker, base_bytes }, Stamp { bytes, mtime }))
        }
        other => return Err(reader.error(format!("unknown tag {other}"))),
    };
    let inode = Inode::decode(&mut reader)?;
    let fits = match (&backed, &inode.node) {
        (None, _) => true,
        (Some((backed, _)), Node::File(content)) if backed.base_bytes > 0 => backed.base_bytes <= content.len(),
        (Some(_), Node::File(content)) => *content == Content::empty(),
        _ => false,
    };
    if !fits {
        return Err(reader.error("a data file for an inode with content"));
    }
    reader.finish()?;
    Ok((UpperInode { inode, backed: backed.map(|(backed, _)| backed) }, backed.map(|(_, stamp)| stamp)))
}

fn encode_slot(slot: Slot) -> Vec<u8> {
    let mut out = Vec::with_capacity(17);
    let (ino, kind) = match slot.target {
        Target::Inode { ino, kind } => (ino.0, kind as u8),
        Target::Whiteout => (0, 0),
    };
    out.put_u64(ino);
    out.put_u8(kind);
    out.put_u64(slot.order);
    out
}

/// Decodes a dentry row.
pub fn decode_slot(row: &[u8]) -> Result<Slot> {
    let mut reader = Reader::new("upper's dentry row", row);
    let (ino, code, order) = (Ino(reader.u64()?), reader.u8()?, reader.u64()?);
    let target = match (ino.0, code) {
        (0, 0) => Target::Whiteout,
        (0, _) => return Err(reader.error("inode number 0")),
        _ => {
            let kind = FileKind::from_code(code).ok_or_else(|| reader.error(format!("kind {code}")))?;
            Target::Inode { ino, kind }
        }
    };
    reader.finish()?;
    Ok(Slot { target, order })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attr::Attrs;

    #[test]
    fn rows_round_trip() {
        let inode = Inode {
            ino: Ino(7),
            nlink: 2,
            attrs: Attrs::imported(0o644, 1, 2, Time { seconds: -3, nanos: 4 }),
            xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())],
            node: Node::File(Content::empty()),
        };
        let stamp = Stamp { bytes: 99, mtime: Time { seconds: 5, nanos: 6 } };
        let backed = UpperInode { inode, backed: Some(Backed { bytes: 99, chunker: Chunker::Aligned, base_bytes: 0 }) };
        assert_eq!(decode_inode(&encode_inode(&backed, stamp)).unwrap(), (backed.clone(), Some(stamp)));
        let sealed = UpperInode { backed: None, ..backed };
        assert_eq!(decode_inode(&encode_inode(&sealed, Stamp::default())).unwrap(), (sealed, None));
        for target in [Target::Whiteout, Target::Inode { ino: Ino(9), kind: FileKind::Fifo }] {
            let slot = Slot { target, order: 12 };
            assert_eq!(decode_slot(&encode_slot(slot)).unwrap(), slot);
        }
        let key = dentry_key(UpperId(3), Ino(0x0102), b"a\xffb");
        assert_eq!(decode_dentry_key(&key).unwrap(), (Ino(0x0102), &b"a\xffb"[..]));
    }

    #[test]
    fn golden_rows() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let attrs = Attrs::imported(0o644, 1, 2, Time { seconds: 3, nanos: 4 });
        let inode = Inode { ino: Ino(7), nlink: 1, attrs, xattrs: vec![], node: Node::File(Content::empty()) };
        let mut record = Vec::new();
        inode.encode(&mut record);
        let sealed = UpperInode::sealed(inode.clone());
        assert_eq!(hex(&encode_inode(&sealed, Stamp::default())), format!("00{}", hex(&record)));
        let backed = UpperInode { inode, backed: Some(Backed { bytes: 9, chunker: Chunker::Aligned, base_bytes: 0 }) };
        let stamp = Stamp { bytes: 9, mtime: Time { seconds: 5, nanos: 6 } };
        let expected = format!("0101{}{}{}{}", "0900000000000000", "0500000000000000", "06000000", hex(&record));
        assert_eq!(hex(&encode_inode(&backed, stamp)), expected);
        let mut ranged = backed.clone();
        ranged.inode.node = Node::File(Content::Inline(b"below".to_vec()));
        ranged.backed = Some(Backed { bytes: 9, chunker: Chunker::Tree, base_bytes: 5 });
        let mut record = Vec::new();
        ranged.inode.encode(&mut record);
        let expected = ["0200", "0900000000000000", "0500000000000000", "06000000", "0500000000000000"].concat();
        assert_eq!(hex(&encode_inode(&ranged, stamp)), expected + &hex(&record));
        assert_eq!(decode_inode(&encode_inode(&ranged, stamp)).unwrap(), (ranged.clone(), Some(stamp)));
        // No more can show through than there is.
        ranged.backed = Some(Backed { bytes: 9, chunker: Chunker::Tree, base_bytes: 6 });
        assert!(decode_inode(&encode_inode(&ranged, stamp)).is_err());
        let key = leaf_key(UpperId(1), Ino(2), 3);
        assert_eq!(hex(&key), "6d000000000000000100000000000000020000000000000003");
        assert_eq!(decode_leaf(&key, &[1]).unwrap(), (Ino(2), 3, Leaf::Full));
        assert!(decode_leaf(&key, &[2]).is_err() && decode_leaf(&key[1..], &[1]).is_err());
        let slot = Slot { target: Target::Inode { ino: Ino(9), kind: FileKind::Fifo }, order: 12 };
        assert_eq!(hex(&encode_slot(slot)), "0900000000000000060c00000000000000");
        assert_eq!(hex(&encode_slot(Slot { target: Target::Whiteout, order: 0 })), "00".repeat(17));
        assert_eq!(hex(&inode_key(UpperId(1), Ino(0x0203))), "6900000000000000010000000000000203");
        assert_eq!(hex(&dentry_key(UpperId(1), Ino(2), b"n")), "64000000000000000100000000000000026e");
    }
}
