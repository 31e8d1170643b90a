//! The row of a stack of three layers with 100,000 files: how long mounting takes, and what the daemon's memory is after `find`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use layerfs_tests::case::output_of;
use layerfs_tests::host::{Host, memory_of};

use crate::measure::middle;

pub const NAME: &str = "mount-stack";
/// Of each layer, the lowest first.
const FILES: [usize; 3] = [60_000, 30_000, 10_000];
const PER_FOLDER: usize = 100;

/// Prints the row; each time is the median of `runs`.
pub fn measure(runs: usize) -> anyhow::Result<()> {
    let host = Host::new()?;
    let mut lowers = Vec::new();
    for (layer, files) in FILES.into_iter().enumerate() {
        let folder = host.new_folder(&format!("layer{layer}"))?;
        fill(&folder, layer, files)?;
        let below = format!("layer{}", layer.wrapping_sub(1));
        let args: &[&str] = if layer == 0 { &[] } else { &["--parent", &below] };
        host.import(&folder, &format!("layer{layer}"), args)?;
        lowers.insert(0, folder.display().to_string());
    }
    let dir = host.new_folder("mnt")?;
    let at = dir.to_string_lossy().into_owned();
    let (mut ours, mut overlays) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        let started = Instant::now();
        host.ctl.ok(["mount", "layer2", &at])?;
        let seconds = started.elapsed().as_secs_f64();
        host.ctl.ok(["umount", &at, "--discard"])?;
        let started = Instant::now();
        let lower = format!("lowerdir={}", lowers.join(":"));
        output_of(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &lower, &at]))?;
        let overlay = started.elapsed().as_secs_f64();
        output_of(Command::new("umount").arg(&at))?;
        // The first maps the tables.
        if run > 0 {
            ours.push(seconds);
            overlays.push(overlay);
        }
    }
    let milliseconds = |times| middle(times).unwrap_or(f64::NAN) * 1e3;
    let (ours, overlays) = (milliseconds(ours), milliseconds(overlays));
    println!("{NAME:<24} {:<20} {ours:>11.1} ms {:>9}  10 (50), the command and all", "layerfs", "");
    println!("{:<24} {:<20} {overlays:>11.1} ms", "", "overlay, read-only");
    let pid = host.daemon.as_ref().context("there is no daemon")?.pid();
    for options in [&["--read-only"][..], &[]] {
        let before = resident(pid)?;
        host.ctl.ok(["mount", "layer2", &at].iter().chain(options))?;
        output_of(Command::new("sh").args(["-c", "find . -printf '%s %m %u %T@\\n' >/dev/null"]).current_dir(&dir))?;
        let after = resident(pid)?;
        let kind = if options.is_empty() { "layerfs" } else { "layerfs, read-only" };
        let shown = |(all, own): (u64, u64)| format!("{:.1} MB ({:.1} its own)", all as f64 / 1e6, own as f64 / 1e6);
        println!(
            "{:<24} {kind:<20} {} before, {} after find; goal 40, floor 80",
            "memory",
            shown(before),
            shown(after)
        );
        host.ctl.ok(["umount", &at].iter().chain(if options.is_empty() { &["--discard"][..] } else { &[] }))?;
    }
    Ok(())
}

fn fill(folder: &Path, layer: usize, files: usize) -> anyhow::Result<()> {
    for number in 0..files {
        let part = folder.join(format!("part-{:02}/group-{:03}", number / 10_000, number / PER_FOLDER));
        if number % PER_FOLDER == 0 {
            fs::create_dir_all(&part)?;
        }
        fs::write(
            part.join(format!("file-{layer}-{number:05}")),
            format!("file {number} of layer {layer}\n").repeat(30),
        )?;
    }
    Ok(())
}

/// What process `pid` holds in memory, in bytes; and what of it isn't pages of files.
fn resident(pid: u32) -> anyhow::Result<(u64, u64)> {
    Ok((memory_of(pid, "VmRSS")?, memory_of(pid, "RssAnon")?))
}
