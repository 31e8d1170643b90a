//! The operations of the control API. Each is a function from a request to an answer; this table is all of them.

pub mod activity;
pub mod check;
pub mod export;
pub mod guests;
pub mod import;
pub mod inspect;
pub mod layers;
pub mod migrate;
pub mod mounts;
pub mod peers;
pub mod registry;
pub mod squash;
pub mod storage;
pub mod tier;
pub mod transfers;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use axum::Router;

use super::Daemon;
use super::http::{Context, Length, download, operation, upload};
use crate::api::{Cancel, Empty, Status};
use crate::failure::{Class, Failure, Result};

/// Fails if `path`, or the folder that it is to be made in, is the store's own: its folder or what lies there, but for
/// what is mounted there.
fn refuse_own(store: &Path, path: &Path, what: &str) -> Result<()> {
    let Ok(folder) = store.canonicalize() else { return Ok(()) };
    let Some(there) = path.ancestors().find_map(|path| path.canonicalize().ok()) else { return Ok(()) };
    let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
    if there.starts_with(&folder) && device(&there) == device(&folder) {
        let text = format!("{} lies in the store's own folder, {}", path.display(), folder.display());
        return Err(Failure::invalid(text).hint(format!("choose {what} outside of it")));
    }
    Ok(())
}

/// Adds every operation to `router`.
pub fn routes(router: Router<Arc<Daemon>>) -> Router<Arc<Daemon>> {
    use Length::{Any, Long, Short};
    router
        .route("/v1/status", operation("status", Short, status))
        .route("/v1/stop", operation("stop", Short, super::stop))
        .route("/v1/cancel", operation("cancel", Short, cancel))
        .route("/v1/list", operation("list", Short, layers::list))
        .route("/v1/tree", operation("tree", Short, layers::tree))
        .route("/v1/log", operation("log", Short, layers::log))
        .route("/v1/tag", operation("tag", Short, layers::tag))
        .route("/v1/squash", operation("squash", Long, squash::squash))
        .route("/v1/remove", operation("remove", Short, layers::remove))
        .route("/v1/inspect", operation("inspect", Long, inspect::inspect))
        .route("/v1/traces", operation("traces", Short, inspect::traces))
        .route("/v1/traces-remove", operation("traces-remove", Short, inspect::traces_remove))
        .route("/v1/diff", operation("diff", Long, inspect::diff))
        .route("/v1/mount", operation("mount", Short, mounts::mount))
        .route("/v1/remount", operation("remount", Short, mounts::remount))
        .route("/v1/umount", operation("umount", Short, mounts::umount))
        .route("/v1/mounts", operation("mounts", Short, mounts::list))
        .route("/v1/seal", operation("seal", Long, mounts::seal))
        .route("/v1/activity", operation("activity", Short, activity::activity))
        .route("/v1/requests", operation("requests", Short, activity::requests))
        .route("/v1/log-filter", operation("log-filter", Short, super::log::filter))
        .route("/v1/uppers", operation("uppers", Short, mounts::uppers))
        .route("/v1/uppers-remove", operation("uppers-remove", Short, mounts::uppers_remove))
        .route("/v1/push", operation("push", Long, peers::push))
        .route("/v1/stream", super::streams::route())
        .route("/v1/stream-failed", operation("stream-failed", Short, peers::stream_failed))
        .route("/v1/pull", operation("pull", Long, peers::pull))
        .route("/v1/transfers", operation("transfers", Short, transfers::list))
        .route("/v1/transfer-set", operation("transfer-set", Short, transfers::set))
        .route("/v1/limit", operation("limit", Short, transfers::limit))
        .route("/v1/peer-set", operation("peer-set", Short, peers::set))
        .route("/v1/registry-push", operation("registry-push", Long, registry::push))
        .route("/v1/registry-pull", operation("registry-pull", Long, registry::pull))
        .route("/v1/peers", operation("peers", Short, peers::list))
        .route("/v1/peer-add", operation("peer-add", Short, peers::add))
        .route("/v1/peer-probe", operation("peer-probe", Short, peers::probe))
        .route("/v1/peer-remove", operation("peer-remove", Short, peers::remove))
        .route("/v1/peer-id", operation("peer-id", Short, peers::id))
        .route("/v1/import", operation("import", Long, import::import))
        .route("/v1/import-stream", upload("import", import::import_stream))
        .route("/v1/export", operation("export", Long, export::export))
        .route("/v1/export-stream", download("export", export::export_stream))
        .route("/v1/guests", operation("guests", Short, guests::list))
        .route("/v1/guest-create", operation("guest-create", Short, guests::create))
        .route("/v1/guest-start", operation("guest-start", Long, guests::start))
        .route("/v1/guest-stop", operation("guest-stop", Long, guests::stop))
        .route("/v1/guest-show", operation("guest-show", Short, guests::show))
        .route("/v1/guest-check", operation("guest-check", Short, guests::check))
        .route("/v1/guest-exec", operation("guest-exec", Any, guests::exec))
        .route("/v1/guest-exec-stream", guests::attach::route())
        .route("/v1/guest-checkpoint", operation("guest-checkpoint", Long, guests::checkpoint))
        .route("/v1/guest-restore", operation("guest-restore", Long, guests::restore))
        .route("/v1/guest-remove", operation("guest-remove", Long, guests::remove))
        .route("/v1/guest-resolve", operation("guest-resolve", Long, migrate::resolve))
        .route("/v1/migrate", operation("migrate", Long, migrate::migrate))
        .route("/v1/reports", operation("reports", Short, migrate::reports))
        .route("/v1/report", operation("report", Short, migrate::report))
        .route("/v1/stat", operation("stat", Long, check::stat))
        .route("/v1/gc", operation("gc", Long, check::gc))
        .route("/v1/fsck", operation("fsck", Long, check::fsck))
        .route("/v1/scrub", operation("scrub", Long, check::scrub))
        .route("/v1/tier-add", operation("tier-add", Short, tier::add))
        .route("/v1/tier-status", operation("tier-status", Short, tier::status))
        .route("/v1/tier-sync", operation("tier-sync", Long, tier::sync))
        .route("/v1/tier-evict", operation("tier-evict", Long, tier::evict))
        .route("/v1/tier-fetch", operation("tier-fetch", Long, tier::fetch))
        .route("/v1/tier-remove", operation("tier-remove", Short, tier::remove))
        .route("/v1/du", operation("du", Long, storage::du))
        .route("/v1/why", operation("why", Long, storage::why))
}

fn status(context: &Context, _: Empty) -> Result<Status> {
    Ok(context.daemon.status())
}

fn cancel(context: &Context, request: Cancel) -> Result<Empty> {
    let work = context.daemon.works.get(request.work).ok_or_else(|| {
        Failure::new(Class::NotFound, format!("there is no work {}; it may have ended", request.work))
    })?;
    work.cancel();
    Ok(Empty {})
}
