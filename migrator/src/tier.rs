//! The second tier of a store in an S3-compatible bucket, by the crate `object_store`.
//!
//! It hides S3, and that its client is asynchronous while the store is not: requests run on the runtime, and the
//! caller's thread waits for them, for a bounded time; for an upload, as long as parts get through ([`upload`]). What goes
//! either way counts to the daemon's limit; what that holds up doesn't count to the time that the bucket has to answer.
//! Invariants: a folder of a bucket belongs to one store, which its object `layerfs-store` names; credentials are never
//! kept, logged or put into messages.

mod upload;

use std::fmt;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use layerfs::error::ErrorClass;
use layerfs::monitor::Monitor;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::store::{Objects, Store};
use layerfs::{Error, Result};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, RetryConfig,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::governor::{Controls, Gate, Governor, Priority, Way};
use upload::{Fault, Pace, Step, Upload};

/// Where the store keeps [`Settings`].
const SETTINGS_KEY: &[u8] = b"tier.settings";
/// The object that says whose folder it is.
const OWNER: &str = "layerfs-store";
/// No owner's name is longer, in bytes.
const MAX_OWNER: u64 = 256;
/// For how long one request may take while nobody waits for it, a part's excepted.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often one who waits for an upload looks whether it is to end.
const LOOK: Duration = Duration::from_millis(200);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What the waiting thread gives the runtime on top.
const SLACK: Duration = Duration::from_secs(5);
/// What the client says of a range that begins behind the end of an object.
const BEHIND_THE_END: &str = "status code: 416";
/// What a failure without keys is most likely due to.
const NO_KEYS: &str = "; no access keys were found, so this machine's own role at Amazon was tried: set AWS_ACCESS_KEY_ID and \
                       AWS_SECRET_ACCESS_KEY before the daemon starts, or tier_credentials in its config file";
/// How long a reader waits if nothing else is said, in seconds.
pub const DEFAULT_TIMEOUT_SECONDS: u64 = 20;

/// Which bucket, and how it is used. Kept in the store's index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The bucket.
    pub bucket: String,
    /// The folder in it; empty for all of it.
    #[serde(default)]
    pub prefix: String,
    /// Where the bucket is served, if not at Amazon's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Its region.
    #[serde(default)]
    pub region: Option<String>,
    /// How many bytes of packs stay on the local disk; all if not said.
    #[serde(default)]
    pub keep_bytes: Option<u64>,
    /// How long a reader waits for it.
    pub timeout_seconds: u64,
    /// The store that the folder belongs to.
    #[serde(default)]
    pub owner: String,
}

impl Settings {
    /// Those of `s3://BUCKET[/PREFIX]`.
    pub fn parse(url: &str) -> Result<Settings> {
        let wrong = || Error::invalid(format!("{url:?} is no address of a bucket; write it like s3://bucket/folder"));
        let rest = url.strip_prefix("s3://").ok_or_else(wrong)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_name = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let prefix = prefix.trim_end_matches('/');
        let parts_are_names = prefix.is_empty()
            || prefix.split('/').all(|part| part.starts_with(|c: char| c.is_ascii_alphanumeric()) && is_name(part));
        if bucket.is_empty() || !is_name(bucket) || !parts_are_names {
            return Err(wrong());
        }
        Ok(Settings {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: None,
            region: None,
            keep_bytes: None,
            timeout_seconds: DEFAULT_TIMEOUT_SECONDS,
            owner: String::new(),
        })
    }

