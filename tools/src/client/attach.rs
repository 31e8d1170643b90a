//! The client's side of a command in a guest: its stdin, stdout and stderr are this program's.
//!
//! Ctrl-C ends the command in the guest and waits for the daemon's word that it has; a second one leaves at once, and the command is
//! ended all the same.

use std::future::pending;
use std::io::Read;
use std::pin::pin;

use bytes::Bytes;
use hyper::StatusCode;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::{Client, builder, check_version, cut_off, decode, decode_failure, interrupted, wrong_request};
use crate::api::frames::{Frame, Kind, PIECE};
use crate::api::guests::{GuestExecStream, GuestExit};
use crate::api::{self, Event};
use crate::failure::{Failure, Result};
use crate::output::Output;

/// Pieces of output that wait to be written.
const PIECES: usize = 4;
/// Commands are no longer, in bytes of JSON: the daemon takes no longer heads.
const LONGEST: usize = 256 << 10;

impl Client {
    /// Runs a command in a guest, which reads `stdin`, if the request says that it does, and writes to this program's stdout and stderr.
    pub fn attach(
        &self,
        request: &GuestExecStream,
        stdin: impl Read + Send + 'static,
        output: Output,
    ) -> Result<GuestExit> {
        let text = api::ascii_json(request);
        if text.len() > LONGEST {
            let failure = Failure::invalid(format!("the command has more than {LONGEST} bytes"));
            return Err(failure.hint("send the most of it by stdin (-i)"));
        }
        self.runtime.block_on(async {
            let builder = builder("guest-exec-stream").header(api::HEADER_REQUEST, text);
            let builder = builder.header("connection", "upgrade").header("upgrade", "layerfs");
            let request_sent = builder.body(super::empty()).map_err(|e| wrong_request(&e))?;
            let response = tokio::select! {
                response = self.send(request_sent) => response?,
                _ = tokio::signal::ctrl_c() => return Err(interrupted()),
            };
            check_version(&response)?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let body = super::body_of(response).await?;
                return Err(decode_failure(&body));
            }
            let stream = hyper::upgrade::on(response).await.map_err(|_| cut_off())?;
            let (from, to) = tokio::io::split(TokioIo::new(stream));
            let (room, leaving) = (Semaphore::new(0), Notify::new());
            let pieces = request.stdin.then(|| super::pieces(stdin, PIECE));
            let mut reading = pin!(show(from, &room, output));
            let mut feeding = pin!(feed(to, pieces, &room, &leaving));
            let mut is_leaving = false;
            loop {
                tokio::select! {
                    told = &mut reading => return told,
                    failure = &mut feeding => return Err(failure),
                    _ = tokio::signal::ctrl_c() => {
                        if is_leaving {
                            return Err(interrupted());
                        }
                        is_leaving = true;
                        leaving.notify_one();
                    }
                }
            }
        })
    }
}

/// Writes what the command writes, until its end.
async fn show(mut from: impl AsyncRead + Unpin, room: &Semaphore, output: Output) -> Result<GuestExit> {
    let (pieces, written) = writer(output);
    loop {
        let frame = Frame::read(&mut from).await.ok().flatten().ok_or_else(cut_off)?;
        match frame.kind {
            Kind::Stdout | Kind::Stderr => {
                if pieces.send((frame.kind, frame.bytes)).await.is_err() {
                    break;
                }
            }
            Kind::Room => room.add_permits(frame.room_for().map_err(|_| cut_off())?),
            Kind::Stdin => return Err(cut_off()),
            Kind::End => {
                drop(pieces);
                written.await.unwrap_or(Ok(()))?;
                return match decode(&frame.bytes)? {
                    Event::Result(result) => serde_json::from_value(result).map_err(|e| super::strange(&e)),
                    Event::Error(failure) => Err(failure),
                    _ => Err(cut_off()),
                };
            }
        }
    }
    // Nobody reads it any more, which ends the command.
    drop(pieces);
    written.await.unwrap_or(Ok(()))?;
    Err(cut_off())
}

/// A thread that writes to stdout and stderr, which may wait for whoever reads them.
fn writer(output: Output) -> (mpsc::Sender<(Kind, Bytes)>, oneshot::Receiver<std::io::Result<()>>) {
    let (sender, mut pieces) = mpsc::channel::<(Kind, Bytes)>(PIECES);
    let (done, written) = oneshot::channel();
    std::thread::spawn(move || {
        let mut outcome = Ok(());
        while let Some((kind, bytes)) = pieces.blocking_recv() {
            outcome = output.pass(kind == Kind::Stderr, &bytes);
            if outcome.is_err() {
                break;
            }
        }
        drop(pieces);
        let _ = done.send(outcome);
    });
    (sender, written)
}

/// Sends `pieces` as there is room for them, and leaves when it is told to. Returns only if stdin can't be read.
async fn feed(
    mut to: impl AsyncWrite + Unpin,
    mut pieces: Option<mpsc::Receiver<std::io::Result<Bytes>>>,
    room: &Semaphore,
    leaving: &Notify,
) -> Failure {
    let sending = async {
        let Some(pieces) = &mut pieces else { return pending().await };
        while let Some(piece) = pieces.recv().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => return Failure::from(layerfs::Error::io("reading stdin", error)),
            };
            if let Ok(permit) = room.acquire_many(piece.len() as u32).await {
                permit.forget();
            }
            // That the other side is gone shows in what it says.
            if to.write_all(&Frame::encode(Kind::Stdin, &piece)).await.is_err() {
                return pending().await;
            }
        }
        let _ = to.write_all(&Frame::encode(Kind::Stdin, &[])).await;
        pending().await
    };
    tokio::select! {
        failure = sending => return failure,
        () = leaving.notified() => {}
    }
    // It ends the command, and says when it has.
    let _ = to.shutdown().await;
    pending().await
}
