//! The CUDA engine's use of its device: memory, launches, blocking calls, and errors. Tests that set options of the CUDA emulator run
//! one at a time and share their process with no other file.

use crate::common::checkpoint::{Checkpoint, EOS, MASK};
use crate::common::{Part, device, once_on_device, one_layer};
use dllm_kernels::decode::decode;
use dllm_kernels::engine::{DecodeEngine, DecodeRun, DeviceLoop, Pass, RunOutcome, StepTemplate};
use dllm_kernels::model::{LayerPlan, QueryRows};
use dllm_kernels::sampling::{CommitRule, Prediction, QuotaSchedule, SamplingParams, SequenceState};
use dllm_kernels::{CacheMode, Config, Error, Family, Generation, Generator, Model, Observer, Options, Policy};
use softgpu::Opt;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

once_on_device!(
    interrupted_between_passes,
    too_little_memory,
    unsupported_models;
    in_parts:
    launches_of_a_layer,
    a_failing_kernel_ends_the_decode,
    a_row_without_a_finite_logit,
    deferred_work,
    graphs_are_captured_once,
    no_blocking_call_inside_a_block,
    out_of_memory_at_any_allocation,
);

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];

/// Restores options of the CUDA emulator on drop.
struct Restore(Vec<(Opt, i64)>);
impl Drop for Restore {
    fn drop(&mut self) {
        self.0.iter().for_each(|(option, value)| softgpu::set(*option, *value));
    }
}

/// Runs one test at a time: in lazy mode, a thread that synchronises runs the work of all threads. The emulator gets four
/// multiprocessors: attention then has few KV splits and takes less time. [`launches_of_a_layer`] has the default number.
fn in_turn(work: impl FnOnce()) {
    let _turn = crate::alone();
    let options = [Opt::Lazy, Opt::TotalMemory, Opt::Multiprocessors];
    let _restore = softgpu::active().then(|| {
        let restore = Restore(options.map(|option| (option, softgpu::get(option))).to_vec());
        softgpu::set(Opt::Multiprocessors, 4);
        restore
    });
    work();
}

/// Runs `work`, which sets options of the CUDA emulator; prints a note and does nothing on a GPU.
fn with_emulator(work: impl FnOnce()) {
    if !softgpu::active() {
        println!("not run: needs the CUDA emulator");
        return;
    }
    in_turn(|| {
        let _restore = Restore(vec![(Opt::FailAlloc, -1), (Opt::FailKernel, -1), (Opt::Quiet, 0)]);
        softgpu::set(Opt::Quiet, 1);
        work();
    });
}

fn open(family: Family) -> Model {
    Model::open(Checkpoint::new(family).write().path()).unwrap()
}

fn on_device(family: Family) -> Model {
    open(family).to_device(&device(), |_, _| ()).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![3, 14, 15, 9, 26], vec![5]]
}

fn generator<'m>(model: &'m Model, cache: CacheMode, policy: Policy) -> Generator<'m> {
    Generator::new(model).gen_length(16).block_length(4).cache(cache).policy(policy)
}

fn generate(model: &Model) -> dllm_kernels::Result<Generation> {
    generator(model, CacheMode::Dual, Policy::Threshold(0.9)).generate(&prompts())
}

fn caches() -> Vec<Options> {
    let cached = |cache| Options { cache, ..Options::default() };
    [CacheMode::None, CacheMode::Prefix, CacheMode::Dual].map(cached).to_vec()
}

/// AdaptiveCache options. Of six forwards the first refreshes everything, the fourth the prompt, the third and the fifth the response.
/// So any four forwards after the first contain every kind.
fn adaptive() -> Options {
    let (prompt_interval, response_interval, refresh_ratio) = (3, 2, Some(0.5));
    Options { cache: CacheMode::Adaptive, prompt_interval, response_interval, refresh_ratio, ..Options::default() }
}

/// Hybrid caches: DualCache and PrefixCache with refreshes of the adaptive cache.
fn hybrid() -> [Options; 2] {
    let base = Options { vicinity: 1, refresh_prompt_every: 2, ..Options::default() };
    [
        Options { cache: CacheMode::Dual, refresh_ratio: Some(0.5), ..base.clone() },
        Options { cache: CacheMode::Prefix, suffix_window: Some(2), ..base },
    ]
}

