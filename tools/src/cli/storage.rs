//! Commands on the store: stat, du, why, gc, fsck, scrub.

use clap::Args;

/// Show what the store holds: chunks, packs, ratios, dead bytes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl stat\n  layerctl stat --json | jq .dedup_ratio")]
pub struct Stat {}

/// Show what layers take, and what removing them would free.
///
/// Apparent: the sizes of the files. Plain: the chunks, each once, of which some are unique to this name and some
/// shared with others. Compressed: what they take in the store.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl du\n  \
    layerctl du app debian        only these, and what removing both would free\n  \
    layerctl du --layers app      each layer of the stack")]
pub struct Du {
    /// Only these names
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// One line per layer instead of per name
    #[arg(long, short)]
    pub layers: bool,
}

/// Show who refers to a chunk, or where a path comes from.
///
/// Of a chunk: the names, layers and paths that need it. Of a path: the layers that made it what it is, and who
/// shares it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl why 5f3a09c2d1e4…                    a chunk (its whole id)\n  \
    layerctl why debian:/usr/bin/perl             a path of a layer\n  \
    layerctl why /mnt/usr/bin/perl                a path in a mount\n\n\
    `layerctl inspect NAME PATH --chunks` lists a file's chunks.")]
pub struct Why {
    /// A chunk's id, NAME:/PATH, or a path in a mount
    #[arg(value_name = "CHUNK|PATH")]
    pub what: String,
    /// Show at most so many references
    #[arg(long, short = 'n', default_value_t = 100, value_name = "N")]
    pub limit: u64,
}

/// Free what nothing refers to.
///
/// Names, mounts, uppers and transfers under way refer to layers. Everything else goes on meanwhile. What a transfer
/// that was cut off has brought stays for a day, so that it can go on.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl gc --dry-run\n  layerctl gc\n  layerctl gc --unfinished      also what broken transfers left"
)]
pub struct Gc {
    /// Only tell what would be freed
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Also free what unfinished transfers have brought, instead of keeping it for a day
    #[arg(long)]
    pub unfinished: bool,
}

/// Check the store's structure.
///
/// Packs against the index, names against manifests, uppers against their layers.
/// Exit code 6 if something is wrong.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl fsck\n  \
    layerctl fsck --repair       forget lost chunks; an import or a pull brings them back\n  \
    layerctl fsck --rebuild      make the index anew from the packs alone; without a daemon\n  \
    layerctl fsck --rebuild --tier s3://backups/edge1      a lost store from its second tier")]
pub struct Fsck {
    /// Forget chunks that the packs don't hold, so that they are stored again when they come again
    #[arg(long, conflicts_with = "rebuild")]
    pub repair: bool,
    /// Make the index anew from the packs
    #[arg(long)]
    pub rebuild: bool,
    /// With --rebuild: take the packs of this second tier (s3://BUCKET/FOLDER) for the store's, whose disk was lost
    #[arg(long, value_name = "URL", requires = "rebuild")]
    pub tier: Option<String>,
    /// Where the bucket of --tier is served, if not at Amazon's
    #[arg(long, value_name = "URL", requires = "tier")]
    pub endpoint: Option<String>,
    /// The region of the bucket of --tier
    #[arg(long, value_name = "REGION", requires = "tier")]
    pub region: Option<String>,
}

/// Read every chunk and verify it against its id.
///
/// Exit code 6 if something is damaged and was not healed.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl scrub\n  layerctl scrub --heal edge1     fetch good copies of damaged chunks from a peer"
)]
pub struct Scrub {
    /// Fetch good copies of damaged chunks from this peer
    #[arg(long, value_name = "PEER")]
    pub heal: Option<String>,
}
