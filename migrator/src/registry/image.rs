//! Stacks as ordinary OCI images, both ways.
//!
//! An image passes through an OCI image layout in the store's temporary folder, so that one way in and one way out (the
//! importer and the exporter of layerfs) do all the rest. Invariant: the layout goes when the transfer ends, however.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use layerfs::LayerId;
use layerfs::error::ErrorClass;
use layerfs::export::{self, Compression, Destination};
use layerfs::import::{self, Format, ImportOptions, SourceSpec};
use layerfs::monitor::Monitor;
use layerfs::platform::Platform;
use layerfs::store::Store;
use serde::Deserialize;
use serde_json::json;

use super::client::{Descriptor, Remote, is_digest};
use super::parcels::STACK_TYPE;
use super::{PullFrom, Pulled, Pushed, blocking};
use crate::error::{Error, Result};

/// So many blobs are under way at a time.
const AT_A_TIME: usize = 3;
/// Indexes may refer to indexes so deep.
const MAX_INDEXES: usize = 4;
pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    #[serde(default)]
    artifact_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// A layout's folder, which goes when this is dropped.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new(store: &Store) -> Result<Layout> {
        let tmp = store.tmp_folder();
        let folder = tempfile::Builder::new().prefix("registry-").tempdir_in(&tmp);
        Ok(Layout(folder.map_err(|e| layerfs::Error::file("make a folder in", &tmp, e))?))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("image")
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replacen(':', "/", 1))
    }
}

/// Pushes the stack with top `layer`.
pub(super) async fn push(
    store: &Arc<Store>,
    layer: LayerId,
    compression: Compression,
    remote: &Remote,
    monitor: Arc<dyn Monitor>,
) -> Result<Pushed> {
    let layout = Layout::new(store)?;
    let to = Destination { path: layout.path(), format: export::Format::Oci(compression), tag: None };
    let (from, told) = (store.clone(), monitor.clone());
    let report = blocking(move || Ok(export::export(&from, layer, &to, &*told)?)).await?;
    let digest = report.oci_manifest.unwrap_or_default();
    let document = read(&layout.blob(&digest))?;
    let manifest: Manifest = remote.parse(&document)?;
    let mut pushed = Pushed { digest, ..Pushed::default() };
    let mut lacking: Vec<&Descriptor> = Vec::new();
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        // Equal layers of one image are one blob.
        if lacking.iter().any(|other| other.digest == blob.digest) || remote.has_blob(&blob.digest).await? {
            pushed.blobs_reused += 1;
        } else {
            lacking.push(blob);
        }
    }
    monitor.phase("uploading", Some(lacking.iter().map(|blob| blob.size).sum()));
    let layout = &layout;
    futures::stream::iter(
        lacking.iter().map(|blob| async move { remote.put_blob(blob, &layout.blob(&blob.digest)).await }),
    )
    .buffer_unordered(AT_A_TIME)
    .try_collect::<()>()
    .await?;
    pushed.blobs_sent = lacking.len() as u64;
    pushed.bytes_sent = lacking.iter().map(|blob| blob.size).sum::<u64>() + document.len() as u64;
    remote.put_manifest(document, MANIFEST_TYPE).await?;
    Ok(pushed)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| layerfs::Error::file("read", path, e).into())
}

/// Pulls the image that `found` is.
pub(super) async fn pull(
    store: &Arc<Store>,
    from: &PullFrom,
    found: Found,
    remote: &Remote,
    monitor: Arc<dyn Monitor>,
) -> Result<Pulled> {
    let layout = Layout::new(store)?;
    let mut blobs: Vec<&Descriptor> = Vec::new();
    for blob in found.manifest.layers.iter().chain([&found.manifest.config]) {
        remote.check_digest(blob)?;
        if blobs.iter().all(|other| other.digest != blob.digest) {
            blobs.push(blob);
        }
    }
    write_layout(&layout, &found)?;
    let bytes = blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
    monitor.phase("downloading", Some(bytes));
    let into = &layout;
    futures::stream::iter(
        blobs.iter().map(|blob| async move { remote.get_blob(blob, &into.blob(&blob.digest)).await }),
    )
    .buffer_unordered(AT_A_TIME)
    .try_collect::<()>()
    .await?;
    let options = ImportOptions {
        expect: from.expect,
        format: Some(Format::Oci),
        platform: found.platform.as_ref().or(from.platform.as_ref()).map(Platform::to_string),
        ..ImportOptions::new(from.name.clone())
    };
    let (store, source, blobs_received) = (store.clone(), SourceSpec::Path(layout.path()), blobs.len() as u64);
    let report = blocking(move || Ok(import::import(&store, source, &options, &*monitor)?)).await?;
    drop(layout);
    let top = report.layers.last().ok_or_else(|| remote.wrong(ErrorClass::Invalid, "the image has no layers"))?;
    Ok(Pulled {
        digest: found.digest,
        layer: top.id,
        layers: report.layers.len() as u64,
        blobs_received,
        bytes_received: bytes,
        import: Some(report),
    })
}

/// An image or stack that was chosen.
pub(super) struct Found {
    pub digest: String,
    document: Vec<u8>,
    pub manifest: Manifest,
    /// As an index said it.
    platform: Option<Platform>,
}

