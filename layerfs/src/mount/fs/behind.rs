//! Files that are passed through to the hidden mount: how they come into use, what the kernel knows better, how they leave.
//!
//! The kernel has bytes of such a file that we haven't heard of yet. Invariants: its length and time of change are those that the hidden
//! file has ([`Hidden::live`]); the tables have the length of what was written back, and never a longer one; what the
//! hidden mount's threads call here takes locks as any change does.

use std::fs::File;
use std::sync::Arc;

use super::super::errno::{Errno, FsResult};
use super::super::hidden::hand::Order;
use super::super::hidden::{Hidden, Pin, Quiet, Turn};
use super::super::watch::Op;
use super::attrs::{clear_privileges, may_lose_bits, unprivileged};
use super::files::Put;
use super::opens::{Access, Open, until_passed};
use super::{Fs, Stat, State};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::Node;
use crate::upper::Upper;
use crate::upper::opens::Backing;
use crate::upper::table::{Change, Stamp, UpperInode};

/// What is held while a file is opened, so that nobody else opens or truncates it.
#[derive(Default)]
pub(super) struct Prepared<'a> {
    pin: Option<Pin>,
    /// Whether the hidden file was there before.
    was_there: bool,
    _turn: Option<Turn<'a>>,
}

impl Prepared<'_> {
    /// Whether it may come into use while a seal goes on.
    pub fn was_there(&self) -> bool {
        self.was_there
    }
}

impl Fs {
    /// From now on large files of lower layers are passed through to `hidden` when they are opened for writing. Once, before the first
    /// is opened.
    pub(in crate::mount) fn hide_behind(&self, hidden: Arc<Hidden>) {
        let _ = self.hidden.set(hidden);
    }

    /// The hidden mount, if there is one.
    pub(in crate::mount) fn hidden(&self) -> Option<&Arc<Hidden>> {
        self.hidden.get()
    }

    /// Goes on with the hidden files that the daemon before this one had. They are known before `serve` begins to serve the hidden mount,
    /// and looked at after that.
    pub(in crate::mount) fn find_hidden(&self, serve: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let Some(hidden) = self.hidden.get() else { return Ok(()) };
        let records: Vec<_> = self.opens.records().into_iter().filter(|record| record.node != 0).collect();
        for record in &records {
            let stamp = self.told_stamp(record.ino).unwrap_or_default();
            hidden.find(record.node.into(), record.ino, stamp);
        }
        serve()?;
        for record in records {
            if let Err(error) = hidden.look_at(record.node.into()) {
                tracing::warn!(ino = %record.ino, %error, "cannot look at an open file's length and times");
            }
            if record.count == 0 {
                hidden.idle(record.node.into());
            }
        }
        Ok(())
    }

