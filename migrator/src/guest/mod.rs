//! Guests: what a container or a virtual machine is on one host, and what can be asked of it.
//!
//! ```text
//! Created ──start──▶ Running ──dump──▶ Stopped ──discard──▶ Away
//!    ▲                 ▲  │              │
//!    └──────stop───────┼──┘◀───resume────┘        Created | Away ──restore──▶ Running
//! ```
//!
//! Hides the runtimes: everything above [`Guest`] knows no driver, and the drivers never see a chunk; they write and
//! read files. What a guest needs of its host (mounts, layers) it gets by [`Host`]. A guest is a stack (base,
//! application, instance) and a *state*, a folder of checkpoint files that [`state`] makes an ordinary layer of.
//!
//! Invariants: after [`Guest::dump`] the guest stands still and answers nobody, whatever becomes of this process, until
//! [`Guest::resume`] or [`Guest::discard`]; no method starts a second one of a guest that runs or stands still.
//! All calls block.

pub mod checkpoint;
mod container;
mod criu;
mod drivers;
mod dump;
mod errand;
pub mod exec;
pub mod fake;
mod host;
pub mod launch;
mod lazy_pages;
mod lxc;
mod machine;
mod machine_memory;
mod mapped_ram;
pub mod memory;
mod name;
mod neighbours;
mod network;
mod network_setup;
mod nftables;
mod oci;
pub mod options;
mod packets;
pub mod pagemap;
mod preflight;
mod process;
mod processes;
pub mod programs;
mod qemu;
mod qmp;
mod records;
mod scan;
pub mod state;
mod surroundings;

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use layerfs::monitor::Monitor;
use serde::{Deserialize, Serialize};

pub use drivers::{DRIVERS, HostDrivers};
pub use dump::dump;
pub use exec::Pipes;
pub use host::{Host, Scratch};
pub use name::GuestName;
pub(crate) use network_setup::refusal as network_refusal;
pub use records::{GuestRecord, GuestSpec, GuestState, Guests};
pub use surroundings::{Surroundings, mebibytes};

use crate::error::Result;

/// For which part of a move something is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// It is only to be run here.
    Run,
    /// It runs here and is to be dumped.
    Source,
    /// It is to be restored here.
    Destination,
    /// It is to be restored here before all of its memory is.
    PostCopy,
}

/// What is in the way, and how to get it out of the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// What is missing or can't be dumped.
    pub what: String,
    /// What the user can do.
    pub fix: String,
}

impl Obstacle {
    /// Something in the way.
    pub fn new(what: impl Into<String>, fix: impl Into<String>) -> Obstacle {
        Obstacle { what: what.into(), fix: fix.into() }
    }
}

/// What a guest does at the moment, as its runtime sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// There is none of it here.
    Absent,
    /// It runs.
    Running,
    /// It stands still and may go on.
    Frozen,
}

/// What a look at a guest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it does.
    pub activity: Activity,
    /// The host's number of its first process, if it is one.
    pub pid: Option<u32>,
    /// Memory that it has in use, in bytes, as far as known.
    pub memory_bytes: Option<u64>,
}

/// What a command inside of a guest did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// Its exit code; that of a shell (128 + signal) if it was killed.
    pub code: i32,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it complained about.
    pub stderr: Vec<u8>,
}

/// What was written into a state's folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Everything else, in bytes.
    pub other_bytes: u64,
    /// How long the guest has stood still for it; none after a scan.
    pub frozen: Duration,
    /// Whether its processes have ended with the dump: then it can be resumed only as long as the files are there.
    pub has_ended: bool,
}

/// How a state comes to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Manner {
    /// All of the memory is read first.
    Whole,
    /// It runs at once, and memory is read when it is touched (post-copy). What it takes is asked for by [`Side::PostCopy`].
    Lazily,
}

/// One guest on one host.
pub trait Guest: Send + Sync {
    /// What stands in the way of running it, dumping it or restoring it here; empty if nothing does. Changes nothing.
    ///
    /// # Errors
    /// If it can't be found out.
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>>;

    /// The disk in its stack without which it has nothing to start from, if there is such a one.
    fn boots_from(&self) -> Option<&Path> {
        None
    }

    /// What it runs on here, or would.
    ///
    /// # Errors
    /// If it can't be found out.
    fn surroundings(&self) -> Result<Surroundings>;

