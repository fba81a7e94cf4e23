//! Bidirectional attention over keys in up to three segments: the kernels of `cuda/sm80/attention.cu`.
//!
//! Computes `out = softmax(scale q k^T) v` for ragged batches. The keys of a sequence are those of segment 0, then 1, then 2:
//! prefix cache, live block, suffix cache. Segments are read in place; nothing is concatenated.
//!
//! - Element types: bf16 and f16, accumulated in f32. `head_dim` is 32, 64 or 128.
//! - Grouped-query attention: the heads of a group are packed into one tile. A *packed row* is a query row times a head of the
//!   group.
//! - Split-KV: with `max_splits` above 1 the keys are split, and a second kernel combines the partial results in a fixed order.
//! - Block sparsity: lists of key tiles per query tile; [`tiles`](super::tiles) builds them.
//!
//! [`launch_raw`] takes [`dllm_attention_params`]; [`launch`] takes [`Attention`]. Schedule: FlashAttention-2 (Dao,
//! arXiv:2307.08691). Segments: the caches of Fast-dLLM (Wu et al., arXiv:2505.22618), section 3.2.

use super::validate::{self, Region};
use super::{Element, buffers};
use crate::abi::{self, dllm_attention_params, dllm_segment};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Launch, Stream};
pub use crate::tensor::Heads;
use std::ffi::c_void;

/// Number of keys per key tile; `DLLM_KEY_TILE`.
pub const KEY_TILE: usize = abi::DLLM_KEY_TILE as usize;
/// Number of query rows per query tile, which share a list of key tiles; `DLLM_QUERY_TILE`.
pub const QUERY_TILE: usize = abi::DLLM_QUERY_TILE as usize;
/// Packed rows up to which a sequence counts as short: two blocks of the full form, eight of the streaming form.
const SHORT: i64 = 256;

/// Block size of a launch. Both forms give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Form {
    /// Blocks of two warps, several per multiprocessor: for few rows and many keys.
    Streaming,
    /// Blocks of eight warps: for many rows.
    Full,
}

/// Kernel, launch configuration and workspace size of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: u32,
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Bytes of workspace, which may hold anything; 0 without splits.
    pub workspace_bytes: u64,
    /// Name and number of blocks of the kernel that combines the splits, with 256 threads per block; `None` without splits.
    pub combine: Option<(&'static str, u32)>,
}

/// Returns the number of KV splits for sequences of `rows` query rows, 1 to 64.
///
/// Short sequences (at most 256 packed rows) are split so that one sequence fills a device with the given number of
/// multiprocessors of an H100. Longer ones are not split.
///
/// The number of splits affects rounding. For batch-invariant results pass `rows` that do not depend on the batch, for example
/// the block length instead of the length of the longest sequence.
pub fn splits(rows: usize, heads: Heads, multiprocessors: usize) -> usize {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let packed = rows.saturating_mul(num_heads / num_kv_heads.max(1));
    if packed > SHORT as usize {
        return 1;
    }
    let blocks = packed.div_ceil(32).max(1).saturating_mul(num_kv_heads).max(1);
    let blocks_per_multiprocessor = match head_dim {
        ..=32 => 10,
        33..=64 => 6,
        _ => 3,
    };
    multiprocessors.saturating_mul(blocks_per_multiprocessor).div_ceil(blocks).clamp(1, 64)
}

