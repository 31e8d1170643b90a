//! The hosts that this one knows: name, address, key, and what they may do. Kept in the store's database.
//!
//! FORMAT.md, "Peers". Invariants: a peer is found by its key, never by its address; two peers never have the same
//! key; what isn't granted is denied.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use layerfs::codec::{Put, Reader};
use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::{Error, LayerName, Result};
use parking_lot::Mutex;
use serde::Serialize;

use crate::identity::PublicKey;

/// The port that peers listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 7440;

const RECORD_VERSION: u8 = 1;
const MAX_ADDRESS: usize = 300;
/// The longest name that DNS has.
const MAX_HOST: usize = 253;
const MAX_ADDRESSES: usize = 16;
const MAX_PATTERNS: usize = 1000;

/// What a person calls a peer: 1 to 64 letters, digits and `. _ -`, the first a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct PeerName(String);

impl PeerName {
    /// Checks `text`.
    pub fn new(text: &str) -> Result<PeerName> {
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || text.len() > 64 || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            return Err(Error::invalid(format!(
                "{text:?} is not a peer's name: use up to 64 letters, digits and . _ -"
            )));
        }
        Ok(PeerName(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for PeerName {
    type Err = Error;

    fn from_str(text: &str) -> Result<PeerName> {
        PeerName::new(text)
    }
}

/// Which layer names a peer may see and set: all, or those that one of the patterns matches. `*` stands for any run of
/// characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Visible {
    /// All names, and every chunk of the store.
    All,
    /// The names that match, and what they refer to.
    Matching(Vec<String>),
}

impl Visible {
    /// Whether `name` may be seen.
    pub fn allows(&self, name: &LayerName) -> bool {
        match self {
            Visible::All => true,
            Visible::Matching(patterns) => patterns.iter().any(|p| matches(p.as_bytes(), name.as_str().as_bytes())),
        }
    }
}

/// Whether `pattern` matches all of `text`, in time proportional to the product of their lengths.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((star_p, star_t)) => {
                    star = Some((star_p, star_t + 1));
                    p = star_p + 1;
                    t = star_t + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// What a peer may do here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rights {
    /// It may push layers to this host.
    pub push: bool,
    /// It may pull layers from this host.
    pub pull: bool,
    /// It may move guests to this host, which then runs what it sends.
    pub guests: bool,
    /// Which names it may see and set.
    pub visible: Visible,
}

impl Default for Rights {
    fn default() -> Rights {
        Rights { push: true, pull: true, guests: false, visible: Visible::All }
    }
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// What people here call it.
    pub name: PeerName,
    /// Where it listens, as `host:port`, or several of those with commas between; `None` if it only ever calls.
    pub address: Option<String>,
    /// Its key.
    pub key: PublicKey,
    /// What it may do here.
    pub rights: Rights,
}

impl Peer {
    /// The record of FORMAT.md, "Peers".
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![RECORD_VERSION];
        out.extend_from_slice(&self.key.0);
        out.put_bytes16(self.address.as_deref().unwrap_or("").as_bytes());
        let rights = &self.rights;
        out.put_u8(u8::from(rights.push) | u8::from(rights.pull) << 1 | u8::from(rights.guests) << 2);
        match &self.rights.visible {
            Visible::All => out.put_u8(0),
            Visible::Matching(patterns) => {
                out.put_u8(1);
                out.put_u16(patterns.len() as u16);
                patterns.iter().for_each(|pattern| out.put_bytes16(pattern.as_bytes()));
            }
        }
        out
    }

    /// The peer called `name` with this record.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything malformed, [`Error::Unsupported`] for a later version.
    pub fn decode(name: &[u8], record: &[u8]) -> Result<Peer> {
        let mut reader = Reader::new("peer record", record);
        let text =
            |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| Error::corrupt("peer record", "not text"));
        let version = reader.u8()?;
        if version != RECORD_VERSION {
            return Err(Error::Unsupported { what: "peer record", detail: format!("version {version}") });
        }
        let key = PublicKey(reader.id()?.0);
        let address = Some(text(reader.bytes16()?)?).filter(|address| !address.is_empty());
        let flags = reader.u8()?;
        let visible = match reader.u8()? {
            0 => Visible::All,
            1 => {
                let count = reader.u16()?;
                let patterns = (0..count).map(|_| text(reader.bytes16()?)).collect::<Result<_>>()?;
                Visible::Matching(patterns)
            }
            other => return Err(reader.error(format!("visibility {other}"))),
        };
        if flags & !7 != 0 {
            return Err(reader.error(format!("rights {flags:#x}")));
        }
        reader.finish()?;
        let rights = Rights { push: flags & 1 != 0, pull: flags & 2 != 0, guests: flags & 4 != 0, visible };
        Ok(Peer { name: PeerName::new(&text(name)?)?, address, key, rights })
    }
}