    /// Those that `store` keeps; none if it has no second tier.
    pub fn load(store: &Store) -> Result<Option<Settings>> {
        let Some(text) = store.db().get(Cf::Meta, SETTINGS_KEY)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|e| Error::corrupt("second tier's settings", e.to_string()))
    }

    /// Keeps them in `store`, or forgets those that it has, durably.
    pub fn keep(settings: Option<&Settings>, store: &Store) -> Result<()> {
        let mut batch = Batch::new();
        match settings {
            Some(settings) => {
                let text = serde_json::to_vec(settings).map_err(|e| Error::invalid(e.to_string()))?;
                batch.put(Cf::Meta, SETTINGS_KEY, text);
            }
            None => batch.delete(Cf::Meta, SETTINGS_KEY),
        }
        store.db().write(batch, Sync::Yes)
    }

    /// A name for a store that no other one has.
    pub fn new_owner() -> Result<String> {
        let mut bytes = [0; 16];
        let filled = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes);
        filled.map_err(|_| Error::io("asking for random bytes", std::io::Error::from(std::io::ErrorKind::Other)))?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The address.
    pub fn url(&self) -> String {
        if self.prefix.is_empty() {
            format!("s3://{}", self.bucket)
        } else {
            format!("s3://{}/{}", self.bucket, self.prefix)
        }
    }
}

/// Who one is at the object store.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// The access key.
    pub access: String,
    /// The secret key.
    pub secret: String,
    /// The session's token, for temporary keys.
    pub token: Option<String>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys(…)")
    }
}

/// A folder of a bucket.
#[derive(Debug)]
pub struct Bucket {
    store: Arc<AmazonS3>,
    /// The same for packs, whose requests take as long as [`Pace`] lets them.
    uploader: Arc<AmazonS3>,
    pace: Pace,
    prefix: String,
    place: String,
    /// What to say of failures besides what they say themselves.
    hint: &'static str,
    timeout: Duration,
    runtime: Handle,
    /// Uploads leave the network to transfers that somebody waits for.
    uploads: Gate,
    /// Reads are waited for by programs.
    reads: Gate,
}

type Outcome<T> = std::result::Result<T, object_store::Error>;

