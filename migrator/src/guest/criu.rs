//! CRIU on a process tree: dumping so that it can go on, and restoring.
//!
//! CRIU calls a script when a dump is complete, with the tree still frozen and its connections locked, and then does what
//! the script says: end the tree (exit code 0), or let it go on (any other). Our script waits there for a word in a FIFO, so
//! a dumped guest stands still for as long as we like, whatever becomes of the daemon, and rolling back is CRIU's own way
//! back. What it puts into the guest's files for the while (`link_remap.N`) is there until then, to be sealed along.
//!
//! Hides CRIU's options and files. Invariant: the answer is given once; without one the tree stands still.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::errand::{self, Errand, Note, WORK_PATIENCE};
use super::launch::{Orders, Private};
use super::network_setup::Inside;
use super::processes::{Process, inner_pid, wait_until};
use super::programs::{self, Programs};
use super::{Manner, exec, lazy_pages};

/// Files that are deleted but open travel with the state up to this size.
const GHOST_LIMIT: &str = "64M";
/// The label of a network namespace that isn't CRIU's to make.
pub(super) const NETWORK: &str = "guestnet";
/// How long CRIU gets to follow an answer.
const PATIENCE: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, String>;

/// CRIU for one guest.
pub struct Criu<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// The guest's run folder.
    pub run: &'a Path,
    /// The guest's root.
    pub root: &'a Path,
    /// The guest's network namespace, if it isn't one of those that CRIU makes.
    pub network: Option<PathBuf>,
}

fn failed<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> String + '_ {
    move |error| format!("cannot {what}: {error}")
}

