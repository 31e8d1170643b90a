//! Garbage collection, while everything else goes on.
//!
//! 1. *Mark*: every chunk of every root's stack goes into a filter. Roots: names, pins, root sources.
//! 2. *Sweep*: index entries that are in no filter (nor in that of any session that lived meanwhile) are removed,
//!    manifests before all others: a layer whose manifest is there is whole. What lies in packs that an unfinished
//!    transfer has filled stays ([`super::staged`]), but manifests.
//! 3. *Packs*: dead ones are unlinked, mostly dead and small ones are rewritten first.
//! 4. *Second tier*: the objects of packs that are gone are removed, while others may collect or check already.
//!
//! Why nothing that is wanted goes: a session says that it wants a chunk *before* it looks whether it is there, and
//! the sweep removes an entry *before* it looks (again) whether somebody wants it, so one of them sees the other. Whoever
//! names or pins a layer while this runs marks it first. Memory: the filter (2 bytes per chunk), and bounded sets.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::attr::Time;
use crate::chunk::Class;
use crate::closure::{ChunkUse, Known, walk_stack};
use crate::codec::{Put, Reader};
use crate::error::{Error, ErrorClass, Result};
use crate::failpoint;
use crate::id::{ChunkId, LayerId};
use crate::monitor::{self, Monitor};
use crate::store::db::{Cf, Sync};
use crate::store::filter::{IdFilter, Touched};
use crate::store::index::Location;
use crate::store::pack::{HEADER_BYTES, PackId};
use crate::store::rewrite::Rewriter;
use crate::store::{Store, Uncached};

/// How to collect.
#[derive(Clone, Copy, Debug, Default)]
pub struct GcOptions {
    /// Only tell what would go.
    pub dry_run: bool,
    /// What unfinished transfers have brought goes too.
    pub unfinished: bool,
}

/// What was collected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcReport {
    /// Layers that stay.
    pub live_layers: u64,
    /// Chunks that stay.
    pub live_chunks: u64,
    /// Chunks that went (or would).
    pub dead_chunks: u64,
    /// What those took, in bytes.
    pub dead_bytes: u64,
    /// What stays in packs only because transfers that haven't ended well may go on, in bytes.
    pub staged_bytes: u64,
    /// Packs removed (or that would be) without copying anything.
    pub packs_removed: u64,
    /// Packs whose live chunks were copied to new ones (or would be).
    pub packs_rewritten: u64,
    /// The bytes copied.
    pub copied_bytes: u64,
    /// By how much the packs got smaller, in bytes.
    pub freed_bytes: u64,
}

/// Entries looked at in one step of the sweep.
const SWEEP_BATCH: usize = 4096;
/// Packs below this size are merged if there are several.
const SMALL_PACK_BYTES: u64 = 8 << 20;
const LAST_GC_KEY: &[u8] = b"gc.last";

#[derive(Debug, Default)]
pub(crate) struct Collector {
    /// Held by the one collection (or check) that runs.
    pub running: Mutex<()>,
    active: Mutex<Option<Arc<Run>>>,
}

impl Collector {
    fn active(&self) -> Option<Arc<Run>> {
        self.active.lock().clone()
    }

    /// A session has ended: what it mentioned stays until the collection that runs is over.
    pub fn absorb(&self, touched: Arc<Touched>) {
        if let Some(run) = self.active() {
            run.retired.lock().push(touched);
        }
    }
}

/// A collection that runs.
#[derive(Debug)]
struct Run {
    live: IdFilter,
    /// What is marked before anything is swept, with all below.
    roots: RwLock<HashSet<LayerId>>,
    layers: RwLock<Layers>,
    retired: Mutex<Vec<Arc<Touched>>>,
}

/// The layers that stay.
#[derive(Debug, Default)]
struct Layers {
    /// All below each of them is marked too.
    marked: HashSet<LayerId>,
    /// Whose chunks are marked, while somebody looks whether they are all there; by how many.
    checking: HashMap<LayerId, usize>,
}

impl Layers {
    fn contains(&self, layer: &LayerId) -> bool {
        self.marked.contains(layer) || self.checking.contains_key(layer)
    }

    fn all(&self) -> HashSet<LayerId> {
        self.marked.iter().chain(self.checking.keys()).copied().collect()
    }
}

