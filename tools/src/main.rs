//! layerctl: the one binary that a person runs. As `mount.layerfs` it is mount(8)'s helper; as `layerctl daemon
//! --foreground` it is the daemon.
//!
//! This file parses, dispatches and maps failures to exit codes.

mod api;
mod autostart;
mod aws;
mod cli;
mod client;
mod commands;
mod config;
mod credentials;
mod daemon;
mod failure;
mod generate;
mod keeper;
mod mount_helper;
mod output;
mod progress;
mod ssh;
mod units;

use std::ffi::OsStr;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use config::{Environment, Settings};
use failure::{Failure, Result};
use output::Output;

/// As a shell reports a program that SIGPIPE ended.
const EXIT_BROKEN_PIPE: u8 = 141;

fn main() -> ExitCode {
    let program = std::env::args_os().next().unwrap_or_default();
    let name = std::path::Path::new(&program).file_name().unwrap_or_default();
    if name == OsStr::new("mount.layerfs") || name == OsStr::new("mount.fuse.layerfs") {
        return ExitCode::from(mount_helper::main(std::env::args_os().skip(1)));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let output = Output::new(&cli.global);
    match run(cli, output) {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.is_broken_pipe() => ExitCode::from(EXIT_BROKEN_PIPE),
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.class.exit_code())
        }
    }
}

/// Tells of wrong usage as of any other failure, if JSON was asked for; else, and for help and version, as clap does.
fn misused(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args_os().skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--json");
    if !(wants_json && error.use_stderr()) {
        error.exit();
    }
    let failure = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Failure::invalid("a command is missing").hint("`--help` lists them")
        }
        _ => {
            let text = error.render().to_string();
            Failure::invalid(text.strip_prefix("error: ").unwrap_or(&text).trim_end())
        }
    };
    Output::json().failure(&failure);
    ExitCode::from(failure.class.exit_code())
}

fn run(cli: Cli, output: Output) -> Result<u8> {
    match cli.command {
        Command::Completions(args) => generate::completions(args.shell, &mut std::io::stdout().lock())?,
        Command::GuestLaunch(_) => launch(output)?,
        Command::Generate(args) => commands::system::generate(args, output)?,
        Command::Daemon(args) if matches!(args.action, Some(cli::system::DaemonAction::Hand)) => {
            commands::system::hand()?;
        }
        command => {
            let settings = settings(cli.global.store.as_deref(), &command)?;
            return commands::run(command, settings, output);
        }
    }
    Ok(0)
}

/// The settings in force.
fn settings(store: Option<&std::path::Path>, command: &Command) -> Result<Settings> {
    let environment = Environment::current();
    let found = Settings::find(store, &environment);
    let (keeps, becomes_daemon) = (commands::system::keeps_mounts(command), commands::system::becomes_daemon(command));
    if found.is_ok() || !(keeps || becomes_daemon) {
        return found;
    }
    match Settings::forgive(store, &environment) {
        // It was told the store, and needs nothing else.
        Ok(settings) if keeps => Ok(settings),
        // Programs wait for this daemon, and get errors if none comes: a mistake in the config file is not worth that.
        Ok(settings) if keeper::holder(&settings.store).is_some() => Ok(settings),
        _ => found,
    }
}

/// Obeys the daemon's orders about a guest.
fn launch(output: Output) -> Result<()> {
    let launched = migrator::guest::launch::main(std::io::stdin().lock());
    match launched.map_err(|detail| Failure::new(failure::Class::Failure, detail))? {
        Some(pid) => output.with_stdout(|out| Ok(std::io::Write::write_all(out, format!("{pid}\n").as_bytes())?)),
        None => Ok(()),
    }
}

/// A command's way out that is not a failure in itself: what it looked at is damaged, or isn't there.
fn code_of(is_fine: bool, class: failure::Class) -> u8 {
    if is_fine { 0 } else { class.exit_code() }
}

/// Makes `path` absolute without asking the file system: the daemon has another working folder.
fn absolute(path: &std::path::Path) -> Result<std::path::PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Failure::invalid("the path is empty; name a folder or a file"));
    }
    std::path::absolute(path).map_err(|e| Failure::file("find", path, e))
}