impl Criu<'_> {
    fn hook(&self) -> PathBuf {
        hook(self.run)
    }

    fn answer(&self) -> PathBuf {
        self.run.join("answer")
    }

    fn dumped(&self) -> PathBuf {
        self.run.join("dumped")
    }

    fn saved(&self) -> PathBuf {
        self.run.join("criu.json")
    }

    /// The CRIU that holds the tree, if one does.
    fn holder(&self) -> Option<Process> {
        Process::load(&self.saved()).filter(Process::is_alive)
    }

    /// Whether the tree stands still, or is about to.
    pub fn is_held(&self) -> bool {
        self.holder().is_some()
    }

    /// What all of CRIU's actions want.
    fn common(&self) -> Vec<OsString> {
        let words = ["--tcp-established", "--file-locks", "--link-remap", "--manage-cgroups=ignore"];
        let mut arguments: Vec<OsString> = words.iter().map(OsString::from).collect();
        arguments.extend(["--network-lock".into(), self.lock().into(), "-v2".into()]);
        arguments
    }

    /// How CRIU can lock connections here.
    fn lock(&self) -> &'static str {
        let Ok(criu) = self.programs.criu() else { return "nftables" };
        let check = |feature: &str| {
            let mut command = self.programs.command(criu);
            programs::run(command.args(["check", "--feature", feature])).is_ok()
        };
        if !check("network_lock_nftables") && check("network_lock_iptables") { "iptables" } else { "nftables" }
    }

    /// Freezes the tree of `pid` and writes its state into `into`. It stands still then. Returns since when.
    ///
    /// # Errors
    /// Why it can't be dumped; the tree goes on.
    pub fn dump(&self, pid: u32, into: &Path) -> Outcome<Instant> {
        let criu = self.programs.criu()?.to_owned();
        if self.is_held() {
            return Err("it is being dumped already".to_owned());
        }
        self.prepare_answer()?;
        let log = self.run.join("dump.log");
        // What it says then is of this dump.
        let _ = fs::remove_file(&log);
        let mut command = self.programs.waiting(criu);
        command.arg("dump").args(["-t", &pid.to_string()]).arg("-D").arg(into).arg("--root").arg(self.root);
        command.arg("-o").arg(&log).args(self.common()).args(["--ghost-limit", GHOST_LIMIT]);
        command.arg("--action-script").arg(self.hook());
        if let Some(network) = &self.network {
            command.arg("--external").arg(external(network)?);
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        let save = |process: Process| process.save(&self.saved()).map_err(|error| error.to_string());
        let mut child = errand::begin(&mut command, b"\n", save).map_err(failed("run CRIU"))?;
        let mut ended = None;
        let dumped = self.dumped();
        let is_over = wait_until(WORK_PATIENCE, || {
            ended = child.try_wait().ok().flatten();
            ended.is_some() || dumped.exists()
        });
        if is_over && ended.is_none() {
            // It waits with the tree; whoever ends it is somebody else's child then, or this thread's.
            std::thread::spawn(move || child.wait());
            return Ok(began);
        }
        if !is_over {
            exec::end(child);
        }
        let error = explain(&log).unwrap_or_else(|| format!("CRIU failed without a word; see {}", log.display()));
        // If that fails it is known that one was begun, and a resume tries it again.
        self.unlock(pid).map_err(|second| format!("{error}; and {second}"))?;
        let _ = fs::remove_file(self.saved());
        Err(error)
    }

    fn prepare_answer(&self) -> Outcome<()> {
        for path in [self.dumped(), self.answer()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("cannot remove {}: {error}", path.display()));
                }
                _ => {}
            }
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            self.answer(),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .map_err(failed("make the FIFO for the answer"))?;
        let folder = quoted(self.run);
        let script = format!(
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ] || exit 0\n: >{folder}/dumped\n\
             read -r answer <{folder}/answer\n[ \"$answer\" = discard ]\n"
        );
        write_script(&self.hook(), &script)
    }

    /// Tells the CRIU that holds the tree what to do, and waits until it has done it. Fine if none holds it.
    fn tell(&self, answer: &str) -> Outcome<()> {
        let Some(holder) = self.holder() else { return Ok(()) };
        let is_told = wait_until(PATIENCE, || {
            // Without a reader yet, or any more, this fails: then it is looked again.
            let opened = File::options()
                .write(true)
                .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
                .open(self.answer());
            let told = opened.is_ok_and(|mut fifo| writeln!(fifo, "{answer}").is_ok());
            told || !holder.is_alive()
        });
        if !is_told || !holder.wait_gone(PATIENCE) {
            return Err(format!(
                "CRIU (process {}) does not answer; see {}",
                holder.pid,
                self.run.join("dump.log").display()
            ));
        }
        Ok(())
    }

    /// Forgets a dump that is over.
    fn forget(&self) {
        for path in [self.dumped(), self.answer(), self.hook(), self.saved()] {
            let _ = fs::remove_file(path);
        }
    }

    /// Lets the tree go on, whose first process is `pid`. One whose CRIU has died goes on by itself, but cut off from its network.
    ///
    /// # Errors
    /// If CRIU doesn't answer; if connections may still be locked.
    pub fn resume(&self, pid: Option<u32>) -> Outcome<()> {
        self.tell("resume")?;
        if self.saved().exists() {
            pid.map_or(Ok(()), |pid| self.unlock(pid))?;
            self.forget();
        }
        Ok(())
    }

    /// Lets connections of the tree of `pid` work again if CRIU has died before it did so.
    fn unlock(&self, pid: u32) -> Outcome<()> {
        if !has_died(&self.run.join("dump.log")) {
            return Ok(());
        }
        let namespace = self.network.clone().unwrap_or_else(|| format!("/proc/{pid}/ns/net").into());
        Inside { programs: self.programs, namespace }.unlock()
    }

    /// Ends the tree, its connections still locked.
    ///
    /// # Errors
    /// If CRIU doesn't answer.
    pub fn discard(&self) -> Outcome<()> {
        self.tell("discard")?;
        if self.saved().exists() {
            self.forget();
        }
        Ok(())
    }

    /// Where it is noted who restores the tree, or starts it.
    pub fn restoring(&self) -> PathBuf {
        self.run.join("restoring.json")
    }

    /// That note, of what begins now: what was made before isn't what it makes.
    pub fn note(&self) -> Note<'_> {
        let _ = fs::remove_file(self.pidfile());
        Note { file: self.restoring(), into: None, root: Some(self.root) }
    }

    /// What may be the first process that `errand` has made, if it came so far and that is there. Numbers are used again.
    pub fn restored(&self, errand: &Errand) -> Option<Process> {
        let process = Process::of(self.pid()?)?;
        (process.is_younger_than(errand.program()) && inner_pid(process.pid) == Some(1)).then_some(process)
    }

    /// Where the first process's number is written.
    pub fn pidfile(&self) -> PathBuf {
        self.run.join("pid")
    }

    /// What CRIU says that it restored.
    fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.pidfile()).ok()?.trim().parse().ok()
    }

    /// Goes on from the state in `from`. It is noted in [`Criu::restoring`], which stays. `at_unlock` is a shell's line that is run as soon as connections may work. Returns the
    /// first process.
    ///
    /// # Errors
    /// Why it can't be restored; nothing of it runs.
    pub fn restore(&self, from: &Path, manner: Manner, at_unlock: Option<&str>) -> Outcome<u32> {
        let criu = self.programs.criu()?.to_owned();
        let log = self.run.join("restore.log");
        let _ = fs::remove_file(&log);
        let mut arguments: Vec<OsString> = vec![criu.into(), "restore".into(), "-d".into(), "-D".into(), from.into()];
        arguments.extend([
            "-W".into(),
            self.run.into(),
            "-o".into(),
            log.clone().into(),
            "--root".into(),
            self.root.into(),
        ]);
        arguments.extend(["--pidfile".into(), self.pidfile().into()]);
        arguments.extend(self.common());
        if self.network.is_some() {
            arguments.extend(["--inherit-fd".into(), format!("fd[0]:{NETWORK}").into()]);
        }
        if let Some(line) = at_unlock {
            arguments.extend(["--action-script".into(), write_unlock(self.run, line)?.into()]);
        }
        if manner == Manner::Lazily {
            lazy_pages::serve(self.programs, self.run, from)?;
            arguments.push("--lazy-pages".into());
        }
        let orders =
            Orders::Private(Private { root: self.root.to_owned(), command: arguments, input: self.network.clone() });
        let restored = self.programs.obey(&orders, &self.note());
        match (restored, self.pid()) {
            (Ok(_), Some(pid)) => Ok(pid),
            (Ok(_), None) => Err("CRIU does not say which process it restored".to_owned()),
            (Err(error), pid) => {
                // CRIU ends what it has begun; what it couldn't is ended here.
                if let Some(process) = pid.and_then(Process::of) {
                    process.kill();
                }
                lazy_pages::stop(self.run);
                Err(explain(&log).unwrap_or(error))
            }
        }
    }
}

