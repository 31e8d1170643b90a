//! A sealed layer's manifest, and how its two tables become chunks.
//!
//! FORMAT.md, "Manifest". The manifest is one chunk; its id is the layer's id. Each table is a run of records
//! cut into chunks between records, where a record's *key* says so, so that a changed record changes one chunk,
//! and a new one at most two. Invariant: a manifest holds nothing that depends on when or where it was made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::chunk::{ChunkRead, ChunkWrite, Class};
use crate::chunker::Chunker;
use crate::codec::{Put, Reader};
use crate::content::{Content, ContentBuilder, Extent};
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino, LayerId};
use crate::inode::{Dentry, Inode, Node};

/// What a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum LayerKind {
    /// The operating system, present everywhere.
    Base = 0,
    /// Installed software and its data.
    Application = 1,
    /// The running state.
    Instance = 2,
}

impl LayerKind {
    /// All kinds.
    pub const ALL: [LayerKind; 3] = [LayerKind::Base, LayerKind::Application, LayerKind::Instance];

    /// The kind's name.
    pub fn as_str(self) -> &'static str {
        match self {
            LayerKind::Base => "base",
            LayerKind::Application => "application",
            LayerKind::Instance => "instance",
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for LayerKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<LayerKind> {
        let found = LayerKind::ALL.into_iter().find(|kind| kind.as_str() == text);
        found.ok_or_else(|| Error::invalid(format!("{text:?} is not a kind of layer: base, application or instance")))
    }
}

/// The most layers in a stack: every look-up may have to ask each.
pub const MAX_LAYERS: usize = 1024;

const MAGIC: &[u8; 4] = b"LFMF";
const VERSION: u16 = 1;

/// A sealed layer, in a few hundred bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// What it is for.
    pub kind: LayerKind,
    /// The layer that it lies on.
    pub parent: Option<LayerId>,
    /// How many layers lie below it.
    pub depth: u32,
    /// The number that the next new inode above gets; greater than every number in the stack.
    pub next_ino: Ino,
    /// Inode records in this layer.
    pub inode_count: u64,
    /// Dentry records in this layer, whiteouts included.
    pub dentry_count: u64,
    /// The sizes of the regular files among the inode records, added up, in bytes; at most 2^64 - 1.
    pub file_bytes: u64,
    /// The table of inode records.
    pub inodes: Content,
    /// The table of dentry records.
    pub dentries: Content,
    /// What the image whose top layer this was says of itself: an [`crate::image_config::ImageConfig`].
    pub image: Option<Content>,
}

/// Bits of the manifest's flags.
const HAS_PARENT: u8 = 1;
const HAS_IMAGE: u8 = 2;

impl Manifest {
    /// All contents that the manifest itself refers to: its tables, and what it says of an image.
    pub fn contents(&self) -> impl Iterator<Item = &Content> {
        [&self.dentries, &self.inodes].into_iter().chain(&self.image)
    }

