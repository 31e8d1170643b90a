//! The messages and their bytes. PROTOCOL.md, "Frames" and "Messages".
//!
//! Invariants: a frame's length is checked before anything is allocated; decoding never panics and never reads past
//! its frame; what decodes encodes to the same bytes (but for an error's text and a later version's Hello).

mod codec;
#[cfg(test)]
pub(crate) mod golden;

use bytes::Bytes;
use layerfs::chunk::StoredChunk;
use layerfs::error::ErrorClass;
use layerfs::{ChunkId, LayerId, LayerName};

use crate::governor::Pace;
use crate::group::Token;
use crate::guest::Obstacle;
use crate::handover::{Fate, MoveId};

pub use codec::{ChunksWriter, decode, encode, encode_bundle};

/// The protocol's version.
pub const VERSION: u16 = 1;
/// The bytes in front of a frame's body: length and type.
pub const HEADER_BYTES: usize = 5;
/// The most bytes that a frame's length field may say (type and body).
pub const MAX_FRAME_BYTES: usize = 2 * 1024 * 1024;
/// The most bytes of a frame that is neither [`Message::Chunks`] nor [`Message::Bundle`].
pub const MAX_SMALL_FRAME_BYTES: usize = 128 * 1024;
/// The most ids in one [`Message::Ask`].
pub const MAX_ASK: usize = 1024;
/// The most layers that one [`Message::Offer`] may speak of.
pub const MAX_LAYERS: usize = 1024;
/// The most names in one [`Message::Offer`] or [`Message::Fetch`].
pub const MAX_NAMES: usize = 256;
/// The most hints in one [`Message::Offer`].
pub const MAX_HINTS: usize = 64;
/// The most ids that may be asked for or wanted and not yet sent at any time.
pub const MAX_OUTSTANDING: usize = 64 * 1024;
/// The most plain bytes of one [`Message::Bundle`]: its table and its chunks together; and the most of its bases.
pub const MAX_BUNDLE_BYTES: usize = 1024 * 1024;
/// The most chunks in one [`Message::Bundle`].
pub const MAX_BUNDLE_CHUNKS: usize = 1024;
/// The most bases of one [`Message::Bundle`].
pub const MAX_BASES: usize = 256;
/// The most holes in the chunks of one [`Message::Bundle`].
pub const MAX_HOLES: usize = 8192;
/// So many chunks of a transfer have numbers, for holes to refer to.
pub const MAX_NUMBERED: u32 = 65_536;
/// So many bundles with holes may wait for the chunks that these refer to.
pub const MAX_WAITING: usize = 16;
/// The most bytes of an error's text.
pub const MAX_ERROR_TEXT: usize = 2000;
/// The most bytes of a guest's description in a [`Message::Prepare`].
pub const MAX_SPEC: usize = 60_000;
/// The most bytes of what the source's host is like in a [`Message::Prepare`].
pub const MAX_SURROUNDINGS: usize = 8_000;
/// The most obstacles in a [`Message::Prepared`].
pub const MAX_OBSTACLES: usize = 64;
/// The most bytes of an obstacle's text, and of its fix.
pub const MAX_OBSTACLE_TEXT: usize = 900;
/// Below this many bytes a sender goes on filling a [`Message::Chunks`].
pub const CHUNKS_TARGET_BYTES: usize = 512 * 1024;

