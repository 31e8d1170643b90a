//! Whose a guest is: the handover of one guest between two hosts, as two state machines that do no I/O.
//!
//! ```text
//! source                                              destination
//!   |  Prepare ─────────────────────────────────────────> |  what stands in the way? journal: arriving
//!   | <──────────────────────────────────────── Prepared  |
//!   |        (layers ahead, rounds: ordinary pushes)      |
//!   |  journal: stopping                                  |
//!   |  dump, seal, push                                   |
//!   |  Stage ───────────────────────────────────────────> |  layers there, mounted, readable; journal: staged
//!   | <──────────────────────────────────── Fate(staged)  |
//!   |  journal: released   ◀── THE COMMIT                 |
//!   |  Commit ──────────────────────────────────────────> |  journal: committed; restore; journal: restored
//!   | <────────────────────────────────── Fate(restored)  |
//!   |  journal: gone; discard the frozen copy             |
//! ```
//!
//! The right to run a guest is passed on by durable writes only. The source passes it on when it journals *released*;
//! the destination takes it up when it journals *committed*, and gives it back, if it cannot restore, by journaling
//! *refused*, after which it never runs what this move brought. The source keeps its frozen copy until it knows that
//! the guest runs at the other side. So every answer to "what became of it" follows from a row that is on disk, and a
//! lost answer is asked for again.
//!
//! Invariants: before *released* every failure ends with the guest running at the source, unless nothing is left of it or an
//! operator gives up what can't go on; after it the source does nothing but ask, until it hears *restored* or *refused*; a
//! destination that has staged and hears nothing starts nothing, and asks. Repeated and late messages change nothing. No state is restored
//! over a disk that is newer.
//!
//! [`source`] and [`destination`] decide, [`journal`] remembers; [`crate::migrate`] does what they say.

pub mod destination;
pub mod journal;
#[cfg(test)]
mod model;
pub mod source;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::group::Token;

/// A move's number, the same on both sides: 16 random bytes, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MoveId(pub [u8; 16]);

impl MoveId {
    /// A new one.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn random() -> Result<MoveId> {
        Ok(MoveId(Token::random()?.0))
    }
}

impl fmt::Display for MoveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MoveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for MoveId {
    type Err = layerfs::Error;

    fn from_str(text: &str) -> layerfs::Result<MoveId> {
        let invalid = || layerfs::Error::invalid(format!("{text:?} is not a move's number: 32 hexadecimal digits"));
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        let mut id = [0; 16];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| invalid())?;
        }
        Ok(MoveId(id))
    }
}

impl TryFrom<String> for MoveId {
    type Error = layerfs::Error;

    fn try_from(text: String) -> layerfs::Result<MoveId> {
        text.parse()
    }
}

impl From<MoveId> for String {
    fn from(id: MoveId) -> String {
        id.to_string()
    }
}

/// What a side says has become of a move. PROTOCOL.md, "Moving a guest".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// This side knows nothing of it.
    Unknown,
    /// Destination: it expects the guest.
    Arriving,
    /// Destination: it has all that a restore takes, and waits for the word.
    Staged,
    /// Destination: the guest is its own, and doesn't run yet.
    Committed,
    /// Destination: the guest runs there, or did.
    Restored,
    /// Destination: what this move brought will never run there.
    Refused,
    /// Source: it hasn't released the guest yet.
    Pending,
    /// Source: the guest is the destination's.
    Released,
    /// Source: the guest is the source's, and the destination may not run it.
    Aborted,
}

impl Fate {
    /// All of them, in the order of their codes.
    pub const ALL: [Fate; 9] = [
        Fate::Unknown,
        Fate::Arriving,
        Fate::Staged,
        Fate::Committed,
        Fate::Restored,
        Fate::Refused,
        Fate::Pending,
        Fate::Released,
        Fate::Aborted,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_text_and_back() {
        let id = MoveId([0xab; 16]);
        assert_eq!(id.to_string(), "ab".repeat(16));
        assert_eq!("AB".repeat(16).parse::<MoveId>().unwrap(), id);
        assert!("ab".parse::<MoveId>().is_err() && "g".repeat(32).parse::<MoveId>().is_err());
        assert!("é".repeat(16).parse::<MoveId>().is_err());
    }
}
