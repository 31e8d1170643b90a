//! QEMU's files of saved machines ("mapped-ram"): where in one the machine's memory lies.
//!
//! ```text
//! "QEVM", version 3 │ 7, length, machine's type, … │ … 6, "memory", bytes │ header │ bitmap │ (1 MiB) pages │ devices
//! ```
//!
//! A machine can run on the pages where they lie, as a private map of the file; then QEMU has to load only the rest, a file
//! without the pages, of which the bitmap says that there are none. Hides the format. Invariant: nothing in a file is believed
//! before it is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What is before the memory fits into so many bytes.
const HEAD: usize = 64 * 1024;
/// The processor's, in bytes.
const PAGE: u64 = 4096;
/// QEMU puts pages at multiples of this.
const ALIGNED: u64 = 1 << 20;
/// The name of the machine's memory, with its length in front.
const NAME: &[u8] = b"\x06memory";
/// The most bytes of devices' states.
const MAX_REST: u64 = 1 << 30;

/// Where in a file QEMU puts the pages of so many `bytes` of memory. A copy of them has them at the same place, so that what changes
/// from it to a file of QEMU's is found by its place.
pub(super) fn pages_of(bytes: u64) -> u64 {
    let bitmap = (bytes / PAGE).div_ceil(64) * 8;
    (HEAD as u64 + bitmap).next_multiple_of(ALIGNED)
}

/// Where things lie in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The machine's type: "pc-q35-10.0".
    pub machine: String,
    /// Bytes of memory.
    pub bytes: u64,
    /// Where the bitmap lies, with a bit for each page that is there.
    bitmap: (u64, u64),
    /// Where the pages lie.
    pub pages: u64,
}

impl Layout {
    /// That of `file`.
    pub fn read(file: &File) -> Result<Layout, String> {
        Layout::parse(&head_of(file)?).ok_or_else(no_state)
    }

    fn parse(head: &[u8]) -> Option<Layout> {
        let machine = parse_machine(head)?;
        let at = head.windows(NAME.len()).position(|window| window == NAME)? + NAME.len();
        let number = |at: usize| Some(u64::from_be_bytes(*head.get(at..)?.first_chunk()?));
        let version = u32::from_be_bytes(*head.get(at + 8..)?.first_chunk()?);
        let (bytes, page, bitmap, pages) = (number(at)?, number(at + 12)?, number(at + 20)?, number(at + 28)?);
        let bitmap_bytes = bytes.checked_div(page)?.div_ceil(64).checked_mul(8)?;
        let is_sound = version == 1
            && bytes > 0
            && bitmap >= at as u64 + 36
            && bitmap.checked_add(bitmap_bytes)? <= pages
            && pages % page == 0
            && pages.checked_add(bytes).is_some();
        is_sound.then_some(Layout { machine, bytes, bitmap: (bitmap, bitmap_bytes), pages })
    }

    /// Writes what is in `file` beside the memory to `to`: a file that says of the memory that there is none.
    pub fn write_rest(&self, file: &File, to: &Path) -> io::Result<()> {
        let (out, end) = (File::create(to)?, self.pages + self.bytes);
        let length = file.metadata()?.len();
        if length < end || length - end > MAX_REST {
            return Err(io::Error::other("it is cut off, or impossibly long"));
        }
        out.set_len(length)?;
        copy(file, &out, 0, self.bitmap.0)?;
        copy(file, &out, self.bitmap.0 + self.bitmap.1, self.pages)?;
        copy(file, &out, end, length)
    }
}

fn no_state() -> String {
    "this is no machine's state of QEMU's".to_owned()
}

/// What is before the memory in a file of QEMU's.
fn head_of(file: &File) -> Result<Vec<u8>, String> {
    let mut head = vec![0; HEAD];
    let mut have = 0;
    while have < HEAD {
        match file.read_at(&mut head[have..], have as u64) {
            Ok(0) => break,
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("the machine's state cannot be read: {error}")),
        }
    }
    head.truncate(have);
    Ok(head)
}

/// The machine's type in a file of QEMU's, with memory or without.
pub(super) fn machine_of(file: &File) -> Result<String, String> {
    parse_machine(&head_of(file)?).ok_or_else(no_state)
}

fn parse_machine(head: &[u8]) -> Option<String> {
    let rest = head.strip_prefix(b"QEVM\0\0\0\x03\x07")?;
    let length = u32::from_be_bytes(*rest.first_chunk()?) as usize;
    let machine = std::str::from_utf8(rest.get(4..4usize.checked_add(length)?)?).ok()?;
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let is_sound = !machine.is_empty() && length <= 64 && machine.bytes().all(is_plain);
    is_sound.then(|| machine.to_owned())
}

/// Copies a part of a file to the same place.
fn copy(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while at < end {
        let piece = &mut buffer[..(end - at).min(1 << 20) as usize];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The head of a file as QEMU 10.0 writes it.
    fn head(bytes: u64) -> Vec<u8> {
        let mut head = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x05more".to_vec();
        head.extend_from_slice(NAME);
        head.extend(bytes.to_be_bytes());
        head.extend(1u32.to_be_bytes());
        let at = head.len() as u64 + 24;
        [4096, at, 1 << 20].iter().for_each(|number: &u64| head.extend(number.to_be_bytes()));
        head
    }

    #[test]
    fn files_of_qemu_are_understood_and_nothing_else_is() {
        let good = head(64 << 20);
        let layout = Layout::parse(&good).unwrap();
        let bitmap = (good.len() as u64, 64 * 256 / 8);
        assert_eq!(layout, Layout { machine: "pc-q35-10.0".into(), bytes: 64 << 20, bitmap, pages: 1 << 20 });
        assert_eq!((layout.pages, pages_of(32 << 30)), (pages_of(64 << 20), 2 << 20));
        assert!((0..good.len()).all(|cut| Layout::parse(&good[..cut]).is_none()));
        assert!(Layout::parse(&head(u64::MAX)).is_none() && Layout::parse(&head(0)).is_none());
    }

    #[test]
    fn the_rest_has_all_but_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let (path, rest) = (folder.path().join("whole"), folder.path().join("rest"));
        let mut whole = head(1 << 20);
        whole.extend([0xff; 32]);
        whole.resize(1 << 20, 0);
        whole.resize(2 << 20, 7);
        whole.extend(b"devices");
        std::fs::write(&path, &whole).unwrap();
        let file = File::open(&path).unwrap();
        Layout::read(&file).unwrap().write_rest(&file, &rest).unwrap();
        let mut expected = head(1 << 20);
        expected.resize(2 << 20, 0);
        expected.extend(b"devices");
        assert!(std::fs::read(&rest).unwrap() == expected);
    }
}
