//! What the store takes for what it has already: in other names, other folders, other times, another order.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Debian, Fuse, Root};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::ctl::number;
use layerfs_tests::host::Host;
use layerfs_tests::{compare, debian, tree};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("dedup::same_tree_again_and_shuffled", &[Root, Debian], same_tree),
        Case::new("dedup::sparse_disk_of_20_gb", &[], sparse_disk),
        Case::new("dedup::three_layers_of_an_application", &[Root, Fuse, Debian], three_layers),
    ]
}

fn same_tree() -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(debian::root()?, "debian", &[])?;
    let store = host.pack_bytes()?;
    let grown_by = |host: &Host, before: u64| anyhow::Ok((host.pack_bytes()? - before) as f64 / store as f64 * 100.0);

    host.import(debian::root()?, "same", &[])?;
    let again = grown_by(&host, store)?;
    ensure!(again < 0.1, "the same tree again took {again:.3}% of the store");

    // Folders renamed, every time touched, and a tar whose members come in the reverse order.
    let copy = host.path("copy");
    output_of(Command::new("cp").arg("-a").arg(debian::root()?).arg(&copy))?;
    for (from, to) in [
        ("usr/share/doc", "usr/share/papers"),
        ("usr/lib/x86_64-linux-gnu/perl-base", "usr/lib/perl-moved"),
        ("etc", "config"),
        ("usr/share/locale", "usr/locale"),
    ] {
        if copy.join(from).exists() {
            fs::rename(copy.join(from), copy.join(to)).with_context(|| format!("cannot rename {from}"))?;
        }
    }
    let script = format!(
        "cd '{0}'; find . -exec touch -h -d '2024-02-03 04:05:06.789' {{}} +; find . -print0 | sort -zr > '{0}.list'; tar --create --no-recursion --numeric-owner --null --files-from='{0}.list' --file='{0}.tar'",
        copy.display()
    );
    layerfs_tests::case::shell(&script)?;
    let before = host.pack_bytes()?;
    host.import(&host.path("copy.tar"), "shuffled", &[])?;
    let shuffled = grown_by(&host, before)?;
    ensure!(shuffled < 2.0, "renamed, touched and in another order, the tree took {shuffled:.2}% of the store");
    Ok(())
}

fn sparse_disk() -> anyhow::Result<()> {
    let host = Host::new()?;
    let disk = host.path("disk.raw");
    crate::roundtrip::sparse_disk(&disk, 20 << 30, 300)?;
    host.import(&disk, "disk", &[])?;
    let (data, packs) = (300u64 << 20, host.pack_bytes()?);
    ensure!(packs < data + data / 50, "300 MiB of random data in a 20 GiB image took {packs} bytes");
    let out = host.path("out.raw");
    host.export("disk", &out, &["--format", "raw"])?;
    ensure!(fs::metadata(&out)?.len() == 20 << 30, "the export has another size");
    let allocated = compare::allocated_bytes(&out)?;
    ensure!(
        allocated <= compare::allocated_bytes(&disk)? + compare::MAP_BLOCK_BYTES,
        "the export allocates {allocated} bytes"
    );
    Ok(())
}

fn three_layers() -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(debian::root()?, "base", &["--kind", "base"])?;
    let mounted = host.mount("base", "root", &[])?;
    // A real application: the largest of Python, Perl and the like that this machine has.
    let program = ["/usr/lib/python3.11", "/usr/lib/python3", "/usr/share/perl", "/usr/lib/gcc"]
        .into_iter()
        .find(|path| Path::new(path).is_dir());
    let program = program.context("this machine has neither Python nor Perl nor gcc")?;
    fs::create_dir_all(mounted.join("opt"))?;
    output_of(Command::new("cp").arg("-a").arg(program).arg(mounted.join("opt/app")))?;
    host.seal(&mounted, "application")?;
    fs::create_dir_all(mounted.join("var/lib/app"))?;
    tree::big_file(&mounted.join("var/lib/app/state"), 3, 20 << 20)?;
    fs::write(mounted.join("etc/hostname"), "edge\n")?;
    host.seal(&mounted, "instance")?;

    let unique = unique_bytes(&[debian::root()?, &mounted])?;
    let stat = host.ctl.json(["stat"])?;
    let taken = number(&stat, "plain_bytes")?;
    ensure!(
        taken <= unique + unique * 3 / 100,
        "three layers take {taken} plain bytes, their unique content is {unique}: {stat}"
    );
    ensure!(number(&stat, "stored_bytes")? < unique, "nothing was compressed: {stat}");
    Ok(())
}

/// Bytes of the files under `roots`, each content once.
fn unique_bytes(roots: &[&Path]) -> anyhow::Result<u64> {
    let mut contents = HashMap::new();
    for root in roots {
        compare::walk(root, &mut |path, metadata| {
            if metadata.is_file() {
                contents.insert(blake3::hash(&fs::read(path)?), metadata.len());
            }
            Ok(())
        })?;
    }
    Ok(contents.values().sum())
}
