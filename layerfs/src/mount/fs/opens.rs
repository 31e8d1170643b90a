//! Which files are open, and whether the kernel reads and writes them past us.
//!
//! A file that is the upper's alone can be *passed through*: its descriptors are served from the data file, and we hear of no
//! read and no write. Invariants:
//!
//! - A file's descriptors are all passed through or none is, until the last is closed, and may be mapped no more.
//! - While a file is passed through and may be written to, its data file has the truth on its size and times; the tables
//!   have it as of a stamp that [`DataFolder::known`](crate::upper::data::DataFolder::known) tells, and catch up when it matters.
//! - Its inode stays in the upper, over seals too, as long as its data file is in use.
//! - A sealed file may be passed through to a [warm copy](super::warm) for those who read it; whoever wants to write makes that the
//!   data file first.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::errno::FsResult;
use super::attrs::{clear_privileges, is_privileged, may_lose_bits};
use super::behind::Prepared;
use super::late::{Doubts, Queue};
use super::sealing::HeldFile;
use super::{Fs, SHARDS, State};
use crate::attr::Time;
use crate::id::Ino;
use crate::inode::Node;
use crate::patience;
use crate::upper::Upper;
use crate::upper::opens::{Backing, OpenRecord, OpenSlot};
use crate::upper::table::{Change, Stamp, UpperInode};

/// Larger files aren't passed through: a seal reads what is passed through whole, in about a second per gigabyte.
pub(super) const PASSED_MAX: u64 = 1 << 30;
/// A seal waits no longer than this for the clock of times of change, which moves on every 1 to 10 ms.
const COARSE: Duration = Duration::from_millis(20);
const TICK: Duration = Duration::from_millis(1);

/// The kernel's register of files that it may read and write without asking.
pub trait Backings: Send + Sync {
    /// Registers a file.
    ///
    /// # Errors
    /// Those of the kernel: no right to do so, or a file of a stacked filesystem.
    fn open(&self, file: &File) -> std::io::Result<Backing>;

    /// Registers a file that `file` names without having it open.
    ///
    /// # Errors
    /// As [`Backings::open`]; kernels that want it open.
    fn open_named(&self, file: &File) -> std::io::Result<Backing> {
        self.open(file)
    }

    /// Strikes one out; descriptors that were opened with it go on.
    fn close(&self, backing: Backing);

    /// Strikes out what a daemon that died had registered last and didn't come to record, or to strike out: all of the newest but
    /// `recorded`. Nobody else registers one meanwhile.
    fn close_leftovers(&self, _recorded: &[Backing]) {}
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    slot: OpenSlot,
    pub record: OpenRecord,
    /// The data file's stamp when it was last sealed as it was, and nobody could have it open for writing.
    sealed: Option<Stamp>,
}

/// The open files of a mount.
#[derive(Default)]
pub(super) struct Opens {
    shards: [Mutex<HashMap<Ino, Open>>; SHARDS],
    /// A seal has begun to drop what it took: no other data file may come into use.
    is_closed: AtomicBool,
    /// What closing leaves to do and nobody has done yet, since a seal is going on.
    late: Queue<Late>,
    doubts: Doubts,
}

impl Opens {
    /// As a daemon that died left it.
    pub fn resumed(records: Vec<(OpenSlot, OpenRecord)>) -> Opens {
        let opens = Opens::default();
        for (slot, record) in records {
            opens.shard(record.ino).lock().insert(record.ino, Open { slot, record, sealed: None });
            if record.count == 0 {
                opens.doubts.add(record.ino);
            }
        }
        opens
    }

    fn shard(&self, ino: Ino) -> &Mutex<HashMap<Ino, Open>> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    pub fn get(&self, ino: Ino) -> Option<Open> {
        self.shard(ino).lock().get(&ino).copied()
    }

    /// What is recorded of all that is open.
    pub fn records(&self) -> Vec<OpenRecord> {
        self.all().into_iter().map(|open| open.record).collect()
    }

    /// No other file comes into use from here on.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// What `ino` is passed through to has become its data file.
    pub fn is_no_longer_warm(&self, upper: &Upper, ino: Ino) {
        if let Some(open) = self.shard(ino).lock().get_mut(&ino) {
            open.record.is_warm = false;
            upper.opens().put(open.slot, &open.record);
        }
    }

