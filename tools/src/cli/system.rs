//! Commands about the program itself: daemon, generate, completions, version.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Start the daemon, or look at it.
///
/// Commands start it by themselves; it leaves when there was nothing to do for some minutes: no mount, no listener, no
/// work. Started by hand or by systemd it stays.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
    layerctl daemon                                  start it in the background\n  \
    layerctl daemon --foreground --listen 0.0.0.0    for systemd\n  \
    layerctl daemon status\n  \
    layerctl daemon restart                          after an upgrade; mounts go on\n  \
    layerctl daemon stop"
)]
pub struct Daemon {
    /// What to do [default: start]
    #[command(subcommand)]
    pub action: Option<DaemonAction>,
    /// How to start.
    #[command(flatten)]
    pub start: DaemonStart,
}

/// What to do with the daemon.
#[derive(Debug, Subcommand)]
pub enum DaemonAction {
    /// Start it
    #[command(after_help = "Examples:\n  layerctl daemon start\n  layerctl daemon start --listen 10.0.0.1:7440")]
    Start(DaemonStart),
    /// Show its version, mounts, work and listener; exit code 3 if none runs, 5 if one is being started that goes on with the mounts
    #[command(after_help = "Examples:\n  layerctl daemon status\n  layerctl daemon status --json")]
    Status,
    /// Let another daemon take over, as after an upgrade; mounts, open files and running programs go on
    #[command(
        after_help = "Examples:\n  layerctl daemon restart\n  layerctl daemon restart --force     cancels work, ends mounts that no keeper has"
    )]
    Restart {
        /// Cancel work that is under way; mounts that no keeper has end, and are mounted again
        #[arg(long, short)]
        force: bool,
    },
    /// Show or change what the running daemon logs
    #[command(
        after_help = "Examples:\n  layerctl daemon log-filter                            what is in force?\n  layerctl daemon log-filter layerfs::mount=debug,info\n  layerctl daemon log-filter info"
    )]
    LogFilter {
        /// The new filter, as LAYERFS_LOG has it; it holds until the daemon ends
        #[arg(value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Hold the descriptors of mounts, and start a daemon when there is none
    #[command(hide = true)]
    Keep,
    /// Wait for a mount in the daemon's place
    #[command(hide = true)]
    Hand,
    /// Unmount and exit; refused while work is under way or a mount is in use
    #[command(
        after_help = "Examples:\n  layerctl daemon stop\n  layerctl daemon stop --force     also cancels work, and ends mounts that are in use"
    )]
    Stop {
        /// Cancel work and end mounts that are in use: what uses them gets errors
        #[arg(long, short)]
        force: bool,
    },
}

/// How to start the daemon.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonStart {
    /// Stay in the foreground and log to stderr
    #[arg(long)]
    pub foreground: bool,
    /// Listen for peers: ADDRESS[:PORT], `auto` or `off` [default: auto, as soon as there are peers]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Let the mounts end with the daemon, instead of having a keeper hold them and start another daemon
    #[arg(long)]
    pub no_keeper: bool,
    /// Die at a named step, for tests
    #[arg(long, value_name = "STEP[:N]", hide = true)]
    pub crash_at: Option<String>,
    /// A command started it: it may leave by itself
    #[arg(long, hide = true)]
    pub autostarted: bool,
    /// Tell readiness on stdout and leave the terminal; the log goes to the store's daemon.log
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// Print completions for SHELL.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl completions bash > /etc/bash_completion.d/layerctl\n  \
    layerctl completions zsh > \"${fpath[1]}/_layerctl\"\n  \
    layerctl completions fish > ~/.config/fish/completions/layerctl.fish")]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Generate man pages and completions from this program's own definition.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  layerctl generate man /usr/local/share/man/man1\n  layerctl generate completions bash"
)]
pub struct Generate {
    /// What to generate
    #[command(subcommand)]
    pub what: GenerateWhat,
}

/// What to generate.
#[derive(Debug, Subcommand)]
pub enum GenerateWhat {
    /// Man pages: one for each command
    #[command(after_help = "Examples:\n  layerctl generate man ./man && man ./man/layerctl-import.1")]
    Man {
        /// The folder to write to; made if it does not exist
        #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// Completions on stdout
    #[command(after_help = "Examples:\n  layerctl generate completions bash > /etc/bash_completion.d/layerctl")]
    Completions(Completions),
}

/// Print the versions of this program and of the daemon, if one runs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  layerctl version\n  layerctl version --json")]
pub struct Version {}
