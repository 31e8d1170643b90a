//! Encoding and decoding of each message. PROTOCOL.md, "Messages": one function pair per table row.

use bytes::Bytes;
use layerfs::chunk::{Class, Codec, MAX_CHUNK_BYTES, MAX_STORED_BYTES, StoredChunk};
use layerfs::codec::{Put, Reader};
use layerfs::error::ErrorClass;
use layerfs::{ChunkId, Error, LayerId, LayerName, Result};

use crate::governor::{Pace, Priority, Rate};
use crate::group::Token;
use crate::guest::Obstacle;
use crate::handover::{Fate, MoveId};

use super::{
    Bundle, CHUNKS_TARGET_BYTES, HEADER_BYTES, Hello, MAX_ASK, MAX_BASES, MAX_BUNDLE_BYTES, MAX_BUNDLE_CHUNKS,
    MAX_ERROR_TEXT, MAX_HINTS, MAX_LAYERS, MAX_NAMES, MAX_NUMBERED, MAX_OBSTACLE_TEXT, MAX_OBSTACLES, MAX_SPEC,
    MAX_SURROUNDINGS, Message, Offer, OfferedLayer, Prepare,
};

const HELLO: u8 = 0x01;
const ERROR: u8 = 0x02;
const ALIVE: u8 = 0x03;
const FETCH: u8 = 0x10;
const OFFER: u8 = 0x11;
const NEED: u8 = 0x12;
const ASK: u8 = 0x13;
const WANT: u8 = 0x14;
/// The type of [`Message::Chunks`], which may be longer than the others.
pub(super) const CHUNKS: u8 = 0x15;
const END: u8 = 0x16;
const DONE: u8 = 0x17;
const GET: u8 = 0x18;
const LOOK: u8 = 0x1d;
const TRACE: u8 = 0x1e;
const TRACED: u8 = 0x1f;
const PACE: u8 = 0x20;
/// The type of [`Message::Bundle`], likewise.
pub(super) const BUNDLE: u8 = 0x19;
/// The type of a [`Message::Bundle`] of which only pages go, likewise.
pub(super) const PATCHES: u8 = 0x3c;
const GROUP: u8 = 0x1a;
const JOIN: u8 = 0x1b;
const GOT: u8 = 0x1c;
const PART: u8 = 0x21;
const PREPARE: u8 = 0x30;
const PREPARED: u8 = 0x31;
const STAGE: u8 = 0x32;
const COMMIT: u8 = 0x33;
const ABORT: u8 = 0x34;
const INQUIRE: u8 = 0x35;
const FATE: u8 = 0x36;

/// Instead of the number of a bundle's first chunk, if they have none.
const UNNUMBERED: u32 = u32::MAX;

const MAGIC: &[u8; 4] = b"LFWP";
const FLAG_FORCE: u8 = 1;
const FLAG_DRY_RUN: u8 = 2;
const FLAG_LAZY: u8 = 4;
const FLAG_GIVES_BACK: u8 = 8;