/// Sets the lengths of [`generator`].
fn in_blocks(base: Options, policy: Policy) -> Options {
    Options { gen_length: 16, block_length: Some(4), policy, ..base }
}

/// Fails each allocation of `work` in turn, until it succeeds. Checks that every failure is a named error and leaks nothing.
fn fail_each(what: &str, mut work: impl FnMut() -> dllm_kernels::Result<()>, mut then: impl FnMut()) {
    let mut failed = 0;
    loop {
        let before = [Opt::LiveAllocations, Opt::UsedMemory].map(softgpu::get);
        softgpu::set(Opt::FailAlloc, failed);
        let result = work();
        let left = softgpu::get(Opt::FailAlloc);
        softgpu::set(Opt::FailAlloc, -1);
        softgpu::report();
        assert_eq!(
            [Opt::LiveAllocations, Opt::UsedMemory].map(softgpu::get),
            before,
            "{what}, allocation {failed}: leaks"
        );
        match result {
            Ok(()) => {
                assert!(left >= 0, "{what}: the failure of allocation {failed} was ignored");
                break;
            }
            Err(error) => named(what, &error),
        }
        then();
        failed += 1;
    }
    println!("{what}: {failed} allocations");
    assert!(failed > 3, "{what}: {failed}");
}

/// Checks an out-of-memory error: it has the needed sizes for device memory, and the driver's call for pinned memory.
#[track_caller]
fn named(what: &str, error: &Error) {
    let fits = match error {
        Error::OutOfMemory { .. } => {
            let message = error.to_string();
            message.contains(" need ")
                && (message.contains(" MiB of the device's memory")
                    || message.contains("memory of this machine") && message.contains("cuMemHostAlloc"))
        }
        Error::Driver { call, name, .. } => *call == "cuMemHostAlloc" && name.contains("OUT_OF_MEMORY"),
        _ => false,
    };
    assert!(fits, "{what}: {error}");
}

fn out_of_memory_at_any_allocation(part: Part) {
    with_emulator(|| {
        for family in part.of(FAMILIES, 1) {
            let dir = Checkpoint::new(family).write();
            let load = || Model::open(dir.path())?.to_device(&device(), |_, _| ());
            fail_each(&format!("{family}, to_device"), || load().map(|_| ()), || ());
            let model = load().unwrap();
            // The adaptive cache with one family only: both allocate the same.
            let bases =
                if family == Family::Llada { vec![Options::default(), adaptive()] } else { vec![Options::default()] };
            for base in part.of(bases, 1) {
                let cache = base.cache;
                let generator = Generator::new(&model).options(in_blocks(base, Policy::Threshold(0.9)));
                let generate = || generator.generate(&prompts());
                let want = generate().unwrap();
                let same = || assert_eq!(generate().unwrap().tokens, want.tokens);
                fail_each(&format!("{family} {cache:?}, generate"), || generate().map(|_| ()), same);
            }
        }
    });
}

/// A device with too little memory is an error before any work, with the needed and the free bytes.
fn too_little_memory() {
    with_emulator(|| {
        let used = softgpu::get(Opt::UsedMemory);
        let total = softgpu::get(Opt::TotalMemory);
        let state = || [Opt::UsedMemory, Opt::LiveAllocations, Opt::Launches].map(softgpu::get);
        let refused = |error: Error, what: &str| {
            let error = error.to_string();
            assert!(error.starts_with(what) && error.contains("need ") && error.contains(" MiB are free"), "{error}");
            assert_eq!(softgpu::report(), "", "an allocation was tried");
        };
        softgpu::set(Opt::TotalMemory, used + 1000);
        let before = state();
        refused(open(Family::Llada).to_device(&device(), |_, _| ()).err().unwrap(), "the weights need");
        assert_eq!(state(), before);

        softgpu::set(Opt::TotalMemory, total);
        let model = on_device(Family::Llada);
        let before = state();
        softgpu::set(Opt::TotalMemory, softgpu::get(Opt::UsedMemory) + (1 << 20));
        refused(generate(&model).unwrap_err(), "2 sequences of up to 21 positions need");
        assert_eq!(state(), before);
        softgpu::set(Opt::TotalMemory, total);
        generate(&model).unwrap();

        // Exact to the byte, feature cache included.
        let options = in_blocks(adaptive(), Policy::Fixed);
        let sizes = options.sizes(model.config(), &prompts());
        let needed =
            dllm_kernels::engine::MemoryEstimate::cuda(&sizes, model.config(), device().multiprocessors().unwrap())
                .unwrap()
                .total() as i64;
        let generate = || Generator::new(&model).options(options.clone()).generate(&prompts());
        let before = state();
        softgpu::set(Opt::TotalMemory, softgpu::get(Opt::UsedMemory) + needed - 1);
        refused(generate().unwrap_err(), "2 sequences of up to 21 positions need");
        assert_eq!(state(), before);
        // An empty buffer takes 16 bytes.
        softgpu::set(Opt::TotalMemory, softgpu::get(Opt::UsedMemory) + needed + 64);
        generate().unwrap();
    });
}