/// Checks all fields, including overlaps, without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_attention_params) -> Result<()> {
    validate::struct_size::<dllm_attention_params>(params.size)?;
    validate::address("q", params.q, 16)?;
    validate::address("out", params.out, 16)?;
    validate::optional("lse", params.lse, 4)?;
    validate::address("cu_rows", params.cu_rows, 4)?;
    let bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16])?;
    if ![32, 64, 128].contains(&params.head_dim) {
        return Err(Error::argument("head_dim", "32, 64 or 128", params.head_dim));
    }
    // A launch has at most 65,535 blocks in its second dimension.
    validate::within("num_heads", params.num_heads.into(), 1, 65_535)?;
    validate::within("num_kv_heads", params.num_kv_heads.into(), 1, params.num_heads.into())?;
    if params.num_heads % params.num_kv_heads != 0 {
        let expected = format!("a multiple of num_kv_heads, {}", params.num_kv_heads);
        return Err(Error::argument("num_heads", expected, params.num_heads));
    }
    let width = i64::from(params.num_heads) * i64::from(params.head_dim);
    let kv_width = i64::from(params.num_kv_heads) * i64::from(params.head_dim);
    validate::stride("q_stride", params.q_stride, width, bytes)?;
    validate::stride("out_stride", params.out_stride, width, bytes)?;
    for segment in &params.segments {
        if segment.k == 0 {
            continue;
        }
        validate::address("segment.k", segment.k, 16)?;
        validate::address("segment.v", segment.v, 16)?;
        validate::optional("segment.start", segment.start, 4)?;
        validate::address("segment.len", segment.len, 4)?;
        validate::stride("segment.k_stride", segment.k_stride, kv_width, bytes)?;
        validate::stride("segment.v_stride", segment.v_stride, kv_width, bytes)?;
        validate::within("segment.num_rows", segment.num_rows.into(), 0, i32::MAX.into())?;
        validate::reserved(segment.reserved0)?;
        validate::within("reserved", segment.reserved1, 0, 0)?;
    }
    if !(-1e6..=1e6).contains(&params.scale) {
        return Err(Error::argument("scale", "a number from -1e6 to 1e6", params.scale));
    }
    validate::within("max_rows", params.max_rows.into(), 1, i64::from(i32::MAX - 8) / i64::from(params.num_heads))?;
    // Above, the number of a packed row could overflow.
    let max_sequence_rows = (1 << 30) / i64::from(params.num_heads);
    validate::within("max_sequence_rows", params.max_sequence_rows.into(), 1, max_sequence_rows)?;
    validate::within("max_splits", params.max_splits.into(), 1, 64)?;
    validate::within("num_sequences", params.num_sequences.into(), 1, 65_535 / i64::from(params.max_splits))?;
    validate::optional("tile_offsets", params.tile_offsets, 4)?;
    if params.tile_offsets != 0 {
        validate::address("tile_indices", params.tile_indices, 4)?;
        let tiles = i64::from(params.max_sequence_rows.unsigned_abs().div_ceil(QUERY_TILE as u32));
        validate::within("query_tiles", params.query_tiles.into(), tiles, i32::MAX.into())?;
        validate::flag("per_head", params.per_head)?;
        // Above, products of a list's length and the split count could overflow.
        validate::within("num_tile_indices", params.num_tile_indices.into(), 0, 1 << 30)?;
    }
    validate::within("form", params.form.into(), 0, abi::DLLM_ATTENTION_FORM_FULL.into())?;
    validate::reserved(params.reserved)?;
    let needed = plan(params).workspace_bytes;
    if needed > 0 {
        validate::address("workspace", params.workspace, 16)?;
        if params.workspace_bytes < needed {
            return Err(Error::argument("workspace_bytes", format!("at least {needed}"), params.workspace_bytes));
        }
    }
    check_disjoint(params, bytes, needed)
}

/// Checks that all rows are within 64-bit addresses, and that no output overlaps another output or an input matrix.
fn check_disjoint(params: &dllm_attention_params, bytes: i64, workspace_bytes: u64) -> Result<()> {
    let heads = i64::from(params.num_heads);
    let width = heads * i64::from(params.head_dim);
    let kv_width = i64::from(params.num_kv_heads) * i64::from(params.head_dim);
    let rows = params.max_rows;
    let workspace_bytes = i64::try_from(workspace_bytes).unwrap_or(i64::MAX);
    let written = [
        Region::new("out", params.out, rows, params.out_stride, width, bytes),
        Region::new("lse", params.lse, rows, heads, heads, 4),
        Region::new("workspace", params.workspace, i32::from(workspace_bytes > 0), workspace_bytes, workspace_bytes, 1),
    ];
    let q = Region::new("q", params.q, rows, params.q_stride, width, bytes);
    let segment_regions = |s: &dllm_segment| {
        [
            Region::new("segment.k", s.k, s.num_rows, s.k_stride, kv_width, bytes),
            Region::new("segment.v", if s.k == 0 { 0 } else { s.v }, s.num_rows, s.v_stride, kv_width, bytes),
        ]
    };
    let read = std::iter::once(q).chain(params.segments.iter().flat_map(segment_regions));
    let is_present = |region: &Region| region.address != 0 && region.rows > 0;
    let regions: Vec<Region> = written.into_iter().chain(read).collect();
    for region in regions.iter().filter(|r| is_present(r)) {
        region.fits_address_space()?;
    }
    for (i, region) in written.iter().enumerate().filter(|(_, r)| is_present(r)) {
        for other in regions[i + 1..].iter().filter(|r| is_present(r)) {
            region.disjoint_from(*other)?;
        }
    }
    Ok(())
}

