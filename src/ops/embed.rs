//! Embedding lookup for tokens in device memory, `out[i] = table[tokens[index[i]]]`: the kernel of `cuda/any/embed.cu`.
//!
//! Rows are copied as bytes, so any element type works.

use super::{Plan, buffers, validate};
use crate::abi::dllm_embed_params;
use crate::error::Result;
use crate::gpu::{Buffer, Device, Stream};
use bytemuck::Pod;
use std::ffi::c_void;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`crate::Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_embed_params) -> Result<()> {
    validate::struct_size::<dllm_embed_params>(params.size)?;
    validate::address("table", params.table, 16)?;
    validate::address("tokens", params.tokens, 4)?;
    validate::optional("index", params.index, 4)?;
    validate::address("out", params.out, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::optional("failed", params.failed, 4)?;
    validate::within("row_bytes", params.row_bytes, 16, i32::MAX.into())?;
    validate::stride_bytes("row_bytes", params.row_bytes, 16)?;
    validate::stride_bytes("table_stride_bytes", params.table_stride_bytes, params.row_bytes)?;
    validate::stride_bytes("out_stride_bytes", params.out_stride_bytes, params.row_bytes)?;
    validate::size("max_rows", params.max_rows)?;
    validate::size("num_tokens", params.num_tokens)?;
    validate::size("vocab_size", params.vocab_size)?;
    validate::reserved(params.reserved)?;
    let row_bytes = params.row_bytes;
    let region = |name, address, rows, stride_bytes| validate::Region { name, address, rows, stride_bytes, row_bytes };
    region("table", params.table, params.vocab_size, params.table_stride_bytes).fits_address_space()?;
    region("out", params.out, params.max_rows, params.out_stride_bytes).fits_address_space()
}

/// Returns the plan of a launch: a block of 256 threads per row.
pub fn plan(params: &dllm_embed_params) -> Plan {
    Plan { kernel: "embed", grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 0 }
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
/// 2. The addresses are of device memory of the sizes that [`dllm_embed_params`] gives, until the work is done.
/// 3. `out` overlaps no other memory of the struct.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_embed_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "embed", plan(params), params) }
}

/// Inputs and outputs of [`launch`]. Both matrices are packed, with rows of `width` elements.
pub struct Embed<'a, T> {
    /// Embedding table `[vocab_size, width]`.
    pub table: &'a Buffer<T>,
    /// Number of elements of a row; a multiple of 16 bytes.
    pub width: usize,
    /// Tokens, `[num_tokens]`.
    pub tokens: &'a Buffer<i32>,
    /// Indices into `tokens`, `[max_rows]`; `None`: all tokens in order.
    pub index: Option<&'a Buffer<i32>>,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Output `[max_rows, width]`.
    pub out: &'a mut Buffer<T>,
    /// Flag `[1]`, set to -2 when an index or token is out of range. The row of such an index is not written.
    pub failed: Option<&'a mut Buffer<i32>>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`].
///
/// # Errors
/// [`crate::Error::Argument`] when a buffer is too short or belongs to another stream; the driver's.
pub fn launch<T: Pod>(stream: &Stream, embed: Embed<T>) -> Result<()> {
    let Embed { table, width, tokens, index, count, out, failed } = embed;
    validate::within("width", width as i64, 1, i32::MAX.into())?;
    let max_rows = index.unwrap_or(tokens).len();
    let row_bytes = (width * size_of::<T>()) as i64;
    let params = dllm_embed_params {
        size: size_of::<dllm_embed_params>() as u64,
        table: buffers::buffer("table", table, width, stream)?,
        tokens: buffers::buffer("tokens", tokens, 1, stream)?,
        index: buffers::optional("index", index, 1, stream)?,
        out: buffers::buffer("out", out, buffers::elements(max_rows, width), stream)?,
        count: buffers::optional("count", count, 1, stream)?,
        failed: buffers::optional("failed", failed.as_deref(), 1, stream)?,
        table_stride_bytes: row_bytes,
        out_stride_bytes: row_bytes,
        row_bytes,
        max_rows: buffers::count("index", max_rows)?,
        num_tokens: buffers::count("tokens", tokens.len())?,
        vocab_size: buffers::count("table", table.len() / width)?,
        reserved: 0,
    };
    // SAFETY: addresses and sizes come from buffers of this stream, `out` is borrowed exclusively, and the kernel checks every
    // index and token.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_embed_params {
        dllm_embed_params {
            size: size_of::<dllm_embed_params>() as u64,
            table: 0x1000,
            tokens: 0x2000,
            index: 0,
            out: 0x3000,
            count: 0,
            failed: 0,
            table_stride_bytes: 64,
            out_stride_bytes: 48,
            row_bytes: 48,
            max_rows: 5,
            num_tokens: 7,
            vocab_size: 9,
            reserved: 0,
        }
    }

    #[test]
    fn plans_a_block_for_each_row() {
        assert!(validate(&params()).is_ok());
        assert_eq!(plan(&params()), Plan { kernel: "embed", grid: [5, 1, 1], block: 256, workspace_bytes: 0 });
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_embed_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size += 8, "size: expected 96");
        wrong(|p| p.table = 0, "table: expected a device address, found 0");
        wrong(|p| p.tokens = 0x2002, "tokens: expected an address aligned to 4 bytes, found 0x2002");
        wrong(|p| p.index = 1, "index: expected an address aligned to 4");
        wrong(|p| p.out = 8, "out: expected an address aligned to 16");
        wrong(|p| p.count = 2, "count");
        wrong(|p| p.failed = 2, "failed");
        wrong(|p| p.row_bytes = 0, "row_bytes: expected 16 to");
        wrong(|p| p.row_bytes = 40, "row_bytes: expected a multiple of 16");
        wrong(
            |p| p.table_stride_bytes = 32,
            "table_stride_bytes: expected a multiple of 16 bytes, at least 48, found 32",
        );
        wrong(|p| p.out_stride_bytes = 56, "out_stride_bytes");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.num_tokens = 0, "num_tokens");
        wrong(|p| p.vocab_size = -1, "vocab_size");
        wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
        wrong(|p| p.table_stride_bytes = i64::MAX - 15, "table: expected rows within 64-bit addresses");
        wrong(|p| p.out_stride_bytes = i64::MAX - 15, "out: expected rows within 64-bit addresses");
    }
}
