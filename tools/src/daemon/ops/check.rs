//! Keeping the store well: stat, gc, fsck, scrub, and rebuilding the index without a daemon.

use std::collections::HashSet;
use std::time::Instant;

use layerfs::ChunkId;
use layerfs::chunk::Verified;
use layerfs::monitor::Monitor;
use layerfs::store::{FsckOptions, GcOptions, Problem, ProblemKind};

use super::inspect::serde_text;
use crate::api::Empty;
use crate::api::storage::{
    ClassStat, DamagedChunk, FsckRequest, FsckResult, GcRequest, GcResult, ProblemInfo, ScrubRequest, ScrubResult,
    StatResult,
};
use crate::cli::storage::Fsck;
use crate::commands::Session;
use crate::daemon::http::Context;
use crate::daemon::once_left;
use crate::failure::{Class, Failure, Result};
use crate::units;

/// `/v1/stat`.
pub fn stat(context: &Context, _: Empty) -> Result<StatResult> {
    let stat = context.daemon.store.stat(&*context.reporter)?;
    let class = |class: &layerfs::store::ClassStat| ClassStat {
        class: serde_text(&class.class),
        chunks: class.chunks,
        plain_bytes: class.plain_bytes,
        stored_bytes: class.stored_bytes,
    };
    Ok(StatResult {
        store: context.daemon.settings.store.clone(),
        names: stat.names,
        layers: stat.layers,
        chunks: stat.chunks,
        plain_bytes: stat.plain_bytes,
        stored_bytes: stat.stored_bytes,
        classes: stat.classes.iter().map(class).collect(),
        packs: stat.packs,
        pack_bytes: stat.pack_bytes,
        remote_packs: stat.tier.remote_packs,
        remote_bytes: stat.tier.remote_bytes,
        dead_bytes: stat.dead_bytes,
        referenced_bytes: stat.referenced_bytes,
        dedup_ratio: known(stat.dedup_ratio),
        compression_ratio: known(stat.compression_ratio),
    })
}

/// Of an empty store nothing can be said.
fn known(ratio: f64) -> Option<f64> {
    (ratio.is_finite() && ratio > 0.0).then_some((ratio * 1000.0).round() / 1000.0)
}

/// `/v1/gc`.
pub fn gc(context: &Context, request: GcRequest) -> Result<GcResult> {
    let started = Instant::now();
    let options = GcOptions { dry_run: request.dry_run, unfinished: request.unfinished };
    let report = context.daemon.store.gc(&*context.reporter, options)?;
    Ok(GcResult {
        dry_run: request.dry_run,
        live_layers: report.live_layers,
        live_chunks: report.live_chunks,
        freed_chunks: report.dead_chunks,
        dead_bytes: report.dead_bytes,
        unfinished_bytes: report.staged_bytes,
        freed_bytes: report.freed_bytes,
        packs_removed: report.packs_removed,
        packs_rewritten: report.packs_rewritten,
        seconds: units::seconds(started.elapsed()),
    })
}

/// `/v1/fsck`.
pub fn fsck(context: &Context, request: FsckRequest) -> Result<FsckResult> {
    let started = Instant::now();
    let report = context.daemon.store.fsck(&*context.reporter, FsckOptions { repair: request.repair })?;
    let problem = |problem: &Problem| ProblemInfo {
        kind: serde_text(&problem.kind),
        subject: problem.subject.clone(),
        detail: problem.detail.clone(),
        names: problem.names.clone(),
        repaired: problem.repaired,
    };
    Ok(FsckResult {
        clean: report.is_clean(),
        names: report.names,
        layers: report.layers,
        chunks: report.chunks + report.remote_chunks,
        packs: report.packs,
        remote_packs: report.remote_packs,
        problems: report.problems.iter().map(problem).collect(),
        problem_count: report.problem_count,
        recovered: Vec::new(),
        seconds: units::seconds(started.elapsed()),
    })
}

