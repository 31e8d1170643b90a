//! What each application's user says to it and hears from it; and the guest's first program, which says whether the guest is the
//! same one.
//!
//! | application | its client |
//! |---|---|
//! | none | asks the first program, which counts its answers |
//! | game server | asks by Teeworlds' own protocol for the game's name and map, with a number that comes back |
//! | RAM simulation | asks how many pages it has rewritten |
//! | video | reads the stream over HTTP, and sees that each picture follows the last one, whole |
//! | face detection | asks how many frames were looked at |

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use layerfs_tests::network::End;

use crate::cell::App;
use crate::lan::{GUEST, PORT};
use crate::probe::{Datagrams, OFTEN, Probe, SELDOM, Said, Stream};

/// The port of applications that count.
pub const COUNTER_PORT: &str = "7001";
/// Teeworlds' own.
const GAME_PORT: &str = "8303";
/// VLC's, as it is told.
const FILM_PORT: &str = "8080";
/// So many answers of each client say that a move is over.
const ANSWERS: usize = 25;

/// A guest's clients.
pub struct Clients {
    first: Probe,
    /// The application's, if there is one.
    application: Option<Probe>,
}

impl Clients {
    /// Begins to ask from the network of `user`; returns when all have heard something.
    pub fn start(user: &End, app: App) -> anyhow::Result<Clients> {
        let every = if app == App::None { OFTEN } else { SELDOM };
        let first = Probe::datagrams(user, &format!("{GUEST}:{PORT}"), every, Arc::new(Counter))?;
        let ask = |port: &str, how: Arc<dyn Datagrams>| Probe::datagrams(user, &format!("{GUEST}:{port}"), OFTEN, how);
        let application = match app {
            App::None => None,
            App::Game => Some(ask(GAME_PORT, Arc::new(Game::default()))?),
            App::Ram(_) | App::Face => Some(ask(COUNTER_PORT, Arc::new(Counter))?),
            App::Video => Some(Probe::stream(user, &format!("{GUEST}:{FILM_PORT}"), || Box::new(Film::default()))?),
        };
        Ok(Clients { first, application })
    }

    /// The one whose answers count.
    fn user(&self) -> &Probe {
        self.application.as_ref().unwrap_or(&self.first)
    }

    /// Goes on for a while, so that there is something to compare with.
    pub fn watch(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// The longest time that the application's user was without an answer between `from` and now.
    pub fn longest_gap(&self, from: Instant) -> Duration {
        self.user().longest_gap(from)
    }

    /// The same of the guest's first program.
    pub fn longest_gap_of_first(&self, from: Instant) -> Duration {
        self.first.longest_gap(from)
    }

    /// What else is worth to be known of them.
    pub fn notes(&self) -> Vec<String> {
        match self.user().breaks() {
            0 => Vec::new(),
            breaks => vec![format!("the client's connection broke {breaks} times, and it made another")],
        }
    }

    /// Waits until the guest answers all of them steadily, and sees that it is the same as before `moment` and works.
    pub fn settle(&self, moment: Instant) -> anyhow::Result<()> {
        let now = Instant::now();
        for probe in [Some(&self.first), self.application.as_ref()].into_iter().flatten() {
            probe.hears_after(now, ANSWERS)?;
            probe.goes_on(moment)?;
        }
        Ok(())
    }
}

/// Who answers "COUNT STATE …".
struct Counter;

impl Datagrams for Counter {
    fn ask(&self, number: u64) -> Vec<u8> {
        number.to_string().into_bytes()
    }

