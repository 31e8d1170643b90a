//! import, export, tag, remove, list, tree, log.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use layerfs::export::Destination;

use super::Session;
use crate::api::layers::{
    ExportRequest, ExportResult, ImportRequest, ImportResult, InspectRequest, LayerInfo, LayerList, ListRequest, Named,
    RemoveRequest, RemoveResult, TagRequest,
};
use crate::cli::layers as args;
use crate::failure::{Class, Failure, Result};
use crate::output::{Color, Paint, Table, short};
use crate::progress::Display;
use crate::{absolute, units};

/// `layerctl import`.
pub fn import(session: &Session, mut args: args::Import) -> Result<()> {
    if let Some(address) = args.source.to_str().filter(|source| source.starts_with("oci://")) {
        let text = format!("{address} is an image in a registry, which is pulled");
        return Err(Failure::invalid(text).hint(format!("`layerctl pull {} {address}` does that", args.name)));
    }
    as_layout(&mut args)?;
    let is_stream = args.source.as_os_str() == "-" || is_pipe(&args.source);
    let request = ImportRequest {
        source: if is_stream { None } else { Some(absolute(&args.source)?) },
        name: args.name,
        parent: args.parent,
        kind: args.kind,
        like: args.like,
        whole: args.whole,
        format: args.format,
        oci_whiteouts: args.oci_whiteouts,
        one_file_system: args.one_file_system,
        reference: args.reference,
        platform: args.platform,
        force: args.force,
    };
    let mut display = Display::new(session.output, format!("importing {}", request.name));
    let result: ImportResult = if is_stream {
        let source = open_stream(&args.source)?;
        session.client_of_new_store()?.upload("import-stream", &request, source, &mut display)?
    } else {
        std::fs::symlink_metadata(&args.source).map_err(|e| Failure::file("open", &args.source, e))?;
        session.client_of_new_store()?.work("import", &request, &mut display, &mut |_| Ok(()))?
    };
    session.output.answer(&result, |result| imported(result, session.output.paint()))
}

/// Takes `oci:PATH[:TAG]` apart, as an export does.
fn as_layout(args: &mut args::Import) -> Result<()> {
    let Some(text) = args.source.to_str().filter(|text| text.starts_with("oci:")) else { return Ok(()) };
    let Destination { path, tag, .. } = Destination::parse(text, None)?;
    if let Some(format) = args.format.as_ref().filter(|format| *format != "oci") {
        return Err(Failure::invalid(format!("{text} is an OCI image layout, not --format {format}")));
    }
    if let (Some(tag), Some(reference)) = (&tag, &args.reference) {
        return Err(Failure::invalid(format!(
            "{text} names the image {tag:?}, and --reference {reference:?}; give one"
        )));
    }
    args.reference = args.reference.take().or(tag);
    args.format = Some("oci".to_owned());
    args.source = path;
    Ok(())
}

fn imported(result: &ImportResult, paint: Paint) -> String {
    let mut text = String::new();
    for layer in &result.layers {
        let name = layer.name.as_deref().map_or_else(|| paint.dim("-"), |name| paint.cyan(name));
        let (inodes, size) = (units::plural(layer.inodes, "inode"), units::size(layer.file_bytes));
        text.push_str(&format!("{}  {name}  {}, {inodes}, {size}\n", paint.dim(&short(&layer.id)), layer.kind));
    }
    let rate = units::rate(result.bytes_read, result.seconds);
    let (read, stored) = (units::size(result.bytes_read), units::size(result.bytes_stored));
    text.push_str(&format!("{read} read, {stored} added to the store, {}, {rate}\n", units::duration(result.seconds)));
    text
}

