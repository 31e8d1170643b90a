//! When the daemon exits, and how: on a signal, on request, or because it was started by a command and has nothing to do.
//!
//! Invariant: before it exits, work was finished or cancelled, and every mount is gone or left to a successor.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::Daemon;
use super::http::Context;
use crate::api::{Empty, Stop};
use crate::failure::{Class, Failure, Result};

/// How long answers may take to leave after the daemon has decided to exit.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// A daemon that was just started waits at least so long for the command that started it.
const LEAST_IDLE: Duration = Duration::from_secs(2);

/// So long guests that are being restored or handed over are waited for. What takes longer goes on without the daemon, and the next one
/// takes over what comes of it.
const STEPS: Duration = Duration::from_secs(15);

/// The decision to exit.
#[derive(Debug, Default)]
pub struct Life {
    asked: Notify,
    is_over: Notify,
    /// Another daemon takes over the mounts.
    is_handed_over: AtomicBool,
    /// It is the one that asked for that.
    is_for_caller: AtomicBool,
}

impl Life {
    /// The daemon shall exit now; work and mounts are no more.
    fn end(&self) {
        self.asked.notify_one();
    }

    /// Whether the mounts are left to another daemon.
    pub fn is_handed_over(&self) -> bool {
        self.is_handed_over.load(Ordering::SeqCst)
    }

    /// Whether the other daemon is the one that asked for the mounts.
    pub fn is_for_caller(&self) -> bool {
        self.is_for_caller.load(Ordering::SeqCst)
    }
}

/// Resolves when the daemon shall stop to accept connections.
pub async fn until_stopped(daemon: Arc<Daemon>) {
    tokio::select! {
        () = daemon.life.asked.notified() => {}
        () = until_signal(&daemon) => {}
        () = until_idle(&daemon) => {}
    }
    // By whatever ended it, unless it was a stop that was asked for.
    let _ = daemon.works.close();
    daemon.life.is_over.notify_one();
}

/// Resolves some seconds after [`until_stopped`].
pub async fn grace(daemon: &Daemon) {
    daemon.life.is_over.notified().await;
    tokio::time::sleep(LAST_WORDS).await;
}

async fn until_signal(daemon: &Arc<Daemon>) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals cannot be received");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    let _ = daemon.works.close();
    daemon.peering.stop_lazy();
    loop {
        daemon.works.cancel_all(None);
        daemon.works.wait_until_done(None).await;
        // A stop that was asked for may have been refused meanwhile, and work begun.
        if !daemon.works.close() {
            break;
        }
        daemon.peering.stop_lazy();
    }
    let daemon = daemon.clone();
    let leave = move || {
        let_moves_rest(&daemon);
        daemon.mounts.unmount_all(&daemon.store, true)
    };
    let _ = tokio::task::spawn_blocking(leave).await;
}

/// What peers ask for is no work of this host's commands: it isn't cancelled, nor waited for with them.
fn let_moves_rest(daemon: &Daemon) {
    if !daemon.moves.wait_until_rests(STEPS) {
        tracing::warn!(guests = ?daemon.moves.at_work(), "exits while guests are being handed over");
    }
}

async fn until_idle(daemon: &Arc<Daemon>) {
    if !daemon.is_autostarted {
        return std::future::pending().await;
    }
    let limit = daemon.settings.idle.max(LEAST_IDLE);
    let mut ticker = tokio::time::interval((limit / 4).clamp(Duration::from_millis(100), Duration::from_secs(15)));
    loop {
        ticker.tick().await;
        let is_moving = daemon.peering.is_moving() || daemon.moves.is_busy();
        let is_free = daemon.mounts.count() == 0 && !daemon.peering.is_listening() && !is_moving;
        let idle_since = daemon.works.idle_since(daemon.started);
        let is_long_enough = idle_since.is_some_and(|since| Instant::now().duration_since(since) >= limit);
        if is_free && is_long_enough && daemon.works.close_if_idle() {
            tracing::info!("nothing to do for {} s", limit.as_secs());
            return;
        }
    }
}

/// `/v1/stop`.
pub fn stop(context: &Context, request: Stop) -> Result<Empty> {
    let daemon = &context.daemon;
    let moved = daemon.moves.at_work().into_iter().map(|guest| format!("hand over guest {guest}"));
    let under_way: Vec<String> = daemon.works.list().into_iter().map(|work| work.label).chain(moved).collect();
    if !request.force && !under_way.is_empty() {
        let text = format!("the daemon is at work: {}", under_way.join(", "));
        let hint = if request.hand_over {
            "wait, or cancel it with `layerctl daemon restart --force`: mounts and what uses them go on"
        } else {
            "wait, or cancel it with `layerctl daemon stop --force`, which ends mounts too"
        };
        return Err(Failure::new(Class::Busy, text).hint(hint));
    }
    if request.to_caller && super::supervised::is_supervised() {
        return Err(Failure::new(Class::Busy, "systemd started the daemon that runs, and would start it again"));
    }
    if request.hand_over && !request.force {
        daemon.store.db().check_reopening().map_err(|error| {
            Failure::from(error)
                .hint("another daemon would find no room for its own notes: make some, this one goes on")
        })?;
    }
    // Each of two would wait for the other's end.
    if !daemon.works.close() {
        return Err(Failure::new(Class::Busy, "the daemon is being stopped already; try again in a moment"));
    }
    if !request.hand_over && request.force {
        daemon.peering.stop_lazy();
    }
    let own = context.reporter.work().number;
    daemon.works.cancel_all(Some(own));
    context.block_on(daemon.works.wait_until_done(Some(own)));
    let_moves_rest(daemon);
    if request.hand_over {
        let lost = if request.force { Vec::new() } else { daemon.mounts.not_kept() };
        if let Some(mount) = lost.first() {
            daemon.works.reopen();
            let text =
                format!("the keeper doesn't have the mount on {}, which would end", mount.record().dir.display());
            return Err(Failure::new(Class::Busy, text).hint(
                "unmount it; or have it end and be mounted again, with `layerctl daemon restart --force`. daemon.log says why",
            ));
        }
        daemon.life.is_for_caller.store(request.to_caller, Ordering::SeqCst);
        daemon.life.is_handed_over.store(true, Ordering::SeqCst);
    } else {
        if let Err(failure) = daemon.mounts.unmount_all(&daemon.store, request.force) {
            daemon.works.reopen();
            daemon.peering.start_lazy();
            return Err(failure);
        }
        // Not before, unless by force: a guest that still runs may be the reason for a refusal, and its memory be on its way.
        daemon.peering.stop_lazy();
    }
    daemon.life.end();
    Ok(Empty {})
}

/// Makes this process its own session's, away from the terminal and the folder it was started in, without the
/// descriptors that it inherited.
pub fn leave_terminal() {
    // Fails only for a process group's leader, which is what is wanted then.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o022));
    // SAFETY: called first thing in main, before any descriptor above 2 is owned by anything here.
    #[allow(unsafe_code)]
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
    }
}

/// Tells systemd that the daemon answers, if systemd wants to know (`Type=notify`).
pub fn notify_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        tracing::warn!("systemd cannot be told: {error}");
    }
}

/// Packs, mounts and connections take descriptors: as many as are allowed.
pub fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Then it is what it is.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

/// Lets go of the pipe that the announcement went to.
pub fn leave_stdout() {
    use std::os::fd::AsRawFd;
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        // SAFETY: both descriptors are open, and nothing here owns descriptor 1.
        #[allow(unsafe_code)]
        unsafe {
            libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO);
        }
    }
}
