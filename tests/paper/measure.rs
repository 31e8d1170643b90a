//! What both methods are measured with, so that it is the same.

use std::process::Command;
use std::time::{Duration, Instant};

use layerfs_tests::case::output_of;
use layerfs_tests::network::Link;

use crate::cell::{App, Cell, Kind};
use crate::probe::Probe;

/// How long the probe watches a guest that isn't moved, and one that has been.
const WATCH: Duration = Duration::from_secs(1);
/// So many answers after the move say that it is over.
const ANSWERS: usize = 50;

/// Lets the guest run until its memory is what it will be.
pub fn warm_up(cell: Cell, probe: &Probe) {
    let emulated = if cell.kind == Kind::Kvm { 4 } else { 1 };
    let seconds = match cell.app {
        App::None | App::Game => 1,
        App::Ram(megabytes) => 2 + u64::from(megabytes) / 300,
        App::Video => 3,
        App::Face => 5,
    };
    probe.watch(Duration::from_secs(seconds * emulated));
    rustix::fs::sync();
}

/// The longest gap between answers while nothing is moved.
pub fn noise(probe: &Probe) -> Duration {
    let from = Instant::now();
    probe.watch(WATCH);
    probe.longest_gap(from)
}

/// Waits until the guest answers steadily after its move, and sees that it is the same.
pub fn settle(probe: &Probe) -> anyhow::Result<()> {
    probe.hears_after(Instant::now(), ANSWERS)?;
    probe.same_guest()
}

/// Bytes that both directions of the link between the hosts have carried, by its shapers.
pub fn wire_bytes(link: &Link) -> anyhow::Result<u64> {
    Ok(link.a.shaped_bytes()? + link.b.shaped_bytes()?)
}

/// A machine's memory for `app`, in MiB: what the paper's needed, and the system's.
pub fn machine_megabytes(app: App) -> u32 {
    match app {
        App::Ram(megabytes) => 512.max(megabytes + 182),
        _ => 512,
    }
}

/// The kernel's release and how many processors there are.
pub fn machine() -> anyhow::Result<String> {
    let release = output_of(Command::new("uname").arg("-r"))?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(format!("Linux {}, {processors} processors", release.trim()))
}
