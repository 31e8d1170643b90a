//! The paths between hosts: that the emulated link is what it says, and what transfers do on such links.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Namespaces, Root};
use layerfs_tests::emulator::Conditions;
use layerfs_tests::network::{Link, inside};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new("paths::the_emulated_link_delays_and_loses", &[Root, Namespaces], emulated)]
}

fn emulated() -> anyhow::Result<()> {
    let round_trip = Duration::from_millis(40);
    let link = Link::emulated(&[Conditions { round_trip, loss_percent: 5.0 }, Conditions::default()])?;
    let listener = inside(&link.b, || TcpListener::bind("0.0.0.0:7000"))?;
    let receiving = std::thread::spawn(move || {
        let mut sums = Vec::new();
        for _ in 0..2 {
            let mut bytes = Vec::new();
            listener.accept()?.0.read_to_end(&mut bytes)?;
            sums.push((bytes.len(), blake3::hash(&bytes)));
        }
        std::io::Result::Ok(sums)
    });
    let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n ^ n >> 9) as u8).collect();
    for address in ["10.99.0.2:7000", "10.99.1.2:7000"] {
        let started = Instant::now();
        let mut stream = inside(&link.a, || TcpStream::connect(address)).context(address)?;
        let took = started.elapsed();
        ensure!(address.contains(".1.2:") || took >= round_trip, "connected over {address} after {took:?}");
        stream.write_all(&bytes)?;
    }
    let sums = receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(sums == vec![(bytes.len(), blake3::hash(&bytes)); 2], "bytes were changed on their way");
    let lost = link.emulator(0)?.lost();
    ensure!(lost > 20 && link.emulator(1)?.lost() == 0, "{lost} packets lost of some 3,500");

    let [from, to] = [("10.99.0.1:7001", &link.a), ("10.99.0.2:7001", &link.b)]
        .map(|(address, end)| inside(end, || UdpSocket::bind(address)));
    let (from, to) = (from?, to?);
    to.set_read_timeout(Some(Duration::from_secs(5)))?;
    from.connect("10.99.0.2:7001")?;
    from.send(b"one").and_then(|_| from.send(b"two")).context("datagrams")?;
    // One of fifty at least comes through, unless the path is down.
    (0..50).try_for_each(|_| from.send(b"again").map(drop))?;
    to.recv(&mut [0; 9]).context("no datagram came")?;
    link.set_path_up(0, false)?;
    ensure!(from.send(b"gone").is_err(), "sent over a path that is down");
    Ok(())
}
