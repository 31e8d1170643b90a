//! Images of containers and of disks.

use std::os::unix::fs::FileExt;

use sha2::Digest as _;

use super::tars::Maker;
use super::*;

fn digest(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut out).unwrap();
    out
}

fn layers() -> [Vec<u8>; 3] {
    let base = Maker::default()
        .folder("bin/")
        .file("bin/sh", "shell")
        .file("etc/a", "1")
        .file("etc/b", "2")
        .link("bin/bash", "bin/sh");
    let middle = Maker::default().file("etc/.wh.a", "").file("etc/c", "3").folder("opt/").file("opt/x", "4");
    let top = Maker::default().folder("opt/").file("opt/.wh..wh..opq", "").file("opt/y", "5").link("usr-sh", "bin/sh");
    [base.end(), middle.end(), top.end()]
}

const EXPECTED: [&str; 10] = ["", "bin", "bin/bash", "bin/sh", "etc", "etc/b", "etc/c", "opt", "opt/y", "usr-sh"];

/// How the images are run.
const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin","A=ä"],"Entrypoint":["/bin/sh"],"Cmd":["-c","x"],"User":"7:7","WorkingDir":"/opt","Labels":{"b":"2","a":"1"},"ExposedPorts":{"80/tcp":{}}},"history":[{"created":"2026-01-02T03:04:05Z","created_by":"one"},{"created_by":"ENV","empty_layer":true},{"created_by":"two"},{"created_by":"three"}]"#;

/// Writes an OCI layout of the three layers.
fn layout(folder: &Path) {
    layout_with(folder, &format!("{CONFIG}}}"));
}

fn layout_with(folder: &Path, config: &str) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    let blob = |bytes: &[u8]| {
        fs::write(folder.join("blobs/sha256").join(digest(bytes)), bytes).unwrap();
        format!("\"digest\":\"sha256:{}\",\"size\":{}", digest(bytes), bytes.len())
    };
    let [base, middle, top] = layers();
    let tar = "application/vnd.oci.image.layer.v1.tar";
    let layers = format!(
        "{{\"mediaType\":\"{tar}+gzip\",{}}},{{\"mediaType\":\"{tar}+zstd\",{}}},{{\"mediaType\":\"{tar}\",{}}}",
        blob(&gzip(&base)),
        blob(&zstd::encode_all(&middle[..], 3).unwrap()),
        blob(&top)
    );
    let manifest = format!(
        "{{\"schemaVersion\":2,\"config\":{{\"mediaType\":\"x\",{}}},\"layers\":[{layers}]}}",
        blob(config.as_bytes())
    );
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let index =
        format!("{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":\"{kind}\",{}}}]}}", blob(manifest.as_bytes()));
    fs::write(folder.join("index.json"), index).unwrap();
    fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
}

/// `plainly`: as `docker save` names the config, else as builders without a docker do.
fn docker_archive(plainly: bool) -> Vec<u8> {
    let [base, middle, top] = layers();
    let ids = [&base, &middle, &top].map(|tar| format!("\"sha256:{}\"", digest(tar))).join(",");
    let config = format!("{CONFIG},\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[{ids}]}}}}");
    let config_name = if plainly {
        format!("{}.json", digest(config.as_bytes()))
    } else {
        format!("sha256:{}", digest(config.as_bytes()))
    };
    let manifest = format!(
        "[{{\"Config\":\"{config_name}\",\"RepoTags\":[\"a:1\"],\"Layers\":[\"1/layer.tar\",\"2/layer.tar\",\"3/layer.tar\"]}}]"
    );
    Maker::default()
        .file(&config_name, &config)
        .member(b'0', "1/layer.tar", "", &base)
        .member(b'0', "2/real.tar", "", &middle)
        .member(b'2', "2/layer.tar", "../2/real.tar", b"")
        .member(b'0', "3/layer.tar", "", &top)
        .file("manifest.json", &manifest)
        .end()
}

fn check(bench: &Bench, report: &ImportReport) {
    assert_eq!(report.layers.len(), 3);
    let tree = bench.tree(bench.top(report));
    let paths: Vec<_> = tree.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(paths, EXPECTED);
    assert!(["bin/sh", "bin/bash", "usr-sh"].iter().all(|path| tree[path.as_bytes()].links == 3));
    let kinds: Vec<_> = report.layers.iter().map(|layer| layer.kind).collect();
    assert_eq!(kinds, [LayerKind::Base, LayerKind::Application, LayerKind::Application]);
}

