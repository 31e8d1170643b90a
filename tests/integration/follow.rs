//! A guest that moves to a host in another subnet, led along by the hook `follow`: a client's connection goes on.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Criu, Fuse, Namespaces, Root, Tool};
use layerfs_tests::host::{Host, PORT, TwoHosts, run_in};
use layerfs_tests::network::Link;
use layerfs_tests::{case, fixtures};
use serde_json::Value;

use crate::migrate::Client;

const GUEST: &str = "echo";
const POINTS: [&str; 5] = ["after-stop", "before-restore", "after-restore", "after-leave", "abort"];

/// The cases.
pub fn cases() -> Vec<Case> {
    let needs = &[Root, Fuse, Namespaces, Tool("cc"), Criu];
    vec![
        Case::new("follow::a_client_stays_connected_across_subnets", needs, across),
        Case::new("follow::names_that_differ_by_a_dot_are_not_mixed_up", &[Root, Namespaces], dots),
    ]
}

/// A router between the subnets of both hosts. Dropping it removes it.
pub struct Router(pub String);

impl Drop for Router {
    fn drop(&mut self) {
        let _ = ip(&format!("netns delete {}", self.0));
    }
}

pub fn ip(words: &str) -> anyhow::Result<()> {
    case::output_of(Command::new("ip").args(words.split(' '))).map(drop)
}

impl Router {
    /// Between the hosts of `link`, which can't reach each other in another way.
    pub fn new(link: &Link) -> anyhow::Result<Router> {
        let router = Router(format!("{}r", link.a.namespace));
        let name = &router.0;
        ip(&format!("netns add {name}"))?;
        for (host, subnet) in [(&link.a.namespace, 1), (&link.b.namespace, 2)] {
            ip(&format!("link add to{subnet} netns {name} type veth peer name uplink netns {host}"))?;
            ip(&format!("-n {name} addr add 172.20.{subnet}.1/24 dev to{subnet}"))?;
            ip(&format!("-n {name} link set to{subnet} up"))?;
            ip(&format!("-n {host} addr add 172.20.{subnet}.2/24 dev uplink"))?;
            ip(&format!("-n {host} link set uplink up"))?;
            ip(&format!("-n {host} route add default via 172.20.{subnet}.1"))?;
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        case::output_of(Command::new("ip").args(["netns", "exec", name, "sh", "-c", forward]))?;
        link.set_up(false)?;
        Ok(router)
    }
}

/// The hook, as a program.
pub fn hook() -> anyhow::Result<PathBuf> {
    Ok(case::tests().join("../scripts/hooks/follow").canonicalize()?)
}

/// The hook at all of its points, as an operator sets it up, with this program on its path.
pub fn install(host: &Host) -> anyhow::Result<()> {
    let hook = hook()?;
    let folder = host.ctl.store().join("hooks");
    std::fs::create_dir_all(&folder)?;
    for point in POINTS {
        symlink(&hook, folder.join(point))?;
    }
    Ok(())
}

pub fn tunnels(host: &Host) -> anyhow::Result<usize> {
    Ok(run_in(host, "ip", &["-o", "link", "show", "type", "vxlan"])?.lines().count())
}

/// What the networks of both hosts are like, for whoever looks why nothing came through.
fn networks(hosts: &TwoHosts) -> String {
    let look = "ip -br link; ip -br addr; ip route; ip neigh; bridge fdb show; ss -tino; ip -s link show type vxlan";
    let of = |host: &Host| {
        let pid = host.ctl.json(["guest", "show", GUEST]).map(|shown| shown["pid"].to_string());
        let pid = pid.unwrap_or_default();
        let inside = format!("nsenter -t {pid} -n ip neigh; nsenter -t {pid} -n ss -tino");
        run_in(host, "sh", &["-c", &format!("{look}; {inside}; true")]).unwrap_or_else(|error| format!("{error:#}"))
    };
    format!("on a:\n{}\non b:\n{}", of(&hosts.a), of(&hosts.b))
}

/// The hardware address of the guests' bridge.
fn hardware_of_bridge(host: &Host) -> anyhow::Result<String> {
    let shown = run_in(host, "ip", &["-o", "link", "show", "dev", "guests"])?;
    let address = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    Ok(address.context("a bridge without an address")?.to_owned())
}

struct Guest<'a>(&'a TwoHosts);

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        for host in [&self.0.a, &self.0.b] {
            let _ = host.ctl.run(["guest", "remove", GUEST, "--force"]);
        }
    }
}

