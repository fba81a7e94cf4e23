//! `dllm inspect`: shows the architecture of a checkpoint or public model, and the memory of a decode.

use crate::args::{cache, length, threads};
use crate::output::{print, print_json};
use crate::report::{bytes, count, shape, shape_config, table};
use dllm_kernels::engine::Model;
use dllm_kernels::model::weights::Dtype;
use dllm_kernels::model::{Config, Weights};
use dllm_kernels::{CacheMode, Error, Options, Result};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Show the architecture of a checkpoint and the memory that decoding needs
#[derive(clap::Args, Debug)]
pub struct Inspect {
    /// Checkpoint directory
    #[arg(required_unless_present = "shape", conflicts_with = "shape")]
    dir: Option<PathBuf>,
    /// Shape of a public model, in bf16, instead of a checkpoint
    #[arg(long, value_parser = shape())]
    shape: Option<String>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = length())]
    prompt_length: usize,
    /// Tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    gen_length: usize,
    /// Tokens per block [default: 32, at most gen-length]
    #[arg(long, value_name = "N")]
    block_length: Option<usize>,
    /// Sequences decoded together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Cached state between forwards
    #[arg(long, value_parser = cache(), default_value_t = CacheMode::Dual)]
    cache: CacheMode,
    /// Caches prefix and dual: share of rows that V-verify selects in later refreshes; below 1 attention and MLP outputs
    /// are cached too [default: 1]
    #[arg(long, alias = "refresh-rows", value_name = "R", allow_negative_numbers = true)]
    refresh_ratio: Option<f64>,
    /// Scale of classifier-free guidance, which runs every sequence twice; 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    cfg_scale: f64,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads())]
    threads: Option<usize>,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object, sizes in bytes
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct TensorLine {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: usize,
}

/// Result of the command; memory sizes are in bytes.
#[derive(Serialize)]
struct Answer {
    source: String,
    family: String,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    d_model: usize,
    mlp_hidden_size: usize,
    vocab_size: usize,
    tied_head: bool,
    rope_theta: f32,
    rms_norm_eps: f32,
    max_sequence_length: usize,
    mask_token_id: u32,
    eos_token_ids: Vec<u32>,
    dtypes: Vec<&'static str>,
    tensors: usize,
    prompt_length: usize,
    gen_length: usize,
    block_length: usize,
    batch: usize,
    cache: &'static str,
    /// Set when attention and MLP outputs are cached too.
    outputs_kept: bool,
    cfg_scale: f64,
    threads: usize,
    bytes: Bytes,
    /// Memory on a CUDA device; `None` when the kernels do not support the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    device_bytes: Option<DeviceBytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensor_list: Option<Vec<TensorLine>>,
}

#[derive(Serialize)]
struct Bytes {
    weights: usize,
    cache: usize,
    workspace: usize,
    scratch_per_thread: usize,
    scratch: usize,
    anonymous: usize,
}

#[derive(Serialize)]
struct DeviceBytes {
    weights: usize,
    cache: usize,
    workspace: usize,
}

/// Multiprocessors of an H100 or H200. The splits of attention, and so its workspace, depend on them.
#[cfg(feature = "cuda")]
const MULTIPROCESSORS: usize = 132;

#[cfg(feature = "cuda")]
fn device_bytes(config: &Config, sizes: &dllm_kernels::model::SessionConfig) -> Result<Option<DeviceBytes>> {
    if dllm_kernels::engine::check_cuda_model(config).is_err() {
        return Ok(None);
    }
    let memory = dllm_kernels::engine::MemoryEstimate::cuda(sizes, config, MULTIPROCESSORS)?;
    let weights = config.tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<usize>()).sum();
    Ok(Some(DeviceBytes { weights, cache: memory.cache, workspace: memory.workspace }))
}

#[cfg(not(feature = "cuda"))]
fn device_bytes(_: &Config, _: &dllm_kernels::model::SessionConfig) -> Result<Option<DeviceBytes>> {
    Ok(None)
}

/// Runs the command.
pub fn run(args: &Inspect) -> Result<()> {
    let (source, config, tensors) = open(args)?;
    let answer = answer(args, source, config, tensors)?;
    if args.json { print_json(&answer) } else { print(&text(&answer)) }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
    }
}

