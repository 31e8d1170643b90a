//! A guest's network: a namespace with `eth0` in it, whose other end lies in a bridge of the host.
//!
//! ```text
//! guest: eth0 ── pair ── lg<hash> ── bridge
//! ```
//!
//! Hides `ip`. The namespace is ours, not the runtime's: it outlives the guest's processes, so that nobody hears them end
//! when they go on elsewhere. Invariants: while the pair's outer end is down ([`Link::hold`]) nothing reaches the guest and
//! nothing leaves it; on a host, two guests never share a namespace.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use std::net::IpAddr;
use std::time::Duration;

use super::GuestName;
use super::neighbours;
use super::options::Network;
use super::programs::{Programs, run, run_with};

/// A machine's connection: an interface of the host that QEMU serves, in the bridge.
pub struct Tap<'a>(Link<'a>);

impl<'a> Tap<'a> {
    /// As [`Link::of`].
    pub fn of(programs: &'a Programs, network: &'a Network, guest: &GuestName, run_folder: &Path) -> Option<Tap<'a>> {
        Link::of(programs, network, guest, run_folder).map(Tap)
    }

    /// The interface.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The host's bridge.
    pub fn bridge(&self) -> &str {
        self.0.bridge
    }

    /// Whether the host has the bridge.
    pub fn has_bridge(&self) -> bool {
        self.0.has_bridge()
    }

    /// Makes it. Nothing passes before [`Tap::release`].
    pub fn make(&self) -> Result<(), String> {
        self.remove()?;
        self.0.fix_bridge();
        self.0.ip(&["tuntap", "add", "dev", self.name(), "mode", "tap"])?;
        let joined = self.0.ip(&["link", "set", self.name(), "master", self.bridge()]);
        if joined.is_err() {
            let _ = self.remove();
        }
        joined
    }

    /// Lets nothing pass.
    pub fn hold(&self) -> Result<(), String> {
        self.0.hold()
    }

    /// Lets nothing pass, if it is there.
    pub fn hold_if_there(&self) -> Result<(), String> {
        if self.0.ip(&["link", "show", self.name()]).is_ok() { self.0.hold() } else { Ok(()) }
    }

    /// Lets everything pass.
    pub fn release(&self) -> Result<(), String> {
        self.0.release()
    }

    /// Tells the neighbours that the machine is here now. Its own bridge is told the way, which may still be another one; the
    /// others hear it through the bridge.
    pub fn announce(&self) {
        let hardware = Network::hardware_text(self.0.hardware);
        if let Some(bridge) = self.0.programs.find("bridge") {
            let words = ["fdb", "replace", &hardware, "dev", self.name(), "master", "dynamic"];
            if let Err(error) = run(Command::new(bridge).args(words).stdin(Stdio::null())) {
                tracing::debug!(error, "a bridge wasn't told where a machine is");
            }
        }
        self.0.announce_by(None, self.bridge());
    }

    /// Removes it, if it is there.
    pub fn remove(&self) -> Result<(), String> {
        self.0.remove()
    }
}

/// The interface in the namespace.
const INSIDE: &str = "eth0";
/// The pauses before each word to the neighbours.
const ANNOUNCEMENTS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(500)];
/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// A guest's connection. There may be nothing of it yet, or any more.
pub struct Link<'a> {
    programs: &'a Programs,
    bridge: &'a str,
    address: &'a str,
    gateway: Option<IpAddr>,
    hardware: [u8; 6],
    /// The name of the namespace and of the pair's outer end.
    name: String,
}

