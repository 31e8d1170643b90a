//! Writing answers: tables, colours, JSON, remarks. The only place that writes to stdout and stderr.
//!
//! Invariants: stdout carries the answer and nothing else; colours only where the user wants them.

use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use serde::Serialize;

use crate::cli::{ColorChoice, Global};
use crate::failure::{Failure, Result};

/// How to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
    /// No remarks, no progress.
    pub quiet: bool,
    color_stdout: bool,
    color_stderr: bool,
    /// Whether stderr is a terminal, for progress bars.
    pub stderr_is_terminal: bool,
}

impl Output {
    /// What the options and the terminal ask for.
    pub fn new(global: &Global) -> Output {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let wants = |is_terminal: bool| match global.color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => is_terminal && !no_color && !dumb,
        };
        let stderr_is_terminal = io::stderr().is_terminal();
        Output {
            json: global.json,
            quiet: global.quiet,
            color_stdout: wants(io::stdout().is_terminal()) && !global.json,
            color_stderr: wants(stderr_is_terminal),
            stderr_is_terminal: stderr_is_terminal && !dumb,
        }
    }

    /// JSON and nothing else, for what goes wrong before the options are known.
    pub fn json() -> Output {
        Output { json: true, quiet: true, color_stdout: false, color_stderr: false, stderr_is_terminal: false }
    }

    /// The paints of stdout.
    pub fn paint(&self) -> Paint {
        Paint(self.color_stdout)
    }

    /// Writes to stdout by `write`, through a buffer.
    pub fn with_stdout(&self, write: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> Result<()>) -> Result<()> {
        let mut out = BufWriter::new(io::stdout().lock());
        write(&mut out)?;
        out.flush()?;
        Ok(())
    }

    /// Writes `value` in JSON, or `text` of it.
    pub fn answer<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        self.with_stdout(|out| {
            if self.json {
                serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
                out.write_all(b"\n")?;
            } else {
                out.write_all(text(value).as_bytes())?;
            }
            Ok(())
        })
    }

    /// Passes on what another program has written, as it comes.
    pub fn pass(&self, is_stderr: bool, bytes: &[u8]) -> io::Result<()> {
        if is_stderr {
            return io::stderr().lock().write_all(bytes);
        }
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }

    /// A remark on stderr that the user may want to know.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            write_stderr(&format!("{text}\n"));
        }
    }

    /// A question on stderr, asked even of quiet users.
    pub fn ask(&self, text: &str) {
        write_stderr(text);
    }

    /// A warning on stderr.
    pub fn warn(&self, text: &str) {
        if !self.quiet {
            write_stderr(&format!("{} {text}\n", Paint(self.color_stderr).yellow("warning:")));
        }
    }

    /// The failure that ends the program, on stderr.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let json = serde_json::json!({ "error": failure });
            write_stderr(&format!("{json}\n"));
            return;
        }
        let paint = Paint(self.color_stderr);
        let mut lines = failure.message.lines();
        write_stderr(&format!("{} {}\n", paint.red("layerctl:"), lines.next().unwrap_or_default()));
        for line in lines {
            write_stderr(&format!("  {line}\n"));
        }
    }
}

fn write_stderr(text: &str) {
    // There is nobody left to tell if this fails.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// ANSI colours, or none.
#[derive(Clone, Copy, Debug)]
pub struct Paint(pub bool);

impl Paint {
    /// No colours.
    #[cfg(test)]
    pub const PLAIN: Paint = Paint(false);

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// For headings and what matters most.
    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// For what matters less.
    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// For what is gone or wrong.
    pub fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    /// For what is new or well.
    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// For what is changed or doubtful.
    pub fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    /// For names.
    pub fn cyan(self, text: &str) -> String {
        self.wrap("36", text)
    }
}

/// On which side a column's cells are flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// An aligned table with a heading; no lines, so that it is easily cut by other programs.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<(String, Option<Color>)>>,
}

/// A cell's colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    /// See [`Paint::dim`].
    Dim,
    /// See [`Paint::cyan`].
    Cyan,
    /// See [`Paint::red`].
    Red,
    /// See [`Paint::green`].
    Green,
    /// See [`Paint::yellow`].
    Yellow,
}

impl Table {
    /// A table with `columns`; headings of numbers end in `>`.
    pub fn new(columns: &[&'static str]) -> Table {
        let column = |heading: &&'static str| match heading.strip_suffix('>') {
            Some(heading) => (heading, Align::Right),
            None => (*heading, Align::Left),
        };
        Table { columns: columns.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Appends a row of plain cells.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.colored(cells.into_iter().map(|cell| (cell, None)));
    }

    /// Appends a row of cells with colours.
    pub fn colored(&mut self, cells: impl IntoIterator<Item = (String, Option<Color>)>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table's text, a line each for the heading and the rows.
    pub fn render(&self, paint: Paint) -> String {
        let width_of = |index: usize, heading: &str| {
            let cells = self.rows.iter().filter_map(|row| row.get(index)).map(|(cell, _)| cell.chars().count());
            cells.chain(std::iter::once(heading.chars().count())).max().unwrap_or(0)
        };
        let widths: Vec<usize> =
            self.columns.iter().enumerate().map(|(index, (heading, _))| width_of(index, heading)).collect();
        let headings = self.columns.iter().map(|(heading, _)| ((*heading).to_owned(), Some(Color::Dim)));
        let mut out = self.line(&headings.collect::<Vec<_>>(), &widths, paint);
        for row in &self.rows {
            out.push_str(&self.line(row, &widths, paint));
        }
        out
    }

    fn line(&self, cells: &[(String, Option<Color>)], widths: &[usize], paint: Paint) -> String {
        let mut line = String::new();
        let last = cells.len().saturating_sub(1);
        for (index, (cell, color)) in cells.iter().enumerate() {
            let padding = " ".repeat(widths[index].saturating_sub(cell.chars().count()));
            let painted = match color {
                None => cell.clone(),
                Some(Color::Dim) => paint.dim(cell),
                Some(Color::Cyan) => paint.cyan(cell),
                Some(Color::Red) => paint.red(cell),
                Some(Color::Green) => paint.green(cell),
                Some(Color::Yellow) => paint.yellow(cell),
            };
            match self.columns[index].1 {
                Align::Right => line.push_str(&format!("{padding}{painted}")),
                Align::Left if index == last => line.push_str(&painted),
                Align::Left => line.push_str(&format!("{painted}{padding}")),
            }
            if index != last {
                line.push_str("  ");
            }
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

/// Lines of `key  value`, the values aligned.
pub fn facts<'a>(paint: Paint, facts: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let facts: Vec<_> = facts.into_iter().collect();
    let width = facts.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
    let line = |(key, value): &(&str, String)| {
        let padding = " ".repeat(width - key.chars().count());
        format!("{}{padding}  {value}\n", paint.dim(key))
    };
    facts.iter().map(line).collect()
}

/// The first 12 digits of an id.
pub fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let mut table = Table::new(&["NAME", "SIZE>", "KIND"]);
        table.row(["a".into(), "1.0 KiB".into(), "base".into()]);
        table.row(["longer".into(), "9 B".into(), "application".into()]);
        let text = table.render(Paint(false));
        assert_eq!(text, "NAME       SIZE  KIND\na       1.0 KiB  base\nlonger      9 B  application\n");
        assert!(table.render(Paint(true)).starts_with("\x1b[2mNAME\x1b[0m   "));
    }

    #[test]
    fn facts_align() {
        assert_eq!(facts(Paint(false), [("a", "1".into()), ("bcd", "2".into())]), "a    1\nbcd  2\n");
    }
}
