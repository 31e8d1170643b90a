//! Packs in a bucket of an S3 server: uploaded, evicted, read, lost and brought back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Fuse, Root, S3 as S3Server, Tool};
use layerfs_tests::case::{Case, Need};
use layerfs_tests::ctl::number;
use layerfs_tests::host::Host;
use layerfs_tests::servers::S3;
use layerfs_tests::{compare, tree, zoo};

/// The steps of the second tier at which a daemon is killed here.
pub const STEPS: &[&str] =
    &["tier.begun", "tier.uploaded", "tier.recorded", "tier.before-evict", "tier.after-evict", "tier.dead"];

const NEEDS: &[Need] = &[Root, Fuse, S3Server, Tool("curl"), Tool("rsync")];
/// The longest that a server which is back may be taken for gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("tier::what_is_evicted_is_read_from_the_bucket", NEEDS, evicted),
        Case::new("tier::a_silent_server_is_an_error_and_no_hang", NEEDS, silent),
        Case::new("tier::a_lost_disk_comes_back", NEEDS, lost),
        Case::new("tier::at_each_step", NEEDS, each_step),
    ]
}

/// A host whose daemon has keys for the server, not started.
fn host() -> anyhow::Result<(Host, S3)> {
    let host = Host::cold()?;
    let s3 = S3::start(&host.path(""))?;
    let keys = host.path("keys");
    fs::write(&keys, "[default]\naws_access_key_id = test\naws_secret_access_key = very-secret\n")?;
    let config = host.ctl.store().with_extension("config").join("layerfs");
    fs::create_dir_all(&config)?;
    fs::write(config.join("config.toml"), format!("tier_credentials = {:?}\n", keys.display().to_string()))?;
    Ok((host, s3))
}

fn source(host: &Host, name: &str, seed: u64) -> anyhow::Result<PathBuf> {
    let source = host.path(name);
    tree::fill(&source, seed, 100, 4000)?;
    tree::big_file(&source.join("big"), seed, 5_000_000)?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    Ok(source)
}

fn add(host: &Host, s3: &S3, folder: &str, further: &[&str]) -> anyhow::Result<()> {
    let url = format!("s3://bucket/{folder}");
    let endpoint = s3.endpoint();
    host.ctl.ok(["tier", "add", &url, "--endpoint", &endpoint].iter().chain(further))?;
    Ok(())
}

/// Everything to the bucket, nothing here.
fn offload(host: &Host) -> anyhow::Result<()> {
    host.ctl.ok(["tier", "sync"])?;
    host.ctl.ok(["tier", "evict", "--keep", "0"])?;
    ensure!(host.pack_bytes()? == 0, "{} bytes of packs stay", host.pack_bytes()?);
    Ok(())
}

fn evicted() -> anyhow::Result<()> {
    let (mut host, s3) = host()?;
    host.start(&[])?;
    let tree = source(&host, "tree", 91)?;
    host.import(&tree, "app", &[])?;
    add(&host, &s3, "one/store", &[])?;
    offload(&host)?;
    let status = host.ctl.json(["tier", "status"])?;
    ensure!(number(&status, "remote_packs")? >= 1 && number(&status, "local_packs")? == 0, "{status}");
    // A daemon without anything in memory.
    host.stop()?;
    host.start(&[])?;
    let root = host.mount("app", "root", &["--read-only"])?;
    compare::same_by_rsync(&tree, &root)?;
    host.umount(&root)?;
    host.fsck()?;
    host.ctl.ok(["scrub"])?;
    // Another store may not use the folder, but one beside it.
    let (mut other, _unused) = self::host()?;
    other.start(&[])?;
    let refused =
        other.ctl.run(["tier", "add", "s3://bucket/one/store", "--endpoint", &s3.endpoint()])?.failed_with(5)?;
    ensure!(refused.contains("belongs to another store"), "{refused}");
    add(&other, &s3, "other", &[])?;
    host.ctl.run(["tier", "remove"])?.failed_with(5)?;
    // What is dead goes there too.
    let before = s3.keys()?.len();
    host.ctl.ok(["remove", "app"])?;
    host.ctl.ok(["gc"])?;
    let after = s3.keys()?;
    ensure!(before > after.len() && !after.iter().any(|key| key.starts_with("one/store/packs/")), "{after:?}");
    host.ctl.ok(["tier", "remove"])?;
    let log = host.daemon.as_ref().context("no daemon")?.log_text();
    ensure!(!log.contains("very-secret"), "the secret key is in the log");
    Ok(())
}

/// What a read of the file fails with; none if it works.
fn read_error(path: &Path) -> Option<i32> {
    fs::read(path).err().and_then(|error| error.raw_os_error())
}

