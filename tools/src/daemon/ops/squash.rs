//! Squashing chains of layers, and moving names and mounts to what they become.

use layerfs::LayerName;
use layerfs::monitor::Monitor;
use layerfs::squash::{self, Chain, SquashReport};
use layerfs::store::Expect;

use super::layers::{expect, layer_name, resolve, with_force_hint};
use crate::api::layers::{SquashRequest, SquashResult, Squashed};
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};

/// `/v1/squash`: one name after the other; what was done before a failure stays.
pub fn squash(context: &Context, request: SquashRequest) -> Result<SquashResult> {
    context.label(format!("squash {}", request.names.join(" ")));
    if request.new_name.is_some() && request.names.len() != 1 {
        return Err(Failure::invalid("one layer can get a new name at a time; give one NAME with --as"));
    }
    let squashed = request.names.iter().map(|name| squash_one(context, &request, name)).collect::<Result<_>>()?;
    Ok(SquashResult { dry_run: request.dry_run, squashed })
}

fn squash_one(context: &Context, request: &SquashRequest, text: &str) -> Result<Squashed> {
    let store = &context.daemon.store;
    let top = resolve(store, text)?;
    let named = LayerName::new(text).ok().filter(|name| matches!(store.name(name), Ok(Some(_))));
    let (name, expected) = match (&request.new_name, named) {
        (Some(new), _) => (layer_name(new)?, expect(request.force)),
        (None, Some(name)) => (name, Expect::Is(top)),
        (None, None) => {
            let text = format!("{text:?} is a layer's id, and no name that could refer to the result");
            return Err(Failure::invalid(text).hint("--as NEW gives it one"));
        }
    };
    let chain = match (&request.onto, request.all) {
        (Some(onto), _) => Chain::down_to(store, top, resolve(store, onto)?)?,
        (None, true) => Chain::whole(store, top)?,
        (None, false) => Chain::of_kind(store, top)?,
    };
    if chain.layers == 0 {
        return Err(Failure::invalid(format!("{text} is the very layer that it shall be squashed onto")));
    }
    let kind = request.kind.map(layerfs::manifest::LayerKind::from);
    let monitor = &*context.reporter;
    if request.dry_run || chain.layers as u64 <= request.past {
        // Too short a chain stays as it is.
        let chain = if request.dry_run { chain } else { Chain { layers: 1, ..chain } };
        let kind = kind.filter(|_| request.dry_run);
        return Ok(answer(name.as_str(), &squash::plan(store, chain, kind, monitor)?, Vec::new()));
    }
    let prepared = squash::prepare(store, chain, kind, monitor)?;
    let failed = |error: layerfs::Error| with_force_hint(error.into(), "--force replaces it");
    let change = layerfs::store::NameChange { name: name.clone(), layer: prepared.report.layer, expect: expected };
    store.set_names(&[change]).map_err(failed)?;
    let mut moved = Vec::new();
    for mount in context.daemon.mounts.on_top_of(top) {
        match mount.rest_on(&prepared) {
            Ok(true) => moved.push(mount.record().dir.clone()),
            // Sealed meanwhile, or it needs the chain for a file that is open and has no name.
            Ok(false) => {}
            Err(error) => {
                let failure = Failure::from(error);
                if failure.class != Class::Denied {
                    monitor.warn(&format!("{} stays on the chain: {failure}", mount.record().dir.display()));
                }
            }
        }
    }
    Ok(answer(name.as_str(), &prepared.report, moved))
}

fn answer(name: &str, report: &SquashReport, mounts: Vec<std::path::PathBuf>) -> Squashed {
    Squashed {
        name: name.to_owned(),
        before: report.before.to_string(),
        id: report.layer.to_string(),
        parent: report.parent.map(|parent| parent.to_string()),
        layers: report.layers,
        inodes_before: report.inodes_before,
        inodes: report.inodes,
        dentries_before: report.dentries_before,
        dentries: report.dentries,
        table_bytes_before: report.table_bytes_before,
        table_bytes: report.table_bytes,
        new_bytes: report.new_bytes,
        mounts,
    }
}
