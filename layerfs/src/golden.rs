//! Golden bytes: each encoding on disk as FORMAT.md describes it, so that no change of it goes unseen.
//!
//! A failure here means that stores made before can't be read any more. Then the version of the structure has to
//! grow, and the reader to know both. Packs and chunkers have their golden tests beside their code.

use crate::attr::{Attrs, FileKind, Time};
use crate::chunk::{ChunkRead, ChunkWrite, Class, MemoryChunks};
use crate::chunker::Chunker;
use crate::codec::Reader;
use crate::content::{Content, ContentBuilder, Extent, List, decode_node};
use crate::error::ErrorClass;
use crate::id::{ChunkId, Ino, LayerId, LayerName};
use crate::inode::{Dentry, Inode, Node, Target};
use crate::manifest::{LayerKind, LayerWriter, Manifest};
use crate::store::db::Cf;
use crate::store::{Expect, Store, StoreOptions};
use crate::table::{Table, table_path};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The id `nn nn … nn`.
fn id(byte: u8) -> ChunkId {
    ChunkId([byte; 32])
}

fn ids(byte: u8) -> String {
    format!("{byte:02x}").repeat(32)
}

fn encoded(content: &Content) -> String {
    let mut out = Vec::new();
    content.encode(&mut out);
    let mut reader = Reader::new("test", &out);
    assert_eq!(Content::decode(&mut reader).unwrap(), *content);
    assert!(reader.is_empty());
    hex(&out)
}

#[test]
fn contents() {
    assert_eq!(encoded(&Content::Inline(b"abc".to_vec())), "000300616263");
    let extents = vec![Extent::Hole { bytes: 4096 }, Extent::Chunk { id: id(0xaa), bytes: 0x1234 }];
    let (bytes, data_bytes) = (4096 + 0x1234, 0x1234);
    let direct = Content::Extents { bytes, data_bytes, chunker: Chunker::Aligned, list: List::Direct(extents) };
    let expected =
        ["01", "01", "3422000000000000", "3412000000000000", "02", "00", "0010000000000000", "01", "34120000"];
    assert_eq!(encoded(&direct), expected.concat() + &ids(0xaa));
    let list = List::Tree { root: id(0xbb), depth: 2 };
    let tree = Content::Extents { bytes, data_bytes, chunker: Chunker::Tree, list };
    assert_eq!(encoded(&tree), format!("020034220000000000003412000000000000{:02x}{}", 2, ids(0xbb)));
}

#[test]
fn list_nodes() {
    let chunks = MemoryChunks::default();
    let mut builder = ContentBuilder::new(Chunker::Tree);
    for number in 0..5u8 {
        let plain = [number; 3];
        builder.push(Extent::Chunk { id: chunks.put(Class::Data, &plain).unwrap(), bytes: 3 }, &chunks).unwrap();
    }
    builder.push(Extent::Hole { bytes: 8192 }, &chunks).unwrap();
    let Content::Extents { bytes, data_bytes, list: List::Tree { root, depth }, .. } = builder.finish(&chunks).unwrap()
    else {
        panic!("six extents make a tree");
    };
    assert_eq!((bytes, data_bytes, depth), (8192 + 15, 15, 1));
    let leaf = chunks.get(&root).unwrap();
    let mut expected = "010600".to_owned();
    (0..5u8).for_each(|number| expected += &format!("0103000000{}", ChunkId::of(&[number; 3])));
    expected += "000020000000000000";
    assert_eq!(hex(&leaf), expected);
    let above = [&[2, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0][..], &[0xcc; 32]].concat();
    let decoded = decode_node(&above, 2).unwrap();
    assert_eq!(decoded, [crate::content::Entry::Node { id: id(0xcc), bytes: 7 }]);
}

