//! Both machines together, with every step, delivery and answer in any order that the drivers could produce.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use layerfs::chunk::{Class, Codec, StoredChunk};
use layerfs::{ChunkId, LayerId, LayerName};
use proptest::prelude::*;

use super::{Receiver, ReceiverStep, Sender, SenderStep, Violation};
use crate::plan::Candidate;
use crate::wire::{Bundle, MAX_ASK, Message, Offer, OfferedLayer};

fn id(number: u32) -> ChunkId {
    ChunkId::of(&number.to_le_bytes())
}

fn chunk(id: ChunkId) -> StoredChunk {
    StoredChunk { id, class: Class::Data, codec: Codec::Raw, plain_bytes: 1, stored: Bytes::from_static(b"x") }
}

fn offer(layers: usize, hints: usize) -> Offer {
    let layer = |n: usize| LayerId(id(1_000_000 + n as u32));
    Offer {
        force: false,
        lazy: false,
        dry_run: false,
        layers: (0..layers).map(|n| OfferedLayer { id: layer(n), file_bytes: 1 }).collect(),
        names: vec![(LayerName::new("name").unwrap(), layers as u16 - 1)],
        hints: (0..hints).map(|n| layer(layers + n)).collect(),
    }
}

/// Two machines, what is on its way between them, and what their drivers have still to do.
struct World {
    sender: Sender,
    receiver: Receiver,
    to_receiver: VecDeque<Message>,
    to_sender: VecDeque<Message>,
    /// What the layers consist of, in the order in which the planner finds it.
    planned: Option<VecDeque<u32>>,
    contents: Vec<u32>,
    to_read: VecDeque<SenderJob>,
    to_check: VecDeque<Vec<ChunkId>>,
    to_check_offer: Option<Offer>,
    to_store: VecDeque<Vec<StoredChunk>>,
    to_open: VecDeque<Bundle>,
    ahead: HashSet<ChunkId>,
    asked: HashSet<ChunkId>,
    lacks: bool,
    stored: HashSet<ChunkId>,
    to_commit: bool,
    named: bool,
    sender_is_done: bool,
    receiver_is_done: bool,
}

enum SenderJob {
    Chunks(Vec<Candidate>),
    End(Message),
}

impl World {
    fn new(contents: Vec<u32>, there: &[u32], lacks: bool) -> World {
        let (sender, SenderStep::Send(first)) = Sender::new(offer(2, 1)) else { panic!("an offer comes first") };
        World {
            sender,
            receiver: Receiver::default(),
            to_receiver: [first].into(),
            to_sender: VecDeque::new(),
            planned: None,
            contents,
            to_read: VecDeque::new(),
            to_check: VecDeque::new(),
            to_check_offer: None,
            to_store: VecDeque::new(),
            to_open: VecDeque::new(),
            ahead: HashSet::new(),
            asked: HashSet::new(),
            lacks,
            stored: there.iter().map(|n| id(*n)).collect(),
            to_commit: false,
            named: false,
            sender_is_done: false,
            receiver_is_done: false,
        }
    }

    /// Does the `choice`th of the things that could happen next. Returns whether there was one.
    fn step(&mut self, choice: usize) -> Result<bool, Violation> {
        type Action = fn(&mut World) -> Result<(), Violation>;
        let mut actions: Vec<Action> = Vec::new();
        let mut may = |possible: bool, action: Action| possible.then(|| actions.push(action));
        may(!self.to_receiver.is_empty(), World::deliver_to_receiver);
        may(!self.to_sender.is_empty(), World::deliver_to_sender);
        may(self.planned.is_some() && self.sender.may_ask(), World::plan);
        may(!self.to_read.is_empty(), World::read);
        may(!self.to_check.is_empty(), World::check);
        may(self.to_check_offer.is_some(), World::check_offer);
        may(!self.to_store.is_empty(), World::store);
        may(!self.to_open.is_empty(), World::open);
        // The driver commits only once everything is stored.
        may(self.to_commit && self.to_store.is_empty(), World::commit);
        match actions.len() {
            0 => Ok(false),
            count => actions[choice % count](self).map(|()| true),
        }
    }

    fn deliver_to_receiver(&mut self) -> Result<(), Violation> {
        let Some(message) = self.to_receiver.pop_front() else { return Ok(()) };
        let steps = self.receiver.on_message(message)?;
        self.do_receiver(steps);
        Ok(())
    }

    fn deliver_to_sender(&mut self) -> Result<(), Violation> {
        let Some(message) = self.to_sender.pop_front() else { return Ok(()) };
        let steps = self.sender.on_message(message)?;
        self.do_sender(steps);
        Ok(())
    }

