//! Every number that `dllm` prints, compared with one that this file computes: speeds, work, accuracy, sizes and memory.

use crate::common::process::run;
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{CacheMode, Config, Options};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

const TINY_MATH: &str = "models/tiny-math";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs `dllm` with these arguments, which must succeed.
fn dllm(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dllm"));
    command.args(args).current_dir(root()).stdin(Stdio::null()).env_remove("DLLM_ORIGINALS");
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output.stderr));
    output
}

fn dllm_line(line: &str) -> Output {
    dllm(&line.split_whitespace().collect::<Vec<_>>())
}

fn json_of(line: &str) -> Value {
    serde_json::from_slice(&dllm_line(line).stdout).unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

#[track_caller]
fn near(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-9 * want.abs(), "{what}: {got}, expected {want}");
}

fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Lines of a text with single spaces.
fn squeezed(bytes: &[u8]) -> Vec<String> {
    text(bytes).lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Tokens that count for the speed: those up to the first end-of-text token, and this one.
fn counted(tokens: &Value, end_tokens: &[u64]) -> usize {
    let tokens: Vec<u64> = serde_json::from_value(tokens.clone()).unwrap();
    tokens.iter().position(|token| end_tokens.contains(token)).map_or(tokens.len(), |end| end + 1)
}

/// The speed is the number of tokens divided by the seconds, for one prompt and for a batch.
#[test]
fn tokens_per_second_of_generate() {
    let tiny = "generate --model tests/golden/tiny-llada --gen-length 64 --policy fixed --json";
    let ends = [501];
    let one = json_of(&format!("{tiny} --prompt-ids 31,395,15"));
    let tokens = counted(&one["tokens"], &ends) as f64;
    near("one prompt", number(&one["tokens_per_second"]) * number(&one["seconds"]), tokens);
    assert_eq!(one["nfe"], 64);

    let batch = json_of(&format!("{tiny} --prompt-ids 31,395,15 --prompt-ids 7,8,9,10,11 --prompt-ids 1,2"));
    let sequences = batch["tokens"].as_array().unwrap();
    let tokens: usize = sequences.iter().map(|tokens| counted(tokens, &ends)).sum();
    assert!(sequences.len() == 3 && tokens > 64, "{tokens} tokens");
    near("batch", number(&batch["tokens_per_second"]) * number(&batch["seconds"]), tokens as f64);

    // The sample answer ends long before the 128 tokens.
    let start = Instant::now();
    let ended = json_of("generate --gen-length 128 --json");
    let took = start.elapsed().as_secs_f64();
    let tokens = counted(&ended["tokens"], &[906, 910]);
    assert!((2..128).contains(&tokens), "{tokens} tokens");
    near("ended", number(&ended["tokens_per_second"]) * number(&ended["seconds"]), tokens as f64);
    assert!(number(&ended["seconds"]) < took, "{} s of {took} s", ended["seconds"]);
}

/// The seconds are those of the decode: most of the time of a process that decodes for long.
#[test]
fn seconds_are_the_time_of_the_decode() {
    let start = Instant::now();
    let json = json_of("generate --gen-length 128 --policy fixed --cache none --json --threads 1");
    let (took, seconds) = (start.elapsed().as_secs_f64(), number(&json["seconds"]));
    assert!(seconds < took && seconds > 0.25 * took, "{seconds} s of {took} s");
}

#[test]
fn the_summary_of_generate() {
    for (line, ends) in [
        ("generate --model tests/golden/tiny-llada --gen-length 256 --policy fixed --prompt-ids 5,6 --threads 1", 501),
        (
            "generate --model tests/golden/tiny-llada --gen-length 128 --policy fixed --threads 2 --prompt-ids 5,6 \
             --prompt-ids 31,395,15",
            501,
        ),
    ] {
        let output = dllm_line(line);
        let summary = text(&output.stderr).lines().last().unwrap();
        let parts: Vec<&str> = summary.split(", ").collect();
        let [nfe, seconds, speed, device] = parts[..] else { panic!("{summary}") };
        let threads = if line.contains("--threads 1") { "cpu (1 thread)" } else { "cpu (2 threads)" };
        assert_eq!((nfe, device), (if line.contains("256") { "NFE 256" } else { "NFE 128" }, threads));
        let seconds: f64 = seconds.strip_suffix(" s").unwrap().parse().unwrap();
        let speed: f64 = speed.strip_suffix(" tokens/s").unwrap().parse().unwrap();
        let count = |line: &str| {
            let tokens: Vec<u64> = line.split(',').map(|id| id.parse().unwrap()).collect();
            counted(&json!(tokens), &[ends])
        };
        let tokens: usize = text(&output.stdout).lines().map(count).sum();
        // Both are rounded.
        let (least, most) = (tokens as f64 / (seconds + 0.0005) - 0.05, tokens as f64 / (seconds - 0.0005) + 0.05);
        assert!(least <= speed && speed <= most, "{summary}: expected {least} to {most} tokens/s for {tokens} tokens");
    }
}

/// MACs by the arithmetic of `docs/cache-design.md`.
struct Work(Config);

impl Work {
    fn of(model: &str) -> Work {
        Work(Config::open(&root().join(model)).unwrap())
    }

    /// One forward of `rows` rows that attend to `keys` keys. The head computes the rest of the last layer for the logit rows only.
    fn forward(&self, rows: usize, keys: usize, logit_rows: usize) -> f64 {
        let Work(c) = self;
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let attention = c.d_model * (q + 2 * kv) + 2 * keys * q;
        let rest = q * c.d_model + 3 * c.d_model * c.mlp_hidden_size;
        let layers = c.num_layers * rows * attention + (c.num_layers - 1) * rows * rest;
        (layers + logit_rows * (rest + c.d_model * c.vocab_size)) as f64
    }

    /// All forwards of a decode that commits one token per forward.
    fn decode(&self, cache: CacheMode, prompt: usize, generated: usize, block: usize) -> Vec<f64> {
        let length = prompt + generated;
        let mut forwards = vec![];
        for start in (prompt..length).step_by(block) {
            // The block has one mask less in each forward.
            for masks in (1..=block).rev() {
                let rows = match cache {
                    _ if masks == block => length,
                    CacheMode::None => length,
                    CacheMode::Prefix => length - start,
                    _ => block,
                };
                forwards.push(self.forward(rows, length, masks));
            }
        }
        forwards
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

const CACHES: [(&str, CacheMode); 3] =
    [("vanilla", CacheMode::None), ("prefix-fixed", CacheMode::Prefix), ("dual-fixed", CacheMode::Dual)];

/// The work of the modes of `bench`, by forward and by kind, for one sequence and for a batch.
#[test]
fn multiply_adds_of_bench() {
    let work = Work::of(TINY_MATH);
    for batch in [1, 3] {
        let line = format!(
            "bench --prompt-length 20 --gen-length 24 --block-length 8 --repeat 1 --batch {batch} --json \
             --modes vanilla,prefix-fixed,dual-fixed,adaptive"
        );
        let json = json_of(&line);
        let modes = json["modes"].as_array().unwrap();
        let vanilla: f64 = work.decode(CacheMode::None, 20, 24, 8).iter().sum();
        for (mode, (name, cache)) in modes.iter().zip(CACHES) {
            let what = format!("{name}, batch {batch}");
            let forwards = work.decode(cache, 20, 24, 8);
            let total: f64 = forwards.iter().sum();
            assert_eq!((&mode["name"], &mode["nfe"]), (&json!(name), &json!(24)));
            near(&what, number(&mode["multiply_adds_per_forward"]), total * batch as f64 / 24.0);
            near(&what, number(&mode["work_ratio_to_vanilla"]), vanilla / total);
            // Refreshes are the first forwards of the blocks; without a cache all forwards are of one kind.
            let refreshes: Vec<f64> = forwards.iter().copied().step_by(8).collect();
            let others: Vec<f64> = (0..24).filter(|i| i % 8 > 0).map(|i| forwards[i]).collect();
            let kinds = match cache {
                CacheMode::None => vec![("full", forwards, 44.0)],
                // The rows from the block on: 24, 16 and 8.
                CacheMode::Prefix => vec![("full", refreshes, 44.0), ("suffix", others, 16.0)],
                _ => vec![("block", others, 8.0), ("full", refreshes, 44.0)],
            };
            assert_eq!(keys(&mode["kinds"]), kinds.iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), "{what}");
            for (kind, forwards, rows) in kinds {
                let found = &mode["kinds"][kind];
                let what = format!("{what}, {kind}");
                assert_eq!(found["count"], json!(forwards.len()), "{what}");
                near(&what, number(&found["multiply_adds"]), median(&forwards) * batch as f64);
                near(&what, number(&found["rows"]), rows * batch as f64);
                // Two operations per MAC. The sum of the times is between the number times the shortest and the longest.
                let flop = 2e-6 * batch as f64 * forwards.iter().sum::<f64>();
                let n = forwards.len() as f64;
                let [ms_min, ms, ms_max, gflops] = ["ms_min", "ms", "ms_max", "gflops"].map(|key| number(&found[key]));
                assert!(0.0 < ms_min && ms_min <= ms && ms <= ms_max, "{what}: {found}");
                assert!(
                    gflops * n * ms_min <= flop * 1.000_001 && flop <= gflops * n * ms_max * 1.000_001,
                    "{what}: {found}"
                );
            }
        }
        // The same arithmetic as that of the program, which `tests/engine/adaptive.rs` holds to the counted work.
        let adaptive = &modes[3];
        let counted = number(&adaptive["multiply_adds_per_forward"]);
        near("adaptive", number(&adaptive["reckoned_multiply_adds_per_forward"]), counted);
        near("adaptive", number(&adaptive["work_ratio_to_vanilla"]), vanilla * batch as f64 / 24.0 / counted);
    }
}

/// Times and speeds of `bench` follow from its seconds and its batch.
#[test]
fn speeds_of_bench() {
    for (batch, repeat) in [(1, 1), (3, 2)] {
        let start = Instant::now();
        let json = json_of(&format!(
            "bench --model tests/golden/tiny-llada --prompt-length 12 --gen-length 32 --block-length 16 --batch {batch} \
             --repeat {repeat} --threads 1 --modes vanilla,dual-fixed,dual-threshold --json"
        ));
        let took = start.elapsed().as_secs_f64();
        assert_eq!(
            keys(&json),
            [
                "batch",
                "block_length",
                "device",
                "family",
                "gen_length",
                "model",
                "modes",
                "originals",
                "prompt_length",
                "roofs",
                "rounds",
                "threads",
                "weight_bytes_per_forward"
            ]
        );
        let sizes = ["batch", "prompt_length", "gen_length", "block_length", "rounds", "threads"];
        assert_eq!(sizes.map(|key| json[key].as_u64().unwrap()), [batch, 12, 32, 16, repeat, 1]);
        assert_eq!((&json["device"], &json["family"], &json["roofs"]), (&json!("cpu"), &json!("LLaDA"), &Value::Null));
        // All tensors but the embedding, in bf16.
        let config = Config::open(&root().join("tests/golden/tiny-llada")).unwrap();
        let elements = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
        let parameters: usize = config.tensors().iter().map(elements).sum();
        let bytes = file_tensors("tests/golden/tiny-llada").iter().map(|tensor| tensor.bytes).sum::<usize>();
        let embedding = config.vocab_size * config.d_model * (bytes / parameters);
        assert_eq!(json["weight_bytes_per_forward"], json!(bytes - embedding));

        let modes = json["modes"].as_array().unwrap();
        let seconds_of = |mode: &Value| serde_json::from_value::<Vec<f64>>(mode["seconds"].clone()).unwrap();
        let vanilla = median(&seconds_of(&modes[0]));
        let all: f64 = modes.iter().flat_map(seconds_of).sum();
        assert!(modes.len() == 3 && all < took, "{all} s in {took} s");
        for mode in modes {
            let name = mode["name"].as_str().unwrap();
            let seconds = seconds_of(mode);
            assert_eq!(seconds.len() as u64, repeat, "{name}");
            let (seconds, nfe) = (median(&seconds), number(&mode["nfe"]));
            near(name, number(&mode["ms_per_forward"]), 1000.0 * seconds / nfe);
            near(name, number(&mode["tokens_per_second"]), (batch * 32) as f64 / seconds);
            near(name, number(&mode["ratio_to_vanilla"]), vanilla / seconds);
            assert!(if name == "dual-threshold" { nfe < 32.0 } else { nfe == 32.0 }, "{name}: {nfe} forwards");
            let counts: f64 = mode["kinds"].as_object().unwrap().values().map(|kind| number(&kind["count"])).sum();
            assert_eq!(counts, nfe, "{name}");
            assert_eq!(mode["speedup"], Value::Null);
        }
    }
}

/// Text and JSON have the same work, rows and lengths.
#[test]
fn the_tables_of_bench_say_what_its_json_says() {
    let line = "bench --prompt-length 20 --gen-length 24 --block-length 8 --repeat 1 --batch 2 --threads 1 --modes dual-fixed,vanilla";
    let rows = squeezed(&dllm_line(line).stdout);
    let work = Work::of(TINY_MATH);
    let total = |cache| 2.0 * work.decode(cache, 20, 24, 8).iter().sum::<f64>();
    let (dual, vanilla) = (total(CacheMode::Dual), total(CacheMode::None));
    let millions = Config::open(&root().join(TINY_MATH))
        .unwrap()
        .tensors()
        .iter()
        .map(|(_, s)| s.iter().product::<usize>())
        .sum::<usize>() as f64
        / 1e6;
    for row in [
        format!(
            "models/tiny-math (LLaDA, {millions:.1} M parameters), cpu, 2 sequences of 20 prompt tokens, 24 generated in \
             blocks of 8, 1 thread, 1 round"
        ),
        format!("dual-fixed {:.3} {:.2}", dual / 24e9, vanilla / dual),
        format!("vanilla {:.3} 1.00", vanilla / 24e9),
    ] {
        assert!(rows.contains(&row), "no {row:?} in {rows:#?}");
    }
    // Rows of a forward over both sequences.
    assert!(rows.iter().any(|row| row.starts_with("full 88 ")), "{rows:#?}");
    assert!(rows.iter().any(|row| row.starts_with("block 16 ")), "{rows:#?}");
}

/// Writes a problem file with a blank line before each problem, and a blank one at the end.
fn problems(dir: &Path, rows: &[(String, String)]) -> PathBuf {
    let file = dir.join("problems.jsonl");
    let line =
        |(prompt, answer): &(String, String)| format!("\n{}\n \t\n", json!({"prompt": prompt, "answer": answer}));
    std::fs::write(&file, rows.iter().map(line).collect::<String>()).unwrap();
    file
}

/// Prompt and answer of the first problems of the sample model.
fn sample_problems(n: usize) -> Vec<(String, String)> {
    let rows = std::fs::read_to_string(root().join(TINY_MATH).join("eval/problems_0shot.jsonl")).unwrap();
    let field = |row: &Value, key: &str| row[key].as_str().unwrap().to_string();
    let row =
        |line: &str| serde_json::from_str::<Value>(line).map(|row| (field(&row, "prompt"), field(&row, "answer")));
    rows.lines().take(n).map(|line| row(line).unwrap()).collect()
}

/// Accuracy, forwards and work of `eval` are the means of what `generate` does with each problem.
#[test]
fn numbers_of_eval() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = sample_problems(4);
    // An answer that no completion has.
    rows[2].1 = "no number".into();
    let file = problems(dir.path(), &rows);
    let prompt_file = dir.path().join("prompt.txt");
    let path = file.to_str().unwrap();
    let tokenizer = Tokenizer::open(&root().join(TINY_MATH), 1024).unwrap().unwrap();
    let lengths: Vec<usize> = rows.iter().map(|(prompt, _)| tokenizer.encode(prompt, false).unwrap().len()).collect();
    let setting = ["--gen-length", "64", "--cache", "dual", "--policy"];

    for policy in ["fixed", "threshold"] {
        let (mut right, mut nfe, mut tokens, mut seconds) = (0, 0.0, 0, 0.0);
        for (prompt, answer) in &rows {
            std::fs::write(&prompt_file, prompt).unwrap();
            let flags =
                [&["generate", "--json", "--prompt-file", prompt_file.to_str().unwrap()][..], &setting, &[policy]];
            let json: Value = serde_json::from_slice(&dllm(&flags.concat()).stdout).unwrap();
            let text = json["text"].as_str().unwrap();
            let found = text.split_once("####").and_then(|(_, rest)| rest.lines().next()).unwrap_or("none");
            right += usize::from(found.trim() == answer);
            nfe += number(&json["nfe"]);
            tokens += counted(&json["tokens"], &[906, 910]);
            seconds += number(&json["seconds"]);
        }
        assert!((1..4).contains(&right), "{right} of 4 answers are right");
        let flags = [&["eval", "--json", "--problems", path][..], &setting, &[policy]];
        let json: Value = serde_json::from_slice(&dllm(&flags.concat()).stdout).unwrap();
        let row = &json[0];
        assert_eq!(keys(row), ["accuracy", "multiply_adds", "nfe", "problems", "setting", "tokens_per_second"]);
        assert_eq!((row["problems"].as_u64(), json.as_array().unwrap().len()), (Some(4), 1));
        near("accuracy", number(&row["accuracy"]), right as f64 / 4.0);
        near("nfe", number(&row["nfe"]), nfe / 4.0);
        let (speed, other) = (number(&row["tokens_per_second"]), tokens as f64 / seconds);
        assert!(speed > other / 50.0 && speed < other * 50.0, "{speed} tokens/s; generate has {other}");
        let Some(work) = (policy == "fixed").then(|| Work::of(TINY_MATH)) else { continue };
        let macs: f64 = lengths.iter().flat_map(|prompt| work.decode(CacheMode::Dual, *prompt, 64, 32)).sum();
        near("multiply_adds", number(&row["multiply_adds"]), macs / 4.0);

        // The table has the same numbers.
        let flags = [&["eval", "--problems", path][..], &setting, &[policy]];
        let table = squeezed(&dllm(&flags.concat()).stdout);
        assert_eq!(table[0], "setting problems accuracy NFE/problem G MAC/problem tokens/s");
        let (accuracy, work) = (right as f64 / 4.0, macs / 4e9);
        let start = format!("cache=dual,policy=fixed 4 {accuracy:.3} 64.0 {work:.3} ");
        assert!(table.len() == 2 && table[1].starts_with(&start), "{table:?}, expected {start}");
    }
}

/// Blank lines are no problems, and do not count for `--limit`.
#[test]
fn a_limit_counts_problems() {
    let dir = tempfile::tempdir().unwrap();
    let file = problems(dir.path(), &sample_problems(3));
    let of = |limit: &[&str]| {
        let flags = [
            &["eval", "--json", "--gen-length", "8", "--cache", "none", "--problems", file.to_str().unwrap()][..],
            limit,
        ];
        let json: Value = serde_json::from_slice(&dllm(&flags.concat()).stdout).unwrap();
        json[0]["problems"].as_u64().unwrap()
    };
    assert_eq!(of(&["--limit", "1"]), 1);
    assert_eq!(of(&["--limit", "2"]), 2);
    assert_eq!(of(&["--limit", "5"]), 3);
    assert_eq!(of(&[]), 3);
}

/// Tensor of a safetensors file, as its header states it.
struct FileTensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: usize,
}

