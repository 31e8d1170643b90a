//! What goes in comes out: through import, push, mount and export, in every format, judged by rsync.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use layerfs_tests::case::Need::{Debian, Fuse, Namespaces, Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::{compare, debian, tree, zoo};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "roundtrip::zoo_by_folder_and_mount",
            &[Root, Fuse, Tool("rsync"), Tool("setfacl"), Tool("setcap")],
            zoo_by_folder,
        ),
        Case::new("roundtrip::zoo_by_tar", &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap")], zoo_by_tar),
        Case::new("roundtrip::compressed_tars_and_pipes", &[Tool("rsync"), Tool("xz"), Tool("zstd")], compressed_tars),
        Case::new(
            "roundtrip::debian_root_pushed_and_mounted",
            &[Root, Fuse, Namespaces, Debian, Tool("rsync"), Tool("setfacl")],
            debian_pushed,
        ),
        Case::new("roundtrip::disk_images", &[Tool("qemu-img")], disk_images),
        Case::new("roundtrip::export_refuses_what_is_there", &[], export_refuses),
    ]
}

/// The zoo as a folder of a host, with `root` itself of a known time.
fn make_zoo(host: &Host) -> anyhow::Result<std::path::PathBuf> {
    let source = host.new_folder("source")?;
    zoo::fill(&source)?;
    zoo::set_time(&source, 1_700_000_000, 42)?;
    Ok(source)
}

fn all_equal(source: &Path, copy: &Path) -> anyhow::Result<()> {
    compare::same_by_rsync(source, copy)?;
    compare::same_hard_links(source, copy)
}

fn zoo_by_folder() -> anyhow::Result<()> {
    let host = Host::new()?;
    let source = make_zoo(&host)?;
    host.import(&source, "zoo", &["--kind", "base"])?;

    host.export("zoo", &host.path("exported"), &[])?;
    all_equal(&source, &host.path("exported"))?;
    compare::no_more_allocated(&source, &host.path("exported"))?;

    let read_only = host.mount("zoo", "ro", &["--read-only"])?;
    all_equal(&source, &read_only)?;
    compare::no_more_allocated(&source, &read_only)?;
    ensure!(fs::write(read_only.join("new"), "").is_err(), "a read-only mount took a write");
    let writable = host.mount("zoo", "rw", &[])?;
    all_equal(&source, &writable)?;

    // Every file touched by a write of what it holds already: still the same tree, but for times.
    let attributes = writable.join("zoo/attributes/xattrs");
    fs::write(&attributes, "xattrs")?;
    compare::same_by_rsync_with(&source.join("zoo/attributes"), &writable.join("zoo/attributes"), &["-rlpgoDHAXS"])?;
    host.umount(&read_only)?;
    host.umount(&writable)?;
    host.fsck()
}

fn zoo_by_tar() -> anyhow::Result<()> {
    let host = Host::new()?;
    let source = make_zoo(&host)?;
    // A tar archive has no sockets, and GNU tar writes hard links of files only.
    fs::remove_file(source.join("zoo/specials/socket"))?;
    fs::remove_file(source.join("zoo/specials/null-too"))?;
    zoo::set_time(&source.join("zoo/specials"), 1_700_000_001, 0)?;
    let archive = host.path("zoo.tar");
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--format=posix",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        "--sparse",
        "--numeric-owner",
        "--file",
    ]);
    output_of(tar.arg(&archive).arg("-C").arg(&source).arg("."))?;
    host.import(&archive, "zoo", &[])?;
    host.export("zoo", &host.path("exported"), &[])?;
    all_equal(&source, &host.path("exported"))?;
    compare::no_more_allocated(&source, &host.path("exported"))?;

    host.export("zoo", &host.path("again.tar"), &[])?;
    let unpacked = host.new_folder("unpacked")?;
    let mut tar = Command::new("tar");
    tar.args([
        "--extract",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        "--preserve-permissions",
        "--same-owner",
        "--numeric-owner",
        "--file",
    ]);
    output_of(tar.arg(host.path("again.tar")).arg("-C").arg(&unpacked))?;
    all_equal(&source, &unpacked)?;
    compare::no_more_allocated(&source, &unpacked)?;

    host.import(&host.path("again.tar"), "again", &[])?;
    let names = host.names()?;
    ensure!(names["again"] == names["zoo"], "our own tar gives another layer: {names:?}");
    Ok(())
}

