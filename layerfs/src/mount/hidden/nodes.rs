//! Which hidden file stands for which inode, and what is known of it.
//!
//! Hides how it is told that a hidden file is there no more: it isn't looked up, nobody has it pinned, and its inode isn't open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock};

use crate::attr::Time;
use crate::id::Ino;
use crate::upper::table::Stamp;

/// The first node's number: the mount's root is 1.
const FIRST: u64 = 2;

/// A request that waits for the end of a hold: its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting(pub u64);

#[derive(Debug)]
struct Node {
    ino: Ino,
    /// What the kernel is told of the file when it doesn't know it.
    born: Stamp,
    /// The time of change that the tables have been told of.
    known: Time,
    /// How often the kernel has looked it up, at least, and not forgotten it.
    lookups: u64,
    pins: u32,
    is_open: bool,
    /// The inode has been open by it. Else its length is of before, as others may have changed the inode's since in another way.
    was_kept: bool,
    /// Nobody can reach the inode any more.
    is_dead: bool,
    /// What names the file without opening it.
    file: Option<Arc<OwnedFd>>,
}

impl Node {
    fn is_busy(&self) -> bool {
        self.pins > 0 || self.is_open
    }
}

#[derive(Debug, Default)]
struct Table {
    nodes: HashMap<u64, Node>,
    by_ino: HashMap<Ino, u64>,
    last: u64,
}

impl Table {
    fn kept(&self, ino: Ino) -> Option<u64> {
        let number = self.by_ino.get(&ino)?;
        self.nodes.get(number).filter(|node| node.was_kept).map(|_| *number)
    }

    fn remove_unused(&mut self, number: u64) {
        let is_unused = |node: &Node| node.lookups == 0 && !node.is_busy() && node.file.is_none();
        if let Some(node) = self.nodes.get(&number)
            && is_unused(node)
        {
            if self.by_ino.get(&node.ino) == Some(&number) {
                self.by_ino.remove(&node.ino);
            }
            self.nodes.remove(&number);
        }
    }

    fn next(&mut self) -> u64 {
        // The clock, so that no number of a daemon that died comes again; in 32 bits, as records of open files have them.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let millis = now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000;
        self.last = millis.max(self.last + 1).max(FIRST) & u64::from(u32::MAX);
        self.last = self.last.max(FIRST);
        while self.nodes.contains_key(&self.last) {
            self.last += 1;
        }
        self.last
    }
}

/// The requests that a hold waits for, or that wait for its end.
#[derive(Debug, Default)]
struct Held {
    /// None while there is no hold.
    wanted: Option<Vec<u64>>,
    waiting: Vec<Waiting>,
}

/// The hidden files of a mount.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    table: RwLock<Table>,
    /// How many there are, to be asked without a lock.
    count: AtomicUsize,
    held: Mutex<Held>,
    arrived: Condvar,
}

/// What the mount's threads need to know of a node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub ino: Ino,
    pub born: Stamp,
    pub is_dead: bool,
    /// Whether somebody looks at the file itself for its times.
    pub is_looked_at: bool,
}

/// A hidden file that stays while this exists.
pub(in crate::mount) struct Pin {
    nodes: Arc<Nodes>,
    node: u64,
}

impl Pin {
    /// Its number.
    pub fn node(&self) -> u64 {
        self.node
    }

    /// What names the file.
    pub fn file(&self) -> Option<Arc<OwnedFd>> {
        self.nodes.table.read().nodes.get(&self.node)?.file.clone()
    }

    /// The inode is open from now on.
    pub fn keep(&self) {
        if let Some(node) = self.nodes.table.write().nodes.get_mut(&self.node) {
            (node.is_open, node.was_kept) = (true, true);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.nodes.change(self.node, |node| node.pins -= 1);
    }
}

impl Nodes {
    fn change(&self, number: u64, change: impl FnOnce(&mut Node)) {
        let mut table = self.table.write();
        if let Some(node) = table.nodes.get_mut(&number) {
            change(node);
        }
        table.remove_unused(number);
        self.count.store(table.nodes.len(), Ordering::Release);
    }

    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    pub fn of(&self, ino: Ino) -> Option<u64> {
        if self.is_empty() { None } else { self.table.read().by_ino.get(&ino).copied() }
    }

    /// As [`Nodes::of`], if the inode is open by it, or was.
    pub fn kept(&self, ino: Ino) -> Option<u64> {
        if self.is_empty() { None } else { self.table.read().kept(ino) }
    }

    pub fn is_there(&self, node: u64) -> bool {
        self.table.read().nodes.contains_key(&node)
    }

