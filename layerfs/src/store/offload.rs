//! Work with the second tier: uploading packs, removing their files here, fetching them back.
//!
//! Invariants: an uploaded pack is never appended to again; the record that says "stored" is written after the upload
//! was confirmed, and the file goes after that record is durable; what a crash leaves in between is uploaded again, or
//! removed there, by the next run.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::durable;
use crate::error::{Error, ErrorClass, Result};
use crate::failpoint;
use crate::monitor::{self, Monitor};
use crate::store::Store;
use crate::store::pack::{PackId, TARGET_BYTES};
use crate::store::space;
use crate::store::tier::{Objects, Record, State};

/// What lies where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TierStat {
    /// Packs that are in the tier.
    pub stored_packs: u64,
    /// Their sizes added up, in bytes.
    pub stored_bytes: u64,
    /// Packs that are only there.
    pub remote_packs: u64,
    /// Their sizes added up, in bytes.
    pub remote_bytes: u64,
    /// Packs that are only here.
    pub local_packs: u64,
    /// Their sizes added up, in bytes.
    pub local_bytes: u64,
    /// Packs that are to be removed there.
    pub dead_packs: u64,
}

/// What was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Moved {
    /// Packs.
    pub packs: u64,
    /// Their sizes added up, in bytes.
    pub bytes: u64,
}

/// Which packs to upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that are full.
    Full,
    /// All that nobody appends to just now.
    All,
}

/// A pack that is claimed until this is dropped.
struct Claim<'a>(&'a Store, PackId);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.packs.release(self.1);
    }
}

impl Store {
    /// Uses `objects` as second tier from now on; without any, packs that are only there can't be read.
    pub fn connect_tier(&self, objects: Option<Arc<dyn Objects>>) {
        self.packs.tier().connect(objects);
    }

    /// Whether there is a second tier to talk to.
    pub fn has_tier(&self) -> bool {
        self.packs.tier().is_connected()
    }

    /// What lies where.
    pub fn tier_stat(&self) -> Result<TierStat> {
        let local = self.packs.list()?;
        let mut stat = TierStat::default();
        for (id, bytes) in &local {
            if self.packs.tier().stored(*id).is_none() {
                stat.local_packs += 1;
                stat.local_bytes += bytes;
            }
        }
        let here: HashSet<PackId> = local.into_iter().map(|(id, _)| id).collect();
        for (id, record) in self.packs.tier().all() {
            match record.state {
                State::Stored => {
                    stat.stored_packs += 1;
                    stat.stored_bytes += record.bytes;
                    if !here.contains(&id) {
                        stat.remote_packs += 1;
                        stat.remote_bytes += record.bytes;
                    }
                }
                State::Dead => stat.dead_packs += 1,
                State::Uploading => {}
            }
        }
        Ok(stat)
    }

