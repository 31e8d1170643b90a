//! Tells by its content what a source is.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::import::bundle::Bundle;
use crate::import::decode::{Compression, Input, peek};
use crate::import::disk::QCOW2_MAGIC;
use crate::import::tar::{damaged, looks_like_header, read_error};

/// What a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A folder of the host.
    Folder,
    /// A tar archive, compressed or not.
    Tar,
    /// An OCI image layout, as a folder or in an archive.
    Oci,
    /// What `docker save` writes.
    Docker,
    /// A raw disk image, compressed or not, or a block device.
    Raw,
    /// A qcow2 disk image.
    Qcow2,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Folder => "folder",
            Format::Tar => "tar",
            Format::Oci => "oci",
            Format::Docker => "docker",
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl std::str::FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format> {
        Ok(match text {
            "folder" => Format::Folder,
            "tar" => Format::Tar,
            "oci" => Format::Oci,
            "docker" => Format::Docker,
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            _ => {
                return Err(Error::invalid(format!(
                    "{text:?} is not a format: folder, tar, oci, docker, raw or qcow2"
                )));
            }
        })
    }
}

/// A source, opened as what it is.
pub(super) enum Opened {
    Folder(PathBuf),
    Tar(Input),
    Oci(Bundle),
    Docker(Bundle),
    RawFile(PathBuf),
    RawStream(Input),
    Qcow2(PathBuf),
}

impl Opened {
    pub fn format(&self) -> Format {
        match self {
            Opened::Folder(_) => Format::Folder,
            Opened::Tar(_) => Format::Tar,
            Opened::Oci(_) => Format::Oci,
            Opened::Docker(_) => Format::Docker,
            Opened::RawFile(_) | Opened::RawStream(_) => Format::Raw,
            Opened::Qcow2(_) => Format::Qcow2,
        }
    }
}

fn refused(format: Format, what: &str) -> Error {
    Error::invalid(format!("{what} can't be read as {format}; leave the format out, to have it detected"))
}

/// Opens what lies at `path`, as `format` or as what it looks like.
pub(super) fn open_path(path: &Path, format: Option<Format>, tmp: &Path) -> Result<Opened> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::file("open", path, e))?;
    if metadata.is_dir() {
        let is_layout = path.join("oci-layout").is_file() && path.join("index.json").is_file();
        return match format {
            Some(Format::Oci) => Ok(Opened::Oci(Bundle::Folder(path.to_owned()))),
            Some(Format::Docker) => Ok(Opened::Docker(Bundle::Folder(path.to_owned()))),
            None if is_layout => Ok(Opened::Oci(Bundle::Folder(path.to_owned()))),
            None | Some(Format::Folder) => Ok(Opened::Folder(path.to_owned())),
            Some(other) => Err(refused(other, "a folder")),
        };
    }
    match format {
        Some(Format::Folder) => return Err(refused(Format::Folder, "a file")),
        Some(Format::Qcow2) => return Ok(Opened::Qcow2(path.to_owned())),
        _ => {}
    }
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    if metadata.file_type().is_block_device() {
        return Ok(Opened::RawFile(path.to_owned()));
    }
    if !metadata.is_file() {
        return open_stream(Box::new(file), format, tmp);
    }
    let (start, input) = peek(Box::new(file))?;
    if let Some(compression) =
        Compression::of(&start)?.filter(|_| format != Some(Format::Raw) || !is_whole_disk(&start))
    {
        return open_stream(compression.decode(input)?, format, tmp);
    }
    drop(input);
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    if format == Some(Format::Raw) {
        return Ok(Opened::RawFile(path.to_owned()));
    }
    if start.starts_with(QCOW2_MAGIC) && format.is_none() {
        return Ok(Opened::Qcow2(path.to_owned()));
    }
    if let Some(format @ (Format::Oci | Format::Docker)) = format {
        return bundle(Bundle::index(file)?, format);
    }
    if format == Some(Format::Tar) || looks_like_header(&start) || is_empty_tar(path, &start, metadata.len()) {
        if format.is_none() && may_be_image(&start) {
            return image_or_tar(file);
        }
        return Ok(Opened::Tar(Box::new(io::BufReader::with_capacity(256 * 1024, file))));
    }
    if has_tar_magic(&start) {
        return Err(broken_header());
    }
    for (magic, name) in
        [(&b"KDMV"[..], "VMDK disk image"), (b"vhdxfile", "VHDX disk image"), (b"conectix", "VHD disk image")]
    {
        if start.starts_with(magic) {
            let detail = "(convert it with `qemu-img convert -O qcow2`)".to_owned();
            return Err(Error::Unsupported { what: name, detail });
        }
    }
    if metadata.len() > 0 && metadata.len().is_multiple_of(512) {
        return Ok(Opened::RawFile(path.to_owned()));
    }
    Err(unknown())
}

