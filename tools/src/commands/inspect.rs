//! inspect, diff, why: looking into layers.

use serde_json::Value;

use super::Session;
use crate::api::layers::{
    ChangeItem, ChunkItem, DiffRequest, DiffSummary, EntryInfo, FolderItem, ImageInfo, InspectRequest, InspectResult,
    TraceInfo, TraceList, TracesRemoveRequest,
};
use crate::api::storage::{LayerRef, Origin, WhyRequest, WhyResult};
use crate::api::{Empty, PathText};
use crate::cli::{layers as args, storage};
use crate::failure::{Failure, Result};
use crate::output::{Color, Paint, Table, facts, short};
use crate::progress::Display;
use crate::units;

/// `layerctl inspect`.
pub fn inspect(session: &Session, mut args: args::Inspect) -> Result<()> {
    // As `why` has it.
    if args.path.is_none()
        && let Some((name, path)) = args.layer.split_once(":/")
    {
        (args.path, args.layer) = (Some(format!("/{path}").into()), name.to_owned());
    }
    let request =
        InspectRequest { layer: args.layer, path: args.path.as_deref().map(PathText::from), chunks: args.chunks };
    let mut items: Vec<Value> = Vec::new();
    let mut display = Display::new(session.output, "inspecting");
    let result: InspectResult = session.client()?.work("inspect", &request, &mut display, &mut |item| {
        items.push(item);
        Ok(())
    })?;
    // A folder has entries, whatever was asked for.
    let is_folder = result.entry.as_ref().is_some_and(|entry| entry.kind == "folder");
    let has_chunks = request.chunks && !is_folder;
    if session.output.json {
        let key = if has_chunks { "chunks" } else { "entries" };
        let mut value = serde_json::to_value(&result).unwrap_or_default();
        if let Some(object) = value.as_object_mut() {
            object.insert(key.to_owned(), items.into());
        }
        return session.output.answer(&value, |_| String::new());
    }
    let paint = session.output.paint();
    let text = match &result.entry {
        Some(entry) => entry_text(entry, paint),
        None => layer_text(&result, paint),
    };
    let table = if has_chunks { chunk_table(&items, paint)? } else { folder_table(&items, paint)? };
    session.output.answer(&result, |_| if table.is_empty() { text } else { format!("{text}\n{table}") })?;
    if request.chunks && is_folder {
        session.output.note("a folder has no chunks of its own; --chunks is for files, and for whole layers");
    }
    Ok(())
}

/// `layerctl trace`.
pub fn trace(session: &Session, args: args::Trace) -> Result<()> {
    if let args::TraceAction::Remove { layers, all } = args.action {
        let removed: TraceList = session.call("traces-remove", &TracesRemoveRequest { layers, all })?;
        return session.output.answer(&removed, |list| {
            list.traces.iter().map(|trace| format!("removed the trace of {}\n", trace_subject(trace))).collect()
        });
    }
    let list: TraceList = session.call("traces", &Empty {})?;
    session.output.answer(&list, |list| {
        if list.traces.is_empty() {
            return String::new();
        }
        let now = units::now();
        let mut table = Table::new(&["LAYER", "NAMES", "CHUNKS>", "RECORDED"]);
        for trace in &list.traces {
            table.colored([
                (short(&trace.layer), Some(Color::Dim)),
                (trace.names.join(", "), Some(Color::Cyan)),
                (units::count(trace.chunks), None),
                (units::age(trace.recorded.0, now), Some(Color::Dim)),
            ]);
        }
        table.render(session.output.paint())
    })?;
    if list.traces.is_empty() && !session.output.json {
        session.output.note("no traces; a mount leaves one when something is read through it");
    }
    Ok(())
}

fn trace_subject(trace: &TraceInfo) -> String {
    if trace.names.is_empty() { short(&trace.layer) } else { trace.names.join(", ") }
}

fn layer_text(result: &InspectResult, paint: Paint) -> String {
    let layer = &result.layer;
    let names = if layer.names.is_empty() { "-".to_owned() } else { paint.cyan(&layer.names.join(", ")) };
    let parent = match (&layer.parent, &layer.parent_name) {
        (Some(id), Some(name)) => format!("{name}  {}", paint.dim(id)),
        (Some(id), None) => id.clone(),
        _ => "-".to_owned(),
    };
    let mut list = vec![
        ("names", names),
        ("layer", layer.id.clone()),
        ("kind", layer.kind.clone()),
        ("on", parent),
        ("depth", layer.depth.to_string()),
        ("inodes", units::count(layer.inodes)),
        ("dentries", units::count(layer.dentries)),
        ("file sizes", units::size(layer.file_bytes)),
        ("tables", units::size(result.table_bytes)),
        ("next inode", units::count(result.next_ino)),
    ];
    list.extend(layer.partial.as_ref().map(|partial| ("here", partial.text())));
    if let Some(trace) = &result.trace {
        let age = units::age(trace.recorded.0, units::now());
        list.push(("trace", format!("{}, {age}", units::plural(trace.chunks, "chunk"))));
    }
    if let Some(image) = &result.image {
        list.extend(image_facts(image, &layer.id, paint));
    }
    facts(paint, list)
}

