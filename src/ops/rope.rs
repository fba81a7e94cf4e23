//! Rotary position embedding of queries and keys, with a copy of keys and values to the cache: the kernels of `cuda/any/rope.cu`.
//!
//! The form is half-split (NeoX): element i of a head pairs with element i + head_dim / 2. Products and sums are f32.
//! [`angles`] computes the table of cosines and sines. Element types: bf16, f16.

use super::{Element, Plan, buffers, validate};
use crate::abi::{self, dllm_rope_params};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Stream};
use crate::tensor::Heads;
use std::ffi::c_void;

/// Checks all fields without reading the memory that the addresses point to. Calls no driver.
///
/// # Errors
/// [`Error::Argument`] with the field, the expected and the found value.
pub fn validate(params: &dllm_rope_params) -> Result<()> {
    validate::struct_size::<dllm_rope_params>(params.size)?;
    let element_bytes = validate::dtype(params.dtype, &[abi::DLLM_BF16, abi::DLLM_F16])?;
    validate::address("qkv", params.qkv, 16)?;
    validate::address("positions", params.positions, 4)?;
    validate::address("angles", params.angles, 16)?;
    validate::optional("count", params.count, 4)?;
    validate::optional("failed", params.failed, 4)?;
    validate::size("max_rows", params.max_rows)?;
    validate::size("num_positions", params.num_positions)?;
    if ![32, 64, 128].contains(&params.head_dim) {
        return Err(Error::argument("head_dim", "32, 64 or 128", params.head_dim));
    }
    validate::size("num_heads", params.num_heads)?;
    validate::size("num_kv_heads", params.num_kv_heads)?;
    let [head_dim, num_heads, num_kv_heads] = [params.head_dim, params.num_heads, params.num_kv_heads].map(i64::from);
    let (kv_width, heads) = (num_kv_heads * head_dim, num_heads + 2 * num_kv_heads);
    // A row has at most 65,535 blocks.
    validate::within("num_heads + 2 num_kv_heads", heads, 1, 65_535 * 256 * 8 / head_dim)?;
    // With a cache for keys only, rows need not hold values.
    let without_values = params.k_cache != 0 && params.v_cache == 0;
    let qkv_width = heads * head_dim - if without_values { kv_width } else { 0 };
    validate::stride("qkv_stride", params.qkv_stride, qkv_width, element_bytes)?;
    validate::reserved(params.reserved)?;
    validate::Region::new("qkv", params.qkv, params.max_rows, params.qkv_stride, qkv_width, element_bytes)
        .fits_address_space()?;

    if params.k_cache == 0 {
        return match params.v_cache {
            0 => Ok(()),
            _ => Err(Error::argument("k_cache", "a device address, as there is a v_cache", "0")),
        };
    }
    validate::address("k_cache", params.k_cache, 16)?;
    validate::optional("v_cache", params.v_cache, 16)?;
    validate::address("cache_row", params.cache_row, 4)?;
    validate::size("num_cache_rows", params.num_cache_rows)?;
    validate::stride("cache_stride", params.cache_stride, kv_width, element_bytes)?;
    [("k_cache", params.k_cache), ("v_cache", params.v_cache)].into_iter().try_for_each(|(name, address)| {
        let (rows, stride) = (params.num_cache_rows, params.cache_stride);
        validate::Region::new(name, address, rows, stride, kv_width, element_bytes).fits_address_space()
    })
}

