//! Two real stores, real TCP and TLS on loopback.

mod control;
mod damage;
pub mod pair;
mod paths;
mod refusals;
mod relay;
mod speed;
mod transfers;
