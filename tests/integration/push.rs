//! What goes over the wire, by the report and by the interface's own count; and who may send what to whom.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Namespaces, Root};
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, PORT, TwoHosts, public_key};
use layerfs_tests::tree;

const KIB: u64 = 1024;
const BIG: u64 = 100_000_000;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("push::nothing_costs_nothing", &[Root, Namespaces], nothing),
        Case::new("push::one_byte_of_100_mb_among_50000_files", &[Root, Namespaces, Fuse], one_byte),
        Case::new("push::one_byte_of_a_disk_image", &[Root, Namespaces], one_byte_of_a_disk),
        Case::new("push::base_ahead_saves_its_bytes", &[Root, Namespaces], base_ahead),
        Case::new("push::pull_is_push_turned_round", &[Root, Namespaces], pull),
        Case::new("push::strangers_and_impostors", &[Root, Namespaces], strangers),
        Case::new("push::a_taken_name_stays", &[Root, Namespaces], taken_name),
        Case::new("push::what_a_peer_may_not_do", &[Root, Namespaces], rights),
        Case::new("push::a_cut_link_leaves_nothing_half", &[Root, Namespaces], cut_link),
    ]
}

/// What one push cost: bytes by the report, bytes at the interface in both directions.
struct Cost {
    reported: u64,
    at_interface: u64,
    chunks: u64,
}

fn push(hosts: &TwoHosts, name: &str) -> anyhow::Result<Cost> {
    let count = || anyhow::Ok(hosts.link.a.sent_bytes()? + hosts.link.a.received_bytes()?);
    let before = count()?;
    let report = hosts.push(&[name])?;
    let cost = Cost {
        reported: number(&report, "bytes_sent")? + number(&report, "bytes_received")?,
        at_interface: count()? - before,
        chunks: number(&report, "chunks_sent")?,
    };
    // Headers of packets, acknowledgements and the connection's start are the interface's only.
    ensure!(
        cost.reported <= cost.at_interface,
        "reported {} bytes, the interface saw {}",
        cost.reported,
        cost.at_interface
    );
    let overhead = cost.at_interface - cost.reported;
    ensure!(
        overhead <= 8 * KIB + cost.reported / 8,
        "reported {} bytes, the interface saw {}",
        cost.reported,
        cost.at_interface
    );
    Ok(cost)
}

fn nothing() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    tree::fill(&hosts.a.path("tree"), 1, 3000, 4000)?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    push(&hosts, "tree")?;
    let again = push(&hosts, "tree")?;
    ensure!(
        again.at_interface < 10_000 && again.chunks == 0,
        "pushing what is there cost {} bytes",
        again.at_interface
    );
    // Under another name, the layer is there too.
    hosts.a.ctl.ok(["tag", "tree", "other"])?;
    let tagged = push(&hosts, "other")?;
    ensure!(tagged.at_interface < 10_000, "another name for what is there cost {} bytes", tagged.at_interface);
    ensure!(hosts.a.names()? == hosts.b.names()?, "the names differ");
    Ok(())
}

/// The ids and stored sizes of the chunks of `path` in `name`.
fn chunks(host: &Host, name: &str, path: &str) -> anyhow::Result<Vec<(String, u64)>> {
    let shown = host.ctl.json(["inspect", name, path, "--chunks"])?;
    let items = shown["chunks"]
        .as_array()
        .or_else(|| shown["items"].as_array())
        .with_context(|| format!("no chunks in {shown}"))?;
    Ok(items
        .iter()
        .filter_map(|item| Some((item["id"].as_str()?.to_owned(), item["stored_bytes"].as_u64()?)))
        .collect())
}

/// Fails unless pushing `new`, in which a byte of `path` differs from `old`, costs the changed chunks and little more.
fn costs_a_byte(hosts: &TwoHosts, old: &str, new: &str, path: &str, most_chunks: usize) -> anyhow::Result<()> {
    let known: HashSet<_> = chunks(&hosts.a, old, path)?.into_iter().map(|(id, _)| id).collect();
    let fresh: Vec<_> = chunks(&hosts.a, new, path)?.into_iter().filter(|(id, _)| !known.contains(id)).collect();
    ensure!((1..=most_chunks).contains(&fresh.len()), "one byte changed {} chunks of {path}", fresh.len());
    let data: u64 = fresh.iter().map(|(_, bytes)| bytes).sum();
    let cost = push(hosts, new)?;
    let rest = cost.reported.saturating_sub(data);
    ensure!(rest < 64 * KIB, "{new}: {} chunks of {data} bytes, and {rest} bytes besides", fresh.len());
    Ok(())
}

