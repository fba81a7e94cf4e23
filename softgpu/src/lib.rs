//! A CUDA device in software, for tests: a driver and a cuBLASLt that run kernels on the host, loaded in place of the
//! real ones. See the README for what it checks and what it cannot show.
//!
//! ```no_run
//! use softgpu::Opt;
//!
//! softgpu::install(); // before the first CUDA call of the process
//! softgpu::set(Opt::Seed, 3);
//! // ... use the driver as usual ...
//! assert_eq!(softgpu::report(), "");
//! ```

/// Whether this target has the device: Linux on x86-64. Elsewhere [`install`] panics and [`active`] is false.
pub const SUPPORTED: bool = cfg!(softgpu_supported);

/// What can be set or read with [`set`] and [`get`].
///
/// Options of a thread hold for the calls that this thread makes, so that tests in parallel do not disturb each other.
/// Options of the process are best left to test files that have the process to themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Opt {
    /// Thread. The order in which blocks, warps and lanes take turns; 0 is the natural order. Every thread starts with
    /// `SOFTGPU_SEED`, or 0.
    Seed = 0,
    /// Thread. How many allocations succeed before one fails with out-of-memory; it counts down, and negative means
    /// that none fails.
    FailAlloc = 1,
    /// Thread. 1: fresh memory, and shared memory at the start of each block, is filled with 0xff bytes (NaN, -1).
    Poison = 2,
    /// Thread. Alignment of device memory in bytes; 16 at the start. The smaller, the closer the page that faults.
    Align = 3,
    /// Thread. 1: an allocation ends where a page that faults begins. 0: it begins at the beginning of a page.
    Guard = 4,
    /// Thread. 1: what goes into the report is not printed as well.
    Quiet = 5,
    /// Thread, a counter. Kernels run, those of graphs included. In lazy mode they count for the thread that waits.
    Launches = 6,
    /// Thread, a counter. Calls in which the host waits for the device: synchronisation, copies without a stream,
    /// downloads into memory that is not pinned, `cuMemFree`.
    BlockingCalls = 7,
    /// Process. 1: work on streams is put off until somebody waits for it. From `SOFTGPU_LAZY`, or 0.
    Lazy = 8,
    /// Process. Compute capability, 90 for 9.0. From `SOFTGPU_CC` (written `9.0`), or 90.
    ComputeCapability = 9,
    /// Process. Memory of the device in bytes; 8 GiB at the start.
    TotalMemory = 10,
    /// Process. Newest PTX version that the driver takes, 90 for 9.0.
    MaxPtx = 11,
    /// Process, a counter. Bytes of device memory in use.
    UsedMemory = 12,
    /// Process, a counter. Allocations of device memory that were not freed.
    LiveAllocations = 13,
    /// Thread. How many kernels run before one fails with an illegal address, those of graphs included; it counts down, and
    /// negative means that none fails. In lazy mode the thread that waits counts.
    FailKernel = 14,
    /// Thread, a counter. Calls that launch a kernel, those that are recorded included, those of graphs not.
    LaunchCalls = 15,
    /// Process. How many multiprocessors the device says it has; 132 at the start. Attention is cut into fewer parts, which takes
    /// less time here, where there are few.
    Multiprocessors = 16,
}

use std::path::{Path, PathBuf};
use std::process::Command;

#[cfg(softgpu_supported)]
mod loaded;

/// Makes the software device the one of this process. Must run before the first CUDA call; later calls do nothing.
///
/// # Panics
///
/// If another `libcuda.so` was loaded before, or if the target is not [`SUPPORTED`].
pub fn install() {
    #[cfg(softgpu_supported)]
    loaded::device();
    #[cfg(not(softgpu_supported))]
    panic!("the software device needs Linux on x86-64");
}

/// Whether the software device is the one of this process, that is, whether [`install`] was called.
pub fn active() -> bool {
    #[cfg(softgpu_supported)]
    return loaded::is_installed();
    #[cfg(not(softgpu_supported))]
    return false;
}

/// Sets an option, or sets a counter to a value to count on from. Installs the device if it is not yet.
pub fn set(option: Opt, value: i64) {
    #[cfg(softgpu_supported)]
    loaded::device().set(option, value);
    #[cfg(not(softgpu_supported))]
    panic!("there is no software device to set {option:?} to {value}");
}

/// The value of an option or a counter. Installs the device if it is not yet.
pub fn get(option: Opt) -> i64 {
    #[cfg(softgpu_supported)]
    return loaded::device().get(option);
    #[cfg(not(softgpu_supported))]
    panic!("there is no software device to ask for {option:?}");
}

/// Takes what the device found wrong in the calls of this thread since the last time: one line each, or nothing.
pub fn report() -> String {
    #[cfg(softgpu_supported)]
    return loaded::device().report();
    #[cfg(not(softgpu_supported))]
    return String::new();
}

/// The folder of the three libraries. A process that the loader sends there, as through `LD_LIBRARY_PATH`, has the software
/// device without any code of its own: the driver loads the kernels at `cuInit`.
///
/// With the feature `embed` the libraries are written to a new folder below the temporary one, once a process, and stay there.
///
/// # Panics
///
/// If the target is not [`SUPPORTED`].
pub fn library_dir() -> PathBuf {
    #[cfg(softgpu_supported)]
    return loaded::library_dir();
    #[cfg(not(softgpu_supported))]
    panic!("the software device needs Linux on x86-64");
}

/// Makes the software device that of the process which `command` starts: puts [`library_dir`] before what the child's
/// `LD_LIBRARY_PATH` would be, and has the device write what it finds wrong, in calls of any thread, to the file `report`,
/// a line each. What is not quiet goes to the child's stderr as well. The file is there, and empty at first, once the device
/// has started: where there is none, the child did not use it.
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

/// Names of all kernels that were built for the host, sorted.
pub fn kernel_names() -> Vec<String> {
    #[cfg(softgpu_supported)]
    return loaded::device().kernel_names();
    #[cfg(not(softgpu_supported))]
    return Vec::new();
}
