//! The programs of others that drivers run: where they are, and running them.
//!
//! Hides which CRIU is taken: the host's if it works with this kernel, else the one in the folder of private tools that
//! `scripts/setup guests` fills. Invariants: a program never gets this process's terminal or its open files; what it
//! says when it fails is part of the error; none is waited for without an end.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use super::errand::{Note, WORK_PATIENCE};
use super::exec;
use super::launch::Orders;

/// Where `scripts/setup guests` puts private tools.
pub const DEFAULT_FOLDER: &str = "/var/cache/layerfs-guests";
pub(super) const USUAL: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// So much of what a program says is kept in an error, in bytes.
const MAX_COMPLAINT: usize = 2000;

/// Finds programs.
#[derive(Debug)]
pub struct Programs {
    /// The folder of private tools; its `bin` is searched too.
    folder: PathBuf,
    /// The program that is this one: it has a hidden command that starts guests' first processes.
    own: PathBuf,
    search: Vec<PathBuf>,
    criu: OnceLock<Result<PathBuf, String>>,
}

impl Programs {
    /// Those in the folders of `path` (a `PATH`) and in `folder`. `own` is the program to run for [`super::launch`].
    pub fn new(folder: PathBuf, own: PathBuf, path: Option<OsString>) -> Programs {
        let mut search: Vec<PathBuf> = path.iter().flat_map(std::env::split_paths).collect();
        search.extend(USUAL.map(PathBuf::from).into_iter().filter(|usual| !search.contains(usual)).collect::<Vec<_>>());
        Programs { folder, own, search, criu: OnceLock::new() }
    }

    /// The program called `name`, on the search path first.
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        let private = self.folder.join("bin");
        let candidates = self.search.iter().chain(std::iter::once(&private)).map(|folder| folder.join(name));
        candidates.into_iter().find(|path| is_program(path))
    }

    /// A CRIU that works here, or why there is none.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn criu(&self) -> Result<&Path, String> {
        let found = self.criu.get_or_init(|| self.find_criu());
        found.as_deref().map_err(String::clone)
    }

    fn find_criu(&self) -> Result<PathBuf, String> {
        let private = self.folder.join("bin");
        let candidates = self.search.iter().chain(std::iter::once(&private)).map(|folder| folder.join("criu"));
        let mut reason = format!("there is no CRIU, neither on the search path nor in {}", private.display());
        for path in candidates.filter(|path| is_program(path)) {
            let checked = exec::answer(Command::new(&path).arg("check"));
            match checked {
                Ok(output) if output.status.success() => return Ok(path),
                Ok(output) => reason = format!("{} does not work here: {}", path.display(), complaint(&output)),
                Err(error) => reason = format!("{}: {error}", path.display()),
            }
        }
        Err(reason)
    }

    /// A command for `program`, in which it and its children find the CRIU that works as `criu`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut folders = Vec::new();
        if let Ok(Some(folder)) = self.criu().map(Path::parent) {
            folders.push(folder.to_owned());
        }
        folders.extend(self.search.iter().cloned());
        let mut command = Command::new(program);
        if let Ok(path) = std::env::join_paths(folders) {
            command.env("PATH", path);
        }
        // A guest must not end with a terminal, or with the one that asked for it.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    /// The same, but it only becomes `program` when it has read a line, and ends if none comes.
    pub fn waiting(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.command("/bin/sh");
        command.args(["-c", "read -r line && exec \"$@\" </dev/null", "sh"]).arg(program);
        command
    }

    /// Lets `command` and its children find the programs in `folder` before all others.
    pub fn put_first(&self, command: &mut Command, folder: &Path) {
        let set = command.get_envs().find(|(name, _)| *name == "PATH").and_then(|(_, value)| value);
        let others: Vec<PathBuf> = set.map(|path| std::env::split_paths(path).collect()).unwrap_or_default();
        if let Ok(path) = std::env::join_paths(std::iter::once(folder.to_owned()).chain(others)) {
            command.env("PATH", path);
        }
    }

    /// Has this program's hidden command `guest-launch` obey `orders`, noted in `note` from before it begins. Returns what it prints.
    ///
    /// # Errors
    /// What it complained about, in words; nothing was done if it can't be noted.
    pub(super) fn obey(&self, orders: &Orders, note: &Note<'_>) -> Result<String, String> {
        let failed = |error: &dyn std::fmt::Display| format!("the guest's launcher cannot be run: {error}");
        let orders = serde_json::to_vec(orders).map_err(|error| failed(&error))?;
        let mut command = self.command(&self.own);
        command.arg("guest-launch").stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = note.begin(&mut command, &orders).map_err(|error| failed(&error))?;
        let output = exec::ended(child, WORK_PATIENCE).map_err(|error| format!("the guest's launcher: {error}"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            let complaint = complaint(&output);
            // It is this program itself, which says so.
            Err(complaint.strip_prefix("layerctl: ").map(str::to_owned).unwrap_or(complaint))
        }
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Runs `command`, which is only asked something or told what is done at once, to its end.
///
/// # Errors
/// What it complained about, in words; or that it hasn't ended after [`exec::ANSWER_PATIENCE`], after which it is killed.
pub fn run(command: &mut Command) -> Result<Output, String> {
    run_within(command, None, exec::ANSWER_PATIENCE)
}

/// The same, with `input` for it to read.
///
/// # Errors
/// As [`run`].
pub fn run_with(command: &mut Command, input: &[u8]) -> Result<Output, String> {
    run_within(command, Some(input), exec::ANSWER_PATIENCE)
}

/// What `command` said, if it succeeded within `patience`.
fn run_within(command: &mut Command, input: Option<&[u8]>, patience: Duration) -> Result<Output, String> {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output = exec::answer_to(command, input, patience).map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() { Ok(output) } else { Err(format!("{name} failed: {}", complaint(&output))) }
}

/// The end of what a program said, in one line.
pub fn complaint(output: &Output) -> String {
    let said = if output.stderr.iter().all(u8::is_ascii_whitespace) { &output.stdout } else { &output.stderr };
    let text = String::from_utf8_lossy(&said[said.len().saturating_sub(MAX_COMPLAINT)..]).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { format!("it ended with {}", output.status) } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_named_and_ended() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        let patience = Duration::from_secs(1);
        // More than a pipe holds, of which nothing is read.
        let long = vec![b'x'; 1 << 20];
        for input in [None, Some(&long[..])] {
            let error = run_within(&mut shell("exec sleep 600"), input, patience).unwrap_err();
            assert!(error.starts_with("sh: ") && error.contains("after 1s, and was killed"), "{error}");
        }
        let said = run_with(&mut shell("cat"), &long).unwrap();
        assert_eq!(said.stdout, long);
        assert_eq!(run(&mut shell("echo no >&2; exit 2")).unwrap_err(), "sh failed: no");
        // One that has heard enough says why it ends.
        assert_eq!(run_with(&mut shell("exec <&-; echo no >&2; exit 2"), &long).unwrap_err(), "sh failed: no");
        assert!(run(&mut Command::new("/no/such/program")).unwrap_err().contains("program: it cannot be run"));
    }
}
