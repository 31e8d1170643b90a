//! Usage and references of small stores whose every chunk is known.

use std::collections::HashSet;

use super::*;
use crate::attr::Attrs;
use crate::chunk::{ChunkWrite, Class};
use crate::chunker::Chunker;
use crate::content::{Content, ContentBuilder, Extent};
use crate::inode::{Dentry, Inode, Node, Target};
use crate::manifest::{LayerWriter, Manifest};
use crate::monitor::Silent;
use crate::refs::{self, ChunkReference};
use crate::store::{Expect, Session, StoreOptions};

const PIECE: usize = 50_000;

fn noise(seed: u8) -> Vec<u8> {
    let mut out = vec![0; PIECE];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

fn file(session: &Session, seeds: &[u8]) -> Content {
    let mut builder = ContentBuilder::new(Chunker::Tree);
    for seed in seeds {
        let id = session.put(Class::Data, &noise(*seed)).unwrap();
        builder.push(Extent::Chunk { id, bytes: PIECE as u32 }, session).unwrap();
    }
    builder.finish(session).unwrap()
}

/// A layer with files in its root: (name, number, links, chunks).
fn layer(
    session: &Session,
    parent: Option<&(LayerId, Manifest)>,
    files: &[(&'static str, u64, u32, &[u8])],
) -> (LayerId, Manifest) {
    let with_content =
        |(name, ino, nlink, seeds): &(&'static str, u64, u32, &[u8])| (*name, *ino, *nlink, file(session, seeds));
    layer_of(session, parent, &files.iter().map(with_content).collect::<Vec<_>>())
}

/// The same, with the files' contents.
fn layer_of(
    session: &Session,
    parent: Option<&(LayerId, Manifest)>,
    files: &[(&str, u64, u32, Content)],
) -> (LayerId, Manifest) {
    let mut writer = LayerWriter::new(session);
    let inode = |ino: u64, nlink: u32, node: Node| Inode {
        ino: Ino(ino),
        nlink,
        attrs: Attrs::default(),
        xattrs: Vec::new(),
        node,
    };
    if parent.is_none() {
        writer.inode(&inode(1, 2, Node::Folder)).unwrap();
    }
    let mut last = 0;
    for (name, ino, nlink, content) in files {
        let target = Target::Inode { ino: Ino(*ino), kind: FileKind::File };
        writer.dentry(&Dentry { folder: Ino::ROOT, name: name.as_bytes().to_vec(), target }).unwrap();
        if *ino != last {
            writer.inode(&inode(*ino, *nlink, Node::File(content.clone()))).unwrap();
        }
        last = *ino;
    }
    let parent = parent.map(|(id, manifest)| (*id, manifest));
    writer.finish(LayerKind::Base, parent, Ino(100)).unwrap()
}

fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

/// base {1 2, a second name for it, 3}; app over it {3 (shared with base), 4}; other {4, 5}.
fn store() -> (tempfile::TempDir, Arc<Store>, [LayerId; 3]) {
    let folder = tempfile::Builder::new().prefix("layerfs-usage-").tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    let session = store.session("test");
    let base = layer(&session, None, &[("a", 2, 2, &[1, 2]), ("b", 2, 2, &[1, 2]), ("c", 3, 1, &[3])]);
    let app = layer(&session, Some(&base), &[("d", 4, 1, &[3, 4]), ("e", 5, 1, &[6, 6, 6, 6, 6])]);
    let other = layer(&session, None, &[("x", 2, 1, &[4, 5])]);
    session.commit().unwrap();
    for (text, (id, _)) in [("base", &base), ("app", &app), ("again", &app), ("other", &other)] {
        store.set_name(&name(text), *id, Expect::Absent).unwrap();
    }
    (folder, store, [base.0, app.0, other.0])
}

/// How many pieces of 50,000 bytes there are in `amount`, the rest being metadata.
fn pieces(amount: &Amount) -> u64 {
    amount.plain_bytes / PIECE as u64
}

#[test]
fn sizes_that_are_more_than_a_number_tells_end_at_the_greatest() {
    let folder = tempfile::Builder::new().prefix("layerfs-usage-").tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    let session = store.session("test");
    let sparse = || {
        let mut builder = ContentBuilder::new(Chunker::Tree);
        builder.push(Extent::Hole { bytes: i64::MAX as u64 }, &session).unwrap();
        builder.finish(&session).unwrap()
    };
    let files = [("a", 2, 1, sparse()), ("b", 3, 1, sparse()), ("c", 4, 1, sparse())];
    let (id, manifest) = layer_of(&session, None, &files);
    assert_eq!(manifest.file_bytes, u64::MAX);
    session.commit().unwrap();
    store.set_name(&name("sparse"), id, Expect::Absent).unwrap();
    let report = usage(&store, &[], &Silent).unwrap();
    assert_eq!((report.layers[0].apparent_bytes, report.names[0].tree.apparent_bytes), (u64::MAX, u64::MAX));
    assert_eq!(report.names[0].tree.files, 3);
    assert_eq!(store.stat(&Silent).unwrap().referenced_bytes, 0);
}

#[test]
fn every_chunk_is_attributed_once() {
    let (_folder, store, [base, app, other]) = store();
    let report = usage(&store, &[name("app"), name("again")], &Silent).unwrap();
    let of_layer = |id: LayerId| report.layers.iter().find(|row| row.layer == id).unwrap();
    let of_name = |text: &str| report.names.iter().find(|row| row.name == name(text)).unwrap();
    assert_eq!(pieces(&report.total), 6);
    assert_eq!(report.total.plain_bytes - report.total.plain_bytes % PIECE as u64, 6 * PIECE as u64);
    assert_eq!((pieces(&of_layer(base).total), pieces(&of_layer(base).unique)), (3, 2));
    assert_eq!((pieces(&of_layer(app).total), pieces(&of_layer(app).unique)), (3, 1));
    assert_eq!((pieces(&of_layer(other).total), pieces(&of_layer(other).unique)), (2, 1));
    assert_eq!(of_layer(app).apparent_bytes, 7 * PIECE as u64);
    assert_eq!(of_layer(base).names, [name("again"), name("app"), name("base")]);
    // Two names of one layer: neither alone frees anything, both together what base and other don't have.
    assert_eq!((of_name("app").unique.chunks, of_name("base").unique.chunks), (0, 0));
    assert_eq!((pieces(&of_name("app").total), of_name("app").layer_count), (5, 2));
    assert_eq!(pieces(&of_name("other").unique), 1);
    assert_eq!(pieces(&report.freed), 1);
    let tree = of_name("app").tree;
    assert_eq!((tree.files, tree.folders, tree.apparent_bytes), (4, 0, 10 * PIECE as u64));
    assert!(report.total.stored_bytes > 0 && report.total.stored_bytes <= report.total.plain_bytes);
    assert!(matches!(usage(&store, &[name("none")], &Silent), Err(Error::NotFound { .. })));

    // What freeing promises is what the remaining names don't reach.
    let _pin = store.pin(app).unwrap();
    assert_eq!(usage(&store, &[name("app"), name("again")], &Silent).unwrap().freed.chunks, 0);
}

#[test]
fn a_chunk_knows_who_refers_to_it() {
    let (_folder, store, [base, app, other]) = store();
    let why = |id: ChunkId| {
        let mut found = Vec::new();
        refs::why_chunk(&store, &id, &Silent, &mut |reference| {
            found.push(reference);
            Ok(())
        })
        .unwrap();
        found.sort();
        found
    };
    let paths = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect::<Vec<_>>();
    let of = |layer, ino: u64, names: &[&str]| -> ChunkReference {
        let known = usage(&store, &[], &Silent).unwrap().layers.into_iter().find(|row| row.layer == layer).unwrap();
        ChunkReference { layer, names: known.names, role: Role::File(Ino(ino)), paths: paths(names) }
    };
    assert_eq!(why(ChunkId::of(&noise(1))), [of(base, 2, &["a", "b"])]);
    let mut both = vec![of(base, 3, &["c"]), of(app, 4, &["d"])];
    both.sort();
    assert_eq!(why(ChunkId::of(&noise(3))), both);
    assert_eq!(why(other.0)[0].role, Role::Manifest);
    assert!(why(ChunkId::of(b"nothing")).is_empty());

    let origin = refs::why_path(&store, app, b"/b").unwrap();
    assert_eq!((origin.ino, origin.named_by, origin.records[0].0), (Ino(2), Some(base), base));
    assert_eq!(origin.links, paths(&["a", "b"]));
    assert_eq!(origin.names, [name("again"), name("app"), name("base")]);
    assert_eq!(refs::why_path(&store, app, b"/").unwrap().named_by, None);
    assert!(matches!(refs::why_path(&store, app, b"/none"), Err(Error::NotFound { .. })));
}

#[test]
fn visiting_shows_what_a_layer_needs_and_log_its_stack() {
    let (_folder, store, [base, app, _]) = store();
    let log = refs::log(&store, app).unwrap();
    assert_eq!(log.iter().map(|entry| entry.layer).collect::<Vec<_>>(), [app, base]);
    assert_eq!(log[0].names, [name("again"), name("app")]);
    assert_eq!((log[0].inode_count, log[1].dentry_count), (2, 3));
    let mut seen = HashSet::new();
    walk_layer(&*store, app, &mut |chunk| {
        assert_eq!(store.info(&chunk.id).unwrap().unwrap().class, chunk.class);
        seen.insert((chunk.class, chunk.id));
        Ok(true)
    })
    .unwrap();
    let count = |class: Class| seen.iter().filter(|(other, _)| *other == class).count();
    // "e" has five extents, so a list node of its own.
    assert_eq!([Class::Data, Class::List, Class::Table, Class::Manifest].map(count), [3, 1, 2, 1]);
}
