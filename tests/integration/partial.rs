//! Machines on which something is missing: each driver says which piece, and how to get it, before anything has changed.

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Fuse, Namespaces, Root, Tool};
use layerfs_tests::case::{Case, elsewhere};
use layerfs_tests::fixtures;
use layerfs_tests::host::Host;
use serde_json::Value;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("partial::every_driver_names_what_is_missing", &[Root, Fuse, Namespaces, Tool("unshare")], programs),
        Case::new(
            "partial::a_guest_without_criu_runs_and_cant_be_saved",
            &[Root, Fuse, Tool("cc"), Tool("unshare")],
            no_criu,
        ),
        Case::new("partial::a_daemon_without_rights_says_so", &[Root, Tool("unshare")], no_root),
        Case::new("partial::kvm_that_doesnt_work_is_told", &[Root, Fuse, Tool("qemu-system-x86_64")], no_kvm),
    ]
}

/// A daemon in whose mounts these programs aren't programs, nor is there a folder of private tools.
fn host_without(programs: &[&str]) -> anyhow::Result<Host> {
    let folders = "/usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin";
    let script = format!(
        "for program in {}; do for folder in {folders}; do \
         [ ! -e $folder/$program ] || mount --bind /dev/null $folder/$program; done; done; \
         [ ! -d {tools} ] || mount -t tmpfs none {tools}; exec \"$@\"",
        programs.join(" "),
        tools = fixtures::guest_tools().display(),
    );
    let mut host = Host::cold()?;
    host.start_by(&[&elsewhere(), "-", "sh", "-euc", &script, "sh"], &["--no-keeper"])?;
    Ok(host)
}

/// Makes a guest that is never started.
fn create(host: &Host, driver: &str, options: &[&str]) -> anyhow::Result<()> {
    let tree = host.new_folder("tree")?;
    std::fs::write(tree.join("program"), "nothing")?;
    host.import(&tree, "app", &["--force"])?;
    let create = ["guest", "create", driver, "--driver", driver, "--on", "app"];
    host.ctl.ok(create.iter().chain(options)).map(drop)
}

/// What is in the way of `side`, in one text.
fn obstacles(host: &Host, guest: &str, side: &str) -> anyhow::Result<String> {
    // It fails if there is anything, and says what.
    let answer = host.ctl.run(["guest", "check", guest, "--json"])?;
    let check: Value = serde_json::from_slice(&answer.stdout).with_context(|| format!("{answer:?}"))?;
    let found = check[side].as_array().with_context(|| format!("no {side} in {check}"))?;
    ensure!(found.iter().all(|one| one["fix"].as_str().is_some_and(|fix| !fix.is_empty())), "no way out: {check}");
    Ok(found.iter().map(|one| format!("{}; {}\n", one["what"], one["fix"])).collect())
}

fn programs() -> anyhow::Result<()> {
    let command = &["--", "/program"][..];
    let network = &["--network", "bridge:none0,10.0.0.2/24", "--", "/program"][..];
    for (hidden, driver, options, words) in [
        (&["ip"][..], "process", command, &["ip", "apt-get install iproute2"][..]),
        (&["nsenter"], "process", command, &["nsenter", "apt-get install util-linux"]),
        (&[], "process", network, &["bridge none0", "ip link add none0 type bridge"]),
        (&["runc"], "oci", command, &["runc", "apt-get install runc"]),
        (&["lxc-start", "lxc-info", "lxc-checkpoint"], "lxc", command, &["lxc-start", "apt-get install lxc"]),
        (&["qemu-system-x86_64"], "qemu", &["--memory", "64M"], &["QEMU", "scripts/setup guests"]),
    ] {
        let host = host_without(hidden)?;
        create(&host, driver, options)?;
        let found = obstacles(&host, driver, "run")?;
        let said = host.ctl.run(["guest", "start", driver])?;
        ensure!(said.code != 0 && !said.stderr.contains("panicked"), "without {hidden:?}: {said:?}");
        for word in words {
            ensure!(found.contains(word), "without {hidden:?} nothing is said of {word:?}: {found}");
            ensure!(said.stderr.contains(word), "without {hidden:?} nothing is said of {word:?}: {}", said.stderr);
        }
        let info = host.ctl.json(["guest", "show", driver])?;
        ensure!(
            info["activity"] == "absent" && info["root"].is_null(),
            "without {hidden:?} something has changed: {info}"
        );
    }
    Ok(())
}

fn no_criu() -> anyhow::Result<()> {
    let host = host_without(&["criu"])?;
    fixtures::build("zoo", &host.path("tree/bin/zoo"))?;
    host.import(&host.path("tree"), "zoo", &[])?;
    host.ctl.ok(["guest", "create", "zoo", "--on", "zoo", "--", "/bin/zoo", "/zoo-says", "1", "0"])?;
    for (side, words) in [("run", &[][..]), ("source", &["CRIU", "scripts/setup guests"]), ("destination", &["CRIU"])] {
        let found = obstacles(&host, "zoo", side)?;
        ensure!(
            found.is_empty() == words.is_empty() && words.iter().all(|word| found.contains(word)),
            "{side}: {found}"
        );
    }
    host.ctl.ok(["guest", "start", "zoo"])?;
    let said = host.ctl.run(["guest", "checkpoint", "zoo"])?;
    ensure!(said.code != 0 && said.stderr.contains("CRIU") && said.stderr.contains("scripts/setup guests"), "{said:?}");
    ensure!(host.ctl.json(["guest", "show", "zoo"])?["activity"] == "running", "it doesn't run on");
    host.ctl.ok(["guest", "remove", "zoo", "--force"]).map(drop)
}

fn no_root() -> anyhow::Result<()> {
    let mut host = Host::cold()?;
    host.start_by(&["unshare", "--user", "--map-user=65534"], &["--no-keeper"])?;
    for (driver, options) in
        [("process", &["--", "/program"][..]), ("oci", &["--", "/program"]), ("lxc", &["--", "/program"])]
    {
        create(&host, driver, options)?;
        let found = obstacles(&host, driver, "run")?;
        ensure!(found.contains("run the daemon as root"), "{driver}: {found}");
        let said = host.ctl.run(["guest", "start", driver])?;
        ensure!(said.code != 0 && said.stderr.contains("run the daemon as root"), "{driver}: {said:?}");
    }
    Ok(())
}

fn no_kvm() -> anyhow::Result<()> {
    let hide = "[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; exec \"$@\"";
    let mut host = Host::cold()?;
    host.start_by(&[&elsewhere(), "-", "sh", "-euc", hide, "sh"], &["--no-keeper"])?;
    create(&host, "qemu", &["--memory", "64M", "--accel", "kvm"])?;
    let found = obstacles(&host, "qemu", "run")?;
    ensure!(found.contains("KVM") && found.contains("firmware") && found.contains("--accel auto"), "{found}");
    let said = host.ctl.run(["guest", "start", "qemu"])?;
    ensure!(said.code != 0 && said.stderr.contains("KVM"), "{said:?}");
    Ok(())
}
