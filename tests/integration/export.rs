//! Exports: what comes out equals what went in, by rsync, GNU tar, bsdtar, umoci and skopeo; failures leave nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, ensure};
use layerfs::attr::{Attrs, FileKind, Time};
use layerfs::content::Content;
use layerfs::error::ErrorClass;
use layerfs::export::{Compression, Destination, ExportReport, export, export_tar};
use layerfs::import::{ImportOptions, SourceSpec, import};
use layerfs::inode::{Dentry, Inode, Node, Target};
use layerfs::manifest::{LayerKind, LayerWriter};
use layerfs::monitor::{Monitor, Silent};
use layerfs::store::{Store, StoreOptions};
use layerfs::{Error, Ino, LayerId};
use layerfs_tests::case::Need::{self, Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::tree::Random;
use layerfs_tests::{compare, zoo};
use rustix::fs::XattrFlags;

/// What a zoo needs.
const ZOO: &[Need] = &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap")];

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("export::folder_equals_its_source", ZOO, folder_equals_its_source),
        Case::new("export::existing_empty_folder_and_mount_point", ZOO, into_existing_folders),
        Case::new("export::gnu_tar_extracts_the_source", ZOO, gnu_tar_extracts_the_source),
        Case::new(
            "export::bsdtar_extracts_the_source",
            &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap"), Tool("bsdtar")],
            bsdtar_extracts_the_source,
        ),
        Case::new("export::compressed_tars", &[Tool("tar"), Tool("xz"), Tool("zstd")], compressed_tars),
        Case::new("export::taken_destinations_stay", &[], taken_destinations_stay),
        Case::new("export::full_disk_and_cancel_leave_nothing", &[Root], failures_leave_nothing),
        Case::new("export::user_keeps_what_users_may", ZOO, user_keeps_what_users_may),
        Case::new("export::raw_disk", &[Tool("cmp")], raw_disk),
        Case::new("export::hostile_layers_stay_inside", &[], hostile_layers_stay_inside),
        Case::new(
            "export::umoci_and_skopeo_take_the_layout",
            &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap"), Tool("umoci"), Tool("skopeo")],
            umoci_and_skopeo_take_the_layout,
        ),
        Case::new(
            "export::stacks_survive_oci",
            &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap"), Tool("umoci")],
            stacks_survive_oci,
        ),
        Case::new("export::deep_trees", &[Tool("find")], deep_trees),
        Case::new("export::tars_come_back", ZOO, tars_come_back),
    ]
}

struct Fixture {
    folder: tempfile::TempDir,
    source: PathBuf,
    out: PathBuf,
    store: Arc<Store>,
    layer: LayerId,
}

impl Fixture {
    /// A store with the tree that `fill` makes.
    fn new(fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<Fixture> {
        let folder = tempfile::Builder::new().prefix("lfst-export").tempdir()?;
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        fs::create_dir(&source)?;
        fs::create_dir(&out)?;
        fill(&source)?;
        let store = Store::open(&folder.path().join("store"), StoreOptions::create())?;
        let layer = imported(&store, &source, "source", None)?;
        Ok(Fixture { folder, source, out, store, layer })
    }

    fn of_zoo() -> anyhow::Result<Fixture> {
        Fixture::new(zoo::fill)
    }

    fn small() -> anyhow::Result<Fixture> {
        Fixture::new(|root| {
            fs::create_dir_all(root.join("a/b"))?;
            fs::write(root.join("a/b/large"), Random::new(5).bytes(9 << 20))?;
            (0..200).try_for_each(|n| Ok(fs::write(root.join(format!("a/{n}")), format!("file {n} ").repeat(n))?))
        })
    }

    fn destination(&self, to: &str) -> anyhow::Result<Destination> {
        Ok(Destination::parse(&self.out.join(to).display().to_string(), None)?)
    }

    fn export(&self, to: &str) -> anyhow::Result<ExportReport> {
        Ok(export(&self.store, self.layer, &self.destination(to)?, &Silent)?)
    }

    /// Tars have no sockets: takes it out of the source.
    fn without_sockets(&self) -> anyhow::Result<()> {
        let folder = self.source.join("zoo/specials");
        let before = fs::metadata(&folder)?;
        fs::remove_file(folder.join("socket"))?;
        zoo::set_time(&folder, before.mtime(), before.mtime_nsec())
    }

    /// Fails unless `out` holds just `names`.
    fn only(&self, names: &[&str]) -> anyhow::Result<()> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.out)? {
            found.push(entry?.file_name().to_string_lossy().into_owned());
        }
        found.sort();
        ensure!(found == names, "{found:?} instead of {names:?}");
        Ok(())
    }
}

