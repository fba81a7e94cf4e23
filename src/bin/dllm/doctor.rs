//! `dllm doctor`: shows the driver, the devices and the kernels of this build, and checks every op on a device against its
//! reference.

#[cfg(feature = "cuda")]
mod machine;
#[cfg(feature = "cuda")]
mod run;

use dllm_kernels::Result;

/// Show the CUDA driver and devices, and check every op against its reference
#[derive(clap::Args, Debug)]
pub struct Doctor {
    /// Ordinal of the CUDA device to check
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Small shapes, as on the CUDA emulator: checks results, not speed
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
    let message = format!("cannot check device {device}: this build has no CUDA; build dllm with the feature cuda");
    Err(dllm_kernels::Error::Unavailable(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_sets_its_field() {
        crate::args::tests::fields::<Doctor>(
            "",
            &[("--device=3", |d| d.device = 3), ("--small", |d| d.small = true), ("--json", |d| d.json = true)],
        );
    }
}
