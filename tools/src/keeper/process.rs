//! The keeper's process: what it holds, and what it does when the daemon goes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use layerfs::packets::{receive, send};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Bytes, Message, PROTOCOL, Restart, listen, lock};
use crate::daemon::life;
use crate::failure::Result;

/// How often it asks the daemon whether it works.
const PING: Duration = Duration::from_secs(5);
/// A daemon that hasn't answered for so long hangs: it is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// The first pause before a daemon is started again; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// After so long without a daemon the mounts are given up: what uses them gets errors rather than hang for ever.
const GIVES_UP: Duration = Duration::from_secs(300);
/// A daemon that has served for so long is no reason to wait longer before the next.
const PROVEN: Duration = Duration::from_secs(30);

/// Keeps the mounts of `store` until there is nothing to keep.
///
/// # Errors
/// Those of listening.
pub fn run(store: &Path) -> Result<()> {
    life::leave_terminal();
    let (listener, paths) = listen(store)?;
    // Who started it waits for this.
    let _ = writeln!(std::io::stdout(), "ready");
    life::leave_stdout();
    let mut keeper = Keeper {
        listener,
        daemon: None,
        restart: None,
        kept: BTreeMap::new(),
        lock: None,
        child: None,
        alone_since: Instant::now(),
        next_start: Instant::now() + FIRST_PAUSE,
        pause: FIRST_PAUSE,
    };
    while keeper.has_reason() {
        keeper.step();
        keeper.say(store);
    }
    paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    Ok(())
}

struct Keeper {
    listener: OwnedFd,
    daemon: Option<Daemon>,
    restart: Option<Restart>,
    /// By their numbers: mount point and descriptor.
    kept: BTreeMap<u64, (Bytes, Vec<OwnedFd>)>,
    /// Held while there are any.
    lock: Option<File>,
    /// The daemon that was started last, to be reaped.
    child: Option<Child>,
    alone_since: Instant,
    next_start: Instant,
    pause: Duration,
}

struct Daemon {
    socket: OwnedFd,
    pid: Option<u32>,
    since: Instant,
    heard: Instant,
    pinged: Instant,
}

/// What is to be read.
enum Ready {
    Caller,
    Daemon,
}

impl Keeper {
    fn has_reason(&self) -> bool {
        match (&self.daemon, self.kept.is_empty()) {
            (Some(_), _) => true,
            // Just started: whoever did that is about to call.
            (None, true) => self.restart.is_none() && self.alone_since.elapsed() < Duration::from_secs(5),
            (None, false) => self.alone_since.elapsed() < GIVES_UP,
        }
    }

    fn step(&mut self) {
        for ready in self.wait() {
            match ready {
                Ready::Caller => self.accept(),
                Ready::Daemon => self.hear(),
            }
        }
        if let Some(child) = &mut self.child
            && !matches!(child.try_wait(), Ok(None))
        {
            self.child = None;
        }
        self.watch();
        if self.daemon.is_none() && !self.kept.is_empty() && Instant::now() >= self.next_start {
            self.start();
        }
    }

    /// Has others know whether anything is kept.
    fn say(&mut self, store: &Path) {
        match self.kept.is_empty() {
            true => self.lock = None,
            // That it can't be said is no reason not to do it.
            false if self.lock.is_none() => self.lock = lock(store).ok(),
            false => {}
        }
    }

    fn wait(&self) -> Vec<Ready> {
        let mut descriptors = vec![PollFd::new(&self.listener, PollFlags::IN)];
        descriptors.extend(self.daemon.as_ref().map(|daemon| PollFd::new(&daemon.socket, PollFlags::IN)));
        let limit = if self.daemon.is_some() { Duration::from_secs(1) } else { FIRST_PAUSE };
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        if poll(&mut descriptors, Some(&limit)).is_err() {
            return Vec::new();
        }
        // The daemon first: what it said before it went counts.
        let ready = |at: usize| descriptors.get(at).is_some_and(|one: &PollFd<'_>| !one.revents().is_empty());
        let mut found = Vec::new();
        found.extend(ready(1).then_some(Ready::Daemon));
        found.extend(ready(0).then_some(Ready::Caller));
        found
    }

    fn accept(&mut self) {
        use rustix::net::{SocketFlags, accept_with};
        let Ok(socket) = accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
        // The store's lock sees to it that there is one daemon: the new one means that the old one is gone.
        while self.daemon.is_some() && self.is_readable() {
            self.hear();
        }
        let now = Instant::now();
        self.daemon = Some(Daemon { socket, pid: None, since: now, heard: now, pinged: now });
    }

    fn is_readable(&self) -> bool {
        let Some(daemon) = &self.daemon else { return false };
        let mut descriptors = [PollFd::new(&daemon.socket, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut descriptors, Some(&at_once)).is_ok_and(|count| count > 0)
    }

    fn hear(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        match receive(daemon.socket.as_fd()) {
            Ok(Some((message, descriptors))) => {
                daemon.heard = Instant::now();
                self.on_message(message, descriptors);
            }
            Ok(None) | Err(_) => self.lost(),
        }
    }

    fn on_message(&mut self, message: Message, descriptors: Vec<OwnedFd>) {
        match message {
            Message::Hello { protocol: PROTOCOL, pid, restart } => {
                self.restart = restart;
                if let Some(daemon) = &mut self.daemon {
                    daemon.pid = Some(pid);
                }
            }
            Message::Hello { .. } => self.daemon = None,
            Message::Keep { id, dir } if !descriptors.is_empty() => drop(self.kept.insert(id, (dir, descriptors))),
            Message::Drop { id } => drop(self.kept.remove(&id)),
            Message::Take => self.give(),
            _ => {}
        }
    }

    fn give(&mut self) {
        let Some(daemon) = &self.daemon else { return };
        let socket = daemon.socket.as_fd();
        let all_sent = self.kept.iter().try_for_each(|(id, (dir, descriptors))| {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            send(socket, &Message::Kept { id: *id, dir: dir.clone() }, &descriptors)
        });
        if all_sent.and_then(|()| send(socket, &Message::End, &[])).is_err() {
            self.lost();
        }
    }

    /// The daemon is gone, or of no use.
    fn lost(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        self.alone_since = Instant::now();
        self.pause = if daemon.since.elapsed() > PROVEN { FIRST_PAUSE } else { self.pause };
        self.next_start = Instant::now();
    }

    /// Asks the daemon whether it works, and kills one that doesn't.
    fn watch(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        if daemon.heard.elapsed() > PATIENCE {
            if let Some(pid) = daemon.pid.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            return self.lost();
        }
        if daemon.pinged.elapsed() > PING {
            daemon.pinged = Instant::now();
            if send(daemon.socket.as_fd(), &Message::Ping, &[]).is_err() {
                self.lost();
            }
        }
    }

    fn start(&mut self) {
        self.next_start = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if self.child.is_some() {
            return;
        }
        let Some(restart) = &self.restart else { return };
        self.child = restart.start().ok();
    }
}
