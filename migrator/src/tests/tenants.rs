//! Tenants kept apart: whatever a peer with restricted rights says, it hears of what it may not see as of what isn't there.

use layerfs::chunk::Class;
use layerfs::{ChunkId, LayerId};

use super::pair::*;
use crate::Error;
use crate::bundle::Table;
use crate::group::Token;
use crate::link::{Link, Patience};
use crate::listener::serve_peer;
use crate::peers::{Rights, Visible};
use crate::wire::{Bundle, Message, Offer, OfferedLayer};

/// A host with `secret`, which its peer "here" may not see, and a chunk of that.
fn host_with_secret() -> (Host, LayerId, ChunkId) {
    let host = Host::new();
    let secret = add_layer(host.store(), "secret", &tree(5, 30_000));
    add_layer(host.store(), "mine/a", &[("a".to_owned(), noise(3, 2000))].into());
    let visible = Visible::Matching(vec!["mine/*".to_owned()]);
    host.know("here", Host::new().node.public_key(), None, Rights { visible, ..Rights::default() });
    let mut ids = Vec::new();
    let mut add = |candidate: crate::plan::Candidate| {
        ids.push(candidate.id);
        Ok(())
    };
    crate::plan::candidates(host.store().as_ref(), &[secret], &[], &mut add).unwrap();
    (host, secret, ids.pop().unwrap())
}

/// A link to `host` as its peer "here".
pub(super) fn call(host: &Host) -> Link {
    call_as(host, "here")
}

fn call_as(host: &Host, who: &str) -> Link {
    let (caller, listener) = tokio::io::duplex(1 << 20);
    let (node, peer) = (host.node.clone(), host.node.peers().get(who).unwrap());
    tokio::spawn(async move {
        let mut link = Link::start(listener, "here", Patience::default());
        match serve_peer(&node, &peer, &mut link).await {
            Ok(_) => link.close().await,
            Err(error) => link.close_with(&error).await,
        }
    });
    Link::start(caller, "there", Patience::default())
}

/// What `host` answers to `messages`: its messages up to its first error, which is the last, or `count` of them.
pub(super) async fn answers(host: &Host, messages: Vec<Message>, count: usize) -> Vec<String> {
    let mut link = call(host);
    for message in messages {
        link.send(message).await.unwrap();
    }
    let mut heard = Vec::new();
    while heard.len() < count {
        match link.recv().await {
            Ok(message) => heard.push(format!("{message:?}")),
            Err(Error::Remote { class, message, .. }) => {
                heard.push(format!("{class:?}: {message}"));
                break;
            }
            Err(other) => panic!("{other}"),
        }
    }
    heard
}

