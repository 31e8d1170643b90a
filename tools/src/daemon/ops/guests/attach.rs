//! `/v1/guest-exec-stream`: a connection of the control socket becomes a command's stdin, stdout and stderr, in frames.
//!
//! ```text
//! client ══ frames ══ listen ─▶ feed ─▶ pipe ─▶ command ─▶ pipes ─▶ pump ─▶ write ══ frames ══ client
//! ```
//!
//! Invariants: what waits for the slower side is bounded; the client's end is noticed at once, whatever the command does, and ends that;
//! a command that is to be ended doesn't see the end of its stdin before, and so doesn't take half of it for the whole.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use axum::routing::{MethodRouter, any};
use bytes::Bytes;
use futures::future::join3;
use hyper_util::rt::TokioIo;
use migrator::guest::Pipes;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use crate::api::Event;
use crate::api::frames::{Frame, Kind, PIECE, WINDOW};
use crate::api::guests::GuestExecStream;
use crate::daemon::Daemon;
use crate::daemon::http::{self, Length};
use crate::failure::{Failure, Result};

/// Frames that wait for a slow client.
const FRAMES: usize = 4;

/// The route.
pub fn route() -> MethodRouter<Arc<Daemon>> {
    any(|State(daemon): State<Arc<Daemon>>, request: Request<Body>| async move {
        http::with_version(attach(daemon, request).unwrap_or_else(|failure| http::failed(&failure)))
    })
}

fn attach(daemon: Arc<Daemon>, mut request: Request<Body>) -> Result<Response<Body>> {
    http::check_version(request.headers())?;
    let query: GuestExecStream = http::request_in_header(request.headers())?;
    if !request.headers().contains_key(header::UPGRADE) {
        let failure = Failure::invalid("the command's output comes as frames: ask for `connection: upgrade`");
        return Err(failure.hint("/v1/guest-exec gives it as JSON"));
    }
    let (ours, theirs) = Ours::new(query.stdin).map_err(|e| layerfs::Error::io("making pipes for a command", e))?;
    let upgrade = hyper::upgrade::on(&mut request);
    let mut started =
        http::start(daemon, "guest-exec", Length::Any, move |context| super::exec_stream(context, query, theirs))?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(stream) => {
                let work = started.work().clone();
                serve(TokioIo::new(stream), started.outcome(), || work.cancel(), ours).await;
            }
            // Whoever asked is gone, which ends the command.
            Err(error) => tracing::debug!(%error, "a command's connection was not made"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("layerfs"));
    Ok(response)
}

