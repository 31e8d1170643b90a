//! guest create, start, stop, list, show, check, exec, checkpoint, restore, remove.

use std::collections::BTreeMap;

use super::Session;
use crate::api::Empty;
use crate::api::guests::{
    GuestCheckResult, GuestCheckpoint, GuestCheckpointResult, GuestCreate, GuestExec, GuestExecResult, GuestExecStream,
    GuestInfo, GuestList, GuestName, GuestRemove, GuestRestore, GuestStopResult,
};
use crate::cli::guests::{self as args, GuestAction};
use crate::failure::{Class, Failure, Result};
use crate::output::{Color, Table};
use crate::units;

/// `layerctl guest`; returns the exit code.
pub fn guest(session: &Session, args: args::Guest) -> Result<u8> {
    match args.action {
        GuestAction::Create(args) => create(session, *args)?,
        GuestAction::Start(args::GuestName { name }) => start(session, name)?,
        GuestAction::Stop(args::GuestName { name }) => stop(session, name)?,
        GuestAction::List => list(session)?,
        GuestAction::Show(args::GuestName { name }) => show(session, name)?,
        GuestAction::Check(args::GuestName { name }) => return check(session, name),
        GuestAction::Exec { name, stdin, command } => return exec(session, name, stdin, command),
        GuestAction::Checkpoint { name, tag, stop } => checkpoint(session, name, tag, stop)?,
        GuestAction::Restore { name, tag } => restore(session, name, tag)?,
        GuestAction::Resolve(args) => super::migrate::resolve(session, args)?,
        GuestAction::Remove { name, force } => remove(session, name, force)?,
    }
    Ok(0)
}

fn create(session: &Session, args: args::GuestCreate) -> Result<()> {
    let request = GuestCreate { options: options(&args)?, name: args.name, driver: args.driver, on: args.on };
    let info: GuestInfo = session.call("guest-create", &request)?;
    session.output.answer(&info, |info| format!("made guest {} on {}\n", info.name, info.on))
}

/// The options of a machine; those of containers are refused by its driver.
fn machine_options(args: &args::GuestCreate) -> Result<serde_json::Value> {
    let network = migrator::guest::options::Network::parse(&args.network)?;
    let text = args.memory.as_deref().unwrap_or("512M");
    let memory = units::parse_size(text);
    let memory = memory.ok_or_else(|| Failure::invalid(format!("{text:?} is no size; write it like 512M")))?;
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string().into());
    let optional = [
        ("cpus", args.cpus.map(serde_json::Value::from)),
        ("accel", args.accel.clone().map(serde_json::Value::from)),
        ("kernel", path(&args.kernel)),
        ("initrd", path(&args.initrd)),
        ("append", args.append.clone().map(serde_json::Value::from)),
        ("disk", path(&args.disk)),
    ];
    let mut options = serde_json::json!({ "memory": memory, "network": network });
    for (key, value) in optional {
        if let (Some(value), Some(object)) = (value, options.as_object_mut()) {
            object.insert(key.to_owned(), value);
        }
    }
    Ok(options)
}

fn options(args: &args::GuestCreate) -> Result<serde_json::Value> {
    if args.driver == "qemu" {
        if !args.command.is_empty() || !args.env.is_empty() || args.log.is_some() || args.folder.is_some() {
            return Err(Failure::invalid(
                "a machine has no command, environment, folder or log: these are for containers",
            ));
        }
        return machine_options(args);
    }
    let of_machines = [
        ("--memory", args.memory.is_some()),
        ("--cpus", args.cpus.is_some()),
        ("--accel", args.accel.is_some()),
        ("--kernel", args.kernel.is_some()),
        ("--initrd", args.initrd.is_some()),
        ("--append", args.append.is_some()),
        ("--disk", args.disk.is_some()),
    ];
    if let Some((option, _)) = of_machines.iter().find(|(_, is_given)| *is_given) {
        return Err(Failure::invalid(format!("{option} is for machines (driver qemu)")));
    }
    let mut env = BTreeMap::new();
    for text in &args.env {
        let wrong = || Failure::invalid(format!("{text:?} is no variable: write NAME=VALUE"));
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        env.insert(name, value);
    }
    let network = migrator::guest::options::Network::parse(&args.network)?;
    let mut options = serde_json::json!({ "command": args.command, "env": env, "network": network });
    let optional = [
        ("folder", args.folder.as_ref().map(|path| path.display().to_string())),
        ("hostname", args.hostname.clone()),
        ("log", args.log.as_ref().map(|path| path.display().to_string())),
    ];
    for (key, value) in optional {
        if let (Some(value), Some(object)) = (value, options.as_object_mut()) {
            object.insert(key.to_owned(), value.into());
        }
    }
    Ok(options)
}