/// Counts blocking calls between the ends of blocks, and of the whole decode.
fn blocks(generator: &Generator, prompts: &[Vec<u32>]) -> (Vec<i64>, i64) {
    struct Blocks(Vec<i64>);
    impl Observer for Blocks {
        fn finalized(&mut self, sequence: usize, _tokens: &[u32]) {
            if sequence == 0 {
                self.0.push(softgpu::get(Opt::BlockingCalls));
            }
        }
    }
    let before = softgpu::get(Opt::BlockingCalls);
    let mut blocks = Blocks(vec![]);
    generator.generate_observed(prompts, &mut blocks).unwrap();
    let between = blocks.0.windows(2).map(|pair| pair[1] - pair[0]).collect();
    (between, softgpu::get(Opt::BlockingCalls) - before)
}

/// There are four blocking calls between two blocks, for any number of passes: two to read back the tokens and two for the state.
/// There is none inside a block.
///
/// With the adaptive cache, a pass over a sequence that has finished its block would change its feature cache. So when a sequence
/// finishes before the others, the device loop returns to the host, for four calls, which continues with the others. Sequences at
/// different points of their intervals then run one after the other, for four calls each. When all finish together, as with a fixed
/// quota, the counts are those of the other caches.
fn no_blocking_call_inside_a_block(part: Part) {
    with_emulator(|| {
        let prompts = [vec![3, 14, 15, 9, 26], vec![5, 6, 7, 8, 9]];
        let policies = [
            (Policy::Fixed, 16),
            (Policy::Fixed, 4),
            (Policy::Threshold(0.9), 16),
            (Policy::Threshold(0.01), 16),
            (Policy::Factor(1.0), 16),
        ];
        let policies = part.of(policies, 3);
        for lazy in part.of([0, 1], 1) {
            softgpu::set(Opt::Lazy, lazy);
            for family in part.of(FAMILIES, 1) {
                let model = on_device(family);
                for base in part.of(caches().into_iter().chain(hybrid()).chain([adaptive()]), 2) {
                    let cache = base.cache;
                    let mut around = vec![];
                    for &(policy, steps) in &policies {
                        let ends_differ = cache == CacheMode::Adaptive && policy != Policy::Fixed;
                        let prompts = if ends_differ { &prompts[..1] } else { &prompts[..] };
                        let options = Options { steps: Some(steps), ..in_blocks(base.clone(), policy) };
                        let (between, all) = blocks(&Generator::new(&model).options(options.clone()), prompts);
                        assert_eq!(between, [4; 3], "{family} {options:?}");
                        around.push(all - 4 * 4);
                    }
                    // Start and end of a decode block too, independently of the number of passes.
                    assert_eq!(around, vec![3; policies.len()], "{family} {cache:?}");
                }
                let apart = |policy| {
                    let generator = Generator::new(&model).options(in_blocks(adaptive(), policy));
                    blocks(&generator, &crate::common::checkpoint::prompts()).0
                };
                let apart = [Policy::Threshold(0.3), Policy::Threshold(0.6), Policy::Factor(1.0)].map(apart);
                println!("{family}: between blocks that sequences end in different passes: {apart:?}");
                assert!(apart.iter().flatten().all(|calls| calls % 4 == 0), "{apart:?}");
                assert!(apart.iter().flatten().any(|calls| *calls > 4), "{family}: all sequences ended together");
            }
        }
        assert_eq!(softgpu::report(), "");
    });
}

