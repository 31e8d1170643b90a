//! The bytes of every structure of FORMAT.md that a layer consists of, and decoders that meet any bytes.
//!
//! A golden test that fails means that the format changed: layers made before would get other ids, or not be read.

use std::sync::Arc;

use proptest::prelude::*;

use crate::attr::{Attrs, FileKind, Time};
use crate::chunk::{ChunkRead, ChunkWrite, Class, MemoryChunks};
use crate::chunker::Chunker;
use crate::codec::Reader;
use crate::content::{Content, ContentBuilder, Extent, Extents, List, decode_node};
use crate::id::{ChunkId, Ino, LayerId};
use crate::inode::{Dentry, Inode, Node, Stat, Target};
use crate::manifest::{LayerKind, LayerWriter, Manifest};
use crate::table::records::Records;
use crate::table::table_path;
use crate::view::View;

/// Hexadecimal digits; parts may be spaced.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn golden(parts: &[&str]) -> String {
    parts.concat().replace([' ', '\n'], "")
}

fn id(seed: u8) -> ChunkId {
    ChunkId([seed; 32])
}

fn id_hex(seed: u8) -> String {
    hex(&[seed; 32])
}

fn attrs() -> Attrs {
    let time = |seconds, nanos| Time { seconds, nanos };
    let (atime, mtime, ctime) = (time(1, 2), time(-1, 999_999_999), time(0x0102_0304, 5));
    Attrs { permissions: 0o4755, uid: 1000, gid: 0x0001_0000, atime, mtime, ctime }
}

fn extents(list: List) -> Content {
    Content::Extents { bytes: 0x3_0000, data_bytes: 0x1_0000, chunker: Chunker::Tree, list }
}

/// One inode of each kind.
fn inodes() -> Vec<Inode> {
    let xattrs = vec![(b"user.a".to_vec(), b"v".to_vec()), (b"user.b".to_vec(), Vec::new())];
    let direct = vec![Extent::Chunk { id: id(7), bytes: 0x1_0000 }, Extent::Hole { bytes: 0x2_0000 }];
    let nodes = [
        Node::Folder,
        Node::File(Content::Inline(b"hello".to_vec())),
        Node::File(extents(List::Direct(direct))),
        Node::File(extents(List::Tree { root: id(8), depth: 2 })),
        Node::Symlink(b"../x".to_vec()),
        Node::BlockDevice(0x0801),
        Node::CharDevice(0x0103),
        Node::Fifo,
        Node::Socket,
    ];
    let numbered = nodes.into_iter().zip(1..);
    let made = numbered.map(|(node, number)| Inode {
        ino: Ino(number),
        nlink: 2,
        attrs: attrs(),
        xattrs: xattrs.clone(),
        node,
    });
    made.collect()
}

fn encoded(inode: &Inode) -> Vec<u8> {
    let mut bytes = Vec::new();
    inode.encode(&mut bytes);
    bytes
}

#[test]
fn inode_records() {
    let times = "0100000000000000 02000000  ffffffffffffffff ffc99a3b  0403020100000000 05000000";
    let xattrs = "0200  0600 757365722e61 01000000 76  0600 757365722e62 00000000";
    let (seven, eight) = (id_hex(7), id_hex(8));
    let direct = format!("01 00 0000030000000000 0000010000000000  02  01 00000100 {seven}  00 0000020000000000");
    let tree = format!("02 00 0000030000000000 0000010000000000  02 {eight}");
    let expected = [
        ("ed490000", "57000000", ""),
        ("ed890000", "5f000000", "00 0500 68656c6c6f"),
        ("ed890000", "98000000", &direct),
        ("ed890000", "8a000000", &tree),
        ("eda90000", "5d000000", "0400 2e2e2f78"),
        ("ed690000", "5f000000", "0108000000000000"),
        ("ed290000", "5f000000", "0301000000000000"),
        ("ed190000", "57000000", ""),
        ("edc90000", "57000000", ""),
    ];
    for (inode, (mode, length, node)) in inodes().iter().zip(expected) {
        let number = hex(&inode.ino.0.to_le_bytes());
        let owner = "e8030000 00000100";
        let bytes = encoded(inode);
        assert_eq!(hex(&bytes), golden(&[length, &number, mode, "02000000", owner, times, xattrs, node]), "{inode:?}");
        let mut reader = Reader::new("inode record", &bytes);
        assert_eq!(&Inode::decode(&mut reader).unwrap(), inode);
        assert_eq!(Stat::decode(&mut Reader::new("inode record", &bytes)).unwrap(), Stat::from(inode));
    }
}

