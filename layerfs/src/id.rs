//! The identifiers: one type per kind of id, validated where it is made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// BLAKE3-256 of a chunk's plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// The id of `plain`.
    pub fn of(plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(plain).as_bytes())
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({})", self.short())
    }
}

impl FromStr for ChunkId {
    type Err = Error;

    fn from_str(text: &str) -> Result<ChunkId, Error> {
        let wrong = || Error::invalid(format!("{text:?} is not a chunk id: 64 hexadecimal digits are expected"));
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut id = [0; 32];
        for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(ChunkId(id))
    }
}

/// The id of a sealed layer: the id of the chunk that holds its manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerId(pub ChunkId);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LayerId {
    type Err = Error;

    fn from_str(text: &str) -> Result<LayerId, Error> {
        Ok(LayerId(text.parse()?))
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_text!(ChunkId);
serde_as_text!(LayerId);
serde_as_text!(LayerName);

/// An inode number: one space for a whole stack. 1 is the root; 0 is never an inode.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ino(pub u64);

impl Ino {
    /// The root folder's number in every stack.
    pub const ROOT: Ino = Ino(1);
    /// The first number that a layer without parent gives to an inode other than its root.
    pub const FIRST: Ino = Ino(2);
}

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of an upper within its store, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UpperId(pub u64);

impl fmt::Display for UpperId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A layer's name: 1 to 200 bytes of letters, digits and `. _ - + : @ /`, in parts between `/` that are not
/// empty and start with a letter, a digit or `_`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerName(String);

impl LayerName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 200;

    /// Checks `text`.
    pub fn new(text: &str) -> Result<LayerName, Error> {
        let part_is_valid = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+:@".contains(&b))
        };
        if text.len() > Self::MAX_BYTES || !text.split('/').all(part_is_valid) {
            return Err(Error::invalid(format!(
                "{text:?} is not a layer name: use up to {} letters, digits and . _ - + : @, in parts separated by /",
                Self::MAX_BYTES
            )));
        }
        Ok(LayerName(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LayerName {
    type Err = Error;

    fn from_str(text: &str) -> Result<LayerName, Error> {
        LayerName::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_validated() {
        for good in ["base", "debian/12:base", "a", "_x", "app@sha256:00ff"] {
            assert!(LayerName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a//b", "-x", "../x", "a/..", "a b", "ä", &"x".repeat(201)] {
            assert!(LayerName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn chunk_id_round_trips_as_text() {
        let id = ChunkId::of(b"abc");
        assert_eq!(id.to_string().parse::<ChunkId>().unwrap(), id);
        assert!("xyz".parse::<ChunkId>().is_err());
        assert!("é".repeat(32).parse::<ChunkId>().is_err());
    }
}
