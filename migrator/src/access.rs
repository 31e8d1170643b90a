//! What a peer's key may reach: which layers count as held, and for which chunks "have" is answered.
//!
//! A peer that may see all names may learn of all chunks. For any other, a chunk is there only if a visible name
//! refers to it or the peer itself has sent it in this transfer. So a peer that merely knows a chunk's id neither
//! learns whether another tenant has it, nor gets at it by naming it in a layer of its own: the same answer decides
//! whether a received layer is complete. A partial layer is never held, and nothing is reachable by it: its data isn't
//! here, and what of it happens to be here may be somebody else's.

use std::collections::HashSet;
use std::sync::Arc;

use layerfs::chunk::ChunkRead;
use layerfs::manifest::Manifest;
use layerfs::store::{Session, Store};
use layerfs::{ChunkId, LayerId, Result};
use parking_lot::Mutex;

use crate::peers::Visible;
use crate::plan;
use crate::wanted::{Polled, Wanted};

/// Chunks of which a restricted peer is told at most; more are sent again, at worst.
const MAX_REACHABLE: usize = 4_000_000;

/// Half an id: enough to tell chunks apart, as nobody makes 2^64 of them.
pub(crate) type HalfId = [u8; 16];

fn half(id: &ChunkId) -> HalfId {
    let mut half = [0; 16];
    half.copy_from_slice(&id.0[..16]);
    half
}

/// What one peer may reach in one store, as of when it was made.
#[derive(Debug)]
pub struct Access {
    held: HashSet<LayerId>,
    /// `None`: everything.
    reachable: Option<HashSet<HalfId>>,
    /// What a restricted peer has sent itself.
    granted: Mutex<HashSet<HalfId>>,
}

impl Access {
    /// What a peer that sees `visible` may reach in `store`. Reads what a restricted peer may see, while that is `wanted`;
    /// blocks.
    ///
    /// # Errors
    /// Those of the index; [`layerfs::Error::Cancelled`] if it isn't wanted any more.
    pub fn new(store: &Arc<Store>, visible: &Visible, wanted: &Wanted) -> Result<Access> {
        Access::within(store, visible, wanted, MAX_REACHABLE)
    }

    /// [`Access::new`], where a restricted peer is told of `most` chunks at most.
    fn within(store: &Arc<Store>, visible: &Visible, wanted: &Wanted, most: usize) -> Result<Access> {
        let chunks = Polled::new(store.as_ref(), wanted);
        let mut layers = Vec::new();
        let roots = match visible {
            Visible::All => store.roots()?,
            Visible::Matching(_) => visible_layers(store, visible)?,
        };
        let mut held = HashSet::new();
        for root in roots {
            add_stack(&chunks, root, &mut held, &mut layers)?;
        }
        if store.has_partials() {
            held.retain(|layer| store.partial(*layer).is_none());
            layers.retain(|layer| held.contains(layer));
        }
        let reachable = match visible {
            Visible::All => None,
            Visible::Matching(_) => Some(reachable(&chunks, &layers, &mut held, most)?),
        };
        Ok(Access { held, reachable, granted: Mutex::default() })
    }

    /// Whether `layer` is here, whole, and may be known of.
    pub fn holds(&self, layer: &LayerId) -> bool {
        self.held.contains(layer)
    }

    /// Whether the peer may learn of every chunk.
    pub(crate) fn is_unrestricted(&self) -> bool {
        self.reachable.is_none()
    }

    /// For each of `ids`, whether the peer may take it as being here. Those are not collected while `session` lives.
    ///
    /// # Errors
    /// Those of the index.
    pub fn has(&self, session: &Session, ids: &[ChunkId]) -> Result<Vec<bool>> {
        let Some(reachable) = &self.reachable else { return session.has_many(ids) };
        let allowed: Vec<bool> = {
            let granted = self.granted.lock();
            let is_allowed = |half: HalfId| reachable.contains(&half) || granted.contains(&half);
            ids.iter().map(|id| is_allowed(half(id))).collect()
        };
        let asked: Vec<ChunkId> =
            ids.iter().zip(&allowed).filter(|(_, allowed)| **allowed).map(|(id, _)| *id).collect();
        let mut found = session.has_many(&asked)?.into_iter();
        Ok(allowed.into_iter().map(|allowed| allowed && found.next().unwrap_or(false)).collect())
    }

    /// The peer has sent these.
    pub fn grant(&self, ids: impl Iterator<Item = ChunkId>) {
        if self.reachable.is_some() {
            self.granted.lock().extend(ids.map(|id| half(&id)));
        }
    }

    /// The peer had sent these in an earlier attempt.
    pub(crate) fn grant_again(&self, ids: HashSet<HalfId>) {
        if self.reachable.is_some() {
            self.granted.lock().extend(ids);
        }
    }

