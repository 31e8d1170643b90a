//! The driver "lxc": a container by LXC's own tools, so that `lxc-ls`, `lxc-attach` and `lxc-info` see it too.
//!
//! As with runc, a dump ends the container: [`Container`] does the rest.
//!
//! In the run folder, which is LXC's path (`lxc-ls -P`): `NAME/config`, `home/` (CRIU's settings), `bin/` (CRIU as LXC calls
//! it for a restore).

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::container::{Container, DUMP_LOG, Engine, Outcome, PATIENCE, Site};
use super::criu::{NETWORK, external, quoted, with_criu, write_script, write_unlock};
use super::errand::{Note, WORK_PATIENCE};
use super::options::ContainerOptions;
use super::processes::{Process, wait_until};
use super::programs::{Programs, complaint};
use super::{GuestRecord, Host, Manner, exec};
use crate::error::Result;

/// What has lxc-checkpoint restore.
const RESTORE: &str = "-r";

/// A guest of this driver.
pub type LxcGuest = Container<Lxc>;

/// Its configuration is lines: an option that holds a line's end would bring settings of its own.
fn check(options: &ContainerOptions) -> layerfs::Result<()> {
    let words = options.command.iter().chain(options.env.keys()).chain(options.env.values()).chain(&options.hostname);
    let paths = [Some(&options.folder), options.log.as_ref()].into_iter().flatten();
    let mut bytes = words.map(String::as_bytes).chain(paths.map(|path| path.as_os_str().as_bytes()));
    if bytes.any(|bytes| bytes.contains(&b'\n')) {
        return Err(layerfs::Error::invalid(
            "an option of an LXC guest holds a line's end, which its configuration can't",
        ));
    }
    Ok(())
}

/// LXC's tools, for one container.
pub struct Lxc {
    site: Site,
}

impl LxcGuest {
    /// The guest with this record.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`] for options that it doesn't know; those of [`Host::run_folder`].
    pub fn new(record: &GuestRecord, host: Arc<dyn Host>, programs: Arc<Programs>) -> Result<LxcGuest> {
        let site = Site::new(record, host, programs)?;
        check(&site.options)?;
        Ok(Container(Lxc { site }))
    }
}