    fn all(&self) -> Vec<Open> {
        self.shards.iter().flat_map(|shard| shard.lock().values().copied().collect::<Vec<_>>()).collect()
    }
}

/// A file that is to be opened for writing is passed through to a warm copy: that has to become its data file first.
#[derive(Debug)]
pub(super) struct IsWarm;

/// What a descriptor's flags allow.
#[derive(Clone, Copy)]
pub(super) struct Access {
    pub reads: bool,
    pub writes: bool,
}

impl Access {
    pub fn of(flags: i32) -> Access {
        let mode = flags & libc::O_ACCMODE;
        Access { reads: mode != libc::O_WRONLY, writes: mode != libc::O_RDONLY }
    }
}

/// What is left of a file's opening after a descriptor was closed.
#[derive(Default)]
struct Closed {
    is_written_past_us: bool,
    /// Nobody has it open, and its data file was sealed with this stamp.
    sealed: Option<Stamp>,
}

/// Whether what changes now gets a later time of change than `time`. The kernel's clock for that stands still between ticks.
fn has_passed(time: Time) -> bool {
    Time::of_last_tick() > time
}

/// Waits until what changes gets a later time of change than `time`, but not for long.
pub(super) fn until_passed(time: Time) {
    let begun = Instant::now();
    while !has_passed(time) && begun.elapsed() < COARSE {
        std::thread::sleep(TICK);
    }
}

/// Nobody has a file open or mapped any more: what was noted of it goes.
fn ended(upper: &Upper, open: &Open) {
    if open.record.is_warm {
        upper.warm().end_use(open.record.ino);
    }
    upper.opens().give_back(open.slot);
}

/// Whether nobody but us has open or mapped what a file was passed through to.
fn is_ours_alone(upper: &Upper, record: &OpenRecord) -> bool {
    match record.is_warm {
        true => upper.warm().is_ours_alone(record.ino),
        false => upper.data().is_ours_alone(record.ino),
    }
}

/// What the closing of a descriptor of `ino` leaves to do.
#[derive(Clone, Copy)]
enum Late {
    /// To count it. `is_marked`: until then the file is recorded as miscounted.
    Count { ino: Ino, access: Access, again: bool, is_marked: bool },
    /// What comes after that, of a file whose data file was sealed with that stamp.
    Finish { ino: Ino, sealed: Option<Stamp> },
}

/// The files that a seal must leave where they are.
#[derive(Debug, Default)]
pub(super) struct InUse {
    /// All whose data files are in use.
    pub all: Vec<Ino>,
    /// Those of them that may be written to, with names.
    pub written: Vec<Ino>,
}

impl Fs {
    /// From now on files are passed through where that is possible. Once, before the first is opened.
    pub fn pass_through(&self, backings: Box<dyn Backings>) {
        if self.is_resumed {
            let recorded: Vec<Backing> = self.opens.records().iter().filter_map(|record| record.backing).collect();
            backings.close_leftovers(&recorded);
        }
        let _ = self.backings.set(backings);
    }

    /// A descriptor of `ino` was opened with `flags`. Returns the backing if it is to be passed through.
    pub fn opened(&self, ino: Ino, flags: i32) -> Option<Backing> {
        self.opened_as(ino, flags, &Prepared::default()).ok().flatten()
    }

