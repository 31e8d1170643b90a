//! Progress on stderr: a bar with rate and time left on a terminal, now and then a plain line elsewhere.
//!
//! Invariant: work that is done within a second shows nothing.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::api::Progress;
use crate::output::Output;
use crate::units;

/// From when on progress is shown.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a plain line is written.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows the progress of one piece of work.
pub struct Display {
    output: Output,
    label: String,
    started: Instant,
    phase_started: Instant,
    bar: Option<ProgressBar>,
    last_line: Instant,
    last: Progress,
}

impl Display {
    /// A display of the work `label`: "importing debian".
    pub fn new(output: Output, label: impl Into<String>) -> Display {
        let now = Instant::now();
        let last = Progress::default();
        Display { output, label: label.into(), started: now, phase_started: now, bar: None, last_line: now, last }
    }

    /// The work is so far.
    pub fn update(&mut self, progress: Progress) {
        if progress.phase != self.last.phase {
            self.phase_started = Instant::now();
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
        }
        self.last = progress;
        if self.output.quiet || self.started.elapsed() < PATIENCE {
            return;
        }
        if self.output.stderr_is_terminal {
            self.draw();
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let line = self.line();
            self.output.note(&line);
        }
    }

    /// A remark in the midst of it.
    pub fn warn(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.output.warn(text)),
            None => self.output.warn(text),
        }
    }

    /// Takes the bar away, before the answer is written.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn draw(&mut self) {
        let progress = &self.last;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(progress.total_bytes, ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style(progress.total_bytes.is_some()));
            bar.with_elapsed(self.phase_started.elapsed())
        });
        if bar.length() != progress.total_bytes {
            bar.set_style(style(progress.total_bytes.is_some()));
            match progress.total_bytes {
                Some(total) => bar.set_length(total),
                None => bar.unset_length(),
            }
        }
        let items =
            if progress.items > 0 { format!(", {} items", units::count(progress.items)) } else { String::new() };
        bar.set_prefix(format!("{}: {}", self.label, progress.phase));
        bar.set_message(items);
        bar.set_position(progress.bytes);
    }

    fn line(&self) -> String {
        let Progress { phase, bytes, total_bytes, items } = &self.last;
        let seconds = self.phase_started.elapsed().as_secs_f64();
        let mut line = format!("{}: {phase}", self.label);
        if *bytes > 0 {
            line.push_str(&format!(", {}", units::size(*bytes)));
            if let Some(total) = total_bytes.filter(|total| *total > 0) {
                line.push_str(&format!(" of {} ({})", units::size(total), units::percent(*bytes, total)));
            }
            line.push_str(&format!(", {}", units::rate(*bytes, seconds)));
            if let Some(left) = total_bytes.map(|total| total.saturating_sub(*bytes)).filter(|left| *left > 0) {
                line.push_str(&format!(", {} left", units::duration(left as f64 * seconds / *bytes as f64)));
            }
        }
        if *items > 0 {
            line.push_str(&format!(", {} items", units::count(*items)));
        }
        line
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.finish();
    }
}

fn style(is_total_known: bool) -> ProgressStyle {
    let template = if is_total_known {
        "{prefix} [{bar:24}] {percent:>3}%  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}, {eta} left{msg}"
    } else {
        "{spinner} {prefix}  {binary_bytes}  {binary_bytes_per_sec}{msg}"
    };
    // The templates are constant; a mistake in one shows as the default style.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("█▉▊▋▌▍▎▏ ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{ColorChoice, Global};

    #[test]
    fn a_plain_line_holds_rate_and_time_left() {
        let global = Global { store: None, json: false, quiet: true, color: ColorChoice::Never };
        let mut display = Display::new(Output::new(&global), "importing debian");
        display.update(Progress { phase: "reading".into(), bytes: 1 << 20, total_bytes: Some(1 << 21), items: 1200 });
        display.phase_started = Instant::now() - Duration::from_secs(10);
        let line = display.line();
        assert!(line.starts_with("importing debian: reading, 1.0 MiB of 2.0 MiB (50.0%), 102 KiB/s, "), "{line}");
        assert!(line.ends_with(" left, 1,200 items"), "{line}");
    }
}
