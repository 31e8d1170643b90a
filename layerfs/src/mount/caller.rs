//! Who asks: the process behind a request, and what the request itself doesn't tell of it.
//!
//! Hides that supplementary groups and capabilities are read from /proc, since FUSE doesn't send them. They are
//! needed in rare cases only (a file with setuid or setgid is truncated, a list is set on a setgid folder), never
//! for permission checks, which are the kernel's.

/// The process behind a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its thread's number; 0 if it is unknown.
    pub pid: u32,
}

const CAP_FSETID: u32 = 4;
const CAP_SYS_ADMIN: u32 = 21;

impl Caller {
    /// The superuser, for whoever works without a kernel between.
    pub const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0 };

    /// Whether setuid and setgid bits survive what it does.
    pub fn keeps_privileges(&self) -> bool {
        self.has_capability(CAP_FSETID)
    }

    /// Whether it sees attributes of the namespace `trusted`.
    pub fn is_administrator(&self) -> bool {
        self.uid == 0 || self.has_capability(CAP_SYS_ADMIN)
    }

    /// Whether it belongs to group `gid`, or may act as if it did.
    pub fn is_in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.has_capability(CAP_FSETID) || self.groups().contains(&gid)
    }

    fn has_capability(&self, capability: u32) -> bool {
        let Some(status) = self.status() else { return self.uid == 0 };
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        effective >> capability & 1 == 1 && self.is_in_first_user_namespace()
    }

    /// Capabilities count for the mount only in the user namespace that this process is in too.
    fn is_in_first_user_namespace(&self) -> bool {
        let theirs = std::fs::read_link(format!("/proc/{}/ns/user", self.pid));
        match (theirs, std::fs::read_link("/proc/self/ns/user")) {
            (Ok(theirs), Ok(ours)) => theirs == ours,
            _ => self.uid == 0,
        }
    }

    /// The group that it makes files with, and its supplementary ones. The kernel tells the first only of who makes something, where
    /// mounts may be idmapped.
    fn groups(&self) -> Vec<u32> {
        let status = self.status().unwrap_or_default();
        let of = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().split_whitespace();
        of("Gid:").skip(3).chain(of("Groups:")).filter_map(|group| group.parse().ok()).collect()
    }

    fn status(&self) -> Option<String> {
        if self.pid == 0 {
            return None;
        }
        std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()
    }
}

#[cfg(test)]
#[allow(clippy::print_stderr)] // a test that can't run says so
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::testing::Spawn;

    #[test]
    fn groups_are_known_when_the_kernel_tells_none() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("NOT RUN: it needs the superuser to run a program as somebody else");
            return;
        }
        let mut program = Command::new("cat");
        program.uid(1234).gid(5678).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut running = program.spawn_locked().unwrap();
        let caller = Caller { uid: u32::MAX, gid: u32::MAX, pid: running.id() };
        let belongs = [5678, 5679, 1234].map(|group| caller.is_in_group(group));
        drop(running.stdin.take());
        running.wait().unwrap();
        assert_eq!(belongs, [true, false, false]);
    }
}
