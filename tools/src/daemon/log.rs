//! The daemon's log: to stderr, through a filter that can be changed while it runs.
//!
//! Invariant: a line that can't be written (a full disk, a reader that has gone) is lost, and nothing else.

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

/// Starts the log.
///
/// # Errors
/// As [`parse`].
pub fn start(settings: &Settings, is_foreground: bool) -> Result<()> {
    use std::io::IsTerminal;
    let filter = parse(&settings.log)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(is_foreground && std::io::stderr().is_terminal())
        .with_target(false)
        // It would tell stderr, which is what can't be written to; and `eprintln!` panics then.
        .log_internal_errors(false)
        .with_filter_reloading();
    let handle = subscriber.reload_handle();
    // A second daemon in one process happens only in tests.
    if subscriber.try_init().is_ok() {
        let _ = LOG.set((Box::new(move |filter| handle.reload(filter)), Mutex::new(settings.log.clone())));
    }
    Ok(())
}

/// The filter that `text` stands for.
///
/// # Errors
/// [`crate::failure::Class::Invalid`] if it is none.
pub fn parse(text: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(text).map_err(|error| wrong(text, &error))
}

fn wrong(filter: &str, why: &dyn std::fmt::Display) -> Failure {
    let failure = Failure::invalid(format!("{filter:?} is no log filter: {why}"));
    failure.hint("write it like `info`, `debug` or `layerfs::mount=trace,info`")
}

/// `/v1/log-filter`.
pub fn filter(_: &Context, request: LogFilterRequest) -> Result<LogFilter> {
    let (change, text) = LOG.get().ok_or_else(|| Failure::invalid("this daemon has no log of its own"))?;
    let mut text = text.lock();
    if let Some(wanted) = request.filter {
        change(parse(&wanted)?).map_err(|error| wrong(&wanted, &error))?;
        tracing::info!(filter = %wanted, "logs by another filter from now on");
        *text = wanted;
    }
    Ok(LogFilter { filter: text.clone() })
}
