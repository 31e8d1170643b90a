//! Large sealed files that are read again: passed through to a plain copy, which becomes the upper's when somebody writes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Root};
use layerfs_tests::case::output_of;
use layerfs_tests::host::Host;
use layerfs_tests::tree::Random;

const BYTES: u64 = 12 << 20;
/// Steps of the random test; `LAYERFS_STEPS` says otherwise.
const STEPS: u64 = 250;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("warm::read_without_the_daemon", &[Root, Fuse], without_the_daemon),
        Case::new("warm::a_writer_comes_while_it_is_read", &[Root, Fuse], writer_comes),
        Case::new("warm::kills_while_it_is_read", &[Root, Fuse], kills),
        Case::new("warm::like_a_plain_file", &[Root, Fuse], like_a_plain_file),
        Case::new("warm::the_limit_is_kept", &[Root, Fuse], limit),
        Case::new("warm::a_full_disk_is_nobodys_error", &[Root, Fuse], full),
        Case::new("warm::not_where_it_is_not_wanted", &[Root, Fuse], unwanted),
    ]
}

/// A mounted layer `base` with two large files, and their twins.
struct Scene {
    host: Host,
    mnt: PathBuf,
    tree: PathBuf,
}

const NAMES: [&str; 2] = ["one", "two"];

impl Scene {
    fn new() -> anyhow::Result<Scene> {
        Scene::with(Host::cold()?, &[])
    }

    fn with(host: Host, args: &[&str]) -> anyhow::Result<Scene> {
        let (tree, mnt) = (host.new_folder("tree")?, host.new_folder("mnt")?);
        for (seed, name) in (1..).zip(NAMES) {
            let mut bytes = Random::new(seed).bytes(BYTES as usize);
            // Holes too.
            bytes[3 << 20..4 << 20].fill(0);
            fs::write(tree.join(name), bytes)?;
        }
        host.import(&tree, "base", &[])?;
        let scene = Scene { host, mnt, tree };
        scene.mount(args)?;
        Ok(scene)
    }

    fn mount(&self, args: &[&str]) -> anyhow::Result<()> {
        let mnt = self.mnt.to_str().context("a path of text")?;
        self.host.ctl.ok([&["mount", "base", mnt][..], args].concat()).map(drop)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mnt.join(name)
    }

    fn plain(&self, name: &str) -> PathBuf {
        self.tree.join(name)
    }

    fn data_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let ino = fs::metadata(self.path(name))?.ino();
        Ok(self.host.ctl.store().join(format!("uppers/1/{ino:x}")))
    }

    fn copy(&self, name: &str) -> anyhow::Result<PathBuf> {
        Ok(self.data_file(name)?.with_extension("warm"))
    }

    /// Reads a file as often as it takes until it has a copy. A daemon knows only of what the kernel has no pages of that it was read.
    fn warm(&self, name: &str) -> anyhow::Result<()> {
        let copy = self.copy(name)?;
        until("a warm copy", || {
            if let Ok(mut file) = File::open(self.path(name)) {
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                let _ = file.read_to_end(&mut Vec::new());
            }
            copy.exists()
        })
    }

    /// Opens a file that has a copy.
    fn reader(&self, name: &str) -> anyhow::Result<File> {
        self.warm(name)?;
        Ok(File::open(self.path(name))?)
    }

    fn writer(&self, name: &str) -> anyhow::Result<File> {
        Ok(OpenOptions::new().read(true).write(true).open(self.path(name))?)
    }

    fn both(&self, name: &str) -> anyhow::Result<[File; 2]> {
        Ok([self.writer(name)?, OpenOptions::new().read(true).write(true).open(self.plain(name))?])
    }

    /// How a file is noted as open: 1 passed through, 8 to its copy (FORMAT.md, `opens`); 0 if it isn't.
    fn how_open(&self, name: &str) -> anyhow::Result<u32> {
        let ino = fs::metadata(self.path(name))?.ino();
        let rows = fs::read(self.host.ctl.store().join("uppers/1/opens"))?;
        let row = rows.chunks_exact(32).find(|row| row[..8] == ino.to_le_bytes());
        Ok(row.map_or(0, |row| u32::from_le_bytes([row[24], row[25], row[26], row[27]]) & 9))
    }

    fn seal(&self, name: &str) -> anyhow::Result<()> {
        self.host.ctl.ok(["seal", &self.mnt.to_string_lossy(), name]).map(drop)
    }

    fn is_same(&self, what: &str) -> anyhow::Result<()> {
        same(what, &self.mnt, &self.tree)
    }

    /// Seals, compares what the layer has, unmounts, and looks for what is left.
    fn end(self) -> anyhow::Result<()> {
        self.is_same("at the end")?;
        self.seal("last")?;
        self.host.export("last", &self.host.path("exported"), &[])?;
        same("in the layer", &self.host.path("exported"), &self.tree)?;
        let left = self.host.ctl.store().join("uppers/1");
        self.host.ctl.ok(["umount", &self.mnt.to_string_lossy(), "--discard"])?;
        ensure!(!left.exists(), "the upper's folder is left");
        self.host.fsck()
    }
}

