//! Dumping a guest when it can be dumped.
//!
//! Hides which of CRIU's refusals pass by themselves. A connection that a guest hasn't accepted yet is one that CRIU can't save, and a guest
//! that serves others has one every now and then; a moment later it hasn't. Invariant: the guest runs between two attempts, and the state's folder
//! has nothing of an attempt that failed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use layerfs::monitor::{Monitor, check};

use super::{Activity, Guest, Written};
use crate::error::{Error, Result};

/// What CRIU says of what will have passed soon.
const PASSING: [&str; 2] = [
    // A client of a Unix socket closed before it was accepted.
    "closed in-flight socket",
    // Clients of a TCP socket that aren't accepted yet, or half connected.
    "In-flight connection",
];
/// How long the guest runs before it is tried again, in milliseconds: once for each.
const PAUSES: [u64; 6] = [10, 50, 100, 200, 400, 800];

/// Dumps `guest` as [`Guest::dump`] does; again, if what was in the way passes by itself. `again` is told what it was.
///
/// # Errors
/// As [`Guest::dump`]: the last attempt's; and when `monitor` says stop between two, as the guest runs.
pub fn dump(guest: &dyn Guest, into: &Path, monitor: &dyn Monitor, mut again: impl FnMut(&Error)) -> Result<Written> {
    for pause in PAUSES {
        let error = match guest.dump(into) {
            Err(error) if passes(&error) => error,
            done => return done,
        };
        // Whatever came of it, the error says.
        if guest.status().is_ok_and(|status| status.activity != Activity::Running) || empty(into).is_err() {
            return Err(error);
        }
        check(monitor)?;
        again(&error);
        std::thread::sleep(Duration::from_millis(pause));
    }
    guest.dump(into)
}

fn passes(error: &Error) -> bool {
    matches!(error, Error::Guest { detail, .. } if PASSING.iter().any(|sign| detail.contains(sign)))
}

fn empty(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}
