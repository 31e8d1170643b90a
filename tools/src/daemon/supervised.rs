//! A daemon that systemd started: how it gives way to the program that is installed now, and takes the place of one
//! that a command started.
//!
//! Decision hidden here: such a daemon becomes its successor, in the same process. Ended and started again, systemd would
//! stop and start whatever requires it, the mounts of fstab among that; and it would start nothing before the command of its
//! reload has ended, which waits for the successor.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, WaitOptions, waitpid};

use crate::api::Stop;
use crate::config::Settings;
use crate::failure::{Class, Failure, Result};
use crate::{autostart, client};

/// Whether systemd started this process, and is to be told when it answers.
pub fn is_supervised() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Runs the program that is installed now instead of this one, with the same arguments. Returns only if that fails.
pub fn become_successor() -> io::Error {
    let program = match program() {
        Ok(program) => program,
        Err(error) => return error,
    };
    // The store's lock and the mounts' descriptors go with this program. They are all marked so; this is for those of libraries.
    // SAFETY: only sets a flag of descriptors.
    #[allow(unsafe_code)]
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    Command::new(program).args(std::env::args_os().skip(1)).exec()
}

/// The program as it was called, if that is a place: it may be a link, which leads elsewhere after an upgrade.
fn program() -> io::Result<OsString> {
    match std::env::args_os().next() {
        Some(called) if Path::new(&called).is_absolute() => Ok(called),
        _ => std::env::current_exe().map(OsString::from),
    }
}

/// Waits for the children of the program that this process ran before, such as the keeper, as each ends. Called before there are
/// others.
pub fn reap_inherited() {
    let own = std::process::id();
    let Ok(children) = std::fs::read_to_string(format!("/proc/self/task/{own}/children")) else { return };
    for child in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
        // Without the thread it stays a zombie as long as this process lives, which hurts nobody.
        let wait = move || waitpid(Some(child), WaitOptions::empty()).is_ok();
        let _ = std::thread::Builder::new().name("inherited".to_owned()).spawn(wait);
    }
}

/// Has the daemon that runs, which a command started, leave the store and its mounts to this process.
///
/// # Errors
/// [`Class::Busy`] if there is work under way, or if systemd started that one too.
pub fn take_over(settings: &Settings) -> Result<()> {
    let Some(client) = autostart::find(settings)? else { return Ok(()) };
    tracing::info!("takes over from the daemon that runs");
    client::stop(&client, Stop { force: false, hand_over: true, to_caller: true })
}

/// Why there can't be another daemon.
pub fn runs_already(settings: &Settings) -> Failure {
    let text = format!("a daemon runs already for the store {}", settings.store.display());
    Failure::new(Class::Busy, text).hint("`layerctl daemon status` tells about it")
}