/// Work that the emulator runs only when the host synchronises gives the same tokens and forwards.
fn deferred_work(part: Part) {
    with_emulator(|| {
        for family in FAMILIES {
            let [hybrid, _] = hybrid();
            for base in part.of(caches().into_iter().chain([hybrid, adaptive()]), 1) {
                let selects = base.refresh_ratio.is_some();
                let policies = [Policy::Fixed, Policy::Threshold(0.6), Policy::Factor(1.0)];
                for policy in policies.into_iter().take(if selects { 2 } else { 3 }) {
                    let options = Options { temperature: 0.5, cfg_scale: 0.5, ..in_blocks(base.clone(), policy) };
                    let run = |lazy| {
                        softgpu::set(Opt::Lazy, lazy);
                        // Loading is deferred too.
                        let model = on_device(family);
                        let generation = Generator::new(&model).options(options.clone()).generate(&prompts()).unwrap();
                        (generation.tokens, generation.nfe)
                    };
                    assert_eq!(run(1), run(0), "{family} {options:?}");
                }
            }
        }
        assert_eq!(softgpu::report(), "");
    });
}

fn launches_of_a_layer(part: Part) {
    let _turn = crate::alone();
    for family in part.of(FAMILIES, 1) {
        let model = on_device(family);
        let layers = model.config().num_layers;
        let counts = |base: Options| {
            let options = in_blocks(base, Policy::Fixed);
            let mut engine = model.engine(options.sizes(model.config(), &prompts())).unwrap();
            assert_eq!(engine.kernel_counts().unwrap(), None, "nothing is captured yet");
            decode(&mut *engine, model.config(), &prompts(), &options, None, &mut ()).unwrap();
            let launches = engine.kernel_counts().unwrap().unwrap();
            println!("{family} {:?}: {launches:?}", options.cache);
            (launches.layer, launches.pass)
        };
        // residual_norm, QKV, rope, attention and its combine, attn_out, residual_norm, gate and up, swiglu, down.
        const FULL: usize = 10;
        for base in part.of(caches().into_iter().chain(hybrid()), 2) {
            let what = format!("{family} {base:?}");
            // Embedding; layers, of which the last gathers twice; norm and head; unmask and advance. The hybrid caches' forwards of a
            // block, which have the fewest rows, are the same.
            assert_eq!(counts(base), (FULL, 1 + FULL * layers + 2 + 2 + 2), "{what}");
        }
        // The adaptive cache, by the kind of all forwards but the first; the first forward's graph is never captured.
        const NEVER: usize = 1000;
        let kinds = [
            // Residual norm with features, V, vverify, gather, QK, rope, attention and its combine, attn_out, store features; residual
            // norm with features, gather, gate and up, swiglu, down, store features.
            (NEVER, NEVER, 0.5, 16),
            // The whole response is refreshed: no vverify.
            (NEVER, 1, 0.5, 16),
            // The prompt is refreshed: with vverify, and with the kernel that stores the prompt's values in the cache.
            (1, NEVER, 0.5, 17),
            // The prompt with ratio 0: no V, no vverify, no separate values.
            (1, NEVER, 0.0, 14),
            // No refresh and ratio 0: two residual norms with features.
            (NEVER, NEVER, 0.0, 2),
            // Both are refreshed: all rows, and two stores of features.
            (1, 1, 0.5, FULL + 2),
        ];
        // The same for both families.
        let kinds = if family == Family::Llada { &kinds[..] } else { &[] };
        for &(prompt_interval, response_interval, refresh_ratio, layer) in part.of(kinds, 2) {
            let base = Options { prompt_interval, response_interval, refresh_ratio: Some(refresh_ratio), ..adaptive() };
            let what = format!("{family} {base:?}");
            // Embedding; the first layer, and the others; residual norm with features, gather and head; unmask and advance.
            let head = 1 + 1 + 1;
            assert_eq!(counts(base), (FULL, 1 + FULL + layer * (layers - 1) + head + 2), "{what}");
        }
        // With all kinds: the count of the kind with V-verify.
        assert_eq!(counts(adaptive()), (FULL, 1 + FULL + 16 * (layers - 1) + 3 + 2), "{family}");
    }
}

