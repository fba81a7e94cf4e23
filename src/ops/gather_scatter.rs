//! Gather and scatter of rows by indices in device memory: the kernels of `cuda/any/gather_scatter.cu`.
//!
//! Rows are copied as bytes, so any element type works. Rows whose index is out of range, for example -1, are skipped.

use super::{Plan, buffers, validate};
use crate::abi::dllm_gather_scatter_params;
use crate::error::Result;
use crate::gpu::{Buffer, Device, Stream};
use bytemuck::Pod;
use std::ffi::c_void;

/// Direction of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// `target[i] = source[index[i]]`
    Gather,
    /// `target[index[i]] = source[i]`
    Scatter,
}

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`crate::Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_gather_scatter_params) -> Result<()> {
    validate::struct_size::<dllm_gather_scatter_params>(params.size)?;
    validate::address("source", params.source, 16)?;
    validate::address("target", params.target, 16)?;
    validate::address("index", params.index, 4)?;
    validate::optional("count", params.count, 4)?;
    validate::optional("failed", params.failed, 4)?;
    validate::within("row_bytes", params.row_bytes, 16, i32::MAX.into())?;
    validate::stride_bytes("row_bytes", params.row_bytes, 16)?;
    validate::stride_bytes("source_stride_bytes", params.source_stride_bytes, params.row_bytes)?;
    validate::stride_bytes("target_stride_bytes", params.target_stride_bytes, params.row_bytes)?;
    validate::size("max_rows", params.max_rows)?;
    validate::size("num_indexed_rows", params.num_indexed_rows)?;
    // The direction, and so the matrix that the indices point into, is an argument of the launch.
    let (rows, row_bytes) = (params.max_rows.max(params.num_indexed_rows), params.row_bytes);
    let region = |name, address, stride_bytes| validate::Region { name, address, rows, stride_bytes, row_bytes };
    region("source", params.source, params.source_stride_bytes).fits_address_space()?;
    region("target", params.target, params.target_stride_bytes).fits_address_space()
}

/// Returns the plan of a launch: a block of 256 threads per row.
pub fn plan(params: &dllm_gather_scatter_params, copy: Copy) -> Plan {
    let kernel = match copy {
        Copy::Gather => "gather_rows",
        Copy::Scatter => "scatter_rows",
    };
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 0 }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads.
///
/// When two indices of a scatter are equal, the target row holds elements of either row.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_gather_scatter_params`] gives, until the work is done.
/// 3. `target` overlaps no other memory of the struct.
pub unsafe fn launch_raw(
    device: &Device,
    stream: *mut c_void,
    params: &dllm_gather_scatter_params,
    copy: Copy,
) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "gather_scatter", plan(params, copy), params) }
}

/// Inputs and outputs of [`launch`]. Both matrices are packed, with rows of `width` elements.
pub struct GatherScatter<'a, T> {
    /// Row indices, `[max_rows]`; the length gives the maximum number of rows.
    pub index: &'a Buffer<i32>,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Number of elements of a row; a multiple of 16 bytes.
    pub width: usize,
    /// Gather: `[num_indexed_rows, width]`, which the indices point into. Scatter: `[max_rows, width]`.
    pub source: &'a Buffer<T>,
    /// Gather: `[max_rows, width]`. Scatter: `[num_indexed_rows, width]`, which the indices point into.
    pub target: &'a mut Buffer<T>,
    /// Flag `[1]`, set to -2 when an index is out of range. The row of such an index is not copied.
    pub failed: Option<&'a mut Buffer<i32>>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. When two indices of a scatter are equal, the target row holds elements of either row.
///
/// # Errors
/// [`crate::Error::Argument`] when a buffer is too short or belongs to another stream; the driver's.
pub fn launch<T: Pod>(stream: &Stream, rows: GatherScatter<T>, copy: Copy) -> Result<()> {
    let GatherScatter { index, count, width, source, target, failed } = rows;
    validate::within("width", width as i64, 1, i32::MAX.into())?;
    let (packed, indexed) = match copy {
        Copy::Gather => (&*target, source),
        Copy::Scatter => (source, &*target),
    };
    buffers::buffer(
        if copy == Copy::Gather { "target" } else { "source" },
        packed,
        buffers::elements(index.len(), width),
        stream,
    )?;
    let row_bytes = (width * size_of::<T>()) as i64;
    let params = dllm_gather_scatter_params {
        size: size_of::<dllm_gather_scatter_params>() as u64,
        source: buffers::buffer("source", source, 0, stream)?,
        target: buffers::buffer("target", target, 0, stream)?,
        index: buffers::buffer("index", index, 0, stream)?,
        count: buffers::optional("count", count, 1, stream)?,
        failed: buffers::optional("failed", failed.as_deref(), 1, stream)?,
        source_stride_bytes: row_bytes,
        target_stride_bytes: row_bytes,
        row_bytes,
        max_rows: buffers::count("index", index.len())?,
        num_indexed_rows: buffers::count("rows", indexed.len() / width)?,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel checks every index.
    unsafe { launch_raw(stream.device(), stream.raw(), &params, copy) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_gather_scatter_params {
        dllm_gather_scatter_params {
            size: size_of::<dllm_gather_scatter_params>() as u64,
            source: 0x1000,
            target: 0x2000,
            index: 0x3000,
            count: 0,
            failed: 0,
            source_stride_bytes: 64,
            target_stride_bytes: 48,
            row_bytes: 48,
            max_rows: 5,
            num_indexed_rows: 9,
        }
    }

    #[test]
    fn plans_a_block_for_each_row() {
        assert!(validate(&params()).is_ok());
        let want = Plan { kernel: "scatter_rows", grid: [5, 1, 1], block: 256, workspace_bytes: 0 };
        assert_eq!(plan(&params(), Copy::Scatter), want);
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_gather_scatter_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size -= 8, "size: expected 80");
        wrong(|p| p.source = 0, "source: expected a device address, found 0");
        wrong(|p| p.target += 8, "target: expected an address aligned to 16 bytes, found 0x2008");
        wrong(|p| p.index += 2, "index: expected an address aligned to 4");
        wrong(|p| p.count = 7, "count");
        wrong(|p| p.row_bytes = 40, "row_bytes: expected a multiple of 16");
        wrong(|p| p.row_bytes = 0, "row_bytes: expected 16 to");
        wrong(
            |p| p.source_stride_bytes = 32,
            "source_stride_bytes: expected a multiple of 16 bytes, at least 48, found 32",
        );
        wrong(|p| p.target_stride_bytes = 56, "target_stride_bytes");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.num_indexed_rows = -1, "num_indexed_rows");
        wrong(|p| p.source_stride_bytes = i64::MAX - 15, "source: expected rows within 64-bit addresses");
        wrong(|p| p.target_stride_bytes = i64::MAX - 15, "target: expected rows within 64-bit addresses");
    }
}
