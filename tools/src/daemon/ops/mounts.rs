//! The mounts: mount, umount, mounts, seal, uppers.
//!
//! The library keeps what must survive; here is which mounts this daemon serves. A mount that ends by somebody's
//! `umount` drops out of the table at the next look. Invariants: the table isn't locked while the kernel or the disk is
//! asked; a folder has one mount.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::monitor::Monitor;
use layerfs::mount::{self, Mount, MountOptions, MountRecord, UnmountOptions, UpperChoice};
use layerfs::seal::{self, SealOptions};
use layerfs::squash::SquashReport;
use layerfs::store::Store;
use layerfs::upper::{self, UpperRecord, UpperSize};
use layerfs::{LayerId, LayerName, UpperId};
use migrator::guest::GuestName;
use parking_lot::Mutex;

use super::layers::{Catalog, expect, layer_name, resolve, with_force_hint};
use crate::api::mounts::{
    MountInfo, MountList, MountRequest, RemountRequest, SealRequest, SealResult, UmountRequest, UmountResult,
    Unmounted, UpperInfo, UpperList, UppersRemoveRequest,
};
use crate::api::{Empty, Timestamp};
use crate::cli::system::DaemonStart;
use crate::config::Settings;
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};
use crate::keeper::{Asked, Keeping, KeptId, Left};
use crate::units;

/// The daemon's mounts.
pub struct Mounts {
    table: Arc<Mutex<Table>>,
    /// Held while one is made, so that a folder isn't mounted on twice.
    making: Mutex<()>,
    keeping: Arc<Keeping>,
}

type Table = BTreeMap<PathBuf, Served>;

/// A mount whose tables can't be had for so long hangs.
const HANGS: Duration = Duration::from_secs(10);
/// So many processes are named in a message at most.
const MOST_NAMED: usize = 8;

/// How the names of guests' uppers begin.
const OF_GUESTS: &str = "guest/";
const SHOWS_UPPERS: &str = "`layerctl uppers` shows the uppers that there are";

/// A mount that this daemon serves.
#[derive(Clone)]
struct Served {
    mount: Arc<Mount>,
    /// The keeper's number of it; none if it ends with this daemon.
    kept: Option<KeptId>,
    /// It ends with this daemon after all, which is about to exit.
    is_let_go: bool,
    /// It was brought back, and nobody has asked for it since: fstab may.
    is_unclaimed: bool,
}

impl Served {
    /// Whether another daemon shall go on with it.
    fn shall_be_kept(&self) -> Option<KeptId> {
        self.kept.filter(|_| !self.is_let_go && !self.mount.has_ended())
    }
}

impl Mounts {
    /// None yet. What uppers and recorded mounts lie on is kept from now on.
    /// With them what an earlier daemon has left, for [`Mounts::bring_back`].
    pub fn new(store: &Arc<Store>, settings: &Settings, start: &DaemonStart) -> Result<(Mounts, Left)> {
        mount::attach(store)?;
        let table = Arc::new(Mutex::new(Table::new()));
        let watched = table.clone();
        let is_well = move || {
            let Some(table) = watched.try_lock_for(HANGS) else { return false };
            let systems: Vec<_> = table.values().filter_map(|served: &Served| served.mount.fs()).collect();
            drop(table);
            systems.iter().all(|fs| fs.answers_within(HANGS))
        };
        let kept = table.clone();
        let mounts = move || {
            let table = kept.lock();
            table.values().filter_map(|served| Some((served.shall_be_kept()?, served.mount.clone()))).collect()
        };
        let asked = Asked { is_well: Box::new(is_well), mounts: Box::new(mounts) };
        let (keeping, left) = Keeping::find(settings, start, asked)?;
        Ok((Mounts { table, making: Mutex::default(), keeping }, left))
    }

    /// What lets them outlive this daemon.
    pub fn keeping(&self) -> &Keeping {
        &self.keeping
    }

    /// Takes a mount into the table, and sees to it that it outlives this daemon; tells if that can't be had. `kept` is the keeper's
    /// number of one that was left with it.
    fn serve(&self, mount: &Arc<Mount>, kept: Option<KeptId>, is_unclaimed: bool) -> Option<String> {
        let dir = mount.record().dir.clone();
        let id = kept.or_else(|| self.keeping.number());
        let served = Served { mount: mount.clone(), kept: id, is_let_go: false, is_unclaimed };
        self.table.lock().insert(dir.clone(), served);
        let id = id?;
        let given = self.keeping.keep(id, mount);
        let (keeping, table, ending) = (self.keeping.clone(), self.table.clone(), mount.clone());
        let at_end = move || {
            ending.wait();
            keeping.let_go(id);
            // It has descriptors still.
            table.lock().retain(|_, served| !served.mount.has_ended());
        };
        if let Err(error) = std::thread::Builder::new().name("mount-end".to_owned()).spawn(at_end) {
            tracing::warn!(%error, "a mount's end will not be noticed");
        }
        given.err().map(|failure| format!("the mount on {} will end with the daemon: {failure}", dir.display()))
    }

