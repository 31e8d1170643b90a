//! Giving the kernel small files before anybody asks: a request costs more than a small file's bytes.
//!
//! [`neighbours`](super::neighbours) says which; a thread of each mount fetches them and puts them into the kernel's page cache, while
//! whoever reads is busy with those before. Invariants:
//!
//! - What is put there is what the file has. Only sealed files are given, and on a writable mount nobody has the file open
//!   meanwhile and its stripe is held: neither a write nor a truncation is under way, and a file that is passed through is none of these.
//! - No lock that a request may need is held while the kernel waits for a page: a page is locked while a READ of it is under way, which
//!   on a writable mount takes an open file; on a read-only one no lock is held at all.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::Fs;
use super::neighbours::{Listed, Order};
use crate::attr::FileKind;
use crate::chunk::ChunkRead;
use crate::content::{self, Content, Extent, List, get_sized};
use crate::id::Ino;
use crate::inode::Node;
use crate::store::trace::Recorder;

/// Larger files have a read-ahead of their own.
const SMALL_BYTES: u64 = 128 << 10;

/// The kernel's page cache.
pub trait Pages: Send {
    /// Puts the first bytes of a file there, if the kernel knows the file.
    fn store(&self, ino: Ino, bytes: &[u8]);
}

/// What one mount gives.
#[derive(Default)]
pub(super) struct Giving {
    turn: Arc<Turn>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Turn {
    desk: Mutex<Desk>,
    changed: Condvar,
}

#[derive(Default)]
struct Desk {
    order: Order,
    is_open: bool,
}

impl Giving {
    /// Whether what is listed is of interest.
    pub fn is_on(&self) -> bool {
        self.turn.desk.lock().is_open
    }

    /// A listing of `folder` named these small files; `anew`: it began with them.
    pub fn listed(&self, folder: Ino, anew: bool, files: &[Ino]) {
        self.note(|order| order.listed(folder, anew, files));
    }

    /// Somebody asks for the begin of `ino`.
    pub fn asked(&self, ino: Ino) {
        self.note(|order| order.asked(ino));
    }

    fn note(&self, note: impl FnOnce(&mut Order) -> bool) {
        let mut desk = self.turn.desk.lock();
        if desk.is_open && note(&mut desk.order) {
            drop(desk);
            self.turn.changed.notify_one();
        }
    }
}

impl Turn {
    /// Waits for a file to give; none at the end.
    fn take(&self) -> Option<Listed> {
        let mut desk = self.desk.lock();
        while desk.is_open {
            match desk.order.take() {
                Some(listed) => return Some(listed),
                None => self.changed.wait(&mut desk),
            }
        }
        None
    }
}

/// Whether a file of `bytes` is given ahead.
pub(super) fn is_small(kind: FileKind, bytes: u64) -> bool {
    kind == FileKind::File && bytes > 0 && bytes <= SMALL_BYTES
}

impl Fs {
    /// From now on small files are given to `pages` ahead, until [`Fs::stop_giving`].
    pub fn give_ahead(self: &Arc<Fs>, pages: Box<dyn Pages>) {
        let (fs, turn) = (Arc::downgrade(self), self.giving.turn.clone());
        turn.desk.lock().is_open = true;
        let thread = std::thread::Builder::new().name("layerfs-give".to_owned());
        match thread.spawn(move || give(&fs, &turn, &*pages)) {
            Ok(thread) => *self.giving.thread.lock() = Some(thread),
            Err(error) => {
                self.giving.turn.desk.lock().is_open = false;
                tracing::warn!(%error, "cannot start a thread that gives files ahead");
            }
        }
    }

    /// Ends what [`Fs::give_ahead`] began.
    pub fn stop_giving(&self) {
        *self.giving.turn.desk.lock() = Desk::default();
        self.giving.turn.changed.notify_one();
        if let Some(thread) = self.giving.thread.lock().take() {
            let _ = thread.join();
        }
    }

