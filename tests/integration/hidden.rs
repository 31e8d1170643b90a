//! Large files of lower layers while the kernel keeps what is written to them: everybody sees the same, `fsync` means it, what can't be
//! written is told, nothing is lost with a daemon, and nothing is left behind.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Deref;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::host::Host;
use layerfs_tests::scene::{Map, Scene, Tmpfs, signal, until};
use layerfs_tests::tree::Random;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

const BYTES: u64 = 16 << 20;
const PAGE: usize = 4096;
const WITH: [&str; 2] = ["--writeback", "on"];
/// How often processes are killed by default; `LAYERFS_KILLS` says otherwise.
const KILLS: u64 = 9;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("hidden::a_write_does_not_wait_for_the_daemon", &[Root, Fuse], no_waiting),
        Case::new("hidden::everybody_sees_the_same", &[Root, Fuse], seen),
        Case::new("hidden::lengths_are_those_of_the_last_change", &[Root, Fuse], lengths),
        Case::new("hidden::mappings_outlive_descriptors_daemons_and_seals", &[Root, Fuse], mapped),
        Case::new("hidden::what_cannot_be_written_is_told", &[Root, Fuse], full),
        Case::new("hidden::kills_of_daemon_and_hand", &[Root, Fuse], kills),
        Case::new("hidden::nothing_is_left_behind", &[Root, Fuse], ended),
        Case::new("hidden::not_where_it_is_not_wanted", &[Root, Fuse], unwanted),
    ]
}

/// A mounted layer with one large file.
struct Large {
    scene: Scene,
    ours: PathBuf,
    plain: PathBuf,
}

impl Deref for Large {
    type Target = Scene;

    fn deref(&self) -> &Scene {
        &self.scene
    }
}

fn large_on(host: Host, args: &[&str]) -> anyhow::Result<Large> {
    let scene = Scene::new(host, [("large", Random::new(8).bytes(BYTES as usize))], args)?;
    let (ours, plain) = (scene.ours("large"), scene.plain("large"));
    Ok(Large { scene, ours, plain })
}

fn large() -> anyhow::Result<Large> {
    let large = large_on(Host::cold()?, &WITH)?;
    ensure!(large.has_writeback()?, "the mount has no writeback cache");
    Ok(large)
}

impl Large {
    fn has_writeback(&self) -> anyhow::Result<bool> {
        Ok(self.host.ctl.json(["mounts"])?["mounts"][0]["writeback"] == true)
    }

    fn open(&self) -> anyhow::Result<File> {
        open(&self.ours, 0)
    }

    /// The hands' processes.
    fn hands(&self) -> anyhow::Result<Vec<i32>> {
        let daemon = self.host.serving_pid()?;
        let mut hands = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let text = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = text.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<i32>().ok());
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            if parent == Some(daemon) && line.contains("daemon\0hand") {
                hands.push(pid);
            }
        }
        Ok(hands)
    }
}

fn open(path: &Path, flags: i32) -> anyhow::Result<File> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    opened.with_context(|| format!("opening {}", path.display()))
}

/// The daemon stands still meanwhile. And `fsync` brings to the disk's side what wasn't there.
fn no_waiting() -> anyhow::Result<()> {
    let large = large()?;
    let file = large.open()?;
    file.write_all_at(&[1; PAGE], 0)?;
    file.sync_all()?;
    let daemon = large.host.serving_pid()?;
    signal(daemon, rustix::process::Signal::STOP)?;
    let has_ended = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let written = (1..1000).try_for_each(|page| file.write_all_at(&[2; PAGE], page * PAGE as u64));
            has_ended.store(true, Ordering::Relaxed);
            written
        });
        let came = until("a write", || Ok(has_ended.load(Ordering::Relaxed)));
        signal(daemon, rustix::process::Signal::CONT)?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        came
    });
    written?;
    let data = File::open(large.data_file("large")?)?;
    let mut there = [0; PAGE];
    data.read_exact_at(&mut there, 500 * PAGE as u64)?;
    ensure!(there == [0; PAGE], "it was written at once");
    file.sync_data()?;
    data.read_exact_at(&mut there, 500 * PAGE as u64)?;
    ensure!(there == [2; PAGE], "fsync came back before it was written");
    Ok(())
}

