//! V-verify: selection of the rows whose value vectors changed most since the previous step. The kernels of
//! `cuda/any/vverify.cu`; dLLM-Cache (Liu et al., arXiv:2506.06295), section 3.3.
//!
//! The change of a row is measured by the cosine similarity of its fresh and its cached value vector. Of the n rows of a sequence,
//! the `floor(n * ratio)` rows with the lowest similarity are selected, and listed in ascending order. Ties go to the first row; a
//! similarity that is NaN counts as the lowest. Element types: bf16, f16, with sums in f32; elements must be below 1e19.

use super::{Element, Plan, Workspace, WorkspaceLayout, buffers, validate};
use crate::abi::{DLLM_BF16, DLLM_F16, dllm_vverify_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_vverify_params) -> Result<()> {
    validate::struct_size::<dllm_vverify_params>(params.size)?;
    let element_bytes = validate::dtype(params.dtype, &[DLLM_BF16, DLLM_F16])?;
    validate::address("fresh", params.fresh, 16)?;
    validate::optional("fresh_row", params.fresh_row, 4)?;
    validate::address("cached", params.cached, 16)?;
    validate::optional("cached_row", params.cached_row, 4)?;
    validate::address("cu_rows", params.cu_rows, 4)?;
    validate::address("indices", params.indices, 4)?;
    for (name, table, selected) in [
        ("selected[0]", params.tables[0], params.selected[0]),
        ("selected[1]", params.tables[1], params.selected[1]),
        ("selected[2]", params.tables[2], params.selected[2]),
    ] {
        validate::optional("tables", table, 4)?;
        match table {
            0 if selected != 0 => return Err(Error::argument(name, "0, as there is no such table", selected)),
            0 => {}
            _ => validate::address(name, selected, 4)?,
        }
    }
    validate::optional("first_selected", params.first_selected, 4)?;
    validate::address("cu_selected", params.cu_selected, 4)?;
    validate::optional("similarity", params.similarity, 4)?;
    validate::optional("failed", params.failed, 4)?;
    validate::width("width", params.width, element_bytes)?;
    validate::stride("fresh_stride", params.fresh_stride, params.width.into(), element_bytes)?;
    validate::stride("cached_stride", params.cached_stride, params.width.into(), element_bytes)?;
    validate::size("max_rows", params.max_rows)?;
    let region = |name, address, rows, stride| {
        validate::Region::new(name, address, rows, stride, params.width.into(), element_bytes)
    };
    let fresh_rows = if params.fresh_row == 0 { params.max_rows } else { params.num_fresh_rows };
    validate::size("num_fresh_rows", fresh_rows)?;
    region("fresh", params.fresh, fresh_rows, params.fresh_stride).fits_address_space()?;
    region("cached", params.cached, params.num_cached_rows.max(1), params.cached_stride).fits_address_space()?;
    validate::size("num_sequences", params.num_sequences)?;
    validate::size("num_cached_rows", params.num_cached_rows)?;
    validate::within("num_listed", params.num_listed.into(), 0, i32::MAX.into())?;
    validate::flag("update_cached", params.update_cached)?;
    if !(0.0..=1.0).contains(&params.ratio) {
        return Err(Error::argument("ratio", "0 to 1", params.ratio));
    }
    validate::workspace(params.workspace, params.workspace_bytes, &plan(params))
}

/// Returns the plan of a launch: a block of 256 threads per row, and 8 bytes of workspace per row or sequence, whichever are
/// more.
pub fn plan(params: &dllm_vverify_params) -> Plan {
    let kernel = match params.dtype {
        1 => "vverify_f16",
        _ => "vverify_bf16",
    };
    let slots = params.max_rows.max(params.num_sequences).max(1);
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 8 * slots as u64 }
}

