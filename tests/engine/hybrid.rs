//! The hybrid cache: refreshes that skip the prompt, or recompute the block and the rows whose values changed most; vicinity; and
//! the suffix window. Compared with a transformer and a loop written here from the rules, with equivalent settings, and by
//! counted work.

use crate::common::checkpoint::{Checkpoint, MASK, prompts};
use crate::common::{Part, in_parts};
use dllm_kernels::backend::Ratio;
use dllm_kernels::backend::cpu::Cpu;
use dllm_kernels::cache::{BlockPlan, PassKind, Refresh};
use dllm_kernels::decode::decode;
use dllm_kernels::engine::{DecodeEngine, HostEngine, MemoryEstimate, Pass};
use dllm_kernels::model::{LayerPlan, SessionConfig};
use dllm_kernels::sampling::Prediction;
use dllm_kernels::{CacheMode, Config, Error, Family, Generator, Model, Observer, Options, Policy, Result, Step};
use std::collections::BTreeMap;
use std::ops::Range;

const FAMILIES: [Family; 2] = [Family::Llada, Family::Dream];
const CACHED: [CacheMode; 2] = [CacheMode::Prefix, CacheMode::Dual];
const GEN: usize = 24;
const BLOCK: usize = 4;
const BLOCKS: usize = GEN / BLOCK;
/// No confidence comes near it in these decodes.
const THRESHOLD: f64 = 0.47;

/// The two layers of the small checkpoints, and more like them: turned by a few places.
fn checkpoint(family: Family, layers: usize) -> Checkpoint {
    let mut checkpoint = Checkpoint::new(family);
    let key = if family == Family::Dream { "num_hidden_layers" } else { "n_layers" };
    checkpoint.config = checkpoint.config_with(key, Some(layers.into()));
    for (name, tensor) in checkpoint.tensors.clone() {
        for layer in 2..layers {
            let mut turned = tensor.clone();
            turned.values.rotate_left(7 * layer);
            let known = format!(".{}.", layer % 2);
            if name.contains(&known) {
                checkpoint.tensors.insert(name.replace(&known, &format!(".{layer}.")), turned);
            }
        }
    }
    checkpoint
}

fn open(family: Family, layers: usize) -> Model {
    Model::open(checkpoint(family, layers).write().path()).unwrap()
}

fn base(cache: CacheMode) -> Options {
    let policy = Policy::Threshold(THRESHOLD);
    Options { gen_length: GEN, block_length: Some(BLOCK), cache, policy, ..Options::default() }
}

/// Everything that can be set with a cache, alone and together.
fn settings(cache: CacheMode) -> Vec<Options> {
    let set = |refresh_prompt_every, refresh_ratio: f64, vicinity, suffix_window| {
        let refresh_ratio = (refresh_ratio < 1.0).then_some(refresh_ratio);
        Options { refresh_prompt_every, refresh_ratio, vicinity, suffix_window, ..base(cache) }
    };
    let mut list = vec![set(1, 1.0, 0, None)];
    list.extend([0, 2, 3, 7].map(|w| set(1, 1.0, 0, Some(w))));
    if cache != CacheMode::None {
        list.extend([2, 3, 100].map(|every| set(every, 1.0, 0, None)));
        list.extend([0.0, 0.1, 0.3, 0.5, 0.9].map(|ratio| set(1, ratio, 0, None)));
        list.extend([1, 3, 100].map(|vicinity| set(1, 1.0, vicinity, None)));
        list.extend([set(2, 0.3, 0, None), set(100, 0.5, 0, None), set(3, 0.0, 0, None), set(2, 1.0, 2, None)]);
        list.extend([set(1, 0.3, 2, None), set(3, 0.4, 1, None), set(2, 1.0, 0, Some(2))]);
        list.extend([set(1, 1.0, 2, Some(1)), set(2, 1.0, 3, Some(0)), set(3, 1.0, 1, Some(4))]);
    }
    list
}

/// Without masks, and with some that are committed like the others.
fn all_prompts() -> Vec<Vec<u32>> {
    [prompts(), vec![vec![3, 14, MASK, 15, MASK, 9]]].concat()
}

