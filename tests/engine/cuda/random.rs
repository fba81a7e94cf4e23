//! Random settings in lockstep: lengths, blocks, batches, caches, policies, families, confidences and sampling parameters.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use crate::common::{Part, Random};
use dllm_kernels::decode::Algorithm;
use dllm_kernels::{CacheMode, Confidence, Family, Options, Policy};

/// Random options and prompts that are valid for the made-up checkpoints.
pub fn setting(random: &mut Random, family: Family) -> (Options, Vec<Vec<u32>>) {
    let mut pick = |n: usize| random.below(n);
    let block_length = [1, 2, 3, 4, 5, 6, 8, 12][pick(8)];
    let blocks = 1 + pick((12 / block_length).min(4));
    let gen_length = block_length * blocks;
    let cache = [CacheMode::None, CacheMode::Prefix, CacheMode::Dual][pick(3)];
    let policy = match pick(3) {
        0 => Policy::Fixed,
        1 => Policy::Threshold([0.2, 0.4, 0.6, 0.9, 1.0][pick(5)]),
        _ => Policy::Factor([0.3, 1.0, 2.5][pick(3)]),
    };
    let fixed = policy == Policy::Fixed;
    let confidences = [Confidence::Probability, Confidence::Margin, Confidence::Random, Confidence::Entropy];
    let confidence = if pick(2) == 0 { None } else { Some(confidences[pick(if fixed { 4 } else { 3 })]) };
    let sampled = pick(2) == 0;
    let mut options = Options {
        gen_length,
        block_length: Some(block_length),
        cache,
        policy,
        confidence,
        steps: if fixed { Some(blocks * (1 + pick(block_length + 2))) } else { None },
        temperature: if sampled { [0.3, 0.8, 1.5][pick(3)] } else { 0.0 },
        alg_temp: if fixed && pick(4) == 0 { 0.5 } else { 0.0 },
        top_p: if pick(4) == 0 { Some([0.5, 0.9][pick(2)]) } else { None },
        top_k: if pick(4) == 0 { Some(1 + pick(12)) } else { None },
        cfg_scale: if pick(5) == 0 { [0.5, 1.5][pick(2)] } else { 0.0 },
        eps: [1e-3, 0.1][pick(2)],
        seed: pick(1 << 20) as u64,
        early_stop: pick(4) == 0,
        end_tokens: if pick(2) == 0 { vec![] } else { (0..pick(8) as u32).map(|t| t * 5).collect() },
        ..Options::default()
    };
    if options.algorithm(family) == Algorithm::DreamThreshold && pick(2) == 0 {
        let divisors: Vec<usize> = (1..=gen_length).filter(|n| gen_length % n == 0).collect();
        options.steps = Some(divisors[pick(divisors.len())]);
    }
    let batch = [1, 1, 2, 3][pick(4)];
    let prompts = (0..batch).map(|_| (0..1 + pick(20)).map(|_| pick(38) as u32).collect()).collect();
    (options, prompts)
}

fn in_lockstep(family: Family, part: Part) {
    let settings = part.count(500, 24);
    let test_model = TestModel::made_up(family);
    let mut random = Random(0x5eed + family as u64);
    let mut all = Tally::default();
    for i in 0..settings {
        let (options, prompts) = setting(&mut random, family);
        let what = format!("{family}, setting {i}, {options:?}, {prompts:?}");
        let (_, tally) = decode_in_lockstep(&test_model, &options, &prompts, &what, &mut ());
        all.add(tally);
    }
    println!("{family}: {settings} settings, {all}");
    // Differences: at most twice the observed shares.
    all.assert_few([0.03, 0.032], [0.4, 0.6]);
}

pub fn random_settings_llada(part: Part) {
    in_lockstep(Family::Llada, part);
}

pub fn random_settings_dream(part: Part) {
    in_lockstep(Family::Dream, part);
}
