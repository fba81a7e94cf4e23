//! Vector operations of the CPU kernels, implemented once per instruction set.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Simd`]. [`dispatch!`](super::dispatch) instantiates it in one
//! `#[target_feature]` function per instruction set and selects one at run time. Results differ between instruction sets
//! by rounding (the portable one has no FMA); on one machine they are always the same.

use std::sync::OnceLock;

/// Instruction set that the kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 16 lanes, AVX-512F.
    Avx512,
    /// 8 lanes, AVX2 with FMA and F16C.
    Avx2,
    /// 8 lanes of ordinary Rust.
    Portable,
}

impl Isa {
    /// Returns the best instruction set of this machine that the environment variable `DLLM_CPU` (`plain`, `avx2`,
    /// `avx512`, `amx`) allows.
    pub fn detect() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let limit = IsaCap::of_process();
            let allowed = |isa: &Isa| match isa {
                Isa::Avx512 => limit >= IsaCap::Avx512,
                Isa::Avx2 => limit >= IsaCap::Avx2,
                Isa::Portable => true,
            };
            Isa::available().into_iter().find(allowed).unwrap_or(Isa::Portable)
        })
    }

    /// Returns every instruction set that this machine supports, best first.
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                sets.push(Isa::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                sets.push(Isa::Avx2);
            }
        }
        sets.push(Isa::Portable);
        sets
    }
}

/// Prints the paths of the CPU kernels that tests of every instruction set leave out, because this machine lacks them.
#[cfg(test)]
pub fn print_paths_not_run() {
    let available = Isa::available();
    let mut missing: Vec<String> =
        [Isa::Avx512, Isa::Avx2].iter().filter(|isa| !available.contains(isa)).map(|isa| format!("{isa:?}")).collect();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let amx = super::amx::available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let amx = false;
    if !amx {
        missing.insert(0, "Amx".into());
    }
    if !missing.is_empty() {
        println!("not run: {} (this machine lacks them, or DLLM_CPU forbids them)", missing.join(", "));
    }
}

/// Best instruction set that `DLLM_CPU` allows: `plain`, `avx2`, `avx512` or `amx` (the default). It serves to reproduce
/// the results of another machine, and to prevent that the process requests AMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IsaCap {
    Portable,
    Avx2,
    Avx512,
    Amx,
}

impl IsaCap {
    /// Returns the limit of this process. `DLLM_CPU` is read once; any other value allows everything.
    pub fn of_process() -> IsaCap {
        static LIMIT: OnceLock<IsaCap> = OnceLock::new();
        *LIMIT.get_or_init(|| match std::env::var("DLLM_CPU").as_deref() {
            Ok("plain") => IsaCap::Portable,
            Ok("avx2") => IsaCap::Avx2,
            Ok("avx512") => IsaCap::Avx512,
            _ => IsaCap::Amx,
        })
    }
}

/// Operations on vectors of `LANES` f32.
///
/// # Safety
/// Every method requires that the CPU has the implementor's instruction set; loads and stores also require that
/// `LANES` elements are valid from the pointer on, at any alignment.
#[allow(clippy::missing_safety_doc)] // stated once, above
pub trait Simd: Copy {
    type V: Copy;
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger operand; `b` when either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller operand; `b` when either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The nearest whole number.
    unsafe fn round(n: Self::V) -> Self::V;
    /// `a * 2^n` for whole `n` in the exponent range of f32.
    unsafe fn scale_pow2(a: Self::V, n: Self::V) -> Self::V;
    /// Loads `LANES` bf16 from `p` and widens them.
    unsafe fn widen_bf16(p: *const u8) -> Self::V;
    /// Loads `LANES` f16 from `p` and widens them.
    unsafe fn widen_f16(p: *const u8) -> Self::V;

    /// e^x, with x clamped to [-87, 88] and a relative error below 2e-7. Range reduction by ln 2 in two terms, then the
    /// degree-6 Taylor polynomial on [-ln2/2, ln2/2].
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: forwarded from the caller.
        unsafe {
            // x is the second operand: min and max return it when it is NaN, so that NaN propagates.
            let x = Self::min(Self::splat(88.0), Self::max(Self::splat(-87.0), x));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.0 / 720.0);
            for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::scale_pow2(p, n)
        }
    }
}

/// Vectors of 8 lanes in portable Rust, compiled for the target's baseline.
#[derive(Clone, Copy)]
pub struct Portable;

const PORTABLE_LANES: usize = 8;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; PORTABLE_LANES] {
    std::array::from_fn(f)
}

