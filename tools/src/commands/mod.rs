//! What each command does: asks the daemon, writes the answer.

pub mod activity;
pub mod guests;
pub mod inspect;
pub mod layers;
pub mod migrate;
pub mod mounts;
pub mod peers;
pub mod registry;
pub mod squash;
pub mod storage;
pub mod system;
pub mod tier;
pub mod transfers;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::autostart::{self, StoreUse};
use crate::cli::Command;
use crate::client::Client;
use crate::config::Settings;
use crate::failure::Result;
use crate::output::Output;
use crate::progress::Display;

/// What a command works with.
pub struct Session {
    /// The settings in force.
    pub settings: Settings,
    /// How to write.
    pub output: Output,
}

impl Session {
    /// The daemon's client, the daemon started if need be.
    pub fn client(&self) -> Result<Client> {
        Ok(autostart::ensure(&self.settings, StoreUse::MustExist)?.telling(self.output))
    }

    /// The same, the store made if need be.
    pub fn client_of_new_store(&self) -> Result<Client> {
        Ok(autostart::ensure(&self.settings, StoreUse::MayCreate)?.telling(self.output))
    }

    /// Does a short operation.
    pub fn call<Q: Serialize, R: DeserializeOwned>(&self, operation: &str, request: &Q) -> Result<R> {
        self.client()?.call(operation, request)
    }

    /// Does a long operation that has no items, showing its progress as `label`.
    pub fn work<Q: Serialize, R: DeserializeOwned>(&self, operation: &str, request: &Q, label: &str) -> Result<R> {
        let mut display = Display::new(self.output, label);
        self.client()?.work(operation, request, &mut display, &mut |_| Ok(()))
    }
}

/// Runs `command`; returns the exit code.
pub fn run(command: Command, settings: Settings, output: Output) -> Result<u8> {
    let session = &Session { settings, output };
    match command {
        Command::Import(args) => layers::import(session, args)?,
        Command::Export(args) => layers::export(session, args)?,
        Command::Tag(args) => layers::tag(session, args)?,
        Command::Squash(args) => squash::squash(session, args)?,
        Command::Remove(args) => layers::remove(session, args)?,
        Command::List(args) => return layers::list(session, args),
        Command::Tree(args) => layers::tree(session, args)?,
        Command::Log(args) => layers::log(session, args)?,
        Command::Inspect(args) => inspect::inspect(session, args)?,
        Command::Diff(args) => inspect::diff(session, args)?,
        Command::Trace(args) => inspect::trace(session, args)?,
        Command::Mount(args) => mounts::mount(session, args)?,
        Command::Umount(args) => mounts::umount(session, args)?,
        Command::Seal(args) => mounts::seal(session, args)?,
        Command::Mounts(args) if args.requests => activity::requests(session, args.longer)?,
        Command::Mounts(args) if args.rates || args.watch => activity::rates(session, args.watch)?,
        Command::Mounts(_) => mounts::list(session)?,
        Command::Uppers(args) => mounts::uppers(session, args)?,
        Command::Push(args) => peers::push(session, args)?,
        Command::Pull(args) => peers::pull(session, args)?,
        Command::Transfers(args) => transfers::transfers(session, args)?,
        Command::Limit(args) => transfers::limit(session, args)?,
        Command::Peer(args) => peers::peer(session, args)?,
        Command::Stdio(_) => peers::stdio(session)?,
        Command::Stat(_) => storage::stat(session)?,
        Command::Du(args) => storage::du(session, args)?,
        Command::Why(args) => inspect::why(session, args)?,
        Command::Gc(args) => storage::gc(session, args)?,
        Command::Fsck(args) => return storage::fsck(session, args),
        Command::Scrub(args) => return storage::scrub(session, args),
        Command::Tier(args) => tier::tier(session, args)?,
        Command::Daemon(args) => return system::daemon(session, args),
        Command::Version(_) => system::version(session)?,
        Command::Guest(args) => return guests::guest(session, args),
        Command::Migrate(args) => return migrate::migrate(session, args),
        Command::Report(args) => migrate::report(session, args)?,
        Command::Completions(_) | Command::Generate(_) | Command::GuestLaunch(_) => {}
    }
    Ok(0)
}
