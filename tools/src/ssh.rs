//! Transfers through the user's own ssh: starts it, and joins its input and output to the daemon.
//!
//! ```text
//! daemon ←socket→ layerctl push ←pipes→ ssh … sshd ←pipes→ layerctl stdio ←socket→ daemon
//! ```
//!
//! Hides the plumbing. Invariants: ssh runs here, in the user's session, with the user's config, agent and terminal;
//! nothing is written to any of its files; no byte is looked at on its way.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::api::peers::StreamFailed;
use crate::api::{API_VERSION, Empty, HEADER_API, HEADER_STREAM};
use crate::autostart;
use crate::client::Client;
use crate::config::Settings;
use crate::failure::{Class, Failure, Result};

/// Names the program to run instead of `ssh`, with arguments that all its calls get.
pub const ENV_SSH: &str = "LAYERFS_SSH";
/// The pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long ssh may take to end by itself when the transfer is over.
const GOOD_BYE: Duration = Duration::from_secs(3);
/// What a shell says of a program that isn't there, and ssh of its own failures.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
const SSH_FAILED: i32 = 255;

/// `ssh://[user@]host[:port][/path-to-store]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `[user@]host`, as ssh takes it.
    pub host: String,
    /// The port, if not ssh's own choice.
    pub port: Option<u16>,
    /// The store's folder there, if not its default.
    pub store: Option<String>,
}

impl Target {
    /// Whether `peer` is meant to be one.
    pub fn is_meant(peer: &str) -> bool {
        peer.starts_with("ssh://")
    }

    /// Parses an address.
    ///
    /// # Errors
    /// [`Class::Invalid`].
    pub fn parse(text: &str) -> Result<Target> {
        let wrong = || Failure::invalid(format!("{text:?} is no ssh address; use ssh://[USER@]HOST[:PORT][/STORE]"));
        let rest = text.strip_prefix("ssh://").ok_or_else(wrong)?;
        let (place, store) = match rest.split_once('/') {
            Some((place, path)) => (place, Some(format!("/{path}")).filter(|path| path != "/")),
            None => (rest, None),
        };
        let (user, host_port) = match place.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, place),
        };
        let (host, port) = match host_port.strip_prefix('[') {
            Some(v6) => {
                let (host, rest) = v6.split_once(']').ok_or_else(wrong)?;
                (host, rest.strip_prefix(':'))
            }
            None => match host_port.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (host_port, None),
            },
        };
        // What begins with a dash would be an option to ssh.
        let is_bad = |part: &str| part.is_empty() || part.starts_with('-') || part.contains(char::is_whitespace);
        if is_bad(host) || user.is_some_and(is_bad) {
            return Err(wrong());
        }
        let port = port.map(|port| port.parse().map_err(|_| wrong())).transpose()?;
        let host = user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}"));
        Ok(Target { host, port, store })
    }

    fn command(&self, remote: &str) -> Command {
        let words = std::env::var(ENV_SSH).unwrap_or_default();
        let mut words = words.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or("ssh"));
        command.args(words).args(["-T", "-x"]);
        if let Some(port) = self.port {
            command.args(["-p", &port.to_string()]);
        }
        let mut line = format!("{} stdio", quoted(remote));
        if let Some(store) = &self.store {
            line.push_str(&format!(" --store {}", quoted(store)));
        }
        command.args(["--", &self.host, &line]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// `text` as one word for the shell at the other side.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%".contains(c);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// The sessions of one transfer. Dropping it ends them.
pub struct Sessions {
    /// The number under which the transfer awaits them.
    pub stream: u64,
    state: Arc<State>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    is_over: AtomicBool,
    child: Mutex<Option<Child>>,
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let began = std::time::Instant::now();
            while !thread.is_finished() && began.elapsed() < GOOD_BYE {
                std::thread::sleep(Duration::from_millis(10));
            }
            if !thread.is_finished()
                && let Some(child) = self.state.child.lock().as_mut()
            {
                let _ = child.kill();
            }
            let _ = thread.join();
        }
    }
}