    /// [`Fs::opened`] for what was prepared.
    pub(super) fn opened_as(
        &self,
        ino: Ino,
        flags: i32,
        prepared: &Prepared<'_>,
    ) -> std::result::Result<Option<Backing>, IsWarm> {
        let Some(upper) = &self.upper else { return Ok(None) };
        let access = Access::of(flags);
        let _gate = access.writes.then(|| self.changes());
        // Held to the end: no seal takes the data file away meanwhile.
        let state = self.state.read();
        let mut shard = self.opens.shard(ino).lock();
        let new = || Open { slot: upper.opens().take(), record: OpenRecord::none(ino), sealed: None };
        let open = shard.entry(ino).or_insert_with(new);
        let record = &mut open.record;
        if record.is_warm && access.writes {
            return Err(IsWarm);
        }
        if record.count == 0 {
            record.is_miscounted = false;
            if record.node != 0 && !self.is_hidden_there(record.node) {
                (record.node, record.is_mapped) = (0, false);
            }
            let may_be_used = record.is_mapped || prepared.was_there() || !self.opens.is_closed();
            let hidden = if may_be_used { self.hidden_backing(prepared) } else { None };
            record.node = hidden.map_or(0, |(_, node)| node);
            let was_warm = record.is_warm;
            (record.backing, record.is_warm) = match hidden {
                Some((backing, _)) => (Some(backing), false),
                None => match self.backing(upper, &state, record, access) {
                    None if !access.writes => self.warm_backing(upper, &state, record.ino),
                    backing => (backing, false),
                },
            };
            if was_warm && !record.is_warm {
                upper.warm().end_use(ino);
            }
            record.is_passed = record.backing.is_some();
        }
        record.count += 1;
        record.is_readable |= access.reads;
        if access.writes {
            record.writers += 1;
            record.mappers += u32::from(access.reads);
        }
        if record.is_written_past_us() && upper.data().known(ino).is_none() {
            self.data_changes(ino);
            // Without a stamp the tables catch up too often.
            upper.data().know(ino, upper.data().stamp(ino).unwrap_or_default());
        }
        upper.opens().put(open.slot, record);
        let (backing, is_cached) = (record.backing, record.backing.is_none() && access.reads);
        drop((shard, state));
        if is_cached {
            self.is_read_again(upper, ino);
        }
        Ok(backing)
    }

    /// A backing for a sealed file that nobody has open, and whether there is one: its warm copy, if it has one.
    fn warm_backing(&self, upper: &Upper, state: &State, ino: Ino) -> (Option<Backing>, bool) {
        let Some(backings) = self.backings.get() else { return (None, false) };
        if state.tables.inode(ino).is_some_and(|inode| inode.backed.is_some()) {
            return (None, false);
        }
        let Some(file) = upper.warm().begin_use(ino) else { return (None, false) };
        let backing = backings.open(&file).ok();
        match backing {
            Some(_) => self.warming.is_passed(ino),
            None => upper.warm().end_use(ino),
        }
        (backing, backing.is_some())
    }

    /// [`Fs::opened`] for a file that was made along with it: one that can be written to gets its data file.
    pub fn opened_new(&self, ino: Ino, flags: i32) -> Option<Backing> {
        if Access::of(flags).writes
            && self.backings.get().is_some()
            && let Some(upper) = &self.upper
        {
            self.clear_the_way(upper);
            let _gate = self.changes();
            let _stripe = self.stripe(ino).lock();
            if let Err(errno) = self.copy_up(upper, ino, u64::MAX) {
                tracing::debug!(%ino, ?errno, "no data file for a new file yet");
            }
        }
        self.opened(ino, flags)
    }

    /// Does `work` unless somebody has `ino` open; nobody opens it meanwhile.
    pub(super) fn unless_open(&self, ino: Ino, work: impl FnOnce()) {
        let shard = self.opens.shard(ino).lock();
        if !shard.contains_key(&ino) {
            work();
        }
    }

    /// Whether somebody has `ino` open.
    pub(super) fn is_open(&self, ino: Ino) -> bool {
        self.opens.shard(ino).lock().contains_key(&ino)
    }

    /// A backing for a file that nobody has open, if it is to be passed through.
    fn backing(&self, upper: &Upper, state: &State, record: &OpenRecord, access: Access) -> Option<Backing> {
        let backings = self.backings.get()?;
        let inode = state.tables.inode(record.ino)?;
        let backed = inode.backed.filter(|backed| backed.base_bytes == 0)?;
        let is_fit = backed.bytes <= PASSED_MAX && !(access.writes && may_lose_bits(inode));
        if !record.is_mapped && (!is_fit || self.opens.is_closed.load(Ordering::Acquire)) {
            return None;
        }
        let file = upper.data().file(record.ino).ok()?;
        backings.open(&file).ok()
    }

    /// A descriptor of `ino` that was opened with `flags` was closed. `again`: the kernel says so for the second time. It doesn't wait for
    /// a seal: programs may close more files meanwhile than there are threads.
    pub fn release(&self, ino: Ino, flags: i32, again: bool) {
        let Some(upper) = &self.upper else { return };
        let access = Access::of(flags);
        self.count_closed(upper, ino, access, again);
        if access.writes && upper.data().is_refilled(ino) {
            patience::waits();
            upper.data().begin_write_back(ino);
        }
    }

