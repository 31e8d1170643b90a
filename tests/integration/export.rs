//! Exports: what comes out equals what went in, by rsync, GNU tar, bsdtar, umoci and skopeo; failures leave nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, ensure};
use layerfs::attr::{Attrs, FileKind, Time};
use layerfs::chunker::Chunker;
use layerfs::export::{Destination, ExportReport, export};
use layerfs::inode::{Dentry, Inode, Node, Target};
use layerfs::manifest::{LayerKind, LayerWriter};
use layerfs::monitor::Silent;
use layerfs::store::{Store, StoreOptions};
use layerfs::{Ino, LayerId};
use layerfs_tests::case::Need::{Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::{compare, zoo};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "export::folder_equals_its_source",
        &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap")],
        folder_equals_its_source,
    )]
}

struct Fixture {
    _folder: tempfile::TempDir,
    source: std::path::PathBuf,
    out: std::path::PathBuf,
    store: Arc<Store>,
    layer: LayerId,
}

impl Fixture {
    fn of_zoo() -> anyhow::Result<Fixture> {
        let folder = tempfile::Builder::new().prefix("lfst-export").tempdir()?;
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        fs::create_dir(&source)?;
        fs::create_dir(&out)?;
        zoo::fill(&source)?;
        let store = Store::open(&folder.path().join("store"), StoreOptions::create())?;
        let layer = by_hand(&store, &source)?;
        Ok(Fixture { _folder: folder, source, out, store, layer })
    }

    fn export(&self, to: &str) -> anyhow::Result<ExportReport> {
        let to = Destination::parse(&self.out.join(to).display().to_string(), None)?;
        Ok(export(&self.store, self.layer, &to, &Silent)?)
    }
}

fn folder_equals_its_source() -> anyhow::Result<()> {
    let fixture = Fixture::of_zoo()?;
    let report = fixture.export("folder")?;
    same(&fixture.source, &fixture.out.join("folder"))?;
    ensure!(report.warnings.is_empty(), "{:?}", report.warnings);
    ensure!(report.entries == compare::count(&fixture.source)? - 1, "{} entries", report.entries);
    ensure!(fs::read_dir(&fixture.out)?.count() == 1, "something was left behind");
    Ok(())
}

fn same(source: &Path, copy: &Path) -> anyhow::Result<()> {
    compare::same_by_rsync(source, copy)?;
    compare::same_hard_links(source, copy)?;
    compare::no_more_allocated(source, copy)
}

fn by_hand(store: &Arc<Store>, source: &Path) -> anyhow::Result<LayerId> {
    let session = store.session("by hand");
    let mut inodes: BTreeMap<u64, Inode> = BTreeMap::new();
    let mut dentries: BTreeMap<(u64, Vec<u8>), Dentry> = BTreeMap::new();
    let mut numbers: BTreeMap<u64, u64> = BTreeMap::new();
    let mut paths = Vec::new();
    compare::walk(source, &mut |path, metadata| {
        paths.push((path.to_owned(), metadata.clone()));
        Ok(())
    })?;
    paths.sort_by(|a, b| a.0.cmp(&b.0));
    let mut ingest = session.ingest(|mut inode: Inode, content| {
        inode.node = Node::File(content.expect("a file"));
        inodes.insert(inode.ino.0, inode);
        Ok(())
    });
    let mut others = Vec::new();
    for (path, metadata) in &paths {
        let next = numbers.len() as u64 + 1;
        let is_new = !numbers.contains_key(&metadata.ino());
        let ino = *numbers.entry(metadata.ino()).or_insert(next);
        let kind = FileKind::from_mode(metadata.mode()).context("a kind")?;
        if path != source {
            let folder = Ino(numbers[&fs::metadata(path.parent().context("a parent")?)?.ino()]);
            let name = path.file_name().context("a name")?.as_bytes().to_vec();
            let target = Target::Inode { ino: Ino(ino), kind };
            dentries.insert((folder.0, name.clone()), Dentry { folder, name, target });
        }
        if !is_new {
            continue;
        }
        let mtime = Time { seconds: metadata.mtime(), nanos: metadata.mtime_nsec() as u32 };
        let node = match kind {
            FileKind::File | FileKind::Folder => Node::Folder,
            FileKind::Symlink => Node::Symlink(fs::read_link(path)?.as_os_str().as_bytes().to_vec()),
            FileKind::BlockDevice => Node::BlockDevice(metadata.rdev()),
            FileKind::CharDevice => Node::CharDevice(metadata.rdev()),
            FileKind::Fifo => Node::Fifo,
            FileKind::Socket => Node::Socket,
        };
        let mut xattrs = Vec::new();
        let mut list = vec![0u8; 65536];
        let length = rustix::fs::llistxattr(path, &mut list[..])?;
        for name in list[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0u8; 65536];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
            xattrs.push((name.to_vec(), value[..length].to_vec()));
        }
        xattrs.sort();
        let attrs = Attrs::imported(metadata.mode(), metadata.uid(), metadata.gid(), mtime);
        let inode = Inode { ino: Ino(ino), nlink: metadata.nlink() as u32, attrs, xattrs, node };
        if kind == FileKind::File {
            let file = File::open(path)?;
            ingest.file(inode, Chunker::Tree, &mut layerfs::store::FileSource::new(&file, path)?)?;
        } else {
            others.push(inode);
        }
    }
    ingest.finish()?;
    inodes.extend(others.into_iter().map(|inode| (inode.ino.0, inode)));
    let mut writer = LayerWriter::new(&session);
    dentries.values().try_for_each(|dentry| writer.dentry(dentry))?;
    inodes.values().try_for_each(|inode| writer.inode(inode))?;
    let (layer, _) = writer.finish(LayerKind::Base, None, Ino(numbers.len() as u64 + 1))?;
    session.commit()?;
    Ok(layer)
}
