//! A mount whose disk is full: what makes room can be done, and the room is used at once.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{bail, ensure};
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::case::{self, Case};
use layerfs_tests::host::Host;

pub fn cases() -> Vec<Case> {
    vec![Case::new("space::a_full_disk_can_be_emptied", &[Root, Fuse], full_disk)]
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
    let mut last = 0;
    for round in 0..3 {
        let path = mnt.join(format!("large-{round}"));
        let filled = fill(&path)?;
        ensure!(filled > 100 << 20, "only {filled} bytes had room");
        ensure!(round == 0 || filled > last / 10 * 9, "{last} bytes had room before, now {filled}");
        last = filled;
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
    ensure!(fs::read_dir(&mnt)?.count() == 17 + 50 + 1 + 1, "the wrong files are there");
    host.umount(&mnt)?;
    host.fsck()
}
