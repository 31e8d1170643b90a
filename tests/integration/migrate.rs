//! Guests that move between two hosts while they run: real runtimes, a client that stays connected, and hosts that die on the way.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Criu, Fuse, Namespaces, Root, Tool};
use layerfs_tests::host::{Host, TwoHosts, run_in};
use layerfs_tests::network::inside;
use layerfs_tests::{case, fixtures};
use serde_json::Value;

/// The longest that anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
const GUEST: &str = "zoo";
/// How often it goes to and fro, unless `LAYERFS_MIGRATIONS` says otherwise.
const TURNS: usize = 4;

/// The destination dies at these steps, one by one.
pub const STEPS: &[&str] = &["move.journalled:1", "move.journalled:2", "move.journalled:3"];

/// The cases.
pub fn cases() -> Vec<Case> {
    let needs = &[Root, Fuse, Namespaces, Tool("cc"), Criu];
    vec![
        Case::new("migrate::process_to_and_fro", needs, process),
        Case::new("migrate::a_client_stays_connected", needs, client),
        Case::new("migrate::the_destination_dies_on_the_way", needs, dies),
        Case::new("migrate::obstacles_and_mistakes_are_told", &[Root, Fuse, Namespaces, Tool("cc")], mistakes),
    ]
}

/// Two hosts that may move guests to each other; the guest is removed at the end, wherever it is.
struct Moving {
    hosts: TwoHosts,
}

impl Drop for Moving {
    fn drop(&mut self) {
        for host in [&self.hosts.a, &self.hosts.b] {
            let _ = host.ctl.run(["guest", "remove", GUEST, "--force"]);
        }
    }
}

impl Moving {
    fn new() -> anyhow::Result<Moving> {
        let hosts = TwoHosts::new()?;
        hosts.a.ctl.ok(["peer", "set", "b", "--allow-guests"])?;
        hosts.b.ctl.ok(["peer", "set", "a", "--allow-guests"])?;
        Ok(Moving { hosts })
    }

    /// A zoo runs on the first host.
    fn zoo() -> anyhow::Result<Moving> {
        let moving = Moving::new()?;
        moving.start(&["zoo"], &["--", "/bin/zoo", "/zoo-says", "8", "0"])?;
        Ok(moving)
    }

    /// Starts the guest with `programs` in its root.
    fn start(&self, programs: &[&str], options: &[&str]) -> anyhow::Result<()> {
        let a = &self.hosts.a;
        for program in programs {
            fixtures::build(program, &a.path("tree/bin").join(program))?;
        }
        a.import(&a.path("tree"), "app", &["--kind", "base"])?;
        let create = ["guest", "create", GUEST, "--driver", "process", "--on", "app"];
        a.ctl.ok(create.iter().chain(options))?;
        a.ctl.ok(["guest", "start", GUEST])?;
        Ok(())
    }

    fn host(&self, is_first: bool) -> &Host {
        if is_first { &self.hosts.a } else { &self.hosts.b }
    }

    /// Moves it away from the first host, or back to it.
    fn migrate(&self, to_first: bool, options: &[&str]) -> anyhow::Result<Value> {
        let peer = if to_first { "a" } else { "b" };
        self.host(!to_first).ctl.json(["migrate", GUEST, peer].iter().chain(options))
    }

    fn show(&self, is_first: bool) -> anyhow::Result<Value> {
        self.host(is_first).ctl.json(["guest", "show", GUEST])
    }

    /// What the zoo counts to there, if it has lost nothing.
    fn count(&self, is_first: bool) -> anyhow::Result<u64> {
        let file = self.host(is_first).ctl.store().join("guests").join(GUEST).join("root/zoo-says");
        let text = fs::read_to_string(file).context("the zoo says nothing")?;
        let (count, rest) = text.trim().split_once(' ').with_context(|| format!("the zoo says {text:?}"))?;
        ensure!(rest == "ok", "bad: the zoo says {text:?}");
        Ok(count.parse()?)
    }

