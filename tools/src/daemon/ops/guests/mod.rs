//! Guests: create, start, stop, list, show, check, exec, checkpoint, restore, remove.
//!
//! Invariants: one operation at a time works on a guest; what the records say is true when an operation has ended, and
//! what a guest really does is asked of its runtime.

pub mod attach;
mod host;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layerfs::LayerName;
use layerfs::attr::FileKind;
use layerfs::store::Store;
use layerfs::upper;
use layerfs::view::View;
use migrator::guest::checkpoint::{DEFAULT_TAG, Hosted, States};
use migrator::guest::programs::{DEFAULT_FOLDER, Programs};
use migrator::guest::{
    Activity, Guest, GuestName, GuestRecord, GuestSpec, GuestState, Guests, HostDrivers, Obstacle, Pipes, Side, exec,
};
use parking_lot::Mutex;

use super::layers::{layer_name, resolve};
use crate::api::Empty;
use crate::api::guests::{
    GuestCheckResult, GuestCheckpoint, GuestCheckpointResult, GuestCreate, GuestExec, GuestExecResult, GuestExecStream,
    GuestExit, GuestInfo, GuestList, GuestName as NameRequest, GuestObstacle, GuestRemove, GuestRestore,
    GuestStopResult,
};
use crate::config::Settings;
use crate::daemon::Daemon;
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};
pub use host::DaemonHost;

/// Names the folder of private tools, if it isn't the usual one.
const ENV_TOOLS: &str = "LAYERFS_GUEST_TOOLS";

/// The daemon's guests.
pub struct GuestsState {
    records: Guests,
    drivers: HostDrivers,
    /// Those that an operation works on.
    busy: Mutex<BTreeSet<GuestName>>,
}

/// The guest whose folder in the store at `store` holds `dir`.
pub fn of_folder(store: &Path, dir: &Path) -> Option<GuestName> {
    let name = dir.strip_prefix(store).ok()?.components().nth(1)?.as_os_str().to_str()?;
    GuestName::new(name).ok().filter(|name| dir.starts_with(host::folder(store, name)))
}

impl GuestsState {
    /// Those of `store`.
    pub fn new(store: &Arc<Store>) -> GuestsState {
        let folder = std::env::var_os(ENV_TOOLS).map_or_else(|| PathBuf::from(DEFAULT_FOLDER), PathBuf::from);
        let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
        let programs = Arc::new(Programs::new(folder, own, std::env::var_os("PATH")));
        GuestsState { records: Guests::new(store.clone()), drivers: HostDrivers { programs }, busy: Mutex::default() }
    }

    /// The records.
    pub fn records(&self) -> &Guests {
        &self.records
    }

    /// The drivers.
    pub fn drivers(&self) -> &HostDrivers {
        &self.drivers
    }

    /// The guests, each with the folder that its mounts lie in.
    ///
    /// # Errors
    /// Those of the index.
    pub fn folders(&self, settings: &Settings) -> Result<Vec<(GuestName, PathBuf)>> {
        let names = self.records.list()?.into_iter().map(|record| record.spec.name);
        Ok(names.map(|name| (name.clone(), host::folder(&settings.store, &name))).collect())
    }

    /// A guest that is here, or on its way here, and lies on the layer called `layer`.
    ///
    /// # Errors
    /// Those of the index.
    pub fn on(&self, layer: &LayerName) -> Result<Option<GuestName>> {
        let mut here = self.records.list()?.into_iter().filter(|record| record.state != GuestState::Away);
        Ok(here.find(|record| record.spec.stack == *layer).map(|record| record.spec.name))
    }

    /// Takes the guest for one operation.
    ///
    /// # Errors
    /// [`Class::Busy`] if another one has it.
    pub fn take(&self, name: &GuestName) -> Result<Taken<'_>> {
        if !self.busy.lock().insert(name.clone()) {
            let text = format!("something else is being done with guest {name}");
            return Err(Failure::new(Class::Busy, text).hint("wait for it; `layerctl daemon status` shows what it is"));
        }
        Ok(Taken { state: self, name: name.clone() })
    }
}