/// A pass of one sequence.
#[derive(Clone, Debug, PartialEq)]
struct Passed {
    window: Range<usize>,
    candidates: Vec<usize>,
    confidence: Vec<f64>,
    committed: Vec<usize>,
    tokens: Vec<u32>,
}

#[derive(Default)]
struct Passes(Vec<Passed>);

impl Observer for Passes {
    fn wants_steps(&self) -> bool {
        true
    }

    fn step(&mut self, step: &Step) {
        let of = &step.sequences[0];
        self.0.push(Passed {
            window: of.window.clone(),
            candidates: of.candidates.clone(),
            confidence: of.confidence.clone(),
            committed: of.transferred.clone(),
            tokens: of.tokens.to_vec(),
        });
    }
}

fn passes(model: &Model, options: &Options, prompt: &[u32]) -> Vec<Passed> {
    let mut passes = Passes::default();
    let output = Generator::new(model).options(options.clone()).generate_observed(&[prompt.to_vec()], &mut passes);
    assert_eq!(output.unwrap_or_else(|e| panic!("{options:?}: {e}")).tokens[0], passes.0.last().unwrap().tokens);
    passes.0
}

// The rule, written for reading: f64, one position at a time, all that is remembered by position.

/// Cached state of a position in a layer. Keys are rotated.
#[derive(Clone, Default)]
struct Reused {
    k: Vec<f64>,
    v: Vec<f64>,
    attention: Vec<f64>,
    mlp: Vec<f64>,
}

struct Reference {
    config: Config,
    tensors: BTreeMap<String, Vec<f64>>,
    /// The smallest distances met of what decides: largest and second logit, confidence and threshold (or the next),
    /// the last cosine that is chosen and the first that is not.
    margins: [f64; 3],
}

impl Reference {
    fn new(checkpoint: &Checkpoint, config: &Config) -> Reference {
        let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect();
        let tensors = checkpoint.tensors.iter().map(|(name, t)| (name.clone(), wide(&t.values))).collect();
        Reference { config: config.clone(), tensors, margins: [f64::INFINITY; 3] }
    }

