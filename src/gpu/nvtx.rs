//! NVTX ranges, which profilers show above the work that a thread enqueues. Without the feature `nvtx` ranges compile to
//! nothing.
//!
//! A profiler names its library in `NVTX_INJECTION64_PATH`. The first range loads the library and passes it a table of slots,
//! which the library fills with its functions. This is the program's half of NVTX 3, which NVIDIA ships as C headers
//! (`nvtxDetail/nvtxInit.h` and `nvtxTypes.h` of github.com/NVIDIA/NVTX).
//!
//! Nothing is linked and no library needs to be installed, which is why cudarc's `nvtx` module is not used. Without the
//! variable a range is one load. A library that cannot be loaded, or refuses, counts as absent, as with those headers.

use std::marker::PhantomData;

/// NVTX range of the current thread, which ends when this is dropped. Ranges of one thread are nested.
#[must_use = "the range ends when this is dropped"]
pub(crate) struct Range {
    /// Whether the range was pushed to a profiler.
    #[cfg(feature = "nvtx")]
    pushed: bool,
    /// Keeps the range on the thread that it began on.
    thread: PhantomData<*const ()>,
}

/// Begins a range named `name`.
pub(crate) fn range(name: &str) -> Range {
    range_of(|| name.into())
}

/// Begins a range. `name` is called only when a profiler is attached.
pub(crate) fn range_of(name: impl FnOnce() -> String) -> Range {
    #[cfg(feature = "nvtx")]
    return Range { pushed: attached::tool().is_some_and(|tool| tool.push(&name())), thread: PhantomData };
    #[cfg(not(feature = "nvtx"))]
    {
        let _ = name;
        Range { thread: PhantomData }
    }
}

#[cfg(feature = "nvtx")]
impl Drop for Range {
    fn drop(&mut self) {
        if let Some(tool) = attached::tool().filter(|_| self.pushed) {
            tool.pop();
        }
    }
}

