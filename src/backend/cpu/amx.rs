//! f32 x bf16 products on AMX, Intel's matrix unit (Sapphire Rapids and later), where the kernel grants its use.
//!
//! The unit multiplies bf16 by bf16 and sums in f32. Weights are bf16 already, and their rows are loaded as tiles straight
//! from the file. An f32 activation is split, exactly, into three bf16 terms of 8 significant bits each,
//! x = hi + mid + lo, and the three products are summed in f32. This has the precision of f32 arithmetic for three bf16
//! products, and is about twice as fast as AVX-512 from 32 rows on (`cargo bench --bench linear`, with and without
//! `DLLM_CPU=avx512`).
//!
//! A step of 32 columns loads 2 tiles of weights and 3 x 2 tiles of activations, for 12 products into 4 sums of 16 x 16.
//! Each sum adds the columns in one fixed order, whatever else is in the batch.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18 (tile configuration) and
//! volume 2 (TILELOADD, TDPBF16PS); Linux Documentation/arch/x86/xstate.rst (permission).

use super::matrix::Matrix;
use super::scratch::{LANES, SUMS_STRIDE, SWEEP, SharedOut, from_cache_line, with_scratch};
use super::simd::IsaCap;
use super::transpose::transpose;
use crate::tensor::{Dtype, Tensor};
use rayon::prelude::*;
use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows and columns of a tile of sums; also the pairs of columns in a step.
const TILE: usize = 16;
/// Columns of a step.
const STEP: usize = 32;
/// Bytes of a tile: 16 rows of 64.
const TILE_BYTES: usize = 1024;
/// bf16 terms of an activation: hi, mid and lo.
const TERMS: usize = 3;
/// Bytes of packed activations per tile of rows and step.
const PACKED_BYTES: usize = TERMS * TILE_BYTES;
/// Rows of weights per kernel call.
const BLOCK: usize = 2 * TILE;

/// Returns whether this process may use AMX.
///
/// The first call requests it from the kernel, which grants it to the whole process and enlarges its signal frames by
/// the tiles' 8 KiB. `DLLM_CPU=avx512` prevents the request.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        /// Linux: requests a state component that is off by default.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        /// The state component of the tile registers.
        const XTILEDATA: libc::c_long = 18;
        if IsaCap::of_process() < IsaCap::Amx {
            return false;
        }
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        let (bf16, tile) = (leaf.edx >> 22 & 1 == 1, leaf.edx >> 24 & 1 == 1);
        // SAFETY: this call reads no memory; kernels that do not know it return an error.
        let granted = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 };
        // `pack` is compiled for AVX-512, which every CPU with AMX has.
        bf16 && tile && is_x86_feature_detected!("avx512f") && granted()
    })
}

/// Returns whether the kernels can multiply by `w`: every tile of weights is inside one bf16 tensor.
pub fn fits(w: &Matrix) -> bool {
    let fits = |tensor: &Tensor| tensor.dtype() == Dtype::Bf16 && tensor.shape()[0].is_multiple_of(BLOCK);
    w.cols().is_multiple_of(STEP) && w.tensors().iter().all(fits)
}

/// Guard of this thread's tile configuration: eight tiles of 16 rows x 64 bytes until it is dropped.
struct Configured(PhantomData<*const ()>); // not Send

