//! Matrix products by cuBLASLt: `y = x w^T + bias`, bf16 inputs, f32 accumulation, bf16 or f32 output.
//!
//! For each shape the library's heuristic is queried once, and its first algorithm is kept. Algorithms are not timed against
//! each other, because the fastest could differ from run to run, and with it the rounding.

use super::{Buffer, Device, Stream};
use crate::error::{Error, Result};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use half::bf16;
use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::ptr;

/// Bytes of workspace of a [`Blas`]: the size that cuBLASLt recommends for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Shape of a product `y[rows, out] = x[rows, inner] w[out, inner]^T`. All matrices are packed and row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Number of rows of `x` and `y`.
    pub rows: usize,
    /// Number of rows of `w`, which is the number of columns of `y`.
    pub out: usize,
    /// Number of columns of `x` and `w`.
    pub inner: usize,
    /// Whether `y` is f32; bf16 otherwise.
    pub f32_out: bool,
    /// Whether a bf16 bias `[out]` is added to each row. `y` must then be bf16.
    pub biased: bool,
}

/// cuBLASLt handle with a workspace and a plan for each shape that was launched. All launches go to one stream.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    stream: Stream,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: handle and descriptors are not bound to a thread, and launches take `&mut self`, so no two threads use them at once.
unsafe impl Send for Blas {}

/// Descriptors and algorithm of one shape.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    x: sys::cublasLtMatrixLayout_t,
    w: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
}

trait BlasResult<T> {
    fn in_call(self, call: &'static str) -> Result<T>;
}

impl<T> BlasResult<T> for Result<T, CublasError> {
    fn in_call(self, call: &'static str) -> Result<T> {
        let message = "cuBLASLt refused".to_string();
        self.map_err(|CublasError(status)| Error::Driver { call, name: format!("{status:?}"), message })
    }
}

impl Blas {
    /// Loads cuBLASLt, creates a handle, and allocates the workspace on `stream`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the library is not installed; the library's; the driver's, for example when there is no memory
    /// for the workspace.
    pub fn new(stream: &Stream) -> Result<Blas> {
        // SAFETY: only searches for the library. Any other call of cudarc panics where there is none.
        if !unsafe { sys::is_culib_present() } {
            let message = "cuBLASLt (libcublasLt.so.13 or .so.12) was not found: it comes with the CUDA toolkit";
            return Err(Error::Unavailable(message.into()));
        }
        let workspace = stream.alloc(WORKSPACE_BYTES)?;
        stream.device().bind()?;
        let handle = result::create_handle().in_call("cublasLtCreate")?;
        Ok(Blas { handle, workspace, stream: stream.clone(), plans: HashMap::new() })
    }

    /// Bytes of device memory that [`Blas::new`] allocates.
    pub const fn memory_bytes() -> usize {
        WORKSPACE_BYTES
    }