#[test]
fn an_image_is_the_same_stack_however_it_comes() {
    let bench = Bench::new();
    layout(&bench.src());
    let folder = bench.import(&bench.src(), "folder");
    assert_eq!(folder.format, Format::Oci);
    check(&bench, &folder);
    sh("tar -cf oci.tar -C src . && gzip -k oci.tar", bench.folder.path());
    fs::write(bench.path("docker.tar"), docker_archive(true)).unwrap();
    fs::write(bench.path("builder.tar"), docker_archive(false)).unwrap();
    for (number, (file, format)) in [
        ("oci.tar", Format::Oci),
        ("oci.tar.gz", Format::Oci),
        ("docker.tar", Format::Docker),
        ("builder.tar", Format::Docker),
    ]
    .into_iter()
    .enumerate()
    {
        let report = bench.import(&bench.path(file), &format!("file-{number}"));
        assert_eq!((report.format, bench.top(&report)), (format, bench.top(&folder)), "{file}");
        let bytes = fs::read(bench.path(file)).unwrap();
        let report = bench.import_bytes(bytes, &ImportOptions::new(name(&format!("stream-{number}")))).unwrap();
        assert_eq!((report.format, bench.top(&report)), (format, bench.top(&folder)), "{file}");
    }
}

fn json_of(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The configuration of the only image of the layout.
fn exported_config(layout: &Path) -> serde_json::Value {
    let blob = |digest: &serde_json::Value| layout.join("blobs").join(digest.as_str().unwrap().replace(':', "/"));
    let index = json_of(&layout.join("index.json"));
    let manifest = json_of(&blob(&index["manifests"][0]["digest"]));
    json_of(&blob(&manifest["config"]["digest"]))
}

#[test]
fn what_an_image_says_of_itself_comes_out_again() {
    let bench = Bench::new();
    layout(&bench.src());
    let report = bench.import(&bench.src(), "app");
    let top = bench.top(&report);
    let (layer, config) = crate::image_config::ImageConfig::of_stack(&*bench.store, top).unwrap().unwrap();
    assert_eq!(layer, top);
    let wanted: serde_json::Value = serde_json::from_str(&format!("{CONFIG}}}")).unwrap();
    assert_eq!(serde_json::Value::from(config.properties().clone()), wanted);
    // Only the top has it; the tree doesn't.
    assert!(crate::image_config::ImageConfig::of_stack(&*bench.store, report.layers[1].id).unwrap().is_none());
    // A layer above inherits it.
    fs::create_dir(bench.path("more")).unwrap();
    fs::write(bench.path("more/file"), "more").unwrap();
    let mut options = ImportOptions::new(name("more"));
    options.parent = Some(top);
    let above = bench.top(&bench.try_import(&bench.path("more"), &options).unwrap());
    // What doesn't say when it was made gets a time when it is exported, always the same.
    let mut wanted = wanted;
    let epoch = serde_json::Value::from("1970-01-01T00:00:00Z");
    wanted["created"] = epoch.clone();
    for entry in wanted["history"].as_array_mut().unwrap().iter_mut().skip(1) {
        entry["created"] = epoch.clone();
    }
    for (layer, steps) in [(top, 4), (above, 5)] {
        let out = bench.path(&format!("out-{steps}"));
        let to = crate::export::Destination::parse(&format!("oci:{}", out.display()), None).unwrap();
        crate::export::export(&bench.store, layer, &to, &crate::monitor::Silent).unwrap();
        let mut found = exported_config(&out);
        assert_eq!(found["rootfs"]["diff_ids"].as_array().unwrap().len(), steps - 1);
        let history = found["history"].as_array().unwrap().clone();
        assert_eq!(history.len(), steps);
        assert_eq!(history[..4], wanted["history"].as_array().unwrap()[..]);
        assert!(history.iter().all(|entry| entry["created"].is_string()), "{history:?}");
        found.as_object_mut().unwrap().remove("rootfs");
        found["history"] = wanted["history"].clone();
        assert_eq!(found, wanted);
    }
    // What is exported and imported again says the same, and so does what is exported of that.
    let again = bench.import(&bench.path("out-4"), "again");
    let again = crate::image_config::ImageConfig::of_stack(&*bench.store, bench.top(&again)).unwrap().unwrap().1;
    assert_eq!(serde_json::Value::from(again.properties().clone()), wanted);
    // Nothing of it is lost to a collection, or missed by a check.
    bench.store.gc(&crate::monitor::Silent, Default::default()).unwrap();
    bench.store.check_stack(above).unwrap();
    assert!(crate::image_config::ImageConfig::of_stack(&*bench.store, above).unwrap().is_some());
}

#[test]
fn an_image_for_another_platform_is_taken_only_if_asked_for() {
    let bench = Bench::new();
    layout_with(&bench.src(), r#"{"architecture":"s390x","os":"linux","config":{}}"#);
    let mut options = ImportOptions::new(name("x"));
    let error = bench.try_import(&bench.src(), &options).unwrap_err();
    assert!(error.class() == ErrorClass::NotFound && error.to_string().contains("linux/s390x"), "{error}");
    options.platform = Some("linux/arm64".to_owned());
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::NotFound);
    options.platform = Some("nonsense".to_owned());
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::Invalid);
    assert!(bench.names().is_empty());
    options.platform = Some("linux/s390x".to_owned());
    bench.try_import(&bench.src(), &options).unwrap();
}

