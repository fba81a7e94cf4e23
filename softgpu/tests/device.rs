//! Correct use of the device: properties, copies, launches, graphs, events.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::{code, entry, gpu, noise, ptx_text, shape};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{DeviceRepr, result};
use cudarc::nvrtc::Ptx;
use half::bf16;
use softgpu::Opt;
use std::time::Instant;

const SAXPY: &[u32] = &[4, 4, 8, 8];
const THREAD_LOCAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const NO_FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags(0);

#[repr(C)]
#[derive(Clone, Copy)]
struct SumParams {
    x: u64,
    out: u64,
    n: i32,
    padding: i32,
}
// SAFETY: plain data.
unsafe impl DeviceRepr for SumParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ArgmaxParams {
    x: u64,
    index: u64,
    share: u64,
    n: i32,
    padding: i32,
}
// SAFETY: plain data.
unsafe impl DeviceRepr for ArgmaxParams {}

#[test]
fn properties_and_saxpy() {
    let gpu = gpu();
    assert!(softgpu::active());
    assert!(gpu.context.name().unwrap().starts_with("software device"));
    assert!(gpu.context.total_mem().unwrap() >= gpu.context.mem_get_info().unwrap().0);
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let n = 1000i32;
    let x = gpu.stream.clone_htod(&vec![1f32; 1000]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(1000).unwrap();
    launch!(gpu, saxpy, shape(4, 256), &n, &2f32, &x, &y).unwrap();
    let copy = y.try_clone().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&copy).unwrap(), vec![2f32; 1000]);
    assert_eq!(softgpu::report(), "");
}

#[test]
fn block_sum_with_every_order() {
    let gpu = gpu();
    let host: Vec<f32> = (0..8 * 1000).map(|i| (i % 7) as f32).collect();
    let expected: Vec<f32> = host.chunks(1000).map(|row| row.iter().sum()).collect();
    let x = gpu.stream.clone_htod(&host).unwrap();
    let run = |name: &str, seed: i64| {
        softgpu::set(Opt::Seed, seed);
        let mut kernel = entry(name, &[24]);
        kernel.shared_bytes = 128;
        let function = gpu.function(kernel);
        // SAFETY: written by the kernel before it is used.
        let out = unsafe { gpu.stream.alloc::<f32>(8) }.unwrap();
        assert!(gpu.stream.clone_dtoh(&out).unwrap()[0].is_nan(), "fresh memory is poisoned");
        let params = SumParams { x: gpu.address(&x), out: gpu.address(&out), n: 1000, padding: 0 };
        launch!(gpu, function, shape(8, 256), &params).unwrap();
        gpu.stream.clone_dtoh(&out).unwrap()
    };
    for seed in 0..20 {
        assert_eq!(run("block_sum", seed), expected);
    }
    let caught = (0..20).filter(|seed| run("block_sum_racy", *seed) != expected).count();
    assert!(caught > 10, "a missing __syncthreads showed with {caught} of 20 seeds");
}

#[test]
fn argmax_of_bf16_rows() {
    let gpu = gpu();
    let (rows, n) = (32, 126464);
    let host: Vec<bf16> = noise(rows * n, 1).iter().map(|x| bf16::from_f32(4.0 * x)).collect();
    let x = gpu.stream.clone_htod(&host).unwrap();
    let (index, share) = (gpu.stream.alloc_zeros::<i32>(rows).unwrap(), gpu.stream.alloc_zeros::<f32>(rows).unwrap());
    let params = ArgmaxParams {
        x: gpu.address(&x),
        index: gpu.address(&index),
        share: gpu.address(&share),
        n: n as i32,
        padding: 0,
    };
    let function = gpu.function(entry("argmax_share", &[32]));
    let start = Instant::now();
    launch!(gpu, function, shape(rows as u32, 512), &params).unwrap();
    println!("argmax of {rows} x {n}: {:?}", start.elapsed());
    let (index, share) = (gpu.stream.clone_dtoh(&index).unwrap(), gpu.stream.clone_dtoh(&share).unwrap());
    for (r, row) in host.chunks(n).enumerate() {
        let best = (0..n).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a))).unwrap();
        let sum: f64 = row.iter().map(|x| (x.to_f64() - row[best].to_f64()).exp()).sum();
        assert_eq!(index[r] as usize, best);
        assert!((f64::from(share[r]) * sum - 1.0).abs() < 1e-4);
    }
}

