//! The command line's definition: every command, argument, help text and example.
//!
//! Parsing only; nothing here acts. The man pages and completions derive from it.

pub mod guests;
pub mod layers;
pub mod migrate;
pub mod mounts;
pub mod peers;
pub mod registry;
pub mod storage;
pub mod system;
pub mod tier;
pub mod transfers;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::failure::EXIT_CODES;

/// Layers of files, disks and machines: imported, mounted, changed, sealed and moved between hosts.
#[derive(Debug, Parser)]
#[command(
    name = "layerctl",
    version,
    about,
    long_about = "Layers of files, disks and machines: imported, mounted, changed, sealed and moved between hosts.\n\n\
        Everything is kept once, in content-addressed chunks, in a store. A daemon owns the store; it starts by itself \
        when a command needs it.",
    after_help = top_help(),
    disable_help_subcommand = false,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 110
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The store's folder [env: LAYERFS_STORE] [default: /var/lib/layerfs for root, else ~/.local/share/layerfs]
    #[arg(long, global = true, value_name = "PATH", display_order = 100)]
    pub store: Option<PathBuf>,
    /// Answer in JSON on stdout, and failures in JSON on stderr
    #[arg(long, global = true, display_order = 101)]
    pub json: bool,
    /// No progress and no remarks on stderr
    #[arg(long, short, global = true, display_order = 102)]
    pub quiet: bool,
    /// Whether to use colours
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = false,
        display_order = 103
    )]
    pub color: ColorChoice,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The commands; each is told of where its arguments are.
#[derive(Debug, Subcommand)]
pub enum Command {
    Import(layers::Import),
    Export(layers::Export),
    Tag(layers::Tag),
    Squash(layers::Squash),
    #[command(alias = "rm")]
    Remove(layers::Remove),
    #[command(alias = "ls")]
    List(layers::List),
    Tree(layers::Tree),
    #[command(alias = "show")]
    Inspect(layers::Inspect),
    #[command(alias = "history")]
    Log(layers::Log),
    Diff(layers::Diff),
    Trace(layers::Trace),

    Mount(mounts::Mount),
    #[command(alias = "unmount")]
    Umount(mounts::Umount),
    #[command(alias = "commit")]
    Seal(mounts::Seal),
    Mounts(mounts::Mounts),
    Uppers(mounts::Uppers),

    Push(peers::Push),
    Pull(peers::Pull),
    Transfers(transfers::Transfers),
    Limit(transfers::Limit),
    Peer(peers::Peer),
    #[command(hide = true)]
    Stdio(peers::Stdio),

    Guest(guests::Guest),
    Migrate(migrate::Migrate),
    Report(migrate::Report),
    #[command(hide = true)]
    GuestLaunch(guests::GuestLaunch),

    Stat(storage::Stat),
    Du(storage::Du),
    Why(storage::Why),
    Gc(storage::Gc),
    Fsck(storage::Fsck),
    #[command(alias = "verify")]
    Scrub(storage::Scrub),
    Tier(tier::Tier),

    Daemon(system::Daemon),
    Completions(system::Completions),
    Generate(system::Generate),
    Version(system::Version),
}

/// The exit codes, as help and man show them.
pub fn exit_code_table() -> String {
    let lines = EXIT_CODES.iter().map(|(code, _, meaning)| format!("  {code:>3}  {meaning}"));
    lines.collect::<Vec<_>>().join("\n")
}

fn top_help() -> String {
    format!(
        "Examples:\n  \
         layerctl import ./rootfs debian --kind base       a folder becomes a layer\n  \
         layerctl mount debian /mnt                        a writable mount over it\n  \
         layerctl seal /mnt debian-nginx                   what was changed there becomes a layer\n  \
         layerctl push debian-nginx edge1                  to another host, only what it lacks\n  \
         layerctl du                                       what it all takes\n\n\
         Environment:\n  \
         LAYERFS_STORE   the store's folder\n  \
         LAYERFS_CONFIG  the config file, instead of the system's and the user's\n  \
         LAYERFS_LOG     the daemon's log filter, such as `debug` or `migrator=debug,info`\n  \
         NO_COLOR        no colours\n\n\
         Config files: /etc/layerfs/config.toml, ~/.config/layerfs/config.toml (see the manual)\n\n\
         Exit codes:\n{}",
        exit_code_table()
    )
}