fn across() -> anyhow::Result<()> {
    let hosts = TwoHosts::everywhere(Link::new()?)?;
    let router = Router::new(&hosts.link)?;
    for (host, peer, subnet) in [(&hosts.a, "b", 2), (&hosts.b, "a", 1)] {
        host.ctl.ok(["peer", "set", peer, "--address", &format!("172.20.{subnet}.2:{PORT}"), "--allow-guests"])?;
        install(host)?;
        for words in ["link add guests type bridge forward_delay 0", "link set guests up"] {
            run_in(host, "ip", &words.split(' ').collect::<Vec<_>>())?;
        }
    }
    // Only the first host has a way to the guests' addresses.
    run_in(&hosts.a, "ip", &["addr", "add", "10.88.0.1/24", "dev", "guests"])?;
    let a = &hosts.a;
    fixtures::build("echo", &a.path("tree/bin/echo"))?;
    a.import(&a.path("tree"), "app", &["--kind", "base"])?;
    let network = ["--network", "bridge:guests,10.88.0.2/24,10.88.0.1"];
    let create = ["guest", "create", GUEST, "--driver", "process", "--on", "app"];
    a.ctl.ok(create.iter().chain(&network).chain(&["--", "/bin/echo", "7777"]))?;
    let _guest = Guest(&hosts);
    a.ctl.ok(["guest", "start", GUEST])?;
    // It is the guest's gateway, and its client: whoever knows it would look for another in vain.
    let hardware = hardware_of_bridge(a)?;
    let client = Client::start(a, "10.88.0.2:7777")?;
    client.hears(20).with_context(|| networks(&hosts))?;
    for turn in 0..4 {
        let (from, to) = if turn % 2 == 0 { (&hosts.a, "b") } else { (&hosts.b, "a") };
        let report: Value = from.ctl.json(["migrate", GUEST, to])?;
        ensure!(report["outcome"] == "moved", "turn {turn}: {report}");
        client.hears(20).with_context(|| format!("after turn {turn}: {report}\n{}", networks(&hosts)))?;
        ensure!(hardware_of_bridge(a)? == hardware, "turn {turn}: the bridge has another address");
        // Away from home it takes a tunnel; at home it takes none.
        let expected = if turn % 2 == 0 { 1 } else { 0 };
        let there = (tunnels(&hosts.a)?, tunnels(&hosts.b)?);
        ensure!(there == (expected, expected), "turn {turn}: {there:?} tunnels instead of {expected} at each host");
    }
    client.end()?;
    // A move that comes to nothing leaves none.
    std::fs::remove_file(hosts.b.ctl.store().join("hooks/before-restore"))?;
    symlink("/bin/false", hosts.b.ctl.store().join("hooks/before-restore"))?;
    let failed = hosts.a.ctl.run(["migrate", GUEST, "b"])?;
    ensure!(failed.code != 0, "a hook that says no is overheard");
    ensure!((tunnels(&hosts.a)?, tunnels(&hosts.b)?) == (0, 0), "a move that failed leaves tunnels");
    drop(router);
    Ok(())
}

/// The hook alone, in a network of its own.
fn dots() -> anyhow::Result<()> {
    let network = Router(format!("lf-dots-{}", std::process::id()));
    let name = &network.0;
    ip(&format!("netns add {name}"))?;
    for words in ["link add guests type bridge", "addr add 10.9.0.9/24 dev guests", "link set guests up"] {
        ip(&format!("-n {name} {words}"))?;
    }
    let store = tempfile::tempdir()?;
    let folder = store.path().join("hooks");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("follow.peers"), "edge-1 10.9.0.1\nedge.1 10.9.0.2\n")?;
    std::fs::write(folder.join("guest"), r#"{"options": {"network": {"bridge": "guests"}}}"#)?;
    let hook = hook()?;
    let call = |point: &str, guest: &str, peer: &str| {
        if !folder.join(point).exists() {
            symlink(&hook, folder.join(point))?;
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", name]).arg(folder.join(point));
        command.env("LAYERFS_GUEST", guest).env("LAYERFS_PEER", peer).env("LAYERFS_STORE", store.path());
        command.env("LAYERFS_SIDE", "source").stdin(std::fs::File::open(folder.join("guest"))?);
        case::output_of(&mut command).map(drop)
    };
    let there = || -> anyhow::Result<Vec<(String, String)>> {
        let show = ["netns", "exec", name, "ip", "-o", "-d", "link", "show", "type", "vxlan"];
        let shown = case::output_of(Command::new("ip").args(show))?;
        let after = |line: &str, word: &str| {
            let rest = line.split_once(word).map_or("", |(_, rest)| rest).to_owned();
            rest.split(['\\', '\n']).next().unwrap_or_default().trim().to_owned()
        };
        let first = |text: String| text.split_whitespace().next().unwrap_or_default().to_owned();
        let tunnel = |line: &str| (after(line, "alias layerfs "), first(after(line, " remote ")));
        let mut all: Vec<_> = shown.lines().map(tunnel).collect();
        all.sort();
        Ok(all)
    };
    let tunnel = |what: &str, remote: &str| (what.to_owned(), remote.to_owned());
    call("after-stop", "db-1", "edge-1")?;
    let other = tunnel("db-1 away edge-1", "10.9.0.1");
    ensure!(there()? == [other.clone()], "{:?}", there()?);
    // The other guest comes, to which none leads yet, and goes again.
    call("before-restore", "db.1", "edge.1")?;
    call("after-restore", "db.1", "edge.1")?;
    let own = tunnel("db.1 here edge.1", "10.9.0.2");
    ensure!(there()? == [other.clone(), own], "{:?}", there()?);
    call("after-leave", "db.1", "edge.1")?;
    ensure!(there()? == [other], "{:?}", there()?);
    Ok(())
}
