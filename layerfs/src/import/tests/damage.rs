//! Archives that are wrong: each gets an error of the right class, and the store stays as it was.

use proptest::prelude::*;

use super::tars::{Maker, pax_records};
use super::*;

fn class(bench: &Bench, archive: Vec<u8>) -> ErrorClass {
    let mut options = ImportOptions::new(name("bad"));
    options.format = Some(Format::Tar);
    let error = bench.import_bytes(archive, &options).unwrap_err();
    assert!(bench.names().is_empty());
    error.class()
}

#[test]
fn impossible_trees_are_invalid() {
    let bench = Bench::new();
    let make = Maker::default;
    for archive in [
        make().file("../x", "1"),
        make().file("a/../../x", "1"),
        make().link("a", "../../etc/passwd").file("b", "1"),
        make().link("a", "b").link("b", "a"),
        make().link("a", "a"),
        make().link("a", "nothing"),
        make().folder("d/").link("a", "d"),
        make().file("a", "1").file("a/b", "2"),
        make().member(b'2', "a", "", b""),
        make().member(b'2', "a", "b", b"").member(b'2', "b", "a", b"").file("a/x", "1"),
        make().member(b'x', "p", "", format!("{} path={}\n", 300 + 10, "x".repeat(300)).as_bytes()).file("y", "1"),
    ] {
        assert_eq!(class(&bench, archive.end()), ErrorClass::Invalid);
    }
}

#[test]
fn malformed_archives_are_corrupt() {
    let bench = Bench::new();
    let pax = |records: &str| Maker::default().member(b'x', "p", "", records.as_bytes()).file("y", "1").end();
    let good = Maker::default().file("a", "1234").end();
    let mut archives = vec![
        good[..good.len() - 1024].to_vec(),
        good[..600].to_vec(),
        good[..300].to_vec(),
        pax("99 path=a\n"),
        pax("path=a\n"),
        pax("9 size=x\n"),
        pax("28 GNU.sparse.map=0,10,5,10\n25 GNU.sparse.size=10000\n"),
        pax("23 GNU.sparse.map=0,10\n21 GNU.sparse.size=5\n"),
        pax("21 GNU.sparse.major=1\n"),
    ];
    let mut flipped = good.clone();
    flipped[2] ^= 1;
    archives.push(flipped);
    let mut negative = good.clone();
    negative[124] = 0xff;
    archives.push(negative);
    for archive in archives {
        assert_eq!(class(&bench, archive), ErrorClass::Corrupt);
    }
}

#[test]
fn a_size_that_no_file_has_is_corrupt() {
    let bench = Bench::new();
    for size in ["9223372036854775808", "18446744073709551615"] {
        let archive = Maker::default().with_records(&[("size", size)], "y", b"1").file("z", "2").end();
        assert_eq!(class(&bench, archive.clone()), ErrorClass::Corrupt, "{size}");
        let options = ImportOptions { format: Some(Format::Oci), ..ImportOptions::new(name("bad")) };
        let error = bench.import_bytes(archive, &options).unwrap_err();
        assert!(error.to_string().contains("member \"y\""), "{error}");
    }
}

#[test]
fn sparse_files_of_unknown_kinds_are_unsupported() {
    let bench = Bench::new();
    let make = Maker::default;
    for archive in [
        make().member(b'S', "a", "", b""),
        make().member(b'S', "a", "", b"data"),
        make().with_records(&[("GNU.sparse.major", "2"), ("GNU.sparse.size", "10")], "a", b""),
        make().with_records(&[("GNU.sparse.major", "99"), ("GNU.sparse.map", "0,4")], "a", b"data"),
    ] {
        assert_eq!(class(&bench, archive.end()), ErrorClass::Unsupported);
    }
}

#[test]
fn sparse_maps_that_leave_data_out_are_corrupt() {
    let bench = Bench::new();
    let make = Maker::default;
    let mut mapped = b"1\n4\n3\n".to_vec();
    mapped.resize(512, 0);
    mapped.extend(b"abcd");
    for archive in [
        make().old_sparse("a", 10, &[(4, 3)], b"abcd"),
        make().old_sparse("a", 10, &[(4, 3)], b"ab"),
        make().old_sparse("a", 10, &[], b"abcd"),
        make().with_records(&[("GNU.sparse.size", "10"), ("GNU.sparse.map", "4,3")], "a", b"abcd"),
        make().with_records(&[("GNU.sparse.major", "0"), ("GNU.sparse.size", "10")], "a", b"abcd"),
        make().with_records(&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "10")], "a", &mapped),
    ] {
        assert_eq!(class(&bench, archive.end()), ErrorClass::Corrupt);
    }
}

