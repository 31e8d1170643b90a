//! Programs of the operator's that are run when a guest stops, is restored, or stays after all.
//!
//! Hides how they are started. Invariant: each ends, by itself or by force, before the migration goes on; by force it ends with what it has
//! started.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::guest::exec;
use crate::handover::journal::{Row, Side};

/// No hook takes longer.
const LONGEST: Duration = Duration::from_secs(10);
/// Nor those of one point together: one for all guests, one for this.
pub(super) const LONGEST_AT_A_POINT: Duration = Duration::from_secs(2 * LONGEST.as_secs());

/// When a hook is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// Source: the guest runs and is about to stop. A failure aborts the move.
    BeforeStop,
    /// Source: it stands still. A failure aborts the move.
    AfterStop,
    /// Destination: everything is ready for it. A failure aborts the move.
    BeforeRestore,
    /// Destination: it runs.
    AfterRestore,
    /// Source: it runs at the destination, and nothing of it here any more.
    AfterLeave,
    /// Either: it runs on at the source.
    Abort,
}

impl HookPoint {
    /// The program's name.
    pub fn as_str(self) -> &'static str {
        match self {
            HookPoint::BeforeStop => "before-stop",
            HookPoint::AfterStop => "after-stop",
            HookPoint::BeforeRestore => "before-restore",
            HookPoint::AfterRestore => "after-restore",
            HookPoint::AfterLeave => "after-leave",
            HookPoint::Abort => "abort",
        }
    }
}

/// What is run when.
pub trait Hooks: Send + Sync {
    /// Runs what is to be run at `point` of the move `row`. Blocks.
    ///
    /// # Errors
    /// If it says no.
    fn run(&self, point: HookPoint, row: &Row) -> Result<()>;
}

/// The programs in a folder of the store's, called as their points are; and those in a folder in it that is called as the guest is.
#[derive(Clone, Debug)]
pub struct HookFolder(pub PathBuf);

impl Hooks for HookFolder {
    fn run(&self, point: HookPoint, row: &Row) -> Result<()> {
        for folder in [self.0.clone(), self.0.join(row.guest().as_str())] {
            let program = folder.join(point.as_str());
            if program.is_file() {
                run(&program, self.0.parent().unwrap_or(&self.0), point, row, LONGEST)?;
            }
        }
        Ok(())
    }
}

fn run(program: &Path, store: &Path, point: HookPoint, row: &Row, patience: Duration) -> Result<()> {
    let failed =
        |detail: String| Error::guest("run a hook for", row.guest(), format!("{}: {detail}", program.display()));
    let spec = serde_json::to_vec(&row.spec).unwrap_or_default();
    let mut command = Command::new(program);
    command
        .env("LAYERFS_GUEST", row.guest().as_str())
        .env("LAYERFS_PEER", &row.peer)
        .env("LAYERFS_MOVE", row.id.to_string())
        .env("LAYERFS_DRIVER", &row.spec.driver)
        .env("LAYERFS_SIDE", if matches!(row.side, Side::Source { .. }) { "source" } else { "destination" })
        .env("LAYERFS_STORE", store)
        .stdin(holding(&spec).map_err(|e| failed(e.to_string()))?)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = exec::status(&mut command, patience).map_err(failed)?;
    if status.success() { Ok(()) } else { Err(failed(format!("{} ended with {status}", point.as_str()))) }
}

/// What reads as `bytes`. No pipe: nobody has to write to a program that reads late, or not all.
fn holding(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("layerfs-guest", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GuestName, GuestRecord, GuestSpec};
    use crate::handover::MoveId;
    use crate::identity::PublicKey;
    use crate::peers::{Peer, PeerName, Rights};

    /// A move of a guest with these options.
    fn row(options: serde_json::Value) -> Row {
        let (name, stack) = (GuestName::new("web").unwrap(), layerfs::LayerName::new("app").unwrap());
        let spec = GuestSpec { name, driver: "fake".to_owned(), stack, options };
        let (key, rights) = (PublicKey([7; 32]), Rights::default());
        let peer = Peer { name: PeerName::new("edge").unwrap(), address: None, key, rights };
        Row::source(MoveId([1; 16]), &GuestRecord::new(spec), &peer).unwrap()
    }

    /// Not by this process: a child of another test would hold a copy of the descriptor for a moment, and a file that somebody writes to
    /// can't be run.
    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-euc", "printf %s \"$0\" >\"$1\"; chmod 755 \"$1\"", text]).arg(path);
        assert!(shell.status().unwrap().success());
    }

    #[test]
    fn programs_are_run_by_point_and_guest_and_may_refuse() {
        let folder = tempfile::tempdir().unwrap();
        let row = row(serde_json::json!({}));
        let said = folder.path().join("said");
        let say = format!("#!/bin/sh\ncat >/dev/null\necho $LAYERFS_GUEST $LAYERFS_PEER >> {}\n", said.display());
        write(&folder.path().join("before-stop"), &say);
        write(&folder.path().join("web/before-stop"), &say);
        write(&folder.path().join("after-stop"), "#!/bin/sh\nexit 3\n");
        let hooks = HookFolder(folder.path().to_owned());
        hooks.run(HookPoint::BeforeStop, &row).unwrap();
        assert_eq!(std::fs::read_to_string(said).unwrap(), "web edge\nweb edge\n");
        let error = hooks.run(HookPoint::AfterStop, &row).unwrap_err().to_string();
        assert!(error.contains("after-stop"), "{error}");
        hooks.run(HookPoint::Abort, &row).unwrap();
    }

    #[test]
    fn they_can_read_all_of_what_the_guest_is_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let row = row(serde_json::json!({ "env": vec!["LIST=a long one"; 10_000], "network": { "bridge": "br0" } }));
        let said = folder.path().join("said");
        write(&folder.path().join("before-stop"), &format!("#!/bin/sh\nsleep 0.1\ncat > {}\n", said.display()));
        write(&folder.path().join("after-stop"), "#!/bin/sh\nexit 0\n");
        let hooks = HookFolder(folder.path().to_owned());
        hooks.run(HookPoint::BeforeStop, &row).unwrap();
        let spec: GuestSpec = serde_json::from_slice(&std::fs::read(said).unwrap()).unwrap();
        assert_eq!(spec, row.spec);
        hooks.run(HookPoint::AfterStop, &row).unwrap();
    }

    #[test]
    fn one_that_takes_too_long_is_ended_with_what_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let (program, file) = (folder.path().join("before-stop"), folder.path().join("pids"));
        // One of them is nobody's child any more.
        let script =
            format!("#!/bin/sh\nsleep 600 & echo $! >>{0}\nsh -c 'sleep 600 & echo $! >>{0}'\nwait\n", file.display());
        write(&program, &script);
        let row = row(serde_json::json!({}));
        let error = run(&program, folder.path(), HookPoint::BeforeStop, &row, Duration::from_secs(2)).unwrap_err();
        assert!(error.to_string().contains("hasn't ended after 2s"), "{error}");
        let pids = std::fs::read_to_string(file).unwrap();
        assert_eq!(pids.lines().count(), 2, "{pids}");
        let is_gone = |pid: &str| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let began = std::time::Instant::now();
        while !pids.lines().all(is_gone) {
            assert!(began.elapsed() < Duration::from_secs(10), "{pids}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
