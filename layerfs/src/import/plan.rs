//! Walks sorted entries once, beside the parent's tree, and decides what the layer records.
//!
//! Hides: numbering. In the order of the paths an inode gets the number that the parent has at the same path
//! for the same kind, else the predecessor's, else the next. Invariants: a number stands for one inode; what
//! is as in the parent is not recorded; a folder's link count is that of the merged tree.

use std::collections::HashSet;
use std::iter::Peekable;

use crate::attr::{Attrs, FileKind, Time};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::import::builder::{Base, Redirects};
use crate::import::entry::{Held, Winners};
use crate::import::links::{LinkSet, LinkSets};
use crate::import::output::Output;
use crate::import::path::{TreePath, is_below, names, show_key};
use crate::import::sorter::{Records, Sorted};
use crate::inode::{Inode, Node, Target};
use crate::monitor::{Monitor, check};
use crate::view::View;
use crate::walk::{FolderEntry, FolderIter};

/// A folder on the way from the root to the current path.
struct Frame<'a> {
    /// The length of its key.
    key_bytes: usize,
    inode: Inode,
    /// Its record in the parent, if it is there: what lies in it there is merged.
    lower: Option<Inode>,
    /// Its number in the predecessor.
    like: Option<Ino>,
    /// By how much its number of subfolders differs from the parent's.
    subfolders: i64,
    /// What the parent has in it and no entry has come for yet, if that is to be hidden.
    hidden: Option<Peekable<FolderIter<'a>>>,
}

/// A path at which a non-folder stands, whose followers may wrongly lie below it.
struct Leaf {
    key: Vec<u8>,
    target: Option<Vec<u8>>,
}

/// What a name refers to in the parent or the predecessor.
type Child = Option<(Ino, FileKind)>;

/// What is to be put at a name.
enum Wanted<'a> {
    /// An inode of its own.
    Single(FileKind),
    /// A name of a set.
    Member(&'a mut LinkSet),
}

/// How many entries are handled between two looks at whether the work was cancelled.
const CHECK_EVERY: u64 = 1024;

pub(super) struct Planner<'a, 'o> {
    base: Base<'a>,
    lower: Option<&'a View>,
    sets: Vec<LinkSet>,
    members: Option<Sorted>,
    output: &'o mut Output,
    frames: Vec<Frame<'a>>,
    /// The key of the folder on top.
    open_key: Vec<u8>,
    leaf: Option<Leaf>,
    /// A whiteout that may yet turn out to be a folder's.
    whiteout: Option<Vec<u8>>,
    redirects: Redirects,
    /// Numbers of inodes with several names in the parent or predecessor that have been given away.
    claimed: HashSet<Ino>,
    /// The parent's numbers end here.
    floor: Ino,
    next: Ino,
}

impl<'a, 'o> Planner<'a, 'o> {
    pub fn new(base: Base<'a>, links: Option<LinkSets>, output: &'o mut Output) -> Result<Planner<'a, 'o>> {
        let lower = base.parent.map(|parent| parent.tree);
        let floor = lower.map_or(Ino::FIRST, View::next_ino);
        let next = base.like.map_or(floor, |like| like.next_ino().max(floor));
        let (sets, members) = links.map_or((Vec::new(), None), |links| (links.sets, Some(links.members)));
        Ok(Planner {
            base,
            lower,
            sets,
            members,
            output,
            frames: Vec::new(),
            open_key: Vec::new(),
            leaf: None,
            whiteout: None,
            redirects: Redirects::new(),
            claimed: HashSet::new(),
            floor,
            next,
        })
    }

