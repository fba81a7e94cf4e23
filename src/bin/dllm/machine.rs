//! Where the work is done: the flags, and getting a device ready.

use crate::args::threads;
#[cfg(feature = "cuda")]
use crate::output::note;
use clap::Args;
#[cfg(feature = "cuda")]
use dllm_kernels::gpu;
use dllm_kernels::{Error, Model, Result};

/// What `--device` names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// `auto`, `cpu`
    #[default]
    Cpu,
    /// `cuda`, `cuda:N`
    Cuda(usize),
}

/// What `--device` takes.
pub fn device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "auto" || text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", n)) if n.parse::<u16>().is_ok() => Ok(Device::Cuda(n.parse().unwrap_or_default())),
        _ => Err("expected auto, cpu, cuda or cuda:N".into()),
    }
}

/// Where the work is done.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Machine")]
pub struct Machine {
    /// auto, cpu, cuda or cuda:N; auto is the CPU as long as the CUDA path has not run on a GPU [default: auto]
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    device: Option<Device>,
    /// CPU threads [default: all]; DLLM_CPU=amx, avx512, avx2 or plain in the environment limits the instructions
    #[arg(long, value_name = "N", value_parser = threads())]
    threads: Option<usize>,
}

impl Machine {
    /// Gets the device ready.
    pub fn start(&self) -> Result<Place> {
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
        Place::open(self.device.unwrap_or_default())
    }
}

/// What a device reaches at the most, measured.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Roofs {
    /// Of reading memory.
    pub bytes_per_second: f64,
    /// Of products of bf16 matrices into f32.
    pub operations_per_second: f64,
}

/// A device that is ready.
pub struct Place {
    /// As answers name it: `cpu`, or the number and name of a CUDA device.
    pub name: String,
    #[cfg(feature = "cuda")]
    device: Option<gpu::Device>,
}

impl Place {
    /// Gets a device ready.
    #[cfg(feature = "cuda")]
    pub fn open(device: Device) -> Result<Place> {
        let Device::Cuda(ordinal) = device else {
            return Ok(Place { name: "cpu".into(), device: None });
        };
        let device = gpu::Device::open(ordinal)
            .map_err(|error| Error::NoDevice(format!("--device cuda:{ordinal}: {error}; `dllm doctor` tells more")))?;
        note(format_args!(
            "note: --device cuda is untried: it has run on a CUDA device in software, and not on a GPU yet"
        ));
        Ok(Place { name: format!("cuda:{ordinal} {}", device.name()?), device: Some(device) })
    }

    /// Gets a device ready.
    #[cfg(not(feature = "cuda"))]
    pub fn open(device: Device) -> Result<Place> {
        match device {
            Device::Cpu => Ok(Place { name: "cpu".into() }),
            Device::Cuda(n) => {
                Err(Error::NoDevice(format!("--device cuda:{n}: this program was built without the feature cuda")))
            }
        }
    }

    /// What the CUDA device reaches at the most, if it is one in hardware.
    #[cfg(feature = "cuda")]
    pub fn roofs(&self) -> Result<Option<Roofs>> {
        let Some(device) = &self.device else { return Ok(None) };
        // Older drivers do not tell times, nor does the software device any that mean something.
        if !gpu::Device::supports_timing()? || self.name.contains("software device") {
            return Ok(None);
        }
        let bytes_per_second = dllm_kernels::ops::read_bandwidth::read_rate(&device.stream()?, 2 << 30, 30)?;
        Ok(Some(Roofs { bytes_per_second, operations_per_second: gpu::blas::matrix_rate(device, 8192, 10)? }))
    }

    /// No CUDA device has any.
    #[cfg(not(feature = "cuda"))]
    pub fn roofs(&self) -> Result<Option<Roofs>> {
        Ok(None)
    }

    /// Brings the weights to where the work is done.
    pub fn bring(&self, model: Model) -> Result<Model> {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            // Draws nothing unless stderr is a terminal.
            let bar = indicatif::ProgressBar::new(0).with_style(
                indicatif::ProgressStyle::with_template("weights {bytes} of {total_bytes} {bar:30} {bytes_per_sec}")
                    .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
            );
            let drawn = bar.clone();
            let model = model.to_device(device, move |done, of| {
                drawn.set_length(of);
                drawn.set_position(done);
            });
            bar.finish_and_clear();
            return model;
        }
        Ok(model)
    }
}