/// Passes are replayed as graphs: after the first blocks the number of kernels grows, but not that of launch calls.
fn graphs_are_captured_once(part: Part) {
    with_emulator(|| {
        for family in part.of(FAMILIES, 1) {
            let model = on_device(family);
            for (cache, max_sizes) in part.of([(CacheMode::Dual, 1), (CacheMode::Prefix, 8), (CacheMode::None, 1)], 2) {
                let run = |blocks: usize| {
                    let before = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
                    let generator = Generator::new(&model).gen_length(4 * blocks).block_length(4).cache(cache);
                    let nfe = generator.policy(Policy::Fixed).generate(&[vec![7; 16]]).unwrap().nfe;
                    assert_eq!(nfe, 4 * blocks);
                    let [calls, kernels] = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
                    (calls - before[0], kernels - before[1])
                };
                let [few, more, many] = [2, 5, 10].map(run);
                println!("{family} {cache:?}: launch calls and kernels of 2, 5, 10 blocks: {few:?} {more:?} {many:?}");
                assert!(few.1 < more.1 && more.1 < many.1);
                // Each shape is launched twice, first to load its modules and then to capture it; a pass has about 20 kernels.
                if max_sizes == 1 {
                    assert!(few.0 == many.0, "{family} {cache:?}: captured again");
                } else {
                    let of_shape = few.0 / 2;
                    assert!(many.0 <= of_shape * (1 + max_sizes), "{family} {cache:?}: {} {of_shape}", many.0);
                }
            }
            // Every kind of forward is captured once per decode, at any point of a block; five blocks have each kind twice.
            let [hybrid, _] = hybrid();
            for base in part.of([adaptive(), hybrid], 1) {
                let run = |blocks: usize| {
                    let before = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
                    let options = Options { gen_length: 4 * blocks, ..in_blocks(base.clone(), Policy::Fixed) };
                    let nfe = Generator::new(&model).options(options).generate(&[vec![7; 16]]).unwrap().nfe;
                    assert_eq!(nfe, 4 * blocks);
                    let [calls, kernels] = [Opt::LaunchCalls, Opt::Launches].map(softgpu::get);
                    (calls - before[0], kernels - before[1])
                };
                let all = [5, 9].map(run);
                println!("{family} {:?}: launch calls and kernels of 5 and 9 blocks: {all:?}", base.cache);
                assert!(all[0].1 < all[1].1);
                assert!(all[0].0 == all[1].0, "{family} {base:?}: captured again: {all:?}");
            }
        }
    });
}

fn unsupported_models() {
    in_turn(refused_models);
}