impl Found {
    /// Whether it is a stack that was pushed as packs.
    pub fn is_stack(&self) -> bool {
        self.manifest.artifact_type.as_deref() == Some(STACK_TYPE)
    }
}

/// Looks what there is at the address.
pub(super) async fn find(remote: &Remote, wanted: Option<&Platform>) -> Result<Found> {
    let (mut document, mut digest) = remote.manifest(None).await?;
    let mut platform = None;
    for _ in 0..MAX_INDEXES {
        let value: serde_json::Value = remote.parse(&document)?;
        if value.get("manifests").is_none() {
            let manifest: Manifest = remote.parse(&document)?;
            check_kind(remote, &manifest)?;
            if !is_digest(&digest) {
                return Err(remote.wrong(ErrorClass::Unsupported, format!("its digest is {digest:?}")));
            }
            return Ok(Found { digest, document: document.to_vec(), manifest, platform });
        }
        let index: Index = remote.parse(&document)?;
        let chosen = choose(&index.manifests, wanted).map_err(|detail| remote.wrong(ErrorClass::NotFound, detail))?;
        platform = chosen.platform.clone().or(platform);
        (document, digest) = remote.manifest(Some(&chosen.digest)).await?;
    }
    Err(remote.wrong(ErrorClass::Corrupt, "indexes there refer to each other"))
}

fn check_kind(remote: &Remote, manifest: &Manifest) -> Result<()> {
    let is_image = manifest.artifact_type.is_none() && manifest.config.media_type.contains("image");
    if is_image || manifest.artifact_type.as_deref() == Some(STACK_TYPE) {
        return Ok(());
    }
    let kind = manifest.artifact_type.as_ref().unwrap_or(&manifest.config.media_type);
    Err(remote.wrong(ErrorClass::Unsupported, format!("it is no image, but an artifact of type {kind:?}")))
}

/// The manifest for the wanted platform. One that says its variant gives way to one that doesn't.
fn choose<'a>(manifests: &'a [Descriptor], wanted: Option<&Platform>) -> Result<&'a Descriptor, String> {
    let host = Platform::host();
    let wanted = wanted.unwrap_or(&host);
    let fits = |manifest: &&Descriptor| manifest.platform.as_ref().is_none_or(|platform| platform.fits(wanted));
    let found: Vec<&Descriptor> = manifests.iter().filter(fits).collect();
    let plain = |manifest: &&&Descriptor| manifest.platform.as_ref().is_some_and(|platform| platform.variant.is_none());
    match (&found[..], found.iter().find(plain)) {
        ([one], _) | (_, Some(one)) => Ok(one),
        _ => {
            let known = |manifest: &Descriptor| manifest.platform.as_ref().map(Platform::to_string);
            let mut all: Vec<String> =
                manifests.iter().filter_map(known).filter(|text| !text.contains("unknown")).collect();
            all.sort_unstable();
            all.dedup();
            let what = if found.is_empty() { "no image" } else { "several images" };
            Err(format!("it has {what} for {wanted}; choose with --platform among: {}", all.join(", ")))
        }
    }
}

fn write_layout(layout: &Layout, found: &Found) -> Result<()> {
    let write = |path: PathBuf, bytes: &[u8]| {
        std::fs::write(&path, bytes).map_err(|e| Error::from(layerfs::Error::file("write", &path, e)))
    };
    for algorithm in ["sha256", "sha512"] {
        let folder = layout.path().join("blobs").join(algorithm);
        std::fs::create_dir_all(&folder).map_err(|e| layerfs::Error::file("create folder", &folder, e))?;
    }
    let entry = json!({ "mediaType": MANIFEST_TYPE, "digest": found.digest, "size": found.document.len() });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    write(layout.path().join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    write(layout.path().join("index.json"), index.to_string().as_bytes())?;
    write(layout.blob(&found.digest), &found.document)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifests(platforms: &[&str]) -> Vec<Descriptor> {
        let descriptor = |platform: &&str| Descriptor {
            media_type: String::new(),
            digest: (*platform).to_owned(),
            size: 1,
            platform: platform.parse().ok(),
        };
        platforms.iter().map(descriptor).collect()
    }

    #[test]
    fn the_platform_chooses() {
        let choice = |platforms: &[&str], wanted: &str| {
            let wanted = wanted.parse().unwrap();
            choose(&manifests(platforms), Some(&wanted)).map(|found| found.digest.clone())
        };
        let all = ["linux/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "unknown/unknown"];
        assert_eq!(choice(&all, "linux/arm64").unwrap(), "linux/arm64/v8");
        assert_eq!(choice(&all, "linux/arm/v7").unwrap(), "linux/arm/v7");
        assert_eq!(choice(&["linux/amd64/v3", "linux/amd64"], "linux/amd64").unwrap(), "linux/amd64");
        let message = choice(&all, "linux/arm").unwrap_err();
        assert!(message.contains("several") && message.contains("linux/arm/v6"), "{message}");
        let message = choice(&all, "linux/s390x").unwrap_err();
        assert!(message.contains("no image") && !message.contains("unknown"), "{message}");
    }
}
