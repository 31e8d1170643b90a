//! Reads the memory of running processes, without stopping them, into files like those of a dump.
//!
//! The kernel tells by PAGEMAP_SCAN which pages CRIU would save, and `process_vm_readv` reads them. What changes meanwhile
//! is read as it happens to be: the dump decides. Hides both calls. Invariant: at most [`PIECE`] bytes are in memory at
//! a time, and the runs of one mapping.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use super::pagemap::{PAGE, Pagemap, Run};
use super::processes::{Process, inner_pid};
use super::{Written, state};

/// So much is read at a time, in bytes.
const PIECE: usize = 1 << 20;
/// So many runs are asked for at a time.
const REGIONS: usize = 1024;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The kernel's `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// A mapping of a process.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    inode: u64,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// Pages of its own.
    Private,
    /// Memory that processes share, without a file.
    Shared,
    /// Saved in no image: a file's pages, a device's, the kernel's.
    Other,
}

/// Reads the memory of `first` and its descendants into `into`.
pub(super) fn tree(first: &Process, into: &Path) -> Result<Written, String> {
    let mut next_id = 1;
    let mut shared = BTreeSet::new();
    for pid in first.tree() {
        // One that has ended meanwhile is in no dump either.
        let Some(inner) = inner_pid(pid) else { continue };
        let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/maps")) else { continue };
        let Ok(pagemap) = File::open(format!("/proc/{pid}/pagemap")) else { continue };
        let mappings: Vec<Mapping> = maps.lines().filter_map(parse).collect();
        let mut runs = Vec::new();
        for mapping in mappings.iter().filter(|mapping| mapping.kind == Kind::Private) {
            present(&pagemap, mapping, IS_FILE | IS_ZERO, &mut runs)?;
        }
        let at = |run: &Run| run.address;
        write(pid, into, &inner.to_string(), next_id, &runs, &runs.iter().map(at).collect::<Vec<_>>())?;
        next_id += 1;
        for (inode, parts) in shared_parts(&mappings) {
            if !shared.insert(inode) {
                continue;
            }
            let (mut runs, mut addresses) = (Vec::new(), Vec::new());
            for mapping in parts {
                let mut found = Vec::new();
                present(&pagemap, mapping, 0, &mut found)?;
                addresses.extend(found.iter().map(at));
                let moved = |run: Run| Run { address: run.address - mapping.start + mapping.offset, ..run };
                runs.extend(found.into_iter().map(moved));
            }
            write(pid, into, &format!("shmem-{inode}"), next_id, &runs, &addresses)?;
            next_id += 1;
        }
    }
    let (memory_bytes, other_bytes) = state::sizes(into).map_err(|error| error.to_string())?;
    Ok(Written { memory_bytes, other_bytes, frozen: Duration::ZERO, has_ended: false })
}

/// Memory that is shared, by its inode: mappings of it that don't overlap, by offset.
fn shared_parts(mappings: &[Mapping]) -> BTreeMap<u64, Vec<&Mapping>> {
    let mut found: BTreeMap<u64, Vec<&Mapping>> = BTreeMap::new();
    for mapping in mappings.iter().filter(|mapping| mapping.kind == Kind::Shared) {
        found.entry(mapping.inode).or_default().push(mapping);
    }
    for parts in found.values_mut() {
        parts.sort_by_key(|mapping| mapping.offset);
        let mut end = 0;
        parts.retain(|mapping| {
            let is_new = mapping.offset >= end;
            end = end.max(mapping.offset + (mapping.end - mapping.start));
            is_new
        });
    }
    found
}

/// A line of `/proc/PID/maps`.
fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let _device = words.next()?;
    let inode = words.next()?.parse().ok()?;
    let name = words.collect::<Vec<_>>().join(" ");
    let is_memory = ["/dev/zero (deleted)", "/memfd:", "/SYSV"].iter().any(|sign| name.starts_with(sign));
    let kind = match rights.as_bytes().get(3)? {
        b's' if is_memory => Kind::Shared,
        b'p' if !matches!(name.as_str(), "[vvar]" | "[vvar_vclock]" | "[vsyscall]") && !name.starts_with("/dev/") => {
            Kind::Private
        }
        _ => Kind::Other,
    };
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(Mapping { start: number(start)?, end: number(end)?, offset, inode, kind })
}

