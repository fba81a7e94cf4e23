//! A session on a CUDA device that runs whole courses: tokens, masks and schedules stay there, passes are graphs of
//! launches, and the host follows through a word in pinned memory.
//!
//! A pass is two graphs: the first layer; then the other layers, head, unmask and advance. While a pass is under way the host
//! puts the first layer of the next one into the stream, then waits for the word of the pass, and puts in the rest or stops.
//! So the device does not idle while the host finds out, and what runs in vain at the end of a block is one layer, which
//! commits nothing, and caches at most (with the adaptive cache) its keys and values of the tokens as they stand.

use super::config::Config;
use super::course::{Autonomous, Course, CourseSequence, CourseStage, Ran, Schedule};
use super::forward::{Chosen, Launches, LayerPlan, Network, Pass, Session, Transformer, Twins};
use super::sizes::Sizes;
use crate::abi::*;
use crate::backend::cuda::{Cuda, Staging};
use crate::backend::{Backend, Room};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Graph, Pinned, Settle, Stream, nvtx};
use crate::ops;
use crate::oracle::unmask::{Confidence, Selection, Unmask, Verdict};
use std::collections::HashMap;
use std::time::Instant;

/// Where windows shrink from block to block, launches are sized for multiples of this part of the generated positions: at most
/// so many graphs, and so large a part of those rows in vain.
const ROOMS: usize = 8;
/// Recorded parts of passes; when there are more, all are forgotten. Only who looks at every step sees so many.
const GRAPHS: usize = 64;
/// unmask's rows are blocks in a grid's second dimension.
const MOST_CANDIDATES: usize = 65_535;
/// attention's sequences, times at most 64 splits, are in its third.
const MOST_SPANS: usize = 65_535 / 64;
/// Rows whose logits are asked for are rounded up to a multiple of this.
const SCORED: usize = 32;

/// A session on a CUDA device.
pub struct Resident<'m> {
    graphs: HashMap<Key, Recorded>,
    session: Session<'m, Cuda>,
    control: Control,
    /// One for each slot of the session.
    stages: Vec<Stage>,
    /// The last, so that it sees to what the others have freed.
    _settle: Settle,
}

/// What graphs differ in.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    slot: usize,
    part: Part,
    room: Room,
    plan: Vec<LayerPlan>,
    decision: Decision,
}

/// A half of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    /// Embedding and first layer.
    Ahead,
    /// All that follows.
    Rest,
}

/// How tokens are chosen and committed: what a recorded unmask does not read from the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Decision {
    policy: dllm_policy,
    /// The bits of the policy's number.
    number: u32,
    /// Those of [`Unmask`].
    unmask: [u64; 9],
}

impl Decision {
    fn of(selection: Selection, unmask: &Unmask) -> Decision {
        let (policy, number) = match selection {
            Selection::Quota(_) => (DLLM_POLICY_FIXED, 0.0),
            Selection::Threshold(threshold) | Selection::ThresholdAmong { threshold, .. } => {
                (DLLM_POLICY_THRESHOLD, threshold as f32)
            }
            Selection::Factor(factor) => (DLLM_POLICY_FACTOR, factor as f32),
        };
        let Unmask { confidence, temperature, tempered_confidence, f32_confidence, top_p, top_k, .. } = *unmask;
        let Unmask { cfg_scale, alg_temp, seed, mask_token, .. } = *unmask;
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
        Decision { policy, number: number.to_bits(), unmask }
    }
}

/// A part of a pass. Its first run is not recorded: libraries load their kernels then, which has no place in a recording.
enum Recorded {
    Run,
    Graph(Graph),
}

/// What the passes of a slot run.
struct Stage {
    plan: Vec<LayerPlan>,
    room: Room,
    /// `[candidates]` dllm_unmask_row and `[sequences + 1]` bounds.
    table: Buffer<i32>,
    staging: Staging<i32>,
}