impl Bucket {
    /// The way to the bucket, within the limits of `governor`. Nothing is asked of it yet. Without `keys` the machine's own
    /// role is used, if it has one.
    pub fn new(settings: &Settings, keys: Option<&Keys>, governor: &Governor, runtime: Handle) -> Result<Bucket> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let endpoint = settings.endpoint.clone();
        let is_plain = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        let options = ClientOptions::new().with_connect_timeout(CONNECT_TIMEOUT).with_allow_http(is_plain);
        let backoff = BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(5),
            ..BackoffConfig::default()
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&settings.bucket)
            .with_region(settings.region.as_deref().unwrap_or("us-east-1"))
            // Single objects go, and not every server knows the request for several.
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig { backoff, max_retries: 4, retry_timeout: PATIENCE });
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(keys) = keys {
            builder = builder.with_access_key_id(&keys.access).with_secret_access_key(&keys.secret);
            if let Some(token) = &keys.token {
                builder = builder.with_token(token);
            }
        }
        let place = settings.url();
        let hint = if keys.is_some() { "" } else { NO_KEYS };
        let client = |options: ClientOptions| {
            let built = builder.clone().with_client_options(options).build();
            built.map(Arc::new).map_err(|error| fault("reaching", &place, error, hint))
        };
        let (store, uploader) =
            (client(options.clone().with_timeout(PATIENCE))?, client(options.with_timeout_disabled())?);
        let timeout = Duration::from_secs(settings.timeout_seconds.max(1));
        let gate = |priority| governor.gate(Controls { priority, ..Controls::default() });
        Ok(Bucket {
            store,
            uploader,
            pace: Pace::default(),
            prefix: settings.prefix.clone(),
            place,
            hint,
            timeout,
            runtime,
            uploads: gate(Priority::Low),
            reads: gate(Priority::High),
        })
    }

    fn path(&self, name: &str) -> Path {
        if self.prefix.is_empty() { Path::from(name) } else { Path::from(format!("{}/{name}", self.prefix)) }
    }

    /// Runs `work` on the runtime and waits for it, on this thread and for no longer than `limit` and a little.
    fn call<T: Send + 'static>(
        &self,
        action: &'static str,
        limit: Duration,
        work: impl Future<Output = Outcome<T>> + Send + 'static,
    ) -> Result<Outcome<T>> {
        let (give, take) = mpsc::sync_channel(1);
        let task = self.runtime.spawn(async move {
            let _ = give.send(tokio::time::timeout(limit, work).await);
        });
        match take.recv_timeout(limit + SLACK) {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(_)) => Err(self.late(action, limit)),
            Err(_) => {
                task.abort();
                Err(self.late(action, limit))
            }
        }
    }

    /// Waits until the daemon's limit lets `bytes` in.
    fn admit(&self, action: &'static str, bytes: u64) -> Result<()> {
        let (give, take) = mpsc::sync_channel(1);
        let gate = self.reads.clone();
        self.runtime.spawn(async move {
            drop(gate.ready(Way::In, bytes as usize).await);
            let _ = give.send(());
        });
        take.recv().map_err(|_| self.ending(action))
    }

    fn late(&self, action: &'static str, limit: Duration) -> Error {
        self.network(action, format!("no answer within {} s{}", limit.as_secs(), self.hint))
    }

    /// The runtime has dropped the request.
    fn ending(&self, action: &'static str) -> Error {
        self.network(action, "the daemon ends".to_owned())
    }

    fn network(&self, action: &'static str, detail: String) -> Error {
        Error::Tier { action, place: self.place.clone(), class: ErrorClass::Network, detail }
    }

    fn fault(&self, action: &'static str, error: object_store::Error) -> Error {
        fault(action, &self.place, error, self.hint)
    }

    /// The store that the folder belongs to, if it belongs to one.
    pub fn owner(&self) -> Result<Option<String>> {
        let (store, path) = (self.store.clone(), self.path(OWNER));
        let got = self.call("reading from", self.timeout, async move {
            let range = store.get_range(&path, 0..MAX_OWNER).await?;
            Ok(range)
        })?;
        match got {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
            // A bucket that isn't there is told when something is written.
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.fault("reading from", error)),
        }
    }

    /// Makes the folder that of store `owner`.
    ///
    /// # Errors
    /// [`Error::Busy`] if it belongs to another one.
    pub fn take(&self, owner: &str) -> Result<()> {
        if self.owner()?.is_none() {
            let (store, path, text) = (self.store.clone(), self.path(OWNER), format!("{owner}\n"));
            let put = self.call("writing to", self.timeout, async move {
                let payload = PutPayload::from(text.into_bytes());
                let only_new = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                match store.put_opts(&path, payload.clone(), only_new).await {
                    // Who was faster is looked at below.
                    Ok(_)
                    | Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                        Ok(())
                    }
                    Err(object_store::Error::NotImplemented { .. }) => store.put(&path, payload).await.map(|_| ()),
                    Err(error) => Err(error),
                }
            })?;
            put.map_err(|error| self.fault("writing to", error))?;
        }
        match self.owner()? {
            Some(found) if found == owner => Ok(()),
            found => Err(Error::Busy(format!(
                "{} belongs to another store ({}); give each store a folder of its own, such as {}/other",
                self.place,
                found.unwrap_or_default(),
                self.place
            ))),
        }
    }
}

fn fault(action: &'static str, place: &str, error: object_store::Error, hint: &'static str) -> Error {
    use object_store::Error as E;
    let (class, hint) = match &error {
        E::NotFound { .. } => (ErrorClass::NotFound, ""),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } if !hint.is_empty() => (ErrorClass::Denied, hint),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
            (ErrorClass::Denied, "; check the keys in the environment or the AWS credentials file of the daemon")
        }
        E::NotSupported { .. } | E::NotImplemented { .. } => (ErrorClass::Unsupported, ""),
        _ => (ErrorClass::Network, hint),
    };
    let detail = format!("{}{hint}", said(&error));
    Error::Tier { action, place: place.to_owned(), class, detail }
}

