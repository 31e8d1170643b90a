//! How much of a link a push uses, beside iperf3 with one and with eight connections and rsync, on the same link in turn.
//!
//! Delay and loss are the harness' emulated link's, each half of the round trip and the loss each way; the rate is TBF's.
//! Every cell has bytes for some seconds of its rate, of noise, so that nothing can be compressed; more seconds where the round
//! trip is long, for everybody, as the begin of a connection is what costs there. What counts is the bytes of chunks, or of
//! rsync's file, over the time from the command's start to its end, commit and all; iperf3 says its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use layerfs_tests::ctl::number;
use layerfs_tests::emulator::Conditions;
use layerfs_tests::host::{Host, TwoHosts, run_in};
use layerfs_tests::network::{End, Link};
use layerfs_tests::tree;

/// Seconds that a cell's bytes take at its full rate: without delay, with some, and with a long one.
const SECONDS: u64 = 10;
const SECONDS_SOME: u64 = 30;
const SECONDS_FAR: u64 = 120;
/// The most bytes of a cell: they lie on the disk twice.
const MAX_BYTES: u64 = 15_000_000_000;

/// One row of the table, by name: `100/20/1` is 100 Mbit/s, 20 ms, 1% loss.
struct Cell {
    megabits: u64,
    millis: u64,
    loss: f64,
}

impl Cell {
    fn all() -> Vec<Cell> {
        let mut cells = Vec::new();
        for megabits in [10, 100, 1000] {
            for millis in [0, 20, 200] {
                cells.extend([0.0, 1.0].map(|loss| Cell { megabits, millis, loss }));
            }
        }
        cells
    }

    /// That of `name`, which needs not be one of [`Cell::all`].
    fn named(name: &str) -> Option<Cell> {
        let mut parts = name.splitn(3, '/');
        let mut number = || parts.next().and_then(|part| part.parse::<f64>().ok()).filter(|value| *value >= 0.0);
        let (megabits, millis, loss) = (number()? as u64, number()? as u64, number()?);
        (megabits > 0).then_some(Cell { megabits, millis, loss })
    }

    fn name(&self) -> String {
        format!("{}/{}/{}", self.megabits, self.millis, self.loss)
    }

    fn seconds(&self) -> u64 {
        let seconds = match self.millis {
            0 => SECONDS,
            1..100 => SECONDS_SOME,
            _ => SECONDS_FAR,
        };
        seconds.min(MAX_BYTES / (self.megabits * 125_000))
    }

    fn bytes(&self) -> u64 {
        self.megabits * 125_000 * self.seconds()
    }

    /// Without delay and loss a veth pair does; it costs less.
    fn hosts(&self) -> anyhow::Result<TwoHosts> {
        let conditions = Conditions { round_trip: Duration::from_millis(self.millis), loss_percent: self.loss };
        let link = if conditions == Conditions::default() { Link::new()? } else { Link::emulated(&[conditions])? };
        link.shape(self.megabits as u32)?;
        TwoHosts::on(link)
    }

    fn percent(&self, bytes: u64, seconds: f64) -> f64 {
        bytes as f64 * 8.0 / seconds / (self.megabits as f64 * 1e6) * 100.0
    }
}

/// A server in a host's network, ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server(host: &Host, arguments: &[&str]) -> anyhow::Result<Server> {
    let namespace = format!("--net=/run/netns/{}", host.end()?.namespace);
    let mut command = Command::new("nsenter");
    command.arg(namespace).arg("--").args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Server(command.spawn()?))
}

