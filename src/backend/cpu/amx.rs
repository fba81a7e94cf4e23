//! f32 x bf16 products on AMX, Intel's matrix unit (Sapphire Rapids and later), where the kernel lets us use it.
//!
//! The unit multiplies bf16 by bf16 into f32. Weights are bf16 as they are, and their rows are tiles as they lie in the
//! file. An f32 activation is cut, exactly, into three bf16 of 8 significant bits each, x = hi + mid + lo, and the three
//! products are summed in f32: the precision of f32 arithmetic for three bf16 products, about twice as fast as AVX-512
//! from 32 rows on (`cargo bench --bench linear`, with and without `DLLM_CPU=avx512`). Per step of 32 columns: 2 tiles of
//! weights, 2 of activations three times, 12 products into 4 sums of 16 x 16. A sum runs through the columns in one fixed
//! order whatever stands beside it.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18 (tile configuration) and
//! volume 2 (TILELOADD, TDPBF16PS); Linux Documentation/arch/x86/xstate.rst (permission).

use super::linear::{Matrix, Out, SCRATCH, SCRATCH_BYTES, SUMS, SWEEP, from_cache_line, packed_len};
use super::simd::IsaCap;
use super::transpose::transpose;
use rayon::prelude::*;
use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows and columns of sums in a tile, and pairs of columns in a step.
const TILE: usize = 16;
/// Columns of a step.
pub const STEP: usize = 32;
/// Bytes of a tile: 16 rows of 64.
const TILE_BYTES: usize = 1024;
/// The three parts of an activation.
const PARTS: usize = 3;
/// Bytes of packed activations per tile of rows and step.
const PACKED_BYTES: usize = PARTS * TILE_BYTES;
/// Rows of weights that a kernel takes at a time.
pub const BLOCK: usize = 2 * TILE;

/// Whether this process may use the unit. The first call asks the kernel, which grants it to the whole process (and makes
/// its signal frames larger by the tiles' 8 KiB); `DLLM_CPU=avx512` keeps it from asking.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        /// Linux: ask for a state component that is off by default.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        /// The tiles' contents.
        const XTILEDATA: libc::c_long = 18;
        if IsaCap::of_process() < IsaCap::Amx {
            return false;
        }
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        let (bf16, tile) = (leaf.edx >> 22 & 1 == 1, leaf.edx >> 24 & 1 == 1);
        // SAFETY: this call reads no memory; kernels that do not know it return an error.
        let granted = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 };
        // The packing below is compiled for AVX-512, which every such CPU has.
        bf16 && tile && is_x86_feature_detected!("avx512f") && granted()
    })
}

/// The unit, configured for 16 x 64 byte tiles on this thread for as long as this lives.
struct Configured(PhantomData<*const ()>); // of this thread only

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
        // SAFETY: the unit is there; the operand is 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &layout, options(nostack, readonly, preserves_flags)) };
        Configured(PhantomData)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: the unit is there, or there were no `Configured`.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Packs 16 rows and 32 columns of activations: three tiles `part_stride` bytes apart, `[pair of columns][row]` of two
/// bf16 each. Rows beyond `rows` are zero.
///
/// # Safety
/// 1. The CPU has AVX-512F. 2. `x` points to `rows` (at most 16) rows of 32 floats, `stride` apart. 3. `out` is valid for
///    the three tiles.
#[target_feature(enable = "avx512f")]
unsafe fn pack(x: *const f32, stride: usize, rows: usize, out: *mut u8, part_stride: usize) {
    use std::arch::x86_64::*;
    let mut words = [[[0u32; TILE]; TILE]; PARTS]; // [part][row][pair]
    let top = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for row in 0..rows {
        for half in 0..2 {
            // SAFETY: condition 2.
            let mut rest = unsafe { _mm512_loadu_ps(x.add(row * stride + half * 16)) };
            for part in &mut words {
                let cut = _mm512_and_si512(_mm512_castps_si512(rest), top);
                let bf16 = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(cut));
                // SAFETY: 8 of the row's 16 words.
                unsafe { _mm256_storeu_si256(part[row].as_mut_ptr().add(half * 8).cast(), bf16) };
                // Exact: what is left has 8 significant bits fewer. (Of an infinity NaN is left, and stays.)
                rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(cut));
            }
        }
    }
    for (part, words) in words.iter().enumerate() {
        // SAFETY: 16 x 16 words on both sides, moved as bits.
        unsafe { transpose(words.as_ptr().cast(), TILE, out.add(part * part_stride).cast(), TILE, TILE, TILE) };
    }
}

