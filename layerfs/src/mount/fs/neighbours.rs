//! Which small files will be asked for next: whoever reads the files of a folder in the order of its listing reads the next ones too.
//!
//! Hides how that is told from requests alone, of which there are none for what the kernel has already: listings are noted; of the files that
//! are given ahead one is left out now and then (a *probe*), and when somebody asks for it more follow. It knows no files' bytes
//! and no threads: [`giving`](super::giving) does what it says.
//!
//! Bounds: [`LISTED_MAX`] files are remembered, about 60 bytes each. [`LAST`] files and [`AHEAD_BYTES`] bytes are given before somebody asks for
//! one: so much is for nothing when a reader stops, or turned elsewhere.

use std::collections::{HashMap, VecDeque};

use crate::id::Ino;

/// How many listed files are remembered.
const LISTED_MAX: usize = 4096;
/// How many files are given until the next is asked for, at first and at most; how many bytes at most.
const FIRST: u32 = 8;
const LAST: u32 = 128;
const AHEAD_BYTES: u64 = 4 << 20;
/// A reader may leave out so many files and still read in order.
const SLACK: usize = 8;
/// So many files are left to a reader at most who is as fast as what is given to him.
const LEAD: usize = 8;

/// A file to give, and where it is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub ino: Ino,
    folder: Ino,
    index: usize,
}

/// The small files of a folder in the order of its listing.
#[derive(Debug, Default)]
struct List {
    files: Vec<Ino>,
    /// So many of them the kernel surely knows: it takes nothing for others.
    known: usize,
    /// Behind the last that was asked for.
    asked: usize,
    /// Behind the last that was given or left out.
    next: usize,
}

/// What was listed, and who reads it.
#[derive(Debug, Default)]
pub(super) struct Order {
    lists: HashMap<Ino, List>,
    /// The folders, that which is to be gone on with last.
    folders: VecDeque<Ino>,
    places: HashMap<Ino, (Ino, usize)>,
    /// How many files the lists have.
    files: usize,
    /// How many files are given until the next is asked for: 0 as long as nobody reads in order.
    window: u32,
    /// What is left of it, in files and bytes.
    left: u32,
    left_bytes: u64,
    /// After so many the next is left out.
    probe_in: u32,
    /// What is being given.
    busy: Option<Listed>,
    lead: usize,
}

impl Order {
    /// A listing of `folder` names these small files, behind those named before, which the kernel has taken then; `anew`: it
    /// begins with them. Returns whether there is something to give.
    pub fn listed(&mut self, folder: Ino, anew: bool, files: &[Ino]) -> bool {
        if anew {
            self.forget(folder);
        } else if let Some(list) = self.lists.get_mut(&folder) {
            list.known = list.files.len();
        }
        let goes_on = self.left > 0 && !anew;
        if files.is_empty() {
            return goes_on;
        }
        let list = self.lists.entry(folder).or_default();
        for ino in files.iter().take(LISTED_MAX - list.files.len().min(LISTED_MAX)) {
            self.places.insert(*ino, (folder, list.files.len()));
            list.files.push(*ino);
            self.files += 1;
        }
        self.put_on_top(folder);
        while self.files > LISTED_MAX
            && let Some(oldest) = self.folders.front().copied().filter(|oldest| *oldest != folder)
        {
            self.forget(oldest);
        }
        goes_on
    }

    fn forget(&mut self, folder: Ino) {
        let Some(list) = self.lists.remove(&folder) else { return };
        self.folders.retain(|other| *other != folder);
        self.files -= list.files.len();
        for ino in list.files {
            // A file with several names may stand elsewhere since.
            if self.places.get(&ino).is_some_and(|(place, _)| *place == folder) {
                self.places.remove(&ino);
            }
        }
    }

    fn put_on_top(&mut self, folder: Ino) {
        if self.folders.back() != Some(&folder) {
            self.folders.retain(|other| *other != folder);
            self.folders.push_back(folder);
        }
    }

    /// Somebody asks for the begin of `ino`. Returns whether there is something to give.
    pub fn asked(&mut self, ino: Ino) -> bool {
        let Some((folder, index)) = self.places.get(&ino).copied() else { return false };
        let Some(list) = self.lists.get_mut(&folder) else { return false };
        let goes_on = self.window > 0 || list.next > 0;
        let in_order = goes_on && index >= list.asked && index <= list.next + SLACK;
        let left_out = index.saturating_sub(list.next);
        (list.asked, list.known) = (index + 1, list.files.len());
        if !in_order {
            list.next = index + 1;
            self.window /= 2;
            self.left = self.left.min(self.window);
            self.put_on_top(folder);
            return false;
        }
        let is_late = self.busy.is_some_and(|busy| busy.folder == folder && busy.index <= index) || index >= list.next;
        self.lead = if is_late { (self.lead + 1).min(LEAD) } else { self.lead.saturating_sub(1) };
        if is_late {
            list.next = list.next.max(index + 1 + self.lead);
        }
        self.window = if left_out == 0 { (self.window * 2).clamp(FIRST, LAST) } else { self.window / 2 };
        (self.left, self.left_bytes, self.probe_in) = (self.window, AHEAD_BYTES, self.window / 2);
        self.put_on_top(folder);
        self.left > 0
    }

