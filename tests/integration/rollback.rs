//! A guest that goes back while a client sends to it without a pause: what it has acknowledged is answered, once and in order.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::host::Host;

use crate::migrate::{
    ADDRESS, LXC, Moving, NETWORK, OCI, PATIENCE, PROCESS, QEMU, connect, connect_bridges, folder, guest, hook,
};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("rollback::process_loses_no_packet", PROCESS, || container("process")),
        Case::new("rollback::oci_loses_no_packet", OCI, || container("oci")),
        Case::new("rollback::lxc_loses_no_packet", LXC, || container("lxc")),
        Case::new("rollback::qemu_loses_no_packet", QEMU, machine),
    ]
}

/// A client that sends lines as fast as they go, and checks that each is answered once, in order.
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    /// Why one of them ended.
    failure: Arc<OnceLock<String>>,
    sender: JoinHandle<anyhow::Result<()>>,
    reader: JoinHandle<anyhow::Result<()>>,
}

impl Stream {
    /// Connects from `host` to a service that numbers lines.
    pub fn start(host: &Host, address: &str) -> anyhow::Result<Stream> {
        Stream::over(connect(host, address)?)
    }

    /// The same over a connection that is there.
    pub fn over(stream: TcpStream) -> anyhow::Result<Stream> {
        // Longer than anybody waits for it: who hears nothing has not lost the connection.
        stream.set_read_timeout(Some(2 * PATIENCE))?;
        stream.set_write_timeout(Some(2 * PATIENCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let failure = Arc::new(OnceLock::new());
        let start = |what: Box<dyn FnOnce() -> anyhow::Result<()> + Send>| {
            let failure = failure.clone();
            std::thread::spawn(move || {
                what().inspect_err(|error| {
                    let _ = failure.set(format!("{error:#}"));
                })
            })
        };
        let (stopped, count, mut out) = (stop.clone(), sent.clone(), stream.try_clone()?);
        let sender = start(Box::new(move || {
            let mut number = 0u64;
            while !stopped.load(SeqCst) {
                number += 1;
                out.write_all(format!("line {number}\n").as_bytes()).context("the guest takes nothing")?;
                count.store(number, SeqCst);
            }
            Ok(out.shutdown(Shutdown::Write)?)
        }));
        let count = answered.clone();
        let reader = start(Box::new(move || {
            let mut lines = BufReader::new(stream);
            let mut answer = String::new();
            for number in 1u64.. {
                answer.clear();
                if lines.read_line(&mut answer).with_context(|| format!("line {number} isn't answered"))? == 0 {
                    break;
                }
                ensure!(answer == format!("{number} line {number}\n"), "line {number} was answered by {answer:?}");
                count.store(number, SeqCst);
            }
            Ok(())
        }));
        Ok(Stream { stop, sent, answered, failure, sender, reader })
    }

    /// Waits for `more` answers.
    pub fn hears(&self, more: u64) -> anyhow::Result<()> {
        let (began, until) = (Instant::now(), self.answered.load(SeqCst) + more);
        while self.answered.load(SeqCst) < until {
            if self.reader.is_finished() || self.sender.is_finished() {
                bail!("the client has lost its connection: {}", self.failure.get().map_or("it ended", String::as_str));
            }
            let (sent, answered) = (self.sent.load(SeqCst), self.answered.load(SeqCst));
            ensure!(began.elapsed() < PATIENCE, "the client hears nothing: {sent} lines sent, {answered} answered");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Ends it; fails if anything that was sent isn't answered. Returns how much that was.
    pub fn end(self) -> anyhow::Result<u64> {
        self.stop.store(true, SeqCst);
        let panicked = |_| anyhow::anyhow!("the client panicked");
        self.sender.join().map_err(panicked)??;
        self.reader.join().map_err(panicked)??;
        let (sent, answered) = (self.sent.load(SeqCst), self.answered.load(SeqCst));
        ensure!(sent == answered, "{sent} lines were sent, {answered} answered");
        Ok(sent)
    }
}

fn container(driver: &str) -> anyhow::Result<()> {
    let moving = Moving::new()?;
    connect_bridges(&moving.hosts)?;
    let options = ["--network", NETWORK, "--", "/bin/echo", "7777"];
    moving.start(driver, &["echo"], &options)?;
    let root = folder(&moving.hosts.b).join("root/bin/echo");
    goes_back(&moving, &root)
}

fn machine() -> anyhow::Result<()> {
    let moving = Moving::machine()?;
    let root = folder(&moving.hosts.b).join("root/vmlinuz");
    goes_back(&moving, &root)
}

/// Tries to move it with something in the way at one point after the other, and then with nothing. It can't be restored without
/// the file `needed`.
fn goes_back(moving: &Moving, needed: &Path) -> anyhow::Result<()> {
    let (a, b) = (&moving.hosts.a, &moving.hosts.b);
    let remove = format!("rm {}", needed.display());
    let client = Stream::start(a, ADDRESS)?;
    client.hears(1000)?;
    // Before anything of it is stored here; before the release; and after that.
    for (host, point, script) in
        [(a, "after-stop", "exit 3"), (b, "before-restore", "exit 3"), (b, "before-restore", &remove)]
    {
        hook(host, point, script)?;
        let said = moving.hosts.a.ctl.run(["migrate", guest(), "b"])?.failed_with(1)?;
        ensure!(said.contains("runs on here") || said.contains("runs here again"), "{script}: {said}");
        client.hears(1000).with_context(|| format!("after {script}"))?;
        // From what is there, not from what was stored.
        let log = moving.hosts.a.daemon.as_ref().context("no daemon")?.log_text();
        ensure!(!log.contains("a frozen copy can't go on"), "{script}: {log}");
        std::fs::remove_file(host.ctl.store().join("hooks").join(point))?;
    }
    let report = moving.migrate(false, &[])?;
    ensure!(report["outcome"] == "moved", "{report}");
    client.hears(1000)?;
    client.end().map(drop)
}
