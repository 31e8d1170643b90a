//! Commands that run inside of guests, and programs that work on guests: what is kept of what they write is kept in memory, but not without
//! end, and they end when nobody waits for them any more.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use layerfs::monitor::Monitor;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::processes::{Process, wait_until};
use super::{ExecOutput, Guest};
use crate::error::Result;

/// So much of what a command writes is kept, and of what it complains about, in bytes.
const MOST: usize = 16 << 20;
/// So much of it is read at a time.
const PIECE: usize = 64 << 10;
/// So often that holds all that a pipe may have in it.
const LAST: usize = (1 << 20) / PIECE;
/// So soon it is noticed that nobody waits any more.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// How long a program gets that is only asked something, or told what is done at once.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// How long what was killed gets to end. What the kernel holds up ends later.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// What a command inside of a guest reads and writes: its ends of pipes, which it alone has while it runs.
#[derive(Debug)]
pub struct Pipes {
    /// What it reads; there is nothing to be read if it is missing.
    pub stdin: Option<OwnedFd>,
    /// What it writes to.
    pub stdout: OwnedFd,
    /// What it complains to.
    pub stderr: OwnedFd,
}

/// Runs `argv` in `guest`, as [`Guest::exec`] does, with nothing to read, and keeps the beginning of what it writes; that there was more
/// stands at the end of the complaints.
///
/// # Errors
/// As [`Guest::exec`].
pub fn output(guest: &dyn Guest, argv: &[OsString], monitor: &dyn Monitor) -> Result<ExecOutput> {
    let (code, stdout, stderr) = gather(MOST, |pipes| guest.exec(argv, pipes, monitor))?;
    Ok(ExecOutput { code, stdout, stderr })
}

/// What `exec` returns and writes to the pipes that it gets, of which the beginning is kept.
fn gather<T>(most: usize, exec: impl FnOnce(Pipes) -> Result<T>) -> Result<(T, Vec<u8>, Vec<u8>)> {
    let failed = |error: io::Error| layerfs::Error::io("reading what a command writes", error);
    let (out, stdout) = io::pipe().map_err(failed)?;
    let (err, stderr) = io::pipe().map_err(failed)?;
    let mut read = (Beginning::of(Some(out)).map_err(failed)?, Beginning::of(Some(err)).map_err(failed)?);
    let has_ended = AtomicBool::new(false);
    let (told, seen) = std::thread::scope(|scope| {
        let reading = scope.spawn(|| read_both(&mut read, most, &has_ended));
        let told = exec(Pipes { stdin: None, stdout: stdout.into(), stderr: stderr.into() });
        has_ended.store(true, Ordering::SeqCst);
        (told, reading.join())
    });
    let told = told?;
    seen.unwrap_or_else(|_| Err(io::Error::other("its reader died"))).map_err(failed)?;
    let (stdout, stderr) = kept(read, most);
    Ok((told, stdout, stderr))
}

