//! POSIX ACLs from the text of tar archives to the value of Linux's extended attribute.

use crate::codec::Put;
use crate::error::{Error, Result};
use crate::import::path::show;

pub(super) use crate::export::acl::{ACCESS, DEFAULT};

/// The value for `text` ("user::rw-,user:1000:r--,…", or the same in lines); none for an empty ACL.
///
/// # Errors
/// [`Error::Invalid`] for what is no ACL, and for owners by a name that this host doesn't know. (GNU tar writes names
/// even when asked for numbers, and looks them up where it extracts.)
pub(super) fn from_text(text: &[u8]) -> Result<Option<Vec<u8>>> {
    let wrong = |entry: &[u8]| {
        Error::invalid(format!("ACL entry {} can't be understood; archive with numeric owners", show(entry)))
    };
    let mut entries = Vec::new();
    for entry in text.split(|byte| *byte == b',' || *byte == b'\n') {
        let entry = entry.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
        if entry.is_empty() {
            continue;
        }
        let text = std::str::from_utf8(entry).map_err(|_| wrong(entry))?;
        let fields: Vec<&str> = text.split(':').collect();
        let (kind, owner, permissions, number) = match fields[..] {
            [kind, owner, permissions] => (kind, owner, permissions, None),
            [kind, owner, permissions, number] => (kind, owner, permissions, Some(number)),
            [kind @ ("mask" | "m" | "other" | "o"), permissions] => (kind, "", permissions, None),
            _ => return Err(wrong(entry)),
        };
        let tag = match (kind, owner.is_empty()) {
            ("user" | "u", true) => 0x01u16,
            ("user" | "u", false) => 0x02,
            ("group" | "g", true) => 0x04,
            ("group" | "g", false) => 0x08,
            ("mask" | "m", true) => 0x10,
            ("other" | "o", true) => 0x20,
            _ => return Err(wrong(entry)),
        };
        let id: u32 = match tag {
            0x02 | 0x08 => match number.unwrap_or(owner).parse() {
                Ok(id) => id,
                Err(_) => known_id(tag == 0x02, owner).ok_or_else(|| wrong(entry))?,
            },
            _ => u32::MAX,
        };
        let mut bits = 0u16;
        for letter in permissions.bytes() {
            bits |= match letter {
                b'r' => 4,
                b'w' => 2,
                b'x' => 1,
                b'-' => 0,
                _ => return Err(wrong(entry)),
            };
        }
        entries.push((tag, id, bits));
    }
    if entries.is_empty() {
        return Ok(None);
    }
    entries.sort_unstable();
    let mut value = Vec::with_capacity(4 + entries.len() * 8);
    value.put_u32(2);
    for (tag, id, bits) in entries {
        value.put_u16(tag);
        value.put_u16(bits);
        value.put_u32(id);
    }
    Ok(Some(value))
}

/// The number of a user or group of this host.
fn known_id(is_user: bool, name: &str) -> Option<u32> {
    let file = if is_user { "/etc/passwd" } else { "/etc/group" };
    let known = std::fs::read(file).ok()?;
    let mut lines = known.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':'));
    lines.find_map(|mut fields| {
        let id = (fields.next()? == name.as_bytes()).then(|| fields.nth(1))??;
        std::str::from_utf8(id).ok()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_the_value_and_back() {
        let text = "user::rw-,user:1000:rwx,group::r--,group:50:r-x,mask::rwx,other::---";
        let value = from_text(text.as_bytes()).unwrap().unwrap();
        assert_eq!(crate::export::acl::to_text(&value).unwrap(), text);
        let named =
            b"user::rw-\nuser:alice:rwx:1000\t#effective:r--\ngroup::r--\ngroup:staff:r-x:50\nmask:rwx\nother:---\n";
        assert_eq!(from_text(named).unwrap().unwrap(), value);
        assert_eq!(from_text(b"user:root:r--").unwrap(), from_text(b"user:0:r--").unwrap());
        assert_eq!(from_text(b"\n").unwrap(), None);
        assert!(
            from_text(b"user:no-such-user:rwx").is_err()
                && from_text(b"nonsense").is_err()
                && from_text(b"user::q").is_err()
        );
    }
}
