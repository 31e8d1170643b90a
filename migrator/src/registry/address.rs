//! Where an image is: `oci://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use layerfs::error::ErrorClass;
use oci_client::Reference;

use crate::error::{Error, Result};

/// What addresses of registries begin with.
const SCHEME: &str = "oci://";

/// An image's place in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(pub(super) Reference);

impl Address {
    /// Whether `text` is meant as one.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// The registry's host, with its port.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository in the registry.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// Fails unless something can be pushed there.
    pub(super) fn check_tag(&self) -> Result<()> {
        if self.0.digest().is_some() {
            return Err(Error::refused(
                ErrorClass::Invalid,
                format!("{self} names a digest, which follows from what is pushed; give a tag instead"),
            ));
        }
        Ok(())
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let wrong = |why: String| {
            let example = "write it like oci://registry.example.org/team/app:1.0";
            Error::refused(ErrorClass::Invalid, format!("{text:?} is no address of an image: {why}; {example}"))
        };
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| wrong(format!("it doesn't begin with {SCHEME}")))?;
        let is_plausible = rest.contains('/') && !rest.contains("//") && !rest.contains(['?', '#']) && rest.is_ascii();
        if !is_plausible {
            return Err(wrong("it has no registry and repository".to_owned()));
        }
        if rest.split('/').next().is_some_and(|host| host.contains('@')) {
            return Err(wrong("users are named with --username".to_owned()));
        }
        rest.parse::<Reference>().map(Address).map_err(|error| wrong(error.to_string()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.0.whole())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let address = |text: &str| text.parse::<Address>();
        let full = address("oci://localhost:5000/team/app:1.0").unwrap();
        assert_eq!((full.registry(), full.repository()), ("localhost:5000", "team/app"));
        assert_eq!(full.to_string(), "oci://localhost:5000/team/app:1.0");
        assert_eq!(address("oci://registry.example/app").unwrap().to_string(), "oci://registry.example/app:latest");
        assert!(address(&format!("oci://r.example/a@sha256:{}", "0".repeat(64))).unwrap().check_tag().is_err());
        for wrong in
            ["app", "oci://", "oci:///app", "oci://host", "oci://user:p@host/app", "oci://h.e/A", "oci://h/a?b"]
        {
            assert_eq!(address(wrong).unwrap_err().class(), ErrorClass::Invalid, "{wrong}");
        }
    }
}