fn start(session: &Session, name: String) -> Result<()> {
    let info: GuestInfo = session.work("guest-start", &GuestName { name }, "starting")?;
    session.output.answer(&info, |info| format!("started guest {}{}\n", info.name, process(info)))
}

fn process(info: &GuestInfo) -> String {
    info.pid.map(|pid| format!(", process {pid}")).unwrap_or_default()
}

fn stop(session: &Session, name: String) -> Result<()> {
    let result: GuestStopResult = session.work("guest-stop", &GuestName { name }, "ending")?;
    session.output.answer(&result, |GuestStopResult { was_running, guest }| match was_running {
        true => format!("ended guest {}\n", guest.name),
        false => format!("guest {} wasn't running\n", guest.name),
    })
}

fn list(session: &Session) -> Result<()> {
    let list: GuestList = session.call("guests", &Empty {})?;
    session.output.answer(&list, |list| {
        if list.guests.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["GUEST", "DRIVER", "ON", "STATE", "PROCESS>", "MEMORY>"]);
        for info in &list.guests {
            table.colored([
                (info.name.clone(), Some(Color::Cyan)),
                (info.driver.clone(), None),
                (info.on.clone(), None),
                (state(info), None),
                (info.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()), None),
                (info.memory_bytes.map_or_else(|| "-".to_owned(), units::size), None),
            ]);
        }
        table.render(session.output.paint())
    })?;
    if list.guests.is_empty() && !session.output.json {
        session.output.note("no guests; `layerctl guest create` makes one");
    }
    Ok(())
}

/// What it is by the records, and what it really does if that is something else.
fn state(info: &GuestInfo) -> String {
    let way = if info.state == "away" { "at" } else { "from" };
    let peer = info.peer.as_ref().map(|peer| format!(", {way} {peer}")).unwrap_or_default();
    let is = info.activity.as_deref().unwrap_or("unknown");
    let fits = matches!(
        (info.state.as_str(), is),
        ("running", "running") | ("stopped", "frozen") | ("created" | "away" | "arriving", "absent")
    );
    match (info.state.as_str(), is) {
        ("running", "absent") => format!("ended by itself{peer}"),
        ("created", "absent") if info.has_run => format!("stopped{peer}"),
        (state, _) if fits => format!("{state}{peer}"),
        (state, is) => format!("{state}, but {is}{peer}"),
    }
}

fn show(session: &Session, name: String) -> Result<()> {
    let info: GuestInfo = session.call("guest-show", &GuestName { name })?;
    session.output.answer(&info, |info| {
        let mut lines = vec![
            ("guest", info.name.clone()),
            ("driver", info.driver.clone()),
            ("on", info.on.clone()),
            ("state", state(info)),
            ("epoch", info.epoch.to_string()),
        ];
        let optional = [
            ("process", info.pid.map(|pid| pid.to_string())),
            ("memory", info.memory_bytes.map(units::size)),
            ("root", info.root.as_ref().map(|root| root.display().to_string())),
            ("checkpoint", info.state_layer.clone()),
            ("its disk", info.instance.clone()),
        ];
        lines.extend(optional.into_iter().filter_map(|(key, value)| Some((key, value?))));
        lines.push(("options", info.options.to_string()));
        lines.into_iter().map(|(key, value)| format!("{key:<12}{value}\n")).collect()
    })
}

