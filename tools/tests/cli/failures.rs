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
fn a_filesystem_of_its_own_becomes_a_store() {
    let host = Host::new();
    std::fs::create_dir_all(host.store().join("lost+found")).unwrap();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    assert_eq!(host.json(&["list"])["layers"][0]["names"][0], "base");
    host.json(&["fsck"]);
    assert!(host.store().join("lost+found").is_dir());
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
    std::fs::write(host.path("config.toml"), "log = \"foo=bar=baz\"\n").unwrap();
    hold!("wrong_filter", host.run(&["daemon"]));
    std::fs::write(host.path("config.toml"), "listen = \"off\"\ntier_credentials = \"/nonexistent\"\n").unwrap();
    hold!("missing_credentials", host.run(&["daemon"]));
    std::fs::write(host.path("config.toml"), "listen = \"off\"\n").unwrap();
}

#[test]
fn a_layer_that_is_lost_is_not_left_out() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    host.json(&["daemon", "stop"]);
    for pack in std::fs::read_dir(host.store().join("packs")).unwrap() {
        std::fs::remove_file(pack.unwrap().path()).unwrap();
    }
    let listed = host.run(&["list"]);
    assert!(listed.contains("warning: base: ") && listed.contains("`layerctl remove base`"), "{listed}");
    assert!(listed.ends_with("--- exit 6\n") && !listed.contains("no layers"), "{listed}");
    let quiet = host.output(&["list", "--json", "--quiet"]);
    assert_eq!((quiet.status.code(), quiet.stderr.is_empty()), (Some(6), true));
    let answer: serde_json::Value = serde_json::from_slice(&quiet.stdout).unwrap();
    let unreadable = &answer["unreadable"][0];
    assert_eq!((&unreadable["name"], &unreadable["error"]["class"]), (&"base".into(), &"corrupt".into()), "{answer}");
    assert!(host.request("list", "", "").contains("\"warnings\":[\"base: "));
    host.json(&["daemon", "stop"]);
    let rebuilt = host.run(&["fsck", "--rebuild"]);
    assert!(rebuilt.contains("affects base") && rebuilt.contains("1 problem: 1 name, 0 layers, 0 chunks"), "{rebuilt}");
    assert!(rebuilt.ends_with("--- exit 6\n"), "{rebuilt}");
}

#[test]
fn what_can_be_done_about_it_is_told() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    host.json(&["export", "base", "oci:image:1"]);
    std::fs::write(host.path("odd"), "odd").unwrap();
    let told = |args: &[&str], texts: &[&str], code: u8| {
        let told = host.run(args);
        assert!(texts.iter().all(|text| told.contains(text)), "{told}");
        assert!(told.ends_with(&format!("--- exit {code}\n")), "{told}");
        told
    };
    told(&["import", "oci:", "x"], &["the path is empty"], 2);
    told(&["export", "base", "oci:"], &["the path is empty"], 2);
    for destination in ["nope/x", "nope/x.tar", "oci:nope/x"] {
        let failed = told(&["export", "base", destination], &["[host]/nope: No such file"], 3);
        assert!(!failed.contains("tmp"), "{failed}");
    }
    told(&["import", "odd", "x"], &["--format"], 2);
    told(&["import", "tree", "x", "--platform", "linux/arm64"], &["no image", "platform"], 2);
    told(&["import", "tree", "x", "--reference", "1"], &["no image", "reference"], 2);
    told(&["import", "image", "x", "--platform", "linux/mips"], &["linux/mips"], 3);
    told(&["tree", "nosuch"], &["`layerctl list` shows"], 3);
    told(&["mounts", "--rates"], &["no mounts; `layerctl mount"], 0);
}

/// As `su` without `-` leaves it: the environment is another user's.
#[test]
fn a_config_file_that_may_not_be_read_has_a_way_out() {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    let host = Host::new();
    // Where it lies may be a folder that others may not enter.
    let program = host.path("layerctl");
    std::fs::copy(env!("CARGO_BIN_EXE_layerctl"), &program).unwrap();
    std::fs::set_permissions(host.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = host.command_as(&program, &["list"]);
    let private = host.path("private");
    std::fs::DirBuilder::new().mode(0o700).create(&private).unwrap();
    command.env("LAYERFS_CONFIG", private.join("config.toml")).current_dir("/").uid(65534).gid(65534);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            let text = format!("NOT TESTED: another user's config file: {error}\n");
            return std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes()).unwrap();
        }
    };
    let told = host.told(&["list"], &output);
    assert!(told.contains("set HOME") && told.contains("LAYERFS_CONFIG"), "{told}");
}

#[test]
fn the_store_is_no_content() {
    let host = Host::new();
    host.make_tree("all/tree");
    std::fs::create_dir(host.path("all/deep")).unwrap();
    let store = host.path("all/deep/store");
    let run = |args: &[&str]| host.told(args, &host.command(args).env("LAYERFS_STORE", &store).output().unwrap());
    let imported = run(&["import", "all", "all"]);
    assert!(
        imported.contains("warning: [host]/all/deep/store is the store") && imported.contains("exit 0"),
        "{imported}"
    );
    let listed = run(&["export", "all", "-"]);
    assert!(listed.contains("./tree/etc/motd") && listed.contains("./deep/") && !listed.contains("host.key"));
    for source in ["all/deep/store", "all/deep/store/packs"] {
        let refused = run(&["import", source, "x"]);
        assert!(refused.contains("store's own folder") && refused.ends_with("--- exit 2\n"), "{refused}");
    }
    for destination in ["all/deep/store/x", "all/deep/store/x.tar", "oci:all/deep/store/x:1"] {
        let refused = run(&["export", "all", destination]);
        assert!(refused.contains("store's own folder") && refused.ends_with("--- exit 2\n"), "{refused}");
    }
    run(&["daemon", "stop"]);
    assert!(!store.join("x").exists());
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