impl Sessions {
    /// Starts ssh to `target`, and again whenever it ends before the transfer does. Sessions come to the daemon of
    /// `settings`.
    pub fn start(settings: &Settings, target: &Target, remote: Option<&str>) -> Sessions {
        let stream = u64::from(std::process::id()) << 32
            | u64::from(std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.subsec_nanos()));
        let state = Arc::new(State::default());
        let (settings, target, shared) = (settings.clone(), target.clone(), state.clone());
        let remote = remote.unwrap_or("layerctl").to_owned();
        let thread = std::thread::spawn(move || keep_up(&settings, &target, &remote, stream, &shared));
        Sessions { stream, state, thread: Some(thread) }
    }
}

fn keep_up(settings: &Settings, target: &Target, remote: &str, stream: u64, state: &State) {
    let mut pause = FIRST_PAUSE;
    let mut has_worked = false;
    while !state.is_over.load(Ordering::SeqCst) {
        match session(settings, target, remote, stream, state) {
            Ok(()) => {
                has_worked = true;
                pause = FIRST_PAUSE;
            }
            Err(_) if has_worked || state.is_over.load(Ordering::SeqCst) => {}
            Err(failure) => {
                let told = Client::new(&autostart::socket_path(&settings.store))
                    .and_then(|client| client.call::<_, Empty>("stream-failed", &StreamFailed { stream, failure }));
                drop(told);
                return;
            }
        }
        if !state.is_over.load(Ordering::SeqCst) {
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// One run of ssh. Fails if nothing came from the other side.
fn session(settings: &Settings, target: &Target, remote: &str, stream: u64, state: &State) -> Result<()> {
    let mut command = target.command(remote);
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|error| {
        Failure::new(Class::NotFound, format!("cannot start {program}: {error}"))
            .hint(format!("install an SSH client, or name one with {ENV_SSH}"))
    })?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    *state.child.lock() = Some(child);
    let said = std::thread::spawn(move || stderr.map(echo).unwrap_or_default());
    let mut first = vec![0; 64 * 1024];
    // The other side speaks first, as soon as it is there.
    let mut stdout = stdout.ok_or_else(|| Failure::new(Class::Failure, "ssh has no output"))?;
    let count = stdout.read(&mut first).unwrap_or(0);
    if count == 0 {
        let child = state.child.lock().take();
        let status = child.map(|mut child| child.wait());
        let code = status.and_then(|status| status.ok()).and_then(|status| status.code());
        return Err(explained(target, remote, code, &said.join().unwrap_or_default()));
    }
    let joined = join(settings, stream, &first[..count], stdin, stdout);
    let child = state.child.lock().take();
    if let Some(mut child) = child {
        // Its input has ended, so it ends too; if the link is dead, it would do so too late.
        let _ = child.kill();
        let _ = child.wait();
    }
    let _ = said.join();
    joined
}

fn join(
    settings: &Settings,
    stream: u64,
    first: &[u8],
    stdin: Option<impl Write + Send + 'static>,
    mut stdout: impl Read,
) -> Result<()> {
    let (mut socket, mut reader) = upgrade(settings, &stream.to_string())?;
    let back = std::thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            let _ = pour(&mut reader, &mut stdin);
        }
    });
    if socket.write_all(first).is_ok() {
        let _ = pour(&mut stdout, &mut socket);
    }
    let _ = socket.shutdown(std::net::Shutdown::Write);
    // The daemon may still have words for the other side, but not without end.
    drop(socket);
    let _ = back.join();
    Ok(())
}

