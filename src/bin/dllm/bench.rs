//! `dllm bench`: times the decode modes on one prompt, alternating in one run, and the reference implementation with
//! them.

mod originals;
mod summary;
#[cfg(test)]
mod tests;
mod timed;

use crate::args::{length, model_dir, threads};
use crate::machine::{ComputeDevice, Device, Roofs, device};
use crate::output::{INTERRUPT, catch_interrupts, interrupted, note, print, print_json};
use crate::report::{shape, shape_config};
use clap::ValueEnum;
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, PassKind};
use dllm_kernels::decode::decode;
use dllm_kernels::engine::{DecodeEngine, KernelCounts, Model};
use dllm_kernels::model::{Config, QueryRows, Session, Weights};
use dllm_kernels::{CacheMode, Error, Family, Options, Policy, Result};
use originals::{Answer, Originals};
use std::path::{Path, PathBuf};
use std::time::Instant;
use timed::{Timed, Timing, bf16_bytes_per_forward, weight_bytes_per_forward};

/// Time the decode modes on one prompt
#[derive(clap::Args, Debug)]
pub struct Bench {
    /// Checkpoint directory [default: models/tiny-math, in this directory or above the program]
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Shape of a public model, instead of a checkpoint
    #[arg(long, requires = "random_weights", value_parser = shape())]
    shape: Option<String>,
    /// Random weights for the shape, in memory
    #[arg(long, requires = "shape")]
    random_weights: bool,
    /// Length of a random prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = length())]
    prompt_length: usize,
    /// Token ids of the prompt, instead of random ones
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt_length")]
    prompt_ids: Vec<u32>,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 64)]
    gen_length: usize,
    /// Tokens per block [default: 32, at most gen-length]
    #[arg(long, value_name = "N")]
    block_length: Option<usize>,
    /// Modes to time [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODES")]
    modes: Vec<Mode>,
    /// Mode adaptive: forwards between refreshes of the prompt
    #[arg(long, value_name = "N", default_value_t = 50)]
    prompt_interval: usize,
    /// Mode adaptive: forwards between refreshes of the response
    #[arg(long, value_name = "N", default_value_t = 7)]
    response_interval: usize,
    /// Share of rows that V-verify selects. Mode adaptive: of the response, between refreshes. Mode dual-joined: of the rows
    /// outside the block, in refreshes after the first
    #[arg(long, alias = "refresh-rows", value_name = "R", default_value_t = 0.25, allow_negative_numbers = true)]
    refresh_ratio: f64,
    /// Mode dual-joined: refresh the prompt only in every N-th refresh, beginning with the first
    #[arg(long, value_name = "N", default_value_t = 4)]
    refresh_prompt_every: usize,
    /// Sequences decoded together; their prompts are random of one length, or all are the given one
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    batch: u64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    device: Option<Device>,
    /// Rounds; each runs every mode once
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    repeat: u64,
    /// CPU threads, also for the reference implementation [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads())]
    threads: Option<usize>,
    /// Seed of random weights and random prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Decode mode: a cache with a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Vanilla,
    PrefixFixed,
    DualFixed,
    PrefixThreshold,
    DualThreshold,
    DualJoined,
    Adaptive,
}

impl Mode {
    const ALL: [Mode; 7] = {
        use Mode::*;
        [Vanilla, PrefixFixed, DualFixed, PrefixThreshold, DualThreshold, DualJoined, Adaptive]
    };

    fn name(self) -> &'static str {
        match self {
            Mode::Vanilla => "vanilla",
            Mode::PrefixFixed => "prefix-fixed",
            Mode::DualFixed => "dual-fixed",
            Mode::PrefixThreshold => "prefix-threshold",
            Mode::DualThreshold => "dual-threshold",
            Mode::DualJoined => "dual-joined",
            Mode::Adaptive => "adaptive",
        }
    }

    fn options(self, setup: &Setup) -> Options {
        let (cache, policy) = match self {
            Mode::Vanilla => (CacheMode::None, Policy::Fixed),
            Mode::PrefixFixed => (CacheMode::Prefix, Policy::Fixed),
            Mode::DualFixed => (CacheMode::Dual, Policy::Fixed),
            Mode::PrefixThreshold => (CacheMode::Prefix, Policy::Threshold(0.9)),
            Mode::DualThreshold | Mode::DualJoined => (CacheMode::Dual, Policy::Threshold(0.9)),
            Mode::Adaptive => (CacheMode::Adaptive, Policy::Fixed),
        };
        // Dream's original loop has no blocks.
        let block_length = match (self, setup.config.family) {
            (Mode::Vanilla | Mode::Adaptive, Family::Dream) => setup.gen_length,
            _ => setup.block_length,
        };
        let block_length = Some(block_length);
        let mut options =
            Options { gen_length: setup.gen_length, block_length, cache, policy, ..setup.intervals.clone() };
        if self != Mode::DualJoined {
            options.refresh_prompt_every = 1;
        }
        if !matches!(self, Mode::DualJoined | Mode::Adaptive) {
            options.refresh_ratio = None;
        }
        options
    }
}