/// Appends the frame of `message` to `out`.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    let start = out.len();
    out.put_u32(0);
    match message {
        Message::Hello(hello) => encode_hello(hello, out),
        Message::Error { class, text } => {
            out.put_u8(ERROR);
            out.put_u8(class_code(*class));
            out.put_bytes16(text.as_bytes());
        }
        Message::Alive => out.put_u8(ALIVE),
        Message::Fetch { names, dry_run } => {
            out.put_u8(FETCH);
            out.put_u8(if *dry_run { FLAG_DRY_RUN } else { 0 });
            out.put_u16(names.len() as u16);
            names.iter().for_each(|name| out.put_bytes16(name.as_str().as_bytes()));
        }
        Message::Get { ids } => {
            out.put_u8(GET);
            put_ids(ids, out);
        }
        Message::Pace(pace) => encode_pace(pace, out),
        Message::Look { names, layers } => {
            out.put_u8(LOOK);
            out.put_u16(names.len() as u16);
            names.iter().for_each(|name| out.put_bytes16(name.as_str().as_bytes()));
            put_layers(layers, out);
        }
        Message::Trace { layers } => {
            out.put_u8(TRACE);
            put_layers(layers, out);
        }
        Message::Traced { layer, ids } => {
            out.put_u8(TRACED);
            out.put_id(&layer.0);
            put_ids(ids, out);
        }
        Message::Offer(offer) => encode_offer(offer, out),
        Message::Need { lacking, held } => {
            out.put_u8(NEED);
            put_bits(lacking, out);
            put_bits(held, out);
        }
        Message::Ask { seq, ids } => {
            out.put_u8(ASK);
            out.put_u32(*seq);
            put_ids(ids, out);
        }
        Message::Want { seq, wanted } => {
            out.put_u8(WANT);
            out.put_u32(*seq);
            put_bits(wanted, out);
        }
        Message::Chunks(chunks) => {
            out.put_u8(CHUNKS);
            out.put_u16(chunks.len() as u16);
            chunks.iter().for_each(|chunk| put_chunk(chunk, out));
        }
        Message::Bundle(bundle) => put_bundle(bundle, out),
        Message::End { chunks } => {
            out.put_u8(END);
            out.put_u64(*chunks);
        }
        Message::Done { changed } => {
            out.put_u8(DONE);
            out.put_u16(*changed);
        }
        Message::Group { token } => {
            out.put_u8(GROUP);
            out.extend_from_slice(&token.0);
        }
        Message::Join { token } => {
            out.put_u8(JOIN);
            out.extend_from_slice(&token.0);
        }
        Message::Part { number } => {
            out.put_u8(PART);
            out.put_u64(*number);
        }
        Message::Got { frames } => {
            out.put_u8(GOT);
            out.put_u64(*frames);
        }
        Message::Prepare(prepare) => encode_prepare(prepare, out),
        Message::Prepared { obstacles } => {
            out.put_u8(PREPARED);
            out.put_u16(obstacles.len() as u16);
            for obstacle in obstacles {
                out.put_bytes16(obstacle.what.as_bytes());
                out.put_bytes16(obstacle.fix.as_bytes());
            }
        }
        Message::Stage { id, instance, state, lazily } => {
            put_move(STAGE, id, out);
            out.put_id(&instance.0);
            out.put_id(&state.0);
            out.put_u8(if *lazily { FLAG_LAZY } else { 0 });
        }
        Message::Commit { id } => put_move(COMMIT, id, out),
        Message::Abort { id } => put_move(ABORT, id, out),
        Message::Inquire { id } => put_move(INQUIRE, id, out),
        Message::Fate { fate, micros, text } => {
            out.put_u8(FATE);
            out.put_u8(*fate as u8);
            out.put_u64(*micros);
            out.put_bytes16(text.as_bytes());
        }
    }
    close(start, out);
}

fn put_move(kind: u8, id: &MoveId, out: &mut Vec<u8>) {
    out.put_u8(kind);
    out.extend_from_slice(&id.0);
}

fn encode_prepare(prepare: &Prepare, out: &mut Vec<u8>) {
    put_move(PREPARE, &prepare.id, out);
    out.put_u64(prepare.epoch);
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    let post_copy = flag(prepare.post_copy, FLAG_LAZY);
    out.put_u8(flag(prepare.dry_run, FLAG_DRY_RUN) | flag(prepare.gives_back, FLAG_GIVES_BACK) | post_copy);
    out.put_id(&prepare.stack.0);
    out.put_bytes16(prepare.spec.as_bytes());
    out.put_bytes16(prepare.surroundings.as_bytes());
}

fn close(start: usize, out: &mut [u8]) {
    let bytes = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&bytes.to_le_bytes());
}

fn encode_hello(hello: &Hello, out: &mut Vec<u8>) {
    out.put_u8(HELLO);
    out.extend_from_slice(MAGIC);
    out.put_u16(hello.version);
    out.put_u16(hello.lowest);
    out.put_u16(hello.highest);
    out.put_u64(hello.features);
}

