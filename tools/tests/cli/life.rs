//! The daemon: started, stopped, killed, spoken to by others; commands that are interrupted.

use std::io::Write;
use std::process::Stdio;

use crate::hold;
use crate::host::Host;

fn kill(pid: i32, signal: &str) {
    let status = std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Whether process `pid` is there and more than waited for.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Waits, by asking, until process `pid` is gone or is only waited for.
fn wait_for_end(pid: i32) {
    while is_alive(pid) {
        std::thread::yield_now();
    }
}

#[test]
fn started_and_stopped() {
    let host = Host::new();
    hold!(
        "daemon",
        host.session(&[&["daemon"], &["daemon"], &["daemon", "status"], &["daemon", "stop"], &["daemon", "stop"]])
    );
    assert!(!host.store().join("control.sock").exists());
}

/// It holds the store until its process ends, which is after its last answer.
#[test]
fn once_stopped_it_has_left_the_store() {
    let host = Host::new();
    for _ in 0..5 {
        host.json(&["daemon"]);
        let pid = host.daemon_pid();
        host.json(&["daemon", "stop"]);
        assert!(!is_alive(pid));
    }
}

#[test]
fn a_killed_daemon_is_replaced() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    let pid = host.daemon_pid();
    kill(pid, "-KILL");
    wait_for_end(pid);
    assert!(host.store().join("control.sock").exists(), "the stale socket is there");
    let names = host.json(&["list"]);
    assert_eq!(names["layers"][0]["names"][0], "base");
    assert_ne!(host.daemon_pid(), pid);
    hold!("after_kill", host.run(&["fsck"]));
}

#[test]
fn sigterm_ends_it_cleanly() {
    let host = Host::new();
    host.json(&["daemon"]);
    let pid = host.daemon_pid();
    kill(pid, "-TERM");
    wait_for_end(pid);
    assert!(!host.store().join("control.sock").exists());
    hold!("after_sigterm", host.run(&["daemon", "status"]));
}

#[test]
fn a_long_path_gets_a_short_socket() {
    let host = Host::new();
    let long = host.path(&"long-folder-name/".repeat(8)).join("store");
    std::fs::create_dir_all(long.parent().unwrap()).unwrap();
    let runtime = host.path("run");
    let run = |args: &[&str]| {
        let output = host.command(args).env("LAYERFS_STORE", &long).env("XDG_RUNTIME_DIR", &runtime).output().unwrap();
        assert!(output.status.success(), "{}", host.told(args, &output));
        output
    };
    run(&["daemon"]);
    assert!(std::fs::read_link(long.join("control.sock")).unwrap().starts_with(&runtime));
    run(&["list"]);
    run(&["daemon", "stop"]);
}

#[test]
fn a_store_behind_a_link_is_known_by_its_folder() {
    let host = Host::new();
    std::fs::create_dir(host.path("place")).unwrap();
    std::os::unix::fs::symlink("place", host.store()).unwrap();
    host.json(&["daemon"]);
    let place = host.path("place").canonicalize().unwrap();
    assert_eq!(host.json(&["daemon", "status"])["store"], place.to_str().unwrap());
    host.json(&["daemon", "restart"]);
    assert_eq!(host.json(&["stat"])["store"], place.to_str().unwrap());
}

#[test]
fn others_may_speak_to_it() {
    let host = Host::new();
    host.json(&["daemon"]);
    let status_line = |answer: String| answer.lines().next().unwrap_or_default().to_owned();
    assert_eq!(status_line(host.request("list", "", "")), "HTTP/1.1 200 OK");
    assert!(host.request("list", "layerfs-api: 99\r\n", "").contains("\"class\":\"unsupported\""));
    assert_eq!(status_line(host.request("status", "layerfs-api: 99\r\n", "")), "HTTP/1.1 200 OK");
    assert_eq!(status_line(host.request("list", "", "{\"patern\": \"x\"}")), "HTTP/1.1 400 Bad Request");
    assert_eq!(status_line(host.request("nothing", "", "")), "HTTP/1.1 404 Not Found");
    assert!(host.request("gc", "", "").contains("{\"started\":"));
    let whole = host.request("gc", "accept: application/json\r\n", "");
    assert!(whole.contains("\"live_chunks\":0") && !whole.contains("started"), "{whole}");
}

#[test]
fn ctrl_c_leaves_nothing() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    let tar = host.output(&["export", "base", "-"]).stdout;
    let args = ["import", "-", "never"];
    let mut command = host.command(&args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&tar[..tar.len() / 2]).unwrap();
    stdin.flush().unwrap();
    while host.json(&["daemon", "status"])["work"].as_array().unwrap().is_empty() {
        std::thread::yield_now();
    }
    kill(child.id() as i32, "-INT");
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    hold!("interrupted", host.told(&args, &output));
    hold!("after_interrupt", host.session(&[&["list"], &["fsck"]]));
}

#[test]
fn it_leaves_when_it_has_nothing_to_do() {
    let host = Host::new();
    std::fs::write(host.path("config.toml"), "listen = \"off\"\nidle_minutes = 0\n").unwrap();
    host.make_tree("tree");
    let output = host.output(&["import", "tree", "base"]);
    assert!(output.status.success(), "{}", host.told(&["import"], &output));
    let socket = host.store().join("control.sock");
    while socket.exists() {
        std::thread::yield_now();
    }
    assert!(host.output(&["list"]).status.success(), "it comes back");
}
