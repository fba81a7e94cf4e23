//! Probe of the memory read bandwidth: the kernel of `cuda/any/read_bandwidth.cu`.
//!
//! This is a measurement for benchmarks and `dllm doctor`, not an op of the runner. It reads memory and discards the values;
//! its rate is the roof of every kernel that is bound by reads.

use super::{Plan, buffers, validate};
use crate::abi::dllm_read_bandwidth_params;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Bytes that one block reads.
const TILE: u64 = 64 << 10;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_read_bandwidth_params) -> Result<()> {
    validate::struct_size::<dllm_read_bandwidth_params>(params.size)?;
    validate::address("source", params.source, 16)?;
    validate::address("sink", params.sink, 4)?;
    if !params.bytes.is_multiple_of(16) || !(16..=TILE * i32::MAX as u64).contains(&params.bytes) {
        return Err(Error::argument("bytes", "a multiple of 16, at least 16", params.bytes));
    }
    Ok(())
}

/// Returns the plan of a launch: a block of 512 threads per 64 KiB.
pub fn plan(params: &dllm_read_bandwidth_params) -> Plan {
    Plan { kernel: "read_bandwidth", grid: [params.bytes.div_ceil(TILE) as u32, 1, 1], block: 512, workspace_bytes: 0 }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_read_bandwidth_params`] gives, until the work is done.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_read_bandwidth_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "read_bandwidth", plan(params), params) }
}

/// Enqueues reads of all bytes of `source`; otherwise as [`launch_raw`]. `sink` has one element; its contents are
/// meaningless.
///
/// # Errors
/// [`Error::Argument`] when a buffer belongs to another stream, or the length of `source` is not a multiple of 16 bytes, at
/// least 16; the driver's.
pub fn launch(stream: &Stream, source: &Buffer<u8>, sink: &mut Buffer<u32>) -> Result<()> {
    let params = dllm_read_bandwidth_params {
        size: size_of::<dllm_read_bandwidth_params>() as u64,
        source: buffers::buffer("source", source, 0, stream)?,
        sink: buffers::buffer("sink", sink, 1, stream)?,
        bytes: source.len() as u64,
    };
    // SAFETY: addresses and sizes come from buffers of this stream.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

/// Measures the read bandwidth in bytes per second: the roof of kernels that are bound by reads.
///
/// Reads `bytes` bytes (a multiple of 16), once untimed and then `repetitions` times, at least once. Returns the rate of the
/// median time. Allocates the memory and synchronises with the stream; it cannot be captured.
///
/// # Errors
/// As [`launch`], [`Stream::zeros`] and [`Stream::time_ms`].
pub fn read_rate(stream: &Stream, bytes: usize, repetitions: usize) -> Result<f64> {
    let _settle = stream.sync_on_drop();
    let (source, mut sink) = (stream.zeros::<u8>(bytes)?, stream.zeros::<u32>(1)?);
    let mut times = Vec::new();
    for _ in 0..=repetitions.max(1) {
        times.push(stream.time_ms(|| launch(stream, &source, &mut sink))?);
    }
    times.remove(0);
    times.sort_by(f32::total_cmp);
    Ok(bytes as f64 / (f64::from(times[times.len() / 2]) / 1e3))
}
