//! What the tests share: layers made by hand, and two nodes that know each other.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use layerfs::attr::{Attrs, FileKind, Xattrs};
use layerfs::chunk::{ChunkWrite, Class};
use layerfs::chunker::{Chunker, Cutter, Piece};
use layerfs::content::{Content, ContentBuilder, Extent};
use layerfs::inode::{Dentry, Inode, Node as InodeNode, Target};
use layerfs::manifest::{LayerKind, LayerWriter, Manifest};
use layerfs::monitor::{Monitor, Silent};
use layerfs::store::{Expect, Store, StoreOptions};
use layerfs::{ChunkId, Ino, LayerId, LayerName};

use crate::peers::{Peer, PeerName, Rights};
use crate::{Listener, Node, NodeOptions, PublicKey};

/// Files by name, all in the root folder.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// `count` bytes that don't compress well and depend on `seed`.
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A tree of `files` small files and one of `large_bytes`.
pub fn tree(files: u64, large_bytes: usize) -> Tree {
    let mut tree: Tree = (0..files).map(|n| (format!("f{n:06}"), noise(n, 40 + (n as usize * 997) % 3000))).collect();
    tree.insert("large".to_owned(), noise(u64::MAX, large_bytes));
    tree
}

pub fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

pub fn silent() -> Arc<dyn Monitor> {
    Arc::new(Silent)
}

fn content(bytes: &[u8], chunker: Chunker, out: &dyn ChunkWrite) -> Content {
    if bytes.len() <= 512 {
        return Content::Inline(bytes.to_vec());
    }
    let mut builder = ContentBuilder::new(chunker);
    let mut cutter = Cutter::new(chunker);
    let mut push = |piece: Piece<'_>| {
        let extent = match piece {
            Piece::Data(data) => Extent::Chunk { id: out.put(Class::Data, data)?, bytes: data.len() as u32 },
            Piece::Hole(bytes) => Extent::Hole { bytes },
        };
        builder.push(extent, out)
    };
    cutter.data(bytes, &mut push).unwrap();
    cutter.finish(&mut push).unwrap();
    builder.finish(out).unwrap()
}

/// Writes a layer with the whole of `tree` and, with a parent, only that; numbers follow the names' order from `first`.
pub fn write_layer(out: &dyn ChunkWrite, tree: &Tree, parent: Option<(LayerId, &Manifest)>, first: u64) -> LayerId {
    let mut writer = LayerWriter::new(out);
    let mut inodes = Vec::new();
    let inode = |ino, node| Inode { ino: Ino(ino), nlink: 1, attrs: Attrs::default(), xattrs: Xattrs::new(), node };
    if parent.is_none() {
        inodes.push(inode(1, InodeNode::Folder));
    }
    for (at, (name, bytes)) in tree.iter().enumerate() {
        let ino = first + at as u64;
        let target = Target::Inode { ino: Ino(ino), kind: FileKind::File };
        writer.dentry(&Dentry { folder: Ino::ROOT, name: name.clone().into_bytes(), target }).unwrap();
        // Names that begin so are given large attributes instead of content: their records span table pieces.
        if name.starts_with("xattr") {
            let mut record = inode(ino, InodeNode::File(Content::empty()));
            let value = |n: usize| bytes.iter().copied().cycle().take(bytes.len().min(30_000) + n).collect::<Vec<u8>>();
            record.xattrs = (0..4).map(|n| (format!("user.{n}").into_bytes(), value(n))).collect();
            inodes.push(record);
        } else {
            // And these are cut as memory is.
            let chunker = if name.starts_with("memory") { Chunker::Aligned } else { Chunker::Tree };
            inodes.push(inode(ino, InodeNode::File(content(bytes, chunker, out))));
        }
    }
    inodes.iter().for_each(|inode| writer.inode(inode).unwrap());
    let next = Ino(first + tree.len() as u64);
    writer.finish(LayerKind::Base, parent, next).unwrap().0
}

/// Stores `tree` as a base layer called `called`.
pub fn add_layer(store: &Arc<Store>, called: &str, tree: &Tree) -> LayerId {
    let session = store.session("test");
    let layer = write_layer(&session, tree, None, 2);
    session.commit().unwrap();
    store.set_name(&name(called), layer, Expect::Any).unwrap();
    layer
}

