//! Mounts: a filesystem on a folder of the host, from start to end.
//!
//! [`fs`] is the filesystem without a kernel; [`fuse`] mounts it, [`device`] or [`uring`] brings requests, which
//! [`requests`] decodes for [`front`]. Here is what holds them: which layer and upper,
//! what is recorded so that a daemon that starts again mounts it again, and what is cleaned up when it ends, by our
//! doing or by somebody's `umount`. Invariant: a mount whose session has ended has saved its upper.

mod abi;
pub mod acl;
pub mod awake;
mod backing;
pub mod caller;
mod descriptor;
mod device;
pub mod errno;
mod flags;
mod front;
pub mod fs;
mod fuse;
pub mod helper;
mod hidden;
mod leader;
mod notifier;
mod point;
pub mod registry;
mod requests;
mod uring;
pub mod watch;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

pub use flags::Flags;
pub use point::unescape;
pub use registry::MountRecord;

use crate::error::{Error, ErrorClass, Result};
use crate::id::{LayerId, LayerName, UpperId};
use crate::monitor::Monitor;
use crate::seal::{self, SealOptions, SealReport};
use crate::squash::{self, Chain, SquashReport, Squashed};
use crate::store::{Expect, Pin, Store};
use crate::upper::hold::Hold;
use crate::upper::opens::is_memory;
use crate::upper::table::Tables;
use crate::upper::{self, Upper, UpperRecord, UpperSize};
use crate::view::View;
use backing::Device;
use fs::Fs;
use fuse::{FuseOptions, Kernel, Session};
use hidden::Hidden;
use notifier::Target;

/// Which upper a mount gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpperChoice {
    /// None: the mount is read-only.
    ReadOnly,
    /// A new one without a name.
    Fresh,
    /// The one that has this name; it is made if there is none.
    Named(LayerName),
    /// This one.
    Existing(UpperId),
}

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// By io_uring where that can be had, else by reading.
    Auto,
    /// By io_uring (Linux 6.14, with `/sys/module/fuse/parameters/enable_uring` set): a request costs a fraction.
    Uring,
    /// By reading and writing the device.
    #[default]
    Read,
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The upper.
    pub upper: UpperChoice,
    /// Whether other users may use it; if unset, they may if the superuser mounts.
    pub allow_other: Option<bool>,
    /// How many threads serve it; 0 stands for a number that fits the machine.
    pub threads: usize,
    /// How requests come.
    pub transport: Transport,
    /// Whether the kernel may keep what is written to large files of lower layers until it writes back: by a hidden mount, where one
    /// can be had.
    pub writeback: bool,
    /// What the kernel shall keep of it.
    pub flags: Flags,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            upper: UpperChoice::Fresh,
            allow_other: None,
            threads: 0,
            transport: Transport::Read,
            writeback: true,
            flags: Flags::default(),
        }
    }
}

/// How to unmount.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnmountOptions {
    /// Take it out of the tree even if programs use it; it ends when they do, or at once if it is to end everywhere.
    pub lazy: bool,
    /// Keep the record, so that the next daemon mounts it again: for a daemon that stops. The record of what somebody else has unmounted
    /// isn't kept.
    pub keep_record: bool,
    /// Remove an upper without a name, with all that is in it.
    pub discard_upper: bool,
    /// End it in other mount namespaces too, if they have copies: programs that use those get errors.
    pub everywhere: bool,
}

/// What there is to know of a mount.
#[derive(Clone, Debug, Serialize)]
pub struct MountInfo {
    /// Its record.
    #[serde(flatten)]
    pub record: MountRecord,
    /// How requests come: never [`Transport::Auto`].
    pub serves_by: Transport,
    /// Whether large files of lower layers have the kernel's writeback cache.
    pub has_writeback: bool,
    /// What its warm copies take of the disk, in bytes.
    pub warm_bytes: u64,
    /// The layer below the upper, now.
    pub base: Option<LayerId>,
    /// The upper's record.
    pub upper_record: Option<UpperRecord>,
    /// How much the upper holds.
    pub upper_size: Option<UpperSize>,
    /// Bytes that programs wrote through this mount.
    pub written_bytes: u64,
    /// For how many seconds it has been mounted.
    pub seconds: u64,
}

