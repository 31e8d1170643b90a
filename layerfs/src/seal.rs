//! Sealing: an upper becomes a layer, and the mount goes on over it.
//!
//! Hides what of an upper goes into the layer. Changes wait while a seal runs; look-ups and reads go on. Order:
//! data → list nodes → tables → manifest, all durable; then one atomic write sets the name, puts the upper on the
//! new layer and drops its rows; then memory follows, and the data files go. A crash before that write leaves the
//! upper as it was, and chunks as garbage; after it, data files that the next opening removes.
//!
//! What is in the layer: inodes that differ from those below in anything but their ctime, and the upper's names.
//! Files without a name stay in the upper.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::content::Content;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::id::{Ino, LayerId, LayerName};
use crate::inode::{Dentry, Inode, Node};
use crate::manifest::{LayerKind, LayerWriter, Manifest};
use crate::monitor::{Monitor, check};
use crate::mount::errno::Errno;
use crate::mount::fs::{ChangedFile, Frozen, FrozenState, Fs};
use crate::store::db::Batch;
use crate::store::{Expect, FileSource, NameChange, Session, SessionReport, Store};
use crate::upper::table::{Change, UpperInode};
use crate::view::View;

/// A file that was copied up by range is cut again whole if it is smaller than this now.
const SPLICED_FROM: u64 = 64 << 10;

/// What to seal as what.
#[derive(Clone, Debug)]
pub struct SealOptions {
    /// The new layer's name.
    pub name: LayerName,
    /// What the name must be before.
    pub expect: Expect,
    /// What the layer is for.
    pub kind: LayerKind,
}

/// What a seal did.
#[derive(Clone, Debug, Serialize)]
pub struct SealReport {
    /// The layer that the name refers to now.
    pub layer: LayerId,
    /// False if the upper held nothing that differs from below: then the name refers to the layer below.
    pub is_new: bool,
    /// Inode records in the layer.
    pub inodes: u64,
    /// Dentry records in the layer.
    pub dentries: u64,
    /// Bytes of files that were read from the upper.
    pub read_bytes: u64,
    /// What went into the store.
    pub stored: SessionReport,
    /// How long changes had to wait.
    pub held: Duration,
    /// Inodes whose attributes the kernel should ask for again.
    #[serde(skip)]
    pub changed_inodes: Vec<Ino>,
    /// Folders whose listings the kernel should ask for again.
    #[serde(skip)]
    pub changed_folders: Vec<Ino>,
}

/// Seals the upper of `fs`.
///
/// # Errors
/// [`Error::Denied`] if there is no upper; [`Error::Exists`] or [`Error::Busy`] if the name isn't as expected. Nothing
/// has changed then.
pub fn seal(store: &Arc<Store>, fs: &Fs, options: &SealOptions, monitor: &dyn Monitor) -> Result<SealReport> {
    check_name(store, options)?;
    let read_only = |_| Error::Denied("the mount is read-only: there is no upper to seal".to_owned());
    let frozen = fs.freeze().map_err(read_only)?;
    let started = Instant::now();
    failpoint::hit("seal.frozen");
    let session = store.session("seal");
    let sealed = write_layer(&session, &frozen, options, monitor)?;
    failpoint::hit("seal.chunked");
    session.commit()?;
    let (layer, is_new) = match (&sealed.layer, frozen.state().view().top()) {
        (Some((layer, _)), _) => (*layer, true),
        (None, Some(base)) => (base, false),
        (None, None) => return Err(Error::invalid("there is nothing to seal")),
    };
    let view = View::open(store, layer)?;
    let _pin = store.pin(layer)?;
    monitor.phase("switching", None);
    failpoint::hit("seal.before-switch");
    let mut batch = Batch::new();
    let record = frozen.upper().rebase_rows(layer, &sealed.dropped, &mut batch)?;
    let change = NameChange { name: options.name.clone(), layer, expect: options.expect };
    store.set_names_with(&[change], batch)?;
    failpoint::hit("seal.after-switch");
    frozen.upper().rebased(record);
    let changed_folders = frozen.switch(view, sealed.dropped);
    let manifest = sealed.layer.map(|(_, manifest)| manifest);
    Ok(SealReport {
        layer,
        is_new,
        inodes: manifest.as_ref().map_or(0, |manifest| manifest.inode_count),
        dentries: manifest.as_ref().map_or(0, |manifest| manifest.dentry_count),
        read_bytes: sealed.read_bytes,
        stored: session.report(),
        held: started.elapsed(),
        changed_inodes: sealed.inodes,
        changed_folders,
    })
}

/// Fails early if the name can't be set; the switch checks it again.
fn check_name(store: &Store, options: &SealOptions) -> Result<()> {
    let now = store.name(&options.name)?.map(|record| record.layer);
    match (options.expect, now) {
        (Expect::Absent, Some(_)) => Err(Error::Exists { what: "layer", name: options.name.to_string() }),
        _ => Ok(()),
    }
}