fn encode_offer(offer: &Offer, out: &mut Vec<u8>) {
    out.put_u8(OFFER);
    let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
    out.put_u8(flag(offer.force, FLAG_FORCE) | flag(offer.dry_run, FLAG_DRY_RUN) | flag(offer.lazy, FLAG_LAZY));
    out.put_u16(offer.layers.len() as u16);
    for layer in &offer.layers {
        out.put_id(&layer.id.0);
        out.put_u64(layer.file_bytes);
    }
    out.put_u16(offer.names.len() as u16);
    for (name, top) in &offer.names {
        out.put_bytes16(name.as_str().as_bytes());
        out.put_u16(*top);
    }
    out.put_u16(offer.hints.len() as u16);
    offer.hints.iter().for_each(|hint| out.put_id(&hint.0));
}

fn put_layers(layers: &[LayerId], out: &mut Vec<u8>) {
    out.put_u16(layers.len() as u16);
    layers.iter().for_each(|layer| out.put_id(&layer.0));
}

fn put_ids(ids: &[ChunkId], out: &mut Vec<u8>) {
    out.put_u16(ids.len() as u16);
    ids.iter().for_each(|id| out.put_id(id));
}

/// A 16-bit count, then a bit each, the first in the lowest bit of the first byte; unused bits are 0.
fn put_bits(bits: &[bool], out: &mut Vec<u8>) {
    out.put_u16(bits.len() as u16);
    for eight in bits.chunks(8) {
        out.put_u8(eight.iter().enumerate().fold(0, |byte, (at, bit)| byte | u8::from(*bit) << at));
    }
}

fn put_chunk(chunk: &StoredChunk, out: &mut Vec<u8>) {
    out.put_id(&chunk.id);
    out.put_u8(chunk.class as u8);
    out.put_u8(chunk.codec as u8);
    out.put_u32(chunk.plain_bytes);
    out.put_bytes32(&chunk.stored);
}

fn put_bundle(bundle: &Bundle, out: &mut Vec<u8>) {
    let is_patches = !bundle.pages.is_empty();
    out.put_u8(if is_patches { PATCHES } else { BUNDLE });
    out.put_u16(bundle.bases.len() as u16);
    bundle.bases.iter().for_each(|base| out.extend_from_slice(base));
    bundle.pages.iter().for_each(|pages| out.put_u16(*pages));
    out.put_u32(bundle.first.unwrap_or(UNNUMBERED));
    if !is_patches {
        out.put_u16(bundle.chunks);
    }
    out.put_u32(bundle.plain_bytes);
    out.put_bytes32(&bundle.frame);
}

/// The frame of a [`Message::Bundle`].
pub fn encode_bundle(bundle: &Bundle) -> Bytes {
    let around = HEADER_BYTES + 16 + bundle.bases.len() * 8 + bundle.pages.len() * 2;
    let mut out = Vec::with_capacity(around + bundle.frame.len());
    out.put_u32(0);
    put_bundle(bundle, &mut out);
    close(0, &mut out);
    out.into()
}

