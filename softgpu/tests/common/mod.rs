//! Helpers of the tests: a device, PTX texts, launches.
#![allow(dead_code)] // each test file uses a part of it

#[path = "../../../src/selftest/limit.rs"]
mod limit;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, LaunchConfig};
use cudarc::nvrtc::Ptx;
use softgpu::Opt;
use std::sync::Arc;

pub struct Gpu {
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
}

/// The CUDA emulator with a stream for this test. Quiet: expected errors are not printed.
pub fn gpu() -> Gpu {
    softgpu::install();
    softgpu::set(Opt::Quiet, 1);
    let context = CudaContext::new(0).unwrap();
    // SAFETY: every test waits for its stream before it drops anything.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    Gpu { context, stream }
}

/// Declaration of a kernel in PTX. The emulator reads nothing else: the code comes from the host build.
#[derive(Clone)]
pub struct Entry<'a> {
    pub name: &'a str,
    /// Sizes of the parameters in bytes.
    pub params: &'a [u32],
    pub max_threads: Option<u32>,
    pub shared_bytes: u32,
}

pub fn entry<'a>(name: &'a str, params: &'a [u32]) -> Entry<'a> {
    Entry { name, params, max_threads: None, shared_bytes: 0 }
}

pub fn ptx_text(entries: &[Entry]) -> String {
    let mut text = String::from("// kernels of a test\n.version 8.0\n.target sm_80\n.address_size 64\n\n");
    for entry in entries {
        let params: Vec<String> = entry
            .params
            .iter()
            .enumerate()
            .map(|(i, bytes)| format!("\t.param .align 8 .b8 {}_param_{i}[{bytes}]", entry.name))
            .collect();
        text += &format!("\t// .globl\t{}\n.visible .entry {}(\n{}\n)\n", entry.name, entry.name, params.join(",\n"));
        if let Some(threads) = entry.max_threads {
            text += &format!(".maxntid {threads}, 1, 1\n");
        }
        text += "{\n";
        if entry.shared_bytes > 0 {
            text += &format!("\t.shared .align 4 .b8 {}_shared[{}];\n", entry.name, entry.shared_bytes);
        }
        text += "\tld.shared.f32 \t%f1, [%r1];\n\tret;\n}\n\n";
    }
    text
}

impl Gpu {
    pub fn function(&self, entry: Entry) -> CudaFunction {
        let name = entry.name.to_owned();
        let module = self.context.load_module(Ptx::from_src(ptx_text(&[entry]))).unwrap();
        module.load_function(&name).unwrap()
    }

    pub fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }
}

pub fn shape(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

pub fn shape_with_shared(blocks: u32, threads: u32, shared_bytes: u32) -> LaunchConfig {
    LaunchConfig { shared_mem_bytes: shared_bytes, ..shape(blocks, threads) }
}

/// Launches a kernel with the given arguments and returns the result.
#[macro_export]
macro_rules! launch {
    ($gpu:expr, $function:expr, $shape:expr $(, $argument:expr)*) => {{
        use cudarc::driver::PushKernelArg;
        let mut builder = $gpu.stream.launch_builder(&$function);
        // Arguments are place expressions of the tests; some tests are already inside an unsafe block.
        #[allow(unused_unsafe, clippy::macro_metavars_in_unsafe)]
        // SAFETY: the CUDA emulator checks arguments and memory.
        let launched = unsafe { builder$(.arg($argument))*.launch($shape) };
        launched.map(|_| ())
    }};
}

pub fn code<T>(result: Result<T, DriverError>) -> CUresult {
    match result {
        Ok(_) => CUresult::CUDA_SUCCESS,
        Err(error) => error.0,
    }
}

/// Takes the report and checks that it contains `text`.
#[track_caller]
pub fn assert_reported(text: &str) {
    let report = softgpu::report();
    assert!(report.contains(text), "expected {text:?} in the report, which is {report:?}");
}

/// Pseudo-random numbers, the same for a seed.
pub fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}
