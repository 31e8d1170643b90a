//! HTTP for operations: decodes the request, runs the operation on a thread, answers with JSON, a stream of events or a
//! stream of bytes.
//!
//! An operation is a plain function `fn(&Context, Request) -> Result<Answer>`; it knows no HTTP. When the client goes
//! away, the operation is cancelled.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, any};
use bytes::Bytes;
use futures::Stream;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Frame;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Daemon;
use super::work::{CancelOnDrop, Entry, Reporter, Work};
use crate::api::{self, API_VERSION, Event};
use crate::failure::{Class, Failure, Result};

/// No request is longer, in bytes.
const MAX_REQUEST: usize = 1 << 20;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(200);
/// Events that wait for a slow client.
const EVENTS: usize = 64;
/// Pieces of a stream of bytes that wait for the slower side.
const PIECES: usize = 8;

/// What an operation works with.
pub struct Context {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Progress, items, cancelling.
    pub reporter: Arc<Reporter>,
    runtime: tokio::runtime::Handle,
}

impl Context {
    /// Tells users what the work is: "import debian".
    pub fn label(&self, label: String) {
        self.reporter.work().set_label(label);
    }

    /// Runs `future` beside the operation, and beyond its end.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(future);
    }

    /// The runtime, for those who hand work to it.
    pub fn runtime(&self) -> tokio::runtime::Handle {
        self.runtime.clone()
    }

    /// Runs `future`, from the operation's thread.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }
}

/// Whether an operation is a short question or work, which [`super::life::stop`] doesn't end unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Answers JSON unless events are asked for.
    Short,
    /// Answers events unless JSON is asked for.
    Long,
    /// Work as long as somebody else's command takes. Answers JSON unless events are asked for.
    Any,
}

/// A route to an operation.
pub fn operation<Q, A>(
    name: &'static str,
    length: Length,
    run: fn(&Context, Q) -> Result<A>,
) -> MethodRouter<Arc<Daemon>>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    any(move |State(daemon): State<Arc<Daemon>>, request: Request<Body>| async move {
        let answer = answer(daemon, name, length, request, run).await;
        with_version(answer.unwrap_or_else(|failure| failed(&failure)))
    })
}

async fn answer<Q, A>(
    daemon: Arc<Daemon>,
    name: &'static str,
    length: Length,
    request: Request<Body>,
    run: fn(&Context, Q) -> Result<A>,
) -> Result<Response<Body>>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    if !api::TIMELESS.contains(&name) {
        check_version(request.headers())?;
    }
    let wants_events = wants_events(request.headers(), length);
    let query: Q = read_json(request.into_body()).await?;
    let started = start(daemon, name, length, move |context| run(context, query))?;
    if wants_events { Ok(events(started)) } else { whole(started).await }
}

/// A route to an operation that reads the request's body; the request proper is in a header.
pub fn upload<Q, A>(
    name: &'static str,
    run: fn(&Context, Q, Box<dyn io::Read + Send>) -> Result<A>,
) -> MethodRouter<Arc<Daemon>>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    any(move |State(daemon): State<Arc<Daemon>>, request: Request<Body>| async move {
        let answer = async {
            check_version(request.headers())?;
            let wants_events = wants_events(request.headers(), Length::Long);
            let query: Q = request_in_header(request.headers())?;
            let (pieces, receiver) = mpsc::channel(PIECES);
            let source = Box::new(PieceReader { receiver, current: Bytes::new() });
            let started = start(daemon, name, Length::Long, move |context| run(context, query, source))?;
            tokio::spawn(feed(request.into_body(), pieces, started.work.clone()));
            if wants_events { Ok(events(started)) } else { whole(started).await }
        };
        with_version(answer.await.unwrap_or_else(|failure| failed(&failure)))
    })
}

/// A route to an operation that writes the response's body; its answer or failure follows in a trailer.
pub fn download<Q, A>(
    name: &'static str,
    run: fn(&Context, Q, &mut dyn io::Write) -> Result<A>,
) -> MethodRouter<Arc<Daemon>>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    any(move |State(daemon): State<Arc<Daemon>>, request: Request<Body>| async move {
        let answer = async {
            check_version(request.headers())?;
            let query: Q = read_json(request.into_body()).await?;
            let (pieces, mut receiver) = mpsc::channel(PIECES);
            let mut writer = PieceWriter { pieces };
            let started = start(daemon, name, Length::Long, move |context| run(context, query, &mut writer))?;
            match receiver.recv().await {
                Some(first) => Ok(bytes_response(started, first, receiver)),
                // It ended without a byte: a failure can still have a status of its own.
                None => whole(started).await,
            }
        };
        with_version(answer.await.unwrap_or_else(|failure| failed(&failure)))
    })
}

/// An operation under way; dropped, it is cancelled.
pub struct Started {
    work: Arc<Work>,
    events: mpsc::Receiver<Event>,
    outcome: JoinHandle<Result<serde_json::Value>>,
    /// What came of it, while events are still to be told.
    done: Option<Result<serde_json::Value>>,
    _cancel: CancelOnDrop,
}

