//! Checks the store's structure, without reading the chunks of data: packs, index, names, layers.
//!
//! FORMAT.md, "What fsck checks". It may run while the store is used; a collection may not run meanwhile.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId};
use crate::manifest::Manifest;
use crate::monitor::Monitor;
use crate::store::check::{Finding, PackCheck, Presence, unchecked_detail};
use crate::store::index::Location;
use crate::store::lost_names::{self, LostNames};
use crate::store::packs::is_temporary;
use crate::store::rewrite::Rewriter;
use crate::store::{Store, Uncached};

/// How to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct FsckOptions {
    /// Whether to remove index entries whose chunk isn't where they say, so that it is stored again when it comes
    /// again, and to rewrite packs that have damage where no chunk needs it.
    pub repair: bool,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// A pack, or some chunk of it, can't be read; what it holds may be whole.
    PackUnreadable,
    /// Bytes inside of a pack are no record. Harmless unless chunks are missing.
    PackDamaged,
    /// The index refers to a chunk that isn't there.
    ChunkGone,
    /// A layer that a name needs is incomplete or damaged.
    LayerBroken,
    /// Something else than a pack lies among the packs, or files of an upper that has no record any more.
    StrayFile,
    /// Names were lost with the index, and layers have not all got names again: nothing is collected.
    NamesLost,
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Its kind.
    pub kind: ProblemKind,
    /// The pack, chunk, layer or file.
    pub subject: String,
    /// What is wrong with it.
    pub detail: String,
    /// The names that it affects, as far as that is known.
    pub names: Vec<String>,
    /// Whether it was repaired.
    pub repaired: bool,
}

/// The result of a check.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct FsckReport {
    /// Packs.
    pub packs: u64,
    /// Chunks in the index that have their record.
    pub chunks: u64,
    /// What their records take, in bytes.
    pub live_bytes: u64,
    /// What records take that the index doesn't know, in bytes: garbage.
    pub dead_bytes: u64,
    /// Bytes behind the last whole record of packs: what crashes left.
    pub tail_bytes: u64,
    /// Packs that are only in the second tier, of which only the length was compared.
    pub remote_packs: u64,
    /// Chunks in them.
    pub remote_chunks: u64,
    /// Names.
    pub names: u64,
    /// Layers that were checked.
    pub layers: u64,
    /// The problems, the first [`FsckReport::MAX_PROBLEMS`] of them.
    pub problems: Vec<Problem>,
    /// How many there are in all.
    pub problem_count: u64,
}

impl FsckReport {
    /// The most problems that a report lists.
    pub const MAX_PROBLEMS: usize = 1000;

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, kind: ProblemKind, subject: String, detail: String, names: Vec<String>, repaired: bool) {
        self.problem_count += 1;
        if self.problems.len() < Self::MAX_PROBLEMS {
            self.problems.push(Problem { kind, subject, detail, names, repaired });
        }
    }
}

/// What is wrong, without the advice to run fsck.
fn told(error: &Error) -> String {
    match error {
        Error::ChunkMissing(id) => format!("chunk {id} is missing from the store"),
        error => error.to_string(),
    }
}

impl Store {
    /// Checks the structure of everything.
    ///
    /// # Errors
    /// [`Error::Busy`] while a collection or another check runs; what is wrong with the store is no error, but in the
    /// report.
    pub fn fsck(&self, monitor: &dyn Monitor, options: FsckOptions) -> Result<FsckReport> {
        let busy = || Error::Busy("a collection or check of this store is running already".to_owned());
        let _running = self.collector.running.try_lock().ok_or_else(busy)?;
        let mut report = FsckReport::default();
        // Of layers that may become whole by packs that come back nothing is to be told: all others have names.
        if LostNames::read(&self.db)? == Some(LostNames::Unrecovered) {
            let (subject, detail) = (lost_names::SUBJECT.to_owned(), lost_names::UNRECOVERED.to_owned());
            report.add(ProblemKind::NamesLost, subject, detail, Vec::new(), false);
        }
        self.find_strays(&mut report)?;
        let check = PackCheck::new(self, monitor, false);
        let findings = check.run()?;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
        report.packs = load(&check.totals.packs);
        report.chunks = load(&check.totals.live_chunks);
        report.live_bytes = load(&check.totals.live_record_bytes);
        report.dead_bytes = load(&check.totals.dead_record_bytes);
        report.tail_bytes = load(&check.totals.tail_bytes);
        report.remote_packs = load(&check.totals.remote_packs);
        report.remote_chunks = load(&check.totals.remote_chunks);
        self.report_findings(findings, monitor, options, &mut report)?;
        self.check_roots(monitor, &mut report)?;
        Ok(report)
    }

