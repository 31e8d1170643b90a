//! The second tier: its settings, the work that is asked for, and what the daemon does by itself.
//!
//! Invariant: the settings don't change while somebody works by them; so nothing goes to a bucket, or leaves this disk,
//! that no settings name any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::error::ErrorClass;
use layerfs::monitor::{Monitor, Silent};
use layerfs::store::{Moved, RebuildReport, Store, StoreOptions, Which, rebuild_from};
use migrator::governor::Governor;
use migrator::tier::{Bucket, DEFAULT_TIMEOUT_SECONDS, Keys, Settings as Tier};
use parking_lot::{Mutex, MutexGuard};
use tokio::runtime::Handle;

use crate::api::Empty;
use crate::api::tier::{TierAddRequest, TierEvictRequest, TierInfo, TierMoved};
use crate::cli::storage::Fsck;
use crate::config::{Environment, Settings};
use crate::daemon::Daemon;
use crate::daemon::http::Context;
use crate::daemon::once_left;
use crate::failure::{Class, Failure, Result};
use crate::{aws, units};

/// How often the daemon looks for packs to upload.
const ROUND: Duration = Duration::from_secs(30);
/// Small packs go once nothing was done for so long.
const IDLE: Duration = Duration::from_secs(120);
/// For how long a command waits for a round, which mostly finds nothing to do.
const MOMENT: Duration = Duration::from_secs(2);

/// What the daemon knows of the second tier besides its settings.
#[derive(Debug, Default)]
pub struct TierState {
    /// What went wrong last.
    error: Mutex<Option<String>>,
    /// The way in use. Held by whoever works by the settings for as long as that takes, or changes them.
    way: Mutex<Option<InUse>>,
}

/// The way to the tier, and what it was made of.
#[derive(Debug)]
struct InUse {
    bucket: Arc<Bucket>,
    tier: Tier,
    keys: Option<Keys>,
}

impl TierState {
    /// Makes the way to the tier that the store's settings name, if any. That it can't be used is told by the status.
    pub fn connect(&self, daemon: &Daemon) {
        let connected = match Tier::load(&daemon.store) {
            Ok(None) => return,
            Ok(Some(tier)) => InUse::new(daemon, tier, Handle::current()),
            Err(error) => Err(error.into()),
        };
        match connected {
            Ok(way) => way.connect(daemon, &mut self.way.lock()),
            Err(failure) => self.note(Some(failure.message)),
        }
    }

    /// Keeps the settings as they are, or lets only the caller change them.
    fn hold(&self) -> Result<MutexGuard<'_, Option<InUse>>> {
        self.way.try_lock_for(MOMENT).ok_or_else(|| {
            Failure::new(Class::Busy, "the daemon is just at work on the second tier").hint(
                "try again later; `layerctl daemon status` lists what was asked for. What the daemon uploads by itself ends \
                 with `layerctl daemon restart`, and begins again half a minute later",
            )
        })
    }

    /// Remembers what went wrong, and tells the log when that changes.
    fn note(&self, error: Option<String>) {
        let mut last = self.error.lock();
        if let Some(error) = error.as_ref().filter(|error| last.as_ref() != Some(*error)) {
            tracing::warn!("the second tier: {error}");
        }
        *last = error;
    }
}

impl InUse {
    fn new(daemon: &Daemon, tier: Tier, runtime: Handle) -> Result<InUse> {
        let keys = keys(&tier, &daemon.settings)?;
        InUse::with(daemon, tier, keys, runtime)
    }

    fn with(daemon: &Daemon, tier: Tier, keys: Option<Keys>, runtime: Handle) -> Result<InUse> {
        let governor = daemon.peering.node().transfers().governor();
        let bucket = Arc::new(Bucket::new(&tier, keys.as_ref(), governor, runtime)?);
        Ok(InUse { bucket, tier, keys })
    }

    /// Lets the store use it from now on.
    fn connect(self, daemon: &Daemon, in_use: &mut Option<InUse>) {
        daemon.store.connect_tier(Some(self.bucket.clone()));
        *in_use = Some(self);
    }
}

/// The keys in force for `tier`.
fn keys(tier: &Tier, settings: &Settings) -> Result<Option<Keys>> {
    let (file, profile) = (settings.tier_credentials.as_deref(), settings.tier_profile.as_deref());
    let keys = aws::keys(&Environment::current(), file, profile)?;
    // The machine's own role, which is asked for without keys, is one at Amazon.
    if let (None, Some(endpoint)) = (&keys, &tier.endpoint) {
        let text = format!("no access keys were found for {} at {endpoint}", tier.url());
        return Err(Failure::new(Class::Denied, text).hint(
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY before the daemon starts, or name an AWS credentials file as \
             tier_credentials in the config file; then `layerctl daemon stop`, and the next command starts it anew",
        ));
    }
    Ok(keys)
}

