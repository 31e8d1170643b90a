//! How fast a cold push is. Not run by itself: `cargo test --release -p migrator speed -- --ignored --nocapture`.

use std::path::Path;

use super::pair::*;

/// Up to `most_bytes` of real files below `folder`.
fn real_files(folder: &Path, tree: &mut Tree, most_bytes: &mut usize) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(meta) = path.symlink_metadata() else { continue };
        if meta.is_dir() {
            real_files(&path, tree, most_bytes);
        } else if meta.is_file() && *most_bytes > 0 {
            let Ok(bytes) = std::fs::read(&path) else { continue };
            *most_bytes = most_bytes.saturating_sub(bytes.len());
            tree.insert(path.to_string_lossy().replace('/', "+").chars().rev().take(200).collect(), bytes);
        }
    }
}

/// What this process has used of processors.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
#[allow(clippy::print_stderr)]
async fn a_cold_push_of_real_files() {
    let mut files = Tree::new();
    let mut most = 400 << 20;
    real_files(Path::new("/usr"), &mut files, &mut most);
    let plain: usize = files.values().map(Vec::len).sum();
    let here = Host::new();
    let layer = add_layer(here.store(), "x", &files);
    drop(files);
    for _ in 0..3 {
        let there = Host::new();
        let listener = there.node.listen(([127, 0, 0, 1], 0).into()).await.unwrap();
        let _ = here.node.peers().remove("there");
        here.know("there", there.node.public_key(), Some(listener.address().to_string()), Default::default());
        there.know("here", here.node.public_key(), None, Default::default());
        let before = cpu_seconds();
        let report = here.node.push(&[name("x")], "there", Default::default(), silent()).await.unwrap();
        let rate = plain as f64 / 1e6 / report.seconds;
        // Both sides and the rest of the machine share the processors: the second figure is the steadier one.
        let cpu_rate = plain as f64 / 1e6 / (cpu_seconds() - before);
        eprintln!("{} MB, {rate:.0} MB/s, {cpu_rate:.0} MB per CPU second: {report:?}", plain / 1_000_000);
        assert!(there.store().name(&name("x")).unwrap().is_some_and(|record| record.layer == layer));
    }
}
