//! Commands that run inside of guests: what they write is kept in memory, but not without end.

use std::io::{self, Read};
use std::process::{Command, Output, Stdio};

/// So much of what a command writes is kept, and of what it complains about, in bytes.
const MOST: u64 = 16 << 20;

/// As [`Command::output`], of which the beginning is kept; that there was more stands at the end of the complaints.
pub(super) fn output(command: &mut Command) -> io::Result<Output> {
    within(command, MOST)
}

fn within(command: &mut Command, most: u64) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err) = std::thread::scope(|scope| {
        let out = scope.spawn(|| beginning(out, most));
        let err = beginning(err, most);
        (out.join().unwrap_or_else(|_| Err(io::Error::other("reading panicked"))), err)
    });
    let status = child.wait()?;
    let ((stdout, out_is_cut), (mut stderr, err_is_cut)) = (out?, err?);
    if out_is_cut || err_is_cut {
        let note = format!("\n(only the first {most} bytes of what it wrote are kept)\n");
        stderr.extend_from_slice(note.as_bytes());
    }
    Ok(Output { status, stdout, stderr })
}

/// The first `most` bytes of `pipe`, and whether there were more, which are read too: a command that nobody reads would wait.
fn beginning(pipe: Option<impl Read>, most: u64) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let Some(mut pipe) = pipe else { return Ok((bytes, false)) };
    pipe.by_ref().take(most).read_to_end(&mut bytes)?;
    let is_cut = io::copy(&mut pipe, &mut io::sink())? > 0;
    Ok((bytes, is_cut))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_output_is_cut_and_the_command_runs_to_its_end() {
        let run = |script: &str| within(Command::new("/bin/sh").args(["-c", script]), 1000).unwrap();
        let short = run("printf out; printf err >&2; exit 3");
        assert_eq!((&*short.stdout, &*short.stderr, short.status.code()), (&b"out"[..], &b"err"[..], Some(3)));
        let long = run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 4");
        assert_eq!((long.stdout.len(), long.status.code()), (1000, Some(4)));
        let note = String::from_utf8_lossy(&long.stderr[1000..]).into_owned();
        assert!(note.contains("first 1000 bytes"), "{note}");
    }
}
