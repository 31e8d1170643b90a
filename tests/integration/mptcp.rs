//! A machine whose kernel speaks MPTCP moves to a host in another subnet and gets an address there: its client's connection goes
//! over to that address, and on when there is no way to the first one any more.
//!
//! ```text
//! a (10.88.1.0/24) ── router, with the client ── b (10.88.2.0/24)
//! ```
//!
//! The hook `follow` leads the first address along, by which the machine tells its client of the new one; then its tunnel is taken down.

use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::fixtures;
use layerfs_tests::host::{PORT, TwoHosts, run_in};
use layerfs_tests::network::{End, Link, inside};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};

use crate::follow::{self, Router};
use crate::migrate::{Moving, PATIENCE, QEMU, guest};
use crate::rollback::Stream;

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 88, 1, 2);
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 88, 2, 2);
/// Where the machine hears of a new address.
const AGENT: u16 = 7001;
const SERVICE: u16 = 7777;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new("mptcp::a_client_stays_connected_to_a_machine_that_changes_its_address", QEMU, across)]
}

fn across() -> anyhow::Result<()> {
    let moving = Moving { hosts: TwoHosts::everywhere(Link::new()?)? };
    let router = Router::new(&moving.hosts.link)?;
    let client_end = End { namespace: router.0.clone(), interface: "to1".to_owned(), address: "172.20.1.1".to_owned() };
    connect(&moving.hosts, &router)?;
    fixtures::machine(&moving.hosts.a.path("tree"))?;
    let append = format!("console=ttyS0 quiet panic=-1 address={FIRST} gateway=10.88.1.1");
    let network = format!("bridge:guests,{FIRST}/24,10.88.1.1");
    let options =
        ["--memory", "192M", "--network", &network, "--kernel", "/vmlinuz", "--initrd", "/initrd", "--append"];
    moving.start("qemu", &[], &[&options[..], &[&append]].concat())?;

    let client = Stream::over(mptcp_stream(&client_end)?)?;
    client.hears(100)?;
    let report = moving.migrate(false, &[])?;
    ensure!(report["outcome"] == "moved", "{report}");
    client.hears(100).context("after the move, through the tunnel")?;
    let joined = joins(&client_end)?;
    give_address(&client_end)?;
    let began = Instant::now();
    while joins(&client_end)? == joined {
        ensure!(began.elapsed() < PATIENCE, "the client has made no way to the new address");
        std::thread::sleep(Duration::from_millis(20));
    }
    client.hears(1000).context("with two ways")?;
    let second = format!("netns exec {} ss -Htn state established dst {SECOND}", router.0);
    let second = output_of(Command::new("ip").args(second.split(' ')))?;
    ensure!(!second.is_empty(), "the way to the new address is closed again");
    // From now on nothing leads to the first address.
    for host in [&moving.hosts.a, &moving.hosts.b] {
        run_in(host, &follow::hook()?.to_string_lossy(), &["remove", guest()])?;
        ensure!(follow::tunnels(host)? == 0, "there is a tunnel");
    }
    run_in(&moving.hosts.a, "ip", &["link", "set", "uplink", "down"])?;
    client.hears(1000).context("without a way to its first address")?;
    client.end()?;
    drop(router);
    Ok(())
}

/// The bridges of both hosts, each with a subnet of its own, to which the router knows the way; and the hook.
fn connect(hosts: &TwoHosts, router: &Router) -> anyhow::Result<()> {
    for (host, peer, subnet, other) in [(&hosts.a, "b", 1, 2), (&hosts.b, "a", 2, 1)] {
        let address = format!("172.20.{other}.2:{PORT}");
        host.ctl.ok(["peer", "set", peer, "--address", &address, "--allow-guests"])?;
        follow::install(host)?;
        for words in [
            "link add guests type bridge forward_delay 0".to_owned(),
            format!("addr add 10.88.{subnet}.1/24 dev guests"),
            "link set guests up".to_owned(),
        ] {
            run_in(host, "ip", &words.split(' ').collect::<Vec<_>>())?;
        }
        run_in(host, "sh", &["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])?;
        follow::ip(&format!("-n {} route add 10.88.{subnet}.0/24 via 172.20.{subnet}.2", router.0))?;
    }
    // A way is given up after its first timeout, which is seconds where a move has just held packets up; the fourth, by
    // default, is a minute then.
    let stale = "echo 1 > /proc/sys/net/mptcp/stale_loss_cnt";
    output_of(Command::new("ip").args(["netns", "exec", &router.0, "sh", "-c", stale]))?;
    follow::ip(&format!("-n {} mptcp limits set subflow 4 add_addr_accepted 4", router.0))
}

/// An MPTCP connection to the machine, once it answers.
fn mptcp_stream(end: &End) -> anyhow::Result<TcpStream> {
    let began = Instant::now();
    loop {
        let connected = inside(end, || {
            let socket = rustix::net::socket_with(
                AddressFamily::INET,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                Some(ipproto::MPTCP),
            )?;
            rustix::net::connect(&socket, &SocketAddrV4::new(FIRST, SERVICE))?;
            std::io::Result::Ok(TcpStream::from(socket))
        });
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => ensure!(began.elapsed() < PATIENCE, "the machine doesn't answer: {error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Gives the machine its second address, as the new subnet's DHCP server would.
fn give_address(end: &End) -> anyhow::Result<()> {
    let socket = inside(end, || UdpSocket::bind("0.0.0.0:0"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(format!("{SECOND} 10.88.2.1").as_bytes(), (FIRST, AGENT))?;
    let mut answer = [0; 16];
    let length = socket.recv(&mut answer).context("the machine doesn't take its new address")?;
    ensure!(&answer[..length] == b"taken", "{answer:?}");
    Ok(())
}

/// How many further ways the client's kernel has made.
fn joins(end: &End) -> anyhow::Result<u64> {
    let namespace = format!("--net=/run/netns/{}", end.namespace);
    let mut command = Command::new("nsenter");
    let text = output_of(command.arg(namespace).args(["--", "cat", "/proc/self/net/netstat"]))?;
    let mut rows = text.lines().filter(|line| line.starts_with("MPTcpExt:")).map(|line| line.split(' '));
    let (names, counts) = (rows.next().context("no MPTCP here")?, rows.next().context("no MPTCP here")?);
    let count = names.zip(counts).find(|(name, _)| *name == "MPJoinSynAckRx").map(|(_, count)| count);
    Ok(count.context("no count of joins")?.parse()?)
}
