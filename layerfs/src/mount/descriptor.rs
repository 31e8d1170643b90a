//! Taking over a FUSE descriptor whose daemon died.
//!
//! The kernel says hello (INIT) once, to the first daemon; the library wants to hear it. So it gets one end of a socket
//! pair, hears our INIT there, and then its descriptor is replaced by the real one. The kernel is told to send again what it
//! sent to the old daemon and had no answer to (RESEND, since Linux 6.9); such requests have a bit set in their number.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// Set in the number of a request that is sent again.
const SENT_AGAIN: u64 = 1 << 63;

const INIT: u32 = 26;
const MAJOR: u32 = 7;
/// The version of the kernel's interface whose INIT is imitated. Only its layout matters.
const MINOR: u32 = 40;
const INIT_BYTES: u32 = 40 + 64;
const MAX_READ_AHEAD: u32 = 1 << 20;
const NOTIFY_RESEND: i32 = 7;

/// The number of a request, if it is sent for the second time: what it had the first time.
pub(super) fn sent_again(request: u64) -> Option<u64> {
    (request & SENT_AGAIN != 0).then_some(request & !SENT_AGAIN)
}

/// `request`'s number, as if it were sent for the second time.
pub(super) fn again(request: u64) -> u64 {
    request | SENT_AGAIN
}

/// The end of a socket pair on which the library finds INIT, and the other one, which has to live until
/// [`replace`].
pub(super) fn greeting() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (library, kernel) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let header = [u64::from(INIT_BYTES) | u64::from(INIT) << 32, 1, 0, 0, 0];
    let all_features = [u32::MAX, u32::MAX];
    let mut request = Vec::with_capacity(INIT_BYTES as usize);
    header.iter().for_each(|word| request.extend_from_slice(&word.to_ne_bytes()));
    let body = [MAJOR, MINOR, MAX_READ_AHEAD, all_features[0], all_features[1]];
    body.iter().for_each(|word| request.extend_from_slice(&word.to_ne_bytes()));
    request.resize(INIT_BYTES as usize, 0);
    let mut socket = std::fs::File::from(kernel);
    socket.write_all(&request)?;
    Ok((library, socket.into()))
}

/// Makes the descriptor number of `session`, on which the library said hello, refer to `device`, and has the kernel send again what
/// wasn't answered.
pub(super) fn replace(session: BorrowedFd<'_>, greeted: OwnedFd, device: &OwnedFd) -> std::io::Result<()> {
    let mut answer = [0; 4096];
    if rustix::io::read(&greeted, &mut answer)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    drop(greeted);
    put_over(session, device)?;
    resend(device)
}

/// Makes the descriptor number of `session` refer to what was hung up, if its connection has ended. The library takes a connection that has
/// ended for one that is mounted (it looks for POLLERR), and would unmount what lies on the folder now, whosever it is.
pub(super) fn hang_up(session: BorrowedFd<'_>) -> std::io::Result<()> {
    if has_ended(session)? {
        let (read, write) = std::io::pipe()?;
        drop(write);
        put_over(session, &read.into())?;
    }
    Ok(())
}

/// Whether the connection of `device` has ended.
pub(super) fn has_ended(device: BorrowedFd<'_>) -> std::io::Result<bool> {
    let mut polled = [PollFd::new(&device, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled[0].revents().contains(PollFlags::ERR))
}

fn put_over(session: BorrowedFd<'_>, other: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: both descriptors are open and owned: `session` stays open, as its owner thinks, and refers to another file.
    #[allow(unsafe_code)]
    let result = unsafe { libc::dup3(other.as_raw_fd(), session.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the kernel send again what wasn't answered.
pub(super) fn resend(device: &OwnedFd) -> std::io::Result<()> {
    let notification = [16u32.to_ne_bytes(), NOTIFY_RESEND.to_ne_bytes(), [0; 4], [0; 4]].concat();
    match rustix::io::write(device.as_fd(), &notification) {
        Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
