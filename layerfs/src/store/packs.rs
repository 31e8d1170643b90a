//! Which packs there are, who may append to which, and their open files.
//!
//! Invariants: a pack has at most one owner (a session that appends, or the garbage collector); pack numbers only
//! grow, so that what the index says of a pack that is lost never fits another one; no file is removed or written over
//! because it has a new pack's name; after a restart no old pack is appended to, since its end isn't known to be good.

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use crate::chunk::StoredChunk;
use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::monitor::Monitor;
use crate::store::db::{Cf, Db};
use crate::store::index::Location;
use crate::store::pack::{PackId, PackWriter, check_record, read_record};
use crate::store::space;
use crate::store::tier::{self, Tier};

/// The last number that was given. FORMAT.md, "Index database".
const LAST_KEY: &[u8] = b"packs.last";
/// The most packs that are open for reading at a time.
const OPEN_PACKS: NonZeroUsize = NonZeroUsize::new(128).unwrap();

#[derive(Debug)]
pub(crate) struct Packs {
    folder: PathBuf,
    tier: Tier,
    /// Where it is kept which numbers were given. Without it no pack is made.
    db: Option<Arc<Db>>,
    open: Mutex<LruCache<PackId, Arc<File>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Packs that end at a known good place, for the next session.
    spare: Vec<PackWriter>,
    owned: HashSet<PackId>,
}

impl Packs {
    pub fn open(folder: PathBuf, tier: Tier, db: Option<Arc<Db>>) -> Result<Packs> {
        let open = Mutex::new(LruCache::new(OPEN_PACKS));
        let packs = Packs { folder, tier, db, open, state: Mutex::default() };
        let last = packs.list()?.into_iter().map(|(id, _)| id).max();
        // A number that a pack has elsewhere is taken too, and so is that of one that is lost.
        let last = last.max(packs.tier.last()).max(packs.last_given()?);
        packs.state.lock().next = last.map_or(1, |id| id.0 + 1);
        Ok(packs)
    }

    /// The last number that was given, as far as that was noted.
    fn last_given(&self) -> Result<Option<PackId>> {
        let row = self.db.as_ref().map_or(Ok(None), |db| db.get(Cf::Meta, LAST_KEY))?;
        row.map(|row| Reader::new("last pack's number", &row).u64().map(PackId)).transpose()
    }

    /// Notes that number `id` was given. Unsynced: the index's entries for the pack are written later, so that this survives
    /// whatever they survive.
    fn note_given(&self, id: PackId) -> Result<()> {
        let Some(db) = &self.db else { return Err(Error::invalid("packs can't be made here")) };
        db.put(Cf::Meta, LAST_KEY, id.0.to_le_bytes())
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn path(&self, id: PackId) -> PathBuf {
        self.folder.join(format!("{id}.pack"))
    }

    /// All packs with their sizes in bytes, in order.
    pub fn list(&self) -> Result<Vec<(PackId, u64)>> {
        let failed = |e| Error::file("list", &self.folder, e);
        let mut packs = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if let Some(id) = entry.file_name().to_str().and_then(parse_name)
                && let Ok(metadata) = entry.metadata()
            {
                packs.push((id, metadata.len()));
            }
        }
        packs.sort_unstable();
        Ok(packs)
    }

    /// What is known of packs elsewhere.
    pub fn tier(&self) -> &Tier {
        &self.tier
    }

    /// The packs that are only in the second tier, with their sizes in bytes.
    pub fn remote(&self) -> Result<Vec<(PackId, u64)>> {
        let stored = self.tier.all().into_iter().filter(|(_, record)| record.state == tier::State::Stored);
        let stored: Vec<_> = stored.map(|(id, record)| (id, record.bytes)).collect();
        if stored.is_empty() {
            return Ok(stored);
        }
        let here: HashSet<PackId> = self.list()?.into_iter().map(|(id, _)| id).collect();
        Ok(stored.into_iter().filter(|(id, _)| !here.contains(id)).collect())
    }

    /// All packs here with their sizes in bytes, the least lately used first.
    pub fn list_by_use(&self) -> Result<Vec<(PackId, u64)>> {
        let used: Vec<PackId> = self.open.lock().iter().map(|(id, _)| *id).collect();
        let mut packs = self.list()?;
        // Those that aren't open were used before all that are; these lie newest first.
        packs.sort_by_key(|(id, _)| std::cmp::Reverse(used.iter().position(|open| open == id).unwrap_or(usize::MAX)));
        Ok(packs)
    }