    /// As [`Mounts::serve`], where nobody waits who could be told.
    fn serve_unasked(&self, mount: &Arc<Mount>, kept: Option<KeptId>, is_unclaimed: bool) {
        if let Some(warning) = self.serve(mount, kept, is_unclaimed) {
            tracing::warn!("{warning}");
        }
    }

    /// The mounts that would end with this daemon though another takes over, after an attempt to have them kept.
    pub fn not_kept(&self) -> Vec<Arc<Mount>> {
        if let Err(failure) = self.keeping.keep_all() {
            tracing::warn!("{failure}");
        }
        let is_kept = |served: &Served| served.shall_be_kept().is_some_and(|id| self.keeping.has(id));
        let table = self.table.lock();
        let all = table.values().filter(|served| !served.mount.has_ended());
        all.filter(|served| !is_kept(served)).map(|served| served.mount.clone()).collect()
    }

    /// Has a mount end with this daemon: no other shall go on with what nobody finds any more.
    fn let_go(&self, served: &Served) {
        let is_it = |other: &&mut Served| Arc::ptr_eq(&other.mount, &served.mount);
        if let Some(known) = self.table.lock().values_mut().find(is_it) {
            known.is_let_go = true;
        }
        if let Some(id) = served.kept {
            self.keeping.let_go(id);
        }
    }

    /// Goes on with the mounts that the last daemon left to the keeper, and mounts again what else was mounted when it ended.
    ///
    /// # Errors
    /// There is no space to go on with one that the keeper has: this process shall end as by a kill, so that the keeper tries again.
    pub fn bring_back(&self, store: &Arc<Store>, left: Left) -> Result<()> {
        let ids: BTreeMap<PathBuf, KeptId> = left.iter().map(|(dir, (id, _))| (dir.clone(), *id)).collect();
        let mut kept = left.into_iter().map(|(dir, (_, descriptors))| (dir, descriptors)).collect();
        let restored = mount::restore(store, &mut kept);
        if let Err(error) = &restored
            && error.class() == layerfs::error::ErrorClass::NoSpace
        {
            return restored.map(|_| ()).map_err(Failure::from);
        }
        // Nobody knows these any more: closing the last descriptor ends them.
        kept.keys().filter_map(|dir| ids.get(dir)).for_each(|id| self.keeping.let_go(*id));
        let restored = match restored {
            Ok(restored) => restored,
            Err(error) => {
                tracing::error!("mounts cannot be brought back: {}", crate::failure::describe(&error));
                return Ok(());
            }
        };
        for (record, mut outcome) in restored {
            let dir = record.dir.display();
            let mut kept = ids.get(&record.dir).copied();
            if let (Err(error), Some(id)) = (&outcome, kept.take_if(|_| outcome.is_err())) {
                tracing::error!("the mount on {dir} cannot go on: {}", crate::failure::describe(error));
                // Nobody would answer it any more: it ends, and there is a new one.
                self.keeping.let_go(id);
                outcome = Mount::start_again(store, &record);
            }
            match outcome {
                Ok(mount) => {
                    let how = if kept.is_some() { "is still mounted on" } else { "is mounted again on" };
                    tracing::info!("{} {how} {dir}", record.source);
                    self.serve_unasked(&mount, kept, kept.is_none());
                }
                Err(error) => {
                    tracing::error!(
                        "{} cannot be mounted on {dir} again: {}",
                        record.source,
                        crate::failure::describe(&error)
                    );
                }
            }
        }
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        let mut table = self.table.lock();
        table.retain(|_, served| !served.mount.has_ended());
        table.len()
    }

    /// All of them, by folder.
    pub fn all(&self) -> Vec<Arc<Mount>> {
        let mut table = self.table.lock();
        table.retain(|_, served| !served.mount.has_ended());
        table.values().map(|served| served.mount.clone()).collect()
    }

    /// All of them; those in folders of others before these, which are in use until then.
    fn innermost_first(&self) -> Vec<Arc<Mount>> {
        let mut all = self.all();
        all.reverse();
        all
    }

