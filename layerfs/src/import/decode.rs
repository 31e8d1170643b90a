//! Streams: what compresses them, decoding them on a thread of its own, and looking at their beginning.

use std::io::{self, Cursor, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::error::{Error, Result};

/// Any input.
pub(super) type Input = Box<dyn Read + Send>;

/// How much of a stream is looked at to tell what it is.
pub(super) const PEEK_BYTES: usize = 4096;

/// An xz stream may ask its reader for this much memory at most.
const XZ_MEMORY: u64 = 128 * 1024 * 1024;

/// What a stream is compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
    Xz,
}

impl Compression {
    /// As `start` says; none if it isn't compressed.
    pub fn of(start: &[u8]) -> Result<Option<Compression>> {
        Ok(match start {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => {
                let detail = "unpack it first".to_owned();
                return Err(Error::Platform { what: "the content of a bzip2 archive", detail });
            }
            _ => None,
        })
    }

    /// Decodes `input` on a thread of its own.
    pub fn decode(self, input: Input) -> Result<Input> {
        let failed = |e| Error::io("starting to decompress", e);
        let decoder: Input = match self {
            Compression::Gzip => {
                Box::new(flate2::read::MultiGzDecoder::new(io::BufReader::with_capacity(128 * 1024, input)))
            }
            Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(input).map_err(failed)?),
            Compression::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED);
                let stream = stream.map_err(|e| failed(e.into()))?;
                Box::new(liblzma::read::XzDecoder::new_stream(input, stream))
            }
        };
        Ok(Box::new(Ahead::start(decoder).map_err(|e| Error::io("starting a thread", e))?))
    }
}

/// Looks at the first [`PEEK_BYTES`] of `input`; the returned input starts at its beginning again.
pub(super) fn peek(mut input: Input) -> Result<(Vec<u8>, Input)> {
    let mut start = Vec::with_capacity(PEEK_BYTES);
    (&mut input).take(PEEK_BYTES as u64).read_to_end(&mut start).map_err(super::tar::read_error)?;
    let again = Cursor::new(start.clone()).chain(input);
    Ok((start, Box::new(again)))
}

const AHEAD_BYTES: usize = 256 * 1024;
const AHEAD_BUFFERS: usize = 4;

/// Reads ahead on a thread.
struct Ahead {
    buffers: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Ahead {
    fn start(input: Input) -> io::Result<Ahead> {
        let (give, buffers) = sync_channel(AHEAD_BUFFERS);
        // The thread ends when the reader is dropped or the input ends; nobody waits for it, for the input may
        // be a pipe that says nothing any more.
        std::thread::Builder::new().name("decompress".to_owned()).spawn(move || fill(input, &give))?;
        Ok(Ahead { buffers, current: Vec::new(), at: 0, ended: false })
    }
}

fn fill(mut input: Input, give: &SyncSender<io::Result<Vec<u8>>>) {
    loop {
        let mut buffer = Vec::with_capacity(AHEAD_BYTES);
        let result = (&mut input).take(AHEAD_BYTES as u64).read_to_end(&mut buffer);
        let is_end = buffer.is_empty();
        // What was decoded before the failure goes first.
        if !is_end && give.send(Ok(buffer)).is_err() {
            return;
        }
        match result {
            Err(error) => {
                let _ = give.send(Err(error));
                return;
            }
            Ok(_) if is_end => return,
            Ok(_) => {}
        }
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() && !self.ended {
            match self.buffers.recv() {
                Ok(Ok(next)) => (self.current, self.at) = (next, 0),
                Ok(Err(error)) => {
                    self.ended = true;
                    return Err(error);
                }
                Err(_) => self.ended = true,
            }
        }
        let count = buffer.len().min(self.current.len() - self.at);
        buffer[..count].copy_from_slice(&self.current[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