fn refused_models() {
    let base = one_layer(Family::Llada);
    let to_device = |config: Config| Model::random(config, 1).unwrap().to_device(&device(), |_, _| ());
    assert!(to_device(base.clone()).is_ok());
    let cases = [
        (Config { head_dim: 48, ..base.clone() }, "head_dim to be 32, 64 or 128, found 48"),
        (Config { d_model: 60, ..base.clone() }, "d_model to be a multiple of 8, at most 8192, found 60"),
        (Config { mlp_hidden_size: 100, ..base.clone() }, "mlp_hidden_size to be a multiple of 8, found 100"),
        (Config { vocab_size: 70, ..base.clone() }, "vocab_size to be a multiple of 8, found 70"),
    ];
    for (config, expected) in cases {
        let error = to_device(config).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

fn a_row_without_a_finite_logit(part: Part) {
    in_turn(|| no_finite_logit(part));
}

/// NaN in the weights is an error with the same sequence, position and forward as on the CPU.
fn no_finite_logit(part: Part) {
    let errors = |checkpoint: &Checkpoint, options: &Options, prompts: &[Vec<u32>]| {
        let dir = checkpoint.write();
        let cpu = Model::open(dir.path()).unwrap();
        let gpu = Model::open(dir.path()).unwrap().to_device(&device(), |_, _| ()).unwrap();
        let error = |model| {
            let error = Generator::new(model).options(options.clone()).generate(prompts).unwrap_err();
            assert!(matches!(error, Error::NoFiniteLogit { .. }), "{error}");
            error.to_string()
        };
        let (cpu, gpu) = (error(&cpu), error(&gpu));
        assert_eq!(gpu, cpu);
    };
    for family in FAMILIES {
        let [hybrid, _] = hybrid();
        for base in part.of(caches().into_iter().chain([hybrid, adaptive()]), 2) {
            for policy in part.of([Policy::Threshold(0.9), Policy::Fixed], 1) {
                let options = Options { gen_length: 8, ..in_blocks(base.clone(), policy) };
                // NaN in every row.
                let mut checkpoint = Checkpoint::new(family);
                let norm = match family {
                    Family::Llada => "model.transformer.ln_f.weight",
                    Family::Dream => "model.norm.weight",
                };
                checkpoint.tensor(norm).values.fill(f32::NAN);
                errors(&checkpoint, &options, &prompts());
                // NaN in the second sequence, whose prompt contains the token with NaN.
                let mut checkpoint = Checkpoint::new(family);
                let embedding = checkpoint.embedding();
                checkpoint.row(embedding, 20).fill(f32::NAN);
                checkpoint.want(EOS);
                checkpoint.row(embedding, 20)[0] = f32::NAN;
                errors(&checkpoint, &options, &[vec![3, 4], vec![5, 20, 6], vec![7]]);
                // NaN from the second forward on, after the first has committed the token with NaN.
                let mut checkpoint = Checkpoint::new(family);
                checkpoint.want(EOS);
                checkpoint.row(embedding, EOS as usize).fill(f32::NAN);
                let first = Options { policy: Policy::Fixed, ..options };
                errors(&checkpoint, &first, &prompts());
            }
        }
    }
}

fn interrupted_between_passes() {
    in_turn(interrupted);
}

/// A device run may be interrupted before any pass: committed tokens stay, masks are left, and the next run is correct.
fn interrupted() {
    let model = on_device(Family::Llada);
    let config = model.config();
    let prompt = vec![3, 14, 15, 9, 26];
    let options = Options {
        gen_length: 8,
        block_length: Some(8),
        cache: CacheMode::None,
        policy: Policy::Fixed,
        ..Options::default()
    };
    let whole = Generator::new(&model)
        .options(options.clone())
        .generate(std::slice::from_ref(&prompt))
        .unwrap()
        .tokens
        .remove(0);
    let start = [prompt.clone(), vec![MASK; 8]].concat();
    let unmask = SamplingParams { f32_confidence: true, mask_token: Some(MASK), ..SamplingParams::default() };
    let mut engine = model.engine(options.sizes(config, std::slice::from_ref(&prompt))).unwrap();
    let device = engine.device_loop().unwrap();
    let plan = vec![LayerPlan::Full { reuse: false, store: false, store_features: false }; config.num_layers];
    let block = 5..13;
    let candidates = [(0, block.clone().collect::<Vec<usize>>())];
    let stage = StepTemplate {
        plan: &plan,
        query_rows: &[QueryRows::new(0, 0..13, 13)],
        candidates: &candidates,
        shrinks: false,
    };
    let sequence = SequenceState {
        generated: 5,
        forwards: 0,
        active_range: block.clone(),
        quota_range: block.clone(),
        initial_masks: 8,
        per_step: 0,
        deficit: 0,
        max_passes: 8,
        active: true,
        first_quota: 1,
        first_commit_before: usize::MAX,
    };
    let run = DecodeRun {
        templates: &[Some(stage)],
        template_of: &|_| 0,
        first_pass: 0,
        ends_with_first: false,
        schedule: &QuotaSchedule::Llada { steps: 8 },
        commit_rule: CommitRule::Quota(0),
        sequences: &[sequence],
        sampling: &unmask,
        end_tokens: &[],
    };
    for stop_after in (1..=8).chain([1, 7]) {
        let calls = Cell::new(0);
        let go_on = || {
            calls.set(calls.get() + 1);
            calls.get() < stop_after
        };
        let mut tokens = vec![start.clone()];
        let outcome = device.run(&mut tokens, &run, &go_on).unwrap();
        assert_eq!((outcome.passes, outcome.sequences[0].forwards), (stop_after, stop_after));
        assert_eq!(outcome.interrupted, stop_after < 8);
        let masks = tokens[0].iter().filter(|t| **t == MASK).count();
        assert_eq!(masks, 8 - stop_after);
        assert!(tokens[0][5..].iter().zip(&whole).all(|(got, want)| *got == MASK || got == want));
    }

    interrupted_adaptive(&model);

    // The generator's flag, set before the decode: nothing runs.
    let flag = true.into();
    let stopped = Generator::new(&model).options(options).interrupt(&flag).generate(&[prompt]).unwrap();
    assert!(stopped.interrupted && stopped.nfe == 0 && stopped.tokens[0] == [MASK; 8]);
}

/// Engine that sets `flag` when a decode has asked `asks` times whether to continue, between two passes of a device run.
struct Stopping<'m> {
    engine: Box<dyn DecodeEngine + 'm>,
    flag: &'m AtomicBool,
    asks: usize,
}

impl DecodeEngine for Stopping<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> dllm_kernels::Result<Vec<Prediction>> {
        self.engine.step(tokens, pass)
    }

    fn device_loop(&mut self) -> Option<&mut dyn DeviceLoop> {
        Some(self)
    }
}

