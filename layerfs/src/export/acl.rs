//! POSIX ACLs from their extended attribute's binary form to the text that tar programs exchange.
//!
//! Owners stand as numbers, so that the text means the same on every host.

pub use crate::attr::{ACL_ACCESS as ACCESS, ACL_DEFAULT as DEFAULT};
use crate::codec::Reader;
use crate::error::Result;

/// The text of the ACL in `value` ("user::rw-,user:1000:r--,…"). Linux's `posix_acl_xattr.h` defines the value: a
/// version (2) and entries of tag, permissions and id.
pub fn to_text(value: &[u8]) -> Result<String> {
    let mut reader = Reader::new("POSIX ACL", value);
    let version = reader.u32()?;
    if version != 2 {
        return Err(reader.error(format!("version {version}")));
    }
    let mut text = String::new();
    while !reader.is_empty() {
        let (tag, permissions, id) = (reader.u16()?, reader.u16()?, reader.u32()?);
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&match tag {
            0x01 => "user::".to_owned(),
            0x02 => format!("user:{id}:"),
            0x04 => "group::".to_owned(),
            0x08 => format!("group:{id}:"),
            0x10 => "mask::".to_owned(),
            0x20 => "other::".to_owned(),
            other => return Err(reader.error(format!("tag {other:#x}"))),
        });
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if permissions & bit == 0 { '-' } else { letter });
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Put;

    #[test]
    fn an_acl_becomes_text() {
        let mut value = Vec::new();
        value.put_u32(2);
        for (tag, permissions, id) in
            [(1, 6, u32::MAX), (2, 7, 1000), (4, 4, u32::MAX), (8, 5, 50), (0x10, 7, u32::MAX), (0x20, 0, u32::MAX)]
        {
            value.put_u16(tag);
            value.put_u16(permissions);
            value.put_u32(id);
        }
        let text = "user::rw-,user:1000:rwx,group::r--,group:50:r-x,mask::rwx,other::---";
        assert_eq!(to_text(&value).unwrap(), text);
        assert!(to_text(&value[..value.len() - 1]).is_err());
        assert!(to_text(b"\x03\0\0\0").is_err());
    }
}