/// Imports `source`, which is a whole tree.
fn imported(store: &Arc<Store>, source: &Path, name: &str, parent: Option<LayerId>) -> anyhow::Result<LayerId> {
    let mut options = ImportOptions::new(name.parse()?);
    (options.parent, options.whole) = (parent, parent.is_some());
    let report = import(store, SourceSpec::Path(source.to_owned()), &options, &Silent)?;
    Ok(report.layers.last().context("no layer")?.id)
}

fn folder_equals_its_source() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    let report = fixture.export("folder")?;
    same(&fixture.source, &fixture.out.join("folder"))?;
    ensure!(report.warnings.is_empty(), "{:?}", report.warnings);
    ensure!(report.entries == compare::count(&fixture.source)? - 1, "{} entries", report.entries);
    fixture.only(&["folder"])
}

fn into_existing_folders() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    fs::create_dir(fixture.out.join("empty"))?;
    fixture.export("empty")?;
    same(&fixture.source, &fixture.out.join("empty"))?;
    let point = fixture.out.join("mounted");
    fs::create_dir(&point)?;
    // What a parent folder hands down must not reach the copy.
    output_of(Command::new("setfacl").args(["-m", "d:u:77:rwx"]).arg(&fixture.out))?;
    output_of(Command::new("chmod").arg("g+s").arg(&fixture.out))?;
    fixture.export("inherits")?;
    same(&fixture.source, &fixture.out.join("inherits"))?;
    let _mount = Tmpfs::new(&point, "64m")?;
    fixture.export("mounted")?;
    same(&fixture.source, &point)?;
    fixture.only(&["empty", "inherits", "mounted"])
}

/// A tmpfs, unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: &Path, size: &str) -> anyhow::Result<Tmpfs> {
        let mut mount = Command::new("mount");
        output_of(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "layerfs-test"]).arg(at))?;
        Ok(Tmpfs(at.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Exports a tar and extracts it with `program`; the fixture's source has no socket afterwards.
fn extracted(fixture: &Fixture, program: &mut Command) -> anyhow::Result<PathBuf> {
    let report = fixture.export("tree.tar")?;
    ensure!(report.warnings.len() == 1 && report.warnings[0].contains("socket"), "{:?}", report.warnings);
    let copy = fixture.out.join("copy");
    fs::create_dir(&copy)?;
    let output =
        program.arg("-f").arg(fixture.out.join("tree.tar")).arg("-C").arg(&copy).env("LC_ALL", "C.UTF-8").output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.is_empty(), "{program:?}: {} {said}", output.status);
    fixture.without_sockets()?;
    Ok(copy)
}

fn gnu_tar_extracts_the_source() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--warning=no-timestamp", "-xp"]);
    let copy = extracted(&fixture, &mut tar)?;
    same(&fixture.source, &copy)
}

fn bsdtar_extracts_the_source() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    let mut bsdtar = Command::new("bsdtar");
    let copy = extracted(&fixture, bsdtar.args(["--numeric-owner", "--acls", "--xattrs", "-xp"]))?;
    // bsdtar misreads fractions of negative times, and sets no time of the folder that it extracts into; it does so
    // with GNU tar's archives too.
    for path in ["", "zoo/times/before-1970"] {
        let source = fs::metadata(fixture.source.join(path))?;
        zoo::set_time(&copy.join(path), source.mtime(), source.mtime_nsec())?;
    }
    let folder = fs::metadata(fixture.source.join("zoo/times"))?;
    zoo::set_time(&copy.join("zoo/times"), folder.mtime(), folder.mtime_nsec())?;
    same(&fixture.source, &copy)
}

