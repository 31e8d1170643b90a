//! The command line's definition: every command, argument, help text and example.
//!
//! Parsing only; nothing here acts. The man pages and completions derive from it.

pub mod layers;
pub mod mounts;
pub mod peers;
pub mod storage;
pub mod system;

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

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a layer of a folder, an archive, an OCI image or a disk image
    Import(layers::Import),
    /// Write a layer out as a folder, an archive, an OCI image or a disk image
    Export(layers::Export),
    /// Give a layer one more name
    Tag(layers::Tag),
    /// Remove names; what nothing else refers to is freed by gc
    #[command(alias = "rm")]
    Remove(layers::Remove),
    /// List the layers
    #[command(alias = "ls")]
    List(layers::List),
    /// Show which layer lies on which
    Tree(layers::Tree),
    /// Show a layer's manifest, or one file's chunks
    #[command(alias = "show")]
    Inspect(layers::Inspect),
    /// Show the history of a stack, top first
    #[command(alias = "history")]
    Log(layers::Log),
    /// Show what changed between two layers, by path
    Diff(layers::Diff),

    /// Mount a layer with everything below it
    Mount(mounts::Mount),
    /// Unmount
    #[command(alias = "unmount")]
    Umount(mounts::Umount),
    /// Make a layer of what was changed in a mount
    #[command(alias = "commit")]
    Seal(mounts::Seal),
    /// List the mounts
    Mounts(mounts::Mounts),
    /// List or remove the writable tops of mounts
    Uppers(mounts::Uppers),

    /// Send layers to a peer
    Push(peers::Push),
    /// Fetch layers from a peer
    Pull(peers::Pull),
    /// Add, list and remove peers; show this host's own identity
    Peer(peers::Peer),

    /// Show what the store holds: chunks, packs, ratios, dead bytes
    Stat(storage::Stat),
    /// Show what layers take, and what removing them would free
    Du(storage::Du),
    /// Show who refers to a chunk or a path
    Why(storage::Why),
    /// Free what nothing refers to
    Gc(storage::Gc),
    /// Check the store's structure
    Fsck(storage::Fsck),
    /// Read and verify every chunk
    #[command(alias = "verify")]
    Scrub(storage::Scrub),

    /// Start, stop or look at the daemon
    Daemon(system::Daemon),
    /// Print completions for a shell
    Completions(system::Completions),
    /// Generate man pages and completions
    Generate(system::Generate),
    /// Print the versions of this program and of the daemon
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
         layerctl push debian-nginx edge1                  it goes to another host, only what is lacking\n  \
         layerctl du                                       what it all takes\n\n\
         Environment:\n  \
         LAYERFS_STORE   the store's folder\n  \
         LAYERFS_CONFIG  the config file, instead of /etc/layerfs/config.toml and ~/.config/layerfs/config.toml\n  \
         LAYERFS_LOG     the daemon's log filter, such as `debug` or `migrator=debug,info`\n  \
         NO_COLOR        no colours\n\n\
         Exit codes:\n{}",
        exit_code_table()
    )
}