// SAFETY of the blocks in this impl: the caller guarantees LANES valid elements from each pointer on.
impl Simd for Portable {
    type V = [f32; PORTABLE_LANES];
    const LANES: usize = PORTABLE_LANES;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; PORTABLE_LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: as above.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: as above.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(n: Self::V) -> Self::V {
        lanes(|i| (n[i] + n[i].signum() * 0.5) as i32 as f32)
    }
    #[inline(always)]
    unsafe fn scale_pow2(a: Self::V, n: Self::V) -> Self::V {
        lanes(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const u8) -> Self::V {
        // SAFETY: as above.
        let raw = unsafe { p.cast::<[[u8; 2]; PORTABLE_LANES]>().read_unaligned() };
        lanes(|i| f32::from_bits((u16::from_le_bytes(raw[i]) as u32) << 16))
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const u8) -> Self::V {
        // SAFETY: as above.
        let raw = unsafe { p.cast::<[[u8; 2]; PORTABLE_LANES]>().read_unaligned() };
        lanes(|i| half::f16::from_le_bytes(raw[i]).to_f32())
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// Defines one thin method per instruction. The caller guarantees the instruction set and the pointers.
    macro_rules! instructions {
        ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {
            $($(#[$doc])*
            #[inline(always)]
            unsafe fn $name($($arg: $ty),*) -> $ret {
                // SAFETY: the trait's contract: instruction set present, LANES elements valid from each pointer on.
                unsafe { $body }
            })*
        };
    }

    /// AVX-512F: 16 lanes.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        instructions! {
            fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            fn load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
            fn store(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
            fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
            fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
            fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            fn round(n: __m512) -> __m512 = _mm512_roundscale_ps::<0>(n);
            fn scale_pow2(a: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(a, n);
            fn widen_bf16(p: *const u8) -> __m512 =
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
            fn widen_f16(p: *const u8) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        }
    }

    /// AVX2 with FMA and F16C: 8 lanes.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        instructions! {
            fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
            fn load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
            fn store(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
            fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
            fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
            fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            fn round(n: __m256) -> __m256 = _mm256_round_ps::<8>(n);
            fn scale_pow2(a: __m256, n: __m256) -> __m256 = {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            };
            fn widen_bf16(p: *const u8) -> __m256 =
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
            fn widen_f16(p: *const u8) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        }
    }
}

/// Calls `$kernel::<S>(...)` with the [`Simd`] type of `$isa`, in a function compiled for that instruction set.
///
/// The kernel must be an `#[inline(always)] unsafe fn`, generic over one [`Simd`]. The arguments are local variables with
/// the given names and types.
macro_rules! dispatch {
    ($isa:expr, $kernel:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512($($arg: $ty),*) {
            // SAFETY: the caller's conditions; the instruction set is enabled here.
            unsafe { $kernel::<$crate::backend::cpu::simd::Avx512>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $ty),*) {
            // SAFETY: the caller's conditions; the instruction set is enabled here.
            unsafe { $kernel::<$crate::backend::cpu::simd::Avx2>($($arg),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::simd::Isa::Avx512 => avx512($($arg),*),
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::simd::Isa::Avx2 => avx2($($arg),*),
            _ => $kernel::<$crate::backend::cpu::simd::Portable>($($arg),*),
        }
    }};
}
pub(crate) use dispatch;

/// Runs `chains` rounds of 24 independent vector FMAs and returns the number of floating-point operations. Divided by the
/// time taken, it is the roof of matrix products.
pub fn fma_roof(chains: u64) -> u64 {
    let isa = Isa::detect();
    let mut sum = 0.0f32;
    let out = &mut sum;
    // SAFETY: `isa` was detected.
    unsafe { dispatch!(isa, fma_chains(chains: u64, out: &mut f32)) };
    std::hint::black_box(sum);
    let lanes = match isa {
        Isa::Avx512 => 16,
        Isa::Avx2 | Isa::Portable => 8,
    };
    chains * 24 * 2 * lanes
}

/// Runs `chains` rounds of 24 independent FMAs and stores one lane of their sum, so that none is optimised away.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn fma_chains<S: Simd>(chains: u64, out: &mut f32) {
    // SAFETY: registers only, and one store of LANES <= 16 floats.
    unsafe {
        let (a, b) = (S::splat(0.999), S::splat(1e-6));
        let mut acc = [S::splat(1.0); 24];
        for _ in 0..chains {
            for c in &mut acc {
                *c = S::fma(*c, a, b);
            }
        }
        let mut total = acc[0];
        for c in &acc[1..] {
            total = S::add(total, *c);
        }
        let mut lanes = [0.0f32; 16];
        S::store(lanes.as_mut_ptr(), total);
        *out = lanes[0];
    }
}
