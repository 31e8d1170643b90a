//! Telling the neighbours of a network where a guest is now: gratuitous ARP, or an unsolicited neighbour advertisement.
//!
//! Switches learn from the frames which way the guest's hardware address is, and hosts that know it by another one learn
//! this. Hides the frames. Invariant: a frame goes out through the guest's own interface, in its namespace.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::packets::{ARP, IPV6, Packets};

/// Neighbour advertisement, in ICMPv6.
const ADVERTISEMENT: u8 = 136;
/// What it says replaces what was known.
const OVERRIDE: u8 = 0x20;
const ICMPV6: u8 = 58;

/// The frame that says that `address` is at `hardware`.
fn frame(hardware: [u8; 6], address: IpAddr) -> (u16, Vec<u8>) {
    let mut out = Vec::new();
    match address {
        IpAddr::V4(address) => {
            out.extend([0xff; 6]);
            out.extend(hardware);
            // Ethernet, IPv4, their lengths, a request: everybody reads those, and only some read answers.
            out.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            out.extend(hardware);
            out.extend(address.octets());
            out.extend([0; 6]);
            out.extend(address.octets());
            (ARP, out)
        }
        IpAddr::V6(address) => {
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let mut body = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
            body.extend(address.octets());
            body.extend([2, 1]);
            body.extend(hardware);
            let sum = checksum(address, all, &body);
            body[2..4].copy_from_slice(&sum.to_be_bytes());
            out.extend([0x33, 0x33, 0, 0, 0, 1]);
            out.extend(hardware);
            out.extend(IPV6.to_be_bytes());
            out.extend([0x60, 0, 0, 0, 0, body.len() as u8, ICMPV6, 255]);
            out.extend(address.octets());
            out.extend(all.octets());
            out.extend(body);
            (IPV6, out)
        }
    }
}

fn checksum(from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> u16 {
    let mut bytes = [from.octets(), to.octets()].concat();
    bytes.extend([0, 0, 0, body.len() as u8, 0, 0, 0, ICMPV6]);
    bytes.extend_from_slice(body);
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Says through `interface` in `namespace`, or in this one, that `address` is at `hardware`.
pub(super) fn tell(namespace: Option<&Path>, interface: &str, hardware: [u8; 6], address: IpAddr) -> io::Result<()> {
    let (protocol, frame) = frame(hardware, address);
    let Some(namespace) = namespace.map(File::open).transpose()? else { return send(interface, protocol, &frame) };
    // A thread of its own: it stays in the namespace.
    let told = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                send(interface, protocol, &frame)
            })
            .join()
    });
    told.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

fn send(interface: &str, protocol: u16, frame: &[u8]) -> io::Result<()> {
    Packets::open(interface)?.send(protocol, frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_the_standards_have_them() {
        let hardware = [2, 1, 2, 3, 4, 5];
        let (protocol, arp) = frame(hardware, "10.0.0.2".parse().unwrap());
        let expected = [
            &[0xff; 6][..],
            &hardware,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &hardware,
            &[10, 0, 0, 2],
            &[0; 6],
            &[10, 0, 0, 2],
        ];
        assert_eq!((protocol, arp), (ARP, expected.concat()));
        let (_, advertisement) = frame(hardware, "fe80::1".parse().unwrap());
        assert_eq!(advertisement.len(), 14 + 40 + 32);
        let (from, to) = ("fe80::1".parse().unwrap(), "ff02::1".parse().unwrap());
        // The sum over a message with its own sum is nought.
        assert_eq!(checksum(from, to, &advertisement[54..]), 0);
    }
}
