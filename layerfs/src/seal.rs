//! Sealing: an upper becomes a layer, and the mount goes on over it.
//!
//! Hides what of an upper goes into the layer. First the files are read and stored while everything goes on, and it is noted
//! whose data changes meanwhile. Then changes wait (look-ups and reads go on): those files are read again, of which most
//! chunks are there by now, and the rest is written, so that the layer is the tree at that instant. Order:
//! data → list nodes → tables → manifest, all durable; then one atomic write sets the name, puts the upper on the
//! new layer and drops its rows; then memory follows, and the data files go. A crash before that write leaves the
//! upper as it was, and chunks as garbage; after it, data files that the next opening removes.
//!
//! What is in the layer: inodes that differ from those below in anything but their ctime, and the upper's names.
//! Files without a name stay in the upper.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::content::Content;
use crate::error::{Error, ErrorClass, Result};
use crate::failpoint;
use crate::id::{Ino, LayerId, LayerName};
use crate::inode::{Dentry, Inode, Node};
use crate::manifest::{LayerKind, LayerWriter, Manifest};
use crate::monitor::{Monitor, check};
use crate::mount::fs::{ChangedFile, Frozen, FrozenState, Fs, HeldFile, Sealing};
use crate::squash::Squashed;
use crate::store::db::Batch;
use crate::store::{Expect, FileSource, Ingest, NameChange, Session, SessionReport, Store};
use crate::upper::Upper;
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
    let sealing = fs.begin_seal().map_err(read_only)?;
    let below = sealing.view();
    if let Some(manifest) = below.manifest() {
        manifest.check_bears_another()?;
    }
    let session = store.session("seal");
    let mut ahead = read_ahead(&session, &sealing, monitor)?;
    session.flush()?;
    failpoint::hit("seal.read-ahead");
    // A collection may be running: the layers below are marked while everything goes on.
    let _below = below.top().map(|base| store.pin(base)).transpose()?;
    store.db().pay();
    let started = Instant::now();
    let (frozen, changed) = sealing.freeze()?;
    changed.iter().for_each(|ino| drop(ahead.contents.remove(ino)));
    failpoint::hit("seal.frozen");
    let mut sealed = write_layer(&session, &frozen, ahead.contents, options, monitor)?;
    sealed.read_bytes += ahead.read_bytes;
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

/// Lets the upper of `fs` lie on a squashed layer instead of the chain that it was made of, and sets `names` to it, in
/// one atomic write. Changes wait for that write. Returns false, and does nothing, if the upper lies on another layer by now, or
/// a file without a name is open that only the chain keeps.
///
/// # Errors
/// [`Error::Denied`] if there is no upper; [`Error::Exists`] or [`Error::Busy`] if a name isn't as expected.
pub fn rest_on(store: &Arc<Store>, fs: &Fs, squashed: &Squashed, names: &[(LayerName, Expect)]) -> Result<bool> {
    let report = &squashed.report;
    let view = View::open(store, report.layer)?;
    // As in a seal: before changes wait.
    let _pin = store.pin(report.layer)?;
    store.db().pay();
    let read_only = |_| Error::Denied("the mount is read-only: it stays on the layers that it has".to_owned());
    let (frozen, _) = fs.begin_seal().map_err(read_only)?.freeze()?;
    if frozen.state().view().top() != Some(report.before) || frozen.has_sealed_orphans() {
        return Ok(false);
    }
    let mut batch = Batch::new();
    let record = frozen.upper().rebase_rows(report.layer, &Change::new(), &mut batch)?;
    let change =
        |(name, expect): &(LayerName, Expect)| NameChange { name: name.clone(), layer: report.layer, expect: *expect };
    failpoint::hit("squash.before-switch");
    store.set_names_with(&names.iter().map(change).collect::<Vec<_>>(), batch)?;
    failpoint::hit("squash.after-switch");
    frozen.upper().rebased(record);
    frozen.rest_on(view);
    Ok(true)
}

struct Sealed {
    /// None if nothing differs from what is below.
    layer: Option<(LayerId, Manifest)>,
    /// What the upper loses.
    dropped: Change,
    inodes: Vec<Ino>,
    read_bytes: u64,
}

/// What was read while everything went on.
struct Ahead {
    contents: HashMap<Ino, Content>,
    read_bytes: u64,
}