/// A mount.
pub struct Mount {
    store: Arc<Store>,
    record: MountRecord,
    kernel: Kernel,
    /// What connects it to the kernel, for whoever keeps it beyond this process's end.
    descriptors: Mutex<Vec<OwnedFd>>,
    serves_by: Transport,
    started: Instant,
    /// None once it has ended.
    fs: Mutex<Option<Arc<Fs>>>,
    pin: Mutex<Option<Pin>>,
    ending: Mutex<UnmountOptions>,
    /// What the kernel keeps of it: its record's to begin with.
    flags: Mutex<Flags>,
    phase: Mutex<Phase>,
    turned: Condvar,
    /// Held by a seal until the kernel has been told of it.
    sealing: Mutex<()>,
    /// Stands for the process that keeps the descriptors beyond this one's end.
    keeper: Mutex<Option<OwnedFd>>,
}

/// How far a mount's life is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The kernel asks.
    Served,
    /// It doesn't any more: what it changed is being saved.
    CleanedUp,
    Ended,
}

/// For how long the kernel may still ask after a mount was taken from its folder, or its connection was cut: it goes on for ever where
/// another folder or another mount namespace has a copy.
const COPIED_WAIT: Duration = Duration::from_secs(5);

impl std::fmt::Debug for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mount").field("record", &self.record).finish_non_exhaustive()
    }
}

/// Keeps the layers of all uppers and recorded mounts of `store` from being collected, and removes what a crash left
/// of uppers that were being removed. Call it once, when the store is opened.
pub fn attach(store: &Arc<Store>) -> Result<()> {
    let db = Arc::downgrade(store.db());
    store.add_root_source(Box::new(move || {
        let Some(db) = db.upgrade() else { return Ok(Vec::new()) };
        let mut roots = upper::roots(&db)?;
        roots.extend(registry::roots(&db)?);
        Ok(roots)
    }));
    upper::remove_leftovers(store)
}

/// Mounts again what was mounted when the last daemon ended, or goes on with it where `kept` has the descriptors of a
/// mount point: programs have noticed nothing but a pause then. What fails keeps its record.
///
/// # Errors
/// Those of reading the records. No space: one that is kept can't go on until there is some, and isn't let go; the caller ends its process as by a
/// kill.
pub fn restore(
    store: &Arc<Store>,
    kept: &mut HashMap<PathBuf, Vec<OwnedFd>>,
) -> Result<Vec<(MountRecord, Result<Arc<Mount>>)>> {
    let mut restored = Vec::new();
    let mut records = registry::list(store.db())?;
    // The others may have to wait for the disk, while programs wait for these.
    records.sort_by_key(|record| !kept.contains_key(&record.dir));
    for record in records {
        let mount = match kept.remove(&record.dir) {
            Some(descriptors) => {
                let device = descriptors.first().and_then(|device| device.try_clone().ok());
                let resumed = Mount::resume(store, &record, descriptors);
                if let Err(error) = &resumed {
                    if error.class() == ErrorClass::NoSpace {
                        return resumed.map(|_| restored);
                    }
                    // Nobody will answer it: whoever has a descriptor of it yet must not keep those waiting who use it.
                    if let (Some(device), Some(number)) = (device, record.device) {
                        point::cut(device.as_fd(), number);
                    }
                }
                resumed
            }
            None => Mount::start_again(store, &record),
        };
        restored.push((record, mount));
    }
    Ok(restored)
}

/// Sets what the kernel keeps of the layerfs that lies uppermost on `dir`, whoever serves it. [`Mount::set_flags`] keeps it beyond that.
///
/// # Errors
/// [`Error::Invalid`] if none lies there; [`Error::File`]: only root may.
pub fn set_flags(dir: &Path, flags: Flags) -> Result<()> {
    point::set_flags(dir, None, flags.to_kernel())
}

