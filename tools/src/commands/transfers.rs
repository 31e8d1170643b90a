//! transfers, limit.

use std::time::Duration;

use super::Session;
use crate::api::Empty;
use crate::api::transfers::{Limit, LimitRequest, Priority, TransferInfo, TransferList, TransferSet};
use crate::cli::transfers as args;
use crate::failure::Result;
use crate::output::{Color, Paint, Table};
use crate::units;

/// How often --watch looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// `layerctl transfers`.
pub fn transfers(session: &Session, args: args::Transfers) -> Result<()> {
    let change = match args.action {
        None if args.watch => return watch(session),
        None => return show(session),
        Some(args::TransfersAction::Pause(ids)) => TransferSet { paused: Some(true), ..of(ids) },
        Some(args::TransfersAction::Resume(ids)) => TransferSet { paused: Some(false), ..of(ids) },
        Some(args::TransfersAction::Cancel(ids)) => TransferSet { cancel: true, ..of(ids) },
        Some(args::TransfersAction::Limit { rate, ids }) => TransferSet { limit: Some(rate.0), ..of(ids) },
        Some(args::TransfersAction::Priority { priority, ids }) => TransferSet { priority: Some(priority), ..of(ids) },
    };
    let answer: Empty = session.call("transfer-set", &change)?;
    session.output.answer(&answer, |_| String::new())
}

fn of(ids: args::TransferIds) -> TransferSet {
    TransferSet { transfers: ids.ids, ..TransferSet::default() }
}

fn show(session: &Session) -> Result<()> {
    let list: TransferList = session.call("transfers", &Empty {})?;
    session.output.answer(&list, |list| table(list, session.output.paint()))?;
    if list.transfers.is_empty() && !session.output.json {
        session.output.note("no transfers");
    }
    Ok(())
}

/// Until interrupted: the table again and again on a terminal, a line of JSON each time with --json.
fn watch(session: &Session) -> Result<()> {
    let client = session.client()?;
    loop {
        let list: TransferList = client.call("transfers", &Empty {})?;
        session.output.with_stdout(|out| {
            use std::io::Write;
            if session.output.json {
                serde_json::to_writer(&mut *out, &list).map_err(std::io::Error::from)?;
                out.write_all(b"\n")?;
            } else {
                // From the top left, and what was below is wiped.
                let text = table(&list, session.output.paint());
                write!(out, "\x1b[H\x1b[2J{text}")?;
            }
            Ok(())
        })?;
        std::thread::sleep(WATCH_EVERY);
    }
}

fn table(list: &TransferList, paint: Paint) -> String {
    if list.transfers.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        "ID>",
        "TRANSFER",
        "NAMES",
        "STATE",
        "DONE>",
        "ON THE WIRE>",
        "RATE>",
        "LEFT>",
        "LIMIT>",
        "PRIORITY",
    ]);
    for transfer in &list.transfers {
        let dash = || "-".to_owned();
        let (state, color) = state(transfer);
        let moved = if transfer.role == "sending" { transfer.bytes_sent } else { transfer.bytes_received };
        let is_moving = transfer.state == "running" && transfer.rate > 0.0;
        table.colored([
            (transfer.id.to_string(), None),
            (what(transfer), None),
            (transfer.names.join(", "), Some(Color::Cyan)),
            (state, color),
            (done(transfer), None),
            (units::size(moved), None),
            (if is_moving { units::rate(transfer.rate as u64, 1.0) } else { dash() }, None),
            (transfer.seconds_left.map_or_else(dash, units::duration), None),
            (transfer.limit.map_or_else(dash, |limit| units::rate(limit, 1.0)), None),
            (priority(transfer.priority).to_owned(), None),
        ]);
    }
    let mut text = table.render(paint);
    for transfer in &list.transfers {
        // Too long for a column.
        if let Some(error) = transfer.error.as_ref().filter(|_| transfer.state == "failed") {
            text.push_str(&format!("{} failed: {error}\n", transfer.id));
        }
    }
    if let Some(limit) = list.limit {
        text.push_str(&format!("all together at most {} each way\n", units::rate(limit, 1.0)));
    }
    text
}

/// How much of it is done. One that has ended well is, however little of it had to be moved.
fn done(transfer: &TransferInfo) -> String {
    match transfer.total_bytes {
        _ if transfer.state == "done" => units::percent(1, 1),
        Some(total) => units::percent(transfer.bytes.min(total), total),
        None => "-".to_owned(),
    }
}

fn what(transfer: &TransferInfo) -> String {
    let peer = &transfer.peer;
    match (transfer.role.as_str(), transfer.origin.as_str()) {
        ("sending", "here") => format!("push to {peer}"),
        ("sending", _) => format!("pull by {peer}"),
        (_, "here") => format!("pull from {peer}"),
        _ => format!("push by {peer}"),
    }
}

fn state(transfer: &TransferInfo) -> (String, Option<Color>) {
    match transfer.state.as_str() {
        "running" => (transfer.phase.clone(), None),
        "failed" => ("failed".to_owned(), Some(Color::Red)),
        "done" if transfer.dry_run => ("dry run".to_owned(), Some(Color::Green)),
        "done" => ("done".to_owned(), Some(Color::Green)),
        other => (other.to_owned(), Some(Color::Yellow)),
    }
}

fn priority(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low",
        Priority::Normal => "normal",
        Priority::High => "high",
    }
}

/// `layerctl limit`.
pub fn limit(session: &Session, args: args::Limit) -> Result<()> {
    let request = match args.rate {
        None => LimitRequest::default(),
        Some(args::NewLimit::Default) => LimitRequest { reset: true, ..LimitRequest::default() },
        Some(args::NewLimit::Rate(rate)) => LimitRequest { limit: Some(rate.0), ..LimitRequest::default() },
    };
    let limit: Limit = session.call("limit", &request)?;
    session.output.answer(&limit, |limit| {
        let rate = limit.limit.map_or_else(|| "no limit".to_owned(), |limit| units::rate(limit, 1.0));
        let source = if limit.from_config { ", as the config file says or leaves it" } else { "" };
        format!("all transfers together, each way: {rate}{source}\n")
    })
}
