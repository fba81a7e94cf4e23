//! unmask and advance in one graph.

use super::case::{Batch, ENDS, MASK, new_state, output_of, saturating_i32};
use super::loops::config;
use crate::common::{Random, device, on_device};
use dllm_kernels::abi::DLLM_NONE_FAILED;
use dllm_kernels::decode::decode;
use dllm_kernels::engine::{DecodeEngine, Pass};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Workspace;
use dllm_kernels::ops::unmask::{self, Row, RowTable, Unmask, UnmaskConfig};
use dllm_kernels::reference::advance::Sequence;
use dllm_kernels::sampling::{Confidence, Prediction, QuotaSchedule, llada_quota, sample};
use dllm_kernels::{CacheMode, Config, Family, Options, Policy, Result};

on_device! {
    unmasks_without_the_host,
}

const VOCAB_SIZE: usize = 16;
const GEN_LENGTH: usize = 12;
const STEPS: usize = 5;
const SEED: u64 = 3;

/// An engine with constant logits, `[positions, VOCAB_SIZE]` per sequence, which samples on the host.
struct ConstantLogits {
    logits: Vec<Vec<f32>>,
}

impl DecodeEngine for ConstantLogits {
    fn step(&mut self, _: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let row = |s: usize, position: usize| &self.logits[s][position * VOCAB_SIZE..][..VOCAB_SIZE];
        let rows = pass.candidates.iter().flat_map(|c| c.positions.iter().map(|p| row(c.sequence, *p)));
        let mut logits: Vec<f32> = rows.flatten().copied().collect();
        sample(&mut logits, VOCAB_SIZE, pass.candidates, pass.sampling)
    }
}

/// unmask and advance in one graph, replayed until advance reports that the block is complete. Tokens and number of passes
/// equal those of the loop of the host. Replays after the end change nothing.
fn unmasks_without_the_host() {
    device().preload().unwrap();
    let random = &mut Random(11);
    for temperature in [0.0, 0.7] {
        for policy in [Policy::Fixed, Policy::Threshold(0.4), Policy::Factor(0.9)] {
            for early_stop in [false, true] {
                let options = Options {
                    gen_length: GEN_LENGTH,
                    block_length: Some(GEN_LENGTH),
                    steps: Some(STEPS),
                    cache: CacheMode::None,
                    policy,
                    temperature,
                    early_stop,
                    seed: SEED,
                    ..Options::default()
                };
                check(random, &options);
            }
        }
    }
}

fn check(random: &mut Random, options: &Options) {
    let config = Config { vocab_size: VOCAB_SIZE, ..config(Family::Llada) };
    let prompts = [vec![1, 2], vec![4; 5], vec![2]];
    let mut logits =
        |prompt: &Vec<u32>| (0..(prompt.len() + GEN_LENGTH) * VOCAB_SIZE).map(|_| 2.0 * random.normal()).collect();
    let mut engine = ConstantLogits { logits: prompts.iter().map(&mut logits).collect() };
    options.validate(&config, &prompts).unwrap();
    let want = decode(&mut engine, &config, &prompts, options, None, &mut ()).unwrap();

    let (mut batch, rows) = first_state(&prompts, options);
    let stream = batch.stream.clone();
    let logits = stream.upload(&engine.logits.concat()).unwrap();
    let rows = RowTable::new(&stream, &rows).unwrap();
    let mut workspace = unmask::workspace(&stream, &rows, VOCAB_SIZE).unwrap();
    let graph = stream.capture(|| {
        launch_unmask(&stream, &mut batch, &logits, &rows, &mut workspace, options)?;
        batch.launch()
    });
    let graph = graph.unwrap();
    let replay = || {
        // SAFETY: the buffers live, and belong to this stream.
        unsafe { graph.launch() }.unwrap();
        (batch.read().progress, batch.tokens.read().unwrap())
    };
    let (progress, tokens) = loop {
        let (progress, tokens) = replay();
        if progress.active == 0 {
            break (progress, tokens);
        }
    };
    assert_eq!(saturating_i32(want.nfe), progress.nfe, "{options:?}");
    assert_eq!((progress.passes, progress.failed_sequence), (progress.nfe, DLLM_NONE_FAILED));
    for (sequence, (want, prompt)) in batch.read().sequences.iter().zip(want.tokens.iter().zip(&prompts)) {
        let got = &tokens[sequence.first_token as usize + prompt.len()..][..want.len()];
        assert!(got.iter().zip(want).all(|(got, want)| *got == *want as i32), "{options:?}: {got:?} {want:?}");
        assert!(want.len() == GEN_LENGTH || sequence.ended == 1, "{options:?}: {want:?}");
    }
    let (after, same) = replay();
    assert_eq!((after.nfe, after.passes, &same), (progress.nfe, progress.passes + 1, &tokens), "{options:?}");
}

/// Returns the batch before its first pass, and the rows of unmask for each sequence.
fn first_state(prompts: &[Vec<u32>], options: &Options) -> (Batch, Vec<Vec<Row>>) {
    let fixed = options.policy == Policy::Fixed;
    let (mut tokens, mut sequences, mut rows) = (vec![], vec![], vec![]);
    for prompt in prompts {
        let start = tokens.len();
        tokens.extend(prompt.iter().map(|token| *token as i32).chain([MASK; GEN_LENGTH]));
        let active_range = prompt.len()..prompt.len() + GEN_LENGTH;
        let row = |position| Row { token: start + position, logits_row: start + position, position };
        rows.push(active_range.clone().map(row).collect());
        sequences.push(Sequence {
            generated: active_range.start,
            initial_masks: GEN_LENGTH,
            quota_range: active_range.clone(),
            active_range,
            quota: Some(if fixed { llada_quota(GEN_LENGTH, STEPS, 0) } else { usize::MAX }),
            max_passes: if fixed { STEPS } else { usize::MAX },
            ..Sequence::new(start..tokens.len())
        });
    }
    let schedule = if fixed { QuotaSchedule::Llada { steps: STEPS } } else { QuotaSchedule::Unlimited };
    let start = output_of(&new_state(schedule, sequences), &[i32::MAX; 3]);
    let end_tokens = if options.early_stop { &ENDS[..] } else { &[] };
    (Batch::new(&tokens, &start, &[], end_tokens), rows)
}

fn launch_unmask(
    stream: &Stream,
    batch: &mut Batch,
    logits: &Buffer<f32>,
    rows: &RowTable,
    workspace: &mut Workspace,
    options: &Options,
) -> Result<()> {
    let quota = &batch.quota;
    let policy = match options.policy {
        Policy::Fixed => unmask::Policy::Fixed(quota),
        Policy::Threshold(t) => unmask::Policy::Threshold { threshold: t as f32, top_n: Some(quota) },
        Policy::Factor(factor) => unmask::Policy::Factor(factor as f32),
        other => panic!("{other:?} has no counterpart"),
    };
    let config = UnmaskConfig {
        confidence: Confidence::Probability,
        policy,
        temperature: options.temperature as f32,
        tempered_confidence: false,
        cfg_scale: 0.0,
        alg_temp: 0.0,
        seed: SEED,
        mask_token: MASK as u32,
    };
    let args = Unmask {
        logits,
        uncond_logits: None,
        vocab_size: VOCAB_SIZE,
        logits_stride: VOCAB_SIZE,
        rows,
        tokens: &mut batch.tokens,
        commit_before: Some(&batch.commit_before),
        steps: Some(&batch.steps),
        min_logit: None,
        outcome: &mut batch.outcome,
        workspace,
    };
    unmask::launch(stream, args, &config)
}
