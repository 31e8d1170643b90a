//! What waits to be written: one queue, from which one connection takes everything or several share the frames.
//!
//! The first connection takes items in their order, messages and frames alike. Connections that have joined take
//! frames only, each whenever it has room, so that each path carries as much as it can. What they took stays known until the
//! other side has confirmed it: the frames of a connection that dies go back to the front. Invariants: the queue is
//! bounded; unconfirmed frames are at most [`MAX_KEPT_BYTES`]; whoever waits is woken when the link goes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::wire::Message;

/// Items that wait at most, per connection that takes them. A frame has about half a MiB.
const ROOM: usize = 4;
/// Frames that joined connections have taken and that aren't confirmed, in bytes: 1 Gbit/s for a second, which
/// is what two round trips of 200 ms and the repair of what was lost take.
pub(crate) const MAX_KEPT_BYTES: usize = 128 << 20;

/// What is to be written.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// A message.
    Message(Message),
    /// A frame that is encoded already.
    Frame(Bytes),
    /// A frame that may come to the other side twice, told apart by its number.
    Numbered(Numbered),
}

/// A frame that joined connections carry, and its number among those of the transfer.
#[derive(Clone, Debug)]
pub(crate) struct Numbered {
    pub number: u64,
    pub frame: Bytes,
}

impl Outgoing {
    /// Whether it still makes sense on a link that is being ended.
    pub fn is_last_word(&self) -> bool {
        matches!(self, Outgoing::Message(Message::Error { .. } | Message::Alive))
    }
}

/// The link is gone; [`crate::link::Link::recv`] tells why.
#[derive(Debug)]
pub struct Gone;

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Outgoing>,
    /// Frames that a dead connection left behind.
    returned: VecDeque<Numbered>,
    next_number: u64,
    room: usize,
    senders: usize,
    is_gone: bool,
    kept_bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    has_room: Condvar,
    room: Notify,
    items: Notify,
}

impl Queue {
    fn pop(&self) -> Option<Outgoing> {
        let mut state = self.state.lock();
        let item = match state.returned.pop_front() {
            Some(frame) => Some(Outgoing::Numbered(frame)),
            None => state.items.pop_front(),
        };
        drop(state);
        if item.is_some() {
            self.wake_senders();
        }
        item
    }

    fn wake_senders(&self) {
        self.has_room.notify_all();
        self.room.notify_waiters();
    }
}

/// The way out of a link. Clones write to the same link; it ends once all are gone.
#[derive(Debug)]
pub struct Outbox(Arc<Queue>);

/// The end of the queue that the first connection's writer has. Without it nothing goes out any more.
#[derive(Debug)]
pub(crate) struct Takes(Arc<Queue>);

/// The end of the queue that joined connections have.
#[derive(Clone, Debug)]
pub(crate) struct Shares(Arc<Queue>);

/// A queue with room for `room` items.
pub(crate) fn queue(room: usize) -> (Outbox, Takes) {
    let queue = Arc::new(Queue::default());
    *queue.state.lock() = State { room, senders: 1, ..State::default() };
    (Outbox(queue.clone()), Takes(queue))
}

/// A queue for a link of its own.
pub(crate) fn link_queue() -> (Outbox, Takes) {
    queue(ROOM)
}

impl Clone for Outbox {
    fn clone(&self) -> Outbox {
        self.0.state.lock().senders += 1;
        Outbox(self.0.clone())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.0.state.lock().senders -= 1;
        self.0.items.notify_waiters();
    }
}

impl Outbox {
    /// Queues the first message of a new queue.
    pub(crate) fn begin(&self, message: Message) {
        self.0.state.lock().items.push_back(Outgoing::Message(message));
        self.0.items.notify_waiters();
    }

    /// Queues a message, waiting for room.
    pub async fn send(&self, message: Message) -> Result<(), Gone> {
        self.put(Outgoing::Message(message)).await
    }

    pub(crate) async fn send_numbered(&self, frame: Numbered) -> Result<(), Gone> {
        self.put(Outgoing::Numbered(frame)).await
    }

    /// Queues a message from a blocking thread.
    pub fn blocking_send(&self, message: Message) -> Result<(), Gone> {
        self.blocking_put(Outgoing::Message(message))
    }

    /// Queues an encoded frame from a blocking thread.
    pub fn blocking_send_frame(&self, frame: Bytes) -> Result<(), Gone> {
        self.blocking_put(Outgoing::Frame(frame))
    }

    /// Whether what is queued goes nowhere any more.
    pub fn is_gone(&self) -> bool {
        self.0.state.lock().is_gone
    }

    /// How many items wait, and how many could: full means that the link is the slower side.
    pub fn fill(&self) -> (usize, usize) {
        let state = self.0.state.lock();
        (state.items.len() + state.returned.len(), state.room)
    }

    /// How many connections take from it.
    pub fn connections(&self) -> usize {
        self.0.state.lock().room.saturating_sub(ROOM) + 1
    }

    /// The end for connections that join.
    pub(crate) fn shares(&self) -> Shares {
        Shares(self.0.clone())
    }

    async fn put(&self, item: Outgoing) -> Result<(), Gone> {
        loop {
            let room = self.0.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            {
                let mut state = self.0.state.lock();
                if state.is_gone {
                    return Err(Gone);
                }
                if state.items.len() < state.room {
                    state.items.push_back(item);
                    break;
                }
            }
            room.await;
        }
        self.0.items.notify_waiters();
        Ok(())
    }