    /// A tensor by LLaDA's name; `blocks.N.` before it for those of a layer.
    fn get(&self, name: &str) -> &[f64] {
        let dream = |name: &str| {
            let mut name = name.replace("blocks.", "layers.").replace("ff_norm", "post_attention_layernorm");
            let list = [
                ("attn_norm", "input_layernorm"),
                ("q_proj", "self_attn.q_proj"),
                ("k_proj", "self_attn.k_proj"),
                ("v_proj", "self_attn.v_proj"),
                ("attn_out", "self_attn.o_proj"),
                ("ff_proj", "mlp.gate_proj"),
                ("up_proj", "mlp.up_proj"),
                ("wte", "embed_tokens"),
                ("ln_f", "norm"),
            ];
            for (llada, dream) in list {
                name = name.replace(llada, dream);
            }
            let head = if name.starts_with("layers") { "mlp.down_proj" } else { "lm_head" };
            let is_head = name.starts_with("ff_out");
            let name = name.replace("ff_out", head);
            if is_head { name } else { format!("model.{name}") }
        };
        let name = match self.config.family {
            Family::Llada => format!("model.transformer.{name}"),
            Family::Dream => dream(name),
        };
        self.tensors.get(&name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.get(&format!("{name}.weight"));
        let mut out: Vec<f64> = weight.chunks(x.len()).map(|row| dot(row, x)).collect();
        if self.config.family == Family::Dream && ["q_proj", "k_proj", "v_proj"].iter().any(|end| name.ends_with(end)) {
            add(&mut out, self.get(&format!("{name}.bias")));
        }
        out
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let root = (dot(x, x) / x.len() as f64 + f64::from(self.config.rms_norm_eps)).sqrt();
        x.iter().zip(self.get(&format!("{name}.weight"))).map(|(x, w)| x / root * w).collect()
    }

    fn rope(&self, heads: &mut [f64], position: usize) {
        let half = self.config.head_dim / 2;
        for head in heads.chunks_mut(2 * half) {
            for i in 0..half {
                let frequency = f64::from(self.config.rope_theta).powf(-(i as f64) / half as f64);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (head[i], head[i + half]) =
                    (head[i] * cos - head[i + half] * sin, head[i + half] * cos + head[i] * sin);
            }
        }
    }

    fn attention(&self, q: &[f64], memory: &[Reused], seen: &[usize]) -> Vec<f64> {
        let (d, shared) = (self.config.head_dim, self.config.num_heads / self.config.num_kv_heads);
        let mut out = vec![0.0; q.len()];
        for (head, (q, out)) in q.chunks(d).zip(out.chunks_mut(d)).enumerate() {
            let of = head / shared * d..(head / shared + 1) * d;
            let weights: Vec<f64> =
                seen.iter().map(|p| (dot(q, &memory[*p].k[of.clone()]) / (d as f64).sqrt()).exp()).collect();
            for (p, weight) in seen.iter().zip(&weights) {
                let share = weight / weights.iter().sum::<f64>();
                out.iter_mut().zip(&memory[*p].v[of.clone()]).for_each(|(out, v)| *out += share * v);
            }
        }
        out
    }

    /// Rows `rows` of the sequence, which see `seen`: their fresh keys and values, and those remembered of the others.
    /// Where a share is given, layers from the second on run only the block and that share of the other rows. Returns
    /// what the head takes.
    fn forward(
        &mut self,
        tokens: &[u32],
        (rows, seen): (&[usize], &[usize]),
        partly: Option<(Range<usize>, f64)>,
        memory: &mut [Vec<Reused>],
    ) -> BTreeMap<usize, Vec<f64>> {
        let d = self.config.d_model;
        let embedding = |p: &usize| self.get("wte.weight")[tokens[*p] as usize * d..][..d].to_vec();
        let mut x: BTreeMap<usize, Vec<f64>> = rows.iter().map(|p| (*p, embedding(p))).collect();
        for (layer, memory) in memory.iter_mut().enumerate() {
            let name = |what: &str| format!("blocks.{layer}.{what}");
            let normed: BTreeMap<_, _> = x.iter().map(|(p, x)| (*p, self.norm(&name("attn_norm"), x))).collect();
            let fresh: BTreeMap<_, _> = normed.iter().map(|(p, x)| (*p, self.linear(&name("v_proj"), x))).collect();
            let mut running = rows.to_vec();
            if let (Some((block, share)), true) = (&partly, layer > 0) {
                running.retain(|p| block.contains(p));
                let others = rows.iter().filter(|p| !block.contains(p));
                let cosine = |p: &usize| {
                    let (a, b) = (&fresh[p], &memory[*p].v);
                    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(), *p)
                };
                let mut others: Vec<_> = others.map(cosine).collect();
                others.sort_by(|a, b| a.partial_cmp(b).unwrap());
                let count = (others.len() as f64 * share).floor() as usize;
                if count > 0 {
                    self.margins[2] = self.margins[2].min(others[count].0 - others[count - 1].0);
                }
                running.extend(others[..count].iter().map(|(_, p)| *p));
            }
            for (p, v) in fresh {
                memory[p].v = v;
            }
            for p in &running {
                memory[*p].k = self.linear(&name("k_proj"), &normed[p]);
                self.rope(&mut memory[*p].k, *p);
            }
            for p in &running {
                let mut q = self.linear(&name("q_proj"), &normed[p]);
                self.rope(&mut q, *p);
                memory[*p].attention = self.linear(&name("attn_out"), &self.attention(&q, memory, seen));
            }
            x.iter_mut().for_each(|(p, x)| add(x, &memory[*p].attention));
            for p in &running {
                let normed = self.norm(&name("ff_norm"), &x[p]);
                let (gate, up) = (self.linear(&name("ff_proj"), &normed), self.linear(&name("up_proj"), &normed));
                let act: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                memory[*p].mlp = self.linear(&name("ff_out"), &act);
            }
            x.iter_mut().for_each(|(p, x)| add(x, &memory[*p].mlp));
        }
        x.iter().map(|(p, x)| (*p, self.norm("ln_f", x))).collect()
    }

