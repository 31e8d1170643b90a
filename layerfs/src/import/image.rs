//! OCI image layouts and `docker save` archives: which layers an image has, and reading them with their digests
//! compared.

use std::io::{self, Read};

use serde::Deserialize;
use sha2::Digest as _;

use crate::error::{Error, Result};
use crate::image_config::ImageConfig;
use crate::import::bundle::Bundle;
use crate::import::decode::{Compression, Input, peek};
use crate::import::feed::Feed;
use crate::import::tar::{self, TarOptions};
use crate::platform::Platform;

/// The most layers of an image.
const MAX_LAYERS: usize = 512;

/// Which of several images is meant.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    /// Its tag or reference.
    pub reference: Option<String>,
    /// What it shall run on; this machine if not said.
    pub platform: Option<Platform>,
}

/// An image that was chosen.
pub(super) struct Image {
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    /// What it says of itself.
    pub config: Option<ImageConfig>,
}

/// A layer of an image.
pub(super) struct ImageLayer {
    /// Its file in the bundle.
    pub file: String,
    /// Of the file's bytes.
    digest: Option<String>,
    /// Of the bytes when they are decompressed.
    diff_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Option<Descriptor>,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct DockerConfig {
    rootfs: DockerRoot,
}

#[derive(Deserialize)]
struct DockerRoot {
    diff_ids: Vec<String>,
}

fn json<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::corrupt(what, e.to_string()))
}

/// The image of an OCI image layout.
pub(super) fn oci_image(bundle: &Bundle, choice: &Choice) -> Result<Image> {
    let mut index: Index = json("image index", &bundle.document("index.json")?)?;
    // An index may refer to an index, once per platform's worth of reason.
    for _ in 0..4 {
        let chosen = choose(&index.manifests, choice)?;
        let document = verified_document(bundle, &chosen.digest)?;
        if !chosen.media_type.contains("index") && !chosen.media_type.contains("manifest.list") {
            let manifest: Manifest = json("image manifest", &document)?;
            let config = manifest.config.map(|config| verified_document(bundle, &config.digest)).transpose()?;
            let layers = manifest.layers.into_iter().map(oci_layer).collect::<Result<Vec<_>>>()?;
            return image(layers, config.as_deref(), choice);
        }
        index = json("image index", &document)?;
    }
    Err(Error::corrupt("image index", "indexes refer to each other"))
}

/// Puts an image together, if it is one that was asked for.
fn image(layers: Vec<ImageLayer>, config: Option<&[u8]>, choice: &Choice) -> Result<Image> {
    let config = config.map(ImageConfig::from_document).transpose()?.flatten();
    if let Some(config) = &config {
        config.platform().check(choice.platform.as_ref())?;
    }
    Ok(Image { layers: bounded(layers)?, config })
}

fn bounded(layers: Vec<ImageLayer>) -> Result<Vec<ImageLayer>> {
    match layers.len() {
        0 => Err(Error::invalid("the image has no layers")),
        count if count > MAX_LAYERS => {
            Err(Error::invalid(format!("the image has {count} layers, more than {MAX_LAYERS}")))
        }
        _ => Ok(layers),
    }
}

fn oci_layer(layer: Descriptor) -> Result<ImageLayer> {
    if !layer.media_type.contains("tar") {
        return Err(Error::Unsupported { what: "image layer", detail: format!("of type {:?}", layer.media_type) });
    }
    Ok(ImageLayer { file: blob(&layer.digest)?, digest: Some(layer.digest), diff_id: None })
}

fn choose<'a>(manifests: &'a [Descriptor], choice: &Choice) -> Result<&'a Descriptor> {
    let reference = |manifest: &Descriptor| {
        let keys = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];
        keys.iter().filter_map(|key| manifest.annotations.get(*key)).cloned().collect::<Vec<_>>()
    };
    let wanted_platform = choice.platform.clone().unwrap_or_else(Platform::host);
    let fits_platform =
        |manifest: &&Descriptor| manifest.platform.as_ref().is_none_or(|platform| platform.fits(&wanted_platform));
    let is_named = |manifest: &&Descriptor| {
        let names = reference(manifest);
        choice.reference.as_ref().is_none_or(|wanted| names.is_empty() || names.contains(wanted))
    };
    let found: Vec<&Descriptor> = manifests.iter().filter(is_named).filter(fits_platform).collect();
    match found[..] {
        [one] => Ok(one),
        _ => {
            let described: Vec<String> = manifests
                .iter()
                .map(|manifest| {
                    let platform = manifest.platform.as_ref().map_or_else(|| "any".to_owned(), ToString::to_string);
                    format!("{} ({platform})", reference(manifest).join(", "))
                })
                .collect();
            let what = if found.is_empty() { "no image fits" } else { "several images fit" };
            let text = format!(
                "{what} {} for {wanted_platform}; choose a reference and a platform among: {}",
                choice.reference.as_deref().unwrap_or("(any name)"),
                described.join("; ")
            );
            Err(if found.is_empty() { Error::NoneFits(text) } else { Error::invalid(text) })
        }
    }
}