fn compressed_tars() -> anyhow::Result<()> {
    let fixture = Fixture::small()?;
    let list = |name: &str| output_of(Command::new("tar").args(["--full-time", "-tvf"]).arg(fixture.out.join(name)));
    let names = ["t.tar", "t.tar.gz", "t.tar.zst", "t.tar.xz", "t.tgz"];
    names.iter().try_for_each(|name| fixture.export(name).map(drop))?;
    let plain = list("t.tar")?;
    ensure!(plain.lines().count() == 204, "{} lines", plain.lines().count());
    for name in &names[1..] {
        ensure!(list(name)? == plain, "{name} lists something else");
    }
    ensure!(fs::read(fixture.out.join("t.tgz"))? == fs::read(fixture.out.join("t.tar.gz"))?, "not deterministic");
    let mut piped = Vec::new();
    export_tar(&fixture.store, fixture.layer, Compression::None, &mut piped, &Silent)?;
    ensure!(piped == fs::read(fixture.out.join("t.tar"))?, "a pipe gets something else than a file");
    ensure!(piped.len() % 10_240 == 0, "{} bytes", piped.len());
    Ok(())
}

fn taken_destinations_stay() -> anyhow::Result<()> {
    let fixture = Fixture::small()?;
    fs::create_dir(fixture.out.join("full"))?;
    for name in ["full/file", "t.tar", "d.raw", "file"] {
        fs::write(fixture.out.join(name), "mine")?;
    }
    std::os::unix::fs::symlink("nowhere", fixture.out.join("dangling"))?;
    for name in ["full", "t.tar", "file", "dangling", "oci"] {
        let to = match name {
            "oci" => Destination::parse(&format!("oci:{}", fixture.out.join("full").display()), None)?,
            name => fixture.destination(name)?,
        };
        let error = export(&fixture.store, fixture.layer, &to, &Silent).err().context(name)?;
        ensure!(matches!(error.class(), ErrorClass::Exists | ErrorClass::NotFound), "{name}: {error}");
    }
    let error = export(&fixture.store, fixture.layer, &fixture.destination("no/such/parent")?, &Silent).err();
    ensure!(error.as_ref().is_some_and(|e| e.class() == ErrorClass::NotFound), "{error:?}");
    ensure!(fs::read(fixture.out.join("t.tar"))? == b"mine");
    fixture.only(&["d.raw", "dangling", "file", "full", "t.tar"])
}

/// Cancels once so many bytes went by.
struct CancelAfter(u64, AtomicU64);

impl Monitor for CancelAfter {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, bytes: u64) {
        self.1.fetch_add(bytes, Ordering::Relaxed);
    }
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed) >= self.0
    }
}

fn failures_leave_nothing() -> anyhow::Result<()> {
    let fixture = Fixture::small()?;
    let destinations = |folder: &Path| -> anyhow::Result<Vec<Destination>> {
        let at = |name: &str| folder.join(name).display().to_string();
        let texts = [at("folder"), at("t.tar"), at("t.tar.zst"), format!("oci:{}", at("oci"))];
        texts.iter().map(|text| Ok(Destination::parse(text, None)?)).collect()
    };
    for to in destinations(&fixture.out)? {
        for bytes in [0, 1 << 20, 5 << 20] {
            let monitor = CancelAfter(bytes, AtomicU64::new(0));
            let ended = export(&fixture.store, fixture.layer, &to, &monitor);
            ensure!(matches!(ended, Err(Error::Cancelled)), "{to:?}: {ended:?}");
            fixture.only(&[])?;
        }
    }
    let point = fixture.folder.path().join("small");
    fs::create_dir(&point)?;
    let _mount = Tmpfs::new(&point, "3m")?;
    for to in destinations(&point)? {
        let ended = export(&fixture.store, fixture.layer, &to, &Silent);
        ensure!(ended.as_ref().is_err_and(|e| e.class() == ErrorClass::NoSpace), "{to:?}: {ended:?}");
        ensure!(fs::read_dir(&point)?.count() == 0, "{to:?} left something behind");
    }
    // Into the full mount point itself.
    let into = Destination::parse(&point.display().to_string(), None)?;
    let ended = export(&fixture.store, fixture.layer, &into, &Silent);
    ensure!(ended.as_ref().is_err_and(|e| e.class() == ErrorClass::NoSpace), "{ended:?}");
    ensure!(fs::read_dir(&point)?.count() == 0, "something is left in the mount point");
    Ok(())
}

