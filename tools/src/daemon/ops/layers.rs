//! Names and stacks: list, tree, log, tag, remove.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use layerfs::manifest::Manifest;
use layerfs::monitor::Monitor;
use layerfs::store::{Expect, NameRecord, Presence, Store};
use layerfs::{LayerId, LayerName};
use migrator::lazy::SourceStatus;

use crate::api::layers::{
    InspectRequest, LayerInfo, LayerList, ListRequest, Named, PartialInfo, RemoveRequest, RemoveResult, TagRequest,
    Unreadable,
};
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};

/// The store's names, both ways.
pub struct Catalog {
    store: Arc<Store>,
    names: Vec<(LayerName, NameRecord)>,
    of_layer: BTreeMap<LayerId, Vec<usize>>,
}

impl Catalog {
    /// The names as they are now.
    pub fn read(store: &Arc<Store>) -> Result<Catalog> {
        let names = store.names()?;
        let mut of_layer: BTreeMap<LayerId, Vec<usize>> = BTreeMap::new();
        for (index, (_, record)) in names.iter().enumerate() {
            of_layer.entry(record.layer).or_default().push(index);
        }
        Ok(Catalog { store: store.clone(), names, of_layer })
    }

    /// All names, sorted, with their layers.
    pub fn names(&self) -> &[(LayerName, NameRecord)] {
        &self.names
    }

    /// The names of a layer, sorted.
    pub fn names_of(&self, layer: LayerId) -> Vec<String> {
        let indices = self.of_layer.get(&layer).into_iter().flatten();
        indices.map(|index| self.names[*index].0.to_string()).collect()
    }

    /// One name of a layer.
    pub fn name_of(&self, layer: LayerId) -> Option<String> {
        self.names_of(layer).into_iter().next()
    }

    /// A layer as users see it.
    pub fn info(&self, layer: LayerId) -> Result<(LayerInfo, Manifest)> {
        let manifest = Manifest::load(&*self.store, layer)?;
        let first = self.of_layer.get(&layer).and_then(|indices| indices.first());
        let info = LayerInfo {
            names: self.names_of(layer),
            id: layer.to_string(),
            kind: manifest.kind.to_string(),
            parent: manifest.parent.map(|parent| parent.to_string()),
            parent_name: manifest.parent.and_then(|parent| self.name_of(parent)),
            depth: manifest.depth,
            inodes: manifest.inode_count,
            dentries: manifest.dentry_count,
            file_bytes: manifest.file_bytes,
            created: first.map(|index| self.names[*index].1.created.into()),
            partial: None,
        };
        Ok((info, manifest))
    }

    /// What of the stack of `top` is still on its way, as `lazy` has it.
    pub fn partial(&self, top: LayerId, sources: &[SourceStatus]) -> Result<Option<PartialInfo>> {
        let partials = self.store.partials_of_stack(top)?;
        if partials.is_empty() {
            return Ok(None);
        }
        let mut sum = Presence::default();
        let mut peers: Vec<String> = Vec::new();
        for (layer, partial) in &partials {
            let presence = self.store.presence(*layer)?;
            sum.here_bytes += presence.here_bytes;
            sum.total_bytes += presence.total_bytes;
            peers.extend(partial.sources.iter().filter(|peer| !peers.contains(peer)).cloned().collect::<Vec<_>>());
        }
        let status = sources.iter().filter(|status| peers.contains(&status.peer));
        Ok(Some(PartialInfo {
            percent: sum.percent(),
            here_bytes: sum.here_bytes,
            total_bytes: sum.total_bytes,
            error: status.filter_map(|status| status.error.clone()).next(),
            sources: peers,
            pushed: partials.iter().all(|(_, partial)| partial.pushed),
        }))
    }

    /// The layers from `top` to its base.
    pub fn stack(&self, top: LayerId) -> Result<Vec<(LayerInfo, Manifest)>> {
        let mut stack = Vec::new();
        let mut next = Some(top);
        while let Some(layer) = next {
            let (info, manifest) = self.info(layer)?;
            next = manifest.parent;
            stack.push((info, manifest));
        }
        Ok(stack)
    }
}

/// A layer's name, checked.
pub fn layer_name(text: &str) -> Result<LayerName> {
    Ok(LayerName::new(text)?)
}

/// The layer that `text` stands for; names that are alike are suggested.
pub fn resolve(store: &Arc<Store>, text: &str) -> Result<LayerId> {
    store.resolve(text).map_err(|error| {
        let failure = Failure::from(error);
        if failure.class != Class::NotFound {
            return failure;
        }
        let names = store.names().unwrap_or_default();
        let alike: Vec<String> =
            names.iter().map(|(name, _)| name.to_string()).filter(|name| is_alike(name, text)).take(3).collect();
        if alike.is_empty() {
            failure.hint("`layerctl list` shows the layers that there are")
        } else {
            failure.hint(format!("there is {}", alike.join(", ")))
        }
    })
}

/// Whether one contains the other, or they differ in at most two letters.
fn is_alike(name: &str, text: &str) -> bool {
    let (name, text) = (name.to_ascii_lowercase(), text.to_ascii_lowercase());
    (text.len() >= 3 && (name.contains(&text) || text.contains(&name)))
        || distance(name.as_bytes(), text.as_bytes()) <= 2
}

/// The fewest insertions, removals and replacements that turn `a` into `b`.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// What a name must be for a command to set it.
pub fn expect(force: bool) -> Expect {
    if force { Expect::Any } else { Expect::Absent }
}

