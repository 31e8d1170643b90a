//! Files of uppers whose records were lost with the index.
//!
//! A rebuild that can't take over all records leaves a mark. Invariants: while it stands, no file of an upper is removed
//! for want of a record; it goes only once every such file lies in `uppers/lost/<upper>/`, out of the way of new ones, and
//! no number of an upper or inode that was lost can be given again. There only the user removes files.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{Error, Result};
use crate::id::{Ino, UpperId};
use crate::store::Store;
use crate::store::db::{Batch, Cf, Db, Sync};
use crate::store::lost_names::UPPERS_KEY;
use crate::upper::{COUNTER_KEY, UpperRecord, counter, folder_path, list, record_key, table};

/// If records were lost: puts aside what has none, and takes care that its numbers stay taken. Nobody uses an upper yet.
pub(super) fn settle(store: &Store) -> Result<()> {
    let db = store.db();
    if !db.contains(Cf::Meta, UPPERS_KEY)? {
        return Ok(());
    }
    let records = list(db)?;
    let alive: HashSet<UpperId> = records.iter().map(|record| record.id).collect();
    let mut last = counter(db)?.max(last_in_rows(db)?);
    for (name, path) in entries(&store.uppers_folder())? {
        let Ok(number) = name.parse() else { continue };
        last = last.max(number);
        if !alive.contains(&UpperId(number)) {
            put_aside(store, &path, &store.lost_uppers_folder(), &name)?;
        }
    }
    let mut batch = Batch::new();
    for record in records {
        let next_ino = settle_upper(store, &record)?;
        if next_ino > record.next_ino {
            batch.put(Cf::Uppers, record_key(record.id), UpperRecord { next_ino, ..record }.encode());
        }
    }
    batch.put(Cf::Uppers, COUNTER_KEY, last.to_le_bytes());
    batch.delete(Cf::Meta, UPPERS_KEY);
    db.write(batch, Sync::Yes)
}

/// The greatest number of an upper in the keys of rows: such a number isn't free though its record is lost.
fn last_in_rows(db: &Db) -> Result<u64> {
    let mut last = 0;
    for row in db.iter_from(Cf::Uppers, &[])? {
        let (key, _) = row?;
        if let [b'r' | b'i' | b'd' | b'm' | b'j' | b'w', rest @ ..] = &key[..]
            && let Some(number) = rest.first_chunk()
        {
            last = last.max(u64::from_be_bytes(*number));
        }
    }
    Ok(last)
}

/// Puts the files of an upper aside that no row refers to. Returns the least number that surely no inode had.
fn settle_upper(store: &Store, record: &UpperRecord) -> Result<Ino> {
    let (mut backed, mut last) = (HashSet::new(), 0);
    for row in store.db().iter(Cf::Uppers, &table::inode_prefix(record.id))? {
        let (inode, _) = table::decode_inode(&row?.1)?;
        last = last.max(inode.inode.ino.0);
        if inode.backed.is_some() {
            backed.insert(inode.inode.ino);
        }
    }
    let path = folder_path(store, record.id);
    if !path.exists() {
        return Ok(Ino(last + 1));
    }
    for (name, path) in entries(&path)? {
        let digits = name.strip_suffix(".map").unwrap_or(&name);
        let Ok(number) = u64::from_str_radix(digits, 16) else { continue };
        last = last.max(number);
        if !backed.contains(&Ino(number)) {
            let folder = store.lost_uppers_folder().join(record.id.to_string());
            put_aside(store, &path, &folder, &name)?;
        }
    }
    Ok(Ino(last + 1))
}

/// Moves `path` to `name` in `folder`, durably, or to a similar name if that is taken.
fn put_aside(store: &Store, path: &Path, folder: &Path, name: &str) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::file("create", folder, e))?;
    let taken = |to: &PathBuf| to.symlink_metadata().is_ok();
    let names = std::iter::once(name.to_owned()).chain((2..).map(|number: u64| format!("{name}.{number}")));
    let Some(to) = names.map(|name| folder.join(name)).find(|to| !taken(to)) else { return Ok(()) };
    durable::move_synced(path, &to)?;
    tracing::warn!(from = %path.display(), to = %to.display(), "the record of these files was lost with the index; they were put aside");
    for folder in [Some(folder), path.parent(), Some(&*store.uppers_folder())].into_iter().flatten() {
        durable::sync_folder(folder)?;
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |e| Error::file("list", folder, e);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        entries.extend(entry.file_name().to_str().map(|name| (name.to_owned(), entry.path())));
    }
    Ok(entries)
}
