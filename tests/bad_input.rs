//! Hostile checkpoints, configs, prompts and options, at the level of the library: each is refused with an error that
//! names the thing, what was expected and what was found; none panics, hangs, or lets a token through.

mod checkpoint;

use checkpoint::{Checkpoint, FILE, INDEX, MASK, VOCAB, WINDOW, write};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, PassKind};
use dllm_kernels::model::{Session, Sizes};
use dllm_kernels::{CacheMode, Confidence, Error, Family, Generation, Generator, Model, Options, Policy, Result};
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// The error's variant, and that its message holds every one of `words`.
#[track_caller]
fn refused<T>(result: Result<T>, variant: &str, words: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("accepted; expected {variant} {words:?}"));
    let (found, message) = (format!("{error:?}"), error.to_string());
    assert!(found.starts_with(variant), "expected {variant}, got {found}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

fn open(checkpoint: &Checkpoint) -> Model {
    Model::open(checkpoint.write().path()).unwrap()
}

/// Opens a directory of this config and model file.
fn open_files(config: &str, file: &[u8]) -> Result<Model> {
    Model::open(write(config, file).path())
}

/// Eight tokens in two blocks.
fn options() -> Options {
    Options { gen_length: 8, block_length: Some(4), ..Options::default() }
}

fn generate(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Result<Generation> {
    Generator::new(model).options(options.clone()).generate(prompts)
}

/// Logits at every position of `tokens`.
fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let n = tokens.len();
    let sizes = Sizes { prompt_lens: vec![n], gen_length: 0, candidates: n, cached: false, guided: false };
    let mut session = Session::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let plan = BlockPlan { mode: CacheMode::None, pass: PassKind::Full };
    session.forward(&[tokens.to_vec()], &[(0, 0..n)], &plan, &(0..n).collect::<Vec<_>>(), None);
    session.logits(n)
}

mod files {
    use super::*;

    #[test]
    fn no_directory() {
        refused(Model::open("/no/such/place"), "Io", &["/no/such/place", "no such checkpoint directory"]);
    }

    #[test]
    fn a_file_in_place_of_the_directory() {
        let dir = Checkpoint::llada().write();
        refused(Model::open(dir.path().join(FILE)), "Io", &[FILE, "not a directory"]);
    }

    #[test]
    fn no_config() {
        let dir = Checkpoint::llada().write();
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        refused(Model::open(dir.path()), "Io", &["config.json", "No such file"]);
    }

    #[test]
    fn no_safetensors() {
        let dir = Checkpoint::llada().write();
        std::fs::rename(dir.path().join(FILE), dir.path().join("pytorch_model.bin")).unwrap();
        refused(Model::open(dir.path()), "Format", &[dir.path().to_str().unwrap(), "no model*.safetensors"]);
    }

    /// Directories, and links to devices that never end.
    #[test]
    #[cfg(unix)]
    fn no_files() {
        let dir = Checkpoint::llada().write();
        let replace = |name: &str, target: &str| {
            let path = dir.path().join(name);
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
            match target {
                "" => std::fs::create_dir(path).unwrap(),
                target => std::os::unix::fs::symlink(target, path).unwrap(),
            }
        };
        for target in ["", "/dev/zero", "/dev/null"] {
            replace(FILE, target);
            refused(Model::open(dir.path()), "Format", &["no model*.safetensors here"]);
        }
        for target in ["", "/dev/zero", "/dev/null"] {
            replace("config.json", target);
            refused(Model::open(dir.path()), "Format", &["config.json", "expected a file"]);
        }
    }
}

mod config {
    use super::*;

    #[test]
    fn not_json() {
        let nested = "[".repeat(100_000);
        for text in ["", "{", "nul", "{\"model_type\": \"llada\",}", "{} {}", &nested] {
            refused(open_files(text, &[]), "Format", &["config.json", "line 1 column"]);
        }
        let dir = write("", &[]);
        std::fs::write(dir.path().join("config.json"), [0xff, 0xfe, 0x00]).unwrap();
        refused(Model::open(dir.path()), "Io", &["config.json", "UTF-8"]);
    }

    #[test]
    fn unknown_architecture() {
        let found = |text: &str| match text {
            "[]" | "7" | "{}" => "nothing".to_string(),
            other => serde_json::from_str::<Value>(other).unwrap()["model_type"].to_string(),
        };
        for text in [
            "[]",
            "7",
            "{}",
            r#"{"model_type": "qwen2"}"#,
            r#"{"model_type": "LLADA-MOE"}"#,
            r#"{"model_type": 7}"#,
            r#"{"model_type": ["llada"]}"#,
        ] {
            let words = ["config.json", "\"model_type\"", "expected \"llada\" or \"Dream\"", &found(text)];
            refused(open_files(text, &[]), "Config", &words);
        }
    }

    /// Every size, by the name it has in each family.
    const SIZES: [(Family, &str); 13] = [
        (Family::Llada, "d_model"),
        (Family::Llada, "n_layers"),
        (Family::Llada, "n_heads"),
        (Family::Llada, "mlp_hidden_size"),
        (Family::Llada, "max_sequence_length"),
        (Family::Llada, "n_kv_heads"),
        (Family::Dream, "hidden_size"),
        (Family::Dream, "num_hidden_layers"),
        (Family::Dream, "num_attention_heads"),
        (Family::Dream, "intermediate_size"),
        (Family::Dream, "max_position_embeddings"),
        (Family::Dream, "vocab_size"),
        (Family::Dream, "num_key_value_heads"),
    ];

    fn open_with(family: Family, key: &str, value: Option<Value>) -> Result<Model> {
        let checkpoint = Checkpoint::new(family);
        open_files(&checkpoint.config_with(key, value).to_string(), &checkpoint.file())
    }

    #[test]
    fn missing_keys() {
        for (family, key) in SIZES.into_iter().filter(|(_, key)| !key.contains("kv") && !key.contains("key_value")) {
            for value in [None, Some(Value::Null)] {
                let words = ["config.json", key, "expected a whole number", "found nothing"];
                refused(open_with(family, key, value), "Config", &words);
            }
        }
        for family in FAMILIES {
            for key in ["rope_theta", "rms_norm_eps"] {
                let words = ["config.json", key, "expected a positive number", "found nothing"];
                refused(open_with(family, key, None), "Config", &words);
            }
            let words = ["config.json", "mask_token_id", "expected one token id", "found nothing"];
            refused(open_with(family, "mask_token_id", None), "Config", &words);
        }
        let mut config = Checkpoint::llada().config_with("embedding_size", None);
        config.as_object_mut().unwrap().remove("vocab_size");
        refused(open_files(&config.to_string(), &[]), "Config", &["config.json", "vocab_size", "found nothing"]);
    }

    #[test]
    fn sizes_out_of_range() {
        let bad = [
            json!(0),
            json!(-64),
            json!(1e18),
            json!(1_000_000_000_000_000_000u64),
            json!(u64::MAX),
            json!((1 << 24) + 1),
            json!(64.0),
            json!(2.5),
            json!("64"),
            json!(true),
            json!([64]),
            json!({"size": 64}),
        ];
        let llada_rows = [(Family::Llada, "embedding_size")];
        for (family, key) in SIZES.into_iter().chain(llada_rows) {
            for value in &bad {
                let found = format!("found {value}");
                let words = ["config.json", key, "expected a whole number from 1 to 16777216", &found];
                refused(open_with(family, key, Some(value.clone())), "Config", &words);
            }
        }
    }

    /// Sizes within range that the file does not back: refused by the first tensor, before anything is allocated.
    #[test]
    fn sizes_that_the_tensors_do_not_have() {
        for (family, key) in SIZES {
            let longer = ["max_sequence_length", "max_position_embeddings"].contains(&key);
            let value = json!(1 << 24);
            match (open_with(family, key, Some(value)), key) {
                (Ok(_), _) => assert!(longer, "{key}"),
                (result, "n_heads" | "num_attention_heads" | "n_kv_heads" | "num_key_value_heads") => {
                    refused(result, "Config", &["config.json", key, "expected a divisor"]);
                }
                (result, "d_model" | "hidden_size") => {
                    refused(result, "Config", &["config.json", "heads", "expected heads of width", "found width"]);
                }
                (result, "n_layers" | "num_hidden_layers") => {
                    refused(result, "Tensor", &["s.2.", "expected shape", "found no such tensor"]);
                }
                (result, _) => refused(result, "Tensor", &["weight", "expected shape [16777216, 64]", "found shape ["]),
            }
        }
    }

    #[test]
    fn heads() {
        let cases = [
            (Family::Llada, json!({"d_model": 96}), "n_heads", "heads of width [32, 64, 128]", "width 48"),
            (Family::Llada, json!({"n_heads": 3}), "n_heads", "a divisor of the width 64", "3"),
            (Family::Llada, json!({"n_heads": 64}), "n_heads", "heads of width", "width 1"),
            (Family::Llada, json!({"n_kv_heads": 3}), "n_kv_heads", "a divisor of 2 heads", "3"),
            (Family::Llada, json!({"n_kv_heads": 4}), "n_kv_heads", "a divisor of 2 heads", "4"),
            (Family::Dream, json!({"hidden_size": 96}), "num_attention_heads", "heads of width", "width 48"),
            (Family::Dream, json!({"num_attention_heads": 3}), "num_attention_heads", "a divisor of the width 64", "3"),
            (Family::Dream, json!({"num_key_value_heads": 3}), "num_key_value_heads", "a divisor of 2 heads", "3"),
        ];
        for (family, change, key, expected, found) in cases {
            let (changed, value) = change.as_object().unwrap().iter().next().unwrap();
            let words = ["config.json", key, &format!("expected {expected}"), &format!("found {found}")];
            refused(open_with(family, changed, Some(value.clone())), "Config", &words);
        }
    }

    #[test]
    fn tokens() {
        let cases = [
            ("mask_token_id", json!(VOCAB), "a token id below 40"),
            ("mask_token_id", json!(-1), "a token id below 40"),
            ("mask_token_id", json!(u64::MAX), "a token id below 40"),
            ("mask_token_id", json!(3.5), "a token id below 40"),
            ("mask_token_id", json!("[MASK]"), "a token id below 40"),
            ("mask_token_id", json!([1, 2]), "one token id"),
            ("mask_token_id", json!([]), "one token id"),
            ("eos_token_id", json!(VOCAB), "a token id below 40"),
            ("eos_token_id", json!([1, 2, 4_000_000_000u64]), "a token id below 40"),
            ("eos_token_id", json!([[1]]), "a token id below 40"),
        ];
        for family in FAMILIES {
            for (key, value, expected) in &cases {
                let found = match value {
                    Value::Array(list) if *key == "eos_token_id" => list.last().unwrap(),
                    value => value,
                };
                let words = ["config.json", key, &format!("expected {expected}"), &format!("found {found}")];
                refused(open_with(family, key, Some(value.clone())), "Config", &words);
            }
        }
    }

    #[test]
    fn generation_config() {
        let dir = Checkpoint::dream().write();
        let path = dir.path().join("generation_config.json");
        let cases = [
            ("{", "Format", vec!["generation_config.json"]),
            (r#"{"eos_token_id": 40}"#, "Config", vec!["generation_config.json", "eos_token_id", "found 40"]),
            (r#"{"eos_token_id": [3, "x"]}"#, "Config", vec!["generation_config.json", "eos_token_id", "found \"x\""]),
        ];
        for (text, variant, words) in cases {
            std::fs::write(&path, text).unwrap();
            refused(Model::open(dir.path()), variant, &words);
        }
        for text in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": [3, 4]}"#] {
            std::fs::write(&path, text).unwrap();
            assert!(Model::open(dir.path()).unwrap().config().eos_token_ids.contains(&checkpoint::EOS));
        }
    }

    #[test]
    fn unsupported_features() {
        let cases = [
            (Family::Llada, "alibi", json!(true)),
            (Family::Llada, "include_bias", json!(true)),
            (Family::Llada, "include_qkv_bias", json!(true)),
            (Family::Llada, "bias_for_layer_norm", json!(true)),
            (Family::Llada, "attention_layer_norm", json!(true)),
            (Family::Llada, "input_emb_norm", json!(true)),
            (Family::Llada, "scale_logits", json!(true)),
            (Family::Llada, "multi_query_attention", json!(true)),
            (Family::Llada, "alibi", json!("false")),
            (Family::Llada, "activation_type", json!("gelu")),
            (Family::Llada, "activation_type", json!(0)),
            (Family::Llada, "block_type", json!("sequential")),
            (Family::Llada, "layer_norm_type", json!("default")),
            (Family::Llada, "rope", json!(false)),
            (Family::Llada, "weight_tying", json!("yes")),
            (Family::Dream, "hidden_act", json!("gelu")),
            (Family::Dream, "use_sliding_window", json!(true)),
            (Family::Dream, "rope_scaling", json!({"type": "yarn", "factor": 4.0})),
            (Family::Dream, "tie_word_embeddings", json!(1)),
        ];
        for (family, key, value) in cases {
            let words = ["config.json", key, "expected ", &format!("found {value}")];
            refused(open_with(family, key, Some(value.clone())), "Config", &words);
        }
        for family in FAMILIES {
            for key in ["rope_theta", "rms_norm_eps"] {
                for value in [json!(0), json!(-1e-5), json!("1e-5"), json!(1e300), json!(1e-300), json!([1])] {
                    let words = ["config.json", key, "expected a positive number", &format!("found {value}")];
                    refused(open_with(family, key, Some(value.clone())), "Config", &words);
                }
            }
        }
    }
}

mod tensors {
    use super::*;

    #[test]
    fn missing() {
        for family in FAMILIES {
            let checkpoint = Checkpoint::new(family);
            for name in checkpoint.tensors.keys() {
                let dir = write(&checkpoint.config.to_string(), &checkpoint.file_of(|n| n != name));
                let shape = format!("expected shape {:?}", checkpoint.tensors[name].shape);
                let words = [dir.path().to_str().unwrap(), name, &shape, "found no such tensor"];
                refused(Model::open(dir.path()), "Tensor", &words);
            }
        }
    }

    #[test]
    fn wrong_shape() {
        for family in FAMILIES {
            let whole = Checkpoint::new(family);
            for name in whole.tensors.keys() {
                let shape = &whole.tensors[name].shape;
                let mut taller = shape.clone();
                taller[0] += 1;
                let mut deeper = shape.clone();
                deeper.push(1);
                // The same number of elements, the other way round.
                let mut turned = shape.clone();
                turned.reverse();
                for wrong in [taller, deeper, turned, vec![], vec![0]] {
                    if wrong == *shape {
                        continue;
                    }
                    let mut checkpoint = whole.clone();
                    let tensor = checkpoint.tensor(name);
                    tensor.values.resize(wrong.iter().product(), 0.5);
                    tensor.shape = wrong.clone();
                    let words =
                        [&format!("tensor \"{name}\""), &format!("shape {shape:?}"), &format!("shape {wrong:?}")];
                    refused(Model::open(checkpoint.write().path()), "Tensor", &words.map(|w| w.as_str()));
                }
            }
        }
    }

    #[test]
    fn wrong_element_type() {
        for family in FAMILIES {
            for dtype in [Dtype::I64, Dtype::F64] {
                let mut checkpoint = Checkpoint::new(family);
                let name = checkpoint.head();
                checkpoint.tensor(name).dtype = dtype;
                let words = [FILE, name, "expected element type BF16, F16 or F32", &format!("found {dtype:?}")];
                refused(Model::open(checkpoint.write().path()), "Tensor", &words);
            }
        }
    }

    /// Every value is one that all types hold. Products may run on another unit for another type, which adds up in
    /// another order: the same but for the rounding of f32.
    #[test]
    fn half_and_single_precision_give_the_same_logits() {
        fn same(got: &[f32], want: &[f32], what: &str) {
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-4, "{what}: {got} {want}");
            }
        }
        for family in FAMILIES {
            let tokens: Vec<u32> = (0..VOCAB as u32).collect();
            let checkpoint = Checkpoint::new(family);
            let want = logits(&open(&checkpoint), &tokens);
            assert!(want.iter().all(|l| l.is_finite()));
            for dtype in [Dtype::F16, Dtype::F32] {
                let got = logits(&open(&checkpoint.clone().with_dtype(dtype)), &tokens);
                same(&got, &want, &format!("{family} {dtype:?}"));
            }
            // Every other tensor in another type, so that stacked matrices are mixed.
            let mut mixed = checkpoint.clone();
            mixed.tensors.values_mut().step_by(2).for_each(|t| t.dtype = Dtype::F32);
            same(&logits(&open(&mixed), &tokens), &want, &format!("{family} mixed"));
        }
    }

    #[test]
    fn tied_embeddings() {
        for (family, key) in [(Family::Llada, "weight_tying"), (Family::Dream, "tie_word_embeddings")] {
            let mut untied = Checkpoint::new(family);
            let (embedding, head) = (untied.embedding(), untied.head());
            *untied.tensor(head) = untied.tensors[embedding].clone();
            let mut tied = untied.clone();
            tied.config = tied.config_with(key, Some(json!(true)));
            let both = open(&tied);
            tied.tensors.remove(head);
            let alone = open(&tied);
            let tokens: Vec<u32> = (0..VOCAB as u32).collect();
            let want = logits(&open(&untied), &tokens);
            assert_eq!(logits(&alone, &tokens), want);
            assert_eq!(logits(&both, &tokens), want);
            tied.config = untied.config.clone();
            refused(Model::open(tied.write().path()), "Tensor", &[head, "found no such tensor"]);
        }
    }
}

