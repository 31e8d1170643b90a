//! What fsck and scrub have in common: packs against the index in both directions, and layers' completeness.
//!
//! Memory: one window and one batch per thread, and a number per pack, however large the store is.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::chunk::{self, Class};
use crate::closure::{ChunkUse, Known, walk_layer};
use crate::error::{Error, ErrorClass, Result};
use crate::id::{ChunkId, LayerId};
use crate::manifest::Manifest;
use crate::monitor::{self, Monitor};
use crate::store::index::Location;
use crate::store::pack::{HEADER_BYTES, PackId};
use crate::store::scan::{Found, PackScan};
use crate::store::{Store, Uncached};

const BATCH: usize = 256;
/// Chunks of a layer looked up at once.
const LOOK_BATCH: usize = 1024;

/// Something wrong with packs or index.
#[derive(Debug)]
pub(crate) enum Finding {
    /// A pack can't be read at all.
    Unreadable(PackId, Error),
    /// Bytes inside of a pack that are no record.
    Damage(PackId, u64, u64),
    /// An index entry whose record isn't there, or whose bytes are wrong.
    Chunk(ChunkId, Location, String),
    /// A pack of which not all chunks could be looked at. Nothing is known against them.
    Unchecked(PackId, Error),
}

/// Whether `error`, met when a chunk was read, says that it is damaged or gone. Every other says something of this
/// machine just now: that it has no descriptor or memory left, that it may not read the file.
pub(crate) fn is_damage(error: &Error) -> bool {
    match error {
        Error::ChunkMissing(_) | Error::ChunkDamaged { .. } | Error::Corrupt { .. } => true,
        Error::File { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        // The record itself: opening a pack fails with its path.
        Error::Io { source, .. } => source.raw_os_error() == Some(libc::EIO),
        Error::Tier { class, .. } => matches!(class, ErrorClass::NotFound | ErrorClass::Corrupt),
        _ => false,
    }
}

/// What to tell of a pack whose chunks could not be looked at because of `error`.
pub(crate) fn unchecked_detail(error: &Error) -> String {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    format!("not all of its chunks could be looked at: {error}{cause}")
}

impl Finding {
    /// The chunk that it is about.
    pub fn chunk(&self) -> Option<ChunkId> {
        match self {
            Finding::Chunk(id, ..) => Some(*id),
            _ => None,
        }
    }
}

/// What there is in packs.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub packs: AtomicU64,
    pub live_chunks: AtomicU64,
    pub live_plain_bytes: AtomicU64,
    pub live_record_bytes: AtomicU64,
    pub dead_record_bytes: AtomicU64,
    pub tail_bytes: AtomicU64,
    /// Packs that are only in the second tier.
    pub remote_packs: AtomicU64,
    /// The chunks that they hold.
    pub remote_chunks: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

/// One pass over all packs.
pub(crate) struct PackCheck<'a> {
    store: &'a Store,
    monitor: &'a dyn Monitor,
    /// Whether to read and verify every live chunk too.
    verify: bool,
    pub totals: Totals,
    findings: Mutex<Vec<Finding>>,
    matched: Mutex<HashMap<PackId, u64>>,
    /// The packs of the findings [`Finding::Unchecked`].
    unchecked: Mutex<HashSet<PackId>>,
}