fn seen() -> anyhow::Result<()> {
    let large = large()?;
    let (file, plain) = (large.open()?, open(&large.plain, 0)?);
    let both = |bytes: &[u8], at: u64| -> anyhow::Result<()> {
        file.write_all_at(bytes, at)?;
        Ok(plain.write_all_at(bytes, at)?)
    };
    // By other descriptors, past the cache, through mappings.
    both(b"by one", 5000)?;
    let (reader, direct) = (File::open(&large.ours)?, open(&large.ours, libc::O_DIRECT)?);
    let mut found = [0; 6];
    reader.read_exact_at(&mut found, 5000)?;
    ensure!(&found == b"by one", "another descriptor sees {found:?}");
    let memory = vec![7; 3 * PAGE];
    let aligned = &memory[memory.as_ptr().align_offset(PAGE)..][..PAGE];
    direct.write_all_at(aligned, 8192)?;
    plain.write_all_at(aligned, 8192)?;
    let map = Map::writable(&file, 1 << 20)?;
    map.put(9000, 9);
    plain.write_all_at(&[9], 9000)?;
    reader.read_exact_at(&mut found[..1], 9000)?;
    ensure!(found[0] == 9, "a store through a mapping isn't seen");
    both(b"under the map", 70_000)?;
    ensure!(map.get(70_000) == b'u', "a mapping doesn't see a write");
    large.is_same("at first")?;
    // By its other name.
    fs::hard_link(&large.ours, large.mnt.join("twin"))?;
    File::open(large.mnt.join("twin"))?.read_exact_at(&mut found, 70_000)?;
    ensure!(&found == b"under ", "the other name has other bytes");
    // Times: those of the write, then those that were set, also once it is written back.
    let before = fs::metadata(&large.ours)?.modified()?;
    std::thread::sleep(Duration::from_millis(30));
    both(b"later", 12)?;
    ensure!(fs::metadata(&large.ours)?.modified()? > before, "the time of a write isn't seen");
    let set = SystemTime::UNIX_EPOCH + Duration::new(1_000_000, 7);
    file.set_modified(set)?;
    ensure!(fs::metadata(&large.ours)?.modified()? == set, "the time that was set isn't seen");
    file.sync_all()?;
    ensure!(fs::metadata(&large.ours)?.modified()? == set, "the time that was set was lost by fsync");
    // Who may write to it runs with no other rights.
    fs::set_permissions(&large.ours, fs::Permissions::from_mode(0o4755))?;
    both(b"changed", 100)?;
    ensure!(fs::metadata(&large.ours)?.mode() & 0o7777 == 0o755, "a setuid file was written to and stays so");
    // Holes, and what is in them.
    for file in [&file, &plain] {
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 2 << 20, 1 << 20)?;
    }
    both(&[3; PAGE], (2 << 20) + 40_960)?;
    for (file, name) in [(&file, "ours"), (&plain, "plain")] {
        let found = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(2 << 20))?;
        ensure!(found == (2 << 20) + 40_960, "{name}: data at {found}");
    }
    // Copies within and out.
    for (file, out) in [(&file, large.mnt.join("out")), (&plain, large.host.path("out"))] {
        let out = OpenOptions::new().write(true).create_new(true).open(out)?;
        let (mut from, mut to) = (0, 9 << 20);
        while to < (9 << 20) + 50_000 {
            ensure!(copy_file_range(file, Some(&mut from), file, Some(&mut to), 25_000)? > 0, "nothing was copied");
        }
        let (mut from, mut to) = (0, 0);
        while to < 100_000 {
            ensure!(copy_file_range(file, Some(&mut from), &out, Some(&mut to), 100_000)? > 0, "nothing was copied");
        }
    }
    let copied = fs::read(large.mnt.join("out"))?;
    ensure!(copied[..100_000] == fs::read(&large.plain)?[..100_000], "a copy has other bytes");
    large.is_same("after copies")?;
    // Another file takes its name; it goes on without one.
    fs::remove_file(large.mnt.join("twin"))?;
    fs::write(large.mnt.join("new"), "new")?;
    fs::rename(large.mnt.join("new"), &large.ours)?;
    both(b"nameless", 300)?;
    ensure!(file.metadata()?.nlink() == 0 && fs::read(&large.ours)? == b"new", "the new file isn't there");
    let mut bytes = vec![0; plain.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == fs::read(&large.plain)?, "the nameless file has other bytes");
    drop((file, reader, direct, map));
    large.seal("sealed")?;
    large.host.export("sealed", &large.host.path("exported"), &[])?;
    ensure!(fs::read(large.host.path("exported/large"))? == b"new", "the seal has the old file");
    large.host.fsck()
}

