//! CPU and device in lockstep: the same tokens before every pass, the CPU's decisions after it.

use crate::common::golden_dir;
use crate::margin::{Logits, Tally, compare};
use crate::rounded::{DeviceSelection, Rounded};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::decode::{Decoded, Observer, decode};
use dllm_kernels::engine::{DecodeEngine, Pass};
use dllm_kernels::model::{Session, Transformer, Weights};
use dllm_kernels::sampling::{Prediction, sample};
use dllm_kernels::{Config, Family, Model, Options, Result};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

/// A checkpoint, opened for the CPU, the device, and the CPU that rounds.
pub struct Both {
    pub model: Model,
    pub rounded: Transformer<Rounded>,
    pub exact: Transformer<Rounded>,
}

impl Both {
    pub fn open(dir: &Path) -> Both {
        let weights = Weights::open(dir).unwrap();
        let model = Model::open(dir).unwrap().to_device(&crate::small_device(), |_, _| ()).unwrap();
        let load = || Transformer::load(&Rounded::default(), model.config(), &weights).unwrap();
        let (rounded, exact) = (load(), load());
        Both { model, rounded, exact }
    }

    pub fn recorded(name: &str) -> Both {
        Both::open(&golden_dir().join(name))
    }

    pub fn made_up(family: Family) -> Both {
        Both::open(crate::checkpoint::Checkpoint::new(family).write().path())
    }
}

/// The networks of a decode.
struct Lockstep<'m> {
    what: String,
    config: &'m Config,
    cpu: Reference<'m>,
    rounded: Session<'m, Rounded>,
    choices: [Rc<RefCell<DeviceSelection>>; 2],
    gpu: Box<dyn DecodeEngine + 'm>,
    tally: Tally,
}

/// What stands for the CPU: its backend, or where V-verify chooses rows one that can be told which.
enum Reference<'m> {
    Cpu(Session<'m, Cpu>),
    Told(Session<'m, Rounded>),
}

/// Decodes in lockstep, and compares every pass.
pub fn decode_both(
    both: &Both,
    options: &Options,
    prompts: &[Vec<u32>],
    what: &str,
    observer: &mut dyn Observer,
) -> (Decoded, Tally) {
    let config = both.model.config();
    options.validate(config, prompts).unwrap_or_else(|e| panic!("{what}: {e}"));
    let sizes = options.sizes(config, prompts);
    let choices: [Rc<RefCell<DeviceSelection>>; 2] = Default::default();
    let told = |exact: bool| Rounded::following(exact, choices[usize::from(exact)].clone());
    let mut lockstep = Lockstep {
        what: what.into(),
        config,
        cpu: match sizes.feature_cache {
            false => Reference::Cpu(Session::new(both.model.transformer(), Cpu::default(), sizes.clone()).unwrap()),
            true => Reference::Told(Session::new(&both.exact, told(true), sizes.clone()).unwrap()),
        },
        rounded: Session::new(&both.rounded, told(false), sizes.clone()).unwrap(),
        choices: choices.clone(),
        gpu: both.model.engine(sizes).unwrap(),
        tally: Tally::default(),
    };
    let decoded = decode(&mut lockstep, config, prompts, options, None, observer);
    lockstep.tally.choices(&choices[0].borrow());
    (decoded.unwrap_or_else(|e| panic!("{what}: {e}")), lockstep.tally)
}

impl DecodeEngine for Lockstep<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let Lockstep { what, config, cpu, rounded, choices, gpu, tally } = self;
        let scored = scored(config.family, pass);
        let got = gpu.step(tokens, &Pass { observed: true, ..*pass })?;
        for choices in &*choices {
            choices.borrow_mut().of_device = gpu.selected_rows().iter().map(|selected| selected.rows.clone()).collect();
        }
        let cpu = match cpu {
            Reference::Cpu(cpu) => {
                cpu.forward(tokens, pass.query_rows, pass.plan, &scored, None)?;
                cpu.logits(scored.len())?
            }
            Reference::Told(cpu) => {
                cpu.forward(tokens, pass.query_rows, pass.plan, &scored, None)?;
                cpu.logits(scored.len())?
            }
        };
        rounded.forward(tokens, pass.query_rows, pass.plan, &scored, None)?;
        let rounded = rounded.logits(scored.len())?;
        assert!(
            choices.iter().all(|choices| choices.borrow().of_device.is_empty()),
            "{what}: choices that nobody made"
        );
        let want = sample(&mut cpu.clone(), config.vocab_size, pass.candidates, pass.sampling)?;
        let logits = Logits { cpu, rounded, vocab_size: config.vocab_size };
        tally.add(compare(what, &logits, pass.candidates, pass.sampling, [&want, &got]));
        Ok(want)
    }
}

/// The rows of a pass whose logits decide about its candidates; with guidance those of the twins behind them.
fn scored(family: Family, pass: &Pass) -> Vec<usize> {
    let rows: usize = pass.query_rows.iter().map(|w| w.rows.len()).sum();
    let twins = if pass.sampling.cfg_scale > 0.0 { 2 } else { 1 };
    let mut scored = Vec::new();
    for twin in 0..twins {
        for group in pass.candidates {
            let before = pass.query_rows.iter().take_while(|w| w.sequence != group.sequence);
            let first = twin * rows + before.map(|w| w.rows.len()).sum::<usize>();
            let window = &pass.query_rows.iter().find(|w| w.sequence == group.sequence).unwrap().rows;
            scored.extend(group.positions.iter().map(|position| match family {
                Family::Llada => first + position - window.start,
                Family::Dream => first + (position - window.start).saturating_sub(1),
            }));
        }
    }
    scored
}