fn is_pipe(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

fn open_stream(path: &Path) -> Result<Box<dyn Read + Send>> {
    if path.as_os_str() != "-" {
        let file = std::fs::File::open(path).map_err(|e| Failure::file("open", path, e))?;
        return Ok(Box::new(file));
    }
    if std::io::stdin().is_terminal() {
        let text = "`-` reads an archive from stdin, which is a terminal";
        return Err(Failure::invalid(text).hint("pipe something into it: tar c . | layerctl import - NAME"));
    }
    Ok(Box::new(std::io::stdin()))
}

/// `layerctl export`.
pub fn export(session: &Session, args: args::Export) -> Result<()> {
    if let Some(address) = args.dest.to_str().filter(|dest| dest.starts_with("oci://")) {
        let text = format!("{address} is an image in a registry, which is pushed; a layout on disk is oci:PATH");
        return Err(Failure::invalid(text).hint(format!("`layerctl push {} {address}` does that", args.name)));
    }
    let is_stream = args.dest.as_os_str() == "-";
    let request = ExportRequest {
        name: args.name,
        dest: if is_stream { None } else { Some(absolute_dest(&args.dest)?) },
        format: args.format,
    };
    let mut display = Display::new(session.output, format!("exporting {}", request.name));
    let client = session.client()?;
    if is_stream {
        if std::io::stdout().is_terminal() {
            let text = "`-` writes an archive to stdout, which is a terminal";
            return Err(Failure::invalid(text).hint("redirect it: layerctl export NAME - > archive.tar"));
        }
        let mut stdout = std::io::stdout().lock();
        let _: ExportResult = client.download("export-stream", &request, &mut stdout, &mut display)?;
        return Ok(());
    }
    let result: ExportResult = client.work("export", &request, &mut display, &mut |_| Ok(()))?;
    session.output.answer(&result, |result| {
        let data = units::size(result.data_bytes);
        let rate = units::rate(result.data_bytes, result.seconds);
        let entries = units::plural(result.entries, "entry").replace("entrys", "entries");
        let digest = result.oci_manifest.as_ref().map(|digest| format!("  {digest}\n")).unwrap_or_default();
        let dest = args.dest.display();
        format!("{dest}: {entries}, {data}, {}, {rate}\n{digest}", units::duration(result.seconds))
    })
}

/// Makes a path absolute, or the path in `oci:PATH[:TAG]`.
fn absolute_dest(dest: &Path) -> Result<PathBuf> {
    match dest.to_str().and_then(|text| text.strip_prefix("oci:")) {
        None => absolute(dest),
        Some(path) => {
            let mut text = std::ffi::OsString::from("oci:");
            text.push(absolute(Path::new(path))?);
            Ok(text.into())
        }
    }
}

/// `layerctl tag`.
pub fn tag(session: &Session, args: args::Tag) -> Result<()> {
    let request = TagRequest { layer: args.layer, name: args.name, force: args.force };
    let named: Named = session.call("tag", &request)?;
    let paint = session.output.paint();
    session.output.answer(&named, |named| format!("{}  {}\n", short(&named.id), paint.cyan(&named.name)))
}

/// `layerctl remove`.
pub fn remove(session: &Session, args: args::Remove) -> Result<()> {
    let result: RemoveResult = session.call("remove", &RemoveRequest { names: args.names })?;
    session.output.answer(&result, |result| {
        result.removed.iter().map(|named| format!("removed {}  (layer {})\n", named.name, short(&named.id))).collect()
    })?;
    if !session.output.json {
        session.output.note("`layerctl gc` frees what nothing else needs");
    }
    Ok(())
}

/// `layerctl list`. The exit code is that of the first layer that can't be read.
pub fn list(session: &Session, args: args::List) -> Result<u8> {
    let request = ListRequest { pattern: args.pattern, kind: args.kind };
    let is_choosy = request.pattern.is_some() || request.kind.is_some();
    let list: LayerList = session.call("list", &request)?;
    session.output.answer(&list, |list| layer_table(&list.layers, session.output.paint()))?;
    if list.layers.is_empty() && list.unreadable.is_empty() && !session.output.json {
        session.output.note(match is_choosy {
            true => "no layer matches; `layerctl list` shows all that have names",
            false => "no layers; `layerctl import SRC NAME` makes one",
        });
    }
    Ok(list.unreadable.first().map_or(0, |unreadable| unreadable.error.class.exit_code()))
}

fn layer_table(layers: &[LayerInfo], paint: Paint) -> String {
    if layers.is_empty() {
        return String::new();
    }
    let now = units::now();
    let mut table = Table::new(&["NAME", "KIND", "LAYER", "ON", "INODES>", "SIZE>", "MADE"]);
    for layer in layers {
        let on = layer.parent_name.clone().or_else(|| layer.parent.as_deref().map(short));
        table.colored([
            (layer.names.join(", "), Some(Color::Cyan)),
            (layer.kind.clone(), None),
            (short(&layer.id), Some(Color::Dim)),
            (on.unwrap_or_else(|| "-".to_owned()), None),
            (units::count(layer.inodes), None),
            (units::size(layer.file_bytes), None),
            (layer.created.map_or_else(|| "-".to_owned(), |created| units::age(created.0, now)), Some(Color::Dim)),
        ]);
    }
    let mut text = table.render(paint);
    for layer in layers {
        if let Some(partial) = &layer.partial {
            text.push_str(&format!("{}: {}\n", layer.names.join(", "), partial.text()));
        }
    }
    text
}

/// `layerctl log`.
pub fn log(session: &Session, args: args::Log) -> Result<()> {
    let request = InspectRequest { layer: args.layer, path: None, chunks: false };
    let list: LayerList = session.call("log", &request)?;
    session.output.answer(&list, |list| {
        let mut table = Table::new(&["LAYER", "KIND", "INODES>", "SIZE>", "NAMES"]);
        for layer in &list.layers {
            table.colored([
                (short(&layer.id), Some(Color::Dim)),
                (layer.kind.clone(), None),
                (units::count(layer.inodes), None),
                (units::size(layer.file_bytes), None),
                (layer.names.join(", "), Some(Color::Cyan)),
            ]);
        }
        table.render(session.output.paint())
    })
}

/// `layerctl tree`.
pub fn tree(session: &Session, args: args::Tree) -> Result<()> {
    let list: LayerList = session.call("tree", &ListRequest::default())?;
    let forest = Forest::new(list.layers);
    let roots = match &args.name {
        None => forest.below(None),
        Some(name) => vec![forest.find(name)?],
    };
    let layers = roots.iter().flat_map(|root| forest.all_from(root)).cloned().collect();
    let kept = LayerList { layers, ..LayerList::default() };
    session
        .output
        .answer(&kept, |_| roots.iter().map(|root| forest.draw(root, session.output.paint(), "", "")).collect())
}

/// Layers by what they lie on.
struct Forest {
    layers: Vec<LayerInfo>,
    /// Indices of the layers that lie on a layer, and of those that lie on none.
    children: BTreeMap<Option<String>, Vec<usize>>,
}

impl Forest {
    fn new(layers: Vec<LayerInfo>) -> Forest {
        let mut children: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (index, layer) in layers.iter().enumerate() {
            children.entry(layer.parent.clone()).or_default().push(index);
        }
        Forest { layers, children }
    }

    fn below(&self, parent: Option<&str>) -> Vec<&LayerInfo> {
        let indices = self.children.get(&parent.map(str::to_owned));
        indices.into_iter().flatten().map(|index| &self.layers[*index]).collect()
    }

    fn find(&self, name: &str) -> Result<&LayerInfo> {
        let is_meant = |layer: &&LayerInfo| {
            layer.names.iter().any(|other| other == name) || (name.len() >= 8 && layer.id.starts_with(name))
        };
        self.layers.iter().find(is_meant).ok_or_else(|| {
            let failure = Failure::new(Class::NotFound, format!("layer {name:?} not found"));
            failure.hint("`layerctl list` shows the names that there are")
        })
    }

    fn all_from<'a>(&'a self, root: &'a LayerInfo) -> Vec<&'a LayerInfo> {
        let mut all = vec![root];
        let mut next = 0;
        while let Some(layer) = all.get(next) {
            let below = self.below(Some(&layer.id));
            all.extend(below);
            next += 1;
        }
        all
    }

    fn draw(&self, layer: &LayerInfo, paint: Paint, first: &str, rest: &str) -> String {
        let names = if layer.names.is_empty() { "(no name)".to_owned() } else { layer.names.join(", ") };
        let facts = format!("{}  {}  {}", layer.kind, units::size(layer.file_bytes), short(&layer.id));
        let mut text = format!("{first}{}  {}\n", paint.cyan(&names), paint.dim(&facts));
        let children = self.below(Some(&layer.id));
        for (index, child) in children.iter().enumerate() {
            let (branch, trunk) = if index + 1 == children.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            text.push_str(&self.draw(child, paint, &format!("{rest}{branch}"), &format!("{rest}{trunk}")));
        }
        text
    }
}