    fn count_closed(&self, upper: &Upper, ino: Ino, access: Access, again: bool) {
        let is_written = access.writes && upper.data().known(ino).is_some();
        let gate = self.gate.try_read();
        let late = if again || is_written {
            // The kernel takes it as told, and tells no daemon that comes after this one.
            let is_marked = gate.is_none() && self.set_miscounted(ino, true) && !again;
            Late::Count { ino, access, again, is_marked }
        } else {
            let sealed = self.close(upper, ino, access).sealed;
            if sealed.is_none() && !self.state.read().tables.is_unsaved(ino) {
                return;
            }
            Late::Finish { ino, sealed }
        };
        // What changes something from now on does it after this, even if it passes a seal first.
        self.opens.late.put(late);
        let gate = gate.or_else(|| {
            // Who ends a seal looks for this after that: one of us sees what the other did.
            fence(Ordering::SeqCst);
            self.gate.try_read()
        });
        if gate.is_some() {
            self.close_late();
        }
    }

    /// Counts what was closed and isn't counted yet. Whoever calls it holds seals back.
    pub(super) fn close_late(&self) {
        let Some(upper) = &self.upper else { return };
        self.opens.late.take_all(|late| match late {
            Late::Finish { ino, sealed } => self.finish_close(upper, ino, sealed),
            Late::Count { ino, access, again, is_marked } => {
                let mut state = self.state.write();
                let closed = match again {
                    // It may have been counted: rather one too many than too few.
                    true => {
                        self.may_be_miscounted(ino);
                        Closed { is_written_past_us: true, sealed: None }
                    }
                    false => self.close(upper, ino, access),
                };
                if is_marked {
                    self.set_miscounted(ino, false);
                }
                if let Err(errno) = self.catch_up(upper, &mut state, ino) {
                    tracing::warn!(%ino, ?errno, "cannot tell what became of a file that was written to");
                } else if !closed.is_written_past_us {
                    upper.data().unknow(ino);
                }
                drop(state);
                self.finish_close(upper, ino, closed.sealed);
            }
        });
    }

    /// A closing was counted: a file that is as it was `sealed` goes, and what memory knows better than the rows is saved. Whoever calls it
    /// holds seals back.
    fn finish_close(&self, upper: &Upper, ino: Ino, sealed: Option<Stamp>) {
        if let Some(sealed) = sealed {
            self.drop_sealed(upper, ino, sealed);
        }
        if !self.state.read().tables.is_unsaved(ino) {
            return;
        }
        let mut state = self.state.write();
        // It may be in the course of another request.
        if let Err(error) = upper.journal().aside(|| upper.save(&mut state.tables, &[ino])) {
            tracing::warn!(%ino, %error, "cannot save the times of a file now");
        }
    }

    /// Looks again at files that weren't given back yet when we heard of their closing. Call it now and then; what it costs when
    /// there are none is nothing.
    pub fn look_again(&self) {
        let Some(upper) = &self.upper else { return };
        let due = self.opens.doubts.due();
        if due.is_empty() {
            return;
        }
        let Some(_gate) = self.gate.try_read() else { return };
        for ino in due {
            let mut state = self.state.write();
            let sealed = {
                let mut shard = self.opens.shard(ino).lock();
                let is_free = |record: &OpenRecord| match record.node {
                    0 => is_ours_alone(upper, record),
                    node => !self.is_hidden_there(node),
                };
                let closed = shard.get(&ino).filter(|open| open.record.count == 0).copied();
                if closed.is_some_and(|open| !is_free(&open.record)) {
                    continue;
                }
                self.opens.doubts.settle(ino);
                let Some(open) = closed else { continue };
                shard.remove(&ino);
                ended(upper, &open);
                open.sealed
            };
            if self.catch_up(upper, &mut state, ino).is_ok() {
                upper.data().unknow(ino);
            }
            drop(state);
            if let Some(sealed) = sealed {
                self.drop_sealed(upper, ino, sealed);
            }
        }
    }

