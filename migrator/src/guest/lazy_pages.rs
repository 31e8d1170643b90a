//! Memory that is read when it is touched: CRIU's server of pages, which reads a state's files for a restored tree.
//!
//! Hides the server's life: it begins before the restore, and ends by itself when all pages are there, or with the tree.
//! In the run folder: `lazy-pages.json` (the server), `lazy-pages.log`. Invariant: a guest whose memory is still on its way
//! isn't dumped.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::processes::{Process, wait_until};
use super::programs::{Programs, run};

/// How long a guest's memory may be on its way when it is to be dumped.
const PATIENCE: Duration = Duration::from_secs(60);

fn server(folder: &Path) -> Option<Process> {
    Process::load(&folder.join("lazy-pages.json")).filter(Process::is_alive)
}

/// Serves the pages of the state in `from` to the restore that comes next with this run folder.
pub(super) fn serve(programs: &Programs, folder: &Path, from: &Path) -> Result<(), String> {
    stop(folder);
    let pidfile = folder.join("lazy-pages.pid");
    for name in ["lazy-pages.pid", "lazy-pages.socket"] {
        let _ = fs::remove_file(folder.join(name));
    }
    let mut command = programs.command(programs.criu()?);
    command.args(["lazy-pages", "--daemon", "-v2", "-o"]).arg(folder.join("lazy-pages.log")).arg("-D").arg(from);
    command.arg("-W").arg(folder).arg("--pidfile").arg(&pidfile);
    run(&mut command)?;
    let pid = fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
    let process = pid.and_then(Process::of).ok_or("CRIU's server of pages ended at once")?;
    process.save(&folder.join("lazy-pages.json")).map_err(|error| error.to_string())
}

/// Waits until the guest has all of its memory.
pub(super) fn wait(folder: &Path) -> Result<(), String> {
    let is_there = wait_until(PATIENCE, || server(folder).is_none());
    if is_there { Ok(()) } else { Err("its memory is still on its way from where it came; try again later".to_owned()) }
}

/// Ends the server, if there is one.
pub(super) fn stop(folder: &Path) {
    if let Some(server) = server(folder) {
        server.kill();
        server.wait_gone(Duration::from_secs(10));
    }
    let _ = fs::remove_file(folder.join("lazy-pages.json"));
}
