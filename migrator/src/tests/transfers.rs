//! What a transfer brings over, and what it costs.

use layerfs::{ChunkId, LayerName};

use super::pair::*;
use crate::peers::{Rights, Visible};

#[tokio::test(flavor = "multi_thread")]
async fn a_push_brings_everything_and_the_same_again_brings_nothing() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.here.store(), "base", &tree(3000, 5 << 20));
    let first = pair.push("base").await.unwrap();
    assert!(pair.there.has_whole("base", layer));
    assert_eq!((first.layers_sent, first.names_changed), (1, 1));
    assert!(first.bytes_sent > 5 << 20, "{first:?}");

    let again = pair.push("base").await.unwrap();
    assert_eq!((again.layers_sent, again.names_changed, again.chunks_sent), (0, 0, 0));
    assert!(again.bytes_sent + again.bytes_received < 4096, "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_change_costs_little() {
    let pair = Pair::new().await;
    let mut files = tree(50_000, 100 << 20);
    add_layer(pair.here.store(), "one", &files);
    pair.push("one").await.unwrap();
    let large = files.get_mut("large").unwrap();
    large[50 << 20] ^= 1;
    let layer = add_layer(pair.here.store(), "two", &files);
    let report = pair.push("two").await.unwrap();
    assert!(pair.there.has_whole("two", layer));
    // Three chunks of data at the most, and the difference of the manifests.
    assert!(report.bytes_sent < 3 * (256 << 10) + (64 << 10), "{report:?}");
    assert!(report.bytes_sent - report.chunk_stored_bytes < 48 << 10, "{report:?}");
    assert!(report.bytes_received < 8 << 10, "{report:?}");
    assert!(report.chunks_sent < 20, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_over_a_held_one_costs_only_itself() {
    let pair = Pair::new().await;
    let base = add_layer(pair.here.store(), "base", &tree(20_000, 30 << 20));
    pair.push("base").await.unwrap();
    // The large file again, changed in the middle, under the number that it has in the base, as a seal writes it.
    let mut large = noise(u64::MAX, 30 << 20);
    large[15 << 20] ^= 1;
    let app = add_layer_over(pair.here.store(), "app", &[("large".to_owned(), large)].into(), base, 20_002);
    let report = pair.push("app").await.unwrap();
    assert!(pair.there.has_whole("app", app));
    assert_eq!((report.layers, report.layers_sent), (2, 1));
    assert!(report.bytes_sent < 3 * (256 << 10) + (32 << 10), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_a_push_the_other_way() {
    let pair = Pair::new().await;
    let base = add_layer(pair.there.store(), "base", &tree(500, 1 << 20));
    let app = add_layer_over(pair.there.store(), "app", &tree(10, 1 << 18), base, 502);
    let report = pair.pull("app").await.unwrap();
    assert!(pair.here.has_whole("app", app));
    assert_eq!((report.layers_sent, report.names_changed), (2, 1));
    assert!(pair.here.store().name(&name("base")).unwrap().is_none());
    let again = pair.pull("app").await.unwrap();
    assert!(again.bytes_sent + again.bytes_received < 4096, "{again:?}");
    let base_again = pair.pull("base").await.unwrap();
    assert_eq!((base_again.layers_sent, base_again.names_changed), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_names_come_at_once() {
    let pair = Pair::new().await;
    let one = add_layer(pair.here.store(), "one", &tree(100, 1 << 20));
    let two = add_layer(pair.here.store(), "two", &tree(200, 2 << 20));
    pair.here.store().set_name(&name("one-too"), one, layerfs::store::Expect::Absent).unwrap();
    let names: Vec<LayerName> = ["one", "two", "one-too", "one"].into_iter().map(name).collect();
    let report = pair.here.node.push(&names, "there", Default::default(), silent()).await.unwrap();
    assert_eq!((report.layers, report.names_changed), (2, 3));
    assert!(
        pair.there.has_whole("one", one) && pair.there.has_whole("one-too", one) && pair.there.has_whole("two", two)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_the_place_of_something_held_goes_as_its_difference() {
    let rights = Rights { visible: Visible::Matching(vec!["pub/*".to_owned()]), ..Rights::default() };
    for pair in [Pair::new().await, Pair::with_rights(rights).await] {
        let mut files = tree(2000, 20 << 20);
        add_layer(pair.here.store(), "pub/one", &files);
        pair.push("pub/one").await.unwrap();
        // Bytes inserted, replaced and removed: about eighty chunks of noise change, by less than 30 KB.
        let large = files.get_mut("large").unwrap();
        for n in 0..100usize {
            let at = n * 200_000;
            large.splice(at..at + n % 7, noise(n as u64, 250));
        }
        let layer = add_layer(pair.here.store(), "pub/two", &files);
        let report = pair.push("pub/two").await.unwrap();
        assert!(pair.there.has_whole("pub/two", layer));
        assert!(report.chunk_plain_bytes > 4 << 20, "{report:?}");
        assert!(report.bytes_sent < 60_000, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_a_real_one_sends_and_changes_nothing() {
    let pair = Pair::new().await;
    let layer = add_layer(pair.here.store(), "base", &tree(300, 3 << 20));
    let chunks_there = pair.there.store().stat(&layerfs::monitor::Silent).unwrap().chunks;
    let options = crate::PushOptions { dry_run: true, ..Default::default() };
    let dry = pair.here.node.push(&[name("base")], "there", options, silent()).await.unwrap();
    assert!(dry.dry_run && dry.names_changed == 1 && dry.layers_sent == 1);
    assert!(dry.bytes_sent < 64 << 10, "{dry:?}");
    assert!(pair.there.store().name(&name("base")).unwrap().is_none());
    assert_eq!(pair.there.store().stat(&layerfs::monitor::Silent).unwrap().chunks, chunks_there);
    let real = pair.push("base").await.unwrap();
    assert!(pair.there.has_whole("base", layer));
    assert_eq!(dry.chunks_sent, real.chunks_sent);
    let ratio = real.bytes_sent as f64 / (dry.would_send_bytes + dry.bytes_sent) as f64;
    assert!((0.9..=1.1).contains(&ratio), "{dry:?} {real:?}");

    let layer = add_layer(pair.there.store(), "other", &tree(200, 1 << 20));
    let options = crate::PullOptions { dry_run: true, ..Default::default() };
    let dry = pair.here.node.pull(&[name("other")], "there", options, silent()).await.unwrap();
    assert!(pair.here.store().name(&name("other")).unwrap().is_none());
    let real = pair.pull("other").await.unwrap();
    assert!(pair.here.has_whole("other", layer));
    let ratio = real.bytes_received as f64 / (dry.would_send_bytes + dry.bytes_received) as f64;
    assert!((0.85..=1.15).contains(&ratio), "{dry:?} {real:?}");
}

/// Every chunk of `tree`'s layer in `host`.
fn chunks_of(host: &Host, layer: layerfs::LayerId) -> Vec<ChunkId> {
    let mut ids = Vec::new();
    let mut add = |candidate: crate::plan::Candidate| {
        ids.push(candidate.id);
        Ok(())
    };
    crate::plan::candidates(host.store().as_ref(), &[layer], &[], &mut add).unwrap();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn single_chunks_are_fetched_as_far_as_the_key_reaches() {
    let rights = Rights { visible: Visible::Matching(vec!["pub/*".to_owned()]), ..Rights::default() };
    let pair = Pair::with_rights(rights).await;
    let layer = add_layer(pair.there.store(), "pub/x", &tree(600, 1 << 20));
    let secret = add_layer(pair.there.store(), "secret", &[("s".to_owned(), noise(8, 5000))].into());
    let (ours, theirs) = (chunks_of(&pair.there, layer), chunks_of(&pair.there, secret));
    let asked: Vec<ChunkId> = ours.iter().chain(&theirs).copied().chain([ChunkId([1; 32])]).collect();
    let mut got = Vec::new();
    let mut sink = |chunk: layerfs::chunk::Verified| {
        got.push(chunk.stored().id);
        Ok(())
    };
    let count = pair.here.node.fetch_chunks(&asked, "there", &mut sink).await.unwrap();
    assert_eq!((count, &got), (ours.len() as u64, &ours));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_base_comes_again_by_itself() {
    for pulls in [false, true] {
        let pair = Pair::new().await;
        let (from, to) = if pulls { (&pair.there, &pair.here) } else { (&pair.here, &pair.there) };
        let mut files = tree(30, 2 << 20);
        add_layer(from.store(), "one", &files);
        if pulls {
            pair.pull("one").await.unwrap()
        } else {
            pair.push("one").await.unwrap()
        };
        let large = files.get_mut("large").unwrap();
        to.damage(&large[100_000..100_100]);
        large.iter_mut().step_by(10_000).for_each(|byte| *byte ^= 1);
        let two = add_layer(from.store(), "two", &files);
        let report = if pulls { pair.pull("two").await } else { pair.push("two").await }.unwrap();
        assert_eq!(report.retries, 1, "{report:?}");
        assert!(to.has_whole("two", two));
        // The next one builds upon what is held again.
        files.get_mut("large").unwrap()[5] ^= 1;
        let three = add_layer(from.store(), "three", &files);
        let report = if pulls { pair.pull("three").await } else { pair.push("three").await }.unwrap();
        assert!(report.retries == 0 && report.chunk_stored_bytes < 20_000, "{report:?}");
        assert!(to.has_whole("three", three));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_holds_up_nothing_but_its_own_stack() {
    for visible in [Visible::All, Visible::Matching(vec!["*".to_owned()])] {
        let (here, there) = (Host::new(), Host::new());
        let files = tree(30, 1 << 20);
        let (base, top) = (add_layer(here.store(), "base", &files), add_layer(there.store(), "base", &files));
        assert_eq!(base, top);
        let over = |host: &Host| add_layer_over(host.store(), "a", &tree(3, 30_000), base, 5000);
        let a = over(&here);
        assert_eq!(a, over(&there));
        let b = add_layer(here.store(), "b", &tree(7, 100_000));
        let c = add_layer(there.store(), "c", &tree(9, 200_000));
        here.damage_chunk(&a.0);
        let here = here.restarted();
        assert!(layerfs::manifest::Manifest::load(here.store().as_ref(), a).is_err());
        let listener = there.node.listen(([127, 0, 0, 1], 0).into()).await.unwrap();
        let rights = Rights { visible, ..Rights::default() };
        here.know("there", there.node.public_key(), Some(listener.address().to_string()), rights.clone());
        there.know("here", here.node.public_key(), None, rights);
        let pair = Pair { here, there, listener };
        pair.push("b").await.unwrap();
        assert!(pair.there.has_whole("b", b));
        pair.pull("c").await.unwrap();
        assert!(pair.here.has_whole("c", c));
        pair.pull("a").await.unwrap();
        assert!(pair.here.has_whole("a", a));
    }
}
