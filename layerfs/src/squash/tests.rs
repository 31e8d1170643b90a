//! Chains of random layers: the squashed layer has the same tree, number for number, and nothing beside it.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::attr::FileKind;
use crate::id::Ino;
use crate::inode::Inode;
use crate::monitor::Silent;
use crate::mount::caller::Caller;
use crate::mount::fs::{Fs, SetAttr};
use crate::seal::{SealOptions, seal};
use crate::store::{FsckOptions, GcOptions, StoreOptions};
use crate::upper::Upper;
use crate::walk::Next;

/// A change; numbers choose among what is there.
#[derive(Clone, Debug)]
enum Step {
    Make { folder: usize, name: u8, is_folder: bool },
    Write { file: usize, at: u64, bytes: usize, fill: u8 },
    Chmod { entry: usize, mode: u32 },
    Remove { entry: usize },
    Rename { entry: usize, folder: usize, name: u8, exchange: bool },
    Link { file: usize, folder: usize, name: u8 },
    RemoveAll { entry: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop::sample::select(vec![0o600u32, 0o644, 0o755]);
    prop_oneof![
        4 => (0usize..50, 0u8..8, any::<bool>()).prop_map(|(folder, name, is_folder)| Step::Make { folder, name, is_folder }),
        3 => (0usize..50, 0u64..9000, 1usize..9000, 1u8..9)
            .prop_map(|(file, at, bytes, fill)| Step::Write { file, at, bytes, fill }),
        1 => (0usize..50, mode).prop_map(|(entry, mode)| Step::Chmod { entry, mode }),
        3 => (0usize..50).prop_map(|entry| Step::Remove { entry }),
        1 => (0usize..50).prop_map(|entry| Step::RemoveAll { entry }),
        4 => (0usize..50, 0usize..50, 0u8..8, any::<bool>())
            .prop_map(|(entry, folder, name, exchange)| Step::Rename { entry, folder, name, exchange }),
        2 => (0usize..50, 0usize..50, 0u8..8).prop_map(|(file, folder, name)| Step::Link { file, folder, name }),
    ]
}

/// A writable filesystem, and all names in it: folder, name, inode.
struct Driver {
    store: Arc<Store>,
    fs: Fs,
    next: u32,
}

type Entry = (Ino, Vec<u8>, Ino, FileKind);

impl Driver {
    fn new(store: &Arc<Store>) -> Driver {
        let view = Arc::new(View::empty(store.clone()));
        let (upper, tables) = Upper::create(store, &view, None).unwrap();
        Driver { store: store.clone(), fs: Fs::writable(view, upper, tables), next: 0 }
    }

    fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut open = vec![Ino::ROOT];
        while let Some(folder) = open.pop() {
            let handle = self.fs.open_folder(folder);
            let mut emit = |item: &crate::mount::fs::Item<'_>| {
                if item.name != b"." && item.name != b".." {
                    entries.push((folder, item.name.to_vec(), item.ino, item.kind));
                    if item.kind == FileKind::Folder {
                        open.push(item.ino);
                    }
                }
                true
            };
            self.fs.list(folder, handle, 0, false, &mut emit).unwrap();
            self.fs.release_folder(handle);
        }
        entries
    }

    fn folder(entries: &[Entry], index: usize) -> Ino {
        let folders = entries.iter().filter(|entry| entry.3 == FileKind::Folder).map(|entry| entry.2);
        let folders: Vec<Ino> = std::iter::once(Ino::ROOT).chain(folders).collect();
        folders[index % folders.len()]
    }

    fn remove(&self, (folder, name, ino, kind): &Entry) {
        // It may not be empty: then it stays.
        let _ = match kind {
            FileKind::Folder => self.fs.rmdir(*folder, name),
            _ => self.fs.unlink(*folder, name),
        };
        self.fs.forget(*ino, 1000);
    }

    fn apply(&self, step: &Step) {
        let entries = self.entries();
        let of_kind = |index: usize, is_file: bool| {
            let found: Vec<&Entry> = entries.iter().filter(|e| !is_file || e.3 == FileKind::File).collect();
            (!found.is_empty()).then(|| found[index % found.len()].clone())
        };
        let named = |name: u8| format!("n{name}").into_bytes();
        // What can't be done isn't.
        match *step {
            Step::Make { folder, name, is_folder } => {
                let kind = if is_folder { libc::S_IFDIR } else { libc::S_IFREG };
                let folder = Driver::folder(&entries, folder);
                let _ = self.fs.make(folder, &named(name), kind | 0o755, 0, 0, Caller::ROOT);
            }
            Step::Write { file, at, bytes, fill } => {
                if let Some(file) = of_kind(file, true) {
                    self.fs.write(file.2, at, &vec![fill; bytes], None).unwrap();
                }
            }
            Step::Chmod { entry, mode } => {
                if let Some(entry) = of_kind(entry, false) {
                    self.fs
                        .setattr(
                            entry.2,
                            SetAttr { permissions: Some(mode as u16), ..SetAttr::default() },
                            Caller::ROOT,
                        )
                        .unwrap();
                }
            }
            Step::Remove { entry } => drop(of_kind(entry, false).map(|entry| self.remove(&entry))),
            Step::RemoveAll { entry } => {
                let Some(top) = of_kind(entry, false) else { return };
                // What is in a folder comes after it.
                let mut gone = vec![top];
                let mut at = 0;
                while at < gone.len() {
                    let folder = gone[at].2;
                    gone.extend(entries.iter().filter(|entry| entry.0 == folder).cloned());
                    at += 1;
                }
                gone.iter().rev().for_each(|entry| self.remove(entry));
            }
            Step::Rename { entry, folder, name, exchange } => {
                let Some(entry) = of_kind(entry, false) else { return };
                let flags = if exchange { libc::RENAME_EXCHANGE } else { 0 };
                let to = (Driver::folder(&entries, folder), named(name));
                let _ = self.fs.rename((entry.0, &entry.1), (to.0, &to.1), flags, Caller::ROOT);
                // Nobody has what was replaced open.
                let replaced = entries.iter().find(|entry| entry.0 == to.0 && entry.1 == to.1);
                replaced.into_iter().for_each(|entry| self.fs.forget(entry.2, 1000));
            }
            Step::Link { file, folder, name } => {
                if let Some(file) = of_kind(file, true) {
                    let _ = self.fs.link(file.2, Driver::folder(&entries, folder), &named(name));
                }
            }
        }
    }

    fn seal(&mut self) -> LayerName {
        self.next += 1;
        let name = LayerName::new(&format!("chain-{}", self.next)).unwrap();
        let options = SealOptions { name: name.clone(), expect: Expect::Absent, kind: LayerKind::Instance };
        seal(&self.store, &self.fs, &options, &Silent).unwrap();
        name
    }
}