fn compressed_tars() -> anyhow::Result<()> {
    let host = Host::new()?;
    let source = host.path("source");
    tree::fill(&source, 5, 200, 9000)?;
    let archive = host.path("plain.tar");
    output_of(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&source).arg("."))?;
    host.import(&archive, "plain", &[])?;
    for (program, ending) in [("gzip", "gz"), ("zstd", "zst"), ("xz", "xz")] {
        // Under a name that doesn't tell: the content is what counts.
        let packed = host.path(format!("packed-{ending}"));
        layerfs_tests::case::shell(&format!("{program} -c '{}' > '{}'", archive.display(), packed.display()))?;
        host.import(&packed, ending, &[])?;
        let mut through_pipe = host.ctl.command(["import", "-", &format!("piped-{ending}")]);
        output_of(through_pipe.stdin(fs::File::open(&packed)?))?;
    }
    let names = host.names()?;
    ensure!(
        names.len() == 7 && names.values().all(|id| *id == names["plain"]),
        "the same tree, several layers: {names:?}"
    );

    for format in ["out.tar", "out.tar.gz", "out.tar.zst"] {
        host.export("plain", &host.path(format), &[])?;
        host.import(&host.path(format), &format.replace('.', "-"), &[])?;
        ensure!(host.names()?[&format.replace('.', "-")] == names["plain"], "{format} holds another tree");
    }
    let piped = host.ctl.ok(["export", "plain", "-"])?;
    ensure!(piped.stdout == fs::read(host.path("out.tar"))?, "the tar on stdout is not the one in the file");
    Ok(())
}

fn debian_pushed() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let source = hosts.a.path("source");
    output_of(Command::new("cp").arg("-a").arg(debian::root()?).arg(&source))?;
    zoo::fill(&source)?;
    hosts.a.import(&source, "debian", &["--kind", "base"])?;
    let report = hosts.push(&["debian"])?;
    ensure!(number(&report, "layers_sent")? == 1, "{report}");

    let mounted = hosts.b.mount("debian", "mounted", &["--read-only"])?;
    all_equal(&source, &mounted)?;
    compare::no_more_allocated(&source, &mounted)?;
    hosts.b.umount(&mounted)?;
    let exported = hosts.b.path("exported");
    hosts.b.export("debian", &exported, &[])?;
    all_equal(&source, &exported)?;
    compare::no_more_allocated(&source, &exported)?;
    ensure!(hosts.a.names()? == hosts.b.names()?, "the layer has another id on the other side");
    hosts.b.fsck()?;
    hosts.b.ctl.ok(["scrub"]).map(drop)
}

fn disk_images() -> anyhow::Result<()> {
    let host = Host::new()?;
    let raw = host.path("disk.raw");
    sparse_disk(&raw, 1 << 30, 40)?;
    host.import(&raw, "raw", &[])?;
    let qcow2 = host.path("disk.qcow2");
    output_of(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&qcow2))?;
    host.import(&qcow2, "qcow2", &[])?;
    for name in ["raw", "qcow2"] {
        let out = host.path(format!("{name}.img"));
        host.export(name, &out, &["--format", "raw"])?;
        output_of(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&raw).arg(&out))?;
        ensure!(
            compare::allocated_bytes(&out)? <= compare::allocated_bytes(&raw)? + compare::MAP_BLOCK_BYTES,
            "{name}: the export allocates more than the image"
        );
    }
    Ok(())
}

/// A sparse file of `size` bytes with `megabytes` of data in it, strewn.
pub fn sparse_disk(path: &Path, size: u64, megabytes: u64) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path)?;
    file.set_len(size)?;
    let mut random = tree::Random::new(size ^ megabytes);
    let slot = size / megabytes;
    for number in 0..megabytes {
        let offset = (number * slot + random.below(slot - (1 << 20))) & !4095;
        file.write_all_at(&random.bytes(1 << 20), offset)?;
    }
    Ok(())
}

fn export_refuses() -> anyhow::Result<()> {
    let host = Host::new()?;
    tree::fill(&host.path("source"), 1, 20, 1000)?;
    host.import(&host.path("source"), "some", &[])?;
    let full = host.new_folder("full")?;
    fs::write(full.join("mine"), "precious")?;
    let full_text = full.to_string_lossy().into_owned();
    host.ctl.run(["export", "some", &full_text])?.failed_with(4)?;
    ensure!(fs::read_dir(&full)?.count() == 1, "the refused export left something in {full_text}");
    host.ctl.run(["export", "none", &host.path("x").to_string_lossy()])?.failed_with(3)?;
    ensure!(!host.path("x").exists(), "the failed export left its folder");
    Ok(())
}
