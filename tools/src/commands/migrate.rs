//! migrate, report, guest resolve.

use std::io::Write;
use std::path::Path;

use migrator::migrate::{Downtime, Report, picture};

use super::Session;
use crate::api::Empty;
use crate::api::migrate::{MigrateRequest, MoveInfo, ReportList, ReportRequest, ResolveAction, ResolveRequest};
use crate::cli::migrate as args;
use crate::code_of;
use crate::failure::{Class, Failure, Result};
use crate::output::{Color, Paint, Table, facts, short};
use crate::units;

/// What stands for the report with the latest time.
const LATEST: &str = "latest";

/// `layerctl migrate`. A dry run that finds something in the way ends as the move would.
pub fn migrate(session: &Session, args: args::Migrate) -> Result<u8> {
    let label = format!("moving {} to {}", args.name, args.peer);
    let request = MigrateRequest {
        name: args.name,
        peer: args.peer,
        max_downtime: args.max_downtime,
        rounds: args.rounds.0,
        layers: args.layers,
        post_copy: args.postcopy,
        dry_run: args.dry_run,
        limit: args.limit.map(|rate| rate.0),
        no_give_back: args.no_give_back,
        force_kernel: args.force_kernel,
        defer: Some(args.defer),
    };
    let report: Report = session.work("migrate", &request, &label)?;
    session.output.answer(&report, |report| match request.dry_run {
        true => forecast(report),
        false => whole(report, session.output.paint()),
    })?;
    Ok(code_of(report.obstacles.is_empty(), Class::Unsupported))
}

fn forecast(report: &Report) -> String {
    if report.obstacles.is_empty() {
        let downtime = report.predicted.unwrap_or_default();
        return format!(
            "nothing is in the way\nabout {} on the wire, {}; downtime about {}\n",
            units::size(report.bytes),
            picture::seconds(report.seconds),
            picture::seconds(downtime.seconds),
        );
    }
    report.obstacles.iter().map(|obstacle| format!("{}\n  {}\n", obstacle.what, obstacle.fix)).collect()
}

/// `layerctl report`.
pub fn report(session: &Session, args: args::Report) -> Result<()> {
    let Some(id) = args.id else { return list(session) };
    if id.is_empty() {
        return Err(Failure::invalid(
            "a report's number isn't empty; `layerctl report` lists them, latest is the last one",
        ));
    }
    let id = if id == LATEST { String::new() } else { id };
    let report: Report = session.call("report", &ReportRequest { id })?;
    if let Some(path) = args.html {
        return write(session, &path, &picture::html(&report));
    }
    if let Some(path) = args.svg {
        return write(session, &path, &picture::svg(&report));
    }
    session.output.answer(&report, |report| whole(report, session.output.paint()))
}

fn write(session: &Session, path: &Path, text: &str) -> Result<()> {
    if path == Path::new("-") {
        return session.output.with_stdout(|out| Ok(out.write_all(text.as_bytes())?));
    }
    std::fs::write(path, text).map_err(|error| Failure::file("write", path, error))?;
    session.output.note(&format!("written to {}", path.display()));
    Ok(())
}

fn list(session: &Session) -> Result<()> {
    let list: ReportList = session.call("reports", &Empty {})?;
    let mut table =
        Table::new(&["ID", "BEGAN", "GUEST", "TO", "OUTCOME", "TOOK>", "ON THE WIRE>", "DOWNTIME>", "PREDICTED>"]);
    for report in &list.reports {
        table.colored([
            (short(&report.id).to_owned(), None),
            (units::date(report.began), None),
            (report.guest.clone(), Some(Color::Cyan)),
            (report.peer.clone(), None),
            (report.outcome.clone(), Some(if report.has_moved() { Color::Green } else { Color::Yellow })),
            (picture::seconds(report.seconds), None),
            (units::size(report.bytes), None),
            (down(report.downtime), None),
            (down(report.predicted), None),
        ]);
    }
    session.output.answer(&list, |list| match list.reports.is_empty() {
        true => String::new(),
        false => table.render(session.output.paint()),
    })?;
    if list.reports.is_empty() && !session.output.json {
        session.output.note("no migrations from here yet");
    }
    Ok(())
}

fn down(downtime: Option<Downtime>) -> String {
    downtime.map_or_else(|| "-".to_owned(), |down| picture::seconds(down.seconds))
}

fn whole(report: &Report, paint: Paint) -> String {
    let mut table = Table::new(&["STAGE", "AT>", "TOOK>", "ON THE WIRE>", ""]);
    for stage in &report.stages {
        let color = stage.is_down.then_some(Color::Red);
        table.colored([
            (stage.name.clone(), color),
            (picture::seconds(stage.at), None),
            (picture::seconds(stage.seconds), None),
            (if stage.bytes > 0 { units::size(stage.bytes) } else { "-".to_owned() }, None),
            (if stage.is_down { "down".to_owned() } else { String::new() }, color),
        ]);
    }
    let took = format!("{}, {} on the wire", picture::seconds(report.seconds), units::size(report.bytes));
    let downtime = match (report.downtime, report.predicted) {
        (Some(is), Some(was)) => {
            format!("{} (predicted {})", picture::seconds(is.seconds), picture::seconds(was.seconds))
        }
        (is, was) => down(is.or(was)),
    };
    let mut lines = vec![
        ("move", report.id.clone()),
        ("guest", format!("{} to {}: {}", report.guest, report.peer, report.outcome)),
        ("took", took),
        ("downtime", downtime),
    ];
    lines.extend(report.decisions.iter().map(|why| ("why", why.clone())));
    lines.extend(report.error.iter().map(|error| ("error", error.clone())));
    format!("{}\n{}", facts(paint, lines), table.render(paint))
}

/// `layerctl guest resolve`.
pub fn resolve(session: &Session, args: args::Resolve) -> Result<()> {
    let action = match (args.ask, args.run_here, args.give_up) {
        (true, ..) => ResolveAction::Ask,
        (_, true, _) => ResolveAction::RunHere,
        (.., true) => ResolveAction::GiveUp,
        _ => ResolveAction::Show,
    };
    let show = ResolveRequest { name: args.name.clone(), action: ResolveAction::Show };
    if matches!(action, ResolveAction::RunHere | ResolveAction::GiveUp) && !args.force {
        let now: MoveInfo = session.call("guest-resolve", &show)?;
        let failure = Failure::invalid(format!("not done: {}", now.advice));
        return Err(failure.hint("--force does it"));
    }
    let info: MoveInfo = session.call("guest-resolve", &ResolveRequest { name: args.name, action })?;
    session.output.answer(&info, |info| {
        let mut lines = vec![
            ("guest", info.guest.clone()),
            ("move", format!("{} {} {}", info.id, if info.side == "source" { "to" } else { "from" }, info.peer)),
            ("phase", format!("{}{}", info.phase, if info.is_in_doubt { " (in doubt)" } else { "" })),
            ("began", units::date(info.began)),
        ];
        lines.extend(Some(("error", info.note.clone())).filter(|(_, note)| !note.is_empty()));
        lines.extend(Some(("advice", info.advice.clone())).filter(|(_, advice)| !advice.is_empty()));
        facts(session.output.paint(), lines)
    })
}
