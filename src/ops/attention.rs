//! Bidirectional attention over keys in up to three segments: the kernels of `cuda/sm80/attention.cu`.

use super::{Element, check, safe};
use crate::abi::{self, dllm_attention_params, dllm_segment};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Launch, Stream};
use std::ffi::c_void;

/// Keys of a tile; `DLLM_KEY_TILE`.
pub const KEY_TILE: usize = abi::DLLM_KEY_TILE as usize;
/// Query rows that share a list of tiles; `DLLM_QUERY_TILE`.
pub const QUERY_TILE: usize = abi::DLLM_QUERY_TILE as usize;
/// Packed rows of a sequence up to which it counts as short: one block of the eight-warp form.
const SHORT: i64 = 256;

/// What a launch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Bytes of workspace, with any contents; 0 without splits.
    pub workspace_bytes: u64,
    /// Name and blocks of the kernel that merges the splits, if there are any; it has 256 threads a block.
    pub combine: Option<(&'static str, u32)>,
}

/// How many parts the keys should be cut into on a device of so many multiprocessors: enough blocks for three on each, when
/// sequences have few query rows; none when they have many.
///
/// It depends on the shape of one sequence and nothing else, so that a sequence gives the same bits alone and in a batch.
pub fn splits(max_sequence_rows: usize, num_heads: usize, num_kv_heads: usize, multiprocessors: usize) -> usize {
    let packed = max_sequence_rows * (num_heads / num_kv_heads.max(1));
    if packed as i64 > SHORT {
        return 1;
    }
    let blocks = packed.div_ceil(32).max(1) * num_kv_heads;
    (3 * multiprocessors).div_ceil(blocks.max(1)).clamp(1, 64)
}

/// Checks every field but what the addresses point to.
pub fn validate(params: &dllm_attention_params) -> Result<()> {
    check::struct_size::<dllm_attention_params>(params.size)?;
    check::address("q", params.q, 16)?;
    check::address("out", params.out, 16)?;
    check::optional("lse", params.lse, 4)?;
    check::address("cu_rows", params.cu_rows, 4)?;
    let bytes = check::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16])?;
    if ![32, 64, 128].contains(&params.head_dim) {
        return Err(Error::argument("head_dim", "32, 64 or 128", params.head_dim));
    }
    check::within("num_heads", params.num_heads.into(), 1, 1 << 16)?;
    check::within("num_kv_heads", params.num_kv_heads.into(), 1, params.num_heads.into())?;
    if params.num_heads % params.num_kv_heads != 0 {
        let expected = format!("a multiple of num_kv_heads, {}", params.num_kv_heads);
        return Err(Error::argument("num_heads", expected, params.num_heads));
    }
    let width = i64::from(params.num_heads) * i64::from(params.head_dim);
    let kv_width = i64::from(params.num_kv_heads) * i64::from(params.head_dim);
    check::stride("q_stride", params.q_stride, width, bytes)?;
    check::stride("out_stride", params.out_stride, width, bytes)?;
    for segment in &params.segments {
        if segment.k == 0 {
            continue;
        }
        check::address("segment.k", segment.k, 16)?;
        check::address("segment.v", segment.v, 16)?;
        check::optional("segment.start", segment.start, 4)?;
        check::address("segment.len", segment.len, 4)?;
        check::stride("segment.k_stride", segment.k_stride, kv_width, bytes)?;
        check::stride("segment.v_stride", segment.v_stride, kv_width, bytes)?;
        check::within("segment.num_rows", segment.num_rows.into(), 0, i32::MAX.into())?;
    }
    check::finite("scale", params.scale)?;
    check::within("max_rows", params.max_rows.into(), 1, i64::from(i32::MAX - 8) / i64::from(params.num_heads))?;
    // Above, the number of a packed row could overflow.
    let most = (1 << 30) / i64::from(params.num_heads);
    check::within("max_sequence_rows", params.max_sequence_rows.into(), 1, most)?;
    check::within("max_splits", params.max_splits.into(), 1, 64)?;
    check::within("num_sequences", params.num_sequences.into(), 1, 65_535 / i64::from(params.max_splits))?;
    check::optional("tile_offsets", params.tile_offsets, 4)?;
    if params.tile_offsets != 0 {
        check::address("tile_indices", params.tile_indices, 4)?;
        let tiles = i64::from(params.max_sequence_rows.unsigned_abs().div_ceil(QUERY_TILE as u32));
        check::within("query_tiles", params.query_tiles.into(), tiles, i32::MAX.into())?;
        check::flag("per_head", params.per_head)?;
        check::within("num_tile_indices", params.num_tile_indices.into(), 0, i32::MAX.into())?;
    }
    let plan = plan(params);
    match params.workspace_bytes >= plan.workspace_bytes {
        _ if plan.workspace_bytes == 0 => Ok(()),
        true => check::address("workspace", params.workspace, 16),
        false => {
            let expected = format!("at least {}", plan.workspace_bytes);
            Err(Error::argument("workspace_bytes", expected, params.workspace_bytes))
        }
    }
}