/// A message between two hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The first message of either side.
    Hello(Hello),
    /// The sender of this gives up; nothing follows.
    Error {
        /// The class of the failure.
        class: ErrorClass,
        /// Its text.
        text: String,
    },
    /// Nothing to say, but still here.
    Alive,
    /// Please offer these names to me.
    Fetch {
        /// What is wanted.
        names: Vec<LayerName>,
        /// Only what it would cost is wanted.
        dry_run: bool,
    },
    /// Please send me these chunks, as far as they are there. Answered by [`Message::Chunks`] and [`Message::End`].
    Get {
        /// Up to [`MAX_ASK`] ids.
        ids: Vec<ChunkId>,
    },
    /// From the receiver: how fast, how urgently and whether at all the sender is to send. May come at any time.
    Pace(Pace),
    /// Please offer what can be mounted before its data has come: these names, of which only the structure is sent; or
    /// what these layers, of which the structure is here, still lack. One of the two is empty.
    Look {
        /// Up to [`MAX_NAMES`] names.
        names: Vec<LayerName>,
        /// Up to [`MAX_LAYERS`] layers.
        layers: Vec<LayerId>,
    },
    /// Please tell in which order the chunks of these layers' stacks are read. Answered by a [`Message::Traced`] for
    /// each that is known, or several, and [`Message::End`].
    Trace {
        /// Up to [`MAX_HINTS`] layers.
        layers: Vec<LayerId>,
    },
    /// A piece of a trace.
    Traced {
        /// The top layer of the stack.
        layer: LayerId,
        /// Up to [`MAX_ASK`] chunks, in the order in which they were first read.
        ids: Vec<ChunkId>,
    },
    /// These names, with these layers, are to be had.
    Offer(Offer),
    /// What of an offer is lacking. Answers [`Message::Offer`] unless nothing is lacking.
    Need {
        /// For each layer of the offer, whether it is lacking.
        lacking: Vec<bool>,
        /// For each hint of the offer, whether it is held whole.
        held: Vec<bool>,
    },
    /// Which of these chunks are lacking?
    Ask {
        /// Counts the asks of a transfer from 0.
        seq: u32,
        /// Up to [`MAX_ASK`] ids.
        ids: Vec<ChunkId>,
    },
    /// The answer to the [`Message::Ask`] with the same number.
    Want {
        /// The ask's number.
        seq: u32,
        /// For each id of the ask, whether it is to be sent.
        wanted: Vec<bool>,
    },
    /// Chunks as they lie in the sender's packs.
    Chunks(Vec<StoredChunk>),
    /// Chunks compressed together, if need be against chunks that the receiver has.
    Bundle(Bundle),
    /// Everything that was wanted has been sent.
    End {
        /// How many chunks were sent in all; in a dry run how many bytes of frames would have been sent.
        chunks: u64,
    },
    /// Other connections may join the transfer that is asked for next, with this token.
    Group {
        /// Chosen at random by the caller.
        token: Token,
    },
    /// This connection carries frames of the transfer with this token.
    Join {
        /// The transfer's.
        token: Token,
    },
    /// On a connection that joined: so many frames with chunks have come over it.
    Got {
        /// Since it joined.
        frames: u64,
    },
    /// The frame with chunks that comes next on this connection has this number in its transfer.
    Part {
        /// Counts from 0 the frames that went to connections that joined. One that comes again keeps its number.
        number: u64,
    },
    /// The names are set, durably.
    Done {
        /// How many names were changed; the others were there already.
        changed: u16,
    },
    /// A guest is to move here. Answered by [`Message::Prepared`].
    Prepare(Box<Prepare>),
    /// What stands in the way of it; if nothing does, the guest is expected.
    Prepared {
        /// Up to [`MAX_OBSTACLES`].
        obstacles: Vec<Obstacle>,
    },
    /// These layers are the guest's: do all that can fail before it is restored. Answered by [`Message::Fate`].
    Stage {
        /// The move.
        id: MoveId,
        /// What its root lies on.
        instance: LayerId,
        /// Its state.
        state: LayerId,
        /// Whether it is to run before all of its state is there.
        lazily: bool,
    },
    /// The guest is yours. Answered by [`Message::Fate`] when it runs, or can't.
    Commit {
        /// The move.
        id: MoveId,
    },
    /// The guest stays where it was. Answered by [`Message::Fate`].
    Abort {
        /// The move.
        id: MoveId,
    },
    /// What became of it? Either side may ask. Answered by [`Message::Fate`].
    Inquire {
        /// The move.
        id: MoveId,
    },
    /// What a side's journal says of a move.
    Fate {
        /// What became of it there.
        fate: Fate,
        /// How long the last step took (staging, restoring), in microseconds.
        micros: u64,
        /// Why it isn't further; for people.
        text: String,
    },
}

