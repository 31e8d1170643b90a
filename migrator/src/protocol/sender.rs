//! The sending side: offer, ask, send what is wanted, end.
//!
//! Invariants: asks are answered in their order; what is asked for and not yet sent stays within the window; End goes
//! out once, after every wanted chunk.

use std::collections::VecDeque;

use super::Violation;
use crate::plan::Candidate;
use crate::wire::{MAX_ASK, MAX_OUTSTANDING, Message, Offer};

/// What the driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderStep {
    /// Send this message.
    Send(Message),
    /// Work out the ids to ask for: those of the lacking layers that the held ones don't have. The booleans are for
    /// the offer's layers and hints.
    Plan {
        /// For each offered layer, whether the receiver lacks it.
        lacking: Vec<bool>,
        /// For each hint, whether the receiver has it.
        held: Vec<bool>,
    },
    /// Read these chunks and send them, before any later step. Tell [`Sender::sent`] when they are on their way.
    SendChunks(Vec<Candidate>),
    /// An ask was answered: so many of its chunks are there already, with so many plain bytes as far as known.
    Reused {
        /// Chunks.
        chunks: usize,
        /// Their plain bytes.
        bytes: u64,
    },
    /// The transfer is complete, with so many names changed.
    Finish {
        /// How many names the receiver changed.
        changed: u16,
    },
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    AwaitNeed,
    Sending,
    AwaitDone,
    Finished,
}

/// The sending side of one transfer.
#[derive(Debug)]
pub struct Sender {
    state: State,
    offered_layers: usize,
    offered_hints: usize,
    next_seq: u32,
    /// Asked and not answered, in order.
    asked: VecDeque<(u32, Vec<Candidate>)>,
    /// Asked or wanted, and not sent.
    outstanding: usize,
    window: usize,
    planned: bool,
    chunks_sent: u64,
}

impl Sender {
    /// The most ids that this side has outstanding; the protocol allows [`MAX_OUTSTANDING`].
    pub const WINDOW: usize = MAX_OUTSTANDING / 4;

    /// A transfer of `offer`, and its first step.
    pub fn new(offer: Offer) -> (Sender, SenderStep) {
        let sender = Sender {
            state: State::AwaitNeed,
            offered_layers: offer.layers.len(),
            offered_hints: offer.hints.len(),
            next_seq: 0,
            asked: VecDeque::new(),
            outstanding: 0,
            window: Sender::WINDOW,
            planned: false,
            chunks_sent: 0,
        };
        (sender, SenderStep::Send(Message::Offer(offer)))
    }

    /// A message came.
    ///
    /// # Errors
    /// [`Violation`] if it may not come now; the transfer is over then.
    pub fn on_message(&mut self, message: Message) -> Result<Vec<SenderStep>, Violation> {
        match (message, &self.state) {
            (Message::Alive, _) => Ok(Vec::new()),
            (Message::Need { lacking, held }, State::AwaitNeed) => self.on_need(lacking, held),
            (Message::Done { changed }, State::AwaitNeed | State::AwaitDone) => {
                self.state = State::Finished;
                Ok(vec![SenderStep::Finish { changed }])
            }
            (Message::Want { seq, wanted }, State::Sending) => self.on_want(seq, &wanted),
            (other, state) => Err(Violation::unexpected(other.kind(), state.name())),
        }
    }

    fn on_need(&mut self, lacking: Vec<bool>, held: Vec<bool>) -> Result<Vec<SenderStep>, Violation> {
        if lacking.len() != self.offered_layers || held.len() != self.offered_hints {
            return Err(Violation(format!("Need of {} layers and {} hints", lacking.len(), held.len())));
        }
        if !lacking.contains(&true) {
            return Err(Violation("Need that lacks nothing".to_owned()));
        }
        self.state = State::Sending;
        Ok(vec![SenderStep::Plan { lacking, held }])
    }

    fn on_want(&mut self, seq: u32, wanted: &[bool]) -> Result<Vec<SenderStep>, Violation> {
        let Some((expected, ids)) = self.asked.pop_front() else {
            return Err(Violation(format!("Want {seq} of an ask that never was")));
        };
        if seq != expected || wanted.len() != ids.len() {
            return Err(Violation(format!("Want {seq} of {} ids; Ask {expected} had {}", wanted.len(), ids.len())));
        }
        let (send, reuse): (Vec<_>, Vec<_>) = ids.into_iter().zip(wanted).partition(|(_, wanted)| **wanted);
        self.outstanding -= reuse.len();
        self.chunks_sent += send.len() as u64;
        let mut steps = Vec::new();
        if !reuse.is_empty() {
            let bytes = reuse.iter().map(|(candidate, _)| u64::from(candidate.bytes)).sum();
            steps.push(SenderStep::Reused { chunks: reuse.len(), bytes });
        }
        if !send.is_empty() {
            steps.push(SenderStep::SendChunks(send.into_iter().map(|(candidate, _)| candidate).collect()));
        }
        steps.extend(self.end_if_through());
        Ok(steps)
    }

    /// Whether [`Sender::ask`] may be called now.
    pub fn may_ask(&self) -> bool {
        self.state == State::Sending && !self.planned && self.outstanding + MAX_ASK <= self.window
    }

    /// Asks for 1 to [`MAX_ASK`] chunks. Only while [`Sender::may_ask`].
    pub fn ask(&mut self, candidates: Vec<Candidate>) -> SenderStep {
        debug_assert!(self.may_ask() && !candidates.is_empty() && candidates.len() <= MAX_ASK);
        let seq = self.next_seq;
        self.next_seq = seq.wrapping_add(1);
        let ids = candidates.iter().map(|candidate| candidate.id).collect();
        self.outstanding += candidates.len();
        self.asked.push_back((seq, candidates));
        SenderStep::Send(Message::Ask { seq, ids })
    }

    /// Sends chunks that the receiver surely lacks, unasked. Only while [`Sender::may_ask`].
    pub fn send_ahead(&mut self, candidates: Vec<Candidate>) -> SenderStep {
        debug_assert!(self.may_ask() && !candidates.is_empty() && candidates.len() <= MAX_ASK);
        self.outstanding += candidates.len();
        self.chunks_sent += candidates.len() as u64;
        SenderStep::SendChunks(candidates)
    }

    /// Nothing more is to be asked for.
    pub fn plan_finished(&mut self) -> Vec<SenderStep> {
        self.planned = true;
        self.end_if_through().into_iter().collect()
    }

    /// `count` chunks of [`SenderStep::SendChunks`] are on their way.
    pub fn sent(&mut self, count: usize) {
        debug_assert!(count <= self.outstanding);
        self.outstanding = self.outstanding.saturating_sub(count);
    }

    fn end_if_through(&mut self) -> Option<SenderStep> {
        if !self.planned || !self.asked.is_empty() || self.state != State::Sending {
            return None;
        }
        self.state = State::AwaitDone;
        Some(SenderStep::Send(Message::End { chunks: self.chunks_sent }))
    }
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            State::AwaitNeed => "an offer is open",
            State::Sending => "chunks are being sent",
            State::AwaitDone => "the end was announced",
            State::Finished => "the transfer is over",
        }
    }
}