    /// The encoding: what is hashed, stored and sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(300);
        out.extend_from_slice(MAGIC);
        out.put_u16(VERSION);
        out.put_u8(self.kind as u8);
        let has_parent = if self.parent.is_some() { HAS_PARENT } else { 0 };
        let has_image = if self.image.is_some() { HAS_IMAGE } else { 0 };
        out.put_u8(has_parent | has_image);
        if let Some(parent) = &self.parent {
            out.put_id(&parent.0);
        }
        out.put_u32(self.depth);
        out.put_u64(self.next_ino.0);
        out.put_u64(self.inode_count);
        out.put_u64(self.dentry_count);
        out.put_u64(self.file_bytes);
        self.inodes.encode(&mut out);
        self.dentries.encode(&mut out);
        if let Some(image) = &self.image {
            image.encode(&mut out);
        }
        out
    }

    /// Decodes what [`Manifest::encode`] made.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a later version, [`Error::Corrupt`] for anything malformed.
    pub fn decode(bytes: &[u8]) -> Result<Manifest> {
        let mut reader = Reader::new("manifest", bytes);
        if reader.take(4)? != MAGIC {
            return Err(reader.error("it doesn't begin with LFMF"));
        }
        let version = reader.u16()?;
        if version != VERSION {
            return Err(Error::Unsupported { what: "manifest", detail: format!("version {version}") });
        }
        let kind = reader.u8()?;
        let kind = *LayerKind::ALL.get(usize::from(kind)).ok_or_else(|| reader.error(format!("kind {kind}")))?;
        let flags = reader.u8()?;
        if flags & !(HAS_PARENT | HAS_IMAGE) != 0 {
            return Err(reader.error(format!("flags {flags}")));
        }
        let parent = if flags & HAS_PARENT != 0 { Some(LayerId(reader.id()?)) } else { None };
        let manifest = Manifest {
            kind,
            parent,
            depth: reader.u32()?,
            next_ino: Ino(reader.u64()?),
            inode_count: reader.u64()?,
            dentry_count: reader.u64()?,
            file_bytes: reader.u64()?,
            inodes: Content::decode(&mut reader)?,
            dentries: Content::decode(&mut reader)?,
            image: if flags & HAS_IMAGE != 0 { Some(Content::decode(&mut reader)?) } else { None },
        };
        if manifest.next_ino < Ino::FIRST || (manifest.depth == 0) != manifest.parent.is_none() {
            return Err(reader.error("impossible next inode number or depth"));
        }
        reader.finish()?;
        Ok(manifest)
    }

    /// Checks that another layer may lie on this one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a stack with one more could not be opened.
    pub fn check_bears_another(&self) -> Result<()> {
        if (self.depth as usize).saturating_add(1) < MAX_LAYERS {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the stack below has {MAX_LAYERS} layers, and can't bear another; make fewer of them with `layerctl squash` first"
        )))
    }

    /// Reads the manifest of layer `id`.
    pub fn load(chunks: &dyn ChunkRead, id: LayerId) -> Result<Manifest> {
        match chunks.get(&id.0) {
            Ok(bytes) => Manifest::decode(&bytes),
            Err(Error::ChunkMissing(_)) => Err(Error::LayerMissing(id)),
            Err(error) => Err(error),
        }
    }
}

/// Fewest and most bytes in a table's chunk, and the mask of the key's hash that ends one (about 8 KiB on average).
const TABLE_MIN: usize = 2 * 1024;
pub(crate) const TABLE_MAX: usize = 32 * 1024;
const TABLE_MASK: u8 = 63;

/// Cuts a table's records into chunks as they come. Holds one chunk.
#[derive(Debug)]
struct TableWriter {
    buffer: Vec<u8>,
    content: ContentBuilder,
    count: u64,
}

impl TableWriter {
    fn new() -> TableWriter {
        TableWriter { buffer: Vec::new(), content: ContentBuilder::new(Chunker::Records), count: 0 }
    }

    /// Appends the record that `encode` writes; `key` identifies it within its table.
    fn record(&mut self, key: &[u8], out: &dyn ChunkWrite, encode: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let before = self.buffer.len();
        encode(&mut self.buffer);
        self.count += 1;
        if before > 0 && self.buffer.len() > TABLE_MAX {
            let record = self.buffer.split_off(before);
            self.flush(out)?;
            self.buffer = record;
        }
        let ends = self.buffer.len() >= TABLE_MIN && blake3::hash(key).as_bytes()[0] & TABLE_MASK == 0;
        // A record that alone exceeds TABLE_MAX (large extended attributes) is split over chunks of its own.
        while self.buffer.len() > TABLE_MAX {
            let rest = self.buffer.split_off(TABLE_MAX);
            self.flush(out)?;
            self.buffer = rest;
        }
        if ends { self.flush(out) } else { Ok(()) }
    }

    fn flush(&mut self, out: &dyn ChunkWrite) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let id = out.put(Class::Table, &self.buffer)?;
        let bytes = self.buffer.len() as u32;
        self.buffer.clear();
        self.content.push(Extent::Chunk { id, bytes }, out)
    }

    fn finish(mut self, out: &dyn ChunkWrite) -> Result<(Content, u64)> {
        self.flush(out)?;
        let count = self.count;
        Ok((self.content.finish(out)?, count))
    }
}

