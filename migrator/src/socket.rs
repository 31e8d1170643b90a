//! TCP and MPTCP sockets: how they are made, set up, and what the kernel knows about them.
//!
//! Hides system calls. Invariants: whatever a kernel doesn't offer (MPTCP, BBR, a field of TCP_INFO) is done without;
//! nothing here fails because of it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// So much that could not be sent yet lies in a socket at most: what the link can't take stays with us, so that whoever
/// makes frames sees how fast it is, and little is lost with a connection.
const MAX_UNSENT_BYTES: u32 = 256 * 1024;
/// The same for a long path, which several connections share: the last of them shall not be busy long after the first.
const MAX_UNSENT_BYTES_FAR: u32 = 64 * 1024;
/// On a long path a send buffer holds what is on its way and what waits behind a lost packet, for which the limit that the
/// kernel's own sizing has, mostly 4 MiB, is too low. The kernel makes it twice this, for its overhead.
const SEND_BUFFER_FAR: usize = 16 << 20;
/// A path is long from this round trip on: a single connection takes long to get up to speed there, and the kernel's own limit of its
/// send buffer may be too low.
pub(crate) const FAR_ROUND_TRIP: Duration = Duration::from_millis(40);
/// Below this round trip losses are repaired so fast that the kernel's default does as well, for less work.
const LONG_ROUND_TRIP: Duration = Duration::from_millis(2);
/// The congestion control for long or lossy paths: it doesn't take every loss for congestion.
const FOR_LOSS: &str = "bbr";
/// That for a long path that loses nothing. The other stands still every ten seconds, for a round trip and more, to see how
/// short that is, and all connections of a transfer do so together.
const FOR_FULL: &str = "cubic";
/// BBR is chosen anew so often, which spares its pauses: it has them when it has not seen the shortest round trip for ten seconds, which the
/// kernel has kept all along.
const RENEW_EVERY: Duration = Duration::from_secs(7);
/// It begins by sending three times as fast as it can to see how fast that is. So long, in round trips, it is held to what is known.
const RENEWAL_ROUND_TRIPS: u32 = 6;
/// To so many percent of it.
const RENEWAL_PERCENT: u64 = 110;
/// One packet of so many that had to be sent again is a lossy path.
const LOSSY: u64 = 300;
/// So many packets tell how lossy a path is.
const TELLING_PACKETS: u64 = 4000;
/// A path that has lost nothing for so long is taken for one that doesn't.
const STEADY: Duration = Duration::from_secs(4);
/// How often a connection that sends is looked at.
const TUNE_EVERY: Duration = Duration::from_millis(250);

/// What a socket is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// MPTCP, where both sides have it; TCP otherwise.
    Mptcp,
}

fn new_socket(address: &SocketAddr, kind: Kind) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let make = |protocol: Option<Protocol>| rustix::net::socket_with(family, SocketType::STREAM, flags, protocol);
    if kind == Kind::Mptcp
        && let Ok(socket) = make(Some(ipproto::MPTCP))
    {
        return Ok(socket);
    }
    Ok(make(None)?)
}

/// Connects to `to`, from `from` if that is given.
pub(crate) async fn connect(to: SocketAddr, from: Option<IpAddr>, kind: Kind) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(new_socket(&to, kind)?.into());
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(to).await
}

/// Listens on `address`. A socket for MPTCP takes plain TCP too.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = new_socket(&address, Kind::Mptcp)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        // `::` is for IPv4 too, as with TcpListener::bind.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 1024)?;
    TcpListener::from_std(socket.into())
}

/// Sets up a connected socket: no waiting for more, little unsent, dead after `silence` without an answer.
pub(crate) fn set_up(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = stream.as_fd();
    // Whatever of this a kernel refuses for this kind of socket is not needed for correctness.
    let _ = sockopt::set_tcp_user_timeout(socket, silence.as_millis().min(u128::from(u32::MAX)) as u32);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, (silence / 2).max(Duration::from_secs(1)));
    let _ = sockopt::set_tcp_keepintvl(socket, (silence / 6).max(Duration::from_secs(1)));
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(MAX_UNSENT_BYTES);
    Ok(())
}

/// A connection's socket, for questions to the kernel while TLS owns the stream.
#[derive(Debug)]
pub(crate) struct Probe(OwnedFd);

impl Probe {
    /// A probe of `stream`.
    pub fn new(stream: &TcpStream) -> io::Result<Probe> {
        Ok(Probe(stream.as_fd().try_clone_to_owned()?))
    }

