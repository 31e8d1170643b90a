//! Export as an OCI image layout (image-spec 1.1): one layer tar per layer of the stack, config, manifest, index.
//!
//! Invariants: all blobs depend on the stack alone, so that the same stack gives the same digests everywhere; a
//! layout that is there already keeps what it holds, tags that name other images included, and gets the new image by one
//! replacement of its index, also when several are written to it at a time; a new layout appears at once.

mod changes;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::attrs::Losses;
use super::compress::{Compression, Compressor};
use super::place::{Scratch, Workspace};
use super::tar::{Style, TarWriter};
use super::{ExportReport, feed};
use crate::durable;
use crate::error::{Error, Result};
use crate::image_config::ImageConfig;
use crate::manifest::Manifest;
use crate::monitor::Monitor;
use crate::view::View;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// When something was made of which that isn't known: the same each time. There are tools that fail without a time.
const UNKNOWN_TIME: &str = "1970-01-01T00:00:00Z";
const TAG_KEY: &str = "org.opencontainers.image.ref.name";
/// No index that a person made is larger.
const MAX_INDEX_BYTES: u64 = 4 * 1024 * 1024;

/// Exports the stack of `view` into the layout at `destination`, which is made if it is absent or empty, under
/// `tag`.
pub fn export(
    view: &View,
    destination: &Path,
    tag: &str,
    compression: Compression,
    monitor: &dyn Monitor,
) -> Result<ExportReport> {
    let media_type = match compression {
        Compression::None => "application/vnd.oci.image.layer.v1.tar",
        Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        Compression::Xz => return Err(Error::invalid("OCI knows no xz layers; choose gzip, zstd or none")),
    };
    check_tag(tag)?;
    match existing_index(destination)? {
        Some(_) => {
            let scratch = Scratch::inside(destination)?;
            let blobs = scratch.path().join("blobs");
            let image = Image::write(view, &blobs, media_type, compression, monitor)?;
            let _lock = lock(destination)?;
            // Others may have added theirs while this one was written.
            let gone = || Error::NotFound { what: "layout", name: destination.display().to_string() };
            let mut index = existing_index(destination)?.ok_or_else(gone)?;
            add_to_index(&mut index, &image, tag)?;
            let final_blobs = destination.join("blobs/sha256");
            fs::create_dir_all(&final_blobs).map_err(|e| Error::file("create folder", &final_blobs, e))?;
            move_blobs(&blobs, &final_blobs)?;
            durable::write(&destination.join("index.json"), &encode(&index), 0o644)?;
            Ok(image.report)
        }
        None => {
            let workspace = Workspace::create(destination)?;
            let root = workspace.root_path();
            let image = Image::write(view, &root.join("blobs/sha256"), media_type, compression, monitor)?;
            let mut index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] });
            add_to_index(&mut index, &image, tag)?;
            write_file(&root.join("oci-layout"), &encode(&json!({ "imageLayoutVersion": "1.0.0" })))?;
            write_file(&root.join("index.json"), &encode(&index))?;
            let mode = workspace.kept_mode & 0o755;
            let folder = File::from(workspace.commit()?);
            let set = folder.set_permissions(fs::Permissions::from_mode(mode));
            set.map_err(|e| Error::file("set the mode of", destination, e))?;
            Ok(image.report)
        }
    }
}

