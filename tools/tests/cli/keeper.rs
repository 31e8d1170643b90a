//! What outlives what: mounts their daemon, daemons their keeper and their program; and what ends with a stop.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::host::{Host, elsewhere};
use crate::life::{is_alive, kill, wait_for_end};
use crate::mounts::{can_mount, helper, mounted_base};

/// The keeper's process.
fn keeper_pid(host: &Host) -> i32 {
    let status = host.json(&["daemon", "status"]);
    status["keeper"].as_i64().unwrap_or_else(|| panic!("no keeper: {status}")) as i32
}

/// Ends both, so that neither has time to replace the other.
fn kill_daemon_and_keeper(host: &Host) {
    let (daemon, keeper) = (host.daemon_pid(), keeper_pid(host));
    kill(daemon, "-STOP");
    kill(keeper, "-KILL");
    kill(daemon, "-KILL");
    wait_for_end(daemon);
    wait_for_end(keeper);
}

/// That no daemon runs, and none will.
fn assert_none_runs(host: &Host) {
    let output = host.output(&["daemon", "status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &status["starting"]), (Some(3), &false.into()), "{status}");
}

/// A program that has its working folder in `dir`, until its input ends.
fn user_of(dir: &Path) -> Child {
    Command::new("cat").current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn end(mut user: Child) {
    drop(user.stdin.take());
    user.wait().unwrap();
}

fn open(path: PathBuf) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Writes to a file that is open, and reads it by its name.
fn assert_goes_on(file: &File, path: &Path, text: &[u8]) {
    file.set_len(0).unwrap();
    file.write_all_at(text, 0).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), text);
}

#[test]
fn what_is_in_use_ends_with_a_forced_stop_and_is_mounted_again() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let mnt = host.path("mnt");
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    for by_signal in [false, true] {
        let keeper = keeper_pid(&host);
        let user = user_of(&mnt);
        let text = format!("by signal: {by_signal}");
        std::fs::write(mnt.join("written"), &text).unwrap();
        // From below, and read: it holds nobody back.
        let file = File::open(mnt.join("data.bin")).unwrap();
        let refused = host.run(&["daemon", "stop"]);
        assert!(refused.contains("in use") && refused.ends_with("--- exit 5\n"), "{refused}");
        if by_signal {
            let daemon = host.daemon_pid();
            kill(daemon, "-TERM");
            wait_for_end(daemon);
        } else {
            let stopped = host.run(&["daemon", "stop", "--force"]);
            assert!(stopped.ends_with("daemon stopped\n--- exit 0\n"), "{stopped}");
        }
        // Once it has ended, nobody is there who would start one.
        wait_for_end(keeper);
        assert_none_runs(&host);
        assert!(std::fs::read_dir(&mnt).unwrap().next().is_none());
        assert!(file.read_at(&mut [0; 8], 150_000).is_err(), "it has ended");
        host.json(&["daemon", "start"]);
        assert_eq!(std::fs::read_to_string(mnt.join("written")).unwrap(), text);
        assert_eq!(std::fs::read(mnt.join("etc/hostname")).unwrap(), b"edge\n");
        assert!(std::fs::read_dir(&mnt).unwrap().count() >= 4);
        assert_eq!(host.json(&["mounts"])["mounts"][0]["upper_name"], "work");
        end(user);
        // That end takes nothing along.
        assert_eq!(std::fs::read(mnt.join("etc/hostname")).unwrap(), b"edge\n");
        host.json(&["daemon", "restart"]);
        assert_eq!(std::fs::read(mnt.join("etc/hostname")).unwrap(), b"edge\n");
    }
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn a_stop_that_is_refused_leaves_what_was_mounted() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    std::fs::create_dir(host.path("other")).unwrap();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    host.json(&["mount", "base", "other"]);
    std::fs::write(host.path("other/written"), "before").unwrap();
    let user = user_of(&host.path("mnt"));
    let refused = host.run(&["daemon", "stop"]);
    assert!(refused.contains("[host]/mnt is in use") && refused.ends_with("--- exit 5\n"), "{refused}");
    assert_eq!(std::fs::read(host.path("other/written")).unwrap(), b"before");
    // They are kept as before, too.
    let file = open(host.path("other/held"));
    host.json(&["daemon", "restart"]);
    assert_goes_on(&file, &host.path("other/held"), b"after");
    drop(file);
    end(user);
    let keeper = keeper_pid(&host);
    host.json(&["daemon", "stop"]);
    wait_for_end(keeper);
    assert_none_runs(&host);
}

