//! Whole frames of an interface, past the network stack.
//!
//! Hides packet sockets. Invariant: a socket that was only opened receives nothing.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Ethernet's number of ARP.
pub(super) const ARP: u16 = 0x0806;
/// Ethernet's number of IPv4.
pub(super) const IPV4: u16 = 0x0800;
/// Ethernet's number of IPv6.
pub(super) const IPV6: u16 = 0x86dd;
/// IP's number of TCP.
const TCP: u32 = 6;
/// What the kernel keeps for [`Packets::keep`] at most, its own bookkeeping included.
const KEPT_BYTES: usize = 4 << 20;
/// The largest frame, before it is cut for the wire, with what the kernel says of it.
const FRAME_BYTES: usize = (64 << 10) + 256;
/// Where the kernel says of a frame what is left to do: checksums, cutting.
const TO_DO_BYTES: usize = 10;
/// Two addresses and a number of what follows.
const HEADER_BYTES: usize = 14;

/// A socket for the frames of one interface of this thread's network namespace.
#[derive(Debug)]
pub(super) struct Packets {
    socket: OwnedFd,
    index: u32,
}

impl Packets {
    /// For frames of `interface`.
    pub fn open(interface: &str) -> io::Result<Packets> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0: nothing is received by it.
        // SAFETY: a call without pointers; what it returns is checked.
        #[allow(unsafe_code)]
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and nobody else has it.
        #[allow(unsafe_code)]
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
        Ok(Packets { socket, index })
    }

    /// Sends `frame`, which is of `protocol`.
    pub fn send(&self, protocol: u16, frame: &[u8]) -> io::Result<()> {
        let to = self.address(protocol);
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the kernel reads the frame and the address, which both live here, by their lengths.
        #[allow(unsafe_code)]
        let sent = unsafe {
            libc::sendto(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), length)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// From now on keeps what comes by TCP for `hardware`, whoever is meant to get it; what comes when there is no room any more is lost.
    pub fn keep(&self, hardware: [u8; 6]) -> io::Result<()> {
        let mut program = for_tcp_to(hardware);
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        self.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&self.socket, KEPT_BYTES / 2)?;
        let all = libc::packet_mreq {
            mr_ifindex: self.index as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        self.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &all)?;
        let address = self.address(libc::ETH_P_ALL as u16);
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the kernel reads the address, which lives here, by its length.
        #[allow(unsafe_code)]
        let bound = unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), length) };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// What was kept so far, each frame with what is left to do before it.
    fn kept(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut kept = Vec::new();
        let (mut frame, mut bytes) = (vec![0; FRAME_BYTES], 0);
        while bytes < KEPT_BYTES {
            match rustix::net::recv(&self.socket, &mut frame[..], rustix::net::RecvFlags::TRUNC) {
                Ok((_, length)) if (TO_DO_BYTES + HEADER_BYTES..=FRAME_BYTES).contains(&length) => {
                    bytes += length;
                    kept.push(frame[..length].to_vec());
                }
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(kept)
    }

    /// Sends what was kept out of `interface`; returns how many frames that were.
    pub fn send_kept(&self, interface: &str) -> io::Result<usize> {
        // First all, as more may come meanwhile.
        let kept = self.kept()?;
        let way = Packets::open(interface)?;
        way.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
        for frame in &kept {
            let protocol = &frame[TO_DO_BYTES + HEADER_BYTES - 2..];
            way.send(u16::from_be_bytes([protocol[0], protocol[1]]), frame)?;
        }
        Ok(kept.len())
    }

    fn address(&self, protocol: u16) -> libc::sockaddr_ll {
        // SAFETY: all zeros is a valid address of this kind.
        #[allow(unsafe_code)]
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        (address.sll_protocol, address.sll_ifindex, address.sll_halen) = (protocol.to_be(), self.index as i32, 6);
        address
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        // SAFETY: the kernel reads the value, which lives here, by its length.
        #[allow(unsafe_code)]
        let set = unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A program for the kernel that lets TCP's frames to `hardware` through.
fn for_tcp_to(hardware: [u8; 6]) -> [libc::sock_filter; 13] {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let [a, b, c, d, e, f] = hardware;
    let line = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    [
        line(LOAD_WORD, 0, 0, 0),
        line(IF_EQUAL, u32::from_be_bytes([a, b, c, d]), 0, 10),
        line(LOAD_HALF, 4, 0, 0),
        line(IF_EQUAL, u32::from(u16::from_be_bytes([e, f])), 0, 8),
        line(LOAD_HALF, HEADER_BYTES as u32 - 2, 0, 0),
        line(IF_EQUAL, u32::from(IPV4), 0, 2),
        line(LOAD_BYTE, HEADER_BYTES as u32 + 9, 0, 0),
        line(IF_EQUAL, TCP, 3, 4),
        line(IF_EQUAL, u32::from(IPV6), 0, 3),
        line(LOAD_BYTE, HEADER_BYTES as u32 + 6, 0, 0),
        line(IF_EQUAL, TCP, 0, 1),
        line(RETURN, u32::MAX, 0, 0),
        line(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
impl Packets {
    /// How many frames are kept just now; they are gone then.
    pub fn kept_now(&self) -> usize {
        self.kept().unwrap().len()
    }

    /// Waits until something was kept, but not for ever.
    pub fn wait_kept(&self) -> Vec<Vec<u8>> {
        for _ in 0..500 {
            let kept = self.kept().unwrap();
            if !kept.is_empty() {
                return kept.into_iter().map(|frame| frame[TO_DO_BYTES..].to_vec()).collect();
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Vec::new()
    }
}
