//! Requests and answers about OCI registries.

use serde::{Deserialize, Serialize};

use super::transfers::Priority;

/// Who one is at a registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// The user's name.
    pub username: String,
    /// The password, or a token that stands for it.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({}, …)", self.username)
    }
}

/// `/v1/registry-push`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryPushRequest {
    /// The layer.
    pub name: String,
    /// `oci://HOST/REPOSITORY[:TAG]`.
    pub address: String,
    /// Who one is there.
    #[serde(default)]
    pub login: Option<Login>,
    /// Without TLS.
    #[serde(default)]
    pub plain_http: bool,
    /// What to make of the stack: "image" (the default), "image-zstd", "packs".
    #[serde(default)]
    pub form: Option<String>,
    /// The most to take of the network, in bytes per second; 0 for no limit.
    #[serde(default)]
    pub limit: u64,
    /// Who goes first.
    #[serde(default)]
    pub priority: Priority,
}

/// What a push to a registry did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegistryPushResult {
    /// The layer's id.
    pub id: String,
    /// Where it is.
    pub address: String,
    /// The digest of the manifest there.
    pub digest: String,
    /// Blobs that were uploaded.
    pub blobs_sent: u64,
    /// Blobs that were there already.
    pub blobs_reused: u64,
    /// Bytes that were uploaded.
    pub bytes_sent: u64,
    /// How long it took.
    pub seconds: f64,
}

/// `/v1/registry-pull`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryPullRequest {
    /// The name that the layer gets.
    pub name: String,
    /// `oci://HOST/REPOSITORY[:TAG|@DIGEST]`.
    pub address: String,
    /// Who one is there.
    #[serde(default)]
    pub login: Option<Login>,
    /// Without TLS.
    #[serde(default)]
    pub plain_http: bool,
    /// For which platform the image shall be.
    #[serde(default)]
    pub platform: Option<String>,
    /// Replace the name.
    #[serde(default)]
    pub force: bool,
    /// The most to take of the network, in bytes per second; 0 for no limit.
    #[serde(default)]
    pub limit: u64,
    /// Who goes first.
    #[serde(default)]
    pub priority: Priority,
}

/// What a pull from a registry did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegistryPullResult {
    /// The name.
    pub name: String,
    /// The layer's id.
    pub id: String,
    /// Where it came from.
    pub address: String,
    /// The digest of the manifest there.
    pub digest: String,
    /// Layers of the stack.
    pub layers: u64,
    /// Blobs that were downloaded.
    pub blobs_received: u64,
    /// Bytes that were downloaded.
    pub bytes_received: u64,
    /// Bytes that were added to the store; none for what wasn't an image.
    pub bytes_stored: Option<u64>,
    /// How long it took.
    pub seconds: f64,
}
