//! The daemon: started, stopped, killed, spoken to by others; commands that are interrupted.

use std::io::Write;
use std::process::Stdio;

use crate::hold;
use crate::host::Host;

pub fn kill(pid: i32, signal: &str) {
    let status = std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// Whether process `pid` is there and more than waited for.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Waits, by asking, until process `pid` is gone or is only waited for.
pub fn wait_for_end(pid: i32) {
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

/// Each would wait for the other's end.
#[test]
fn two_stops_at_once_end_it() {
    let host = Host::new();
    for _ in 0..10 {
        host.json(&["daemon"]);
        let pid = host.daemon_pid();
        let ready = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    ready.wait();
                    let told = host.run(&["daemon", "stop"]);
                    // Who came too late for both is told that the daemon went away.
                    let codes = ["--- exit 0\n", "--- exit 5\n", "--- exit 1\n"];
                    assert!(codes.iter().any(|code| told.ends_with(code)), "{told}");
                });
            }
        });
        wait_for_end(pid);
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

/// What it can't log is lost, and nothing else: `/dev/full` takes no byte.
#[test]
fn a_log_that_cannot_be_written_disturbs_nothing() {
    let host = Host::new();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = host.command(&["daemon", "--foreground"]);
    let mut daemon = command.env("LAYERFS_LOG", "trace").stdout(full()).stderr(full()).spawn().unwrap();
    while !host.output(&["daemon", "status"]).status.success() {
        assert!(daemon.try_wait().unwrap().is_none(), "it has ended");
        std::thread::yield_now();
    }
    assert_eq!(host.daemon_pid(), daemon.id() as i32);
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    host.json(&["daemon", "log-filter", "debug"]);
    host.json(&["daemon", "stop"]);
    assert!(daemon.wait().unwrap().success());
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
fn a_mistake_in_the_config_file_is_nothing_to_the_keeper() {
    let host = Host::new();
    std::fs::create_dir(host.store()).unwrap();
    std::fs::write(host.path("config.toml"), "compression = 99\nno such key\n").unwrap();
    let mut keeper = host.command(&["daemon", "keep"]);
    let mut keeper = keeper.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(keeper.stdout.take().unwrap()), &mut said);
    // It has nothing to keep.
    keeper.kill().unwrap();
    let output = keeper.wait_with_output().unwrap();
    assert_eq!(said, "ready\n", "{}", host.told(&["daemon", "keep"], &output));
    std::fs::write(host.path("config.toml"), "listen = \"off\"\n").unwrap();
}

/// A daemon that left by itself has its last moment with the store after its socket is gone.
#[test]
fn a_rebuild_waits_until_the_last_daemon_has_left_the_store() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    let running = host.run(&["fsck", "--rebuild"]);
    assert!(running.contains("while the daemon uses it") && running.ends_with("--- exit 5\n"), "{running}");
    host.json(&["daemon", "stop"]);
    let lock = std::fs::File::open(host.store().join("lock")).unwrap();
    lock.try_lock().unwrap();
    let args = ["fsck", "--rebuild"];
    let mut command = host.command(&args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    lock.unlock().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", host.told(&args, &output));
    assert_eq!(host.json(&["list"])["layers"][0]["names"][0], "base");
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

#[test]
fn another_address_is_not_taken_while_it_runs() {
    let host = Host::new();
    host.json(&["daemon", "--listen", "127.0.0.1:0"]);
    host.json(&["daemon", "--listen", "127.0.0.1:0"]);
    host.json(&["daemon"]);
    for json in [&["daemon", "--listen", "off"][..], &["daemon", "start", "--listen", "127.0.0.1:0001", "--json"]] {
        let refused = host.run(json);
        assert!(refused.contains("runs already") && refused.contains("127.0.0.1:0"), "{refused}");
        assert!(refused.contains("config file") && refused.ends_with("--- exit 5\n"), "{refused}");
    }
}

#[test]
fn a_path_that_is_not_utf8_is_told_as_such() {
    use std::os::unix::ffi::OsStrExt;
    let host = Host::new();
    let name = std::ffi::OsStr::from_bytes(b"tree\xff");
    std::fs::rename(host.make_tree("tree"), host.path("").join(name)).unwrap();
    let output = host.command(&["import"]).arg(name).arg("x").output().unwrap();
    let told = host.told(&["import"], &output);
    assert!(told.contains("not UTF-8") && told.ends_with("--- exit 2\n"), "{told}");
}
