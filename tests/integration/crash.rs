//! The daemon killed: at every named step of import, seal, push, receive and GC, and at random moments.
//!
//! After each restart: `fsck` is clean, every name that was there or was reported as done exists and is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use layerfs::failpoint;
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Fuse, Namespaces, Root};
use layerfs_tests::compare;
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::tree::{self, Random};

const IMPORT_STEPS: &[&str] = &[
    "pack.created",
    "pack.appended",
    "pack.appended:2",
    "pack.synced",
    "index.written",
    "manifest.stored",
    "name.before",
    "name.after",
];
const SEAL_STEPS: &[&str] = &[
    "pack.synced",
    "index.written",
    "manifest.stored",
    "seal.frozen",
    "seal.chunked",
    "seal.before-switch",
    "seal.after-switch",
];
const SQUASH_STEPS: &[&str] = &["manifest.stored:2", "squash.before-switch", "squash.after-switch"];
const RECEIVE_STEPS: &[&str] = &[
    "pack.appended:2",
    "index.written",
    "receive.offered",
    "receive.chunk",
    "receive.chunk:3",
    "receive.staged",
    "receive.verified",
    "receive.named",
];
const GC_STEPS: &[&str] = &["gc.marked", "gc.swept", "gc.rewritten", "gc.before-unlink", "gc.after-unlink"];

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("crash::every_step_has_its_test", &[], every_step),
        Case::new("crash::at_each_step_of_import", &[], import),
        Case::new("crash::at_each_step_of_seal", &[Root, Fuse], seal),
        Case::new("crash::at_each_step_of_squash", &[Root, Fuse], squash),
        Case::new("crash::at_each_step_of_receive", &[Root, Namespaces], receive),
        Case::new("crash::at_each_step_of_gc", &[], gc),
        Case::new("crash::of_the_sender", &[Root, Namespaces], sender),
        Case::new("crash::at_random_moments", &[Root, Fuse], random_moments),
    ]
}

fn every_step() -> anyhow::Result<()> {
    let tested = [IMPORT_STEPS, SEAL_STEPS, SQUASH_STEPS, RECEIVE_STEPS, GC_STEPS, crate::tier::STEPS].into_iter();
    let tested = tested.chain([crate::migrate::STEPS, crate::migrate::START_STEPS]).collect::<Vec<_>>().concat();
    let tested: BTreeSet<_> = tested.iter().map(|step| step.split(':').next().unwrap_or(step)).collect();
    let named: BTreeSet<_> = failpoint::NAMES.iter().copied().collect();
    ensure!(
        tested == named,
        "steps without a test, or tests without a step: {:?}",
        tested.symmetric_difference(&named)
    );
    Ok(())
}

/// What each name must hold: a folder to compare it with.
type Contents = BTreeMap<String, PathBuf>;

/// Fails unless the store is clean, and exactly the names of `certain`, and perhaps some of `possible`, are there and
/// whole.
fn whole(host: &Host, certain: &Contents, possible: &Contents) -> anyhow::Result<()> {
    host.fsck()?;
    let names = host.names()?;
    for name in certain.keys() {
        ensure!(names.contains_key(name), "{name} is gone: {names:?}");
    }
    for name in names.keys() {
        let expected =
            certain.get(name).or_else(|| possible.get(name)).with_context(|| format!("a name from nowhere: {name}"))?;
        let out = host.path("whole");
        host.export(name, &out, &[])?;
        compare::same_by_rsync(expected, &out).with_context(|| format!("{name} is not whole"))?;
        fs::remove_dir_all(&out)?;
    }
    Ok(())
}

/// A source folder of some 6 MB.
fn source(host: &Host, name: &str, seed: u64) -> anyhow::Result<PathBuf> {
    let path = host.path(name);
    tree::fill(&path, seed, 200, 20_000)?;
    tree::big_file(&path.join("big"), seed + 1, 2_000_000)?;
    Ok(path)
}

fn one(name: &str, path: &Path) -> Contents {
    BTreeMap::from([(name.to_owned(), path.to_owned())])
}

fn import() -> anyhow::Result<()> {
    let mut host = Host::new()?;
    let (first, second) = (source(&host, "first", 100)?, source(&host, "second", 200)?);
    host.import(&first, "first", &[])?;
    host.stop()?;
    for step in IMPORT_STEPS {
        host.start(&["--crash-at", step])?;
        let answer = host.ctl.run(["import", &second.to_string_lossy(), "second"])?;
        ensure!(answer.code != 0, "the import at whose step {step} the daemon was to die succeeded");
        host.wait_for_crash().with_context(|| step.to_string())?;
        host.start(&[])?;
        whole(&host, &one("first", &first), &one("second", &second)).with_context(|| format!("after {step}"))?;
        if host.names()?.contains_key("second") {
            ensure!(*step == "name.after", "the name was there after {step}");
            host.ctl.ok(["remove", "second"])?;
        }
        // What the crash left is rubbish that gc takes away, so that the next import does the whole work again.
        host.ctl.ok(["gc"])?;
        whole(&host, &one("first", &first), &Contents::new()).with_context(|| format!("after {step} and gc"))?;
        host.stop()?;
    }
    host.start(&[])?;
    host.import(&second, "second", &[])?;
    whole(&host, &[one("first", &first), one("second", &second)].into_iter().flatten().collect(), &Contents::new())
}

