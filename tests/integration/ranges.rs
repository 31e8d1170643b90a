//! Large files of lower layers under random changes of every kind, beside a plain file of the host: while the daemon is
//! killed, while layers are sealed, through the page cache and past it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::host::Host;
use layerfs_tests::scene::Scene;
use layerfs_tests::tree::Random;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

/// The length of the file below.
const BYTES: u64 = 24 << 20;
/// How many operations by default; `LAYERFS_RANGE_OPERATIONS` says otherwise.
const OPERATIONS: u64 = 1500;
/// So many operations between a kill, or a seal, and the next.
const BETWEEN: u64 = 120;
const DIRECT_ALIGN: u64 = 4096;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("ranges::like_a_plain_file_without_a_writeback_cache", &[Root, Fuse], || {
            random_changes(&["--writeback", "off"])
        }),
        Case::new("ranges::like_a_plain_file_with_a_writeback_cache", &[Root, Fuse], || random_changes(&[])),
        Case::new("ranges::a_first_write_stores_little", &[Root, Fuse], first_write),
    ]
}

/// Two files that have to be the same.
struct Pair {
    ours: File,
    direct: File,
    plain: File,
    random: Random,
}

impl Pair {
    fn open(ours: &Path, plain: &Path, seed: u64) -> anyhow::Result<Pair> {
        let open = |path: &Path, flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let direct = open(ours, libc::O_DIRECT)?;
        Ok(Pair { ours: open(ours, 0)?, direct, plain: open(plain, 0)?, random: Random::new(seed) })
    }

    fn place(&mut self) -> (u64, u64) {
        let spread = [20_000, 300_000, BYTES + 2_000_000][self.random.below(3) as usize];
        let offset = self.random.below(spread);
        let longest = [10, 5000, 300_000][self.random.below(3) as usize];
        let length = 1 + self.random.below(longest);
        match self.random.below(3) {
            0 => (offset / 4096 * 4096, length.next_multiple_of(4096)),
            _ => (offset, length),
        }
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let (offset, length) = self.place();
        match self.random.below(12) {
            0..=3 => {
                let bytes = self.random.bytes(length as usize);
                self.ours.write_all_at(&bytes, offset)?;
                self.plain.write_all_at(&bytes, offset)?;
            }
            4 => self.write_direct(offset, length)?,
            5 | 6 => self.compare(offset, length)?,
            7 => {
                let size = [offset, BYTES + offset, BYTES][self.random.below(3) as usize];
                self.ours.set_len(size)?;
                self.plain.set_len(size)?;
            }
            8 => {
                let modes = [
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                ];
                let mode = modes[self.random.below(modes.len() as u64) as usize];
                fallocate(&self.ours, mode, offset, length)
                    .with_context(|| format!("allocating {length} at {offset}, {mode:?}"))?;
                fallocate(&self.plain, mode, offset, length)?;
            }
            9 => self.copy(offset, length)?,
            10 => self.ours.sync_all()?,
            _ => self.holes_are_zero()?,
        }
        let (ours, plain) = (self.ours.metadata()?.len(), self.plain.metadata()?.len());
        ensure!(ours == plain, "{ours} bytes, not {plain}");
        Ok(())
    }

    fn write_direct(&mut self, offset: u64, length: u64) -> anyhow::Result<()> {
        let (offset, length) = (offset / DIRECT_ALIGN * DIRECT_ALIGN, length.next_multiple_of(DIRECT_ALIGN));
        let bytes = self.random.bytes((length + DIRECT_ALIGN) as usize);
        // The kernel wants aligned memory.
        let from = bytes.as_ptr().align_offset(DIRECT_ALIGN as usize);
        let bytes = &bytes[from..from + length as usize];
        self.direct.write_all_at(bytes, offset)?;
        Ok(self.plain.write_all_at(bytes, offset)?)
    }

    fn copy(&mut self, offset: u64, length: u64) -> anyhow::Result<()> {
        let to = offset + length + self.random.below(1_000_000);
        let size = self.plain.metadata()?.len();
        let length = length.min(size.saturating_sub(offset));
        for file in [&self.ours, &self.plain] {
            let (mut from, mut to, mut left) = (offset, to, length as usize);
            while left > 0 {
                let count = copy_file_range(file, Some(&mut from), file, Some(&mut to), left).context("copying")?;
                ensure!(count > 0, "nothing was copied at {from}");
                left -= count;
            }
        }
        Ok(())
    }

