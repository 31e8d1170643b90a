//! Figures 4 and 5, drawn as SVG from what was measured: stages as bars, and lines over memory size and the link's rate.

use std::fmt::Write as _;

use crate::cell::{App, Case, Cell, Kind, Method};
use crate::record::{Record, Records, write_whole};

/// The files, and what they show.
pub const NAMES: [(&str, &str); 4] = [
    ("figure-4-lxc.svg", "Figure 4: LXC, three layers, application not found, by stages"),
    ("figure-4-kvm.svg", "Figure 4: KVM, three layers, application not found, by stages"),
    ("figure-5-memory.svg", "Figure 5: total time by memory"),
    ("figure-5-rate.svg", "Figure 5: total time by the link's rate"),
];

const WIDTH: f64 = 900.0;
const LEFT: f64 = 190.0;
const BAR: f64 = 22.0;
const COLOURS: [&str; 10] =
    ["#4e79a7", "#a0cbe8", "#59a14f", "#8cd17d", "#b6992d", "#e15759", "#f28e2b", "#9c755f", "#b07aa1", "#79706e"];

/// Writes those for which something was measured.
pub fn write(records: &Records) -> anyhow::Result<()> {
    for (kind, (name, title)) in [Kind::Lxc, Kind::Kvm].into_iter().zip(NAMES) {
        let mut bars = Vec::new();
        for app in App::ROWS {
            for method in Method::ALL {
                if let Some(record) = records.get(Cell::of_table(kind, app, Case::NotFound, method))? {
                    let who = if method == Method::Paper { "paper's method" } else { "ours" };
                    bars.push((format!("{}, {who}", app.title()), record));
                }
            }
        }
        if !bars.is_empty() {
            write_whole(&records.0.join(name), stages(title, &bars).as_bytes())?;
        }
    }
    let of_memory = |cell: &Cell| match cell.app {
        App::Ram(megabytes) => f64::from(megabytes),
        _ => 0.0,
    };
    lines(records, &NAMES[2], "MB of memory", &Cell::by_memory(), of_memory)?;
    lines(records, &NAMES[3], "Mbit/s", &Cell::by_rate(), |cell| f64::from(cell.megabits))
}

fn begin(height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <defs><pattern id=\"down\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
         <rect width=\"2\" height=\"6\" fill=\"#000\" fill-opacity=\"0.45\"/></pattern></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"10\" y=\"20\" font-size=\"14\">{title}</text>\n"
    )
}

/// A length of the axis that is at least `most` and easy to read.
fn round_up(most: f64) -> f64 {
    let unit = 10f64.powf(most.max(0.1).log10().floor());
    [1.0, 2.0, 5.0, 10.0].iter().map(|times| times * unit).find(|length| *length >= most).unwrap_or(most)
}

