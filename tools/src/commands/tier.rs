//! tier: packs in a bucket.

use super::Session;
use crate::api::Empty;
use crate::api::tier::{TierAddRequest, TierEvictRequest, TierInfo, TierMoved};
use crate::cli::tier::{Tier, TierAction, TierAdd};
use crate::failure::{Failure, Result};
use crate::output::{Paint, facts};
use crate::units;

/// `layerctl tier`.
pub fn tier(session: &Session, args: Tier) -> Result<()> {
    match args.action {
        TierAction::Add(args) => add(session, args),
        TierAction::Status => {
            let info: TierInfo = session.call("tier-status", &Empty {})?;
            session.output.answer(&info, |info| info_text(info, session.output.paint()))?;
            if info.url.is_none() && !session.output.json {
                session.output.note("there is no second tier; `layerctl tier add s3://BUCKET/FOLDER` adds one");
            }
            Ok(())
        }
        TierAction::Sync => moved(session, session.work("tier-sync", &Empty {}, "uploading")?),
        TierAction::Evict { keep } => {
            let request = TierEvictRequest { keep_bytes: keep.map(|text| size(&text)).transpose()? };
            moved(session, session.work("tier-evict", &request, "evicting")?)
        }
        TierAction::Fetch => moved(session, session.work("tier-fetch", &Empty {}, "fetching")?),
        TierAction::Remove => {
            let info: TierInfo = session.call("tier-remove", &Empty {})?;
            session.output.answer(&info, |_| "the second tier is no longer used; its objects stay\n".to_owned())
        }
    }
}

fn add(session: &Session, args: TierAdd) -> Result<()> {
    let request = TierAddRequest {
        url: args.url,
        endpoint: args.endpoint,
        region: args.region,
        keep_bytes: args.keep.map(|text| size(&text)).transpose()?,
        timeout_seconds: args.timeout,
    };
    let info: TierInfo = session.client_of_new_store()?.call("tier-add", &request)?;
    session.output.answer(&info, |info| info_text(info, session.output.paint()))
}

fn size(text: &str) -> Result<u64> {
    let wrong = || Failure::invalid(format!("{text:?} is no size; write it like 10G or \"500 MiB\""));
    units::parse_size(text).ok_or_else(wrong)
}

fn info_text(info: &TierInfo, paint: Paint) -> String {
    let Some(url) = &info.url else { return String::new() };
    let packs = |packs: u64, bytes: u64| format!("{} in {}", units::size(bytes), units::plural(packs, "pack"));
    let mut list = vec![
        ("tier", paint.cyan(url)),
        ("there", packs(info.stored_packs, info.stored_bytes)),
        ("only there", packs(info.remote_packs, info.remote_bytes)),
        ("only here", packs(info.local_packs, info.local_bytes)),
        ("keeps here", info.keep_bytes.map_or_else(|| "everything".to_owned(), units::size)),
    ];
    list.extend(info.endpoint.as_ref().map(|endpoint| ("endpoint", endpoint.clone())));
    list.extend(info.error.as_ref().map(|error| ("problem", paint.red(error))));
    facts(paint, list)
}

fn moved(session: &Session, moved: TierMoved) -> Result<()> {
    session.output.answer(&moved, |moved| {
        let parts = [
            ("uploaded", moved.uploaded_packs, moved.uploaded_bytes),
            ("evicted", moved.evicted_packs, moved.evicted_bytes),
            ("fetched", moved.fetched_packs, moved.fetched_bytes),
        ];
        let told = parts
            .iter()
            .filter(|(_, packs, _)| *packs > 0)
            .map(|(what, packs, bytes)| format!("{what} {} ({})", units::plural(*packs, "pack"), units::size(*bytes)));
        let told: Vec<String> = told.collect();
        let text = if told.is_empty() { "nothing to do".to_owned() } else { told.join(", ") };
        format!("{text}, {}\n", units::duration(moved.seconds))
    })
}
