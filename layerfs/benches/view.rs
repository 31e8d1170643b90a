//! What it costs to open a stack of 100,000 files in three layers, and to look things up in it.
//!
//! `cargo test --release -p layerfs --bench view`. The goal is to open it within 10 ms. A number as an argument makes
//! everything so many times as large.

#![allow(clippy::print_stdout, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::attr::{Attrs, FileKind, Time};
use layerfs::chunk::MemoryChunks;
use layerfs::chunker::Chunker;
use layerfs::content::{Content, Extent, List};
use layerfs::diff::{diff, layer_changes};
use layerfs::inode::{Dentry, Inode, Node, Target};
use layerfs::manifest::{LayerKind, LayerWriter, Manifest};
use layerfs::view::View;
use layerfs::walk::{Next, WalkEntry};
use layerfs::{ChunkId, Ino, LayerId, Result};

const FOLDERS: u64 = 5_000;
const FILES: [u64; 3] = [70_000, 25_000, 5_000];

fn inode(ino: u64, file: bool) -> Inode {
    let mtime = Time { seconds: 1_700_000_000 + ino as i64, nanos: 123_456_789 };
    let id = ChunkId::of(&ino.to_le_bytes());
    let list = List::Direct(vec![Extent::Chunk { id, bytes: 20_000 }]);
    let content = Content::Extents { bytes: 20_000, data_bytes: 20_000, chunker: Chunker::Tree, list };
    let node = if file { Node::File(content) } else { Node::Folder };
    Inode { ino: Ino(ino), nlink: 1, attrs: Attrs::imported(0o644, 0, 0, mtime), xattrs: Vec::new(), node }
}

/// Folder `n` lies in folder `n / 8`; the root is number 1. Files are spread over the folders.
fn seal(
    chunks: &MemoryChunks,
    parent: Option<&(LayerId, Manifest)>,
    first: u64,
    files: u64,
) -> Result<(LayerId, Manifest)> {
    let mut writer = LayerWriter::new(chunks);
    let mut dentries = Vec::new();
    let mut entry = |folder: u64, name: String, ino: u64, kind| {
        let target = Target::Inode { ino: Ino(ino), kind };
        dentries.push(Dentry { folder: Ino(folder), name: name.into_bytes(), target });
    };
    if parent.is_none() {
        (2..=FOLDERS).for_each(|ino| entry((ino / 8).max(1), format!("folder-{ino:06}"), ino, FileKind::Folder));
        (1..=FOLDERS).try_for_each(|ino| writer.inode(&inode(ino, false)))?;
    }
    for ino in first..first + files {
        entry(ino * 7919 % FOLDERS + 1, format!("some-file-name-{ino:06}.dat"), ino, FileKind::File);
    }
    (first..first + files).try_for_each(|ino| writer.inode(&inode(ino, true)))?;
    dentries.sort_by(|a, b| (a.folder, &a.name).cmp(&(b.folder, &b.name)));
    dentries.iter().try_for_each(|dentry| writer.dentry(dentry))?;
    writer.finish(LayerKind::Base, parent.map(|(id, manifest)| (*id, manifest)), Ino(first + files))
}

/// Wall-clock time and processor time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    wall: Duration,
    processor: Duration,
}

fn timed(run: &mut dyn FnMut() -> Result<()>) -> Result<Cost> {
    let processor = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let (start, used) = (Instant::now(), processor());
    run()?;
    Ok(Cost { wall: start.elapsed(), processor: processor() - used })
}

/// The best and the median of `rounds` runs, and the least processor time: the machine may be busy otherwise.
fn measure(what: &str, rounds: usize, mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut costs = (0..rounds).map(|_| timed(&mut run)).collect::<Result<Vec<_>>>()?;
    costs.sort();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let processor = costs.iter().map(|cost| cost.processor).min().unwrap_or_default();
    println!(
        "{what:<42} {:>9.3} ms best {:>9.3} ms median {:>9.3} ms of processor",
        milliseconds(costs[0].wall),
        milliseconds(costs[rounds / 2].wall),
        milliseconds(processor)
    );
    Ok(processor)
}

fn main() -> Result<()> {
    let chunks = MemoryChunks::default();
    let mut top: Option<(LayerId, Manifest)> = None;
    let mut first = FOLDERS + 1;
    let scale = std::env::args().find_map(|argument| argument.parse::<u64>().ok()).unwrap_or(1);
    for files in FILES.map(|files| files * scale) {
        top = Some(seal(&chunks, top.as_ref(), first, files)?);
        first += files;
    }
    let Some((id, _)) = top else { return Ok(()) };
    let folder = tempfile::tempdir().map_err(|e| layerfs::Error::io("creating a folder", e))?;
    let chunks: Arc<MemoryChunks> = Arc::new(chunks);
    let open = || View::from_chunks(chunks.clone(), folder.path(), id);
    let open_and_close = || open().map(|view| drop(black_box(view)));
    let files: u64 = FILES.iter().sum::<u64>() * scale;
    measure(&format!("build the tables ({files} files, 3 layers)"), 1, open_and_close)?;
    measure("open the stack", 21, open_and_close)?;
    let view = open()?;
    let mapped: u64 = view.layers().iter().map(|layer| layer.table.mapped_bytes()).sum();
    println!("{:<44} {:>10.1} MB", "mapped", mapped as f64 / 1e6);

    let mut names = Vec::new();
    view.walk(|entry| {
        names.push((entry.folder, entry.name.to_vec(), entry.ino));
        Ok(Next::Enter)
    })?;
    let mut state = 1u64;
    let order: Vec<usize> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % names.len()
    })
    .take(300_000)
    .collect();
    let rate = |time: Duration| println!("{:<42} {:>9.2} M/s", "", order.len() as f64 / time.as_secs_f64() / 1e6);
    let entries = || order.iter().map(|at| &names[*at]);
    rate(measure("300,000 look-ups in random order", 5, || {
        for (folder, name, _) in entries() {
            black_box(view.lookup(*folder, name)?);
        }
        Ok(())
    })?);
    rate(measure("300,000 look-ups of what isn't there", 5, || {
        for (folder, ..) in entries() {
            black_box(view.lookup(*folder, b"some-file-name-x")?);
        }
        Ok(())
    })?);
    rate(measure("300,000 stats in random order", 5, || {
        for (.., ino) in entries() {
            black_box(view.stat(*ino)?);
        }
        Ok(())
    })?);
    rate(measure("300,000 whole inodes in random order", 5, || {
        for (.., ino) in entries() {
            black_box(view.inode(*ino)?);
        }
        Ok(())
    })?);
    let go_on = |entry: &WalkEntry<'_>| Ok(if black_box(entry).path.is_empty() { Next::Stop } else { Next::Enter });
    measure("walk of everything", 5, || view.walk(go_on))?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap_or_default();
    println!("{:<42} {:>12}", "resident of it and the program", resident.trim());
    let below = view.below();
    let changes = layer_changes(&below, &view).count();
    measure(&format!("changes of the top layer ({changes})"), 5, || {
        black_box(layer_changes(&below, &view).count());
        Ok(())
    })?;
    let empty = View::empty(chunks.clone());
    measure("diff with nothing", 5, || {
        black_box(diff(&empty, &view).count());
        Ok(())
    })?;
    Ok(())
}
