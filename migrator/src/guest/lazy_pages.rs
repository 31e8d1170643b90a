//! Memory that is read when it is touched: CRIU's server of pages, which reads a state's files for a restored tree.
//!
//! Hides the server's life: it begins before the restore, and ends by itself when all pages are there, or with the tree. A shell
//! that does nothing else waits for it and writes down how it ended, whatever becomes of this program. In the run folder:
//! `lazy-pages.json` (the server and that shell), `lazy-pages.end` (its exit code), `lazy-pages.log`. Invariant: a guest whose memory
//! is still on its way, or of which it isn't known that all of it came, isn't dumped: what is missing reads as zeros.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::io::ioctl_fionbio;
use serde::{Deserialize, Serialize};

use super::exec::{self, ANSWER_PATIENCE};
use super::processes::{Process, wait_until};
use super::programs::Programs;

/// How long a guest's memory may be on its way when it is to be dumped.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the server says when it ends before all pages are there. Its good end it doesn't tell.
const FAILURES: [&str; 3] = ["failed reading pages", "Error during UFFD copy", "Error during regular page copy"];
/// Runs the server, which writes into its third file when it is ready, and writes down how it ends; a name that is there is complete.
const KEEPER: &str = "end=$1; shift; \"$@\" 3>&1 >/dev/null 2>&1; echo $? >\"$end.new\" && mv \"$end.new\" \"$end\"";
/// What is done about a memory that isn't whole.
pub(super) const FIX: &str = "`layerctl guest stop` and `layerctl guest start` begin it anew from its disk";

/// A server of pages.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Server {
    /// One whose end is written down.
    Kept {
        /// CRIU.
        server: Process,
        /// What waits for it.
        keeper: Process,
    },
    /// One that an earlier version began.
    Alone(Process),
}

impl Server {
    fn load(folder: &Path) -> Option<Server> {
        serde_json::from_slice(&fs::read(folder.join("lazy-pages.json")).ok()?).ok()
    }

    fn processes(&self) -> Vec<&Process> {
        match self {
            // First what would write down an end that nobody asked for.
            Server::Kept { server, keeper } => vec![keeper, server],
            Server::Alone(server) => vec![server],
        }
    }

    fn is_at_work(&self) -> bool {
        self.processes().into_iter().any(Process::is_alive)
    }

    fn end(&self) {
        self.processes().into_iter().for_each(Process::kill);
        wait_until(Duration::from_secs(10), || !self.is_at_work());
    }
}

/// Serves the pages of the state in `from` to the restore that comes next with this run folder.
pub(super) fn serve(programs: &Programs, folder: &Path, from: &Path) -> Result<(), String> {
    stop(folder);
    let log = folder.join("lazy-pages.log");
    for name in ["lazy-pages.socket", "lazy-pages.log"] {
        let _ = fs::remove_file(folder.join(name));
    }
    let mut command = programs.command("/bin/sh");
    command.args(["-c", KEEPER, "sh"]).arg(folder.join("lazy-pages.end")).arg(programs.criu()?);
    command.args(["lazy-pages", "--status-fd", "3", "-v2", "-o"]).arg(&log).arg("-D").arg(from).arg("-W").arg(folder);
    let mut keeper = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(|error| failed(&error))?;
    let served = ready(&mut keeper).and_then(|server| {
        let json = serde_json::to_vec(&server).map_err(|error| failed(&error))?;
        fs::write(folder.join("lazy-pages.json"), json).map_err(|error| failed(&error))
    });
    match served {
        Ok(()) => drop(std::thread::spawn(move || keeper.wait())),
        Err(_) => drop(exec::end(keeper)),
    }
    served
}

fn failed(error: &dyn std::fmt::Display) -> String {
    format!("CRIU's server of pages: {error}")
}

/// Waits until the server that `keeper` runs takes requests.
fn ready(keeper: &mut Child) -> Result<Server, String> {
    let mut pipe = keeper.stdout.take().ok_or_else(|| failed(&"it has no output"))?;
    ioctl_fionbio(&pipe, true).map_err(|error| failed(&error))?;
    let mut said = Err(std::io::ErrorKind::WouldBlock.into());
    let has_said = wait_until(ANSWER_PATIENCE, || {
        said = pipe.read(&mut [0]);
        !said.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    });
    match said {
        Ok(0) => return Err(failed(&"it ended at once")),
        Ok(_) => {}
        Err(_) if !has_said => return Err(failed(&format!("it isn't ready after {ANSWER_PATIENCE:?}"))),
        Err(error) => return Err(failed(&error)),
    }
    let keeper = Process::of(keeper.id());
    let server = keeper.as_ref().and_then(|keeper| Process::of(*keeper.tree().get(1)?));
    let (keeper, server) = keeper.zip(server).ok_or_else(|| failed(&"it ended at once"))?;
    Ok(Server::Kept { server, keeper })
}

