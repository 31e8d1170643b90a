//! Times tasks several times and takes the median of each.
//!
//! Contestants take turns, so that a machine whose speed drifts is as slow for one as for the other.

use std::time::Instant;

use anyhow::Context;

/// A task with a name; each call runs it once and tells the seconds that counted.
pub struct Contestant<'a> {
    /// Its name in the table.
    pub name: &'static str,
    run: Box<dyn FnMut() -> anyhow::Result<f64> + 'a>,
}

impl<'a> Contestant<'a> {
    /// Times `task` on what `prepare` makes. Preparing and dropping what was prepared take no part in the time.
    pub fn new<T>(
        name: &'static str,
        mut prepare: impl FnMut() -> anyhow::Result<T> + 'a,
        mut task: impl FnMut(&mut T) -> anyhow::Result<()> + 'a,
    ) -> Contestant<'a> {
        let run = move || {
            let mut prepared = prepare()?;
            // What the last one wrote shall not be on this one's bill.
            rustix::fs::sync();
            let started = Instant::now();
            task(&mut prepared)?;
            Ok(started.elapsed().as_secs_f64())
        };
        Contestant { name, run: Box::new(run) }
    }
}

/// Runs all in turn, once to warm up and `runs` times that count; the median seconds of each, in their order.
pub fn medians(runs: usize, contestants: &mut [Contestant]) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let mut seconds = vec![Vec::with_capacity(runs); contestants.len()];
    for round in 0..=runs {
        for (contestant, seconds) in contestants.iter_mut().zip(&mut seconds) {
            let took = (contestant.run)().with_context(|| contestant.name)?;
            if round > 0 {
                seconds.push(took);
            }
        }
    }
    let named = contestants.iter().zip(seconds);
    named.map(|(contestant, seconds)| Ok((contestant.name, middle(seconds).context("no runs")?))).collect()
}

/// The median.
pub fn middle(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}
