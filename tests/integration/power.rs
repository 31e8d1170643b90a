//! A machine that loses power shortly after: what was synced is there, and what took its place without a sync is there whole.
//!
//! And what was removed gives its room back, though that waits until it is durable.
//!
//! The store lies on an ext4 in a file, and a power cut is a copy of that file: it has what had reached the disk.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use layerfs_tests::case::Need::{Fuse, Root, Tool};
use layerfs_tests::case::{self, Case};
use layerfs_tests::host::{Host, unmount_under};
use layerfs_tests::scene::{Scene, until};
use rustix::mount::{UnmountFlags, unmount};

pub fn cases() -> Vec<Case> {
    let needs = &[Root, Fuse, Tool("mkfs.ext4")];
    vec![
        Case::new("power::what_was_synced_is_there_after_a_cut", needs, replaced),
        Case::new("power::what_was_removed_is_there_or_not_after_a_cut", needs, removed),
        Case::new("power::what_was_sealed_while_open_is_there_after_a_cut", needs, sealed),
        Case::new("power::what_replaced_a_file_without_a_sync_is_whole_after_a_cut", needs, unsynced),
        Case::new("power::what_replaced_a_new_file_and_nobody_synced_is_there_after_a_cut", needs, nobody_syncs),
        Case::new("power::what_a_killed_daemon_was_to_remove_goes", needs, killed),
    ]
}

const IMAGE_BYTES: u64 = 512 << 20;
/// The host's filesystem writes what was done to names each second.
const WRITES_NAMES: Duration = Duration::from_millis(2500);
const LARGE_BYTES: usize = 2 << 20;

struct Disk {
    scene: Scene,
    image: PathBuf,
}

impl Disk {
    fn new() -> anyhow::Result<Disk> {
        let mut host = Host::cold()?;
        let image = host.new_folder("disk")?.join("image");
        File::create(&image)?.set_len(IMAGE_BYTES)?;
        case::output_of(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        fs::create_dir_all(host.ctl.store())?;
        put_in(&image, &host)?;
        host.start(&[])?;
        let scene =
            Scene::new(host, [("large", vec![b'l'; LARGE_BYTES]), ("small", vec![b's'; 8000])], &["--upper", "u"])?;
        Ok(Disk { scene, image })
    }

    /// The machine loses power, and is started again.
    fn cut(mut self) -> anyhow::Result<Scene> {
        let cut = self.image.with_file_name("cut");
        case::output_of(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(&cut))?;
        let host = &mut self.scene.host;
        host.kill()?;
        unmount_under(&self.scene.mnt);
        unmount(host.ctl.store(), UnmountFlags::DETACH)?;
        put_in(&cut, host)?;
        host.start(&[])?;
        until("the mount is there again", || Ok(self.scene.mnt.join("large").exists()))?;
        Ok(self.scene)
    }
}

fn put_in(image: &Path, host: &Host) -> anyhow::Result<()> {
    let mount = ["-t", "ext4", "-o", "loop,commit=1"];
    case::output_of(Command::new("mount").args(mount).arg(image).arg(host.ctl.store())).map(drop)
}

fn put(path: &Path, bytes: &[u8], sync: bool) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    Ok(())
}

fn sync_folder(path: &Path) -> anyhow::Result<()> {
    Ok(File::open(path)?.sync_all()?)
}

/// Fails unless the file is one of `allowed`.
fn is_one_of(path: &Path, allowed: &[&[u8]]) -> anyhow::Result<()> {
    let bytes = fs::read(path)?;
    let begin = bytes.first().map(|byte| char::from(*byte));
    ensure!(allowed.contains(&&bytes[..]), "{} has {} bytes, from {begin:?} on", path.display(), bytes.len());
    Ok(())
}

/// `large` with its first half overwritten.
fn half_new() -> Vec<u8> {
    [vec![b'n'; LARGE_BYTES / 2], vec![b'l'; LARGE_BYTES / 2]].concat()
}

fn overwrite_half(scene: &Scene) -> anyhow::Result<()> {
    let large = File::options().write(true).open(scene.ours("large"))?;
    large.write_all_at(&vec![b'n'; LARGE_BYTES / 2], 0)?;
    Ok(large.sync_all()?)
}

fn replaced() -> anyhow::Result<()> {
    let disk = Disk::new()?;
    let ours = |name: &str| disk.scene.ours(name);
    put(&ours("conf"), b"old", true)?;
    put(&ours("conf.new"), b"new", true)?;
    overwrite_half(&disk.scene)?;
    put(&ours("large.new"), &[b'N'; LARGE_BYTES], true)?;
    sync_folder(&disk.scene.mnt)?;
    fs::rename(ours("conf.new"), ours("conf"))?;
    fs::rename(ours("large.new"), ours("large"))?;
    std::thread::sleep(WRITES_NAMES);
    let scene = disk.cut()?;
    is_one_of(&scene.ours("conf"), &[b"old", b"new"])?;
    is_one_of(&scene.ours("large"), &[&half_new(), &[b'N'; LARGE_BYTES]])
}

