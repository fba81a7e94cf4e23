//! Top-p and top-k.

use super::case::{Case, MASK, OnDevice, plain, unit};
use super::check::{check_all_types, guided_row};
use crate::common::{Random, device, once_on_device};
use dllm_kernels::reference::top_k_top_p::min_kept_logit;
use dllm_kernels::sampling::SamplingParams;
use half::bf16;

once_on_device! {
    top_p_and_top_k,
    min_logits,
}

fn top_p_and_top_k() {
    for (top_p, top_k) in [
        (Some(0.9), None),
        (Some(0.3), None),
        (Some(0.0), None),
        (Some(1.0), None),
        (None, Some(1)),
        (None, Some(5)),
        (None, Some(100_000)),
        (Some(0.95), Some(3)),
        (Some(0.2), Some(50)),
    ] {
        for temperature in [0.0, 0.8] {
            for (vocab, guided) in [(64, false), (9000, true), (1, false)] {
                check_all_types(
                    &format!("top-p {top_p:?}, top-k {top_k:?} at {temperature} of {vocab}"),
                    vocab,
                    &[6, 3],
                    |options| {
                        options.params =
                            SamplingParams { top_p, top_k, temperature, tempered_confidence: true, ..plain() };
                        options.guided = guided;
                        options.params.cfg_scale = if guided { 0.7 } else { 0.0 };
                    },
                );
            }
        }
    }
}

/// The smallest kept logit equals that of the reference, unless rounding decides on which side of top-p a token is.
fn min_logits() {
    let stream = device().stream().unwrap();
    let mut random = Random(14);
    let (mut doubtful, mut rows) = (0, 0);
    for case_number in 0..40 {
        let vocab = [8, 500, 9000, 30_000][case_number % 4];
        let case = Case::<bf16>::new(&mut random, vocab, &[4]);
        let (top_p, top_k) = (unit(&mut random) as f64, random.below(2 * vocab) + 1);
        let temperature = [0.3, 1.0, 2.0][random.below(3)];
        let case =
            Case { params: SamplingParams { top_p: Some(top_p), top_k: Some(top_k), temperature, ..plain() }, ..case };
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.launch(&stream, &case).unwrap();
        let min_logits = on_device.min_logit.as_ref().unwrap().read().unwrap();
        for (position, min_logit) in min_logits.iter().enumerate() {
            if !case.masked[0][position] {
                assert_eq!(*min_logit, f32::NEG_INFINITY);
                continue;
            }
            let mut row = guided_row(&case, 0, position);
            let best = (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a))).unwrap();
            if best == MASK as usize {
                row[best] = f32::NEG_INFINITY;
            }
            let want = |p: f64| min_kept_logit(&row, temperature, Some(p), Some(top_k));
            rows += 1;
            // The kernel has top_p and weights in f32.
            let (low, high) = (want(top_p * (1.0 - 1e-6) - 1e-7), want(top_p * (1.0 + 1e-6) + 1e-7));
            doubtful += (low != high) as usize;
            assert!(low >= *min_logit && *min_logit >= high, "{min_logit}, expected {low} to {high}");
        }
    }
    assert!(doubtful * 20 < rows, "{doubtful} of {rows} rows in doubt");
}