/// What one call of a kernel works on. Addresses and strides in bytes.
#[derive(Clone, Copy)]
struct Work {
    /// Steps of 32 columns, at least one.
    steps: usize,
    /// 32 rows of weights.
    weights: *const u8,
    weights_stride: usize,
    /// Packed activations: per step three parts of as many tiles as the kernel is wide.
    packed: *const u8,
    /// Sums, 32 rows.
    sums: *mut f32,
    sums_stride: usize,
    /// Whether the sums go on from what is there.
    accumulate: bool,
    /// Rows of weights that are needed next, as far apart: two times 1 KiB is prefetched per step. Null: none.
    ahead: *const u8,
}

/// A kernel of 32 rows of weights and `$packed_stride / 3072` tiles of activations.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, packed_stride: $packed_stride:literal,
     load: [$($load:literal),*], part: [$($p0:literal),*] [$($p1:literal),*] [$($p2:literal),*],
     store: [$($store:literal),*]) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// 1. [`available`], and this thread is [`Configured`]. 2. All addresses of `work` are valid for its steps.
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
                    "test {ahead}, {ahead}",
                    "jz 3f",
                    ".irp at, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960",
                    "prefetcht1 [{ahead} + \\at]",
                    "prefetcht1 [{ahead} + {stride} + \\at]",
                    ".endr",
                    "lea {ahead}, [{ahead} + 2*{stride}]",
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
                    ahead = inout(reg) work.ahead => _,
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
    /// 32 rows of weights, 32 of activations.
    wide, packed_stride: 6144,
    load: [
        "tileloadd tmm0, [{c0} + {cs}]",
        "tileloadd tmm1, [{c0} + {cs} + 64]",
        "tileloadd tmm2, [{c1} + {cs}]",
        "tileloadd tmm3, [{c1} + {cs} + 64]"
    ],
    part: [
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
    /// 32 rows of weights, 16 of activations.
    narrow, packed_stride: 3072,
    load: [
        "tileloadd tmm0, [{c0} + {cs}]",
        "tileloadd tmm2, [{c1} + {cs}]"
    ],
    part: [
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

/// Weight rows of a task.
const PANEL: usize = 2 * BLOCK;
/// Columns multiplied at a time, so that the packed activations of 128 rows stay in L2 between two blocks of rows.
const DEPTH: usize = 16 * STEP;

/// Where the tasks of one packing write; each to a step of its own.
struct Packed(*mut u8);
// SAFETY: as said.
unsafe impl Sync for Packed {}

/// The product of [`super::linear::linear`], for weights that fit ([`super::linear::Matrix`]'s `fits_amx`). Activations
/// are packed `[DEPTH columns][one or two tiles of rows][step][part][tile]`.
pub fn linear(x: &[f32], w: &Matrix, out: &mut [f32], rows: usize, packed: &mut [f32]) {
    let (k, n) = (w.cols(), w.rows());
    assert!(available() && w.fits_amx(), "not for this machine or these weights");
    assert!(x.len() >= rows * k && out.len() >= rows * n && packed.len() >= packed_len(rows, k), "buffer too short");
    for m0 in (0..rows).step_by(SWEEP) {
        let m = SWEEP.min(rows - m0);
        let x = &x[m0 * k..(m0 + m) * k];
        let packed = Packed(from_cache_line(packed).as_mut_ptr().cast());
        (0..k / STEP).into_par_iter().for_each(|step| pack_step(x, m, k, step, &packed));
        let out = Out(out[m0 * n..(m0 + m) * n].as_mut_ptr());
        (0..n.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
            let (out, packed) = (&out, &packed);
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(SCRATCH_BYTES / size_of::<f32>(), 0.0);
                let scratch = from_cache_line(scratch);
                // SAFETY: the unit is there; panels write disjoint columns of `out`, which holds m rows of n floats;
                // `packed` holds m rows.
                unsafe { panel_of(w, panel, packed.0, m, out, scratch) }
            });
        });
    }
}

