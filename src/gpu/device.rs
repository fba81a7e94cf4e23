use super::{DriverResult, Module, nvtx};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A CUDA device, opened through its primary context, which the CUDA runtime and PyTorch use too.
///
/// Clones refer to the same opened device, and may be used from several threads. Streams, buffers and graphs hold one.
/// Dropping the last clone synchronises with the device and unloads the modules. Calls leave the primary context current
/// on the calling thread.
///
/// Kernel modules are loaded on first use. The first launch of an op therefore takes longer, and must not be captured in a
/// graph: call [`Device::preload`] before a capture.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    context: Arc<CudaContext>,
    capability: (i32, i32),
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Handle<sys::CUmodule>>,
    /// Functions by module and kernel.
    functions: HashMap<(&'static str, &'static str), Handle<sys::CUfunction>>,
}

/// Driver handle that may be used from any thread.
#[derive(Clone, Copy)]
struct Handle<T>(T);
// SAFETY: modules and functions are not bound to threads (CUDA driver API, module management).
unsafe impl<T> Send for Handle<T> {}

/// Kernel and launch configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Name of the `.cu` file.
    pub module: &'static str,
    /// Name of the kernel in it.
    pub kernel: &'static str,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: u32,
    /// Bytes of dynamic shared memory per block; the same in all launches of a kernel.
    pub shared_bytes: u32,
}

/// Bytes of dynamic shared memory that a kernel may use without an attribute.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

