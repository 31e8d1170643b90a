//! CRIU's memory images: which addresses the pages of a `pages-N.img` have.
//!
//! A `pages-N.img` is a bare run of pages; the `pagemap-PID.img` that belongs to it says for which addresses, as a magic
//! number and records in protobuf's encoding, each with its length in front. Read for cutting by address, written by
//! live scans in the same form, so that a scan's file is cut as a dump's. Invariant: nothing in an image is believed
//! before it is checked.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use layerfs::{Error, Result};

/// A page, in bytes. CRIU's images count in these.
pub const PAGE: u64 = 4096;
/// Memory is cut where the address crosses a multiple of this, in bytes.
pub const WINDOW: u64 = 64 * 1024;
const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];
/// The pages of this range are in the file (and not in a parent's, or nowhere yet).
const PRESENT: u64 = 1 << 2;
/// They are in a parent's file.
const IN_PARENT: u64 = 1;
/// No image of a pagemap is larger: that would be for a petabyte.
const MAX_IMAGE: u64 = 1 << 30;

/// A range of addresses whose pages follow one another in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first address.
    pub address: u64,
    /// How many pages.
    pub pages: u64,
}

/// A pagemap: which `pages-N.img` it is about, and what is in that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// N.
    pub pages_id: u64,
    /// What is in the file, in its order.
    pub runs: Vec<Run>,
}

impl Pagemap {
    /// Parses an image.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn parse(image: &[u8]) -> Result<Pagemap> {
        let bad = |detail: &str| Error::corrupt("pagemap image", detail);
        let mut rest = image.strip_prefix(&MAGIC[..]).ok_or_else(|| bad("it is none"))?;
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (length, after) = rest.split_first_chunk::<4>().ok_or_else(|| bad("it is cut off"))?;
            let length = u32::from_le_bytes(*length) as usize;
            let record = after.get(..length).ok_or_else(|| bad("it is cut off"))?;
            records.push(fields(record).ok_or_else(|| bad("a record is malformed"))?);
            rest = &after[length..];
        }
        let (head, entries) = records.split_first().ok_or_else(|| bad("it has no head"))?;
        let pages_id = *head.get(&1).ok_or_else(|| bad("it names no file of pages"))?;
        let mut runs = Vec::new();
        for entry in entries {
            let number = |field: u64| entry.get(&field).copied();
            let flags = number(4).unwrap_or(PRESENT | number(3).map_or(0, |in_parent| in_parent & IN_PARENT));
            let address = number(1).ok_or_else(|| bad("a range has no address"))?;
            let pages = number(5).or(number(2)).ok_or_else(|| bad("a range has no length"))?;
            if address % PAGE != 0 || pages.checked_mul(PAGE).and_then(|bytes| address.checked_add(bytes)).is_none() {
                return Err(bad("a range is impossible"));
            }
            if flags & PRESENT != 0 && flags & IN_PARENT == 0 {
                runs.push(Run { address, pages });
            }
        }
        Ok(Pagemap { pages_id, runs })
    }

    /// The image.
    pub fn encode(&self) -> Vec<u8> {
        let mut image = MAGIC.to_vec();
        let mut put = |values: &[(u8, u64)]| {
            let mut record = Vec::new();
            for (field, value) in values {
                record.push(field << 3);
                varint(&mut record, *value);
            }
            image.extend_from_slice(&(record.len() as u32).to_le_bytes());
            image.extend_from_slice(&record);
        };
        put(&[(1, self.pages_id)]);
        for run in &self.runs {
            put(&[(1, run.address), (2, run.pages & u64::from(u32::MAX)), (4, PRESENT), (5, run.pages)]);
        }
        image
    }

    /// Where to cut the file of pages, as offsets in it, ascending: where the address crosses a window's boundary. A
    /// range that goes on where another ends, in the same window, is not a place to cut.
    pub fn cuts(&self) -> Vec<u64> {
        let mut cuts = Vec::new();
        let mut offset = 0;
        let mut window = None;
        for run in &self.runs {
            let end = run.address + run.pages * PAGE;
            let mut address = run.address;
            while address < end {
                if window.is_some_and(|window| window != address / WINDOW) {
                    cuts.push(offset);
                }
                window = Some(address / WINDOW);
                let next = ((address / WINDOW + 1) * WINDOW).min(end);
                offset += next - address;
                address = next;
            }
        }
        cuts
    }
}

