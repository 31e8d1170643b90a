//! Stores that are damaged, from the future, full, read-only; commands that cannot be.
//!
//! Each failure has its documented exit code and a message, and no read ever gives bytes that were not put in.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Fuse, Namespaces, Root};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::compare;
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, PORT, TwoHosts, run_in};
use layerfs_tests::tree::{self, Random};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("damage::bits_flipped_in_packs", &[], flipped_bits),
        Case::new("damage::packs_cut_short", &[], truncated_packs),
        Case::new("damage::a_peer_heals", &[Root, Namespaces], healed_by_peer),
        Case::new("damage::index_rebuilt_from_packs", &[], rebuilt),
        Case::new("damage::a_store_from_the_future", &[], future),
        Case::new("damage::a_full_disk", &[Root], full_disk),
        Case::new("damage::a_read_only_disk", &[Root], read_only_disk),
        Case::new("damage::commands_that_cannot_be", &[Root, Fuse], impossible),
        Case::new("damage::noise_on_the_port", &[Root, Namespaces], noise_on_the_port),
    ]
}

/// A host with two layers, its daemon stopped, and the pack files.
fn stopped() -> anyhow::Result<Host> {
    let mut host = Host::new()?;
    let tree = host.path("tree");
    tree::fill(&tree, 81, 150, 6000)?;
    tree::big_file(&tree.join("big"), 82, 700_000)?;
    host.import(&tree, "tree", &[])?;
    host.stop()?;
    Ok(host)
}

fn packs(host: &Host) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(host.ctl.store().join("packs"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    paths.sort();
    ensure!(!paths.is_empty(), "the store has no packs");
    Ok(paths)
}

/// Fails unless the damage is found by fsck or scrub, and export fails or gives exactly what was put in.
fn damage_is_told(host: &mut Host, what: &str) -> anyhow::Result<()> {
    let out = host.path("out");
    match host.start(&[]) {
        Ok(()) => {
            let found = ["fsck", "scrub"].map(|check| host.ctl.run([check]).map(|answer| answer.code));
            let [fsck, scrub] = found;
            let (fsck, scrub) = (fsck?, scrub?);
            ensure!([0, 6].contains(&fsck) && [0, 6].contains(&scrub), "{what}: fsck {fsck}, scrub {scrub}");
            ensure!(fsck == 6 || scrub == 6, "{what}: neither fsck nor scrub saw it");
            let export = host.ctl.run(["export", "tree", &out.to_string_lossy()])?;
            if export.code == 0 {
                compare::same_by_rsync(&host.path("tree"), &out)
                    .with_context(|| format!("{what}: wrong bytes were given"))?;
            } else {
                // A manifest that is gone makes the layer "not there".
                let code = if export.code == 3 { 3 } else { 6 };
                export.failed_with(code).with_context(|| what.to_owned())?;
                ensure!(!out.exists(), "{what}: the failed export left its folder");
            }
            host.stop()?;
        }
        Err(error) => ensure!(format!("{error:#}").contains("damaged"), "{what}: the daemon does not start: {error:#}"),
    }
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    Ok(())
}

fn flipped_bits() -> anyhow::Result<()> {
    let mut host = stopped()?;
    let pack = packs(&host)?.remove(0);
    let whole = fs::read(&pack)?;
    let mut random = Random::new(83);
    let inside = (0..8).map(|_| random.below(whole.len() as u64) as usize);
    for at in [2, 5, 12, 20, 24, 40, 70].into_iter().chain(inside) {
        let file = fs::File::options().write(true).open(&pack)?;
        file.write_all_at(&[whole[at] ^ 0x10], at as u64)?;
        damage_is_told(&mut host, &format!("bit of byte {at} of {}", whole.len()))?;
        // The index may have noted what it found; the bytes are put back as they were.
        file.write_all_at(&whole[at..=at], at as u64)?;
    }
    host.start(&[])?;
    host.fsck()?;
    host.ctl.ok(["scrub"]).map(drop)
}

fn truncated_packs() -> anyhow::Result<()> {
    let mut host = stopped()?;
    let pack = packs(&host)?.remove(0);
    let whole = fs::read(&pack)?;
    for length in [0, 10, whole.len() / 3, whole.len() * 9 / 10, whole.len() - 1] {
        fs::write(&pack, &whole[..length])?;
        damage_is_told(&mut host, &format!("{length} bytes left of {}", whole.len()))?;
        fs::write(&pack, &whole)?;
    }
    fs::remove_file(&pack)?;
    damage_is_told(&mut host, "a pack removed")?;
    fs::write(&pack, &whole)?;
    host.start(&[])?;
    host.fsck()?;
    host.ctl.ok(["scrub"]).map(drop)
}

fn healed_by_peer() -> anyhow::Result<()> {
    let mut hosts = TwoHosts::new()?;
    let tree = hosts.a.path("tree");
    tree::fill(&tree, 84, 100, 6000)?;
    hosts.a.import(&tree, "tree", &[])?;
    hosts.push(&["tree"])?;
    hosts.a.stop()?;
    let pack = packs(&hosts.a)?.remove(0);
    let length = fs::metadata(&pack)?.len();
    let file = fs::File::options().read(true).write(true).open(&pack)?;
    for part in 2..8 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, length * part / 9)?;
        file.write_all_at(&[!byte[0]], length * part / 9)?;
    }
    hosts.a.start(&[])?;
    hosts.a.ctl.run(["scrub"])?.failed_with(6)?;
    hosts.a.ctl.ok(["scrub", "--heal", "b"])?;
    hosts.a.ctl.ok(["scrub"])?;
    hosts.a.fsck()?;
    hosts.a.export("tree", &hosts.a.path("out"), &[])?;
    compare::same_by_rsync(&tree, &hosts.a.path("out"))
}

