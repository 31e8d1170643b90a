//! A mount whose disk is full: what makes room can be done, and the room is used at once.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::case::{self, Case};
use layerfs_tests::host::Host;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("space::a_full_disk_can_be_emptied", &[Root, Fuse], full_disk),
        Case::new("space::a_mount_on_a_full_disk_outlives_its_daemon", &[Root, Fuse], killed_on_a_full_disk),
    ]
}

/// Writes to a new file until there is no space.
fn fill(path: &Path) -> anyhow::Result<u64> {
    let mut file = File::create(path)?;
    let mut written = 0;
    for piece in [vec![7; 1 << 20], vec![7; 4096]] {
        loop {
            match file.write(&piece) {
                Ok(count) => written += count as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => bail!("writing to a full disk: {error}"),
            }
        }
    }
    Ok(written)
}

/// Writes over what a file has, as a database does, and changes its attributes.
fn rewrite(file: &mut File) -> anyhow::Result<()> {
    file.write_all_at(&[1; 4096], 4096).context("writing in place")?;
    file.sync_all().context("fsync")?;
    file.sync_data().context("fdatasync")?;
    file.set_permissions(fs::Permissions::from_mode(0o600)).context("chmod")?;
    file.set_modified(std::time::UNIX_EPOCH).context("utimes")
}

/// Files that are passed through take the last block of the disk, without the daemon's knowledge.
fn full_disk() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    let store = host.ctl.store().to_owned();
    fs::create_dir_all(&store)?;
    case::output_of(Command::new("mount").args(["-t", "tmpfs", "-o", "size=300M,mode=700", "store"]).arg(&store))?;
    host.start(&[])?;
    let tree = host.new_folder("tree")?;
    for n in 0..20 {
        fs::write(tree.join(format!("below-{n}")), vec![n; 5000])?;
    }
    host.import(&tree, "base", &[])?;
    let mnt = host.mount("base", "mnt", &[])?;
    for n in 0..500 {
        fs::write(mnt.join(format!("small-{n}")), b"small")?;
    }
    let path = mnt.join("kept");
    fs::write(&path, vec![0; 64 << 10])?;
    let mut kept = File::options().write(true).open(path)?;
    kept.sync_all()?;
    let mut last = 0;
    for round in 0..3 {
        let path = mnt.join(format!("large-{round}"));
        let filled = fill(&path)?;
        ensure!(filled > 100 << 20, "only {filled} bytes had room");
        ensure!(round == 0 || filled > last / 10 * 9, "{last} bytes had room before, now {filled}");
        last = filled;
        // What has its place needs no room.
        rewrite(&mut kept)?;
        for n in round * 150..(round + 1) * 150 {
            fs::remove_file(mnt.join(format!("small-{n}")))?;
        }
        fs::remove_file(mnt.join(format!("below-{round}")))?;
        fs::rename(mnt.join(format!("below-1{round}")), mnt.join(format!("renamed-{round}")))?;
        if round == 1 {
            // Cut instead of removed.
            File::options().write(true).open(&path)?.set_len(0)?;
        } else {
            fs::remove_file(&path)?;
        }
        // The room is there at once.
        fs::write(mnt.join("after"), vec![1; 1 << 20])?;
        ensure!(fs::read(mnt.join("after"))? == vec![1; 1 << 20], "what was written into the room is wrong");
    }
    ensure!(fs::read_dir(&mnt)?.count() == 17 + 50 + 1 + 1 + 1, "the wrong files are there");
    drop(kept);
    host.umount(&mnt)?;
    host.fsck()
}

/// Who opens the index after a kill writes: that has room, and then what fills the disk can be removed.
fn killed_on_a_full_disk() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    let store = host.ctl.store().to_owned();
    fs::create_dir_all(&store)?;
    case::output_of(Command::new("mount").args(["-t", "tmpfs", "-o", "size=250M,mode=700", "store"]).arg(&store))?;
    host.start_kept(&[])?;
    let tree = host.new_folder("tree")?;
    fs::write(tree.join("below"), "below")?;
    host.import(&tree, "base", &[])?;
    let mnt = host.mount("base", "mnt", &[])?;
    for n in 0..2000 {
        fs::write(mnt.join(format!("small-{n}")), b"small")?;
    }
    for round in 0..3 {
        fill(&mnt.join("large"))?;
        let refused = host.ctl.run(["daemon", "restart"])?;
        ensure!(refused.code == 0 || refused.code == 8, "{}", refused.stderr);
        host.kill_serving()?;
        ensure!(fs::read(mnt.join("below"))? == b"below", "it reads something else after kill {round}");
        fs::remove_file(mnt.join("large"))?;
        fs::write(mnt.join("after"), vec![1; 1 << 20])?;
        ensure!(fs::read_dir(&mnt)?.count() == 2000 + 2, "the wrong files are there");
    }
    host.umount(&mnt)?;
    host.fsck()
}
