//! The client's side of the control API: HTTP over the store's Unix socket, one connection per operation.
//!
//! Ctrl-C during an operation cancels it in the daemon and waits for the daemon's word that nothing is half-done; a
//! second one leaves at once.

mod attach;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::api::{self, Cancel, Empty, Event, Progress};
use crate::failure::{Class, Failure, Result};
use crate::output::Output;
use crate::progress::Display;

type Body = BoxBody<Bytes, std::io::Error>;

/// No event of the API is longer than this, in bytes.
const MAX_LINE: usize = 16 << 20;
/// How long a successor may take to start.
const SUCCESSOR: Duration = Duration::from_secs(30);
/// How long a daemon's process may take to end after it has answered that it does.
const LEAVING: Duration = Duration::from_secs(60);
/// The pieces in which stdin is sent, in bytes.
const PIECE: usize = 256 * 1024;

/// A client of one store's daemon.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
    /// Where short operations' warnings are told.
    output: Option<Output>,
}

impl Client {
    /// A client of the daemon that listens on `socket`.
    pub fn new(socket: &Path) -> Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::from(layerfs::Error::io("starting the runtime", e)))?;
        Ok(Client { socket: socket.to_owned(), runtime, output: None })
    }

    /// The same client, which tells the warnings of short operations to `output`; those of long ones are told by their display.
    #[must_use]
    pub fn telling(self, output: Output) -> Client {
        Client { output: Some(output), ..self }
    }

    /// Whether a daemon answers on the socket: one that is dying may still take connections.
    ///
    /// # Errors
    /// [`Class::Denied`] if it is another user's.
    pub fn is_answered(&self) -> Result<bool> {
        let asked = self.runtime.block_on(async {
            let answer = self.send(json_request("status", "application/json", &Empty {})?).await?;
            answer.into_body().collect().await.map_err(|_| cut_off())
        });
        match asked {
            Ok(_) => Ok(true),
            Err(failure) if failure.class == Class::Denied => Err(failure),
            Err(_) => Ok(false),
        }
    }

    /// The daemon's process; none if it can't be seen from here, as in another PID namespace.
    fn process(&self) -> Option<OwnedFd> {
        let stream = self.runtime.block_on(connect(&self.socket)).ok()?;
        let pid = stream.peer_cred().ok()?.pid()?;
        pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
    }

    /// Does a short operation.
    pub fn call<Q: Serialize, R: DeserializeOwned>(&self, operation: &str, request: &Q) -> Result<R> {
        self.runtime.block_on(async {
            let response = self.send(json_request(operation, "application/json", request)?).await?;
            if !api::TIMELESS.contains(&operation) {
                check_version(&response)?;
            }
            let status = response.status();
            let body = response.into_body().collect().await.map_err(|_| cut_off())?.to_bytes();
            if !status.is_success() {
                return Err(decode_failure(&body));
            }
            if let Some(output) = self.output {
                warnings(&body).iter().for_each(|text| output.warn(text));
            }
            decode(&body)
        })
    }

    /// Does an operation whose answer is a stream of events; shows its progress and gives its items to `item`.
    pub fn work<Q: Serialize, R: DeserializeOwned>(
        &self,
        operation: &str,
        request: &Q,
        display: &mut Display,
        item: &mut dyn FnMut(serde_json::Value) -> Result<()>,
    ) -> Result<R> {
        self.runtime.block_on(async {
            let request = json_request(operation, api::NDJSON, request)?;
            self.follow(request, display, item).await
        })
    }

    /// Does an operation that reads `source`, such as stdin.
    pub fn upload<Q: Serialize, R: DeserializeOwned>(
        &self,
        operation: &str,
        request: &Q,
        source: impl Read + Send + 'static,
        display: &mut Display,
    ) -> Result<R> {
        self.runtime.block_on(async {
            let builder = builder(operation).header("accept", api::NDJSON);
            let builder = builder.header("content-type", "application/octet-stream");
            let builder = builder.header(api::HEADER_REQUEST, api::ascii_json(request));
            let request =
                builder.body(BodyExt::boxed(StreamBody::new(frames(source)))).map_err(|e| wrong_request(&e))?;
            self.follow(request, display, &mut |_| Ok(())).await
        })
    }

    /// Does an operation that answers with bytes, and writes them to `out`.
    pub fn download<Q: Serialize, R: DeserializeOwned>(
        &self,
        operation: &str,
        request: &Q,
        out: &mut dyn Write,
        display: &mut Display,
    ) -> Result<R> {
        self.runtime.block_on(async {
            let mut request = json_request(operation, "application/octet-stream", request)?;
            request.headers_mut().insert("te", hyper::header::HeaderValue::from_static("trailers"));
            let response = self.begin(request).await?;
            let trailers = tokio::select! {
                trailers = pour(response.into_body(), out, display) => trailers?,
                _ = tokio::signal::ctrl_c() => return Err(interrupted()),
            };
            if let Some(failure) = trailers.get(api::TRAILER_ERROR) {
                return Err(decode_failure(failure.as_bytes()));
            }
            match trailers.get(api::TRAILER_RESULT) {
                Some(result) => decode(result.as_bytes()),
                None => Err(cut_off()),
            }
        })
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let stream = connect(&self.socket).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|_| cut_off())?;
        tokio::spawn(async move {
            // Its failure shows in the response too.
            let _ = connection.with_upgrades().await;
        });
        sender.send_request(request).await.map_err(|_| cut_off())
    }

    /// Sends a request that may take long; returns the answer once it turns out to be none of failure.
    async fn begin(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let response = tokio::select! {
            response = self.send(request) => response?,
            _ = tokio::signal::ctrl_c() => return Err(interrupted()),
        };
        check_version(&response)?;
        if !response.status().is_success() {
            return Err(decode_failure(&body_of(response).await?));
        }
        Ok(response)
    }

    async fn follow<R: DeserializeOwned>(
        &self,
        request: Request<Body>,
        display: &mut Display,
        item: &mut dyn FnMut(serde_json::Value) -> Result<()>,
    ) -> Result<R> {
        let response = self.begin(request).await?;
        let mut events = Events::new(response.into_body());
        let mut work = None;
        let mut is_cancelled = false;
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                _ = tokio::signal::ctrl_c() => {
                    display.finish();
                    let Some(work) = work.filter(|_| !is_cancelled) else { return Err(interrupted()) };
                    is_cancelled = true;
                    self.cancel(work).await?;
                    continue;
                }
            };
            match event.ok_or_else(cut_off)? {
                Event::Started { work: number } => work = Some(number),
                Event::Progress(progress) if !is_cancelled => display.update(progress),
                Event::Progress(_) => {}
                Event::Warning(text) => display.warn(&text),
                Event::Item(value) => item(value)?,
                Event::Result(value) => {
                    display.finish();
                    return serde_json::from_value(value).map_err(|e| strange(&e));
                }
                Event::Error(failure) => {
                    display.finish();
                    return Err(failure);
                }
            }
        }
    }

    async fn cancel(&self, work: u64) -> Result<()> {
        let request = json_request("cancel", "application/json", &Cancel { work })?;
        self.send(request).await?;
        Ok(())
    }
}

