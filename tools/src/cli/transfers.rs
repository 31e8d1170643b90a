//! Commands about running transfers: transfers, limit.

use clap::{Args, Subcommand};

use crate::api::transfers::Priority;
use crate::units;

/// A rate in bytes per second; 0 stands for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

impl std::str::FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        if text == "none" {
            return Ok(Rate(0));
        }
        let least = migrator::Rate::MIN;
        match units::parse_rate(text) {
            Some(rate) if rate >= least => Ok(Rate(rate)),
            Some(_) => Err(format!("the lowest rate is {}/s", units::size(least))),
            None => Err("write it like 10M (MiB per second), 100Mbit, or none".to_owned()),
        }
    }
}

/// Show the transfers that run and those that ended of late, and change them.
///
/// Those that peers began are among them. Either side can pause, limit and cancel a transfer.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  layerctl transfers\n  layerctl transfers --watch\n  \
        layerctl transfers pause 3\n  layerctl transfers limit 10Mbit 3 4\n  layerctl transfers priority high 5\n  \
        layerctl transfers --json | jq '.transfers[] | select(.state == \"running\")'"
)]
pub struct Transfers {
    /// What to do [default: show]
    #[command(subcommand)]
    pub action: Option<TransfersAction>,
    /// Show them again and again, until interrupted
    #[arg(long, short)]
    pub watch: bool,
}

/// What to do with transfers.
#[derive(Debug, Subcommand)]
pub enum TransfersAction {
    /// Move nothing for now; the connection stays
    #[command(after_help = "Examples:\n  layerctl transfers pause 3")]
    Pause(TransferIds),
    /// Go on
    #[command(after_help = "Examples:\n  layerctl transfers resume 3")]
    Resume(TransferIds),
    /// End them; what has arrived is kept for the next attempt
    #[command(after_help = "Examples:\n  layerctl transfers cancel 3 4")]
    Cancel(TransferIds),
    /// Limit what each may take of the network
    #[command(after_help = "Examples:\n  layerctl transfers limit 10Mbit 3\n  layerctl transfers limit none 3")]
    Limit {
        /// Such as 10M (MiB per second) or 100Mbit; `none` lifts it
        #[arg(value_name = "RATE")]
        rate: Rate,
        /// Which.
        #[command(flatten)]
        ids: TransferIds,
    },
    /// Change who goes first
    #[command(after_help = "Examples:\n  layerctl transfers priority high 3")]
    Priority {
        /// A higher one leaves the lower ones a trickle of the network
        #[arg(value_name = "PRIORITY")]
        priority: Priority,
        /// Which.
        #[command(flatten)]
        ids: TransferIds,
    },
}

/// Which transfers.
#[derive(Debug, Args)]
pub struct TransferIds {
    /// Their numbers, as `layerctl transfers` shows them
    #[arg(value_name = "ID", required = true)]
    pub ids: Vec<u64>,
}

/// Show or change what all transfers together may take of the network, each way.
///
/// It holds at once and is kept when the daemon ends. `default` goes back to the config file's `limit`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl limit\n  layerctl limit 50Mbit\n  layerctl limit none\n  layerctl limit default"
)]
pub struct Limit {
    /// Such as 10M (MiB per second) or 100Mbit; `none` for no limit, `default` for the config file's
    #[arg(value_name = "RATE", value_parser = parse_limit)]
    pub rate: Option<NewLimit>,
}

/// What the limit is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewLimit {
    /// This.
    Rate(Rate),
    /// What the config file says.
    Default,
}

fn parse_limit(text: &str) -> Result<NewLimit, String> {
    if text == "default" { Ok(NewLimit::Default) } else { text.parse().map(NewLimit::Rate) }
}

/// How a transfer is to go.
#[derive(Clone, Copy, Debug, Args)]
pub struct Manner {
    /// The most to take of the network: 10M (MiB per second), 100Mbit
    #[arg(long, value_name = "RATE")]
    pub limit: Option<Rate>,
    /// Who goes first: a higher one leaves the lower ones a trickle
    #[arg(long, value_name = "PRIORITY", default_value = "normal", hide_possible_values = false)]
    pub priority: Priority,
    /// Come back at once; `layerctl transfers` shows how it goes
    #[arg(long)]
    pub background: bool,
    /// Move nothing; say what would go over, and how long it would take
    #[arg(long, short = 'n', conflicts_with = "background")]
    pub dry_run: bool,
}
