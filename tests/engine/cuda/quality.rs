//! The shipped checkpoint solves the same number of its first 100 problems on the device as on the CPU, within one.

use super::small_device;
use crate::common::{Part, models_dir, once_on_device};
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{CacheMode, Generator, Model, Policy};
use std::time::Instant;

once_on_device!(; in_parts: as_many_answers_as_on_the_cpu);

fn as_many_answers_as_on_the_cpu(part: Part) {
    let count = part.count(100, 5);
    let dir = models_dir().join("tiny-math");
    let cpu = Model::open(&dir).unwrap();
    let gpu = Model::open(&dir).unwrap().to_device(&small_device(), |_, _| ()).unwrap();
    let tokenizer = Tokenizer::open(&dir, cpu.config().vocab_size).unwrap().unwrap();
    let rows = std::fs::read_to_string(dir.join("eval/problems_0shot.jsonl")).unwrap();
    let problems: Vec<(Vec<u32>, String)> = rows
        .lines()
        .take(count)
        .map(|row| {
            let row: serde_json::Value = serde_json::from_str(row).unwrap();
            let prompt = tokenizer.encode(row["prompt"].as_str().unwrap(), false).unwrap();
            (prompt, row["answer"].as_str().unwrap().to_string())
        })
        .collect();
    assert_eq!(problems.len(), count);
    let run = |model| -> (Vec<bool>, Vec<Vec<u32>>, usize, f64) {
        let generator =
            Generator::new(model).gen_length(64).block_length(32).cache(CacheMode::Dual).policy(Policy::Threshold(0.9));
        let start = Instant::now();
        let (mut right, mut answers, mut nfe) = (vec![], vec![], 0);
        for (prompt, answer) in &problems {
            let mut generation = generator.generate(std::slice::from_ref(prompt)).unwrap();
            let completion = tokenizer.decode(&generation.tokens[0]).unwrap();
            let given = completion.split_once("####").map(|(_, after)| after.lines().next().unwrap_or_default().trim());
            right.push(given == Some(answer.as_str()));
            nfe += generation.nfe;
            answers.push(generation.tokens.remove(0));
        }
        (right, answers, nfe, start.elapsed().as_secs_f64())
    };
    let (a, b) = (run(&cpu), run(&gpu));
    let number = |right: &[bool]| right.iter().filter(|right| **right).count();
    let same = a.1.iter().zip(&b.1).filter(|(a, b)| a == b).count();
    println!("CPU:    {} of {count} right, {} passes, {:.1} s", number(&a.0), a.2, a.3);
    println!(
        "device: {} of {count} right, {} passes, {:.1} s; {same} answers have the same tokens",
        number(&b.0),
        b.2,
        b.3
    );
    assert!(number(&a.0).abs_diff(number(&b.0)) <= 1);
}
