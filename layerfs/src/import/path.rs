//! A path within an imported tree, validated, in the form that sorts depth-first.
//!
//! Hides: the key's form, which is the components joined by NUL. NUL is smaller than any byte of a name, so
//! that sorted keys visit each folder before what is in it, the entries of one folder by name, and a subtree
//! without interruption. Invariant: every component is a valid name; the root is the empty key.

use crate::attr::is_valid_name;
use crate::error::{Error, Result};

/// The longest path, in bytes. Linux's calls take 4096 at once; trees may be deeper.
pub const MAX_PATH: usize = 60_000;

/// A validated path within a tree.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TreePath(Vec<u8>);

impl TreePath {
    /// The root.
    pub fn root() -> TreePath {
        TreePath(Vec::new())
    }

    /// Checks `raw`, as archives write it: leading `/`, empty components and `.` are dropped.
    ///
    /// # Errors
    /// [`Error::Invalid`] for `..`, NUL, names of more than 255 bytes, and paths beyond [`MAX_PATH`].
    pub fn parse(raw: &[u8]) -> Result<TreePath> {
        let mut key = Vec::with_capacity(raw.len().min(MAX_PATH));
        for name in raw.split(|byte| *byte == b'/') {
            if name.is_empty() || name == b"." {
                continue;
            }
            if name == b".." {
                return Err(Error::invalid(format!("path {} contains \"..\"", show(raw))));
            }
            if !is_valid_name(name) {
                return Err(Error::invalid(format!("path {} contains an impossible name", show(raw))));
            }
            if !key.is_empty() {
                key.push(0);
            }
            key.extend_from_slice(name);
        }
        if key.len() > MAX_PATH {
            return Err(Error::invalid(format!("a path of {} bytes is too long: {}", key.len(), show(&raw[..100]))));
        }
        // Many wait in memory, and what was written may be slashes for the most part.
        key.shrink_to_fit();
        Ok(TreePath(key))
    }

    /// The path of `name` in this folder.
    ///
    /// # Errors
    /// As [`TreePath::parse`].
    pub fn join(&self, name: &[u8]) -> Result<TreePath> {
        let mut key = self.clone();
        key.push(name)?;
        Ok(key)
    }

    /// Goes down to `name`; [`TreePath::pop`] undoes it.
    ///
    /// # Errors
    /// As [`TreePath::parse`].
    pub fn push(&mut self, name: &[u8]) -> Result<()> {
        if !is_valid_name(name) || self.0.len() + name.len() >= MAX_PATH {
            return Err(Error::invalid(format!("{} in {self} is not a usable name, or too deep", show(name))));
        }
        if !self.0.is_empty() {
            self.0.push(0);
        }
        self.0.extend_from_slice(name);
        Ok(())
    }

    /// Goes up to the folder; the root stays.
    pub fn pop(&mut self) {
        let end = self.0.iter().rposition(|byte| *byte == 0).unwrap_or(0);
        self.0.truncate(end);
    }

    /// The folder and the name in it; none for the root.
    pub fn split(&self) -> Option<(TreePath, &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        match self.0.iter().rposition(|byte| *byte == 0) {
            Some(end) => Some((TreePath(self.0[..end].to_vec()), &self.0[end + 1..])),
            None => Some((TreePath::root(), &self.0)),
        }
    }

    /// The key that sorts depth-first.
    pub fn key(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Display for TreePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&show_key(&self.0))
    }
}

/// The names in `key`, from the root on.
pub fn names(key: &[u8]) -> impl Iterator<Item = &[u8]> {
    key.split(|byte| *byte == 0).filter(|name| !name.is_empty())
}

/// Whether `key` lies in the folder at `folder`, at any depth.
pub fn is_below(key: &[u8], folder: &[u8]) -> bool {
    match key.strip_prefix(folder) {
        Some(rest) => !rest.is_empty() && (folder.is_empty() || rest[0] == 0),
        None => false,
    }
}

/// `raw` for people, quoted.
pub fn show(raw: &[u8]) -> String {
    format!("\"{}\"", raw.escape_ascii())
}

/// `key` for people, quoted.
pub fn show_key(key: &[u8]) -> String {
    let path: Vec<u8> = key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
    if path.is_empty() { "\"/\"".to_owned() } else { show(&path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_and_validated() {
        for (raw, key) in [
            (&b"./a//b/."[..], &b"a\0b"[..]),
            (b"/a/b/", b"a\0b"),
            (b"", b""),
            (b"./", b""),
            (b"...", b"..."),
            (b"a\xff\n", b"a\xff\n"),
        ] {
            assert_eq!(TreePath::parse(raw).unwrap().key(), key);
        }
        for bad in [&b"../a"[..], b"a/../b", b"a\0b", &[b'x'; 256], &b"x/".repeat(MAX_PATH)] {
            assert!(TreePath::parse(bad).is_err());
        }
        let path = TreePath::parse(b"a/b").unwrap();
        assert_eq!(path.split().unwrap(), (TreePath::parse(b"a").unwrap(), &b"b"[..]));
        assert_eq!(path.to_string(), "\"a/b\"");
        assert!(is_below(b"a\0b", b"a") && is_below(b"a", b"") && !is_below(b"ab", b"a") && !is_below(b"a", b"a"));
    }

    #[test]
    fn keys_sort_depth_first() {
        let mut paths = ["a-b", "a", "a/z", "a/b", "a/b/c", "a\x01"].map(|p| TreePath::parse(p.as_bytes()).unwrap());
        paths.sort();
        let shown: Vec<_> = paths.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["\"a\"", "\"a/b\"", "\"a/b/c\"", "\"a/z\"", "\"a\\x01\"", "\"a-b\""]);
    }
}
