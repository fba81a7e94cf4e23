//! With the feature `embed`, the libraries are loaded from the test binary, not from the build directory.
#![cfg(all(target_os = "linux", target_arch = "x86_64", feature = "embed"))]

mod common;

use common::{entry, gpu, shape};

#[test]
fn libraries_come_from_memory() {
    let gpu = gpu();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let loaded: Vec<&str> = maps.lines().filter(|line| line.contains("libcuda.so")).collect();
    assert!(loaded.is_empty(), "loaded from a file: {loaded:?}");
    assert!(maps.contains("/memfd:softgpu"));
    let saxpy = gpu.function(entry("saxpy", &[4, 4, 8, 8]));
    let x = gpu.stream.clone_htod(&[1f32; 64]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), [1f32; 64]);
    cudarc::cublaslt::CudaBlasLT::new(gpu.stream.clone()).unwrap();
}
