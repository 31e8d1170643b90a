//! The daemon's side of the keeper.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use layerfs::mount::Mount;
use layerfs::packets::{receive, send};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Bytes, Message, PROTOCOL, Restart, connect};
use crate::cli::system::DaemonStart;
use crate::config::Settings;
use crate::failure::{Class, Failure, Result};

/// A keeper that has been there for so long is no reason to wait before the next one is started.
const PROVEN: Duration = Duration::from_secs(30);
/// Before the second of those that end soon there is a pause; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// The mounts that are kept, from the daemon's side. Without a keeper everything works, but nothing outlives the daemon.
pub struct Keeping {
    settings: Settings,
    restart: Option<Restart>,
    is_wanted: bool,
    keeper: Mutex<Option<Keeper>>,
    /// Held while one is started, so that there are no two.
    starting: Mutex<()>,
    /// How long to wait when the next one is lost.
    pause: Mutex<Duration>,
    next: AtomicU64,
    daemon: Asked,
}

/// What is asked of the daemon on the keeper's behalf.
pub struct Asked {
    /// Whether it works, as far as it can tell.
    pub is_well: Box<dyn Fn() -> bool + Send + Sync>,
    /// The mounts that shall outlive it, with the numbers that they have by [`Keeping::number`].
    pub mounts: Box<dyn Fn() -> Vec<(KeptId, Arc<Mount>)> + Send + Sync>,
}

/// The keeper that this daemon is connected with.
struct Keeper {
    socket: Arc<OwnedFd>,
    since: Instant,
    /// The numbers of the mounts that it has.
    has: BTreeSet<KeptId>,
}

/// The number of a mount that the keeper has or shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeptId(u64);

/// What a daemon before this one left: by mount point, the numbers and descriptors.
pub type Left = HashMap<PathBuf, (KeptId, Vec<OwnedFd>)>;

impl Keeping {
    /// The mounts of the store of `settings`, for a daemon that was started as `start` says, and what an earlier daemon
    /// has left.
    ///
    /// # Errors
    /// If there is a keeper that can't be talked to.
    pub fn find(settings: &Settings, start: &DaemonStart, daemon: Asked) -> Result<(Arc<Keeping>, Left)> {
        // Numbers are not given again by the next daemon.
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let keeping = Arc::new(Keeping {
            settings: settings.clone(),
            restart: restart(settings, start),
            is_wanted: !start.no_keeper,
            keeper: Mutex::new(None),
            starting: Mutex::new(()),
            pause: Mutex::new(Duration::ZERO),
            next: AtomicU64::new(since_epoch.as_nanos() as u64),
            daemon,
        });
        let left = match connect(&settings.store)? {
            Some(socket) => keeping.take(socket)?,
            None => Left::new(),
        };
        Ok((keeping, left))
    }

    fn take(self: &Arc<Keeping>, socket: OwnedFd) -> Result<Left> {
        let mut left = Left::new();
        match self.take_into(socket.as_fd(), &mut left) {
            Ok(true) => self.attach(socket, left.values().map(|(id, _)| *id).collect()),
            // It had nothing to keep, and was about to end.
            Ok(false) => {}
            Err(error) if is_end(&error) => {}
            Err(error) => return Err(layerfs::Error::io("taking the mounts from the keeper", error).into()),
        }
        Ok(left)
    }

    /// Returns whether that was all.
    fn take_into(&self, socket: BorrowedFd<'_>, left: &mut Left) -> std::io::Result<bool> {
        self.greet(socket)?;
        send(socket, &Message::Take, &[])?;
        loop {
            match receive(socket)? {
                Some((Message::Kept { id, dir }, descriptors)) => {
                    left.insert(dir.path(), (KeptId(id), descriptors));
                }
                Some((Message::End, _)) => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            }
        }
    }