    /// Plans all of `entries`. Returns the number after the last one used, and where entries below symbolic links
    /// belong: if there are any, the output is useless.
    pub fn run(mut self, entries: &Sorted, monitor: &dyn Monitor) -> Result<(Ino, Redirects)> {
        let members = self.members.take();
        let mut members = members.as_ref().map(Sorted::read).transpose()?;
        let mut member_ahead = members.as_mut().map_or(Ok(false), Records::advance)?;
        let mut winners = Winners::new(entries)?;
        let mut count = 0u64;
        self.push_root()?;
        while winners.advance()? {
            count += 1;
            if count.is_multiple_of(CHECK_EVERY) {
                check(monitor)?;
            }
            let mut set = None;
            if let Some(members) = members.as_mut() {
                while member_ahead && members.key() < winners.key.as_slice() {
                    member_ahead = members.advance()?;
                }
                if member_ahead && members.key() == winners.key {
                    set = members.value().first_chunk().map(|index| u32::from_le_bytes(*index) as usize);
                }
            }
            self.entry(&winners, set)?;
        }
        self.flush_whiteout()?;
        while !self.frames.is_empty() {
            self.pop()?;
        }
        Ok((self.next, self.redirects))
    }

    fn push_root(&mut self) -> Result<()> {
        let lower = self.lower.map(|lower| lower.inode(Ino::ROOT)).transpose()?.flatten();
        let inode = lower.clone().unwrap_or_else(|| implied(Ino::ROOT));
        let like = self.base.like.map(|_| Ino::ROOT);
        self.push(&[], inode, lower, like, self.base.whole)
    }

    fn push(&mut self, key: &[u8], inode: Inode, lower: Option<Inode>, like: Option<Ino>, hide: bool) -> Result<()> {
        let mut frame = Frame { key_bytes: key.len(), inode, lower, like, subfolders: 0, hidden: None };
        if hide {
            frame.hidden = self.listing(&frame)?;
        }
        self.frames.push(frame);
        self.open_key.clear();
        self.open_key.extend_from_slice(key);
        Ok(())
    }

    fn listing(&self, frame: &Frame<'a>) -> Result<Option<Peekable<FolderIter<'a>>>> {
        match (self.lower, &frame.lower) {
            (Some(lower), Some(folder)) => Ok(Some(lower.read_folder(folder.ino, None)?.peekable())),
            _ => Ok(None),
        }
    }

    fn top(&mut self) -> Result<&mut Frame<'a>> {
        self.frames.last_mut().ok_or_else(|| Error::corrupt("import plan", "no folder is open"))
    }

    /// Handles the path on which `winners` stands.
    fn entry(&mut self, winners: &Winners<'_>, set: Option<usize>) -> Result<()> {
        let key = winners.key.as_slice();
        if key.is_empty() {
            return self.root_entry(winners);
        }
        let was_whited_out = self.whiteout.as_deref().is_some_and(|whiteout| is_below(key, whiteout));
        if !was_whited_out {
            self.flush_whiteout()?;
        }
        if let Some(leaf) = self.leaf.take_if(|leaf| is_below(key, &leaf.key)) {
            let result = self.redirect(key, &leaf.key, leaf.target.as_deref());
            self.leaf = Some(leaf);
            return result;
        }
        if !self.open_folders(key, was_whited_out)? {
            return Ok(());
        }
        let name = names(key).last().unwrap_or_default();
        match winners.held {
            Held::Nothing if winners.whiteout => {
                self.whiteout = Some(key.to_vec());
                Ok(())
            }
            Held::Nothing => {
                if self.open_folder(key.len(), key, name, None, false)? {
                    self.hide()?;
                }
                Ok(())
            }
            Held::Node(FileKind::Folder) => {
                let inode = winners.inode()?;
                self.open_folder(key.len(), key, name, Some(inode), false)?;
                if winners.whiteout || winners.opaque { self.hide() } else { Ok(()) }
            }
            Held::Node(_) => self.leaf(key, name, Some(winners.inode()?), set),
            Held::HardLink => self.leaf(key, name, None, set),
        }
    }

    fn root_entry(&mut self, winners: &Winners<'_>) -> Result<()> {
        match winners.held {
            Held::Node(FileKind::Folder) => {
                let entry = winners.inode()?;
                let root = &mut self.top()?.inode;
                (root.attrs, root.xattrs) = (entry.attrs, entry.xattrs);
            }
            Held::Nothing => {}
            _ => return Err(Error::invalid("the tree's root is not a folder")),
        }
        if winners.opaque || winners.whiteout { self.hide() } else { Ok(()) }
    }

