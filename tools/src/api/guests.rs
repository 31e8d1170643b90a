//! Requests and answers about guests.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `/v1/guest-create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCreate {
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: String,
    /// The name of the sealed stack's top that it runs on.
    pub on: String,
    /// What its driver has to know.
    pub options: serde_json::Value,
}

/// A request about one guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestName {
    /// Its name.
    pub name: String,
}

/// `/v1/guest-remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRemove {
    /// Its name.
    pub name: String,
    /// End it if it runs.
    #[serde(default)]
    pub force: bool,
}

/// `/v1/guest-exec`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestExec {
    /// The guest's name.
    pub name: String,
    /// The command and its arguments.
    pub command: Vec<String>,
}

/// `/v1/guest-exec-stream`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestExecStream {
    /// The guest's name.
    pub name: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Whether there is something for it to read.
    #[serde(default)]
    pub stdin: bool,
}

/// How a command in a guest has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestExit {
    /// Its exit code; 128 and the signal's number if it was killed.
    pub code: i32,
}

/// What a command in a guest did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestExecResult {
    /// Its exit code; 128 and the signal's number if it was killed.
    pub code: i32,
    /// What it wrote; what isn't UTF-8 is replaced.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

/// `/v1/guest-checkpoint`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCheckpoint {
    /// The guest's name.
    pub name: String,
    /// The checkpoint's tag; "checkpoint" by default.
    #[serde(default)]
    pub tag: Option<String>,
    /// End the guest with it.
    #[serde(default)]
    pub stop: bool,
}

/// A checkpoint that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestCheckpointResult {
    /// The layer with its memory and everything else that isn't on its disk.
    pub state: String,
    /// That layer's id.
    pub state_id: String,
    /// The layer with its disk.
    pub instance: String,
    /// That layer's id.
    pub instance_id: String,
    /// Bytes of memory in the state.
    pub memory_bytes: u64,
    /// Bytes that the state added to the store.
    pub bytes_stored: u64,
    /// For how long the guest stood still.
    pub frozen_seconds: f64,
}

/// `/v1/guest-restore`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRestore {
    /// The guest's name.
    pub name: String,
    /// The checkpoint's tag; the latest of this guest by default.
    #[serde(default)]
    pub tag: Option<String>,
}

/// Guests.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestList {
    /// By name.
    pub guests: Vec<GuestInfo>,
}

/// A guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: String,
    /// The stack that it was made on.
    pub on: String,
    /// By the records: "created", "running", "stopped", "arriving", "away".
    pub state: String,
    /// By its runtime: "absent", "running", "frozen"; none if that can't be found out.
    pub activity: Option<String>,
    /// Counts its moves.
    pub epoch: u64,
    /// The host that it went to or comes from.
    pub peer: Option<String>,
    /// Whether it has run here, so that it has a disk or a checkpoint.
    #[serde(default)]
    pub has_run: bool,
    /// The number of its first process on the host.
    pub pid: Option<u32>,
    /// Memory that it uses.
    pub memory_bytes: Option<u64>,
    /// Where its root is mounted.
    pub root: Option<PathBuf>,
    /// The layer of its latest checkpoint's state, if it can be restored here.
    pub state_layer: Option<String>,
    /// The layer of its latest checkpoint's disk.
    pub instance: Option<String>,
    /// What its driver has to know.
    pub options: serde_json::Value,
}

/// `/v1/guest-stop`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestStopResult {
    /// Whether there was something to end.
    pub was_running: bool,
    /// The guest.
    #[serde(flatten)]
    pub guest: GuestInfo,
}

/// `/v1/guest-check`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestCheckResult {
    /// What is in the way of running it here.
    pub run: Vec<GuestObstacle>,
    /// What is in the way of its checkpoint, or of moving it away.
    pub source: Vec<GuestObstacle>,
    /// What is in the way of restoring it here.
    pub destination: Vec<GuestObstacle>,
}

/// Something in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestObstacle {
    /// What.
    pub what: String,
    /// The way out.
    pub fix: String,
}