/// Tiles of rows that kernels take together: (first tile, one or two).
fn groups(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = m.div_ceil(TILE);
    (0..tiles).step_by(2).map(move |first| (first, (tiles - first).min(2)))
}

/// Byte offset of a group's first step among the packed columns from `k0` on.
fn offset(m: usize, k: usize, k0: usize, first_tile: usize) -> usize {
    let depth = DEPTH.min(k - k0);
    (k0 * m.div_ceil(TILE) + depth * first_tile) / STEP * PACKED_BYTES
}

fn pack_step(x: &[f32], m: usize, k: usize, step: usize, packed: &Packed) {
    let column = step * STEP;
    let (k0, step) = (column / DEPTH * DEPTH, step % (DEPTH / STEP));
    for (first, tiles) in groups(m) {
        for tile in 0..tiles {
            let row = (first + tile) * TILE;
            let at = offset(m, k, k0, first) + (step * tiles) * PACKED_BYTES + tile * TILE_BYTES;
            // SAFETY: AVX-512 comes with the unit; rows and columns inside x; a place of this step's own below
            // packed_len.
            unsafe {
                let from = x.as_ptr().add(row * k + column);
                pack(from, k, TILE.min(m - row), packed.0.add(at), tiles * TILE_BYTES);
            }
        }
    }
}

/// Weight rows `panel * PANEL ..` times all packed rows, written to their columns of `out`.
///
/// # Safety
/// 1. The unit is there. 2. `packed` holds `m` rows. 3. `out` holds `[m, w.rows()]` and nobody else touches this
///    panel's columns.
unsafe fn panel_of(w: &Matrix, panel: usize, packed: *const u8, m: usize, out: &Out, sums: &mut [f32]) {
    let (k, n0) = (w.cols(), panel * PANEL);
    let nl = PANEL.min(w.rows() - n0);
    let row = |n: usize| if n < w.rows() { w.row(n).0.as_ptr() } else { std::ptr::null() };
    // SAFETY: condition 1, and this function calls nothing that configures the unit too.
    let configured = unsafe { Configured::new() };
    for k0 in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - k0);
        for block in (0..nl).step_by(BLOCK) {
            let weights = row(n0 + block).wrapping_add(2 * k0);
            // What comes next: the same rows further on, or those of the next panel.
            let more = k0 + DEPTH < k;
            let ahead = if more { weights.wrapping_add(2 * DEPTH) } else { row(n0 + PANEL + block) };
            for (first, tiles) in groups(m) {
                let work = Work {
                    steps: depth / STEP,
                    weights,
                    weights_stride: 2 * k,
                    packed: packed.wrapping_add(offset(m, k, k0, first)),
                    sums: sums[block * SUMS + first * TILE..].as_mut_ptr(),
                    sums_stride: SUMS * size_of::<f32>(),
                    accumulate: k0 > 0,
                    ahead: if first == 0 { ahead } else { std::ptr::null() },
                };
                // SAFETY: 32 whole rows of weights (`fits_amx`), the group's packed steps, 32 rows of sums.
                unsafe { if tiles == 2 { wide(work) } else { narrow(work) } }
            }
        }
    }
    drop(configured);
    if let Some(bias) = &w.bias {
        for (sums, bias) in sums.chunks_exact_mut(SUMS).zip(&bias[n0..n0 + nl]) {
            for s in &mut sums[..m] {
                *s += bias;
            }
        }
    }
    // SAFETY: sums is `[nl, m]`; rows below m and this panel's columns of out.
    unsafe { transpose(sums.as_ptr(), SUMS, out.0.add(n0), w.rows(), nl, m) };
}