    fn heard(&self, bytes: &[u8]) -> Option<Said> {
        let mut words = std::str::from_utf8(bytes).ok()?.split(' ');
        Some(Said { count: words.next()?.parse().ok()?, same: words.next()?.to_owned() })
    }
}

/// A player who looks what is played on a server of Teeworlds 0.7: first the server gives a token, with which it is then asked.
///
/// ```text
/// control: flags(1) ack chunks token(4) │ 5 own-token(4) zeros…        a token is asked for, and given
/// without a connection: 0x21 token(4) own-token(4) │ ffffffff "gie3" number → ffffffff "inf3" number version\0 name\0 …
/// ```
#[derive(Default)]
struct Game {
    /// The server's token, if it isn't 0.
    token: AtomicU32,
}

impl Game {
    const OWN: u32 = 0x6c61_7965;
    const CONTROL: u8 = 1 << 2;
    const CONNECTIONLESS: u8 = 0x21;
    const GIVE_TOKEN: u8 = 5;
    /// A shorter question isn't answered: it would be of use to who asks in somebody else's name.
    const TOKEN_BYTES: usize = 512;
    /// Tokens are good for some seconds.
    const RENEW: u64 = 250;
    const ASKS: &[u8] = b"\xff\xff\xff\xffgie3";
    const SAYS: &[u8] = b"\xff\xff\xff\xffinf3";
}

impl Datagrams for Game {
    fn ask(&self, number: u64) -> Vec<u8> {
        let token = self.token.load(SeqCst);
        if token == 0 || number.is_multiple_of(Game::RENEW) {
            let mut packet = vec![Game::CONTROL, 0, 0, 0xff, 0xff, 0xff, 0xff, Game::GIVE_TOKEN];
            packet.extend(Game::OWN.to_be_bytes());
            packet.resize(packet.len() + Game::TOKEN_BYTES, 0);
            return packet;
        }
        let mut packet = vec![Game::CONNECTIONLESS];
        packet.extend(token.to_be_bytes());
        packet.extend(Game::OWN.to_be_bytes());
        packet.extend(Game::ASKS);
        packet.extend(packed(number as u32 & 0x3fff_ffff));
        packet
    }

    fn heard(&self, bytes: &[u8]) -> Option<Said> {
        let own = Game::OWN.to_be_bytes();
        if let Some(rest) = bytes.strip_prefix(&[Game::CONNECTIONLESS]) {
            let rest = rest.strip_prefix(&own)?.get(4..)?.strip_prefix(Game::SAYS)?;
            let (count, rest) = unpacked(rest)?;
            // Version, name, its host's name, map, kind of game.
            let texts: Vec<&[u8]> = rest.split(|byte| *byte == 0).take(5).collect();
            let same =
                String::from_utf8_lossy(&[texts.first()?, *texts.get(3)?, *texts.get(4)?].join(&b' ')).into_owned();
            return Some(Said { count: count.into(), same });
        }
        let rest = bytes.get(3..)?.strip_prefix(&own)?.strip_prefix(&[Game::GIVE_TOKEN])?;
        if bytes[0] & 0xfc == Game::CONTROL {
            self.token.store(u32::from_be_bytes(*rest.first_chunk()?), SeqCst);
        }
        None
    }
}

/// A number as Teeworlds packs it: six bits, then seven in each byte; the first bit says that another follows.
fn packed(mut number: u32) -> Vec<u8> {
    let mut bytes = vec![(number & 0x3f) as u8];
    number >>= 6;
    while number > 0 {
        if let Some(last) = bytes.last_mut() {
            *last |= 0x80;
        }
        bytes.push((number & 0x7f) as u8);
        number >>= 7;
    }
    bytes
}

fn unpacked(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (first, mut rest) = bytes.split_first()?;
    let (mut number, mut shift, mut more) = (u32::from(first & 0x3f), 6, first & 0x80 != 0);
    while more {
        let (next, after) = rest.split_first()?;
        number |= u32::from(next & 0x7f).checked_shl(shift)?;
        (rest, shift, more) = (after, shift + 7, next & 0x80 != 0);
    }
    Some((number, rest))
}

/// Who watches a film that VLC sends: pictures, each with its length in front.
#[derive(Default)]
struct Film {
    pictures: u64,
    /// What has come of the next one, with its head.
    next: Vec<u8>,
    is_begun: bool,
}

impl Film {
    /// No head is longer.
    const MOST_HEAD: usize = 2048;
    const END_OF_HEAD: &[u8] = b"\r\n\r\n";

