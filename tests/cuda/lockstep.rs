//! CPU and device in lockstep: the same tokens before every pass, the CPU's decisions after it.

use crate::margin::{self, Tally};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::decode::{Decoded, Observer, decode};
use dllm_kernels::model::{Network, Pass, Session};
use dllm_kernels::oracle::unmask::{Verdict, unmask};
use dllm_kernels::{Config, Family, Model, Options, Result};

/// Both networks of a decode.
struct Lockstep<'m> {
    what: String,
    config: &'m Config,
    cpu: Session<'m, Cpu>,
    gpu: Box<dyn Network + 'm>,
    tally: Tally,
}

/// Decodes with both, and compares every pass. The model's weights are on a device.
pub fn decode_both(
    model: &Model,
    options: &Options,
    prompts: &[Vec<u32>],
    what: &str,
    observer: &mut dyn Observer,
) -> (Decoded, Tally) {
    options.validate(model.config(), prompts).unwrap_or_else(|e| panic!("{what}: {e}"));
    let sizes = options.sizes(model.config(), prompts);
    let mut both = Lockstep {
        what: what.into(),
        config: model.config(),
        cpu: Session::new(model.transformer(), Cpu::default(), sizes.clone()).unwrap(),
        gpu: model.network(sizes).unwrap(),
        tally: Tally::default(),
    };
    let decoded = decode(&mut both, model.config(), prompts, options, None, observer);
    (decoded.unwrap_or_else(|e| panic!("{what}: {e}")), both.tally)
}

impl Network for Lockstep<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Verdict>> {
        let scored = scored(self.config.family, pass);
        self.cpu.forward(tokens, pass.windows, pass.plan, &scored, None)?;
        let vocab_size = self.config.vocab_size;
        let logits = self.cpu.logits(scored.len())?;
        let cpu = unmask(&mut logits.clone(), vocab_size, pass.groups, pass.unmask)?;
        let gpu = self.gpu.step(tokens, pass)?;
        let compared = margin::compare(&self.what, &logits, vocab_size, pass.groups, pass.unmask, [&cpu, &gpu]);
        self.tally.add(compared);
        Ok(cpu)
    }
}

/// The rows of a pass whose logits decide about its candidates; with guidance those of the twins behind them.
fn scored(family: Family, pass: &Pass) -> Vec<usize> {
    let rows: usize = pass.windows.iter().map(|(_, window)| window.len()).sum();
    let twins = if pass.unmask.cfg_scale > 0.0 { 2 } else { 1 };
    let mut scored = Vec::new();
    for twin in 0..twins {
        for group in pass.groups {
            let before = pass.windows.iter().take_while(|(s, _)| *s != group.sequence);
            let first = twin * rows + before.map(|(_, window)| window.len()).sum::<usize>();
            let (_, window) = pass.windows.iter().find(|(s, _)| *s == group.sequence).unwrap();
            scored.extend(group.positions.iter().map(|position| match family {
                Family::Llada => first + position - window.start,
                Family::Dream => first + (position - window.start).saturating_sub(1),
            }));
        }
    }
    scored
}
