//! The adaptive cache compared with decodes that recompute everything, and the work that it saves. `golden.rs` compares it
//! with dLLM-Cache, step by step.

use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::AdaptiveCache;
use dllm_kernels::decode::decode;
use dllm_kernels::engine::{CfgBranch, DecodeEngine, HostEngine, Pass};
use dllm_kernels::model::{QueryRows, SelectedRows, SessionConfig};
use dllm_kernels::sampling::{Candidates, CommitRule, Prediction, SamplingParams};
use dllm_kernels::{CacheMode, Config, Family, Generator, Model, Options, Policy, Result};

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];
const GEN: usize = 12;
const MASK: u32 = 63;

/// Four layers, random weights; Dream's heads share keys and values.
fn model(family: Family) -> Model {
    let config = Config {
        family,
        d_model: 64,
        num_layers: 4,
        num_heads: 2,
        num_kv_heads: if family == Family::Dream { 1 } else { 2 },
        head_dim: 32,
        mlp_hidden_size: 96,
        vocab_size: 64,
        max_sequence_length: 256,
        mask_token_id: MASK,
        eos_token_ids: vec![],
        ..Config::shape("mid").unwrap()
    };
    Model::random(config, 3).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![3, 14, 15, 9, 26], vec![5], (0..17).map(|i| i * 3 % 61).collect()]
}

fn options(prompt_interval: usize, response_interval: usize, refresh_ratio: f64) -> Options {
    let (cache, policy) = (CacheMode::Adaptive, Policy::Fixed);
    let (gen_length, block_length) = (GEN, Some(GEN));
    let base = Options { gen_length, block_length, cache, policy, ..Options::default() };
    Options { prompt_interval, response_interval, refresh_ratio: Some(refresh_ratio), ..base }
}

/// The loops that an adaptive cache goes around, in blocks and without.
fn loops(base: &Options) -> Vec<Options> {
    let mut list = Vec::new();
    for block_length in [4, GEN] {
        for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Factor(1.0)] {
            let base = Options { block_length: Some(block_length), policy, ..base.clone() };
            list.extend([base.clone(), Options { cfg_scale: 1.5, temperature: 0.7, ..base }]);
        }
    }
    list
}

fn tokens(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    Generator::new(model)
        .options(options.clone())
        .generate(prompts)
        .unwrap_or_else(|e| panic!("{options:?}: {e}"))
        .tokens
}

/// When every forward refreshes everything, by its intervals or because V-verify selects every row, decodes are the same as
/// without a cache: the same arithmetic, bit for bit.
#[test]
fn renewing_everything_is_no_cache() {
    for family in FAMILIES {
        let model = model(family);
        for base in [options(1, 1, 0.25), options(1, 1, 0.0), options(1, 1000, 1.0)] {
            for options in loops(&base) {
                let plain = Options { cache: CacheMode::None, ..options.clone() };
                assert_eq!(tokens(&model, &options, &prompts()), tokens(&model, &plain, &prompts()), "{options:?}");
            }
        }
    }
}

/// Settings that are equivalent by the rule, and one that is not.
#[test]
fn equal_settings() {
    let same = [
        // Intervals longer than the decode.
        (options(100, 100, 0.25), options(1000, 999, 0.25)),
        // A share of 1 renews the response as its interval does.
        (options(3, 100, 1.0), options(3, 1, 0.3)),
        // Less than a row is none; the response is never read by the prompt in between.
        (options(100, 4, 0.0), options(100, 4, 0.08)),
        // Shares are rounded down to rows.
        (options(5, 3, 0.25), options(5, 3, 0.33)),
    ];
    for family in FAMILIES {
        let model = model(family);
        let run = |options: &Options| tokens(&model, options, &prompts());
        for (one, other) in &same {
            for (one, other) in loops(one).iter().zip(&loops(other)) {
                assert_eq!(run(one), run(other), "{family} {one:?} {other:?}");
            }
        }
        assert_ne!(run(&options(5, 3, 0.25)), run(&options(5, 3, 0.0)), "{family}: V-verify changes something");
        assert_ne!(run(&options(2, 12, 0.25)), run(&options(12, 12, 0.25)), "{family}: so does the prompt's interval");
    }
}

/// A session that is given rows of all positions in every pass.
struct Full<'m> {
    session: HostEngine<'m, Cpu>,
    narrowed: usize,
}

impl DecodeEngine for Full<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let windows: Vec<_> =
            pass.query_rows.iter().map(|w| QueryRows::new(w.sequence, 0..w.num_keys, w.num_keys)).collect();
        self.narrowed += usize::from(windows != pass.query_rows);
        match pass.cfg {
            CfgBranch::Separate { plan, .. } => self.session.step(
                tokens,
                &Pass { query_rows: &windows, cfg: CfgBranch::Separate { plan, query_rows: &windows }, ..*pass },
            ),
            _ => self.session.step(tokens, &Pass { query_rows: &windows, ..*pass }),
        }
    }
}

