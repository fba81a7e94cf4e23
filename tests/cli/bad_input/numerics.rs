use super::*;

const CACHES: [CacheMode; 3] = [CacheMode::None, CacheMode::Prefix, CacheMode::Dual];

/// One NaN in any tensor that every row uses: the error names the first masked position, every time, and no token is produced.
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

/// Of many rows without a finite logit, the error names the first, independently of the threads.
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

/// NaN in the embedding of one token: the error names the sequence that contains the token.
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

/// An infinite logit counts as the largest, with every kind of sampling.
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
            Options { confidence: Some(Confidence::Margin), ..options() },
            Options { confidence: Some(Confidence::Entropy), policy: Policy::Fixed, ..options() },
        ] {
            let tokens = generate(&model, &sampling, &[vec![1]]).unwrap().tokens.remove(0);
            assert_eq!(tokens, [7; 8]);
        }
        checkpoint.row(head, 7)[0] = f32::NEG_INFINITY;
        let tokens = generate(&open(&checkpoint), &options(), &[vec![1]]).unwrap().tokens.remove(0);
        assert!(!tokens.contains(&7) && !tokens.contains(&MASK), "{tokens:?}");
    }
}

/// Activations that overflow are an error where they reach the logits.
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

/// A model that always predicts the mask token never gets it: the decode ends and leaves no mask.
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
                            // Dream's threshold algorithm needs a number of steps that divides the masks of both prompts.
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