impl Run {
    /// Puts the chunks of `layer` and of all below it into the filter, down to the first layer that `is_marked`. Returns the
    /// layers.
    fn walk(
        &self,
        store: &Store,
        layer: LayerId,
        known: &mut Known,
        is_marked: impl Fn(&LayerId) -> bool,
        monitor: &dyn Monitor,
    ) -> Result<Vec<LayerId>> {
        let mut new = Vec::new();
        let mut mark = |chunk: ChunkUse| {
            self.live.insert(&chunk.id);
            if chunk.class != Class::Data {
                monitor::check(monitor)?;
            }
            Ok(known.is_new(&chunk))
        };
        walk_stack(&Uncached(store), layer, &mut mark, |layer| {
            let is_new = !is_marked(&layer);
            new.extend(is_new.then_some(layer));
            !is_new
        })?;
        Ok(new)
    }

    /// Marks `layer` and all below it.
    fn mark(&self, store: &Store, layer: LayerId, known: &mut Known, monitor: &dyn Monitor) -> Result<()> {
        let is_marked = |layer: &LayerId| self.layers.read().marked.contains(layer);
        let new = self.walk(store, layer, known, is_marked, monitor)?;
        self.layers.write().marked.extend(new);
        Ok(())
    }

    /// [`Run::mark`] for somebody else, who fails if anything is missing. He waits for nobody: what the collection marks
    /// by itself he needn't, and what both are at is marked twice.
    fn protect(&self, store: &Store, layer: LayerId) -> Result<()> {
        let is_marked =
            |layer: &LayerId| self.layers.read().marked.contains(layer) || self.roots.read().contains(layer);
        let new = self.walk(store, layer, &mut Known::default(), is_marked, &monitor::Silent)?;
        {
            let mut layers = self.layers.write();
            new.iter().for_each(|layer| *layers.checking.entry(*layer).or_default() += 1);
        }
        // Marked first, looked for then: as everywhere.
        let result = new.iter().try_for_each(|layer| store.check_layer(*layer));
        let mut layers = self.layers.write();
        for layer in &new {
            if let Entry::Occupied(mut count) = layers.checking.entry(*layer) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        if result.is_ok() {
            layers.marked.extend(new);
        }
        result
    }
}

impl Store {
    /// Removes what nothing refers to.
    ///
    /// # Errors
    /// [`Error::Busy`] if one runs already; that of a damaged layer, since what it needs can't be known then;
    /// [`Error::Corrupt`] if names were lost and layers have not all got names again.
    pub fn gc(&self, monitor: &dyn Monitor, options: GcOptions) -> Result<GcReport> {
        self.check_writable()?;
        self.check_names_recovered()?;
        let busy = || Error::Busy("a collection or check of this store is running already".to_owned());
        let running = self.collector.running.try_lock().ok_or_else(busy)?;
        let run = Arc::new(Run {
            live: IdFilter::new(self.index.estimated_count()? * 5 / 4 + 4096),
            roots: RwLock::default(),
            layers: RwLock::default(),
            retired: Mutex::default(),
        });
        let named = {
            // A name is set either before this, and seen here, or after, and marked by whoever sets it.
            let _names = self.names_change.lock();
            let _sessions = self.sessions.lock();
            *self.collector.active.lock() = Some(run.clone());
            self.named_layers()
        };
        let result = named.and_then(|mut roots| {
            roots.extend(self.in_use()?);
            run.roots.write().extend(&roots);
            let staged = if options.unfinished { HashSet::new() } else { self.staged_packs(Time::now())? };
            Collection { store: self, run: &run, monitor, options, staged }.collect(&roots)
        });
        *self.collector.active.lock() = None;
        // Nobody shall wait for a bucket that is slow to answer.
        drop(running);
        if result.is_ok() && !options.dry_run {
            self.remove_dropped(monitor)?;
        }
        result
    }

    /// Keeps `layer` and all below it from a collection that is running, if one is. The layer must not have lost
    /// anything to it already.
    pub(crate) fn protect_layer(&self, layer: LayerId) -> Result<()> {
        match self.collector.active() {
            Some(run) => run.protect(self, layer),
            None => Ok(()),
        }
    }

    /// When the last collection ended, and how many bytes of the packs were dead then.
    pub fn last_gc(&self) -> Result<Option<(Time, u64)>> {
        let Some(bytes) = self.db.get(Cf::Meta, LAST_GC_KEY)? else { return Ok(None) };
        let mut reader = Reader::new("gc record", &bytes);
        let time = Time { seconds: reader.i64()?, nanos: reader.u32()? };
        Ok(Some((time, reader.u64()?)))
    }

