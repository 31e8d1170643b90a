//! What the paper prints: A. Machen, S. Wang, K. K. Leung, B. J. Ko, T. Salonidis, "Live Service Migration in Mobile Edge Clouds", 2017.
//!
//! Table I in numbers. Figures 4 and 5 are pictures there, with no numbers beside those that the text names ([`FIGURE_5`]).

use crate::cell::{App, Case, Kind};

/// A printed cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Printed {
    /// Total migration time, in seconds.
    pub total_seconds: f64,
    /// Data transferred, in MB.
    pub megabytes: f64,
    /// Service downtime, in seconds; one figure for both columns of three layers.
    pub downtime_seconds: f64,
}

/// Rows as [`App::ROWS`]; per row two layers, three layers not found, found: (total, MB); then downtime with two and with three.
type Row = ([(f64, f64); 3], [f64; 2]);

const LXC: [Row; 5] = [
    ([(6.5, 1.4), (11.0, 1.9), (6.3, 1.4)], [2.0, 2.0]),
    ([(7.3, 2.2), (10.9, 2.7), (6.4, 1.6)], [3.0, 2.0]),
    ([(20.2, 97.1), (27.2, 97.6), (19.8, 97.1)], [15.4, 15.3]),
    ([(27.5, 180.2), (37.3, 184.6), (8.5, 7.4)], [23.2, 3.3]),
    ([(52.0, 363.1), (70.1, 365.0), (15.5, 10.0)], [47.6, 3.7]),
];

const KVM: [Row; 5] = [
    ([(81.5, 65.3), (141.8, 65.9), (79.7, 65.2)], [55.8, 56.1]),
    ([(84.7, 71.5), (142.0, 72.3), (80.9, 69.7)], [60.2, 58.7]),
    ([(95.9, 170.0), (152.2, 178.4), (93.0, 170.4)], [72.5, 72.0]),
    ([(120.9, 251.3), (189.7, 270.5), (86.4, 87.3)], [93.9, 61.3]),
    ([(381.2, 1027.3), (558.3, 1033.7), (152.3, 99.0)], [355.0, 107.5]),
];

/// What the text says about Figure 5, which has no numbers itself.
pub const FIGURE_5: [&str; 4] = [
    "At 400 MB of RAM usage, LXC is 5x faster to migrate than KVM; at 600 MB only 4x.",
    "At 1 Mbps, LXC is 2x faster to migrate than KVM, at 10 Mbps 4x.",
    "Over 50 Mbps the time remains about the same, and LXC is 8x faster (rsync's comparing and compressing is the limit).",
    "Migration times are about linear in RAM usage.",
];

/// A machine's total time as a multiple of LXC's, as the text of Figure 5 gives it.
#[derive(Clone, Copy, Debug)]
pub struct Ratio {
    /// Memory, in MB.
    pub megabytes: u32,
    /// The link's rate, in Mbit/s.
    pub megabits: u32,
    /// The multiple, as printed.
    pub times: &'static str,
}

/// Those of [`FIGURE_5`] that have a number.
pub const FIGURE_5_RATIOS: [Ratio; 5] = [
    Ratio { megabytes: 400, megabits: 100, times: "5" },
    Ratio { megabytes: 600, megabits: 100, times: "4" },
    Ratio { megabytes: 330, megabits: 1, times: "2" },
    Ratio { megabytes: 330, megabits: 10, times: "4" },
    Ratio { megabytes: 330, megabits: 50, times: "8" },
];

/// What the table prints for a cell, if it has it.
pub fn printed(kind: Kind, app: App, case: Case) -> Option<Printed> {
    let rows = match kind {
        Kind::Lxc => &LXC,
        Kind::Kvm => &KVM,
        Kind::Process => return None,
    };
    let row = rows[App::ROWS.iter().position(|one| *one == app)?];
    let column = Case::ALL.iter().position(|one| *one == case)?;
    let (total_seconds, megabytes) = row.0[column];
    Some(Printed { total_seconds, megabytes, downtime_seconds: row.1[usize::from(case != Case::Two)] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_where_they_are_printed() {
        let face = printed(Kind::Kvm, App::Face, Case::NotFound).unwrap();
        assert_eq!((face.total_seconds, face.megabytes, face.downtime_seconds), (558.3, 1033.7, 107.5));
        assert_eq!(printed(Kind::Lxc, App::Video, Case::Two).unwrap().downtime_seconds, 23.2);
        assert_eq!(printed(Kind::Lxc, App::Ram(600), Case::Found), None);
    }
}
