//! Little-endian encoding of everything on disk and on the wire, with bounds checked before use.
//!
//! Invariant: [`Reader`] never reads past its slice and never allocates; a length is compared with what is
//! left before anything is taken.

use crate::error::{Error, Result};
use crate::id::ChunkId;

/// Appends little-endian values to a buffer.
pub trait Put {
    /// One byte.
    fn put_u8(&mut self, value: u8);
    /// Two bytes.
    fn put_u16(&mut self, value: u16);
    /// Four bytes.
    fn put_u32(&mut self, value: u32);
    /// Eight bytes.
    fn put_u64(&mut self, value: u64);
    /// Eight bytes, two's complement.
    fn put_i64(&mut self, value: i64);
    /// 32 bytes.
    fn put_id(&mut self, id: &ChunkId);
    /// A 16-bit length, then the bytes. Panics on more than 65,535 bytes: callers validate first.
    fn put_bytes16(&mut self, bytes: &[u8]);
    /// A 32-bit length, then the bytes. Panics on more than 4 GiB: callers validate first.
    fn put_bytes32(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_i64(&mut self, value: i64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_id(&mut self, id: &ChunkId) {
        self.extend_from_slice(&id.0);
    }
    fn put_bytes16(&mut self, bytes: &[u8]) {
        self.put_u16(u16::try_from(bytes.len()).expect("a 16-bit length"));
        self.extend_from_slice(bytes);
    }
    fn put_bytes32(&mut self, bytes: &[u8]) {
        self.put_u32(u32::try_from(bytes.len()).expect("a 32-bit length"));
        self.extend_from_slice(bytes);
    }
}

/// Takes little-endian values off a slice.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes`; `what` names the structure in errors.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { what, rest: bytes }
    }

    /// The bytes not yet read.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// An error that names the structure.
    pub fn error(&self, detail: impl Into<String>) -> Error {
        Error::corrupt(self.what, detail)
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        if count > self.rest.len() {
            return Err(self.error(format!("{count} bytes expected, {} left", self.rest.len())));
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }
    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// Eight bytes, two's complement.
    pub fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }
    /// 32 bytes.
    pub fn id(&mut self) -> Result<ChunkId> {
        Ok(ChunkId(self.array()?))
    }
    /// A 16-bit length, then the bytes.
    pub fn bytes16(&mut self) -> Result<&'a [u8]> {
        let count = self.u16()?;
        self.take(usize::from(count))
    }
    /// A 32-bit length, then the bytes.
    pub fn bytes32(&mut self) -> Result<&'a [u8]> {
        let count = self.u32()?;
        self.take(count as usize)
    }
    /// Fails unless everything was read.
    pub fn finish(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.error(format!("{} bytes too many", self.rest.len()))) }
    }
}