/// Keeps others from changing the layout's index until what is returned is dropped. The folder itself is locked: other tools
/// take a file that they don't know for a mistake.
fn lock(layout: &Path) -> Result<File> {
    let folder = File::open(layout).map_err(|e| Error::file("open", layout, e))?;
    match rustix::fs::flock(&folder, FlockOperation::LockExclusive) {
        // There are filesystems that lock no folders, such as NFS: there it is one after another that must be seen to.
        Ok(()) | Err(Errno::BADF | Errno::INVAL | Errno::NOLCK | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(folder),
        Err(errno) => Err(Error::file("lock", layout, errno)),
    }
}

/// A reference name, as the image-spec limits it.
fn check_tag(tag: &str) -> Result<()> {
    let is_valid = tag.starts_with(|c: char| c.is_ascii_alphanumeric())
        && tag.len() <= 255
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:@/+".contains(&b));
    if is_valid {
        Ok(())
    } else {
        Err(Error::invalid(format!("{tag:?} is not a tag: letters, digits and - . _ : @ / +")))
    }
}

/// The index of the layout at `path`, if there is one.
fn existing_index(path: &Path) -> Result<Option<Value>> {
    if !path.join("oci-layout").is_file() {
        return Ok(None);
    }
    let index = path.join("index.json");
    let length = fs::metadata(&index).map_err(|e| Error::file("look at", &index, e))?.len();
    if length > MAX_INDEX_BYTES {
        return Err(Error::invalid(format!("{} has {length} bytes; that is no index", index.display())));
    }
    let bytes = fs::read(&index).map_err(|e| Error::file("read", &index, e))?;
    let wrong = |e| Error::invalid(format!("{} is not an OCI index: {e}", index.display()));
    serde_json::from_slice(&bytes).map(Some).map_err(wrong)
}

fn add_to_index(index: &mut Value, image: &Image, tag: &str) -> Result<()> {
    let manifests = index.get_mut("manifests").and_then(Value::as_array_mut);
    let manifests = manifests.ok_or_else(|| Error::invalid("the layout's index.json has no list of manifests"))?;
    let mut entry = image.manifest.descriptor(MANIFEST_TYPE);
    let (same, other): (Vec<&Value>, Vec<&Value>) = manifests
        .iter()
        .filter(|manifest| manifest["annotations"][TAG_KEY] == tag)
        .partition(|manifest| manifest["digest"] == entry["digest"]);
    match (same.is_empty(), other.is_empty()) {
        (_, false) => return Err(Error::Exists { what: "tag", name: tag.to_owned() }),
        (false, true) => return Ok(()),
        (true, true) => {}
    }
    entry["annotations"] = json!({ TAG_KEY: tag });
    manifests.push(entry);
    Ok(())
}

/// A blob that was written.
struct Blob {
    sha256: String,
    bytes: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", self.sha256), "size": self.bytes })
    }
}

struct Image {
    manifest: Blob,
    report: ExportReport,
}

impl Image {
    /// Writes the blobs of the image into the folder `blobs`.
    fn write(
        view: &View,
        blobs: &Path,
        media_type: &str,
        compression: Compression,
        monitor: &dyn Monitor,
    ) -> Result<Image> {
        fs::create_dir_all(blobs).map_err(|e| Error::file("create folder", blobs, e))?;
        let losses = Losses::default();
        let mut report = ExportReport::default();
        let (mut layers, mut diff_ids, mut history) = (Vec::new(), Vec::new(), Vec::new());
        let mut stack = vec![view.clone()];
        while let Some(next) = stack.last().map(View::below).filter(|below| below.top().is_some()) {
            stack.push(next);
        }
        for layer in stack.iter().rev() {
            let (blob, diff_id) = write_layer(layer, blobs, compression, &losses, &mut report, monitor)?;
            layers.push(blob.descriptor(media_type));
            diff_ids.push(format!("sha256:{diff_id}"));
            if let (Some(id), Some(manifest)) = (layer.top(), layer.manifest()) {
                history.push(json!({ "created_by": format!("layerfs: {} layer {}", manifest.kind, id.0.short()) }));
            }
        }
        let config = image_config(view, diff_ids, history)?;
        let config = write_blob(blobs, &encode(&config))?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.descriptor(CONFIG_TYPE),
            "layers": layers,
        });
        let manifest = write_blob(blobs, &encode(&manifest))?;
        report.oci_manifest = Some(format!("sha256:{}", manifest.sha256));
        report.warnings = losses.report(monitor);
        Ok(Image { manifest, report })
    }
}

