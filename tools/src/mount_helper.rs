//! mount.layerfs: what mount(8) and fstab call. The same binary under another name; mount(8) looks for
//! mount.fuse.layerfs when what is mounted already is to be remounted, since the kernel calls the type so.
//!
//! Parsing is pure; the mount itself is the daemon's, with flags that are the kernel's own (nosuid, noatime, …): it sets them again
//! when it mounts again. Exit codes are those of mount(8).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use layerfs::mount::{Flags, Transport};

use crate::api::mounts::{MountInfo, MountRequest, RemountRequest};
use crate::autostart::{self, StoreUse};
use crate::cli::{ColorChoice, Global};
use crate::config::{Environment, Settings};
use crate::failure::{Class, Failure, Result};
use crate::output::Output;

/// mount(8)'s codes for wrong usage and for a mount that failed.
const EXIT_USAGE: u8 = 1;
const EXIT_FAILED: u8 = 32;

const USAGE: &str = "usage: mount.layerfs NAME DIR [-fnsv] [-o ro,upper=UPPER,store=PATH,transport=HOW,remount,…]\n\
    mount(8) calls this for `mount -t layerfs NAME DIR -o …` and for lines of fstab; see mount.layerfs(8)";

/// Options with a meaning here, besides the generic ones below and those of [`Flags`].
const OURS: &str = "ro, rw, upper=UPPER, store=PATH, transport=auto|uring|read, writeback=on|off, remount";

/// Options that are for mount(8), systemd or other readers of fstab.
const FOR_OTHERS: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "fail",
    "_netdev",
    "rw",
    "suid",
    "dev",
    "exec",
    "async",
    "atime",
    "diratime",
    "strictatime",
    "nostrictatime",
    "norelatime",
    "lazytime",
    "nolazytime",
    "mand",
    "nomand",
    "loud",
    "silent",
    "allow_other",
    "default_permissions",
    "user_id",
    "group_id",
    "iversion",
    "noiversion",
    "nosymfollow",
];

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Wish {
    name: String,
    dir: PathBuf,
    read_only: bool,
    is_remount: bool,
    upper: Option<String>,
    transport: Transport,
    writeback: bool,
    store: Option<PathBuf>,
    flags: Flags,
    is_fake: bool,
    is_verbose: bool,
}

impl Wish {
    /// What the kernel shall keep of the mount.
    fn kernels(&self) -> Flags {
        if self.read_only { self.flags.and(Flags::READ_ONLY) } else { self.flags }
    }
}

/// Runs as mount.layerfs; returns the exit code.
pub fn main(args: impl Iterator<Item = OsString>) -> u8 {
    let output = Output::new(&Global { store: None, json: false, quiet: false, color: ColorChoice::Auto });
    let args: Vec<OsString> = args.collect();
    if args.iter().any(|arg| arg == "-h" || arg == "--help") {
        output.note(USAGE);
        return 0;
    }
    let (outcome, code) = match parse(&args) {
        Err(failure) => (Err(failure.hint(USAGE)), EXIT_USAGE),
        Ok(wish) if wish.is_fake => (Ok(()), 0),
        Ok(wish) => (act(&wish, output), EXIT_FAILED),
    };
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            output.note(&format!("mount.layerfs: {}", failure.message.replace('\n', "\n  ")));
            if failure.class == Class::Denied { EXIT_USAGE } else { code }
        }
    }
}

