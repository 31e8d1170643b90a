//! Layers that are mounted before their data has come: read while they stream, with their source gone and back.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Namespaces, Root};
use layerfs_tests::compare::same_by_rsync;
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::scene::until;
use layerfs_tests::tree;

const BIG: u64 = 12_000_000;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("lazy::reads_come_first_and_the_rest_follows", &[Root, Namespaces, Fuse], reads_come_first),
        Case::new("lazy::a_source_that_goes_and_returns", &[Root, Namespaces, Fuse], source_goes),
        Case::new("lazy::who_waits_can_be_killed", &[Root, Namespaces, Fuse], killed_reader),
        Case::new("lazy::a_push_goes_on_by_itself", &[Root, Namespaces, Fuse], push),
    ]
}

/// What of `name` is still on its way at `host`; none if it is whole.
fn partial(host: &Host, name: &str) -> anyhow::Result<Option<u64>> {
    let list = host.ctl.json(["list", name])?;
    let layer = list["layers"].get(0).with_context(|| format!("no {name} in {list}"))?;
    Ok(layer["partial"]["percent"].as_u64())
}

fn until_whole(host: &Host, name: &str) -> anyhow::Result<()> {
    for _ in 0..6000 {
        if partial(host, name)?.is_none() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    anyhow::bail!("{name} is still partial: {:?} %", partial(host, name)?)
}

fn make(path: &Path) -> anyhow::Result<()> {
    tree::fill(path, 51, 600, 4000)?;
    tree::big_file(&path.join("big"), 52, BIG)
}

fn reads_come_first() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    make(&hosts.a.path("tree"))?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    // So slow that the layer can't be whole before these commands have ended, on a machine that others use too.
    hosts.link.shape(1)?;
    hosts.b.ctl.ok(["pull", "tree", "a", "--lazy"])?;
    let percent = partial(&hosts.b, "tree")?.context("it is whole at once")?;
    ensure!(percent < 100, "{percent} % of it is here at once");
    let mounted = hosts.b.mount("tree", "mounted", &["--read-only"])?;
    ensure!(hosts.b.ctl.ok(["mounts"])?.text().contains("partial"), "`mounts` doesn't tell that it is partial");
    hosts.b.ctl.run(["push", "tree", "a"])?.failed_with(5)?;
    // And reads meet a layer of which most is still on its way.
    hosts.link.shape(20)?;
    same_by_rsync(&hosts.a.path("tree"), &mounted)?;
    hosts.b.fsck()?;
    hosts.b.ctl.ok(["du"])?;
    hosts.b.ctl.ok(["gc"])?;
    until_whole(&hosts.b, "tree")?;
    hosts.b.umount(&mounted)?;
    hosts.b.fsck()?;
    ensure!(hosts.b.ctl.ok(["trace", "list"])?.text().contains("tree"), "the mount left no trace");
    hosts.b.ctl.ok(["remove", "tree"])?;
    hosts.b.ctl.ok(["gc"])?;
    let traces = hosts.b.ctl.json(["trace", "list"])?;
    ensure!(traces["traces"][0]["chunks"].as_u64() > Some(100), "the trace went with its layer: {traces}");
    hosts.b.ctl.ok(["trace", "remove", "--all"]).map(drop)
}

/// A layer that is mounted while most of it is still on its way, and whose source has just died; readers wait so long.
fn without_source(timeout_seconds: u32) -> anyhow::Result<(TwoHosts, PathBuf)> {
    let mut hosts = TwoHosts::new()?;
    make(&hosts.a.path("tree"))?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    hosts.b.stop()?;
    let config = hosts.b.ctl.store().with_extension("config").join("layerfs");
    fs::create_dir_all(&config)?;
    fs::write(config.join("config.toml"), format!("lazy_timeout_seconds = {timeout_seconds}\n"))?;
    hosts.b.start(&[])?;
    hosts.link.shape(10)?;
    hosts.b.ctl.ok(["pull", "tree", "a", "--lazy"])?;
    let mounted = hosts.b.mount("tree", "mounted", &[])?;
    hosts.a.kill()?;
    Ok((hosts, mounted))
}

