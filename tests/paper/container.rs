//! A container by LXC's own tools, for the paper's method.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use layerfs_tests::fixtures;
use layerfs_tests::network::{End, Link, inside};

use crate::cell::App;
use crate::lan::{GUEST, PORT, ip};
use crate::roots;
use crate::theirs::{HARDWARE, Places, Tools, in_net};

const NAME: &str = "instance";

/// A container, on the first host or the second.
pub struct Container<'a> {
    link: &'a Link,
    places: &'a Places,
    app: App,
}

impl<'a> Container<'a> {
    /// One that doesn't run yet.
    pub fn new(link: &'a Link, places: &'a Places, app: App) -> anyhow::Result<Container<'a>> {
        ensure!(layerfs_tests::case::has_tool("lxc-start"), "LXC is missing: run scripts/setup guests");
        Ok(Container { link, places, app })
    }

    fn end(&self, host: &str) -> &'a End {
        if host == "a" { &self.link.a } else { &self.link.b }
    }

    /// The namespace of the container itself on a host.
    fn namespace(&self, host: &str) -> String {
        format!("{}g", self.end(host).namespace)
    }

    /// A namespace for it with an interface in the host's bridge, which is down.
    fn connect(&self, host: &str) -> anyhow::Result<()> {
        let (outside, guest) = (&self.end(host).namespace, self.namespace(host));
        ip(&format!("netns add {guest}"))?;
        ip(&format!("link add guest netns {outside} type veth peer name eth0 address {HARDWARE} netns {guest}"))?;
        ip(&format!("-n {outside} link set guest master br0"))?;
        ip(&format!("-n {guest} link set lo up"))?;
        ip(&format!("-n {guest} addr add {GUEST}/24 dev eth0"))?;
        ip(&format!("-n {guest} link set eth0 up"))
    }

    fn pass(&self, host: &str, state: &str) -> anyhow::Result<()> {
        ip(&format!("-n {} link set guest {state}", self.end(host).namespace))
    }

    fn lxc_folder(&self, host: &str) -> PathBuf {
        self.places.at(host, "lxc")
    }

    fn configure(&self, host: &str) -> anyhow::Result<()> {
        let folder = self.lxc_folder(host).join(NAME);
        fs::create_dir_all(&folder)?;
        let command = [vec![roots::SERVICE.to_owned(), PORT.to_owned()], roots::command(self.app)].concat();
        let mut lines = vec![
            format!("lxc.rootfs.path = dir:{}", self.places.at(host, NAME).display()),
            format!("lxc.uts.name = {NAME}"),
            format!("lxc.namespace.share.net = /run/netns/{}", self.namespace(host)),
            format!("lxc.init.cmd = {}", command.join(" ")),
        ];
        let fixed = [
            "console.path = none",
            "tty.max = 0",
            "pty.max = 1",
            "mount.auto = proc:rw sys:rw",
            "autodev = 1",
            "signal.halt = SIGKILL",
            "signal.stop = SIGKILL",
            "monitor.unshare = 0",
            "environment = PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ];
        lines.extend(fixed.map(|line| format!("lxc.{line}")));
        fs::write(folder.join("config"), lines.join("\n") + "\n")?;
        Ok(())
    }

    /// Tells CRIU, which reads its settings below `HOME`, what it needs; and about the network, which isn't its own to save or make.
    fn set_criu(&self, host: &str, network: &str) -> anyhow::Result<()> {
        let home = self.lxc_folder(host).join("home/.criu");
        fs::create_dir_all(&home)?;
        let settings = "network-lock nftables\nghost-limit 64M\nlink-remap\nfile-locks\ntcp-established\n";
        Ok(fs::write(home.join("default.conf"), format!("{settings}{network}\n"))?)
    }

    /// One of LXC's tools on a host, with a CRIU that works and, if that restores, finds the container's network as descriptor 9.
    fn tool(&self, host: &str, tool: &str, restores: bool) -> anyhow::Result<Command> {
        let path = format!("{}:{}", fixtures::guest_tools().join("bin").display(), std::env::var("PATH")?);
        let mut command = in_net(self.end(host), "sh");
        let network = if restores { format!("9</run/netns/{}", self.namespace(host)) } else { String::new() };
        command.arg("-c").arg(format!("exec {tool} \"$@\" {network}")).arg(tool);
        command.env("HOME", self.lxc_folder(host).join("home")).env("PATH", path);
        command.arg("-P").arg(self.lxc_folder(host)).args(["-n", NAME]);
        Ok(command)
    }

    fn call(&self, host: &str, tool: &str, words: &[&str]) -> anyhow::Result<()> {
        let log = self.lxc_folder(host).join("log");
        let mut command = self.tool(host, tool, words.contains(&"-r"))?;
        // Pipes would stay open as long as the container runs.
        command.args(words).arg("-o").arg(&log).args(["-l", "ERROR"]).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().with_context(|| format!("cannot run {tool}"))?;
        ensure!(status.success(), "{tool}: {status}\n{}", fs::read_to_string(&log).unwrap_or_default());
        Ok(())
    }
}

impl Tools for Container<'_> {
    fn start(&mut self) -> anyhow::Result<()> {
        self.connect("a")?;
        self.configure("a")?;
        self.call("a", "lxc-start", &["-d"])?;
        self.pass("a", "up")
    }

    fn prepare(&mut self) -> anyhow::Result<()> {
        self.connect("b")?;
        self.configure("b")
    }

    fn suspend(&mut self) -> anyhow::Result<()> {
        let state = self.places.at("a", "state");
        let network = fs::metadata(format!("/run/netns/{}", self.namespace("a")))?.ino();
        self.set_criu("a", &format!("external net[{network}]:guest"))?;
        self.call("a", "lxc-checkpoint", &["-s", "-D", &state.to_string_lossy()])?;
        self.pass("a", "down")
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        let state = self.places.at("b", "state");
        self.set_criu("b", "inherit-fd fd[9]:guest")?;
        self.call("b", "lxc-checkpoint", &["-r", "-D", &state.to_string_lossy()])?;
        self.pass("b", "up")?;
        announce(&self.namespace("b"))
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        for host in ["a", "b"] {
            if self.lxc_folder(host).join(NAME).exists() {
                let _ = self.call(host, "lxc-stop", &["-k"]);
            }
            let _ = ip(&format!("netns delete {}", self.namespace(host)));
        }
    }
}

/// Tells everybody where the guest is, as the better of the paper's scripts would: by its own address, to all.
fn announce(namespace: &str) -> anyhow::Result<()> {
    let end = End { namespace: namespace.to_owned(), interface: "eth0".to_owned(), address: GUEST.to_owned() };
    inside(&end, || {
        let socket = std::net::UdpSocket::bind((GUEST, 0))?;
        socket.set_broadcast(true)?;
        socket.send_to(b"here", ("10.77.0.255", 9)).map(drop)
    })?;
    Ok(())
}