/// Returns the plan of a launch: blocks of 256 threads, with a thread per pair of 16-byte vectors that is rotated, and per
/// 16 bytes of values that are cached.
pub fn plan(params: &dllm_rope_params) -> Plan {
    let kernel = match params.dtype as abi::dllm_dtype {
        abi::DLLM_BF16 => "rope_bf16",
        _ => "rope_f16",
    };
    // A head has head_dim / 8 vectors, half as many pairs; values are in the last num_kv_heads heads.
    let heads = (i64::from(params.num_heads.max(0)) + i64::from(params.num_kv_heads.max(0))) as u64;
    let values = if params.k_cache == 0 || params.v_cache == 0 { 0 } else { params.num_kv_heads.max(0) as u64 * 2 };
    let parts = ((heads + values) * params.head_dim.max(0) as u64 / 16).div_ceil(256).max(1) as u32;
    Plan { kernel, grid: [params.max_rows.max(1) as u32, parts, 1], block: 256, workspace_bytes: 0 }
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
/// 2. The addresses are of device memory of the sizes that [`dllm_rope_params`] gives, until the work is done.
/// 3. `qkv`, `k_cache` and `v_cache` overlap neither each other nor other memory of the struct.
/// 4. No two rows have the same `cache_row`, except -1.
pub unsafe fn launch_raw(device: &Device, stream: *mut c_void, params: &dllm_rope_params) -> Result<()> {
    validate(params)?;
    // SAFETY: as promised by the caller.
    unsafe { super::launch(device, stream, "rope", plan(params), params) }
}

/// Computes the table of angles on the host and copies it to the device: `[num_positions, head_dim / 2]` pairs (cosine, sine)
/// for the positions from 0 on. Allocates; cannot be captured.
///
/// Values are formed as in the reference implementations. The frequency `theta^(-2i / head_dim)` is rounded to f32, and so is the
/// angle, position times frequency. Cosine and sine of the angle are computed in f64 and rounded to f32.
///
/// # Errors
/// [`Error::Argument`] when `head_dim` is not within 2 to 65,536; as [`Stream::upload`].
pub fn angles(stream: &Stream, theta: f32, head_dim: usize, num_positions: usize) -> Result<Buffer<[f32; 2]>> {
    validate::within("head_dim", head_dim as i64, 2, 1 << 16)?;
    stream.upload(&angle_table(theta, head_dim, num_positions))
}

fn angle_table(theta: f32, head_dim: usize, num_positions: usize) -> Vec<[f32; 2]> {
    let frequency = |pair: usize| (1.0 / f64::from(theta).powf((2 * pair) as f64 / head_dim as f64)) as f32;
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let mut table = Vec::with_capacity(num_positions * frequencies.len());
    for position in 0..num_positions {
        table.extend(frequencies.iter().map(|frequency| {
            let angle = f64::from(position as f32 * frequency);
            [angle.cos() as f32, angle.sin() as f32]
        }));
    }
    table
}

/// Cache that [`launch`] writes keys and values to. Rows are packed, with `num_kv_heads * head_dim` elements.
pub struct Caches<'a, T> {
    /// Rotated keys `[cache rows, num_kv_heads * head_dim]`.
    pub k: &'a mut Buffer<T>,
    /// Values, in the same layout; `None`: rows of `qkv` are `[q | k]`, and no values are copied.
    pub v: Option<&'a mut Buffer<T>>,
    /// Cache row of each row of `qkv`, `[max_rows]`; -1: the row is not copied.
    pub row: &'a Buffer<i32>,
}

/// Inputs and outputs of [`launch`]. Rows are packed: `[q | k | v]`, or `[q | k]` with a cache for keys only.
pub struct Rope<'a, T> {
    /// Head counts and width; `head_dim` is 32, 64 or 128.
    pub heads: Heads,
    /// Rows that are rotated in place: `[max_rows, (num_heads + 2 num_kv_heads) * head_dim]`, or
    /// `[max_rows, (num_heads + num_kv_heads) * head_dim]` with a cache for keys only.
    pub qkv: &'a mut Buffer<T>,
    /// Position of each row, `[max_rows]`; the length gives the maximum number of rows.
    pub positions: &'a Buffer<i32>,
    /// Number of rows, read on the device, `[1]`; `None`: the maximum number.
    pub count: Option<&'a Buffer<i32>>,
    /// Table of [`angles`] for the same `head_dim`. Positions must be below its number of rows.
    pub angles: &'a Buffer<[f32; 2]>,
    /// Cache for keys and values; `None`: nothing is copied.
    pub caches: Option<Caches<'a, T>>,
    /// Flag `[1]`, set to -2 when a position or cache row is out of range. Such a row is left unchanged.
    pub failed: Option<&'a mut Buffer<i32>>,
}

