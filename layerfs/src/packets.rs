//! Messages between processes of this program on one machine, with descriptors along.
//!
//! A message is one packet of JSON on a Unix socket of the kind that keeps packets apart. Hides how descriptors travel, and that
//! signals interrupt.

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

const MAX_BYTES: usize = 64 * 1024;
/// How many descriptors come with a message at most. A mount has up to five: the device, the memory of its ring, two of its hidden
/// mount, and the table of what is open.
const MAX_DESCRIPTORS: usize = 8;

/// Sends `message`, with the descriptors that belong to it.
///
/// # Errors
/// Those of the socket: nobody is there any more.
pub fn send(socket: BorrowedFd<'_>, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let packet = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// The next message; none at the end.
///
/// # Errors
/// Those of the socket; a packet that is no such message.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut packet = vec![0; MAX_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut next = || recvmsg(socket, &mut [IoSliceMut::new(&mut packet)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let got = rustix::io::retry_on_intr(&mut next)?;
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    if got.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&packet[..got.bytes]).map_err(Error::from)?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_apart() {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        send(one.as_fd(), &(1, "first"), &[file.as_fd(), file.as_fd()]).unwrap();
        send(one.as_fd(), &(2, "second"), &[]).unwrap();
        let ((number, word), descriptors) = receive::<(u32, String)>(other.as_fd()).unwrap().unwrap();
        assert_eq!((number, word.as_str(), descriptors.len()), (1, "first", 2));
        let ((number, _), descriptors) = receive::<(u32, String)>(other.as_fd()).unwrap().unwrap();
        assert_eq!((number, descriptors.len()), (2, 0));
        send(one.as_fd(), &"another kind", &[]).unwrap();
        assert!(receive::<(u32, String)>(other.as_fd()).is_err());
        let many = [file.as_fd(); MAX_DESCRIPTORS];
        send(one.as_fd(), &(3, "third"), &many).unwrap();
        assert_eq!(receive::<(u32, String)>(other.as_fd()).unwrap().unwrap().1.len(), MAX_DESCRIPTORS);
        drop(one);
        assert!(receive::<(u32, String)>(other.as_fd()).unwrap().is_none());
    }
}
