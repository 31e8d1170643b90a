//! The builder, over chunks in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::attr::{Attrs, Time};
use crate::chunk::MemoryChunks;
use crate::content::Content;
use crate::error::ErrorClass;
use crate::inode::Node;
use crate::monitor::Silent;

type Tree = BTreeMap<String, (u64, u32, String)>;

struct Bench {
    chunks: MemoryChunks,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { chunks: MemoryChunks::default(), folder: tempfile::tempdir().unwrap() }
    }

    fn view(&self, id: LayerId) -> View {
        View::from_chunks(Arc::new(self.chunks.clone()), self.folder.path(), id).unwrap()
    }

    fn build_on(&self, lines: &[&str], parent: Option<LayerId>, like: Option<LayerId>, whole: bool) -> Result<LayerId> {
        let mut builder = Builder::new(self.folder.path());
        for line in lines {
            let (path, entry) = parse(line);
            builder.add(&path, entry)?;
        }
        let (parent, like) = (parent.map(|id| self.view(id)), like.map(|id| self.view(id)));
        let base = Base {
            parent: parent.as_ref().map(|tree| Parent {
                id: tree.top().unwrap(),
                manifest: tree.manifest().unwrap(),
                tree,
            }),
            like: like.as_ref(),
            whole,
            kind: LayerKind::Base,
            image: None,
        };
        Ok(builder.finish(&self.chunks, base, &Silent)?.0)
    }

    fn build(&self, lines: &[&str]) -> LayerId {
        self.build_on(lines, None, None, false).unwrap()
    }

    /// Path → (number, links, what).
    fn tree(&self, id: LayerId) -> Tree {
        let view = self.view(id);
        let mut tree = Tree::new();
        let mut add = |path: &str, ino| {
            let inode = view.expect_inode(ino).unwrap();
            let what = match &inode.node {
                Node::File(Content::Inline(bytes)) => String::from_utf8(bytes.clone()).unwrap(),
                other => format!("{:?}", other.kind()),
            };
            tree.insert(path.to_owned(), (ino.0, inode.nlink, what));
        };
        add("", Ino::ROOT);
        let mut walker = crate::walk::Walker::new(&view);
        while let Some(entry) = walker.next_entry().unwrap() {
            add(std::str::from_utf8(entry.path).unwrap(), entry.ino);
        }
        tree
    }

    fn paths(&self, id: LayerId) -> String {
        let tree = self.tree(id);
        tree.iter()
            .skip(1)
            .map(|(path, (ino, nlink, what))| format!("{path}:{ino}:{nlink}:{what}"))
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn records(&self, id: LayerId) -> (u64, u64) {
        let manifest = Manifest::load(&self.chunks, id).unwrap();
        (manifest.inode_count, manifest.dentry_count)
    }
}

fn attrs() -> Attrs {
    Attrs::imported(0o644, 0, 0, Time::default())
}

fn node(node: Node) -> Entry {
    Entry::Node { attrs: attrs(), xattrs: Vec::new(), node }
}

/// `a/` a folder, `a=x` a file, `a->x` a symbolic link, `a~b` a hard link, `!a` a whiteout, `#a` opaque.
fn parse(line: &str) -> (TreePath, Entry) {
    let path = |text: &str| TreePath::parse(text.as_bytes()).unwrap();
    if let Some((name, target)) = line.split_once("->") {
        (path(name), node(Node::Symlink(target.as_bytes().to_vec())))
    } else if let Some((name, target)) = line.split_once('~') {
        (path(name), Entry::HardLink(path(target)))
    } else if let Some((name, content)) = line.split_once('=') {
        (path(name), node(Node::File(Content::Inline(content.as_bytes().to_vec()))))
    } else if let Some(name) = line.strip_prefix('!') {
        (path(name), Entry::Whiteout)
    } else if let Some(name) = line.strip_prefix('#') {
        (path(name), Entry::Opaque)
    } else {
        (path(line), node(Node::Folder))
    }
}

