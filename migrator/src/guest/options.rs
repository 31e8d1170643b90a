//! What guests' drivers have to know, as it stands in a [`super::GuestSpec`].
//!
//! Invariant: what a driver doesn't know is refused when the guest is created, not when it is started.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use layerfs::{Error, Result};
use serde::{Deserialize, Serialize};

use super::GuestName;

/// How a guest is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Network {
    /// A network of its own with nothing but `lo`.
    #[default]
    None,
    /// A bridge of the host, by a pair of interfaces: `eth0` in the guest.
    Bridge {
        /// The bridge's name, on every host that the guest comes to.
        bridge: String,
        /// The guest's address with its prefix's length: "10.0.0.2/24".
        address: String,
        /// The way out.
        #[serde(default)]
        gateway: Option<IpAddr>,
    },
}

impl Network {
    /// `none`, or `bridge:BRIDGE,ADDRESS/LENGTH[,GATEWAY]`.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn parse(text: &str) -> Result<Network> {
        let bad = || {
            let detail = format!("{text:?} is no network: use none or bridge:BRIDGE,ADDRESS/LENGTH[,GATEWAY]");
            Error::invalid(detail)
        };
        if text == "none" {
            return Ok(Network::None);
        }
        let parts: Vec<&str> = text.strip_prefix("bridge:").ok_or_else(bad)?.split(',').collect();
        let (bridge, address, gateway) = match parts[..] {
            [bridge, address] => (bridge, address, None),
            [bridge, address, gateway] => (bridge, address, Some(gateway.parse().map_err(|_| bad())?)),
            _ => return Err(bad()),
        };
        let network = Network::Bridge { bridge: bridge.to_owned(), address: address.to_owned(), gateway };
        network.check()?;
        Ok(network)
    }

    /// Whether its parts can be what they stand for: they may come from another host.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self) -> Result<()> {
        let Network::Bridge { bridge, address, .. } = self else { return Ok(()) };
        let is_name = !bridge.is_empty()
            && bridge.len() <= 15
            && bridge.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && !bridge.starts_with(['-', '.']);
        if !is_name {
            return Err(Error::invalid(format!("{bridge:?} is no name of a bridge")));
        }
        let parts = address.split_once('/');
        let parts = parts.and_then(|(ip, length)| Some((ip.parse::<IpAddr>().ok()?, length.parse::<u8>().ok()?)));
        match parts {
            Some((IpAddr::V4(_), 0..=32) | (IpAddr::V6(_), 0..=128)) => Ok(()),
            _ => Err(Error::invalid(format!("{address:?} is no address with its length, such as 10.0.0.2/24"))),
        }
    }

    /// The guest's hardware address: the same on every host, so that its neighbours need not learn a new one.
    pub fn hardware_address(guest: &GuestName) -> String {
        Network::hardware_text(Network::hardware_bytes(guest))
    }

    /// The same, as it stands in frames.
    pub fn hardware_bytes(guest: &GuestName) -> [u8; 6] {
        let hash = blake3::hash(guest.as_str().as_bytes());
        let bytes = hash.as_bytes();
        // Locally administered, of one interface.
        [2, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]]
    }

    /// A hardware address as people write it.
    pub fn hardware_text(bytes: [u8; 6]) -> String {
        bytes.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// The options of drivers "process", "oci" and "lxc".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerOptions {
    /// The first process: a program in the guest and its arguments.
    pub command: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Its working folder in the guest.
    #[serde(default = "root")]
    pub folder: PathBuf,
    /// The host's name that the guest sees; its own by default.
    #[serde(default)]
    pub hostname: Option<String>,
    /// A file in the guest to which what it writes on its standard output and error is appended.
    #[serde(default)]
    pub log: Option<PathBuf>,
    /// How it is connected.
    #[serde(default)]
    pub network: Network,
}

fn root() -> PathBuf {
    PathBuf::from("/")
}

impl ContainerOptions {
    /// Reads and checks a spec's options.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn read(options: &serde_json::Value) -> Result<ContainerOptions> {
        let options: ContainerOptions =
            serde_json::from_value(options.clone()).map_err(|e| Error::invalid(format!("the guest's options: {e}")))?;
        options.network.check()?;
        match options.command.first() {
            None => {
                return Err(Error::invalid("the guest has no command: name its first program, with its whole path"));
            }
            Some(program) if !program.starts_with('/') => {
                return Err(Error::invalid(format!(
                    "{program:?} is not a whole path in the guest, such as /sbin/init"
                )));
            }
            Some(_) => {}
        }
        let has_zero = |text: &String| text.contains('\0');
        if options.command.iter().chain(options.env.values()).chain(options.env.keys()).any(has_zero) {
            return Err(Error::invalid("a word of the guest's command holds a zero byte"));
        }
        if !options.folder.is_absolute() || options.log.as_ref().is_some_and(|log| !log.is_absolute()) {
            return Err(Error::invalid("paths in the guest begin with /"));
        }
        Ok(options)
    }

    /// Its environment, with a `PATH` if it sets none.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        let usual = || "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
        env.entry("PATH".to_owned()).or_insert_with(usual);
        env
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_checked() {
        assert_eq!(Network::parse("none").unwrap(), Network::None);
        let bridge = Network::parse("bridge:br0,10.0.0.2/24,10.0.0.1").unwrap();
        let gateway = Some("10.0.0.1".parse().unwrap());
        assert_eq!(bridge, Network::Bridge { bridge: "br0".into(), address: "10.0.0.2/24".into(), gateway });
        for bad in
            ["", "bridge:", "bridge:br0", "bridge:-x,10.0.0.2/24", "bridge:br0,10.0.0.2", "bridge:br0,10.0.0.2/33"]
        {
            assert!(Network::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_of_containers_are_checked() {
        let read = |json: serde_json::Value| ContainerOptions::read(&json);
        assert!(read(serde_json::json!({ "command": ["/bin/prog", "x"] })).is_ok());
        assert!(read(serde_json::json!({ "command": ["prog"] })).is_err());
        assert!(read(serde_json::json!({ "command": [] })).is_err());
        assert!(read(serde_json::json!({ "command": ["/bin/prog"], "unknown": 1 })).is_err());
        assert!(read(serde_json::json!({ "command": ["/bin/prog\u{0}"] })).is_err());
        assert!(read(serde_json::json!({ "command": ["/bin/prog"], "folder": "x" })).is_err());
    }
}
