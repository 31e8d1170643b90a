//! A report as a picture: the stages on a time axis, downtime marked. Pure text, nothing is loaded from elsewhere.

use std::fmt::Write;

use super::learnt::Downtime;
use super::report::{Report, Stage};

const WIDTH: f64 = 920.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 170.0;
const ROW: f64 = 26.0;
const TOP: f64 = 64.0;
/// A stage is at least so wide, in pixels, to be seen.
const THIN: f64 = 1.5;

const RUNS: &str = "#4f83c4";
const DOWN: &str = "#d0453a";

/// `text` for XML and HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Seconds, as short as they can be told.
pub fn seconds(value: f64) -> String {
    match value {
        v if v < 0.0995 => format!("{:.0} ms", v * 1000.0),
        v if v < 9.95 => format!("{v:.2} s"),
        v if v < 120.0 => format!("{v:.1} s"),
        v => format!("{:.0} min {:.0} s", (v / 60.0).floor(), v % 60.0),
    }
}

/// Bytes likewise.
pub fn bytes(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v < 1024.0 => format!("{v:.0} B"),
        v if v < 1024.0 * 1024.0 => format!("{:.1} KiB", v / 1024.0),
        v if v < 1024.0 * 1024.0 * 1024.0 => format!("{:.1} MiB", v / 1048576.0),
        v => format!("{:.2} GiB", v / 1073741824.0),
    }
}

/// A step of the axis: 1, 2 or 5 times a power of ten, some eight of them.
fn tick(total: f64) -> f64 {
    let rough = (total / 8.0).max(1e-3);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= rough).unwrap_or(power * 10.0)
}

/// The picture as SVG.
pub fn svg(report: &Report) -> String {
    let stages = &report.stages;
    let end = stages.iter().map(|stage| stage.at + stage.seconds).fold(report.seconds, f64::max).max(0.001);
    let scale = (WIDTH - LEFT - RIGHT) / end;
    let at = |time: f64| LEFT + time * scale;
    let bottom = TOP + stages.len() as f64 * ROW;
    let height = bottom + 46.0;
    let mut out = String::new();
    // Writing to a text can't fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" width=\"{WIDTH:.0}\" \
         height=\"{height:.0}\" role=\"img\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"16\" font-weight=\"bold\">{}</text>\n\
         <text x=\"16\" y=\"44\" fill=\"#666\">{}</text>\n",
        escape(&title(report)),
        escape(&summary(report)),
    );
    if let Some((from, to)) = down_span(stages) {
        let _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{DOWN}\" opacity=\"0.12\"/>",
            at(from),
            TOP - 6.0,
            ((to - from) * scale).max(THIN),
            bottom - TOP + 12.0,
        );
    }
    axis(&mut out, end, bottom, at);
    for (row, stage) in stages.iter().enumerate() {
        let y = TOP + row as f64 * ROW;
        let (color, x) = (if stage.is_down { DOWN } else { RUNS }, at(stage.at));
        let width = (stage.seconds * scale).max(THIN);
        let amount = if stage.bytes > 0 { format!(", {}", bytes(stage.bytes)) } else { String::new() };
        let label = format!("{}{amount}", seconds(stage.seconds));
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" rx=\"2\" fill=\"{color}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#555\">{}</text>\n",
            LEFT - 8.0,
            y + 16.0,
            escape(&stage.name),
            y + 4.0,
            ROW - 8.0,
            x + width + 6.0,
            y + 16.0,
            escape(&label),
        );
    }
    out.push_str("</svg>\n");
    out
}

fn axis(out: &mut String, end: f64, bottom: f64, at: impl Fn(f64) -> f64) {
    let step = tick(end);
    let mut time = 0.0;
    while time <= end + step * 0.01 {
        let x = at(time);
        let _ = write!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{}</text>\n",
            TOP - 6.0,
            bottom + 6.0,
            bottom + 24.0,
            seconds(time),
        );
        time += step;
    }
}

fn down_span(stages: &[Stage]) -> Option<(f64, f64)> {
    let first = stages.iter().find(|stage| stage.is_down)?;
    let last = stages.iter().rev().find(|stage| stage.is_down)?;
    Some((first.at, last.at + last.seconds))
}