fn user_keeps_what_users_may() -> anyhow::Result<()> {
    let fixture = Fixture::new(|root| {
        zoo::fill(root)?;
        // Folders that their owner may not write, for the removal and the move.
        fs::create_dir_all(root.join("closed/inner/more"))?;
        fs::write(root.join("closed/inner/file"), "x")?;
        fs::set_permissions(root.join("closed/inner"), fs::Permissions::from_mode(0o500))?;
        Ok(fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o555))?)
    })?;
    output_of(Command::new("chmod").args(["-R", "a+rX"]).arg(fixture.folder.path().join("store")))?;
    fs::set_permissions(fixture.folder.path(), fs::Permissions::from_mode(0o755))?;
    let nobody = 65_534;
    std::os::unix::fs::chown(&fixture.out, Some(nobody), Some(nobody))?;
    let report = std::thread::scope(|scope| {
        let as_nobody = || {
            let (uid, gid) = (rustix::fs::Uid::from_raw(nobody), rustix::fs::Gid::from_raw(nobody));
            rustix::thread::set_thread_groups(&[])?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            let monitor = CancelAfter(4 << 20, AtomicU64::new(0));
            let ended = export(&fixture.store, fixture.layer, &fixture.destination("cancelled")?, &monitor);
            ensure!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
            fixture.only(&[])?;
            fixture.export("folder")
        };
        scope.spawn(as_nobody).join().expect("no panic")
    })?;
    ensure!(report.warnings.len() == 3, "{:?}", report.warnings);
    let out = fixture.out.join("folder");
    let mut rsync = Command::new("rsync");
    rsync.args(["-rlptHS", "--checksum", "--modify-window=-1", "--dry-run", "-i", "--delete", "--no-D"]);
    rsync.args(["--exclude=/zoo/specials/", "--exclude=/zoo/attributes/set*"]);
    let differences = output_of(rsync.arg(fixture.source.join("")).arg(out.join("")))?;
    ensure!(differences.is_empty(), "{differences}");
    let mode = |name: &str| Ok::<_, anyhow::Error>(fs::metadata(out.join(name))?.mode() & 0o7777);
    ensure!(mode("zoo/attributes/setuid")? == 0o755, "a set-id bit went to somebody else");
    ensure!(fs::metadata(out.join("zoo"))?.uid() == nobody);
    fixture.only(&["folder"])
}

fn raw_disk() -> anyhow::Result<()> {
    let fixture = Fixture::new(|root| {
        let disk = File::create(root.join("disk.raw"))?;
        disk.set_len(3 << 30)?;
        for offset in [0, 5 << 20, (2 << 30) + 4096] {
            disk.write_all_at(&Random::new(offset).bytes(3 << 20), offset)?;
        }
        Ok(())
    })?;
    fixture.export("copy.raw")?;
    let (disk, copy) = (fixture.source.join("disk.raw"), fixture.out.join("copy.raw"));
    output_of(Command::new("cmp").arg(&disk).arg(&copy))?;
    ensure!(fs::metadata(&copy)?.blocks() <= fs::metadata(&disk)?.blocks(), "the copy has fewer holes");
    let taken = fixture.export("copy.raw").err().context("written over")?;
    ensure!(taken.to_string().contains("exists"), "{taken}");
    let tree = Fixture::small()?;
    let error = tree.export("x.raw").err().context("a tree is no disk")?;
    ensure!(error.to_string().contains("disk.raw"), "{error}");
    tree.only(&[])
}

