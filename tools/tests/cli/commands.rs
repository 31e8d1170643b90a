//! The commands on layers and the store.

use crate::hold;
use crate::host::Host;

/// When an exported image was made that doesn't say so itself.
const EPOCH: &str = "1970-01-01T00:00:00Z";

#[test]
fn help_and_version() {
    let host = Host::new();
    hold!("help", host.run(&["--help"]));
    hold!("help_import", host.run(&["import", "--help"]));
    hold!("help_peer_add", host.run(&["peer", "add", "-h"]));
    hold!("help_guest_exec", host.run(&["guest", "exec", "--help"]));
    hold!("version", host.run(&["version"]));
}

#[test]
fn layers_from_in_to_out() {
    let host = Host::new();
    host.make_tree("tree");
    hold!(
        "import",
        host.session(&[
            &["import", "tree", "base"],
            &["import", "tree", "base"],
            &["import", "tree", "base", "--force"]
        ])
    );
    std::fs::write(host.path("tree/etc/hostname"), "edge-2\n").unwrap();
    std::fs::remove_file(host.path("tree/etc/motd")).unwrap();
    std::fs::write(host.path("tree/etc/new"), "new\n").unwrap();
    hold!("import_on_parent", host.session(&[&["import", "tree", "app", "--parent", "base", "--whole"]]));
    hold!(
        "list",
        host.session(&[
            &["list"],
            &["list", "a*"],
            &["list", "z*"],
            &["list", "--kind", "instance"],
            &["tree"],
            &["tree", "app"],
            &["log", "app"]
        ])
    );
    hold!("list_json", host.run(&["list", "app", "--json"]));
    let entries = |args: &[&str]| host.json(args)["entries"].as_array().map(Vec::len);
    assert_eq!(entries(&["inspect", "app", "/etc", "--chunks"]), Some(2), "a folder has entries, not chunks");
    assert_eq!(entries(&["inspect", "app", "/data.bin", "--chunks"]), None);
    hold!(
        "diff",
        host.session(&[&["diff", "base", "app"], &["diff", "app", "app"], &["diff", "base", "app", "--summary"]])
    );
    hold!(
        "inspect",
        host.session(&[
            &["inspect", "app"],
            &["inspect", "app", "/etc"],
            &["inspect", "app", "/etc", "--chunks"],
            &["inspect", "base", "/data.bin", "--chunks"],
            &["inspect", "app", "/name"]
        ])
    );
    hold!(
        "tag",
        host.session(&[&["tag", "app", "app:1"], &["tag", "base", "app:1"], &["tag", "base", "app:1", "--force"]])
    );
    hold!("why", host.session(&[&["why", "app:/data.bin"], &["why", "app:/etc/new"], &["why", &"0".repeat(64)]]));
    hold!("remove", host.session(&[&["remove", "app:1"], &["remove", "app:1"]]));
}

#[test]
fn the_store_looked_at() {
    let host = Host::new();
    hold!("nothing_there", host.session(&[&["list"], &["mounts"], &["daemon", "status"]]));
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    hold!("checks", host.session(&[&["fsck"], &["scrub"], &["gc", "--dry-run"], &["gc"]]));
    let du = host.json(&["du", "base"]);
    let row = &du["rows"][0];
    assert_eq!(row["name"], "base");
    assert_eq!(row["unique_bytes"], row["plain_bytes"], "nothing else refers to it");
    assert_eq!(du["freed_bytes"], row["freed_bytes"]);
    let stat = host.json(&["stat"]);
    assert_eq!(stat["names"], 1);
    assert!(stat["packs"].as_u64().unwrap() >= 1);
    hold!(
        "nothing_yet",
        host.session(&[
            &["report", "latest"],
            &["report", "1234"],
            &["tier", "add", "s3://bucket/folder", "--endpoint", "http://127.0.0.1:9"],
        ])
    );
    hold!("rebuilt", host.session(&[&["daemon", "stop"], &["fsck", "--rebuild"]]));
}

#[test]
fn streams() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    let tar = host.output(&["export", "base", "-"]);
    assert!(tar.status.success());
    assert_eq!(tar.stdout.len() % 512, 0, "a tar archive consists of blocks");
    assert!(tar.stdout.len() > 200_000);
    hold!("import_stdin", host.run_with_stdin(&["import", "-", "again", "--like", "base"], &tar.stdout));
    hold!("import_stdin_diff", host.run(&["diff", "base", "again"]));
    hold!("export_missing_stdout", host.run(&["export", "nothing", "-"]));
    hold!(
        "export_folder",
        host.session(&[
            &["export", "base", "out"],
            &["export", "base", "out"],
            &["export", "base", "out.tar.zst"],
            &["export", "base", "out.qcow2"],
            &["export", "base", "out.tar.lz4"]
        ])
    );
    assert_eq!(std::fs::read(host.path("out/etc/hostname")).unwrap(), b"edge\n");
}

#[test]
fn an_exported_image_comes_back() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    host.json(&["export", "base", "oci:image:1.0"]);
    host.json(&["export", "base", "oci:image:2.0"]);
    // The same image again is nothing new; another one needs another tag.
    host.json(&["export", "base", "oci:image:2.0"]);
    std::fs::write(host.path("tree/etc/hostname"), "other\n").unwrap();
    host.json(&["import", "tree", "changed"]);
    let index = std::fs::read(host.path("image/index.json")).unwrap();
    let taken = host.run(&["export", "changed", "oci:image:2.0"]);
    assert!(taken.contains("tag \"2.0\" exists already") && taken.ends_with("--- exit 4\n"), "{taken}");
    assert_eq!(std::fs::read(host.path("image/index.json")).unwrap(), index);
    host.json(&["import", "oci:image:1.0", "back"]);
    assert_eq!(host.json(&["diff", "base", "back"])["changes"].as_array().unwrap().len(), 0);
    let image = &host.json(&["inspect", "back"])["image"]["configuration"];
    assert_eq!((&image["created"], &image["history"][0]["created"]), (&EPOCH.into(), &EPOCH.into()));
    hold!(
        "import_layout",
        host.session(&[
            &["import", "oci:image:3.0", "other", "--platform", "linux/arm64"],
            &["import", "oci:image", "other", "--platform", "linux/arm64"],
            &["import", "image", "other", "--reference", "nope", "--platform", "linux/arm64"],
            &["import", "oci:image:1.0", "other", "--reference", "2.0"],
            &["import", "oci:nowhere:1.0", "other"],
        ])
    );
}

#[test]
fn man_pages_and_completions() {
    let host = Host::new();
    let told = host.run(&["generate", "man", "man"]);
    assert!(told.contains("--- exit 0"), "{told}");
    let page = std::fs::read_to_string(host.path("man/layerctl-import.1")).unwrap();
    assert!(page.contains("OCI") && page.contains("EXIT CODES"));
    assert!(host.path("man/mount.layerfs.8").exists());
    for shell in ["bash", "zsh", "fish"] {
        let completions = host.output(&["completions", shell]);
        assert!(completions.status.success() && completions.stdout.len() > 1000, "{shell}");
    }
}
