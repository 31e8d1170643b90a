//! Bundles whose structure leaves ids out: in any order, and what becomes of those that cannot be filled.

use layerfs::chunk::{ChunkRead, MemoryChunks};

use super::pair::*;
use super::tenants::{answers, call};
use crate::bundle::{self, Table};
use crate::numbers::Numbers;
use crate::peers::{Rights, Visible};
use crate::plan::Candidate;
use crate::wire::{Bundle, Message, Offer, OfferedLayer};

fn host(visible: Visible) -> Host {
    let host = Host::new();
    host.know("here", Host::new().node.public_key(), None, Rights { visible, ..Rights::default() });
    host
}

/// An offer of a layer, and each of its chunks as a bundle of its own that leaves out what can be: what names others
/// comes before these.
fn parents_first() -> (Message, Vec<Bundle>, layerfs::LayerId) {
    let chunks = MemoryChunks::default();
    let layer = write_layer(&chunks, &tree(20, 1 << 20), None, 2);
    let mut all: Vec<Candidate> = Vec::new();
    crate::plan::candidates(&chunks, &[layer], &[], &mut |candidate| {
        all.push(candidate);
        Ok(())
    })
    .unwrap();
    let mut numbers = Numbers::default();
    numbers.assign(&all.iter().map(|one| (one.id, None)).collect::<Vec<_>>()).unwrap();
    let bundles = all.iter().enumerate().map(|(number, candidate)| {
        let mut plain = chunks.get(&candidate.id).unwrap().to_vec();
        let holes = numbers.punch(&mut plain, 1000);
        let table = Table { chunks: vec![(candidate.class, plain.len() as u32)], holes };
        let (frame, plain_bytes) = bundle::pack(b"", &table, &plain, 3).unwrap();
        Bundle {
            bases: Vec::new(),
            pages: Vec::new(),
            first: Some(number as u32),
            chunks: 1,
            plain_bytes,
            frame: frame.into(),
        }
    });
    let layers = vec![OfferedLayer { id: layer, file_bytes: 1 }];
    let offer = Offer { layers, names: vec![(name("mine/x"), 0)], ..Offer::default() };
    (Message::Offer(offer), bundles.collect(), layer)
}

#[tokio::test(flavor = "multi_thread")]
async fn bundles_wait_for_what_they_name() {
    for visible in [Visible::All, Visible::Matching(vec!["mine/*".to_owned()])] {
        let host = host(visible);
        let (offer, bundles, layer) = parents_first();
        assert!(bundles.len() > 20);
        let count = bundles.len() as u64;
        let messages = bundles.into_iter().map(Message::Bundle).chain([Message::End { chunks: count }]);
        let heard = answers(&host, [offer].into_iter().chain(messages).collect(), 2).await;
        assert!(heard[1].starts_with("Done"), "{heard:?}");
        assert!(host.has_whole("mine/x", layer));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_filled_is_refused() {
    let (offer, bundles, _) = parents_first();
    let manifest = Message::Bundle(bundles[0].clone());
    let end = Message::End { chunks: 1 };
    let heard = answers(&host(Visible::All), vec![offer.clone(), manifest.clone(), end], 2).await;
    assert!(heard[1].contains("a bundle names chunks that did not come"), "{heard:?}");
    let many = [offer].into_iter().chain(std::iter::repeat_n(manifest, 17)).collect();
    let heard = answers(&host(Visible::All), many, 2).await;
    assert!(heard[1].contains("more than 16 bundles that wait"), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_ends_leaves_no_bundle_waiting() {
    let host = host(Visible::All);
    let (offer, bundles, layer) = parents_first();
    let mut link = call(&host);
    link.send(offer.clone()).await.unwrap();
    link.send(Message::Bundle(bundles[0].clone())).await.unwrap();
    drop(link);
    // The next attempt numbers its chunks anew.
    let count = bundles.len() as u64;
    let messages = bundles.into_iter().map(Message::Bundle).chain([Message::End { chunks: count }]);
    let heard = answers(&host, [offer].into_iter().chain(messages).collect(), 2).await;
    assert!(heard[1].starts_with("Done"), "{heard:?}");
    assert!(host.has_whole("mine/x", layer));
}
