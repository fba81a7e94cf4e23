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
        (Options { gen_length: 40, block_length: None, ..options() }, "block-length", ["gen-length 40", "found 32"]),
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
    let options = |steps| Options { cache: CacheMode::None, block_length: Some(8), steps: Some(steps), ..options() };
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

/// Lengths that are valid for the config, but need more memory than there is.
#[test]
fn no_memory() {
    for family in FAMILIES {
        let mut checkpoint = Checkpoint::new(family);
        for key in ["max_sequence_length", "max_position_embeddings"] {
            checkpoint.config = checkpoint.config_with(key, Some(json!(1 << 24)));
        }
        let long = Options { gen_length: 1 << 23, ..Options::default() };
        let result = generate(&open(&checkpoint), &long, &vec![vec![1]; 1000]);
        refused(result, "OutOfMemory", &["1000 sequences", "MiB of memory", "MiB are free"]);
    }
}

#[test]
fn combinations() {
    for family in FAMILIES {
        for policy in [Policy::Threshold(0.9), Policy::Factor(1.0)] {
            let entropy = Options { confidence: Some(Confidence::Entropy), policy, ..options() };
            refuses(family, &entropy, &[vec![1]], "confidence", &["policy fixed", "found entropy"]);
            let alg_temp = Options { alg_temp: 0.5, policy, ..options() };
            refuses(family, &alg_temp, &[vec![1]], "alg-temp", &["0 unless the policy is fixed", "found 0.5"]);
        }
        let end = Options { end_tokens: vec![1, 40], ..options() };
        refuses(family, &end, &[vec![1]], "end-tokens", &["ids below 40", "found 40"]);
    }
}