/// Connects to a socket whose path may be longer than the 107 bytes that an address holds: then it is a symbolic link
/// to where the socket really is.
async fn connect(socket: &Path) -> Result<UnixStream> {
    let target = match std::fs::read_link(socket) {
        Ok(target) => target,
        Err(_) => socket.to_owned(),
    };
    UnixStream::connect(&target).await.map_err(|error| not_reached(&target, &error))
}

fn not_reached(target: &Path, error: &std::io::Error) -> Failure {
    let target = target.display();
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Failure::new(Class::Denied, format!("not allowed to talk to the daemon at {target}: {error}"))
                .hint("the store belongs to another user; use your own (--store) or become that user")
        }
        _ => Failure::new(Class::Failure, format!("cannot reach the daemon at {target}: {error}")),
    }
}

fn builder(operation: &str) -> hyper::http::request::Builder {
    let builder = Request::post(format!("/v1/{operation}")).header("host", "layerfs");
    builder.header(api::HEADER_API, api::API_VERSION.to_string())
}

fn json_request<Q: Serialize>(operation: &str, accept: &str, request: &Q) -> Result<Request<Body>> {
    // Of what requests hold, nothing else has no form in JSON.
    let body = serde_json::to_vec(request).map_err(|_| {
        Failure::invalid("a path of this command is not UTF-8, and the daemon takes no other").hint("rename it first")
    })?;
    let builder = builder(operation).header("accept", accept).header("content-type", "application/json");
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed();
    builder.body(body).map_err(|e| wrong_request(&e))
}