/// Decodes the body of a frame of type `kind`. Chunks' bytes are slices of `body`.
///
/// # Errors
/// [`Error::Corrupt`] for anything malformed, [`Error::Unsupported`] for an unknown type.
pub fn decode(kind: u8, body: &Bytes) -> Result<Message> {
    let mut reader = Reader::new("message", body);
    let reader = &mut reader;
    let message = match kind {
        HELLO => Message::Hello(decode_hello(reader)?),
        ERROR => decode_error(reader)?,
        ALIVE => Message::Alive,
        FETCH => decode_fetch(reader)?,
        GET => Message::Get { ids: list(reader, "ids", 1, MAX_ASK, |r| r.id())? },
        PACE => Message::Pace(decode_pace(reader)?),
        LOOK => decode_look(reader)?,
        TRACE => Message::Trace { layers: list(reader, "layers", 1, MAX_HINTS, |r| Ok(LayerId(r.id()?)))? },
        TRACED => Message::Traced { layer: LayerId(reader.id()?), ids: list(reader, "ids", 1, MAX_ASK, |r| r.id())? },
        OFFER => Message::Offer(decode_offer(reader)?),
        NEED => Message::Need { lacking: bits(reader, MAX_LAYERS)?, held: bits(reader, MAX_HINTS)? },
        ASK => Message::Ask { seq: reader.u32()?, ids: list(reader, "ids", 1, MAX_ASK, |r| r.id())? },
        WANT => Message::Want { seq: reader.u32()?, wanted: bits(reader, MAX_ASK)? },
        CHUNKS => Message::Chunks(list(reader, "chunks", 1, usize::from(u16::MAX), |r| decode_chunk(r, body))?),
        BUNDLE => Message::Bundle(decode_bundle(reader, body, false)?),
        PATCHES => Message::Bundle(decode_bundle(reader, body, true)?),
        END => Message::End { chunks: reader.u64()? },
        DONE => Message::Done { changed: reader.u16()? },
        GROUP => Message::Group { token: token(reader)? },
        JOIN => Message::Join { token: token(reader)? },
        PART => Message::Part { number: reader.u64()? },
        GOT => Message::Got { frames: reader.u64()? },
        PREPARE => Message::Prepare(Box::new(decode_prepare(reader)?)),
        PREPARED => Message::Prepared { obstacles: list(reader, "obstacles", 0, MAX_OBSTACLES, decode_obstacle)? },
        STAGE => decode_stage(reader)?,
        COMMIT => Message::Commit { id: move_id(reader)? },
        ABORT => Message::Abort { id: move_id(reader)? },
        INQUIRE => Message::Inquire { id: move_id(reader)? },
        FATE => decode_fate(reader)?,
        other => return Err(Error::Unsupported { what: "message", detail: format!("type {other:#04x}") }),
    };
    reader.finish()?;
    Ok(message)
}

fn token(reader: &mut Reader<'_>) -> Result<Token> {
    let mut token = [0; 16];
    token.copy_from_slice(reader.take(16)?);
    Ok(Token(token))
}

fn move_id(reader: &mut Reader<'_>) -> Result<MoveId> {
    token(reader).map(|Token(id)| MoveId(id))
}

/// Text for people or for a parser of its own; nothing that moves a terminal's cursor.
fn decode_text(reader: &mut Reader<'_>, what: &str, most: usize) -> Result<String> {
    let bytes = reader.bytes16()?;
    let text = std::str::from_utf8(bytes).map_err(|_| reader.error(format!("{what} is not text")))?;
    if text.len() > most || text.chars().any(char::is_control) {
        return Err(reader.error(format!("{what} of {} bytes, or with control characters", text.len())));
    }
    Ok(text.to_owned())
}

fn decode_obstacle(reader: &mut Reader<'_>) -> Result<Obstacle> {
    let what = decode_text(reader, "an obstacle", MAX_OBSTACLE_TEXT)?;
    Ok(Obstacle { what, fix: decode_text(reader, "a fix", MAX_OBSTACLE_TEXT)? })
}

fn decode_prepare(reader: &mut Reader<'_>) -> Result<Prepare> {
    let (id, epoch, flags) = (move_id(reader)?, reader.u64()?, reader.u8()?);
    if flags & !(FLAG_DRY_RUN | FLAG_GIVES_BACK | FLAG_LAZY) != 0 {
        return Err(Error::Unsupported { what: "prepare", detail: format!("flags {flags:#04x}") });
    }
    let stack = LayerId(reader.id()?);
    let spec = decode_text(reader, "a guest's description", MAX_SPEC)?;
    let surroundings = decode_text(reader, "what the source's host is like", MAX_SURROUNDINGS)?;
    let has = |flag| flags & flag != 0;
    let (dry_run, gives_back, post_copy) = (has(FLAG_DRY_RUN), has(FLAG_GIVES_BACK), has(FLAG_LAZY));
    Ok(Prepare { id, epoch, dry_run, gives_back, post_copy, stack, spec, surroundings })
}