    /// Gives the kernel the bytes of a file, if it is a small sealed one that nobody has open. Returns how many that were.
    fn give(&self, listed: Listed, pages: &dyn Pages) -> u64 {
        let (ino, view) = (listed.ino, self.view());
        let chunks = view.chunks();
        // What has to come from another host is fetched when it is asked for.
        if chunks.is_remote() || !self.is_sealed_and_closed(ino) {
            return 0;
        }
        let Ok(Some(inode)) = view.inode(ino) else { return 0 };
        let Node::File(content) = inode.node else { return 0 };
        if !is_small(FileKind::File, content.len()) {
            return 0;
        }
        // Whoever needs it gets the error.
        let Ok(bytes) = whole(&**chunks, &content) else { return 0 };
        if !self.giving.turn.desk.lock().order.is_wanted(listed) {
            return 0;
        }
        if let Some(recorder) = self.recorder() {
            note(recorder, &content);
        }
        if self.upper().is_none() {
            pages.store(ino, &bytes);
            return content.len();
        }
        let _stripe = self.stripe(ino).lock();
        let state = self.state.read();
        // A seal may have put other bytes below since.
        if state.tables.inode(ino).is_some() || !Arc::ptr_eq(&state.view, &view) {
            return 0;
        }
        drop(state);
        self.unless_open(ino, || pages.store(ino, &bytes));
        content.len()
    }

    fn is_sealed_and_closed(&self, ino: Ino) -> bool {
        self.upper().is_none() || (self.state.read().tables.inode(ino).is_none() && !self.is_open(ino))
    }
}

fn give(fs: &Weak<Fs>, turn: &Turn, pages: &dyn Pages) {
    while let Some(listed) = turn.take() {
        let Some(fs) = fs.upgrade() else { break };
        let bytes = fs.give(listed, pages);
        drop(fs);
        turn.desk.lock().order.given(bytes);
    }
}

/// All bytes of a file.
fn whole(chunks: &dyn ChunkRead, content: &Content) -> crate::error::Result<Bytes> {
    if let Content::Extents { list: List::Direct(extents), .. } = content
        && let [Extent::Chunk { id, bytes }] = extents[..]
    {
        return get_sized(&Once(chunks), &id, bytes);
    }
    let mut bytes = vec![0; content.len() as usize];
    content::read_at(&Once(chunks), content, 0, &mut bytes)?;
    Ok(bytes.into())
}

/// Chunks that are needed once.
pub(super) struct Once<'a>(pub &'a dyn ChunkRead);

impl ChunkRead for Once<'_> {
    fn get(&self, id: &crate::id::ChunkId) -> crate::error::Result<Bytes> {
        self.0.get_once(id)
    }
}

