//! A client that asks a guest every few milliseconds, over UDP, and notes when an answer came.
//!
//! UDP, because what it sees is then the service's absence alone, not TCP's guess of when to send again.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::network::{End, inside};

/// How often it asks.
const EVERY: Duration = Duration::from_millis(4);
/// The longest that a guest may take to answer for the first time, or again.
const PATIENCE: Duration = Duration::from_secs(180);

/// An answer.
#[derive(Clone, Debug)]
struct Heard {
    at: Instant,
    /// The guest's own count of its answers.
    count: u64,
    application: String,
}

/// The client.
pub struct Probe {
    stop: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Heard>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Probe {
    /// Begins to ask `address` from the network of `end`, and waits for the first answer.
    pub fn start(end: &End, address: &str) -> anyhow::Result<Probe> {
        let socket = inside(end, || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(address)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            Ok(socket)
        })?;
        let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (asks, listens) = (socket.try_clone()?, socket);
        let stopped = stop.clone();
        let asking = std::thread::spawn(move || {
            for number in 0u64.. {
                if stopped.load(SeqCst) {
                    break;
                }
                // That nobody is there is what it is here to see.
                let _ = asks.send(number.to_string().as_bytes());
                std::thread::sleep(EVERY);
            }
        });
        let (stopped, list) = (stop.clone(), heard.clone());
        let listening = std::thread::spawn(move || {
            while !stopped.load(SeqCst) {
                if let Some(answer) = listen(&listens) {
                    list.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
                }
            }
        });
        let probe = Probe { stop, heard, threads: vec![asking, listening] };
        probe.hears_after(Instant::now(), 1)?;
        Ok(probe)
    }

    fn list(&self) -> std::sync::MutexGuard<'_, Vec<Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `answers` answers after `moment`.
    pub fn hears_after(&self, moment: Instant, answers: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.list().iter().rev().take_while(|heard| heard.at > moment).count() < answers {
            ensure!(began.elapsed() < PATIENCE, "the guest doesn't answer its client");
            std::thread::sleep(EVERY);
        }
        Ok(())
    }

    /// Goes on for a while, so that there is something to compare with.
    pub fn watch(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// The longest time without an answer between `from` and now.
    pub fn longest_gap(&self, from: Instant) -> Duration {
        let list = self.list();
        let since = list.windows(2).filter(|pair| pair[1].at > from);
        since.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default()
    }

    /// Whether the guest that answers now is the one that answered before, and its application runs.
    pub fn same_guest(&self) -> anyhow::Result<()> {
        let list = self.list();
        let (first, last) = (list.first().context("no answers")?, list.last().context("no answers")?);
        ensure!(list.windows(2).all(|pair| pair[1].count > pair[0].count), "the guest has begun to count anew");
        ensure!(
            last.application == first.application,
            "the application {} now; it {} before",
            last.application,
            first.application
        );
        Ok(())
    }
}

fn listen(socket: &UdpSocket) -> Option<Heard> {
    let mut buffer = [0; 256];
    let got = loop {
        match socket.recv(&mut buffer) {
            Ok(got) => break got,
            // A host said that there is nobody; or nobody said anything.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    };
    let at = Instant::now();
    let text = std::str::from_utf8(&buffer[..got]).ok()?;
    let mut words = text.split(' ');
    Some(Heard { at, count: words.next()?.parse().ok()?, application: words.next()?.to_owned() })
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
