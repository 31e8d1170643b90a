//! Archives as tar programs write them.

use super::*;

/// What an archive can hold of a tree: no sockets.
fn without_sockets(mut tree: BTreeMap<Vec<u8>, What>) -> BTreeMap<Vec<u8>, What> {
    tree.retain(|_, what| what.mode & libc::S_IFMT != libc::S_IFSOCK);
    tree
}

#[test]
fn archives_of_every_kind_come_back_as_the_folder_was() {
    let bench = Bench::new();
    zoo(&bench.src());
    let expected = without_sockets(host_tree(&bench.src()));
    let xattrs = if is_root() { "--xattrs --xattrs-include='*' --acls" } else { "--xattrs" };
    let mut ids = Vec::new();
    for options in [
        "--format=posix".to_owned(),
        "--format=posix -S --sparse-version=0.0".to_owned(),
        "--format=posix -S --sparse-version=0.1".to_owned(),
        "--format=posix -S --sparse-version=1.0".to_owned(),
    ] {
        sh(&format!("tar -C src --numeric-owner {xattrs} {options} -cf a.tar . 2>/dev/null"), bench.folder.path());
        let options = ImportOptions::new(name(&format!("n{}", ids.len())));
        let report = bench.try_import(&bench.path("a.tar"), &options).unwrap();
        assert_eq!(report.format, Format::Tar);
        assert_same(&bench.tree(bench.top(&report)), &expected);
        ids.push(bench.top(&report));
    }
    assert!(ids.iter().all(|id| *id == ids[0]));
}

#[test]
fn gnu_archives_keep_all_but_xattrs_and_nanoseconds() {
    let bench = Bench::new();
    zoo(&bench.src());
    let mut expected = without_sockets(host_tree(&bench.src()));
    for what in expected.values_mut() {
        what.xattrs.clear();
        what.mtime.1 = 0;
    }
    for (number, options) in ["--format=gnu", "--format=gnu -S", "--format=oldgnu -S"].iter().enumerate() {
        sh(&format!("tar -C src --numeric-owner {options} -cf a.tar . 2>/dev/null"), bench.folder.path());
        let report = bench.import(&bench.path("a.tar"), &format!("n{number}"));
        assert_same(&bench.tree(bench.top(&report)), &expected);
        assert!(!options.contains("-S") || report.read_bytes < 3_300_000, "{report:?}");
    }
}

#[test]
fn order_and_compression_and_the_way_in_do_not_matter() {
    let bench = Bench::new();
    zoo(&bench.src());
    fs::remove_file(bench.src().join("socket")).unwrap();
    let xattrs = if is_root() { "--xattrs --xattrs-include='*' --acls" } else { "--xattrs" };
    let tar = format!("tar --format=posix --numeric-owner {xattrs} --no-recursion");
    let find = "cd src; find . -print0 | LC_ALL=C sort";
    sh(&format!("{find} -z | {tar} --null -T- -cf ../a.tar"), bench.folder.path());
    sh(&format!("{find} -zr | {tar} --null -T- -cf ../b.tar"), bench.folder.path());
    sh("gzip -k b.tar; zstd -q b.tar; xz -k -0 b.tar", bench.folder.path());
    let first = bench.import(&bench.path("a.tar"), "a");
    for (number, file) in ["b.tar", "b.tar.gz", "b.tar.zst", "b.tar.xz"].iter().enumerate() {
        let report = bench.import(&bench.path(file), &format!("b{number}"));
        assert_eq!(bench.top(&report), bench.top(&first), "{file}");
        assert_eq!(report.new_chunks, 0);
        let bytes = fs::read(bench.path(file)).unwrap();
        let streamed = bench.import_bytes(bytes, &ImportOptions::new(name(&format!("s{number}")))).unwrap();
        assert_eq!(bench.top(&streamed), bench.top(&first));
    }
    let folder = bench.import(&bench.src(), "folder");
    assert_same(&bench.tree(bench.top(&folder)), &bench.tree(bench.top(&first)));
    assert_eq!(bench.top(&folder), bench.top(&first));
}

