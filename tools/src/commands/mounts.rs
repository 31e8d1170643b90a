//! mount, umount, seal, mounts, uppers.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use layerfs::mount::Flags;

use super::Session;
use crate::api::mounts::{
    MountInfo, MountList, MountRequest, SealRequest, SealResult, UmountRequest, UmountResult, Unmounted, UpperInfo,
    UpperList, UppersRemoveRequest,
};
use crate::api::{Empty, Status};
use crate::cli::mounts as args;
use crate::failure::Result;
use crate::output::{Color, Table, short};
use crate::{absolute, units};

/// `layerctl mount`.
pub fn mount(session: &Session, args: args::Mount) -> Result<()> {
    let (dir, transport) = (real(&args.dir)?, args.transport.into());
    let writeback = args.writeback == args::Switch::On;
    let args::Mount { layer, read_only, upper, .. } = args;
    let request = MountRequest { layer, dir, read_only, upper, transport, writeback, options: Flags::default() };
    let info: MountInfo = session.call("mount", &request)?;
    warn_if_invisible(session, &[&info.dir]);
    let paint = session.output.paint();
    session.output.answer(&info, |info| {
        let what = info.layer_name.clone().unwrap_or_else(|| short(&info.layer));
        let partial = info.partial.as_ref().map(|partial| format!("; {}", partial.text())).unwrap_or_default();
        format!("{} on {}, {}{partial}\n", paint.cyan(&what), info.dir.display(), top(info))
    })
}

/// What lies on top of a mount, in words.
fn top(info: &MountInfo) -> String {
    match (info.read_only, &info.upper_name, info.upper) {
        (true, ..) => "read-only".to_owned(),
        (false, Some(name), _) => format!("upper {name}"),
        (false, None, Some(id)) => format!("upper {id}"),
        (false, None, None) => "writable".to_owned(),
    }
}

/// Says so if the daemon mounted these where this process doesn't see them. Asks nothing of the mounts.
fn warn_if_invisible(session: &Session, dirs: &[&Path]) {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return };
    let point = |line: &[u8]| line.split(|byte| *byte == b' ').nth(4).map(layerfs::mount::unescape);
    let seen: HashSet<Vec<u8>> = table.split(|byte| *byte == b'\n').filter_map(point).collect();
    let is_hidden = |dir: &&&Path| !seen.contains(dir.as_os_str().as_bytes());
    let hidden: Vec<String> = dirs.iter().filter(is_hidden).map(|dir| dir.display().to_string()).collect();
    let Some(last) = hidden.last() else { return };
    let what = if hidden.len() == 1 { format!("{last} is") } else { format!("{} are", hidden.join(", ")) };
    session.output.warn(&format!(
        "{what} mounted, but not visible here: the daemon runs in another mount namespace \
         (was it started under `ip netns exec` or in a container? `nsenter --net` keeps the mounts)",
    ));
}

/// Whether the daemon sees the same mounts as this process, but for those that were unmounted by others.
fn shares_mounts(status: &Status) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/ns/mnt").is_ok_and(|own| own.ino() == status.mount_namespace)
}

/// The folder without symbolic links, as the kernel lists mounts; a dead mount can't be looked into, so its path stays.
fn real(dir: &Path) -> Result<std::path::PathBuf> {
    match std::fs::canonicalize(dir) {
        Ok(real) => Ok(real),
        Err(_) => absolute(dir),
    }
}

/// `layerctl umount`.
pub fn umount(session: &Session, args: args::Umount) -> Result<()> {
    let dirs = args.dirs.iter().map(|dir| real(dir)).collect::<Result<_>>()?;
    let args::Umount { all, discard, lazy, everywhere, .. } = args;
    let request = UmountRequest { dirs, all, discard, lazy, everywhere };
    let result: UmountResult = session.call("umount", &request)?;
    session.output.answer(&result, |result| {
        result.unmounted.iter().map(|unmounted| format!("unmounted {}\n", unmounted.dir.display())).collect()
    })?;
    if !session.output.json {
        for Unmounted { dir, also_at, used_by, .. } in result.unmounted.iter().filter(|unmounted| unmounted.goes_on) {
            let copies = match (also_at.as_slice(), used_by.as_slice()) {
                ([], []) => "in mount namespaces that have a copy of it".to_owned(),
                ([], used_by) => format!("in mount namespaces that have a copy of it (process {})", used_by.join(", ")),
                (also_at, _) => {
                    let also_at: Vec<_> = also_at.iter().map(|dir| dir.display().to_string()).collect();
                    format!("at {}", also_at.join(", "))
                }
            };
            let dir = dir.display();
            session.output.note(&format!(
                "it goes on {copies}, and ends with that; `layerctl umount {dir} --everywhere` ends it now"
            ));
        }
        if lazy && !result.unmounted.is_empty() {
            session.output.note("what programs use goes on for them, and ends when they do");
        }
        for upper in result.unmounted.iter().filter_map(|unmounted| unmounted.kept_upper.as_ref()) {
            let UpperInfo { id, base, base_name, .. } = upper;
            let base = base_name.clone().unwrap_or_else(|| short(base));
            let what = upper.name.clone().unwrap_or_else(|| id.to_string());
            if discard {
                session.output.note(&format!(
                    "upper {what} has a name and is kept; `layerctl uppers remove {what}` throws it away"
                ));
                continue;
            }
            session.output.note(&format!(
                "its changes are kept in upper {what} ({}); `layerctl mount {base} DIR --upper {what}` goes on with them, \
                 `layerctl uppers remove {what}` throws them away",
                units::size(upper.data_bytes)
            ));
        }
    }
    Ok(())
}

