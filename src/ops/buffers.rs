//! Helpers of the safe launches: addresses and row counts derived from [`Buffer`]s, with checks of length and stream.

use super::{Layout, Workspace};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Stream};
use bytemuck::Pod;

/// A count as the ABI has it.
pub fn count(name: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(name, format!("at most {}", i32::MAX), value))
}

/// Elements of `rows` rows of `width`; what no buffer can hold counts as the most that there can be.
pub fn elements(rows: usize, width: usize) -> usize {
    rows.saturating_mul(width)
}

/// A buffer with room for `len` elements, on this stream; its address.
pub fn buffer<T: Pod>(name: &'static str, buffer: &Buffer<T>, len: usize, stream: &Stream) -> Result<u64> {
    if buffer.stream() != stream {
        return Err(Error::argument(name, "a buffer of the stream that the launch goes to", "one of another stream"));
    }
    match buffer.len() >= len {
        true => Ok(buffer.address()),
        false => Err(Error::argument(name, format!("{len} elements"), buffer.len())),
    }
}

/// Whole rows of `width` elements, `stride` apart, among `len` elements.
pub fn num_rows(name: &'static str, len: usize, width: usize, stride: usize) -> Result<i32> {
    if width == 0 || stride < width {
        return Err(Error::argument("stride", format!("at least the width, {width}, which is at least 1"), stride));
    }
    len.checked_sub(width).map_or(Ok(0), |rest| count(name, rest / stride + 1))
}

/// A workspace of this stream and layout; its address and bytes.
pub fn workspace(workspace: &Workspace, layout: Layout, stream: &Stream) -> Result<(u64, u64)> {
    if workspace.layout != layout {
        let made = |Layout(op, sizes): Layout| format!("one made for {op} of {sizes:?}");
        return Err(Error::argument("workspace", made(layout), made(workspace.layout)));
    }
    let address = buffer("workspace", &workspace.memory, 0, stream)?;
    Ok((address, workspace.memory.len() as u64))
}

/// The same for one that may be missing.
pub fn optional<T: Pod>(name: &'static str, given: Option<&Buffer<T>>, len: usize, stream: &Stream) -> Result<u64> {
    given.map_or(Ok(0), |given| buffer(name, given, len, stream))
}
