//! The op unmask: turns logits into committed tokens, on CUDA device 0.
//!
//! `cargo run --release --example unmask` needs a GPU. In the repository, `cargo run --release -p softgpu --example unmask`
//! runs it on the CUDA emulator.

use dllm_kernels::Confidence;
use dllm_kernels::gpu::Device;
use dllm_kernels::ops::unmask::{self, Outcome, Policy, Row, RowTable, Unmask, UnmaskConfig};
use half::bf16;

const MASK: i32 = 0;
const VOCAB_SIZE: usize = 8;

pub fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::open(0)?;
    let stream = device.stream()?;
    println!("{}", device.name()?);

    // One sequence: two committed tokens and three masked ones. Row i of the logits predicts token i.
    let mut tokens = stream.upload(&[7, 7, MASK, MASK, MASK])?;
    let rows: Vec<Row> = (0..5).map(|i| Row { token: i, logits_row: i, position: i }).collect();
    let rows = RowTable::new(&stream, &[rows])?;
    let mut logits = vec![bf16::ZERO; 5 * VOCAB_SIZE];
    for (position, logit) in [(2, 9.0), (3, 1.0), (4, 8.0)] {
        logits[position * VOCAB_SIZE + position] = bf16::from_f32(logit);
    }
    let logits = stream.upload(&logits)?;

    let mut outcome = Outcome::new(&stream, &rows)?;
    let mut workspace = unmask::workspace(&stream, &rows, VOCAB_SIZE)?;
    let rule = UnmaskConfig {
        confidence: Confidence::Probability,
        policy: Policy::Threshold { threshold: 0.9, top_n: None },
        temperature: 0.0,
        tempered_confidence: false,
        cfg_scale: 0.0,
        alg_temp: 0.0,
        seed: 0,
        mask_token: MASK as u32,
    };
    let args = Unmask {
        logits: &logits,
        uncond_logits: None,
        vocab_size: VOCAB_SIZE,
        logits_stride: VOCAB_SIZE,
        rows: &rows,
        tokens: &mut tokens,
        commit_before: None,
        steps: None,
        min_logit: None,
        outcome: &mut outcome,
        workspace: &mut workspace,
    };
    unmask::launch(&stream, args, &rule)?;

    println!("tokens      {:?}", tokens.read()?);
    println!("confidence  {:?}", outcome.confidence.read()?);
    println!("committed   {:?}, masks left {:?}", outcome.committed.read()?, outcome.masks_left.read()?);
    Ok(())
}