    /// What the kernel knows.
    pub fn info(&self) -> Option<Info> {
        tcp_info(&self.0)
    }

    fn choose(&self, congestion: &str) {
        if sockopt::tcp_congestion(&self.0).is_ok_and(|name| name != congestion)
            && sockopt::set_tcp_congestion(&self.0, congestion).is_err()
        {
            tracing::debug!("this kernel has no {congestion}: another congestion control stays");
        }
    }

    /// Chooses BBR anew, and holds it to about `rate` bytes a second until [`Probe::renewed`].
    fn renew(&self, rate: u64) {
        self.limit_pacing(rate * RENEWAL_PERCENT / 100);
        self.choose(FOR_FULL);
        self.choose(FOR_LOSS);
    }

    fn renewed(&self) {
        self.limit_pacing(u64::MAX);
    }

    #[allow(unsafe_code)] // No crate offers SO_MAX_PACING_RATE.
    fn limit_pacing(&self, bytes_per_second: u64) {
        let value = bytes_per_second.to_ne_bytes();
        // SAFETY: the descriptor is open, and the kernel reads the value's eight bytes.
        let result = unsafe {
            let length = value.len() as libc::socklen_t;
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MAX_PACING_RATE,
                value.as_ptr().cast(),
                length,
            )
        };
        if result != 0 {
            tracing::debug!("this kernel doesn't limit the pace of a socket");
        }
    }

    fn widen(&self, info: &Info) {
        let _ = socket2::SockRef::from(&self.0).set_tcp_notsent_lowat(MAX_UNSENT_BYTES_FAR);
        if info.round_trip >= FAR_ROUND_TRIP {
            // Not without privilege: the kernel sizes it by itself then, up to `net.ipv4.tcp_wmem`.
            let _ = sockopt::set_socket_send_buffer_size_force(&self.0, SEND_BUFFER_FAR);
        }
    }
}

/// Fits a connection to its path while it sends.
#[derive(Debug)]
pub(crate) struct Tuner {
    probe: Arc<Probe>,
    next: Instant,
    history: History,
    renewal: Renewal,
}

impl Tuner {
    /// One for the connection of `probe`.
    pub fn new(probe: Arc<Probe>) -> Tuner {
        let now = Instant::now();
        Tuner { probe, next: now, history: History::new(now), renewal: Renewal::Idle }
    }

    /// Something was written. Looks at the path if it's time to.
    pub fn wrote(&mut self) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + TUNE_EVERY;
        let Some(info) = self.probe.info() else { return };
        let (was, is) = (self.history.path, self.history.look(now, &info));
        if was == is {
            match self.renewal.look(now, is, &info) {
                Some(Renew::Begin) => match bbr_rate(&self.probe.0) {
                    Some(rate) => self.probe.renew(rate),
                    None => self.renewal = Renewal::Idle,
                },
                Some(Renew::End) => self.probe.renewed(),
                None => {}
            }
            return;
        }
        match is {
            Path::Short => {}
            Path::Lossy => {
                self.probe.widen(&info);
                self.probe.choose(FOR_LOSS);
            }
            Path::Full => self.probe.choose(FOR_FULL),
        }
    }
}

/// What kind of path it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// Short, and nothing is lost: the kernel's defaults do.
    Short,
    /// Long or lossy, as far as is known.
    Lossy,
    /// Long, and nothing is lost.
    Full,
}

