//! A decode on the CPU takes the estimated memory, neither more nor much less, and no copy of the weights.
//!
//! Each case decodes in a process of its own. It counts what the decode allocates, byte by byte, and reads how much the anonymous
//! memory of the process grows (mapped files are not anonymous), which only Linux distinguishes. The count finds a forgotten buffer;
//! the growth finds memory that is not allocated by Rust, and copies of the weights.

#![cfg_attr(not(target_os = "linux"), allow(dead_code, unused_imports))]

use dllm_kernels::model::weights::Tensor;
use dllm_kernels::model::{Config, Weights};
use dllm_kernels::{CacheMode, Generator, Model, Options, Policy};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Environment variable of the child process: directory, mode, prompt length, number of sequences.
const CASE: &str = "DLLM_MEMORY_CASE";
const THREADS: usize = 2;
/// Modes with no cache, DualCache and AdaptiveCache.
const PLAIN: [&str; 3] = ["none", "dual", "adaptive"];
/// A hybrid cache, and AdaptiveCache with guidance: its unconditional sequences have a cache too.
const FEATURE_CACHE: [&str; 2] = ["refresh-ratio", "guided"];
/// Guided modes of equal length, without and with stored guidance differences.
const GUIDED_AT_INTERVALS: [&str; 2] = ["guided-long", "remembered"];
const KIB: usize = 1 << 10;

/// Bytes of lists (tokens, positions, sequences, predictions) that the estimate leaves out: for any decode, and for each position of
/// a sequence. Measured: 7 to 26 KiB, and 95 to 128 bytes per position.
const LISTS: usize = 64 * KIB;
const LISTS_PER_POSITION: usize = 128;
/// The system may give each buffer whole huge pages.
const HUGE_PAGES: usize = 32 << 10 << 10;
/// The system counts pages in batches.
const RESIDENT_SLACK: usize = 2 << 10 << 10;

/// Allocator that counts the bytes in use, and the most bytes in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn count_allocated(bytes: usize) {
    let before = IN_USE.fetch_add(bytes, Ordering::Relaxed);
    MOST.fetch_max(before + bytes, Ordering::Relaxed);
}

fn count_freed(bytes: usize) {
    IN_USE.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocated(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_allocated(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // A large block grows in place.
        count_freed(layout.size());
        count_allocated(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count_freed(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn options(mode: &str) -> Options {
    // Two forwards: a refresh and a block step.
    let options = Options { gen_length: 32, steps: Some(2), policy: Policy::Fixed, ..Options::default() };
    let long = Options { gen_length: 256, block_length: Some(256), cfg_scale: 1.5, ..options.clone() };
    let adaptive = CacheMode::Adaptive;
    match mode {
        "none" => Options { cache: CacheMode::None, ..options },
        "dual" => Options { cache: CacheMode::Dual, ..options },
        "adaptive" => Options { cache: adaptive, ..options },
        "refresh-ratio" => Options { cache: CacheMode::Dual, refresh_ratio: Some(0.5), ..options },
        "guided" => Options { cache: adaptive, cfg_scale: 1.5, ..options },
        "guided-long" => Options { cache: adaptive, ..long },
        "remembered" => Options { cache: adaptive, cfg_interval: 3, ..long },
        _ => panic!("{mode}"),
    }
}

fn prompts(length: usize, sequences: usize) -> Vec<Vec<u32>> {
    (0..sequences).map(|s| (0..length).map(|i| ((i * 7 + s) % 900) as u32).collect()).collect()
}

/// Anonymous memory of this process in bytes, without swapped pages.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon in /proc/self/status");
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() << 10
}

/// Returns the largest [`anonymous`] during `work`, sampled every millisecond, and the result of `work`.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut max = 0;
            while !done.load(Ordering::Relaxed) {
                max = max.max(anonymous());
                std::thread::sleep(Duration::from_millis(1));
            }
            max
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (sampler.join().unwrap(), result)
    })
}

#[test]
#[ignore = "runs in the processes that the other tests of this file start"]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let [dir, mode, length, sequences] = case.split(';').collect::<Vec<_>>().try_into().unwrap();
    let prompts = prompts(length.parse().unwrap(), sequences.parse().unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
    pool.install(|| {
        let model = Model::open(dir).unwrap();
        let generator = Generator::new(&model).options(options(mode));
        // The threads of the pool have started and have their stacks.
        pool.broadcast(|_| ());
        let (in_use, resident) = (IN_USE.load(Ordering::Relaxed), anonymous());
        MOST.store(in_use, Ordering::Relaxed);
        let (max, generation) = peak(|| generator.generate(&prompts).unwrap());
        assert_eq!(generation.nfe, 2);
        println!("measured: {} {}", MOST.load(Ordering::Relaxed) - in_use, max.saturating_sub(resident));
    });
}

/// Bytes that a decode allocates at most at a time, and by which the anonymous memory of its process grows.
#[derive(Clone, Copy, Debug)]
struct Measured {
    allocated: usize,
    resident: usize,
}

fn measure(case: &str) -> Measured {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "memory::child", "--ignored", "--nocapture"]).env(CASE, case);
    let output = crate::common::process::run(&mut command);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{case}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
    let line = stdout.lines().find_map(|l| l.split_once("measured: ")).expect("the child's output");
    let numbers: Vec<usize> = line.1.split_whitespace().map(|number| number.parse().unwrap()).collect();
    Measured { allocated: numbers[0], resident: numbers[1] }
}

