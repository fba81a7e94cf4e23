//! The CUDA kernels, one op a file: parameters and their checks, the plan of a launch, and two ways to launch.
//!
//! - [`crate::abi`] has the structs of parameters, the same that C callers fill: device addresses, shapes, strides.
//!   `validate` checks one, `plan` says what a launch of it takes (both pure), and the unsafe `launch_raw` launches it on a
//!   caller's stream: nothing is allocated, nothing waits, and it may be captured into a CUDA graph.
//! - The safe launch takes our own [`Buffer`]s and finds the rest in their lengths.
//!
//! All ops may be called from several threads. They know pointers and streams, no models.

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

/// What a launch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of workspace, zeroed before the first use; 0 for ops that need none.
    pub workspace_bytes: u64,
}

/// Launches what was planned.
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

/// Scratch memory of an op that needs some, made by the op's `workspace`. Every launch leaves it ready for the next, so that
/// a captured graph can be replayed.
pub struct Workspace {
    memory: Buffer<u8>,
    layout: Layout,
}

/// Where counters lie in a workspace: the op, and the sizes that this depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout(&'static str, [i32; 3]);

impl Workspace {
    /// Zeroed memory of the size that `plan` asks.
    fn new(stream: &Stream, plan: &Plan, layout: Layout) -> Result<Workspace> {
        let bytes = usize::try_from(plan.workspace_bytes)
            .map_err(|_| Error::argument("workspace_bytes", "a size that memory can have", plan.workspace_bytes))?;
        Ok(Workspace { memory: stream.zeros(bytes)?, layout })
    }
}

/// An element type of activations and weights.
pub trait Element: Pod {
    /// The type as a number of the ABI.
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
