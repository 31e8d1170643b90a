//! The command about the second tier.

use clap::{Args, Subcommand};

/// Keep packs in an S3 bucket too, and only there if the disk is too small.
///
/// Full packs are uploaded as they come, small ones when the daemon is idle or on `tier sync`. What is evicted here is
/// read from there. The keys come from the daemon's environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or from its
/// AWS credentials file, never from a command line.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl tier add s3://backups/edge1 --keep 10G\n  \
    layerctl tier add s3://bucket/edge1 --endpoint http://127.0.0.1:9000\n  \
    layerctl tier sync && layerctl tier evict --keep 2G\n  \
    layerctl tier status")]
pub struct Tier {
    /// What to do
    #[command(subcommand)]
    pub action: TierAction,
}

/// What to do with the second tier.
#[derive(Debug, Subcommand)]
pub enum TierAction {
    /// Use a folder of a bucket, or change how it is used
    ///
    /// Each store has a folder of its own; several stores may share a bucket.
    #[command(after_help = "Examples:\n  layerctl tier add s3://backups/edge1 --keep 10G --region eu-central-1")]
    Add(TierAdd),
    /// Show what lies where
    #[command(after_help = "Examples:\n  layerctl tier status\n  layerctl tier status --json | jq .remote_bytes")]
    Status,
    /// Upload every pack that isn't there yet
    #[command(after_help = "Examples:\n  layerctl tier sync")]
    Sync,
    /// Remove packs here that are there, the least lately used first
    #[command(after_help = "Examples:\n  layerctl tier evict --keep 2G\n  layerctl tier evict --keep 0")]
    Evict {
        /// How much stays here [default: what --keep of `tier add` said, else nothing]
        #[arg(long, value_name = "SIZE")]
        keep: Option<String>,
    },
    /// Fetch every pack that is only there
    #[command(after_help = "Examples:\n  layerctl tier fetch")]
    Fetch,
    /// Stop to use it; its objects stay
    #[command(alias = "rm", after_help = "Examples:\n  layerctl tier fetch && layerctl tier remove")]
    Remove,
}

/// Which bucket, and how to use it.
#[derive(Debug, Args)]
pub struct TierAdd {
    /// s3://BUCKET[/FOLDER]
    #[arg(value_name = "URL")]
    pub url: String,
    /// Where the bucket is served, if not at Amazon's
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Its region [default: us-east-1]
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// How much stays on the local disk, such as 10G [default: everything]
    #[arg(long, value_name = "SIZE")]
    pub keep: Option<String>,
    /// How long a reader waits for it, in seconds [default: 20]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}