/// Where nodes end is part of the format too: the same extents give the same root everywhere.
#[test]
fn shape_of_a_large_list() {
    let chunks = MemoryChunks::default();
    let mut builder = ContentBuilder::new(Chunker::Tree);
    for number in 0..100_000u64 {
        let id = ChunkId::of(&number.to_le_bytes());
        builder.push(Extent::Chunk { id, bytes: 65_536 }, &chunks).unwrap();
    }
    let Content::Extents { list, .. } = builder.finish(&chunks).unwrap() else { panic!("not inline") };
    let List::Tree { root, depth } = list else { panic!("not direct") };
    assert_eq!((root.short().as_str(), depth, chunks.len()), ("834540526e48", 3, 678));
}

fn attrs() -> Attrs {
    let time = |seconds, nanos| Time { seconds, nanos };
    Attrs { permissions: 0o4755, uid: 1, gid: 2, atime: time(3, 4), mtime: time(-1, 5), ctime: time(6, 7) }
}

#[test]
fn inode_records() {
    let xattrs = vec![(b"user.a".to_vec(), b"v".to_vec())];
    let nodes = [
        (Node::File(Content::empty()), "ed890000", "000000".to_owned()),
        (Node::Folder, "ed490000", String::new()),
        (Node::Symlink(b"to".to_vec()), "eda90000", "0200746f".to_owned()),
        (Node::BlockDevice(0x0801), "ed690000", "0108000000000000".to_owned()),
        (Node::CharDevice(0x0103), "ed290000", "0301000000000000".to_owned()),
        (Node::Fifo, "ed190000", String::new()),
        (Node::Socket, "edc90000", String::new()),
    ];
    for (node, mode, rest) in nodes {
        let inode = Inode { ino: Ino(0x0102), nlink: 2, attrs: attrs(), xattrs: xattrs.clone(), node };
        let fields = [
            "0201000000000000",
            mode,
            "02000000",
            "01000000",
            "02000000",
            "030000000000000004000000",
            "ffffffffffffffff05000000",
            "060000000000000007000000",
            "0100",
            "0600757365722e61",
            "0100000076",
            &rest,
        ]
        .concat();
        let mut out = Vec::new();
        inode.encode(&mut out);
        assert_eq!(hex(&out), format!("{:02x}000000{fields}", fields.len() / 2));
        assert_eq!(Inode::decode(&mut Reader::new("test", &out)).unwrap(), inode);
    }
}

#[test]
fn dentry_records() {
    let target = Target::Inode { ino: Ino(3), kind: FileKind::Symlink };
    for (target, middle) in [(target, "030000000000000003"), (Target::Whiteout, "000000000000000000")] {
        let dentry = Dentry { folder: Ino(0x0201), name: b"n\xff".to_vec(), target };
        let mut out = Vec::new();
        dentry.encode(&mut out);
        assert_eq!(hex(&out), format!("0102000000000000{middle}026eff"));
        assert_eq!(Dentry::decode(&mut Reader::new("test", &out)).unwrap(), dentry);
    }
}

#[test]
fn manifests() {
    let manifest = Manifest {
        kind: LayerKind::Application,
        parent: Some(LayerId(id(0xdd))),
        depth: 1,
        next_ino: Ino(0x0304),
        inode_count: 5,
        dentry_count: 6,
        file_bytes: 7,
        inodes: Content::Inline(b"i".to_vec()),
        dentries: Content::Inline(b"d".to_vec()),
        image: None,
    };
    let bytes = manifest.encode();
    let rest =
        "01000000040300000000000005000000000000000600000000000000070000000000000000010069".to_owned() + "00010064";
    assert_eq!(hex(&bytes), format!("4c464d4601000101{}{rest}", ids(0xdd)));
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    let of_image = Manifest { image: Some(Content::Inline(b"{}".to_vec())), ..manifest };
    assert_eq!(hex(&of_image.encode()), format!("4c464d4601000103{}{rest}0002007b7d", ids(0xdd)));
    assert_eq!(Manifest::decode(&of_image.encode()).unwrap(), of_image);
    let alone = Manifest { parent: None, depth: 0, ..of_image };
    assert_eq!(hex(&alone.encode()[..8]), "4c464d4601000102");
    assert_eq!(Manifest::decode(&alone.encode()).unwrap(), alone);
    for (position, class) in
        [(0, ErrorClass::Corrupt), (4, ErrorClass::Unsupported), (6, ErrorClass::Corrupt), (7, ErrorClass::Corrupt)]
    {
        let mut other = bytes.clone();
        other[position] ^= 6;
        assert_eq!(Manifest::decode(&other).unwrap_err().class(), class, "byte {position}");
    }
}