mod safetensors_file {
    use super::*;

    /// Header (without padding) and data of the file.
    fn parts(file: &[u8]) -> (Value, &[u8]) {
        let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        (serde_json::from_slice(&file[8..8 + n]).unwrap(), &file[8 + n..])
    }

    fn join(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
        let header = header.as_ref();
        [&(header.len() as u64).to_le_bytes(), header, data].concat()
    }

    #[track_caller]
    fn refuses(file: &[u8], words: &str) {
        let config = Checkpoint::llada().config.to_string();
        refused(open_files(&config, file), "Format", &[FILE, "not a whole safetensors file: ", words]);
    }

    #[test]
    fn truncated_anywhere() {
        let file = Checkpoint::llada().file();
        let data = file.len() - parts(&file).1.len();
        let mut cuts = vec![0, 1, 4, 7, 8, 9, 20, data / 2, data - 1, data, data + 1, data + 2];
        cuts.extend((1..8).map(|i| data + (file.len() - data) * i / 8));
        cuts.extend([file.len() - 2, file.len() - 1]);
        assert!(cuts.len() > 20);
        for cut in cuts {
            let words = match cut {
                ..8 => "expected 8 bytes before its header, found fewer".into(),
                _ if cut < data => format!("expected a header of at most {} bytes, found {}", cut - 8, data - 8),
                _ => format!("expected {} bytes of tensors, found {}", file.len() - data, cut - data),
            };
            refuses(&file[..cut], &words);
        }
    }

