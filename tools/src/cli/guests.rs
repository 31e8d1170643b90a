//! The command about guests.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Run containers and machines on layers, checkpoint them and let them go on.
///
/// A guest runs on a mount of a sealed stack. What it changes goes to an upper of its own; a checkpoint makes two layers,
/// guest/NAME/TAG/instance of what it has changed on its disk and guest/NAME/TAG/state of its memory, which can be pushed
/// like any other.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl guest create web --driver process --on app -- /usr/sbin/nginx -g 'daemon off;'\n  \
    layerctl guest start web\n  \
    layerctl guest checkpoint web --stop\n  \
    layerctl guest restore web")]
pub struct Guest {
    /// What to do
    #[command(subcommand)]
    pub action: GuestAction,
}

/// What to do with guests.
#[derive(Debug, Subcommand)]
pub enum GuestAction {
    /// Make a guest on a stack; it isn't started
    Create(Box<GuestCreate>),
    /// Start a guest anew, or let one go on that a checkpoint which was cut off has left standing still
    #[command(after_help = "Examples:\n  layerctl guest start web")]
    Start(GuestName),
    /// End a guest; what it has changed on its disk is kept
    #[command(after_help = "Examples:\n  layerctl guest stop web")]
    Stop(GuestName),
    /// List the guests
    #[command(
        alias = "ls",
        after_help = "Examples:\n  layerctl guest list\n  layerctl guest list --json | jq .guests[].name"
    )]
    List,
    /// Tell all of a guest
    #[command(after_help = "Examples:\n  layerctl guest show web")]
    Show(GuestName),
    /// Tell what is in the way of running, checkpointing and restoring a guest here
    #[command(after_help = "Examples:\n  layerctl guest check web")]
    Check(GuestName),
    /// Run a command in a guest
    ///
    /// What it writes comes as it is, stdout and stderr apart, and its exit code is this command's, or 128 and the signal's number if it was
    /// killed. Ctrl-C, or the end of this command, ends it with all that it has started. It has no terminal: a program that wants one gets
    /// it from `script -qc PROGRAM /dev/null` in the guest, or by ssh. Machines take no commands (use ssh).
    #[command(after_help = "Examples:\n  \
        layerctl guest exec web ps aux\n  \
        layerctl guest exec web -- sh -c 'tail -f /var/log/web'\n  \
        layerctl guest exec web tar cf - /srv > srv.tar\n  \
        layerctl guest exec -i web tar xf - -C /srv < srv.tar")]
    Exec {
        /// The guest
        #[arg(value_name = "NAME")]
        name: String,
        /// Pass this command's stdin on; else the command has nothing to read
        #[arg(long, short = 'i')]
        stdin: bool,
        /// The command and its arguments
        #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Make layers of a running guest's memory and disk, as they are at one moment
    #[command(after_help = "Examples:\n  \
        layerctl guest checkpoint web                 it runs on\n  \
        layerctl guest checkpoint web --tag before-upgrade\n  \
        layerctl guest checkpoint web --stop\n  \
        layerctl push guest/web/checkpoint/state guest/web/checkpoint/instance edge1")]
    Checkpoint {
        /// The guest
        #[arg(value_name = "NAME")]
        name: String,
        /// The checkpoint's tag; an older one of this tag is replaced [default: checkpoint]
        #[arg(long, value_name = "TAG")]
        tag: Option<String>,
        /// End the guest with it
        #[arg(long)]
        stop: bool,
    },
    /// Let a guest go on from a checkpoint
    ///
    /// What the guest has changed since then is lost. A guest whose layers were pushed to this host is taken on record.
    #[command(
        after_help = "Examples:\n  layerctl guest restore web\n  layerctl guest restore web --tag before-upgrade"
    )]
    Restore {
        /// The guest
        #[arg(value_name = "NAME")]
        name: String,
        /// The checkpoint's tag [default: the latest here]
        #[arg(long, value_name = "TAG")]
        tag: Option<String>,
    },
    /// Tell how an unfinished move of a guest stands, or decide what becomes of it
    ///
    /// A move is in doubt when the link was cut, or a host died, between the source's release and the destination's answer. Then nothing
    /// starts by itself, and either side asks the other again and again. What only an operator can know is said with --run-here or
    /// --give-up, which tell what they risk.
    #[command(after_help = "Examples:\n  layerctl guest resolve web\n  layerctl guest resolve web --ask\n  \
        layerctl guest resolve web --run-here --force")]
    Resolve(super::migrate::Resolve),
    /// Remove a guest with all that it has changed; layers of checkpoints stay
    #[command(alias = "rm", after_help = "Examples:\n  layerctl guest remove web --force")]
    Remove {
        /// The guest
        #[arg(value_name = "NAME")]
        name: String,
        /// End it if it runs
        #[arg(long, short)]
        force: bool,
    },
}

/// Which guest.
#[derive(Debug, Args)]
pub struct GuestName {
    /// The guest
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// A guest to make.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    layerctl guest create web --driver process --on app -- /usr/sbin/nginx -g 'daemon off;'\n  \
    layerctl guest create vm --driver qemu --on debian-disk --memory 1G\n  \
    layerctl guest create game --on game --network bridge:br0,10.0.0.2/24 -- /usr/games/server")]
pub struct GuestCreate {
    /// What to call it
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What runs it: process, oci (runc), lxc, or qemu (a machine)
    #[arg(long, value_name = "DRIVER", default_value = "process")]
    pub driver: String,
    /// The layer that it runs on, with those below
    #[arg(long, value_name = "LAYER")]
    pub on: String,
    /// How it is connected: none, or bridge:BRIDGE,ADDRESS/LENGTH[,GATEWAY]
    #[arg(long, value_name = "NETWORK", default_value = "none")]
    pub network: String,
    /// A variable of its environment
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Its working folder, in the guest
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
    /// The host's name that it sees [default: its own]
    #[arg(long, value_name = "HOST")]
    pub hostname: Option<String>,
    /// A file in the guest to which its output is appended
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// A machine's memory [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = "Machines (driver qemu)")]
    pub memory: Option<String>,
    /// How many processors a machine has [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machines (driver qemu)")]
    pub cpus: Option<u32>,
    /// What emulates a machine: tcg, which works everywhere, kvm, which is fast, or auto, the best that works [default: auto]
    #[arg(long, value_name = "WHAT", help_heading = "Machines (driver qemu)")]
    pub accel: Option<String>,
    /// The kernel that a machine boots, as a path in its layers [default: what is on its disk]
    #[arg(long, value_name = "FILE", help_heading = "Machines (driver qemu)")]
    pub kernel: Option<PathBuf>,
    /// The kernel's first files, likewise
    #[arg(long, value_name = "FILE", help_heading = "Machines (driver qemu)")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", help_heading = "Machines (driver qemu)")]
    pub append: Option<String>,
    /// A machine's disk, as a path in its layers [default: disk.raw, if there is one]
    #[arg(long, value_name = "FILE", help_heading = "Machines (driver qemu)")]
    pub disk: Option<PathBuf>,
    /// Its first program, with its whole path, and the arguments
    #[arg(value_name = "COMMAND", last = true)]
    pub command: Vec<String>,
}

/// Obey the daemon's orders about a guest, which come on stdin; not for people.
#[derive(Debug, Args)]
pub struct GuestLaunch {}
