//! What an image runs on, as image indexes and configurations say it: `linux/amd64`, `linux/arm/v7`.
//!
//! Hides the other spellings of the same thing (`x86_64`, `arm64/v8`). Invariant: an image for another platform than
//! the wanted one is never taken by accident.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::export::oci::architecture;

/// An operating system and a processor's architecture, in Go's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// "linux".
    #[serde(default)]
    pub os: String,
    /// "amd64", "arm64", "arm".
    #[serde(default)]
    pub architecture: String,
    /// "v7".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This machine's.
    pub fn host() -> Platform {
        Platform { os: "linux".to_owned(), architecture: architecture().to_owned(), variant: None }
    }

    /// Whether it is one that was asked for as `wanted`, which need not say the variant.
    pub fn fits(&self, wanted: &Platform) -> bool {
        let (own, wanted) = (self.clone().normal(), wanted.clone().normal());
        own.os == wanted.os
            && own.architecture == wanted.architecture
            && (wanted.variant.is_none() || wanted.variant == own.variant)
    }

    /// Fails unless it fits `wanted`; `None` stands for this machine's, and for "nobody asked".
    pub fn check(&self, wanted: Option<&Platform>) -> Result<()> {
        let host = Platform::host();
        let expected = wanted.unwrap_or(&host);
        if self.os.is_empty() || self.architecture.is_empty() || self.fits(expected) {
            return Ok(());
        }
        let why = if wanted.is_some() { "asked for was" } else { "this machine is" };
        Err(Error::NoneFits(format!(
            "the image is for {self}, and {why} {expected}; ask for the platform {self} to have it all the same"
        )))
    }

    fn normal(mut self) -> Platform {
        self.architecture = match self.architecture.as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            "i386" | "x86" => "386".to_owned(),
            _ => self.architecture,
        };
        let is_usual =
            matches!((self.architecture.as_str(), self.variant.as_deref()), ("arm64", Some("v8")) | (_, Some("")));
        if is_usual {
            self.variant = None;
        }
        self
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().filter(|variant| !variant.is_empty()).map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Platform> {
        let mut parts = text.split('/').map(str::to_owned);
        let (os, architecture, variant) = (parts.next(), parts.next(), parts.next());
        match (os, architecture, parts.next()) {
            (Some(os), Some(architecture), None) if !os.is_empty() && !architecture.is_empty() => {
                Ok(Platform { os, architecture, variant })
            }
            _ => Err(Error::invalid(format!("{text:?} is no platform; write it like linux/arm64 or linux/arm/v7"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_platform_fit_each_other() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        for (own, wanted, fits) in [
            ("linux/amd64", "linux/x86_64", true),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm64", "linux/arm64/v8", true),
            ("linux/arm/v7", "linux/arm", true),
            ("linux/arm", "linux/arm/v7", false),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("windows/amd64", "linux/amd64", false),
        ] {
            assert_eq!(platform(own).fits(&platform(wanted)), fits, "{own} for {wanted}");
        }
        assert!(["linux", "linux/", "a/b/c/d", ""].iter().all(|text| text.parse::<Platform>().is_err()));
        assert_eq!(platform("linux/arm/v7").to_string(), "linux/arm/v7");
    }
}