    #[test]
    fn bytes_behind_the_end() {
        let file = Checkpoint::llada().file();
        let expected = parts(&file).1.len();
        for more in [&[0], &file[..]] {
            let words = format!("expected {expected} bytes of tensors, found {}", expected + more.len());
            refuses(&[&file, more].concat(), &words);
        }
    }

    #[test]
    fn lying_header_length() {
        let file = Checkpoint::llada().file();
        let true_length = u64::from_le_bytes(file[..8].try_into().unwrap());
        let left = file.len() as u64 - 8;
        for length in [
            0,
            1,
            true_length - 8,
            true_length + 1,
            left,
            left + 1,
            100_000_001,
            1 << 40,
            i64::MAX as u64,
            u64::MAX - 8,
            u64::MAX,
        ] {
            let mut lie = file.clone();
            lie[..8].copy_from_slice(&length.to_le_bytes());
            let words = match length <= left {
                true => "its header: ".into(),
                false => format!("expected a header of at most {left} bytes, found {length}"),
            };
            refuses(&lie, &words);
        }
    }

    #[test]
    fn lying_entries() {
        let file = Checkpoint::llada().file();
        let (header, data) = parts(&file);
        let name = "model.transformer.ln_f.weight";
        let [start, end] = [0, 1].map(|i| header[name]["data_offsets"][i].as_u64().unwrap());
        let cases = [
            (
                "overlaps the tensor before",
                "data_offsets",
                json!([start - 2, end - 2]),
                "invalid offset for tensor `model.transformer.ln_f",
            ),
            (
                "leaves a gap before",
                "data_offsets",
                json!([start + 2, end + 2]),
                "invalid offset for tensor `model.transformer.ln_f",
            ),
            ("shorter than its shape", "data_offsets", json!([start, end - 2]), "invalid shape"),
            ("longer than its shape", "data_offsets", json!([start, end + 2]), "invalid shape"),
            ("the end first", "data_offsets", json!([end, start]), "invalid offset for tensor `model.transformer.ln_f"),
            ("behind the end of the file", "data_offsets", json!([1u64 << 40, (1u64 << 40) + 128]), "invalid offset"),
            ("at the end of memory", "data_offsets", json!([u64::MAX - 128, u64::MAX]), "invalid offset"),
            ("all of memory", "data_offsets", json!([start, u64::MAX]), "invalid shape"),
            ("negative", "data_offsets", json!([-128, 0]), "`-128`, expected usize"),
            ("one offset", "data_offsets", json!([start]), "invalid length 1"),
            ("three offsets", "data_offsets", json!([start, end, end]), "invalid length 3"),
            ("no offsets", "data_offsets", Value::Null, "invalid type: null"),
            ("more elements than bytes", "shape", json!([65]), "invalid shape"),
            ("fewer elements than bytes", "shape", json!([63]), "invalid shape"),
            ("terabytes", "shape", json!([1u64 << 42]), "invalid shape"),
            ("more elements than numbers", "shape", json!([u64::MAX, u64::MAX]), "overflow"),
            ("a product of 0 by overflow", "shape", json!([1u64 << 32, 1u64 << 32]), "overflow"),
            ("negative size", "shape", json!([-64]), "`-64`, expected usize"),
            ("fraction", "shape", json!([64.0]), "`64.0`, expected usize"),
            ("no list", "shape", json!(64), "`64`, expected a sequence"),
            ("another width", "dtype", json!("F32"), "invalid shape"),
            ("no such type", "dtype", json!("BF17"), "unknown variant `BF17`"),
            ("no type", "dtype", json!(null), "invalid type: null"),
        ];
        for (what, key, value, words) in cases {
            println!("{what}");
            let mut lie = header.clone();
            lie[name][key] = value;
            refuses(&join(lie.to_string(), data), words);
        }
    }