#[test]
fn a_stop_does_not_end_copies_unless_forced() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let mnt = host.path("mnt").canonicalize().unwrap();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    let mut other = Command::new(elsewhere());
    other.arg(&mnt).arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut other = other.spawn().unwrap();
    // Once it answers, it has its namespace.
    other.stdin.as_mut().unwrap().write_all(b"?").unwrap();
    other.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let refused = host.run(&["daemon", "stop"]);
    assert!(refused.contains("goes on") && refused.contains("(cat)"), "{refused}");
    assert!(refused.contains("--everywhere") && refused.ends_with("--- exit 5\n"), "{refused}");
    // There it goes on over daemons.
    let there = PathBuf::from(format!("/proc/{}/root{}", other.id(), mnt.display()));
    host.json(&["daemon", "restart"]);
    assert_eq!(std::fs::read(there.join("etc/hostname")).unwrap(), b"edge\n");
    let keeper = keeper_pid(&host);
    host.json(&["daemon", "stop", "--force"]);
    wait_for_end(keeper);
    assert_none_runs(&host);
    assert!(std::fs::read(there.join("etc/hostname")).is_err(), "it has ended");
    end(other);
}

#[test]
fn what_was_unmounted_stays_unmounted_after_a_forced_stop() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    let user = user_of(&host.path("mnt"));
    host.json(&["umount", "mnt", "--lazy"]);
    // Its user goes on, over daemons too.
    host.json(&["daemon", "restart"]);
    assert!(Path::new(&format!("/proc/{}/cwd/etc/hostname", user.id())).exists());
    let keeper = keeper_pid(&host);
    host.json(&["daemon", "stop", "--force"]);
    wait_for_end(keeper);
    assert_none_runs(&host);
    host.json(&["daemon", "start"]);
    assert!(host.json(&["mounts"])["mounts"].as_array().unwrap().is_empty());
    assert!(std::fs::read_dir(host.path("mnt")).unwrap().next().is_none());
    end(user);
}

#[test]
fn a_killed_keeper_is_replaced() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    std::fs::create_dir(host.path("other")).unwrap();
    let dirs = [host.path("mnt"), host.path("other")];
    host.json(&["mount", "base", "mnt"]);
    host.json(&["mount", "base", "other"]);
    let files = dirs.each_ref().map(|dir| open(dir.join("held")));
    let goes_on = |text: &[u8]| {
        files.iter().zip(&dirs).for_each(|(file, dir)| assert_goes_on(file, &dir.join("held"), text));
    };
    for _ in 0..3 {
        let (daemon, keeper) = (host.daemon_pid(), keeper_pid(&host));
        kill(keeper, "-KILL");
        wait_for_end(keeper);
        host.json(&["daemon", "restart"]);
        goes_on(b"after a restart");
        assert_ne!(host.daemon_pid(), daemon);
        assert_ne!(keeper_pid(&host), keeper);
        assert!(is_alive(keeper_pid(&host)));
    }
    // Unasked, too.
    let (daemon, keeper) = (host.daemon_pid(), keeper_pid(&host));
    kill(keeper, "-KILL");
    while host.json(&["daemon", "status"])["keeper"].as_i64().is_none_or(|now| now == i64::from(keeper)) {
        std::thread::yield_now();
    }
    // Whether it has all of them by now is asked before the daemon goes.
    host.json(&["daemon", "restart"]);
    goes_on(b"after another");
    assert_ne!(host.daemon_pid(), daemon);
    drop(files);
    host.json(&["umount", "--all", "--discard"]);
}

#[test]
fn a_daemon_outlives_its_program() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["daemon", "stop"]);
    let (program, new) = (host.path("layerctl"), host.path("layerctl.new"));
    let put = |path: &Path| std::fs::copy(env!("CARGO_BIN_EXE_layerctl"), path).map(|_| ()).unwrap();
    put(&program);
    let started = host.command_as(&program, &["daemon", "start"]).output().unwrap();
    assert!(started.status.success(), "{started:?}");
    put(&new);
    std::fs::rename(&new, &program).unwrap();
    let runs = || std::fs::read_link(format!("/proc/{}/exe", host.daemon_pid())).unwrap();
    assert!(runs().to_string_lossy().ends_with("layerctl (deleted)"), "{:?}", runs());
    let mounted = host.run(&["mount", "base", "mnt", "--upper", "work"]);
    assert!(!mounted.contains("--- stderr"), "{mounted}");
    keeper_pid(&host);
    let file = open(host.path("mnt/held"));
    host.json(&["daemon", "restart"]);
    assert_goes_on(&file, &host.path("mnt/held"), b"after a restart");
    assert_eq!(runs(), program.canonicalize().unwrap());
    // What the keeper starts is what is there by then.
    let daemon = host.daemon_pid();
    put(&new);
    std::fs::rename(&new, &program).unwrap();
    kill(daemon, "-KILL");
    assert_goes_on(&file, &host.path("mnt/held"), b"after a kill");
    assert_eq!(runs(), program.canonicalize().unwrap());
    drop(file);
    host.json(&["umount", "mnt"]);
}