    pub fn all(&self) -> Vec<(u64, Ino)> {
        self.table.read().nodes.iter().map(|(number, node)| (*number, node.ino)).collect()
    }

    pub fn pin(nodes: &Arc<Nodes>, ino: Ino, stamp: Stamp) -> (Pin, Option<Arc<OwnedFd>>) {
        let mut table = nodes.table.write();
        let number = match table.kept(ino) {
            Some(number) => number,
            None => table.next(),
        };
        drop(table);
        let pin = Nodes::pin_again(nodes, number, ino, stamp);
        let file = pin.file();
        (pin, file)
    }

    pub fn pin_again(nodes: &Arc<Nodes>, number: u64, ino: Ino, stamp: Stamp) -> Pin {
        let mut table = nodes.table.write();
        let node = table.nodes.entry(number).or_insert_with(|| Node {
            ino,
            born: stamp,
            known: stamp.mtime,
            lookups: 0,
            pins: 0,
            is_open: false,
            was_kept: false,
            is_dead: false,
            file: None,
        });
        node.pins += 1;
        if node.file.is_none() {
            // If the kernel has forgotten it, all was written back, and the tables are right.
            node.born = stamp;
            if node.lookups == 0 {
                node.known = stamp.mtime;
            }
        }
        table.by_ino.insert(ino, number);
        table.last = table.last.max(number);
        nodes.count.store(table.nodes.len(), Ordering::Release);
        Pin { nodes: nodes.clone(), node: number }
    }

    pub fn opened(&self, number: u64, file: OwnedFd) {
        if let Some(node) = self.table.write().nodes.get_mut(&number) {
            node.file = Some(Arc::new(file));
        }
    }

    pub fn idle(&self, number: u64) {
        self.change(number, |node| node.is_open = false);
    }

    pub fn is_busy(&self, number: u64) -> bool {
        self.table.read().nodes.get(&number).is_some_and(Node::is_busy)
    }

    pub fn let_go(&self, number: u64) {
        let mut file = None;
        self.change(number, |node| {
            if !node.is_busy() {
                file = node.file.take();
            }
        });
        // Not under the lock: the kernel may forget the file now.
        drop(file);
    }

    /// The names of all files, which keep the mount as long as there is one. They aren't here any more.
    pub fn take_files(&self) -> Vec<Arc<OwnedFd>> {
        self.table.write().nodes.values_mut().filter_map(|node| node.file.take()).collect()
    }

    pub fn file(&self, ino: Ino) -> Option<(Arc<OwnedFd>, Time)> {
        if self.is_empty() {
            return None;
        }
        let table = self.table.read();
        let node = table.nodes.get(&table.kept(ino)?)?;
        Some((node.file.clone()?, node.known))
    }

    pub fn told(&self, ino: Ino, mtime: Time) {
        let mut table = self.table.write();
        if let Some(number) = table.by_ino.get(&ino).copied()
            && let Some(node) = table.nodes.get_mut(&number)
        {
            node.known = mtime;
        }
    }

    pub fn removed(&self, ino: Ino) {
        if self.is_empty() {
            return;
        }
        let mut table = self.table.write();
        if let Some(number) = table.by_ino.remove(&ino)
            && let Some(node) = table.nodes.get_mut(&number)
        {
            node.is_dead = true;
        }
    }

    /// The inode of `number`; what the kernel is told of it.
    pub fn get(&self, number: u64) -> Option<Known> {
        let table = self.table.read();
        let node = table.nodes.get(&number)?;
        let is_looked_at = node.file.is_some();
        Some(Known { ino: node.ino, born: node.born, is_dead: node.is_dead, is_looked_at })
    }

    /// The kernel looks `number` up.
    pub fn look_up(&self, number: u64) -> Option<Known> {
        let found = self.get(number)?;
        self.change(number, |node| node.lookups += 1);
        Some(found)
    }

    /// The kernel forgets `count` of its look-ups.
    pub fn forget(&self, number: u64, count: u64) {
        self.change(number, |node| node.lookups = node.lookups.saturating_sub(count));
    }

    /// From now on the requests for a hold of `nodes` wait.
    pub fn begin_hold(&self, nodes: &[u64]) {
        *self.held.lock() = Held { wanted: Some(nodes.to_vec()), waiting: Vec::new() };
    }

    /// The request for a hold of `node` is there; false if nobody wants it any more.
    pub fn hold(&self, node: u64, number: u64) -> bool {
        let mut held = self.held.lock();
        let Some(wanted) = &mut held.wanted else { return false };
        wanted.retain(|other| *other != node);
        held.waiting.push(Waiting(number));
        self.arrived.notify_all();
        true
    }