/// Returns the plan of a launch; the values of invalid parameters are clamped. With `DLLM_ATTENTION_FORM_PLANNED` the form is
/// streaming when the longest sequence has at most 256 packed rows (query rows times heads of a group), and full otherwise.
pub fn plan(params: &dllm_attention_params) -> Plan {
    let group = i64::from(params.num_heads.max(1) / params.num_kv_heads.max(1)).max(1);
    let packed = i64::from(params.max_sequence_rows.max(1)) * group;
    let form = match params.form as abi::dllm_attention_form {
        abi::DLLM_ATTENTION_FORM_STREAMING => Form::Streaming,
        abi::DLLM_ATTENTION_FORM_FULL => Form::Full,
        _ if packed <= SHORT => Form::Streaming,
        _ => Form::Full,
    };
    let (warps, kernels) = match form {
        Form::Streaming => (2, &STREAMING_KERNELS),
        Form::Full => (8, &FULL_KERNELS),
    };
    let dtype_index = usize::from(params.dtype as u32 != abi::DLLM_BF16);
    let kernel = kernels[dtype_index][match params.head_dim {
        32 => 0,
        64 => 1,
        _ => 2,
    }];
    let (sequences, splits) = (params.num_sequences.max(1) as u32, params.max_splits.max(1) as u32);
    let row_heads = params.max_rows.max(1) as u64 * params.num_heads.max(1) as u64;
    let partial = u64::from(splits) * row_heads;
    let workspace_bytes = (partial.next_multiple_of(4) + partial * params.head_dim.max(1) as u64) * 4;
    Plan {
        kernel,
        grid: [
            (packed as u64).div_ceil(u64::from(warps) * 16) as u32,
            params.num_kv_heads.max(1) as u32,
            sequences * splits,
        ],
        block: warps * 32,
        shared_bytes: (4 * KEY_TILE * 2) as u32 * params.head_dim.max(1) as u32,
        workspace_bytes: if splits > 1 { workspace_bytes } else { 0 },
        combine: (splits > 1).then(|| (COMBINE_KERNELS[dtype_index], row_heads.div_ceil(8) as u32)),
    }
}

const STREAMING_KERNELS: [[&str; 3]; 2] = [
    ["attention_bf16_32_w2", "attention_bf16_64_w2", "attention_bf16_128_w2"],
    ["attention_f16_32_w2", "attention_f16_64_w2", "attention_f16_128_w2"],
];
const FULL_KERNELS: [[&str; 3]; 2] = [
    ["attention_bf16_32_w8", "attention_bf16_64_w8", "attention_bf16_128_w8"],
    ["attention_f16_32_w8", "attention_f16_64_w8", "attention_f16_128_w8"],
];
const COMBINE_KERNELS: [&str; 2] = ["attention_combine_bf16", "attention_combine_f16"];

/// Enqueues the attention kernel, and with splits the combining kernel, on `stream`. Allocates nothing, does not synchronise,
/// and may be captured in a graph. May be called from several threads; each launch in flight needs a workspace of its own.
///
/// The contents of device memory need not be valid: starts, lengths, `cu_rows` and lists are clamped to the sizes in the
/// struct. The results of a sequence with more rows than `max_sequence_rows` are undefined.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream. `device` or a clone of it
///    lives until the work is done and graphs that hold it are destroyed.
/// 2. The addresses are of device memory of the sizes that [`dllm_attention_params`] gives, until the work is done.
/// 3. `out`, `lse` and the workspace overlap neither each other nor the lists, lengths and `cu_rows`. ([`validate`] checks
///    that they do not overlap queries, keys and values.)
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_attention_params) -> Result<()> {
    validate(params)?;
    let Plan { kernel, grid, block, shared_bytes, combine, .. } = plan(params);
    let launch = Launch { module: "attention", kernel, grid, block, shared_bytes };
    // SAFETY: as promised by the caller.
    unsafe { device.launch(stream, launch, params) }?;
    if let Some((kernel, blocks)) = combine {
        let launch = Launch { module: "attention", kernel, grid: [blocks, 1, 1], block: 256, shared_bytes: 0 };
        // SAFETY: as promised by the caller.
        unsafe { device.launch(stream, launch, params) }?;
    }
    Ok(())
}

