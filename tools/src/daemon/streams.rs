//! `/v1/stream`: a connection of the control socket becomes a link between two daemons.
//!
//! The header `layerfs-stream` says for whom: `serve` for a link to serve (the other end has all rights here, as whoever
//! may use the socket has), a number for the transfer of this host that awaits it.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use axum::routing::{MethodRouter, any};
use hyper_util::rt::TokioIo;

use super::{Daemon, http};
use crate::api::HEADER_STREAM;
use crate::failure::{Failure, Result, describe};

/// The route.
pub fn route() -> MethodRouter<Arc<Daemon>> {
    any(|State(daemon): State<Arc<Daemon>>, request: Request<Body>| async move {
        http::with_version(upgrade(daemon, request).unwrap_or_else(|failure| http::failed(&failure)))
    })
}

fn upgrade(daemon: Arc<Daemon>, mut request: Request<Body>) -> Result<Response<Body>> {
    let text = request.headers().get(HEADER_STREAM).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let target = match text {
        "serve" => None,
        number => Some(number.parse::<u64>().map_err(|_| {
            Failure::invalid(format!("the header {HEADER_STREAM} says {number:?}; it is `serve` or a stream's number"))
        })?),
    };
    let upgrade = hyper::upgrade::on(&mut request);
    // The daemon must not end for want of work meanwhile.
    let entry = daemon.works.begin_stream()?;
    tokio::spawn(async move {
        let node = daemon.peering.node();
        match (upgrade.await, target) {
            (Ok(stream), None) => {
                if let Err(error) = node.serve_stream(TokioIo::new(stream), "ssh").await {
                    tracing::info!("a connection through SSH failed: {}", describe(&error));
                }
            }
            (Ok(stream), Some(id)) => {
                if !node.streams().bring(id, Ok(Box::new(TokioIo::new(stream)))).await {
                    tracing::debug!("nobody awaits stream {id}");
                }
            }
            (Err(error), _) => tracing::debug!(%error, "a stream was not made"),
        }
        drop(entry);
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("layerfs"));
    Ok(response)
}
