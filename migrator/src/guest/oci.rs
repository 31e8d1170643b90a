//! The driver "oci": a container by runc, on a bundle that is made of the guest's options.
//!
//! runc can't be kept between dumping and ending a container, so a dump ends the container: [`Container`] does the rest.
//!
//! In the run folder: `bundle/config.json`, `runc/` (runc's own state), `home/` (CRIU's settings).

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::container::{Container, DUMP_LOG, Engine, Outcome, PATIENCE, Site};
use super::criu::with_criu;
use super::errand::{Note, WORK_PATIENCE};
use super::exec::ANSWER_PATIENCE;
use super::network::Link;
use super::processes::{Process, wait_until};
use super::programs::{Programs, USUAL};
use super::{GuestRecord, Host, Manner, exec};
use crate::error::Result;

/// Sets `lo` up in the network namespace of the process that standard input, a container's state, names. runc does so for a container that
/// it starts and not for one that it restores, which would have no connections within itself, and couldn't be restored if it had some.
const LOOPBACK: &str = r#"pid=$(sed -n 's/.*"pid" *: *\([0-9][0-9]*\).*/\1/p') && exec nsenter --net="/proc/$pid/ns/net" ip link set lo up"#;
/// What stands in CRIU's log when connections may work.
const UNLOCK: &str = "Running network-unlock scripts";

/// A guest of this driver.
pub type OciGuest = Container<Runc>;

/// runc, for one container.
pub struct Runc {
    site: Site,
}

impl OciGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: Arc<dyn Host>, programs: Arc<Programs>) -> Result<OciGuest> {
        Ok(Container(Runc { site: Site::new(record, host, programs)? }))
    }
}

impl Runc {
    /// The id that runc and the control groups know it by: its own on this machine.
    fn id(&self) -> String {
        let hash = blake3::hash(self.site.run.as_os_str().as_encoded_bytes()).to_hex();
        format!("{}-{}", self.site.name, &hash[..10])
    }

    fn runc(&self) -> Outcome<Command> {
        self.runc_by(|program| self.site.programs.command(program))
    }

    fn runc_by(&self, command: impl FnOnce(PathBuf) -> Command) -> Outcome<Command> {
        let runc = self.site.programs.find("runc").ok_or("there is no runc: run scripts/setup guests")?;
        // CRIU reads its settings there; runc has no option for what they say.
        let home = self.site.run.join("home");
        fs::create_dir_all(home.join(".criu")).map_err(|error| format!("cannot make {}: {error}", home.display()))?;
        let settings = "network-lock nftables\nlink-remap\nghost-limit 64M\n";
        let path = home.join(".criu/default.conf");
        fs::write(&path, settings).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let mut command = command(runc);
        command.env("HOME", home).arg("--root").arg(self.site.run.join("runc")).stdout(Stdio::null());
        Ok(command)
    }

    /// Runs runc, which may leave its standard streams to the container; with a `note` of that, if it shall be known later.
    fn call(&self, words: &[&str], paths: &[(&str, &Path)], note: Option<Note<'_>>) -> Outcome<()> {
        let log = self.site.run.join("runc.log");
        let _ = fs::remove_file(&log);
        let mut command = match &note {
            Some(_) => self.runc_by(|program| self.site.programs.waiting(program))?,
            None => self.runc()?,
        };
        command.arg("--log").arg(&log).args(&words[..1]);
        for (option, path) in paths {
            command.arg(option).arg(path);
        }
        command.args(&words[1..]).arg(self.id()).stderr(Stdio::null());
        let status = match note {
            Some(note) => note.run(&mut command),
            // To start it may read much of its root from far away.
            None if words[0] == "run" => exec::status(&mut command, WORK_PATIENCE),
            None => exec::status(&mut command, ANSWER_PATIENCE),
        };
        let status = status.map_err(|error| format!("runc: {error}"))?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let mut messages =
            said.lines().filter_map(|line| line.split_once("msg=").map(|(_, message)| message.trim_matches('"')));
        Err(format!("runc {} failed: {}", words[0], messages.next_back().unwrap_or("it ended without a word")))
    }

