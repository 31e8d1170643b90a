//! What a failure is to the user: a class, a message that holds its facts and the way out, and an exit code.
//!
//! Decides the mapping class → exit code → HTTP status, once, for the command line, the API and the manual.

use std::fmt;

use layerfs::error::ErrorClass;
use serde::{Deserialize, Serialize};

/// The result of everything in this program that can fail.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// The class of a failure; its serialized form is part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Anything that has no class of its own.
    Failure,
    /// Wrong usage, a bad argument, or an input that is not what it should be.
    Invalid,
    /// What was asked for is not there.
    NotFound,
    /// A name or folder is taken.
    Exists,
    /// Something uses what would have to change.
    Busy,
    /// Stored or received bytes are damaged.
    Corrupt,
    /// A version or feature that this program, the kernel or a peer does not have.
    Unsupported,
    /// No space, or quota exceeded.
    NoSpace,
    /// Not allowed.
    Denied,
    /// The link or the peer failed.
    Network,
    /// Cancelled by the user.
    Interrupted,
}

/// Every exit code with its class and what it means; `--help`, the man page and the manual show it.
pub const EXIT_CODES: &[(u8, Option<Class>, &str)] = &[
    (0, None, "done"),
    (1, Some(Class::Failure), "failed in a way that has no code of its own"),
    (2, Some(Class::Invalid), "wrong usage, a bad argument or malformed input"),
    (3, Some(Class::NotFound), "a name, path, layer, chunk, peer or store is not there"),
    (4, Some(Class::Exists), "a name or folder is taken"),
    (5, Some(Class::Busy), "something uses what would have to change"),
    (6, Some(Class::Corrupt), "stored or received bytes are damaged"),
    (7, Some(Class::Unsupported), "a version or feature that is not supported"),
    (8, Some(Class::NoSpace), "no space left, or quota exceeded"),
    (9, Some(Class::Denied), "not allowed"),
    (10, Some(Class::Network), "the link or the peer failed"),
    (130, Some(Class::Interrupted), "interrupted; nothing was left half-done"),
];

impl Class {
    /// The exit code of this class.
    pub fn exit_code(self) -> u8 {
        EXIT_CODES.iter().find(|(_, class, _)| *class == Some(self)).map_or(1, |(code, ..)| *code)
    }

    /// The HTTP status of this class.
    pub fn http_status(self) -> u16 {
        match self {
            Class::Invalid => 400,
            Class::Denied => 403,
            Class::NotFound => 404,
            Class::Exists => 409,
            Class::Busy => 423,
            Class::Unsupported => 426,
            Class::Network => 502,
            Class::NoSpace => 507,
            Class::Interrupted => 499,
            Class::Failure | Class::Corrupt => 500,
        }
    }
}

impl From<Class> for ErrorClass {
    fn from(class: Class) -> ErrorClass {
        match class {
            Class::Invalid => ErrorClass::Invalid,
            Class::NotFound => ErrorClass::NotFound,
            Class::Exists => ErrorClass::Exists,
            Class::Busy | Class::Interrupted => ErrorClass::Busy,
            Class::Corrupt => ErrorClass::Corrupt,
            Class::Unsupported => ErrorClass::Unsupported,
            Class::NoSpace => ErrorClass::NoSpace,
            Class::Denied => ErrorClass::Denied,
            Class::Network => ErrorClass::Network,
            Class::Failure => ErrorClass::Io,
        }
    }
}

impl From<ErrorClass> for Class {
    fn from(class: ErrorClass) -> Class {
        match class {
            ErrorClass::Invalid => Class::Invalid,
            ErrorClass::NotFound => Class::NotFound,
            ErrorClass::Exists => Class::Exists,
            ErrorClass::Busy => Class::Busy,
            ErrorClass::Corrupt => Class::Corrupt,
            ErrorClass::Unsupported => Class::Unsupported,
            ErrorClass::NoSpace => Class::NoSpace,
            ErrorClass::Denied => Class::Denied,
            ErrorClass::Network => Class::Network,
            ErrorClass::Io => Class::Failure,
        }
    }
}

/// A failure as the user sees it. On the API: `{"class": …, "message": …}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its class.
    pub class: Class,
    /// What failed, on what, why, and what the user can do.
    pub message: String,
}

impl Failure {
    /// A failure of `class`.
    pub fn new(class: Class, message: impl Into<String>) -> Failure {
        Failure { class, message: message.into() }
    }

    /// A wrong argument.
    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Class::Invalid, message)
    }

    /// The same failure with `hint`, a way out, added to its text.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Failure {
        self.message = format!("{}\n{hint}", self.message);
        self
    }

    /// The failure of an operation on a file.
    pub fn file(action: &'static str, path: impl AsRef<std::path::Path>, source: impl Into<std::io::Error>) -> Failure {
        layerfs::Error::file(action, path, source).into()
    }

    /// Whether the reader of our output went away (`layerctl … | head`), which is not worth a word.
    pub fn is_broken_pipe(&self) -> bool {
        self.message == BROKEN_PIPE
    }
}

/// The message that [`Failure::is_broken_pipe`] knows.
pub const BROKEN_PIPE: &str = "the reader of the output went away";

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<layerfs::Error> for Failure {
    fn from(error: layerfs::Error) -> Failure {
        let class = match &error {
            layerfs::Error::Cancelled => Class::Interrupted,
            other => other.class().into(),
        };
        Failure { class, message: describe(&error) }
    }
}

/// Writing to stdout failed.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Failure::new(Class::Failure, BROKEN_PIPE),
            _ => layerfs::Error::io("writing the output", error).into(),
        }
    }
}

/// `error` and its sources, each once, in one line.
pub fn describe(error: &dyn std::error::Error) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_a_code_and_a_status() {
        let codes: Vec<u8> = EXIT_CODES.iter().filter_map(|(_, class, _)| class.map(Class::exit_code)).collect();
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130]);
        assert_eq!(Class::Corrupt.http_status(), 500);
    }

    #[test]
    fn sources_are_told_once() {
        let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
        let failure = Failure::file("open", "/x/y", missing);
        assert_eq!(failure.message, "cannot open /x/y: No such file or directory (os error 2)");
        assert_eq!(failure.class, Class::NotFound);
    }
}
