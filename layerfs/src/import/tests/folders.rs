//! Folders of the host.

use super::*;

#[test]
fn a_folder_comes_back_as_it_was() {
    let bench = Bench::new();
    zoo(&bench.src());
    let report = bench.import(&bench.src(), "zoo");
    assert_same(&bench.tree(bench.top(&report)), &host_tree(&bench.src()));
    assert_eq!((report.format, report.warnings), (Format::Folder, 0));
    // Holes and zeros are neither read nor stored.
    assert!(report.new_plain_bytes < 3_200_000, "{report:?}");
    assert_eq!(bench.names(), ["zoo"]);
}

#[test]
fn the_same_folder_again_adds_nothing() {
    let bench = Bench::new();
    zoo(&bench.src());
    let first = bench.import(&bench.src(), "first");
    let second = bench.import(&bench.src(), "second");
    assert_eq!(bench.top(&first), bench.top(&second));
    assert_eq!((second.new_chunks, second.new_stored_bytes), (0, 0));
}

#[test]
fn renamed_folders_and_touched_times_cost_records_alone() {
    let bench = Bench::new();
    for folder in 0..20 {
        let folder = bench.src().join(format!("f{folder}"));
        fs::create_dir(&folder).unwrap();
        (0..50).for_each(|i| fs::write(folder.join(format!("{i}")), noise(i, 5000)).unwrap());
        fs::write(folder.join("big"), noise(folder.as_os_str().len() as u64, 500_000)).unwrap();
    }
    let first = bench.import(&bench.src(), "first");
    fs::rename(bench.src().join("f3"), bench.src().join("a-new-name")).unwrap();
    sh("find . -exec touch {} +", &bench.src());
    let second = bench.import(&bench.src(), "second");
    assert!(second.new_stored_bytes * 20 < first.new_stored_bytes, "{first:?} {second:?}");
    assert_eq!(bench.names(), ["first", "second"]);
}

#[test]
fn a_predecessor_keeps_the_manifest_alike() {
    let bench = Bench::new();
    for i in 0..3000 {
        fs::write(bench.src().join(format!("file-{i:05}")), format!("{i}")).unwrap();
    }
    let first = bench.import(&bench.src(), "first");
    fs::write(bench.src().join("aaa"), b"comes first").unwrap();
    fs::remove_file(bench.src().join("file-01500")).unwrap();
    let mut options = ImportOptions::new(name("unlike"));
    let unlike = bench.try_import(&bench.src(), &options).unwrap();
    options.name = name("like");
    options.like = Some(bench.top(&first));
    let like = bench.try_import(&bench.src(), &options).unwrap();
    assert!(like.new_plain_bytes < 100_000 && like.new_plain_bytes * 2 < unlike.new_plain_bytes, "{like:?} {unlike:?}");
    let (before, after) = (bench.view(bench.top(&first)), bench.view(bench.top(&like)));
    let ino = |view: &View, path: &[u8]| view.resolve(path, false).unwrap().0;
    assert_eq!(ino(&before, b"file-02000"), ino(&after, b"file-02000"));
    assert_eq!(ino(&after, b"aaa"), before.next_ino());
    assert_same(&bench.tree(bench.top(&like)), &host_tree(&bench.src()));
}

#[test]
fn whole_over_a_parent_removes_and_plain_keeps() {
    let bench = Bench::new();
    zoo(&bench.src());
    let base = bench.import(&bench.src(), "base");
    fs::remove_dir_all(bench.src().join("d/deep")).unwrap();
    fs::remove_file(bench.src().join("fifo")).unwrap();
    fs::write(bench.src().join("small"), b"changed").unwrap();
    let mut options = ImportOptions::new(name("whole"));
    options.parent = Some(bench.top(&base));
    options.whole = true;
    let whole = bench.try_import(&bench.src(), &options).unwrap();
    assert_same(&bench.tree(bench.top(&whole)), &host_tree(&bench.src()));
    assert!(whole.layers[0].inode_count < 10, "{whole:?}");
    options.whole = false;
    options.name = name("over");
    let over = bench.tree(bench.top(&bench.try_import(&bench.src(), &options).unwrap()));
    assert!(over.contains_key(&b"fifo"[..]) && over[&b"small"[..]].data == b"changed");
}