fn offer(layer: LayerId, called: &str, hint: LayerId, dry_run: bool) -> Message {
    let layers = vec![OfferedLayer { id: layer, file_bytes: 1 }];
    Message::Offer(Offer { layers, names: vec![(name(called), 0)], hints: vec![hint], dry_run, ..Offer::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_name_is_as_one_that_does_not_exist() {
    let (host, secret, _) = host_with_secret();
    let without = |heard: Vec<String>, called: &str| heard.join("\n").replace(called, "NAME");
    for dry_run in [false, true] {
        let fetch = |called: &str| vec![Message::Fetch { names: vec![name(called)], dry_run }];
        let (hidden, absent) = (answers(&host, fetch("secret"), 1).await, answers(&host, fetch("absent"), 1).await);
        assert!(hidden[0].starts_with("NotFound"), "{hidden:?}");
        assert_eq!(without(hidden, "secret"), without(absent, "absent"));
        let offer = |called: &str| vec![offer(secret, called, secret, dry_run)];
        let (hidden, absent) = (answers(&host, offer("secret"), 1).await, answers(&host, offer("absent"), 1).await);
        assert!(hidden[0].starts_with("Denied"), "{hidden:?}");
        assert_eq!(without(hidden, "secret"), without(absent, "absent"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_layers_and_chunks_are_as_such_that_do_not_exist() {
    let (host, secret, chunk) = host_with_secret();
    let absent = (LayerId(ChunkId([7; 32])), ChunkId([8; 32]));
    let mut heard = Vec::new();
    for (layer, chunk) in [(secret, chunk), absent] {
        for dry_run in [false, true] {
            let ask = Message::Ask { seq: 0, ids: vec![chunk, layer.0] };
            heard.push(answers(&host, vec![offer(layer, "mine/x", layer, dry_run), ask], 2).await.join("\n"));
        }
        heard.push(answers(&host, vec![Message::Get { ids: vec![chunk, layer.0] }], 1).await.join("\n"));
        let base = crate::wire::base_name(&chunk);
        let table = Table { chunks: vec![(Class::Data, 1)], holes: Vec::new() };
        let (frame, plain_bytes) = crate::bundle::pack(b"", &table, b"x", 3).unwrap();
        let bundle =
            Bundle { bases: vec![base], pages: Vec::new(), first: None, chunks: 1, plain_bytes, frame: frame.into() };
        let bundle = Message::Bundle(bundle);
        let refused = answers(&host, vec![offer(layer, "mine/x", layer, false), bundle], 2).await.join("\n");
        let hex: String = base.iter().map(|byte| format!("{byte:02x}")).collect();
        heard.push(refused.replace(&hex, "BASE"));
    }
    let (hidden, unknown) = heard.split_at(heard.len() / 2);
    assert_eq!(hidden, unknown);
    assert!(hidden[0].contains("wanted: [true, true]") && hidden[0].contains("held: [false]"), "{hidden:?}");
    assert!(hidden[2].contains("End { chunks: 0 }"), "{hidden:?}");
    assert!(hidden[3].contains("the base BASE of a bundle is not to be had"), "{hidden:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn looks_and_traces_tell_nothing_of_hidden_layers() {
    let (host, secret, chunk) = host_with_secret();
    let absent = LayerId(ChunkId([7; 32]));
    host.store().extend_trace(secret, &[chunk]).unwrap();
    let mut heard = Vec::new();
    for (layer, called) in [(secret, "secret"), (absent, "absent")] {
        let look = Message::Look { names: vec![name(called)], layers: Vec::new() };
        heard.push(answers(&host, vec![look], 1).await.join("\n").replace(called, "NAME"));
        let look = Message::Look { names: Vec::new(), layers: vec![layer] };
        let of_layer = answers(&host, vec![look], 1).await.join("\n");
        heard.push(of_layer.replace(&layer.0.to_string(), "ID").replace(&layer.0.short(), "ID"));
        heard.push(answers(&host, vec![Message::Trace { layers: vec![layer] }], 1).await.join("\n"));
    }
    let (hidden, unknown) = heard.split_at(3);
    assert_eq!(hidden, unknown);
    assert!(hidden[0].starts_with("NotFound") && hidden[1].starts_with("NotFound"), "{hidden:?}");
    assert!(hidden[2].contains("End { chunks: 0 }"), "{hidden:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_names_reachable_chunks_only_and_none_is_planted() {
    let (host, secret, hidden) = host_with_secret();
    let mine = host.store().name(&name("mine/a")).unwrap().unwrap().layer;
    let own = ChunkId::of(&noise(3, 2000));
    host.store().extend_trace(mine, &[hidden, own]).unwrap();
    let heard = answers(&host, vec![Message::Trace { layers: vec![mine] }], 2).await.join("\n");
    assert!(heard.contains(&format!("{own:?}")) && !heard.contains(&format!("{hidden:?}")), "{heard}");
    assert!(heard.contains("End { chunks: 1 }"), "{heard}");
    // Nothing that it says of a layer which isn't partial here, and its own to complete, is kept.
    for layer in [mine, secret, LayerId(ChunkId([7; 32]))] {
        let before = host.store().trace(layer).unwrap();
        let traced = Message::Traced { layer, ids: vec![ChunkId([9; 32])] };
        let heard = answers(&host, vec![traced, Message::Get { ids: vec![own] }], 2).await;
        assert!(heard[1].contains("End { chunks: 1 }"), "{heard:?}");
        assert_eq!(host.store().trace(layer).unwrap(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn anothers_transfer_cannot_be_joined_nor_ended() {
    let (host, ..) = host_with_secret();
    host.know("other", Host::new().node.public_key(), None, Rights::default());
    let (token, unknown) = (Token([1; 16]), Token([2; 16]));
    let mut open = call_as(&host, "other");
    open.send(Message::Group { token }).await.unwrap();
    open.send(offer(LayerId(ChunkId([5; 32])), "theirs", LayerId(ChunkId([6; 32])), false)).await.unwrap();
    assert!(matches!(open.recv().await.unwrap(), Message::Need { .. }));
    let join = |token| answers(&host, vec![Message::Join { token }], 1);
    let (theirs, nobodys) = tokio::join!(join(token), join(unknown));
    assert_eq!(theirs, nobodys);
    assert!(theirs[0].starts_with("NotFound"), "{theirs:?}");
    // To begin a transfer anew ends the one before it: not with another's token.
    let fetch = Message::Fetch { names: vec![name("mine/a")], dry_run: false };
    let refused = answers(&host, vec![Message::Group { token }, fetch], 1).await;
    assert_eq!(refused, theirs);
    open.send(Message::Ask { seq: 0, ids: vec![ChunkId([4; 32])] }).await.unwrap();
    assert!(matches!(open.recv().await.unwrap(), Message::Want { .. }));
}
