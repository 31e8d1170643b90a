//! The way to the bucket, with a server of the tests' own at its end.

use std::sync::atomic::Ordering;

use layerfs::monitor::{Counting, Silent};
use tokio::runtime::Runtime;

use super::upload::PART_BYTES;
use super::*;
use crate::Rate;
use crate::tests::s3::{S3, TOKEN};

#[test]
fn addresses_of_buckets() {
    let parsed = Settings::parse("s3://bucket/a/b/").unwrap();
    assert_eq!((parsed.bucket.as_str(), parsed.prefix.as_str()), ("bucket", "a/b"));
    assert_eq!(parsed.url(), "s3://bucket/a/b");
    assert_eq!(Settings::parse("s3://bucket").unwrap().url(), "s3://bucket");
    for wrong in ["bucket", "s3://", "s3:///a", "s3://b//c", "s3://user:pw@b", "s3://b/../c"] {
        assert_eq!(Settings::parse(wrong).unwrap_err().class(), ErrorClass::Invalid, "{wrong}");
    }
    assert_eq!(format!("{:?}", Keys { access: "a".into(), secret: "s".into(), token: None }), "Keys(…)");
}

fn bucket(endpoint: String, governor: &Governor, runtime: &Runtime) -> Bucket {
    let settings = Settings { endpoint: Some(endpoint), ..Settings::parse("s3://bucket/store").unwrap() };
    let keys = Keys { access: "a".into(), secret: "s".into(), token: None };
    Bucket::new(&settings, Some(&keys), governor, runtime.handle().clone()).unwrap()
}

/// A server and the way to it; a file of two parts and a little, and what it holds.
struct Fixture {
    s3: S3,
    bucket: Bucket,
    folder: tempfile::TempDir,
    bytes: Vec<u8>,
    /// Requests run on it.
    _runtime: Runtime,
}

impl Fixture {
    fn new() -> Fixture {
        let (s3, runtime) = (S3::start(), Runtime::new().unwrap());
        let bucket = bucket(s3.endpoint(), &Governor::default(), &runtime);
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> =
            (0..(2 * PART_BYTES + 1000) as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(folder.path().join("pack"), &bytes).unwrap();
        Fixture { s3, bucket, folder, bytes, _runtime: runtime }
    }

    fn put(&self, monitor: &dyn Monitor) -> Result<()> {
        self.bucket.put("packs/x", &self.folder.path().join("pack"), monitor)
    }

    /// One upload was begun, and nothing is left of it.
    fn assert_nothing_is_left(&self, what: &str) {
        assert_eq!(self.s3.uploads(), (1, 0), "{what}");
        assert_eq!(self.s3.object("store/packs/x"), None, "{what}");
    }
}

#[test]
fn a_servers_answer_is_told_without_what_repeats_the_request() {
    let fixture = Fixture::new();
    fixture.s3.take_only("another");
    let error = fixture.bucket.read("packs/x", 0, 1).unwrap_err();
    assert!(error.class() == ErrorClass::Denied && error.to_string().contains("InvalidToken: it is so"), "{error}");
    assert!(!error.to_string().contains(TOKEN) && !error.to_string().contains('<'), "{error}");
    assert_eq!(without_markup("400: <ErrorResponse><X>x</X>"), "400");
    assert_eq!(without_markup("no answer: 400"), "no answer: 400");
}

#[test]
fn a_bucket_that_does_not_answer_is_an_error_in_time() {
    // Accepts connections, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let runtime = Runtime::new().unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut bucket = bucket(endpoint, &Governor::default(), &runtime);
    bucket.timeout = Duration::from_secs(1);
    let error = bucket.read("packs/x", 0, 10).unwrap_err();
    assert!(error.class() == ErrorClass::Network && error.to_string().contains("within 1 s"), "{error}");
    // From a thread of the runtime too.
    let error = runtime.block_on(async { bucket.size("x") }).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Network);
}

#[test]
fn what_the_limit_holds_up_is_not_the_buckets_fault() {
    let (s3, runtime, governor) = (S3::start(), Runtime::new().unwrap(), Governor::default());
    let mut bucket = bucket(s3.endpoint(), &governor, &runtime);
    s3.put("store/packs/x", &[7; 100_000]);
    bucket.timeout = Duration::from_secs(3);
    governor.set_limit(Some(Rate::new(20_000)));
    // The first one leaves a debt that takes longer than the bucket may.
    for _ in 0..2 {
        assert_eq!(bucket.read("packs/x", 0, 100_000).unwrap(), vec![7; 100_000]);
    }
}