fn decode_stage(reader: &mut Reader<'_>) -> Result<Message> {
    let (id, instance, state) = (move_id(reader)?, LayerId(reader.id()?), LayerId(reader.id()?));
    match reader.u8()? {
        flags @ (0 | FLAG_LAZY) => Ok(Message::Stage { id, instance, state, lazily: flags != 0 }),
        flags => Err(Error::Unsupported { what: "stage", detail: format!("flags {flags:#04x}") }),
    }
}

fn decode_fate(reader: &mut Reader<'_>) -> Result<Message> {
    let code = reader.u8()?;
    let found = Fate::ALL.into_iter().find(|fate| *fate as u8 == code);
    let fate = found.ok_or_else(|| reader.error(format!("fate {code}")))?;
    let micros = reader.u64()?;
    Ok(Message::Fate { fate, micros, text: decode_text(reader, "a fate's text", MAX_ERROR_TEXT)? })
}

fn decode_hello(reader: &mut Reader<'_>) -> Result<Hello> {
    if reader.take(4)? != MAGIC {
        return Err(reader.error("it doesn't begin with LFWP"));
    }
    // What a later version appends is not ours to judge: the versions decide, and they stand in front.
    let hello =
        Hello { version: reader.u16()?, lowest: reader.u16()?, highest: reader.u16()?, features: reader.u64()? };
    if hello.highest <= super::VERSION {
        return Ok(hello);
    }
    reader.take(reader.rest().len())?;
    Ok(hello)
}

fn decode_error(reader: &mut Reader<'_>) -> Result<Message> {
    let class = class_of(reader.u8()?);
    let text = reader.bytes16()?;
    if text.len() > MAX_ERROR_TEXT {
        return Err(reader.error(format!("an error's text of {} bytes", text.len())));
    }
    // A peer's words end up on a terminal: no control characters.
    let text = String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Ok(Message::Error { class, text })
}

fn encode_pace(pace: &Pace, out: &mut Vec<u8>) {
    out.put_u8(PACE);
    out.put_u64(pace.limit.map_or(0, Rate::bytes_per_second));
    out.put_u8(pace.priority as u8);
    out.put_u8(u8::from(pace.paused));
}

fn decode_pace(reader: &mut Reader<'_>) -> Result<Pace> {
    let limit = match reader.u64()? {
        0 => None,
        slow @ 1..Rate::MIN => return Err(reader.error(format!("a limit of {slow} bytes per second"))),
        limit => Some(Rate::new(limit)),
    };
    let priority = reader.u8()?;
    let found = Priority::ALL.into_iter().find(|known| *known as u8 == priority);
    let priority = found.ok_or_else(|| reader.error(format!("priority {priority}")))?;
    match reader.u8()? {
        paused @ (0 | 1) => Ok(Pace { limit, priority, paused: paused == 1 }),
        other => Err(reader.error(format!("pause {other}"))),
    }
}

fn decode_look(reader: &mut Reader<'_>) -> Result<Message> {
    let names = list(reader, "names", 0, MAX_NAMES, decode_name)?;
    let layers = list(reader, "layers", 0, MAX_LAYERS, |r| Ok(LayerId(r.id()?)))?;
    if names.is_empty() == layers.is_empty() {
        return Err(reader.error(format!("{} names and {} layers", names.len(), layers.len())));
    }
    Ok(Message::Look { names, layers })
}

fn decode_fetch(reader: &mut Reader<'_>) -> Result<Message> {
    let flags = reader.u8()?;
    if flags & !FLAG_DRY_RUN != 0 {
        return Err(Error::Unsupported { what: "fetch", detail: format!("flags {flags:#04x}") });
    }
    let names = list(reader, "names", 1, MAX_NAMES, decode_name)?;
    Ok(Message::Fetch { names, dry_run: flags & FLAG_DRY_RUN != 0 })
}

