//! Brings folders, archives, images and disks into the store as sealed layers.
//!
//! ```text
//! detect → folder | tar | image (layers) | disk → feed (chunks) → builder (records) → layer → name
//! ```
//!
//! Hides formats and numbering. Invariants: a name is set only after everything that it needs is durable; an import
//! that fails or is cancelled leaves the names as they were, and garbage at most; archives never touch the
//! host's files.

mod acl;
mod ahead;
pub mod builder;
mod bundle;
mod decode;
mod detect;
mod disk;
pub mod entry;
mod feed;
mod folder;
mod image;
mod links;
mod output;
pub mod path;
mod plan;
pub mod sorter;
mod tar;
mod xattrs;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

pub use detect::Format;
pub use disk::DISK_NAME;

use crate::chunk::ChunkRead;
use crate::chunker::Chunker;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::id::{LayerId, LayerName};
use crate::import::builder::{Base, Parent};
use crate::import::detect::Opened;
use crate::import::feed::{Cutting, Feed, Taken};
use crate::import::image::{Choice, Image};
use crate::import::path::TreePath;
use crate::manifest::{LayerKind, Manifest};
use crate::monitor::{Monitor, check};
use crate::store::{Expect, Session, Store};
use crate::view::View;

/// Where an import comes from.
pub enum SourceSpec {
    /// A folder, a file or a block device.
    Path(PathBuf),
    /// A stream: a tar archive, an image's archive or a raw disk, compressed or not.
    Stream(Box<dyn Read + Send>),
}

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// The name of the layer; of the top one if the source has several.
    pub name: LayerName,
    /// What the name must be before.
    pub expect: Expect,
    /// What the layer is for. Of an image's layers the lowest without a parent is a base if this is not said.
    pub kind: Option<LayerKind>,
    /// The layer to import onto.
    pub parent: Option<LayerId>,
    /// A known predecessor: the same paths get the same inode numbers.
    pub like: Option<LayerId>,
    /// Whether the source is the whole tree: what it lacks of the parent is removed.
    pub whole: bool,
    /// What the source is; detected if not said.
    pub format: Option<Format>,
    /// Whether `.wh.` names in a plain tar archive are whiteouts. In images' layers they always are.
    pub whiteouts: bool,
    /// Whether a folder's import stays on the folder's filesystem.
    pub one_filesystem: bool,
    /// What cuts files; that which fits the format if not said.
    pub chunker: Option<Chunker>,
    /// Files that are cut where this says, by their paths: ascending offsets. For content whose best places to cut it
    /// doesn't show itself, such as memory, which is cut by its addresses.
    pub cuts: BTreeMap<String, Vec<u64>>,
    /// Which image of an archive with several: its tag.
    pub reference: Option<String>,
    /// For which platform the image shall be ("linux/arm64"); this machine's if not said. One for another is refused.
    pub platform: Option<String>,
}

impl ImportOptions {
    /// Imports as `name`, which must not exist.
    pub fn new(name: LayerName) -> ImportOptions {
        ImportOptions {
            name,
            expect: Expect::Absent,
            kind: None,
            parent: None,
            like: None,
            whole: false,
            format: None,
            whiteouts: false,
            one_filesystem: false,
            chunker: None,
            cuts: BTreeMap::new(),
            reference: None,
            platform: None,
        }
    }
}

/// A layer that an import made, or found to be there already.
#[derive(Clone, Debug, Serialize)]
pub struct ImportedLayer {
    /// Its id.
    pub id: LayerId,
    /// Its name; only the top layer of an image has one.
    pub name: Option<LayerName>,
    /// What it is for.
    pub kind: LayerKind,
    /// Entries that the source had for it.
    pub entries: u64,
    /// Inode records in it.
    pub inode_count: u64,
    /// Dentry records in it, whiteouts included.
    pub dentry_count: u64,
    /// The sizes of the regular files among its inodes, added up, in bytes.
    pub file_bytes: u64,
}

/// What an import did.
#[derive(Clone, Debug, Serialize)]
pub struct ImportReport {
    /// What the source was.
    pub format: Format,
    /// The layers, the lowest first.
    pub layers: Vec<ImportedLayer>,
    /// Entries of the source.
    pub entries: u64,
    /// Bytes of files' contents that were read; holes aren't.
    pub read_bytes: u64,
    /// Chunks that were new.
    pub new_chunks: u64,
    /// Their plain bytes.
    pub new_plain_bytes: u64,
    /// What they take in the store.
    pub new_stored_bytes: u64,
    /// Plain bytes of chunks that were there already.
    pub known_plain_bytes: u64,
    /// Warnings given on the way.
    pub warnings: u64,
}