#[test]
fn an_archive_with_a_damaged_start_does_not_pass_for_a_disk() {
    let bench = Bench::new();
    let mut archive = Maker::default().file("a", "1234").end();
    archive[2] ^= 1;
    assert_eq!(&archive[257..262], b"ustar");
    std::fs::write(bench.path("a.tar"), &archive).unwrap();
    let options = ImportOptions::new(name("bad"));
    assert_eq!(bench.try_import(&bench.path("a.tar"), &options).unwrap_err().class(), ErrorClass::Corrupt);
    assert_eq!(bench.import_bytes(archive, &options).unwrap_err().class(), ErrorClass::Corrupt);
    assert!(bench.names().is_empty());
}

#[test]
fn huge_headers_are_refused_before_they_are_read() {
    let bench = Bench::new();
    let mut archive = Maker::default().member(b'x', "p", "", b"").end();
    archive[124..135].copy_from_slice(b"77777777777");
    archive[148..156].fill(b' ');
    let sum: u32 = archive[..512].iter().map(|byte| u32::from(*byte)).sum();
    archive[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    assert_eq!(class(&bench, archive), ErrorClass::Invalid);
    assert_eq!(class(&bench, Maker::default().member(b'M', "rest", "", b"").end()), ErrorClass::Unsupported);
}

#[test]
fn a_small_archive_does_not_take_much_memory() {
    let bench = Bench::new();
    let global = |records: &[(&str, &str)]| Maker::default().member(b'g', "g", "", pax_records(records).as_bytes());
    let value = "x".repeat(40_000);
    let attributes = [("SCHILY.xattr.user.a", value.as_str()), ("SCHILY.xattr.user.b", value.as_str())];
    assert_eq!(class(&bench, global(&attributes).folder("d/").end()), ErrorClass::Invalid);
    let target = "a/".repeat(29_000);
    let link = |archive: Maker, number: usize| archive.link(&format!("l{number}"), "");
    let archive = (0..600).fold(global(&[("linkpath", &target)]), link).end();
    let options = ImportOptions { format: Some(Format::Oci), ..ImportOptions::new(name("bad")) };
    let error = bench.import_bytes(archive, &options).unwrap_err();
    assert!(error.to_string().contains("longer paths than an image needs"), "{error}");
}

#[test]
fn truncated_and_damaged_compression_is_corrupt() {
    let bench = Bench::new();
    fs::write(bench.src().join("x"), noise(1, 300_000)).unwrap();
    sh("tar -cf a.tar -C src . && gzip -k a.tar && zstd -q a.tar && xz -k a.tar", bench.folder.path());
    for file in ["a.tar.gz", "a.tar.zst", "a.tar.xz"] {
        let bytes = fs::read(bench.path(file)).unwrap();
        for end in [bytes.len() - 3, bytes.len() / 2, 100] {
            assert_eq!(class(&bench, bytes[..end].to_vec()), ErrorClass::Corrupt, "{file} {end}");
        }
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 0x40;
        assert_eq!(class(&bench, flipped), ErrorClass::Corrupt, "{file}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_archive_breaks_anything(cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 0..4)) {
        let records = "20 mtime=12345.6789\n26 SCHILY.xattr.user.a=xyz\n22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n29 GNU.sparse.name=sparse.f\n28 GNU.sparse.realsize=5000\n";
        let mut data = b"1\n4096\n3\n".to_vec();
        data.resize(512, 0);
        data.extend(b"abc");
        let archive = Maker::default()
            .folder("d/").file("d/a", "some content").link("d/b", "d/a").member(b'2', "l", "d", b"")
            .member(b'L', "././@LongLink", "", &[b'n'; 200]).file("n", "x")
            .member(b'x', "p", "", records.as_bytes()).member(b'0', "s", "", &data)
            .file("l/through", "1");
        let mut bytes = archive.end();
        let length = bytes.len();
        bytes.truncate(length - cut.index(length));
        for (at, mask) in flips {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= mask;
            }
        }
        let store = STORE.with(|store| store.clone());
        let options = ImportOptions { expect: Expect::Any, format: Some(Format::Tar), ..ImportOptions::new(name("x")) };
        let source = SourceSpec::Stream(Box::new(std::io::Cursor::new(bytes)));
        if let Err(error) = import(&store.1, source, &options, &Silent) {
            prop_assert!(matches!(error.class(), ErrorClass::Invalid | ErrorClass::Corrupt | ErrorClass::Unsupported), "{error}");
        }
    }
}

thread_local! {
    static STORE: std::rc::Rc<(tempfile::TempDir, Arc<Store>)> = {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        std::rc::Rc::new((folder, store))
    };
}
