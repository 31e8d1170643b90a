//! Processes by more than their number: numbers are used again, also across a restart of the machine.
//!
//! Hides /proc. Invariant: nothing is signalled that isn't the process that was meant.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use layerfs::mount::unescape;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// How often it is looked whether something has come about.
const LOOK: Duration = Duration::from_millis(2);

/// A process that was there once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number on the host.
    pub pid: u32,
    /// When it started, in the machine's ticks.
    started: u64,
    /// Which run of the machine that was.
    boot: String,
}

impl Process {
    /// The one that has number `pid` now.
    pub fn of(pid: u32) -> Option<Process> {
        Some(Process { pid, started: stat(pid)?.started, boot: boot() })
    }

    /// The one that was saved in `file`, if it was.
    pub fn load(file: &Path) -> Option<Process> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    /// Saves it in `file`.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn save(&self, file: &Path) -> layerfs::Result<()> {
        let json = serde_json::to_vec(self).unwrap_or_default();
        fs::write(file, json).map_err(|error| layerfs::Error::file("write", file, error))
    }

    /// Whether it is still there. A zombie isn't.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|now| now.started == self.started && !now.is_dead) && self.is_of_this_boot()
    }

    /// Whether it started in this run of the machine.
    pub fn is_of_this_boot(&self) -> bool {
        self.boot == boot()
    }

    /// Whether it started after `other` did, in the same run of the machine.
    pub fn is_younger_than(&self, other: &Process) -> bool {
        self.boot == other.boot && self.started >= other.started
    }

    /// One that isn't there any more.
    #[cfg(test)]
    pub fn gone() -> Process {
        Process { pid: 1, started: 0, boot: "another".to_owned() }
    }

    /// The others in the process group that it led, if they aren't older: the group's number goes on after its leader. With a `name` only
    /// those that are called so.
    pub fn followers(&self, name: Option<&str>) -> Vec<Process> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let called = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let is_called = |pid: &u32| name.is_none_or(|name| called(pid).trim_end_matches('\n') == name);
        let found = pids.filter(|pid| *pid != self.pid && stat(*pid).is_some_and(|stat| stat.group == self.pid));
        let found = found.filter(is_called).filter_map(Process::of);
        found.filter(|process| process.is_younger_than(self) && process.is_alive()).collect()
    }

    /// Kills it, if it is there.
    pub fn kill(&self) {
        if let (true, Some(pid)) = (self.is_alive(), Pid::from_raw(self.pid as i32)) {
            // One that has just ended is what was wanted.
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// Waits until it has ended. False if it hasn't after `patience`.
    pub fn wait_gone(&self, patience: Duration) -> bool {
        wait_until(patience, || !self.is_alive())
    }

    /// The device of what is mounted at `dir` in its place of the tree of mounts. Asks nothing of the filesystem, which may be dead.
    pub fn device_at(&self, dir: &Path) -> Option<String> {
        let table = fs::read(format!("/proc/{}/mountinfo", self.pid)).ok()?;
        // What was mounted last lies on top.
        table.split(|byte| *byte == b'\n').rev().find_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let device = fields.nth(2)?;
            let is_there = unescape(fields.nth(1)?) == dir.as_os_str().as_bytes();
            is_there.then(|| String::from_utf8_lossy(device).into_owned())
        })
    }

    /// How much memory it and its descendants would take elsewhere, in bytes: what several share counts once, and what is swapped out counts,
    /// but not what is only read from files.
    pub fn own_bytes(&self) -> u64 {
        let own = |pid: u32| {
            rollup_bytes(pid, &["Pss_Anon", "Pss_Shmem", "SwapPss"]).or_else(|| status_bytes(pid, "VmRSS")).unwrap_or(0)
        };
        self.tree().into_iter().map(own).sum()
    }

    /// It and its descendants, parents first, and its children in the order of their making.
    pub fn tree(&self) -> Vec<u32> {
        let mut all = vec![self.pid];
        let mut next = 0;
        while let Some(pid) = all.get(next) {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
            let children: Vec<u32> = lists
                .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
                .collect();
            next += 1;
            // So that a mistake of the kernel's lists can't keep this going.
            all.extend(children.into_iter().filter(|child| !all.contains(child)).collect::<Vec<_>>());
        }
        all
    }
}

/// The number that process `pid` has inside its innermost namespace.
pub fn inner_pid(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_whitespace().last()?.parse().ok()
}

/// A field of `/proc/PID/status` that is in kB, in bytes.
pub fn status_bytes(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// A sum of fields of `/proc/PID/smaps_rollup`, in bytes; nothing where the kernel doesn't say.
fn rollup_bytes(pid: u32, fields: &[&str]) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let found = fields.iter().filter_map(|field| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    });
    let found: Vec<u64> = found.collect();
    (!found.is_empty()).then(|| found.iter().sum())
}

/// Waits until `is_so`. False if it isn't after `patience`.
pub fn wait_until(patience: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if began.elapsed() > patience {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}

struct Stat {
    group: u32,
    started: u64,
    is_dead: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets and may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let is_dead = matches!(*fields.first()?, "Z" | "X" | "x");
    Some(Stat { group: fields.get(2)?.parse().ok()?, started: fields.get(19)?.parse().ok()?, is_dead })
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_until_it_ends() {
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(Process::of(std::process::id()).unwrap().tree().contains(&child.id()));
        let other = Process { started: process.started + 1, ..process.clone() };
        assert!(!other.is_alive());
        other.kill();
        assert!(process.is_alive());
        process.kill();
        // A zombie until it is waited for, and gone all the same.
        assert!(process.wait_gone(Duration::from_secs(10)));
        child.wait().unwrap();
    }
}
