//! A link with delay and loss between two namespaces: TUN devices, joined by two threads of this process.
//!
//! Stands in for netem, which not every kernel has; the rate is `tc`'s matter (TBF on the devices, see `network`).
//! Hides TUN, its offloads and the clock. Packets pass as TCP made them, up to 64 KiB at once, as one thread can't carry
//! 80,000 a second otherwise; but each segment inside is lost by itself, as on a wire with an MTU of 1,500, and the
//! large packet goes on in the pieces that are left. Invariant: packets keep their order.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::segments::survivors;

/// What a path does to packets, each way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// What is added to the round trip; half of it each way.
    pub round_trip: Duration,
    /// Packets lost, in percent, each way.
    pub loss_percent: f64,
}

/// Packets on their way at most: 1 Gbit/s for 200 ms fits well.
const MAX_FLYING_BYTES: usize = 256 << 20;
const LONGEST: usize = 66_000;

/// The conditions as the threads read them, changeable meanwhile.
#[derive(Debug, Default)]
struct Shared {
    one_way_micros: AtomicU64,
    loss_millionths: AtomicU32,
    is_over: AtomicBool,
    lost: AtomicU64,
}

/// A running path. Dropping it ends its threads and removes its devices.
#[derive(Debug)]
pub struct Emulator {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Emulator {
    /// Joins namespaces `a` and `b` by a device called `interface` in each.
    pub fn start(a: &str, b: &str, interface: &str, conditions: Conditions) -> anyhow::Result<Emulator> {
        let (a, b) = (Arc::new(open_tun(a, interface)?), Arc::new(open_tun(b, interface)?));
        let shared = Arc::new(Shared::default());
        let thread = |from: &Arc<OwnedFd>, to: &Arc<OwnedFd>, seed| {
            let way = Way { from: from.clone(), to: to.clone(), shared: shared.clone(), random: seed };
            std::thread::Builder::new().name(format!("{interface} way")).spawn(move || way.run())
        };
        let threads = vec![thread(&a, &b, 0x9e37_79b9_7f4a_7c15)?, thread(&b, &a, 0xd1b5_4a32_d192_ed03)?];
        let emulator = Emulator { shared, threads };
        emulator.set(conditions);
        Ok(emulator)
    }

    /// Changes the conditions for packets that come from now on.
    pub fn set(&self, conditions: Conditions) {
        self.shared.one_way_micros.store(conditions.round_trip.as_micros() as u64 / 2, Ordering::Relaxed);
        self.shared.loss_millionths.store((conditions.loss_percent * 1e4) as u32, Ordering::Relaxed);
    }

    /// How many packets were lost by plan.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Makes a TUN device in `namespace`. A thread of its own does it, as it stays in there.
fn open_tun(namespace: &str, interface: &str) -> anyhow::Result<OwnedFd> {
    let (path, interface) = (format!("/run/netns/{namespace}"), interface.to_owned());
    let thread = std::thread::spawn(move || {
        let there = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context(path)?;
        move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network)).context("setns")?;
        let tun = open("/dev/net/tun", OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .context("/dev/net/tun")?;
        set_interface(&tun, &interface)?;
        Ok(tun)
    });
    thread.join().map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
}

#[allow(unsafe_code)] // rustix has no call for TUN's ioctls.
fn set_interface(tun: &OwnedFd, interface: &str) -> anyhow::Result<()> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
    const TUN_NO_PI_VNET_HDR: i16 = 0x0001 | 0x1000 | 0x4000;
    const CHECKSUM_AND_TSO4: libc::c_ulong = 0x01 | 0x02;
    let mut request = [0u8; 40];
    ensure!(interface.len() < 16, "{interface} is too long a name");
    request[..interface.len()].copy_from_slice(interface.as_bytes());
    request[16..18].copy_from_slice(&TUN_NO_PI_VNET_HDR.to_ne_bytes());
    // SAFETY: the descriptor is open, the request is a `struct ifreq` of 40 bytes that outlives the call.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    ensure!(made == 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    // SAFETY: as above; the argument is a number.
    let set = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETOFFLOAD, CHECKSUM_AND_TSO4) };
    ensure!(set == 0, "TUNSETOFFLOAD: {}", std::io::Error::last_os_error());
    Ok(())
}

/// One direction.
struct Way {
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    shared: Arc<Shared>,
    random: u64,
}

impl Way {
    fn run(mut self) {
        let mut flying: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut flying_bytes = 0;
        let mut buffer = vec![0; LONGEST];
        while !self.shared.is_over.load(Ordering::Relaxed) {
            let longest = Duration::from_millis(50);
            let wait =
                flying.front().map_or(longest, |(due, _)| due.saturating_duration_since(Instant::now()).min(longest));
            let wait = Timespec { tv_sec: 0, tv_nsec: wait.as_nanos() as _ };
            let _ = poll(&mut [PollFd::new(&self.from, PollFlags::IN)], Some(&wait));
            let delay = Duration::from_micros(self.shared.one_way_micros.load(Ordering::Relaxed));
            // A bounded batch, so that those that are due don't wait for the end of a flood.
            for _ in 0..32 {
                let count = match rustix::io::read(&self.from, &mut buffer) {
                    Ok(count) => count,
                    Err(Errno::AGAIN | Errno::INTR) => break,
                    // The interface is down.
                    Err(_) => {
                        std::thread::sleep(Duration::from_millis(1));
                        break;
                    }
                };
                let due = Instant::now() + delay;
                let (to, mut random) = (&self.to, self.random);
                let millionths = self.shared.loss_millionths.load(Ordering::Relaxed);
                let mut is_lost = || {
                    let lost = loses(&mut random, millionths);
                    self.shared.lost.fetch_add(u64::from(lost), Ordering::Relaxed);
                    lost
                };
                survivors(&buffer[..count], &mut is_lost, &mut |packet| {
                    if delay.is_zero() && flying.is_empty() {
                        let _ = rustix::io::write(to, packet);
                    } else if flying_bytes < MAX_FLYING_BYTES {
                        flying_bytes += packet.len();
                        flying.push_back((due, packet.to_vec()));
                    }
                });
                self.random = random;
            }
            let now = Instant::now();
            while flying.front().is_some_and(|(due, _)| *due <= now) {
                let Some((_, packet)) = flying.pop_front() else { break };
                flying_bytes -= packet.len();
                let _ = rustix::io::write(&self.to, &packet);
            }
        }
    }
}

/// Whether fate takes the next packet.
fn loses(random: &mut u64, millionths: u32) -> bool {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    (*random >> 20) % 1_000_000 < u64::from(millionths)
}
