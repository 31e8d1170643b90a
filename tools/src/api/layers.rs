//! Requests and answers about layers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{PathText, Timestamp};
use crate::cli::layers::Kind;
use crate::failure::Failure;

/// `/v1/import`: what to import.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// An absolute path; none means the request's body.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// The new layer's name.
    pub name: String,
    /// The layer that it lies on.
    #[serde(default)]
    pub parent: Option<String>,
    /// What it is for.
    #[serde(default)]
    pub kind: Option<Kind>,
    /// A predecessor with the same paths.
    #[serde(default)]
    pub like: Option<String>,
    /// The source is the whole tree.
    #[serde(default)]
    pub whole: bool,
    /// What the source is; detected by default.
    #[serde(default)]
    pub format: Option<String>,
    /// Honour OCI whiteouts in plain tars.
    #[serde(default)]
    pub oci_whiteouts: bool,
    /// Stay on the folder's file system.
    #[serde(default)]
    pub one_file_system: bool,
    /// Which image of an archive with several.
    #[serde(default)]
    pub reference: Option<String>,
    /// Which image of an index for several platforms.
    #[serde(default)]
    pub platform: Option<String>,
    /// Replace the name.
    #[serde(default)]
    pub force: bool,
}

/// What an import made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImportResult {
    /// What the source was.
    pub format: String,
    /// The layers, the lowest first.
    pub layers: Vec<NewLayer>,
    /// Entries of the source.
    pub entries: u64,
    /// Bytes of file content that were read.
    pub bytes_read: u64,
    /// Chunks that were new.
    pub new_chunks: u64,
    /// Bytes that they take in the store.
    pub bytes_stored: u64,
    /// Bytes of content that the store had already.
    pub bytes_known: u64,
    /// How long it took.
    pub seconds: f64,
}

/// A layer that was just made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewLayer {
    /// Its name; the lower layers of an image have none.
    pub name: Option<String>,
    /// Its id.
    pub id: String,
    /// What it is for.
    pub kind: String,
    /// Inode records.
    pub inodes: u64,
    /// The sizes of the files in it, added up.
    pub file_bytes: u64,
}

/// `/v1/export`, `/v1/export-stream`: what to write.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// The layer.
    pub name: String,
    /// An absolute path, or `oci:` with one and perhaps a tag; none for `/v1/export-stream`.
    #[serde(default)]
    pub dest: Option<PathBuf>,
    /// What to write: "folder", "tar", "tar.gz", "tar.zst", "tar.xz", "oci", "oci-zstd", "raw"; by default what the
    /// path's ending says.
    #[serde(default)]
    pub format: Option<String>,
}

/// What an export wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportResult {
    /// The layer's id.
    pub id: String,
    /// Files, folders and all else.
    pub entries: u64,
    /// Bytes of file content, holes not counted.
    pub data_bytes: u64,
    /// The digest of the OCI manifest, if it is an OCI layout.
    pub oci_manifest: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

/// `/v1/tag`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagRequest {
    /// A name or an id's beginning.
    pub layer: String,
    /// The new name.
    pub name: String,
    /// Replace it.
    #[serde(default)]
    pub force: bool,
}

/// A name and its layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The layer's id.
    pub id: String,
}

/// `/v1/remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveRequest {
    /// The names.
    pub names: Vec<String>,
}

/// What was removed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RemoveResult {
    /// The names that are gone.
    pub removed: Vec<Named>,
}

/// `/v1/list`, `/v1/tree`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListRequest {
    /// Only names that match.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Only this kind.
    #[serde(default)]
    pub kind: Option<Kind>,
}

/// Layers, by name.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerList {
    /// One for each name, sorted.
    pub layers: Vec<LayerInfo>,
    /// Names whose layers can't be read. Of `/v1/list` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Unreadable>,
}

/// A name whose layer can't be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unreadable {
    /// The name.
    pub name: String,
    /// The layer's id.
    pub id: String,
    /// Why.
    pub error: Failure,
}

/// A layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Its names, sorted; none for layers that only lie below others.
    pub names: Vec<String>,
    /// Its id.
    pub id: String,
    /// What it is for.
    pub kind: String,
    /// The layer below it.
    pub parent: Option<String>,
    /// A name of the layer below it.
    pub parent_name: Option<String>,
    /// How many layers lie below it.
    pub depth: u32,
    /// Inode records in this layer.
    pub inodes: u64,
    /// Dentry records in this layer, whiteouts included.
    pub dentries: u64,
    /// The sizes of the files in this layer, added up.
    pub file_bytes: u64,
    /// When its (first listed) name was given.
    pub created: Option<Timestamp>,
    /// If data of it, or of layers below it, is still on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial: Option<PartialInfo>,
}

/// What of a stack is still on its way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartialInfo {
    /// How much of its partial layers' data is here, rounded down.
    pub percent: u64,
    /// The same in bytes.
    pub here_bytes: u64,
    /// Of so many.
    pub total_bytes: u64,
    /// The peers that it comes from.
    pub sources: Vec<String>,
    /// Whether the source sends the rest by itself.
    pub pushed: bool,
    /// Why it doesn't come at present.
    pub error: Option<String>,
}

impl PartialInfo {
    /// In words.
    pub fn text(&self) -> String {
        let error = self.error.as_ref().map(|error| format!(" ({error})")).unwrap_or_default();
        format!("partial, {}% here, from {}{error}", self.percent, self.sources.join(", "))
    }
}

/// `/v1/log`, `/v1/inspect`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InspectRequest {
    /// A name or an id's beginning.
    pub layer: String,
    /// A path in it.
    #[serde(default)]
    pub path: Option<PathText>,
    /// Tell the chunks, as items.
    #[serde(default)]
    pub chunks: bool,
}

