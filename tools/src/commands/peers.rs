//! push, pull, peer.

use std::io::IsTerminal;

use migrator::identity::Fingerprint;
use migrator::registry::Address;

use super::{Session, registry};
use crate::api::Empty;
use crate::api::peers::{
    Identity, NetworkRequest, PeerAddRequest, PeerInfo, PeerList, PeerRemoveRequest, PeerSetRequest, ProbeRequest,
    ProbeResult, StrangerInfo, TransferRequest, TransferResult,
};
use crate::cli::peers as args;
use crate::cli::transfers::Manner;
use crate::client::Client;
use crate::config::Listen;
use crate::failure::{Class, Failure, Result};
use crate::output::{Color, Table, facts};
use crate::progress::Display;
use crate::ssh::{self, Sessions, Target};
use crate::units;

/// `layerctl push`.
pub fn push(session: &Session, args: args::Push) -> Result<()> {
    let (names, peer) = split(args.names_and_peer)?;
    if Address::is_meant(&peer) {
        check_manner(&args.manner, args.lazy)?;
        return registry::push(session, names, &peer, &args.manner, args.registry);
    }
    args.registry.check_unused()?;
    let label = format!("pushing to {peer}");
    check_lazy(args.lazy, &peer)?;
    let client = session.client()?;
    let (request, _sessions) = request(session, names, peer, args.force, args.manner)?;
    drop(client);
    let request = TransferRequest { lazy: args.lazy, ..request };
    let result: TransferResult = session.work("push", &request, &label)?;
    session.output.answer(&result, |result| transferred(result, "sent to"))?;
    if args.lazy && result.layers_sent > 0 && !session.output.json {
        session.output.note("it can be mounted there; the rest follows in the background");
    }
    Ok(())
}

/// `layerctl pull`.
pub fn pull(session: &Session, args: args::Pull) -> Result<()> {
    let (names, peer) = split(args.names_and_peer)?;
    if Address::is_meant(&peer) {
        check_manner(&args.manner, args.lazy)?;
        return registry::pull(session, names, &peer, args.force, &args.manner, args.registry);
    }
    args.registry.check_unused()?;
    let mut display = Display::new(session.output, format!("pulling from {peer}"));
    let client = session.client_of_new_store()?;
    check_lazy(args.lazy, &peer)?;
    let (request, _sessions) = request(session, names, peer, args.force, args.manner)?;
    let request = TransferRequest { lazy: args.lazy, ..request };
    let result: TransferResult = client.work("pull", &request, &mut display, &mut |_| Ok(()))?;
    session.output.answer(&result, |result| transferred(result, "fetched from"))?;
    if args.lazy && result.layers_sent > 0 && !session.output.json {
        session
            .output
            .note("it can be mounted; the rest follows in the background, `layerctl list` shows how far it is");
    }
    Ok(())
}

/// Registries are no peers.
fn check_manner(manner: &Manner, lazy: bool) -> Result<()> {
    if manner.background || manner.dry_run || lazy {
        return Err(Failure::invalid("--background, --dry-run and --lazy are for peers, not for registries (oci://…)"));
    }
    Ok(())
}

fn split(names_and_peer: Vec<String>) -> Result<(Vec<String>, String)> {
    args::split_names(names_and_peer).ok_or_else(|| Failure::invalid("give the layers' names, then the peer's"))
}

/// What follows later needs a connection then.
fn check_lazy(is_lazy: bool, peer: &str) -> Result<()> {
    if is_lazy && Target::is_meant(peer) {
        return Err(Failure::invalid("--lazy is not for ssh:// peers: the rest would have no way to come by")
            .hint("add the host with `layerctl peer add`"));
    }
    Ok(())
}

