//! What the daemon does for its guests: mounts with uppers of their own, sealing, folders.
//!
//! A guest's things lie in the store's folder below `guests/NAME`: `root` (its mount), `state` (a state that is being
//! restored), `run` (what its driver keeps). States that are being written lie in memory where there is enough of it, else in
//! `scratch`.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use layerfs::manifest::LayerKind;
use layerfs::monitor::Silent;
use layerfs::mount::{UnmountOptions, UpperChoice};
use layerfs::seal::SealOptions;
use layerfs::store::Expect;
use layerfs::upper;
use layerfs::{Error, LayerId, LayerName};
use migrator::Result;
use migrator::guest::{GuestName, Host, memory};
use parking_lot::Mutex;

use crate::daemon::Daemon;

/// Where files are memory.
const MEMORY: &str = "/dev/shm";
/// Where states that are being written lie otherwise.
const SCRATCH: &str = "scratch";
/// How long a mount that the last process of a guest has just left may be busy.
const LEAVING: Duration = Duration::from_secs(10);

/// The daemon as guests see it.
pub struct DaemonHost {
    daemon: Arc<Daemon>,
}

/// Held while folders in memory are made or removed, of which those above are several guests'.
static IN_MEMORY: Mutex<()> = Mutex::new(());

/// The name of a guest's upper.
pub fn upper_name(name: &GuestName) -> layerfs::Result<LayerName> {
    LayerName::new(&format!("guest/{name}"))
}

/// The folder of a guest in its store.
pub(super) fn folder(store: &Path, name: &GuestName) -> PathBuf {
    store.join("guests").join(name.as_str())
}

/// Below memory, a store's own place: no other store's path gives the same.
fn memory(daemon: &Daemon) -> PathBuf {
    let store = daemon.settings.store.display().to_string();
    Path::new(MEMORY).join(format!("layerfs{}", store.replace('_', "__").replace('-', "_-").replace('/', "-")))
}

/// Makes a store's place in memory. Everybody may make folders there: one that others could look into, or change, is none.
fn make_private(place: &Path) -> layerfs::Result<()> {
    let failed = |error| Error::file("make", place, error);
    match std::fs::DirBuilder::new().mode(0o700).create(place) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = std::fs::symlink_metadata(place).map_err(failed)?;
    let is_ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 == 0;
    match is_ours {
        true => Ok(()),
        false => Err(Error::Denied(format!("{} is somebody else's", place.display()))),
    }
}

fn make(path: &Path) -> layerfs::Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| Error::file("make", path, error))
}

fn remove(path: &Path) -> layerfs::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path, error)),
        _ => Ok(()),
    }
}

/// Removes all folders of a guest that nothing is mounted in any more.
pub fn remove_folders(daemon: &Daemon, name: &GuestName) -> layerfs::Result<()> {
    remove_states(daemon, name)?;
    remove(&folder(&daemon.settings.store, name))
}

/// Whether there are folders of [`Host::scratch`] for a guest.
pub fn has_states(daemon: &Daemon, name: &GuestName) -> bool {
    memory(daemon).join(name.as_str()).exists() || folder(&daemon.settings.store, name).join(SCRATCH).exists()
}

/// Removes all folders of [`Host::scratch`] for a guest.
pub fn remove_states(daemon: &Daemon, name: &GuestName) -> layerfs::Result<()> {
    let place = memory(daemon);
    if std::fs::symlink_metadata(&place).is_ok() && make_private(&place).is_ok() {
        remove(&place.join(name.as_str()))?;
    }
    remove(&folder(&daemon.settings.store, name).join(SCRATCH))?;
    let _held = IN_MEMORY.lock();
    remove_empty([&*place]);
    Ok(())
}

/// Makes a folder in `above` that wasn't there: what is may be all that a guest has to go on from, and an earlier daemon's numbers began
/// where this one's do.
fn make_new(above: &Path) -> layerfs::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    make(above)?;
    loop {
        let path = above.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::file("make", path, error)),
        }
    }
}

