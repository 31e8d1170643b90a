//! A Debian root made by debootstrap, once per machine, kept outside the repository.
//!
//! Invariant: the cached tree is complete (it gets its name last) and nobody changes it: tests import it, or copy it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, bail, ensure};

use crate::case::{has_tool, output_of};

const SUITE: &str = "bookworm";

/// Where caches of tests lie: `LAYERFS_TEST_CACHE`, or a folder of the system's.
pub fn cache_folder() -> PathBuf {
    std::env::var_os("LAYERFS_TEST_CACHE").map_or_else(|| PathBuf::from("/var/cache/layerfs-test"), PathBuf::from)
}

/// The Debian root (minbase), made if it isn't there yet.
pub fn root() -> anyhow::Result<&'static Path> {
    static ROOT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = ROOT.get_or_init(|| make(&cache_folder(), None).map_err(|error| format!("{error:#}")));
    made.as_deref().map_err(|reason| anyhow::Error::msg(reason.clone()))
}

/// The same with python3 in it.
pub fn python_root() -> anyhow::Result<&'static Path> {
    static ROOT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = ROOT.get_or_init(|| make(&cache_folder(), Some("python3")).map_err(|error| format!("{error:#}")));
    made.as_deref().map_err(|reason| anyhow::Error::msg(reason.clone()))
}

fn make(cache: &Path, package: Option<&str>) -> anyhow::Result<PathBuf> {
    let suffix = package.map(|package| format!("-{package}")).unwrap_or_default();
    let done = cache.join(format!("debian-{SUITE}{suffix}"));
    if done.join("bin/sh").exists() {
        return Ok(done);
    }
    ensure!(rustix::process::geteuid().is_root(), "none is cached in {}, and making one needs root", cache.display());
    ensure!(
        has_tool("debootstrap"),
        "none is cached in {}, and debootstrap is missing: run scripts/setup demo",
        cache.display()
    );
    std::fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let lock = std::fs::File::create(cache.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    if done.join("bin/sh").exists() {
        return Ok(done);
    }
    let growing = cache.join(format!("debian-{SUITE}{suffix}.part"));
    if growing.exists() {
        std::fs::remove_dir_all(&growing)?;
    }
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.arg("--variant=minbase");
    debootstrap.args(package.map(|package| format!("--include={package}"))).arg(SUITE).arg(&growing);
    if let Err(error) = output_of(&mut debootstrap) {
        let _ = std::fs::remove_dir_all(&growing);
        let last = format!("{error:#}").lines().last().unwrap_or_default().to_owned();
        bail!("debootstrap failed (is a mirror reachable?): {last}");
    }
    // The downloaded packages would be most of the tree, and hold its content a second time.
    for entry in std::fs::read_dir(growing.join("var/cache/apt/archives"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::rename(&growing, &done)?;
    Ok(done)
}