/// Reads the headers of all safetensors files of a checkpoint.
fn file_tensors(model: &str) -> Vec<FileTensor> {
    let mut tensors = vec![];
    for entry in std::fs::read_dir(root().join(model)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let file = std::fs::read(path).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        for (name, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
            let [from, to]: [usize; 2] = serde_json::from_value(tensor["data_offsets"].clone()).unwrap();
            let shape = serde_json::from_value(tensor["shape"].clone()).unwrap();
            let dtype = tensor["dtype"].as_str().unwrap().to_lowercase();
            tensors.push(FileTensor { name: name.clone(), dtype, shape, bytes: to - from });
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// `inspect` prints the sizes of `config.json` and of the headers of the weight files.
#[test]
fn architecture_of_inspect() {
    for (model, pairs) in [
        (
            "tests/golden/tiny-llada",
            [
                ("layers", "n_layers"),
                ("heads", "n_heads"),
                ("kv_heads", "n_kv_heads"),
                ("d_model", "d_model"),
                ("mlp_hidden_size", "mlp_hidden_size"),
                ("vocab_size", "vocab_size"),
                ("max_sequence_length", "max_sequence_length"),
                ("mask_token_id", "mask_token_id"),
                ("tied_head", "weight_tying"),
            ],
        ),
        (
            "tests/golden/tiny-dream",
            [
                ("layers", "num_hidden_layers"),
                ("heads", "num_attention_heads"),
                ("kv_heads", "num_key_value_heads"),
                ("d_model", "hidden_size"),
                ("mlp_hidden_size", "intermediate_size"),
                ("vocab_size", "vocab_size"),
                ("max_sequence_length", "max_position_embeddings"),
                ("mask_token_id", "mask_token_id"),
                ("tied_head", "tie_word_embeddings"),
            ],
        ),
    ] {
        let config: Value =
            serde_json::from_slice(&std::fs::read(root().join(model).join("config.json")).unwrap()).unwrap();
        let json = json_of(&format!("inspect {model} --json --tensors"));
        for (key, name) in pairs {
            assert_eq!(json[key], config[name], "{model}: {key}");
        }
        near("theta", number(&json["rope_theta"]), number(&config["rope_theta"]));
        assert!((number(&json["rms_norm_eps"]) / number(&config["rms_norm_eps"]) - 1.0).abs() < 1e-6);
        let head_dim = number(&config[pairs[3].1]) / number(&config[pairs[1].1]);
        near("head_dim", number(&json["head_dim"]), head_dim);
        assert_eq!(json["eos_token_ids"], json!([config["eos_token_id"]]));
        assert_eq!(json["source"], model);

        let tensors = file_tensors(model);
        assert_eq!(json["tensors"], json!(tensors.len()));
        let list = json["tensor_list"].as_array().unwrap();
        assert_eq!(list.len(), tensors.len());
        for (row, t) in list.iter().zip(&tensors) {
            assert_eq!(row, &json!({"name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.bytes}));
        }
        assert_eq!(json["bytes"]["weights"], json!(tensors.iter().map(|t| t.bytes).sum::<usize>()));
        let dtypes: std::collections::BTreeSet<_> = tensors.iter().map(|t| &t.dtype).collect();
        assert_eq!(json["dtypes"], json!(dtypes));

        // The text has the same numbers.
        let rows = squeezed(&dllm_line(&format!("inspect {model} --tensors --threads 1")).stdout);
        let n = |key: &str| json[key].to_string();
        let shared = if json["heads"] == json["kv_heads"] {
            String::new()
        } else {
            format!(", sharing {} of keys and values", n("kv_heads"))
        };
        for row in [
            format!("layers {}", n("layers")),
            format!("heads {} of {}{shared}", n("heads"), n("head_dim")),
            format!("width {}, MLP {}", n("d_model"), n("mlp_hidden_size")),
            format!("vocabulary {}", n("vocab_size")),
            format!("rope theta {}", number(&json["rope_theta"])),
            format!("window {} positions", n("max_sequence_length")),
            format!("mask id {}", n("mask_token_id")),
            format!("end-of-text ids {}", config["eos_token_id"]),
            "Decoding 1 sequence of 128 + 128 tokens in blocks of 32, cache dual, 1 thread".to_string(),
        ] {
            assert!(rows.contains(&row), "no {row:?} in {rows:#?}");
        }
        for t in &tensors {
            let shape = t.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            let size = size_text(t.bytes);
            assert!(rows.contains(&format!("{} {} {shape} {size}", t.name, t.dtype)), "no {} in {rows:#?}", t.name);
        }
    }
}

/// Formats a size as `inspect` does.
fn size_text(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1048576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1073741824.0),
    }
}

/// Memory of `inspect`, in JSON and in text. The caches by their shapes; all of it is the estimate for that batch.
#[test]
fn memory_of_inspect() {
    let config = Config::shape("mid").unwrap();
    let (prompt, generated, threads) = (100, 64, 3);
    for batch in [1, 2, 5] {
        for (flags, options) in [
            ("--cache none", Options { cache: CacheMode::None, ..Options::default() }),
            ("--cache dual", Options::default()),
            (
                "--cache prefix --cfg-scale 1.5",
                Options { cache: CacheMode::Prefix, cfg_scale: 1.5, ..Options::default() },
            ),
            ("--cache adaptive", Options { cache: CacheMode::Adaptive, ..Options::default() }),
            ("--cache dual --refresh-ratio 0.5", Options { refresh_ratio: Some(0.5), ..Options::default() }),
        ] {
            let options = Options { gen_length: generated, block_length: Some(16), ..options };
            let line = format!(
                "inspect --shape mid --prompt-length {prompt} --gen-length {generated} --block-length 16 --batch {batch} --threads {threads} {flags}"
            );
            let json = json_of(&format!("{line} --json"));
            let bytes = |key: &str| json["bytes"][key].as_u64().unwrap() as usize;
            let positions = batch * (prompt + generated) * if options.cfg_scale > 0.0 { 2 } else { 1 };
            let keys_and_values =
                if options.cache == CacheMode::None { 0 } else { 2 * config.num_layers * config.d_model };
            let kept = options.cache == CacheMode::Adaptive || options.refresh_ratio.is_some();
            let features = if kept { 2 * (config.num_layers - 1) * config.d_model } else { 0 };
            assert_eq!(bytes("cache"), 4 * positions * (keys_and_values + features), "{line}");
            assert_eq!(json["outputs_kept"], kept, "{line}");
            assert_eq!(bytes("anonymous"), bytes("cache") + bytes("workspace") + bytes("scratch"), "{line}");
            assert_eq!(bytes("scratch"), threads * bytes("scratch_per_thread"), "{line}");
            // bf16
            let parameters: usize = config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(bytes("weights"), 2 * parameters);

            let prompts = vec![vec![1; prompt]; batch];
            let sizes = options.sizes(&config, &prompts);
            let estimate = dllm_kernels::engine::MemoryEstimate::cpu(&sizes, &config, threads);
            let [cache, workspace, scratch] = ["cache", "workspace", "scratch"].map(bytes);
            assert_eq!((cache, workspace, scratch), (estimate.cache, estimate.workspace, estimate.scratch), "{line}");
            #[cfg(feature = "cuda")]
            {
                let estimate = dllm_kernels::engine::MemoryEstimate::cuda(&sizes, &config, 132).unwrap();
                let want = json!({"weights": 2 * parameters, "cache": estimate.cache, "workspace": estimate.workspace});
                assert_eq!(json["device_bytes"], want, "{line}");
            }

            let rows = squeezed(&dllm_line(&line).stdout);
            let has =
                |start: String| assert!(rows.iter().any(|row| row.starts_with(&start)), "no {start:?} in {rows:#?}");
            let guided = if options.cfg_scale > 0.0 { ", guided" } else { "" };
            let sequences = if batch == 1 { "1 sequence".into() } else { format!("{batch} sequences") };
            has(format!(
                "Decoding {sequences} of 100 + 64 tokens in blocks of 16, cache {}{guided}, 3 threads",
                options.cache
            ));
            for key in ["weights", "cache", "workspace", "scratch", "anonymous"] {
                has(format!("{key} {} ", size_text(bytes(key))));
            }
            has(format!("scratch {} {} per thread", size_text(scratch), size_text(bytes("scratch_per_thread"))));
            if let Some(device) = json.get("device_bytes") {
                let of = |key: &str| device[key].as_u64().unwrap() as usize;
                has(format!(
                    "cache {} {}, bf16",
                    size_text(of("cache")),
                    if kept { "keys, values, attention and MLP outputs" } else { "keys and values" }
                ));
                has(format!("workspace {} activations in bf16", size_text(of("workspace"))));
                has(format!("all {}", size_text(of("weights") + of("cache") + of("workspace"))));
            }
        }
    }
}

/// The table of presets has the numbers of its JSON form, which are those of the published scripts for these.
#[test]
fn numbers_of_presets() {
    let json = json_of("presets --json");
    let presets = json["presets"].as_array().unwrap();
    let rows = squeezed(&dllm_line("presets").stdout);
    assert_eq!(rows[0], "preset prompt-interval response-interval refresh-ratio block-length gen-length steps");
    for (preset, row) in presets.iter().zip(&rows[1..]) {
        assert_eq!(keys(preset), ["lengths", "name", "prompt_interval", "response_interval"]);
        let lengths: [usize; 3] = serde_json::from_value(preset["lengths"].clone()).unwrap();
        let lengths = lengths.map(|n| n.to_string()).join(" ");
        let name = preset["name"].as_str().unwrap();
        let want = format!("{name} {} {} 0.25 {lengths}", preset["prompt_interval"], preset["response_interval"]);
        assert_eq!(row, &want);
    }
    for row in [
        "gsm8k-llada-instruct 50 7 0.25 8 256 256",
        "gsm8k-dream-instruct 25 2 0.25 256 256 256",
        "humaneval-llada-instruct-25 25 5 0.25 32 512 512",
        "hotpotqa-llada-instruct 100 8 0.25 32 32 32",
    ] {
        assert!(rows.iter().any(|found| found == row), "no {row:?} in {rows:#?}");
    }
}
