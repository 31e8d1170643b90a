//! Table I, the paper's printed values beside both measurements, and whether we are where we want to be; as Markdown.

use std::fmt::Write as _;

use crate::cell::{App, Case, Cell, Kind, Method};
use crate::printed::{FIGURE_5, FIGURE_5_RATIOS, printed};
use crate::record::{Record, Records, write_whole};
use crate::verdict::goals;

const HEAD: &str = "# Live Service Migration in Mobile Edge Clouds, measured again

Written by `make paper`; don't edit. Every figure comes from a file in `cells/`, one per measurement.

Two hosts in network namespaces, 100 Mbit/s between them (a token bucket); the user on a network of its own. *Printed* is what the paper
has in its Table I; *paper's method* is that method on this machine: copies of folders or disks, `rsync -az`, and the tools' own
checkpoints; *ours* is `layerctl migrate`. Total is from the command's start to its end; MB (10⁶ bytes) are both directions of the link,
frames and all; downtime is the longest time that the application's client is without an answer: without an application the guest's
first program is asked, the game server by its own protocol, the RAM simulation for the pages that it has rewritten and the face detection for the
frames that it has looked at, each every 4 ms over UDP; the film is read over HTTP as it comes (15 pictures a second), and must stay whole.

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
    figures(&mut text, records)?;
    for (name, what) in crate::figure::NAMES {
        if records.0.join(name).exists() {
            let _ = write!(text, "\n![{what}]({name})\n");
        }
    }
    circumstances(&mut text, records)?;
    write_whole(&records.0.join("README.md"), text.as_bytes())
}

/// What Figure 5 shows, in numbers.
fn figures(text: &mut String, records: &Records) -> anyhow::Result<()> {
    text.push_str("\n## Figures 4 and 5\n\n");
    text.push_str("The paper's are pictures without numbers. What its text says of Figure 5:\n\n");
    for line in FIGURE_5 {
        let _ = writeln!(text, "- {line}");
    }
    text.push_str("\nHow many times as long as LXC the machine takes here (emulated: it computes and boots more slowly than with KVM):\n\n");
    text.push_str("| | printed | paper's method | ours |\n|---|---|---|---|\n");
    for claim in FIGURE_5_RATIOS {
        let app = App::Ram(claim.megabytes);
        let mut columns = vec![claim.times.to_owned()];
        for method in Method::ALL {
            let cell = |kind| Cell { kind, app, case: Case::Found, megabits: claim.megabits, method };
            let times = records.get(cell(Kind::Kvm))?.zip(records.get(cell(Kind::Lxc))?);
            columns.push(
                times.map_or_else(unmeasured, |(kvm, lxc)| format!("{:.1}", kvm.total_seconds / lxc.total_seconds)),
            );
        }
        let _ = writeln!(text, "| {} MB, {} Mbit/s | {} |", claim.megabytes, claim.megabits, columns.join(" | "));
    }
    text.push_str("\nThe RAM simulation, three layers, found: total, data, downtime.\n");
    let by_memory = Cell::by_memory();
    let by_rate = Cell::by_rate();
    for (cells, unit) in [(&by_memory, "MB"), (&by_rate, "Mbit/s")] {
        let value = |cell: &Cell| match cell.app {
            App::Ram(megabytes) if unit == "MB" => megabytes,
            _ => cell.megabits,
        };
        let _ = write!(
            text,
            "\n| {unit} | LXC, paper's method | LXC, ours | KVM, paper's method | KVM, ours |\n|---|---|---|---|---|\n"
        );
        let mut values: Vec<u32> = cells.iter().map(value).collect();
        values.sort_unstable();
        values.dedup();
        for at in values {
            let mut columns = Vec::new();
            for cell in cells.iter().filter(|cell| value(cell) == at) {
                columns.push(records.get(*cell)?.as_ref().map_or_else(unmeasured, measured));
            }
            let _ = writeln!(text, "| {at} | {} |", columns.join(" | "));
        }
    }
    Ok(())
}

fn unmeasured() -> String {
    "not measured yet".to_owned()
}

/// When, by what and beside what it was measured.
fn circumstances(text: &mut String, records: &Records) -> anyhow::Result<()> {
    let cells = Cell::all();
    let mut found = Vec::new();
    for cell in &cells {
        found.extend(records.get(*cell)?);
    }
    let _ = write!(text, "\n## Circumstances\n\n{} of {} cells are measured.", found.len(), cells.len());
    let (noted, early): (Vec<&Record>, Vec<&Record>) = found.iter().partition(|record| !record.build.is_empty());
    if !early.is_empty() {
        let _ = write!(
            text,
            " Those marked † ({}) are of earlier builds, and their downtime is what the guest's first program was without an answer.",
            early.len()
        );
    }
    let mut busy: Vec<f64> = noted.iter().map(|record| record.busy * 100.0).collect();
    busy.sort_by(f64::total_cmp);
    if let (Some(least), Some(most)) = (busy.first(), busy.last()) {
        let _ = write!(
            text,
            " The processors were busy for {least:.0} to {most:.0}% (median {:.0}%) of the second before the migrations of the others, with \
             the guests and their clients, which machines take most of.",
            busy[busy.len() / 2]
        );
    }
    let mut sets: Vec<(&str, &str, &str)> = Vec::new();
    for record in &noted {
        let set = (record.day.as_str(), record.build.as_str(), record.machine.as_str());
        if !sets.contains(&set) {
            sets.push(set);
        }
    }
    text.push_str("\n\n");
    for (day, build, machine) in sets {
        let count = noted.iter().filter(|one| (one.day.as_str(), one.build.as_str()) == (day, build)).count();
        let _ = writeln!(text, "- {day}, build {build}, {machine}: {count} cells");
    }
    Ok(())
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
            let columns = columns.map(|column| column.unwrap_or_else(unmeasured));
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
    let mark = if record.build.is_empty() { " †" } else { "" };
    let megabytes = record.wire_bytes as f64 / 1e6;
    format!("{:.1} s, {megabytes:.1} MB, {:.2} s{mark}", record.total_seconds, record.downtime_seconds)
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
