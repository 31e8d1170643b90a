//! Where the settings come from, and which wins: command line, then environment, then the user's config file,
//! then the system's, then the platform's defaults.
//!
//! Pure but for reading the files: the environment comes in as a value, so that tests hold the precedence.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use layerfs::mount::awake::KeepAwake;
use serde::Deserialize;

use crate::api::peers::NetworkRequest;
use crate::failure::{Failure, Result};
use crate::units;

/// The port that daemons listen on for peers.
pub const DEFAULT_PORT: u16 = 7440;
/// How many seals may lie above each other: each look-up of a name that only the lowest has asks all of them.
pub const DEFAULT_SQUASH_PAST: u64 = 32;
/// Names the store.
pub const ENV_STORE: &str = "LAYERFS_STORE";
/// Names the one config file to read, instead of the system's and the user's.
pub const ENV_CONFIG: &str = "LAYERFS_CONFIG";
/// zstd's levels.
const COMPRESSION_LEVELS: std::ops::RangeInclusive<i32> = 1..=22;
/// The daemon's log filter.
pub const ENV_LOG: &str = "LAYERFS_LOG";

/// What of the process's surroundings the settings depend on.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// The variables that are set and not empty.
    pub variables: HashMap<OsString, OsString>,
    /// Whether the user is root.
    pub is_root: bool,
    /// The system's config file.
    pub system_config: PathBuf,
}

impl Environment {
    /// This process's.
    pub fn current() -> Environment {
        Environment {
            variables: std::env::vars_os().filter(|(_, value)| !value.is_empty()).collect(),
            is_root: rustix::process::geteuid().is_root(),
            system_config: PathBuf::from("/etc/layerfs/config.toml"),
        }
    }

    /// The path in variable `name`.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.variables.get(std::ffi::OsStr::new(name)).map(PathBuf::from)
    }

    /// The text in variable `name`.
    pub fn text(&self, name: &str) -> Option<String> {
        self.variables.get(std::ffi::OsStr::new(name)).map(|value| value.to_string_lossy().into_owned())
    }

    /// `$XDG_…`, or the folder below the home that stands for it.
    pub fn xdg(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let absolute = self.path(variable).filter(|path| path.is_absolute());
        absolute.or_else(|| self.path("HOME").map(|home| home.join(below_home)))
    }

    fn config_files(&self) -> Vec<PathBuf> {
        match self.path(ENV_CONFIG) {
            Some(only) => vec![only],
            None => {
                let user = self.xdg("XDG_CONFIG_HOME", ".config").map(|folder| folder.join("layerfs/config.toml"));
                std::iter::once(self.system_config.clone()).chain(user).collect()
            }
        }
    }

    fn default_store(&self) -> Result<PathBuf> {
        if self.is_root {
            return Ok(PathBuf::from("/var/lib/layerfs"));
        }
        let data = self.xdg("XDG_DATA_HOME", ".local/share");
        data.map(|folder| folder.join("layerfs")).ok_or_else(|| {
            Failure::invalid("there is no default store without a home folder; use --store PATH or set LAYERFS_STORE")
        })
    }
}

/// A config file. Every key is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    store: Option<PathBuf>,
    listen: Option<String>,
    idle_minutes: Option<u64>,
    cache: Option<String>,
    compression: Option<i32>,
    threads: Option<usize>,
    limit: Option<String>,
    lazy_timeout_seconds: Option<u64>,
    log: Option<String>,
    squash_past: Option<u64>,
    slow_request: Option<String>,
    metrics: Option<std::net::SocketAddr>,
    tier_credentials: Option<PathBuf>,
    tier_profile: Option<String>,
    #[serde(default, deserialize_with = "word_or_number")]
    connections: Option<String>,
    transport: Option<String>,
    retry_for: Option<String>,
    connect_timeout: Option<String>,
    idle_timeout: Option<String>,
    connect_from: Option<Vec<std::net::IpAddr>>,
    warm_copies: Option<String>,
    keep_awake: Option<String>,
}