    /// Keeps what the mounts have read, for later lazy transfers.
    pub fn save_traces(&self) {
        self.all().iter().for_each(|mount| mount.save_trace());
    }

    fn get(&self, dir: &Path) -> Result<Arc<Mount>> {
        let found = self.table.lock().get(dir).map(|served| served.mount.clone());
        found.filter(|mount| !mount.has_ended()).ok_or_else(|| {
            let text = format!("nothing of this store is mounted at {}", dir.display());
            Failure::new(Class::NotFound, text).hint("`layerctl mounts` shows what is")
        })
    }

    /// The mounts whose upper lies on `layer`.
    pub fn on_top_of(&self, layer: LayerId) -> Vec<Arc<Mount>> {
        let mut all = self.all();
        all.retain(|mount| mount.fs().is_some_and(|fs| fs.is_writable() && fs.view().top() == Some(layer)));
        all
    }

    /// The mount at `dir`, if there is one.
    pub fn at(&self, dir: &Path) -> Option<Arc<Mount>> {
        self.get(dir).ok()
    }

    /// Mounts `layer` on `dir`, where nothing of this store may be mounted.
    pub fn make(
        &self,
        store: &Arc<Store>,
        layer: LayerId,
        source: &str,
        dir: &Path,
        upper: UpperChoice,
    ) -> layerfs::Result<Arc<Mount>> {
        let _making = self.making.lock();
        let options = MountOptions { upper, ..MountOptions::default() };
        let mount = Mount::start(store, Some(layer), source, dir, &options)?;
        self.serve_unasked(&mount, None, false);
        Ok(mount)
    }

    /// The layer and the path in it of something in a mount. What the upper has changed isn't seen.
    pub fn locate(&self, path: &Path) -> Result<(LayerId, Vec<u8>)> {
        let mount = self.all().into_iter().find(|mount| path.starts_with(&mount.record().dir));
        let found = mount.as_ref().and_then(|mount| {
            let below = path.strip_prefix(&mount.record().dir).ok()?;
            Some((mount.info()?.base?, below.as_os_str().as_bytes().to_vec()))
        });
        found.ok_or_else(|| {
            let text = format!("{} is in no mount of this store", path.display());
            Failure::new(Class::NotFound, text).hint("write a path of a layer as NAME:/PATH")
        })
    }

    /// Waits for what stands in the way of `request` and was unmounted just now: umount(8) doesn't wait for us.
    fn wait_for_left(&self, request: &MountRequest) {
        let is_in_the_way = |mount: &Arc<Mount>| {
            let record = mount.record();
            // One that is being cleaned up tells nothing any more.
            let Some(info) = mount.info() else { return true };
            let name = info.upper_record.and_then(|upper| upper.name).map(|name| name.to_string());
            let number = record.upper.map(|id| id.0.to_string());
            let is_upper = request.upper.is_some() && (request.upper == name || request.upper == number);
            record.dir == request.dir || is_upper
        };
        self.all().iter().filter(|mount| is_in_the_way(mount)).for_each(|mount| mount.wait_if_left());
    }

    /// Unmounts all, to be mounted again by the next daemon. With `force` what is in use, or goes on elsewhere, ends too.
    ///
    /// # Errors
    /// Without `force` [`Class::Busy`], if there is such a mount; what was unmounted by then is mounted again.
    pub fn unmount_all(&self, store: &Arc<Store>, force: bool) -> Result<()> {
        let (mut ended, mut failures) = (Vec::new(), Vec::new());
        let options = UnmountOptions { keep_record: true, ..UnmountOptions::default() };
        // Those in folders of others before these, which are in use until then.
        let all: Vec<Served> = self.table.lock().values().rev().cloned().collect();
        for served in all.into_iter().filter(|served| !served.mount.has_ended()) {
            let failure = match served.mount.unmount(&options) {
                Ok(()) if served.mount.has_ended() => {
                    // Who waits for its end does that too, but may come too late.
                    self.let_go(&served);
                    ended.push(served);
                    continue;
                }
                _ if force => {
                    self.end(&served, &options);
                    continue;
                }
                outcome => keeps_from_stopping(store, &served.mount, outcome.err()),
            };
            tracing::warn!("{failure}");
            failures.push(failure);
        }
        let Some(failure) = failures.into_iter().next() else { return Ok(()) };
        ended.iter().rev().for_each(|served| self.mount_again(store, served));
        Err(failure.hint("`layerctl daemon stop --force` ends it: what uses it gets errors"))
    }

