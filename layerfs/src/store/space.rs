//! Keeps some space free on the store's disk, so that a full disk fails in one well-defined way.
//!
//! Invariant: packs are refused while less than [`PACK_RESERVE_BYTES`] is free, so that the index database can
//! still write and a removal can still be recorded; the database is refused while less than
//! [`DB_RESERVE_BYTES`] is free, because it stops for good when a write of its own fails. Programs on a mount may fill
//! the disk to its end past us: what makes room then lives on a file that holds [`HELD_BYTES`] for that.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::FallocateFlags;

use crate::error::{Error, Result};

/// What packs leave free, in bytes.
pub(crate) const PACK_RESERVE_BYTES: u64 = 16 << 20;
/// What the index database leaves free, in bytes.
pub(crate) const DB_RESERVE_BYTES: u64 = 4 << 20;

/// Free bytes on the disk of `path`.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::file("look at the free space of", path, e))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Fails with "no space" if less than `reserve` bytes are free on the disk of `path`.
pub(crate) fn require(path: &Path, reserve: u64) -> Result<()> {
    let free = free_bytes(path)?;
    if free < reserve { Err(Error::Full { path: path.to_owned(), free, kept: reserve }) } else { Ok(()) }
}

/// Does what opens the database in `folder`, which needs some room itself, with what is held there if there is little else. What is left is
/// held again.
pub(crate) fn lend<T>(folder: &Path, open: impl FnOnce() -> T) -> T {
    let held = File::options().write(true).open(folder.join(HELD_FILE)).ok();
    let lent = held.and_then(|file| {
        let bytes = file.metadata().ok()?.len();
        let is_needed = bytes > 0 && free_bytes(folder).is_ok_and(|free| free < HELD_BYTES);
        (is_needed && file.set_len(0).is_ok()).then_some((file, bytes))
    });
    let opened = open();
    if let Some((file, bytes)) = lent {
        let mut left = free_bytes(folder).unwrap_or(0).min(bytes);
        // A filesystem needs some blocks of its own for that.
        while left > 0 && rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, left).is_err() {
            left = left.saturating_sub(STEP_BYTES / 4);
        }
    }
    opened
}

/// What is held for making room, as long as there is so much more.
pub(crate) const HELD_BYTES: u64 = 16 << 20;
const HELD_OF_FREE: u64 = 8;
/// So much of it is let go at once.
const STEP_BYTES: u64 = 4 << 20;
/// So much of it is for what makes room alone.
const LAST_BYTES: u64 = 8 << 20;
/// The file that holds it, in the database's folder.
const HELD_FILE: &str = "held-space";
/// The fastest that a disk fills: so soon one has to look again.
const FILLS_PER_SECOND: u64 = 8 << 30;
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What of the held space a change may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Share {
    #[default]
    None,
    /// It takes no more space than it has, and gives none back.
    First,
    /// It gives space back.
    All,
}

/// Watches the database's disk.
#[derive(Debug)]
pub(crate) struct SpaceGuard {
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Until when there is enough, whatever happens.
    enough_until: Option<Instant>,
    /// What holds space, and how much, if that is wanted.
    held: Option<(File, u64)>,
    #[cfg(test)]
    is_full: bool,
}

impl SpaceGuard {
    pub(crate) fn new(folder: &Path) -> SpaceGuard {
        SpaceGuard { folder: folder.to_owned(), state: Mutex::default() }
    }

    /// Holds space from now on, for [`SpaceGuard::check`] of what makes room.
    pub(crate) fn hold(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.held.is_none() {
            let path = self.folder.join(HELD_FILE);
            let failed = |e| Error::file("open", &path, e);
            let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            let bytes = file.metadata().map_err(failed)?.len();
            state.held = Some((file, bytes));
            state.enough_until = None;
        }
        Ok(())
    }

    /// Goes on holding what another process held here, if one did.
    pub(crate) fn go_on_holding(&self) -> Result<()> {
        if self.folder.join(HELD_FILE).exists() { self.hold() } else { Ok(()) }
    }

    /// Fails from now on as if the disk were full.
    #[cfg(test)]
    pub(crate) fn fill(&self) {
        self.state.lock().is_full = true;
    }

