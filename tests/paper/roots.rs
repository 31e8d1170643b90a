//! The applications' root filesystems, and disks with the same for machines: made once per machine, in a folder outside the repository.
//!
//! ```text
//! LAYERFS_GUEST_TOOLS/paper/  base/ game/ video/ face/   by scripts/setup-paper
//!                             ram-HASH/                   base, and the RAM simulation
//!                             APP-HASH.raw                the base's disk, with APP's files brought into it; HASH is of our programs
//! ```
//!
//! Invariants: what has its final name is complete; every tree holds the guest's first program, the same in all, so that it is the
//! base's; a disk of an application is the base's disk wherever a file isn't another.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use layerfs_tests::case::{output_of, tests};
use layerfs_tests::fixtures;

use crate::cell::App;
use crate::clients::COUNTER_PORT;

/// The guest's first program, in every tree.
pub const SERVICE: &str = "/usr/local/sbin/paper-service";
const RAMSIM: &str = "/usr/local/bin/paper-ramsim";
const FACES: &str = "/usr/local/bin/paper-faces.py";
/// How many pages the RAM simulation rewrites in a second.
const PAGES: &str = "500";
/// A disk's size.
const DISK_BYTES: u64 = 2 << 30;
/// Modules of the machine's kernel, in the order in which they are loaded; those that it has built in are left out.
const MODULES: [&str; 9] = [
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
];

fn folder() -> PathBuf {
    fixtures::guest_tools().join("paper")
}

/// The command of `app`, as the guest's first program is given it.
pub fn command(app: App) -> Vec<String> {
    match app {
        App::None => Vec::new(),
        App::Game => vec!["/usr/games/teeworlds-server".to_owned()],
        App::Ram(megabytes) => {
            vec![RAMSIM.to_owned(), megabytes.to_string(), PAGES.to_owned(), COUNTER_PORT.to_owned()]
        }
        App::Video => [
            "/usr/bin/cvlc",
            "-I",
            "dummy",
            "--loop",
            "--no-sout-audio",
            "/film.avi",
            "--sout",
            "#standard{access=http,mux=mpjpeg,dst=:8080/}",
        ]
        .map(str::to_owned)
        .to_vec(),
        App::Face => ["/usr/bin/python3", FACES, "/film.avi", COUNTER_PORT].map(str::to_owned).to_vec(),
    }
}

/// Runs scripts/setup-paper for `app`; what can't be made is its reason.
fn set_up(app: App) -> anyhow::Result<()> {
    let name = match app {
        App::None | App::Ram(_) => "base".to_owned(),
        other => other.name(),
    };
    if folder().join("base").is_dir() && folder().join(&name).is_dir() {
        return Ok(());
    }
    let script = tests().join("../scripts/setup-paper");
    output_of(Command::new(script).args((name != "base").then_some(name))).map(drop)
}

/// The tree of `app`, with all that runs in it. Nobody may change it.
pub fn tree(app: App) -> anyhow::Result<PathBuf> {
    set_up(app)?;
    let base = folder().join("base");
    let work = tempfile::tempdir()?;
    let service = work.path().join("service");
    fixtures::build("service", &service)?;
    put(&service, &base, SERVICE)?;
    match app {
        App::None => Ok(base),
        App::Ram(_) => {
            let program = work.path().join("ramsim");
            fixtures::build("ramsim", &program)?;
            let tree = folder().join(format!("ram-{}", hash(&[&service, &program])?));
            made(&tree, |growing| {
                copy(&base, growing)?;
                put(&program, growing, RAMSIM)
            })
        }
        App::Game | App::Video | App::Face => {
            let tree = folder().join(app.name());
            put(&service, &tree, SERVICE)?;
            if app == App::Face {
                put(&tests().join("fixtures/faces.py"), &tree, FACES)?;
            }
            Ok(tree)
        }
    }
}