/// Begins an operation on a thread.
///
/// # Errors
/// [`Class::Busy`] if the daemon takes no more work.
pub fn start<A: Serialize>(
    daemon: Arc<Daemon>,
    name: &'static str,
    length: Length,
    run: impl FnOnce(&Context) -> Result<A> + Send + 'static,
) -> Result<Started> {
    let entry = daemon.works.begin(name.to_owned(), length != Length::Short)?;
    let work = entry.work().clone();
    let (sender, events) = mpsc::channel(EVENTS);
    let context = Context {
        daemon,
        reporter: Arc::new(Reporter::new(work.clone(), sender)),
        runtime: tokio::runtime::Handle::current(),
    };
    let outcome = tokio::task::spawn_blocking(move || perform(entry, context, run));
    Ok(Started { _cancel: CancelOnDrop(work.clone()), work, events, outcome, done: None })
}

fn perform<A: Serialize>(
    entry: Entry,
    context: Context,
    run: impl FnOnce(&Context) -> Result<A>,
) -> Result<serde_json::Value> {
    let outcome = run(&context).and_then(|answer| {
        serde_json::to_value(answer).map_err(|e| Failure::new(Class::Failure, format!("encoding the answer: {e}")))
    });
    let is_cancelled = entry.work().is_cancelled();
    // The client may act on the answer at once, so the work is over before it is told.
    drop(entry);
    // However it noticed: by asking, or by a source or a sink that was cut off. What was refused hadn't begun.
    let is_its_doing = |failure: &Failure| is_cancelled && failure.class != Class::Busy;
    outcome.map_err(|failure| if is_its_doing(&failure) { layerfs::Error::Cancelled.into() } else { failure })
}

/// What an operation does next.
enum Step {
    /// It tells something.
    Event(Event),
    /// It has ended.
    Done(Result<serde_json::Value>),
}

impl Started {
    /// The work.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
    }

    /// What comes of it. Warnings are in the log.
    pub async fn outcome(&mut self) -> Result<serde_json::Value> {
        loop {
            if let Step::Done(outcome) = self.step().await {
                return outcome;
            }
        }
    }

    /// The next step. Events that were sent before the end come before it.
    async fn step(&mut self) -> Step {
        if self.done.is_none() {
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => return Step::Event(event),
                outcome = &mut self.outcome => self.done = Some(outcome.unwrap_or_else(|error| Err(died(&error)))),
            }
        }
        if let Ok(event) = self.events.try_recv() {
            return Step::Event(event);
        }
        Step::Done(self.done.take().unwrap_or_else(|| Err(layerfs::Error::Cancelled.into())))
    }
}

fn died(error: &tokio::task::JoinError) -> Failure {
    tracing::error!("an operation died: {error}");
    let text =
        "the operation died of a mistake in this program; please report it with daemon.log in the store's folder";
    Failure::new(Class::Failure, text)
}

/// One JSON document. Items, if there are any, are gathered.
async fn whole(mut started: Started) -> Result<Response<Body>> {
    let mut items = Vec::new();
    let mut warnings = Vec::new();
    let mut answer = loop {
        match started.step().await {
            Step::Event(Event::Item(item)) => items.push(item),
            Step::Event(Event::Warning(text)) => warnings.push(text),
            Step::Event(_) => {}
            Step::Done(outcome) => break outcome?,
        }
    };
    if let Some(object) = answer.as_object_mut() {
        if !items.is_empty() {
            object.insert("items".to_owned(), items.into());
        }
        if !warnings.is_empty() {
            object.insert("warnings".to_owned(), warnings.into());
        }
    }
    Ok(json(StatusCode::OK, &answer))
}

/// A stream of events.
fn events(started: Started) -> Response<Body> {
    let mut ticker = tokio::time::interval(TICK);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let first = line(&Event::Started { work: started.work.number });
    let state = Some((started, ticker));
    let rest = futures::stream::unfold(state, |state| async {
        let (mut started, mut ticker) = state?;
        let step = tokio::select! {
            biased;
            step = started.step() => step,
            _ = ticker.tick() => Step::Event(Event::Progress(started.work.progress())),
        };
        match step {
            Step::Event(event) => Some((line(&event), Some((started, ticker)))),
            Step::Done(Ok(answer)) => Some((line(&Event::Result(answer)), None)),
            Step::Done(Err(failure)) => Some((line(&Event::Error(failure)), None)),
        }
    });
    let lines = futures::StreamExt::chain(futures::stream::iter([first]), rest);
    let body = StreamBody::new(futures::StreamExt::map(lines, |line| Ok::<_, io::Error>(Frame::data(line))));
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(api::NDJSON));
    response
}

fn bytes_response(started: Started, first: Bytes, rest: mpsc::Receiver<Bytes>) -> Response<Body> {
    let body = StreamBody::new(pieces(started, first, rest));
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let names = format!("{}, {}", api::TRAILER_RESULT, api::TRAILER_ERROR);
    if let Ok(names) = HeaderValue::from_str(&names) {
        headers.insert(header::TRAILER, names);
    }
    response
}

