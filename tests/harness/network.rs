//! Two network namespaces and the paths between them: one veth pair, or any number of paths with delay and loss.
//!
//! Hides `ip` and `tc`. Invariant: a namespace's name holds the process id of its maker, so that what a killed test
//! left behind is found, and removed by its own name, by the next one.

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::case::output_of;
use crate::emulator::{Conditions, Emulator};

const PREFIX: &str = "lfst";
static NEXT: AtomicU32 = AtomicU32::new(1);

/// One end of a link.
#[derive(Clone, Debug)]
pub struct End {
    /// The namespace's name.
    pub namespace: String,
    /// The interface inside.
    pub interface: String,
    /// Its IPv4 address.
    pub address: String,
}

impl End {
    /// Bytes that this end has sent, frames' headers included, by the kernel's count.
    pub fn sent_bytes(&self) -> anyhow::Result<u64> {
        self.counter("tx")
    }

    /// Bytes that this end has received.
    pub fn received_bytes(&self) -> anyhow::Result<u64> {
        self.counter("rx")
    }

    /// Bytes that this end's shaper has let through: those of the frames as a wire would carry them. The interface
    /// counts the headers of a large segment once, though it would leave a real card in many frames.
    pub fn shaped_bytes(&self) -> anyhow::Result<u64> {
        let args = ["-n", &self.namespace, "-json", "-statistics", "qdisc", "show", "dev", &self.interface, "root"];
        let text = output_of(Command::new("tc").args(args))?;
        let value: Value = serde_json::from_str(&text)?;
        value[0]["bytes"].as_u64().with_context(|| format!("no bytes in {text}"))
    }

    fn counter(&self, direction: &str) -> anyhow::Result<u64> {
        let text = ip(&["-n", &self.namespace, "-json", "-statistics", "link", "show", "dev", &self.interface])?;
        let value: Value = serde_json::from_str(&text)?;
        value[0]["stats64"][direction]["bytes"].as_u64().with_context(|| format!("no {direction} bytes in {text}"))
    }
}

/// A pair of namespaces joined by one path or more. Dropping it removes all.
#[derive(Debug)]
pub struct Link {
    /// The first path's first end.
    pub a: End,
    /// The first path's second end.
    pub b: End,
    /// Both ends of the other paths: interface `net1` with `10.99.1.1` and `.2`, and so on.
    pub more: Vec<(End, End)>,
    emulators: Vec<Emulator>,
}

impl Link {
    /// A link without a limit: a veth pair.
    pub fn new() -> anyhow::Result<Link> {
        let link = Link::namespaces(1)?;
        let [a, b] = [&link.a.namespace, &link.b.namespace];
        ip(&["link", "add", "net0", "netns", a, "type", "veth", "peer", "name", "net0", "netns", b])?;
        link.bring_up()?;
        Ok(link)
    }

    /// A link of several paths, each with its conditions. Their rates aren't limited; see [`Link::shape`].
    pub fn emulated(paths: &[Conditions]) -> anyhow::Result<Link> {
        let mut link = Link::namespaces(paths.len())?;
        for (at, conditions) in paths.iter().enumerate() {
            let emulator = Emulator::start(&link.a.namespace, &link.b.namespace, &format!("net{at}"), *conditions)?;
            link.emulators.push(emulator);
        }
        link.bring_up()?;
        Ok(link)
    }

    /// Two namespaces, and what `paths` paths between them will be called.
    fn namespaces(paths: usize) -> anyhow::Result<Link> {
        remove_orphans();
        let tag = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let end = |letter: &str, path: usize, host: u8| End {
            namespace: format!("{tag}{letter}"),
            interface: format!("net{path}"),
            address: format!("10.99.{path}.{host}"),
        };
        let mut ends = (0..paths).map(|path| (end("a", path, 1), end("b", path, 2)));
        let (a, b) = ends.next().context("a link has one path at least")?;
        let link = Link { a, b, more: ends.collect(), emulators: Vec::new() };
        ip(&["netns", "add", &link.a.namespace])?;
        ip(&["netns", "add", &link.b.namespace])?;
        Ok(link)
    }

