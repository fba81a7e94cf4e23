//! Decodes with the trained checkpoint `models/tiny-math`, in lockstep with the CPU. Unlike the random weights of the recordings it is
//! mostly certain of its tokens, so that few decisions are in doubt and almost all of them are compared.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use crate::common::{assert_nothing_reported, device, models_dir, once_on_device};
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{CacheMode, Options, Policy};

/// Decodes these problems of the checkpoint's evaluation in two blocks, with every cache and two policies, and compares each pass.
fn decode_problems(problems: std::ops::Range<usize>, block_length: usize) {
    let dir = models_dir().join("tiny-math");
    let test_model = TestModel::open(&dir);
    let tokenizer = Tokenizer::open(&dir, test_model.model.config().vocab_size).unwrap().unwrap();
    let rows = std::fs::read_to_string(dir.join("eval/problems_0shot.jsonl")).unwrap();
    let prompts: Vec<Vec<u32>> = rows
        .lines()
        .take(problems.end)
        .skip(problems.start)
        .map(|row| {
            let row: serde_json::Value = serde_json::from_str(row).unwrap();
            tokenizer.encode(row["prompt"].as_str().unwrap(), false).unwrap()
        })
        .collect();
    assert_eq!(prompts.len(), problems.len());
    let mut of_policies = [Tally::default(); 2];
    for cache in [CacheMode::None, CacheMode::Prefix, CacheMode::Dual, CacheMode::Adaptive] {
        for (policy, all) in [Policy::Threshold(0.9), Policy::Fixed].into_iter().zip(&mut of_policies) {
            let mut tally = Tally::default();
            for (i, prompt) in prompts.iter().enumerate() {
                let gen_length = 2 * block_length;
                let steps = (policy == Policy::Fixed).then_some(gen_length / 2);
                let sizes = Options { gen_length, block_length: Some(block_length), steps, ..Options::default() };
                let options = Options { cache, policy, ..sizes };
                let what = format!("{cache:?} {policy:?} problem {}", problems.start + i);
                tally.add(decode_in_lockstep(&test_model, &options, std::slice::from_ref(prompt), &what, &mut ()).1);
            }
            println!("{cache:?} {policy:?}: {tally}");
            all.add(tally);
        }
    }
    let [threshold, fixed] = of_policies;
    println!("threshold: {threshold}\nfixed: {fixed}");
    assert!(threshold.writes_in_doubt() < 0.05, "{threshold}");
    // Many confidences are close to 1, and the quota is for two of them: which two is in doubt more often.
    assert!(fixed.writes_in_doubt() < 0.2, "{fixed}");
    // Differences: at most twice the observed shares.
    threshold.assert_few([0.01, 0.01], [0.2, 0.1]);
    fixed.assert_few([0.012, 0.035], [0.2, 0.2]);
}

fn trained_model() {
    decode_problems(0..1, 16);
}

once_on_device!(trained_model);

#[test]
#[ignore = "long: three problems on the CUDA emulator"]
fn trained_model_on_many_problems() {
    device();
    decode_problems(1..4, 32);
    assert_nothing_reported();
}