    /// Waits until the zoo there counts beyond `count`, and returns to what.
    fn passes(&self, is_first: bool, count: u64) -> anyhow::Result<u64> {
        let began = Instant::now();
        loop {
            // While its file is rewritten it says nothing.
            match self.count(is_first) {
                Ok(now) if now > count => return Ok(now),
                Err(error) if format!("{error:#}").contains("bad") => return Err(error),
                state => ensure!(began.elapsed() < PATIENCE, "the zoo doesn't count beyond {count}: {state:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where it runs, once nothing is left to do: exactly one host.
    fn settled(&self) -> anyhow::Result<bool> {
        let began = Instant::now();
        loop {
            let mut runs = Vec::new();
            let mut is_open = false;
            for is_first in [true, false] {
                let ctl = &self.host(is_first).ctl;
                is_open |= ctl.run(["guest", "resolve", GUEST])?.code == 0;
                let shown = ctl.run(["guest", "show", GUEST, "--json"])?;
                let info: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
                if info["activity"] == "running" {
                    runs.push(is_first);
                }
            }
            ensure!(runs.len() < 2, "it runs on both");
            if let (false, &[is_first]) = (is_open, &runs[..]) {
                return Ok(is_first);
            }
            ensure!(began.elapsed() < PATIENCE, "it is not settled: open {is_open}, runs on {runs:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn turns() -> usize {
    std::env::var("LAYERFS_MIGRATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(TURNS)
}

fn process() -> anyhow::Result<()> {
    let moving = Moving::zoo()?;
    let mut count = moving.passes(true, 3)?;
    let mut is_first = true;
    for turn in 0..turns() {
        let report = moving.migrate(!is_first, &[])?;
        ensure!(report["outcome"] == "moved", "turn {turn}: {report}");
        is_first = !is_first;
        count = moving.passes(is_first, count)?;
        ensure!(moving.show(!is_first)?["state"] == "away", "turn {turn}: the other host keeps it");
        ensure!(moving.show(!is_first)?["activity"] == "absent", "turn {turn}: the other host runs it");
        if turn > 0 {
            // All but the base was there before, and the memory that hasn't changed.
            let bytes = report["bytes"].as_u64().context("no bytes")?;
            ensure!(bytes < 8 << 20, "turn {turn}: {bytes} bytes for what is there already");
        }
    }
    // Nothing of it is left where it isn't.
    let left = moving.host(!is_first);
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&*left.ctl.store().join("guests").to_string_lossy()), "a guest that went leaves mounts");
    let listed = moving.hosts.a.ctl.json(["report"])?;
    ensure!(listed["reports"].as_array().is_some_and(|reports| !reports.is_empty()), "no reports: {listed}");
    let page = moving.hosts.a.ctl.ok(["report", "latest", "--html", "-"])?.text();
    ensure!(page.contains("<svg ") && page.contains("restore"), "the page shows nothing: {page}");
    moving.host(is_first).ctl.ok(["guest", "remove", GUEST, "--force"])?;
    moving.host(true).fsck()?;
    moving.host(false).fsck()
}

/// Bridges on both hosts with a cable of their own between them, so that a guest keeps its address.
fn connect_bridges(hosts: &TwoHosts) -> anyhow::Result<()> {
    let (a, b) = (&hosts.link.a.namespace, &hosts.link.b.namespace);
    let add = ["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b];
    case::output_of(std::process::Command::new("ip").args(add))?;
    for (host, address) in [(&hosts.a, "10.77.0.101/24"), (&hosts.b, "10.77.0.102/24")] {
        for line in [
            "link add br0 type bridge forward_delay 0".to_owned(),
            "link set cable master br0".to_owned(),
            format!("addr add {address} dev br0"),
            "link set br0 up".to_owned(),
            "link set cable up".to_owned(),
        ] {
            run_in(host, "ip", &line.split(' ').collect::<Vec<_>>())?;
        }
    }
    Ok(())
}

/// A client on the first host that asks the guest again and again, over one connection.
pub struct Client {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<anyhow::Result<Duration>>,
}

impl Client {
    pub fn start(host: &Host, address: &str) -> anyhow::Result<Client> {
        let began = Instant::now();
        let stream = loop {
            match inside(host.end()?, || TcpStream::connect(address)) {
                Ok(stream) => break stream,
                Err(error) => ensure!(began.elapsed() < PATIENCE, "the guest doesn't answer: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, seen) = (stop.clone(), answers.clone());
        let thread = std::thread::spawn(move || {
            let mut reader = BufReader::new(stream.try_clone()?);
            let mut longest = Duration::ZERO;
            let mut number = 0u64;
            while !stopped.load(SeqCst) {
                number += 1;
                let asked = Instant::now();
                (&stream).write_all(format!("line {number}\n").as_bytes())?;
                let mut answer = String::new();
                reader.read_line(&mut answer)?;
                ensure!(answer == format!("{number} line {number}\n"), "line {number} was answered by {answer:?}");
                longest = longest.max(asked.elapsed());
                seen.store(number, SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(longest)
        });
        Ok(Client { stop, answers, thread })
    }

    /// Waits for `more` answers.
    pub fn hears(&self, more: u64) -> anyhow::Result<()> {
        let (began, until) = (Instant::now(), self.answers.load(SeqCst) + more);
        while self.answers.load(SeqCst) < until && !self.thread.is_finished() {
            ensure!(began.elapsed() < PATIENCE, "the client hears nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The longest that it waited for an answer.
    pub fn end(self) -> anyhow::Result<Duration> {
        self.stop.store(true, SeqCst);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    }
}

// The figures are for whoever runs it to see them.
#[allow(clippy::print_stderr)]
fn client() -> anyhow::Result<()> {
    let moving = Moving::new()?;
    connect_bridges(&moving.hosts)?;
    moving.start(&["echo"], &["--network", "bridge:br0,10.77.0.2/24", "--", "/bin/echo", "7777"])?;
    let client = Client::start(&moving.hosts.a, "10.77.0.2:7777")?;
    client.hears(20)?;
    for turn in 0..turns() {
        let to_first = turn % 2 == 1;
        let report = moving.migrate(to_first, &[])?;
        ensure!(report["outcome"] == "moved", "{report}");
        client.hears(20)?;
        ensure!(!client.thread.is_finished(), "the client has lost its connection: {:?}", client.thread.join());
        let (was, predicted) = (&report["downtime"]["seconds"], &report["predicted"]["seconds"]);
        eprintln!("turn {turn}: stood still for {was} s, predicted {predicted} s");
    }
    eprintln!("the client waited {:?} at most", client.end()?);
    Ok(())
}

/// The destination's program is killed at each write of its journal, and started anew. (The source's would take the guest's mount
/// with it, as these daemons have no keeper.)
fn dies() -> anyhow::Result<()> {
    for (step, stays) in STEPS.iter().zip([true, false, false]) {
        let mut moving = Moving::zoo()?;
        let count = moving.passes(true, 3)?;
        moving.hosts.b.stop()?;
        moving.hosts.b.start(&["--crash-at", step])?;
        let ctl = moving.hosts.a.ctl.clone();
        let asking = std::thread::spawn(move || ctl.run(["migrate", GUEST, "b"]));
        moving.hosts.b.wait_for_crash()?;
        moving.hosts.b.start(&[])?;
        let ended = asking.join().map_err(|_| anyhow::anyhow!("the command panicked"))??;
        let is_first = moving.settled().with_context(|| format!("{step}: {ended:?}"))?;
        ensure!(is_first == stays && (ended.code == 0) != stays, "{step}: on the first: {is_first}, {ended:?}");
        let count = moving.passes(is_first, count)?;
        // And it can move again.
        let report = moving.migrate(!is_first, &[])?;
        ensure!(report["outcome"] == "moved", "{step}: {report}");
        moving.passes(!is_first, count)?;
    }
    Ok(())
}

fn mistakes() -> anyhow::Result<()> {
    let hosts = TwoHosts::new()?;
    let moving = Moving { hosts };
    let a = &moving.hosts.a;
    let said = a.ctl.run(["migrate", "nobody", "b"])?.failed_with(3)?;
    ensure!(said.contains("nobody"), "{said}");
    fixtures::build("zoo", &a.path("tree/bin/zoo"))?;
    a.import(&a.path("tree"), "app", &[])?;
    a.ctl.ok(["guest", "create", GUEST, "--on", "app", "--", "/bin/zoo", "/zoo-says", "1", "0"])?;
    let said = a.ctl.run(["migrate", GUEST, "b"])?.failed_with(5)?;
    ensure!(said.contains("only a running one"), "{said}");
    let said = a.ctl.run(["guest", "resolve", GUEST])?.failed_with(3)?;
    ensure!(said.contains("unfinished move"), "{said}");
    a.ctl.ok(["guest", "start", GUEST])?;
    let said = a.ctl.run(["migrate", GUEST, "nowhere"])?.failed_with(3)?;
    ensure!(said.contains("nowhere"), "{said}");
    let refused = a.ctl.run(["migrate", GUEST, "b"])?;
    ensure!(refused.code != 0 && refused.text().is_empty(), "a peer without the right to took it");
    ensure!(moving.show(true)?["activity"] == "running", "it doesn't run on");
    Ok(())
}
