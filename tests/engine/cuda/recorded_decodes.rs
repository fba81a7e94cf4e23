//! Recorded decodes of the reference implementations, step by step. The CPU reproduces every token; the device gets the CPU's tokens
//! before each pass.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use crate::common::Part;
use crate::common::copy::check_elsewhere;
use crate::common::recorded::{compare, golden_dir, is_shipped, json, names, not_run, numbers, options};
use dllm_kernels::decode::trace::Trace;

/// The tests that read recordings, on other recordings than the shipped ones.
pub fn recordings_elsewhere() {
    check_elsewhere(16, &["recorded_decodes", "recorded_feature_cache_decodes", "logits_are_within_the_margin"]);
}

pub fn recorded_decodes(part: Part) {
    let models = TestModel::recorded();
    let (mut all, mut replayed) = (Tally::default(), 0);
    let cases = names("trajectory").into_iter().map(|name| (json(&name), name));
    // Those of dLLM-Cache run in feature_cache.rs.
    let cases = cases.filter(|(case, _)| !case["algorithm"].as_str().unwrap().starts_with("dllm_cache."));
    for (case, name) in part.of(cases, 5) {
        let test_model = &models[case["model"].as_str().unwrap()];
        let options = options(&case);
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        let mut trace = Trace::default();
        let (decoded, tally) = decode_in_lockstep(test_model, &options, &prompts, &name, &mut trace);
        compare(&name, &case, test_model.model.config(), &options, &decoded, &trace);
        all.add(tally);
        replayed += 1;
    }
    println!("{replayed} decodes: {all}");
    if replayed == 0 {
        not_run("trajectory without dLLM-Cache");
    }
    // The weights are random, so the two best tokens are often close. A quarter of the tokens and a third of the commits are in doubt; differences are bounded by twice the observed shares.
    if is_shipped(&golden_dir()) {
        all.assert_few([0.055, 0.032], [0.4, 0.6]);
    }
}
