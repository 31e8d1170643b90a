//! The daemon's side of the keeper.

use std::collections::HashMap;
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use layerfs::packets::{receive, send};
use parking_lot::Mutex;

use super::{Bytes, Message, PROTOCOL, Restart, connect};
use crate::cli::system::DaemonStart;
use crate::config::Settings;
use crate::failure::{Failure, Result};

/// The mounts that are kept, from the daemon's side. Without a keeper everything works, but nothing outlives the daemon.
pub struct Keeping {
    settings: Settings,
    restart: Option<Restart>,
    is_wanted: bool,
    keeper: Mutex<Option<Arc<OwnedFd>>>,
    next: AtomicU64,
    /// Whether the daemon works, as far as it can tell; asked when the keeper asks.
    is_well: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// A mount that the keeper has; what [`Keeping::let_go`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptId(u64);

/// What a daemon before this one left: by mount point, the numbers and descriptors.
pub type Left = HashMap<PathBuf, (KeptId, Vec<OwnedFd>)>;

impl Keeping {
    /// The mounts of the store of `settings`, for a daemon that was started as `start` says, and what an earlier daemon
    /// has left.
    ///
    /// # Errors
    /// If there is a keeper that can't be talked to.
    pub fn find(
        settings: &Settings,
        start: &DaemonStart,
        is_well: Arc<dyn Fn() -> bool + Send + Sync>,
    ) -> Result<(Keeping, Left)> {
        // Numbers are not given again by the next daemon.
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let keeping = Keeping {
            settings: settings.clone(),
            restart: restart(settings, start),
            is_wanted: !start.no_keeper,
            keeper: Mutex::new(None),
            next: AtomicU64::new(since_epoch.as_nanos() as u64),
            is_well,
        };
        let left = match connect(&settings.store)? {
            Some(socket) => keeping.take(socket)?,
            None => Left::new(),
        };
        Ok((keeping, left))
    }

    fn take(&self, socket: OwnedFd) -> Result<Left> {
        let failed = |e: std::io::Error| Failure::from(layerfs::Error::io("taking the mounts from the keeper", e));
        self.greet(socket.as_fd()).map_err(failed)?;
        send(socket.as_fd(), &Message::Take, &[]).map_err(failed)?;
        let mut left = Left::new();
        loop {
            match receive(socket.as_fd()).map_err(failed)? {
                Some((Message::Kept { id, dir }, descriptors)) => {
                    left.insert(dir.path(), (KeptId(id), descriptors));
                }
                Some((Message::End, _)) => break,
                Some(_) => {}
                // It had nothing to keep, and was about to end.
                None => return Ok(left),
            }
        }
        self.attach(socket);
        Ok(left)
    }

    fn greet(&self, socket: BorrowedFd<'_>) -> std::io::Result<()> {
        let hello = Message::Hello { protocol: PROTOCOL, pid: std::process::id(), restart: self.restart.clone() };
        send(socket, &hello, &[])
    }

