//! A session with a stopwatch around every forward, and what a forward has to do at least.

use dllm_kernels::cache::{CacheMode, PassKind};
use dllm_kernels::model::{Autonomous, Config, Course, Launches, Network, Pass, Ran, Weights};
use dllm_kernels::oracle::unmask::Verdict;
use dllm_kernels::{Error, Result};
use std::ops::Range;
use std::time::Instant;

/// One forward: what ran, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub kind: PassKind,
    /// Positions that ran.
    pub rows: usize,
    /// Positions that they attended to.
    pub keys: usize,
    /// Rows that went through the head.
    pub scored: usize,
    pub seconds: f64,
}

/// A network that remembers its forwards.
pub struct Timed<'m> {
    pub network: Box<dyn Network + 'm>,
    pub cache: CacheMode,
    pub timings: Vec<Timing>,
}

/// Prompts are never empty, so only a full window starts at 0. The end tells nothing: the last block has no suffix.
fn is_full(windows: &[(usize, Range<usize>)]) -> bool {
    windows.iter().all(|(_, window)| window.start == 0)
}

impl Timed<'_> {
    fn record(&mut self, tokens: &[Vec<u32>], windows: &[(usize, Range<usize>)], scored: usize, seconds: f64) {
        self.timings.push(Timing {
            kind: if is_full(windows) { PassKind::Full } else { self.cache.block_pass() },
            rows: windows.iter().map(|(_, window)| window.len()).sum(),
            // Prompts are of one length here.
            keys: tokens.first().map_or(0, Vec::len),
            scored,
            seconds,
        });
    }
}

impl Network for Timed<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Verdict>> {
        let start = Instant::now();
        let verdicts = self.network.step(tokens, pass)?;
        let seconds = start.elapsed().as_secs_f64();
        let scored = pass.groups.iter().map(|group| group.positions.len()).sum();
        self.record(tokens, pass.windows, scored, seconds);
        Ok(verdicts)
    }

    fn autonomous(&mut self) -> Option<&mut dyn Autonomous> {
        self.network.autonomous().is_some().then_some(self as &mut dyn Autonomous)
    }

    fn launches(&self) -> Result<Option<Launches>> {
        self.network.launches()
    }
}

impl Autonomous for Timed<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &Course, go_on: &dyn Fn() -> bool) -> Result<Ran> {
        let Some(network) = self.network.autonomous() else {
            return Err(Error::Unavailable("this network runs no courses".into()));
        };
        let ran = network.run(tokens, course, go_on)?;
        for (i, seconds) in ran.seconds.iter().enumerate() {
            let stage = course.stages[if course.one_stage { 0 } else { i.min(1) }];
            let scored = stage.candidates.iter().map(|(_, positions)| positions.len()).sum();
            self.record(tokens, stage.windows, scored, *seconds);
        }
        Ok(ran)
    }
}

impl Timing {
    /// Multiply-adds of the matrix products and of attention.
    pub fn multiply_adds(&self, config: &Config) -> f64 {
        let [rows, keys, scored] = [self.rows, self.keys, self.scored].map(|n| n as f64);
        let [d, q, kv, mlp, vocab, layers] = [
            config.d_model,
            config.q_width(),
            config.kv_width(),
            config.mlp_hidden_size,
            config.vocab_size,
            config.num_layers,
        ]
        .map(|n| n as f64);
        let attention = rows * (d * (q + 2.0 * kv) + 2.0 * keys * q);
        let rest = q * d + 3.0 * d * mlp;
        // The last layer goes on with the scored rows only.
        layers * attention + ((layers - 1.0) * rows + scored) * rest + scored * d * vocab
    }
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