/// Reads what is written to the pipes until nobody has them any more, or `has_ended`.
fn read_both(
    (out, err): &mut (Beginning<PipeReader>, Beginning<PipeReader>),
    most: usize,
    has_ended: &AtomicBool,
) -> io::Result<()> {
    loop {
        // All that it wrote is in the pipes when it has ended. What it has left running may hold them open for ever.
        let is_last = has_ended.load(Ordering::SeqCst);
        let pipes = [&out.pipe, &err.pipe].into_iter().flatten();
        let mut waits: Vec<PollFd<'_>> = pipes.map(|pipe| PollFd::new(pipe, PollFlags::IN)).collect();
        if waits.is_empty() {
            return Ok(());
        }
        match poll(&mut waits, Some(if is_last { &NO_TIME } else { &LOOK })) {
            Err(Errno::INTR) => continue,
            ready => ready?,
        };
        for _ in 0..if is_last { LAST } else { 1 } {
            out.read_on(most)?;
            err.read_on(most)?;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// Runs `command` with `pipes` to its end, and returns its exit code, or that of a shell (128 + signal) if it was killed. None if `monitor`
/// was cancelled before: the command is killed then, with its descendants and its process group.
pub(super) fn run(command: &mut Command, pipes: Pipes, monitor: &dyn Monitor) -> io::Result<Option<i32>> {
    let Pipes { stdin, stdout, stderr } = pipes;
    command.stdin(stdin.map_or_else(Stdio::null, Stdio::from)).stdout(stdout).stderr(stderr);
    let spawned = command.process_group(0).spawn();
    // From now on nobody has the pipes but who was started.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = spawned?;
    let followed = follow(&mut child, 0, monitor);
    if !matches!(followed, Ok(Some(_))) {
        end(child);
    }
    let code = |status: ExitStatus| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(followed?.map(|output| code(output.status)))
}

/// Waits until then.
struct Deadline(Instant);

impl Monitor for Deadline {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        Instant::now() >= self.0
    }
}

/// As [`Command::output`], of a program that gets [`ANSWER_PATIENCE`].
///
/// # Errors
/// If it can't be run, or hasn't ended by then, in words; it is killed then as by [`output`].
pub(super) fn answer(command: &mut Command) -> Result<Output, String> {
    answer_to(command, None, ANSWER_PATIENCE)
}

/// The same, of a program that gets `patience`, and `input` to read.
///
/// # Errors
/// As [`answer`].
pub(super) fn answer_to(command: &mut Command, input: Option<&[u8]>, patience: Duration) -> Result<Output, String> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = start(command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input.map(<[u8]>::to_vec)) {
        // One that doesn't read all holds nobody up: what it doesn't want ends with it. It says itself why it ends before.
        std::thread::spawn(move || pipe.write_all(&input));
    }
    ended(child, patience)
}

/// As [`Command::status`], of a program that gets `patience`.
///
/// # Errors
/// As [`answer`].
pub(crate) fn status(command: &mut Command, patience: Duration) -> Result<ExitStatus, String> {
    start(command).and_then(|child| ended(child, patience)).map(|output| output.status)
}

fn start(command: &mut Command) -> Result<Child, String> {
    command.process_group(0).spawn().map_err(|error| format!("it cannot be run: {error}"))
}

/// What `child` has written when it has ended; it leads its process group.
///
/// # Errors
/// As [`answer`], after `patience`.
pub(super) fn ended(mut child: Child, patience: Duration) -> Result<Output, String> {
    let followed = follow(&mut child, MOST, &Deadline(Instant::now() + patience));
    let error = match followed {
        Ok(Some(output)) => return Ok(output),
        Ok(None) => format!("it hasn't ended after {patience:?}"),
        Err(error) => format!("it cannot be waited for: {error}"),
    };
    let pid = child.id();
    match end(child) {
        true => Err(format!("{error}, and was killed")),
        false => Err(format!("{error}; process {pid} or what it has started was killed and does not end")),
    }
}

fn follow(child: &mut Child, most: usize, monitor: &dyn Monitor) -> io::Result<Option<Output>> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let (mut out, mut err) = (Beginning::of(child.stdout.take())?, Beginning::of(child.stderr.take())?);
    loop {
        if monitor.is_cancelled() {
            return Ok(None);
        }
        let pipes = [out.pipe.as_ref().map(AsFd::as_fd), err.pipe.as_ref().map(AsFd::as_fd)];
        let mut waits = vec![PollFd::new(&process, PollFlags::IN)];
        waits.extend(pipes.into_iter().flatten().map(|pipe| PollFd::from_borrowed_fd(pipe, PollFlags::IN)));
        match poll(&mut waits, Some(&LOOK)) {
            Err(Errno::INTR) => continue,
            ready => ready?,
        };
        let has_ended = !waits[0].revents().is_empty();
        // All that it wrote is in the pipes when it has ended. What it has left running may hold them open for ever.
        for _ in 0..if has_ended { LAST } else { 1 } {
            out.read_on(most)?;
            err.read_on(most)?;
        }
        if has_ended {
            break;
        }
    }
    // Not before: until then its number, by which it is killed, is nobody else's.
    let status = child.wait()?;
    let (stdout, stderr) = kept((out, err), most);
    Ok(Some(Output { status, stdout, stderr }))
}

