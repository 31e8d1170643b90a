//! Programs that work on a guest for a while and outlive this one: CRIU, and the runtimes that run it.
//!
//! Such a program waits for a word on its standard input, and ends if none comes; it gets that when it is noted in the guest's
//! run folder. So whoever comes after a program that died knows who is still at work, waits for it, and finds out what came of it.
//! A runtime that is killed leaves the CRIU that it has begun, which goes on, and ends what it dumps: it is over when that is.
//!
//! Invariants: a program that isn't noted has done nothing; its note goes after what came of it is known otherwise. A process that has
//! executed another program is another daemon: what the one before it has begun nobody sees to.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use super::exec;
use super::processes::{Process, wait_until};
use crate::group::Token;

/// For how long one that an earlier program began is waited for at a time.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one may be at work: after that it isn't expected to come to an end.
pub(super) const WORK_PATIENCE: Duration = Duration::from_secs(600);

/// What CRIU is called by the kernel.
const CRIU: &str = "criu";

type Outcome<T> = Result<T, String>;

/// A program that is at work on a guest, or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Errand {
    program: Process,
    /// Who began it; as long as that lives, and is the same program, it sees to what comes of it.
    by: Process,
    /// Which program of that process. Those of before there were such tokens have none.
    #[serde(default)]
    run: Option<String>,
    /// The state's folder that it writes.
    into: Option<PathBuf>,
    /// The device of the guest's root.
    device: Option<String>,
}

/// Where an errand is noted, and what it writes.
pub(super) struct Note<'a> {
    /// The file.
    pub file: PathBuf,
    /// The state's folder.
    pub into: Option<&'a Path>,
    /// The guest's root, if what it makes is to be known by that.
    pub root: Option<&'a Path>,
}

impl Note<'_> {
    /// Starts `command`, which begins when it has read `word`.
    ///
    /// # Errors
    /// If it can't be run or noted; it has done nothing then.
    pub fn begin(&self, command: &mut Command, word: &[u8]) -> Outcome<Child> {
        begin(command, word, |program| {
            let by = Process::of(std::process::id()).ok_or("this process isn't seen in /proc")?;
            let root = self.root.and_then(|root| fs::canonicalize(root).ok());
            let device = root.and_then(|root| by.device_at(&root));
            let run = Some(own_run().map_err(|error| error.to_string())?);
            let errand = Errand { program, by, run, into: self.into.map(Path::to_owned), device };
            let json = serde_json::to_vec(&errand).map_err(|error| error.to_string())?;
            fs::write(&self.file, json).map_err(|error| format!("cannot write {}: {error}", self.file.display()))
        })
    }

    /// Runs `command`, which begins when it has read a line and leads its process group
    /// ([`super::programs::Programs::waiting`]), to its end.
    ///
    /// # Errors
    /// As [`Note::begin`]; or if it, or the CRIU that it has left, goes on for [`WORK_PATIENCE`], after which it is killed with all that it
    /// has started.
    pub fn run(&self, command: &mut Command) -> Outcome<ExitStatus> {
        let child = self.begin(command, b"\n")?;
        // Until it is waited for its number is nobody else's.
        let program = Process::of(child.id());
        let status = exec::ended(child, WORK_PATIENCE)?.status;
        match program {
            // One that ended well has seen to that itself.
            Some(program) if !status.success() => wait_or_end(&program, self.into.is_some())?,
            _ => {}
        }
        Ok(status)
    }
}

/// What `program` has left that still works on the guest, if that has ended. A dump leaves nothing else; a restore may leave what goes on with
/// the guest, beside CRIU.
fn left_by(program: &Process, is_dump: bool) -> Vec<Process> {
    program.followers((!is_dump).then_some(CRIU))
}

/// Waits until what `program`, which has ended, has left is over too: what it works on is neither whole nor as it was until then. If that takes
/// long it is killed.
fn wait_or_end(program: &Process, is_dump: bool) -> Outcome<()> {
    // Killed at its work, what dumps a guest does that harm. Of what is half restored nothing is lost.
    wait_or_end_after(program, is_dump, if is_dump { WORK_PATIENCE } else { PATIENCE })
}

fn wait_or_end_after(program: &Process, is_dump: bool, patience: Duration) -> Outcome<()> {
    let is_over = || left_by(program, is_dump).is_empty();
    if wait_until(patience, is_over) {
        return Ok(());
    }
    kill(program, is_dump);
    match wait_until(PATIENCE, is_over) {
        true => Err(format!("the CRIU that it had left hadn't ended after {patience:?}, and was killed")),
        false => Err("the CRIU that it had left was killed and does not end".to_owned()),
    }
}

/// Kills what `program` has left, with what that has made.
fn kill(program: &Process, is_dump: bool) {
    let left = left_by(program, is_dump);
    let made: Vec<Process> = left.iter().flat_map(Process::tree).filter_map(Process::of).collect();
    left.iter().chain(&made).for_each(Process::kill);
}

