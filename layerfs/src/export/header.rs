//! Tar headers: ustar, with pax records for all that ustar cannot say.
//!
//! Invariants: the bytes depend on the entry alone; names and targets go out as the bytes they are (with
//! `hdrcharset=BINARY` where a pax record holds one that isn't UTF-8); owners are numbers, without names.

use crate::attr::Time;

/// The size of a header, and what everything is padded to.
pub const BLOCK: usize = 512;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A regular file.
    File = b'0',
    /// Another name of a file that came before.
    HardLink = b'1',
    /// A symbolic link.
    Symlink = b'2',
    /// A character device.
    CharDevice = b'3',
    /// A block device.
    BlockDevice = b'4',
    /// A folder.
    Folder = b'5',
    /// A named pipe.
    Fifo = b'6',
}

/// An entry of a tar.
#[derive(Clone, Debug)]
pub struct Header<'a> {
    /// Its path; a folder's ends in `/`.
    pub path: &'a [u8],
    /// What it is.
    pub kind: Kind,
    /// A link's target.
    pub link: &'a [u8],
    /// Permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes that follow, without padding.
    pub size: u64,
    /// Last change.
    pub mtime: Time,
    /// A device's number.
    pub device: u64,
    /// Pax records: key and value.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
    /// The real path and size of a sparse file, whose map comes before its data (pax sparse format 1.0).
    pub sparse_size: Option<u64>,
}

impl Header<'_> {
    /// The blocks that stand before the entry's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut pax = Pax::default();
        let mut block = [0u8; BLOCK];
        let stand_in;
        let mut path = self.path;
        if let Some(real_size) = self.sparse_size {
            pax.add(b"GNU.sparse.major", b"1");
            pax.add(b"GNU.sparse.minor", b"0");
            pax.add_name(b"GNU.sparse.name", self.path);
            pax.add(b"GNU.sparse.realsize", real_size.to_string().as_bytes());
            stand_in = sibling(self.path, b"GNUSparseFile.0");
            path = &stand_in;
        }
        if !put_path(&mut block, path) {
            pax.add_name(b"path", path);
            let shortened = &path[path.len() - 100..];
            block[..100].copy_from_slice(shortened);
        }
        let shortened = &self.link[..self.link.len().min(100)];
        block[157..157 + shortened.len()].copy_from_slice(shortened);
        if shortened.len() < self.link.len() {
            pax.add_name(b"linkpath", self.link);
        }
        octal(&mut block[100..108], u64::from(self.permissions & 0o7777));
        for (range, key, value) in [(108..116, "uid", self.uid), (116..124, "gid", self.gid)] {
            if !octal(&mut block[range], u64::from(value)) {
                pax.add(key.as_bytes(), value.to_string().as_bytes());
            }
        }
        if !octal(&mut block[124..136], self.size) {
            pax.add(b"size", self.size.to_string().as_bytes());
        }
        let whole_seconds = u64::try_from(self.mtime.seconds).ok();
        let fits = octal(&mut block[136..148], whole_seconds.unwrap_or(0));
        if !fits || whole_seconds.is_none() || self.mtime.nanos != 0 {
            pax.add(b"mtime", decimal_time(self.mtime).as_bytes());
        }
        block[156] = self.kind as u8;
        if matches!(self.kind, Kind::CharDevice | Kind::BlockDevice) {
            octal(&mut block[329..337], u64::from(rustix::fs::major(self.device)));
            octal(&mut block[337..345], u64::from(rustix::fs::minor(self.device)));
        }
        self.records.iter().for_each(|(key, value)| pax.add(key, value));
        seal(&mut block);
        let mut out = pax.encode(path);
        out.extend_from_slice(&block);
        out
    }
}

/// How many bytes of padding follow `bytes` bytes of data.
pub fn padding(bytes: u64) -> usize {
    (BLOCK as u64 - 1 - (bytes + BLOCK as u64 - 1) % BLOCK as u64) as usize
}

/// `path` with `folder` put before its last part.
fn sibling(path: &[u8], folder: &[u8]) -> Vec<u8> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let name_at = path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1);
    [&path[..name_at], folder, b"/", &path[name_at..]].concat()
}

/// Puts `path` into the name and prefix fields if it fits.
fn put_path(block: &mut [u8; BLOCK], path: &[u8]) -> bool {
    if path.len() <= 100 {
        block[..path.len()].copy_from_slice(path);
        return true;
    }
    // The prefix ends before a slash that leaves at most 100 bytes, and something, for the name.
    let earliest = path.len() - 101;
    let Some(slash) = path[earliest..path.len() - 1].iter().position(|b| *b == b'/').map(|at| earliest + at) else {
        return false;
    };
    if slash == 0 || slash > 155 {
        return false;
    }
    let name = &path[slash + 1..];
    block[..name.len()].copy_from_slice(name);
    block[345..345 + slash].copy_from_slice(&path[..slash]);
    true
}

/// Writes `value` in octal with a NUL at the end; writes zero and returns false if it doesn't fit.
fn octal(field: &mut [u8], value: u64) -> bool {
    let digits = field.len() - 1;
    let fits = digits >= 22 || value < 1 << (3 * digits);
    let text = format!("{:0digits$o}\0", if fits { value } else { 0 });
    field.copy_from_slice(text.as_bytes());
    fits
}

/// Seconds since the epoch with a decimal fraction, as pax has it.
fn decimal_time(time: Time) -> String {
    let nanos = time.nanos;
    match (time.seconds, nanos) {
        (seconds, 0) => seconds.to_string(),
        (seconds @ 0.., _) => format!("{seconds}.{nanos:09}"),
        (seconds, _) => format!("-{}.{:09}", seconds.unsigned_abs() - 1, 1_000_000_000 - nanos),
    }
}

