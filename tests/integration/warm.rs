//! Large sealed files that are read again: passed through to a plain copy, which becomes the upper's when somebody writes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::ops::Deref;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::host::Host;
use layerfs_tests::scene::{Map, Scene, Tmpfs, open, signal, until};
use layerfs_tests::tree::Random;
use rustix::fs::{Advice, FallocateFlags, fallocate};

const BYTES: u64 = 12 << 20;
/// Steps of the random test; `LAYERFS_STEPS` says otherwise.
const STEPS: u64 = 250;
/// The longest that it waits for a copy.
const COPY_COMES: Duration = Duration::from_secs(4);
/// By then a copy on trial has gone.
const TRIAL_ENDS: Duration = Duration::from_secs(25);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("warm::read_without_the_daemon", &[Root, Fuse], without_the_daemon),
        Case::new("warm::a_first_reading_leaves_a_copy_on_trial", &[Root, Fuse], on_trial),
        Case::new("warm::a_writer_comes_while_it_is_read", &[Root, Fuse], writer_comes),
        Case::new("warm::kills_while_it_is_read", &[Root, Fuse], kills),
        Case::new("warm::like_a_plain_file", &[Root, Fuse], like_a_plain_file),
        Case::new("warm::the_limit_is_kept", &[Root, Fuse], limit),
        Case::new("warm::a_full_disk_is_nobodys_error", &[Root, Fuse], full),
        Case::new("warm::idle_copies_make_room", &[Root, Fuse], room),
        Case::new("warm::not_where_it_is_not_wanted", &[Root, Fuse], unwanted),
    ]
}

/// A mounted layer with two large files, and two more for [`never`].
struct Warm(Scene);

const NAMES: [&str; 2] = ["one", "two"];
const FENCES: [&str; 2] = ["fence", "other"];
const FENCE_BYTES: u64 = 8 << 20;

impl Deref for Warm {
    type Target = Scene;

    fn deref(&self) -> &Scene {
        &self.0
    }
}

impl Warm {
    fn new() -> anyhow::Result<Warm> {
        Warm::with(Host::cold()?, &[])
    }

    fn with(host: Host, args: &[&str]) -> anyhow::Result<Warm> {
        let files = NAMES.map(|name| (name, BYTES)).into_iter().chain(FENCES.map(|name| (name, FENCE_BYTES)));
        let files = (1..).zip(files).map(|(seed, (name, length))| {
            let mut bytes = Random::new(seed).bytes(length as usize);
            // Holes too.
            bytes[3 << 20..4 << 20].fill(0);
            (name, bytes)
        });
        Ok(Warm(Scene::new(host, files, args)?))
    }

    fn copy(&self, name: &str) -> anyhow::Result<PathBuf> {
        Ok(self.data_file(name)?.with_extension("warm"))
    }

    /// Reads all of a file, so that the daemon hears of it unless it is passed through: what the kernel has of it goes before.
    fn read(&self, name: &str) -> anyhow::Result<()> {
        let mut file = File::open(self.ours(name))?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        std::io::copy(&mut file, &mut std::io::sink())?;
        Ok(())
    }

    /// Reads a file, and compares it with its twin.
    fn is_like_its_twin(&self, name: &str) -> anyhow::Result<()> {
        ensure!(fs::read(self.ours(name))? == fs::read(self.plain(name))?, "{name} differs");
        self.is_closed(name)
    }

    /// Reads all of a file, but not in order.
    fn read_from_the_end(&self, name: &str) -> anyhow::Result<()> {
        let file = File::open(self.ours(name))?;
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
        let mut piece = vec![0; 1 << 20];
        (0..BYTES >> 20).rev().try_for_each(|at| file.read_exact_at(&mut piece, at << 20))?;
        Ok(())
    }

    /// Reads a file as often as it takes until it is read from a copy.
    fn warm(&self, name: &str) -> anyhow::Result<()> {
        let copy = self.copy(name)?;
        until("a warm copy", || {
            let is_there = copy.exists();
            self.read(name)?;
            Ok(is_there)
        })
    }

    /// The same, and waits until nobody has it open. The daemon looks at what was closed whenever it is asked something.
    fn warm_and_idle(&self, name: &str) -> anyhow::Result<()> {
        self.warm(name)?;
        self.is_closed(name)
    }