    /// Ends a mount that is in use or has copies, now and with all saved if that can be had, else with this process.
    fn end(&self, served: &Served, options: &UnmountOptions) {
        self.let_go(served);
        let ended = served.mount.unmount(&UnmountOptions { lazy: true, everywhere: true, ..*options });
        if let Err(error) = ended {
            let (dir, why) = (served.mount.record().dir.display(), crate::failure::describe(&error));
            tracing::warn!("the mount on {dir} ends with the daemon: {why}");
        }
    }

    /// Mounts what a stop has unmounted that was refused then.
    fn mount_again(&self, store: &Arc<Store>, served: &Served) {
        let record = MountRecord { flags: served.mount.flags(), ..served.mount.record().clone() };
        match Mount::start_again(store, &record) {
            Ok(mount) => self.serve_unasked(&mount, None, served.is_unclaimed),
            Err(error) => {
                let (dir, why) = (record.dir.display(), crate::failure::describe(&error));
                tracing::error!("{} cannot be mounted on {dir} again: {why}", record.source);
            }
        }
    }
}

/// Why a daemon can't stop: a mount that could not be unmounted, or else goes on elsewhere.
fn keeps_from_stopping(store: &Store, mount: &Arc<Mount>, error: Option<layerfs::Error>) -> Failure {
    let dir = &mount.record().dir;
    let is_in_use = error.as_ref().is_none_or(|error| matches!(error, layerfs::Error::Busy(_)));
    if let Some(guest) = super::guests::of_folder(store.folder(), dir).filter(|_| is_in_use) {
        return Failure::new(Class::Busy, format!("guest {guest} runs"))
            .hint(format!("`layerctl guest stop {guest}` ends it"));
    }
    match error {
        None => goes_on(mount),
        Some(error @ layerfs::Error::Busy(_)) => match users(dir) {
            Some(users) => Failure::from(error).hint(format!("{users}; close that")),
            None => Failure::from(error).hint("close what uses it"),
        },
        Some(error) => error.into(),
    }
}

/// A mount that was unmounted and is there all the same.
fn goes_on(mount: &Arc<Mount>) -> Failure {
    let dir = mount.record().dir.display();
    let text = format!("the mount on {dir} was unmounted there, but goes on {}", copies(mount, &mount.places()));
    Failure::new(Class::Busy, text).hint(format!("`layerctl umount {dir} --everywhere` ends it for good"))
}

/// `/v1/mount`.
pub fn mount(context: &Context, request: MountRequest) -> Result<MountInfo> {
    let daemon = &context.daemon;
    context.label(format!("mount {}", request.layer));
    let layer = resolve(&daemon.store, &request.layer)?;
    let _making = daemon.mounts.making.lock();
    if let Some(info) = claim(context, &request, layer)? {
        return Ok(info);
    }
    daemon.mounts.wait_for_left(&request);
    if let Ok(there) = daemon.mounts.get(&request.dir) {
        let (source, dir) = (&there.record().source, request.dir.display());
        let places = there.places();
        if !places.contains(&request.dir) {
            let text = format!("{source} was unmounted from {dir}, but goes on {}", copies(&there, &places));
            return Err(Failure::new(Class::Busy, text).hint(format!("`layerctl umount {dir} --everywhere` ends it")));
        }
        let text = format!("{source} is mounted on {dir} already");
        return Err(Failure::new(Class::Busy, text).hint(format!("`layerctl umount {dir}` first")));
    }
    refuse_own(&daemon.settings.store, &request.dir)?;
    let upper = upper_choice(context, &request)?;
    let options = MountOptions {
        upper,
        transport: request.transport,
        writeback: request.writeback,
        flags: request.options,
        ..MountOptions::default()
    };
    let started = Mount::start(&daemon.store, Some(layer), &request.layer, &request.dir, &options);
    let mount = started.map_err(|error| with_ways_out(error.into(), &request.dir, Path::new("/dev/fuse")));
    let mount = mount.map_err(|failure| with_upper_in_use(context, failure, &request))?;
    if let Some(warning) = daemon.mounts.serve(&mount, None, false) {
        context.reporter.warn(&warning);
    }
    describe(context, &Catalog::read(&daemon.store)?, &mount)
}

/// A mount over the store would hide it from everybody, the next command included; what lies in it is the store's own.
fn refuse_own(store: &Path, dir: &Path) -> Result<()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (store, dir) = (real(store), real(dir));
    if store.starts_with(&dir) || dir.starts_with(&store) {
        let text = format!(
            "the store lies at {}, which a mount on {} would get in the way of",
            store.display(),
            dir.display()
        );
        return Err(Failure::invalid(text).hint("choose a folder outside of the store, and not above it"));
    }
    Ok(())
}

