//! What the rows of `layerfs-bench mount` do, each once in a mount's folder.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;
use layerfs_tests::case::output_of;
use layerfs_tests::tree::Random;

use super::held::Held;
use super::{Bench, COLD_BYTES, SEALED_BYTES};

/// Where the reads and writes of the rate rows go to, in bytes.
const FILE_BYTES: u64 = 512 << 20;
const BLOCK: usize = 4096;
/// How many clients the row of several has.
const CLIENTS: usize = 4;

pub fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn shell(dir: &Path, line: &str) -> anyhow::Result<()> {
    output_of(Command::new("sh").args(["-c", line]).current_dir(dir)).map(drop)
}

pub fn find(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| shell(dir, "find . -printf '%s %m %u %T@\\n' >/dev/null"))
}

pub fn twice_find(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    find(bench, dir)?;
    find(bench, dir)
}

pub fn tar(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| shell(dir, "tar -cf - . | cat >/dev/null"))
}

pub fn twice_tar(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    tar(bench, dir)?;
    tar(bench, dir)
}

/// The first 2,000 files.
fn some_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    layerfs_tests::compare::walk(dir, &mut |path, metadata| {
        if metadata.is_file() && files.len() < 2000 {
            files.push(path.to_owned());
        }
        Ok(())
    })?;
    Ok(files)
}

fn read_files(dir: &Path, files: &[PathBuf]) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for file in files {
        let _ = File::open(dir.join(file))?.read(&mut buffer)?;
    }
    Ok(())
}

/// Further passes over the first 2,000 files: so many that the machine's pauses of milliseconds don't decide.
pub fn open_read_close(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let files = some_files(dir)?;
    read_files(dir, &files)?;
    timed(|| (0..20).try_for_each(|_| read_files(dir, &files)))
}

/// As [`open_read_close`], each of several clients its part of the files.
pub fn clients(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let files = some_files(dir)?;
    read_files(dir, &files)?;
    timed(|| {
        std::thread::scope(|scope| {
            let part = |files| move || (0..5).try_for_each(|_| read_files(dir, files));
            let clients: Vec<_> =
                files.chunks(files.len().div_ceil(CLIENTS).max(1)).map(|files| scope.spawn(part(files))).collect();
            clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| anyhow::bail!("a client died")))
        })
    })
}

/// Builds the crates of a Rust project that was below; what is built goes into the mount.
pub fn compile(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--quiet", "--offline"]).current_dir(dir).env("CARGO_TARGET_DIR", dir.join("target"));
    for set in ["RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET_DIR", "CARGO_INCREMENTAL"] {
        cargo.env_remove(set);
    }
    timed(|| output_of(&mut cargo).map(drop))
}

/// Reads a sealed file from a disk that gives 500 MB/s, no cache having anything of it.
pub fn read_cold(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let path = dir.join("file");
    ensure!(fs::metadata(&path)?.len() == COLD_BYTES, "another file is there");
    let daemon = bench.host.daemon.as_ref().map(|daemon| daemon.pid());
    let held = Held::new(&bench.host.path(""), daemon)?;
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut buffer = vec![0; 1 << 20];
    let file = File::open(path)?;
    let seconds = timed(|| {
        let mut at = 0;
        while at < COLD_BYTES {
            at += file.read_at(&mut buffer, at)?.max(1) as u64;
        }
        Ok(())
    })?;
    drop(held);
    Ok(COLD_BYTES as f64 / seconds)
}

pub fn untar(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let new = dir.join("new");
    fs::create_dir(&new)?;
    timed(|| shell(&new, &format!("tar -xf {}", bench.archive.display())))
}

pub fn remove(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    untar(bench, dir)?;
    timed(|| shell(dir, "rm -rf new"))
}

/// The first write into a file that is below, from opening it on: the overlay copies it then.
pub fn first_write(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    timed(|| {
        let file = OpenOptions::new().write(true).open(dir.join("file"))?;
        Ok(file.write_all_at(&[7; BLOCK], 123_456 * BLOCK as u64)?)
    })
}

/// Random writes into a file that was below, for as long as is asked for, after a first one.
pub fn sustained(bench: &Bench, dir: &Path) -> anyhow::Result<f64> {
    first_write(bench, dir)?;
    let file = OpenOptions::new().write(true).open(dir.join("file"))?;
    let blocks = bench.large_bytes / BLOCK as u64;
    random(bench.seconds, blocks, |offset, block| Ok(file.write_all_at(block, offset)?))
}

/// How often in a second `one` is done at random places of `blocks` blocks.
fn random(seconds: u64, blocks: u64, mut one: impl FnMut(u64, &mut [u8]) -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut random = Random::new(17);
    let mut block = random.bytes(BLOCK);
    let (started, mut count) = (Instant::now(), 0u64);
    while started.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..64 {
            one(random.below(blocks) * BLOCK as u64, &mut block)?;
        }
        count += 64;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

fn read_once(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let (file, mut buffer, mut at) = (File::open(path)?, vec![0; 1 << 20], 0);
    while at < bytes {
        at += file.read_at(&mut buffer, at)?.max(1) as u64;
    }
    Ok(())
}

fn read_all(path: &Path, bytes: u64) -> anyhow::Result<f64> {
    read_once(path, bytes)?;
    Ok(bytes as f64 / timed(|| read_once(path, bytes))?)
}

/// The second reading alone, in which the kernel moves all pages to its list of those that are used often.
pub fn read_sealed(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (path, bytes) = (dir.join("file"), SEALED_BYTES);
    read_all(&path, bytes)
}

/// The median of the five readings after the first.
pub fn read_warm(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (path, bytes) = (dir.join("file"), SEALED_BYTES);
    read_once(&path, bytes)?;
    let mut seconds = (0..5).map(|_| timed(|| read_once(&path, bytes))).collect::<anyhow::Result<Vec<f64>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(bytes as f64 / seconds[2])
}

/// How long a file that is read again and again is left alone, before it is measured.
const SETTLES: Duration = Duration::from_secs(8);

/// As [`read_sealed`], of a file that was read three times.
pub fn read_often(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (path, bytes) = (dir.join("file"), SEALED_BYTES);
    (0..2).try_for_each(|_| read_once(&path, bytes))?;
    std::thread::sleep(SETTLES);
    read_all(&path, bytes)
}

fn write_whole(dir: &Path) -> anyhow::Result<(File, f64)> {
    let path = dir.join("written");
    let piece = Random::new(3).bytes(1 << 20);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    let seconds = timed(|| Ok((0..FILE_BYTES >> 20).try_for_each(|at| file.write_all_at(&piece, at << 20))?))?;
    Ok((file, seconds))
}

pub fn read_own(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    write_whole(dir)?;
    read_all(&dir.join("written"), FILE_BYTES)
}

pub fn write_buffered(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    Ok(FILE_BYTES as f64 / write_whole(dir)?.1)
}

pub fn write_fsync(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (file, seconds) = write_whole(dir)?;
    Ok(FILE_BYTES as f64 / (seconds + timed(|| Ok(file.sync_all()?))?))
}

pub fn random_read(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    write_whole(dir)?;
    let file = File::open(dir.join("written"))?;
    random(3, FILE_BYTES / BLOCK as u64, |offset, block| Ok(file.read_exact_at(block, offset)?))
}

pub fn random_write(_: &Bench, dir: &Path) -> anyhow::Result<f64> {
    let (file, _) = write_whole(dir)?;
    random(3, FILE_BYTES / BLOCK as u64, |offset, block| Ok(file.write_all_at(block, offset)?))
}
