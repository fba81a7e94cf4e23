//! Decoding takes the memory that the arithmetic says: neither more nor much less, and no copy of the weights.
//!
//! Each case decodes in a process of its own, which reads how much of its memory is anonymous (mapped files are not)
//! while the decode still holds its buffers. Only Linux tells the two apart.

#![cfg_attr(not(target_os = "linux"), allow(dead_code, unused_imports))]

use dllm_kernels::model::weights::Tensor;
use dllm_kernels::model::{Config, Weights};
use dllm_kernels::{CacheMode, Generator, Model, Observer, Options, Policy};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::path::Path;
use std::process::Command;

/// Set for the child: directory, cache, prompt length, sequences.
const CASE: &str = "DLLM_MEMORY_CASE";
const THREADS: usize = 2;
const MODES: [CacheMode; 3] = [CacheMode::None, CacheMode::Dual, CacheMode::Adaptive];
const MIB: usize = 1 << 20;

/// What a process and an allocator have beside the decode.
const SLACK: usize = 32 * MIB;

fn options(cache: CacheMode) -> Options {
    // A refresh and one forward of the block.
    let (gen_length, steps) = (32, Some(2));
    Options { gen_length, steps, cache, policy: Policy::Fixed, ..Options::default() }
}

fn prompts(length: usize, sequences: usize) -> Vec<Vec<u32>> {
    (0..sequences).map(|s| (0..length).map(|i| ((i * 7 + s) % 900) as u32).collect()).collect()
}

/// Anonymous memory of this process that is resident.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon in /proc/self/status");
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() << 10
}

/// Remembers the most; is called while the session lives.
struct Peak(usize);

impl Observer for Peak {
    fn decided(&mut self, _sequence: usize, _tokens: &[u32]) {
        self.0 = self.0.max(anonymous());
    }
}

#[test]
#[ignore = "the process that the other tests of this file start"]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let [dir, cache, length, sequences] = case.split(';').collect::<Vec<_>>().try_into().unwrap();
    let cache = MODES.iter().find(|mode| mode.name() == cache).copied().unwrap();
    let prompts = prompts(length.parse().unwrap(), sequences.parse().unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
    let mut peak = Peak(0);
    pool.install(|| {
        let model = Model::open(dir).unwrap();
        let generation = Generator::new(&model).options(options(cache)).generate_observed(&prompts, &mut peak).unwrap();
        assert_eq!(generation.nfe, 2);
    });
    println!("anonymous: {}", peak.0);
}

fn measure(case: &str) -> usize {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CASE, case)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{case}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
    let line = stdout.lines().find_map(|l| l.split_once("anonymous: ")).expect("the child's answer");
    line.1.trim().parse().unwrap()
}

/// Every (prompt length, sequences) with and without a cache; returns what each took.
fn check(dir: &Path, cases: &[(usize, usize)]) -> Vec<usize> {
    let config = Config::open(dir).unwrap();
    let mut all = vec![];
    for (cache, name) in MODES.map(|mode| (mode, mode.name())) {
        for (length, sequences) in cases {
            let case = format!("{};{name};{length};{sequences}", dir.display());
            let measured = measure(&case);
            let sizes = options(cache).sizes(&config, &prompts(*length, *sequences));
            let predicted = sizes.memory(&config, THREADS).total();
            let mib = |bytes: usize| bytes as f64 / MIB as f64;
            println!(
                "cache {name}, {sequences} x {length} tokens: {:.1} MiB, predicted {:.1}",
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

/// A checkpoint of the shape `mid` in the public layout, random weights.
fn write_mid(dir: &Path) -> usize {
    let config = Config::shape("mid").unwrap();
    let weights = Weights::random(&config, 1).unwrap();
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
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-math");
    check(&dir, &[(64, 1), (400, 1)]);
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "not run: memory::large needs Linux's RssAnon")]
fn large() {
    let dir = tempfile::tempdir().unwrap();
    let weights = write_mid(dir.path());
    // Four sequences make buffers beside which the slack is small.
    let measured = check(dir.path(), &[(64, 1), (400, 1), (400, 4)]);
    assert!(measured[0] < weights / 2, "the weights were copied: {} bytes of {weights}", measured[0]);
}