/// The beginnings of what was written and complained, with a note if there was more.
fn kept<O, E>((out, mut err): (Beginning<O>, Beginning<E>), most: usize) -> (Vec<u8>, Vec<u8>) {
    if out.is_cut || err.is_cut {
        let note = format!("\n(only the first {most} bytes of what it wrote are kept)\n");
        err.bytes.extend_from_slice(note.as_bytes());
    }
    (out.bytes, err.bytes)
}

/// Kills `child`, which leads its process group, and what it has started. False if something of that doesn't end.
pub(super) fn end(mut child: Child) -> bool {
    let tree = Process::of(child.id()).map(|process| process.tree()).unwrap_or_default();
    let all: Vec<Process> = tree.into_iter().filter_map(Process::of).collect();
    // Parents first: they start nothing more then.
    all.iter().for_each(Process::kill);
    // What its parent has left behind. One that has just ended is what was wanted.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let has_ended = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
    let is_over = wait_until(END_PATIENCE, || has_ended(&mut child) && !all.iter().any(Process::is_alive));
    if !has_ended(&mut child) {
        std::thread::spawn(move || child.wait());
    }
    is_over
}

/// The beginning of what comes out of a pipe. The rest is read too: a command that nobody reads would wait.
struct Beginning<P> {
    /// None when it has ended.
    pipe: Option<P>,
    bytes: Vec<u8>,
    is_cut: bool,
}

impl<P: Read + AsFd> Beginning<P> {
    fn of(pipe: Option<P>) -> io::Result<Beginning<P>> {
        if let Some(pipe) = &pipe {
            ioctl_fionbio(pipe, true)?;
        }
        Ok(Beginning { pipe, bytes: Vec::new(), is_cut: false })
    }

    /// Reads a piece, if there is one.
    fn read_on(&mut self, most: usize) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        let mut piece = [0; PIECE];
        match pipe.read(&mut piece) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                let kept = count.min(most - self.bytes.len());
                self.bytes.extend_from_slice(&piece[..kept]);
                self.is_cut |= kept < count;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::AtomicU32;

    use layerfs::monitor::Silent;

    use super::*;

    /// Is cancelled when that is so.
    struct Until<F>(F);

    impl<F: Fn() -> bool + Send + Sync> Monitor for Until<F> {
        fn phase(&self, _: &str, _: Option<u64>) {}
        fn advance(&self, _: u64) {}
        fn items(&self, _: u64) {}
        fn warn(&self, _: &str) {}
        fn is_cancelled(&self) -> bool {
            (self.0)()
        }
    }

