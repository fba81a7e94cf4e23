//! One op on its own: logits in, committed tokens out. On a GPU, or with `--software` on the software device of the tests.

use dllm_kernels::Confidence;
use dllm_kernels::gpu::Device;
use dllm_kernels::ops::unmask::{self, Outcome, Policy, Row, RowTable, Unmask, UnmaskConfig};
use half::bf16;

const MASK: i32 = 0;
const VOCAB_SIZE: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().any(|argument| argument == "--software") {
        softgpu::install(); // yours needs no such thing
    }
    let device = Device::open(0)?;
    let stream = device.stream()?;
    println!("{}", device.name()?);

    // One sequence: two tokens that stand, three that are masked. Row i of the logits predicts token i.
    let mut tokens = stream.upload(&[7, 7, MASK, MASK, MASK])?;
    let rows: Vec<Row> = (0..5).map(|i| Row { token: i, logits_row: i, position: i }).collect();
    let rows = RowTable::new(&stream, &[rows])?;
    let mut logits = vec![bf16::ZERO; 5 * VOCAB_SIZE];
    for (position, sure) in [(2, 9.0), (3, 1.0), (4, 8.0)] {
        logits[position * VOCAB_SIZE + position] = bf16::from_f32(sure);
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
