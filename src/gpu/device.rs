use super::{DriverResult, Module, Stream, nvtx};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A CUDA device, through its primary context: the one that the CUDA runtime, and so PyTorch, uses too.
///
/// Cheap to clone. Dropping the last clone (streams and buffers hold one) waits for the device's work and unloads the
/// modules. Launches and everything else here leave the primary context current on the calling thread.
///
/// Kernel modules are loaded on first use, so the first launch of an op takes longer and must not be
/// inside a graph capture: see [`Device::preload`].
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
    /// By module and kernel.
    functions: HashMap<(&'static str, &'static str), Handle<sys::CUfunction>>,
}

/// A driver's handle; the driver allows its use from any thread.
#[derive(Clone, Copy)]
struct Handle<T>(T);
// SAFETY: modules and functions are not bound to threads (CUDA driver API, module management).
unsafe impl<T> Send for Handle<T> {}

/// What a launch needs besides its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Name of the `.cu` file.
    pub module: &'static str,
    /// Name of the kernel in it.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes; the same in every launch of a kernel.
    pub shared_bytes: u32,
}

/// Dynamic shared memory that a kernel has without asking.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

impl Device {
    /// How many devices there are.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, [`Error::Driver`] when it fails; a driver without a device is no error.
    pub fn count() -> Result<usize> {
        // SAFETY: only looks for the library. Any other call of cudarc panics where there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unavailable("no CUDA driver: libcuda was not found".into()));
        }
        match result::init() {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
            done => done.of("cuInit")?,
        }
        Ok(result::device::get_count().of("cuDeviceGetCount")?.max(0) as usize)
    }

    /// The device with this number, from 0.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, without this device, or when its compute capability is below 8.0.
    pub fn open(ordinal: usize) -> Result<Device> {
        let count = Device::count()?;
        if ordinal >= count {
            return Err(Error::Unavailable(format!("no CUDA device {ordinal}: the driver knows {count}")));
        }
        let context = CudaContext::new(ordinal).of("cuDevicePrimaryCtxRetain")?;
        // SAFETY: before the first allocation. Buffers belong to one stream, and graphs need it off.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().of("cuDeviceGetAttribute")?;
        if capability < (8, 0) {
            let (major, minor) = capability;
            return Err(Error::Unavailable(format!(
                "CUDA device {ordinal} has compute capability {major}.{minor}; the kernels need 8.0"
            )));
        }
        Ok(Device { inner: Arc::new(Inner { context, capability, loaded: Mutex::default() }) })
    }

    /// Its name, as the driver tells it.
    pub fn name(&self) -> Result<String> {
        self.inner.context.name().of("cuDeviceGetName")
    }

    /// Compute capability: major, minor.
    pub fn capability(&self) -> (i32, i32) {
        self.inner.capability
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> Result<usize> {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        self.inner.context.attribute(COUNT).of("cuDeviceGetAttribute").map(|count| count.max(1) as usize)
    }

    /// Bytes of memory: free, total.
    pub fn memory_bytes(&self) -> Result<(usize, usize)> {
        self.inner.context.mem_get_info().of("cuMemGetInfo")
    }

    /// A new stream.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream::new(self.clone(), self.inner.context.new_stream().of("cuStreamCreate")?))
    }

    /// Loads every kernel that this device can run; without this, each is loaded at its first launch.
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

    /// Makes the context current on this thread.
    pub(super) fn bind(&self) -> Result<()> {
        self.inner.context.bind_to_thread().of("cuCtxSetCurrent")
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, Loaded> {
        // The maps are only ever added to, one whole entry at a time.
        self.inner.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn module(&self, loaded: &mut Loaded, name: &'static str) -> Result<sys::CUmodule> {
        if let Some(module) = loaded.modules.get(name) {
            return Ok(module.0);
        }
        let capability = self.capability();
        let chosen = Module::choose(name, capability)
            .ok_or_else(|| Error::Unavailable(format!("no kernel module {name} for capability {capability:?}")))?;
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
        if launch.shared_bytes > UNASKED_SHARED_BYTES {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            // SAFETY: the function was just got.
            unsafe { result::function::set_function_attribute(function, SHARED, launch.shared_bytes as i32) }
                .of("cuFuncSetAttribute")?;
        }
        loaded.functions.insert((launch.module, launch.kernel), Handle(function));
        Ok(function)
    }

    fn resolve(&self, module: sys::CUmodule, kernel: &str) -> Result<sys::CUfunction> {
        let name = CString::new(kernel).map_err(|e| Error::Unavailable(e.to_string()))?;
        // SAFETY: the module stays loaded as long as this device is there.
        unsafe { result::module::get_function(module, name) }.of("cuModuleGetFunction")
    }

    /// Launches a kernel whose one parameter is `params`. Leaves this device's context current on the thread.
    ///
    /// # Safety
    /// 1. `stream` is a stream of this device's primary context, or null for the legacy default stream.
    /// 2. `params` is the parameter type of the kernel, and what it points to is as its op demands.
    pub(crate) unsafe fn launch<P: Copy>(&self, stream: *mut c_void, launch: Launch, params: &P) -> Result<()> {
        let [x, y, z] = launch.grid;
        let _range = nvtx::range_of(|| format!("{} {} {x}x{y}x{z}", launch.module, launch.kernel));
        self.bind()?;
        let function = self.function(&launch)?;
        let mut pointers = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: by the caller's word; the driver copies the parameters before it returns.
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
        .of("cuLaunchKernel")
    }
}

impl PartialEq for Device {
    /// Whether both stand for the same opened device.
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
            return; // the context is gone, and its modules with it
        }
        // What was launched may still run. An error here is of work that nobody has waited for.
        let _ = self.context.synchronize();
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        for module in loaded.modules.values() {
            // SAFETY: nobody holds a function of it any more. A failure leaves the module to the context.
            let _ = unsafe { result::module::unload(module.0) };
        }
    }
}
