//! Others that use what we make: LXC on a mounted root, mount(8) and fstab, skopeo and umoci on our OCI layouts.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Containers, Debian, Fuse, Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::host::Host;
use layerfs_tests::{compare, ctl, debian, tree, zoo};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("guests::lxc_starts_on_a_mounted_root", &[Root, Fuse, Debian, Containers, Tool("lxc-start")], lxc),
        Case::new("guests::mount_and_fstab", &[Root, Fuse], mount_and_fstab),
        Case::new("guests::packages_install_in_a_mounted_root", &[Root, Fuse, Debian], dpkg),
        Case::new("guests::umoci_unpacks_our_layout", &[Root, Fuse, Tool("umoci"), Tool("skopeo")], oci_layers),
        Case::new("guests::skopeo_round_trip", &[Root, Tool("skopeo")], skopeo),
    ]
}

fn lxc() -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(debian::root()?, "debian", &["--kind", "base"])?;
    let root = host.mount("debian", "root", &[])?;
    let config = host.path("config");
    let text = format!(
        "lxc.uts.name = guest\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = none\nlxc.apparmor.profile = unconfined\nlxc.mount.auto = proc:mixed\n",
        root.display()
    );
    fs::write(&config, text)?;
    let name = format!("lfst{}", std::process::id());
    let script = "id -u > /root/ran && cat /etc/debian_version >> /root/ran && mknod /root/null c 1 3 && echo quiet > /root/null && ln /root/ran /root/linked && sync -f /root/ran";
    let mut start = Command::new("lxc-start");
    start
        .args(["--foreground", "--name", &name, "--lxcpath"])
        .arg(host.new_folder("lxc")?)
        .arg("--rcfile")
        .arg(&config);
    let log = host.path("lxc.log");
    start.arg("--logfile").arg(&log).args(["--logpriority", "INFO", "--", "/bin/sh", "-c", script]);
    output_of(&mut start).with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let ran = fs::read_to_string(root.join("root/ran"))?;
    ensure!(ran.starts_with("0\n12"), "the container wrote {ran:?}");
    host.seal(&root, "ran")?;
    let again = host.mount("ran", "again", &["--read-only"])?;
    ensure!(fs::read_to_string(again.join("root/linked"))? == ran, "what the container wrote was not sealed");
    host.umount(&again)?;
    host.umount(&root)?;
    host.fsck()
}

/// The helper's link where mount(8) looks for it; taken away again if it was us who put it there.
struct Helper {
    link: PathBuf,
    put_back: Option<PathBuf>,
}

impl Helper {
    fn install() -> anyhow::Result<Helper> {
        let link = PathBuf::from("/sbin/mount.layerfs");
        let put_back = fs::read_link(&link).ok();
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        symlink(ctl::binary()?.canonicalize()?, &link)?;
        Ok(Helper { link, put_back })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.link);
        if let Some(target) = &self.put_back {
            let _ = symlink(target, &self.link);
        }
    }
}

fn mount_and_fstab() -> anyhow::Result<()> {
    let host = Host::new()?;
    let _helper = Helper::install()?;
    tree::fill(&host.path("tree"), 111, 50, 3000)?;
    host.import(&host.path("tree"), "tree", &[])?;
    let (by_hand, by_fstab) = (host.new_folder("by-hand")?, host.new_folder("by-fstab")?);
    let store = host.ctl.store().display().to_string();
    output_of(Command::new("mount").args(["-t", "layerfs", "-o", &format!("ro,store={store}"), "tree"]).arg(&by_hand))?;
    compare::same_by_rsync(&host.path("tree"), &by_hand)?;
    ensure!(fs::write(by_hand.join("x"), "").is_err(), "-o ro was not honoured");

    let fstab = host.path("fstab");
    fs::write(
        &fstab,
        format!(
            "tree {} layerfs store={store},upper=kept,nofail,x-systemd.requires=network.target 0 0\n",
            by_fstab.display()
        ),
    )?;
    output_of(Command::new("mount").arg("-T").arg(&fstab).arg(&by_fstab))?;
    fs::write(by_fstab.join("kept"), "by the upper of that name")?;
    output_of(Command::new("umount").arg(&by_fstab))?;
    output_of(Command::new("mount").arg("-T").arg(&fstab).arg(&by_fstab))?;
    ensure!(fs::read_to_string(by_fstab.join("kept"))? == "by the upper of that name", "the named upper was lost");
    output_of(Command::new("umount").arg(&by_fstab))?;
    output_of(Command::new("umount").arg(&by_hand))?;

    let refused = Command::new("mount")
        .args(["-t", "layerfs", "-o", &format!("store={store}"), "no-such-layer"])
        .arg(&by_hand)
        .output()?;
    ensure!(!refused.status.success() && !refused.stderr.is_empty(), "mount(8) took a layer that isn't there");
    Ok(())
}

