//! mounts --rates, --watch, --requests; daemon log-filter.

use std::collections::BTreeMap;
use std::time::Duration;

use layerfs::mount::watch;

use super::Session;
use crate::api::Empty;
use crate::api::activity::{
    ActivityList, LogFilter, LogFilterRequest, MountActivity, OpActivity, RequestList, RequestsRequest,
};
use crate::failure::Result;
use crate::output::{Color, Paint, Table};
use crate::units;

/// Rates are those of so long a time, and --watch looks as often.
const EVERY: Duration = Duration::from_secs(1);
/// What is told where there is nothing to tell of.
const NO_MOUNTS: &str = "no mounts; `layerctl mount NAME DIR` makes one";

/// `layerctl mounts --rates`, again and again with `--watch`.
pub fn rates(session: &Session, is_watching: bool) -> Result<()> {
    let client = session.client()?;
    let mut before: ActivityList = client.call("activity", &Empty {})?;
    loop {
        std::thread::sleep(EVERY);
        let now: ActivityList = client.call("activity", &Empty {})?;
        let since = difference(&now, &before);
        if !is_watching {
            session.output.answer(&since, |since| text(since, session.output.paint()))?;
            if since.mounts.is_empty() && !session.output.json {
                session.output.note(NO_MOUNTS);
            }
            return Ok(());
        }
        session.output.with_stdout(|out| {
            use std::io::Write;
            if session.output.json {
                serde_json::to_writer(&mut *out, &since).map_err(std::io::Error::from)?;
                out.write_all(b"\n")?;
            } else {
                // From the top left, and what was below is wiped.
                write!(out, "\x1b[H\x1b[2J{}", screen(&since, session.output.paint()))?;
            }
            Ok(())
        })?;
        before = now;
    }
}

/// What was done between two looks; `uptime_seconds` is the time between them.
fn difference(now: &ActivityList, before: &ActivityList) -> ActivityList {
    // A daemon that was started meanwhile counts from zero.
    let is_same = now.uptime_seconds >= before.uptime_seconds;
    let earlier: BTreeMap<_, _> = before.mounts.iter().filter(|_| is_same).map(|mount| (&mount.dir, mount)).collect();
    let mounts = now.mounts.iter().map(|mount| match earlier.get(&mount.dir) {
        None => mount.clone(),
        Some(earlier) => MountActivity {
            dir: mount.dir.clone(),
            ops: mount.ops.iter().map(|op| less(op, &earlier.ops)).filter(|op| op.count > 0).collect(),
            read_bytes: mount.read_bytes.saturating_sub(earlier.read_bytes),
            written_bytes: mount.written_bytes.saturating_sub(earlier.written_bytes),
            running: mount.running,
        },
    });
    let less = |now: u64, before: u64| if is_same { now.saturating_sub(before) } else { now };
    ActivityList {
        uptime_seconds: if is_same { now.uptime_seconds - before.uptime_seconds } else { now.uptime_seconds },
        mounts: mounts.collect(),
        cache_hits: less(now.cache_hits, before.cache_hits),
        cache_misses: less(now.cache_misses, before.cache_misses),
    }
}

fn less(op: &OpActivity, before: &[OpActivity]) -> OpActivity {
    let Some(before) = before.iter().find(|before| before.op == op.op) else { return op.clone() };
    let buckets = op.buckets.iter().zip(&before.buckets).map(|(now, before)| now.saturating_sub(*before));
    OpActivity {
        op: op.op.clone(),
        count: op.count.saturating_sub(before.count),
        seconds: (op.seconds - before.seconds).max(0.0),
        buckets: buckets.collect(),
    }
}

/// The time within which `part` of them were answered, to the next bucket's end.
fn quantile(buckets: &[u64], part: f64) -> Duration {
    let wanted = (buckets.iter().sum::<u64>() as f64 * part).ceil().max(1.0) as u64;
    let mut seen = 0;
    let found = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted
    });
    found.map_or(Duration::ZERO, watch::bucket_end)
}

/// A time of a request: microseconds to seconds.
fn short_time(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 0.001 => format!("{:.0} µs", seconds * 1e6),
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        seconds => units::duration(seconds),
    }
}

