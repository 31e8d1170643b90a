//! push and pull with an OCI registry.

use std::io::Read;

use migrator::registry::Address;

use super::Session;
use crate::api::registry::{Login, RegistryPullRequest, RegistryPullResult, RegistryPushRequest, RegistryPushResult};
use crate::cli::registry::{Access, Form, PullOptions, PushOptions};
use crate::cli::transfers::Manner;
use crate::config::Environment;
use crate::credentials;
use crate::failure::{Failure, Result};
use crate::progress::Display;
use crate::units;

/// No password is longer, in bytes.
const MAX_PASSWORD: u64 = 64 * 1024;

/// `layerctl push NAME oci://…`.
pub fn push(session: &Session, names: Vec<String>, address: &str, manner: &Manner, options: PushOptions) -> Result<()> {
    let request = RegistryPushRequest {
        name: only(names)?,
        login: login(address, &options.access)?,
        address: address.to_owned(),
        plain_http: options.access.plain_http,
        form: options.form.map(|form| form_text(form).to_owned()),
        limit: manner.limit.map_or(0, |rate| rate.0),
        priority: manner.priority,
    };
    let result: RegistryPushResult = session.work("registry-push", &request, &format!("pushing to {address}"))?;
    session.output.answer(&result, |result| {
        let reused = if result.blobs_reused > 0 {
            format!(" ({} were there)", units::count(result.blobs_reused))
        } else {
            String::new()
        };
        let (blobs, sent) = (units::plural(result.blobs_sent, "blob"), units::size(result.bytes_sent));
        let (time, rate) = (units::duration(result.seconds), units::rate(result.bytes_sent, result.seconds));
        let name = &request.name;
        format!("{name} sent to {}: {blobs}{reused}\n  {}\n{sent}, {time}, {rate}\n", result.address, result.digest)
    })
}

/// `layerctl pull NAME oci://…`.
pub fn pull(
    session: &Session,
    names: Vec<String>,
    address: &str,
    force: bool,
    manner: &Manner,
    options: PullOptions,
) -> Result<()> {
    let request = RegistryPullRequest {
        name: only(names)?,
        login: login(address, &options.access)?,
        address: address.to_owned(),
        plain_http: options.access.plain_http,
        platform: options.platform,
        force,
        limit: manner.limit.map_or(0, |rate| rate.0),
        priority: manner.priority,
    };
    let mut display = Display::new(session.output, format!("pulling from {address}"));
    let client = session.client_of_new_store()?;
    let result: RegistryPullResult = client.work("registry-pull", &request, &mut display, &mut |_| Ok(()))?;
    session.output.answer(&result, |result| {
        let (layers, blobs) = (units::plural(result.layers, "layer"), units::plural(result.blobs_received, "blob"));
        let stored = result.bytes_stored.map(|bytes| format!(", {} added to the store", units::size(bytes)));
        let (received, time) = (units::size(result.bytes_received), units::duration(result.seconds));
        let rate = units::rate(result.bytes_received, result.seconds);
        format!(
            "{} fetched from {}: {layers}, {blobs}\n  {}\n{received}{}, {time}, {rate}\n",
            result.name,
            result.address,
            result.digest,
            stored.unwrap_or_default()
        )
    })
}

fn only(names: Vec<String>) -> Result<String> {
    match <[String; 1]>::try_from(names) {
        Ok([name]) => Ok(name),
        Err(_) => Err(Failure::invalid("an address in a registry is for one layer; give one name")),
    }
}

/// A form, as the API names it.
fn form_text(form: Form) -> &'static str {
    match form {
        Form::Image => "image",
        Form::ImageZstd => "image-zstd",
        Form::Packs => "packs",
    }
}

/// Who to be: as the command line says, else as docker or podman logged in.
fn login(address: &str, access: &Access) -> Result<Option<Login>> {
    let address: Address = address.parse()?;
    let Some(username) = access.username.clone() else {
        return credentials::find(address.registry(), address.repository(), &Environment::current());
    };
    let mut password = String::new();
    std::io::stdin()
        .take(MAX_PASSWORD)
        .read_to_string(&mut password)
        .map_err(|e| Failure::invalid(format!("the password on stdin can't be read: {e}")))?;
    let password = password.trim_end_matches(['\r', '\n']).to_owned();
    if password.is_empty() {
        return Err(Failure::invalid("there is no password on stdin"));
    }
    Ok(Some(Login { username, password }))
}