#[test]
fn numbers_follow_the_paths_and_links_are_counted() {
    let bench = Bench::new();
    let id = bench.build(&["./", "b/", "b/y=2", "a/", "a/x=1", "z~a/x", "b/c/", "s->a"]);
    assert_eq!(bench.paths(id), "a:2:2:Folder a/x:3:2:1 b:4:3:Folder b/c:5:2:Folder b/y:6:1:2 s:7:1:Symlink z:3:2:1");
    assert_eq!(bench.tree(id)[""].1, 4);
}

#[test]
fn missing_folders_are_made_up() {
    let bench = Bench::new();
    assert_eq!(bench.paths(bench.build(&["a/b/c=1"])), "a:2:3:Folder a/b:3:2:Folder a/b/c:4:1:1");
}

#[test]
fn the_last_entry_of_a_path_wins() {
    let bench = Bench::new();
    assert_eq!(bench.paths(bench.build(&["a=1", "a=2"])), "a:2:1:2");
    assert_eq!(bench.paths(bench.build(&["a/", "a/b=1", "a=2"])), "a:2:1:2");
    assert_eq!(bench.paths(bench.build(&["a/", "a/b=1", "a=2", "a/", "a/c=3"])), "a:2:2:Folder a/c:3:1:3");
}

#[test]
fn hard_links_in_any_order_and_chain_make_the_same_layer() {
    let bench = Bench::new();
    let id = bench.build(&["a=1", "b~a", "c~a"]);
    for lines in [["c~b", "b~a", "a=1"], ["a~b", "b~c", "c=1"], ["b=1", "a~b", "c~a"]] {
        assert_eq!(bench.build(&lines), id);
    }
    assert_eq!(bench.paths(id), "a:2:3:1 b:2:3:1 c:2:3:1");
}

#[test]
fn impossible_trees_are_refused() {
    let bench = Bench::new();
    for lines in [
        &["a~b"][..],
        &["a~a"],
        &["a~b", "b~a"],
        &["a/", "b~a"],
        &["a=1", "a/b=2"],
        &[".=1"],
        &["a->a", "a/b=1"],
        &["a->b", "b->a", "a/c=1"],
    ] {
        let error = bench.build_on(lines, None, None, false).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Invalid, "{lines:?}: {error}");
    }
}