/// All that a view shows: paths with inodes, and what is in the files.
fn tree(view: &View) -> BTreeMap<Vec<u8>, (Inode, Vec<u8>)> {
    let mut tree = BTreeMap::new();
    let root = view.expect_inode(Ino::ROOT).unwrap();
    tree.insert(Vec::new(), (root, Vec::new()));
    view.walk(|entry| {
        let inode = view.expect_inode(entry.ino)?;
        let mut bytes = vec![0; if inode.kind() == FileKind::File { inode.size() as usize } else { 0 }];
        if !bytes.is_empty() {
            assert_eq!(view.read_at(entry.ino, 0, &mut bytes)?, bytes.len());
        }
        tree.insert(entry.path.to_vec(), (inode, bytes));
        Ok(Next::Enter)
    })
    .unwrap();
    tree
}

fn new_store() -> (tempfile::TempDir, Arc<Store>) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    (folder, store)
}

fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn the_tree_stays_and_nothing_else(
        layers in prop::collection::vec(prop::collection::vec(step(), 0..25), 2..6),
        count in 1usize..6,
        more in prop::collection::vec(step(), 0..10),
    ) {
        let (_folder, store) = new_store();
        let mut driver = Driver::new(&store);
        let mut names = Vec::new();
        for steps in &layers {
            steps.iter().for_each(|step| driver.apply(step));
            names.push(driver.seal());
        }
        let top = driver.fs.view().top().unwrap();
        let before = View::open(&store, top).unwrap();
        let expected = tree(&before);
        let chain = Chain { top, layers: count.min(before.layers().len()) };
        let squashed = name("squashed");
        let planned = plan(&store, chain, None, &Silent).unwrap();
        let report = squash(&store, chain, None, &[(squashed.clone(), Expect::Absent)], &Silent).unwrap();
        prop_assert_eq!(report, planned);
        let after = View::open(&store, report.layer).unwrap();
        prop_assert_eq!(&tree(&after), &expected);
        prop_assert_eq!(after.next_ino(), before.next_ino());
        prop_assert_eq!(after.layers().len(), before.layers().len() - chain.layers + 1);
        if after.layers().len() == 1 {
            let inos: BTreeSet<Ino> = expected.values().map(|(inode, _)| inode.ino).collect();
            prop_assert_eq!(report.inodes as usize, inos.len());
            prop_assert_eq!(report.dentries as usize, expected.len() - 1);
        }
        // Squashed once more from the whole stack, whichever part was squashed before, it is the same layer.
        let whole = |top: LayerId| plan(&store, Chain::whole(&store, top).unwrap(), None, &Silent).unwrap();
        if before.layers().len() > 1 && after.layers().len() > 1 {
            prop_assert_eq!(whole(top).layer, whole(report.layer).layer);
        }
        // The mount goes on over it, and what is sealed there is what is sealed over the chain.
        more.iter().for_each(|step| driver.apply(step));
        let mounted = tree_of(&driver);
        let prepared = prepare(&store, chain, None, &Silent).unwrap();
        prop_assert!(crate::seal::rest_on(&store, &driver.fs, &prepared, &[]).unwrap());
        drop(prepared);
        prop_assert_eq!(driver.fs.view().top(), Some(report.layer));
        prop_assert_eq!(&tree_of(&driver), &mounted);
        drop(before);
        for old in &names {
            store.remove_name(old).unwrap();
        }
        store.gc(&Silent, GcOptions::default()).unwrap();
        prop_assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
        prop_assert_eq!(chain.layers == 1, store.contains(&top.0).unwrap());
        prop_assert_eq!(&tree(&after), &expected);
        driver.seal();
        prop_assert_eq!(&tree_of(&driver), &mounted);
        let sealed = driver.fs.view();
        prop_assert_eq!(sealed.layers().last().unwrap().id, after.layers().last().unwrap().id);
    }
}