    fn greet(&self, socket: BorrowedFd<'_>) -> std::io::Result<()> {
        let hello = Message::Hello { protocol: PROTOCOL, pid: std::process::id(), restart: self.restart.clone() };
        send(socket, &hello, &[])
    }

    /// Goes on with `socket`, answers the keeper's questions, and replaces the keeper when it goes.
    fn attach(self: &Arc<Keeping>, socket: OwnedFd, has: BTreeSet<KeptId>) {
        let socket = Arc::new(socket);
        *self.keeper.lock() = Some(Keeper { socket: socket.clone(), since: Instant::now(), has });
        let keeping = Arc::downgrade(self);
        let answer = move || answer(&socket, &keeping);
        if let Err(error) = std::thread::Builder::new().name("keeper".to_owned()).spawn(answer) {
            tracing::warn!(%error, "the keeper's questions can't be answered");
        }
    }

    /// A number for a mount that shall outlive this daemon. None if this daemon shall have no keeper.
    pub fn number(&self) -> Option<KeptId> {
        self.is_wanted.then(|| KeptId(self.next.fetch_add(1, Ordering::Relaxed)))
    }

    /// Gives a mount to the keeper, which is started if none runs.
    ///
    /// # Errors
    /// If that fails; the mount works all the same, but ends with this daemon.
    pub fn keep(self: &Arc<Keeping>, id: KeptId, mount: &Mount) -> Result<()> {
        if self.give(id, mount)? || !self.is_wanted {
            return Ok(());
        }
        let _starting = self.starting.lock();
        // There may be another one by now.
        if self.give(id, mount)? {
            return Ok(());
        }
        let socket = self.start()?;
        let failed = |e: std::io::Error| Failure::from(layerfs::Error::io("greeting the keeper", e));
        self.greet(socket.as_fd()).map_err(failed)?;
        self.attach(socket, BTreeSet::new());
        match self.give(id, mount)? {
            true => Ok(()),
            false => Err(Failure::new(Class::Failure, "the keeper ended at once")),
        }
    }

    /// Gives a mount to the keeper that there is. False if there is none.
    fn give(&self, id: KeptId, mount: &Mount) -> Result<bool> {
        let Some(socket) = self.socket() else { return Ok(false) };
        if self.has(id) {
            self.tell(mount);
            return Ok(true);
        }
        let descriptors = mount.descriptors()?;
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let message = Message::Keep { id: id.0, dir: Bytes::from(&mount.record().dir) };
        match send(socket.as_fd(), &message, &descriptors) {
            Ok(()) => {
                self.tell(mount);
                Ok(self.with(&socket, |keeper| keeper.has.insert(id)).is_some())
            }
            Err(error) if is_end(&error) => {
                self.forget(&socket);
                Ok(false)
            }
            Err(error) => Err(layerfs::Error::io("giving a mount to the keeper", error).into()),
        }
    }

    /// Tells a mount who keeps it.
    fn tell(&self, mount: &Mount) {
        if let Some(keeper) = self.pid() {
            mount.is_kept_by(keeper);
        }
    }

    /// Gives all mounts to the keeper that it doesn't have and should have.
    ///
    /// # Errors
    /// If that fails for one of them.
    pub fn keep_all(self: &Arc<Keeping>) -> Result<()> {
        if !self.is_wanted {
            return Ok(());
        }
        // One that went just now may not have been missed yet.
        if let Some(socket) = self.socket()
            && is_hung_up(&socket)
        {
            self.forget(&socket);
        }
        let mounts = (self.daemon.mounts)();
        let outcomes: Vec<Result<()>> = mounts.iter().map(|(id, mount)| self.keep(*id, mount)).collect();
        // What has ended meanwhile may have been let go of before it was given.
        let now: BTreeSet<KeptId> = (self.daemon.mounts)().into_iter().map(|(id, _)| id).collect();
        mounts.iter().filter(|(id, _)| !now.contains(id)).for_each(|(id, _)| self.let_go(*id));
        outcomes.into_iter().collect()
    }

