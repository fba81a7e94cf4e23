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

/// Config keys of the sizes, by family.
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

/// Valid sizes that the file's tensors do not have: the first tensor is an error before any allocation.
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
        assert!(Model::open(dir.path()).unwrap().config().eos_token_ids.contains(&crate::common::checkpoint::EOS));
    }
}

/// The mask is that of `config.json`; texts end at the tokens of either file.
#[test]
fn special_tokens_of_two_files() {
    for family in FAMILIES {
        let dir = Checkpoint::new(family).write();
        let other = json!({"mask_token_id": 7, "eos_token_id": [12, 3, crate::common::checkpoint::EOS, 3]});
        std::fs::write(dir.path().join("generation_config.json"), other.to_string()).unwrap();
        let model = Model::open(dir.path()).unwrap();
        assert_eq!(
            (model.config().mask_token_id, &model.config().eos_token_ids[..]),
            (MASK, &[3, 12, crate::common::checkpoint::EOS][..])
        );
    }
}

/// A LLaDA checkpoint whose embedding has `more` rows than the vocabulary. Every hidden state has a large first channel, so that
/// `logit` in this channel of the head decides whether a token of the additional rows is never predicted or always.
fn with_more_rows(more: usize, logit: f32) -> Checkpoint {
    let mut checkpoint = Checkpoint::llada();
    let (embedding, head) = (checkpoint.embedding(), checkpoint.head());
    for row in 0..VOCAB {
        checkpoint.row(embedding, row)[0] = 64.0;
        checkpoint.row(head, row)[0] = 0.0;
    }
    checkpoint.config = checkpoint.config_with("embedding_size", Some(json!(VOCAB + more)));
    for name in [embedding, head] {
        let tensor = checkpoint.tensor(name);
        tensor.shape[0] += more;
        tensor.values.resize(tensor.shape.iter().product(), 0.0);
        (VOCAB..VOCAB + more).for_each(|row| checkpoint.row(name, row)[0] = if name == head { logit } else { 64.0 });
    }
    checkpoint
}

/// Rows after the vocabulary change nothing when the model gives them no probability, whatever the cache and policy. They are rows
/// like all others: a model that prefers one of them predicts it.
#[test]
fn more_embedding_rows_than_tokens() {
    let plain = open(&with_more_rows(0, 0.0));
    for more in [1, 8, 25] {
        let model = open(&with_more_rows(more, -64.0));
        assert_eq!((plain.config().vocab_size, model.config().vocab_size), (VOCAB, VOCAB + more));
        for cache in CacheMode::ALL {
            for policy in [Policy::Fixed, Policy::Threshold(0.9), Policy::Factor(1.0)] {
                let options = Options { cache, policy, ..options() };
                let of = |model| generate(model, &options, &[vec![1, 2, 3], vec![7]]).unwrap();
                let (got, want) = (of(&model), of(&plain));
                assert_eq!((got.tokens, got.nfe), (want.tokens, want.nfe), "{more} rows, {cache}, {policy}");
            }
        }
        let wins = generate(&open(&with_more_rows(more, 64.0)), &options(), &[vec![1]]).unwrap();
        assert_eq!(wins.tokens, [[VOCAB as u32; 8]], "{more} rows");
    }
    // Prompts may contain the ids of all rows, and no others.
    let model = open(&with_more_rows(8, -64.0));
    assert!(generate(&model, &options(), &[vec![VOCAB as u32 + 7]]).is_ok());
    let words = ["token ids below the vocabulary's 48", "found 48"];
    refused(generate(&model, &options(), &[vec![VOCAB as u32 + 8]]), "Argument", &words);
}

/// Fewer rows than tokens are refused, as by LLaDA's own code, and so are tensors of the vocabulary's size.
#[test]
fn embedding_rows_and_tensors_that_disagree() {
    for rows in [1, VOCAB - 1] {
        let words = ["config.json", "\"embedding_size\": expected at least vocab_size 40", &format!("found {rows}")];
        refused(open_with(Family::Llada, "embedding_size", Some(json!(rows))), "Config", &words);
    }
    let words = ["wte.weight", "expected shape [48, 64], found shape [40, 64]"];
    refused(open_with(Family::Llada, "embedding_size", Some(json!(48))), "Tensor", &words);
    let mut only_embedding = with_more_rows(8, 0.0);
    let head = only_embedding.head();
    *only_embedding.tensor(head) = Checkpoint::llada().tensors[head].clone();
    let words = [head, "expected shape [48, 64], found shape [40, 64]"];
    refused(Model::open(only_embedding.write().path()), "Tensor", &words);
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
