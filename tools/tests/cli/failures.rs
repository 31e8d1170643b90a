//! What goes wrong, what it says, and its exit code.

use crate::hold;
use crate::host::Host;

#[test]
fn usage() {
    let host = Host::new();
    hold!(
        "usage",
        host.session(&[
            &["imprt"],
            &["import", "x"],
            &["mount", "a", "b", "--read-only", "--upper", "u"],
            &["push", "only-one"],
            &["--json", "import", "x"],
            &["--json"],
            &["limit", "fast", "--json"]
        ])
    );
}

#[test]
fn there_is_no_store() {
    let host = Host::new();
    hold!(
        "no_store",
        host.session(&[
            &["list"],
            &["--json", "list"],
            &["import", "missing", "x"],
            &["limit"],
            &["limit", "1M"],
            &["daemon", "restart"]
        ])
    );
    assert!(!host.store().exists(), "nothing was made");
}

#[test]
fn the_folder_is_something_else() {
    let host = Host::new();
    std::fs::create_dir(host.store()).unwrap();
    std::fs::write(host.store().join("diary.txt"), "private").unwrap();
    host.make_tree("tree");
    hold!("not_a_store", host.run(&["import", "tree", "x"]));
    assert_eq!(std::fs::read_dir(host.store()).unwrap().count(), 1, "nothing was left there");
}

#[test]
fn the_store_is_from_the_future() {
    let host = Host::new();
    std::fs::create_dir(host.store()).unwrap();
    std::fs::write(host.store().join("format"), "layerfs store 99\n").unwrap();
    hold!("future_store", host.run(&["list"]));
}

#[test]
fn names_that_are_wrong() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "debian"]);
    hold!(
        "wrong_names",
        host.session(&[
            &["log", "debain"],
            &["tag", "debian", "../x"],
            &["inspect", "debian", "/nothing"],
            &["import", "tree", "x", "--parent", "y"]
        ])
    );
}

#[test]
fn a_config_file_is_wrong() {
    let host = Host::new();
    std::fs::write(host.path("config.toml"), "stor = \"/x\"\n").unwrap();
    hold!("wrong_config", host.run(&["list"]));
    // What only the daemon can tell.
    std::fs::write(host.path("config.toml"), "log = \"foo=bar=baz\"\n").unwrap();
    hold!("wrong_filter", host.run(&["daemon"]));
    std::fs::write(host.path("config.toml"), "listen = \"off\"\ntier_credentials = \"/nonexistent\"\n").unwrap();
    hold!("missing_credentials", host.run(&["daemon"]));
    std::fs::write(host.path("config.toml"), "listen = \"off\"\n").unwrap();
}

#[test]
fn archives_that_are_wrong() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    let tar = host.output(&["export", "base", "-"]).stdout;
    hold!("truncated_archive", host.run_with_stdin(&["import", "-", "broken"], &tar[..tar.len() / 2]));
    hold!("nothing_broken_stayed", host.session(&[&["list"], &["fsck"]]));
}
