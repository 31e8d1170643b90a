//! What tests of several modules make.

use std::io::Result;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use parking_lot::{RwLock, RwLockReadGuard};

/// `tests/elsewhere`, see there: runs a command in a mount namespace of its own.
pub fn elsewhere() -> PathBuf {
    // Where the test runs, which may have been built in another clone with the same target folder.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&here).join("../tests/elsewhere")
}

/// A child has copies of all descriptors of this process until its own program runs: what a test closes then is still open for a
/// while. Whoever starts a program holds this for writing until that runs.
static SPAWNING: RwLock<()> = RwLock::new(());

/// While this is held, no child has copies of this process's descriptors: for whoever counts on it that what was closed is closed.
/// Whoever holds it starts no program.
pub fn nobody_spawns() -> RwLockReadGuard<'static, ()> {
    SPAWNING.read_recursive()
}

/// As the methods of [`Command`], but not while [`nobody_spawns`].
pub trait Spawn {
    fn spawn_locked(&mut self) -> Result<Child>;
    fn status_locked(&mut self) -> Result<ExitStatus>;
    fn output_locked(&mut self) -> Result<Output>;
}

impl Spawn for Command {
    fn spawn_locked(&mut self) -> Result<Child> {
        let _spawning = SPAWNING.write();
        self.spawn()
    }

    fn status_locked(&mut self) -> Result<ExitStatus> {
        self.spawn_locked()?.wait()
    }

    fn output_locked(&mut self) -> Result<Output> {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.spawn_locked()?.wait_with_output()
    }
}

/// Bytes that don't compress.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}
