//! Makes the index anew from the packs alone.
//!
//! Invariants: only chunks whose bytes verify get into the new index; the old index stays in place until the new one
//! is complete. Names and everything else that isn't chunks are taken over if the old database can still be read;
//! where it can't, each complete layer without a name that no other layer lies on gets the name
//! `recovered/<the id's first 12 digits>`. Where that is cut off, the next rebuild goes on with it
//! ([`super::lost_names`]). Files of uppers whose records are lost stay.
//!
//! `index.making` is a new index until it is complete; `index.new` a complete one, or the one that it has replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{CWD, RenameFlags};

use crate::chunk::{self, Class};
use crate::durable;
use crate::error::{Error, ErrorClass, Result};
use crate::id::LayerId;
use crate::manifest::Manifest;
use crate::monitor::{self, Monitor};
use crate::store::Store;
use crate::store::check;
use crate::store::db::{Batch, Cf, Db, DbOptions, Entry, Sync};
use crate::store::index::Location;
use crate::store::lost_names::{self, LostNames};
use crate::store::names;
use crate::store::offload;
use crate::store::open::{self, StoreOptions};
use crate::store::pack::{HEADER_BYTES, PackId, read_record};
use crate::store::packs::Packs;
use crate::store::scan::{Found, PackScan};
use crate::store::tier::{self, Objects, Record, State, Tier};

/// What a rebuild found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct RebuildReport {
    /// Packs that were read.
    pub packs: u64,
    /// Chunks that are in the new index.
    pub chunks: u64,
    /// Records whose bytes are wrong.
    pub damaged_chunks: u64,
    /// Packs, or parts of them, that couldn't be read.
    pub pack_problems: Vec<String>,
    /// Whether all names, uppers, mounts and peers could be taken over.
    pub records_kept: bool,
    /// What couldn't be read of the old index, if not.
    pub record_problems: Vec<String>,
    /// Names that there are now, those that were made up included.
    pub names: u64,
    /// Layers in their stacks, those that are missing not counted.
    pub layers: u64,
    /// Layers in their stacks whose manifests are in no pack, each with the names that it is missing to.
    pub missing_layers: BTreeMap<LayerId, Vec<String>>,
    /// Names that were given to layers whose names are unknown.
    pub recovered: Vec<String>,
}

const BATCH: usize = 1024;

/// Makes the index of the store in `folder` anew. The store must not be open.
///
/// # Errors
/// As [`crate::store::Store::open`]; what can't be read is no error, but in the report.
pub fn rebuild(folder: &Path, options: StoreOptions, monitor: &dyn Monitor) -> Result<RebuildReport> {
    rebuild_from(folder, options, None, monitor)
}

