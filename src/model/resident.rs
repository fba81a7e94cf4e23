//! A session on a CUDA device that runs whole courses: tokens, masks and schedules stay there, passes are graphs of
//! launches, and the host follows through a word in pinned memory.
//!
//! A pass is two graphs: the first layer; then the other layers, head, unmask and advance. While a pass is under way the host
//! puts the first layer of the next one into the stream, then waits for the word of the pass, and puts in the rest or stops.
//! So the device does not idle while the host finds out, and what runs in vain at the end of a block is one layer, which
//! commits nothing, and caches at most (with the adaptive cache) its keys and values of the tokens as they stand.

use super::config::Config;
use super::course::{DecodeRun, DeviceLoop, RunOutcome, StepTemplate};
use super::forward::{CfgBranch, DecodeEngine, KernelCounts, LayerPlan, Pass, SelectedRows, Session, Transformer};
use super::sizes::SessionConfig;
use crate::abi::*;
use crate::backend::cuda::{Cuda, Staging};
use crate::backend::{Backend, LaunchBucket};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Graph, Pinned, Stream, SyncOnDrop, nvtx};
use crate::ops;
use crate::sampling::{CommitRule, Confidence, Prediction, QuotaSchedule, SamplingParams, SequenceState};
use std::collections::HashMap;
use std::time::Instant;

/// Where windows shrink from block to block, launches are sized for multiples of this part of the generated positions: at most
/// so many graphs, and so large a part of those rows in vain.
const WINDOW_BUCKETS: usize = 8;
/// Recorded parts of passes; when there are more, all are forgotten. Only who looks at every step sees so many.
const MAX_GRAPHS: usize = 64;
/// unmask's rows are blocks in a grid's second dimension.
const MOST_CANDIDATES: usize = 65_535;
/// attention's sequences, times at most 64 splits, are in its third.
const MOST_SPANS: usize = 65_535 / 64;
/// Rows whose logits are asked for are rounded up to a multiple of this.
const LOGIT_ROW_ALIGN: usize = 32;

/// A session on a CUDA device.
pub struct CudaEngine<'m> {
    graphs: HashMap<GraphKey, CapturedPass>,
    session: Session<'m, Cuda>,
    control: DeviceState,
    /// One for each slot of the session.
    stages: Vec<PassTables>,
    /// The last, so that it sees to what the others have freed.
    _settle: SyncOnDrop,
}

/// What graphs differ in.
#[derive(Clone, PartialEq, Eq, Hash)]
struct GraphKey {
    slot: usize,
    part: GraphPart,
    room: LaunchBucket,
    plan: Vec<LayerPlan>,
    decision: SamplingKey,
}

/// A half of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum GraphPart {
    /// Embedding and first layer.
    FirstLayer,
    /// All that follows.
    Remainder,
}

/// How tokens are chosen and committed: what a recorded unmask does not read from the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct SamplingKey {
    policy: dllm_policy,
    /// The bits of the policy's number.
    number: u32,
    /// Those of [`SamplingParams`].
    unmask: [u64; 9],
}

impl SamplingKey {
    fn of(selection: CommitRule, unmask: &SamplingParams) -> SamplingKey {
        let (policy, number) = match selection {
            CommitRule::Quota(_) => (DLLM_POLICY_FIXED, 0.0),
            CommitRule::Threshold(threshold) | CommitRule::ThresholdTopN { threshold, .. } => {
                (DLLM_POLICY_THRESHOLD, threshold as f32)
            }
            CommitRule::Factor(factor) => (DLLM_POLICY_FACTOR, factor as f32),
        };
        let SamplingParams { confidence, temperature, tempered_confidence, f32_confidence, top_p, top_k, .. } = *unmask;
        let SamplingParams { cfg_scale, alg_temp, seed, mask_token, .. } = *unmask;
        let unmask = [
            confidence as u64,
            temperature.to_bits(),
            u64::from(tempered_confidence) | u64::from(f32_confidence) << 1,
            top_p.map_or(u64::MAX, f64::to_bits),
            top_k.map_or(u64::MAX, |k| k as u64),
            cfg_scale.to_bits().into(),
            alg_temp.to_bits(),
            seed,
            mask_token.map_or(u64::MAX, u64::from),
        ];
        SamplingKey { policy, number: number.to_bits(), unmask }
    }
}

/// A part of a pass. Its first run is not recorded: libraries load their kernels then, which has no place in a recording.
enum CapturedPass {
    Run,
    Graph(Graph),
}

/// What the passes of a slot run.
struct PassTables {
    plan: Vec<LayerPlan>,
    room: LaunchBucket,
    /// `[candidates]` dllm_unmask_row and `[sequences + 1]` bounds.
    table: Buffer<i32>,
    staging: Staging<i32>,
}