#[test]
fn dentry_records() {
    let target = Target::Inode { ino: Ino(0x1234), kind: FileKind::Symlink };
    for (target, expected) in [(target, "3412000000000000 03"), (Target::Whiteout, "0000000000000000 00")] {
        let dentry = Dentry { folder: Ino(2), name: b"\xffname".to_vec(), target };
        let mut bytes = Vec::new();
        dentry.encode(&mut bytes);
        assert_eq!(hex(&bytes), golden(&["0200000000000000", expected, "05 ff6e616d65"]));
        assert_eq!(Dentry::decode(&mut Reader::new("dentry record", &bytes)).unwrap(), dentry);
    }
}

#[test]
fn manifests() {
    let manifest = Manifest {
        kind: LayerKind::Instance,
        parent: Some(LayerId(id(9))),
        depth: 2,
        next_ino: Ino(0x77),
        inode_count: 3,
        dentry_count: 4,
        file_bytes: 5,
        inodes: extents(List::Tree { root: id(8), depth: 1 }),
        dentries: extents(List::Direct(Vec::new())),
    };
    let (eight, nine) = (id_hex(8), id_hex(9));
    let expected = golden(&[
        "4c464d46 0100 02 01", // LFMF, version, kind, has a parent
        &nine,
        "02000000 7700000000000000 0300000000000000 0400000000000000 0500000000000000",
        "02 00 0000030000000000 0000010000000000 01",
        &eight,
        "01 00 0000030000000000 0000010000000000 00",
    ]);
    assert_eq!(hex(&manifest.encode()), expected);
    let whole = Manifest { dentries: Content::empty(), parent: None, depth: 0, ..manifest };
    assert_eq!(Manifest::decode(&whole.encode()).unwrap(), whole);
    assert_eq!(&hex(&whole.encode())[..24], "4c464d460100020000000000");
}

#[test]
fn list_nodes() {
    let chunks = MemoryChunks::default();
    let mut builder = ContentBuilder::new(Chunker::Aligned);
    let list = [
        Extent::Chunk { id: id(1), bytes: 0x1_0000 },
        Extent::Hole { bytes: 0x2_0000 },
        Extent::Chunk { id: id(2), bytes: 5 },
        Extent::Chunk { id: id(3), bytes: 6 },
        Extent::Chunk { id: id(4), bytes: 7 },
    ];
    list.iter().for_each(|extent| builder.push(*extent, &chunks).unwrap());
    let content = builder.finish(&chunks).unwrap();
    let Content::Extents { list: List::Tree { root, depth: 1 }, .. } = content else { panic!("{content:?}") };
    let [one, two, three, four] = [1, 2, 3, 4].map(id_hex);
    let expected = golden(&[
        "01 0500", // depth, entries
        "01 00000100",
        &one,
        "00 0000020000000000",
        "01 05000000",
        &two,
        "01 06000000",
        &three,
        "01 07000000",
        &four,
    ]);
    assert_eq!(hex(&chunks.get(&root).unwrap()), expected);
    let above = golden(&["02 0100 0900000000000000", &one]);
    let bytes: Vec<u8> =
        (0..above.len()).step_by(2).map(|at| u8::from_str_radix(&above[at..at + 2], 16).unwrap()).collect();
    assert_eq!(decode_node(&bytes, 2).unwrap()[0].len(), 9);
}

/// A layer with the inodes of [`inodes`] in its root.
fn layer(chunks: &MemoryChunks) -> (LayerId, Manifest) {
    let mut writer = LayerWriter::new(chunks);
    for inode in &inodes()[1..] {
        let target = Target::Inode { ino: inode.ino, kind: inode.kind() };
        writer.dentry(&Dentry { folder: Ino::ROOT, name: inode.ino.to_string().into_bytes(), target }).unwrap();
    }
    inodes().iter().for_each(|inode| writer.inode(inode).unwrap());
    writer.finish(LayerKind::Base, None, Ino(10)).unwrap()
}

