//! CUDA emulator for tests: a driver and a cuBLASLt that run kernels on the host, loaded in place of the real ones. The
//! README lists the checks that it makes and its limits.
//!
//! ```no_run
//! use softgpu::Opt;
//!
//! softgpu::install(); // before the first CUDA call of the process
//! softgpu::set(Opt::Seed, 3);
//! // ... use the driver as usual ...
//! assert_eq!(softgpu::report(), "");
//! ```

/// Whether the emulator supports this target: Linux on x86-64. Elsewhere [`install`] panics and [`active`] is false.
pub const SUPPORTED: bool = cfg!(softgpu_supported);

/// Options and counters, for [`set`] and [`get`].
///
/// Options of a thread hold for the calls of that thread, so that parallel tests do not disturb each other. Options of the
/// process belong in test files whose tests share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Opt {
    /// Thread. Seed of the order of blocks, warps and lanes; 0 is the natural order. Initially `SOFTGPU_SEED`, or 0.
    Seed = 0,
    /// Thread. Number of allocations that succeed before one fails with out-of-memory; counts down. Negative: none fails.
    FailAlloc = 1,
    /// Thread. 1: fresh memory, and shared memory at the start of each block, is filled with bytes 0xff (NaN, -1).
    Poison = 2,
    /// Thread. Alignment of device memory in bytes, initially 16. A smaller one puts allocations closer to the guard page.
    Align = 3,
    /// Thread. 1: an allocation ends at a guard page. 0: it starts at the start of a page.
    Guard = 4,
    /// Thread. 1: lines of the report are not printed to stderr.
    Quiet = 5,
    /// Thread, counter. Kernels run, including those of graphs. In lazy mode they count for the thread that waits.
    Launches = 6,
    /// Thread, counter. Calls in which the host waits for the device: synchronisation, copies without a stream, downloads to
    /// memory that is not pinned, `cuMemFree`.
    BlockingCalls = 7,
    /// Process. 1: work on streams is deferred until the host waits for it. Initially `SOFTGPU_LAZY`, or 0.
    Lazy = 8,
    /// Process. Compute capability, 90 for 9.0. Initially `SOFTGPU_CC` (written `9.0`), or 90.
    ComputeCapability = 9,
    /// Process. Memory of the device in bytes, initially 8 GiB.
    TotalMemory = 10,
    /// Process. Newest PTX version that the driver accepts, 90 for 9.0.
    MaxPtx = 11,
    /// Process, counter. Bytes of device memory in use.
    UsedMemory = 12,
    /// Process, counter. Allocations of device memory that were not freed.
    LiveAllocations = 13,
    /// Thread. Number of kernels, including those of graphs, that run before one fails with an illegal address; counts down.
    /// Negative: none fails. In lazy mode kernels count for the thread that waits.
    FailKernel = 14,
    /// Thread, counter. Calls that launch a kernel, including captured ones, without replays of graphs.
    LaunchCalls = 15,
    /// Process. Number of multiprocessors that the device reports, initially 132. With fewer, attention uses fewer splits and
    /// takes less time here.
    Multiprocessors = 16,
}

use std::path::{Path, PathBuf};
use std::process::Command;

#[cfg(softgpu_supported)]
mod loaded;

/// Makes the CUDA emulator the device of this process. Must run before the first CUDA call; later calls do nothing.
///
/// # Panics
///
/// If another `libcuda.so` was loaded before, or if the target is not [`SUPPORTED`].
pub fn install() {
    #[cfg(softgpu_supported)]
    loaded::device();
    #[cfg(not(softgpu_supported))]
    panic!("the CUDA emulator needs Linux on x86-64");
}

/// Whether the CUDA emulator is the device of this process, that is, whether [`install`] was called.
pub fn active() -> bool {
    #[cfg(softgpu_supported)]
    return loaded::is_installed();
    #[cfg(not(softgpu_supported))]
    return false;
}

/// Sets an option, or the current value of a counter. Installs the emulator if necessary.
pub fn set(option: Opt, value: i64) {
    #[cfg(softgpu_supported)]
    loaded::device().set(option, value);
    #[cfg(not(softgpu_supported))]
    panic!("cannot set {option:?} to {value}: the CUDA emulator needs Linux on x86-64");
}

/// Returns the value of an option or a counter. Installs the emulator if necessary.
pub fn get(option: Opt) -> i64 {
    #[cfg(softgpu_supported)]
    return loaded::device().get(option);
    #[cfg(not(softgpu_supported))]
    panic!("cannot read {option:?}: the CUDA emulator needs Linux on x86-64");
}

/// Takes the report of this thread: one line per problem found in its calls since the last report; empty if there is none.
pub fn report() -> String {
    #[cfg(softgpu_supported)]
    return loaded::device().report();
    #[cfg(not(softgpu_supported))]
    return String::new();
}

/// Returns the folder of the three libraries. A process whose loader searches it, for example through `LD_LIBRARY_PATH`, uses
/// the emulator without any code of its own: the driver loads the kernels at `cuInit`.
///
/// With the feature `embed` the libraries are written, once per process, to a new folder in the temporary folder. They are not
/// deleted.
///
/// # Panics
///
/// If the target is not [`SUPPORTED`].
pub fn library_dir() -> PathBuf {
    #[cfg(softgpu_supported)]
    return loaded::library_dir();
    #[cfg(not(softgpu_supported))]
    panic!("the CUDA emulator needs Linux on x86-64");
}

/// Makes the CUDA emulator the device of the process that `command` starts.
///
/// Prepends [`library_dir`] to the child's `LD_LIBRARY_PATH`. The emulator writes the reports of all threads to the file
/// `report`, and, unless [`Opt::Quiet`] is set, to the child's stderr. It creates the file, empty, when it starts: if there is
/// no file, the child did not use it.
///
/// # Panics
///
/// If the target is not [`SUPPORTED`].
pub fn lend(command: &mut Command, report: &Path) {
    let own = command.get_envs().find(|(name, _)| *name == "LD_LIBRARY_PATH").map(|(_, value)| value.map(Into::into));
    let paths = own.unwrap_or_else(|| std::env::var_os("LD_LIBRARY_PATH")).unwrap_or_default();
    // An empty entry would be the current folder.
    let paths = std::env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty());
    let joined =
        std::env::join_paths([library_dir()].into_iter().chain(paths)).expect("no folder has a colon in its name");
    command.env("LD_LIBRARY_PATH", joined).env("SOFTGPU_REPORT", report);
}

/// Returns the names of all kernels built for the host, sorted.
pub fn kernel_names() -> Vec<String> {
    #[cfg(softgpu_supported)]
    return loaded::device().kernel_names();
    #[cfg(not(softgpu_supported))]
    return Vec::new();
}
