//! What may follow what: the two sides of a transfer as state machines without I/O. PROTOCOL.md, "Transfer".
//!
//! A machine takes messages and results, and gives *steps* for the driver to do, in order. It never waits, reads no
//! clock and touches no store, so tests drive every interleaving. The decision it hides: which message is acceptable
//! when, and how much may be outstanding.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

pub use receiver::{Receiver, ReceiverStep};
pub use sender::{Sender, SenderStep};

/// The other side did what the protocol forbids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub String);

impl Violation {
    fn unexpected(kind: &str, state: &str) -> Violation {
        Violation(format!("a message {kind} while {state}"))
    }
}