impl<'a> PackCheck<'a> {
    pub fn new(store: &'a Store, monitor: &'a dyn Monitor, verify: bool) -> PackCheck<'a> {
        let (findings, matched, unchecked) = (Mutex::default(), Mutex::default(), Mutex::default());
        PackCheck { store, monitor, verify, totals: Totals::default(), findings, matched, unchecked }
    }

    /// Checks everything; returns what is wrong.
    pub fn run(&self) -> Result<Vec<Finding>> {
        let threads = if self.verify { self.store.options.thread_count() } else { 1 };
        self.store.packs.for_each("checking packs", threads, self.monitor, |id| self.pack(id))?;
        self.entries()?;
        Ok(std::mem::take(&mut *self.findings.lock()))
    }

    fn found(&self, finding: Finding) {
        self.findings.lock().push(finding);
    }

    fn pack(&self, id: PackId) -> Result<()> {
        let scan = match PackScan::open(id, self.store.packs.path(id)) {
            Ok(scan) => scan,
            Err(_) if self.is_taken_back(id) => return Ok(()),
            Err(error) => {
                add(&self.totals.packs, 1);
                self.found(Finding::Unreadable(id, error));
                return Ok(());
            }
        };
        add(&self.totals.packs, 1);
        let mut batch = Vec::with_capacity(BATCH);
        for found in scan {
            match found {
                Ok(Found::Record(offset, header)) => batch.push((header.id, header.location(id, offset))),
                Ok(Found::Damage { from, to }) => self.found(Finding::Damage(id, from, to)),
                Ok(Found::Tail { from }) => {
                    let end = self.store.packs.path(id).metadata().map_or(from, |metadata| metadata.len());
                    add(&self.totals.tail_bytes, end.saturating_sub(from));
                }
                Err(error) => self.found(Finding::Unreadable(id, error)),
            }
            if batch.len() == BATCH {
                self.batch(&batch)?;
                batch.clear();
            }
        }
        self.batch(&batch)
    }

    /// Whether pack `id` is gone since the packs were listed, or just being made. Should the index refer to it, its entries tell.
    fn is_taken_back(&self, id: PackId) -> bool {
        match self.store.packs.path(id).metadata() {
            Ok(metadata) => metadata.len() < HEADER_BYTES as u64 && self.store.packs.is_owned(id),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }

    fn batch(&self, batch: &[(ChunkId, Location)]) -> Result<()> {
        monitor::check(self.monitor)?;
        let ids: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
        for ((id, location), entry) in batch.iter().zip(self.store.index.get_many(&ids)?) {
            if entry != Some(*location) {
                add(&self.totals.dead_record_bytes, location.record_bytes());
                continue;
            }
            *self.matched.lock().entry(location.pack).or_default() += 1;
            add(&self.totals.live_chunks, 1);
            add(&self.totals.live_plain_bytes, u64::from(location.plain_bytes));
            add(&self.totals.live_record_bytes, location.record_bytes());
            if self.verify {
                self.check_entry(id, location, true)?;
            }
        }
        Ok(())
    }

    /// Reads what the index says of `id`; tells what is wrong, if the index still says so then.
    fn check_entry(&self, id: &ChunkId, location: &Location, verify: bool) -> Result<()> {
        let result = match self.store.packs.read(id, location) {
            Ok(Some(stored)) if verify => chunk::verify(stored).map(|_| ()),
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(Error::ChunkMissing(*id)),
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => Ok(()),
            Err(_) if self.store.index.get(id)? != Some(*location) => Ok(()),
            Err(error) if !is_damage(&error) => {
                // It is mostly the same for all chunks of a pack.
                if self.unchecked.lock().insert(location.pack) {
                    self.found(Finding::Unchecked(location.pack, error));
                }
                Ok(())
            }
            Err(error) => {
                // The id stands beside it already.
                let detail = match error {
                    Error::ChunkDamaged { detail, .. } => detail,
                    Error::ChunkMissing(_) => "it is not where the index says".to_owned(),
                    error => error.to_string(),
                };
                self.found(Finding::Chunk(*id, *location, detail));
                Ok(())
            }
        }
    }

    /// Packs that are only in the second tier, as far as they are whole there. What they hold isn't read.
    fn remote(&self, counts: &HashMap<PackId, u64>) -> Result<HashSet<PackId>> {
        let mut whole = HashSet::new();
        let mut is_away = false;
        for (pack, bytes) in self.store.packs.remote()? {
            monitor::check(self.monitor)?;
            let tier = self.store.packs.tier();
            let Some(record) = tier.stored(pack) else { continue };
            let found = match tier.objects() {
                // Each pack would be waited for as long as the first one that failed.
                Ok(objects) if is_away => Err(Error::Tier {
                    action: "looking into",
                    place: objects.place(),
                    class: ErrorClass::Network,
                    detail: "it is not asked again after it failed".to_owned(),
                }),
                objects => objects.and_then(|objects| objects.size(&record.object())),
            };
            match found {
                Ok(Some(found)) if found == bytes => {
                    add(&self.totals.remote_packs, 1);
                    add(&self.totals.remote_chunks, counts.get(&pack).copied().unwrap_or(0));
                    whole.insert(pack);
                }
                Ok(found) => {
                    let detail = format!("it has {found:?} bytes in the second tier instead of {bytes}");
                    self.found(Finding::Unreadable(pack, Error::corrupt("pack", detail)));
                }
                // What can't be reached isn't damaged: its chunks aren't to be forgotten.
                Err(error) => {
                    is_away |= error.class() == ErrorClass::Network;
                    self.found(Finding::Unreadable(pack, error));
                    whole.insert(pack);
                }
            }
        }
        Ok(whole)
    }

    /// The other direction: packs of which the index says more than there was are looked at entry by entry.
    fn entries(&self) -> Result<()> {
        let mut counts: HashMap<PackId, u64> = HashMap::new();
        for entry in self.store.index.iter()? {
            *counts.entry(entry?.1.pack).or_default() += 1;
        }
        let matched = self.matched.lock().clone();
        counts.retain(|pack, count| matched.get(pack).copied().unwrap_or(0) < *count);
        let remote = self.remote(&counts)?;
        counts.retain(|pack, _| !remote.contains(pack));
        if counts.is_empty() {
            return Ok(());
        }
        let told: HashSet<ChunkId> = self.findings.lock().iter().filter_map(Finding::chunk).collect();
        for entry in self.store.index.iter()? {
            let (id, location) = entry?;
            if counts.contains_key(&location.pack) && !told.contains(&id) {
                self.check_entry(&id, &location, self.verify)?;
            }
        }
        Ok(())
    }
}

