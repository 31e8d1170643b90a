//! What the kernel keeps of one mount, whatever lies there: the options of mount(8) that no filesystem sees.
//!
//! Invariant: a number in a record means the same for ever (FORMAT.md, "Mounts").

use rustix::mount::MountFlags;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// Options of a mount that the kernel keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

/// By their names: the bit in a record, and the kernel's.
const ALL: [(&str, u16, MountFlags); 7] = [
    ("ro", 1, MountFlags::RDONLY),
    ("nosuid", 2, MountFlags::NOSUID),
    ("nodev", 4, MountFlags::NODEV),
    ("noexec", 8, MountFlags::NOEXEC),
    ("noatime", 16, MountFlags::NOATIME),
    ("nodiratime", 32, MountFlags::NODIRATIME),
    ("relatime", 64, MountFlags::RELATIME),
];

impl Flags {
    /// A mount that may be looked at and not changed, though what is mounted is writable.
    pub const READ_ONLY: Flags = Flags(1);
    /// Programs of other users get no rights of theirs.
    pub const NO_SUID: Flags = Flags(2);
    /// Device nodes can't be opened.
    pub const NO_DEV: Flags = Flags(4);
    /// Programs can't be run.
    pub const NO_EXEC: Flags = Flags(8);
    /// Times of access aren't kept.
    pub const NO_ATIME: Flags = Flags(16);
    /// Times of access are kept now and then, as the kernel does if nothing is said.
    pub const RELATIVE_ATIME: Flags = Flags(64);

    /// The one that mount(8) calls `name`.
    pub fn named(name: &str) -> Option<Flags> {
        ALL.iter().find(|(known, ..)| *known == name).map(|(_, bit, _)| Flags(*bit))
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// Whether all of `other` are among them.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }

    /// Their names.
    pub fn names(self) -> Vec<&'static str> {
        self.each().map(|(name, _)| name).collect()
    }

    fn each(self) -> impl Iterator<Item = (&'static str, MountFlags)> {
        ALL.iter().filter(move |(_, bit, _)| self.0 & bit != 0).map(|(name, _, flag)| (*name, *flag))
    }

    /// Whether there are some that the library, which mounts, doesn't know, or would set for all mounts of the filesystem.
    pub(super) fn is_more_than_at_first(self) -> bool {
        let first =
            Flags::NO_SUID.and(Flags::NO_DEV).and(Flags::NO_EXEC).and(Flags::NO_ATIME).and(Flags::RELATIVE_ATIME);
        self.0 & !first.0 != 0
    }

    pub(super) fn bits(self) -> u16 {
        self.0
    }

    /// # Errors
    /// [`Error::Unsupported`] if there is one that this version doesn't know: it may protect something.
    pub(super) fn from_bits(bits: u16) -> Result<Flags> {
        let known = ALL.iter().fold(0, |all, (_, bit, _)| all | bit);
        match bits & !known {
            0 => Ok(Flags(bits)),
            strange => Err(Error::Unsupported { what: "mount record", detail: format!("options {strange:#x}") }),
        }
    }

    pub(super) fn to_kernel(self) -> MountFlags {
        self.each().fold(MountFlags::empty(), |all, (_, flag)| all | flag)
    }
}

impl Serialize for Flags {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.names().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Flags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Flags, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        names.iter().try_fold(Flags::default(), |all, name| {
            let unknown = || serde::de::Error::custom(format!("{name:?} is no option that the kernel keeps"));
            Ok(all.and(Flags::named(name).ok_or_else(unknown)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_bits_and_the_kernels_are_the_same() {
        let all = Flags::from_bits(0x7f).unwrap();
        assert_eq!(all.names(), ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime"]);
        assert_eq!(all.names().into_iter().filter_map(Flags::named).fold(Flags::default(), Flags::and), all);
        assert_eq!(serde_json::from_str::<Flags>(&serde_json::to_string(&all).unwrap()).unwrap(), all);
        let some = Flags::NO_SUID.and(Flags::READ_ONLY);
        assert_eq!(some.to_kernel(), MountFlags::NOSUID | MountFlags::RDONLY);
        assert!(some.contains(Flags::NO_SUID) && !some.contains(Flags::NO_DEV) && !Flags::NO_EXEC.is_empty());
        assert!(Flags::from_bits(0x80).is_err() && Flags::named("suid").is_none());
        assert!(serde_json::from_str::<Flags>("[\"strange\"]").is_err());
    }
}