    /// Hides what the parent has in the folder on top.
    fn hide(&mut self) -> Result<()> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        if frame.hidden.is_none() {
            let hidden = self.listing(frame)?;
            self.top()?.hidden = hidden;
        }
        Ok(())
    }

    /// Closes the folders that don't hold `key` and opens those that do. False if that is impossible because one is
    /// a symbolic link.
    fn open_folders(&mut self, key: &[u8], was_whited_out: bool) -> Result<bool> {
        while let Some(top) = self.frames.last() {
            let bytes = top.key_bytes;
            if bytes == 0 || is_below(key, &self.open_key) {
                break;
            }
            self.pop()?;
        }
        loop {
            let bytes = self.top()?.key_bytes;
            let start = if bytes == 0 { 0 } else { bytes + 1 };
            let Some(length) = key[start..].iter().position(|byte| *byte == 0) else { return Ok(true) };
            let end = start + length;
            let fresh = was_whited_out && self.whiteout.as_deref() == Some(&key[..end]);
            if fresh {
                self.whiteout = None;
            }
            if !self.open_folder(end, key, &key[start..end], None, fresh)? {
                return Ok(false);
            }
            if fresh {
                self.hide()?;
            }
        }
    }

    /// Opens the folder `name`, whose key is the first `end` bytes of `key`. Without `entry` it is the parent's, or
    /// made up (always if `fresh`). False if a symbolic link stands there and no entry replaces it.
    fn open_folder(&mut self, end: usize, key: &[u8], name: &[u8], entry: Option<Inode>, fresh: bool) -> Result<bool> {
        let (lower_child, like_child) = self.children(name)?;
        let hides = self.top()?.hidden.is_some();
        if entry.is_none()
            && !fresh
            && !hides
            && let (Some(lower), Some((ino, kind))) = (self.lower, lower_child)
            && kind != FileKind::Folder
        {
            let target = match lower.inode(ino)?.map(|inode| inode.node) {
                Some(Node::Symlink(target)) => Some(target),
                _ => None,
            };
            self.redirect(key, &key[..end], target.as_deref())?;
            return Ok(false);
        }
        let ino = self.number(Wanted::Single(FileKind::Folder), lower_child, like_child)?.0;
        self.link(name, ino, FileKind::Folder, lower_child)?;
        let same = lower_child == Some((ino, FileKind::Folder));
        let lower = match self.lower {
            Some(lower) if same => lower.inode(ino)?,
            _ => None,
        };
        let mut inode = match (entry, &lower) {
            (Some(entry), _) => entry,
            (None, Some(lower)) if !fresh => lower.clone(),
            _ => implied(ino),
        };
        inode.ino = ino;
        let like = like_child.filter(|(_, kind)| *kind == FileKind::Folder).map(|(ino, _)| ino);
        self.push(&key[..end], inode, lower, like, hides || self.base.whole)?;
        Ok(true)
    }

    /// Puts a non-folder at `name`. Without `entry` it is a link, and `set` says to what.
    fn leaf(&mut self, key: &[u8], name: &[u8], entry: Option<Inode>, set: Option<usize>) -> Result<()> {
        let target = match entry.as_ref().map(|inode| &inode.node) {
            Some(Node::Symlink(target)) => Some(target.clone()),
            _ => None,
        };
        self.leaf = Some(Leaf { key: key.to_vec(), target });
        let (lower_child, like_child) = self.children(name)?;
        let mut member = set.map(|set| self.sets[set]);
        let wanted = match (&mut member, &entry) {
            (Some(set), _) => Wanted::Member(set),
            (None, Some(inode)) => Wanted::Single(inode.kind()),
            // The link leads nowhere, for which the builder has an error ready.
            (None, None) => return Ok(()),
        };
        let (ino, kind) = self.number(wanted, lower_child, like_child)?;
        if let (Some(set), Some(member)) = (set, member) {
            self.sets[set] = member;
        }
        let is_new_name = self.link(name, ino, kind, lower_child)?;
        if member.is_some_and(|set| set.from_parent) && is_new_name {
            self.output.count(ino, 1)?;
        }
        if let Some(mut inode) = entry {
            inode.ino = ino;
            inode.nlink = member.map_or(1, |set| set.names);
            self.record(&inode)?;
        }
        Ok(())
    }

    /// Records `inode` unless the parent has it just so.
    fn record(&mut self, inode: &Inode) -> Result<()> {
        let before = match self.lower {
            Some(lower) if inode.ino < self.floor => lower.inode(inode.ino)?,
            _ => None,
        };
        match before {
            // With one name there is none to lose.
            Some(before) if before == *inode => {
                if inode.nlink > 1 {
                    self.output.settled(inode.ino)
                } else {
                    Ok(())
                }
            }
            _ => self.output.inode(inode),
        }
    }

    /// What parent and predecessor have at `name` in the folder on top; what the parent has before it and hides is
    /// removed.
    fn children(&mut self, name: &[u8]) -> Result<(Child, Child)> {
        self.remove_hidden(Some(name))?;
        let frame = self.frames.last().ok_or_else(|| Error::corrupt("import plan", "no folder is open"))?;
        let lower = match (self.lower, &frame.lower) {
            (Some(lower), Some(folder)) => lower.lookup(folder.ino, name)?,
            _ => None,
        };
        let like = match (self.base.like, frame.like) {
            (Some(like), Some(folder)) => like.lookup(folder, name)?,
            _ => None,
        };
        Ok((lower, like))
    }

    /// Chooses the number for what stands at a path.
    fn number(&mut self, wanted: Wanted<'_>, lower_child: Child, like_child: Child) -> Result<(Ino, FileKind)> {
        match wanted {
            Wanted::Single(kind) => Ok((self.choose(kind, lower_child, like_child)?, kind)),
            Wanted::Member(set) => {
                let kind = set.kind;
                let ino = match (set.ino, set.replaces) {
                    (Some(ino), _) => ino,
                    (None, Some(ino)) if self.claimed.insert(ino) => ino,
                    (None, _) => self.choose(kind, lower_child.filter(|_| self.base.whole), like_child)?,
                };
                set.ino = Some(ino);
                Ok((ino, kind))
            }
        }
    }

    fn choose(&mut self, kind: FileKind, lower_child: Child, like_child: Child) -> Result<Ino> {
        if let (Some(lower), Some((ino, found))) = (self.lower, lower_child)
            && found == kind
        {
            let shared = kind != FileKind::Folder && lower.inode(ino)?.is_some_and(|inode| inode.nlink > 1);
            if !shared || (self.base.whole && self.claimed.insert(ino)) {
                return Ok(ino);
            }
        }
        if let (Some(like), Some((ino, found))) = (self.base.like, like_child)
            && found == kind
            && ino >= self.floor
        {
            let shared = kind != FileKind::Folder && like.inode(ino)?.is_some_and(|inode| inode.nlink > 1);
            if !shared || self.claimed.insert(ino) {
                return Ok(ino);
            }
        }
        let ino = self.next;
        self.next = Ino(ino.0.checked_add(1).ok_or_else(|| Error::invalid("the stack's inode numbers are used up"))?);
        Ok(ino)
    }

    /// Makes `name` in the folder on top refer to `ino`. Returns whether it didn't before.
    fn link(&mut self, name: &[u8], ino: Ino, kind: FileKind, lower_child: Child) -> Result<bool> {
        if lower_child == Some((ino, kind)) {
            return Ok(false);
        }
        let folder = self.top()?.inode.ino;
        self.output.dentry(folder, name, Target::Inode { ino, kind })?;
        if let Some(child) = lower_child {
            self.removed(child)?;
        }
        if kind == FileKind::Folder {
            self.top()?.subfolders += 1;
        }
        Ok(true)
    }

    /// Accounts for the parent's `child` of the folder on top losing its name there.
    fn removed(&mut self, child: (Ino, FileKind)) -> Result<()> {
        if child.1 != FileKind::Folder {
            return self.output.count(child.0, -1);
        }
        self.top()?.subfolders -= 1;
        let Some(lower) = self.lower else { return Ok(()) };
        // A malformed parent, with a folder in itself, has an end too.
        let counts = lower.layers().iter().map(|layer| layer.manifest.dentry_count);
        let mut left = counts.fold(0, u64::saturating_add);
        let mut folders = vec![child.0];
        while let Some(folder) = folders.pop() {
            for entry in lower.read_folder(folder, None)? {
                let entry = entry?;
                left = left
                    .checked_sub(1)
                    .ok_or_else(|| Error::corrupt("layer", format!("folder {folder} lies in itself")))?;
                match entry.kind {
                    FileKind::Folder => folders.push(entry.ino),
                    _ => self.output.count(entry.ino, -1)?,
                }
            }
        }
        Ok(())
    }

    /// Removes what the folder on top hides, up to `name` (which has an entry of its own) or to the end.
    fn remove_hidden(&mut self, name: Option<&[u8]>) -> Result<()> {
        loop {
            let frame = self.top()?;
            let folder = frame.inode.ino;
            let Some(hidden) = frame.hidden.as_mut() else { return Ok(()) };
            let is_before = |next: &Result<FolderEntry<'_>>| match (next, name) {
                (Ok(next), Some(name)) => next.name <= name,
                _ => true,
            };
            let Some(next) = hidden.next_if(is_before).transpose()? else { return Ok(()) };
            if Some(next.name) != name {
                self.output.dentry(folder, next.name, Target::Whiteout)?;
                self.removed((next.ino, next.kind))?;
            }
        }
    }

    /// Writes the whiteout that no folder has come for.
    fn flush_whiteout(&mut self) -> Result<()> {
        let Some(key) = self.whiteout.take() else { return Ok(()) };
        if !self.open_folders(&key, false)? {
            return Ok(());
        }
        let name = names(&key).last().unwrap_or_default();
        let (lower_child, _) = self.children(name)?;
        if let Some(child) = lower_child {
            let folder = self.top()?.inode.ino;
            self.output.dentry(folder, name, Target::Whiteout)?;
            self.removed(child)?;
        }
        Ok(())
    }

    /// Closes the folder on top.
    fn pop(&mut self) -> Result<()> {
        self.remove_hidden(None)?;
        let Some(frame) = self.frames.pop() else { return Ok(()) };
        let mut inode = frame.inode;
        self.open_key.truncate(self.frames.last().map_or(0, |top| top.key_bytes));
        let before = frame.lower.as_ref().map_or(2, |lower| i64::from(lower.nlink));
        inode.nlink = u32::try_from(before + frame.subfolders).unwrap_or(2);
        if frame.lower.as_ref() == Some(&inode) { Ok(()) } else { self.output.inode(&inode) }
    }

    /// Notes that entries below the non-folder `leaf` belong where it points, if it is a symbolic link.
    fn redirect(&mut self, key: &[u8], leaf: &[u8], target: Option<&[u8]>) -> Result<()> {
        let Some(target) = target else {
            return Err(Error::invalid(format!(
                "{} lies below {}, which is not a folder",
                show_key(key),
                show_key(leaf)
            )));
        };
        let mut path = TreePath::root();
        if !target.starts_with(b"/") {
            let mut folder: Vec<&[u8]> = names(leaf).collect();
            folder.pop();
            folder.into_iter().try_for_each(|name| path.push(name))?;
        }
        for name in target.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => path.pop(),
                name => path.push(name)?,
            }
        }
        self.redirects.insert(leaf.to_vec(), path.key().to_vec());
        Ok(())
    }
}

/// A folder that no source describes.
fn implied(ino: Ino) -> Inode {
    Inode {
        ino,
        nlink: 2,
        attrs: Attrs::imported(0o755, 0, 0, Time::default()),
        xattrs: Vec::new(),
        node: Node::Folder,
    }
}
