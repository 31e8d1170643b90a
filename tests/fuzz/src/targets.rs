//! What is fuzzed: every decoder that reads bytes which others made. Each target is a function of bytes that panics if an
//! invariant breaks; the corpus is replayed by the ordinary tests too.

use std::collections::HashSet;
use std::io::Cursor;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use layerfs::chunk::ChunkRead;
use layerfs::codec::Reader;
use layerfs::content::{Content, decode_node};
use layerfs::import::{Format, ImportOptions, SourceSpec, import};
use layerfs::inode::{Dentry, Inode, Stat};
use layerfs::manifest::Manifest;
use layerfs::monitor::Silent;
use layerfs::store::{Expect, Store, StoreOptions};
use layerfs::{ChunkId, LayerId, LayerName};
use migrator::identity::{Fingerprint, PublicKey};
use migrator::patch;
use migrator::peers::{Peer, PeerName, Visible, normalize_address};
use migrator::protocol::{Receiver, ReceiverStep, Sender};
use migrator::wire::{self, FrameHeader, HEADER_BYTES, Message};

/// Panics if an invariant breaks.
pub type Target = fn(&[u8]);

/// All targets by name; a folder of the corpus each.
pub const TARGETS: &[(&str, Target)] = &[
    ("message", message),
    ("session", session),
    ("manifest", manifest),
    ("records", records),
    ("node", node),
    ("layer", layer),
    ("pack", pack),
    ("peer", peer),
    ("text", text),
    ("import", import_stream),
    ("bundle", bundle),
    ("patches", patches),
    ("table", table),
];

/// A frame: what decodes encodes to the same bytes.
fn message(data: &[u8]) {
    let Some((head, body)) = data.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = FrameHeader::decode(head) else { return };
    assert!(header.body_bytes < wire::MAX_FRAME_BYTES);
    let body = Bytes::copy_from_slice(body);
    let Ok(message) = header.message(&body) else { return };
    // An error's text is cleaned, and a later Hello may be longer.
    if matches!(message, Message::Error { .. } | Message::Hello(_)) {
        return;
    }
    let mut frame = Vec::new();
    wire::encode(&message, &mut frame);
    assert_eq!(frame[HEADER_BYTES..], body[..], "{}", message.kind());
}

/// A peer's messages to either side of a transfer, each as `u16` length, type and body; this side's own steps answer.
fn session(data: &[u8]) {
    let mut rest = data;
    let (mut receiver, mut sender) = (Some(Receiver::default()), None);
    while let Some((head, after)) = rest.split_first_chunk::<3>() {
        let [low, high, kind] = *head;
        let length = usize::from(u16::from_le_bytes([low, high])).min(after.len());
        let (body, after) = after.split_at(length);
        rest = after;
        let Ok(message) = wire::decode(kind, &Bytes::copy_from_slice(body)) else { continue };
        if let (Message::Offer(offer), None) = (&message, &sender) {
            sender = Some(Sender::new(offer.clone()).0);
        }
        if let Some(machine) = &mut sender {
            let steps = machine.on_message(message.clone()).map(|_| machine.may_ask());
            if let Ok(true) = steps {
                machine.plan_finished();
            }
        }
        let Some(machine) = &mut receiver else { continue };
        let Ok(steps) = machine.on_message(message) else {
            receiver = None;
            continue;
        };
        for step in steps {
            match step {
                ReceiverStep::CheckOffer(offer) => {
                    let lacking = vec![true; offer.layers.len()];
                    machine.offer_checked(lacking, vec![false; offer.hints.len()]);
                }
                ReceiverStep::CheckHave(ids) => {
                    let present: Vec<bool> = ids.iter().map(|id| id.0[0] & 1 == 1).collect();
                    machine.have_checked(&present);
                }
                _ => {}
            }
        }
    }
}

/// A bundle's frame: bytes of prefix, of what the frame holds, count of chunks, then prefix and frame.
fn bundle(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<5>() else { return };
    let [a, b, c, d, count] = *head;
    let (prefix, plain) = (usize::from(u16::from_le_bytes([a, b])), u32::from(u16::from_le_bytes([c, d])));
    let (prefix, frame) = rest.split_at(prefix.min(rest.len()));
    let unpacked = migrator::bundle::unpack(prefix, frame, u16::from(count), plain);
    if let Ok(mut unpacked) = unpacked {
        let mut chunks = 0;
        let id = ChunkId([1; 32]);
        let filled = unpacked.visit(Some(7), &|number| (number % 5 != 0).then_some(id), &mut |id, _, plain| {
            assert_eq!(id, ChunkId::of(plain));
            chunks += 1;
        });
        assert!(filled.is_err() || chunks == usize::from(count));
    }
}

