//! Devices other than the default one. In a file of its own, because these options hold for the whole process.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{code, entry, gpu, ptx_text};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum, CUresult};
use cudarc::nvrtc::Ptx;
use softgpu::Opt;

#[test]
fn capabilities_and_sizes() {
    let gpu = gpu();
    let general = ptx_text(&[entry("saxpy", &[4, 4, 8, 8])]);
    let hopper = general.replace("sm_80", "sm_90a");
    let load = |text: &String| code(gpu.context.load_module(Ptx::from_src(text.clone())));
    let opt_in = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let (good, refused) = (CUresult::CUDA_SUCCESS, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    let cases = [
        (75, refused, refused, 64),
        (80, good, refused, 163),
        (86, good, refused, 99),
        (89, good, refused, 99),
        (90, good, good, 227),
        (100, good, refused, 227),
        (120, good, refused, 99),
    ];
    for (capability, for_general, for_hopper, shared_kib) in cases {
        softgpu::set(Opt::ComputeCapability, capability);
        assert_eq!(gpu.context.compute_capability().unwrap(), (capability as i32 / 10, capability as i32 % 10));
        assert_eq!(load(&general), for_general, "{capability}");
        assert_eq!(load(&hopper), for_hopper, "{capability}");
        assert_eq!(gpu.context.attribute(opt_in).unwrap(), shared_kib << 10, "{capability}");
    }

    softgpu::set(Opt::ComputeCapability, 80);
    let function = gpu.function(entry("saxpy", &[4, 4, 8, 8]));
    let dynamic = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    assert!(function.set_attribute(dynamic, 163 << 10).is_ok());
    assert!(function.set_attribute(dynamic, (163 << 10) + 1).is_err());

    softgpu::set(Opt::MaxPtx, 79);
    assert_eq!(load(&general), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    softgpu::set(Opt::MaxPtx, 80);
    assert_eq!(load(&general), good);

    softgpu::set(Opt::TotalMemory, 1 << 20);
    assert!(gpu.stream.alloc_zeros::<u8>(1 << 19).is_ok());
    let most = gpu.stream.alloc_zeros::<u8>(3 << 18).unwrap();
    assert_eq!(gpu.context.mem_get_info().unwrap(), (1 << 18, 1 << 20));
    assert_eq!(code(gpu.stream.alloc_zeros::<u8>(1 << 19)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    drop(most);
    assert_eq!(softgpu::get(Opt::UsedMemory), 0);
    assert_eq!(softgpu::get(Opt::LiveAllocations), 0);
    softgpu::report();
}
