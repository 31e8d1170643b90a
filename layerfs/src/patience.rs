//! For whom a thread works, and whether anybody still waits for it.
//!
//! The kernel tells a filesystem of each signal that a request's caller gets, not whether it ends it. So whoever waits for
//! long on a caller's behalf (for a chunk that another host has) asks here now and then. Hides that /proc is read for it.
//!
//! And before a thread waits it says so ([`waits`], [`stands_aside`]): others may count on it meanwhile.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// How often whoever waits should ask.
pub const ASK_EVERY: Duration = Duration::from_millis(100);

/// Who waits for what a thread does.
#[derive(Clone)]
enum Waiter {
    /// Whoever it is, he waits for ever.
    Unknown,
    /// The thread of this number.
    Thread(u32),
    /// Somebody until this says that nobody does any more.
    Until(Rc<dyn Fn() -> bool>),
}

/// What a thread tells of its waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It is about to wait for others, or for a disk.
    Begins,
    /// The same, and what it waits for may itself need others to be served.
    StandsAside,
    /// That is over.
    IsBack,
}

/// Who is told of a thread's waiting.
type Tell = Rc<dyn Fn(Wait)>;

thread_local! {
    static WAITER: RefCell<Waiter> = const { RefCell::new(Waiter::Unknown) };
    static WAITS: RefCell<Option<Tell>> = const { RefCell::new(None) };
}

/// From now on `tell` is called when this thread waits for others.
pub fn on_waits(tell: impl Fn(Wait) + 'static) {
    WAITS.replace(Some(Rc::new(tell)));
}

fn told(wait: Wait) {
    let tell = WAITS.with_borrow(Clone::clone);
    if let Some(tell) = tell {
        tell(wait);
    }
}

/// This thread is about to wait for others, or for a disk.
pub fn waits() {
    told(Wait::Begins);
}

/// A thread that isn't counted among those that serve, until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Aside(());

impl Drop for Aside {
    fn drop(&mut self) {
        told(Wait::IsBack);
    }
}

/// This thread is about to wait for what may last, and may itself need others to be served.
pub fn stands_aside() -> Aside {
    told(Wait::StandsAside);
    Aside(())
}

/// Does `work`, which is of no use any more once `is_given_up` says so.
pub fn unless<T>(is_given_up: impl Fn() -> bool + 'static, work: impl FnOnce() -> T) -> T {
    waited_for_by(Waiter::Until(Rc::new(is_given_up)), work)
}

/// Does `work` on behalf of thread `caller`; 0 for one that isn't known, which is taken to wait for ever.
pub fn on_behalf_of<T>(caller: u32, work: impl FnOnce() -> T) -> T {
    waited_for_by(if caller == 0 { Waiter::Unknown } else { Waiter::Thread(caller) }, work)
}

fn waited_for_by<T>(waiter: Waiter, work: impl FnOnce() -> T) -> T {
    /// So that a panic doesn't leave it set.
    struct Before(Waiter);
    impl Drop for Before {
        fn drop(&mut self) {
            WAITER.replace(std::mem::replace(&mut self.0, Waiter::Unknown));
        }
    }
    let _before = Before(WAITER.replace(waiter));
    work()
}

/// Whether nobody waits any more for what this thread does. May cost a file of /proc.
pub fn is_given_up() -> bool {
    match WAITER.with_borrow(Clone::clone) {
        Waiter::Unknown => false,
        Waiter::Thread(caller) => is_dying(caller),
        Waiter::Until(is_given_up) => is_given_up(),
    }
}

/// A signal that ends a process is a pending SIGKILL for each of its threads.
fn is_dying(thread: u32) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let status = match std::fs::read_to_string(format!("/proc/{thread}/status")) {
        Ok(status) => status,
        Err(error) => return error.kind() == std::io::ErrorKind::NotFound,
    };
    let pending = |line: &str| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    status.lines().filter_map(pending).any(|mask| mask & SIGKILL != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Spawn;

    #[test]
    fn who_stands_aside_is_back_afterwards() {
        let told = Rc::new(RefCell::new(Vec::new()));
        let tells = told.clone();
        on_waits(move |wait| tells.borrow_mut().push(wait));
        let aside = stands_aside();
        waits();
        drop(aside);
        assert_eq!(*told.borrow(), [Wait::StandsAside, Wait::Begins, Wait::IsBack]);
    }

    #[test]
    fn a_thread_that_has_gone_waits_for_nothing() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn_locked().unwrap();
        let asked = || on_behalf_of(child.id(), is_given_up);
        assert!(!asked());
        assert!(!is_given_up());
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(child.id() as i32).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        child.wait().unwrap();
        assert!(on_behalf_of(child.id(), is_given_up));
    }
}
