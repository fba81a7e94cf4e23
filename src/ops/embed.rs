//! The embedding rows of tokens that lie on the device: the kernel of `cuda/any/embed.cu`.

use super::{Plan, buffers, validate};
use crate::abi::dllm_embed_params;
use crate::error::Result;
use crate::gpu::{Buffer, Device, Stream};
use bytemuck::Pod;
use std::ffi::c_void;

/// Checks every field but what the addresses point to.
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
    let place = |name, address, rows, stride_bytes| validate::Region { name, address, rows, stride_bytes, row_bytes };
    place("table", params.table, params.vocab_size, params.table_stride_bytes).fits_address_space()?;
    place("out", params.out, params.max_rows, params.out_stride_bytes).fits_address_space()
}

/// What a launch takes: a block of 256 threads for each row.
pub fn plan(params: &dllm_embed_params) -> Plan {
    Plan { kernel: "embed", grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 0 }
}

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_embed_params`] gives, until the work is done.
/// 3. `out` overlaps no other memory of the struct.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_embed_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "embed", plan(params), params) }
}

/// The rows that a safe launch embeds. Both matrices are packed: rows of `width` elements, one after the other.
pub struct Embed<'a, T> {
    /// `[vocab_size, width]`
    pub table: &'a Buffer<T>,
    /// Elements of a row; a multiple of 16 bytes.
    pub width: usize,
    /// `[any]`
    pub tokens: &'a Buffer<i32>,
    /// `[max_rows]`, which point into `tokens`. If not given: every token, in order.
    pub index: Option<&'a Buffer<i32>>,
    /// `[1]`: how many of them there are; all, if not given.
    pub count: Option<&'a Buffer<i32>>,
    /// `[max_rows, width]`
    pub out: &'a mut Buffer<T>,
    /// `[1]`: set to -2 when an index or a token was out of range and its row left out.
    pub failed: Option<&'a mut Buffer<i32>>,
}

/// Launches on our buffers, and returns.
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
    // SAFETY: addresses and sizes come from buffers of this stream, `out` is borrowed alone, and the kernel checks every
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