/// View of the columns of a row-major matrix from column `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// The matrix.
    pub buffer: &'a Buffer<T>,
    /// First column of the view, in elements; a multiple of 8.
    pub first: usize,
    /// Elements from one row to the next; a multiple of 8.
    pub stride: usize,
}

/// Keys and values of one part of each sequence.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a, T> {
    /// Keys `[segment rows, num_kv_heads, head_dim]`.
    pub k: Rows<'a, T>,
    /// Values `[segment rows, num_kv_heads, head_dim]`.
    pub v: Rows<'a, T>,
    /// First row of each sequence, `[num_sequences]`; `None`: row 0.
    pub start: Option<&'a Buffer<i32>>,
    /// Number of rows of each sequence, `[num_sequences]`; 0 is allowed.
    pub len: &'a Buffer<i32>,
}

/// Lists of the key tiles that each query tile visits. [`tiles`](super::tiles) builds them.
#[derive(Clone, Copy, Debug)]
pub struct Tiles<'a> {
    /// Begin of each list in `indices`, and the end: `[num_sequences * query_tiles * (num_kv_heads if per_head, else 1) + 1]`,
    /// where `query_tiles` is `max_sequence_rows / QUERY_TILE`, rounded up.
    pub offsets: &'a Buffer<i32>,
    /// Key tiles, `[num_tile_indices]`; each at most once per list. Tiles past the keys count as empty.
    pub indices: &'a Buffer<i32>,
    /// Whether each key/value head has its own lists.
    pub per_head: bool,
}

/// Inputs and outputs of [`launch`]. `T` is bf16 or f16.
pub struct Attention<'a, T> {
    /// Head counts and width of queries, keys and values.
    pub heads: Heads,
    /// Queries `[rows, num_heads, head_dim]`; at least as many rows as `out`.
    pub q: Rows<'a, T>,
    /// Sequence s has the query rows `cu_rows[s]..cu_rows[s + 1]`; `[num_sequences + 1]`, ascending from 0. Its length gives the
    /// number of sequences.
    pub cu_rows: &'a Buffer<i32>,
    /// Upper bound of the query rows of one sequence.
    pub max_sequence_rows: usize,
    /// Prefix cache, live block and suffix cache: the keys of a sequence in this order.
    pub segments: [Option<Segment<'a, T>>; 3],
    /// Block sparsity; `None`: every query tile visits all key tiles.
    pub tiles: Option<Tiles<'a>>,
    /// Factor of the scores, -1e6 to 1e6; usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// Number of KV splits, 1 to 64: see [`splits`].
    pub max_splits: usize,
    /// Block size; `None`: selected by [`plan`].
    pub form: Option<Form>,
    /// Output `[max_rows, num_heads, head_dim]`, packed. A row without keys gets zeros.
    pub out: &'a mut Buffer<T>,
    /// Output `[max_rows, num_heads]`: natural log-sum-exps of the scaled scores; minus infinity without keys.
    pub lse: Option<&'a mut Buffer<f32>>,
    /// Workspace of [`workspace_len`] elements; it may hold anything.
    pub workspace: &'a mut Buffer<f32>,
}

/// Returns the f32 elements of workspace that [`launch`] needs; 0 without splits. Saturates at `usize::MAX`.
pub fn workspace_len(max_rows: usize, heads: Heads, max_splits: usize) -> usize {
    if max_splits <= 1 {
        return 0;
    }
    let partial = max_splits.saturating_mul(max_rows).saturating_mul(heads.num_heads);
    partial.div_ceil(4).saturating_mul(4).saturating_add(partial.saturating_mul(heads.head_dim))
}

