//! Stacks as artifacts of a registry: their chunks in parcels. FORMAT.md, "Parcels".
//!
//! Invariants: parcels that the registry has aren't sent again, and of those there only what holds lacking chunks is
//! fetched; every chunk is verified before it is stored; the name is set when the whole stack has been checked.
//! Memory: 40 bytes for each chunk of the stack, and one parcel.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layerfs::closure::walk_layer;
use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest as LayerManifest;
use layerfs::monitor::{Monitor, check};
use layerfs::store::{MAX_PARCEL_BYTES, Parcel, Session, Store, read_parcel};
use layerfs::{ChunkId, LayerId, chunk};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::{Descriptor, Remote, sha256};
use super::image::Found;
use super::{PullFrom, Pulled, Pushed, blocking};
use crate::check::check_layer;
use crate::error::{Error, Result};
use crate::wanted::{Polled, Wanted};

/// What the artifact is.
pub(super) const STACK_TYPE: &str = "application/vnd.layerfs.stack.v1";
const CONFIG_TYPE: &str = "application/vnd.layerfs.stack.config.v1+json";
const INDEX_TYPE: &str = "application/vnd.layerfs.stack.index.v1";
const PARCEL_TYPE: &str = "application/vnd.layerfs.pack.v1";
const INDEX_MAGIC: &[u8; 8] = b"LFPX\x01\0\0\0";
/// No index is longer, in bytes: 8 million chunks.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// No configuration is longer, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Chunks looked up at once.
const BATCH: usize = 1024;

/// The artifact's configuration.
#[derive(Debug, Serialize, Deserialize)]
struct Config {
    /// The stack's layers, the top first.
    layers: Vec<String>,
}

/// A stack that was written to files.
struct Packed {
    config: Vec<u8>,
    index: Vec<u8>,
    parcels: Vec<Descriptor>,
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor { media_type: media_type.to_owned(), digest: sha256(bytes), size: bytes.len() as u64, platform: None }
}

/// The file of the blob with `digest` in `folder`.
fn file(folder: &Path, digest: &str) -> PathBuf {
    folder.join(digest.replace(':', "-"))
}

fn write(folder: &Path, digest: &str, bytes: &[u8]) -> Result<()> {
    let path = file(folder, digest);
    std::fs::write(&path, bytes).map_err(|e| layerfs::Error::file("write", &path, e).into())
}

fn temporary(store: &Store) -> Result<tempfile::TempDir> {
    let tmp = store.tmp_folder();
    let folder = tempfile::Builder::new().prefix("registry-").tempdir_in(&tmp);
    Ok(folder.map_err(|e| layerfs::Error::file("make a folder in", &tmp, e))?)
}

/// Writes the parcels of the stack with top `top` into `folder`, those of the lowest layer first.
fn pack(store: &Store, top: LayerId, folder: &Path, monitor: &dyn Monitor) -> Result<Packed> {
    let _pin = store.pin(top)?;
    let mut stack = vec![top];
    while let Some(parent) = stack.last().map(|id| LayerManifest::load(store, *id)).transpose()?.and_then(|m| m.parent)
    {
        stack.push(parent);
    }
    let mut seen: HashSet<ChunkId> = HashSet::new();
    let (mut parcels, mut index) = (Vec::new(), INDEX_MAGIC.to_vec());
    let mut end = |parcel: Parcel| -> Result<()> {
        let (bytes, chunks) = parcel.finish();
        let blob = descriptor(PARCEL_TYPE, &bytes);
        index.extend_from_slice(&(chunks.len() as u32).to_le_bytes());
        chunks.iter().for_each(|id| index.extend_from_slice(&id.0));
        write(folder, &blob.digest, &bytes)?;
        parcels.push(blob);
        Ok(())
    };
    monitor.phase("packing", None);
    for layer in stack.iter().rev() {
        let mut wanted = Vec::new();
        walk_layer(store, *layer, &mut |chunk| {
            let is_new = seen.insert(chunk.id);
            if is_new {
                wanted.push(chunk.id);
            }
            Ok(is_new || chunk.class == chunk::Class::Table)
        })?;
        let mut parcel = Parcel::default();
        for id in wanted {
            check(monitor)?;
            let stored = store.read_stored(&id)?;
            monitor.advance(stored.stored.len() as u64);
            if parcel.push(&stored) {
                end(std::mem::take(&mut parcel))?;
            }
        }
        // A layer ends its parcel, so that the parcels of what lies below don't depend on what lies above.
        if !parcel.is_empty() {
            end(parcel)?;
        }
    }
    let config = Config { layers: stack.iter().map(LayerId::to_string).collect() };
    let config = serde_json::to_vec(&config).map_err(|e| layerfs::Error::invalid(e.to_string()))?;
    Ok(Packed { config, index, parcels })
}