/// What a launch takes. Sequences of few packed rows (query rows times heads of a group) run on blocks of two warps, several
/// to a multiprocessor, which is what streaming keys needs; others on blocks of eight.
pub fn plan(params: &dllm_attention_params) -> Plan {
    let group = i64::from(params.num_heads.max(1) / params.num_kv_heads.max(1)).max(1);
    let packed = i64::from(params.max_sequence_rows.max(1)) * group;
    let (warps, kernels) = match packed <= SHORT {
        true => (2, &SHORT_KERNELS),
        false => (8, &LONG_KERNELS),
    };
    let of_type = usize::from(params.dtype as u32 != abi::DLLM_BF16);
    let kernel = kernels[of_type][match params.head_dim {
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
        combine: (splits > 1).then(|| (COMBINE_KERNELS[of_type], row_heads.div_ceil(8) as u32)),
    }
}

const SHORT_KERNELS: [[&str; 3]; 2] = [
    ["attention_bf16_32_w2", "attention_bf16_64_w2", "attention_bf16_128_w2"],
    ["attention_f16_32_w2", "attention_f16_64_w2", "attention_f16_128_w2"],
];
const LONG_KERNELS: [[&str; 3]; 2] = [
    ["attention_bf16_32_w8", "attention_bf16_64_w8", "attention_bf16_128_w8"],
    ["attention_f16_32_w8", "attention_f16_64_w8", "attention_f16_128_w8"],
];
const COMBINE_KERNELS: [&str; 2] = ["attention_combine_bf16", "attention_combine_f16"];

/// Launches on a caller's stream and returns: one kernel, and with splits one more. May be captured into a graph; may be
/// called from several threads, with a workspace each.
///
/// # Errors
/// As [`validate`]; the driver's.
///
/// # Safety
/// 1. `stream` is a stream of the device's primary context, or null for the legacy default stream.
/// 2. The addresses are of device memory of the sizes that [`dllm_attention_params`] gives, until the work is done.
/// 3. `out`, `lse` and the workspace overlap nothing else of the struct.
/// 4. No sequence has more than `max_sequence_rows` query rows; those past that get no result.
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

/// Heads and their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads, which divide them.
    pub num_kv_heads: usize,
    /// 32, 64 or 128.
    pub head_dim: usize,
}

/// A matrix whose rows hold what is wanted from column `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// Rows, `stride` elements apart.
    pub buffer: &'a Buffer<T>,
    /// A multiple of 8.
    pub first: usize,
    /// A multiple of 8.
    pub stride: usize,
}

/// Keys and values of one part of the sequences.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a, T> {
    /// `[any, num_kv_heads, head_dim]`
    pub k: Rows<'a, T>,
    /// `[any, num_kv_heads, head_dim]`
    pub v: Rows<'a, T>,
    /// `[num_sequences]`: first row of each sequence; 0 if not given.
    pub start: Option<&'a Buffer<i32>>,
    /// `[num_sequences]`: rows of each sequence.
    pub len: &'a Buffer<i32>,
}

/// Which key tiles query tiles visit; see [`abi::dllm_attention_params`].
#[derive(Clone, Copy, Debug)]
pub struct Tiles<'a> {
    /// `[num_sequences * query_tiles * (kv heads, if per_head) + 1]`
    pub offsets: &'a Buffer<i32>,
    /// `[any]`
    pub indices: &'a Buffer<i32>,
    /// Whether each key/value head has lists of its own.
    pub per_head: bool,
}

/// What a safe launch reads and writes.
pub struct Attention<'a, T> {
    /// Shape of queries and keys.
    pub heads: Heads,
    /// `[any, num_heads, head_dim]`
    pub q: Rows<'a, T>,
    /// `[num_sequences + 1]`, ascending from 0: which query rows are whose.
    pub cu_rows: &'a Buffer<i32>,
    /// Query rows of one sequence, at most.
    pub max_sequence_rows: usize,
    /// Prefix cache, live block, suffix cache; the keys of a sequence in this order.
    pub segments: [Option<Segment<'a, T>>; 3],
    /// Block sparsity; all tiles are visited, if not given.
    pub tiles: Option<Tiles<'a>>,
    /// Of the scores; 1 / sqrt(head_dim).
    pub scale: f32,
    /// Parts that the keys are cut into, 1 to 64: see [`splits`].
    pub max_splits: usize,
    /// Out, `[any, num_heads, head_dim]`, packed.
    pub out: &'a mut Buffer<T>,
    /// Out, `[any, num_heads]`: log-sum-exps.
    pub lse: Option<&'a mut Buffer<f32>>,
    /// Any contents; [`workspace_len`] long.
    pub workspace: &'a mut Buffer<f32>,
}