/// Removed one by one, without a pause in which all of it could become durable.
fn removed() -> anyhow::Result<()> {
    let disk = Disk::new()?;
    let names: Vec<String> = (0..60).map(|n| format!("file-{n}")).collect();
    for name in &names {
        put(&disk.scene.ours(name), name.as_bytes(), true)?;
    }
    overwrite_half(&disk.scene)?;
    put(&disk.scene.ours("small"), b"short", true)?;
    sync_folder(&disk.scene.mnt)?;
    for name in &names {
        fs::remove_file(disk.scene.ours(name))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::remove_file(disk.scene.ours("small"))?;
    let scene = disk.cut()?;
    for name in names.iter().filter(|name| scene.ours(name).exists()) {
        is_one_of(&scene.ours(name), &[name.as_bytes()])?;
    }
    if scene.ours("small").exists() {
        is_one_of(&scene.ours("small"), &[b"short"])?;
    }
    is_one_of(&scene.ours("large"), &[&half_new()])
}

fn sealed() -> anyhow::Result<()> {
    let disk = Disk::new()?;
    let mut precious = File::options().read(true).write(true).create_new(true).open(disk.scene.ours("precious"))?;
    precious.write_all(&[b'p'; 9000])?;
    precious.sync_all()?;
    disk.scene.seal("sealed")?;
    drop(precious);
    std::thread::sleep(WRITES_NAMES);
    let scene = disk.cut()?;
    is_one_of(&scene.ours("precious"), &[&[b'p'; 9000]])
}

fn unsynced() -> anyhow::Result<()> {
    let disk = Disk::new()?;
    let ours = |name: &str| disk.scene.ours(name);
    for name in ["conf", "again", "emptied"] {
        put(&ours(name), b"old", true)?;
    }
    // So many that they are made durable together.
    let many: Vec<String> = (0..100).map(|n| format!("many-{n}")).collect();
    many.iter().try_for_each(|name| put(&ours(name), b"old", false))?;
    sync_folder(&disk.scene.mnt)?;
    for name in &many {
        put(&ours("temporary"), name.as_bytes(), false)?;
        fs::rename(ours("temporary"), ours(name))?;
    }
    for (new, name) in [("new", "conf"), ("new", "again"), ("newer", "again")] {
        put(&ours("temporary"), new.as_bytes(), false)?;
        fs::rename(ours("temporary"), ours(name))?;
    }
    put(&ours("temporary"), b"small and new", false)?;
    fs::rename(ours("temporary"), ours("small"))?;
    put(&ours("emptied"), b"filled", false)?;
    // Somebody else's sync takes the names along.
    put(&ours("other"), b"x", true)?;
    std::thread::sleep(WRITES_NAMES);
    let scene = disk.cut()?;
    for name in &many {
        is_one_of(&scene.ours(name), &[b"old", name.as_bytes()])?;
    }
    is_one_of(&scene.ours("conf"), &[b"old", b"new"])?;
    is_one_of(&scene.ours("again"), &[b"old", b"new", b"newer"])?;
    is_one_of(&scene.ours("small"), &[&[b's'; 8000], b"small and new"])?;
    is_one_of(&scene.ours("emptied"), &[b"old", b"filled"])?;
    is_one_of(&scene.ours("other"), &[b"x"])
}

/// What is replaced is new to us, and on the disk all the same.
fn nobody_syncs() -> anyhow::Result<()> {
    let disk = Disk::new()?;
    let ours = |name: &str| disk.scene.ours(name);
    let names: Vec<String> = (0..20).map(|n| format!("name-{n}")).collect();
    names.iter().try_for_each(|name| put(&ours(name), b"old", false))?;
    sync_folder(&disk.scene.mnt)?;
    rustix::fs::sync();
    for name in &names {
        put(&ours("temporary"), name.as_bytes(), false)?;
        fs::rename(ours("temporary"), ours(name))?;
    }
    std::thread::sleep(WRITES_NAMES);
    let scene = disk.cut()?;
    names.iter().try_for_each(|name| is_one_of(&scene.ours(name), &[b"old", name.as_bytes()]))
}

fn data_files(scene: &Scene) -> anyhow::Result<usize> {
    let is_hex = |name: &str| u64::from_str_radix(name, 16).is_ok();
    let mut count = 0;
    for upper in fs::read_dir(scene.host.ctl.store().join("uppers"))? {
        for file in fs::read_dir(upper?.path())? {
            count += usize::from(file?.file_name().to_str().is_some_and(is_hex));
        }
    }
    Ok(count)
}

fn killed() -> anyhow::Result<()> {
    let mut disk = Disk::new()?;
    let fill_and_remove = |scene: &Scene| {
        put(&scene.ours("gone"), b"gone", true)?;
        fs::remove_file(scene.ours("gone"))?;
        anyhow::Ok(())
    };
    fill_and_remove(&disk.scene)?;
    disk.scene.host.kill()?;
    ensure!(data_files(&disk.scene)? == 1, "the file went before its row had gone for good, or the test is slow");
    disk.scene.host.start(&[])?;
    until("the mount is there again", || Ok(disk.scene.mnt.join("large").exists()))?;
    ensure!(data_files(&disk.scene)? == 0, "a data file without a row was left");
    fill_and_remove(&disk.scene)?;
    until("the file goes without anybody's sync", || Ok(data_files(&disk.scene)? == 0))
}
