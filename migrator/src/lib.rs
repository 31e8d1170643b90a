//! migrator: moves layers between hosts.
//!
//! A [`Node`] is one store's side of the network: its identity, its peers, its listener, and the two things that
//! a person asks for, [`Node::push`] and [`Node::pull`]. Below it the protocol (docs/PROTOCOL.md) is split in three:
//! [`wire`] knows bytes, [`protocol`] knows what may follow what and does no I/O, and the drivers ([`send`],
//! [`receive`]) do the I/O and decide nothing. The protocol never sees a file or a path.
//!
//! This crate is asynchronous (tokio); whatever reads the store or hashes runs on blocking threads.

pub mod access;
mod align;
pub mod attempt;
pub mod bundle;
pub mod check;
mod clock;
pub mod dial;
mod encode;
pub mod error;
mod frames;
pub mod get;
pub mod governor;
pub mod grants;
pub mod group;
pub mod guest;
pub mod handover;
pub mod identity;
pub mod lazy;
mod level;
pub mod link;
pub mod listener;
pub mod measured;
pub mod meter;
pub mod migrate;
pub mod node;
mod numbers;
pub mod outbox;
pub mod patch;
pub mod paths;
pub mod peers;
pub mod plan;
pub mod progress;
pub mod protocol;
pub mod receive;
pub mod registry;
pub mod retry;
pub mod send;
mod similar;
pub mod slots;
pub mod socket;
pub mod streams;
pub mod structure;
#[cfg(test)]
pub(crate) mod tests;
pub mod tier;
pub mod tls;
pub mod transfers;
mod unbundle;
pub mod wanted;
pub mod wire;

pub use dial::Transport;
pub use error::{Error, Result};
pub use governor::{Priority, Rate};
pub use identity::{Fingerprint, Identity, PublicKey};
pub use lazy::{Lazy, LazyOptions};
pub use listener::Listener;
pub use migrate::Migrations;
pub use node::{Node, NodeOptions, PullOptions, PushOptions};
pub use paths::{Connections, PathOptions};
pub use peers::{Peer, PeerName, Peers, Rights};
pub use progress::TransferReport;
pub use retry::RetryFor;
pub use transfers::{TransferInfo, Transfers};