fn same(what: &str, ours: &Path, plain: &Path) -> anyhow::Result<()> {
    for name in NAMES {
        let (ours, plain) = (fs::read(ours.join(name))?, fs::read(plain.join(name))?);
        ensure!(ours.len() == plain.len(), "{what}: {name} has {} bytes, not {}", ours.len(), plain.len());
        let differs = ours.iter().zip(&plain).position(|(ours, plain)| ours != plain);
        ensure!(differs.is_none(), "{what}: {name} differs at {differs:?}");
    }
    Ok(())
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) -> anyhow::Result<()> {
    let began = Instant::now();
    while !is_so() {
        ensure!(began.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A shared mapping of all of a file, for reading.
struct Map(*const u8);

impl Map {
    fn of(file: &File) -> anyhow::Result<Map> {
        // SAFETY: a new mapping of a file that is as long.
        #[allow(unsafe_code)]
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), BYTES as usize, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        ensure!(at != libc::MAP_FAILED, "cannot map a file: {}", std::io::Error::last_os_error());
        Ok(Map(at.cast()))
    }

    fn get(&self, at: usize) -> u8 {
        assert!(at < BYTES as usize);
        // SAFETY: within the mapping, whose file is not shorter.
        #[allow(unsafe_code)]
        unsafe {
            self.0.add(at).read_volatile()
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody refers to it any more.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.0.cast_mut().cast(), BYTES as usize);
        }
    }
}

fn signal(pid: i32, signal: rustix::process::Signal) -> anyhow::Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("a process")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// The daemon stands still while a file is read that the kernel has no page of.
fn without_the_daemon() -> anyhow::Result<()> {
    let scene = Scene::new()?;
    ensure!(!scene.copy("one")?.exists());
    fs::read(scene.path("one"))?;
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
        let came = until("a read", || has_ended.load(Ordering::Relaxed));
        signal(daemon, rustix::process::Signal::CONT)?;
        thread.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        came
    });
    read?;
    ensure!(bytes == fs::read(scene.plain("one"))?, "the copy differs");
    let shown = scene.host.ctl.json(["mounts"])?["mounts"][0]["warm_bytes"].as_u64();
    ensure!(shown == Some(BYTES), "`mounts` says {shown:?}");
    drop(reader);
    // Who writes when nobody reads copies up by range, and there is no copy any more.
    for file in scene.both("one")? {
        file.write_all_at(b"new", 5_000_000)?;
    }
    ensure!(!scene.copy("one")?.exists(), "a copy of what has changed");
    let blocks = fs::metadata(scene.data_file("one")?)?.blocks();
    ensure!(blocks * 512 < 1 << 20, "{blocks} blocks were copied up");
    scene.end()
}

fn writer_comes() -> anyhow::Result<()> {
    let scene = Scene::new()?;
    let reader = scene.reader("one")?;
    let map = Map::of(&File::open(scene.path("one"))?)?;
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
    for path in [scene.path("two"), scene.plain("two")] {
        OpenOptions::new().write(true).open(&path)?.set_len(7_000_001)?;
    }
    ensure!(reader.metadata()?.len() == 7_000_001 && reader.read_at(&mut [0; 10], 7_000_001)? == 0);
    drop(reader);
    scene.is_same("after it was cut")?;
    // What is sealed may be warm again.
    scene.seal("again")?;
    let reader = scene.reader("one")?;
    scene.warm("one")?;
    ensure!(scene.how_open("one")? == 9);
    for path in [scene.path("one"), scene.plain("one")] {
        File::create(&path)?;
    }
    ensure!(reader.metadata()?.len() == 0 && scene.how_open("one")? == 1);
    drop(reader);
    scene.end()
}