/// A guest that is taken for an operation, until this is dropped.
pub struct Taken<'a> {
    state: &'a GuestsState,
    name: GuestName,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.state.busy.lock().remove(&self.name);
    }
}

/// The guests that have folders here, whether they are on record or not.
pub fn with_folders(daemon: &Daemon) -> Vec<GuestName> {
    let Ok(folders) = std::fs::read_dir(daemon.settings.store.join("guests")) else { return Vec::new() };
    let names = folders.filter_map(|folder| folder.ok()?.file_name().into_string().ok());
    names.filter_map(|name| GuestName::new(&name).ok()).collect()
}

/// Removes the folders of a guest that isn't on record.
pub fn remove_folders(daemon: &Arc<Daemon>, name: &GuestName) {
    // Whoever makes one of that name just now has taken it.
    let Ok(_taken) = daemon.guests.take(name) else { return };
    let root = hosted(daemon).host.root(name);
    let is_mounted = [root.with_file_name("state"), root].iter().any(|dir| daemon.mounts.at(dir).is_some());
    if is_mounted || !matches!(daemon.guests.records.find(name), Ok(None)) {
        return;
    }
    if let Err(error) = host::remove_folders(daemon, name) {
        tracing::warn!(guest = %name, %error, "what a guest that never came left couldn't be removed");
    }
}

fn hosted(daemon: &Arc<Daemon>) -> Hosted<'_> {
    Hosted {
        guests: &daemon.guests.records,
        drivers: &daemon.guests.drivers,
        host: Arc::new(DaemonHost::new(daemon.clone())),
    }
}

fn named(text: &str) -> Result<GuestName> {
    Ok(GuestName::new(text)?)
}

/// The record of guest `name`.
fn record_of(context: &Context, name: &GuestName) -> Result<GuestRecord> {
    context
        .daemon
        .guests
        .records
        .get(name)
        .map_err(|error| Failure::from(error).hint("`layerctl guest list` shows the guests that there are"))
}

/// `/v1/guest-create`.
pub fn create(context: &Context, request: GuestCreate) -> Result<GuestInfo> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    resolve(&daemon.store, &request.on)?;
    let stack = layer_name(&request.on)
        .map_err(|_| Failure::invalid(format!("{:?} is no layer's name; `layerctl tag` gives one", request.on)))?;
    let spec = GuestSpec { name, driver: request.driver, stack, options: request.options };
    let record = GuestRecord::new(spec);
    // Refuses what its driver doesn't know.
    hosted(daemon).guest(&record)?;
    daemon.guests.records.add(&record)?;
    Ok(info(context, &record))
}

