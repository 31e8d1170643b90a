//! Runs `layerctl` against one store, as a person would, and keeps what it said.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

/// The longest that any single command of a test may take.
const PATIENCE_SECONDS: &str = "300";

/// The `layerctl` that is tested: `LAYERCTL`, or the one that lies beside this test binary.
pub fn binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("LAYERCTL") {
        return Ok(path.into());
    }
    let me = std::env::current_exe().context("cannot find this program's own path")?;
    let found = me.ancestors().skip(1).take(3).map(|folder| folder.join("layerctl")).find(|path| path.is_file());
    found.with_context(|| format!("no layerctl beside {}: run `make build` first", me.display()))
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// The command, for messages.
    pub command: String,
    /// The exit code; 128 + n for signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The answer, if the command succeeded.
    pub fn ok(self) -> anyhow::Result<Answer> {
        ensure!(
            self.code == 0,
            "{} failed with exit code {}\n{}\n{}",
            self.command,
            self.code,
            self.text(),
            self.stderr
        );
        Ok(self)
    }

    /// The message on standard error, if the command failed with exit code `code` and a message worth the name.
    pub fn failed_with(self, code: i32) -> anyhow::Result<String> {
        ensure!(
            self.code == code,
            "{}: exit code {} instead of {code}\n{}\n{}",
            self.command,
            self.code,
            self.text(),
            self.stderr
        );
        ensure!(!self.stderr.trim().is_empty(), "{} failed without a word", self.command);
        ensure!(!self.stderr.contains("panicked at"), "{} panicked:\n{}", self.command, self.stderr);
        Ok(self.stderr)
    }
}

/// `layerctl` for one store, perhaps inside a network namespace.
#[derive(Clone, Debug)]
pub struct Ctl {
    binary: PathBuf,
    store: PathBuf,
    namespace: Option<String>,
}

impl Ctl {
    /// A client for the store at `store`.
    pub fn new(store: &Path, namespace: Option<&str>) -> anyhow::Result<Ctl> {
        Ok(Ctl { binary: binary()?, store: store.to_owned(), namespace: namespace.map(str::to_owned) })
    }

    /// The command, ready to be run, with an environment that holds nothing of the user's own set-up.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Command {
        let mut line: Vec<OsString> = Vec::new();
        if let Some(namespace) = &self.namespace {
            // Only the network: `ip netns exec` would hide the daemon's mounts in a mount namespace of their own.
            line.extend(["nsenter".into(), format!("--net=/run/netns/{namespace}").into(), "--".into()]);
        }
        line.extend([self.binary.clone().into_os_string(), "--store".into(), self.store.clone().into_os_string()]);
        line.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null());
        for name in ["LAYERFS_STORE", "LAYERFS_CONFIG", "RUST_LOG"] {
            command.env_remove(name);
        }
        command
            .env("XDG_CONFIG_HOME", self.store.with_extension("config"))
            .env("NO_COLOR", "1")
            .env("RUST_BACKTRACE", "0");
        command
    }

    /// Runs a command to its end.
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> anyhow::Result<Answer> {
        let command = self.command(args);
        let mut bounded = Command::new("timeout");
        bounded
            .args(["--kill-after=10", PATIENCE_SECONDS])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => bounded.env(name, value),
                None => bounded.env_remove(name),
            };
        }
        let output = bounded.output().context("cannot run layerctl")?;
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let command =
            format!("layerctl {}", command.get_args().map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "));
        ensure!(
            code != 124,
            "{command} did not end within {PATIENCE_SECONDS} s\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Answer {
            command,
            code,
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command that must succeed.
    pub fn ok<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> anyhow::Result<Answer> {
        self.run(args)?.ok()
    }

    /// Runs a command that must succeed, with `--json`, and reads its answer.
    pub fn json<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> anyhow::Result<Value> {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned()).chain(["--json".into()]).collect::<Vec<_>>();
        let answer = self.ok(args)?;
        serde_json::from_slice(&answer.stdout)
            .with_context(|| format!("{} did not answer JSON: {}", answer.command, answer.text()))
    }

    /// The store's folder.
    pub fn store(&self) -> &Path {
        &self.store
    }
}

/// The number at `path` (names separated by dots) in `value`.
pub fn number(value: &Value, path: &str) -> anyhow::Result<u64> {
    let found = path.split('.').try_fold(value, |value, key| value.get(key));
    found.and_then(Value::as_u64).with_context(|| format!("no number {path:?} in {value}"))
}