/// Layers that no importer makes.
fn hostile_layers_stay_inside() -> anyhow::Result<()> {
    let fixture = Fixture::small()?;
    let outside = fixture.folder.path().join("outside");
    fs::create_dir(&outside)?;
    let session = fixture.store.session("hostile");
    let inode = |ino, node| Inode {
        ino: Ino(ino),
        nlink: 2,
        attrs: Attrs::imported(0o755, 0, 0, Time::default()),
        xattrs: vec![],
        node,
    };
    let dentry = |folder, name: &[u8], ino, kind| Dentry {
        folder: Ino(folder),
        name: name.to_vec(),
        target: Target::Inode { ino: Ino(ino), kind },
    };
    let target = outside.as_os_str().as_bytes().to_vec();
    for kind in [FileKind::Folder, FileKind::Symlink, FileKind::File] {
        let mut writer = LayerWriter::new(&session);
        writer.dentry(&dentry(1, b"a", 2, kind))?;
        writer.dentry(&dentry(2, b"b", 3, FileKind::File))?;
        writer.inode(&inode(1, Node::Folder))?;
        writer.inode(&inode(2, Node::Symlink(target.clone())))?;
        writer.inode(&inode(3, Node::File(Content::Inline(b"escaped".to_vec()))))?;
        let (layer, _) = writer.finish(LayerKind::Base, None, Ino(4))?;
        session.flush()?;
        let ended = export(&fixture.store, layer, &fixture.destination(&format!("{kind:?}"))?, &Silent);
        if kind == FileKind::Symlink {
            ended?;
            fs::remove_dir_all(fixture.out.join("Symlink"))?;
        } else {
            ensure!(ended.as_ref().is_err_and(|e| e.class() == ErrorClass::Corrupt), "{kind:?}: {ended:?}");
            fixture.only(&[])?;
        }
        ensure!(fs::read_dir(&outside)?.count() == 0, "something was written outside");
    }
    Ok(())
}

/// Looks now and then how many descriptors lead into a folder.
struct OpenFolders {
    root: PathBuf,
    items: AtomicU64,
    most: AtomicU64,
}

impl Monitor for OpenFolders {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn items(&self, count: u64) {
        if !self.items.fetch_add(count, Ordering::Relaxed).is_multiple_of(100) {
            return;
        }
        let Ok(open) = fs::read_dir("/proc/self/fd") else { return };
        let leads_there = |target: std::io::Result<PathBuf>| match target {
            Ok(target) => target.starts_with(&self.root),
            // The path is longer than the kernel tells.
            Err(error) => error.raw_os_error() == Some(rustix::io::Errno::NAMETOOLONG.raw_os_error()),
        };
        let count = open.flatten().filter(|entry| leads_there(fs::read_link(entry.path()))).count() as u64;
        self.most.fetch_max(count, Ordering::Relaxed);
    }
    fn warn(&self, _: &str) {}
}

