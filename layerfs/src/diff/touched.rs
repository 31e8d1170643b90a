//! Which inodes of two stacks may differ: those that the layers which they don't share mention, and every folder
//! on the way to them.
//!
//! Invariant: a folder that has the same number in both trees and isn't in the set is the same in both, with all
//! that is below it. The set may be too large, never too small: names that a higher layer has replaced count too.

use std::collections::HashSet;

use crate::error::Result;
use crate::id::Ino;
use crate::inode::Target;
use crate::view::View;

/// More touched inodes than this aren't remembered: then everything is compared.
const MOST_REMEMBERED: u64 = 1_000_000;

pub(super) struct Touched {
    /// None if everything may differ.
    inos: Option<HashSet<Ino>>,
    has_shared_layers: bool,
}

impl Touched {
    pub(super) fn between(old: &View, new: &View) -> Result<Touched> {
        let (old, new) = (old.layers(), new.layers());
        // Stacks are chains of parents: what they share is at their bottom.
        let shared = old.iter().rev().zip(new.iter().rev()).take_while(|(old, new)| old.id == new.id).count();
        let own = || old[..old.len() - shared].iter().chain(&new[..new.len() - shared]);
        let records = own().map(|layer| layer.table.inode_count().saturating_add(layer.table.dentry_count()));
        let count = records.fold(0u64, u64::saturating_add);
        if shared == 0 || count > MOST_REMEMBERED {
            return Ok(Touched { inos: None, has_shared_layers: shared > 0 });
        }
        let mut inos = HashSet::new();
        for layer in own() {
            inos.extend((0..layer.table.inode_count()).map(|position| layer.table.ino_at(position)));
            inos.extend(layer.table.folders());
        }
        // Parents mostly have lower numbers than what is in them: from the end, one round finds nearly all.
        loop {
            let before = inos.len();
            for layer in &new[new.len() - shared..] {
                for dentry in layer.table.dentries().rev() {
                    let dentry = dentry?;
                    if matches!(dentry.target, Target::Inode { ino, .. } if inos.contains(&ino)) {
                        inos.insert(dentry.folder);
                    }
                }
            }
            if inos.len() == before {
                return Ok(Touched { inos: Some(inos), has_shared_layers: true });
            }
        }
    }

    pub(super) fn contains(&self, ino: Ino) -> bool {
        self.inos.as_ref().is_none_or(|inos| inos.contains(&ino))
    }

    /// Whether the stacks share layers, so that their inode numbers mean the same.
    pub(super) fn has_shared_layers(&self) -> bool {
        self.has_shared_layers
    }
}