#[test]
fn layers_and_table_files() {
    let chunks = MemoryChunks::default();
    let (id, _) = layer(&chunks);
    assert_eq!(id.to_string(), "5986869de3d29c231aa5e5dbe538bdf8213c00b3456477e41007cd65d4691c6d");
    let tables = tempfile::tempdir().unwrap();
    View::from_chunks(Arc::new(chunks), tables.path(), id).unwrap();
    let file = std::fs::read(table_path(tables.path(), id)).unwrap();
    let header = golden(&[
        "4c465442 0100 0000", // LFTB, version, flags
        &id.to_string(),
        "9800000000000000 c503000000000000 0800000000000000 0900000000000000 0100000000000000",
        "00000000000000000000000000000000",
    ]);
    assert_eq!(hex(&file[..96]), header);
    assert_eq!(ChunkId::of(&file).to_string(), "28edd66b8e440bc71fbfe798f4d64289ad3b0d6a4cba8ef6285b16c7ae5c914c");
}

/// Decoding `bytes` as anything may fail, and does nothing else.
fn decode_all(bytes: &[u8]) {
    let _ = Manifest::decode(bytes);
    let _ = Inode::decode(&mut Reader::new("inode record", bytes));
    let _ = Stat::decode(&mut Reader::new("inode record", bytes));
    let _ = Dentry::decode(&mut Reader::new("dentry record", bytes));
    (1..=8).for_each(|depth| drop(decode_node(bytes, depth)));
    let chunks = MemoryChunks::default();
    if let Ok(content) = Content::decode(&mut Reader::new("content", bytes)) {
        let _ = Extents::new(&chunks, &content, 5).map(|extents| extents.take(10).count());
        let _ = crate::content::read_at(&chunks, &content, 1, &mut [0; 100]);
    }
    if !bytes.is_empty() {
        // As a table's only chunk.
        let id = chunks.put(Class::Table, bytes).unwrap();
        let mut builder = ContentBuilder::new(Chunker::Records);
        builder.push(Extent::Chunk { id, bytes: bytes.len() as u32 }, &chunks).unwrap();
        let content = builder.finish(&chunks).unwrap();
        let mut records = Records::inodes(&chunks, &content).unwrap();
        while let Ok(Some(_)) = records.next_inode() {}
        let mut records = Records::dentries(&chunks, &content).unwrap();
        while let Ok(Some(_)) = records.next_dentry() {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn decoders_take_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    #[test]
    fn decoders_take_damaged_structures(
        which in 0usize..20,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let chunks = MemoryChunks::default();
        let (_, manifest) = layer(&chunks);
        let mut all: Vec<Vec<u8>> = inodes().iter().map(encoded).collect();
        all.push(manifest.encode());
        let mut ids = chunks.ids();
        ids.sort();
        all.extend(ids.iter().map(|(id, _)| chunks.get(id).unwrap().to_vec()));
        let mut content = Vec::new();
        extents(List::Tree { root: id(8), depth: 2 }).encode(&mut content);
        all.push(content);
        let mut bytes = all[which % all.len()].clone();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        decode_all(&bytes);
    }

    #[test]
    fn a_layer_with_damaged_chunks_is_an_error_and_nothing_worse(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        dentries in any::<bool>(),
    ) {
        // The chunks are what a hostile peer made: consistent, but not a layer.
        let chunks = MemoryChunks::default();
        let (_, mut manifest) = layer(&chunks);
        let table = if dentries { &mut manifest.dentries } else { &mut manifest.inodes };
        let mut bytes = vec![0; table.len() as usize];
        crate::content::read_at(&chunks, table, 0, &mut bytes).unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let id = chunks.put(Class::Table, &bytes).unwrap();
        let mut builder = ContentBuilder::new(Chunker::Records);
        builder.push(Extent::Chunk { id, bytes: bytes.len() as u32 }, &chunks).unwrap();
        *table = builder.finish(&chunks).unwrap();
        let id = LayerId(chunks.put(Class::Manifest, &manifest.encode()).unwrap());
        if let Ok(view) = View::from_chunks(Arc::new(chunks), std::path::Path::new("/nonexistent"), id) {
            let _ = view.walk(|entry| {
                let _ = view.inode(entry.ino);
                Ok(crate::walk::Next::Enter)
            });
            let _ = crate::diff::diff(&View::empty(view.chunks().clone()), &view).count();
        }
    }
}
