//! Stores on other filesystems than those that tests mostly run on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use layerfs_tests::case::Need::{Fuse, Root, Xfs};
use layerfs_tests::case::{self, Case};
use layerfs_tests::host::Host;

pub fn cases() -> Vec<Case> {
    vec![Case::new("filesystems::layers_are_sealed_on_xfs_while_files_are_written", &[Root, Fuse, Xfs], xfs)]
}

const BLOCK: usize = 4096;
const BLOCKS: usize = 100;

/// XFS takes a file's lock for reading too: a seal that held the file back and read it would wait for itself.
fn xfs() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    let store = host.ctl.store().to_owned();
    fs::create_dir_all(&store)?;
    let image = host.new_folder("disk")?.join("image");
    File::create(&image)?.set_len(1 << 30)?;
    case::output_of(Command::new("mkfs.xfs").arg("-q").arg(&image))?;
    case::output_of(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(&image).arg(&store))?;
    host.start(&[])?;
    let tree = host.new_folder("tree")?;
    fs::write(tree.join("below"), vec![1; BLOCK * BLOCKS])?;
    host.import(&tree, "base", &[])?;
    let mnt = host.mount("base", "mnt", &[])?;
    let (is_under_way, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> anyhow::Result<u8> {
            fs::write(mnt.join("own"), vec![1; BLOCK * BLOCKS])?;
            let files = ["own", "below"].map(|name| File::options().write(true).open(mnt.join(name)));
            let [own, below] = files.map(|file| file.map_err(anyhow::Error::from));
            let (own, below) = (own?, below?);
            let mut round = 1;
            while !is_over.load(Ordering::Relaxed) {
                round = round % 250 + 1;
                for at in 0..BLOCKS {
                    own.write_all_at(&[round; BLOCK], (at * BLOCK) as u64)?;
                    below.write_all_at(&[round; BLOCK], (at * BLOCK) as u64)?;
                }
                is_under_way.store(true, Ordering::Relaxed);
            }
            Ok(round)
        });
        let seals = || -> anyhow::Result<()> {
            while !is_under_way.load(Ordering::Relaxed) && !writer.is_finished() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            for name in ["one", "two", "three"] {
                host.ctl.ok(["seal", &mnt.to_string_lossy(), name])?;
            }
            Ok(())
        };
        let sealed = seals();
        is_over.store(true, Ordering::Relaxed);
        let last = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
        sealed?;
        let last = last?;
        for name in ["own", "below"] {
            ensure!(fs::read(mnt.join(name))? == vec![last; BLOCK * BLOCKS], "{name} has lost writes");
        }
        anyhow::Ok(())
    })?;
    let sealed = host.mount("three", "sealed", &["--read-only"])?;
    // One instant lies between two writes.
    let own = fs::read(sealed.join("own"))?;
    ensure!(own.len() == BLOCK * BLOCKS, "{} bytes are sealed", own.len());
    let torn = own.chunks(BLOCK).filter(|block| block.iter().any(|byte| *byte != block[0])).count();
    ensure!(torn == 0, "{torn} blocks were sealed half-written");
    host.umount(&sealed)?;
    host.umount(&mnt)?;
    host.fsck()
}