#[test]
fn ranges_end_with_the_object() {
    let fixture = Fixture::new();
    fixture.s3.put("store/packs/x", b"0123456789");
    let read = |at| fixture.bucket.read("packs/x", at, 4).unwrap();
    assert_eq!(
        (&read(0)[..], &read(8)[..], &read(10)[..], &read(99)[..]),
        (&b"0123"[..], &b"89"[..], &b""[..], &b""[..])
    );
    assert_eq!(fixture.bucket.read("packs/y", 0, 4).unwrap_err().class(), ErrorClass::NotFound);
}

#[test]
fn a_list_of_several_pages_is_whole() {
    let fixture = Fixture::new();
    for at in 0..7 {
        fixture.s3.put(&format!("store/packs/{at}"), &vec![0; at]);
        fixture.s3.put(&format!("other/packs/{at}"), b"");
    }
    let expected: Vec<_> = (0..7).map(|at| (format!("packs/{at}"), at)).collect();
    assert_eq!(fixture.bucket.list().unwrap(), expected);
    fixture.bucket.remove("packs/3").unwrap();
    fixture.bucket.remove("packs/3").unwrap();
    assert_eq!(fixture.bucket.list().unwrap().len(), 6);
}

#[test]
fn a_pack_goes_in_parts() {
    let fixture = Fixture::new();
    let monitor = Counting::default();
    fixture.put(&monitor).unwrap();
    assert!(fixture.s3.object("store/packs/x") == Some(fixture.bytes.clone()), "other bytes arrived");
    assert_eq!((fixture.s3.uploads(), monitor.bytes.load(Ordering::Relaxed)), ((1, 0), fixture.bytes.len() as u64));
    assert_eq!(fixture.bucket.size("packs/x").unwrap(), Some(fixture.bytes.len() as u64));
    // A small one goes at once.
    std::fs::write(fixture.folder.path().join("pack"), "small").unwrap();
    fixture.put(&monitor).unwrap();
    assert_eq!((fixture.s3.uploads(), fixture.s3.object("store/packs/x").as_deref()), ((1, 0), Some(&b"small"[..])));
}

#[test]
fn on_a_slow_link_parts_go_one_at_a_time_and_take_as_long_as_they_take() {
    let mut fixture = Fixture::new();
    fixture.s3.delay(Duration::from_millis(10));
    fixture.bucket.pace.quick = Duration::ZERO;
    // No time that the bucket is given for an answer bounds an upload that gets on.
    fixture.bucket.timeout = Duration::from_millis(1);
    fixture.put(&Silent).unwrap();
    assert!(fixture.s3.object("store/packs/x") == Some(fixture.bytes.clone()), "other bytes arrived");
    assert_eq!(fixture.s3.most_parts(), 1);
}

#[test]
fn an_upload_that_fails_leaves_no_parts() {
    for refused in ["PUT store/packs/x part 1", "PUT store/packs/x part 3", "POST store/packs/x end"] {
        let fixture = Fixture::new();
        fixture.s3.refuse(refused, 400);
        let error = fixture.put(&Silent).unwrap_err();
        assert!(error.class() == ErrorClass::Network && error.to_string().contains("400"), "{refused}: {error}");
        fixture.assert_nothing_is_left(refused);
    }
}

#[test]
fn an_upload_that_gets_nowhere_ends_and_leaves_no_parts() {
    let mut fixture = Fixture::new();
    fixture.s3.hold(Some("PUT store/packs/x part 2"));
    fixture.bucket.pace.part = Duration::from_secs(5);
    let error = fixture.put(&Silent).unwrap_err();
    assert!(error.class() == ErrorClass::Network && error.to_string().contains("within 5 s"), "{error}");
    fixture.assert_nothing_is_left("held");
}

#[test]
fn an_upload_can_be_cancelled_and_leaves_no_parts() {
    let fixture = Fixture::new();
    fixture.s3.hold(Some("PUT store/packs/x part 2"));
    let monitor = Counting::default();
    std::thread::scope(|scope| {
        let putting = scope.spawn(|| fixture.put(&monitor));
        fixture.s3.wait_for_held();
        monitor.cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(putting.join().unwrap(), Err(Error::Cancelled)));
    });
    fixture.assert_nothing_is_left("cancelled");
}

#[test]
fn an_upload_of_a_file_that_is_not_there_is_the_files_fault() {
    let fixture = Fixture::new();
    let error = fixture.bucket.put("packs/x", &fixture.folder.path().join("none"), &Silent).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
}
