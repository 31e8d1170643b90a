//! Requests and answers about mounts and uppers.

use std::path::PathBuf;

use layerfs::mount::{Flags, Transport};
use serde::{Deserialize, Serialize};

use super::Timestamp;
use super::layers::PartialInfo;
use crate::cli::layers::Kind;

/// `/v1/mount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// A name or an id's beginning.
    pub layer: String,
    /// Where: an absolute path.
    pub dir: PathBuf,
    /// No changes.
    #[serde(default)]
    pub read_only: bool,
    /// A named upper.
    #[serde(default)]
    pub upper: Option<String>,
    /// How requests shall come: `auto`, `uring`, `read`.
    #[serde(default)]
    pub transport: Transport,
    /// Large files of lower layers shall have the kernel's writeback cache, where that can be had.
    #[serde(default = "super::yes")]
    pub writeback: bool,
    /// What the kernel shall keep of the mount, now and when it is mounted again: `nosuid`, `ro` of an upper, ….
    #[serde(default, skip_serializing_if = "Flags::is_empty")]
    pub options: Flags,
}

/// `/v1/remount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemountRequest {
    /// Where: an absolute path.
    pub dir: PathBuf,
    /// As for [`MountRequest`]: these, and no others.
    #[serde(default)]
    pub options: Flags,
}

/// A mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountInfo {
    /// Where.
    pub dir: PathBuf,
    /// The layer that lies below the upper.
    pub layer: String,
    /// A name of it.
    pub layer_name: Option<String>,
    /// No changes.
    pub read_only: bool,
    /// The upper's number.
    pub upper: Option<u64>,
    /// The upper's name.
    pub upper_name: Option<String>,
    /// Since when.
    pub since: Timestamp,
    /// How requests come: `uring` or `read`.
    #[serde(default)]
    pub transport: Transport,
    /// Whether large files of lower layers have the kernel's writeback cache.
    #[serde(default)]
    pub writeback: bool,
    /// What plain copies of its large files take of the disk, in bytes.
    #[serde(default)]
    pub warm_bytes: u64,
    /// What the kernel keeps of the mount.
    #[serde(default, skip_serializing_if = "Flags::is_empty")]
    pub options: Flags,
    /// If data of its layers is still on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial: Option<PartialInfo>,
}

/// `/v1/mounts`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountList {
    /// Sorted by folder.
    pub mounts: Vec<MountInfo>,
}

/// `/v1/umount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UmountRequest {
    /// Where: absolute paths.
    #[serde(default)]
    pub dirs: Vec<PathBuf>,
    /// All mounts.
    #[serde(default)]
    pub all: bool,
    /// Throw changes of nameless uppers away.
    #[serde(default)]
    pub discard: bool,
    /// Detach even if in use.
    #[serde(default)]
    pub lazy: bool,
    /// End its copies too: on other folders, and in other mount namespaces.
    #[serde(default)]
    pub everywhere: bool,
}

/// What was unmounted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UmountResult {
    /// One for each mount.
    pub unmounted: Vec<Unmounted>,
}

/// A mount that is no more, on its folder at least.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unmounted {
    /// Where it was.
    pub dir: PathBuf,
    /// Whether it goes on where there are copies of it. What was detached (`lazy`) isn't waited for, and not told of.
    #[serde(default)]
    pub goes_on: bool,
    /// The other folders that it is mounted on (`mount --bind`).
    #[serde(default)]
    pub also_at: Vec<PathBuf>,
    /// If it is on none that the daemon sees: the processes in whose mount namespaces it is, number and name.
    #[serde(default)]
    pub used_by: Vec<String>,
    /// The upper that was kept.
    pub kept_upper: Option<UpperInfo>,
}

/// `/v1/seal`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealRequest {
    /// Where it is mounted: an absolute path.
    pub dir: PathBuf,
    /// The new layer's name.
    pub name: String,
    /// What it is for.
    #[serde(default)]
    pub kind: Option<Kind>,
    /// Replace the name.
    #[serde(default)]
    pub force: bool,
    /// Squash the seals below and this one if they are more than so many, 0: never; none: as the config file says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squash_past: Option<u64>,
}

/// What a seal made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SealResult {
    /// The new layer's name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Whether nothing had changed, so that the name went to the layer below.
    pub unchanged: bool,
    /// Inode records in it.
    pub inodes: u64,
    /// Dentry records in it.
    pub dentries: u64,
    /// The sizes of its files, added up.
    pub file_bytes: u64,
    /// Bytes that the store grew by.
    pub bytes_stored: u64,
    /// How many layers were squashed into this one, itself among them; 0: none.
    #[serde(default)]
    pub squashed: u64,
    /// How long it took.
    pub seconds: f64,
}

/// An upper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpperInfo {
    /// Its number.
    pub id: u64,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// The layer that it lies on.
    pub base: String,
    /// A name of it.
    pub base_name: Option<String>,
    /// When it was made.
    pub created: Timestamp,
    /// Where it is mounted now.
    pub mounted_at: Option<PathBuf>,
    /// Inodes that it holds.
    pub inodes: u64,
    /// Bytes of file data that it holds.
    pub data_bytes: u64,
}

/// `/v1/uppers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpperList {
    /// Sorted by number.
    pub uppers: Vec<UpperInfo>,
}

/// `/v1/uppers-remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UppersRemoveRequest {
    /// Names or numbers.
    pub uppers: Vec<String>,
}
