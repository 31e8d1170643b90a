//! What the nftables tables of a network are called, found out without `nft`, which not every host has.
//!
//! Hides netlink. Invariant: where the kernel has no nftables there are no tables, and no error.

use std::io;
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// The kinds of messages: a table, and the question for all; they are nftables', the tenth part of netfilter.
const TABLE: u16 = 10 << 8;
const ASK_TABLES: u16 = TABLE | 1;
/// The kernel's own kinds, and what makes a question one for a whole list.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const WHOLE: u16 = 0x301;
/// The property of a table that is its name.
const NAME: u16 = 1;
/// Lengths in bytes: of a message's header, of the family of tables after it, and of a property's header.
const HEADER: usize = 16;
const FAMILY: usize = 4;
const PROPERTY: usize = 4;
/// An answer comes at once, in parts no longer than this, in bytes.
const PATIENCE: Duration = Duration::from_secs(5);
const PART_BYTES: usize = 64 << 10;

/// What the tables in this thread's network are called.
///
/// # Errors
/// If the kernel can't be asked.
pub(super) fn table_names() -> io::Result<Vec<String>> {
    let asked = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER));
    let socket = match asked {
        Err(Errno::PROTONOSUPPORT) => return Ok(Vec::new()),
        socket => socket?,
    };
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    let length = (HEADER + FAMILY) as u32;
    let mut question = length.to_ne_bytes().to_vec();
    question.extend([ASK_TABLES, WHOLE].map(u16::to_ne_bytes).concat());
    question.resize(length as usize, 0);
    send(&socket, &question, SendFlags::empty())?;
    let (mut names, mut part) = (Vec::new(), vec![0; PART_BYTES]);
    loop {
        // A signal to this process is no answer.
        let (length, _) = retry_on_intr(|| recv(&socket, &mut part[..], RecvFlags::empty()))?;
        if take(&part[..length], &mut names)? {
            return Ok(names);
        }
    }
}

/// Takes the names out of a part of the answer. True if it was the last.
fn take(mut part: &[u8], names: &mut Vec<String>) -> io::Result<bool> {
    while let Some((message, rest)) =
        cut(part, |header| u32::from_ne_bytes([header[0], header[1], header[2], header[3]]), HEADER)
    {
        part = rest;
        let body = &message[HEADER..];
        match u16::from_ne_bytes([message[4], message[5]]) {
            DONE => return Ok(true),
            ERROR => {
                let number = body.first_chunk().map_or(0, |number| i32::from_ne_bytes(*number));
                return match Errno::from_raw_os_error(-number) {
                    // The kernel has no nftables.
                    Errno::INVAL | Errno::OPNOTSUPP => Ok(true),
                    error => Err(error.into()),
                };
            }
            TABLE => names.extend(body.get(FAMILY..).and_then(name)),
            _ => {}
        }
    }
    Ok(false)
}

/// The name among the `properties` of a table.
fn name(mut properties: &[u8]) -> Option<String> {
    while let Some((property, rest)) =
        cut(properties, |header| u16::from_ne_bytes([header[0], header[1]]).into(), PROPERTY)
    {
        properties = rest;
        if u16::from_ne_bytes([property[2], property[3]]) == NAME {
            let text = property[PROPERTY..].split(|byte| *byte == 0).next().unwrap_or_default();
            return Some(String::from_utf8_lossy(text).into_owned());
        }
    }
    None
}

/// Cuts off what comes first, with its header of `least` bytes, by what `length` says of it. The next begins at a multiple of four bytes.
fn cut(bytes: &[u8], length: impl FnOnce(&[u8]) -> u32, least: usize) -> Option<(&[u8], &[u8])> {
    let length = length(bytes.get(..least)?) as usize;
    let first = bytes.get(..length).filter(|first| first.len() >= least)?;
    Some((first, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_cut_short_is_no_answer() {
        let mut table =
            [[28u8, 0, 0, 0, 0, 10, 2, 0].as_slice(), &[0; 12], &[8, 0, 1, 0, b'a', b'b', b'c', 0]].concat();
        if cfg!(target_endian = "big") {
            return;
        }
        let mut names = Vec::new();
        assert!(!take(&table, &mut names).unwrap());
        assert_eq!(names, ["abc"]);
        for length in 0..table.len() {
            let mut none = Vec::new();
            assert!(!take(&table[..length], &mut none).unwrap() && none.is_empty());
        }
        table.extend([16, 0, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(take(&table, &mut Vec::new()).unwrap());
        let fails = |number: i32| {
            let mut text = [&[20u8, 0, 0, 0, 2, 0, 0, 0][..], &[0; 8]].concat();
            text.extend((-number).to_ne_bytes());
            take(&text, &mut Vec::new())
        };
        assert!(fails(libc::EINVAL).unwrap() && fails(libc::EPERM).is_err());
    }
}
