//! What to do next while a guest is copied. Pure.
//!
//! Invariants: rounds end; another one is made only if it would make the downtime noticeably shorter, and is worth what goes again for it.

use serde::{Deserialize, Serialize};

/// Never more rounds than this.
pub const MAX_ROUNDS: usize = 12;
/// A round has to shorten the downtime by so many seconds, or by this part of it, whichever is more.
const WORTHWHILE_SECONDS: f64 = 0.02;
const WORTHWHILE_PART: f64 = 0.05;
/// A round that sends at least this part of what the one before has sent gains nothing.
const SATURATED: f64 = 0.9;
/// After one that sends at most this part of it, the next is believed to gain as much: rates are noisy, this isn't.
const SHRINKING: f64 = 0.7;
/// The same where bytes count as well.
const SHRINKING_FAST: f64 = 0.5;
/// A second for which a guest stands still is worth so many on the link, as long as nobody says how long it may.
const STANDING_STILL: f64 = 0.5;
/// A round of fewer bytes doesn't say how fast rounds go over.
const TELLING_BYTES: u64 = 512 * 1024;
/// Nobody minds so many more seconds of downtime, or so large a part of what it is anyway.
const LITTLE_SECONDS: f64 = 0.1;
const LITTLE_PART: f64 = 0.25;
/// So much of its memory at most, one hopes, has a guest changed while all of it was sent.
const UNKNOWN_PART: f64 = 0.5;

/// A round: the memory was read, and what the destination lacked was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// When it began, in seconds since the migration did.
    pub at: f64,
    /// How long reading the memory and making a layer of it took.
    pub read_seconds: f64,
    /// How long sending took.
    pub send_seconds: f64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Bytes of memory that were read.
    pub memory_bytes: u64,
    /// What had changed when it was over, if somebody looked.
    #[serde(default)]
    pub left: Option<Left>,
}

/// What a guest has changed since its memory was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Left {
    /// When it was looked at, in seconds since the migration began.
    pub at: f64,
    /// What would go over if it stopped then, in bytes on the wire.
    pub bytes: u64,
}

impl Round {
    /// How long it took.
    pub fn seconds(&self) -> f64 {
        self.read_seconds + self.send_seconds
    }
}

/// How many rounds there are to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounds {
    /// As many as make the downtime shorter.
    #[default]
    Auto,
    /// This many.
    Exactly(u8),
}

/// What a link does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSpeed {
    /// Bytes per second.
    pub rate: f64,
    /// Seconds of a round trip.
    pub round_trip: f64,
}

/// How fast memory changes, in bytes on the wire per second; none before two rounds, or a look after the first.
pub fn dirty_rate(rounds: &[Round]) -> Option<f64> {
    if let Some((last, left)) = looked(rounds) {
        return Some(left.bytes as f64 / (left.at - last.at));
    }
    let [.., before, last] = rounds else { return None };
    let since = last.at - before.at;
    (since > 0.0).then(|| last.bytes as f64 / since)
}

/// The last round, and what was seen after it.
fn looked(rounds: &[Round]) -> Option<(&Round, Left)> {
    let last = rounds.last()?;
    last.left.filter(|left| left.at > last.at).map(|left| (last, left))
}

/// What would be sent if the guest stopped at `now`, in bytes.
pub fn bytes_left(rounds: &[Round], now: f64) -> f64 {
    let Some(last) = rounds.last() else { return 0.0 };
    match dirty_rate(rounds) {
        // What changes again and again is sent once: it is never more than the whole memory.
        Some(rate) => (rate * (now - last.at)).min(most(rounds)),
        // One round tells nothing of the rate: a tenth of it is a common guess.
        None => last.bytes as f64 * 0.1,
    }
}

/// The most that a round has sent, or left to be sent, which is about what all of the memory takes.
fn most(rounds: &[Round]) -> f64 {
    let left = looked(rounds).map_or(0, |(_, left)| left.bytes);
    rounds.iter().map(|round| round.bytes).max().unwrap_or_default().max(left) as f64
}

/// How fast rounds go over: as the link does, or slower if what they send takes longer to make.
pub fn pace(rounds: &[Round], link: LinkSpeed) -> LinkSpeed {
    let telling = rounds.iter().rev().find(|round| round.bytes >= TELLING_BYTES && round.send_seconds > 0.0);
    let rate = telling.map_or(link.rate, |round| link.rate.min(round.bytes as f64 / round.send_seconds));
    LinkSpeed { rate, ..link }
}

