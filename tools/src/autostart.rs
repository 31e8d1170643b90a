//! Finding the daemon of a store, and starting it if there is none.
//!
//! A started daemon tells on its stdout, in one line, that it is ready or why not; nobody polls. Invariant: a daemon
//! that this program started has left the terminal, so that Ctrl-C and a closed terminal don't reach it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::cli::system::DaemonStart;
use crate::client::Client;
use crate::config::Settings;
use crate::failure::{Class, Failure, Result};

/// The longest path that a Unix socket's address holds, in bytes.
const MAX_SOCKET_PATH: usize = 107;
/// A log of this size is put aside when a daemon starts, in bytes.
const LOG_LIMIT: u64 = 4 << 20;
/// So much of the log's end is shown, in lines.
const TAIL_LINES: usize = 8;

/// What a started daemon says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Announcement {
    /// It answers.
    Ready,
    /// It couldn't start.
    Failed(Failure),
}

/// Whether a command may make a store where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreUse {
    /// Yes: `import`, `pull`, `peer add`, `peer id`, `tier add`, `daemon`, and what a push by ssh starts.
    MayCreate,
    /// No: there is nothing to see in a store that doesn't exist.
    MustExist,
}

/// The socket of a store's daemon, or a symbolic link to it.
pub fn socket_path(store: &Path) -> PathBuf {
    store.join("control.sock")
}

/// The socket itself.
pub fn socket_target(store: &Path) -> PathBuf {
    let path = socket_path(store);
    std::fs::read_link(&path).unwrap_or(path)
}

/// Where the socket for `path` can be bound: there, or in the runtime folder if the path is too long for a socket.
pub fn bindable_path(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH {
        return Ok(path.to_owned());
    }
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("layerfs"),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run/layerfs"),
        None => {
            let text = format!("{} is too long for a socket, and XDG_RUNTIME_DIR is not set", path.display());
            return Err(Failure::invalid(text).hint("set it, or choose a store with a shorter path"));
        }
    };
    make_private_folder(&folder)?;
    let name = layerfs::ChunkId::of(path.as_os_str().as_encoded_bytes()).short();
    Ok(folder.join(format!("{name}.sock")))
}

/// The daemon of the store, if one runs.
pub fn find(settings: &Settings) -> Result<Option<Client>> {
    let client = Client::new(&socket_path(&settings.store))?;
    Ok(if client.is_answered()? { Some(client) } else { None })
}

/// The daemon of the store; started if none runs.
pub fn ensure(settings: &Settings, store_use: StoreUse) -> Result<Client> {
    if let Some(client) = find(settings)? {
        return Ok(client);
    }
    if store_use == StoreUse::MustExist {
        require_store(settings)?;
    }
    start(settings, &DaemonStart { autostarted: true, ..DaemonStart::default() })?;
    Client::new(&socket_path(&settings.store))
}

/// Fails if there is no store.
pub fn require_store(settings: &Settings) -> Result<()> {
    if settings.store.join("format").exists() { Ok(()) } else { Err(no_store(settings)) }
}

fn no_store(settings: &Settings) -> Failure {
    let place = settings.store.display();
    match std::fs::metadata(settings.store.join("format")) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let text = format!("not allowed to look into the store {place} ({})", settings.store_chosen_by);
            Failure::new(Class::Denied, text)
                .hint("it belongs to another user; use your own (--store) or become that user")
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => no_folder(settings),
        _ => {
            let text = format!("there is no store at {place} ({})", settings.store_chosen_by);
            Failure::new(Class::NotFound, text)
                .hint("`layerctl import SRC NAME` makes one; --store PATH or LAYERFS_STORE choose another place")
        }
    }
}

fn no_folder(settings: &Settings) -> Failure {
    let (place, chosen_by) = (settings.store.display(), settings.store_chosen_by);
    Failure::invalid(format!("{place}, which is to be the store ({chosen_by}), is no folder"))
        .hint("name another place: --store PATH or LAYERFS_STORE")
}

/// Starts a daemon in the background and waits until it answers.
///
/// # Errors
/// What the daemon says; else the end of its log.
pub fn start(settings: &Settings, how: &DaemonStart) -> Result<()> {
    check_is_store_or_empty(settings)?;
    make_private_folder(&settings.store)?;
    let log_path = settings.store.join("daemon.log");
    if std::fs::metadata(&log_path).is_ok_and(|metadata| metadata.len() > LOG_LIMIT) {
        let _ = std::fs::rename(&log_path, settings.store.join("daemon.log.1"));
    }
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path);
    let mut log = log.map_err(|e| Failure::file("open", &log_path, e))?;
    let log_start = log.seek(SeekFrom::End(0)).unwrap_or(0);
    let program = std::env::current_exe().map_err(|e| Failure::file("find", "/proc/self/exe", e))?;
    let mut command = Command::new(program);
    command.arg("--store").arg(&settings.store).args(["daemon", "start", "--foreground", "--detached"]);
    if how.autostarted {
        command.arg("--autostarted");
    }
    if how.no_keeper {
        command.arg("--no-keeper");
    }
    for (option, value) in [("--listen", &how.listen), ("--crash-at", &how.crash_at)] {
        if let Some(value) = value {
            command.arg(option).arg(value);
        }
    }
    // systemd may have started whoever runs this command; not the daemon.
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(|e| Failure::from(layerfs::Error::io("starting the daemon", e)))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // An unreadable announcement is like none.
        let _ = BufReader::new(stdout).read_line(&mut line);
    }
    match serde_json::from_str(&line) {
        Ok(Announcement::Ready) => Ok(()),
        Ok(Announcement::Failed(mut failure)) => {
            let _ = child.wait();
            failure.message = format!("the daemon cannot start: {}", failure.message);
            Err(failure)
        }
        Err(_) => {
            let end = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            let text = format!("the daemon died while it started ({end}); its log, {}, ends with:", log_path.display());
            Err(Failure::new(Class::Failure, text).hint(log_tail(&log_path, log_start)))
        }
    }
}

/// Nothing is left behind in a folder that is something else.
fn check_is_store_or_empty(settings: &Settings) -> Result<()> {
    let folder = &settings.store;
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Err(no_folder(settings)),
        Err(_) => return Ok(()),
    };
    // A filesystem of its own has that from the beginning.
    let names = entries.flatten().map(|entry| entry.file_name()).filter(|name| name != "lost+found");
    let names: Vec<_> = names.collect();
    if names.is_empty() || names.iter().any(|name| name == "format" || name == "lock" || name == "daemon.log") {
        return Ok(());
    }
    let text = format!("{} is neither a store nor empty: it holds {:?}", folder.display(), names[0]);
    Err(Failure::invalid(text).hint("choose another folder with --store PATH"))
}

fn log_tail(path: &Path, from: u64) -> String {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(from))?;
        file.take(1 << 20).read_to_end(&mut text)
    });
    if read.is_err() || text.is_empty() {
        return "(nothing)".to_owned();
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn make_private_folder(folder: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| Failure::file("create", folder, e))
}