impl Configured {
    /// # Safety
    /// [`available`] is true, and this thread holds no other `Configured`.
    unsafe fn new() -> Configured {
        #[repr(C, align(64))]
        struct Layout([u8; 64]);
        let mut layout = Layout([0; 64]);
        layout.0[0] = 1; // palette
        for tile in 0..8 {
            layout.0[16 + 2 * tile] = 64; // bytes of a row, 16 bits
            layout.0[48 + tile] = TILE as u8; // rows
        }
        // SAFETY: AMX is available; the operand is 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &layout, options(nostack, readonly, preserves_flags)) };
        Configured(PhantomData)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: AMX is available, or no `Configured` would exist.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Splits and packs 16 rows and 32 columns of activations: one tile `[pair of columns][row][2]` of bf16 per term,
/// `term_stride` bytes apart. Rows beyond `rows` are zero.
///
/// # Safety
/// 1. The CPU has AVX-512F. 2. `x` points to `rows` (at most 16) rows of 32 floats, `stride` floats apart. 3. `out` is
///    valid for writes of the three tiles.
#[target_feature(enable = "avx512f")]
unsafe fn pack(x: *const f32, stride: usize, rows: usize, out: *mut u8, term_stride: usize) {
    use std::arch::x86_64::*;
    let mut words = [[[0u32; TILE]; TILE]; TERMS]; // [term][row][pair]
    let top = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for row in 0..rows {
        for half in 0..2 {
            // SAFETY: condition 2.
            let mut remainder = unsafe { _mm512_loadu_ps(x.add(row * stride + half * 16)) };
            for term in &mut words {
                let top_bits = _mm512_and_si512(_mm512_castps_si512(remainder), top);
                let bf16 = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(top_bits));
                // SAFETY: 8 of the row's 16 words.
                unsafe { _mm256_storeu_si256(term[row].as_mut_ptr().add(half * 8).cast(), bf16) };
                // Exact: the remainder has 8 significant bits fewer. The remainder of an infinity is NaN.
                remainder = _mm512_sub_ps(remainder, _mm512_castsi512_ps(top_bits));
            }
        }
    }
    for (term, words) in words.iter().enumerate() {
        // SAFETY: 16 x 16 words on both sides, copied as bits.
        unsafe { transpose(words.as_ptr().cast(), TILE, out.add(term * term_stride).cast(), TILE, TILE, TILE) };
    }
}

/// Operands of a kernel call. Strides are in bytes.
#[derive(Clone, Copy)]
struct Work {
    /// Steps of 32 columns, at least one.
    steps: usize,
    /// First of 32 rows of weights.
    weights: *const u8,
    weights_stride: usize,
    /// Packed activations: per step the three terms, each of one tile (narrow kernel) or two (wide kernel).
    packed: *const u8,
    /// First of 32 rows of sums.
    sums: *mut f32,
    sums_stride: usize,
    /// Whether the products are added to the sums in memory.
    accumulate: bool,
    /// First of the weight rows to prefetch, `weights_stride` apart: 1 KiB of two rows per step. Null: none.
    prefetch: *const u8,
}

/// Defines a kernel for 32 rows of weights and `$packed_stride / 3072` tiles of activations.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, packed_stride: $packed_stride:literal,
     load: [$($load:literal),*], terms: [$($p0:literal),*] [$($p1:literal),*] [$($p2:literal),*],
     store: [$($store:literal),*]) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// 1. [`available`], and this thread is [`Configured`]. 2. All addresses of `work` are valid for `work.steps` steps.
        unsafe fn $name(work: Work) {
            // SAFETY: the caller's conditions; prefetches are hints and may point anywhere.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "test {accumulate}, {accumulate}",
                    "jz 2f",
                    $($load,)*
                    "2:",
                    "tileloadd tmm4, [{a0} + {stride}]",
                    "tileloadd tmm5, [{a1} + {stride}]",
                    $($p0,)*
                    $($p1,)*
                    $($p2,)*
                    "add {a0}, 64",
                    "add {a1}, 64",
                    concat!("add {b}, ", $packed_stride),
                    "test {prefetch}, {prefetch}",
                    "jz 3f",
                    ".irp at, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960",
                    "prefetcht1 [{prefetch} + \\at]",
                    "prefetcht1 [{prefetch} + {stride} + \\at]",
                    ".endr",
                    "lea {prefetch}, [{prefetch} + 2*{stride}]",
                    "3:",
                    "dec {steps}",
                    "jnz 2b",
                    $($store,)*
                    steps = inout(reg) work.steps => _,
                    a0 = inout(reg) work.weights => _,
                    a1 = inout(reg) work.weights.wrapping_add(TILE * work.weights_stride) => _,
                    stride = in(reg) work.weights_stride,
                    b = inout(reg) work.packed => _,
                    line = in(reg) 64usize,
                    prefetch = inout(reg) work.prefetch => _,
                    c0 = in(reg) work.sums,
                    c1 = in(reg) work.sums.wrapping_byte_add(TILE * work.sums_stride),
                    cs = in(reg) work.sums_stride,
                    accumulate = in(reg) work.accumulate as usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel! {
    /// Multiplies 32 rows of weights by 32 rows of activations.
    wide, packed_stride: 6144,
    load: [
        "tileloadd tmm0, [{c0} + {cs}]",
        "tileloadd tmm1, [{c0} + {cs} + 64]",
        "tileloadd tmm2, [{c1} + {cs}]",
        "tileloadd tmm3, [{c1} + {cs} + 64]"
    ],
    terms: [
        "tileloadd tmm6, [{b} + {line}]",
        "tileloadd tmm7, [{b} + {line} + 1024]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ] [
        "tileloadd tmm6, [{b} + {line} + 2048]",
        "tileloadd tmm7, [{b} + {line} + 3072]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ] [
        "tileloadd tmm6, [{b} + {line} + 4096]",
        "tileloadd tmm7, [{b} + {line} + 5120]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    store: [
        "tilestored [{c0} + {cs}], tmm0",
        "tilestored [{c0} + {cs} + 64], tmm1",
        "tilestored [{c1} + {cs}], tmm2",
        "tilestored [{c1} + {cs} + 64], tmm3"
    ]
}

kernel! {
    /// Multiplies 32 rows of weights by 16 rows of activations.
    narrow, packed_stride: 3072,
    load: [
        "tileloadd tmm0, [{c0} + {cs}]",
        "tileloadd tmm2, [{c1} + {cs}]"
    ],
    terms: [
        "tileloadd tmm6, [{b} + {line}]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm2, tmm5, tmm6"
    ] [
        "tileloadd tmm6, [{b} + {line} + 1024]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm2, tmm5, tmm6"
    ] [
        "tileloadd tmm6, [{b} + {line} + 2048]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm2, tmm5, tmm6"
    ],
    store: [
        "tilestored [{c0} + {cs}], tmm0",
        "tilestored [{c1} + {cs}], tmm2"
    ]
}

/// Weight rows of a panel: one task.
const PANEL: usize = 2 * BLOCK;
/// Columns multiplied at a time: the packed activations of 128 rows stay in L2 from one block of weight rows to the
/// next.
const DEPTH: usize = 16 * STEP;

/// Floats of scratch per thread: the sums of a panel, and room to start at a cache line.
pub const SCRATCH_LEN: usize = PANEL * SUMS_STRIDE + LANES;

/// Returns the number of floats that [`linear`] needs for the packed activations of `rows` rows of width `cols`.
pub fn packed_len(rows: usize, cols: usize) -> usize {
    let elements = rows.min(SWEEP).next_multiple_of(TILE) * cols;
    elements.div_ceil(2) * TERMS + LANES // room to start at a cache line
}

/// Packed activations that parallel tasks write; each task writes its own step.
struct SharedPacked(*mut u8);
// SAFETY: tasks write disjoint bytes; see `pack_step`.
unsafe impl Sync for SharedPacked {}

/// Computes `out = x w^T + bias`, with the shapes of `linear.rs`. Activations are packed as
/// `[DEPTH columns][one or two tiles of rows][step][term][tile]`.
///
/// # Panics
/// When AMX is not [`available`], `w` does not [fit](fits), or a slice is too short.
pub fn linear(x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    let (k, n) = (w.cols(), w.rows());
    assert!(available() && fits(w), "AMX is not available, or the weights are not whole bf16 tiles");
    let long_enough = x.len() >= rows * k && out.len() >= rows * n && packed.len() >= packed_len(rows, k);
    assert!(long_enough, "buffer too short for {rows} rows");
    for m0 in (0..rows).step_by(SWEEP) {
        let m = SWEEP.min(rows - m0);
        let x = &x[m0 * k..(m0 + m) * k];
        let packed = SharedPacked(from_cache_line(packed).as_mut_ptr().cast());
        (0..k / STEP).into_par_iter().for_each(|step| pack_step(x, m, k, step, &packed));
        let out = SharedOut(out[m0 * n..(m0 + m) * n].as_mut_ptr());
        (0..n.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
            let (out, packed) = (&out, &packed);
            with_scratch(SCRATCH_LEN, |scratch| {
                // SAFETY: AMX is available; panels write disjoint columns of `out`, which holds m rows of n floats;
                // `packed` holds m rows.
                unsafe { multiply_panel(w, panel, packed.0, m, out, scratch) }
            });
        });
    }
}

