//! A session with a stopwatch around every forward, and what a forward has to do at least.

use dllm_kernels::Result;
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{CacheMode, PassKind};
use dllm_kernels::model::{Config, Network, Pass, Session, Weights};
use dllm_kernels::oracle::unmask::Verdict;
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

/// A session that remembers its forwards.
pub struct Timed<'m> {
    pub session: Session<'m, Cpu>,
    pub cache: CacheMode,
    pub timings: Vec<Timing>,
}

impl Network for Timed<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Verdict>> {
        let start = Instant::now();
        let verdicts = self.session.step(tokens, pass)?;
        let seconds = start.elapsed().as_secs_f64();
        // Prompts are never empty, so only a full window starts at 0. The end tells nothing: the last block has no suffix.
        let full = pass.windows.iter().all(|(_, window)| window.start == 0);
        self.timings.push(Timing {
            kind: if full { PassKind::Full } else { self.cache.block_pass() },
            rows: pass.windows.iter().map(|(_, window)| window.len()).sum(),
            keys: tokens.iter().map(Vec::len).sum(),
            scored: pass.groups.iter().map(|group| group.positions.len()).sum(),
            seconds,
        });
        Ok(verdicts)
    }
}

impl Timing {
    /// Multiply-adds of the matrix products and of attention, for one sequence.
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
