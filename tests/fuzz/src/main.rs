//! libFuzzer's driver: `LAYERFS_FUZZ_TARGET` names the target. `make fuzz` runs them all.
#![no_main]

mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<targets::Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("LAYERFS_FUZZ_TARGET").unwrap_or_default();
        match targets::TARGETS.iter().find(|(known, _)| *known == name) {
            Some((_, target)) => *target,
            None => {
                let names: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
                eprintln!("set LAYERFS_FUZZ_TARGET to one of {}", names.join(", "));
                std::process::exit(2);
            }
        }
    });
    target(data);
});