/// What unmask and advance read and write.
struct DeviceState {
    sequences: usize,
    /// Candidates at most.
    candidates: usize,
    max_ratios: usize,
    num_end_tokens: usize,
    layout: StateLayout,
    /// One copy renews it when a course begins; advance keeps it up to date.
    state: Buffer<i32>,
    staging: Staging<i32>,
    /// Masks left, committed, failed: `[sequences]` each.
    outcome: [Buffer<i32>; 3],
    predicted: Buffer<i32>,
    confidence: Buffer<f32>,
    min_logit: Buffer<f32>,
    workspace: Buffer<u8>,
    progress: Pinned<i32>,
    /// Launches of advance so far.
    passes: i32,
}

/// Where the parts of the state begin, in elements.
#[derive(Clone, Copy)]
struct StateLayout {
    quota: usize,
    commit_before: usize,
    steps: usize,
    control: usize,
    sequences: usize,
    end_tokens: usize,
    ratios: usize,
    len: usize,
}

impl StateLayout {
    fn new(sequences: usize, end_tokens: usize, ratios: usize) -> StateLayout {
        let mut len = 0;
        let mut part = |elements: usize| {
            let at = len;
            len += elements.next_multiple_of(4); // 16 bytes
            at
        };
        let mut layout = StateLayout {
            quota: part(sequences),
            commit_before: part(sequences),
            steps: part(sequences),
            control: part(size_of::<dllm_advance_control>() / 4),
            sequences: part(sequences * (size_of::<dllm_advance_sequence>() / 4)),
            end_tokens: part(end_tokens),
            ratios: part(ratios),
            len: 0,
        };
        layout.len = len;
        layout
    }
}

fn int(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument("sequences", format!("sizes up to {}", i32::MAX), value))
}

/// A count of which more than 32 bits hold is as good as the most that they do.
fn most(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

impl DeviceState {
    fn new(stream: &Stream, sizes: &SessionConfig, config: &Config) -> Result<DeviceState> {
        let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
        let layout = StateLayout::new(sequences, sizes.end_tokens, sizes.ratios);
        let mut workspace = stream.alloc(unmask_workspace(sequences, candidates, config.vocab_size)?)?;
        workspace.fill_zero()?;
        Ok(DeviceState {
            sequences,
            candidates,
            max_ratios: sizes.ratios,
            num_end_tokens: sizes.end_tokens,
            layout,
            state: stream.alloc(layout.len)?,
            staging: Staging::new(stream, layout.len)?,
            outcome: [stream.alloc(sequences)?, stream.alloc(sequences)?, stream.alloc(sequences)?],
            predicted: stream.alloc(candidates)?,
            confidence: stream.alloc(candidates)?,
            min_logit: stream.alloc(candidates)?,
            workspace,
            progress: Pinned::new(stream.device(), size_of::<dllm_progress>() / 4)?,
            passes: 0,
        })
    }

    fn at(&self, element: usize) -> u64 {
        self.state.address() + 4 * element as u64
    }

    /// Puts a copy of the state at the beginning of a course into the stream.
    fn begin(&mut self, course: &DecodeRun, first_tokens: &[usize], lengths: &[usize]) -> Result<()> {
        let mut state = vec![0i32; self.layout.len];
        let StateLayout { quota, commit_before, steps, control, sequences, end_tokens, ratios, .. } = self.layout;
        for (s, sequence) in course.sequences.iter().enumerate() {
            let active = sequence.active;
            state[quota + s] = if active { most(sequence.first_quota) } else { 0 };
            state[commit_before + s] = if active { most(sequence.first_commit_before) } else { i32::MIN };
            state[steps + s] = int(sequence.forwards)?;
            let sequence = dllm_advance_sequence {
                first_token: int(first_tokens[s])?,
                length: int(lengths[s])?,
                generated: int(sequence.generated)?,
                active_start: int(sequence.active_range.start)?,
                active_end: int(sequence.active_range.end)?,
                quota_start: int(sequence.quota_range.start)?,
                quota_end: int(sequence.quota_range.end)?,
                commit_before: i32::MAX,
                initial_masks: int(sequence.initial_masks)?,
                per_step: int(sequence.per_step)?,
                deficit: int(sequence.deficit)?,
                max_passes: most(sequence.max_passes),
                forwards: int(sequence.forwards)?,
                active: active.into(),
                ended: 0,
                reserved: 0,
            };
            let len = size_of::<dllm_advance_sequence>() / 4;
            state[sequences + s * len..][..len].copy_from_slice(bytemuck::cast_slice(&[sequence]));
        }
        let (schedule, of_steps, shares): (_, _, &[f32]) = match course.schedule {
            QuotaSchedule::Unlimited => (DLLM_SCHEDULE_NONE, 0, &[]),
            QuotaSchedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, int(*steps)?, &[]),
            QuotaSchedule::Dream(ratios) => (DLLM_SCHEDULE_DREAM, 0, ratios),
            QuotaSchedule::CarryOver => (DLLM_SCHEDULE_CARRY_OVER, 0, &[]),
        };
        if shares.len() > self.max_ratios {
            return Err(Error::argument("schedule", format!("at most {} ratios", self.max_ratios), shares.len()));
        }
        if !course.end_tokens.is_empty() && course.end_tokens.len() != self.num_end_tokens {
            let expected = format!("none, or {}", self.num_end_tokens);
            return Err(Error::argument("end_tokens", expected, course.end_tokens.len()));
        }
        let start = dllm_advance_control {
            schedule: schedule as i32,
            steps: of_steps,
            pass: int(course.first_pass)?,
            num_ratios: int(shares.len())?,
            passes: self.passes,
            failed_sequence: DLLM_NONE_FAILED,
            failed_position: DLLM_NONE_FAILED,
            ..Default::default()
        };
        state[control..][..size_of::<dllm_advance_control>() / 4].copy_from_slice(bytemuck::cast_slice(&[start]));
        state[end_tokens..][..self.num_end_tokens].fill(-1); // no token
        for (to, token) in state[end_tokens..].iter_mut().zip(course.end_tokens) {
            *to = int(*token as usize)?;
        }
        state[ratios..][..shares.len()].copy_from_slice(bytemuck::cast_slice(shares));
        self.staging.write(&mut self.state, &state)
    }
}