fn parse(args: &[OsString]) -> Result<Wish> {
    let mut positional = Vec::new();
    let mut options = Vec::new();
    let (mut is_fake, mut is_verbose, mut is_sloppy) = (false, false, false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if !bytes.starts_with(b"-") || bytes == b"-" {
            positional.push(arg);
            continue;
        }
        for (index, letter) in bytes.iter().enumerate().skip(1) {
            match letter {
                b'f' => is_fake = true,
                b'v' => is_verbose = true,
                b's' => is_sloppy = true,
                b'n' => {}
                b'r' => options.push(OsString::from("ro")),
                b'w' => options.push(OsString::from("rw")),
                b'o' | b't' | b'N' => {
                    let attached = &bytes[index + 1..];
                    let value =
                        if attached.is_empty() { args.next().map(|value| value.as_bytes()) } else { Some(attached) };
                    let value = value.ok_or_else(|| Failure::invalid(format!("-{} needs a value", *letter as char)))?;
                    if *letter == b'o' {
                        options.extend(value.split(|byte| *byte == b',').map(|o| OsStr::from_bytes(o).to_owned()));
                    }
                    break;
                }
                other => return Err(Failure::invalid(format!("-{} is no option", *other as char))),
            }
        }
    }
    let [name, dir] = positional[..] else {
        return Err(Failure::invalid("a layer's name and a folder are needed"));
    };
    let name = name.to_str().ok_or_else(|| Failure::invalid(format!("{name:?} is not a layer's name")))?.to_owned();
    let mut wish = Wish {
        name,
        dir: crate::absolute(Path::new(dir))?,
        read_only: false,
        is_remount: false,
        upper: None,
        transport: Transport::Read,
        writeback: true,
        store: None,
        flags: Flags::default(),
        is_fake,
        is_verbose,
    };
    options.iter().try_for_each(|option| apply(&mut wish, option, is_sloppy))?;
    Ok(wish)
}

fn apply(wish: &mut Wish, option: &OsStr, is_sloppy: bool) -> Result<()> {
    let text = option.to_str().ok_or_else(|| Failure::invalid(format!("{option:?} is no option")))?;
    match text.split_once('=').unwrap_or((text, "")) {
        ("", _) => {}
        ("ro", "") => wish.read_only = true,
        ("rw", "") => wish.read_only = false,
        ("remount", "") => wish.is_remount = true,
        ("writeback", "on") => wish.writeback = true,
        ("writeback", "off") => wish.writeback = false,
        ("transport", "auto") => wish.transport = Transport::Auto,
        ("transport", "uring") => wish.transport = Transport::Uring,
        ("transport", "read") => wish.transport = Transport::Read,
        ("upper", upper) if !upper.is_empty() => wish.upper = Some(upper.to_owned()),
        ("store", store) if !store.is_empty() => wish.store = Some(PathBuf::from(store)),
        (name, _) if FOR_OTHERS.contains(&name) || name.starts_with("x-") || name.starts_with("X-") => {}
        (name, "") if Flags::named(name).is_some() => {
            wish.flags = wish.flags.and(Flags::named(name).unwrap_or_default());
        }
        ("comment" | "uhelper" | "helper" | "context" | "fscontext" | "defcontext" | "rootcontext", _) => {}
        _ if is_sloppy => {}
        _ => return Err(Failure::invalid(format!("{text:?} is no option of layerfs; there are {OURS}"))),
    }
    Ok(())
}

fn act(wish: &Wish, output: Output) -> Result<()> {
    if wish.is_remount {
        return remount(wish, output);
    }
    let settings = Settings::find(wish.store.as_deref(), &Environment::current())?;
    let client = autostart::ensure(&settings, StoreUse::MustExist)?.telling(output);
    let request = MountRequest {
        layer: wish.name.clone(),
        dir: std::fs::canonicalize(&wish.dir).map_err(|e| Failure::file("open", &wish.dir, e))?,
        // An upper that may be looked at and not changed: the kernel sees to that.
        read_only: wish.read_only && wish.upper.is_none(),
        options: if wish.upper.is_some() { wish.kernels() } else { wish.flags },
        upper: wish.upper.clone(),
        transport: wish.transport,
        writeback: wish.writeback,
    };
    let info: MountInfo = client.call("mount", &request).map_err(|failure| {
        if failure.class == Class::NotFound && wish.name.starts_with('/') {
            let hint = "mount(8) made a path of the name because a file of that name is in the current folder; \
                        run it from another folder";
            return failure.hint(hint);
        }
        failure
    })?;
    if wish.is_verbose {
        output.note(&format!("mount.layerfs: {} mounted on {}", wish.name, info.dir.display()));
    }
    Ok(())
}

