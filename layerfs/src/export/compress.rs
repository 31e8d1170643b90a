//! Compressed output by several threads, the same bytes however many there are.
//!
//! The plain bytes are cut into blocks of a fixed size, each block is compressed by itself, and the results are
//! joined in order: one gzip member whose deflate blocks end at byte boundaries, or a run of zstd frames or xz
//! streams, which every decoder reads as one. Memory: a few blocks per thread.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded};
use flate2::{Compress, FlushCompress, Status};
use serde::{Deserialize, Serialize};

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// One gzip member.
    Gzip,
    /// zstd frames.
    Zstd,
    /// xz streams.
    Xz,
}

const GZIP_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;
/// Higher presets take up to 100 MB per thread.
const XZ_LEVEL: u32 = 2;

impl Compression {
    fn block_bytes(self) -> usize {
        match self {
            Compression::None => 0,
            Compression::Gzip => 1024 * 1024,
            Compression::Zstd => 2 * 1024 * 1024,
            Compression::Xz => 4 * 1024 * 1024,
        }
    }

    fn compress(self, plain: &[u8]) -> io::Result<Block> {
        let (bytes, crc) = match self {
            Compression::None => (plain.to_vec(), None),
            Compression::Gzip => {
                let mut crc = crc32fast::Hasher::new();
                crc.update(plain);
                (deflate(plain)?, Some(crc))
            }
            Compression::Zstd => (zstd::bulk::compress(plain, ZSTD_LEVEL)?, None),
            Compression::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), XZ_LEVEL);
                encoder.write_all(plain)?;
                (encoder.finish()?, None)
            }
        };
        Ok(Block { bytes, crc, plain_bytes: plain.len() as u64 })
    }
}

/// Deflates `plain` up to a byte boundary, without ending the stream.
fn deflate(plain: &[u8]) -> io::Result<Vec<u8>> {
    let mut deflater = Compress::new(flate2::Compression::new(GZIP_LEVEL), false);
    let mut out = Vec::with_capacity(plain.len() / 2 + 1024);
    loop {
        let rest = &plain[deflater.total_in() as usize..];
        let status = deflater.compress_vec(rest, &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
        let is_done = deflater.total_in() as usize == plain.len() && out.len() < out.capacity();
        match status {
            Status::Ok | Status::BufError if is_done => return Ok(out),
            Status::Ok | Status::BufError => out.reserve(plain.len() / 4 + 1024),
            Status::StreamEnd => return Err(io::Error::other("deflate ended early")),
        }
    }
}

/// A compressed block.
struct Block {
    bytes: Vec<u8>,
    /// The plain bytes' checksum, where the trailer needs it.
    crc: Option<crc32fast::Hasher>,
    plain_bytes: u64,
}

type Job = (Vec<u8>, Sender<io::Result<Block>>);

/// Compresses what is written to it into another writer. [`Compressor::finish`] must be called at the end.
pub struct Compressor<W: Write> {
    inner: W,
    compression: Compression,
    buffer: Vec<u8>,
    jobs: Option<Sender<Job>>,
    pending: VecDeque<Receiver<io::Result<Block>>>,
    threads: Vec<JoinHandle<()>>,
    crc: crc32fast::Hasher,
    plain_bytes: u64,
}

impl<W: Write> Compressor<W> {
    /// Compresses into `inner`.
    pub fn new(mut inner: W, compression: Compression) -> io::Result<Compressor<W>> {
        let mut threads = Vec::new();
        let mut jobs = None;
        if compression != Compression::None {
            let count = thread::available_parallelism().map_or(1, |n| n.get().min(4));
            let (sender, receiver) = bounded::<Job>(count);
            jobs = Some(sender);
            for _ in 0..count {
                let receiver = receiver.clone();
                threads.push(thread::spawn(move || {
                    for (plain, reply) in receiver {
                        let _ = reply.send(compression.compress(&plain));
                    }
                }));
            }
        }
        if compression == Compression::Gzip {
            // No name, no time, written on Unix.
            inner.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3])?;
        }
        let (crc, buffer) = (crc32fast::Hasher::new(), Vec::new());
        Ok(Compressor { inner, compression, buffer, jobs, pending: VecDeque::new(), threads, crc, plain_bytes: 0 })
    }

    fn submit(&mut self) -> io::Result<()> {
        let plain = std::mem::replace(&mut self.buffer, Vec::with_capacity(self.compression.block_bytes()));
        let (reply, result) = bounded(1);
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send((plain, reply)).map_err(|_| gone())?;
        self.pending.push_back(result);
        if self.pending.len() > self.threads.len() { self.collect() } else { Ok(()) }
    }

    fn collect(&mut self) -> io::Result<()> {
        let Some(result) = self.pending.pop_front() else { return Ok(()) };
        let block = result.recv().map_err(|_| gone())??;
        if let Some(crc) = &block.crc {
            self.crc.combine(crc);
        }
        self.plain_bytes += block.plain_bytes;
        self.inner.write_all(&block.bytes)
    }

    /// Writes what is left and the trailer, and gives back the inner writer.
    pub fn finish(mut self) -> io::Result<W> {
        if self.compression != Compression::None && (!self.buffer.is_empty() || self.pending.is_empty()) {
            self.submit()?;
        }
        while !self.pending.is_empty() {
            self.collect()?;
        }
        if self.compression == Compression::Gzip {
            // An empty last block, then checksum and length.
            self.inner.write_all(&[3, 0])?;
            self.inner.write_all(&self.crc.finalize().to_le_bytes())?;
            self.inner.write_all(&(self.plain_bytes as u32).to_le_bytes())?;
        }
        self.jobs = None;
        self.threads.drain(..).try_for_each(|thread| thread.join().map_err(|_| gone()))?;
        self.inner.flush()?;
        Ok(self.inner)
    }
}

fn gone() -> io::Error {
    io::Error::other("a compressing thread ended early")
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.compression == Compression::None {
            return self.inner.write(bytes);
        }
        let taken = bytes.len().min(self.compression.block_bytes() - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == self.compression.block_bytes() {
            self.submit()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn plain() -> Vec<u8> {
        let words = (0..700_000u32).flat_map(|n| format!("{} ", n.wrapping_mul(2_654_435_761) >> 12).into_bytes());
        words.collect()
    }

    fn compressed(plain: &[u8], compression: Compression) -> Vec<u8> {
        let mut compressor = Compressor::new(Vec::new(), compression).unwrap();
        plain.chunks(70_001).for_each(|piece| compressor.write_all(piece).unwrap());
        compressor.finish().unwrap()
    }

    #[test]
    fn every_compression_round_trips_through_a_plain_decoder() {
        for plain in [Vec::new(), b"x".to_vec(), plain()] {
            let gzip = compressed(&plain, Compression::Gzip);
            let mut back = Vec::new();
            // GzDecoder reads one member: there is only one.
            flate2::read::GzDecoder::new(&gzip[..]).read_to_end(&mut back).unwrap();
            assert!(back == plain);
            let zstd = compressed(&plain, Compression::Zstd);
            assert!(zstd::stream::decode_all(&zstd[..]).unwrap() == plain);
            let xz = compressed(&plain, Compression::Xz);
            let mut back = Vec::new();
            liblzma::read::XzDecoder::new_multi_decoder(&xz[..]).read_to_end(&mut back).unwrap();
            assert!(back == plain);
            assert!(compressed(&plain, Compression::None) == plain);
        }
    }
}