/// `/v1/scrub`.
pub fn scrub(context: &Context, request: ScrubRequest) -> Result<ScrubResult> {
    if let Some(peer) = &request.heal {
        // A wrong name is told before everything has been read.
        let known = context.daemon.peering.node().peers().get(peer);
        known.map_err(|error| super::peers::with_peers_hint(error.into()))?;
    }
    let started = Instant::now();
    let report = context.daemon.store.scrub(&*context.reporter)?;
    let healed = match &request.heal {
        Some(peer) if !report.damaged.is_empty() => heal(context, &report.damaged, peer)?,
        _ => HashSet::new(),
    };
    let damaged = |chunk: &layerfs::store::DamagedChunk| DamagedChunk {
        id: chunk.id.to_string(),
        detail: chunk.detail.clone(),
        needed_by: chunk.names.clone(),
        healed: healed.contains(&chunk.id),
    };
    Ok(ScrubResult {
        clean: report.pack_problems.is_empty() && report.damaged.iter().all(|chunk| healed.contains(&chunk.id)),
        chunks: report.chunks,
        bytes: report.plain_bytes,
        pack_problems: report.pack_problems.clone(),
        damaged: report.damaged.iter().map(damaged).collect(),
        healed: healed.len() as u64,
        seconds: units::seconds(started.elapsed()),
    })
}

/// Fetches good copies of damaged chunks from a peer and stores them; returns which there were.
fn heal(context: &Context, damaged: &[layerfs::store::DamagedChunk], peer: &str) -> Result<HashSet<ChunkId>> {
    context.reporter.phase("healing", None);
    let ids: Vec<ChunkId> = damaged.iter().map(|chunk| chunk.id).collect();
    let session = context.daemon.store.session("heal");
    let mut healed = HashSet::new();
    let sink = |chunk: Verified| {
        healed.insert(chunk.stored().id);
        context.reporter.items(1);
        session.replace(chunk)
    };
    let fetched = context.block_on(context.daemon.peering.node().fetch_chunks(&ids, peer, sink));
    fetched.map_err(|error| super::peers::with_peers_hint(error.into()))?;
    session.commit()?;
    Ok(healed)
}

/// The index can't be rebuilt now.
pub fn in_use() -> Failure {
    let failure = Failure::new(Class::Busy, "the index cannot be rebuilt while the daemon uses it");
    failure.hint("stop it with `layerctl daemon stop` and repeat the command")
}

/// Rebuilds the index from the packs. No daemon may run; the store's lock sees to that.
pub fn rebuild(session: &Session, args: &Fsck, monitor: &dyn Monitor) -> Result<FsckResult> {
    let started = Instant::now();
    let settings = &session.settings;
    if args.tier.is_none() {
        crate::autostart::require_store(settings)?;
    }
    let options = crate::daemon::store_options(settings);
    let report = match &args.tier {
        None => once_left(settings, || layerfs::store::rebuild(&settings.store, options, monitor))?,
        Some(url) => super::tier::rebuild(settings, options, url, args, monitor)?,
    };
    let report = report.ok_or_else(in_use)?;
    let problem = |detail: &String| ProblemInfo {
        kind: "pack-damaged".to_owned(),
        subject: "packs".to_owned(),
        detail: detail.clone(),
        names: Vec::new(),
        repaired: false,
    };
    let mut problems: Vec<ProblemInfo> = report.pack_problems.iter().map(problem).collect();
    if report.damaged_chunks > 0 {
        let what = match report.damaged_chunks {
            1 => "1 chunk is damaged and was left out".to_owned(),
            count => format!("{} are damaged and were left out", units::plural(count, "chunk")),
        };
        problems.push(problem(&what));
    }
    problems.extend(report.record_problems.iter().map(|detail| ProblemInfo {
        kind: serde_text(&ProblemKind::NamesLost),
        subject: "the old index".to_owned(),
        detail: format!(
            "{detail}; names, uppers, mounts and peers may be lost; what could not be read is in index.damaged"
        ),
        names: Vec::new(),
        repaired: false,
    }));
    problems.extend(report.missing_layers.into_iter().map(|(layer, names)| ProblemInfo {
        kind: serde_text(&ProblemKind::LayerBroken),
        subject: layer.to_string(),
        detail: "no good copy of its manifest is in the packs".to_owned(),
        names,
        repaired: false,
    }));
    Ok(FsckResult {
        clean: problems.is_empty(),
        names: report.names,
        layers: report.layers,
        chunks: report.chunks,
        packs: report.packs,
        remote_packs: 0,
        problem_count: problems.len() as u64,
        problems,
        recovered: report.recovered,
        seconds: units::seconds(started.elapsed()),
    })
}
