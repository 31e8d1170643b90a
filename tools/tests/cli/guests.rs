//! Commands in guests, where these can be run.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::host::{Host, noise};
use crate::mounts::can_mount;

/// Puts programs of this machine into a tree, with the libraries that they need.
fn install(tree: &Path, programs: &[&str]) {
    for program in programs {
        let needed = Command::new("ldd").arg(program).output().unwrap().stdout;
        let needed = String::from_utf8(needed).unwrap();
        let libraries = needed.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain([*program]) {
            let target = tree.join(file.trim_start_matches('/'));
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            std::fs::copy(file, target).unwrap();
        }
    }
}

/// A host on which guest `web` runs, which ends when this is dropped: it doesn't end with the daemon.
struct WithGuest(Host);

impl Drop for WithGuest {
    fn drop(&mut self) {
        let pid = self.0.daemon_pid();
        let _ = self.0.output(&["guest", "remove", "web", "--force"]);
        // Its mount ends with the last of its processes. A daemon that left before would be followed by another.
        let has_mount = || {
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|file| file == Path::new("/dev/fuse"))
        };
        let began = std::time::Instant::now();
        while has_mount() && began.elapsed().as_secs() < 10 {
            std::thread::yield_now();
        }
    }
}

impl std::ops::Deref for WithGuest {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

/// A host on which guest `web` runs; none where it can't.
fn host_with_guest() -> Option<WithGuest> {
    if !can_mount() {
        return None;
    }
    let host = Host::new();
    let tree = host.path("tree");
    install(&tree, &["/bin/sh", "/bin/cat", "/bin/sleep", "/usr/bin/head"]);
    for folder in ["proc", "dev", "sys", "run", "tmp", "etc"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    host.json(&["import", "tree", "base"]);
    let made = host.output(&["guest", "create", "web", "--on", "base", "--", "/bin/sleep", "600"]);
    assert!(made.status.success(), "{made:?}");
    let checked = host.output(&["guest", "check", "web", "--json"]);
    let checked: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    if checked["run"].as_array().is_none_or(|obstacles| !obstacles.is_empty()) {
        let text = format!("NOT TESTED: guests: {}\n", checked["run"]);
        let _ = Write::write_all(&mut std::io::stderr(), text.as_bytes());
        return None;
    }
    let host = WithGuest(host);
    host.json(&["guest", "start", "web"]);
    Some(host)
}

#[test]
fn a_command_in_a_guest_has_this_commands_streams_and_exit_code() {
    let Some(host) = host_with_guest() else { return };
    let script = |text| ["guest", "exec", "web", "/bin/sh", "-c", text];
    let output = host.output(&script(r"printf 'a\0\377'; printf err >&2; exit 7"));
    assert_eq!((output.status.code(), &output.stdout[..], &output.stderr[..]), (Some(7), &b"a\0\xff"[..], &b"err"[..]));
    assert_eq!(host.output(&script("kill -9 $$")).status.code(), Some(137));
    assert_eq!(host.output(&["guest", "exec", "web", "--", "/no/such/program"]).status.code(), Some(127));
    // Nothing to read, unless it is asked for; then all of it, as it is.
    let told = host.run_with_stdin(&["guest", "exec", "web", "/bin/cat"], b"unread");
    assert!(!told.contains("unread") && told.ends_with("--- exit 0\n"), "{told}");
    let sent = noise(3 << 20);
    let mut cat = host.command(&["guest", "exec", "-i", "web", "--", "/bin/cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
    let given = sent.clone();
    let giving = std::thread::spawn(move || stdin.write_all(&given).unwrap());
    let mut back = Vec::new();
    stdout.read_to_end(&mut back).unwrap();
    giving.join().unwrap();
    assert!(back == sent && cat.wait().unwrap().success(), "{} bytes came back", back.len());
    // It may have had enough before the end, and say a lot.
    let some = host.run_with_stdin(&["guest", "exec", "-i", "web", "/bin/sh", "-c", "read -r line; echo $line"], &sent);
    assert!(some.ends_with("--- exit 0\n"), "{some}");
    let much = host.output(&["guest", "exec", "web", "/usr/bin/head", "-c", "40000000", "/dev/zero"]);
    assert_eq!(much.stdout.len(), 40_000_000);
    let json = host.json(&["guest", "exec", "--json", "web", "/bin/sh", "-c", "echo out; exit 0"]);
    assert_eq!((&json["code"], &json["stdout"]), (&0.into(), &"out\n".into()));
    assert_eq!(host.output(&["--json", "guest", "exec", "-i", "web", "/bin/cat"]).status.code(), Some(2));
    assert_eq!(host.output(&["guest", "exec", "nosuch", "/bin/cat"]).status.code(), Some(3));
}

#[test]
fn a_command_in_a_guest_ends_with_whoever_waits_for_it() {
    let Some(host) = host_with_guest() else { return };
    // Nobody else's.
    let time = format!("601.{}", std::process::id());
    let script = format!("echo begun; /bin/sleep {time}; :");
    for (signal, code) in [("-INT", Some(130)), ("-KILL", None)] {
        let mut command = host.command(&["guest", "exec", "-i", "web", "/bin/sh", "-c", &script]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut begun = [0; 6];
        // As it comes, not when it has ended.
        stdout.read_exact(&mut begun).unwrap();
        assert_eq!(&begun, b"begun\n");
        let sleeps = || {
            let line = format!("/bin/sleep\0{time}\0");
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let lines = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
            lines.filter(|found| *found == line.as_bytes()).count()
        };
        while sleeps() == 0 {
            std::thread::yield_now();
        }
        let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        assert_eq!(child.wait().unwrap().code(), code);
        let is_at_work = || !host.json(&["daemon", "status"])["work"].as_array().unwrap().is_empty();
        while is_at_work() {
            std::thread::yield_now();
        }
        assert_eq!(sleeps(), 0, "{signal}");
    }
}

#[test]
fn a_stop_names_the_guest_that_runs() {
    let Some(host) = host_with_guest() else { return };
    let told = host.run(&["daemon", "stop"]);
    assert!(told.contains("guest web runs") && told.contains("`layerctl guest stop web`"), "{told}");
    assert!(!told.contains("umount") && told.ends_with("--- exit 5\n"), "{told}");
}

#[test]
fn a_guest_that_does_not_run_says_how_it_would() {
    let Some(host) = host_with_guest() else { return };
    host.json(&["guest", "stop", "web"]);
    assert!(host.run(&["guest", "list"]).contains("  stopped"));
    for args in [&["guest", "exec", "web", "/bin/cat"][..], &["guest", "checkpoint", "web"]] {
        let told = host.run(args);
        assert!(told.contains("guest web isn't running") && told.contains("`layerctl guest start web`"), "{told}");
        assert!(told.ends_with("--- exit 5\n"), "{told}");
    }
    let resolved = host.run(&["guest", "resolve", "web"]);
    assert!(resolved.contains("`layerctl guest show web`") && resolved.ends_with("--- exit 3\n"), "{resolved}");
    assert!(host.run(&["guest", "create", "odd", "--on", "base", "--", "/no/such"]).ends_with("--- exit 0\n"));
    assert!(host.run(&["guest", "list"]).contains("  created"));
    let checked = host.run(&["guest", "check", "odd"]);
    assert!(checked.contains("there is no /no/such") && checked.ends_with("--- exit 7\n"), "{checked}");
    let started = host.run(&["guest", "start", "odd"]);
    assert!(started.contains("cannot start guest odd: cannot execute /no/such"), "{started}");
    assert_eq!(host.run(&["guest", "check", "odd"]), checked, "as before its start failed");
    assert!(!host.run(&["guest", "check", "web"]).contains("no /bin/sleep"));
}

#[test]
fn a_machine_has_something_to_start_from() {
    let host = Host::new();
    host.make_tree("tree");
    host.json(&["import", "tree", "base"]);
    host.json(&["guest", "create", "bare", "--driver", "qemu", "--on", "base"]);
    host.json(&["guest", "create", "whole", "--driver", "qemu", "--on", "base", "--disk", "data.bin"]);
    let refused = host.run(&["guest", "start", "bare"]);
    assert!(refused.contains("neither a disk nor a kernel") && refused.ends_with("--- exit 7\n"), "{refused}");
    assert!(refused.contains("there is no disk.raw in base"), "{refused}");
    assert!(host.run(&["guest", "check", "bare"]).contains("neither a disk nor a kernel"));
    assert!(!host.run(&["guest", "check", "whole"]).contains("neither a disk"));
}

#[test]
fn a_machine_starts_from_the_disk_in_its_stack() {
    let host = Host::new();
    std::fs::write(host.make_tree("tree").join("disk.raw"), "").unwrap();
    host.json(&["import", "tree", "debian-disk"]);
    let connected = ["--disk", "no.raw", "--network", "bridge:layerfs-none,10.0.0.2/24"];
    for (name, options) in [("vm", &[][..]), ("other", &connected[..2]), ("connected", &connected)] {
        let create = ["guest", "create", name, "--driver", "qemu", "--on", "debian-disk", "--memory", "1G"];
        host.json(&[&create[..], options].concat());
        // Whatever else is in its way here.
        for what in ["check", "start"] {
            let told = host.run(&["guest", what, name]);
            assert_eq!(told.contains("neither a disk nor a kernel"), name == "other", "{told}");
        }
        host.run(&["guest", "stop", name]);
    }
}
