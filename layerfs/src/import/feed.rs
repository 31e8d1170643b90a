//! The way from a source's reader into a layer: entries and contents go through the store's parallel pipeline
//! into the builder, in the order in which they come.
//!
//! Invariant: nothing here knows a format; nothing is named.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::attr::{Attrs, Xattrs};
use crate::chunker::Chunker;
use crate::content::Content;
use crate::error::Result;
use crate::id::LayerId;
use crate::import::builder::{Base, Builder};
use crate::import::entry::Entry;
use crate::import::path::TreePath;
use crate::inode::Node;
use crate::manifest::Manifest;
use crate::monitor::{Monitor, check};
use crate::store::{Ingest, Session, Source, SourcePiece};

/// An entry on its way; a file's content comes after it.
enum Tag {
    Entry(TreePath, Entry),
    File(TreePath, Attrs, Xattrs),
}

impl Tag {
    /// What it holds in memory besides itself, in bytes.
    fn held_bytes(&self) -> usize {
        let of_xattrs = |xattrs: &Xattrs| -> usize {
            xattrs.iter().map(|xattr| size_of_val(xattr) + xattr.0.len() + xattr.1.len()).sum()
        };
        match self {
            Tag::File(path, _, xattrs) => path.key().len() + of_xattrs(xattrs),
            Tag::Entry(path, entry) => {
                path.key().len()
                    + match entry {
                        Entry::Node { xattrs, node: Node::Symlink(target), .. } => of_xattrs(xattrs) + target.len(),
                        Entry::Node { xattrs, .. } => of_xattrs(xattrs),
                        Entry::HardLink(target) => target.key().len(),
                        Entry::Whiteout | Entry::Opaque => 0,
                    }
            }
        }
    }
}

/// For the keys of paths, the offsets at which the files there are cut.
pub(super) type Cuts = BTreeMap<Vec<u8>, Vec<u64>>;

type Sink<'a> = Box<dyn FnMut(Tag, Option<Content>) -> Result<()> + 'a>;

/// Entries are counted towards the monitor in groups of this many.
const COUNT_EVERY: u64 = 256;

/// Takes what a source has for one layer.
pub(super) struct Feed<'a> {
    ingest: Ingest<'a, Tag, Sink<'a>>,
    monitor: &'a dyn Monitor,
    cutting: Cutting<'a>,
    entries: u64,
    bytes: u64,
    warnings: u64,
}

/// How a layer's files are cut.
#[derive(Clone, Copy)]
pub(super) struct Cutting<'a> {
    /// Those that nothing else is said of.
    pub chunker: Chunker,
    /// By path, where those are cut that have their places named.
    pub cuts: &'a Cuts,
}

/// How much a feed has taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    /// Entries.
    pub entries: u64,
    /// Bytes of files' contents that were read.
    pub bytes: u64,
    /// Remarks for the user.
    pub warnings: u64,
}

impl Feed<'_> {
    /// Takes anything but a regular file with content.
    pub fn entry(&mut self, path: TreePath, entry: Entry) -> Result<()> {
        self.count()?;
        self.ingest.pass(Tag::Entry(path, entry))
    }

    /// Takes a regular file.
    pub fn file(&mut self, path: TreePath, attrs: Attrs, xattrs: Xattrs, source: &mut dyn Source) -> Result<()> {
        self.count()?;
        let mut counted = Counted { source, monitor: self.monitor, bytes: 0 };
        let cuts = self.cutting.cuts.get(path.key());
        let tag = Tag::File(path, attrs, xattrs);
        let result = match cuts {
            Some(cuts) => self.ingest.file_at(tag, cuts, &mut counted),
            None => self.ingest.file(tag, self.cutting.chunker, &mut counted),
        };
        self.bytes += counted.bytes;
        result
    }

    /// Tells the user something that doesn't stop the import.
    pub fn warn(&mut self, message: &str) {
        self.warnings += 1;
        self.monitor.warn(message);
    }

    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries.is_multiple_of(COUNT_EVERY) {
            self.monitor.items(COUNT_EVERY);
            check(self.monitor)?;
        }
        Ok(())
    }
}

/// Reports what is read, and stops when the work is cancelled.
struct Counted<'a> {
    source: &'a mut dyn Source,
    monitor: &'a dyn Monitor,
    bytes: u64,
}

impl Source for Counted<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        let piece = self.source.next(buffer)?;
        if let SourcePiece::Data(count) = piece {
            self.bytes += count as u64;
            self.monitor.advance(count as u64);
            check(self.monitor)?;
        }
        Ok(piece)
    }
}

/// Makes a layer over `base` of what `source` feeds.
pub(super) fn layer(
    session: &Arc<Session>,
    base: Base<'_>,
    cutting: Cutting<'_>,
    monitor: &dyn Monitor,
    source: impl FnOnce(&mut Feed<'_>) -> Result<()>,
) -> Result<(LayerId, Manifest, Taken)> {
    let mut builder = Builder::new(&session.store().tmp_folder());
    let taken = take(session, &mut builder, cutting, monitor, source)?;
    let (id, manifest) = builder.finish(&**session, base, monitor)?;
    Ok((id, manifest, taken))
}

fn take<'a>(
    session: &'a Session,
    builder: &'a mut Builder,
    cutting: Cutting<'a>,
    monitor: &'a dyn Monitor,
    source: impl FnOnce(&mut Feed<'_>) -> Result<()>,
) -> Result<Taken> {
    let sink = |tag, content: Option<Content>| match tag {
        Tag::Entry(path, entry) => builder.add(&path, entry),
        Tag::File(path, attrs, xattrs) => {
            let node = Node::File(content.unwrap_or_else(Content::empty));
            builder.add(&path, Entry::Node { attrs, xattrs, node })
        }
    };
    let ingest = session.ingest(Box::new(sink) as Sink<'a>).weighing(Tag::held_bytes);
    let mut feed = Feed { ingest, monitor, cutting, entries: 0, bytes: 0, warnings: 0 };
    source(&mut feed)?;
    let Feed { ingest, entries, bytes, warnings, .. } = feed;
    ingest.finish()?;
    monitor.items(entries % COUNT_EVERY);
    Ok(Taken { entries, bytes, warnings })
}