impl Mount {
    /// Mounts the stack of `layer` on the folder `dir`. `source` is what the user asked for. For an existing upper
    /// `layer` may be none; if it is given, the upper must lie on it. Without either, the mount starts empty.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Busy`] if the upper or the folder is in use, [`Error::Denied`], [`Error::File`].
    pub fn start(
        store: &Arc<Store>,
        layer: Option<LayerId>,
        source: &str,
        dir: &Path,
        options: &MountOptions,
    ) -> Result<Arc<Mount>> {
        let dir = point::prepare(dir)?;
        let pin = layer.map(|layer| store.pin(layer)).transpose()?;
        let (fs, made) = open_fs(store, layer, &options.upper)?;
        let started = Mount::serve(store, fs, source, dir, options);
        match started {
            Ok(mount) => {
                *mount.pin.lock() = pin;
                Ok(mount)
            }
            Err(error) => {
                if let Some(id) = made
                    && let Err(error) = upper::remove(store, id)
                {
                    tracing::warn!(upper = %id, %error, "cannot remove the upper of a mount that failed");
                }
                Err(error)
            }
        }
    }

    /// Mounts what `record` says, when the mount itself has ended.
    ///
    /// # Errors
    /// As [`Mount::start`].
    pub fn start_again(store: &Arc<Store>, record: &MountRecord) -> Result<Arc<Mount>> {
        let upper = record.upper.map_or(UpperChoice::ReadOnly, UpperChoice::Existing);
        let (allow_other, threads) = (Some(record.allow_other), record.threads.into());
        let (transport, writeback, flags) = (record.transport, record.writeback, record.flags);
        let options = MountOptions { upper, allow_other, threads, transport, writeback, flags };
        let mount = Mount::start(store, record.layer, &record.source, &record.dir, &options)?;
        if let Some(upper) = mount.fs.lock().as_ref().and_then(|fs| fs.upper()) {
            upper.owes_more();
        }
        Ok(mount)
    }

    /// Goes on with the mount of `record`, whose daemon died and left `kept`.
    fn resume(store: &Arc<Store>, record: &MountRecord, mut kept: Vec<OwnedFd>) -> Result<Arc<Mount>> {
        let opens = kept.iter().position(is_memory).map(|at| kept.remove(at));
        // The last two are the hidden mount's, if there are so many.
        let hidden = if kept.len() > 2 { kept.split_off(kept.len() - 2) } else { Vec::new() };
        let pin = record.layer.map(|layer| store.pin(layer)).transpose()?;
        let (view, upper) = match record.upper {
            Some(id) => {
                let (upper, tables) = Upper::resume(store, id, opens)?;
                (open_view(store, upper.record().base)?, Some((upper, tables)))
            }
            None => (open_view(store, record.layer)?, None),
        };
        let fs = Arc::new(Fs::resumed(view, upper));
        let session = Session::resume(fs.clone(), &fuse_options(store, record), &kept)?;
        if let Ok([device, root]) = <[OwnedFd; 2]>::try_from(hidden) {
            let failed = |e| Error::io("going on with a hidden mount", e);
            fs.hide_behind(Hidden::resumed(device, root).map_err(failed)?);
        }
        let mut record = record.clone();
        if record.device.is_none() {
            // An earlier version mounted it. Where it was left nobody knows.
            record.device = point::device(&record.dir);
            if let Err(error) = registry::put(store.db(), &record) {
                tracing::warn!(dir = %record.dir.display(), %error, "cannot note the number of a mount");
            }
        }
        let mount = Mount::run(store, fs, session, record)?;
        *mount.pin.lock() = pin;
        Ok(mount)
    }

    fn serve(
        store: &Arc<Store>,
        fs: Arc<Fs>,
        source: &str,
        dir: PathBuf,
        options: &MountOptions,
    ) -> Result<Arc<Mount>> {
        let threads = if options.threads == 0 { default_threads(store, &fs)? } else { options.threads.min(64) };
        let allow_other = options.allow_other.unwrap_or(rustix::process::geteuid().is_root());
        let upper = fs.upper().map(Upper::id);
        let layer = if upper.is_none() { fs.view().top() } else { None };
        let (threads, transport, writeback) = (threads as u16, options.transport, options.writeback);
        let source = source.to_owned();
        let (device, flags) = (None, options.flags);
        let mut record =
            MountRecord { dir, source, layer, upper, allow_other, threads, transport, writeback, device, flags };
        let session = Session::mount(fs.clone(), &fuse_options(store, &record))?;
        record.device = point::device(&record.dir);
        if flags.is_more_than_at_first() {
            // The session, which is dropped, unmounts it.
            point::set_flags(&record.dir, record.device, flags.to_kernel())?;
        }
        if writeback && can_pass_through(&fs) {
            match Hidden::new() {
                Ok(hidden) => fs.hide_behind(hidden),
                Err(error) => tracing::info!(%error, "large files of lower layers are written to without a cache"),
            }
        }
        let mount = Mount::run(store, fs, session, record)?;
        if let Err(error) = registry::put(store.db(), &mount.record) {
            mount.unmount(&UnmountOptions { lazy: true, ..Default::default() })?;
            return Err(error);
        }
        Ok(mount)
    }