fn source_goes() -> anyhow::Result<()> {
    let (mut hosts, mounted) = without_source(2)?;
    let big = mounted.join("big");
    for _ in 0..2 {
        let error = fs::read(&big).err().context("the source is gone, and all of it can be read")?;
        ensure!(error.raw_os_error() == Some(5), "{error} instead of EIO");
    }
    // What has nothing to do with data goes on, and so does the next daemon.
    ensure!(fs::metadata(&big)?.len() == BIG, "the size is wrong");
    fs::write(mounted.join("new"), "here")?;
    hosts.b.umount(&mounted)?;
    hosts.b.kill()?;
    hosts.b.start(&[])?;
    ensure!(partial(&hosts.b, "tree")?.is_some(), "it isn't partial any more");
    let mounted = hosts.b.mount("tree", "again", &["--read-only"])?;
    ensure!(fs::read(mounted.join("big")).is_err(), "the source is gone, and all of it can be read");

    hosts.a.start(&[])?;
    let expected = fs::read(hosts.a.path("tree/big"))?;
    until("reading from a source that is back", || {
        Ok(fs::read(mounted.join("big")).is_ok_and(|read| read == expected))
    })?;
    until_whole(&hosts.b, "tree")?;
    same_by_rsync(&hosts.a.path("tree"), &mounted)?;
    hosts.b.umount(&mounted)?;
    hosts.b.fsck()
}

fn killed_reader() -> anyhow::Result<()> {
    // Longer than any test may take: a reader that waits for it fails the test.
    let (hosts, mounted) = without_source(3600)?;
    let read = ["if=big", "of=/dev/null", "bs=1M"];
    let read_around_the_cache = ["if=big", "of=/dev/null", "bs=1M", "iflag=direct"];
    let write_a_byte = ["if=/dev/zero", "of=big", "bs=1", "count=1", "seek=11999000", "conv=notrunc"];
    for arguments in [&read[..], &read_around_the_cache, &write_a_byte] {
        let mut reader = Command::new("dd").args(arguments).current_dir(&mounted).spawn()?;
        let status = Path::new("/proc").join(reader.id().to_string()).join("syscall");
        // Until it has slept at the same place for a while: it has come to what isn't here.
        let (mut place, mut looks) = (String::new(), 0);
        while looks < 10 {
            let now = fs::read_to_string(&status)?;
            looks = if now == place && !now.starts_with("running") { looks + 1 } else { 0 };
            place = now;
            std::thread::sleep(Duration::from_millis(20));
        }
        reader.kill()?;
        let ended = (0..1500).find_map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            reader.try_wait().transpose()
        });
        let ended = ended.with_context(|| format!("dd {arguments:?} can't be killed"))??;
        ensure!(ended.signal() == Some(9), "dd {arguments:?} ended with {ended} instead of waiting");
    }
    hosts.b.umount(&mounted)?;
    hosts.b.fsck()
}

fn push() -> anyhow::Result<()> {
    let mut hosts = TwoHosts::new()?;
    make(&hosts.a.path("tree"))?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    hosts.link.shape(10)?;
    hosts.a.ctl.ok(["push", "tree", "b", "--lazy"])?;
    ensure!(partial(&hosts.b, "tree")?.is_some(), "it is whole at once");
    // The sender goes on where it was.
    hosts.a.kill()?;
    hosts.a.start(&[])?;
    let mounted = hosts.b.mount("tree", "mounted", &["--read-only"])?;
    same_by_rsync(&hosts.a.path("tree"), &mounted)?;
    until_whole(&hosts.b, "tree")?;
    hosts.b.umount(&mounted)?;
    hosts.b.fsck()
}
