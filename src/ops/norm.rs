//! Residual add and RMSNorm: the kernels of `cuda/any/norm.cu`.
//!
//! Computes `x += delta`, then `out = x / sqrt(mean(x^2) + eps) * weight` per row. Sums are f32. The sum, the normalised row and the
//! product are each rounded to the element type, in the order of the reference implementations. Element types: bf16, f16, f32.

use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_norm_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Maximum number of elements of a row, which a block holds in registers.
const MAX_WIDTH: i64 = 8192;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// Memory that must not overlap is compared by addresses. Columns of one matrix with the same stride do not overlap.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_norm_params) -> Result<()> {
    validate::struct_size::<dllm_norm_params>(params.size)?;
    let element_bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16, abi::DLLM_F32])?;
    validate::address("x", params.x, 16)?;
    validate::optional("delta", params.delta, 16)?;
    validate::optional("delta_row", params.delta_row, 4)?;
    validate::address("weight", params.weight, 16)?;
    validate::address("out", params.out, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::width("width", params.width, element_bytes)?;
    let width = i64::from(params.width);
    validate::within("width", width, 1, MAX_WIDTH)?;
    validate::stride("x_stride", params.x_stride, width, element_bytes)?;
    validate::stride("out_stride", params.out_stride, width, element_bytes)?;
    if params.delta != 0 {
        validate::stride("delta_stride", params.delta_stride, width, element_bytes)?;
    }
    validate::size("max_rows", params.max_rows)?;
    validate::reserved(params.reserved)?;
    if !(params.eps >= 0.0 && params.eps.is_finite()) {
        return Err(Error::argument("eps", "a finite number, at least 0", params.eps));
    }

    let region =
        |name, address, stride| validate::Region::new(name, address, params.max_rows, stride, width, element_bytes);
    let x = region("x", params.x, params.x_stride);
    let out = region("out", params.out, params.out_stride);
    let weight = validate::Region::new("weight", params.weight, 1, width, width, element_bytes);
    [x, out, weight].into_iter().try_for_each(validate::Region::fits_address_space)?;
    [x, weight].into_iter().try_for_each(|other| out.disjoint_from(other))?;
    if params.delta != 0 {
        let delta_rows = if params.delta_row == 0 { params.max_rows } else { params.num_delta_rows };
        validate::size("num_delta_rows", delta_rows)?;
        let delta = validate::Region { rows: delta_rows, ..region("delta", params.delta, params.delta_stride) };
        delta.fits_address_space()?;
        out.disjoint_from(delta)?;
    }
    Ok(())
}

/// Returns the plan of a launch: a block of 256 threads per row.
pub fn plan(params: &dllm_norm_params) -> Plan {
    let kernel = match params.dtype as abi::dllm_dtype {
        abi::DLLM_BF16 => "norm_bf16",
        abi::DLLM_F16 => "norm_f16",
        _ => "norm_f32",
    };
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 0 }
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
/// 2. The addresses are of device memory of the sizes that [`dllm_norm_params`] gives, until the work is done.
/// 3. With a `delta`, `x` overlaps no other memory of the struct.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_norm_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller; `out` was checked.
    unsafe { super::launch(device, stream, "norm", plan(params), params) }
}

/// Inputs and outputs of [`launch`]. All matrices are packed, with rows of `width` elements, the length of `weight`.
pub struct Norm<'a, T> {
    /// Maximum number of rows of the launch.
    pub max_rows: usize,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Residual stream `[max_rows, width]`; written only with `delta`.
    pub x: &'a mut Buffer<T>,
    /// Rows that are added to `x`: `[max_rows, width]`, or `[num_delta_rows, width]` with `delta_row`. `None`: nothing is added.
    pub delta: Option<&'a Buffer<T>>,
    /// Row of `delta` that is added to each row of `x`, `[max_rows]`. Nothing is added for an index out of range, for example -1.
    /// `None`: row i of `delta` is added to row i of `x`.
    pub delta_row: Option<&'a Buffer<i32>>,
    /// Weight `[width]`. The width is a multiple of 16 bytes, and at most 8,192 elements.
    pub weight: &'a Buffer<T>,
    /// Value that is added to the mean square; finite, at least 0.
    pub eps: f32,
    /// Output `[max_rows, width]`.
    pub out: &'a mut Buffer<T>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`].
