//! Running transfers: which there are, and changing them.

use migrator::measured;
use migrator::{Priority, Rate};

use crate::api::Empty;
use crate::api::transfers::{self as api, Limit, LimitRequest, TransferList, TransferSet};
use crate::daemon::Daemon;
use crate::daemon::http::Context;
use crate::failure::{Failure, Result};
use crate::units;

impl From<api::Priority> for Priority {
    fn from(priority: api::Priority) -> Priority {
        match priority {
            api::Priority::Low => Priority::Low,
            api::Priority::Normal => Priority::Normal,
            api::Priority::High => Priority::High,
        }
    }
}

impl From<Priority> for api::Priority {
    fn from(priority: Priority) -> api::Priority {
        match priority {
            Priority::Low => api::Priority::Low,
            Priority::Normal => api::Priority::Normal,
            Priority::High => api::Priority::High,
        }
    }
}

/// Bytes per second as requests hold them: 0 for none.
pub fn rate(bytes_per_second: u64) -> Result<Option<Rate>> {
    match bytes_per_second {
        0 => Ok(None),
        slow if slow < Rate::MIN => Err(Failure::invalid(format!("the lowest rate is {}/s", units::size(Rate::MIN)))),
        rate => Ok(Some(Rate::new(rate))),
    }
}

/// `/v1/transfers`.
pub fn list(context: &Context, _: Empty) -> Result<TransferList> {
    let transfers = context.daemon.peering.node().transfers();
    Ok(TransferList {
        transfers: transfers.list().into_iter().map(info).collect(),
        limit: transfers.governor().limit().map(Rate::bytes_per_second),
    })
}

/// `/v1/transfer-set`: all of them, or none.
pub fn set(context: &Context, request: TransferSet) -> Result<Empty> {
    let transfers = context.daemon.peering.node().transfers();
    let limit = request.limit.map(rate).transpose()?;
    let known = |id: &u64| {
        let found = transfers.get(*id).map_err(Failure::from);
        found.map_err(|failure| failure.hint("`layerctl transfers` shows those that run"))
    };
    let found = request.transfers.iter().map(known).collect::<Result<Vec<_>>>()?;
    for transfer in found {
        if request.cancel {
            transfer.cancel();
        }
        transfer.gate().change(|controls| {
            controls.paused = request.paused.unwrap_or(controls.paused);
            controls.limit = limit.unwrap_or(controls.limit);
            controls.priority = request.priority.map_or(controls.priority, Priority::from);
        });
    }
    Ok(Empty {})
}

/// `/v1/limit`.
pub fn limit(context: &Context, request: LimitRequest) -> Result<Limit> {
    let daemon = &context.daemon;
    if request.reset {
        measured::save_limit(&daemon.store, None)?;
    } else if let Some(limit) = request.limit {
        measured::save_limit(&daemon.store, Some(rate(limit)?))?;
    }
    let limit = in_force(daemon)?;
    daemon.peering.node().transfers().governor().set_limit(limit.limit.map(Rate::new));
    Ok(limit)
}

/// The limit that a user set, or else the config file's.
///
/// # Errors
/// Those of the index.
pub fn in_force(daemon: &Daemon) -> Result<Limit> {
    Ok(match measured::load_limit(&daemon.store)? {
        Some(set) => Limit { limit: set.map(Rate::bytes_per_second), from_config: false },
        None => Limit { limit: daemon.settings.limit, from_config: true },
    })
}

/// How a word of the migrator's is written in JSON.
fn word<T: serde::Serialize>(value: T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn info(info: migrator::TransferInfo) -> api::TransferInfo {
    api::TransferInfo {
        id: info.id,
        role: word(info.role),
        origin: word(info.origin),
        peer: info.peer,
        names: info.names,
        dry_run: info.dry_run,
        state: word(info.state),
        phase: info.phase,
        bytes: info.bytes,
        total_bytes: info.total_bytes,
        chunks: info.chunks,
        bytes_sent: info.bytes_sent,
        bytes_received: info.bytes_received,
        rate: info.rate.round(),
        seconds_left: info.seconds_left.map(|seconds| (seconds * 10.0).round() / 10.0),
        seconds: (info.seconds * 1000.0).round() / 1000.0,
        limit: info.controls.limit.map(Rate::bytes_per_second),
        priority: info.controls.priority.into(),
        paused: info.controls.paused,
        connections: info.connections,
        error: info.error,
    }
}