    fn state(&self) -> Outcome<Option<Value>> {
        if !self.site.run.join("runc").exists() {
            return Ok(None);
        }
        let mut command = self.runc()?;
        let output = exec::answer(command.arg("list").args(["--format", "json"]));
        let output = output.map_err(|error| format!("runc: {error}"))?;
        let list: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("runc's list: {error}"))?;
        let id = self.id();
        Ok(list.as_array().and_then(|list| list.iter().find(|container| container["id"] == id.as_str())).cloned())
    }

    fn bundle(&self) -> Outcome<PathBuf> {
        let bundle = self.site.run.join("bundle");
        fs::create_dir_all(&bundle).map_err(|error| format!("cannot make {}: {error}", bundle.display()))?;
        let link = self.site.link();
        let config = self.config(link.as_ref().map(Link::namespace).as_deref());
        let text = serde_json::to_vec_pretty(&config).map_err(|error| error.to_string())?;
        fs::write(bundle.join("config.json"), text).map_err(|error| format!("cannot write the bundle: {error}"))?;
        Ok(bundle)
    }

    fn config(&self, network: Option<&Path>) -> Value {
        let env: Vec<String> =
            self.site.options.environment().iter().map(|(name, value)| format!("{name}={value}")).collect();
        let capabilities = CAPABILITIES;
        let sets = json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
        let mut namespaces = vec![
            json!({ "type": "pid" }),
            json!({ "type": "ipc" }),
            json!({ "type": "uts" }),
            json!({ "type": "mount" }),
        ];
        namespaces.push(match network {
            Some(path) => json!({ "type": "network", "path": path }),
            None => json!({ "type": "network" }),
        });
        // Its output goes where its own shell sends it, if it shall be kept: runc would pass on files of the host.
        let args = match &self.site.options.log {
            None => json!(self.site.options.command),
            Some(log) => {
                let words = ["/bin/sh", "-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh"].map(str::to_owned);
                let words =
                    words.into_iter().chain([log.display().to_string()]).chain(self.site.options.command.clone());
                json!(words.collect::<Vec<_>>())
            }
        };
        let tmpfs = |to: &str, options: &[&str]| json!({ "destination": to, "type": "tmpfs", "source": "tmpfs", "options": options });
        let hook = || json!({ "path": "/bin/sh", "args": ["sh", "-c", LOOPBACK], "env": [format!("PATH={}", USUAL.join(":"))] });
        let hooks: Vec<Value> = network.is_none().then(hook).into_iter().collect();
        json!({
            "ociVersion": "1.0.2",
            "hooks": { "createRuntime": hooks },
            "process": { "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": args, "env": env,
                "cwd": self.site.options.folder, "capabilities": sets },
            "root": { "path": self.site.root, "readonly": false },
            "hostname": self.site.hostname(),
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                tmpfs("/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
                tmpfs("/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777"]),
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            ],
            "linux": { "namespaces": namespaces, "cgroupsPath": format!("/layerfs/{}", self.id()) },
        })
    }

    /// Removes what runc still knows of it.
    fn forget(&self) -> Outcome<()> {
        if self.state()?.is_some() {
            self.call(&["delete", "--force"], &[], None)?;
        }
        Ok(())
    }

    /// Lets everything pass as soon as CRIU says in its log that connections may work, which it tells runc in a way that leaves no place
    /// for a script. If it is missed it is done after the restore.
    fn release_at_unlock(&self, log: &Path, is_over: &AtomicBool) {
        let Some(link) = self.site.link() else { return };
        let mut said = String::new();
        let mut file = None;
        wait_until(PATIENCE, || {
            file = file.take().or_else(|| fs::File::open(log).ok());
            if let Some(file) = &mut file {
                // What isn't text tells nothing.
                let _ = file.read_to_string(&mut said);
            }
            said.contains(UNLOCK) || is_over.load(Ordering::Relaxed)
        });
        if said.contains(UNLOCK)
            && let Err(error) = link.release()
        {
            tracing::debug!(guest = %self.site.name, %error, "connections are let through after the restore");
        }
    }

    /// Whether this runc can have CRIU keep files that are open under a name that is gone: from 1.2 on.
    fn has_link_remap(&self) -> bool {
        let help = self.runc().and_then(|mut command| exec::answer(command.args(["checkpoint", "--help"])));
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--link-remap"))
    }
}

impl Engine for Runc {
    fn site(&self) -> &Site {
        &self.site
    }

    fn program(&self) -> (&'static str, &'static str) {
        ("runc", "runc")
    }

    fn first(&self) -> Outcome<Option<Process>> {
        let state = self.state()?;
        let is_there = |state: &Value| matches!(state["status"].as_str(), Some("running" | "paused"));
        let pid = state.filter(is_there).and_then(|state| state["pid"].as_u64());
        Ok(pid.and_then(|pid| Process::of(pid as u32)).filter(Process::is_alive))
    }

    fn is_paused(&self) -> Outcome<bool> {
        Ok(self.state()?.is_some_and(|state| state["status"] == "paused"))
    }

    fn unpause(&self) -> Outcome<()> {
        self.call(&["resume"], &[], None)
    }

    fn launch(&self) -> Outcome<()> {
        let bundle = self.bundle()?;
        self.call(&["run", "--detach"], &[("--bundle", &bundle)], None)
    }

    fn command(&self, argv: &[OsString]) -> Outcome<Command> {
        let mut command = self.runc()?;
        command.arg("exec").arg(self.id()).args(argv);
        Ok(command)
    }

    fn save(&self, into: &Path) -> Outcome<()> {
        let paths: [(&str, &Path); 2] = [("--image-path", into), ("--work-path", &self.site.run)];
        let mut words = vec!["checkpoint", "--tcp-established", "--file-locks", "--ext-unix-sk"];
        if self.has_link_remap() {
            words.push("--link-remap");
        }
        let log = self.site.run.join(DUMP_LOG);
        let _ = fs::remove_file(&log);
        self.call(&words, &paths, Some(self.site.dump_to(into))).map_err(|error| with_criu(error, &log))
    }

    fn load(&self, from: &Path, manner: Manner) -> Outcome<()> {
        self.forget()?;
        let bundle = self.bundle()?;
        let paths: [(&str, &Path); 3] =
            [("--bundle", &bundle), ("--image-path", from), ("--work-path", &self.site.run)];
        let mut words = vec!["restore", "--detach", "--tcp-established", "--file-locks", "--ext-unix-sk"];
        if manner == Manner::Lazily {
            words.push("--lazy-pages");
        }
        let log = self.site.run.join("restore.log");
        let _ = fs::remove_file(&log);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| self.release_at_unlock(&log, &is_over));
            let restored = self.call(&words, &paths, Some(self.site.restore()));
            is_over.store(true, Ordering::Relaxed);
            restored
        })
        .map_err(|error| with_criu(error, &log))
    }

    fn settle(&self) -> Outcome<()> {
        // Control groups are busy until the kernel has done away with the last process.
        let mut outcome = Ok(());
        wait_until(PATIENCE, || {
            outcome = self.forget();
            outcome.is_ok()
        });
        outcome
    }
}

/// What root in a container may do, as container engines have it.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
