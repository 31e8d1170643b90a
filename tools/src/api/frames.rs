//! What goes over the connection that `/v1/guest-exec-stream` has become: frames, either way. docs/API.md, "Commands in guests".
//!
//! Invariant: the client sends no more of stdin than [`Kind::Room`] has made room for, so that the daemon always reads on and notices
//! when the client goes, whatever the command does.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A frame's kind and the length of its bytes (`u32`, little-endian).
const HEADER_BYTES: usize = 5;
/// No frame has more bytes than this.
const MOST: usize = 1 << 20;
/// So many bytes of a stream are put into one frame at most.
pub const PIECE: usize = 64 << 10;
/// So many bytes of stdin the daemon holds at most.
pub const WINDOW: usize = 4 * PIECE;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To the daemon: bytes for the command to read; none are their end.
    Stdin = 0,
    /// What the command wrote.
    Stdout = 1,
    /// What it complained.
    Stderr = 2,
    /// From the daemon: for so many more bytes of stdin (`u32`, little-endian) there is room.
    Room = 3,
    /// From the daemon, the last: an [`crate::api::Event`], `result` or `error`.
    End = 4,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Frame {
    /// As it goes over the connection.
    pub fn encode(kind: Kind, bytes: &[u8]) -> Bytes {
        let mut frame = BytesMut::with_capacity(HEADER_BYTES + bytes.len());
        frame.put_u8(kind as u8);
        frame.put_u32_le(bytes.len() as u32);
        frame.put_slice(bytes);
        frame.freeze()
    }

    /// [`Kind::Room`] for `count` bytes.
    pub fn room(count: usize) -> Bytes {
        Frame::encode(Kind::Room, &(count as u32).to_le_bytes())
    }

    /// For how many bytes there is room, in a frame that says so.
    ///
    /// # Errors
    /// If that is no number.
    pub fn room_for(&self) -> io::Result<usize> {
        let count = self.bytes[..].try_into().map(u32::from_le_bytes);
        count.map(|count| count as usize).map_err(|_| wrong("room that is no number"))
    }

    /// The next one; none at the connection's end.
    ///
    /// # Errors
    /// Those of the connection; what is no frame.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
        let mut header = [0; HEADER_BYTES];
        if from.read(&mut header[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[1..]).await?;
        let [kind, length @ ..] = header;
        let kind = match kind {
            0 => Kind::Stdin,
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            3 => Kind::Room,
            4 => Kind::End,
            _ => return Err(wrong("a frame of an unknown kind")),
        };
        let length = u32::from_le_bytes(length) as usize;
        if length > MOST {
            return Err(wrong("a frame without end"));
        }
        let mut bytes = vec![0; length];
        from.read_exact(&mut bytes).await?;
        Ok(Some(Frame { kind, bytes: bytes.into() }))
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut bytes: &[u8]) -> io::Result<Option<Frame>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Frame::read(&mut bytes))
    }

    #[test]
    fn frames_round_trip_and_are_pinned() {
        let bytes = Frame::encode(Kind::Stderr, b"out");
        assert_eq!(&bytes[..], b"\x02\x03\0\0\0out");
        let frame = read(&bytes).unwrap().unwrap();
        assert_eq!((frame.kind, &frame.bytes[..]), (Kind::Stderr, &b"out"[..]));
        assert_eq!(read(&Frame::room(70_000)).unwrap().unwrap().room_for().unwrap(), 70_000);
        assert!(read(b"").unwrap().is_none());
        for wrong in [&bytes[..7], &bytes[..3], b"\x05\0\0\0\0", b"\x01\xff\xff\xff\xff"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        assert!(frame.room_for().is_err());
    }
}