async fn body_of(response: Response<Incoming>) -> Result<Bytes> {
    Ok(response.into_body().collect().await.map_err(|_| cut_off())?.to_bytes())
}

fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed()
}

/// `source` as a request's body.
fn frames(
    source: impl Read + Send + 'static,
) -> impl futures::Stream<Item = std::io::Result<Frame<Bytes>>> + Send + Sync {
    futures::stream::unfold(pieces(source, PIECE), |mut receiver| async move {
        let piece = receiver.recv().await?;
        Some((piece.map(Frame::data), receiver))
    })
}

/// `source` in pieces of up to `most` bytes. A thread reads it, so that a slow one doesn't hold up the events.
fn pieces(mut source: impl Read + Send + 'static, most: usize) -> mpsc::Receiver<std::io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(4);
    std::thread::spawn(move || {
        loop {
            let mut piece = vec![0; most];
            let read = match source.read(&mut piece) {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    Ok(Bytes::from(piece))
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let is_end = read.is_err();
            if sender.blocking_send(read).is_err() || is_end {
                return;
            }
        }
    });
    receiver
}

async fn pour(mut body: Incoming, out: &mut dyn Write, display: &mut Display) -> Result<HeaderMap> {
    let mut progress = Progress { phase: "writing".to_owned(), ..Progress::default() };
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame.map_err(|_| cut_off())?.into_data() {
            Ok(data) => {
                out.write_all(&data)?;
                progress.bytes += data.len() as u64;
                display.update(progress.clone());
            }
            Err(frame) => {
                if let Ok(map) = frame.into_trailers() {
                    trailers.extend(map);
                }
            }
        }
    }
    out.flush()?;
    display.finish();
    Ok(trailers)
}

/// Cuts a response into events, one per line.
struct Events {
    body: http_body_util::BodyDataStream<Incoming>,
    buffer: BytesMut,
    scanned: usize,
}

impl Events {
    fn new(body: Incoming) -> Events {
        Events { body: body.into_data_stream(), buffer: BytesMut::new(), scanned: 0 }
    }

    async fn next(&mut self) -> Result<Option<Event>> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.scanned + end + 1);
                self.scanned = 0;
                return decode(&line).map(Some);
            }
            self.scanned = self.buffer.len();
            if self.scanned > MAX_LINE {
                return Err(Failure::new(Class::Failure, "the daemon sent a line without end"));
            }
            match self.body.next().await {
                Some(data) => self.buffer.extend_from_slice(&data.map_err(|_| cut_off())?),
                None => return Ok(None),
            }
        }
    }
}

fn check_version(response: &Response<Incoming>) -> Result<()> {
    let theirs = response.headers().get(api::HEADER_API).and_then(|value| value.to_str().ok());
    match theirs {
        Some(version) if version == api::API_VERSION.to_string() => Ok(()),
        _ => Err(Failure::new(
            Class::Unsupported,
            format!(
                "the daemon speaks version {} of the control API, this program version {}",
                theirs.unwrap_or("0"),
                api::API_VERSION
            ),
        )
        .hint("stop it with `layerctl daemon stop` and repeat the command, which starts the right one")),
    }
}

fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|e| strange(&e))
}

/// The warnings that were gathered into an answer.
fn warnings(answer: &[u8]) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Warned {
        #[serde(default)]
        warnings: Vec<String>,
    }
    decode::<Warned>(answer).map(|warned| warned.warnings).unwrap_or_default()
}