/// The numbers in a record of protobuf's, by field; what isn't a number is skipped.
fn fields(mut record: &[u8]) -> Option<BTreeMap<u64, u64>> {
    let mut fields = BTreeMap::new();
    while !record.is_empty() {
        let key = take_varint(&mut record)?;
        match key & 7 {
            0 => {
                fields.insert(key >> 3, take_varint(&mut record)?);
            }
            1 => record = record.get(8..)?,
            2 => {
                let length = usize::try_from(take_varint(&mut record)?).ok()?;
                record = record.get(length..)?;
            }
            5 => record = record.get(4..)?,
            _ => return None,
        }
    }
    Some(fields)
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// For each `pages-N.img` in `folder` that a pagemap is about: its name and where to cut it.
///
/// # Errors
/// [`Error::Corrupt`] if a pagemap is malformed; those of the disk.
pub fn cuts_in(folder: &Path) -> Result<BTreeMap<String, Vec<u64>>> {
    let failed = |error: io::Error| Error::file("read", folder, error);
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("pagemap-") && name.ends_with(".img")) else {
            continue;
        };
        if entry.metadata().map_err(failed)?.len() > MAX_IMAGE {
            return Err(Error::corrupt("pagemap image", format!("{name} is impossibly large")));
        }
        let image = fs::read(entry.path()).map_err(|error| Error::file("read", entry.path(), error))?;
        let pagemap = Pagemap::parse(&image)?;
        found.insert(format!("pages-{}.img", pagemap.pages_id), pagemap.cuts());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU 4.2.1 wrote it for a small program.
    const REAL: &str = "19435654254008560200000008010b0000000880a080021000200428010b000000088080a902100020042805";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn criu_s_own_images_are_understood() {
        let pagemap = Pagemap::parse(&bytes(REAL)).unwrap();
        assert_eq!(pagemap.pages_id, 1);
        assert_eq!(pagemap.runs, [Run { address: 0x40_1000, pages: 1 }, Run { address: 0x4a_4000, pages: 5 }]);
        let whole = bytes(REAL);
        for cut in 0..whole.len() {
            // Nothing malformed is believed, and what is cut off between records is only shorter.
            let _ = Pagemap::parse(&whole[..cut]);
        }
        assert!(Pagemap::parse(&whole[..whole.len() - 1]).is_err());
        assert!(Pagemap::parse(b"").is_err());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let runs = vec![Run { address: 0x7fff_ffff_f000, pages: 1 << 33 }, Run { address: 0, pages: 1 }];
        let pagemap = Pagemap { pages_id: 300, runs };
        assert_eq!(Pagemap::parse(&pagemap.encode()).unwrap(), pagemap);
    }

    #[test]
    fn the_file_is_cut_where_addresses_cross_a_window() {
        let run = |address, pages| Run { address, pages };
        // Two windows, one range in both; a gap within a window; a jump.
        let runs = vec![run(0xf000, 3), run(0x1_8000, 2), run(0x10_0000, 16), run(0x11_0000, 1)];
        let pagemap = Pagemap { pages_id: 1, runs };
        let page = |number: u64| number * PAGE;
        assert_eq!(pagemap.cuts(), [page(1), page(5), page(21)]);
        // A mapping that grew before it moves the offsets, and nothing else.
        let runs = [vec![run(0x8000, 2)], pagemap.runs].concat();
        assert_eq!(Pagemap { pages_id: 1, runs }.cuts(), [page(3), page(7), page(23)]);
    }
}
