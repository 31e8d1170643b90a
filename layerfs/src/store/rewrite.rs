//! Copies what is live in a pack to another one, and removes the pack.
//!
//! Invariants: the copies are verified and synced before the index refers to them, and the index is synced before the
//! pack goes; a pack with a live chunk that can't be copied stays.

use crate::chunk;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::id::ChunkId;
use crate::monitor::{self, Monitor};
use crate::store::check;
use crate::store::index::Location;
use crate::store::pack::{PackId, PackWriter};
use crate::store::scan::{Found, PackScan};
use crate::store::{Store, space};

/// Records looked up in one step.
const BATCH: usize = 256;

/// Chunks with where they were and where they are now.
type Moves = Vec<(ChunkId, Location, Location)>;

/// Rewrites packs, one after the other, into as few as possible.
pub(crate) struct Rewriter<'a> {
    store: &'a Store,
    monitor: &'a dyn Monitor,
    out: Option<PackWriter>,
}

impl<'a> Rewriter<'a> {
    pub fn new(store: &'a Store, monitor: &'a dyn Monitor) -> Rewriter<'a> {
        Rewriter { store, monitor, out: None }
    }

    /// Rewrites pack `id`, which the caller has claimed, and removes it. Returns how many bytes were copied; `None`, and
    /// a warning, if the pack has to stay because it is damaged.
    pub fn pack(&mut self, id: PackId) -> Result<Option<u64>> {
        monitor::check(self.monitor)?;
        let mut moves = Moves::new();
        match self.copy_records(id, &mut moves) {
            Ok(()) => {}
            Err(error) if check::is_damage(&error) || matches!(error, Error::Unsupported { .. }) => {
                self.monitor.warn(&format!("pack {id} is damaged and stays as it is: {error}"));
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        if let Some(out) = &mut self.out {
            out.sync()?;
        }
        failpoint::hit("gc.rewritten");
        self.store.index.relocate(&moves)?;
        self.store.db.sync()?;
        let copied = moves.iter().map(|(_, _, new)| new.record_bytes()).sum::<u64>();
        self.monitor.advance(copied);
        self.store.unlink_pack(id)?;
        Ok(Some(copied))
    }

    fn copy_records(&mut self, id: PackId, moves: &mut Moves) -> Result<()> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut is_whole = true;
        for found in PackScan::open(id, self.store.packs.path(id))? {
            match found? {
                Found::Record(offset, header) => batch.push((header.id, header.location(id, offset))),
                Found::Tail { .. } | Found::Damage { .. } => is_whole = false,
            }
            if batch.len() == BATCH {
                self.copy_batch(&batch, moves)?;
                batch.clear();
            }
        }
        self.copy_batch(&batch, moves)?;
        if is_whole { Ok(()) } else { self.require_all(id, moves.len()) }
    }

    /// Fails if the index knows more than `copied` chunks in pack `id`.
    fn require_all(&self, id: PackId, copied: usize) -> Result<()> {
        let mut live = 0;
        for entry in self.store.index.iter()? {
            live += usize::from(entry?.1.pack == id);
        }
        if live <= copied {
            return Ok(());
        }
        Err(Error::corrupt("pack", format!("{} of its chunks can't be read", live - copied)))
    }

    fn copy_batch(&mut self, batch: &[(ChunkId, Location)], moves: &mut Moves) -> Result<()> {
        let ids: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
        let now = self.store.index.get_many(&ids)?;
        for ((id, old), _) in batch.iter().zip(now).filter(|((_, old), now)| now.as_ref() == Some(old)) {
            let stored = self.store.packs.read(id, old)?.ok_or(Error::ChunkMissing(*id))?;
            let (_, verified) = chunk::verify(stored)?;
            let new = self.writer()?.append(verified.stored())?;
            moves.push((*id, *old, new));
        }
        Ok(())
    }

    fn writer(&mut self) -> Result<&mut PackWriter> {
        if let Some(mut full) = self.out.take_if(|out| out.is_full()) {
            full.sync()?;
            finish(self.store, full);
        }
        match &mut self.out {
            Some(writer) => Ok(writer),
            none => Ok(none.insert(self.store.packs.create(space::DB_RESERVE_BYTES)?)),
        }
    }
}

impl Drop for Rewriter<'_> {
    fn drop(&mut self) {
        if let Some(out) = self.out.take() {
            finish(self.store, out);
        }
    }
}

fn finish(store: &Store, mut pack: PackWriter) {
    let id = pack.id();
    if pack.roll_back() {
        store.packs.give_back(pack);
    } else if pack.synced_end() > 0 {
        store.packs.release(id);
    } else if let Err(error) = store.packs.remove(id) {
        tracing::warn!(%error, "an unused pack stays");
    }
}

impl Store {
    /// Removes a claimed pack that the index doesn't refer to any more, durably.
    pub(crate) fn unlink_pack(&self, id: PackId) -> Result<()> {
        failpoint::hit("gc.before-unlink");
        if self.packs.path(id).exists() {
            self.packs.remove(id)?;
        }
        failpoint::hit("gc.after-unlink");
        self.drop_object(id)
    }

    /// Takes back what wasn't synced in `pack`, and ends its ownership.
    pub(crate) fn finish_pack(&self, pack: PackWriter) {
        finish(self, pack);
    }
}