fn change_middle(path: &Path) -> anyhow::Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, BIG / 2)?;
    file.write_all_at(&[byte[0] ^ 1], BIG / 2).context("cannot change the byte")
}

fn one_byte() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let source = hosts.a.path("tree");
    tree::fill(&source, 9, 50_000, 700)?;
    tree::big_file(&source.join("big"), 10, BIG)?;
    hosts.a.import(&source, "v1", &[])?;
    push(&hosts, "v1")?;

    change_middle(&source.join("big"))?;
    hosts.a.import(&source, "v2", &[])?;
    costs_a_byte(&hosts, "v1", "v2", "/big", 3)?;

    // The same, with a file more in front: known paths keep their numbers over a predecessor.
    change_middle(&source.join("big"))?;
    fs::write(source.join("a-new-file"), "first in the order of names")?;
    let file = fs::File::options().write(true).open(source.join("big"))?;
    file.write_all_at(b"x", BIG / 3)?;
    hosts.a.import(&source, "v3", &["--like", "v2"])?;
    costs_a_byte(&hosts, "v1", "v3", "/big", 3)?;

    let mounted = hosts.a.mount("v1", "mounted", &[])?;
    let file = fs::File::options().write(true).open(mounted.join("big"))?;
    file.write_all_at(b"!", BIG / 2)?;
    drop(file);
    hosts.a.seal(&mounted, "v4")?;
    costs_a_byte(&hosts, "v1", "v4", "/big", 3)?;
    hosts.a.umount(&mounted)?;
    hosts.b.fsck()
}

fn one_byte_of_a_disk() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let disk = hosts.a.path("disk.raw");
    tree::big_file(&disk, 4, BIG - BIG % 512)?;
    hosts.a.import(&disk, "disk1", &[])?;
    push(&hosts, "disk1")?;
    change_middle(&disk)?;
    hosts.a.import(&disk, "disk2", &[])?;
    costs_a_byte(&hosts, "disk1", "disk2", "/disk.raw", 1)
}

fn base_ahead() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let (base, more) = (hosts.a.path("base"), hosts.a.path("more"));
    tree::fill(&base, 21, 2000, 8000)?;
    tree::fill(&more.join("opt"), 22, 200, 8000)?;
    hosts.a.import(&base, "base", &["--kind", "base"])?;
    hosts.a.import(&more, "application", &["--parent", "base", "--kind", "application"])?;
    let cold = push(&hosts, "base")?;
    let warm = push(&hosts, "application")?;
    ensure!(warm.reported * 5 < cold.reported, "base {} bytes, application {} bytes", cold.reported, warm.reported);
    // Several names at once, all there: they appear together and cost nothing.
    hosts.push(&["base", "application"])?;
    ensure!(hosts.a.names()? == hosts.b.names()?, "the names differ");
    Ok(())
}

fn pull() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    tree::fill(&hosts.b.path("tree"), 31, 500, 6000)?;
    hosts.b.import(&hosts.b.path("tree"), "tree", &[])?;
    hosts.a.ctl.ok(["pull", "tree", "b"])?;
    ensure!(hosts.a.names()? == hosts.b.names()?, "the names differ");
    hosts.a.ctl.run(["pull", "no-such-layer", "b"])?.failed_with(3)?;
    hosts.a.export("tree", &hosts.a.path("out"), &[])?;
    layerfs_tests::compare::same_by_rsync(&hosts.b.path("tree"), &hosts.a.path("out"))
}