/// Needs no daemon: what is mounted is read from the kernel, so that the store needn't be known. One that answers is told, so that it
/// mounts it so again.
fn remount(wish: &Wish, output: Output) -> Result<()> {
    let dir = std::fs::canonicalize(&wish.dir).map_err(|e| Failure::file("open", &wish.dir, e))?;
    let table = std::fs::read("/proc/self/mountinfo").map_err(|e| Failure::file("read", "/proc/self/mountinfo", e))?;
    let is_read_only = superblock_is_read_only(&table, &dir)
        .ok_or_else(|| Failure::new(Class::NotFound, format!("no layer is mounted at {}", dir.display())))?;
    if is_read_only && !wish.read_only {
        let text = format!("{} was mounted without an upper, so it cannot become writable", dir.display());
        return Err(Failure::new(Class::Unsupported, text).hint("unmount it, and mount it again without ro"));
    }
    layerfs::mount::set_flags(&dir, wish.kernels())?;
    if let Err(failure) = tell(wish, dir) {
        let why = failure.message.lines().next().unwrap_or_default();
        output.note(&format!("mount.layerfs: done; but if it is mounted again, that is without: {why}"));
    }
    Ok(())
}

/// Tells the daemon what was set.
fn tell(wish: &Wish, dir: PathBuf) -> Result<()> {
    let settings = Settings::find(wish.store.as_deref(), &Environment::current())?;
    let absent = || Failure::new(Class::NotFound, format!("no daemon runs for the store {}", settings.store.display()));
    let client = autostart::find(&settings)?.ok_or_else(absent)?;
    client.call("remount", &RemountRequest { dir, options: wish.kernels() }).map(|_: MountInfo| ())
}

/// Whether the topmost layerfs mount at `dir` was made read-only; none if there is none.
fn superblock_is_read_only(mountinfo: &[u8], dir: &Path) -> Option<bool> {
    mountinfo.split(|byte| *byte == b'\n').rev().find_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = layerfs::mount::unescape(fields.nth(4)?);
        let mut after = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, _source, options) = (after.next()?, after.next()?, after.next()?);
        let is_ours = kind == b"fuse.layerfs" && point == dir.as_os_str().as_bytes();
        is_ours.then(|| options.split(|byte| *byte == b',').any(|option| option == b"ro"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(args: &[&str]) -> Result<Wish> {
        parse(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn what_mount_8_passes_is_understood() {
        let parsed = wish(&[
            "debian/12",
            "/mnt",
            "-o",
            "rw,nosuid,noatime,x-systemd.automount,upper=web,store=/s,transport=read",
        ])
        .unwrap();
        assert_eq!((parsed.name.as_str(), parsed.dir.as_path()), ("debian/12", Path::new("/mnt")));
        assert_eq!(parsed.upper.as_deref(), Some("web"));
        assert_eq!(parsed.transport, Transport::Read);
        assert_eq!(parsed.store.as_deref(), Some(Path::new("/s")));
        assert_eq!(parsed.flags, Flags::NO_SUID.and(Flags::NO_ATIME));
        assert!(!parsed.read_only);
        let parsed = wish(&["a", "/mnt", "-sfnv", "-t", "layerfs", "-oro,strange"]).unwrap();
        assert!(parsed.read_only && parsed.is_fake && parsed.is_verbose);
        // What mount(8) takes over from the kernel's table.
        let taken_over = "rw,remount,ro,nosuid,user_id=0,group_id=0,default_permissions,allow_other";
        assert!(wish(&["a", "/mnt", "-o", taken_over]).unwrap().is_remount);
    }

    #[test]
    fn mounts_are_found_in_the_kernels_table() {
        let table = b"36 35 98:0 / / rw,noatime master:1 - ext4 /dev/root rw\n\
            40 36 0:50 / /srv/my\\040web rw,nosuid shared:9 - fuse.layerfs app rw,user_id=0\n\
            41 36 0:51 / /srv/ro ro - fuse.layerfs app ro,user_id=0\n";
        assert_eq!(superblock_is_read_only(table, Path::new("/srv/my web")), Some(false));
        assert_eq!(superblock_is_read_only(table, Path::new("/srv/ro")), Some(true));
        assert_eq!(superblock_is_read_only(table, Path::new("/")), None);
    }

    #[test]
    fn mistakes_are_told() {
        assert!(wish(&["a"]).unwrap_err().message.contains("folder"));
        assert!(wish(&["a", "/mnt", "-o", "uper=x"]).unwrap_err().message.contains("upper=UPPER"));
        assert!(wish(&["a", "/mnt", "-o"]).unwrap_err().message.contains("-o"));
        assert!(wish(&["a", "/mnt", "-q"]).unwrap_err().message.contains("-q"));
    }
}
