//! Reads and verifies every chunk that the index knows.
//!
//! Damaged chunks stay where they are until a good copy comes: by [`crate::store::Session::replace`], or by whatever
//! adds the same content again, since what is known to be damaged counts as lacking.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::Ordering;

use crate::chunk::Class;
use crate::closure::{ChunkUse, Known, walk_stack};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::monitor::Monitor;
use crate::store::check::{Finding, PackCheck, unchecked_detail};
use crate::store::{Store, Uncached};

/// A chunk whose bytes are wrong or gone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DamagedChunk {
    /// Its id.
    pub id: ChunkId,
    /// What it held.
    pub class: Class,
    /// Its plain length in bytes.
    pub plain_bytes: u32,
    /// What is wrong with it.
    pub detail: String,
    /// The names whose stacks need it.
    pub names: Vec<String>,
}

/// The result of reading everything.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct ScrubReport {
    /// Packs.
    pub packs: u64,
    /// Chunks read, damaged ones included.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// What their records take, in bytes.
    pub stored_bytes: u64,
    /// Packs, or parts of them, that can't be read.
    pub pack_problems: Vec<String>,
    /// Packs of which not all chunks could be looked at.
    pub unchecked_packs: u64,
    /// The damaged chunks.
    pub damaged: Vec<DamagedChunk>,
}

impl ScrubReport {
    /// Whether every chunk was looked at and is whole.
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.unchecked_packs == 0
    }
}

impl Store {
    /// Reads and verifies every chunk.
    ///
    /// # Errors
    /// [`Error::Busy`] while a collection or another check runs. Damage is no error, but in the report.
    pub fn scrub(&self, monitor: &dyn Monitor) -> Result<ScrubReport> {
        let busy = || Error::Busy("a collection or check of this store is running already".to_owned());
        let _running = self.collector.running.try_lock().ok_or_else(busy)?;
        let check = PackCheck::new(self, monitor, true);
        let findings = check.run()?;
        let mut report = ScrubReport {
            packs: check.totals.packs.load(Ordering::Relaxed),
            chunks: check.totals.live_chunks.load(Ordering::Relaxed),
            plain_bytes: check.totals.live_plain_bytes.load(Ordering::Relaxed),
            stored_bytes: check.totals.live_record_bytes.load(Ordering::Relaxed),
            ..ScrubReport::default()
        };
        let unread = check.totals.remote_packs.load(Ordering::Relaxed);
        if unread > 0 {
            monitor.warn(&format!(
                "{unread} packs that are only in the second tier were not read; `layerctl tier fetch` brings them here"
            ));
        }
        for finding in findings {
            match finding {
                Finding::Unreadable(pack, error) => report.pack_problems.push(format!("pack {pack}: {error}")),
                Finding::Damage(pack, from, to) => {
                    report.pack_problems.push(format!("pack {pack}: bytes {from} to {to} are no record"));
                }
                Finding::Unchecked(pack, error) => {
                    report.unchecked_packs += 1;
                    report.pack_problems.push(format!("pack {pack}: {}", unchecked_detail(&error)));
                }
                Finding::Chunk(id, location, detail) => {
                    self.suspects.add(id);
                    report.damaged.push(DamagedChunk {
                        id,
                        class: location.class,
                        plain_bytes: location.plain_bytes,
                        detail,
                        names: Vec::new(),
                    });
                }
            }
        }
        report.damaged.sort_by_key(|chunk| chunk.id);
        self.find_names(monitor, &mut report.damaged)?;
        Ok(report)
    }

    fn find_names(&self, monitor: &dyn Monitor, damaged: &mut [DamagedChunk]) -> Result<()> {
        if damaged.is_empty() {
            return Ok(());
        }
        monitor.phase("looking who needs the damaged chunks", None);
        let ids: HashSet<ChunkId> = damaged.iter().map(|chunk| chunk.id).collect();
        let mut needed: BTreeMap<ChunkId, BTreeSet<String>> = BTreeMap::new();
        for (name, record) in self.names()? {
            let mut known = Known::default();
            let mut look = |chunk: ChunkUse| {
                if ids.contains(&chunk.id) {
                    needed.entry(chunk.id).or_default().insert(name.to_string());
                }
                Ok(known.is_new(&chunk))
            };
            // Damage ends the walk, but is shown before.
            if let Err(Error::Cancelled) = walk_stack(&Uncached(self), record.layer, &mut look, |_| false) {
                return Err(Error::Cancelled);
            }
        }
        for chunk in damaged {
            chunk.names = needed.remove(&chunk.id).into_iter().flatten().collect();
        }
        Ok(())
    }
}
