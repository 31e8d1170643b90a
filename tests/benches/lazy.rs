//! A 1 GB image with python3 in it, mounted lazily over 100 Mbit/s: when the first program answers.
//!
//! Each time counts from the pull's beginning to the program's answer, mount included; caches of the kernel are dropped
//! before, and the source's are warm. The image is a Debian root with python3, filled up to 1 GB.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use layerfs_tests::case::output_of;
use layerfs_tests::ctl::number;
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::{debian, network, tree};

use crate::table::{Row, Table};
use crate::{Plan, size_of};

const MEGABITS: u32 = 100;
const IMAGE_BYTES: u64 = 1_000_000_000;

/// The rows of this part.
pub fn rows(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    network::usable()?;
    let image = plan.work.path().join("image");
    let root = debian::python_root()?;
    output_of(Command::new("cp").arg("-a").arg(root).arg(&image))?;
    let missing = IMAGE_BYTES.saturating_sub(size_of(&image)?);
    tree::fill(&image.join("srv"), 3, (missing / 2 / 25_000) as u32, 25_000)?;
    let missing = IMAGE_BYTES.saturating_sub(size_of(&image)?);
    tree::big_file(&image.join("srv/data"), 4, missing)?;
    let mut hosts = TwoHosts::new()?;
    hosts.a.import(&image, "image", &[])?;
    hosts.link.shape(MEGABITS)?;

    let started = Instant::now();
    hosts.b.ctl.ok(["pull", "image", "a"])?;
    let whole = started.elapsed().as_secs_f64();
    restart(&mut hosts.b)?;
    let cold = run(&hosts.b, "cold")?;
    let trace = hosts.b.ctl.json(["trace", "list"])?;
    let needed = number(&trace["traces"][0], "stored_bytes")?;

    hosts.b.ctl.ok(["trace", "remove", "--all"])?;
    let (first, _) = lazily(&mut hosts, "first")?;
    let (second, structure) = lazily(&mut hosts, "second")?;
    let over_link = (needed + structure) as f64 * 8.0 / (f64::from(MEGABITS) * 1e6);
    let row = |what: &str, ours, goal, met| Row { what: what.into(), unit: "s", ours, peers: Vec::new(), goal, met };
    table.add(row("lazy: the whole image", whole, "-".into(), None));
    table.add(row("lazy: python3 from the local store, cold", cold, "-".into(), None));
    table.add(row("lazy: what python3 reads, over the link", over_link, "-".into(), None));
    let tenth = whole / 10.0;
    table.add(row("lazy: python3, first run", first, format!("under {tenth:.2}"), Some(first < tenth)));
    let most = 2.0 * cold + over_link;
    table.add(row("lazy: python3, with a trace", second, format!("at most {most:.2}"), Some(second <= most)));
    Ok(())
}

/// Pulls the image lazily into a store that has nothing of it, and runs the program. The seconds from the pull to the
/// answer, and the bytes that the pull took.
fn lazily(hosts: &mut TwoHosts, at: &str) -> anyhow::Result<(f64, u64)> {
    hosts.b.ctl.ok(["remove", "image"])?;
    forget(&hosts.b)?;
    restart(&mut hosts.b)?;
    let started = Instant::now();
    let report = hosts.b.ctl.json(["pull", "image", "a", "--lazy"])?;
    run(&hosts.b, at)?;
    Ok((started.elapsed().as_secs_f64(), number(&report, "bytes_received")?))
}

/// A daemon has chunks in memory: they are no part of what is measured.
fn restart(host: &mut Host) -> anyhow::Result<()> {
    host.stop()?;
    host.start(&[])
}

/// Collects until nothing is left: what a transfer that is just ending has brought stays until it has ended.
fn forget(host: &Host) -> anyhow::Result<()> {
    for _ in 0..300 {
        host.ctl.ok(["gc", "--unfinished"])?;
        if number(&host.ctl.json(["stat"])?, "chunks")? == 0 {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    anyhow::bail!("the store does not get empty")
}

/// Mounts the image and runs the program in it: the seconds that both took.
fn run(host: &Host, at: &str) -> anyhow::Result<f64> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the caches")?;
    let started = Instant::now();
    let mounted = host.mount("image", at, &[])?;
    let answer = python(&mounted)?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(answer.trim() == "1", "python3 said {answer:?}");
    host.umount(&mounted)?;
    Ok(seconds)
}

fn python(root: &Path) -> anyhow::Result<String> {
    output_of(Command::new("chroot").arg(root).args(["/usr/bin/python3", "-c", "print(1)"]))
}
