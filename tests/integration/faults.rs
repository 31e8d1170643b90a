//! Pushes between real daemons while everything goes wrong: daemons killed, connections reset, cut, stalled, damaged.
//!
//! A relay between the hosts counts what passes and breaks connections at a byte that chance has chosen. After each
//! fault the push goes on, by itself or, when its own daemon was killed, repeated as a person would. `LAYERFS_FAULT_PUSHES`
//! says how many pushes; the protocol's own faults, at every message boundary, are in `migrator/src/tests/faults.rs`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Namespaces, Root};
use layerfs_tests::host::{Host, PORT, TwoHosts, public_key};
use layerfs_tests::network::{End, Link, inside};
use layerfs_tests::tree;

/// Pushes by default.
const PUSHES: u64 = 12;
const MEGABITS: u32 = 200;
/// Bytes of a push.
const BYTES: u64 = 16 << 20;
/// What may be under way at a fault and come again: queues and buffers of both sides and of the relay, on each of several
/// connections, frames that aren't confirmed, chunks that are being verified or lie in a pack's buffer.
const IN_FLIGHT_BYTES: u64 = 6 << 20;
/// The most that the receiver's kernel keeps for each connection, and the relay's sockets. What they take by themselves on a fast
/// machine whose programs don't run for a while would be several times [`IN_FLIGHT_BYTES`].
const SOCKET_BYTES: usize = 256 << 10;
const RELAY_PORT: u16 = 7500;
const LONGEST_STALL: Duration = Duration::from_millis(700);

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new("faults::daemons_killed_and_links_broken", &[Root, Namespaces], faults)]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The connection ends as if a host had said so.
    Cut,
    /// The connection is reset.
    Reset,
    /// A bit is turned over.
    Damage,
    /// Nothing passes for a while.
    Stall,
    KillSender,
    KillReceiver,
}

const FAULTS: [Fault; 6] =
    [Fault::Cut, Fault::Reset, Fault::Damage, Fault::Stall, Fault::KillSender, Fault::KillReceiver];

/// What all connections through the relay share.
struct Relay {
    /// Bytes that came from the sender.
    passed: AtomicU64,
    /// The next fault, and at which count of bytes.
    armed: Mutex<Option<(u64, Fault)>>,
    struck: Mutex<Sender<Fault>>,
}

