//! A session with a stopwatch around every forward, and what a forward has to do at least.

use super::Setup;
use dllm_kernels::Options;
use dllm_kernels::backend::{Ratio, RowUpdate, UpdateAlways};
use dllm_kernels::cache::{CacheMode, PassKind};
use dllm_kernels::engine::{DecodeEngine, DecodeRun, DeviceLoop, KernelCounts, Pass, RunOutcome};
use dllm_kernels::model::{CachePlan, Config, LayerPlan, QueryRows, SelectedRows, Weights};
use dllm_kernels::sampling::Prediction;
use dllm_kernels::{Error, Result};
use std::time::Instant;

/// What a forward runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Everything.
    Full,
    /// The block and all that follows.
    Suffix,
    /// The block.
    Block,
    /// Joined caches: what begins a block after the first.
    Refresh,
    /// Adaptive cache: the prompt, and of the response what V-verify chooses.
    Prompt,
    /// Adaptive cache: the response.
    Response,
    /// Adaptive cache: what V-verify chooses.
    Verify,
}

impl Forward {
    /// In the order of tables.
    pub const ALL: [Forward; 7] = {
        use Forward::*;
        [Full, Suffix, Block, Refresh, Prompt, Response, Verify]
    };

    pub fn name(self) -> &'static str {
        match self {
            Forward::Full => "full",
            Forward::Suffix => "suffix",
            Forward::Block => "block",
            Forward::Refresh => "refresh",
            Forward::Prompt => "prompt",
            Forward::Response => "response",
            Forward::Verify => "verify",
        }
    }

    /// What a plan runs of windows.
    fn of(plan: &dyn CachePlan, windows: &[QueryRows], cache: CacheMode) -> Forward {
        match (cache, plan.layer(1)) {
            (CacheMode::Adaptive, LayerPlan::Partial(RowUpdate { always: UpdateAlways::Prompt, .. })) => {
                Forward::Prompt
            }
            (CacheMode::Adaptive, LayerPlan::Partial(RowUpdate { others, .. })) => {
                if others == Some(Ratio::new(1.0)) {
                    Forward::Response
                } else {
                    Forward::Verify
                }
            }
            (_, LayerPlan::Partial(_) | LayerPlan::Full { reuse: true, store: true, .. }) => Forward::Refresh,
            _ if is_full(windows) => Forward::Full,
            _ => match cache.block_pass() {
                PassKind::Full | PassKind::Response => Forward::Full,
                PassKind::Suffix => Forward::Suffix,
                PassKind::Block => Forward::Block,
            },
        }
    }
}

/// One forward: what ran, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub kind: Forward,
    /// Positions that ran.
    pub rows: usize,
    /// Of the matrix products and of attention.
    pub macs: f64,
    pub seconds: f64,
}

/// A network that remembers its forwards.
pub struct Timed<'m> {
    pub network: Box<dyn DecodeEngine + 'm>,
    pub options: &'m Options,
    pub timings: Vec<Timing>,
}

/// Prompts are never empty, so only a full window starts at 0. The end tells nothing: the last block has no suffix.
fn is_full(windows: &[QueryRows]) -> bool {
    windows.iter().all(|window| window.rows.start == 0)
}

impl Timed<'_> {
    fn record(&mut self, plan: &dyn CachePlan, windows: &[QueryRows], macs: u64, seconds: f64) {
        self.timings.push(Timing {
            kind: Forward::of(plan, windows, self.options.cache),
            rows: windows.iter().map(|window| window.rows.len()).sum(),
            macs: macs as f64,
            seconds,
        });
    }
}

impl DecodeEngine for Timed<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let before = self.network.macs();
        let start = Instant::now();
        let verdicts = self.network.step(tokens, pass)?;
        let seconds = start.elapsed().as_secs_f64();
        let macs = self.network.macs() - before;
        self.record(pass.plan, pass.query_rows, macs, seconds);
        Ok(verdicts)
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.network.selected_rows()
    }

    fn macs(&self) -> u64 {
        self.network.macs()
    }

    fn device_loop(&mut self) -> Option<&mut dyn DeviceLoop> {
        self.network.device_loop().is_some().then_some(self as &mut dyn DeviceLoop)
    }

    fn kernel_counts(&self) -> Result<Option<KernelCounts>> {
        self.network.kernel_counts()
    }
}

impl DeviceLoop for Timed<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome> {
        let Some(network) = self.network.device_loop() else {
            return Err(Error::Unavailable("this network runs no courses".into()));
        };
        let ran = network.run(tokens, course, go_on)?;
        for (i, (seconds, macs)) in ran.seconds.iter().zip(&ran.macs).enumerate() {
            let Some(Some(stage)) = course.templates.get((course.template_of)(i)) else { continue };
            self.record(stage.plan, stage.query_rows, *macs, *seconds);
        }
        Ok(ran)
    }
}

/// d_model, width of queries, of keys, of the MLP, vocabulary, layers.
fn widths(config: &Config) -> [f64; 6] {
    [config.d_model, config.q_width(), config.kv_width(), config.mlp_hidden_size, config.vocab_size, config.num_layers]
        .map(|n| n as f64)
}

/// Multiply-adds of an adaptive decode of a token a forward, by the arithmetic of `docs/caching.md`: that of LLaDA, to which
/// Dream adds a row here and there.
pub fn adaptive_multiply_adds(setup: &Setup, options: &Options) -> Option<f64> {
    let adaptive = options.adaptive()?;
    let [d, q, kv, mlp, vocab, layers] = widths(&setup.config);
    let [prompt, response, block] = [setup.prompt.len(), setup.gen_length, options.block_length()].map(|n| n as f64);
    let (all, value) = (prompt + response, d * kv);
    let row = d * (q + 2.0 * kv) + 2.0 * all * q + q * d + 3.0 * d * mlp;
    let chosen = (response * adaptive.refresh_ratio).floor();
    let verifies = if adaptive.refresh_ratio > 0.0 { 1.0 } else { 0.0 };
    let forward = |t: usize| {
        let prompt_too = t.is_multiple_of(adaptive.prompt_interval);
        let first = if prompt_too { all * row } else { response * row };
        let later = match (prompt_too, t.is_multiple_of(adaptive.response_interval)) {
            (true, true) => all * row,
            (false, true) => response * row,
            (true, false) if verifies > 0.0 => all * value + (prompt + chosen) * (row - value),
            (true, false) => prompt * row,
            (false, false) if chosen > 0.0 => response * value + chosen * (row - value),
            (false, false) => 0.0,
        };
        first + (layers - 1.0) * later
    };
    // Of a block of n masks the head sees n, n - 1 ... 1.
    let scored = response * (block + 1.0) / 2.0;
    let forwards: f64 = (0..setup.gen_length).map(forward).sum();
    Some(setup.batch as f64 * (forwards + scored * d * vocab))
}

/// Bytes of weights that no forward can do without: all but the embedding, unless that is the head too.
pub fn weight_bytes_per_forward(config: &Config, weights: &Weights) -> Result<usize> {
    let mut bytes = 0;
    for (i, (name, shape)) in config.tensors().into_iter().enumerate() {
        // The embedding comes first.
        if i > 0 || config.tied_head {
            bytes += weights.get(&name, &shape)?.bytes().len();
        }
    }
    Ok(bytes)
}

/// The same where all of them are bf16.
pub fn bf16_bytes_per_forward(config: &Config) -> usize {
    let read = config.tensors().into_iter().enumerate().filter(|(i, _)| *i > 0 || config.tied_head);
    read.map(|(_, (_, shape))| 2 * shape.iter().product::<usize>()).sum()
}