/// When BBR is chosen anew. Pure.
#[derive(Debug)]
enum Renewal {
    /// Not to be, as long as BBR isn't what serves, or isn't up to speed.
    Idle,
    /// At this time.
    At(Instant),
    /// It was; its pace is free again from then on.
    Until(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renew {
    Begin,
    End,
}

impl Renewal {
    fn look(&mut self, now: Instant, path: Path, info: &Info) -> Option<Renew> {
        match *self {
            Renewal::Idle if path == Path::Lossy && info.round_trip >= FAR_ROUND_TRIP => {
                *self = Renewal::At(now + RENEW_EVERY);
                None
            }
            Renewal::At(time) if time <= now => {
                // With a long queue it shall pause, and see how short the round trip is without.
                let may = path == Path::Lossy && info.smoothed < info.round_trip * 3 / 2;
                *self = if may { Renewal::Until(now + info.smoothed * RENEWAL_ROUND_TRIPS) } else { Renewal::Idle };
                may.then_some(Renew::Begin)
            }
            Renewal::Until(time) if time <= now => {
                *self = Renewal::At(now + RENEW_EVERY.saturating_sub(info.smoothed * RENEWAL_ROUND_TRIPS));
                Some(Renew::End)
            }
            _ => None,
        }
    }
}

/// What a path has done of late. Pure.
#[derive(Debug)]
struct History {
    path: Path,
    since: Instant,
    segments_out: u64,
    segments_again: u64,
}

impl History {
    fn new(now: Instant) -> History {
        History { path: Path::Short, since: now, segments_out: 0, segments_again: 0 }
    }

    fn look(&mut self, now: Instant, info: &Info) -> Path {
        let late = Info {
            segments_out: info.segments_out.saturating_sub(self.segments_out),
            segments_again: info.segments_again.saturating_sub(self.segments_again),
            ..*info
        };
        let begin =
            |path| History { path, since: now, segments_out: info.segments_out, segments_again: info.segments_again };
        let is_known = late.segments_out >= TELLING_PACKETS;
        let is_steady = now.saturating_duration_since(self.since) >= STEADY;
        *self = match self.path {
            Path::Short if info.round_trip >= LONG_ROUND_TRIP || info.is_lossy() => begin(Path::Lossy),
            Path::Lossy if is_known && is_steady && info.round_trip >= FAR_ROUND_TRIP && !late.is_lossy() => {
                begin(Path::Full)
            }
            Path::Full if is_known && late.is_lossy() => begin(Path::Lossy),
            path if is_known && is_steady => begin(path),
            _ => return self.path,
        };
        self.path
    }
}

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Info {
    /// The shortest.
    pub round_trip: Duration,
    /// As of late.
    pub smoothed: Duration,
    pub segments_out: u64,
    pub segments_again: u64,
    /// Time spent sending.
    pub busy: Duration,
    /// Time of that spent waiting for the receiver's window or for room in the send buffer.
    pub limited: Duration,
}

impl Info {
    /// Whether packets get lost.
    pub fn is_lossy(&self) -> bool {
        self.segments_again > 5 && self.segments_again * LOSSY > self.segments_out
    }

    /// Whether a window, not the link, is what limits it.
    pub fn is_window_limited(&self) -> bool {
        self.limited * 5 > self.busy
    }
}

fn tcp_info(socket: &OwnedFd) -> Option<Info> {
    let bytes: [u8; 256] = tcp_option(socket, libc::TCP_INFO)?;
    // Offsets of struct tcp_info, which only ever grows; what an old kernel lacks stays 0.
    let small = |at: usize| u32_at(&bytes, at);
    let large = |at: usize| bytes[at..at + 8].first_chunk().map_or(0, |eight| u64::from_ne_bytes(*eight));
    let smoothed = Duration::from_micros(u64::from(small(68)));
    Some(Info {
        // The shortest there was: the others have waited in queues, which more connections make no shorter.
        round_trip: if small(148) > 0 { Duration::from_micros(u64::from(small(148))) } else { smoothed },
        smoothed,
        segments_again: u64::from(small(100)),
        segments_out: u64::from(small(136)),
        busy: Duration::from_micros(large(168)),
        limited: Duration::from_micros(large(176).saturating_add(large(184))),
    })
}

/// What BBR takes for the bottleneck's rate, in bytes per second.
fn bbr_rate(socket: &OwnedFd) -> Option<u64> {
    if sockopt::tcp_congestion(socket).ok()? != FOR_LOSS {
        return None;
    }
    // Of struct tcp_bbr_info.
    let bytes: [u8; 20] = tcp_option(socket, TCP_CC_INFO)?;
    Some(u64::from(u32_at(&bytes, 0)) | u64::from(u32_at(&bytes, 4)) << 32).filter(|rate| *rate > 0)
}

/// The kernel's `TCP_CC_INFO`.
const TCP_CC_INFO: libc::c_int = 26;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].first_chunk().map_or(0, |four| u32::from_ne_bytes(*four))
}

/// What the kernel says of `socket`, with zeros behind it.
#[allow(unsafe_code)] // No crate offers TCP_INFO with these fields, nor TCP_CC_INFO.
fn tcp_option<const N: usize>(socket: &OwnedFd, option: libc::c_int) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    let mut length = N as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes to the buffer.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, bytes.as_mut_ptr().cast(), &mut length)
    };
    (result == 0).then_some(bytes)
}

