//! Loading of the three libraries, and their functions.

use crate::Opt;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

pub struct Device {
    set: unsafe extern "C" fn(c_int, i64) -> c_int,
    get: unsafe extern "C" fn(c_int) -> i64,
    report: unsafe extern "C" fn() -> *const c_char,
    kernel_names: unsafe extern "C" fn() -> *const c_char,
}

static DEVICE: OnceLock<Device> = OnceLock::new();

pub fn device() -> &'static Device {
    DEVICE.get_or_init(load)
}

pub fn is_installed() -> bool {
    DEVICE.get().is_some()
}

fn open_file(path: &str) -> Library {
    // SAFETY: the library was built by this crate, or with its commands; its constructors only fill its own tables.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Opens the kernels of this build, or the library that `SOFTGPU_KERNELS` names.
fn open_kernels() -> Library {
    std::env::var("SOFTGPU_KERNELS").map_or_else(|_| open("kernels"), |path| open_file(&path))
}

#[cfg(not(feature = "embed"))]
fn open(name: &str) -> Library {
    open_file(&format!("{}/lib{name}.so", env!("OUT_DIR")))
}

#[cfg(not(feature = "embed"))]
pub fn library_dir() -> PathBuf {
    env!("OUT_DIR").into()
}

/// Contents of the libraries, in the order of their dependencies.
#[cfg(feature = "embed")]
const IMAGES: [(&str, &[u8]); 3] = [
    ("cuda", include_bytes!(concat!(env!("OUT_DIR"), "/libcuda.so"))),
    ("cublasLt", include_bytes!(concat!(env!("OUT_DIR"), "/libcublasLt.so"))),
    ("kernels", include_bytes!(concat!(env!("OUT_DIR"), "/libkernels.so"))),
];

#[cfg(feature = "embed")]
fn open(name: &str) -> Library {
    use std::ffi::c_uint;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd};

    unsafe extern "C" {
        fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    }

    let (_, image) = IMAGES.iter().find(|(known, _)| *known == name).expect("one of the three");
    // SAFETY: the name is a C string; the result is a new descriptor without another owner, or negative.
    let descriptor = unsafe { memfd_create(c"softgpu".as_ptr(), 0) };
    assert!(descriptor >= 0, "memfd_create failed");
    // SAFETY: see above.
    let mut file = unsafe { std::fs::File::from_raw_fd(descriptor) };
    file.write_all(image).expect("an anonymous file takes the library");
    let library = open_file(&format!("/proc/self/fd/{}", file.as_raw_fd()));
    // The loader treats a known path as the same library. Keeping the descriptor open makes every path unique.
    std::mem::forget(file);
    library
}

#[cfg(feature = "embed")]
pub fn library_dir() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let unpack = || {
        let of_this_process = std::env::temp_dir().join(format!("softgpu-{}", std::process::id()));
        // An earlier process may have left a folder of that name.
        let mut names = (0..1000).map(|n| of_this_process.with_extension(n.to_string()));
        let folder = names.find(|folder| std::fs::create_dir(folder).is_ok());
        let folder = folder.unwrap_or_else(|| panic!("{}: cannot create a folder", of_this_process.display()));
        for (name, image) in IMAGES {
            let file = folder.join(format!("lib{name}.so"));
            std::fs::write(&file, image).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
        folder
    };
    FOLDER.get_or_init(unpack).clone()
}

/// Loads the libraries in the order of their dependencies. A later search for `libcuda.so` or `libcublasLt.so` by name then
/// finds these, because the loader checks loaded libraries first.
fn load() -> Device {
    let cuda = open("cuda");
    let others = [open("cublasLt"), open_kernels()];

    // SAFETY: if this is not our library, it is one that the process has loaded already.
    let by_name = unsafe { Library::open(Some("libcuda.so"), RTLD_NOW) }.expect("libcuda.so is loaded");
    // SAFETY: the symbol is only looked up, not used.
    let is_ours = unsafe { by_name.get::<*const ()>(b"softgpu_start") }.is_ok();
    assert!(is_ours, "another libcuda.so was loaded before the CUDA emulator");

    // SAFETY: the types are those of the functions in cpp/driver/options.cpp and modules.cpp. The library is never
    // unloaded (see below), so the pointers stay valid.
    let device = unsafe {
        let start = *cuda.get::<unsafe extern "C" fn()>(b"softgpu_start").expect("softgpu_start");
        start();
        Device {
            set: *cuda.get(b"softgpu_set").expect("softgpu_set"),
            get: *cuda.get(b"softgpu_get").expect("softgpu_get"),
            report: *cuda.get(b"softgpu_report").expect("softgpu_report"),
            kernel_names: *cuda.get(b"softgpu_kernel_names").expect("softgpu_kernel_names"),
        }
    };
    std::mem::forget((cuda, others, by_name));
    device
}

/// # Safety
///
/// `text` is a C string that stays valid during the call.
unsafe fn owned(text: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl Device {
    pub fn set(&self, option: Opt, value: i64) {
        // SAFETY: any number is allowed.
        let result = unsafe { (self.set)(option as c_int, value) };
        assert_eq!(result, 0, "{option:?} is unknown to the library");
    }

    pub fn get(&self, option: Opt) -> i64 {
        // SAFETY: any number is allowed.
        unsafe { (self.get)(option as c_int) }
    }

    pub fn report(&self) -> String {
        // SAFETY: the text belongs to this thread and lives until its next call.
        unsafe { owned((self.report)()) }
    }

    pub fn kernel_names(&self) -> Vec<String> {
        // SAFETY: the text belongs to this thread and lives until its next call.
        unsafe { owned((self.kernel_names)()) }.lines().map(str::to_owned).collect()
    }
}