/// The peers on record. Clones share the store.
#[derive(Clone)]
pub struct Peers {
    store: Arc<Store>,
    changing: Arc<Mutex<()>>,
}

impl Peers {
    /// The peers of `store`.
    pub fn new(store: Arc<Store>) -> Peers {
        Peers { store, changing: Arc::default() }
    }

    /// All peers, by name.
    pub fn list(&self) -> Result<Vec<Peer>> {
        let entries = self.store.db().iter(Cf::Peers, b"")?;
        entries.map(|entry| entry.and_then(|(name, record)| Peer::decode(&name, &record))).collect()
    }

    /// The peer called `name`.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, name: &str) -> Result<Peer> {
        let found = self.store.db().get(Cf::Peers, name.as_bytes())?;
        let record = found.ok_or_else(|| Error::NotFound { what: "peer", name: name.to_owned() })?;
        Peer::decode(name.as_bytes(), &record)
    }

    /// The peer whose key is `key`.
    pub fn by_key(&self, key: &PublicKey) -> Result<Option<Peer>> {
        Ok(self.list()?.into_iter().find(|peer| peer.key == *key))
    }

    /// Adds a peer, durably.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name or the key is taken, [`Error::Invalid`] for an impossible address or pattern.
    pub fn add(&self, peer: Peer) -> Result<Peer> {
        self.put(peer, false)
    }

    /// Adds a peer, durably, in place of one of the same name if there is one: that stays if this can't be.
    ///
    /// # Errors
    /// As [`Peers::add`], but only for a key that is taken.
    pub fn replace(&self, peer: Peer) -> Result<Peer> {
        self.put(peer, true)
    }

    fn put(&self, mut peer: Peer, replaces: bool) -> Result<Peer> {
        peer.address = peer.address.map(|address| normalize_address(&address)).transpose()?;
        check_patterns(&peer.rights.visible)?;
        let _changing = self.changing.lock();
        for other in self.list()? {
            if other.name == peer.name && replaces {
                continue;
            }
            if other.name == peer.name {
                return Err(Error::Exists { what: "peer", name: peer.name.to_string() });
            }
            if other.key == peer.key {
                return Err(Error::Exists { what: "peer with that key", name: other.name.to_string() });
            }
        }
        let mut batch = Batch::new();
        batch.put(Cf::Peers, peer.name.as_str(), peer.encode());
        self.store.db().write(batch, Sync::Yes)?;
        Ok(peer)
    }

    /// Changes what is known of the peer called `name` but its name and key, durably.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Invalid`] for an impossible address or pattern.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Peer)) -> Result<Peer> {
        let _changing = self.changing.lock();
        let old = self.get(name)?;
        let mut peer = old.clone();
        change(&mut peer);
        peer.address = peer.address.map(|address| normalize_address(&address)).transpose()?;
        check_patterns(&peer.rights.visible)?;
        let peer = Peer { name: old.name, key: old.key, ..peer };
        let mut batch = Batch::new();
        batch.put(Cf::Peers, peer.name.as_str(), peer.encode());
        self.store.db().write(batch, Sync::Yes)?;
        Ok(peer)
    }

    /// Removes the peer called `name`, durably.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn remove(&self, name: &str) -> Result<Peer> {
        let _changing = self.changing.lock();
        let peer = self.get(name)?;
        let mut batch = Batch::new();
        batch.delete(Cf::Peers, name.as_bytes());
        self.store.db().write(batch, Sync::Yes)?;
        Ok(peer)
    }
}

fn check_patterns(visible: &Visible) -> Result<()> {
    let Visible::Matching(patterns) = visible else { return Ok(()) };
    let is_impossible = |pattern: &String| pattern.is_empty() || pattern.len() > LayerName::MAX_BYTES;
    if patterns.len() > MAX_PATTERNS || patterns.iter().any(is_impossible) {
        return Err(Error::invalid(format!(
            "up to {MAX_PATTERNS} patterns of names, none of them empty, are possible"
        )));
    }
    Ok(())
}