/// Elements of workspace for so many query rows.
pub fn workspace_len(max_rows: usize, heads: Heads, max_splits: usize) -> usize {
    let partial = max_splits * max_rows * heads.num_heads;
    if max_splits > 1 { partial.next_multiple_of(4) + partial * heads.head_dim } else { 0 }
}

/// Launches on our buffers, and returns. The number of query rows that there is room for is that of `out`.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short, belongs to another stream, or a number is out of range; the driver's.
pub fn launch<T: Element>(stream: &Stream, attention: Attention<T>) -> Result<()> {
    let Attention { heads, q, cu_rows, max_sequence_rows, segments, tiles, scale, .. } = attention;
    let Attention { max_splits, out, lse, workspace, .. } = attention;
    let width = heads.num_heads.saturating_mul(heads.head_dim).max(1);
    let kv_width = heads.num_kv_heads.saturating_mul(heads.head_dim).max(1);
    let num_sequences = cu_rows.len().saturating_sub(1);
    if num_sequences == 0 {
        return Ok(());
    }
    let max_rows = (out.len() / width).min(rows_of(q, width)?);
    let segment = |segment: Option<Segment<T>>| -> Result<dllm_segment> {
        let Some(Segment { k, v, start, len }) = segment else {
            return Ok(dllm_segment::default());
        };
        Ok(dllm_segment {
            k: place("segment.k", k, stream)?,
            v: place("segment.v", v, stream)?,
            start: safe::optional("segment.start", start, num_sequences, stream)?,
            len: safe::buffer("segment.len", len, num_sequences, stream)?,
            k_stride: k.stride as i64,
            v_stride: v.stride as i64,
            num_rows: safe::count("segment rows", rows_of(k, kv_width)?.min(rows_of(v, kv_width)?))?,
            reserved0: 0,
            reserved1: 0,
        })
    };
    let query_tiles = max_sequence_rows.div_ceil(QUERY_TILE);
    let lists = num_sequences * query_tiles * tiles.map_or(1, |t| if t.per_head { heads.num_kv_heads } else { 1 });
    let params = dllm_attention_params {
        size: size_of::<dllm_attention_params>() as u64,
        q: place("q", q, stream)?,
        out: safe::buffer("out", out, 0, stream)?,
        lse: safe::optional("lse", lse.as_deref(), max_rows * heads.num_heads, stream)?,
        cu_rows: safe::buffer("cu_rows", cu_rows, 0, stream)?,
        segments: [segment(segments[0])?, segment(segments[1])?, segment(segments[2])?],
        tile_offsets: safe::optional("tile_offsets", tiles.map(|t| t.offsets), lists + 1, stream)?,
        tile_indices: safe::optional("tile_indices", tiles.map(|t| t.indices), 0, stream)?,
        workspace: safe::buffer("workspace", workspace, workspace_len(max_rows, heads, max_splits), stream)?,
        workspace_bytes: 4 * workspace.len() as u64,
        q_stride: q.stride as i64,
        out_stride: width as i64,
        scale,
        max_rows: safe::count("out", max_rows)?,
        max_sequence_rows: safe::count("max_sequence_rows", max_sequence_rows)?,
        num_sequences: safe::count("cu_rows", num_sequences)?,
        num_heads: safe::count("num_heads", heads.num_heads)?,
        num_kv_heads: safe::count("num_kv_heads", heads.num_kv_heads)?,
        head_dim: safe::count("head_dim", heads.head_dim)?,
        dtype: T::DTYPE as i32,
        max_splits: safe::count("max_splits", max_splits)?,
        query_tiles: safe::count("query_tiles", query_tiles)?,
        per_head: tiles.is_some_and(|t| t.per_head).into(),
        num_tile_indices: safe::count("tile_indices", tiles.map_or(0, |t| t.indices.len()))?,
    };
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel brings every start, length and list to within
    // them. What is written is borrowed alone.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

/// Whole rows of `width` elements from column `first` on.
fn rows_of<T: Element>(rows: Rows<T>, width: usize) -> Result<usize> {
    let len = rows.buffer.len().saturating_sub(rows.first);
    safe::num_rows("rows", len, width, rows.stride).map(|n| n as usize)
}

/// Address of the first element.
fn place<T: Element>(name: &'static str, rows: Rows<T>, stream: &Stream) -> Result<u64> {
    let address = safe::buffer(name, rows.buffer, rows.first, stream)?;
    Ok(address + (rows.first * size_of::<T>()) as u64)
}
