//! Programs of the operator's that are run when a guest stops, is restored, or stays after all.
//!
//! Hides how they are started. Invariant: each ends, by itself or by force, before the migration goes on.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::handover::journal::{Row, Side};

/// No hook takes longer.
const LONGEST: Duration = Duration::from_secs(10);
/// Nor those of one point together: one for all guests, one for this.
pub(super) const LONGEST_AT_A_POINT: Duration = Duration::from_secs(2 * LONGEST.as_secs());
const LOOK_EVERY: Duration = Duration::from_millis(2);

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
                run(&program, self.0.parent().unwrap_or(&self.0), point, row)?;
            }
        }
        Ok(())
    }
}

fn run(program: &Path, store: &Path, point: HookPoint, row: &Row) -> Result<()> {
    let failed =
        |detail: String| Error::guest("run a hook for", row.guest(), format!("{}: {detail}", program.display()));
    let mut child = Command::new(program)
        .env("LAYERFS_GUEST", row.guest().as_str())
        .env("LAYERFS_PEER", &row.peer)
        .env("LAYERFS_MOVE", row.id.to_string())
        .env("LAYERFS_DRIVER", &row.spec.driver)
        .env("LAYERFS_SIDE", if matches!(row.side, Side::Source { .. }) { "source" } else { "destination" })
        .env("LAYERFS_STORE", store)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that doesn't read is fine. Up to a pipe's size is taken without a reader.
        let spec = serde_json::to_vec(&row.spec).unwrap_or_default();
        let _ = stdin.write_all(&spec[..spec.len().min(4096)]);
    }
    let began = Instant::now();
    loop {
        match child.try_wait().map_err(|e| failed(e.to_string()))? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(failed(format!("{} ended with {status}", point.as_str()))),
            None if began.elapsed() > LONGEST => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("it took longer than {} s", LONGEST.as_secs())));
            }
            None => std::thread::sleep(LOOK_EVERY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GuestName, GuestRecord, GuestSpec};
    use crate::handover::MoveId;
    use crate::identity::PublicKey;
    use crate::peers::{Peer, PeerName, Rights};

    #[test]
    fn programs_are_run_by_point_and_guest_and_may_refuse() {
        let folder = tempfile::tempdir().unwrap();
        let (name, stack) = (GuestName::new("web").unwrap(), layerfs::LayerName::new("app").unwrap());
        let spec = GuestSpec { name, driver: "fake".to_owned(), stack, options: serde_json::json!({}) };
        let (key, rights) = (PublicKey([7; 32]), Rights::default());
        let peer = Peer { name: PeerName::new("edge").unwrap(), address: None, key, rights };
        let row = Row::source(MoveId([1; 16]), &GuestRecord::new(spec), &peer).unwrap();
        // Not by this process: a child of another test would hold a copy of the descriptor for a moment, and a file that somebody writes
        // to can't be run.
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut shell = Command::new("sh");
            shell.args(["-euc", "printf %s \"$0\" >\"$1\"; chmod 755 \"$1\"", text]).arg(&path);
            assert!(shell.status().unwrap().success());
        };
        let said = folder.path().join("said");
        let say = format!("#!/bin/sh\ncat >/dev/null\necho $LAYERFS_GUEST $LAYERFS_PEER >> {}\n", said.display());
        write(folder.path().join("before-stop"), &say);
        write(folder.path().join("web/before-stop"), &say);
        write(folder.path().join("after-stop"), "#!/bin/sh\nexit 3\n");
        let hooks = HookFolder(folder.path().to_owned());
        hooks.run(HookPoint::BeforeStop, &row).unwrap();
        assert_eq!(std::fs::read_to_string(said).unwrap(), "web edge\nweb edge\n");
        let error = hooks.run(HookPoint::AfterStop, &row).unwrap_err().to_string();
        assert!(error.contains("after-stop"), "{error}");
        hooks.run(HookPoint::Abort, &row).unwrap();
    }
}
