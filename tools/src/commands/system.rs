//! daemon, generate, version.

use super::Session;
use crate::api::{Empty, Status, Stop};
use crate::autostart;
use crate::cli::{Command, system as args};
use crate::config::Listen;
use crate::failure::{Class, Failure, Result};
use crate::output::{Output, Paint, facts};
use crate::{client, generate as generator, units};

/// `layerctl daemon`.
pub fn daemon(session: &Session, args: args::Daemon) -> Result<u8> {
    match args.action.unwrap_or(args::DaemonAction::Start(args.start)) {
        args::DaemonAction::Start(how) => start(session, &how).map(|()| 0),
        args::DaemonAction::Status => status(session),
        args::DaemonAction::Restart { force } => restart(session, force).map(|()| 0),
        args::DaemonAction::Keep => crate::keeper::run(&session.settings.store).map(|()| 0),
        args::DaemonAction::Hand => hand().map(|()| 0),
        args::DaemonAction::LogFilter { filter } => super::activity::log_filter(session, filter).map(|()| 0),
        args::DaemonAction::Stop { force } => stop(session, force).map(|()| 0),
    }
}

/// Whether `command` makes this process the daemon.
pub fn becomes_daemon(command: &Command) -> bool {
    let Command::Daemon(args) = command else { return false };
    match &args.action {
        None => args.start.foreground,
        Some(args::DaemonAction::Start(how)) => how.foreground,
        Some(_) => false,
    }
}

/// Whether `command` makes this process the keeper.
pub fn keeps_mounts(command: &Command) -> bool {
    matches!(command, Command::Daemon(args) if matches!(args.action, Some(args::DaemonAction::Keep)))
}

/// Does what the daemon at the other end of the standard input says.
pub fn hand() -> Result<()> {
    let failed = |e| Failure::from(layerfs::Error::io("obeying the daemon", e));
    let socket = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().map_err(failed)?;
    layerfs::mount::helper::run(socket).map_err(failed)
}

fn start(session: &Session, how: &args::DaemonStart) -> Result<()> {
    if how.foreground {
        return crate::daemon::run(session.settings.clone(), how);
    }
    // A wrong address is told here rather than by the daemon.
    let listen = how.listen.as_ref().map(|listen| listen.parse::<Listen>()).transpose()?;
    let running = autostart::find(&session.settings)?;
    if running.is_none() {
        if let Some(missing) = session.settings.missing_credentials() {
            session.output.warn(&missing);
        }
        autostart::start(&session.settings, how)?;
    }
    let status: Status = session.call("status", &Empty {})?;
    if let Some(listen) = listen.map(|listen| listen.to_string()).filter(|listen| *listen != status.listen) {
        let Status { pid, listen: has, .. } = &status;
        let text = format!("the daemon runs already (pid {pid}), with `listen` {has:?} instead of {listen:?}");
        return Err(Failure::new(Class::Busy, text).hint(format!(
            "`layerctl daemon stop` first; or, to last, write listen = \"{listen}\" in the config file and `layerctl daemon restart`"
        )));
    }
    session.output.answer(&status, |status| {
        let verb = if running.is_some() { "runs already" } else { "started" };
        format!("daemon {verb}: pid {}, store {}\n", status.pid, status.store.display())
    })
}

fn status(session: &Session) -> Result<u8> {
    let Some(client) = autostart::find(&session.settings)? else { return absent(session) };
    match client.call::<_, Status>("status", &Empty {}) {
        Ok(status) => session.output.answer(&status, |status| status_text(status, session.output.paint()))?,
        // Killed just now.
        Err(_) if autostart::find(&session.settings)?.is_none() => return absent(session),
        Err(failure) => return Err(failure),
    }
    Ok(0)
}

