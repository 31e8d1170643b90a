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

/// Two hosts, of which the second listens; both know each other as "edge" and "central".
fn acquainted() -> (Host, Host) {
    let (central, (edge, address)) = (Host::new(), listening());
    let key = |host: &Host| host.json(&["peer", "id"])["key"].as_str().unwrap().to_owned();
    central.json(&["peer", "add", "edge", &address, "--key", &key(&edge)]);
    edge.json(&["peer", "add", "central", "-", "--key", &key(&central)]);
    (central, edge)
}

/// The transfer of `host` with this number, once it is in `state`.
fn transfer(host: &Host, id: u64, state: &str) -> serde_json::Value {
    loop {
        let list = host.json(&["transfers"]);
        let found = list["transfers"].as_array().unwrap().iter().find(|transfer| transfer["id"] == id).cloned();
        match found {
            Some(transfer) if transfer["state"] == state => return transfer,
            Some(transfer) => {
                assert!(["running", "paused"].contains(&transfer["state"].as_str().unwrap()), "{transfer}")
            }
            None => panic!("no transfer {id}: {list}"),
        }
    }
}

/// The transfer of `host` with this number, once the peer that began it has made itself heard: at the peer it runs from before
/// its first message.
fn arrived(host: &Host, id: u64) -> serde_json::Value {
    loop {
        let list = host.json(&["transfers"]);
        let found = list["transfers"].as_array().unwrap().iter().find(|transfer| transfer["id"] == id);
        if let Some(transfer) = found {
            return transfer.clone();
        }
    }
}

#[test]
fn transfers_are_watched_and_changed() {
    let (central, edge) = acquainted();
    central.make_tree("tree");
    central.json(&["import", "tree", "base"]);
    hold!("push_dry_run", central.run(&["push", "base", "edge", "--dry-run"]));
    for host in [&central, &edge] {
        assert_eq!(host.json(&["transfers"])["transfers"][0]["dry_run"], true);
    }
    assert!(central.run(&["transfers"]).contains("dry run"));
    assert!(edge.json(&["list"])["layers"].as_array().unwrap().is_empty());
    hold!("push_background", central.run(&["push", "base", "edge", "--limit", "1k", "--background"]));
    let running = transfer(&central, 2, "running");
    assert_eq!(
        (&running["role"], &running["origin"], &running["limit"]),
        (&"sending".into(), &"here".into(), &1024.into())
    );
    assert_eq!(arrived(&edge, 2)["origin"], "peer");
    let quiet = central.session(&[
        &["transfers", "pause", "2"],
        &["transfers", "priority", "high", "2"],
        &["transfers", "limit", "2k", "2"],
        &["transfers", "limit", "5", "2"],
        &["transfers", "pause", "2", "99"],
    ]);
    hold!("transfers_changed", quiet);
    let paused = transfer(&central, 2, "paused");
    assert_eq!((&paused["priority"], &paused["limit"]), (&"high".into(), &2048.into()));
    transfer(&edge, 2, "running");
    central.json(&["transfers", "resume", "2"]);
    central.json(&["transfers", "limit", "none", "2"]);
    transfer(&central, 2, "done");
    let shown = central.run(&["transfers"]);
    assert!(shown.contains("push to edge  base   done     100.0%") && shown.contains("high"), "{shown}");
    central.json(&["push", "base", "edge"]);
    // Of which nothing had to be moved.
    let shown = central.run(&["transfers"]);
    let done = shown.lines().filter(|line| line.contains(" done "));
    assert!(done.clone().count() >= 2 && done.clone().all(|line| line.contains("100.0%")), "{shown}");

    hold!(
        "limit",
        central.session(&[
            &["limit"],
            &["limit", "80Mbit"],
            &["limit", "fast"],
            &["limit", "none"],
            &["limit", "default"]
        ])
    );
    central.json(&["limit", "1k"]);
    central.json(&["daemon", "stop"]);
    assert_eq!(central.json(&["limit"])["limit"], 1024);
}

#[test]
fn a_cancelled_transfer_is_so_at_both_sides() {
    let (central, edge) = acquainted();
    central.make_tree("tree");
    central.json(&["import", "tree", "base"]);
    central.json(&["push", "base", "edge", "--limit", "1k", "--background"]);
    transfer(&central, 1, "running");
    arrived(&edge, 1);
    edge.json(&["transfers", "cancel", "1"]);
    transfer(&edge, 1, "cancelled");
    let failed = loop {
        let list = central.json(&["transfers"]);
        if list["transfers"][0]["state"] == "failed" {
            break list;
        }
    };
    assert!(failed["transfers"][0]["error"].as_str().unwrap().contains("cancelled"), "{failed}");
    assert!(edge.json(&["list"])["layers"].as_array().unwrap().is_empty());
}

