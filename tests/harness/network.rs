//! Two network namespaces and the veth pair between them, shaped if wanted.
//!
//! Hides `ip` and `tc`. Invariant: a namespace's name holds the process id of its maker, so that what a killed test
//! left behind is found, and removed by its own name, by the next one.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use serde_json::Value;

use crate::case::output_of;

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

/// A pair of namespaces joined by a veth pair. Dropping it removes both.
#[derive(Debug)]
pub struct Link {
    /// The first end.
    pub a: End,
    /// The second end.
    pub b: End,
}

impl Link {
    /// A link without a limit.
    pub fn new() -> anyhow::Result<Link> {
        remove_orphans();
        let tag = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let end = |letter: &str, address: &str| End {
            namespace: format!("{tag}{letter}"),
            interface: "net0".into(),
            address: address.into(),
        };
        let link = Link { a: end("a", "10.99.0.1"), b: end("b", "10.99.0.2") };
        ip(&["netns", "add", &link.a.namespace])?;
        ip(&["netns", "add", &link.b.namespace])?;
        ip(&[
            "link",
            "add",
            "net0",
            "netns",
            &link.a.namespace,
            "type",
            "veth",
            "peer",
            "name",
            "net0",
            "netns",
            &link.b.namespace,
        ])?;
        for end in [&link.a, &link.b] {
            let namespace = end.namespace.as_str();
            ip(&["-n", namespace, "addr", "add", &format!("{}/24", end.address), "dev", "net0"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "net0", "up"])?;
        }
        Ok(link)
    }

    /// Shapes both directions to `megabits` per second.
    pub fn shape(&self, megabits: u32) -> anyhow::Result<()> {
        for end in [&self.a, &self.b] {
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

    /// Cuts or mends the link.
    pub fn set_up(&self, up: bool) -> anyhow::Result<()> {
        ip(&["-n", &self.a.namespace, "link", "set", "net0", if up { "up" } else { "down" }]).map(drop)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for end in [&self.a, &self.b] {
            let _ = ip(&["netns", "delete", &end.namespace]);
        }
    }
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
