//! What one measurement is of, by name: `lxc/ram/found/ours`, `kvm/ram:600/found/paper`, `lxc/ram/found/ours@10`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A bare process tree by CRIU: a stand-in, no column of the paper's.
    Process,
    /// LXC.
    Lxc,
    /// A machine by QEMU; by emulation, where there is no KVM.
    Kvm,
}

/// The application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum App {
    /// No application.
    None,
    /// A game server.
    Game,
    /// Memory of so many MB that changes.
    Ram(u32),
    /// Video streaming.
    Video,
    /// Face detection.
    Face,
}

/// What is at the destination when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Case {
    /// Two layers: the base only, and the application is part of the instance.
    Two,
    /// Three layers, of which the base is there.
    NotFound,
    /// Three layers, of which base and application are there.
    Found,
}

/// Who moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Method {
    /// The paper's: copies of folders, rsync, and the tools' checkpoints.
    Paper,
    /// `layerctl migrate`, as one would give the order for this application.
    Ours,
    /// `layerctl migrate` by rounds alone, where [`Method::Ours`] sends memory after the guest has moved; only when asked for.
    Rounds,
}

/// The paper's memory size, in MB, and its link, in Mbit/s.
pub const RAM: u32 = 330;
/// The paper's link, in Mbit/s.
pub const MEGABITS: u32 = 100;

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell {
    /// What runs the guest.
    pub kind: Kind,
    /// What runs in it.
    pub app: App,
    /// What is there already.
    pub case: Case,
    /// The link's rate.
    pub megabits: u32,
    /// Who moves it.
    pub method: Method,
}

impl Kind {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Process => "process",
            Kind::Lxc => "lxc",
            Kind::Kvm => "kvm",
        }
    }
}

impl App {
    /// The table's rows.
    pub const ROWS: [App; 5] = [App::None, App::Game, App::Ram(RAM), App::Video, App::Face];

    /// Its name.
    pub fn name(self) -> String {
        match self {
            App::None => "none".to_owned(),
            App::Game => "game".to_owned(),
            App::Ram(RAM) => "ram".to_owned(),
            App::Ram(megabytes) => format!("ram:{megabytes}"),
            App::Video => "video".to_owned(),
            App::Face => "face".to_owned(),
        }
    }

    /// What the paper calls it.
    pub fn title(self) -> &'static str {
        match self {
            App::None => "No Application",
            App::Game => "Game Server",
            App::Ram(_) => "RAM Simulation",
            App::Video => "Video Streaming",
            App::Face => "Face Detection",
        }
    }
}

impl Case {
    /// All, as the table has them.
    pub const ALL: [Case; 3] = [Case::Two, Case::NotFound, Case::Found];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Case::Two => "two",
            Case::NotFound => "not-found",
            Case::Found => "found",
        }
    }
}

impl Method {
    /// Those of the tables; the paper's first.
    pub const ALL: [Method; 2] = [Method::Paper, Method::Ours];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Paper => "paper",
            Method::Ours => "ours",
            Method::Rounds => "rounds",
        }
    }
}

impl Cell {
    /// A cell of Table I.
    pub fn of_table(kind: Kind, app: App, case: Case, method: Method) -> Cell {
        Cell { kind, app, case, megabits: MEGABITS, method }
    }

    /// The same, moved by `method`.
    pub fn by(self, method: Method) -> Cell {
        Cell { method, ..self }
    }

    /// The cells of Table I (and of Figure 4, which breaks some of them down).
    pub fn table() -> Vec<Cell> {
        let mut cells = Vec::new();
        for kind in [Kind::Lxc, Kind::Kvm] {
            for app in App::ROWS {
                for case in Case::ALL {
                    cells.extend(Method::ALL.map(|method| Cell::of_table(kind, app, case, method)));
                }
            }
        }
        cells
    }

    /// The cells of Figure 5, above: memory sizes.
    pub fn by_memory() -> Vec<Cell> {
        Cell::figure(&[50, 100, 200, RAM, 400, 600].map(|megabytes| (App::Ram(megabytes), MEGABITS)))
    }

    /// The cells of Figure 5, below: rates of the link.
    pub fn by_rate() -> Vec<Cell> {
        Cell::figure(&[1, 5, 10, 20, 50, MEGABITS].map(|megabits| (App::Ram(RAM), megabits)))
    }

    fn figure(points: &[(App, u32)]) -> Vec<Cell> {
        let mut cells = Vec::new();
        for kind in [Kind::Lxc, Kind::Kvm] {
            for &(app, megabits) in points {
                let cell = |method| Cell { kind, app, case: Case::Found, megabits, method };
                cells.extend(Method::ALL.map(cell));
            }
        }
        cells
    }

    /// All cells, each once, what tells the most first: the application found, then what isn't; then Figure 5, the slowest links last.
    pub fn all() -> Vec<Cell> {
        let mut cells = Cell::table();
        cells.sort_by_key(|cell| std::cmp::Reverse(cell.case));
        let mut by_rate = Cell::by_rate();
        by_rate.sort_by_key(|cell| std::cmp::Reverse(cell.megabits));
        for cell in Cell::by_memory().into_iter().chain(by_rate) {
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
        cells
    }

    /// The name of the file with its figures.
    pub fn file_name(&self) -> String {
        format!("{}.json", self.to_string().replace(['/', ':'], "-"))
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, case, method) = (self.kind.as_str(), self.case.as_str(), self.method.as_str());
        write!(f, "{kind}/{}/{case}/{method}", self.app.name())?;
        if self.megabits == MEGABITS { Ok(()) } else { write!(f, "@{}", self.megabits) }
    }
}

impl FromStr for Cell {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Cell> {
        let bad = || format!("{text:?} is no cell: write it like lxc/ram/found/ours, kvm/ram:600/found/paper or …@10");
        let (words, megabits) = match text.split_once('@') {
            Some((words, rate)) => (words, rate.parse().with_context(bad)?),
            None => (text, MEGABITS),
        };
        let words: Vec<&str> = words.split('/').collect();
        let [kind, app, case, method] = words[..] else { bail!(bad()) };
        let kinds = [Kind::Process, Kind::Lxc, Kind::Kvm];
        let kind = kinds.into_iter().find(|one| one.as_str() == kind).with_context(bad)?;
        let app = match app.strip_prefix("ram:") {
            Some(megabytes) => App::Ram(megabytes.parse().with_context(bad)?),
            None => App::ROWS.into_iter().find(|one| one.name() == app).with_context(bad)?,
        };
        let case = Case::ALL.into_iter().find(|one| one.as_str() == case).with_context(bad)?;
        let methods = [Method::Paper, Method::Ours, Method::Rounds];
        let method = methods.into_iter().find(|one| one.as_str() == method).with_context(bad)?;
        Ok(Cell { kind, app, case, megabits, method })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for cell in Cell::all() {
            assert_eq!(cell.to_string().parse::<Cell>().unwrap(), cell);
        }
        let odd: Cell = "kvm/ram:600/found/paper@10".parse().unwrap();
        assert_eq!((odd.app, odd.megabits), (App::Ram(600), 10));
        assert_eq!("lxc/ram/found/rounds".parse::<Cell>().unwrap().method, Method::Rounds);
        for bad in ["", "lxc/ram/found", "lxc/ram/found/ours@x", "xen/ram/found/ours", "lxc/ram:x/found/ours"] {
            assert!(bad.parse::<Cell>().is_err(), "{bad}");
        }
    }
}
