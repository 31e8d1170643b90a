//! Mounts, where they can be made.

use std::path::{Path, PathBuf};

use crate::hold;
use crate::host::{Host, elsewhere};

/// Whether mounts can be made here; says so if not.
pub fn can_mount() -> bool {
    let is_root =
        std::fs::metadata("/proc/self").is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0);
    let can = is_root && Path::new("/dev/fuse").exists();
    if !can {
        // Written past the test's own capture, so that it is seen.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"NOT TESTED: mounts need root and /dev/fuse\n");
    }
    can
}

pub fn mounted_base() -> Host {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    std::fs::create_dir(host.path("mnt")).unwrap();
    host
}

/// The program by the name that `mount` calls it by.
pub fn helper(host: &Host) -> PathBuf {
    let helper = host.path("mount.layerfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_layerctl"), &helper).unwrap();
    helper
}

#[test]
fn mounts_of_another_namespace_are_listed_as_such() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["daemon", "stop"]);
    let args = ["--mount", "--propagation", "private", env!("CARGO_BIN_EXE_layerctl"), "mount", "base", "mnt"];
    let mounted = host.command_as(std::path::Path::new("unshare"), &args).output().unwrap();
    assert!(mounted.status.success(), "{mounted:?}");
    let listed = host.run(&["mounts"]);
    assert!(listed.contains("[host]/mnt is mounted, but not visible here"), "{listed}");
    host.json(&["umount", "mnt"]);
    host.json(&["daemon", "stop"]);
    host.json(&["mount", "base", "mnt", "--read-only"]);
    let listed = host.run(&["mounts"]);
    assert!(!listed.contains("not visible"), "{listed}");
    host.json(&["umount", "--all"]);
}

#[test]
fn what_is_mounted_in_a_mount_is_named() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    let inner = host.path("mnt/etc");
    let run = |program: &str, args: &[&str]| {
        assert!(std::process::Command::new(program).args(args).arg(&inner).status().unwrap().success(), "{program}");
    };
    run("mount", &["-t", "tmpfs", "none"]);
    let refused = [&["umount", "mnt"][..], &["daemon", "stop"]].map(|args| host.run(args));
    run("umount", &[]);
    for refused in refused {
        assert!(refused.contains("mounted in it, on [host]/mnt/etc") && refused.ends_with("--- exit 5\n"), "{refused}");
    }
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn mounted_changed_and_sealed() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    hold!(
        "mount",
        host.session(&[
            &["mount", "base", "mnt", "--upper", "work"],
            &["mounts"],
            &["mount", "base", "mnt"],
            &["mount", "base", "nowhere"]
        ])
    );
    assert_eq!(std::fs::read(host.path("mnt/etc/hostname")).unwrap(), b"edge\n");
    std::fs::write(host.path("mnt/etc/hostname"), "changed\n").unwrap();
    hold!(
        "seal",
        host.session(&[
            &["seal", "mnt", "base"],
            &["seal", "mnt", "app"],
            &["diff", "base", "app", "--summary"],
            &["seal", "mnt", "app:same"]
        ])
    );
    hold!("stop_busy", {
        let _held = std::fs::File::open(host.path("mnt/etc/hostname")).unwrap();
        let (pid, command) = (std::process::id(), std::fs::read_to_string("/proc/self/comm").unwrap());
        host.session(&[&["daemon", "stop"]]).replace(&format!("{pid} ({})", command.trim()), "[pid] ([command])")
    });
    hold!(
        "umount",
        host.session(&[
            &["umount", "mnt"],
            &["umount", "mnt"],
            &["uppers"],
            &["uppers", "remove", "work"],
            &["uppers", "remove", "work"]
        ])
    );
}

#[test]
fn nameless_changes_are_kept() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    std::fs::write(host.path("mnt/kept"), "kept\n").unwrap();
    let kept = &host.json(&["umount", "mnt"])["unmounted"][0]["kept_upper"];
    let upper = kept["id"].as_u64().unwrap().to_string();
    host.json(&["mount", "base", "mnt", "--upper", &upper]);
    assert_eq!(std::fs::read(host.path("mnt/kept")).unwrap(), b"kept\n");
    host.json(&["umount", "mnt", "--discard"]);
    assert!(host.json(&["uppers"])["uppers"].as_array().unwrap().is_empty());
    host.json(&["mount", "base", "mnt"]);
    assert!(host.json(&["umount", "mnt"])["unmounted"][0]["kept_upper"].is_null(), "an empty upper isn't kept");
}