fn unmask_workspace(sequences: usize, candidates: usize, vocab_size: usize) -> Result<usize> {
    let params = dllm_unmask_params {
        max_rows: int(candidates)?,
        num_sequences: int(sequences)?,
        vocab_size: int(vocab_size)?,
        ..Default::default()
    };
    Ok(ops::unmask::plan(&params).workspace_bytes as usize)
}

/// Whether the kernels can run a model of this shape.
///
/// # Errors
/// [`Error::Unsupported`] names the first size that they cannot take.
pub fn supports(config: &Config) -> Result<()> {
    let sizes = [
        ("head_dim", config.head_dim, "32, 64 or 128", [32, 64, 128].contains(&config.head_dim)),
        (
            "d_model",
            config.d_model,
            "a multiple of 8, at most 8192",
            config.d_model.is_multiple_of(8) && config.d_model <= 8192,
        ),
        ("mlp_hidden_size", config.mlp_hidden_size, "a multiple of 8", config.mlp_hidden_size.is_multiple_of(8)),
        ("vocab_size", config.vocab_size, "a multiple of 8", config.vocab_size.is_multiple_of(8)),
        ("vocab_size", config.vocab_size, "at most 16777215", config.vocab_size < 1 << 24),
    ];
    match sizes.into_iter().find(|(.., fits)| !fits) {
        None => Ok(()),
        Some((name, found, expected, _)) => Err(Error::unsupported(name, expected, found)),
    }
}

/// Bytes of device memory that a decode of these sizes takes besides the weights.
pub(super) fn memory(sizes: &SessionConfig, config: &Config, multiprocessors: usize) -> Result<[usize; 2]> {
    let needs = sizes.needs(config);
    let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
    let [cache, activations, logits] = sizes.elements(config);
    let tables = sizes.slots() * PassTables::len(sequences, candidates)
        + StateLayout::new(sequences, sizes.end_tokens, sizes.ratios).len
        + 3 * sequences
        + 3 * candidates;
    let workspace = 2 * activations
        + 4 * (logits + tables)
        + unmask_workspace(sequences, candidates, config.vocab_size)?
        + Cuda::session_bytes(&needs, sizes.slots(), multiprocessors);
    Ok([2 * cache, workspace])
}

impl PassTables {
    /// Elements of a table.
    fn len(sequences: usize, candidates: usize) -> usize {
        4 * candidates + sequences + 1
    }

    fn new(stream: &Stream, sequences: usize, candidates: usize) -> Result<PassTables> {
        let len = PassTables::len(sequences, candidates);
        let (table, staging) = (stream.alloc(len)?, Staging::new(stream, len)?);
        Ok(PassTables { plan: vec![], room: LaunchBucket::default(), table, staging })
    }
}