/// Checks each case (prompt length, number of sequences) in each mode. Returns what was measured.
fn check(dir: &Path, modes: &[&str], cases: &[(usize, usize)]) -> Vec<Measured> {
    let config = Config::open(dir).unwrap();
    let mut all = vec![];
    for mode in modes {
        for (length, sequences) in cases {
            let case = format!("{};{mode};{length};{sequences}", dir.display());
            let measured = measure(&case);
            let options = options(mode);
            let sizes = options.sizes(&config, &prompts(*length, *sequences));
            let estimate = dllm_kernels::engine::MemoryEstimate::cpu(&sizes, &config, THREADS);
            let predicted = estimate.total();
            let Measured { allocated, resident } = measured;
            let found = format!(
                "{mode}, {sequences} x {length} tokens: {allocated} bytes allocated, {resident} resident, predicted {predicted}"
            );
            println!("{found}, {} more allocated", allocated as isize - predicted as isize);
            // Tokens, positions and predictions are not in the estimate.
            let positions = sequences * (length + options.gen_length);
            let most = predicted + LISTS + LISTS_PER_POSITION * positions;
            assert!(allocated <= most, "{found}: a buffer is not in the estimate");
            // A thread that got no work has no scratch.
            let least = predicted - estimate.scratch / THREADS;
            assert!(allocated >= least, "{found}: the estimate has a buffer too many");
            assert!(resident <= predicted + predicted / 10 + HUGE_PAGES, "{found}: memory that was not counted");
            assert!(resident + resident / 20 + RESIDENT_SLACK >= least, "{found}: less memory than was counted");
            all.push(measured);
        }
    }
    all
}

/// Writes a checkpoint of this shape with random weights in the public layout. Returns the bytes of the weights.
fn write(dir: &Path, config: &Config) -> usize {
    let weights = Weights::random(config, 1).unwrap();
    let get = |(name, shape): (String, Vec<usize>)| (weights.get(&name, &shape).unwrap(), name);
    let tensors: Vec<(Tensor, String)> = config.tensors().into_iter().map(get).collect();
    let views = tensors
        .iter()
        .map(|(tensor, name)| (name, TensorView::new(Dtype::BF16, tensor.shape().to_vec(), tensor.bytes()).unwrap()));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let json = serde_json::json!({
        "model_type": "llada",
        "d_model": config.d_model,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "mlp_hidden_size": config.mlp_hidden_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_sequence_length": config.max_sequence_length,
        "mask_token_id": config.mask_token_id,
        "eos_token_id": config.eos_token_ids[0],
    });
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    weights.total_bytes()
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "not run: memory::small needs Linux's RssAnon")]
fn small() {
    let dir = crate::common::models_dir().join("tiny-math");
    check(&dir, &PLAIN, &[(64, 1), (400, 1)]);
    check(&dir, &FEATURE_CACHE, &[(400, 1)]);
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "not run: memory::large needs Linux's RssAnon")]
fn large() {
    let dir = tempfile::tempdir().unwrap();
    let weights = write(dir.path(), &Config::shape("mid").unwrap());
    let measured = check(dir.path(), &PLAIN, &[(64, 1)]);
    assert!(measured[0].resident < weights / 2, "the weights were copied: {} bytes of {weights}", measured[0].resident);
}

#[test]
#[ignore = "long: half a minute of decoding"]
fn large_and_long() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Config::shape("mid").unwrap());
    check(dir.path(), &PLAIN, &[(400, 1), (400, 4)]);
    // The feature cache is a third of the memory.
    check(dir.path(), &FEATURE_CACHE, &[(400, 2)]);
}

/// A vocabulary so large that the memory is mostly logits: those of all positions with and without condition, and the stored
/// guidance differences.
#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "not run: memory::guided_at_intervals needs Linux's RssAnon")]
fn guided_at_intervals() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        d_model: 64,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: 32,
        mlp_hidden_size: 64,
        vocab_size: 1 << 17,
        ..Config::shape("mid").unwrap()
    };
    write(dir.path(), &config);
    let measured = check(dir.path(), &GUIDED_AT_INTERVALS, &[(8, 1)]);
    let differences = 256 * config.vocab_size * size_of::<f32>();
    assert!(measured[1].allocated - measured[0].allocated > 2 * differences, "{measured:?}");
}
