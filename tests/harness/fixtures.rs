//! Programs in C that tests run inside guests: built when they are needed, static, so that they run on any root.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::case::{output_of, tests};

/// Builds `tests/fixtures/NAME.c` as the program `to`.
pub fn build(name: &str, to: &Path) -> anyhow::Result<()> {
    let source = tests().join("fixtures").join(format!("{name}.c"));
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    output_of(Command::new("cc").args(["-O1", "-static", "-Wall", "-Werror", "-o"]).arg(to).arg(&source)).map(drop)
}

/// The folder of private tools that scripts/setup guests fills.
pub fn guest_tools() -> PathBuf {
    std::env::var_os("LAYERFS_GUEST_TOOLS").map_or_else(|| PathBuf::from("/var/cache/layerfs-guests"), PathBuf::from)
}

/// Whether there is a CRIU that works with this kernel.
pub fn criu_works() -> bool {
    let candidates = [PathBuf::from("criu"), guest_tools().join("bin/criu")];
    candidates.iter().any(|criu| Command::new(criu).arg("check").output().is_ok_and(|output| output.status.success()))
}

/// Whether the program `name` is there, as the daemon finds it.
pub fn has_guest_tool(name: &str) -> bool {
    crate::case::has_tool(name) || guest_tools().join("bin").join(name).is_file()
}

/// A kernel for test machines, which scripts/setup guests brings.
pub fn kernel() -> PathBuf {
    guest_tools().join("kernel/vmlinuz")
}

/// What test machines are made of, in `tree`: a kernel, its first files (which are [`build`]'s "machine" and "echo", and the
/// network's modules), and a disk of nothing.
pub fn machine(tree: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut files = Vec::new();
    for (name, program) in [("init", "machine"), ("echo", "echo")] {
        build(program, &scratch.path().join(program))?;
        files.push((name.to_owned(), std::fs::read(scratch.path().join(program))?));
    }
    for (number, module) in MODULES.iter().enumerate() {
        let path = guest_tools().join("kernel/modules/kernel").join(module);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.push((format!("module-{number}"), bytes));
    }
    std::fs::create_dir_all(tree)?;
    std::fs::write(tree.join("initrd"), archive(&files))?;
    std::fs::copy(kernel(), tree.join("vmlinuz"))?;
    std::fs::File::create(tree.join("disk.raw"))?.set_len(1 << 20)?;
    Ok(())
}

/// What a machine's network takes, each after what it depends on.
const MODULES: [&str; 8] = [
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/net/virtio_net.ko",
];

/// The first files of a machine's kernel: nothing but the program `init`.
pub fn initrd(init: &[u8]) -> Vec<u8> {
    archive(&[("init".to_owned(), init.to_vec())])
}

/// Programs and other files of a root without folders, in cpio's "newc" form.
pub fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    let last = ("TRAILER!!!".to_owned(), Vec::new());
    for (number, (name, data)) in files.iter().chain([&last]).enumerate() {
        let mode = if number < files.len() { 0o100_755 } else { 0 };
        let fields = [number as u32, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        archive.extend_from_slice(b"070701");
        fields.iter().for_each(|field| archive.extend_from_slice(format!("{field:08x}").as_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