    fn close(&self, upper: &Upper, ino: Ino, access: Access) -> Closed {
        let mut shard = self.opens.shard(ino).lock();
        let Some(open) = shard.get_mut(&ino) else { return Closed::default() };
        let record = &mut open.record;
        record.count = record.count.saturating_sub(1);
        if access.writes {
            record.writers = record.writers.saturating_sub(1);
            record.mappers = record.mappers.saturating_sub(u32::from(access.reads));
        }
        if record.count == 0 {
            if let Some(backing) = record.backing.take() {
                // If we die now the next daemon looks whether somebody has it still. It must not answer with what was struck out; what wasn't, it
                // finds.
                upper.opens().put(open.slot, &OpenRecord { is_mapped: true, ..*record });
                self.close_backing(backing);
            }
            // What was only ever written to isn't mapped.
            let is_used = match record.node {
                0 => record.is_passed && (record.is_readable || record.is_mapped) && !is_ours_alone(upper, record),
                node => {
                    self.hidden_is_idle(node);
                    self.is_hidden_there(node)
                }
            };
            if !is_used {
                let open = *open;
                shard.remove(&ino);
                ended(upper, &open);
                self.warming.was_closed(ino);
                return Closed { is_written_past_us: false, sealed: open.sealed };
            }
            record.is_mapped = true;
            self.opens.doubts.add(ino);
        }
        upper.opens().put(open.slot, record);
        Closed { is_written_past_us: record.is_written_past_us(), sealed: None }
    }

    fn close_backing(&self, backing: Backing) {
        if let Some(backings) = self.backings.get() {
            backings.close(backing);
        }
    }

    /// The mount has ended: the kernel lets go of all that is passed through, also of what it didn't tell us the closing of.
    pub(in crate::mount) fn close_backings(&self) {
        for shard in &self.opens.shards {
            shard
                .lock()
                .values_mut()
                .filter_map(|open| open.record.backing.take())
                .for_each(|it| self.close_backing(it));
        }
    }

    /// After that: the files that somebody goes on writing to past us. A connection that was cut doesn't stop what is passed through.
    pub(in crate::mount) fn written_past_the_end(&self) -> Vec<Ino> {
        let Some(upper) = &self.upper else { return Vec::new() };
        let written = self.opens.records().into_iter().filter(OpenRecord::is_written_past_us);
        written.map(|record| record.ino).filter(|ino| upper.data().is_others_too(*ino)).collect()
    }

    /// The descriptors of `ino`, if it has any, may be fewer than are counted.
    pub(in crate::mount) fn may_be_miscounted(&self, ino: Ino) {
        self.set_miscounted(ino, true);
    }

    /// Records whether they may be, if that is something else than before; returns whether.
    fn set_miscounted(&self, ino: Ino, is_miscounted: bool) -> bool {
        let Some(upper) = &self.upper else { return false };
        let mut shard = self.opens.shard(ino).lock();
        let Some(open) = shard.get_mut(&ino).filter(|open| open.record.is_miscounted != is_miscounted) else {
            return false;
        };
        open.record.is_miscounted = is_miscounted;
        upper.opens().put(open.slot, &open.record);
        true
    }

    /// The kernel has forgotten `ino`: nobody has it open or mapped, whatever we think. False if that may be a look-up of before, and
    /// it is open.
    pub(super) fn surely_closed(&self, upper: &Upper, ino: Ino) -> bool {
        let Some(open) = self.opens.get(ino) else { return true };
        // How often an earlier daemon's kernel looked it up isn't known, so this may not be the last time. The kernel keeps what is open,
        // and says when it is closed; only if it said something twice we may have counted too many.
        if self.is_resumed && open.record.count > 0 && !open.record.is_miscounted {
            return false;
        }
        let _gate = self.changes();
        let mut state = self.state.write();
        // A seal may have gone on till now, and others have looked it up again since, and opened it.
        if self.lookups.is_known(ino) {
            return false;
        }
        self.strike_out(upper, &mut state, ino);
        true
    }

    fn strike_out(&self, upper: &Upper, state: &mut State, ino: Ino) {
        if let Some(mut open) = self.opens.shard(ino).lock().remove(&ino) {
            let backing = open.record.backing.take();
            ended(upper, &open);
            backing.into_iter().for_each(|backing| self.close_backing(backing));
        }
        if self.catch_up(upper, state, ino).is_ok() {
            upper.data().unknow(ino);
        }
    }

