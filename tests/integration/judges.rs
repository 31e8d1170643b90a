//! The harness judged: its trees can be kept by rsync, its comparisons see what differs, its hosts can talk.

use std::fs;
use std::process::Command;

use anyhow::ensure;
use layerfs_tests::case::Need::{Namespaces, Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::network::Link;
use layerfs_tests::{compare, zoo};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "judges::see_equality_and_difference",
            &[Root, Tool("rsync"), Tool("setfacl"), Tool("setcap")],
            differences,
        ),
        Case::new("judges::link_counts_bytes", &[Root, Namespaces], link),
    ]
}

fn differences() -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("lfst").tempdir()?;
    let (original, copy) = (folder.path().join("original"), folder.path().join("copy"));
    fs::create_dir(&original)?;
    zoo::fill(&original)?;
    output_of(Command::new("rsync").args(["-aHAXS", "--modify-window=-1"]).arg(original.join("")).arg(&copy))?;
    compare::same_by_rsync(&original, &copy)?;
    compare::same_hard_links(&original, &copy)?;
    compare::no_more_allocated(&original, &copy)?;

    let victim = copy.join("zoo/times/nanoseconds");
    zoo::set_time(&victim, 1_600_000_000, 123_456_788)?;
    ensure!(compare::same_by_rsync(&original, &copy).is_err(), "one nanosecond was not seen");
    zoo::set_time(&victim, 1_600_000_000, 123_456_789)?;
    fs::copy(copy.join("zoo/links/one"), copy.join("zoo/links/split"))?;
    fs::rename(copy.join("zoo/links/split"), copy.join("zoo/links/two"))?;
    ensure!(compare::same_hard_links(&original, &copy).is_err(), "a split hard link was not seen");
    let filled = copy.join("zoo/sparse/only-a-hole");
    fs::write(&filled, vec![0u8; 50 << 20])?;
    ensure!(compare::no_more_allocated(&original, &copy).is_err(), "a filled hole was not seen");
    Ok(())
}

fn link() -> anyhow::Result<()> {
    let link = Link::new()?;
    link.shape(100)?;
    let before = link.a.sent_bytes()?;
    let namespace = format!("--net=/run/netns/{}", link.a.namespace);
    let listener = format!("--net=/run/netns/{}", link.b.namespace);
    let program = "import socket,sys\ns=socket.create_server(('10.99.0.2',7000))\nprint('ready',flush=True)\nc,_=s.accept()\nn=0\nwhile d:=c.recv(65536): n+=len(d)\nprint(n)";
    let mut server = Command::new("nsenter")
        .arg(&listener)
        .args(["python3", "-c", program])
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut said = std::io::BufReader::new(server.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut said, &mut String::new())?;
    let sender = "import socket\ns=socket.create_connection(('10.99.0.2',7000))\ns.sendall(bytes(1000000))";
    output_of(Command::new("nsenter").arg(&namespace).args(["python3", "-c", sender]))?;
    server.wait()?;
    let sent = link.a.sent_bytes()? - before;
    ensure!((1_000_000..1_200_000).contains(&sent), "a megabyte went over the link, the interface counted {sent}");
    Ok(())
}
