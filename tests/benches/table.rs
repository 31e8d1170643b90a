//! The one table: rows of figures with their peers, ratios and goals; as text for people, as JSON for programs.

use serde_json::{Value, json};

use crate::Plan;

/// One figure.
pub struct Row {
    /// What was measured.
    pub what: String,
    /// "s", "MB/s", "bytes", "%", "MB".
    pub unit: &'static str,
    /// Our figure.
    pub ours: f64,
    /// Each peer's figure on the same task.
    pub peers: Vec<(&'static str, f64)>,
    /// What it is out to be, for people.
    pub goal: String,
    /// Whether it is so; none if the row only informs.
    pub met: Option<bool>,
}

/// All rows.
pub struct Table {
    rows: Vec<Row>,
    left_out: Vec<(String, String)>,
    head: Value,
}

impl Table {
    /// An empty table for `plan`.
    pub fn new(plan: &Plan) -> anyhow::Result<Table> {
        let (kernel, processors) = crate::machine()?;
        let head = json!({
            "kernel": kernel, "processors": processors, "runs": plan.runs,
            "tree": plan.tree.display().to_string(), "tree_bytes": plan.tree_bytes,
        });
        Ok(Table { rows: Vec::new(), left_out: Vec::new(), head })
    }

    /// Adds a row.
    pub fn add(&mut self, row: Row) {
        eprintln!("  {}: {} {}", row.what, shown(row.ours, row.unit), row.unit);
        self.rows.push(row);
    }

    /// Notes that `what` was not measured, and why.
    pub fn skipped(&mut self, what: &str, reason: &str) {
        eprintln!("  {what}: left out: {reason}");
        self.left_out.push((what.to_owned(), reason.to_owned()));
    }

    /// Whether every goal was met.
    pub fn all_met(&self) -> bool {
        self.rows.iter().all(|row| row.met != Some(false))
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut out =
            format!("\n{:<52} {:>10}  {:<72} {}\n", "", "layerfs", "peers (×: how many times our figure)", "goal");
        for row in &self.rows {
            let peers = row
                .peers
                .iter()
                .map(|(name, figure)| format!("{name} {} ×{:.2}", shown(*figure, row.unit), figure / row.ours))
                .collect::<Vec<_>>()
                .join("  ");
            let verdict = match row.met {
                Some(true) => "✓ ",
                Some(false) => "✗ ",
                None => "",
            };
            out += &format!(
                "{:<52} {:>10}  {:<72} {verdict}{}\n",
                format!("{} [{}]", row.what, row.unit),
                shown(row.ours, row.unit),
                peers,
                row.goal
            );
        }
        for (what, reason) in &self.left_out {
            out += &format!("{what}: SKIPPED: {reason}\n");
        }
        out
    }

    /// For programs.
    pub fn json(&self) -> String {
        let rows = self.rows.iter().map(|row| {
            let peers = row.peers.iter().map(|(name, figure)| {
                let one = json!({ "figure": figure, "ratio": figure / row.ours });
                ((*name).to_owned(), one)
            });
            json!({
                "what": row.what, "unit": row.unit, "layerfs": row.ours,
                "peers": Value::Object(peers.collect()), "goal": row.goal, "met": row.met,
            })
        });
        let left_out = self.left_out.iter().map(|(what, reason)| json!({ "what": what, "reason": reason }));
        let whole =
            json!({ "run": self.head, "rows": rows.collect::<Vec<_>>(), "skipped": left_out.collect::<Vec<_>>() });
        format!("{whole:#}\n")
    }
}

fn shown(figure: f64, unit: &str) -> String {
    match unit {
        "bytes" => format!("{figure:.0}"),
        "%" | "s" => format!("{figure:.2}"),
        _ => format!("{figure:.1}"),
    }
}