/// What a destination has to know of a guest before anything is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepare {
    /// The move.
    pub id: MoveId,
    /// The guest's epoch once it has moved.
    pub epoch: u64,
    /// Only the obstacles are to be known.
    pub dry_run: bool,
    /// If it can't be restored, it goes back by itself.
    pub gives_back: bool,
    /// It may run there before all of its memory is there.
    pub post_copy: bool,
    /// The layer that its stack's name stands for at the source.
    pub stack: LayerId,
    /// Its [`crate::guest::GuestSpec`] as JSON.
    pub spec: String,
    /// Its [`crate::guest::Surroundings`] at the source as JSON.
    pub surroundings: String,
}

/// The first message of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version that what follows is written in.
    pub version: u16,
    /// The lowest version that this side speaks.
    pub lowest: u16,
    /// The highest version that this side speaks.
    pub highest: u16,
    /// Bits 0 to 31 are extras that may be ignored; whoever doesn't know one of bits 32 to 63 gives up.
    pub features: u64,
}

impl Hello {
    /// What this program says.
    pub const OURS: Hello = Hello { version: VERSION, lowest: VERSION, highest: VERSION, features: 0 };

    /// The features that may not be ignored.
    pub const REQUIRED_FEATURES: u64 = !0 << 32;
}

/// A layer that is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferedLayer {
    /// Its id.
    pub id: LayerId,
    /// The sizes of its files added up, in bytes: for progress, not to be relied on.
    pub file_bytes: u64,
}

/// What a sender has to give.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Whether names that are taken are to be changed.
    pub force: bool,
    /// Only what it would cost is to be known: no chunks follow.
    pub dry_run: bool,
    /// Whether only the layers' structure is to be sent now, and their names set as partial.
    pub lazy: bool,
    /// Every layer of every named stack, once, parents before children.
    pub layers: Vec<OfferedLayer>,
    /// The names; none if layers that are partial at the receiver are completed. Each with the index of its top layer in `layers`.
    pub names: Vec<(LayerName, u16)>,
    /// Layers that the sender holds too, most related first: what of them the receiver holds need not be asked for.
    pub hints: Vec<LayerId>,
}

/// How a bundle names a base: the first bytes of its id.
pub type BaseName = [u8; 8];

/// The name of `id` as a base.
pub fn base_name(id: &ChunkId) -> BaseName {
    let mut name = [0; 8];
    name.copy_from_slice(&id.0[..8]);
    name
}

/// Chunks compressed together. Their ids aren't told: they are what the plain bytes hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// Chunks of held layers, whose plain bytes one after the other are the prefix of the frame.
    pub bases: Vec<BaseName>,
    /// If there are any, one for each base: then each chunk is its base but for the pages that this has bits for, and the frame
    /// holds these pages and no table, its prefix the bases' pages in their place ([`crate::patch`]).
    pub pages: Vec<u16>,
    /// The first chunk's number, if they have any: the others have those that follow.
    pub first: Option<u32>,
    /// How many chunks there are.
    pub chunks: u16,
    /// How many bytes the frame holds.
    pub plain_bytes: u32,
    /// The table of the chunks ([`crate::bundle::Table`]), then their plain bytes, one after the other, as one zstd frame.
    pub frame: Bytes,
}

