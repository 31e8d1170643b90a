//! Whose files they are: idmapped mounts, containers in user namespaces, and users without privilege.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Containers, Debian, Fuse, Root, Tool};
use layerfs_tests::case::{Case, Need, elsewhere, output_of, shell};
use layerfs_tests::host::Host;
use layerfs_tests::{ctl, debian};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// Where the ids of the container begin on the host, and how many it has.
const BASE: u32 = 100_000;
const COUNT: u32 = 65_536;
/// What the kernel shows of an id that has no place in a mapping.
const NOBODY: u32 = 65_534;
/// `struct mount_attr`, which no crate has, as four numbers; its size and the attribute for a mapping.
const MOUNT_ATTR_BYTES: usize = 32;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

const LXC: &[Need] = &[Root, Fuse, Debian, Containers, Tool("lxc-execute")];
/// A function of the shell for what has to fail.
const FAILS: &str = "fails() { if \"$@\" 2>/dev/null; then echo \"$* didn't fail\"; exit 1; fi; }";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("owners::an_idmapped_mount_is_a_container_s", &[Root, Fuse, Tool("setfacl")], idmapped),
        Case::new("owners::an_lxc_container_without_privilege", LXC, lxc),
        Case::new("owners::a_user_mounts_without_privilege", &[Root, Fuse, Tool("fusermount3")], unprivileged),
    ]
}

/// A process in a user namespace whose root is [`BASE`]. Dropping it ends it.
struct Container(Child);

impl Container {
    fn new() -> anyhow::Result<Container> {
        let child = Command::new("unshare").args(["--user", "sleep", "1000"]).stdin(Stdio::null()).spawn()?;
        let container = Container(child);
        let ours = fs::read_link("/proc/self/ns/user")?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while fs::read_link(container.file("ns/user"))? == ours {
            ensure!(Instant::now() < deadline, "unshare gives no user namespace");
            std::thread::yield_now();
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(container.file(map), format!("0 {BASE} {COUNT}"))?;
        }
        Ok(container)
    }

    fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.0.id())
    }

    /// Runs a line of the shell as the container's root.
    fn shell(&self, line: &str) -> anyhow::Result<String> {
        let target = self.0.id().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &target, "--user", "--setuid", "0", "--setgid", "0", "--", "sh", "-euc", line]);
        output_of(&mut command)
    }

    /// Shows what is mounted on `from` at `to` as well, as if the host's root were the container's.
    fn map(&self, from: &Path, to: &Path) -> anyhow::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(rustix::fs::CWD, from, flags)?;
        set_mapping(&tree, &File::open(self.file("ns/user"))?)?;
        move_mount(tree.as_fd(), "", rustix::fs::CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[allow(unsafe_code)] // No crate has mount_setattr.
fn set_mapping(tree: &OwnedFd, namespace: &File) -> anyhow::Result<()> {
    let attributes = [MOUNT_ATTR_IDMAP, 0, 0, namespace.as_raw_fd() as u64];
    // SAFETY: the path is empty and ends with 0, and the kernel reads as many bytes of the attributes as there are.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attributes.as_ptr(),
            MOUNT_ATTR_BYTES,
        )
    };
    ensure!(result == 0, "mount_setattr: {}", std::io::Error::last_os_error());
    Ok(())
}

fn owner(path: &Path) -> anyhow::Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    Ok((metadata.uid(), metadata.gid()))
}