/// Enqueues the kernel on `stream`. Allocates nothing, does not synchronise, and may be captured in a graph. May be called from
/// several threads; each launch in flight needs a workspace of its own.
///
/// No contents of `cu_rows`, `fresh_row`, `cached_row` and `first_selected` lead to invalid memory accesses or make the
/// workspace unusable for the next launch. In `cu_rows`, the end of a sequence is clamped to between its begin and
/// `max_rows`. Where parts of the output lists overlap, they hold elements of either part.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_vverify_params`] gives, until the work is done.
/// 3. Memory that the launch writes (`indices`, `selected`, `cu_selected`, `similarity`, `failed`, the workspace, and `cached` with
///    `update_cached`) overlaps no other memory of the struct, and nothing else uses it until the work is done.
/// 4. The workspace was zeroed before the first use, and only launches of this op have written to it since.
/// 5. With `update_cached`, no two rows have the same `cached_row`.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_vverify_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "vverify", plan(params), params) }
}

/// Integers per row, from which those of the selected rows are gathered.
pub struct Table<'a> {
    /// Value of each row, `[max_rows]`.
    pub values: &'a Buffer<i32>,
    /// Output, of the length of `indices`: `selected[j] = values[indices[j]]`.
    pub selected: &'a mut Buffer<i32>,
}

/// Inputs and outputs of [`launch`]. Both matrices are packed, with rows of `width` elements.
pub struct VVerify<'a, T> {
    /// Number of elements of a row, of all key/value heads; a multiple of 8.
    pub width: usize,
    /// Share rho of each sequence's rows to select, 0 to 1. The number of rows is rounded down.
    pub ratio: f64,
    /// Values of this step, `[max_rows, width]`; with `fresh_row` `[num_fresh_rows, width]`.
    pub fresh: &'a Buffer<T>,
    /// Row of `fresh` that holds each row's values, `[max_rows]`; `None`: row i. Its length, or else the number of rows of `fresh`,
    /// gives the maximum number of rows.
    pub fresh_row: Option<&'a Buffer<i32>>,
    /// Values of the previous step, `[num_cached_rows, width]`; written with `update_cached`.
    pub cached: &'a mut Buffer<T>,
    /// Row of `cached` that holds each row's previous values, `[max_rows]`; `None`: row i.
    pub cached_row: Option<&'a Buffer<i32>>,
    /// Whether the fresh rows replace the cached ones after the comparison.
    pub update_cached: bool,
    /// Sequence s has the rows `cu_rows[s]..cu_rows[s + 1]`; `[num_sequences + 1]`, ascending from 0. The length gives the number
    /// of sequences.
    pub cu_rows: &'a Buffer<i32>,
    /// Output: selected rows, ascending within each sequence, `[max_rows]`; with `first_selected` of any length. Other elements
    /// are not written.
    pub indices: &'a mut Buffer<i32>,
    /// Tables whose values are gathered for the selected rows.
    pub tables: [Option<Table<'a>>; 3],
    /// Begin of each sequence's part of `indices`, `[num_sequences]`; `None`: parts are contiguous.
    pub first_selected: Option<&'a Buffer<i32>>,
    /// Output: number of selected rows before each sequence, and in total, `[num_sequences + 1]`.
    pub cu_selected: &'a mut Buffer<i32>,
    /// Output: cosine similarity of each row, `[max_rows]`; minus infinity instead of NaN. Rows outside of all sequences are not
    /// written.
    pub similarity: Option<&'a mut Buffer<f32>>,
    /// Flag `[1]`, set to -2 when a `fresh_row` or `cached_row` is out of range, or when a selected row does not fit into
    /// `indices`. A row with an index out of range counts as changed most.
    pub failed: Option<&'a mut Buffer<i32>>,
    /// Workspace of [`workspace`], for at least these numbers of rows and sequences.
    pub workspace: &'a mut Workspace,
}

/// Layout of the workspace, which does not depend on the shape.
const LAYOUT: WorkspaceLayout = WorkspaceLayout("vverify", [0; 3]);