/// Returns the source, the configuration and the tensors of the model.
fn open(args: &Inspect) -> Result<(String, Config, Vec<TensorLine>)> {
    let line = |name: String, dtype: Dtype, shape: Vec<usize>| TensorLine {
        bytes: shape.iter().product::<usize>() * dtype.size(),
        dtype: dtype_name(dtype),
        name,
        shape,
    };
    let Some(dir) = &args.dir else {
        let name = args
            .shape
            .as_deref()
            .ok_or_else(|| Error::argument("DIR", "a checkpoint directory or --shape", "neither"))?;
        let config = shape_config(name)?;
        let tensors = config.tensors().into_iter().map(|(name, shape)| line(name, Dtype::Bf16, shape)).collect();
        return Ok((name.into(), config, tensors));
    };
    // Opening the model first gives the same errors as a decode.
    let config = Model::open(dir)?.config().clone();
    let weights = Weights::open(dir)?;
    let tensors = weights.list().into_iter().map(|(name, dtype, shape)| line(name.into(), dtype, shape.to_vec()));
    Ok((dir.display().to_string(), config, tensors.collect()))
}

fn answer(args: &Inspect, source: String, config: Config, tensors: Vec<TensorLine>) -> Result<Answer> {
    let options = Options {
        gen_length: args.gen_length,
        block_length: args.block_length,
        cache: args.cache,
        refresh_ratio: args.refresh_ratio,
        cfg_scale: args.cfg_scale,
        ..Options::default()
    };
    // Checked before a prompt of that length is allocated.
    let window = config.max_sequence_length;
    if args.gen_length > window || args.prompt_length > window - args.gen_length {
        let expected = format!("at most the model's {window} positions, with gen-length {}", args.gen_length);
        return Err(Error::argument("prompt-length", expected, args.prompt_length));
    }
    let token = u32::from(config.mask_token_id == 0);
    let prompts = [vec![token; args.prompt_length]];
    options.validate(&config, &prompts)?;
    let batch = args.batch as usize;
    let mut sizes = options.sizes(&config, &prompts);
    sizes.prompt_lens = vec![args.prompt_length; batch];
    sizes.max_candidates *= batch;
    let threads = args.threads.unwrap_or_else(rayon::current_num_threads);
    let memory = dllm_kernels::engine::MemoryEstimate::cpu(&sizes, &config, threads);
    let dtypes: BTreeSet<_> = tensors.iter().map(|t| t.dtype).collect();
    let device_bytes = device_bytes(&config, &sizes)?;
    Ok(Answer {
        source,
        family: config.family.to_string(),
        layers: config.num_layers,
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        d_model: config.d_model,
        mlp_hidden_size: config.mlp_hidden_size,
        vocab_size: config.vocab_size,
        tied_head: config.tied_head,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        max_sequence_length: config.max_sequence_length,
        mask_token_id: config.mask_token_id,
        eos_token_ids: config.eos_token_ids,
        dtypes: dtypes.into_iter().collect(),
        tensors: tensors.len(),
        prompt_length: args.prompt_length,
        gen_length: args.gen_length,
        block_length: options.block_length(),
        batch,
        cache: options.cache.name(),
        outputs_kept: sizes.feature_cache,
        cfg_scale: args.cfg_scale,
        threads,
        bytes: Bytes {
            weights: tensors.iter().map(|t| t.bytes).sum(),
            cache: memory.cache,
            workspace: memory.workspace,
            scratch_per_thread: memory.scratch / threads.max(1),
            scratch: memory.scratch,
            anonymous: memory.total(),
        },
        device_bytes,
        tensor_list: args.tensors.then_some(tensors),
    })
}

