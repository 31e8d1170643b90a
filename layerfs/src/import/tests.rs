//! Imports of real folders, archives and images into real stores.

#![allow(clippy::print_stderr)]

mod damage;
mod folders;
mod images;
mod tars;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::chunker::is_zero;
use crate::content;
use crate::error::ErrorClass;
use crate::id::Ino;
use crate::inode::Node;
use crate::manifest::{LayerWriter, MAX_LAYERS};
use crate::monitor::{Counting, Silent};
use crate::store::StoreOptions;
use crate::testing::Spawn;
use crate::walk::Walker;

/// A store and a place for sources.
struct Bench {
    folder: tempfile::TempDir,
    store: Arc<Store>,
}

fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::Builder::new().prefix("layerfs-import-").tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        fs::create_dir(folder.path().join("src")).unwrap();
        Bench { folder, store }
    }

    /// The folder for sources.
    fn src(&self) -> PathBuf {
        self.folder.path().join("src")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn try_import(&self, path: &Path, options: &ImportOptions) -> Result<ImportReport> {
        import(&self.store, SourceSpec::Path(path.to_owned()), options, &Silent)
    }

    fn import(&self, path: &Path, as_name: &str) -> ImportReport {
        self.try_import(path, &ImportOptions::new(name(as_name))).unwrap()
    }

    fn import_bytes(&self, bytes: Vec<u8>, options: &ImportOptions) -> Result<ImportReport> {
        import(&self.store, SourceSpec::Stream(Box::new(std::io::Cursor::new(bytes))), options, &Silent)
    }

    fn top(&self, report: &ImportReport) -> LayerId {
        report.layers.last().unwrap().id
    }

    fn view(&self, id: LayerId) -> Arc<View> {
        View::open(&self.store, id).unwrap()
    }

    /// What is in the layer, by path.
    fn tree(&self, id: LayerId) -> BTreeMap<Vec<u8>, What> {
        let view = self.view(id);
        let mut paths = vec![(Vec::new(), crate::id::Ino::ROOT)];
        let mut walker = Walker::new(&view);
        while let Some(entry) = walker.next_entry().unwrap() {
            paths.push((entry.path.to_vec(), entry.ino));
        }
        let mut first_of = BTreeMap::new();
        let mut tree = BTreeMap::new();
        for (path, ino) in paths {
            let inode = view.expect_inode(ino).unwrap();
            let data = match &inode.node {
                Node::File(content) => {
                    let mut bytes = vec![0; content.len() as usize];
                    assert_eq!(content::read_at(&*self.store, content, 0, &mut bytes).unwrap(), bytes.len());
                    bytes
                }
                Node::Symlink(target) => target.clone(),
                _ => Vec::new(),
            };
            let first = first_of.entry(ino).or_insert_with(|| path.clone()).clone();
            tree.insert(
                path,
                What {
                    mode: inode.mode(),
                    owner: (inode.attrs.uid, inode.attrs.gid),
                    mtime: (inode.attrs.mtime.seconds, inode.attrs.mtime.nanos),
                    links: inode.nlink,
                    rdev: inode.rdev(),
                    xattrs: inode.xattrs.clone(),
                    data,
                    first,
                },
            );
        }
        tree
    }

    /// Neither names nor anything that a name needs has changed, and nothing is left in the way of the next import.
    fn names(&self) -> Vec<String> {
        assert_eq!(fs::read_dir(self.store.tmp_folder()).unwrap().count(), 0);
        self.store.names().unwrap().into_iter().map(|(name, _)| name.to_string()).collect()
    }
}

/// All that is to be kept of a path.
#[derive(Clone, PartialEq, Eq)]
struct What {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    links: u32,
    rdev: u64,
    xattrs: crate::attr::Xattrs,
    data: Vec<u8>,
    /// The first path of the same inode.
    first: Vec<u8>,
}

impl std::fmt::Debug for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let What { mode, owner, mtime, links, rdev, xattrs, data, first } = self;
        let data = &data[..data.len().min(40)];
        write!(
            f,
            "{mode:o} {owner:?} {mtime:?} {links} {rdev} {xattrs:?} {:?} {:?}",
            OsStr::from_bytes(data),
            OsStr::from_bytes(first)
        )
    }
}

/// What the host has at `root`, by path; of paths on one inode, `first` is the smallest.
fn host_tree(root: &Path) -> BTreeMap<Vec<u8>, What> {
    let mut first_of = BTreeMap::new();
    let mut tree = BTreeMap::new();
    let mut folders = vec![(Vec::new(), root.to_owned())];
    let mut paths = folders.clone();
    while let Some((relative, folder)) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let mut path = relative.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(entry.file_name().into_vec());
            if entry.file_type().unwrap().is_dir() {
                folders.push((path.clone(), entry.path()));
            }
            paths.push((path, entry.path()));
        }
    }
    paths.sort_by(|a, b| a.0.split(|b| *b == b'/').cmp(b.0.split(|b| *b == b'/')));
    for (path, host) in paths {
        let metadata = fs::symlink_metadata(&host).unwrap();
        let kind = metadata.file_type();
        let data = if kind.is_file() {
            fs::read(&host).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&host).unwrap().into_os_string().into_vec()
        } else {
            Vec::new()
        };
        let is_device = kind.is_block_device() || kind.is_char_device();
        let first = first_of.entry(metadata.ino()).or_insert_with(|| path.clone()).clone();
        tree.insert(
            path,
            What {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
                links: metadata.nlink() as u32,
                rdev: if is_device { metadata.rdev() } else { 0 },
                xattrs: xattrs::Reader::default().of_path(&host).unwrap_or_default(),
                data,
                first,
            },
        );
    }
    tree
}

