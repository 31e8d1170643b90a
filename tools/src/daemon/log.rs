//! The daemon's log: to stderr, through a filter that can be changed while it runs.

use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

use super::http::Context;
use crate::api::activity::{LogFilter, LogFilterRequest};
use crate::config::Settings;
use crate::failure::{Failure, Result};

/// Puts a filter in force.
type Change = Box<dyn Fn(EnvFilter) -> std::result::Result<(), tracing_subscriber::reload::Error> + Send + Sync>;

/// The log of this process, once it is started, with its filter.
static LOG: OnceLock<(Change, Mutex<String>)> = OnceLock::new();
const DEFAULT: &str = "info";

/// Starts the log.
pub fn start(settings: &Settings, is_foreground: bool) {
    use std::io::IsTerminal;
    let (text, filter) = match EnvFilter::try_new(&settings.log) {
        Ok(filter) => (settings.log.clone(), filter),
        Err(_) => (DEFAULT.to_owned(), DEFAULT.into()),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(is_foreground && std::io::stderr().is_terminal())
        .with_target(false)
        .with_filter_reloading();
    let handle = subscriber.reload_handle();
    // A second daemon in one process happens only in tests.
    if subscriber.try_init().is_ok() {
        let _ = LOG.set((Box::new(move |filter| handle.reload(filter)), Mutex::new(text)));
    }
}

/// `/v1/log-filter`.
pub fn filter(_: &Context, request: LogFilterRequest) -> Result<LogFilter> {
    let (change, text) = LOG.get().ok_or_else(|| Failure::invalid("this daemon has no log of its own"))?;
    let mut text = text.lock();
    if let Some(wanted) = request.filter {
        let wrong = |why: String| {
            let failure = Failure::invalid(format!("{wanted:?} is no log filter: {why}"));
            failure.hint("write it like `info`, `debug` or `layerfs::mount=trace,info`")
        };
        let parsed = EnvFilter::try_new(&wanted).map_err(|error| wrong(error.to_string()))?;
        change(parsed).map_err(|error| wrong(error.to_string()))?;
        tracing::info!(filter = %wanted, "logs by another filter from now on");
        *text = wanted;
    }
    Ok(LogFilter { filter: text.clone() })
}