/// Starts `command`, which begins when it has read `word`, and gets that when `note` is done.
///
/// # Errors
/// As [`Note::begin`].
pub(super) fn begin(command: &mut Command, word: &[u8], note: impl FnOnce(Process) -> Outcome<()>) -> Outcome<Child> {
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(|error| format!("it cannot be run: {error}"))?;
    let noted = Process::of(child.id()).ok_or_else(|| "it ended at once".to_owned()).and_then(note);
    let told = noted.and_then(|()| {
        let pipe = child.stdin.take();
        pipe.map_or(Ok(()), |mut pipe| pipe.write_all(word)).map_err(|error| format!("it takes no orders: {error}"))
    });
    if let Err(error) = told {
        // It has only waited.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    Ok(child)
}

impl Errand {
    /// The one that is noted in `file`.
    pub fn load(file: &Path) -> Option<Errand> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    /// The one that is noted in `file`, if nobody sees any more to what comes of it.
    pub fn orphaned(file: &Path) -> Option<Errand> {
        Errand::load(file).filter(Errand::is_orphaned)
    }

    /// Whether nobody sees any more to what comes of it.
    pub fn is_orphaned(&self) -> bool {
        !self.by.is_alive() || self.is_of_predecessor()
    }

    /// Whether this process began it as another program, whose threads are gone. This one notes nothing without its token.
    fn is_of_predecessor(&self) -> bool {
        self.by.pid == std::process::id() && own_run().is_ok_and(|own| self.run.as_deref() != Some(own.as_str()))
    }

    /// The program.
    pub fn program(&self) -> &Process {
        &self.program
    }

    /// The state's folder that it writes, or has written.
    pub fn folder(&self) -> Option<&Path> {
        self.into.as_deref()
    }

    /// Whether `process` has the root that the guest had then, whether or not anything answers there any more.
    pub fn has_root(&self, process: &Process) -> bool {
        self.device.is_some() && self.device == process.device_at(Path::new("/"))
    }

    /// Whether it is over, with the CRIU that it may have left.
    fn is_over(&self) -> bool {
        let is_left = || self.program.is_of_this_boot() && !left_by(&self.program, self.into.is_some()).is_empty();
        !self.program.is_alive() && !is_left()
    }

    /// Waits until it is over.
    ///
    /// # Errors
    /// If it goes on for long.
    pub fn wait(&self) -> Outcome<()> {
        let mut is_over = wait_until(PATIENCE, || self.is_over());
        if !is_over && self.into.is_none() && !self.program.is_alive() {
            // Half a guest, which nobody restores any more.
            kill(&self.program, false);
            is_over = wait_until(PATIENCE, || self.is_over());
        }
        match is_over {
            true => Ok(()),
            false => {
                Err(format!("process {}, which an earlier daemon began, is still at work on it", self.program.pid))
            }
        }
    }

    /// Ends it, after some time in which it may end by itself.
    ///
    /// # Errors
    /// If it doesn't end.
    pub fn end(&self) -> Outcome<()> {
        if self.wait().is_err() {
            // Half a guest isn't known by anything else: what it has made goes with it.
            let all: Vec<Process> = self.program.tree().into_iter().filter_map(Process::of).collect();
            self.program.kill();
            all.iter().for_each(Process::kill);
            kill(&self.program, self.into.is_some());
            if !wait_until(PATIENCE, || self.is_over() && !all.iter().any(Process::is_alive)) {
                return Err(format!("process {} and what it made do not end", self.program.pid));
            }
        }
        Ok(())
    }
}

/// What tells this program from others that the process has been: its number and its start stay when it executes another.
fn own_run() -> crate::error::Result<String> {
    static RUN: OnceLock<String> = OnceLock::new();
    if let Some(run) = RUN.get() {
        return Ok(run.clone());
    }
    let run = Token::random()?.0.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(RUN.get_or_init(|| run).clone())
}

/// Held while it is found out what came of an orphaned errand.
pub(super) fn settling() -> MutexGuard<'static, ()> {
    static SETTLING: Mutex<()> = Mutex::new(());
    SETTLING.lock()
}

#[cfg(test)]
pub(super) fn orphan(file: &Path) {
    // Whoever had the first process's number in another run of the machine is gone.
    let mut errand = Errand::load(file).unwrap();
    errand.by = Process::gone();
    fs::write(file, serde_json::to_vec(&errand).unwrap()).unwrap();
}