/// More folders inside of each other than a process may have descriptors, and than a path may name.
fn deep_trees() -> anyhow::Result<()> {
    const DEPTH: u64 = 6000;
    let fixture = Fixture::small()?;
    let session = fixture.store.session("deep");
    let attrs = Attrs::imported(0o755, 0, 0, Time { seconds: 5, nanos: 6 });
    let inode = |ino, nlink, node| Inode { ino: Ino(ino), nlink, attrs: attrs.clone(), xattrs: vec![], node };
    let mut writer = LayerWriter::new(&session);
    for level in 1..=DEPTH {
        let (folder, inner, file) = (Ino(level), Ino(level + 1), Ino(DEPTH + 1 + level));
        let target = Target::Inode { ino: file, kind: FileKind::File };
        for name in ["before", "zafter"] {
            let name = name.as_bytes().to_vec();
            if name == b"zafter" {
                let target = Target::Inode { ino: inner, kind: FileKind::Folder };
                writer.dentry(&Dentry { folder, name: b"folder".to_vec(), target })?;
            }
            writer.dentry(&Dentry { folder, name, target })?;
        }
    }
    (1..=DEPTH + 1).try_for_each(|ino| writer.inode(&inode(ino, 2 + u32::from(ino <= DEPTH), Node::Folder)))?;
    (DEPTH + 2..=2 * DEPTH + 1)
        .try_for_each(|ino| writer.inode(&inode(ino, 2, Node::File(Content::Inline(b"x".to_vec())))))?;
    let (layer, _) = writer.finish(LayerKind::Base, None, Ino(2 * DEPTH + 2))?;
    session.flush()?;
    let monitor = OpenFolders { root: fixture.out.clone(), items: AtomicU64::new(0), most: AtomicU64::new(0) };
    let report = export(&fixture.store, layer, &fixture.destination("deep")?, &monitor)?;
    let most = monitor.most.into_inner();
    ensure!((50..400).contains(&most), "{most} folders were open at a time");
    let listed = output_of(Command::new("find").arg(fixture.out.join("deep")).args(["-printf", "%y %n %T@\\n"]))?;
    let cancelled = export(&fixture.store, layer, &fixture.destination("cut")?, &CancelAfter(5000, AtomicU64::new(0)));
    let removed = Command::new("rm").arg("-rf").arg(fixture.out.join("deep")).status()?;
    ensure!(removed.success() && report.entries == 3 * DEPTH, "{} entries", report.entries);
    let count = |line: &str| listed.lines().filter(|found| found.starts_with(line)).count() as u64;
    ensure!(count("f 2 5.0000000060") == 2 * DEPTH && listed.lines().count() as u64 == 3 * DEPTH + 1);
    ensure!(count("d 3 5.0000000060") == DEPTH, "{} folders", count("d 3 5.0000000060"));
    ensure!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
    fixture.only(&[])
}

fn umoci_and_skopeo_take_the_layout() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    let layout = fixture.out.join("layout");
    let export_as = |tag: &str, format| {
        let to = Destination::parse(&format!("oci:{}:{tag}", layout.display()), format)?;
        anyhow::Ok(export(&fixture.store, fixture.layer, &to, &Silent)?)
    };
    let first = export_as("one", None)?;
    let zstd = export_as("two", Some("oci-zstd".parse()?))?;
    ensure!(export_as("one", None)?.oci_manifest == first.oci_manifest, "not deterministic");
    ensure!(zstd.oci_manifest != first.oci_manifest);
    fixture.only(&["layout"])?;
    let tags = output_of(Command::new("umoci").args(["list", "--layout"]).arg(&layout))?;
    ensure!(tags.lines().collect::<BTreeSet<_>>() == BTreeSet::from(["one", "two"]), "{tags}");
    let bundle = fixture.folder.path().join("bundle");
    let image = format!("{}:one", layout.display());
    output_of(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle))?;
    fixture.without_sockets()?;
    // Go takes a pax record without a value for none, as POSIX says.
    rustix::fs::removexattr(fixture.source.join("zoo/attributes/xattrs"), "user.empty")?;
    let rootfs = bundle.join("rootfs");
    compare::same_by_rsync(&fixture.source, &rootfs)?;
    compare::same_hard_links(&fixture.source, &rootfs)?;
    for tag in ["one", "two"] {
        let copied = format!("oci:{}:x", fixture.folder.path().join(tag).display());
        output_of(Command::new("skopeo").args([
            "copy",
            "--insecure-policy",
            &format!("oci:{}:{tag}", layout.display()),
            &copied,
        ]))?;
    }
    Ok(())
}