/// Source of the weights.
#[derive(Debug)]
pub enum Source {
    Checkpoint(PathBuf),
    /// Random weights of the public shape with this name.
    Random(String),
}

/// Settings that all modes share.
#[derive(Debug)]
pub struct Setup {
    source: Source,
    config: Config,
    prompt: Vec<u32>,
    batch: usize,
    device: Device,
    gen_length: usize,
    block_length: usize,
    /// Intervals and ratio of the adaptive and the hybrid cache; other options have their defaults.
    intervals: Options,
    threads: usize,
    modes: Vec<Mode>,
}

/// Measurements of one mode.
struct Run {
    mode: Mode,
    nfe: usize,
    launches: Option<KernelCounts>,
    /// Seconds of each round.
    seconds: Vec<f64>,
    timings: Vec<Timing>,
    /// Seconds of each round of the reference implementation.
    original: Vec<f64>,
    original_nfe: usize,
}

/// Opened model, with the bytes of weights that each forward reads at least.
struct Subject {
    model: Model,
    device: String,
    roofs: Option<Roofs>,
    parameters: usize,
    bytes_per_forward: usize,
}

/// Runs the command.
pub fn run(args: &Bench) -> Result<()> {
    // All arguments are checked before random weights are generated.
    let setup = setup(args)?;
    let prompts = prompts(&setup, args)?;
    for mode in &setup.modes {
        mode.options(&setup).validate(&setup.config, &prompts).map_err(|error| match error {
            // The prompt of this command has other flags.
            Error::Argument { name: "prompt", expected, found } => Error::argument(
                if args.prompt_ids.is_empty() { "prompt-length" } else { "prompt-ids" },
                expected,
                found,
            ),
            other => other,
        })?;
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(setup.threads).build();
    let pool = pool.map_err(|e| Error::Unavailable(format!("{} threads: {e}", setup.threads)))?;
    let device = ComputeDevice::open(setup.device)?;
    let weights = match &setup.source {
        Source::Checkpoint(dir) => Weights::open(dir)?,
        Source::Random(_) => Weights::random(&setup.config, args.seed)?,
    };
    let subject = Subject {
        model: device.load(Model::new(setup.config.clone(), weights.clone())?)?,
        device: device.name.clone(),
        roofs: device.roofs()?,
        parameters: setup.config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum(),
        bytes_per_forward: match setup.device {
            Device::Cpu => weight_bytes_per_forward(&setup.config, &weights)?,
            Device::Cuda(_) => bf16_bytes_per_forward(&setup.config),
        },
    };
    let empty = |mode: &Mode| Run {
        mode: *mode,
        nfe: 0,
        launches: None,
        seconds: vec![],
        timings: vec![],
        original: vec![],
        original_nfe: 0,
    };
    let mut runs: Vec<Run> = setup.modes.iter().map(empty).collect();
    let mut originals = Originals::find(&setup);
    let mut answer = None;
    catch_interrupts();
    for round in 1..=args.repeat {
        if interrupted() || !pool.install(|| our_round(&subject, &setup, &prompts, &mut runs))? {
            break;
        }
        let took: f64 = runs.iter().filter_map(|r| r.seconds.last()).sum();
        note(format_args!("round {round} of {}: ours {took:.1} s", args.repeat));
        // One process per round, so that both implementations alternate on the same machine.
        match originals.as_mut().map(Originals::round) {
            Ok(Ok(theirs)) => {
                let took = record(&mut runs, &theirs);
                note(format_args!("round {round} of {}: originals {took:.1} s", args.repeat));
                answer = Some(theirs);
            }
            Ok(Err(why)) => originals = Err(format!("not measured: {why}")),
            Err(_) => {}
        }
    }
    let rounds = runs.first().map_or(0, |r| r.seconds.len());
    if interrupted() {
        if rounds == 0 {
            return Err(Error::Unavailable("interrupted before the end of the first round".into()));
        }
        note(format_args!("interrupted after round {rounds} of {}", args.repeat));
    }
    let summary = summary::Summary::new(&setup, &subject, &runs, answer, originals.err());
    if args.json { print_json(&summary) } else { print(&summary.text(&subject, &runs)) }
}

fn setup(args: &Bench) -> Result<Setup> {
    let (source, config) = match &args.shape {
        Some(name) => (Source::Random(name.clone()), shape_config(name)?),
        None => {
            let dir = model_dir(args.model.as_deref())?;
            let config = open_config(&dir)?;
            (Source::Checkpoint(dir), config)
        }
    };
    // Checked before a prompt of that length is allocated; `validate` checks the rest.
    let window = config.max_sequence_length;
    if args.prompt_length > window {
        return Err(Error::argument(
            "prompt-length",
            format!("at most the model's {window} positions"),
            args.prompt_length,
        ));
    }
    let prompt = if args.prompt_ids.is_empty() {
        random_prompt(&config, args.prompt_length, args.seed)?
    } else {
        args.prompt_ids.clone()
    };
    let device = args.device.unwrap_or_default();
    let mut modes = Vec::new();
    for mode in &args.modes {
        if !modes.contains(mode) {
            modes.push(*mode);
        }
    }
    if modes.is_empty() {
        modes.extend(Mode::ALL);
    }
    Ok(Setup {
        source,
        prompt,
        batch: args.batch as usize,
        device,
        config,
        gen_length: args.gen_length,
        block_length: args.block_length.unwrap_or(args.gen_length.min(32)),
        intervals: Options {
            prompt_interval: args.prompt_interval,
            response_interval: args.response_interval,
            refresh_ratio: Some(args.refresh_ratio),
            refresh_prompt_every: args.refresh_prompt_every,
            ..Options::default()
        },
        threads: args.threads.unwrap_or_else(rayon::current_num_threads),
        modes,
    })
}

/// Returns the prompts of a batch.
fn prompts(setup: &Setup, args: &Bench) -> Result<Vec<Vec<u32>>> {
    let prompt = |i: usize| match (i, args.prompt_ids.is_empty()) {
        (1.., true) => random_prompt(&setup.config, args.prompt_length, args.seed.wrapping_add(i as u64)),
        _ => Ok(setup.prompt.clone()),
    };
    (0..setup.batch).map(prompt).collect()
}

fn open_config(dir: &Path) -> Result<Config> {
    // Opening the model gives its errors for a missing directory. The weights are only mapped.
    Ok(Model::open(dir)?.config().clone())
}

/// Returns a random prompt without mask and end-of-text tokens.
///
/// # Errors
/// [`Error::Argument`] when the vocabulary has no other tokens.
fn random_prompt(config: &Config, len: usize, seed: u64) -> Result<Vec<u32>> {
    let special = |id: &u32| *id == config.mask_token_id || config.eos_token_ids.contains(id);
    let ids: Vec<u32> = (0..config.vocab_size as u32).filter(|id| !special(id)).collect();
    if ids.is_empty() {
        return Err(Error::argument("prompt-ids", "tokens for a prompt", "a vocabulary of special tokens only"));
    }
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids[(state >> 33) as usize % ids.len()]
    };
    Ok((0..len).map(|_| next()).collect())
}

