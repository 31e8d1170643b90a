//! Limits, pauses, cancelling: from either side.

use std::sync::Arc;

use layerfs::error::ErrorClass;

use super::pair::*;
use crate::governor::Rate;
use crate::node::Manner;
use crate::transfers::{Origin, Role, State, TransferInfo};
use crate::{Error, Node, PullOptions, PushOptions};

/// Waits for a listed transfer of `node` that `fits`.
async fn listed(node: &Node, fits: impl Fn(&TransferInfo) -> bool) -> TransferInfo {
    loop {
        if let Some(found) = node.transfers().list().into_iter().find(&fits) {
            return found;
        }
        tokio::task::yield_now().await;
    }
}

/// A pair with `pushed` here, a push of it at the lowest rate, and that push's outcome to come.
async fn slow_push() -> (Arc<Pair>, tokio::task::JoinHandle<crate::Result<crate::TransferReport>>) {
    let pair = Arc::new(Pair::new().await);
    add_layer(pair.here.store(), "pushed", &tree(10, 4 << 20));
    let (pushing, manner) = (pair.clone(), Manner { limit: Some(Rate::new(1)), ..Manner::default() });
    let options = PushOptions { manner, ..PushOptions::default() };
    let push = tokio::spawn(async move { pushing.here.node.push(&[name("pushed")], "there", options, silent()).await });
    listed(&pair.here.node, |info| info.phase == "sending").await;
    (pair, push)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_list_a_transfer_and_its_limit_can_be_lifted() {
    let (pair, push) = slow_push().await;
    let here = listed(&pair.here.node, |info| info.bytes_sent > 0).await;
    assert_eq!((here.role, here.origin, here.state), (Role::Sending, Origin::Here, State::Running));
    assert_eq!((here.peer.as_str(), &here.names[..]), ("there", &["pushed".to_owned()][..]));
    let there = listed(&pair.there.node, |info| info.phase == "receiving").await;
    assert_eq!((there.role, there.origin, there.peer.as_str()), (Role::Receiving, Origin::Peer, "here"));
    assert_eq!((&there.names, there.total_bytes), (&here.names, here.total_bytes));
    let transfer = pair.here.node.transfers().get(here.id).unwrap();
    transfer.gate().change(|controls| controls.limit = None);
    push.await.unwrap().unwrap();
    for node in [&pair.here.node, &pair.there.node] {
        let info = listed(node, |info| info.state == State::Done).await;
        assert_eq!((info.connections, info.seconds_left, info.error), (0, None, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiving_side_pauses_and_lets_go_on() {
    let (pair, push) = slow_push().await;
    let there = listed(&pair.there.node, |info| info.phase == "receiving").await;
    let receiving = pair.there.node.transfers().get(there.id).unwrap();
    receiving.gate().change(|controls| controls.paused = true);
    // The sender has heard it.
    let here = listed(&pair.here.node, |info| info.state == State::Paused).await;
    pair.here.node.transfers().get(here.id).unwrap().gate().change(|controls| controls.limit = None);
    receiving.gate().change(|controls| controls.paused = false);
    push.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_cancels_and_both_are_told() {
    for cancel_here in [true, false] {
        let (pair, push) = slow_push().await;
        listed(&pair.there.node, |info| info.phase == "receiving").await;
        let node = if cancel_here { &pair.here.node } else { &pair.there.node };
        let id = node.transfers().list()[0].id;
        node.transfers().get(id).unwrap().cancel();
        let error = push.await.unwrap().unwrap_err();
        let is_remote = matches!(error, Error::Remote { class: ErrorClass::Busy, .. });
        assert_eq!(is_remote, !cancel_here, "{error}");
        listed(node, |info| info.state == State::Cancelled).await;
        let other = if cancel_here { &pair.there.node } else { &pair.here.node };
        let info = listed(other, |info| info.state != State::Running).await;
        assert_eq!(info.state, State::Failed, "{info:?}");
        assert!(pair.there.store().name(&name("pushed")).unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_tells_its_limit_to_the_sender_and_a_common_limit_holds_too() {
    let pair = Arc::new(Pair::new().await);
    let layer = add_layer(pair.there.store(), "base", &tree(10, 1 << 20));
    let (pulling, manner) = (pair.clone(), Manner { limit: Some(Rate::new(1)), ..Manner::default() });
    let options = PullOptions { manner, ..PullOptions::default() };
    let pull = tokio::spawn(async move { pulling.here.node.pull(&[name("base")], "there", options, silent()).await });
    let there = listed(&pair.there.node, |info| info.phase == "sending").await;
    assert_eq!((there.role, there.origin), (Role::Sending, Origin::Peer));
    let here = listed(&pair.here.node, |info| info.phase == "receiving").await;
    pair.here.node.transfers().governor().set_limit(Some(Rate::new(1)));
    pair.here.node.transfers().get(here.id).unwrap().gate().change(|controls| controls.limit = None);
    pair.here.node.transfers().governor().set_limit(None);
    pull.await.unwrap().unwrap();
    assert!(pair.here.has_whole("base", layer));
}
