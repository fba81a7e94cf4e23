//! `dllm doctor`: what the driver and the devices are, what this build has for them, and every op on the device against its
//! oracle.

#[cfg(feature = "cuda")]
mod case;
#[cfg(feature = "cuda")]
mod machine;
#[cfg(feature = "cuda")]
mod ops;
#[cfg(feature = "cuda")]
mod run;

use dllm_kernels::Result;

/// Look at the driver and the devices, and run every op on one against its oracle
#[derive(clap::Args, Debug)]
pub struct Doctor {
    /// CUDA device to run on
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Few rows, as on the software device: whether it works, not how fast
    #[arg(long)]
    small: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
#[cfg(feature = "cuda")]
pub fn run(args: &Doctor) -> Result<()> {
    run::run(args)
}

/// Runs the command.
#[cfg(not(feature = "cuda"))]
pub fn run(args: &Doctor) -> Result<()> {
    let Doctor { device, small: _, json: _ } = args;
    let message = format!("device {device} cannot be looked at: this build has no CUDA (feature cuda)");
    Err(dllm_kernels::Error::Unavailable(message))
}
