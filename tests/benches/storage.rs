//! What the store takes for what it has already, and how much memory the work takes.

use std::process::Command;

use layerfs_tests::case::{output_of, shell};
use layerfs_tests::ctl::number;
use layerfs_tests::host::Host;
use layerfs_tests::tree;

use crate::Plan;
use crate::table::{Row, Table};

/// The rows on storage.
pub fn rows(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(&plan.tree, "tree", &[])?;
    let store = host.pack_bytes()?;
    table.add(Row {
        what: "store for the tree, of its files' bytes".into(),
        unit: "%",
        ours: store as f64 / plan.tree_bytes as f64 * 100.0,
        peers: Vec::new(),
        goal: String::new(),
        met: None,
    });
    let percent = |grown: u64| grown as f64 / store as f64 * 100.0;
    host.import(&plan.tree, "same", &[])?;
    let same = percent(host.pack_bytes()? - store);
    table.add(Row {
        what: "the same tree again".into(),
        unit: "%",
        ours: same,
        peers: Vec::new(),
        goal: "under 0.1".into(),
        met: Some(same < 0.1),
    });

    let copy = host.path("copy");
    output_of(Command::new("cp").arg("-a").arg(&plan.tree).arg(&copy))?;
    shell(&format!(
        "cd '{0}'; for d in usr/share/doc usr/share/locale etc part-00; do [ ! -d $d ] || mv $d $d-moved; done; \
         find . -exec touch -h -d '2024-02-03 04:05:06.789' {{}} +; find . -print0 | sort -zr > '{0}.list'; \
         tar --create --no-recursion --null --files-from='{0}.list' --file='{0}.tar'",
        copy.display()
    ))?;
    let before = host.pack_bytes()?;
    host.import(&host.path("copy.tar"), "shuffled", &[])?;
    let shuffled = percent(host.pack_bytes()? - before);
    table.add(Row {
        what: "renamed folders, touched, other order".into(),
        unit: "%",
        ours: shuffled,
        peers: Vec::new(),
        goal: "under 2".into(),
        met: Some(shuffled < 2.0),
    });
    disk(table)
}

fn disk(table: &mut Table) -> anyhow::Result<()> {
    let host = Host::new()?;
    let disk = host.path("disk.raw");
    let (pieces, piece) = (300u64, 1u64 << 20);
    let file = std::fs::File::create(&disk)?;
    file.set_len(20 << 30)?;
    let mut random = tree::Random::new(77);
    for number in 0..pieces {
        use std::os::unix::fs::FileExt;
        file.write_all_at(&random.bytes(piece as usize), (number * (20 << 30) / pieces) & !4095)?;
    }
    host.import(&disk, "disk", &[])?;
    let ours = host.pack_bytes()? as f64 / (pieces * piece) as f64 * 100.0;
    table.add(Row {
        what: "20 GiB sparse disk with 300 MiB, of its data".into(),
        unit: "%",
        ours,
        peers: Vec::new(),
        goal: "no more than the data".into(),
        met: Some(ours <= 101.0),
    });
    Ok(())
}

/// The rows on memory: the daemon's peak over all of its work, and the client's.
pub fn memory(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    let host = Host::new()?;
    let source = host.path("many");
    tree::fill(&source, 9, 50_000, 700)?;
    tree::big_file(&source.join("big"), 10, 700_000_000)?;
    let mut client = 0;
    for (what, args) in [
        ("the tree", vec!["import".into(), plan.tree.display().to_string(), "tree".into()]),
        ("50,000 files and one of 700 MB", vec!["import".into(), source.display().to_string(), "many".into()]),
        ("export", vec!["export".into(), "many".into(), host.path("out").display().to_string()]),
        ("gc", vec!["gc".into()]),
        ("scrub", vec!["scrub".into()]),
    ] {
        let peak = client_peak(&host, &args)?;
        client = client.max(peak);
        eprintln!("  after {what}: daemon {} MB, client {} MB", host_peak(&host)? / 1_000_000, peak / 1_000_000);
    }
    let ours = (host_peak(&host)? + client) as f64 / 1e6;
    table.add(Row {
        what: "peak memory, daemon and client".into(),
        unit: "MB",
        ours,
        peers: Vec::new(),
        goal: "under 200".into(),
        met: Some(ours < 200.0),
    });
    let stat = host.ctl.json(["stat"])?;
    number(&stat, "chunks").map(drop)
}

fn host_peak(host: &Host) -> anyhow::Result<u64> {
    host.daemon.as_ref().map_or(Ok(0), layerfs_tests::host::Daemon::peak_memory_bytes)
}

/// Runs a command and watches the most memory that the client holds.
fn client_peak(host: &Host, args: &[String]) -> anyhow::Result<u64> {
    let mut child =
        host.ctl.command(args).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let mut peak = 0;
    let status = loop {
        if let Ok(now) = layerfs_tests::host::peak_memory_of(child.id()) {
            peak = peak.max(now);
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    anyhow::ensure!(status.success(), "{args:?} failed with {status}");
    Ok(peak)
}
