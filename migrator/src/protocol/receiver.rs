//! The receiving side: answer the offer, want what is lacking, store it, verify, name.
//!
//! Invariants: of chunks that come by their ids only those that were wanted are taken, each once; bundles, whose chunks'
//! ids show when they are opened, may hold others (the peer may fill the disk anyway); nothing is named before everything
//! that was wanted has come; the names are the last step but one.

use std::collections::{HashSet, VecDeque};

use layerfs::ChunkId;
use layerfs::chunk::StoredChunk;

use super::Violation;
use crate::wire::{Bundle, MAX_ASK, MAX_OUTSTANDING, Message, Offer};

/// What the driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverStep {
    /// Send this message.
    Send(Message),
    /// See which layers and hints are held and which names are free, then call [`Receiver::offer_checked`].
    CheckOffer(Offer),
    /// See which of these chunks are there, then call [`Receiver::have_checked`]. One at a time, in order.
    CheckHave(Vec<ChunkId>),
    /// Verify these chunks and store them.
    Store(Vec<StoredChunk>),
    /// Open this bundle, verify and store its chunks, and call [`Receiver::opened`] with their ids.
    Open(Bundle),
    /// When everything is stored: make it durable, verify the lacking layers whole, set the names, then call
    /// [`Receiver::committed`].
    Commit,
    /// The transfer is complete.
    Finish,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    AwaitOffer,
    CheckingOffer,
    Receiving,
    Committing,
    Finished,
}

/// The receiving side of one transfer.
#[derive(Clone, Debug)]
pub struct Receiver {
    state: State,
    next_seq: u32,
    /// Asks that are being checked, in order.
    checking: VecDeque<(u32, Vec<ChunkId>)>,
    checking_ids: usize,
    /// Wanted and not come.
    awaited: HashSet<ChunkId>,
    received: u64,
    /// Nothing is to come.
    is_dry: bool,
    /// What the sender of a dry run says that it would have sent, in bytes.
    would_send: Option<u64>,
    /// Bundles that are being opened.
    opening: usize,
    /// The sender's count, if it has said End before all bundles were open, or before all had come.
    ended: Option<u64>,
    /// Several connections bring chunks: some may come after the end was announced.
    is_grouped: bool,
}

impl Default for Receiver {
    fn default() -> Receiver {
        Receiver {
            state: State::AwaitOffer,
            next_seq: 0,
            checking: VecDeque::new(),
            checking_ids: 0,
            awaited: HashSet::new(),
            received: 0,
            is_dry: false,
            would_send: None,
            opening: 0,
            ended: None,
            is_grouped: false,
        }
    }
}

impl Receiver {
    /// Chunks may come over several connections.
    pub fn expect_several_connections(&mut self) {
        self.is_grouped = true;
    }

    /// A message came.
    ///
    /// # Errors
    /// [`Violation`] if it may not come now; the transfer is over then.
    pub fn on_message(&mut self, message: Message) -> Result<Vec<ReceiverStep>, Violation> {
        match (message, &self.state) {
            (Message::Alive, _) => Ok(Vec::new()),
            (Message::Offer(offer), State::AwaitOffer) => {
                self.state = State::CheckingOffer;
                self.is_dry = offer.dry_run;
                Ok(vec![ReceiverStep::CheckOffer(offer)])
            }
            (other, State::Receiving) if self.ended.is_some() && !(self.is_grouped && other.is_bulk()) => {
                Err(Violation(format!("{} after End", other.kind())))
            }
            (Message::Ask { seq, ids }, State::Receiving) => self.on_ask(seq, ids),
            (Message::Chunks(_) | Message::Bundle(_), State::Receiving) if self.is_dry => {
                Err(Violation("chunks in a dry run".to_owned()))
            }
            (Message::End { chunks }, State::Receiving) if self.is_dry && self.checking.is_empty() => {
                self.would_send = Some(chunks);
                self.state = State::Committing;
                Ok(vec![ReceiverStep::Commit])
            }
            (Message::Chunks(chunks), State::Receiving) => self.on_chunks(chunks),
            (Message::Bundle(bundle), State::Receiving) => {
                self.opening += 1;
                self.received += u64::from(bundle.chunks);
                Ok(vec![ReceiverStep::Open(bundle)])
            }
            (Message::End { chunks }, State::Receiving) => {
                self.ended = Some(chunks);
                self.end_if_through()
            }
            (other, state) => Err(Violation::unexpected(other.kind(), state.name())),
        }
    }