    fn find_strays(&self, report: &mut FsckReport) -> Result<()> {
        let folder = self.packs.folder();
        let failed = |e| Error::file("list", folder, e);
        let packs: HashSet<_> = self.packs.list()?.into_iter().map(|(id, _)| self.packs.path(id)).collect();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // A pack may have been made since the list was, or is being fetched; what a kill left of that goes at the next start.
            let is_fetched = path.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary);
            let is_pack = packs.contains(&path) || path.extension().is_some_and(|extension| extension == "pack");
            if !is_pack && !is_fetched {
                let detail = "it is not a pack; move it away".to_owned();
                report.add(ProblemKind::StrayFile, path.display().to_string(), detail, Vec::new(), false);
            }
        }
        self.find_lost_uppers(report)
    }

    fn find_lost_uppers(&self, report: &mut FsckReport) -> Result<()> {
        let folder = self.lost_uppers_folder();
        let failed = |e| Error::file("list", &folder, e);
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let detail = "files of an upper whose record was lost with the index; copy what you need, and remove it";
            report.add(ProblemKind::StrayFile, path.display().to_string(), detail.to_owned(), Vec::new(), false);
        }
        Ok(())
    }

    fn report_findings(
        &self,
        findings: Vec<Finding>,
        monitor: &dyn Monitor,
        options: FsckOptions,
        report: &mut FsckReport,
    ) -> Result<()> {
        let entry = |finding: &Finding| match finding {
            Finding::Chunk(id, location, _) => Some((*id, *location)),
            _ => None,
        };
        let gone: Vec<(ChunkId, Location)> = findings.iter().filter_map(entry).collect();
        if options.repair && !gone.is_empty() {
            self.index.forget(&gone)?;
            self.db.sync()?;
        }
        let mut rewriter = Rewriter::new(self, monitor);
        let mut rewritten = HashSet::new();
        for finding in findings {
            match finding {
                Finding::Unreadable(pack, error) => {
                    report.add(ProblemKind::PackUnreadable, pack.to_string(), error.to_string(), Vec::new(), false);
                }
                Finding::Damage(pack, from, to) => {
                    if options.repair && !rewritten.contains(&pack) && self.packs.claim(pack) {
                        let done = rewriter.pack(pack);
                        self.packs.release(pack);
                        rewritten.extend(done?.map(|_| pack));
                    }
                    let detail = format!("bytes {from} to {to} are no record");
                    let is_repaired = rewritten.contains(&pack);
                    report.add(ProblemKind::PackDamaged, pack.to_string(), detail, Vec::new(), is_repaired);
                }
                Finding::Unchecked(pack, error) => {
                    let detail = unchecked_detail(&error);
                    report.add(ProblemKind::PackUnreadable, pack.to_string(), detail, Vec::new(), false);
                }
                Finding::Chunk(id, _, detail) => {
                    report.add(ProblemKind::ChunkGone, id.to_string(), detail, Vec::new(), options.repair);
                }
            }
        }
        Ok(())
    }

    /// The names that keep each root; none for what is kept by a pin or an upper.
    fn named_roots(&self) -> Result<BTreeMap<LayerId, Vec<String>>> {
        let mut roots: BTreeMap<LayerId, Vec<String>> = BTreeMap::new();
        for (name, record) in self.names()? {
            roots.entry(record.layer).or_default().push(name.to_string());
        }
        for layer in self.in_use()? {
            roots.entry(layer).or_default();
        }
        Ok(roots)
    }

    fn check_roots(&self, monitor: &dyn Monitor, report: &mut FsckReport) -> Result<()> {
        monitor.phase("checking layers", None);
        let roots = self.named_roots()?;
        report.names = roots.values().map(|names| names.len() as u64).sum();
        let mut presence = Presence::new(self, monitor);
        let mut checked: HashSet<LayerId> = HashSet::new();
        for (root, names) in &roots {
            let mut next = Some(*root);
            while let Some(layer) = next.filter(|layer| checked.insert(*layer)) {
                report.layers += 1;
                monitor.items(1);
                next = match presence.layer(layer) {
                    Ok(manifest) => manifest.parent,
                    Err(Error::Cancelled) => return Err(Error::Cancelled),
                    // The name may have been removed, and collected, since the names were read.
                    Err(_) if !self.is_root(*root)? => None,
                    Err(error) => {
                        let kind = ProblemKind::LayerBroken;
                        report.add(kind, layer.to_string(), told(&error), names.clone(), false);
                        Manifest::load(&Uncached(self), layer).ok().and_then(|manifest| manifest.parent)
                    }
                };
            }
        }
        Ok(())
    }

    fn is_root(&self, layer: LayerId) -> Result<bool> {
        Ok(self.roots()?.contains(&layer))
    }
}
