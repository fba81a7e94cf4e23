//! NVTX ranges, which profilers show above the work that a thread puts in. Feature `nvtx`; without it nothing is left of them.
//!
//! A profiler names a library in `NVTX_INJECTION64_PATH`. The first range loads it and hands it a table of places, into which
//! it puts its functions: the program's half of NVTX 3, which NVIDIA gives as C headers (`nvtxDetail/nvtxInit.h` and
//! `nvtxTypes.h` of github.com/NVIDIA/NVTX). Nothing is linked, no compiler is needed, and without the variable a range
//! is one load. A library that cannot be loaded, or refuses, counts as none, as it does with those headers.

use std::marker::PhantomData;

/// A range of this thread, which ends when this goes. Ranges of a thread lie within one another.
#[must_use = "the range ends when this is dropped"]
pub(crate) struct Range {
    /// Whether a profiler was told of it.
    #[cfg(feature = "nvtx")]
    told: bool,
    /// It ends on the thread that it began on.
    thread: PhantomData<*const ()>,
}

/// Begins a range.
pub(crate) fn range(name: &str) -> Range {
    range_of(|| name.into())
}

/// Begins a range whose name takes work; nobody does it where nobody looks.
pub(crate) fn range_of(name: impl FnOnce() -> String) -> Range {
    #[cfg(feature = "nvtx")]
    return Range { told: attached::tool().is_some_and(|tool| tool.push(&name())), thread: PhantomData };
    #[cfg(not(feature = "nvtx"))]
    {
        let _ = name;
        Range { thread: PhantomData }
    }
}

#[cfg(feature = "nvtx")]
impl Drop for Range {
    fn drop(&mut self) {
        if let Some(tool) = attached::tool().filter(|_| self.told) {
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

    /// By NvtxCallbackModule: how many ids the module has, with 0, which is none.
    const IDS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
    const MOST_IDS: usize = 16;
    /// NVTX_CB_MODULE_CORE2, whose functions know domains. A library may ask for the other modules, and fill them too.
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

    /// `nvtxEventAttributes_t`, with the payload as its bits.
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

    /// Where the library puts a function.
    type Slot = AtomicPtr<c_void>;
    /// `NvtxFunctionTable`: pointers to a module's slots by id.
    type Table = *const Place;

    #[repr(transparent)]
    struct Place(*const Slot);
    // SAFETY: it points to a static, or is null.
    unsafe impl Sync for Place {}
    // SAFETY: as above.
    unsafe impl Send for Place {}

    static SLOTS: [[Slot; MOST_IDS]; IDS.len()] =
        [const { [const { AtomicPtr::new(ptr::null_mut()) }; MOST_IDS] }; IDS.len()];

    /// The table of a module: none at 0, and none behind the last.
    fn table(module: usize) -> Table {
        static PLACES: OnceLock<[[Place; MOST_IDS + 1]; IDS.len()]> = OnceLock::new();
        let place = |module: usize, id: usize| match (1..IDS[module]).contains(&id) {
            true => Place(&SLOTS[module][id]),
            false => Place(ptr::null()),
        };
        let places = || std::array::from_fn(|module| std::array::from_fn(|id| place(module, id)));
        PLACES.get_or_init(places)[module].as_ptr()
    }

    extern "system" fn get_module_function_table(module: c_int, out: *mut Table, out_size: *mut c_uint) -> c_int {
        let Some(module) = usize::try_from(module).ok().filter(|module| (1..IDS.len()).contains(module)) else {
            return 0;
        };
        // SAFETY: the library's places for the answers, where it wants them.
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

    /// A profiler's functions, and the domain `dllm` in it.
    pub struct Tool {
        domain: Domain,
        push: Push,
        pop: Pop,
    }
    // SAFETY: NVTX may be called from any thread, and a domain belongs to none.
    unsafe impl Send for Tool {}
    // SAFETY: as above.
    unsafe impl Sync for Tool {}

    /// The profiler that is attached, if one is; looked for once.
    pub fn tool() -> Option<&'static Tool> {
        static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
        TOOL.get_or_init(attach).as_ref()
    }

    fn attach() -> Option<Tool> {
        let path = std::env::var_os(LIBRARY).filter(|path| !path.is_empty())?;
        // SAFETY: who sets the variable wants the library's code to run in this process.
        let library = unsafe { Library::new(path) }.ok()?;
        // SAFETY: the type is that of NVTX 3.
        let initialize = *unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2") }.ok()?;
        // SAFETY: as above; the tables are static.
        if unsafe { initialize(get_export_table) } == 0 {
            return None;
        }
        std::mem::forget(library); // its functions are called from now on
        let given = |id: usize| Some(SLOTS[CORE2][id].load(Ordering::Acquire)).filter(|function| !function.is_null());
        // SAFETY: what the library puts into these places has these types.
        let (push, pop) = unsafe {
            let push = std::mem::transmute::<*mut c_void, Push>(given(DOMAIN_RANGE_PUSH_EX)?);
            (push, std::mem::transmute::<*mut c_void, Pop>(given(DOMAIN_RANGE_POP)?))
        };
        let domain = given(DOMAIN_CREATE_A).map_or(ptr::null_mut(), |create| {
            // SAFETY: as above; the name is a C string.
            unsafe { std::mem::transmute::<*mut c_void, Create>(create)(c"dllm".as_ptr()) }
        });
        Some(Tool { domain, push, pop })
    }

    impl Tool {
        /// Whether the range has begun, so that it has to end.
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
            // SAFETY: the library copies what it keeps; the domain is its own, or none.
            unsafe { (self.push)(self.domain, &attributes) };
            true
        }

        pub fn pop(&self) {
            // SAFETY: the domain is the library's own, or none.
            unsafe { (self.pop)(self.domain) };
        }
    }
}