/// Rows that passes leave out make no difference: prompts whose logits are not needed; prompts with masks, which are committed as any
/// other; and Dream's last prompt row, which is looked at.
#[test]
fn rows_that_are_left_out_are_not_missed() {
    let masked = vec![vec![3, MASK, 15, MASK], vec![MASK; 5], vec![7, 8, 9], vec![MASK], vec![1; 14]];
    for family in FAMILIES {
        let model = model(family);
        for prompts in [prompts(), masked.clone()] {
            for base in [options(5, 3, 0.25), options(4, 7, 0.5), Options { cfg_interval: 3, ..options(3, 5, 0.0) }] {
                for options in loops(&base) {
                    // The one number of steps that divides the masks of every prompt.
                    let threshold = matches!(options.policy, Policy::Threshold(_)) && options.block_length == Some(GEN);
                    let steps = (family == Family::Dream && threshold).then_some(1);
                    let options = Options { steps, ..options };
                    let sizes = options.sizes(model.config(), &prompts);
                    let session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
                    let mut whole = Full { session, narrowed: 0 };
                    let want = decode(&mut whole, model.config(), &prompts, &options, None, &mut ()).unwrap();
                    assert_eq!(tokens(&model, &options, &prompts), want.tokens, "{family} {options:?} {prompts:?}");
                    assert!(whole.narrowed > 0 || want.nfe < 2);
                }
            }
        }
    }
}

/// Unconditional sequences in separate passes match those in the same pass, but for the rounding of differences. Running them
/// rarely saves work, and changes the result.
#[test]
fn guidance_at_intervals() {
    for family in FAMILIES {
        let model = model(family);
        let at = |cfg_interval| Options { cfg_scale: 1.5, cfg_interval, ..options(5, 3, 0.25) };
        let run = |options: &Options| {
            let sizes = options.sizes(model.config(), &prompts());
            let mut session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
            let decoded = decode(&mut session, model.config(), &prompts(), options, None, &mut ()).unwrap();
            (decoded.tokens, session.macs())
        };
        // The first five forwards are all that there are.
        let short = |cfg_interval| Options { steps: Some(5), ..at(cfg_interval) };
        assert_eq!(run(&short(1)).0, run(&short(100)).0, "{family}");
        let (beside, all) = run(&at(1));
        let (apart, fewer) = run(&at(3));
        assert_ne!(beside, apart, "{family}");
        assert!(fewer < all, "{family}: {fewer} of {all}");
        for options in loops(&at(3)) {
            let batch = tokens(&model, &options, &prompts());
            for (prompt, tokens_of) in prompts().iter().zip(&batch) {
                assert_eq!(
                    tokens(&model, &options, std::slice::from_ref(prompt))[0],
                    *tokens_of,
                    "{family} {options:?}"
                );
            }
        }
    }
}

/// Two decodes at once, in turns and in threads of their own, are what they are one after the other.
#[test]
fn decodes_do_not_meet() {
    let model = model(Family::Llada);
    let options = options(5, 3, 0.25);
    let want: Vec<_> = prompts().iter().map(|prompt| tokens(&model, &options, std::slice::from_ref(prompt))).collect();
    let generator = Generator::new(&model).options(options.clone());
    std::thread::scope(|scope| {
        let run = |prompt: Vec<u32>| {
            let generator = &generator;
            scope.spawn(move || {
                (0..3).map(|_| generator.generate(std::slice::from_ref(&prompt)).unwrap().tokens).collect::<Vec<_>>()
            })
        };
        let threads: Vec<_> = prompts().into_iter().map(run).collect();
        for (thread, want) in threads.into_iter().zip(&want) {
            assert!(thread.join().unwrap().iter().all(|got| got == want));
        }
    });
    // A session that was used before.
    let sizes = options.sizes(model.config(), &prompts());
    let mut session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let mut again = || decode(&mut session, model.config(), &prompts(), &options, None, &mut ()).unwrap().tokens;
    assert_eq!(again(), again());
}

fn unmask() -> SamplingParams {
    SamplingParams { f32_confidence: true, mask_token: Some(MASK), ..SamplingParams::default() }
}

