//! Looking into layers: inspect, diff.

use layerfs::attr::FileKind;
use layerfs::content::{Content, Extent, Extents};
use layerfs::diff::{Change, Differences, What};
use layerfs::image_config::ImageConfig;
use layerfs::inode::{Inode, Node};
use layerfs::store::Store;
use layerfs::view::View;
use layerfs::{Ino, LayerId};

use super::layers::{Catalog, resolve};
use crate::api::layers::{
    ChangeItem, ChunkItem, DiffRequest, DiffSummary, EntryInfo, FolderItem, ImageInfo, InspectRequest, InspectResult,
    TraceInfo, TraceList, TracesRemoveRequest,
};
use crate::api::{Empty, PathText};
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};

/// `/v1/inspect`.
pub fn inspect(context: &Context, request: InspectRequest) -> Result<InspectResult> {
    let store = &context.daemon.store;
    let layer = resolve(store, &request.layer)?;
    context.label(format!("inspect {}", request.layer));
    let catalog = Catalog::read(store)?;
    let (mut info, manifest) = catalog.info(layer)?;
    info.partial = catalog.partial(layer, &context.daemon.peering.sources())?;
    let trace = store.traces()?.into_iter().find(|trace| trace.layer == layer);
    let trace = trace.map(|trace| trace_info(store, info.names.clone(), &trace)).transpose()?;
    let mut result = InspectResult {
        layer: info,
        next_ino: manifest.next_ino.0,
        table_bytes: manifest.inodes.len() + manifest.dentries.len(),
        entry: None,
        image: None,
        trace,
    };
    let image = ImageConfig::of_stack(&**store, layer)?;
    result.image = image.filter(|_| request.path.is_none()).map(|(layer, config)| ImageInfo {
        layer: layer.to_string(),
        configuration: config.properties().clone().into(),
    });
    let Some(path) = &request.path else {
        if request.chunks {
            send_chunks(context, "inodes", &manifest.inodes)?;
            send_chunks(context, "dentries", &manifest.dentries)?;
            manifest.image.iter().try_for_each(|image| send_chunks(context, "image", image))?;
        }
        return Ok(result);
    };
    let view = View::open(store, layer)?;
    let (ino, _) = view.resolve(&path.0, false)?;
    let inode = view.expect_inode(ino)?;
    match &inode.node {
        Node::File(content) if request.chunks => send_chunks(context, "data", content)?,
        Node::Folder => send_folder(context, &view, ino)?,
        _ => {}
    }
    result.entry = Some(entry(path.clone(), &inode));
    Ok(result)
}

fn trace_info(store: &Store, names: Vec<String>, trace: &layerfs::store::trace::TraceInfo) -> Result<TraceInfo> {
    let here = store.info_many(&store.trace(trace.layer).unwrap_or_default())?;
    Ok(TraceInfo {
        layer: trace.layer.to_string(),
        names,
        chunks: trace.chunks,
        stored_bytes: here.iter().flatten().map(|info| u64::from(info.stored_bytes)).sum(),
        recorded: trace.recorded.into(),
    })
}

/// `/v1/traces`.
pub fn traces(context: &Context, _: Empty) -> Result<TraceList> {
    let catalog = Catalog::read(&context.daemon.store)?;
    context.daemon.mounts.save_traces();
    let store = &context.daemon.store;
    let traces = store.traces()?;
    let infos = traces.iter().map(|trace| trace_info(store, catalog.names_of(trace.layer), trace));
    Ok(TraceList { traces: infos.collect::<Result<_>>()? })
}

/// `/v1/traces-remove`.
pub fn traces_remove(context: &Context, request: TracesRemoveRequest) -> Result<TraceList> {
    let all = traces(context, Empty {})?.traces;
    let mut chosen: Vec<TraceInfo> = Vec::new();
    for text in &request.layers {
        // A trace may outlive its layer, so that only its id is left.
        let is_meant = |trace: &&TraceInfo| {
            trace.names.contains(text) || (text.len() >= 8 && trace.layer.starts_with(text.as_str()))
        };
        let found: Vec<&TraceInfo> = all.iter().filter(is_meant).collect();
        if found.is_empty() {
            let failure = Failure::new(Class::NotFound, format!("there is no trace of {text:?}"));
            return Err(failure.hint("`layerctl trace list` shows those that there are"));
        }
        chosen.extend(found.into_iter().cloned());
    }
    let chosen = if request.all { all } else { chosen };
    let layers = chosen.iter().map(|trace| Ok(trace.layer.parse()?)).collect::<Result<Vec<LayerId>>>()?;
    context.daemon.store.remove_traces(&layers)?;
    Ok(TraceList { traces: chosen })
}

