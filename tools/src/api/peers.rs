//! Requests and answers about peers and transfers.

use serde::{Deserialize, Serialize};

use super::transfers::Priority;
use crate::failure::Failure;

/// `/v1/push`, `/v1/pull`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransferRequest {
    /// The layers.
    pub names: Vec<String>,
    /// The peer.
    pub peer: String,
    /// Replace names that exist on the receiving side.
    #[serde(default)]
    pub force: bool,
    /// The most to take of the network, in bytes per second; 0 for no limit.
    #[serde(default)]
    pub limit: u64,
    /// Who goes first.
    #[serde(default)]
    pub priority: Priority,
    /// Answer at once.
    #[serde(default)]
    pub background: bool,
    /// How to use the network.
    #[serde(default)]
    pub network: NetworkRequest,
    /// Only what a mount needs first; the data follows in the background, and when it is read.
    #[serde(default)]
    pub lazy: bool,
    /// Move nothing, and say what it would cost.
    #[serde(default)]
    pub dry_run: bool,
}

/// How a transfer uses the network. What isn't given is as the daemon's config has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkRequest {
    /// So many connections; 0 for as many as it takes.
    pub connections: Option<u8>,
    /// `auto`, `tcp` or `mptcp`.
    pub transport: Option<String>,
    /// For how long a failed link is tried again.
    pub retry_for_seconds: Option<u64>,
    /// For connecting, and for the handshake.
    pub connect_seconds: Option<u64>,
    /// After so long without a word a link is dead.
    pub idle_seconds: Option<u64>,
    /// Not to call anybody, but to use the connections brought to `/v1/stream` with this number.
    pub stream: Option<u64>,
}

/// `/v1/stream-failed`: there will be no connection for the transfer that awaits it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamFailed {
    /// The stream's number.
    pub stream: u64,
    /// Why.
    pub failure: Failure,
}

/// What a transfer did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TransferResult {
    /// The names that the receiving side has now.
    pub names: Vec<String>,
    /// The peer.
    pub peer: String,
    /// The number under which `transfers` lists it.
    #[serde(default)]
    pub transfer: u64,
    /// It has only begun: the numbers that follow are 0.
    #[serde(default)]
    pub background: bool,
    /// Nothing was moved: what follows is what would be.
    #[serde(default)]
    pub dry_run: bool,
    /// In a dry run: the bytes that would go over.
    #[serde(default)]
    pub would_send_bytes: u64,
    /// In a dry run: how long that would take, if the link was ever measured.
    #[serde(default)]
    pub estimated_seconds: Option<f64>,
    /// In a dry run: what that is worked out from, in bytes per second.
    #[serde(default)]
    pub estimated_rate: Option<u64>,
    /// Layers that went over.
    pub layers_sent: u64,
    /// Chunks that went over.
    pub chunks_sent: u64,
    /// Chunks that were there already.
    pub chunks_reused: u64,
    /// The most connections at a time.
    #[serde(default)]
    pub connections: u64,
    /// How often it began again because the link had failed.
    #[serde(default)]
    pub retries: u64,
    /// Bytes written to the connection, TLS included where known.
    pub bytes_sent: u64,
    /// Bytes read from the connection.
    pub bytes_received: u64,
    /// How long it took.
    pub seconds: f64,
    /// How long each phase took, in order.
    pub phases: Vec<(String, f64)>,
}

/// `/v1/peer-add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerAddRequest {
    /// What it is called here.
    pub name: String,
    /// Where it listens; none for a host that only connects to this one.
    #[serde(default)]
    pub address: Option<String>,
    /// Its public key.
    pub key: String,
    /// It may push to this host.
    #[serde(default = "super::yes")]
    pub allow_push: bool,
    /// It may pull from this host.
    #[serde(default = "super::yes")]
    pub allow_pull: bool,
    /// It may move guests to this host.
    #[serde(default)]
    pub allow_guests: bool,
    /// The names that it may see; none given means all.
    #[serde(default)]
    pub visible: Vec<String>,
    /// Replace a peer of this name.
    #[serde(default)]
    pub force: bool,
}

/// A peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerInfo {
    /// What it is called here.
    pub name: String,
    /// Where it listens.
    pub address: Option<String>,
    /// Its public key.
    pub key: String,
    /// The key in a form that people compare.
    pub fingerprint: String,
    /// It may push to this host.
    pub allow_push: bool,
    /// It may pull from this host.
    pub allow_pull: bool,
    /// It may move guests to this host.
    #[serde(default)]
    pub allow_guests: bool,
    /// The names that it may see; empty means all.
    pub visible: Vec<String>,
}

/// `/v1/peers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerList {
    /// Sorted by name.
    pub peers: Vec<PeerInfo>,
    /// Hosts that called of late and are no peers.
    pub strangers: Vec<StrangerInfo>,
}

/// A host that called and is no peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StrangerInfo {
    /// From where it called.
    pub address: String,
    /// Its public key.
    pub key: String,
    /// The key in a form that people compare.
    pub fingerprint: String,
}

/// `/v1/peer-probe`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeRequest {
    /// Where it listens.
    pub address: String,
}

/// The key that a host shows. Nothing says yet whose it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProbeResult {
    /// Its public key.
    pub key: String,
    /// The key in a form that people compare.
    pub fingerprint: String,
}

/// `/v1/peer-set`: changes what a peer may do. What isn't given stays.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSetRequest {
    /// What it is called here.
    pub name: String,
    /// Where it listens; empty for a host that only connects to this one.
    #[serde(default)]
    pub address: Option<String>,
    /// It may push to this host.
    #[serde(default)]
    pub allow_push: Option<bool>,
    /// It may pull from this host.
    #[serde(default)]
    pub allow_pull: Option<bool>,
    /// It may move guests to this host.
    #[serde(default)]
    pub allow_guests: Option<bool>,
    /// The names that it may see; an empty list means all.
    #[serde(default)]
    pub visible: Option<Vec<String>>,
}

/// `/v1/peer-remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerRemoveRequest {
    /// Their names.
    pub names: Vec<String>,
}

/// `/v1/peer-id`: who this host is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// Its public key.
    pub key: String,
    /// The key in a form that people compare.
    pub fingerprint: String,
    /// The host's name, as a suggestion for what others call it.
    pub host: String,
    /// The port to connect to.
    pub port: u16,
    /// Where it listens now.
    pub listening: Option<String>,
    /// Why it doesn't listen though it should.
    #[serde(default)]
    pub listen_error: Option<String>,
    /// Whether and where it was told to: `auto`, `off` or an address.
    #[serde(default)]
    pub listen: String,
}