fn dpkg() -> anyhow::Result<()> {
    let host = Host::new()?;
    host.import(debian::root()?, "debian", &[])?;
    let root = host.mount("debian", "root", &[])?;
    // A package of our own making: no mirror is needed, dpkg does all that it does for a real one.
    let script = format!(
        "set -e; mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin /tmp/p/var/lib/zoo; \
         printf 'Package: zoo\\nVersion: 1\\nArchitecture: all\\nMaintainer: zoo <zoo@example.org>\\nDescription: zoo\\n' > /tmp/p/DEBIAN/control; \
         printf '#!/bin/sh\\necho configured > /var/lib/zoo/state\\n' > /tmp/p/DEBIAN/postinst; chmod 755 /tmp/p/DEBIAN/postinst; \
         printf '#!/bin/sh\\ncat /var/lib/zoo/state\\n' > /tmp/p/usr/bin/zoo; chmod 755 /tmp/p/usr/bin/zoo; \
         dpkg-deb --build /tmp/p /tmp/zoo.deb >/dev/null; dpkg --install /tmp/zoo.deb >/dev/null; rm -rf /tmp/p /tmp/zoo.deb; zoo; {}",
        "dpkg --remove --force-depends tzdata >/dev/null 2>&1; dpkg --verify zoo"
    );
    let said = output_of(
        Command::new("chroot").arg(&root).args(["/bin/sh", "-c", &script]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    )?;
    ensure!(said == "configured\n", "the installed package said {said:?}");
    host.seal(&root, "with-zoo")?;
    host.export("with-zoo", &host.path("out"), &[])?;
    compare::same_by_rsync(&root, &host.path("out"))?;
    host.umount(&root)?;
    host.fsck()
}

/// A base and a layer over it that adds, changes, replaces and removes.
fn stack(host: &Host) -> anyhow::Result<PathBuf> {
    let base = host.path("base");
    tree::fill(&base, 121, 300, 3000)?;
    fs::create_dir_all(base.join("gone/with/all"))?;
    fs::write(base.join("gone/with/all/this"), "x")?;
    fs::create_dir(base.join("replaced"))?;
    fs::write(base.join("replaced/old"), "old")?;
    fs::write(base.join("file-becomes-folder"), "file")?;
    host.import(&base, "base", &["--kind", "base"])?;
    let root = host.mount("base", "root", &[])?;
    fs::remove_dir_all(root.join("gone"))?;
    fs::remove_dir_all(root.join("replaced"))?;
    fs::create_dir(root.join("replaced"))?;
    fs::write(root.join("replaced/new"), "new")?;
    fs::remove_file(root.join("file-becomes-folder"))?;
    fs::create_dir(root.join("file-becomes-folder"))?;
    fs::rename(root.join("part-00/group-001"), root.join("renamed"))?;
    fs::write(root.join("added"), "added")?;
    fs::hard_link(root.join("added"), root.join("added-too"))?;
    fs::remove_file(root.join("part-00/group-000/file-00001"))?;
    host.seal(&root, "app")?;
    Ok(root)
}

/// The reference by which tools find the image in the layout.
fn reference(layout: &Path) -> anyhow::Result<String> {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let name = index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"].as_str();
    name.map(str::to_owned).with_context(|| format!("no reference name in {index}"))
}

fn oci_layers() -> anyhow::Result<()> {
    let host = Host::new()?;
    let root = stack(&host)?;
    let layout = host.path("layout");
    host.export("app", &layout, &["--format", "oci"])?;
    let tag = reference(&layout)?;
    let shown = output_of(Command::new("skopeo").args(["inspect", &format!("oci:{}:{tag}", layout.display())]))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    ensure!(shown["Layers"].as_array().is_some_and(|layers| layers.len() == 2), "not one tar per layer: {shown}");
    let bundle = host.path("bundle");
    output_of(Command::new("umoci").args(["unpack", "--image", &format!("{}:{tag}", layout.display())]).arg(&bundle))?;
    compare::same_by_rsync_with(&root, &bundle.join("rootfs"), &["-aH"])?;

    // And back again: the image is a stack of two layers with the same tree on top.
    host.import(&layout, "back", &[])?;
    host.export("back", &host.path("out"), &[])?;
    compare::same_by_rsync(&root, &host.path("out"))?;
    let log = host.ctl.json(["log", "back"])?;
    let depth = log["layers"].as_array().or_else(|| log.as_array()).map(Vec::len);
    ensure!(depth == Some(2), "the image became {depth:?} layers: {log}");
    host.umount(&root)?;
    host.fsck()
}

fn skopeo() -> anyhow::Result<()> {
    let host = Host::new()?;
    let source = host.path("source");
    tree::fill(&source, 131, 200, 4000)?;
    fs::hard_link(source.join("part-00/group-000/file-00000"), source.join("linked"))?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "image", &[])?;
    let layout = host.path("layout");
    host.export("image", &layout, &["--format", "oci"])?;
    let from = format!("oci:{}:{}", layout.display(), reference(&layout)?);
    let policy = host.path("policy.json");
    fs::write(&policy, "{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}")?;
    let copy =
        |to: &str| output_of(Command::new("skopeo").arg("--policy").arg(&policy).args(["copy", "--quiet", &from, to]));
    let (archive, second, tarred) = (host.path("docker.tar"), host.path("second"), host.path("oci.tar"));
    copy(&format!("docker-archive:{}:image:latest", archive.display()))?;
    copy(&format!("oci:{}:again", second.display()))?;
    copy(&format!("oci-archive:{}:again", tarred.display()))?;
    for (name, path) in [("docker", &archive), ("oci", &second), ("oci-tar", &tarred)] {
        host.import(path, name, &[])?;
        let out = host.path(format!("out-{name}"));
        host.export(name, &out, &[])?;
        compare::same_by_rsync(&source, &out).with_context(|| name.to_owned())?;
    }
    Ok(())
}
