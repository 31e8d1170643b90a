//! stat, du, gc, fsck, scrub.

use super::Session;
use crate::api::storage::{
    DuRequest, DuResult, DuRow, FsckRequest, FsckResult, GcRequest, GcResult, ScrubRequest, ScrubResult, StatResult,
};
use crate::api::{Empty, Event};
use crate::autostart;
use crate::cli::storage as args;
use crate::code_of;
use crate::daemon::work::{Reporter, Works};
use crate::failure::{Class, Failure, Result};
use crate::output::{Color, Paint, Table, facts, short};
use crate::progress::Display;
use crate::units;

/// `layerctl stat`.
pub fn stat(session: &Session) -> Result<()> {
    let result: StatResult = session.work("stat", &Empty {}, "counting")?;
    session.output.answer(&result, |result| stat_text(result, session.output.paint()))
}

fn stat_text(result: &StatResult, paint: Paint) -> String {
    let times = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}×"));
    let packs =
        |bytes: u64, packs: u64, what: &str| format!("{} in {}", units::size(bytes), units::plural(packs, what));
    let mut list = vec![
        ("store", result.store.display().to_string()),
        ("names", units::count(result.names)),
        ("layers", units::count(result.layers)),
        ("file sizes", format!("{} in all named stacks", units::size(result.referenced_bytes))),
        ("dedup", times(result.dedup_ratio)),
        ("compression", times(result.compression_ratio)),
        ("packs", packs(result.pack_bytes, result.packs, "file")),
        ("dead", format!("{} in packs that gc has not rewritten", units::size(result.dead_bytes))),
    ];
    if result.remote_packs > 0 {
        list.push(("only in tier", packs(result.remote_bytes, result.remote_packs, "pack")));
    }
    let mut text = facts(paint, list);
    let mut table = Table::new(&["CHUNKS", "COUNT>", "PLAIN>", "STORED>"]);
    for class in &result.classes {
        let (plain, stored) = (units::size(class.plain_bytes), units::size(class.stored_bytes));
        table.row([class.class.clone(), units::count(class.chunks), plain, stored]);
    }
    let (plain, stored) = (units::size(result.plain_bytes), units::size(result.stored_bytes));
    table.row(["all".to_owned(), units::count(result.chunks), plain, stored]);
    text.push('\n');
    text.push_str(&table.render(paint));
    text
}

/// `layerctl du`.
pub fn du(session: &Session, args: args::Du) -> Result<()> {
    let request = DuRequest { names: args.names, layers: args.layers };
    let result: DuResult = session.work("du", &request, "counting")?;
    session.output.answer(&result, |result| du_text(&request, result, session.output.paint()))
}

fn du_text(request: &DuRequest, result: &DuResult, paint: Paint) -> String {
    if result.rows.is_empty() {
        return "no layers\n".to_owned();
    }
    // A layer frees nothing alone: others may lie on it, and several names refer to it.
    let last = if request.layers { "UNIQUE COMPRESSED>" } else { "REMOVING FREES>" };
    let mut table = Table::new(&["NAME", "LAYER", "APPARENT>", "PLAIN>", "UNIQUE>", "SHARED>", "COMPRESSED>", last]);
    for row in &result.rows {
        let DuRow { name, id, apparent_bytes, plain_bytes, unique_bytes, shared_bytes, stored_bytes, freed_bytes } =
            row;
        table.colored([
            (name.clone().unwrap_or_else(|| "-".to_owned()), Some(Color::Cyan)),
            (short(id), Some(Color::Dim)),
            (units::size(*apparent_bytes), None),
            (units::size(*plain_bytes), None),
            (units::size(*unique_bytes), None),
            (units::size(*shared_bytes), None),
            (units::size(*stored_bytes), None),
            (units::size(*freed_bytes), None),
        ]);
    }
    let mut text = table.render(paint);
    let (plain, stored) = (units::size(result.total_plain_bytes), units::size(result.total_stored_bytes));
    let what = if request.names.is_empty() { "together" } else { "the whole store" };
    text.push_str(&format!("{what} {plain}, {stored} compressed"));
    if let Some(freed) = result.freed_bytes {
        text.push_str(&format!("; removing all of these frees {}", units::size(freed)));
    }
    text.push('\n');
    text
}

/// `layerctl gc`.
pub fn gc(session: &Session, args: args::Gc) -> Result<()> {
    let result: GcResult =
        session.work("gc", &GcRequest { dry_run: args.dry_run, unfinished: args.unfinished }, "collecting garbage")?;
    session.output.answer(&result, |result| {
        let would = if result.dry_run { "would be " } else { "" };
        let (chunks, dead) = (units::plural(result.freed_chunks, "chunk"), units::size(result.dead_bytes));
        let mut text = format!("{chunks} ({dead}) {would}removed, {} stay", units::count(result.live_chunks));
        text.push_str(&format!("; {} {would}freed on disk", units::size(result.freed_bytes)));
        if result.packs_removed + result.packs_rewritten > 0 {
            let (removed, rewritten) = (units::count(result.packs_removed), units::count(result.packs_rewritten));
            text.push_str(&format!(" (packs: {removed} removed, {rewritten} rewritten)"));
        }
        text.push_str(&format!("; {}\n", units::duration(result.seconds)));
        if result.unfinished_bytes > 0 {
            let kept = units::size(result.unfinished_bytes);
            text.push_str(&format!(
                "{kept} of unfinished transfers stay for a day; `layerctl gc --unfinished` removes them\n"
            ));
        }
        text
    })
}