/// `/v1/guest-start`.
pub fn start(context: &Context, request: NameRequest) -> Result<GuestInfo> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    context.label(format!("start guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    let record = record_of(context, &name)?;
    let hosted = hosted(daemon);
    let guest = hosted.guest(&record)?;
    match (guest.status()?.activity, record.state) {
        (Activity::Absent, _) => {}
        // A checkpoint was cut off; or its start, before that was on record.
        (Activity::Frozen, GuestState::Running) | (Activity::Running, GuestState::Created) => {
            hosted.wake(&record)?;
            return started(context, &name);
        }
        (Activity::Frozen, _) => {
            let failure = Failure::new(Class::Busy, format!("guest {name} stands still"));
            return Err(failure.hint(format!("`layerctl guest stop {name}` ends it")));
        }
        (Activity::Running, state) => {
            // It may still be cut off from its network.
            if state == GuestState::Running {
                guest.resume()?;
            }
            return Err(Failure::new(Class::Busy, format!("guest {name} runs already")));
        }
    }
    if let GuestState::Away | GuestState::Arriving = record.state {
        let peer = record.peer.as_deref().unwrap_or("another host");
        let text = format!("guest {name} is {} ({peer}): it must not run twice", record.state.as_str());
        return Err(Failure::new(Class::Denied, text));
    }
    let missing = missing_disk(context, &record, &*guest)?;
    clear(guest.preflight(Side::Run)?.into_iter().chain(missing).collect())?;
    // What it has changed before lies on whatever it lay on then.
    let upper = upper::find(daemon.store.db(), &host::upper_name(&name)?)?;
    let stack = match upper.and_then(|upper| upper.base) {
        Some(base) => base,
        None => resolve(&daemon.store, record.spec.stack.as_str())?,
    };
    // What of it may be left of an end that it came to by itself.
    end(&hosted, &record)?;
    hosted.host.mount(&name, stack)?;
    guest.start()?;
    started(context, &name)
}

/// Puts it on record that guest `name` runs.
fn started(context: &Context, name: &GuestName) -> Result<GuestInfo> {
    let record = context.daemon.guests.records.update(name, |record| {
        record.state = GuestState::Running;
        Ok(())
    })?;
    Ok(info(context, &record))
}

/// Ends what there is of the guest with this record, with what only that needs.
fn end(hosted: &Hosted<'_>, record: &GuestRecord) -> Result<()> {
    let name = &record.spec.name;
    hosted.guest(record)?.stop()?;
    // One that came before its memory has kept its state open.
    hosted.host.close_layer(name)?;
    Ok(hosted.host.remove_scratches(name)?)
}

/// Lets guests go on that an earlier daemon has left standing still, or without their network, as it died at a checkpoint, and removes what
/// it was writing. Returns whether nothing of that is left to do: guests that something else is done with, or that move, may be looked at
/// again later.
pub fn wake(daemon: &Arc<Daemon>) -> bool {
    let is_left = |record: &GuestRecord| -> Result<bool> {
        let is_frozen = || -> Result<bool> { Ok(hosted(daemon).guest(record)?.status()?.activity == Activity::Frozen) };
        // States first: asking what a guest does waits for who dumps it, and meanwhile it must be taken.
        Ok(host::has_states(daemon, &record.spec.name) || record.state == GuestState::Running && is_frozen()?)
    };
    let wake = |record: &GuestRecord| -> Result<()> {
        let name = &record.spec.name;
        if !is_left(record)? {
            return Ok(());
        }
        let _taken = daemon.guests.take(name)?;
        daemon.moves.require_settled(name)?;
        let _work = daemon.works.begin(format!("let guest {name} go on"), true)?;
        // Whoever had it until now may have seen to it.
        let record = daemon.guests.records.get(name)?;
        if !is_left(&record)? {
            return Ok(());
        }
        tracing::info!(guest = %name, "takes back what a checkpoint that was cut off has left");
        match record.state {
            GuestState::Away | GuestState::Arriving => Ok(host::remove_states(daemon, name)?),
            _ => Ok(hosted(daemon).wake(&record)?),
        }
    };
    let mut is_done = true;
    for record in daemon.guests.records.list().unwrap_or_default() {
        let Err(failure) = wake(&record) else { continue };
        is_done = false;
        let guest = &record.spec.name;
        match failure.class {
            Class::Busy => tracing::debug!(%guest, %failure, "a guest is woken later"),
            _ => {
                tracing::warn!(%guest, %failure, "whether a cut off checkpoint left something can't be seen to; it is tried again")
            }
        }
    }
    is_done
}

/// Fails if something is in the way.
fn clear(obstacles: Vec<Obstacle>) -> Result<()> {
    let mut lines = obstacles.into_iter().map(|obstacle| format!("{}\n  {}", obstacle.what, obstacle.fix));
    match lines.next() {
        None => Ok(()),
        Some(first) => {
            let all = lines.fold(first, |all, line| format!("{all}\n{line}"));
            Err(Failure::new(Class::Unsupported, all))
        }
    }
}

/// `/v1/guest-stop`.
pub fn stop(context: &Context, request: NameRequest) -> Result<GuestStopResult> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    context.label(format!("end guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    let record = record_of(context, &name)?;
    if record.state == GuestState::Away {
        let peer = record.peer.as_deref().unwrap_or("another host");
        return Err(Failure::new(Class::Busy, format!("guest {name} runs at {peer}; stop it there")));
    }
    let hosted = hosted(daemon);
    let is_absent = hosted.guest(&record)?.status().is_ok_and(|status| status.activity == Activity::Absent);
    // Of one that ended by itself something may be left.
    end(&hosted, &record)?;
    hosted.host.unmount(&name, false)?;
    let record = daemon.guests.records.update(&name, |record| {
        if let GuestState::Running | GuestState::Stopped = record.state {
            record.state = GuestState::Created;
        }
        Ok(())
    })?;
    Ok(GuestStopResult { was_running: !is_absent, guest: info(context, &record) })
}

/// `/v1/guests`.
pub fn list(context: &Context, _: Empty) -> Result<GuestList> {
    let records = context.daemon.guests.records.list()?;
    let states = States::new(&context.daemon.store);
    Ok(GuestList { guests: records.iter().map(|record| info_of(context, record, &states)).collect() })
}

/// `/v1/guest-show`.
pub fn show(context: &Context, request: NameRequest) -> Result<GuestInfo> {
    let record = record_of(context, &named(&request.name)?)?;
    Ok(info(context, &record))
}

fn info(context: &Context, record: &GuestRecord) -> GuestInfo {
    info_of(context, record, &States::new(&context.daemon.store))
}

fn info_of(context: &Context, record: &GuestRecord, states: &States) -> GuestInfo {
    let hosted = hosted(&context.daemon);
    let status = hosted.guest(record).and_then(|guest| guest.status());
    let status = status.inspect_err(|error| tracing::debug!("guest {}: {error}", record.spec.name)).ok();
    let activity = status.as_ref().map(|status| match status.activity {
        Activity::Absent => "absent",
        Activity::Running => "running",
        Activity::Frozen => "frozen",
    });
    let root = hosted.host.root(&record.spec.name);
    let checkpoint = hosted.latest_of(&record.spec.name, Some(record), states);
    let checkpoint = checkpoint.inspect_err(|error| tracing::debug!("guest {}: {error}", record.spec.name));
    let (state_layer, instance) = checkpoint.ok().flatten().unzip();
    let disk = host::upper_name(&record.spec.name).ok();
    let has_disk = disk.is_some_and(|disk| matches!(upper::find(context.daemon.store.db(), &disk), Ok(Some(_))));
    GuestInfo {
        name: record.spec.name.to_string(),
        driver: record.spec.driver.clone(),
        on: record.spec.stack.to_string(),
        state: record.state.as_str().to_owned(),
        activity: activity.map(str::to_owned),
        epoch: record.epoch,
        peer: record.peer.clone(),
        has_run: has_disk || state_layer.is_some(),
        pid: status.as_ref().and_then(|status| status.pid),
        memory_bytes: status.as_ref().and_then(|status| status.memory_bytes),
        root: context.daemon.mounts.at(&root).map(|_| root),
        state_layer: state_layer.map(|name| name.to_string()),
        instance: instance.map(|name| name.to_string()),
        options: record.spec.options.clone(),
    }
}

/// `/v1/guest-check`.
pub fn check(context: &Context, request: NameRequest) -> Result<GuestCheckResult> {
    let record = record_of(context, &named(&request.name)?)?;
    let guest = hosted(&context.daemon).guest(&record)?;
    let told = |obstacle: Obstacle| GuestObstacle { what: obstacle.what, fix: obstacle.fix };
    let ask = |side| -> Result<Vec<GuestObstacle>> { Ok(guest.preflight(side)?.into_iter().map(told).collect()) };
    let missing = missing_program(context, &record)?.into_iter().chain(missing_disk(context, &record, &*guest)?);
    let run = ask(Side::Run)?.into_iter().chain(missing.map(told)).collect();
    Ok(GuestCheckResult { run, source: ask(Side::Source)?, destination: ask(Side::Destination)? })
}

/// `/v1/guest-exec`.
pub fn exec(context: &Context, request: GuestExec) -> Result<GuestExecResult> {
    let (guest, argv) = command_in(context, &request.name, request.command)?;
    let output = exec::output(&*guest, &argv, &*context.reporter)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(GuestExecResult { code: output.code, stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// `/v1/guest-exec-stream`, with the command's ends of the pipes.
fn exec_stream(context: &Context, request: GuestExecStream, pipes: Pipes) -> Result<GuestExit> {
    let (guest, argv) = command_in(context, &request.name, request.command)?;
    Ok(GuestExit { code: guest.exec(&argv, pipes, &*context.reporter)? })
}

/// The guest called `name`, in which `command` is to be run.
fn command_in(context: &Context, name: &str, command: Vec<String>) -> Result<(Arc<dyn Guest>, Vec<OsString>)> {
    let name = named(name)?;
    context.label(format!("run a command in guest {name}"));
    let record = record_of(context, &name)?;
    if command.is_empty() {
        return Err(Failure::invalid("there is no command to run"));
    }
    let argv = command.into_iter().map(OsString::from).collect();
    let guest = hosted(&context.daemon).guest(&record)?;
    if guest.status()?.activity == Activity::Absent {
        return Err(not_running(&record));
    }
    Ok((guest, argv))
}

/// Why nothing can be asked of a guest, and where it runs or how it would.
fn not_running(record: &GuestRecord) -> Failure {
    let name = &record.spec.name;
    match (record.state, record.peer.as_deref()) {
        (GuestState::Away, peer) => {
            let peer = peer.unwrap_or("another host");
            Failure::new(Class::Busy, format!("guest {name} isn't here, but at {peer}")).hint("ask for it there")
        }
        (GuestState::Arriving, peer) => {
            let peer = peer.unwrap_or("another host");
            Failure::new(Class::Busy, format!("guest {name} is on its way here from {peer}, and doesn't run yet"))
        }
        _ => {
            let failure = Failure::new(Class::Busy, format!("guest {name} isn't running"));
            failure.hint(format!("`layerctl guest start {name}` starts it"))
        }
    }
}

/// Whether the guest's first program is lacking in what it will see.
fn missing_program(context: &Context, record: &GuestRecord) -> Result<Option<Obstacle>> {
    let command = record.spec.options.get("command").and_then(|command| command.get(0)?.as_str());
    let Some(program) = command else { return Ok(None) };
    let stack = &record.spec.stack;
    Ok(match first_file(context, record, program.as_bytes())? {
        FirstFile::There => None,
        FirstFile::Odd => Some(Obstacle::new(
            format!("{program}, its first program, is no file in {stack}"),
            "remove the guest, and make it with the path of a program",
        )),
        FirstFile::Missing => Some(Obstacle::new(
            format!("there is no {program}, its first program, in {stack}"),
            format!(
                "remove the guest, and make it on a layer that has it, or with another command; `layerctl inspect {stack} /` shows what is there"
            ),
        )),
    })
}

/// Whether the disk is lacking without which a machine has nothing to start from.
fn missing_disk(context: &Context, record: &GuestRecord, guest: &dyn Guest) -> Result<Option<Obstacle>> {
    let Some(path) = guest.boots_from() else { return Ok(None) };
    let (disk, stack) = (path.display(), &record.spec.stack);
    let is = match first_file(context, record, path.as_os_str().as_bytes())? {
        FirstFile::There => return Ok(None),
        FirstFile::Odd => format!("{disk} is no file in {stack}"),
        FirstFile::Missing => format!("there is no {disk} in {stack}"),
    };
    Ok(Some(Obstacle::new(
        format!("the machine has nothing to start from, neither a disk nor a kernel: {is}"),
        "remove the guest, and make it on a layer with a disk, or with --disk or --kernel",
    )))
}

/// What there is of a file that a guest begins with.
enum FirstFile {
    /// It is there, as far as is looked for.
    There,
    /// Something else has its name.
    Odd,
    Missing,
}

/// Looks for what the guest will see at `path`. Not where it has changed something: that may hold it.
fn first_file(context: &Context, record: &GuestRecord, path: &[u8]) -> Result<FirstFile> {
    let store = &context.daemon.store;
    let disk = upper::find(store.db(), &host::upper_name(&record.spec.name)?)?;
    if let Some(disk) = &disk
        && !upper::is_empty(store, disk.id)?
    {
        return Ok(FirstFile::There);
    }
    let base = disk.and_then(|disk| disk.base).map_or_else(|| resolve(store, record.spec.stack.as_str()), Ok)?;
    match View::open(store, base)?.resolve(path, true) {
        Ok((_, FileKind::File)) => Ok(FirstFile::There),
        Ok(_) => Ok(FirstFile::Odd),
        Err(layerfs::Error::NotFound { .. }) => Ok(FirstFile::Missing),
        Err(error) => Err(error.into()),
    }
}

/// `/v1/guest-checkpoint`.
pub fn checkpoint(context: &Context, request: GuestCheckpoint) -> Result<GuestCheckpointResult> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    context.label(format!("checkpoint guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    let record = record_of(context, &name)?;
    let hosted = hosted(daemon);
    let guest = hosted.guest(&record)?;
    if guest.status()?.activity == Activity::Absent {
        return Err(not_running(&record));
    }
    clear(guest.preflight(Side::Source)?)?;
    let tag = request.tag.as_deref().unwrap_or(DEFAULT_TAG);
    let made = hosted.checkpoint(&name, tag, request.stop, &*context.reporter)?;
    if request.stop {
        hosted.host.close_layer(&name)?;
        // The instance has all that the upper held.
        hosted.host.unmount(&name, true)?;
    }
    Ok(GuestCheckpointResult {
        state: made.state.0.to_string(),
        state_id: made.state.1.to_string(),
        instance: made.instance.0.to_string(),
        instance_id: made.instance.1.to_string(),
        memory_bytes: made.written.memory_bytes,
        bytes_stored: made.stored_bytes,
        frozen_seconds: made.frozen_seconds,
    })
}

/// `/v1/guest-restore`.
pub fn restore(context: &Context, request: GuestRestore) -> Result<GuestInfo> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    context.label(format!("restore guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    let known = daemon.guests.records.find(&name)?;
    if let Some(record) = &known
        && record.state == GuestState::Away
    {
        let peer = record.peer.as_deref().unwrap_or("another host");
        let failure = Failure::new(Class::Denied, format!("guest {name} has moved to {peer}: it must not run twice"));
        return Err(failure.hint(format!("if it is lost there, `layerctl guest remove {name}` first")));
    }
    let state_name = match &request.tag {
        Some(tag) => Hosted::names(&name, tag)?.0,
        None => match hosted(daemon).latest(&name, known.as_ref())? {
            Some((state, _)) => state,
            None => return Err(no_checkpoint(context, &name)),
        },
    };
    if let Some(record) = &known {
        clear(hosted(daemon).guest(record)?.preflight(Side::Destination)?)?;
    }
    let state = resolve(&daemon.store, state_name.as_str())?;
    let record = hosted(daemon).restore(&name, state, Some(state_name))?;
    Ok(info(context, &record))
}

fn no_checkpoint(context: &Context, name: &GuestName) -> Failure {
    match record_of(context, name) {
        Ok(_) => {
            let failure = Failure::new(Class::NotFound, format!("guest {name} has no checkpoint here"));
            failure.hint(format!("`layerctl guest checkpoint {name}` makes one while it runs"))
        }
        Err(failure) => failure,
    }
}

/// `/v1/guest-remove`.
pub fn remove(context: &Context, request: GuestRemove) -> Result<GuestInfo> {
    let daemon = &context.daemon;
    let name = named(&request.name)?;
    context.label(format!("remove guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    daemon.moves.require_settled(&name)?;
    let record = record_of(context, &name)?;
    let hosted = hosted(daemon);
    let told = info(context, &record);
    if hosted.guest(&record)?.status()?.activity != Activity::Absent && !request.force {
        let failure = Failure::new(Class::Busy, format!("guest {name} runs"));
        return Err(failure.hint(format!("`layerctl guest stop {name}` first, or --force ends it")));
    }
    end(&hosted, &record)?;
    hosted.host.unmount(&name, true)?;
    host::remove_folders(daemon, &name)?;
    daemon.moves.forget(&name)?;
    daemon.guests.records.remove(&name)?;
    Ok(told)
}
