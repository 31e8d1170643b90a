//! The second tier, with a server of the tests' own.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::host::Host;
use crate::s3::{S3, TOKEN};

/// The longest that the daemon may go on with what it does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host whose daemon has the key "A".
fn host() -> Host {
    let host = Host::new();
    let config = format!("listen = \"off\"\ntier_credentials = {:?}\n", host.path("keys"));
    std::fs::write(host.path("config.toml"), config).unwrap();
    set_key(&host, "A");
    host
}

fn set_key(host: &Host, access: &str) {
    let text = format!("[default]\naws_access_key_id = {access}\naws_secret_access_key = very-secret-key\n");
    std::fs::write(host.path("keys"), text).unwrap();
}

fn add(host: &Host, s3: &S3, extra: &[&str]) {
    let endpoint = s3.endpoint();
    let line = ["tier", "add", "s3://bucket/store", "--endpoint", &endpoint, "--timeout", "60"];
    host.json(&[&line[..], extra].concat());
}

/// A round, once none of the daemon's own is under way.
fn sync(host: &Host) {
    let deadline = Instant::now() + PATIENCE;
    while host.output(&["tier", "sync"]).status.code() != Some(0) {
        assert!(Instant::now() < deadline, "{}", host.run(&["tier", "sync"]));
    }
}

fn packs(host: &Host) -> usize {
    std::fs::read_dir(host.store().join("packs")).unwrap().count()
}

#[test]
fn a_tier_is_not_removed_while_somebody_works_by_its_settings() {
    let (host, s3) = (host(), S3::start());
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    add(&host, &s3, &["--keep", "0"]);
    let before = packs(&host);
    assert!(before > 0);
    // Whoever begins a round, this one or the daemon by itself, looks first whose folder it is.
    s3.hold(Some("GET store/layerfs-store"));
    let mut syncing = host.command(&["tier", "sync"]);
    let mut syncing = syncing.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    s3.wait_for_held();
    let removed = host.run(&["tier", "remove"]);
    assert!(removed.contains("at work on the second tier") && removed.ends_with("--- exit 5\n"), "{removed}");
    let endpoint = s3.endpoint();
    let added = host.run(&["tier", "add", "s3://bucket/store", "--endpoint", &endpoint]);
    assert!(added.ends_with("--- exit 5\n"), "{added}");
    assert_eq!(packs(&host), before, "packs are gone while the tier may be removed");
    s3.hold(None);
    syncing.wait().unwrap();
    sync(&host);
    let status = host.json(&["tier", "status"]);
    assert_eq!((&status["url"], packs(&host)), (&"s3://bucket/store".into(), 0), "{status}");
    // Nor does the tier become another one of the same name.
    let (empty, endpoint) = (S3::start(), s3.endpoint());
    let moved = host.run(&["tier", "add", "s3://bucket/store", "--endpoint", &empty.endpoint()]);
    assert!(moved.contains("nothing of this store") && moved.ends_with("--- exit 3\n"), "{moved}");
    assert_eq!(host.json(&["tier", "status"])["endpoint"], endpoint);
    // What is only there is there, and the settings that name it as well.
    let removed = host.run(&["tier", "remove"]);
    assert!(removed.contains("only in the second tier") && removed.ends_with("--- exit 5\n"), "{removed}");
    add(&host, &s3, &[]);
    host.json(&["tier", "fetch"]);
    host.json(&["tier", "remove"]);
    assert_eq!(packs(&host), before);
    host.json(&["export", "base", "out"]);
}

#[test]
fn keys_that_were_changed_are_used_by_the_next_round() {
    let (host, s3) = (host(), S3::start());
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    add(&host, &s3, &[]);
    sync(&host);
    host.json(&["tier", "evict", "--keep", "0"]);
    assert_eq!(packs(&host), 0);
    // A daemon that has nothing in memory.
    host.json(&["daemon", "stop"]);
    host.json(&["tier", "status"]);
    s3.take_only("B");
    let refused = host.run(&["export", "base", "none"]);
    assert!(refused.contains("InvalidToken") && refused.ends_with("--- exit 9\n"), "{refused}");
    set_key(&host, "B");
    sync(&host);
    host.json(&["export", "base", "out"]);
    assert_eq!(std::fs::read(host.path("out/data.bin")).unwrap(), std::fs::read(host.path("tree/data.bin")).unwrap());
    let log = std::fs::read_to_string(host.store().join("daemon.log")).unwrap();
    for text in [&refused, &log] {
        assert!(!text.contains(TOKEN) && !text.contains("very-secret-key"), "{text}");
    }
}