/// Changes a tree in every way that a seal must keep; `round` makes it new.
fn change(root: &Path, round: usize) -> anyhow::Result<()> {
    let mut random = Random::new(round as u64 + 7);
    fs::write(root.join(format!("new-{round}")), random.text(30_000))?;
    tree::big_file(&root.join("replaced"), round as u64, 1_500_000)?;
    let folder = root.join(format!("folder-{round}"));
    fs::create_dir(&folder)?;
    fs::hard_link(root.join(format!("new-{round}")), folder.join("link"))?;
    fs::rename(root.join("big"), root.join("moved"))?;
    fs::rename(root.join("moved"), root.join("big"))?;
    use std::os::unix::fs::FileExt;
    fs::File::options().write(true).open(root.join("big"))?.write_all_at(&random.bytes(100), 1_000_000)?;
    let victim = root.join(format!("part-00/group-{round:03}"));
    if victim.exists() {
        fs::remove_dir_all(victim)?;
    }
    Ok(())
}

fn seal() -> anyhow::Result<()> {
    let mut host = Host::new()?;
    let base = source(&host, "base", 300)?;
    host.import(&base, "base", &[])?;
    let mounted = host.mount("base", "mounted", &["--upper", "work"])?;
    host.stop_or_kill()?;
    let expected = host.path("expected");
    for (round, step) in SEAL_STEPS.iter().enumerate() {
        host.start(&["--crash-at", step])?;
        mount_again(&host, &mounted)?;
        change(&mounted, round)?;
        if expected.exists() {
            fs::remove_dir_all(&expected)?;
        }
        layerfs_tests::case::shell(&format!(
            "cp -a '{}' '{}'; sync -f '{}'",
            mounted.display(),
            expected.display(),
            mounted.display()
        ))?;
        let name = format!("sealed-{round}");
        let answer = host.ctl.run(["seal", &mounted.to_string_lossy(), &name])?;
        ensure!(answer.code != 0, "the seal at whose step {step} the daemon was to die succeeded");
        host.wait_for_crash().with_context(|| step.to_string())?;
        host.start(&[])?;
        is_back(&host, &mounted).with_context(|| format!("after {step}"))?;
        compare::same_by_rsync(&expected, &mounted).with_context(|| format!("the mount after {step}"))?;
        compare::same_hard_links(&expected, &mounted).with_context(|| format!("the mount after {step}"))?;
        whole(&host, &one("base", &base), &one(&name, &expected)).with_context(|| format!("after {step}"))?;
        if host.names()?.contains_key(&name) {
            host.ctl.ok(["remove", &name])?;
        }
        host.stop_or_kill()?;
    }
    host.start(&[])?;
    mount_again(&host, &mounted)?;
    host.seal(&mounted, "at-last")?;
    whole(&host, &[one("base", &base), one("at-last", &expected)].into_iter().flatten().collect(), &Contents::new())?;
    host.umount(&mounted).map(drop)
}

/// Seals that squash: the seal is done, whatever becomes of the squash; the mount and the name lie on the same layer.
fn squash() -> anyhow::Result<()> {
    let mut host = Host::new()?;
    let base = source(&host, "base", 350)?;
    host.import(&base, "base", &[])?;
    let mounted = host.mount("base", "mounted", &["--upper", "work"])?;
    change(&mounted, 0)?;
    host.seal(&mounted, "sealed")?;
    host.stop_or_kill()?;
    for (round, step) in SQUASH_STEPS.iter().enumerate() {
        host.start(&["--crash-at", step])?;
        mount_again(&host, &mounted)?;
        change(&mounted, round + 1)?;
        let expected = host.path(format!("expected-{round}"));
        layerfs_tests::case::shell(&format!("cp -a '{}' '{}'", mounted.display(), expected.display()))?;
        let to_seal = mounted.to_string_lossy();
        let answer = host.ctl.run(["seal", &to_seal, "sealed", "--force", "--squash-past", "1"])?;
        ensure!(answer.code != 0, "the squash at whose step {step} the daemon was to die succeeded");
        host.wait_for_crash().with_context(|| step.to_string())?;
        host.start(&[])?;
        is_back(&host, &mounted).with_context(|| format!("after {step}"))?;
        compare::same_by_rsync(&expected, &mounted).with_context(|| format!("the mount after {step}"))?;
        compare::same_hard_links(&expected, &mounted).with_context(|| format!("the mount after {step}"))?;
        let contents = [one("base", &base), one("sealed", &expected)].into_iter().flatten().collect();
        whole(&host, &contents, &Contents::new()).with_context(|| format!("after {step}"))?;
        let on = &host.ctl.json(["mounts"])?["mounts"][0]["layer"];
        let named = &host.ctl.json(["inspect", "sealed"])?["layer"]["id"];
        ensure!(on == named, "after {step} the mount lies on {on}, and the name on {named}");
        let layers = host.ctl.json(["log", "sealed"])?["layers"].as_array().map_or(0, Vec::len);
        ensure!((layers == 2) == (*step == "squash.after-switch"), "{layers} layers after {step}");
        host.ctl.ok(["gc"])?;
        host.stop_or_kill()?;
    }
    Ok(())
}

