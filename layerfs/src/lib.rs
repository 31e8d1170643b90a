//! layerfs: a content-addressed layered filesystem.
//!
//! Everything is chunks. A file tree, a disk image and (later) a guest's memory are lists of
//! content-addressed chunks in one [`store::Store`]; a *layer* is a manifest over chunks, a *stack* is a
//! layer and its ancestors, and a mount is a [`view::View`] over a stack with a writable upper on top.
//!
//! The data's way in: bytes → [`chunker`] → [`store`] → [`manifest`] (a sealed layer) → name.
//! The way out: name → stack of manifests → [`view`] → [`mount`].
//!
//! This crate is synchronous, knows no terminal, no environment and no network.

pub mod attr;
pub mod chunk;
pub mod chunker;
pub mod closure;
pub mod codec;
pub mod content;
pub mod diff;
pub mod durable;
pub mod error;
pub mod export;
pub mod failpoint;
#[cfg(test)]
mod golden;
pub mod id;
pub mod image_config;
pub mod import;
pub mod inode;
pub mod manifest;
pub mod monitor;
pub mod mount;
pub mod packets;
pub mod patience;
pub mod platform;
pub mod readahead;
pub mod refs;
pub mod seal;
pub mod splice;
pub mod squash;
pub mod store;
pub mod table;
#[cfg(test)]
mod testing;
pub mod upper;
pub mod usage;
pub mod view;
pub mod walk;

pub use error::{Error, Result};
pub use id::{ChunkId, Ino, LayerId, LayerName, UpperId};
