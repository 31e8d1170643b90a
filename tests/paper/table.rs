//! Table I, the paper's printed values beside both measurements, and whether we are where we want to be; as Markdown.

use std::fmt::Write as _;

use crate::cell::{App, Case, Cell, Kind, Method};
use crate::printed::{FIGURE_5, printed};
use crate::record::{Record, Records, write_whole};
use crate::verdict::goals;

const HEAD: &str = "# Live Service Migration in Mobile Edge Clouds, measured again

Written by `make paper`; don't edit. Every figure comes from a file in `cells/`, one per measurement.

Two hosts in network namespaces, 100 Mbit/s between them (a token bucket); the user on a network of its own. *Printed* is what the paper
has in its Table I; *paper's method* is that method on this machine: copies of folders or disks, `rsync -az`, and the tools' own
checkpoints; *ours* is `layerctl migrate`. Total is from the command's start to its end; MB (10⁶ bytes) are both directions of the link,
frames and all; downtime is the longest time that a client, which asks every 4 ms over UDP, is without an answer.

What differs from the paper: the guest is Debian 12; machines are emulated (QEMU without KVM); the user's network is neither
limited nor delayed; the game server is Teeworlds; the film is drawn by `scripts/setup-paper`; the paper's method uses rsync's own daemon
instead of ssh, a network at the destination that is ready beforehand, and its clients are told at once where the guest is; each cell is
one run, not the mean of ten.
";

/// Writes README.md.
pub fn write(records: &Records) -> anyhow::Result<()> {
    let mut text = HEAD.to_owned();
    for kind in [Kind::Lxc, Kind::Kvm] {
        table(&mut text, records, kind)?;
    }
    verdicts(&mut text, records)?;
    text.push_str("\n## Figures 4 and 5\n\n");
    text.push_str("The paper's are pictures without numbers. What its text says of Figure 5:\n\n");
    for line in FIGURE_5 {
        let _ = writeln!(text, "- {line}");
    }
    for (name, what) in crate::figure::NAMES {
        if records.0.join(name).exists() {
            let _ = write!(text, "\n![{what}]({name})\n");
        }
    }
    write_whole(&records.0.join("README.md"), text.as_bytes())
}

fn table(text: &mut String, records: &Records, kind: Kind) -> anyhow::Result<()> {
    let title = if kind == Kind::Kvm { "KVM (emulated)" } else { "LXC" };
    let _ = write!(text, "\n## Table I: {title}\n\n");
    text.push_str("Each cell: total, data, downtime.\n\n");
    text.push_str("| application | layers | printed | paper's method | ours |\n|---|---|---|---|---|\n");
    for app in App::ROWS {
        for case in Case::ALL {
            let there = printed(kind, app, case)
                .map(|printed| shown(printed.total_seconds, printed.megabytes, printed.downtime_seconds));
            let cell = Cell::of_table(kind, app, case, Method::Paper);
            let (paper, ours) = (records.get(cell)?, records.get(cell.by(Method::Ours))?);
            let columns = [there, paper.as_ref().map(measured), ours.as_ref().map(measured)];
            let columns = columns.map(|column| column.unwrap_or_else(|| "not measured yet".to_owned()));
            let case = match case {
                Case::Two => "2",
                Case::NotFound => "3, not found",
                Case::Found => "3, found",
            };
            let _ = writeln!(text, "| {} | {case} | {} |", app.title(), columns.join(" | "));
        }
    }
    Ok(())
}

fn shown(total: f64, megabytes: f64, down: f64) -> String {
    format!("{total:.1} s, {megabytes:.1} MB, {down:.1} s")
}

fn measured(record: &Record) -> String {
    format!("{:.1} s, {:.1} MB, {:.2} s", record.total_seconds, record.wire_bytes as f64 / 1e6, record.downtime_seconds)
}

fn verdicts(text: &mut String, records: &Records) -> anyhow::Result<()> {
    text.push_str("\n## Against the paper's method, with the application found\n\n");
    text.push_str(
        "Downtime beyond what the checkpoint and restore tools take in both: at most a quarter, a tenth for the RAM\n",
    );
    text.push_str("simulation and for machines. Bytes at most half, or 1.05 times where memory is new and can't be compressed. Total time at\n");
    text.push_str(
        "most half, except where the bytes alone take longer.\n\n| cell | goal | ours | |\n|---|---|---|---|\n",
    );
    for kind in [Kind::Lxc, Kind::Kvm] {
        for app in App::ROWS {
            let cell = Cell::of_table(kind, app, Case::Found, Method::Paper);
            let (Some(paper), Some(ours)) = (records.get(cell)?, records.get(cell.by(Method::Ours))?) else {
                let _ = writeln!(text, "| {}/{} | | not measured yet | |", kind.as_str(), app.name());
                continue;
            };
            for goal in goals(cell, &paper, &ours) {
                let met = if goal.is_met { "met" } else { "**missed**" };
                let _ = writeln!(text, "| {}/{} | {} | {} | {met} |", kind.as_str(), app.name(), goal.what, goal.text);
            }
        }
    }
    Ok(())
}