/// Appends the runs of pages of `mapping` that are there and are none of `without`.
fn present(pagemap: &File, mapping: &Mapping, without: u64, runs: &mut Vec<Run>) -> Result<(), String> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut start = mapping.start;
    while start < mapping.end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end: mapping.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: without,
            category_mask: without,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_PRESENT,
            ..ScanArgument::default()
        };
        // SAFETY: the kernel reads `argument` and writes it and at most `vec_len` regions, all of which live here.
        #[allow(unsafe_code)]
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        if found < 0 {
            let error = io::Error::last_os_error();
            // A mapping that was there a moment ago may be gone.
            return match error.raw_os_error() {
                Some(libc::ENOTTY | libc::EINVAL) => {
                    Err("reading a running guest's memory needs Linux 6.7 or later; move it without rounds".to_owned())
                }
                Some(libc::ENOMEM | libc::EFAULT | libc::ESRCH) => Ok(()),
                _ => Err(format!("its pages cannot be found: {error}")),
            };
        }
        for region in regions.iter().take(found as usize) {
            match runs.last_mut().filter(|last| last.address + last.pages * PAGE == region.start) {
                Some(last) => last.pages += (region.end - region.start) / PAGE,
                None => runs.push(Run { address: region.start, pages: (region.end - region.start) / PAGE }),
            }
        }
        if argument.walk_end <= start {
            break;
        }
        start = argument.walk_end;
    }
    Ok(())
}

/// Writes `pagemap-NAME.img` and its `pages-ID.img`. The pages of `runs` are read from `addresses`.
fn write(pid: u32, into: &Path, name: &str, id: u64, runs: &[Run], addresses: &[u64]) -> Result<(), String> {
    let failed = |error: io::Error| format!("its memory cannot be written to {}: {error}", into.display());
    let image = Pagemap { pages_id: id, runs: runs.to_vec() }.encode();
    fs::write(into.join(format!("pagemap-{name}.img")), image).map_err(failed)?;
    let mut file = BufWriter::with_capacity(PIECE, File::create(into.join(format!("pages-{id}.img"))).map_err(failed)?);
    let mut buffer = vec![0; PIECE];
    for (run, address) in runs.iter().zip(addresses) {
        let end = address + run.pages * PAGE;
        let mut at = *address;
        while at < end {
            let piece = &mut buffer[..(end - at).min(PIECE as u64) as usize];
            let count = read(pid, at, piece);
            // What is gone meanwhile still has its place.
            piece[count..].fill(0);
            file.write_all(piece).map_err(failed)?;
            at += piece.len() as u64;
        }
    }
    file.flush().map_err(failed)
}

/// Reads from another process's memory; returns how many bytes there were.
fn read(pid: u32, address: u64, into: &mut [u8]) -> usize {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: into.len() };
    // SAFETY: the kernel writes at most `into.len()` bytes to `into`; the remote address isn't ours.
    #[allow(unsafe_code)]
    let count = unsafe { libc::process_vm_readv(pid as libc::pid_t, &local, 1, &remote, 1, 0) };
    usize::try_from(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        let kind = |line: &str| parse(line).unwrap().kind;
        let line = "7f12a000-7f12c000 rw-p 00001000 08:01 42    /usr/lib/x.so";
        let expected = Mapping { start: 0x7f12_a000, end: 0x7f12_c000, offset: 0x1000, inode: 42, kind: Kind::Private };
        assert_eq!(parse(line).unwrap(), expected);
        assert_eq!(kind("1000-2000 rw-s 00000000 00:01 7 /dev/zero (deleted)"), Kind::Shared);
        assert_eq!(kind("1000-2000 rw-s 00000000 00:01 7 /memfd:x (deleted)"), Kind::Shared);
        assert_eq!(kind("1000-2000 rw-s 00000000 08:01 7 /var/db"), Kind::Other);
        assert_eq!(kind("1000-2000 r--p 00000000 00:00 0 [vvar]"), Kind::Other);
        assert_eq!(kind("1000-2000 rw-p 00000000 00:00 0 [heap]"), Kind::Private);
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn shared_memory_is_read_once() {
        let shared = |start, offset| Mapping { start, end: start + 0x2000, offset, inode: 1, kind: Kind::Shared };
        let mappings = [shared(0x9000, 0x2000), shared(0x1000, 0), shared(0x5000, 0)];
        let parts = shared_parts(&mappings);
        let offsets: Vec<u64> = parts[&1].iter().map(|mapping| mapping.offset).collect();
        assert_eq!(offsets, [0, 0x2000]);
    }
}