    /// The last tensor ends at the end of memory: sums with its offset overflow.
    #[test]
    fn offsets_that_overflow() {
        for end in [u64::MAX, u64::MAX - 8, u64::MAX - 7 - 77] {
            let header = json!({"x": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}});
            refuses(&join(header.to_string(), &[0; 64]), "its header: ");
        }
    }

    #[test]
    fn duplicate_names() {
        let entry = |at: usize| format!(r#""x":{{"dtype":"BF16","shape":[2],"data_offsets":[{at},{}]}}"#, at + 4);
        refuses(&join(format!("{{{},{}}}", entry(0), entry(4)), &[0; 8]), "its header: invalid offset for tensor `x`");
        refuses(&join(format!("{{{},{}}}", entry(4), entry(0)), &[0; 8]), "expected 4 bytes of tensors, found 8");
    }

    #[test]
    fn garbage_headers() {
        let nested = "[".repeat(100_000);
        let headers = [
            "",
            "{",
            "[]",
            "null",
            "7",
            "\0\0\0\0",
            "{\"x\": 7}",
            "{\"x\": {}}",
            "{\"__metadata__\": {\"format\": 7}}",
            "{\"__metadata__\": []}",
            &nested,
        ];
        for header in headers {
            refuses(&join(header, &[0; 16]), "its header: ");
        }
        refuses(&join([0xff, 0xfe, 0xfd], &[]), "its header: ");
    }

    #[test]
    fn no_tensors() {
        let config = Checkpoint::llada().config.to_string();
        refused(open_files(&config, &join("{}", &[])), "Tensor", &["model.transformer.", "found no such tensor"]);
    }
}

mod index {
    use super::*;
    use tempfile::TempDir;

    const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