    /// The best token of a row and its probability; never the mask.
    fn score(&mut self, x: &[f64]) -> (u32, f64) {
        let mut logits: Vec<f64> = self.linear("ff_out", x);
        let order = |logits: &[f64]| {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            (order[0], logits[order[0]] - logits[order[1]])
        };
        let (mut best, mut gap) = order(&logits);
        if best == MASK as usize {
            logits[best] = f64::NEG_INFINITY;
            (best, gap) = (order(&logits).0, gap.min(order(&logits).1));
        }
        self.margins[0] = self.margins[0].min(gap);
        (best as u32, 1.0 / logits.iter().map(|l| (l - logits[best]).exp()).sum::<f64>())
    }

    /// Of these confidences those from the threshold on, and always the best.
    fn select(&mut self, confidence: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..confidence.len()).collect();
        order.sort_by(|a, b| confidence[*b].total_cmp(&confidence[*a]));
        let best = order[0];
        for i in &order[1..] {
            let ahead = if confidence[best] < THRESHOLD { confidence[best] - confidence[*i] } else { f64::INFINITY };
            self.margins[1] = self.margins[1].min((confidence[*i] - THRESHOLD).abs()).min(ahead);
        }
        (0..confidence.len()).filter(|i| *i == best || confidence[*i] >= THRESHOLD).collect()
    }

    /// A decode, pass by pass.
    fn decode(&mut self, prompt: &[u32], options: &Options) -> Vec<Passed> {
        let dream = self.config.family == Family::Dream;
        let source = usize::from(dream);
        let first_mask = prompt.iter().position(|t| *t == MASK).unwrap_or(prompt.len());
        let mut tokens = [prompt, &[MASK; GEN]].concat();
        let mut memory = vec![vec![Reused::default(); tokens.len()]; self.config.num_layers];
        let mut list = vec![];
        for block in 0..BLOCKS {
            let (start, end) = (prompt.len() + block * BLOCK, prompt.len() + (block + 1) * BLOCK);
            let window = options.suffix_window.unwrap_or(GEN);
            let seen: Vec<usize> = (0..tokens.len()).filter(|p| *p < end + window).collect();
            for pass in 0.. {
                if !tokens[start..end].contains(&MASK) {
                    break;
                }
                let refresh = pass == 0;
                let around = start.saturating_sub(options.vicinity)..end + options.vicinity;
                let rows: Vec<usize> = match options.cache {
                    CacheMode::None => seen.clone(),
                    _ if refresh && block % options.refresh_prompt_every == 0 => seen.clone(),
                    _ if refresh => seen.iter().copied().filter(|p| *p + source >= first_mask).collect(),
                    CacheMode::Prefix => seen[around.start..].to_vec(),
                    _ => seen[around.start..around.end.min(seen.len())].to_vec(),
                };
                let cached = options.cache != CacheMode::None;
                let share = options.refresh_ratio.filter(|_| cached && refresh && block > 0);
                let partly = share.map(|share| (start - source..end, share));
                let mut after = memory.clone();
                let x = self.forward(&tokens, (&rows, &seen), partly, &mut after);
                if refresh {
                    memory = after;
                }
                let first = if !dream && (refresh || options.cache == CacheMode::None) { 0 } else { start };
                let candidates: Vec<usize> = (first..end).filter(|p| tokens[*p] == MASK).collect();
                let scores: Vec<_> = candidates.iter().map(|p| self.score(&x[&(p - source)])).collect();
                let confidence: Vec<f64> = scores.iter().map(|(_, confidence)| *confidence).collect();
                let taken = if dream && refresh { vec![0] } else { self.select(&confidence) };
                for i in &taken {
                    tokens[candidates[*i]] = scores[*i].0;
                }
                list.push(Passed {
                    window: rows[0]..rows[rows.len() - 1] + 1,
                    committed: taken.iter().map(|i| candidates[*i]).collect(),
                    candidates,
                    confidence,
                    tokens: tokens[prompt.len()..].to_vec(),
                });
            }
        }
        list
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], delta: &[f64]) {
    assert_eq!(x.len(), delta.len(), "nothing is remembered");
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

/// Pass by pass: what ran, the candidates' confidences, what was committed. No decision is closer than ten times the
/// arithmetic's error.
fn as_the_rule_says(family: Family, part: Part) {
    let checkpoint = checkpoint(family, 4);
    let model = open(family, 4);
    let mut reference = Reference::new(&checkpoint, model.config());
    let (mut worst, mut decodes, mut different, mut forwards) = (0.0f64, 0, 0, [0, 0]);
    for prompt in all_prompts() {
        for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
            let plain = passes(&model, &base(cache), &prompt);
            for options in part.of(settings(cache), 5) {
                let (got, want) = (passes(&model, &options, &prompt), reference.decode(&prompt, &options));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = format!("{family} pass {i} of {prompt:?} {options:?}");
                    assert_eq!((&got.window, &got.candidates), (&want.window, &want.candidates), "{what}");
                    for (got, want) in got.confidence.iter().zip(&want.confidence) {
                        worst = worst.max((got - want).abs());
                        assert!((got - want).abs() < 1e-4, "{what}: {got} {want}");
                    }
                    assert_eq!((&got.committed, &got.tokens), (&want.committed, &want.tokens), "{what}");
                }
                assert_eq!(got.len(), want.len(), "{family} {prompt:?} {options:?}");
                decodes += 1;
                different += usize::from(got != plain);
                forwards[0] += got.len();
                forwards[1] += got.iter().filter(|passed| passed.committed.len() > 1).count();
            }
        }
    }
    let [logits, confidence, cosine] = reference.margins;
    println!(
        "{family}: {decodes} decodes, {different} not plain, {forwards:?} forwards; error {worst:.1e}, margins {logits:.1e} \
         {confidence:.1e} {cosine:.1e}"
    );
    assert!(different * 10 > decodes * 7 && forwards[1] * 10 > forwards[0], "{different} of {decodes}, {forwards:?}");
    assert!(logits.min(confidence) > 10.0 * worst && cosine > 1e-6, "{logits} {confidence} {cosine} {worst}");
}

