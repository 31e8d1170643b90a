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
/// A daemon that has left a question unanswered for so long hangs: it is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// So long after its last step the keeper itself stood still, and the daemon may have with it: the whole container was frozen.
const FROZEN: Duration = Duration::from_secs(15);
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
        stepped: Instant::now(),
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
    /// When it last looked after the daemon.
    stepped: Instant,
}

struct Daemon {
    socket: OwnedFd,
    pid: Option<u32>,
    since: Instant,
    questions: Questions,
}

/// What the daemon was asked, and whether it has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Questions {
    last_asked: Instant,
    /// Since when the first one that it hasn't answered waits.
    unanswered_since: Option<Instant>,
}

/// What is to be done about a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Ask,
    Hangs,
}

impl Questions {
    /// None yet.
    fn none(now: Instant) -> Questions {
        Questions { last_asked: now, unanswered_since: None }
    }

    fn asked(&mut self, now: Instant) {
        self.last_asked = now;
        self.unanswered_since.get_or_insert(now);
    }

    fn answered(&mut self) {
        self.unanswered_since = None;
    }

    fn judge(&self, now: Instant) -> Verdict {
        if self.unanswered_since.is_some_and(|since| now.duration_since(since) > PATIENCE) {
            Verdict::Hangs
        } else if now.duration_since(self.last_asked) > PING {
            Verdict::Ask
        } else {
            Verdict::Wait
        }
    }
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
        self.notice_pause();
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
        self.daemon = Some(Daemon { socket, pid: None, since: now, questions: Questions::none(now) });
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
                daemon.questions.answered();
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

    /// What passed while the keeper stood still doesn't count, neither of a daemon's silence nor of the time without one.
    fn notice_pause(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.stepped) > FROZEN {
            self.alone_since = now;
            if let Some(daemon) = &mut self.daemon {
                daemon.questions = Questions::none(now);
            }
        }
        self.stepped = now;
    }

    /// Asks the daemon whether it works, and kills one that doesn't.
    fn watch(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        // As of that look: the keeper may stand still from one line to the next.
        match daemon.questions.judge(self.stepped) {
            Verdict::Wait => {}
            Verdict::Ask => {
                daemon.questions.asked(self.stepped);
                if send(daemon.socket.as_fd(), &Message::Ping, &[]).is_err() {
                    self.lost();
                }
            }
            Verdict::Hangs => {
                if let Some(pid) = daemon.pid.and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_hangs_when_a_question_waits_for_too_long() {
        let began = Instant::now();
        let after = |seconds: u64| began + Duration::from_secs(seconds);
        let mut questions = Questions::none(began);
        assert_eq!(questions.judge(after(1)), Verdict::Wait);
        // However long it was silent: it wasn't asked.
        assert_eq!(questions.judge(after(600)), Verdict::Ask);
        questions.asked(after(600));
        assert_eq!(questions.judge(after(601)), Verdict::Wait);
        // It is asked again and again, and the first question counts.
        for round in 1..=9 {
            assert_eq!(questions.judge(after(600 + 6 * round)), Verdict::Ask);
            questions.asked(after(600 + 6 * round));
        }
        assert_eq!(questions.judge(after(659)), Verdict::Wait);
        assert_eq!(questions.judge(after(661)), Verdict::Hangs);
        questions.answered();
        assert_eq!(questions.judge(after(661)), Verdict::Ask);
    }

    #[test]
    fn what_passes_while_the_keeper_stands_still_does_not_count() {
        let (one, _other) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let now = Instant::now();
        let long_ago = now.checked_sub(2 * PATIENCE).unwrap();
        let questions = Questions { last_asked: long_ago, unanswered_since: Some(long_ago) };
        assert_eq!(questions.judge(now), Verdict::Hangs);
        let daemon = Daemon { socket: one.try_clone().unwrap(), pid: None, since: long_ago, questions };
        let mut keeper = Keeper {
            listener: one,
            daemon: Some(daemon),
            restart: None,
            kept: BTreeMap::new(),
            lock: None,
            child: None,
            alone_since: long_ago,
            next_start: long_ago,
            pause: FIRST_PAUSE,
            stepped: now,
        };
        let verdict = |keeper: &Keeper| keeper.daemon.as_ref().unwrap().questions.judge(Instant::now());
        keeper.notice_pause();
        assert_eq!(verdict(&keeper), Verdict::Hangs, "it went on all the time");
        keeper.stepped = long_ago;
        keeper.notice_pause();
        assert_eq!(verdict(&keeper), Verdict::Wait);
        assert!(keeper.alone_since >= now);
    }
}
