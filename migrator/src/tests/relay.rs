//! A path that tests can cut, hold up and mend: forwards TCP connections to an address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    /// Those that didn't get through.
    turned_away: AtomicUsize,
    bytes: AtomicU64,
    /// What becomes of it by itself after so many bytes, once.
    then: Mutex<Option<(u64, State)>>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    /// Bytes wait.
    Held,
    /// Nobody gets through.
    Shut,
}

/// A path. Dropping it cuts it.
pub struct Relay {
    address: SocketAddr,
    counts: Arc<Counts>,
    state: watch::Sender<(State, u64)>,
    task: JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
    }
}

impl Relay {
    pub async fn to(target: SocketAddr) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let state = watch::Sender::new((State::Open, 0));
        let (all, states) = (counts.clone(), state.clone());
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (all, states) = (all.clone(), states.clone());
                if states.borrow().0 == State::Shut {
                    all.turned_away.fetch_add(1, SeqCst);
                    continue;
                }
                all.connections.fetch_add(1, SeqCst);
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    let generation = states.borrow().1;
                    let mut watched = states.subscribe();
                    let (near, far) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = forward(near.0, far.1, &all, &states, generation) => {}
                        () = forward(far.0, near.1, &all, &states, generation) => {}
                        _ = watched.wait_for(|(_, now)| *now != generation) => {}
                    }
                });
            }
        });
        Relay { address, counts, state, task }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.counts.connections.load(SeqCst)
    }

    /// Bytes so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.counts.bytes.load(SeqCst)
    }

    /// Connections so far that came while it was shut.
    pub fn turned_away(&self) -> usize {
        self.counts.turned_away.load(SeqCst)
    }

    /// Ends all connections; new ones get through. What was held does not.
    pub fn cut(&self) {
        self.state.send_modify(|(state, generation)| (*state, *generation) = (State::Open, *generation + 1));
    }

    /// Ends all connections, and no new one gets through.
    pub fn shut(&self) {
        set(&self.state, State::Shut);
    }

    /// The same once so many bytes have passed.
    pub fn shut_at(&self, bytes: u64) {
        *self.counts.then.lock() = Some((bytes, State::Shut));
    }

    /// Nothing gets through, and nobody is told.
    pub fn hold(&self) {
        set(&self.state, State::Held);
    }

    /// The same once so many bytes have passed.
    pub fn hold_at(&self, bytes: u64) {
        *self.counts.then.lock() = Some((bytes, State::Held));
    }

    /// All is as it was.
    pub fn mend(&self) {
        set(&self.state, State::Open);
    }
}

fn set(watched: &watch::Sender<(State, u64)>, to: State) {
    watched.send_modify(|(state, generation)| {
        *generation += u64::from(to == State::Shut);
        *state = to;
    });
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    counts: &Counts,
    state: &watch::Sender<(State, u64)>,
    generation: u64,
) {
    let mut buffer = vec![0; 64 * 1024];
    let mut held = state.subscribe();
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let is_gone = held.wait_for(|(state, _)| *state != State::Held).await.is_err();
        if is_gone || held.borrow().1 != generation {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        let bytes = counts.bytes.fetch_add(count as u64, SeqCst) + count as u64;
        let then = counts.then.lock().take_if(|(at, _)| *at <= bytes);
        if let Some((_, then)) = then {
            set(state, then);
        }
    }
    let _ = to.shutdown().await;
}
