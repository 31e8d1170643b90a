//! The clients' network: a namespace with the user, in whose bridge the bridges of both hosts end, beside the link between the hosts.
//!
//! ```text
//!        user 10.77.0.1
//!      ┌─────┴─────┐
//!   br0 of a     br0 of b        what clients see: not shaped, and not counted
//!      a ─── net0 ─── b          what moves guests: shaped, and counted
//! ```

use std::process::Command;

use anyhow::Context;
use layerfs_tests::case::output_of;
use layerfs_tests::network::{End, Link};

/// The guest's address, and its port for whoever asks.
pub const GUEST: &str = "10.77.0.2";
/// The network's mask.
pub const MASK: &str = "255.255.255.0";
/// The port of the guest's first program.
pub const PORT: &str = "7000";

/// The user's namespace. Dropping it removes it.
pub struct Lan {
    /// The user.
    pub user: End,
}

impl Lan {
    /// Connects the hosts at both ends of `link`.
    pub fn new(link: &Link) -> anyhow::Result<Lan> {
        let stem = link.a.namespace.strip_suffix('a').context("the namespace isn't called as expected")?;
        let namespace = format!("{stem}u");
        let user = End { namespace, interface: "lan".to_owned(), address: "10.77.0.1".to_owned() };
        let lan = Lan { user };
        let user = lan.user.namespace.as_str();
        ip(&format!("netns add {user}"))?;
        ip(&format!("-n {user} link add lan type bridge forward_delay 0"))?;
        for end in [&link.a, &link.b] {
            let host = end.namespace.as_str();
            let port = if host == link.a.namespace { "to-a" } else { "to-b" };
            ip(&format!("link add {port} netns {user} type veth peer name cable netns {host}"))?;
            ip(&format!("-n {user} link set {port} master lan up"))?;
            ip(&format!("-n {host} link add br0 type bridge forward_delay 0"))?;
            ip(&format!("-n {host} link set cable master br0 up"))?;
            ip(&format!("-n {host} link set br0 up"))?;
        }
        ip(&format!("-n {user} addr add {}/24 dev lan", lan.user.address))?;
        ip(&format!("-n {user} link set lo up"))?;
        ip(&format!("-n {user} link set lan up"))?;
        Ok(lan)
    }

    /// The user hears where the guest is, as by a gratuitous ARP.
    pub fn learns(&self, hardware: &str) -> anyhow::Result<()> {
        ip(&format!("-n {} neigh replace {GUEST} lladdr {hardware} dev lan nud reachable", self.user.namespace))
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let _ = ip(&format!("netns delete {}", self.user.namespace));
    }
}

/// Runs `ip` with these words.
pub fn ip(words: &str) -> anyhow::Result<()> {
    output_of(Command::new("ip").args(words.split_ascii_whitespace())).map(drop)
}