/// Enqueues the op on [`Buffer`]s of `stream`; otherwise as [`launch_raw`]. When two rows have the same cache row, it holds elements
/// of either.
///
/// # Errors
/// [`Error::Argument`] when a buffer is too short or belongs to another stream, or as [`validate`]; the driver's.
pub fn launch<T: Element>(stream: &Stream, rope: Rope<T>) -> Result<()> {
    let Rope { heads, qkv, positions, count, angles, caches, failed } = rope;
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let max_rows = positions.len();
    // Check that counts fit into 32 bits first, so that products below cannot overflow. No width below is 0.
    let [heads_i32, kv_heads_i32, head_dim_i32] = [
        buffers::count("num_heads", num_heads)?,
        buffers::count("num_kv_heads", num_kv_heads)?,
        buffers::count("head_dim", head_dim)?,
    ];
    validate::size("num_kv_heads", kv_heads_i32)?;
    validate::within("head_dim", head_dim as i64, 2, i32::MAX.into())?;
    let kv_width = num_kv_heads.saturating_mul(head_dim);
    let without_values = caches.as_ref().is_some_and(|caches| caches.v.is_none());
    let parts = if without_values { num_kv_heads } else { 2 * num_kv_heads };
    let qkv_width = num_heads.saturating_add(parts).saturating_mul(head_dim);
    let mut params = dllm_rope_params {
        size: size_of::<dllm_rope_params>() as u64,
        qkv: buffers::buffer("qkv", qkv, buffers::elements(max_rows, qkv_width), stream)?,
        positions: buffers::buffer("positions", positions, 1, stream)?,
        angles: buffers::buffer("angles", angles, head_dim / 2, stream)?,
        k_cache: 0,
        v_cache: 0,
        cache_row: 0,
        count: buffers::optional("count", count, 1, stream)?,
        failed: buffers::optional("failed", failed.as_deref(), 1, stream)?,
        qkv_stride: qkv_width as i64,
        cache_stride: kv_width as i64,
        max_rows: buffers::count("positions", max_rows)?,
        num_positions: buffers::count("angles", angles.len() / (head_dim / 2))?,
        num_cache_rows: 0,
        num_heads: heads_i32,
        num_kv_heads: kv_heads_i32,
        head_dim: head_dim_i32,
        dtype: T::DTYPE as i32,
        reserved: 0,
    };
    if let Some(Caches { k, v, row }) = &caches {
        params.k_cache = buffers::buffer("caches.k", k, kv_width, stream)?;
        params.v_cache = buffers::optional("caches.v", v.as_deref(), kv_width, stream)?;
        params.cache_row = buffers::buffer("caches.row", row, max_rows, stream)?;
        params.num_cache_rows =
            buffers::count("caches", v.as_ref().map_or(k.len(), |v| k.len().min(v.len())) / kv_width)?;
    }
    // SAFETY: addresses and sizes come from buffers of this stream, outputs are borrowed exclusively, and the kernel
    // checks every position and cache row. Two rows with one cache row only mix their elements.
    unsafe { launch_raw(stream.device(), stream.raw(), &params) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> dllm_rope_params {
        dllm_rope_params {
            size: size_of::<dllm_rope_params>() as u64,
            qkv: 0x1000,
            positions: 0x2000,
            angles: 0x3010,
            k_cache: 0x4000,
            v_cache: 0x5000,
            cache_row: 0x6000,
            count: 0,
            failed: 0,
            qkv_stride: 264,
            cache_stride: 64,
            max_rows: 5,
            num_positions: 9,
            num_cache_rows: 7,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 32,
            dtype: abi::DLLM_BF16 as i32,
            reserved: 0,
        }
    }

    /// Values from an implementation in Python, whose floats are f64.
    #[test]
    fn angles_are_known() {
        let row =
            |theta, head_dim, position| angle_table(theta, head_dim, position + 1)[position * head_dim / 2..].to_vec();
        assert_eq!(row(10_000.0, 4, 0), [[1.0, 0.0], [1.0, 0.0]]);
        assert_eq!(row(10_000.0, 4, 1), [[0.540_302_3, 0.841_470_96], [0.999_95, 0.009_999_833]]);
        assert_eq!(row(10_000.0, 4, 3), [[-0.989_992_5, 0.141_12], [0.999_550_04, 0.029_995_5]]);
        // Angles of thousands: a frequency or an angle in f64 would change the third digit.
        let far = row(500_000.0, 32, 4095);
        assert_eq!(far.len(), 16);
        assert_eq!(far[..2], [[-0.065_975_994, -0.997_821_2], [0.999_633_2, 0.027_083_058]]);
        assert_eq!(far[2..4], [[-0.758_821_96, 0.651_298_1], [-0.553_398_97, -0.832_916_3]]);
        // Beyond, the table of the reference, which was checked against the same numbers.
        let table = angle_table(500_000.0, 32, 70_000);
        for position in [4_095, 4_096, 4_097, 8_192, 16_383, 32_768, 65_535, 65_536, 69_999] {
            let pairs = crate::reference::rope::angles(500_000.0, 32, position);
            let expected: Vec<[f32; 2]> = pairs.into_iter().map(|(cos, sin)| [cos, sin]).collect();
            assert_eq!(table[position * 16..][..16], expected, "position {position}");
        }
    }

    #[test]
    fn plans_a_thread_for_each_item() {
        for (dtype, kernel) in [(0, "rope_bf16"), (1, "rope_f16")] {
            let params = dllm_rope_params { dtype, ..params() };
            assert!(validate(&params).is_ok());
            assert_eq!(plan(&params), Plan { kernel, grid: [5, 1, 1], block: 256, workspace_bytes: 0 });
        }
        // LLaDA-8B: 64 heads of 8 pairs of vectors; with caches 32 heads of 16 vectors more.
        let llada = dllm_rope_params { num_heads: 32, num_kv_heads: 32, head_dim: 128, ..params() };
        assert_eq!(plan(&llada).grid, [5, 4, 1]);
        assert_eq!(plan(&dllm_rope_params { k_cache: 0, ..llada }).grid, [5, 2, 1]);
        assert_eq!(plan(&dllm_rope_params { v_cache: 0, ..llada }).grid, [5, 2, 1]);
    }

    #[test]
    fn caches_may_be_missing() {
        let without =
            dllm_rope_params { k_cache: 0, v_cache: 0, cache_row: 0, num_cache_rows: 0, cache_stride: 0, ..params() };
        assert!(validate(&without).is_ok());
        // Rows without values: six heads of 32.
        assert!(validate(&dllm_rope_params { v_cache: 0, qkv_stride: 192, ..params() }).is_ok());
    }

    #[test]
    fn wrong_fields_are_named() {
        let wrong = |change: fn(&mut dllm_rope_params), says: &str| {
            let mut params = params();
            change(&mut params);
            let error = validate(&params).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        wrong(|p| p.size = 8, "size: expected 120");
        wrong(|p| p.dtype = abi::DLLM_F32 as i32, "dtype: expected bf16 (0) or f16 (1), found 2");
        wrong(|p| p.qkv = 0, "qkv: expected a device address, found 0");
        wrong(|p| p.positions = 2, "positions: expected an address aligned to 4");
        wrong(|p| p.angles = 0x3008, "angles: expected an address aligned to 16 bytes, found 0x3008");
        wrong(|p| p.count = 2, "count");
        wrong(|p| p.failed = 2, "failed");
        wrong(|p| p.k_cache = 0, "k_cache: expected a device address, as there is a v_cache");
        wrong(|p| p.v_cache = 8, "v_cache: expected an address aligned to 16");
        wrong(
            |p| (p.v_cache, p.qkv_stride) = (0, 184),
            "qkv_stride: expected a multiple of 8 elements (16 bytes), at least the width, 192",
        );
        wrong(|p| p.qkv_stride = 192, "at least the width, 256");
        wrong(|p| p.k_cache = 8, "k_cache: expected an address aligned to 16");
        wrong(|p| p.cache_row = 0, "cache_row: expected a device address");
        wrong(|p| p.max_rows = 0, "max_rows: expected 1 to");
        wrong(|p| p.num_positions = 0, "num_positions");
        wrong(|p| p.num_cache_rows = 0, "num_cache_rows");
        wrong(|p| p.head_dim = 96, "head_dim: expected 32, 64 or 128, found 96");
        wrong(|p| p.num_heads = 0, "num_heads: expected 1 to");
        wrong(|p| p.num_kv_heads = -2, "num_kv_heads: expected 1 to");
        wrong(|p| p.num_heads = i32::MAX, "num_heads + 2 num_kv_heads: expected 1 to 4194240, found 2147483651");
        wrong(
            |p| p.qkv_stride = 248,
            "qkv_stride: expected a multiple of 8 elements (16 bytes), at least the width, 256",
        );
        wrong(|p| p.cache_stride = 56, "cache_stride");
        wrong(|p| p.reserved = 1, "reserved: expected 0, found 1");
        wrong(|p| p.qkv_stride = i64::MAX - 7, "qkv: expected rows within 64-bit addresses");
        wrong(|p| p.cache_stride = i64::MAX - 7, "k_cache: expected rows within 64-bit addresses");
    }
}