fn kills() -> anyhow::Result<()> {
    let scene = Scene::new()?;
    let reader = scene.reader("one")?;
    let mapped = Map::of(&scene.reader("two")?)?;
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
    scene.seal("one-more")?;
    scene.warm("one")?;
    scene.host.kill_serving()?;
    scene.is_same("after the last kill")?;
    ensure!(!scene.copy("one")?.exists(), "a copy that nobody had open outlived its daemon");
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
    let scene = Scene::new()?;
    let mut random = Random::new(41);
    let mut held: BTreeMap<&str, Held> = NAMES.iter().map(|name| (*name, Held::default())).collect();
    let (mut warm, mut own, mut seals) = (0, 0, 0);
    for step in 0..steps {
        let name = NAMES[random.below(2) as usize];
        let this = held.entry(name).or_default();
        let (ours, plain) = (scene.path(name), scene.plain(name));
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
                    // What is sealed gets a copy, however busy the machine is.
                    if !scene.data_file(name)?.exists() {
                        scene.warm(name)?;
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
    let scene = Scene::with(configured("warm_copies = \"20 MiB\"\n")?, &[])?;
    scene.warm("one")?;
    scene.warm("two")?;
    ensure!(!scene.copy("one")?.exists(), "two copies take more than is allowed");
    let reader = scene.reader("two")?;
    for _ in 0..3 {
        fs::read(scene.path("one"))?;
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(scene.copy("two")?.exists() && !scene.copy("one")?.exists(), "what is in use had to go");
    drop(reader);
    scene.warm("one")?;
    ensure!(!scene.copy("two")?.exists());
    scene.end()?;
    let scene = Scene::with(configured("warm_copies = \"0\"\n")?, &[])?;
    never(&scene)
}

/// Reads a file again and again, and no copy of it is made.
fn never(scene: &Scene) -> anyhow::Result<()> {
    for _ in 0..5 {
        scene.is_same("without a copy")?;
        std::thread::sleep(Duration::from_millis(200));
    }
    let copies =
        fs::read_dir(scene.host.ctl.store().join("uppers"))?.flatten().flat_map(|upper| fs::read_dir(upper.path()));
    let copies = copies.flatten().flatten().filter(|file| file.path().extension().is_some_and(|name| name == "warm"));
    ensure!(copies.count() == 0, "a copy was made");
    Ok(())
}

/// A tmpfs, unmounted when dropped.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn full() -> anyhow::Result<()> {
    let host = Host::cold()?;
    // A store, and nobody who has it open.
    host.import(&host.new_folder("empty")?, "empty", &[])?;
    host.ctl.ok(["daemon", "stop"])?;
    let uppers = host.ctl.store().join("uppers");
    let options = ["-t", "tmpfs", "-o", "size=26M", "tmpfs"];
    output_of(std::process::Command::new("mount").args(options).arg(&uppers))?;
    let _small = Small(uppers.clone());
    let scene = Scene::with(host, &[])?;
    // One fits, and a tenth stays free.
    scene.warm("one")?;
    fs::write(uppers.join("ballast"), vec![0; 2 << 20])?;
    for _ in 0..5 {
        scene.is_same("on a full disk")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(!scene.copy("two")?.exists(), "the last of the disk was taken");
    // Nothing is left to write with when it becomes the data file, and nothing is needed.
    let reader = scene.reader("one")?;
    fs::write(uppers.join("more"), vec![0; 11 << 20])?;
    for file in scene.both("one")? {
        file.write_all_at(b"new", 9_000_000)?;
    }
    let mut bytes = [0; 3];
    reader.read_exact_at(&mut bytes, 9_000_000)?;
    ensure!(&bytes == b"new");
    drop(reader);
    scene.is_same("at the end")?;
    scene.host.ctl.ok(["umount", &scene.mnt.to_string_lossy(), "--discard"])?;
    scene.host.ctl.ok(["daemon", "stop"])?;
    Ok(())
}

fn unwanted() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::with(Host::cold()?, &["--read-only"])?;
    never(&scene)?;
    scene.host.ctl.ok(["umount", &scene.mnt.to_string_lossy()])?;
    scene.mount(&[])?;
    for name in NAMES {
        fs::set_permissions(scene.path(name), fs::Permissions::from_mode(0o4755))?;
    }
    never(&scene)?;
    // Nor where somebody writes.
    for name in NAMES {
        fs::set_permissions(scene.path(name), fs::Permissions::from_mode(0o755))?;
    }
    let writers = [scene.writer("one")?, scene.writer("two")?];
    never(&scene)?;
    drop(writers);
    scene.end()
}