#[test]
fn numbers_and_guests_names_are_no_uppers_names() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let refused = host.run(&["mount", "base", "mnt", "--upper", "7"]);
    assert!(refused.contains("upper 7 not found; a name needs something that isn't a digit"), "{refused}");
    assert!(refused.ends_with("--- exit 3\n"), "{refused}");
    let refused = host.run(&["mount", "base", "mnt", "--upper", "guest/web"]);
    assert!(refused.contains("are guests'") && refused.ends_with("--- exit 2\n"), "{refused}");
    assert!(host.json(&["uppers"])["uppers"].as_array().unwrap().is_empty());
}

#[test]
fn a_named_upper_is_kept_and_says_who_has_it() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    std::fs::write(host.path("mnt/kept"), "kept\n").unwrap();
    std::fs::create_dir(host.path("other")).unwrap();
    let refused = host.run(&["mount", "base", "other", "--upper", "work"]);
    assert!(refused.contains("upper work is mounted on [host]/mnt"), "{refused}");
    assert!(refused.contains("`layerctl umount [host]/mnt` first") && refused.ends_with("--- exit 5\n"), "{refused}");
    let told = host.run(&["umount", "mnt", "--discard"]);
    assert!(told.contains("upper work has a name and is kept; `layerctl uppers remove work`"), "{told}");
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    assert_eq!(std::fs::read(host.path("mnt/kept")).unwrap(), b"kept\n");
    let kept = &host.json(&["umount", "mnt", "--discard"])["unmounted"][0]["kept_upper"];
    assert_eq!(kept["name"], "work", "{kept}");
}

#[test]
fn mounts_in_mounts_are_unmounted_first() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let mount_both = || {
        host.json(&["mount", "base", "mnt"]);
        host.json(&["mount", "base", "mnt/etc"]);
    };
    mount_both();
    let unmounted = host.json(&["umount", "--all"]);
    let dirs: Vec<_> = unmounted["unmounted"].as_array().unwrap().iter().map(|one| one["dir"].as_str()).collect();
    let [inner, outer] = ["mnt/etc", "mnt"].map(|dir| host.path(dir).display().to_string());
    assert_eq!(dirs, [Some(&*inner), Some(&*outer)]);
    mount_both();
    let stopped = host.run(&["daemon", "stop"]);
    assert!(stopped.ends_with("--- exit 0\n"), "{stopped}");
    host.json(&["umount", "--all"]);
}

#[test]
fn a_copy_elsewhere_is_told_of_and_can_be_ended() {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    let mut other = Command::new(elsewhere());
    other.arg(host.path("mnt").canonicalize().unwrap()).arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut other = other.spawn().unwrap();
    // Once it answers, it has its namespace.
    other.stdin.as_mut().unwrap().write_all(b"?").unwrap();
    other.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let answer = host.json(&["umount", "mnt"]);
    let left = &answer["unmounted"][0];
    assert_eq!((&left["goes_on"], &left["used_by"][0]), (&true.into(), &format!("{} (cat)", other.id()).into()));
    let again = host.run(&["mount", "base", "mnt", "--upper", "work"]);
    assert!(again.contains("--everywhere") && again.contains("(cat)"), "{again}");
    assert_eq!(host.json(&["umount", "mnt", "--everywhere"])["unmounted"][0]["goes_on"], false);
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    assert_eq!(std::fs::read(host.path("mnt/etc/hostname")).unwrap(), b"edge\n");
    drop(other.stdin.take());
    other.wait().unwrap();
}

#[test]
fn a_copy_on_another_folder_is_told_of() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    std::fs::create_dir(host.path("other")).unwrap();
    rustix::mount::mount_bind(host.path("mnt"), host.path("other")).unwrap();
    let other = host.path("other").canonicalize().unwrap();
    let left = &host.json(&["umount", "mnt"])["unmounted"][0];
    assert_eq!((&left["goes_on"], &left["also_at"][0]), (&true.into(), &other.to_string_lossy().into()), "{left}");
    let again = host.run(&["mount", "base", "mnt", "--upper", "work"]);
    assert!(again.contains("goes on at") && again.contains("--everywhere"), "{again}");
    assert_eq!(host.json(&["umount", "mnt", "--everywhere"])["unmounted"][0]["goes_on"], false);
    rustix::mount::unmount(&other, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.json(&["mount", "base", "mnt", "--upper", "work"]);
    // What is detached isn't waited for, whoever uses it.
    let held = std::fs::File::open(host.path("mnt/etc/hostname")).unwrap();
    assert_eq!(host.json(&["umount", "mnt", "--lazy"])["unmounted"][0]["goes_on"], false);
    drop(held);
}

