//! push, pull, peer.

use super::Session;
use crate::api::Empty;
use crate::api::peers::{
    Identity, PeerAddRequest, PeerInfo, PeerList, PeerRemoveRequest, TransferRequest, TransferResult,
};
use crate::cli::peers as args;
use crate::config::DEFAULT_PORT;
use crate::failure::{Failure, Result};
use crate::output::{Color, Table, facts};
use crate::progress::Display;
use crate::units;

/// `layerctl push`.
pub fn push(session: &Session, args: args::Push) -> Result<()> {
    let (names, peer) = split(args.names_and_peer)?;
    let label = format!("pushing to {peer}");
    let result: TransferResult = session.work("push", &TransferRequest { names, peer, force: args.force }, &label)?;
    session.output.answer(&result, |result| transferred(result, "sent to"))
}

/// `layerctl pull`.
pub fn pull(session: &Session, args: args::Pull) -> Result<()> {
    let (names, peer) = split(args.names_and_peer)?;
    let mut display = Display::new(session.output, format!("pulling from {peer}"));
    let request = TransferRequest { names, peer, force: args.force };
    let client = session.client_of_new_store()?;
    let result: TransferResult = client.work("pull", &request, &mut display, &mut |_| Ok(()))?;
    session.output.answer(&result, |result| transferred(result, "fetched from"))
}

fn split(names_and_peer: Vec<String>) -> Result<(Vec<String>, String)> {
    args::split_names(names_and_peer).ok_or_else(|| Failure::invalid("give the layers' names, then the peer's"))
}

fn transferred(result: &TransferResult, verb: &str) -> String {
    let moved = result.bytes_sent + result.bytes_received;
    let mut text = format!("{} {verb} {}: ", result.names.join(", "), result.peer);
    if result.layers_sent == 0 {
        text.push_str("it was all there already");
    } else {
        let (layers, chunks) = (units::plural(result.layers_sent, "layer"), units::plural(result.chunks_sent, "chunk"));
        text.push_str(&format!("{layers}, {chunks}"));
        if result.chunks_reused > 0 {
            text.push_str(&format!(" ({} were there)", units::count(result.chunks_reused)));
        }
    }
    let rate = units::rate(moved, result.seconds);
    text.push_str(&format!("\n{} on the wire, {}, {rate}\n", units::size(moved), units::duration(result.seconds)));
    text
}

/// `layerctl peer`.
pub fn peer(session: &Session, args: args::Peer) -> Result<()> {
    match args.action {
        args::PeerAction::Add(args) => add(session, args),
        args::PeerAction::List => list(session),
        args::PeerAction::Remove { names } => {
            let removed: PeerList = session.call("peer-remove", &PeerRemoveRequest { names })?;
            session.output.answer(&removed, |list| {
                list.peers.iter().map(|peer| format!("removed peer {}\n", peer.name)).collect()
            })
        }
        args::PeerAction::Id => id(session),
    }
}

fn add(session: &Session, args: args::PeerAdd) -> Result<()> {
    let allows = |what: &str| args.allow.is_empty() || args.allow.iter().any(|allowed| allowed == what);
    let request = PeerAddRequest {
        allow_push: allows("push"),
        allow_pull: allows("pull"),
        name: args.name,
        address: (args.address != "-").then(|| with_port(&args.address)),
        key: args.key,
        visible: args.visible,
        force: args.force,
    };
    let peer: PeerInfo = session.client_of_new_store()?.call("peer-add", &request)?;
    let paint = session.output.paint();
    session.output.answer(&peer, |peer| format!("{}  {}\n", paint.cyan(&peer.name), paint.bold(&peer.fingerprint)))?;
    if !session.output.json {
        session.output.note(&format!("compare the fingerprint with the one of `layerctl peer id` on {}", peer.name));
    }
    Ok(())
}

/// `HOST` with the default port, `[V6]:PORT` and `HOST:PORT` as they are.
fn with_port(address: &str) -> String {
    if address.parse::<std::net::Ipv6Addr>().is_ok() {
        return format!("[{address}]:{DEFAULT_PORT}");
    }
    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if has_port { address.to_owned() } else { format!("{address}:{DEFAULT_PORT}") }
}

fn list(session: &Session) -> Result<()> {
    let list: PeerList = session.call("peers", &Empty {})?;
    session.output.answer(&list, |list| {
        if list.peers.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["PEER", "ADDRESS", "MAY", "SEES", "FINGERPRINT"]);
        for peer in &list.peers {
            let may = match (peer.allow_push, peer.allow_pull) {
                (true, true) => "push, pull",
                (true, false) => "push",
                (false, true) => "pull",
                (false, false) => "nothing",
            };
            let sees = if peer.visible.is_empty() { "all".to_owned() } else { peer.visible.join(", ") };
            table.colored([
                (peer.name.clone(), Some(Color::Cyan)),
                (peer.address.clone().unwrap_or_else(|| "-".to_owned()), None),
                (may.to_owned(), None),
                (sees, None),
                (peer.fingerprint.clone(), Some(Color::Dim)),
            ]);
        }
        table.render(session.output.paint())
    })?;
    if list.peers.is_empty() && !session.output.json {
        session.output.note("no peers; `layerctl peer id` on the other host prints how to add it here");
    }
    Ok(())
}

fn id(session: &Session) -> Result<()> {
    let identity: Identity = session.client_of_new_store()?.call("peer-id", &Empty {})?;
    let paint = session.output.paint();
    session.output.answer(&identity, |identity| {
        facts(paint, [("key", identity.key.clone()), ("fingerprint", paint.bold(&identity.fingerprint))])
    })?;
    if !session.output.json {
        let Identity { key, host, port, .. } = &identity;
        session.output.note(&format!("on the other host:\n  layerctl peer add {host} ADDRESS:{port} --key {key}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_get_the_default_port() {
        assert_eq!(with_port("edge1.example.org"), "edge1.example.org:7440");
        assert_eq!(with_port("10.0.0.2:9"), "10.0.0.2:9");
        assert_eq!(with_port("fd00::1"), "[fd00::1]:7440");
        assert_eq!(with_port("[fd00::1]:9"), "[fd00::1]:9");
    }
}