/// [`rebuild`], with the packs in `objects`, a second tier, taken for the store's own: for a store whose disk was lost.
/// Each is read once and not kept here.
pub fn rebuild_from(
    folder: &Path,
    options: StoreOptions,
    objects: Option<Arc<dyn Objects>>,
    monitor: &dyn Monitor,
) -> Result<RebuildReport> {
    if !open::read_format(folder)? {
        return Err(Error::NotFound { what: "store", name: folder.display().to_string() });
    }
    let lock = open::take_lock(folder, false)?;
    let (old, new, making) = (folder.join("index"), folder.join("index.new"), folder.join("index.making"));
    let aside = folder.join("index.damaged");
    let db_options = DbOptions { create: true, ..open::db_options(&options) };
    match open_old(&old, db_options).and_then(|(db, _)| LostNames::read(&db)) {
        Ok(None | Some(LostNames::Incomplete)) => remove_folder(&new)?,
        // What it knows isn't lost yet.
        Err(error) if error.class() == ErrorClass::Denied => return Err(open::denied(&error)),
        // It may be the one that the names were lost with.
        Ok(Some(LostNames::Unrecovered)) | Err(_) => keep_aside(&new, &aside)?,
    }
    remove_folder(&making)?;
    let db = Db::open(&making, db_options)?;
    let packs = Packs::open(folder.join("packs"), Tier::none(), None)?;
    let scan = Scan::new(&db, &packs, monitor);
    scan.run(options.thread_count())?;
    if let Some(objects) = &objects {
        scan.objects(&**objects, &folder.join("tmp"))?;
    }
    let mut report = RebuildReport {
        packs: scan.packs_read.load(Ordering::Relaxed),
        damaged_chunks: scan.damaged.load(Ordering::Relaxed),
        pack_problems: std::mem::take(&mut *scan.problems.lock()),
        ..RebuildReport::default()
    };
    let manifests = std::mem::take(&mut *scan.manifests.lock());
    let count = |db: &Db, report: &mut RebuildReport| {
        if let Err(error) = count_named(db, &manifests, report, monitor) {
            monitor.warn(&format!("not all names and layers are counted: {error}"));
        }
    };
    report.record_problems = match copy_records(&old, &db, &packs, db_options) {
        Ok(problems) => problems,
        Err(error) if error.class() == ErrorClass::Denied => return Err(open::denied(&error)),
        Err(error) => vec![format!("it can't be read: {error}")],
    };
    report.chunks = db.iter_from(Cf::Chunks, &[])?.count() as u64;
    report.records_kept = report.record_problems.is_empty();
    for problem in &report.record_problems {
        monitor.warn(&format!("the old index: {problem}; names, uppers, mounts and peers may be lost"));
    }
    // After a lost disk the old index is a new one, which never knew a name.
    let is_new = || Ok::<_, Error>(objects.is_some() && db.iter_from(Cf::Names, &[])?.next().is_none());
    let has_lost_names = !report.records_kept || LostNames::read(&db)?.is_some() || is_new()?;
    if !report.records_kept {
        db.put(Cf::Meta, lost_names::UPPERS_KEY, [0])?;
    }
    if has_lost_names {
        db.write(LostNames::change(Some(LostNames::Unrecovered)), Sync::No)?;
    } else {
        count(&db, &mut report);
    }
    db.sync()?;
    drop(db);
    fs::rename(&making, &new).map_err(|e| Error::file("rename", &making, e))?;
    swap(&new, &old)?;
    if report.records_kept {
        remove_folder(&new)?;
    } else {
        keep_aside(&new, &aside)?;
    }
    if has_lost_names {
        // Under the same lock: a daemon that came in between would see layers without names, and collect them.
        let store = Store::open_locked(folder, options, true, lock)?;
        store.connect_tier(objects);
        report.recovered = lost_names::recover(&store, &manifests, monitor)?;
        count(&store.db, &mut report);
    }
    Ok(report)
}

struct Scan<'a> {
    db: &'a Db,
    packs: &'a Packs,
    monitor: &'a dyn Monitor,
    packs_read: AtomicU64,
    damaged: AtomicU64,
    problems: Mutex<Vec<String>>,
    /// Layer → the layer that it lies on.
    manifests: Mutex<BTreeMap<LayerId, Option<LayerId>>>,
}