impl<'m> CudaEngine<'m> {
    /// Allocates for a decode of these sizes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernels cannot run the model; [`Error::OutOfMemory`] when the device has not that
    /// much free memory; the driver's.
    pub fn new(transformer: &'m Transformer<Cuda>, device: &Device, sizes: SessionConfig) -> Result<CudaEngine<'m>> {
        let config = transformer.config();
        supports(config)?;
        let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
        let what = format!("{sequences} sequences of up to {} positions", sizes.longest());
        let spans = sizes.needs(config).spans;
        for (counted, found, most) in [
            ("positions that may be committed in a pass", candidates, MOST_CANDIDATES),
            ("sequences (with guidance each counts twice)", spans, MOST_SPANS),
        ] {
            if found > most {
                let (expected, found) = (format!("at most {most} {counted}"), format!("{found} in {what}"));
                return Err(Error::Unsupported { what: "the CUDA kernels".into(), expected, found });
            }
        }
        let needed = sizes.device_memory(config, device.multiprocessors()?)?.total();
        ensure_memory(device, &what, needed)?;
        let named = |error| out_of_memory(error, &what, needed);
        let cuda = Cuda::new(device)?;
        let stream = cuda.stream().clone();
        let settle = stream.settle();
        let control = DeviceState::new(&stream, &sizes, config).map_err(named)?;
        let stage = || PassTables::new(&stream, sequences, candidates).map_err(named);
        let stages = (0..sizes.slots()).map(|_| stage()).collect::<Result<_>>()?;
        let session = Session::new(transformer, cuda, sizes).map_err(named)?;
        Ok(CudaEngine { graphs: HashMap::new(), session, control, stages, _settle: settle })
    }

    fn stream(&self) -> &Stream {
        self.session.backend.stream()
    }

    /// Layers of the first part of a pass. The last layer is never among them.
    fn ahead(&self) -> usize {
        1.min(self.session.num_layers() - 1)
    }

    /// Takes over what the passes of a slot run.
    fn set_batch(&mut self, slot: usize, stage: &StepTemplate) -> Result<()> {
        let DeviceState { sequences, candidates, .. } = self.control;
        let session = &mut self.session;
        let groups: Vec<_> = stage.candidates.iter().map(|(s, positions)| (*s, &positions[..])).collect();
        let count: usize = groups.iter().map(|(_, positions)| positions.len()).sum();
        if count > candidates {
            return Err(Error::argument(
                "candidates",
                format!("at most {candidates}, as the session was made for"),
                count,
            ));
        }
        let room = count.next_multiple_of(LOGIT_ROW_ALIGN).min(candidates);
        // The unconditional twins' rows begin where the conditional ones' room ends.
        let mut logit_rows = session.logit_rows(stage.windows, &groups);
        if session.sizes().guided {
            let twins = logit_rows.split_off(count);
            logit_rows.resize(room, 0);
            logit_rows.extend(twins);
            logit_rows.resize(2 * room, 0);
        } else {
            logit_rows.resize(room, 0);
        }
        let lens: Vec<usize> = stage.windows.iter().map(|window| window.rows.len()).collect();
        let room = session.sizes().room(&lens, logit_rows.len(), if stage.shrinks { WINDOW_BUCKETS } else { 0 });
        let room = session.set_batch(slot, stage.windows, stage.plan, &logit_rows, Some(room))?;

        let mut table = vec![0i32; PassTables::len(sequences, candidates)];
        let (rows, bounds) = table.split_at_mut(4 * candidates);
        let mut rows = rows.chunks_exact_mut(4);
        let mut written = 0;
        for s in 0..sequences {
            let first = session.first_token(s);
            // Logits stand in the order of the groups, rows of the table in that of the sequences.
            let mut logits_row = 0;
            for (sequence, positions) in &groups {
                if *sequence == s {
                    for ((i, position), row) in positions.iter().enumerate().zip(&mut rows) {
                        row.copy_from_slice(&[int(first + position)?, int(logits_row + i)?, int(*position)?, int(s)?]);
                        written += 1;
                    }
                }
                logits_row += positions.len();
            }
            bounds[s + 1] = int(written)?;
        }
        let layers = session.num_layers();
        let to = &mut self.stages[slot];
        to.room = room;
        to.plan.clear();
        to.plan.extend((0..layers).map(|layer| stage.plan.layer(layer)));
        to.staging.write(&mut to.table, &table)
    }

    /// Puts what a course starts from into the stream; then its first pass can be launched.
    fn begin(&mut self, tokens: &[Vec<u32>], course: &DecodeRun) -> Result<()> {
        if self.graphs.len() > MAX_GRAPHS {
            self.stream().synchronize()?;
            self.graphs.clear();
        }
        let flat = self.session.flat(tokens);
        self.session.backend.write_tokens(&flat)?;
        for (slot, stage) in course.stages.iter().enumerate() {
            let Some(stage) = stage else { continue };
            if slot >= self.stages.len() {
                let expected = format!("at most {}, as the session was made for", self.stages.len());
                return Err(Error::argument("stages", expected, slot + 1));
            }
            self.set_batch(slot, stage)?;
        }
        let first_tokens: Vec<usize> = (0..tokens.len()).map(|s| self.session.first_token(s)).collect();
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        self.control.begin(course, &first_tokens, &lengths)
    }

    /// Puts a part of a pass into the stream: as a graph, from its second run on recorded. Returns its multiply-adds.
    fn launch(&mut self, slot: usize, part: GraphPart, unmask: &SamplingParams, decision: SamplingKey) -> Result<u64> {
        let PassTables { plan, room, .. } = &self.stages[slot];
        let _range = nvtx::range_of(|| format!("step, {} rows: {part:?}", room.rows));
        // The first part decides nothing.
        let decision = if part == GraphPart::FirstLayer { SamplingKey::default() } else { decision };
        let key = GraphKey { slot, part, room: *room, plan: plan.clone(), decision };
        match self.graphs.get(&key) {
            Some(CapturedPass::Graph(_)) => {}
            Some(CapturedPass::Run) => {
                let graph = self.stream().clone().capture(|| self.work(slot, part, unmask, decision))?;
                self.graphs.insert(key.clone(), CapturedPass::Graph(graph));
            }
            None => {
                self.graphs.insert(key.clone(), CapturedPass::Run);
                self.work(slot, part, unmask, decision)?;
            }
        }
        if let Some(CapturedPass::Graph(graph)) = self.graphs.get(&key) {
            // SAFETY: what it was recorded from lives in this value and in the model, which outlives it, and is used on this
            // stream only.
            unsafe { graph.launch() }?;
        }
        Ok(self.launched(slot, part))
    }

    /// Counts a part of a pass that is in the stream, and its multiply-adds.
    fn launched(&mut self, slot: usize, part: GraphPart) -> u64 {
        // The device counts with this part's last kernel.
        self.control.passes = self.control.passes.wrapping_add((part == GraphPart::Remainder).into());
        let (ahead, layers) = (self.ahead(), self.session.num_layers());
        let range = if part == GraphPart::FirstLayer { 0..ahead } else { ahead..layers + 1 };
        let macs = self.session.work(slot, &self.stages[slot].plan, range);
        self.session.macs += macs;
        macs
    }

    /// The launches of a part of a pass.
    fn work(&mut self, slot: usize, part: GraphPart, unmask: &SamplingParams, decision: SamplingKey) -> Result<()> {
        let _range = nvtx::range(match part {
            GraphPart::FirstLayer => "first layer",
            GraphPart::Remainder => "other layers, head, unmask",
        });
        let (ahead, layers) = (self.ahead(), self.session.num_layers());
        let plan = self.stages[slot].plan.clone();
        match part {
            GraphPart::FirstLayer => {
                self.session.embed(slot, None)?;
                self.session.layers(slot, &plan, 0..ahead, None)
            }
            GraphPart::Remainder => {
                self.session.layers(slot, &plan, ahead..layers, None)?;
                self.session.head(slot, &plan, None)?;
                self.decide(slot, unmask, decision)
            }
        }
    }

    /// From logits to tokens, and to what the next pass needs to know.
    fn decide(&mut self, slot: usize, unmask: &SamplingParams, decision: SamplingKey) -> Result<()> {
        let config = self.session.config();
        let (control, stage, stream) = (&self.control, &self.stages[slot], self.stream());
        let tokens = self.session.backend.tokens()?;
        let num_tokens = int(tokens.len() - 1)?; // without the mask token behind them
        let guided = unmask.cfg_scale > 0.0;
        let logit_rows = if guided { stage.room.logit_rows / 2 } else { stage.room.logit_rows };
        let logits = self.session.logits_address();
        let uncond_logits = if guided { logits + (logit_rows * config.vocab_size * 4) as u64 } else { 0 };
        let (rows, cu_rows) = (stage.table.address(), stage.table.address() + 16 * control.candidates as u64);
        let mask_token = int(config.mask_token_id as usize)?;
        let (device, raw) = (stream.device(), stream.raw());
        let min_logit = unmask.top_p.is_some_and(|p| p < 1.0) || unmask.top_k.is_some();
        if min_logit {
            let params = dllm_top_k_top_p_params {
                size: size_of::<dllm_top_k_top_p_params>() as u64,
                logits,
                uncond_logits,
                rows,
                count: cu_rows + 4 * control.sequences as u64,
                tokens: tokens.address(),
                min_logit: control.min_logit.address(),
                logits_stride: config.vocab_size as i64,
                max_rows: int(control.candidates)?,
                num_tokens,
                num_logits_rows: int(logit_rows)?,
                vocab_size: int(config.vocab_size)?,
                mask_token,
                dtype: DLLM_F32 as i32,
                top_k: unmask.top_k.map_or(0, |k| most(k.min(config.vocab_size))),
                top_p: unmask.top_p.unwrap_or(1.0) as f32,
                temperature: unmask.temperature as f32,
                cfg_scale: unmask.cfg_scale,
            };
            // SAFETY: buffers of this value, of these sizes; what is read of them is checked on the device.
            unsafe { ops::top_k_top_p::launch_raw(device, raw, &params) }?;
        }
        let number = f32::from_bits(decision.number);
        let confidence = match unmask.confidence {
            Confidence::Probability => DLLM_CONFIDENCE_PROBABILITY,
            Confidence::Margin => DLLM_CONFIDENCE_MARGIN,
            Confidence::Entropy => DLLM_CONFIDENCE_ENTROPY,
            Confidence::Random => DLLM_CONFIDENCE_RANDOM,
        };
        let [masks_left, committed, failed] = control.outcome.each_ref().map(Buffer::address);
        let params = dllm_unmask_params {
            size: size_of::<dllm_unmask_params>() as u64,
            logits,
            uncond_logits,
            rows,
            cu_rows,
            tokens: tokens.address(),
            quota: control.at(control.layout.quota),
            commit_before: control.at(control.layout.commit_before),
            steps: control.at(control.layout.steps),
            min_logit: if min_logit { control.min_logit.address() } else { 0 },
            masks_left,
            committed,
            failed,
            predicted: control.predicted.address(),
            confidence: control.confidence.address(),
            workspace: control.workspace.address(),
            workspace_bytes: control.workspace.len() as u64,
            seed: unmask.seed,
            logits_stride: config.vocab_size as i64,
            max_rows: int(control.candidates)?,
            num_sequences: int(control.sequences)?,
            num_tokens,
            num_logits_rows: int(logit_rows)?,
            vocab_size: int(config.vocab_size)?,
            mask_token,
            dtype: DLLM_F32 as i32,
            confidence_kind: confidence as i32,
            policy: decision.policy as i32,
            tempered_confidence: unmask.tempered_confidence.into(),
            temperature: unmask.temperature as f32,
            cfg_scale: unmask.cfg_scale,
            alg_temp: unmask.alg_temp as f32,
            threshold: if decision.policy == DLLM_POLICY_THRESHOLD { number } else { 0.0 },
            factor: if decision.policy == DLLM_POLICY_FACTOR { number } else { 0.0 },
            reserved: 0,
        };
        // SAFETY: as above; the workspace was zeroed, its shape never changes, and rows are grouped as `set_batch` has written them.
        unsafe { ops::unmask::launch_raw(device, raw, &params) }?;
        let params = dllm_advance_params {
            size: size_of::<dllm_advance_params>() as u64,
            control: control.at(control.layout.control),
            sequences: control.at(control.layout.sequences),
            tokens: tokens.address(),
            committed,
            failed,
            quota: control.at(control.layout.quota),
            commit_before: control.at(control.layout.commit_before),
            steps: control.at(control.layout.steps),
            ratios: if control.max_ratios > 0 { control.at(control.layout.ratios) } else { 0 },
            end_tokens: if control.num_end_tokens > 0 { control.at(control.layout.end_tokens) } else { 0 },
            progress: control.progress.address(),
            num_sequences: int(control.sequences)?,
            num_tokens,
            mask_token,
            num_end_tokens: int(control.num_end_tokens)?,
            max_ratios: int(control.max_ratios)?,
            reserved: 0,
        };
        // SAFETY: as above.
        unsafe { ops::advance::launch_raw(device, raw, &params) }
    }

    /// Waits until the host has word of pass number `passes`; the driver is asked now and then, for what has failed gives no word.
    fn wait(&self, passes: i32) -> Result<()> {
        const SPINS: u32 = 256;
        let arrived = || self.control.progress.get(0) == passes;
        loop {
            for _ in 0..SPINS {
                if arrived() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if self.stream().is_done()? && !arrived() {
                return Err(Error::Unavailable("the device is done, but has not told what came of a pass".into()));
            }
            std::thread::yield_now();
        }
    }

    /// How many sequences take part in the next pass; an error when one has failed.
    fn outcome(&self) -> Result<usize> {
        const ACTIVE: usize = std::mem::offset_of!(dllm_progress, active) / 4;
        const FAILED: usize = std::mem::offset_of!(dllm_progress, failed_sequence) / 4;
        let word = |i: usize| self.control.progress.get(i);
        let [sequence, position, step] = [FAILED, FAILED + 1, FAILED + 2].map(word);
        match (sequence, position) {
            (DLLM_NONE_FAILED, _) => Ok(word(ACTIVE).max(0) as usize),
            (_, 0..) => Err(Error::NoFiniteLogit {
                sequence: sequence as usize,
                position: position as usize,
                step: step.max(0) as usize,
            }),
            _ => Err(Error::Unavailable(format!("sequence {sequence}: a table on the device is damaged"))),
        }
    }

    /// The tokens as they are on the device. Waits for it.
    fn read_tokens(&self, tokens: &mut [Vec<u32>]) -> Result<()> {
        let flat = self.session.backend.tokens()?.read()?;
        let mut rest = &flat[..];
        for sequence in tokens {
            let (own, others) = rest.split_at(sequence.len());
            rest = others;
            sequence.iter_mut().zip(own).for_each(|(to, token)| *to = *token as u32);
        }
        Ok(())
    }
}

impl DeviceLoop for CudaEngine<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &DecodeRun, go_on: &dyn Fn() -> bool) -> Result<RunOutcome> {
        let decision = SamplingKey::of(course.selection, course.unmask);
        let slot = |pass: usize| match (course.stage)(pass) {
            slot if matches!(course.stages.get(slot), Some(Some(_))) => Ok(slot),
            slot => Err(Error::argument("stage", "one that the course has", slot)),
        };
        self.session.observe(false);
        let together = if course.together { course.sequences.iter().filter(|s| s.active).count() } else { 1 };
        let mut start = Instant::now();
        self.begin(tokens, course)?;
        let mut work = self.launch(slot(0)?, GraphPart::FirstLayer, course.unmask, decision)?;
        work += self.launch(slot(0)?, GraphPart::Remainder, course.unmask, decision)?;
        let mut interrupted = false;
        let (mut seconds, mut macs) = (Vec::new(), Vec::new());
        for pass in 1.. {
            let slot = slot(pass)?;
            macs.push(work);
            work = self.launch(slot, GraphPart::FirstLayer, course.unmask, decision)?;
            self.wait(self.control.passes)?;
            seconds.push(start.elapsed().as_secs_f64());
            start = Instant::now();
            if self.outcome()? < together {
                break;
            }
            interrupted = !go_on();
            if interrupted {
                break;
            }
            work += self.launch(slot, GraphPart::Remainder, course.unmask, decision)?;
        }
        self.read_tokens(tokens)?;
        const NFE: usize = std::mem::offset_of!(dllm_progress, nfe) / 4;
        let state = self.control.state.read()?;
        let sequences = state[self.control.layout.sequences..].chunks(size_of::<dllm_advance_sequence>() / 4);
        let stands = |(course, state): (&SequenceState, &[i32])| {
            let state: dllm_advance_sequence = bytemuck::pod_read_unaligned(bytemuck::cast_slice(state));
            let number = |number: i32| number.max(0) as usize;
            SequenceState {
                forwards: number(state.forwards),
                per_step: number(state.per_step),
                deficit: number(state.deficit),
                max_passes: if state.max_passes == i32::MAX { course.max_passes } else { number(state.max_passes) },
                ..course.clone()
            }
        };
        let sequences = course.sequences.iter().zip(sequences).map(stands).collect();
        let passes = self.control.progress.get(NFE).max(0) as usize;
        Ok(RunOutcome { passes, sequences, interrupted, seconds, macs })
    }
}

