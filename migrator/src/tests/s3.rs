//! An S3 server for tests: it keeps a bucket in memory, and is slow, silent, stubborn or strict as it is told.
//!
//! It needs nothing but the standard library, so that the tests of the command line use it too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// The longest that a test waits for a request.
const PATIENCE: Duration = Duration::from_secs(60);
/// A slow link takes [`State::delay`] for so many bytes.
const PIECE: usize = 64 * 1024;
/// The most keys in one answer, far less than the thousand of a real server.
const PAGE: usize = 2;
/// What an answer that refuses a key holds, and nobody may see.
pub const TOKEN: &str = "very-secret-token";

/// The server; it ends when this is dropped.
pub struct S3 {
    shared: Arc<Shared>,
    address: SocketAddr,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    /// How many uploads were ever begun.
    begun: u64,
    /// The only access key that is taken; every one if none.
    key: Option<String>,
    /// Requests that begin so wait until it is another.
    held: Option<String>,
    /// How many wait.
    holding: usize,
    /// Requests that begin so get this status.
    refused: Option<(String, u16)>,
    /// How long each piece of a body takes.
    delay: Duration,
    /// Parts that come in at this moment, and the most that ever did.
    parts: usize,
    most_parts: usize,
    is_ended: bool,
}

struct Request {
    /// "PUT folder/object", for a part "PUT folder/object part 2", for an end "POST folder/object end".
    line: String,
    method: String,
    key: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, headers: Vec::new(), body: body.into() }
    }

    fn error(status: u16, code: &str) -> Answer {
        let told = format!("<Message>it is so</Message><Token-0>{TOKEN}</Token-0>");
        Answer::new(status, format!("<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code>{told}</Error>"))
    }
}