    /// The head is in the second shard, all else in the first.
    fn sharded() -> (TempDir, Value) {
        let checkpoint = Checkpoint::llada();
        let head = checkpoint.head();
        let dir = write(&checkpoint.config.to_string(), &[]);
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join(SHARDS[0]), checkpoint.file_of(|n| n != head)).unwrap();
        std::fs::write(dir.path().join(SHARDS[1]), checkpoint.file_of(|n| n == head)).unwrap();
        let place = |name: &String| (name.clone(), SHARDS[usize::from(name == head)].into());
        let map: serde_json::Map<_, _> = checkpoint.tensors.keys().map(place).collect();
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
        (dir, index)
    }

    #[test]
    fn shards() {
        let (dir, _) = sharded();
        let tokens = [1, 2, 3];
        let want = logits(&open(&Checkpoint::llada()), &tokens);
        assert_eq!(logits(&Model::open(dir.path()).unwrap(), &tokens), want);
        std::fs::remove_file(dir.path().join(INDEX)).unwrap();
        assert_eq!(logits(&Model::open(dir.path()).unwrap(), &tokens), want);
    }

    #[test]
    fn missing_shard() {
        let (dir, _) = sharded();
        std::fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
        refused(Model::open(dir.path()), "Format", &[INDEX, SHARDS[1], "which is not in"]);
    }

    #[test]
    fn empty_shard() {
        let (dir, _) = sharded();
        std::fs::write(dir.path().join(SHARDS[1]), []).unwrap();
        refused(Model::open(dir.path()), "Format", &[SHARDS[1], "not a whole safetensors file"]);
    }

    #[test]
    fn shards_elsewhere() {
        let (dir, index) = sharded();
        let head = Checkpoint::llada().head();
        // Both exist, beside and below the directory.
        std::fs::create_dir(dir.path().join("inner")).unwrap();
        for inner in ["config.json", SHARDS[0], SHARDS[1]] {
            std::fs::copy(dir.path().join(inner), dir.path().join("inner").join(inner)).unwrap();
        }
        let above = format!("../{}", SHARDS[1]);
        let below = format!("inner/{}", SHARDS[1]);
        let here = format!("./{}", SHARDS[1]);
        let slash = format!("{}/", SHARDS[1]);
        let absolute = dir.path().join(SHARDS[1]).display().to_string();
        for shard in [&above, &below, &here, &slash, &absolute, "/etc/passwd", "../../etc/passwd", "", ".", "..", "/"] {
            for dir in [dir.path().to_path_buf(), dir.path().join("inner")] {
                let mut index = index.clone();
                index["weight_map"][head] = json!(shard);
                std::fs::write(dir.join(INDEX), index.to_string()).unwrap();
                let quoted = format!("shard {shard:?}");
                refused(Model::open(dir), "Format", &[INDEX, &quoted, "is not a plain file name"]);
            }
        }
        for shard in ["a\0b", "inner", "no such shard"] {
            let mut index = index.clone();
            index["weight_map"][head] = json!(shard);
            std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
            refused(Model::open(dir.path()), "Format", &[INDEX, &format!("{shard:?}"), "which is not in"]);
        }
    }

    #[test]
    fn tensors_elsewhere() {
        let head = Checkpoint::llada().head();
        let (dir, index) = sharded();
        let mut wrong = index.clone();
        wrong["weight_map"][head] = json!(SHARDS[0]);
        std::fs::write(dir.path().join(INDEX), wrong.to_string()).unwrap();
        refused(Model::open(dir.path()), "Tensor", &[SHARDS[0], head, INDEX, "found no such tensor"]);
        let mut less = index;
        less["weight_map"].as_object_mut().unwrap().remove(head);
        std::fs::write(dir.path().join(INDEX), less.to_string()).unwrap();
        refused(Model::open(dir.path()), "Tensor", &[head, "expected shape [40, 64]", "found no such tensor"]);
    }

    #[test]
    fn not_an_index() {
        let (dir, _) = sharded();
        for text in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"weight_map": null}"#,
            r#"{"weight_map": []}"#,
            r#"{"weight_map": {"x": 7}}"#,
            r#"{"weight_map": {"x": ["a"]}}"#,
        ] {
            std::fs::write(dir.path().join(INDEX), text).unwrap();
            refused(Model::open(dir.path()), "Format", &[INDEX, "line 1 column"]);
        }
        std::fs::write(dir.path().join(INDEX), r#"{"weight_map": {}}"#).unwrap();
        refused(Model::open(dir.path()), "Tensor", &["found no such tensor"]);
    }
}

mod arguments {
    use super::*;

    #[track_caller]
    fn refuses(family: Family, options: &Options, prompts: &[Vec<u32>], name: &str, words: &[&str]) {
        let model = open(&Checkpoint::new(family));
        let result = generate(&model, options, prompts);
        let named = format!("{name}: expected ");
        assert!(result.as_ref().is_err_and(|e| e.to_string().starts_with(&named)), "{name}: {:?}", result.err());
        refused(result, "Argument", words);
    }

    #[test]
    fn prompts() {
        let outside = [VOCAB as u32, u32::MAX];
        for family in FAMILIES {
            let refuses = |prompts: &[Vec<u32>], words: &[&str]| refuses(family, &options(), prompts, "prompt", words);
            refuses(&[], &["at least one prompt", "found none"]);
            refuses(&[vec![]], &["at least one token", "found an empty prompt"]);
            refuses(&[vec![1], vec![]], &["at least one token", "found an empty prompt (prompt 1)"]);
            for id in outside {
                refuses(&[vec![1, id]], &["token ids below the vocabulary's 40", &format!("found {id}")]);
            }
            refuses(&[vec![1], vec![1], vec![40]], &["found 40 (prompt 2)"]);
            let longest = WINDOW - options().gen_length;
            let words = ["gen-length 8 within the model's 64 positions", "found 57 tokens"];
            refuses(&[vec![1; longest + 1]], &words);
            assert!(generate(&open(&Checkpoint::new(family)), &options(), &[vec![1; longest]]).is_ok());
        }
    }