/// The request, and the ssh that it needs, which must live until it is done.
fn request(
    session: &Session,
    names: Vec<String>,
    peer: String,
    force: bool,
    manner: Manner,
) -> Result<(TransferRequest, Option<Sessions>)> {
    let Manner { limit, priority, background, dry_run, .. } = manner;
    let remote = manner.remote_layerctl.as_deref();
    let sessions = if Target::is_meant(&peer) && !background {
        Some(Sessions::start(&session.settings, &Target::parse(&peer)?, remote))
    } else {
        None
    };
    let network = NetworkRequest {
        connections: manner.connections.map(|count| count.0),
        transport: manner.transport,
        retry_for_seconds: manner.retry_for,
        connect_seconds: manner.connect_timeout,
        idle_seconds: manner.idle_timeout,
        stream: sessions.as_ref().map(|sessions| sessions.stream),
    };
    if Target::is_meant(&peer) && background {
        return Err(Failure::invalid("--background is not for ssh:// peers: the transfer is this command's own ssh"));
    }
    let limit = limit.map_or(0, |rate| rate.0);
    Ok((TransferRequest { names, peer, force, limit, priority, background, dry_run, network, lazy: false }, sessions))
}

/// `layerctl stdio`.
pub fn stdio(session: &Session) -> Result<()> {
    drop(session.client_of_new_store()?);
    ssh::stdio(&session.settings)
}