fn check(session: &Session, name: String) -> Result<u8> {
    let result: GuestCheckResult = session.call("guest-check", &GuestName { name })?;
    session.output.answer(&result, |result| {
        let parts = [("to run", &result.run), ("checkpoint", &result.source), ("restore", &result.destination)];
        let mut text = String::new();
        for (what, obstacles) in parts {
            let fine = if obstacles.is_empty() { "nothing in the way" } else { "" };
            text.push_str(&format!("{what:<12}{fine}\n"));
            for obstacle in obstacles {
                text.push_str(&format!("  {}\n    {}\n", obstacle.what, obstacle.fix));
            }
        }
        text
    })?;
    let is_fine = result.run.is_empty() && result.source.is_empty() && result.destination.is_empty();
    Ok(crate::code_of(is_fine, Class::Unsupported))
}

fn exec(session: &Session, name: String, stdin: bool, command: Vec<String>) -> Result<u8> {
    let code = if session.output.json {
        if stdin {
            let failure =
                Failure::invalid("--json tells what a command wrote when it has ended, and gives it no stdin");
            return Err(failure.hint("leave out --json, or -i"));
        }
        let result: GuestExecResult = session.call("guest-exec", &GuestExec { name, command })?;
        session.output.answer(&result, |_| String::new())?;
        result.code
    } else {
        let request = GuestExecStream { name, command, stdin };
        session.client()?.attach(&request, std::io::stdin(), session.output)?.code
    };
    Ok(u8::try_from(code).unwrap_or(1))
}

fn checkpoint(session: &Session, name: String, tag: Option<String>, stop: bool) -> Result<()> {
    let label = format!("checkpointing {name}");
    let result: GuestCheckpointResult =
        session.work("guest-checkpoint", &GuestCheckpoint { name, tag, stop }, &label)?;
    session.output.answer(&result, |result| {
        let (memory, stored) = (units::size(result.memory_bytes), units::size(result.bytes_stored));
        let frozen = units::duration(result.frozen_seconds);
        format!(
            "{}\n{}\n{memory} of memory, {stored} added to the store; it stood still for {frozen}\n",
            result.state, result.instance
        )
    })
}

fn restore(session: &Session, name: String, tag: Option<String>) -> Result<()> {
    let label = format!("restoring {name}");
    let info: GuestInfo = session.work("guest-restore", &GuestRestore { name, tag }, &label)?;
    session.output.answer(&info, |info| format!("guest {} goes on{}\n", info.name, process(info)))
}

fn remove(session: &Session, name: String, force: bool) -> Result<()> {
    let info: GuestInfo = session.work("guest-remove", &GuestRemove { name, force }, "removing")?;
    session.output.answer(&info, |info| format!("removed guest {}\n", info.name))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_state_says_which_way_the_peer_lies() {
        let told = |state: &str, activity: &str, peer: Option<&str>, has_run: bool| {
            let info = serde_json::json!({
                "name": "web", "driver": "process", "on": "base", "state": state, "activity": activity, "epoch": 1,
                "peer": peer, "options": {}, "has_run": has_run
            });
            super::state(&serde_json::from_value(info).unwrap())
        };
        assert_eq!(told("running", "running", Some("edge"), true), "running, from edge");
        assert_eq!(told("away", "absent", Some("edge"), true), "away, at edge");
        assert_eq!(told("arriving", "absent", Some("edge"), false), "arriving, from edge");
        assert_eq!(told("running", "absent", None, true), "ended by itself");
        assert_eq!(told("running", "frozen", Some("edge"), true), "running, but frozen, from edge");
        assert_eq!(told("created", "absent", None, true), "stopped");
        assert_eq!(told("created", "absent", None, false), "created");
    }
}