fn lengths() -> anyhow::Result<()> {
    let large = large()?;
    let (file, plain) = (large.open()?, open(&large.plain, 0)?);
    let same = |what: &str| -> anyhow::Result<()> {
        let (one, other) = (file.metadata()?.len(), fs::metadata(&large.ours)?.len());
        let wanted = fs::metadata(&large.plain)?.len();
        ensure!(one == wanted && other == wanted, "{what}: {one} and {other} bytes, not {wanted}");
        large.is_same(what)
    };
    for (at, bytes) in [(BYTES - 3, 10_000), (BYTES + 3_000_000, 7)] {
        let bytes = vec![5; bytes];
        file.write_all_at(&bytes, at)?;
        plain.write_all_at(&bytes, at)?;
        same("a write behind the end")?;
    }
    for length in [BYTES / 2 + 17, BYTES, 12_345, 5 << 20] {
        // In turn by descriptor and by path.
        file.set_len(length)?;
        plain.set_len(length)?;
        same("truncated")?;
        let other = length + length / 3;
        let by_path = |path: &Path| OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(other));
        by_path(&large.ours)?;
        by_path(&large.plain)?;
        same("truncated by path")?;
        file.write_all_at(b"x", length + 5)?;
        plain.write_all_at(b"x", length + 5)?;
    }
    for mode in [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE] {
        for file in [&file, &plain] {
            fallocate(file, mode, (7 << 20) + 100, 100_000)?;
        }
        same("allocated")?;
    }
    file.sync_all()?;
    same("synced")?;
    // Several who append, each through a descriptor of its own.
    let before = plain.metadata()?.len();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let append = |letter: u8| {
            let path = &large.ours;
            move || -> anyhow::Result<()> {
                let mut file = OpenOptions::new().append(true).open(path)?;
                Ok((0..300).try_for_each(|_| file.write_all(&[letter; 100]))?)
            }
        };
        let writers: Vec<_> = (b'a'..b'e').map(|letter| scope.spawn(append(letter))).collect();
        writers.into_iter().try_for_each(|writer| writer.join().map_err(|_| anyhow::anyhow!("it panicked"))?)
    })?;
    let bytes = fs::read(&large.ours)?;
    ensure!(bytes.len() as u64 == before + 4 * 300 * 100, "{} bytes after appending", bytes.len());
    for piece in bytes[before as usize..].chunks(100) {
        ensure!(piece.iter().all(|byte| *byte == piece[0]), "one append went into another");
    }
    // Emptied by an open, and filled again.
    let mut emptied = OpenOptions::new().write(true).truncate(true).open(&large.ours)?;
    ensure!(file.metadata()?.len() == 0 && fs::metadata(&large.ours)?.len() == 0, "it isn't empty");
    emptied.write_all(b"new content")?;
    emptied.seek(SeekFrom::Start(0))?;
    ensure!(fs::read(&large.ours)? == b"new content", "it has other content");
    drop((file, emptied));
    ensure!(fs::read(&large.ours)? == b"new content", "it has other content once it is closed");
    // And opened again by whoever reads first, with no cache of what was.
    let reader = File::open(&large.ours)?;
    OpenOptions::new().write(true).open(&large.ours)?.write_all_at(b"N", 0)?;
    let mut first = [0];
    reader.read_exact_at(&mut first, 0)?;
    ensure!(&first == b"N", "a reader has old bytes");
    large.host.fsck()
}

fn mapped() -> anyhow::Result<()> {
    let large = large()?;
    let plain = open(&large.plain, 0)?;
    let map = Map::writable(&large.open()?, 4 << 20)?;
    let put = |at: usize, byte: u8| -> anyhow::Result<()> {
        map.put(at, byte);
        Ok(plain.write_all_at(&[byte], at as u64)?)
    };
    put(1_000_000, 1)?;
    large.is_same("through a mapping without a descriptor")?;
    large.seal("one")?;
    put(1_000_001, 2)?;
    large.host.kill_serving()?;
    put(2_000_000, 3)?;
    // Opened again, it is the same file.
    let file = large.open()?;
    file.write_all_at(b"written", 3_000_000)?;
    plain.write_all_at(b"written", 3_000_000)?;
    ensure!(map.get(3_000_000) == b'w', "the mapping is of another file");
    large.is_sealed_as_it_is("two")?;
    large.host.ctl.ok(["daemon", "restart"])?;
    put(2_000_001, 4)?;
    drop((file, map));
    large.is_same("at the end")?;
    large.host.umount(&large.mnt)?;
    large.host.ctl.ok(["mount", "two", &large.mnt.to_string_lossy(), "--upper", "1"]).ok();
    large.host.fsck()
}