/// Waits until the guest has all of its memory.
pub(super) fn wait(folder: &Path) -> Result<(), String> {
    let is_there = wait_until(PATIENCE, || !Server::load(folder).is_some_and(|server| server.is_at_work()));
    if !is_there {
        return Err("its memory is still on its way from where it came; try again later".to_owned());
    }
    complaint(folder).map_or(Ok(()), |complaint| Err(format!("{complaint}; {FIX}")))
}

/// What is wrong with the memory of a guest whose server has ended before all pages were there, or may have.
pub(super) fn complaint(folder: &Path) -> Option<String> {
    let server = Server::load(folder).filter(|server| !server.is_at_work())?;
    if !server.processes().into_iter().all(Process::is_of_this_boot) {
        return None;
    }
    let log = fs::read(folder.join("lazy-pages.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    if let Some(line) = log.lines().find(|line| FAILURES.iter().any(|failure| line.contains(failure))) {
        return Some(format!("its memory isn't whole, as not all of it came ({})", line.trim()));
    }
    let code = fs::read_to_string(folder.join("lazy-pages.end")).ok();
    let how = match (&server, code.as_deref().map(str::trim)) {
        // One that left nothing to read is believed.
        (Server::Alone(_), _) | (_, Some("0")) => return None,
        (_, Some(code)) => format!("CRIU's server of pages ended with code {code}"),
        (_, None) => "CRIU's server of pages and what watched it were ended".to_owned(),
    };
    Some(format!("some of its memory may be missing: {how} before it said that all of it came"))
}

/// Ends the server, if there is one.
pub(super) fn stop(folder: &Path) {
    if let Some(server) = Server::load(folder) {
        server.end();
    }
    let _ = fs::remove_file(folder.join("lazy-pages.json"));
    let _ = fs::remove_file(folder.join("lazy-pages.end"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::criu::write_script;

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

    #[test]
    fn a_server_that_ends_without_a_word_is_told_from_one_that_has_brought_all() {
        let folder = tempfile::tempdir().unwrap();
        let (run, go) = (folder.path(), folder.path().join("go"));
        let script = |then: &str| {
            let text = format!(
                "#!/bin/sh\n[ $1 = lazy-pages ] || exit 0\n: >$0.log\nprintf r >&3\nexec 3>&-\n\
                 while [ ! -e {} ]; do sleep 0.01; done\n{then}\n",
                go.display()
            );
            write_script(&run.join("criu"), &text).unwrap();
        };
        let programs = Programs::new(run.into(), "layerctl".into(), Some(run.into()));
        let killed = |who: fn(&Server) -> Vec<Process>| {
            let server = Server::load(run).unwrap();
            assert!(server.is_at_work());
            who(&server).iter().for_each(Process::kill);
        };
        let server_of = |server: &Server| server.processes().last().map(|process| (*process).clone());
        script("exit 0");
        serve(&programs, run, run).unwrap();
        fs::write(&go, "").unwrap();
        wait(run).unwrap();
        for then in ["exit 3", "kill -9 $$"] {
            fs::remove_file(&go).unwrap();
            script(then);
            serve(&programs, run, run).unwrap();
            fs::write(&go, "").unwrap();
            let error = wait(run).unwrap_err();
            assert!(error.contains("may be missing") && error.contains("guest start"), "{then}: {error}");
        }
        fs::remove_file(&go).unwrap();
        script("exit 0");
        // The server alone, both, and what watches it while the server goes on for a while.
        let all: [fn(&Server) -> Vec<Process>; 3] = [
            |server| server.processes()[1..].iter().map(|process| (*process).clone()).collect(),
            |server| server.processes().into_iter().cloned().collect(),
            |server| server.processes()[..1].iter().map(|process| (*process).clone()).collect(),
        ];
        for who in all {
            serve(&programs, run, run).unwrap();
            let server = server_of(&Server::load(run).unwrap()).unwrap();
            killed(who);
            fs::write(&go, "").unwrap();
            let error = wait(run).unwrap_err();
            assert!(error.contains("may be missing"), "{error}");
            assert!(!server.is_alive(), "it wasn't waited for");
            fs::remove_file(&go).unwrap();
        }
        // One that goes on is ended with what watches it.
        serve(&programs, run, run).unwrap();
        let server = Server::load(run).unwrap();
        stop(run);
        assert!(!server.is_at_work());
        wait(run).unwrap();
        // One that ends before it takes requests is no server.
        write_script(&run.join("criu"), "#!/bin/sh\n[ $1 = check ]\n").unwrap();
        assert!(serve(&programs, run, run).unwrap_err().contains("ended at once"));
    }
}
