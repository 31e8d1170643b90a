//! Every interleaving of both machines: each side dies between any two steps (the program alone, or the machine with the
//! guest), messages are lost, repeated and overtake each other, a side may have forgotten the move, the source's operator
//! takes the guest back when the destination is dead and gives it up when it can't go on, and everything that can fail does.
//! A row that can't be written is as a death before it, and one of which that isn't sure as a death before or after it. A guest that has gone
//! on from its state changes its disk at any time, also before that it went on is written; a machine then dies with it.
//! Checked in each state: never two running; nobody runs it whose turn it isn't; nothing is left of what was given up; no state is restored
//! over a disk that is newer. And from each state, once faults end, both sides come to agree, with exactly one running, or none if the operator
//! has given it up, or if it went on and died with its machine (which at the destination its operator is asked about).

use std::collections::{HashMap, VecDeque};

use super::Fate;
use super::destination::{self as there, Destination, Found};
use super::source::{self as here, Outcome, Source};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copy {
    Nothing,
    Running,
    Frozen,
}

/// A disk, beside the state that belongs to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Ground {
    AsItWas,
    /// The guest has gone on from the state, and has changed it.
    Newer,
    /// The same; and it has died, and that is known.
    Over,
}

/// The source's operator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Operator {
    Absent,
    /// Has decided nothing yet.
    Watching,
    HasTakenBack,
    HasGivenUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
enum Packet {
    Stage,
    Commit,
    Abort,
    Inquire,
    Reply(u8),
    Ask,
    Answer(u8),
}

impl Packet {
    fn is_to_source(self) -> bool {
        matches!(self, Packet::Reply(_) | Packet::Ask)
    }
}

fn code(fate: Fate) -> u8 {
    Fate::ALL.iter().position(|other| *other == fate).unwrap() as u8
}

fn fate(code: u8) -> Fate {
    Fate::ALL[usize::from(code)]
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    source: Option<Source>,
    source_todo: Vec<here::Step>,
    source_disk: here::Phase,
    source_copy: Copy,
    source_ground: Ground,
    is_dumped: bool,
    side: Option<Destination>,
    side_todo: Vec<there::Step>,
    side_disk: there::Phase,
    side_copy: Copy,
    side_ground: Ground,
    gives_back: bool,
    net: Vec<Packet>,
    crashes: u8,
    operator: Operator,
}

/// A step to another state, and whether it is one that happens without faults.
type Edge = (State, bool);

impl State {
    fn first(gives_back: bool, has_operator: bool) -> State {
        State {
            source: Some(Source::new(here::Phase::Moving)),
            source_todo: Vec::new(),
            source_disk: here::Phase::Moving,
            source_copy: Copy::Running,
            source_ground: Ground::AsItWas,
            is_dumped: false,
            side: Some(Destination::new(there::Phase::Arriving, gives_back)),
            side_todo: Vec::new(),
            side_disk: there::Phase::Arriving,
            side_copy: Copy::Nothing,
            side_ground: Ground::AsItWas,
            gives_back,
            net: Vec::new(),
            // An operator who decides needs one; more would make too many states.
            crashes: if has_operator { 1 } else { 2 },
            operator: if has_operator { Operator::Watching } else { Operator::Absent },
        }
    }

    fn put(&mut self, packet: Packet) {
        if !self.net.contains(&packet) {
            self.net.push(packet);
            self.net.sort();
        }
    }

