//! Launches: orders of threads, batches, graphs, and wrong arguments.

use super::case::{Case, MASK, OnDevice, Output, plain, run};
use super::check::check;
use crate::common::{Random, device, in_every_order, once_on_device};
use dllm_kernels::Confidence;
use dllm_kernels::ops::unmask::{Row, RowTable};
use dllm_kernels::sampling::{CommitRule, SamplingParams};
use half::bf16;

once_on_device! {
    the_same_bits_in_every_order,
    batch_invariant,
    a_graph_unmasks_everything,
    indices_out_of_range,
    wrong_calls_name_the_field,
}

/// The bits do not depend on the order of threads and blocks.
fn the_same_bits_in_every_order() {
    for (i, confidence) in [Confidence::Probability, Confidence::Entropy].into_iter().enumerate() {
        let mut case = Case::<bf16>::new(&mut Random(15), 30_000, &[8, 3]);
        // A token that the first thread does not read.
        case.mask_token = 20_001;
        let (mask_token, top_p) = (Some(20_001), (i == 1).then_some(0.9));
        case.params = SamplingParams { confidence, temperature: i as f64, top_p, mask_token, ..plain() };
        in_every_order(|| run(&case).bits());
        check(&case, &run(&case), &format!("{confidence:?}"));
    }
}

/// The bits of a sequence do not depend on its batch.
fn batch_invariant() {
    for general in [false, true] {
        let mut case = Case::<bf16>::new(&mut Random(16), 20_000, &[6, 0, 17, 1]);
        if general {
            case.params = SamplingParams { confidence: Confidence::Entropy, temperature: 0.7, ..plain() };
        }
        let all = run(&case);
        for s in 0..4 {
            let alone = run(&case.only(s));
            let rows = case.first_row(s)..case.first_row(s + 1);
            assert_eq!(alone.tokens, all.tokens[rows.clone()]);
            let bits = |c: &[f32]| c.iter().map(|c| c.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone.confidence), bits(&all.confidence[rows]));
            let counts = |output: &Output, s: usize| (output.committed[s], output.masks_left[s], output.failed[s]);
            assert_eq!(counts(&alone, 0), counts(&all, s));
        }
    }
}

/// A captured launch is replayed until no mask is left: every replay finds counters and workspace ready.
fn a_graph_unmasks_everything() {
    let stream = device().stream().unwrap();
    device().preload().unwrap();
    for general in [false, true] {
        let mut case = Case::<bf16>::new(&mut Random(17), 10_000, &[9, 5]);
        case.commit_rule = vec![CommitRule::Quota(2), CommitRule::Quota(1)];
        if general {
            case.params.confidence = Confidence::Margin;
        }
        let mut on_device = OnDevice::new(&stream, &case);
        stream.synchronize().unwrap();
        let graph = stream.capture(|| on_device.launch(&stream, &case)).unwrap();
        assert_eq!(on_device.tokens.read().unwrap(), case.tokens(), "capturing launches nothing");
        for step in 0..8 {
            // SAFETY: the buffers live on; nothing else uses them.
            unsafe { graph.launch() }.unwrap();
            let output = on_device.read();
            check(&case, &output, &format!("step {step}"));
            // Committed tokens are text in the following steps.
            let mut tokens = output.tokens.iter();
            for masked in case.masked.iter_mut().flatten() {
                *masked = *tokens.next().unwrap() == MASK;
            }
            for (token, masked) in output.tokens.iter().zip(case.masked.iter().flatten()) {
                assert_eq!(*token == MASK, *masked);
            }
            let tokens: Vec<i32> = case.tokens();
            on_device.tokens.write(&tokens).unwrap();
        }
        assert!(case.masked.iter().flatten().all(|m| !m));
    }
}

/// A table with rows outside the tokens or logits: the failure is reported, and nothing is read there.
fn indices_out_of_range() {
    let stream = device().stream().unwrap();
    let case = Case::<bf16>::new(&mut Random(18), 64, &[4, 4]);
    for (token, logits_row) in [(6, 8), (8, 0), (1 << 30, 1 << 30)] {
        let row = |i: usize| Row { token: i, logits_row: i, position: i };
        let mut rows: Vec<Vec<Row>> = vec![(0..4).map(row).collect(), (4..8).map(row).collect()];
        rows[1][2] = Row { token, logits_row, position: 6 };
        let mut on_device = OnDevice::new(&stream, &case);
        on_device.table = RowTable::new(&stream, &rows).unwrap();
        on_device.launch(&stream, &case).unwrap();
        let output = on_device.read();
        assert_eq!((output.failed[0], output.failed[1]), (-1, -2));
        assert_eq!(output.committed[1], 0);
        assert_eq!(output.tokens[4..], case.tokens()[4..]);
    }
}

fn wrong_calls_name_the_field() {
    let stream = device().stream().unwrap();
    let case = Case::<bf16>::new(&mut Random(20), 64, &[4]);
    let error = |change: &dyn Fn(&mut OnDevice<bf16>, &mut Case<bf16>)| {
        let mut case = case.clone();
        let mut on_device = OnDevice::new(&stream, &case);
        change(&mut on_device, &mut case);
        on_device.launch(&stream, &case).unwrap_err().to_string()
    };
    let other = device().stream().unwrap();
    assert!(error(&|d, _| d.tokens = other.zeros(4).unwrap()).contains("tokens: expected a buffer of the stream"));
    let row = |token, position| Row { token, logits_row: 0, position };
    let table = |rows: &[Vec<Row>]| RowTable::new(&stream, rows).err().unwrap().to_string();
    assert!(table(&[vec![row(0, 1), row(1, 1)]]).contains("rows: expected ascending positions"));
    assert!(table(&[vec![row(0, 0)], vec![row(0, 0)]]).contains("rows: expected distinct tokens, found 0 twice"));
    assert!(table(&[vec![row(1 << 40, 0)]]).contains("token: expected at most 2147483647"));
    assert!(error(&|_, c| c.commit_rule = vec![CommitRule::Factor(0.0)]).contains("factor: expected a number above 0"));
    assert!(error(&|_, c| c.stride = 60).contains("at least the width, 64"));
    assert!(error(&|_, c| c.stride = 68).contains("logits_stride: expected a multiple of 8 elements (16 bytes)"));
    assert!(error(&|_, c| c.vocab = 0).contains("at least the width, 0"));
    assert!(error(&|d, _| d.steps = stream.alloc(0).unwrap()).contains("steps: expected 1 elements, found 0"));
    assert!(error(&|_, c| c.params.temperature = 1e-9).contains("temperature: expected 0, or 1e-6 to 1e6"));
    assert!(error(&|_, c| c.params.cfg_scale = 1.0).contains("cfg_scale: expected 0, as there are no uncond_logits"));
    assert!(error(&|_, c| c.params.alg_temp = 1.0).contains("alg_temp: expected 0, as the policy is not fixed"));
    assert!(
        error(&|_, c| c.commit_rule = vec![CommitRule::Threshold(f64::NAN)])
            .contains("threshold: expected a finite number")
    );
    assert!(
        error(&|d, c| {
            c.vocab = 9000;
            c.stride = 9000;
            d.logits = stream.zeros(36_000).unwrap();
        })
        .contains("workspace: expected one made for unmask of [1, 4, 9000], found one made for unmask of [1, 4, 64]")
    );
}
