//! The daemon: owner of the store, the mounts and the peer listener; answers the control API.
//!
//! Invariants: whoever holds the store's lock owns its socket, so a socket found at the start is stale; the socket is
//! there only while requests are answered; the daemon never exits with work or a mount half-way.

pub mod http;
pub mod life;
pub mod log;
pub mod memory;
pub mod ops;
pub mod streams;
pub mod supervised;
pub mod work;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use layerfs::store::{Store, StoreOptions};
use tokio::net::UnixListener;

use crate::api::{Empty, Status};
use crate::cli::system::DaemonStart;
use crate::config::{Listen, Settings};
use crate::failure::{Class, Failure, Result};
use crate::{autostart, units};
use life::Life;
use migrator::LazyOptions;
use ops::guests::GuestsState;
use ops::migrate::Moves;
use ops::mounts::Mounts;
use ops::peers::Peering;
use ops::tier::TierState;
use work::Works;

/// How long whoever needs the store for himself waits for the last daemon to let go of it.
const PREDECESSOR: Duration = Duration::from_secs(15);
/// How often it is looked whether the mounts have read something new, and whether requests hang.
const TRACES_EVERY: Duration = Duration::from_secs(15);
/// The exit code by which systemd, if it started this daemon, knows that another one is wanted.
const EXIT_HANDED_OVER: i32 = 75;
/// No space to go on with what is mounted: as commands end for want of it.
const EXIT_NO_SPACE: i32 = 8;
/// Threads that may wait or compute: several for each piece of work, and for each transfer and question of a peer. They are started
/// when they are needed, and go after ten idle seconds.
const MOST_THREADS: usize = 1024;

/// All that the operations share.
pub struct Daemon {
    /// The store.
    pub store: Arc<Store>,
    /// The settings in force.
    pub settings: Settings,
    /// What is under way.
    pub works: Arc<Works>,
    /// The mounts.
    pub mounts: Mounts,
    /// The peers and the listener.
    pub peering: Peering,
    /// The second tier.
    pub tier: TierState,
    /// The guests.
    pub guests: GuestsState,
    /// Their moves.
    pub moves: Moves,
    /// When and why to exit.
    pub life: Life,
    /// When it was started.
    pub started: Instant,
    started_at: i64,
    instance: u64,
    is_autostarted: bool,
}

impl Daemon {
    /// What it says of itself.
    pub fn status(&self) -> Status {
        let listener = self.peering.status();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api: crate::api::API_VERSION,
            pid: std::process::id(),
            instance: self.instance,
            store: self.settings.store.clone(),
            started: crate::api::Timestamp(self.started_at),
            uptime_seconds: units::seconds(self.started.elapsed()),
            autostarted: self.is_autostarted,
            listening: listener.listening,
            listen_error: listener.error,
            listen: self.peering.listen().to_string(),
            mounts: self.mounts.count() as u64,
            keeper: self.mounts.keeping().pid(),
            resident_bytes: memory::resident_bytes(),
            mount_namespace: mount_namespace(),
            keeps_awake: layerfs::mount::awake::keeps_awake(),
            work: self.works.list(),
        }
    }
}

/// The inode of this process's mount namespace; 0 if unknown.
pub fn mount_namespace() -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/ns/mnt").map_or(0, |metadata| metadata.ino())
}

/// Runs the daemon until it is told to exit.
///
/// Detached, it writes one line to stdout when it is ready or has failed, which [`autostart`] reads.
pub fn run(settings: Settings, start: &DaemonStart) -> Result<()> {
    memory::limit_arenas();
    if start.detached {
        life::leave_terminal();
    }
    supervised::reap_inherited();
    life::raise_descriptor_limit();
    let log = log::start(&settings, !start.detached);
    layerfs::mount::watch::set_slow(settings.slow_request);
    layerfs::mount::awake::set_keep_awake(settings.keep_awake);
    layerfs::mount::helper::is_started_by(["daemon", "hand"].map(Into::into).to_vec());
    let outcome = log.and_then(|()| prepare_and_serve(settings, start));
    if let (true, Err(failure)) = (start.detached, &outcome) {
        tracing::error!("{failure}");
        announce(&autostart::Announcement::Failed(failure.clone()));
    }
    outcome
}