/// Writes a layer: its dentries and its inodes, each in order, then the manifest.
///
/// Chunks that the records refer to must be in `out` (or durable) before. Memory: two chunks and the open list nodes.
pub struct LayerWriter<'a> {
    out: &'a dyn ChunkWrite,
    dentries: TableWriter,
    inodes: TableWriter,
    last_dentry: Option<(Ino, Vec<u8>)>,
    last_inode: Option<Ino>,
    file_bytes: u64,
    image: Option<Content>,
}

impl<'a> LayerWriter<'a> {
    /// A writer of a layer into `out`.
    pub fn new(out: &'a dyn ChunkWrite) -> LayerWriter<'a> {
        LayerWriter {
            out,
            dentries: TableWriter::new(),
            inodes: TableWriter::new(),
            last_dentry: None,
            last_inode: None,
            file_bytes: 0,
            image: None,
        }
    }

    /// Keeps `image`, what an image says of itself, with the layer.
    pub fn image(&mut self, image: Content) {
        self.image = Some(image);
    }

    /// Appends a dentry; its (folder, name) must be greater than the last one's.
    pub fn dentry(&mut self, dentry: &Dentry) -> Result<()> {
        let key = (dentry.folder, dentry.name.clone());
        assert!(self.last_dentry.as_ref().is_none_or(|last| *last < key), "dentries out of order at {key:?}");
        let mut cut_key = dentry.folder.0.to_le_bytes().to_vec();
        cut_key.extend_from_slice(&dentry.name);
        self.last_dentry = Some(key);
        self.dentries.record(&cut_key, self.out, |buffer| dentry.encode(buffer))
    }

    /// Appends an inode; its number must be greater than the last one's.
    ///
    /// # Errors
    /// [`Error::Invalid`] if its extended attributes are more than a record holds; those of writing.
    pub fn inode(&mut self, inode: &Inode) -> Result<()> {
        assert!(self.last_inode.is_none_or(|last| last < inode.ino), "inodes out of order at {}", inode.ino);
        if !inode.fits_record() {
            return Err(Error::invalid(format!(
                "inode {} has {} extended attributes, more than the 16 MiB that a layer keeps; remove some",
                inode.ino,
                inode.xattrs.len(),
            )));
        }
        self.last_inode = Some(inode.ino);
        if let Node::File(content) = &inode.node {
            // Sparse files may be larger together than a number tells.
            self.file_bytes = self.file_bytes.saturating_add(content.len());
        }
        self.inodes.record(&inode.ino.0.to_le_bytes(), self.out, |buffer| inode.encode(buffer))
    }

    /// Writes the manifest. `parent` is the layer below with its manifest; `next_ino` is greater than every number used.
    ///
    /// # Errors
    /// [`Manifest::check_bears_another`], and those of writing.
    pub fn finish(
        self,
        kind: LayerKind,
        parent: Option<(LayerId, &Manifest)>,
        next_ino: Ino,
    ) -> Result<(LayerId, Manifest)> {
        parent.map_or(Ok(()), |(_, manifest)| manifest.check_bears_another())?;
        let (dentries, dentry_count) = self.dentries.finish(self.out)?;
        let (inodes, inode_count) = self.inodes.finish(self.out)?;
        let manifest = Manifest {
            kind,
            parent: parent.map(|(id, _)| id),
            depth: parent.map_or(0, |(_, manifest)| manifest.depth + 1),
            next_ino: next_ino.max(parent.map_or(Ino::FIRST, |(_, manifest)| manifest.next_ino)),
            inode_count,
            dentry_count,
            file_bytes: self.file_bytes,
            inodes,
            dentries,
            image: self.image,
        };
        let id: ChunkId = self.out.put(Class::Manifest, &manifest.encode())?;
        Ok((LayerId(id), manifest))
    }
}
