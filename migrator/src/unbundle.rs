//! Opens bundles at the receiver. PROTOCOL.md, "Bundles".
//!
//! Invariants: a base is used only if the peer may take it as being here, and whether it isn't here or isn't the peer's
//! to know makes no difference; a chunk's id is what its bytes hash to, so no lie about it is possible; holes are filled
//! with ids of chunks that came in the same transfer, and wait for these; memory is at most the bounds of one bundle, and
//! for those that wait [`MAX_WAITING`] times that.

use std::collections::HashMap;

use layerfs::chunk::{self, ChunkRead, Verified};
use layerfs::store::{Session, Store};
use layerfs::{ChunkId, Error as StoreError};

use crate::access::Access;
use crate::bundle::{self, Unpacked};
use crate::error::{Error, Result};
use crate::numbers::Arrived;
use crate::patch;
use crate::wire::{BaseName, Bundle, MAX_BUNDLE_BYTES, MAX_WAITING};

/// A bundle whose holes aren't filled yet.
#[derive(Debug)]
pub(crate) struct Half {
    unpacked: Unpacked,
    first: Option<u32>,
}

/// What became of a bundle.
pub(crate) enum Opened {
    /// Its chunks, the first of which has that number.
    Whole(Vec<Verified>, Option<u32>),
    /// It wants other chunks' ids.
    Half(Half),
}

/// Opens `bundle`. Blocks.
///
/// # Errors
/// A base that isn't there, or isn't there for this peer, or is damaged; a frame that isn't what it says; those of the
/// store.
pub(crate) fn open(store: &Store, session: &Session, access: &Access, bundle: &Bundle, peer: &str) -> Result<Opened> {
    let mut bases = Vec::new();
    let mut bytes = 0;
    for name in &bundle.bases {
        let base = find(store, session, access, name, peer)?;
        let plain = session.get(&base).map_err(|error| match error {
            StoreError::ChunkDamaged { .. } | StoreError::ChunkMissing(_) => damaged_base(peer, error),
            other => other.into(),
        })?;
        bytes += plain.len();
        if bytes > MAX_BUNDLE_BYTES {
            return Err(Error::protocol(peer, "a bundle with too large bases"));
        }
        bases.push(plain);
    }
    let unpacked = if bundle.pages.is_empty() {
        bundle::unpack(&bases.concat(), &bundle.frame, bundle.chunks, bundle.plain_bytes)
    } else {
        let bases: Vec<_> = bundle.pages.iter().copied().zip(bases).collect();
        patch::unpack(&bases, &bundle.frame, bundle.plain_bytes as usize)
    };
    let half = Half { unpacked: unpacked.map_err(|error| broken(peer, error))?, first: bundle.first };
    if half.unpacked.wanted(half.first).next().is_some() {
        return Ok(Opened::Half(half));
    }
    fill(store, half, &HashMap::new(), peer)
}

/// The chunks of `half`, whose holes are filled with `ids`. Blocks.
///
/// # Errors
/// If a hole wants another.
pub(crate) fn fill(store: &Store, mut half: Half, ids: &HashMap<u32, ChunkId>, peer: &str) -> Result<Opened> {
    let level = store.options().compression_level;
    let mut chunks = Vec::new();
    let filled = half.unpacked.visit(half.first, &|number| ids.get(&number).copied(), &mut |id, class, plain| {
        chunks.push(chunk::encode(id, class, plain, level));
    });
    filled.map_err(|error| broken(peer, error))?;
    Ok(Opened::Whole(chunks, half.first))
}

/// The bundles that wait for others, and what these have brought.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    arrived: Arrived,
    halves: Vec<Half>,
}

impl Waiting {
    /// These chunks have come, the first with number `first`.
    pub fn arrived(&mut self, first: Option<u32>, ids: &[ChunkId]) {
        if let Some(first) = first {
            self.arrived.insert(first, ids.iter().copied());
        }
    }

    /// Keeps `half` until what it wants has come.
    ///
    /// # Errors
    /// If too many wait.
    pub fn add(&mut self, half: Half, peer: &str) -> Result<()> {
        self.halves.push(half);
        if self.halves.len() > MAX_WAITING {
            return Err(Error::protocol(peer, format!("more than {MAX_WAITING} bundles that wait for others")));
        }
        Ok(())
    }

    /// One that need not wait any longer, with what it wants.
    pub fn next(&mut self) -> Option<(Half, HashMap<u32, ChunkId>)> {
        let wants = |half: &Half| self.arrived.find(half.unpacked.wanted(half.first));
        let (at, ids) = self.halves.iter().enumerate().find_map(|(at, half)| Some((at, wants(half)?)))?;
        Some((self.halves.remove(at), ids))
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.halves.is_empty()
    }
}

/// What a damaged base is reported with.
const OPENING: &str = "opening a bundle from";

/// A failure of this side, after which the same may succeed: what is damaged isn't built upon twice.
fn damaged_base(peer: &str, cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::link(OPENING, peer, std::io::Error::other(cause))
}

/// Whether `error` is that something the sender built upon is damaged here.
pub(crate) fn is_damaged_base(error: &Error) -> bool {
    matches!(error, Error::Link { action: OPENING, .. })
}

fn broken(peer: &str, error: StoreError) -> Error {
    Error::protocol(peer, error.to_string())
}

/// The chunk with a name that begins so, if the peer may know of it.
fn find(store: &Store, session: &Session, access: &Access, name: &BaseName, peer: &str) -> Result<ChunkId> {
    let found = store.find(name)?;
    let there = access.has(session, &found)?;
    if access.is_unrestricted()
        && let ([id, ..], false) = (&found[..], there.contains(&true))
    {
        // It is in the index, and known to be damaged.
        return Err(damaged_base(peer, StoreError::ChunkMissing(*id)));
    }
    let base = found.into_iter().zip(there).find(|(_, there)| *there);
    base.map(|(id, _)| id).ok_or_else(|| {
        let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        Error::protocol(peer, format!("the base {name} of a bundle is not to be had"))
    })
}