impl<'a> Link<'a> {
    /// The one of `guest`, whose run folder is `run_folder`, if its `network` needs one.
    pub fn of(programs: &'a Programs, network: &'a Network, guest: &GuestName, run_folder: &Path) -> Option<Link<'a>> {
        let Network::Bridge { bridge, address, gateway } = network else { return None };
        // Several daemons on one machine may have guests of the same name.
        let hash = blake3::hash(run_folder.as_os_str().as_encoded_bytes()).to_hex();
        Some(Link {
            programs,
            bridge,
            address,
            gateway: *gateway,
            hardware: Network::hardware_bytes(guest),
            name: format!("lg{}", &hash[..10]),
        })
    }

    /// The namespace's file.
    pub fn namespace(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.name)
    }

    /// Makes it. Nothing passes before [`Link::release`].
    pub fn make(&self) -> Result<(), String> {
        self.remove()?;
        let made = self.make_parts();
        if made.is_err() {
            let _ = self.remove();
        }
        made
    }

    fn make_parts(&self) -> Result<(), String> {
        let (name, hardware) = (self.name.as_str(), Network::hardware_text(self.hardware));
        self.fix_bridge();
        // A program for each line takes milliseconds, while the guest stands still.
        let pair = format!(
            "netns add {name}\nlink add {name} type veth peer name {INSIDE} address {hardware} netns {name}\n\
             link set {name} master {}\n",
            self.bridge
        );
        self.ip_lines(&[], &pair)?;
        let route = self.gateway.map(|gateway| format!("route add default via {gateway}\n")).unwrap_or_default();
        let inside =
            format!("link set lo up\naddress add {} dev {INSIDE}\nlink set {INSIDE} up\n{route}", self.address);
        self.ip_lines(&["-n", name], &inside)
    }

    /// Has the bridge keep its hardware address. By default it is that of one of its ports: it changes as guests come and go, nobody is
    /// told, and who knows the host by that address, as by a gateway's, finds it no more for up to a minute.
    fn fix_bridge(&self) {
        let fixed = self.program().and_then(|ip| {
            let shown = run(Command::new(ip).args(["-o", "link", "show", "dev", self.bridge]).stdin(Stdio::null()))?;
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            let address = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
            self.ip(&["link", "set", "dev", self.bridge, "address", address.ok_or("it has none")?])
        });
        if let Err(error) = fixed {
            tracing::debug!(bridge = self.bridge, error, "a bridge's hardware address may change");
        }
    }

    /// Lets nothing pass.
    pub fn hold(&self) -> Result<(), String> {
        self.ip(&["link", "set", &self.name, "down"])
    }

    /// Lets everything pass.
    pub fn release(&self) -> Result<(), String> {
        self.ip(&["link", "set", &self.name, "up"])
    }

    /// Tells the neighbours that the guest is here now, at once and some times after, as frames may be lost. Doesn't wait.
    pub fn announce(&self) {
        self.announce_by(Some(self.namespace()), INSIDE);
    }

    fn announce_by(&self, namespace: Option<PathBuf>, interface: &str) {
        let Some(address) = self.address.split_once('/').and_then(|(address, _)| address.parse::<IpAddr>().ok()) else {
            return;
        };
        let (hardware, interface) = (self.hardware, interface.to_owned());
        std::thread::spawn(move || {
            for pause in ANNOUNCEMENTS {
                std::thread::sleep(pause);
                if let Err(error) = neighbours::tell(namespace.as_deref(), &interface, hardware, address) {
                    tracing::debug!(%address, %error, "the neighbours weren't told where a guest is");
                }
            }
        });
    }

    /// A line for a shell that does [`Link::release`].
    pub fn release_line(&self) -> String {
        format!("ip link set {} up", self.name)
    }

    /// Removes it, if there is any of it.
    pub fn remove(&self) -> Result<(), String> {
        if Path::new("/sys/class/net").join(&self.name).exists() || self.ip(&["link", "show", &self.name]).is_ok() {
            self.ip(&["link", "del", &self.name])?;
        }
        if self.namespace().exists() {
            self.ip(&["netns", "del", &self.name])?;
        }
        Ok(())
    }

    /// The host's bridge.
    pub fn bridge(&self) -> &str {
        self.bridge
    }

    /// Whether the host has the bridge.
    pub fn has_bridge(&self) -> bool {
        self.ip(&["link", "show", self.bridge, "type", "bridge"]).is_ok()
    }

    fn program(&self) -> Result<PathBuf, String> {
        Ok(self.programs.find("ip").ok_or("there is no `ip`: install iproute2")?)
    }

    /// Has one `ip` do what these lines say, up to the first that fails.
    fn ip_lines(&self, arguments: &[&str], lines: &str) -> Result<(), String> {
        run_with(Command::new(self.program()?).args(arguments).args(["-batch", "-"]), lines.as_bytes()).map(|_| ())
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), String> {
        let ip = self.program()?;
        run(Command::new(ip).args(arguments).stdin(Stdio::null())).map(|_| ())
    }
}