/// Puts a program into a tree, if it isn't there; the same in every tree, its time too.
fn put(program: &Path, tree: &Path, at: &str) -> anyhow::Result<()> {
    let to = tree.join(at.trim_start_matches('/'));
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    if fs::read(&to).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let growing = to.with_extension("new");
    fs::write(&growing, bytes).with_context(|| format!("cannot write {}", growing.display()))?;
    fs::set_permissions(&growing, fs::Permissions::from_mode(0o755))?;
    let file = fs::File::options().write(true).open(&growing)?;
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_500_000_000))?;
    fs::rename(&growing, &to)?;
    // So that the folder is the same in every tree, too.
    let parent = to.parent().context("a program at the root")?;
    fs::File::open(parent)?.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_500_000_000))?;
    Ok(())
}

fn hash(files: &[&Path]) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(&fs::read(file)?);
    }
    Ok(hasher.finalize().to_hex()[..8].to_owned())
}

/// What is at `path`, made by `make` if it isn't there.
fn made(path: &Path, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    if !path.exists() {
        let growing = path.with_extension("part");
        remove(&growing)?;
        make(&growing)?;
        fs::rename(&growing, path).with_context(|| format!("cannot name {}", path.display()))?;
    }
    Ok(path.to_owned())
}

fn remove(path: &Path) -> anyhow::Result<()> {
    output_of(Command::new("rm").arg("-rf").arg(path)).map(drop)
}

/// A copy of a tree, as LXC's own clone makes one.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    output_of(Command::new("cp").arg("-a").arg(from).arg(to)).map(drop)
}

/// The disk of a machine with `app`.
pub fn disk(app: App) -> anyhow::Result<PathBuf> {
    let base = tree(App::None)?;
    let tag = hash(&[&base.join(SERVICE.trim_start_matches('/'))])?;
    let base_disk = made(&folder().join(format!("base-{tag}.raw")), |growing| {
        fs::File::create(growing)?.set_len(DISK_BYTES)?;
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-t", "ext4", "-L", "paper", "-d"]).arg(&base).arg(growing);
        output_of(&mut command).map(drop)
    })?;
    if app == App::None {
        return Ok(base_disk);
    }
    let tree = tree(app)?;
    let tag = match app {
        App::Face => hash(&[&base.join(SERVICE.trim_start_matches('/')), &tree.join(FACES.trim_start_matches('/'))])?,
        _ => tag,
    };
    let name = tree.file_name().context("a tree without a name")?.to_string_lossy().into_owned();
    made(&folder().join(format!("{name}-{tag}.raw")), |growing| {
        output_of(Command::new("cp").arg("--sparse=always").arg(&base_disk).arg(growing))?;
        let at = tempfile::tempdir()?;
        output_of(Command::new("mount").args(["-o", "loop"]).arg(growing).arg(at.path()))?;
        let mut from = tree.into_os_string();
        from.push("/");
        let copied = output_of(
            Command::new("rsync").args(["-aHAX", "--delete", "--exclude=/lost+found"]).arg(from).arg(at.path()),
        );
        let unmounted = output_of(Command::new("umount").arg(at.path()));
        copied.and(unmounted).map(drop)
    })
}

/// Writes the machine's kernel and its first files into `folder`, as `vmlinuz` and `initrd`.
pub fn boot_files(to: &Path) -> anyhow::Result<()> {
    let kernel = fixtures::kernel();
    ensure!(kernel.is_file(), "no kernel for test machines: run scripts/setup guests");
    fs::create_dir_all(to)?;
    fs::copy(&kernel, to.join("vmlinuz"))?;
    let modules = kernel.with_file_name("modules");
    let mut files = vec![("init".to_owned(), fs::read(tree(App::None)?.join(SERVICE.trim_start_matches('/')))?)];
    for module in MODULES {
        if let Some(path) = find(&modules, &format!("{module}.ko"))? {
            files.push((format!("{:02}.ko", files.len() - 1), fs::read(path)?));
        }
    }
    fs::write(to.join("initrd"), fixtures::archive(&files))?;
    Ok(())
}

fn find(folder: &Path, name: &str) -> anyhow::Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let found = if entry.file_type()?.is_dir() {
            find(&entry.path(), name)?
        } else {
            (entry.file_name() == name).then(|| entry.path())
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
