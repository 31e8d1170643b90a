//! Who may have how many connections to the listener: so that nobody keeps others out.
//!
//! A caller takes a place first in the anteroom, where it has a short time to show its key, and then among the connections
//! of its peer. Invariants: the sums are bounded, and so are one address's part of the anteroom and one peer's part
//! of the connections; a place is free again when its guard is dropped.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::identity::PublicKey;

/// Connections of one peer at a time. A transfer may have several.
pub const MAX_OF_PEER: usize = 64;
/// Callers that have not shown their keys yet, of one address: those of one transfer may call together.
pub const MAX_OF_ADDRESS: usize = 32;

#[derive(Debug, Default)]
struct Counts {
    of_address: HashMap<IpAddr, usize>,
    of_peer: HashMap<PublicKey, usize>,
}

/// The places. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Slots(Arc<Mutex<Counts>>);

#[derive(Debug)]
enum Whose {
    Address(IpAddr),
    Peer(PublicKey),
}

/// A place that is taken.
#[derive(Debug)]
pub struct Slot {
    slots: Slots,
    whose: Whose,
}

fn take<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K, most: usize) -> bool {
    let count = counts.entry(key).or_default();
    let is_free = *count < most;
    *count += usize::from(is_free);
    is_free
}

fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Slots {
    /// A place in the anteroom for a caller from `address`.
    pub fn enter(&self, address: IpAddr) -> Option<Slot> {
        let address = neighbourhood(address);
        let is_free = take(&mut self.0.lock().of_address, address, MAX_OF_ADDRESS);
        is_free.then(|| Slot { slots: self.clone(), whose: Whose::Address(address) })
    }
}

impl Slot {
    /// Leaves this place for one among the connections of the peer with `key`.
    pub fn sit(self, key: PublicKey) -> Option<Slot> {
        let is_free = take(&mut self.slots.0.lock().of_peer, key, MAX_OF_PEER);
        is_free.then(|| Slot { slots: self.slots.clone(), whose: Whose::Peer(key) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.slots.0.lock();
        match &self.whose {
            Whose::Address(address) => give_back(&mut counts.of_address, address),
            Whose::Peer(key) => give_back(&mut counts.of_peer, key),
        }
    }
}

/// Whoever has one IPv6 address has 2^64 of them.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & !0 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_and_one_peer_have_so_many_and_no_more() {
        let slots = Slots::default();
        let enter = |text: &str| slots.enter(text.parse().unwrap());
        let mut taken: Vec<Slot> = (0..MAX_OF_ADDRESS).map(|_| enter("10.0.0.1").unwrap()).collect();
        assert!(enter("10.0.0.1").is_none() && enter("::ffff:10.0.0.1").is_none());
        assert!(enter("10.0.0.2").is_some());
        taken.pop();
        assert!(enter("10.0.0.1").is_some());
        let host = |n: usize| format!("2001:db8::{n:x}");
        let _all: Vec<Slot> = (0..MAX_OF_ADDRESS).map(|n| enter(&host(n)).unwrap()).collect();
        assert!(enter(&host(999)).is_none());

        let seat = |byte| enter("10.0.0.9").unwrap().sit(PublicKey([byte; 32]));
        let seats: Vec<Slot> = (0..MAX_OF_PEER).map(|_| seat(1).unwrap()).collect();
        assert!(seat(1).is_none() && seat(2).is_some());
        drop(seats);
        assert!(seat(1).is_some());
        drop(taken);
        drop(_all);
        assert!(slots.0.lock().of_address.is_empty() && slots.0.lock().of_peer.is_empty());
    }
}
