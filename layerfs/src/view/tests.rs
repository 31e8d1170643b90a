//! Views of random stacks against a model that holds the merged tree in maps.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::attr::Attrs;
use crate::chunk::MemoryChunks;
use crate::content::Content;
use crate::diff::{Differences, What, diff, layer_changes};
use crate::inode::Dentry;
use crate::manifest::{LayerKind, LayerWriter};
use crate::walk::Next;

/// A change that a layer makes; numbers choose among what is there.
#[derive(Clone, Debug)]
enum Step {
    AddFile { folder: usize, name: u8, size: usize },
    AddFolder { folder: usize, name: u8 },
    AddLink { folder: usize, name: u8 },
    Link { file: usize, folder: usize, name: u8 },
    Remove { entry: usize },
    Rename { entry: usize, folder: usize, name: u8 },
    Change { inode: usize, uid: u32 },
}

/// The merged tree, and which of it the layer in the making has changed.
#[derive(Clone, Default)]
struct Model {
    dentries: BTreeMap<(Ino, Vec<u8>), (Ino, FileKind)>,
    inodes: BTreeMap<Ino, Inode>,
    next: u64,
    touched_dentries: BTreeSet<(Ino, Vec<u8>)>,
    touched_inodes: BTreeSet<Ino>,
}

impl Model {
    fn new() -> Model {
        let mut model = Model { next: Ino::FIRST.0, ..Model::default() };
        model.put_inode(Ino::ROOT, Node::Folder);
        model
    }

    fn put_inode(&mut self, ino: Ino, node: Node) {
        let attrs = Attrs { permissions: 0o755, ..Attrs::default() };
        self.inodes.insert(ino, Inode { ino, nlink: 1, attrs, xattrs: Vec::new(), node });
        self.touched_inodes.insert(ino);
    }

    fn folders(&self) -> Vec<Ino> {
        let reachable = self.dentries.values().filter(|(_, kind)| *kind == FileKind::Folder).map(|(ino, _)| *ino);
        std::iter::once(Ino::ROOT).chain(reachable).collect()
    }

    fn put(&mut self, folder: usize, name: u8, target: (Ino, FileKind)) {
        let folders = self.folders();
        let key = (folders[folder % folders.len()], format!("n{name}").into_bytes());
        self.touched_dentries.insert(key.clone());
        self.dentries.insert(key, target);
    }

    fn create(&mut self, folder: usize, name: u8, node: Node) {
        let ino = Ino(self.next);
        self.next += 1;
        let kind = node.kind();
        self.put_inode(ino, node);
        self.put(folder, name, (ino, kind));
    }

    fn is_below(&self, folder: Ino, ancestor: Ino) -> bool {
        let parent =
            |ino: Ino| self.dentries.iter().find(|(_, (target, _))| *target == ino).map(|((folder, _), _)| *folder);
        let mut at = Some(folder);
        while let Some(ino) = at {
            if ino == ancestor {
                return true;
            }
            at = parent(ino);
        }
        false
    }

    fn apply(&mut self, step: &Step) {
        let pick = |index: usize, model: &Model| {
            let keys: Vec<_> = model.dentries.keys().cloned().collect();
            (!keys.is_empty()).then(|| keys[index % keys.len()].clone())
        };
        match step {
            Step::AddFile { folder, name, size } => {
                self.create(*folder, *name, Node::File(Content::Inline(vec![*name; *size])));
            }
            Step::AddFolder { folder, name } => self.create(*folder, *name, Node::Folder),
            Step::AddLink { folder, name } => self.create(*folder, *name, Node::Symlink(b"../n1/./n2".to_vec())),
            Step::Link { file, folder, name } => {
                let files: Vec<_> =
                    self.dentries.values().filter(|(_, kind)| *kind == FileKind::File).copied().collect();
                if !files.is_empty() {
                    self.put(*folder, *name, files[file % files.len()]);
                }
            }
            Step::Remove { entry } => {
                if let Some(key) = pick(*entry, self) {
                    self.dentries.remove(&key);
                    self.touched_dentries.insert(key);
                }
            }
            Step::Rename { entry, folder, name } => {
                let Some(key) = pick(*entry, self) else { return };
                let target = self.dentries[&key];
                let folders = self.folders();
                if !self.is_below(folders[folder % folders.len()], target.0) {
                    self.dentries.remove(&key);
                    self.touched_dentries.insert(key);
                    let to = (folders[folder % folders.len()], format!("n{name}").into_bytes());
                    self.touched_dentries.insert(to.clone());
                    self.dentries.insert(to, target);
                }
            }
            Step::Change { inode, uid } => {
                let inos: Vec<Ino> = self.inodes.keys().copied().collect();
                let ino = inos[inode % inos.len()];
                if let Some(inode) = self.inodes.get_mut(&ino) {
                    inode.attrs.uid = *uid;
                    self.touched_inodes.insert(ino);
                }
            }
        }
        // What a replaced or removed folder held stays in the maps, as it does in layers, and is out of reach.
    }

