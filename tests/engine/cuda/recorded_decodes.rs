//! Recorded decodes of the reference implementations, step by step. The CPU reproduces every token; the device gets the CPU's tokens
//! before each pass.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use crate::common::Part;
use crate::common::recorded::{compare, json, names, numbers, options};
use dllm_kernels::decode::trace::Trace;
use std::collections::BTreeMap;

pub fn recorded_decodes(part: Part) {
    let models: BTreeMap<_, TestModel> = ["tiny-llada", "tiny-llada-b", "tiny-dream"]
        .into_iter()
        .map(|name| (name, TestModel::recorded(name)))
        .collect();
    let (mut all, mut replayed) = (Tally::default(), 0);
    let cases = names("trajectory_").into_iter().map(|name| (json(&format!("{name}.json")), name));
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
    // The weights are random, so the two best tokens are often close. The bounds are twice the observed shares.
    all.assert_few([0.055, 0.032], [0.6, 0.9]);
}