    fn plan(&mut self) -> Result<(), Violation> {
        let Some(planned) = &mut self.planned else { return Ok(()) };
        let batch: Vec<Candidate> = planned.drain(..planned.len().min(7)).map(|n| Candidate::new(id(n), 1)).collect();
        let steps = if batch.is_empty() {
            self.planned = None;
            self.sender.plan_finished()
        } else if batch[0].id.0[0].is_multiple_of(4) && batch.iter().all(|one| !self.asked.contains(&one.id)) {
            // A planner doesn't do both with one chunk.
            self.ahead.extend(batch.iter().map(|candidate| candidate.id));
            vec![self.sender.send_ahead(batch)]
        } else {
            let batch: Vec<_> = batch.into_iter().filter(|one| !self.ahead.contains(&one.id)).collect();
            self.asked.extend(batch.iter().map(|candidate| candidate.id));
            if batch.is_empty() { Vec::new() } else { vec![self.sender.ask(batch)] }
        };
        self.do_sender(steps);
        Ok(())
    }

    fn read(&mut self) -> Result<(), Violation> {
        match self.to_read.pop_front() {
            Some(SenderJob::Chunks(chunks)) => {
                for few in chunks.chunks(3) {
                    let message = self.packed(few);
                    self.to_receiver.push_back(message);
                    self.sender.sent(few.len());
                }
            }
            Some(SenderJob::End(message)) => self.to_receiver.push_back(message),
            None => {}
        }
        Ok(())
    }

    /// Unasked chunks go in bundles only, others either way.
    fn packed(&mut self, chunks: &[Candidate]) -> Message {
        if !self.ahead.contains(&chunks[0].id) && chunks[0].id.0[1].is_multiple_of(2) {
            return Message::Chunks(chunks.iter().map(|candidate| chunk(candidate.id)).collect());
        }
        bundle_of(chunks)
    }

    fn open(&mut self) -> Result<(), Violation> {
        let Some(bundle) = self.to_open.pop_front() else { return Ok(()) };
        let ids = ids_of(&bundle);
        self.stored.extend(&ids);
        let steps = self.receiver.opened(ids)?;
        self.do_receiver(steps);
        Ok(())
    }

    fn check(&mut self) -> Result<(), Violation> {
        let Some(ids) = self.to_check.pop_front() else { return Ok(()) };
        let present: Vec<bool> = ids.iter().map(|id| self.stored.contains(id)).collect();
        let steps = self.receiver.have_checked(&present);
        self.do_receiver(steps);
        Ok(())
    }

    fn check_offer(&mut self) -> Result<(), Violation> {
        let Some(offer) = self.to_check_offer.take() else { return Ok(()) };
        let steps = self.receiver.offer_checked(vec![self.lacks; offer.layers.len()], vec![true; offer.hints.len()]);
        self.do_receiver(steps);
        Ok(())
    }

    fn store(&mut self) -> Result<(), Violation> {
        let Some(chunks) = self.to_store.pop_front() else { return Ok(()) };
        self.stored.extend(chunks.iter().map(|chunk| chunk.id));
        Ok(())
    }

    fn commit(&mut self) -> Result<(), Violation> {
        self.to_commit = false;
        // The driver verifies before it names.
        if self.lacks && !self.contents.iter().all(|n| self.stored.contains(&id(*n))) {
            return Err(Violation("not whole".to_owned()));
        }
        self.named = true;
        let steps = self.receiver.committed(1);
        self.do_receiver(steps);
        Ok(())
    }

    fn do_sender(&mut self, steps: Vec<SenderStep>) {
        for step in steps {
            match step {
                SenderStep::Send(message @ Message::End { .. }) => self.to_read.push_back(SenderJob::End(message)),
                SenderStep::Send(message) => self.to_receiver.push_back(message),
                SenderStep::Plan { .. } => self.planned = Some(self.contents.iter().copied().collect()),
                SenderStep::SendChunks(chunks) => self.to_read.push_back(SenderJob::Chunks(chunks)),
                SenderStep::Reused { .. } => {}
                SenderStep::Finish { .. } => self.sender_is_done = true,
            }
        }
    }

    fn do_receiver(&mut self, steps: Vec<ReceiverStep>) {
        for step in steps {
            match step {
                ReceiverStep::Send(message) => self.to_sender.push_back(message),
                ReceiverStep::CheckOffer(offer) => self.to_check_offer = Some(offer),
                ReceiverStep::CheckHave(ids) => self.to_check.push_back(ids),
                ReceiverStep::Store(chunks) => self.to_store.push_back(chunks),
                ReceiverStep::Open(bundle) => self.to_open.push_back(bundle),
                ReceiverStep::Commit => self.to_commit = true,
                ReceiverStep::Finish => self.receiver_is_done = true,
            }
        }
    }
}