    /// Waits until nobody has a file open: another test's child has copies of this process's descriptors until its program runs.
    fn is_closed(&self, name: &str) -> anyhow::Result<()> {
        until("the closing of a file", || Ok(free_bytes(&self.mnt)? > 0 && self.how_open(name)? == 0))
    }

    /// Opens a file that has a copy.
    fn reader(&self, name: &str) -> anyhow::Result<File> {
        self.warm(name)?;
        Ok(File::open(self.ours(name))?)
    }

    /// How a file is noted as open: 1 passed through, 8 to its copy (FORMAT.md, "What is open"); 0 if it isn't.
    fn how_open(&self, name: &str) -> anyhow::Result<u32> {
        let ino = fs::metadata(self.ours(name))?.ino();
        let flags = |record: &[u8]| u32::from_le_bytes([record[24], record[25], record[26], record[27]]);
        let places = self.opens()?;
        let records = places.chunks_exact(64).map(|place| {
            let (first, second) = place.split_at(32);
            let is_second = flags(second) >> 30 == (((flags(first) >> 30) + 1) & 3);
            if is_second { second } else { first }
        });
        let record = records.into_iter().find(|record| record[..8] == ino.to_le_bytes());
        Ok(record.map_or(0, |record| flags(record) & 9))
    }

    /// The memory in which the daemon notes what is open. A daemon that has just begun may not have it yet.
    fn opens(&self) -> anyhow::Result<Vec<u8>> {
        let mut found = None;
        until("the list of open files", || {
            let Ok(links) = fs::read_dir(format!("/proc/{}/fd", self.host.serving_pid()?)) else { return Ok(false) };
            let links = links.flatten().map(|entry| entry.path());
            let is_it =
                |link: &PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with("/memfd:layerfs-opens (deleted)"));
            found = links.into_iter().find(is_it).and_then(|link| fs::read(link).ok());
            Ok(found.is_some())
        })?;
        found.context("there is none")
    }

    /// Seals, compares what the layer has, unmounts, and looks for what is left.
    fn end(self) -> anyhow::Result<()> {
        self.is_same("at the end")?;
        self.is_sealed_as_it_is("last")?;
        let left = self.host.ctl.store().join("uppers/1");
        self.host.ctl.ok(["umount", &self.mnt.to_string_lossy(), "--discard"])?;
        ensure!(!left.exists(), "the upper's folder is left");
        self.host.fsck()
    }
}

/// The daemon stands still while a file is read that the kernel has no page of.
fn without_the_daemon() -> anyhow::Result<()> {
    let scene = Warm::new()?;
    ensure!(!scene.copy("one")?.exists());
    scene.read_from_the_end("one")?;
    scene.is_closed("one")?;
    ensure!(!scene.copy("one")?.exists(), "a copy of what was read in any order");
    let again = File::open(scene.ours("one"))?;
    scene.warm(FENCES[0])?;
    ensure!(!scene.copy("one")?.exists(), "a copy was made while the file was being read");
    drop(again);
    until("a copy of what was closed", || Ok(scene.copy("one")?.exists()))?;
    let reader = scene.reader("one")?;
    ensure!(scene.how_open("one")? == 9, "it isn't passed through to a copy");
    let daemon = scene.host.serving_pid()?;
    signal(daemon, rustix::process::Signal::STOP)?;
    let (mut bytes, has_ended) = (vec![0; BYTES as usize], AtomicBool::new(false));
    let read = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let read = reader.read_exact_at(&mut bytes, 0);
            has_ended.store(true, Ordering::Relaxed);
            read
        });
        let came = until("a read", || Ok(has_ended.load(Ordering::Relaxed)));
        signal(daemon, rustix::process::Signal::CONT)?;
        thread.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        came
    });
    read?;
    ensure!(bytes == fs::read(scene.plain("one"))?, "the copy differs");
    let shown = scene.host.ctl.json(["mounts"])?["mounts"][0]["warm_bytes"].as_u64();
    ensure!(shown == Some(BYTES + FENCE_BYTES), "`mounts` says {shown:?}");
    drop(reader);
    scene.is_closed("one")?;
    // Who writes when nobody reads copies up by range, and there is no copy any more.
    for file in scene.both("one")? {
        file.write_all_at(b"new", 5_000_000)?;
    }
    ensure!(!scene.copy("one")?.exists(), "a copy of what has changed");
    let blocks = fs::metadata(scene.data_file("one")?)?.blocks();
    ensure!(blocks * 512 < 1 << 20, "{blocks} blocks were copied up");
    scene.end()
}