impl DecodeEngine for CudaEngine<'_> {
    /// One pass, for those who look at every step: waits for the device and reads back.
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        if !matches!(pass.twins, CfgBranch::Batched) {
            return self.session.step_apart(tokens, pass);
        }
        let candidates: Vec<_> = pass.groups.iter().map(|g| (g.sequence, g.positions.clone())).collect();
        let selection = pass.groups.first().map_or(CommitRule::Quota(0), |group| group.selection);
        let idle = |s: &Vec<u32>| SequenceState {
            generated: 0,
            forwards: 0,
            active_range: 0..s.len(),
            quota_range: 0..s.len(),
            initial_masks: 0,
            per_step: 0,
            deficit: 0,
            max_passes: 1,
            active: false,
            first_quota: 0,
            first_commit_before: 0,
        };
        let mut sequences: Vec<_> = tokens.iter().map(idle).collect();
        for group in pass.groups {
            let sequence = &mut sequences[group.sequence];
            (sequence.active, sequence.forwards) = (true, group.step);
            sequence.first_commit_before = group.commit_before;
            sequence.first_quota = match group.selection {
                CommitRule::Quota(count) | CommitRule::ThresholdTopN { top_n: count, .. } => count,
                CommitRule::Threshold(_) | CommitRule::Factor(_) => usize::MAX,
            };
        }
        let stage = StepTemplate { plan: pass.plan, windows: pass.windows, candidates: &candidates, shrinks: false };
        let course = DecodeRun {
            stages: &[Some(stage)],
            stage: &|_| 0,
            first_pass: 0,
            together: false,
            schedule: &QuotaSchedule::Unlimited,
            selection,
            sequences: &sequences,
            unmask: pass.unmask,
            end_tokens: &[],
        };
        self.begin(tokens, &course)?;
        let decision = SamplingKey::of(selection, pass.unmask);
        let selects = self.stages[0].plan.iter().any(|layer| layer.choice().is_some());
        // What is chosen is read back in the middle of a pass, which no graph can do.
        self.session.observe(pass.observed && selects);
        for part in [GraphPart::FirstLayer, GraphPart::Remainder] {
            if pass.observed && selects {
                self.work(0, part, pass.unmask, decision)?;
                self.launched(0, part);
            } else {
                self.launch(0, part, pass.unmask, decision)?;
            }
        }
        self.wait(self.control.passes)?;
        self.outcome()?;
        let mut after = tokens.to_vec();
        self.read_tokens(&mut after)?;
        let (predicted, confidence) = (self.control.predicted.read()?, self.control.confidence.read()?);
        // The table's rows are in the order of the sequences, verdicts in that of the groups.
        let mut first = vec![0; tokens.len() + 1];
        for group in pass.groups {
            first[group.sequence + 1] = group.positions.len();
        }
        for s in 0..tokens.len() {
            first[s + 1] += first[s];
        }
        let verdict = |sequence: usize, i: usize, position: usize| Prediction {
            token: predicted[first[sequence] + i].max(0) as u32,
            confidence: confidence[first[sequence] + i].into(),
            commit: after[sequence][position] != tokens[sequence][position],
        };
        let of_group = |group: &crate::sampling::Candidates| -> Vec<Prediction> {
            group.positions.iter().enumerate().map(|(i, p)| verdict(group.sequence, i, *p)).collect()
        };
        Ok(pass.groups.iter().flat_map(of_group).collect())
    }

    /// Twins that run now and then are remembered by the host, which then leads.
    fn autonomous(&mut self) -> Option<&mut dyn DeviceLoop> {
        if self.session.sizes().remembered { None } else { Some(self) }
    }

    fn selected_rows(&self) -> &[SelectedRows] {
        self.session.observed()
    }

    fn macs(&self) -> u64 {
        self.session.macs
    }

    fn launches(&self) -> Result<Option<KernelCounts>> {
        let of_part = |part: GraphPart| {
            self.graphs.iter().filter_map(move |(key, recorded)| match recorded {
                CapturedPass::Graph(graph) if key.part == part => Some((key, graph)),
                _ => None,
            })
        };
        let least = of_part(GraphPart::FirstLayer).min_by_key(|(key, _)| (key.room.rows, key.room.selected));
        let Some((key, ahead)) = least.filter(|_| self.ahead() == 1) else { return Ok(None) };
        let same = |other: &GraphKey| (other.slot, other.room, &other.plan) == (key.slot, key.room, &key.plan);
        let Some((_, rest)) = of_part(GraphPart::Remainder).find(|(other, _)| same(other)) else { return Ok(None) };
        let ahead = ahead.nodes()?;
        // The embedding is the one that is not the layer's.
        Ok(Some(KernelCounts { layer: ahead.saturating_sub(1), pass: ahead + rest.nodes()? }))
    }
}

