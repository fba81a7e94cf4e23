//! Merge of two attention states of the same queries over disjoint sets of keys: the kernels of `cuda/any/merge_state.cu`.
//!
//! This op is for engine authors only: the runner of this crate does not use it.
//!
//! A state is an attention output with its log-sum-exps. The result is the state over the union of the keys:
//! `lse = ln(e^a_lse + e^b_lse)`, `out = e^(a_lse - lse) a_out + e^(b_lse - lse) b_out`. Exchanging a and b gives the same bits.
//! When one log-sum-exp is minus infinity (no keys), the result is exactly the other state. Element types: bf16, f16, f32.

use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_merge_state_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Threads per block.
const THREADS: u32 = 256;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// Memory that must not overlap is compared by addresses.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_merge_state_params) -> Result<()> {
    validate::struct_size::<dllm_merge_state_params>(params.size)?;
    let element_bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16, abi::DLLM_F32])?;
    for (name, address) in [("a_out", params.a_out), ("b_out", params.b_out), ("out", params.out)] {
        validate::address(name, address, 16)?;
    }
    for (name, address) in [("a_lse", params.a_lse), ("b_lse", params.b_lse), ("lse", params.lse)] {
        validate::address(name, address, 4)?;
    }
    validate::optional("count", params.count, 4)?;
    validate::width("head_dim", params.head_dim, element_bytes)?;
    validate::within("num_heads", params.num_heads.into(), 1, 1 << 16)?;
    // Above, the number of blocks could overflow.
    validate::within("max_rows", params.max_rows.into(), 1, i64::from(i32::MAX - 256) / i64::from(params.num_heads))?;
    let width = i64::from(params.num_heads) * i64::from(params.head_dim);
    validate::stride("a_stride", params.a_stride, width, element_bytes)?;
    validate::stride("b_stride", params.b_stride, width, element_bytes)?;
    validate::stride("out_stride", params.out_stride, width, element_bytes)?;

    let (rows, heads) = (params.max_rows, i64::from(params.num_heads));
    let region = |name, address, stride| validate::Region::new(name, address, rows, stride, width, element_bytes);
    // Log-sum-exps are packed: the overlap check treats them as one row.
    let packed =
        |name, address| validate::Region::new(name, address, 1, i64::from(rows) * heads, i64::from(rows) * heads, 4);
    let outs = [("a_out", params.a_out, params.a_stride), ("b_out", params.b_out, params.b_stride)];
    let lses = [("a_lse", params.a_lse), ("b_lse", params.b_lse)];
    let (out, lse) = (region("out", params.out, params.out_stride), packed("lse", params.lse));
    [out, lse].into_iter().try_for_each(validate::Region::fits_address_space)?;
    out.disjoint_from(lse)?;
    for (name, address, stride) in outs {
        let read = region(name, address, stride);
        read.fits_address_space()?;
        lse.disjoint_from(read)?;
        if (address, stride) != (params.out, params.out_stride) {
            out.disjoint_from(read)?;
        }
    }
    for (name, address) in lses {
        let read = packed(name, address);
        read.fits_address_space()?;
        out.disjoint_from(read)?;
        if address != params.lse {
            lse.disjoint_from(read)?;
        }
    }
    Ok(())
}

/// Returns the plan of a launch: blocks of 256 threads. Each row and head gets a power of two of threads, up to 32.
pub fn plan(params: &dllm_merge_state_params) -> Plan {
    let (kernel, vector) = match params.dtype as abi::dllm_dtype {
        abi::DLLM_BF16 => ("merge_state_bf16", 8),
        abi::DLLM_F16 => ("merge_state_f16", 8),
        _ => ("merge_state_f32", 4),
    };
    let lanes = (params.head_dim.max(1) as u32).div_ceil(vector).next_power_of_two().min(32);
    let row_heads = params.max_rows.max(1) as u64 * params.num_heads.max(1) as u64;
    let blocks = row_heads.div_ceil((THREADS / lanes).into()).min(i32::MAX as u64) as u32;
    Plan { kernel, grid: [blocks, 1, 1], block: THREADS, workspace_bytes: 0 }
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
/// 2. The addresses are of device memory of the sizes that [`dllm_merge_state_params`] gives, until the work is done.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_merge_state_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller; overlaps were checked.
    unsafe { super::launch(device, stream, "merge_state", plan(params), params) }
}

/// One attention state, packed.
#[derive(Clone, Copy, Debug)]
pub struct Partial<'a, T> {
    /// Attention outputs `[max_rows, num_heads, head_dim]`.
    pub out: &'a Buffer<T>,
    /// Natural log-sum-exps `[max_rows, num_heads]`; minus infinity for rows without keys.
    pub lse: &'a Buffer<f32>,
}