/// Prints the table, row by row. With `only`, the row of that name, any three numbers, or `paths`; `alone`, without the peers.
pub fn run(only: Option<&str>, alone: bool) -> anyhow::Result<()> {
    if only == Some("unlimited") {
        return crate::unlimited::run();
    }
    println!(
        "use of the link in %: {SECONDS} s of its rate in bytes, {SECONDS_SOME} s with delay, {SECONDS_FAR} s from 100 ms on, {MAX_BYTES} bytes at most;"
    );
    println!(
        "delay is the round trip's, loss each way; wire is all that our side sent, with headers and what went twice,"
    );
    println!("and middle the same for the second and third quarter of the time");
    println!(
        "{:>14} {:>9} {:>6} {:>6} {:>12} {:>12} {:>8}  connections",
        "Mbit/ms/loss%", "layerfs", "wire", "middle", "iperf3 -P1", "iperf3 -P8", "rsync"
    );
    let cells = match only {
        Some(name) => Cell::named(name).into_iter().collect(),
        None => Cell::all(),
    };
    for cell in &cells {
        match measure(cell, alone) {
            Ok(row) => println!("{row}"),
            Err(error) => println!("{:>14} not measured: {error:#}", cell.name()),
        }
    }
    if only.is_none_or(|only| only == "paths") {
        two_paths()?;
    }
    Ok(())
}

/// Looks at what an end sends, several times a second.
struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<anyhow::Result<Vec<(Instant, u64)>>>,
}

impl Watch {
    fn start(end: End) -> anyhow::Result<Watch> {
        let (stop, stopped) = std::sync::mpsc::channel();
        let mut samples = vec![(Instant::now(), end.shaped_bytes()?)];
        let watch = move || loop {
            let is_last = stopped.recv_timeout(Duration::from_millis(250)) != Err(RecvTimeoutError::Timeout);
            samples.push((Instant::now(), end.shaped_bytes()?));
            if is_last {
                return Ok(samples);
            }
        };
        Ok(Watch { stop, thread: std::thread::spawn(watch) })
    }

    /// All samples: the first from the start, the last from now.
    fn stop(self) -> anyhow::Result<Vec<(Instant, u64)>> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow!("the thread that watches the link panicked"))?
    }
}

fn measure(cell: &Cell, alone: bool) -> anyhow::Result<String> {
    let hosts = cell.hosts()?;
    let file = hosts.a.new_folder("tree")?.join("noise");
    tree::big_file(&file, 11, cell.bytes())?;
    let shown = |percent: Option<f64>| percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1}"));
    let [single, several, rsync] = match alone {
        true => [None; 3],
        false => [Some(iperf(&hosts, cell, 1)?), Some(iperf(&hosts, cell, 8)?), rsync(&hosts, &file, cell).ok()],
    }
    .map(shown);
    hosts.a.import(&hosts.a.path("tree"), "noise", &[])?;
    std::fs::remove_file(&file)?;
    let watch = Watch::start(hosts.a.end()?.clone())?;
    let report = hosts.push(&["noise"])?;
    let samples = watch.stop()?;
    let ((first, from), (last, to)) = (samples[0], samples[samples.len() - 1]);
    let ours = cell.percent(cell.bytes(), (last - first).as_secs_f64());
    let wire = cell.percent(to - from, (last - first).as_secs_f64());
    let quarter = (last - first) / 4;
    let inner: Vec<_> = samples.iter().filter(|(at, _)| *at >= first + quarter && *at <= last - quarter).collect();
    let middle = match inner[..] {
        [(first, from), .., (last, to)] => cell.percent(to - from, (*last - *first).as_secs_f64()),
        _ => wire,
    };
    let connections = number(&report, "connections")?;
    let name = cell.name();
    Ok(format!("{name:>14} {ours:>9.1} {wire:>6.1} {middle:>6.1} {single:>12} {several:>12} {rsync:>8}  {connections}"))
}

