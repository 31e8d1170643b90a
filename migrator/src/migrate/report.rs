//! What a migration did: its stages with their times and bytes, the downtime, and what was predicted. FORMAT.md, "Reports".
//!
//! Invariant: a report is for people and for estimates: nothing breaks if one is lost or can't be read.

use layerfs::attr::Time;
use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::{Error, Result};
use serde::{Deserialize, Serialize};

use super::learnt::Downtime;
use super::plan::{LinkSpeed, Round};
use crate::guest::Obstacle;

const VERSION: u8 = 1;
const PREFIX: &[u8] = b"report.";
/// What stands for the end of a migration that goes on.
pub(super) const RUNNING: &str = "running";
/// What stands for one of which it isn't known.
pub(super) const IN_DOUBT: &str = "in doubt";
/// So many are kept.
pub const KEPT: usize = 200;

/// A part of a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// "preflight", "ahead", "round 1", "defer", "dump", "pack", "send", "stage", "restore", "clean up", "rest".
    pub name: String,
    /// When it began, in seconds since the migration did.
    pub at: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Whether the guest stood still.
    pub is_down: bool,
}

/// A migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The move's number.
    pub id: String,
    /// The guest's name.
    pub guest: String,
    /// Its driver.
    pub driver: String,
    /// Where it went.
    pub peer: String,
    /// When it began, in seconds since 1970.
    pub began: i64,
    /// How it ended: "moved", "aborted", "given-back", "given-up", "dry run"; or "running", or "in doubt" as long as it isn't over.
    pub outcome: String,
    /// Why, if it isn't "moved".
    pub error: Option<String>,
    /// How long all of it took, in seconds.
    pub seconds: f64,
    /// Bytes on the wire, from here.
    pub bytes: u64,
    /// The guest's memory, in bytes.
    pub memory_bytes: u64,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// What the link did.
    pub link: Option<LinkSpeed>,
    /// The downtime as predicted when the guest was about to stop.
    pub predicted: Option<Downtime>,
    /// The downtime.
    pub downtime: Option<Downtime>,
    /// What the destination's restoring tool took of it, in seconds.
    #[serde(default)]
    pub restore_seconds: Option<f64>,
    /// Why it went as it did: rounds ended, post-copy chosen.
    pub decisions: Vec<String>,
    /// What stood in the way, before anything had changed.
    #[serde(default)]
    pub obstacles: Vec<Obstacle>,
}

impl Report {
    /// An empty one.
    pub fn new(id: &str, guest: &str, driver: &str, peer: &str) -> Report {
        Report {
            id: id.to_owned(),
            guest: guest.to_owned(),
            driver: driver.to_owned(),
            peer: peer.to_owned(),
            began: Time::now().seconds,
            outcome: RUNNING.to_owned(),
            error: None,
            seconds: 0.0,
            bytes: 0,
            memory_bytes: 0,
            stages: Vec::new(),
            rounds: Vec::new(),
            link: None,
            predicted: None,
            downtime: None,
            restore_seconds: None,
            decisions: Vec::new(),
            obstacles: Vec::new(),
        }
    }

    /// Whether the guest runs at the destination.
    pub fn has_moved(&self) -> bool {
        self.outcome == "moved"
    }

    /// Whether its end is still to come.
    pub(super) fn is_open(&self) -> bool {
        [RUNNING, IN_DOUBT].contains(&self.outcome.as_str())
    }

    /// The stage called `name`.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        // Numbers that are none at all become null, so this can't fail.
        out.extend_from_slice(&serde_json::to_vec(self).unwrap_or_default());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Report> {
        match bytes.split_first() {
            Some((&VERSION, json)) => {
                serde_json::from_slice(json).map_err(|e| Error::corrupt("migration report", e.to_string()))
            }
            _ => Err(Error::Unsupported { what: "migration report", detail: "another version".to_owned() }),
        }
    }
}

/// The key sorts by when a report was first kept, and ends with the move's number.
fn key(report: &Report) -> Vec<u8> {
    let now = Time::now();
    [PREFIX, &now.seconds.to_be_bytes(), &now.nanos.to_be_bytes(), report.id.as_bytes()].concat()
}

/// Keeps `report` in the place of what was kept of the same move, and forgets the oldest if there are many. Blocks.
///
/// # Errors
/// Those of the index.
pub fn save(store: &Store, report: &Report) -> Result<()> {
    let mut batch = Batch::new();
    let kept: Vec<Vec<u8>> =
        store.db().iter(Cf::Meta, PREFIX)?.map(|entry| Ok(entry?.0.to_vec())).collect::<Result<_>>()?;
    match kept.iter().find(|key| key.ends_with(report.id.as_bytes())) {
        Some(key) => batch.put(Cf::Meta, key, report.encode()),
        None => {
            batch.put(Cf::Meta, key(report), report.encode());
            kept.iter().take((kept.len() + 1).saturating_sub(KEPT)).for_each(|old| batch.delete(Cf::Meta, old));
        }
    }
    store.db().write(batch, Sync::No)
}

/// All that are kept and can be read, the latest last. Blocks.
///
/// # Errors
/// Those of the index.
pub fn load(store: &Store) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for entry in store.db().iter(Cf::Meta, PREFIX)? {
        match Report::decode(&entry?.1) {
            Ok(report) => reports.push(report),
            Err(error) => tracing::debug!(%error, "a report can't be read"),
        }
    }
    Ok(reports)
}

/// The one whose number begins with `id`; with nothing, the latest. Blocks.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Invalid`] if several begin so.
pub fn find(store: &Store, id: &str) -> Result<Report> {
    let mut reports = load(store)?;
    if !id.is_empty() {
        reports.retain(|report| report.id.starts_with(id));
        if reports.len() > 1 {
            return Err(Error::invalid(format!("{} reports begin with {id}; give more digits", reports.len())));
        }
    }
    reports.pop().ok_or_else(|| Error::NotFound { what: "report", name: id.to_owned() })
}

#[cfg(test)]
mod tests {
    use layerfs::store::StoreOptions;

    use super::*;

    #[test]
    fn reports_are_kept_found_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        for number in 0..KEPT + 5 {
            let mut report = Report::new(&format!("{number:04}"), "web", "fake", "edge");
            report.began = number as i64;
            save(&store, &report).unwrap();
        }
        let reports = load(&store).unwrap();
        assert_eq!((reports.len(), reports[0].began), (KEPT, 5));
        assert_eq!(find(&store, "").unwrap().id, "0204");
        assert_eq!(find(&store, "0100").unwrap(), reports[95]);
        assert!(matches!(find(&store, "00"), Err(Error::Invalid { .. })));
        assert!(matches!(find(&store, "9"), Err(Error::NotFound { .. })));
        // What becomes of one later doesn't make it another, nor the latest.
        let late = Report { outcome: "moved".to_owned(), ..reports[95].clone() };
        save(&store, &late).unwrap();
        assert_eq!((load(&store).unwrap().len(), find(&store, "0100").unwrap()), (KEPT, late));
        assert_eq!(find(&store, "").unwrap().id, "0204");
    }
}