#[test]
fn nothing_is_mounted_over_the_store() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    for dir in ["store", "store/packs", "."] {
        let refused = host.run(&["mount", "base", dir]);
        assert!(refused.contains("in the way of"), "{refused}");
    }
    assert!(host.json(&["mounts"])["mounts"].as_array().unwrap().is_empty());
}

#[test]
fn what_guests_lie_on_stays_theirs() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["tag", "base", "other"]);
    let made = host.output(&["guest", "create", "web", "--driver", "process", "--on", "base", "--", "/bin/true"]);
    assert!(made.status.success(), "{made:?}");
    assert!(host.run(&["remove", "other", "base"]).contains("guest web lies on base"));
    assert_eq!(host.json(&["list"])["layers"].as_array().unwrap().len(), 2, "all of them, or none");
    host.json(&["remove", "other"]);
    for (args, code, said) in [
        (&["guest", "stop", "web"][..], 0, "guest web wasn't running"),
        (&["guest", "restore", "web"], 3, "`layerctl guest checkpoint web` makes one"),
        (&["guest", "restore", "nosuch"], 3, "guest \"nosuch\" not found"),
        (&["guest", "checkpoint", "web"], 5, "`layerctl guest start web`"),
        (
            &["guest", "create", "vm", "--on", "base", "--memory", "1G", "--", "/bin/true"],
            2,
            "--memory is for machines",
        ),
        (&["report", ""], 2, "isn't empty"),
    ] {
        let told = host.run(args);
        assert!(told.contains(said) && told.ends_with(&format!("--- exit {code}\n")), "{told}");
    }
    host.json(&["guest", "remove", "web"]);
    host.json(&["remove", "base"]);
}

