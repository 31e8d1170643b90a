//! Where the data of a sparse file lies.

use crate::error::{Error, Result};

/// A run of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A sparse file's data; holes are between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseMap {
    /// The file's length in bytes.
    pub size: u64,
    /// In order.
    pub segments: Vec<Segment>,
}

impl SparseMap {
    /// Fails unless the segments are in order, within the file, and as long together as the data in the archive, of
    /// which `stored_bytes` are left behind the map.
    pub fn check(&self, stored_bytes: u64) -> Result<()> {
        let wrong = |detail: &str| Error::corrupt("archive", format!("a sparse file's map is impossible: {detail}"));
        if self.size > i64::MAX as u64 {
            return Err(wrong("the file is too large"));
        }
        let (mut end, mut sum) = (0u64, 0u64);
        for segment in &self.segments {
            if segment.offset < end {
                return Err(wrong("segments overlap"));
            }
            end = segment.offset.checked_add(segment.bytes).ok_or_else(|| wrong("a segment is too long"))?;
            sum += segment.bytes;
        }
        if end > self.size {
            return Err(wrong("there is more data than fits"));
        }
        if sum != stored_bytes {
            return Err(wrong(&format!("it has {sum} bytes of data, the archive {stored_bytes}")));
        }
        Ok(())
    }
}