impl S3 {
    pub fn start() -> S3 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (shared, address) = (Arc::new(Shared::default()), listener.local_addr().unwrap());
        let serving = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.lock().is_ended {
                    break;
                }
                let (shared, Ok(stream)) = (serving.clone(), stream) else { continue };
                // A client that hangs up ends its connection.
                std::thread::spawn(move || while matches!(shared.serve(&stream), Ok(true)) {});
            }
        });
        S3 { shared, address }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Takes no access key but this one from now on.
    pub fn take_only(&self, key: &str) {
        self.shared.change(|state| state.key = Some(key.to_owned()));
    }

    /// Lets requests that begin with `line` wait, or none.
    pub fn hold(&self, line: Option<&str>) {
        self.shared.change(|state| state.held = line.map(str::to_owned));
    }

    /// Waits until a request waits.
    pub fn wait_for_held(&self) {
        let state = self.shared.lock();
        let (_state, waited) = self.shared.changed.wait_timeout_while(state, PATIENCE, |s| s.holding == 0).unwrap();
        assert!(!waited.timed_out(), "no such request came");
    }

    /// Answers requests that begin with `line` with `status`.
    pub fn refuse(&self, line: &str, status: u16) {
        self.shared.change(|state| state.refused = Some((line.to_owned(), status)));
    }

    /// Takes so long for each 64 KiB of a request.
    pub fn delay(&self, delay: Duration) {
        self.shared.change(|state| state.delay = delay);
    }

    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        self.shared.lock().objects.get(key).cloned()
    }

    pub fn put(&self, key: &str, bytes: &[u8]) {
        self.shared.change(|state| drop(state.objects.insert(key.to_owned(), bytes.to_owned())));
    }

    /// How many uploads were ever begun, and how many are neither complete nor aborted.
    pub fn uploads(&self) -> (u64, usize) {
        let state = self.shared.lock();
        (state.begun, state.uploads.len())
    }

    /// The most parts that ever came in at a time.
    pub fn most_parts(&self) -> usize {
        self.shared.lock().most_parts
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.shared.change(|state| state.is_ended = true);
        // Wakes the one who waits for connections.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Answers one request; false when no more come.
    fn serve(&self, stream: &TcpStream) -> std::io::Result<bool> {
        let mut reader = BufReader::new(stream);
        let Some((mut request, length)) = read_head(&mut reader)? else { return Ok(false) };
        let is_part = request.query.contains_key("partNumber");
        self.change(|state| {
            state.parts += usize::from(is_part);
            state.most_parts = state.most_parts.max(state.parts);
        });
        let read = self.read_body(&mut reader, &mut request.body, length);
        self.wait_while_held(&request.line);
        self.change(|state| state.parts -= usize::from(is_part));
        read?;
        let mut answer = self.answer(&request);
        let mut head = format!("HTTP/1.1 {} x\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if request.method == "HEAD" {
            answer.body.clear();
        }
        let mut stream = stream;
        stream.write_all(head.as_bytes())?;
        stream.write_all(b"\r\n")?;
        stream.write_all(&answer.body)?;
        Ok(true)
    }

    fn read_body(&self, reader: &mut impl Read, body: &mut Vec<u8>, length: usize) -> std::io::Result<()> {
        while body.len() < length {
            let mut piece = vec![0; PIECE.min(length - body.len())];
            reader.read_exact(&mut piece)?;
            body.extend(piece);
            let delay = self.lock().delay;
            if !delay.is_zero() {
                std::thread::sleep(delay);
            }
        }
        Ok(())
    }

    fn wait_while_held(&self, line: &str) {
        let is_held = |state: &State| !state.is_ended && state.held.as_ref().is_some_and(|held| line.starts_with(held));
        let mut state = self.lock();
        if is_held(&state) {
            state.holding += 1;
            self.changed.notify_all();
            state = self.changed.wait_while(state, |state| is_held(state)).unwrap();
            state.holding -= 1;
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let mut state = self.lock();
        let given = request.headers.get("authorization").and_then(|text| text.split_once("Credential="));
        let given = given.and_then(|(_, rest)| rest.split_once('/')).map(|(key, _)| key);
        if state.key.as_deref().is_some_and(|key| given != Some(key)) {
            return Answer::error(403, "InvalidToken");
        }
        if let Some((line, status)) = &state.refused
            && request.line.starts_with(line)
        {
            return Answer::error(*status, "Refused");
        }
        let key = request.key.clone();
        let upload = request.query.get("uploadId").cloned();
        match (request.method.as_str(), upload) {
            ("POST", None) if request.query.contains_key("uploads") => {
                state.begun += 1;
                let id = format!("upload-{}", state.begun);
                state.uploads.insert(id.clone(), BTreeMap::new());
                let whose = format!("<Bucket>bucket</Bucket><Key>{key}</Key><UploadId>{id}</UploadId>");
                Answer::new(200, format!("<InitiateMultipartUploadResult>{whose}</InitiateMultipartUploadResult>"))
            }
            ("PUT", Some(id)) => match (state.uploads.get_mut(&id), request.query["partNumber"].parse()) {
                (Some(parts), Ok(number)) => {
                    parts.insert(number, request.body.clone());
                    Answer { headers: vec![("etag", format!("\"{number}\""))], ..Answer::new(200, "") }
                }
                _ => Answer::error(404, "NoSuchUpload"),
            },
            ("POST", Some(id)) => match state.uploads.remove(&id) {
                Some(parts) => {
                    state.objects.insert(key, parts.into_values().flatten().collect());
                    let tag = "<ETag>\"whole\"</ETag>";
                    Answer::new(200, format!("<CompleteMultipartUploadResult>{tag}</CompleteMultipartUploadResult>"))
                }
                None => Answer::error(404, "NoSuchUpload"),
            },
            ("DELETE", Some(id)) => match state.uploads.remove(&id) {
                Some(_) => Answer::new(204, ""),
                None => Answer::error(404, "NoSuchUpload"),
            },
            ("PUT", None) if request.headers.contains_key("if-none-match") && state.objects.contains_key(&key) => {
                Answer::error(412, "PreconditionFailed")
            }
            ("PUT", None) => {
                state.objects.insert(key, request.body.clone());
                Answer { headers: vec![("etag", "\"whole\"".to_owned())], ..Answer::new(200, "") }
            }
            ("DELETE", None) => {
                state.objects.remove(&key);
                Answer::new(204, "")
            }
            ("GET", None) if request.query.contains_key("list-type") => list(&state.objects, &request.query),
            ("GET" | "HEAD", None) => match state.objects.get(&key) {
                Some(object) => part_of(object, request.headers.get("range")),
                None => Answer::error(404, "NoSuchKey"),
            },
            _ => Answer::error(501, "NotImplemented"),
        }
    }
}

/// The object, or the range of it that is asked for.
fn part_of(object: &[u8], range: Option<&String>) -> Answer {
    let tags = || vec![("etag", "\"whole\"".to_owned()), ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT".to_owned())];
    let Some((from, to)) = range.and_then(|text| text.strip_prefix("bytes=")).and_then(|text| text.split_once('-'))
    else {
        return Answer { headers: tags(), ..Answer::new(200, object) };
    };
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
    if from >= object.len() {
        return Answer::error(416, "InvalidRange");
    }
    let to = to.min(object.len() - 1);
    let mut headers = tags();
    headers.push(("content-range", format!("bytes {from}-{to}/{}", object.len())));
    Answer { headers, ..Answer::new(206, &object[from..=to]) }
}

/// One page of a list.
fn list(objects: &BTreeMap<String, Vec<u8>>, query: &BTreeMap<String, String>) -> Answer {
    let (prefix, after) = (query.get("prefix").cloned().unwrap_or_default(), query.get("continuation-token"));
    let all = objects.iter().filter(|(key, _)| key.starts_with(&prefix) && after.is_none_or(|after| *key > after));
    let all: Vec<_> = all.collect();
    let mut text = String::from("<?xml version=\"1.0\"?>\n<ListBucketResult>");
    for (key, bytes) in all.iter().take(PAGE) {
        let about = format!("<Size>{}</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified>", bytes.len());
        text.push_str(&format!("<Contents><Key>{key}</Key>{about}</Contents>"));
    }
    if all.len() > PAGE {
        text.push_str(&format!("<NextContinuationToken>{}</NextContinuationToken>", all[PAGE - 1].0));
    }
    Answer::new(200, text + "</ListBucketResult>")
}

/// What stands before a request's body, and the body's length; none at the end.
fn read_head(reader: &mut impl BufRead) -> std::io::Result<Option<(Request, usize)>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut words = lines[0].split(' ');
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let query: BTreeMap<_, _> = pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decoded(name), decoded(value)))
        .collect();
    let headers = lines[1..].iter().filter_map(|line| line.split_once(':'));
    let headers: BTreeMap<_, _> =
        headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    let key = decoded(path.trim_start_matches('/')).split_once('/').map(|(_, key)| key.to_owned()).unwrap_or_default();
    let mut line = format!("{method} {key}");
    match (query.get("partNumber"), query.contains_key("uploadId")) {
        (Some(number), _) => line.push_str(&format!(" part {number}")),
        (None, true) => line.push_str(" end"),
        (None, false) => {}
    }
    let length = headers.get("content-length").map_or(0, |text| text.parse().unwrap());
    Ok(Some((Request { line, method, key, query, headers, body: Vec::new() }, length)))
}

/// `text` without percent signs.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'%').then(|| after.get(..2)).flatten().and_then(|hex| std::str::from_utf8(hex).ok());
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
