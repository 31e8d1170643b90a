//! What stands in a guest's way, found before anything has changed, each with the way out.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::programs::{Programs, run};
use super::{Obstacle, Side};

const CAP_SYS_RESOURCE: u64 = 1 << 24;
const SETUP: &str = "run scripts/setup guests as root, which gets one that works into /var/cache/layerfs-guests";

/// What a process tree's drivers need of the host.
pub(super) fn host(programs: &Programs, side: Side) -> Vec<Obstacle> {
    let mut found = Vec::new();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        found.push(Obstacle::new("guests need root's rights", "run the daemon as root"));
    }
    // Without them no CRIU works, which says nothing of it.
    if side != Side::Run
        && is_root
        && let Err(reason) = programs.criu()
    {
        found.push(Obstacle::new(reason, SETUP));
    }
    if side == Side::PostCopy
        && let Ok(criu) = programs.criu()
    {
        let mut command = programs.command(criu);
        if let Err(reason) = run(command.args(["check", "--feature", "uffd-noncoop"])) {
            let fix = "use a kernel with CONFIG_USERFAULTFD and a CRIU that knows it, or move without --postcopy";
            found.push(Obstacle::new(format!("memory can't be read when it is touched: {reason}"), fix));
        }
    }
    for (program, package) in [("ip", "iproute2"), ("nsenter", "util-linux")] {
        found.extend(missing(programs, program, package));
    }
    found
}

/// A program that must be there, from a Debian package.
pub(super) fn missing(programs: &Programs, program: &str, package: &str) -> Option<Obstacle> {
    let is_missing = programs.find(program).is_none();
    is_missing.then(|| Obstacle::new(format!("the program {program} is missing"), format!("apt-get install {package}")))
}

/// What a guest's network needs.
pub(super) fn network(programs: &Programs, bridge: &str, has_bridge: bool) -> Vec<Obstacle> {
    if programs.find("ip").is_none() || has_bridge {
        return Vec::new();
    }
    let fix =
        format!("ip link add {bridge} type bridge && ip link set {bridge} up, and connect it to the guests' network");
    vec![Obstacle::new(format!("this host has no bridge {bridge}"), fix)]
}

/// What in these processes CRIU can't save.
pub(super) fn processes(pids: &[u32]) -> Vec<Obstacle> {
    let mut found: Vec<Obstacle> = Vec::new();
    for pid in pids {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        if uses_io_uring(*pid) {
            found.push(Obstacle::new(
                format!("{name} (process {pid}) uses io_uring, which CRIU can't save"),
                "turn it off in the program, or everywhere with sysctl kernel.io_uring_disabled=2, and start the guest again",
            ));
        }
        if !may_change_limits() && is_other_user(*pid) {
            found.push(Obstacle::new(
                format!("{name} (process {pid}) is another user's, and this host lacks CAP_SYS_RESOURCE"),
                "give the daemon that capability, or the guest a user namespace (LXC: lxc.idmap = u 0 0 65536, and g)",
            ));
        }
    }
    if pids.first().is_some_and(|pid| has_mptcp(*pid)) {
        found.push(Obstacle::new(
            "a program in the guest has MPTCP sockets open, which CRIU can't save",
            "programs in Go open plain ones with GODEBUG=multipathtcp=0; others are told by their own settings",
        ));
    }
    found
}

fn uses_io_uring(pid: u32) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| target.as_os_str() == "anon_inode:[io_uring]")
}

/// Whether the process is another user's than root, in the same user namespace as this one.
fn is_other_user(pid: u32) -> bool {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/user")).map(|metadata| metadata.ino()).ok();
    let owner = fs::metadata(format!("/proc/{pid}")).map(|metadata| metadata.uid()).ok();
    owner.is_some_and(|uid| uid != 0) && namespace("self") == namespace(&pid.to_string())
}

fn may_change_limits() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_none_or(|set| set & CAP_SYS_RESOURCE != 0)
}

/// Whether there are MPTCP sockets in the process's network.
fn has_mptcp(pid: u32) -> bool {
    let protocols = fs::read_to_string(format!("/proc/{pid}/net/protocols")).unwrap_or_default();
    mptcp_sockets(&protocols) > 0
}

/// How many sockets `/proc/PID/net/protocols` says that there are.
fn mptcp_sockets(protocols: &str) -> u64 {
    let rows = protocols.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let counts = rows.filter(|row| row.first().is_some_and(|name| name.starts_with("MPTCP")));
    counts.filter_map(|row| row.get(2)?.parse::<i64>().ok()).map(|count| count.max(0) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mptcp_sockets_are_counted() {
        let protocols = "protocol  size sockets  memory press maxhdr  slab module     cl co di ac io in de sh ss gs se re sp bi br ha uh gp em\n\
                         MPTCPv6   2064      0       0   no       0   yes  kernel      y  y  n  y  y  y  y  y  y  y  n  n  n  y  y  y  n\n\
                         MPTCP     1896      2       0   no       0   yes  kernel      y  y  n  y  y  y  y  y  y  y  n  n  n  y  y  y  n\n\
                         TCP       2240     14       4   no     320   yes  kernel      y  y  y  y  y  y  y  y  y  y  n  n  n  y  y  y  y\n";
        assert_eq!(mptcp_sockets(protocols), 2);
        assert_eq!(mptcp_sockets(""), 0);
    }
}