fn decode_offer(reader: &mut Reader<'_>) -> Result<Offer> {
    let flags = reader.u8()?;
    if flags & !(FLAG_FORCE | FLAG_DRY_RUN | FLAG_LAZY) != 0 {
        return Err(Error::Unsupported { what: "offer", detail: format!("flags {flags:#04x}") });
    }
    let layer = |r: &mut Reader<'_>| Ok(OfferedLayer { id: LayerId(r.id()?), file_bytes: r.u64()? });
    let layers = list(reader, "layers", 1, MAX_LAYERS, layer)?;
    let lazy = flags & FLAG_LAZY != 0;
    let names = list(reader, "names", usize::from(lazy), MAX_NAMES, |r| Ok((decode_name(r)?, r.u16()?)))?;
    if let Some((name, top)) = names.iter().find(|(_, top)| usize::from(*top) >= layers.len()) {
        return Err(reader.error(format!("name {name} has layer {top} of {}", layers.len())));
    }
    let hints = list(reader, "hints", 0, MAX_HINTS, |r| Ok(LayerId(r.id()?)))?;
    let (force, dry_run) = (flags & FLAG_FORCE != 0, flags & FLAG_DRY_RUN != 0);
    Ok(Offer { force, dry_run, lazy, layers, names, hints })
}

fn decode_name(reader: &mut Reader<'_>) -> Result<LayerName> {
    let text = std::str::from_utf8(reader.bytes16()?).map_err(|_| reader.error("a name that isn't text"))?;
    LayerName::new(text).map_err(|_| reader.error("an impossible name"))
}

/// A 16-bit count between `least` and `most`, then so many items. Allocates no more than `reader` has bytes for.
fn list<'a, T>(
    reader: &mut Reader<'a>,
    what: &str,
    least: usize,
    most: usize,
    mut item: impl FnMut(&mut Reader<'a>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = usize::from(reader.u16()?);
    if count < least || count > most || count > reader.rest().len() {
        return Err(reader.error(format!("{count} {what}")));
    }
    let mut items = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        items.push(item(reader)?);
    }
    Ok(items)
}

fn bits(reader: &mut Reader<'_>, most: usize) -> Result<Vec<bool>> {
    let count = usize::from(reader.u16()?);
    if count > most {
        return Err(reader.error(format!("{count} bits")));
    }
    let bytes = reader.take(count.div_ceil(8))?;
    let bit = |at: usize| bytes[at / 8] >> (at % 8) & 1 == 1;
    if (count..bytes.len() * 8).any(bit) {
        return Err(reader.error("unused bits are set"));
    }
    Ok((0..count).map(bit).collect())
}

fn decode_chunk(reader: &mut Reader<'_>, body: &Bytes) -> Result<StoredChunk> {
    let id = reader.id()?;
    let class = reader.u8()?;
    let class = Class::from_code(class).ok_or_else(|| reader.error(format!("chunk class {class}")))?;
    let codec = reader.u8()?;
    let codec = Codec::from_code(codec).ok_or_else(|| reader.error(format!("chunk codec {codec}")))?;
    let plain_bytes = reader.u32()?;
    let stored = reader.bytes32()?;
    let plain_is_possible = (1..=MAX_CHUNK_BYTES).contains(&(plain_bytes as usize));
    if !plain_is_possible || stored.is_empty() || stored.len() > MAX_STORED_BYTES {
        return Err(reader.error(format!("a chunk of {plain_bytes} plain bytes in {}", stored.len())));
    }
    Ok(StoredChunk { id, class, codec, plain_bytes, stored: body.slice_ref(stored) })
}