/// Whether memory changes about as fast as this link carries it, or faster. How much faster can't be seen: a round sends what has
/// changed while the one before was sent, so it is never seen to send more in a time than the link carries.
pub fn is_too_fast(rounds: &[Round], link: LinkSpeed) -> bool {
    let (before, last) = match (looked(rounds), rounds) {
        // The next round would send what is left.
        (Some((last, left)), _) => (last.bytes, left.bytes),
        (None, [.., before, last]) => (before.bytes, last.bytes),
        _ => return false,
    };
    let is_telling = last as f64 / link.rate > WORTHWHILE_SECONDS;
    let stays = last as f64 > before as f64 * SATURATED;
    is_telling && stays && dirty_rate(rounds).is_some_and(|rate| rate > link.rate / 2.0)
}

/// What a move is out for, beside moving.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wish {
    /// How many rounds.
    pub rounds: Rounds,
    /// The most seconds for which the guest may stand still, if somebody cares.
    pub max_downtime: Option<f64>,
}

impl Wish {
    /// For how many seconds memory may be sent while the guest stands still, if everything else in that time takes `fixed` seconds.
    pub fn room(&self, fixed: f64) -> f64 {
        match self.max_downtime {
            Some(most) => most - fixed,
            None => LITTLE_SECONDS.max(fixed * LITTLE_PART),
        }
    }
}

/// Why no further round is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enough {
    /// So many were asked for.
    Asked,
    /// There are never more.
    Most,
    /// What is left takes no longer than it may.
    Little,
    /// Memory changes about as fast as it can be sent.
    TooFast,
    /// Another one would not make the downtime noticeably shorter.
    NoGain,
    /// It would, but by less than it would cost: what changes meanwhile goes again.
    TooDear,
}

