//! The bandwidth that reading can reach: the kernel of `cuda/any/read_bandwidth.cu`. Not part of any model.

use super::{Plan, buffers, validate};
use crate::abi::dllm_read_bandwidth_params;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Bytes that a block reads.
const TILE: u64 = 64 << 10;

/// Checks every field but what the addresses point to.
pub fn validate(params: &dllm_read_bandwidth_params) -> Result<()> {
    validate::struct_size::<dllm_read_bandwidth_params>(params.size)?;
    validate::address("source", params.source, 16)?;
    validate::address("sink", params.sink, 4)?;
    match params.bytes.is_multiple_of(16) && (16..=TILE * i32::MAX as u64).contains(&params.bytes) {
        true => Ok(()),
        false => Err(Error::argument("bytes", "a multiple of 16, at least 16", params.bytes)),
    }
}

/// What a launch takes: a block of 512 threads for each 64 KiB.
pub fn plan(params: &dllm_read_bandwidth_params) -> Plan {
    Plan { kernel: "read_bandwidth", grid: [params.bytes.div_ceil(TILE) as u32, 1, 1], block: 512, workspace_bytes: 0 }
}

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_read_bandwidth_params`] gives, until the work is done.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_read_bandwidth_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "read_bandwidth", plan(params), params) }
}

/// Reads all of `source`, and returns. `sink` has one element.
///
/// # Errors
/// [`Error::Argument`] when a buffer belongs to another stream or `source` is no multiple of 16 bytes; the driver's.
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

/// Bytes a second at which the device reads: the roof of whatever is bound by reading. The median of `repetitions` over
/// `bytes` after one that is not timed. Waits for the device.
///
/// # Errors
/// No memory for `bytes`; a driver that does not tell times ([`crate::gpu::Device::tells_times`]); the driver's.
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