#[test]
fn graphs_and_events() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let n = 512i32;
    let x = gpu.stream.clone_htod(&[1f32; 512]).unwrap();
    let mut y = gpu.stream.alloc_zeros::<f32>(512).unwrap();
    gpu.stream.begin_capture(THREAD_LOCAL).unwrap();
    gpu.stream.memset_zeros(&mut y).unwrap();
    for a in [1f32, 2.0, 3.0] {
        launch!(gpu, saxpy, shape(2, 256), &n, &a, &x, &y).unwrap(); // `a` ends here: the graph has a copy
    }
    let launches = softgpu::get(Opt::Launches);
    let graph = gpu.stream.end_capture(NO_FLAGS).unwrap().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap()[0], 0.0, "nothing runs during a capture");

    let before = gpu.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    for _ in 0..2 {
        graph.launch().unwrap();
        assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), vec![6f32; 512]);
    }
    let after = gpu.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert!(before.elapsed_ms(&after).unwrap() > 0.0);
    assert_eq!(softgpu::get(Opt::Launches) - launches, 6);

    // A graph that refers to freed memory.
    drop(y);
    assert!(graph.launch().is_err());
    common::assert_reported("was freed");
}

#[test]
fn nodes_of_a_captured_graph() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let x = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    let mut y = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    // SAFETY: handles of this test; counts fit their arrays.
    unsafe {
        result::stream::begin_capture(gpu.stream.cu_stream(), THREAD_LOCAL).unwrap();
        gpu.stream.memset_zeros(&mut y).unwrap();
        launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
        launch!(gpu, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
        let graph = result::stream::end_capture(gpu.stream.cu_stream()).unwrap();
        let mut count = 0usize;
        assert_eq!(sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count), CUresult::CUDA_SUCCESS);
        assert_eq!(count, 3);
        let mut nodes = [std::ptr::null_mut(); 3];
        assert_eq!(sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count), CUresult::CUDA_SUCCESS);
        let types = nodes.map(|node| {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            assert_eq!(sys::cuGraphNodeGetType(node, &mut kind), CUresult::CUDA_SUCCESS);
            kind
        });
        use sys::CUgraphNodeType::*;
        assert_eq!(types, [CU_GRAPH_NODE_TYPE_MEMSET, CU_GRAPH_NODE_TYPE_KERNEL, CU_GRAPH_NODE_TYPE_KERNEL]);
        assert_eq!(sys::cuGraphDestroy(graph), CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn what_a_capture_forbids() {
    let gpu = gpu();
    assert_eq!(code(gpu.context.default_stream().begin_capture(THREAD_LOCAL)) as u32, 900);

    let outside = gpu.stream.record_event(None).unwrap();
    gpu.stream.begin_capture(THREAD_LOCAL).unwrap();
    // SAFETY: never used.
    assert_eq!(code(unsafe { gpu.stream.alloc::<f32>(4) }) as u32, 900);
    assert_eq!(code(gpu.context.load_module(Ptx::from_src(ptx_text(&[])))) as u32, 900);
    assert_eq!(code(gpu.stream.wait(&outside)) as u32, 905);
    assert_eq!(code(gpu.stream.synchronize()) as u32, 900);
    assert_eq!(code(gpu.stream.end_capture(NO_FLAGS)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    // A stream that is forked and never joined.
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    let (x, y) = (gpu.stream.alloc_zeros::<f32>(64).unwrap(), gpu.stream.alloc_zeros::<f32>(64).unwrap());
    let side = common::Gpu { context: gpu.context.clone(), stream: gpu.context.new_stream().unwrap() };
    for joined in [false, true] {
        gpu.stream.begin_capture(THREAD_LOCAL).unwrap();
        side.stream.join(&gpu.stream).unwrap();
        launch!(side, saxpy, shape(1, 64), &64i32, &1f32, &x, &y).unwrap();
        if joined {
            gpu.stream.join(&side.stream).unwrap();
        }
        let expected = if joined { CUresult::CUDA_SUCCESS } else { CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED };
        assert_eq!(code(gpu.stream.end_capture(NO_FLAGS)), expected);
    }
    softgpu::report();
}

#[test]
fn parallel_threads() {
    let work = |thread: i64| {
        let gpu = gpu();
        softgpu::set(Opt::Seed, thread + 1);
        let function = gpu.function(entry("block_sum", &[24]));
        let x = gpu.stream.clone_htod(&vec![thread as f32; 8 * 100]).unwrap();
        let out = gpu.stream.alloc_zeros::<f32>(8).unwrap();
        for _ in 0..20 {
            let params = SumParams { x: gpu.address(&x), out: gpu.address(&out), n: 100, padding: 0 };
            launch!(gpu, function, shape(8, 256), &params).unwrap();
            assert_eq!(gpu.stream.clone_dtoh(&out).unwrap(), vec![thread as f32 * 100.0; 8]);
        }
    };
    let threads: Vec<_> = (0..4).map(|thread| std::thread::spawn(move || work(thread))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn blocking_calls_are_counted() {
    let gpu = gpu();
    let counted = |work: &mut dyn FnMut()| {
        let before = softgpu::get(Opt::BlockingCalls);
        work();
        softgpu::get(Opt::BlockingCalls) - before
    };
    let mut x = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    let host = [1f32; 64];
    let mut back = [0f32; 64];
    // SAFETY: written before it is read.
    let mut pinned = unsafe { gpu.context.alloc_pinned::<f32>(64) }.unwrap();
    assert_eq!(counted(&mut || gpu.stream.memcpy_htod(&host, &mut x).unwrap()), 0);
    assert_eq!(counted(&mut || gpu.stream.memset_zeros(&mut x).unwrap()), 0);
    assert_eq!(counted(&mut || gpu.stream.memcpy_dtoh(&x, &mut pinned).unwrap()), 0);
    assert_eq!(counted(&mut || gpu.stream.memcpy_dtoh(&x, &mut back).unwrap()), 1);
    assert_eq!(counted(&mut || gpu.stream.synchronize().unwrap()), 1);
    assert_eq!(counted(&mut || gpu.context.synchronize().unwrap()), 1);
}

#[test]
fn kernels_read_pinned_memory() {
    let gpu = gpu();
    let saxpy = gpu.function(entry("saxpy", SAXPY));
    // SAFETY: filled before it is read.
    let mut pinned = unsafe { gpu.context.alloc_pinned::<f32>(64) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(3.0);
    let mut address = 0;
    // SAFETY: the buffer lives until the end of the test.
    let status = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, pinned.as_mut_ptr().unwrap().cast(), 0) };
    assert_eq!(status, CUresult::CUDA_SUCCESS);
    let y = gpu.stream.alloc_zeros::<f32>(64).unwrap();
    launch!(gpu, saxpy, shape(1, 64), &64i32, &2f32, &address, &y).unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&y).unwrap(), vec![6f32; 64]);
}

#[test]
fn counters_of_memory_and_time_per_launch() {
    let gpu = gpu();
    let (saxpy, sum) = (gpu.function(entry("saxpy", SAXPY)), gpu.function(entry("block_sum", &[24])));
    let n = 128 * 256i32;
    let x = gpu.stream.clone_htod(&vec![1f32; n as usize]).unwrap();
    let y = gpu.stream.alloc_zeros::<f32>(n as usize).unwrap();
    assert!(softgpu::get(Opt::LiveAllocations) >= 2 && softgpu::get(Opt::UsedMemory) >= 8 * i64::from(n));
    for seed in [0, 3] {
        softgpu::set(Opt::Seed, seed);
        let start = Instant::now();
        for _ in 0..100 {
            launch!(gpu, saxpy, shape(128, 256), &n, &1f32, &x, &y).unwrap();
        }
        let saxpy_time = start.elapsed();
        let params = SumParams { x: gpu.address(&x), out: gpu.address(&y), n: 256, padding: 0 };
        let start = Instant::now();
        for _ in 0..100 {
            launch!(gpu, sum, shape(128, 256), &params).unwrap();
        }
        println!("100 launches of 128 x 256, seed {seed}: saxpy {saxpy_time:?}, block_sum {:?}", start.elapsed());
    }
    let start = Instant::now();
    for _ in 0..1000 {
        drop(gpu.stream.alloc_zeros::<f32>(10_000).unwrap());
    }
    println!("allocate, zero and free 40 kB: {:?}", start.elapsed() / 1000);
}