    /// Fails if there is too little space for a change, even with its `share` of what is held.
    pub(crate) fn check(&self, share: Share) -> Result<()> {
        let now = Instant::now();
        let mut state = self.state.lock();
        #[cfg(test)]
        if state.is_full {
            return Err(Error::file("write to", &self.folder, std::io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        if state.enough_until.is_some_and(|until| now < until) {
            return Ok(());
        }
        let free = free_bytes(&self.folder)?;
        if free >= DB_RESERVE_BYTES {
            state.enough_until = Some(now + lasts(free - DB_RESERVE_BYTES));
            state.refill(free);
            return Ok(());
        }
        state.enough_until = None;
        if state.let_go(share) {
            return Ok(());
        }
        Err(Error::Full { path: self.folder.clone(), free, kept: DB_RESERVE_BYTES })
    }

    /// Fails if the database, once closed, might find no room to be opened.
    pub(crate) fn check_reopening(&self) -> Result<()> {
        let state = self.state.lock();
        let held = state.held.as_ref().map_or(0, |(_, bytes)| *bytes);
        require(&self.folder, DB_RESERVE_BYTES.saturating_sub(held))
    }
}

/// For how long so many bytes are enough.
fn lasts(bytes: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000 / (1 << 20)) / (FILLS_PER_SECOND >> 20)).min(LOOK_AGAIN)
}

impl State {
    /// Takes what is to be held, if that is little of what is free.
    fn refill(&mut self, free: u64) {
        let Some((file, bytes)) = &mut self.held else { return };
        if *bytes >= HELD_BYTES || free < HELD_BYTES * HELD_OF_FREE {
            return;
        }
        match rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, HELD_BYTES) {
            Ok(()) => *bytes = HELD_BYTES,
            // The filesystem can't hold space, or there is none any more.
            Err(errno) => tracing::debug!(%errno, "no space is held for making room"),
        }
    }

    /// Lets some of it go; false if nothing is left for such a `share`.
    fn let_go(&mut self, share: Share) -> bool {
        let Some((file, bytes)) = &mut self.held else { return false };
        let kept = match share {
            Share::None => return false,
            Share::First => LAST_BYTES,
            Share::All => 0,
        };
        let left = bytes.saturating_sub(STEP_BYTES);
        if *bytes <= kept || file.set_len(left).is_err() {
            return false;
        }
        *bytes = left;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_let_go_by_steps_and_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let guard = SpaceGuard::new(folder.path());
        guard.hold().unwrap();
        let held = || std::fs::metadata(folder.path().join(HELD_FILE)).unwrap().len();
        let mut state = guard.state.lock();
        state.refill(HELD_BYTES * HELD_OF_FREE - 1);
        assert_eq!(held(), 0, "the disk is too small for that");
        assert!(!state.let_go(Share::All));
        state.refill(HELD_BYTES * HELD_OF_FREE);
        assert_eq!(held(), HELD_BYTES);
        assert!(!state.let_go(Share::None));
        let mut steps = |share| (0..100).take_while(|_| state.let_go(share)).count() as u64 * STEP_BYTES;
        assert_eq!(steps(Share::First), HELD_BYTES - LAST_BYTES);
        assert_eq!((steps(Share::All), held()), (LAST_BYTES, 0));
        state.refill(u64::MAX);
        assert_eq!(held(), HELD_BYTES);
    }

    #[test]
    fn what_is_held_is_lent_where_there_is_little_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(HELD_FILE);
        let held = || std::fs::metadata(&path).unwrap().len();
        std::fs::write(&path, vec![0; 4096]).unwrap();
        assert_eq!(lend(folder.path(), held), 4096, "there is enough");
        assert_eq!(lend(&folder.path().join("nothing"), || 7), 7);
    }

    #[test]
    fn little_space_is_looked_at_often() {
        assert_eq!(lasts(0), Duration::ZERO);
        assert!(lasts(1 << 30) <= Duration::from_millis(130));
        assert_eq!(lasts(u64::MAX), LOOK_AGAIN);
    }
}