/// What LXC does for an unprivileged container: the layers keep the owners that a container sees, whatever its mapping.
fn idmapped() -> anyhow::Result<()> {
    let host = Host::cold()?;
    let tree = host.new_folder("tree")?;
    for (name, id) in [("root", 0), ("five", 5), ("outside", 70_000)] {
        fs::write(tree.join(name), name)?;
        chown(tree.join(name), Some(id), Some(id))?;
    }
    host.import(&tree, "base", &[])?;
    let mnt = host.mount("base", "mnt", &[])?;
    let (container, shifted) = (Container::new()?, host.new_folder("shifted")?);
    container.map(&mnt, &shifted)?;
    for (name, seen) in [("root", BASE), ("five", BASE + 5), ("outside", NOBODY)] {
        ensure!(owner(&shifted.join(name))? == (seen, seen), "{name}: {:?}", owner(&shifted.join(name))?);
    }
    let refused = File::create(shifted.join("host's")).err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EOVERFLOW), "the host's root has no id in there: {refused:?}");

    let work = format!(
        "{FAILS}; cd {}; test \"$(stat -c %u-%g root five outside | tr '\\n' ' ')\" = '0-0 5-5 {NOBODY}-{NOBODY} '
         echo more >> root; mkdir folder; echo new > folder/new; ln folder/new linked; mv five folder/moved; ln -s x soft
         mkfifo pipe; chown 7:8 folder/new; chown -h 9:9 soft; chmod 4750 folder/moved; setfacl -m u:6:rw root
         fails chown 7 outside; fails mknod device c 1 3; fails sh -c 'echo no >> outside'",
        shifted.display()
    );
    container.shell(&work)?;
    let expected =
        [("root", 0, 0), ("folder", 0, 0), ("linked", 7, 8), ("folder/moved", 5, 5), ("soft", 9, 9), ("pipe", 0, 0)];
    let check = |folder: &Path, base: u32| -> anyhow::Result<()> {
        for (name, uid, gid) in expected {
            let seen = owner(&folder.join(name))?;
            ensure!(seen == (uid + base, gid + base), "{name} is {seen:?}'s");
        }
        ensure!(fs::read_to_string(folder.join("root"))? == "rootmore\n");
        ensure!(fs::metadata(folder.join("folder/moved"))?.mode() & 0o7777 == 0o4750);
        let rules = shell(&format!("getfacl --numeric --absolute-names {}/root", folder.display()))?;
        ensure!(rules.contains(&format!("user:{}:rw-", 6 + base)), "{rules}");
        Ok(())
    };
    check(&mnt, 0)?;
    check(&shifted, BASE)?;

    host.kill_serving()?;
    container.shell(&format!("cd {}; echo after > later; test $(stat -c %u later) = 0", shifted.display()))?;
    check(&shifted, BASE)?;
    host.seal(&mnt, "sealed")?;
    shell(&format!("umount {}", shifted.display()))?;
    host.umount(&mnt)?;
    let sealed = host.mount("sealed", "again", &["--read-only"])?;
    check(&sealed, 0)?;
    ensure!(owner(&sealed.join("later"))? == (0, 0));
    host.umount(&sealed)?;
    host.fsck()
}

/// A whole Debian whose root is an ordinary user of the host.
fn lxc() -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(debian::root()?, "debian", &[])?;
    let (root, containers) = (host.mount("debian", "root", &[])?, host.new_folder("containers")?);
    let above = root.parent().context("a folder above")?;
    // Its root must be able to get there.
    shell(&format!("chmod 755 {}", above.display()))?;
    let (config, name) = (above.join("config"), format!("owners{}", std::process::id()));
    let text = format!(
        "lxc.rootfs.path = dir:{}\nlxc.rootfs.options = idmap=container\nlxc.idmap = u 0 {BASE} {COUNT}\n\
         lxc.idmap = g 0 {BASE} {COUNT}\nlxc.net.0.type = empty\nlxc.apparmor.profile = unconfined\n\
         lxc.mount.auto = proc:rw\nlxc.autodev = 1\n",
        root.display()
    );
    fs::write(&config, text)?;
    let work = "export PATH=/usr/sbin:/usr/bin:/sbin:/bin; test $(id -u) = 0; test $(stat -c %u /etc/passwd) = 0
                useradd --create-home someone; su someone -c 'echo mine > ~/file'; mkdir /srv/www; chown 33:33 /srv/www";
    let line = format!(
        "lxc-execute -P {} -n {name} -f {} -- /bin/sh -euc \"{}\"",
        containers.display(),
        config.display(),
        work.replace('$', "\\$")
    );
    shell(&line)?;
    ensure!(owner(&root.join("srv/www"))? == (33, 33));
    let someone = owner(&root.join("home/someone"))?;
    ensure!(
        someone.0 >= 1000 && someone.0 < COUNT && owner(&root.join("home/someone/file"))? == someone,
        "{someone:?}"
    );
    host.umount(&root)?;
    host.fsck()
}

/// A user's own store and daemon, in a mount namespace where everybody may open `/dev/fuse`, as on most systems.
fn unprivileged() -> anyhow::Result<()> {
    let host = Host::cold()?;
    let home = host.new_folder("home")?;
    let script = format!("{FAILS}\n{}", include_str!("owners.sh"));
    fs::write(home.join("script"), script)?;
    let above = home.parent().context("a folder above")?;
    shell(&format!("chmod 755 {}; chown nobody {}", above.display(), home.display()))?;
    let line = format!(
        "cd {}; mknod -m 666 fuse c 10 229; mount --bind fuse /dev/fuse; touch layerctl; mount --bind {} layerctl
         exec setpriv --reuid nobody --regid nogroup --clear-groups env HOME=$PWD sh -eu script",
        home.display(),
        ctl::binary()?.display(),
    );
    output_of(Command::new(elsewhere()).args(["-", "sh", "-euc", &line])).map(drop)
}