    /// Before `ino` is opened with `flags`: sees to it that there is a hidden file, if it is to be passed through to one.
    pub(super) fn prepare(&self, ino: Ino, flags: i32) -> FsResult<Prepared<'_>> {
        let Some(hidden) = self.hidden.get() else { return Ok(Prepared::default()) };
        let is_there = hidden.node(ino).is_some();
        let may_come = || Access::of(flags).writes && self.fits_behind(ino);
        if !is_there && !may_come() {
            return Ok(Prepared::default());
        }
        let turn = hidden.turn(ino);
        // One that was made and not used doesn't count: no seal may know of it.
        let was_there = hidden.was_kept(ino);
        if !was_there && !may_come() {
            return Ok(Prepared { pin: None, was_there, _turn: Some(turn) });
        }
        match hidden.pin(ino, self.told_stamp(ino)?) {
            Ok(pin) => Ok(Prepared { pin: Some(pin), was_there, _turn: Some(turn) }),
            Err(error) if was_there => {
                tracing::warn!(%ino, %error, "a file that is being written back cannot be opened");
                Err(error.into())
            }
            Err(error) => {
                tracing::warn!(%ino, %error, "a file is written to without a cache");
                Ok(Prepared { pin: None, was_there, _turn: Some(turn) })
            }
        }
    }

    /// Whether `ino` is to be passed through to the hidden mount when it is opened for writing now.
    fn fits_behind(&self, ino: Ino) -> bool {
        // What was is no hindrance, what is is.
        let is_free = self.opens.get(ino).is_none_or(|open| open.record.count == 0 && open.record.node != 0);
        let is_of_use = self.hidden.get().is_some_and(|hidden| hidden.is_of_use());
        // Who waits for what another host has can be killed; who waits for the hidden mount to read it can't.
        let is_here = || !self.state.read().view.chunks().is_remote();
        let may_come = is_free && is_of_use && !self.opens.is_closed();
        may_come && is_here() && self.may_fit_behind(ino) && self.has_room_for(ino)
    }

    /// Whether `ino` can be passed through to the hidden mount, if nobody has it open.
    fn may_fit_behind(&self, ino: Ino) -> bool {
        let Ok(inode) = self.state.read().inode(ino) else { return false };
        let is_large = match (&inode.inode.node, inode.backed) {
            (Node::File(_), Some(backed)) => backed.base_bytes > 0,
            (Node::File(content @ Content::Extents { .. }), None) => content.len() >= self.ranges_from,
            _ => false,
        };
        is_large && !may_lose_bits(&inode)
    }

    /// Whether the filesystem of the data files has room for all of `ino`: what the kernel keeps shall find its place later.
    fn has_room_for(&self, ino: Ino) -> bool {
        let space = self.upper.as_ref().and_then(|upper| upper.space().ok());
        let bytes = self.told_stamp(ino).map_or(u64::MAX, |stamp| stamp.bytes);
        space.is_some_and(|space| space.f_bavail.saturating_mul(space.f_frsize) > bytes)
    }

    /// What the tables say of the length and the time of change of `ino`.
    fn told_stamp(&self, ino: Ino) -> FsResult<Stamp> {
        let inode = self.state.read().inode(ino)?;
        Ok(Stamp { bytes: inode.size(), mtime: inode.inode.attrs.mtime })
    }

    /// The end of an opening: what was prepared and isn't used is let go.
    pub(super) fn was_opened(&self, ino: Ino, prepared: Prepared<'_>) {
        let node = prepared.pin.as_ref().map(Pin::node);
        // Before anybody is asked to let it go: what is pinned stays.
        drop(prepared);
        let is_used = |open: Open| open.record.count > 0 && Some(u64::from(open.record.node)) == node;
        if let (Some(node), Some(hidden)) = (node, self.hidden.get())
            && !self.opens.get(ino).is_some_and(is_used)
        {
            hidden.not_used(node);
        }
    }

    /// Waits until a write into `ino` gets a later time than the last one: else nobody could tell that there was one.
    pub(in crate::mount) fn let_time_pass(&self, ino: Ino) {
        let Some((stamp, _)) = self.hidden.get().and_then(|hidden| hidden.live(ino)) else { return };
        until_passed(stamp.mtime);
    }

    /// Whether the kernel may have bytes of `ino` that we haven't heard of.
    pub(in crate::mount) fn is_hidden(&self, ino: Ino) -> bool {
        self.hidden.get().is_some_and(|hidden| hidden.node(ino).is_some())
    }

    /// The backing of what was prepared.
    pub(super) fn hidden_backing(&self, prepared: &Prepared<'_>) -> Option<(Backing, u32)> {
        let pin = prepared.pin.as_ref()?;
        let file = File::from(pin.file()?.try_clone().ok()?);
        let backing = match self.backings.get()?.open_named(&file) {
            Ok(backing) => backing,
            Err(error) => {
                self.hidden.get()?.refused(&error);
                return None;
            }
        };
        pin.keep();
        Some((backing, pin.node() as u32))
    }

    /// Nobody has `node` open any more: it may go when all of it is written back.
    pub(super) fn hidden_is_idle(&self, node: u32) {
        if let Some(hidden) = self.hidden.get() {
            hidden.idle(node.into());
        }
    }

    /// Whether hidden file `node` is there still.
    pub(super) fn is_hidden_there(&self, node: u32) -> bool {
        self.hidden.get().is_some_and(|hidden| hidden.is_there(node.into()))
    }

    /// Writes back what is left of a hidden file that nobody has open, and lets it go.
    pub(in crate::mount) fn let_hidden_go(&self, node: u64) {
        let (Some(hidden), Some(upper)) = (self.hidden.get(), &self.upper) else { return };
        let ino = hidden.all().into_iter().find(|(other, _)| *other == node).map(|(_, ino)| ino);
        let Some(ino) = ino.filter(|_| hidden.finish(node)) else { return };
        let caught_up = {
            let _gate = self.changes();
            let mut state = self.state.write();
            let result = self.catch_up(upper, &mut state, ino);
            if state.tables.is_unsaved(ino)
                && let Err(error) = upper.save(&mut state.tables, &[ino])
            {
                tracing::warn!(%ino, %error, "cannot save the times of a file now");
            }
            result
        };
        if let Err(errno) = caught_up {
            tracing::debug!(%ino, ?errno, "a file that was closed is gone");
        }
        hidden.let_go(node);
    }

    /// Before the mount ends: has the kernel write back what it has.
    pub(in crate::mount) fn write_back_hidden(&self) {
        let Some(hidden) = self.hidden.get() else { return };
        if let Err(error) = hidden.write_back_all() {
            tracing::error!(%error, "what was written to files could not be written back");
        }
    }

    /// What the kernel knows better of `stat`.
    pub(super) fn as_it_is(&self, mut stat: Stat) -> Stat {
        let Some(hidden) = self.hidden.get() else { return stat };
        if let Some((stamp, is_news)) = hidden.live(stat.ino) {
            stat.size = stamp.bytes;
            if is_news {
                stat.attrs.permissions = unprivileged(stat.attrs.permissions);
                (stat.attrs.mtime, stat.attrs.ctime) = (stamp.mtime, stamp.mtime);
            }
            stat.may_change = self.may_be_mapped(stat.ino);
        }
        stat
    }

    /// Lets the tables know when `ino` was written to through the hidden mount, if it was.
    pub(super) fn catch_up_hidden(&self, upper: &Upper, state: &mut State, ino: Ino) -> FsResult<()> {
        let Some(hidden) = self.hidden.get() else { return Ok(()) };
        let Some((stamp, true)) = hidden.live(ino) else { return Ok(()) };
        let change = |inode: &mut UpperInode| {
            inode.inode.attrs.mtime = stamp.mtime;
            inode.inode.attrs.ctime = stamp.mtime;
            // Nobody knows who wrote.
            clear_privileges(inode, || true);
        };
        if state.tables.inode(ino).is_some() {
            state.tables.touch(ino, change);
        } else {
            let mut inode = state.inode(ino)?;
            change(&mut inode);
            let mut row = Change::new();
            // What is to be removed may be why it is asked for.
            row.makes_room();
            row.inode(inode);
            upper.journal().aside(|| upper.commit(&mut state.tables, row))?;
        }
        self.data_changes(ino);
        hidden.told(ino, stamp.mtime);
        Ok(())
    }

    /// [`Fs::catch_up_hidden`] for all files.
    pub(super) fn catch_up_all_hidden(&self, upper: &Upper, state: &mut State) {
        let Some(hidden) = self.hidden.get() else { return };
        for (_, ino) in hidden.all() {
            if let Err(errno) = self.catch_up_hidden(upper, state, ino) {
                tracing::debug!(%ino, ?errno, "a file that is written back is gone");
            }
        }
    }

    /// Writes what the kernel had of `ino`: its time of change is that of the program's write, and not this one's.
    pub(in crate::mount) fn write_back(&self, ino: Ino, offset: u64, data: &[u8]) -> FsResult<usize> {
        let _seen = self.seen(Op::Write, ino, None);
        let (upper, _gate) = self.enter()?;
        let _stripe = self.stripe(ino).lock();
        if self.hidden.get().is_some_and(|hidden| hidden.node(ino).is_none()) {
            // It was removed just now.
            return Ok(data.len());
        }
        let Put { bytes, end, failure } = self.put(upper, ino, offset, data)?;
        self.state.write().tables.touch(ino, |inode| {
            if let Some(backed) = &mut inode.backed {
                backed.bytes = backed.bytes.max(end);
            }
        });
        // The kernel takes what it is told for all, and forgets the rest.
        failure.map_or(Ok(bytes), Err)
    }

    /// Has `order` done to the hidden file of `ino`, if it has one; none if not. Hold no lock.
    pub(in crate::mount) fn order_hidden(&self, ino: Ino, order: Order) -> Option<FsResult<()>> {
        let hidden = self.hidden.get()?;
        let node = hidden.node(ino)?;
        Some(hidden.order(node, order).map_err(Errno::from))
    }

    /// Before `ino` gets another length: its hidden file gets it, and nobody opens it until what is returned is dropped.
    pub(in crate::mount) fn truncate_hidden(&self, ino: Ino, bytes: u64) -> FsResult<Option<impl Drop + '_>> {
        let Some(hidden) = self.hidden.get() else { return Ok(None) };
        if hidden.node(ino).is_none() && !self.may_fit_behind(ino) {
            return Ok(None);
        }
        let turn = hidden.turn(ino);
        if let Some(node) = hidden.node(ino) {
            hidden.order(node, Order::Truncate(bytes))?;
        }
        Ok(Some(turn))
    }

    /// Holds back those who write to hidden files, before changes are held back.
    pub(super) fn quiet(&self) -> Result<Option<Quiet>> {
        let Some(hidden) = self.hidden.get() else { return Ok(None) };
        {
            let _state = self.state.write();
            self.opens.close();
        }
        let quiet = hidden.quiet().map_err(|error| Error::io("holding back the writers of open files", error));
        quiet.map(Some).inspect_err(|_| self.open_ways())
    }
}