    /// Enqueues a product of the given shape. `x`, `w`, `bias` and `y` are device addresses; `bias` is ignored unless the shape
    /// is biased.
    ///
    /// The first launch of a shape queries the library's heuristic. Later ones allocate no memory. No launch blocks, and each
    /// may be captured in a graph.
    ///
    /// # Errors
    /// [`Error::Argument`] for a size of 0 or of 2^31 and more; the library's.
    ///
    /// # Safety
    /// 1. `x`, `w`, `bias` (if the shape is biased) and `y` are addresses of device memory of the sizes that `shape` gives,
    ///    aligned to 256 bytes (`bias` to 64).
    /// 2. This memory and this value live until the work is done and graphs that hold it are destroyed.
    /// 3. `y` overlaps none of the other matrices.
    pub unsafe fn launch(&mut self, shape: Shape, x: u64, w: u64, bias: u64, y: u64) -> Result<()> {
        self.stream.device().bind()?;
        if !self.plans.contains_key(&shape) {
            let plan = Plan::new(self.handle, shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(plan) = self.plans.get(&shape) else { return Ok(()) };
        if shape.biased {
            use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER as BIAS;
            plan.set(BIAS, &bias)?;
        }
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: descriptors and workspace are alive; addresses are as promised by the caller. The library reads matrices
        // column-major, so it computes y^T = w x^T: w^T is the first operand, x the second.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                w as *const c_void,
                plan.w,
                x as *const c_void,
                plan.x,
                y as *const c_void,
                plan.y,
                y as *mut c_void,
                plan.y,
                &plan.algorithm,
                self.workspace.address() as *mut c_void,
                plan.workspace_bytes,
                self.stream.raw().cast(),
            )
        }
        .in_call("cublasLtMatmul")
    }
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Plan> {
        use sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType::{CUDA_R_16BF, CUDA_R_32F};
        let Shape { rows, out, inner, f32_out, biased } = shape;
        for (name, size) in [("rows", rows), ("out", out), ("inner", inner)] {
            if size == 0 || size > i32::MAX as usize {
                return Err(Error::argument(name, format!("1 to {}", i32::MAX), size));
            }
        }
        let layout = |kind, columns: usize, count: usize| {
            result::create_matrix_layout(kind, columns as u64, count as u64, columns as i64)
                .in_call("cublasLtMatrixLayoutCreate")
        };
        let mut plan = Plan {
            operation: result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)
                .in_call("cublasLtMatmulDescCreate")?,
            x: ptr::null_mut(),
            w: ptr::null_mut(),
            y: ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace_bytes: 0,
        };
        plan.x = layout(CUDA_R_16BF, inner, rows)?;
        plan.w = layout(CUDA_R_16BF, inner, out)?;
        plan.y = layout(if f32_out { CUDA_R_32F } else { CUDA_R_16BF }, out, rows)?;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32)?; // CUBLAS_OP_T
        if biased {
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &CUBLASLT_EPILOGUE_BIAS)?;
            // The address is not known yet. The heuristic uses its alignment only.
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &64u64)?;
        }
        plan.select_algorithm(handle, shape)?;
        Ok(plan)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the descriptor is alive, and the size is that of the value.
        unsafe {
            result::set_matmul_desc_attribute(self.operation, attribute, ptr::from_ref(value).cast(), size_of::<T>())
        }
        .in_call("cublasLtMatmulDescSetAttribute")
    }

    /// Stores the first algorithm of the library's heuristic.
    fn select_algorithm(&mut self, handle: sys::cublasLtHandle_t, shape: Shape) -> Result<()> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as MAX_BYTES,
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK as SCHEMES,
        };
        // Partial sums of a split product are added in f32. By default they may be added in the type of the result.
        const COMPUTE_TYPE: u32 = 2; // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
        let preference = result::create_matmul_pref().in_call("cublasLtMatmulPreferenceCreate")?;
        // SAFETY: descriptors are alive; sizes are those of the values; the preference is destroyed once.
        let found = unsafe {
            let (value, bytes) = (ptr::from_ref(&WORKSPACE_BYTES).cast(), size_of::<usize>());
            let schemes = ptr::from_ref(&COMPUTE_TYPE).cast();
            let found = result::set_matmul_pref_attribute(preference, MAX_BYTES, value, bytes)
                .and_then(|()| result::set_matmul_pref_attribute(preference, SCHEMES, schemes, size_of::<u32>()))
                .and_then(|()| {
                    let (w, x, y) = (self.w, self.x, self.y);
                    result::get_matmul_algo_heuristic(handle, self.operation, w, x, y, y, preference)
                });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        let found = found.map_err(|CublasError(status)| Error::Driver {
            call: "cublasLtMatmulAlgoGetHeuristic",
            name: format!("{status:?}"),
            message: format!("no algorithm for {shape:?}"),
        })?;
        (self.algorithm, self.workspace_bytes) = (found.algo, found.workspaceSize);
        Ok(())
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was created once, or is null, and is not used any more. On failure the library keeps it.
        unsafe {
            for layout in [self.x, self.w, self.y].into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        if self.stream.device().bind().is_ok() {
            // Launched products may still run.
            let _ = self.stream.synchronize();
            // SAFETY: created once. On failure the library keeps it.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

impl fmt::Debug for Blas {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Blas").field("plans", &self.plans.len()).finish_non_exhaustive()
    }
}

/// Measures the floating-point operations per second of a large bf16 product: the roof of products of many rows.
///
/// Multiplies two matrices `[size, size]`, once untimed and then `repetitions` times, at least once. Returns the rate of the
/// median time; one MAC counts as two operations. Synchronises with the device.
///
/// # Errors
/// As [`Blas::new`] and [`Stream::time_ms`]; the driver's, for example when there is no memory for three matrices.
pub fn matrix_rate(device: &Device, size: usize, repetitions: usize) -> Result<f64> {
    let stream = device.stream()?;
    let _settle = stream.sync_on_drop();
    let mut blas = Blas::new(&stream)?;
    // Zeros would draw less power and run faster than real data. Any values around 1 are suitable.
    let mut state = 1u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (mantissa, sign) = ((state >> 25) as u16, (state >> 8) as u16 & 1);
        bf16::from_bits(sign << 15 | 0x3f00 | mantissa)
    };
    let numbers: Vec<bf16> = (0..size * size).map(|_| number()).collect();
    let (x, w, y) = (stream.upload(&numbers)?, stream.upload(&numbers)?, stream.zeros::<bf16>(size * size)?);
    let shape = Shape { rows: size, out: size, inner: size, f32_out: false, biased: false };
    let mut times = Vec::new();
    for _ in 0..=repetitions.max(1) {
        // SAFETY: distinct buffers of these sizes, of this stream, alive until the synchronisation in `time_ms`.
        times.push(stream.time_ms(|| unsafe { blas.launch(shape, x.address(), w.address(), 0, y.address()) })?);
    }
    times.remove(0);
    times.sort_by(f32::total_cmp);
    let median = f64::from(times[times.len() / 2]) / 1e3;
    Ok(2.0 * (size as f64).powi(3) / median)
}