    /// The offer was checked. With nothing lacking the transfer goes straight to its end.
    pub fn offer_checked(&mut self, lacking: Vec<bool>, held: Vec<bool>) -> Vec<ReceiverStep> {
        debug_assert_eq!(self.state, State::CheckingOffer);
        if lacking.contains(&true) {
            self.state = State::Receiving;
            vec![ReceiverStep::Send(Message::Need { lacking, held })]
        } else {
            self.state = State::Committing;
            vec![ReceiverStep::Commit]
        }
    }

    fn on_ask(&mut self, seq: u32, ids: Vec<ChunkId>) -> Result<Vec<ReceiverStep>, Violation> {
        if seq != self.next_seq {
            return Err(Violation(format!("Ask {seq} instead of {}", self.next_seq)));
        }
        if ids.len() > MAX_ASK || self.awaited.len() + self.checking_ids + ids.len() > MAX_OUTSTANDING {
            return Err(Violation(format!("more than {MAX_OUTSTANDING} chunks outstanding")));
        }
        self.next_seq = seq.wrapping_add(1);
        self.checking_ids += ids.len();
        self.checking.push_back((seq, ids.clone()));
        Ok(vec![ReceiverStep::CheckHave(ids)])
    }

    /// The oldest unanswered ask was checked: for each id, whether it is there.
    pub fn have_checked(&mut self, present: &[bool]) -> Vec<ReceiverStep> {
        let Some((seq, ids)) = self.checking.pop_front() else {
            debug_assert!(false, "no ask is being checked");
            return Vec::new();
        };
        self.checking_ids -= ids.len();
        let want = |(id, present): (ChunkId, &bool)| !*present && (self.is_dry || self.awaited.insert(id));
        let wanted = ids.into_iter().zip(present).map(want).collect();
        vec![ReceiverStep::Send(Message::Want { seq, wanted })]
    }

    fn on_chunks(&mut self, chunks: Vec<StoredChunk>) -> Result<Vec<ReceiverStep>, Violation> {
        if let Some(chunk) = chunks.iter().find(|chunk| !self.awaited.remove(&chunk.id)) {
            return Err(Violation(format!("chunk {} was not wanted", chunk.id)));
        }
        self.received += chunks.len() as u64;
        let mut steps = vec![ReceiverStep::Store(chunks)];
        steps.extend(self.end_if_through()?);
        Ok(steps)
    }

    /// A bundle was opened: these are its chunks.
    ///
    /// # Errors
    /// [`Violation`] if it was the last, and something that was wanted has not come.
    pub fn opened(&mut self, ids: impl IntoIterator<Item = ChunkId>) -> Result<Vec<ReceiverStep>, Violation> {
        debug_assert!(self.opening > 0);
        for id in ids {
            self.awaited.remove(&id);
        }
        self.opening = self.opening.saturating_sub(1);
        self.end_if_through()
    }

    /// Once the end was announced and everything has come and is open.
    fn end_if_through(&mut self) -> Result<Vec<ReceiverStep>, Violation> {
        match self.ended {
            Some(chunks) if self.opening == 0 && !(self.is_grouped && self.received < chunks) => self.on_end(chunks),
            _ => Ok(Vec::new()),
        }
    }

    fn on_end(&mut self, chunks: u64) -> Result<Vec<ReceiverStep>, Violation> {
        if chunks != self.received || !self.awaited.is_empty() || !self.checking.is_empty() {
            let missing = self.awaited.len();
            return Err(Violation(format!("End after {} of {chunks} chunks, {missing} still awaited", self.received)));
        }
        self.state = State::Committing;
        Ok(vec![ReceiverStep::Commit])
    }

    /// The names are set, durably.
    pub fn committed(&mut self, changed: u16) -> Vec<ReceiverStep> {
        debug_assert_eq!(self.state, State::Committing);
        self.state = State::Finished;
        vec![ReceiverStep::Send(Message::Done { changed }), ReceiverStep::Finish]
    }

    /// Whether the sender has said End and nothing is on its way any more.
    pub fn has_all_come(&self) -> bool {
        self.ended.is_some_and(|chunks| !(self.is_grouped && self.received < chunks))
    }

    /// How many chunks were wanted and haven't come.
    pub fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// How many bytes the sender of a dry run would have sent, once it has said so.
    pub fn would_send(&self) -> Option<u64> {
        self.would_send
    }

    /// How many chunks have come.
    pub fn received(&self) -> u64 {
        self.received
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::AwaitOffer => "an offer is awaited",
            State::CheckingOffer => "an offer is being checked",
            State::Receiving => "chunks are being received",
            State::Committing => "the layers are being verified",
            State::Finished => "the transfer is over",
        }
    }
}