    /// Writes what was touched since the last time as a layer over `parent`.
    fn seal(&mut self, out: &MemoryChunks, parent: Option<(LayerId, &Manifest)>) -> (LayerId, Manifest) {
        let mut writer = LayerWriter::new(out);
        for key in std::mem::take(&mut self.touched_dentries) {
            let target = match self.dentries.get(&key) {
                Some((ino, kind)) => Target::Inode { ino: *ino, kind: *kind },
                None if parent.is_some() => Target::Whiteout,
                None => continue,
            };
            writer.dentry(&Dentry { folder: key.0, name: key.1, target }).unwrap();
        }
        for ino in std::mem::take(&mut self.touched_inodes) {
            writer.inode(&self.inodes[&ino]).unwrap();
        }
        writer.finish(LayerKind::Base, parent, Ino(self.next)).unwrap()
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..50, 0u8..20, 0usize..300).prop_map(|(folder, name, size)| Step::AddFile { folder, name, size }),
        3 => (0usize..50, 0u8..20).prop_map(|(folder, name)| Step::AddFolder { folder, name }),
        1 => (0usize..50, 0u8..20).prop_map(|(folder, name)| Step::AddLink { folder, name }),
        1 => (0usize..50, 0usize..50, 0u8..20).prop_map(|(file, folder, name)| Step::Link { file, folder, name }),
        2 => (0usize..500).prop_map(|entry| Step::Remove { entry }),
        2 => (0usize..500, 0usize..50, 0u8..20).prop_map(|(entry, folder, name)| Step::Rename { entry, folder, name }),
        2 => (0usize..500, 1u32..5).prop_map(|(inode, uid)| Step::Change { inode, uid }),
    ];
    prop::collection::vec(step, 0..60)
}

/// Seals each list of steps as a layer; returns the model after each, and its view.
fn build(layers: &[Vec<Step>], tables: &Path) -> Vec<(Model, View)> {
    let chunks = MemoryChunks::default();
    let mut model = Model::new();
    let mut parent: Option<(LayerId, Manifest)> = None;
    let mut built = Vec::new();
    for steps in layers {
        steps.iter().for_each(|step| model.apply(step));
        let sealed = model.seal(&chunks, parent.as_ref().map(|(id, manifest)| (*id, manifest)));
        let view = View::from_chunks(Arc::new(chunks.clone()), tables, sealed.0).unwrap();
        built.push((model.clone(), view));
        parent = Some(sealed);
    }
    built
}