/// Pushes the stack with top `layer`.
pub(super) async fn push(
    store: &Arc<Store>,
    layer: LayerId,
    remote: &Remote,
    monitor: Arc<dyn Monitor>,
) -> Result<Pushed> {
    let folder = temporary(store)?;
    let (from, into, told) = (store.clone(), folder.path().to_owned(), monitor.clone());
    let packed = blocking(move || pack(&from, layer, &into, &*told)).await?;
    let (config, index) = (descriptor(CONFIG_TYPE, &packed.config), descriptor(INDEX_TYPE, &packed.index));
    write(folder.path(), &config.digest, &packed.config)?;
    write(folder.path(), &index.digest, &packed.index)?;
    let mut layers = vec![index];
    layers.extend(packed.parcels);
    let (mut lacking, mut pushed) = (Vec::new(), Pushed::default());
    let mut looked: HashSet<&str> = HashSet::new();
    for blob in layers.iter().chain([&config]) {
        if !looked.insert(&blob.digest) || remote.has_blob(&blob.digest).await? {
            pushed.blobs_reused += 1;
        } else {
            lacking.push(blob);
        }
    }
    monitor.phase("uploading", Some(lacking.iter().map(|blob| blob.size).sum()));
    for blob in &lacking {
        remote.put_blob(blob, &file(folder.path(), &blob.digest)).await?;
        pushed.blobs_sent += 1;
        pushed.bytes_sent += blob.size;
    }
    let manifest = manifest(&config, &layers).to_string().into_bytes();
    pushed.digest = sha256(&manifest);
    pushed.bytes_sent += manifest.len() as u64;
    remote.put_manifest(manifest, super::image::MANIFEST_TYPE).await?;
    Ok(pushed)
}

/// The artifact's manifest.
fn manifest(config: &Descriptor, layers: &[Descriptor]) -> serde_json::Value {
    json!({
        "schemaVersion": 2,
        "mediaType": super::image::MANIFEST_TYPE,
        "artifactType": STACK_TYPE,
        "config": config,
        "layers": layers,
    })
}

/// What a registry has of the stack with top `layer`: the manifest, and the blobs by their digests.
#[cfg(test)]
pub(super) fn artifact(
    store: &Store,
    layer: LayerId,
    folder: &Path,
) -> Result<(serde_json::Value, std::collections::HashMap<String, Vec<u8>>)> {
    let packed = pack(store, layer, folder, &layerfs::monitor::Silent)?;
    let (config, index) = (descriptor(CONFIG_TYPE, &packed.config), descriptor(INDEX_TYPE, &packed.index));
    let read = |blob: &Descriptor| {
        let path = file(folder, &blob.digest);
        let bytes = std::fs::read(&path).map_err(|e| layerfs::Error::file("read", &path, e))?;
        Ok((blob.digest.clone(), bytes))
    };
    let mut blobs = packed.parcels.iter().map(read).collect::<Result<std::collections::HashMap<_, _>>>()?;
    blobs.extend([(config.digest.clone(), packed.config), (index.digest.clone(), packed.index)]);
    let layers: Vec<Descriptor> = std::iter::once(index).chain(packed.parcels).collect();
    Ok((manifest(&config, &layers), blobs))
}

