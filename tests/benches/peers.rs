//! Import and export against restic, borg, casync, and tar with zstd.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use layerfs_tests::case::{has_tool, output_of};
use layerfs_tests::host::Host;
use tempfile::TempDir;

use crate::Plan;
use crate::measure::{Contestant, medians};
use crate::table::{Row, Table};

/// A program that keeps trees: how to make its store, put a tree in, get it out.
struct Peer {
    name: &'static str,
    tool: &'static str,
    init: &'static str,
    put: &'static str,
    get: &'static str,
}

// In each line: $tree the source, $store an empty folder for the store, $out an empty folder to write to.
const PEERS: [Peer; 4] = [
    Peer {
        name: "restic",
        tool: "restic",
        init: "restic -q -r $store/r init",
        put: "cd $tree && restic -q -r $store/r backup .",
        get: "restic -q -r $store/r restore latest --target $out",
    },
    Peer {
        name: "borg",
        tool: "borg",
        init: "borg init -e none $store/r",
        put: "cd $tree && borg create $store/r::one .",
        get: "cd $out && borg extract --numeric-ids $store/r::one",
    },
    Peer {
        name: "casync",
        tool: "casync",
        init: "true",
        put: "casync make --store=$store/s.castr $store/i.caidx $tree",
        get: "casync extract --store=$store/s.castr $store/i.caidx $out",
    },
    Peer {
        name: "tar|zstd",
        tool: "zstd",
        init: "true",
        put: "tar -C $tree --numeric-owner --acls --xattrs -cf - . | zstd -q -3 -T2 -o $store/t.tar.zst",
        get: "zstd -q -d -c $store/t.tar.zst | tar -C $out --numeric-owner --acls --xattrs -xpf -",
    },
];

impl Peer {
    fn run(&self, line: &str, plan: &Plan, store: &Path, out: &Path) -> anyhow::Result<()> {
        let mut command = Command::new("sh");
        command.args(["-euc", line]).env("tree", &plan.tree).env("store", store).env("out", out);
        command.env("RESTIC_PASSWORD", "bench").env("RESTIC_CACHE_DIR", store.join("cache"));
        command.env("BORG_BASE_DIR", store.join("base")).env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        output_of(&mut command).map(drop)
    }
}

/// The rows of this part.
pub fn speed(plan: &Plan, table: &mut Table) -> anyhow::Result<()> {
    let peers: Vec<&Peer> = PEERS.iter().filter(|peer| has_tool(peer.tool)).collect();
    for peer in PEERS.iter().filter(|peer| !has_tool(peer.tool)) {
        table.skipped(peer.name, "not installed: run scripts/setup bench");
    }
    import(plan, table, &peers)?;
    export(plan, table, &peers)
}

fn import(plan: &Plan, table: &mut Table, peers: &[&Peer]) -> anyhow::Result<()> {
    let nowhere = Path::new("/nonexistent");
    let ours = Contestant::new("layerfs", Host::new, |host| host.import(&plan.tree, "tree", &["--quiet"]).map(drop));
    let theirs = peers.iter().map(|peer| {
        let fresh = move || {
            let store = folder(plan)?;
            peer.run(peer.init, plan, store.path(), nowhere).map(|()| store)
        };
        Contestant::new(peer.name, fresh, move |store: &mut TempDir| peer.run(peer.put, plan, store.path(), nowhere))
    });
    let mut contestants: Vec<_> = std::iter::once(ours).chain(theirs).collect();
    let (ours, peers) = split(medians(plan.runs, &mut contestants)?)?;
    let tar = peers.iter().find(|(name, _)| *name == "tar|zstd");
    let met = Some(beats(ours, &peers) && tar.is_none_or(|(_, theirs)| ours <= theirs * 1.5));
    let goal = "faster than each; at most 1.5 tar|zstd".into();
    table.add(Row { what: "import".into(), unit: "s", ours, met, peers, goal });
    Ok(())
}

fn export(plan: &Plan, table: &mut Table, peers: &[&Peer]) -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(&plan.tree, "tree", &[])?;
    let task = |out: &mut TempDir| host.export("tree", &out.path().join("out"), &["--quiet"]).map(drop);
    let mut contestants = vec![Contestant::new("layerfs", || folder(plan), task)];
    for peer in peers {
        let store = folder(plan)?;
        peer.run(peer.init, plan, store.path(), Path::new("/nonexistent"))?;
        peer.run(peer.put, plan, store.path(), Path::new("/nonexistent"))?;
        let task = move |out: &mut TempDir| peer.run(peer.get, plan, store.path(), out.path());
        contestants.push(Contestant::new(peer.name, || folder(plan), task));
    }
    let (ours, peers) = split(medians(plan.runs, &mut contestants)?)?;
    let met = Some(beats(ours, &peers));
    table.add(Row { what: "export".into(), unit: "s", ours, met, peers, goal: "faster than each".into() });
    Ok(())
}

fn folder(plan: &Plan) -> anyhow::Result<TempDir> {
    tempfile::tempdir_in(plan.work.path()).context("cannot make a folder")
}

/// A peer's name and its figure.
type Figure = (&'static str, f64);

fn split(mut figures: Vec<Figure>) -> anyhow::Result<(f64, Vec<Figure>)> {
    anyhow::ensure!(!figures.is_empty(), "nothing was measured");
    let (_, ours) = figures.remove(0);
    Ok((ours, figures))
}

/// Whether we are faster than each of those that keep trees as we do; tar is the floor, not one of them.
fn beats(ours: f64, peers: &[Figure]) -> bool {
    peers.iter().filter(|(name, _)| *name != "tar|zstd").all(|(_, theirs)| ours < *theirs)
}
