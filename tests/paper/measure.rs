//! What both methods are measured with, so that it is the same.

use std::io::{Read, Seek};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::output_of;
use layerfs_tests::network::Link;

use crate::cell::{App, Cell, Kind};
use crate::clients::Clients;

/// How long the clients watch a guest that isn't moved.
const WATCH: Duration = Duration::from_secs(1);
/// How often it is looked whether a program has ended.
const LOOK: Duration = Duration::from_millis(1);

/// When a migration that isn't over is given up.
#[derive(Clone, Copy, Debug)]
pub struct Bound(pub Option<Instant>);

impl Bound {
    /// The one `after` from now.
    pub fn after(after: Option<Duration>) -> Bound {
        Bound(after.map(|after| Instant::now() + after))
    }

    /// Fails when it is over.
    pub fn check(self) -> anyhow::Result<()> {
        let is_over = self.0.is_some_and(|end| Instant::now() > end);
        ensure!(!is_over, "it takes longer than --most allows");
        Ok(())
    }

    /// Runs `command` to its end, or ends it.
    pub fn output(self, command: &mut Command) -> anyhow::Result<Output> {
        let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command.stdout(out.try_clone()?).stderr(err.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if let Err(error) = self.check() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
            std::thread::sleep(LOOK);
        };
        let mut output = Output { status, stdout: Vec::new(), stderr: Vec::new() };
        for (file, to) in [(&mut out, &mut output.stdout), (&mut err, &mut output.stderr)] {
            file.rewind()?;
            file.read_to_end(to)?;
        }
        Ok(output)
    }
}

/// What the processors did since they were last looked at.
pub struct Processors {
    idle: u64,
    all: u64,
}

impl Processors {
    /// As of now.
    pub fn now() -> anyhow::Result<Processors> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("no processors")?;
        let ticks: Vec<u64> =
            line.split_ascii_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        let idle = ticks.get(3).context("no idle time")? + ticks.get(4).context("no waiting time")?;
        Ok(Processors { idle, all: ticks.iter().sum() })
    }

    /// The part of their time that was used since.
    pub fn busy_since(&self) -> anyhow::Result<f64> {
        let now = Processors::now()?;
        Ok(1.0 - (now.idle - self.idle) as f64 / (now.all - self.all).max(1) as f64)
    }
}

/// Lets the guest run until its memory is what it will be.
pub fn warm_up(cell: Cell, clients: &Clients) {
    let emulated = if cell.kind == Kind::Kvm { 4 } else { 1 };
    // The RAM simulation answers when it has filled its memory.
    let seconds = match cell.app {
        App::None | App::Game | App::Ram(_) => 1,
        App::Video | App::Face => 3,
    };
    clients.watch(Duration::from_secs(seconds * emulated));
    rustix::fs::sync();
}

/// The longest gap between answers while nothing is moved, and how busy the processors are then, with the guest and its clients.
pub fn quiet(clients: &Clients) -> anyhow::Result<(Duration, f64)> {
    let (from, processors) = (Instant::now(), Processors::now()?);
    clients.watch(WATCH);
    Ok((clients.longest_gap(from), processors.busy_since()?))
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

/// By which build it was measured: the beginning of `layerctl`'s hash.
pub fn build() -> anyhow::Result<String> {
    let binary = std::fs::read(layerfs_tests::ctl::binary()?)?;
    Ok(blake3::hash(&binary).to_hex()[..8].to_owned())
}

/// The day.
pub fn day() -> anyhow::Result<String> {
    Ok(output_of(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim().to_owned())
}

/// The kernel's release and how many processors there are.
pub fn machine() -> anyhow::Result<String> {
    let release = output_of(Command::new("uname").arg("-r"))?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(format!("Linux {}, {processors} processors", release.trim()))
}
