//! Figures about the store as a whole.

use std::collections::HashSet;

use crate::chunk::Class;
use crate::closure::Records;
use crate::error::Result;
use crate::id::LayerId;
use crate::inode::Node;
use crate::manifest::Manifest;
use crate::monitor::{self, Monitor};
use crate::store::offload::TierStat;
use crate::store::pack::HEADER_BYTES;
use crate::store::{Store, Uncached};

/// The chunks of one class.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct ClassStat {
    /// The class.
    pub class: Class,
    /// How many there are.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// What they take in packs, in bytes, headers included.
    pub stored_bytes: u64,
}

/// Figures about a store.
#[derive(Clone, Debug, serde::Serialize)]
pub struct StoreStat {
    /// By class: data, list, table, manifest.
    pub classes: Vec<ClassStat>,
    /// Chunks of all classes.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// What they take in packs, in bytes.
    pub stored_bytes: u64,
    /// Packs here.
    pub packs: u64,
    /// Their sizes added up, in bytes.
    pub pack_bytes: u64,
    /// How much of them nothing in the index refers to, in bytes: what a collection frees at once.
    pub dead_bytes: u64,
    /// What lies in the second tier.
    pub tier: TierStat,
    /// Names.
    pub names: u64,
    /// Layers in the stacks of those names.
    pub layers: u64,
    /// Bytes of file data in those layers, each time that it is referred to. Files of up to 512 bytes, which lie in the
    /// tables, included.
    pub referenced_bytes: u64,
    /// `referenced_bytes` by the plain bytes of data and tables stored.
    pub dedup_ratio: f64,
    /// `plain_bytes` by `stored_bytes`.
    pub compression_ratio: f64,
}

impl Store {
    /// Counts everything. Reads the index and the tables of all named layers.
    pub fn stat(&self, monitor: &dyn Monitor) -> Result<StoreStat> {
        let mut classes = Class::ALL.map(|class| ClassStat { class, chunks: 0, plain_bytes: 0, stored_bytes: 0 });
        for entry in self.index.iter()? {
            let (_, location) = entry?;
            let stat = &mut classes[location.class as usize];
            stat.chunks += 1;
            stat.plain_bytes += u64::from(location.plain_bytes);
            stat.stored_bytes += location.record_bytes();
        }
        let packs = self.packs.list()?;
        let pack_bytes: u64 = packs.iter().map(|(_, bytes)| bytes).sum();
        let remote = self.packs.remote()?;
        let remote_bytes: u64 = remote.iter().map(|(_, bytes)| bytes).sum();
        let headers = ((packs.len() + remote.len()) * HEADER_BYTES) as u64;
        let sum = |of: fn(&ClassStat) -> u64| classes.iter().map(of).sum::<u64>();
        let (plain_bytes, stored_bytes) = (sum(|stat| stat.plain_bytes), sum(|stat| stat.stored_bytes));
        let names = self.names()?;
        let mut layers: HashSet<LayerId> = HashSet::new();
        let mut referenced_bytes = 0;
        for (_, record) in &names {
            let mut next = Some(record.layer);
            while let Some(layer) = next.filter(|layer| layers.insert(*layer)) {
                let manifest = Manifest::load(&Uncached(self), layer)?;
                referenced_bytes = self.referenced_bytes(&manifest, monitor)?.saturating_add(referenced_bytes);
                next = manifest.parent;
            }
        }
        let ratio = |a: u64, b: u64| if b == 0 { 1.0 } else { a as f64 / b as f64 };
        let content_bytes = classes[Class::Data as usize].plain_bytes + classes[Class::Table as usize].plain_bytes;
        Ok(StoreStat {
            chunks: sum(|stat| stat.chunks),
            plain_bytes,
            stored_bytes,
            packs: packs.len() as u64,
            pack_bytes,
            dead_bytes: (pack_bytes + remote_bytes).saturating_sub(stored_bytes + headers),
            tier: self.tier_stat()?,
            names: names.len() as u64,
            layers: layers.len() as u64,
            referenced_bytes,
            dedup_ratio: ratio(referenced_bytes, content_bytes),
            compression_ratio: ratio(plain_bytes, stored_bytes),
            classes: classes.to_vec(),
        })
    }

    /// Bytes of file data in one layer.
    fn referenced_bytes(&self, manifest: &Manifest, monitor: &dyn Monitor) -> Result<u64> {
        let chunks = Uncached(self);
        let mut inodes = Records::inodes(&chunks, manifest)?;
        let mut bytes = 0u64;
        while let Some(inode) = inodes.next_inode()? {
            monitor::check(monitor)?;
            if let Node::File(content) = &inode.node {
                bytes = bytes.saturating_add(content.data_bytes());
            }
        }
        Ok(bytes)
    }
}