/// Patches of two bases: the pages of each, the first one's length, what the frame holds, then the frame. And what is made of pages that differ
/// opens again.
fn patches(data: &[u8]) {
    let Some((head, frame)) = data.split_first_chunk::<8>() else { return };
    let [a, b, c, d, e, f, g, h] = *head;
    let pages = [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])];
    let lengths = [usize::from(u16::from_le_bytes([e, f])), 5000];
    let total = usize::from(u16::from_le_bytes([g, h]));
    let olds = lengths.map(|length| (0..length).map(|at| (at / 7) as u8).collect::<Vec<u8>>());
    let bases: Vec<_> = pages.into_iter().zip(&olds).collect();
    let opened = |frame: &[u8], total| {
        let mut chunks: Vec<Vec<u8>> = Vec::new();
        patch::unpack(&bases, frame, total)?.visit(None, &|_| None, &mut |id, _, plain: &[u8]| {
            assert_eq!(id, ChunkId::of(plain));
            chunks.push(plain.to_vec());
        })?;
        Ok::<_, layerfs::Error>(chunks)
    };
    if let Ok(chunks) = opened(frame, total) {
        assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), lengths);
    }
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for (pages, base) in &bases {
        patch::put(base, *pages, &mut old);
    }
    new.extend(old.iter().zip(data.iter().cycle()).map(|(old, change)| old ^ change));
    if let Some(frame) = migrator::bundle::squeeze(&old, &new, 1)
        && let Ok(chunks) = opened(&frame, new.len())
    {
        let mut again = Vec::new();
        for (pages, chunk) in pages.iter().zip(&chunks) {
            patch::put(chunk, *pages, &mut again);
        }
        assert_eq!(again, new);
    }
}

/// The table in front of a bundle's chunks: what decodes encodes to the same bytes.
fn table(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else { return };
    let mut reader = Reader::new("table", rest);
    if let Ok(table) = migrator::bundle::Table::decode(&mut reader, u16::from(*count)) {
        let mut bytes = Vec::new();
        table.encode(&mut bytes);
        assert_eq!(bytes, rest[..rest.len() - reader.rest().len()]);
    }
}

fn manifest(data: &[u8]) {
    if let Ok(manifest) = Manifest::decode(data) {
        assert_eq!(manifest.encode(), data);
    }
}

/// A run of table records, as inodes and as dentries.
fn records(data: &[u8]) {
    let mut reader = Reader::new("fuzz", data);
    while !reader.rest().is_empty() {
        let before = reader.rest();
        let Ok(inode) = Inode::decode(&mut reader) else { break };
        let record = &before[..before.len() - reader.rest().len()];
        let mut encoded = Vec::new();
        inode.encode(&mut encoded);
        assert_eq!(encoded, record);
        assert!(Stat::decode(&mut Reader::new("fuzz", record)).is_ok());
    }
    let mut reader = Reader::new("fuzz", data);
    while !reader.rest().is_empty() {
        let before = reader.rest();
        let Ok(dentry) = Dentry::decode(&mut reader) else { break };
        let mut encoded = Vec::new();
        dentry.encode(&mut encoded);
        assert_eq!(encoded, before[..before.len() - reader.rest().len()]);
    }
}

fn node(data: &[u8]) {
    let Some((depth, plain)) = data.split_first() else { return };
    let _ = decode_node(plain, *depth);
    let mut reader = Reader::new("fuzz", plain);
    if let Ok(content) = Content::decode(&mut reader) {
        let mut encoded = Vec::new();
        content.encode(&mut encoded);
        assert_eq!(encoded, plain[..plain.len() - reader.rest().len()]);
    }
}

/// Chunks that the fuzzer chooses, without their ids having to be hashes: an id's first byte is a chunk's index.
struct Chosen(Vec<Bytes>);