/// Notes what the content of a small file is made of, as if it had been read.
fn note(recorder: &Recorder, content: &Content) {
    if let Content::Extents { list: List::Direct(extents), .. } = content {
        for extent in extents {
            if let Extent::Chunk { id, .. } = extent {
                recorder.note(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::{Receiver, Sender, unbounded};

    use super::*;
    use crate::mount::caller::Caller;
    use crate::mount::fs::SetAttr;
    use crate::mount::tests::{empty_fs, seal_fs, store};

    type Given = (Ino, Vec<u8>);

    /// What is given goes to a channel.
    struct Told(Sender<Given>);

    impl Pages for Told {
        fn store(&self, ino: Ino, bytes: &[u8]) {
            let _ = self.0.send((ino, bytes.to_vec()));
        }
    }

    const FILES: usize = 40;

    /// A sealed folder with files, their numbers in the order of its listing, and what is given of them.
    fn sealed() -> (Arc<Fs>, Vec<Ino>, Receiver<Given>) {
        let fs = Arc::new(empty_fs(store()));
        let caller = Caller { uid: 0, gid: 0, pid: 1 };
        let files: Vec<Ino> = (0..FILES)
            .map(|number| {
                let name = format!("file-{number:03}");
                let made = fs.make(Ino::ROOT, name.as_bytes(), 0o100_644, 0, 0, caller).unwrap().ino;
                fs.write(made, 0, &bytes_of(number), None).unwrap();
                made
            })
            .collect();
        seal_fs(store(), &fs);
        let (send, receive) = unbounded();
        fs.give_ahead(Box::new(Told(send)));
        (fs, files, receive)
    }

    fn bytes_of(number: usize) -> Vec<u8> {
        format!("this is file {number}; ").into_bytes().repeat(1 + number * 20)
    }

    /// Lists the folder as the kernel does, to the end.
    fn list(fs: &Fs) {
        let (folder, mut last) = (fs.open_folder(Ino::ROOT), 0);
        loop {
            let before = last;
            let mut emit = |item: &crate::mount::fs::Item<'_>| {
                last = item.cookie;
                true
            };
            fs.list(Ino::ROOT, folder, before, true, &mut emit).unwrap();
            if last == before {
                break;
            }
        }
        fs.release_folder(folder);
    }

    fn read(fs: &Fs, ino: Ino) {
        assert!(fs.read(ino, 0, &mut [0; 4096]).unwrap() > 0);
    }

    /// Lets the first two files be read after a listing, and tells what is given, until nothing is to be given any more.
    fn given(fs: &Arc<Fs>, files: &[Ino], receive: &Receiver<Given>) -> Vec<Given> {
        list(fs);
        read(fs, files[0]);
        read(fs, files[1]);
        while fs.giving.turn.desk.lock().order.is_giving() {
            std::thread::yield_now();
        }
        fs.stop_giving();
        receive.try_iter().collect()
    }

    #[test]
    fn what_follows_is_given_as_it_is() {
        let (fs, files, receive) = sealed();
        let given = given(&fs, &files, &receive);
        assert!(given.len() > 2, "{given:?}");
        for (ino, bytes) in given {
            let number = files.iter().position(|file| *file == ino).unwrap();
            assert!(number > 1 && bytes == bytes_of(number), "file {number}");
        }
    }

    #[test]
    fn what_is_open_or_changed_is_not_given() {
        let (fs, files, receive) = sealed();
        let caller = Caller { uid: 0, gid: 0, pid: 1 };
        for ino in &files[2..] {
            match ino.0 % 4 {
                0 => assert!(fs.open(*ino, libc::O_RDWR, caller).unwrap().is_none()),
                1 => assert!(fs.write(*ino, 0, b"new", None).unwrap().bytes == 3),
                2 => drop(fs.setattr(*ino, SetAttr { size: Some(2), ..SetAttr::default() }, caller).unwrap()),
                _ => {
                    fs.open(*ino, libc::O_WRONLY, caller).unwrap();
                    fs.write(*ino, 1, b"new", None).unwrap();
                    fs.release(*ino, libc::O_WRONLY, false);
                }
            }
        }
        assert_eq!(given(&fs, &files, &receive), []);
    }

    #[test]
    fn what_changes_meanwhile_is_given_only_as_it_is() {
        /// Compares what is given with what the file has at that moment.
        struct Compared(Weak<Fs>, Sender<(Ino, bool)>);
        impl Pages for Compared {
            fn store(&self, ino: Ino, bytes: &[u8]) {
                let fs = self.0.upgrade().unwrap();
                let mut now = vec![0; bytes.len() + 1];
                let count = fs.read(ino, 1, &mut now).unwrap();
                let _ = self.1.send((ino, now[..count] == bytes[1..]));
            }
        }
        let (fs, files, _) = sealed();
        fs.stop_giving();
        let (send, compared) = unbounded();
        fs.give_ahead(Box::new(Compared(Arc::downgrade(&fs), send)));
        let caller = Caller { uid: 0, gid: 0, pid: 1 };
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in 0..30u8 {
                    for ino in &files {
                        fs.open(*ino, libc::O_WRONLY | libc::O_TRUNC, caller).unwrap();
                        fs.write(*ino, 0, &[round; 5000], None).unwrap();
                        fs.release(*ino, libc::O_WRONLY, false);
                    }
                    seal_fs(store(), &fs);
                }
            });
            while !writer.is_finished() {
                list(&fs);
                files.iter().for_each(|ino| {
                    fs.read(*ino, 0, &mut [0; 100]).unwrap();
                });
            }
            writer.join().unwrap();
        });
        fs.stop_giving();
        let compared: Vec<_> = compared.try_iter().collect();
        assert!(!compared.is_empty() && compared.iter().all(|(_, is_same)| *is_same), "{compared:?}");
    }
}