fn rebuilt() -> anyhow::Result<()> {
    let mut host = stopped()?;
    fs::remove_dir_all(host.ctl.store().join("index"))?;
    // It tells that the names are lost, and those that it made up instead.
    let told = host.ctl.run(["fsck", "--rebuild"])?.failed_with(6)?;
    ensure!(told.contains("rebuil") || told.contains("names"), "{told}");
    host.start(&[])?;
    let names = host.names()?;
    let recovered = names
        .keys()
        .find(|name| name.starts_with("recovered/"))
        .with_context(|| format!("no recovered name in {names:?}"))?;
    host.export(recovered, &host.path("out"), &[])?;
    compare::same_by_rsync(&host.path("tree"), &host.path("out"))?;
    host.fsck()
}

fn future() -> anyhow::Result<()> {
    let mut host = stopped()?;
    let format = host.ctl.store().join("format");
    let today = fs::read(&format)?;
    fs::write(&format, "layerfs store 999\n")?;
    let message = host.ctl.run(["list"])?.failed_with(7)?;
    ensure!(message.contains("999"), "the message doesn't tell the version: {message}");
    fs::write(&format, Random::new(9).bytes(64))?;
    let answer = host.ctl.run(["list"])?;
    ensure!([2, 6, 7].contains(&answer.code), "a format file of noise: exit code {}", answer.code);
    fs::write(&format, today)?;
    host.start(&[])?;
    host.fsck()
}

/// A small filesystem of its own; unmounted when dropped.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    fn new(folder: &Path, size: &str) -> anyhow::Result<SmallDisk> {
        fs::create_dir_all(folder)?;
        output_of(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(folder))?;
        Ok(SmallDisk { folder: folder.to_owned() })
    }

    fn remount(&self, options: &str) -> anyhow::Result<()> {
        output_of(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.folder)).map(drop)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.folder, rustix::mount::UnmountFlags::DETACH);
    }
}

fn full_disk() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    let disk = SmallDisk::new(host.ctl.store(), "160m")?;
    host.start(&[])?;
    tree::fill(&host.path("small"), 91, 50, 3000)?;
    host.import(&host.path("small"), "small", &[])?;
    fs::create_dir(host.path("large"))?;
    tree::big_file(&host.path("large/noise"), 92, 200 << 20)?;
    let large = host.path("large").to_string_lossy().into_owned();
    host.ctl.run(["import", &large, "large"])?.failed_with(8)?;
    ensure!(!host.names()?.contains_key("large"), "the failed import has a name");
    host.fsck()?;
    // Space returns: nothing needs a restart.
    host.ctl.ok(["gc"])?;
    disk.remount("size=512m")?;
    host.import(&host.path("large"), "large", &[])?;
    host.fsck()?;
    host.export("small", &host.path("out"), &[])?;
    compare::same_by_rsync(&host.path("small"), &host.path("out"))?;
    host.kill()?;
    drop(disk);
    Ok(())
}

