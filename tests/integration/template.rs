//! LXC's own tools with containers on layers, by the template that `make install` brings.

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

    fn uppers(&self) -> anyhow::Result<usize> {
        let uppers = self.host.ctl.json(["uppers"])?;
        Ok(uppers["uppers"].as_array().with_context(|| format!("no uppers in {uppers}"))?.len())
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
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/lxc-layerfs");
    let create = |layer: &str| {
        let words = ["-f", &config.to_string_lossy(), "-t", &template.to_string_lossy(), "--"].map(str::to_owned);
        let store = host.ctl.store().to_string_lossy().into_owned();
        let more = ["--layer", layer, "--store", &store, "--command", "/bin/zoo /zoo-says 8 0", "--checkpoints"];
        let words: Vec<String> = words.into_iter().chain(more.map(str::to_owned)).collect();
        let mut command = lxc.command("lxc-create", &words.iter().map(String::as_str).collect::<Vec<_>>());
        command.env("LAYERCTL", ctl::binary()?);
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
    lxc.ok("lxc-stop", &["-k"])?;
    ensure!(lxc.uppers()? == 1, "it has not one upper");
    lxc.ok("lxc-destroy", &[])?;
    ensure!(lxc.uppers()? == 0 && !lxc.path.join(NAME).exists(), "something of it is left");
    host.fsck()
}