fn hook(run: &Path) -> PathBuf {
    run.join("hook")
}

/// Writes a script that runs a shell's `line` as soon as connections may work; returns where.
pub(super) fn write_unlock(run: &Path, line: &str) -> Outcome<PathBuf> {
    let (hook, guard) = (hook(run), "[ \"$CRTOOLS_SCRIPT_ACTION\" = network-unlock ] || exit 0");
    write_script(&hook, &format!("#!/bin/sh\n{guard}\n{line}\n"))?;
    Ok(hook)
}

/// How CRIU is told that a network namespace isn't its to save.
pub(super) fn external(network: &Path) -> Outcome<String> {
    let inode = fs::metadata(network).map_err(failed("find the guest's network"))?.ino();
    Ok(format!("net[{inode}]:{NETWORK}"))
}

/// What went wrong by CRIU's log, and what to do about what is known; nothing if it doesn't say.
fn explain(log: &Path) -> Option<String> {
    let text = String::from_utf8_lossy(&fs::read(log).ok()?).into_owned();
    let errors = text.lines().filter_map(|line| line.split_once("Error (")?.1.split_once("): "));
    // It complains of a limit that it can do without.
    let told = errors.map(|(_, told)| told.trim()).filter(|told| !told.contains("RLIMIT_NOFILE for self"));
    let told = told.take(4).collect::<Vec<_>>().join("; ");
    let hint = KNOWN.iter().find(|(sign, _)| text.contains(sign)).map(|(_, fix)| format!(" ({fix})"));
    (!told.is_empty()).then(|| told + &hint.unwrap_or_default())
}

/// Whether a CRIU that dumped was ended before it was done, by its `log`. What it says last it says when connections work again, or when
/// the tree has ended.
pub(super) fn has_died(log: &Path) -> bool {
    let ends = ["Dumping FAILED", "Dumping finished successfully"];
    fs::read(log).is_ok_and(|text| {
        let text = String::from_utf8_lossy(&text);
        !ends.iter().any(|end| text.contains(end))
    })
}

/// What a runtime says that has run CRIU, and what CRIU says in its `log`, which is more.
pub(super) fn with_criu(error: String, log: &Path) -> String {
    match explain(log) {
        Some(told) => format!("{error}: {told}"),
        None => error,
    }
}