/// Writes magic, version and checksum.
fn seal(block: &mut [u8; BLOCK]) {
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    octal(&mut block[148..155], sum);
}

/// Pax records.
#[derive(Default)]
struct Pax {
    records: Vec<u8>,
    is_binary: bool,
}

impl Pax {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        push_record(&mut self.records, key, value);
    }

    /// Adds a path, which may be anything.
    fn add_name(&mut self, key: &[u8], name: &[u8]) {
        self.is_binary |= std::str::from_utf8(name).is_err();
        self.add(key, name);
    }

    /// The extended header with the records; nothing if there are none.
    fn encode(self, path: &[u8]) -> Vec<u8> {
        if self.records.is_empty() {
            return Vec::new();
        }
        let mut records = Vec::with_capacity(self.records.len() + 32);
        if self.is_binary {
            push_record(&mut records, b"hdrcharset", b"BINARY");
        }
        records.extend_from_slice(&self.records);
        let mut block = [0u8; BLOCK];
        let name = sibling(path, b"PaxHeaders");
        if !put_path(&mut block, &name) {
            block[..100].copy_from_slice(&name[name.len() - 100..]);
        }
        for (range, value) in [(100..108, 0o644), (108..116, 0), (116..124, 0), (136..148, 0)] {
            octal(&mut block[range], value);
        }
        octal(&mut block[124..136], records.len() as u64);
        block[156] = b'x';
        seal(&mut block);
        let mut out = block.to_vec();
        let padding = padding(records.len() as u64);
        out.append(&mut records);
        out.resize(out.len() + padding, 0);
        out
    }
}

/// Appends `LENGTH KEY=VALUE\n`, where the length counts itself.
fn push_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + digits(length) != length {
        length = rest + digits(length);
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn digits(number: usize) -> usize {
    number.to_string().len()
}

/// The pax record of an extended attribute. A `=` cannot stand in a key, so that names with one go out in
/// libarchive's form: name percent-encoded, value in base64.
pub fn xattr_record(name: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    if !name.iter().any(|b| *b == b'=' || *b == b'\n') {
        return ([b"SCHILY.xattr.", name].concat(), value.to_vec());
    }
    let mut key = b"LIBARCHIVE.xattr.".to_vec();
    for byte in name {
        match byte {
            b'=' | b'%' | 0..=0x20 | 0x7f.. => key.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            _ => key.push(*byte),
        }
    }
    (key, base64(value))
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = Vec::with_capacity(bytes.len().div_ceil(3) * 4);
    for triple in bytes.chunks(3) {
        let bits = triple.iter().fold(0u32, |bits, b| bits << 8 | u32::from(*b)) << (8 * (3 - triple.len()));
        // libarchive writes no padding.
        for place in 0..=triple.len() {
            out.push(LETTERS[(bits >> (18 - 6 * place) & 63) as usize]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &[u8]) -> Header<'_> {
        let (kind, mtime) = (Kind::File, Time { seconds: 1_700_000_000, nanos: 0 });
        Header {
            path,
            kind,
            link: b"",
            permissions: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime,
            device: 0,
            records: vec![],
            sparse_size: None,
        }
    }

    #[test]
    fn times_have_a_decimal_fraction() {
        let text = |seconds, nanos| decimal_time(Time { seconds, nanos });
        assert_eq!(text(5, 0), "5");
        assert_eq!(text(5, 1), "5.000000001");
        assert_eq!(text(-2, 500_000_000), "-1.500000000");
        assert_eq!(text(-1, 1), "-0.999999999");
        assert_eq!(text(i64::MIN, 0), i64::MIN.to_string());
        assert_eq!(text(i64::MIN, 1), "-9223372036854775807.999999999");
    }

    #[test]
    fn a_record_counts_its_own_length() {
        for bytes in (0..1200).chain([9_990, 99_980, 99_990]) {
            let mut out = Vec::new();
            push_record(&mut out, b"k", &vec![b'x'; bytes]);
            let text = String::from_utf8(out.clone()).unwrap();
            assert_eq!(text.split(' ').next().unwrap().parse::<usize>().unwrap(), out.len());
        }
    }

    #[test]
    fn plain_entries_take_one_block_and_others_pax() {
        assert_eq!(header(b"./a").encode().len(), 512);
        let two_parts = [&[b'p'; 90][..], b"/", &[b'q'; 90]].concat();
        assert_eq!(header(&two_parts).encode().len(), 512);
        assert_eq!(header(&[b'n'; 255]).encode().len(), 512 * 3);
        assert_eq!(Header { uid: 1 << 21, ..header(b"a") }.encode().len(), 512 * 3);
        assert_eq!(Header { size: 1 << 33, ..header(b"a") }.encode().len(), 512 * 3);
        assert_eq!(Header { link: &[b'l'; 101], ..header(b"a") }.encode().len(), 512 * 3);
        let binary = Header { link: &[0xff; 101], ..header(b"a") }.encode();
        assert!(binary.windows(17).any(|w| w == b"hdrcharset=BINARY"));
    }

    #[test]
    fn odd_attribute_names_take_libarchives_form() {
        assert_eq!(xattr_record(b"user.a", b"\0b"), (b"SCHILY.xattr.user.a".to_vec(), b"\0b".to_vec()));
        let (key, value) = xattr_record(b"user.a=%\n", b"any carnal pleas");
        assert_eq!(key, b"LIBARCHIVE.xattr.user.a%3D%25%0A");
        assert_eq!(value, b"YW55IGNhcm5hbCBwbGVhcw");
    }
}
