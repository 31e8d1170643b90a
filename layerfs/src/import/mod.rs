//! Brings folders, archives, images and disks into the store as sealed layers.

pub mod builder;
pub mod entry;
mod links;
mod output;
pub mod path;
mod plan;
pub mod sorter;
