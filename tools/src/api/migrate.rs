//! Requests and answers about moving guests. Reports are [`migrator::migrate::Report`]s as they are.

use serde::{Deserialize, Serialize};

/// Which layers go ahead while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// Whatever is best: all that are sealed
    #[default]
    Auto,
    /// The base; the application goes with the instance, while the guest stands still
    #[value(name = "2")]
    #[serde(rename = "2")]
    Two,
    /// Base and application
    #[value(name = "3")]
    #[serde(rename = "3")]
    Three,
}

/// `/v1/migrate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The guest.
    pub name: String,
    /// Where to.
    pub peer: String,
    /// Don't, if the downtime would be longer, in milliseconds.
    #[serde(default)]
    pub max_downtime: Option<u64>,
    /// So many rounds; as many as help if not given.
    #[serde(default)]
    pub rounds: Option<u8>,
    /// What goes ahead.
    #[serde(default)]
    pub layers: Layers,
    /// The guest may run before all of its memory is there.
    #[serde(default)]
    pub post_copy: bool,
    /// Only tell what is in the way and what it would be like.
    #[serde(default)]
    pub dry_run: bool,
    /// The most that it may take of the network while the guest runs, in bytes per second.
    #[serde(default)]
    pub limit: Option<u64>,
    /// A guest that can't be restored stays at the destination.
    #[serde(default)]
    pub no_give_back: bool,
    /// The peer's kernel may be older than this host's.
    #[serde(default)]
    pub force_kernel: bool,
    /// For how many seconds the guest may ask to wait.
    #[serde(default)]
    pub defer: Option<u64>,
}

/// `/v1/reports`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReportList {
    /// The latest last.
    pub reports: Vec<migrator::migrate::Report>,
}

/// `/v1/report`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportRequest {
    /// How the report's number begins; empty for the latest.
    pub id: String,
}

/// What to do about a move that isn't over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResolveAction {
    /// Tell how it stands.
    #[default]
    Show,
    /// Ask the other side once more, and do what it says.
    Ask,
    /// Run the guest here, whatever the other side does.
    RunHere,
    /// Never run here what this move left or brought.
    GiveUp,
}

/// `/v1/guest-resolve`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// The guest.
    pub name: String,
    /// What to do.
    #[serde(default)]
    pub action: ResolveAction,
}

/// A move, as this side sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoveInfo {
    /// Its number.
    pub id: String,
    /// The guest.
    pub guest: String,
    /// The other host.
    pub peer: String,
    /// `source` or `destination`.
    pub side: String,
    /// How far it is: docs/FORMAT.md, "Moves".
    pub phase: String,
    /// The guest's epoch once it has moved.
    pub epoch: u64,
    /// Whether it is over.
    pub is_ended: bool,
    /// Whether only the other side, or an operator, can tell how it goes on.
    pub is_in_doubt: bool,
    /// When it began, in seconds since 1970.
    pub began: i64,
    /// What went wrong last.
    pub note: String,
    /// What an operator should know before deciding.
    pub advice: String,
}
