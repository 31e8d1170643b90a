//! Memory that is read when it is touched: CRIU's server of pages, which reads a state's files for a restored tree.
//!
//! Hides the server's life: it begins before the restore, and ends by itself when all pages are there, or with the tree.
//! In the run folder: `lazy-pages.json` (the server), `lazy-pages.log`. Invariant: a guest whose memory is still on its way, or
//! of which the server says that it didn't bring all of it, isn't dumped: what is missing reads as zeros.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::processes::{Process, wait_until};
use super::programs::{Programs, run};

/// How long a guest's memory may be on its way when it is to be dumped.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the server says when it ends before all pages are there. Its good end it doesn't tell.
const FAILURES: [&str; 3] = ["failed reading pages", "Error during UFFD copy", "Error during regular page copy"];

fn server(folder: &Path) -> Option<Process> {
    Process::load(&folder.join("lazy-pages.json")).filter(Process::is_alive)
}

/// Serves the pages of the state in `from` to the restore that comes next with this run folder.
pub(super) fn serve(programs: &Programs, folder: &Path, from: &Path) -> Result<(), String> {
    stop(folder);
    let pidfile = folder.join("lazy-pages.pid");
    for name in ["lazy-pages.pid", "lazy-pages.socket", "lazy-pages.log"] {
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
    if !is_there {
        return Err("its memory is still on its way from where it came; try again later".to_owned());
    }
    match complaint(folder) {
        None => Ok(()),
        Some(complaint) => Err(format!(
            "its memory isn't whole, as not all of it came ({complaint}); `layerctl guest stop` and `layerctl guest start` begin it \
             anew from its disk"
        )),
    }
}

/// What the last server, which has ended, said of pages that it couldn't bring. One that left nothing to read is believed.
fn complaint(folder: &Path) -> Option<String> {
    Process::load(&folder.join("lazy-pages.json")).filter(Process::is_of_this_boot)?;
    let log = fs::read(folder.join("lazy-pages.log")).ok()?;
    let log = String::from_utf8_lossy(&log);
    let line = log.lines().find(|line| FAILURES.iter().any(|failure| line.contains(failure)))?;
    Some(line.trim().to_owned())
}

/// Ends the server, if there is one.
pub(super) fn stop(folder: &Path) {
    if let Some(server) = server(folder) {
        server.kill();
        server.wait_gone(Duration::from_secs(10));
    }
    let _ = fs::remove_file(folder.join("lazy-pages.json"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ended_with_pages_missing_leaves_memory_that_isnt_whole() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        Process::of(ended.id()).unwrap().save(&run.join("lazy-pages.json")).unwrap();
        ended.wait().unwrap();
        let say = |text: &str| fs::write(run.join("lazy-pages.log"), text).unwrap();
        // An earlier version's, of which nothing can be read.
        wait(run).unwrap();
        say("(00.000100) Warn  (criu/kerndat.c:1): something isn't there\n");
        wait(run).unwrap();
        say(
            "(00.1) Warn  (criu/x.c:1): y\n(31.2) Error (criu/uffd.c:1021): uffd: 7-12: failed reading pages at 7f00\n",
        );
        let error = wait(run).unwrap_err();
        assert!(error.contains("isn't whole") && error.contains("7-12: failed reading"), "{error}");
        // Of one that was ended nothing is left to say.
        stop(run);
        wait(run).unwrap();
    }
}
