//! The driver "oci": a container by runc, on a bundle that is made of the guest's options.
//!
//! runc can't be kept between dumping and ending a container (it speaks to CRIU in a way that leaves no place for a script),
//! so a dump ends the container, and rolling back restores it from the files that were just written. Meanwhile nothing is heard of it:
//! its network is held back before, and outlives it.
//!
//! In the run folder: `bundle/config.json`, `runc/` (runc's own state), `dumped` (where the state of a container that stands
//! still is), `home/` (CRIU's settings).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::criu::with_criu;
use super::network::Link;
use super::options::ContainerOptions;
use super::processes::{Process, status_bytes, wait_until};
use super::programs::Programs;
use super::{
    Activity, ExecOutput, Guest, GuestName, GuestRecord, Host, Manner, Obstacle, Side, Status, Written, preflight,
    scan, state,
};
use crate::error::{Error, Result};

const PATIENCE: Duration = Duration::from_secs(30);

/// A guest of this driver.
pub struct OciGuest {
    name: GuestName,
    options: ContainerOptions,
    programs: Arc<Programs>,
    run: PathBuf,
    root: PathBuf,
}

type Outcome<T> = std::result::Result<T, String>;

impl OciGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: &dyn Host, programs: Arc<Programs>) -> Result<OciGuest> {
        let name = record.spec.name.clone();
        let options = ContainerOptions::read(&record.spec.options)?;
        let (run, root) = (host.run_folder(&name)?, host.root(&name));
        Ok(OciGuest { name, options, programs, run, root })
    }

    fn failed(&self, action: &'static str) -> impl Fn(String) -> Error + '_ {
        move |detail| Error::guest(action, &self.name, detail)
    }

    fn link(&self) -> Option<Link<'_>> {
        Link::of(&self.programs, &self.options.network, &self.name, &self.run)
    }

    fn dumped(&self) -> PathBuf {
        self.run.join("dumped")
    }

    /// The id that runc and the control groups know it by: its own on this machine.
    fn id(&self) -> String {
        let hash = blake3::hash(self.run.as_os_str().as_encoded_bytes()).to_hex();
        format!("{}-{}", self.name, &hash[..10])
    }

    fn runc(&self) -> Outcome<Command> {
        let runc = self.programs.find("runc").ok_or("there is no runc: run scripts/setup guests")?;
        // CRIU reads its settings there; runc has no option for what they say.
        let home = self.run.join("home");
        fs::create_dir_all(home.join(".criu")).map_err(|error| format!("cannot make {}: {error}", home.display()))?;
        let settings = "network-lock nftables\nlink-remap\nghost-limit 64M\n";
        let path = home.join(".criu/default.conf");
        fs::write(&path, settings).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let mut command = self.programs.command(runc);
        command.env("HOME", home).arg("--root").arg(self.run.join("runc")).stdout(Stdio::null());
        Ok(command)
    }

    /// Runs runc, which may leave its standard streams to the container.
    fn call(&self, words: &[&str], paths: &[(&str, &Path)]) -> Outcome<()> {
        let log = self.run.join("runc.log");
        let _ = fs::remove_file(&log);
        let mut command = self.runc()?;
        command.arg("--log").arg(&log).args(&words[..1]);
        for (option, path) in paths {
            command.arg(option).arg(path);
        }
        command.args(&words[1..]).arg(self.id()).stderr(Stdio::null());
        let status = command.status().map_err(|error| format!("runc cannot be run: {error}"))?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let mut messages =
            said.lines().filter_map(|line| line.split_once("msg=").map(|(_, message)| message.trim_matches('"')));
        Err(format!("runc {} failed: {}", words[0], messages.next_back().unwrap_or("it ended without a word")))
    }

    fn state(&self) -> Outcome<Option<Value>> {
        if !self.run.join("runc").exists() {
            return Ok(None);
        }
        let mut command = self.runc()?;
        let output = command.arg("list").args(["--format", "json"]).stdout(Stdio::piped()).output();
        let output = output.map_err(|error| format!("runc cannot be run: {error}"))?;
        let list: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("runc's list: {error}"))?;
        let id = self.id();
        Ok(list.as_array().and_then(|list| list.iter().find(|container| container["id"] == id.as_str())).cloned())
    }

    fn first(&self) -> Outcome<Option<Process>> {
        let state = self.state()?;
        let is_there = |state: &Value| matches!(state["status"].as_str(), Some("running" | "paused"));
        let pid = state.filter(is_there).and_then(|state| state["pid"].as_u64());
        Ok(pid.and_then(|pid| Process::of(pid as u32)).filter(Process::is_alive))
    }

    fn running(&self, action: &'static str) -> Result<Process> {
        let failed = self.failed(action);
        self.first().map_err(&failed)?.ok_or_else(|| failed("it isn't running".to_owned()))
    }

    fn bundle(&self) -> Outcome<PathBuf> {
        let bundle = self.run.join("bundle");
        fs::create_dir_all(&bundle).map_err(|error| format!("cannot make {}: {error}", bundle.display()))?;
        let link = self.link();
        let config = self.config(link.as_ref().map(Link::namespace).as_deref());
        let text = serde_json::to_vec_pretty(&config).map_err(|error| error.to_string())?;
        fs::write(bundle.join("config.json"), text).map_err(|error| format!("cannot write the bundle: {error}"))?;
        Ok(bundle)
    }

    fn config(&self, network: Option<&Path>) -> Value {
        let env: Vec<String> =
            self.options.environment().iter().map(|(name, value)| format!("{name}={value}")).collect();
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
        let args = match &self.options.log {
            None => json!(self.options.command),
            Some(log) => {
                let words = ["/bin/sh", "-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh"].map(str::to_owned);
                let words = words.into_iter().chain([log.display().to_string()]).chain(self.options.command.clone());
                json!(words.collect::<Vec<_>>())
            }
        };
        let tmpfs = |to: &str, options: &[&str]| json!({ "destination": to, "type": "tmpfs", "source": "tmpfs", "options": options });
        json!({
            "ociVersion": "1.0.2",
            "process": { "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": args, "env": env,
                "cwd": self.options.folder, "capabilities": sets },
            "root": { "path": self.root, "readonly": false },
            "hostname": self.options.hostname.clone().unwrap_or_else(|| self.name.to_string()),
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
            self.call(&["delete", "--force"], &[])?;
        }
        Ok(())
    }

    fn end(&self, action: &'static str) -> Result<()> {
        let failed = self.failed(action);
        if let Some(process) = self.first().map_err(&failed)? {
            process.kill();
            if !process.wait_gone(PATIENCE) {
                return Err(failed(format!("process {} does not end", process.pid)));
            }
        }
        // Control groups are busy until the kernel has done away with the last process.
        let mut outcome = Ok(());
        wait_until(PATIENCE, || {
            outcome = self.forget();
            outcome.is_ok()
        });
        outcome.map_err(&failed)?;
        let _ = fs::remove_file(self.dumped());
        self.link().map_or(Ok(()), |link| link.remove().map_err(&failed))
    }

    fn restore_from(&self, from: &Path) -> Outcome<()> {
        self.forget()?;
        let bundle = self.bundle()?;
        let paths: [(&str, &Path); 3] = [("--bundle", &bundle), ("--image-path", from), ("--work-path", &self.run)];
        self.call(&["restore", "--detach", "--tcp-established", "--file-locks", "--ext-unix-sk"], &paths)
            .map_err(|error| with_criu(error, &self.run.join("restore.log")))
    }

    /// Whether this runc can have CRIU keep files that are open under a name that is gone: from 1.2 on.
    fn has_link_remap(&self) -> bool {
        let help = self.runc().and_then(|mut command| {
            let asked = command.args(["checkpoint", "--help"]).stdout(Stdio::piped()).output();
            asked.map_err(|error| error.to_string())
        });
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--link-remap"))
    }
}