/// The filesystem of the data files runs full behind the back of who writes.
fn full() -> anyhow::Result<()> {
    let host = Host::cold()?;
    let uppers = host.ctl.store().join("uppers");
    let large = large_on(host, &WITH)?;
    large.host.umount(&large.mnt)?;
    large.host.ctl.ok(["daemon", "stop"])?;
    fs::create_dir_all(&uppers)?;
    let _small = Tmpfs::on(&uppers, 40)?;
    large.mount(&WITH)?;
    ensure!(large.has_writeback()?, "the mount has no writeback cache");
    let file = large.open()?;
    file.write_all_at(&[1; PAGE], 0)?;
    file.sync_all()?;
    fs::write(uppers.join("ballast"), vec![0; 38 << 20])?;
    (0..1000).try_for_each(|page| file.write_all_at(&[2; PAGE], page * 2 * PAGE as u64))?;
    let synced = file.sync_all();
    let errno = synced.err().and_then(|error| error.raw_os_error());
    ensure!(errno == Some(libc::ENOSPC), "fsync of what has no room: {errno:?}");
    // What is written when there is room again is there.
    fs::remove_file(uppers.join("ballast"))?;
    (0..1000).try_for_each(|page| file.write_all_at(&[3; PAGE], page * 2 * PAGE as u64))?;
    file.sync_all()?;
    // Nor is it kept from them that only the first part of it found room.
    for (number, left) in [20, 80, 160].into_iter().enumerate() {
        let space = rustix::fs::statvfs(&uppers)?;
        let ballast = (space.f_bavail * space.f_frsize).saturating_sub(left << 10);
        fs::write(uppers.join("ballast"), vec![0; ballast as usize])?;
        file.write_all_at(&[6; 64 * PAGE], ((9 + number as u64) << 20) + PAGE as u64)?;
        let errno = file.sync_all().err().and_then(|error| error.raw_os_error());
        ensure!(errno == Some(libc::ENOSPC), "fsync with room for {left} KiB of 256: {errno:?}");
        fs::remove_file(uppers.join("ballast"))?;
    }
    // Who doesn't sync hears of it from `close`.
    fs::write(uppers.join("ballast"), vec![0; 34 << 20])?;
    (1000..2000).try_for_each(|page| file.write_all_at(&[4; PAGE], page * 2 * PAGE as u64))?;
    let number = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: the descriptor is ours, and nobody else's any more.
    #[allow(unsafe_code)]
    let closed = unsafe { libc::close(number) };
    let errno = std::io::Error::last_os_error().raw_os_error();
    ensure!(closed == -1 && errno == Some(libc::ENOSPC), "close of what has no room: {closed}, {errno:?}");
    // Where there is no room for all of a file, its writers hear at once.
    large.host.umount(&large.mnt)?;
    large.mount(&WITH)?;
    let file = large.open()?;
    let refused = (2000..4000).find_map(|page| file.write_all_at(&[5; PAGE], page * PAGE as u64).err());
    ensure!(refused.as_ref().and_then(std::io::Error::raw_os_error) == Some(libc::ENOSPC), "{refused:?}");
    drop(file);
    fs::remove_file(uppers.join("ballast"))?;
    large.host.umount(&large.mnt)?;
    large.host.ctl.ok(["daemon", "stop"])?;
    Ok(())
}