/// Looks whether a layer's chunks are in the index.
pub(crate) struct Presence<'a> {
    store: &'a Store,
    monitor: &'a dyn Monitor,
    known: Known,
    batch: Vec<ChunkId>,
    /// Whether data may be missing: the layer at hand is partial.
    is_partial: bool,
    /// The first that is missing.
    missing: Option<ChunkId>,
    missing_count: u64,
}

impl<'a> Presence<'a> {
    pub fn new(store: &'a Store, monitor: &'a dyn Monitor) -> Presence<'a> {
        Presence {
            store,
            monitor,
            known: Known::default(),
            batch: Vec::new(),
            is_partial: false,
            missing: None,
            missing_count: 0,
        }
    }

    fn chunk(&mut self, chunk: &ChunkUse) -> Result<bool> {
        if chunk.class != Class::Data {
            monitor::check(self.monitor)?;
        }
        let is_new = self.known.is_new(chunk);
        if is_new && !(self.is_partial && chunk.class == Class::Data) {
            // What is opened too is looked up all the same: it may come from the cache.
            self.batch.push(chunk.id);
            if self.batch.len() >= LOOK_BATCH {
                self.look()?;
            }
        }
        Ok(is_new)
    }

    fn look(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        for (id, is_there) in batch.iter().zip(self.store.contains_many(&batch)?) {
            if !is_there {
                self.missing.get_or_insert(*id);
                self.missing_count += 1;
            }
        }
        Ok(())
    }

    /// Checks one layer, without those below it.
    pub fn layer(&mut self, layer: LayerId) -> Result<Manifest> {
        self.is_partial = self.store.may_lack(layer, Class::Data);
        let walked = walk_layer(&Uncached(self.store), layer, &mut |chunk| self.chunk(&chunk));
        self.look()?;
        let (missing, count) = (self.missing.take(), std::mem::take(&mut self.missing_count));
        if walked.is_err() || missing.is_some() || self.is_partial {
            // Not all of what is below what it knows was looked up with success.
            self.known = Known::default();
        }
        match (walked, missing) {
            (Err(error), _) => Err(error),
            (Ok(_), Some(id)) if count == 1 => Err(Error::ChunkMissing(id)),
            (Ok(_), Some(id)) => Err(Error::corrupt("layer", format!("{count} chunks are missing, {id} among them"))),
            (Ok(manifest), None) => Ok(manifest),
        }
    }
}