/// Stores the upper's files as they are, while they may change: what comes out of those that do is of no worth.
fn read_ahead(session: &Session, sealing: &Sealing<'_>, monitor: &dyn Monitor) -> Result<Ahead> {
    let mut files = sealing.files();
    files.sort_unstable_by_key(|file| file.inode.ino);
    let mut ahead = Ahead { contents: HashMap::with_capacity(files.len()), read_bytes: 0 };
    monitor.phase("reading", None);
    let mut ingest = session.ingest(|ino: Ino, content: Option<Content>| {
        ahead.contents.extend(content.map(|content| (ino, content)));
        monitor.items(1);
        Ok(())
    });
    for file in &files {
        check(monitor)?;
        if let Some(content) = sealing.sealed_content(file.inode.ino) {
            ingest.known(file.inode.ino, content)?;
            continue;
        }
        match take_in(&mut ingest, file.inode.ino, file, (sealing.upper(), None), || {
            sealing.changed_file(file.inode.ino)
        }) {
            Ok(bytes) => {
                ahead.read_bytes += bytes;
                monitor.advance(bytes);
            }
            // It was removed since.
            Err(error) if error.class() == ErrorClass::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    ingest.finish()?;
    Ok(ahead)
}

/// Takes in the file of `inode`, whose bytes the upper has, whole or what has changed. Returns how much that is.
fn take_in<T, F: FnMut(T, Option<Content>) -> Result<()>>(
    ingest: &mut Ingest<'_, T, F>,
    tag: T,
    inode: &UpperInode,
    (upper, held): (&Upper, Option<&HeldFile>),
    changed_file: impl FnOnce() -> Result<Option<ChangedFile>>,
) -> Result<u64> {
    let Some(backed) = inode.backed else { return ingest.pass(tag).map(|()| 0) };
    let changed = if backed.base_bytes > 0 { changed_file()? } else { None };
    let Some(mut file) = changed else {
        let (file, path) = upper.data().reader(inode.inode.ino)?;
        let source = FileSource::new(&file, &path)?;
        let mut source = match held {
            // Seeking would wait for the end of the hold.
            Some(held) => source.without_seeking(held.data.clone()),
            None => source,
        };
        ingest.file(tag, backed.chunker, &mut source)?;
        return Ok(backed.bytes);
    };
    let bytes = file.changed_bytes();
    if backed.bytes < SPLICED_FROM {
        ingest.file(tag, backed.chunker, &mut file)?;
    } else {
        let before = file.before().clone();
        ingest.changed(tag, backed.chunker, &before, &mut file)?;
    }
    Ok(bytes)
}

fn write_layer(
    session: &Session,
    frozen: &Frozen<'_>,
    ahead: HashMap<Ino, Content>,
    options: &SealOptions,
    monitor: &dyn Monitor,
) -> Result<Sealed> {
    let state = frozen.state();
    let mut dropped = Change::new();
    let mut writer = LayerWriter::new(session);
    let dentries = write_dentries(&state, &mut writer, &mut dropped)?;
    let mut inodes: Vec<&UpperInode> = state.tables().inodes().filter(|inode| inode.inode.nlink > 0).collect();
    inodes.sort_unstable_by_key(|inode| inode.inode.ino);
    let inos: Vec<Ino> = inodes.iter().map(|inode| inode.inode.ino).collect();
    // A data file that programs have open goes on; what was sealed is in the layer all the same.
    let idle = inos.iter().filter(|ino| !frozen.is_in_use(**ino));
    idle.for_each(|ino| dropped.forget_unchecked(*ino));
    monitor.phase("sealing", None);
    let (written, read_bytes) = write_inodes(session, frozen, &state, (&inodes, ahead), &mut writer, monitor)?;
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

/// Writes the records of those of `inodes` that differ from what is below. Returns how many, and how much was read.
fn write_inodes(
    session: &Session,
    frozen: &Frozen<'_>,
    state: &FrozenState<'_>,
    (inodes, mut ahead): (&[&UpperInode], HashMap<Ino, Content>),
    writer: &mut LayerWriter<'_>,
    monitor: &dyn Monitor,
) -> Result<(u64, u64)> {
    let mut written = 0;
    let mut read_bytes = 0;
    let mut ingest = session.ingest(|inode: &UpperInode, content: Option<Content>| {
        let mut record = inode.inode.clone();
        if let Some(content) = content {
            record.node = Node::File(content);
        }
        if !is_same_as_below(state, &record)? {
            writer.inode(&record)?;
            written += 1;
        }
        monitor.items(1);
        Ok(())
    });
    for inode in inodes {
        check(monitor)?;
        let ino = inode.inode.ino;
        match ahead.remove(&ino).filter(|_| inode.backed.is_some()) {
            Some(content) => ingest.known(*inode, content)?,
            None => {
                let place = (frozen.upper(), frozen.held(ino));
                let bytes = take_in(&mut ingest, *inode, inode, place, || frozen.changed_file(ino))?;
                read_bytes += bytes;
                monitor.advance(bytes);
            }
        }
    }
    ingest.finish()?;
    Ok((written, read_bytes))
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
