//! The corpus of the fuzz targets, replayed: seeds, and what fuzzing has found. `make fuzz` looks for more.

use std::fs;

use anyhow::{Context, ensure};
use layerfs_tests::case::{Case, tests};

#[path = "../fuzz/src/targets.rs"]
mod targets;

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![Case::new("fuzz::corpus_is_replayed", &[], corpus)]
}

fn corpus() -> anyhow::Result<()> {
    let corpus = tests().join("fuzz/corpus");
    for (name, target) in targets::TARGETS {
        let folder = corpus.join(name);
        let mut inputs = 0;
        for input in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = input?.path();
            let data = fs::read(&path)?;
            let outcome = std::panic::catch_unwind(|| target(&data));
            ensure!(outcome.is_ok(), "target {name} fails on {}", path.display());
            inputs += 1;
        }
        ensure!(inputs > 0, "target {name} has no corpus");
    }
    targets::clean_up();
    Ok(())
}
