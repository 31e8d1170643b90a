//! A client that talks to a guest throughout its move, and notes when an answer came.
//!
//! Datagrams are asked for every few milliseconds; a stream is read as it comes. What is said is the service's own affair
//! ([`crate::clients`]). Datagrams where the service has them, because what is seen is then its absence alone, not TCP's guess of
//! when to send again.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::network::{End, inside};

/// How often datagrams are asked for.
pub const OFTEN: Duration = Duration::from_millis(4);
/// The same, by a client beside another one.
pub const SELDOM: Duration = Duration::from_millis(20);
/// The longest that a guest may take to answer for the first time, or again.
const PATIENCE: Duration = Duration::from_secs(150);
/// A client that hears nothing looks so often whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Of something that only grows while the service works.
    pub count: u64,
    /// What stays as it is as long as it is the same service.
    pub same: String,
}

/// How a service is asked by datagrams.
pub trait Datagrams: Send + Sync {
    /// Its question number `number`.
    fn ask(&self, number: u64) -> Vec<u8>;
    /// Understands what came; nothing if it isn't an answer to a question.
    fn heard(&self, bytes: &[u8]) -> Option<Said>;
}

/// How a service's stream is read.
pub trait Stream: Send {
    /// What is sent when the connection is there.
    fn ask(&self) -> Vec<u8>;
    /// Understands what came next; nothing if the stream isn't whole.
    fn heard(&mut self, bytes: &[u8]) -> Option<Said>;
}

struct Heard {
    at: Instant,
    said: Said,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    heard: Mutex<Vec<Heard>>,
    /// How often a stream ended, or wasn't whole.
    breaks: AtomicU64,
}

impl Shared {
    fn list(&self) -> MutexGuard<'_, Vec<Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hears(&self, said: Said) {
        self.list().push(Heard { at: Instant::now(), said });
    }
}

/// The client.
pub struct Probe {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Probe {
    /// Begins to ask `address` from the network of `end`, and waits for the first answer.
    pub fn datagrams(end: &End, address: &str, every: Duration, how: Arc<dyn Datagrams>) -> anyhow::Result<Probe> {
        let socket = inside(end, || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(address)?;
            socket.set_read_timeout(Some(LOOK))?;
            Ok(socket)
        })?;
        let shared = Arc::new(Shared::default());
        let (asks, listens) = (socket.try_clone()?, socket);
        let (asked, asking) = (shared.clone(), how.clone());
        let asking = std::thread::spawn(move || {
            for number in 0u64.. {
                if asked.stop.load(SeqCst) {
                    break;
                }
                // That nobody is there is what it is here to see.
                let _ = asks.send(&asking.ask(number));
                std::thread::sleep(every);
            }
        });
        let listened = shared.clone();
        let listening = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !listened.stop.load(SeqCst) {
                // An error is a host's word that there is nobody; or nobody said anything.
                if let Ok(got) = listens.recv(&mut buffer)
                    && let Some(said) = how.heard(&buffer[..got])
                {
                    listened.hears(said);
                }
            }
        });
        Probe { shared, threads: vec![asking, listening] }.begun(address)
    }

    /// Begins to read a stream of `address` from the network of `end`, and waits for what comes first. A connection that ends is
    /// made again.
    pub fn stream(end: &End, address: &str, how: fn() -> Box<dyn Stream>) -> anyhow::Result<Probe> {
        let (end, to): (End, SocketAddr) = (end.clone(), address.parse()?);
        let shared = Arc::new(Shared::default());
        let reads = shared.clone();
        let reading = std::thread::spawn(move || {
            while !reads.stop.load(SeqCst) {
                let began = reads.list().len();
                let _ = read_stream(&reads, &end, to, how());
                // Nobody who isn't there yet has broken anything.
                if !reads.stop.load(SeqCst) && reads.list().len() > began {
                    reads.breaks.fetch_add(1, SeqCst);
                }
                std::thread::sleep(OFTEN);
            }
        });
        Probe { shared, threads: vec![reading] }.begun(address)
    }

    fn begun(self, address: &str) -> anyhow::Result<Probe> {
        self.hears_after(Instant::now(), 1).with_context(|| format!("nothing was heard of {address}"))?;
        Ok(self)
    }

    /// Waits for `answers` answers after `moment`.
    pub fn hears_after(&self, moment: Instant, answers: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.shared.list().iter().rev().take_while(|heard| heard.at > moment).count() < answers {
            ensure!(began.elapsed() < PATIENCE, "the guest doesn't answer its client");
            std::thread::sleep(OFTEN);
        }
        Ok(())
    }

    /// The longest time without an answer between `from` and now.
    pub fn longest_gap(&self, from: Instant) -> Duration {
        let list = self.shared.list();
        let since = list.windows(2).filter(|pair| pair[1].at > from);
        since.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default()
    }

    /// How often a stream ended and was begun again.
    pub fn breaks(&self) -> u64 {
        self.shared.breaks.load(SeqCst)
    }

    /// Whether what answers now is what answered before `moment`, and has worked on since.
    pub fn goes_on(&self, moment: Instant) -> anyhow::Result<()> {
        let list = self.shared.list();
        let before = list.iter().rev().find(|heard| heard.at <= moment).context("no answers before")?;
        let last = list.last().context("no answers")?;
        let falls = list.windows(2).find(|pair| pair[1].said.count < pair[0].said.count);
        if let Some(pair) = falls.filter(|_| self.breaks() == 0) {
            anyhow::bail!("the service has begun to count anew: {:?} after {:?}", pair[1].said, pair[0].said);
        }
        ensure!(last.said.same == before.said.same, "it says {:?} now; before {:?}", last.said, before.said);
        ensure!(self.breaks() > 0 || last.said.count > before.said.count, "it answers, but has done nothing since");
        Ok(())
    }
}

/// Reads a stream until it ends, isn't whole, or nobody wants it any more.
fn read_stream(shared: &Shared, end: &End, to: SocketAddr, mut how: Box<dyn Stream>) -> io::Result<()> {
    let mut stream = inside(end, || TcpStream::connect_timeout(&to, Duration::from_millis(250)))?;
    stream.set_read_timeout(Some(LOOK))?;
    stream.write_all(&how.ask())?;
    let mut buffer = vec![0; 256 << 10];
    while !shared.stop.load(SeqCst) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => match how.heard(&buffer[..got]) {
                Some(said) => shared.hears(said),
                None => return Err(io::ErrorKind::InvalidData.into()),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