/// This side's ends of a command's pipes.
struct Ours {
    stdin: Option<pipe::Sender>,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

impl Ours {
    /// New pipes, and the command's ends of them.
    fn new(has_stdin: bool) -> io::Result<(Ours, Pipes)> {
        let (stdin, input) =
            if has_stdin { Some(io::pipe()?).map(|(input, stdin)| (stdin, input)).unzip() } else { (None, None) };
        let ((out, stdout), (err, stderr)) = (io::pipe()?, io::pipe()?);
        let ours = Ours {
            stdin: stdin.map(|stdin| pipe::Sender::from_owned_fd(stdin.into())).transpose()?,
            stdout: pipe::Receiver::from_owned_fd(out.into())?,
            stderr: pipe::Receiver::from_owned_fd(err.into())?,
        };
        Ok((ours, Pipes { stdin: input.map(Into::into), stdout: stdout.into(), stderr: stderr.into() }))
    }
}

/// Joins the command whose end is `outcome` to the client at the other end of `stream`, and calls `cancel` when that goes, or goes away.
/// Returns when the command has ended and the client knows.
async fn serve<S: AsyncRead + AsyncWrite>(
    stream: S,
    outcome: impl Future<Output = Result<serde_json::Value>>,
    cancel: impl Fn(),
    ours: Ours,
) {
    let (from, to) = tokio::io::split(stream);
    let (frames, queue) = mpsc::channel(FRAMES);
    let (pieces, stdin) = mpsc::unbounded_channel();
    let (ended, has_ended) = watch::channel(false);
    let queued = AtomicUsize::new(0);
    let room = if ours.stdin.is_some() { WINDOW } else { 0 };
    let listening = async {
        listen(from, pieces, &queued, room).await;
        cancel();
        pending::<()>().await;
    };
    let telling = async {
        // It goes at the end of this block, which ends the writing.
        let frames = frames;
        let outcome = async {
            let outcome = outcome.await;
            ended.send_replace(true);
            outcome
        };
        let told = join3(
            outcome,
            pump(ours.stdout, Kind::Stdout, &frames, has_ended.clone()),
            pump(ours.stderr, Kind::Stderr, &frames, has_ended.clone()),
        );
        let (outcome, (), ()) = tokio::select! {
            told = told => told,
            never = feed(stdin, ours.stdin, &queued, &frames) => match never {},
        };
        let event = outcome.map_or_else(Event::Error, Event::Result);
        let end = serde_json::to_vec(&event).unwrap_or_default();
        let _ = frames.send(Frame::encode(Kind::End, &end)).await;
    };
    let writing = async {
        if write(to, queue).await.is_err() {
            cancel();
        }
    };
    let mut both = pin!(futures::future::join(telling, writing));
    tokio::select! {
        _ = &mut both => {}
        () = listening => {}
    }
}

/// Reads what the client sends until it goes, or sends what is none of its affair. Never waits for the command.
async fn listen(
    mut from: impl AsyncRead + Unpin,
    pieces: mpsc::UnboundedSender<Bytes>,
    queued: &AtomicUsize,
    room: usize,
) {
    while let Ok(Some(Frame { kind: Kind::Stdin, bytes })) = Frame::read(&mut from).await {
        if queued.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len() > room {
            return;
        }
        // Whether the command reads is its own affair.
        let _ = pieces.send(bytes);
    }
}

/// Gives the command what has come for it, and tells the client that there is room again. Never ends.
async fn feed(
    mut pieces: mpsc::UnboundedReceiver<Bytes>,
    pipe: Option<pipe::Sender>,
    queued: &AtomicUsize,
    frames: &mpsc::Sender<Bytes>,
) -> Infallible {
    if let Some(mut pipe) = pipe {
        let mut room = WINDOW;
        while frames.send(Frame::room(room)).await.is_ok() {
            // The client is gone: this pipe stays open until the command has been killed.
            let Some(piece) = pieces.recv().await else { return pending().await };
            if piece.is_empty() || pipe.write_all(&piece).await.is_err() {
                break;
            }
            room = piece.len();
            queued.fetch_sub(room, Ordering::Relaxed);
        }
    }
    pending().await
}

/// Sends what the command writes to `pipe`, until that ends or the command has.
async fn pump(
    mut pipe: pipe::Receiver,
    kind: Kind,
    frames: &mpsc::Sender<Bytes>,
    mut has_ended: watch::Receiver<bool>,
) {
    let mut piece = vec![0; PIECE];
    loop {
        let read = tokio::select! {
            read = pipe.read(&mut piece) => read,
            _ = has_ended.wait_for(|has_ended| *has_ended) => break,
        };
        match read {
            Ok(count) if count > 0 && frames.send(Frame::encode(kind, &piece[..count])).await.is_ok() => {}
            _ => return,
        }
    }
    // All that it wrote is in the pipe then. What it has left running may go on writing for ever.
    let mut left = rustix::io::ioctl_fionread(&pipe).map_or(0, |left| left as usize);
    while left > 0 {
        let most = left.min(piece.len());
        match rustix::io::read(&pipe, &mut piece[..most]) {
            Ok(count) if count > 0 && frames.send(Frame::encode(kind, &piece[..count])).await.is_ok() => left -= count,
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

/// Writes the frames to the client until there are no more.
async fn write(mut to: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Bytes>) -> io::Result<()> {
    while let Some(frame) = queue.recv().await {
        to.write_all(&frame).await?;
        to.flush().await?;
    }
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use tokio::io::{DuplexStream, duplex};
    use tokio::sync::Notify;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::failure::Class;

    /// A script that a client is attached to, as a command of a guest would be; cancelled, it is killed.
    fn attached(script: &str, has_stdin: bool) -> (DuplexStream, JoinHandle<()>) {
        let (ours, Pipes { stdin, stdout, stderr }) = Ours::new(has_stdin).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(stdin.map_or_else(Stdio::null, Stdio::from)).stdout(stdout).stderr(stderr);
        let mut child = command.process_group(0).spawn().unwrap();
        drop(command);
        // Smaller than the window and than a pipe: each has to wait for the other.
        let (client, stream) = duplex(4096);
        let cancelled = Arc::new(Notify::new());
        let cancelling = cancelled.clone();
        let outcome = async move {
            loop {
                tokio::select! {
                    () = cancelled.notified() => {
                        // As it takes a moment until a real one is killed.
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        kill(&mut child);
                        return Err(Failure::new(Class::Interrupted, "cancelled"));
                    }
                    () = tokio::time::sleep(Duration::from_millis(5)) => {
                        if let Some(status) = child.try_wait().unwrap() {
                            return Ok(serde_json::json!({ "code": status.code() }));
                        }
                    }
                }
            }
        };
        (client, tokio::spawn(serve(stream, outcome, move || cancelling.notify_one(), ours)))
    }

    fn kill(child: &mut Child) {
        let group = rustix::process::Pid::from_child(child);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        child.wait().unwrap();
    }

    /// What comes until the end: stdout, stderr, and the last word.
    async fn all(client: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, Vec<u8>, serde_json::Value) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            let frame = Frame::read(client).await.unwrap().unwrap();
            match frame.kind {
                Kind::Stdout => out.extend_from_slice(&frame.bytes),
                Kind::Stderr => err.extend_from_slice(&frame.bytes),
                Kind::Room => {}
                Kind::Stdin => panic!("stdin from the daemon"),
                Kind::End => {
                    assert!(Frame::read(client).await.unwrap().is_none(), "something after the end");
                    return (out, err, serde_json::from_slice(&frame.bytes).unwrap());
                }
            }
        }
    }

    #[tokio::test]
    async fn bytes_come_as_they_are_and_apart_with_the_exit_code() {
        let (mut client, served) = attached(r"printf 'a\0\377'; printf err >&2; exit 7", false);
        let (out, err, end) = all(&mut client).await;
        assert_eq!((&out[..], &err[..]), (&b"a\0\xff"[..], &b"err"[..]));
        assert_eq!(end, serde_json::json!({ "result": { "code": 7 } }));
        served.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_sent_is_read_as_there_is_room_and_has_an_end() {
        let (client, served) = attached("cat; echo over >&2", true);
        let (mut from, mut to) = tokio::io::split(client);
        let sent: Vec<u8> = (0..5 * WINDOW).map(|n| (n % 251) as u8).collect();
        let (rooms, mut told) = mpsc::unbounded_channel();
        let expected = sent.clone();
        let sending = async move {
            let (mut room, mut rest) = (0, &sent[..]);
            while !rest.is_empty() {
                if room == 0 {
                    room += told.recv().await.unwrap();
                    // What came before all of it was read.
                    while let Ok(more) = told.try_recv() {
                        room += more;
                    }
                }
                assert!(room <= WINDOW, "room for {room} bytes");
                let (piece, after) = rest.split_at(room.min(rest.len()).min(PIECE));
                to.write_all(&Frame::encode(Kind::Stdin, piece)).await.unwrap();
                (room, rest) = (room - piece.len(), after);
            }
            to.write_all(&Frame::encode(Kind::Stdin, &[])).await.unwrap();
            pending::<()>().await;
        };
        let reading = async {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            loop {
                let frame = Frame::read(&mut from).await.unwrap().unwrap();
                match frame.kind {
                    Kind::Stdout => out.extend_from_slice(&frame.bytes),
                    Kind::Stderr => err.extend_from_slice(&frame.bytes),
                    Kind::Room => drop(rooms.send(frame.room_for().unwrap())),
                    _ => return (out, err),
                }
            }
        };
        let (out, err) = tokio::select! {
            both = reading => both,
            () = sending => unreachable!(),
        };
        assert!(out == expected && err == b"over\n", "{} bytes, {err:?}", out.len());
        served.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_goes_ends_a_command_that_does_not_look() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        // It takes what it gets for the whole when it sees its end.
        let script = format!("cat >{0}.part; mv {0}.part {0}; sleep 600", file.display());
        let (mut client, served) = attached(&script, true);
        assert_eq!(Frame::read(&mut client).await.unwrap().unwrap().room_for().unwrap(), WINDOW);
        client.write_all(&Frame::encode(Kind::Stdin, b"half")).await.unwrap();
        drop(client);
        served.await.unwrap();
        assert!(!file.exists(), "it has taken half for the whole");
        // Nor does one that has all of its window to read.
        let (mut client, served) = attached("sleep 600", true);
        for _ in 0..WINDOW / PIECE {
            client.write_all(&Frame::encode(Kind::Stdin, &[0; PIECE])).await.unwrap();
        }
        client.shutdown().await.unwrap();
        let (_, _, end) = all(&mut client).await;
        assert_eq!(end["error"]["class"], "interrupted", "{end}");
        served.await.unwrap();
    }

    #[tokio::test]
    async fn more_than_there_is_room_for_is_not_taken() {
        for has_stdin in [true, false] {
            let (client, served) = attached("sleep 600", has_stdin);
            let (mut from, mut to) = tokio::io::split(client);
            let sending = async {
                while to.write_all(&Frame::encode(Kind::Stdin, &[0; PIECE])).await.is_ok() {}
                pending::<()>().await;
            };
            let (_, _, end) = tokio::select! {
                told = all(&mut from) => told,
                () = sending => unreachable!(),
            };
            assert_eq!(end["error"]["class"], "interrupted", "{end}");
            served.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_a_command_leaves_running_holds_nobody_up() {
        let (mut client, served) = attached("(while echo more; do :; done) & sleep 0.1; exit 3", false);
        let (out, err, end) = all(&mut client).await;
        assert_eq!(end, serde_json::json!({ "result": { "code": 3 } }));
        assert!(out.starts_with(b"more\n") && err.is_empty(), "{err:?}");
        served.await.unwrap();
    }
}
