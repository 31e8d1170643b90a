//! What is refused, and what the user is told.

use std::process::Command;
use std::sync::Arc;

use layerfs::chunk::ChunkRead;
use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::store::{Store, StoreOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::pair::*;
use crate::link::{Link, Patience};
use crate::peers::{Peer, PeerName, Rights, Visible};
use crate::progress::Tally;
use crate::receive::{self, Terms};
use crate::wire::{self, Hello, Message, Offer, OfferedLayer};
use crate::{Error, Node, NodeOptions, PushOptions};

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_told_so_and_remembered() {
    let pair = Pair::new().await;
    add_layer(pair.here.store(), "x", &tree(3, 10));
    pair.there.node.peers().remove("here").unwrap();
    let error = pair.push("x").await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied, "{error}");
    assert!(error.to_string().contains(&pair.here.node.fingerprint().to_string()), "{error}");
    assert_eq!(pair.there.node.strangers()[0].key, pair.here.node.public_key());
    pair.there.know("here", pair.here.node.public_key(), None, Rights::default());
    assert!(pair.there.node.strangers().is_empty());
    pair.push("x").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_another_key_is_not_talked_to() {
    let pair = Pair::new().await;
    add_layer(pair.here.store(), "x", &tree(3, 10));
    assert_eq!(pair.here.node.probe(&pair.listens().to_string()).await.unwrap(), pair.there.node.public_key());
    pair.here.node.peers().remove("there").unwrap();
    let wrong = Host::new().node.public_key();
    pair.here.know("there", wrong, Some(pair.listens().to_string()), Rights::default());
    match pair.push("x").await.unwrap_err() {
        Error::WrongKey { expected, found, .. } => {
            assert_eq!((expected, found), (wrong.fingerprint(), pair.there.node.fingerprint()));
        }
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_a_network_error() {
    let pair = Pair::new().await;
    add_layer(pair.here.store(), "x", &tree(3, 10));
    pair.listener.close().await;
    let error = pair.here.node.push(&[name("x")], "there", Default::default(), silent()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Network, "{error}");
    let error = pair.here.node.push(&[name("x")], "nobody", Default::default(), silent()).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::NotFound, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_kept_unless_forced() {
    let pair = Pair::new().await;
    let ours = add_layer(pair.here.store(), "x", &tree(10, 10));
    let theirs = add_layer(pair.there.store(), "x", &tree(11, 10));
    for error in [pair.push("x").await.unwrap_err(), pair.pull("x").await.unwrap_err()] {
        assert_eq!(error.class(), ErrorClass::Exists, "{error}");
        assert!(error.to_string().contains("--force"), "{error}");
    }
    assert_eq!(pair.there.store().name(&name("x")).unwrap().unwrap().layer, theirs);
    assert_eq!(pair.here.store().name(&name("x")).unwrap().unwrap().layer, ours);
    pair.here
        .node
        .push(&[name("x")], "there", PushOptions { force: true, ..Default::default() }, silent())
        .await
        .unwrap();
    assert!(pair.there.has_whole("x", ours));
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_kept() {
    let rights = Rights { push: false, visible: Visible::Matching(vec!["pub/*".to_owned()]), ..Rights::default() };
    let pair = Pair::with_rights(rights).await;
    add_layer(pair.here.store(), "pub/x", &tree(3, 10));
    add_layer(pair.there.store(), "secret", &tree(4, 10));
    add_layer(pair.there.store(), "pub/y", &tree(5, 10));
    assert_eq!(pair.push("pub/x").await.unwrap_err().class(), ErrorClass::Denied);
    // Not to be seen and not there are the same.
    let (secret, nothing) = (pair.pull("secret").await.unwrap_err(), pair.pull("nothing").await.unwrap_err());
    assert_eq!((secret.class(), nothing.class()), (ErrorClass::NotFound, ErrorClass::NotFound));
    assert_eq!(secret.to_string().replace("secret", "nothing"), nothing.to_string());
    pair.pull("pub/y").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restricted_peer_learns_nothing_of_other_chunks() {
    let rights = Rights { visible: Visible::Matching(vec!["mine/*".to_owned()]), ..Rights::default() };
    let pair = Pair::with_rights(rights).await;
    let files = tree(100, 1 << 20);
    add_layer(pair.there.store(), "secret", &files);
    let layer = add_layer(pair.here.store(), "mine/a", &files);
    add_layer(pair.here.store(), "other", &files);
    assert_eq!(pair.push("other").await.unwrap_err().class(), ErrorClass::Denied);
    let first = pair.push("mine/a").await.unwrap();
    assert_eq!((first.chunks_reused, first.layers_sent), (0, 1), "{first:?}");
    assert!(first.bytes_sent > 1 << 20);
    assert!(pair.there.has_whole("mine/a", layer));
    // What it has brought itself is in its reach.
    let mut changed = files.clone();
    changed.insert("more".to_owned(), noise(77, 1000));
    add_layer(pair.here.store(), "mine/b", &changed);
    let second = pair.push("mine/b").await.unwrap();
    assert!(second.bytes_sent < 1 << 18, "{second:?}");
}

/// A sender that names chunks which it doesn't have: by their ids alone it would get at another tenant's data.
async fn offer_without_data(visible: Visible) -> (crate::Result<u16>, Host) {
    let (owner, thief) = (Host::new(), layerfs::chunk::MemoryChunks::default());
    let files = tree(5, 1 << 20);
    add_layer(owner.store(), "secret", &files);
    // The thief's layer differs (one file more), its data chunks but one are the owner's.
    let mut with_more = files;
    with_more.insert("more".to_owned(), noise(3, 600));
    let layer = write_layer(&thief, &with_more, None, 2);
    let manifest = Manifest::load(&thief, layer).unwrap();
    let mut meta = vec![layer.0, layerfs::ChunkId::of(&noise(3, 600))];
    for table in [&manifest.dentries, &manifest.inodes] {
        layerfs::closure::walk_content(&thief, table, &mut |part| {
            meta.push(part.id());
            Ok(true)
        })
        .unwrap();
    }
    // The large file's list nodes.
    let mut all = Vec::new();
    crate::plan::candidates(&thief, &[layer], &[], &mut |candidate| {
        all.push(candidate);
        Ok(())
    })
    .unwrap();
    meta.extend(all.iter().filter(|candidate| candidate.bytes == 0).map(|candidate| candidate.id));
    meta.sort();
    meta.dedup();
    let (near, far) = duplex(1 << 20);
    let sending = async {
        let mut link = Link::start(near, "owner", Patience::default());
        let layers = vec![OfferedLayer { id: layer, file_bytes: 0 }];
        let offer = Offer { layers, names: vec![(name("mine/x"), 0)], ..Offer::default() };
        link.send(Message::Offer(offer)).await.unwrap();
        assert!(matches!(link.recv().await.unwrap(), Message::Need { .. }));
        link.send(Message::Ask { seq: 0, ids: meta.clone() }).await.unwrap();
        let Message::Want { wanted, .. } = link.recv().await.unwrap() else { panic!("an answer") };
        let sent: Vec<_> = meta.iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(id, _)| *id).collect();
        let encode = |id: &layerfs::ChunkId| {
            let plain = thief.get(id).unwrap();
            layerfs::chunk::encode(*id, layerfs::chunk::Class::Data, &plain, 1).stored().clone()
        };
        link.send(Message::Chunks(sent.iter().map(encode).collect())).await.unwrap();
        link.send(Message::End { chunks: sent.len() as u64 }).await.unwrap();
        let _ = link.recv().await;
    };
    let receiving = async {
        let mut link = Link::start(far, "thief", Patience::default());
        let terms = Terms {
            visible,
            wanted: None,
            kept: None,
            lazy: false,
            limit: None,
            completes: Vec::new(),
            peer: "there".to_owned(),
        };
        let result = receive::run(&mut link, owner.store(), terms, None, &Arc::new(Tally::new()), &silent()).await;
        link.close().await;
        result.map(|(_, changed)| changed)
    };
    let (_, result) = tokio::join!(sending, receiving);
    (result, owner)
}

#[tokio::test(flavor = "multi_thread")]
async fn naming_a_chunk_is_not_having_it() {
    let (result, owner) = offer_without_data(Visible::Matching(vec!["mine/*".to_owned()])).await;
    assert_eq!(result.unwrap_err().class(), ErrorClass::Corrupt);
    assert!(owner.store().name(&name("mine/x")).unwrap().is_none());
    // A peer that may see everything loses nothing by it.
    let (result, owner) = offer_without_data(Visible::All).await;
    assert_eq!(result.unwrap(), 1);
    assert!(owner.store().name(&name("mine/x")).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_refused_with_both_numbers() {
    let (near, mut far) = duplex(1 << 16);
    let mut link = Link::start(near, "future", Patience::default());
    let mut hello = Vec::new();
    wire::encode(&Message::Hello(Hello { version: 3, lowest: 2, highest: 3, features: 0 }), &mut hello);
    far.write_all(&hello).await.unwrap();
    let error = link.recv().await.unwrap_err();
    assert!(matches!(error, Error::Version { lowest: 2, highest: 3, ours: 1, .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Unsupported);
    link.close_with(&error).await;
    let mut said = Vec::new();
    far.read_to_end(&mut said).await.unwrap();
    assert!(String::from_utf8_lossy(&said).contains("versions 2 to 3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_feature_that_is_unknown_is_refused() {
    let (near, mut far) = duplex(1 << 16);
    let mut link = Link::start(near, "future", Patience::default());
    let mut hello = Vec::new();
    wire::encode(&Message::Hello(Hello { features: 1 << 40, ..Hello::OURS }), &mut hello);
    far.write_all(&hello).await.unwrap();
    assert_eq!(link.recv().await.unwrap_err().class(), ErrorClass::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_instead_of_tls_or_hello_is_refused() {
    let pair = Pair::new().await;
    let mut stream = tokio::net::TcpStream::connect(pair.listens()).await.unwrap();
    stream.write_all(&noise(1, 5000)).await.unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    let (near, mut far) = duplex(1 << 16);
    let mut link = Link::start(near, "garbage", Patience::default());
    far.write_all(&[0xff; 64]).await.unwrap();
    assert!(matches!(link.recv().await.unwrap_err(), Error::Protocol { .. }));
    add_layer(pair.here.store(), "x", &tree(3, 10));
    pair.push("x").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_of_the_sender_is_not_accepted() {
    let pair = Pair::new().await;
    let files = tree(10, 1 << 20);
    add_layer(pair.here.store(), "x", &files);
    let packs = pair.here.store().folder().join("packs");
    let pack = std::fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&pack, bytes).unwrap();
    let error = pair.push("x").await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Corrupt, "{error}");
    assert!(pair.there.store().names().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr)]
async fn a_full_disk_at_the_receiver_is_reported_and_survived() {
    let folder = tempfile::Builder::new().prefix("layerfs-migrator-full-").tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64m", "none"]).arg(folder.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a full disk can't be had here (mounting a tmpfs needs root)");
        return;
    }
    let here = Host::new();
    let attempt = async {
        let options = StoreOptions { create: true, ..Default::default() };
        let there = Node::open(Store::open(&folder.path().join("store"), options)?, NodeOptions::default())?;
        let listener = there.listen(([127, 0, 0, 1], 0).into()).await?;
        here.know("there", there.public_key(), Some(listener.address().to_string()), Rights::default());
        let peer = Peer {
            name: PeerName::new("here")?,
            address: None,
            key: here.node.public_key(),
            rights: Rights::default(),
        };
        there.peers().add(peer)?;
        add_layer(here.store(), "large", &tree(10, 100 << 20));
        let push = async |called: &str| here.node.push(&[name(called)], "there", Default::default(), silent()).await;
        let error = push("large").await.unwrap_err();
        let names_after = there.store().names()?;
        listener.close().await;
        drop(there);
        Ok((error, names_after))
    };
    let result: crate::Result<_> = attempt.await;
    let _ = Command::new("umount").arg("-l").arg(folder.path()).status();
    let (error, names_after) = result.unwrap();
    assert_eq!(error.class(), ErrorClass::NoSpace, "{error}");
    assert!(matches!(error, Error::Remote { .. }), "{error}");
    assert!(names_after.is_empty());
}

#[test]
fn peers_are_added_once_and_removed() {
    let host = Host::new();
    let key = Host::new().node.public_key();
    host.know("a", key, Some("h".to_owned()), Rights::default());
    let peers = host.node.peers();
    assert_eq!(peers.get("a").unwrap().address.as_deref(), Some("h:7440"));
    let add = |called: &str, key| {
        peers.add(Peer { name: PeerName::new(called).unwrap(), address: None, key, rights: Rights::default() })
    };
    assert_eq!(add("a", host.node.public_key()).unwrap_err().class(), ErrorClass::Exists);
    assert_eq!(add("b", key).unwrap_err().class(), ErrorClass::Exists);
    assert_eq!(peers.by_key(&key).unwrap().unwrap().name.as_str(), "a");
    peers.remove("a").unwrap();
    assert_eq!(peers.remove("a").unwrap_err().class(), ErrorClass::NotFound);
    assert!(peers.list().unwrap().is_empty());
}