    /// What the peer has sent, if that matters.
    pub(crate) fn take_granted(&self) -> HashSet<HalfId> {
        std::mem::take(&mut self.granted.lock())
    }
}

/// The layers that visible names refer to, the latest first.
///
/// # Errors
/// Those of the index.
pub fn visible_layers(store: &Store, visible: &Visible) -> Result<Vec<LayerId>> {
    let mut names = store.names()?;
    names.retain(|(name, _)| visible.allows(name));
    names.sort_by_key(|(_, record)| std::cmp::Reverse(record.created));
    Ok(names.into_iter().map(|(_, record)| record.layer).collect())
}

/// Adds `top` and all below it to `held`, and the new ones to `order`, parents before children. A stack of which a
/// manifest can't be read isn't held: it is to come again, and nobody else has to wait for that.
///
/// # Errors
/// [`layerfs::Error::Cancelled`].
fn add_stack(
    chunks: &dyn ChunkRead,
    top: LayerId,
    held: &mut HashSet<LayerId>,
    order: &mut Vec<LayerId>,
) -> Result<()> {
    let mut stack = Vec::new();
    let mut next = Some(top);
    while let Some(layer) = next.filter(|layer| !held.contains(layer)) {
        stack.push(layer);
        next = match Manifest::load(chunks, layer) {
            Ok(manifest) => manifest.parent,
            Err(layerfs::Error::Cancelled) => return Err(layerfs::Error::Cancelled),
            Err(error) => {
                tracing::warn!(%layer, stack = %top, %error, "a stack can't be read and is taken for one that isn't here");
                return Ok(());
            }
        };
    }
    held.extend(&stack);
    order.extend(stack.iter().rev());
    Ok(())
}

/// What `layers`, parents before children, refer to, up to `most` chunks: layers beyond, and those that can't be read,
/// aren't `held`, as what they refer to would then be lacking.
///
/// # Errors
/// [`layerfs::Error::Cancelled`].
fn reachable(
    chunks: &dyn ChunkRead,
    layers: &[LayerId],
    held: &mut HashSet<LayerId>,
    most: usize,
) -> Result<HashSet<HalfId>> {
    let mut ids = HashSet::new();
    for (at, layer) in layers.iter().enumerate() {
        let mut is_full = false;
        let walked = plan::candidates(chunks, &[*layer], &[], &mut |candidate| {
            let id = half(&candidate.id);
            is_full = ids.len() >= most && !ids.contains(&id);
            if is_full {
                return Err(layerfs::Error::Cancelled);
            }
            ids.insert(id);
            Ok(())
        });
        match walked {
            Ok(()) => {}
            Err(_) if is_full => {
                let left = layers.len() - at;
                tracing::warn!(layers = left, "a restricted peer sees more than {most} chunks; the rest comes again");
                for beyond in &layers[at..] {
                    held.remove(beyond);
                }
                break;
            }
            Err(layerfs::Error::Cancelled) => return Err(layerfs::Error::Cancelled),
            Err(error) => {
                tracing::warn!(%layer, %error, "a layer can't be read and is taken for one that isn't here");
                held.remove(layer);
            }
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::pair::{Host, add_layer, add_layer_over, noise};

    #[test]
    fn what_a_restricted_peer_is_not_told_of_is_not_held() {
        let host = Host::new();
        let files = |seed: u64| (0..20).map(|n| (format!("f{n}"), noise(seed * 100 + n, 2000))).collect();
        let base = add_layer(host.store(), "mine/a", &files(1));
        let over = add_layer_over(host.store(), "mine/b", &files(2), base, 1000);
        let top = add_layer_over(host.store(), "mine/c", &files(3), over, 2000);
        let visible = Visible::Matching(vec!["mine/*".to_owned()]);
        let all = Access::new(host.store(), &visible, &Wanted::default()).unwrap();
        assert!([base, over, top].iter().all(|layer| all.holds(layer)));
        let count = all.reachable.as_ref().unwrap().len();
        let session = host.store().session("test");
        let mut held_before = 0;
        for most in 0..=count {
            let access = Access::within(host.store(), &visible, &Wanted::default(), most).unwrap();
            assert!(access.reachable.as_ref().unwrap().len() <= most);
            let held: Vec<LayerId> = [base, over, top].into_iter().filter(|layer| access.holds(layer)).collect();
            // Of what is held everything is there, as the check of a layer upon it will ask.
            for layer in &held {
                crate::check::check_layer(host.store().as_ref(), *layer, &mut |ids| {
                    Ok(access.has(&session, ids).unwrap())
                })
                .unwrap();
            }
            assert!(held.len() >= held_before && held == [base, over, top][..held.len()], "{most}");
            held_before = held.len();
        }
        assert_eq!(held_before, 3);
    }
}
