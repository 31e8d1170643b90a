//! Every integration test, in one binary: each module lists its cases.
//!
//! Runs like any cargo test: a part of a name filters, `--list` lists, `--test-threads N` sets how many at a time.

mod archives;
mod crash;
mod damage;
mod dedup;
mod drivers;
mod export;
mod faults;
mod filesystems;
mod follow;
mod fuzz;
mod guests;
mod hidden;
mod judges;
mod lazy;
mod migrate;
mod moves;
mod mptcp;
mod outlive;
mod owners;
mod partial;
mod paths;
mod power;
mod push;
mod ranges;
mod registry;
mod rollback;
mod roundtrip;
mod space;
mod ssh;
mod template;
mod tier;
mod warm;

use layerfs_tests::case::Case;

fn main() -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    let cases = [
        judges::cases(),
        export::cases(),
        roundtrip::cases(),
        dedup::cases(),
        push::cases(),
        registry::cases(),
        tier::cases(),
        paths::cases(),
        lazy::cases(),
        ssh::cases(),
        archives::cases(),
        damage::cases(),
        crash::cases(),
        faults::cases(),
        filesystems::cases(),
        fuzz::cases(),
        guests::cases(),
        hidden::cases(),
        warm::cases(),
        drivers::cases(),
        migrate::cases(),
        moves::cases(),
        rollback::cases(),
        follow::cases(),
        mptcp::cases(),
        partial::cases(),
        power::cases(),
        space::cases(),
        outlive::cases(),
        owners::cases(),
        ranges::cases(),
        template::cases(),
    ];
    let trials = cases.into_iter().flatten().map(Case::into_trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