impl Message {
    /// The type's name, for errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Message::Hello(_) => "Hello",
            Message::Error { .. } => "Error",
            Message::Alive => "Alive",
            Message::Fetch { .. } => "Fetch",
            Message::Get { .. } => "Get",
            Message::Look { .. } => "Look",
            Message::Trace { .. } => "Trace",
            Message::Traced { .. } => "Traced",
            Message::Pace(_) => "Pace",
            Message::Offer(_) => "Offer",
            Message::Need { .. } => "Need",
            Message::Ask { .. } => "Ask",
            Message::Want { .. } => "Want",
            Message::Chunks(_) => "Chunks",
            Message::Bundle(_) => "Bundle",
            Message::End { .. } => "End",
            Message::Done { .. } => "Done",
            Message::Group { .. } => "Group",
            Message::Join { .. } => "Join",
            Message::Got { .. } => "Got",
            Message::Part { .. } => "Part",
            Message::Prepare(_) => "Prepare",
            Message::Prepared { .. } => "Prepared",
            Message::Stage { .. } => "Stage",
            Message::Commit { .. } => "Commit",
            Message::Abort { .. } => "Abort",
            Message::Inquire { .. } => "Inquire",
            Message::Fate { .. } => "Fate",
        }
    }

    /// Whether it is a request about a guest.
    pub fn is_about_guests(&self) -> bool {
        use Message::{Abort, Commit, Inquire, Prepare, Stage};
        matches!(self, Prepare(_) | Stage { .. } | Commit { .. } | Abort { .. } | Inquire { .. })
    }

    /// Whether it carries chunks, and may go over any connection of its transfer.
    pub fn is_bulk(&self) -> bool {
        matches!(self, Message::Chunks(_) | Message::Bundle(_))
    }

    /// An error's message, its text cut to what fits.
    pub fn error(class: ErrorClass, text: impl Into<String>) -> Message {
        Message::Error { class, text: cut(text, MAX_ERROR_TEXT) }
    }

    /// A fate's message, its text cut to what fits.
    pub fn fate(fate: Fate, micros: u64, text: impl Into<String>) -> Message {
        Message::Fate { fate, micros, text: cut(text, MAX_ERROR_TEXT) }
    }

    /// The message of these obstacles, as many as fit, their texts cut likewise.
    pub fn prepared(obstacles: Vec<Obstacle>) -> Message {
        let fits = |obstacle: Obstacle| {
            Obstacle::new(cut(obstacle.what, MAX_OBSTACLE_TEXT), cut(obstacle.fix, MAX_OBSTACLE_TEXT))
        };
        Message::Prepared { obstacles: obstacles.into_iter().take(MAX_OBSTACLES).map(fits).collect() }
    }
}

/// At most `bytes` of `text`, with blanks for control characters.
fn cut(text: impl Into<String>, bytes: usize) -> String {
    let mut text: String = text.into();
    if text.contains(char::is_control) {
        text = text.replace(char::is_control, " ");
    }
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Whether frames of type `kind` carry chunks.
fn is_bulk(kind: u8) -> bool {
    matches!(kind, codec::CHUNKS | codec::BUNDLE | codec::PATCHES)
}

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// The type byte.
    pub kind: u8,
    /// How many bytes of body follow.
    pub body_bytes: usize,
}

impl FrameHeader {
    /// Checks the first [`HEADER_BYTES`] of a frame.
    pub fn decode(header: &[u8; HEADER_BYTES]) -> layerfs::Result<FrameHeader> {
        let [a, b, c, d, kind] = *header;
        let bytes = u32::from_le_bytes([a, b, c, d]) as usize;
        let most = if is_bulk(kind) { MAX_FRAME_BYTES } else { MAX_SMALL_FRAME_BYTES };
        if bytes == 0 || bytes > most {
            return Err(layerfs::Error::corrupt("frame", format!("{bytes} bytes of type {kind:#04x}")));
        }
        Ok(FrameHeader { kind, body_bytes: bytes - 1 })
    }

    /// Whether what follows carries chunks.
    pub fn is_bulk(&self) -> bool {
        is_bulk(self.kind)
    }

    /// Decodes the body that follows. Chunks' bytes aren't copied.
    pub fn message(&self, body: &Bytes) -> layerfs::Result<Message> {
        decode(self.kind, body)
    }
}
