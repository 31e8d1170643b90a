//! What can go wrong between two hosts: what failed, with whom, and what the user can do.
//!
//! Every error has a [`layerfs::error::ErrorClass`]; the class crosses the wire, the type doesn't.

use std::io;

use layerfs::error::ErrorClass;
use layerfs::store::db::WriteError;

use crate::identity::Fingerprint;

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store, or a layer in it.
    #[error(transparent)]
    Store(#[from] layerfs::Error),
    /// The link failed.
    #[error("{action} {peer} failed; check that the address is right, the daemon there runs and the network works")]
    Link {
        /// "connecting to", "reading from", "writing to".
        action: &'static str,
        /// The peer's name or address.
        peer: String,
        /// What the operating system or TLS said.
        source: io::Error,
    },
    /// This host can't listen.
    #[error("cannot listen on {address} for peers; choose another address with `listen` in the config or --listen")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The other side closed the connection in the middle of something.
    #[error("{peer} closed the connection in the middle of a transfer; try again, what arrived is kept")]
    Closed {
        /// The peer's name or address.
        peer: String,
    },
    /// Nothing came for too long.
    #[error("{peer} did not answer for {seconds} s ({action}); check the network and the daemon there")]
    Timeout {
        /// What was being waited for.
        action: &'static str,
        /// The peer's name or address.
        peer: String,
        /// For how long.
        seconds: u64,
    },
    /// The host that answers isn't the peer on record.
    #[error(
        "the host at {address} has the key {found}, not {expected} as on record for {peer}; if that host was set up \
         anew, compare its fingerprint there and do `layerctl peer remove {peer}` and `peer add` again"
    )]
    WrongKey {
        /// The peer's name.
        peer: String,
        /// Its address.
        address: String,
        /// The key on record.
        expected: Fingerprint,
        /// The key that was shown.
        found: Fingerprint,
    },
    /// The peer said no.
    #[error("{peer}: {message}")]
    Remote {
        /// The peer's name or address.
        peer: String,
        /// Its class of failure.
        class: ErrorClass,
        /// Its words.
        message: String,
    },
    /// This side says no.
    #[error("{message}")]
    Refused {
        /// The class of failure.
        class: ErrorClass,
        /// Why.
        message: String,
    },
    /// The peer broke the protocol.
    #[error("{peer} broke the protocol: {detail}")]
    Protocol {
        /// The peer's name or address.
        peer: String,
        /// How.
        detail: String,
    },
    /// A registry failed or refused.
    #[error("{action} {place} failed: {detail}")]
    Registry {
        /// "downloading from", "uploading to".
        action: &'static str,
        /// The image's address.
        place: String,
        /// The class of failure.
        class: ErrorClass,
        /// What happened, and what the user can do.
        detail: String,
    },
    /// A guest, or the runtime that runs it, failed.
    #[error("cannot {action} guest {guest}: {detail}")]
    Guest {
        /// The verb: "start", "dump", "restore".
        action: &'static str,
        /// The guest's name.
        guest: String,
        /// What happened, and what the user can do.
        detail: String,
    },
    /// No version in common.
    #[error(
        "{peer} speaks the protocol's versions {lowest} to {highest}, this program {ours}; use a newer layerfs on the older side"
    )]
    Version {
        /// The peer's name or address.
        peer: String,
        /// Its lowest version.
        lowest: u16,
        /// Its highest version.
        highest: u16,
        /// Ours.
        ours: u16,
    },
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Error {
        Error::Store(error.into())
    }
}

impl Error {
    /// Which class of failure this is.
    pub fn class(&self) -> ErrorClass {
        match self {
            Error::Store(error) => error.class(),
            Error::Link { .. } | Error::Listen { .. } | Error::Closed { .. } | Error::Timeout { .. } => {
                ErrorClass::Network
            }
            Error::Protocol { .. } => ErrorClass::Corrupt,
            Error::Refused { class, .. } | Error::Registry { class, .. } => *class,
            Error::WrongKey { .. } => ErrorClass::Denied,
            Error::Remote { class, .. } => *class,
            Error::Version { .. } => ErrorClass::Unsupported,
            Error::Guest { .. } => ErrorClass::Io,
        }
    }

    /// A failed link.
    pub(crate) fn link(action: &'static str, peer: &str, source: io::Error) -> Error {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return Error::Closed { peer: peer.to_owned() };
        }
        Error::Link { action, peer: peer.to_owned(), source }
    }

    /// A guest that fails.
    pub fn guest(action: &'static str, guest: &crate::guest::GuestName, detail: impl Into<String>) -> Error {
        Error::Guest { action, guest: guest.to_string(), detail: detail.into() }
    }

    /// This side says no.
    pub(crate) fn refused(class: ErrorClass, message: impl Into<String>) -> Error {
        Error::Refused { class, message: message.into() }
    }

    /// The peer broke the protocol.
    pub(crate) fn protocol(peer: &str, detail: impl Into<String>) -> Error {
        Error::Protocol { peer: peer.to_owned(), detail: detail.into() }
    }

    /// Whether telling the peer about it makes sense: it isn't the peer's own word, and the link works.
    pub(crate) fn is_worth_telling(&self) -> bool {
        // The link isn't at fault if what the sender builds upon is damaged here, though that passes as its faults do.
        let is_links = matches!(self, Error::Link { .. }) && !crate::unbundle::is_damaged_base(self);
        !is_links && !matches!(self, Error::Remote { .. } | Error::Closed { .. } | Error::Timeout { .. })
    }
}

/// `error` and its sources, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