/// Signs of what CRIU can't do, and what helps.
const KNOWN: [(&str, &str); 6] = [
    ("Unsupported proto 262", "it holds an MPTCP socket: programs in Go open plain ones with GODEBUG=multipathtcp=0"),
    (
        "io_uring",
        "it uses io_uring, which CRIU can't save: turn it off in the program, or with sysctl kernel.io_uring_disabled=2",
    ),
    ("Can't get rlimit", "saving other users' processes wants CAP_SYS_RESOURCE here: give it to the daemon"),
    ("iptables-restore", "connections can't be locked: install nftables"),
    ("Can't dump ghost file", "a deleted file that is still open is too large"),
    ("soft-dirty", "this kernel can't track written pages"),
];

pub(super) fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

pub(super) fn write_script(path: &Path, text: &str) -> Outcome<()> {
    // A new file: one that is still executed can't be written.
    let _ = fs::remove_file(path);
    fs::write(path, text).map_err(failed("write a script for CRIU"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed("write a script for CRIU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_that_cant_be_noted_freezes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (run, done) = (folder.path().join("run"), folder.path().join("done"));
        fs::create_dir_all(run.join("criu.json")).unwrap();
        write_script(&folder.path().join("criu"), &format!("#!/bin/sh\n[ $1 = check ] || touch {}\n", done.display()))
            .unwrap();
        let programs = Programs::new(folder.path().into(), "layerctl".into(), Some(folder.path().into()));
        let criu = Criu { programs: &programs, run: &run, root: folder.path(), network: None };
        assert!(criu.dump(std::process::id(), folder.path()).unwrap_err().contains("criu.json"));
        assert!(!done.exists() && !criu.is_held());
    }

    #[test]
    fn what_an_earlier_restore_said_is_not_said_of_this_one() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("restore.log");
        fs::write(&log, "(00.1) Error (criu/files.c:1): of an earlier one\n").unwrap();
        assert!(explain(&log).is_some());
        write_script(&folder.path().join("criu"), "#!/bin/sh\n").unwrap();
        let programs = Programs::new(folder.path().into(), "/bin/false".into(), Some(folder.path().into()));
        let criu = Criu { programs: &programs, run: folder.path(), root: folder.path(), network: None };
        let error = criu.restore(folder.path(), Manner::Whole, None).unwrap_err();
        assert!(!error.contains("an earlier one"), "{error}");
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn the_lock_of_a_criu_that_was_ended_is_taken_away_and_no_other() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: a network can't be entered here (it needs root)");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let (deleted, log) = (run.join("deleted"), run.join("dump.log"));
        let nft = "#!/bin/sh\n[ $1 = list ] || exec cat >";
        let ruleset = "printf 'table inet mine {\\n}\\ntable inet CRIU-7 {\\n}\\n'";
        write_script(&run.join("nft"), &format!("{nft}{}\n{ruleset}\n", deleted.display())).unwrap();
        let programs = Programs::new(run.into(), "layerctl".into(), Some(run.into()));
        let criu = Criu { programs: &programs, run, root: run, network: None };
        let dies = |last: &str| {
            let script = format!("#!/bin/sh\n[ $1 = check ] || {{ echo '{last}' >{}; exit 1; }}\n", log.display());
            write_script(&run.join("criu"), &script).unwrap();
            assert!(criu.dump(std::process::id(), run).is_err());
            assert!(!criu.saved().exists());
            let said = fs::read_to_string(&deleted).unwrap_or_default();
            let _ = fs::remove_file(&deleted);
            said
        };
        assert_eq!(dies("(0.1) Error (criu/cr-dump.c:1): Dumping FAILED."), "", "it has taken it away itself");
        assert_eq!(dies("(0.1) Locking network"), "delete table inet CRIU-7\n");
        // One that held the tree.
        fs::write(criu.saved(), serde_json::to_vec(&Process::gone()).unwrap()).unwrap();
        let refuses = format!("#!/bin/sh\n[ $1 = list ] || {{ echo no >&2; exit 1; }}\n{ruleset}\n");
        write_script(&run.join("nft"), &refuses).unwrap();
        let error = criu.resume(Some(std::process::id())).unwrap_err();
        assert!(error.contains("locked") && error.contains("nft list ruleset") && criu.saved().exists(), "{error}");
        write_script(&run.join("nft"), &format!("{nft}{}\n{ruleset}\n", deleted.display())).unwrap();
        criu.resume(Some(std::process::id())).unwrap();
        assert_eq!(fs::read_to_string(&deleted).unwrap(), "delete table inet CRIU-7\n");
        assert!(!criu.saved().exists());
    }
}
