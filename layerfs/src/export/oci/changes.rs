//! What one layer changes, as OCI's layers say it: entries, and whiteouts for what is removed.
//!
//! Decision hidden here: a layer of ours tells names and inodes apart, one of OCI's has whole paths only. So all names of an
//! inode stand in a layer that gives it another name: the archive has no other way to say what the new one is a link to.

use std::cmp::Ordering;
use std::collections::HashSet;

use super::super::tar::TarWriter;
use crate::attr::FileKind;
use crate::diff::{What, layer_changes};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::{Inode, Target};
use crate::view::View;
use crate::walk::Walker;

/// Writes what the top layer of `view` changes.
pub fn write_changes(view: &View, tar: &mut TarWriter<'_, '_>) -> Result<()> {
    let below = view.below();
    let mut names = OtherNames::new(&below, view)?;
    let mut way = Way::new(view);
    for change in layer_changes(&below, view) {
        let change = change?;
        while let Some((path, inode)) = names.before(Some(&change.path))? {
            way.lead_to(&path, tar)?;
            tar.inode(checked(&path)?, &inode)?;
        }
        let path = checked(&change.path)?;
        way.lead_to(path, tar)?;
        match (change.what, &change.new) {
            (What::Removed, _) | (_, None) => tar.marker(&whiteout(path))?,
            (_, Some(inode)) => {
                tar.inode(path, inode)?;
                match inode.kind() {
                    FileKind::Folder => way.enter(path, inode.ino),
                    // Archives hold none, but what it has replaced is gone all the same.
                    FileKind::Socket if change.old.is_some_and(|old| old.kind() != FileKind::Socket) => {
                        tar.marker(&whiteout(path))?;
                    }
                    _ => {}
                }
            }
        }
    }
    while let Some((path, inode)) = names.before(None)? {
        way.lead_to(&path, tar)?;
        tar.inode(checked(&path)?, &inode)?;
    }
    Ok(())
}

/// The folders above what is written, which are written too: extractors give a folder that a layer doesn't hold attributes of
/// their own.
struct Way<'v> {
    view: &'v View,
    /// The folders that lead to the last path and are written: where each one's path ends, and its inode.
    folders: Vec<(usize, Ino)>,
    last: Vec<u8>,
}

impl<'v> Way<'v> {
    fn new(view: &'v View) -> Way<'v> {
        Way { view, folders: Vec::new(), last: Vec::new() }
    }

    /// Writes those of the folders above `path` that aren't written yet. Paths come in the order of a walk.
    fn lead_to(&mut self, path: &[u8], tar: &mut TarWriter<'_, '_>) -> Result<()> {
        let last = &self.last;
        self.folders.retain(|(end, _)| path.get(*end) == Some(&b'/') && path[..*end] == last[..*end]);
        let mut start = self.folders.last().map_or(0, |(end, _)| end + 1);
        while let Some(slash) = path[start..].iter().position(|byte| *byte == b'/') {
            let (folder, end) = (self.folders.last().map_or(Ino::ROOT, |(_, ino)| *ino), start + slash);
            let found = self.view.lookup(folder, &path[start..end])?;
            let (ino, _) = found.ok_or_else(|| Error::corrupt("layer", "a changed path leads nowhere"))?;
            tar.inode(&path[..end], &self.view.expect_inode(ino)?)?;
            self.folders.push((end, ino));
            start = end + 1;
        }
        self.last = path.to_vec();
        Ok(())
    }

    /// The path that was led to last is a folder, and is written.
    fn enter(&mut self, path: &[u8], ino: Ino) {
        if !path.is_empty() {
            self.folders.push((path.len(), ino));
        }
    }
}

/// The names that the layers below gave to inodes to which the top layer gives one. They are among the changes only if
/// something else of the inode differs, such as the number of its names. Memory: a number for each such inode.
struct OtherNames<'v> {
    view: &'v View,
    inos: HashSet<Ino>,
    /// None without such inodes.
    walker: Option<Walker<'v>>,
    next: Option<(Vec<u8>, Ino)>,
}

impl<'v> OtherNames<'v> {
    fn new(below: &View, view: &'v View) -> Result<OtherNames<'v>> {
        let mut inos = HashSet::new();
        if let (Some(top), Some(_)) = (view.layers().first(), below.top()) {
            for dentry in top.table.dentries() {
                let Target::Inode { ino, kind } = dentry?.target else { continue };
                if kind != FileKind::Folder
                    && view.stat(ino)?.is_some_and(|stat| stat.nlink > 1)
                    && below.place(ino).is_some()
                {
                    inos.insert(ino);
                }
            }
        }
        let walker = (!inos.is_empty()).then(|| Walker::new(view));
        let mut names = OtherNames { view, inos, walker, next: None };
        names.advance()?;
        Ok(names)
    }

    fn advance(&mut self) -> Result<()> {
        self.next = None;
        let Some(walker) = &mut self.walker else { return Ok(()) };
        while let Some(entry) = walker.next_entry()? {
            if self.inos.contains(&entry.ino) {
                self.next = Some((entry.path.to_vec(), entry.ino));
                return Ok(());
            }
        }
        Ok(())
    }

    /// The next name that a walk meets before `path`, or at all. One that equals `path` is passed over.
    fn before(&mut self, path: Option<&[u8]>) -> Result<Option<(Vec<u8>, Inode)>> {
        let Some((name, ino)) = &self.next else { return Ok(None) };
        let is_slash = |byte: &u8| *byte == b'/';
        let order = path.map_or(Ordering::Less, |path| name.split(is_slash).cmp(path.split(is_slash)));
        if order.is_gt() {
            return Ok(None);
        }
        let found = (name.clone(), self.view.expect_inode(*ino)?);
        self.advance()?;
        Ok(order.is_lt().then_some(found))
    }
}

/// Fails if OCI layers cannot hold `path`, because its last part would be taken for a whiteout.
fn checked(path: &[u8]) -> Result<&[u8]> {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
    if name.starts_with(b".wh.") {
        let path = path.escape_ascii();
        return Err(Error::invalid(format!("OCI layers cannot hold \"{path}\": .wh. marks whiteouts; export a tar")));
    }
    Ok(path)
}

/// The path of the whiteout of `path`.
fn whiteout(path: &[u8]) -> Vec<u8> {
    let name_at = path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1);
    [&path[..name_at], b".wh.", &path[name_at..]].concat()
}
