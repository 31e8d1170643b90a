//! Extended headers: records of "length key=value" lines.

use crate::attr::{MAX_XATTR_NAME, MAX_XATTR_VALUE, Time, Xattrs};
use crate::error::{Error, Result};
use crate::import::acl;
use crate::import::path::show;
use crate::import::tar::MAX_SEGMENTS;
use crate::import::tar::sparse::Segment;
use crate::inode::xattrs_fit_record;

/// The most extended attributes of a member; Linux's list of names holds 64 KiB.
const MAX_XATTRS: usize = 4096;
/// The most bytes of extended attributes in global headers, as each member that follows gets them: a small archive
/// must not become a layer that is larger by orders of magnitude.
const MAX_GLOBAL_XATTRS_BYTES: usize = 64 * 1024;

/// What an extended header says of a member.
#[derive(Clone, Debug, Default)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Time>,
    pub sparse: PaxSparse,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What it says of a sparse file, in any of GNU tar's three ways.
#[derive(Clone, Debug, Default)]
pub struct PaxSparse {
    pub major: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub segments: Vec<Segment>,
    offset: Option<u64>,
    has_map: bool,
}

impl PaxSparse {
    pub fn is_used(&self) -> bool {
        self.has_map || self.major.is_some()
    }

    fn push(&mut self, offset: u64, bytes: u64) -> Result<()> {
        if self.segments.len() >= MAX_SEGMENTS {
            return Err(Error::invalid("a sparse file's map is larger than an archive needs"));
        }
        self.segments.push(Segment { offset, bytes });
        Ok(())
    }
}

fn damaged(detail: impl Into<String>) -> Error {
    Error::corrupt("archive", detail)
}

impl Pax {
    /// Adds global `records` to these.
    pub fn add_global(&mut self, records: &[u8]) -> Result<()> {
        self.add(records)?;
        let bytes: usize = self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes > MAX_GLOBAL_XATTRS_BYTES {
            let detail =
                format!("{bytes} bytes of extended attributes for every member are more than an archive needs");
            return Err(Error::invalid(detail));
        }
        Ok(())
    }

    pub fn parse(records: &[u8]) -> Result<Pax> {
        let mut pax = Pax::default();
        pax.add(records)?;
        Ok(pax)
    }