fn settings(store: &Store) -> Result<Tier> {
    Tier::load(store)?.ok_or_else(|| {
        Failure::new(Class::NotFound, "this store has no second tier")
            .hint("`layerctl tier add s3://BUCKET/FOLDER` adds one")
    })
}

/// `/v1/tier-add`.
pub fn add(context: &Context, request: TierAddRequest) -> Result<TierInfo> {
    let daemon = &context.daemon;
    let mut in_use = daemon.tier.hold()?;
    let before = Tier::load(&daemon.store)?;
    let mut tier = Tier::parse(&request.url)?;
    if let Some(before) = before.as_ref().filter(|before| before.url() != tier.url()) {
        let text = format!("this store has a second tier already, {}", before.url());
        return Err(Failure::new(Class::Exists, text).hint("`layerctl tier remove` ends that first"));
    }
    tier.endpoint = request.endpoint;
    tier.region = request.region;
    tier.keep_bytes = request.keep_bytes;
    tier.timeout_seconds = request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS);
    let is_new = before.is_none();
    tier.owner = before.map_or_else(Tier::new_owner, |before| Ok(before.owner))?;
    let way = InUse::new(daemon, tier, context.runtime())?;
    let remote = if is_new { 0 } else { daemon.store.tier_stat()?.remote_packs };
    if remote > 0 && way.bucket.owner()?.is_none() {
        let text =
            format!("{remote} packs are only in the second tier, and there is nothing of this store in that bucket");
        return Err(Failure::new(Class::NotFound, text).hint("`layerctl tier status` shows the --endpoint in use"));
    }
    way.bucket.take(&way.tier.owner)?;
    Tier::keep(Some(&way.tier), &daemon.store)?;
    way.connect(daemon, &mut in_use);
    daemon.tier.note(None);
    info(daemon)
}

/// `/v1/tier-status`.
pub fn status(context: &Context, _: Empty) -> Result<TierInfo> {
    info(&context.daemon)
}

fn info(daemon: &Daemon) -> Result<TierInfo> {
    let Some(tier) = Tier::load(&daemon.store)? else { return Ok(TierInfo::default()) };
    let stat = daemon.store.tier_stat()?;
    Ok(TierInfo {
        url: Some(tier.url()),
        endpoint: tier.endpoint,
        keep_bytes: tier.keep_bytes,
        timeout_seconds: tier.timeout_seconds,
        error: daemon.tier.error.lock().clone(),
        stored_packs: stat.stored_packs,
        stored_bytes: stat.stored_bytes,
        remote_packs: stat.remote_packs,
        remote_bytes: stat.remote_bytes,
        local_packs: stat.local_packs,
        local_bytes: stat.local_bytes,
    })
}

/// `/v1/tier-sync`.
pub fn sync(context: &Context, _: Empty) -> Result<TierMoved> {
    context.label("tier sync".to_owned());
    let started = Instant::now();
    let daemon = &context.daemon;
    let synced = round(daemon, Which::All, &*context.reporter);
    daemon.tier.note(synced.as_ref().err().map(|failure| failure.message.clone()));
    let (uploaded, evicted) = synced?;
    Ok(moved(started, uploaded, evicted, Moved::default()))
}

/// `/v1/tier-evict`.
pub fn evict(context: &Context, request: TierEvictRequest) -> Result<TierMoved> {
    context.label("tier evict".to_owned());
    let started = Instant::now();
    let store = &context.daemon.store;
    let keep = request.keep_bytes.or(settings(store)?.keep_bytes).unwrap_or(0);
    let evicted = store.tier_evict(keep, &*context.reporter)?;
    Ok(moved(started, Moved::default(), evicted, Moved::default()))
}

/// `/v1/tier-fetch`.
pub fn fetch(context: &Context, _: Empty) -> Result<TierMoved> {
    context.label("tier fetch".to_owned());
    let started = Instant::now();
    let store = &context.daemon.store;
    settings(store)?;
    let fetched = store.tier_fetch(&*context.reporter)?;
    Ok(moved(started, Moved::default(), Moved::default(), fetched))
}

