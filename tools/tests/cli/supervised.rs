//! A daemon that systemd started: reloaded, started again, and in the place of one that a command started.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use crate::host::Host;
use crate::life::is_alive;
use crate::mounts::{can_mount, mounted_base};

/// What systemd does with a unit of `Type=notify`: tells the daemon where it is told, and starts it again only when no reload
/// is under way.
struct Systemd<'h> {
    host: &'h Host,
    told: UnixDatagram,
    daemon: Option<Child>,
}

impl<'h> Systemd<'h> {
    fn new(host: &'h Host) -> Systemd<'h> {
        let told = UnixDatagram::bind(host.path("notify")).unwrap();
        told.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Systemd { host, told, daemon: None }
    }

    /// The program, which is not the one of the commands: it can be replaced.
    fn program(&self) -> PathBuf {
        self.host.path("layerctl")
    }

    fn install(&self) {
        let _ = fs::remove_file(self.program());
        let binary = env!("CARGO_BIN_EXE_layerctl");
        // A copy where it lies on another filesystem.
        fs::hard_link(binary, self.program()).or_else(|_| fs::copy(binary, self.program()).map(drop)).unwrap();
    }

    fn spawn(&self) -> Child {
        let mut command = self.host.command_as(&self.program(), &["daemon", "--foreground"]);
        command.env("NOTIFY_SOCKET", self.host.path("notify")).stdout(Stdio::null());
        command.stderr(File::options().create(true).append(true).open(self.host.path("log")).unwrap()).spawn().unwrap()
    }

    /// Starts the daemon; returns its process once it has said that it answers.
    fn start(&mut self) -> i32 {
        self.daemon = Some(self.spawn());
        self.wait_until_ready();
        self.daemon.as_ref().unwrap().id() as i32
    }

    fn wait_until_ready(&mut self) {
        let mut text = [0; 64];
        loop {
            if let Ok(count) = self.told.recv(&mut text) {
                assert_eq!(&text[..count], b"READY=1");
                return;
            }
            let ended = self.daemon.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", fs::read_to_string(self.host.path("log")).unwrap());
        }
    }

    /// The command of the unit's reload.
    fn reload(&self) -> Output {
        let mut command = self.host.command(&["--json", "daemon", "restart"]);
        command.env("MAINPID", self.daemon.as_ref().unwrap().id().to_string()).output().unwrap()
    }
}

impl Drop for Systemd<'_> {
    fn drop(&mut self) {
        let _ = self.host.command(&["daemon", "stop", "--force"]).output();
        if let Some(daemon) = &mut self.daemon {
            // If it is there still, after a test that failed.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Says something more to a file that was opened before, and reads all of it.
fn goes_on(file: &mut File, said: &mut String, more: &str) {
    file.write_all(more.as_bytes()).unwrap();
    said.push_str(more);
    let mut found = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut found).unwrap();
    assert_eq!(found, *said);
}

fn open(host: &Host) -> File {
    File::options().read(true).write(true).create_new(true).open(host.path("mnt/held")).unwrap()
}

#[test]
fn a_reload_goes_over_in_one_process() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["daemon", "stop"]);
    let mut systemd = Systemd::new(&host);
    systemd.install();
    let pid = systemd.start();
    host.json(&["mount", "base", "mnt"]);
    let (mut held, mut said) = (open(&host), String::new());
    goes_on(&mut held, &mut said, "before\n");
    let instance = || host.json(&["daemon", "status"])["instance"].as_u64().unwrap();
    let before = instance();

    systemd.install();
    let old = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(old.to_string_lossy().ends_with(" (deleted)"), "{old:?}");
    let reloaded = systemd.reload();
    assert!(reloaded.status.success(), "{}", host.told(&["daemon", "restart"], &reloaded));
    systemd.wait_until_ready();
    assert_eq!(host.daemon_pid(), pid);
    assert_ne!(instance(), before);
    assert_eq!(fs::read_link(format!("/proc/{pid}/exe")).unwrap(), systemd.program().canonicalize().unwrap());
    goes_on(&mut held, &mut said, "after\n");

    // Nothing that can be run: it ends, and the reload with it, so that systemd goes on.
    fs::remove_file(systemd.program()).unwrap();
    let reloaded = systemd.reload();
    let told = host.told(&["daemon", "restart"], &reloaded);
    assert!(told.contains("systemd starts another") && told.ends_with("--- exit 1\n"), "{told}");
    assert_eq!(systemd.daemon.as_mut().unwrap().wait().unwrap().code(), Some(75));
    systemd.install();
    assert_ne!(systemd.start(), pid);
    goes_on(&mut held, &mut said, "started again\n");
    drop(held);
    host.json(&["umount", "mnt", "--discard"]);
}

#[test]
fn it_takes_the_place_of_one_that_a_command_started() {
    if !can_mount() {
        return;
    }
    let host = mounted_base();
    host.json(&["mount", "base", "mnt"]);
    let (mut held, mut said) = (open(&host), String::new());
    goes_on(&mut held, &mut said, "before\n");
    let autostarted = host.daemon_pid();

    let mut systemd = Systemd::new(&host);
    systemd.install();
    let pid = systemd.start();
    let status = host.json(&["daemon", "status"]);
    assert_eq!((&status["pid"], &status["autostarted"], &status["mounts"]), (&pid.into(), &false.into(), &1.into()));
    assert!(!is_alive(autostarted));
    goes_on(&mut held, &mut said, "after\n");

    // But not of one that systemd started.
    let refused = systemd.spawn().wait().unwrap();
    let log = fs::read_to_string(host.path("log")).unwrap();
    assert_eq!(refused.code(), Some(5), "{log}");
    assert!(log.contains("a daemon runs already") && log.contains("would start it again"), "{log}");
    assert_eq!(host.daemon_pid(), pid);
    goes_on(&mut held, &mut said, "still\n");
    drop(held);
    host.json(&["umount", "mnt", "--discard"]);
}