impl DeviceLoop for Stopping<'_> {
    fn run(
        &mut self,
        tokens: &mut [Vec<u32>],
        run: &DecodeRun,
        go_on: &dyn Fn() -> bool,
    ) -> dllm_kernels::Result<RunOutcome> {
        let asks = Cell::new(self.asks);
        let count_and_ask = || {
            asks.set(asks.get().saturating_sub(1));
            self.flag.fetch_or(asks.get() == 0, Ordering::Relaxed);
            go_on()
        };
        let outcome = self.engine.device_loop().unwrap().run(tokens, run, &count_and_ask);
        self.asks = asks.get();
        outcome
    }
}

/// Interrupts decodes with the adaptive cache, whose features belong to earlier tokens, before every pass of a block but the first.
/// Committed tokens stay, and the next decode is unaffected, also with the same engine.
fn interrupted_adaptive(model: &Model) {
    let config = model.config();
    let prompts = [vec![3, 14, 15, 9, 26], vec![5, 6]];
    // One block: the decode asks once between two passes.
    let options = Options { gen_length: 8, block_length: Some(8), policy: Policy::Fixed, ..adaptive() };
    let whole = Generator::new(model).options(options.clone()).generate(&prompts).unwrap().tokens;
    for asks in 1..8 {
        let flag = AtomicBool::new(false);
        let engine = model.engine(options.sizes(config, &prompts)).unwrap();
        let mut engine = Stopping { engine, flag: &flag, asks };
        let mut run = |interrupt| decode(&mut engine, config, &prompts, &options, interrupt, &mut ()).unwrap();
        let stopped = run(Some(&flag));
        assert!(stopped.interrupted && stopped.nfe == asks, "{asks}: {stopped:?}");
        for (got, want) in stopped.tokens.iter().zip(&whole) {
            assert_eq!(got.iter().filter(|token| **token != MASK).count(), asks);
            assert!(got.iter().zip(want).all(|(got, want)| *got == MASK || got == want), "{asks}: {got:?} {want:?}");
        }
        assert_eq!(run(None).tokens, whole, "after {asks} passes, with the same engine");
    }
    assert_eq!(Generator::new(model).options(options).generate(&prompts).unwrap().tokens, whole);
}

/// A failing kernel, in a launch or a graph, immediate or deferred, is an error with the driver's name; the decode does not hang.
fn a_failing_kernel_ends_the_decode(part: Part) {
    with_emulator(|| {
        for lazy in [0, 1] {
            softgpu::set(Opt::Lazy, lazy);
            let model = on_device(Family::Llada);
            let want = generate(&model).unwrap().tokens;
            let before = softgpu::get(Opt::Launches);
            generate(&model).unwrap();
            let kernels = softgpu::get(Opt::Launches) - before;
            for failing in part.of((0..kernels).step_by(7), 4).into_iter().chain([kernels - 1]) {
                softgpu::set(Opt::FailKernel, failing);
                let result = generate(&model);
                softgpu::set(Opt::FailKernel, -1);
                assert!(softgpu::report().contains("failed on request"), "{failing} of {kernels}");
                match result {
                    Err(Error::Driver { name, .. }) => assert!(name.contains("ILLEGAL_ADDRESS"), "{name}"),
                    // The emulator continues after a failure with NaN, which may be detected first.
                    Err(Error::NoFiniteLogit { .. }) if lazy == 1 => {}
                    other => panic!("{failing} of {kernels}: {other:?}"),
                }
                assert_eq!(generate(&model).unwrap().tokens, want, "after a failure of {failing}");
            }
            println!("lazy {lazy}: {kernels} kernels");
        }
    });
}