/// What is on the screen of --watch.
fn screen(since: &ActivityList, paint: Paint) -> String {
    let text = text(since, paint);
    if since.mounts.is_empty() { format!("{text}{NO_MOUNTS}\n") } else { text }
}

fn text(since: &ActivityList, paint: Paint) -> String {
    let seconds = since.uptime_seconds.max(0.001);
    let mut text = String::new();
    let mut table = Table::new(&["DIR", "REQUEST", "PER SECOND>", "MEAN>", "HALF IN>", "99% IN>"]);
    for mount in &since.mounts {
        let dir = mount.dir.display().to_string();
        let mut ops: Vec<&OpActivity> = mount.ops.iter().collect();
        ops.sort_by_key(|op| std::cmp::Reverse(op.count));
        let running = if mount.running > 0 { format!(", {} running", mount.running) } else { String::new() };
        let (read, written) = (units::rate(mount.read_bytes, seconds), units::rate(mount.written_bytes, seconds));
        text.push_str(&format!("{}: {read} read, {written} written{running}\n", paint.cyan(&dir)));
        for op in ops {
            table.colored([
                (dir.clone(), Some(Color::Dim)),
                (op.op.clone(), None),
                (units::count((op.count as f64 / seconds).round() as u64), None),
                (short_time(op.seconds / op.count.max(1) as f64), None),
                (short_time(quantile(&op.buckets, 0.5).as_secs_f64()), None),
                (short_time(quantile(&op.buckets, 0.99).as_secs_f64()), None),
            ]);
        }
    }
    let wanted = since.cache_hits + since.cache_misses;
    if wanted > 0 {
        let share = units::percent(since.cache_hits, wanted);
        text.push_str(&format!(
            "chunks: {} a second, {share} of them cached\n",
            units::count((wanted as f64 / seconds).round() as u64)
        ));
    }
    if since.mounts.iter().any(|mount| !mount.ops.is_empty()) {
        text.push_str(&table.render(paint));
    }
    text
}

/// `layerctl mounts --requests`.
pub fn requests(session: &Session, longer_seconds: f64) -> Result<()> {
    let request = RequestsRequest { longer_seconds };
    let list: RequestList = session.call("requests", &request)?;
    session.output.answer(&list, |list| {
        if list.requests.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["DIR", "REQUEST", "OF", "SINCE>"]);
        for request in &list.requests {
            table.colored([
                (request.dir.display().to_string(), None),
                (request.op.clone(), None),
                (request.what.clone(), Some(Color::Cyan)),
                (short_time(request.seconds), None),
            ]);
        }
        table.render(session.output.paint())
    })?;
    if list.requests.is_empty() && !session.output.json {
        session.output.note("no requests are being answered");
    }
    Ok(())
}

/// `layerctl daemon log-filter`.
pub fn log_filter(session: &Session, filter: Option<String>) -> Result<()> {
    let answer: LogFilter = session.call("log-filter", &LogFilterRequest { filter })?;
    session.output.answer(&answer, |answer| format!("{}\n", answer.filter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(uptime_seconds: f64, count: u64) -> ActivityList {
        let op = OpActivity { op: "read".to_owned(), count, seconds: count as f64 * 0.001, buckets: vec![0, count, 0] };
        let mount =
            MountActivity { dir: "/mnt".into(), ops: vec![op], read_bytes: count * 1000, written_bytes: 0, running: 1 };
        ActivityList { uptime_seconds, mounts: vec![mount], cache_hits: count, cache_misses: 0 }
    }

    #[test]
    fn rates_are_differences() {
        let since = difference(&list(12.0, 150), &list(10.0, 50));
        assert_eq!(
            (since.uptime_seconds, since.mounts[0].ops[0].count, since.mounts[0].read_bytes),
            (2.0, 100, 100_000)
        );
        let text = text(&since, Paint::PLAIN);
        assert!(
            text.contains("1 running") && text.contains("100.0%") && text.contains("50  1.0 ms     2 µs"),
            "{text}"
        );
        // The daemon was started again.
        assert_eq!(difference(&list(1.0, 7), &list(10.0, 50)).mounts[0].ops[0].count, 7);
    }
}
