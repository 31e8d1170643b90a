//! One repository of one registry: its manifests and blobs, with retries.
//!
//! It hides which failures pass by themselves, and how a cut download goes on where it was. Invariants: a blob's file
//! is complete and has the right digest when this says so; every wait ends.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use layerfs::error::ErrorClass;
use layerfs::monitor::Monitor;
use layerfs::platform::Platform;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::{Access, Address};
use crate::error::{Error, Result};
use crate::governor::Way;
use crate::transfers::Transfer;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// For so long a registry may say nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Before the second, third, … attempt.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(8)];
/// How often it is looked whether the work was cancelled.
const CANCEL_TICK: Duration = Duration::from_millis(100);
/// What registries may answer when they are asked for a manifest.
const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// What a manifest says of a blob or of another manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// What is going to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    Pull,
    Push,
}

/// A repository.
pub(super) struct Remote {
    client: Client,
    auth: RegistryAuth,
    place: Reference,
    transfer: Arc<Transfer>,
}

impl Remote {
    /// Connects to the registry and logs in.
    pub async fn open(address: &Address, access: &Access, transfer: Arc<Transfer>, right: Right) -> Result<Remote> {
        // The TLS library takes the process's provider; whoever was first has set the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = ClientConfig {
            protocol: if access.plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            use_monolithic_push: true,
            user_agent: concat!("layerfs/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let auth = match &access.login {
            None => RegistryAuth::Anonymous,
            Some(login) => RegistryAuth::Basic(login.username.clone(), login.password.clone()),
        };
        let place = address.0.clone();
        let client = Client::try_from(config).map_err(|error| fault("reaching", &place, error).0)?;
        let remote = Remote { client, auth, place, transfer };
        let operation = if right == Right::Push { RegistryOperation::Push } else { RegistryOperation::Pull };
        remote.retry("logging in to", || remote.client.auth(&remote.place, &remote.auth, operation)).await?;
        Ok(remote)
    }

    /// Tries until it succeeds, fails for good, or has failed too often.
    async fn retry<T, F: Future<Output = Result<T, OciDistributionError>>>(
        &self,
        action: &'static str,
        attempt: impl Fn() -> F,
    ) -> Result<T> {
        let mut pauses = PAUSES.into_iter();
        loop {
            let error = match self.unless_cancelled(attempt()).await? {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let (error, is_passing) = fault(action, &self.place, error);
            match pauses.next().filter(|_| is_passing) {
                None => return Err(error),
                Some(pause) => {
                    tracing::debug!(%error, "tries again");
                    self.unless_cancelled(tokio::time::sleep(pause)).await?;
                }
            }
        }
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            layerfs::monitor::check(&*self.transfer)?;
            if let Ok(done) = tokio::time::timeout(CANCEL_TICK, &mut work).await {
                return Ok(done);
            }
        }
    }

    /// The manifest of the address, or that with `digest`, and its digest.
    pub async fn manifest(&self, digest: Option<&str>) -> Result<(Bytes, String)> {
        let place = digest.map_or_else(|| self.place.clone(), |digest| self.place.clone_with_digest(digest.to_owned()));
        self.retry("reading the manifest of", || self.client.pull_manifest_raw(&place, &self.auth, &MANIFEST_TYPES))
            .await
    }

    /// Sets the tag.
    pub async fn put_manifest(&self, bytes: Vec<u8>, media_type: &'static str) -> Result<()> {
        let bytes = Bytes::from(bytes);
        let put = || async {
            let kind = media_type.parse().map_err(|_| OciDistributionError::GenericError(None))?;
            self.client.push_manifest_raw(&self.place, bytes.clone(), kind).await
        };
        self.retry("writing the manifest of", put).await.map(|_| ())
    }

    /// Whether the repository has this blob.
    pub async fn has_blob(&self, digest: &str) -> Result<bool> {
        self.retry("looking for a blob of", || self.client.blob_exists(&self.place, digest)).await
    }