    #[test]
    fn lengths_and_steps() {
        let fixed = || Options { policy: Policy::Fixed, ..options() };
        let cases = [
            (Options { gen_length: 0, ..options() }, "gen-length", ["at least 1", "found 0"]),
            (
                Options { gen_length: usize::MAX, ..options() },
                "block-length",
                ["a divisor of gen-length 18446744073709551615", "found 4"],
            ),
            (
                Options { gen_length: usize::MAX, block_length: Some(usize::MAX), ..options() },
                "prompt",
                ["gen-length 18446744073709551615 within the model's 64 positions", "found 1 tokens"],
            ),
            (
                Options { gen_length: usize::MAX - 3, block_length: Some(4), ..options() },
                "prompt",
                ["gen-length 18446744073709551612 within", "found 1 tokens"],
            ),
            (Options { gen_length: 64, ..options() }, "prompt", ["gen-length 64 within", "found 1 tokens"]),
            (Options { block_length: Some(3), ..options() }, "block-length", ["a divisor of gen-length 8", "found 3"]),
            (Options { block_length: Some(16), ..options() }, "block-length", ["a divisor of", "found 16"]),
            (Options { block_length: Some(0), ..options() }, "block-length", ["a divisor of", "found 0"]),
            (
                Options { gen_length: 40, block_length: None, ..options() },
                "block-length",
                ["gen-length 40", "found 32"],
            ),
            (Options { steps: Some(0), ..options() }, "steps", ["at least 1", "found 0"]),
            (Options { steps: Some(0), ..fixed() }, "steps", ["at least 1", "found 0"]),
            (Options { steps: Some(5), ..fixed() }, "steps", ["a multiple of the 2 blocks", "found 5"]),
            (Options { steps: Some(1), ..fixed() }, "steps", ["a multiple of the 2 blocks", "found 1"]),
            (Options { steps: Some(usize::MAX - 1), ..fixed() }, "steps", ["at most", "found 18446744073709551614"]),
            (Options { steps: Some(1 << 40), ..options() }, "steps", ["at most", "found 1099511627776"]),
        ];
        for family in FAMILIES {
            for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
                for (options, name, words) in &cases {
                    refuses(family, &Options { cache, ..options.clone() }, &[vec![1]], name, words);
                }
            }
        }
    }

    #[test]
    fn steps_are_free_where_they_are_ignored() {
        for family in FAMILIES {
            let model = open(&Checkpoint::new(family));
            for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
                for policy in [Policy::Threshold(0.9), Policy::Factor(1.0)] {
                    let run = |steps| {
                        let options = Options { steps, cache, policy, ..options() };
                        generate(&model, &options, &[vec![1, 2]]).unwrap().tokens
                    };
                    assert_eq!(run(Some(5)), run(None));
                    assert_eq!(run(Some(1)), run(None));
                    assert_eq!(run(Some(1000)), run(None));
                }
            }
        }
    }

    #[test]
    fn dream_threshold_without_blocks() {
        let options =
            |steps| Options { cache: CacheMode::None, block_length: Some(8), steps: Some(steps), ..options() };
        for steps in [3, 9, 16] {
            let words = ["a divisor of the 8 masked tokens", &format!("found {steps}")];
            refuses(Family::Dream, &options(steps), &[vec![1]], "steps", &words);
        }
        let words = ["a divisor of the 9 masked tokens", "found 8 (prompt 1)"];
        refuses(Family::Dream, &options(8), &[vec![1], vec![1, MASK]], "steps", &words);
        let (dream, llada) = (open(&Checkpoint::dream()), open(&Checkpoint::llada()));
        for steps in [1, 2, 4, 8] {
            assert!(generate(&dream, &options(steps), &[vec![1]]).is_ok());
        }
        assert!(generate(&llada, &options(3), &[vec![1]]).is_ok());
    }

    #[test]
    fn numbers() {
        let threshold = |t| Options { policy: Policy::Threshold(t), ..options() };
        let factor = |f| Options { policy: Policy::Factor(f), ..options() };
        let temperature = |temperature| Options { temperature, ..options() };
        let alg_temp = |alg_temp| Options { alg_temp, policy: Policy::Fixed, ..options() };
        let cfg_scale = |cfg_scale| Options { cfg_scale, ..options() };
        let top_p = |p| Options { top_p: Some(p), ..options() };
        let eps = |eps| Options { eps, ..options() };
        let top_k = |k| Options { top_k: Some(k), ..options() };
        type Setting<'a> = (&'a str, &'a dyn Fn(f64) -> Options, &'a str, &'a [f64], &'a [f64]);
        let settings: [Setting; 7] = [
            ("threshold", &threshold, "a number in (0, 1]", &[0.0, -1.0, 1.0001, f64::NAN], &[1.0, 1e-300]),
            ("factor", &factor, "a number above 0", &[0.0, -1.0, f64::NAN, f64::INFINITY], &[1e-300, 1e300]),
            ("temperature", &temperature, "0 or a number above", &[-0.1, f64::NAN, f64::INFINITY], &[1e-300, 1e300]),
            ("alg-temp", &alg_temp, "0 or a number above", &[-0.1, f64::NAN, f64::INFINITY], &[1e-300, 1e300]),
            ("cfg-scale", &cfg_scale, "0 or a number above", &[-1.0, f64::NAN, f64::INFINITY, 1e300], &[1e-300, 1e30]),
            ("top-p", &top_p, "a number in (0, 1]", &[0.0, -0.5, 1.5, f64::NAN], &[1.0, 1e-300]),
            ("eps", &eps, "a number in (0, 1)", &[0.0, 1.0, -1.0, f64::NAN], &[1e-300, 0.999_999_999_999]),
        ];
        for family in FAMILIES {
            let model = open(&Checkpoint::new(family));
            for (name, setting, expected, bad, good) in settings {
                for value in bad {
                    refuses(family, &setting(*value), &[vec![1]], name, &[expected, &format!("found {value}")]);
                }
                for value in good {
                    let tokens = generate(&model, &setting(*value), &[vec![1]]).unwrap().tokens;
                    assert!(!tokens[0].contains(&MASK), "{name} {value}");
                }
            }
            refuses(family, &top_k(0), &[vec![1]], "top-k", &["at least 1", "found 0"]);
            let plain = generate(&model, &options(), &[vec![1]]).unwrap().tokens;
            for k in [VOCAB, VOCAB + 1, usize::MAX] {
                assert_eq!(generate(&model, &top_k(k), &[vec![1]]).unwrap().tokens, plain);
            }
            assert_eq!(generate(&model, &top_p(1.0), &[vec![1]]).unwrap().tokens, plain);
        }
    }

    /// Lengths within the window that a config claims, for which there is no memory.
    #[test]
    fn no_memory() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            for key in ["max_sequence_length", "max_position_embeddings"] {
                checkpoint.config = checkpoint.config_with(key, Some(json!(1 << 24)));
            }
            let long = Options { gen_length: 1 << 23, ..Options::default() };
            let result = generate(&open(&checkpoint), &long, &vec![vec![1]; 1000]);
            refused(result, "Unavailable", &["1000 sequences", "MiB of memory", "MiB are free"]);
        }
    }

    #[test]
    fn combinations() {
        for family in FAMILIES {
            for policy in [Policy::Threshold(0.9), Policy::Factor(1.0)] {
                let entropy = Options { confidence: Confidence::Entropy, policy, ..options() };
                refuses(family, &entropy, &[vec![1]], "confidence", &["policy fixed", "found entropy"]);
                let alg_temp = Options { alg_temp: 0.5, policy, ..options() };
                refuses(family, &alg_temp, &[vec![1]], "alg-temp", &["0 unless the policy is fixed", "found 0.5"]);
            }
            let end = Options { end_tokens: vec![1, 40], ..options() };
            refuses(family, &end, &[vec![1]], "end-tokens", &["ids below 40", "found 40"]);
        }
    }
}

mod numerics {
    use super::*;

