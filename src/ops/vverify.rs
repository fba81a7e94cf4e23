//! V-verify: which rows of V turned most since the previous step. The kernels of `cuda/any/vverify.cu`; dLLM-Cache,
//! section 3.3.

use super::{Element, Layout, Plan, Workspace, buffers, validate};
use crate::abi::{DLLM_BF16, DLLM_F16, dllm_vverify_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use std::ffi::c_void;

/// Checks every field but what the addresses point to.
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
    let place = |name, address, rows, stride| {
        validate::Region::new(name, address, rows, stride, params.width.into(), element_bytes)
    };
    let fresh_rows = match params.fresh_row {
        0 => params.max_rows,
        _ => params.num_fresh_rows,
    };
    validate::size("num_fresh_rows", fresh_rows)?;
    place("fresh", params.fresh, fresh_rows, params.fresh_stride).fits_address_space()?;
    place("cached", params.cached, params.num_cached_rows.max(1), params.cached_stride).fits_address_space()?;
    validate::size("num_sequences", params.num_sequences)?;
    validate::size("num_cached_rows", params.num_cached_rows)?;
    validate::within("num_listed", params.num_listed.into(), 0, i32::MAX.into())?;
    validate::flag("update_cached", params.update_cached)?;
    if !(0.0..=1.0).contains(&params.ratio) {
        return Err(Error::argument("ratio", "0 to 1", params.ratio));
    }
    validate::workspace(params.workspace, params.workspace_bytes, &plan(params))
}

/// What a launch takes: a block of 256 threads for each row, and in the workspace 8 bytes for each row, or for each
/// sequence where those are more.
pub fn plan(params: &dllm_vverify_params) -> Plan {
    let kernel = match params.dtype {
        1 => "vverify_f16",
        _ => "vverify_bf16",
    };
    let slots = params.max_rows.max(params.num_sequences).max(1);
    Plan { kernel, grid: [params.max_rows.max(1) as u32, 1, 1], block: 256, workspace_bytes: 8 * slots as u64 }
}

/// Launches on a caller's stream and returns. May be captured into a graph; may be called from several threads, with a
/// workspace each.
///
/// Nothing that `cu_rows`, `fresh_row`, `cached_row` and `first_selected` hold makes the kernel leave its memory, or the
/// workspace unfit for the next launch. Where `cu_rows` does not ascend from 0 to at most `max_rows`, the end of a sequence
/// counts as no less than its beginning and no more than `max_rows`. Where parts of the output lists overlap, either may be
/// what stays.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    is there until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_vverify_params`] gives, until the work is done.
/// 3. What the launch writes (`indices`, `selected`, `cu_selected`, `similarity`, `failed`, the workspace, and `cached` with
///    `update_cached`) overlaps no other memory of the struct, and nothing else uses it meanwhile.
/// 4. The workspace was zeroed before the first use, and only launches of this op have written to it since.
/// 5. With `update_cached`, no two rows have the same `cached_row`.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_vverify_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "vverify", plan(params), params) }
}

/// Numbers of rows, of which those of the selected ones are listed.
pub struct Table<'a> {
    /// `[max_rows]`
    pub values: &'a Buffer<i32>,
    /// Out, as long as `indices`: beside each row there its value.
    pub selected: &'a mut Buffer<i32>,
}

/// The rows that a safe launch compares. All matrices are packed: rows of `width` elements, one after the other.
pub struct VVerify<'a, T> {
    /// Elements of a row, all key/value heads; a multiple of 8.
    pub width: usize,
    /// Share of a sequence's rows to select, 0 to 1, rounded down to whole rows.
    pub ratio: f64,
    /// `[max_rows, width]`, with `fresh_row` `[any, width]`.
    pub fresh: &'a Buffer<T>,
    /// `[max_rows]`: where each row's values stand in `fresh`; the same, if not given. Its length, else that of `fresh`,
    /// gives the number of rows that the launch has room for.
    pub fresh_row: Option<&'a Buffer<i32>>,
    /// `[any, width]`: the rows of the previous step.
    pub cached: &'a mut Buffer<T>,
    /// `[max_rows]`: the cached row of each row; the same, if not given.
    pub cached_row: Option<&'a Buffer<i32>>,
    /// Whether the fresh rows are written over the cached ones, after the comparison.
    pub update_cached: bool,
    /// `[num_sequences + 1]`: sequence s owns the rows `cu_rows[s]..cu_rows[s + 1]`. Its length gives the number of
    /// sequences.
    pub cu_rows: &'a Buffer<i32>,
    /// Out, `[max_rows]`, with `first_selected` of any length: the selected rows, each sequence's together and ascending;
    /// all else is left as it is.
    pub indices: &'a mut Buffer<i32>,
    /// What is listed beside `indices`.
    pub tables: [Option<Table<'a>>; 3],
    /// `[num_sequences]`: where each sequence's part of `indices` begins; one after the other, if not given.
    pub first_selected: Option<&'a Buffer<i32>>,
    /// Out, `[num_sequences + 1]`: how many are selected before each sequence, and in all.
    pub cu_selected: &'a mut Buffer<i32>,
    /// Out, `[max_rows]`: the cosines; minus infinity where there is none. Rows without a sequence are left as they are.
    pub similarity: Option<&'a mut Buffer<f32>>,
    /// `[1]`: set to -2 when a `fresh_row` or `cached_row` was out of range, whose row counts as turned most, or a
    /// selected row found no place in `indices`.
    pub failed: Option<&'a mut Buffer<i32>>,
    /// From [`workspace`], with room for these rows.
    pub workspace: &'a mut Workspace,
}

/// Counters have the same places whatever the shape.
const LAYOUT: Layout = Layout("vverify", [0; 3]);

/// A workspace for launches with room for so many rows and sequences, or fewer. It is for this op only.
pub fn workspace(stream: &Stream, max_rows: usize, num_sequences: usize) -> Result<Workspace> {
    let slots = buffers::count("max_rows", max_rows.max(num_sequences))?;
    Workspace::new(stream, &plan(&dllm_vverify_params { max_rows: slots, ..Default::default() }), LAYOUT)
}

/// Launches on our buffers, and returns. When two rows with `update_cached` have the same cached row, either may be what
/// stays, and what the other is compared with.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or the ratio is not one; the driver's.
pub fn launch<T: Element>(stream: &Stream, rows: VVerify<T>) -> Result<()> {
    let VVerify { width, ratio, fresh, fresh_row, cached, cached_row, update_cached, first_selected, .. } = rows;
    validate::within("width", width as i64, 1, i32::MAX.into())?;
    let num_fresh_rows = fresh.len() / width;
    let max_rows = fresh_row.map_or(num_fresh_rows, Buffer::len);
    let listed = first_selected.map_or(max_rows, |_| rows.indices.len().max(1));
    let (mut tables, mut selected) = ([0; 3], [0; 3]);
    for (k, table) in rows.tables.iter().enumerate() {
        let (values, listed_values) = (table.as_ref().map(|t| t.values), table.as_ref().map(|t| &*t.selected));
        tables[k] = buffers::optional("tables.values", values, max_rows, stream)?;
        selected[k] = buffers::optional("tables.selected", listed_values, listed, stream)?;
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
    // SAFETY: addresses and sizes come from buffers of this stream, each borrowed as it is used; the kernel checks every
    // index. With a workspace of another op or two equal cached rows the results are wrong, and still in their memory.
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
        let most = dllm_vverify_params { max_rows: i32::MAX, ..params() };
        assert_eq!(plan(&most).workspace_bytes, 8 * (i32::MAX as u64));
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
