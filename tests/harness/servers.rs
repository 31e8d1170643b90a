//! Servers of others that tests talk to, on loopback, each with a folder of its own: Debian's docker-registry, and an
//! S3 server (moto).
//!
//! Invariant: a server ends with the value that stands for it, by its own process id.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::net::{AddressFamily, SocketType};

/// The longest that a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// So often a server is started on another port.
const MOST_STARTS: usize = 5;
/// The user "tester" with the password "secret", as htpasswd (bcrypt) has it.
const HTPASSWD: &str = "tester:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// A server's process.
#[derive(Debug)]
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts what `make` makes for a port, and waits until it listens there. Between finding a free port and listening there
    /// somebody else may take it: then the server ends, and another one is made for another port.
    pub fn start(log: &Path, mut make: impl FnMut(u16) -> anyhow::Result<Command>) -> anyhow::Result<Server> {
        for _ in 0..MOST_STARTS {
            let port = free_port()?;
            let mut command = make(port)?;
            let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
            command.stdout(file.try_clone()?).stderr(file).stdin(Stdio::null());
            let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
            let mut server = Server { child, port };
            let deadline = Instant::now() + PATIENCE;
            // Whoever answers there may be somebody else.
            while !server.listens()? {
                if server.child.try_wait()?.is_some() {
                    break;
                }
                ensure!(Instant::now() < deadline, "{command:?} does not listen on port {port}");
                std::thread::sleep(Duration::from_millis(20));
            }
            if server.child.try_wait()?.is_none() {
                return Ok(server);
            }
        }
        bail!("a server ended {MOST_STARTS} times at its start\n{}", std::fs::read_to_string(log).unwrap_or_default());
    }

    /// Whether it is this process that listens on the port.
    fn listens(&self) -> anyhow::Result<bool> {
        const LISTENS: &str = "0A";
        let sockets = std::fs::read_to_string("/proc/net/tcp")?;
        let place = format!("0100007F:{:04X}", self.port);
        let mut rows = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.get(1) == Some(&place.as_str()) && row.get(3) == Some(&LISTENS));
        let Some(inode) = row.and_then(|row| row.get(9).map(|inode| format!("socket:[{inode}]"))) else {
            return Ok(false);
        };
        // A process that has just ended has none.
        let Ok(files) = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())) else { return Ok(false) };
        let mut links = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
        Ok(links.any(|link| link.as_os_str() == inode.as_str()))
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of loopback that is free now.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A port of loopback on which nobody listens as long as the socket is there, which has it.
pub fn silent_port() -> anyhow::Result<(OwnedFd, u16)> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    let address = SocketAddrV4::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((socket, address.port()))
}

/// Where scripts/setup puts the S3 server.
pub fn s3_program() -> PathBuf {
    crate::debian::cache_folder().join("moto/bin/moto_server")
}

/// An S3 server that keeps everything in memory.
#[derive(Debug)]
pub struct S3(Server);

impl S3 {
    /// Starts one with an empty bucket "bucket". Its log is in `folder`.
    pub fn start(folder: &Path) -> anyhow::Result<S3> {
        let server = S3(Server::start(&folder.join("s3.log"), |port| {
            let mut command = Command::new(s3_program());
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
            Ok(command)
        })?);
        crate::case::output_of(Command::new("curl").args([
            "-sf",
            "-X",
            "PUT",
            &format!("{}/bucket", server.endpoint()),
        ]))?;
        Ok(server)
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.0.port)
    }

    /// Makes it say nothing until [`S3::resume`]: it still takes connections.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::STOP)
    }

    /// Makes it answer again.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(rustix::process::Signal::CONT)
    }

    fn signal(&self, signal: rustix::process::Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.0.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        Ok(rustix::process::kill_process(pid.context("no process id")?, signal)?)
    }

    /// The keys of all objects.
    pub fn keys(&self) -> anyhow::Result<Vec<String>> {
        let text = crate::case::output_of(Command::new("curl").args(["-sf", &format!("{}/bucket", self.endpoint())]))?;
        let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        Ok(keys.map(str::to_owned).collect())
    }
}

/// A registry of images.
#[derive(Debug)]
pub struct Registry {
    server: Server,
    folder: PathBuf,
}

impl Registry {
    /// Starts one that keeps its blobs in `folder`; with `login` only the user "tester" with the password "secret" may
    /// do anything.
    pub fn start(folder: &Path, login: bool) -> anyhow::Result<Registry> {
        std::fs::create_dir_all(folder)?;
        let passwords = folder.join("htpasswd");
        std::fs::write(&passwords, HTPASSWD)?;
        let auth = if login {
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", passwords.display())
        } else {
            String::new()
        };
        let config = folder.join("config.yml");
        let server = Server::start(&folder.join("log"), |port| {
            let text = format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{auth}",
                folder.join("data").display()
            );
            std::fs::write(&config, text)?;
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(&config);
            Ok(command)
        })?;
        Ok(Registry { server, folder: folder.to_owned() })
    }

    /// Its host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.server.port)
    }

    /// The file of the blob with `digest`.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.folder.join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }
}
