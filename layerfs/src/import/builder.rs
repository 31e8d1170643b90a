//! Turns a source's entries, in any order, into a layer.
//!
//! Hides: the external sort, and that a layer may have to be planned again when entries turn out to lie below
//! a symbolic link. Invariants: the layer depends on what the entries say, not on their order (but for several
//! entries of one path); memory is bounded whatever their number.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::chunk::ChunkWrite;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::{Ino, LayerId};
use crate::import::entry::{Entry, rewrite};
use crate::import::links;
use crate::import::output::Output;
use crate::import::path::{TreePath, show_key};
use crate::import::plan::Planner;
use crate::import::sorter::{Sorted, Sorter};
use crate::manifest::{LayerKind, Manifest};
use crate::monitor::Monitor;
use crate::view::View;

const ENTRIES_BUDGET: usize = 12 * 1024 * 1024;
/// As many symbolic links may lead from an entry's path to where it comes to lie, as on Linux.
const MAX_SYMLINKS: usize = 40;

/// What a new layer lies on, and how.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The layer below.
    pub parent: Option<Parent<'a>>,
    /// A known predecessor: its numbers are used for the same paths.
    pub like: Option<&'a View>,
    /// Whether the entries are the whole tree: what the parent has besides is gone.
    pub whole: bool,
    /// What the layer is for.
    pub kind: LayerKind,
    /// What the image whose top layer it is says of itself.
    pub image: Option<&'a Content>,
}

/// The layer below.
#[derive(Clone, Copy)]
pub struct Parent<'a> {
    /// Its id.
    pub id: LayerId,
    /// Its manifest.
    pub manifest: &'a Manifest,
    /// Its merged tree.
    pub tree: &'a View,
}

/// Takes entries.
#[derive(Debug)]
pub struct Builder {
    folder: PathBuf,
    entries: Sorter,
    sequence: u64,
    has_links: bool,
    buffer: Vec<u8>,
}

impl Builder {
    /// A builder that spills to files without name in `folder`.
    pub fn new(folder: &Path) -> Builder {
        Builder {
            folder: folder.to_owned(),
            entries: Sorter::new(folder, ENTRIES_BUDGET),
            sequence: 0,
            has_links: false,
            buffer: Vec::new(),
        }
    }

    /// Takes an entry. A later entry of the same path replaces it.
    pub fn add(&mut self, path: &TreePath, entry: Entry) -> Result<()> {
        self.sequence += 1;
        self.has_links |= matches!(entry, Entry::HardLink(_));
        entry.encode(self.sequence, &mut self.buffer);
        self.entries.push(path.key(), &self.buffer)
    }

    /// How many entries were taken.
    pub fn len(&self) -> u64 {
        self.sequence
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.sequence == 0
    }

    /// Writes the layer into `out`, where the chunks of the files' contents must be already.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the entries make no tree: something below a file, a hard link to nowhere or in a
    /// cycle; else those of `out`, of the parent's store and of the temporary files.
    pub fn finish(self, out: &dyn ChunkWrite, base: Base<'_>, monitor: &dyn Monitor) -> Result<(LayerId, Manifest)> {
        let Builder { folder, entries, has_links, .. } = self;
        let mut entries = entries.finish()?;
        for _ in 0..MAX_SYMLINKS {
            let mut output = Output::new(&folder);
            match plan(&entries, has_links, base, &folder, &mut output, monitor)? {
                Planned::Done(next_ino) => return output.write(out, base, next_ino),
                Planned::Redirected(redirects) => entries = redirect(&entries, &redirects, &folder)?,
            }
        }
        Err(Error::invalid("entries lie below symbolic links that refer to each other, or to more than 40 others"))
    }
}

/// Where entries below symbolic links belong: key of the link → key of what it refers to.
pub(super) type Redirects = BTreeMap<Vec<u8>, Vec<u8>>;

enum Planned {
    /// All is in the output; the number that comes after all others.
    Done(Ino),
    /// Some entries lie below symbolic links.
    Redirected(Redirects),
}

fn plan(
    entries: &Sorted,
    has_links: bool,
    base: Base<'_>,
    folder: &Path,
    output: &mut Output,
    monitor: &dyn Monitor,
) -> Result<Planned> {
    let lower = base.parent.map(|parent| parent.tree);
    let mut links = if has_links {
        // A link to what only the parent has makes no sense in a source that is the whole tree.
        Some(links::resolve(entries, lower, !base.whole, folder)?)
    } else {
        None
    };
    let dangling = links.as_mut().and_then(|links| links.dangling.take());
    let (next_ino, redirects) = Planner::new(base, links, output)?.run(entries, monitor)?;
    match dangling {
        _ if !redirects.is_empty() => Ok(Planned::Redirected(redirects)),
        Some(error) => Err(error),
        None => Ok(Planned::Done(next_ino)),
    }
}

fn redirect(entries: &Sorted, redirects: &Redirects, folder: &Path) -> Result<Sorted> {
    let mut sorter = Sorter::new(folder, ENTRIES_BUDGET);
    let moved = |key: &[u8]| -> Result<Option<Vec<u8>>> {
        let ends = key.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(position, _)| position);
        for end in ends {
            if let Some(target) = redirects.get(&key[..end]) {
                let rest = if target.is_empty() { &key[end + 1..] } else { &key[end..] };
                let moved = [target, rest].concat();
                if moved.len() > super::path::MAX_PATH {
                    return Err(Error::invalid(format!("{} is too long behind its symbolic link", show_key(key))));
                }
                return Ok(Some(moved));
            }
        }
        Ok(None)
    };
    let mut records = entries.read()?;
    while records.advance()? {
        let key = moved(records.key())?;
        let value = rewrite(records.value(), &moved)?;
        sorter.push(key.as_deref().unwrap_or(records.key()), value.as_deref().unwrap_or(records.value()))?;
    }
    sorter.finish()
}

#[cfg(test)]
mod tests;