    fn compare(&self, offset: u64, length: u64) -> anyhow::Result<()> {
        let (mut ours, mut plain) = (vec![0; length as usize], vec![0; length as usize]);
        let (one, other) = (read(&self.ours, &mut ours, offset)?, read(&self.plain, &mut plain, offset)?);
        ensure!(one == other, "{one} bytes at {offset}, not {other}");
        if let Some(at) = (0..one).find(|at| ours[*at] != plain[*at]) {
            anyhow::bail!("byte {} is {}, not {}", offset + at as u64, ours[at], plain[at]);
        }
        Ok(())
    }

    /// What the file says are holes has zeros in the plain one.
    fn holes_are_zero(&self) -> anyhow::Result<()> {
        use rustix::fs::{SeekFrom, seek};
        let size = self.plain.metadata()?.len();
        let mut at = 0;
        while at < size {
            let hole = seek(&self.ours, SeekFrom::Hole(at)).context("seeking")?;
            let data = match seek(&self.ours, SeekFrom::Data(hole)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => size,
                Err(errno) => return Err(errno.into()),
            };
            ensure!(data > at, "no way on from {at}");
            let mut bytes = vec![0; (data - hole) as usize];
            let count = read(&self.plain, &mut bytes, hole)?;
            ensure!(bytes[..count].iter().all(|byte| *byte == 0), "there is data in the hole from {hole} to {data}");
            at = data;
        }
        Ok(())
    }
}

fn read(file: &File, buffer: &mut [u8], offset: u64) -> anyhow::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// A mounted layer with one large file.
fn large(args: &[&str]) -> anyhow::Result<Scene> {
    let mut bytes = Random::new(5).bytes(BYTES as usize);
    bytes[3_000_000..9_000_000].fill(0);
    Scene::new(Host::cold()?, [("large", bytes)], args)
}

fn random_changes(args: &[&str]) -> anyhow::Result<()> {
    let scene = large(args)?;
    let (host, ours, plain) = (&scene.host, scene.ours("large"), scene.plain("large"));
    let read = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let operations = read("LAYERFS_RANGE_OPERATIONS").unwrap_or(OPERATIONS);
    let seed = read("LAYERFS_RANGE_SEED").unwrap_or(7);
    let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let worker = scope.spawn(|| -> anyhow::Result<()> {
            let run = || {
                let mut pair = Pair::open(&ours, &plain, seed)?;
                for number in 0..operations {
                    pair.step().with_context(|| format!("operation {number} of seed {seed}"))?;
                    done.store(number + 1, Ordering::Relaxed);
                }
                pair.compare(0, BYTES * 3)
            };
            let result = run();
            failed.store(result.is_err(), Ordering::Relaxed);
            result
        });
        let mut next = BETWEEN;
        let mut seals = 0;
        while next < operations && !failed.load(Ordering::Relaxed) {
            if done.load(Ordering::Relaxed) < next {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            }
            if next.is_multiple_of(3 * BETWEEN) {
                seals += 1;
                scene.seal(&format!("sealed-{seals}"))?;
            } else {
                host.kill_serving()?;
            }
            next += BETWEEN;
        }
        worker.join().map_err(|_| anyhow::anyhow!("the worker panicked"))?
    })?;
    scene.is_sealed_as_it_is("last")?;
    host.umount(&scene.mnt)?;
    // Cut by ranges or whole, the same bytes give the same chunks.
    let again = host.new_folder("again")?;
    fs::copy(&plain, again.join("large"))?;
    let report = host.import(&again, "again", &[])?;
    let new = report["bytes_stored"].as_u64().with_context(|| format!("no figure in {report}"))?;
    ensure!(new < 100_000, "{new} bytes of new chunks for the same file");
    host.fsck()
}

fn first_write() -> anyhow::Result<()> {
    let scene = large(&[])?;
    for file in scene.both("large")? {
        file.write_all_at(&[7; 4096], 10 << 20)?;
        file.sync_all()?;
    }
    let own = fs::read_dir(scene.host.ctl.store().join("uppers/1"))?
        .map(|file| Ok(std::os::unix::fs::MetadataExt::blocks(&file?.metadata()?) * 512))
        .sum::<std::io::Result<u64>>()?;
    ensure!(own < 100_000, "{own} bytes for a write of 4096");
    // The same after the daemon was killed, and in the seal, which stores little.
    scene.host.kill_serving()?;
    scene.is_same("after a kill")?;
    let report = scene.host.seal(&scene.mnt, "changed")?;
    let new = report["bytes_stored"].as_u64().with_context(|| format!("no figure in {report}"))?;
    ensure!(new < 1_000_000, "{new} bytes are new after a write of 4096");
    scene.is_same("after a seal")
}