/// Whether a state of about so many `bytes` may lie on memory, of which the folder takes `in_folder` bytes at most and the machine has
/// `available`: what a folder takes need not be there. It is let be twice as long as it was thought to be.
fn fits_in_memory(bytes: u64, in_folder: u64, available: Option<u64>) -> bool {
    in_folder.min(available.unwrap_or(0)) / 2 > bytes
}

/// Removes folders in which nothing is; others are somebody's.
fn remove_empty<'a>(folders: impl IntoIterator<Item = &'a Path>) {
    folders.into_iter().for_each(|path| drop(std::fs::remove_dir(path)));
}

impl DaemonHost {
    /// The one of `daemon`.
    pub fn new(daemon: Arc<Daemon>) -> DaemonHost {
        DaemonHost { daemon }
    }

    fn made(&self, guest: &GuestName, part: &str) -> layerfs::Result<PathBuf> {
        let path = folder(&self.daemon.settings.store, guest).join(part);
        make(&path)?;
        Ok(path)
    }

    /// Unmounts what is at `dir`; what has just been left is waited for.
    fn unmount_dir(&self, dir: &Path) -> layerfs::Result<()> {
        let Some(mount) = self.daemon.mounts.at(dir) else { return Ok(()) };
        let began = Instant::now();
        // A program that was given mounts of its own may have a copy of it, which nobody needs.
        let options = UnmountOptions { everywhere: true, ..UnmountOptions::default() };
        loop {
            match mount.unmount(&options) {
                Err(Error::Busy(_)) if began.elapsed() < LEAVING => std::thread::sleep(Duration::from_millis(10)),
                ended => return ended,
            }
        }
    }
}

impl Host for DaemonHost {
    fn root(&self, guest: &GuestName) -> PathBuf {
        folder(&self.daemon.settings.store, guest).join("root")
    }

    fn run_folder(&self, guest: &GuestName) -> Result<PathBuf> {
        Ok(self.made(guest, "run")?)
    }

    fn scratch(&self, guest: &GuestName, bytes: u64) -> Result<PathBuf> {
        let in_folder = rustix::fs::statvfs(MEMORY).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
        let is_enough = fits_in_memory(bytes, in_folder, memory::available());
        let place = memory(&self.daemon);
        let _held = IN_MEMORY.lock();
        let in_memory = is_enough.then(|| make_private(&place).and_then(|()| make_new(&place.join(guest.as_str()))));
        match in_memory {
            Some(Ok(path)) => Ok(path),
            // Not among what a start of the daemon removes.
            _ => Ok(make_new(&folder(&self.daemon.settings.store, guest).join(SCRATCH))?),
        }
    }

    fn memory(&self) -> Option<u64> {
        memory::obtainable()
    }

    fn remove_scratch(&self, guest: &GuestName, path: &Path) -> Result<()> {
        remove(path)?;
        let _held = IN_MEMORY.lock();
        let place = memory(&self.daemon);
        let on_disk = folder(&self.daemon.settings.store, guest).join(SCRATCH);
        remove_empty([&*on_disk, &*place.join(guest.as_str()), &*place]);
        Ok(())
    }

    fn remove_scratches(&self, guest: &GuestName) -> Result<()> {
        Ok(remove_states(&self.daemon, guest)?)
    }

    fn mount(&self, guest: &GuestName, stack: LayerId) -> Result<PathBuf> {
        let dir = self.made(guest, "root")?;
        if let Some(there) = self.daemon.mounts.at(&dir) {
            if there.is_left() {
                // Somebody has unmounted it: there is nothing at its folder.
                self.unmount_dir(&dir)?;
            } else if there.info().and_then(|info| info.base) == Some(stack) {
                return Ok(dir);
            } else {
                return Err(Error::Busy(format!("the root of guest {guest} is mounted on another stack")).into());
            }
        }
        let upper = UpperChoice::Named(upper_name(guest)?);
        self.daemon.mounts.make(&self.daemon.store, stack, &format!("guest {guest}"), &dir, upper)?;
        Ok(dir)
    }