/// How the image is run, without what it doesn't say.
fn image_facts(image: &ImageInfo, shown: &str, paint: Paint) -> Vec<(&'static str, String)> {
    let all = &image.configuration;
    let config = &all["config"];
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(printable);
    let words =
        |value: &Value| value.as_array().filter(|words| !words.is_empty()).map(|_| printable(&value.to_string()));
    let keys = |value: &Value| {
        let keys: Vec<String> = value.as_object().into_iter().flatten().map(|(key, _)| printable(key)).collect();
        (!keys.is_empty()).then(|| keys.join(", "))
    };
    let of = (image.layer != shown).then(|| format!("of layer {}", paint.dim(&image.layer)));
    let platform = text(&all["os"]).zip(text(&all["architecture"]));
    let platform = platform.map(|(os, architecture)| match text(&all["variant"]) {
        Some(variant) => format!("{os}/{architecture}/{variant}"),
        None => format!("{os}/{architecture}"),
    });
    let lines = [
        ("image", of),
        ("platform", platform),
        ("created", text(&all["created"])),
        ("entry point", words(&config["Entrypoint"])),
        ("command", words(&config["Cmd"])),
        ("user", text(&config["User"])),
        ("working dir", text(&config["WorkingDir"])),
        ("ports", keys(&config["ExposedPorts"])),
        ("volumes", keys(&config["Volumes"])),
    ];
    let mut list: Vec<_> = lines.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let variables = config["Env"].as_array().into_iter().flatten().filter_map(Value::as_str);
    list.extend(variables.map(|variable| ("env", printable(variable))));
    let labels = config["Labels"].as_object().into_iter().flatten();
    list.extend(labels.map(|(key, value)| {
        ("label", format!("{}={}", printable(key), printable(value.as_str().unwrap_or_default())))
    }));
    if let Some(history) = all["history"].as_array().filter(|history| !history.is_empty()) {
        list.push(("history", units::plural(history.len() as u64, "step")));
    }
    list
}

/// What came from an image, without what a terminal would act on.
fn printable(text: &str) -> String {
    crate::api::escape(text.as_bytes())
}

fn entry_text(entry: &EntryInfo, paint: Paint) -> String {
    let mut list = vec![
        ("path", paint.cyan(&entry.path.display())),
        ("kind", entry.kind.clone()),
        ("inode", entry.ino.to_string()),
        ("mode", format!("{:04o}", entry.mode & 0o7777)),
        ("owner", format!("{}:{}", entry.uid, entry.gid)),
        ("links", entry.nlink.to_string()),
        ("size", format!("{}  ({} bytes)", units::size(entry.size), units::count(entry.size))),
        ("modified", units::rfc3339(entry.modified.0)),
    ];
    if entry.data_bytes != entry.size && entry.kind == "file" {
        list.push(("data", format!("{}, the rest is holes", units::size(entry.data_bytes))));
    }
    list.extend(entry.target.as_ref().map(|target| ("target", target.display())));
    list.extend(entry.device.map(|(major, minor)| ("device", format!("{major}:{minor}"))));
    list.extend(entry.chunker.clone().map(|chunker| ("chunker", chunker)));
    if !entry.xattrs.is_empty() {
        list.push(("xattrs", entry.xattrs.join(", ")));
    }
    facts(paint, list)
}

fn decode<T: serde::de::DeserializeOwned>(item: &Value) -> Result<T> {
    T::deserialize(item).map_err(|e| Failure::invalid(format!("the daemon's answer makes no sense: {e}")))
}

fn chunk_table(items: &[Value], paint: Paint) -> Result<String> {
    if items.is_empty() {
        return Ok(String::new());
    }
    let mut table = Table::new(&["PART", "OFFSET>", "BYTES>", "STORED>", "CHUNK"]);
    for item in items {
        let item: ChunkItem = decode(item)?;
        let stored = match (&item.id, item.stored_bytes) {
            (None, _) => ("-".to_owned(), None),
            (Some(_), Some(bytes)) => (units::count(bytes), None),
            (Some(_), None) => ("missing".to_owned(), Some(Color::Red)),
        };
        table.colored([
            (item.part, None),
            (units::count(item.offset), None),
            (units::count(item.bytes), None),
            stored,
            (item.id.unwrap_or_else(|| "hole".to_owned()), Some(Color::Dim)),
        ]);
    }
    Ok(table.render(paint))
}

fn folder_table(items: &[Value], paint: Paint) -> Result<String> {
    if items.is_empty() {
        return Ok(String::new());
    }
    let mut table = Table::new(&["INODE>", "KIND", "SIZE>", "NAME"]);
    for item in items {
        let item: FolderItem = decode(item)?;
        table.colored([
            (item.ino.to_string(), Some(Color::Dim)),
            (item.kind, None),
            (units::size(item.size), None),
            (item.name.display(), Some(Color::Cyan)),
        ]);
    }
    Ok(table.render(paint))
}