    /// Serves `session` until it ends.
    fn run(store: &Arc<Store>, fs: Arc<Fs>, session: Session, record: MountRecord) -> Result<Arc<Mount>> {
        let (kernel, mut descriptors, serves_by) = (session.kernel(), session.descriptors()?, session.transport());
        if can_pass_through(&fs) {
            fs.pass_through(Box::new(Device::new(session.device()?)));
        }
        if let Some(hidden) = fs.hidden() {
            let failed = |e| Error::io("serving a hidden mount", e);
            descriptors.extend(hidden.descriptors().map_err(failed)?);
            let threads = usize::from(record.threads).clamp(2, 4);
            fs.find_hidden(|| hidden.start(&fs, threads)).map_err(failed)?;
        }
        if let Some(upper) = fs.upper() {
            let failed = |e| Error::io("duplicating a descriptor", e);
            descriptors.extend(upper.opens().descriptor().map_err(failed)?);
        }
        fs.give_ahead(Box::new(kernel.clone()));
        if can_pass_through(&fs) {
            fs.keep_warm();
        }
        let (send, receive) = crossbeam::channel::bounded::<Arc<Mount>>(1);
        let (memory, dir) = (session.memory(), record.dir.clone());
        let serve = move || {
            let result = session.serve(&dir);
            if let Ok(mount) = receive.recv() {
                mount.finish(result);
            }
        };
        let thread = std::thread::Builder::new().name("mount".to_owned()).spawn(serve);
        thread.map_err(|e| Error::io("starting a thread", e))?;
        if let (Some(memory), Some(device)) = (memory, record.device) {
            memory.set_device(device);
        }
        point::set_read_ahead(record.device, point::READ_AHEAD_KIB);
        let mount = Arc::new(Mount {
            store: store.clone(),
            flags: Mutex::new(record.flags),
            record,
            kernel,
            descriptors: Mutex::new(descriptors),
            serves_by,
            started: Instant::now(),
            fs: Mutex::new(Some(fs)),
            pin: Mutex::new(None),
            ending: Mutex::default(),
            phase: Mutex::new(Phase::Served),
            turned: Condvar::new(),
            sealing: Mutex::new(()),
            keeper: Mutex::new(None),
        });
        let _ = send.send(mount.clone());
        Ok(mount)
    }

    /// The connections to the kernel, with io_uring the memory that requests are in, and that which tells what is open: while
    /// copies of them are open the mount is there, whatever becomes of this process, and [`restore`] goes on with them.
    /// None once it has ended.
    ///
    /// # Errors
    /// Those of duplicating descriptors.
    pub fn descriptors(&self) -> Result<Vec<OwnedFd>> {
        let copies: std::io::Result<Vec<_>> = self.descriptors.lock().iter().map(OwnedFd::try_clone).collect();
        copies.map_err(|e| Error::io("duplicating a descriptor", e))
    }

    /// Process `keeper` has what [`Mount::descriptors`] gave, and will give it to the next who serves the mount.
    pub fn is_kept_by(&self, keeper: u32) {
        let process = i32::try_from(keeper).ok().and_then(Pid::from_raw);
        *self.keeper.lock() = process.and_then(|process| pidfd_open(process, PidfdFlags::empty()).ok());
    }

    /// Its record.
    pub fn record(&self) -> &MountRecord {
        &self.record
    }

    /// What the kernel keeps of it, as far as this process was told.
    pub fn flags(&self) -> Flags {
        *self.flags.lock()
    }