/// `layerctl fsck`.
pub fn fsck(session: &Session, args: args::Fsck) -> Result<u8> {
    let result: FsckResult = if args.rebuild {
        if autostart::find(&session.settings)?.is_some() {
            return Err(crate::daemon::ops::check::in_use());
        }
        rebuild_here(session, &args)?
    } else {
        session.work("fsck", &FsckRequest { repair: args.repair }, "checking")?
    };
    session.output.answer(&result, |result| fsck_text(result, session.output.paint()))?;
    Ok(code_of(result.clean, Class::Corrupt))
}

/// Rebuilds the index in this process, with progress.
fn rebuild_here(session: &Session, args: &args::Fsck) -> Result<FsckResult> {
    let works = std::sync::Arc::new(Works::default());
    let entry = works.begin("rebuild".to_owned(), true)?;
    let (sender, mut events) = tokio::sync::mpsc::channel(64);
    let reporter = Reporter::new(entry.work().clone(), sender);
    let mut display = Display::new(session.output, "rebuilding the index");
    std::thread::scope(|scope| {
        let rebuilding = scope.spawn(|| crate::daemon::ops::check::rebuild(session, args, &reporter));
        loop {
            // Asked before the events are read, so that the last of them are told too.
            let is_finished = rebuilding.is_finished();
            display.update(entry.work().progress());
            while let Ok(event) = events.try_recv() {
                if let Event::Warning(text) = event {
                    display.warn(&text);
                }
            }
            if is_finished {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        display.finish();
        rebuilding
            .join()
            .unwrap_or_else(|_| Err(Failure::new(Class::Failure, "rebuilding died of a mistake in this program")))
    })
}

fn fsck_text(result: &FsckResult, paint: Paint) -> String {
    let (names, layers) = (units::plural(result.names, "name"), units::plural(result.layers, "layer"));
    let (chunks, packs) = (units::plural(result.chunks, "chunk"), units::plural(result.packs, "pack"));
    let mut text = String::new();
    for problem in &result.problems {
        let sign = if problem.repaired { paint.green("repaired:") } else { paint.red("problem:") };
        text.push_str(&format!("{sign} {}: {}\n", problem.subject, problem.detail));
        if !problem.names.is_empty() {
            text.push_str(&format!("  affects {}\n", problem.names.join(", ")));
        }
    }
    let untold = result.problem_count.saturating_sub(result.problems.len() as u64);
    if untold > 0 {
        text.push_str(&format!("and {} more\n", units::plural(untold, "problem")));
    }
    for name in &result.recovered {
        text.push_str(&format!("{} {name}\n", paint.yellow("recovered:")));
    }
    let verdict = match result.problem_count {
        0 => paint.green("clean"),
        count => paint.red(&units::plural(count, "problem")),
    };
    let remote = match result.remote_packs {
        0 => String::new(),
        count => format!(", {} only in the second tier", units::plural(count, "pack")),
    };
    let time = units::duration(result.seconds);
    text.push_str(&format!("{verdict}: {names}, {layers}, {chunks}, {packs}{remote}, {time}\n"));
    text
}

/// `layerctl scrub`.
pub fn scrub(session: &Session, args: args::Scrub) -> Result<u8> {
    let result: ScrubResult = session.work("scrub", &ScrubRequest { heal: args.heal.clone() }, "scrubbing")?;
    session.output.answer(&result, |result| scrub_text(result, session.output.paint()))?;
    if !result.clean && !session.output.json {
        match args.heal {
            None => session.output.note(
                "`layerctl scrub --heal PEER` fetches good copies from a peer that has them; so does importing the same \
                 content again, while this daemon runs",
            ),
            Some(peer) if result.damaged.iter().any(|chunk| !chunk.healed) => session.output.note(&format!(
                "{peer} has no good copies of what is still damaged; another peer may, and importing the same content \
                 again, while this daemon runs, brings them too"
            )),
            Some(_) => {}
        }
    }
    Ok(code_of(result.clean, Class::Corrupt))
}

fn scrub_text(result: &ScrubResult, paint: Paint) -> String {
    let mut text = String::new();
    for problem in &result.pack_problems {
        text.push_str(&format!("{} {problem}\n", paint.red("problem:")));
    }
    for damaged in &result.damaged {
        let state = if damaged.healed { paint.green("healed:") } else { paint.red("damaged:") };
        text.push_str(&format!("{state} {}  {}\n", damaged.id, damaged.detail));
        if !damaged.needed_by.is_empty() {
            text.push_str(&format!("  needed by {}\n", damaged.needed_by.join(", ")));
        }
    }
    let chunks = units::plural(result.chunks, "chunk");
    let damaged = result.damaged.iter().filter(|chunk| !chunk.healed).count() as u64;
    let verdict = match (damaged, result.pack_problems.len() as u64) {
        (0, 0) => format!("{}: {chunks}", paint.green("clean")),
        (0, problems) => format!("{}: none of {chunks} damaged", paint.red(&units::plural(problems, "problem"))),
        (damaged, _) => paint.red(&format!("{} of {chunks} damaged", units::count(damaged))),
    };
    let (size, rate) = (units::size(result.bytes), units::rate(result.bytes, result.seconds));
    text.push_str(&format!("{verdict}, {size} read, {}, {rate}\n", units::duration(result.seconds)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_says_of_what_it_found_how_much_is_damaged() {
        let mut result = ScrubResult {
            clean: false,
            chunks: 6,
            bytes: 0,
            pack_problems: vec!["pack 1: bytes 16 to 20 are no record".to_owned()],
            damaged: Vec::new(),
            healed: 0,
            seconds: 0.0,
        };
        assert!(scrub_text(&result, Paint::PLAIN).contains("1 problem: none of 6 chunks damaged, 0 B read"));
        result.pack_problems.clear();
        assert!(scrub_text(&result, Paint::PLAIN).starts_with("clean: 6 chunks, 0 B read"));
    }
}
