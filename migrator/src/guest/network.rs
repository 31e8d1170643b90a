//! A guest's network: a namespace with `eth0` in it, whose other end lies in a bridge of the host.
//!
//! ```text
//! guest: eth0 ── pair ── lg<hash> ── bridge
//! ```
//!
//! Hides `ip`. The namespace is ours, not the runtime's: it outlives the guest's processes, so that nobody hears them end
//! when they go on elsewhere. Invariants: from [`Link::hold`] on nothing reaches the guest, and while the pair's outer end is down
//! ([`Link::shut`]) nothing leaves it; on a host, two guests never share a namespace.
//!
//! What clients send by TCP meanwhile is kept, and sent through the bridge once the guest goes on, here or elsewhere: a client whose
//! first words are lost says them again only after 0.2, 0.6, 1.4 s.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;

use super::GuestName;
use super::network_setup::{self, Inside};
use super::options::Network;
use super::packets::Packets;
use super::programs::{Programs, run, run_with};
use super::{Obstacle, neighbours};

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

    /// As [`Link::hold`].
    pub fn hold(&self) -> Result<(), String> {
        self.0.hold()
    }

    /// As [`Link::shut`].
    pub fn shut(&self) -> Result<(), String> {
        self.0.shut()
    }

    /// Lets nothing pass, if it is there.
    pub fn shut_if_there(&self) -> Result<(), String> {
        if self.0.ip(&["link", "show", self.name()]).is_ok() { self.0.shut() } else { Ok(()) }
    }

    /// As [`Link::send_kept`].
    pub fn send_kept(&self) {
        self.0.send_kept();
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
pub(super) const INSIDE: &str = "eth0";
/// The pauses before each word to the neighbours.
const ANNOUNCEMENTS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(500)];
/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// What keeps frames for guests that are held, by the names of their connections. Each takes up to 4 MiB of the kernel's memory.
static KEPT: Mutex<BTreeMap<String, Packets>> = Mutex::new(BTreeMap::new());

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

    /// What the guest has set up in the namespace and wouldn't go along with it; nothing if there is no namespace.
    pub fn uncarried(&self) -> Vec<Obstacle> {
        if self.namespace().exists() { self.inside().obstacles() } else { Vec::new() }
    }

    /// Whether the guest has tables of nftables, which want `nft` wherever it comes.
    pub fn has_tables(&self) -> bool {
        self.namespace().exists() && self.inside().has_tables()
    }

    /// Writes what the guest has set up in the namespace into a state's folder.
    ///
    /// # Errors
    /// What can't be carried, or found out.
    pub fn save(&self, into: &Path) -> Result<(), String> {
        self.inside().save(into)
    }

    /// Sets up in the namespace, which was just made, what the state in `from` says.
    ///
    /// # Errors
    /// What can't be set up.
    pub fn load(&self, from: &Path) -> Result<(), String> {
        self.inside().load(from, &network_setup::made(self.address, self.gateway))
    }

    fn inside(&self) -> Inside<'_> {
        Inside { programs: self.programs, namespace: self.namespace() }
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

    /// Lets nothing in, and keeps what comes until [`Link::send_kept`]. What the guest sends until it stands still, as answers to what it
    /// has had, goes its way; [`Link::shut`] then.
    pub fn hold(&self) -> Result<(), String> {
        if let Err(error) = self.let_in(false) {
            tracing::debug!(bridge = self.bridge, error, "a guest's connection is shut both ways at once");
            self.shut()?;
        }
        let kept = Packets::open(self.bridge).and_then(|packets| packets.keep(self.hardware).map(|()| packets));
        match kept {
            Ok(packets) => drop(KEPT.lock().insert(self.name.clone(), packets)),
            Err(error) => tracing::debug!(bridge = self.bridge, %error, "what comes for a guest that is held is lost"),
        }
        Ok(())
    }

    /// Lets nothing pass, in or out.
    pub fn shut(&self) -> Result<(), String> {
        self.ip(&["link", "set", &self.name, "down"])
    }

    /// Has the bridge give the guest frames again, or none any more.
    fn let_in(&self, whether: bool) -> Result<(), String> {
        let bridge = self.programs.find("bridge").ok_or("there is no `bridge`: install iproute2")?;
        let say = |words: &[&str]| run(Command::new(&bridge).args(words).stdin(Stdio::null())).map(|_| ());
        let (name, on) = (self.name.as_str(), if whether { "on" } else { "off" });
        let every = ["learning", on, "flood", on, "mcast_flood", on, "bcast_flood", on];
        say(&[&["link", "set", "dev", name], &every[..]].concat())?;
        if !whether {
            // What the bridge has learnt, which may be nothing.
            let _ = say(&["fdb", "del", &Network::hardware_text(self.hardware), "dev", name, "master"]);
        }
        Ok(())
    }

    /// Whether the bridge gives the guest frames, by the last flag of those that `let_in` sets, if that can be seen at once.
    fn lets_in(&self) -> Option<bool> {
        // Where this folder is of another network it isn't known.
        let flag = Path::new("/sys/class/net").join(&self.name).join("brport/broadcast_flood");
        std::fs::read(flag).ok().map(|flag| flag.trim_ascii() == b"1")
    }

    /// The same, by asking the bridge. An old `bridge` may not say.
    fn is_said_to_let_in(&self) -> Option<bool> {
        let words = ["-d", "-j", "link", "show", "dev", &self.name];
        let said = run(Command::new(self.programs.find("bridge")?).args(words).stdin(Stdio::null())).ok()?;
        let ports: serde_json::Value = serde_json::from_slice(&said.stdout).ok()?;
        ports[0]["bcast_flood"].as_bool()
    }

    /// Lets everything pass, also what came while the guest was held.
    ///
    /// # Errors
    /// If it is shut, one way or both. What came is kept then, and it can be tried again.
    pub fn release(&self) -> Result<(), String> {
        self.ip(&["link", "set", &self.name, "up"])?;
        // One that was just made lets everything in, and a program for nothing takes milliseconds.
        if self.lets_in() != Some(true)
            && let Err(error) = self.let_in(true)
        {
            // One that couldn't be shut by its flags isn't, and need not be opened by them.
            if self.lets_in().or_else(|| self.is_said_to_let_in()) == Some(false) {
                let (name, bridge) = (&self.name, self.bridge);
                return Err(format!("the bridge {bridge} still gives the guest's port {name} no frames: {error}"));
            }
            tracing::debug!(bridge = self.bridge, error, "a guest's connection was opened without its bridge's flags");
        }
        // The bridge doesn't use its port yet.
        self.send_kept_by(&self.name);
        Ok(())
    }

    /// Sends what has come since the guest was held, if it was, to wherever the bridge now knows it. Keeps nothing more.
    pub fn send_kept(&self) {
        self.send_kept_by(self.bridge);
    }

    fn send_kept_by(&self, interface: &str) {
        let Some(kept) = KEPT.lock().remove(&self.name) else { return };
        match kept.send_kept(interface) {
            Ok(frames) => tracing::debug!(frames, interface, "sent what had come for a guest"),
            Err(error) => tracing::debug!(interface, %error, "what came for a guest was lost"),
        }
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
        KEPT.lock().remove(&self.name);
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

    use super::*;
    use crate::guest::packets::IPV4;

    fn ip(words: &str) {
        run(Command::new("ip").args(words.split(' '))).unwrap();
    }

    /// Does `work` in a network of its own; false if that can't be had.
    fn in_new_network(work: impl FnOnce() + Send) -> bool {
        std::thread::scope(|scope| {
            let worked = scope.spawn(|| {
                // SAFETY: a call without pointers, about this thread alone.
                #[allow(unsafe_code)]
                let is_there = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
                is_there.then(work).is_some()
            });
            worked.join().unwrap()
        })
    }

    fn frame(to: [u8; 6], protocol: u8, word: &[u8]) -> Vec<u8> {
        // A bridge may drop what isn't whole.
        let mut header = [0x45, 0, 0, 60, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 7, 0, 1, 10, 7, 0, 2];
        let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        header[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
        let mut frame = [&to[..], &[2, 0, 0, 0, 0, 9], &IPV4.to_be_bytes(), &header].concat();
        frame.extend(word);
        frame.resize(74, 0);
        frame
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn what_comes_by_tcp_for_a_guest_that_is_held_reaches_it_later() {
        const UDP: u8 = 17;
        let folder = tempfile::tempdir().unwrap();
        let could = in_new_network(|| {
            for words in [
                "link add lgbridge type bridge",
                "link set lgbridge up",
                "link add lgout type veth peer name client",
                "link set lgout master lgbridge up",
                "link set client up",
            ] {
                ip(words);
            }
            let programs = Programs::new(folder.path().to_owned(), "layerctl".into(), std::env::var_os("PATH"));
            let address = "10.7.0.2/24".to_owned();
            let network = Network::Bridge { bridge: "lgbridge".into(), address, gateway: None };
            let guest = GuestName::new("held").unwrap();
            let link = Link::of(&programs, &network, &guest, folder.path()).unwrap();
            link.make().unwrap();
            let namespace = File::open(link.namespace()).unwrap();
            let (inside, guest) = std::thread::scope(|scope| {
                let inside = scope.spawn(|| {
                    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                    let inside = Packets::open(INSIDE).unwrap();
                    inside.keep(link.hardware).unwrap();
                    (inside, Packets::open(INSIDE).unwrap())
                });
                inside.join().unwrap()
            });
            let client = Packets::open("client").unwrap();
            let say = |protocol, word: &[u8]| client.send(IPV4, &frame(link.hardware, protocol, word)).unwrap();
            let hear = || inside.wait_kept();

            let release = || {
                link.release().unwrap();
                let shown = || run(Command::new("bridge").args(["link", "show", "dev", &link.name])).unwrap();
                while !String::from_utf8_lossy(&shown().stdout).contains("state forwarding") {
                    std::thread::sleep(Duration::from_millis(5));
                }
            };
            release();
            say(6, b"before");
            assert_eq!(hear(), [frame(link.hardware, 6, b"before")]);
            link.hold().unwrap();
            say(6, b"first");
            say(UDP, b"who doesn't say it again");
            client.send(IPV4, &frame([2, 9, 9, 9, 9, 9], 6, b"for others")).unwrap();
            say(6, b"second");
            // What it was about to answer goes out until it stands still.
            let (asker, answer) = ([2, 0, 0, 0, 0, 9], b"answer");
            let hears = Packets::open("client").unwrap();
            hears.keep(asker).unwrap();
            guest.send(IPV4, &frame(asker, 6, answer)).unwrap();
            assert_eq!(hears.wait_kept(), [frame(asker, 6, answer)]);
            link.shut().unwrap();
            let _ = guest.send(IPV4, &frame(asker, 6, answer));
            assert_eq!(hears.kept_now(), 0, "nothing leaves it");
            say(6, b"third");
            release();
            let kept = [b"first ", b"second", b"third "].map(|word| frame(link.hardware, 6, word.trim_ascii_end()));
            assert_eq!(hear(), kept);
            release();
            say(6, b"after");
            assert_eq!(hear(), [frame(link.hardware, 6, b"after")], "and nothing twice");

            // It goes on elsewhere: the bridge sends its frames every way.
            link.hold().unwrap();
            link.shut().unwrap();
            let elsewhere = Packets::open("client").unwrap();
            elsewhere.keep(link.hardware).unwrap();
            Packets::open("lgbridge").unwrap().send(IPV4, &frame(link.hardware, 6, b"from here")).unwrap();
            assert_eq!(elsewhere.wait_kept().len(), 1);
            link.send_kept();
            assert_eq!(elsewhere.wait_kept(), [frame(link.hardware, 6, b"from here")]);
            link.hold().unwrap();
            link.remove().unwrap();
            assert!(!KEPT.lock().contains_key(&link.name), "nothing is kept for who is gone");
        });
        if !could {
            eprintln!("SKIPPED: a network of its own can't be had here (it needs root)");
        }
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn what_a_guest_has_set_up_in_its_network_goes_along_or_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let could = in_new_network(|| {
            ip("link add lgbridge type bridge");
            let programs = Programs::new(folder.path().to_owned(), "layerctl".into(), std::env::var_os("PATH"));
            let gateway = Some("10.7.0.1".parse().unwrap());
            let network = Network::Bridge { bridge: "lgbridge".into(), address: "10.7.0.2/24".into(), gateway };
            let guest = GuestName::new("settled").unwrap();
            let [here, there] =
                ["here", "there"].map(|run| Link::of(&programs, &network, &guest, &folder.path().join(run)).unwrap());
            let says = |link: &Link<'_>, words: &[&str]| {
                let namespace = format!("--net={}", link.namespace().display());
                let said = run(Command::new("nsenter").arg(namespace).args(words)).unwrap();
                String::from_utf8(said.stdout).unwrap()
            };
            let state = |name: &str| {
                let state = folder.path().join(name);
                std::fs::create_dir(&state).unwrap();
                state
            };
            here.make().unwrap();
            here.save(&state("plain")).unwrap();
            assert!(!here.has_tables());
            let text = std::fs::read(folder.path().join("plain").join(network_setup::FILE)).unwrap();
            let plain = network_setup::NetworkSetup::parse(&text).unwrap();
            let orders = plain.orders(&network_setup::made(here.address, here.gateway));
            assert_eq!((&*orders.ip, orders.nft), ("", ""), "there is nothing to do for one that has set up nothing");

            for line in [
                "ip address add 10.8.0.2/24 dev eth0 label eth0:1",
                "ip address add fd00::2/64 dev eth0 nodad",
                "ip address add 10.99.0.1/32 dev lo",
                "ip route add 10.9.0.0/16 via 10.8.0.9 metric 5 mtu 1400",
                "ip route add 10.11.0.0/16 nexthop via 10.7.0.3 weight 2 nexthop via 10.8.0.4",
                "ip route add blackhole 10.10.0.0/16",
                "ip route add 10.13.0.0/16 via 10.7.0.7 table 77",
                "ip -6 route add fd01::/64 via fd00::9",
                "ip -6 route add default via fd00::1",
                "ip link set eth0 mtu 1400",
                "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.eth0.rp_filter=2",
                // The ports fit each other, but not what is there before in any order.
                "sysctl -qw net.ipv4.ip_unprivileged_port_start=5 net.ipv4.ip_local_port_range=10\t5000",
                "sysctl -qw net.ipv6.conf.eth0.accept_ra=0",
                "ip -6 route add fd02::/64 via fd00::9 proto ra",
                "ip route add 10.14.0.0/16 via 10.7.0.7 proto 77 table 4000",
                "nft add table inet CRIU-77",
                "nft add table inet filter { set bad { type ipv4_addr; elements = { 10.7.0.66, 10.7.0.67 }; }; }",
                "nft add chain inet filter in { type filter hook input priority 0; policy accept; }",
                "nft add rule inet filter in ip saddr @bad tcp dport 99 counter drop comment \"never\"",
            ] {
                says(&here, &line.split(' ').collect::<Vec<_>>());
            }
            assert_eq!(here.uncarried(), []);
            let moved = state("moved");
            here.save(&moved).unwrap();
            there.make().unwrap();
            there.load(&moved).unwrap();
            assert!(there.has_tables());
            let looks = [
                &["ip", "-o", "address"][..],
                &["ip", "route", "show", "table", "all"],
                &["ip", "-6", "route", "show", "table", "main"],
                &["sysctl", "net.ipv4.ip_forward", "net.ipv4.conf.eth0.rp_filter"],
                &["sysctl", "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ip_local_port_range"],
                &["cat", "/proc/sys/net/ipv4/ip_forward"],
                &["nft", "list", "table", "inet", "filter"],
            ];
            for look in looks {
                // An address that can't be looked for without a carrier stays one to be looked for.
                let plain = |text: String| text.replace(" tentative", "");
                assert_eq!(plain(says(&there, look)), plain(says(&here, look)), "{look:?}");
            }
            assert!(says(&there, &["ip", "link", "show", "eth0"]).contains("mtu 1400"));
            assert!(says(&there, &["nft", "list", "ruleset"]).contains("drop comment \"never\""));
            assert!(!says(&there, &["nft", "list", "ruleset"]).contains("CRIU"), "a lock of CRIU's goes along");

            // Hosts differ: a setting that can't be here as it was there is no reason to fail.
            let odd = state("odd");
            let text = std::fs::read_to_string(moved.join(network_setup::FILE)).unwrap();
            let (forwards, never) = ("\"ipv4/ip_forward\": \"1\"", "\"ipv4/tcp_fin_timeout\": \"never\"");
            assert!(text.contains(forwards));
            let text = text.replace(forwards, &format!("{forwards}, {never}, \"ipv4/of_no_kernel\": \"1\""));
            std::fs::write(odd.join(network_setup::FILE), text.replace("\"ipv4/tcp_fin_timeout\": \"60\",", ""))
                .unwrap();
            there.make().unwrap();
            there.load(&odd).unwrap();
            assert_eq!(says(&there, &["cat", "/proc/sys/net/ipv4/ip_forward"]), "1\n", "the others are set");

            // A state of an earlier version says nothing.
            there.make().unwrap();
            there.load(&state("earlier")).unwrap();
            says(&there, &["nft", "add", "table", "inet", "CRIU-77"]);
            assert!(!there.has_tables(), "a lock of CRIU's is none of the guest's");
            for (line, name) in [
                ("ip tuntap add dev vpn0 mode tun", "vpn0 (tun)"),
                ("ip rule add from 10.8.0.2 table 77", "a rule for routes"),
                ("ip -6 rule add from fd00::2 table 77", "a rule for routes"),
            ] {
                there.make().unwrap();
                says(&there, &line.split(' ').collect::<Vec<_>>());
                let found = there.uncarried();
                assert!(found.len() == 1 && found[0].what.contains(name), "{line}: {found:?}");
                let error = there.save(&folder.path().join("moved")).unwrap_err();
                assert!(error.contains(name), "{line}: {error}");
            }
            here.remove().unwrap();
            there.remove().unwrap();
        });
        if !could {
            eprintln!("SKIPPED: a network of its own can't be had here (it needs root)");
        }
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn a_guest_that_the_bridge_still_gives_no_frames_is_not_taken_for_one_that_is_connected() {
        use crate::guest::criu::write_script;

        let folder = tempfile::tempdir().unwrap();
        let could = in_new_network(|| {
            ip("link add lgbridge type bridge");
            ip("link set lgbridge up");
            let path = std::env::var_os("PATH").unwrap();
            let first =
                std::env::join_paths(std::iter::once(folder.path().to_owned()).chain(std::env::split_paths(&path)));
            let programs = Programs::new(folder.path().to_owned(), "layerctl".into(), Some(first.unwrap()));
            let network =
                Network::Bridge { bridge: "lgbridge".into(), address: "10.7.0.2/24".to_owned(), gateway: None };
            let guest = GuestName::new("shut").unwrap();
            let link = Link::of(&programs, &network, &guest, folder.path()).unwrap();
            link.make().unwrap();
            link.release().unwrap();
            link.hold().unwrap();
            let real = Programs::new(folder.path().to_owned(), "layerctl".into(), Some(path)).find("bridge").unwrap();
            let wrapper = folder.path().join("bridge");
            let fails = "case \" $* \" in *' flood on '*) echo no >&2; exit 1;; esac";
            write_script(&wrapper, &format!("#!/bin/sh\n{fails}\nexec {} \"$@\"\n", real.display())).unwrap();
            for _ in 0..2 {
                let error = link.release().unwrap_err();
                assert!(error.contains("lgbridge") && error.contains("no"), "{error}");
                assert_eq!(link.is_said_to_let_in(), Some(false));
                assert!(KEPT.lock().contains_key(&link.name), "what came meanwhile is lost");
            }
            std::fs::remove_file(&wrapper).unwrap();
            link.release().unwrap();
            assert_eq!(link.is_said_to_let_in(), Some(true));
            // One that lets everything in needs nothing.
            write_script(&wrapper, &format!("#!/bin/sh\n{fails}\nexec {} \"$@\"\n", real.display())).unwrap();
            link.release().unwrap();
            link.remove().unwrap();
        });
        if !could {
            eprintln!("SKIPPED: a network of its own can't be had here (it needs root)");
        }
    }
}
