//! Finds out which paths of a source are names of one inode.
//!
//! Hides: the joins over sorted files by which links in any order, links to links, and links to what the parent
//! has are resolved in bounded memory. Invariant: the result depends on what is linked with what, not on
//! which of an inode's names the source took for the first.

use std::collections::HashMap;
use std::path::Path;

use crate::attr::FileKind;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::import::entry::{Held, Winners};
use crate::import::path::{names, show_key};
use crate::import::sorter::{Sorted, Sorter};
use crate::view::View;

/// The longest chain of links to links. Archivers write none; a cycle is one that is longer.
const MAX_CHAIN: usize = 40;
const LINKS_BUDGET: usize = 4 * 1024 * 1024;

/// An inode with several names in the source, or one that belongs to the parent and gets names.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkSet {
    /// Its number, once it is known.
    pub ino: Option<Ino>,
    /// Its kind.
    pub kind: FileKind,
    /// How many names the source gives to it.
    pub names: u32,
    /// The number of the parent's inode whose names all belong to this set, if there is one.
    pub replaces: Option<Ino>,
    /// Whether it is the parent's inode: the source has only names for it.
    pub from_parent: bool,
}

impl LinkSet {
    fn new(kind: FileKind) -> LinkSet {
        LinkSet { ino: None, kind, names: 0, replaces: None, from_parent: false }
    }
}

/// All sets, and which paths belong to which.
pub(super) struct LinkSets {
    pub sets: Vec<LinkSet>,
    /// Path key → the set's index, as four bytes, little endian.
    pub members: Sorted,
    /// What a link refers to is not there. It may turn out to be elsewhere, behind a symbolic link.
    pub dangling: Option<Error>,
}

/// Resolves the hard links among `entries`, which lie on `lower`; links may refer to that too if `into_lower`.
pub(super) fn resolve(entries: &Sorted, lower: Option<&View>, into_lower: bool, folder: &Path) -> Result<LinkSets> {
    let mut pending = Sorter::new(folder, LINKS_BUDGET);
    let mut winners = Winners::new(entries)?;
    while winners.advance()? {
        if winners.held == Held::HardLink {
            pending.push(winners.link_target(), &winners.key)?;
        }
    }
    let mut resolved = Sorter::new(folder, LINKS_BUDGET);
    let mut in_lower = Sorter::new(folder, LINKS_BUDGET);
    let mut dangling = None;
    for _ in 0..MAX_CHAIN {
        if pending.is_empty() {
            let (sets, members) = collect(&resolved.finish()?, &in_lower.finish()?, lower, folder)?;
            return Ok(LinkSets { sets, members, dangling });
        }
        pending = follow(
            entries,
            &pending.finish()?,
            lower.filter(|_| into_lower),
            folder,
            &mut Followed { resolved: &mut resolved, in_lower: &mut in_lower, dangling: &mut dangling },
        )?;
    }
    let pending = pending.finish()?;
    let mut records = pending.read()?;
    records.advance()?;
    Err(Error::invalid(format!(
        "hard link {} refers to itself, or to a chain of more than {MAX_CHAIN} links",
        show_key(records.value())
    )))
}

/// Where links go that need not be followed any further.
struct Followed<'a> {
    resolved: &'a mut Sorter,
    in_lower: &'a mut Sorter,
    dangling: &'a mut Option<Error>,
}

/// Takes each pending (target, link) one step on; returns those whose target is itself a link.
fn follow(
    entries: &Sorted,
    pending: &Sorted,
    lower: Option<&View>,
    folder: &Path,
    to: &mut Followed<'_>,
) -> Result<Sorter> {
    let mut next = Sorter::new(folder, LINKS_BUDGET);
    let mut links = pending.read()?;
    let mut winners = Winners::new(entries)?;
    let mut more = winners.advance()?;
    while links.advance()? {
        while more && winners.key.as_slice() < links.key() {
            more = winners.advance()?;
        }
        let held = if more && winners.key == links.key() { winners.held } else { Held::Nothing };
        match held {
            Held::Node(FileKind::Folder) => return Err(to_folder(links.value(), links.key())),
            Held::Node(kind) => {
                let mut value = vec![kind as u8];
                value.extend_from_slice(links.value());
                to.resolved.push(links.key(), &value)?;
            }
            Held::HardLink => next.push(winners.link_target(), links.value())?,
            Held::Nothing => match lower.map(|lower| find(lower, links.key())).transpose()?.flatten() {
                Some((_, FileKind::Folder)) => return Err(to_folder(links.value(), links.key())),
                Some((ino, kind)) => {
                    let mut value = vec![kind as u8];
                    value.extend_from_slice(links.value());
                    to.in_lower.push(&ino.0.to_be_bytes(), &value)?;
                }
                None => {
                    let (link, target) = (show_key(links.value()), show_key(links.key()));
                    *to.dangling =
                        Some(Error::invalid(format!("hard link {link} refers to {target}, which is not there")));
                }
            },
        }
    }
    Ok(next)
}