/// Mounts the upper again where it was, over the layer that it lies on now.
fn mount_again(host: &Host, folder: &Path) -> anyhow::Result<()> {
    let uppers = host.ctl.json(["uppers"])?;
    let base = uppers["uppers"][0]["base"].as_str().with_context(|| format!("no upper was kept: {uppers}"))?;
    host.mount(base, &folder.file_name().context("no name")?.to_string_lossy(), &["--upper", "work"]).map(drop)
}

/// Fails unless a daemon that was started after a crash has brought the mount back by itself.
fn is_back(host: &Host, folder: &Path) -> anyhow::Result<()> {
    let mounts = host.ctl.json(["mounts"])?;
    let there =
        mounts["mounts"].as_array().is_some_and(|all| all.iter().any(|mount| mount["dir"].as_str() == folder.to_str()));
    let log = host.daemon.as_ref().map(|daemon| daemon.log_text()).unwrap_or_default();
    ensure!(there, "the mount is not back after the crash: {mounts}\n{log}");
    Ok(())
}

fn receive() -> anyhow::Result<()> {
    let mut hosts = TwoHosts::new()?;
    let (first, second) = (source(&hosts.a, "first", 400)?, source(&hosts.a, "second", 500)?);
    hosts.a.import(&first, "first", &[])?;
    hosts.a.import(&second, "second", &[])?;
    hosts.push(&["first"])?;
    hosts.b.stop()?;
    for step in RECEIVE_STEPS {
        hosts.b.start(&["--crash-at", step])?;
        let answer = hosts.a.ctl.run(["push", "second", "b", "--retry-for", "0"])?;
        ensure!(
            answer.code == 10,
            "a push to a host that dies at {step}: exit code {}\n{}",
            answer.code,
            answer.stderr
        );
        hosts.b.wait_for_crash().with_context(|| step.to_string())?;
        hosts.b.start(&[])?;
        whole(&hosts.b, &one("first", &first), &one("second", &second)).with_context(|| format!("after {step}"))?;
        if hosts.b.names()?.contains_key("second") {
            ensure!(*step == "receive.named", "the name was there after {step}");
            hosts.b.ctl.ok(["remove", "second"])?;
        }
        // What the push has brought shall come again.
        hosts.b.ctl.ok(["gc", "--unfinished"])?;
        whole(&hosts.b, &one("first", &first), &Contents::new()).with_context(|| format!("after {step} and gc"))?;
        hosts.b.stop()?;
    }
    hosts.b.start(&[])?;
    hosts.push(&["second"])?;
    whole(&hosts.b, &[one("first", &first), one("second", &second)].into_iter().flatten().collect(), &Contents::new())
}

fn sender() -> anyhow::Result<()> {
    let mut hosts = TwoHosts::new()?;
    let tree = source(&hosts.a, "tree", 600)?;
    // So much that it takes many seconds longer than what is waited for below.
    tree::big_file(&tree.join("more"), 602, 20_000_000)?;
    hosts.a.import(&tree, "tree", &[])?;
    hosts.link.shape(8)?;
    for after in [3_000, 200_000, 2_000_000] {
        let base = hosts.link.a.sent_bytes()?;
        let mut push = hosts.a.ctl.command(["push", "tree", "b"]);
        let mut child = push.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        while hosts.link.a.sent_bytes()? - base < after && child.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(3));
        }
        // What is left can't be sent before the kill, though that may take its time to come.
        hosts.link.shape(1)?;
        hosts.a.kill()?;
        hosts.link.shape(8)?;
        ensure!(!child.wait()?.success(), "the push succeeded without its daemon");
        hosts.a.start(&[])?;
        whole(&hosts.a, &one("tree", &tree), &Contents::new())?;
        // On a machine that is slow just now, all may have been sent before the kill.
        whole(&hosts.b, &Contents::new(), &one("tree", &tree))?;
    }
    hosts.link.shape(200)?;
    hosts.push(&["tree"])?;
    whole(&hosts.b, &one("tree", &tree), &Contents::new())
}

