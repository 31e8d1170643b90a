//! Two real stores, real TCP and TLS on loopback.

mod damage;
mod pair;
mod refusals;
mod speed;
mod transfers;