impl Drop for CudaEngine<'_> {
    fn drop(&mut self) {
        // The model's weights may go next, and the stream does not know of them. An error here is of work that nobody has
        // waited for.
        let _ = self.stream().synchronize();
    }
}

/// Errs when the device has not `bytes` left.
pub(super) fn ensure_memory(device: &Device, what: &str, bytes: usize) -> Result<()> {
    let (free, _) = device.memory_bytes()?;
    match bytes > free {
        true => Err(no_memory(what, bytes, Some(free), String::new())),
        false => Ok(()),
    }
}

fn no_memory(what: &str, bytes: usize, free: Option<usize>, cause: String) -> Error {
    Error::OutOfMemory {
        what: what.into(),
        memory: "the device's memory",
        needed_bytes: Some(bytes as u64),
        free_bytes: free.map(|free| free as u64),
        cause,
    }
}

/// An allocation that failed all the same, told with the numbers.
pub(super) fn out_of_memory(error: Error, what: &str, bytes: usize) -> Error {
    match error {
        Error::Driver { call: "cuMemHostAlloc", .. } => Error::OutOfMemory {
            what: what.into(),
            memory: "memory of this machine that the device can reach",
            needed_bytes: None,
            free_bytes: None,
            cause: error.to_string(),
        },
        Error::Driver { ref name, .. } if name.contains("OUT_OF_MEMORY") || name.contains("ALLOC_FAILED") => {
            no_memory(what, bytes, None, error.to_string())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Heads, cuda};

    /// Every room that passes may ask for has the workspace that attention wants: refreshes, blocks, and shrinking windows of
    /// any number of sequences.
    #[test]
    fn no_room_needs_more_workspace_than_there_is() {
        let shapes = [(32, 32, 128), (28, 4, 128), (4, 4, 64), (2, 2, 32)];
        for (num_heads, num_kv_heads, head_dim) in shapes {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            for (prompt_lens, gen_length) in
                [(vec![1021; 8], 256), (vec![64, 32], 64), (vec![3], 32), (vec![20, 400, 77, 5], 256), (vec![5], 6)]
            {
                for guided in [false, true] {
                    let sizes = SessionConfig {
                        prompt_lens: prompt_lens.clone(),
                        gen_length,
                        candidates: 1,
                        kv_cache: true,
                        feature_cache: false,
                        remembered: false,
                        guided,
                        ratios: 0,
                        end_tokens: 0,
                    };
                    let rows = (prompt_lens.iter().sum::<usize>() + prompt_lens.len() * gen_length)
                        * if guided { 2 } else { 1 };
                    let needs = crate::backend::SessionLimits {
                        rows,
                        logit_rows: 1,
                        spans: prompt_lens.len() * if guided { 2 } else { 1 },
                        longest: sizes.longest(),
                        tokens: rows,
                        heads,
                        selects: false,
                    };
                    let most = cuda::attention_workspace(&needs, 132);
                    let full: Vec<usize> = prompt_lens.iter().map(|prompt| prompt + gen_length).collect();
                    let windows = (1..=gen_length).map(|len| vec![len; prompt_lens.len()]).chain([full]);
                    for (windows, rooms) in windows.flat_map(|w| [(w.clone(), 0), (w, WINDOW_BUCKETS)]) {
                        let room = sizes.room(&windows, 1, rooms);
                        assert!(room.rows <= rows && room.longest <= needs.longest, "{room:?}");
                        assert!(room.longest >= windows.iter().copied().max().unwrap(), "{room:?} {windows:?}");
                        let splits = ops::attention::splits(room.longest, heads, 132);
                        let needed = ops::attention::workspace_len(room.rows, heads, splits);
                        assert!(needed <= most, "{heads:?} {prompt_lens:?} {room:?}: {needed} of {most}");
                    }
                }
            }
        }
    }
}
