//! Batches on the CPU: tokens do not depend on the rest of the batch, with every algorithm, cache, policy, confidence and kind of
//! sampling. Every decode ends in a bounded number of forwards and leaves no mask. Seeds and early stop work as documented.

use crate::common::checkpoint::{Checkpoint, EOS, MASK, prompts, samplings};
use crate::common::{Part, in_parts};
use dllm_kernels::decode::Algorithm;
use dllm_kernels::{CacheMode, Confidence, Error, Family, Generation, Generator, Model, Options, Policy};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

fn open(family: Family) -> Model {
    Model::open(Checkpoint::new(family).write().path()).unwrap()
}

fn generate(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Generation {
    let output = Generator::new(model).options(options.clone()).generate(prompts);
    output.unwrap_or_else(|e| panic!("{options:?}: {e}"))
}

/// Every cache and policy, in blocks and without, for eight tokens; together they use every decoding algorithm.
fn loops() -> Vec<Options> {
    let mut list = Vec::new();
    for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual, CacheMode::Adaptive] {
        for block_length in [4, 8] {
            for policy in [Policy::Fixed, Policy::Threshold(0.9), Policy::Threshold(0.4), Policy::Factor(1.0)] {
                let block_length = Some(block_length);
                // Of the adaptive cache: sequences that wait for others are at another place of their intervals then.
                let (prompt_interval, response_interval, refresh_ratio) = (3, 2, Some(0.3));
                let base = Options { prompt_interval, response_interval, refresh_ratio, ..Options::default() };
                list.push(Options { gen_length: 8, block_length, cache, policy, ..base });
            }
        }
    }
    for family in FAMILIES {
        let rules: Vec<Algorithm> = list.iter().map(|options| options.algorithm(family)).collect();
        match family {
            Family::Llada => assert!([Algorithm::Llada, Algorithm::FastLlada].iter().all(|r| rules.contains(r))),
            Family::Dream => {
                assert!(
                    [Algorithm::Dream, Algorithm::DreamThreshold, Algorithm::DreamBlock]
                        .iter()
                        .all(|r| rules.contains(r))
                );
            }
        }
    }
    list
}

fn masks(tokens: &[u32]) -> usize {
    tokens.iter().filter(|t| **t == MASK).count()
}

/// Decodes the batch, checks that it is complete and took a bounded number of forwards, and that each sequence has the same tokens
/// when it is decoded alone.
fn same_alone(model: &Model, options: &Options, prompts: &[Vec<u32>]) {
    let family = model.config().family;
    let batch = generate(model, options, prompts);
    let blocks = options.gen_length / options.block_length();
    let mut longest = 0;
    for (prompt, tokens) in prompts.iter().zip(&batch.tokens) {
        // LLaDA's fixed rule spends its quota on masks of the prompt too, and leaves as many at the end.
        let left = if options.algorithm(family) == Algorithm::Llada { masks(prompt) } else { 0 };
        assert_eq!(tokens.len(), options.gen_length);
        assert!(masks(tokens) <= left, "{family} {options:?} {prompt:?}: masks left in {tokens:?}");
        let alone = generate(model, options, std::slice::from_ref(prompt));
        assert_eq!(alone.tokens[0], *tokens, "{family} {options:?} {prompt:?}");
        // At least one token per forward; but a fixed schedule may have empty steps, and each block's first forward may commit
        // a mask of the prompt instead.
        let schedule = if options.policy == Policy::Fixed { options.steps() } else { 0 };
        assert!(alone.nfe <= options.gen_length + masks(prompt) + blocks + schedule, "{family} {options:?}");
        longest = longest.max(alone.nfe);
    }
    // A block ends for all sequences at once, so with blocks a batch may take more forwards than its slowest sequence.
    assert!(batch.nfe >= longest);
    assert!(blocks > 1 || batch.nfe == longest, "{family} {options:?}: {} {longest}", batch.nfe);
}

fn sequences_do_not_depend_on_the_batch(part: Part) {
    for family in FAMILIES {
        let model = open(family);
        let settings = part.of(loops().iter().flat_map(samplings), 80);
        for options in &settings {
            same_alone(&model, options, &prompts());
        }
        println!("{family}: {} settings", settings.len());
    }
}

in_parts!(sequences_do_not_depend_on_the_batch);

/// The order of the batch and duplicates in it do not change tokens.
#[test]
fn order_and_duplicates() {
    for family in FAMILIES {
        let model = open(family);
        for base in loops() {
            let options = Options { temperature: 0.8, seed: 9, ..base };
            let [a, b, c] = <[Vec<u32>; 3]>::try_from(prompts()).unwrap();
            let one = generate(&model, &options, &[a.clone(), b.clone(), c.clone()]).tokens;
            let other = generate(&model, &options, &[c, a.clone(), a, b]).tokens;
            assert_eq!([&one[2], &one[0], &one[0], &one[1]], [&other[0], &other[1], &other[2], &other[3]]);
        }
    }
}