/// Says that no daemon answers, and whether there will be one.
fn absent(session: &Session) -> Result<u8> {
    let store = session.settings.store.display().to_string();
    let keeper = crate::keeper::holder(&session.settings.store);
    let answer =
        serde_json::json!({ "running": false, "starting": keeper.is_some(), "keeper": keeper, "store": store });
    session.output.answer(&answer, |_| match keeper {
        None => format!("no daemon runs for the store {store}\n"),
        Some(keeper) => {
            format!("a daemon is being started for the store {store}; its mounts are held by process {keeper}\n")
        }
    })?;
    Ok(if keeper.is_some() { Class::Busy } else { Class::NotFound }.exit_code())
}

fn status_text(status: &Status, paint: Paint) -> String {
    let listening = match (&status.listening, &status.listen_error) {
        (Some(address), _) => address.clone(),
        (None, Some(error)) => paint.red(error),
        (None, None) => "no".to_owned(),
    };
    let leaves =
        if status.autostarted && status.listening.is_none() { ", leaves when it has nothing to do" } else { "" };
    let kept = status.keeper.map_or_else(String::new, |keeper| format!(", kept by process {keeper}"));
    let mounts = format!("{}{kept}", units::count(status.mounts));
    let mut list = vec![
        ("store", status.store.display().to_string()),
        ("version", status.version.clone()),
        ("pid", format!("{}, up {}{leaves}", status.pid, units::duration(status.uptime_seconds))),
        ("memory", units::size(status.resident_bytes)),
        ("mounts", mounts),
        ("listening", listening),
    ];
    for work in &status.work {
        let progress = &work.progress;
        let share = progress.total_bytes.map(|total| format!(" {}", units::percent(progress.bytes, total)));
        let (phase, share) = (&progress.phase, share.unwrap_or_default());
        list.push(("work", format!("{}: {phase}{share}, {}", work.label, units::duration(work.seconds))));
    }
    facts(paint, list)
}

fn stop(session: &Session, force: bool) -> Result<()> {
    let found = autostart::find(&session.settings)?;
    if let Some(client) = &found {
        client::stop(client, Stop { force, ..Stop::default() })?;
    }
    let answer = serde_json::json!({ "stopped": found.is_some() });
    session.output.answer(&answer, |_| {
        let text = if found.is_some() { "daemon stopped" } else { "no daemon runs" };
        format!("{text}\n")
    })
}

fn restart(session: &Session, force: bool) -> Result<()> {
    let status = match autostart::find(&session.settings)? {
        Some(client) => client::restart(&client, force)?,
        None => {
            autostart::require_store(&session.settings)?;
            autostart::start(&session.settings, &args::DaemonStart::default())?;
            session.call("status", &Empty {})?
        }
    };
    session.output.answer(&status, |status| {
        format!(
            "daemon restarted: pid {}, version {}, {}\n",
            status.pid,
            status.version,
            units::plural(status.mounts, "mount")
        )
    })
}

/// `layerctl version`.
pub fn version(session: &Session) -> Result<()> {
    let ask = |client: client::Client| client.call::<_, Status>("status", &Empty {}).map(|status| status.version);
    let asked = autostart::find(&session.settings).and_then(|client| client.map(ask).transpose());
    let daemon_version = asked.as_ref().ok().and_then(Option::as_deref);
    let answer = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "api": crate::api::API_VERSION,
        "daemon": daemon_version,
    });
    session.output.answer(&answer, |_| {
        let daemon = match &asked {
            Ok(version) => version.clone().unwrap_or_else(|| "not running".to_owned()),
            Err(failure) => format!("cannot be asked: {failure}"),
        };
        format!("layerctl {}\ndaemon   {daemon}\n", env!("CARGO_PKG_VERSION"))
    })
}

/// `layerctl generate`.
pub fn generate(args: args::Generate, output: Output) -> Result<()> {
    match args.what {
        args::GenerateWhat::Completions(args) => generator::completions(args.shell, &mut std::io::stdout().lock()),
        args::GenerateWhat::Man { dir } => {
            let pages = generator::man(&dir)?;
            let answer = serde_json::json!({ "dir": dir, "pages": pages });
            output.answer(&answer, |_| format!("{} in {}\n", units::plural(pages as u64, "page"), dir.display()))
        }
    }
}