    /// The filters of all sessions that live, or lived while `run` did.
    fn touched(&self, run: &Run) -> Vec<Arc<Touched>> {
        let sessions = self.sessions.lock();
        let mut all: Vec<_> = sessions.touched.values().cloned().collect();
        all.extend(run.retired.lock().iter().cloned());
        all
    }
}

struct Collection<'a> {
    store: &'a Store,
    run: &'a Run,
    monitor: &'a dyn Monitor,
    options: GcOptions,
    /// Packs with chunks for layers that are still to come.
    staged: HashSet<PackId>,
}

/// What of a pack is live.
#[derive(Clone, Copy, Debug, Default)]
struct Live {
    bytes: u64,
}

impl Collection<'_> {
    fn collect(&self, roots: &[LayerId]) -> Result<GcReport> {
        self.monitor.phase("marking", None);
        let mut known = Known::default();
        for root in roots {
            self.run.mark(self.store, *root, &mut known, self.monitor)?;
            self.monitor.items(1);
        }
        drop(known);
        failpoint::hit("gc.marked");
        let mut report = GcReport { live_layers: self.run.layers.read().marked.len() as u64, ..GcReport::default() };
        // Before the sweep, so that what becomes live in a claimed pack is seen by the count that follows it.
        let packs = self.claim_packs()?;
        let result = self.collect_packs(&packs, &mut report);
        packs.iter().for_each(|(id, _)| self.store.packs.release(*id));
        result?;
        if !self.options.dry_run {
            self.remove_dead_tables()?;
            // Nobody's layer begins to stay meanwhile.
            let layers = self.run.layers.read();
            self.store.clear_dead_partials(&layers.all())?;
            drop(layers);
            self.record_end()?;
        }
        Ok(report)
    }

    fn collect_packs(&self, packs: &[(PackId, u64)], report: &mut GcReport) -> Result<()> {
        self.monitor.phase("sweeping", None);
        let live = self.sweep(report)?;
        failpoint::hit("gc.swept");
        self.monitor.phase("rewriting packs", None);
        self.rewrite_packs(packs, &live, report)
    }

    /// The packs that nobody appends to; nobody will while we have them.
    fn claim_packs(&self) -> Result<Vec<(PackId, u64)>> {
        let mut packs = self.store.packs.list()?;
        packs.extend(self.store.packs.remote()?);
        if self.options.dry_run {
            return Ok(packs);
        }
        Ok(packs.into_iter().filter(|(id, _)| self.store.packs.claim(*id)).collect())
    }

    /// Removes dead entries. Returns what is live in each pack.
    fn sweep(&self, report: &mut GcReport) -> Result<HashMap<PackId, Live>> {
        if !self.options.dry_run {
            self.sweep_where(|location| location.class == Class::Manifest, report)?;
        }
        let dead_manifests = *report;
        let live = self.sweep_where(|_| true, report)?;
        report.live_chunks -= dead_manifests.live_chunks;
        if !self.options.dry_run {
            // Before a pack goes, its entries must be gone for good.
            self.store.db.sync()?;
        }
        Ok(live)
    }

    fn sweep_where(
        &self,
        concerns: impl Fn(&Location) -> bool,
        report: &mut GcReport,
    ) -> Result<HashMap<PackId, Live>> {
        let mut live: HashMap<PackId, Live> = HashMap::new();
        let mut batch = Vec::with_capacity(SWEEP_BATCH);
        let mut touched = self.store.touched(self.run);
        for entry in self.store.index.iter()? {
            let (id, location) = entry?;
            if !concerns(&location) {
                continue;
            }
            let is_live = self.is_live(&id, &location) || touched.iter().any(|touched| touched.contains(&id));
            let is_staged = !is_live && self.is_staged(&location);
            if is_staged {
                report.staged_bytes += location.record_bytes();
            }
            if is_live || is_staged {
                report.live_chunks += 1;
                live.entry(location.pack).or_default().bytes += location.record_bytes();
                continue;
            }
            batch.push((id, location));
            if batch.len() == SWEEP_BATCH {
                self.sweep_batch(&batch, &mut live, report)?;
                batch.clear();
                touched = self.store.touched(self.run);
                monitor::check(self.monitor)?;
            }
        }
        self.sweep_batch(&batch, &mut live, report)?;
        Ok(live)
    }

    /// Whether `id` was marked. Of manifests that is known exactly.
    fn is_live(&self, id: &ChunkId, location: &Location) -> bool {
        self.run.live.contains(id)
            && (location.class != Class::Manifest || self.run.layers.read().contains(&LayerId(*id)))
    }

    fn is_staged(&self, location: &Location) -> bool {
        location.class != Class::Manifest && self.staged.contains(&location.pack)
    }

    fn sweep_batch(
        &self,
        batch: &[(ChunkId, Location)],
        live: &mut HashMap<PackId, Live>,
        report: &mut GcReport,
    ) -> Result<()> {
        let is_gone = if self.options.dry_run {
            vec![true; batch.len()]
        } else {
            self.store.index.remove(batch, || {
                let touched = self.store.touched(self.run);
                move |id: &ChunkId, location: &Location| {
                    self.is_live(id, location) || touched.iter().any(|touched| touched.contains(id))
                }
            })?
        };
        for ((_, location), is_gone) in batch.iter().zip(is_gone) {
            if is_gone {
                report.dead_chunks += 1;
                report.dead_bytes += location.record_bytes();
            } else {
                report.live_chunks += 1;
                live.entry(location.pack).or_default().bytes += location.record_bytes();
            }
        }
        self.monitor.items(batch.len() as u64);
        Ok(())
    }

    fn rewrite_packs(
        &self,
        packs: &[(PackId, u64)],
        live: &HashMap<PackId, Live>,
        report: &mut GcReport,
    ) -> Result<()> {
        let mut rewrite = Vec::new();
        let mut small = Vec::new();
        // What is only elsewhere isn't fetched to be rewritten: it goes when all of it is dead.
        let remote: HashSet<PackId> = self.store.packs.remote()?.into_iter().map(|(id, _)| id).collect();
        for &(id, bytes) in packs {
            monitor::check(self.monitor)?;
            match live.get(&id).map_or(0, |live| live.bytes) {
                0 => {
                    report.packs_removed += 1;
                    report.freed_bytes += bytes;
                    if !self.options.dry_run {
                        self.store.unlink_pack(id)?;
                    }
                }
                _ if remote.contains(&id) || self.staged.contains(&id) => {}
                live if live * 2 < bytes => rewrite.push((id, bytes, live)),
                live if bytes < SMALL_PACK_BYTES => small.push((id, bytes, live)),
                _ => {}
            }
        }
        if small.len() + rewrite.len() > 1 {
            rewrite.append(&mut small);
            rewrite.sort_unstable();
        }
        if self.options.dry_run {
            report.packs_rewritten = rewrite.len() as u64;
            report.freed_bytes += rewrite.iter().map(|(_, bytes, live)| bytes - live).sum::<u64>();
            return Ok(());
        }
        let mut rewriter = Rewriter::new(self.store, self.monitor);
        let result: Result<()> = rewrite.iter().try_for_each(|&(id, bytes, _)| {
            if let Some(copied) = rewriter.pack(id)? {
                report.packs_rewritten += 1;
                report.copied_bytes += copied;
                report.freed_bytes += bytes.saturating_sub(copied);
            }
            Ok(())
        });
        match result {
            Err(error) if error.class() == ErrorClass::NoSpace => {
                self.monitor.warn("the disk is too full to rewrite packs that are mostly dead; they stay for now");
                Ok(())
            }
            result => result,
        }
    }

    /// Removes the tables of layers that are gone: they can be built again should we be wrong.
    fn remove_dead_tables(&self) -> Result<()> {
        let folder = self.store.tables_folder();
        let failed = |e| Error::file("list", &folder, e);
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let layer = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<LayerId>().ok());
            let is_live = layer.is_none_or(|layer| self.run.layers.read().contains(&layer));
            if !is_live {
                std::fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e))?;
            }
        }
        Ok(())
    }

    fn record_end(&self) -> Result<()> {
        let (now, dead) = (Time::now(), self.store.dead_bytes()?);
        let mut record = Vec::new();
        record.put_i64(now.seconds);
        record.put_u32(now.nanos);
        record.put_u64(dead);
        let mut batch = crate::store::db::Batch::new();
        batch.put(Cf::Meta, LAST_GC_KEY, record);
        self.store.db.write(batch, Sync::Yes)
    }
}

impl Store {
    /// Bytes of the packs that no index entry refers to.
    pub(crate) fn dead_bytes(&self) -> Result<u64> {
        let packs = [self.packs.list()?, self.packs.remote()?].concat();
        let total: u64 = packs.iter().map(|(_, bytes)| bytes.saturating_sub(HEADER_BYTES as u64)).sum();
        let mut live = 0;
        for entry in self.index.iter()? {
            live += entry?.1.record_bytes();
        }
        Ok(total.saturating_sub(live))
    }
}