fn assert_same(found: &BTreeMap<Vec<u8>, What>, expected: &BTreeMap<Vec<u8>, What>) {
    for (path, what) in expected {
        let shown = OsStr::from_bytes(path);
        assert_eq!(found.get(path), Some(what), "{shown:?}");
    }
    let extra: Vec<_> =
        found.keys().filter(|path| !expected.contains_key(*path)).map(|p| OsStr::from_bytes(p)).collect();
    assert!(extra.is_empty(), "{extra:?}");
}

/// Bytes that don't compress, the same for the same seed.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    })
    .take(bytes)
    .collect()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a program; panics with its output if it fails.
fn run(program: &str, arguments: &[&OsStr], folder: &Path) -> Vec<u8> {
    let output = Command::new(program).args(arguments).current_dir(folder).output_locked();
    let output = output.unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn sh(script: &str, folder: &Path) -> Vec<u8> {
    run("sh", &["-ec".as_ref(), script.as_ref()], folder)
}

/// A tree with something of every kind that this user may make.
fn zoo(root: &Path) {
    fs::create_dir_all(root.join("d/deep/er")).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("small"), b"hello\n").unwrap();
    fs::write(root.join("d/middle"), noise(1, 20_000)).unwrap();
    fs::write(root.join("d/large"), noise(2, 3_000_000)).unwrap();
    fs::write(root.join("d/zeros"), vec![0; 100_000]).unwrap();
    fs::hard_link(root.join("d/middle"), root.join("a-link")).unwrap();
    fs::hard_link(root.join("d/middle"), root.join("d/deep/er/link")).unwrap();
    std::os::unix::fs::symlink("../small", root.join("d/symlink")).unwrap();
    std::os::unix::fs::symlink("x".repeat(4000), root.join("long")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"odd \xff\n\t\\name")), b"1").unwrap();
    fs::write(root.join("n".repeat(255)), b"2").unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    use std::os::unix::fs::FileExt;
    sparse.write_all_at(&noise(3, 5000), 1_000_000).unwrap();
    sparse.write_all_at(b"end", 9_000_000).unwrap();
    sparse.set_len(10_000_000).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
    fs::set_permissions(root.join("small"), fs::Permissions::from_mode(0o6711)).unwrap();
    fs::set_permissions(root.join("d/deep"), fs::Permissions::from_mode(0o3750)).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("small"), c"user.colour", b"blue\0\xff", flags).unwrap();
    rustix::fs::setxattr(root.join("d"), c"user.big", &noise(4, 2000), flags).unwrap();
    if is_root() {
        let device = rustix::fs::makedev(10, 229);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("char"),
            rustix::fs::FileType::CharacterDevice,
            0o620.into(),
            device,
        )
        .unwrap();
        let device = rustix::fs::makedev(253, 70_000);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("block"),
            rustix::fs::FileType::BlockDevice,
            0o660.into(),
            device,
        )
        .unwrap();
        std::os::unix::fs::lchown(root.join("d/symlink"), Some(1000), Some(70_000)).unwrap();
        std::os::unix::fs::chown(root.join("empty"), Some(4_000_000_000), Some(33)).unwrap();
        let capability = [0, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0u8];
        let mut capability = capability;
        capability[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
        rustix::fs::setxattr(root.join("empty"), c"security.capability", &capability, flags).unwrap();
        rustix::fs::lsetxattr(root.join("d/symlink"), c"trusted.of-a-link", b"1", flags).unwrap();
        let acl = acl::from_text(b"user::rwx,user:1000:r-x,group::r-x,mask::r-x,other::---").unwrap().unwrap();
        rustix::fs::setxattr(root.join("d/deep"), c"system.posix_acl_access", &acl, flags).unwrap();
        rustix::fs::setxattr(root.join("d/deep"), c"system.posix_acl_default", &acl, flags).unwrap();
    } else {
        eprintln!("not root: devices, foreign owners, capabilities and ACLs are left out of this test");
    }
    for (path, seconds, nanos) in
        [("small", 1_000_000_000, 123_456_789), ("d", -5, 1), ("d/symlink", 4_000_000_000, 999_999_999)]
    {
        let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanos };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(rustix::fs::CWD, root.join(path), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

#[test]
fn nothing_is_imported_onto_a_stack_that_bears_no_more() {
    let bench = Bench::new();
    let session = bench.store.session("deep");
    let mut below: Option<(LayerId, Manifest)> = None;
    for _ in 0..MAX_LAYERS {
        let parent = below.as_ref().map(|(id, manifest)| (*id, manifest));
        below = Some(LayerWriter::new(&session).finish(LayerKind::Base, parent, Ino(2)).unwrap());
    }
    let (id, manifest) = below.unwrap();
    let error = LayerWriter::new(&session).finish(LayerKind::Base, Some((id, &manifest)), Ino(2)).unwrap_err();
    assert!(error.class() == ErrorClass::Invalid && error.to_string().contains("squash"), "{error}");
    session.commit().unwrap();
    bench.store.set_name(&name("deep"), id, Expect::Absent).unwrap();
    let options = ImportOptions { parent: Some(id), ..ImportOptions::new(name("more")) };
    // Before anything is read: there is no such source.
    let error = bench.try_import(&bench.path("none"), &options).unwrap_err();
    assert!(error.class() == ErrorClass::Invalid && error.to_string().contains("squash"), "{error}");
    let options = ImportOptions { parent: manifest.parent, ..options };
    let report = bench.try_import(&bench.src(), &options).unwrap();
    assert_eq!(report.layers.len(), 1);
}