/// A mount that was brought back and is now asked for in the same way, as fstab does after a crash.
fn claim(context: &Context, request: &MountRequest, layer: LayerId) -> Result<Option<MountInfo>> {
    let mounts = &context.daemon.mounts;
    let served = mounts.table.lock().get(&request.dir).cloned();
    let Some(served) = served.filter(|served| served.is_unclaimed && !served.mount.has_ended()) else {
        return Ok(None);
    };
    let Some(known) = served.mount.info() else { return Ok(None) };
    let upper = known.upper_record.as_ref().and_then(|record| record.name.as_ref()).map(LayerName::as_str);
    let is_same = known.record.source == request.layer || known.base == Some(layer);
    if !is_same || upper != request.upper.as_deref() || known.record.upper.is_none() != request.read_only {
        return Ok(None);
    }
    if known.record.flags != request.options {
        served.mount.set_flags(request.options)?;
    }
    if let Some(served) = mounts.table.lock().get_mut(&request.dir) {
        served.is_unclaimed = false;
    }
    Ok(Some(describe(context, &Catalog::read(&context.daemon.store)?, &served.mount)?))
}

fn upper_choice(context: &Context, request: &MountRequest) -> Result<UpperChoice> {
    match (&request.upper, request.read_only) {
        (Some(_), true) => Err(Failure::invalid("a read-only mount has no upper")),
        (None, true) => Ok(UpperChoice::ReadOnly),
        (None, false) => Ok(UpperChoice::Fresh),
        (Some(text), false) => {
            let name = layer_name(text).map_err(|_| Failure::invalid(format!("{text:?} is no name for an upper")))?;
            let found = upper_called(&context.daemon.store, text)?;
            if text.starts_with(OF_GUESTS) {
                let failure = Failure::invalid(format!("{text:?}: names that begin with {OF_GUESTS} are guests'"));
                return Err(failure.hint("give the upper another name"));
            }
            if let Some(guest) = found.as_ref().map(|record| guest_with(context, record)).transpose()?.flatten() {
                let failure = Failure::new(Class::Busy, format!("upper {text} is guest {guest}'s disk"));
                return Err(failure.hint(format!("`layerctl guest start {guest}` mounts it")));
            }
            match found {
                Some(record) if record.name.as_ref() != Some(&name) => Ok(UpperChoice::Existing(record.id)),
                // It would take the place of the upper that gets that number.
                None if is_number(text) => {
                    let text = format!("upper {text} not found; a name needs something that isn't a digit");
                    Err(Failure::new(Class::NotFound, text).hint(SHOWS_UPPERS))
                }
                _ => Ok(UpperChoice::Named(name)),
            }
        }
    }
}

/// The guest whose disk an upper is.
fn guest_with(context: &Context, upper: &UpperRecord) -> Result<Option<GuestName>> {
    let name = upper.name.as_ref().and_then(|name| name.as_str().strip_prefix(OF_GUESTS));
    let Some(guest) = name.and_then(|name| GuestName::new(name).ok()) else { return Ok(None) };
    Ok(context.daemon.guests.records().find(&guest)?.map(|record| record.spec.name))
}

/// Names what has the upper that a mount was to have.
fn with_upper_in_use(context: &Context, failure: Failure, request: &MountRequest) -> Failure {
    let daemon = &context.daemon;
    let upper = match (failure.class, &request.upper) {
        (Class::Busy, Some(text)) => upper_called(&daemon.store, text).ok().flatten(),
        _ => None,
    };
    let has_it = |mount: &Arc<Mount>| upper.as_ref().is_some_and(|upper| mount.record().upper == Some(upper.id));
    let (Some(text), Some(there)) = (&request.upper, daemon.mounts.all().into_iter().find(has_it)) else {
        return failure;
    };
    let (dir, places) = (there.record().dir.display(), there.places());
    if places.contains(&there.record().dir) {
        let failure = Failure::new(Class::Busy, format!("upper {text} is mounted on {dir}"));
        return failure.hint(format!("`layerctl umount {dir}` first"));
    }
    let text = format!("upper {text} was unmounted from {dir}, but goes on {}", copies(&there, &places));
    Failure::new(Class::Busy, text).hint(format!("`layerctl umount {dir} --everywhere` ends it"))
}