/// `layerctl seal`.
pub fn seal(session: &Session, args: args::Seal) -> Result<()> {
    let request = SealRequest {
        dir: real(&args.dir)?,
        name: args.name,
        kind: Some(args.kind),
        force: args.force,
        squash_past: args.squash_past,
    };
    let label = format!("sealing {}", request.name);
    let result: SealResult = session.work("seal", &request, &label)?;
    let paint = session.output.paint();
    session.output.answer(&result, |result| {
        let id = short(&result.id);
        let name = paint.cyan(&result.name);
        if result.unchanged {
            return format!("{id}  {name}  nothing had changed: the same layer under one more name\n");
        }
        let (inodes, size) = (units::plural(result.inodes, "inode"), units::size(result.file_bytes));
        let (stored, took) = (units::size(result.bytes_stored), units::duration(result.seconds));
        let squashed = match result.squashed {
            0 => String::new(),
            layers => format!("; {layers} layers squashed into it"),
        };
        format!("{id}  {name}  {inodes}, {size}; {stored} added to the store, {took}{squashed}\n")
    })
}

/// `layerctl mounts`.
pub fn list(session: &Session) -> Result<()> {
    let list: MountList = session.call("mounts", &Empty {})?;
    if !list.mounts.is_empty() && !shares_mounts(&session.call("status", &Empty {})?) {
        warn_if_invisible(session, &list.mounts.iter().map(|info| info.dir.as_path()).collect::<Vec<_>>());
    }
    session.output.answer(&list, |list| {
        if list.mounts.is_empty() {
            return String::new();
        }
        let now = units::now();
        let mut table = Table::new(&["DIR", "LAYER", "TOP", "SINCE"]);
        for info in &list.mounts {
            let layer = info.layer_name.clone().unwrap_or_else(|| short(&info.layer));
            table.colored([
                (info.dir.display().to_string(), None),
                (layer, Some(Color::Cyan)),
                (top(info), None),
                (units::age(info.since.0, now), Some(Color::Dim)),
            ]);
        }
        let mut text = table.render(session.output.paint());
        for info in &list.mounts {
            if let Some(partial) = &info.partial {
                text.push_str(&format!("{}: {}\n", info.dir.display(), partial.text()));
            }
        }
        text
    })?;
    if list.mounts.is_empty() && !session.output.json {
        session.output.note("no mounts; `layerctl mount NAME DIR` makes one");
    }
    Ok(())
}

/// `layerctl uppers`.
pub fn uppers(session: &Session, args: args::Uppers) -> Result<()> {
    if let Some(args::UppersAction::Remove { uppers }) = args.action {
        let removed: UpperList = session.call("uppers-remove", &UppersRemoveRequest { uppers })?;
        return session.output.answer(&removed, |list| {
            let line = |upper: &UpperInfo| {
                let what = upper.name.clone().unwrap_or_else(|| upper.id.to_string());
                format!("removed upper {what} ({})\n", units::size(upper.data_bytes))
            };
            list.uppers.iter().map(line).collect()
        });
    }
    let list: UpperList = session.call("uppers", &Empty {})?;
    session.output.answer(&list, |list| upper_table(session, list))?;
    if list.uppers.is_empty() && !session.output.json {
        session.output.note("no uppers; a writable mount makes one");
    }
    Ok(())
}

fn upper_table(session: &Session, list: &UpperList) -> String {
    if list.uppers.is_empty() {
        return String::new();
    }
    let now = units::now();
    let mut table = Table::new(&["UPPER>", "NAME", "ON", "INODES>", "DATA>", "MOUNTED AT", "MADE"]);
    for upper in &list.uppers {
        table.colored([
            (upper.id.to_string(), None),
            (upper.name.clone().unwrap_or_else(|| "-".to_owned()), Some(Color::Cyan)),
            (upper.base_name.clone().unwrap_or_else(|| short(&upper.base)), None),
            (units::count(upper.inodes), None),
            (units::size(upper.data_bytes), None),
            (upper.mounted_at.as_ref().map_or_else(|| "-".to_owned(), |dir| dir.display().to_string()), None),
            (units::age(upper.created.0, now), Some(Color::Dim)),
        ]);
    }
    table.render(session.output.paint())
}
