//! Commands that move guests: migrate, report, and what guest resolve takes.

use std::path::PathBuf;

use clap::Args;

use super::transfers::Rate;
use crate::api::migrate::Layers;
use crate::units;

/// Move a running guest to a peer.
///
/// First it is told what is in the way, before anything has changed. Then layers and memory are copied while the guest runs, in
/// rounds, until another would not make the downtime shorter; then the guest stops, the rest is sent, and it goes on there. Whatever
/// fails before the destination has everything leaves the guest running here. The destination's operator has to allow it once:
/// `layerctl peer set PEER --allow-guests`.
///
/// A program in the guest can ask to wait by writing `defer`, or `defer until SECONDS` (since 1970), to
/// /run/layerfs/migration, and `now` when it may stop. Programs in the store's folder `hooks`, called before-stop, after-stop, before-restore,
/// after-restore, after-leave or abort, are run then.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl migrate web edge2\n  \
    layerctl migrate web edge2 --dry-run            what is in the way, and what it would be like\n  \
    layerctl migrate web edge2 --max-downtime 300   not, if it would stand still for longer\n  \
    layerctl migrate web edge2 --postcopy           it may run before all memory is there\n  \
    layerctl migrate web edge2 --limit 20Mbit --json")]
pub struct Migrate {
    /// The guest
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where to
    #[arg(value_name = "PEER")]
    pub peer: String,
    /// Don't, if it would stand still for longer
    #[arg(long, value_name = "MS")]
    pub max_downtime: Option<u64>,
    /// How many times memory is copied while the guest runs: auto, or a number
    #[arg(long, value_name = "N", default_value = "auto")]
    pub rounds: Rounds,
    /// What goes ahead while the guest runs: base and application (3), or only the base (2)
    #[arg(long, value_name = "N", default_value = "auto", hide_possible_values = false)]
    pub layers: Layers,
    /// It may run before all of its memory is there, if that makes the downtime noticeably shorter
    #[arg(long)]
    pub postcopy: bool,
    /// Change nothing; tell what is in the way (exit code 7), or what it would be like
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// The most to take of the network while the guest runs: 10M (MiB per second), 100Mbit
    #[arg(long, value_name = "RATE")]
    pub limit: Option<Rate>,
    /// If the peer can't restore it, leave it there for its operator to try again, instead of running it here again
    #[arg(long)]
    pub no_give_back: bool,
    /// Move it to a peer with an older kernel all the same. It may not be restored there, and then comes back; or its programs fail
    /// later, when they use what that kernel lacks
    #[arg(long)]
    pub force_kernel: bool,
    /// For how long the guest may ask to wait
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "30s")]
    pub defer: u64,
}

/// A number of rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounds(pub Option<u8>);

impl std::str::FromStr for Rounds {
    type Err = String;

    fn from_str(text: &str) -> Result<Rounds, String> {
        match text.parse() {
            Ok(count @ 0..=100) => Ok(Rounds(Some(count))),
            _ if text == "auto" => Ok(Rounds(None)),
            _ => Err("give auto, or a number from 0 to 100".to_owned()),
        }
    }
}

fn time(text: &str) -> Result<u64, String> {
    units::parse_time(text).ok_or_else(|| "write it like 30s, 10m or 2h".to_owned())
}

/// Show the migrations of guests from here, or one of them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl report\n  \
    layerctl report latest\n  \
    layerctl report 3f2a --html migration.html          a page with a picture of its stages\n  \
    layerctl report latest --svg - > migration.svg")]
pub struct Report {
    /// How its number begins, or `latest` [default: a list of all]
    #[arg(value_name = "ID")]
    pub id: Option<String>,
    /// Write a page that shows it, with nothing to be loaded from elsewhere; `-` for stdout
    #[arg(long, value_name = "FILE", requires = "id")]
    pub html: Option<PathBuf>,
    /// Write a picture of it; `-` for stdout
    #[arg(long, value_name = "FILE", requires = "id", conflicts_with = "html")]
    pub svg: Option<PathBuf>,
}

/// What to do about a move that isn't over.
#[derive(Debug, Args)]
pub struct Resolve {
    /// The guest
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Ask the other side once more, and do what it says
    #[arg(long, conflicts_with_all = ["run_here", "give_up"])]
    pub ask: bool,
    /// Run it here. If it runs at the other side too, or comes to run there, there are two of it, with one address
    #[arg(long, conflicts_with = "give_up")]
    pub run_here: bool,
    /// Never run here what this move left or brought. If the other side has lost it too, it is gone; one that stood still here and
    /// was never released can be started anew from its disk
    #[arg(long)]
    pub give_up: bool,
    /// Don't ask whether that is meant
    #[arg(long, short)]
    pub force: bool,
}
