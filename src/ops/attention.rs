//! Bidirectional attention over keys in up to three segments: the kernels of `cuda/sm80/attention.cu`.

use super::validate::{self, Region};
use super::{Element, buffers};
use crate::abi::{self, dllm_attention_params, dllm_segment};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Launch, Stream};
use std::ffi::c_void;

/// Keys of a tile; `DLLM_KEY_TILE`.
pub const KEY_TILE: usize = abi::DLLM_KEY_TILE as usize;
/// Query rows that share a list of tiles; `DLLM_QUERY_TILE`.
pub const QUERY_TILE: usize = abi::DLLM_QUERY_TILE as usize;
/// Packed rows of a sequence up to which it counts as short: two blocks of the full form, eight of the streaming one.
const SHORT: i64 = 256;

/// How a launch is cut into blocks. Both forms give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Few rows, many keys: blocks of two warps, several to a multiprocessor.
    Streaming,
    /// Many rows: blocks of eight warps.
    Full,
}

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

/// How many parts the keys should be cut into on a device of so many multiprocessors, when sequences have few query rows: so
/// that one sequence makes as many blocks of the streaming form as an H100 holds at once, but at most 64 parts. When they have
/// many: one.
///
/// The number of parts shows in the bits. Whoever wants those of a sequence to be the same alone and in any batch gives `rows`
/// that do not depend on the batch, such as the length of a block, and not those of its longest sequence.
pub fn splits(rows: usize, heads: Heads, multiprocessors: usize) -> usize {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let packed = rows.saturating_mul(num_heads / num_kv_heads.max(1));
    if packed > SHORT as usize {
        return 1;
    }
    let blocks = packed.div_ceil(32).max(1).saturating_mul(num_kv_heads).max(1);
    let held = match head_dim {
        ..=32 => 10,
        33..=64 => 6,
        _ => 3,
    };
    multiprocessors.saturating_mul(held).div_ceil(blocks).clamp(1, 64)
}

/// Checks every field but what the addresses point to.
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
    let most = (1 << 30) / i64::from(params.num_heads);
    validate::within("max_sequence_rows", params.max_sequence_rows.into(), 1, most)?;
    validate::within("max_splits", params.max_splits.into(), 1, 64)?;
    validate::within("num_sequences", params.num_sequences.into(), 1, 65_535 / i64::from(params.max_splits))?;
    validate::optional("tile_offsets", params.tile_offsets, 4)?;
    if params.tile_offsets != 0 {
        validate::address("tile_indices", params.tile_indices, 4)?;
        let tiles = i64::from(params.max_sequence_rows.unsigned_abs().div_ceil(QUERY_TILE as u32));
        validate::within("query_tiles", params.query_tiles.into(), tiles, i32::MAX.into())?;
        validate::flag("per_head", params.per_head)?;
        // More, and the parts of a list could overflow.
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

/// That all rows lie within 64-bit addresses, and that nothing overlaps what is written.
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
    let of_segment = |s: &dllm_segment| {
        [
            Region::new("segment.k", s.k, s.num_rows, s.k_stride, kv_width, bytes),
            Region::new("segment.v", if s.k == 0 { 0 } else { s.v }, s.num_rows, s.v_stride, kv_width, bytes),
        ]
    };
    let read = std::iter::once(q).chain(params.segments.iter().flat_map(of_segment));
    let there = |place: &Region| place.address != 0 && place.rows > 0;
    let places: Vec<Region> = written.into_iter().chain(read).collect();
    for place in places.iter().filter(|p| there(p)) {
        place.fits_address_space()?;
    }
    for (i, place) in written.iter().enumerate().filter(|(_, p)| there(p)) {
        for other in places[i + 1..].iter().filter(|p| there(p)) {
            place.disjoint_from(*other)?;
        }
    }
    Ok(())
}

/// What a launch takes. Unless `form` says which, it is streaming when the longest sequence has at most 256 packed rows (query
/// rows times heads of a group), and full otherwise.
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