/// `/v1/list`.
pub fn list(context: &Context, request: ListRequest) -> Result<LayerList> {
    let catalog = Catalog::read(&context.daemon.store)?;
    let sources = context.daemon.peering.sources();
    let kind = request.kind.map(layerfs::manifest::LayerKind::from);
    let (mut layers, mut unreadable) = (Vec::new(), Vec::new());
    for (name, record) in catalog.names() {
        if request.pattern.as_ref().is_some_and(|pattern| !matches(pattern.as_bytes(), name.as_str().as_bytes())) {
            continue;
        }
        let (info, manifest) = match catalog.info(record.layer) {
            Ok(found) => found,
            // The name went meanwhile, or stands for another layer.
            Err(_) if context.daemon.store.name(name)?.is_none_or(|now| now.layer != record.layer) => continue,
            // One that is damaged hides no others.
            Err(failure) => {
                unreadable.push(unreadable_of(name, record.layer, &failure));
                let way_out = match failure.class {
                    Class::Denied => {
                        "run the daemon as the user whose store it is, or give that one its files (chown)".to_owned()
                    }
                    _ => format!("`layerctl remove {name}` gives it up"),
                };
                context.reporter.warn(&format!("{name}: {failure}; {way_out}"));
                continue;
            }
        };
        if kind.is_none_or(|kind| manifest.kind == kind) {
            let partial = catalog.partial(record.layer, &sources)?;
            let names = vec![name.to_string()];
            layers.push(LayerInfo { names, created: Some(record.created.into()), partial, ..info });
        }
    }
    Ok(LayerList { layers, unreadable })
}

/// A layer that has a name and isn't there is damage like any other.
fn unreadable_of(name: &LayerName, layer: LayerId, failure: &Failure) -> Unreadable {
    let class = if failure.class == Class::NotFound { Class::Corrupt } else { failure.class };
    Unreadable { name: name.to_string(), id: layer.to_string(), error: Failure::new(class, failure.message.clone()) }
}

/// Whether `pattern`, in which `*` stands for anything, matches `text`.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skipped| matches(rest, &text[skipped..])),
        Some((byte, rest)) => text.split_first().is_some_and(|(first, text)| first == byte && matches(rest, text)),
    }
}

/// `/v1/tree`: every layer of every stack, once.
pub fn tree(context: &Context, _: ListRequest) -> Result<LayerList> {
    let catalog = Catalog::read(&context.daemon.store)?;
    let mut seen = HashSet::new();
    let mut layers = Vec::new();
    for root in context.daemon.store.roots()? {
        let mut next = Some(root);
        while let Some(layer) = next.filter(|layer| seen.insert(*layer)) {
            let (info, manifest) = catalog.info(layer)?;
            next = manifest.parent;
            layers.push(info);
        }
    }
    layers.sort_by(|a, b| (a.names.is_empty(), &a.names, &a.id).cmp(&(b.names.is_empty(), &b.names, &b.id)));
    Ok(LayerList { layers, ..LayerList::default() })
}

/// `/v1/log`.
pub fn log(context: &Context, request: InspectRequest) -> Result<LayerList> {
    let store = &context.daemon.store;
    let stack = Catalog::read(store)?.stack(resolve(store, &request.layer)?)?;
    Ok(LayerList { layers: stack.into_iter().map(|(info, _)| info).collect(), ..LayerList::default() })
}

/// `/v1/tag`.
pub fn tag(context: &Context, request: TagRequest) -> Result<Named> {
    let store = &context.daemon.store;
    let name = layer_name(&request.name)?;
    let layer = resolve(store, &request.layer)?;
    // So that it stays until the name is set.
    let _pin = store.pin(layer)?;
    store
        .set_name(&name, layer, expect(request.force))
        .map_err(|e| with_force_hint(e.into(), "--force replaces it"))?;
    Ok(Named { name: name.to_string(), id: layer.to_string() })
}

/// Adds `hint` to the failure that a name is taken.
pub fn with_force_hint(failure: Failure, hint: &str) -> Failure {
    if failure.class == crate::failure::Class::Exists { failure.hint(hint) } else { failure }
}

/// `/v1/remove`: all of the names, or none.
pub fn remove(context: &Context, request: RemoveRequest) -> Result<RemoveResult> {
    let store = &context.daemon.store;
    let mut found = Vec::new();
    for text in &request.names {
        let name = layer_name(text)?;
        if store.name(&name)?.is_none() {
            // For its suggestions; an id's beginning is not a name.
            resolve(store, text)?;
            return Err(Failure::invalid(format!("{text:?} is a layer's id; remove its names instead")));
        }
        if !found.contains(&name) {
            found.push(name);
        }
    }
    for name in &found {
        if let Some(guest) = context.daemon.guests.on(name)? {
            let failure = Failure::new(Class::Busy, format!("guest {guest} lies on {name}"));
            return Err(failure.hint(format!("`layerctl guest remove {guest}` first; it moves by that name")));
        }
    }
    let mut removed = Vec::new();
    for name in found {
        let record = store.remove_name(&name)?;
        removed.push(Named { name: name.to_string(), id: record.layer.to_string() });
    }
    Ok(RemoveResult { removed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_and_likeness() {
        assert!(matches(b"deb*", b"debian/12") && matches(b"*", b"") && !matches(b"deb", b"debian"));
        assert!(is_alike("debian", "debain") && is_alike("debian/12", "debian") && !is_alike("app", "base"));
    }
}