    const CACHES: [CacheMode; 3] = [CacheMode::None, CacheMode::Prefix, CacheMode::Dual];

    /// One NaN in any tensor that every row passes through: no token comes of it. The first masked position is named,
    /// every time.
    #[test]
    fn nan_in_weights() {
        let q = |family| match family {
            Family::Llada => ["q_proj", "k_proj", "v_proj"].map(|n| format!("model.transformer.blocks.1.{n}.weight")),
            Family::Dream => ["q_proj", "k_proj", "v_proj"].map(|n| format!("model.layers.1.self_attn.{n}.weight")),
        };
        for family in FAMILIES {
            let whole = Checkpoint::new(family);
            let names = whole.tensors.keys().filter(|n| **n != whole.head() && **n != whole.embedding());
            let names: Vec<String> = names.cloned().collect();
            assert!(q(family).iter().all(|n| names.contains(n)));
            for (name, cache) in names.iter().zip(CACHES.into_iter().cycle()) {
                let mut checkpoint = whole.clone();
                let values = &mut checkpoint.tensor(name).values;
                let middle = values.len() / 2;
                values[middle] = f32::NAN;
                let result = generate(&open(&checkpoint), &Options { cache, ..options() }, &[vec![1, 2, 3], vec![4]]);
                let error = result.expect_err(name);
                assert!(matches!(error, Error::NoFiniteLogit { sequence: 0, position: 3, step: 0 }), "{name}: {error}");
                assert!(error.to_string().contains("sequence 0, position 3, forward 0: no finite logit"), "{error}");
            }
        }
    }

    /// Of many rows without a finite logit, the first is named, however the threads share them out.
    #[test]
    fn the_first_position_is_named() {
        let mut checkpoint = Checkpoint::llada();
        let embedding = checkpoint.embedding();
        checkpoint.row(embedding, 7)[3] = f32::NAN;
        let model = open(&checkpoint);
        let whole = Options { gen_length: 60, block_length: Some(60), temperature: 1.0, ..Options::default() };
        let threads = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
        for _ in 0..200 {
            let decode = || generate(&model, &whole, &[vec![1, 2], vec![7], vec![4, 5, 7]]);
            let error = threads.install(decode).unwrap_err();
            assert!(matches!(error, Error::NoFiniteLogit { sequence: 1, position: 1, step: 0 }), "{error}");
        }
    }

    /// The embedding of one token: only the sequence that holds it fails.
    #[test]
    fn nan_in_an_embedding() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            let embedding = checkpoint.embedding();
            checkpoint.row(embedding, 7)[3] = f32::NAN;
            let model = open(&checkpoint);
            for cache in CACHES {
                let result = generate(&model, &Options { cache, ..options() }, &[vec![1, 2], vec![1, 7, 2], vec![7]]);
                let error = result.unwrap_err();
                assert!(matches!(error, Error::NoFiniteLogit { sequence: 1, position: 3, step: 0 }), "{error}");
            }
        }
    }

    #[test]
    fn nan_in_the_head() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            let head = checkpoint.head();
            checkpoint.row(head, 7).fill(f32::NAN);
            checkpoint.want(7);
            let tokens = generate(&open(&checkpoint), &options(), &[vec![1]]).unwrap().tokens.remove(0);
            assert!(!tokens.contains(&7) && !tokens.contains(&MASK), "{tokens:?}");
            checkpoint.tensor(head).values.fill(f32::NAN);
            let error = generate(&open(&checkpoint), &options(), &[vec![1]]).unwrap_err();
            assert!(matches!(error, Error::NoFiniteLogit { sequence: 0, position: 1, step: 0 }), "{error}");
        }
    }

    /// An infinite logit is the largest; with every other sampling setting too.
    #[test]
    fn infinity_in_the_head() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            checkpoint.want(7);
            let head = checkpoint.head();
            checkpoint.row(head, 7).fill(0.0);
            checkpoint.row(head, 7)[0] = f32::INFINITY;
            let model = open(&checkpoint);
            for sampling in [
                options(),
                Options { temperature: 0.8, ..options() },
                Options { top_p: Some(0.9), top_k: Some(3), ..options() },
                Options { confidence: Confidence::Margin, ..options() },
                Options { confidence: Confidence::Entropy, policy: Policy::Fixed, ..options() },
            ] {
                let tokens = generate(&model, &sampling, &[vec![1]]).unwrap().tokens.remove(0);
                assert_eq!(tokens, [7; 8]);
            }
            checkpoint.row(head, 7)[0] = f32::NEG_INFINITY;
            let tokens = generate(&open(&checkpoint), &options(), &[vec![1]]).unwrap().tokens.remove(0);
            assert!(!tokens.contains(&7) && !tokens.contains(&MASK), "{tokens:?}");
        }
    }

    /// Activations that overflow are found where they reach the logits.
    #[test]
    fn overflowing_weights() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            let embedding = checkpoint.embedding();
            checkpoint.tensor(embedding).values.iter_mut().for_each(|v| *v = v.signum() * 3e38);
            match generate(&open(&checkpoint), &options(), &[vec![1]]) {
                Ok(output) => assert!(!output.tokens[0].contains(&MASK)),
                Err(error) => assert!(matches!(error, Error::NoFiniteLogit { position: 1, step: 0, .. }), "{error}"),
            }
        }
    }

    /// A model that wants nothing but the mask token is not given it: the decode ends, and no mask is left.
    #[test]
    fn mask_token_predicted() {
        for family in FAMILIES {
            let mut checkpoint = Checkpoint::new(family);
            checkpoint.want(MASK);
            let model = open(&checkpoint);
            for cache in CACHES {
                for block_length in [4, 8] {
                    for policy in [Policy::Fixed, Policy::Threshold(0.9), Policy::Factor(1.0)] {
                        for (temperature, top_k) in [(0.0, None), (0.0, Some(1)), (1.0, None), (1.0, Some(2))] {
                            let block_length = Some(block_length);
                            let case = Options { cache, block_length, policy, temperature, top_k, ..options() };
                            let output = generate(&model, &case, &[vec![1, 2], vec![3, MASK]]);
                            let output = match output {
                                // Dream's deficit rule wants steps that divide the masks of both prompts.
                                Err(Error::Argument { name: "steps", .. }) => continue,
                                output => output.unwrap(),
                            };
                            let llada_fixed = model.config().family == Family::Llada && policy == Policy::Fixed;
                            let sequences = if llada_fixed && cache == CacheMode::None { 1 } else { 2 };
                            for tokens in &output.tokens[..sequences] {
                                assert!(!tokens.contains(&MASK), "{family} {case:?}: {tokens:?}");
                            }
                            assert!(output.nfe <= 20);
                        }
                    }
                }
            }
        }
    }
}