#[test]
fn what_a_peer_may_do_is_changed() {
    let (central, edge) = acquainted();
    central.make_tree("tree");
    central.json(&["import", "tree", "base"]);
    hold!(
        "peer_set",
        edge.session(&[
            &["peer", "set", "central", "--no-push"],
            &["peer", "set", "central", "--visible", "app/*,base"],
            &["peer", "set", "central"],
            &["peer", "set", "central", "--allow-push", "--no-push"],
            &["peer", "set", "nobody", "--no-pull"],
            &["peer", "list"],
        ])
    );
    let told = edge.run(&["pull", "base", "central"]);
    assert!(told.contains("`layerctl peer set central --address HOST[:PORT]`"), "{told}");
    hold!("push_not_allowed", central.run(&["push", "base", "edge"]));
    edge.json(&["peer", "set", "central", "--allow-push", "--visible", "app/*"]);
    hold!("push_not_visible", central.run(&["push", "base", "edge"]));
    edge.json(&["peer", "set", "central", "--visible", "*"]);
    central.json(&["push", "base", "edge"]);
    let set = edge.json(&["peer", "set", "central", "--allow", "pull,guests"]);
    assert_eq!(
        (&set["allow_push"], &set["allow_pull"], &set["allow_guests"]),
        (&false.into(), &true.into(), &true.into())
    );
    let set = edge.json(&["peer", "set", "central", "--allow", "none"]);
    assert_eq!((&set["allow_pull"], &set["allow_guests"]), (&false.into(), &false.into()));
    let mixed = edge.run(&["peer", "set", "central", "--allow", "push", "--no-pull"]);
    assert!(mixed.ends_with("--- exit 2\n"), "{mixed}");
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
    let mistyped = central.run(&["peer", "add", "edge", &edge_address, "--fingerprint", "qq7mf-6esg9"]);
    assert!(mistyped.contains("is not a fingerprint") && mistyped.ends_with("--- exit 2\n"), "{mistyped}");
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
    let again = central.run(&["push", "base", "edge", "--lazy"]);
    assert!(again.contains("it was all there already") && !again.contains("follows"), "{again}");
    let nothing = central.run(&["transfers", "pause", "99"]);
    assert!(nothing.contains("`layerctl transfers` shows") && nothing.ends_with("--- exit 3\n"), "{nothing}");
    hold!("pushed", edge.session(&[&["list"], &["fsck"]]));
    flip_a_byte(&central);
    hold!("heal", central.session(&[&["scrub"], &["scrub", "--heal", "edge"], &["scrub"]]));
    edge.json(&["tag", "base", "copy"]);
    hold!("pull", central.session(&[&["pull", "copy", "edge"], &["pull", "nothing", "edge"]]));
    hold!("peer_remove", edge.session(&[&["peer", "remove", "central"], &["peer", "remove", "central"]]));
    hold!("push_to_former_peer", central.run(&["push", "base", "edge"]));
}

#[test]
fn who_cannot_listen_says_why() {
    let taken = std::net::TcpListener::bind("[::]:7440").or_else(|_| std::net::TcpListener::bind("0.0.0.0:7440"));
    let host = Host::new();
    std::fs::write(host.path("config.toml"), "").unwrap();
    let told = host.run(&["peer", "id"]);
    assert!(told.contains("does not listen yet: it does as soon as it has a peer"), "{told}");
    let (other, _) = listening();
    let key = other.json(&["peer", "id"])["key"].as_str().unwrap().to_owned();
    host.json(&["peer", "add", "other", "-", "--key", &key]);
    let told = host.run(&["peer", "id"]);
    // Another program may have had the port before.
    assert!(told.contains("this host does not listen: ") && told.contains("7440"), "{told}");
    drop(taken);
    host.json(&["daemon", "stop"]);
    std::fs::write(host.path("config.toml"), "listen = \"off\"\n").unwrap();
    let told = host.run(&["peer", "id"]);
    assert!(told.contains("`listen` is off") && told.contains(" - --key lfk-"), "{told}");
}
