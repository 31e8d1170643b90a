//! The guest's own word on when it may stop: a file that a program inside of it writes.
//!
//! `/run/layerfs/migration` with `defer` in it asks to wait, `defer until SECONDS` (since 1970) until then; `now`, anything
//! else, or no file lets it stop. Invariants: the guest's links lead nowhere else; nothing that it puts there blocks
//! the host; the host's deadline holds whatever it says.

use std::io::Read;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Where the file is in the guest's root.
pub const FILE: &str = "run/layerfs/migration";
/// More isn't read.
const LONGEST: u64 = 256;

/// What a guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It may stop.
    Now,
    /// Not now.
    Defer,
    /// Not before this time, in seconds since 1970.
    DeferUntil(i64),
}

impl Word {
    fn parse(text: &str) -> Word {
        let mut words = text.split_ascii_whitespace();
        match (words.next(), words.next(), words.next().map(str::parse)) {
            (Some("defer"), None, None) => Word::Defer,
            (Some("defer"), Some("until"), Some(Ok(time))) => Word::DeferUntil(time),
            _ => Word::Now,
        }
    }

    /// Whether it is to be waited at `now`, in seconds since 1970.
    pub fn is_deferring(self, now: i64) -> bool {
        match self {
            Word::Now => false,
            Word::Defer => true,
            Word::DeferUntil(time) => now < time,
        }
    }
}

/// What the guest with this root says. What can't be read says nothing.
pub fn ask(root: &Path) -> Word {
    let Ok(root) = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return Word::Now;
    };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let Ok(file) = rustix::fs::openat2(&root, FILE, flags, Mode::empty(), resolve) else { return Word::Now };
    let file = std::fs::File::from(file);
    let mut text = String::new();
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => {}
        _ => return Word::Now,
    }
    match file.take(LONGEST).read_to_string(&mut text) {
        Ok(_) => Word::parse(&text),
        Err(_) => Word::Now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_defers_by_a_file_and_not_by_tricks() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        let file = root.join(FILE);
        assert_eq!(ask(&root), Word::Now);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        for (text, word) in [
            ("defer\n", Word::Defer),
            ("now", Word::Now),
            ("defer until 12", Word::DeferUntil(12)),
            ("defer until later", Word::Now),
            ("", Word::Now),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(ask(&root), word, "{text:?}");
        }
        assert!(Word::DeferUntil(12).is_deferring(11) && !Word::DeferUntil(12).is_deferring(12));
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "defer").unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&outside, &file).unwrap();
        assert_eq!(ask(&root), Word::Now);
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(ask(&root), Word::Now);
    }
}
