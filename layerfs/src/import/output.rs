//! Collects a planned layer's records in any order and writes them in theirs.
//!
//! Hides: the sorts, and the bookkeeping of link counts of the parent's inodes that lose or gain names.

use std::path::Path;

use crate::attr::FileKind;
use crate::chunk::ChunkWrite;
use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::id::{Ino, LayerId};
use crate::import::builder::Base;
use crate::import::sorter::{Sorted, Sorter};
use crate::inode::{Dentry, Inode, Target};
use crate::manifest::{LayerWriter, Manifest};
use crate::view::View;

const RECORDS_BUDGET: usize = 8 * 1024 * 1024;
const COUNTS_BUDGET: usize = 2 * 1024 * 1024;

/// The records of a layer that is being planned.
#[derive(Debug)]
pub(super) struct Output {
    dentries: Sorter,
    inodes: Sorter,
    /// Number → change of the link count as `i64`, or nothing: the count is right as it is.
    counts: Sorter,
    buffer: Vec<u8>,
}

impl Output {
    pub fn new(folder: &Path) -> Output {
        Output {
            dentries: Sorter::new(folder, RECORDS_BUDGET),
            inodes: Sorter::new(folder, RECORDS_BUDGET),
            counts: Sorter::new(folder, COUNTS_BUDGET),
            buffer: Vec::new(),
        }
    }

    pub fn dentry(&mut self, folder: Ino, name: &[u8], target: Target) -> Result<()> {
        self.buffer.clear();
        self.buffer.extend_from_slice(&folder.0.to_be_bytes());
        self.buffer.extend_from_slice(name);
        let mut value = [0; 9];
        if let Target::Inode { ino, kind } = target {
            value[..8].copy_from_slice(&ino.0.to_le_bytes());
            value[8] = kind as u8;
        }
        self.dentries.push(&self.buffer, &value)
    }

    pub fn inode(&mut self, inode: &Inode) -> Result<()> {
        self.buffer.clear();
        inode.encode(&mut self.buffer);
        self.inodes.push(&inode.ino.0.to_be_bytes(), &self.buffer)
    }

    /// The parent's inode `ino` has `names` names more (or fewer).
    pub fn count(&mut self, ino: Ino, names: i64) -> Result<()> {
        self.counts.push(&ino.0.to_be_bytes(), &names.to_le_bytes())
    }

    /// The parent's record of `ino` holds, link count included, whatever becomes of its names there.
    pub fn settled(&mut self, ino: Ino) -> Result<()> {
        self.counts.push(&ino.0.to_be_bytes(), &[])
    }

    /// Writes the layer.
    pub fn write(self, out: &dyn ChunkWrite, base: Base<'_>, next_ino: Ino) -> Result<(LayerId, Manifest)> {
        let mut writer = LayerWriter::new(out);
        if let Some(image) = base.image {
            writer.image(image.clone());
        }
        write_dentries(&self.dentries.finish()?, &mut writer)?;
        let changed = changed_counts(&self.counts.finish()?, base.parent.map(|parent| parent.tree))?;
        write_inodes(&self.inodes.finish()?, changed, &mut writer)?;
        writer.finish(base.kind, base.parent.map(|parent| (parent.id, parent.manifest)), next_ino)
    }
}

fn number(bytes: &[u8]) -> Result<Ino> {
    let bytes = bytes.first_chunk().ok_or_else(|| Error::corrupt("temporary record", "a short key"))?;
    Ok(Ino(u64::from_be_bytes(*bytes)))
}

fn write_dentries(dentries: &Sorted, writer: &mut LayerWriter<'_>) -> Result<()> {
    let mut records = dentries.read()?;
    while records.advance()? {
        let mut value = Reader::new("temporary record", records.value());
        let (ino, kind) = (Ino(value.u64()?), value.u8()?);
        let target = FileKind::from_code(kind).map_or(Target::Whiteout, |kind| Target::Inode { ino, kind });
        writer.dentry(&Dentry { folder: number(records.key())?, name: records.key()[8..].to_vec(), target })?;
    }
    Ok(())
}

/// An inode of the parent whose link count may have changed: all that has to be known, in order of the numbers.
struct ChangedCounts<'a> {
    counts: Vec<(Ino, i64)>,
    lower: Option<&'a View>,
}

/// Adds up `counts`; those that are settled drop out.
fn changed_counts<'a>(counts: &Sorted, lower: Option<&'a View>) -> Result<ChangedCounts<'a>> {
    let mut changed: Vec<(Ino, i64)> = Vec::new();
    let mut settled = None;
    let mut records = counts.read()?;
    while records.advance()? {
        let ino = number(records.key())?;
        match records.value().first_chunk() {
            None => {
                settled = Some(ino);
                changed.pop_if(|(last, _)| *last == ino);
            }
            Some(_) if settled == Some(ino) => {}
            Some(names) => {
                let names = i64::from_le_bytes(*names);
                match changed.last_mut().filter(|(last, _)| *last == ino) {
                    Some((_, sum)) => *sum += names,
                    None => {
                        // Most removed files had one name: nothing is left to be recorded.
                        drop_if_gone(&mut changed, lower)?;
                        changed.push((ino, names));
                    }
                }
            }
        }
    }
    drop_if_gone(&mut changed, lower)?;
    Ok(ChangedCounts { counts: changed, lower })
}

fn drop_if_gone(changed: &mut Vec<(Ino, i64)>, lower: Option<&View>) -> Result<()> {
    if let Some((ino, sum)) = changed.last() {
        let before =
            lower.map(|lower| lower.inode(*ino)).transpose()?.flatten().map_or(0, |inode| i64::from(inode.nlink));
        if *sum == 0 || before + sum <= 0 {
            changed.pop();
        }
    }
    Ok(())
}

fn write_inodes(inodes: &Sorted, changed: ChangedCounts<'_>, writer: &mut LayerWriter<'_>) -> Result<()> {
    let mut counts = changed.counts.into_iter().peekable();
    let mut recount = |before: Option<Ino>, writer: &mut LayerWriter<'_>| -> Result<()> {
        while let Some((ino, names)) = counts.next_if(|(ino, _)| before.is_none_or(|before| *ino <= before)) {
            if Some(ino) == before {
                continue;
            }
            if let Some(mut inode) = changed.lower.map(|lower| lower.inode(ino)).transpose()?.flatten() {
                inode.nlink = u32::try_from(i64::from(inode.nlink) + names).unwrap_or(u32::MAX);
                writer.inode(&inode)?;
            }
        }
        Ok(())
    };
    let mut records = inodes.read()?;
    let mut last = None;
    while records.advance()? {
        let ino = number(records.key())?;
        if last == Some(ino) {
            return Err(Error::corrupt("predecessor layer", format!("two paths of it claim inode number {ino}")));
        }
        last = Some(ino);
        recount(Some(ino), writer)?;
        writer.inode(&Inode::decode(&mut Reader::new("temporary record", records.value()))?)?;
    }
    recount(None, writer)
}
