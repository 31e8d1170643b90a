//! Chunks that are the receiver's own but for some pages: only these pages go. PROTOCOL.md, "Patches".
//!
//! Memory changes page by page, and comparing pages is a hundred times quicker than having zstd look for what two chunks share.
//! Hides how pages are counted. Invariant: what comes out of pages and bases has the bases' lengths.

use layerfs::chunk::Class;
use layerfs::{Error, Result};

use crate::bundle::{Table, Unpacked, expand};
use crate::wire::MAX_BUNDLE_BYTES;

/// A page, in bytes.
pub const PAGE: usize = 4096;
/// A chunk that is sent so has so many bytes at most: a bit for each page.
pub const MAX_BYTES: usize = PAGE * u16::BITS as usize;

/// The pages in which `new` differs from `old`, a bit for each; none if they aren't of one length, or too long.
pub fn differing(new: &[u8], old: &[u8]) -> Option<u16> {
    if new.len() != old.len() || new.len() > MAX_BYTES {
        return None;
    }
    let pairs = new.chunks(PAGE).zip(old.chunks(PAGE)).enumerate();
    Some(pairs.filter(|(_, (new, old))| new != old).fold(0, |all, (at, _)| all | 1 << at))
}

/// Whether so few pages of `bytes` are among `pages` that it is better to send these alone.
pub fn are_few(pages: u16, bytes: usize) -> bool {
    pages != 0 && pages.count_ones() as usize * 2 <= bytes.div_ceil(PAGE)
}

/// Appends those `pages` of `plain` to `out`.
pub fn put(plain: &[u8], pages: u16, out: &mut Vec<u8>) {
    let chosen = plain.chunks(PAGE).enumerate().filter(|(at, _)| pages >> at & 1 == 1);
    chosen.for_each(|(_, page)| out.extend_from_slice(page));
}

/// The chunks that `frame` makes of `bases`, each with the pages of it that are replaced; the frame holds `total` bytes.
///
/// # Errors
/// [`Error::Corrupt`] if it doesn't hold just those pages.
pub fn unpack(bases: &[(u16, impl AsRef<[u8]>)], frame: &[u8], total: usize) -> Result<Unpacked> {
    let corrupt = |detail: String| Error::corrupt("patches", detail);
    let (mut prefix, mut table, mut plain) = (Vec::new(), Table::default(), Vec::new());
    for (pages, base) in bases {
        let base = base.as_ref();
        let is_beyond = u64::from(*pages) >> base.len().div_ceil(PAGE).min(63) != 0;
        if is_beyond || base.len() > MAX_BYTES || plain.len() + base.len() > MAX_BUNDLE_BYTES {
            return Err(corrupt(format!("pages {pages:#06x} of a base of {} bytes", base.len())));
        }
        put(base, *pages, &mut prefix);
        plain.extend_from_slice(base);
        table.chunks.push((Class::Data, base.len() as u32));
    }
    if prefix.len() != total {
        return Err(corrupt(format!("{total} bytes instead of {}", prefix.len())));
    }
    let new = expand(&prefix, frame, total)?;
    let (mut rest, mut start) = (&new[..], 0);
    for (pages, base) in bases {
        let end = start + base.as_ref().len();
        for (at, page) in plain[start..end].chunks_mut(PAGE).enumerate() {
            if pages >> at & 1 == 1 {
                let (taken, after) = rest.split_at(page.len());
                page.copy_from_slice(taken);
                rest = after;
            }
        }
        start = end;
    }
    Ok(Unpacked::of(table, plain))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bundle::squeeze;

    fn opened(unpacked: Result<Unpacked>) -> Result<Vec<Vec<u8>>> {
        let mut chunks = Vec::new();
        unpacked?.visit(None, &|_| None, &mut |_, _, plain| chunks.push(plain.to_vec()))?;
        Ok(chunks)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn what_changed_page_by_page_comes_back(
            chunks in prop::collection::vec((1usize..=MAX_BYTES, any::<u16>(), any::<u64>()), 1..6),
            lie in any::<u16>(),
        ) {
            let (mut bases, mut news, mut old_pages, mut new_pages) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (bytes, changed, seed) in chunks {
                let mut old = vec![0; bytes];
                blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut old);
                let mut new = old.clone();
                let places = (0..16).filter(|at| changed >> at & 1 == 1 && at * PAGE < bytes);
                places.for_each(|at| new[at * PAGE] ^= 1);
                let pages = differing(&new, &old).unwrap();
                prop_assert_eq!(pages.count_ones(), (0..bytes.div_ceil(PAGE)).filter(|at| changed >> at & 1 == 1).count() as u32);
                put(&old, pages, &mut old_pages);
                put(&new, pages, &mut new_pages);
                bases.push((pages, old));
                news.push(new);
            }
            prop_assume!(!new_pages.is_empty());
            let frame = squeeze(&old_pages, &new_pages, 3).unwrap();
            prop_assert_eq!(opened(unpack(&bases, &frame, new_pages.len())).unwrap(), news);
            // Another length, or other pages: refused if their bytes aren't as many, and never a panic.
            prop_assert!(unpack(&bases, &frame, new_pages.len() + 1).is_err());
            bases[0].0 = lie;
            let _ = unpack(&bases, &frame, new_pages.len());
        }
    }

    #[test]
    fn only_what_is_as_long_is_compared() {
        assert_eq!(differing(&[0; 10], &[0; 11]), None);
        assert_eq!(differing(&[0; MAX_BYTES + 1], &[0; MAX_BYTES + 1]), None);
        assert_eq!(differing(&[0; MAX_BYTES], &[0; MAX_BYTES]), Some(0));
        assert!(are_few(0x00ff, MAX_BYTES) && !are_few(0x01ff, MAX_BYTES) && !are_few(0, MAX_BYTES));
        assert!(!are_few(1, PAGE) && are_few(1, 2 * PAGE));
        // A page that a base doesn't have.
        assert!(unpack(&[(0b10, vec![0; PAGE])], &squeeze(&[], b"", 3).unwrap(), 0).is_err());
    }
}