/// Imports `source` into `store`. When this returns, the name is durable and complete.
///
/// # Errors
/// [`Error::Exists`] if the name is taken, [`Error::Invalid`] and [`Error::Corrupt`] for bad sources,
/// [`Error::Unsupported`], [`Error::Cancelled`], and those of disks. The names stay as they were.
pub fn import(
    store: &Arc<Store>,
    source: SourceSpec,
    options: &ImportOptions,
    monitor: &dyn Monitor,
) -> Result<ImportReport> {
    check_name(store, options)?;
    check(monitor)?;
    // Pinned, so that nobody collects them meanwhile.
    let _parent = options.parent.map(|parent| store.pin(parent)).transpose()?;
    if let Some(parent) = options.parent {
        Manifest::load(store.as_ref(), parent)?.check_bears_another()?;
    }
    let _like = options.like.map(|like| store.pin(like)).transpose()?;
    monitor.phase("reading", None);
    let opened = match source {
        SourceSpec::Path(path) => detect::open_path(&path, options.format, &store.tmp_folder())?,
        SourceSpec::Stream(input) => detect::open_stream(input, options.format, &store.tmp_folder())?,
    };
    if let Some(total) = ahead::bytes(&opened, store.folder(), options.one_filesystem) {
        monitor.phase("reading", Some(total));
    }
    let format = opened.format();
    let is_image = matches!(format, Format::Oci | Format::Docker);
    if let Some(option) = [("platform", &options.platform), ("reference", &options.reference)]
        .into_iter()
        .find_map(|(option, given)| given.as_ref().filter(|_| !is_image).map(|_| option))
    {
        return Err(Error::invalid(format!("the source is no image (it is read as {format}), so it has no {option}")));
    }
    let session = Arc::new(store.session("import"));
    let mut import = Import { session, options, monitor, layers: Vec::new(), taken: Taken::default() };
    import.run(opened)?;
    check(monitor)?;
    let Import { session, mut layers, taken, .. } = import;
    let top = layers.last_mut().ok_or_else(|| Error::invalid("the source has no layers"))?;
    top.name = Some(options.name.clone());
    let id = top.id;
    session.commit()?;
    store.set_name(&options.name, id, options.expect)?;
    let chunks = session.report();
    Ok(ImportReport {
        format,
        layers,
        entries: taken.entries,
        read_bytes: taken.bytes,
        new_chunks: chunks.new_chunks,
        new_plain_bytes: chunks.new_plain_bytes,
        new_stored_bytes: chunks.new_stored_bytes,
        known_plain_bytes: chunks.known_plain_bytes,
        warnings: taken.warnings,
    })
}

/// Fails at once if the name could not be set in the end.
fn check_name(store: &Store, options: &ImportOptions) -> Result<()> {
    let found = store.name(&options.name)?.map(|record| record.layer);
    match (options.expect, found) {
        (Expect::Absent, Some(_)) => Err(Error::Exists { what: "layer", name: options.name.to_string() }),
        (Expect::Is(wanted), found) if found != Some(wanted) => {
            Err(Error::Busy(format!("name {} has changed meanwhile", options.name)))
        }
        _ => Ok(()),
    }
}

/// What a new layer lies on, and what it is.
struct Lying {
    parent: Option<LayerId>,
    kind: LayerKind,
    whole: bool,
    image: Option<Content>,
}

/// An import that is under way.
struct Import<'a> {
    session: Arc<Session>,
    options: &'a ImportOptions,
    monitor: &'a dyn Monitor,
    layers: Vec<ImportedLayer>,
    taken: Taken,
}