/// A connection to the daemon that has become a stream.
fn upgrade(settings: &Settings, purpose: &str) -> Result<(UnixStream, UnixStream)> {
    let target = autostart::socket_target(&settings.store);
    let failed = |error: std::io::Error| Failure::file("connect to", &target, error);
    let mut socket = UnixStream::connect(&target).map_err(failed)?;
    let head = format!(
        "POST /v1/stream HTTP/1.1\r\nhost: layerfs\r\n{HEADER_API}: {API_VERSION}\r\n{HEADER_STREAM}: {purpose}\r\n\
         connection: upgrade\r\nupgrade: layerfs\r\ncontent-length: 0\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).map_err(failed)?;
    // Byte by byte: what follows the head is the stream's.
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") && answer.len() < 8192 && socket.read(&mut byte).map_err(failed)? == 1 {
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"HTTP/1.1 101") {
        let line = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
        return Err(Failure::new(Class::Unsupported, format!("the daemon does not open a stream: {line}"))
            .hint("stop it with `layerctl daemon stop` and repeat the command, which starts the right one"));
    }
    let reader = socket.try_clone().map_err(failed)?;
    Ok((socket, reader))
}

/// Copies until either side ends, and hands on each piece at once.
fn pour(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Shows what ssh and the other side say, and keeps the end of it.
#[allow(clippy::print_stderr)] // It is ssh's own stderr, passed on.
fn echo(stderr: impl Read) -> String {
    let mut last = Vec::new();
    for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
        eprintln!("{line}");
        last.push(line);
        if last.len() > 4 {
            last.remove(0);
        }
    }
    last.join("\n")
}

fn explained(target: &Target, remote: &str, code: Option<i32>, said: &str) -> Failure {
    let host = &target.host;
    let words = if said.trim().is_empty() { String::new() } else { format!(": {}", said.trim()) };
    match code {
        Some(SSH_FAILED) if said.contains("Host key verification failed") || said.contains("HOST IDENTIFICATION") => {
            Failure::new(Class::Denied, format!("ssh does not trust the host key of {host}{words}"))
                .hint(format!("connect once with `ssh {host}` and compare the key, or mend your known_hosts"))
        }
        Some(SSH_FAILED) if said.contains("Permission denied") => {
            Failure::new(Class::Denied, format!("{host} does not let you in{words}"))
                .hint(format!("`ssh {host}` must work first: keys, agent and user are those of your own ssh"))
        }
        Some(SSH_FAILED) => Failure::new(Class::Network, format!("ssh to {host} failed{words}"))
            .hint(format!("`ssh {host}` must work first")),
        Some(NOT_FOUND | NOT_EXECUTABLE) => {
            Failure::new(Class::NotFound, format!("there is no {remote} on {host}{words}"))
                .hint("install layerctl there, or name it with --remote-layerctl PATH")
        }
        Some(code) => Failure::new(Class::Network, format!("layerctl on {host} ended with exit code {code}{words}")),
        None => Failure::new(Class::Network, format!("ssh to {host} was killed{words}")),
    }
}

/// `layerctl stdio`: joins this process's input and output to the daemon, for whoever started it.
///
/// # Errors
/// If there is no daemon to be had.
pub fn stdio(settings: &Settings) -> Result<()> {
    let (mut socket, mut reader) = upgrade(settings, "serve")?;
    std::thread::spawn(move || {
        let _ = pour(&mut std::io::stdin().lock(), &mut socket);
        let _ = socket.shutdown(std::net::Shutdown::Write);
    });
    // The daemon ends it, having said all.
    let _ = pour(&mut reader, &mut std::io::stdout().lock());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let target = |text: &str| Target::parse(text).map(|t| (t.host, t.port, t.store));
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(target("ssh://host").unwrap(), ("host".into(), None, None));
        assert_eq!(target("ssh://me@host:2222/srv/it").unwrap(), ("me@host".into(), Some(2222), some("/srv/it")));
        assert_eq!(target("ssh://[::1]:22/").unwrap(), ("::1".into(), Some(22), None));
        for wrong in ["ssh://", "ssh://-oProxyCommand=x", "ssh://-u@host", "ssh://host:port", "ssh://a b", "host"] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn words_for_the_other_shell() {
        assert_eq!(quoted("/srv/store-1"), "/srv/store-1");
        assert_eq!(quoted("it's $HOME"), "'it'\\''s $HOME'");
    }
}
