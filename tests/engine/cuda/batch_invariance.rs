//! Decodes of a sequence alone and in a batch. On the CPU its tokens are the same. On the device, matrix products and KV splits
//! depend on the batch, so test_model decodes are compared with the CPU's under the margin rule.

use super::FAMILIES;
use super::lockstep::{TestModel, decode_in_lockstep};
use super::margin::Tally;
use super::observed::loops;
use crate::common::Part;
use crate::common::checkpoint::prompts;
use dllm_kernels::{Generator, Options};

pub fn alone_and_in_a_batch(part: Part) {
    let (mut tally, mut same, mut sequences) = (Tally::default(), 0, 0);
    for family in FAMILIES {
        let test_model = TestModel::made_up(family);
        for (i, base) in part.of(loops().into_iter().enumerate(), 2) {
            let sampled = i % 2 == 1;
            let options = Options { temperature: if sampled { 0.8 } else { 0.0 }, seed: 5, ..base };
            let what = format!("{family} {options:?}");
            let generate = |prompts: &[Vec<u32>]| {
                Generator::new(&test_model.model).options(options.clone()).generate(prompts).unwrap().tokens
            };
            let (batch, seen) = decode_in_lockstep(&test_model, &options, &prompts(), &what, &mut ());
            tally.add(seen);
            let device_batch = generate(&prompts());
            for (s, prompt) in prompts().into_iter().enumerate() {
                let prompt = [prompt];
                let (alone, seen) = decode_in_lockstep(&test_model, &options, &prompt, &what, &mut ());
                tally.add(seen);
                assert_eq!(alone.tokens[0], batch.tokens[s], "{what}: the CPU's tokens depend on the batch");
                same += usize::from(generate(&prompt)[0] == device_batch[s]);
                sequences += 1;
            }
        }
    }
    println!("{tally}");
    println!("{same} of {sequences} sequences have the same tokens on the device alone and in a batch");
    if softgpu::active() {
        assert_eq!(same, sequences);
    }
    tally.assert_few([0.03, 0.04], [0.4, 0.6]);
}
