//! Commands about other hosts: push, pull, peer.

use clap::{Args, Subcommand};

use super::registry::{PullOptions, PushOptions};
use super::transfers::Manner;

/// Send layers to a peer, or an image to a registry, only what it lacks.
///
/// What lies below them goes along. The names appear on the other side all at once, when everything is there and
/// verified. A transfer that was cut goes on where it was when the command is repeated.
///
/// With oci://HOST/REPOSITORY[:TAG] as peer, one NAME goes to an OCI registry, as an image that every container engine can
/// run.
///
/// With ssh://[USER@]HOST[:PORT][/STORE] as peer, your own ssh starts layerctl on that host, which needs nothing but
/// the program.
#[derive(Debug, Args)]
#[command(
    override_usage = "layerctl push [OPTIONS] <NAME>... <PEER>",
    after_help = "Examples:\n  layerctl push app edge1\n  layerctl push debian app web:state edge1\n  \
        layerctl push app edge1 --limit 20Mbit --priority low --background\n  \
        layerctl push app edge1 --lazy      it can be mounted there at once\n  \
        layerctl push app edge1 --dry-run\n  \
        layerctl push app oci://registry.example.org/team/app:1.0\n  \
        layerctl push app oci://registry.example.org/team/app:packs --as packs\n  \
        layerctl push app ssh://me@edge1.example.org"
)]
pub struct Push {
    /// The layers' names, then the peer's
    #[arg(value_names = ["NAME", "PEER"], required = true, num_args = 2..)]
    pub names_and_peer: Vec<String>,
    /// Replace names that exist there with another layer
    #[arg(long, short)]
    pub force: bool,
    /// How it is to go.
    #[command(flatten)]
    pub manner: Manner,
    /// For registries
    #[command(flatten)]
    pub registry: PushOptions,
    /// Send what a mount needs first; the files' data follows in the background, within --limit too, and when it is read there, for which only
    /// `layerctl limit` holds
    #[arg(long)]
    pub lazy: bool,
}

/// Fetch layers from a peer, or an image from a registry, only what is lacking here.
///
/// What lies below them comes along. With oci://HOST/REPOSITORY[:TAG|@DIGEST] as peer, an image of an OCI registry
/// becomes the stack NAME.
#[derive(Debug, Args)]
#[command(
    override_usage = "layerctl pull [OPTIONS] <NAME>... <PEER>",
    after_help = "Examples:\n  layerctl pull app central\n  layerctl pull debian app central --force\n  layerctl pull nginx oci://docker.io/library/nginx:1.27\n  \
        layerctl pull app central --lazy && layerctl mount app /mnt"
)]
pub struct Pull {
    /// The layers' names, then the peer's
    #[arg(value_names = ["NAME", "PEER"], required = true, num_args = 2..)]
    pub names_and_peer: Vec<String>,
    /// Replace names that exist here with another layer
    #[arg(long, short)]
    pub force: bool,
    /// How it is to go.
    #[command(flatten)]
    pub manner: Manner,
    /// For registries
    #[command(flatten)]
    pub registry: PullOptions,
    /// Fetch what a mount needs first; the files' data follows in the background, within --limit too, and when it is read, for which only
    /// `layerctl limit` holds
    #[arg(long)]
    pub lazy: bool,
}

/// Serve whoever is at the other end of stdin and stdout: what `push` and `pull` with ssh:// start on the other side
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ssh host layerctl stdio      as push and pull do it by themselves")]
pub struct Stdio {}

/// Add, list and remove peers, the hosts to exchange layers with.
///
/// Both hosts know each other's key: one `peer add` on each side. `layerctl peer id` prints what to compare or to copy.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    edge1# layerctl peer id                               its fingerprint and key\n  \
    central# layerctl peer add edge1 edge1.example.org    shows its fingerprint and asks\n  \
    central# layerctl peer list")]
pub struct Peer {
    /// What to do
    #[command(subcommand)]
    pub action: PeerAction,
}