impl ChunkRead for Chosen {
    fn get(&self, id: &ChunkId) -> layerfs::Result<Bytes> {
        self.0.get(usize::from(id.0[0])).cloned().ok_or(layerfs::Error::ChunkMissing(*id))
    }
}

/// A whole layer, as its receiver verifies it: chunks as `u16` length and bytes, the manifest first.
fn layer(data: &[u8]) {
    let (mut rest, mut chunks) = (data, Vec::new());
    while let Some((head, after)) = rest.split_first_chunk::<2>() {
        let (chunk, after) = after.split_at(usize::from(u16::from_le_bytes(*head)).min(after.len()));
        chunks.push(Bytes::copy_from_slice(chunk));
        rest = after;
    }
    let chunks = Chosen(chunks);
    let top = LayerId(ChunkId([0; 32]));
    let checked = migrator::check::check_layer(&chunks, top, &mut |ids| Ok(vec![true; ids.len()]));
    if checked.is_ok() {
        // Who reads it later meets no surprise.
        let mut seen = HashSet::new();
        let planned = migrator::plan::candidates(&chunks, &[top], &[], &mut |candidate| {
            seen.insert(candidate.id);
            Ok(())
        });
        assert!(planned.is_ok() && seen.contains(&top.0));
    }
}

/// A folder for whatever targets write. It stays until [`clean_up`].
fn scratch() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("layerfs-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Removes what targets wrote. The fuzzer's own process ends without: its driver gives it a TMPDIR to remove.
#[allow(dead_code)]
pub fn clean_up() {
    let _ = std::fs::remove_dir_all(scratch());
}

fn options() -> StoreOptions {
    StoreOptions { create: true, threads: 1, cache_bytes: 1 << 20, ..StoreOptions::default() }
}

/// A pack with a good header and `data` behind it, from which the index is made anew.
fn pack(data: &[u8]) {
    let folder = scratch().join("packs-store");
    let _ = std::fs::remove_dir_all(&folder);
    drop(Store::open(&folder, options()).expect("a new store"));
    let header = [&b"LFPK\x01\0\0\0"[..], &1u64.to_le_bytes()].concat();
    std::fs::write(folder.join("packs/0000000000000001.pack"), [&header[..], data].concat()).expect("a pack");
    layerfs::store::rebuild(&folder, options(), &Silent).expect("damage is told in the report");
}

fn peer(data: &[u8]) {
    if let Ok(peer) = Peer::decode(b"peer", data) {
        assert_eq!(peer.encode(), data);
    }
}

/// What people type, and peers send as text.
fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(key) = PublicKey::from_str(text) {
        assert_eq!(PublicKey::from_str(&key.to_string()).ok(), Some(key));
    }
    if let Ok(fingerprint) = Fingerprint::from_str(text) {
        assert_eq!(Fingerprint::from_str(&fingerprint.to_string()).ok(), Some(fingerprint));
    }
    if let Ok(address) = normalize_address(text) {
        assert_eq!(normalize_address(&address).ok().as_ref(), Some(&address));
    }
    let _ = PeerName::new(text);
    let (pattern, name) = text.split_once('\n').unwrap_or((text, text));
    if let Ok(name) = LayerName::new(name) {
        let allows = Visible::Matching(vec![pattern.to_owned()]).allows(&name);
        assert!(allows || pattern != name.as_str());
    }
}

/// An archive or a disk image as a stream; the first byte chooses whether its format is said or found out.
fn import_stream(data: &[u8]) {
    static STORE: OnceLock<Arc<Store>> = OnceLock::new();
    let store = STORE.get_or_init(|| Store::open(&scratch().join("import-store"), options()).expect("a new store"));
    let Some((choice, archive)) = data.split_first() else { return };
    let name = LayerName::new("fuzz").expect("a name");
    let mut options = ImportOptions::new(name);
    options.expect = Expect::Any;
    options.whiteouts = choice & 0x80 != 0;
    options.format = match choice & 7 {
        1 => Some(Format::Tar),
        _ => None,
    };
    let source = SourceSpec::Stream(Box::new(Cursor::new(archive.to_vec())));
    if let Ok(report) = import(store, source, &options, &Silent) {
        let top = report.layers.last().expect("an import makes a layer").id;
        migrator::check::check_layer(store.as_ref(), top, &mut |ids| store.contains_many(ids)).expect("it is whole");
    }
}