    fn with(&self, change: impl FnOnce(&mut State)) -> State {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn source_on(&mut self, event: here::Event) {
        if let Some(source) = &mut self.source {
            let steps = source.on(event);
            self.source_todo.extend(steps);
        }
    }

    /// What a destination's steps lead to goes in front of what is still to be done.
    fn side_on(&mut self, event: there::Event) {
        if let Some(side) = &mut self.side {
            let mut steps = side.on(event);
            steps.append(&mut self.side_todo);
            self.side_todo = steps;
        }
    }

    fn source_edges(&self, out: &mut Vec<Edge>) {
        use here::{Event, Phase, Step};
        let Some(source) = self.source else {
            let restarted = self.with(|s| {
                s.source = Some(Source::new(s.source_disk));
                s.source_on(Event::Restarted);
            });
            out.push((restarted, true));
            return;
        };
        if let Some(step) = self.source_todo.first().copied() {
            let done = self.with(|s| {
                s.source_todo.remove(0);
                match step {
                    Step::Journal(phase) => s.source_disk = phase,
                    Step::Resume => {
                        // From the frozen copy, or from the state if that died with the machine.
                        match (s.source_copy, s.source_ground) {
                            (Copy::Nothing, Ground::Newer | Ground::Over) => s.source_ground = Ground::Over,
                            _ => s.source_copy = Copy::Running,
                        }
                        s.source_on(Event::Resumed);
                    }
                    Step::Discard => {
                        s.source_copy = Copy::Nothing;
                        s.source_on(Event::Discarded);
                    }
                    Step::End => {
                        s.source_copy = Copy::Nothing;
                        s.source_on(Event::Ended);
                    }
                    Step::Abort => s.put(Packet::Abort),
                    Step::Commit => s.put(Packet::Commit),
                    Step::AskLater => s.put(Packet::Inquire),
                }
            });
            out.push((done, true));
            let gives_up = match source.phase {
                Phase::Returned => self.operator == Operator::HasTakenBack,
                _ => self.operator == Operator::Watching,
            };
            if step == Step::Resume && gives_up {
                // It can't go on, or fails to when it runs already.
                for copy in [self.source_copy, Copy::Running] {
                    let given_up = self.with(|s| {
                        (s.source_copy, s.source_todo) = (copy, Vec::new());
                        s.operator = Operator::HasGivenUp;
                        s.source_on(Event::GiveUp);
                    });
                    out.push((given_up, false));
                }
            }
            return;
        }
        match source.phase {
            Phase::Moving => {
                out.push((self.with(|s| s.source_on(Event::Stop)), true));
                out.push((self.with(|s| s.source_on(Event::Failed)), true));
            }
            Phase::Stopping => {
                if !self.is_dumped {
                    let dumped = self.with(|s| {
                        s.source_copy = Copy::Frozen;
                        s.is_dumped = true;
                    });
                    out.push((dumped, true));
                    let half = self.with(|s| {
                        s.source_copy = Copy::Frozen;
                        s.source_on(Event::Failed);
                    });
                    out.push((half, false));
                } else {
                    out.push((self.with(|s| s.put(Packet::Stage)), true));
                }
                out.push((self.with(|s| s.source_on(Event::Failed)), true));
            }
            Phase::Released => {
                out.push((self.with(|s| s.source_on(Event::Silence)), true));
                // The operator has seen that nothing runs there; what was on its way there died with it.
                if self.operator == Operator::Watching && self.side.is_none() && self.side_copy == Copy::Nothing {
                    let taken_back = self.with(|s| {
                        s.operator = Operator::HasTakenBack;
                        s.net.retain(|packet| packet.is_to_source());
                        s.source_on(Event::RunHere);
                        assert_eq!(s.source_todo.remove(0), Step::Journal(Phase::Returned));
                        s.source_disk = Phase::Returned;
                    });
                    out.push((taken_back, false));
                }
            }
            _ => {}
        }
    }

    fn side_edges(&self, out: &mut Vec<Edge>) {
        use there::{Event, Phase, Step};
        let Some(side) = self.side else {
            let restarted = self.with(|s| {
                s.side = Some(Destination::new(s.side_disk, s.gives_back));
                s.side_on(Event::Restarted);
            });
            out.push((restarted, true));
            return;
        };
        if let Some(step) = self.side_todo.first().copied() {
            let after = |change: &dyn Fn(&mut State)| {
                self.with(|s| {
                    s.side_todo.remove(0);
                    change(s);
                })
            };
            let tried = |copy: Copy, found: Found| {
                after(&|s| {
                    s.side_copy = copy;
                    s.side_on(Event::Tried(found));
                })
            };
            match step {
                Step::Journal(phase) => out.push((after(&|s| s.side_disk = phase), true)),
                Step::Make => {
                    out.push((after(&|s| s.side_on(Event::Made(true))), true));
                    out.push((after(&|s| s.side_on(Event::Made(false))), false));
                }
                Step::Restore if self.side_copy == Copy::Nothing && self.side_ground != Ground::AsItWas => {
                    out.push((tried(Copy::Nothing, Found::WentOn), true));
                    out.push((tried(Copy::Nothing, Found::Unknown), false));
                }
                Step::Restore => {
                    out.push((tried(Copy::Running, Found::Running), true));
                    out.push((tried(Copy::Running, Found::Unknown), false));
                    if self.side_copy == Copy::Nothing {
                        out.push((tried(Copy::Nothing, Found::Nothing), false));
                        out.push((tried(Copy::Nothing, Found::Unknown), false));
                    }
                }
                Step::Clear => {
                    let cleared = after(&|s| {
                        (s.side_copy, s.side_ground) = (Copy::Nothing, Ground::AsItWas);
                        s.side_on(Event::Cleared(true));
                    });
                    out.push((cleared, true));
                    out.push((after(&|s| s.side_on(Event::Cleared(false))), false));
                }
                Step::Reply(fate) => out.push((after(&|s| s.put(Packet::Reply(code(fate)))), true)),
                Step::AskLater => out.push((after(&|s| s.put(Packet::Ask)), true)),
                // What waits is tried again at any time, below.
                Step::AgainLater => out.push((after(&|_| ()), true)),
            }
            return;
        }
        match side.phase {
            Phase::Arriving => out.push((self.with(|s| s.side_on(Event::Expired)), true)),
            Phase::Staged => out.push((self.with(|s| s.side_on(Event::Silence)), true)),
            Phase::Committed => {
                out.push((self.with(|s| s.side_on(Event::Again)), true));
                out.push((self.with(|s| s.side_on(Event::Silence)), true));
                if self.side_copy == Copy::Nothing && self.side_ground != Ground::AsItWas {
                    // Its operator is told, and decides.
                    let over = self.with(|s| {
                        s.side_ground = Ground::Over;
                        s.side_on(Event::RunHere);
                    });
                    out.push((over, true));
                    out.push((self.with(|s| s.side_on(Event::GiveUp)), true));
                }
            }
            Phase::Refused => out.push((self.with(|s| s.side_on(Event::Again)), true)),
            _ => {}
        }
    }

    fn deliver(&mut self, packet: Packet) {
        use there::Event as To;
        match packet {
            Packet::Stage => self.side_on(To::Stage),
            Packet::Commit => self.side_on(To::Commit),
            Packet::Abort => self.side_on(To::Abort),
            Packet::Inquire => self.side_on(To::Inquire),
            Packet::Answer(code) => self.side_on(To::Told(fate(code))),
            // Answered from the journal, not from memory.
            Packet::Ask => self.put(Packet::Answer(code(self.source_disk.fate()))),
            Packet::Reply(code) => self.source_on(match (self.source.map(|source| source.phase), fate(code)) {
                (Some(here::Phase::Stopping), Fate::Staged) => here::Event::Staged,
                (Some(here::Phase::Stopping | here::Phase::Moving), _) => here::Event::Failed,
                (_, fate) => here::Event::Told(fate),
            }),
        }
    }

    fn edges(&self) -> Vec<Edge> {
        let mut out = Vec::new();
        self.source_edges(&mut out);
        self.side_edges(&mut out);
        for (at, packet) in self.net.iter().enumerate() {
            let is_idle = match packet.is_to_source() {
                true => self.source.is_some() && (self.source_todo.is_empty() || *packet == Packet::Ask),
                false => self.side.is_some() && self.side_todo.is_empty(),
            };
            let without = self.with(|s| {
                s.net.remove(at);
            });
            if is_idle {
                out.push((without.with(|s| s.deliver(*packet)), true));
                out.push((self.with(|s| s.deliver(*packet)), false));
                // Whoever is asked has forgotten the move.
                let unknown = match packet {
                    Packet::Ask => Some(Packet::Answer(code(Fate::Unknown))),
                    _ => None,
                };
                if let Some(unknown) = unknown {
                    out.push((without.with(|s| s.put(unknown)), false));
                }
            }
            out.push((without, false));
        }
        out.extend(self.writes().map(|wrote| (wrote, false)));
        if self.crashes > 0 {
            for with_guest in [false, true] {
                if self.source.is_some() {
                    let died = self.with(|s| {
                        (s.source, s.source_todo) = (None, Vec::new());
                        s.crashes -= 1;
                        // When it is over what becomes of it is its own affair.
                        if with_guest && s.is_dumped && !s.source_disk.is_ended() {
                            s.source_copy = Copy::Nothing;
                        }
                    });
                    out.push((died, false));
                }
                if self.side.is_some() {
                    let died = self.with(|s| {
                        (s.side, s.side_todo) = (None, Vec::new());
                        s.crashes -= 1;
                        if with_guest && s.side_disk == there::Phase::Committed {
                            s.side_copy = Copy::Nothing;
                        }
                    });
                    out.push((died, false));
                }
            }
        }
        out
    }

    /// A guest that has gone on and of which that isn't on record changes its disk. Nobody asks about the disk of another.
    fn writes(&self) -> impl Iterator<Item = State> {
        let is_taken_back = self.is_dumped && !self.source_disk.is_ended() && self.source_copy == Copy::Running;
        let is_restored = self.side_disk == there::Phase::Committed && self.side_copy == Copy::Running;
        let here = (is_taken_back && self.source_ground == Ground::AsItWas)
            .then(|| self.with(|s| s.source_ground = Ground::Newer));
        let there =
            (is_restored && self.side_ground == Ground::AsItWas).then(|| self.with(|s| s.side_ground = Ground::Newer));
        here.into_iter().chain(there)
    }

    fn check(&self) {
        use here::Phase;
        let (source_runs, side_runs) = (self.source_copy == Copy::Running, self.side_copy == Copy::Running);
        assert!(!(source_runs && side_runs), "two run: {self:?}");
        let is_given_up = self.source_disk == Phase::Ended(Outcome::GivenUp);
        let is_released =
            is_given_up || matches!(self.source_disk, Phase::Released | Phase::Gone | Phase::Ended(Outcome::Moved));
        assert!(!is_given_up || self.source_copy == Copy::Nothing, "given up, but not gone: {self:?}");
        assert!(!(source_runs && is_released), "the source runs what it released: {self:?}");
        let is_owned = matches!(self.side_disk, there::Phase::Committed | there::Phase::Restored);
        assert!(!side_runs || (is_owned && is_released), "the destination runs what isn't its: {self:?}");
        assert!(!(source_runs && self.source_ground == Ground::Over), "an old state over a newer disk: {self:?}");
        assert!(!(side_runs && self.side_ground == Ground::Over), "an old state over a newer disk: {self:?}");
        let has_gone = matches!(self.source_disk, Phase::Gone | Phase::Ended(Outcome::Moved));
        assert!(!has_gone || self.side_disk == there::Phase::Restored, "gone, but never restored: {self:?}");
    }

    fn is_good(&self) -> bool {
        let (source_runs, side_runs) = (self.source_copy == Copy::Running, self.side_copy == Copy::Running);
        let is_over = [self.source_ground, self.side_ground].contains(&Ground::Over);
        let is_nobodys = !source_runs && !side_runs && (is_over || self.operator == Operator::HasGivenUp);
        self.source_disk.is_ended()
            && self.side_disk.is_ended()
            && self.source.is_some()
            && self.side.is_some()
            && (source_runs != side_runs || is_nobodys)
    }
}

fn explore(gives_back: bool, has_operator: bool) {
    let first = State::first(gives_back, has_operator);
    let mut numbers: HashMap<State, usize> = HashMap::from([(first.clone(), 0)]);
    let mut queue = VecDeque::from([first]);
    // Who comes to each state without a fault.
    let mut from: Vec<Vec<usize>> = vec![Vec::new()];
    let mut good = Vec::new();
    while let Some(state) = queue.pop_front() {
        state.check();
        let number = numbers[&state];
        if state.is_good() {
            good.push(number);
        }
        for (next, is_faultless) in state.edges() {
            let known = numbers.len();
            let to = *numbers.entry(next.clone()).or_insert(known);
            if to == known {
                from.push(Vec::new());
                queue.push_back(next);
            }
            if is_faultless {
                from[to].push(number);
            }
        }
        assert!(numbers.len() < 5_000_000, "the model has grown too large");
    }
    let mut can_end = vec![false; from.len()];
    while let Some(number) = good.pop() {
        if !std::mem::replace(&mut can_end[number], true) {
            good.extend(&from[number]);
        }
    }
    if let Some((state, _)) = numbers.iter().find(|(_, number)| !can_end[**number]) {
        panic!("{} states, and from this one it never ends well: {state:?}", numbers.len());
    }
    assert!(numbers.len() > 1000, "only {} states", numbers.len());
}

#[test]
fn never_two_and_never_none_with_a_guest_that_may_come_back() {
    explore(true, false);
}

#[test]
fn never_two_and_never_none_with_a_guest_that_stays() {
    explore(false, false);
}

#[test]
fn never_two_and_never_none_with_an_operator_who_takes_it_back_or_gives_it_up() {
    explore(true, true);
}
