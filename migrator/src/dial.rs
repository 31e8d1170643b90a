//! Calling a peer: over which of its addresses, from which of ours, with which transport.
//!
//! Hides name resolution, the race between addresses and the TLS handshake. Invariants: nobody is spoken to but the
//! holder of the expected key; every step has a time limit.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::{Error, Result};
use crate::identity::PublicKey;
use crate::link::{Counted, Counters, Patience};
use crate::measured::Measured;
use crate::node::Node;
use crate::socket::{self, Kind, Probe};
use crate::tls::{self, FoundKey};

/// How long one address has before the next is tried beside it.
const STAGGER: Duration = Duration::from_millis(300);

/// How connections are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// MPTCP if this host has several networks, else TCP.
    #[default]
    Auto,
    /// TCP.
    Tcp,
    /// MPTCP; if the other side hasn't it, TCP.
    Mptcp,
}

impl Transport {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Transport::Tcp => Kind::Tcp,
            Transport::Mptcp => Kind::Mptcp,
            Transport::Auto if socket::has_several_networks() => Kind::Mptcp,
            Transport::Auto => Kind::Tcp,
        }
    }
}

/// A way to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// `host:port`.
    pub to: String,
    /// A local address to call from.
    pub from: Option<IpAddr>,
}

impl Route {
    /// Every pair of the peer's addresses and ours. Pairs that don't fit one another fail when they are tried.
    pub fn all(to: &[&str], from: &[IpAddr]) -> Vec<Route> {
        let ours: Vec<Option<IpAddr>> =
            if from.is_empty() { vec![None] } else { from.iter().copied().map(Some).collect() };
        // The first routes differ in both ends: paths that share nothing come first.
        let mut routes = Vec::new();
        for shift in 0..ours.len() {
            for (at, to) in to.iter().enumerate() {
                routes.push(Route { to: (*to).to_owned(), from: ours[(at + shift) % ours.len()] });
            }
        }
        routes
    }
}

/// A connection whose other end has shown its key.
pub(crate) struct Dialled {
    pub stream: TlsStream<Counted<TcpStream>>,
    pub found: FoundKey,
    /// Its round trip.
    pub measured: Measured,
    /// Gone when the stream is.
    pub probe: Weak<Probe>,
}

/// What calls to one peer have in common.
#[derive(Clone)]
pub(crate) struct Dialer {
    pub node: Node,
    /// The peer's name, or its address if it has none yet.
    pub name: String,
    /// Whom to expect; nobody to find out who answers.
    pub key: Option<PublicKey>,
    pub kind: Kind,
    pub patience: Patience,
    /// After so long without an answer a connection is dead.
    pub silence: Duration,
    pub counters: Arc<Counters>,
}

impl Dialer {
    /// Calls over the first of `routes` that answers. Says which it was.
    ///
    /// # Errors
    /// That of the first route, if none answers.
    pub async fn any(&self, routes: &[Route]) -> Result<(usize, Dialled)> {
        let mut calls = FuturesUnordered::new();
        let mut errors: Vec<(usize, Error)> = Vec::new();
        let mut waiting = routes.iter().enumerate();
        loop {
            if let Some((at, route)) = waiting.next() {
                calls.push(async move { (at, self.dial(route).await) });
            }
            let stagger = if waiting.len() > 0 { STAGGER } else { Duration::MAX };
            match timeout(stagger, calls.next()).await {
                Ok(Some((at, Ok(dialled)))) => return Ok((at, dialled)),
                Ok(Some((at, Err(error)))) => errors.push((at, error)),
                Ok(None) if waiting.len() == 0 => break,
                Ok(None) | Err(_) => {}
            }
        }
        let first = errors.into_iter().min_by_key(|(at, _)| *at);
        Err(first.map_or_else(|| Error::Closed { peer: self.name.clone() }, |(_, error)| error))
    }

    /// Calls over `route`.
    ///
    /// # Errors
    /// [`Error::Link`], [`Error::Timeout`]; [`Error::WrongKey`] if somebody else answers.
    pub async fn dial(&self, route: &Route) -> Result<Dialled> {
        let address = route.to.as_str();
        let label = if self.name == address { address.to_owned() } else { format!("{} at {address}", self.name) };
        let failed = |error| Error::link("connecting to", &label, error);
        let limit = self.patience.connect;
        let late = |action| Error::Timeout { action, peer: label.clone(), seconds: limit.as_secs() };
        let began = Instant::now();
        let stream = timeout(limit, self.connect(route)).await.map_err(|_| late("connecting"))?.map_err(failed)?;
        // A TCP handshake is one round trip, and no work at the other side.
        let round_trip = began.elapsed();
        self.counters.set_round_trip(round_trip);
        socket::set_up(&stream, self.silence).map_err(failed)?;
        let probe = Arc::new(Probe::new(&stream).map_err(failed)?);
        let (config, found) =
            tls::client_config(self.node.identity(), self.key).map_err(|e| failed(io::Error::other(e)))?;
        let weak = Arc::downgrade(&probe);
        let counted = Counted::new(stream, self.counters.clone()).with_probe(probe);
        let connecting = TlsConnector::from(config).connect(tls::server_name(), counted);
        let result = timeout(limit, connecting).await.map_err(|_| late("TLS handshake"))?;
        match (result, self.key, found.get()) {
            (Ok(stream), _, _) => {
                let micros = Some(round_trip.as_micros() as u64);
                let measured = Measured { round_trip_micros: micros, ..Measured::default() };
                Ok(Dialled { stream, found, measured, probe: weak })
            }
            (Err(_), Some(expected), Some(other)) if other != expected => Err(Error::WrongKey {
                peer: self.name.clone(),
                address: address.to_owned(),
                expected: expected.fingerprint(),
                found: other.fingerprint(),
            }),
            (Err(error), _, _) => Err(failed(error)),
        }
    }

    /// Tries what the name resolves to, in turn.
    async fn connect(&self, route: &Route) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "it has no address of the kind that is needed");
        let fits = |to: &SocketAddr| route.from.is_none_or(|from| from.is_ipv4() == to.is_ipv4());
        for to in tokio::net::lookup_host(&route.to).await?.filter(fits) {
            match socket::connect(to, route.from, self.kind).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_that_share_nothing_come_first() {
        let from = [IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 1, 0, 1])];
        let routes = Route::all(&["a:1", "b:1"], &from);
        let shown: Vec<_> = routes.iter().map(|route| (route.to.as_str(), route.from)).collect();
        let [one, two] = from.map(Some);
        assert_eq!(shown, [("a:1", one), ("b:1", two), ("a:1", two), ("b:1", one)]);
        assert_eq!(Route::all(&["a:1"], &[]), [Route { to: "a:1".to_owned(), from: None }]);
    }
}