struct Sealed {
    /// None if nothing differs from what is below.
    layer: Option<(LayerId, Manifest)>,
    /// What the upper loses.
    dropped: Change,
    inodes: Vec<Ino>,
    read_bytes: u64,
}

fn write_layer(session: &Session, frozen: &Frozen<'_>, options: &SealOptions, monitor: &dyn Monitor) -> Result<Sealed> {
    let state = frozen.state();
    let mut dropped = Change::new();
    let mut writer = LayerWriter::new(session);
    let dentries = write_dentries(&state, &mut writer, &mut dropped)?;
    let mut inodes: Vec<&UpperInode> = state.tables().inodes().filter(|inode| inode.inode.nlink > 0).collect();
    inodes.sort_unstable_by_key(|inode| inode.inode.ino);
    let inos: Vec<Ino> = inodes.iter().map(|inode| inode.inode.ino).collect();
    inos.iter().for_each(|ino| dropped.forget_unchecked(*ino));
    let changed = |inode: &&UpperInode| changed_bytes(frozen, inode);
    let read_bytes = inodes.iter().map(changed).sum::<Result<u64>>()?;
    monitor.phase("sealing", Some(read_bytes));
    let written = write_inodes(session, frozen, &state, &inodes, &mut writer, monitor)?;
    if written + dentries == 0 && state.view().top().is_some() {
        return Ok(Sealed { layer: None, dropped, inodes: inos, read_bytes });
    }
    let parent = state.view().top().zip(state.view().manifest());
    let layer = writer.finish(options.kind, parent, frozen.upper().next_ino())?;
    Ok(Sealed { layer: Some(layer), dropped, inodes: inos, read_bytes })
}

fn write_dentries(state: &FrozenState<'_>, writer: &mut LayerWriter<'_>, dropped: &mut Change) -> Result<u64> {
    let mut folders: Vec<_> = state.tables().folders().collect();
    folders.sort_unstable_by_key(|(folder, _)| *folder);
    let mut count = 0;
    for (folder, names) in folders {
        for (name, slot) in names.iter() {
            writer.dentry(&Dentry { folder, name: name.to_vec(), target: slot.target })?;
            dropped.dentry(folder, name, None);
            count += 1;
        }
    }
    Ok(count)
}

/// Writes the records of those of `inodes` that differ from what is below, and returns how many.
fn write_inodes(
    session: &Session,
    frozen: &Frozen<'_>,
    state: &FrozenState<'_>,
    inodes: &[&UpperInode],
    writer: &mut LayerWriter<'_>,
    monitor: &dyn Monitor,
) -> Result<u64> {
    let mut written = 0;
    let mut ingest = session.ingest(|inode: &UpperInode, content: Option<Content>| {
        let mut record = inode.inode.clone();
        if let Some(content) = content {
            record.node = Node::File(content);
        }
        if !is_same_as_below(state, &record)? {
            writer.inode(&record)?;
            written += 1;
        }
        monitor.advance(changed_bytes(frozen, inode)?);
        monitor.items(1);
        Ok(())
    });
    for inode in inodes {
        check(monitor)?;
        match inode.backed {
            None => ingest.pass(*inode)?,
            Some(backed) if backed.base_bytes > 0 => {
                if let Some(mut file) = changed_file(frozen, inode)? {
                    if backed.bytes < SPLICED_FROM {
                        ingest.file(*inode, backed.chunker, &mut file)?;
                    } else {
                        let before = file.before().clone();
                        ingest.changed(*inode, backed.chunker, &before, &mut file)?;
                    }
                }
            }
            Some(backed) => {
                let (file, path) = frozen.upper().data().reader(inode.inode.ino)?;
                ingest.file(*inode, backed.chunker, &mut FileSource::new(&file, &path)?)?;
            }
        }
    }
    ingest.finish()?;
    Ok(written)
}

fn changed_file(frozen: &Frozen<'_>, inode: &UpperInode) -> Result<Option<ChangedFile>> {
    let ino = inode.inode.ino;
    let failed = |errno: Errno| Error::io("reading a changed file", std::io::Error::from_raw_os_error(errno.0));
    frozen.changed_file(ino).map_err(failed)
}

/// How much of a file's data has to be read, in bytes.
fn changed_bytes(frozen: &Frozen<'_>, inode: &UpperInode) -> Result<u64> {
    match inode.backed {
        None => Ok(0),
        Some(backed) if backed.base_bytes == 0 => Ok(backed.bytes),
        Some(_) => Ok(changed_file(frozen, inode)?.map_or(0, |file| file.changed_bytes())),
    }
}

/// Whether the layers below have this inode already, but for its ctime.
fn is_same_as_below(state: &FrozenState<'_>, inode: &Inode) -> Result<bool> {
    let Some(mut below) = state.view().inode(inode.ino)? else { return Ok(false) };
    below.attrs.ctime = inode.attrs.ctime;
    Ok(below == *inode)
}

/// Whether the upper holds a name or inode at all.
pub fn is_clean(fs: &Fs) -> bool {
    fs.upper_counts() == (0, 0)
}
