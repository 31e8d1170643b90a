//! Keeps the processors from halting while programs ask a mount one thing after the other.
//!
//! Whoever asks sleeps until it has the answer, and to wake a halted processor of a virtual machine takes longer than most answers (ADR
//! 31). A latency of zero, asked of the kernel through `/dev/cpu_dma_latency`, has idle processors look for work instead. It is asked
//! for only while requests come in quick succession, as it costs whoever shares the host's processors that time.
//!
//! Invariants: a mount that is asked seldom costs nothing but a count; what was asked for ends with the rush, and with the daemon, as
//! it is bound to an open file.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So many requests in so short a time are a rush.
const RUSH_REQUESTS: u32 = 8;
const RUSH: Duration = Duration::from_millis(1);
/// It is over when as many take so long, or nothing comes for half of it.
const LULL: Duration = Duration::from_millis(4);
/// Machines with more processors aren't kept awake unasked: all that are idle would be.
const PROCESSORS_MAX: usize = 4;
/// Takes the longest time in microseconds, an `int`, that a processor may need to wake, as long as it is open.
const LATENCY: &str = "/dev/cpu_dma_latency";

/// When processors are kept awake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeepAwake {
    /// In virtual machines of two to four processors.
    #[default]
    Auto,
    /// Wherever the kernel lets us.
    Always,
    /// Nowhere.
    Never,
}

static WANTED: AtomicU8 = AtomicU8::new(KeepAwake::Auto as u8);

/// Says when the mounts that this process serves from now on keep processors awake.
pub fn set_keep_awake(when: KeepAwake) {
    WANTED.store(when as u8, Ordering::Relaxed);
}

/// Whether mounts keep processors awake here: it is wanted, pays, and the kernel lets us.
#[must_use]
pub fn keeps_awake() -> bool {
    let wanted = WANTED.load(Ordering::Relaxed);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let pays = || (2..=PROCESSORS_MAX).contains(&processors) && is_virtual();
    (wanted == KeepAwake::Always as u8 || (wanted == KeepAwake::Auto as u8 && pays()))
        && File::options().write(true).open(LATENCY).is_ok()
}

/// Whether this is a virtual machine whose idle processors halt, and could look for work instead.
fn is_virtual() -> bool {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    match read("/sys/devices/system/cpu/cpuidle/current_driver").trim() {
        "haltpoll" => true,
        // Without a driver the kernel knows nothing but halting.
        "" | "none" => false,
        _ => has_hypervisor(&read("/proc/cpuinfo")),
    }
}

fn has_hypervisor(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.next().is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// How quickly a mount's requests come, and what is asked of the kernel therefore. The leader tells it.
#[derive(Debug)]
pub(super) struct Pace {
    /// Where to ask; none if processors aren't kept awake.
    latency: Option<PathBuf>,
    requests: AtomicU32,
    rush: Mutex<Rush>,
}

#[derive(Debug)]
struct Rush {
    /// When requests were last counted.
    counted: Instant,
    /// Open as long as processors are to stay awake.
    held: Option<File>,
}

impl Pace {
    /// Of a mount that is served from now on.
    pub fn new() -> Pace {
        Pace::with(keeps_awake().then_some(Path::new(LATENCY)))
    }

    fn with(latency: Option<&Path>) -> Pace {
        let rush = Rush { counted: Instant::now(), held: None };
        Pace { latency: latency.map(Path::to_owned), requests: AtomicU32::new(0), rush: Mutex::new(rush) }
    }

    /// A request has come whose sender may be waiting.
    pub fn request(&self) {
        let Some(latency) = &self.latency else { return };
        if self.requests.fetch_add(1, Ordering::Relaxed).is_multiple_of(RUSH_REQUESTS) {
            self.count(latency, Instant::now());
        }
    }

    /// As many requests as are counted together have come since it was last called.
    fn count(&self, latency: &Path, now: Instant) {
        let mut rush = self.rush.lock();
        let took = now.saturating_duration_since(rush.counted);
        rush.counted = now;
        if took >= LULL {
            rush.held = None;
        } else if took <= RUSH && rush.held.is_none() {
            rush.held = ask(latency).inspect_err(|error| tracing::debug!(%error, "processors may halt")).ok();
        }
    }

    /// For how long nothing may come before [`Pace::lull`] is called; none if it needn't be.
    pub fn until_lull(&self) -> Option<Duration> {
        self.latency.as_ref()?;
        self.rush.lock().held.is_some().then_some(LULL / 2)
    }

    /// Nothing has come for that long.
    pub fn lull(&self) {
        self.rush.lock().held = None;
    }
}

fn ask(latency: &Path) -> io::Result<File> {
    let mut held = File::options().write(true).open(latency)?;
    held.write_all(&0i32.to_ne_bytes())?;
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(name: &str) -> (Pace, PathBuf) {
        let path = std::env::temp_dir().join(format!("layerfs-{name}-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        (Pace::with(Some(&path)), path)
    }

    #[test]
    fn a_rush_keeps_processors_awake_until_it_is_over() {
        let (pace, path) = pace("rush");
        let mut now = Instant::now();
        let mut after = |time| {
            now += time;
            pace.count(&path, now);
            pace.until_lull().is_some()
        };
        assert!(!after(RUSH * 2), "that is no rush");
        assert!(after(RUSH));
        assert_eq!(std::fs::read(&path).unwrap(), [0; 4]);
        assert!(after(RUSH * 2), "a slower while doesn't end it");
        assert!(!after(LULL));
        assert!(after(RUSH / 2));
        pace.lull();
        assert_eq!(pace.until_lull(), None);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn requests_are_counted_by_eight() {
        let (pace, path) = pace("eight");
        // Each time that eight come within a millisecond, which a busy machine may keep from happening.
        let rushes = (0..1_000_000).any(|_| {
            pace.request();
            pace.until_lull().is_some()
        });
        assert!(rushes);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn who_may_not_ask_goes_on_without() {
        let pace = Pace::with(Some(Path::new("/nonexistent/latency")));
        (0..100).for_each(|_| pace.request());
        assert_eq!(pace.until_lull(), None);
        let pace = Pace::with(None);
        (0..100).for_each(|_| pace.request());
        assert_eq!(pace.until_lull(), None);
    }

    #[test]
    fn a_hypervisor_is_told_by_its_flag() {
        assert!(has_hypervisor("processor\t: 0\nflags\t\t: fpu vme hypervisor lahf_lm\nprocessor\t: 1\n"));
        assert!(!has_hypervisor("processor\t: 0\nmodel name\t: hypervisor\nflags\t\t: fpu vme\n"));
        assert!(!has_hypervisor(""));
    }
}