/// Allocates a workspace for launches of this op with at most `max_rows` rows and `num_sequences` sequences.
///
/// # Errors
/// [`Error::Argument`] when a size does not fit into 32 bits; as [`Stream::alloc`].
pub fn workspace(stream: &Stream, max_rows: usize, num_sequences: usize) -> Result<Workspace> {
    let slots = buffers::count("max_rows", max_rows.max(num_sequences))?;
    Workspace::new(stream, &plan(&dllm_vverify_params { max_rows: slots, ..Default::default() }), LAYOUT)
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. When two rows have the same
/// cached row with `update_cached`, it holds elements of either, and the other may be compared with the new elements.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or `ratio` is not within 0 to 1; the driver's.
pub fn launch<T: Element>(stream: &Stream, rows: VVerify<T>) -> Result<()> {
    let VVerify { width, ratio, fresh, fresh_row, cached, cached_row, update_cached, first_selected, .. } = rows;
    validate::within("width", width as i64, 1, i32::MAX.into())?;
    let num_fresh_rows = fresh.len() / width;
    let max_rows = fresh_row.map_or(num_fresh_rows, Buffer::len);
    let listed = first_selected.map_or(max_rows, |_| rows.indices.len().max(1));
    let (mut tables, mut selected) = ([0; 3], [0; 3]);
    for (k, table) in rows.tables.iter().enumerate() {
        let (values, selected_values) = (table.as_ref().map(|t| t.values), table.as_ref().map(|t| &*t.selected));
        tables[k] = buffers::optional("tables.values", values, max_rows, stream)?;
        selected[k] = buffers::optional("tables.selected", selected_values, listed, stream)?;
    }
    let (workspace, workspace_bytes) = buffers::workspace(rows.workspace, LAYOUT, stream)?;
    let params = dllm_vverify_params {
        size: size_of::<dllm_vverify_params>() as u64,
        fresh: buffers::buffer("fresh", fresh, width, stream)?,
        fresh_row: buffers::optional("fresh_row", fresh_row, 1, stream)?,
        cached: buffers::buffer("cached", cached, width, stream)?,
        cached_row: buffers::optional("cached_row", cached_row, max_rows, stream)?,
        cu_rows: buffers::buffer("cu_rows", rows.cu_rows, 2, stream)?,
        indices: buffers::buffer("indices", rows.indices, listed, stream)?,
        tables,
        selected,
        first_selected: buffers::optional(
            "first_selected",
            first_selected,
            rows.cu_rows.len().saturating_sub(1),
            stream,
        )?,
        cu_selected: buffers::buffer("cu_selected", rows.cu_selected, rows.cu_rows.len(), stream)?,
        similarity: buffers::optional("similarity", rows.similarity.as_deref(), max_rows, stream)?,
        failed: buffers::optional("failed", rows.failed.as_deref(), 1, stream)?,
        workspace,
        workspace_bytes,
        fresh_stride: width as i64,
        cached_stride: width as i64,
        ratio,
        max_rows: buffers::count(if fresh_row.is_some() { "fresh_row" } else { "fresh" }, max_rows)?,
        num_sequences: buffers::count("cu_rows", rows.cu_rows.len() - 1)?,
        num_fresh_rows: buffers::count("fresh", num_fresh_rows)?,
        num_cached_rows: buffers::count("cached", cached.len() / width)?,
        num_listed: buffers::count("indices", listed)?,
        width: width as i32,
        dtype: T::DTYPE as i32,
        update_cached: update_cached.into(),
    };
    // SAFETY: addresses and sizes come from buffers of this stream, and outputs are borrowed exclusively; the kernel checks
    // every index. The workspace has this op's layout. Two equal cached rows only mix their elements.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_vverify_params {
        dllm_vverify_params {
            size: size_of::<dllm_vverify_params>() as u64,
            fresh: 0x1000,
            fresh_row: 0,
            cached: 0x2000,
            cached_row: 0,
            cu_rows: 0x3000,
            indices: 0x4000,
            tables: [0, 0x7000, 0],
            selected: [0, 0x8000, 0],
            first_selected: 0,
            cu_selected: 0x5000,
            similarity: 0,
            failed: 0,
            workspace: 0x6000,
            workspace_bytes: 40,
            fresh_stride: 32,
            cached_stride: 24,
            ratio: 0.25,
            max_rows: 5,
            num_sequences: 3,
            num_fresh_rows: 0,
            num_cached_rows: 9,
            num_listed: 0,
            width: 24,
            dtype: 0,
            update_cached: 1,
        }
    }

    #[test]
    fn plans_a_block_for_each_row_and_a_slot_for_each_row_or_sequence() {
        assert!(validate(&params()).is_ok());
        let want = Plan { kernel: "vverify_bf16", grid: [5, 1, 1], block: 256, workspace_bytes: 40 };
        assert_eq!(plan(&params()), want);
        let sequences = dllm_vverify_params { num_sequences: 7, dtype: 1, ..params() };
        assert_eq!(plan(&sequences), Plan { kernel: "vverify_f16", workspace_bytes: 56, ..want });
        let largest = dllm_vverify_params { max_rows: i32::MAX, ..params() };
        assert_eq!(plan(&largest).workspace_bytes, 8 * (i32::MAX as u64));
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_vverify_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size += 8, "size: expected 208");
        wrong(|p| p.dtype = 2, "dtype: expected bf16 (0) or f16 (1), found 2");
        wrong(|p| p.fresh = 0, "fresh: expected a device address");
        wrong(|p| p.cached += 8, "cached: expected an address aligned to 16");
        wrong(|p| p.fresh_row = 2, "fresh_row: expected an address aligned to 4");
        wrong(|p| p.fresh_row = 4, "num_fresh_rows: expected 1 to");
        wrong(|p| p.cached_row = 2, "cached_row: expected an address aligned to 4");
        wrong(|p| p.cu_rows = 0, "cu_rows");
        wrong(|p| p.indices = 0, "indices");
        wrong(|p| p.tables[1] += 2, "tables: expected an address aligned to 4");
        wrong(|p| p.selected[1] = 0, "selected[1]: expected a device address");
        wrong(|p| p.tables[1] = 0, "selected[1]: expected 0, as there is no such table");
        wrong(|p| p.first_selected = 2, "first_selected: expected an address aligned to 4");
        wrong(|p| p.num_listed = -1, "num_listed: expected 0 to");
        wrong(|p| p.cu_selected += 1, "cu_selected");
        wrong(|p| p.similarity = 2, "similarity");
        wrong(|p| p.failed = 2, "failed");
        wrong(|p| p.width = 20, "width: expected a multiple of 8");
        wrong(|p| p.width = 0, "width");
        wrong(
            |p| p.fresh_stride = 28,
            "fresh_stride: expected a multiple of 8 elements (16 bytes), at least the width, 24",
        );
        wrong(|p| p.cached_stride = 16, "cached_stride");
        wrong(|p| p.max_rows = 0, "max_rows");
        wrong(|p| p.num_sequences = 0, "num_sequences");
        wrong(|p| p.num_cached_rows = -1, "num_cached_rows");
        wrong(|p| p.update_cached = 2, "update_cached: expected 0 to 1");
        wrong(|p| p.ratio = f64::NAN, "ratio: expected 0 to 1, found NaN");
        wrong(|p| p.ratio = 1.5, "ratio");
        wrong(|p| p.workspace = 0, "workspace: expected a device address");
        wrong(|p| p.workspace += 8, "workspace: expected an address aligned to 16");
        wrong(|p| p.workspace_bytes = 39, "workspace_bytes: expected at least 40, found 39");
    }
}