fn decode_failure(json: &[u8]) -> Failure {
    #[derive(serde::Deserialize)]
    struct Wrapped {
        error: Failure,
    }
    match serde_json::from_slice::<Wrapped>(json) {
        Ok(wrapped) => wrapped.error,
        Err(_) => Failure::new(Class::Failure, format!("the daemon answered {:?}", String::from_utf8_lossy(json))),
    }
}

fn interrupted() -> Failure {
    Failure::new(Class::Interrupted, "interrupted")
}

/// What broke the connection off, in HTTP's words, helps nobody: the daemon died, was killed or stopped.
fn cut_off() -> Failure {
    Failure::new(Class::Failure, "the daemon went away before it had finished")
        .hint("its log tells why: daemon.log in the store's folder. What was done is kept; repeat the command")
}

fn strange(error: &serde_json::Error) -> Failure {
    Failure::new(Class::Failure, format!("the daemon's answer makes no sense to this version: {error}"))
}

fn wrong_request(error: &hyper::http::Error) -> Failure {
    Failure::invalid(format!("the request cannot be sent: {error}"))
}

/// Asks the daemon to leave its mounts to a successor, and waits until that one answers. Returns what it says of itself.
///
/// # Errors
/// [`Class::Failure`] if none does, or if systemd will start it only after this, the command of its reload, has ended.
pub fn restart(client: &Client, force: bool) -> Result<api::Status> {
    let before: api::Status = client.call("status", &Empty {})?;
    let process = if is_systemds_reload(before.pid) { client.process() } else { None };
    let _: Empty = client.call("stop", &api::Stop { force, hand_over: true, to_caller: false })?;
    let began = Instant::now();
    loop {
        if let Ok(after) = client.call::<_, api::Status>("status", &Empty {})
            && (after.pid, after.instance) != (before.pid, before.instance)
        {
            return Ok(after);
        }
        if process.as_ref().is_some_and(|process| has_ended(process, Duration::ZERO).unwrap_or(false)) {
            let text =
                "the daemon could not become the one that is installed now, and has ended; systemd starts another";
            return Err(Failure::new(Class::Failure, text).hint("its log tells why"));
        }
        if began.elapsed() > SUCCESSOR {
            let text = "the daemon has left, but no other answers; daemon.log in the store says why";
            return Err(Failure::new(Class::Failure, text));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether systemd runs this command to reload the daemon `pid`.
fn is_systemds_reload(pid: u32) -> bool {
    std::env::var("MAINPID").is_ok_and(|main| main == pid.to_string())
}

/// Asks the daemon on `socket` to stop, whatever its version, and waits until its process has ended: it holds the store
/// for a moment after its last answer.
pub fn stop(client: &Client, how: api::Stop) -> Result<()> {
    let process = client.process();
    let _: Empty = client.call("stop", &how)?;
    match process {
        Some(process) => wait_for_end(&process),
        None => {
            while client.is_answered()? {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
    }
}

/// Waits until a process has ended.
fn wait_for_end(process: &OwnedFd) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < LEAVING {
        if has_ended(process, Duration::from_secs(1))? {
            return Ok(());
        }
    }
    let text = format!("the daemon has stopped, but its process is there still after {} s", LEAVING.as_secs());
    Err(Failure::new(Class::Busy, text).hint("its log tells what it does: daemon.log in the store's folder"))
}

/// Whether a process has ended, or does within `wait`.
fn has_ended(process: &OwnedFd, wait: Duration) -> Result<bool> {
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
    match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&wait)) {
        Ok(0) | Err(Errno::INTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => Err(layerfs::Error::io("waiting for the daemon's end", std::io::Error::from(error)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_found_in_any_answer() {
        assert_eq!(warnings(br#"{"layers": [], "warnings": ["a", "b"]}"#), ["a", "b"]);
        assert!(warnings(b"{}").is_empty() && warnings(b"[]").is_empty());
    }
}