#[test]
fn damaged_and_foreign_images_are_refused() {
    let bench = Bench::new();
    layout(&bench.src());
    let [.., top] = layers();
    let blob = bench.src().join("blobs/sha256").join(digest(&top));
    let mut bytes = top.clone();
    let end = bytes.len();
    bytes[end - 1] = 1;
    fs::write(&blob, &bytes).unwrap();
    let options = ImportOptions::new(name("x"));
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::Corrupt);
    fs::write(&blob, &top[..700]).unwrap();
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::Corrupt);
    fs::remove_file(&blob).unwrap();
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::NotFound);
    // A blob that leads out of the layout.
    std::os::unix::fs::symlink("/etc/passwd", &blob).unwrap();
    assert!(bench.try_import(&bench.src(), &options).is_err());
    fs::write(bench.src().join("index.json"), "{\"manifests\":[]}").unwrap();
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::NotFound);
    fs::write(bench.src().join("index.json"), "nonsense").unwrap();
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::Corrupt);
    let bad = "{\"manifests\":[{\"digest\":\"sha256:../../../../etc/passwd\"}]}";
    fs::write(bench.src().join("index.json"), bad).unwrap();
    assert_eq!(bench.try_import(&bench.src(), &options).unwrap_err().class(), ErrorClass::Invalid);
    assert!(bench.names().is_empty());
}

/// A disk of 20 GB with 3 MB in it.
fn sparse_disk(path: &Path) {
    let file = fs::File::create(path).unwrap();
    file.set_len(20_000_000_000 / 512 * 512).unwrap();
    file.write_all_at(&noise(1, 1_000_000), 0).unwrap();
    file.write_all_at(&noise(2, 1_000_000), 10_000_000_001).unwrap();
    file.write_all_at(&noise(3, 1_000_000), 19_000_000_000).unwrap();
}

#[test]
fn a_large_sparse_disk_costs_its_data() {
    let bench = Bench::new();
    sparse_disk(&bench.path("disk.img"));
    let report = bench.import(&bench.path("disk.img"), "disk");
    assert_eq!(report.format, Format::Raw);
    assert!(report.new_stored_bytes < 3_300_000 && report.read_bytes < 3_300_000, "{report:?}");
    let view = bench.view(bench.top(&report));
    let (ino, _) = view.resolve(DISK_NAME.as_bytes(), false).unwrap();
    let mut bytes = vec![0; 1_000_000];
    assert_eq!(view.read_at(ino, 10_000_000_001, &mut bytes).unwrap(), 1_000_000);
    assert!(bytes == noise(2, 1_000_000));
    assert_eq!(view.read_at(ino, 15_000_000_000, &mut bytes).unwrap(), 1_000_000);
    assert!(is_zero(&bytes));
    if Command::new("qemu-img").arg("--version").output_locked().is_err() {
        eprintln!("qemu-img is not here: qcow2 images are left out of this test");
        return;
    }
    for (number, options) in ["", "-c"].iter().enumerate() {
        sh(&format!("qemu-img convert -f raw -O qcow2 {options} disk.img disk.qcow2"), bench.folder.path());
        let qcow2 = bench.import(&bench.path("disk.qcow2"), &format!("qcow2-{number}"));
        assert_eq!(qcow2.format, Format::Qcow2);
        assert!(qcow2.new_plain_bytes < 10_000 && qcow2.read_bytes < 4_000_000, "{qcow2:?}");
        let view = bench.view(bench.top(&qcow2));
        let (other, _) = view.resolve(DISK_NAME.as_bytes(), false).unwrap();
        let content = |view: &View, ino| view.expect_inode(ino).unwrap().node;
        assert_eq!(content(&view, other), content(&bench.view(bench.top(&report)), ino));
    }
    sh("qemu-img create -q -f qcow2 -b disk.img -F raw over.qcow2", bench.folder.path());
    let error = bench.try_import(&bench.path("over.qcow2"), &ImportOptions::new(name("over"))).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Unsupported);
    fs::write(bench.path("cut.qcow2"), &fs::read(bench.path("disk.qcow2")).unwrap()[..70_000]).unwrap();
    assert!(bench.try_import(&bench.path("cut.qcow2"), &ImportOptions::new(name("cut"))).is_err());
}

#[test]
fn a_file_of_something_else_is_not_taken_for_a_disk() {
    let bench = Bench::new();
    fs::write(bench.path("text"), "just text").unwrap();
    let error = bench.try_import(&bench.path("text"), &ImportOptions::new(name("x"))).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
    let mut options = ImportOptions::new(name("raw"));
    options.format = Some(Format::Raw);
    assert_eq!(bench.try_import(&bench.path("text"), &options).unwrap().layers[0].file_bytes, 9);
    let error = bench.import_bytes(b"just text".to_vec(), &ImportOptions::new(name("y"))).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Invalid);
}
