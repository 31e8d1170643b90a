//! squash.

use super::Session;
use crate::api::layers::{SquashRequest, SquashResult, Squashed};
use crate::cli::layers as args;
use crate::failure::Result;
use crate::output::{Paint, short};
use crate::units;

/// `layerctl squash`.
pub fn squash(session: &Session, args: args::Squash) -> Result<()> {
    let label = format!("squashing {}", args.names.join(" "));
    let request = SquashRequest {
        names: args.names,
        onto: args.onto,
        all: args.all,
        new_name: args.new_name,
        force: args.force,
        kind: args.kind,
        past: args.past,
        dry_run: args.dry_run,
    };
    let result: SquashResult = session.work("squash", &request, &label)?;
    let paint = session.output.paint();
    session.output.answer(&result, |result| {
        result.squashed.iter().map(|squashed| line(squashed, result.dry_run, paint)).collect()
    })
}

fn line(squashed: &Squashed, is_dry: bool, paint: Paint) -> String {
    let Squashed { layers, inodes_before, inodes, table_bytes_before, table_bytes, new_bytes, .. } = squashed;
    let name = paint.cyan(&squashed.name);
    let id = short(&squashed.id);
    if squashed.id == squashed.before {
        return format!("{id}  {name}  nothing to squash\n");
    }
    let would = if is_dry { "would become" } else { "became" };
    let tables = format!("{} of tables instead of {}", units::size(*table_bytes), units::size(*table_bytes_before));
    let inodes = format!("{} instead of {}", units::plural(*inodes, "inode"), units::count(*inodes_before));
    let mut text =
        format!("{id}  {name}  {layers} layers {would} one: {inodes}, {tables}, {} new\n", units::size(*new_bytes));
    for dir in &squashed.mounts {
        text.push_str(&format!("the mount on {} goes on over it\n", dir.display()));
    }
    text
}
