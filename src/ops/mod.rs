//! CUDA ops, one per file: parameter checks, launch plan, and two launch functions.
//!
//! - `launch_raw` (unsafe) takes a parameter struct of [`crate::abi`], as C callers fill it: device addresses, shapes, strides.
//!   It enqueues the op on a stream of the caller.
//! - `launch` (safe) takes [`Buffer`]s and derives addresses and sizes from them.
//! - `validate` checks a parameter struct, and `plan` returns its kernel, grid and workspace size. Both are pure functions.
//!
//! Common to all ops:
//! - A launch allocates nothing, does not synchronise and reads nothing back. It may be captured in a CUDA graph once the
//!   kernel is loaded ([`Device::preload`]). Errors of the kernel are reported by later calls on the stream.
//! - Launches may come from several threads.
//! - Matrices are row-major. Rows and addresses of matrices are aligned to 16 bytes.
//! - Launches cover `max_rows` rows. The number of rows that are computed is read on the device, so that it may change between
//!   replays of a graph.
//! - Contents of device memory, such as indices, are checked by the kernels. Where a `failed` flag is given, an invalid index sets it
//!   to `DLLM_INDEX_FAILED` (-2).
//!
//! Ops depend on device memory and streams only, not on models. Three modules are not ops of the runner: [`tiles`] (helper
//! that builds lists for [`attention`]), [`merge_state`] (for engine authors) and [`read_bandwidth`] (a measurement).

pub mod advance;
pub mod attention;
mod buffers;
pub mod embed;
pub mod gather_scatter;
pub mod merge_state;
pub mod norm;
pub mod read_bandwidth;
pub mod rope;
pub mod swiglu;
pub mod tiles;
pub mod top_k_top_p;
pub mod unmask;
mod validate;
pub mod vverify;

use crate::error::{Error, Result};
use crate::gpu::{Buffer, Launch, Stream};
use crate::{abi, gpu::Device};
use bytemuck::Pod;
use half::{bf16, f16};
use std::ffi::c_void;

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
    /// Bytes of workspace, to be zeroed before the first use; 0 for ops without workspace.
    pub workspace_bytes: u64,
}

/// Enqueues the planned kernel.
///
/// # Safety
/// As the op's `launch_raw`.
unsafe fn launch<P: Copy>(
    device: &Device,
    stream: *mut c_void,
    module: &'static str,
    plan: Plan,
    params: &P,
) -> Result<()> {
    let Plan { kernel, grid, block, .. } = plan;
    // SAFETY: as promised by the caller.
    unsafe { device.launch(stream, Launch { module, kernel, grid, block, shared_bytes: 0 }, params) }
}

/// Workspace in device memory, allocated by the op's `workspace` function. Every launch restores its counters to zero, so that
/// it can be used by the next launch, or a replay of a captured graph. At most one launch at a time may use it.
pub struct Workspace {
    memory: Buffer<u8>,
    layout: WorkspaceLayout,
}

/// Layout of the counters in a workspace: the op, and the sizes that the layout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WorkspaceLayout(&'static str, [i32; 3]);

impl Workspace {
    /// Allocates zeroed memory of the size in `plan`.
    fn new(stream: &Stream, plan: &Plan, layout: WorkspaceLayout) -> Result<Workspace> {
        let bytes = usize::try_from(plan.workspace_bytes)
            .map_err(|_| Error::argument("workspace_bytes", "a size that memory can have", plan.workspace_bytes))?;
        Ok(Workspace { memory: stream.zeros(bytes)?, layout })
    }
}

/// Element type of activations and weights: bf16, f16 or f32. Each op documents the types it takes.
pub trait Element: Pod {
    /// Value of the type in the ABI.
    const DTYPE: abi::dllm_dtype;
}
impl Element for bf16 {
    const DTYPE: abi::dllm_dtype = abi::DLLM_BF16;
}
impl Element for f16 {
    const DTYPE: abi::dllm_dtype = abi::DLLM_F16;
}
impl Element for f32 {
    const DTYPE: abi::dllm_dtype = abi::DLLM_F32;
}