/// The paths of the model's tree, in path order.
fn paths(model: &Model) -> Vec<(Vec<u8>, Ino)> {
    fn below(model: &Model, folder: Ino, prefix: &[u8], out: &mut Vec<(Vec<u8>, Ino)>) {
        for ((_, name), (ino, kind)) in model.dentries.range((folder, Vec::new())..(Ino(folder.0 + 1), Vec::new())) {
            let path = if prefix.is_empty() { name.clone() } else { [prefix, name].join(&b'/') };
            out.push((path.clone(), *ino));
            if *kind == FileKind::Folder {
                below(model, *ino, &path, out);
            }
        }
    }
    let mut out = Vec::new();
    below(model, Ino::ROOT, b"", &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_view_is_the_model(layers in prop::collection::vec(steps(), 1..4)) {
        let tables = tempfile::tempdir().unwrap();
        for (model, view) in build(&layers, tables.path()) {
            for ((folder, name), target) in &model.dentries {
                prop_assert_eq!(view.lookup(*folder, name).unwrap(), Some(*target));
            }
            for (ino, inode) in &model.inodes {
                prop_assert_eq!(view.inode(*ino).unwrap(), Some(inode.clone()));
                prop_assert_eq!(view.stat(*ino).unwrap(), Some(Stat::from(inode)));
            }
            prop_assert_eq!(view.lookup(Ino::ROOT, b"absent").unwrap(), None);
            prop_assert_eq!(view.inode(Ino(model.next)).unwrap(), None);
            for folder in model.folders() {
                let expected: Vec<_> = model.dentries.range((folder, Vec::new())..(Ino(folder.0 + 1), Vec::new()))
                    .map(|((_, name), (ino, kind))| (name.clone(), *ino, *kind)).collect();
                let list = |after: Option<&[u8]>| view.read_folder(folder, after).unwrap()
                    .map(|entry| entry.unwrap()).map(|e| (e.name.to_vec(), e.ino, e.kind)).collect::<Vec<_>>();
                prop_assert_eq!(&list(None), &expected);
                for (index, (name, ..)) in expected.iter().enumerate() {
                    prop_assert_eq!(&list(Some(name)), &expected[index + 1..]);
                }
                prop_assert_eq!(list(Some(b"n1~")), expected.iter().filter(|e| e.0[..] > b"n1~"[..]).cloned().collect::<Vec<_>>());
            }
            let mut walked = Vec::new();
            view.walk(|entry| {
                walked.push((entry.path.to_vec(), entry.ino));
                Ok(Next::Enter)
            }).unwrap();
            let expected = paths(&model);
            prop_assert_eq!(&walked, &expected);
            for (path, ino) in expected {
                prop_assert_eq!(view.resolve(&path, false).unwrap().0, ino);
                let back = view.path_of(ino).unwrap().unwrap();
                prop_assert_eq!(view.resolve(&back, false).unwrap().0, ino);
            }
        }
    }
}

fn small_stack(tables: &Path) -> (MemoryChunks, LayerId) {
    let chunks = MemoryChunks::default();
    let mut model = Model::new();
    for name in 0..50 {
        model.apply(&Step::AddFile { folder: 0, name, size: 100 });
    }
    let (id, _) = model.seal(&chunks, None);
    View::from_chunks(Arc::new(chunks.clone()), tables, id).unwrap();
    (chunks, id)
}

#[test]
fn a_damaged_table_is_noticed_and_built_again() {
    let tables = tempfile::tempdir().unwrap();
    let (chunks, id) = small_stack(tables.path());
    let path = crate::table::table_path(tables.path(), id);
    let good = std::fs::read(&path).unwrap();
    for position in (0..good.len()).step_by(37).chain([good.len() - 1]) {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[good[position] ^ 4], position as u64).unwrap();
        let view = View::from_chunks(Arc::new(chunks.clone()), tables.path(), id).unwrap();
        assert!(view.lookup(Ino::ROOT, b"n7").unwrap().is_some(), "{position}");
        assert_eq!(std::fs::read(&path).unwrap(), good, "byte {position}");
    }
    for length in [0, 5, 127, 128, good.len() - 1, good.len() + 1] {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
        View::from_chunks(Arc::new(chunks.clone()), tables.path(), id).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), good, "{length} bytes");
    }
}

#[test]
fn without_a_folder_for_tables_they_are_kept_in_memory() {
    let (chunks, id) = small_stack(tempfile::tempdir().unwrap().path());
    let view = View::from_chunks(Arc::new(chunks), Path::new("/nonexistent/tables"), id).unwrap();
    assert_eq!(view.read_folder(Ino::ROOT, None).unwrap().count(), 50);
}

#[test]
fn links_and_dots_in_paths_stay_inside() {
    let chunks = MemoryChunks::default();
    let mut model = Model::new();
    let mut add = |folder: Ino, name: &str, node: Node| {
        let ino = Ino(model.next);
        model.next += 1;
        let kind = node.kind();
        model.put_inode(ino, node);
        model.touched_dentries.insert((folder, name.into()));
        model.dentries.insert((folder, name.into()), (ino, kind));
        ino
    };
    let usr = add(Ino::ROOT, "usr", Node::Folder);
    let lib = add(usr, "lib", Node::Folder);
    let file = add(lib, "libc.so", Node::File(Content::Inline(b"elf".to_vec())));
    add(Ino::ROOT, "lib", Node::Symlink(b"usr/lib".to_vec()));
    let link = add(lib, "abs", Node::Symlink(b"/../lib/./libc.so".to_vec()));
    add(lib, "loop", Node::Symlink(b"/lib/loop".to_vec()));
    let (id, _) = model.seal(&chunks, None);
    let tables = tempfile::tempdir().unwrap();
    let view = View::from_chunks(Arc::new(chunks), tables.path(), id).unwrap();
    let ino = |path: &str, follow| view.resolve(path.as_bytes(), follow).map(|(ino, _)| ino);
    assert_eq!(ino("lib/libc.so", true).unwrap(), file);
    assert_eq!(ino("/../usr//lib/./abs", true).unwrap(), file);
    assert_eq!(ino("usr/lib/abs", false).unwrap(), link);
    assert_eq!(ino("lib/../../../usr", true).unwrap(), usr);
    assert_eq!(ino("", true).unwrap(), Ino::ROOT);
    assert!(matches!(ino("lib/loop", true), Err(Error::Invalid(_))));
    assert!(matches!(ino("lib/libc.so/x", true), Err(Error::Invalid(_))));
    assert!(matches!(ino("lib/none", true), Err(Error::NotFound { .. })));
    let mut buffer = [0; 10];
    assert_eq!(view.read_at(file, 1, &mut buffer).unwrap(), 2);
    assert_eq!(&buffer[..2], b"lf");
}