impl Lxc {
    /// A folder whose `criu` knows what LXC can't tell it: that its log isn't beside the state's files, which may be read-only; and the
    /// network namespace, with connections let through as soon as they may work.
    fn wrapper(&self) -> Outcome<PathBuf> {
        let mut more = format!("-o {}", quoted(&self.restore_log()));
        if let Some(link) = self.site.link() {
            let hook = write_unlock(&self.site.run, &link.release_line())?;
            let namespace = quoted(&link.namespace());
            more += &format!(" --action-script {} --inherit-fd fd[9]:{NETWORK} 9<{namespace}", quoted(&hook));
        }
        let folder = self.site.run.join("bin");
        fs::create_dir_all(&folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        let criu = quoted(self.site.programs.criu()?);
        // Of an option that is there twice CRIU takes the last.
        let script = format!("#!/bin/sh\n[ \"$1\" != restore ] || exec {criu} \"$@\" {more}\nexec {criu} \"$@\"\n");
        write_script(&folder.join("criu"), &script)?;
        Ok(folder)
    }

    fn restore_log(&self) -> PathBuf {
        self.site.run.join("restore.log")
    }

    fn home(&self) -> PathBuf {
        self.site.run.join("home")
    }

    /// CRIU reads its settings below `HOME`; LXC has no option for what they say.
    fn set_criu(&self, more: &str) -> Outcome<()> {
        let settings = "network-lock nftables\nghost-limit 64M\nlink-remap\nfile-locks\ntcp-established\n";
        let settings = format!("{settings}work-dir {}\n{more}", self.site.run.display());
        let home = self.home();
        fs::create_dir_all(home.join(".criu"))
            .and_then(|()| fs::write(home.join(".criu/default.conf"), settings))
            .map_err(|error| format!("cannot write CRIU's settings to {}: {error}", home.display()))
    }

    fn tool(&self, name: &str) -> Outcome<Command> {
        self.tool_by(name, |program| self.site.programs.command(program))
    }

    fn tool_by(&self, name: &str, command: impl FnOnce(PathBuf) -> Command) -> Outcome<Command> {
        let program =
            self.site.programs.find(name).ok_or_else(|| format!("there is no {name}: apt-get install lxc"))?;
        let mut command = command(program);
        command.env("HOME", self.home()).arg("-P").arg(&self.site.run).arg("-n").arg(self.site.name.as_str());
        Ok(command)
    }

    /// Runs one of LXC's tools; what it has to say goes to a log. One that works on a state's folder is noted.
    fn call(&self, name: &str, words: &[&str], state: Option<(&Path, Note<'_>)>) -> Outcome<()> {
        let log = self.site.run.join("lxc.log");
        let _ = fs::remove_file(&log);
        let mut command = match &state {
            Some(_) => self.tool_by(name, |program| self.site.programs.waiting(program))?,
            None => self.tool(name)?,
        };
        if words.first() == Some(&RESTORE) {
            self.site.programs.put_first(&mut command, &self.wrapper()?);
        }
        command.arg("-o").arg(&log).args(["-l", "ERROR"]).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((folder, _)) = &state {
            command.arg("-D").arg(folder);
        }
        command.args(words);
        let status = match state {
            Some((_, note)) => note.run(&mut command),
            None => exec::status(&mut command, WORK_PATIENCE),
        };
        let status = status.map_err(|error| format!("{name}: {error}"))?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let lines = said.lines().filter_map(|line| line.split_once("ERROR").map(|(_, rest)| rest.trim()));
        let first = lines.take(3).collect::<Vec<_>>().join("; ");
        Err(format!("{name} failed: {}", if first.is_empty() { "it ended without a word" } else { &first }))
    }

    /// Writes the container's configuration.
    fn configure(&self) -> Outcome<()> {
        let folder = self.site.run.join(self.site.name.as_str());
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(folder.join("config"), self.config()))
            .map_err(|error| format!("cannot write the container's configuration: {error}"))
    }

    fn config(&self) -> String {
        let mut text = format!("lxc.rootfs.path = dir:{}\n", self.site.root.display());
        let hostname = self.site.hostname();
        let mut put = |key: &str, value: &str| {
            // Writing to memory can't fail.
            let _ = writeln!(text, "{key} = {value}");
        };
        put("lxc.uts.name", &hostname);
        match self.site.link() {
            // A namespace of ours: LXC leaves it as it is.
            Some(link) => put("lxc.namespace.share.net", &link.namespace().display().to_string()),
            None => put("lxc.net.0.type", "empty"),
        }
        for (key, value) in SETTINGS {
            put(key, value);
        }
        // Named without need, it keeps CRIU from restoring where there is no AppArmor.
        if fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y')) {
            put("lxc.apparmor.profile", "unconfined");
        }
        put("lxc.init.cwd", &self.site.options.folder.display().to_string());
        for (name, value) in self.site.options.environment() {
            put("lxc.environment", &format!("{name}={value}"));
        }
        // For people who look: it is started with its words as they are, as LXC splits these at every space.
        put("lxc.init.cmd", &self.command().join(" "));
        text
    }

    /// The command, with its output sent to its log.
    fn command(&self) -> Vec<String> {
        let options = &self.site.options;
        let mut words = options.command.clone();
        if let Some(log) = &options.log {
            let shell = ["/bin/sh", "-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh"].map(str::to_owned);
            words.splice(0..0, shell.into_iter().chain([log.display().to_string()]));
        }
        words
    }