impl Relay {
    /// A relay in the sender's network, and what tells of faults that have struck.
    #[allow(clippy::print_stderr)] // It tells why more is under way.
    fn start(from: &End, to: &End) -> anyhow::Result<(Arc<Relay>, Receiver<Fault>)> {
        let (struck, tells) = channel();
        let relay = Relay { passed: AtomicU64::new(0), armed: Mutex::new(None), struck: Mutex::new(struck) };
        let relay = Arc::new(relay);
        let listener = inside(from, || TcpListener::bind((from.address.as_str(), RELAY_PORT)))?;
        let (shared, from, to) = (relay.clone(), from.clone(), (to.address.clone(), PORT));
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                // While the receiver's daemon is dead nobody answers, as without a relay.
                let Ok(far) = inside(&from, || TcpStream::connect((to.0.as_str(), to.1))) else { continue };
                for stream in [&near, &far] {
                    // The kernel takes twice as much.
                    let bounded = rustix::net::sockopt::set_socket_send_buffer_size(stream, SOCKET_BYTES / 2)
                        .and_then(|()| rustix::net::sockopt::set_socket_recv_buffer_size(stream, SOCKET_BYTES / 2));
                    if let Err(error) = bounded {
                        eprintln!("the relay's buffers are as large as they are: {error}");
                    }
                }
                shared.join(near, far);
            }
        });
        Ok((relay, tells))
    }

    fn join(self: &Arc<Relay>, near: TcpStream, far: TcpStream) {
        for (from, to, forth) in [(&near, &far, true), (&far, &near, false)] {
            let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else { return };
            let relay = self.clone();
            std::thread::spawn(move || {
                // Whatever ends one way ends the other: a test of halves that live on is elsewhere.
                let _ = relay.pump(&from, &to, forth);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    }

    fn pump(&self, mut from: &TcpStream, mut to: &TcpStream, forth: bool) -> std::io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            if forth {
                let passed = self.passed.fetch_add(count as u64, Ordering::SeqCst) + count as u64;
                match self.strikes(passed) {
                    Some(Fault::Cut) => return Ok(()),
                    Some(Fault::Reset) => {
                        for stream in [from, to] {
                            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
                        }
                        return Ok(());
                    }
                    Some(Fault::Damage) => buffer[count / 2] ^= 0x10,
                    Some(Fault::Stall) => std::thread::sleep(LONGEST_STALL),
                    Some(Fault::KillSender | Fault::KillReceiver) | None => {}
                }
            }
            to.write_all(&buffer[..count])?;
        }
    }

    /// The fault whose time has come, once.
    fn strikes(&self, passed: u64) -> Option<Fault> {
        let mut armed = self.armed.lock().ok()?;
        let (_, fault) = armed.take_if(|(at, _)| *at <= passed)?;
        let _ = self.struck.lock().ok()?.send(fault);
        Some(fault)
    }

    fn arm(&self, at: u64, fault: Option<Fault>) {
        *self.armed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = fault.map(|fault| (at, fault));
    }

    fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

#[allow(clippy::print_stderr)] // What more there was to move is a figure, not a condition.
fn faults() -> anyhow::Result<()> {
    let pushes = std::env::var("LAYERFS_FAULT_PUSHES").ok().and_then(|text| text.parse().ok()).unwrap_or(PUSHES);
    let link = Link::new()?;
    link.shape(MEGABITS)?;
    let buffers = format!("4096 {} {SOCKET_BYTES}", SOCKET_BYTES / 2);
    // That file is of the network namespace of whoever opens it.
    inside(&link.b, || std::fs::write("/proc/sys/net/ipv4/tcp_rmem", buffers))?;
    let mut hosts = TwoHosts::on(link)?;
    let (relay, struck) = Relay::start(&hosts.link.a, &hosts.link.b)?;
    let by_relay = format!("{}:{RELAY_PORT}", hosts.link.a.address);
    hosts.a.ctl.ok(["peer", "remove", "b"])?;
    hosts.a.ctl.ok(["peer", "add", "b", &by_relay, "--key", &public_key(&hosts.b)?])?;
    let mut random = tree::Random::new(1);
    let (mut passed, mut kills) = (0, 0);
    for push in 0..pushes {
        let fault = FAULTS[push as usize % FAULTS.len()];
        let before = relay.passed();
        let name = format!("layer{push}");
        let tree = hosts.a.new_folder(&name)?;
        tree::big_file(&tree.join("noise"), push, BYTES)?;
        hosts.a.import(&tree, &name, &[])?;
        relay.arm(before + 1 + random.below(BYTES), Some(fault));
        let context = || format!("push {push}, {fault:?}");
        push_through(&mut hosts, &name, &struck).with_context(context)?;
        kills += u64::from(matches!(fault, Fault::KillSender | Fault::KillReceiver));
        let bytes = relay.passed() - before;
        passed += bytes;
        ensure!(
            bytes <= BYTES + BYTES / 50 + IN_FLIGHT_BYTES,
            "{}: {bytes} bytes for {BYTES}: more came twice than was in flight",
            context()
        );
        ensure!(hosts.a.names()?.get(&name) == hosts.b.names()?.get(&name), "{}: another layer came", context());
        if push % 20 == 19 {
            clear(&hosts)?;
        }
    }
    // What TLS, frames and ids take is a part of it.
    let more = (passed as f64 / (pushes * BYTES) as f64 - 1.0) * 100.0;
    eprintln!(
        "{pushes} pushes of {BYTES} bytes, {kills} daemons killed: {more:.2}% more bytes than those of the files"
    );
    for host in [&hosts.a, &hosts.b] {
        host.fsck()?;
        host.ctl.ok(["scrub"])?;
    }
    Ok(())
}

/// Pushes `name` until it is there, whatever strikes meanwhile.
fn push_through(hosts: &mut TwoHosts, name: &str, struck: &Receiver<Fault>) -> anyhow::Result<()> {
    let (done, ended) = channel();
    let ctl = hosts.a.ctl.clone();
    let arguments = ["push", name, "b", "--retry-for", "60s"].map(str::to_owned);
    std::thread::spawn(move || done.send(ctl.run(arguments)));
    let fault = struck.recv_timeout(Duration::from_secs(60)).context("the fault did not strike")?;
    match fault {
        Fault::KillSender => restart(&mut hosts.a)?,
        Fault::KillReceiver => restart(&mut hosts.b)?,
        _ => {}
    }
    let answer = ended.recv_timeout(Duration::from_secs(120)).context("the push neither ends nor goes on")??;
    if fault == Fault::KillSender {
        // The last bytes may have been on their way already.
        ensure!(answer.code != 101 && !answer.stderr.contains("panicked"), "{}", answer.stderr);
        hosts.a.ctl.ok(["push", name, "b"])?;
        return Ok(());
    }
    answer.ok().map(drop)
}

fn restart(host: &mut Host) -> anyhow::Result<()> {
    host.kill()?;
    host.start(&[])
}

/// Removes what has been pushed, so that a long run doesn't fill the disk.
fn clear(hosts: &TwoHosts) -> anyhow::Result<()> {
    for host in [&hosts.a, &hosts.b] {
        for name in host.names()?.keys() {
            host.ctl.ok(["remove", name])?;
        }
        host.ctl.ok(["gc"])?;
    }
    Ok(())
}