/// `device` is the kernel's way in, /dev/fuse.
fn with_ways_out(failure: Failure, dir: &Path, device: &Path) -> Failure {
    if failure.class == Class::NotFound && !dir.exists() {
        return failure.hint(format!("make the folder first: mkdir -p {}", dir.display()));
    }
    if matches!(failure.class, Class::Denied | Class::NotFound) && !device.exists() {
        let text = format!("cannot mount on {}: {} is missing", dir.display(), device.display());
        return Failure::new(Class::Unsupported, text).hint("`modprobe fuse`, or give the container that device");
    }
    let is_open = || std::fs::File::options().read(true).write(true).open(device).is_ok();
    if failure.class == Class::Denied && !is_open() {
        return failure.hint("this user may not open /dev/fuse: `chmod 666 /dev/fuse`, as most systems have it");
    }
    failure
}

fn describe(context: &Context, catalog: &Catalog, mount: &Mount) -> Result<MountInfo> {
    let record = mount.record();
    let info = mount.info().ok_or_else(|| Failure::new(Class::NotFound, "the mount has ended meanwhile"))?;
    let layer_name = info.base.and_then(|base| {
        let names = catalog.names_of(base);
        if names.contains(&record.source) { Some(record.source.clone()) } else { names.into_iter().next() }
    });
    let sources = context.daemon.peering.sources();
    let partial = info.base.map(|base| catalog.partial(base, &sources)).transpose()?.flatten();
    Ok(MountInfo {
        dir: record.dir.clone(),
        layer: info.base.map(|base| base.to_string()).unwrap_or_default(),
        layer_name,
        read_only: record.upper.is_none(),
        upper: record.upper.map(|id| id.0),
        upper_name: info.upper_record.and_then(|record| record.name).map(|name| name.to_string()),
        since: Timestamp(units::now() - info.seconds as i64),
        transport: info.serves_by,
        writeback: info.has_writeback,
        warm_bytes: info.warm_bytes,
        options: info.record.flags,
        partial,
    })
}

/// `/v1/mounts`.
pub fn list(context: &Context, _: Empty) -> Result<MountList> {
    let catalog = Catalog::read(&context.daemon.store)?;
    let mounts = context.daemon.mounts.all();
    // One that ends just now is no mount.
    Ok(MountList { mounts: mounts.iter().filter_map(|mount| describe(context, &catalog, mount).ok()).collect() })
}

/// `/v1/remount`.
pub fn remount(context: &Context, request: RemountRequest) -> Result<MountInfo> {
    let mount = context.daemon.mounts.get(&request.dir)?;
    mount.set_flags(request.options)?;
    describe(context, &Catalog::read(&context.daemon.store)?, &mount)
}

/// `/v1/umount`.
pub fn umount(context: &Context, request: UmountRequest) -> Result<UmountResult> {
    let mounts = &context.daemon.mounts;
    let guests = context.daemon.guests.folders(&context.daemon.settings)?;
    let guest_at = |dir: &Path| guests.iter().find(|(_, folder)| dir.starts_with(folder)).map(|(name, _)| name);
    let mut chosen = match request.all {
        true => mounts.innermost_first(),
        false => request.dirs.iter().map(|dir| mounts.get(dir)).collect::<Result<_>>()?,
    };
    if let Some((dir, name)) = request.dirs.iter().find_map(|dir| Some((dir, guest_at(dir)?))) {
        let text = format!("{} is guest {name}'s", dir.display());
        return Err(Failure::new(Class::Busy, text).hint(format!("`layerctl guest stop {name}` unmounts it")));
    }
    chosen.retain(|mount| guest_at(&mount.record().dir).is_none());
    let mut unmounted = Vec::new();
    for mount in chosen {
        let record = mount.record();
        let is_clean = mount.fs().is_some_and(|fs| seal::is_clean(&fs));
        let is_named = mount.info().and_then(|info| info.upper_record).is_some_and(|upper| upper.name.is_some());
        let is_kept = if request.discard { is_named } else { !is_clean };
        let kept = record.upper.filter(|_| is_kept);
        let options = UnmountOptions {
            lazy: request.lazy,
            keep_record: false,
            discard_upper: request.discard || is_clean,
            everywhere: request.everywhere,
        };
        mount.unmount(&options).map_err(|error| match error {
            layerfs::Error::Busy(_) => Failure::from(error).hint(match users(&record.dir) {
                Some(users) => format!("{users}; --lazy detaches it now"),
                None => "--lazy detaches it now, and it ends when nothing uses it any more".to_owned(),
            }),
            other => other.into(),
        })?;
        let catalog = Catalog::read(&context.daemon.store)?;
        let kept_upper = match kept.map(|id| upper::record(context.daemon.store.db(), id)).transpose()?.flatten() {
            Some(upper) => Some(upper_info(context, &catalog, &upper)?),
            None => None,
        };
        let goes_on = !request.lazy && !mount.has_ended();
        let also_at = if goes_on { mount.places() } else { Vec::new() };
        let used_by = if goes_on && also_at.is_empty() { with_names(mount.processes()) } else { Vec::new() };
        unmounted.push(Unmounted { dir: record.dir.clone(), goes_on, also_at, used_by, kept_upper });
    }
    Ok(UmountResult { unmounted })
}