/// What may be written with quotes or without.
fn word_or_number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number, or a word in quotes")]
    enum Value {
        Word(String),
        Number(u64),
    }
    Ok(Some(match Value::deserialize(deserializer)? {
        Value::Word(word) => word,
        Value::Number(number) => number.to_string(),
    }))
}

impl ConfigFile {
    /// Says nothing but that no port is opened: what can't be read may have said so.
    fn closed() -> ConfigFile {
        ConfigFile { listen: Some("off".to_owned()), ..ConfigFile::default() }
    }

    /// None if there is no such file.
    fn read(path: &Path, mistakes: &mut Mistakes) -> Result<Option<ConfigFile>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let hint = format!(
                    "set HOME to this user's own folder, or {ENV_CONFIG} to the config file to read (/dev/null for none)"
                );
                return Err(Failure::file("read", path, error).hint(hint));
            }
            Err(error) => return Err(Failure::file("read", path, error)),
        };
        let wrong =
            |error: toml::de::Error| Failure::invalid(format!("{}: {}", path.display(), error.to_string().trim_end()));
        match toml::from_str(&text) {
            Ok(file) => return Ok(Some(file)),
            Err(error) if !mistakes.are_forgiven => return Err(wrong(error)),
            Err(_) => {}
        }
        let mut file = ConfigFile::default();
        for (key, value) in toml::from_str::<toml::Table>(&text).map_err(wrong)? {
            let is_listen = key == "listen";
            let one = toml::Table::from_iter([(key, value)]).try_into::<ConfigFile>().map_err(wrong);
            let or = if is_listen { ConfigFile::closed() } else { ConfigFile::default() };
            file = mistakes.allow(one)?.unwrap_or(or).over(file);
        }
        Ok(Some(file))
    }

    /// `self`, with `below` where it says nothing.
    fn over(self, below: ConfigFile) -> ConfigFile {
        ConfigFile {
            store: self.store.or(below.store),
            listen: self.listen.or(below.listen),
            idle_minutes: self.idle_minutes.or(below.idle_minutes),
            cache: self.cache.or(below.cache),
            compression: self.compression.or(below.compression),
            threads: self.threads.or(below.threads),
            limit: self.limit.or(below.limit),
            lazy_timeout_seconds: self.lazy_timeout_seconds.or(below.lazy_timeout_seconds),
            log: self.log.or(below.log),
            squash_past: self.squash_past.or(below.squash_past),
            slow_request: self.slow_request.or(below.slow_request),
            metrics: self.metrics.or(below.metrics),
            tier_credentials: self.tier_credentials.or(below.tier_credentials),
            tier_profile: self.tier_profile.or(below.tier_profile),
            connections: self.connections.or(below.connections),
            transport: self.transport.or(below.transport),
            retry_for: self.retry_for.or(below.retry_for),
            connect_timeout: self.connect_timeout.or(below.connect_timeout),
            idle_timeout: self.idle_timeout.or(below.idle_timeout),
            connect_from: self.connect_from.or(below.connect_from),
            warm_copies: self.warm_copies.or(below.warm_copies),
            keep_awake: self.keep_awake.or(below.keep_awake),
        }
    }
}

/// What is done about what is wrong in the config file or the environment.
#[derive(Debug, Default)]
struct Mistakes {
    /// What is wrong is left out.
    are_forgiven: bool,
    /// What was left out, and why.
    found: Vec<String>,
}

impl Mistakes {
    /// The value; none if it is wrong and that is forgiven.
    fn allow<T>(&mut self, value: Result<T>) -> Result<Option<T>> {
        match value {
            Err(failure) if self.are_forgiven => {
                self.found.push(failure.message);
                Ok(None)
            }
            value => value.map(Some),
        }
    }
}

/// Whether and where the daemon listens for peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// On all addresses at [`DEFAULT_PORT`], as soon as there is a peer.
    WhenPeersExist,
    /// Never.
    Off,
    /// Here, always; not being able to is an error.
    At(String),
}

