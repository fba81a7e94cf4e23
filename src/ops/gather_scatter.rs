//! Gather and scatter of rows by an index list on the device: the kernels of `cuda/any/gather_scatter.cu`.

use super::{Plan, buffers, validate};
use crate::abi::dllm_gather_scatter_params;
use crate::error::Result;
use crate::gpu::{Buffer, Device, Stream};
use bytemuck::Pod;
use std::ffi::c_void;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// `target[i] = source[index[i]]`
    Gather,
    /// `target[index[i]] = source[i]`
    Scatter,
}

/// Checks every field but what the addresses point to.
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
    // Which of the two matrices the indices point into, only the launch knows.
    let (rows, row_bytes) = (params.max_rows.max(params.num_indexed_rows), params.row_bytes);
    let place = |name, address, stride_bytes| validate::Region { name, address, rows, stride_bytes, row_bytes };
    place("source", params.source, params.source_stride_bytes).fits_address_space()?;
    place("target", params.target, params.target_stride_bytes).fits_address_space()
}

/// What a launch takes: a block of 256 threads for each row.
pub fn plan(params: &dllm_gather_scatter_params, copy: Copy) -> Plan {
    let kernel = match copy {
        Copy::Gather => "gather_rows",
        Copy::Scatter => "scatter_rows",
    };
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 0 }
}

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
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

/// The rows that a safe launch copies. All matrices are packed: rows of `width` elements, one after the other.
pub struct GatherScatter<'a, T> {
    /// `[max_rows]`: its length is the number of rows that the launch has room for.
    pub index: &'a Buffer<i32>,
    /// `[1]`: how many of them there are; all, if not given.
    pub count: Option<&'a Buffer<i32>>,
    /// Elements of a row; a multiple of 16 bytes.
    pub width: usize,
    /// Gather: `[any, width]`, which the indices point into. Scatter: `[max_rows, width]`.
    pub source: &'a Buffer<T>,
    /// Gather: `[max_rows, width]`. Scatter: `[any, width]`, which the indices point into.
    pub target: &'a mut Buffer<T>,
    /// `[1]`: set to -2 when an index was out of range and its row left out.
    pub failed: Option<&'a mut Buffer<i32>>,
}

/// Launches on our buffers, and returns. When two indices of a scatter are equal, either row may be what stays.
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
