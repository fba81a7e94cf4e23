//! A sequence in a batch and alone. On the CPU its tokens are the same; on the device products and parts of attention follow the
//! batch, and the tokens of both are the CPU's under the margin rule.

use crate::FAMILIES;
use crate::checkpoint::prompts;
use crate::lockstep::{Both, decode_both};
use crate::margin::Tally;
use crate::watched::loops;
use dllm_kernels::{Generator, Options};

pub fn alone_and_in_a_batch() {
    let (mut tally, mut same, mut sequences) = (Tally::default(), 0, 0);
    for family in FAMILIES {
        let both = Both::made_up(family);
        for (i, base) in loops().into_iter().enumerate() {
            let sampled = i % 2 == 1;
            let options = Options { temperature: if sampled { 0.8 } else { 0.0 }, seed: 5, ..base };
            let what = format!("{family} {options:?}");
            let generate = |prompts: &[Vec<u32>]| {
                Generator::new(&both.model).options(options.clone()).generate(prompts).unwrap().tokens
            };
            let (batch, seen) = decode_both(&both, &options, &prompts(), &what, &mut ());
            tally.add(seen);
            let device_batch = generate(&prompts());
            for (s, prompt) in prompts().into_iter().enumerate() {
                let prompt = [prompt];
                let (alone, seen) = decode_both(&both, &options, &prompt, &what, &mut ());
                tally.add(seen);
                assert_eq!(alone.tokens[0], batch.tokens[s], "{what}: the CPU's");
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
    tally.assert_few([0.03, 0.04], [0.4, 0.7]);
}