/// Runs every mode once, after a forward that is not timed. Returns false, and records nothing, when interrupted.
fn our_round(subject: &Subject, setup: &Setup, prompts: &[Vec<u32>], runs: &mut [Run]) -> Result<bool> {
    warm_up(subject, setup, prompts)?;
    let mut results = Vec::new();
    for run in &*runs {
        let options = run.mode.options(setup);
        let engine = subject.model.engine(options.sizes(&setup.config, prompts))?;
        let mut engine = Timed { engine, options: &options, timings: vec![] };
        if setup.device != Device::Cpu {
            // A pass is captured in a graph the second time it runs, and some passes run once per decode.
            for _ in 0..2 {
                decode(&mut engine, &setup.config, prompts, &options, Some(&INTERRUPT), &mut ())?;
            }
            engine.timings.clear();
        }
        let start = Instant::now();
        let decoded = decode(&mut engine, &setup.config, prompts, &options, Some(&INTERRUPT), &mut ())?;
        if decoded.interrupted {
            return Ok(false);
        }
        let seconds = start.elapsed().as_secs_f64();
        let launches = engine.kernel_counts()?;
        results.push((seconds, decoded.nfe, launches, engine.timings));
    }
    for (run, (seconds, nfe, launches, timings)) in runs.iter_mut().zip(results) {
        run.launches = launches;
        run.seconds.push(seconds);
        run.nfe = nfe;
        run.timings.extend(timings);
    }
    Ok(true)
}

/// Runs one forward over the whole sequence, so that mapped weights are in memory and threads have started.
fn warm_up(subject: &Subject, setup: &Setup, prompts: &[Vec<u32>]) -> Result<()> {
    if setup.device != Device::Cpu {
        return Ok(());
    }
    let sizes = Mode::Vanilla.options(setup).sizes(&setup.config, prompts);
    let mut session = Session::new(subject.model.transformer(), Cpu::default(), sizes)?;
    let mask = setup.config.mask_token_id;
    let tokens: Vec<_> = prompts.iter().map(|p| [p.clone(), vec![mask; setup.gen_length]].concat()).collect();
    let windows: Vec<_> = tokens.iter().enumerate().map(|(i, t)| QueryRows::new(i, 0..t.len(), t.len())).collect();
    session.forward(&tokens, &windows, &BlockPlan::new(CacheMode::None, PassKind::Full), &[0], None)
}

/// Records the times of the reference implementation; returns their sum.
fn record(runs: &mut [Run], answer: &Answer) -> f64 {
    let mut took = 0.0;
    for row in &answer.modes {
        for run in runs.iter_mut().filter(|r| r.mode.name() == row.name) {
            run.original.extend(&row.seconds);
            run.original_nfe = row.nfe;
            took += row.seconds.iter().sum::<f64>();
        }
    }
    took
}

/// Returns the median of the values; 0 if there are none.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}