    /// Goes on with `socket`, and answers the keeper's questions.
    fn attach(&self, socket: OwnedFd) {
        let socket = Arc::new(socket);
        *self.keeper.lock() = Some(socket.clone());
        let is_well = self.is_well.clone();
        let answer = move || {
            while let Ok(Some((message, _))) = receive(socket.as_fd()) {
                if matches!(message, Message::Ping) && is_well() && send(socket.as_fd(), &Message::Pong, &[]).is_err() {
                    break;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("keeper".to_owned()).spawn(answer) {
            tracing::warn!(%error, "the keeper's questions can't be answered");
        }
    }

    /// Gives a mount to the keeper, which is started if none runs. None if this daemon shall have no keeper.
    ///
    /// # Errors
    /// If that fails; the mount works all the same, but ends with this daemon.
    pub fn keep(&self, dir: &std::path::Path, descriptors: &[BorrowedFd<'_>]) -> Result<Option<KeptId>> {
        if !self.is_wanted {
            return Ok(None);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let message = Message::Keep { id, dir: Bytes::from(dir) };
        let known = self.keeper.lock().clone();
        if let Some(keeper) = known
            && send(keeper.as_fd(), &message, descriptors).is_ok()
        {
            return Ok(Some(KeptId(id)));
        }
        let failed = |e: std::io::Error| Failure::from(layerfs::Error::io("giving a mount to the keeper", e));
        let socket = self.start()?;
        self.greet(socket.as_fd()).map_err(failed)?;
        send(socket.as_fd(), &message, descriptors).map_err(failed)?;
        self.attach(socket);
        Ok(Some(KeptId(id)))
    }

    /// The keeper's process, if there is one.
    pub fn pid(&self) -> Option<u32> {
        let keeper = self.keeper.lock().clone()?;
        let credentials = rustix::net::sockopt::socket_peercred(&keeper).ok()?;
        Some(credentials.pid.as_raw_nonzero().get() as u32)
    }

    /// A mount has ended.
    pub fn let_go(&self, id: KeptId) {
        if let Some(keeper) = &*self.keeper.lock() {
            let _ = send(keeper.as_fd(), &Message::Drop { id: id.0 }, &[]);
        }
    }

    /// Starts a daemon like this one, which waits until this one has left the store. False if somebody else does that.
    ///
    /// # Errors
    /// Those of starting a process.
    pub fn start_successor(&self) -> Result<bool> {
        let Some(restart) = &self.restart else { return Ok(false) };
        restart.start().map_err(|e| Failure::from(layerfs::Error::io("starting a daemon", e)))?;
        Ok(true)
    }

    /// Has the keeper wait for the daemon that takes over, and start none. True: there is one.
    ///
    /// # Errors
    /// Those of talking to the keeper.
    pub fn leave_to_caller(&self) -> Result<bool> {
        if let Some(keeper) = &*self.keeper.lock() {
            let hello = Message::Hello { protocol: PROTOCOL, pid: std::process::id(), restart: None };
            let failed = |e| Failure::from(layerfs::Error::io("telling the keeper of the next daemon", e));
            send(keeper.as_fd(), &hello, &[]).map_err(failed)?;
        }
        Ok(true)
    }

    /// Starts a keeper and connects to it.
    fn start(&self) -> Result<OwnedFd> {
        let failed = |e: std::io::Error| Failure::from(layerfs::Error::io("starting the keeper", e));
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.arg("--store").arg(&self.settings.store).args(["daemon", "keep"]);
        // The daemons that the keeper starts are not systemd's, though this one may be.
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let _ = std::io::BufReader::new(stdout).read_line(&mut line);
        }
        // It is reaped when it ends, which may be long after.
        let reaper = std::thread::Builder::new().name("keeper-end".to_owned()).spawn(move || drop(child.wait()));
        reaper.map_err(failed)?;
        let ended = || Failure::new(crate::failure::Class::Failure, "the keeper ended while it started");
        connect(&self.settings.store)?.ok_or_else(ended)
    }
}

/// How to start a daemon like this one; nothing if systemd does it.
fn restart(settings: &Settings, start: &DaemonStart) -> Option<Restart> {
    if crate::daemon::supervised::is_supervised() {
        return None;
    }
    let program = std::env::current_exe().ok()?;
    let mut arguments = ["--store".into(), Bytes::from(&settings.store)].to_vec();
    arguments.extend(["daemon", "start", "--foreground", "--detached"].map(Bytes::from));
    if start.autostarted {
        arguments.push("--autostarted".into());
    }
    if start.no_keeper {
        arguments.push("--no-keeper".into());
    }
    if let Some(listen) = &start.listen {
        arguments.extend(["--listen", listen.as_str()].map(Bytes::from));
    }
    Some(Restart { program: program.into(), arguments, log: settings.store.join("daemon.log").into() })
}