///
/// # Errors
/// [`crate::Error::Argument`] when a buffer is too short or belongs to another stream, or as [`validate`]; the driver's.
pub fn launch<T: Element>(stream: &Stream, norm: Norm<T>) -> Result<()> {
    let Norm { max_rows, count, x, delta, delta_row, weight, eps, out } = norm;
    let width = weight.len();
    let elements = buffers::elements(max_rows, width);
    let params = dllm_norm_params {
        size: size_of::<dllm_norm_params>() as u64,
        x: buffers::buffer("x", x, elements, stream)?,
        delta: buffers::optional("delta", delta, delta_row.map_or(elements, |_| width), stream)?,
        delta_row: buffers::optional("delta_row", delta_row, max_rows, stream)?,
        weight: buffers::buffer("weight", weight, 1, stream)?,
        out: buffers::buffer("out", out, elements, stream)?,
        count: buffers::optional("count", count, 1, stream)?,
        x_stride: width as i64,
        delta_stride: width as i64,
        out_stride: width as i64,
        max_rows: buffers::count("max_rows", max_rows)?,
        width: buffers::count("weight", width)?,
        dtype: T::DTYPE as i32,
        eps,
        num_delta_rows: buffers::count("delta", delta.map_or(0, |delta| delta.len() / width))?,
        reserved: 0,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; `x` and `out` are borrowed exclusively; the kernel checks
    // every row of `delta`.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_norm_params {
        dllm_norm_params {
            size: size_of::<dllm_norm_params>() as u64,
            x: 0x1000,
            delta: 0x2000,
            delta_row: 0,
            weight: 0x3000,
            out: 0x4000,
            count: 0,
            x_stride: 32,
            delta_stride: 24,
            out_stride: 40,
            max_rows: 5,
            width: 24,
            dtype: abi::DLLM_BF16 as i32,
            eps: 1e-5,
            num_delta_rows: 0,
            reserved: 0,
        }
    }

    #[test]
    fn plans_a_block_for_each_row() {
        for (dtype, kernel) in [(0, "norm_bf16"), (1, "norm_f16"), (2, "norm_f32")] {
            let params = dllm_norm_params { dtype, ..params() };
            assert!(validate(&params).is_ok());
            assert_eq!(plan(&params), Plan { kernel, grid: [5, 1, 1], block: 256, workspace_bytes: 0 });
        }
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_norm_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size = 0, "size: expected 104");
        wrong(|p| p.dtype = 3, "dtype: expected bf16 (0) or f16 (1) or f32 (2), found 3");
        wrong(|p| p.x = 0, "x: expected a device address, found 0");
        wrong(|p| p.delta = 8, "delta: expected an address aligned to 16 bytes, found 0x8");
        wrong(|p| p.delta_row = 2, "delta_row: expected an address aligned to 4");
        wrong(|p| p.delta_row = 4, "num_delta_rows: expected 1 to");
        wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
        wrong(|p| p.weight = 0, "weight: expected a device address");
        wrong(|p| p.out += 2, "out: expected an address aligned to 16");
        wrong(|p| p.count = 2, "count");
        wrong(|p| p.width = 0, "width: expected 1 to");
        wrong(|p| p.width = 20, "width: expected a multiple of 8 elements (16 bytes), found 20");
        wrong(|p| p.width = 8200, "width: expected 1 to 8192, found 8200");
        wrong(|p| p.x_stride = 16, "x_stride: expected a multiple of 8 elements (16 bytes), at least the width, 24");
        wrong(|p| p.delta_stride = 28, "delta_stride");
        wrong(|p| p.out_stride = -24, "out_stride");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.eps = -1e-6, "eps: expected a finite number, at least 0, found -0.000001");
        wrong(|p| p.eps = f32::NAN, "eps");
        wrong(|p| p.eps = f32::INFINITY, "eps");
        wrong(|p| p.x_stride = i64::MAX - 7, "x: expected rows within 64-bit addresses");
        wrong(|p| p.delta_stride = i64::MAX - 7, "delta: expected rows within 64-bit addresses");
        wrong(|p| p.out_stride = i64::MAX - 7, "out: expected rows within 64-bit addresses");
        wrong(|p| p.out = p.x, "out: expected memory that does not overlap x");
        wrong(|p| p.out = p.delta + 16, "out: expected memory that does not overlap delta");
        wrong(
            |p| (p.delta_row, p.num_delta_rows, p.out) = (4, 90, 0x3080),
            "out: expected memory that does not overlap delta",
        );
        wrong(|p| p.out = p.weight - 320, "out: expected memory that does not overlap weight");
    }

    #[test]
    fn without_delta_its_stride_is_free() {
        assert!(validate(&dllm_norm_params { delta: 0, delta_stride: -1, ..params() }).is_ok());
    }
}
