//! Import and export against restic, borg, casync, and tar with zstd.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use layerfs_tests::case::{has_tool, output_of};
use layerfs_tests::host::Host;
use tempfile::TempDir;

use crate::Plan;
use crate::measure::median;
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
    let folder = || tempfile::tempdir_in(plan.work.path()).context("cannot make a folder");
    let import = median(plan.runs, Host::new, |host| host.import(&plan.tree, "tree", &["--quiet"]).map(drop))?;
    let host = Host::new()?;
    host.import(&plan.tree, "tree", &[])?;
    let export = median(plan.runs, folder, |out| host.export("tree", &out.path().join("out"), &["--quiet"]).map(drop))?;
    drop(host);

    let (mut puts, mut gets) = (Vec::new(), Vec::new());
    for peer in &PEERS {
        if !has_tool(peer.tool) {
            table.skipped(peer.name, "not installed: run scripts/setup bench");
            continue;
        }
        let nowhere = PathBuf::from("/nonexistent");
        let fresh = || -> anyhow::Result<TempDir> {
            let store = folder()?;
            peer.run(peer.init, plan, store.path(), &nowhere)?;
            Ok(store)
        };
        puts.push((peer.name, median(plan.runs, fresh, |store| peer.run(peer.put, plan, store.path(), &nowhere))?));
        let store = fresh()?;
        peer.run(peer.put, plan, store.path(), &nowhere)?;
        gets.push((peer.name, median(plan.runs, folder, |out| peer.run(peer.get, plan, store.path(), out.path()))?));
    }
    let beats = |ours: f64, peers: &[(&str, f64)]| {
        peers.iter().filter(|(name, _)| *name != "tar|zstd").all(|(_, theirs)| ours < *theirs)
    };
    let near_tar = puts.iter().find(|(name, _)| *name == "tar|zstd").is_none_or(|(_, theirs)| import <= theirs * 1.5);
    table.add(Row {
        what: "import".into(),
        unit: "s",
        ours: import,
        met: Some(beats(import, &puts) && near_tar),
        peers: puts,
        goal: "faster than each; at most 1.5 tar|zstd".into(),
    });
    let met = beats(export, &gets);
    table.add(Row {
        what: "export".into(),
        unit: "s",
        ours: export,
        met: Some(met),
        peers: gets,
        goal: "faster than each".into(),
    });
    Ok(())
}