    /// What LXC knows of it.
    fn info(&self, option: &str) -> Outcome<String> {
        let mut command = self.tool("lxc-info")?;
        let output = exec::answer(command.args([option, "-H"])).map_err(|error| format!("lxc-info: {error}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn is_configured(&self) -> bool {
        self.site.run.join(self.site.name.as_str()).exists()
    }

    /// Waits until LXC's monitor has ended too: until then a new container would be refused.
    fn wait_stopped(&self) -> Outcome<()> {
        if !self.is_configured() {
            return Ok(());
        }
        let mut state = String::new();
        let is_stopped = wait_until(PATIENCE, || {
            state = self.info("-s").unwrap_or_else(|error| error);
            state == "STOPPED"
        });
        if is_stopped { Ok(()) } else { Err(format!("LXC says that it is {state}")) }
    }
}

impl Engine for Lxc {
    fn site(&self) -> &Site {
        &self.site
    }

    fn program(&self) -> (&'static str, &'static str) {
        ("lxc-start", "lxc")
    }

    fn first(&self) -> Outcome<Option<Process>> {
        if !self.is_configured() {
            return Ok(None);
        }
        let pid = self.info("-p")?.parse::<u32>().ok().filter(|pid| *pid > 0);
        Ok(pid.and_then(Process::of).filter(Process::is_alive))
    }

    fn is_paused(&self) -> Outcome<bool> {
        Ok(self.is_configured() && self.info("-s")? == "FROZEN")
    }

    fn unpause(&self) -> Outcome<()> {
        let thawed = exec::answer(&mut self.tool("lxc-unfreeze")?).map_err(|error| format!("lxc-unfreeze: {error}"))?;
        if thawed.status.success() { Ok(()) } else { Err(format!("lxc-unfreeze failed: {}", complaint(&thawed))) }
    }

    fn launch(&self) -> Outcome<()> {
        self.configure()?;
        let command = self.command();
        let words: Vec<&str> = ["-d", "--"].into_iter().chain(command.iter().map(String::as_str)).collect();
        self.call("lxc-start", &words, None)
    }

    fn command(&self, argv: &[OsString]) -> Outcome<Command> {
        let mut command = self.tool("lxc-attach")?;
        command.arg("--clear-env").arg("--").args(argv);
        Ok(command)
    }

    fn save(&self, into: &Path) -> Outcome<()> {
        // The namespace is ours: it is neither saved nor made.
        let network = match self.site.link() {
            Some(link) => format!("external {}\n", external(&link.namespace())?),
            None => String::new(),
        };
        self.set_criu(&network)?;
        self.call("lxc-checkpoint", &["-s"], Some((into, self.site.dump_to(into))))
            .map_err(|error| with_criu(error, &into.join(DUMP_LOG)))?;
        // It is no part of the state.
        let _ = fs::remove_file(into.join(DUMP_LOG));
        Ok(())
    }

    fn load(&self, from: &Path, manner: Manner) -> Outcome<()> {
        self.configure()?;
        self.wait_stopped()?;
        self.set_criu(if manner == Manner::Lazily { "lazy-pages\n" } else { "" })?;
        let log = self.restore_log();
        let _ = fs::remove_file(&log);
        self.call("lxc-checkpoint", &[RESTORE], Some((from, self.site.restore())))
            .map_err(|error| with_criu(error, &log))?;
        let mut found = None;
        wait_until(PATIENCE, || {
            found = self.first().ok().flatten();
            found.is_some()
        });
        found.map(|_| ()).ok_or_else(|| "LXC restored it, and it is gone".to_owned())
    }

    fn settle(&self) -> Outcome<()> {
        self.wait_stopped()
    }
}

/// What a container that CRIU shall dump has to be like, and what every one of ours has.
const SETTINGS: [(&str, &str); 8] = [
    ("lxc.console.path", "none"),
    ("lxc.tty.max", "0"),
    ("lxc.pty.max", "1"),
    ("lxc.mount.auto", "proc:rw sys:rw"),
    ("lxc.autodev", "1"),
    ("lxc.signal.halt", "SIGKILL"),
    ("lxc.signal.stop", "SIGKILL"),
    ("lxc.monitor.unshare", "0"),
];

#[cfg(test)]
mod tests {
    use layerfs::store::{Store, StoreOptions};

    use super::*;
    use crate::guest::fake::{FakeHost, World};
    use crate::guest::{GuestName, GuestSpec};

    #[test]
    fn what_criu_says_of_a_restore_is_not_written_into_the_state() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let host = FakeHost::new("a", store, folder.path(), &World::new());
        write_script(&folder.path().join("criu"), "#!/bin/sh\necho \"$@\"\n").unwrap();
        let programs = Programs::new(folder.path().into(), "layerctl".into(), Some(folder.path().into()));
        let spec = GuestSpec {
            name: GuestName::new("web").unwrap(),
            driver: "lxc".to_owned(),
            stack: layerfs::LayerName::new("app").unwrap(),
            options: serde_json::json!({ "command": ["/bin/prog"] }),
        };
        let guest = LxcGuest::new(&GuestRecord::new(spec), host, Arc::new(programs)).unwrap().0;
        let criu = guest.wrapper().unwrap().join("criu");
        let told = |action: &str| {
            let output = Command::new(&criu).args([action, "-o", "/state/log"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(told("restore"), format!("restore -o /state/log -o {}\n", guest.restore_log().display()));
        assert_eq!(told("dump"), "dump -o /state/log\n");
    }

    #[test]
    fn no_option_brings_a_line_of_its_own() {
        let read = |more: serde_json::Value| {
            let mut all = serde_json::json!({ "command": ["/bin/prog"] });
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            check(&ContainerOptions::read(&all).unwrap())
        };
        assert!(
            read(serde_json::json!({ "hostname": "web", "folder": "/srv", "log": "/log", "env": { "A": "b" } }))
                .is_ok()
        );
        for (option, value) in [
            ("command", serde_json::json!(["/bin/prog", "a\nb"])),
            ("env", serde_json::json!({ "A": "b\nlxc.hook.start = /bin/sh" })),
            ("env", serde_json::json!({ "A\n": "b" })),
            ("hostname", serde_json::json!("web\nlxc.hook.start-host = /bin/sh")),
            ("folder", serde_json::json!("/\n")),
            ("log", serde_json::json!("/log\n")),
        ] {
            let mut more = serde_json::Map::new();
            more.insert(option.to_owned(), value);
            assert!(read(more.into()).is_err(), "{option}");
        }
    }
}
