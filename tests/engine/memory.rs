//! A decode on the CPU takes the estimated memory, neither more nor much less, and no copy of the weights.
//!
//! Each case decodes in a process of its own, which reads the size of its anonymous memory (mapped files are not anonymous) while
//! the decode holds its buffers. Only Linux distinguishes the two.

#![cfg_attr(not(target_os = "linux"), allow(dead_code, unused_imports))]

use dllm_kernels::model::weights::Tensor;
use dllm_kernels::model::{Config, Weights};
use dllm_kernels::{CacheMode, Generator, Model, Options, Policy};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
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
const MIB: usize = 1 << 20;

/// Memory of the process and the allocator that does not belong to the decode.
const SLACK: usize = 32 * MIB;

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
        let (max, generation) = peak(|| generator.generate(&prompts).unwrap());
        assert_eq!(generation.nfe, 2);
        println!("anonymous: {max}");
    });
}

fn measure(case: &str) -> usize {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::child", "--ignored", "--nocapture"])
        .env(CASE, case)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{case}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
    let line = stdout.lines().find_map(|l| l.split_once("anonymous: ")).expect("the child's output");
    line.1.trim().parse().unwrap()
}

/// Checks each case (prompt length, number of sequences) in each mode. Returns the measured bytes.
fn check(dir: &Path, modes: &[&str], cases: &[(usize, usize)]) -> Vec<usize> {
    let config = Config::open(dir).unwrap();
    let mut all = vec![];
    for mode in modes {
        for (length, sequences) in cases {
            let case = format!("{};{mode};{length};{sequences}", dir.display());
            let measured = measure(&case);
            let sizes = options(mode).sizes(&config, &prompts(*length, *sequences));
            let predicted = dllm_kernels::engine::MemoryEstimate::cpu(&sizes, &config, THREADS).total();
            let mib = |bytes: usize| bytes as f64 / MIB as f64;
            println!(
                "{mode}, {sequences} x {length} tokens: {:.1} MiB, predicted {:.1}",
                mib(measured),
                mib(predicted)
            );
            assert!(measured <= predicted + predicted / 10 + SLACK, "{case}: {measured} bytes, predicted {predicted}");
            assert!(predicted <= measured + measured / 10 + SLACK, "{case}: {measured} bytes, predicted {predicted}");
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
    // With four sequences the buffers are large compared with the slack.
    let measured = check(dir.path(), &PLAIN, &[(64, 1), (400, 1), (400, 4)]);
    assert!(measured[0] < weights / 2, "the weights were copied: {} bytes of {weights}", measured[0]);
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
    assert!(measured[1] - measured[0] > 2 * differences, "{measured:?}");
}
