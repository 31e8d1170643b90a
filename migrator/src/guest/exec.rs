//! Commands that run inside of guests, and programs that work on guests: what they write is kept in memory, but not without end, and
//! they end when nobody waits for them any more.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use layerfs::monitor::Monitor;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::processes::{Process, wait_until};

/// So much of what a command writes is kept, and of what it complains about, in bytes.
const MOST: usize = 16 << 20;
/// So much of it is read at a time.
const PIECE: usize = 64 << 10;
/// So often that holds all that a pipe may have in it.
const LAST: usize = (1 << 20) / PIECE;
/// So soon it is noticed that nobody waits any more.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a program gets that is only asked something, or told what is done at once.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// How long what was killed gets to end. What the kernel holds up ends later.
const END_PATIENCE: Duration = Duration::from_secs(60);

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
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    start(command).and_then(|child| ended(child, ANSWER_PATIENCE))
}

/// As [`Command::status`], of a program that gets `patience`.
///
/// # Errors
/// As [`answer`].
pub(super) fn status(command: &mut Command, patience: Duration) -> Result<ExitStatus, String> {
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

/// As [`Command::output`], of which the beginning is kept; that there was more stands at the end of the complaints. None if
/// `monitor` was cancelled before: the command is killed then, with its descendants and its process group.
pub(super) fn output(command: &mut Command, monitor: &dyn Monitor) -> io::Result<Option<Output>> {
    within(command, MOST, monitor)
}

fn within(command: &mut Command, most: usize, monitor: &dyn Monitor) -> io::Result<Option<Output>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.process_group(0).spawn()?;
    let followed = follow(&mut child, most, monitor);
    if !matches!(followed, Ok(Some(_))) {
        end(child);
    }
    followed
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
    if out.is_cut || err.is_cut {
        let note = format!("\n(only the first {most} bytes of what it wrote are kept)\n");
        err.bytes.extend_from_slice(note.as_bytes());
    }
    Ok(Some(Output { status, stdout: out.bytes, stderr: err.bytes }))
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
    use std::sync::atomic::{AtomicU32, Ordering};

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

    fn run(script: &str, monitor: &dyn Monitor) -> Option<Output> {
        within(Command::new("/bin/sh").args(["-c", script]), 1000, monitor).unwrap()
    }

    #[test]
    fn endless_output_is_cut_and_the_command_runs_to_its_end() {
        let run = |script: &str| run(script, &Silent).unwrap();
        let short = run("printf out; printf err >&2; exit 3");
        assert_eq!((&*short.stdout, &*short.stderr, short.status.code()), (&b"out"[..], &b"err"[..], Some(3)));
        let long = run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 4");
        assert_eq!((long.stdout.len(), long.status.code()), (1000, Some(4)));
        let note = String::from_utf8_lossy(&long.stderr[1000..]).into_owned();
        assert!(note.contains("first 1000 bytes"), "{note}");
        let silent = run("exec >&- 2>&-; sleep 0.2; exit 5");
        assert_eq!((silent.stdout.len(), silent.status.code()), (0, Some(5)));
    }

    #[test]
    fn what_a_command_leaves_running_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; printf done; exit 6", file.display());
        let output = run(&script, &Silent).unwrap();
        assert_eq!((&*output.stdout, output.status.code()), (&b"done"[..], Some(6)));
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
