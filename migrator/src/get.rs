//! Single chunks from a peer, for healing: one question, the chunks, one end. PROTOCOL.md, "Single chunks".
//!
//! Invariants: what is sent was verified at the sender, and is verified again before anybody gets it; a restricted
//! key gets what it can reach and doesn't learn why it doesn't get the rest.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::chunk::{self, Verified};
use layerfs::store::Store;
use layerfs::{ChunkId, LayerId};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use crate::access::Access;
use crate::error::{Error, Result};
use crate::link::{Link, Outbox};
use crate::peers::{Peer, Visible};
use crate::send::joined;
use crate::wanted::Wanted;
use crate::wire::{ChunksWriter, MAX_ASK, Message};

/// Ids in one question.
const BATCH: usize = 256;

/// Takes what comes.
pub(crate) type Sink<'a> = dyn FnMut(Verified) -> layerfs::Result<()> + Send + 'a;

/// Asks for `ids` and gives what comes to `sink`. Returns how many came.
pub(crate) async fn run(link: &mut Link, ids: &[ChunkId], sink: &mut Sink<'_>) -> Result<u64> {
    let mut all = 0;
    for ids in ids.chunks(BATCH) {
        link.send(Message::Get { ids: ids.to_vec() }).await?;
        let mut awaited: HashSet<ChunkId> = ids.iter().copied().collect();
        let mut count = 0;
        loop {
            match link.recv().await? {
                Message::Chunks(chunks) => {
                    if let Some(other) = chunks.iter().find(|chunk| !awaited.remove(&chunk.id)) {
                        return Err(Error::protocol(link.peer(), format!("chunk {} was not asked for", other.id)));
                    }
                    count += chunks.len() as u64;
                    let verified = spawn_blocking(move || {
                        let verified = chunks.into_iter().map(|chunk| chunk::verify(chunk).map(|(_, proof)| proof));
                        Ok(verified.collect::<layerfs::Result<Vec<_>>>()?)
                    });
                    joined(verified.await)?.into_iter().try_for_each(&mut *sink)?;
                }
                Message::End { chunks } if chunks == count => break,
                other => return Err(Error::protocol(link.peer(), format!("{} after Get", other.kind()))),
            }
        }
        all += count;
    }
    Ok(all)
}

/// Answers the Gets of one connection.
pub(crate) struct Answerer {
    store: Arc<Store>,
    peer: String,
    /// What the peer may reach, and when that was worked out, which takes a while if it may not reach everything.
    access: Slot,
}

/// What a peer that saw so much could reach at that time.
type Slot = Arc<Mutex<Option<(Arc<Access>, Instant, Visible)>>>;

/// After so long a peer that asks for what it couldn't reach may reach more.
const ACCESS_HOLDS: Duration = Duration::from_secs(5);

impl Answerer {
    /// For `peer`.
    pub fn new(store: &Arc<Store>, peer: &Peer) -> Answerer {
        Answerer { store: store.clone(), peer: peer.name.to_string(), access: Slot::default() }
    }

    /// Sends those of `ids` that are here, whole, and within reach.
    pub async fn chunks(&self, link: &mut Link, visible: &Visible, ids: Vec<ChunkId>) -> Result<()> {
        let (store, visible, outbox) = (self.store.clone(), visible.clone(), link.outbox()?);
        let slot = self.access.clone();
        let wanted = waiting(&outbox);
        let send = move || send_all(&store, &reachable(&store, &visible, &slot, &ids, &wanted)?, &ids, &outbox);
        let is_gone = joined(spawn_blocking(send).await)?;
        if is_gone { Err(link.why_gone().await) } else { Ok(()) }
    }

    /// Keeps the trace of a layer that is partial here and comes from the peer, or that is a guest's and comes now; what others say
    /// isn't kept.
    pub async fn learn(&self, layer: LayerId, ids: Vec<ChunkId>, is_of_guest: bool) -> Result<()> {
        if is_of_guest || self.store.partial(layer).is_some_and(|partial| partial.sources.contains(&self.peer)) {
            let store = self.store.clone();
            let keep = move || Ok(store.extend_trace(layer, &ids)?);
            joined(spawn_blocking(keep).await)?;
        }
        Ok(())
    }

    /// Sends the traces of those of `layers` that the peer may know of.
    pub async fn traces(&self, link: &mut Link, visible: &Visible, layers: Vec<LayerId>) -> Result<()> {
        let (store, visible, outbox) = (self.store.clone(), visible.clone(), link.outbox()?);
        let is_gone = joined(spawn_blocking(move || send_traces(&store, &visible, &layers, &outbox)).await)?;
        if is_gone { Err(link.why_gone().await) } else { Ok(()) }
    }
}

/// For as long as answers can go out.
fn waiting(outbox: &Outbox) -> Wanted {
    let outbox = outbox.clone();
    Wanted::until(move || outbox.is_gone())
}

/// For each of `ids`, whether the peer may have it, while that is `wanted`. Blocks.
fn reachable(
    store: &Arc<Store>,
    visible: &Visible,
    slot: &Slot,
    ids: &[ChunkId],
    wanted: &Wanted,
) -> Result<Vec<bool>> {
    let session = store.session("get");
    if *visible == Visible::All {
        return Ok(session.has_many(ids)?);
    }
    let known = slot.lock().clone();
    if let Some((access, since, of)) = known
        && of == *visible
    {
        let there = access.has(&session, ids)?;
        if !there.contains(&false) || since.elapsed() < ACCESS_HOLDS {
            return Ok(there);
        }
    }
    let access = Arc::new(Access::new(store, visible, wanted)?);
    let there = access.has(&session, ids)?;
    *slot.lock() = Some((access, Instant::now(), visible.clone()));
    Ok(there)
}

/// Returns whether the link is gone. Blocks.
fn send_all(store: &Arc<Store>, there: &[bool], ids: &[ChunkId], outbox: &Outbox) -> Result<bool> {
    let mut frame = ChunksWriter::default();
    let mut count = 0;
    for (id, _) in ids.iter().zip(there).filter(|(_, there)| **there) {
        // What is damaged here too isn't worth sending.
        let Ok((_, proof)) = store.read_stored(id).and_then(chunk::verify) else { continue };
        frame.push(proof.stored());
        count += 1;
        if frame.is_full() && outbox.blocking_send_frame(std::mem::take(&mut frame).finish()).is_err() {
            return Ok(true);
        }
    }
    if !frame.is_empty() && outbox.blocking_send_frame(frame.finish()).is_err() {
        return Ok(true);
    }
    Ok(outbox.blocking_send(Message::End { chunks: count }).is_err())
}

/// Returns whether the link is gone. Blocks.
fn send_traces(store: &Arc<Store>, visible: &Visible, layers: &[LayerId], outbox: &Outbox) -> Result<bool> {
    let access = Access::new(store, visible, &waiting(outbox))?;
    let session = store.session("trace");
    let mut count = 0;
    for layer in layers.iter().filter(|layer| access.holds(layer)) {
        for ids in store.trace(*layer)?.chunks(MAX_ASK) {
            let there = access.has(&session, ids)?;
            let ids: Vec<ChunkId> = ids.iter().zip(there).filter(|(_, there)| *there).map(|(id, _)| *id).collect();
            count += ids.len() as u64;
            if !ids.is_empty() && outbox.blocking_send(Message::Traced { layer: *layer, ids }).is_err() {
                return Ok(true);
            }
        }
    }
    Ok(outbox.blocking_send(Message::End { chunks: count }).is_err())
}