    /// The next file to give, if it is time; [`Order::given`] tells when that is done.
    pub fn take(&mut self) -> Option<Listed> {
        while self.left > 0 {
            let (folder, list) = self.current()?;
            // Whoever has just listed it is at the first already.
            list.next = list.next.max(1);
            if list.next >= list.known {
                continue;
            }
            let index = list.next;
            let ino = list.files[index];
            list.next += 1;
            if self.probe_in == 0 {
                self.probe_in = self.window;
                continue;
            }
            self.probe_in -= 1;
            self.left -= 1;
            self.busy = Some(Listed { ino, folder, index });
            return self.busy;
        }
        None
    }

    /// The folder to go on with: that which was listed or read from last, or those that were left in the midst for it.
    fn current(&mut self) -> Option<(Ino, &mut List)> {
        let is_left = |place: usize, list: &List| (place == 0 || list.next > 0) && list.next < list.known;
        let lists = &mut self.lists;
        let mut folders = self.folders.iter().rev().take(SLACK).enumerate();
        let (_, folder) =
            folders.find(|(place, folder)| lists.get(folder).is_some_and(|list| is_left(*place, list)))?;
        lists.get_mut(folder).map(|list| (*folder, list))
    }

    /// Whether something is being given, or is to be.
    #[cfg(test)]
    pub fn is_giving(&mut self) -> bool {
        self.busy.is_some() || (self.left > 0 && self.current().is_some_and(|(_, list)| list.next.max(1) < list.known))
    }

    /// Whether `listed` is still of use: nobody has come to it meanwhile.
    pub fn is_wanted(&self, listed: Listed) -> bool {
        self.lists.get(&listed.folder).is_some_and(|list| listed.index >= list.asked)
    }

    /// What was taken has been given, or not, with so many bytes.
    pub fn given(&mut self, bytes: u64) {
        self.busy = None;
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
        if self.left_bytes == 0 {
            self.left = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(files: std::ops::Range<u64>) -> Order {
        let mut order = Order::default();
        let files: Vec<Ino> = files.map(Ino).collect();
        assert!(!order.listed(Ino(1), true, &files));
        order
    }

    fn take_all(order: &mut Order) -> Vec<u64> {
        let mut all = Vec::new();
        while let Some(listed) = order.take() {
            all.push(listed.ino.0);
            order.given(1);
        }
        all
    }

    #[test]
    fn what_follows_in_the_listing_is_given_but_for_a_probe() {
        let mut order = order(100..400);
        assert!(!order.asked(Ino(200)) && order.take().is_none(), "one read is no order");
        assert!(order.asked(Ino(201)));
        let given = take_all(&mut order);
        assert!(given.len() == FIRST as usize && given[0] > 201, "{given:?}");
        let probe = (given[0]..).find(|ino| !given.contains(ino)).unwrap();
        assert!(probe < *given.last().unwrap(), "{given:?}");
        assert!(order.asked(Ino(probe)), "the probe was asked for");
        let more = take_all(&mut order);
        assert!(more.len() == 2 * FIRST as usize && more[0] == given.last().unwrap() + 1, "{more:?}");
    }

    #[test]
    fn nothing_more_is_given_to_who_turns_elsewhere() {
        let mut order = order(100..400);
        order.asked(Ino(100));
        order.asked(Ino(101));
        take_all(&mut order);
        for ino in [300, 200, 150, 120, 390, 180] {
            order.asked(Ino(ino));
        }
        assert!(take_all(&mut order).is_empty() && order.window == 0);
    }

    #[test]
    fn a_walk_goes_on_in_the_next_folder_and_comes_back() {
        let mut order = order(100..110);
        order.asked(Ino(100));
        order.asked(Ino(101));
        take_all(&mut order);
        order.asked(Ino(109));
        let files: Vec<Ino> = (200..203).map(Ino).collect();
        assert!(!order.listed(Ino(2), true, &files), "the kernel doesn't know them yet");
        assert!(take_all(&mut order).is_empty());
        assert!(order.listed(Ino(2), false, &[]), "without being asked for");
        assert_eq!(take_all(&mut order), [201, 202]);
        order.listed(Ino(1), true, &files);
        assert_eq!((order.places.len(), order.files), (3, 6), "they have other names there");
    }

    #[test]
    fn a_reader_who_is_faster_is_left_behind_no_work() {
        let mut order = order(100..400);
        order.asked(Ino(100));
        order.asked(Ino(101));
        let listed = order.take().unwrap();
        assert!(order.is_wanted(listed));
        order.asked(listed.ino);
        assert!(!order.is_wanted(listed));
        order.given(0);
        assert!(order.take().unwrap().ino.0 > listed.ino.0 + 1);
    }

    #[test]
    fn bytes_are_bounded_and_old_listings_forgotten() {
        let mut order = order(100..400);
        order.asked(Ino(100));
        order.asked(Ino(101));
        order.take().unwrap();
        order.given(AHEAD_BYTES);
        assert!(order.take().is_none());
        for folder in 2..100 {
            let files: Vec<Ino> = (0..1000).map(|file| Ino(folder * 1000 + file)).collect();
            order.listed(Ino(folder), true, &files);
            order.listed(Ino(folder), false, &files);
        }
        assert!(
            order.places.len() <= LISTED_MAX && order.files <= LISTED_MAX && order.lists.len() == order.folders.len()
        );
        let huge: Vec<Ino> = (1_000_000..1_100_000).map(Ino).collect();
        order.listed(Ino(1), true, &huge);
        assert_eq!((order.places.len(), order.lists.len()), (LISTED_MAX, 1));
    }
}