/// The configuration of the image: that which an imported image left with its layer, with these archives; `history`
/// tells of each layer, the lowest first.
fn image_config(view: &View, diff_ids: Vec<String>, history: Vec<Value>) -> Result<Value> {
    let kept = match view.top() {
        Some(top) => ImageConfig::of_stack(&**view.chunks(), top)?,
        None => None,
    };
    let (layer, kept) = kept.unzip();
    let mut config = kept.map_or_else(Default::default, |kept: ImageConfig| kept.properties().clone());
    for (key, value) in [("architecture", architecture()), ("os", "linux")] {
        config.entry(key).or_insert_with(|| value.into());
    }
    config.entry("config").or_insert_with(|| json!({}));
    config.entry("created").or_insert_with(|| UNKNOWN_TIME.into());
    // How many of the stack's layers there were when the image was imported.
    let imported =
        layer.map_or(Ok(0), |layer| Manifest::load(&**view.chunks(), layer).map(|m| m.depth as usize + 1))?;
    let mut history = merged_history(config.get("history"), imported, history);
    for entry in history.iter_mut().filter_map(Value::as_object_mut) {
        entry.entry("created").or_insert_with(|| UNKNOWN_TIME.into());
    }
    config.insert("history".to_owned(), history.into());
    config.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diff_ids }));
    Ok(config.into())
}

/// The history of an image that was the lowest `imported` layers, or the higher ones of them, with what is told of the
/// layers below and above it. What doesn't fit the layers is left out.
fn merged_history(kept: Option<&Value>, imported: usize, told: Vec<Value>) -> Vec<Value> {
    let kept = kept.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let filled = kept.iter().filter(|entry| entry["empty_layer"] != true).count();
    if filled == 0 || filled > imported || imported > told.len() {
        return told;
    }
    let (below, above) = (&told[..imported - filled], &told[imported..]);
    [below, kept, above].concat()
}

/// Writes the tar of the top layer of `view`. Returns its blob and the hash of the tar itself.
fn write_layer(
    view: &View,
    blobs: &Path,
    compression: Compression,
    losses: &Losses,
    report: &mut ExportReport,
    monitor: &dyn Monitor,
) -> Result<(Blob, String)> {
    let temporary = blobs.join("layer.tmp");
    let failed = |e| Error::file("write", &temporary, e);
    let file = File::create(&temporary).map_err(failed)?;
    let hashing = Hashing { inner: file, hash: Sha256::new(), bytes: 0 };
    let mut compressor = Compressor::new(hashing, compression).map_err(failed)?;
    let mut plain_hash = Sha256::new();
    let chunks = &**view.chunks();
    let (entries, data_bytes) = feed::run(
        chunks,
        monitor,
        |feed| {
            let mut tar = TarWriter::new(chunks, feed, losses, monitor, Style::Oci);
            changes::write_changes(view, &mut tar)?;
            tar.finish()
        },
        |piece| {
            plain_hash.update(piece);
            compressor.write_all(piece).map_err(failed)
        },
    )?;
    report.entries += entries;
    report.data_bytes += data_bytes;
    let Hashing { inner, hash, bytes } = compressor.finish().map_err(failed)?;
    inner.sync_all().map_err(|e| Error::file("sync", &temporary, e))?;
    let sha256 = hex(&hash.finalize());
    let path = blobs.join(&sha256);
    durable::move_synced(&temporary, &path)?;
    Ok((Blob { sha256, bytes }, hex(&plain_hash.finalize())))
}

fn write_blob(blobs: &Path, bytes: &[u8]) -> Result<Blob> {
    let sha256 = hex(&Sha256::digest(bytes));
    write_file(&blobs.join(&sha256), bytes)?;
    Ok(Blob { sha256, bytes: bytes.len() as u64 })
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(|e| Error::file("create", path, e))?;
    file.write_all(bytes).map_err(|e| Error::file("write", path, e))?;
    file.sync_all().map_err(|e| Error::file("sync", path, e))
}

/// Moves blobs to a layout that may have some of them.
fn move_blobs(from: &Path, to: &Path) -> Result<()> {
    let failed = |e: io::Error| Error::file("read folder", from, e);
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        durable::move_synced(&entry.path(), &to.join(entry.file_name()))?;
    }
    durable::sync_folder(to)
}

fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// This host's architecture, as Go and so images call it: layers don't know theirs.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

/// Counts and hashes what goes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests;