/// Whether this host has more than one network that isn't itself, so that MPTCP may have several paths.
pub(crate) fn has_several_networks() -> bool {
    let Ok(routes) = std::fs::read_to_string("/proc/thread-self/net/route") else { return false };
    let mut interfaces: Vec<&str> = routes.lines().skip(1).filter_map(|line| line.split('\t').next()).collect();
    interfaces.sort_unstable();
    interfaces.dedup();
    interfaces.retain(|name| *name != "lo");
    interfaces.len() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_takes_both_kinds_and_the_kernel_tells_of_them() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        for kind in [Kind::Tcp, Kind::Mptcp] {
            let (near, far) = tokio::join!(connect(address, None, kind), listener.accept());
            let (near, (far, _)) = (near.unwrap(), far.unwrap());
            for stream in [&near, &far] {
                set_up(stream, Duration::from_secs(10)).unwrap();
                let probe = Arc::new(Probe::new(stream).unwrap());
                Tuner::new(probe.clone()).wrote();
                probe.choose("no such thing");
                probe.choose(FOR_LOSS);
                assert!(bbr_rate(&probe.0).is_none_or(|rate| rate > 0));
                probe.renew(1 << 20);
                probe.renewed();
                probe.choose(FOR_FULL);
                assert_eq!(bbr_rate(&probe.0), None);
                assert!(probe.info().unwrap().round_trip < Duration::from_secs(1));
            }
        }
        let from = IpAddr::from([127, 0, 0, 2]);
        let (near, _) = tokio::join!(connect(address, Some(from), Kind::Tcp), listener.accept());
        assert_eq!(near.unwrap().local_addr().unwrap().ip(), from);
    }

    #[test]
    fn bbr_is_chosen_anew_before_it_pauses_and_only_where_the_queue_is_short() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let info = Info { round_trip: ms(200), smoothed: ms(220), ..Info::default() };
        // When it begins and ends, in quarters of a second.
        let play = |path, info: Info| {
            let mut renewal = Renewal::Idle;
            let looks = (0..120).map(|at| (at, renewal.look(start + TUNE_EVERY * at, path, &info)));
            looks.filter_map(|(at, renew)| Some((at, renew?))).collect::<Vec<_>>()
        };
        let seen = play(Path::Lossy, info);
        let begins: Vec<u32> = seen.iter().filter(|(_, renew)| *renew == Renew::Begin).map(|(at, _)| *at).collect();
        assert!(begins.windows(2).all(|two| (two[1] - two[0]) * TUNE_EVERY < Duration::from_secs(10)), "{begins:?}");
        assert!(begins.len() >= 3 && seen.len() >= 2 * begins.len() - 1, "{seen:?}");
        let of_six = (info.smoothed * RENEWAL_ROUND_TRIPS).as_millis().div_ceil(TUNE_EVERY.as_millis()) as u32;
        assert_eq!(seen[1], (begins[0] + of_six, Renew::End));
        assert_eq!(play(Path::Full, info), []);
        assert_eq!(play(Path::Lossy, Info { round_trip: ms(20), ..info }), []);
        assert_eq!(play(Path::Lossy, Info { smoothed: ms(301), ..info }), [], "a long queue");
    }

    #[test]
    fn a_path_is_what_it_has_been_of_late() {
        let start = Instant::now();
        let mut history = History::new(start);
        let mut info = Info { round_trip: Duration::from_millis(100), ..Info::default() };
        // A second each, of so many packets.
        let mut second = 0;
        let mut look = |out: u64, again: u64| {
            second += 1;
            info.segments_out += out;
            info.segments_again += again;
            history.look(start + Duration::from_secs(second), &info)
        };
        assert_eq!(look(10, 0), Path::Lossy, "until it's known better");
        assert_eq!((look(50_000, 0), look(50_000, 3), look(50_000, 0)), (Path::Lossy, Path::Lossy, Path::Lossy));
        assert_eq!(look(50_000, 0), Path::Full);
        assert_eq!(look(1000, 30), Path::Full, "too few to tell");
        assert_eq!(look(4000, 30), Path::Lossy);
        assert_eq!((1..=20).map(|_| look(4000, 40)).find(|path| *path == Path::Full), None);
        let steady = (1..=20).position(|_| look(4000, 0) == Path::Full).unwrap();
        assert!((3..=8).contains(&steady), "{steady}");

        let near = Info { round_trip: Duration::from_micros(300), segments_out: 100_000, ..Info::default() };
        let mut history = History::new(start);
        assert_eq!(history.look(start + STEADY * 2, &near), Path::Short);
        assert_eq!(history.look(start + STEADY * 3, &Info { segments_again: 1000, ..near }), Path::Lossy);
    }
}