#[test]
fn what_mounts_do_can_be_seen() {
    use std::io::{Read, Write};
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    // What is written to files of the upper's own is passed through, past the daemon; this one lies below.
    let mut below = std::fs::OpenOptions::new().write(true).open(host.path("mnt/data.bin")).unwrap();
    below.write_all(&[1; 100_000]).unwrap();
    drop(below);
    std::fs::File::create(host.path("mnt/made")).unwrap();
    let activity = host.json(&["mounts", "--rates"]);
    assert!(activity["uptime_seconds"].as_f64().unwrap() > 0.5 && activity["mounts"].as_array().unwrap().len() == 1);
    assert!(host.json(&["mounts", "--requests", "--longer", "1"])["requests"].as_array().unwrap().is_empty());
    let mut socket = std::os::unix::net::UnixStream::connect(host.store().join("control.sock")).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: layerfs\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    let dir = host.path("mnt");
    let expected = format!("layerfs_mount_written_bytes_total{{dir=\"{}\"}} 100000", dir.display());
    assert!(text.starts_with("HTTP/1.1 200") && text.contains(&expected), "{text}");
    let count = format!("layerfs_mount_request_seconds_count{{dir=\"{}\",op=\"make\"}} 1", dir.display());
    assert!(text.contains(&count) && text.contains("layerfs_chunk_cache_hits_total"), "{text}");
    hold!(
        "log_filter",
        host.session(&[
            &["daemon", "log-filter"],
            &["daemon", "log-filter", "layerfs=debug,warn"],
            &["daemon", "log-filter", "=x=y"],
            &["daemon", "log-filter"]
        ])
    );
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn seals_are_squashed() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    for round in 0..5 {
        std::fs::write(host.path("mnt/etc/hostname"), format!("round {round}\n")).unwrap();
        std::fs::write(host.path(&format!("mnt/of-round-{round}")), "").unwrap();
        host.json(&["seal", "mnt", "app", "--force", "--squash-past", "0"]);
    }
    host.json(&["tag", "app", "app:long"]);
    let layers = |name: &str| host.json(&["log", name])["layers"].as_array().unwrap().len();
    assert_eq!(layers("app"), 6);
    hold!(
        "squash",
        host.session(&[
            &["squash", "app", "--past", "5"],
            &["squash", "app", "--dry-run"],
            &["squash", "app"],
            &["diff", "app:long", "app"],
            &["squash", "base", "--onto", "app"],
            &["squash", "app:long", "--all", "--as", "base"],
            &["squash", "app:long", "--all", "--as", "flat"],
            &["squash", "app", "base", "--as", "both"]
        ])
    );
    assert_eq!((layers("app"), layers("app:long"), layers("flat")), (2, 6, 1));
    assert_eq!(std::fs::read(host.path("mnt/etc/hostname")).unwrap(), b"round 4\n");
    // The mount lies on the one layer now.
    let of = |field: &str| host.json(&["mounts"])["mounts"][0][field].clone();
    assert_eq!((of("layer_name"), of("layer")), ("app".into(), host.json(&["inspect", "app"])["layer"]["id"].clone()));
    for round in 5..9 {
        std::fs::write(host.path("mnt/etc/hostname"), format!("round {round}\n")).unwrap();
        let sealed = host.json(&["seal", "mnt", &format!("app{round}"), "--squash-past", "3"]);
        assert_eq!(sealed["squashed"], if round == 7 { 4 } else { 0 });
    }
    assert_eq!((layers("app7"), layers("app8")), (2, 3));
    assert_eq!(std::fs::read(host.path("mnt/etc/hostname")).unwrap(), b"round 8\n");
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn a_killed_daemon_mounts_again() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    std::fs::write(host.path("mnt/written"), "before\n").unwrap();
    let pid = host.daemon_pid().to_string();
    assert!(std::process::Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    while Path::new(&format!("/proc/{pid}")).exists() {
        std::thread::yield_now();
    }
    host.json(&["list"]);
    assert_eq!(std::fs::read(host.path("mnt/written")).unwrap(), b"before\n");
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn a_mistake_in_the_config_file_ends_no_mounts() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    let pid = host.daemon_pid();
    let config = std::fs::read(host.path("config.toml")).unwrap();
    // The client sees it before the daemon leaves.
    let wrong = "listen = \"off\"\nlog = \"foo=bar=baz\"\ncompression = 99\n";
    std::fs::write(host.path("config.toml"), wrong).unwrap();
    let refused = host.run(&["daemon", "restart"]);
    assert!(refused.contains("is no log filter") || refused.contains("is no level"), "{refused}");
    assert!(refused.ends_with("--- exit 2\n"), "{refused}");
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "it left all the same");
    // Nobody has looked at the file before a crash.
    let killed = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    std::fs::write(host.path("mnt/written"), "after\n").unwrap();
    std::fs::write(host.path("config.toml"), config).unwrap();
    // Once there is an answer, the mounts have been taken over.
    host.json(&["list"]);
    assert_ne!(host.daemon_pid(), pid);
    let log = std::fs::read_to_string(host.store().join("daemon.log")).unwrap();
    assert!(log.contains("without this: \"foo=bar=baz\"") && log.contains("without this: compression"), "{log}");
    host.json(&["daemon", "restart"]);
    assert_eq!(std::fs::read(host.path("mnt/written")).unwrap(), b"after\n");
    // Nor does an address that can't be had.
    std::fs::write(host.path("config.toml"), "listen = \"192.0.2.1\"\n").unwrap();
    host.json(&["daemon", "restart"]);
    assert!(host.json(&["daemon", "status"])["listen_error"].is_string());
    assert_eq!(std::fs::read(host.path("mnt/written")).unwrap(), b"after\n");
    host.json(&["umount", "mnt", "--discard"]);
}

/// A mount that peers or other clients make comes when nobody has looked at the config file.
#[test]
fn a_mistake_in_the_config_file_leaves_no_mount_without_a_keeper() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let pid = host.daemon_pid();
    let config = std::fs::read(host.path("config.toml")).unwrap();
    std::fs::write(host.path("config.toml"), "compression = 99\nno such key\n").unwrap();
    let mounted = host.request("mount", "", &format!("{{\"layer\": \"base\", \"dir\": {:?}}}", host.path("mnt")));
    assert!(mounted.starts_with("HTTP/1.1 200 "), "{mounted}");
    let status = host.request("status", "", "");
    let (_, body) = status.split_once("\r\n\r\n").unwrap();
    let status: serde_json::Value = serde_json::from_str(body).unwrap();
    assert!(status["mounts"] == 1 && status["keeper"].is_u64(), "{status}");
    let held = std::fs::File::open(host.path("mnt/etc/hostname")).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
    assert_eq!(std::io::read_to_string(held).unwrap(), "edge\n");
    std::fs::write(host.path("config.toml"), config).unwrap();
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn the_helper_of_mount() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let helper = helper(&host);
    let run = |args: &[&str]| {
        host.told(args, &host.command_as(&helper, args).output().unwrap()).replace("$ layerctl", "$ mount.layerfs")
    };
    let store = format!("store={}", host.store().display());
    let session = [
        run(&["base", "mnt", "-o", "strange"]),
        run(&["base", "mnt", "-f", "-o", "ro"]),
        run(&["base", "mnt", "-v", "-o", &format!("rw,nosuid,nodev,x-systemd.automount,upper=web,{store}")]),
        run(&["base", "mnt", "-o", &format!("remount,ro,{store}")]),
        run(&["nothing", "mnt", "-o", "ro"]),
    ];
    hold!("helper", session.join("\n"));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mnt = host.path("mnt");
    let line = mounts.lines().find(|line| line.contains(&*mnt.to_string_lossy())).unwrap();
    assert!(line.contains("ro,nosuid,nodev") || line.contains("ro,"), "{line}");
    assert!(std::fs::write(mnt.join("x"), "").is_err(), "it is read-only now");
    run(&["base", "mnt", "-o", &format!("remount,rw,{store}")]);
    std::fs::write(mnt.join("x"), "").unwrap();
    host.json(&["umount", "mnt"]);
}

