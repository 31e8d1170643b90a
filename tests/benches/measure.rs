//! Times a task several times and takes the median.

use std::time::Instant;

use anyhow::Context;

/// Times `task` on what `prepare` makes, once to warm up and `runs` times that count; the median in seconds.
/// Preparing and dropping what was prepared take no part in the time.
pub fn median<T>(
    runs: usize,
    mut prepare: impl FnMut() -> anyhow::Result<T>,
    mut task: impl FnMut(&mut T) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..=runs {
        let mut prepared = prepare()?;
        // What the last one wrote shall not be on this one's bill.
        rustix::fs::sync();
        let started = Instant::now();
        task(&mut prepared)?;
        if run > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    middle(seconds).context("no runs")
}

/// The median.
pub fn middle(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}
