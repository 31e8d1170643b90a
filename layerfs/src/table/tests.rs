//! Table files whose checksum is right and whose content is not: errors or wrong answers, never a panic.

use proptest::prelude::*;

use super::*;
use crate::attr::{Attrs, FileKind};
use crate::chunk::MemoryChunks;
use crate::inode::{Dentry, Node};
use crate::manifest::{LayerKind, LayerWriter};

fn layer(chunks: &MemoryChunks) -> (LayerId, Manifest) {
    let mut writer = LayerWriter::new(chunks);
    let node = |ino: u64| if ino < 4 { Node::Folder } else { Node::Fifo };
    for folder in 1..4u64 {
        for ino in (4..20).filter(|ino| ino % 3 + 1 == folder) {
            let target = Target::Inode { ino: Ino(ino), kind: FileKind::Fifo };
            writer.dentry(&Dentry { folder: Ino(folder), name: format!("{ino:02}").into_bytes(), target }).unwrap();
        }
    }
    for ino in 1..20 {
        let inode = Inode { ino: Ino(ino), nlink: 1, attrs: Attrs::default(), xattrs: Vec::new(), node: node(ino) };
        writer.inode(&inode).unwrap();
    }
    writer.finish(LayerKind::Base, None, Ino(20)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn a_lying_table_is_survived(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let chunks = MemoryChunks::default();
        let (id, manifest) = layer(&chunks);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        build::write(&chunks, id, &manifest, &file, &path).unwrap();
        let length = file.metadata().unwrap().len() as usize;
        for (at, value) in damage {
            let at = HEADER_BYTES + at.index(length - HEADER_BYTES);
            file.write_all_at(&[value], at as u64).unwrap();
        }
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).unwrap();
        let checksum = checksum_of(&header, &file, &path).unwrap();
        file.write_all_at(checksum.as_bytes(), HEADER_BYTES as u64 - 32).unwrap();
        let table = Table::map(&file, &path, id, &manifest).unwrap();
        for ino in (0..25).chain([u64::MAX]).map(Ino) {
            let _ = table.inode(ino);
            let _ = table.inode_position(ino).map(|position| (table.stat_at(position), table.inode_bytes_at(position)));
            let _ = table.lookup(ino, b"10");
            let range = table.folder(ino);
            let _ = table.lower_bound(range.clone(), b"07");
            range.take(100).for_each(|position| drop(table.dentry_at(position)));
        }
        table.dentries().for_each(drop);
        prop_assert!(table.folders().count() == 3);
    }
}

#[test]
fn a_table_of_a_newer_version_or_another_layer_is_refused() {
    let chunks = MemoryChunks::default();
    let (id, manifest) = layer(&chunks);
    let layout = Layout::of_manifest(&manifest).unwrap();
    let mut header = encode_header(id, &layout);
    assert_eq!(decode_header(&header, id).unwrap(), layout);
    assert!(matches!(decode_header(&header, LayerId(crate::id::ChunkId::of(b"x"))), Err(Error::Corrupt { .. })));
    header[4] = 2;
    assert!(matches!(decode_header(&header, id), Err(Error::Unsupported { .. })));
}
