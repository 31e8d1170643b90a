//! Commands on layers: import, export, tag, squash, remove, list, tree, inspect, log, diff.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// What a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The operating system, present everywhere
    Base,
    /// Installed software and its data
    Application,
    /// The running state
    Instance,
}

impl From<Kind> for layerfs::manifest::LayerKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Base => Self::Base,
            Kind::Application => Self::Application,
            Kind::Instance => Self::Instance,
        }
    }
}

/// Make a layer of a folder, an archive, an OCI image or a disk image.
///
/// SRC is recognised by its content: a folder, a tar archive (plain, gzip, zstd, xz), an OCI image layout (folder or
/// tar), an archive of `docker save`, or a disk image (raw, qcow2). `-` reads from stdin. An OCI image becomes a stack,
/// one layer each; NAME is its top. `oci:PATH[:TAG]` is an OCI image layout too, as `export` writes it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl import ./rootfs debian --kind base\n  \
    layerctl import rootfs.tar.zst debian:12.1 --like debian     a new version costs little\n  \
    layerctl import ./added app --parent debian                  SRC lies over debian\n  \
    layerctl import ./rootfs2 app --parent debian --whole        SRC is the whole tree\n  \
    docker save nginx | layerctl import - nginx\n  \
    layerctl import oci:app-image:1.0 app                        what export wrote there\n  \
    layerctl import disk.qcow2 vm/disk --kind instance")]
pub struct Import {
    /// A folder, archive, OCI layout or disk image; `-` for stdin
    #[arg(value_name = "SRC", value_hint = clap::ValueHint::AnyPath)]
    pub source: PathBuf,
    /// The new layer's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The layer that it lies on
    #[arg(long, short, value_name = "NAME")]
    pub parent: Option<String>,
    /// What it is for [default: base without a parent, else application]
    #[arg(long, short)]
    pub kind: Option<Kind>,
    /// A predecessor: the same paths get the same inode numbers
    #[arg(long, value_name = "NAME")]
    pub like: Option<String>,
    /// SRC is the whole tree, not what is added: what SRC lacks of the parent is removed
    #[arg(long, requires = "parent")]
    pub whole: bool,
    /// What SRC is, if it is not to be found out: folder, tar, oci, docker, raw or qcow2
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Honour OCI whiteouts (.wh.NAME) in a plain tar too
    #[arg(long)]
    pub oci_whiteouts: bool,
    /// Stay on the folder's file system
    #[arg(long, short = 'x')]
    pub one_file_system: bool,
    /// Which image of an archive that has several
    #[arg(long, value_name = "TAG")]
    pub reference: Option<String>,
    /// For which platform the image shall be, such as linux/arm64 [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Replace NAME if it exists
    #[arg(long, short)]
    pub force: bool,
}

/// The formats of an export, as [`layerfs::export::Format`] reads them.
const FORMATS: [&str; 8] = ["folder", "tar", "tar.gz", "tar.zst", "tar.xz", "oci", "oci-zstd", "raw"];

/// Write a layer out as a folder, an archive, an OCI image or a disk image.
///
/// Everything below the layer is part of it.
/// The format follows DEST's ending (.tar, .tar.gz, .tgz, .tar.zst, .tar.xz, .raw, .img). Endings of other archives and
/// images, such as .zip and .qcow2, are refused; anything else is a folder.
/// `oci:PATH[:TAG]` is an OCI image layout: to one that exists the image is added.
/// An existing DEST is never overwritten, nor a layout's tag that names another image.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl export debian ./rootfs\n  \
    layerctl export debian rootfs.tar.zst\n  \
    layerctl export debian - | tar -tv\n  \
    layerctl export app oci:app-image:latest     for skopeo, umoci, podman\n  \
    layerctl export vm/disk disk.raw")]
pub struct Export {
    /// The layer
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where to write; `-` for a tar archive on stdout
    #[arg(value_name = "DEST", value_hint = clap::ValueHint::AnyPath)]
    pub dest: PathBuf,
    /// What to write, whatever DEST's ending
    #[arg(long, short, value_name = "FORMAT", value_parser = FORMATS)]
    pub format: Option<String>,
}

/// Give a layer one more name.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl tag app app:2026-11-21\n  layerctl tag app:2026-11-21 app --force    back to that one"
)]
pub struct Tag {
    /// A name, or at least eight digits of a layer's id
    #[arg(value_name = "NAME")]
    pub layer: String,
    /// The new name
    #[arg(value_name = "NEW")]
    pub name: String,
    /// Replace NEW if it exists
    #[arg(long, short)]
    pub force: bool,
}