    /// The inode as its data file says that it is, if that was written to past us since the tables were last told; with the
    /// data file's stamp.
    pub(super) fn caught_up(&self, upper: &Upper, inode: &UpperInode) -> FsResult<Option<(UpperInode, Stamp)>> {
        let Some(known) = upper.data().known(inode.inode.ino) else { return Ok(None) };
        let Some(backed) = inode.backed else { return Ok(None) };
        let stat = upper.data().stat(inode.inode.ino)?;
        let now = Stamp { bytes: stat.bytes, mtime: stat.mtime };
        if now == known {
            return Ok(None);
        }
        let mut inode = inode.clone();
        inode.backed = Some(crate::upper::table::Backed { bytes: now.bytes, ..backed });
        inode.inode.attrs.mtime = now.mtime;
        inode.inode.attrs.ctime = now.mtime;
        // Nobody knows who wrote.
        clear_privileges(&mut inode, || true);
        Ok(Some((inode, now)))
    }

    /// Lets the tables know what was written past us to `ino`, if anything.
    pub(super) fn catch_up(&self, upper: &Upper, state: &mut State, ino: Ino) -> FsResult<()> {
        self.catch_up_hidden(upper, state, ino)?;
        let Some(inode) = state.tables.inode(ino) else { return Ok(()) };
        if let Some((inode, stamp)) = self.caught_up(upper, inode)? {
            self.data_changes(ino);
            upper.data().know(ino, stamp);
            state.tables.touch(ino, |old| *old = inode);
        }
        Ok(())
    }

    /// [`Fs::catch_up`] for all files.
    pub(super) fn catch_up_all(&self, upper: &Upper, state: &mut State) -> FsResult<()> {
        self.catch_up_all_hidden(upper, state);
        upper.data().all_known().into_iter().try_for_each(|ino| self.catch_up(upper, state, ino))
    }

    /// Whether the kernel must ask again for the attributes of `inode` each time: they change without its knowing.
    pub(super) fn may_change(&self, upper: &Upper, inode: &UpperInode) -> bool {
        let ino = inode.inode.ino;
        if upper.data().known(ino).is_none() {
            return false;
        }
        is_privileged(inode) || self.may_be_mapped(ino)
    }

    /// Whether programs may have `ino` mapped for writing.
    pub(super) fn may_be_mapped(&self, ino: Ino) -> bool {
        self.opens.get(ino).is_some_and(|open| open.record.mappers > 0 || open.record.is_mapped)
    }

    /// The files that programs may have mapped for writing and that aren't passed through: the kernel may hold bytes of them
    /// that nobody has sent.
    pub fn mappable(&self) -> Vec<Ino> {
        let open = self.opens.all().into_iter().map(|open| open.record);
        open.filter(|record| record.mappers > 0 && !record.is_passed).map(|record| record.ino).collect()
    }

    /// From here on no other data file comes into use, until [`Fs::open_ways`]. Whoever calls it holds changes back.
    pub(super) fn close_ways(&self, upper: &Upper) -> InUse {
        let mut state = self.state.write();
        self.opens.is_closed.store(true, Ordering::Release);
        let mut in_use = InUse::default();
        let is_data = |open: &Open| open.record.is_passed && open.record.node == 0 && !open.record.is_warm;
        for open in self.opens.all().into_iter().filter(is_data) {
            let ino = open.record.ino;
            if open.record.count == 0 && upper.data().is_ours_alone(ino) {
                self.strike_out(upper, &mut state, ino);
                continue;
            }
            in_use.all.push(ino);
            let has_name = state.tables.inode(ino).is_some_and(|inode| inode.inode.nlink > 0);
            if open.record.is_written_past_us() && has_name {
                in_use.written.push(ino);
            }
        }
        in_use
    }

    /// Ends what [`Fs::close_ways`] began.
    pub(super) fn open_ways(&self) {
        self.opens.is_closed.store(false, Ordering::Release);
    }

    /// The files `in_use`, which stay in the upper, were sealed as their data files are now, but for those that somebody had open for
    /// writing: a write that the hold doesn't hold back may end in one of these, and leave the stamp as it is. They stay until the next
    /// seal, which reads them again. Whoever calls it holds their writers back, and waits here until what they write next has another
    /// time.
    pub(super) fn were_sealed(&self, upper: &Upper, in_use: &[Ino], held: &HashMap<Ino, HeldFile>) {
        let stamps = in_use.iter().filter_map(|ino| Some((*ino, upper.data().stamp(*ino).ok()?)));
        let stamps: Vec<_> = stamps.collect();
        let Some(newest) = stamps.iter().map(|(_, stamp)| stamp.mtime).max() else { return };
        until_passed(newest);
        for (ino, stamp) in stamps {
            let sealed = Some(stamp).filter(|stamp| has_passed(stamp.mtime));
            let is_ours_alone = held.get(&ino).is_some_and(|file| file.is_ours_alone);
            let is_open = match self.opens.shard(ino).lock().get_mut(&ino) {
                Some(open) => {
                    open.sealed = sealed.filter(|_| open.record.writers == 0 || is_ours_alone);
                    true
                }
                None => false,
            };
            // Who read it has closed it since. The closing of writers waits to be counted.
            if let Some(sealed) = sealed.filter(|_| !is_open) {
                self.drop_sealed(upper, ino, sealed);
            }
        }
    }

