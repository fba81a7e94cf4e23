//! Engine that times every forward, and the work that a forward needs at least.

use super::Setup;
use dllm_kernels::Options;
use dllm_kernels::backend::{Ratio, RowUpdate, UpdateAlways};
use dllm_kernels::cache::{CacheMode, PassKind};
use dllm_kernels::engine::{DecodeEngine, DecodeRun, DeviceLoop, KernelCounts, Pass, RunOutcome};
use dllm_kernels::model::{CachePlan, Config, LayerPlan, QueryRows, SelectedRows, Weights};
use dllm_kernels::sampling::Prediction;
use dllm_kernels::{Error, Result};
use std::time::Instant;

/// Kind of a forward, by the rows that it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// The whole sequence.
    Full,
    /// The block and all positions after it.
    Suffix,
    /// The block.
    Block,
    /// Hybrid cache: refresh at the start of a block after the first.
    Refresh,
    /// Adaptive cache: the prompt, and the response rows that V-verify selects.
    Prompt,
    /// Adaptive cache: the response.
    Response,
    /// Adaptive cache: the rows that V-verify selects.
    Verify,
}

impl Forward {
    /// All kinds, in the order of the tables.
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

    /// Returns the kind of a forward with this plan and these windows.
    fn classify(plan: &dyn CachePlan, windows: &[QueryRows], cache: CacheMode) -> Forward {
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

/// Time and work of one forward.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub kind: Forward,
    /// Number of computed positions.
    pub rows: usize,
    /// MACs of matrix products and attention.
    pub macs: f64,
    pub seconds: f64,
}

/// Engine that records a timing of every forward.
pub struct Timed<'m> {
    pub engine: Box<dyn DecodeEngine + 'm>,
    pub options: &'m Options,
    pub timings: Vec<Timing>,
}

/// Returns whether the windows are whole sequences. Prompts are never empty, so only a full window starts at 0; the last
/// block ends where its sequence ends.
fn is_full(windows: &[QueryRows]) -> bool {
    windows.iter().all(|window| window.rows.start == 0)
}

impl Timed<'_> {
    fn record(&mut self, plan: &dyn CachePlan, windows: &[QueryRows], macs: u64, seconds: f64) {
        self.timings.push(Timing {
            kind: Forward::classify(plan, windows, self.options.cache),
            rows: windows.iter().map(|window| window.rows.len()).sum(),
            macs: macs as f64,
            seconds,
        });
    }
}

impl DecodeEngine for Timed<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let before = self.engine.macs();
        let start = Instant::now();
        let predictions = self.engine.step(tokens, pass)?;
        let seconds = start.elapsed().as_secs_f64();
        let macs = self.engine.macs() - before;
        self.record(pass.plan, pass.query_rows, macs, seconds);
        Ok(predictions)
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.engine.selected_rows()
    }

    fn macs(&self) -> u64 {
        self.engine.macs()
    }

    fn device_loop(&mut self) -> Option<&mut dyn DeviceLoop> {
        self.engine.device_loop().is_some().then_some(self as &mut dyn DeviceLoop)
    }

    fn kernel_counts(&self) -> Result<Option<KernelCounts>> {
        self.engine.kernel_counts()
    }
}

impl DeviceLoop for Timed<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome> {
        let Some(engine) = self.engine.device_loop() else {
            return Err(Error::Unavailable("this engine has no device loop".into()));
        };
        let ran = engine.run(tokens, course, go_on)?;
        for (i, (seconds, macs)) in ran.seconds.iter().zip(&ran.macs).enumerate() {
            let Some(Some(stage)) = course.templates.get((course.template_of)(i)) else { continue };
            self.record(stage.plan, stage.query_rows, *macs, *seconds);
        }
        Ok(ran)
    }
}

/// Returns d_model, the widths of queries, keys and MLP, the vocabulary size and the number of layers.
fn widths(config: &Config) -> [f64; 6] {
    [config.d_model, config.q_width(), config.kv_width(), config.mlp_hidden_size, config.vocab_size, config.num_layers]
        .map(|n| n as f64)
}

/// Returns the MACs of a decode with the adaptive cache that commits one token per forward, by the arithmetic of
/// `docs/cache-design.md`. It is that of LLaDA; Dream computes a few rows more.
pub fn adaptive_macs(setup: &Setup, options: &Options) -> Option<f64> {
    let adaptive = options.adaptive()?;
    let [d, q, kv, mlp, vocab, layers] = widths(&setup.config);
    let [prompt, response, block] = [setup.prompt.len(), setup.gen_length, options.block_length()].map(|n| n as f64);
    let (all, value) = (prompt + response, d * kv);
    let row = d * (q + 2.0 * kv) + 2.0 * all * q + q * d + 3.0 * d * mlp;
    let selected = (response * adaptive.refresh_ratio).floor();
    let verifies = if adaptive.refresh_ratio > 0.0 { 1.0 } else { 0.0 };
    let forward = |t: usize| {
        let prompt_too = t.is_multiple_of(adaptive.prompt_interval);
        let first = if prompt_too { all * row } else { response * row };
        let later = match (prompt_too, t.is_multiple_of(adaptive.response_interval)) {
            (true, true) => all * row,
            (false, true) => response * row,
            (true, false) if verifies > 0.0 => all * value + (prompt + selected) * (row - value),
            (true, false) => prompt * row,
            (false, false) if selected > 0.0 => response * value + selected * (row - value),
            (false, false) => 0.0,
        };
        first + (layers - 1.0) * later
    };
    // The head computes n, n - 1, ..., 1 rows of a block of n masks.
    let logit_rows = response * (block + 1.0) / 2.0;
    let forwards: f64 = (0..setup.gen_length).map(forward).sum();
    Some(setup.batch as f64 * (forwards + logit_rows * d * vocab))
}

/// Returns the bytes of weights that every forward reads: all but the embedding, unless it is the head too.
pub fn weight_bytes_per_forward(config: &Config, weights: &Weights) -> Result<usize> {
    let mut bytes = 0;
    for (i, (name, shape)) in config.tensors().into_iter().enumerate() {
        // The first tensor is the embedding.
        if i > 0 || config.tied_head {
            bytes += weights.get(&name, &shape)?.bytes().len();
        }
    }
    Ok(bytes)
}

/// Returns the bytes of weights that every forward reads if all weights are bf16.
pub fn bf16_bytes_per_forward(config: &Config) -> usize {
    let read = config.tensors().into_iter().enumerate().filter(|(i, _)| *i > 0 || config.tied_head);
    read.map(|(_, (_, shape))| 2 * shape.iter().product::<usize>()).sum()
}
