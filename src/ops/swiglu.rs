//! SwiGLU gate of the feed-forward layer, `out = silu(gate) * up` with `silu(x) = x / (1 + e^-x)`: the kernels of
//! `cuda/any/swiglu.cu`.
//!
//! `silu(gate)` is rounded to the element type before the product. Element types: bf16, f16, f32.

use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_swiglu_params};
use crate::error::Result;
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Number of 16-byte vectors of the output row that one block computes.
const TILE_VECTORS: i64 = 1024;
/// Maximum number of blocks in the second dimension of a grid.
const MAX_TILES: i64 = 65_535;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// Memory that must not overlap is compared by addresses. Columns of one matrix with the same stride do not overlap.
///
/// # Errors
/// [`crate::Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_swiglu_params) -> Result<()> {
    validate::struct_size::<dllm_swiglu_params>(params.size)?;
    let element_bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16, abi::DLLM_F32])?;
    validate::address("gate_up", params.gate_up, 16)?;
    validate::address("out", params.out, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::width("width", params.width, element_bytes)?;
    let width = i64::from(params.width);
    validate::within("width", width, 1, MAX_TILES * TILE_VECTORS * 16 / element_bytes)?;
    validate::stride("gate_up_stride", params.gate_up_stride, 2 * width, element_bytes)?;
    validate::stride("out_stride", params.out_stride, width, element_bytes)?;
    validate::size("max_rows", params.max_rows)?;
    validate::reserved(params.reserved)?;

    let region = |name, address, stride, width| {
        validate::Region::new(name, address, params.max_rows, stride, width, element_bytes)
    };
    let gate_up = region("gate_up", params.gate_up, params.gate_up_stride, 2 * width);
    let out = region("out", params.out, params.out_stride, width);
    gate_up.fits_address_space()?;
    out.fits_address_space()?;
    out.disjoint_from(gate_up)
}

/// Returns the plan of a launch: a block of 256 threads per row and 16 KiB of the row.
pub fn plan(params: &dllm_swiglu_params) -> Plan {
    let (kernel, element_bytes) = match params.dtype as abi::dllm_dtype {
        abi::DLLM_BF16 => ("swiglu_bf16", 2),
        abi::DLLM_F16 => ("swiglu_f16", 2),
        _ => ("swiglu_f32", 4),
    };
    let tiles = (params.width.max(1) as u32).div_ceil((TILE_VECTORS * 16) as u32 / element_bytes);
    Plan { kernel, grid: [params.max_rows.max(1) as u32, tiles, 1], block: 256, workspace_bytes: 0 }
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
/// 2. The addresses are of device memory of the sizes that [`dllm_swiglu_params`] gives, until the work is done.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_swiglu_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller; overlap was checked.
    unsafe { super::launch(device, stream, "swiglu", plan(params), params) }
}

/// Inputs and outputs of [`launch`]. Both matrices are packed.
pub struct Swiglu<'a, T> {
    /// Maximum number of rows of the launch.
    pub max_rows: usize,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Number of elements of a row of `out`; a multiple of 16 bytes.
    pub width: usize,
    /// Input `[max_rows, 2 * width]`: the gate, then the up projection.
    pub gate_up: &'a Buffer<T>,
    /// Output `[max_rows, width]`.
    pub out: &'a mut Buffer<T>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`].
///
/// # Errors
/// [`crate::Error::Argument`] when a buffer is too short or belongs to another stream, or as [`validate`]; the driver's.
pub fn launch<T: Element>(stream: &Stream, swiglu: Swiglu<T>) -> Result<()> {
    let Swiglu { max_rows, count, width, gate_up, out } = swiglu;
    let params = dllm_swiglu_params {
        size: size_of::<dllm_swiglu_params>() as u64,
        gate_up: buffers::buffer("gate_up", gate_up, buffers::elements(max_rows, width.saturating_mul(2)), stream)?,
        out: buffers::buffer("out", out, buffers::elements(max_rows, width), stream)?,
        count: buffers::optional("count", count, 1, stream)?,
        gate_up_stride: width.saturating_mul(2) as i64,
        out_stride: width as i64,
        max_rows: buffers::count("max_rows", max_rows)?,
        width: buffers::count("width", width)?,
        dtype: T::DTYPE as i32,
        reserved: 0,
    };
    // SAFETY: addresses and sizes come from buffers of this stream, and `out` is borrowed exclusively.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_swiglu_params {
        dllm_swiglu_params {
            size: size_of::<dllm_swiglu_params>() as u64,
            gate_up: 0x1000,
            out: 0x4000,
            count: 0,
            gate_up_stride: 48,
            out_stride: 32,
            max_rows: 5,
            width: 24,
            dtype: abi::DLLM_BF16 as i32,
            reserved: 0,
        }
    }

    #[test]
    fn plans_a_block_for_each_tile_of_a_row() {
        for (dtype, kernel, tile) in [(0, "swiglu_bf16", 8192), (1, "swiglu_f16", 8192), (2, "swiglu_f32", 4096)] {
            for (width, tiles) in [(8, 1), (tile, 1), (tile + 8, 2), (3 * tile, 3)] {
                let stride = i64::from(2 * width);
                let gate_up = 0x100_0000;
                let params = dllm_swiglu_params {
                    dtype,
                    width,
                    gate_up,
                    gate_up_stride: stride,
                    out_stride: stride,
                    ..params()
                };
                assert!(validate(&params).is_ok());
                assert_eq!(plan(&params), Plan { kernel, grid: [5, tiles, 1], block: 256, workspace_bytes: 0 });
            }
        }
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_swiglu_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size = 1, "size: expected 64");
        wrong(|p| p.dtype = -1, "dtype: expected bf16 (0) or f16 (1) or f32 (2), found -1");
        wrong(|p| p.gate_up = 0, "gate_up: expected a device address, found 0");
        wrong(|p| p.out = 24, "out: expected an address aligned to 16 bytes, found 0x18");
        wrong(|p| p.count = 2, "count");
        wrong(|p| p.width = -8, "width: expected 1 to");
        wrong(|p| p.width = 12, "width: expected a multiple of 8 elements (16 bytes), found 12");
        wrong(|p| p.width = i32::MAX - 7, "width: expected 1 to 536862720");
        wrong(|p| p.gate_up_stride = 40, "gate_up_stride: expected a multiple of 8 elements (16 bytes), at least");
        wrong(|p| p.out_stride = 28, "out_stride");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.reserved = -1, "reserved: expected 0, found -1");
        wrong(|p| p.gate_up_stride = i64::MAX - 7, "gate_up: expected rows within 64-bit addresses");
        wrong(|p| p.out_stride = i64::MAX - 7, "out: expected rows within 64-bit addresses");
        wrong(|p| p.out = p.gate_up, "out: expected memory that does not overlap gate_up");
        wrong(|p| p.out = p.gate_up + 16, "out: expected memory that does not overlap gate_up");
    }
}