impl Import<'_> {
    fn run(&mut self, opened: Opened) -> Result<()> {
        let options = self.options;
        match opened {
            Opened::Folder(path) => {
                let store = self.session.store().folder().to_owned();
                self.single(Chunker::Tree, |feed| folder::read(&path, &store, options.one_filesystem, feed))
            }
            Opened::Tar(input) => {
                let tar = tar::TarOptions { whiteouts: options.whiteouts, may_end_early: false };
                self.single(Chunker::Tree, |feed| tar::read(input, tar, feed))
            }
            Opened::RawFile(path) => self.single(Chunker::Aligned, |feed| disk::read_raw(&path, feed)),
            Opened::RawStream(input) => self.single(Chunker::Aligned, |feed| disk::read_stream(input, feed)),
            Opened::Qcow2(path) => self.single(Chunker::Aligned, |feed| disk::read_qcow2(&path, feed)),
            Opened::Oci(bundle) => {
                let image = image::oci_image(&bundle, &self.choice()?)?;
                self.image(&bundle, &image)
            }
            Opened::Docker(bundle) => {
                let image = image::docker_image(&bundle, &self.choice()?)?;
                self.image(&bundle, &image)
            }
        }
    }

    fn choice(&self) -> Result<Choice> {
        let platform = self.options.platform.as_deref().map(str::parse).transpose()?;
        Ok(Choice { reference: self.options.reference.clone(), platform })
    }

    /// A source that is one layer.
    fn single(&mut self, chunker: Chunker, source: impl FnOnce(&mut Feed<'_>) -> Result<()>) -> Result<()> {
        let kind = self.options.kind.unwrap_or(self.usual_kind(self.options.parent));
        self.layer(
            Lying { parent: self.options.parent, kind, whole: self.options.whole, image: None },
            chunker,
            source,
        )?;
        Ok(())
    }

    /// Without a word on it, what lies on nothing is a base, and what lies on something an application.
    fn usual_kind(&self, parent: Option<LayerId>) -> LayerKind {
        if parent.is_none() { LayerKind::Base } else { LayerKind::Application }
    }

    /// An image's layers, each on the one before; what the image says of itself stays with the top one.
    fn image(&mut self, bundle: &bundle::Bundle, image: &Image) -> Result<()> {
        if self.options.whole && self.options.parent.is_some() {
            return Err(Error::invalid(
                "an image's layers say themselves what they remove; import it without \"whole\"",
            ));
        }
        let mut parent = self.options.parent;
        for (position, layer) in image.layers.iter().enumerate() {
            let is_top = position + 1 == image.layers.len();
            let kind = self.options.kind.filter(|_| is_top).unwrap_or(self.usual_kind(parent));
            let config = image.config.as_ref().filter(|_| is_top);
            let image = config.map(|config| config.store(&self.session)).transpose()?;
            let lying = Lying { parent, kind, whole: false, image };
            let id = self.layer(lying, Chunker::Tree, |feed| image::read_layer(bundle, layer, feed))?;
            parent = Some(id);
        }
        Ok(())
    }

    fn layer(
        &mut self,
        Lying { parent, kind, whole, image }: Lying,
        chunker: Chunker,
        source: impl FnOnce(&mut Feed<'_>) -> Result<()>,
    ) -> Result<LayerId> {
        let tables = self.session.store().tables_folder();
        // Through the session, which has the image's lower layers before the store does.
        let chunks: Arc<dyn ChunkRead> = self.session.clone();
        let open = |id| View::from_chunks(chunks.clone(), &tables, id);
        let (parent, like) = (parent.map(open).transpose()?, self.options.like.map(open).transpose()?);
        let below = match &parent {
            None => None,
            Some(tree) => tree.top().zip(tree.manifest()).map(|(id, manifest)| Parent { id, manifest, tree }),
        };
        let base = Base { parent: below, like: like.as_ref(), whole, kind, image: image.as_ref() };
        let keyed =
            |(path, cuts): (&String, &Vec<u64>)| Ok((TreePath::parse(path.as_bytes())?.key().to_vec(), cuts.clone()));
        let cuts = self.options.cuts.iter().map(keyed).collect::<Result<_>>()?;
        let cutting = Cutting { chunker: self.options.chunker.unwrap_or(chunker), cuts: &cuts };
        let (id, manifest, taken) = feed::layer(&self.session, base, cutting, self.monitor, source)?;
        self.taken.entries += taken.entries;
        self.taken.bytes += taken.bytes;
        self.taken.warnings += taken.warnings;
        self.layers.push(imported(id, &manifest, taken.entries));
        Ok(id)
    }
}

fn imported(id: LayerId, manifest: &Manifest, entries: u64) -> ImportedLayer {
    ImportedLayer {
        id,
        name: None,
        kind: manifest.kind,
        entries,
        inode_count: manifest.inode_count,
        dentry_count: manifest.dentry_count,
        file_bytes: manifest.file_bytes,
    }
}

#[cfg(test)]
mod tests;