    fn blocking_put(&self, item: Outgoing) -> Result<(), Gone> {
        let mut state = self.0.state.lock();
        while !state.is_gone && state.items.len() >= state.room {
            self.0.has_room.wait(&mut state);
        }
        if state.is_gone {
            return Err(Gone);
        }
        state.items.push_back(item);
        drop(state);
        self.0.items.notify_waiters();
        Ok(())
    }
}

impl Takes {
    /// The next item; `None` once all senders are gone and nothing is left.
    pub async fn recv(&mut self) -> Option<Outgoing> {
        loop {
            let items = self.0.items.notified();
            tokio::pin!(items);
            items.as_mut().enable();
            if let Some(item) = self.0.pop() {
                return Some(item);
            }
            if self.0.state.lock().senders == 0 {
                return None;
            }
            items.await;
        }
    }

    /// The next item, if there is one.
    pub fn try_recv(&mut self) -> Option<Outgoing> {
        self.0.pop()
    }
}

impl Drop for Takes {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.is_gone = true;
        state.items.clear();
        state.returned.clear();
        drop(state);
        self.0.wake_senders();
        self.0.items.notify_waiters();
    }
}

impl Shares {
    /// One connection more, or one less, takes frames.
    pub fn resize(&self, connections: usize) {
        self.0.state.lock().room = ROOM + connections;
        self.0.wake_senders();
    }

    /// The next frame, as soon as there is one and it may be kept. `None` once the link is gone.
    pub async fn next_frame(&self) -> Option<Numbered> {
        loop {
            let items = self.0.items.notified();
            tokio::pin!(items);
            items.as_mut().enable();
            {
                let mut state = self.0.state.lock();
                if state.is_gone {
                    return None;
                }
                if let Some(frame) = state.take_frame() {
                    drop(state);
                    self.0.wake_senders();
                    return Some(frame);
                }
            }
            items.await;
        }
    }

    /// Whether frames wait for a connection with room.
    pub fn is_backed_up(&self) -> bool {
        let state = self.0.state.lock();
        state.items.len() + state.returned.len() >= state.room
    }

    /// A frame that was taken has arrived.
    pub fn confirm(&self, frame: &Numbered) {
        self.0.state.lock().kept_bytes -= frame.frame.len();
        self.0.items.notify_waiters();
    }

    /// Frames that were taken, and of which nobody knows whether they have arrived.
    pub fn give_back(&self, frames: impl IntoIterator<Item = Numbered>) {
        let mut state = self.0.state.lock();
        for frame in frames {
            state.kept_bytes -= frame.frame.len();
            if !state.is_gone {
                state.returned.push_back(frame);
            }
        }
        drop(state);
        self.0.items.notify_waiters();
    }
}

impl State {
    fn take_frame(&mut self) -> Option<Numbered> {
        if self.kept_bytes >= MAX_KEPT_BYTES {
            return None;
        }
        let frame = match self.returned.pop_front() {
            Some(frame) => frame,
            None => {
                let at = self.items.iter().position(|item| matches!(item, Outgoing::Frame(_)))?;
                let Some(Outgoing::Frame(frame)) = self.items.remove(at) else { return None };
                self.next_number += 1;
                Numbered { number: self.next_number - 1, frame }
            }
        };
        self.kept_bytes += frame.frame.len();
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(byte: u8) -> Bytes {
        Bytes::from(vec![byte; 100])
    }

    #[tokio::test]
    async fn joined_connections_take_frames_only_and_what_they_lose_comes_back_first() {
        let (outbox, mut takes) = link_queue();
        outbox.send(Message::Alive).await.unwrap();
        outbox.put(Outgoing::Frame(frame(1))).await.unwrap();
        outbox.put(Outgoing::Frame(frame(2))).await.unwrap();
        outbox.send(Message::End { chunks: 2 }).await.unwrap();
        let shares = outbox.shares();
        let one = shares.next_frame().await.unwrap();
        assert_eq!((one.number, &one.frame), (0, &frame(1)));
        assert!(matches!(takes.recv().await, Some(Outgoing::Message(Message::Alive))));
        shares.give_back([one]);
        assert!(matches!(takes.recv().await, Some(Outgoing::Numbered(again)) if again.number == 0));
        let two = shares.next_frame().await.unwrap();
        assert_eq!((two.number, &two.frame), (1, &frame(2)));
        shares.confirm(&two);
        assert!(matches!(takes.recv().await, Some(Outgoing::Message(Message::End { chunks: 2 }))));
        drop(outbox);
        assert!(takes.recv().await.is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_is_woken_when_the_link_goes() {
        let (outbox, takes) = queue(1);
        outbox.put(Outgoing::Frame(frame(1))).await.unwrap();
        let (asynchronous, blocking) = (outbox.clone(), outbox.clone());
        let asynchronous = tokio::spawn(async move { asynchronous.send(Message::Alive).await.is_err() });
        let blocking = tokio::task::spawn_blocking(move || blocking.blocking_send(Message::Alive).is_err());
        let shares = outbox.shares();
        let kept = shares.next_frame().await.unwrap();
        drop(takes);
        assert!(asynchronous.await.is_ok() && blocking.await.is_ok());
        assert!(outbox.send(Message::Alive).await.is_err());
        assert!(shares.next_frame().await.is_none());
        shares.give_back([kept]);
    }
}
