//! What the mounts are asked, how fast they answer, and what they are working on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `/v1/activity`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ActivityList {
    /// Seconds since the daemon started: two of these answers give rates.
    pub uptime_seconds: f64,
    /// Sorted by folder.
    pub mounts: Vec<MountActivity>,
    /// Chunks that were wanted and stood in the cache of plain chunks.
    pub cache_hits: u64,
    /// Chunks that were wanted and didn't.
    pub cache_misses: u64,
}

/// What one mount has done since this daemon serves it. What the kernel answers from its own caches doesn't come to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountActivity {
    /// Where.
    pub dir: PathBuf,
    /// What was asked at least once.
    pub ops: Vec<OpActivity>,
    /// Bytes that went to readers.
    pub read_bytes: u64,
    /// Bytes that came from writers.
    pub written_bytes: u64,
    /// How many requests are being answered.
    pub running: u64,
}

/// One kind of request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpActivity {
    /// "lookup", "read", ….
    pub op: String,
    /// How many.
    pub count: u64,
    /// How long they took together.
    pub seconds: f64,
    /// How many took up to 1 µs, up to 2 µs, up to 4 µs and so on; in the last all that took longer.
    pub buckets: Vec<u64>,
}

/// `/v1/requests`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestsRequest {
    /// Those that have been worked on for at least so long.
    #[serde(default)]
    pub longer_seconds: f64,
}

/// What the mounts are working on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestList {
    /// By mount, the longest first.
    pub requests: Vec<RequestInfo>,
}

/// A request that is being answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestInfo {
    /// The mount.
    pub dir: PathBuf,
    /// "lookup", "read", ….
    pub op: String,
    /// A path in the mount, as far as it is known.
    pub what: String,
    /// For how long.
    pub seconds: f64,
}

/// `/v1/log-filter`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogFilterRequest {
    /// The new filter; none: only tell.
    #[serde(default)]
    pub filter: Option<String>,
}

/// What the daemon logs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogFilter {
    /// The filter in force.
    pub filter: String,
}