/// How many times the link's delay a transfer takes if nothing else takes time, from Offer to Done: each message leaves
/// at the moment at which what caused it arrived. `asked` and `ahead` are what the planner finds.
fn delays(asked: u32, ahead: u32) -> u32 {
    let (mut sender, SenderStep::Send(first)) = Sender::new(offer(2, 1)) else { panic!("an offer comes first") };
    let mut receiver = Receiver::default();
    let mut way: VecDeque<(u32, bool, Message)> = [(0, true, first)].into();
    let mut planned: VecDeque<u32> = VecDeque::new();
    let mut now = 0;
    // The earliest first, as they arrive.
    while let Some(at) = (0..way.len()).min_by_key(|at| way[*at].0) {
        let (sent_at, to_receiver, message) = way.remove(at).unwrap();
        now = sent_at + 1;
        if to_receiver {
            let mut steps = VecDeque::from(receiver.on_message(message).unwrap());
            while let Some(step) = steps.pop_front() {
                match step {
                    ReceiverStep::Send(message) => way.push_back((now, false, message)),
                    ReceiverStep::CheckOffer(offer) => {
                        steps.extend(receiver.offer_checked(vec![true; offer.layers.len()], vec![true]));
                    }
                    ReceiverStep::CheckHave(ids) => steps.extend(receiver.have_checked(&vec![false; ids.len()])),
                    ReceiverStep::Open(bundle) => steps.extend(receiver.opened(ids_of(&bundle)).unwrap()),
                    ReceiverStep::Commit => steps.extend(receiver.committed(1)),
                    ReceiverStep::Store(_) | ReceiverStep::Finish => {}
                }
            }
            continue;
        }
        let mut steps = VecDeque::from(sender.on_message(message).unwrap());
        loop {
            while let Some(step) = steps.pop_front() {
                match step {
                    SenderStep::Send(message) => way.push_back((now, true, message)),
                    SenderStep::Plan { .. } => planned = (0..asked + ahead).collect(),
                    SenderStep::SendChunks(chunks) => {
                        sender.sent(chunks.len());
                        way.push_back((now, true, bundle_of(&chunks)));
                    }
                    SenderStep::Reused { .. } | SenderStep::Finish { .. } => {}
                }
            }
            if planned.is_empty() || !sender.may_ask() {
                break;
            }
            let is_ahead = planned[0] >= asked;
            let end = planned.iter().take(MAX_ASK).take_while(|n| (**n >= asked) == is_ahead).count();
            let batch = planned.drain(..end).map(|n| Candidate::new(id(n), 1)).collect();
            steps.push_back(if is_ahead { sender.send_ahead(batch) } else { sender.ask(batch) });
            if planned.is_empty() {
                steps.extend(sender.plan_finished());
            }
        }
    }
    now
}

#[test]
fn a_small_change_takes_three_round_trips_or_two() {
    // Manifest, tables and lists are planned at the sender alone: how deep they are makes no difference.
    for asked in [1, 100, 5000, Sender::WINDOW as u32 - MAX_ASK as u32] {
        assert_eq!(delays(asked, 50), 6, "{asked} chunks asked for");
    }
    // What takes the place of something held isn't asked for.
    assert_eq!(delays(0, 2000), 4);
}

fn ids_of(bundle: &Bundle) -> Vec<ChunkId> {
    bundle.frame.chunks_exact(32).map(|id| ChunkId(id.try_into().unwrap())).collect()
}

/// The frame stands for the ids, which the real one would hash to.
fn bundle_of(chunks: &[Candidate]) -> Message {
    let frame: Vec<u8> = chunks.iter().flat_map(|candidate| candidate.id.0).collect();
    Message::Bundle(bundle(chunks.len(), frame))
}