/// Prompts of some masks or of masks only, alone and together with prompts without.
#[test]
fn masks_in_the_prompt() {
    let prompts = [vec![3, MASK, 15, MASK], vec![MASK; 5], vec![7, 8, 9], vec![MASK], vec![1; 4]];
    for family in FAMILIES {
        let model = open(family);
        for base in loops() {
            // One step: the only number that divides the masks of every prompt.
            let steps = (base.algorithm(family) == Algorithm::DreamThreshold).then_some(1);
            for options in [
                Options { steps, ..base.clone() },
                Options { steps, temperature: 0.8, cfg_scale: 1.5, ..base.clone() },
                Options { steps, confidence: Some(Confidence::Margin), top_p: Some(0.7), ..base.clone() },
                Options { steps, confidence: Some(Confidence::Random), ..base.clone() },
            ] {
                same_alone(&model, &options, &prompts);
            }
        }
    }
}

#[test]
fn seeds() {
    for family in FAMILIES {
        let model = open(family);
        for base in loops() {
            let run =
                |seed, temperature| generate(&model, &Options { seed, temperature, ..base.clone() }, &prompts()).tokens;
            assert_eq!(run(1, 1.0), run(1, 1.0), "{family} {base:?}");
            assert_ne!(run(1, 1.0), run(2, 1.0), "{family} {base:?}");
            assert_ne!(run(1, 1.0), run(1 + (1 << 32), 1.0), "{family} {base:?}: the upper half of the seed");
            assert_eq!(run(1, 0.0), run(2, 0.0), "{family} {base:?}: the argmax depends on the seed");
        }
    }
}

/// With any token of the plain decode as end token, each sequence is the plain one up to the first end token.
#[test]
fn early_stop_ends_right_after_the_first_end_token() {
    for family in FAMILIES {
        let model = open(family);
        for base in loops() {
            let plain = generate(&model, &base, &prompts());
            for end in [plain.tokens[0][0], plain.tokens[0][3], plain.tokens[1][5], plain.tokens[2][7]] {
                let options = Options { end_tokens: vec![end], early_stop: true, ..base.clone() };
                let stopped = generate(&model, &options, &prompts());
                assert!(stopped.nfe <= plain.nfe);
                for (s, (stopped_tokens, plain)) in stopped.tokens.iter().zip(&plain.tokens).enumerate() {
                    let first = plain.iter().position(|t| [end, EOS].contains(t));
                    let length = first.map_or(plain.len(), |i| i + 1);
                    assert_eq!(*stopped_tokens, plain[..length], "{family} {options:?}");
                    assert_eq!(stopped.text_tokens(s), &plain[..first.unwrap_or(plain.len())]);
                }
                let complete = generate(&model, &Options { early_stop: false, ..options }, &prompts());
                assert_eq!(complete.tokens, plain.tokens);
            }
        }
    }
}

/// A model that predicts only end-of-text stops after one token, within the forwards of the first block.
#[test]
fn early_stop_at_once() {
    for family in FAMILIES {
        let mut checkpoint = Checkpoint::new(family);
        checkpoint.want(EOS);
        let model = Model::open(checkpoint.write().path()).unwrap();
        for base in loops() {
            let stopped = generate(&model, &Options { early_stop: true, ..base.clone() }, &prompts());
            assert_eq!(stopped.tokens, vec![vec![EOS]; 3], "{family} {base:?}");
            assert_eq!(stopped.text_tokens(0), [0u32; 0]);
            assert!(stopped.nfe <= base.block_length());
            assert_eq!(generate(&model, &base, &prompts()).tokens, vec![vec![EOS; 8]; 3]);
        }
    }
}

/// The mask token as an end token has no effect.
#[test]
fn the_mask_as_an_end_token() {
    let model = open(Family::Llada);
    for base in loops() {
        let options = Options { end_tokens: vec![MASK], early_stop: false, ..base.clone() };
        assert_eq!(generate(&model, &options, &prompts()).tokens, generate(&model, &base, &prompts()).tokens);
    }
}

/// An invalid prompt is an error for the whole batch before any work; the error names the prompt.
#[test]
fn one_bad_prompt() {
    let model = open(Family::Dream);
    let mut prompts = prompts();
    prompts[2].push(40);
    let error = Generator::new(&model).gen_length(32).generate(&prompts).unwrap_err();
    assert!(matches!(&error, Error::Argument { name: "prompt", found, .. } if found == "40 (prompt 2)"), "{error}");
}