const STREAMING_KERNELS: [[&str; 3]; 2] = [
    ["attention_bf16_32_w2", "attention_bf16_64_w2", "attention_bf16_128_w2"],
    ["attention_f16_32_w2", "attention_f16_64_w2", "attention_f16_128_w2"],
];
const FULL_KERNELS: [[&str; 3]; 2] = [
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
/// 3. `out`, `lse` and the workspace overlap neither one another nor the lists and lengths. (That they do not overlap
///    queries, keys and values is checked.)
///
/// What stands in device memory need not be right: starts, lengths, bounds and lists are brought to within the sizes of the
/// struct. Of a sequence that has more rows than `max_sequence_rows`, the result is not defined.
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
    /// Which form the blocks have; if not given, the plan chooses.
    pub form: Option<Form>,
    /// Out, `[any, num_heads, head_dim]`, packed.
    pub out: &'a mut Buffer<T>,
    /// Out, `[any, num_heads]`: log-sum-exps.
    pub lse: Option<&'a mut Buffer<f32>>,
    /// Any contents; [`workspace_len`] long.
    pub workspace: &'a mut Buffer<f32>,
}

/// Elements of workspace for so many query rows.
pub fn workspace_len(max_rows: usize, heads: Heads, max_splits: usize) -> usize {
    if max_splits <= 1 {
        return 0;
    }
    // What no memory can hold counts as the most that there can be.
    let partial = max_splits.saturating_mul(max_rows).saturating_mul(heads.num_heads);
    partial.div_ceil(4).saturating_mul(4).saturating_add(partial.saturating_mul(heads.head_dim))
}

