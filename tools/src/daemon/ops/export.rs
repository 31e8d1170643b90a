//! The way out: export.

use std::io::Write;
use std::time::Instant;

use layerfs::LayerId;
use layerfs::export::{self, Compression, Destination, ExportReport, Format};

use super::layers::resolve;
use crate::api::layers::{ExportRequest, ExportResult};
use crate::daemon::http::Context;
use crate::failure::{Failure, Result};
use crate::units;

/// `/v1/export`.
pub fn export(context: &Context, request: ExportRequest) -> Result<ExportResult> {
    context.label(format!("export {}", request.name));
    let started = Instant::now();
    let store = &context.daemon.store;
    let layer = resolve(store, &request.name)?;
    let dest =
        request.dest.as_ref().ok_or_else(|| Failure::invalid("dest is missing; /v1/export-stream needs none"))?;
    let text = dest.to_str().ok_or_else(|| Failure::invalid(format!("{} is not UTF-8", dest.display())))?;
    let destination = Destination::parse(text, format(&request)?)?;
    super::refuse_own(store.folder(), &destination.path, "a destination")?;
    let _pin = store.pin(layer)?;
    let report = export::export(store, layer, &destination, &*context.reporter)?;
    Ok(answer(layer, report, started))
}

/// `/v1/export-stream`: a tar archive.
pub fn export_stream(context: &Context, request: ExportRequest, out: &mut dyn Write) -> Result<ExportResult> {
    context.label(format!("export {}", request.name));
    let started = Instant::now();
    let store = &context.daemon.store;
    let layer = resolve(store, &request.name)?;
    let compression = match format(&request)? {
        None => Compression::None,
        Some(Format::Tar(compression)) => compression,
        Some(_) => return Err(Failure::invalid("only a tar archive can be written to stdout; name a destination")),
    };
    let _pin = store.pin(layer)?;
    let mut out = std::io::BufWriter::with_capacity(128 * 1024, out);
    let report = export::export_tar(store, layer, compression, &mut out, &*context.reporter)?;
    out.flush().map_err(|e| Failure::from(layerfs::Error::io("writing the archive", e)))?;
    Ok(answer(layer, report, started))
}

fn format(request: &ExportRequest) -> Result<Option<Format>> {
    Ok(request.format.as_deref().map(str::parse).transpose()?)
}

fn answer(layer: LayerId, report: ExportReport, started: Instant) -> ExportResult {
    ExportResult {
        id: layer.to_string(),
        entries: report.entries,
        data_bytes: report.data_bytes,
        oci_manifest: report.oci_manifest,
        seconds: units::seconds(started.elapsed()),
    }
}