fn text(a: &Answer) -> String {
    let eos: Vec<_> = a.eos_token_ids.iter().map(u32::to_string).collect();
    let shared =
        if a.kv_heads == a.heads { String::new() } else { format!(", sharing {} of keys and values", a.kv_heads) };
    let tied = if a.tied_head { ", head tied to the embedding" } else { "" };
    let lines = [
        ("family", a.family.clone()),
        ("layers", a.layers.to_string()),
        ("heads", format!("{} of {}{shared}", a.heads, a.head_dim)),
        ("width", format!("{}, MLP {}", a.d_model, a.mlp_hidden_size)),
        ("vocabulary", format!("{}{tied}", a.vocab_size)),
        ("rope theta", a.rope_theta.to_string()),
        ("norm epsilon", format!("{:e}", a.rms_norm_eps)),
        ("window", format!("{} positions", a.max_sequence_length)),
        ("mask id", a.mask_token_id.to_string()),
        ("end-of-text ids", if eos.is_empty() { "none".into() } else { eos.join(", ") }),
        ("tensors", format!("{} ({})", a.tensors, a.dtypes.join(", "))),
    ];
    let mut text = format!("{}\n", a.source);
    for (name, value) in lines {
        text += &format!("  {name:<16}  {value}\n");
    }
    let guided = if a.cfg_scale > 0.0 { ", guided" } else { "" };
    text += &format!(
        "\nDecoding {} of {} + {} tokens in blocks of {}, cache {}{guided}, {}\n",
        count(a.batch, "sequence"),
        a.prompt_length,
        a.gen_length,
        a.block_length,
        a.cache,
        count(a.threads, "thread"),
    );
    let per_thread = bytes(a.bytes.scratch_per_thread);
    let row = |name: &str, size: usize, what: &str| format!("  {name:<16}  {:>10}  {what}\n", bytes(size));
    text += &row("weights", a.bytes.weights, "mapped from the files, shared; the system may drop and reread them");
    let cached = if a.outputs_kept { "keys, values, attention and MLP outputs" } else { "keys and values" };
    text += &row("cache", a.bytes.cache, &format!("{cached}, f32"));
    text += &row("workspace", a.bytes.workspace, "activations and logits, f32");
    text += &row("scratch", a.bytes.scratch, &format!("{per_thread} per thread"));
    text += &row("anonymous", a.bytes.anonymous, "cache, workspace and scratch");
    if let Some(DeviceBytes { weights, cache, workspace }) = a.device_bytes {
        text += "\nOn a CUDA device with 132 multiprocessors\n";
        text += &row("weights", weights, "bf16");
        text += &row("cache", cache, &format!("{cached}, bf16"));
        text += &row("workspace", workspace, "activations in bf16, logits in f32, tables");
        text += &row("all", weights + cache + workspace, "");
    }
    if let Some(list) = &a.tensor_list {
        let mut rows = vec![["tensor", "type", "shape", "size"].map(String::from).to_vec()];
        for t in list {
            let shape: Vec<_> = t.shape.iter().map(usize::to_string).collect();
            rows.push(vec![t.name.clone(), t.dtype.into(), shape.join(" x "), bytes(t.bytes)]);
        }
        text += &format!("\n{}", table(&rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::{covers, parse};
    use serde_json::Value;

    fn json(line: &str) -> Value {
        let args = parse::<Inspect>(line);
        let (source, config, tensors) = open(&args).unwrap();
        serde_json::to_value(answer(&args, source, config, tensors).unwrap()).unwrap()
    }

    /// Each flag changes these keys of the answer and no others.
    #[test]
    fn every_flag_reaches_the_answer() {
        let default = "--shape=mid --threads=3";
        // Sizes that every larger decode has larger.
        let all = ["bytes", "device_bytes"];
        let lines: [(&str, &[&str]); 11] = [
            ("--prompt-length=100", &["prompt_length", all[0], all[1]]),
            ("--gen-length=64", &["gen_length", all[0], all[1]]),
            ("--block-length=16", &["block_length", all[0], all[1]]),
            ("--batch=2", &["batch", all[0], all[1]]),
            ("--cache=adaptive", &["cache", "outputs_kept", all[0], all[1]]),
            ("--refresh-ratio=0.5", &["outputs_kept", all[0], all[1]]),
            ("--refresh-rows=0.5", &["outputs_kept", all[0], all[1]]),
            ("--cfg-scale=1.5", &["cfg_scale", all[0], all[1]]),
            ("--tensors", &["tensor_list"]),
            ("--threads=5", &["threads", "bytes"]),
            // The form of the output, not its contents.
            ("--json", &[]),
        ];
        let before = json(default);
        for (line, keys) in lines {
            let line_of = |flags: &str| match flags.contains("threads") {
                true => format!("--shape=mid {flags}"),
                false => format!("{default} {flags}"),
            };
            let after = json(&line_of(line));
            let (before, after) = (before.as_object().unwrap(), after.as_object().unwrap());
            let mut changed: Vec<&str> =
                after.keys().map(String::as_str).filter(|k| after.get(*k) != before.get(*k)).collect();
            changed.retain(|key| cfg!(feature = "cuda") || *key != "device_bytes");
            changed.sort_unstable();
            let mut keys: Vec<&str> =
                keys.iter().copied().filter(|key| cfg!(feature = "cuda") || *key != "device_bytes").collect();
            keys.sort_unstable();
            assert_eq!(changed, keys, "{line}");
        }
        let value = |line: &str, key: &str| json(line)[key].clone();
        assert_eq!(value("--shape=dream-7b", "source"), "dream-7b");
        assert_eq!(value("models/tiny-math", "source"), "models/tiny-math");
        assert_eq!(value("models/tiny-math --prompt-length=100", "prompt_length"), 100);
        assert_eq!(value("models/tiny-math --gen-length=64", "gen_length"), 64);
        assert_eq!(value("models/tiny-math --batch=7", "batch"), 7);
        covers::<Inspect>(lines.iter().map(|(line, _)| *line).chain(["--shape=mid", "--dir"]));
    }
}
