//! Options of push and pull that concern OCI registries.

use clap::{Args, ValueEnum};

use crate::failure::{Failure, Result};

/// What a stack becomes in a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// An image with gzip layers, for every container engine
    Image,
    /// An image with zstd layers
    ImageZstd,
    /// The chunks in packs: smaller, and only what is lacking goes either way; for layerctl only
    Packs,
}

/// How to reach a registry.
#[derive(Clone, Debug, Default, Args)]
pub struct Access {
    /// Who to be at the registry [default: as docker or podman logged in]
    #[arg(long, value_name = "USER", requires = "password_stdin", help_heading = "Registries")]
    pub username: Option<String>,
    /// Read the password for --username from stdin
    #[arg(long, requires = "username", help_heading = "Registries")]
    pub password_stdin: bool,
    /// Without TLS, for registries on this machine
    #[arg(long, help_heading = "Registries")]
    pub plain_http: bool,
}

/// Options of `push`.
#[derive(Clone, Debug, Default, Args)]
pub struct PushOptions {
    /// What NAME becomes in the registry [default: image]
    #[arg(long = "as", value_name = "FORM", help_heading = "Registries")]
    pub form: Option<Form>,
    /// How to get there
    #[command(flatten)]
    pub access: Access,
}

/// Options of `pull`.
#[derive(Clone, Debug, Default, Args)]
pub struct PullOptions {
    /// For which platform the image shall be, such as linux/arm64 [default: this machine's]
    #[arg(long, value_name = "PLATFORM", help_heading = "Registries")]
    pub platform: Option<String>,
    /// How to get there
    #[command(flatten)]
    pub access: Access,
}

fn unused(is_used: bool) -> Result<()> {
    if is_used {
        return Err(Failure::invalid(
            "--as, --platform, --username, --password-stdin and --plain-http are for registries (oci://…), not for peers",
        ));
    }
    Ok(())
}

impl Access {
    fn is_used(&self) -> bool {
        self.username.is_some() || self.plain_http
    }
}

impl PushOptions {
    /// Fails if any was given.
    pub fn check_unused(&self) -> Result<()> {
        unused(self.form.is_some() || self.access.is_used())
    }
}

impl PullOptions {
    /// Fails if any was given.
    pub fn check_unused(&self) -> Result<()> {
        unused(self.platform.is_some() || self.access.is_used())
    }
}
