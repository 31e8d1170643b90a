//! POSIX access control lists, as the extended attributes `system.posix_acl_access` and `…_default` carry them.
//!
//! Hides the layout of the attribute's value (Linux's `posix_acl_xattr`, version 2). The kernel checks permissions
//! by them; what is here keeps a list and the mode bits in step, as `fs/posix_acl.c` does.

pub use crate::attr::{ACL_ACCESS as ACCESS, ACL_DEFAULT as DEFAULT};
use crate::codec::{Put, Reader};

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// A list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    entries: Vec<Entry>,
}

impl Acl {
    /// Decodes the value of an attribute; none if it isn't a list.
    pub fn decode(value: &[u8]) -> Option<Acl> {
        let mut reader = Reader::new("access control list", value);
        if reader.u32().ok()? != VERSION {
            return None;
        }
        let mut entries = Vec::with_capacity(value.len() / 8);
        while !reader.is_empty() {
            let entry = Entry { tag: reader.u16().ok()?, permissions: reader.u16().ok()?, id: reader.u32().ok()? };
            if entry.permissions > 7 || ![USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER].contains(&entry.tag) {
                return None;
            }
            entries.push(entry);
        }
        let acl = Acl { entries };
        let is_whole = [USER_OBJ, GROUP_OBJ, OTHER].into_iter().all(|tag| acl.get(tag).is_some());
        let needs_mask = acl.entries.iter().any(|entry| matches!(entry.tag, USER | GROUP));
        (is_whole && (!needs_mask || acl.get(MASK).is_some())).then_some(acl)
    }

    /// The attribute's value.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + 8 * self.entries.len());
        out.put_u32(VERSION);
        for entry in &self.entries {
            out.put_u16(entry.tag);
            out.put_u16(entry.permissions);
            out.put_u32(entry.id);
        }
        out
    }

    fn get(&self, tag: u16) -> Option<u16> {
        self.entries.iter().find(|entry| entry.tag == tag).map(|entry| entry.permissions)
    }

    fn set(&mut self, tag: u16, permissions: u16) {
        self.entries.iter_mut().filter(|entry| entry.tag == tag).for_each(|entry| entry.permissions = permissions);
    }

    /// The entry that the group bits of the mode stand for.
    fn group_tag(&self) -> u16 {
        if self.get(MASK).is_some() { MASK } else { GROUP_OBJ }
    }

    /// Whether the mode bits say all that the list says.
    pub fn is_minimal(&self) -> bool {
        !self.entries.iter().any(|entry| matches!(entry.tag, USER | GROUP | MASK))
    }

    /// The nine permission bits that go with the list.
    pub fn permissions(&self) -> u16 {
        let get = |tag| self.get(tag).unwrap_or(0);
        get(USER_OBJ) << 6 | get(self.group_tag()) << 3 | get(OTHER)
    }

    /// What `chmod` does to the list.
    pub fn chmod(&mut self, permissions: u16) {
        self.set(USER_OBJ, permissions >> 6 & 7);
        self.set(self.group_tag(), permissions >> 3 & 7);
        self.set(OTHER, permissions & 7);
    }

    /// Makes of a folder's default list the list of a new entry that is created with `permissions`, and returns the
    /// permission bits that the entry gets.
    pub fn inherit(&mut self, permissions: u16) -> u16 {
        let wanted = permissions & 0o777;
        let granted = wanted & self.permissions();
        self.chmod(granted);
        permissions & !0o777 | granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Acl {
        Acl {
            entries: entries
                .iter()
                .map(|(tag, permissions, id)| Entry { tag: *tag, permissions: *permissions, id: *id })
                .collect(),
        }
    }

    #[test]
    fn inheriting_masks_by_the_mode() {
        let mut list = acl(&[(1, 7, 0), (2, 6, 1000), (4, 5, 0), (0x10, 7, 0), (0x20, 4, 0)]);
        assert_eq!(list.inherit(0o2660), 0o2660);
        assert_eq!(list.permissions(), 0o660);
        assert_eq!(list.get(GROUP_OBJ), Some(5));
        assert!(!list.is_minimal());
        assert_eq!(Acl::decode(&list.encode()), Some(list));
    }

    #[test]
    fn a_list_without_its_parts_is_refused() {
        assert_eq!(Acl::decode(&acl(&[(1, 7, 0), (4, 5, 0)]).encode()), None);
        assert_eq!(Acl::decode(&acl(&[(1, 7, 0), (2, 7, 5), (4, 5, 0), (0x20, 0, 0)]).encode()), None);
        assert_eq!(Acl::decode(b"\x02\0\0\0\x01"), None);
        assert!(
            Acl::decode(&acl(&[(1, 7, 0), (4, 5, 0), (0x20, 0, 0)]).encode()).is_some_and(|list| list.is_minimal())
        );
    }
}