fn llada_as_the_rule_says(part: Part) {
    as_the_rule_says(Family::Llada, part);
}

fn dream_as_the_rule_says(part: Part) {
    as_the_rule_says(Family::Dream, part);
}

in_parts!(batches, dream_as_the_rule_says, llada_as_the_rule_says);

fn tokens(model: &Model, options: &Options, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let output = Generator::new(model).options(options.clone()).generate(prompts);
    output.unwrap_or_else(|e| panic!("{options:?}: {e}")).tokens
}

fn same(model: &Model, one: &Options, other: &Options, prompts: &[Vec<u32>]) {
    for prompt in prompts {
        assert_eq!(settled(model, one, prompt), settled(model, other, prompt), "{one:?} {other:?} {prompt:?}");
    }
}

/// A decode but for the rows that ran, bit for bit.
fn settled(model: &Model, options: &Options, prompt: &[u32]) -> Vec<Passed> {
    passes(model, options, prompt).into_iter().map(|passed| Passed { window: 0..0, ..passed }).collect()
}

/// Settings that are equivalent.
#[test]
fn equal_settings() {
    for family in FAMILIES {
        let model = open(family, 4);
        for cache in CACHED {
            let base = base(cache);
            let every = |refresh_prompt_every| Options { refresh_prompt_every, ..base.clone() };
            same(&model, &every(BLOCKS), &every(usize::MAX), &all_prompts());
            let window = |window| Options { suffix_window: Some(window), refresh_prompt_every: 2, ..base.clone() };
            for w in [GEN, usize::MAX, GEN - BLOCK] {
                same(&model, &window(w), &every(2), &all_prompts());
            }
            // All that a window leaves out of the first block is its last position.
            let prompt = &prompts()[0];
            assert_ne!(settled(&model, &window(GEN - BLOCK - 1), prompt), settled(&model, &every(2), prompt));
            // Everything around the block is everything; with masks in the prompt, more would be candidates.
            let vicinity = Options { vicinity: usize::MAX, ..base.clone() };
            same(&model, &vicinity, &self::base(CacheMode::None), &prompts());
        }
        // Options of the block caches have no effect without a cache.
        let none = base(CacheMode::None);
        let other = Options { refresh_prompt_every: 3, refresh_ratio: Some(0.2), vicinity: 2, ..none.clone() };
        same(&model, &other, &none, &all_prompts());
    }
}

