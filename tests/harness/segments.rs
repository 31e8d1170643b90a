//! The segments inside a large packet, as TUN hands it over: which of them go on, in as few packets as possible.
//!
//! A packet is a virtio-net header of 10 bytes, an IPv4 header, a TCP header and the bytes of one or more segments of
//! equal size. Invariant: what comes out is what a network card would have sent, without the lost frames.

const VNET: usize = 10;
const GSO_TCPV4: u8 = 1;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Where things are in a packet of several segments.
struct Large {
    ip: usize,
    tcp: usize,
    payload: usize,
    segment: usize,
}

impl Large {
    /// `None` for a packet that is one frame.
    fn parse(packet: &[u8]) -> Option<Large> {
        let gso_type = packet.get(1)? & 0x7f;
        let segment = usize::from(u16::from_ne_bytes([*packet.get(4)?, *packet.get(5)?]));
        if gso_type != GSO_TCPV4 || segment == 0 || packet.get(VNET)? >> 4 != 4 {
            return None;
        }
        let tcp = VNET + usize::from(packet[VNET] & 15) * 4;
        let payload = tcp + usize::from(packet.get(tcp + 12)? >> 4) * 4;
        (packet.len() > payload).then_some(Large { ip: VNET, tcp, payload, segment })
    }
}

/// Asks `is_lost` for each segment of `packet`, in order, and gives the others to `out`.
pub fn survivors(packet: &[u8], is_lost: &mut dyn FnMut() -> bool, out: &mut dyn FnMut(&[u8])) {
    let Some(large) = Large::parse(packet) else {
        if !is_lost() {
            out(packet);
        }
        return;
    };
    let count = (packet.len() - large.payload).div_ceil(large.segment);
    let kept: Vec<bool> = (0..count).map(|_| !is_lost()).collect();
    if kept.iter().all(|kept| *kept) {
        return out(packet);
    }
    let mut from = 0;
    for run in kept.chunk_by(|one, other| one == other) {
        if run[0] {
            out(&piece(packet, &large, from, from + run.len(), count));
        }
        from += run.len();
    }
}

/// Segments `from` to `to` of `count` as a packet of their own.
fn piece(packet: &[u8], large: &Large, from: usize, to: usize, count: usize) -> Vec<u8> {
    let Large { ip, tcp, payload, segment } = *large;
    let end = (payload + to * segment).min(packet.len());
    let mut out = packet[..payload].to_vec();
    out.extend_from_slice(&packet[payload + from * segment..end]);
    if to - from == 1 {
        out[1] = 0;
        out[4..6].fill(0);
    }
    let ip_bytes = (out.len() - ip) as u16;
    out[ip + 2..ip + 4].copy_from_slice(&ip_bytes.to_be_bytes());
    let number = u16::from_be_bytes([out[ip + 4], out[ip + 5]]).wrapping_add(from as u16);
    out[ip + 4..ip + 6].copy_from_slice(&number.to_be_bytes());
    out[ip + 10..ip + 12].fill(0);
    let sum = !folded(&out[ip..tcp], 0);
    out[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
    let sequence: [u8; 4] = [out[tcp + 4], out[tcp + 5], out[tcp + 6], out[tcp + 7]];
    let sequence = u32::from_be_bytes(sequence).wrapping_add((from * segment) as u32);
    out[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
    if to < count {
        out[tcp + 13] &= !FIN_PSH;
    }
    if from > 0 {
        out[tcp + 13] &= !CWR;
    }
    // The kernel leaves the sum of the pseudo-header there, for a card to complete.
    let tcp_bytes = (out.len() - tcp) as u32;
    let sum = folded(&out[ip + 12..ip + 20], 6 + tcp_bytes);
    out[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
    out
}

/// The one's complement sum of 16-bit words.
fn folded(bytes: &[u8], first: u32) -> u16 {
    let words = bytes.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], *two.get(1).unwrap_or(&0)])));
    let mut sum = first + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five segments of 100 bytes, the last of 50, from sequence 1,000 on.
    fn sample() -> Vec<u8> {
        let mut packet = vec![1, GSO_TCPV4, 40, 0, 0, 0, 20, 0, 16, 0];
        packet[4..6].copy_from_slice(&100u16.to_ne_bytes());
        packet.extend([0x45, 0, 0x01, 0xea, 0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend([0, 1, 0, 2, 0, 0, 3, 232, 0, 0, 0, 0, 0x50, 0x18 | CWR, 1, 0, 0, 0, 0, 0]);
        packet.extend((0..450).map(|n| (n / 100) as u8));
        packet
    }

    fn fate(mut lost: Vec<bool>) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        survivors(&sample(), &mut || lost.remove(0), &mut |packet| out.push(packet.to_vec()));
        out
    }

    #[test]
    fn only_the_lost_segments_are_missing() {
        assert_eq!(fate(vec![false; 5]), [sample()]);
        assert!(fate(vec![true; 5]).is_empty());
        let out = fate(vec![false, true, false, false, true]);
        assert_eq!(out.len(), 2);
        assert_eq!((out[0].len(), out[1].len()), (50 + 100, 50 + 200));
        assert!(out[0][50..].iter().all(|byte| *byte == 0));
        assert!(out[1][50..150].iter().all(|byte| *byte == 2) && out[1][150..].iter().all(|byte| *byte == 3));
        assert_eq!((out[0][1], out[1][1]), (0, GSO_TCPV4), "one segment is no large packet");
        assert_eq!(u32::from_be_bytes([out[1][34], out[1][35], out[1][36], out[1][37]]), 1200);
        assert_eq!((out[0][43] & FIN_PSH, out[0][43] & CWR, out[1][43] & CWR), (0, CWR, 0));
        for packet in out {
            assert_eq!(folded(&packet[10..30], 0), 0xffff, "the header's sum");
            assert_eq!(usize::from(u16::from_be_bytes([packet[12], packet[13]])), packet.len() - 10);
        }
    }
}
