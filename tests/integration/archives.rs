//! Archives that nobody should make, written byte by byte; each must be refused, and change nothing.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::ensure;
use layerfs_tests::case::Case;
use layerfs_tests::case::Need::Tool;
use layerfs_tests::host::Host;
use layerfs_tests::tree::{self, Random};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("archives::hostile_tars_are_refused", &[], hostile_tars),
        Case::new("archives::odd_tars_are_taken", &[], odd_tars),
        Case::new("archives::names_do_not_escape", &[], no_escape),
        Case::new("archives::truncated_and_damaged", &[Tool("zstd"), Tool("xz"), Tool("gzip")], truncated),
        Case::new("archives::what_is_no_archive", &[], no_archive),
        Case::new("archives::broken_oci_layouts", &[], broken_oci),
    ]
}

/// One member of a ustar archive.
struct Member<'a> {
    name: &'a [u8],
    kind: u8,
    link: &'a [u8],
    data: &'a [u8],
    /// The size that the header tells, if it isn't that of the data.
    claimed: Option<&'a [u8]>,
}

impl Default for Member<'_> {
    fn default() -> Self {
        Member { name: b"file", kind: b'0', link: b"", data: b"", claimed: None }
    }
}

impl Member<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        let mut header = [0u8; 512];
        header[..self.name.len().min(100)].copy_from_slice(&self.name[..self.name.len().min(100)]);
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..124].copy_from_slice(b"0000000\x000000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", self.data.len()).as_bytes());
        if let Some(claimed) = self.claimed {
            header[124..136].copy_from_slice(claimed);
        }
        header[136..148].copy_from_slice(b"14000000000\0");
        header[156] = self.kind;
        header[157..157 + self.link.len().min(100)].copy_from_slice(&self.link[..self.link.len().min(100)]);
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(self.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

fn archive(members: &[Member]) -> Vec<u8> {
    let mut out = Vec::new();
    members.iter().for_each(|member| member.write(&mut out));
    out.resize(out.len() + 1024, 0);
    out
}

fn pax(record: &[u8]) -> Member<'_> {
    Member { name: b"PaxHeader", kind: b'x', data: record, ..Member::default() }
}

/// A host that holds one good layer, and what it looks like.
struct Before {
    host: Host,
    names: std::collections::BTreeMap<String, String>,
}

impl Before {
    fn new() -> anyhow::Result<Before> {
        let host = Host::new()?;
        tree::fill(&host.path("good"), 71, 60, 3000)?;
        host.import(&host.path("good"), "good", &[])?;
        let names = host.names()?;
        Ok(Before { host, names })
    }

    /// Fails unless importing `bytes` fails with one of `codes`, says why, and leaves the store as it was.
    fn refuses(&self, what: &str, bytes: &[u8], codes: &[i32]) -> anyhow::Result<()> {
        let path = self.host.path("bad");
        fs::File::create(&path)?.write_all(bytes)?;
        self.refuses_path(what, &path, codes)
    }

    fn refuses_path(&self, what: &str, path: &Path, codes: &[i32]) -> anyhow::Result<()> {
        let path = path.to_string_lossy().into_owned();
        let answer = self.host.ctl.run(["import", &path, "bad"])?;
        ensure!(
            codes.contains(&answer.code),
            "{what}: exit code {} instead of {codes:?}\n{}",
            answer.code,
            answer.stderr
        );
        let code = answer.code;
        answer.failed_with(code)?;
        ensure!(self.host.names()? == self.names, "{what}: the refused import changed the names");
        Ok(())
    }

    /// Fails unless the store is as it was at the beginning.
    fn unharmed(self) -> anyhow::Result<()> {
        self.host.fsck()?;
        self.host.ctl.ok(["scrub"])?;
        self.host.export("good", &self.host.path("out"), &[])?;
        layerfs_tests::compare::same_by_rsync(&self.host.path("good"), &self.host.path("out"))
    }
}

