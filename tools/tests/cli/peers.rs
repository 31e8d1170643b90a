//! Two hosts on one machine.

use crate::hold;
use crate::host::Host;

/// A host that listens; and where.
fn listening() -> (Host, String) {
    let host = Host::new();
    let told = host.run(&["daemon", "--listen", "127.0.0.1:0"]);
    assert!(told.contains("--- exit 0"), "{told}");
    let address = host.json(&["daemon", "status"])["listening"].as_str().unwrap().to_owned();
    (host, address)
}

/// Damages a chunk in the first pack of `host`: the noise in its middle.
fn flip_a_byte(host: &Host) {
    let pack = std::fs::read_dir(host.store().join("packs")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
}

#[test]
fn layers_travel() {
    let (central, _) = listening();
    let (edge, edge_address) = listening();
    central.make_tree("tree");
    central.json(&["import", "tree", "base"]);
    hold!("peer_id", central.run(&["peer", "id"]));
    let fingerprint = edge.json(&["peer", "id"])["fingerprint"].as_str().unwrap().to_owned();
    hold!("peer_add_unseen", central.run(&["peer", "add", "edge", &edge_address]));
    hold!(
        "peer_add_wrong",
        central.run(&["peer", "add", "edge", &edge_address, "--fingerprint", "00000-00000-00000-00000-00000"])
    );
    hold!("peer_add", central.run(&["peer", "add", "edge", &edge_address, "--fingerprint", &fingerprint]));
    hold!("push_to_stranger", central.run(&["push", "base", "edge"]));
    let key = central.json(&["peer", "id"])["key"].as_str().unwrap().to_owned();
    hold!("peer_add_key", edge.session(&[&["peer", "add", "central", "-", "--key", &key], &["peer", "list"]]));
    hold!(
        "push",
        central.session(&[
            &["push", "base", "edge"],
            &["push", "base", "edge"],
            &["push", "nothing", "edge"],
            &["push", "base", "nobody"]
        ])
    );
    hold!("pushed", edge.session(&[&["list"], &["fsck"]]));
    flip_a_byte(&central);
    hold!("heal", central.session(&[&["scrub"], &["scrub", "--heal", "edge"], &["scrub"]]));
    edge.json(&["tag", "base", "copy"]);
    hold!("pull", central.session(&[&["pull", "copy", "edge"], &["pull", "nothing", "edge"]]));
    hold!("peer_remove", edge.session(&[&["peer", "remove", "central"], &["peer", "remove", "central"]]));
    hold!("push_to_former_peer", central.run(&["push", "base", "edge"]));
}
