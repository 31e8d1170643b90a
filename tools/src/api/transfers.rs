//! Requests and answers about running transfers.

use serde::{Deserialize, Serialize};

/// Who goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Only what others leave
    Low,
    /// As usual
    #[default]
    Normal,
    /// Others leave it the network
    High,
}

/// `/v1/transfers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferList {
    /// Those that ended of late, then those that run.
    pub transfers: Vec<TransferInfo>,
    /// What all together may move each way, in bytes per second.
    pub limit: Option<u64>,
}

/// A transfer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferInfo {
    /// Its number.
    pub id: u64,
    /// `sending` or `receiving`.
    pub role: String,
    /// Who began it: `here` or `peer`.
    pub origin: String,
    /// The peer's name.
    pub peer: String,
    /// The layers' names.
    pub names: Vec<String>,
    /// Whether nothing is moved, and it only finds out what would be.
    #[serde(default)]
    pub dry_run: bool,
    /// `running`, `paused`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// What is being done.
    pub phase: String,
    /// Plain bytes of layers done.
    pub bytes: u64,
    /// How many there are, if known.
    pub total_bytes: Option<u64>,
    /// Chunks moved.
    pub chunks: u64,
    /// Bytes written to the network.
    pub bytes_sent: u64,
    /// Bytes read from the network.
    pub bytes_received: u64,
    /// Bytes per second on the network, the chunks' way.
    pub rate: f64,
    /// How much longer it takes.
    pub seconds_left: Option<f64>,
    /// How long it has taken.
    pub seconds: f64,
    /// The most that it may take of the network, in bytes per second.
    pub limit: Option<u64>,
    /// Who goes first.
    pub priority: Priority,
    /// Whether it was paused here.
    pub paused: bool,
    /// Connections that carry it.
    pub connections: u32,
    /// Why it failed.
    pub error: Option<String>,
}

/// `/v1/transfer-set`: changes running transfers. What isn't given stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferSet {
    /// Their numbers.
    pub transfers: Vec<u64>,
    /// Cancel them.
    #[serde(default)]
    pub cancel: bool,
    /// Pause them, or let them go on.
    #[serde(default)]
    pub paused: Option<bool>,
    /// Limit them: bytes per second, 0 for no limit.
    #[serde(default)]
    pub limit: Option<u64>,
    /// Who goes first.
    #[serde(default)]
    pub priority: Option<Priority>,
}

/// `/v1/limit`: tells or changes what all transfers together may move each way.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitRequest {
    /// Bytes per second, 0 for no limit.
    #[serde(default)]
    pub limit: Option<u64>,
    /// Do as the config file says.
    #[serde(default)]
    pub reset: bool,
}

/// What all transfers together may move each way.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limit {
    /// In bytes per second; none is no limit.
    pub limit: Option<u64>,
    /// Whether that is what the config file says, or says nothing of.
    pub from_config: bool,
}