/// `host`, `host:port`, `v6` or `[v6]:port` as `host:port`, with the default port if there is none; each of several with
/// commas between.
///
/// # Errors
/// [`Error::Invalid`] if it is none of them.
pub fn normalize_address(text: &str) -> Result<String> {
    let mut all = Vec::new();
    for address in text.split(',') {
        let address = normalize_one(address)?;
        if !all.contains(&address) {
            all.push(address);
        }
    }
    if all.len() > MAX_ADDRESSES {
        return Err(Error::invalid(format!("a peer can have {MAX_ADDRESSES} addresses at most")));
    }
    Ok(all.join(","))
}

fn normalize_one(text: &str) -> Result<String> {
    let wrong = || Error::invalid(format!("{text:?} is not an address: use HOST, HOST:PORT or [IPV6]:PORT"));
    let text = text.trim();
    if text.is_empty() || text.len() > MAX_ADDRESS || text.contains(|c: char| c.is_whitespace() || c == '/') {
        return Err(wrong());
    }
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return Ok(address.to_string());
    }
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>() {
        return Ok(std::net::SocketAddr::new(address, DEFAULT_PORT).to_string());
    }
    let (host, port) = text.split_once(':').unwrap_or((text, ""));
    let is_host = !host.is_empty()
        && host.len() <= MAX_HOST
        && host.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'));
    match port {
        _ if !is_host => Err(wrong()),
        "" if !text.ends_with(':') => Ok(format!("{host}:{DEFAULT_PORT}")),
        port if port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match() {
        for (pattern, text) in
            [("*", "a"), ("a*", "a"), ("debian/*", "debian/12"), ("*:base", "x:base"), ("a*b*c", "aXbXbc")]
        {
            assert!(matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        for (pattern, text) in [("a", "ab"), ("debian/*", "debian"), ("*x", "xy"), ("a*b", "ac"), ("", "a")] {
            assert!(!matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
    }

    #[test]
    fn addresses_get_a_port() {
        for (text, expected) in [
            ("host", "host:7440"),
            ("host:1", "host:1"),
            ("10.0.0.1", "10.0.0.1:7440"),
            ("::1", "[::1]:7440"),
            ("[::1]", "[::1]:7440"),
            ("[::1]:5", "[::1]:5"),
            ("10.0.0.1, 10.1.0.1:9,10.0.0.1", "10.0.0.1:7440,10.1.0.1:9"),
        ] {
            assert_eq!(normalize_address(text).unwrap(), expected);
        }
        for wrong in ["", "a,,b", "a b", "host:", ":1", "host:99999", "http://x", "a\0b", "a:1:2", &"x".repeat(254)] {
            assert!(normalize_address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_peer_is_replaced_whole_or_stays() {
        let host = crate::tests::pair::Host::new();
        let peers = host.node.peers();
        let peer = |called: &str, key| Peer {
            name: PeerName::new(called).unwrap(),
            address: Some("10.0.0.1:7440".to_owned()),
            key: PublicKey([key; 32]),
            rights: Rights::default(),
        };
        let old = peers.add(peer("edge", 7)).unwrap();
        peers.add(peer("other", 8)).unwrap();
        assert!(matches!(peers.add(peer("edge", 9)), Err(Error::Exists { .. })));
        assert!(matches!(peers.replace(peer("edge", 8)), Err(Error::Exists { .. })), "the other's key");
        let nowhere = Peer { address: Some("a b".to_owned()), ..peer("edge", 9) };
        assert!(peers.replace(nowhere).is_err());
        assert_eq!(peers.get("edge").unwrap(), old);
        assert_eq!(peers.replace(peer("edge", 9)).unwrap().key, PublicKey([9; 32]));
        assert_eq!(peers.replace(peer("new", 7)).unwrap().name.as_str(), "new");
        assert_eq!(peers.list().unwrap().len(), 3);
    }

    #[test]
    fn records_round_trip_and_are_pinned() {
        let peer = Peer {
            name: PeerName::new("edge").unwrap(),
            address: Some("10.0.0.1:7440".to_owned()),
            key: PublicKey([7; 32]),
            rights: Rights { pull: false, visible: Visible::Matching(vec!["a/*".to_owned()]), ..Rights::default() },
        };
        let record = peer.encode();
        assert_eq!(Peer::decode(b"edge", &record).unwrap(), peer);
        let expected = [&[1][..], &[7; 32], &[13, 0], b"10.0.0.1:7440", &[1, 1, 1, 0, 3, 0], b"a/*"].concat();
        assert_eq!(record, expected);
        for cut in 0..record.len() {
            assert!(Peer::decode(b"edge", &record[..cut]).is_err());
        }
    }
}