fn bundle(chunks: usize, frame: Vec<u8>) -> Bundle {
    Bundle {
        bases: Vec::new(),
        pages: Vec::new(),
        first: None,
        chunks: chunks as u16,
        plain_bytes: 1,
        frame: frame.into(),
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    let ids = || prop::collection::vec((0u32..20).prop_map(id), 1..5);
    prop_oneof![
        Just(Message::Alive),
        Just(Message::Offer(offer(2, 1))),
        (0usize..4, 0usize..3).prop_map(|(a, b)| Message::Need { lacking: vec![true; a], held: vec![true; b] }),
        (0u32..3, ids()).prop_map(|(seq, ids)| Message::Ask { seq, ids }),
        (0u32..3, 0usize..5).prop_map(|(seq, count)| Message::Want { seq, wanted: vec![true; count] }),
        ids().prop_map(|ids| Message::Chunks(ids.into_iter().map(chunk).collect())),
        ids().prop_map(|ids| Message::Bundle(bundle(ids.len(), ids.iter().flat_map(|id| id.0).collect()))),
        (0u64..4).prop_map(|chunks| Message::End { chunks }),
        Just(Message::Done { changed: 1 }),
        Just(Message::Fetch { names: vec![LayerName::new("x").unwrap()], dry_run: false }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the order of things, a transfer ends with everything there, on both sides.
    #[test]
    fn every_interleaving_ends_well(
        contents in prop::collection::vec(0u32..60, 1..80),
        there in prop::collection::vec(0u32..60, 0..30),
        lacks in prop::bool::weighted(0.9),
        choices in prop::collection::vec(any::<usize>(), 1..50),
    ) {
        let mut world = World::new(contents, &there, lacks);
        for choice in choices.iter().cycle().take(5000) {
            prop_assert!(world.step(*choice).is_ok());
        }
        while world.step(0).unwrap() {}
        prop_assert!(world.sender_is_done && world.receiver_is_done && world.named);
    }

    /// Whatever the other side says, and whenever, it is understood or refused; nothing is named that isn't whole.
    #[test]
    fn a_wild_peer_is_refused(
        messages in prop::collection::vec((any_message(), any::<bool>(), any::<usize>()), 1..60),
    ) {
        let mut world = World::new(vec![1, 2, 3, 40], &[2], true);
        for (message, to_receiver, choice) in messages {
            if to_receiver { world.to_receiver.push_back(message) } else { world.to_sender.push_back(message) }
            if world.step(choice).is_err() {
                break;
            }
        }
    }
}

#[test]
fn a_chunk_that_was_not_wanted_is_refused() {
    let mut receiver = Receiver::default();
    receiver.on_message(Message::Offer(offer(1, 0))).unwrap();
    receiver.offer_checked(vec![true], vec![]);
    assert!(receiver.on_message(Message::Chunks(vec![chunk(id(1))])).is_err());
}

#[test]
fn the_end_waits_for_open_bundles() {
    let mut receiver = Receiver::default();
    receiver.on_message(Message::Offer(offer(1, 0))).unwrap();
    receiver.offer_checked(vec![true], vec![]);
    let bundle = bundle(1, b"x".to_vec());
    receiver.on_message(Message::Bundle(bundle.clone())).unwrap();
    assert_eq!(receiver.on_message(Message::End { chunks: 1 }), Ok(Vec::new()));
    assert!(receiver.on_message(Message::Bundle(bundle)).is_err());
    assert_eq!(receiver.opened([id(1)]), Ok(vec![ReceiverStep::Commit]));
}

#[test]
fn a_dry_run_goes_as_a_real_one_but_nothing_comes() {
    let mut receiver = Receiver::default();
    receiver.on_message(Message::Offer(Offer { dry_run: true, ..offer(1, 0) })).unwrap();
    receiver.offer_checked(vec![true], vec![]);
    let ids: Vec<ChunkId> = (0..MAX_ASK as u32).map(id).collect();
    // More than could be outstanding.
    for seq in 0..100 {
        receiver.on_message(Message::Ask { seq, ids: ids.clone() }).unwrap();
        receiver.have_checked(&vec![false; MAX_ASK]);
    }
    let mut cheating = receiver.clone();
    assert!(cheating.on_message(Message::Chunks(vec![chunk(id(1))])).is_err());
    assert_eq!(receiver.on_message(Message::End { chunks: 12_345 }), Ok(vec![ReceiverStep::Commit]));
    assert_eq!(receiver.would_send(), Some(12_345));
}

#[test]
fn too_many_outstanding_asks_are_refused() {
    let mut receiver = Receiver::default();
    receiver.on_message(Message::Offer(offer(1, 0))).unwrap();
    receiver.offer_checked(vec![true], vec![]);
    let ask = |seq: u32| Message::Ask { seq, ids: (0..MAX_ASK as u32).map(|n| id(seq << 16 | n)).collect() };
    assert!((0..64).all(|seq| receiver.on_message(ask(seq)).is_ok()));
    assert!(receiver.on_message(ask(64)).is_err());
}

#[test]
fn the_end_comes_only_after_everything_wanted() {
    let mut receiver = Receiver::default();
    receiver.on_message(Message::Offer(offer(1, 0))).unwrap();
    receiver.offer_checked(vec![true], vec![]);
    receiver.on_message(Message::Ask { seq: 0, ids: vec![id(1)] }).unwrap();
    receiver.have_checked(&[false]);
    assert!(receiver.on_message(Message::End { chunks: 0 }).is_err());
}