impl std::str::FromStr for Listen {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Listen> {
        match text {
            "auto" => Ok(Listen::WhenPeersExist),
            "off" => Ok(Listen::Off),
            address => parse_listen(address),
        }
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Listen::WhenPeersExist => "auto",
            Listen::Off => "off",
            Listen::At(address) => address,
        })
    }
}

fn parse_listen(text: &str) -> Result<Listen> {
    use std::net::{IpAddr, SocketAddr};
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(Listen::At(address.to_string()));
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DEFAULT_PORT)).map_err(|_| {
        Failure::invalid(format!(
            "{text:?} is no address to listen on; use ADDRESS[:PORT] such as 0.0.0.0:{DEFAULT_PORT}, `auto` or `off`"
        ))
    })?;
    Ok(Listen::At(address.to_string()))
}

/// The settings in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The store's folder, absolute.
    pub store: PathBuf,
    /// What chose it, for messages.
    pub store_chosen_by: &'static str,
    /// Whether and where to listen for peers.
    pub listen: Listen,
    /// After how long without work an auto-started daemon exits.
    pub idle: Duration,
    /// Size of the cache of plain chunks, in bytes.
    pub cache_bytes: Option<u64>,
    /// What plain copies of large files that are read often may take of the disk, in bytes.
    pub warm_bytes: Option<u64>,
    /// When processors are kept from halting while mounts are asked often.
    pub keep_awake: KeepAwake,
    /// zstd level of new chunks.
    pub compression: Option<i32>,
    /// Threads for chunking and compressing.
    pub threads: Option<usize>,
    /// What all transfers together may take of the network, each way, in bytes per second.
    pub limit: Option<u64>,
    /// After so long a read of what is still on its way fails.
    pub lazy_timeout: Duration,
    /// The daemon's log filter.
    pub log: String,
    /// A seal that makes more than so many layers of one kind above each other squashes them; 0: none does.
    pub squash_past: u64,
    /// Requests of mounts that take longer are told of in the log; zero: none.
    pub slow_request: Duration,
    /// Where metrics can be had without the control socket.
    pub metrics: Option<std::net::SocketAddr>,
    /// The AWS credentials file with the keys for the second tier.
    pub tier_credentials: Option<PathBuf>,
    /// Its profile.
    pub tier_profile: Option<String>,
    /// How transfers use the network, unless they say otherwise.
    pub network: NetworkRequest,
    /// The local addresses to call from.
    pub connect_from: Vec<std::net::IpAddr>,
    /// What [`Settings::forgive`] has left out.
    pub mistakes: Vec<String>,
}

impl Settings {
    /// Finds the settings; `store` is what the command line says.
    ///
    /// # Errors
    /// A config file that can't be read or has a wrong key or value; no home folder to put a store in.
    pub fn find(store: Option<&Path>, environment: &Environment) -> Result<Settings> {
        Settings::gather(store, environment, Mistakes::default())
    }

    /// The same without what is wrong, for a daemon that must start.
    ///
    /// # Errors
    /// No home folder to put a store in.
    pub fn forgive(store: Option<&Path>, environment: &Environment) -> Result<Settings> {
        Settings::gather(store, environment, Mistakes { are_forgiven: true, ..Mistakes::default() })
    }

