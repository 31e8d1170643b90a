//! One of everything that is hard to keep, put into a folder: the tree that a round trip must not change.

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat, setxattr, utimensat,
};

use crate::case::output_of;
use crate::tree::Random;

/// Fills `root/zoo` with everything. Needs root, and the tools setfacl and setcap.
pub fn fill(root: &Path) -> anyhow::Result<()> {
    let zoo = root.join("zoo");
    fs::create_dir_all(&zoo).with_context(|| format!("cannot create {}", zoo.display()))?;
    contents(&zoo)?;
    names(&zoo)?;
    links(&zoo)?;
    specials(&zoo)?;
    attributes(&zoo)?;
    sparse(&zoo)?;
    times(&zoo)
}

/// Sizes at the borders: of inline files, of chunks, of blocks.
fn contents(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("contents");
    fs::create_dir(&folder)?;
    let mut random = Random::new(7);
    for size in [
        0usize,
        1,
        511,
        512,
        513,
        4095,
        4096,
        4097,
        16 << 10,
        (64 << 10) - 1,
        64 << 10,
        (64 << 10) + 1,
        256 << 10,
        (256 << 10) + 1,
        3_000_001,
    ] {
        fs::write(folder.join(format!("random-{size}")), random.bytes(size))?;
        fs::write(folder.join(format!("text-{size}")), random.text(size))?;
    }
    fs::write(folder.join("zeros-written"), vec![0u8; 300_000])?;
    fs::write(folder.join("executable"), b"#!/bin/sh\necho zoo\n")?;
    fs::set_permissions(folder.join("executable"), fs::Permissions::from_mode(0o755))?;
    fs::create_dir(folder.join("empty-folder"))?;
    fs::create_dir_all(zoo.join("deep/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p"))?;
    Ok(())
}

fn names(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("names");
    fs::create_dir(&folder)?;
    let longest = "n".repeat(255);
    let odd: [&[u8]; 16] = [
        b"not-utf8-\xff\xfe\x80",
        b"new\nline",
        b"tab\tand\x01control\x7f",
        b" space ",
        b"-rf",
        b"--help",
        b"quo\"te'`$(x)",
        b"back\\slash",
        "fa\u{e7}ade-\u{65e5}\u{672c}".as_bytes(),
        b"star*?[x]",
        b"...",
        b".wh",
        b".whatever",
        b"~",
        b"#hash%20",
        longest.as_bytes(),
    ];
    for (number, name) in odd.iter().enumerate() {
        fs::write(folder.join(OsStr::from_bytes(name)), format!("{number}"))?;
    }
    // Compositions that look alike and are different names.
    fs::write(folder.join("e\u{301}"), "decomposed")?;
    fs::write(folder.join("\u{e9}"), "composed")?;
    let deep = folder.join("d".repeat(255)).join("e".repeat(255));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("f".repeat(255)), "long path")?;
    fs::create_dir(folder.join(OsStr::from_bytes(b"folder\xf0\x28")))?;
    Ok(())
}

fn links(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("links");
    fs::create_dir_all(folder.join("far/away"))?;
    fs::write(folder.join("one"), "one file, four names")?;
    for name in ["two", "far/three", "far/away/four"] {
        fs::hard_link(folder.join("one"), folder.join(name))?;
    }
    fs::write(folder.join("empty"), "")?;
    fs::hard_link(folder.join("empty"), folder.join("far/empty-too"))?;
    symlink("one", folder.join("relative"))?;
    symlink("/nowhere/at/all", folder.join("dangling"))?;
    symlink(OsStr::from_bytes(b"odd\xfftarget\n"), folder.join("odd-target"))?;
    symlink("t".repeat(4095), folder.join("long-target"))?;
    symlink("loop", folder.join("loop"))?;
    fs::hard_link(folder.join("dangling"), folder.join("far/dangling-too"))?;
    chown_link(&folder.join("relative"), 12, 34)?;
    Ok(())
}

