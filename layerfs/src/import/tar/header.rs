//! The 512 bytes in front of each member.

use crate::error::{Error, Result};
use crate::import::path::show;
use crate::import::tar::sparse::Segment;

/// The size of everything in an archive, in bytes.
pub const BLOCK: usize = 512;

/// A decoded header.
#[derive(Debug)]
pub struct Header {
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub mtime: i64,
    pub kind: u8,
    /// As Linux's `dev_t`.
    pub device: u64,
    /// Of an old GNU sparse file.
    pub sparse: Vec<Segment>,
    pub is_extended: bool,
    pub real_size: u64,
}

fn damaged(detail: impl Into<String>) -> Error {
    Error::corrupt("archive", detail)
}

/// Whether `block` is a header with the right checksum.
pub fn looks_like_header(block: &[u8]) -> bool {
    block.first_chunk().is_some_and(|block: &[u8; BLOCK]| block[0] != 0 && checksum_is_right(block))
}

fn checksum_is_right(block: &[u8; BLOCK]) -> bool {
    let field = 148..156;
    let value = |(at, byte): (usize, &u8)| if field.contains(&at) { b' ' } else { *byte };
    let unsigned: i64 = block.iter().enumerate().map(value).map(i64::from).sum();
    // Some old programs added the bytes as signed ones.
    let signed: i64 = block.iter().enumerate().map(value).map(|byte| i64::from(byte as i8)).sum();
    number(&block[148..156]).is_ok_and(|sum| sum == unsigned || sum == signed)
}

impl Header {
    pub fn parse(block: &[u8; BLOCK]) -> Result<Header> {
        if !checksum_is_right(block) {
            return Err(damaged("a header's checksum is wrong"));
        }
        let magic = &block[257..265];
        let is_gnu = magic == b"ustar  \0";
        let mut name = text(&block[..100]);
        if magic.starts_with(b"ustar\0") {
            let prefix = text(&block[345..500]);
            if !prefix.is_empty() {
                name = [prefix.as_slice(), b"/", &name].concat();
            }
        }
        let kind = block[156];
        let (major, minor) = match kind {
            b'3' | b'4' => (id(&block[329..337])?, id(&block[337..345])?),
            _ => (0, 0),
        };
        let (mut sparse, mut is_extended, mut real_size) = (Vec::new(), false, 0);
        if kind == b'S' {
            if !is_gnu {
                // Others have their map elsewhere: read as GNU's, it would make a file of nothing.
                let detail = format!("member {} of type \"S\" that is not GNU tar's", show(&name));
                return Err(Error::Unsupported { what: "archive", detail });
            }
            sparse = segments(&block[386..482])?;
            is_extended = block[482] != 0;
            real_size = size(&block[483..495])?;
        }
        Ok(Header {
            name,
            link: text(&block[157..257]),
            mode: (number(&block[100..108])? & 0o7777) as u32,
            uid: id(&block[108..116])?,
            gid: id(&block[116..124])?,
            size: size(&block[124..136])?,
            mtime: number(&block[136..148])?,
            kind,
            device: rustix::fs::makedev(major, minor),
            sparse,
            is_extended,
            real_size,
        })
    }
}

/// A further block of an old GNU sparse map, and whether another one follows.
pub fn sparse_block(block: &[u8; BLOCK]) -> Result<(Vec<Segment>, bool)> {
    Ok((segments(&block[..504])?, block[504] != 0))
}

fn segments(fields: &[u8]) -> Result<Vec<Segment>> {
    let used = fields.chunks_exact(24).take_while(|pair| pair[0] != 0);
    used.map(|pair| Ok(Segment { offset: size(&pair[..12])?, bytes: size(&pair[12..])? })).collect()
}

fn text(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

fn size(field: &[u8]) -> Result<u64> {
    u64::try_from(number(field)?).map_err(|_| damaged("a header has a negative size"))
}

fn id(field: &[u8]) -> Result<u32> {
    u32::try_from(number(field)?).map_err(|_| damaged("a header's owner or device number is out of range"))
}

/// A number in octal digits, or in base 256 if its first bit is set.
fn number(field: &[u8]) -> Result<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 && !negative { byte & 0x7f } else { *byte };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| damaged("a header's number is out of range"));
    }
    let mut value: i64 = 0;
    let digits = field.iter().skip_while(|byte| **byte == b' ').take_while(|byte| **byte != b' ' && **byte != 0);
    for digit in digits {
        let digit = match digit {
            b'0'..=b'7' => i64::from(digit - b'0'),
            _ => return Err(damaged("a header's number is no number")),
        };
        value = value
            .checked_mul(8)
            .and_then(|v| v.checked_add(digit))
            .ok_or_else(|| damaged("a header's number is out of range"))?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_notations() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"  644 \0\0").unwrap(), 0o644);
        assert_eq!(number(&[0; 8]).unwrap(), 0);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 2]).unwrap(), 258);
        assert_eq!(number(&[0xff; 12]).unwrap(), -1);
        assert!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(number(b"12x\0").is_err());
    }
}