fn prepare_and_serve(settings: Settings, start: &DaemonStart) -> Result<()> {
    if let Some(step) = &start.crash_at {
        arm(step)?;
    }
    let listen = match &start.listen {
        Some(text) => text.parse()?,
        None => settings.listen.clone(),
    };
    for mistake in &settings.mistakes {
        tracing::warn!("goes on with the mounts, and without this: {mistake}");
    }
    if let Some(missing) = settings.missing_credentials() {
        tracing::warn!("{missing}");
    }
    let mut opened = open_store(&settings)?;
    if opened.is_none() && supervised::is_supervised() {
        let still_there = |failure: Failure| supervised::runs_already(&settings).hint(failure.message);
        supervised::take_over(&settings).map_err(still_there)?;
        opened = open_store(&settings)?;
    }
    let Some(store) = opened else {
        // Another one was faster; whoever started this one can talk to that.
        if start.detached {
            announce(&autostart::Announcement::Ready);
            return Ok(());
        }
        return Err(supervised::runs_already(&settings));
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(MOST_THREADS)
        .thread_name("layerfs-io")
        .enable_all()
        .build()
        .map_err(|e| Failure::from(layerfs::Error::io("starting the runtime", e)))?;
    let served = runtime.block_on(serve(store, settings, listen, start));
    runtime.shutdown_timeout(Duration::from_secs(5));
    served
}

/// How the store is opened.
pub fn store_options(settings: &Settings) -> StoreOptions {
    let defaults = StoreOptions::create();
    StoreOptions {
        cache_bytes: settings.cache_bytes.map_or(defaults.cache_bytes, |bytes| bytes as usize),
        compression_level: settings.compression.unwrap_or(defaults.compression_level),
        threads: settings.threads.unwrap_or(defaults.threads),
        warm_bytes: settings.warm_bytes.unwrap_or(defaults.warm_bytes),
        ..defaults
    }
}

/// Opens the store; waits for a predecessor to leave. None if another daemon answers for it.
fn open_store(settings: &Settings) -> Result<Option<Arc<Store>>> {
    let options = store_options(settings);
    once_left(settings, || Store::open(&settings.store, options))
}

/// What `take` returns, which first of all takes the store's lock: a daemon has that until its process ends, after its last answer. So it is
/// waited for. None if a daemon answers.
///
/// # Errors
/// Those of `take`.
pub fn once_left<T>(settings: &Settings, mut take: impl FnMut() -> layerfs::Result<T>) -> Result<Option<T>> {
    let began = Instant::now();
    loop {
        match take() {
            Ok(taken) => return Ok(Some(taken)),
            Err(error @ layerfs::Error::Busy(_)) => {
                if std::os::unix::net::UnixStream::connect(autostart::socket_target(&settings.store)).is_ok() {
                    return Ok(None);
                }
                if began.elapsed() > PREDECESSOR {
                    return Err(error.into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn serve(store: Arc<Store>, given: Settings, listen: Listen, start: &DaemonStart) -> Result<()> {
    // Sockets lie by the path that was given: it may have a link because it is too long for a socket without.
    let (mounts, left) = Mounts::new(&store, &given, start)?;
    let socket = autostart::socket_path(&given.store);
    // What waits for this daemon is worth more than that peers reach it.
    let has_left = !left.is_empty();
    // Mounts have no links in their paths, and guests' are known by lying in the store.
    let folder = given.store.canonicalize().unwrap_or_else(|_| given.store.clone());
    let settings = Settings { store: folder, ..given };
    let lazy = LazyOptions { timeout: settings.lazy_timeout };
    let peering = Peering::new(&store, listen, lazy, &settings)?;
    let daemon = Arc::new(Daemon {
        works: Arc::new(Works::default()),
        mounts,
        peering,
        tier: TierState::default(),
        guests: GuestsState::new(&store),
        moves: Moves::default(),
        life: Life::default(),
        started: Instant::now(),
        started_at: units::now(),
        instance: std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_micros() as u64,
        is_autostarted: start.autostarted,
        store,
        settings,
    });
    let limit = ops::transfers::in_force(&daemon)?;
    daemon.peering.node().transfers().governor().set_limit(limit.limit.map(migrator::Rate::new));
    daemon.tier.connect(&daemon);
    let bringing_back = daemon.clone();
    let brought_back =
        tokio::task::spawn_blocking(move || bringing_back.mounts.bring_back(&bringing_back.store, left)).await;
    if let Ok(Err(failure)) = brought_back {
        let failure = failure.hint("the mounts wait until there is some: make room on the store's disk");
        tracing::error!("{failure}");
        if start.detached {
            announce(&autostart::Announcement::Failed(failure));
        }
        end_at_once(EXIT_NO_SPACE);
    }
    Moves::start(&daemon);
    match daemon.peering.start().await {
        Err(failure) if has_left => tracing::error!("does not listen for peers: {failure}"),
        started => started?,
    }
    tokio::spawn(keep_traces(daemon.clone()));
    let socket = Socket::bind(socket)?;
    tracing::info!(store = %daemon.settings.store.display(), pid = std::process::id(), "ready");
    if start.detached {
        announce(&autostart::Announcement::Ready);
    } else {
        life::notify_ready();
    }
    tokio::spawn(ops::tier::keep_up(daemon.clone()));
    tokio::spawn(ops::activity::serve_metrics(daemon.clone()));
    let (listener, socket) = socket.split();
    let router = router().with_state(daemon.clone());
    let stopped = life::until_stopped(daemon.clone());
    let serving = axum::serve(listener, router).with_graceful_shutdown(stopped);
    tokio::select! {
        served = serving => served.map_err(|e| Failure::from(layerfs::Error::io("serving the control API", e)))?,
        // A client that keeps its connection open must not keep the daemon.
        () = life::grace(&daemon) => {}
    }
    drop(socket);
    daemon.peering.stop().await;
    daemon.moves.stop();
    if daemon.life.is_handed_over() {
        hand_over(&daemon);
    }
    tracing::info!("exits");
    Ok(())
}

/// Ends this program at once, as a crash would but with everything saved: the mounts' threads must not be seen to end.
fn hand_over(daemon: &Daemon) -> ! {
    let keeping = daemon.mounts.keeping();
    let started = if daemon.life.is_for_caller() { keeping.leave_to_caller() } else { keeping.start_successor() };
    let status = match started {
        Ok(true) => 0,
        Ok(false) => {
            tracing::info!("becomes the daemon that is installed now");
            let error = supervised::become_successor();
            tracing::error!("that can't be run: {error}; ends, so that systemd starts another daemon");
            EXIT_HANDED_OVER
        }
        Err(failure) => {
            tracing::error!("{failure}; the keeper starts a daemon");
            EXIT_HANDED_OVER
        }
    };
    tracing::info!("leaves the mounts to another daemon");
    end_at_once(status)
}

/// Ends this process as a kill would: what the keeper has of mounts stays.
fn end_at_once(status: i32) -> ! {
    // SAFETY: ends the process; nothing here has to be dropped, as after a kill.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(status)
    }
}

/// Keeps what the mounts have read, so that a crash costs only the latest of it; tells of requests that hang.
async fn keep_traces(daemon: Arc<Daemon>) {
    let mut ticker = tokio::time::interval(TRACES_EVERY);
    loop {
        ticker.tick().await;
        let daemon = daemon.clone();
        let look = move || {
            ops::activity::tell_hanging(&daemon);
            daemon.mounts.save_traces();
        };
        let _ = tokio::task::spawn_blocking(look).await;
    }
}

fn router() -> Router<Arc<Daemon>> {
    ops::activity::route(ops::routes(Router::new())).fallback(|request: axum::extract::Request| async move {
        let text = format!("there is no operation {}; docs/API.md lists them", request.uri().path());
        http::with_version(http::failed(&Failure::new(Class::NotFound, text)))
    })
}

/// The control socket; it goes when this is dropped.
struct Socket {
    listener: UnixListener,
    paths: SocketPaths,
}

struct SocketPaths(Vec<PathBuf>);

impl Socket {
    fn bind(link: PathBuf) -> Result<Socket> {
        let _ = std::fs::remove_file(&link);
        let real = autostart::bindable_path(&link)?;
        if real != link {
            let _ = std::fs::remove_file(&real);
        }
        // In a folder that only the owner enters, or created so that nobody else can connect.
        let old = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&real);
        rustix::process::umask(old);
        let listener = bound.map_err(|e| Failure::file("listen on", &real, e))?;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&real, private).map_err(|e| Failure::file("protect", &real, e))?;
        let mut paths = vec![real.clone()];
        if real != link {
            std::os::unix::fs::symlink(&real, &link).map_err(|e| Failure::file("create", &link, e))?;
            paths.push(link);
        }
        Ok(Socket { listener, paths: SocketPaths(paths) })
    }

    fn split(self) -> (UnixListener, SocketPaths) {
        (self.listener, self.paths)
    }
}

impl Drop for SocketPaths {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn announce(announcement: &autostart::Announcement) {
    let mut stdout = std::io::stdout().lock();
    // Nobody may be listening any more.
    let _ = writeln!(stdout, "{}", serde_json::json!(announcement));
    let _ = stdout.flush();
    drop(stdout);
    life::leave_stdout();
}

fn arm(step: &str) -> Result<()> {
    let (name, nth) = match step.rsplit_once(':') {
        Some((name, nth)) => (name, nth.parse().map_err(|_| Failure::invalid(format!("{nth:?} is no count")))?),
        None => (step, 1),
    };
    if layerfs::failpoint::arm(name, nth) {
        return Ok(());
    }
    let known = layerfs::failpoint::NAMES.join(", ");
    Err(Failure::invalid(format!("there is no step {name:?}; the steps are {known}")))
}

/// `/v1/stop`: exits after the answer.
pub fn stop(context: &http::Context, request: crate::api::Stop) -> Result<Empty> {
    life::stop(context, request)
}