#[test]
fn malformed_trees_end_a_walk() {
    let (folder, other) = (Ino(2), Ino(3));
    let kind = FileKind::Folder;
    for dentries in [
        // A folder in itself, one that lies in two, one without a record.
        vec![(Ino::ROOT, "a", folder), (folder, "b", folder)],
        vec![(Ino::ROOT, "a", folder), (Ino::ROOT, "b", folder)],
        vec![(Ino::ROOT, "a", folder), (folder, "b", other)],
    ] {
        let chunks = MemoryChunks::default();
        let mut model = Model::new();
        model.next = 4;
        model.put_inode(folder, Node::Folder);
        for (folder, name, ino) in dentries {
            model.touched_dentries.insert((folder, name.into()));
            model.dentries.insert((folder, name.into()), (ino, kind));
        }
        let (id, _) = model.seal(&chunks, None);
        let tables = tempfile::tempdir().unwrap();
        let view = View::from_chunks(Arc::new(chunks), tables.path(), id).unwrap();
        assert!(matches!(view.walk(|_| Ok(Next::Enter)), Err(Error::Corrupt { .. })));
    }
}

#[test]
fn a_path_is_found_among_many_ways_that_lead_nowhere() {
    const RUNGS: u64 = 40;
    let rung_folder = |rung: u64, side: u64| Ino(Ino::FIRST.0 + 2 * rung + side);
    for is_reachable in [false, true] {
        let mut names = Vec::new();
        // Two folders on each rung, each with a name in both of the next one.
        for rung in 1..RUNGS {
            for (above, below) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                names.push((rung_folder(rung, above), format!("n{below}"), rung_folder(rung - 1, below)));
            }
        }
        if is_reachable {
            names.push((Ino::ROOT, "top".to_owned(), rung_folder(RUNGS - 1, 1)));
        }
        let tables = tempfile::tempdir().unwrap();
        let view = view_of_folders(2 * RUNGS, &names, tables.path());
        let lowest = rung_folder(0, 0);
        let path = view.path_of(lowest).unwrap();
        assert_eq!(path.is_some(), is_reachable);
        if let Some(path) = path {
            assert_eq!(view.resolve(&path, false).unwrap().0, lowest);
            assert_eq!(path.split(|byte| *byte == b'/').count() as u64, RUNGS);
        }
    }
}

#[test]
fn a_folder_in_itself_has_no_path() {
    let (first, second) = (Ino::FIRST, Ino(Ino::FIRST.0 + 1));
    let name = |folder: Ino, name: &str, ino: Ino| (folder, name.to_owned(), ino);
    for names in [vec![name(first, "a", first)], vec![name(first, "a", second), name(second, "b", first)]] {
        let tables = tempfile::tempdir().unwrap();
        let view = view_of_folders(2, &names, tables.path());
        assert!(matches!(view.path_of(first), Err(Error::Corrupt { .. })));
    }
    let names: Vec<_> = (0..1001).map(|n| name(Ino(first.0 + n), "d", Ino(first.0 + n + 1))).collect();
    let tables = tempfile::tempdir().unwrap();
    let view = view_of_folders(1002, &names, tables.path());
    assert!(matches!(view.path_of(Ino(first.0 + 1001)), Err(Error::Corrupt { .. })));
    assert_eq!(view.path_of(Ino(first.0 + 900)).unwrap(), None);
}

