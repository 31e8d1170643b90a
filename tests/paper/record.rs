//! What was measured of one cell, as it is kept in a file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::cell::Cell;

/// A part of a migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// What was done.
    pub name: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Whether the guest stood still.
    pub is_down: bool,
}

/// The figures of a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The cell's name.
    pub cell: String,
    /// From the migration's begin to its end, in seconds.
    pub total_seconds: f64,
    /// Bytes on the link between the hosts, in both directions, frames and all, until the guest answered again.
    pub wire_bytes: u64,
    /// The longest time between two answers that the application's client got, in seconds.
    pub downtime_seconds: f64,
    /// The same of the guest's first program.
    #[serde(default)]
    pub first_program_seconds: f64,
    /// The application's client while nothing was moved, in seconds: what the probe itself can't tell apart.
    pub noise_seconds: f64,
    /// How busy the processors were then, of 1: the guest, its clients, and whatever else there was.
    #[serde(default)]
    pub busy: f64,
    /// What the checkpoint tool took, in seconds.
    pub dump_seconds: f64,
    /// What the restore tool took, in seconds.
    pub restore_seconds: f64,
    /// Bytes sent while the guest stood still, if known.
    pub stopped_bytes: Option<u64>,
    /// The guest's memory, in bytes, if known.
    pub memory_bytes: Option<u64>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// What else is worth to be known.
    pub notes: Vec<String>,
    /// The kernel's release, and the processors.
    pub machine: String,
    /// The day on which it was measured.
    #[serde(default)]
    pub day: String,
    /// By which build: the beginning of `layerctl`'s hash; nothing for those before builds were noted.
    #[serde(default)]
    pub build: String,
}

impl Record {
    /// Downtime beyond what the tools took.
    pub fn beyond_tools(&self) -> f64 {
        (self.downtime_seconds - self.dump_seconds - self.restore_seconds).max(0.0)
    }
}

/// Where records are kept.
pub struct Records(pub PathBuf);

impl Records {
    fn path(&self, cell: Cell) -> PathBuf {
        self.0.join("cells").join(cell.file_name())
    }

    /// The record of `cell`, if it was measured.
    pub fn get(&self, cell: Cell) -> anyhow::Result<Option<Record>> {
        let path = self.path(cell);
        match fs::read(&path) {
            Ok(bytes) => {
                let read = serde_json::from_slice(&bytes);
                read.map(Some).with_context(|| format!("{} can't be read: remove it", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Keeps `record`.
    pub fn put(&self, cell: Cell, record: &Record) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(record)?;
        text.push(b'\n');
        write_whole(&self.path(cell), &text)
    }
}

/// Writes a file that is never seen in part.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let growing = path.with_extension("part");
    fs::write(&growing, bytes)
        .and_then(|()| fs::rename(&growing, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
