//! Tokens and confidences: vocabularies, kinds of confidence, draws, guidance and the logit shift.

use super::case::{Case, OnDevice, plain, random_logits, run};
use super::check::{POLICIES, check, check_all_types, close};
use crate::common::{Random, device, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::ops::unmask::{Row, RowTable};
use dllm_kernels::reference::unmask::score_row;
use dllm_kernels::sampling::SamplingParams;
use dllm_kernels::sampling::philox::{Purpose, gumbel};

once_on_device! {
    vocabularies_and_policies,
    published_vocabularies,
    published_vocabularies_in_the_general_form,
    every_confidence,
    draws,
    guidance,
    guidance_rounds_as_the_originals,
    large_noise_is_exact,
    far_positions_and_steps,
    dreams_shift_is_a_row_map,
}

fn vocabularies_and_policies() {
    for vocab in [1, 2, 7, 8, 100, 512, 2048, 8191, 8192, 8193, 20_000] {
        for (i, commit_rule) in POLICIES.into_iter().enumerate() {
            let lengths = [5 + i, 1, 16];
            check_all_types(&format!("vocabulary {vocab}, {commit_rule:?}"), vocab, &lengths, |options| {
                options.commit_rule = vec![commit_rule; 3]
            });
        }
    }
}

fn published_vocabularies() {
    for vocab in [126_464, 152_064] {
        check_all_types(&format!("{vocab}"), vocab, &[3, 2], |_| {});
    }
}

fn published_vocabularies_in_the_general_form() {
    for vocab in [126_464, 152_064] {
        for confidence in [Confidence::Entropy, Confidence::Margin] {
            check_all_types(&format!("{vocab}, {confidence:?}"), vocab, &[2], |options| {
                options.params =
                    SamplingParams { confidence, top_p: Some(0.9), top_k: Some(50), temperature: 0.5, ..plain() };
                options.guided = confidence == Confidence::Margin;
                options.params.cfg_scale = if options.guided { 0.5 } else { 0.0 };
            });
        }
    }
}

fn every_confidence() {
    for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy, Confidence::Random] {
        for vocab in [1, 64, 9000] {
            for (i, commit_rule) in POLICIES.into_iter().enumerate() {
                check_all_types(
                    &format!("{confidence:?} of {vocab}, {commit_rule:?}"),
                    vocab,
                    &[9, 4 + i],
                    |options| {
                        options.commit_rule = vec![commit_rule; 2];
                        options.params.confidence = confidence;
                    },
                );
            }
        }
    }
}

fn draws() {
    for (i, temperature) in [0.2, 0.7, 1.0, 3.0].into_iter().enumerate() {
        for tempered in [false, true] {
            for confidence in [Confidence::Probability, Confidence::Margin, Confidence::Entropy] {
                check_all_types(
                    &format!("temperature {temperature}, {confidence:?}, tempered {tempered}"),
                    [100, 9000][i % 2],
                    &[10, 3],
                    |options| {
                        options.params.temperature = temperature;
                        options.params.tempered_confidence = tempered;
                        options.params.confidence = confidence;
                    },
                );
            }
        }
    }
}

fn guidance() {
    for (scale, temperature) in [(0.0, 0.0), (1.5, 0.0), (0.5, 0.9)] {
        check_all_types(&format!("guidance {scale}"), 8200, &[6, 2], |options| {
            options.guided = true;
            options.params.cfg_scale = scale;
            options.params.temperature = temperature;
        });
    }
}

/// Guided logits that differ only by their roundings: the kernel rounds as the reference does.
fn guidance_rounds_as_the_originals() {
    let mut random = Random(21);
    let mut case = Case::<f32>::new(&mut random, 64, &[12]);
    let uncond: Vec<f32> = random_logits(&mut random, 12, 64);
    case.params.cfg_scale = 1.5;
    case.logits = uncond.iter().map(|u| u + (10.0 - u) / 2.5).collect();
    case.uncond = Some(uncond);
    check(&case, &run(&case), "guidance");
}

/// Large noise, of a u near 1, decides most draws. It is compared with a logit that is larger or smaller by 1e-4.
fn large_noise_is_exact() {
    let mut case = Case::<f32>::new(&mut Random(22), 30_000, &[6]);
    case.masked[0] = vec![true; 6];
    case.params.temperature = 1.0;
    for (position, row) in case.logits.chunks_mut(30_000).enumerate() {
        let noise = |token| gumbel(case.params.seed, Purpose::Token, case.steps[0], position, token);
        let largest = (100..30_000).max_by(|a, b| noise(*a).total_cmp(&noise(*b))).unwrap();
        row.fill(-100.0);
        row[largest] = 0.0;
        row[0] = (noise(largest) - noise(0) + if position % 2 == 0 { 1e-4 } else { -1e-4 }) as f32;
    }
    check(&case, &run(&case), "large noise");
}

/// Random numbers of positions and steps that 16 bits do not hold.
fn far_positions_and_steps() {
    let stream = device().stream().unwrap();
    for (steps, first) in [(3, 65_536), (70_000, 7), (1 << 20, 1 << 24)] {
        let mut case = Case::<f32>::new(&mut Random(25), 300, &[40]);
        case.masked[0] = vec![true; 40];
        case.steps = vec![steps];
        case.params = SamplingParams { confidence: Confidence::Random, temperature: 2.0, ..plain() };
        let rows = (0..40).map(|i| Row { token: i, logits_row: i, position: first + i }).collect();
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.table = RowTable::new(&stream, &[rows]).unwrap();
        on_device.launch(&stream, &case).unwrap();
        let output = on_device.read();
        for i in 0..40 {
            let logits = &case.logits[i * case.stride..][..300];
            let (token, confidence) = score_row(logits, &case.params, steps, first + i).unwrap();
            let name = format!("step {steps}, position {}", first + i);
            assert_eq!(output.predicted[i], token as i32, "{name}");
            assert!(close(output.confidence[i], confidence, Confidence::Random), "{name}");
        }
    }
}

fn dreams_shift_is_a_row_map() {
    check_all_types("shift", 512, &[7, 1, 4], |options| options.shift = true);
}