/// The image of a `docker save` archive.
pub(super) fn docker_image(bundle: &Bundle, choice: &Choice) -> Result<Image> {
    let mut images: Vec<DockerImage> = json("manifest.json", &bundle.document("manifest.json")?)?;
    if let Some(wanted) = &choice.reference {
        images.retain(|image| image.repo_tags.iter().flatten().any(|tag| tag == wanted));
    }
    let chosen = match images.len() {
        1 => images.remove(0),
        0 => return Err(Error::NotFound { what: "image", name: choice.reference.clone().unwrap_or_default() }),
        _ => {
            let tags: Vec<String> = images.into_iter().flat_map(|image| image.repo_tags.unwrap_or_default()).collect();
            return Err(Error::invalid(format!("the archive has several images; choose one of: {}", tags.join(", "))));
        }
    };
    let document = bundle.document(&chosen.config)?;
    let config: DockerConfig = json("image configuration", &document)?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != chosen.layers.len() {
        return Err(Error::corrupt("image configuration", "it has another number of layers than the image"));
    }
    let layers = chosen.layers.into_iter().zip(diff_ids);
    let layers = layers.map(|(file, diff_id)| ImageLayer { file, digest: None, diff_id: Some(diff_id) }).collect();
    image(layers, Some(&document), choice)
}

/// The file of the blob with `digest`.
fn blob(digest: &str) -> Result<String> {
    let (algorithm, hex) = digest.split_once(':').unwrap_or_default();
    let is_hex = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match (algorithm, hex.len()) {
        ("sha256", 64) | ("sha512", 128) if is_hex => Ok(format!("blobs/{algorithm}/{hex}")),
        _ => Err(Error::invalid(format!("{digest:?} is not a digest (sha256 or sha512)"))),
    }
}

fn verified_document(bundle: &Bundle, digest: &str) -> Result<Vec<u8>> {
    let document = bundle.document(&blob(digest)?)?;
    let mut hash = Hash::new(digest)?;
    hash.update(&document);
    hash.check()?;
    Ok(document)
}

/// Feeds `layer`.
pub(super) fn read_layer(bundle: &Bundle, layer: &ImageLayer, feed: &mut Feed<'_>) -> Result<()> {
    let hashed = |input: Input, digest: &Option<String>| -> Result<Input> {
        match digest {
            Some(digest) => Ok(Box::new(Hashed { input, hash: Some(Hash::new(digest)?) })),
            None => Ok(input),
        }
    };
    let (start, input) = peek(hashed(bundle.open(&layer.file)?, &layer.digest)?)?;
    let input = match Compression::of(&start)? {
        Some(compression) => compression.decode(input)?,
        None => Box::new(io::BufReader::with_capacity(256 * 1024, input)),
    };
    let input = hashed(input, &layer.diff_id)?;
    tar::read(input, TarOptions { whiteouts: true, may_end_early: true }, feed)
}

/// A digest that is being computed, and what it should be.
struct Hash {
    expected: String,
    state: State,
}

enum State {
    Sha256(sha2::Sha256),
    Sha512(Box<sha2::Sha512>),
}

impl Hash {
    fn new(expected: &str) -> Result<Hash> {
        blob(expected)?;
        let state = if expected.starts_with("sha256:") {
            State::Sha256(sha2::Sha256::new())
        } else {
            State::Sha512(Box::new(sha2::Sha512::new()))
        };
        Ok(Hash { expected: expected.to_owned(), state })
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.state {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    fn check(self) -> Result<()> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let found = match self.state {
            State::Sha256(state) => format!("sha256:{}", hex(&state.finalize())),
            State::Sha512(state) => format!("sha512:{}", hex(&state.finalize())),
        };
        if found == self.expected {
            return Ok(());
        }
        Err(Error::corrupt("image", format!("a file has digest {found} instead of {}", self.expected)))
    }
}

/// Compares a stream's digest when it ends.
struct Hashed {
    input: Input,
    hash: Option<Hash>,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if count > 0 {
            if let Some(hash) = &mut self.hash {
                hash.update(&buffer[..count]);
            }
        } else if !buffer.is_empty()
            && let Some(hash) = self.hash.take()
        {
            hash.check().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        }
        Ok(count)
    }
}
