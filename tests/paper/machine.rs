//! A machine by QEMU's own tools, for the paper's method: `stop` and `migrate` to a file (a plain stream of its pages), and back.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use layerfs_tests::network::{End, Link};
use serde_json::{Value, json};

use crate::cell::App;
use crate::lan::ip;
use crate::theirs::{HARDWARE, Places, Tools, in_net};
use crate::{measure, ours, roots};

const TAP: &str = "guest";
const STATE: &str = "state/memory";
const PATIENCE: Duration = Duration::from_secs(600);

/// A machine, on the first host or the second.
pub struct Machine<'a> {
    link: &'a Link,
    places: &'a Places,
    app: App,
    running: Vec<Child>,
}

impl<'a> Machine<'a> {
    /// One that doesn't run yet.
    pub fn new(link: &'a Link, places: &'a Places, app: App) -> anyhow::Result<Machine<'a>> {
        roots::boot_files(&places.at("a", "boot"))?;
        Ok(Machine { link, places, app, running: Vec::new() })
    }

    fn end(&self, host: &str) -> &'a End {
        if host == "a" { &self.link.a } else { &self.link.b }
    }

    fn connect(&self, host: &str) -> anyhow::Result<()> {
        let host = &self.end(host).namespace;
        ip(&format!("-n {host} tuntap add dev {TAP} mode tap"))?;
        ip(&format!("-n {host} link set {TAP} master br0 up"))
    }

    fn socket(&self, host: &str) -> PathBuf {
        self.places.at(host, "qmp")
    }

    /// The same machine as the driver's, but for how its memory is kept.
    fn command(&self, host: &str) -> Command {
        let boot = |name: &str| self.places.at("a", "boot").join(name);
        let memory = measure::machine_megabytes(self.app);
        let disk = self.places.at(host, "instance");
        let mut command = in_net(self.end(host), "qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-no-user-config", "-machine", "q35,accel=tcg"]);
        command.args(["-cpu", "qemu64", "-m", &format!("{memory}M"), "-smp", "1"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.socket(host).display()));
        command.arg("-serial").arg(format!("file:{}", self.places.at(host, "console").display()));
        command.arg("-kernel").arg(boot("vmlinuz")).arg("-initrd").arg(boot("initrd"));
        command.args(["-append", &ours::machine_append(self.app)]);
        let file = json!({ "driver": "file", "node-name": "file0", "filename": disk });
        let raw = json!({ "driver": "raw", "node-name": "disk0", "file": "file0" });
        command.args(["-blockdev", &file.to_string(), "-blockdev", &raw.to_string()]);
        command.args(["-device", "virtio-blk-pci,drive=disk0"]);
        command.args(["-netdev", &format!("tap,id=net0,ifname={TAP},script=no,downscript=no")]);
        command.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={HARDWARE}")]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

/// QEMU's control socket.
struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(socket: &std::path::Path) -> anyhow::Result<Qmp> {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => ensure!(began.elapsed() < Duration::from_secs(10), "QEMU doesn't answer: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        qmp.line()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.reader.get_mut().write_all(text.as_bytes())?;
        loop {
            let answer = self.line()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }

    /// Waits for the end of what moves memory.
    fn finish(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let state = self.call("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU: {state}"),
                _ => ensure!(began.elapsed() < PATIENCE, "QEMU doesn't come to an end: {state}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Tools for Machine<'_> {
    fn start(&mut self) -> anyhow::Result<()> {
        self.connect("a")?;
        let child = self.command("a").spawn().context("cannot start QEMU")?;
        self.running.push(child);
        Qmp::connect(&self.socket("a")).map(drop)
    }

    fn prepare(&mut self) -> anyhow::Result<()> {
        self.connect("b")
    }

    fn suspend(&mut self) -> anyhow::Result<()> {
        let mut qmp = Qmp::connect(&self.socket("a"))?;
        qmp.call("stop", json!({}))?;
        ip(&format!("-n {} link set {TAP} down", self.link.a.namespace))?;
        qmp.call("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        qmp.call("migrate", json!({ "uri": format!("file:{}", self.places.at("a", STATE).display()) }))?;
        qmp.finish()?;
        // It lets go of the disk, with all that it has in memory of it.
        drop(qmp.call("quit", json!({})));
        if let Some(mut child) = self.running.pop() {
            child.wait()?;
        }
        Ok(())
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        let child = self.command("b").args(["-incoming", "defer"]).spawn().context("cannot start QEMU")?;
        self.running.push(child);
        let mut qmp = Qmp::connect(&self.socket("b"))?;
        qmp.call("migrate-incoming", json!({ "uri": format!("file:{}", self.places.at("b", STATE).display()) }))?;
        qmp.finish()?;
        qmp.call("cont", json!({})).map(drop)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        for child in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Machines end with their hosts' namespaces; nothing else is left of them.
        let _ = fs::remove_file(self.socket("b"));
    }
}