#[test]
fn entries_below_symbolic_links_go_where_they_lead_within_the_tree() {
    let bench = Bench::new();
    let id = bench.build(&[
        "lib->usr/lib",
        "lib/x=1",
        "usr/lib/",
        "esc->../../etc",
        "esc/p=2",
        "l2->lib",
        "y~l2/x",
        "l2/z~l2/x",
    ]);
    let paths = bench.paths(id);
    assert!(
        paths.contains("etc/p:4:1:2")
            && paths.contains("usr/lib/x:9:3:1 usr/lib/z:9:3:1 y:9:3:1")
            && paths.contains("usr/lib/z:"),
        "{paths}"
    );
    let base = bench.build(&["lib->usr/lib", "usr/lib/a=1"]);
    let top = bench.build_on(&["lib/b=2", "!lib/a"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(top), "lib:2:1:Symlink usr:3:3:Folder usr/lib:4:2:Folder usr/lib/b:6:1:2");
}

#[test]
fn what_is_as_in_the_parent_is_not_recorded() {
    let bench = Bench::new();
    let base = bench.build(&["./", "a/", "a/x=1", "b=2", "c~b"]);
    let same = bench.build_on(&["a/", "b=2", "a/x=1", "c~b"], Some(base), None, false).unwrap();
    assert_eq!(bench.records(same), (0, 0));
    assert_eq!(bench.tree(base), bench.tree(same));
    let changed = bench.build_on(&["a/x=9"], Some(base), None, false).unwrap();
    assert_eq!(bench.records(changed), (1, 0));
    assert_eq!(bench.tree(changed)["a/x"], (3, 1, "9".to_owned()));
}

#[test]
fn whiteouts_and_opaque_folders_hide_what_the_parent_has() {
    let bench = Bench::new();
    let base = bench.build(&["a/", "a/p=1", "a/q/", "a/q/r=1", "b=2", "c=3", "d/", "d/e=1", "d/f/"]);
    let top = bench.build_on(&["!b", "#a", "a/p=5", "!nothing", "!d/f", "!d/gone"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(top), "a:2:2:Folder a/p:3:1:5 c:7:1:3 d:8:2:Folder d/e:9:1:1");
    assert_eq!(bench.tree(top)[""].1, 4);
    let again = bench.build_on(&["!a", "a/new=1", "!d", "d=file"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(again), "a:2:2:Folder a/new:11:1:1 b:6:1:2 c:7:1:3 d:12:1:file");
    assert_eq!(bench.tree(again)[""].1, 3);
}

#[test]
fn hard_links_reach_into_the_parent_and_its_counts_stay_right() {
    let bench = Bench::new();
    let base = bench.build(&["a=1", "b~a", "c=2"]);
    let linked = bench.build_on(&["z~a", "y~c"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(linked), "a:2:3:1 b:2:3:1 c:3:2:2 y:3:2:2 z:2:3:1");
    let split = bench.build_on(&["a=9"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(split), "a:4:1:9 b:2:1:1 c:3:1:2");
    let removed = bench.build_on(&["!b"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(removed), "a:2:1:1 c:3:1:2");
    let moved = bench.build_on(&["!b", "!a", "n~a"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(moved), "c:3:1:2 n:2:1:1");
    let both = bench.build_on(&["b=9", "a~b"], Some(base), None, false).unwrap();
    assert_eq!(bench.paths(both), "a:2:2:9 b:2:2:9 c:3:1:2");
}

#[test]
fn a_whole_source_removes_what_it_lacks() {
    let bench = Bench::new();
    let base = bench.build(&["./", "a/", "a/x=1", "a/y=2", "b/", "b/z=3", "l=4", "m~l"]);
    let top = bench.build_on(&["./", "a/", "a/x=1", "l=4", "n=5"], Some(base), None, true).unwrap();
    assert_eq!(bench.paths(top), "a:2:2:Folder a/x:3:1:1 l:7:1:4 n:8:1:5");
    let same =
        bench.build_on(&["./", "a/", "a/x=1", "a/y=2", "b/", "b/z=3", "l=4", "m~l"], Some(base), None, true).unwrap();
    assert_eq!(bench.records(same), (0, 0));
    let swapped = bench.build_on(&["./", "l=4", "n~l"], Some(base), None, true).unwrap();
    assert_eq!(bench.paths(swapped), "l:7:2:4 n:7:2:4");
    let dangling = bench.build_on(&["x~a/x"], Some(base), None, true).unwrap_err();
    assert_eq!(dangling.class(), ErrorClass::Invalid);
}

#[test]
fn a_predecessor_gives_its_numbers() {
    let bench = Bench::new();
    let base = bench.build(&["os=1"]);
    let first = bench.build_on(&["app/", "app/a=1", "app/b=2", "h=3", "i~h"], Some(base), None, false).unwrap();
    let second = bench.build_on(&["app/", "app/A=0", "app/b=2", "h=3", "i=4"], Some(base), Some(first), false).unwrap();
    assert_eq!(bench.paths(second), "app:3:2:Folder app/A:7:1:0 app/b:5:1:2 h:6:1:3 i:8:1:4 os:2:1:1");
    let same = bench.build_on(&["app/", "app/a=1", "app/b=2", "h=3", "i~h"], Some(base), Some(first), false).unwrap();
    assert_eq!(same, first);
}

fn line() -> impl Strategy<Value = String> {
    let path = || prop::sample::select(vec!["a", "b", "a/x", "a/y", "b/x", "a/x/p", "c"]);
    prop_oneof![
        path().prop_map(|p| format!("{p}/")),
        (path(), 0..3u8).prop_map(|(p, c)| format!("{p}={c}")),
        (path(), path()).prop_map(|(p, t)| format!("{p}~{t}")),
        path().prop_map(|p| format!("!{p}")),
        path().prop_map(|p| format!("#{p}")),
    ]
}

/// What must hold of any tree.
fn check_counts(tree: &Tree) -> Result<(), TestCaseError> {
    for (path, (ino, nlink, what)) in tree {
        let expected = if what == "Folder" {
            let is_child = |other: &&String| match other.strip_prefix(path.as_str()) {
                Some(rest) if path.is_empty() => !rest.is_empty() && !rest.contains('/'),
                Some(rest) => rest.strip_prefix('/').is_some_and(|rest| !rest.contains('/')),
                None => false,
            };
            2 + tree.iter().filter(|(other, (.., what))| is_child(other) && what == "Folder").count()
        } else {
            tree.values().filter(|(other, ..)| other == ino).count()
        };
        prop_assert_eq!(*nlink as usize, expected, "{} in {:?}", path, tree);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_stack_is_sound_and_whole_gives_the_source_alone(
        below in prop::collection::vec(line(), 0..10),
        above in prop::collection::vec(line(), 0..10),
    ) {
        let bench = Bench::new();
        fn texts(lines: &[String]) -> Vec<&str> { lines.iter().map(String::as_str).collect() }
        let Ok(base) = bench.build_on(&texts(&below), None, None, false) else { return Ok(()) };
        check_counts(&bench.tree(base))?;
        if let Ok(top) = bench.build_on(&texts(&above), Some(base), None, false) {
            check_counts(&bench.tree(top))?;
        }
        let plain: Vec<_> = above.iter().filter(|l| !l.starts_with(['!', '#'])).cloned().chain(["./".to_owned()]).collect();
        let alone = bench.build_on(&texts(&plain), None, None, false);
        let whole = bench.build_on(&texts(&plain), Some(base), None, true);
        prop_assert_eq!(alone.is_ok(), whole.is_ok());
        if let (Ok(alone), Ok(whole)) = (alone, whole) {
            let strip = |id| bench.tree(id).into_iter().map(|(p, (_, n, w))| (p, n, w)).collect::<Vec<_>>();
            check_counts(&bench.tree(whole))?;
            prop_assert_eq!(strip(alone), strip(whole));
            let again = bench.build_on(&texts(&plain), Some(whole), None, true).unwrap();
            prop_assert_eq!(bench.records(again), (0, 0));
        }
    }

    #[test]
    fn order_does_not_matter(
        paths in prop::collection::btree_set("[ab](/[ab]){0,3}", 0..8),
        links in prop::collection::vec((0usize..8, "z[0-9]"), 0..5),
        seed in any::<u64>(),
    ) {
        let bench = Bench::new();
        let is_folder = |p: &String| paths.iter().any(|o| o.starts_with(&format!("{p}/")));
        let mut lines: Vec<String> = paths.iter().map(|p| if is_folder(p) { format!("{p}/") } else { format!("{p}=1") }).collect();
        let files: Vec<&String> = paths.iter().filter(|p| !is_folder(p)).collect();
        let mut names: Vec<String> = Vec::new();
        for (target, name) in &links {
            if !files.is_empty() && !names.contains(name) {
                lines.push(format!("{name}~{}", files[target % files.len()]));
                names.push(name.clone());
            }
        }
        let texts: Vec<&str> = lines.iter().map(String::as_str).collect();
        let first = bench.build(&texts);
        let mut shuffled = texts.clone();
        let mut state = seed;
        for i in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            shuffled.swap(i, (state >> 33) as usize % (i + 1));
        }
        prop_assert_eq!(bench.build(&shuffled), first);
    }
}