    /// Whether the keeper has this mount.
    pub fn has(&self, id: KeptId) -> bool {
        self.keeper.lock().as_ref().is_some_and(|keeper| keeper.has.contains(&id))
    }

    /// The keeper's process, if there is one.
    pub fn pid(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&*self.socket()?).ok()?;
        Some(credentials.pid.as_raw_nonzero().get() as u32)
    }

    /// A mount has ended, or shall end with this daemon.
    pub fn let_go(&self, id: KeptId) {
        if let Some(keeper) = &mut *self.keeper.lock() {
            keeper.has.remove(&id);
            let _ = send(keeper.socket.as_fd(), &Message::Drop { id: id.0 }, &[]);
        }
    }

    fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.keeper.lock().as_ref().map(|keeper| keeper.socket.clone())
    }

    /// Does something with the keeper at `socket`, if that is the one there is still.
    fn with<T>(&self, socket: &Arc<OwnedFd>, act: impl FnOnce(&mut Keeper) -> T) -> Option<T> {
        self.keeper.lock().as_mut().filter(|keeper| Arc::ptr_eq(&keeper.socket, socket)).map(act)
    }

    /// The keeper at `socket` has gone.
    fn forget(&self, socket: &Arc<OwnedFd>) {
        let gone = self.keeper.lock().take_if(|keeper| Arc::ptr_eq(&keeper.socket, socket));
        let Some(gone) = gone else { return };
        tracing::warn!("the keeper has gone, which had {} mounts", gone.has.len());
        if gone.since.elapsed() > PROVEN {
            *self.pause.lock() = Duration::ZERO;
        }
    }

    /// Sees to it that the mounts have a keeper again.
    fn replace(self: &Arc<Keeping>) {
        loop {
            let pause = {
                let mut pause = self.pause.lock();
                let now = *pause;
                *pause = (now * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                now
            };
            std::thread::sleep(pause);
            match self.keep_all() {
                Ok(()) => return,
                Err(failure) => tracing::warn!("the mounts will end with this daemon as long as that is so: {failure}"),
            }
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
            send(keeper.socket.as_fd(), &hello, &[]).map_err(failed)?;
        }
        Ok(true)
    }

    /// Starts a keeper and connects to it.
    fn start(&self) -> Result<OwnedFd> {
        let failed = |e: std::io::Error| Failure::from(layerfs::Error::io("starting the keeper", e));
        // This very program: that of its path may have been replaced, or be gone. What the keeper starts is what is there then.
        let mut command = Command::new("/proc/self/exe");
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
        let ended = || Failure::new(Class::Failure, "the keeper ended while it started");
        connect(&self.settings.store)?.ok_or_else(ended)
    }
}

/// Answers the keeper's questions until it goes, and starts another then.
fn answer(socket: &Arc<OwnedFd>, keeping: &Weak<Keeping>) {
    loop {
        match receive(socket.as_fd()) {
            Ok(Some((Message::Ping, _))) => {
                let Some(keeping) = keeping.upgrade() else { return };
                if (keeping.daemon.is_well)() && send(socket.as_fd(), &Message::Pong, &[]).is_err() {
                    break;
                }
            }
            Ok(Some(_)) => {}
            // A word of another version's.
            Err(error) if error.raw_os_error().is_none() => {}
            Ok(None) | Err(_) => break,
        }
    }
    if let Some(keeping) = keeping.upgrade() {
        keeping.forget(socket);
        keeping.replace();
    }
}

/// Whether what a send failed with is that nobody is there any more.
fn is_end(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected)
}

fn is_hung_up(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

/// How to start a daemon like this one; nothing if systemd does it. A detached one is none of systemd's, even if whoever started it
/// was, and has left it the variable.
fn restart(settings: &Settings, start: &DaemonStart) -> Option<Restart> {
    if !start.detached && crate::daemon::supervised::is_supervised() {
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
