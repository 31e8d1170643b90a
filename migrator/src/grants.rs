//! What one attempt at a transfer leaves for the next: what a restricted peer has sent, which it need not send again; and
//! that something it built upon is damaged here, so that nothing shall be taken for held.
//!
//! Kept in memory, for a time and up to a size; forgetting costs bytes, or another attempt.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::access::HalfId;
use crate::identity::PublicKey;

/// How long an attempt's grants are kept.
pub const GRANTS_KEPT: Duration = Duration::from_secs(3600);
/// All peers' together: 16 bytes and a little each.
const MAX_GRANTS: usize = 4_000_000;

/// The grants of broken attempts, by key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Grants(Arc<Left>);

#[derive(Debug, Default)]
struct Left {
    kept: Mutex<HashMap<PublicKey, Kept>>,
    /// Peers whose last attempt met a damaged base. There are no more than peers.
    doubted: Mutex<HashSet<PublicKey>>,
}

#[derive(Debug)]
struct Kept {
    ids: HashSet<HalfId>,
    since: Instant,
}

impl Grants {
    /// Keeps what the peer with `key` has sent.
    pub fn keep(&self, key: PublicKey, ids: HashSet<HalfId>) {
        let mut all = self.0.kept.lock();
        all.retain(|_, kept| kept.since.elapsed() < GRANTS_KEPT);
        let others: usize = all.iter().filter(|(other, _)| **other != key).map(|(_, kept)| kept.ids.len()).sum();
        if ids.is_empty() || others + ids.len() > MAX_GRANTS {
            return;
        }
        all.insert(key, Kept { ids, since: Instant::now() });
    }

    /// A base of a bundle from the peer with `key` is damaged here.
    pub fn doubt(&self, key: PublicKey) {
        self.0.doubted.lock().insert(key);
    }

    /// Whether that was so since the last time.
    pub fn take_doubt(&self, key: &PublicKey) -> bool {
        self.0.doubted.lock().remove(key)
    }

    /// What was kept for `key`, which is then the new attempt's to keep.
    pub fn take(&self, key: &PublicKey) -> HashSet<HalfId> {
        let kept = self.0.kept.lock().remove(key);
        kept.filter(|kept| kept.since.elapsed() < GRANTS_KEPT).map(|kept| kept.ids).unwrap_or_default()
    }
}
