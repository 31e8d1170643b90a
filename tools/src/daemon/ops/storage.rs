//! What layers cost, and who refers to what: du, why.

use std::collections::HashSet;
use std::path::Path;

use layerfs::closure::Role;
use layerfs::refs::{self, ChunkReference};
use layerfs::usage::{self, LayerUsage, NameUsage};
use layerfs::{ChunkId, LayerId, LayerName};

use super::inspect::kind_text;
use super::layers::{Catalog, layer_name, resolve};
use crate::api::PathText;
use crate::api::storage::{DuRequest, DuResult, DuRow, LayerRef, Origin, Reference, WhyRequest, WhyResult};
use crate::daemon::http::Context;
use crate::failure::{Failure, Result};

/// References that are told unless another limit is asked for.
const DEFAULT_LIMIT: u64 = 1000;

/// `/v1/du`.
pub fn du(context: &Context, request: DuRequest) -> Result<DuResult> {
    let store = &context.daemon.store;
    for name in &request.names {
        // For its suggestions.
        resolve(store, name)?;
    }
    let asked = request.names.iter().map(|name| layer_name(name)).collect::<Result<Vec<LayerName>>>()?;
    let usage = usage::usage(store, &asked, &*context.reporter)?;
    let catalog = Catalog::read(store)?;
    let rows = if request.layers {
        let wanted = stacks(context, &usage.names, &asked)?;
        let is_wanted = |layer: &&LayerUsage| asked.is_empty() || wanted.contains(&layer.layer);
        usage.layers.iter().filter(is_wanted).map(|layer| layer_row(layer, &catalog)).collect()
    } else {
        let is_wanted = |name: &&NameUsage| asked.is_empty() || asked.contains(&name.name);
        usage.names.iter().filter(is_wanted).map(name_row).collect()
    };
    Ok(DuResult {
        rows,
        total_plain_bytes: usage.total.plain_bytes,
        total_stored_bytes: usage.total.stored_bytes,
        freed_bytes: (!asked.is_empty()).then_some(usage.freed.stored_bytes),
    })
}

/// The layers in the stacks of the names `asked`.
fn stacks(context: &Context, names: &[NameUsage], asked: &[LayerName]) -> Result<HashSet<LayerId>> {
    let mut layers = HashSet::new();
    for name in names.iter().filter(|name| asked.contains(&name.name)) {
        let stack = refs::stack(&*context.daemon.store, name.layer)?;
        layers.extend(stack.into_iter().map(|(layer, _)| layer));
    }
    Ok(layers)
}

fn name_row(usage: &NameUsage) -> DuRow {
    DuRow {
        name: Some(usage.name.to_string()),
        id: usage.layer.to_string(),
        apparent_bytes: usage.tree.apparent_bytes,
        plain_bytes: usage.total.plain_bytes,
        unique_bytes: usage.unique.plain_bytes,
        shared_bytes: usage.shared.plain_bytes,
        stored_bytes: usage.total.stored_bytes,
        freed_bytes: usage.unique.stored_bytes,
    }
}

fn layer_row(usage: &LayerUsage, catalog: &Catalog) -> DuRow {
    DuRow {
        name: catalog.name_of(usage.layer),
        id: usage.layer.to_string(),
        apparent_bytes: usage.apparent_bytes,
        plain_bytes: usage.total.plain_bytes,
        unique_bytes: usage.unique.plain_bytes,
        shared_bytes: usage.shared.plain_bytes,
        stored_bytes: usage.total.stored_bytes,
        freed_bytes: usage.unique.stored_bytes,
    }
}

/// `/v1/why`.
pub fn why(context: &Context, request: WhyRequest) -> Result<WhyResult> {
    context.label(format!("why {}", request.what));
    if let Ok(chunk) = request.what.parse::<ChunkId>() {
        return why_chunk(context, &chunk, request.limit.unwrap_or(DEFAULT_LIMIT) as usize);
    }
    let (layer, path) = if request.what.starts_with('/') {
        context.daemon.mounts.locate(Path::new(&request.what))?
    } else if let Some((name, path)) = request.what.split_once(":/") {
        (resolve(&context.daemon.store, name)?, format!("/{path}").into_bytes())
    } else {
        let text = format!("{:?} is neither a chunk's id (64 digits) nor a path", request.what);
        return Err(Failure::invalid(text).hint("write a path of a layer as NAME:/PATH"));
    };
    let origin = refs::why_path(&context.daemon.store, layer, &path)?;
    let catalog = Catalog::read(&context.daemon.store)?;
    let told = |layer: LayerId| LayerRef { id: layer.to_string(), names: catalog.names_of(layer) };
    let origin = Origin {
        ino: origin.ino.0,
        kind: kind_text(origin.kind),
        named_by: origin.named_by.map(told),
        records: origin.records.iter().map(|(layer, _)| told(*layer)).collect(),
        links: origin.links.iter().map(|path| absolute(path)).collect(),
        names: origin.names.iter().map(LayerName::to_string).collect(),
    };
    Ok(WhyResult { path: Some(origin), ..WhyResult::default() })
}

fn why_chunk(context: &Context, chunk: &ChunkId, limit: usize) -> Result<WhyResult> {
    let store = &context.daemon.store;
    if !store.contains(chunk)? {
        return Err(layerfs::Error::NotFound { what: "chunk", name: chunk.to_string() }.into());
    }
    let mut result = WhyResult::default();
    refs::why_chunk(store, chunk, &*context.reporter, &mut |found| {
        if result.references.len() < limit {
            result.references.push(reference(&found));
        } else {
            result.more = true;
        }
        Ok(())
    })?;
    Ok(result)
}

fn reference(found: &ChunkReference) -> Reference {
    let (role, ino) = match found.role {
        Role::Manifest => ("manifest", None),
        Role::Inodes => ("inodes", None),
        Role::Dentries => ("dentries", None),
        Role::Image => ("image", None),
        Role::File(ino) => ("file", Some(ino.0)),
    };
    Reference {
        layer: found.layer.to_string(),
        names: found.names.iter().map(LayerName::to_string).collect(),
        role: role.to_owned(),
        ino,
        paths: found.paths.iter().map(|path| absolute(path)).collect(),
    }
}

fn absolute(path: &[u8]) -> PathText {
    let mut text = b"/".to_vec();
    text.extend_from_slice(path);
    PathText(text)
}
