//! Requests and answers about the store.

use serde::{Deserialize, Serialize};

use super::PathText;

/// `/v1/stat`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatResult {
    /// The store's folder.
    pub store: std::path::PathBuf,
    /// Names.
    pub names: u64,
    /// Layers with names and below those.
    pub layers: u64,
    /// Chunks.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// What they take in packs.
    pub stored_bytes: u64,
    /// By class.
    pub classes: Vec<ClassStat>,
    /// Packs.
    pub packs: u64,
    /// Their size on disk, in bytes.
    pub pack_bytes: u64,
    /// Packs that are only in the second tier.
    #[serde(default)]
    pub remote_packs: u64,
    /// Their sizes added up, in bytes.
    #[serde(default)]
    pub remote_bytes: u64,
    /// Bytes in packs that no chunk of the index uses any more.
    pub dead_bytes: u64,
    /// Bytes of file data in the named stacks, each time that it is referred to.
    pub referenced_bytes: u64,
    /// `referenced_bytes` by the plain bytes of what holds it.
    pub dedup_ratio: Option<f64>,
    /// Plain bytes by stored bytes.
    pub compression_ratio: Option<f64>,
}

/// Chunks of one class.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClassStat {
    /// "data", "list", "table", "manifest".
    pub class: String,
    /// How many.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// What they take in packs.
    pub stored_bytes: u64,
}

/// `/v1/du`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DuRequest {
    /// Only these names.
    #[serde(default)]
    pub names: Vec<String>,
    /// Per layer instead of per name.
    #[serde(default)]
    pub layers: bool,
}

/// What layers take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DuResult {
    /// One for each name or layer.
    pub rows: Vec<DuRow>,
    /// Plain bytes of what they refer to, each chunk once.
    pub total_plain_bytes: u64,
    /// What that takes in packs.
    pub total_stored_bytes: u64,
    /// What removing all the names that were asked for would free, in stored bytes.
    pub freed_bytes: Option<u64>,
}

/// What one name or layer takes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DuRow {
    /// The name, or the layer's name if it has one.
    pub name: Option<String>,
    /// The layer.
    pub id: String,
    /// The sizes of its files, added up, holes included.
    pub apparent_bytes: u64,
    /// Plain bytes of its chunks, each once.
    pub plain_bytes: u64,
    /// Of those, what nothing else refers to.
    pub unique_bytes: u64,
    /// Of those, what others refer to too.
    pub shared_bytes: u64,
    /// What its chunks take in packs.
    pub stored_bytes: u64,
    /// What removing it would free, in stored bytes.
    pub freed_bytes: u64,
}

/// `/v1/why`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WhyRequest {
    /// A chunk's id, NAME:/PATH, or the absolute path of something in a mount.
    pub what: String,
    /// At most so many references.
    #[serde(default)]
    pub limit: Option<u64>,
}

/// Who refers to a chunk, or where a path comes from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WhyResult {
    /// The chunk's references, if it was about one.
    pub references: Vec<Reference>,
    /// Whether there are more than the limit.
    pub more: bool,
    /// The path's origin, if it was about one.
    pub path: Option<Origin>,
}

/// Something that refers to a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The layer that holds the record.
    pub layer: String,
    /// The names whose stacks have that layer.
    pub names: Vec<String>,
    /// What the chunk is for there: "manifest", "inodes", "dentries", "file".
    pub role: String,
    /// The inode of the file, if it is a file's.
    pub ino: Option<u64>,
    /// The paths of the file.
    pub paths: Vec<PathText>,
}

/// Where a path comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its inode.
    pub ino: u64,
    /// "file", "folder", ….
    pub kind: String,
    /// The layer that gave the inode this name.
    pub named_by: Option<LayerRef>,
    /// The layers that have a record of the inode, the top first: the first one counts.
    pub records: Vec<LayerRef>,
    /// All paths of the inode, if it has more than one.
    pub links: Vec<PathText>,
    /// The names whose trees have the inode as this one has it.
    pub names: Vec<String>,
}

/// A layer, told shortly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// Its id.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
}

/// `/v1/gc`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only tell.
    #[serde(default)]
    pub dry_run: bool,
    /// What unfinished transfers have brought goes too.
    #[serde(default)]
    pub unfinished: bool,
}

/// What was freed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct GcResult {
    /// Only told.
    pub dry_run: bool,
    /// Layers that stay.
    pub live_layers: u64,
    /// Chunks that stay.
    pub live_chunks: u64,
    /// Chunks that went.
    pub freed_chunks: u64,
    /// What they took, in bytes; packs that are mostly alive keep it until they aren't.
    pub dead_bytes: u64,
    /// What stays only because transfers that haven't ended well may go on, in bytes.
    pub unfinished_bytes: u64,
    /// Bytes by which the packs shrank.
    pub freed_bytes: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Packs that were rewritten.
    pub packs_rewritten: u64,
    /// How long it took.
    pub seconds: f64,
}

/// `/v1/fsck`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsckRequest {
    /// Remove index entries whose chunk is gone, so that it is stored again when it comes again.
    #[serde(default)]
    pub repair: bool,
}

/// What was checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FsckResult {
    /// Whether nothing is wrong.
    pub clean: bool,
    /// Names.
    pub names: u64,
    /// Layers.
    pub layers: u64,
    /// Chunks in the index that have their record.
    pub chunks: u64,
    /// Packs here.
    pub packs: u64,
    /// Packs that are only in the second tier, of which the length was compared.
    #[serde(default)]
    pub remote_packs: u64,
    /// What is wrong; the first of them, if there are very many.
    pub problems: Vec<ProblemInfo>,
    /// How many problems there are.
    pub problem_count: u64,
    /// Names that were given by a rebuild to layers whose names are unknown.
    pub recovered: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// Something that is wrong with the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProblemInfo {
    /// "pack-unreadable", "pack-damaged", "chunk-gone", "layer-broken", "stray-file", "names-lost".
    pub kind: String,
    /// The pack, chunk, layer or file.
    pub subject: String,
    /// What is wrong with it.
    pub detail: String,
    /// The names that it affects, as far as that is known.
    pub names: Vec<String>,
    /// Whether it was repaired.
    pub repaired: bool,
}

/// `/v1/scrub`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Fetch good copies from this peer.
    #[serde(default)]
    pub heal: Option<String>,
}

/// What was verified.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScrubResult {
    /// Whether nothing is damaged any more.
    pub clean: bool,
    /// Chunks that were read.
    pub chunks: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Packs, or parts of them, that can't be read.
    pub pack_problems: Vec<String>,
    /// Damaged chunks.
    pub damaged: Vec<DamagedChunk>,
    /// How many of those were healed.
    pub healed: u64,
    /// How long it took.
    pub seconds: f64,
}

/// A damaged chunk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DamagedChunk {
    /// Its id.
    pub id: String,
    /// What is wrong with it.
    pub detail: String,
    /// Who needs it.
    pub needed_by: Vec<String>,
    /// Whether a good copy was fetched.
    pub healed: bool,
}