/// What to do with peers.
#[derive(Debug, Subcommand)]
pub enum PeerAction {
    /// Add a peer, or replace what is known of it
    ///
    /// Without --key the host is asked for its key, and you are asked whether the fingerprint is right: compare it with
    /// the one of `layerctl peer id` on the other host.
    #[command(after_help = "Examples:\n  \
        layerctl peer add edge1 edge1.example.org\n  \
        layerctl peer add edge1 edge1.example.org --fingerprint 7x2kd-…      for scripts\n  \
        layerctl peer add edge1 10.0.0.2,192.168.7.2      over both networks at once\n  \
        layerctl peer add edge1 10.0.0.2:7440 --key lfk-… --allow pull --visible 'app/*'\n  \
        layerctl peer add laptop - --key lfk-…      a host that only calls")]
    Add(PeerAdd),
    /// List the peers
    #[command(alias = "ls", after_help = "Examples:\n  layerctl peer list\n  layerctl peer list --json")]
    List,
    /// Change what a peer may do and see here, or where it is
    ///
    /// What isn't given stays as it is. It holds from the peer's next request on.
    #[command(after_help = "Examples:\n  \
        layerctl peer set edge1 --no-push --visible 'app/*' --visible 'base/*'\n  \
        layerctl peer set edge1 --allow-push --visible '*'\n  \
        layerctl peer set edge1 --allow pull,guests\n  \
        layerctl peer set edge1 --address edge1.example.org:7441")]
    Set(PeerSet),
    /// Remove peers; they can no longer connect
    #[command(alias = "rm", after_help = "Examples:\n  layerctl peer remove edge1")]
    Remove {
        /// Their names
        #[arg(value_name = "PEER", required = true)]
        names: Vec<String>,
    },
    /// Print this host's key and fingerprint, and the command that adds it elsewhere
    #[command(after_help = "Examples:\n  layerctl peer id\n  layerctl peer id --json | jq -r .key")]
    Id,
}

/// What to know of a peer.
#[derive(Debug, Args)]
pub struct PeerAdd {
    /// What it is called here
    #[arg(value_name = "PEER")]
    pub name: String,
    /// HOST[:PORT], several with commas between; `-` for a host that only connects to this one
    #[arg(value_name = "ADDRESS")]
    pub address: String,
    /// Its public key, as `layerctl peer id` prints it there
    #[arg(long, short, value_name = "KEY", required_if_eq("address", "-"))]
    pub key: Option<String>,
    /// Its fingerprint: the key is taken from the host itself if it has this fingerprint
    #[arg(long, value_name = "FINGERPRINT", conflicts_with = "key")]
    pub fingerprint: Option<String>,
    /// What it may do here; guests: move guests to this host, which then runs what it sends [default: push,pull]
    #[arg(long, value_delimiter = ',', value_name = "WHAT", value_parser = ["push", "pull", "guests", "none"])]
    pub allow: Vec<String>,
    /// The names that it may see; * stands for anything [default: all]
    #[arg(long, value_delimiter = ',', value_name = "PATTERN")]
    pub visible: Vec<String>,
    /// Replace a peer of this name
    #[arg(long, short)]
    pub force: bool,
}

/// What to change of a peer.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
pub struct PeerSet {
    /// What it is called here
    #[arg(value_name = "PEER")]
    pub name: String,
    /// What it may do here, and nothing else; guests: move guests to this host, which then runs what it sends
    #[arg(
        long,
        group = "change",
        value_delimiter = ',',
        value_name = "WHAT",
        value_parser = ["push", "pull", "guests", "none"],
        conflicts_with_all = ["allow_push", "no_push", "allow_pull", "no_pull", "allow_guests", "no_guests"]
    )]
    pub allow: Vec<String>,
    /// It may push to this host
    #[arg(long, group = "change")]
    pub allow_push: bool,
    /// It may not push to this host
    #[arg(long, group = "change", conflicts_with = "allow_push")]
    pub no_push: bool,
    /// It may pull from this host
    #[arg(long, group = "change")]
    pub allow_pull: bool,
    /// It may not pull from this host
    #[arg(long, group = "change", conflicts_with = "allow_pull")]
    pub no_pull: bool,
    /// It may move guests to this host, which then runs what it sends
    #[arg(long, group = "change")]
    pub allow_guests: bool,
    /// It may not move guests to this host
    #[arg(long, group = "change", conflicts_with = "allow_guests")]
    pub no_guests: bool,
    /// The names that it may see, instead of those until now; `*` alone means all, and all chunks
    #[arg(long, group = "change", value_delimiter = ',', value_name = "PATTERN")]
    pub visible: Vec<String>,
    /// HOST[:PORT], several with commas between; `-` for a host that only connects to this one
    #[arg(long, group = "change", value_name = "ADDRESS")]
    pub address: Option<String>,
}

/// Splits "NAME… PEER".
pub fn split_names(mut names_and_peer: Vec<String>) -> Option<(Vec<String>, String)> {
    let peer = names_and_peer.pop()?;
    (!names_and_peer.is_empty()).then_some((names_and_peer, peer))
}