    /// Starts it anew on the root that [`Host::root`] names, which is mounted.
    ///
    /// # Errors
    /// [`crate::Error::Guest`]; nothing of it runs then.
    fn start(&self) -> Result<()>;

    /// Ends it, with all its processes. Fine if there is none.
    ///
    /// # Errors
    /// [`crate::Error::Guest`] if something of it goes on.
    fn stop(&self) -> Result<()>;

    /// Runs a command inside of it, with `pipes`, waits for its end and returns its exit code, or that of a shell (128 + signal) if it was
    /// killed. [`exec::output`] keeps what it writes. If `monitor` is cancelled the command is killed, with what it has started as far as
    /// that is found.
    ///
    /// # Errors
    /// [`crate::Error::Guest`] if it isn't running, or if the driver can't; [`layerfs::Error::Cancelled`].
    fn exec(&self, argv: &[OsString], pipes: Pipes, monitor: &dyn Monitor) -> Result<i32>;

    /// What it does. Asks the runtime, not the records.
    ///
    /// # Errors
    /// If it can't be found out; then it may run.
    fn status(&self) -> Result<Status>;

    /// Whether one that stands still has run before, since it was started or restored, and stands still by itself: it has what no state
    /// has, and [`Guest::resume`] lets it go on.
    ///
    /// # Errors
    /// If it can't be found out.
    fn has_run(&self) -> Result<bool> {
        Ok(false)
    }

    /// Whether its memory is a file that [`Guest::dump`] only copies and [`Guest::restore_with`] takes as it is: the destination has most of
    /// it before.
    fn has_memory_file(&self) -> bool {
        false
    }

    /// Reads the memory of the running guest, without stopping it, into files in the empty folder `into` that
    /// [`state::import`] cuts into the same chunks as the files of a dump. It need not be consistent.
    ///
    /// # Errors
    /// [`crate::Error::Guest`]; the guest runs on.
    fn scan(&self, into: &Path) -> Result<Written>;

    /// Freezes it, holds back what comes for it over the network, and writes its state into the empty folder `into`.
    ///
    /// # Errors
    /// [`crate::Error::Guest`]; the guest runs on then, or, if the message says so, stands still and can be resumed.
    fn dump(&self, into: &Path) -> Result<Written>;

    /// Whether what stands still has the root that it had: one whose mount has ended would go on without its files, and had better go on
    /// from its state, if that is kept. Always so where it has ended with its dump.
    fn has_its_root(&self) -> bool {
        true
    }

    /// Lets it go on after a dump, as if nothing had been. Fine if it runs.
    ///
    /// # Errors
    /// [`crate::Error::Guest`].
    fn resume(&self) -> Result<()>;

    /// Removes what a dumped guest has left here, without a word to its clients; it goes on elsewhere or later. What came for it meanwhile
    /// over the network may be sent after it. Fine if there is nothing left.
    ///
    /// # Errors
    /// [`crate::Error::Guest`] if something of it is still there.
    fn discard(&self) -> Result<()>;

    /// Goes on from the state in `from` (which may be a read-only mount whose data is still on its way), on the root that
    /// [`Host::root`] names. Returns when it runs.
    ///
    /// # Errors
    /// [`crate::Error::Guest`]; nothing of it runs then, and it can be tried again.
    fn restore(&self, from: &Path, manner: Manner) -> Result<()>;

    /// As [`Guest::restore`] with [`Manner::Whole`]; `memory` is a file without a name that has what the state's [`state::MEMORY_FILE`]
    /// has, and becomes the guest's memory where the driver can do that. Who serves `from` itself restores so, by [`memory::restore`],
    /// where it can: killed while it reads all of it there, it couldn't die.
    ///
    /// # Errors
    /// As [`Guest::restore`].
    fn restore_with(&self, from: &Path, _memory: File) -> Result<()> {
        self.restore(from, Manner::Whole)
    }
}

/// Makes guests out of their records: the seam at which tests put fakes.
pub trait Drivers: Send + Sync {
    /// The guest with this record, with `host` to serve it. It need not run.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] if its driver isn't known here, or its options aren't what the driver knows.
    fn guest(&self, record: &GuestRecord, host: Arc<dyn Host>) -> Result<Arc<dyn Guest>>;
}