fn title(report: &Report) -> String {
    format!("{} → {} ({})", report.guest, report.peer, report.outcome)
}

fn down(downtime: Option<Downtime>) -> String {
    downtime.map_or_else(|| "-".to_owned(), |down| format!("{}, {}", seconds(down.seconds), bytes(down.bytes)))
}

fn summary(report: &Report) -> String {
    format!(
        "{}, {} in all; downtime {} (predicted {})",
        seconds(report.seconds),
        bytes(report.bytes),
        down(report.downtime),
        down(report.predicted),
    )
}

/// The report as a page that needs nothing else.
pub fn html(report: &Report) -> String {
    let mut rows = String::new();
    for stage in &report.stages {
        let class = if stage.is_down { " class=\"down\"" } else { "" };
        let _ = writeln!(
            rows,
            "<tr{class}><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&stage.name),
            seconds(stage.at),
            seconds(stage.seconds),
            bytes(stage.bytes),
        );
    }
    let mut remarks = String::new();
    let lines = report.decisions.iter().chain(&report.error);
    lines.for_each(|line| {
        let _ = writeln!(remarks, "<li>{}</li>", escape(line));
    });
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n\
         body {{ font: 15px sans-serif; margin: 2em auto; max-width: 960px; padding: 0 1em; color: #222 }}\n\
         svg {{ max-width: 100%; height: auto }}\ntable {{ border-collapse: collapse }}\n\
         td, th {{ text-align: right; padding: .2em .8em; border-bottom: 1px solid #eee }}\n\
         td:first-child, th:first-child {{ text-align: left }}\n.down {{ color: {DOWN} }}\n</style>\n</head>\n<body>\n\
         {svg}<table>\n<tr><th>stage</th><th>at</th><th>took</th><th>on the wire</th></tr>\n{rows}</table>\n\
         <p>Red: the guest stood still. Downtime {downtime}; predicted {predicted}. Move {id}.</p>\n<ul>\n{remarks}</ul>\n\
         </body>\n</html>\n",
        title = escape(&title(report)),
        svg = svg(report),
        downtime = down(report.downtime),
        predicted = down(report.predicted),
        id = escape(&report.id),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("ab12", "web<script>", "process", "edge");
        let stage = |name: &str, at: f64, seconds: f64, bytes: u64, is_down: bool| Stage {
            name: name.to_owned(),
            at,
            seconds,
            bytes,
            is_down,
        };
        report.stages = vec![
            stage("ahead", 0.1, 4.0, 50 << 20, false),
            stage("dump", 4.2, 0.2, 0, true),
            stage("restore", 4.6, 0.3, 0, true),
        ];
        report.seconds = 5.0;
        report.downtime = Some(Downtime { seconds: 0.7, bytes: 1 << 20 });
        report.predicted = Some(Downtime { seconds: 0.65, bytes: 1 << 20 });
        report.outcome = "moved".to_owned();
        report
    }

    #[test]
    fn a_picture_marks_the_downtime_and_trusts_no_name() {
        let picture = svg(&report());
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("web&lt;script&gt;") && !picture.contains("<script"));
        // The band over the stages that are down, and they themselves.
        assert_eq!(picture.matches(DOWN).count(), 3);
        assert!(picture.contains("downtime 0.70 s, 1.0 MiB (predicted 0.65 s, 1.0 MiB)"));
        let page = html(&report());
        assert!(page.contains(&picture) && !page.contains("http-equiv") && !page.contains("src="));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.0123, 0.5, 12.34, 125.0].map(seconds), ["0 ms", "12 ms", "0.50 s", "12.3 s", "2 min 5 s"]);
        assert_eq!([5, 2048, 3 << 20, 5 << 30].map(bytes), ["5 B", "2.0 KiB", "3.0 MiB", "5.00 GiB"]);
        assert_eq!([0.5, 8.0, 100.0].map(tick), [0.1, 1.0, 20.0]);
        assert!(svg(&Report::new("x", "web", "fake", "edge")).contains("</svg>"));
    }
}
