//! LXC's own tools with containers on layers, by the template that `make install` brings.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Containers, Fuse, Root, Tool};
use layerfs_tests::host::{Host, unmount_under};
use layerfs_tests::{case, ctl, fixtures};

const NAME: &str = "web";
const PATIENCE: Duration = Duration::from_secs(60);

/// The cases.
pub fn cases() -> Vec<Case> {
    let needs = &[Root, Fuse, Containers, Tool("cc"), Tool("lxc-create")];
    vec![Case::new("template::lxc_users_keep_their_tools", needs, tools)]
}

/// LXC's path of a test. Dropping it ends and removes what is there.
struct Lxc<'a> {
    host: &'a Host,
    path: PathBuf,
}

impl Drop for Lxc<'_> {
    fn drop(&mut self) {
        let _ = self.command("lxc-stop", &["-k"]).output();
        let _ = self.command("lxc-destroy", &[]).output();
        unmount_under(&self.path);
    }
}

impl Lxc<'_> {
    fn command(&self, tool: &str, words: &[&str]) -> Command {
        let mut command = Command::new(tool);
        command.arg("-P").arg(&self.path).args(["-n", NAME]).args(words);
        command.env("XDG_CONFIG_HOME", self.host.ctl.store().with_extension("config"));
        command
    }

    /// Runs one of the tools, which must succeed; what it writes goes to a file, as a container keeps what its tool had open.
    fn ok(&self, tool: &str, words: &[&str]) -> anyhow::Result<String> {
        let said = self.host.path("said");
        let file = std::fs::File::create(&said)?;
        let mut command = self.command(tool, words);
        command.arg("-o").arg(self.host.path("log")).args(["-l", "INFO"]);
        let status = command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file).status()?;
        let text = std::fs::read_to_string(&said)?;
        let log = || std::fs::read_to_string(self.host.path("log")).unwrap_or_default();
        ensure!(status.success(), "{tool}: {status}\n{text}\n{}", log());
        Ok(text)
    }

    fn root(&self) -> PathBuf {
        self.path.join(NAME).join("rootfs")
    }

    fn is_mounted(&self) -> anyhow::Result<bool> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        Ok(mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == self.root())))
    }

    /// The names of the uppers in the store.
    fn uppers(&self) -> anyhow::Result<Vec<String>> {
        let uppers = self.host.ctl.json(["uppers"])?;
        let list = uppers["uppers"].as_array().with_context(|| format!("no uppers in {uppers}"))?;
        Ok(list.iter().map(|upper| upper["name"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// Destroys the container while `held` is a file of its root that is open. It waits for that.
    fn destroy_while(&self, held: std::fs::File, calls: &Path) -> anyhow::Result<()> {
        let mut destroying = self.command("lxc-destroy", &[]).spawn()?;
        let tries = || std::fs::read_to_string(calls).map(|calls| calls.matches("uppers remove").count());
        let began = Instant::now();
        while tries()? < 2 {
            ensure!(destroying.try_wait()?.is_none(), "it doesn't wait for what uses the upper");
            ensure!(began.elapsed() < PATIENCE, "the upper isn't removed");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(held);
        let status = destroying.wait()?;
        ensure!(status.success(), "lxc-destroy: {status}");
        Ok(())
    }
}

fn tools() -> anyhow::Result<()> {
    let host = Host::new()?;
    let tree = host.path("tree");
    fixtures::build("zoo", &tree.join("bin/zoo"))?;
    host.import(&tree, "app", &["--kind", "base"])?;
    let lxc = Lxc { path: host.new_folder("lxc")?, host: &host };
    let config = host.path("lxc.conf");
    std::fs::write(&config, "lxc.net.0.type = empty\n")?;
    // layerctl, and what it was asked.
    let (program, calls) = (host.path("called-by-lxc"), host.path("calls"));
    let script =
        format!("#!/bin/sh\necho \"$@\" >>'{}'\nexec '{}' \"$@\"\n", calls.display(), ctl::binary()?.display());
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let template = case::tests().join("../scripts/lxc-layerfs");
    let create = |layer: &str| {
        let words = ["-f", &config.to_string_lossy(), "-t", &template.to_string_lossy(), "--"].map(str::to_owned);
        let store = host.ctl.store().to_string_lossy().into_owned();
        let more = ["--layer", layer, "--store", &store, "--command", "/bin/zoo /zoo-says 8 0", "--checkpoints"];
        let words: Vec<String> = words.into_iter().chain(more.map(str::to_owned)).collect();
        let mut command = lxc.command("lxc-create", &words.iter().map(String::as_str).collect::<Vec<_>>());
        command.env("LAYERCTL", &program);
        case::output_of(&mut command)
    };
    // A layer that isn't there is told when it is named, not at the first start.
    let refused = create("nothing").err().context("a container on a layer that isn't there")?;
    ensure!(format!("{refused:#}").contains("no layer nothing"), "{refused:#}");
    create("app")?;
    ensure!(!lxc.is_mounted()?, "it is mounted before it runs");

    lxc.ok("lxc-start", &["-d"])?;
    let (says, began) = (lxc.root().join("zoo-says"), Instant::now());
    while !std::fs::read_to_string(&says).is_ok_and(|text| text.contains(" ok")) {
        ensure!(began.elapsed() < PATIENCE, "the container's program says nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(lxc.ok("lxc-info", &["-s"])?.contains("RUNNING"), "it doesn't run");
    std::fs::write(lxc.root().join("kept"), "until it is destroyed")?;
    // What it changes can be sealed while it runs.
    host.seal(&lxc.root(), "sealed")?;
    lxc.ok("lxc-stop", &["-k"])?;
    ensure!(!lxc.is_mounted()?, "it is mounted though it doesn't run");

    lxc.ok("lxc-start", &["-d"])?;
    ensure!(std::fs::read_to_string(lxc.root().join("kept"))? == "until it is destroyed", "a change is lost");
    // Somebody looks at it still when it stops: the mount goes when that is over, and so does the upper.
    let held = std::fs::File::open(lxc.root().join("kept"))?;
    lxc.ok("lxc-stop", &["-k"])?;
    let uppers = lxc.uppers()?;
    ensure!(uppers.len() == 1, "it has not one upper: {uppers:?}");
    lxc.destroy_while(held, &calls)?;
    ensure!(lxc.uppers()?.is_empty() && !lxc.path.join(NAME).exists(), "something of it is left");

    // Where something of another container of that name is left all the same, there is no new one on it.
    let other = host.mount("app", "other", &["--upper", uppers[0].as_str()])?;
    std::fs::write(other.join("old"), "another one's")?;
    host.umount(&other)?;
    let refused = create("app").err().context("a container with another one's files")?;
    ensure!(format!("{refused:#}").contains(&format!("there is an upper {}", uppers[0])), "{refused:#}");
    ensure!(lxc.uppers()? == uppers, "what was another one's is gone");
    host.ctl.json(["uppers", "remove", uppers[0].as_str()])?;
    host.fsck()
}