mod damage {
    use super::*;

    /// One piece of damage to a file.
    #[derive(Clone, Debug)]
    enum Damage {
        Flip(Index, u8),
        Set(Index, u8),
        Insert(Index, Vec<u8>),
        Delete(Index, usize),
        Truncate(Index),
        /// Copies a piece to another place, over what is there.
        Splice(Index, Index, usize),
    }

    impl Damage {
        /// Damages `bytes`, at places within the first `reach`.
        fn apply(&self, bytes: &mut Vec<u8>, reach: usize) {
            let reach = reach.min(bytes.len());
            if reach == 0 {
                return;
            }
            match self {
                Damage::Flip(at, bit) => bytes[at.index(reach)] ^= 1 << (bit % 8),
                Damage::Set(at, byte) => bytes[at.index(reach)] = *byte,
                Damage::Insert(at, more) => drop(bytes.splice(at.index(reach)..at.index(reach), more.iter().copied())),
                Damage::Delete(at, len) => {
                    let at = at.index(reach);
                    bytes.drain(at..(at + len).min(bytes.len()));
                }
                Damage::Truncate(at) => bytes.truncate(at.index(reach)),
                Damage::Splice(from, to, len) => {
                    let from = from.index(reach);
                    let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                    let to = to.index(reach);
                    let end = (to + len).min(bytes.len());
                    bytes.splice(to..end, piece);
                }
            }
        }
    }

    fn damage() -> impl Strategy<Value = Damage> {
        let text = proptest::collection::vec(
            prop_oneof![any::<u8>(), proptest::char::range(' ', '~').prop_map(|c| c as u8)],
            1..9,
        );
        prop_oneof![
            (any::<Index>(), any::<u8>()).prop_map(|(at, bit)| Damage::Flip(at, bit)),
            (any::<Index>(), proptest::char::range('0', '9')).prop_map(|(at, digit)| Damage::Set(at, digit as u8)),
            (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
            (any::<Index>(), text).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
            (any::<Index>(), 1..40usize).prop_map(|(at, len)| Damage::Delete(at, len)),
            any::<Index>().prop_map(Damage::Truncate),
            (any::<Index>(), any::<Index>(), 1..80usize).prop_map(|(from, to, len)| Damage::Splice(from, to, len)),
        ]
    }

    /// Damaged bytes; half of the time only the first `head` of them.
    fn damaged(whole: Vec<u8>, head: usize) -> impl Strategy<Value = Vec<u8>> {
        let reach = prop_oneof![Just(head), Just(usize::MAX)];
        (proptest::collection::vec(damage(), 1..4), reach).prop_map(move |(list, reach)| {
            let mut bytes = whole.clone();
            list.iter().for_each(|damage| damage.apply(&mut bytes, reach));
            bytes
        })
    }

    fn family() -> impl Strategy<Value = Family> {
        prop_oneof![Just(Family::Llada), Just(Family::Dream)]
    }

    /// Opens, and where that works decodes two tokens: a result or an error, never a panic.
    fn survives(dir: &Path) -> std::result::Result<(), TestCaseError> {
        let model = match Model::open(dir) {
            Ok(model) => model,
            Err(error) => {
                prop_assert!(!error.to_string().is_empty());
                return Ok(());
            }
        };
        for cache in [CacheMode::None, CacheMode::Dual] {
            let options = Options { gen_length: 2, cache, ..Options::default() };
            match generate(&model, &options, &[vec![0], vec![1, 0]]) {
                Ok(output) => {
                    let mask = model.config().mask_token_id;
                    prop_assert!(output.tokens.iter().all(|tokens| tokens.len() == 2 && !tokens.contains(&mask)));
                }
                Err(Error::NoFiniteLogit { .. } | Error::Argument { .. } | Error::Unavailable(_)) => {}
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
        Ok(())
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let number = prop_oneof![
            Just(json!(0)),
            (-3i64..300).prop_map(|n| json!(n)),
            any::<i64>().prop_map(|n| json!(n)),
            any::<u64>().prop_map(|n| json!(n)),
            (0u32..64).prop_map(|bits| json!(1u64 << bits)),
            any::<f64>().prop_map(|x| json!(x)),
            Just(json!(1e18)),
        ];
        let leaf = prop_oneof![
            4 => number,
            1 => Just(Value::Null),
            1 => any::<bool>().prop_map(Value::from),
            1 => ".{0,8}".prop_map(Value::from),
            1 => prop_oneof![Just("llada"), Just("Dream"), Just("silu"), Just("rms"), Just("llama")].prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".{0,4}", inner, 0..4).prop_map(|m| json!(m)),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damaged_tensors((family, file) in family().prop_flat_map(|f| (Just(f), damaged(Checkpoint::new(f).file(), 2000)))) {
            let dir = write(&Checkpoint::new(family).config.to_string(), &file);
            survives(dir.path())?;
        }

        #[test]
        fn damaged_config((family, text) in family().prop_flat_map(|f| {
            (Just(f), damaged(serde_json::to_vec_pretty(&Checkpoint::new(f).config).unwrap(), usize::MAX))
        })) {
            let dir = Checkpoint::new(family).write();
            std::fs::write(dir.path().join("config.json"), text).unwrap();
            survives(dir.path())?;
        }

        #[test]
        fn damaged_index(text in {
            let names = Checkpoint::llada().tensors.into_keys();
            let map: serde_json::Map<_, _> = names.map(|name| (name, FILE.into())).collect();
            damaged(serde_json::to_vec_pretty(&json!({"weight_map": map})).unwrap(), usize::MAX)
        }) {
            let dir = Checkpoint::llada().write();
            std::fs::write(dir.path().join(INDEX), text).unwrap();
            survives(dir.path())?;
        }

        /// Up to three keys of the config set to anything, sizes above all.
        #[test]
        fn random_values(family in family(), changes in proptest::collection::vec((any::<Index>(), any_json()), 1..4)) {
            let checkpoint = Checkpoint::new(family);
            let mut config = checkpoint.config.clone();
            let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
            for (key, value) in changes {
                config[key.get(&keys)] = value;
            }
            let dir = write(&config.to_string(), &checkpoint.file());
            std::fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
            survives(dir.path())?;
        }
    }
}