    /// Uploads the file at `path`, which has this digest and size.
    pub async fn put_blob(&self, blob: &Descriptor, path: &Path) -> Result<()> {
        // Bytes that an earlier attempt sent aren't told again.
        let told = Arc::new(AtomicU64::new(0));
        let put = || async {
            let file = tokio::fs::File::open(path).await?;
            let (told, transfer) = (told.clone(), self.transfer.clone());
            let sent = AtomicU64::new(0);
            let piece_bytes = transfer.gate().piece_bytes(Way::Out);
            let pieces = tokio_util::io::ReaderStream::with_capacity(file, piece_bytes).and_then(move |piece| {
                let sent = sent.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
                let (told, transfer) = (told.clone(), transfer.clone());
                async move {
                    pass(&transfer, Way::Out, piece.len()).await;
                    let before = told.fetch_max(sent, Ordering::Relaxed);
                    transfer.advance(sent.saturating_sub(before));
                    Ok(piece)
                }
            });
            let pieces = Box::pin(pieces.map_err(OciDistributionError::from));
            self.client.push_blob_stream(&self.place, pieces, &blob.digest, Some(blob.size)).await
        };
        self.retry("uploading to", put).await?;
        self.transfer.items(1);
        Ok(())
    }

    /// Downloads a blob to the file at `path`, and compares its digest. A cut download goes on where it was.
    pub async fn get_blob(&self, blob: &Descriptor, path: &Path) -> Result<()> {
        self.check_digest(blob)?;
        let failed = |e| Error::from(layerfs::Error::file("write", path, e));
        let options = tokio::fs::OpenOptions::new().read(true).write(true).create_new(true).clone();
        let file = tokio::sync::Mutex::new(options.open(path).await.map_err(failed)?);
        self.retry("downloading from", || self.get_rest(blob, &file)).await?;
        let mut file = file.into_inner();
        self.check_blob(blob, &mut file).await?;
        file.sync_data().await.map_err(failed)?;
        self.transfer.items(1);
        Ok(())
    }

    /// Fails unless a file can be named by the digest, whatever the registry says.
    pub fn check_digest(&self, blob: &Descriptor) -> Result<()> {
        if is_digest(&blob.digest) {
            return Ok(());
        }
        let detail = format!("it has a blob with digest {:?}, which is neither sha256 nor sha512", blob.digest);
        Err(self.wrong(ErrorClass::Unsupported, detail))
    }

    async fn get_rest(
        &self,
        blob: &Descriptor,
        file: &tokio::sync::Mutex<tokio::fs::File>,
    ) -> Result<(), OciDistributionError> {
        let mut file = file.lock().await;
        let mut at = file.seek(std::io::SeekFrom::End(0)).await?;
        if at == blob.size {
            return Ok(());
        }
        let response = self.client.pull_blob_stream_partial(&self.place, blob.digest.as_str(), at, None).await?;
        let mut pieces = match response {
            BlobResponse::Partial(pieces) => pieces,
            BlobResponse::Full(pieces) => {
                file.set_len(0).await?;
                at = file.seek(std::io::SeekFrom::Start(0)).await?;
                pieces
            }
        };
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            at += piece.len() as u64;
            if at > blob.size {
                break;
            }
            file.write_all(&piece).await?;
            pass(&self.transfer, Way::In, piece.len()).await;
            self.transfer.advance(piece.len() as u64);
        }
        file.flush().await?;
        match at.cmp(&blob.size) {
            std::cmp::Ordering::Less => Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(OciDistributionError::SpecViolationError(format!(
                "blob {} is longer than it should be",
                blob.digest
            ))),
        }
    }

    async fn check_blob(&self, blob: &Descriptor, file: &mut tokio::fs::File) -> Result<()> {
        let failed = |e| Error::from(layerfs::Error::io("reading a downloaded blob", e));
        file.seek(std::io::SeekFrom::Start(0)).await.map_err(failed)?;
        let mut hash = Hash::new(&blob.digest)
            .ok_or_else(|| self.wrong(ErrorClass::Unsupported, format!("it has a blob with digest {}", blob.digest)))?;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match file.read(&mut buffer).await.map_err(failed)? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
        let found = hash.finish();
        if found == blob.digest {
            return Ok(());
        }
        Err(self.wrong(ErrorClass::Corrupt, format!("a blob came with digest {found} instead of {}", blob.digest)))
    }

    /// Its address, for people.
    pub fn place(&self) -> String {
        self.place.whole()
    }

    /// The registry holds something that can't be.
    pub fn wrong(&self, class: ErrorClass, detail: impl Into<String>) -> Error {
        Error::Registry { action: "reading", place: self.place.whole(), class, detail: detail.into() }
    }

    /// The document, as JSON.
    pub fn parse<T: serde::de::DeserializeOwned>(&self, document: &[u8]) -> Result<T> {
        serde_json::from_slice(document)
            .map_err(|error| self.wrong(ErrorClass::Corrupt, format!("a document there makes no sense: {error}")))
    }
}

/// Waits until `bytes` may go out, or more than those that came may be read.
async fn pass(transfer: &Transfer, way: Way, bytes: usize) {
    transfer.gate().open().await;
    drop(transfer.gate().ready(way, bytes).await);
}