/// Returns the tiles of `m` rows that one kernel call multiplies, as (first tile, one or two tiles).
fn tile_groups(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = m.div_ceil(TILE);
    (0..tiles).step_by(2).map(move |first| (first, (tiles - first).min(2)))
}

/// Returns the byte offset in the packed activations of the group at `first_tile`, in the block of columns at `k0`.
fn packed_offset(m: usize, k: usize, k0: usize, first_tile: usize) -> usize {
    let depth = DEPTH.min(k - k0);
    (k0 * m.div_ceil(TILE) + depth * first_tile) / STEP * PACKED_BYTES
}

/// Packs the 32 columns of `step` of all `m` rows of `x [m, k]`.
fn pack_step(x: &[f32], m: usize, k: usize, step: usize, packed: &SharedPacked) {
    let column = step * STEP;
    let (k0, step) = (column / DEPTH * DEPTH, step % (DEPTH / STEP));
    for (first, tiles) in tile_groups(m) {
        for tile in 0..tiles {
            let row = (first + tile) * TILE;
            let offset = packed_offset(m, k, k0, first) + (step * tiles) * PACKED_BYTES + tile * TILE_BYTES;
            // SAFETY: every CPU with AMX has AVX-512; rows and columns are inside x; the tiles belong to this step and end
            // below `packed_len`.
            unsafe {
                let source = x.as_ptr().add(row * k + column);
                pack(source, k, TILE.min(m - row), packed.0.add(offset), tiles * TILE_BYTES);
            }
        }
    }
}