    /// Adds `records`; the last of a key holds.
    fn add(&mut self, mut records: &[u8]) -> Result<()> {
        while !records.is_empty() && records[0] != 0 {
            let space = records.iter().take(20).position(|byte| *byte == b' ');
            let space = space.ok_or_else(|| damaged("an extended header's record has no length"))?;
            let length = decimal(&records[..space])? as usize;
            if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
                return Err(damaged("an extended header's record has a wrong length"));
            }
            let record = &records[space + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=');
            let equals = equals.ok_or_else(|| damaged("an extended header's record has no value"))?;
            self.record(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let id = |value: &[u8]| -> Result<u32> {
            u32::try_from(decimal(value)?).map_err(|_| damaged("an owner's number is out of range"))
        };
        // An empty value takes back what a global header said.
        let some = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = some(value),
            b"linkpath" => self.link = some(value),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(id(value)?),
            b"gid" => self.gid = Some(id(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.name" => self.sparse.name = some(value),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = Some(decimal(value)?),
            b"GNU.sparse.numblocks" => self.sparse.has_map = true,
            b"GNU.sparse.offset" => self.sparse.offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or_else(|| damaged("a sparse segment without its place"))?;
                self.sparse.push(offset, decimal(value)?)?;
            }
            b"GNU.sparse.map" => self.map(value)?,
            b"SCHILY.acl.access" => self.acl(acl::ACCESS, value)?,
            b"SCHILY.acl.default" => self.acl(acl::DEFAULT, value)?,
            b"RHT.security.selinux" => {
                let mut label = value.to_vec();
                label.push(0);
                self.xattr(b"security.selinux", label)?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name, value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let value = base64(value).ok_or_else(|| damaged("an extended attribute is not in base 64"))?;
                    let name = percent(name);
                    // The same attribute may stand in the other form too, which needs no decoding.
                    if !self.xattrs.iter().any(|(other, _)| *other == name) {
                        self.xattr(&name, value)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn map(&mut self, value: &[u8]) -> Result<()> {
        self.sparse.has_map = true;
        let mut numbers = value.split(|byte| *byte == b',').filter(|number| !number.is_empty());
        while let Some(offset) = numbers.next() {
            let bytes = numbers.next().ok_or_else(|| damaged("a sparse map is cut off"))?;
            self.sparse.push(decimal(offset)?, decimal(bytes)?)?;
        }
        Ok(())
    }

    fn acl(&mut self, name: &[u8], text: &[u8]) -> Result<()> {
        match acl::from_text(text)? {
            Some(value) => self.xattr(name, value),
            None => Ok(()),
        }
    }

    fn xattr(&mut self, name: &[u8], value: Vec<u8>) -> Result<()> {
        if name.is_empty() || name.len() > MAX_XATTR_NAME || name.contains(&0) || value.len() > MAX_XATTR_VALUE {
            return Err(Error::invalid(format!("extended attribute {} is impossible", show(name))));
        }
        self.xattrs.retain(|(other, _)| other != name);
        if self.xattrs.len() >= MAX_XATTRS {
            return Err(Error::invalid("a member has more extended attributes than a file can have"));
        }
        self.xattrs.push((name.to_vec(), value));
        Ok(())
    }

    /// The extended attributes, sorted.
    pub fn take_xattrs(&mut self) -> Xattrs {
        let mut xattrs = std::mem::take(&mut self.xattrs);
        xattrs.sort_unstable();
        xattrs
    }

    /// The extended attributes of these as global records, with a member's `own` in front, both sorted; none if they
    /// are more than a file can have.
    pub fn xattrs_below(&self, own: Xattrs) -> Option<Xattrs> {
        let mut xattrs = own;
        let own_count = xattrs.len();
        for (name, value) in &self.xattrs {
            if xattrs[..own_count].binary_search_by(|(other, _)| other.cmp(name)).is_err() {
                xattrs.push((name.clone(), value.clone()));
            }
        }
        xattrs.sort_unstable();
        (xattrs.len() <= MAX_XATTRS && xattrs_fit_record(&xattrs)).then_some(xattrs)
    }

    /// These as global records, with a member's own in front; its extended attributes are its own still.
    pub fn overlaid(&self, local: Pax) -> Pax {
        Pax {
            path: local.path.or_else(|| self.path.clone()),
            link: local.link.or_else(|| self.link.clone()),
            size: local.size.or(self.size),
            uid: local.uid.or(self.uid),
            gid: local.gid.or(self.gid),
            mtime: local.mtime.or(self.mtime),
            sparse: local.sparse,
            xattrs: local.xattrs,
        }
    }
}

fn decimal(text: &[u8]) -> Result<u64> {
    let wrong = || damaged(format!("{} in an extended header is not a number", show(&text[..text.len().min(40)])));
    if text.is_empty() || text.len() > 20 || !text.iter().all(u8::is_ascii_digit) {
        return Err(wrong());
    }
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or_else(wrong)
}

/// Seconds with any number of digits after a point, maybe negative.
fn time(text: &[u8]) -> Result<Time> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let whole =
        i64::try_from(decimal(parts.next().unwrap_or_default())?).map_err(|_| damaged("a time is out of range"))?;
    let mut nanos = 0u32;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(damaged("a time is no number"));
    }
    for at in 0..9 {
        nanos = nanos * 10 + fraction.get(at).map_or(0, |digit| u32::from(digit - b'0'));
    }
    Ok(match (negative, nanos) {
        (false, _) => Time { seconds: whole, nanos },
        (true, 0) => Time { seconds: -whole, nanos },
        (true, _) => Time { seconds: -whole - 1, nanos: 1_000_000_000 - nanos },
    })
}

fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.iter().filter(|byte| **byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

fn percent(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_decoded() {
        let pax = Pax::parse(b"12 path=a=b\n20 mtime=-1.5000000\n35 LIBARCHIVE.xattr.user.a%3d=aGk=\n").unwrap();
        assert_eq!(pax.path.unwrap(), b"a=b");
        assert_eq!(pax.mtime.unwrap(), Time { seconds: -2, nanos: 500_000_000 });
        assert_eq!(pax.xattrs, [(b"user.a=".to_vec(), b"hi".to_vec())]);
        for bad in [&b"5 a=b\n"[..], b"99 path=a\n", b"x path=a\n", b"7 pathab\n", b"0 \n", b"13 size=1x23\n"] {
            assert!(Pax::parse(bad).is_err(), "{}", show(bad));
        }
    }

    #[test]
    fn a_members_attributes_are_in_front_of_the_global_ones_and_bounded() {
        let attribute = |name: &str| (format!("user.{name}").into_bytes(), name.as_bytes().to_vec());
        let mut global = Pax::default();
        global.add_global(b"27 SCHILY.xattr.user.b=all\n25 SCHILY.xattr.user.a=a\n").unwrap();
        let own = vec![(b"user.b".to_vec(), b"b".to_vec()), attribute("c")];
        let expected = [attribute("a"), attribute("b"), attribute("c")];
        assert_eq!(global.xattrs_below(own).unwrap(), expected);
        let many = |count: usize| (0..count).map(|n| (format!("user.x{n:04}").into_bytes(), Vec::new())).collect();
        assert_eq!(global.xattrs_below(many(MAX_XATTRS - 2)).unwrap().len(), MAX_XATTRS);
        assert!(global.xattrs_below(many(MAX_XATTRS - 1)).is_none());
        let large = |count: u32| (0..count).map(|n| (format!("user.{n:05}").into_bytes(), vec![1; 65_536])).collect();
        assert!(global.xattrs_below(large(255)).is_some() && global.xattrs_below(large(256)).is_none());
    }

    #[test]
    fn global_attributes_are_bounded_over_all_headers() {
        let record = |name: char| {
            let rest = format!(" SCHILY.xattr.user.{name}={}\n", "x".repeat(30_000));
            format!("{}{rest}", rest.len() + 5).into_bytes()
        };
        let mut global = Pax::default();
        for name in ['a', 'b', 'b'] {
            global.add_global(&record(name)).unwrap();
        }
        assert!(matches!(global.add_global(&record('c')), Err(Error::Invalid(_))));
    }
}
