//! The ways out of the store: a layer's merged tree as a folder, a tar, an OCI image layout, or a raw disk image.
//!
//! Decision hidden here: which format a destination means, and that nothing half-done ever stands under the
//! destination's name: every exporter writes beside it and renames at the end.
//! Invariants: chunks are verified on the way out (they come through [`crate::chunk::ChunkRead`]); what an
//! exporter writes depends on the layer alone (tar and OCI are deterministic, byte for byte); memory is bounded,
//! whatever the tree.

pub(crate) mod acl;
mod attrs;
mod compress;
mod feed;
mod folder;
mod header;
pub(crate) mod oci;
mod place;
mod raw;
mod spread;
mod tar;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use compress::Compression;

use crate::error::{Error, Result};
use crate::id::LayerId;
use crate::monitor::Monitor;
use crate::store::Store;
use crate::view::View;

/// What an export writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A folder that holds the merged tree.
    Folder,
    /// One tar with the merged tree.
    Tar(Compression),
    /// An OCI image layout with one layer tar per layer of the stack.
    Oci(Compression),
    /// The disk image that an imported disk's layer holds.
    Raw,
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format> {
        Ok(match text {
            "folder" | "dir" => Format::Folder,
            "tar" => Format::Tar(Compression::None),
            "tar.gz" | "tgz" => Format::Tar(Compression::Gzip),
            "tar.zst" | "tzst" => Format::Tar(Compression::Zstd),
            "tar.xz" | "txz" => Format::Tar(Compression::Xz),
            "oci" => Format::Oci(Compression::Gzip),
            "oci-zstd" => Format::Oci(Compression::Zstd),
            "raw" => Format::Raw,
            _ => {
                return Err(Error::invalid(format!(
                    "{text:?} is not an export format: folder, tar, tar.gz, tar.zst, tar.xz, oci, oci-zstd or raw"
                )));
            }
        })
    }
}

/// Where an export goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The folder or file to make.
    pub path: PathBuf,
    /// What to write there.
    pub format: Format,
    /// The tag that an OCI image gets in its index; "latest" if there is none.
    pub tag: Option<String>,
}

impl Destination {
    /// Finds out what `text` means: `oci:PATH[:TAG]` is an OCI layout; a name that ends in `.tar`, `.tar.gz`,
    /// `.tgz`, `.tar.zst`, `.tzst`, `.tar.xz` or `.txz` is a tar; `.raw`, `.img` a disk image; anything else a
    /// folder, unless it ends as another kind of archive or image and isn't a folder yet. A `format` that is given
    /// decides instead of the ending.
    pub fn parse(text: &str, format: Option<Format>) -> Result<Destination> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let format = format.unwrap_or(Format::Oci(Compression::Gzip));
            let (path, tag) = match rest.rsplit_once(':') {
                Some((path, tag)) if !tag.contains('/') && !tag.is_empty() => (path, Some(tag.to_owned())),
                _ => (rest, None),
            };
            return Destination { path: path.into(), format, tag }.checked();
        }
        let format = format.map_or_else(|| Format::of_path(text), Ok)?;
        Destination { path: text.into(), format, tag: None }.checked()
    }

    fn checked(self) -> Result<Destination> {
        if self.path.as_os_str().is_empty() {
            return Err(Error::invalid("the path is empty; name a folder or a file"));
        }
        Ok(self)
    }
}

impl Format {
    fn of_path(text: &str) -> Result<Format> {
        const ENDINGS: [(&str, Format); 9] = [
            (".tar", Format::Tar(Compression::None)),
            (".tar.gz", Format::Tar(Compression::Gzip)),
            (".tgz", Format::Tar(Compression::Gzip)),
            (".tar.zst", Format::Tar(Compression::Zstd)),
            (".tzst", Format::Tar(Compression::Zstd)),
            (".tar.xz", Format::Tar(Compression::Xz)),
            (".txz", Format::Tar(Compression::Xz)),
            (".raw", Format::Raw),
            (".img", Format::Raw),
        ];
        const DISKS: [&str; 6] = [".qcow2", ".qcow", ".vmdk", ".vdi", ".vhd", ".vhdx"];
        const OTHERS: [&str; 11] =
            [".zip", ".7z", ".rar", ".cpio", ".iso", ".squashfs", ".sqfs", ".erofs", ".tbz", ".tbz2", ".tlz4"];
        if let Some((_, format)) = ENDINGS.iter().find(|(ending, _)| text.ends_with(ending)) {
            return Ok(*format);
        }
        let name = text.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        let is_one_of = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        // `.tar.lz4`, `.tar.br`, `.TAR`: some tar, but none of those above.
        let is_tar = name.ends_with(".tar") || name.rsplit_once('.').is_some_and(|(stem, _)| stem.ends_with(".tar"));
        if !(is_tar || is_one_of(&DISKS) || is_one_of(&OTHERS)) || Path::new(text).is_dir() {
            return Ok(Format::Folder);
        }
        let known: Vec<&str> = ENDINGS.iter().map(|(ending, _)| *ending).collect();
        let way = match is_one_of(&DISKS) {
            true => "export a .raw and convert it with `qemu-img convert -O FORMAT`",
            false => "choose one of those, or say with --format what to write",
        };
        Err(Error::invalid(format!(
            "{text:?} ends as a kind of file that is not written here; the endings are {}; {way}",
            known.join(" ")
        )))
    }
}

