//! Snapshots of the command line: stdout, stderr and exit code of every command, on a real store with a real daemon.
//!
//! What differs from run to run (ids, times, sizes of compressed data) is replaced by what it is. A test that cannot run
//! here, for want of root or FUSE, says so.

mod host;
#[path = "../../../migrator/src/tests/s3.rs"]
#[expect(dead_code, reason = "some of what it can do is for the tests of the migrator")]
mod s3;

mod commands;
mod failures;
mod guests;
mod keeper;
mod life;
mod mounts;
mod peers;
mod supervised;
mod tier;