    fn has_changed(&self, guest: &GuestName, stack: LayerId) -> Result<bool> {
        let upper = upper::find(self.daemon.store.db(), &upper_name(guest)?)?;
        if upper.is_some_and(|upper| upper.base != Some(stack)) {
            return Ok(true);
        }
        let dir = self.mount(guest, stack)?;
        let size = self.daemon.mounts.at(&dir).and_then(|mount| mount.info()?.upper_size);
        if size.is_some_and(|size| size.inodes + size.dentries == 0) {
            return Ok(false);
        }
        // What was open when it was sealed is still there, as it was, which a seal finds out.
        Ok(self.seal(guest, &guest.layer("instance")?)? != stack)
    }

    fn seal(&self, guest: &GuestName, name: &LayerName) -> Result<LayerId> {
        let mount = self.daemon.mounts.at(&self.root(guest));
        let mount = mount.ok_or_else(|| Error::NotFound { what: "mount of guest", name: guest.to_string() })?;
        let options = SealOptions { name: name.clone(), expect: Expect::Any, kind: LayerKind::Instance };
        Ok(mount.seal(&options, &Silent)?.layer)
    }

    fn fold(&self, guest: &GuestName, name: &LayerName, past: usize) -> Result<Option<LayerId>> {
        let mount = self.daemon.mounts.at(&self.root(guest));
        let mount = mount.ok_or_else(|| Error::NotFound { what: "mount of guest", name: guest.to_string() })?;
        let squashed = mount.squash(past, std::slice::from_ref(name), &Silent)?;
        Ok(squashed.map(|squashed| squashed.layer))
    }

    fn unmount(&self, guest: &GuestName, discard: bool) -> Result<()> {
        self.unmount_dir(&self.root(guest))?;
        if discard && let Some(record) = upper::find(self.daemon.store.db(), &upper_name(guest)?)? {
            upper::remove(&self.daemon.store, record.id)?;
        }
        Ok(())
    }

    fn open_layer(&self, guest: &GuestName, layer: LayerId) -> Result<PathBuf> {
        let dir = self.made(guest, "state")?;
        self.unmount_dir(&dir)?;
        let source = format!("state of guest {guest}");
        let mount = self.daemon.mounts.make(&self.daemon.store, layer, &source, &dir, UpperChoice::ReadOnly)?;
        if self.daemon.store.partial(layer).is_some() {
            // A guest will run on it while it comes, and waits for each piece that it touches.
            mount.expect_scattered();
        }
        Ok(dir)
    }

    fn close_layer(&self, guest: &GuestName) -> Result<()> {
        Ok(self.unmount_dir(&folder(&self.daemon.settings.store, guest).join("state"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_lies_on_memory_only_if_the_machine_has_it() {
        let gib = |n: u64| n << 30;
        assert!(fits_in_memory(gib(3), gib(8), Some(gib(8))));
        assert!(!fits_in_memory(gib(3), gib(5), Some(gib(8))), "the folder takes less");
        assert!(!fits_in_memory(gib(3), gib(8), Some(gib(5))), "the machine has less");
        assert!(!fits_in_memory(0, gib(8), None), "it isn't known");
    }

    #[test]
    fn what_an_earlier_daemon_has_left_is_no_new_folder() {
        let folder = tempfile::tempdir().unwrap();
        let above = folder.path().join("guest");
        let first = make_new(&above).unwrap();
        let number: u64 = first.file_name().and_then(|name| name.to_str()).unwrap().parse().unwrap();
        let left: Vec<PathBuf> = (number + 1..number + 4).map(|number| above.join(number.to_string())).collect();
        for path in &left {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join("inventory.img"), "all that there is").unwrap();
        }
        let second = make_new(&above).unwrap();
        assert!(second != first && !left.contains(&second));
        assert_eq!(std::fs::read_dir(&second).unwrap().count(), 0);
        assert!(left.iter().all(|path| path.join("inventory.img").exists()));
    }
}