/// Keys and values of a single layer are of their tokens alone: only the suffix window changes what is seen.
#[test]
fn of_one_layer_nothing_is_stale() {
    for family in FAMILIES {
        let model = open(family, 1);
        for cache in CACHED {
            for options in settings(cache) {
                let plain = Options { refresh_prompt_every: 1, refresh_ratio: None, vicinity: 0, ..options.clone() };
                // A mask of the prompt that a refresh has committed is stale until the next, but in the vicinity.
                let prompts = if options.vicinity > 0 { prompts() } else { all_prompts() };
                same(&model, &options, &plain, &prompts);
            }
        }
    }
}

/// A session whose refreshes, those of a plain decode, keep at first and then run the block and this share of the other
/// rows, if one is given; and every confidence that it gave.
struct CachePlanOverride<'m> {
    session: HostEngine<'m, Cpu>,
    mode: CacheMode,
    first_block: usize,
    share: Option<f64>,
    confidence: Vec<f64>,
    refreshes: usize,
}

impl DecodeEngine for CachePlanOverride<'_> {
    fn step(&mut self, tokens: &[Vec<u32>], pass: &Pass) -> Result<Vec<Prediction>> {
        let LayerPlan::Full { reuse, store, .. } = pass.plan.layer(1) else { panic!("not plain") };
        self.refreshes += usize::from(store);
        let verdicts = match self.share {
            Some(share) if store => {
                let first = pass.query_rows[0].block.end == self.first_block + BLOCK;
                let refresh = if first { Refresh::FullWithFeatures } else { Refresh::Partial(Ratio::new(share)) };
                let kind = if reuse { PassKind::Response } else { PassKind::Full };
                let plan = BlockPlan { refresh, ..BlockPlan::new(self.mode, kind) };
                self.session.step(tokens, &Pass { plan: &plan, ..*pass })?
            }
            _ => self.session.step(tokens, pass)?,
        };
        self.confidence.extend(verdicts.iter().map(|verdict| verdict.confidence));
        Ok(verdicts)
    }
}

/// A share of all rows, which no setting gives (it takes the plain path): layers run as they do whole, bit for bit.
#[test]
fn all_rows_chosen_are_all_rows() {
    for family in FAMILIES {
        let model = open(family, 4);
        for prompt in all_prompts() {
            for (mode, every) in [(CacheMode::Prefix, 1), (CacheMode::Dual, 1), (CacheMode::Dual, 2)] {
                let options = Options { refresh_prompt_every: every, ..base(mode) };
                let prompts = [prompt.clone()];
                let sizes = SessionConfig { feature_cache: true, ..options.sizes(model.config(), &prompts) };
                let run = |share: Option<f64>| {
                    let session = HostEngine::new(model.transformer(), Cpu::default(), sizes.clone()).unwrap();
                    let (first_block, confidence) = (prompt.len(), vec![]);
                    let mut kept = CachePlanOverride { session, mode, first_block, share, confidence, refreshes: 0 };
                    let decoded = decode(&mut kept, model.config(), &prompts, &options, None, &mut ()).unwrap();
                    assert_eq!(kept.refreshes, BLOCKS);
                    (decoded.tokens, kept.confidence)
                };
                assert!(run(Some(1.0)) == run(None), "{family} {options:?} {prompt:?}");
                assert!(run(Some(0.9)) != run(None), "{family} {options:?} {prompt:?}");
            }
        }
    }
}

/// Other sequences of the batch change nothing, with or without guidance, under every policy.
fn batches(part: Part) {
    for family in FAMILIES {
        let model = open(family, 4);
        for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
            for (i, options) in part.of(settings(cache).into_iter().enumerate(), 4) {
                let policy = [options.policy, Policy::Fixed, Policy::Factor(1.0)][i % 3];
                let options = Options { policy, ..options };
                for options in [options.clone(), Options { cfg_scale: 1.5, temperature: 0.7, ..options }] {
                    let batch = tokens(&model, &options, &all_prompts());
                    for (prompt, tokens_of) in all_prompts().iter().zip(&batch) {
                        let alone = tokens(&model, &options, std::slice::from_ref(prompt));
                        assert_eq!(alone[0], *tokens_of, "{family} {options:?} {prompt:?}");
                    }
                }
            }
        }
    }
}