fn pieces(started: Started, first: Bytes, rest: mpsc::Receiver<Bytes>) -> impl Stream<Item = io::Result<Frame<Bytes>>> {
    futures::stream::unfold(Some((started, Some(first), rest)), |state| async {
        let (mut started, first, mut rest) = state?;
        if let Some(piece) = first {
            return Some((Ok(Frame::data(piece)), Some((started, None, rest))));
        }
        loop {
            tokio::select! {
                biased;
                Some(piece) = rest.recv() => return Some((Ok(Frame::data(piece)), Some((started, None, rest)))),
                step = started.step() => match step {
                    // Nobody reads the events here; the log has the warnings.
                    Step::Event(_) => {}
                    Step::Done(outcome) => {
                        started.done = Some(outcome);
                        rest.close();
                        if let Ok(piece) = rest.try_recv() {
                            return Some((Ok(Frame::data(piece)), Some((started, None, rest))));
                        }
                        return Some((Ok(Frame::trailers(trailers(started.done.take()))), None));
                    }
                },
            }
        }
    })
}

fn trailers(outcome: Option<Result<serde_json::Value>>) -> HeaderMap {
    let (name, text) = match outcome {
        Some(Ok(answer)) => (api::TRAILER_RESULT, api::ascii_json(&answer)),
        Some(Err(failure)) => (api::TRAILER_ERROR, api::ascii_json(&serde_json::json!({ "error": failure }))),
        None => return HeaderMap::new(),
    };
    HeaderValue::from_str(&text).map_or_else(
        |_| HeaderMap::new(),
        |value| HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value)]),
    )
}

fn line(event: &Event) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_else(|_| b"null".to_vec());
    line.push(b'\n');
    line.into()
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    (status, axum::Json(value)).into_response()
}

/// The response that tells `failure`.
pub fn failed(failure: &Failure) -> Response<Body> {
    let status = StatusCode::from_u16(failure.class.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, &serde_json::json!({ "error": failure }))
}

/// Adds this API's version to a response.
pub fn with_version(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(api::HEADER_API, HeaderValue::from(API_VERSION));
    response
}

/// A client that names no version (curl) is taken as it is.
///
/// # Errors
/// [`Class::Unsupported`] if it names another one.
pub fn check_version(headers: &HeaderMap) -> Result<()> {
    match headers.get(api::HEADER_API).map(|value| value.to_str().unwrap_or("?")) {
        None => Ok(()),
        Some(version) if version == API_VERSION.to_string() => Ok(()),
        Some(version) => Err(Failure::new(
            Class::Unsupported,
            format!(
                "this daemon (layerfs {}) speaks version {API_VERSION} of the control API, the client version {version}",
                env!("CARGO_PKG_VERSION")
            ),
        )
        .hint("stop it with `layerctl daemon stop` and repeat the command, which starts the right one")),
    }
}

fn wants_events(headers: &HeaderMap, length: Length) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accept.contains(api::NDJSON) || (length == Length::Long && !accept.contains("application/json"))
}

async fn read_json<Q: DeserializeOwned>(body: Body) -> Result<Q> {
    let body = Limited::new(body, MAX_REQUEST).collect().await;
    let bytes = body.map_err(|e| Failure::invalid(format!("the request cannot be read: {e}")))?.to_bytes();
    parse(if bytes.is_empty() { b"{}" } else { &bytes })
}

/// The request of an operation whose body, or connection, is something else.
///
/// # Errors
/// If it isn't there, or makes no sense.
pub fn request_in_header<Q: DeserializeOwned>(headers: &HeaderMap) -> Result<Q> {
    let header = headers.get(api::HEADER_REQUEST).ok_or_else(|| {
        Failure::invalid(format!("the header {} with the request in JSON is missing", api::HEADER_REQUEST))
    })?;
    parse(header.as_bytes())
}

fn parse<Q: DeserializeOwned>(bytes: &[u8]) -> Result<Q> {
    serde_json::from_slice(bytes)
        .map_err(|e| Failure::invalid(format!("the request makes no sense: {e}; see docs/API.md")))
}

/// Feeds the bytes of `body` to the thread that reads `pieces`. When the work is cancelled the thread gets an error
/// instead of waiting for a client that says no more.
async fn feed(body: Body, pieces: mpsc::Sender<io::Result<Bytes>>, work: Arc<Work>) {
    let mut stream = body.into_data_stream();
    loop {
        let piece = tokio::select! {
            piece = futures::StreamExt::next(&mut stream) => piece,
            () = work.cancelled() => Some(Err(axum::Error::new(layerfs::Error::Cancelled))),
        };
        let Some(piece) = piece else { return };
        let is_end = piece.is_err();
        if pieces.send(piece.map_err(io::Error::other)).await.is_err() || is_end {
            return;
        }
    }
}

struct PieceReader {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl io::Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

struct PieceWriter {
    pieces: mpsc::Sender<Bytes>,
}

impl io::Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.pieces.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
