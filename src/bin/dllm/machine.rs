//! Selection of the device and of the CPU threads.

use crate::args::threads;
#[cfg(feature = "cuda")]
use crate::output::note;
use clap::Args;
#[cfg(feature = "cuda")]
use dllm_kernels::gpu;
use dllm_kernels::{Error, Model, Result};

/// Part of the device name that the CUDA emulator reports.
#[cfg(feature = "cuda")]
const EMULATOR_NAME: &str = "software device"; // words: allow

/// Value of `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// `auto`, `cpu`
    #[default]
    Cpu,
    /// `cuda`, `cuda:N`
    Cuda(usize),
}

/// Parses `--device`.
pub fn device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "auto" || text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", n)) if n.parse::<u16>().is_ok() => Ok(Device::Cuda(n.parse().unwrap_or_default())),
        _ => Err("expected auto, cpu, cuda or cuda:N with N up to 65535".into()),
    }
}

/// Flags for the device and the CPU threads.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Machine")]
pub struct Machine {
    /// auto, cpu, cuda or cuda:N; auto is the CPU until the CUDA path has run on a GPU [default: auto]
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub device: Option<Device>,
    /// CPU threads [default: all]. The environment variable DLLM_CPU=amx, avx512, avx2 or plain limits the instructions
    #[arg(long, value_name = "N", value_parser = threads())]
    pub threads: Option<usize>,
}

impl Machine {
    /// Starts the CPU threads and opens the device.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for an unknown `DLLM_CPU`, or without the threads; [`Error::NoDevice`] without the device.
    pub fn start(&self) -> Result<ComputeDevice> {
        if let Some(limit) = std::env::var_os("DLLM_CPU")
            && !["amx", "avx512", "avx2", "plain"].iter().any(|known| limit == *known)
        {
            let message = format!("DLLM_CPU: expected amx, avx512, avx2 or plain, found {limit:?}");
            return Err(Error::Unavailable(message));
        }
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
            pool.map_err(|e| Error::Unavailable(format!("--threads {threads}: {e}")))?;
        }
        ComputeDevice::open(self.device.unwrap_or_default())
    }
}

/// Measured peak rates of a device.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Roofs {
    /// Bandwidth of reading memory.
    pub bytes_per_second: f64,
    /// Rate of matrix products of bf16 into f32.
    pub operations_per_second: f64,
}

/// Opened device.
pub struct ComputeDevice {
    /// Name in results: `cpu`, or ordinal and name of a CUDA device.
    pub name: String,
    #[cfg(feature = "cuda")]
    device: Option<gpu::Device>,
}

impl ComputeDevice {
    /// Opens a device.
    #[cfg(feature = "cuda")]
    pub fn open(device: Device) -> Result<ComputeDevice> {
        let Device::Cuda(ordinal) = device else {
            return Ok(ComputeDevice { name: "cpu".into(), device: None });
        };
        let device = gpu::Device::open(ordinal).map_err(|error| {
            Error::NoDevice(format!("--device cuda:{ordinal}: {error}; run `dllm doctor` for details"))
        })?;
        note(format_args!(
            "note: --device cuda is experimental: it has been tested on a CUDA emulator, not yet on a GPU"
        ));
        Ok(ComputeDevice { name: format!("cuda:{ordinal} {}", device.name()?), device: Some(device) })
    }

    /// Opens a device.
    #[cfg(not(feature = "cuda"))]
    pub fn open(device: Device) -> Result<ComputeDevice> {
        match device {
            Device::Cpu => Ok(ComputeDevice { name: "cpu".into() }),
            Device::Cuda(n) => Err(Error::NoDevice(format!(
                "--device cuda:{n}: this build has no CUDA; build dllm with the feature cuda"
            ))),
        }
    }

    /// Measures the peak rates of a GPU; `None` for the CPU, the CUDA emulator and drivers that cannot time kernels.
    #[cfg(feature = "cuda")]
    pub fn roofs(&self) -> Result<Option<Roofs>> {
        let Some(device) = &self.device else { return Ok(None) };
        // Drivers older than 570 report no times, and those of the CUDA emulator have no meaning.
        if !gpu::Device::supports_timing()? || self.name.contains(EMULATOR_NAME) {
            return Ok(None);
        }
        let bytes_per_second = dllm_kernels::ops::read_bandwidth::read_rate(&device.stream()?, 2 << 30, 30)?;
        Ok(Some(Roofs { bytes_per_second, operations_per_second: gpu::blas::matrix_rate(device, 8192, 10)? }))
    }

    /// Returns `None`: this build has no CUDA.
    #[cfg(not(feature = "cuda"))]
    pub fn roofs(&self) -> Result<Option<Roofs>> {
        Ok(None)
    }

    /// Moves the weights to the device.
    pub fn load(&self, model: Model) -> Result<Model> {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            // Draws nothing unless stderr is a terminal.
            let bar = indicatif::ProgressBar::new(0).with_style(
                indicatif::ProgressStyle::with_template("weights {bytes} of {total_bytes} {bar:30} {bytes_per_sec}")
                    .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
            );
            let drawn = bar.clone();
            let model = model.to_device(device, move |done, total| {
                drawn.set_length(total);
                drawn.set_position(done);
            });
            bar.finish_and_clear();
            return model;
        }
        Ok(model)
    }
}