fn hostile_tars() -> anyhow::Result<()> {
    let before = Before::new()?;
    let long = [b"n".repeat(256), b"/f".to_vec()].concat();
    let long_record = |key: &str, value: &[u8]| -> Vec<u8> {
        let mut length = key.len() + value.len() + 3;
        while length != key.len() + value.len() + 3 + length.to_string().len() {
            length = key.len() + value.len() + 3 + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    };
    let long_name = long_record("path", &long);
    let deep_name = long_record("path", &b"d/".repeat(40_000));
    let huge_sparse = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n35 GNU.sparse.realsize=99999999999\n".to_vec();
    let file = Member::default;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a name with ..", archive(&[Member { name: b"../../evil", ..file() }])),
        ("a name with .. inside", archive(&[Member { name: b"a/b/../../../evil", ..file() }])),
        ("a hard link to ..", archive(&[Member { kind: b'1', link: b"../../etc/passwd", ..file() }])),
        ("a hard link to nothing", archive(&[Member { kind: b'1', link: b"nothing", ..file() }])),
        ("a hard link to itself", archive(&[Member { kind: b'1', link: b"file", ..file() }])),
        (
            "a cycle of hard links",
            archive(&[
                Member { name: b"a", kind: b'1', link: b"b", ..file() },
                Member { name: b"b", kind: b'1', link: b"c", ..file() },
                Member { name: b"c", kind: b'1', link: b"a", ..file() },
            ]),
        ),
        (
            "a hard link to a folder",
            archive(&[Member { name: b"d", kind: b'5', ..file() }, Member { kind: b'1', link: b"d", ..file() }]),
        ),
        (
            "a header that claims 8 GiB of name",
            archive(&[Member { name: b"././@LongLink", kind: b'L', claimed: Some(b"77777777777\0"), ..file() }]),
        ),
        (
            "a pax header that claims 8 GiB",
            archive(&[Member { name: b"PaxHeader", kind: b'x', claimed: Some(b"77777777777\0"), ..file() }]),
        ),
        ("a file that claims what isn't there", archive(&[Member { claimed: Some(b"77777777777\0"), ..file() }])),
        ("a size of letters", archive(&[Member { claimed: Some(b"not-a-number"), ..file() }])),
        (
            "a negative size",
            archive(&[Member { claimed: Some(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), ..file() }]),
        ),
        ("a name of 256 bytes", archive(&[pax(&long_name), file()])),
        ("a path of 80,000 bytes", archive(&[pax(&deep_name), file()])),
        ("a pax record without its length", archive(&[pax(b"path=x\n"), file()])),
        ("a pax record longer than its header", archive(&[pax(b"99999 path=x\n"), file()])),
        ("a sparse map without a map", archive(&[pax(&huge_sparse), Member { data: b"x", ..file() }])),
        ("an empty name", archive(&[file(), Member { name: b"", ..file() }])),
    ];
    for (what, bytes) in &cases {
        before.refuses(what, bytes, &[2, 6])?;
    }
    // Not in the first member: what begins like nothing known is taken for a disk image.
    let mut wrong_sum = archive(&[file(), file()]);
    wrong_sum[512 + 150] ^= 1;
    before.refuses("a wrong checksum", &wrong_sum, &[2, 6])?;
    before.unharmed()
}

fn odd_tars() -> anyhow::Result<()> {
    let before = Before::new()?;
    let file = Member::default;
    let members = [
        Member { name: b"/absolute/name", data: b"1", ..file() },
        Member { name: b"./dot/./name", data: b"2", ..file() },
        Member { name: b"twice", data: b"first", ..file() },
        Member { name: b"twice", data: b"last", ..file() },
        Member { name: b"becomes-a-file/child", data: b"x", ..file() },
        Member { name: b"becomes-a-file", data: b"now a file", ..file() },
    ];
    let path = before.host.path("odd.tar");
    fs::write(&path, archive(&members))?;
    before.host.import(&path, "odd", &[])?;
    let out = before.host.path("odd");
    before.host.export("odd", &out, &[])?;
    let read = |name: &str| fs::read_to_string(out.join(name)).map_err(|error| anyhow::anyhow!("{name}: {error}"));
    ensure!(read("absolute/name")? == "1" && read("dot/name")? == "2", "the names were not taken from the root");
    ensure!(
        read("twice")? == "last" && read("becomes-a-file")? == "now a file",
        "the last member of a name did not win"
    );
    before.host.fsck()
}