    /// The content that the sealed layers have of `ino`, if its data file is the same still.
    pub(super) fn sealed_content(&self, upper: &Upper, ino: Ino) -> Option<crate::content::Content> {
        let sealed = self.opens.get(ino)?.sealed?;
        let stat = upper.data().stat(ino).ok()?;
        let is_same = (stat.bytes, stat.mtime) == (sealed.bytes, sealed.mtime);
        match self.state.read().view.inode(ino).ok()??.node {
            Node::File(content) if is_same => Some(content),
            _ => None,
        }
    }

    /// Drops from the upper a file that was in use during a seal, if the sealed layers have it as it is. Whoever calls it holds
    /// seals back.
    fn drop_sealed(&self, upper: &Upper, ino: Ino, sealed: Stamp) {
        if let Err(errno) = self.try_drop_sealed(upper, ino, sealed) {
            tracing::warn!(%ino, ?errno, "cannot drop the data file of a sealed file now");
        }
    }

    fn try_drop_sealed(&self, upper: &Upper, ino: Ino, sealed: Stamp) -> FsResult<()> {
        // Else the next seal takes it: others wait meanwhile.
        let Some(_stripe) = self.stripe(ino).try_lock_for(COARSE) else { return Ok(()) };
        let mut state = self.state.write();
        let Some(inode) = state.tables.inode(ino) else { return Ok(()) };
        let is_whole = inode.backed.is_some_and(|backed| backed.base_bytes == 0);
        if !is_whole || inode.inode.nlink == 0 || self.opens.get(ino).is_some() {
            return Ok(());
        }
        // Not as the tables have it: what was stored through a mapping that has ended may be news.
        let stat = upper.data().stat(ino)?;
        if (stat.bytes, stat.mtime) != (sealed.bytes, sealed.mtime) {
            return Ok(());
        }
        let Some(below) = state.view.inode(ino)? else { return Ok(()) };
        let mut own = inode.inode.clone();
        own.node = below.node.clone();
        own.attrs.ctime = below.attrs.ctime;
        if own != below {
            return Ok(());
        }
        let mut change = Change::new();
        change.forget(ino);
        upper.journal().aside(|| upper.commit(&mut state.tables, change))?;
        drop(state);
        upper.remove_sealed_data(ino, stat.bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mount::caller::Caller;
    use crate::mount::front::{Asked, Front};
    use crate::mount::fuse::FuseOptions;
    use crate::mount::tests::{empty_fs, store};
    use crate::mount::{Flags, Transport, descriptor};

    const RDWR: i32 = libc::O_RDWR;

    /// The filesystem of the daemon after the one of `fs`, which died.
    fn resumed(fs: Fs) -> Arc<Fs> {
        let (view, upper) = (fs.view(), fs.upper().unwrap());
        let (id, opens) = (upper.id(), upper.opens().descriptor().unwrap());
        drop(fs);
        Arc::new(Fs::resumed(view, Some(Upper::resume(store(), id, opens).unwrap())))
    }

    fn count(fs: &Fs, ino: Ino) -> Option<(u32, bool)> {
        fs.opens.get(ino).map(|open| (open.record.count, open.record.is_miscounted))
    }

    fn with_file() -> (Fs, Ino) {
        let fs = empty_fs(store());
        let file = fs.make(Ino::ROOT, b"file", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.write(file, 0, b"data", None).unwrap();
        (fs, file)
    }

    #[test]
    fn what_was_forgotten_before_a_daemon_died_ends_nothing_that_is_open() {
        let (fs, file) = with_file();
        let fs = resumed(fs);
        fs.lookup(Ino::ROOT, b"file").unwrap().unwrap();
        fs.opened(file, RDWR);
        fs.unlink(Ino::ROOT, b"file").unwrap();
        // These look-ups were told to the daemon before.
        fs.forget(file, 5);
        assert!(fs.is_open(file));
        assert_eq!(fs.read(file, 0, &mut [0; 8]), Ok(4));
        fs.release(file, RDWR, false);
        fs.forget(file, 1);
        assert!(fs.getattr(file).is_err());
    }

    #[test]
    fn what_is_counted_twice_ends_when_it_is_forgotten() {
        let (fs, file) = with_file();
        // It died before it answered.
        fs.opened(file, RDWR);
        let fs = resumed(fs);
        let options = FuseOptions {
            dir: "/".into(),
            source: String::new(),
            allow_other: true,
            is_root: true,
            threads: 1,
            transport: Transport::Read,
            flags: Flags::default(),
            store_folder: "/".into(),
        };
        let front = Front::new(fs.clone(), &options);
        front.open(Asked { number: descriptor::again(8), caller: Caller::ROOT }, file, RDWR).unwrap();
        fs.release(file, RDWR, false);
        assert!(fs.is_open(file));
        // The next daemon knows it too.
        drop(front);
        let fs = resumed(Arc::into_inner(fs).unwrap());
        fs.forget(file, 1);
        assert!(!fs.is_open(file));
    }

    #[test]
    fn what_is_told_twice_and_ends_well_is_no_mark_for_later() {
        let (fs, file) = with_file();
        fs.opened(file, RDWR);
        fs.opened(file, RDWR);
        let fs = resumed(fs);
        // What is told twice is not counted.
        fs.release(file, RDWR, true);
        fs.release(file, RDWR, false);
        fs.release(file, RDWR, false);
        assert!(!fs.is_open(file));
        fs.release(file, RDWR, true);
        fs.opened(file, RDWR);
        fs.forget(file, 1);
        assert!(fs.is_open(file));
    }

    #[test]
    fn who_closes_files_while_a_seal_goes_on_waits_for_nothing() {
        let (fs, file) = with_file();
        let upper = fs.upper().unwrap();
        for _ in 0..3 {
            fs.opened(file, RDWR);
        }
        // As if it were written to past us.
        upper.data().know(file, upper.data().stamp(file).unwrap());
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        fs.release(file, RDWR, false);
        fs.release(file, RDWR, false);
        // Should the daemon die now, the next one hears of no close.
        assert_eq!(count(&fs, file), Some((3, true)));
        fs.opened(file, libc::O_RDONLY);
        drop(frozen);
        assert_eq!(count(&fs, file), Some((2, false)), "the end of a seal leaves nothing");
        fs.release(file, libc::O_RDONLY, false);
        upper.data().know(file, upper.data().stamp(file).unwrap());
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        fs.release(file, RDWR, false);
        assert!(fs.is_open(file));
        drop(frozen);
        assert!(!fs.is_open(file) && upper.data().known(file).is_none());
    }

    #[test]
    fn times_of_what_is_closed_while_a_seal_goes_on_are_saved_at_its_end() {
        let (fs, file) = with_file();
        fs.opened(file, RDWR);
        fs.write(file, 0, b"more", None).unwrap();
        fs.state.write().tables.touch(file, |_| {});
        let is_unsaved = || fs.state.read().tables.is_unsaved(file);
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        fs.release(file, RDWR, false);
        assert!(is_unsaved() && !fs.is_open(file));
        drop(frozen);
        assert!(!is_unsaved());
    }

    #[test]
    fn what_is_looked_up_again_before_its_forgetting_is_dealt_with_stays() {
        let (fs, file) = with_file();
        fs.opened(file, RDWR);
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        std::thread::scope(|scope| {
            let forgetting = scope.spawn(|| fs.forget(file, 1));
            while fs.lookups.is_known(file) {
                std::thread::yield_now();
            }
            fs.lookup(Ino::ROOT, b"file").unwrap().unwrap();
            drop(frozen);
            forgetting.join().unwrap();
        });
        assert!(fs.is_open(file));
        fs.unlink(Ino::ROOT, b"file").unwrap();
        fs.drop_waiting();
        assert_eq!(fs.read(file, 0, &mut [0; 8]), Ok(4));
        fs.release(file, RDWR, false);
        fs.forget(file, 1);
        assert!(fs.getattr(file).is_err());
    }
}