/// A digest that is being computed.
enum Hash {
    Sha256(sha2::Sha256),
    Sha512(Box<sha2::Sha512>),
}

impl Hash {
    fn new(digest: &str) -> Option<Hash> {
        match digest.split_once(':')? {
            ("sha256", _) => Some(Hash::Sha256(sha2::Sha256::new())),
            ("sha512", _) => Some(Hash::Sha512(Box::new(sha2::Sha512::new()))),
            _ => None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::Sha256(hash) => hash.update(bytes),
            Hash::Sha512(hash) => hash.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Hash::Sha256(hash) => format!("sha256:{}", hex(&hash.finalize())),
            Hash::Sha512(hash) => format!("sha512:{}", hex(&hash.finalize())),
        }
    }
}

/// The digest of `bytes`, as descriptors have it.
pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&sha2::Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether `digest` is one by which a file can be named.
pub(super) fn is_digest(digest: &str) -> bool {
    let is_hex = |hex: &str| hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match digest.split_once(':') {
        Some(("sha256", hex)) => hex.len() == 64 && is_hex(hex),
        Some(("sha512", hex)) => hex.len() == 128 && is_hex(hex),
        _ => false,
    }
}

/// What `error` is to the user, and whether it may pass by itself.
fn fault(action: &'static str, place: &Reference, error: OciDistributionError) -> (Error, bool) {
    let (class, is_passing, detail) = judge(error);
    let detail = match class {
        ErrorClass::Denied => format!(
            "{detail}; log in with `docker login {0}` or `podman login {0}`, or use --username and --password-stdin",
            place.registry()
        ),
        ErrorClass::Network => {
            format!("{detail}; check the address and the network, and --plain-http if it has no TLS")
        }
        _ => detail,
    };
    (Error::Registry { action, place: place.whole(), class, detail }, is_passing)
}

fn judge(error: OciDistributionError) -> (ErrorClass, bool, String) {
    use OciDistributionError as E;
    match error {
        E::AuthenticationFailure(_) | E::UnauthorizedError { .. } => {
            (ErrorClass::Denied, false, "the registry does not let this user do that".to_owned())
        }
        E::RegistryError { envelope, .. } => {
            let said = envelope.errors.iter().map(|error| error.message.clone()).collect::<Vec<_>>().join(", ");
            let (class, is_passing) = match envelope.errors.first().map(|error| &error.code) {
                Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => (ErrorClass::Denied, false),
                Some(OciErrorCode::Toomanyrequests) => (ErrorClass::Network, true),
                Some(
                    OciErrorCode::ManifestUnknown
                    | OciErrorCode::NameUnknown
                    | OciErrorCode::NotFound
                    | OciErrorCode::BlobUnknown,
                ) => (ErrorClass::NotFound, false),
                Some(OciErrorCode::Unsupported) => (ErrorClass::Unsupported, false),
                _ => (ErrorClass::Invalid, false),
            };
            (class, is_passing, format!("the registry says: {said}"))
        }
        E::ServerError { code, message, .. } => {
            let message = message.trim().chars().take(200).collect::<String>();
            of_status(Some(code), format!("the registry answers {code} {message}").trim_end().to_owned())
        }
        E::RequestError(error) => {
            let status = error.status().map(|status| status.as_u16());
            of_status(status, crate::error::chain(&error.without_url()))
        }
        E::ImageManifestNotFoundError(detail) => (ErrorClass::NotFound, false, detail),
        E::DigestError(error) => (ErrorClass::Corrupt, false, error.to_string()),
        // The link's errors come so, and those of writing what it brings.
        E::IoError(error) => match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (ErrorClass::NoSpace, false, error.to_string()),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => (ErrorClass::Io, false, error.to_string()),
            _ => (ErrorClass::Network, true, error.to_string()),
        },
        E::UnsupportedMediaTypeError(detail) => (ErrorClass::Unsupported, false, detail),
        other => (ErrorClass::Corrupt, false, other.to_string()),
    }
}

fn of_status(status: Option<u16>, detail: String) -> (ErrorClass, bool, String) {
    match status {
        Some(401 | 403) => (ErrorClass::Denied, false, "the registry does not let this user do that".to_owned()),
        Some(404) => (ErrorClass::NotFound, false, "the registry has nothing there".to_owned()),
        Some(408 | 429 | 500..) | None => (ErrorClass::Network, true, detail),
        Some(_) => (ErrorClass::Invalid, false, detail),
    }
}