fn transferred(result: &TransferResult, verb: &str) -> String {
    if result.background {
        return format!("transfer {} runs; `layerctl transfers` shows how it goes\n", result.transfer);
    }
    if result.dry_run {
        return would_transfer(result);
    }
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

fn would_transfer(result: &TransferResult) -> String {
    let mut text = format!("{} and {}: ", result.names.join(", "), result.peer);
    if result.layers_sent == 0 {
        text.push_str("it is all there already\n");
        return text;
    }
    let (layers, chunks) = (units::plural(result.layers_sent, "layer"), units::plural(result.chunks_sent, "chunk"));
    text.push_str(&format!("{layers}, {chunks} would go over, {}", units::size(result.would_send_bytes)));
    if result.chunks_reused > 0 {
        text.push_str(&format!(" ({} chunks are there)", units::count(result.chunks_reused)));
    }
    match (result.estimated_seconds, result.estimated_rate) {
        (Some(seconds), Some(rate)) => {
            let (duration, rate) = (units::duration(seconds), units::rate(rate, 1.0));
            text.push_str(&format!("\nthat takes about {duration} at {rate}\n"));
        }
        _ => text.push_str("\nhow long it takes is unknown: no transfer was long enough yet to measure the link\n"),
    }
    text
}

/// `layerctl peer`.
pub fn peer(session: &Session, args: args::Peer) -> Result<()> {
    match args.action {
        args::PeerAction::Add(args) => add(session, args),
        args::PeerAction::List => list(session),
        args::PeerAction::Set(args) => set(session, args),
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
    let client = session.client_of_new_store()?;
    let is_known = args.key.is_some();
    let key = match &args.key {
        Some(key) => key.clone(),
        None => ask_for_key(session, &client, &args)?,
    };
    let request = PeerAddRequest {
        allow_push: allows("push"),
        allow_pull: allows("pull"),
        allow_guests: args.allow.iter().any(|allowed| allowed == "guests"),
        address: (args.address != "-").then(|| args.address.clone()),
        name: args.name,
        key,
        visible: args.visible,
        force: args.force,
    };
    let peer: PeerInfo = client.call("peer-add", &request)?;
    let paint = session.output.paint();
    session
        .output
        .answer(&peer, |peer| format!("added peer {}  {}\n", paint.cyan(&peer.name), paint.bold(&peer.fingerprint)))?;
    if !session.output.json && is_known {
        session.output.note(&format!("compare the fingerprint with the one of `layerctl peer id` on {}", peer.name));
    }
    Ok(())
}

fn set(session: &Session, args: args::PeerSet) -> Result<()> {
    let choice = |what: &str, yes: bool, no: bool| match args.allow.as_slice() {
        [] => (yes || no).then_some(yes),
        allowed => Some(allowed.iter().any(|allowed| allowed == what)),
    };
    let request = PeerSetRequest {
        name: args.name,
        address: args.address.map(|address| if address == "-" { String::new() } else { address }),
        allow_push: choice("push", args.allow_push, args.no_push),
        allow_pull: choice("pull", args.allow_pull, args.no_pull),
        allow_guests: choice("guests", args.allow_guests, args.no_guests),
        visible: match args.visible {
            none if none.is_empty() => None,
            all if all == ["*"] => Some(Vec::new()),
            some => Some(some),
        },
    };
    let peer: PeerInfo = session.call("peer-set", &request)?;
    session.output.answer(&peer, |peer| {
        let address = peer.address.as_deref().unwrap_or("-");
        format!("peer {} at {address} may {} and sees {}\n", peer.name, may(peer), sees(peer))
    })
}

/// What a peer may do, in words.
fn may(peer: &PeerInfo) -> String {
    let rights = [(peer.allow_push, "push"), (peer.allow_pull, "pull"), (peer.allow_guests, "move guests here")];
    let granted: Vec<&str> = rights.iter().filter(|(granted, _)| *granted).map(|(_, what)| *what).collect();
    if granted.is_empty() { "nothing".to_owned() } else { granted.join(", ") }
}

/// The names that a peer sees, in words.
fn sees(peer: &PeerInfo) -> String {
    if peer.visible.is_empty() { "all".to_owned() } else { peer.visible.join(", ") }
}

/// The key that the host shows, once somebody has said that its fingerprint is right.
fn ask_for_key(session: &Session, client: &Client, args: &args::PeerAdd) -> Result<String> {
    let expected = args.fingerprint.as_deref().map(str::parse::<Fingerprint>).transpose()?;
    let shown: ProbeResult = client.call("peer-probe", &ProbeRequest { address: args.address.clone() })?;
    if let Some(expected) = &expected {
        if expected.to_string() == shown.fingerprint {
            return Ok(shown.key);
        }
        let text = format!("{} has the fingerprint {}, not {expected}", args.address, shown.fingerprint);
        return Err(
            Failure::new(Class::Denied, text).hint("somebody may sit in between; look at `layerctl peer id` there")
        );
    }
    let question = format!("{} shows the fingerprint {}", args.address, shown.fingerprint);
    if !std::io::stdin().is_terminal() || session.output.json {
        return Err(Failure::new(Class::Denied, format!("{question}, and nobody is here to compare it")).hint(
            format!("if `layerctl peer id` says the same there, repeat this with --fingerprint {}", shown.fingerprint),
        ));
    }
    session.output.ask(&format!("{question}.\nDoes `layerctl peer id` say the same there? [y/N] "));
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(shown.key);
    }
    Err(Failure::new(Class::Denied, "not added"))
}

fn list(session: &Session) -> Result<()> {
    let list: PeerList = session.call("peers", &Empty {})?;
    session.output.answer(&list, |list| {
        if list.peers.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["PEER", "ADDRESS", "MAY", "SEES", "FINGERPRINT"]);
        for peer in &list.peers {
            table.colored([
                (peer.name.clone(), Some(Color::Cyan)),
                (peer.address.clone().unwrap_or_else(|| "-".to_owned()), None),
                (may(peer), None),
                (sees(peer), None),
                (peer.fingerprint.clone(), Some(Color::Dim)),
            ]);
        }
        table.render(session.output.paint())
    })?;
    if session.output.json {
        return Ok(());
    }
    if list.peers.is_empty() {
        session.output.note("no peers; `layerctl peer add NAME ADDRESS` adds one");
    }
    for StrangerInfo { address, key, .. } in &list.strangers {
        session.output.note(&format!(
            "{address} called and is no peer; `layerctl peer add NAME ADDRESS --key {key}` makes it one"
        ));
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
        let Identity { key, host, port, listening, listen_error, listen, .. } = &identity;
        let is_off = *listen == Listen::Off.to_string();
        let how = match (listening, listen_error) {
            (Some(_), _) => String::new(),
            (None, Some(error)) => format!("this host does not listen: {error}\n"),
            (None, None) if is_off => "this host does not listen, as `listen` is off: it can only call\n".to_owned(),
            (None, None) => "this host does not listen yet: it does as soon as it has a peer\n".to_owned(),
        };
        let address = if is_off { "-".to_owned() } else { format!("ADDRESS:{port}") };
        session.output.note(&format!("{how}on the other host:\n  layerctl peer add {host} {address} --key {key}"));
    }
    Ok(())
}
