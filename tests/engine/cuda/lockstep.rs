//! CPU and device in lockstep: test_model get the same tokens before every pass, and the CPU's commits are applied after it.

use super::bf16_reference::{Bf16Reference, Selections};
use super::margin::{Logits, Tally, compare};
use crate::common::recorded::{checkpoints, golden_dir};
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::decode::{Decoded, Observer, decode};
use dllm_kernels::engine::{DecodeEngine, Pass};
use dllm_kernels::model::{Session, Transformer, Weights};
use dllm_kernels::sampling::{Prediction, sample};
use dllm_kernels::{Config, Family, Model, Options, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// A checkpoint opened for the CPU, the device and the bf16 reference.
pub struct TestModel {
    pub model: Model,
    pub rounded: Transformer<Bf16Reference>,
    pub exact: Transformer<Bf16Reference>,
}

impl TestModel {
    pub fn open(dir: &Path) -> TestModel {
        let weights = Weights::open(dir).unwrap();
        let model = Model::open(dir).unwrap().to_device(&super::small_device(), |_, _| ()).unwrap();
        let load = || Transformer::load(&Bf16Reference::default(), model.config(), &weights).unwrap();
        let (rounded, exact) = (load(), load());
        TestModel { model, rounded, exact }
    }

    /// The checkpoints of the recordings.
    pub fn recorded() -> BTreeMap<String, TestModel> {
        let open = |name: String| (name.clone(), TestModel::open(&golden_dir().join(name)));
        checkpoints().into_iter().map(open).collect()
    }

    pub fn made_up(family: Family) -> TestModel {
        TestModel::open(crate::common::checkpoint::Checkpoint::new(family).write().path())
    }
}

/// The engines and sessions of one decode, and what was compared.
struct Lockstep<'m> {
    what: String,
    config: &'m Config,
    cpu: CpuSession<'m>,
    rounded: Session<'m, Bf16Reference>,
    selections: [Rc<RefCell<Selections>>; 2],
    gpu: Box<dyn DecodeEngine + 'm>,
    tally: Tally,
}

/// Session of the CPU backend. Where V-verify selects rows: the bf16 reference without rounding, which uses the device's selection.
enum CpuSession<'m> {
    Cpu(Session<'m, Cpu>),
    DeviceSelection(Session<'m, Bf16Reference>),
}

/// Decodes in lockstep, and compares every pass.
pub fn decode_in_lockstep(
    test_model: &TestModel,
    options: &Options,
    prompts: &[Vec<u32>],
    what: &str,
    observer: &mut dyn Observer,
) -> (Decoded, Tally) {
    let config = test_model.model.config();
    options.validate(config, prompts).unwrap_or_else(|e| panic!("{what}: {e}"));
    let sizes = options.sizes(config, prompts);
    let selections: [Rc<RefCell<Selections>>; 2] = Default::default();
    let reference = |exact: bool| Bf16Reference::with_device_selection(exact, selections[usize::from(exact)].clone());
    let mut lockstep = Lockstep {
        what: what.into(),
        config,
        cpu: if sizes.feature_cache {
            CpuSession::DeviceSelection(Session::new(&test_model.exact, reference(true), sizes.clone()).unwrap())
        } else {
            CpuSession::Cpu(Session::new(test_model.model.transformer(), Cpu::default(), sizes.clone()).unwrap())
        },
        rounded: Session::new(&test_model.rounded, reference(false), sizes.clone()).unwrap(),
        selections: selections.clone(),
        gpu: test_model.model.engine(sizes).unwrap(),
        tally: Tally::default(),
    };
    let decoded = decode(&mut lockstep, config, prompts, options, None, observer);
    lockstep.tally.selections(&selections[0].borrow());
    (decoded.unwrap_or_else(|e| panic!("{what}: {e}")), lockstep.tally)
}

impl DecodeEngine for Lockstep<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let Lockstep { what, config, cpu, rounded, selections, gpu, tally } = self;
        let logit_rows = logit_rows(config.family, pass);
        let got = gpu.step(tokens, &Pass { observed: true, ..*pass })?;
        for selections in &*selections {
            selections.borrow_mut().from_device =
                gpu.selected_rows().iter().map(|selected| selected.rows.clone()).collect();
        }
        let cpu = match cpu {
            CpuSession::Cpu(cpu) => {
                cpu.forward(tokens, pass.query_rows, pass.plan, &logit_rows, None)?;
                cpu.logits(logit_rows.len())?
            }
            CpuSession::DeviceSelection(cpu) => {
                cpu.forward(tokens, pass.query_rows, pass.plan, &logit_rows, None)?;
                cpu.logits(logit_rows.len())?
            }
        };
        rounded.forward(tokens, pass.query_rows, pass.plan, &logit_rows, None)?;
        let rounded = rounded.logits(logit_rows.len())?;
        assert!(
            selections.iter().all(|selections| selections.borrow().from_device.is_empty()),
            "{what}: the device selected rows in layers in which the CPU does not"
        );
        let want = sample(&mut cpu.clone(), config.vocab_size, pass.candidates, pass.sampling)?;
        let logits = Logits { cpu, rounded, vocab_size: config.vocab_size };
        tally.add(compare(what, &logits, pass.candidates, pass.sampling, [&want, &got]));
        Ok(want)
    }
}

/// Logit rows of the candidates of a pass; with guidance followed by those of the unconditional sequences.
fn logit_rows(family: Family, pass: &Pass) -> Vec<usize> {
    let rows: usize = pass.query_rows.iter().map(|w| w.rows.len()).sum();
    let branches = if pass.sampling.cfg_scale > 0.0 { 2 } else { 1 };
    let mut logit_rows = Vec::new();
    for branch in 0..branches {
        for group in pass.candidates {
            let before = pass.query_rows.iter().take_while(|w| w.sequence != group.sequence);
            let first = branch * rows + before.map(|w| w.rows.len()).sum::<usize>();
            let window = &pass.query_rows.iter().find(|w| w.sequence == group.sequence).unwrap().rows;
            logit_rows.extend(group.positions.iter().map(|position| match family {
                Family::Llada => first + position - window.start,
                Family::Dream => first + (position - window.start).saturating_sub(1),
            }));
        }
    }
    logit_rows
}