/// A view of one layer with that many folders besides the root, and these entries of them.
fn view_of_folders(count: u64, names: &[(Ino, String, Ino)], tables: &Path) -> View {
    let chunks = MemoryChunks::default();
    let mut model = Model::new();
    model.next = Ino::FIRST.0 + count;
    (Ino::FIRST.0..model.next).for_each(|ino| model.put_inode(Ino(ino), Node::Folder));
    for (folder, name, ino) in names {
        model.touched_dentries.insert((*folder, name.clone().into_bytes()));
        model.dentries.insert((*folder, name.clone().into_bytes()), (*ino, FileKind::Folder));
    }
    let (id, _) = model.seal(&chunks, None);
    View::from_chunks(Arc::new(chunks), tables, id).unwrap()
}

/// The inodes of the model's tree by path, in path order (a folder's path before what is in it).
fn tree(model: &Model) -> Vec<(Vec<u8>, Inode)> {
    let root = (Vec::new(), model.inodes[&Ino::ROOT].clone());
    let rest = paths(model).into_iter().map(|(path, ino)| (path, model.inodes[&ino].clone()));
    std::iter::once(root).chain(rest).collect()
}

/// By the components of the path.
type Changes = BTreeMap<Vec<Vec<u8>>, (What, Option<Inode>, Option<Inode>)>;

/// What a path-wise comparison of the two models finds, without any cleverness.
fn expected_changes(old: &Model, new: &Model) -> Changes {
    let parts = |path: &[u8]| path.split(|b| *b == b'/').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let mut changes: BTreeMap<_, (Option<Inode>, Option<Inode>)> = BTreeMap::new();
    for (path, inode) in tree(old) {
        changes.entry(parts(&path)).or_default().0 = Some(inode);
    }
    for (path, inode) in tree(new) {
        changes.entry(parts(&path)).or_default().1 = Some(inode);
    }
    let judged = changes.into_iter().filter_map(|(path, (old, new))| {
        let what = match (&old, &new) {
            (Some(old), Some(new)) => {
                let kind = old.kind() != new.kind();
                let differences = Differences {
                    kind,
                    content: !kind && old.node != new.node,
                    owner: old.attrs.uid != new.attrs.uid,
                    ..Differences::default()
                };
                differences.any().then_some(What::Modified(differences))?
            }
            (Some(_), None) => What::Removed,
            (None, _) => What::Added,
        };
        Some((path, (what, old, new)))
    });
    judged.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_diff_is_the_models_difference(layers in prop::collection::vec(steps(), 2..4), other in prop::collection::vec(steps(), 1..3)) {
        let tables = tempfile::tempdir().unwrap();
        let mut built = build(&layers, tables.path());
        built.extend(build(&other, tables.path()));
        // A second stack over the first one's base: related, but neither an ancestor of the other.
        let forked: Vec<_> = layers[..1].iter().chain(&other).cloned().collect();
        built.extend(build(&forked, tables.path()).into_iter().skip(1));
        for (old_model, old) in &built {
            for (new_model, new) in &built {
                let changes = diff(old, new).collect::<Result<Vec<_>>>().unwrap();
                let expected = expected_changes(old_model, new_model);
                let parts = |path: &[u8]| path.split(|b| *b == b'/').map(<[u8]>::to_vec).collect::<Vec<_>>();
                prop_assert!(changes.is_sorted_by_key(|change| parts(&change.path)));
                let found: BTreeMap<_, _> = changes.into_iter()
                    .map(|change| (parts(&change.path), (change.what, change.old, change.new))).collect();
                prop_assert_eq!(&found, &expected);
                // For exporters: the same without what lies below removed or replaced folders.
                let brief: BTreeMap<_, _> = layer_changes(old, new).map(|change| change.unwrap())
                    .map(|change| (parts(&change.path), (change.what, change.old, change.new))).collect();
                let is_folder = |inode: &Option<Inode>| inode.as_ref().is_some_and(|i| i.kind() == FileKind::Folder);
                let hidden = |path: &Vec<Vec<u8>>| (1..path.len()).any(|count| {
                    expected.get(&path[..count]).is_some_and(|(_, old, new)| is_folder(old) && !is_folder(new))
                });
                let visible: BTreeMap<_, _> = expected.clone().into_iter().filter(|(path, _)| !hidden(path)).collect();
                prop_assert_eq!(brief, visible);
            }
        }
        let empty = View::empty(built[0].1.chunks().clone());
        let (model, view) = &built[0];
        prop_assert_eq!(layer_changes(&empty, view).count(), tree(model).len());
    }
}
