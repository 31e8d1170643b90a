//! Made-up trees: the same seed gives the same bytes, on every machine.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Context;

/// A small, fast, repeatable source of numbers (xorshift64*); good enough for content, not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound.max(1)
    }

    /// `count` bytes that don't compress.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }

    /// `count` bytes of words and line ends, which compress about as source code does.
    pub fn text(&mut self, count: usize) -> Vec<u8> {
        const WORDS: [&str; 16] = [
            "layer", "chunk", "let ", "folder", "(self)", "return ", "0x1f", "\n    ", "inode", " = ", "store",
            "mount", "\n", ", ", "seal", "push",
        ];
        let mut bytes = Vec::with_capacity(count + 16);
        while bytes.len() < count {
            let number = self.number();
            bytes.extend_from_slice(WORDS[(number % 16) as usize].as_bytes());
            if number.is_multiple_of(7) {
                bytes.extend_from_slice(format!("{:x}", number >> 40).as_bytes());
            }
        }
        bytes.truncate(count);
        bytes
    }
}

/// Fills `root` (made if missing) with `files` files in folders of fifty, about `mean_bytes` each, half of them text.
pub fn fill(root: &Path, seed: u64, files: u32, mean_bytes: u64) -> anyhow::Result<()> {
    let mut random = Random::new(seed);
    for number in 0..files {
        let folder = root.join(format!("part-{:02}/group-{:03}", number / 1000, number / 50));
        if number.is_multiple_of(50) {
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let size = (random.below(mean_bytes.max(1) * 2)) as usize;
        let bytes = if number.is_multiple_of(2) { random.text(size) } else { random.bytes(size) };
        let path = folder.join(format!("file-{number:05}"));
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Writes a file of `size` bytes that don't compress, in pieces.
pub fn big_file(path: &Path, seed: u64, size: u64) -> anyhow::Result<()> {
    let mut random = Random::new(seed);
    let mut file = fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut left = size;
    while left > 0 {
        let piece = left.min(1 << 20);
        file.write_all(&random.bytes(piece as usize))?;
        left -= piece;
    }
    Ok(())
}