fn strangers() -> anyhow::Result<()> {
    let hosts = TwoHosts::strangers()?;
    tree::fill(&hosts.a.path("tree"), 41, 50, 1000)?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    hosts.a.ctl.run(["push", "tree", "b"])?.failed_with(3)?;
    let address = format!("{}:{PORT}", hosts.link.b.address);
    let refused = |what: &str| -> anyhow::Result<()> {
        let answer = hosts.a.ctl.run(["push", "tree", "b"])?;
        ensure!(matches!(answer.code, 9 | 10), "{what}: exit code {}\n{}", answer.code, answer.stderr);
        ensure!(!answer.stderr.trim().is_empty(), "{what}: failed without a word");
        ensure!(hosts.b.names()?.is_empty(), "{what}: something arrived");
        Ok(())
    };
    // We know them, they don't know us.
    hosts.a.ctl.ok(["peer", "add", "b", &address, "--key", &public_key(&hosts.b)?])?;
    refused("a stranger")?;
    // They know us, but are not whom we know: our own key is certainly not theirs.
    let back = format!("{}:{PORT}", hosts.link.a.address);
    hosts.b.ctl.ok(["peer", "add", "a", &back, "--key", &public_key(&hosts.a)?])?;
    hosts.a.ctl.ok(["peer", "remove", "b"])?;
    hosts.a.ctl.ok(["peer", "add", "b", &address, "--key", &public_key(&Host::new()?)?])?;
    refused("an impostor")?;
    hosts.a.ctl.run(["peer", "add", "c", &address, "--key", "not-a-key"])?.failed_with(2)?;
    // Nobody listens there.
    hosts.a.ctl.ok(["peer", "remove", "b"])?;
    hosts.a.ctl.ok(["peer", "add", "b", &format!("{}:1", hosts.link.b.address), "--key", &public_key(&hosts.b)?])?;
    hosts.a.ctl.run(["push", "tree", "b"])?.failed_with(10)?;
    hosts.b.fsck()
}

fn taken_name() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    for (host, seed) in [(&hosts.a, 51), (&hosts.b, 52)] {
        tree::fill(&host.path("tree"), seed, 50, 2000)?;
        host.import(&host.path("tree"), "tree", &[])?;
    }
    let before = hosts.b.names()?;
    hosts.a.ctl.run(["push", "tree", "b"])?.failed_with(4)?;
    ensure!(hosts.b.names()? == before, "the refused push changed the names");
    hosts.a.ctl.ok(["push", "tree", "b", "--force"])?;
    ensure!(hosts.b.names()? == hosts.a.names()?, "the forced push did not change the name");
    Ok(())
}

fn rights() -> anyhow::Result<()> {
    let hosts = TwoHosts::strangers()?;
    for name in ["public/one", "secret/two"] {
        tree::fill(&hosts.b.path(name), name.len() as u64, 50, 2000)?;
        hosts.b.import(&hosts.b.path(name), name, &[])?;
    }
    let (to_a, to_b) = (format!("{}:{PORT}", hosts.link.a.address), format!("{}:{PORT}", hosts.link.b.address));
    hosts.a.ctl.ok(["peer", "add", "b", &to_b, "--key", &public_key(&hosts.b)?])?;
    hosts.b.ctl.ok([
        "peer",
        "add",
        "a",
        &to_a,
        "--key",
        &public_key(&hosts.a)?,
        "--allow",
        "pull",
        "--visible",
        "public/*",
    ])?;
    hosts.a.ctl.ok(["pull", "public/one", "b"])?;
    // What may not be seen is not there, rather than forbidden.
    hosts.a.ctl.run(["pull", "secret/two", "b"])?.failed_with(3)?;
    hosts.a.ctl.ok(["tag", "public/one", "mine"])?;
    hosts.a.ctl.run(["push", "mine", "b"])?.failed_with(9)?;
    ensure!(!hosts.b.names()?.contains_key("mine"), "a forbidden push arrived");
    Ok(())
}

fn cut_link() -> anyhow::Result<()> {
    let mut hosts = TwoHosts::new()?;
    tree::fill(&hosts.a.path("tree"), 61, 400, 50_000)?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    // So slow that what is left takes many seconds when it is time.
    hosts.link.shape(10)?;
    let mut pushing = hosts.a.ctl.command(["push", "tree", "b"]);
    let mut child = pushing.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    while hosts.link.a.sent_bytes()? < 3_000_000 && child.try_wait()?.is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The other side goes away in the middle: what is left can't be sent before that, though it may take its time to come.
    hosts.link.shape(1)?;
    hosts.b.kill()?;
    hosts.link.shape(200)?;
    ensure!(!child.wait()?.success(), "the push succeeded though the other side had gone");
    hosts.b.start(&[])?;
    ensure!(hosts.b.names()?.is_empty(), "half a push has a name");
    hosts.b.fsck()?;
    let rest = hosts.push(&["tree"])?;
    ensure!(number(&rest, "chunks_sent")? > 0, "{rest}");
    ensure!(hosts.b.names()? == hosts.a.names()?, "the names differ");
    hosts.b.fsck()
}
