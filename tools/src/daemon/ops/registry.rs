//! Pushing to and pulling from OCI registries.

use std::time::Instant;

use layerfs::export::Compression;
use migrator::governor::Controls;
use migrator::registry::{self, Access, Address, Form, PullFrom, PushTo};

use super::layers::{expect, layer_name, resolve, with_force_hint};
use crate::api::registry::{Login, RegistryPullRequest, RegistryPullResult, RegistryPushRequest, RegistryPushResult};
use crate::api::transfers::Priority;
use crate::daemon::http::Context;
use crate::daemon::ops::transfers;
use crate::failure::{Failure, Result};
use crate::units;

fn access(login: Option<Login>, plain_http: bool) -> Access {
    let login = login.map(|Login { username, password }| registry::Login { username, password });
    Access { login, plain_http }
}

fn controls(limit: u64, priority: Priority) -> Result<Controls> {
    Ok(Controls { limit: transfers::rate(limit)?, priority: priority.into(), ..Controls::default() })
}

/// `/v1/registry-push`.
pub fn push(context: &Context, request: RegistryPushRequest) -> Result<RegistryPushResult> {
    let address: Address = request.address.parse()?;
    context.label(format!("push {} to {address}", request.name));
    let started = Instant::now();
    let store = &context.daemon.store;
    let layer = resolve(store, &request.name)?;
    let form = match request.form.as_deref() {
        None | Some("image") => Form::Image(Compression::Gzip),
        Some("image-zstd") => Form::Image(Compression::Zstd),
        Some("packs") => Form::Packs,
        Some(other) => return Err(Failure::invalid(format!("{other:?} is no form: image, image-zstd or packs"))),
    };
    let to = PushTo {
        name: request.name,
        address,
        access: access(request.login, request.plain_http),
        form,
        controls: controls(request.limit, request.priority)?,
    };
    let pushed =
        context.block_on(registry::push(context.daemon.peering.node(), layer, &to, context.reporter.clone()))?;
    Ok(RegistryPushResult {
        id: layer.to_string(),
        address: to.address.to_string(),
        digest: pushed.digest,
        blobs_sent: pushed.blobs_sent,
        blobs_reused: pushed.blobs_reused,
        bytes_sent: pushed.bytes_sent,
        seconds: units::seconds(started.elapsed()),
    })
}

/// `/v1/registry-pull`.
pub fn pull(context: &Context, request: RegistryPullRequest) -> Result<RegistryPullResult> {
    let address: Address = request.address.parse()?;
    context.label(format!("pull {} from {address}", request.name));
    let started = Instant::now();
    let from = PullFrom {
        address,
        access: access(request.login, request.plain_http),
        platform: request.platform.as_deref().map(str::parse).transpose()?,
        name: layer_name(&request.name)?,
        expect: expect(request.force),
        controls: controls(request.limit, request.priority)?,
    };
    let pulled = context.block_on(registry::pull(context.daemon.peering.node(), &from, context.reporter.clone()));
    let pulled = pulled.map_err(|error| with_force_hint(error.into(), "--force moves the name to the new layer"))?;
    Ok(RegistryPullResult {
        name: from.name.to_string(),
        id: pulled.layer.to_string(),
        address: from.address.to_string(),
        digest: pulled.digest,
        layers: pulled.layers,
        blobs_received: pulled.blobs_received,
        bytes_received: pulled.bytes_received,
        bytes_stored: pulled.import.map(|report| report.new_stored_bytes),
        seconds: units::seconds(started.elapsed()),
    })
}