    /// Sets what the kernel keeps of it, now and when it is mounted again.
    ///
    /// # Errors
    /// Those of the kernel: only root may; those of keeping the record.
    pub fn set_flags(&self, flags: Flags) -> Result<()> {
        let mut known = self.flags.lock();
        // Its record goes while this is locked.
        if self.fs().is_none() {
            return Err(self.gone());
        }
        point::set_flags(&self.record.dir, self.record.device, flags.to_kernel())?;
        registry::put(self.store.db(), &MountRecord { flags, ..self.record.clone() })?;
        *known = flags;
        Ok(())
    }

    /// From now on its files are read here and there, by who runs on them while they are still on their way: neither the kernel nor we
    /// fetch what follows a read. Forgotten when the daemon ends.
    pub fn expect_scattered(&self) {
        point::set_read_ahead(self.record.device, point::SCATTERED_KIB);
        if let Some(fs) = self.fs() {
            fs.expect_scattered();
        }
    }

    /// The filesystem; none once it has ended.
    pub fn fs(&self) -> Option<Arc<Fs>> {
        self.fs.lock().clone()
    }

    /// What there is to know of it; none once it has ended.
    pub fn info(&self) -> Option<MountInfo> {
        let fs = self.fs()?;
        let upper_size = fs.upper().map(|upper| {
            let (inodes, dentries) = fs.upper_counts();
            let allocated_bytes = upper.data().allocated_bytes().unwrap_or(0);
            UpperSize { inodes, dentries, allocated_bytes }
        });
        Some(MountInfo {
            record: MountRecord { flags: self.flags(), ..self.record.clone() },
            serves_by: self.serves_by,
            has_writeback: fs.hidden().is_some_and(|hidden| hidden.is_of_use()),
            warm_bytes: fs.warm_bytes(),
            base: fs.view().top(),
            upper_record: fs.upper().map(Upper::record),
            upper_size,
            written_bytes: fs.written_bytes(),
            seconds: self.started.elapsed().as_secs(),
        })
    }

    /// Seals the upper; the mount goes on over the new layer.
    ///
    /// # Errors
    /// As [`seal::seal`]; [`Error::NotFound`] once the mount has ended.
    pub fn seal(&self, options: &SealOptions, monitor: &dyn Monitor) -> Result<SealReport> {
        let fs = self.fs().ok_or_else(|| self.gone())?;
        let _sealing = self.sealing.lock();
        if fs.is_writable() {
            self.fetch_mapped(&fs).map_err(|e| Error::io("fetching what was written to mapped files", e))?;
            fs.write_back_hidden();
        }
        let report = seal::seal(&self.store, &fs, options, monitor)?;
        if let Some(recorder) = fs.recorder()
            && let Err(error) = self.store.add_trace(report.layer, &recorder.ids())
        {
            tracing::warn!(%error, "the trace of a sealed layer is not kept");
        }
        let pin = self.store.pin(report.layer);
        report.changed_inodes.iter().for_each(|ino| self.kernel.attributes_changed(*ino));
        report.changed_folders.iter().for_each(|folder| self.kernel.listing_changed(*folder));
        fs.listings_told();
        *self.pin.lock() = Some(pin?);
        Ok(report)
    }

    /// Has the kernel send what programs wrote through mappings of files that aren't passed through. No thread of this process waits for
    /// that where another can.
    fn fetch_mapped(&self, fs: &Fs) -> std::io::Result<()> {
        let files = fs.mappable();
        if files.is_empty() {
            return Ok(());
        }
        let (dir, number) = (&self.record.dir, self.record.device);
        if !helper::is_possible() {
            if let Err(error) = point::sync(dir, number) {
                tracing::warn!(dir = %dir.display(), %error, "cannot sync a mount");
            }
            files.into_iter().for_each(|ino| self.kernel.fetch_written(ino));
            return Ok(());
        }
        let device = self.descriptors.lock().first().map(OwnedFd::try_clone).transpose()?;
        let keeper = self.keeper.lock().as_ref().map(OwnedFd::try_clone).transpose()?;
        // Else it has ended.
        device.map_or(Ok(()), |device| Target::new(dir, number, device, keeper).fetch_written(&files))
    }

