//! What the mounts do: figures, requests that run, Prometheus' metrics.
//!
//! Metrics are text in Prometheus' exposition format (version 0.0.4), at `/metrics` of the control socket and, if the
//! config file says so, of an address.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use layerfs::mount::Mount;
use layerfs::mount::watch::{self, Activity};

use crate::api::Empty;
use crate::api::activity::{ActivityList, MountActivity, OpActivity, RequestInfo, RequestList, RequestsRequest};
use crate::daemon::http::Context;
use crate::daemon::{Daemon, memory};
use crate::failure::{Failure, Result};

/// Requests that have been running for so long are told of in the log.
const HANGS: Duration = Duration::from_secs(10);

fn of_mounts(daemon: &Daemon) -> Vec<(Arc<Mount>, Activity)> {
    let all = daemon.mounts.all().into_iter();
    all.filter_map(|mount| mount.fs().map(|fs| fs.activity()).map(|activity| (mount, activity))).collect()
}

/// `/v1/activity`.
pub fn activity(context: &Context, _: Empty) -> Result<ActivityList> {
    let daemon = &context.daemon;
    let mounts = of_mounts(daemon).into_iter().map(|(mount, activity)| MountActivity {
        dir: mount.record().dir.clone(),
        ops: activity
            .ops
            .into_iter()
            .map(|op| OpActivity {
                op: op.op.as_str().to_owned(),
                count: op.count,
                seconds: op.nanos as f64 / 1e9,
                buckets: op.buckets,
            })
            .collect(),
        read_bytes: activity.read_bytes,
        written_bytes: activity.written_bytes,
        running: activity.running,
    });
    let (cache_hits, cache_misses) = daemon.store.cache_counts();
    let uptime_seconds = daemon.started.elapsed().as_secs_f64();
    Ok(ActivityList { uptime_seconds, mounts: mounts.collect(), cache_hits, cache_misses })
}

/// `/v1/requests`.
pub fn requests(context: &Context, request: RequestsRequest) -> Result<RequestList> {
    let longer = Duration::try_from_secs_f64(request.longer_seconds)
        .map_err(|_| Failure::invalid(format!("{} is no number of seconds", request.longer_seconds)))?;
    let mut requests = Vec::new();
    for mount in context.daemon.mounts.all() {
        let Some(fs) = mount.fs() else { continue };
        requests.extend(fs.running(longer, false).into_iter().map(|running| RequestInfo {
            dir: mount.record().dir.clone(),
            op: running.op.as_str().to_owned(),
            what: running.what,
            seconds: running.seconds,
        }));
    }
    Ok(RequestList { requests })
}

/// Tells of each request that hangs, once.
pub fn tell_hanging(daemon: &Daemon) {
    for mount in daemon.mounts.all() {
        let Some(fs) = mount.fs() else { continue };
        for running in fs.running(HANGS, true) {
            let (op, dir) = (running.op.as_str(), mount.record().dir.display());
            tracing::warn!(
                "a request hangs: {op} of {} in the mount on {dir}, for {:.0} s so far",
                running.what,
                running.seconds
            );
        }
    }
}

/// Adds `/metrics` to `router`.
pub fn route(router: Router<Arc<Daemon>>) -> Router<Arc<Daemon>> {
    router.route("/metrics", get(scrape))
}

async fn scrape(State(daemon): State<Arc<Daemon>>) -> impl IntoResponse {
    let text = tokio::task::spawn_blocking(move || metrics(&daemon)).await.unwrap_or_default();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// Serves `/metrics`, and nothing else, at the address that the config file names.
pub async fn serve_metrics(daemon: Arc<Daemon>) {
    let Some(address) = daemon.settings.metrics else { return };
    let listener = match tokio::net::TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%address, %error, "metrics cannot be served there"),
    };
    tracing::info!(%address, "serves metrics");
    if let Err(error) = axum::serve(listener, route(Router::new()).with_state(daemon)).await {
        tracing::error!(%address, %error, "metrics are served no more");
    }
}

/// One family of metrics.
struct Family<'t>(&'t mut String, &'static str);

impl<'t> Family<'t> {
    fn new(out: &'t mut String, name: &'static str, kind: &str, help: &str) -> Family<'t> {
        let _ = writeln!(out, "# HELP layerfs_{name} {help}\n# TYPE layerfs_{name} {kind}");
        Family(out, name)
    }

    fn value(&mut self, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "layerfs_{}{suffix}{labels} {value}", self.1);
    }
}