/// What unmask and advance read and write.
struct Control {
    sequences: usize,
    /// Candidates at most.
    candidates: usize,
    max_ratios: usize,
    num_end_tokens: usize,
    layout: Layout,
    /// One copy renews it when a course begins; advance keeps it up to date.
    state: Buffer<i32>,
    staging: Staging<i32>,
    /// Masks left, committed, failed: `[sequences]` each.
    outcome: [Buffer<i32>; 3],
    chosen: Buffer<i32>,
    confidence: Buffer<f32>,
    cut: Buffer<f32>,
    workspace: Buffer<u8>,
    progress: Pinned<i32>,
    /// Launches of advance so far.
    passes: i32,
}

/// Where the parts of the state begin, in elements.
#[derive(Clone, Copy)]
struct Layout {
    quota: usize,
    commit_before: usize,
    steps: usize,
    control: usize,
    sequences: usize,
    end_tokens: usize,
    ratios: usize,
    len: usize,
}

impl Layout {
    fn new(sequences: usize, end_tokens: usize, ratios: usize) -> Layout {
        let mut len = 0;
        let mut part = |elements: usize| {
            let at = len;
            len += elements.next_multiple_of(4); // 16 bytes
            at
        };
        let mut layout = Layout {
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

impl Control {
    fn new(stream: &Stream, sizes: &Sizes, config: &Config) -> Result<Control> {
        let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
        let layout = Layout::new(sequences, sizes.end_tokens, sizes.ratios);
        let mut workspace = stream.alloc(unmask_workspace(sequences, candidates, config.vocab_size)?)?;
        workspace.fill_zero()?;
        Ok(Control {
            sequences,
            candidates,
            max_ratios: sizes.ratios,
            num_end_tokens: sizes.end_tokens,
            layout,
            state: stream.alloc(layout.len)?,
            staging: Staging::new(stream, layout.len)?,
            outcome: [stream.alloc(sequences)?, stream.alloc(sequences)?, stream.alloc(sequences)?],
            chosen: stream.alloc(candidates)?,
            confidence: stream.alloc(candidates)?,
            cut: stream.alloc(candidates)?,
            workspace,
            progress: Pinned::new(stream.device(), size_of::<dllm_progress>() / 4)?,
            passes: 0,
        })
    }

    fn at(&self, element: usize) -> u64 {
        self.state.address() + 4 * element as u64
    }

    /// Puts a copy of the state at the beginning of a course into the stream.
    fn begin(&mut self, course: &Course, first_tokens: &[usize], lengths: &[usize]) -> Result<()> {
        let mut state = vec![0i32; self.layout.len];
        let Layout { quota, commit_before, steps, control, sequences, end_tokens, ratios, .. } = self.layout;
        for (s, sequence) in course.sequences.iter().enumerate() {
            let active = sequence.active;
            state[quota + s] = if active { most(sequence.first_quota) } else { 0 };
            state[commit_before + s] = if active { most(sequence.first_commit_before) } else { i32::MIN };
            state[steps + s] = int(sequence.forwards)?;
            let sequence = dllm_advance_sequence {
                first_token: int(first_tokens[s])?,
                length: int(lengths[s])?,
                generated: int(sequence.generated)?,
                open_start: int(sequence.open.start)?,
                open_end: int(sequence.open.end)?,
                reach_start: int(sequence.reach.start)?,
                reach_end: int(sequence.reach.end)?,
                commit_before: i32::MAX,
                masked: int(sequence.masked)?,
                per_step: int(sequence.per_step)?,
                left: int(sequence.left)?,
                limit: most(sequence.limit),
                forwards: int(sequence.forwards)?,
                active: active.into(),
                ended: 0,
                reserved: 0,
            };
            let len = size_of::<dllm_advance_sequence>() / 4;
            state[sequences + s * len..][..len].copy_from_slice(bytemuck::cast_slice(&[sequence]));
        }
        let (schedule, of_steps, shares): (_, _, &[f32]) = match course.schedule {
            Schedule::None => (DLLM_SCHEDULE_NONE, 0, &[]),
            Schedule::Llada { steps } => (DLLM_SCHEDULE_LLADA, int(*steps)?, &[]),
            Schedule::Dream(ratios) => (DLLM_SCHEDULE_DREAM, 0, ratios),
            Schedule::Among => (DLLM_SCHEDULE_AMONG, 0, &[]),
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
/// [`Error::Unavailable`] names the first size that they cannot take.
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
        Some((name, found, expected, _)) => {
            Err(Error::Unavailable(format!("the CUDA kernels need {name} to be {expected}, found {found}")))
        }
    }
}

/// Bytes of device memory that a decode of these sizes takes besides the weights.
pub(super) fn memory(sizes: &Sizes, config: &Config, multiprocessors: usize) -> Result<[usize; 2]> {
    let needs = sizes.needs(config);
    let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
    let [cache, activations, logits] = sizes.elements(config);
    let tables = sizes.slots() * Stage::len(sequences, candidates)
        + Layout::new(sequences, sizes.end_tokens, sizes.ratios).len
        + 3 * sequences
        + 3 * candidates;
    let workspace = 2 * activations
        + 4 * (logits + tables)
        + unmask_workspace(sequences, candidates, config.vocab_size)?
        + Cuda::session_bytes(&needs, sizes.slots(), multiprocessors);
    Ok([2 * cache, workspace])
}

impl Stage {
    /// Elements of a table.
    fn len(sequences: usize, candidates: usize) -> usize {
        4 * candidates + sequences + 1
    }

    fn new(stream: &Stream, sequences: usize, candidates: usize) -> Result<Stage> {
        let len = Stage::len(sequences, candidates);
        let (table, staging) = (stream.alloc(len)?, Staging::new(stream, len)?);
        Ok(Stage { plan: vec![], room: Room::default(), table, staging })
    }
}

impl<'m> Resident<'m> {
    /// Allocates for a decode of these sizes.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the kernels cannot run the model or the device has not that much free memory, with the
    /// numbers; the driver's.
    pub fn new(transformer: &'m Transformer<Cuda>, device: &Device, sizes: Sizes) -> Result<Resident<'m>> {
        let config = transformer.config();
        supports(config)?;
        let (sequences, candidates) = (sizes.prompt_lens.len(), sizes.candidates);
        let what = format!("{sequences} sequences of up to {} positions", sizes.longest());
        let spans = sizes.needs(config).spans;
        for (counted, found, most) in [
            ("positions that may be committed in a pass", candidates, MOST_CANDIDATES),
            ("sequences, with guidance twice as many,", spans, MOST_SPANS),
        ] {
            if found > most {
                return Err(Error::Unavailable(format!(
                    "{what} have {found} {counted} of which the kernels take {most}"
                )));
            }
        }
        let needed = sizes.device_memory(config, device.multiprocessors()?)?.total();
        ensure_memory(device, &what, needed)?;
        let named = |error| out_of_memory(error, &what, needed);
        let cuda = Cuda::new(device)?;
        let stream = cuda.stream().clone();
        let settle = stream.settle();
        let control = Control::new(&stream, &sizes, config).map_err(named)?;
        let stage = || Stage::new(&stream, sequences, candidates).map_err(named);
        let stages = (0..sizes.slots()).map(|_| stage()).collect::<Result<_>>()?;
        let session = Session::new(transformer, cuda, sizes).map_err(named)?;
        Ok(Resident { graphs: HashMap::new(), session, control, stages, _settle: settle })
    }

    fn stream(&self) -> &Stream {
        self.session.backend.stream()
    }

    /// Layers of the first part of a pass. The last layer is never among them.
    fn ahead(&self) -> usize {
        1.min(self.session.num_layers() - 1)
    }

    /// Takes over what the passes of a slot run.
    fn place(&mut self, slot: usize, stage: &CourseStage) -> Result<()> {
        let Control { sequences, candidates, .. } = self.control;
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
        let room = count.next_multiple_of(SCORED).min(candidates);
        // The unconditional twins' rows begin where the conditional ones' room ends.
        let mut scored = session.scored(stage.windows, &groups);
        if session.sizes().guided {
            let twins = scored.split_off(count);
            scored.resize(room, 0);
            scored.extend(twins);
            scored.resize(2 * room, 0);
        } else {
            scored.resize(room, 0);
        }
        let lens: Vec<usize> = stage.windows.iter().map(|window| window.rows.len()).collect();
        let room = session.sizes().room(&lens, scored.len(), if stage.shrinks { ROOMS } else { 0 });
        let room = session.place(slot, stage.windows, stage.plan, &scored, Some(room))?;

        let mut table = vec![0i32; Stage::len(sequences, candidates)];
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
    fn begin(&mut self, tokens: &[Vec<u32>], course: &Course) -> Result<()> {
        if self.graphs.len() > GRAPHS {
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
            self.place(slot, stage)?;
        }
        let first_tokens: Vec<usize> = (0..tokens.len()).map(|s| self.session.first_token(s)).collect();
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        self.control.begin(course, &first_tokens, &lengths)
    }

    /// Puts a part of a pass into the stream: as a graph, from its second run on recorded. Returns its multiply-adds.
    fn launch(&mut self, slot: usize, part: Part, unmask: &Unmask, decision: Decision) -> Result<u64> {
        let Stage { plan, room, .. } = &self.stages[slot];
        let _range = nvtx::range_of(|| format!("step, {} rows: {part:?}", room.rows));
        // The first part decides nothing.
        let decision = if part == Part::Ahead { Decision::default() } else { decision };
        let key = Key { slot, part, room: *room, plan: plan.clone(), decision };
        match self.graphs.get(&key) {
            Some(Recorded::Graph(_)) => {}
            Some(Recorded::Run) => {
                let graph = self.stream().clone().capture(|| self.work(slot, part, unmask, decision))?;
                self.graphs.insert(key.clone(), Recorded::Graph(graph));
            }
            None => {
                self.graphs.insert(key.clone(), Recorded::Run);
                self.work(slot, part, unmask, decision)?;
            }
        }
        if let Some(Recorded::Graph(graph)) = self.graphs.get(&key) {
            // SAFETY: what it was recorded from lives in this value and in the model, which outlives it, and is used on this
            // stream only.
            unsafe { graph.launch() }?;
        }
        Ok(self.launched(slot, part))
    }

    /// Counts a part of a pass that is in the stream, and its multiply-adds.
    fn launched(&mut self, slot: usize, part: Part) -> u64 {
        // The device counts with this part's last kernel.
        self.control.passes = self.control.passes.wrapping_add((part == Part::Rest).into());
        let (ahead, layers) = (self.ahead(), self.session.num_layers());
        let range = if part == Part::Ahead { 0..ahead } else { ahead..layers + 1 };
        let multiply_adds = self.session.work(slot, &self.stages[slot].plan, range);
        self.session.multiply_adds += multiply_adds;
        multiply_adds
    }

    /// The launches of a part of a pass.
    fn work(&mut self, slot: usize, part: Part, unmask: &Unmask, decision: Decision) -> Result<()> {
        let _range = nvtx::range(match part {
            Part::Ahead => "first layer",
            Part::Rest => "other layers, head, unmask",
        });
        let (ahead, layers) = (self.ahead(), self.session.num_layers());
        let plan = self.stages[slot].plan.clone();
        match part {
            Part::Ahead => {
                self.session.embed(slot, None)?;
                self.session.layers(slot, &plan, 0..ahead, None)
            }
            Part::Rest => {
                self.session.layers(slot, &plan, ahead..layers, None)?;
                self.session.head(slot, &plan, None)?;
                self.decide(slot, unmask, decision)
            }
        }
    }

    /// From logits to tokens, and to what the next pass needs to know.
    fn decide(&mut self, slot: usize, unmask: &Unmask, decision: Decision) -> Result<()> {
        let config = self.session.config();
        let (control, stage, stream) = (&self.control, &self.stages[slot], self.stream());
        let tokens = self.session.backend.tokens()?;
        let num_tokens = int(tokens.len() - 1)?; // without the mask token behind them
        let guided = unmask.cfg_scale > 0.0;
        let scored = if guided { stage.room.scored / 2 } else { stage.room.scored };
        let logits = self.session.logits_address();
        let uncond_logits = if guided { logits + (scored * config.vocab_size * 4) as u64 } else { 0 };
        let (rows, cu_rows) = (stage.table.address(), stage.table.address() + 16 * control.candidates as u64);
        let mask_token = int(config.mask_token_id as usize)?;
        let (device, raw) = (stream.device(), stream.raw());
        let cut = unmask.top_p.is_some_and(|p| p < 1.0) || unmask.top_k.is_some();
        if cut {
            let params = dllm_cut_params {
                size: size_of::<dllm_cut_params>() as u64,
                logits,
                uncond_logits,
                rows,
                count: cu_rows + 4 * control.sequences as u64,
                tokens: tokens.address(),
                cut: control.cut.address(),
                logits_stride: config.vocab_size as i64,
                max_rows: int(control.candidates)?,
                num_tokens,
                num_logits_rows: int(scored)?,
                vocab_size: int(config.vocab_size)?,
                mask_token,
                dtype: DLLM_F32 as i32,
                top_k: unmask.top_k.map_or(0, |k| most(k.min(config.vocab_size))),
                top_p: unmask.top_p.unwrap_or(1.0) as f32,
                temperature: unmask.temperature as f32,
                cfg_scale: unmask.cfg_scale,
            };
            // SAFETY: buffers of this value, of these sizes; what is read of them is checked on the device.
            unsafe { ops::cut::launch_raw(device, raw, &params) }?;
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
            cut: if cut { control.cut.address() } else { 0 },
            masks_left,
            committed,
            failed,
            chosen: control.chosen.address(),
            confidence: control.confidence.address(),
            workspace: control.workspace.address(),
            workspace_bytes: control.workspace.len() as u64,
            seed: unmask.seed,
            logits_stride: config.vocab_size as i64,
            max_rows: int(control.candidates)?,
            num_sequences: int(control.sequences)?,
            num_tokens,
            num_logits_rows: int(scored)?,
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
        // SAFETY: as above; the workspace was zeroed, its shape never changes, and rows are grouped as `place` has written them.
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

impl Autonomous for Resident<'_> {
    fn run(&mut self, tokens: &mut [Vec<u32>], course: &Course, go_on: &dyn Fn() -> bool) -> Result<Ran> {
        let decision = Decision::of(course.selection, course.unmask);
        let slot = |pass: usize| match (course.stage)(pass) {
            slot if matches!(course.stages.get(slot), Some(Some(_))) => Ok(slot),
            slot => Err(Error::argument("stage", "one that the course has", slot)),
        };
        self.session.observe(false);
        let together = if course.together { course.sequences.iter().filter(|s| s.active).count() } else { 1 };
        let mut start = Instant::now();
        self.begin(tokens, course)?;
        let mut work = self.launch(slot(0)?, Part::Ahead, course.unmask, decision)?;
        work += self.launch(slot(0)?, Part::Rest, course.unmask, decision)?;
        let mut interrupted = false;
        let (mut seconds, mut multiply_adds) = (Vec::new(), Vec::new());
        for pass in 1.. {
            let slot = slot(pass)?;
            multiply_adds.push(work);
            work = self.launch(slot, Part::Ahead, course.unmask, decision)?;
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
            work += self.launch(slot, Part::Rest, course.unmask, decision)?;
        }
        self.read_tokens(tokens)?;
        const NFE: usize = std::mem::offset_of!(dllm_progress, nfe) / 4;
        let state = self.control.state.read()?;
        let sequences = state[self.control.layout.sequences..].chunks(size_of::<dllm_advance_sequence>() / 4);
        let stands = |(course, state): (&CourseSequence, &[i32])| {
            let state: dllm_advance_sequence = bytemuck::pod_read_unaligned(bytemuck::cast_slice(state));
            let number = |number: i32| number.max(0) as usize;
            CourseSequence {
                forwards: number(state.forwards),
                per_step: number(state.per_step),
                left: number(state.left),
                limit: if state.limit == i32::MAX { course.limit } else { number(state.limit) },
                ..course.clone()
            }
        };
        let sequences = course.sequences.iter().zip(sequences).map(stands).collect();
        let passes = self.control.progress.get(NFE).max(0) as usize;
        Ok(Ran { passes, sequences, interrupted, seconds, multiply_adds })
    }
}

impl Network for Resident<'_> {
    /// One pass, for those who look at every step: waits for the device and reads back.
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Verdict>> {
        if !matches!(pass.twins, Twins::Beside) {
            return self.session.step_apart(tokens, pass);
        }
        let candidates: Vec<_> = pass.groups.iter().map(|g| (g.sequence, g.positions.clone())).collect();
        let selection = pass.groups.first().map_or(Selection::Quota(0), |group| group.selection);
        let idle = |s: &Vec<u32>| CourseSequence {
            generated: 0,
            forwards: 0,
            open: 0..s.len(),
            reach: 0..s.len(),
            masked: 0,
            per_step: 0,
            left: 0,
            limit: 1,
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
                Selection::Quota(count) | Selection::ThresholdAmong { among: count, .. } => count,
                Selection::Threshold(_) | Selection::Factor(_) => usize::MAX,
            };
        }
        let stage = CourseStage { plan: pass.plan, windows: pass.windows, candidates: &candidates, shrinks: false };
        let course = Course {
            stages: &[Some(stage)],
            stage: &|_| 0,
            first_pass: 0,
            together: false,
            schedule: &Schedule::None,
            selection,
            sequences: &sequences,
            unmask: pass.unmask,
            end_tokens: &[],
        };
        self.begin(tokens, &course)?;
        let decision = Decision::of(selection, pass.unmask);
        let chooses = self.stages[0].plan.iter().any(|layer| layer.choice().is_some());
        // What is chosen is read back in the middle of a pass, which no graph can do.
        self.session.observe(pass.observed && chooses);
        for part in [Part::Ahead, Part::Rest] {
            if pass.observed && chooses {
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
        let (chosen, confidence) = (self.control.chosen.read()?, self.control.confidence.read()?);
        // The table's rows are in the order of the sequences, verdicts in that of the groups.
        let mut first = vec![0; tokens.len() + 1];
        for group in pass.groups {
            first[group.sequence + 1] = group.positions.len();
        }
        for s in 0..tokens.len() {
            first[s + 1] += first[s];
        }
        let verdict = |sequence: usize, i: usize, position: usize| Verdict {
            token: chosen[first[sequence] + i].max(0) as u32,
            confidence: confidence[first[sequence] + i].into(),
            commit: after[sequence][position] != tokens[sequence][position],
        };
        let of_group = |group: &crate::oracle::unmask::Group| -> Vec<Verdict> {
            group.positions.iter().enumerate().map(|(i, p)| verdict(group.sequence, i, *p)).collect()
        };
        Ok(pass.groups.iter().flat_map(of_group).collect())
    }

    /// Twins that run now and then are remembered by the host, which then leads.
    fn autonomous(&mut self) -> Option<&mut dyn Autonomous> {
        if self.session.sizes().remembered { None } else { Some(self) }
    }

    fn chosen(&self) -> &[Chosen] {
        self.session.observed()
    }

    fn multiply_adds(&self) -> u64 {
        self.session.multiply_adds
    }

    fn launches(&self) -> Result<Option<Launches>> {
        let of_part = |part: Part| {
            self.graphs.iter().filter_map(move |(key, recorded)| match recorded {
                Recorded::Graph(graph) if key.part == part => Some((key, graph)),
                _ => None,
            })
        };
        let least = of_part(Part::Ahead).min_by_key(|(key, _)| (key.room.rows, key.room.chosen));
        let Some((key, ahead)) = least.filter(|_| self.ahead() == 1) else { return Ok(None) };
        let same = |other: &Key| (other.slot, other.room, &other.plan) == (key.slot, key.room, &key.plan);
        let Some((_, rest)) = of_part(Part::Rest).find(|(other, _)| same(other)) else { return Ok(None) };
        let ahead = ahead.nodes()?;
        // The embedding is the one that is not the layer's.
        Ok(Some(Launches { layer: ahead.saturating_sub(1), pass: ahead + rest.nodes()? }))
    }
}

impl Drop for Resident<'_> {
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
        true => Err(no_memory(what, bytes, &format!("{} MiB are free", free >> 20))),
        false => Ok(()),
    }
}

fn no_memory(what: &str, bytes: usize, found: &str) -> Error {
    Error::Unavailable(format!("{what} need {} MiB of the device's memory; {found}", (bytes >> 20).max(1)))
}

/// An allocation that failed all the same, told with the numbers.
pub(super) fn out_of_memory(error: Error, what: &str, bytes: usize) -> Error {
    match error {
        Error::Driver { call: "cuMemHostAlloc", .. } => {
            Error::Unavailable(format!("{what} need memory of this machine that the device can reach; {error}"))
        }
        Error::Driver { ref name, .. } if name.contains("OUT_OF_MEMORY") || name.contains("ALLOC_FAILED") => {
            no_memory(what, bytes, &error.to_string())
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
                    let sizes = Sizes {
                        prompt_lens: prompt_lens.clone(),
                        gen_length,
                        candidates: 1,
                        cached: true,
                        kept: false,
                        remembered: false,
                        guided,
                        ratios: 0,
                        end_tokens: 0,
                    };
                    let rows = (prompt_lens.iter().sum::<usize>() + prompt_lens.len() * gen_length)
                        * if guided { 2 } else { 1 };
                    let needs = crate::backend::Needs {
                        rows,
                        scored: 1,
                        spans: prompt_lens.len() * if guided { 2 } else { 1 },
                        longest: sizes.longest(),
                        tokens: rows,
                        heads,
                        chooses: false,
                    };
                    let most = cuda::attention_workspace(&needs, 132);
                    let full: Vec<usize> = prompt_lens.iter().map(|prompt| prompt + gen_length).collect();
                    let windows = (1..=gen_length).map(|len| vec![len; prompt_lens.len()]).chain([full]);
                    for (windows, rooms) in windows.flat_map(|w| [(w.clone(), 0), (w, ROOMS)]) {
                        let room = sizes.room(&windows, 1, rooms);
                        assert!(room.rows <= rows && room.longest <= needs.longest, "{room:?}");
                        assert!(room.longest >= windows.iter().copied().max().unwrap(), "{room:?} {windows:?}");
                        let splits = ops::attention::splits(room.longest, cuda::op_heads(heads), 132);
                        let needed = ops::attention::workspace_len(room.rows, cuda::op_heads(heads), splits);
                        assert!(needed <= most, "{heads:?} {prompt_lens:?} {room:?}: {needed} of {most}");
                    }
                }
            }
        }
    }
}
