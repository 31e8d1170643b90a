//! Several chunks as one zstd frame, with chunks that the other side has as prefix. PROTOCOL.md, "Bundles".
//!
//! Hides zstd's contexts and windows. Invariants: what is unpacked has the lengths that were announced, within the
//! bundle's bounds, or is an error; nothing is allocated beyond those; a frame that decodes to other bytes than were
//! packed makes chunks with other ids, which nothing refers to.

use bytes::Bytes;
use layerfs::{Error, Result};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter};

use crate::wire::MAX_BUNDLE_BYTES;

/// The largest window that a frame may ask for, as a power of two: bases and chunks.
const WINDOW_LOG: u32 = 21;
/// The smallest that zstd knows.
const MIN_WINDOW_LOG: u32 = 10;

/// Compresses `plain` at `level` against `prefix`. Returns nothing if zstd finds no memory.
pub fn pack(prefix: &[u8], plain: &[u8], level: i32) -> Option<Vec<u8>> {
    debug_assert!(plain.len() <= MAX_BUNDLE_BYTES && prefix.len() <= MAX_BUNDLE_BYTES);
    let span = (prefix.len() + plain.len()).next_power_of_two().ilog2();
    let mut context = CCtx::try_create()?;
    context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
    context.set_parameter(CParameter::WindowLog(span.clamp(MIN_WINDOW_LOG, WINDOW_LOG))).ok()?;
    if !prefix.is_empty() {
        if level < 9 && prefix.len() > 128 * 1024 {
            // The quick levels' own tables remember too little of a long prefix.
            context.set_parameter(CParameter::EnableLongDistanceMatching(true)).ok()?;
            context.set_parameter(CParameter::LdmMinMatch(32)).ok()?;
            context.set_parameter(CParameter::LdmHashRateLog(4)).ok()?;
        }
        context.ref_prefix(prefix).ok()?;
    }
    let mut frame = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()));
    context.compress2(&mut frame, plain).ok()?;
    Some(frame)
}

/// The plain bytes of the chunks of `lengths`, packed against `prefix`.
///
/// # Errors
/// [`Error::Corrupt`] if the frame doesn't hold just these.
pub fn unpack(prefix: &[u8], frame: &[u8], lengths: impl Iterator<Item = u32>) -> Result<Vec<Bytes>> {
    let damaged = |detail: String| Error::corrupt("bundle", detail);
    let mut ends = Vec::new();
    let mut total = 0usize;
    for length in lengths {
        total = total.saturating_add(length as usize);
        ends.push(total);
    }
    if total == 0 || total > MAX_BUNDLE_BYTES || prefix.len() > MAX_BUNDLE_BYTES {
        return Err(damaged(format!("{total} plain bytes over {} of bases", prefix.len())));
    }
    let zstd_error = |code| damaged(format!("zstd: {}", zstd::zstd_safe::get_error_name(code)));
    let mut context = DCtx::try_create().ok_or_else(|| damaged("no memory for it".to_owned()))?;
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).map_err(zstd_error)?;
    if !prefix.is_empty() {
        context.ref_prefix(prefix).map_err(zstd_error)?;
    }
    let mut plain = Vec::with_capacity(total);
    context.decompress(&mut plain, frame).map_err(zstd_error)?;
    if plain.len() != total {
        return Err(damaged(format!("{} plain bytes instead of {total}", plain.len())));
    }
    let plain = Bytes::from(plain);
    let mut start = 0;
    Ok(ends
        .into_iter()
        .map(|end| {
            let chunk = plain.slice(start..end);
            start = end;
            chunk
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(pieces: &[Vec<u8>]) -> Vec<u8> {
        pieces.concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn what_is_packed_unpacks(
            pieces in prop::collection::vec(prop::collection::vec(0u8..4, 1..3000), 1..20),
            prefix in prop::collection::vec(0u8..4, 0..20_000),
            level in 1i32..20,
        ) {
            let plain = joined(&pieces);
            let lengths: Vec<u32> = pieces.iter().map(|piece| piece.len() as u32).collect();
            let frame = pack(&prefix, &plain, level).unwrap();
            let unpacked = unpack(&prefix, &frame, lengths.iter().copied()).unwrap();
            prop_assert_eq!(unpacked, pieces);
            // Other lengths than were packed are seen.
            let wrong = lengths.iter().copied().chain([1]);
            prop_assert!(unpack(&prefix, &frame, wrong).is_err());
        }

        #[test]
        fn damaged_frames_never_panic_and_keep_their_lengths(
            flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
            prefix in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            let plain: Vec<u8> = prefix.iter().rev().copied().chain((0..3000u32).flat_map(u32::to_le_bytes)).collect();
            let mut frame = pack(&prefix, &plain, 5).unwrap();
            for (at, bit) in flips {
                let at = at.index(frame.len());
                frame[at] ^= 1 << bit;
            }
            if let Ok(chunks) = unpack(&prefix, &frame, [plain.len() as u32].into_iter()) {
                prop_assert_eq!(chunks[0].len(), plain.len());
            }
        }
    }

    #[test]
    fn a_prefix_as_long_as_may_be_is_reached_to_its_begin() {
        let mut prefix = vec![0; MAX_BUNDLE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut prefix);
        for level in [1, 3, 9, 19] {
            // A copy: zstd takes no match from where it reads.
            let frame = pack(&prefix, &prefix.clone(), level).unwrap();
            assert!(frame.len() < 2000, "{} bytes at level {level}", frame.len());
            assert_eq!(unpack(&prefix, &frame, (0..4).map(|_| 1 << 18)).unwrap().concat(), prefix);
        }
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let frame = pack(&[], &vec![0; MAX_BUNDLE_BYTES], 3).unwrap();
        assert!(frame.len() < 1000);
        assert!(unpack(&[], &frame, [1000].into_iter()).is_err());
        assert!(unpack(&[], &frame, std::iter::repeat_n(1 << 18, 5)).is_err());
    }
}