    /// Squashes the layers that are of the top one's kind, if they are more than `past`, and goes on over the one that
    /// they become; `names`, which must refer to the top, refer to it too then. None if there was nothing to do, or the
    /// mount was sealed meanwhile, or a file that was removed is open and needs the old layers.
    ///
    /// Takes as long as reading and writing the chain's tables; changes wait for a moment at the end.
    ///
    /// # Errors
    /// As [`squash::squash`]; [`Error::Denied`] for a read-only mount; [`Error::NotFound`] once the mount has ended.
    pub fn squash(&self, past: usize, names: &[LayerName], monitor: &dyn Monitor) -> Result<Option<SquashReport>> {
        let fs = self.fs().ok_or_else(|| self.gone())?;
        let Some(top) = fs.view().top() else { return Ok(None) };
        let chain = Chain::of_kind(&self.store, top)?;
        if chain.layers <= past.max(1) {
            return Ok(None);
        }
        let squashed = squash::prepare(&self.store, chain, None, monitor)?;
        let names: Vec<_> = names.iter().map(|name| (name.clone(), Expect::Is(top))).collect();
        Ok(self.move_to(&fs, &squashed, &names)?.then_some(squashed.report))
    }

    /// Goes on over a squashed layer, if the mount lies on the chain that it was made of.
    ///
    /// # Errors
    /// As [`seal::rest_on`]; [`Error::NotFound`] once the mount has ended.
    pub fn rest_on(&self, squashed: &Squashed) -> Result<bool> {
        let fs = self.fs().ok_or_else(|| self.gone())?;
        self.move_to(&fs, squashed, &[])
    }

    fn move_to(&self, fs: &Fs, squashed: &Squashed, names: &[(LayerName, Expect)]) -> Result<bool> {
        let moved = seal::rest_on(&self.store, fs, squashed, names)?;
        if moved {
            *self.pin.lock() = Some(self.store.pin(squashed.report.layer)?);
        }
        Ok(moved)
    }

    /// Unmounts, and waits until everything is saved (but not if programs keep a lazily unmounted one going).
    ///
    /// A copy goes on: on another folder (`mount --bind`), or in another mount namespace (a container's, or made by `unshare`) until that
    /// gives it up, unless it is to end everywhere. [`Mount::has_ended`] tells.
    ///
    /// # Errors
    /// [`Error::Busy`] if programs use it; [`Error::Denied`] if this user may not end copies; [`Error::Invalid`] if something else is
    /// mounted over it.
    pub fn unmount(&self, options: &UnmountOptions) -> Result<()> {
        if self.fs().is_none() {
            return Ok(());
        }
        let mut options = *options;
        let is_here = self.places().contains(&self.record.dir);
        let before = {
            let mut ending = self.ending.lock();
            options.keep_record &= is_here || ending.keep_record;
            std::mem::replace(&mut *ending, options)
        };
        if let Err(error) = point::unmount_own(&self.record.dir, self.record.device, options.lazy) {
            *self.ending.lock() = before;
            return Err(error);
        }
        match (options.lazy, options.everywhere) {
            (true, false) => Ok(()),
            (false, false) => {
                self.wait_unless_copied();
                Ok(())
            }
            (false, true) if self.wait_unless_copied() => Ok(()),
            (_, true) => self.end_everywhere(),
        }
    }

    fn end_everywhere(&self) -> Result<()> {
        let refused = |why| Error::Platform { what: "ending a mount everywhere", detail: why };
        let Some(device) = self.record.device else {
            let why = "an earlier version mounted it, and didn't note its number; it ends with what has copies of it";
            return Err(refused(why.to_owned()));
        };
        tracing::warn!(dir = %self.record.dir.display(), "ends a mount where there are copies of it too");
        if let Some(fs) = self.fs() {
            // It isn't with us yet, and is lost with the connection.
            if let Err(error) = self.fetch_mapped(&fs) {
                tracing::error!(%error, "what programs wrote through mappings can't be fetched, and is lost");
            }
        }
        let was_there = point::end_everywhere(device)?;
        if !self.is_let_go() {
            let was = if was_there { "its connection was cut, and it goes on" } else { "the kernel has no connection" };
            return Err(refused(format!("{was} (number {})", libc::minor(device))));
        }
        self.wait();
        Ok(())
    }

