//! Single chunks from a peer, for healing: one question, the chunks, one end. PROTOCOL.md, "Single chunks".
//!
//! Invariants: what is sent was verified at the sender, and is verified again before anybody gets it; a restricted
//! key gets what it can reach and doesn't learn why it doesn't get the rest.

use std::collections::HashSet;
use std::sync::Arc;

use layerfs::ChunkId;
use layerfs::chunk::{self, Verified};
use layerfs::store::Store;
use tokio::task::spawn_blocking;

use crate::access::Access;
use crate::error::{Error, Result};
use crate::link::{Link, Outbox};
use crate::peers::Visible;
use crate::send::joined;
use crate::wire::{ChunksWriter, Message};

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

/// Sends those of `ids` that are here, whole, and within `visible`.
pub(crate) async fn answer(link: &mut Link, store: &Arc<Store>, visible: &Visible, ids: Vec<ChunkId>) -> Result<()> {
    let (store, visible, outbox) = (store.clone(), visible.clone(), link.outbox()?);
    let is_gone = joined(spawn_blocking(move || send_all(&store, &visible, &ids, &outbox)).await)?;
    if is_gone { Err(link.why_gone().await) } else { Ok(()) }
}

/// Returns whether the link is gone. Blocks.
fn send_all(store: &Arc<Store>, visible: &Visible, ids: &[ChunkId], outbox: &Outbox) -> Result<bool> {
    let session = store.session("get");
    let there = Access::new(store, visible)?.has(&session, ids)?;
    let mut frame = ChunksWriter::default();
    let mut count = 0;
    for (id, _) in ids.iter().zip(there).filter(|(_, there)| *there) {
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