    /// The exit code of `script`, what it wrote and what it complained, if it wasn't cancelled.
    fn run(script: &str, monitor: &dyn Monitor) -> Option<(i32, Vec<u8>, Vec<u8>)> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let gathered = gather(1000, |pipes| Ok(super::run(&mut command, pipes, monitor).unwrap()));
        let (code, stdout, stderr) = gathered.unwrap();
        Some((code?, stdout, stderr))
    }

    #[test]
    fn endless_output_is_cut_and_the_command_runs_to_its_end() {
        let run = |script: &str| run(script, &Silent).unwrap();
        assert_eq!(run("printf out; printf err >&2; exit 3"), (3, b"out".to_vec(), b"err".to_vec()));
        assert_eq!(run("cat; kill -9 $$"), (137, Vec::new(), Vec::new()));
        let (code, out, err) = run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 4");
        assert_eq!((code, out.len()), (4, 1000));
        let note = String::from_utf8_lossy(&err[1000..]).into_owned();
        assert!(note.contains("first 1000 bytes"), "{note}");
        assert_eq!(run("exec >&- 2>&-; sleep 0.2; exit 5"), (5, Vec::new(), Vec::new()));
    }

    #[test]
    fn a_command_alone_has_its_pipes() {
        let ((stdin, mut to), (mut out, stdout), (_err, stderr)) =
            (io::pipe().unwrap(), io::pipe().unwrap(), io::pipe().unwrap());
        let pipes = Pipes { stdin: Some(stdin.into()), stdout: stdout.into(), stderr: stderr.into() };
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read -r line; exec <&-; printf '%s' \"$line\"; exec >&-; sleep 600"]);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let running = scope.spawn(|| super::run(&mut command, pipes, &Until(|| is_over.load(Ordering::SeqCst))));
            io::Write::write_all(&mut to, b"line\n").unwrap();
            let mut said = String::new();
            // Its end comes while the command goes on; nor does anybody else read.
            out.read_to_string(&mut said).unwrap();
            assert_eq!(said, "line");
            let closed = io::Write::write_all(&mut to, b"more").unwrap_err();
            assert_eq!(closed.kind(), io::ErrorKind::BrokenPipe);
            is_over.store(true, Ordering::SeqCst);
            assert_eq!(running.join().unwrap().unwrap(), None);
        });
    }

    #[test]
    fn what_a_command_leaves_running_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; printf done; exit 6", file.display());
        assert_eq!(run(&script, &Silent).unwrap(), (6, b"done".to_vec(), Vec::new()));
        let left = Process::of(fs::read_to_string(file).unwrap().trim().parse().unwrap()).unwrap();
        assert!(left.is_alive());
        left.kill();
    }

    #[test]
    fn a_command_that_nobody_waits_for_is_killed_with_what_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let pids = || -> Vec<u32> {
            let text = fs::read_to_string(&file).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect()
        };
        // Itself, a child in another session, and one whose parent has ended; all have its pipes.
        let script = format!(
            "setsid sleep 600 & echo $! >>{0}; sh -c 'sleep 600 & echo $! >>{0}'; echo $$ >>{0}; exec sleep 600",
            file.display()
        );
        assert!(run(&script, &Until(|| pids().len() == 3)).is_none());
        for pid in pids() {
            let is_gone = || Process::of(pid).is_none_or(|process| !process.is_alive());
            assert!(wait_until(Duration::from_secs(10), is_gone), "{pid} of {:?}", pids());
        }
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_with_what_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; wait", file.display());
        let mut command = Command::new("/bin/sh");
        let child = start(command.args(["-c", &script])).unwrap();
        assert!(wait_until(ANSWER_PATIENCE, || fs::read_to_string(&file).is_ok_and(|pid| pid.ends_with('\n'))));
        let error = ended(child, Duration::from_secs(1)).unwrap_err();
        assert!(error.contains("after 1s, and was killed"), "{error}");
        let left = Process::of(fs::read_to_string(file).unwrap().trim().parse().unwrap());
        assert!(left.is_none_or(|left| !left.is_alive()));
        let answered = answer(Command::new("/bin/sh").args(["-c", "printf out; exit 3"])).unwrap();
        assert_eq!((&*answered.stdout, answered.status.code()), (&b"out"[..], Some(3)));
        assert!(answer(&mut Command::new("/no/such/program")).unwrap_err().contains("cannot be run"));
    }

    #[test]
    fn a_command_that_says_nothing_or_never_stops_to_can_be_cancelled_too() {
        for script in ["exec >&- 2>&-; exec sleep 600", "exec yes"] {
            let looks = AtomicU32::new(0);
            assert!(run(script, &Until(|| looks.fetch_add(1, Ordering::SeqCst) > 20)).is_none(), "{script}");
        }
    }
}
