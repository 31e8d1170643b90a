//! The way in: import.

use std::io::Read;
use std::path::Path;
use std::time::Instant;

use layerfs::import::{self, ImportOptions, ImportReport, SourceSpec};

use super::inspect::serde_text;
use super::layers::{expect, layer_name, resolve, with_force_hint};
use crate::api::layers::{ImportRequest, ImportResult, NewLayer};
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};
use crate::units;

/// `/v1/import`.
pub fn import(context: &Context, request: ImportRequest) -> Result<ImportResult> {
    let source = request.source.clone();
    let source = source.ok_or_else(|| Failure::invalid("source is missing; /v1/import-stream needs none"))?;
    super::refuse_own(context.daemon.store.folder(), &source, "a source")?;
    let named = |failure| about(&source, failure);
    take_in(context, &request, SourceSpec::Path(source.clone())).map_err(named)
}

/// `failure`, with the name of the source that is wrong.
fn about(source: &Path, failure: Failure) -> Failure {
    let source = source.display().to_string();
    let is_the_sources = matches!(failure.class, Class::Invalid | Class::Corrupt | Class::Unsupported);
    if !is_the_sources || failure.message.contains(&source) {
        return failure;
    }
    Failure { message: format!("{source}: {}", failure.message), ..failure }
}

/// `/v1/import-stream`: an archive in the request's body.
pub fn import_stream(context: &Context, request: ImportRequest, source: Box<dyn Read + Send>) -> Result<ImportResult> {
    take_in(context, &request, SourceSpec::Stream(source))
}

fn take_in(context: &Context, request: &ImportRequest, source: SourceSpec) -> Result<ImportResult> {
    context.label(format!("import {}", request.name));
    let started = Instant::now();
    let store = &context.daemon.store;
    let layer = |name: &Option<String>| name.as_deref().map(|name| resolve(store, name)).transpose();
    let options = ImportOptions {
        expect: expect(request.force),
        kind: request.kind.map(Into::into),
        parent: layer(&request.parent)?,
        like: layer(&request.like)?,
        whole: request.whole,
        format: request.format.as_deref().map(str::parse).transpose()?,
        whiteouts: request.oci_whiteouts,
        one_filesystem: request.one_file_system,
        reference: request.reference.clone(),
        platform: request.platform.clone(),
        ..ImportOptions::new(layer_name(&request.name)?)
    };
    let imported = import::import(store, source, &options, &*context.reporter);
    let report = imported.map_err(|error| with_force_hint(error.into(), "--force moves the name to the new layer"))?;
    Ok(imported_answer(&report, started))
}

fn imported_answer(report: &ImportReport, started: Instant) -> ImportResult {
    let new_layer = |layer: &import::ImportedLayer| NewLayer {
        name: layer.name.as_ref().map(ToString::to_string),
        id: layer.id.to_string(),
        kind: layer.kind.to_string(),
        inodes: layer.inode_count,
        file_bytes: layer.file_bytes,
    };
    ImportResult {
        format: serde_text(&report.format),
        layers: report.layers.iter().map(new_layer).collect(),
        entries: report.entries,
        bytes_read: report.read_bytes,
        new_chunks: report.new_chunks,
        bytes_stored: report.new_stored_bytes,
        bytes_known: report.known_plain_bytes,
        seconds: units::seconds(started.elapsed()),
    }
}
