//! The control API's vocabulary, shared by client and daemon: requests, answers, events. docs/API.md describes it.
//!
//! Every operation is `/v1/<operation>` with a JSON object as request (none means `{}`). Invariant: fields are only
//! ever added; what changes otherwise raises [`API_VERSION`].

pub mod activity;
pub mod frames;
pub mod guests;
pub mod layers;
pub mod migrate;
pub mod mounts;
pub mod peers;
pub mod registry;
pub mod storage;
pub mod tier;
pub mod transfers;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::units;

/// The version of this API.
pub const API_VERSION: u32 = 1;
/// Operations that clients of every version may ask for: a daemon of another version must be seen and stopped.
pub const TIMELESS: [&str; 2] = ["status", "stop"];
/// For whom a connection becomes a stream: `serve`, or the number of the stream that a transfer awaits.
pub const HEADER_STREAM: &str = "layerfs-stream";
/// Both sides tell [`API_VERSION`] in this header.
pub const HEADER_API: &str = "layerfs-api";
/// The request of an operation whose body, or connection, is a stream of bytes, as JSON in ASCII.
pub const HEADER_REQUEST: &str = "layerfs-request";
/// Trailer of a stream of bytes: the answer, as JSON in ASCII.
pub const TRAILER_RESULT: &str = "layerfs-result";
/// Trailer of a stream of bytes: the failure, as JSON in ASCII.
pub const TRAILER_ERROR: &str = "layerfs-error";
/// The media type of a stream of [`Event`]s.
pub const NDJSON: &str = "application/x-ndjson";

/// What a field is if the request has none.
fn yes() -> bool {
    true
}

/// One line of a long operation's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The work has begun; `/v1/cancel` takes its number.
    Started {
        /// Its number.
        work: u64,
    },
    /// How far it is.
    Progress(Progress),
    /// A remark that doesn't stop the work.
    Warning(String),
    /// One item of an answer that is too long to be held whole.
    Item(serde_json::Value),
    /// The end: it is done.
    Result(serde_json::Value),
    /// The end: it failed.
    Error(Failure),
}

/// How far a piece of work is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done: "reading", "sending".
    pub phase: String,
    /// Bytes done in this phase.
    pub bytes: u64,
    /// Bytes to do in this phase, if known.
    pub total_bytes: Option<u64>,
    /// Files or chunks done in this phase.
    pub items: u64,
}

/// No parameters, or nothing to tell.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// A time, in seconds since 1970; in JSON as RFC 3339 in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

impl From<layerfs::attr::Time> for Timestamp {
    fn from(time: layerfs::attr::Time) -> Timestamp {
        Timestamp(time.seconds)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&units::rfc3339(self.0))
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let text = String::deserialize(deserializer)?;
        units::parse_rfc3339(&text).map(Timestamp).ok_or_else(|| serde::de::Error::custom("not a time in RFC 3339"))
    }
}

/// A path, whose bytes need not be UTF-8: a string, or `{"hex": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathText(pub Vec<u8>);

impl PathText {
    /// For people: what is not printable is escaped.
    pub fn display(&self) -> String {
        escape(&self.0)
    }
}

impl From<&Path> for PathText {
    fn from(path: &Path) -> PathText {
        PathText(path.as_os_str().as_bytes().to_vec())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PathRepr {
    Text(String),
    Hex { hex: String },
}

impl Serialize for PathText {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let repr = match std::str::from_utf8(&self.0) {
            Ok(text) => PathRepr::Text(text.to_owned()),
            Err(_) => PathRepr::Hex { hex: self.0.iter().map(|byte| format!("{byte:02x}")).collect() },
        };
        repr.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PathText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<PathText, D::Error> {
        match PathRepr::deserialize(deserializer)? {
            PathRepr::Text(text) => Ok(PathText(text.into_bytes())),
            PathRepr::Hex { hex } => {
                from_hex(&hex).map(PathText).ok_or_else(|| serde::de::Error::custom("bad hex in a path"))
            }
        }
    }
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.len().is_multiple_of(2) || !hex.is_ascii() {
        return None;
    }
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect()
}

/// `bytes` as text in which control characters, backslashes and what is not UTF-8 are escaped.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// `value` as JSON in ASCII, as a header can hold it.
pub fn ascii_json<T: Serialize>(value: &T) -> String {
    let json = serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned());
    let mut out = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() && character != '\u{7f}' {
            out.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// What a daemon says of itself. `/v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// [`API_VERSION`].
    pub api: u32,
    /// Its process.
    pub pid: u32,
    /// A number that no other daemon of this store has had: one may become the next in the same process. 0 of older ones.
    #[serde(default)]
    pub instance: u64,
    /// The store's folder.
    pub store: PathBuf,
    /// When it started.
    pub started: Timestamp,
    /// Seconds since then.
    pub uptime_seconds: f64,
    /// Whether a command started it, so that it leaves by itself.
    pub autostarted: bool,
    /// Where it listens for peers.
    pub listening: Option<String>,
    /// Why it doesn't listen though it should.
    pub listen_error: Option<String>,
    /// Whether and where it was told to: `auto`, `off` or an address. Empty of older ones.
    #[serde(default)]
    pub listen: String,
    /// How many mounts it holds.
    pub mounts: u64,
    /// The process that keeps the mounts if this one ends; none if nothing is kept.
    pub keeper: Option<u32>,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// The inode of its mount namespace: paths and mounts of processes in another one differ.
    pub mount_namespace: u64,
    /// Whether processors are kept from halting while a mount is asked often.
    #[serde(default)]
    pub keeps_awake: bool,
    /// What it is doing.
    pub work: Vec<WorkInfo>,
}

/// A piece of work in the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkInfo {
    /// Its number; `/v1/cancel` takes it.
    pub work: u64,
    /// "import debian".
    pub label: String,
    /// Since when, in seconds.
    pub seconds: f64,
    /// How far it is.
    pub progress: Progress,
}

/// `/v1/cancel`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// The number of the work.
    pub work: u64,
}

/// `/v1/stop`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Cancel work, and detach mounts that are in use.
    #[serde(default)]
    pub force: bool,
    /// Leave the mounts to a successor, which is started. Not sent unless wanted: older daemons don't know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hand_over: bool,
    /// With `hand_over`: whoever asks is the successor, and none is started. Not sent unless wanted either.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub to_caller: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_json() {
        for bytes in [&b"/etc/passwd"[..], b"/odd\xff\n", "/grün".as_bytes()] {
            let json = serde_json::to_string(&PathText(bytes.to_vec())).unwrap();
            assert_eq!(serde_json::from_str::<PathText>(&json).unwrap().0, bytes);
        }
        assert_eq!(escape(b"a\\b\nc\xff\x01"), "a\\\\b\\nc\\xff\\x01");
    }

    #[test]
    fn headers_hold_any_text() {
        let text = ascii_json(&"grün 🦀\n");
        assert!(text.is_ascii());
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), "grün 🦀\n");
    }
}