fn decode_bundle(reader: &mut Reader<'_>, body: &Bytes, is_patches: bool) -> Result<Bundle> {
    let base = |r: &mut Reader<'_>| {
        let mut name = [0; 8];
        name.copy_from_slice(r.take(8)?);
        Ok(name)
    };
    let bases = list(reader, "bases", usize::from(is_patches), MAX_BASES, base)?;
    let mut pages = Vec::new();
    while is_patches && pages.len() < bases.len() {
        let some = reader.u16()?;
        if some == 0 {
            return Err(reader.error("a patch without pages".to_owned()));
        }
        pages.push(some);
    }
    let first = Some(reader.u32()?).filter(|first| *first != UNNUMBERED);
    let chunks = if is_patches { bases.len() as u16 } else { reader.u16()? };
    if !(1..=MAX_BUNDLE_CHUNKS).contains(&usize::from(chunks)) {
        return Err(reader.error(format!("{chunks} chunks")));
    }
    if let Some(first) = first.filter(|first| *first > MAX_NUMBERED - u32::from(chunks)) {
        return Err(reader.error(format!("{chunks} chunks from number {first} on")));
    }
    let plain_bytes = reader.u32()?;
    let frame = reader.bytes32()?;
    let fits = |bytes: usize| (1..=MAX_BUNDLE_BYTES).contains(&bytes);
    if !fits(plain_bytes as usize) || !fits(frame.len()) {
        return Err(reader.error(format!("a bundle of {plain_bytes} plain bytes in {}", frame.len())));
    }
    Ok(Bundle { bases, pages, first, chunks, plain_bytes, frame: body.slice_ref(frame) })
}

/// Fills one [`Message::Chunks`] frame, copying each chunk's bytes once.
#[derive(Debug)]
pub struct ChunksWriter {
    frame: Vec<u8>,
    count: u16,
}

impl Default for ChunksWriter {
    fn default() -> ChunksWriter {
        let mut frame = Vec::with_capacity(CHUNKS_TARGET_BYTES + MAX_STORED_BYTES + 256);
        frame.put_u32(0);
        frame.put_u8(CHUNKS);
        frame.put_u16(0);
        ChunksWriter { frame, count: 0 }
    }
}

impl ChunksWriter {
    /// The bytes of a chunk's record in front of its stored bytes.
    pub const CHUNK_HEADER_BYTES: usize = 32 + 1 + 1 + 4 + 4;

    /// Appends a chunk. The caller takes the frame when it [is full](ChunksWriter::is_full_at).
    pub fn push(&mut self, chunk: &StoredChunk) {
        put_chunk(chunk, &mut self.frame);
        self.count += 1;
    }

    /// Whether a frame of about `bytes` should go now.
    pub fn is_full_at(&self, bytes: usize) -> bool {
        self.frame.len() + ChunksWriter::CHUNK_HEADER_BYTES >= bytes.min(CHUNKS_TARGET_BYTES) || self.count == u16::MAX
    }

    /// Whether the frame should go.
    pub fn is_full(&self) -> bool {
        self.is_full_at(CHUNKS_TARGET_BYTES)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The frame.
    pub fn finish(mut self) -> Bytes {
        self.frame[HEADER_BYTES..HEADER_BYTES + 2].copy_from_slice(&self.count.to_le_bytes());
        close(0, &mut self.frame);
        self.frame.into()
    }
}

/// The codes of PROTOCOL.md, "Errors".
const CLASSES: [(u8, ErrorClass); 10] = [
    (1, ErrorClass::Invalid),
    (2, ErrorClass::NotFound),
    (3, ErrorClass::Exists),
    (4, ErrorClass::Busy),
    (5, ErrorClass::Corrupt),
    (6, ErrorClass::Unsupported),
    (7, ErrorClass::NoSpace),
    (8, ErrorClass::Denied),
    (9, ErrorClass::Network),
    (10, ErrorClass::Io),
];

fn class_code(class: ErrorClass) -> u8 {
    CLASSES.iter().find(|(_, other)| *other == class).map_or(10, |(code, _)| *code)
}

/// A code that a later version adds is an [`ErrorClass::Io`] to us.
fn class_of(code: u8) -> ErrorClass {
    CLASSES.iter().find(|(other, _)| *other == code).map_or(ErrorClass::Io, |(_, class)| *class)
}

/// Through the bytes and back.
#[cfg(test)]
pub(super) fn round_trip(message: &Message) -> Message {
    let mut frame = Vec::new();
    encode(message, &mut frame);
    let header: [u8; HEADER_BYTES] = frame[..HEADER_BYTES].try_into().unwrap();
    let header = super::FrameHeader::decode(&header).unwrap();
    assert_eq!(header.body_bytes, frame.len() - HEADER_BYTES);
    header.message(&Bytes::copy_from_slice(&frame[HEADER_BYTES..])).unwrap()
}
