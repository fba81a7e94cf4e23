//! The originals' decodes, step by step: the CPU reproduces every token of them, and the device is given those.

use crate::lockstep::{Both, decode_both};
use crate::margin::Tally;
use crate::recorded::{compare, json, names, numbers, options};
use dllm_kernels::decode::trace::Trace;
use std::collections::BTreeMap;

pub fn recorded_decodes() {
    let models: BTreeMap<_, Both> =
        ["tiny-llada", "tiny-llada-b", "tiny-dream"].into_iter().map(|name| (name, Both::recorded(name))).collect();
    let (mut all, mut replayed) = (Tally::default(), 0);
    for name in names("trajectory_") {
        let case = json(&format!("{name}.json"));
        if case["algorithm"].as_str().unwrap().starts_with("dllm_cache.") {
            continue; // kept.rs
        }
        let both = &models[case["model"].as_str().unwrap()];
        let options = options(&case);
        let prompts: Vec<Vec<u32>> = numbers(&case["prompt"]);
        let mut trace = Trace::default();
        let (decoded, tally) = decode_both(both, &options, &prompts, &name, &mut trace);
        compare(&name, &case, both.model.config(), &options, &decoded, &trace);
        all.add(tally);
        replayed += 1;
    }
    println!("{replayed} decodes: {all}");
    // Random weights: the next token is often close. Twice what was seen.
    all.assert_few([0.055, 0.032], [0.6, 0.9]);
}