impl<'a> Scan<'a> {
    fn new(db: &'a Db, packs: &'a Packs, monitor: &'a dyn Monitor) -> Scan<'a> {
        Scan {
            db,
            packs,
            monitor,
            packs_read: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            problems: Mutex::default(),
            manifests: Mutex::default(),
        }
    }

    fn run(&self, threads: usize) -> Result<()> {
        self.packs.for_each("reading packs", threads, self.monitor, |id| self.pack(id))
    }

    fn problem(&self, id: PackId, detail: impl std::fmt::Display) {
        self.problems.lock().push(format!("pack {id}: {detail}"));
    }

    fn pack(&self, id: PackId) -> Result<()> {
        match self.packs.file(id)? {
            Some(file) => self.records(id, &self.packs.path(id), &file),
            None => Ok(()),
        }
    }

    /// The packs of a second tier that aren't here, each through a file in `tmp`.
    fn objects(&self, objects: &dyn Objects, tmp: &Path) -> Result<()> {
        let list = objects.list()?;
        self.monitor.phase("reading the second tier", Some(list.iter().map(|(_, bytes)| bytes).sum()));
        for (name, bytes) in list {
            let Some(hash) = tier::parse_object_name(&name) else { continue };
            let record = Record { state: State::Stored, hash, bytes };
            let header = objects.read(&name, 0, HEADER_BYTES as u64)?;
            let Some(id) =
                header.get(8..16).and_then(|number| number.first_chunk()).map(|n| PackId(u64::from_le_bytes(*n)))
            else {
                self.problems.lock().push(format!("object {name}: too short for a pack"));
                continue;
            };
            let here = self.packs.path(id);
            if here.exists() {
                let detail = match offload::hash_file(&here) {
                    Ok((found, _)) if found == hash => {
                        self.db.put(Cf::Meta, tier::key(id), record.encode())?;
                        continue;
                    }
                    Ok(_) => format!("object {name}: another pack here has its number {id}, so that it isn't taken"),
                    Err(error) => {
                        format!("object {name}: it isn't taken, since pack {id} is here, and can't be read: {error}")
                    }
                };
                self.problems.lock().push(detail);
                continue;
            }
            let path = tmp.join(format!("{id}.pack"));
            match offload::fetch(objects, &record, &path, self.monitor) {
                Ok(()) => {}
                Err(error @ Error::Corrupt { .. }) => {
                    self.problems.lock().push(error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            }
            let file = File::open(&path).map_err(|e| Error::file("open", &path, e))?;
            self.records(id, &path, &file)?;
            self.db.put(Cf::Meta, tier::key(id), record.encode())?;
            fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e))?;
        }
        Ok(())
    }

    /// All records of the pack `id`, which lies at `path`.
    fn records(&self, id: PackId, path: &Path, file: &File) -> Result<()> {
        self.packs_read.fetch_add(1, Ordering::Relaxed);
        let scan = match PackScan::open(id, path.to_owned()) {
            Ok(scan) => scan,
            Err(error) => {
                self.problem(id, error);
                return Ok(());
            }
        };
        let mut batch = Batch::new();
        for found in scan {
            let (offset, header) = match found {
                Ok(Found::Record(offset, header)) => (offset, header),
                Ok(Found::Damage { from, to }) => {
                    self.problem(id, format_args!("bytes {from} to {to} are no record"));
                    continue;
                }
                Ok(Found::Tail { .. }) => continue,
                Err(error) => {
                    self.problem(id, error);
                    continue;
                }
            };
            let location = header.location(id, offset);
            match read_record(file, &header.id, &location).and_then(chunk::verify) {
                Ok((plain, _)) => {
                    if header.class == Class::Manifest
                        && let Ok(manifest) = Manifest::decode(&plain)
                    {
                        self.manifests.lock().insert(LayerId(header.id), manifest.parent);
                    }
                    batch.put(Cf::Chunks, header.id.0, location.encode());
                }
                Err(error) if check::is_damage(&error) => {
                    self.damaged.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
            if batch.len() >= BATCH {
                monitor::check(self.monitor)?;
                self.db.write(std::mem::take(&mut batch), Sync::No)?;
            }
        }
        self.db.write(batch, Sync::No)
    }
}

/// Opens the database at `old` for what can still be read of it. Tells what is wrong if its log is damaged: what was
/// written last may be missing then, and nothing else says so.
fn open_old(old: &Path, options: DbOptions) -> Result<(Db, Option<Error>)> {
    let read_only = DbOptions { read_only: true, create: false, ..options };
    match Db::open(old, read_only) {
        Ok(db) => Ok((db, None)),
        Err(error) => Ok((Db::open(old, DbOptions { lenient: true, ..read_only })?, Some(error))),
    }
}

/// Takes over everything from the database at `old` but the chunks, and of these those that lie elsewhere. Returns
/// what couldn't be read.
fn copy_records(old: &Path, db: &Db, packs: &Packs, options: DbOptions) -> Result<Vec<String>> {
    let (old, damage) = open_old(old, options)?;
    let mut problems: Vec<String> = damage.map(|error| format!("its log is damaged: {error}")).into_iter().collect();
    let mut note = |cf: Cf, damage: Option<Error>| {
        problems.extend(damage.map(|error| format!("not all of its {} can be read: {error}", cf.name())));
    };
    for cf in Cf::ALL.into_iter().filter(|cf| *cf != Cf::Chunks) {
        note(cf, copy_family(&old, db, cf, |_, _| Ok(true))?);
    }
    let is_remote = |(id, record): &(PackId, Record)| record.state == State::Stored && !packs.path(*id).exists();
    let remote: BTreeSet<PackId> = tier::records(db)?.into_iter().filter(is_remote).map(|(id, _)| id).collect();
    if !remote.is_empty() {
        let is_elsewhere = |key: &[u8], value: &[u8]| {
            Ok(remote.contains(&Location::decode(value)?.pack) && !db.contains(Cf::Chunks, key)?)
        };
        note(Cf::Chunks, copy_family(&old, db, Cf::Chunks, is_elsewhere)?);
    }
    Ok(problems)
}

/// Copies those entries of `cf` that are `wanted`. If not all can be read, those in front of the first that can't and those behind
/// the last, and returns why.
fn copy_family(old: &Db, db: &Db, cf: Cf, wanted: impl Fn(&[u8], &[u8]) -> Result<bool>) -> Result<Option<Error>> {
    let copy = |entries: &mut dyn Iterator<Item = Result<Entry>>| {
        let mut batch = Batch::new();
        let mut damage = None;
        for entry in entries {
            let (key, value) = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    damage = Some(error);
                    break;
                }
            };
            if wanted(&key, &value)? {
                batch.put(cf, key, value);
            }
            if batch.bytes() > 1 << 20 {
                db.write(std::mem::take(&mut batch), Sync::No)?;
            }
        }
        db.write(batch, Sync::No)?;
        Ok::<_, Error>(damage)
    };
    let damage = copy(&mut old.iter_from(cf, &[])?)?;
    if damage.is_some() {
        copy(&mut old.iter_back(cf)?)?;
    }
    Ok(damage)
}

/// Counts the names, the layers in their stacks, and those of them that are missing, as far as their manifests were read.
fn count_named(
    db: &Db,
    manifests: &BTreeMap<LayerId, Option<LayerId>>,
    report: &mut RebuildReport,
    monitor: &dyn Monitor,
) -> Result<()> {
    let mut layers = BTreeSet::new();
    for entry in db.iter_from(Cf::Names, &[])? {
        let (key, value) = entry?;
        let (name, record) = match names::decode_row(&key, &value) {
            Ok(row) => row,
            Err(error) => {
                monitor.warn(&format!("the name {:?} can't be read: {error}", String::from_utf8_lossy(&key)));
                continue;
            }
        };
        report.names += 1;
        let mut next = Some(record.layer);
        while let Some(layer) = next {
            // Of one that is only in the second tier, and was not read, it isn't known what it lies on.
            if !db.contains(Cf::Chunks, layer.0.0)? {
                report.missing_layers.entry(layer).or_default().push(name.to_string());
                break;
            }
            report.layers += u64::from(layers.insert(layer));
            next = manifests.get(&layer).copied().flatten();
        }
    }
    Ok(())
}

/// Puts `new` in the place of `old`, which afterwards lies at `new`, if there is one.
fn swap(new: &Path, old: &Path) -> Result<()> {
    let flags = if old.exists() { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
    rustix::fs::renameat_with(CWD, new, CWD, old, flags).map_err(|e| Error::file("put in place", old, e))?;
    durable::sync_parent(old)
}

fn keep_aside(folder: &Path, aside: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    remove_folder(aside)?;
    fs::rename(folder, aside).map_err(|e| Error::file("rename", folder, e))
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", folder, e)),
        _ => Ok(()),
    }
}