/// Makes archives member by member.
#[derive(Default)]
pub(super) struct Maker(Vec<u8>);

impl Maker {
    pub fn member(self, kind: u8, path: &str, link: &str, data: &[u8]) -> Maker {
        self.changed_member(kind, path, link, data, |_| {})
    }

    /// A member whose header `change` has the last say of, but for its sum.
    pub fn changed_member(
        mut self,
        kind: u8,
        path: &str,
        link: &str,
        data: &[u8],
        change: impl FnOnce(&mut [u8; 512]),
    ) -> Maker {
        let mut header = [0u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..107].copy_from_slice(b"0000755");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        change(&mut header);
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend(header);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, path: &str, data: &str) -> Maker {
        self.member(b'0', path, "", data.as_bytes())
    }

    /// A sparse file as GNU tar writes it without pax headers: `segments` are offsets and lengths.
    pub fn old_sparse(self, path: &str, size: u64, segments: &[(u64, u64)], data: &[u8]) -> Maker {
        self.changed_member(b'S', path, "", data, |header| {
            header[257..265].copy_from_slice(b"ustar  \0");
            let octal = |number: u64| format!("{number:011o}\0").into_bytes();
            for (at, (offset, bytes)) in (386..).step_by(24).zip(segments) {
                header[at..at + 24].copy_from_slice(&[octal(*offset), octal(*bytes)].concat());
            }
            header[483..495].copy_from_slice(&octal(size));
        })
    }

    /// A member with an extended header of these records in front.
    pub fn with_records(self, records: &[(&str, &str)], path: &str, data: &[u8]) -> Maker {
        self.member(b'x', "p", "", pax_records(records).as_bytes()).member(b'0', path, "", data)
    }

    pub fn folder(self, path: &str) -> Maker {
        self.member(b'5', path, "", b"")
    }

    pub fn link(self, path: &str, target: &str) -> Maker {
        self.member(b'1', path, target, b"")
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// The records of an extended header, each with its length in front.
pub(super) fn pax_records(records: &[(&str, &str)]) -> String {
    let record = |(key, value): &(&str, &str)| {
        let rest = format!(" {key}={value}\n");
        let digits = (1..).find(|digits| (digits + rest.len()).to_string().len() == *digits).unwrap();
        format!("{}{rest}", digits + rest.len())
    };
    records.iter().map(record).collect()
}

#[test]
fn sparse_maps_of_all_versions_are_read() {
    let bench = Bench::new();
    let mut mapped = b"2\n4\n3\n10\n0\n".to_vec();
    mapped.resize(512, 0);
    mapped.extend(b"abc");
    // The empty segment at the end, which tells where a file that ends in a hole ends, has no data.
    let archive = Maker::default()
        .old_sparse("old", 10, &[(4, 3), (10, 0)], b"abc")
        .with_records(
            &[
                ("GNU.sparse.size", "10"),
                ("GNU.sparse.numblocks", "2"),
                ("GNU.sparse.offset", "4"),
                ("GNU.sparse.numbytes", "3"),
                ("GNU.sparse.offset", "10"),
                ("GNU.sparse.numbytes", "0"),
            ],
            "zero",
            b"abc",
        )
        .with_records(&[("GNU.sparse.size", "10"), ("GNU.sparse.map", "4,3,10,0")], "one-map", b"abc")
        .with_records(
            &[("GNU.sparse.major", "0"), ("GNU.sparse.size", "10"), ("GNU.sparse.map", "4,3,10,0")],
            "zero-told",
            b"abc",
        )
        .with_records(&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "10")], "one", &mapped);
    let tree = bench.tree(bench.top(&bench.import_bytes(archive.end(), &ImportOptions::new(name("t"))).unwrap()));
    for path in ["old", "zero", "one-map", "zero-told", "one"] {
        assert_eq!(tree[path.as_bytes()].data, b"\0\0\0\0abc\0\0\0", "{path}");
    }
}