impl Guest for OciGuest {
    fn preflight(&self, side: Side) -> Result<Vec<Obstacle>> {
        let mut found = preflight::host(&self.programs, side);
        found.extend(preflight::missing(&self.programs, "runc", "runc"));
        if let Some(link) = self.link() {
            found.extend(preflight::network(&self.programs, link.bridge(), link.has_bridge()));
        }
        if let (Side::Source, Ok(Some(process))) = (side, self.first()) {
            found.extend(preflight::processes(&process.tree()));
        }
        Ok(found)
    }

    fn start(&self) -> Result<()> {
        let failed = self.failed("start");
        if self.status()?.activity != Activity::Absent {
            return Err(failed("it runs already".to_owned()));
        }
        self.end("start")?;
        if let Some(link) = self.link() {
            link.make().map_err(&failed)?;
        }
        let started = self.bundle().and_then(|bundle| self.call(&["run", "--detach"], &[("--bundle", &bundle)]));
        let linked = started.and_then(|()| self.link().map_or(Ok(()), |link| link.release()));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("start");
        }
        linked.map_err(&failed)
    }

    fn stop(&self) -> Result<()> {
        self.end("stop")
    }

    fn exec(&self, argv: &[OsString]) -> Result<ExecOutput> {
        use std::os::unix::process::ExitStatusExt;
        self.running("run a command in")?;
        let failed = self.failed("run a command in");
        let mut command = self.runc().map_err(&failed)?;
        command.arg("exec").arg(self.id()).args(argv).stdout(Stdio::piped());
        let output = command.output().map_err(|error| failed(format!("runc cannot be run: {error}")))?;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        Ok(ExecOutput { code, stdout: output.stdout, stderr: output.stderr })
    }

    fn status(&self) -> Result<Status> {
        let process = self.first().map_err(self.failed("look at"))?;
        let activity = match &process {
            Some(_) => Activity::Running,
            None if self.dumped().exists() => Activity::Frozen,
            None => Activity::Absent,
        };
        let memory =
            process.as_ref().map(|process| process.tree().iter().filter_map(|pid| status_bytes(*pid, "VmRSS")).sum());
        Ok(Status { activity, pid: process.map(|process| process.pid), memory_bytes: memory })
    }

    fn scan(&self, into: &Path) -> Result<Written> {
        let process = self.running("scan")?;
        scan::tree(&process, into).map_err(self.failed("scan"))
    }

    fn dump(&self, into: &Path) -> Result<Written> {
        let process = self.running("dump")?;
        let failed = self.failed("dump");
        if let Some(link) = self.link() {
            link.hold().map_err(&failed)?;
        }
        let began = Instant::now();
        let paths: [(&str, &Path); 2] = [("--image-path", into), ("--work-path", &self.run)];
        let mut words = vec!["checkpoint", "--tcp-established", "--file-locks", "--ext-unix-sk"];
        if self.has_link_remap() {
            words.push("--link-remap");
        }
        let dumped = self.call(&words, &paths);
        let frozen = began.elapsed();
        if let Err(error) = dumped {
            if let Some(link) = self.link() {
                link.release().map_err(&failed)?;
            }
            return Err(failed(with_criu(error, &self.run.join("dump.log"))));
        }
        fs::write(self.dumped(), into.as_os_str().as_encoded_bytes())
            .map_err(|error| failed(format!("cannot note that it stands still: {error}")))?;
        if !process.wait_gone(PATIENCE) {
            return Err(failed("it was dumped and does not end".to_owned()));
        }
        let (memory_bytes, other_bytes) = state::sizes(into)?;
        Ok(Written { memory_bytes, other_bytes, frozen })
    }

    fn resume(&self) -> Result<()> {
        use std::os::unix::ffi::OsStringExt;
        let failed = self.failed("resume");
        if self.first().map_err(&failed)?.is_none() {
            let from = fs::read(self.dumped()).map_err(|_| failed("there is nothing left of it".to_owned()))?;
            self.restore_from(Path::new(&OsString::from_vec(from))).map_err(&failed)?;
        }
        let _ = fs::remove_file(self.dumped());
        self.link().map_or(Ok(()), |link| link.release().map_err(&failed))
    }

    fn discard(&self) -> Result<()> {
        self.end("discard")
    }

    fn restore(&self, from: &Path, _: Manner) -> Result<()> {
        let failed = self.failed("restore");
        if self.status()?.activity != Activity::Absent {
            return Err(failed("it runs already".to_owned()));
        }
        self.end("restore")?;
        if let Some(link) = self.link() {
            link.make().map_err(&failed)?;
        }
        let restored = self.restore_from(from);
        let linked = restored.and_then(|()| self.link().map_or(Ok(()), |link| link.release()));
        if linked.is_err() {
            // The failure is what counts.
            let _ = self.end("restore");
        }
        linked.map_err(&failed)
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