/// A file that is read through for the first time has a copy then, which goes if nobody wants it.
fn on_trial() -> anyhow::Result<()> {
    let scene = Warm::new()?;
    // Who looks at the head leaves none.
    let mut head = vec![0; 4 << 20];
    File::open(scene.ours("two"))?.read_exact_at(&mut head, 0)?;
    scene.is_closed("two")?;
    ensure!(!scene.copy("two")?.exists(), "a copy of a head");
    for name in ["one", FENCES[0], FENCES[1]] {
        scene.is_like_its_twin(name)?;
        ensure!(scene.copy(name)?.exists(), "no copy of {name}");
    }
    // It is passed through from the second opening on, and is a copy as others are.
    let reader = File::open(scene.ours("one"))?;
    ensure!(scene.how_open("one")? == 9, "it isn't passed through to a copy");
    // A writer comes, whose bytes stay; and one to a copy that nobody reads.
    let reads = File::open(scene.ours(FENCES[0]))?;
    for name in [FENCES[0], FENCES[1]] {
        for file in scene.both(name)? {
            file.write_all_at(b"new", 5_000_000)?;
        }
        ensure!(!scene.copy(name)?.exists(), "a copy of what has changed");
        ensure!(fs::read(scene.ours(name))? == fs::read(scene.plain(name))?, "{name} differs");
    }
    drop(reads);
    drop(reader);
    // Of two that nobody has open one was wanted.
    scene.is_closed("one")?;
    scene.seal("later")?;
    scene.is_closed(FENCES[0])?;
    let began = Instant::now();
    scene.read(FENCES[0])?;
    ensure!(scene.copy(FENCES[0])?.exists(), "no copy of what was sealed anew");
    while scene.copy(FENCES[0])?.exists() {
        ensure!(began.elapsed() < TRIAL_ENDS, "a copy that nobody wants stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(scene.copy("one")?.exists(), "a copy that is used has gone");
    scene.end()
}

fn writer_comes() -> anyhow::Result<()> {
    let scene = Warm::new()?;
    let reader = scene.reader("one")?;
    let map = Map::of(&File::open(scene.ours("one"))?, BYTES as usize)?;
    let writers = scene.both("one")?;
    for at in [0, 5_000_000, BYTES - 3] {
        writers.iter().try_for_each(|file| file.write_all_at(b"new", at))?;
        let mut bytes = [0; 3];
        reader.read_exact_at(&mut bytes, at)?;
        ensure!(&bytes == b"new", "a reader that was there doesn't see what was written at {at}");
        ensure!(map.get(at as usize) == b'n', "a mapping doesn't see what was written at {at}");
    }
    ensure!(scene.how_open("one")? == 1, "it isn't passed through to its data file");
    ensure!(!scene.copy("one")?.exists() && scene.data_file("one")?.exists(), "the copy is no data file");
    scene.is_same("while all have it open")?;
    scene.seal("meanwhile")?;
    writers.iter().try_for_each(|file| file.write_all_at(b"later", 6_000_000))?;
    ensure!(map.get(6_000_000) == b'l', "a mapping was left behind by a seal");
    drop((reader, writers, map));
    scene.is_same("after all have closed it")?;
    // A truncation by name.
    let reader = scene.reader("two")?;
    for path in [scene.ours("two"), scene.plain("two")] {
        OpenOptions::new().write(true).open(&path)?.set_len(7_000_001)?;
    }
    ensure!(reader.metadata()?.len() == 7_000_001 && reader.read_at(&mut [0; 10], 7_000_001)? == 0);
    drop(reader);
    scene.is_same("after it was cut")?;
    // What is sealed may be warm again, unless somebody has it open for writing: that stays in the upper until the next seal.
    NAMES.iter().try_for_each(|name| scene.is_closed(name))?;
    scene.seal("again")?;
    let reader = scene.reader("one")?;
    scene.warm("one")?;
    ensure!(scene.how_open("one")? == 9);
    for path in [scene.ours("one"), scene.plain("one")] {
        File::create(&path)?;
    }
    ensure!(reader.metadata()?.len() == 0 && scene.how_open("one")? == 1);
    drop(reader);
    scene.end()
}

fn kills() -> anyhow::Result<()> {
    let scene = Warm::new()?;
    let reader = scene.reader("one")?;
    let mapped = Map::of(&scene.reader("two")?, BYTES as usize)?;
    let check = |at: u64, expected: &[u8]| -> anyhow::Result<()> {
        let mut bytes = vec![0; expected.len()];
        reader.read_exact_at(&mut bytes, at)?;
        ensure!(bytes == expected, "at {at}: {bytes:?}");
        Ok(())
    };
    scene.host.kill_serving()?;
    let begin = fs::read(scene.plain("one"))?[..20].to_vec();
    check(0, &begin)?;
    scene.is_same("after a kill")?;
    ensure!(scene.how_open("one")? == 9, "the next daemon doesn't know the copy");
    // The next daemon makes it the data file, which the one after it knows.
    let writers = scene.both("one")?;
    writers.iter().try_for_each(|file| file.write_all_at(b"first", 100))?;
    check(100, b"first")?;
    scene.host.kill_serving()?;
    writers.iter().try_for_each(|file| file.write_all_at(b"second", 200))?;
    check(200, b"second")?;
    scene.is_same("after a second kill")?;
    ensure!(scene.how_open("one")? == 1 && !scene.copy("one")?.exists());
    // What is only mapped.
    ensure!(scene.how_open("two")? == 9, "what is mapped is forgotten");
    for file in scene.both("two")? {
        file.write_all_at(b"mapped", 4096)?;
    }
    ensure!(mapped.get(4096) == b'm', "a mapping of a copy doesn't see what is written");
    scene.host.kill_serving()?;
    ensure!(mapped.get(4097) == b'a');
    drop((reader, writers, mapped));
    // Copies that nobody had open go with their daemon.
    scene.is_closed("one")?;
    scene.seal("one-more")?;
    scene.warm_and_idle("one")?;
    scene.host.kill_serving()?;
    ensure!(scene.how_open("one")? == 0 && !scene.copy("one")?.exists(), "what nobody had open outlived its daemon");
    scene.is_same("after the last kill")?;
    scene.end()
}

/// What is held of one file: descriptors of it and of its twin.
#[derive(Default)]
struct Held {
    readers: Vec<[File; 2]>,
    writers: Vec<[File; 2]>,
}

/// At random: opening, closing, reading, writing, cutting, sealing, kills, always compared with a plain file.
fn like_a_plain_file() -> anyhow::Result<()> {
    let steps = std::env::var("LAYERFS_STEPS").ok().and_then(|text| text.parse().ok()).unwrap_or(STEPS);
    let scene = Warm::new()?;
    let mut random = Random::new(41);
    let mut held: BTreeMap<&str, Held> = NAMES.iter().map(|name| (*name, Held::default())).collect();
    let (mut warm, mut own, mut seals) = (0, 0, 0);
    for step in 0..steps {
        let name = NAMES[random.below(2) as usize];
        let this = held.entry(name).or_default();
        let (ours, plain) = (scene.ours(name), scene.plain(name));
        let bytes = fs::metadata(&plain)?.len();
        let at = random.below(bytes + 10_000);
        match random.below(20) {
            0..=5 => this.readers.push([File::open(&ours)?, File::open(&plain)?]),
            6 | 7 => this.readers.clear(),
            8 => {
                let was = scene.how_open(name)?;
                this.writers.push(scene.both(name)?);
                own += u64::from(was == 9);
            }
            9..=11 => this.writers.clear(),
            12 | 13 => {
                let data = Random::new(step).bytes(1 + random.below(30_000) as usize);
                let at = at.min(BYTES);
                if let Some(pair) = this.writers.first() {
                    pair.iter().try_for_each(|file| file.write_all_at(&data, at))?;
                }
            }
            14 if step % 3 == 0 => {
                let bytes = (BYTES - random.below(1 << 20)).max(9 << 20);
                for path in [&ours, &plain] {
                    OpenOptions::new().write(true).open(path)?.set_len(bytes)?;
                }
            }
            15 => {
                seals += 1;
                scene.seal(&format!("seal{seals}"))?;
            }
            16 if step % 2 == 0 => scene.host.kill_serving()?,
            17 => {
                let mut files = held.values().flat_map(|held| &held.readers);
                if let Some([ours, plain]) = files.next() {
                    let (mut left, mut right) = (vec![0; 100_000], vec![0; 100_000]);
                    let counts = (ours.read_at(&mut left, at)?, plain.read_at(&mut right, at)?);
                    ensure!(
                        counts.0 == counts.1 && left == right,
                        "step {step}: a reader of {name} sees something else"
                    );
                }
            }
            _ => {
                let is_same = fs::read(&ours)? == fs::read(&plain)?;
                ensure!(is_same, "step {step}: {name} differs");
                if this.readers.is_empty() && this.writers.is_empty() {
                    // Time for a copy, if it can have one now: what may be mapped still, for all that a new daemon knows, can't.
                    let (copy, began) = (scene.copy(name)?, Instant::now());
                    while !scene.data_file(name)?.exists() && !copy.exists() && began.elapsed() < COPY_COMES {
                        scene.read(name)?;
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    this.readers.push([File::open(&ours)?, File::open(&plain)?]);
                }
            }
        }
        warm += u64::from(scene.how_open(name)? == 9);
    }
    ensure!(
        warm > 0 && own > 0,
        "{warm} steps with a copy in use, {own} copies became data files: too few to show anything"
    );
    for (name, held) in &held {
        for [ours, plain] in &held.readers {
            let bytes = plain.metadata()?.len();
            ensure!(ours.metadata()?.len() == bytes, "a reader of {name} sees another length");
            let (mut left, mut right) = (vec![0; bytes as usize], vec![0; bytes as usize]);
            ours.read_exact_at(&mut left, 0)?;
            plain.read_exact_at(&mut right, 0)?;
            ensure!(left == right, "a reader of {name} sees something else at the end");
        }
    }
    drop(held);
    scene.end()
}

fn configured(text: &str) -> anyhow::Result<Host> {
    let host = Host::cold()?;
    let folder = host.ctl.store().with_extension("config").join("layerfs");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("config.toml"), text)?;
    Ok(host)
}

fn limit() -> anyhow::Result<()> {
    let scene = Warm::with(configured("warm_copies = \"20 MiB\"\n")?, &[])?;
    scene.warm("one")?;
    scene.warm("two")?;
    ensure!(!scene.copy("one")?.exists(), "two copies take more than is allowed");
    let reader = scene.reader("two")?;
    never(&scene, &["one"])?;
    ensure!(scene.copy("two")?.exists(), "what is in use had to go");
    drop(reader);
    scene.warm("one")?;
    ensure!(!scene.copy("two")?.exists());
    scene.end()?;
    let scene = Warm::with(configured("warm_copies = \"0\"\n")?, &[])?;
    nowhere(&scene)
}

/// Reads files again and again, and no copies of them are made: one of another file, which was asked for later, is.
fn never(scene: &Warm, names: &[&str]) -> anyhow::Result<()> {
    for name in names.iter().cycle().take(3 * names.len()) {
        scene.read(name)?;
    }
    let mut fences = FENCES.into_iter().filter(|name| scene.copy(name).is_ok_and(|copy| !copy.exists()));
    scene.warm(fences.next().context("a file without a copy")?)?;
    for name in names {
        ensure!(!scene.copy(name)?.exists(), "a copy of {name} was made");
    }
    Ok(())
}

/// The same where none can be made at all: nothing tells when one would have been.
fn nowhere(scene: &Warm) -> anyhow::Result<()> {
    for _ in 0..5 {
        scene.is_same("without a copy")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let copies =
        fs::read_dir(scene.host.ctl.store().join("uppers"))?.flatten().flat_map(|upper| fs::read_dir(upper.path()));
    let copies = copies.flatten().flatten().filter(|file| file.path().extension().is_some_and(|name| name == "warm"));
    ensure!(copies.count() == 0, "a copy was made");
    Ok(())
}

/// A store whose uppers are on a small disk.
fn on_a_small_disk(mebibytes: u64, args: &[&str]) -> anyhow::Result<(Tmpfs, Warm, PathBuf)> {
    let host = Host::cold()?;
    // A store, and nobody who has it open.
    host.import(&host.new_folder("empty")?, "empty", &[])?;
    host.ctl.ok(["daemon", "stop"])?;
    let uppers = host.ctl.store().join("uppers");
    let small = Tmpfs::on(&uppers, mebibytes)?;
    Ok((small, Warm::with(host, args)?, uppers))
}

fn free_bytes(path: &Path) -> anyhow::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_bavail * space.f_frsize)
}

fn full() -> anyhow::Result<()> {
    let (_small, scene, uppers) = on_a_small_disk(26, &[])?;
    // One fits, and a tenth stays free.
    scene.warm("one")?;
    fs::write(uppers.join("ballast"), vec![0; 2 << 20])?;
    never(&scene, &["two"]).context("the last of the disk")?;
    // Nothing is left to write with when it becomes the data file, and nothing is needed.
    let (reader, other) = (scene.reader("one")?, scene.reader(FENCES[0])?);
    fs::write(uppers.join("more"), vec![0; free_bytes(&uppers)? as usize - (1 << 20)])?;
    for file in scene.both("one")? {
        file.write_all_at(b"new", 9_000_000)?;
    }
    let mut bytes = [0; 3];
    reader.read_exact_at(&mut bytes, 9_000_000)?;
    ensure!(&bytes == b"new");
    drop((reader, other));
    scene.is_same("at the end")?;
    scene.host.ctl.ok(["umount", &scene.mnt.to_string_lossy(), "--discard"])?;
    scene.host.ctl.ok(["daemon", "stop"])?;
    Ok(())
}

/// Whoever needs the disk gets what copies take that nobody reads.
fn room() -> anyhow::Result<()> {
    const MIB: usize = 1 << 20;
    for writeback in ["off", "on"] {
        let (_small, scene, uppers) = on_a_small_disk(40, &["--writeback", writeback])?;
        let (ballast, copy) = (uppers.join("ballast"), scene.copy("one")?);
        let warm_beside = |bytes: usize| -> anyhow::Result<()> {
            fs::write(&ballast, [])?;
            scene.warm_and_idle("one")?;
            Ok(fs::write(&ballast, vec![0; bytes])?)
        };
        // It counts as free.
        warm_beside(0)?;
        let counted = free_bytes(&scene.mnt)? - free_bytes(&uppers)?;
        ensure!(counted >> 20 == 11, "{counted} bytes of a copy count as free");
        // A write by way of the daemon, for which only the copy's place is left.
        warm_beside(24 * MIB)?;
        for file in scene.both("two")? {
            file.write_all_at(&vec![9; 8 * MIB], 4096)?;
            file.sync_all()?;
        }
        ensure!(!copy.exists(), "a copy that nobody reads stays on a full disk");
        // Space is reserved by way of the daemon.
        warm_beside(15 * MIB)?;
        fallocate(open(&scene.ours("two"))?, FallocateFlags::KEEP_SIZE, BYTES, 8 << 20)?;
        ensure!(!copy.exists(), "a copy that nobody reads stays where space is reserved");
        // A file that is passed through, and made where less than a tenth is free.
        warm_beside(10 * MIB)?;
        fs::write(scene.ours("new"), vec![1; 8 * MIB])?;
        ensure!(!copy.exists(), "a copy that nobody reads stays on a disk that is nearly full");
        fs::remove_file(scene.ours("new"))?;
        until("the room of what was removed", || Ok(free_bytes(&uppers)? > 13 << 20))?;
        // Nobody asks the daemon for anything.
        warm_beside(0)?;
        fs::write(&ballast, vec![0; free_bytes(&uppers)? as usize - MIB])?;
        until("the end of a copy that nobody reads", || Ok(!copy.exists()))?;
        // One that is read stays.
        fs::remove_file(&ballast)?;
        let reader = scene.reader("one")?;
        fs::write(&ballast, vec![0; free_bytes(&uppers)? as usize - MIB])?;
        let refused = fs::write(scene.ours("more"), vec![1; 4 * MIB]).err().and_then(|error| error.raw_os_error());
        ensure!(refused == Some(libc::ENOSPC) && copy.exists(), "{refused:?}");
        reader.read_exact_at(&mut [0], 0)?;
        drop(reader);
        fs::remove_file(&ballast)?;
        scene.is_same("at the end")?;
        scene.host.ctl.ok(["umount", &scene.mnt.to_string_lossy(), "--discard"])?;
        scene.host.ctl.ok(["daemon", "stop"])?;
    }
    Ok(())
}

fn unwanted() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let scene = Warm::with(Host::cold()?, &["--read-only"])?;
    nowhere(&scene)?;
    scene.host.ctl.ok(["umount", &scene.mnt.to_string_lossy()])?;
    scene.mount(&[])?;
    for name in NAMES {
        fs::set_permissions(scene.ours(name), fs::Permissions::from_mode(0o4755))?;
    }
    never(&scene, &NAMES)?;
    // Nor where somebody writes.
    for name in NAMES {
        fs::set_permissions(scene.ours(name), fs::Permissions::from_mode(0o755))?;
    }
    let writers = [open(&scene.ours("one"))?, open(&scene.ours("two"))?];
    never(&scene, &NAMES)?;
    drop(writers);
    scene.end()
}