/// What a layer or a path is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InspectResult {
    /// The layer.
    pub layer: LayerInfo,
    /// The number that the next new inode above gets.
    pub next_ino: u64,
    /// Bytes of the manifest's two tables.
    pub table_bytes: u64,
    /// What lies at the path, if one was asked for.
    pub entry: Option<EntryInfo>,
    /// How the image that the stack came from, or its lower part, is run; none if it came from no image.
    #[serde(default)]
    pub image: Option<ImageInfo>,
    /// What mounts of its stack have read, in the order of their reading: what a lazy transfer brings first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<TraceInfo>,
}

/// A trace: which chunks the mounts of a stack first read, in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TraceInfo {
    /// The top layer of the stack.
    pub layer: String,
    /// Its names; none if it isn't here any more.
    pub names: Vec<String>,
    /// How many chunks.
    pub chunks: u64,
    /// What those of them that are here take, in bytes.
    pub stored_bytes: u64,
    /// When it was last added to.
    pub recorded: Timestamp,
}

/// `/v1/traces`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TraceList {
    /// The latest first.
    pub traces: Vec<TraceInfo>,
}

/// `/v1/traces-remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesRemoveRequest {
    /// Names of layers, or beginnings of their ids.
    #[serde(default)]
    pub layers: Vec<String>,
    /// All there are.
    #[serde(default)]
    pub all: bool,
}

/// An image's configuration, as import found it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The layer that was the image's top.
    pub layer: String,
    /// The properties of the image-spec's configuration, without `rootfs`: `config`, `architecture`, `history`, ….
    pub configuration: serde_json::Value,
}

/// What lies at a path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EntryInfo {
    /// The path.
    pub path: PathText,
    /// Its inode number, in every mount.
    pub ino: u64,
    /// "file", "folder", ….
    pub kind: String,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links.
    pub nlink: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that are not holes.
    pub data_bytes: u64,
    /// When its content changed last.
    pub modified: Timestamp,
    /// The chunker that cut it.
    pub chunker: Option<String>,
    /// Where a symbolic link leads to.
    pub target: Option<PathText>,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
    /// Names of the extended attributes.
    pub xattrs: Vec<String>,
}

/// An item of `inspect`: an entry of a folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FolderItem {
    /// Its name.
    pub name: PathText,
    /// Its inode number.
    pub ino: u64,
    /// "file", "folder", ….
    pub kind: String,
    /// Size in bytes.
    pub size: u64,
}

/// An item of `inspect` with `chunks`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChunkItem {
    /// Which part it belongs to: "data", "inodes", "dentries".
    pub part: String,
    /// Where it lies in the file or table.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its id; none for a hole.
    pub id: Option<String>,
    /// What it takes in its pack, in bytes; none if it is missing.
    pub stored_bytes: Option<u64>,
}

/// `/v1/diff`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffRequest {
    /// The older: a name or an id's beginning.
    pub old: String,
    /// The newer.
    pub new: String,
    /// No items.
    #[serde(default)]
    pub summary: bool,
}

/// An item of `diff`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChangeItem {
    /// "added", "removed", "modified", "attributes", "type".
    pub change: String,
    /// In what the two differ: "kind", "content", "mode", "owner", "mtime", "xattrs", "links".
    pub differs: Vec<String>,
    /// The path.
    pub path: PathText,
    /// Size before, in bytes.
    pub old_bytes: u64,
    /// Size after, in bytes.
    pub new_bytes: u64,
}

/// The totals of a `diff`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffSummary {
    /// Paths only in the newer.
    pub added: u64,
    /// Paths only in the older.
    pub removed: u64,
    /// Paths with other content, or of another type.
    pub modified: u64,
    /// Paths with other attributes only.
    pub attributes: u64,
    /// Bytes of what was there or is no longer so, before.
    pub old_bytes: u64,
    /// The same, after.
    pub new_bytes: u64,
}

/// `/v1/squash`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SquashRequest {
    /// Names; they refer to the results then.
    pub names: Vec<String>,
    /// A name or an id's beginning: what lies above it is merged.
    #[serde(default)]
    pub onto: Option<String>,
    /// The whole stack is merged.
    #[serde(default)]
    pub all: bool,
    /// The result's name, instead of the one name that is given.
    #[serde(default)]
    pub new_name: Option<String>,
    /// Replace it.
    #[serde(default)]
    pub force: bool,
    /// What the result is for.
    #[serde(default)]
    pub kind: Option<Kind>,
    /// Chains of no more layers than this stay.
    #[serde(default)]
    pub past: u64,
    /// Only tell what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What squashing did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SquashResult {
    /// Whether it was only tried.
    pub dry_run: bool,
    /// In the order of the names.
    pub squashed: Vec<Squashed>,
}

/// A chain that became one layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Squashed {
    /// The name that refers to it.
    pub name: String,
    /// The chain's top.
    pub before: String,
    /// The one layer; `before` if there was nothing to do.
    pub id: String,
    /// The layer below it.
    pub parent: Option<String>,
    /// How many layers the chain had.
    pub layers: u64,
    /// Inode records before.
    pub inodes_before: u64,
    /// Inode records in the one layer.
    pub inodes: u64,
    /// Dentry records before.
    pub dentries_before: u64,
    /// Dentry records in the one layer.
    pub dentries: u64,
    /// Bytes of tables before.
    pub table_bytes_before: u64,
    /// Bytes of the one layer's tables.
    pub table_bytes: u64,
    /// Bytes of tables that the store didn't have.
    pub new_bytes: u64,
    /// Where mounts go on over it.
    pub mounts: Vec<PathBuf>,
}
