//! Requests and answers about the second tier.

use serde::{Deserialize, Serialize};

/// `/v1/tier-add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierAddRequest {
    /// `s3://BUCKET[/FOLDER]`.
    pub url: String,
    /// Where the bucket is served, if not at Amazon's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Its region.
    #[serde(default)]
    pub region: Option<String>,
    /// How many bytes of packs stay on the local disk.
    #[serde(default)]
    pub keep_bytes: Option<u64>,
    /// How long a reader waits.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
}

/// What is known of the second tier.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TierInfo {
    /// Where it is; none if there is none.
    pub url: Option<String>,
    /// Where the bucket is served, if not at Amazon's.
    pub endpoint: Option<String>,
    /// How many bytes of packs stay on the local disk; all if not said.
    pub keep_bytes: Option<u64>,
    /// How long a reader waits.
    pub timeout_seconds: u64,
    /// Why it can't be used, or what went wrong last.
    pub error: Option<String>,
    /// Packs that are there.
    pub stored_packs: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// Packs that are only there.
    pub remote_packs: u64,
    /// Their bytes.
    pub remote_bytes: u64,
    /// Packs that are only here.
    pub local_packs: u64,
    /// Their bytes.
    pub local_bytes: u64,
}

/// `/v1/tier-evict`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierEvictRequest {
    /// How many bytes of packs stay here; as it was set for the tier, else none.
    #[serde(default)]
    pub keep_bytes: Option<u64>,
}

/// What was moved.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct TierMoved {
    /// Packs that were uploaded.
    pub uploaded_packs: u64,
    /// Their bytes.
    pub uploaded_bytes: u64,
    /// Packs whose files were removed here.
    pub evicted_packs: u64,
    /// Their bytes.
    pub evicted_bytes: u64,
    /// Packs that were fetched.
    pub fetched_packs: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}
