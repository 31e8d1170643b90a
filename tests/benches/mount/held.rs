//! Storage that gives so many bytes a second and no more: a control group's limit on the disk under a folder.
//!
//! Hides the two kinds of control groups. Invariant: at its end every process is where it was.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

const BYTES_PER_SECOND: u64 = 500_000_000;

/// A control group with this process and another in it.
pub struct Held {
    group: PathBuf,
    /// Where its processes go at the end.
    root: PathBuf,
}

impl Held {
    /// Holds the disk that `folder` lies on for this process and `other`.
    pub fn new(folder: &Path, other: Option<u32>) -> anyhow::Result<Held> {
        let root = Path::new("/sys/fs/cgroup");
        let is_old = root.join("blkio").is_dir();
        let root = if is_old { root.join("blkio") } else { root.to_owned() };
        let group = root.join(format!("layerfs-bench-{}", std::process::id()));
        if !is_old {
            fs::write(root.join("cgroup.subtree_control"), "+io").context("cannot limit a disk's rate here")?;
        }
        fs::create_dir_all(&group)?;
        let held = Held { group, root };
        let disk = disk_of(folder)?;
        let (file, limit) = match is_old {
            true => ("blkio.throttle.read_bps_device", format!("{disk} {BYTES_PER_SECOND}")),
            false => ("io.max", format!("{disk} rbps={BYTES_PER_SECOND}")),
        };
        fs::write(held.group.join(file), limit).with_context(|| format!("cannot limit the rate of disk {disk}"))?;
        for pid in other.into_iter().chain([std::process::id()]) {
            fs::write(held.group.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            let _ = fs::write(self.root.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.group);
    }
}

/// The number of the whole disk that `folder` lies on.
fn disk_of(folder: &Path) -> anyhow::Result<String> {
    let device = fs::metadata(folder)?.dev();
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let sys = fs::canonicalize(format!("/sys/dev/block/{number}"));
    let sys = sys.with_context(|| format!("{} lies on no disk", folder.display()))?;
    if !sys.join("partition").exists() {
        return Ok(number);
    }
    let whole = sys.parent().map(|whole| whole.join("dev"));
    let whole = fs::read_to_string(whole.context("a partition of nothing")?)?.trim().to_owned();
    ensure!(!whole.is_empty(), "a disk without a number");
    Ok(whole)
}