/// What an export wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// Names written: files, folders, links, devices.
    pub entries: u64,
    /// Bytes of file content, holes not counted.
    pub data_bytes: u64,
    /// What could not be kept (owners without root, sockets in a tar), one line each; the same lines went to the
    /// monitor.
    pub warnings: Vec<String>,
    /// The digest of the OCI manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oci_manifest: Option<String>,
}

/// Exports the stack with top `layer` to `to`.
///
/// # Errors
/// [`Error::Exists`] if something stands there already; whatever the disk says; [`Error::Cancelled`]. Nothing is
/// left behind then.
pub fn export(store: &Arc<Store>, layer: LayerId, to: &Destination, monitor: &dyn Monitor) -> Result<ExportReport> {
    let _pin = store.pin(layer)?;
    let view = View::open(store, layer)?;
    monitor.phase("writing", Some(file_bytes(&view)));
    match to.format {
        Format::Folder => folder::export(&view, &to.path, monitor),
        Format::Tar(compression) => place::new_file(&to.path, |file| tar::export(&view, compression, file, monitor)),
        Format::Oci(compression) => {
            let tag = to.tag.as_deref().unwrap_or("latest");
            oci::export(&view, &to.path, tag, compression, monitor)
        }
        Format::Raw => raw::export(&view, &to.path, monitor),
    }
}

/// Writes the merged tree of the stack with top `layer` as a tar to `out`: a pipe, a connection.
pub fn export_tar(
    store: &Arc<Store>,
    layer: LayerId,
    compression: Compression,
    out: &mut dyn Write,
    monitor: &dyn Monitor,
) -> Result<ExportReport> {
    let _pin = store.pin(layer)?;
    let view = View::open(store, layer)?;
    monitor.phase("writing", Some(file_bytes(&view)));
    tar::export(&view, compression, out, monitor)
}

/// About how much file content there is: files that a higher layer replaces count too.
fn file_bytes(view: &View) -> u64 {
    view.layers().iter().map(|layer| layer.manifest.file_bytes).fold(0, u64::saturating_add)
}

/// The error for a destination that is taken.
fn taken(path: &Path, what: &'static str) -> Error {
    Error::Exists { what, name: path.display().to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_say_what_is_written() {
        let format = |text: &str| Destination::parse(text, None).map(|to| to.format);
        for (text, wanted) in [
            ("rootfs", Format::Folder),
            ("debian-12.1", Format::Folder),
            ("app.d", Format::Folder),
            ("app.tar.d/rootfs", Format::Folder),
            ("app.zip/", Format::Folder),
            ("app.tar", Format::Tar(Compression::None)),
            ("app.tgz", Format::Tar(Compression::Gzip)),
            ("vm.img", Format::Raw),
            ("oci:layout.zip:1", Format::Oci(Compression::Gzip)),
        ] {
            assert_eq!(format(text).unwrap(), wanted, "{text}");
        }
        for text in
            ["vm1.qcow2", "vm1.VMDK", "app.tar.lz4", "app.tar.bz2", "app.TAR", "app.zip", "a/b.iso", "x.squashfs"]
        {
            let error = format(text).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(".tar.zst") && error.contains(".raw"), "{error}");
        }
        assert!(format("vm1.qcow2").unwrap_err().to_string().contains("qemu-img"));
        assert_eq!(Destination::parse("app.zip", Some(Format::Folder)).unwrap().format, Format::Folder);
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there.iso");
        std::fs::create_dir(&there).unwrap();
        assert_eq!(format(there.to_str().unwrap()).unwrap(), Format::Folder);
    }
}
