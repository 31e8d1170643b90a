//! Opens bundles at the receiver. PROTOCOL.md, "Bundles".
//!
//! Invariants: a base is used only if the peer may take it as being here, and whether it isn't here or isn't the peer's
//! to know makes no difference; a chunk's id is what its bytes hash to, so no lie about it is possible; memory is at most
//! the bounds of one bundle.

use layerfs::chunk::{self, ChunkRead, Verified};
use layerfs::store::{Session, Store};
use layerfs::{ChunkId, Error as StoreError};

use crate::access::Access;
use crate::bundle;
use crate::error::{Error, Result};
use crate::wire::{BaseName, Bundle, MAX_BUNDLE_BYTES};

/// The chunks of `bundle`, encoded for the store. Blocks.
///
/// # Errors
/// A base that isn't there, or isn't there for this peer; a frame that isn't what it says; those of the store.
pub(crate) fn open(
    store: &Store,
    session: &Session,
    access: &Access,
    bundle: &Bundle,
    peer: &str,
) -> Result<Vec<Verified>> {
    let mut prefix = Vec::new();
    for name in &bundle.bases {
        let base = find(store, session, access, name, peer)?;
        let plain = session.get(&base)?;
        if prefix.len() + plain.len() > MAX_BUNDLE_BYTES {
            return Err(Error::protocol(peer, "a bundle with too large bases"));
        }
        prefix.extend_from_slice(&plain);
    }
    let lengths = bundle.chunks.iter().map(|(_, bytes)| *bytes);
    let plain = bundle::unpack(&prefix, &bundle.frame, lengths).map_err(|error| broken(peer, error))?;
    let level = store.options().compression_level;
    let encoded = plain.iter().zip(&bundle.chunks);
    Ok(encoded.map(|(plain, (class, _))| chunk::encode(ChunkId::of(plain), *class, plain, level)).collect())
}

fn broken(peer: &str, error: StoreError) -> Error {
    Error::protocol(peer, error.to_string())
}

/// The chunk with a name that begins so, if the peer may know of it.
fn find(store: &Store, session: &Session, access: &Access, name: &BaseName, peer: &str) -> Result<ChunkId> {
    let found = store.find(name)?;
    let there = access.has(session, &found)?;
    let base = found.into_iter().zip(there).find(|(_, there)| *there);
    base.map(|(id, _)| id).ok_or_else(|| {
        let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        Error::protocol(peer, format!("the base {name} of a bundle is not to be had"))
    })
}