fn entry(path: PathText, inode: &Inode) -> EntryInfo {
    let (data_bytes, chunker) = match &inode.node {
        Node::File(content @ Content::Extents { chunker, .. }) => {
            (content.data_bytes(), Some(format!("{chunker:?}").to_lowercase()))
        }
        Node::File(content) => (content.len(), None),
        _ => (0, None),
    };
    let is_device = matches!(inode.kind(), FileKind::BlockDevice | FileKind::CharDevice);
    let rdev = inode.rdev();
    EntryInfo {
        path,
        ino: inode.ino.0,
        kind: kind_text(inode.kind()),
        mode: inode.mode(),
        uid: inode.attrs.uid,
        gid: inode.attrs.gid,
        nlink: inode.nlink,
        size: inode.size(),
        data_bytes,
        modified: inode.attrs.mtime.into(),
        chunker,
        target: match &inode.node {
            Node::Symlink(target) => Some(PathText(target.clone())),
            _ => None,
        },
        device: is_device.then(|| (libc::major(rdev), libc::minor(rdev))),
        xattrs: inode.xattrs.iter().map(|(name, _)| crate::api::escape(name)).collect(),
    }
}

/// A kind as the API writes it.
pub fn kind_text(kind: FileKind) -> String {
    serde_text(&kind)
}

/// What serializes as a string, as that string.
pub fn serde_text<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn send_folder(context: &Context, view: &View, folder: Ino) -> Result<()> {
    for entry in view.read_folder(folder, None)? {
        let entry = entry?;
        context.reporter.check()?;
        let size = view.expect_inode(entry.ino)?.size();
        let (name, kind) = (PathText(entry.name.to_vec()), kind_text(entry.kind));
        context.reporter.item(&FolderItem { name, ino: entry.ino.0, kind, size })?;
    }
    Ok(())
}

fn send_chunks(context: &Context, part: &str, content: &Content) -> Result<()> {
    let store = &context.daemon.store;
    for extent in Extents::new(&**store, content, 0)? {
        let (offset, extent) = extent?;
        let id = match extent {
            Extent::Chunk { id, .. } => Some(id),
            Extent::Hole { .. } => None,
        };
        let stored_bytes = match &id {
            Some(id) => store.info(id)?.map(|info| u64::from(info.stored_bytes)),
            None => None,
        };
        let id = id.map(|id| id.to_string());
        context.reporter.item(&ChunkItem { part: part.to_owned(), offset, bytes: extent.len(), id, stored_bytes })?;
    }
    Ok(())
}

/// `/v1/diff`.
pub fn diff(context: &Context, request: DiffRequest) -> Result<DiffSummary> {
    context.label(format!("diff {} {}", request.old, request.new));
    let store = &context.daemon.store;
    let (old, new) = (resolve(store, &request.old)?, resolve(store, &request.new)?);
    let (old, new) = (View::open(store, old)?, View::open(store, new)?);
    let mut summary = DiffSummary::default();
    for change in layerfs::diff::diff(&old, &new) {
        let item = change_item(&change?);
        context.reporter.check()?;
        count(&mut summary, &item);
        if !request.summary {
            context.reporter.item(&item)?;
        }
    }
    Ok(summary)
}

fn change_item(change: &Change) -> ChangeItem {
    let (kind, differs) = match &change.what {
        What::Added => ("added", Vec::new()),
        What::Removed => ("removed", Vec::new()),
        What::Modified(differences) => (how(differences), names(differences)),
    };
    let mut path = b"/".to_vec();
    path.extend_from_slice(&change.path);
    ChangeItem {
        change: kind.to_owned(),
        differs,
        path: PathText(path),
        old_bytes: change.old_bytes(),
        new_bytes: change.new_bytes(),
    }
}

fn how(differences: &Differences) -> &'static str {
    match differences {
        Differences { kind: true, .. } => "type",
        Differences { content: true, .. } => "modified",
        _ => "attributes",
    }
}

fn names(differences: &Differences) -> Vec<String> {
    let Differences { kind, content, mode, owner, mtime, xattrs, links } = *differences;
    let all = [
        (kind, "kind"),
        (content, "content"),
        (mode, "mode"),
        (owner, "owner"),
        (mtime, "mtime"),
        (xattrs, "xattrs"),
        (links, "links"),
    ];
    all.into_iter().filter(|(differs, _)| *differs).map(|(_, name)| name.to_owned()).collect()
}

fn count(summary: &mut DiffSummary, item: &ChangeItem) {
    match item.change.as_str() {
        "added" => summary.added += 1,
        "removed" => summary.removed += 1,
        "attributes" => return summary.attributes += 1,
        _ => summary.modified += 1,
    }
    summary.old_bytes = summary.old_bytes.saturating_add(item.old_bytes);
    summary.new_bytes = summary.new_bytes.saturating_add(item.new_bytes);
}