fn no_escape() -> anyhow::Result<()> {
    let before = Before::new()?;
    let outside = before.host.new_folder("outside")?;
    let target = outside.to_string_lossy().into_owned();
    let members = [
        Member { name: b"link", kind: b'2', link: target.as_bytes(), ..Member::default() },
        Member { name: b"link/escaped", data: b"gotcha", ..Member::default() },
    ];
    let path = before.host.path("escape.tar");
    fs::write(&path, archive(&members))?;
    // Refused, or the link replaced by a folder: either is safe. Nothing may appear outside, at import or at export.
    if before.host.ctl.run(["import", &path.to_string_lossy(), "escape"])?.code == 0 {
        before.host.export("escape", &before.host.path("exported"), &[])?;
    }
    ensure!(fs::read_dir(&outside)?.next().is_none(), "the archive wrote outside of its tree");
    before.host.fsck()
}

fn truncated() -> anyhow::Result<()> {
    let before = Before::new()?;
    let tar = before.host.path("whole.tar");
    layerfs_tests::case::shell(&format!("tar -C '{}' -cf '{}' .", before.host.path("good").display(), tar.display()))?;
    for program in ["cat", "gzip", "zstd", "xz"] {
        let packed = before.host.path("packed");
        layerfs_tests::case::shell(&format!("{program} < '{}' > '{}'", tar.display(), packed.display()))?;
        let whole = fs::read(&packed)?;
        for part in [3, 5, 8] {
            before.refuses(&format!("{program}, {part} tenths of it"), &whole[..whole.len() * part / 10], &[2, 6])?;
        }
        if program != "cat" {
            let mut damaged = whole.clone();
            let middle = whole.len() / 2;
            damaged[middle..middle + 16].iter_mut().for_each(|byte| *byte ^= 0x55);
            before.refuses(&format!("{program}, damaged in the middle"), &damaged, &[2, 6])?;
        }
    }
    before.unharmed()
}

fn no_archive() -> anyhow::Result<()> {
    let before = Before::new()?;
    before.refuses("nothing", b"", &[2, 6])?;
    before.refuses("text", b"hello, world\n", &[2, 6])?;
    before.refuses("noise", &Random::new(5).bytes(100_003), &[2, 6])?;
    before.refuses("half a qcow2 header", b"QFI\xfb\x00\x00\x00\x03", &[2, 6])?;
    let mut qcow2 = b"QFI\xfb\x00\x00\x00\x03".to_vec();
    qcow2.extend(Random::new(6).bytes(4096));
    before.refuses("a qcow2 header of noise", &qcow2, &[2, 6, 7])?;
    before.refuses_path("what isn't there", &before.host.path("none"), &[3])?;
    before.unharmed()
}

fn broken_oci() -> anyhow::Result<()> {
    let before = Before::new()?;
    let layout = before.host.path("layout");
    before.host.export("good", &layout, &["--format", "oci"])?;
    let blobs = || -> anyhow::Result<Vec<std::path::PathBuf>> {
        let entries = fs::read_dir(layout.join("blobs/sha256"))?;
        Ok(entries.collect::<Result<Vec<_>, _>>()?.into_iter().map(|entry| entry.path()).collect())
    };
    for blob in blobs()? {
        let whole = fs::read(&blob)?;
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        fs::write(&blob, &damaged)?;
        before.refuses_path(&format!("an OCI blob of {} bytes, one bit flipped", whole.len()), &layout, &[2, 6])?;
        fs::remove_file(&blob)?;
        before.refuses_path("an OCI blob that is missing", &layout, &[2, 3, 6])?;
        fs::write(&blob, &whole)?;
    }
    fs::write(layout.join("index.json"), "{\"schemaVersion\": 2, \"manifests\": [")?;
    before.refuses_path("an OCI index that ends early", &layout, &[2, 6])?;
    before.unharmed()
}