    /// Whether it is mounted nowhere any more that this process sees, and hasn't ended: another mount namespace has a copy, or somebody
    /// has just unmounted it.
    pub fn is_left(&self) -> bool {
        self.places().is_empty() && !self.has_ended()
    }

    /// The folders that it is mounted on, as far as this process sees them.
    pub fn places(&self) -> Vec<PathBuf> {
        let dir = || self.record.dir.clone();
        match self.record.device {
            Some(device) => point::places(device).unwrap_or_else(|| vec![dir()]),
            None => point::is_layerfs(&self.record.dir).then(dir).into_iter().collect(),
        }
    }

    /// The processes in whose mount namespaces it is mounted, as far as this user may see them.
    pub fn processes(&self) -> Vec<u32> {
        self.record.device.map(point::processes).unwrap_or_default()
    }

    /// If it is mounted nowhere any more (somebody's `umount`), waits until it has ended, as [`Mount::unmount`] does.
    pub fn wait_if_left(&self) {
        if self.is_left() {
            self.wait_unless_copied();
        }
    }

    /// Waits until it has ended, unless the kernel goes on with it somewhere else. Returns whether it has.
    fn wait_unless_copied(&self) -> bool {
        if !self.is_let_go() {
            let dir = self.record.dir.display();
            tracing::warn!(%dir, "unmounted, but there are copies of it elsewhere: it ends when those go");
            return false;
        }
        self.wait();
        true
    }

    /// Waits until the kernel asks no more, but not for long. Returns whether that is so.
    fn is_let_go(&self) -> bool {
        let (mut phase, until) = (self.phase.lock(), Instant::now() + COPIED_WAIT);
        while *phase == Phase::Served && !self.turned.wait_until(&mut phase, until).timed_out() {}
        *phase != Phase::Served
    }

    /// Waits until it has ended.
    pub fn wait(&self) {
        let mut phase = self.phase.lock();
        while *phase != Phase::Ended {
            self.turned.wait(&mut phase);
        }
    }