fn gc() -> anyhow::Result<()> {
    let mut host = Host::new()?;
    let (kept, removed) = (source(&host, "kept", 700)?, source(&host, "removed", 800)?);
    host.stop()?;
    for (round, step) in GC_STEPS.iter().enumerate() {
        host.start(&[])?;
        // Both in each pack, so that packs are rewritten, and one of them more, so that packs go whole.
        let name = format!("removed-{round}");
        fs::write(removed.join("round"), name.as_bytes())?;
        fs::write(kept.join("round"), name.as_bytes())?;
        tree::big_file(&removed.join("big"), round as u64 + 900, 3_000_000)?;
        host.import(&removed, &name, &[])?;
        host.import(&kept, "kept", &["--force"])?;
        host.ctl.ok(["remove", &name])?;
        host.stop()?;
        host.start(&["--crash-at", step])?;
        let answer = host.ctl.run(["gc"])?;
        ensure!(answer.code != 0, "the gc at whose step {step} the daemon was to die succeeded");
        host.wait_for_crash().with_context(|| step.to_string())?;
        host.start(&[])?;
        whole(&host, &one("kept", &kept), &Contents::new()).with_context(|| format!("after {step}"))?;
        host.ctl.ok(["gc"])?;
        whole(&host, &one("kept", &kept), &Contents::new()).with_context(|| format!("after {step} and gc"))?;
        host.ctl.ok(["scrub"])?;
        host.stop()?;
    }
    Ok(())
}

fn random_moments() -> anyhow::Result<()> {
    const ROUNDS: u64 = 12;
    let mut host = Host::new()?;
    let base = source(&host, "base", 1000)?;
    let work = source(&host, "work", 1100)?;
    host.import(&base, "base", &[])?;
    let mounted = host.mount("base", "mounted", &["--upper", "work"])?;
    let mut random = Random::new(12);
    let mut certain = one("base", &base);
    for round in 0..ROUNDS {
        change(&mounted, round as usize)?;
        layerfs_tests::case::shell(&format!("sync -f '{}'", mounted.display()))?;
        // Import, seal and gc at once, until the daemon dies under them.
        let (import, seal) = (format!("import-{round}"), format!("seal-{round}"));
        fs::write(work.join("round"), round.to_string())?;
        let lines: [Vec<String>; 3] = [
            vec!["import".into(), work.to_string_lossy().into_owned(), import.clone()],
            vec!["seal".into(), mounted.to_string_lossy().into_owned(), seal.clone()],
            vec!["gc".into()],
        ];
        let children =
            lines.iter().map(|line| host.ctl.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn());
        let mut children = children.collect::<Result<Vec<_>, _>>()?;
        std::thread::sleep(Duration::from_millis(random.below(400)));
        host.kill()?;
        let done = children.iter_mut().map(|child| Ok(child.wait()?.success())).collect::<anyhow::Result<Vec<_>>>()?;
        host.start(&[])?;
        is_back(&host, &mounted).with_context(|| format!("round {round}"))?;
        host.fsck().with_context(|| format!("round {round}"))?;
        let names = host.names()?;
        for (name, done) in [(&import, done[0]), (&seal, done[1])] {
            ensure!(names.contains_key(name) || !done, "round {round}: {name} was reported as done, and is gone");
        }
        if names.contains_key(&import) {
            let copy = host.path(&import);
            layerfs_tests::case::shell(&format!(
                "cp -al '{0}' '{1}'; rm '{1}/round'; cp -a '{0}/round' '{1}/round'; touch -r '{0}' '{1}'",
                work.display(),
                copy.display()
            ))?;
            host.export(&import, &host.path("out"), &[])?;
            compare::same_by_rsync_with(&copy, &host.path("out"), &["-rlptgoDAXS"])
                .with_context(|| format!("round {round}: {import}"))?;
            fs::remove_dir_all(host.path("out"))?;
            host.ctl.ok(["remove", &import])?;
        }
        certain.retain(|name, _| names.contains_key(name));
        ensure!(certain.contains_key("base"), "round {round}: base is gone");
    }
    host.ctl.ok(["gc"])?;
    host.ctl.ok(["scrub"])?;
    host.fsck()?;
    host.export("base", &host.path("out"), &[])?;
    compare::same_by_rsync(&base, &host.path("out"))
}
