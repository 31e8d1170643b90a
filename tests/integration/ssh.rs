//! Transfers through ssh, with a real sshd that the test starts on loopback with its own configuration and keys.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::ensure;
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::{Root, Tool};
use layerfs_tests::case::output_of;
use layerfs_tests::ctl::{Answer, binary};
use layerfs_tests::host::Host;
use layerfs_tests::servers::Server;
use layerfs_tests::tree;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "ssh::push_and_pull_need_nothing_but_the_program",
        &[Root, Tool("sshd"), Tool("ssh")],
        push_and_pull,
    )]
}

fn keygen(path: &Path) -> anyhow::Result<()> {
    output_of(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path)).map(drop)
}

/// Starts an sshd with keys of its own: with its files, and a client's configuration `client`, in `folder`.
fn start_sshd(folder: &Path) -> anyhow::Result<Server> {
    keygen(&folder.join("host"))?;
    keygen(&folder.join("user"))?;
    std::fs::copy(folder.join("user.pub"), folder.join("authorized"))?;
    let at = folder.display();
    let client = format!(
        "Host *\n IdentityFile {at}/user\n IdentitiesOnly yes\n IdentityAgent none\n UserKnownHostsFile {at}/known\n \
         StrictHostKeyChecking yes\n BatchMode yes\n"
    );
    std::fs::write(folder.join("client"), client)?;
    std::fs::create_dir_all("/run/sshd")?;
    let host_key = std::fs::read_to_string(folder.join("host.pub"))?;
    Server::start(&folder.join("sshd.log"), |port| {
        let server = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {at}/host\nAuthorizedKeysFile {at}/authorized\nStrictModes no\n\
             UsePAM no\nPidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
        );
        std::fs::write(folder.join("server"), server)?;
        std::fs::write(folder.join("known"), format!("[127.0.0.1]:{port} {host_key}"))?;
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(folder.join("server"));
        Ok(command)
    })
}

fn layerctl(host: &Host, folder: &Path, args: &[&str]) -> anyhow::Result<Answer> {
    let mut command = host.ctl.command(args);
    command.env("LAYERFS_SSH", format!("ssh -F {}", folder.join("client").display())).stdin(Stdio::null());
    let output = command.output()?;
    Ok(Answer {
        command: format!("{args:?}"),
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn push_and_pull() -> anyhow::Result<()> {
    let (here, there) = (Host::new()?, Host::cold()?);
    let folder = here.new_folder("ssh")?;
    let sshd = start_sshd(&folder)?;
    tree::fill(&here.path("tree"), 3, 500, 20_000)?;
    here.import(&here.path("tree"), "app", &[])?;
    let program = binary()?.display().to_string();
    let url = format!("ssh://root@127.0.0.1:{}{}", sshd.port(), there.ctl.store().display());
    let remote = ["--remote-layerctl", program.as_str()];

    let push = |name: &str| layerctl(&here, &folder, &["push", name, &url, remote[0], remote[1]]);
    push("app")?.ok()?;
    // Nothing had been set up there; the daemon was started by the push.
    ensure!(there.names()? == here.names()?, "the names differ");
    there.fsck()?;
    ensure!(push("app")?.ok()?.text().contains("all there already"), "pushed again what is there");

    there.ctl.ok(["tag", "app", "other"])?;
    layerctl(&here, &folder, &["pull", "other", &url, remote[0], remote[1]])?.ok()?;
    ensure!(there.names()? == here.names()?, "the names differ after the pull");

    // What can be wrong is told, each with its exit code and the way out.
    let missing = layerctl(&here, &folder, &["push", "app", &url, "--remote-layerctl", "/nowhere/layerctl"])?;
    ensure!(missing.failed_with(3)?.contains("--remote-layerctl"), "a missing program is not explained");
    let taken = layerctl(&here, &folder, &["pull", "nothing", &url, remote[0], remote[1]])?;
    taken.failed_with(3)?;
    std::fs::write(folder.join("known"), "")?;
    ensure!(push("app")?.failed_with(9)?.contains("host key"), "an unknown host key is not explained");
    let wrong = layerctl(&here, &folder, &["push", "app", "ssh://-oProxyCommand=x"])?;
    wrong.failed_with(2)?;
    Ok(())
}
