//! Whether two trees are equal, by judges that share no code with us: rsync, and the kernel's own numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::case::output_of;

/// Fails unless rsync finds no difference in either direction: names, kinds, bytes, modes, owners, times to the
/// nanosecond, hard links, ACLs, extended attributes.
pub fn same_by_rsync(a: &Path, b: &Path) -> anyhow::Result<()> {
    same_by_rsync_with(a, b, &["-aHAXS"])
}

/// The same with other options than `-aHAXS`, for formats that cannot hold everything.
pub fn same_by_rsync_with(a: &Path, b: &Path, options: &[&str]) -> anyhow::Result<()> {
    for (from, to) in [(a, b), (b, a)] {
        let mut rsync = Command::new("rsync");
        rsync.args(options).args(["--checksum", "--modify-window=-1", "--numeric-ids", "--dry-run", "-i", "--delete"]);
        rsync.arg(with_slash(from)).arg(with_slash(to));
        let differences = output_of(&mut rsync)?;
        ensure!(
            differences.trim().is_empty(),
            "{} and {} differ:\n{}",
            from.display(),
            to.display(),
            first_lines(&differences, 40)
        );
    }
    Ok(())
}

/// Fails unless both trees group the same paths into the same sets of hard links, with the same link counts.
pub fn same_hard_links(a: &Path, b: &Path) -> anyhow::Result<()> {
    let (left, right) = (hard_link_sets(a)?, hard_link_sets(b)?);
    let differing = left.symmetric_difference(&right).take(5).collect::<Vec<_>>();
    ensure!(differing.is_empty(), "hard links of {} and {} differ: {differing:?}", a.display(), b.display());
    Ok(())
}

/// A set of paths that are one file, with the link count that each of them tells.
pub type LinkSet = (Vec<PathBuf>, u64);

/// Every set of paths under `root` that are one file, with the link count.
pub fn hard_link_sets(root: &Path) -> anyhow::Result<BTreeSet<LinkSet>> {
    let mut files: BTreeMap<u64, LinkSet> = BTreeMap::new();
    walk(root, &mut |path, metadata| {
        if !metadata.is_dir() && metadata.nlink() > 1 {
            let set = files.entry(metadata.ino()).or_default();
            set.0.push(path.strip_prefix(root).unwrap_or(path).to_owned());
            set.1 = metadata.nlink();
        }
        Ok(())
    })?;
    files.values_mut().for_each(|set| set.0.sort());
    Ok(files.into_values().collect())
}

/// Blocks are counted when they are written. Only the filesystem that `root` lies on: another test may have stopped what serves another
/// one, or look at what it hasn't written yet.
fn sync(root: &Path) -> anyhow::Result<()> {
    let opened = std::fs::File::open(root).with_context(|| format!("cannot open {}", root.display()))?;
    Ok(rustix::fs::syncfs(opened)?)
}

/// Fails if any file of `copy` allocates more than its original in `source`, one block for the filesystem's own map of
/// a large file aside.
pub fn no_more_allocated(source: &Path, copy: &Path) -> anyhow::Result<()> {
    // What is mounted may be kept on the other's filesystem.
    sync(copy)?;
    sync(source)?;
    walk(source, &mut |path, metadata| {
        let relative = path.strip_prefix(source).unwrap_or(path);
        if metadata.is_file() {
            let there = std::fs::symlink_metadata(copy.join(relative))
                .with_context(|| format!("cannot stat {relative:?} in {}", copy.display()))?;
            let (before, after) = (metadata.blocks() * 512, there.blocks() * 512);
            // A filesystem may keep a tiny file within its inode, and counts no block for it.
            let map = if before > 1 << 20 { MAP_BLOCK_BYTES } else { 0 };
            ensure!(after <= before.max(4096) + map, "{relative:?} allocates {after} bytes instead of {before}");
        }
        Ok(())
    })
}

/// A block in which a filesystem keeps where a file's other blocks are.
pub const MAP_BLOCK_BYTES: u64 = 4096;

/// Bytes that `du` counts as allocated under `root`.
pub fn allocated_bytes(root: &Path) -> anyhow::Result<u64> {
    sync(root)?;
    let text = output_of(Command::new("du").args(["-s", "--block-size=1"]).arg(root))?;
    text.split_whitespace().next().and_then(|number| number.parse().ok()).with_context(|| format!("du said {text:?}"))
}

/// Calls `visit` for `root` and everything under it, on one filesystem, each folder before its content.
pub fn walk(root: &Path, visit: &mut dyn FnMut(&Path, &std::fs::Metadata) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut folders = vec![root.to_owned()];
    visit(root, &std::fs::symlink_metadata(root).with_context(|| format!("cannot stat {}", root.display()))?)?;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            let metadata =
                std::fs::symlink_metadata(&path).with_context(|| format!("cannot stat {}", path.display()))?;
            visit(&path, &metadata)?;
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(())
}

/// How many entries lie under `root`.
pub fn count(root: &Path) -> anyhow::Result<u64> {
    let mut entries = 0;
    walk(root, &mut |_, _| {
        entries += 1;
        Ok(())
    })?;
    Ok(entries)
}

fn with_slash(path: &Path) -> PathBuf {
    path.join("")
}

fn first_lines(text: &str, count: usize) -> String {
    let shortened = text.lines().take(count).map(|line| line.chars().take(200).collect::<String>());
    shortened.collect::<Vec<_>>().join("\n")
}