#[test]
fn what_umount_has_left_can_be_mounted_at_once() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    let helper = helper(&host);
    std::fs::create_dir(host.path("other")).unwrap();
    let store = format!("store={}", host.store().display());
    let mount = |dir: &str, how: &str| {
        let args = ["base", dir, "-o", &format!("{how},upper=web,{store}")];
        let output = host.command_as(&helper, &args).output().unwrap();
        assert!(output.status.success(), "{}", host.told(&args, &output));
    };
    // Not by our own command, which waits until the daemon is done with it.
    let umount = |dir: &str| rustix::mount::unmount(host.path(dir), rustix::mount::UnmountFlags::empty()).unwrap();
    for round in 0..10 {
        let dir = if round % 2 == 0 { "mnt" } else { "other" };
        for how in ["rw", "rw", "ro"] {
            mount(dir, how);
            // Not by this process: a child of another test would hold a copy of the descriptor until its own program runs, and
            // the mount would be busy.
            let mut write = std::process::Command::new("sh");
            write.args(["-c", "printf %s \"$0\" >\"$1\"", how]).arg(host.path(dir).join(format!("of-{round}")));
            let written = write.output().unwrap();
            assert_eq!(written.status.success(), how == "rw", "mounted {how}: {written:?}");
            umount(dir);
        }
    }
    mount("mnt", "ro");
    for round in 0..10 {
        assert_eq!(std::fs::read(host.path("mnt").join(format!("of-{round}"))).unwrap(), b"rw");
    }
    host.json(&["umount", "mnt"]);
}

/// The keeper's daemon can't start while its program is away.
#[test]
fn a_killed_daemon_is_being_started() {
    if !can_mount() {
        return;
    }
    let host = Host::new();
    let (program, away) = (host.path("layerctl"), host.path("away"));
    let ours = Path::new(env!("CARGO_BIN_EXE_layerctl"));
    std::fs::hard_link(ours, &program).or_else(|_| std::fs::copy(ours, &program).map(drop)).unwrap();
    host.make_tree("tree");
    std::fs::create_dir(host.path("mnt")).unwrap();
    for args in [&["import", "tree", "base"][..], &["mount", "base", "mnt"]] {
        let output = host.command_as(&program, args).output().unwrap();
        assert!(output.status.success(), "{}", host.told(args, &output));
    }
    let before = host.json(&["daemon", "status"]);
    std::fs::rename(&program, &away).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(before["pid"].as_i64().unwrap() as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    // It dies when the kernel comes to that.
    let status = || host.output(&["daemon", "status", "--json"]);
    let until = |code: i32| {
        let began = std::time::Instant::now();
        loop {
            let output = status();
            if output.status.code() == Some(code) {
                return serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
            }
            assert!(began.elapsed().as_secs() < 60, "{}", host.told(&["daemon", "status"], &output));
        }
    };
    let between = until(5);
    assert_eq!((&between["running"], &between["starting"]), (&false.into(), &true.into()), "{between}");
    assert_eq!(between["keeper"], before["keeper"], "{between}");
    hold!("starting", host.run(&["daemon", "status"]).replace(&between["keeper"].to_string(), "[pid]"));
    std::fs::rename(&away, &program).unwrap();
    let after = until(0);
    assert_eq!((&after["keeper"], &after["mounts"]), (&before["keeper"], &1.into()), "{after}");
    assert_eq!(std::fs::read(host.path("mnt/etc/hostname")).unwrap(), b"edge\n");
    host.json(&["umount", "mnt"]);
    host.json(&["daemon", "stop"]);
    assert_eq!(until(3)["starting"], false);
}
