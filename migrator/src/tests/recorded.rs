//! A session recorded below TLS, read by the independent decoder in `tests/decoder`, which was written from PROTOCOL.md
//! and FORMAT.md alone: that they are enough, and that what goes over the wire is what they say.

use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use super::pair::*;
use crate::link::{Link, Patience};
use crate::listener::serve_peer;
use crate::peers::{Rights, Visible};
use crate::progress::Tally;
use crate::receive::{self, Terms};
use crate::send;
use crate::wire::Message;
use crate::wire::golden::golden_frames;

/// The decoder's exit code when it lacks what it needs.
const CANNOT_RUN: i32 = 77;

/// What was written, by which side: a `u8`, a `u32` length and the bytes, again and again.
#[derive(Clone, Default)]
struct Recording(Arc<Mutex<Vec<u8>>>);

impl Recording {
    fn add(&self, side: u8, bytes: &[u8]) {
        let mut record = self.0.lock();
        record.push(side);
        record.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        record.extend_from_slice(bytes);
    }
}

/// One end of a connection whose writes are recorded.
struct Tapped {
    stream: DuplexStream,
    side: u8,
    recording: Recording,
}

impl AsyncRead for Tapped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, out)
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        // What the other side answers must stand behind what it answers to.
        let recording = self.recording.clone();
        let mut record = recording.0.lock();
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &result {
            record.push(self.side);
            record.extend_from_slice(&(*count as u32).to_le_bytes());
            record.extend_from_slice(&bytes[..*count]);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What the decoder should make of a layer.
fn expected(layer: layerfs::LayerId, tree: &Tree) -> Value {
    let entry = |(name, bytes): (&String, &Vec<u8>)| {
        json!([format!("/{name}"), "file", bytes.len(), blake3::hash(bytes).to_hex().as_str()])
    };
    let entries: Vec<Value> = tree.iter().map(entry).collect();
    json!({ "layer": layer.0.to_string(), "entries": entries })
}

/// Runs the decoder over `recording`; `None` if it can't run here.
#[allow(clippy::print_stderr)] // A test that cannot run says so.
fn decode(recording: &Recording) -> Option<Value> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*recording.0.lock()).unwrap();
    // Of the clone in which this runs; it may have been built in another.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let program = Path::new(&here).join("../tests/decoder/decode.py");
    let output = match Command::new("python3").arg("-B").arg(program).arg(file.path()).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: python3 cannot be run: {error}");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(CANNOT_RUN) {
        eprintln!("SKIPPED: {}", said.trim());
        return None;
    }
    assert!(output.status.success(), "{said}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_independent_decoder_reads_a_session() {
    let (here, there) = (Host::new(), Host::new());
    there.know("here", here.node.public_key(), None, Rights::default());
    here.know("there", there.node.public_key(), None, Rights::default());
    let text: Vec<u8> = (0..6000).flat_map(|n| format!("line {n} of a text that compresses\n").into_bytes()).collect();
    let mut files = tree(30, 150_000);
    files.insert("text".to_owned(), text.clone());
    files.insert("memory".to_owned(), noise(9, 130_000));
    let base = add_layer(here.store(), "base", &files);
    let mut changed = files.clone();
    changed.get_mut("large").unwrap()[70_000] ^= 1;
    changed.get_mut("memory").unwrap()[30_000] ^= 1;
    changed.get_mut("text").unwrap().splice(100_000..100_000, *b"something new ");
    let next = add_layer(here.store(), "next", &changed);
    let mut later = changed.clone();
    later.get_mut("memory").unwrap()[50_000] ^= 1;
    let last = add_layer(here.store(), "last", &later);
    let other_files: Tree = [("other".to_owned(), noise(7, 40_000)), ("small".to_owned(), b"x".to_vec())].into();
    let other = add_layer(there.store(), "other", &other_files);

    let recording = Recording::default();
    golden_frames().iter().for_each(|frame| recording.add(2, frame));
    let (caller, listener) = tokio::io::duplex(1 << 20);
    let tapped = |stream, side| Tapped { stream, side, recording: recording.clone() };
    let mut listening = Link::start(tapped(listener, 1), "here", Patience::default());
    let (node, peer) = (there.node.clone(), there.node.peers().get("here").unwrap());
    let serving = tokio::spawn(async move {
        serve_peer(&node, &peer, &mut listening).await.unwrap();
        listening.close().await;
    });
    let mut link = Link::start(tapped(caller, 0), "there", Patience::default());
    for (pushed, is_dry) in [("base", true), ("base", false), ("next", false), ("next", false), ("last", false)] {
        let prepared = send::prepare(here.store(), &[name(pushed)], &Visible::All, false).unwrap().dry_run(is_dry);
        // Changed pages go alone then.
        let prepared = if pushed == "last" { prepared.in_a_hurry() } else { prepared };
        send::run(&mut link, here.store(), &prepared, &Arc::new(Tally::new()), &silent()).await.unwrap();
    }
    link.send(Message::Fetch { names: vec![name("other")], dry_run: false }).await.unwrap();
    let terms = Terms::of_pull(&here.node, &here.node.peers().get("there").unwrap(), &[name("other")], false);
    receive::run(&mut link, here.store(), terms, None, &Arc::new(Tally::new()), &silent()).await.unwrap();
    let first = layerfs::manifest::Manifest::load(here.store().as_ref(), other).unwrap();
    assert_eq!(first.depth, 0);
    crate::get::run(&mut link, &[other.0], &mut |_| Ok(())).await.unwrap();
    link.close().await;
    serving.await.unwrap();

    let Some(decoded) = decode(&recording) else { return };
    let trees = json!({
        "base": expected(base, &files),
        "next": expected(next, &changed),
        "last": expected(last, &later),
        "other": expected(other, &other_files),
    });
    assert_eq!(decoded["trees"], trees);
    for kind in ["Hello", "Offer", "Need", "Ask", "Want", "End", "Done", "Fetch", "Get"] {
        assert!(decoded["messages"][kind].as_u64().is_some_and(|count| count > 0), "{kind}: {}", decoded["messages"]);
    }
    // One is among the golden frames.
    assert!(decoded["messages"]["Patches"].as_u64().is_some_and(|count| count > 1), "{}", decoded["messages"]);
    assert!(decoded["holes"].as_u64().is_some_and(|count| count > 0), "no bundle with holes");
    let of_kinds = golden_frames().len() as u64;
    let all: u64 = decoded["messages"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert!(all > of_kinds, "{}", decoded["messages"]);
}