    /// Uploads packs that aren't in the tier yet, and removes there what is dead.
    ///
    /// # Errors
    /// [`Error::Tier`]; [`Error::Busy`] if another such work is running. What was uploaded before stays so. That of a pack
    /// which can't be read here, or of a removal that isn't allowed, after all others were uploaded.
    pub fn tier_sync(&self, which: Which, monitor: &dyn Monitor) -> Result<Moved> {
        self.check_writable()?;
        let tier = self.packs.tier();
        let _working = tier.working.try_lock().ok_or_else(busy)?;
        let objects = tier.objects()?;
        let mut failed = match self.remove_dead_objects(&*objects) {
            // Keys that may not remove anything may upload all the same.
            Err(error) if error.class() == ErrorClass::Denied => Some(error),
            removed => removed.map(|()| None)?,
        };
        let wanted =
            |id: PackId, bytes: u64| tier.stored(id).is_none() && (which == Which::All || bytes >= TARGET_BYTES);
        let packs: Vec<_> = self.packs.list()?.into_iter().filter(|(id, bytes)| wanted(*id, *bytes)).collect();
        monitor.phase("uploading packs", Some(packs.iter().map(|(_, bytes)| bytes).sum()));
        let mut moved = Moved::default();
        for (id, bytes) in packs {
            monitor::check(monitor)?;
            if !self.packs.claim(id) {
                continue;
            }
            let _claim = Claim(self, id);
            // A collection may have removed it since the list was made.
            if self.packs.path(id).exists() {
                match self.upload(id, &*objects, monitor) {
                    Ok(()) => {
                        moved.packs += 1;
                        moved.bytes += bytes;
                    }
                    // A disk that fails is a reason to bring its other packs to safety.
                    Err(error @ (Error::File { .. } | Error::Io { .. })) => {
                        monitor.warn(&format!("pack {id} is not uploaded: {error}"));
                        failed.get_or_insert(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            monitor.items(1);
        }
        failed.map_or(Ok(moved), Err)
    }

    fn upload(&self, id: PackId, objects: &dyn Objects, monitor: &dyn Monitor) -> Result<()> {
        let path = self.packs.path(id);
        let (hash, bytes) = hash_file(&path)?;
        let record = Record { state: State::Uploading, hash, bytes };
        // An upload that was cut off, of a file that has changed since: nothing would name its object any more.
        if let Some(before) = self.packs.tier().record(id).filter(|before| before.hash != hash) {
            objects.remove(&before.object())?;
        }
        self.packs.tier().set(id, Some(record))?;
        failpoint::hit("tier.begun");
        objects.put(&record.object(), &path, monitor)?;
        let found = objects.size(&record.object())?;
        if found != Some(bytes) {
            return Err(Error::corrupt("uploaded pack", format!("{id} has {found:?} bytes there instead of {bytes}")));
        }
        failpoint::hit("tier.uploaded");
        self.packs.tier().set(id, Some(Record { state: State::Stored, ..record }))?;
        failpoint::hit("tier.recorded");
        Ok(())
    }

    /// Removes objects that nothing needs: dead ones, and those of uploads that a crash cut and whose pack is gone.
    fn remove_dead_objects(&self, objects: &dyn Objects) -> Result<()> {
        for (id, record) in self.packs.tier().all() {
            let is_dead = match record.state {
                State::Dead => true,
                State::Uploading => !self.packs.path(id).exists(),
                State::Stored => false,
            };
            if is_dead {
                objects.remove(&record.object())?;
                self.packs.tier().set(id, None)?;
            }
        }
        Ok(())
    }

    /// Removes files of packs that are in the tier until those that stay take at most `keep_bytes`; the least lately
    /// used go first.
    ///
    /// # Errors
    /// As [`Store::tier_sync`]; [`Error::Busy`] too while a collection or check runs.
    pub fn tier_evict(&self, keep_bytes: u64, monitor: &dyn Monitor) -> Result<Moved> {
        self.check_writable()?;
        let tier = self.packs.tier();
        let _working = tier.working.try_lock().ok_or_else(busy)?;
        let _running = self.collector.running.try_lock().ok_or_else(busy)?;
        let objects = tier.objects()?;
        let mut left: u64 = self.packs.list()?.iter().map(|(_, bytes)| bytes).sum();
        monitor.phase("evicting packs", Some(left.saturating_sub(keep_bytes)));
        let mut moved = Moved::default();
        for (id, bytes) in self.packs.list_by_use()? {
            if left <= keep_bytes {
                break;
            }
            monitor::check(monitor)?;
            let Some(record) = tier.stored(id).filter(|record| record.bytes == bytes) else { continue };
            if !self.packs.claim(id) {
                continue;
            }
            let _claim = Claim(self, id);
            // Somebody may have emptied the bucket: then this is the last copy.
            if objects.size(&record.object())? != Some(bytes) {
                monitor.warn(&format!(
                    "pack {id} is no longer in {}; it stays here and is uploaded again",
                    objects.place()
                ));
                tier.set(id, None)?;
                continue;
            }
            failpoint::hit("tier.before-evict");
            self.packs.remove(id)?;
            failpoint::hit("tier.after-evict");
            left -= bytes;
            moved.packs += 1;
            moved.bytes += bytes;
            monitor.advance(bytes);
        }
        Ok(moved)
    }

    /// Fetches every pack that is only in the tier, verified.
    ///
    /// # Errors
    /// As [`Store::tier_sync`]. That of a pack which is damaged or gone there, after all others were fetched.
    pub fn tier_fetch(&self, monitor: &dyn Monitor) -> Result<Moved> {
        self.check_writable()?;
        let tier = self.packs.tier();
        let _working = tier.working.try_lock().ok_or_else(busy)?;
        let remote: Vec<_> = self.packs.remote()?;
        monitor.phase("fetching packs", Some(remote.iter().map(|(_, bytes)| bytes).sum()));
        let (mut moved, mut failed) = (Moved::default(), None);
        for (id, bytes) in remote {
            let Some(record) = tier.stored(id) else { continue };
            if !self.packs.claim(id) {
                monitor.warn(&format!("pack {id} is not fetched while a collection runs; repeat this after it"));
                continue;
            }
            let _claim = Claim(self, id);
            match fetch(&*tier.objects()?, &record, &self.packs.path(id), monitor) {
                Ok(()) => {
                    moved.packs += 1;
                    moved.bytes += bytes;
                }
                Err(error @ (Error::Corrupt { .. } | Error::Tier { class: ErrorClass::NotFound, .. })) => {
                    monitor.warn(&format!("pack {id} is not fetched: {error}"));
                    failed.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        failed.map_or(Ok(moved), Err)
    }

    /// Stops to use the tier. Its objects stay there.
    ///
    /// # Errors
    /// [`Error::Busy`] while packs are only there.
    pub fn tier_forget(&self) -> Result<()> {
        self.check_writable()?;
        let tier = self.packs.tier();
        let _working = tier.working.try_lock().ok_or_else(busy)?;
        let stat = self.tier_stat()?;
        if stat.remote_packs > 0 {
            return Err(Error::Busy(format!(
                "{} packs are only in the second tier; `layerctl tier fetch` brings them back first",
                stat.remote_packs
            )));
        }
        for (id, _) in tier.all() {
            tier.set(id, None)?;
        }
        tier.connect(None);
        Ok(())
    }

    /// The collection found that nothing needs pack `id`, whose file is gone: its object is to be removed.
    pub(crate) fn drop_object(&self, id: PackId) -> Result<()> {
        let tier = self.packs.tier();
        let Some(record) = tier.record(id) else { return Ok(()) };
        tier.set(id, Some(Record { state: State::Dead, ..record }))?;
        failpoint::hit("tier.dead");
        Ok(())
    }

    /// Removes the objects of dead packs. The first failure leaves the others to the next [`Store::tier_sync`]: each would
    /// be waited for as long.
    pub(crate) fn remove_dropped(&self, monitor: &dyn Monitor) -> Result<()> {
        let tier = self.packs.tier();
        let is_dead = |(_, record): &(PackId, Record)| record.state == State::Dead;
        let dead: Vec<_> = tier.all().into_iter().filter(is_dead).collect();
        for (at, (id, record)) in dead.iter().enumerate() {
            if monitor.is_cancelled() {
                break;
            }
            if let Err(error) = tier.objects().and_then(|objects| objects.remove(&record.object())) {
                let left = dead.len() - at;
                monitor.warn(&format!("{left} dead packs stay in the second tier until the next `tier sync`: {error}"));
                break;
            }
            tier.set(*id, None)?;
        }
        Ok(())
    }
}

fn busy() -> Error {
    Error::Busy("work on the second tier, a collection or a check is running already; try again later".to_owned())
}

/// Downloads an object to `path`, where it appears whole and verified. Leaves on the disk what packs leave.
pub(crate) fn fetch(objects: &dyn Objects, record: &Record, path: &Path, monitor: &dyn Monitor) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let (file, temporary) = durable::create_temporary(path, 0o600)?;
    let fetched = (|| {
        use std::os::unix::fs::FileExt;
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < record.bytes {
            monitor::check(monitor)?;
            let piece = objects.read(&record.object(), at, STEP.min(record.bytes - at))?;
            if piece.is_empty() {
                return Err(Error::corrupt("pack in the second tier", format!("{} ends early", record.object())));
            }
            hasher.update(&piece);
            space::require(&temporary, space::PACK_RESERVE_BYTES)?;
            file.write_all_at(&piece, at).map_err(|e| Error::file("write", &temporary, e))?;
            at += piece.len() as u64;
            monitor.advance(piece.len() as u64);
        }
        if *hasher.finalize().as_bytes() != record.hash {
            let detail = format!("{} has other bytes than its name says", record.object());
            return Err(Error::corrupt("pack in the second tier", detail));
        }
        durable::persist(&file, &temporary, path)
    })();
    if fetched.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    fetched
}

/// BLAKE3 of a file, and its length.
pub(crate) fn hash_file(path: &Path) -> Result<([u8; 32], u64)> {
    let failed = |e| Error::file("read", path, e);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok((*hasher.finalize().as_bytes(), bytes))
}