/// Passes over sequences of 8 + 8 tokens, each with its own plan, all observed: the selected rows, and MACs.
fn passes(
    model: &Model,
    adaptive: AdaptiveCache,
    changes: impl Fn(usize, &mut Vec<u32>),
) -> Vec<(Vec<SelectedRows>, u64)> {
    let sizes = SessionConfig {
        prompt_lens: vec![8],
        gen_length: 8,
        max_candidates: 8,
        kv_cache: true,
        feature_cache: true,
        reuses_guidance: false,
        guided: false,
        max_ratios: 0,
        num_end_tokens: 0,
    };
    let mut session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
    let mut row: Vec<u32> = (0..8).chain([MASK; 8]).collect();
    let positions: Vec<usize> = (8..16).collect();
    let pass = |t: usize| {
        changes(t, &mut row);
        let plan = adaptive.plan(t);
        let selection = CommitRule::Quota(0);
        let groups = [Candidates {
            sequence: 0,
            step: t,
            positions: positions.clone(),
            commit_before: 16,
            commit_rule: selection,
        }];
        let windows = [QueryRows::new(0, if plan.prompt { 0..16 } else { 8..16 }, 16)];
        let pass = Pass {
            plan: &plan,
            query_rows: &windows,
            candidates: &groups,
            sampling: &unmask(),
            cfg: CfgBranch::Batched,
            observed: true,
        };
        let before = session.macs();
        session.step(std::slice::from_ref(&row), &pass).unwrap();
        (session.selected_rows().to_vec(), session.macs() - before)
    };
    (0..10).map(pass).collect()
}

const EIGHT: AdaptiveCache =
    AdaptiveCache { prompt_interval: 100, response_interval: 100, refresh_ratio: 0.25, cfg_interval: 1 };

/// A step in which nothing changed chooses by position, in every layer.
#[test]
fn without_a_change_position_decides() {
    for family in FAMILIES {
        let model = model(family);
        for (t, (selected, _)) in passes(&model, EIGHT, |_, _| ()).into_iter().enumerate() {
            let first = |layer| SelectedRows { layer, rows: vec![vec![0, 1]] };
            let want: Vec<SelectedRows> = if t == 0 { vec![] } else { (1..4).map(first).collect() };
            assert_eq!(selected, want, "{family} step {t}");
        }
        // With a change that one is chosen, in the layers that see it as the largest.
        let selected = passes(&model, EIGHT, |t, row| row[13] = if t < 5 { MASK } else { 7 });
        assert!(selected[5].0[0].rows[0].contains(&5), "{family}: {:?}", selected[5]);
    }
}

/// Logits that were never compared with unconditional logits cannot be guided: an error names sequence and position.
#[test]
fn unconditional_sequences_that_never_ran() {
    let model = model(Family::Llada);
    let options = Options { cfg_scale: 1.0, cfg_interval: 2, ..options(5, 3, 0.25) };
    let tokens = [vec![1, 2], vec![MASK; GEN]].concat();
    let mut session =
        HostEngine::new(model.transformer(), Cpu::default(), options.sizes(model.config(), &[vec![1, 2]])).unwrap();
    let plan = options.adaptive().unwrap().plan(0);
    let (selection, positions) = (CommitRule::Quota(1), vec![4]);
    let groups = [Candidates { sequence: 0, step: 0, positions, commit_before: 14, commit_rule: selection }];
    let windows = [QueryRows::new(0, 0..14, 14)];
    let (twins, unmask) = (CfgBranch::Reused, SamplingParams { cfg_scale: 1.0, ..unmask() });
    let pass =
        Pass { plan: &plan, query_rows: &windows, candidates: &groups, sampling: &unmask, cfg: twins, observed: false };
    let error = session.step(&[tokens], &pass).unwrap_err().to_string();
    assert!(error.contains("none for sequence 0, position 4"), "{error}");
}

/// Parts that are not refreshed are not computed: MACs, as in `docs/cache-design.md`.
#[test]
fn work_is_what_the_page_says() {
    let model = model(Family::Dream);
    let config = model.config();
    let [d, q, kv, mlp, vocab] =
        [config.d_model, config.q_width(), config.kv_width(), config.mlp_hidden_size, config.vocab_size]
            .map(|n| n as u64);
    let (prompt, response, all, later) = (8, 8, 16, 3);
    let row = d * (q + 2 * kv) + 2 * all * q + q * d + 3 * d * mlp;
    let head = response * d * vocab;
    let of = |adaptive: AdaptiveCache| -> Vec<u64> {
        passes(&model, adaptive, |_, _| ()).into_iter().map(|p| p.1).collect()
    };

    let full = 4 * all * row + head;
    let first_layer = response * row;
    let verify = later * (response * d * kv + 2 * (row - d * kv));
    let got = of(AdaptiveCache { prompt_interval: 6, response_interval: 3, ..EIGHT });
    assert_eq!(got[0], full);
    assert_eq!(got[1], first_layer + verify + head);
    assert_eq!(got[3], first_layer + later * response * row + head);
    assert_eq!(got[6], full);
    // Only the prompt: V-verify has fresh values of all rows.
    let got = of(AdaptiveCache { prompt_interval: 4, ..EIGHT });
    assert_eq!(got[4], all * row + later * (all * d * kv + (prompt + 2) * (row - d * kv)) + head);
    let got = of(AdaptiveCache { prompt_interval: 4, refresh_ratio: 0.0, ..EIGHT });
    assert_eq!(got[1], first_layer + head);
    assert_eq!(got[4], all * row + later * prompt * row + head);
}