/// What the filesystem shows, upper and all.
fn tree_of(driver: &Driver) -> BTreeMap<(Ino, Vec<u8>), (Ino, FileKind)> {
    driver.entries().into_iter().map(|(folder, name, ino, kind)| ((folder, name), (ino, kind))).collect()
}

#[test]
fn little_is_new_where_little_changed_and_what_came_and_went_is_gone() {
    let (_folder, store) = new_store();
    let mut driver = Driver::new(&store);
    let make = |driver: &Driver, folder: Ino, name: &str, kind: u32| {
        driver.fs.make(folder, name.as_bytes(), kind | 0o755, 0, 0, Caller::ROOT).unwrap().ino
    };
    for file in 0..6000 {
        make(&driver, Ino::ROOT, &format!("file{file}"), libc::S_IFREG);
    }
    let lower = make(&driver, Ino::ROOT, "lower", libc::S_IFREG);
    driver.fs.write(lower, 0, &[1; 300_000], None).unwrap();
    let removed = make(&driver, Ino::ROOT, "removed", libc::S_IFDIR);
    driver.seal();
    let base = driver.fs.view().top().unwrap();
    let inside = make(&driver, removed, "inside", libc::S_IFREG);
    driver.fs.write(inside, 0, &[2; 300_000], None).unwrap();
    driver.fs.write(lower, 7, &[3; 200_000], None).unwrap();
    driver.seal();
    driver.remove(&(removed, b"inside".to_vec(), inside, FileKind::File));
    driver.remove(&(Ino::ROOT, b"removed".to_vec(), removed, FileKind::Folder));
    driver.remove(&(Ino::ROOT, b"lower".to_vec(), lower, FileKind::File));
    driver.seal();
    make(&driver, Ino::ROOT, "new", libc::S_IFREG);
    driver.seal();
    let top = driver.fs.view().top().unwrap();
    let chain = Chain::down_to(&store, top, base).unwrap();
    let report = plan(&store, chain, None, &Silent).unwrap();
    // The root and the new file; two whiteouts and the new name.
    assert_eq!((report.layers, report.inodes, report.dentries), (3, 2, 3), "{report:?}");
    let whole = plan(&store, Chain::whole(&store, top).unwrap(), None, &Silent).unwrap();
    assert!(whole.new_bytes * 10 < whole.table_bytes, "{whole:?}");
    assert_eq!(whole.inodes, 6002);
    assert_eq!(Chain::of_kind(&store, top).unwrap().layers, 4);
    assert!(Chain::down_to(&store, base, top).is_err());
}

#[test]
fn files_that_are_open_without_a_name_keep_the_chain() {
    let (_folder, store) = new_store();
    let mut driver = Driver::new(&store);
    let ino = driver.fs.make(Ino::ROOT, b"open", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
    driver.fs.write(ino, 0, &[1; 100_000], None).unwrap();
    driver.seal();
    driver.fs.setattr(ino, SetAttr { permissions: Some(0o600), ..SetAttr::default() }, Caller::ROOT).unwrap();
    driver.seal();
    driver.fs.unlink(Ino::ROOT, b"open").unwrap();
    driver.seal();
    let chain = Chain::whole(&store, driver.fs.view().top().unwrap()).unwrap();
    let prepared = prepare(&store, chain, None, &Silent).unwrap();
    assert!(!crate::seal::rest_on(&store, &driver.fs, &prepared, &[]).unwrap());
    driver.fs.forget(ino, 1);
    assert!(crate::seal::rest_on(&store, &driver.fs, &prepared, &[]).unwrap());
}
