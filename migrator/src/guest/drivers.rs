//! Which drivers there are.

use std::sync::Arc;

use super::lxc::LxcGuest;
use super::oci::OciGuest;
use super::process::ProcessGuest;
use super::programs::Programs;
use super::qemu::QemuGuest;
use super::{Drivers, Guest, GuestRecord, Host};
use crate::error::Result;

/// The drivers' names.
pub const DRIVERS: [&str; 4] = ["process", "oci", "lxc", "qemu"];

/// The real drivers.
pub struct HostDrivers {
    /// The programs that they run.
    pub programs: Arc<Programs>,
}

impl Drivers for HostDrivers {
    fn guest(&self, record: &GuestRecord, host: Arc<dyn Host>) -> Result<Arc<dyn Guest>> {
        match record.spec.driver.as_str() {
            "process" => Ok(Arc::new(ProcessGuest::new(record, host, self.programs.clone())?)),
            "oci" => Ok(Arc::new(OciGuest::new(record, host, self.programs.clone())?)),
            "qemu" => Ok(Arc::new(QemuGuest::new(record, &*host, self.programs.clone())?)),
            "lxc" => Ok(Arc::new(LxcGuest::new(record, host, self.programs.clone())?)),
            other => {
                let known = DRIVERS.join(", ");
                Err(layerfs::Error::invalid(format!("there is no driver {other:?}: there are {known}")).into())
            }
        }
    }
}