impl Device {
    /// Returns the number of devices; 0 when there is a driver but no device.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver; the driver's.
    pub fn count() -> Result<usize> {
        // SAFETY: only looks for the library. Any other call of cudarc panics where there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDevice("no CUDA driver: libcuda was not found".into()));
        }
        match result::init() {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            done => done.in_call("cuInit")?,
        }
        Ok(result::device::get_count().in_call("cuDeviceGetCount")?.max(0) as usize)
    }

    /// Opens the device with number `ordinal`, counted from 0.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver, without this device, or when its compute capability is below 8.0; the driver's.
    pub fn open(ordinal: usize) -> Result<Device> {
        let count = Device::count()?;
        if ordinal >= count {
            return Err(Error::NoDevice(format!("no CUDA device {ordinal}: the driver knows {count}")));
        }
        let context = CudaContext::new(ordinal).in_call("cuDevicePrimaryCtxRetain")?;
        // SAFETY: nothing was allocated yet. A buffer is used on one stream only, and captures need event tracking off.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().in_call("cuDeviceGetAttribute")?;
        if capability < (8, 0) {
            let (major, minor) = capability;
            return Err(Error::NoDevice(format!(
                "CUDA device {ordinal} has compute capability {major}.{minor}; the kernels need 8.0"
            )));
        }
        Ok(Device { inner: Arc::new(Inner { context, capability, loaded: Mutex::default() }) })
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// Returns the name that the driver reports.
    pub fn name(&self) -> Result<String> {
        self.inner.context.name().in_call("cuDeviceGetName")
    }

    /// Returns the compute capability: major, minor.
    pub fn capability(&self) -> (i32, i32) {
        self.inner.capability
    }

    /// Returns the number of multiprocessors, at least 1.
    pub fn multiprocessors(&self) -> Result<usize> {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        self.inner.context.attribute(COUNT).in_call("cuDeviceGetAttribute").map(|count| count.max(1) as usize)
    }

    /// Returns the bytes of device memory: free, total. Freed buffers count as free after their stream was synchronised.
    pub fn memory_bytes(&self) -> Result<(usize, usize)> {
        self.inner.context.mem_get_info().in_call("cuMemGetInfo")
    }

    /// Loads all kernels that this device can run. Without this call each kernel is loaded at its first launch.
    ///
    /// # Errors
    /// [`Error::Module`] when the driver refuses a module; the driver's.
    pub fn preload(&self) -> Result<()> {
        let _range = nvtx::range("preload");
        self.bind()?;
        for module in Module::all() {
            if Module::choose(module.name, self.capability()).is_some_and(|chosen| chosen.target == module.target) {
                let loaded = self.module(&mut self.loaded(), module.name)?;
                for kernel in module.kernels() {
                    self.resolve(loaded, kernel)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the primary context current on this thread.
    pub(super) fn bind(&self) -> Result<()> {
        self.inner.context.bind_to_thread().in_call("cuCtxSetCurrent")
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, Loaded> {
        // Entries are only added, each as a whole, so a panic cannot leave the maps inconsistent.
        self.inner.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn module(&self, loaded: &mut Loaded, name: &'static str) -> Result<sys::CUmodule> {
        if let Some(module) = loaded.modules.get(name) {
            return Ok(module.0);
        }
        let capability = self.capability();
        let chosen = Module::choose(name, capability).ok_or_else(|| {
            Error::unsupported(
                "the compute capability",
                &format!("one that module {name} is built for"),
                format!("{capability:?}"),
            )
        })?;
        let _range = nvtx::range_of(|| format!("load {name} ({})", chosen.target));
        let module = chosen.load()?;
        loaded.modules.insert(name, Handle(module));
        Ok(module)
    }

    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded();
        if let Some(function) = loaded.functions.get(&(launch.module, launch.kernel)) {
            return Ok(function.0);
        }
        let module = self.module(&mut loaded, launch.module)?;
        let function = self.resolve(module, launch.kernel)?;
        if launch.shared_bytes > DEFAULT_SHARED_BYTES {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            // SAFETY: the function was returned by the driver just now.
            unsafe { result::function::set_function_attribute(function, SHARED, launch.shared_bytes as i32) }
                .in_call("cuFuncSetAttribute")?;
        }
        loaded.functions.insert((launch.module, launch.kernel), Handle(function));
        Ok(function)
    }

    fn resolve(&self, module: sys::CUmodule, kernel: &str) -> Result<sys::CUfunction> {
        let name = CString::new(kernel).map_err(|e| Error::argument("kernel", "a name without zero bytes", e))?;
        // SAFETY: the module stays loaded as long as this device lives.
        unsafe { result::module::get_function(module, name) }.in_call("cuModuleGetFunction")
    }

    /// Enqueues a kernel whose one parameter is `params` on `stream`. Does not block; may be captured once the kernel is loaded.
    ///
    /// # Safety
    /// 1. `stream` is a stream of this device's primary context, or null for the legacy default stream.
    /// 2. `P` is the parameter type of the kernel, and the memory that `params` points to is as the op's `launch_raw` requires.
    pub(crate) unsafe fn launch<P: Copy>(&self, stream: *mut c_void, launch: Launch, params: &P) -> Result<()> {
        let [x, y, z] = launch.grid;
        let _range = nvtx::range_of(|| format!("{} {} {x}x{y}x{z}", launch.module, launch.kernel));
        self.bind()?;
        let function = self.function(&launch)?;
        let mut pointers = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: as promised by the caller; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared_bytes,
                stream.cast(),
                &mut pointers,
            )
        }
        .in_call("cuLaunchKernel")
    }
}

impl PartialEq for Device {
    /// Whether both are clones of one opened device.
    fn eq(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Device").field("ordinal", &self.inner.context.ordinal()).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return; // the context was destroyed, and its modules with it
        }
        // Launched kernels may still run. An error here belongs to work whose result was never requested.
        let _ = self.context.synchronize();
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        for module in loaded.modules.values() {
            // SAFETY: no function of the module is in use any more. On failure the context keeps the module.
            let _ = unsafe { result::module::unload(module.0) };
        }
    }
}

// Unit tests do not load the CUDA emulator.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_driver_is_an_error() {
        match Device::count() {
            // The machine has a driver, and perhaps no device.
            Ok(count) => {
                let error = Device::open(count).unwrap_err();
                assert!(matches!(error, Error::NoDevice(_)), "{error}");
            }
            Err(error) => {
                assert_eq!(error.to_string(), "no CUDA driver: libcuda was not found");
                assert!(matches!(Device::open(0), Err(Error::NoDevice(_))));
            }
        }
    }
}