/// MACs of a decode that commits one token per forward, and the same by hand: row and key counts of every pass.
#[test]
fn work() {
    const LAYERS: u64 = 4;
    let prompt: Vec<u32> = (0..10).collect();
    let (p, len) = (prompt.len(), prompt.len() + GEN);
    for family in FAMILIES {
        // With small weights nothing is certain.
        let config = open(family, LAYERS as usize).config().clone();
        let model = Model::random(config, 3).unwrap();
        let c = model.config();
        let [d, q, kv, mlp, vocab] =
            [c.d_model, c.q_width(), c.kv_width(), c.mlp_hidden_size, c.vocab_size].map(|n| n as u64);
        let source = usize::from(family == Family::Dream);
        let rest = d * q + 3 * d * mlp;
        let attention = |rows: usize, keys: usize| rows as u64 * (d * (q + 2 * kv) + 2 * keys as u64 * q);
        let head = |scored: usize| scored as u64 * d * vocab;
        // All rows of all layers, but only the logit rows after the attention of the last one.
        let whole = |rows: usize, keys: usize, scored: usize| {
            LAYERS * attention(rows, keys) + ((LAYERS - 1) * rows as u64 + scored as u64) * rest + head(scored)
        };
        let counted = |options: &Options| {
            let options = Options { policy: Policy::Threshold(1.0), ..options.clone() };
            let sizes = options.sizes(c, std::slice::from_ref(&prompt));
            let mut session = HostEngine::new(model.transformer(), Cpu::default(), sizes).unwrap();
            let decoded = decode(&mut session, c, std::slice::from_ref(&prompt), &options, None, &mut ()).unwrap();
            assert_eq!(decoded.nfe, GEN);
            session.macs()
        };
        // Dream's first forward of a block looks at one position only.
        let scored = |pass: usize| if pass == 0 && source == 1 { 1 } else { BLOCK - pass };
        let sum = |pass: &dyn Fn(usize, usize) -> u64| -> u64 {
            (0..BLOCKS).flat_map(|block| (0..BLOCK).map(move |i| (block, i))).map(|(block, i)| pass(block, i)).sum()
        };
        for cache in CACHED {
            // Rows of a forward between refreshes, with the vicinity on either side, limited to the sequence.
            let between = |block: usize, vicinity: usize, places: usize| {
                let (start, end) = (p + block * BLOCK, p + (block + 1) * BLOCK);
                let end = if cache == CacheMode::Dual { (end + vicinity).min(places) } else { places };
                end - start.saturating_sub(vicinity)
            };
            let base = base(cache);
            let plain = sum(&|block, i| whole(if i == 0 { len } else { between(block, 0, len) }, len, scored(i)));
            assert_eq!(counted(&base), plain, "{family} {cache:?}");

            let want = sum(&|block, i| match (block % 3, i) {
                (0, 0) => whole(len, len, scored(0)),
                (_, 0) => whole(GEN + source, len, scored(0)),
                _ => whole(between(block, 0, len), len, scored(i)),
            });
            assert_eq!(counted(&Options { refresh_prompt_every: 3, ..base.clone() }), want, "{family} {cache:?}");
            assert!(want < plain);

            for (share, every) in [(0.0, 1), (0.3, 1), (0.3, 3)] {
                let want = sum(&|block, i| {
                    if i > 0 {
                        return whole(between(block, 0, len), len, scored(i));
                    }
                    let rows = if block % every == 0 { len } else { GEN + source };
                    let ran = match block {
                        0 => rows,
                        _ => BLOCK + source + ((rows - BLOCK - source) as f64 * share) as usize,
                    };
                    let fresh = (rows - ran) as u64 * d * kv;
                    let later = (LAYERS - 1) * (attention(ran, len) + fresh + ran as u64 * rest);
                    attention(rows, len) + rows as u64 * rest + later + head(scored(0))
                });
                let options = Options { refresh_ratio: Some(share), refresh_prompt_every: every, ..base.clone() };
                assert_eq!(counted(&options), want, "{family} {cache:?} {share} {every}");
                assert!(want < plain, "{family} {cache:?} {share} {every}: {want} of {plain}");
            }

            for vicinity in [1, 3, 100] {
                let want =
                    sum(&|block, i| whole(if i == 0 { len } else { between(block, vicinity, len) }, len, scored(i)));
                assert_eq!(counted(&Options { vicinity, ..base.clone() }), want, "{family} {cache:?} {vicinity}");
                assert!(want > plain);
            }

            for window in [0, 3, 5] {
                let places = |block: usize| (p + (block + 1) * BLOCK + window).min(len);
                let want = sum(&|block, i| {
                    let places = places(block);
                    whole(if i == 0 { places } else { between(block, 1, places) }, places, scored(i))
                });
                let options = Options { suffix_window: Some(window), vicinity: 1, ..base.clone() };
                assert_eq!(counted(&options), want, "{family} {cache:?} {window}");
                assert!(want < counted(&Options { vicinity: 1, ..base.clone() }));
            }
        }
    }
}

