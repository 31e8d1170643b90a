//! The requests of a handover: asked over a connection of their own, and asked again when it breaks.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::Migrations;
use crate::error::{Error, Result};
use crate::handover::{Fate, MoveId};
use crate::link::Link;
use crate::node::Node;
use crate::peers::Peer;
use crate::retry::is_transient;
use crate::wire::Message;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What the other side's journal says.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub fate: Fate,
    /// What the last step took there.
    pub took: Duration,
    pub text: String,
}

/// A peer that is asked.
pub(crate) struct Control {
    node: Node,
    peer: Peer,
    link: Option<Link>,
    #[cfg(test)]
    cut: std::sync::Arc<super::tests::Cut>,
}

impl Migrations {
    /// The conversation with `peer`.
    pub(super) fn control(&self, peer: Peer) -> Control {
        Control {
            node: self.0.node.clone(),
            peer,
            link: None,
            #[cfg(test)]
            cut: self.0.faults.cut.clone(),
        }
    }
}

impl Control {
    /// Asks until there is an answer, for `patience` at most. Requests may be repeated.
    ///
    /// # Errors
    /// The last failure; then the request may have come or not, unless it is the peer's own word.
    pub async fn ask(&mut self, message: &Message, patience: Duration) -> Result<Message> {
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let left = patience.saturating_sub(began.elapsed());
            let (peer, seconds) = (self.peer.name.to_string(), patience.as_secs());
            let late = |_| Error::Timeout { action: "answering about a guest", peer, seconds };
            let answered = timeout(left, self.once(message)).await.map_err(late).and_then(|answer| answer);
            let error = match answered {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // Whatever it was: the answer to this may still be on its way, and isn't that of the next.
            self.link = None;
            if !is_transient(&error) || began.elapsed() + pause >= patience {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn once(&mut self, message: &Message) -> Result<Message> {
        #[cfg(test)]
        let is_lost = self.cut.before(message)?;
        let mut link = match self.link.take() {
            Some(link) => link,
            None => self.node.connect(&self.peer).await?,
        };
        link.send(message.clone()).await?;
        let answer = link.recv().await?;
        #[cfg(test)]
        self.cut.after(is_lost)?;
        self.link = Some(link);
        Ok(answer)
    }

    /// Asks something that is answered by a fate.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub async fn fate(&mut self, message: &Message, patience: Duration) -> Result<Said> {
        match self.ask(message, patience).await? {
            Message::Fate { fate, micros, text } => Ok(Said { fate, took: Duration::from_micros(micros), text }),
            other => {
                let detail = format!("{} as the answer to {}", other.kind(), message.kind());
                Err(Error::protocol(self.peer.name.as_str(), detail))
            }
        }
    }

    /// What became of the move `id` there.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub async fn inquire(&mut self, id: MoveId, patience: Duration) -> Result<Said> {
        self.fate(&Message::Inquire { id }, patience).await
    }

    /// Says goodbye.
    pub async fn close(&mut self) {
        if let Some(link) = self.link.take() {
            link.close().await;
        }
    }
}