fn to_folder(link: &[u8], target: &[u8]) -> Error {
    Error::invalid(format!("hard link {} refers to {}, which is a folder", show_key(link), show_key(target)))
}

/// Numbers the sets and lists their members by path.
fn collect(
    resolved: &Sorted,
    in_lower: &Sorted,
    lower: Option<&View>,
    folder: &Path,
) -> Result<(Vec<LinkSet>, Sorted)> {
    let mut sets = Vec::new();
    let mut members = Sorter::new(folder, LINKS_BUDGET);
    let mut records = resolved.read()?;
    let mut target: Option<Vec<u8>> = None;
    let mut counts = HashMap::new();
    while records.advance()? {
        let (kind, link) = split_kind(records.value())?;
        if target.as_deref() != Some(records.key()) {
            close(&mut sets, lower, &mut counts)?;
            sets.push(LinkSet::new(kind));
            let key = records.key().to_vec();
            member(&mut sets, &mut members, &key, lower, &mut counts)?;
            target = Some(key);
        }
        member(&mut sets, &mut members, link, lower, &mut counts)?;
    }
    close(&mut sets, lower, &mut counts)?;
    let mut records = in_lower.read()?;
    let mut last = None;
    while records.advance()? {
        let mut number = [0; 8];
        number.copy_from_slice(records.key());
        let ino = Ino(u64::from_be_bytes(number));
        let (kind, link) = split_kind(records.value())?;
        if last != Some(ino) {
            last = Some(ino);
            sets.push(LinkSet { ino: Some(ino), from_parent: true, ..LinkSet::new(kind) });
        }
        members.push(link, &index_of_last(&sets))?;
    }
    Ok((sets, members.finish()?))
}

fn split_kind(value: &[u8]) -> Result<(FileKind, &[u8])> {
    let parts = value.split_first().and_then(|(kind, link)| Some((FileKind::from_code(*kind)?, link)));
    parts.ok_or_else(|| Error::corrupt("temporary record", "no kind"))
}

fn index_of_last(sets: &[LinkSet]) -> [u8; 4] {
    (sets.len() as u32 - 1).to_le_bytes()
}

fn member(
    sets: &mut [LinkSet],
    members: &mut Sorter,
    key: &[u8],
    lower: Option<&View>,
    counts: &mut HashMap<Ino, u32>,
) -> Result<()> {
    members.push(key, &index_of_last(sets))?;
    if let Some(set) = sets.last_mut() {
        set.names += 1;
    }
    if let Some((ino, kind)) = lower.map(|lower| find(lower, key)).transpose()?.flatten()
        && kind != FileKind::Folder
    {
        *counts.entry(ino).or_insert(0) += 1;
    }
    Ok(())
}

/// Ends the last set: the parent's inode with the smallest number all of whose names are in the set may go on
/// as this inode.
fn close(sets: &mut [LinkSet], lower: Option<&View>, counts: &mut HashMap<Ino, u32>) -> Result<()> {
    let mut candidates: Vec<_> = counts.drain().collect();
    candidates.sort_unstable();
    if let (Some(set), Some(lower)) = (sets.last_mut(), lower) {
        for (ino, count) in candidates {
            if lower.inode(ino)?.is_some_and(|inode| inode.nlink == count && inode.kind() == set.kind) {
                set.replaces = Some(ino);
                break;
            }
        }
    }
    Ok(())
}

/// What `view` has at the path `key`, without following symbolic links.
fn find(view: &View, key: &[u8]) -> Result<Option<(Ino, FileKind)>> {
    let mut found = (Ino::ROOT, FileKind::Folder);
    for name in names(key) {
        if found.1 != FileKind::Folder {
            return Ok(None);
        }
        match view.lookup(found.0, name)? {
            Some(next) => found = next,
            None => return Ok(None),
        }
    }
    Ok(Some(found))
}