fn read_only_disk() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    let disk = SmallDisk::new(host.ctl.store(), "200m")?;
    host.start(&[])?;
    tree::fill(&host.path("tree"), 93, 50, 3000)?;
    host.import(&host.path("tree"), "tree", &[])?;
    host.stop()?;
    disk.remount("ro")?;
    let source = host.path("tree").to_string_lossy().into_owned();
    host.ctl.run(["import", &source, "again"])?.failed_with(9)?;
    disk.remount("rw")?;
    host.start(&[])?;
    ensure!(host.names()?.len() == 1, "the names changed");
    host.fsck()?;
    host.kill()?;
    drop(disk);
    Ok(())
}

fn impossible() -> anyhow::Result<()> {
    let host = Host::new()?;
    let tree = host.path("tree");
    tree::fill(&tree, 94, 30, 1000)?;
    host.import(&tree, "tree", &[])?;
    let names = host.names()?;
    let source = tree.to_string_lossy().into_owned();
    let mounted = host.mount("tree", "mounted", &[])?;
    let point = mounted.to_string_lossy().into_owned();
    let fails = |code: i32, args: &[&str]| host.ctl.run(args)?.failed_with(code).map(drop);

    fails(4, &["import", &source, "tree"])?;
    fails(4, &["tag", "tree", "tree"]).or_else(|_| host.ctl.ok(["tag", "tree", "tree"]).map(drop))?;
    fails(2, &["import", &source, "bad name\n"])?;
    fails(2, &["import", &source, "../escape"])?;
    fails(2, &["import", &source, ""])?;
    fails(3, &["import", &source, "child", "--parent", "none"])?;
    fails(3, &["mount", "none", &point])?;
    fails(3, &["mount", "tree", &format!("{point}-nowhere")])?;
    fails(3, &["export", "none", &format!("{point}-out")])?;
    fails(3, &["remove", "none"])?;
    fails(3, &["inspect", "tree", "/no/such/path"])?;
    fails(3, &["push", "tree", "nobody"])?;
    fails(3, &["diff", "tree", "none"])?;
    fails(2, &["import"])?;
    fails(2, &["frobnicate"])?;
    fails(2, &["inspect", "tree", "--frobnicate"])?;

    fs::write(mounted.join("new"), "new")?;
    fails(4, &["seal", &point, "tree"])?;
    fails(3, &["seal", &source, "sealed"]).or_else(|_| fails(2, &["seal", &source, "sealed"]))?;
    let open = fs::File::open(mounted.join("new"))?;
    fails(5, &["umount", &point])?;
    drop(open);
    ensure!(fs::read_to_string(mounted.join("new"))? == "new", "a refused command lost the change");
    ensure!(host.names()? == names, "refused commands changed the names");
    host.umount(&mounted)?;
    host.fsck()
}

fn noise_on_the_port() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    tree::fill(&hosts.a.path("tree"), 95, 50, 2000)?;
    hosts.a.import(&hosts.a.path("tree"), "tree", &[])?;
    let target = format!("{}:{PORT}", hosts.link.b.address);
    let program = "import socket,random,sys\nhost,port=sys.argv[1].split(':')\nkeep=[]\nfor n in range(40):\n  s=socket.create_connection((host,int(port)),5)\n  s.settimeout(2)\n  try:\n    if n%4==0: s.sendall(random.Random(n).randbytes(2000))\n    if n%4==1: s.sendall(b'\\x16\\x03\\x01\\xff\\xff'+bytes(3000))\n    if n%4==2: s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n  except OSError: pass\n  if n%4==3: keep.append(s)\n  else: s.close()\n";
    run_in(&hosts.a, "python3", &["-c", program, &target])?;
    let report = hosts.push(&["tree"])?;
    ensure!(number(&report, "layers_sent")? == 1, "{report}");
    hosts.b.fsck()
}
