//! One host: a store and a folder of its own, and a way to run layerctl and to hold what it says.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// `tests/elsewhere` of the clone in which this runs, which may have been built in another one with the same target folder: runs a
/// command in a mount namespace of its own.
pub fn elsewhere() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&here).join("../tests/elsewhere")
}

/// A store with its daemon, which stops when this is dropped.
pub struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Host {
        Host { folder: tempfile::Builder::new().prefix("layerctl-test-").tempdir().unwrap() }
    }

    /// A path in the host's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// layerctl with `args`, in the host's folder, with an environment of its own.
    pub fn command(&self, args: &[&str]) -> Command {
        self.command_as(Path::new(env!("CARGO_BIN_EXE_layerctl")), args)
    }

    pub fn command_as(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.folder.path()).env_clear().stdin(Stdio::null());
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", self.path("home"));
        command.env("LAYERFS_STORE", self.store()).env("LAYERFS_CONFIG", self.path("config.toml"));
        if !self.path("config.toml").exists() {
            std::fs::write(self.path("config.toml"), "listen = \"off\"\n").unwrap();
        }
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs layerctl and tells what it said and how it ended.
    pub fn run(&self, args: &[&str]) -> String {
        self.told(args, &self.output(args))
    }

    pub fn run_with_stdin(&self, args: &[&str], stdin: &[u8]) -> String {
        let mut child = self.command(args);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It may have had enough before the end.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        self.told(args, &child.wait_with_output().unwrap())
    }

    pub fn told(&self, args: &[&str], output: &Output) -> String {
        let mut text = format!("$ layerctl {}\n", args.join(" "));
        text.push_str(&String::from_utf8_lossy(&output.stdout));
        if !output.stderr.is_empty() {
            text.push_str("--- stderr\n");
            text.push_str(&String::from_utf8_lossy(&output.stderr));
        }
        text.push_str(&format!("--- exit {}\n", output.status.code().unwrap_or(-1)));
        text.replace(&*self.folder.path().to_string_lossy(), "[host]")
    }

    /// Runs several commands after each other.
    pub fn session(&self, commands: &[&[&str]]) -> String {
        commands.iter().map(|args| self.run(args)).collect::<Vec<_>>().join("\n")
    }

    /// Runs layerctl, which must succeed, and returns its JSON.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.command(args).arg("--json").output().unwrap();
        assert!(output.status.success(), "{}", self.told(args, &output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Makes a small tree whose content, owners and times are the same everywhere.
    pub fn make_tree(&self, name: &str) -> PathBuf {
        let tree = self.path(name);
        std::fs::create_dir_all(tree.join("etc")).unwrap();
        std::fs::write(tree.join("etc/hostname"), "edge\n").unwrap();
        std::fs::write(tree.join("etc/motd"), "Welcome to the edge.\n".repeat(60)).unwrap();
        std::fs::write(tree.join("data.bin"), noise(200_000)).unwrap();
        std::os::unix::fs::symlink("etc/hostname", tree.join("name")).unwrap();
        for (name, mode) in
            [("", 0o755), ("etc", 0o755), ("etc/hostname", 0o644), ("etc/motd", 0o644), ("data.bin", 0o644)]
        {
            std::fs::set_permissions(tree.join(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        tree
    }

    /// Sends a request to the daemon as another program would; returns the status line and the body.
    pub fn request(&self, operation: &str, headers: &str, body: &str) -> String {
        use std::io::Read;
        let mut stream = std::os::unix::net::UnixStream::connect(self.store().join("control.sock")).unwrap();
        let length = body.len();
        let head = format!(
            "POST /v1/{operation} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// The daemon's process.
    pub fn daemon_pid(&self) -> i32 {
        self.json(&["daemon", "status"])["pid"].as_i64().unwrap() as i32
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.command(&["daemon", "stop", "--force"]).output();
    }
}

/// Bytes that don't compress, always the same.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// Holds `text`, with what differs from run to run replaced.
#[macro_export]
macro_rules! hold {
    ($name:expr, $text:expr) => {
        insta::with_settings!({filters => $crate::host::filters(), omit_expression => true}, {
            insta::assert_snapshot!($name, $text)
        })
    };
}

/// What is replaced, in this order.
pub fn filters() -> Vec<(&'static str, &'static str)> {
    vec![
        (r"\b[0-9a-f]{64}\b", "[id]"),
        (r"\b[0-9a-f]{12}\b", "[short id]"),
        (r"lfk-[0-9a-z]{52}", "[key]"),
        (r"\b[0-9a-z]{5}(-[0-9a-z]{5}){4}\b", "[fingerprint]"),
        (r"127\.0\.0\.1:\d+", "[address]"),
        (r"peer add \S+ ADDRESS:\d+", "peer add [name] ADDRESS:[port]"),
        (r"the host that was called \(\S+\)", "the host that was called ([name])"),
        (r"DIR {2,}LAYER", "DIR  LAYER"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "[time]"),
        (r"\d+(\.\d+)? [KMG]?i?B/s", "[rate]"),
        // As long as it takes on a machine that is busy.
        (r"\b(\d+ min \d+ s|\d+\.\d s|\d\d s)\b", "[seconds]"),
        (r"\b\d+ min ago\b", "just now"),
        (r#""(seconds|uptime_seconds)": [0-9.]+"#, r#""$1": [seconds]"#),
        (r"pid +\d+", "pid [pid]"),
        (r"owner( +)\d+:\d+", "owner$1[owner]"),
        (r"(memory +)\S+ MiB", "$1[size]"),
        (r"\d+(\.\d+)? (KiB|B|MiB) added", "[size] added"),
        (
            r#""(bytes_stored|stored_bytes|pack_bytes|dead_bytes|freed_bytes|total_stored_bytes)": \d+"#,
            r#""$1": [bytes]"#,
        ),
        (r"\b(\d+ (B|KiB|MiB)|\d+\.\d (KiB|MiB))( on the wire)", "[size]$4"),
        (r"(would go over, )\S+ [KMG]?i?B", "$1[size]"),
    ]
}
