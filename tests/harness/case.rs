//! A test case: a name, what it needs from the machine, and what it does.
//!
//! Hides how a test is skipped. A skip is never silent: it is reported as ignored with its reason, and where
//! `LAYERFS_MUST_RUN` is set it is a failure, except for needs that no set-up can bring.

use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Completion, Failed, Trial};

/// The folder `tests` of the clone in which this runs, which may have been built in another one with the same target folder.
pub fn tests() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// See there: runs a command in a mount namespace of its own.
pub fn elsewhere() -> String {
    tests().join("elsewhere").display().to_string()
}

/// What a case needs from the machine that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// User id 0 with its capabilities.
    Root,
    /// `/dev/fuse`, and the right to mount.
    Fuse,
    /// Network namespaces with a veth pair.
    Namespaces,
    /// A program on the search path.
    Tool(&'static str),
    /// The S3 server that scripts/setup brings.
    S3,
    /// A Debian root, cached or from a mirror.
    Debian,
    /// A CRIU that works with this kernel, where the daemon finds it.
    Criu,
    /// A kernel for test machines.
    Kernel,
    /// A program where the daemon finds those that it runs guests with.
    GuestTool(&'static str),
    /// Control groups and the rest that privileged containers want.
    Containers,
    /// XFS, by the kernel and by its program.
    Xfs,
}

impl Need {
    /// Why it isn't met here, if so.
    pub fn unmet(self) -> Option<String> {
        match self {
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned()),
            Need::Fuse => {
                let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
                open.err().map(|error| format!("needs /dev/fuse: {error}"))
            }
            Need::Namespaces => {
                crate::network::usable().err().map(|error| format!("needs network namespaces: {error:#}"))
            }
            Need::Tool(tool) => (!has_tool(tool)).then(|| format!("needs the program {tool}: run scripts/setup test")),
            Need::S3 => {
                let program = crate::servers::s3_program();
                (!program.is_file()).then(|| format!("needs {}: run scripts/setup test", program.display()))
            }
            Need::Debian => crate::debian::root().err().map(|error| format!("needs a Debian root: {error:#}")),
            Need::Criu => (!crate::fixtures::criu_works())
                .then(|| "needs a CRIU that works with this kernel: run scripts/setup guests".to_owned()),
            Need::Kernel => (!crate::fixtures::kernel().is_file())
                .then(|| "needs a kernel for test machines: run scripts/setup guests".to_owned()),
            Need::GuestTool(tool) => (!crate::fixtures::has_guest_tool(tool))
                .then(|| format!("needs the program {tool}: run scripts/setup guests")),
            Need::Containers => {
                let groups = Path::new("/sys/fs/cgroup");
                let usable = groups.join("cgroup.controllers").exists()
                    || groups.join("devices").exists()
                    || groups.join("systemd").exists();
                (!usable).then(|| "needs mounted control groups".to_owned())
            }
            Need::Xfs if !has_filesystem("xfs") => Some("needs a kernel with XFS".to_owned()),
            Need::Xfs => Need::Tool("mkfs.xfs").unmet(),
        }
    }
}

/// Whether the kernel has the filesystem, or can load it.
fn has_filesystem(name: &str) -> bool {
    let is_there = || {
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        known.split_whitespace().any(|known| known == name)
    };
    is_there() || Command::new("modprobe").arg(name).output().is_ok_and(|output| output.status.success() && is_there())
}

/// Whether `tool` is on the search path, or in the folders for root's tools.
pub fn has_tool(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(system).any(|folder| folder.join(tool).is_file())
}

/// One test.
pub struct Case {
    name: &'static str,
    needs: &'static [Need],
    run: fn() -> anyhow::Result<()>,
}

impl Case {
    /// A case that runs wherever all of `needs` are met.
    pub const fn new(name: &'static str, needs: &'static [Need], run: fn() -> anyhow::Result<()>) -> Case {
        Case { name, needs, run }
    }

    /// Whether what it lacks no set-up can bring.
    fn is_beyond_set_up(&self) -> bool {
        self.needs.contains(&Need::Xfs) && !has_filesystem("xfs")
    }

    /// The case as the test runner wants it.
    pub fn into_trial(self) -> Trial {
        Trial::ignorable_test(self.name, move || {
            if let Some(reason) = self.needs.iter().find_map(|need| need.unmet()) {
                return if must_run() && !self.is_beyond_set_up() {
                    Err(Failed::from(format!("SKIPPED where it must run: {reason}")))
                } else {
                    Ok(Completion::ignored_with(format!("SKIPPED: {reason}")))
                };
            }
            match (self.run)() {
                Ok(()) => Ok(Completion::Completed),
                Err(error) => Err(Failed::from(format!("{error:#}"))),
            }
        })
    }
}

/// Whether a skip counts as a failure here.
fn must_run() -> bool {
    std::env::var_os("LAYERFS_MUST_RUN").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Runs a program and gives its standard output; its standard error is part of the failure.
pub fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().map_err(|error| anyhow::anyhow!("cannot run {command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    anyhow::ensure!(
        output.status.success(),
        "{command:?} failed with {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}

/// Runs `line` with a shell, as [`output_of`] does.
pub fn shell(line: &str) -> anyhow::Result<String> {
    output_of(Command::new("sh").args(["-euc", line]))
}
