//! Two real stores, real TCP and TLS on loopback.

mod control;
mod damage;
mod faults;
mod holes;
pub mod pair;
mod paths;
mod recorded;
mod refusals;
pub mod relay;
pub mod s3;
mod speed;
mod tenants;
mod transfers;