/// Where a mount goes on that is on `places`, for a sentence.
fn copies(mount: &Mount, places: &[PathBuf]) -> String {
    if let [place, ..] = places {
        return format!("at {}", place.display());
    }
    match with_names(mount.processes()).as_slice() {
        [] => "for programs that use it".to_owned(),
        processes => format!("in other mount namespaces (process {})", processes.join(", ")),
    }
}

/// Processes as users know them; no more than a few.
fn with_names(processes: Vec<u32>) -> Vec<String> {
    let named = |pid: u32| {
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{pid} ({})", command.trim())
    };
    processes.into_iter().take(MOST_NAMED).map(named).collect()
}

/// Which mounts lie in a mount, and which processes use it; none if nobody does that can be seen.
fn users(dir: &Path) -> Option<String> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let nested: Vec<String> = nested(&table, dir).iter().map(|dir| dir.display().to_string()).collect();
    let nested = (!nested.is_empty()).then(|| format!("something is mounted in it, on {}", nested.join(", ")));
    let processes = processes_in(dir);
    let processes = (!processes.is_empty()).then(|| format!("used by process {}", processes.join(", ")));
    let all: Vec<String> = nested.into_iter().chain(processes).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// What is mounted below `dir`, a few at most; those that must go first come first.
fn nested(mountinfo: &[u8], dir: &Path) -> Vec<PathBuf> {
    let point = |line: &[u8]| {
        let field = line.split(|byte| *byte == b' ').nth(4)?;
        Some(PathBuf::from(OsString::from_vec(layerfs::mount::unescape(field))))
    };
    let all = mountinfo.split(|byte| *byte == b'\n').rev().filter_map(point);
    all.filter(|point| point != dir && point.starts_with(dir)).take(MOST_NAMED).collect()
}

/// The processes that have something open, run or stand below `dir`, as users know them.
fn processes_in(dir: &Path) -> Vec<String> {
    let mut users = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let links = ["cwd", "root", "exe"].map(|name| process.path().join(name));
        let files = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten().map(|fd| fd.path());
        let is_inside = |link: PathBuf| std::fs::read_link(link).is_ok_and(|target| target.starts_with(dir));
        if links.into_iter().chain(files).any(is_inside) {
            let command = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            users.push(format!("{pid} ({})", command.trim()));
        }
    }
    users
}

/// `/v1/seal`.
pub fn seal(context: &Context, request: SealRequest) -> Result<SealResult> {
    context.label(format!("seal {}", request.name));
    let started = Instant::now();
    let daemon = &context.daemon;
    let mount = daemon.mounts.get(&request.dir)?;
    let options = SealOptions {
        name: layer_name(&request.name)?,
        expect: expect(request.force),
        kind: request.kind.unwrap_or(crate::cli::layers::Kind::Application).into(),
    };
    let report = mount
        .seal(&options, &*context.reporter)
        .map_err(|error| with_force_hint(error.into(), "--force moves the name to the new layer"))?;
    let past = request.squash_past.unwrap_or(daemon.settings.squash_past);
    let squashed = match past {
        0 => None,
        past => squash_seals(&mount, past as usize, &options.name, &*context.reporter),
    };
    let layer = squashed.map_or(report.layer, |squashed| squashed.layer);
    let (info, _) = Catalog::read(&daemon.store)?.info(layer)?;
    Ok(SealResult {
        name: request.name,
        id: layer.to_string(),
        squashed: squashed.map_or(0, |squashed| squashed.layers),
        unchanged: !report.is_new,
        inodes: report.inodes,
        dentries: report.dentries,
        file_bytes: info.file_bytes,
        bytes_stored: report.stored.new_stored_bytes,
        seconds: units::seconds(started.elapsed()),
    })
}

/// Squashes what a mount's seals have piled up. The seal is done, whatever comes of this.
fn squash_seals(mount: &Mount, past: usize, name: &LayerName, monitor: &dyn Monitor) -> Option<SquashReport> {
    match mount.squash(past, std::slice::from_ref(name), monitor) {
        Ok(report) => report,
        Err(error) => {
            monitor.warn(&format!("the layers are not squashed: {}", crate::failure::describe(&error)));
            None
        }
    }
}