fn kills() -> anyhow::Result<()> {
    let large = large()?;
    let kills = std::env::var("LAYERFS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    const WRITERS: u64 = 3;
    let part = BYTES / WRITERS / PAGE as u64 * PAGE as u64;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let (done, stop, large) = (&done, &stop, &large);
                scope.spawn(move || -> anyhow::Result<()> {
                    let (mut file, plain) = (large.open()?, open(&large.plain, 0)?);
                    let mut random = Random::new(70 + number);
                    let mut bytes = vec![0; 20_000];
                    while !stop.load(Ordering::Relaxed) {
                        let offset = number * part + random.below(part - 20_000);
                        let length = 1 + random.below(20_000) as usize;
                        match random.below(40) {
                            0 => file.sync_data()?,
                            // The last of them may close it for all.
                            1 => {
                                drop(file);
                                file = large.open()?;
                            }
                            2..=9 => {
                                let mut there = vec![0; length];
                                file.read_exact_at(&mut there, offset)?;
                                plain.read_exact_at(&mut bytes[..length], offset)?;
                                ensure!(there == bytes[..length], "writer {number} reads other bytes at {offset}");
                            }
                            _ => {
                                let piece = random.bytes(length);
                                file.write_all_at(&piece, offset)?;
                                plain.write_all_at(&piece, offset)?;
                            }
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let killed = (0..kills).try_for_each(|kill| -> anyhow::Result<()> {
            let target = done.load(Ordering::Relaxed) + 500;
            while done.load(Ordering::Relaxed) < target {
                ensure!(!writers.iter().any(std::thread::ScopedJoinHandle::is_finished), "a writer has failed");
                std::thread::sleep(Duration::from_millis(1));
            }
            match kill % 3 {
                0 => large.host.kill_serving(),
                1 => large.hands()?.into_iter().try_for_each(|hand| signal(hand, rustix::process::Signal::KILL)),
                _ => large.seal(&format!("sealed-{kill}")),
            }
        });
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        killed
    })?;
    large.is_same("after kills")?;
    large.is_sealed_as_it_is("last")?;
    large.host.umount(&large.mnt)?;
    large.host.fsck()
}

fn fuse_descriptors(pid: i64) -> usize {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let links =
        fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    links.filter(|target| target == Path::new("/dev/fuse")).count()
}

fn ended() -> anyhow::Result<()> {
    let large = large()?;
    let keeper = large.host.ctl.json(["daemon", "status"])?["keeper"].as_i64().context("nothing keeps the mount")?;
    let daemon = i64::from(large.host.serving_pid()?);
    let file = large.open()?;
    file.write_all_at(&[1; PAGE], 0)?;
    // Its type has no subtype, unlike that of mounts that people see.
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!table.contains(" - fuse layerfs "), "a hidden mount is seen");
    let hands = large.hands()?;
    ensure!(hands.len() == 1, "{} hands", hands.len());
    until("two connections that are kept", || Ok(fuse_descriptors(keeper) == 2))?;
    // Detached it goes on as long as somebody has the file.
    large.host.ctl.ok(["umount", "--lazy", &large.mnt.to_string_lossy()])?;
    file.write_all_at(&[2; PAGE], 40_960)?;
    let mut there = [0; PAGE];
    file.read_exact_at(&mut there, 40_960)?;
    ensure!(there == [2; PAGE], "a detached mount has lost bytes");
    drop(file);
    let is_gone = || Ok(hands.iter().all(|hand| !Path::new(&format!("/proc/{hand}")).exists()));
    until("the end of the hand", is_gone)?;
    until("the end of the connections", || Ok(fuse_descriptors(keeper) + fuse_descriptors(daemon) == 0))?;
    // What was written last is in the upper.
    large.host.ctl.ok(["daemon", "stop"])?;
    let uppers = large.host.ctl.json(["uppers"])?;
    ensure!(uppers["uppers"].as_array().is_some_and(|uppers| uppers.len() == 1), "{uppers}");
    large.host.ctl.ok(["mount", "base", &large.mnt.to_string_lossy(), "--upper", "1"])?;
    let file = File::open(&large.ours)?;
    file.read_exact_at(&mut there, 40_960)?;
    ensure!(there == [2; PAGE], "what was written to a detached mount is lost");
    Ok(())
}

fn unwanted() -> anyhow::Result<()> {
    let large = large_on(Host::cold()?, &["--writeback", "off"])?;
    ensure!(!large.has_writeback()?, "it has what it shall not have");
    let (file, plain) = (large.open()?, open(&large.plain, 0)?);
    for file in [&file, &plain] {
        file.write_all_at(&[1; PAGE], 40_960)?;
    }
    let mut there = [0; PAGE];
    File::open(large.data_file("large")?)?.read_exact_at(&mut there, 40_960)?;
    ensure!(there == [1; PAGE], "a write waits in a cache");
    large.host.kill_serving()?;
    ensure!(!large.has_writeback()?, "the next daemon gives it");
    large.is_same("without a cache")
}