/// Whether it claims to be a tar archive. One whose first header is damaged must not pass for a raw disk.
fn has_tar_magic(start: &[u8]) -> bool {
    start.get(257..262) == Some(b"ustar") && !is_whole_disk(start)
}

fn broken_header() -> Error {
    damaged("its first header's checksum is wrong")
}

fn unknown() -> Error {
    Error::invalid(
        "the source is none of: folder, tar (gzip, zstd, xz), OCI image layout, docker save archive, qcow2, raw disk of \
         whole sectors; say which (`--format`) if you know better",
    )
}

/// A raw disk may by chance begin like a compressed stream, but then it has a boot sector's end mark.
fn is_whole_disk(start: &[u8]) -> bool {
    start.get(510..512) == Some(&[0x55, 0xaa])
}

/// An archive of nothing is a few zero blocks, as a disk may begin; the name decides, or that it is tiny.
fn is_empty_tar(path: &Path, start: &[u8], bytes: u64) -> bool {
    let is_named = path.extension().is_some_and(|extension| extension == "tar");
    start.len() >= 512 && start.iter().all(|byte| *byte == 0) && (is_named || bytes <= 10240)
}

/// Opens a stream that can be read only once.
pub(super) fn open_stream(input: Input, format: Option<Format>, tmp: &Path) -> Result<Opened> {
    let (start, input) = peek(input)?;
    if format != Some(Format::Raw)
        && let Some(compression) = Compression::of(&start)?
    {
        return open_stream(compression.decode(input)?, format, tmp);
    }
    match format {
        Some(Format::Raw) => return Ok(Opened::RawStream(input)),
        Some(Format::Tar) => return Ok(Opened::Tar(Box::new(io::BufReader::with_capacity(256 * 1024, input)))),
        Some(format @ (Format::Oci | Format::Docker)) => return bundle(Bundle::index(spool(input, tmp)?)?, format),
        Some(other) => return Err(refused(other, "a stream")),
        None => {}
    }
    if start.starts_with(QCOW2_MAGIC) {
        return Err(Error::invalid("a qcow2 image can't be read from a stream; save it to a file first"));
    }
    let is_zero = !start.is_empty() && start.iter().all(|byte| *byte == 0);
    if looks_like_header(&start) || (is_zero && start.len() < 4096) {
        if may_be_image(&start) {
            return image_or_tar(spool(input, tmp)?);
        }
        return Ok(Opened::Tar(Box::new(io::BufReader::with_capacity(256 * 1024, input))));
    }
    if has_tar_magic(&start) {
        return Err(broken_header());
    }
    if is_zero || is_whole_disk(&start) { Ok(Opened::RawStream(input)) } else { Err(unknown()) }
}

fn bundle(bundle: Bundle, format: Format) -> Result<Opened> {
    Ok(if format == Format::Oci { Opened::Oci(bundle) } else { Opened::Docker(bundle) })
}

/// Whether the archive's first member is one that images' archives begin with.
fn may_be_image(start: &[u8]) -> bool {
    let name = start.get(..100).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
    let name = name.strip_prefix(b"./").unwrap_or(name);
    let first = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    let stem = first.split(|byte| *byte == b'.').next().unwrap_or_default();
    // So several builders of images name the config, which they put first.
    let stem = stem.strip_prefix(b"sha256:").unwrap_or(stem);
    let is_id = stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit);
    name.is_empty()
        || is_id
        || [&b"blobs"[..], b"oci-layout", b"index.json", b"manifest.json", b"repositories"].contains(&first)
}

fn image_or_tar(mut file: File) -> Result<Opened> {
    let again = file.try_clone().map_err(|e| Error::io("opening the archive again", e))?;
    // What is no image may be a large tree: then indexing gives up, and it is a plain archive.
    if let Ok(found) = Bundle::index(again) {
        if found.has("manifest.json") && !found.has("oci-layout") {
            return Ok(Opened::Docker(found));
        }
        if found.has("oci-layout") && found.has("index.json") {
            return Ok(Opened::Oci(found));
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(|e| Error::io("reading the archive again", e))?;
    Ok(Opened::Tar(Box::new(io::BufReader::with_capacity(256 * 1024, file))))
}

/// Writes a stream to a file without name in `tmp`.
fn spool(mut input: Input, tmp: &Path) -> Result<File> {
    let failed = |e| Error::file("write a temporary file in", tmp, e);
    let mut file = tempfile::tempfile_in(tmp).map_err(failed)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => file.write_all(&buffer[..count]).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(read_error(e)),
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(file)
}