/// `/v1/uppers`.
pub fn uppers(context: &Context, _: Empty) -> Result<UpperList> {
    let catalog = Catalog::read(&context.daemon.store)?;
    let records = upper::list(context.daemon.store.db())?;
    let uppers = records.iter().map(|record| upper_info(context, &catalog, record)).collect::<Result<_>>()?;
    Ok(UpperList { uppers })
}

fn upper_info(context: &Context, catalog: &Catalog, record: &UpperRecord) -> Result<UpperInfo> {
    let mounted = context.daemon.mounts.all().into_iter().find(|mount| mount.record().upper == Some(record.id));
    let UpperSize { inodes, allocated_bytes, .. } = upper::size(&context.daemon.store, record.id)?;
    Ok(UpperInfo {
        id: record.id.0,
        name: record.name.as_ref().map(LayerName::to_string),
        base: record.base.map(|base| base.to_string()).unwrap_or_default(),
        base_name: record.base.and_then(|base| catalog.name_of(base)),
        created: record.created.into(),
        mounted_at: mounted.map(|mount| mount.record().dir.clone()),
        inodes,
        data_bytes: allocated_bytes,
    })
}

/// `/v1/uppers-remove`.
pub fn uppers_remove(context: &Context, request: UppersRemoveRequest) -> Result<UpperList> {
    let store = &context.daemon.store;
    let catalog = Catalog::read(store)?;
    let mut chosen = Vec::new();
    for text in &request.uppers {
        let upper = find_upper(store, text)?;
        if let Some(guest) = guest_with(context, &upper)? {
            let failure = Failure::new(Class::Busy, format!("upper {text} is guest {guest}'s disk"));
            return Err(failure.hint(format!("`layerctl guest remove {guest}` throws it away")));
        }
        chosen.push(upper_info(context, &catalog, &upper)?);
    }
    if let Some(UpperInfo { mounted_at: Some(dir), .. }) = chosen.iter().find(|upper| upper.mounted_at.is_some()) {
        let text = format!("the upper is mounted at {}", dir.display());
        return Err(Failure::new(Class::Busy, text).hint(format!("`layerctl umount {}` first", dir.display())));
    }
    for info in &chosen {
        upper::remove(store, UpperId(info.id))?;
    }
    Ok(UpperList { uppers: chosen })
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The upper of this name or number, if there is one.
fn upper_called(store: &Arc<Store>, text: &str) -> Result<Option<UpperRecord>> {
    let by_name = match LayerName::new(text) {
        Ok(name) => upper::find(store.db(), &name)?,
        Err(_) => None,
    };
    let by_number = match text.parse().map(UpperId) {
        Ok(id) => upper::record(store.db(), id)?,
        Err(_) => None,
    };
    if let (Some(named), Some(numbered)) = (&by_name, &by_number)
        && named.id != numbered.id
    {
        let number = named.id.0;
        let failure = Failure::invalid(format!("{text} is the name of upper {number}, and another one's number"));
        return Err(
            failure.hint(format!("say {number} for the one of that name; the other can be had when that is gone"))
        );
    }
    Ok(by_name.or(by_number))
}

fn find_upper(store: &Arc<Store>, text: &str) -> Result<UpperRecord> {
    upper_called(store, text)?.ok_or_else(|| {
        let failure = Failure::from(layerfs::Error::NotFound { what: "upper", name: text.to_owned() });
        failure.hint(SHOWS_UPPERS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_not_told_as_a_missing_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, device) = (folder.path(), folder.path().join("fuse"));
        let missing = || Failure::new(Class::NotFound, "cannot mount: No such file or directory");
        let told = with_ways_out(missing(), dir, &device);
        assert_eq!(told.class, Class::Unsupported);
        assert!(told.message.contains("fuse is missing") && told.message.contains("modprobe"), "{told}");
        let told = with_ways_out(missing(), &dir.join("nothing"), &device);
        assert!(told.class == Class::NotFound && told.message.contains("mkdir -p"), "{told}");
    }

    #[test]
    fn mounts_in_a_mount_are_found_the_last_first() {
        let table = b"30 1 0:25 / /srv/web rw - fuse.layerfs a rw\n31 30 0:26 / /srv/web/a\\040b rw - tmpfs t rw\n\
                      32 31 0:27 / /srv/web/a\\040b/c rw - tmpfs t rw\n33 1 0:28 / /srv/website rw - tmpfs t rw\n";
        let found = nested(table, Path::new("/srv/web"));
        assert_eq!(found, [Path::new("/srv/web/a b/c"), Path::new("/srv/web/a b")]);
    }
}