    /// Takes the next picture out of what has come, if it is there; `None` if this is no picture.
    fn picture(&mut self) -> Option<bool> {
        let Some(head) = self.next.windows(4).position(|window| window == Film::END_OF_HEAD) else {
            return (self.next.len() < Film::MOST_HEAD).then_some(false);
        };
        let text = std::str::from_utf8(&self.next[..head]).ok()?;
        if !self.is_begun {
            self.is_begun = text.starts_with("HTTP/1.") && text.split(' ').nth(1) == Some("200");
            self.next.drain(..head + 4);
            return self.is_begun.then_some(true);
        }
        // After a picture comes its end, and not what is left of it.
        if self.pictures > 0 && !text.starts_with("\r\n--") {
            return None;
        }
        let length =
            text.lines().find_map(|line| line.strip_prefix("Content-Length:"))?.trim().parse::<usize>().ok()?;
        let end = (head + 4).checked_add(length)?;
        if self.next.len() < end {
            return Some(false);
        }
        let is_picture = self.next[head + 4..end].starts_with(&[0xff, 0xd8]);
        self.next.drain(..end);
        self.pictures += 1;
        is_picture.then_some(true)
    }
}

impl Stream for Film {
    fn ask(&self) -> Vec<u8> {
        format!("GET / HTTP/1.0\r\nHost: {GUEST}\r\n\r\n").into_bytes()
    }

    fn heard(&mut self, bytes: &[u8]) -> Option<Said> {
        self.next.extend_from_slice(bytes);
        while self.picture()? {}
        Some(Said { count: self.pictures, same: String::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_from_a_game() {
        let game = Game::default();
        assert_eq!(game.ask(3).len(), 12 + Game::TOKEN_BYTES);
        let mut given = vec![Game::CONTROL, 0, 0];
        given.extend(Game::OWN.to_be_bytes());
        given.extend([Game::GIVE_TOKEN, 1, 2, 3, 4]);
        assert_eq!(game.heard(&given), None);
        for number in [1, 63, 64, 9001, 123_456_789] {
            let asked = game.ask(number);
            assert_eq!(asked[..5], [0x21, 1, 2, 3, 4]);
            let mut answer = vec![0x21];
            answer.extend(Game::OWN.to_be_bytes());
            answer.extend([1, 2, 3, 4]);
            answer.extend(Game::SAYS);
            answer.extend(&asked[17..]);
            answer.extend(b"0.7.5\0unnamed server\0\0dm1\0DM\0");
            assert_eq!(game.heard(&answer), Some(Said { count: number, same: "0.7.5 dm1 DM".to_owned() }));
            assert_eq!(game.heard(&answer[..20]), None);
        }
    }

    #[test]
    fn a_film_is_whole_or_not() {
        let head = b"HTTP/1.0 200 OK\r\nContent-type: multipart/x-mixed-replace\r\n\r\n".to_vec();
        let picture = b"\r\n--7b\r\nContent-Type: image/jpeg\r\nContent-Length: 4\r\n\r\n\xff\xd8\xff\xd9".to_vec();
        let whole = [head, picture.clone(), picture.clone()].concat();
        // However it is cut.
        for size in [1, 7, 60, 1000] {
            let mut film = Film::default();
            let said = whole.chunks(size).map(|piece| film.heard(piece)).last().flatten();
            assert_eq!(said.map(|said| said.count), Some(2), "{size}");
        }
        let mut film = Film::default();
        film.heard(&whole).unwrap();
        // A byte that is missing shifts the next one.
        assert_eq!(film.heard(&[&picture[..picture.len() - 1], &picture[..], &picture[..]].concat()), None);
        assert_eq!(Film::default().heard(b"HTTP/1.0 404 Not found\r\n\r\n"), None);
    }

    #[test]
    fn those_who_count_are_understood() {
        assert_eq!(Counter.heard(b"12 runs 5"), Some(Said { count: 12, same: "runs".to_owned() }));
        assert_eq!(Counter.heard(b"x runs"), None);
    }
}
