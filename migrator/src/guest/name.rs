//! What a person calls a guest.
//!
//! Invariant: a name that exists can be a folder's name, a part of a layer's name, and a runtime's container id.

use std::fmt;
use std::str::FromStr;

use layerfs::{Error, LayerName, Result};
use serde::{Deserialize, Serialize};

/// The longest name: hosts' names may not be longer.
const MAX_BYTES: usize = 48;

/// 1 to 48 letters, digits and `. _ -`, the first a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestName(String);

impl GuestName {
    /// Checks `text`.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn new(text: &str) -> Result<GuestName> {
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let is_valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !starts_well || text.len() > MAX_BYTES || !text.bytes().all(is_valid) {
            let detail = format!("{text:?} is not a guest's name: use up to {MAX_BYTES} letters, digits and . _ -");
            return Err(Error::invalid(detail));
        }
        Ok(GuestName(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of a layer of this guest: `guest/NAME/part`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `part` can't be in a layer's name.
    pub fn layer(&self, part: &str) -> Result<LayerName> {
        LayerName::new(&format!("guest/{}/{part}", self.0))
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for GuestName {
    type Err = Error;

    fn from_str(text: &str) -> Result<GuestName> {
        GuestName::new(text)
    }
}

impl TryFrom<String> for GuestName {
    type Error = Error;

    fn try_from(text: String) -> Result<GuestName> {
        GuestName::new(&text)
    }
}

impl From<GuestName> for String {
    fn from(name: GuestName) -> String {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_a_folder_and_a_part_of_a_layers_name() {
        for good in ["web", "a", "Game-1", "0.x_y"] {
            let name = GuestName::new(good).unwrap();
            assert_eq!(name.layer("state").unwrap().as_str(), format!("guest/{good}/state"));
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(49)] {
            assert!(GuestName::new(bad).is_err(), "{bad}");
        }
    }
}
