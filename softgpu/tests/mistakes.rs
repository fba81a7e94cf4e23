//! Every check of the emulator, each with a caller or a kernel that makes the mistake.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{assert_reported, code, entry, gpu, shape, shape_with_shared};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUresult};
use softgpu::Opt;

const SAXPY: &[u32] = &[4, 4, 8, 8];
const TWO_POINTERS: &[u32] = &[8, 8];

#[test]
fn store_past_the_end() {
    let gpu = gpu();
    softgpu::set(Opt::Seed, 0); // the report names the thread that comes first
    let (good, bad) = (gpu.function(entry("saxpy", SAXPY)), gpu.function(entry("saxpy_unbounded", SAXPY)));
    let n = 1000i32;
    let x = gpu.stream.clone_htod(&[1f32; 1000]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(1000).unwrap();
    let result = launch!(gpu, bad, shape(4, 256), &n, &2f32, &x, &y);
    assert_eq!(code(result), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_reported("saxpy_unbounded: block (3,0,0) thread (232,0,0): touched");
    // The device remains usable.
    assert_eq!(code(launch!(gpu, good, shape(4, 256), &n, &2f32, &x, &y)), CUresult::CUDA_SUCCESS);
    assert_eq!(softgpu::report(), "");
}

#[test]
fn store_into_the_slack_behind_an_allocation() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let x = gpu.stream.clone_htod(&[1f32; 4]).unwrap();
    // SAFETY: freed once, below. 12 bytes, aligned to 16: the 4 bytes after them belong to no allocation and do not fault.
    let y = unsafe { result::malloc_async(gpu.stream.cu_stream(), 12) }.unwrap();
    // SAFETY: the emulator checks all accesses.
    unsafe { result::memset_d8_async(y, 0, 12, gpu.stream.cu_stream()) }.unwrap();
    launch!(gpu, saxpy, shape(1, 32), &3i32, &1f32, &x, &y).unwrap();
    let good = gpu.function(entry("misaligned_load", TWO_POINTERS)); // writes out[thread], without a bound
    launch!(gpu, good, shape(1, 1), &x, &(y + 12)).unwrap();
    // SAFETY: as above.
    assert!(unsafe { result::free_async(y, gpu.stream.cu_stream()) }.is_err());
    assert_reported("(12 bytes): the byte at offset 12 was overwritten");
}

#[test]
fn pointers_that_dangle() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let x = gpu.stream.clone_htod(&[1f32; 64]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    let freed = gpu.address(&x);
    drop(x);
    assert!(launch!(gpu, saxpy, shape(1, 64), &64i32, &2f32, &freed, &y).is_err());
    assert_reported("saxpy: argument 2, byte 0: points into freed memory");
    assert!(launch!(gpu, saxpy, shape(1, 64), &64i32, &2f32, &0u64, &y).is_err());
    assert_reported("no device memory");

    let stream = gpu.stream.cu_stream();
    // SAFETY: the emulator refuses wrong arguments.
    unsafe {
        let p = result::malloc_async(stream, 100).unwrap();
        assert!(result::memcpy_dtod_async(p + 8, p, 50, stream).is_err());
        assert_reported("overlapping");
        assert!(result::memset_d8_async(p, 0, 101, stream).is_err());
        assert_reported("101 bytes from offset 0");
        assert!(result::memcpy_htod_async(p, std::slice::from_raw_parts(p as *const u8, 100), stream).is_err());
        assert_reported("the host side");
        result::free_async(p, stream).unwrap();
        assert!(result::free_async(p, stream).is_err());
        assert_reported("double free");
        assert!(result::free_async(0x1234, stream).is_err());
        assert_reported("never allocated");
    }
}

#[test]
fn out_of_memory() {
    let gpu = gpu();
    softgpu::set(Opt::FailAlloc, 1);
    let first = gpu.stream.alloc_zeros::<f32>(10).unwrap();
    assert_eq!(code(gpu.stream.alloc_zeros::<f32>(10)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_reported("refused on request");
    assert!(gpu.stream.alloc_zeros::<f32>(10).is_ok());
    drop(first);
    // SAFETY: refused.
    let huge = unsafe { gpu.stream.alloc::<u8>(softgpu::get(Opt::TotalMemory) as usize + 1) };
    assert_eq!(code(huge), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    softgpu::report();
}

#[test]
fn kernels_fail_on_request() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let x = gpu.stream.clone_htod(&[1f32; 32]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(32).unwrap();
    let before = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
    softgpu::set(Opt::FailKernel, 1);
    let run = || code(launch!(gpu, saxpy, shape(1, 32), &32i32, &2f32, &x, &y));
    assert_eq!(run(), CUresult::CUDA_SUCCESS);
    assert_eq!(run(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_reported("saxpy: failed on request");
    assert_eq!(run(), CUresult::CUDA_SUCCESS);
    let after = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
    assert_eq!([after[0] - before[0], after[1] - before[1]], [3, 3]);
}

#[test]
fn undefined_operations() {
    let gpu = gpu();
    let x = gpu.stream.alloc_zeros::<f32>(256).unwrap();
    let out = gpu.stream.alloc_zeros::<f32>(256).unwrap();
    let cases = [
        ("misaligned_load", CUresult::CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned or null access at"),
        ("array_overrun", CUresult::CUDA_ERROR_LAUNCH_FAILED, "index out of an array at"),
        ("split_barriers", CUresult::CUDA_ERROR_LAUNCH_FAILED, "others at __syncthreads: 0xffff"),
        ("divide_by_zero", CUresult::CUDA_ERROR_LAUNCH_FAILED, "integer division by zero"),
    ];
    for (name, expected, text) in cases {
        let function = gpu.function(entry(name, TWO_POINTERS));
        assert_eq!(code(launch!(gpu, function, shape(1, 64), &x, &out)), expected, "{name}");
        let report = softgpu::report();
        assert!(report.contains(text) && report.starts_with(name), "{name}: {report}");
    }
}

#[test]
fn shared_memory() {
    let gpu = gpu();
    let out = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    let overrun = gpu.function(entry("dynamic_shared_overrun", &[4, 8]));
    assert!(launch!(gpu, overrun, shape_with_shared(1, 64, 1024), &256i32, &out).is_ok());
    assert!(launch!(gpu, overrun, shape_with_shared(1, 64, 1024), &257i32, &out).is_err());
    assert_reported("behind the dynamic shared memory");

    let mut unwritten = entry("unwritten_shared", &[4, 8]);
    unwritten.shared_bytes = 256;
    let unwritten = gpu.function(unwritten);
    for dynamic in [0i32, 1] {
        // Shared memory is fresh for each block, whatever the block before stored.
        for _ in 0..2 {
            launch!(gpu, unwritten, shape_with_shared(2, 64, 256), &dynamic, &out).unwrap();
            assert!(gpu.stream.clone_dtoh(&out).unwrap().iter().all(|v| v.is_nan()));
        }
    }
}

#[test]
fn stack_of_a_thread() {
    let gpu = gpu();
    let recursion = gpu.function(entry("deep_recursion", &[4, 8]));
    let out = gpu.stream.alloc_zeros::<i32>(1).unwrap();
    launch!(gpu, recursion, shape(1, 1), &10i32, &out).unwrap();
    assert!(launch!(gpu, recursion, shape(1, 1), &1_000_000i32, &out).is_err());
    assert_reported("the end of the thread's stack");
}

#[test]
fn launch_limits() {
    let gpu = gpu();
    let mut limited = entry("saxpy", SAXPY);
    limited.max_threads = Some(128);
    let saxpy = gpu.function(limited);
    let y = gpu.stream.alloc_zeros::<f32>(256).unwrap();
    let launch = |shape| code(launch!(gpu, saxpy, shape, &128i32, &1f32, &y, &y));
    assert_eq!(launch(shape(1, 128)), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(shape(1, 129)), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(shape(0, 128)), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(shape(1, 0)), CUresult::CUDA_ERROR_INVALID_VALUE);
    let mut tall = shape(1, 1);
    tall.grid_dim.1 = 65536;
    assert_eq!(launch(tall), CUresult::CUDA_ERROR_INVALID_VALUE);
    let mut deep = shape(1, 1);
    deep.block_dim.2 = 65;
    assert_eq!(launch(deep), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(shape_with_shared(1, 1, 48 * 1024)), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(shape_with_shared(1, 1, 48 * 1024 + 1)), CUresult::CUDA_ERROR_INVALID_VALUE);
    softgpu::report();

    // Static and dynamic shared memory together are limited to 48 KiB.
    let mut with_static = entry("saxpy", SAXPY);
    with_static.shared_bytes = 1024;
    let with_static = gpu.function(with_static);
    let launch = |bytes| code(launch!(gpu, with_static, shape_with_shared(1, 1, bytes), &1i32, &1f32, &y, &y));
    assert_eq!(launch(47 * 1024), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(47 * 1024 + 1), CUresult::CUDA_ERROR_INVALID_VALUE);
    softgpu::report();

    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    assert!(saxpy.set_attribute(attribute, 300_000).is_err());
    assert_reported("300000 bytes of dynamic shared memory asked for");
    saxpy.set_attribute(attribute, 64 * 1024).unwrap();
    assert_eq!(code(launch!(gpu, saxpy, shape_with_shared(1, 1, 64 * 1024), &1i32, &1f32, &y, &y)) as u32, 0);
}

#[test]
fn launch_attributes() {
    let gpu = gpu();
    let out = gpu.stream.alloc_zeros::<u64>(16).unwrap();
    let mut address = gpu.address(&out);
    // SAFETY: the structure is plain data; its pointers are to locals that live during the call.
    let mut launch = |id, cluster: u32| unsafe {
        let mut attribute: sys::CUlaunchAttribute = std::mem::zeroed();
        attribute.id = id;
        attribute.value.clusterDim.x = cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        let mut config: sys::CUlaunchConfig = std::mem::zeroed();
        (config.gridDimX, config.gridDimY, config.gridDimZ) = (1, 1, 1);
        (config.blockDimX, config.blockDimY, config.blockDimZ) = (1, 1, 1);
        config.hStream = gpu.stream.cu_stream();
        config.attrs = &mut attribute;
        config.numAttrs = 1;
        let mut module = std::ptr::null_mut();
        let text = std::ffi::CString::new(common::ptx_text(&[entry("intrinsics", &[8])])).unwrap();
        assert_eq!(sys::cuModuleLoadData(&mut module, text.as_ptr().cast()), CUresult::CUDA_SUCCESS);
        let mut function = std::ptr::null_mut();
        assert_eq!(sys::cuModuleGetFunction(&mut function, module, c"intrinsics".as_ptr()), CUresult::CUDA_SUCCESS);
        let mut params = [(&raw mut address).cast()];
        sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut())
    };
    use sys::CUlaunchAttributeID::*;
    assert_eq!(launch(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, 1), CUresult::CUDA_SUCCESS);
    assert_eq!(launch(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, 2), CUresult::CUDA_ERROR_NOT_SUPPORTED);
    assert_reported("clusters of 2 x 1 x 1 blocks");
}
