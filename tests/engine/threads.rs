//! Results of the CPU do not depend on the number of threads: logits and whole decodes in pools of 1, 2 and 8 threads, with both
//! families, every cache, and batches whose sizes threads cannot share evenly.

use crate::common::checkpoint::{Checkpoint, prompts, samplings};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, CacheMode, PassKind};
use dllm_kernels::model::{Config, QueryRows, Session, SessionConfig};
use dllm_kernels::{Family, Generator, Model, Options, Policy};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// Runs `work` in pools of 1, 2 and 8 threads, and compares the results.
fn in_every_pool<R: PartialEq + Send>(what: &str, work: impl Fn() -> R + Sync) -> R {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&work)
    };
    let one = run(1);
    for threads in [2, 8] {
        assert!(run(threads) == one, "{what}: {threads} threads give another result than one");
    }
    one
}

/// A model whose sizes are no multiples of panels, tiles or vectors.
fn odd_model(family: Family) -> Model {
    let config = Config {
        family,
        d_model: 180,
        num_layers: 2,
        num_heads: 5,
        num_kv_heads: if family == Family::Dream { 1 } else { 5 },
        head_dim: 36,
        mlp_hidden_size: 331,
        vocab_size: 517,
        mask_token_id: 516,
        eos_token_ids: vec![515],
        ..Config::shape("mid").unwrap()
    };
    Model::random(config, 3).unwrap()
}

/// Logits of three sequences, one of them longer than a sweep of the matrix products; then of a block that uses the cache.
#[test]
fn logits_have_the_same_bits() {
    let lens = [301, 1, 70];
    for family in FAMILIES {
        let model = odd_model(family);
        let tokens: Vec<Vec<u32>> = lens.map(|len| (0..len as u32).map(|i| i * 37 % 500).collect()).to_vec();
        for mode in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
            let bits = in_every_pool(&format!("{family} {mode:?}"), || {
                let rows = lens.iter().sum();
                let config = SessionConfig {
                    prompt_lens: lens.to_vec(),
                    gen_length: 0,
                    max_candidates: rows,
                    kv_cache: mode != CacheMode::None,
                    feature_cache: false,
                    reuses_guidance: false,
                    guided: false,
                    max_ratios: 0,
                    num_end_tokens: 0,
                };
                let mut session = Session::new(model.transformer(), Cpu::default(), config).unwrap();
                let mut bits = vec![];
                let kinds = match mode {
                    CacheMode::Prefix => &[PassKind::Full, PassKind::Suffix][..],
                    CacheMode::Dual => &[PassKind::Full, PassKind::Block],
                    _ => &[PassKind::Full],
                };
                for kind in kinds {
                    let window = |len: usize| kind.rows(&(len / 3..len / 2 + 1), 0, len);
                    let query_rows: Vec<_> =
                        lens.iter().enumerate().map(|(s, len)| QueryRows::new(s, window(*len), *len)).collect();
                    let index: Vec<usize> = (0..query_rows.iter().map(|q| q.rows.len()).sum()).collect();
                    session.forward(&tokens, &query_rows, &BlockPlan::new(mode, *kind), &index, None).unwrap();
                    bits.extend(session.logits(index.len()).unwrap().iter().map(|logit| logit.to_bits()));
                }
                bits
            });
            assert!(bits.len() > 300 * 517 && bits.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        }
    }
}

/// Every cache: those of Fast-dLLM, dLLM-Cache's, and hybrid ones.
fn caches() -> Vec<Options> {
    let base = Options {
        gen_length: 8,
        block_length: Some(4),
        prompt_interval: 3,
        response_interval: 2,
        ..Options::default()
    };
    let cached = |cache| Options { cache, ..base.clone() };
    vec![
        cached(CacheMode::None),
        cached(CacheMode::Prefix),
        cached(CacheMode::Dual),
        Options { refresh_ratio: Some(0.3), ..cached(CacheMode::Adaptive) },
        Options { refresh_ratio: Some(0.5), vicinity: 1, ..cached(CacheMode::Dual) },
        Options { refresh_prompt_every: 2, suffix_window: Some(2), ..cached(CacheMode::Prefix) },
    ]
}

#[test]
fn decodes_have_the_same_tokens() {
    let mut settings = 0;
    for family in FAMILIES {
        let odd = odd_model(family);
        let long: Vec<Vec<u32>> = [290, 3, 41].map(|len| (0..len).map(|i| i * 29 % 500).collect()).to_vec();
        let small = Model::open(Checkpoint::new(family).write().path()).unwrap();
        for cache in caches() {
            settings += 1;
            for policy in [Policy::Fixed, Policy::Threshold(0.4), Policy::Factor(1.0)] {
                let base = Options { policy, ..cache.clone() };
                let decode = |model: &Model, options: &Options, prompts: &[Vec<u32>]| {
                    in_every_pool(&format!("{family} {options:?}"), || {
                        let generation = Generator::new(model).options(options.clone()).generate(prompts).unwrap();
                        (generation.tokens, generation.nfe)
                    });
                };
                if policy == Policy::Threshold(0.4) {
                    decode(&odd, &Options { temperature: 0.8, ..base.clone() }, &long);
                }
                // A few of the sampling parameters for each; together all of them.
                for options in samplings(&base).into_iter().skip(settings % 5).step_by(5) {
                    decode(&small, &options, &prompts());
                }
            }
        }
    }
}
