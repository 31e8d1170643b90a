//! QEMU's control socket: commands and their answers, one at a time.
//!
//! Hides the greeting, events and the framing (a JSON object for each line). Invariant: nothing is waited for without an end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::{Value, json};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// No line of QEMU's is longer, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// Connects to the socket at `path`. QEMU takes one connection after another, and whoever comes when two wait already would wait until it
/// ended.
fn connect(path: &Path, patience: Duration) -> std::io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // It holds for connecting, too.
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::AGAIN) => Err(Errno::TIMEDOUT)?,
        connected => connected?,
    }
    Ok(UnixStream::from(socket))
}

/// A connection to a running QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

type Outcome<T> = Result<T, String>;

fn failed(error: std::io::Error) -> String {
    format!("QEMU's control socket failed: {error}")
}

impl Qmp {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// If nobody answers there as QEMU does.
    pub fn connect(path: &Path) -> Outcome<Qmp> {
        let stream = connect(path, PATIENCE).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        let greeting = qmp.line()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("this is not QEMU's control socket: it says {greeting}"));
        }
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Outcome<Value> {
        let mut line = Vec::new();
        self.reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)?;
        if !line.ends_with(b"\n") {
            return Err("QEMU has ended, or says something endless".to_owned());
        }
        serde_json::from_slice(&line).map_err(|error| format!("QEMU says something that is no JSON: {error}"))
    }

    /// Has QEMU do `command`; returns its answer. Events that come meanwhile are skipped.
    ///
    /// # Errors
    /// What QEMU has against it.
    pub fn call(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes()).map_err(failed)?;
        loop {
            let mut line = self.line()?;
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                let said = error["desc"].as_str().unwrap_or("it says no more");
                return Err(format!("QEMU refuses {command}: {said}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn nobody_waits_without_end_for_one_who_takes_no_connection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let short = Duration::from_millis(50);
        let waiting: Vec<_> = (0..2).map(|_| connect(&path, short).unwrap()).collect();
        let begun = Instant::now();
        assert_eq!(connect(&path, short).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= short);
        drop((listener, waiting));
        assert!(connect(&path, short).is_err());
    }

    #[test]
    fn events_are_skipped_and_refusals_told() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp { reader: BufReader::new(ours) };
        (&theirs)
            .write_all(
                b"{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}}\n{\"error\": {\"desc\": \"no\"}}\n",
            )
            .unwrap();
        assert_eq!(qmp.call("query-status", json!({})).unwrap()["status"], "paused");
        assert_eq!(qmp.call("cont", json!({})).unwrap_err(), "QEMU refuses cont: no");
        let mut asked = String::new();
        BufReader::new(&theirs).read_line(&mut asked).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&asked).unwrap()["execute"], "query-status");
        drop(theirs);
        assert!(qmp.call("cont", json!({})).is_err());
    }
}
