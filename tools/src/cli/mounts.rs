//! Commands on mounts: mount, umount, seal, mounts, uppers.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::layers::Kind;

/// Mount a layer with everything below it.
///
/// The mount is writable: changes go to an upper, which `seal` turns into a layer. Without --upper it is a fresh one.
/// The same works from mount(8) and fstab: see mount.layerfs(8).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl mount debian /mnt\n  \
    layerctl mount debian /mnt --read-only\n  \
    layerctl mount app /srv/web --upper web         changes are kept under that name\n  \
    layerctl mount app /srv/web --transport uring   by io_uring, or not at all\n  \
    layerctl mount app /srv/web --writeback off     writes wait for the daemon\n  \
    mount -t layerfs app /srv/web -o upper=web      the same through mount(8)")]
pub struct Mount {
    /// A name, or at least eight digits of a layer's id
    #[arg(value_name = "NAME")]
    pub layer: String,
    /// Where
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub dir: PathBuf,
    /// No changes
    #[arg(long, short, conflicts_with = "upper")]
    pub read_only: bool,
    /// Keep the changes in the upper of this name; made if it does not exist
    #[arg(long, short, value_name = "UPPER")]
    pub upper: Option<String>,
    /// How the kernel hands requests over
    #[arg(long, value_name = "HOW", default_value = "read")]
    pub transport: Transport,
    /// Whether large files of lower layers have the kernel's writeback cache, where that can be had
    #[arg(long, value_name = "WHETHER", default_value = "on")]
    pub writeback: Switch,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is
    On,
    /// It isn't
    Off,
}

/// How the kernel hands requests over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// By io_uring where that can be had, else by reading
    Auto,
    /// By io_uring: Linux 6.14 with /sys/module/fuse/parameters/enable_uring set
    Uring,
    /// By reading the device
    Read,
}

impl From<Transport> for layerfs::mount::Transport {
    fn from(transport: Transport) -> layerfs::mount::Transport {
        match transport {
            Transport::Auto => layerfs::mount::Transport::Auto,
            Transport::Uring => layerfs::mount::Transport::Uring,
            Transport::Read => layerfs::mount::Transport::Read,
        }
    }
}

/// Unmount.
///
/// A named upper is kept. A nameless one that holds changes is kept too, under its number (`layerctl uppers`),
/// unless --discard is given.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl umount /mnt\n  layerctl umount /mnt --discard\n  layerctl umount --all")]
pub struct Umount {
    /// Where
    #[arg(value_name = "DIR", required_unless_present = "all", value_hint = clap::ValueHint::DirPath)]
    pub dirs: Vec<PathBuf>,
    /// All of the store's mounts but for guests'
    #[arg(long, short, conflicts_with = "dirs")]
    pub all: bool,
    /// Throw the changes of a nameless upper away
    #[arg(long)]
    pub discard: bool,
    /// Detach now, even if something still uses it: for that it goes on
    #[arg(long, short)]
    pub lazy: bool,
    /// End its copies too, in other mount namespaces (containers', `unshare --mount`) and on other folders: what uses
    /// them gets errors; while it still writes to files of the upper that it has open, that can't be mounted again
    #[arg(long, conflicts_with = "lazy")]
    pub everywhere: bool,
}

/// Make a layer of what was changed in a mount.
///
/// It costs what changed. The mount goes on, over the new layer.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl seal /mnt debian-nginx\n  \
    layerctl seal /srv/web web:checkpoint --kind instance\n  \
    layerctl seal /mnt app --force                 the name app moves to the new layer")]
pub struct Seal {
    /// Where it is mounted
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub dir: PathBuf,
    /// The new layer's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What it is for
    #[arg(long, short, default_value = "application")]
    pub kind: Kind,
    /// Replace NAME if it exists
    #[arg(long, short)]
    pub force: bool,
    /// Squash the layer with those of its kind below if they are more than so many; 0: never [default: 32, or
    /// squash_past of the config file]
    #[arg(long, value_name = "LAYERS")]
    pub squash_past: Option<u64>,
}

/// List the store's mounts, or show what they do.
///
/// What the kernel answers from its own caches doesn't come to the daemon, and isn't in the rates.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl mounts\n  \
    layerctl mounts --rates                  requests and bytes a second, how long answers take\n  \
    layerctl mounts --watch                  the same, again and again\n  \
    layerctl mounts --requests --longer 5    what has been waiting for more than 5 seconds?")]
pub struct Mounts {
    /// Show rates, latencies and hit rates of the next second
    #[arg(long, short = 'R')]
    pub rates: bool,
    /// Show them every second, until interrupted
    #[arg(long, short, conflicts_with = "requests")]
    pub watch: bool,
    /// List the requests that are being answered now
    #[arg(long, short, conflicts_with = "rates")]
    pub requests: bool,
    /// Only those that have been for so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "0", requires = "requests", hide_default_value = true)]
    pub longer: f64,
}

/// List or remove uppers, the writable tops of mounts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl uppers\n  layerctl uppers remove web")]
pub struct Uppers {
    /// What to do [default: list]
    #[command(subcommand)]
    pub action: Option<UppersAction>,
}

/// What to do with uppers.
#[derive(Debug, Subcommand)]
pub enum UppersAction {
    /// List them
    #[command(after_help = "Examples:\n  layerctl uppers list")]
    List,
    /// Remove uppers and the changes in them
    #[command(alias = "rm", after_help = "Examples:\n  layerctl uppers remove web\n  layerctl uppers remove 7")]
    Remove {
        /// Names or numbers
        #[arg(value_name = "UPPER", required = true)]
        uppers: Vec<String>,
    },
}