fn stages(title: &str, bars: &[(String, Record)]) -> String {
    let most = bars.iter().map(|(_, record)| record.stages.iter().map(|stage| stage.seconds).sum::<f64>());
    let longest = round_up(most.fold(0.1, f64::max));
    let scale = (WIDTH - LEFT - 30.0) / longest;
    let mut names: Vec<String> = Vec::new();
    for stage in bars.iter().flat_map(|(_, record)| &record.stages) {
        let name = family(&stage.name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let bottom = 40.0 + bars.len() as f64 * (BAR + 6.0);
    let height = bottom + 60.0 + names.len().div_ceil(4) as f64 * 20.0;
    let mut svg = begin(height, &format!("{title} (hatched: the guest stands still)"));
    for (row, (label, record)) in bars.iter().enumerate() {
        let y = 40.0 + row as f64 * (BAR + 6.0);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>", LEFT - 6.0, y + 15.0);
        let mut x = LEFT;
        for stage in &record.stages {
            let width = stage.seconds * scale;
            let which = names.iter().position(|name| *name == family(&stage.name)).unwrap_or(0);
            let colour = COLOURS[which % COLOURS.len()];
            for fill in [Some(colour), stage.is_down.then_some("url(#down)")].into_iter().flatten() {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{fill}\"><title>{}: {:.2} s</title></rect>",
                    stage.name, stage.seconds
                );
            }
            x += width;
        }
    }
    for step in 0..=5 {
        let (seconds, x) = (longest * f64::from(step) / 5.0, LEFT + longest * f64::from(step) / 5.0 * scale);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"36\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#ccc\" stroke-width=\"0.5\"/>"
        );
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{seconds} s</text>", bottom + 14.0);
    }
    for (which, name) in names.iter().enumerate() {
        let (x, y) = (10.0 + (which % 4) as f64 * 220.0, bottom + 40.0 + (which / 4) as f64 * 20.0);
        let colour = COLOURS[which % COLOURS.len()];
        let _ = writeln!(svg, "<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>", y - 10.0);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{y}\">{name}</text>", x + 17.0);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Rounds are one kind of stage.
fn family(name: &str) -> String {
    if name.starts_with("round ") { "rounds".to_owned() } else { name.to_owned() }
}

/// Lines of total time and of downtime; both axes are logarithmic, as what is compared lies far apart.
fn lines(
    records: &Records,
    (name, title): &(&str, &str),
    unit: &str,
    cells: &[Cell],
    at: impl Fn(&Cell) -> f64,
) -> anyhow::Result<()> {
    let mut series = Vec::new();
    for kind in [Kind::Lxc, Kind::Kvm] {
        for method in Method::ALL {
            let mut points = Vec::new();
            for cell in cells.iter().filter(|cell| cell.kind == kind && cell.method == method) {
                if let Some(record) = records.get(*cell)? {
                    points.push((at(cell), record.total_seconds, record.downtime_seconds));
                }
            }
            let who = if method == Method::Paper { "paper's method" } else { "ours" };
            series.push((format!("{} {who}", kind.as_str().to_uppercase()), points));
        }
    }
    if series.iter().all(|(_, points)| points.len() < 2) {
        return Ok(());
    }
    let all = || series.iter().flat_map(|(_, points)| points);
    let range = |values: Vec<f64>| {
        let (least, most) = values.iter().fold((f64::MAX, 0.01f64), |(a, b), value| (a.min(*value), b.max(*value)));
        (least.max(0.01).ln(), (most * 1.1).ln())
    };
    let (x0, x1) = range(all().map(|point| point.0).collect());
    let (y0, y1) = range(all().flat_map(|point| [point.1, point.2]).collect());
    let (height, bottom) = (460.0, 400.0);
    let x = |value: f64| LEFT / 3.0 + (value.ln() - x0) / (x1 - x0).max(0.01) * (WIDTH - LEFT - 60.0);
    let y = |value: f64| bottom - (value.max(0.01).ln() - y0) / (y1 - y0).max(0.01) * (bottom - 40.0);
    let mut svg = begin(height, &format!("{title} (dashed: downtime); seconds over {unit}, logarithmic"));
    let mut marks: Vec<f64> = all().map(|point| point.0).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for mark in marks {
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{mark}</text>", x(mark), bottom + 18.0);
    }
    for power in -2..5 {
        let value = 10f64.powi(power);
        if value.ln() >= y0 && value.ln() <= y1 {
            let line = y(value);
            let _ = writeln!(
                svg,
                "<line x1=\"{:.1}\" y1=\"{line:.1}\" x2=\"{:.1}\" y2=\"{line:.1}\" stroke=\"#ccc\"/>",
                LEFT / 3.0,
                WIDTH - 120.0
            );
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value} s</text>",
                LEFT / 3.0 - 6.0,
                line + 4.0
            );
        }
    }
    for (which, (label, points)) in series.iter().enumerate().filter(|(_, (_, points))| !points.is_empty()) {
        let colour = COLOURS[which * 2 % COLOURS.len()];
        let path = |of: fn(&(f64, f64, f64)) -> f64| {
            points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(of(point)))).collect::<Vec<_>>().join(" ")
        };
        for (of, dash) in [((|point| point.1) as fn(&(f64, f64, f64)) -> f64, ""), (|point| point.2, "5 4")] {
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>",
                path(of)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" fill=\"{colour}\">{label}</text>",
            LEFT / 3.0 + 10.0 + which as f64 * 190.0,
            height - 12.0
        );
    }
    svg.push_str("</svg>\n");
    write_whole(&records.0.join(name), svg.as_bytes())
}
