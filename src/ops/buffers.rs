//! Helpers of the safe launches: addresses and row counts derived from [`Buffer`]s, with checks of length and stream.

use super::{Workspace, WorkspaceLayout};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Stream};
use bytemuck::Pod;

/// Converts a count to the integer type of the ABI.
pub fn count(name: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(name, format!("at most {}", i32::MAX), value))
}

/// Returns the number of elements of `rows` rows of `width` elements; saturates.
pub fn elements(rows: usize, width: usize) -> usize {
    rows.saturating_mul(width)
}

/// Checks that a buffer belongs to `stream` and holds at least `len` elements, and returns its address.
pub fn buffer<T: Pod>(name: &'static str, buffer: &Buffer<T>, len: usize, stream: &Stream) -> Result<u64> {
    if buffer.stream() != stream {
        return Err(Error::argument(name, "a buffer of the stream that the launch goes to", "one of another stream"));
    }
    if buffer.len() < len {
        return Err(Error::argument(name, format!("{len} elements"), buffer.len()));
    }
    Ok(buffer.address())
}

/// Returns the number of rows of `width` elements, `stride` apart, that fit into `len` elements.
pub fn num_rows(name: &'static str, len: usize, width: usize, stride: usize) -> Result<i32> {
    if width == 0 || stride < width {
        return Err(Error::argument("stride", format!("at least the width, {width}, which is at least 1"), stride));
    }
    len.checked_sub(width).map_or(Ok(0), |rest| count(name, rest / stride + 1))
}

/// Checks that a workspace belongs to `stream` and has the given layout, and returns its address and size in bytes.
pub fn workspace(workspace: &Workspace, layout: WorkspaceLayout, stream: &Stream) -> Result<(u64, u64)> {
    if workspace.layout != layout {
        let describe = |WorkspaceLayout(op, sizes): WorkspaceLayout| format!("one made for {op} of {sizes:?}");
        return Err(Error::argument("workspace", describe(layout), describe(workspace.layout)));
    }
    let address = buffer("workspace", &workspace.memory, 0, stream)?;
    Ok((address, workspace.memory.len() as u64))
}

/// As [`buffer`], for a buffer that may be absent; its address is then 0.
pub fn optional<T: Pod>(name: &'static str, given: Option<&Buffer<T>>, len: usize, stream: &Stream) -> Result<u64> {
    given.map_or(Ok(0), |given| buffer(name, given, len, stream))
}