#[test]
fn global_attributes_are_those_of_all_members() {
    let bench = Bench::new();
    let value = "x".repeat(60_000);
    let global = pax_records(&[("SCHILY.xattr.user.all", &value), ("SCHILY.xattr.user.some", "1")]);
    let mut archive = Maker::default().member(b'g', "g", "", global.as_bytes());
    for number in 0..100 {
        archive = archive.folder(&format!("d{number}/"));
    }
    let archive = archive.with_records(&[("SCHILY.xattr.user.some", "2")], "f", b"data").end();
    let tree = bench.tree(bench.top(&bench.import_bytes(archive, &ImportOptions::new(name("t"))).unwrap()));
    let expected =
        |some: &[u8]| vec![(b"user.all".to_vec(), value.clone().into_bytes()), (b"user.some".to_vec(), some.to_vec())];
    assert_eq!(tree.len(), 102);
    for (path, what) in tree.iter().filter(|(path, _)| !path.is_empty()) {
        assert!(what.xattrs == expected(if path == b"f" { b"2" } else { b"1" }), "{}", path.escape_ascii());
    }
}

#[test]
fn names_stay_within_the_tree() {
    let bench = Bench::new();
    let archive =
        Maker::default().file("/etc/a", "1").file("//./b//c", "2").member(b'2', "out", "/tmp", b"").file("out/x", "3");
    let report = bench.import_bytes(archive.end(), &ImportOptions::new(name("t"))).unwrap();
    let tree = bench.tree(bench.top(&report));
    let paths: Vec<&[u8]> = tree.keys().map(Vec::as_slice).collect();
    assert_eq!(paths, [&b""[..], b"b", b"b/c", b"etc", b"etc/a", b"out", b"tmp", b"tmp/x"]);
    // Whatever else lies there.
    assert!(fs::read("/tmp/x").ok().as_deref() != Some(b"3"));
}

#[test]
fn hard_links_in_odd_orders_and_over_the_parent() {
    let bench = Bench::new();
    let archive = Maker::default().link("z", "./y").link("y", "x").file("x", "data").end();
    let base = bench.import_bytes(archive, &ImportOptions::new(name("base"))).unwrap();
    let tree = bench.tree(bench.top(&base));
    assert!(
        [&b"x"[..], b"y", b"z"]
            .iter()
            .all(|p| tree[*p].links == 3 && tree[*p].first == b"x" && tree[*p].data == b"data")
    );
    let mut options = ImportOptions::new(name("top"));
    options.parent = Some(bench.top(&base));
    options.whiteouts = true;
    let archive = Maker::default().link("w", "/y").file(".wh.x", "").end();
    let tree = bench.tree(bench.top(&bench.import_bytes(archive, &options).unwrap()));
    assert_eq!(tree.keys().map(|p| p.as_slice()).collect::<Vec<_>>(), [&b""[..], b"w", b"y", b"z"]);
    assert!([&b"w"[..], b"y", b"z"].iter().all(|p| tree[*p].links == 3));
}

#[test]
fn whiteout_names_are_names_unless_asked_for() {
    let bench = Bench::new();
    let archive =
        || Maker::default().file(".wh.a", "").folder("d/").file("d/.wh..wh..opq", "").file(".wh..wh.plnk/1", "").end();
    let plain = bench.tree(bench.top(&bench.import_bytes(archive(), &ImportOptions::new(name("p"))).unwrap()));
    assert!(plain.contains_key(&b".wh.a"[..]));
    let mut options = ImportOptions::new(name("w"));
    options.whiteouts = true;
    let tree = bench.tree(bench.top(&bench.import_bytes(archive(), &options).unwrap()));
    assert_eq!(tree.keys().map(|p| p.as_slice()).collect::<Vec<_>>(), [&b""[..], b"d"]);
}