/// Changes a zoo in all ways that layers know.
fn change(zoo: &Path) -> anyhow::Result<()> {
    fs::remove_file(zoo.join("names/~"))?;
    fs::remove_dir_all(zoo.join("attributes/acl-folder"))?;
    fs::rename(zoo.join("deep"), zoo.join("deeper"))?;
    fs::remove_file(zoo.join("links/far/empty-too"))?;
    fs::hard_link(zoo.join("links/one"), zoo.join("links/five"))?;
    // As many names as before, but not the same.
    fs::rename(zoo.join("moving/one"), zoo.join("moving/three"))?;
    fs::rename(zoo.join("moving/swapped-one"), zoo.join("moving/between"))?;
    fs::rename(zoo.join("moving/swapped-two"), zoo.join("moving/swapped-one"))?;
    fs::rename(zoo.join("moving/between"), zoo.join("moving/swapped-two"))?;
    // A file becomes a folder, a folder a file, a link a device.
    fs::remove_file(zoo.join("contents/random-1"))?;
    fs::create_dir(zoo.join("contents/random-1"))?;
    fs::write(zoo.join("contents/random-1/inside"), "new")?;
    fs::remove_dir(zoo.join("contents/empty-folder"))?;
    fs::write(zoo.join("contents/empty-folder"), "no folder")?;
    fs::set_permissions(zoo.join("contents/random-4096"), fs::Permissions::from_mode(0o600))?;
    File::options().write(true).open(zoo.join("contents/random-3000001"))?.write_all_at(b"changed", 1_500_000)?;
    zoo::set_time(&zoo.join("times/zero"), 77, 7)?;
    rustix::fs::setxattr(zoo.join("deeper/a/b/c"), "user.new", b"attribute", XattrFlags::empty())?;
    Ok(fs::write(zoo.join("deeper/a/b/c/d/new"), Random::new(99).bytes(100_000))?)
}

fn stacks_survive_oci() -> anyhow::Result<()> {
    let mut fixture = Fixture::of_zoo()?;
    fixture.without_sockets()?;
    rustix::fs::removexattr(fixture.source.join("zoo/attributes/xattrs"), "user.empty")?;
    let zoo = fixture.source.join("zoo");
    fs::create_dir_all(zoo.join("moving/folder"))?;
    for (name, link) in [("one", "two"), ("swapped-one", "folder/its-link"), ("swapped-two", "folder/other-link")] {
        fs::write(zoo.join("moving").join(name), name)?;
        fs::hard_link(zoo.join("moving").join(name), zoo.join("moving").join(link))?;
    }
    let middle = imported(&fixture.store, &fixture.source, "middle", Some(fixture.layer))?;
    change(&zoo)?;
    let upper = imported(&fixture.store, &fixture.source, "upper", Some(middle))?;
    fs::remove_dir_all(zoo.join("deeper/a/b"))?;
    fs::create_dir(zoo.join("deeper/a/b"))?;
    fs::write(zoo.join("deeper/a/b/c"), "a file where a folder was")?;
    fixture.layer = imported(&fixture.store, &fixture.source, "top", Some(upper))?;
    fixture.export("folder")?;
    same(&fixture.source, &fixture.out.join("folder"))?;

    let layout = fixture.out.join("layout");
    let to = Destination::parse(&format!("oci:{}:stack", layout.display()), None)?;
    export(&fixture.store, fixture.layer, &to, &Silent)?;
    let bundle = fixture.folder.path().join("bundle");
    let image = format!("{}:stack", layout.display());
    output_of(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle))?;
    compare::same_by_rsync(&fixture.source, &bundle.join("rootfs"))?;
    compare::same_hard_links(&fixture.source, &bundle.join("rootfs"))?;

    fixture.layer = imported(&fixture.store, &layout, "again", None)?;
    fixture.export("again")?;
    same(&fixture.source, &fixture.out.join("again"))
}

fn tars_come_back() -> anyhow::Result<()> {
    let mut fixture = Fixture::of_zoo()?;
    fixture.export("tree.tar.zst")?;
    fixture.without_sockets()?;
    fixture.layer = imported(&fixture.store, &fixture.out.join("tree.tar.zst"), "again", None)?;
    fixture.export("again")?;
    same(&fixture.source, &fixture.out.join("again"))?;
    // And again the same tar, byte for byte.
    fixture.export("again.tar.zst")?;
    let read = |name: &str| fs::read(fixture.out.join(name));
    ensure!(read("tree.tar.zst")? == read("again.tar.zst")?, "the tar of the same tree differs");
    Ok(())
}

fn same(source: &Path, copy: &Path) -> anyhow::Result<()> {
    compare::same_by_rsync(source, copy)?;
    compare::same_hard_links(source, copy)?;
    compare::no_more_allocated(source, copy)
}