impl Store {
    /// Checks that `layer`, without those below it, is here whole: its manifest and tables are read, verified and
    /// decoded, and every chunk that they refer to is in the index; of a partial layer, every chunk but those of data.
    pub fn check_layer(&self, layer: LayerId) -> Result<()> {
        Presence::new(self, &monitor::Silent).layer(layer).map(|_| ())
    }

    /// [`Store::check_layer`] of `layer` and all below it.
    pub fn check_stack(&self, layer: LayerId) -> Result<()> {
        let mut presence = Presence::new(self, &monitor::Silent);
        let mut next = Some(layer);
        while let Some(layer) = next {
            next = presence.layer(layer)?.parent;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_something_of_the_chunk_is_damage() {
        let (id, os) = (ChunkId::of(b"chunk"), std::io::Error::from_raw_os_error);
        let read = |code| is_damage(&Error::io("reading a pack", os(code)));
        let open = |code| is_damage(&Error::file("open", "pack", os(code)));
        let tier = |class| {
            let (place, detail) = ("bucket".to_owned(), "so".to_owned());
            is_damage(&Error::Tier { action: "reading from", place, class, detail })
        };
        assert!(is_damage(&Error::ChunkMissing(id)) && is_damage(&Error::corrupt("pack", "so")));
        assert!(is_damage(&Error::ChunkDamaged { id, detail: "so".to_owned() }));
        assert!(read(libc::EIO) && open(libc::ENOENT) && tier(ErrorClass::NotFound) && tier(ErrorClass::Corrupt));
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EPERM, libc::EISDIR, libc::EINTR] {
            assert!(!read(code) && !open(code), "{}", os(code));
        }
        assert!(!open(libc::EIO), "all of a pack isn't lost when opening it fails");
        assert!(!tier(ErrorClass::Network) && !tier(ErrorClass::Denied));
        assert!(!is_damage(&Error::Index("so".to_owned())) && !is_damage(&Error::Cancelled));
    }

    #[test]
    fn packs_that_go_or_are_made_meanwhile_are_no_problem() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), crate::store::StoreOptions::create()).unwrap();
        let check = PackCheck::new(&store, &monitor::Silent, false);
        check.pack(PackId(7)).unwrap();
        std::fs::write(store.packs.path(PackId(8)), "").unwrap();
        assert!(store.packs.claim(PackId(8)));
        check.pack(PackId(8)).unwrap();
        assert!(check.findings.lock().is_empty());
        // Nobody makes it any more.
        store.packs.release(PackId(8));
        check.pack(PackId(8)).unwrap();
        assert!(matches!(check.findings.lock()[..], [Finding::Unreadable(PackId(8), _)]));
        // It is being fetched; what isn't named so is told.
        let temporary = format!("{}.pack.17-0.tmp", PackId(9));
        std::fs::write(store.packs.folder().join(temporary), "half").unwrap();
        std::fs::remove_file(store.packs.path(PackId(8))).unwrap();
        assert!(store.fsck(&monitor::Silent, crate::store::FsckOptions::default()).unwrap().is_clean());
        std::fs::write(store.packs.folder().join("other.tmp"), "mine").unwrap();
        assert!(!store.fsck(&monitor::Silent, crate::store::FsckOptions::default()).unwrap().is_clean());
    }
}