/// Impossible settings are errors before any work.
#[test]
fn errors() {
    struct Never;
    impl Observer for Never {
        fn wants_steps(&self) -> bool {
            true
        }

        fn step(&mut self, _: &Step) {
            panic!("a pass");
        }
    }
    let model = open(Family::Llada, 1);
    for cache in CACHED {
        let base = base(cache);
        let ratio = |ratio| ("refresh-ratio", Options { refresh_ratio: Some(ratio), ..base.clone() });
        let window = |other: Options| ("suffix-window", Options { suffix_window: Some(8), ..other });
        for (want, options) in [
            ("refresh-prompt-every", Options { refresh_prompt_every: 0, ..base.clone() }),
            ratio(-0.1),
            ratio(1.1),
            ratio(f64::NAN),
            ratio(f64::INFINITY),
            window(Options { refresh_ratio: Some(0.5), ..base.clone() }),
            window(Options { refresh_ratio: Some(0.0), ..base.clone() }),
            window(Options { cache: CacheMode::Adaptive, ..base.clone() }),
        ] {
            let result = Generator::new(&model).options(options.clone()).generate_observed(&prompts(), &mut Never);
            let Err(Error::Argument { name, expected, found }) = result else { panic!("{options:?} passes") };
            assert!(name == want && !expected.is_empty() && !found.is_empty(), "{name}: {expected}, {found}");
        }
        // At the limits of the ranges; and a window with a ratio that no cache uses.
        for options in [
            ratio(0.0).1,
            ratio(1.0).1,
            window(base.clone()).1,
            window(Options { cache: CacheMode::None, refresh_ratio: Some(0.5), ..base.clone() }).1,
        ] {
            assert_eq!(tokens(&model, &options, &prompts())[0].len(), GEN);
        }
    }
}

/// Outputs are kept where refreshes run a share of the rows, and nowhere else.
#[test]
fn what_is_kept() {
    let model = open(Family::Dream, 4);
    let config = model.config();
    let sizes = |options: &Options| options.sizes(config, &all_prompts());
    for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual] {
        for options in settings(cache) {
            let keeps = cache != CacheMode::None && options.refresh_ratio.is_some();
            let (sizes, plain) = (sizes(&options), sizes(&base(cache)));
            assert_eq!(sizes, SessionConfig { feature_cache: keeps, ..plain.clone() }, "{options:?}");
            let positions: usize = all_prompts().iter().map(|prompt| prompt.len() + GEN).sum();
            let outputs = if keeps { 2 * 3 * positions * config.d_model * size_of::<f32>() } else { 0 };
            assert_eq!(
                MemoryEstimate::cpu(&sizes, config, 1).cache,
                MemoryEstimate::cpu(&plain, config, 1).cache + outputs,
                "{options:?}"
            );
        }
    }
    assert!(sizes(&base(CacheMode::Adaptive)).feature_cache);
    assert!(!sizes(&Options { refresh_ratio: Some(0.5), ..base(CacheMode::None) }).feature_cache);
}
