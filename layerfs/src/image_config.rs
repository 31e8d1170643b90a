//! What a container image says of how it is run: environment, entry point, command, user, working folder, labels,
//! ports, and its history. FORMAT.md, "Image configurations".
//!
//! It hides which manifest of a stack holds it, and its canonical form. Invariants: it is content-addressed with the
//! layer that was the image's top, so it goes wherever that layer goes; the same configuration has the same bytes.

use serde_json::{Map, Value};

use crate::chunk::ChunkRead;
use crate::chunker::Chunker;
use crate::content::{self, Content};
use crate::error::{Error, Result};
use crate::id::LayerId;
use crate::manifest::Manifest;
use crate::platform::Platform;
use crate::store::{ReadSource, Session};

/// The longest that is kept or read, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// What of an image's configuration is kept: all that the image-spec names but `rootfs`, which lists the tar archives
/// that the layers once came in.
const KEPT: [&str; 9] =
    ["architecture", "author", "config", "created", "history", "os", "os.features", "os.version", "variant"];

/// An image's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig(Map<String, Value>);

impl ImageConfig {
    /// What of an image's configuration, as it stands in the image, is kept; none if there is nothing.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what is no JSON object, [`Error::Invalid`] for what is too long.
    pub fn from_document(document: &[u8]) -> Result<Option<ImageConfig>> {
        let corrupt = |detail: String| Error::corrupt("image configuration", detail);
        let mut map: Map<String, Value> = serde_json::from_slice(document).map_err(|e| corrupt(e.to_string()))?;
        map.retain(|key, value| KEPT.contains(&key.as_str()) && !value.is_null());
        let config = ImageConfig(map);
        let bytes = config.encode().len();
        if bytes > MAX_BYTES {
            return Err(Error::invalid(format!(
                "the image's configuration has {bytes} bytes; at most {MAX_BYTES} are kept with a layer"
            )));
        }
        Ok((!config.0.is_empty()).then_some(config))
    }

    /// The canonical bytes: keys sorted, no spaces.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        encode_object(&self.0, &mut out);
        out
    }

    /// Keeps it in `session`'s store.
    pub fn store(&self, session: &Session) -> Result<Content> {
        let mut stored = None;
        let mut ingest = session.ingest(|(), content| {
            stored = content;
            Ok(())
        });
        ingest.file((), Chunker::Tree, &mut ReadSource(&self.encode()[..]))?;
        ingest.finish()?;
        Ok(stored.unwrap_or_else(Content::empty))
    }

    /// Reads what [`ImageConfig::store`] kept.
    pub fn load(chunks: &dyn ChunkRead, content: &Content) -> Result<ImageConfig> {
        if content.len() > MAX_BYTES as u64 {
            return Err(Error::corrupt("image configuration", format!("it has {} bytes", content.len())));
        }
        let mut bytes = vec![0; content.len() as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match content::read_at(chunks, content, filled as u64, &mut bytes[filled..])? {
                0 => return Err(Error::corrupt("image configuration", "it ends early")),
                count => filled += count,
            }
        }
        let map = serde_json::from_slice(&bytes).map_err(|e| Error::corrupt("image configuration", e.to_string()))?;
        Ok(ImageConfig(map))
    }

    /// That of the stack with top `layer`, and the layer that has it: the highest one does.
    pub fn of_stack(chunks: &dyn ChunkRead, layer: LayerId) -> Result<Option<(LayerId, ImageConfig)>> {
        let mut next = Some(layer);
        while let Some(layer) = next {
            let manifest = Manifest::load(chunks, layer)?;
            if let Some(image) = &manifest.image {
                return Ok(Some((layer, ImageConfig::load(chunks, image)?)));
            }
            next = manifest.parent;
        }
        Ok(None)
    }

    /// Its properties, by the image-spec's names.
    pub fn properties(&self) -> &Map<String, Value> {
        &self.0
    }

    /// What it runs on, as far as it says.
    pub fn platform(&self) -> Platform {
        let text = |key: &str| self.0.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let variant = Some(text("variant")).filter(|variant| !variant.is_empty());
        Platform { os: text("os"), architecture: text("architecture"), variant }
    }
}

fn encode_object(map: &Map<String, Value>, out: &mut Vec<u8>) {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    out.push(b'{');
    for (number, (key, value)) in entries.into_iter().enumerate() {
        if number > 0 {
            out.push(b',');
        }
        out.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
        out.push(b':');
        encode_value(value, out);
    }
    out.push(b'}');
}

fn encode_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => encode_object(map, out),
        Value::Array(values) => {
            out.push(b'[');
            for (number, value) in values.iter().enumerate() {
                if number > 0 {
                    out.push(b',');
                }
                encode_value(value, out);
            }
            out.push(b']');
        }
        scalar => out.extend_from_slice(scalar.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_configuration_has_the_same_bytes() {
        let one =
            br#"{ "os": "linux", "config": {"Env": ["B=2", "A=1"], "Cmd": null}, "rootfs": {"diff_ids": ["x"]} }"#;
        let other = br#"{"id":"7","config":{"Cmd":null,"Env":["B=2","A=1"]},"container":"9","os":"linux"}"#;
        let (one, other) = (ImageConfig::from_document(one).unwrap(), ImageConfig::from_document(other).unwrap());
        assert_eq!(one, other);
        let golden = br#"{"config":{"Cmd":null,"Env":["B=2","A=1"]},"os":"linux"}"#;
        assert_eq!(one.unwrap().encode(), golden);
        assert_eq!(ImageConfig::from_document(b"{\"rootfs\":{}}").unwrap(), None);
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        assert!(ImageConfig::from_document(b"[]").is_err() && ImageConfig::from_document(b"{").is_err());
        let long = format!("{{\"author\":\"{}\"}}", "x".repeat(MAX_BYTES));
        assert!(ImageConfig::from_document(long.as_bytes()).is_err());
        let claimed = Content::Extents {
            bytes: 1 << 40,
            data_bytes: 1 << 40,
            chunker: Chunker::Tree,
            list: content::List::Tree { root: crate::id::ChunkId([1; 32]), depth: 3 },
        };
        assert!(ImageConfig::load(&crate::chunk::MemoryChunks::default(), &claimed).is_err());
    }
}