/// Inputs and outputs of [`launch`]. All matrices are packed.
pub struct MergeState<'a, T> {
    /// Maximum number of rows of the launch.
    pub max_rows: usize,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Number of query heads.
    pub num_heads: usize,
    /// Elements of a head; a multiple of 16 bytes.
    pub head_dim: usize,
    /// First state; `None`: the contents of `out` and `lse` (in place).
    pub a: Option<Partial<'a, T>>,
    /// Second state.
    pub b: Partial<'a, T>,
    /// Output `[max_rows, num_heads, head_dim]`.
    pub out: &'a mut Buffer<T>,
    /// Output log-sum-exps `[max_rows, num_heads]`.
    pub lse: &'a mut Buffer<f32>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`].
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or as [`validate`]; the driver's.
pub fn launch<T: Element>(stream: &Stream, merge: MergeState<T>) -> Result<()> {
    let MergeState { max_rows, count, num_heads, head_dim, a, b, out, lse } = merge;
    let row_heads = buffers::elements(max_rows, num_heads);
    let elements = buffers::elements(row_heads, head_dim);
    let Some(width) = num_heads.checked_mul(head_dim) else {
        return Err(Error::argument("num_heads", "heads that memory can hold", num_heads));
    };
    let (out, lse) = (buffers::buffer("out", out, elements, stream)?, buffers::buffer("lse", lse, row_heads, stream)?);
    let (a_out, a_lse) = match a {
        None => (out, lse),
        Some(a) => {
            (buffers::buffer("a_out", a.out, elements, stream)?, buffers::buffer("a_lse", a.lse, row_heads, stream)?)
        }
    };
    let params = dllm_merge_state_params {
        size: size_of::<dllm_merge_state_params>() as u64,
        a_out,
        a_lse,
        b_out: buffers::buffer("b_out", b.out, elements, stream)?,
        b_lse: buffers::buffer("b_lse", b.lse, row_heads, stream)?,
        out,
        lse,
        count: buffers::optional("count", count, 1, stream)?,
        a_stride: width as i64,
        b_stride: width as i64,
        out_stride: width as i64,
        max_rows: buffers::count("max_rows", max_rows)?,
        num_heads: buffers::count("num_heads", num_heads)?,
        head_dim: buffers::count("head_dim", head_dim)?,
        dtype: T::DTYPE as i32,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; outputs are borrowed exclusively.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_merge_state_params {
        dllm_merge_state_params {
            size: size_of::<dllm_merge_state_params>() as u64,
            a_out: 0x1000,
            a_lse: 0x2000,
            b_out: 0x3000,
            b_lse: 0x4000,
            out: 0x5000,
            lse: 0x6000,
            count: 0,
            a_stride: 48,
            b_stride: 56,
            out_stride: 64,
            max_rows: 5,
            num_heads: 2,
            head_dim: 24,
            dtype: abi::DLLM_BF16 as i32,
        }
    }

    #[test]
    fn plans_lanes_for_each_row_and_head() {
        assert!(validate(&params()).is_ok());
        let plan_of = |dtype, max_rows, num_heads, head_dim| {
            let plan = plan(&dllm_merge_state_params { dtype, max_rows, num_heads, head_dim, ..params() });
            assert_eq!((plan.block, plan.workspace_bytes), (256, 0));
            (plan.kernel, plan.grid)
        };
        assert_eq!(plan_of(0, 32, 32, 128), ("merge_state_bf16", [64, 1, 1]), "16 lanes");
        assert_eq!(plan_of(1, 5, 2, 24), ("merge_state_f16", [1, 1, 1]), "4 lanes");
        assert_eq!(plan_of(2, 32, 32, 128), ("merge_state_f32", [128, 1, 1]), "32 lanes");
        assert_eq!(plan_of(2, 3, 3, 4096), ("merge_state_f32", [2, 1, 1]), "32 lanes, several rounds");
        assert_eq!(plan_of(0, 257, 1, 8), ("merge_state_bf16", [2, 1, 1]), "1 lane");
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_merge_state_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size = 0, "size: expected 104");
        wrong(|p| p.dtype = 3, "dtype: expected bf16 (0) or f16 (1) or f32 (2), found 3");
        wrong(|p| p.a_out = 0, "a_out: expected a device address, found 0");
        wrong(|p| p.b_out += 8, "b_out: expected an address aligned to 16 bytes, found 0x3008");
        wrong(|p| p.out = 0, "out: expected a device address");
        wrong(|p| p.a_lse = 0, "a_lse: expected a device address");
        wrong(|p| p.b_lse += 2, "b_lse: expected an address aligned to 4");
        wrong(|p| p.lse = 0, "lse: expected a device address");
        wrong(|p| p.count = 2, "count");
        wrong(|p| p.head_dim = 20, "head_dim: expected a multiple of 8 elements (16 bytes), found 20");
        wrong(|p| p.num_heads = 0, "num_heads: expected 1 to");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.max_rows = i32::MAX / 2, "max_rows: expected 1 to");
        wrong(|p| p.a_stride = 40, "a_stride: expected a multiple of 8 elements (16 bytes), at least the width, 48");
        wrong(|p| p.b_stride = 60, "b_stride");
        wrong(|p| p.out_stride = -64, "out_stride");
        wrong(|p| p.out_stride = i64::MAX - 7, "out: expected rows within 64-bit addresses");
        wrong(|p| p.b_stride = i64::MAX - 7, "b_out: expected rows within 64-bit addresses");
        wrong(|p| p.out = p.a_out, "out: expected memory that does not overlap a_out");
        wrong(|p| p.out = p.b_out + 64, "out: expected memory that does not overlap b_out");
        wrong(|p| p.out = p.b_lse - 32, "out: expected memory that does not overlap b_lse");
        wrong(|p| p.lse = p.out + 16, "out: expected memory that does not overlap lse");
        wrong(|p| p.lse = p.a_lse + 4, "lse: expected memory that does not overlap a_lse");
        wrong(|p| p.lse = p.b_out, "lse: expected memory that does not overlap b_out");
    }

    #[test]
    fn either_side_may_be_overwritten() {
        let p = params();
        let in_place = |out, out_stride, lse| validate(&dllm_merge_state_params { out, out_stride, lse, ..p }).is_ok();
        assert!(in_place(p.a_out, p.a_stride, p.a_lse));
        assert!(in_place(p.b_out, p.b_stride, p.b_lse));
        assert!(in_place(p.a_out, p.a_stride, p.b_lse));
        assert!(!in_place(p.a_out, p.b_stride, p.a_lse), "another stride");
        assert!(!in_place(p.a_out, p.a_stride, p.a_lse + 4));
    }
}
