//! Images of stacks that a mount has changed, imported again; and several exports into one layout.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Once};

use super::*;
use crate::attr::FileKind;
use crate::export::{Destination, Format, export};
use crate::id::{Ino, LayerId};
use crate::import::{ImportOptions, SourceSpec, import};
use crate::monitor::Silent;
use crate::mount::caller::Caller;
use crate::mount::fs::Fs;
use crate::mount::tests::{empty_fs, seal_fs, store};
use crate::walk::Walker;

fn make(fs: &Fs, folder: Ino, name: &str, kind: u32) -> Ino {
    fs.make(folder, name.as_bytes(), kind | 0o755, 0, 0, Caller::ROOT).unwrap().ino
}

fn file(fs: &Fs, folder: Ino, name: &str, bytes: &str) -> Ino {
    let ino = make(fs, folder, name, libc::S_IFREG);
    fs.write(ino, 0, bytes.as_bytes(), None).unwrap();
    ino
}

fn layout_in(folder: &Path, tag: &str) -> Destination {
    Destination { path: folder.join("layout"), format: Format::Oci(Compression::None), tag: Some(tag.to_owned()) }
}

/// The layer again, by way of an image.
fn by_image(layer: LayerId, name: &str) -> Arc<View> {
    let folder = tempfile::Builder::new().prefix("layerfs-oci-").tempdir().unwrap();
    let layout = layout_in(folder.path(), "latest");
    export(store(), layer, &layout, &Silent).unwrap();
    let report = import(store(), SourceSpec::Path(layout.path), &ImportOptions::new(name.parse().unwrap()), &Silent);
    View::open(store(), report.unwrap().layers.last().unwrap().id).unwrap()
}

/// What is in a tree: of each inode that isn't a folder its paths, and the bytes of files.
fn inodes(view: &View) -> BTreeSet<(BTreeSet<String>, FileKind, Vec<u8>)> {
    let mut names: BTreeMap<Ino, BTreeSet<String>> = BTreeMap::new();
    let mut walker = Walker::new(view);
    while let Some(entry) = walker.next_entry().unwrap() {
        names.entry(entry.ino).or_default().insert(String::from_utf8(entry.path.to_vec()).unwrap());
    }
    let told = |(ino, names)| {
        let inode = view.expect_inode(ino).unwrap();
        let mut bytes = vec![0; inode.size() as usize];
        if inode.kind() == FileKind::File {
            view.read_at(ino, 0, &mut bytes).unwrap();
        }
        (names, inode.kind(), bytes)
    };
    names.into_iter().map(told).collect()
}

#[test]
fn names_that_move_are_links_still() {
    let fs = empty_fs(store());
    let deep = make(&fs, make(&fs, Ino::ROOT, "folder", libc::S_IFDIR), "deep", libc::S_IFDIR);
    for (name, link) in [("a", "b"), ("x", "y"), ("folder-o", "o"), ("same", "still")] {
        let ino = file(&fs, Ino::ROOT, name, name);
        fs.link(ino, deep, link.as_bytes()).unwrap();
    }
    file(&fs, Ino::ROOT, "alone", "alone");
    seal_fs(store(), &fs);
    fs.rename((Ino::ROOT, b"a"), (Ino::ROOT, b"c"), 0, Caller::ROOT).unwrap();
    fs.rename((Ino::ROOT, b"x"), (Ino::ROOT, b"folder-o"), libc::RENAME_EXCHANGE, Caller::ROOT).unwrap();
    fs.rename((Ino::ROOT, b"alone"), (deep, b"moved"), 0, Caller::ROOT).unwrap();
    let sealed = seal_fs(store(), &fs).layer;
    let (view, again) = (View::open(store(), sealed).unwrap(), by_image(sealed, "links-again"));
    assert_eq!(inodes(&again), inodes(&view));
    let linked = |names: [&str; 2]| inodes(&view).iter().any(|(found, ..)| found.iter().eq(names.iter()));
    assert!(linked(["c", "folder/deep/b"]) && linked(["folder-o", "folder/deep/y"]), "{:?}", inodes(&view));
    // Nothing is told of links that are as they were.
    let told: Vec<_> = again.layers()[0].table.dentries().map(|dentry| dentry.unwrap().name.to_vec()).collect();
    assert!(told.contains(&b"b".to_vec()) && !told.contains(&b"still".to_vec()), "{told:?}");
}

#[test]
fn a_socket_hides_what_it_has_replaced() {
    let fs = empty_fs(store());
    file(&fs, Ino::ROOT, "file", "of the layer below");
    let folder = make(&fs, Ino::ROOT, "folder", libc::S_IFDIR);
    file(&fs, folder, "inside", "of the layer below");
    make(&fs, Ino::ROOT, "socket", libc::S_IFSOCK);
    seal_fs(store(), &fs);
    fs.unlink(Ino::ROOT, b"file").unwrap();
    fs.unlink(folder, b"inside").unwrap();
    fs.rmdir(Ino::ROOT, b"folder").unwrap();
    for name in ["file", "folder", "new"] {
        make(&fs, Ino::ROOT, name, libc::S_IFSOCK);
    }
    file(&fs, Ino::ROOT, "kept", "kept");
    let again = by_image(seal_fs(store(), &fs).layer, "sockets-again");
    let names: Vec<_> = inodes(&again).into_iter().flat_map(|(names, ..)| names).collect();
    assert_eq!(names, ["kept"]);
}

/// Does something at the first sign of progress, while the export waits.
struct Meanwhile<F: Fn() + Send + Sync>(F, Once);

impl<F: Fn() + Send + Sync> Monitor for Meanwhile<F> {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {
        self.1.call_once(&self.0);
    }
    fn warn(&self, _: &str) {}
}

#[test]
fn exports_at_a_time_lose_no_tag() {
    let folder = tempfile::Builder::new().prefix("layerfs-oci-").tempdir().unwrap();
    let fs = empty_fs(store());
    file(&fs, Ino::ROOT, "file", "bytes");
    let layer = seal_fs(store(), &fs).layer;
    let to = |tag: &str| layout_in(folder.path(), tag);
    export(store(), layer, &to("before"), &Silent).unwrap();
    let second = || drop(export(store(), layer, &to("second"), &Silent).unwrap());
    export(store(), layer, &to("first"), &Meanwhile(second, Once::new())).unwrap();
    let index = existing_index(&folder.path().join("layout")).unwrap().unwrap();
    let tags: Vec<_> =
        index["manifests"].as_array().unwrap().iter().map(|m| m["annotations"][TAG_KEY].clone()).collect();
    assert_eq!(tags, ["before", "second", "first"]);
}