/// Whether another round is to be made, and if not why. `fixed` is how many seconds the guest would stand still if nothing were left to
/// be sent.
pub fn enough(rounds: &[Round], wish: Wish, fixed: f64, link: LinkSpeed) -> Option<Enough> {
    if let Rounds::Exactly(count) = wish.rounds {
        return (rounds.len() >= usize::from(count)).then_some(Enough::Asked);
    }
    let last = rounds.last()?;
    if rounds.len() >= MAX_ROUNDS {
        return Some(Enough::Most);
    }
    let (room, now) = (wish.room(fixed), bytes_left(rounds, last.at + last.seconds()));
    let Some(rate) = dirty_rate(rounds) else {
        // The second one tells the rate, or a look. It isn't needed if even half of the first would be little, or took no time.
        let is_little = last.bytes as f64 * UNKNOWN_PART / link.rate <= room && wish.max_downtime.is_none();
        let took_none = last.seconds() <= 2.0 * WORTHWHILE_SECONDS;
        return is_little.then_some(Enough::Little).or(took_none.then_some(Enough::NoGain));
    };
    if now / link.rate <= room {
        return Some(Enough::Little);
    }
    let by_rounds = pace(rounds, link);
    if is_too_fast(rounds, by_rounds) {
        return Some(Enough::TooFast);
    }
    if let (None, [.., before, _]) = (looked(rounds), rounds) {
        let shrunk_to = last.bytes as f64 / before.bytes.max(1) as f64;
        let most_of_it = if wish.max_downtime.is_some() { SHRINKING } else { SHRINKING_FAST };
        if shrunk_to < most_of_it && last.bytes as f64 * (1.0 - shrunk_to) / by_rounds.rate > WORTHWHILE_SECONDS {
            return None;
        }
    }
    // What changes in another round is what would be sent again after it.
    let seconds = last.read_seconds + now / by_rounds.rate + 2.0 * link.round_trip;
    let then = (rate * seconds).min(most(rounds));
    let gained = (now - then) / link.rate;
    if gained <= WORTHWHILE_SECONDS.max(now / link.rate * WORTHWHILE_PART) {
        return Some(Enough::NoGain);
    }
    // Somebody who set a limit wants it kept, whatever it costs.
    (wish.max_downtime.is_none() && gained * STANDING_STILL < then / link.rate).then_some(Enough::TooDear)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkSpeed = LinkSpeed { rate: 12.5e6, round_trip: 0.001 };

    const AUTO: Wish = Wish { rounds: Rounds::Auto, max_downtime: None };

    /// The rounds of a machine that shows a film, as they were recorded: how long reading took, how long sending, and megabytes.
    const MACHINE_WITH_FILM: [(f64, f64, f64); 6] = [
        (0.5, 4.26, 26.8),
        (0.24, 1.59, 17.0),
        (0.23, 0.94, 9.2),
        (0.22, 0.64, 5.6),
        (0.2, 0.5, 4.5),
        (0.21, 0.44, 3.6),
    ];

    /// What a guest does that changes `rate` bytes per second, `memory` at first, until the planner has enough.
    fn run_with(wish: Wish, fixed: f64, memory: f64, rate: f64, read: f64) -> (Vec<Round>, Enough) {
        let mut rounds: Vec<Round> = Vec::new();
        loop {
            if let Some(why) = enough(&rounds, wish, fixed, LINK) {
                return (rounds, why);
            }
            let at = rounds.last().map_or(0.0, |last| last.at + last.seconds());
            let bytes = rounds.last().map_or(memory, |last| (rate * (at - last.at)).min(memory));
            let (bytes, memory_bytes) = (bytes as u64, memory as u64);
            let send_seconds = bytes as f64 / LINK.rate;
            rounds.push(Round { at, read_seconds: read, send_seconds, bytes, memory_bytes, left: None });
            assert!(rounds.len() <= MAX_ROUNDS);
        }
    }

    fn run(memory: f64, rate: f64, read: f64) -> Vec<Round> {
        run_with(AUTO, 0.0, memory, rate, read).0
    }

    fn round(at: f64, read_seconds: f64, send_seconds: f64, megabytes: f64) -> Round {
        let bytes = (megabytes * 1e6) as u64;
        Round { at, read_seconds, send_seconds, bytes, memory_bytes: 18 << 20, left: None }
    }

    /// Rounds as they were recorded, one after the other: how long reading took, how long sending, and megabytes.
    fn recorded(rounds: &[(f64, f64, f64)]) -> Vec<Round> {
        let mut at = 0.0;
        let next = |&(read, send, megabytes): &(f64, f64, f64)| {
            let round = round(at, read, send, megabytes);
            at += round.seconds();
            round
        };
        rounds.iter().map(next).collect()
    }

    /// After how many of the `recorded` rounds it is enough, with a link as fast as the round before was, and why.
    fn stops_after(recorded: &[Round], wish: Wish, fixed: f64) -> (usize, Option<Enough>) {
        let link = |count: usize| {
            let telling = recorded[..count].iter().rev().find(|round| round.bytes >= 512 * 1024);
            telling.map_or(LINK, |round| LinkSpeed { rate: round.bytes as f64 / round.send_seconds, ..LINK })
        };
        let found =
            (0..=recorded.len()).find_map(|count| Some((count, enough(&recorded[..count], wish, fixed, link(count))?)));
        found.map_or((recorded.len(), None), |(count, why)| (count, Some(why)))
    }

    #[test]
    fn rounds_go_on_while_they_help() {
        // 330 MB, 2 MB/s: a round or two more, until reading the memory takes longer than sending what changed.
        let rounds = run(330e6, 2e6, 0.4);
        assert!((3..=6).contains(&rounds.len()), "{}", rounds.len());
        let last = rounds[rounds.len() - 1];
        assert!(bytes_left(&rounds, last.at + last.seconds()) < 2e6);
    }

    #[test]
    fn a_guest_that_is_faster_than_the_link_ends_soon() {
        assert!(run(330e6, 60e6, 0.4).len() <= 3);
        assert!(run(330e6, LINK.rate, 0.4).len() <= 3);
    }

    #[test]
    fn one_that_is_about_as_fast_as_the_link_ends_soon_and_is_told_from_others() {
        for part in [0.93, 0.97, 1.0, 1.5, 10.0] {
            let (rounds, why) = run_with(AUTO, 0.0, 16e6, LINK.rate * part, 0.05);
            assert!(rounds.len() <= 3 && why == Enough::TooFast, "{part}: {why:?}, {rounds:?}");
        }
        for part in [0.0, 0.1, 0.5, 0.7] {
            let (rounds, why) = run_with(AUTO, 0.0, 16e6, LINK.rate * part, 0.05);
            assert!(why != Enough::TooFast, "{part}: {rounds:?}");
        }
        // The first round found most of it there; the others send all of the memory.
        let slow = LinkSpeed { rate: 2.3e6, round_trip: 0.001 };
        let all = [round(0.0, 0.05, 6.5, 12.2), round(5.1, 0.05, 6.5, 15.4)];
        assert_eq!(enough(&all, AUTO, 0.0, slow), Some(Enough::TooFast));
        // A busy machine: the link seems slow, but each round is much smaller than the last.
        let busy = [round(0.0, 0.05, 6.5, 347.1), round(14.0, 0.05, 6.5, 50.8)];
        assert_eq!(enough(&busy, AUTO, 0.0, LinkSpeed { rate: 4.0e6, ..slow }), None);
    }

    #[test]
    fn rounds_that_send_again_more_than_they_save_are_not_made() {
        // A film, in a container and in a machine, and a machine that rewrites 500 pages a second, as they were recorded.
        let film =
            recorded(&[(0.09, 1.1, 8.9), (0.05, 0.48, 4.1), (0.05, 0.31, 1.7), (0.05, 0.21, 0.7), (0.05, 0.18, 0.9)]);
        assert_eq!(stops_after(&film, AUTO, 0.7), (4, Some(Enough::Little)));
        assert_eq!(stops_after(&recorded(&MACHINE_WITH_FILM), AUTO, 0.9), (2, Some(Enough::TooDear)));
        let pages = recorded(&[(1.0, 30.0, 347.0), (0.6, 5.2, 60.0), (0.6, 1.0, 11.0), (0.6, 0.4, 3.4)]);
        assert_eq!(stops_after(&pages, AUTO, 1.2), (3, Some(Enough::Little)));
        // Without a film nothing changes: the second round says so.
        assert_eq!(stops_after(&recorded(&[(0.53, 2.88, 19.9), (0.15, 0.01, 0.01)]), AUTO, 0.8).0, 2);
    }

    #[test]
    fn rounds_that_take_long_to_make_say_nothing_of_the_link() {
        // A machine's first round: 8 MB that were searched for during 13 s, and what has changed meanwhile would take the link 0.3 s.
        let left = Some(Left { at: 13.6, bytes: 4_000_000 });
        let rounds = [Round { left, ..round(0.0, 0.5, 13.0, 8.0) }];
        assert!(pace(&rounds, LINK).rate < 0.7e6);
        assert_eq!(enough(&rounds, AUTO, 1.4, LINK), Some(Enough::Little));
        // Another round would take half as long as this one, and what changes meanwhile goes again.
        assert_eq!(enough(&rounds, AUTO, 0.4, LINK), Some(Enough::TooDear));
        // Little of it tells nothing.
        assert_eq!(pace(&[round(0.0, 0.1, 3.0, 0.4)], LINK), LINK);
    }

    #[test]
    fn a_look_after_a_round_tells_what_the_next_one_would_send() {
        // Of each: seconds of reading and sending, megabytes, and what had changed by then.
        let looked = |read: f64, send: f64, megabytes: f64, left: f64| {
            let left = Left { at: read + send + 0.05, bytes: (left * 1e6) as u64 };
            vec![Round { left: Some(left), ..round(0.0, read, send, megabytes) }]
        };
        let link = |rounds: &[Round]| LinkSpeed { rate: rounds[0].bytes as f64 / rounds[0].send_seconds, ..LINK };
        let after = |rounds: &[Round], fixed: f64| enough(rounds, AUTO, fixed, link(rounds));
        // A film in a container: what it has changed is a third of its memory, and would be nearly as much again.
        let film = looked(0.09, 1.1, 8.9, 4.1);
        assert_eq!(after(&film, 0.7), Some(Enough::TooDear));
        assert!((bytes_left(&film, film[0].left.unwrap().at) - 4.1e6).abs() < 10.0);
        // Somebody who says how long it may stand still gets a second round.
        let wish = Wish { max_downtime: Some(0.8), ..AUTO };
        assert_eq!(enough(&film, wish, 0.7, link(&film)), None);
        // Much memory that changes slowly, little that has changed, and all of it that has.
        assert_eq!(after(&looked(1.0, 30.0, 347.0, 60.0), 1.2), None);
        assert_eq!(after(&looked(0.5, 2.9, 19.9, 0.1), 0.8), Some(Enough::Little));
        assert_eq!(after(&looked(0.05, 6.5, 15.0, 15.4), 0.8), Some(Enough::TooFast));
        // What was left out of a round is left as well.
        assert!(bytes_left(&looked(0.09, 1.1, 2.0, 4.1), 10.0) > 4.0e6);
    }

    #[test]
    fn a_limit_is_kept_whatever_it_costs_and_no_more_is_done_than_that() {
        let at_most = |seconds: f64| Wish { max_downtime: Some(seconds), ..AUTO };
        let rounds = recorded(&MACHINE_WITH_FILM);
        assert_eq!(stops_after(&rounds, at_most(5.0), 0.9), (2, Some(Enough::Little)));
        assert!(stops_after(&rounds, at_most(1.3), 0.9).0 > stops_after(&rounds, AUTO, 0.9).0);
        // Half of the first round isn't known to be all that changes: a limit wants to be sure.
        let little = recorded(&[(0.1, 0.2, 1.0)]);
        assert_eq!(stops_after(&little, AUTO, 0.9), (1, Some(Enough::Little)));
        assert_eq!(stops_after(&little, at_most(2.0), 0.9), (1, None));
    }

    #[test]
    fn an_idle_guest_takes_two_rounds_and_a_tiny_one_takes_one() {
        assert_eq!(run(330e6, 0.0, 0.4).len(), 2);
        assert_eq!(run(1e5, 0.0, 0.01).len(), 1);
    }

    #[test]
    fn a_number_is_obeyed() {
        let (round, exactly) = (Round::default(), |count| Wish { rounds: Rounds::Exactly(count), ..AUTO });
        assert_eq!(enough(&[], exactly(0), 0.0, LINK), Some(Enough::Asked));
        assert_eq!(enough(&[round; 2], exactly(3), 0.0, LINK), None);
        assert_eq!(enough(&[round; 3], exactly(3), 0.0, LINK), Some(Enough::Asked));
    }
}