/// Enqueues attention over [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. The rows of `out` give the number of query
/// rows. Without sequences nothing is enqueued.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or a value is out of range; the driver's.
pub fn launch<T: Element>(stream: &Stream, attention: Attention<T>) -> Result<()> {
    let Attention { heads, q, cu_rows, max_sequence_rows, segments, tiles, scale, .. } = attention;
    let Attention { max_splits, form, out, lse, workspace, .. } = attention;
    let width = heads.num_heads.saturating_mul(heads.head_dim).max(1);
    let kv_width = heads.num_kv_heads.saturating_mul(heads.head_dim).max(1);
    let num_sequences = cu_rows.len().saturating_sub(1);
    if num_sequences == 0 {
        return Ok(());
    }
    let max_rows = out.len() / width;
    let query_rows = num_rows(q, width)?;
    if query_rows < max_rows {
        return Err(Error::argument("q", format!("{max_rows} rows, as many as out"), query_rows));
    }
    let segment = |segment: Option<Segment<T>>| -> Result<dllm_segment> {
        let Some(Segment { k, v, start, len }) = segment else {
            return Ok(dllm_segment::default());
        };
        Ok(dllm_segment {
            k: first_element("segment.k", k, stream)?,
            v: first_element("segment.v", v, stream)?,
            start: buffers::optional("segment.start", start, num_sequences, stream)?,
            len: buffers::buffer("segment.len", len, num_sequences, stream)?,
            k_stride: k.stride as i64,
            v_stride: v.stride as i64,
            num_rows: buffers::count("segment rows", num_rows(k, kv_width)?.min(num_rows(v, kv_width)?))?,
            reserved0: 0,
            reserved1: 0,
        })
    };
    let query_tiles = max_sequence_rows.div_ceil(QUERY_TILE);
    let lists_of_tile = if tiles.is_some_and(|t| t.per_head) { heads.num_kv_heads } else { 1 };
    let offsets = num_sequences.saturating_mul(query_tiles).saturating_mul(lists_of_tile).saturating_add(1);
    // Lists for other numbers of sequences, heads or rows have other positions.
    if let Some(tiles) = tiles.filter(|t| t.offsets.len() != offsets) {
        return Err(Error::argument("tile_offsets", format!("{offsets} elements"), tiles.offsets.len()));
    }
    let params = dllm_attention_params {
        size: size_of::<dllm_attention_params>() as u64,
        q: first_element("q", q, stream)?,
        out: buffers::buffer("out", out, 0, stream)?,
        lse: buffers::optional("lse", lse.as_deref(), buffers::elements(max_rows, heads.num_heads), stream)?,
        cu_rows: buffers::buffer("cu_rows", cu_rows, 0, stream)?,
        segments: [segment(segments[0])?, segment(segments[1])?, segment(segments[2])?],
        tile_offsets: buffers::optional("tile_offsets", tiles.map(|t| t.offsets), offsets, stream)?,
        tile_indices: buffers::optional("tile_indices", tiles.map(|t| t.indices), 0, stream)?,
        workspace: buffers::buffer("workspace", workspace, workspace_len(max_rows, heads, max_splits), stream)?,
        workspace_bytes: 4 * workspace.len() as u64,
        q_stride: q.stride as i64,
        out_stride: width as i64,
        scale,
        max_rows: buffers::count("out", max_rows)?,
        max_sequence_rows: buffers::count("max_sequence_rows", max_sequence_rows)?,
        num_sequences: buffers::count("cu_rows", num_sequences)?,
        num_heads: buffers::count("num_heads", heads.num_heads)?,
        num_kv_heads: buffers::count("num_kv_heads", heads.num_kv_heads)?,
        head_dim: buffers::count("head_dim", heads.head_dim)?,
        dtype: T::DTYPE as i32,
        max_splits: buffers::count("max_splits", max_splits)?,
        query_tiles: buffers::count("query_tiles", query_tiles)?,
        per_head: tiles.is_some_and(|t| t.per_head).into(),
        num_tile_indices: buffers::count("tile_indices", tiles.map_or(0, |t| t.indices.len()))?,
        form: match form {
            None => abi::DLLM_ATTENTION_FORM_PLANNED,
            Some(Form::Streaming) => abi::DLLM_ATTENTION_FORM_STREAMING,
            Some(Form::Full) => abi::DLLM_ATTENTION_FORM_FULL,
        } as i32,
        reserved: 0,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel clamps every start, length and list to them.
    // Outputs are borrowed exclusively.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

/// Number of rows that have `width` elements from column `first` on.
fn num_rows<T: Element>(rows: Rows<T>, width: usize) -> Result<usize> {
    let len = rows.buffer.len().saturating_sub(rows.first);
    buffers::num_rows("rows", len, width, rows.stride).map(|n| n as usize)
}

/// Device address of the first element of the view.
fn first_element<T: Element>(name: &'static str, rows: Rows<T>, stream: &Stream) -> Result<u64> {
    let address = buffers::buffer(name, rows.buffer, rows.first, stream)?;
    Ok(address + (rows.first * size_of::<T>()) as u64)
}

#[cfg(test)]
mod tests;