/// A label's value, as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn metrics(daemon: &Daemon) -> String {
    let mut out = String::with_capacity(16 * 1024);
    let status = daemon.status();
    let single = |out: &mut String, name: &'static str, kind: &str, help: &str, value: f64| {
        Family::new(out, name, kind, help).value("", &[], value);
    };
    Family::new(&mut out, "info", "gauge", "The program's version.").value("", &[("version", &status.version)], 1.0);
    single(&mut out, "uptime_seconds", "gauge", "How long the daemon has been running.", status.uptime_seconds);
    single(&mut out, "resident_bytes", "gauge", "Its resident memory.", memory::resident_bytes() as f64);
    single(&mut out, "work", "gauge", "Pieces of work under way.", status.work.len() as f64);
    single(&mut out, "mounts", "gauge", "How many mounts it serves.", status.mounts as f64);
    let (hits, misses) = daemon.store.cache_counts();
    single(&mut out, "chunk_cache_hits_total", "counter", "Chunks that were wanted and cached.", hits as f64);
    single(&mut out, "chunk_cache_misses_total", "counter", "Chunks that were wanted and not cached.", misses as f64);
    let mounts = of_mounts(daemon);
    let dirs: Vec<String> = mounts.iter().map(|(mount, _)| mount.record().dir.to_string_lossy().into_owned()).collect();
    let of_each = |out: &mut String, name: &'static str, kind: &str, help: &str, value: fn(&Activity) -> u64| {
        let mut family = Family::new(out, name, kind, help);
        for (dir, (_, activity)) in dirs.iter().zip(&mounts) {
            family.value("", &[("dir", dir)], value(activity) as f64);
        }
    };
    of_each(&mut out, "mount_read_bytes_total", "counter", "Bytes given to readers, past the kernel's caches.", |a| {
        a.read_bytes
    });
    of_each(
        &mut out,
        "mount_written_bytes_total",
        "counter",
        "Bytes taken from writers, but for files that are passed through.",
        |a| a.written_bytes,
    );
    of_each(&mut out, "mount_requests_running", "gauge", "Requests that are being answered.", |a| a.running);
    let mut family =
        Family::new(&mut out, "mount_warm_bytes", "gauge", "Disk that plain copies of its large files take.");
    for (dir, (mount, _)) in dirs.iter().zip(&mounts) {
        family.value("", &[("dir", dir)], mount.fs().map_or(0, |fs| fs.warm_bytes()) as f64);
    }
    histograms(&mut out, &dirs, &mounts);
    out
}

fn histograms(out: &mut String, dirs: &[String], mounts: &[(Arc<Mount>, Activity)]) {
    let mut family = Family::new(out, "mount_request_seconds", "histogram", "How long requests took.");
    for (dir, (_, activity)) in dirs.iter().zip(mounts) {
        for op in &activity.ops {
            let labels = [("dir", dir.as_str()), ("op", op.op.as_str())];
            let mut sum = 0;
            for (index, count) in op.buckets.iter().enumerate() {
                sum += count;
                // The last one has no end. Each second one is enough for a graph.
                if index % 2 == 0 && index + 1 < watch::BUCKETS {
                    let end = watch::bucket_end(index).as_secs_f64().to_string();
                    family.value("_bucket", &[labels[0], labels[1], ("le", &end)], sum as f64);
                }
            }
            // Counters are read one after the other: the histogram's own sum is what adds up.
            family.value("_bucket", &[labels[0], labels[1], ("le", "+Inf")], sum as f64);
            family.value("_sum", &labels, op.nanos as f64 / 1e9);
            family.value("_count", &labels, sum as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut out = String::new();
        let mut family = Family::new(&mut out, "test", "gauge", "A test.");
        family.value("_sum", &[("dir", "/a\"b\\c\nd"), ("op", "read")], 1.5);
        let expected = "# HELP layerfs_test A test.\n# TYPE layerfs_test gauge\n\
            layerfs_test_sum{dir=\"/a\\\"b\\\\c\\nd\",op=\"read\"} 1.5\n";
        assert_eq!(out, expected);
    }
}