#[test]
fn folders_deeper_than_descriptors_may_be_open() {
    let bench = Bench::new();
    // Made level by level: the path is longer than a system call takes.
    let mut at = fs::File::open(bench.src()).unwrap();
    for _ in 0..1500 {
        rustix::fs::mkdirat(&at, "deep", 0o755.into()).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::RDONLY;
        at = rustix::fs::openat(&at, "deep", flags, rustix::fs::Mode::empty()).unwrap().into();
        let file = rustix::fs::openat(&at, "z", rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY, 0o644.into());
        drop(file.unwrap());
    }
    let report = bench.import(&bench.src(), "deep");
    assert_eq!(report.entries, 3001);
    assert_eq!(report.layers[0].inode_count, 3001);
    run("rm", &["-rf".as_ref(), "deep".as_ref()], &bench.src());
}

/// Does something at the first sign of progress.
struct Meddler<F: Fn() + Send + Sync>(F, std::sync::Once);

impl<F: Fn() + Send + Sync> Monitor for Meddler<F> {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {
        self.1.call_once(&self.0);
    }
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

#[test]
fn what_changes_or_vanishes_while_it_is_read_is_told() {
    let bench = Bench::new();
    fs::create_dir(bench.src().join("c")).unwrap();
    fs::write(bench.src().join("a"), noise(1, 2_000_000)).unwrap();
    fs::write(bench.src().join("b"), b"b").unwrap();
    let src = bench.src();
    let meddle = move || {
        fs::File::options().write(true).open(src.join("a")).unwrap().set_len(1_000_000).unwrap();
        fs::remove_file(src.join("b")).unwrap();
        fs::remove_dir(src.join("c")).unwrap();
    };
    let monitor = Meddler(meddle, std::sync::Once::new());
    let source = SourceSpec::Path(bench.src());
    let report = import(&bench.store, source, &ImportOptions::new(name("changing")), &monitor).unwrap();
    assert_eq!(report.warnings, 3);
    let tree = bench.tree(bench.top(&report));
    assert_eq!(tree.keys().collect::<Vec<_>>(), [&b""[..], b"a"]);
    assert_eq!(tree[&b"a"[..]].data, noise(1, 2_000_000)[..1_000_000]);
}

#[test]
fn a_cancelled_import_leaves_the_names_alone() {
    let bench = Bench::new();
    zoo(&bench.src());
    let monitor = Counting::default();
    monitor.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let options = ImportOptions::new(name("never"));
    let error = import(&bench.store, SourceSpec::Path(bench.src()), &options, &monitor).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    struct Stops(std::sync::atomic::AtomicU64);
    impl Monitor for Stops {
        fn phase(&self, _: &str, _: Option<u64>) {}
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        }
        fn items(&self, _: u64) {}
        fn warn(&self, _: &str) {}
        fn is_cancelled(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::Relaxed) > 1_000_000
        }
    }
    let error = import(&bench.store, SourceSpec::Path(bench.src()), &options, &Stops(0.into())).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    assert!(bench.names().is_empty());
    bench.import(&bench.src(), "never");
}

#[test]
fn wrong_requests_have_their_class() {
    let bench = Bench::new();
    fs::write(bench.src().join("x"), b"1").unwrap();
    bench.import(&bench.src(), "taken");
    let class = |path: &Path, change: &dyn Fn(&mut ImportOptions)| {
        let mut options = ImportOptions::new(name("new"));
        change(&mut options);
        bench.try_import(path, &options).unwrap_err().class()
    };
    assert_eq!(class(&bench.src(), &|o| o.name = name("taken")), ErrorClass::Exists);
    assert_eq!(class(&bench.path("nothing"), &|_| ()), ErrorClass::NotFound);
    assert_eq!(class(&bench.src().join("x"), &|_| ()), ErrorClass::Invalid);
    assert_eq!(class(&bench.src(), &|o| o.format = Some(Format::Qcow2)), ErrorClass::Invalid);
    let nowhere = LayerId(crate::id::ChunkId::of(b"nowhere"));
    assert_eq!(class(&bench.src(), &|o| o.parent = Some(nowhere)), ErrorClass::NotFound);
    assert_eq!(class(&bench.src(), &|o| o.like = Some(nowhere)), ErrorClass::NotFound);
    assert_eq!(bench.names(), ["taken"]);
}

#[test]
fn the_own_store_is_left_out() {
    let bench = Bench::new();
    fs::write(bench.src().join("file"), "x").unwrap();
    let report = bench.import(bench.folder.path(), "all");
    assert_eq!((report.entries, report.warnings), (3, 1), "the root, src and its file");
}