#[cfg(test)]
pub(super) fn reboot(file: &Path) {
    let mut errand = Errand::load(file).unwrap();
    (errand.program, errand.by) = (Process::gone(), Process::gone());
    fs::write(file, serde_json::to_vec(&errand).unwrap()).unwrap();
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;
    use crate::guest::criu::write_script;

    fn waits(then: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("read -r line && {then}")]);
        command
    }

    #[test]
    fn what_cant_be_noted_does_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (file, done) = (folder.path().join("note"), folder.path().join("done"));
        let mut command = waits(&format!("touch {}", done.display()));
        fs::create_dir(&file).unwrap();
        let note = Note { file: file.clone(), into: None, root: None };
        assert!(note.run(&mut command).is_err());
        assert!(!done.exists());
        fs::remove_dir(&file).unwrap();
        assert!(note.run(&mut command).unwrap().success());
        assert!(done.exists() && Errand::load(&file).is_some());
    }

    #[test]
    fn one_whose_criu_goes_on_after_it_is_not_over() {
        let folder = tempfile::tempdir().unwrap();
        let done = folder.path().join("done");
        let criu = folder.path().join("criu");
        write_script(&criu, &format!("#!/bin/sh\nsleep 0.3\n: >{}\n", done.display())).unwrap();
        let note = Note { file: folder.path().join("note"), into: Some(folder.path()), root: None };
        let command = || {
            let mut command = waits(&format!("{{ {} & kill -9 $$; }}", criu.display()));
            command.process_group(0);
            command
        };
        assert!(!note.run(&mut command()).unwrap().success());
        assert!(done.exists(), "its CRIU wasn't waited for");
        // Whoever comes after a daemon that has died.
        fs::remove_file(&done).unwrap();
        let mut child = note.begin(&mut command(), b"\n").unwrap();
        child.wait().unwrap();
        orphan(&note.file);
        Errand::orphaned(&note.file).unwrap().wait().unwrap();
        assert!(done.exists(), "its CRIU wasn't waited for");
        // One that doesn't end, and what else is called so.
        write_script(&criu, "#!/bin/sh\nsleep 600\n").unwrap();
        let other = Command::new(&criu).process_group(0).spawn().unwrap();
        let mut child = note.begin(&mut command(), b"\n").unwrap();
        let program = Process::of(child.id()).unwrap();
        child.wait().unwrap();
        assert!(!left_by(&program, true).is_empty());
        // Of a restore only CRIU is waited for, which it isn't before it is executed.
        assert!(wait_until(PATIENCE, || left_by(&program, false).len() == 1));
        let left = left_by(&program, true);
        let error = wait_or_end_after(&program, true, Duration::from_millis(100)).unwrap_err();
        assert!(error.contains("and was killed"), "{error}");
        assert!(!left.iter().any(Process::is_alive) && Process::of(other.id()).unwrap().is_alive());
        assert!(exec::end(other));
    }

    #[test]
    fn one_that_this_process_began_as_another_program_is_an_orphan() {
        let folder = tempfile::tempdir().unwrap();
        let note = Note { file: folder.path().join("note"), into: None, root: None };
        assert!(note.run(&mut waits("true")).unwrap().success());
        assert_eq!(Errand::orphaned(&note.file), None);
        let errand = Errand::load(&note.file).unwrap();
        for run in [Some("another".to_owned()), None] {
            let errand = Errand { run, ..errand.clone() };
            fs::write(&note.file, serde_json::to_vec(&errand).unwrap()).unwrap();
            assert_eq!(Errand::orphaned(&note.file), Some(errand));
        }
        // Another daemon that lives, of before there were tokens or not.
        let mut other = Command::new("sleep").arg("600").spawn().unwrap();
        let by = Process::of(other.id()).unwrap();
        for run in [Some("another".to_owned()), None] {
            assert!(!Errand { run, by: by.clone(), ..errand.clone() }.is_orphaned());
        }
        other.kill().unwrap();
        other.wait().unwrap();
        // A note of before there were tokens.
        let mut json = serde_json::to_value(&errand).unwrap();
        json.as_object_mut().unwrap().remove("run");
        assert_eq!(serde_json::from_value::<Errand>(json).unwrap(), Errand { run: None, ..errand });
    }

    #[test]
    fn one_is_an_orphan_when_its_beginner_is_gone_and_can_be_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let note = Note { file: folder.path().join("note"), into: Some(folder.path()), root: None };
        // Until it is told: it has to be alive while it is looked at, however long that takes.
        let go = folder.path().join("go");
        let until = format!("until [ -e {} ]; do sleep 0.02; done", go.display());
        let mut child = note.begin(&mut waits(&until), b"\n").unwrap();
        assert_eq!(Errand::orphaned(&note.file), None);
        orphan(&note.file);
        let errand = Errand::orphaned(&note.file).unwrap();
        assert_eq!(errand.folder(), Some(folder.path()));
        assert!(errand.program().is_alive());
        fs::write(go, "").unwrap();
        errand.wait().unwrap();
        assert!(!errand.program().is_alive());
        child.wait().unwrap();
    }
}