/// A layer of 3,000 files, one of them with attributes longer than a table's chunk.
fn layer(out: &dyn ChunkWrite) -> (LayerId, Manifest) {
    let mut writer = LayerWriter::new(out);
    for number in 0..3000u64 {
        let target = Target::Inode { ino: Ino(2 + number), kind: FileKind::File };
        writer.dentry(&Dentry { folder: Ino::ROOT, name: format!("{number:05}").into_bytes(), target }).unwrap();
    }
    let inode = |ino, xattrs, node| Inode { ino: Ino(ino), nlink: 1, attrs: attrs(), xattrs, node };
    writer.inode(&inode(1, vec![], Node::Folder)).unwrap();
    for number in 0..3000u64 {
        let large = if number == 1500 { 60_000 } else { 0 };
        let xattrs = if large > 0 { vec![(b"user.large".to_vec(), vec![7; large])] } else { vec![] };
        writer.inode(&inode(2 + number, xattrs, Node::File(Content::Inline(number.to_le_bytes().to_vec())))).unwrap();
    }
    writer.finish(LayerKind::Base, None, Ino(3002)).unwrap()
}

#[test]
fn a_layer_has_one_id_everywhere() {
    let chunks = MemoryChunks::default();
    let (id, manifest) = layer(&chunks);
    assert_eq!((id.0.short().as_str(), chunks.len()), ("5b1ada4b929a", 57));
    assert_eq!(Manifest::load(&chunks, id).unwrap(), manifest);
}

#[test]
fn table_files() {
    let chunks = MemoryChunks::default();
    let (id, manifest) = layer(&chunks);
    let folder = tempfile::tempdir().unwrap();
    Table::open(&chunks, folder.path(), id, &manifest).unwrap();
    let bytes = std::fs::read(table_path(folder.path(), id)).unwrap();
    assert_eq!(hex(&bytes[..8]), "4c46544201000000");
    assert_eq!(bytes[8..40], id.0.0);
    let field = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    assert_eq!([field(56), field(64), field(72)], [3000, 3001, 1]);
    assert_eq!(field(40), manifest.dentries.len());
    assert_eq!(bytes.len() as u64, 128 + field(40) + field(48) + 3000 * 8 + 3001 * 16 + 16);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..96]).update(&bytes[128..]);
    assert_eq!(hasher.finalize().as_bytes(), &bytes[96..128]);
    assert_eq!(ChunkId::of(&bytes).short(), "b86d9e72a686");
}

#[test]
fn a_store() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("store");
    let store = Store::open(&at, StoreOptions::create()).unwrap();
    let session = store.session("golden");
    let chunk = session.put(Class::Data, b"layerfs").unwrap();
    let (layer, _) = LayerWriter::new(&session).finish(LayerKind::Base, None, Ino(2)).unwrap();
    session.commit().unwrap();
    store.set_name(&LayerName::new("golden").unwrap(), layer, Expect::Absent).unwrap();
    assert_eq!(std::fs::read(at.join("format")).unwrap(), b"layerfs store 1\n");
    let pack = std::fs::read(at.join("packs/0000000000000001.pack")).unwrap();
    assert_eq!(hex(&pack[..16]), "4c46504b010000000100000000000000");
    let row = store.db().get(Cf::Chunks, chunk.0).unwrap().unwrap();
    assert_eq!(hex(&row), "0100000000000000100000000700000007000000".to_owned() + "0000");
    let row = store.db().get(Cf::Names, "golden").unwrap().unwrap();
    assert_eq!(row.len(), 45);
    assert_eq!(hex(&row[..33]), format!("01{layer}"));
    assert_eq!(layer.0.short(), "32e0b054502f");
}