/// Stores `tree` over `parent`, replacing nothing of it.
pub fn add_layer_over(store: &Arc<Store>, called: &str, tree: &Tree, parent: LayerId, first: u64) -> LayerId {
    let session = store.session("test");
    let below = Manifest::load(store.as_ref(), parent).unwrap();
    let layer = write_layer(&session, tree, Some((parent, &below)), first);
    session.commit().unwrap();
    store.set_name(&name(called), layer, Expect::Any).unwrap();
    layer
}

/// A store in a temporary folder, with its node.
pub struct Host {
    pub node: Node,
    _folder: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Host {
        Host::with(NodeOptions::default())
    }

    pub fn with(options: NodeOptions) -> Host {
        Host::in_folder(tempfile::Builder::new().prefix("layerfs-migrator-").tempdir().unwrap(), options)
    }

    fn in_folder(folder: tempfile::TempDir, options: NodeOptions) -> Host {
        let store = loop {
            let options = StoreOptions { create: true, ..Default::default() };
            match Store::open(&folder.path().join("store"), options) {
                // Of a node that was dropped some tasks are just ending.
                Err(layerfs::Error::Busy(_)) => std::thread::sleep(std::time::Duration::from_millis(10)),
                opened => break opened.unwrap(),
            }
        };
        Host { node: Node::open(store, options).unwrap(), _folder: folder }
    }

    /// The same host after a new start: nothing is in memory.
    pub fn restarted(self) -> Host {
        let Host { node, _folder } = self;
        let options = node.options().clone();
        drop(node);
        Host::in_folder(_folder, options)
    }

    /// Damages what the packs have of chunk `id`.
    pub fn damage_chunk(&self, id: &ChunkId) {
        let stored = self.store().read_stored(id).unwrap();
        self.damage(&stored.stored);
    }

    pub fn store(&self) -> &Arc<Store> {
        self.node.store()
    }

    /// Flips a bit of what the packs have of `bytes`, which stand there as they are.
    pub fn damage(&self, bytes: &[u8]) {
        let mut hits = 0;
        for pack in std::fs::read_dir(self._folder.path().join("store/packs")).unwrap() {
            let path = pack.unwrap().path();
            let mut pack = std::fs::read(&path).unwrap();
            let found = pack.windows(bytes.len()).position(|window| window == bytes);
            if let Some(at) = found {
                pack[at] ^= 1;
                let file = std::fs::File::options().write(true).open(&path).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, &pack[at..=at], at as u64).unwrap();
                hits += 1;
            }
        }
        assert_eq!(hits, 1, "packs with these bytes");
    }

    pub fn know(&self, called: &str, key: PublicKey, address: Option<String>, rights: Rights) {
        let name = PeerName::new(called).unwrap();
        self.node.peers().add(Peer { name, address, key, rights }).unwrap();
    }

    /// Whether `called` refers to `layer` here, and all of that is whole.
    pub fn has_whole(&self, called: &str, layer: LayerId) -> bool {
        let Some(record) = self.store().name(&name(called)).unwrap() else { return false };
        assert_eq!(record.layer, layer);
        let mut next = Some(layer);
        while let Some(layer) = next {
            let store = self.store();
            crate::check::check_layer(store.as_ref(), layer, &mut |ids| store.contains_many(ids)).unwrap();
            next = Manifest::load(store.as_ref(), layer).unwrap().parent;
        }
        true
    }
}

/// Two hosts; `here` knows `there` as "there", which listens and knows `here` as "here".
pub struct Pair {
    pub here: Host,
    pub there: Host,
    pub listener: Listener,
}

impl Pair {
    pub async fn new() -> Pair {
        Pair::with_rights(Rights::default()).await
    }

    /// `rights` are those of `here` at `there`.
    pub async fn with_rights(rights: Rights) -> Pair {
        let (here, there) = (Host::new(), Host::new());
        let listener = there.node.listen((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        here.know("there", there.node.public_key(), Some(listener.address().to_string()), Rights::default());
        there.know("here", here.node.public_key(), None, rights);
        Pair { here, there, listener }
    }

    pub async fn push(&self, called: &str) -> crate::Result<crate::TransferReport> {
        self.here.node.push(&[name(called)], "there", Default::default(), silent()).await
    }

    pub fn listens(&self) -> std::net::SocketAddr {
        self.listener.address()
    }

    pub async fn pull(&self, called: &str) -> crate::Result<crate::TransferReport> {
        self.here.node.pull(&[name(called)], "there", Default::default(), silent()).await
    }
}