#[test]
fn who_mounts_is_told_that_it_is_not_kept() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    // No keeper can listen.
    let in_the_way = host.store().join("keeper.sock");
    std::fs::create_dir_all(in_the_way.join("something")).unwrap();
    let told = host.run(&["mount", "base", "mnt", "--upper", "work"]);
    assert!(told.contains("the mount on [host]/mnt will end with the daemon"), "{told}");
    assert!(told.ends_with("--- exit 0\n"), "{told}");
    std::fs::write(host.path("mnt/written"), "before").unwrap();
    let refused = host.run(&["daemon", "restart"]);
    assert!(refused.contains("[host]/mnt") && refused.contains("--force"), "{refused}");
    assert!(refused.ends_with("--- exit 5\n"), "{refused}");
    host.json(&["daemon", "restart", "--force"]);
    assert_eq!(std::fs::read(host.path("mnt/written")).unwrap(), b"before");
    // As soon as there can be one, there is.
    std::fs::remove_dir_all(in_the_way).unwrap();
    let file = open(host.path("mnt/held"));
    host.json(&["daemon", "restart"]);
    assert_goes_on(&file, &host.path("mnt/held"), b"after");
    drop(file);
    host.json(&["umount", "mnt"]);
}

/// What somebody of systemd's starts isn't systemd's for that.
#[test]
fn a_detached_daemon_is_restarted_whatever_it_inherits() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["daemon", "stop"]);
    let started = host.command(&["daemon", "start"]).env("NOTIFY_SOCKET", host.path("notify")).output().unwrap();
    assert!(started.status.success(), "{started:?}");
    host.json(&["mount", "base", "mnt"]);
    let file = open(host.path("mnt/held"));
    let daemon = host.daemon_pid();
    kill(daemon, "-KILL");
    assert_goes_on(&file, &host.path("mnt/held"), b"after a kill");
    assert_ne!(host.daemon_pid(), daemon);
    host.json(&["daemon", "restart"]);
    assert_goes_on(&file, &host.path("mnt/held"), b"after a restart");
    drop(file);
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn options_of_a_mount_come_back_with_it() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let program = helper(&host);
    let mnt = host.path("mnt").canonicalize().unwrap();
    let store = format!("store={}", host.store().display());
    let mount = |options: &str| {
        let output = host.command_as(&program, &["base", "mnt", "-o", &format!("{options},{store}")]).output().unwrap();
        let told = host.told(&[], &output);
        assert!(output.status.success() && !told.contains("--- stderr"), "{told}");
    };
    let options = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(4) == mnt.to_str()).unwrap();
        let mut options: Vec<_> = line.split(' ').nth(5).unwrap().split(',').map(str::to_owned).collect();
        options.retain(|option| option != "relatime");
        options.join(",")
    };
    let again = || {
        kill_daemon_and_keeper(&host);
        host.json(&["daemon", "start"]);
    };
    mount("nosuid,nodev,noexec,ro,upper=web");
    assert_eq!(options(), "ro,nosuid,nodev,noexec");
    again();
    assert_eq!(options(), "ro,nosuid,nodev,noexec");
    let refused = std::fs::write(mnt.join("x"), "").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // As fstab's line asks for it then: it is there already.
    mount("nosuid,nodev,noexec,ro,upper=web");
    mount("remount,rw,nosuid,noatime");
    assert_eq!(options(), "rw,nosuid,noatime");
    std::fs::write(mnt.join("x"), "").unwrap();
    again();
    assert_eq!(options(), "rw,nosuid,noatime");
    assert_eq!(host.json(&["mounts"])["mounts"][0]["options"], serde_json::json!(["nosuid", "noatime"]));
    assert!(mnt.join("x").exists());
    // The line has changed meanwhile.
    mount("nodev,upper=web");
    assert!(options().starts_with("rw,nodev"), "{}", options());
    host.json(&["daemon", "stop"]);
    host.json(&["daemon", "start"]);
    assert!(options().starts_with("rw,nodev"), "{}", options());
    host.json(&["umount", "mnt"]);
}
