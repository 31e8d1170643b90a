//! Named steps at which a test can make the process die, as by `kill -9` or a power cut of the daemon.
//!
//! Invariant: unarmed, a step costs one relaxed load. Arming is the caller's decision; this module reads no
//! environment. Every name that is passed to [`hit`] stands in [`NAMES`].

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Every named step, in the order in which work meets them.
pub const NAMES: &[&str] = &[
    "pack.created",
    "pack.appended",
    "pack.synced",
    "index.written",
    "manifest.stored",
    "name.before",
    "name.after",
    "seal.frozen",
    "seal.chunked",
    "seal.before-switch",
    "seal.after-switch",
    "squash.before-switch",
    "squash.after-switch",
    "receive.offered",
    "receive.chunk",
    "receive.staged",
    "receive.verified",
    "receive.named",
    "gc.marked",
    "gc.swept",
    "gc.rewritten",
    "gc.before-unlink",
    "gc.after-unlink",
    "tier.begun",
    "tier.uploaded",
    "tier.recorded",
    "tier.before-evict",
    "tier.after-evict",
    "tier.dead",
    "move.journalled",
    "guest.started",
];

static ARMED: AtomicBool = AtomicBool::new(false);
static COUNTDOWN: AtomicU32 = AtomicU32::new(0);
static NAME: Mutex<Option<String>> = Mutex::new(None);

/// Makes the process die the `nth` time (from 1) that step `name` is reached. Returns false for an unknown name.
pub fn arm(name: &str, nth: u32) -> bool {
    if !NAMES.contains(&name) {
        return false;
    }
    *NAME.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(name.to_owned());
    COUNTDOWN.store(nth.max(1), Ordering::SeqCst);
    ARMED.store(true, Ordering::SeqCst);
    true
}

/// Step `name` is reached.
#[inline]
pub fn hit(name: &'static str) {
    if ARMED.load(Ordering::Relaxed) {
        die_if_armed(name);
    }
}

#[cold]
fn die_if_armed(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "{name} is not listed");
    let armed = NAME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if armed.as_deref() == Some(name) && COUNTDOWN.fetch_sub(1, Ordering::SeqCst) == 1 {
        let me = rustix::process::getpid();
        let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
        std::process::abort();
    }
}