    /// Does `work` for all packs, in `threads` threads; the monitor's bytes are those of the packs.
    pub fn for_each(
        &self,
        phase: &str,
        threads: usize,
        monitor: &dyn Monitor,
        work: impl Fn(PackId) -> Result<()> + Sync,
    ) -> Result<()> {
        let packs = self.list()?;
        monitor.phase(phase, Some(packs.iter().map(|(_, bytes)| bytes).sum()));
        let next = AtomicUsize::new(0);
        let run = || -> Result<()> {
            while let Some((id, bytes)) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(*id)?;
                monitor.advance(*bytes);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(Error::Index("a thread of the store panicked".to_owned())))
            })
        })
    }

    /// A pack to append to: one that isn't full, or a new one. The caller owns it until [`Packs::give_back`] or
    /// [`Packs::release`].
    pub fn take(&self) -> Result<PackWriter> {
        {
            let mut state = self.state.lock();
            while let Some(writer) = state.spare.pop() {
                // Whoever removes packs behind our back shall not make us lose more.
                if writer.is_linked() {
                    state.owned.insert(writer.id());
                    return Ok(writer);
                }
            }
        }
        self.create(space::PACK_RESERVE_BYTES)
    }

    /// A new pack, owned by the caller, that leaves `reserve` bytes free on the disk.
    pub fn create(&self, reserve: u64) -> Result<PackWriter> {
        loop {
            let id = {
                let mut state = self.state.lock();
                let id = PackId(state.next);
                state.next += 1;
                state.owned.insert(id);
                id
            };
            match self.note_given(id).and_then(|()| PackWriter::create(id, self.path(id), reserve)) {
                Ok(writer) => return Ok(writer),
                // Somebody has put it there: a pack that was lost, perhaps.
                Err(Error::File { source, path, .. }) if source.kind() == ErrorKind::AlreadyExists => {
                    tracing::warn!(path = %path.display(), "a new pack's name is taken; the next number is used");
                    self.release(id);
                }
                Err(error) => {
                    self.release(id);
                    return Err(error);
                }
            }
        }
    }

    /// Returns a pack that somebody else may append to.
    pub fn give_back(&self, mut writer: PackWriter) {
        let mut state = self.state.lock();
        state.owned.remove(&writer.id());
        if !writer.is_full() && writer.synced_end() == writer.end() {
            writer.rest();
            state.spare.push(writer);
        }
    }

    /// Ends the ownership of a pack that nobody will append to again.
    pub fn release(&self, id: PackId) {
        self.state.lock().owned.remove(&id);
    }

    /// Claims pack `id`, unless somebody appends to it.
    pub fn claim(&self, id: PackId) -> bool {
        let mut state = self.state.lock();
        if !state.owned.insert(id) {
            return false;
        }
        state.spare.retain(|writer| writer.id() != id);
        true
    }

    /// Whether somebody appends to pack `id`, or collects it.
    pub fn is_owned(&self, id: PackId) -> bool {
        self.state.lock().owned.contains(&id)
    }

    /// Removes a claimed pack.
    pub fn remove(&self, id: PackId) -> Result<()> {
        let path = self.path(id);
        self.open.lock().pop(&id);
        let removed = std::fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e));
        self.open.lock().pop(&id);
        self.release(id);
        removed
    }

    /// Closes pack `id`, as if it had been opened long ago.
    #[cfg(test)]
    pub fn forget_open(&self, id: PackId) {
        self.open.lock().pop(&id);
    }

    /// The open file of pack `id`; `None` if there is no such pack.
    pub fn file(&self, id: PackId) -> Result<Option<Arc<File>>> {
        if let Some(file) = self.open.lock().get(&id) {
            return Ok(Some(file.clone()));
        }
        let path = self.path(id);
        let file = match File::open(&path) {
            Ok(file) => Arc::new(file),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::file("open", path, e)),
        };
        self.open.lock().put(id, file.clone());
        // Whoever removed it meanwhile has looked for it before it was put there: its space would stay taken.
        if !path.exists() {
            self.open.lock().pop(&id);
        }
        Ok(Some(file))
    }

    /// The record of `id` at `location`, unverified but for its header; `None` if the pack is gone.
    pub fn read(&self, id: &ChunkId, location: &Location) -> Result<Option<StoredChunk>> {
        match self.file(location.pack)? {
            Some(file) => read_record(&file, id, location).map(Some),
            None => {
                let read = self.tier.read(location.pack, u64::from(location.offset), location.record_bytes())?;
                read.map(|bytes| check_record(bytes, id, location)).transpose()
            }
        }
    }
}

fn parse_name(name: &str) -> Option<PackId> {
    let digits = name.strip_suffix(".pack").filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok().map(PackId)
}

/// Whether `name` is that of a pack's temporary sibling, as [`crate::durable::create_temporary`] makes it.
pub(crate) fn is_temporary(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_suffix(".tmp")
        .and_then(|name| name.rsplit_once('.'))
        .filter(|(pack, _)| parse_name(pack).is_some())
        .and_then(|(_, numbers)| numbers.split_once('-'))
        .is_some_and(|(process, number)| is_number(process) && is_number(number))
}

/// Removes what a kill left of packs that were being fetched. What somebody else has put there stays.
pub(crate) fn remove_half_fetched(folder: &Path) -> Result<()> {
    let failed = |e| Error::file("list", folder, e);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && entry.file_name().to_str().is_some_and(is_temporary) {
            let path = entry.path();
            std::fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e))?;
        }
    }
    Ok(())
}