/// Multiplies the weight rows from `panel * PANEL` on by all packed rows, and writes their columns of `out`.
///
/// # Safety
/// 1. AMX is [`available`]. 2. `packed` holds `m` rows. 3. `out` holds `[m, w.rows()]`, and no other thread accesses this
///    panel's columns.
unsafe fn multiply_panel(w: &Matrix, panel: usize, packed: *const u8, m: usize, out: &SharedOut, sums: &mut [f32]) {
    let (k, n0) = (w.cols(), panel * PANEL);
    let nl = PANEL.min(w.rows() - n0);
    let row = |n: usize| if n < w.rows() { w.row(n).0.as_ptr() } else { std::ptr::null() };
    // SAFETY: condition 1; nothing called below configures AMX.
    let configured = unsafe { Configured::new() };
    for k0 in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - k0);
        for block in (0..nl).step_by(BLOCK) {
            let weights = row(n0 + block).wrapping_add(2 * k0);
            // The next weights: the following columns of these rows, or the first columns of the next panel's.
            let more = k0 + DEPTH < k;
            let next = if more { weights.wrapping_add(2 * DEPTH) } else { row(n0 + PANEL + block) };
            for (first, tiles) in tile_groups(m) {
                let work = Work {
                    steps: depth / STEP,
                    weights,
                    weights_stride: 2 * k,
                    packed: packed.wrapping_add(packed_offset(m, k, k0, first)),
                    sums: sums[block * SUMS_STRIDE + first * TILE..].as_mut_ptr(),
                    sums_stride: SUMS_STRIDE * size_of::<f32>(),
                    accumulate: k0 > 0,
                    prefetch: if first == 0 { next } else { std::ptr::null() },
                };
                // SAFETY: 32 whole rows of weights (`fits`), the group's packed steps, 32 rows of sums.
                unsafe { if tiles == 2 { wide(work) } else { narrow(work) } }
            }
        }
    }
    drop(configured);
    if let Some(bias) = w.bias() {
        for (sums, bias) in sums.chunks_exact_mut(SUMS_STRIDE).zip(&bias[n0..n0 + nl]) {
            for s in &mut sums[..m] {
                *s += bias;
            }
        }
    }
    // SAFETY: sums is `[nl, m]`; the write covers m rows of this panel's columns of out.
    unsafe { transpose(sums.as_ptr(), SUMS_STRIDE, out.0.add(n0), w.rows(), nl, m) };
}