/// Pulls the stack that `found` is.
pub(super) async fn pull(
    store: &Arc<Store>,
    from: &PullFrom,
    found: Found,
    remote: &Remote,
    monitor: Arc<dyn Monitor>,
) -> Result<Pulled> {
    let folder = temporary(store)?;
    let config: Config =
        remote.parse(&document(remote, &found.manifest.config, folder.path(), MAX_CONFIG_BYTES).await?)?;
    let layers = config.layers.iter().map(|id| Ok(id.parse::<LayerId>()?)).collect::<Result<Vec<_>>>()?;
    let top = *layers.first().ok_or_else(|| remote.wrong(ErrorClass::Corrupt, "the stack there has no layers"))?;
    let of_type = |kind: &'static str| found.manifest.layers.iter().filter(move |blob| blob.media_type == kind);
    let index = of_type(INDEX_TYPE).next();
    let index = index.ok_or_else(|| remote.wrong(ErrorClass::Corrupt, "the stack there has no index"))?;
    let index = document(remote, index, folder.path(), MAX_INDEX_BYTES).await?;
    let parcels: Vec<&Descriptor> = of_type(PARCEL_TYPE).collect();
    for parcel in &parcels {
        remote.check_digest(parcel)?;
        if parcel.size > MAX_PARCEL_BYTES as u64 {
            return Err(remote.wrong(ErrorClass::Corrupt, format!("a parcel there has {} bytes", parcel.size)));
        }
    }
    let contents = parse_index(&index, parcels.len())
        .ok_or_else(|| remote.wrong(ErrorClass::Corrupt, "the index of the stack there is malformed"))?;
    let session = Arc::new(store.session("registry"));
    let mut lacking = Vec::new();
    for (parcel, chunks) in parcels.into_iter().zip(contents) {
        if !has_all(&session, chunks)? {
            lacking.push(parcel);
        }
    }
    let bytes_received = lacking.iter().map(|blob| blob.size).fold(index.len() as u64, u64::saturating_add);
    monitor.phase("downloading", Some(bytes_received));
    for blob in &lacking {
        let path = file(folder.path(), &blob.digest);
        remote.get_blob(blob, &path).await?;
        let session = session.clone();
        blocking(move || {
            read_parcel(&path, &mut |stored| session.put_verified(chunk::verify(stored)?.1).map(|_| ()))?;
            std::fs::remove_file(&path).map_err(|e| layerfs::Error::file("remove", &path, e).into())
        })
        .await?;
    }
    let blobs_received = lacking.len() as u64 + 2;
    let place = remote.place();
    let wrong = move |detail| Error::Registry { action: "reading", place, class: ErrorClass::Corrupt, detail };
    let (layer_count, name, expect) = (layers.len() as u64, from.name.clone(), from.expect);
    blocking(move || {
        let wanted = Wanted::by(&monitor);
        let chunks = Polled::new(&*session, &wanted);
        // From the lowest on, since each is compared with its parent, which has to be whole.
        let mut below = None;
        for layer in layers.iter().rev() {
            if LayerManifest::load(&chunks, *layer)?.parent != below {
                let detail = format!("the stack there has layer {layer} without the one that it stands on");
                return Err(wrong(detail));
            }
            check_layer(&chunks, *layer, &mut |ids| session.has_many(ids))?;
            below = Some(*layer);
        }
        session.commit()?;
        session.store().set_name(&name, top, expect)?;
        Ok(())
    })
    .await?;
    Ok(Pulled { digest: found.digest, layer: top, layers: layer_count, blobs_received, bytes_received, import: None })
}

/// A small blob, whole.
async fn document(remote: &Remote, blob: &Descriptor, folder: &Path, most: u64) -> Result<Vec<u8>> {
    remote.check_digest(blob)?;
    if blob.size > most {
        return Err(remote.wrong(ErrorClass::Corrupt, format!("a blob of {} bytes is no description", blob.size)));
    }
    let path = file(folder, &blob.digest);
    remote.get_blob(blob, &path).await?;
    std::fs::read(&path).map_err(|e| layerfs::Error::file("read", &path, e).into())
}

/// The ids of each parcel's chunks, one after the other.
fn parse_index(index: &[u8], parcels: usize) -> Option<Vec<&[u8]>> {
    let mut rest = index.strip_prefix(INDEX_MAGIC)?;
    let mut contents = Vec::new();
    while !rest.is_empty() {
        let (count, behind) = rest.split_first_chunk::<4>()?;
        let (chunks, behind) = behind.split_at_checked((u32::from_le_bytes(*count) as usize).checked_mul(32)?)?;
        contents.push(chunks);
        rest = behind;
    }
    (contents.len() == parcels).then_some(contents)
}

fn has_all(session: &Session, chunks: &[u8]) -> Result<bool> {
    for batch in chunks.chunks(32 * BATCH) {
        let ids: Vec<ChunkId> = batch.as_chunks::<32>().0.iter().map(|id| ChunkId(*id)).collect();
        if session.has_many(&ids)?.contains(&false) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes() {
        let mut index = INDEX_MAGIC.to_vec();
        index.extend_from_slice(&[2, 0, 0, 0]);
        index.extend_from_slice(&[7; 64]);
        index.extend_from_slice(&[0, 0, 0, 0]);
        assert_eq!(parse_index(&index, 2).unwrap(), [&[7; 64][..], &[]]);
        assert!(parse_index(&index, 1).is_none() && parse_index(&index[..50], 2).is_none());
        index[8..12].copy_from_slice(&[0xff; 4]);
        assert!(parse_index(&index, 2).is_none() && parse_index(b"LFPX", 0).is_none());
    }
}