/// Launches on our buffers, and returns. The number of query rows that there is room for is that of `out`; `q` has at least
/// as many.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short, belongs to another stream, or a number is out of range; the driver's.
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
    let query_rows = rows_of(q, width)?;
    if query_rows < max_rows {
        return Err(Error::argument("q", format!("{max_rows} rows, as many as out"), query_rows));
    }
    let segment = |segment: Option<Segment<T>>| -> Result<dllm_segment> {
        let Some(Segment { k, v, start, len }) = segment else {
            return Ok(dllm_segment::default());
        };
        Ok(dllm_segment {
            k: place("segment.k", k, stream)?,
            v: place("segment.v", v, stream)?,
            start: buffers::optional("segment.start", start, num_sequences, stream)?,
            len: buffers::buffer("segment.len", len, num_sequences, stream)?,
            k_stride: k.stride as i64,
            v_stride: v.stride as i64,
            num_rows: buffers::count("segment rows", rows_of(k, kv_width)?.min(rows_of(v, kv_width)?))?,
            reserved0: 0,
            reserved1: 0,
        })
    };
    let query_tiles = max_sequence_rows.div_ceil(QUERY_TILE);
    let lists_of_tile = if tiles.is_some_and(|t| t.per_head) { heads.num_kv_heads } else { 1 };
    let offsets = num_sequences.saturating_mul(query_tiles).saturating_mul(lists_of_tile).saturating_add(1);
    // More lists than that are those of other sequences, or of more heads or rows: the right ones would not be found.
    if let Some(Tiles { offsets: given, .. }) = tiles.filter(|t| t.offsets.len() != offsets) {
        return Err(Error::argument("tile_offsets", format!("{offsets} elements"), given.len()));
    }
    let params = dllm_attention_params {
        size: size_of::<dllm_attention_params>() as u64,
        q: place("q", q, stream)?,
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
    // SAFETY: addresses and sizes come from buffers of this stream; the kernel brings every start, length and list to within
    // them. What is written is borrowed alone.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

/// Whole rows of `width` elements from column `first` on.
fn rows_of<T: Element>(rows: Rows<T>, width: usize) -> Result<usize> {
    let len = rows.buffer.len().saturating_sub(rows.first);
    buffers::num_rows("rows", len, width, rows.stride).map(|n| n as usize)
}

/// Address of the first element.
fn place<T: Element>(name: &'static str, rows: Rows<T>, stream: &Stream) -> Result<u64> {
    let address = buffers::buffer(name, rows.buffer, rows.first, stream)?;
    Ok(address + (rows.first * size_of::<T>()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 sequences of 32 rows, 28 heads over 4, in one split.
    fn params() -> dllm_attention_params {
        let segment = dllm_segment {
            k: 0x10_0000,
            v: 0x20_0000,
            start: 0,
            len: 0x3000,
            k_stride: 512,
            v_stride: 520,
            num_rows: 100,
            ..dllm_segment::default()
        };
        dllm_attention_params {
            size: size_of::<dllm_attention_params>() as u64,
            q: 0x100_0000,
            out: 0x200_0000,
            lse: 0x300_0000,
            cu_rows: 0x2000,
            segments: [dllm_segment::default(), segment, dllm_segment::default()],
            tile_offsets: 0,
            tile_indices: 0,
            workspace: 0x400_0000,
            workspace_bytes: 1 << 30,
            q_stride: 3584,
            out_stride: 3584,
            scale: 0.125,
            max_rows: 64,
            max_sequence_rows: 32,
            num_sequences: 2,
            num_heads: 28,
            num_kv_heads: 4,
            head_dim: 128,
            dtype: abi::DLLM_BF16 as i32,
            max_splits: 1,
            query_tiles: 0,
            per_head: 0,
            num_tile_indices: 0,
            form: abi::DLLM_ATTENTION_FORM_PLANNED as i32,
            reserved: 0,
        }
    }

    #[test]
    fn plans() {
        // 224 packed rows: seven blocks of 32.
        let plan_of = |change: fn(&mut dllm_attention_params)| {
            let mut params = params();
            change(&mut params);
            validate(&params).unwrap();
            plan(&params)
        };
        let one = Plan {
            kernel: "attention_bf16_128_w2",
            grid: [7, 4, 2],
            block: 64,
            shared_bytes: 65_536,
            workspace_bytes: 0,
            combine: None,
        };
        assert_eq!(plan_of(|_| {}), one);
        let partial = 5 * 64 * 28;
        let combine = Some(("attention_combine_bf16", 64 * 28 / 8));
        let five = Plan { grid: [7, 4, 10], workspace_bytes: 4 * (partial + 128 * partial), combine, ..one };
        assert_eq!(plan_of(|p| p.max_splits = 5), five);
        let long = Plan { kernel: "attention_bf16_128_w8", grid: [3, 4, 2], block: 256, ..one };
        assert_eq!(plan_of(|p| p.max_sequence_rows = 37), long, "259 packed rows: three blocks of 128");
        let full = Plan { kernel: "attention_bf16_128_w8", grid: [2, 4, 2], block: 256, ..one };
        assert_eq!(plan_of(|p| p.form = abi::DLLM_ATTENTION_FORM_FULL as i32), full, "forced");
        let streaming = |p: &mut dllm_attention_params| {
            (p.form, p.max_sequence_rows) = (abi::DLLM_ATTENTION_FORM_STREAMING as i32, 37);
        };
        assert_eq!(plan_of(streaming), Plan { grid: [9, 4, 2], ..one }, "forced: nine blocks of 32");
        let narrow = |p: &mut dllm_attention_params| {
            (p.dtype, p.head_dim, p.max_splits, p.max_rows) = (abi::DLLM_F16 as i32, 32, 3, 1);
            (p.num_heads, p.num_kv_heads) = (3, 3);
        };
        let narrow_plan = Plan {
            kernel: "attention_f16_32_w2",
            grid: [1, 3, 6],
            shared_bytes: 16_384,
            workspace_bytes: 4 * (12 + 9 * 32), // 9 log-sum-exps, rounded up to 12
            combine: Some(("attention_combine_f16", 1)),
            ..one
        };
        assert_eq!(plan_of(narrow), narrow_plan);
    }

    #[test]
    fn the_workspace_of_a_safe_launch_is_the_planned() {
        for (max_rows, num_heads, head_dim, max_splits) in [(1, 1, 32, 1), (1, 3, 32, 3), (64, 28, 128, 64)] {
            let heads = Heads { num_heads: num_heads as usize, num_kv_heads: 1, head_dim: head_dim as usize };
            let params =
                dllm_attention_params { max_rows, num_heads, head_dim, max_splits, num_kv_heads: 1, ..params() };
            let len = workspace_len(max_rows as usize, heads, max_splits as usize);
            assert_eq!(4 * len as u64, plan(&params).workspace_bytes);
        }
        let heads = Heads { num_heads: usize::MAX, num_kv_heads: 1, head_dim: 128 };
        assert_eq!(workspace_len(9, heads, 2), usize::MAX);
    }

    #[test]
    fn splits_follow_the_shape_of_a_sequence() {
        let of = |rows, num_heads, num_kv_heads, head_dim, multiprocessors| {
            splits(rows, Heads { num_heads, num_kv_heads, head_dim }, multiprocessors)
        };
        assert_eq!(of(32, 32, 32, 128, 132), 13, "LLaDA-8B: 32 blocks, 396 wanted");
        assert_eq!(of(32, 28, 4, 128, 132), 15, "Dream-7B: 7 x 4 blocks");
        assert_eq!(of(32, 32, 32, 64, 132), 25, "792 wanted");
        assert_eq!(of(32, 32, 32, 32, 132), 42, "1,320 wanted");
        assert_eq!(of(256, 8, 8, 128, 132), 7);
        assert_eq!(of(257, 8, 8, 128, 132), 1, "many rows");
        assert_eq!(of(37, 28, 4, 128, 132), 1, "many packed rows");
        assert_eq!(of(1, 1, 1, 128, 132), 64, "no more than 64");
        assert_eq!(of(32, 512, 512, 128, 132), 1);
        for odd in [0, 1, usize::MAX] {
            for (heads, kv_heads) in [(0, 0), (1, 0), (0, 1), (usize::MAX, 1), (usize::MAX, usize::MAX)] {
                assert!((1..=64).contains(&of(odd, heads, kv_heads, odd, odd)));
            }
        }
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_attention_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size = 0, "size: expected 336");
        wrong(|p| p.q = 0, "q: expected a device address");
        wrong(|p| p.q += 8, "q: expected an address aligned to 16");
        wrong(|p| p.out = 0, "out: expected a device address");
        wrong(|p| p.out += 2, "out: expected an address aligned to 16");
        wrong(|p| p.lse += 2, "lse: expected an address aligned to 4");
        wrong(|p| p.cu_rows = 0, "cu_rows: expected a device address");
        wrong(|p| p.cu_rows += 1, "cu_rows: expected an address aligned to 4");
        wrong(|p| p.dtype = 2, "dtype: expected bf16 (0) or f16 (1), found 2");
        wrong(|p| p.head_dim = 96, "head_dim: expected 32, 64 or 128, found 96");
        wrong(|p| p.num_heads = 0, "num_heads: expected 1 to 65535, found 0");
        wrong(|p| p.num_heads = 65_536, "num_heads: expected 1 to 65535");
        wrong(|p| p.num_kv_heads = 0, "num_kv_heads: expected 1 to 28");
        wrong(|p| p.num_kv_heads = 29, "num_kv_heads: expected 1 to 28");
        wrong(|p| p.num_kv_heads = 3, "num_heads: expected a multiple of num_kv_heads, 3, found 28");
        wrong(
            |p| p.q_stride = 3576,
            "q_stride: expected a multiple of 8 elements (16 bytes), at least the width, 3584",
        );
        wrong(|p| p.out_stride = -3584, "out_stride");
        wrong(|p| p.out_stride += 4, "out_stride");
        wrong(|p| p.segments[1].k += 4, "segment.k: expected an address aligned to 16");
        wrong(|p| p.segments[1].v = 0, "segment.v: expected a device address");
        wrong(|p| p.segments[1].start = 3, "segment.start: expected an address aligned to 4");
        wrong(|p| p.segments[1].len = 0, "segment.len: expected a device address");
        wrong(|p| p.segments[1].k_stride = 504, "segment.k_stride");
        wrong(|p| p.segments[1].v_stride = 516, "segment.v_stride");
        wrong(|p| p.segments[1].num_rows = -1, "segment.num_rows");
        wrong(|p| p.segments[1].reserved0 = 1, "reserved");
        wrong(|p| p.segments[1].reserved1 = 1, "reserved");
        wrong(|p| p.scale = f32::NAN, "scale: expected a number from -1e6 to 1e6, found NaN");
        wrong(|p| p.scale = f32::INFINITY, "scale");
        wrong(|p| p.scale = -2e6, "scale");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.max_rows = i32::MAX / 28 + 1, "max_rows: expected 1 to");
        wrong(|p| p.max_sequence_rows = 0, "max_sequence_rows: expected 1 to");
        wrong(|p| p.max_sequence_rows = (1 << 30) / 28 + 1, "max_sequence_rows");
        wrong(|p| p.max_splits = 0, "max_splits: expected 1 to 64, found 0");
        wrong(|p| p.max_splits = 65, "max_splits: expected 1 to 64, found 65");
        wrong(|p| p.num_sequences = 0, "num_sequences: expected 1 to 65535");
        wrong(|p| (p.num_sequences, p.max_splits) = (1024, 64), "num_sequences: expected 1 to 1023");
        wrong(|p| p.tile_offsets = 2, "tile_offsets: expected an address aligned to 4");
        wrong(|p| p.tile_offsets = 4, "tile_indices: expected a device address");
        wrong(|p| (p.tile_offsets, p.tile_indices) = (4, 4), "query_tiles: expected 1 to");
        wrong(
            |p| (p.tile_offsets, p.tile_indices, p.query_tiles, p.per_head) = (4, 4, 1, 2),
            "per_head: expected 0 to 1, found 2",
        );
        wrong(
            |p| (p.tile_offsets, p.tile_indices, p.query_tiles, p.num_tile_indices) = (4, 4, 1, -1),
            "num_tile_indices: expected 0 to",
        );
        wrong(|p| p.form = 3, "form: expected 0 to 2, found 3");
        wrong(|p| p.form = -1, "form: expected 0 to 2, found -1");
        wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
        wrong(|p| (p.max_splits, p.workspace) = (2, 0), "workspace: expected a device address");
        wrong(|p| (p.max_splits, p.workspace) = (2, 8), "workspace: expected an address aligned to 16");
        wrong(|p| (p.max_splits, p.workspace_bytes) = (2, 4), "workspace_bytes: expected at least 1849344, found 4");
    }

    #[test]
    fn overlaps_are_seen() {
        let wrong = |change: fn(&mut dllm_attention_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.q_stride = i64::MAX - 7, "q: expected rows within 64-bit addresses");
        wrong(|p| p.out_stride = i64::MAX - 7, "out: expected rows within 64-bit addresses");
        wrong(|p| p.segments[1].k_stride = i64::MAX - 7, "segment.k: expected rows within 64-bit addresses");
        wrong(|p| p.segments[1].v_stride = i64::MAX - 7, "segment.v: expected rows within 64-bit addresses");
        wrong(|p| p.out = p.q, "out: expected memory that does not overlap q");
        wrong(|p| p.out = p.segments[1].k, "out: expected memory that does not overlap segment.k");
        wrong(|p| p.out = p.segments[1].v + 1600, "out: expected memory that does not overlap segment.v");
        wrong(|p| p.out = p.lse, "out: expected memory that does not overlap lse");
        wrong(|p| p.lse = p.q + 4, "lse: expected memory that does not overlap q");
        wrong(|p| (p.max_splits, p.workspace) = (2, p.q), "workspace: expected memory that does not overlap q");
    }

    #[test]
    fn what_is_not_used_is_free() {
        let absent = dllm_segment { v: 3, len: 1, k_stride: -1, num_rows: -1, ..dllm_segment::default() };
        let mut unused = params();
        unused.segments[0] = absent;
        (unused.workspace, unused.workspace_bytes) = (7, 0);
        (unused.tile_indices, unused.query_tiles, unused.per_head, unused.num_tile_indices) = (1, -1, 9, -1);
        validate(&unused).unwrap();
        let mut empty = params();
        (empty.segments[1].num_rows, empty.segments[1].k) = (0, empty.out);
        validate(&empty).unwrap();
        // Side by side in one matrix: queries, keys and values of a projection.
        let mut projection = params();
        (projection.q, projection.q_stride) = (0x100_0000, 3584 + 1024);
        let k = projection.q + 2 * 3584;
        let live =
            dllm_segment { k, v: k + 1024, k_stride: 4608, v_stride: 4608, num_rows: 64, ..params().segments[1] };
        projection.segments[1] = live;
        validate(&projection).unwrap();
    }
}