    /// All ends, path by path.
    pub fn ends(&self) -> impl Iterator<Item = &End> {
        [&self.a, &self.b].into_iter().chain(self.more.iter().flat_map(|(a, b)| [a, b]))
    }

    fn bring_up(&self) -> anyhow::Result<()> {
        for end in self.ends() {
            let (namespace, interface) = (end.namespace.as_str(), end.interface.as_str());
            ip(&["-n", namespace, "addr", "add", &format!("{}/24", end.address), "dev", interface])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", interface, "txqueuelen", "10000", "up"])?;
        }
        Ok(())
    }

    /// The emulator of path `path`, to change its conditions.
    pub fn emulator(&self, path: usize) -> anyhow::Result<&Emulator> {
        self.emulators.get(path).context("this path has no emulator")
    }

    /// Shapes both directions of every path to `megabits` per second each.
    pub fn shape(&self, megabits: u32) -> anyhow::Result<()> {
        for end in self.ends() {
            let rate = format!("{megabits}mbit");
            let tbf = [
                "-n",
                &end.namespace,
                "qdisc",
                "replace",
                "dev",
                &end.interface,
                "root",
                "tbf",
                "rate",
                &rate,
                "burst",
                "256kb",
                "latency",
                "50ms",
            ];
            output_of(Command::new("tc").args(tbf))?;
        }
        Ok(())
    }

    /// Lets MPTCP use all paths: the first host opens a subflow from each address to each that the second tells of.
    pub fn add_mptcp_endpoints(&self) -> anyhow::Result<()> {
        for end in [&self.a, &self.b] {
            ip(&["-n", &end.namespace, "mptcp", "limits", "set", "subflow", "4", "add_addr_accepted", "4"])?;
        }
        for (a, b) in &self.more {
            ip(&[
                "-n",
                &a.namespace,
                "mptcp",
                "endpoint",
                "add",
                &a.address,
                "dev",
                &a.interface,
                "subflow",
                "fullmesh",
            ])?;
            ip(&["-n", &b.namespace, "mptcp", "endpoint", "add", &b.address, "dev", &b.interface, "signal"])?;
        }
        Ok(())
    }

    /// Cuts or mends the first path.
    pub fn set_up(&self, up: bool) -> anyhow::Result<()> {
        self.set_path_up(0, up)
    }

    /// Cuts or mends path `path`.
    pub fn set_path_up(&self, path: usize, up: bool) -> anyhow::Result<()> {
        let interface = format!("net{path}");
        ip(&["-n", &self.a.namespace, "link", "set", &interface, if up { "up" } else { "down" }]).map(drop)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.emulators.clear();
        for end in [&self.a, &self.b] {
            let _ = ip(&["netns", "delete", &end.namespace]);
        }
    }
}

/// Runs `make` on a thread inside the namespace of `end`; what it makes (a socket) stays of that namespace.
pub fn inside<T: Send>(end: &End, make: impl FnOnce() -> std::io::Result<T> + Send) -> std::io::Result<T> {
    let path = format!("/run/netns/{}", end.namespace);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            move_into_link_name_space(std::fs::File::open(path)?.as_fd(), Some(LinkNameSpaceType::Network))?;
            make()
        });
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread in the namespace panicked")))
    })
}

/// Whether namespaces can be made here.
pub fn usable() -> anyhow::Result<()> {
    static USABLE: std::sync::OnceLock<Result<(), String>> = std::sync::OnceLock::new();
    USABLE
        .get_or_init(|| Link::new().map(drop).map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

fn ip(args: &[&str]) -> anyhow::Result<String> {
    output_of(Command::new("ip").args(args))
}

/// Removes the namespaces of makers that no longer live.
fn remove_orphans() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let maker =
            name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).and_then(|pid| pid.parse::<u32>().ok());
        if maker.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}