    /// Keeps the trace of what was read through it until now, if that is more than the last time.
    pub fn save_trace(&self) {
        if let Some(fs) = self.fs() {
            save_trace(&self.store, &fs);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        *self.phase.lock() == Phase::Ended
    }

    fn turn(&self, phase: Phase) {
        *self.phase.lock() = phase;
        self.turned.notify_all();
    }

    fn gone(&self) -> Error {
        Error::NotFound { what: "mount", name: self.record.dir.display().to_string() }
    }

    fn finish(&self, served: std::io::Result<()>) {
        if let Err(error) = served {
            tracing::error!(dir = %self.record.dir.display(), %error, "a mount's session failed");
        }
        // Where it was cut it is there still, and answers nobody.
        if let Err(error) = point::unmount_own(&self.record.dir, self.record.device, true) {
            tracing::debug!(dir = %self.record.dir.display(), %error, "a mount that has ended stays");
        }
        self.turn(Phase::CleanedUp);
        let options = *self.ending.lock();
        if let Err(error) = self.clean_up(options) {
            tracing::error!(dir = %self.record.dir.display(), %error, "cannot clean up after a mount");
        }
        *self.pin.lock() = None;
        self.descriptors.lock().clear();
        self.turn(Phase::Ended);
    }

    fn clean_up(&self, options: UnmountOptions) -> Result<()> {
        let Some(fs) = self.fs.lock().take() else { return Ok(()) };
        fs.stop_giving();
        fs.stop_warming();
        let hidden = fs.hidden().cloned();
        fs.write_back_hidden();
        fs.close_backings();
        if let Some(hidden) = &hidden {
            hidden.end();
        }
        let noted = fs.upper().map_or(Ok(()), |upper| upper.note_writers(&fs.written_past_the_end()));
        save_trace(&self.store, &fs);
        fs.drop_orphans();
        fs.save()?;
        let upper = fs.upper().map(Upper::record);
        let is_clean = seal::is_clean(&fs);
        // Who lets a hidden file go has it for a moment; who mounts the upper next wants it alone.
        let begun = Instant::now();
        while hidden.is_some() && Arc::strong_count(&fs) > 1 && begun.elapsed() < COPIED_WAIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(upper) = fs.upper() {
            upper.sync()?;
        }
        drop(fs);
        if options.keep_record {
            return noted;
        }
        {
            let _flags = self.flags.lock();
            registry::remove(self.store.db(), &self.record.dir)?;
        }
        match upper {
            Some(record) if record.name.is_none() && (is_clean || options.discard_upper) => {
                upper::remove(&self.store, record.id)
            }
            _ => noted,
        }
    }
}

/// A trace is a help: that it can't be kept is no failure.
fn save_trace(store: &Store, fs: &Fs) {
    let (Some(top), Some(recorder)) = (fs.view().top(), fs.recorder()) else { return };
    if let Some(ids) = recorder.take_news()
        && let Err(error) = store.add_trace(top, &ids)
    {
        tracing::warn!(layer = %top, %error, "a trace is not kept");
    }
}

/// Readers of a partial layer wait for another host, and others must get through meanwhile.
const PARTIAL_THREADS: usize = 16;

/// Whether the kernel may read and write files of `fs` past us, and a seal can hold their writers.
fn can_pass_through(fs: &Fs) -> bool {
    let may_hold = |upper: &Upper| Hold::is_possible_in(upper.data().path());
    fs.is_writable() && rustix::process::geteuid().is_root() && fs.upper().is_some_and(may_hold)
}

fn default_threads(store: &Store, fs: &Fs) -> Result<usize> {
    let is_partial = match fs.view().top() {
        Some(top) => !store.partials_of_stack(top)?.is_empty(),
        None => false,
    };
    let least = if is_partial { PARTIAL_THREADS } else { 4 };
    Ok(std::thread::available_parallelism().map_or(4, usize::from).clamp(least, 16))
}

fn open_view(store: &Arc<Store>, layer: Option<LayerId>) -> Result<Arc<View>> {
    match layer {
        Some(layer) => View::open(store, layer),
        None => Ok(Arc::new(View::empty(store.clone()))),
    }
}

fn fuse_options(store: &Store, record: &MountRecord) -> FuseOptions {
    FuseOptions {
        dir: record.dir.clone(),
        source: record.source.clone(),
        allow_other: record.allow_other,
        is_root: rustix::process::geteuid().is_root(),
        threads: record.threads.max(1).into(),
        transport: record.transport,
        flags: record.flags,
        store_folder: store.folder().to_owned(),
    }
}

/// The filesystem for a mount; with it the id of an upper that was made for it.
fn open_fs(store: &Arc<Store>, layer: Option<LayerId>, choice: &UpperChoice) -> Result<(Arc<Fs>, Option<UpperId>)> {
    let view = |layer: Option<LayerId>| open_view(store, layer);
    let existing = match choice {
        UpperChoice::ReadOnly if layer.is_none() => {
            return Err(Error::invalid("a read-only mount needs a layer to show"));
        }
        UpperChoice::ReadOnly => return Ok((Arc::new(Fs::read_only(view(layer)?)), None)),
        UpperChoice::Fresh => None,
        UpperChoice::Named(name) => upper::find(store.db(), name)?,
        UpperChoice::Existing(id) => {
            let missing = || Error::NotFound { what: "upper", name: id.to_string() };
            Some(upper::record(store.db(), *id)?.ok_or_else(missing)?)
        }
    };
    let Some(record) = existing else {
        let view = view(layer)?;
        let name = if let UpperChoice::Named(name) = choice { Some(name.clone()) } else { None };
        let (upper, tables) = Upper::create(store, &view, name)?;
        let id = upper.id();
        return Ok((Arc::new(Fs::writable(view, upper, tables)), Some(id)));
    };
    if layer.is_some() && layer != record.base {
        return Err(Error::Busy(format!(
            "upper {} lies on {}, not on the layer that was asked for; mount that, or choose another upper",
            record.name.as_ref().map_or_else(|| record.id.to_string(), ToString::to_string),
            record.base.map_or_else(|| "nothing".to_owned(), |base| format!("layer {}", base.0.short())),
        )));
    }
    let view = view(record.base)?;
    let (upper, tables): (Upper, Tables) = Upper::open(store, record.id)?;
    Ok((Arc::new(Fs::writable(view, upper, tables)), None))
}

#[cfg(test)]
pub(crate) mod tests;