/// What the client says of a failure.
fn said(error: &object_store::Error) -> String {
    without_markup(&crate::error::chain(error))
}

/// `text`, with only code and message of the document that a server answered. The rest repeats the request, and with it a
/// session's token.
fn without_markup(text: &str) -> String {
    let Some(start) = ["<?xml", "<Error"].iter().filter_map(|mark| text.find(mark)).min() else {
        return text.to_owned();
    };
    let (before, document) = text.split_at(start);
    let element = |name: &str| {
        let (_, rest) = document.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(inner, _)| inner)
    };
    let told: Vec<&str> = [element("Code"), element("Message")].into_iter().flatten().collect();
    format!("{before}{}", told.join(": ")).trim_end_matches([':', ' ']).to_owned()
}

impl Objects for Bucket {
    fn put(&self, name: &str, path: &FilePath, monitor: &dyn Monitor) -> Result<()> {
        const ACTION: &str = "uploading to";
        let (tell, told) = mpsc::channel();
        let cancel = CancellationToken::new();
        let upload = Upload {
            store: self.uploader.clone(),
            to: self.path(name),
            from: path.to_owned(),
            gate: self.uploads.clone(),
            pace: self.pace,
            cancel: cancel.clone(),
        };
        self.runtime.spawn(async move {
            let ended = upload.run(&tell).await;
            let _ = tell.send(Step::Ended(ended));
        });
        loop {
            match told.recv_timeout(LOOK) {
                Ok(Step::Sent(bytes)) => monitor.advance(bytes),
                Ok(Step::Ended(ended)) => {
                    return ended.map_err(|fault| match fault {
                        Fault::Cancelled => Error::Cancelled,
                        Fault::Late(limit) => self.late(ACTION, limit),
                        Fault::File(error) => error,
                        Fault::Bucket(error) => self.fault(ACTION, error),
                    });
                }
                Err(RecvTimeoutError::Timeout) if monitor.is_cancelled() => cancel.cancel(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.ending(ACTION)),
            }
        }
    }

    fn read(&self, name: &str, at: u64, bytes: u64) -> Result<Bytes> {
        const ACTION: &str = "reading from";
        self.admit(ACTION, bytes)?;
        let (store, from) = (self.store.clone(), self.path(name));
        let read = async move { store.get_range(&from, at..at + bytes).await };
        match self.call(ACTION, self.timeout, read)? {
            Ok(found) => Ok(found),
            // The object is shorter: there is nothing after its end, which isn't to say that the bucket failed.
            Err(error) if said(&error).contains(BEHIND_THE_END) => Ok(Bytes::new()),
            Err(error) => Err(self.fault(ACTION, error)),
        }
    }

    fn size(&self, name: &str) -> Result<Option<u64>> {
        let (store, of) = (self.store.clone(), self.path(name));
        match self.call("looking into", self.timeout, async move { store.head(&of).await })? {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.fault("looking into", error)),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let (store, what) = (self.store.clone(), self.path(name));
        match self.call("removing from", self.timeout, async move { store.delete(&what).await })? {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.fault("removing from", error)),
        }
    }

    fn list(&self) -> Result<Vec<(String, u64)>> {
        let (store, folder) = (self.store.clone(), self.path("packs"));
        let list = async move { store.list(Some(&folder)).try_collect::<Vec<_>>().await };
        let found = self.call("listing", PATIENCE, list)?.map_err(|error| self.fault("listing", error))?;
        let above = if self.prefix.is_empty() { String::new() } else { format!("{}/", self.prefix) };
        let name = |path: &Path| path.as_ref().strip_prefix(&above).map(str::to_owned);
        Ok(found.into_iter().filter_map(|object| Some((name(&object.location)?, object.size))).collect())
    }

    fn place(&self) -> String {
        self.place.clone()
    }
}

#[cfg(test)]
mod tests;
