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
#[derive(Clone, Debug, Args)]
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
    /// How many connections: `auto` for as many as it takes, or a number up to 32
    #[arg(long, value_name = "N")]
    pub connections: Option<Connections>,
    /// What carries it; auto takes MPTCP if this host has several networks
    #[arg(long, value_name = "WHAT", value_parser = ["auto", "tcp", "mptcp", "ssh"])]
    pub transport: Option<String>,
    /// For how long a link that fails is tried again, such as 30s, 10m, 0 [default: 2m once it has begun]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub retry_for: Option<u64>,
    /// How long connecting may take
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub connect_timeout: Option<u64>,
    /// After how long without a word a link is dead
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub idle_timeout: Option<u64>,
    /// With an ssh:// peer: where layerctl is there [default: layerctl, on the user's path]
    #[arg(long, value_name = "PATH")]
    pub remote_layerctl: Option<String>,
}

/// A number of connections; 0 stands for auto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections(pub u8);

impl std::str::FromStr for Connections {
    type Err = String;

    fn from_str(text: &str) -> Result<Connections, String> {
        match text.parse() {
            Ok(count @ 1..=32) => Ok(Connections(count)),
            _ if text == "auto" => Ok(Connections(0)),
            _ => Err("give auto, or a number from 1 to 32".to_owned()),
        }
    }
}

fn time(text: &str) -> Result<u64, String> {
    units::parse_time(text).ok_or_else(|| "write it like 30s, 10m or 2h".to_owned())
}