fn silent() -> anyhow::Result<()> {
    let (mut host, s3) = host()?;
    host.start(&[])?;
    let tree = source(&host, "tree", 92)?;
    host.import(&tree, "app", &[])?;
    add(&host, &s3, "store", &["--timeout", "2"])?;
    offload(&host)?;
    let local = source(&host, "local", 93)?;
    host.import(&local, "local", &[])?;
    host.stop()?;
    host.start(&[])?;
    let root = host.mount("app", "root", &["--read-only"])?;
    let other = host.mount("local", "other", &["--read-only"])?;
    s3.pause()?;
    let found = read_error(&root.join("big"));
    ensure!(found == Some(libc::EIO), "reading from a silent server gives {found:?}");
    compare::same_by_rsync(&local, &other)?;
    s3.resume()?;
    let deadline = Instant::now() + PATIENCE;
    while read_error(&root.join("big")).is_some() {
        ensure!(Instant::now() < deadline, "the server is back, and reading still fails");
        std::thread::sleep(Duration::from_millis(100));
    }
    compare::same_by_rsync(&tree, &root)?;
    host.umount(&root)?;
    host.umount(&other)?;
    // Without any server: what is here works, what isn't says so.
    drop(s3);
    host.stop()?;
    host.start(&[])?;
    host.export("local", &host.path("out"), &[])?;
    compare::same_by_rsync(&local, &host.path("out"))?;
    let said = host.ctl.run(["export", "app", &host.path("none").to_string_lossy()])?.failed_with(10)?;
    ensure!(said.contains("s3://bucket/store"), "{said}");
    Ok(())
}

fn lost() -> anyhow::Result<()> {
    let (mut host, s3) = host()?;
    host.start(&[])?;
    let (one, two) = (source(&host, "one", 94)?, source(&host, "two", 95)?);
    host.import(&one, "one", &[])?;
    add(&host, &s3, "store", &[])?;
    host.ctl.ok(["tier", "sync"])?;
    host.import(&two, "two", &[])?;
    offload(&host)?;
    let ids = host.names()?;
    host.stop()?;
    fs::remove_dir_all(host.ctl.store())?;
    let endpoint = s3.endpoint();
    let empty = ["fsck", "--rebuild", "--tier", "s3://bucket/nothing", "--endpoint", &endpoint];
    host.ctl.run(empty)?.failed_with(3)?;
    host.ctl.ok(["fsck", "--rebuild", "--tier", "s3://bucket/store", "--endpoint", &endpoint])?;
    host.start(&[])?;
    let names = host.names()?;
    for (name, tree) in [("one", &one), ("two", &two)] {
        let id = &ids[name];
        let (found, _) = names.iter().find(|(_, other)| *other == id).with_context(|| format!("{name} is lost"))?;
        let out = host.path(format!("out-{name}"));
        host.export(found, &out, &[])?;
        compare::same_by_rsync(tree, &out)?;
    }
    host.fsck()?;
    // And it goes on as the bucket's owner.
    host.import(&host.path("out-one"), "three", &[])?;
    host.ctl.ok(["tier", "sync"])?;
    host.ctl.ok(["tier", "fetch"])?;
    host.ctl.ok(["scrub"])?;
    Ok(())
}

fn each_step() -> anyhow::Result<()> {
    let (mut host, s3) = host()?;
    host.start(&[])?;
    let tree = source(&host, "tree", 96)?;
    host.import(&tree, "kept", &[])?;
    add(&host, &s3, "store", &[])?;
    host.stop()?;
    for (round, step) in STEPS.iter().enumerate() {
        host.start(&[])?;
        let extra = host.new_folder(&format!("extra-{round}"))?;
        tree::big_file(&extra.join("big"), round as u64 + 700, 2_000_000)?;
        host.import(&extra, "extra", &["--force"])?;
        host.stop()?;
        host.start(&["--crash-at", step])?;
        for line in [&["tier", "sync"][..], &["tier", "evict", "--keep", "0"], &["remove", "extra"], &["gc"]] {
            if host.ctl.run(line)?.code != 0 {
                break;
            }
        }
        host.wait_for_crash().with_context(|| (*step).to_owned())?;
        host.start(&[])?;
        host.fsck().with_context(|| format!("after {step}"))?;
        let out = host.path(format!("out-{round}"));
        host.export("kept", &out, &[])?;
        compare::same_by_rsync(&tree, &out).with_context(|| format!("after {step}"))?;
        // Then everything goes on: nothing here, and there only what has a record.
        host.ctl.ok(["gc"])?;
        offload(&host)?;
        let packs = s3.keys()?.iter().filter(|key| key.starts_with("store/packs/")).count() as u64;
        let status = host.ctl.json(["tier", "status"])?;
        ensure!(packs == number(&status, "stored_packs")?, "after {step}: {packs} objects, {status}");
        host.stop()?;
    }
    Ok(())
}
