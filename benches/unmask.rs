//! unmask in one launch, with the selection: the 32 rows of a block with a cold and a warm L2 cache; 256 and 1,024 rows, 32 per
//! sequence; the general form (sampled tokens, entropies); f32 logits.

mod gpu;

use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::Workspace;
use dllm_kernels::ops::unmask::{self as op, Outcome, Policy, Row, RowTable, UnmaskConfig};
use dllm_kernels::reference::unmask::score_row;
use dllm_kernels::sampling::SamplingParams;
use dllm_kernels::{Confidence, Result};
use gpu::{Bench, Case, Float, L2, Random, assert_close, bytes_of, few};
use half::bf16;

const MASK: i32 = 3;
const THRESHOLD: f32 = 0.9;

struct Block<T> {
    stream: Stream,
    rule: SamplingParams,
    rows_of_sequence: usize,
    vocab_size: usize,
    table: RowTable,
    masks: Vec<i32>,
    logits: Buffer<T>,
    tokens: Buffer<i32>,
    outcome: Outcome,
    workspace: Workspace,
}

/// LLaDA's argmax and probability; in the general form Dream's sampled tokens and entropies.
fn rule(general: bool) -> SamplingParams {
    SamplingParams {
        confidence: if general { Confidence::Entropy } else { Confidence::Probability },
        temperature: if general { 0.5 } else { 0.0 },
        tempered_confidence: general,
        f32_confidence: true,
        top_p: None,
        top_k: None,
        cfg_scale: 0.0,
        alg_temp: 0.0,
        seed: 7,
        mask_token: Some(MASK as u32),
    }
}

impl<T: Float> Block<T> {
    fn new(stream: &Stream, rows: usize, vocab_size: usize, general: bool) -> Result<Block<T>> {
        let rows_of_sequence = rows.min(32);
        let row = |token: usize| Row { token, logits_row: token, position: token % rows_of_sequence };
        let all: Vec<Row> = (0..rows).map(row).collect();
        let sequences: Vec<Vec<Row>> = all.chunks(rows_of_sequence).map(<[Row]>::to_vec).collect();
        let table = RowTable::new(stream, &sequences)?;
        let masks = vec![MASK; rows];
        Ok(Block {
            stream: stream.clone(),
            rule: rule(general),
            rows_of_sequence,
            vocab_size,
            logits: stream.upload(&Random(8).floats::<T>(rows * vocab_size, 2.0))?,
            tokens: stream.upload(&masks)?,
            outcome: Outcome::new(stream, &table)?,
            workspace: op::workspace(stream, &table, vocab_size)?,
            masks,
            table,
        })
    }
}

impl<T: Float> Case for Block<T> {
    fn bytes(&self) -> usize {
        bytes_of::<T>(self.masks.len(), self.vocab_size)
    }

    /// Restores the masks: rows of committed tokens would not be read again.
    fn reset(&mut self) -> Result<()> {
        self.tokens.write(&self.masks)
    }

    fn launch(&mut self) -> Result<()> {
        let rule = UnmaskConfig {
            confidence: self.rule.confidence,
            policy: Policy::Threshold { threshold: THRESHOLD, top_n: None },
            temperature: self.rule.temperature as f32,
            tempered_confidence: self.rule.tempered_confidence,
            cfg_scale: 0.0,
            alg_temp: 0.0,
            seed: self.rule.seed,
            mask_token: MASK as u32,
        };
        let args = op::Unmask {
            logits: &self.logits,
            uncond_logits: None,
            vocab_size: self.vocab_size,
            logits_stride: self.vocab_size,
            rows: &self.table,
            tokens: &mut self.tokens,
            commit_before: None,
            steps: None,
            min_logit: None,
            outcome: &mut self.outcome,
            workspace: &mut self.workspace,
        };
        op::launch(&self.stream, args, &rule)
    }

    /// Compares a few rows with the reference, and all tokens with a selection by the kernel's confidences.
    fn check(&self) -> Result<()> {
        let (predicted, confidence) = (self.outcome.predicted.read()?, self.outcome.confidence.read()?);
        let (logits, tokens) = (self.logits.read()?, self.tokens.read()?);
        for row in few(self.masks.len()) {
            let at = row * self.vocab_size..(row + 1) * self.vocab_size;
            let of_row: Vec<f32> = logits[at].iter().map(|l| l.f32()).collect();
            let scored = score_row(&of_row, &self.rule, 0, row % self.rows_of_sequence);
            let (token, want) = scored.expect("finite logits");
            assert_eq!(predicted[row], token as i32, "row {row}");
            assert_close(&format!("confidence {row}"), &[confidence[row].into()], &[want], 1e-5, 2e-5);
        }
        for first in (0..self.masks.len()).step_by(self.rows_of_sequence) {
            let sequence = first..first + self.rows_of_sequence;
            let best = confidence[sequence.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let best = sequence.clone().find(|row| confidence[*row] == best);
            for row in sequence {
                let committed = confidence[row] >= THRESHOLD || Some(row) == best;
                assert_eq!(tokens[row], if committed { predicted[row] } else { MASK }, "row {row}");
            }
        }
        Ok(())
    }
}

fn main() {
    let Some(mut bench) = Bench::open("unmask") else { return };
    for (rows, vocab_size, l2) in [
        (32, 126_464, &[L2::Cold, L2::Warm][..]),
        (256, 126_464, &[L2::Cold]),
        (1024, 126_464, &[L2::Cold]),
        (32, 152_064, &[L2::Cold]),
        (256, 152_064, &[L2::Cold]),
        (1024, 152_064, &[L2::Cold]),
    ] {
        let (real_rows, real) = (bench.size(rows, 4), bench.size(vocab_size, 1000));
        let name = format!("{rows}x{vocab_size}");
        bench.case::<bf16, _>(&name, l2, |stream| Block::<bf16>::new(stream, real_rows, real, false));
    }
    let (rows, vocab_size) = (bench.size(32, 4), bench.size(126_464, 1000));
    let cold = &[L2::Cold];
    bench.case::<bf16, _>("general 32x126464", cold, |stream| Block::<bf16>::new(stream, rows, vocab_size, true));
    bench.case::<f32, _>("32x126464", cold, |stream| Block::<f32>::new(stream, rows, vocab_size, false));
}
