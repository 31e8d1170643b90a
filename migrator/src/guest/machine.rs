//! What the driver "qemu" has to know of a machine, as it stands in a [`super::GuestSpec`], and what can emulate one here.
//!
//! Invariant: what isn't understood is refused when the guest is created.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::options::Network;
use super::processes::wait_until;

const MEGABYTE: u64 = 1 << 20;
/// What has the driver choose.
pub(super) const AUTO: &str = "auto";

/// What can emulate a machine here with `program`, the best first.
pub(super) fn accels(program: &Path) -> Vec<String> {
    static KVM: OnceLock<bool> = OnceLock::new();
    let has_kvm = *KVM.get_or_init(|| kvm_works(program));
    let all = [("kvm", has_kvm), ("tcg", true)];
    all.iter().filter(|(_, works)| *works).map(|(name, _)| (*name).to_owned()).collect()
}

/// Whether a processor like that of our machines runs on KVM here: one with a few instructions for a program, which end
/// QEMU with a code. There may be a /dev/kvm that can't give what machines of ours want.
fn kvm_works(program: &Path) -> bool {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return false;
    }
    let Ok(mut firmware) = tempfile_in_memory() else { return false };
    let mut image = vec![0; 64 << 10];
    // Where it begins, 16 bytes before the end: mov al, 16; out 0xf4, al; hlt.
    image[0xfff0..0xfff5].copy_from_slice(&[0xb0, 0x10, 0xe6, 0xf4, 0xf4]);
    if firmware.write_all(&image).is_err() {
        return false;
    }
    let path = format!("/proc/{}/fd/{}", std::process::id(), firmware.as_raw_fd());
    let mut command = Command::new(program);
    command.args(["-nodefaults", "-display", "none", "-no-user-config", "-machine", "pc,accel=kvm", "-m", "16M"]);
    command.args(["-cpu", "qemu64,enforce", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios", &path]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let mut ended = None;
    wait_until(Duration::from_secs(3), || {
        ended = child.try_wait().ok().flatten();
        ended.is_some()
    });
    let _ = child.kill();
    let _ = child.wait();
    // The device makes 2 * 16 + 1 of it.
    ended.is_some_and(|status| status.code() == Some(33))
}

fn tempfile_in_memory() -> std::io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create("layerfs-probe", rustix::fs::MemfdFlags::CLOEXEC)?))
}

/// The options of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineOptions {
    /// Its memory, in bytes.
    pub memory: u64,
    /// How many processors it has.
    #[serde(default = "one")]
    pub cpus: u32,
    /// What emulates it: "kvm", "tcg", or "auto", the best that the host has.
    #[serde(default = "auto")]
    pub accel: String,
    /// The kernel that it boots, as a path in its stack; its disk is booted by default.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// The kernel's first files, likewise.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub append: Option<String>,
    /// Its disk, likewise, if it isn't `disk.raw`.
    #[serde(default)]
    pub disk: Option<PathBuf>,
    /// How it is connected.
    #[serde(default)]
    pub network: Network,
}

fn one() -> u32 {
    1
}

fn auto() -> String {
    AUTO.to_owned()
}

impl MachineOptions {
    /// Reads and checks a spec's options.
    ///
    /// # Errors
    /// [`layerfs::Error::Invalid`].
    pub fn read(options: &Value) -> layerfs::Result<MachineOptions> {
        let invalid = |detail: String| Err(layerfs::Error::invalid(detail));
        let read: MachineOptions = match serde_json::from_value(options.clone()) {
            Ok(read) => read,
            Err(error) => return invalid(format!("the machine's options: {error}")),
        };
        read.network.check()?;
        if read.memory < 16 * MEGABYTE || !read.memory.is_multiple_of(MEGABYTE) {
            return invalid(format!("a machine's memory is whole MiB, 16 or more, not {} bytes", read.memory));
        }
        if !(1..=255).contains(&read.cpus) {
            return invalid(format!("a machine can't have {} processors", read.cpus));
        }
        if !matches!(read.accel.as_str(), "kvm" | "tcg" | AUTO) {
            return invalid(format!("{:?} emulates no machine: use kvm, tcg or auto", read.accel));
        }
        for path in [&read.kernel, &read.initrd, &read.disk].into_iter().flatten() {
            let is_plain = |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::RootDir);
            // QEMU takes a comma for the end of a value.
            if !path.components().all(is_plain) || path.to_string_lossy().contains(',') {
                return invalid(format!("{} can't be a path in the machine's stack", path.display()));
            }
        }
        Ok(read)
    }

    /// What of `here` would emulate it.
    pub(super) fn accels_of(&self, here: Vec<String>) -> BTreeSet<String> {
        here.into_iter().filter(|accel| self.accel == AUTO || *accel == self.accel).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn options_of_machines_are_checked() {
        let read = |json: Value| MachineOptions::read(&json);
        let good = read(json!({ "memory": 256 * MEGABYTE })).unwrap();
        assert_eq!((good.cpus, good.accel.as_str()), (1, "auto"));
        for bad in [
            json!({}),
            json!({ "memory": MEGABYTE }),
            json!({ "memory": 256 * MEGABYTE + 1 }),
            json!({ "memory": 256 * MEGABYTE, "cpus": 0 }),
            json!({ "memory": 256 * MEGABYTE, "accel": "vax" }),
            json!({ "memory": 256 * MEGABYTE, "kernel": "/../../etc/shadow" }),
            json!({ "memory": 256 * MEGABYTE, "disk": "a,b" }),
            json!({ "memory": 256 * MEGABYTE, "command": ["/bin/prog"] }),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }
}