/// `layerctl diff`.
pub fn diff(session: &Session, args: args::Diff) -> Result<()> {
    let request = DiffRequest { old: args.old, new: args.new, summary: args.summary };
    let output = session.output;
    let mut display = Display::new(output, "comparing");
    let client = session.client()?;
    output.with_stdout(|out| {
        use std::io::Write;
        let mut count = 0u64;
        // Nothing is written before the daemon has answered: a failure must not leave half an object behind.
        let summary: DiffSummary = client.work("diff", &request, &mut display, &mut |item| {
            count += 1;
            if output.json {
                out.write_all(if count == 1 { b"{\"changes\":[\n".as_slice() } else { b",\n" })?;
                return serde_json::to_writer(&mut *out, &item).map_err(|e| std::io::Error::from(e).into());
            }
            let item: ChangeItem = decode(&item)?;
            Ok(out.write_all(change_line(&item, output.paint()).as_bytes())?)
        })?;
        if output.json {
            out.write_all(if count == 0 {
                b"{\"changes\":[],\n\"summary\":".as_slice()
            } else {
                b"\n],\n\"summary\":"
            })?;
            serde_json::to_writer(&mut *out, &summary).map_err(std::io::Error::from)?;
            out.write_all(b"}\n")?;
        } else {
            out.write_all(summary_line(&summary).as_bytes())?;
        }
        Ok(())
    })
}

fn change_line(item: &ChangeItem, paint: Paint) -> String {
    let path = item.path.display();
    let (old, new) = (units::size(item.old_bytes), units::size(item.new_bytes));
    let sizes = match item.change.as_str() {
        "added" => new,
        "removed" => old,
        "attributes" => String::new(),
        _ if old == new => new,
        _ => format!("{old} → {new}"),
    };
    let (sign, path) = match item.change.as_str() {
        "added" => (paint.green("+"), paint.green(&path)),
        "removed" => (paint.red("-"), paint.red(&path)),
        "modified" => (paint.yellow("~"), path),
        "type" => (paint.yellow("t"), path),
        _ => (paint.dim("m"), paint.dim(&path)),
    };
    format!("{sign} {sizes:>21}  {path}\n")
}

fn summary_line(summary: &DiffSummary) -> String {
    let DiffSummary { added, removed, modified, attributes, old_bytes, new_bytes } = summary;
    if added + removed + modified + attributes == 0 {
        return "no difference\n".to_owned();
    }
    let counts =
        [(added, "added"), (removed, "removed"), (modified, "modified"), (attributes, "with other attributes")];
    let parts: Vec<String> =
        counts.iter().filter(|(n, _)| **n > 0).map(|(n, what)| format!("{} {what}", units::count(**n))).collect();
    if old_bytes + new_bytes == 0 {
        return format!("{}\n", parts.join(", "));
    }
    format!("{}; {} → {}\n", parts.join(", "), units::size(*old_bytes), units::size(*new_bytes))
}

/// `layerctl why`.
pub fn why(session: &Session, args: storage::Why) -> Result<()> {
    let request = WhyRequest { what: args.what, limit: Some(args.limit) };
    let result: WhyResult = session.work("why", &request, "searching")?;
    session.output.answer(&result, |result| why_text(result, session.output.paint()))?;
    if result.more && !session.output.json {
        session.output.note(&format!("and more; --limit N shows more than {}", args.limit));
    }
    Ok(())
}

fn why_text(result: &WhyResult, paint: Paint) -> String {
    if let Some(origin) = &result.path {
        return origin_text(origin, paint);
    }
    if result.references.is_empty() {
        return "nothing refers to it\n".to_owned();
    }
    let mut table = Table::new(&["LAYER", "PART", "INODE>", "NAMES", "PATH"]);
    for reference in &result.references {
        let layer = short(&reference.layer);
        let ino = reference.ino.map_or_else(|| "-".to_owned(), |ino| ino.to_string());
        let paths: Vec<String> = reference.paths.iter().map(PathText::display).collect();
        table.colored([
            (layer, Some(Color::Dim)),
            (reference.role.clone(), None),
            (ino, None),
            (reference.names.join(", "), Some(Color::Cyan)),
            (paths.join(", "), None),
        ]);
    }
    table.render(paint)
}

fn origin_text(origin: &Origin, paint: Paint) -> String {
    let layer = |layer: &LayerRef| match layer.names.is_empty() {
        true => short(&layer.id),
        false => format!("{}  {}", paint.cyan(&layer.names.join(", ")), paint.dim(&short(&layer.id))),
    };
    let mut list = vec![
        ("inode", origin.ino.to_string()),
        ("kind", origin.kind.clone()),
        ("named by", origin.named_by.as_ref().map_or_else(|| "-".to_owned(), layer)),
    ];
    for (index, record) in origin.records.iter().enumerate() {
        list.push((if index == 0 { "content of" } else { "before" }, layer(record)));
    }
    list.extend(origin.links.iter().map(|path| ("link", path.display())));
    list.push(("shared by", paint.cyan(&origin.names.join(", "))));
    facts(paint, list)
}