fn specials(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("specials");
    fs::create_dir(&folder)?;
    let mode = Mode::from_raw_mode(0o640);
    mknodat(CWD, folder.join("fifo"), FileType::Fifo, mode, 0)?;
    mknodat(CWD, folder.join("null"), FileType::CharacterDevice, mode, makedev(1, 3))?;
    mknodat(CWD, folder.join("zero-zero"), FileType::CharacterDevice, mode, makedev(0, 0))?;
    mknodat(CWD, folder.join("disk"), FileType::BlockDevice, mode, makedev(8, 1))?;
    mknodat(CWD, folder.join("large-numbers"), FileType::CharacterDevice, mode, makedev(511, 1_048_575))?;
    fs::hard_link(folder.join("null"), folder.join("null-too"))?;
    // A socket's address is short: bind it by a relative path from a short place.
    let short = tempfile::Builder::new().prefix("lz").tempdir()?;
    drop(UnixListener::bind(short.path().join("s"))?);
    if fs::rename(short.path().join("s"), folder.join("socket")).is_err() {
        mknodat(CWD, folder.join("socket"), FileType::Socket, mode, 0)?;
    }
    ensure!(fs::symlink_metadata(folder.join("socket"))?.file_type().is_socket(), "no socket was made");
    Ok(())
}

fn attributes(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("attributes");
    fs::create_dir(&folder)?;
    let file = |name: &str| -> anyhow::Result<std::path::PathBuf> {
        let path = folder.join(name);
        fs::write(&path, name)?;
        Ok(path)
    };
    for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2755), ("none", 0o000), ("all", 0o777)] {
        fs::set_permissions(file(name)?, fs::Permissions::from_mode(mode))?;
    }
    let owned = file("owned")?;
    chown(&owned, Some(4_000_000_000), Some(65_534))?;
    for (name, mode) in [("sticky", 0o1777), ("setgid-folder", 0o2775)] {
        fs::create_dir(folder.join(name))?;
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(mode))?;
    }

    let tagged = file("xattrs")?;
    setxattr(&tagged, "user.text", b"plain", XattrFlags::empty())?;
    setxattr(&tagged, "user.empty", b"", XattrFlags::empty())?;
    setxattr(&tagged, "user.binary", &[0, 255, 10, 61], XattrFlags::empty())?;
    setxattr(&tagged, "trusted.of.root", b"yes", XattrFlags::empty())?;
    setxattr(file("large-xattr")?, "user.large", &Random::new(3).bytes(3000), XattrFlags::empty())?;
    setxattr(&folder, "user.on-a-folder", b"yes", XattrFlags::empty())?;

    let capable = file("capable")?;
    output_of(Command::new("setcap").arg("cap_net_bind_service,cap_net_raw=+ep").arg(&capable))?;
    let shared = file("acl")?;
    output_of(Command::new("setfacl").args(["-m", "u:1234:rw,g:5678:r,m::rwx"]).arg(&shared))?;
    let defaults = folder.join("acl-folder");
    fs::create_dir(&defaults)?;
    output_of(Command::new("setfacl").args(["-m", "u:1234:rwx,d:u:1234:rwx,d:g:99:r"]).arg(&defaults))?;
    fs::write(defaults.join("inherits"), "its ACL")?;
    Ok(())
}

fn sparse(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("sparse");
    fs::create_dir(&folder)?;
    fs::File::create(folder.join("only-a-hole"))?.set_len(50 << 20)?;
    let mut random = Random::new(11);
    let mut file = fs::File::create(folder.join("islands"))?;
    for offset in [0u64, 1 << 20, (9 << 20) + 4096, 33 << 20] {
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(&random.bytes(70_000))?;
    }
    file.set_len(40 << 20)?;
    let mut file = fs::File::create(folder.join("data-at-the-end"))?;
    file.seek(SeekFrom::Start((300 << 20) + 123))?;
    file.write_all(b"far out")?;
    Ok(())
}

/// Times before 1970, after 2038, to the nanosecond; last, because what was made above changed its folders' times.
fn times(zoo: &Path) -> anyhow::Result<()> {
    let folder = zoo.join("times");
    fs::create_dir(&folder)?;
    let moments = [
        ("nanoseconds", 1_600_000_000, 123_456_789),
        ("before-1970", -1_000_000, 1),
        ("after-2038", 4_000_000_000, 999_999_999),
        ("zero", 0, 0),
    ];
    for (name, seconds, nanoseconds) in moments {
        fs::write(folder.join(name), name)?;
        set_time(&folder.join(name), seconds, nanoseconds)?;
    }
    symlink("zero", folder.join("link"))?;
    set_time(&folder.join("link"), 1_234_567_890, 987_654_321)?;
    set_time(&zoo.join("links"), 1_500_000_000, 500_000_001)?;
    set_time(&folder, 1_111_111_111, 111_111_111)
}

/// Sets both times of `path` itself, links not followed.
pub fn set_time(path: &Path, seconds: i64, nanoseconds: i64) -> anyhow::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot set the times of {}", path.display()))
}

fn chown_link(path: &Path, uid: u32, gid: u32) -> anyhow::Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).with_context(|| format!("cannot chown {}", path.display()))
}
