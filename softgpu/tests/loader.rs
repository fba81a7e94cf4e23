//! Modules: the driver's reading of PTX texts, and the texts that it refuses.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{assert_reported, code, entry, gpu, ptx_text, shape};
use cudarc::driver::sys::{self, CUjit_option, CUresult};
use cudarc::nvrtc::Ptx;
use std::ffi::{CStr, CString, c_void};

const SAXPY: &[u32] = &[4, 4, 8, 8];

#[test]
fn versions_and_targets() {
    let gpu = gpu();
    let good = ptx_text(&[entry("saxpy", SAXPY)]);
    let load = |text: String| code(gpu.context.load_module(Ptx::from_src(text)));
    assert_eq!(load(good.clone()), CUresult::CUDA_SUCCESS);
    assert_eq!(load(good.replace("sm_80", "sm_90a")), CUresult::CUDA_SUCCESS);
    assert_eq!(load(good.replace("sm_80", "sm_100")), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(load(good.replace("sm_80", "sm_80a")), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(load(good.replace(".version 8.0", ".version 9.5")), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    assert_eq!(load("hello".into()), CUresult::CUDA_ERROR_INVALID_PTX);
    softgpu::report();
}

#[test]
fn functions_of_a_module() {
    let gpu = gpu();
    let mut sum = entry("block_sum", &[24]);
    sum.max_threads = Some(256);
    sum.shared_bytes = 128;
    let text = ptx_text(&[entry("saxpy", SAXPY), sum, entry("only_on_gpus", &[8])]);
    let module = gpu.context.load_module(Ptx::from_src(text)).unwrap();
    let function = module.load_function("block_sum").unwrap();
    assert_eq!(function.max_threads_per_block().unwrap(), 256);
    assert_eq!(function.shared_size_bytes().unwrap(), 128);
    assert_eq!(function.occupancy_max_active_blocks_per_multiprocessor(256, 0, None).unwrap(), 8);

    assert_eq!(code(module.load_function("nothing")), CUresult::CUDA_ERROR_NOT_FOUND);
    assert_reported("no kernel named nothing");
    let without_twin = module.load_function("only_on_gpus").unwrap();
    assert_eq!(code(launch!(gpu, without_twin, shape(1, 1), &0u64)), CUresult::CUDA_ERROR_NOT_SUPPORTED);
    assert_reported("only_on_gpus was not built for the host");
    assert!(softgpu::kernel_names().contains(&"saxpy".to_owned()));
}

/// Reads parameters in every form that compilers write.
#[test]
fn parameter_declarations() {
    let gpu = gpu();
    let head = ".version 8.0\n.target sm_80\n.visible .entry saxpy(\n";
    let body = "\n)\n{\n\tret;\n}\n";
    let load = |params: &str| {
        let module = gpu.context.load_module(Ptx::from_src(format!("{head}{params}{body}"))).unwrap();
        code(module.load_function("saxpy"))
    };
    let good = ".param .u32 saxpy_param_0,\n.param .f32 saxpy_param_1,\n.param .u64 .ptr .global .align 4 saxpy_param_2,\n\
                .param .align 8 .b8 saxpy_param_3[8]";
    assert_eq!(load(good), CUresult::CUDA_SUCCESS);
    assert_eq!(load(&good.replace("[8]", "[16]")), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_reported("parameters of the PTX and of the host build differ: sizes (4, 4, 8, 16) and (4, 4, 8, 8)");
    assert_eq!(load(&good.replace(".f32", ".f64")), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_eq!(load(".param .u32 saxpy_param_0"), CUresult::CUDA_ERROR_INVALID_PTX);
    softgpu::report();
}

#[test]
fn error_log_of_the_compiler() {
    let gpu = gpu();
    let load = |text: String| {
        let text = CString::new(text).unwrap();
        let mut log = [1u8; 256];
        let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), log.len() as *mut c_void];
        let mut module = std::ptr::null_mut();
        // SAFETY: the buffers live during the call and their lengths are given.
        let status = unsafe {
            let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
            sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options, values)
        };
        (status, CStr::from_bytes_until_nul(&log).unwrap().to_str().unwrap().to_owned())
    };
    gpu.context.bind_to_thread().unwrap();
    let good = ptx_text(&[entry("saxpy", SAXPY)]);
    assert_eq!(load(good.clone()), (CUresult::CUDA_SUCCESS, String::new()));
    let (status, log) = load(good.replace("sm_80", "sm_100a"));
    assert_eq!(status, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_eq!(log, "a module for sm_100a does not run on a device of compute capability 9.0");
    softgpu::report();
}

#[test]
fn contexts() {
    let gpu = gpu();
    gpu.context.bind_to_thread().unwrap();
    // SAFETY: pointers to locals; the handles are the device's own.
    unsafe {
        let mut context = std::ptr::null_mut();
        assert_eq!(sys::cuCtxPopCurrent_v2(&mut context), CUresult::CUDA_SUCCESS);
        let mut device = 5;
        assert_eq!(sys::cuCtxGetDevice(&mut device), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        let mut address = 0;
        assert_eq!(sys::cuMemAlloc_v2(&mut address, 16), CUresult::CUDA_ERROR_INVALID_CONTEXT);
        assert_eq!(sys::cuCtxPushCurrent_v2(context), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxGetDevice(&mut device), CUresult::CUDA_SUCCESS);
        assert_eq!(device, 0);
        let (mut version, mut count) = (0, 0);
        assert_eq!(sys::cuDriverGetVersion(&mut version), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDeviceGetCount(&mut count), CUresult::CUDA_SUCCESS);
        assert_eq!((version, count), (13000, 1));
    }
    softgpu::report();
}