fn iperf(hosts: &TwoHosts, cell: &Cell, streams: u8) -> anyhow::Result<f64> {
    let _server = server(&hosts.b, &["iperf3", "-s", "-1"])?;
    let (streams, seconds) = (streams.to_string(), cell.seconds().to_string());
    let address = hosts.b.end()?.address.clone();
    let arguments = ["-J", "-c", &address, "-P", &streams, "-t", &seconds];
    let started = Instant::now();
    // Its server takes a moment to listen; the client says so in its report.
    let rate = loop {
        let report = run_in(&hosts.a, "iperf3", &arguments).and_then(|text| rate_of(&text));
        match report {
            Ok(rate) => break rate,
            Err(error) if started.elapsed() > Duration::from_secs(20) => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    Ok(rate / (cell.megabits as f64 * 1e6) * 100.0)
}

/// Bits per second, of iperf3's report.
fn rate_of(report: &str) -> anyhow::Result<f64> {
    let report: serde_json::Value = serde_json::from_str(report)?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.with_context(|| format!("iperf3 tells no rate: {}", report["error"]))
}

/// rsync's daemon gets the same file, within twice the time that it should take.
fn rsync(hosts: &TwoHosts, file: &Path, cell: &Cell) -> anyhow::Result<f64> {
    let (config, target) = (hosts.b.path("rsyncd.conf"), hosts.b.new_folder("target")?);
    let text = format!("use chroot = no\nuid = 0\ngid = 0\n[t]\nread only = no\npath = {}\n", target.display());
    std::fs::write(&config, text)?;
    let address = hosts.b.end()?.address.clone();
    let config = config.display().to_string();
    let _server = server(&hosts.b, &["rsync", "--daemon", "--no-detach", "--address", &address, "--config", &config])?;
    let url = format!("rsync://{address}/t/");
    let ready = Instant::now();
    while run_in(&hosts.a, "rsync", &[&url]).is_err() {
        ensure!(ready.elapsed() < Duration::from_secs(20), "the rsync daemon does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
    let limit = (cell.seconds() * 2).to_string();
    let started = Instant::now();
    // What has come by then is what counts.
    let _ = run_in(&hosts.a, "timeout", &[&limit, "rsync", "-W", "--inplace", &file.display().to_string(), &url]);
    let seconds = started.elapsed().as_secs_f64();
    let bytes = std::fs::metadata(target.join("noise")).map_or(0, |metadata| metadata.len());
    std::fs::remove_dir_all(&target)?;
    Ok(cell.percent(bytes, seconds))
}

/// Two paths of 50 Mbit/s against one, by MPTCP and by connections to both addresses.
fn two_paths() -> anyhow::Result<()> {
    const MEGABITS: u64 = 50;
    let bytes = MEGABITS * 125_000 * SECONDS;
    let ten = Conditions { round_trip: Duration::from_millis(10), loss_percent: 0.0 };
    let seconds = |name: &str, transport: &str, addresses: usize, subflows: bool| -> anyhow::Result<f64> {
        let link = Link::emulated(&[ten, ten])?;
        link.shape(MEGABITS as u32)?;
        if subflows {
            link.add_mptcp_endpoints()?;
        }
        let second = link.more[0].1.address.clone();
        let hosts = TwoHosts::everywhere(link)?;
        if addresses > 1 {
            let both = format!("{},{second}", hosts.b.end()?.address);
            hosts.a.ctl.ok(["peer", "set", "b", "--address", &both])?;
        }
        tree::big_file(&hosts.a.new_folder("tree")?.join("noise"), 12, bytes)?;
        hosts.a.import(&hosts.a.path("tree"), "noise", &[])?;
        let started = Instant::now();
        hosts.a.ctl.json(["push", "noise", "b", "--transport", transport])?;
        let seconds = started.elapsed().as_secs_f64();
        println!("{name:>34}: {:.1} Mbit/s", bytes as f64 * 8e-6 / seconds);
        Ok(seconds)
    };
    let one = seconds("one path of 50 Mbit/s", "tcp", 1, false)?;
    for (name, transport, addresses, subflows) in
        [("two, by parallel connections", "tcp", 2, false), ("two, by MPTCP", "mptcp", 1, true)]
    {
        let two = seconds(name, transport, addresses, subflows)?;
        println!("{name:>34}: {:.2} times one (goal 1.85)", one / two);
    }
    Ok(())
}
