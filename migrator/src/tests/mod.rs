//! Two real stores, real TCP and TLS on loopback.

mod control;
mod damage;
mod pair;
mod refusals;
mod speed;
mod transfers;