    fn gather(store: Option<&Path>, environment: &Environment, mut mistakes: Mistakes) -> Result<Settings> {
        let mut file = ConfigFile::default();
        let mut read_from = Vec::new();
        for path in environment.config_files() {
            let read = match ConfigFile::read(&path, &mut mistakes) {
                Ok(None) if environment.path(ENV_CONFIG).is_some() => {
                    let text = format!("the config file {} that {ENV_CONFIG} names does not exist", path.display());
                    Err(Failure::new(crate::failure::Class::NotFound, text))
                }
                Ok(Some(file)) => {
                    read_from.push(path.display().to_string());
                    Ok(file)
                }
                read => read.map(Option::unwrap_or_default),
            };
            file = mistakes.allow(read)?.unwrap_or_else(ConfigFile::closed).over(file);
        }
        let place = format!("the config file {}", read_from.join(" or "));
        let whole = |name: &str, path: Option<PathBuf>| match path {
            Some(path) if !path.is_absolute() => Err(Failure::invalid(format!(
                "{name} = {path:?} in {place} is no whole path; write one that begins with /"
            ))),
            path => Ok(path),
        };
        let is_named = store.is_some() || environment.path(ENV_STORE).is_some();
        // A daemon that leaves this out would take another store for its own.
        let stored = match whole("store", file.store.take()) {
            Err(failure) if !is_named => return Err(failure),
            checked => mistakes.allow(checked)?.flatten(),
        };
        let (store, store_chosen_by) = if let Some(path) = store {
            (path.to_owned(), "--store")
        } else if let Some(path) = environment.path(ENV_STORE) {
            (path, ENV_STORE)
        } else if let Some(path) = stored {
            (path, "the config file")
        } else {
            (environment.default_store()?, "default")
        };
        let size = |name: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => units::parse_size(text).map(Some).ok_or_else(|| {
                Failure::invalid(format!("{name} = {text:?} in {place} is no size; write it like \"64 MiB\""))
            }),
        };
        let cache_bytes = mistakes.allow(size("cache", &file.cache))?.flatten();
        let warm_bytes = mistakes.allow(size("warm_copies", &file.warm_copies))?.flatten();
        let limit = match file.limit.as_deref() {
            None | Some("none") => Ok(None),
            Some(text) => units::parse_rate(text).map(Some).ok_or_else(|| {
                Failure::invalid(format!(
                    "limit = {text:?} in {place} is no rate; write it like \"100Mbit\" or \"10 MiB\", or \"none\""
                ))
            }),
        };
        let limit = mistakes.allow(limit)?.flatten();
        let compression = match file.compression {
            Some(level) if !COMPRESSION_LEVELS.contains(&level) => {
                let (least, most) = (*COMPRESSION_LEVELS.start(), *COMPRESSION_LEVELS.end());
                Err(Failure::invalid(format!(
                    "compression = {level} in {place} is no level of zstd; write one from {least} to {most}"
                )))
            }
            level => Ok(level),
        };
        let compression = mistakes.allow(compression)?.flatten();
        let time = |name: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => units::parse_time(text).map(Some).ok_or_else(|| {
                Failure::invalid(format!("{name} = {text:?} in {place} is no time; write it like \"30s\""))
            }),
        };
        let connections = file.connections.as_deref().map(str::parse::<crate::cli::transfers::Connections>);
        let wrong = |why| Failure::invalid(format!("connections in {place}: {why}"));
        let network = NetworkRequest {
            connections: mistakes.allow(connections.transpose().map_err(wrong))?.flatten().map(|count| count.0),
            transport: file.transport,
            retry_for_seconds: mistakes.allow(time("retry_for", &file.retry_for))?.flatten(),
            connect_seconds: mistakes.allow(time("connect_timeout", &file.connect_timeout))?.flatten(),
            idle_seconds: mistakes.allow(time("idle_timeout", &file.idle_timeout))?.flatten(),
            stream: None,
        };
        let checked = match crate::daemon::ops::peers::paths(&network) {
            Ok(_) => Ok(network),
            Err(failure) => Err(Failure::invalid(format!("{failure} (in {place})"))),
        };
        let network = mistakes.allow(checked)?.unwrap_or_default();
        let slow_request = mistakes.allow(time("slow_request", &file.slow_request))?.flatten();
        let keep_awake = match file.keep_awake.as_deref() {
            None | Some("auto") => Ok(KeepAwake::Auto),
            Some("always") => Ok(KeepAwake::Always),
            Some("never") => Ok(KeepAwake::Never),
            Some(text) => Err(Failure::invalid(format!(
                "keep_awake = {text:?} in {place} is unknown; write \"auto\", \"always\" or \"never\""
            ))),
        };
        let keep_awake = mistakes.allow(keep_awake)?.unwrap_or_default();
        let of_file = |failure: Failure| Failure::invalid(format!("listen in {place}: {failure}"));
        let listen = file.listen.map_or(Ok(Listen::WhenPeersExist), |text| text.parse().map_err(of_file));
        let listen = mistakes.allow(listen)?.unwrap_or(Listen::Off);
        let filter = |text: Option<String>, place: &str| match text.as_deref().map(crate::daemon::log::parse) {
            Some(Err(failure)) => Err(failure.hint(format!("it comes from {place}"))),
            _ => Ok(text),
        };
        let log_of_file = mistakes.allow(filter(file.log, &format!("`log` in {place}")))?.flatten();
        let log = mistakes.allow(filter(environment.text(ENV_LOG), ENV_LOG))?.flatten().or(log_of_file);
        Ok(Settings {
            network,
            connect_from: file.connect_from.unwrap_or_default(),
            store: std::path::absolute(&store).map_err(|e| Failure::file("find", &store, e))?,
            store_chosen_by,
            listen,
            idle: Duration::from_secs(file.idle_minutes.unwrap_or(5).saturating_mul(60)),
            cache_bytes,
            warm_bytes,
            keep_awake,
            compression,
            threads: file.threads,
            limit,
            squash_past: file.squash_past.unwrap_or(DEFAULT_SQUASH_PAST),
            slow_request: Duration::from_secs(slow_request.unwrap_or(2)),
            metrics: file.metrics,
            tier_credentials: mistakes.allow(whole("tier_credentials", file.tier_credentials))?.flatten(),
            tier_profile: file.tier_profile,
            lazy_timeout: Duration::from_secs(file.lazy_timeout_seconds.unwrap_or(30).max(1)),
            log: log.unwrap_or_else(|| "info".to_owned()),
            mistakes: mistakes.found,
        })
    }

    /// What to tell if the credentials file that the config file names isn't there. It is read whenever it is needed, and
    /// may come later, so that this is no failure.
    pub fn missing_credentials(&self) -> Option<String> {
        let path = self.tier_credentials.as_ref().filter(|path| !path.exists())?;
        let place = path.display();
        Some(format!(
            "{place}, which tier_credentials in the config file names, does not exist: the second tier has no keys"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        folder: PathBuf,
        environment: Environment,
    }

    impl Scene {
        fn new(name: &str) -> Scene {
            let folder = std::env::temp_dir().join(format!("layerctl-config-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir_all(folder.join("home/.config/layerfs")).unwrap();
            let variables = HashMap::from([("HOME".into(), folder.join("home").into_os_string())]);
            let environment = Environment { variables, is_root: false, system_config: folder.join("system.toml") };
            Scene { folder, environment }
        }

        fn system(&self, text: &str) {
            std::fs::write(self.folder.join("system.toml"), text).unwrap();
        }

        fn user(&self, text: &str) {
            std::fs::write(self.folder.join("home/.config/layerfs/config.toml"), text).unwrap();
        }

        fn find(&self, flag: Option<&str>) -> Result<Settings> {
            Settings::find(flag.map(Path::new), &self.environment)
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    #[test]
    fn defaults_follow_the_platform() {
        let mut scene = Scene::new("defaults");
        assert_eq!(scene.find(None).unwrap().store, scene.folder.join("home/.local/share/layerfs"));
        scene.environment.variables.insert("XDG_DATA_HOME".into(), "/data".into());
        assert_eq!(scene.find(None).unwrap().store, Path::new("/data/layerfs"));
        scene.environment.is_root = true;
        assert_eq!(scene.find(None).unwrap().store, Path::new("/var/lib/layerfs"));
        let homeless = Environment { system_config: "/nonexistent".into(), ..Environment::default() };
        assert!(Settings::find(None, &homeless).unwrap_err().message.contains("--store"));
    }

    #[test]
    fn the_nearer_source_wins() {
        let mut scene = Scene::new("precedence");
        scene.system("store = \"/system\"\ncompression = 5\nlisten = \"off\"\n");
        let settings = scene.find(None).unwrap();
        assert_eq!((settings.store.as_path(), settings.compression), (Path::new("/system"), Some(5)));
        scene.user("store = \"/user\"\ncache = \"64 MiB\"\n");
        let settings = scene.find(None).unwrap();
        assert_eq!((settings.store.as_path(), settings.compression), (Path::new("/user"), Some(5)));
        assert_eq!((settings.listen, settings.cache_bytes), (Listen::Off, Some(64 << 20)));
        scene.environment.variables.insert(ENV_STORE.into(), "/variable".into());
        assert_eq!(scene.find(None).unwrap().store, Path::new("/variable"));
        let settings = scene.find(Some("/flag")).unwrap();
        assert_eq!((settings.store.as_path(), settings.store_chosen_by), (Path::new("/flag"), "--store"));
    }

    #[test]
    fn a_named_config_file_is_the_only_one() {
        let mut scene = Scene::new("named");
        scene.user("store = \"/user\"\n");
        let named = scene.folder.join("named.toml");
        scene.environment.variables.insert(ENV_CONFIG.into(), named.clone().into_os_string());
        assert_eq!(scene.find(None).unwrap_err().class, crate::failure::Class::NotFound);
        std::fs::write(&named, "log = \"debug\"\n").unwrap();
        let settings = scene.find(None).unwrap();
        assert_eq!(settings.log, "debug");
        assert_ne!(settings.store, Path::new("/user"));
    }

    #[test]
    fn mistakes_are_told_with_the_file() {
        let scene = Scene::new("mistakes");
        scene.user("stor = \"/user\"\n");
        let message = scene.find(None).unwrap_err().message;
        assert!(
            message.contains("config.toml") && message.contains("stor") && message.contains("idle_minutes"),
            "{message}"
        );
        scene.user("listen = \"everywhere\"\n");
        let message = scene.find(None).unwrap_err().message;
        assert!(message.contains("everywhere") && message.contains("listen in the config file"), "{message}");
        scene.user("limit = \"fast\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("100Mbit"));
        scene.user("limit = \"8Mbit\"\n");
        assert_eq!(scene.find(None).unwrap().limit, Some(1_000_000));
        scene.user("cache = \"lots\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("64 MiB"));
        for level in ["0", "23", "99", "-3"] {
            scene.user(&format!("compression = {level}\n"));
            assert!(scene.find(None).unwrap_err().message.contains("from 1 to 22"));
        }
        scene.user("compression = 22\n");
        assert_eq!(scene.find(None).unwrap().compression, Some(22));
        scene.user("tier_credentials = \"/nonexistent/keys\"\n");
        let missing = scene.find(None).unwrap().missing_credentials();
        assert!(missing.is_some_and(|text| text.contains("/nonexistent/keys") && text.contains("tier_credentials")));
        scene.user("warm_copies = \"many\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("warm_copies"));
        scene.user("transport = \"pigeon\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("pigeon"));
        scene.user("keep_awake = \"sometimes\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("sometimes"));
        scene.user("keep_awake = \"never\"\n");
        assert_eq!(scene.find(None).unwrap().keep_awake, KeepAwake::Never);
        for connections in ["4", "\"4\""] {
            scene.user(&format!("connections = {connections}\n"));
            assert_eq!(scene.find(None).unwrap().network.connections, Some(4));
        }
        scene.user("connections = [4]\n");
        assert!(scene.find(None).unwrap_err().message.contains("expected a number, or a word"));
        scene.user("warm_copies = \"0\"\n");
        assert_eq!(scene.find(None).unwrap().warm_bytes, Some(0));
    }

    #[test]
    fn paths_in_a_config_file_are_whole() {
        let scene = Scene::new("whole");
        for line in ["store = \"data\"\n", "store = \"~/data\"\n", "tier_credentials = \"~/keys\"\n"] {
            scene.user(line);
            let failure = scene.find(None).unwrap_err();
            assert_eq!(failure.class, crate::failure::Class::Invalid);
            assert!(failure.message.contains("whole path"), "{failure}");
        }
        scene.user("store = \"data\"\n");
        assert!(scene.find(Some("/flag")).is_err(), "a mistake is one wherever the store is");
        let forgiven = Settings::forgive(Some(Path::new("/flag")), &scene.environment).unwrap();
        assert_eq!((forgiven.store.as_path(), forgiven.mistakes.len()), (Path::new("/flag"), 1));
        assert!(Settings::forgive(None, &scene.environment).is_err(), "no other store is taken instead");
    }

    #[test]
    fn a_wrong_log_filter_is_told_wherever_it_comes_from() {
        let mut scene = Scene::new("filter");
        scene.user("log = \"foo=bar=baz\"\n");
        assert!(scene.find(None).unwrap_err().message.contains("`log` in the config file"));
        // Another process, without the variable, is to start with the same file.
        scene.environment.variables.insert(ENV_LOG.into(), "debug".into());
        assert!(scene.find(None).is_err());
        scene.user("log = \"warn\"\n");
        assert_eq!(scene.find(None).unwrap().log, "debug");
        scene.environment.variables.insert(ENV_LOG.into(), "=x=y".into());
        assert!(scene.find(None).unwrap_err().message.contains(ENV_LOG));
    }

    #[test]
    fn what_is_wrong_can_be_left_out() {
        let mut scene = Scene::new("forgiven");
        let forgive = |scene: &Scene| Settings::forgive(Some(Path::new("/flag")), &scene.environment).unwrap();
        scene.user(
            "log = \"foo=bar=baz\"\ncompression = 99\ncache = \"lots\"\nwarm_copies = \"many\"\nlimit = \"fast\"\n\
             slow_request = \"soon\"\nretry_for = \"never\"\nconnections = \"99\"\ntransport = \"pigeon\"\n\
             listen = \"everywhere\"\nsquash_past = 7\n",
        );
        let settings = forgive(&scene);
        assert_eq!(settings.mistakes.len(), 10, "{:#?}", settings.mistakes);
        assert_eq!((settings.log.as_str(), settings.compression, settings.squash_past), ("info", None, 7));
        assert_eq!(settings.listen, Listen::Off, "no port is opened on a guess");
        // Keys that aren't known or are of another type cost only themselves.
        scene.system("listen = \"10.0.0.1\"\ncompression = \"high\"\n");
        scene.user("stor = \"/x\"\nmetrics = \"here\"\nthreads = 3\n");
        let settings = forgive(&scene);
        assert_eq!(settings.mistakes.len(), 3, "{:#?}", settings.mistakes);
        assert_eq!((settings.threads, settings.listen), (Some(3), Listen::At("10.0.0.1:7440".into())));
        scene.user("listen = 7440\n");
        assert_eq!(forgive(&scene).listen, Listen::Off);
        scene.user("listen = \n");
        assert_eq!((forgive(&scene).listen, forgive(&scene).mistakes.len()), (Listen::Off, 2));
        scene.environment.variables.insert(ENV_CONFIG.into(), scene.folder.join("none.toml").into_os_string());
        assert_eq!((forgive(&scene).listen, forgive(&scene).mistakes.len()), (Listen::Off, 1));
    }

    #[test]
    fn listen_addresses() {
        assert_eq!("::1".parse::<Listen>().unwrap(), Listen::At("[::1]:7440".into()));
        assert_eq!("10.0.0.1:9".parse::<Listen>().unwrap(), Listen::At("10.0.0.1:9".into()));
        assert_eq!("auto".parse::<Listen>().unwrap(), Listen::WhenPeersExist);
    }
}