#[cfg(feature = "nvtx")]
mod attached {
    use libloading::Library;
    use std::ffi::{CString, c_char, c_int, c_uint, c_void};
    use std::ptr;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicPtr, Ordering};

    const LIBRARY: &str =
        if cfg!(target_pointer_width = "64") { "NVTX_INJECTION64_PATH" } else { "NVTX_INJECTION32_PATH" };
    const VERSION: u32 = 3;

    // NvtxExportTableID
    const CALLBACKS: u32 = 1;
    const VERSION_INFO: u32 = 3;

    /// Number of callback ids per NvtxCallbackModule, including id 0, which means no callback.
    const IDS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
    const MAX_IDS: usize = 16;
    /// NVTX_CB_MODULE_CORE2, whose functions take a domain. A library may request and fill the other modules too.
    const CORE2: usize = 5;
    // NvtxCallbackIdCore2
    const DOMAIN_RANGE_PUSH_EX: usize = 4;
    const DOMAIN_RANGE_POP: usize = 5;
    const DOMAIN_CREATE_A: usize = 12;

    type Domain = *mut c_void;
    type Create = unsafe extern "system" fn(*const c_char) -> Domain;
    type Push = unsafe extern "system" fn(Domain, *const Attributes) -> c_int;
    type Pop = unsafe extern "system" fn(Domain) -> c_int;
    type GetExportTable = extern "system" fn(u32) -> *const c_void;
    type Initialize = unsafe extern "system" fn(GetExportTable) -> c_int;

    /// `nvtxEventAttributes_t`, with the payload as bits.
    #[repr(C)]
    struct Attributes {
        version: u16,
        size: u16,
        category: u32,
        color_type: i32,
        color: u32,
        payload_type: i32,
        reserved: i32,
        payload: u64,
        message_type: i32,
        message: *const c_char,
    }
    const _: () = assert!(size_of::<*const c_char>() == 4 || size_of::<Attributes>() == 48);
    const MESSAGE_ASCII: i32 = 1;

    /// `NvtxExportTableCallbacks`
    #[repr(C)]
    struct Callbacks {
        size: usize,
        get_module_function_table: extern "system" fn(c_int, *mut Table, *mut c_uint) -> c_int,
    }

    /// `NvtxExportTableVersionInfo`
    #[repr(C)]
    struct VersionInfo {
        size: usize,
        version: u32,
        reserved: u32,
        set_injection_version: extern "system" fn(u32),
    }

    /// Slot that the library fills with a function.
    type Slot = AtomicPtr<c_void>;
    /// `NvtxFunctionTable`: pointers to a module's slots, indexed by callback id.
    type Table = *const SlotPointer;

    #[repr(transparent)]
    struct SlotPointer(*const Slot);
    // SAFETY: it points to a static, or is null.
    unsafe impl Sync for SlotPointer {}
    // SAFETY: as above.
    unsafe impl Send for SlotPointer {}

    static SLOTS: [[Slot; MAX_IDS]; IDS.len()] =
        [const { [const { AtomicPtr::new(ptr::null_mut()) }; MAX_IDS] }; IDS.len()];

    /// Function table of a module: null at id 0 and after the last id.
    fn table(module: usize) -> Table {
        static TABLES: OnceLock<[[SlotPointer; MAX_IDS + 1]; IDS.len()]> = OnceLock::new();
        let pointer = |module: usize, id: usize| {
            SlotPointer(if (1..IDS[module]).contains(&id) { &SLOTS[module][id] } else { ptr::null() })
        };
        let tables = || std::array::from_fn(|module| std::array::from_fn(|id| pointer(module, id)));
        TABLES.get_or_init(tables)[module].as_ptr()
    }

    extern "system" fn get_module_function_table(module: c_int, out: *mut Table, out_size: *mut c_uint) -> c_int {
        let Some(module) = usize::try_from(module).ok().filter(|module| (1..IDS.len()).contains(module)) else {
            return 0;
        };
        // SAFETY: each is null or points to the library's variable for the result.
        unsafe {
            if let Some(out) = out.as_mut() {
                *out = table(module);
            }
            if let Some(size) = out_size.as_mut() {
                *size = IDS[module] as c_uint;
            }
        }
        1
    }

    extern "system" fn set_injection_version(_: u32) {}

    extern "system" fn get_export_table(id: u32) -> *const c_void {
        static CALLBACK_TABLE: Callbacks = Callbacks { size: size_of::<Callbacks>(), get_module_function_table };
        static VERSION_TABLE: VersionInfo =
            VersionInfo { size: size_of::<VersionInfo>(), version: VERSION, reserved: 0, set_injection_version };
        match id {
            CALLBACKS => (&raw const CALLBACK_TABLE).cast(),
            VERSION_INFO => (&raw const VERSION_TABLE).cast(),
            _ => ptr::null(),
        }
    }

    /// Functions of the attached profiler, and its handle of the domain `dllm`.
    pub struct Tool {
        domain: Domain,
        push: Push,
        pop: Pop,
    }
    // SAFETY: NVTX may be called from any thread, and a domain is not bound to a thread.
    unsafe impl Send for Tool {}
    // SAFETY: as above.
    unsafe impl Sync for Tool {}

    /// Returns the attached profiler, if there is one. The library is loaded at the first call.
    pub fn tool() -> Option<&'static Tool> {
        static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
        TOOL.get_or_init(attach).as_ref()
    }

    fn attach() -> Option<Tool> {
        let path = std::env::var_os(LIBRARY).filter(|path| !path.is_empty())?;
        // SAFETY: setting the variable is the user's consent to run the library's code in this process.
        let library = unsafe { Library::new(path) }.ok()?;
        // SAFETY: the type is that of NVTX 3.
        let initialize = *unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2") }.ok()?;
        // SAFETY: as above; the tables are static.
        if unsafe { initialize(get_export_table) } == 0 {
            return None;
        }
        std::mem::forget(library); // its functions are called from now on
        let callback =
            |id: usize| Some(SLOTS[CORE2][id].load(Ordering::Acquire)).filter(|function| !function.is_null());
        // SAFETY: NVTX 3 defines these types for these slots.
        let (push, pop) = unsafe {
            let push = std::mem::transmute::<*mut c_void, Push>(callback(DOMAIN_RANGE_PUSH_EX)?);
            (push, std::mem::transmute::<*mut c_void, Pop>(callback(DOMAIN_RANGE_POP)?))
        };
        let domain = callback(DOMAIN_CREATE_A).map_or(ptr::null_mut(), |create| {
            // SAFETY: as above; the name is a C string.
            unsafe { std::mem::transmute::<*mut c_void, Create>(create)(c"dllm".as_ptr()) }
        });
        Some(Tool { domain, push, pop })
    }

    impl Tool {
        /// Begins a range. Returns whether it has begun and must be ended by [`Tool::pop`].
        pub fn push(&self, name: &str) -> bool {
            let Ok(name) = CString::new(name.split('\0').next().unwrap_or_default()) else { return false };
            let attributes = Attributes {
                version: VERSION as u16,
                size: size_of::<Attributes>() as u16,
                category: 0,
                color_type: 0,
                color: 0,
                payload_type: 0,
                reserved: 0,
                payload: 0,
                message_type: MESSAGE_ASCII,
                message: name.as_ptr(),
            };
            // SAFETY: the library copies the attributes it keeps; the domain is the library's, or null.
            unsafe { (self.push)(self.domain, &attributes) };
            true
        }

        /// Ends the innermost range of this thread.
        pub fn pop(&self) {
            // SAFETY: the domain is the library's, or null.
            unsafe { (self.pop)(self.domain) };
        }
    }
}