/// Remove names; what nothing else refers to is freed by gc.
///
/// Layers that other names, mounts or layers need stay. The space is freed by `layerctl gc`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl remove app:old && layerctl gc\n  layerctl du app:old      what would it free?"
)]
pub struct Remove {
    /// The names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// Merge a chain of layers into one that has the same tree.
///
/// The chain is NAME's layer and those below it that are of its kind, or as --onto or --all say. Tables are merged and
/// data is not touched: it takes a moment. NAME then refers to the one layer; mounts whose top it was go on over it.
/// What nothing refers to any more is freed by gc.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl squash web --dry-run                how many layers, and what would be saved?\n  \
    layerctl squash web                          the seals of web become one layer\n  \
    layerctl squash web --onto debian            all that lies on debian becomes one layer\n  \
    layerctl squash web --all --as web:flat      the whole stack, under a name of its own")]
pub struct Squash {
    /// The names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Merge what lies above this layer
    #[arg(long, value_name = "LAYER", conflicts_with = "all")]
    pub onto: Option<String>,
    /// Merge the whole stack
    #[arg(long, short)]
    pub all: bool,
    /// Give the result this name, and leave NAME where it is
    #[arg(long = "as", value_name = "NEW")]
    pub new_name: Option<String>,
    /// Replace NEW if it exists
    #[arg(long, short, requires = "new_name")]
    pub force: bool,
    /// What the result is for [default: what NAME is for]
    #[arg(long, short)]
    pub kind: Option<Kind>,
    /// Do nothing where the chain has no more layers than this
    #[arg(long, value_name = "LAYERS", default_value = "1")]
    pub past: u64,
    /// Only tell what would be done
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

/// List the layers that have names.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl list\n  layerctl list 'debian*' --kind base\n  layerctl list --json | jq -r '.layers[].names[]'"
)]
pub struct List {
    /// Only names that match; * stands for anything
    #[arg(value_name = "PATTERN")]
    pub pattern: Option<String>,
    /// Only layers of this kind
    #[arg(long, short)]
    pub kind: Option<Kind>,
}

/// Show which layer lies on which.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl tree\n  layerctl tree debian      only what lies on debian")]
pub struct Tree {
    /// Only this layer and what lies on it
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// Show a layer's manifest, or what a path in it is.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl inspect debian\n  layerctl inspect debian /usr/bin/perl --chunks\n  layerctl inspect debian:/etc          a folder's entries"
)]
pub struct Inspect {
    /// A name, or at least eight digits of a layer's id
    #[arg(value_name = "NAME")]
    pub layer: String,
    /// A path in it
    #[arg(value_name = "PATH")]
    pub path: Option<PathBuf>,
    /// List the chunks of the file, or of the manifest's tables
    #[arg(long, short)]
    pub chunks: bool,
}

/// Show the layers of a stack, top first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl log app")]
pub struct Log {
    /// A name, or at least eight digits of a layer's id
    #[arg(value_name = "NAME")]
    pub layer: String,
}

/// Show what changed between two layers, by path, with sizes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl diff debian app\n  \
    layerctl diff debian app --summary\n\n\
    First column: + added, - removed, ~ content, m attributes only, t another type.")]
pub struct Diff {
    /// The older layer
    #[arg(value_name = "A")]
    pub old: String,
    /// The newer layer
    #[arg(value_name = "B")]
    pub new: String,
    /// Only the totals
    #[arg(long, short)]
    pub summary: bool,
}

/// Show or drop access traces: what mounts of a stack have read, in the order of their first reading.
///
/// A lazy pull or push brings the chunks of a trace first, so that the second start of a program from an image that is
/// still on its way is nearly as fast as from one that is here. A trace outlives its layer; the 64 latest are kept.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl trace list\n  layerctl trace remove debian-python\n  layerctl trace remove --all"
)]
pub struct Trace {
    /// What to do
    #[command(subcommand)]
    pub action: TraceAction,
}

/// What to do with traces.
#[derive(Debug, Subcommand)]
pub enum TraceAction {
    /// List the traces
    #[command(alias = "ls", after_help = "Examples:\n  layerctl trace list\n  layerctl trace list --json")]
    List,
    /// Drop traces; the next runs leave new ones
    #[command(alias = "rm", after_help = "Examples:\n  layerctl trace remove app\n  layerctl trace remove --all")]
    Remove {
        /// Names of layers, or beginnings of their ids
        #[arg(value_name = "LAYER", required_unless_present = "all")]
        layers: Vec<String>,
        /// All traces
        #[arg(long, conflicts_with = "layers")]
        all: bool,
    },
}
