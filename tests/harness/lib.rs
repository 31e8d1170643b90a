//! What the integration tests, the benchmark and nobody else need: real hosts, real trees, independent judges.
//!
//! - [`case`]: a test that knows what it needs, and says SKIPPED with the reason where it cannot run.
//! - [`ctl`]: runs `layerctl` as a person would, and holds its answer.
//! - [`host`]: one host (a store, a daemon, perhaps a network namespace); two hosts and the link between them.
//! - [`scene`]: a mounted layer and its plain twin; waiting until something is so.
//! - [`network`]: namespaces and the paths between them; [`emulator`] and [`segments`]: delay and loss on those.
//! - [`debian`]: a Debian root from debootstrap, made once per machine.
//! - [`fixtures`]: programs that run inside guests.
//! - [`servers`]: servers of others on loopback: a registry, an S3 server.
//! - [`tree`] and [`zoo`]: made-up trees, plain ones and those that hold one of everything that is hard to keep.
//! - [`compare`]: whether two trees are equal, by rsync and by the kernel's word, not by our own code.
//!
//! Invariant: what a test makes (processes, mounts, namespaces, folders) is gone when its values are dropped, by
//! the id of each, also after a panic.

pub mod case;
pub mod compare;
pub mod ctl;
pub mod debian;
pub mod emulator;
pub mod fixtures;
pub mod host;
pub mod network;
pub mod scene;
pub mod segments;
pub mod servers;
pub mod tree;
pub mod zoo;