fn moved(started: Instant, uploaded: Moved, evicted: Moved, fetched: Moved) -> TierMoved {
    TierMoved {
        uploaded_packs: uploaded.packs,
        uploaded_bytes: uploaded.bytes,
        evicted_packs: evicted.packs,
        evicted_bytes: evicted.bytes,
        fetched_packs: fetched.packs,
        fetched_bytes: fetched.bytes,
        seconds: units::seconds(started.elapsed()),
    }
}

/// `/v1/tier-remove`.
pub fn remove(context: &Context, _: Empty) -> Result<TierInfo> {
    let daemon = &context.daemon;
    let mut in_use = daemon.tier.hold()?;
    settings(&daemon.store)?;
    daemon.store.tier_forget()?;
    Tier::keep(None, &daemon.store)?;
    *in_use = None;
    daemon.tier.note(None);
    info(daemon)
}

/// Uploads, and evicts what is more than the disk shall hold.
fn round(daemon: &Daemon, which: Which, monitor: &dyn Monitor) -> Result<(Moved, Moved)> {
    let mut in_use = daemon.tier.hold()?;
    let keep_bytes = settings(&daemon.store)?.keep_bytes;
    reach(daemon, &mut in_use).inspect_err(|failure| daemon.tier.note(Some(failure.message.clone())))?;
    let uploaded = daemon.store.tier_sync(which, monitor);
    // One pack that can't be read, or removed there, is no reason to let the disk get full.
    let goes_on = |error: &layerfs::Error| !matches!(error.class(), ErrorClass::Network | ErrorClass::Busy);
    let evicted = match keep_bytes.filter(|_| uploaded.as_ref().err().is_none_or(goes_on)) {
        Some(keep) => daemon.store.tier_evict(keep, monitor)?,
        None => Moved::default(),
    };
    Ok((uploaded?, evicted))
}

/// Makes sure that the way to the tier is open, with the keys that are in force now, and that the folder is still this
/// store's.
fn reach(daemon: &Daemon, in_use: &mut Option<InUse>) -> Result<()> {
    let tier = settings(&daemon.store)?;
    let keys = keys(&tier, &daemon.settings)?;
    if let Some(way) = in_use.as_ref().filter(|way| way.tier == tier && way.keys == keys) {
        return Ok(way.bucket.take(&tier.owner)?);
    }
    let way = InUse::with(daemon, tier, keys, Handle::current())?;
    way.bucket.take(&way.tier.owner)?;
    way.connect(daemon, in_use);
    Ok(())
}

/// Keeps the tier up to date while the daemon lives: full packs soon, small ones when there is nothing else to do.
pub async fn keep_up(daemon: Arc<Daemon>) {
    let mut ticker = tokio::time::interval(ROUND);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticker.tick().await;
    loop {
        ticker.tick().await;
        let daemon = daemon.clone();
        let work = move || {
            if !matches!(Tier::load(&daemon.store), Ok(Some(_))) {
                return;
            }
            let idle_since = daemon.works.idle_since(Instant::now());
            let which = if idle_since.is_some_and(|since| since.elapsed() >= IDLE) { Which::All } else { Which::Full };
            match round(&daemon, which, &Silent) {
                Ok(_) => daemon.tier.note(None),
                // Somebody is at it, or it is looked after next time.
                Err(failure) if failure.class == Class::Busy => {}
                Err(failure) => daemon.tier.note(Some(failure.message)),
            }
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }
}

/// `fsck --rebuild --tier`: a store anew from what its second tier holds. None if a daemon runs.
pub fn rebuild(
    settings: &Settings,
    options: StoreOptions,
    url: &str,
    args: &Fsck,
    monitor: &dyn Monitor,
) -> Result<Option<RebuildReport>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|e| Failure::from(layerfs::Error::io("starting the runtime", e)))?;
    let mut tier = Tier::parse(url)?;
    tier.endpoint = args.endpoint.clone();
    tier.region = args.region.clone();
    let keys = keys(&tier, settings)?;
    let bucket = Bucket::new(&tier, keys.as_ref(), &Governor::default(), runtime.handle().clone())?;
    tier.owner = bucket.owner()?.ok_or_else(|| {
        Failure::new(Class::NotFound, format!("{url} is no store's second tier: it has no object layerfs-store"))
    })?;
    let options = StoreOptions { create: true, ..options };
    if once_left(settings, || Store::open(&settings.store, options))?.is_none() {
        return Ok(None);
    }
    let report = rebuild_from(&settings.store, options, Some(Arc::new(bucket)), monitor)?;
    let store = Store::open(&settings.store, options)?;
    Tier::keep(Some(&tier), &store)?;
    Ok(Some(report))
}
