//! Disk images: a layer with one file, `disk.raw`, in its root.
//!
//! Hides the image's format. Invariant: what the image knows to be a hole is never read; an image cannot make the
//! reader open another file.

use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use crate::attr::{Attrs, Time};
use crate::error::{Error, Result};
use crate::import::feed::Feed;
use crate::import::path::TreePath;
use crate::store::{FileSource, ReadSource, Source, SourcePiece};

/// The name of the disk's file in its layer.
pub const DISK_NAME: &str = "disk.raw";

/// The most entries of a qcow2 image's first table (QEMU's limit).
const MAX_TABLE_ENTRIES: u64 = 4 * 1024 * 1024;

/// What a qcow2 image starts with.
pub(super) const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

fn disk(feed: &mut Feed<'_>, mtime: Time, source: &mut dyn Source) -> Result<()> {
    feed.file(TreePath::parse(DISK_NAME.as_bytes())?, Attrs::imported(0o644, 0, 0, mtime), Vec::new(), source)
}

fn open(path: &Path) -> Result<(File, Time)> {
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    let metadata = file.metadata().map_err(|e| Error::file("look at", path, e))?;
    Ok((file, Time { seconds: metadata.mtime(), nanos: metadata.mtime_nsec() as u32 }))
}

/// Feeds the raw image, or the block device, at `path`.
pub(super) fn read_raw(path: &Path, feed: &mut Feed<'_>) -> Result<()> {
    let (file, mtime) = open(path)?;
    let is_device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_device {
        return disk(feed, Time::default(), &mut ReadSource(file));
    }
    disk(feed, mtime, &mut FileSource::new(&file, path)?)
}

/// Feeds the raw image that `input` yields.
pub(super) fn read_stream(input: impl Read, feed: &mut Feed<'_>) -> Result<()> {
    disk(feed, Time::default(), &mut ReadSource(input))
}

/// Feeds the qcow2 image at `path`.
pub(super) fn read_qcow2(path: &Path, feed: &mut Feed<'_>) -> Result<()> {
    let (file, mtime) = open(path)?;
    let failed = |e: std::io::Error| {
        if e.raw_os_error().is_some() {
            Error::file("read", path, e)
        } else {
            Error::corrupt("qcow2 image", e.to_string())
        }
    };
    let header = check_qcow2(&file, path)?;
    if header.has_backing || header.has_data_file {
        let what = if header.has_backing { "backing file" } else { "external data file" };
        let detail = format!("with a {what} (make it whole with `qemu-img convert -O qcow2`)");
        return Err(Error::Unsupported { what: "qcow2 image", detail });
    }
    let file_bytes = file.metadata().map_err(failed)?.len();
    let storage = imago::file::File::try_from(file).map_err(failed)?;
    let image =
        block_on(Qcow2::<imago::file::File>::builder(storage).open(DenyImplicitOpenGate::default())).map_err(failed)?;
    let image = FormatAccess::new(image);
    let mut source = Qcow2Source { size: image.size(), image, file_bytes, at: 0, data_end: 0, failed: &failed };
    disk(feed, mtime, &mut source)
}

/// What of a qcow2 image is looked at before it is opened.
struct Qcow2Header {
    has_backing: bool,
    has_data_file: bool,
}

/// Looks at the image's header and first table: nothing may lie beyond the file's end, where it would read as zeros.
fn check_qcow2(file: &File, path: &Path) -> Result<Qcow2Header> {
    let failed = |e| Error::file("read", path, e);
    let cut_off = || Error::corrupt("qcow2 image", "it is cut off");
    let mut header = [0; 80];
    let count = file.read_at(&mut header, 0).map_err(failed)?;
    let word = |bytes: &[u8]| bytes.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let file_bytes = file.metadata().map_err(failed)?.len();
    if count < 72 || !header.starts_with(QCOW2_MAGIC) {
        return Err(cut_off());
    }
    let (version, cluster_bits) = (word(&header[4..8]), word(&header[20..24]));
    let features = if version >= 3 && count == 80 { word(&header[72..80]) } else { 0 };
    let (entries, table) = (word(&header[36..40]), word(&header[40..48]));
    if !(9..=21).contains(&cluster_bits) || entries > MAX_TABLE_ENTRIES {
        return Err(Error::corrupt("qcow2 image", "its header is impossible"));
    }
    if table.checked_add(entries * 8).is_none_or(|end| end > file_bytes) {
        return Err(cut_off());
    }
    let mut offsets = vec![0; entries as usize * 8];
    file.read_exact_at(&mut offsets, table).map_err(failed)?;
    let is_beyond = |entry: &[u8]| (word(entry) & 0x00ff_ffff_ffff_fe00) >= file_bytes;
    if offsets.chunks_exact(8).any(is_beyond) {
        return Err(cut_off());
    }
    // Bit 2: the data lie in another file.
    Ok(Qcow2Header { has_backing: word(&header[8..16]) != 0, has_data_file: features & 4 != 0 })
}

struct Qcow2Source<'a> {
    image: FormatAccess<imago::file::File>,
    size: u64,
    file_bytes: u64,
    at: u64,
    data_end: u64,
    failed: &'a dyn Fn(std::io::Error) -> Error,
}

impl Source for Qcow2Source<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        if self.at >= self.size {
            return Ok(SourcePiece::End);
        }
        if self.at >= self.data_end {
            let (mapping, bytes) =
                block_on(self.image.get_mapping(self.at, self.size - self.at)).map_err(self.failed)?;
            if bytes == 0 {
                return Err(Error::corrupt("qcow2 image", "it ends before its disk does"));
            }
            match mapping {
                Mapping::Zero { .. } => {
                    self.at += bytes;
                    return Ok(SourcePiece::Hole(bytes));
                }
                Mapping::Raw { offset, .. } if offset >= self.file_bytes => {
                    return Err(Error::corrupt("qcow2 image", "it is cut off"));
                }
                _ => {}
            }
            self.data_end = self.at + bytes;
        }
        let count = (self.data_end - self.at).min(buffer.len() as u64) as usize;
        block_on(self.image.read(&mut buffer[..count], self.at)).map_err(self.failed)?;
        self.at += count as u64;
        Ok(SourcePiece::Data(count))
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` on this thread. The image reader's futures do blocking reads, so they hardly ever wait.
fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