    /// Whether all are there that are waited for, after waiting for at most `limit`. Nobody writes to what the kernel has forgotten.
    pub fn are_held(&self, limit: Duration) -> bool {
        let mut held = self.held.lock();
        if let Some(wanted) = &mut held.wanted {
            wanted.retain(|node| self.is_there(*node));
        }
        let is_done = |held: &Held| held.wanted.as_ref().is_none_or(Vec::is_empty);
        self.arrived.wait_while_for(&mut held, |held| !is_done(held), limit);
        is_done(&held)
    }

    /// Whether the request for a hold of `node` is waited for still.
    pub fn is_hold_wanted(&self, node: u64) -> bool {
        self.held.lock().wanted.as_ref().is_some_and(|wanted| wanted.contains(&node))
    }

    /// Ends the hold; whoever waited is to be answered.
    pub fn end_hold(&self) -> Vec<Waiting> {
        std::mem::take(&mut *self.held.lock()).waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(bytes: u64) -> Stamp {
        Stamp { bytes, mtime: Time::default() }
    }

    #[test]
    fn a_node_goes_when_nobody_knows_it() {
        let nodes = Arc::new(Nodes::default());
        let (pin, file) = Nodes::pin(&nodes, Ino(7), stamp(9));
        assert!(file.is_none());
        pin.keep();
        let number = pin.node();
        nodes.idle(number);
        assert_eq!(nodes.of(Ino(7)), Some(number));
        assert_eq!(nodes.look_up(number).unwrap().born, stamp(9));
        drop(pin);
        assert!(nodes.is_there(number), "the kernel knows it");
        let (pin, _) = Nodes::pin(&nodes, Ino(7), stamp(9));
        assert_eq!(pin.node(), number);
        pin.keep();
        nodes.forget(number, 1);
        drop(pin);
        assert!(nodes.is_there(number), "it is open");
        nodes.idle(number);
        assert!(!nodes.is_there(number) && nodes.of(Ino(7)).is_none());
        let (pin, _) = Nodes::pin(&nodes, Ino(7), stamp(9));
        assert_ne!(pin.node(), number, "a number was used again");
    }

    #[test]
    fn a_request_for_a_hold_waits_only_while_there_is_one() {
        let nodes = Arc::new(Nodes::default());
        let _pins = [5, 6].map(|number| Nodes::pin_again(&nodes, number, Ino(number), stamp(9)));
        assert!(!nodes.hold(5, 50));
        nodes.begin_hold(&[5, 6]);
        assert!(nodes.hold(5, 51) && !nodes.are_held(Duration::ZERO));
        assert!(nodes.is_hold_wanted(6) && !nodes.is_hold_wanted(5));
        assert!(nodes.hold(6, 61) && nodes.are_held(Duration::ZERO));
        assert_eq!(nodes.end_hold(), [Waiting(51), Waiting(61)]);
        assert!(!nodes.hold(6, 62));
    }

    #[test]
    fn no_hold_waits_for_what_the_kernel_has_forgotten() {
        let nodes = Arc::new(Nodes::default());
        let pins = [5, 6].map(|number| Nodes::pin_again(&nodes, number, Ino(number), stamp(9)));
        nodes.begin_hold(&[5, 6]);
        assert!(nodes.hold(5, 51) && !nodes.are_held(Duration::ZERO));
        drop(pins);
        assert!(nodes.are_held(Duration::ZERO) && !nodes.is_hold_wanted(6));
    }

    #[test]
    fn what_was_made_and_not_used_says_nothing_and_is_not_used_later() {
        let nodes = Arc::new(Nodes::default());
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let (pin, _) = Nodes::pin(&nodes, Ino(7), stamp(9));
        let unused = pin.node();
        nodes.opened(unused, file());
        drop(pin);
        assert_eq!((nodes.of(Ino(7)), nodes.kept(Ino(7))), (Some(unused), None));
        assert!(nodes.file(Ino(7)).is_none());
        // The file has become longer.
        let (pin, known) = Nodes::pin(&nodes, Ino(7), stamp(19));
        let used = pin.node();
        assert!(used != unused && known.is_none());
        nodes.opened(used, file());
        pin.keep();
        assert!(nodes.file(Ino(7)).is_some());
        nodes.let_go(unused);
        assert!(!nodes.is_there(unused));
        assert_eq!((nodes.of(Ino(7)), nodes.kept(Ino(7))), (Some(used), Some(used)));
        drop(pin);
        nodes.idle(used);
        assert!(nodes.file(Ino(7)).is_some(), "what was written by it isn't written back yet");
        nodes.let_go(used);
        assert!(nodes.of(Ino(7)).is_none());
    }
}
