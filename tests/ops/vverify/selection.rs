//! Cosines, and the selection of the rows with the lowest.

use super::case::Case;
use crate::common::copy::check_elsewhere;
use crate::common::recorded::{Tensors, cases, json, names, numbers};
use crate::common::{Float, on_device, once_on_device};
use half::{bf16, f16};
use serde_json::Value;

on_device! {
    agrees_with_the_reference_bf16,
    agrees_with_the_reference_f16,
    ratios,
    sequences_of_any_length_and_none,
    fewer_rows_than_the_maximum,
    ties_go_to_the_lower_row,
    equal_rows_have_cosine_one_and_zero_vectors_zero,
    nan_counts_as_the_lowest,
    batch_invariant_in_any_order,
    golden_cases,
}

once_on_device! {
    golden_cases_elsewhere,
}

fn widths_and_lengths<T: Float>() {
    for width in [8, 16, 248, 1000, 2040, 2048, 2056, 4096] {
        for rows in [1, 2, 7, 33, 70] {
            Case::<T>::new(&[rows], width, 0.25).agrees();
        }
    }
    // Above 256 rows the kernel selects in tiles; above 1,024 the keys do not fit into shared memory.
    for rows in [255, 257, 1024, 1025, 2000] {
        Case::<T>::new(&[rows], 64, 0.25).agrees();
    }
}

fn agrees_with_the_reference_bf16() {
    widths_and_lengths::<bf16>();
}

fn agrees_with_the_reference_f16() {
    widths_and_lengths::<f16>();
}

fn ratios() {
    for ratio in [0.0, 1e-9, 0.01, 0.25, 0.5, 1.0 - 1e-12, 1.0] {
        for rows in [1, 40, 1100] {
            Case::<bf16>::new(&[rows], 32, ratio).agrees();
        }
    }
}

fn sequences_of_any_length_and_none() {
    for lengths in
        [&[5, 9, 1][..], &[0, 12], &[12, 0], &[7, 0, 0, 9], &[0], &[0, 0, 0, 0, 0], &[1; 40], &[300, 4, 1030, 90]]
    {
        Case::<f16>::new(lengths, 40, 0.3).agrees();
    }
}

fn fewer_rows_than_the_maximum() {
    let mut case = Case::<bf16>::new(&[20, 30], 64, 0.25);
    case.cu_rows = vec![0, 11, 17];
    case.update_cached = true;
    case.agrees();
}

fn ties_go_to_the_lower_row() {
    // Three kinds of rows with different cosines; all rows of a kind have the same bits.
    for rows in [50, 1500] {
        for ratio in [0.1, 0.4, 0.75] {
            let mut case = Case::<bf16>::new(&[rows], 136, ratio);
            for row in 0..rows {
                case.set_cached(row, |i| 0.1 * (i as f32 + 1.0));
                case.set_fresh(row, |i| if i % 4 < row * 7 % 3 { -1.0 } else { 0.3 * i as f32 });
            }
            case.agrees();
        }
    }
}

fn equal_rows_have_cosine_one_and_zero_vectors_zero() {
    fn equal<T: Float>() {
        for width in [8, 1000, 4096] {
            let mut case = Case::<T>::new(&[60, 1], width, 0.5);
            case.cached = case.fresh.clone();
            let got = case.run();
            assert!(got.similarity.iter().all(|x| *x == 1.0), "{:?}", got.similarity);
            assert_eq!(got.indices[..30], (0..30).collect::<Vec<_>>());
            assert_eq!(case.check(&got), 0);
        }
    }
    equal::<bf16>();
    equal::<f16>();

    let mut case = Case::<bf16>::new(&[9], 64, 0.5);
    (0..3).for_each(|row| case.set_fresh(row, |_| 0.0));
    (2..5).for_each(|row| case.set_cached(row, |_| if row == 4 { -0.0 } else { 0.0 }));
    // -0 is equal to 0: it results from a tiny negative product and a long vector.
    case.set_fresh(5, |i| [1e10, 1e-20].get(i).copied().unwrap_or(0.0));
    case.set_cached(5, |i| if i == 1 { -1e-20 } else { 0.0 });
    let got = case.run();
    assert!(got.similarity[..6].iter().all(|x| *x == 0.0), "{:?}", got.similarity);
    assert!(got.similarity[5].is_sign_negative());
    assert_eq!(got.indices[..4], [0, 1, 2, 3]);
}

fn nan_counts_as_the_lowest() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = Case::<f16>::new(&[30], 520, 0.2);
        case.fresh[7 * 520 + 519] = f16::of(value);
        case.cached[20 * 520] = f16::of(value);
        case.cached[21 * 520 + 8] = f16::of(value);
        case.fresh[21 * 520 + 8] = f16::of(value);
        case.set_fresh(3, |_| 0.0);
        case.cached[3 * 520 + 100] = f16::of(value);
        case.update_cached = true;
        let got = case.run();
        assert_eq!(case.check(&got), 0);
        assert!([3, 7, 20, 21].iter().all(|row| got.indices.contains(row)), "{:?}", got.indices);
    }
}

/// The bits of a sequence do not depend on its batch. Returns the bits, which must be the same in every order.
fn batch_invariant_in_any_order() -> (Vec<i32>, Vec<u32>) {
    let batch = Case::<bf16>::new(&[40, 0, 1100, 3], 520, 0.25);
    let together = batch.run();
    for (s, rows) in batch.cu_rows.windows(2).enumerate().filter(|(_, rows)| rows[0] < rows[1]) {
        let range = |rows: std::ops::Range<i32>| rows.start as usize * 520..rows.end as usize * 520;
        let mut alone = batch.clone();
        alone.fresh = batch.fresh[range(rows[0]..rows[1])].to_vec();
        alone.cached = batch.cached[range(rows[0]..rows[1])].to_vec();
        alone.cu_rows = vec![0, rows[1] - rows[0]];
        let got = alone.run();
        assert_eq!(got.similarity, together.similarity[rows[0] as usize..rows[1] as usize]);
        let part = together.cu_selected[s] as usize..together.cu_selected[s + 1] as usize;
        let want: Vec<i32> = together.indices[part].iter().map(|row| row - rows[0]).collect();
        assert_eq!(got.indices[..want.len()], want);
    }
    (together.indices, together.similarity.iter().map(|x| x.to_bits()).collect())
}

fn golden_cases() {
    for name in names("sampler_vverify") {
        let (json, tensors) = (json(&name), Tensors::open(&name));
        cases(&json).iter().for_each(|golden| golden_case(golden, &tensors));
    }
}

fn golden_case(golden: &Value, tensors: &Tensors) {
    let of = |what: &str| format!("{}.{what}", golden["name"].as_str().unwrap());
    // Recorded in f32; rounding to f16 changes a cosine by up to 1e-4.
    let half = |what| -> Vec<f16> { tensors.f32(&of(what)).into_iter().map(f16::from_f32).collect() };
    let [batch, rows, width] = tensors.shape(&of("v_new")).try_into().unwrap();
    let case = Case {
        fresh: half("v_new"),
        cached: half("v_cached"),
        ..Case::new(&vec![rows; batch], width, numbers(&golden["transfer_ratio"]))
    };
    let got = case.run();
    assert_eq!(case.check(&got), 0, "{golden}");
    let selected: usize = numbers(&golden["num_replace"]);
    let want = tensors.i64(&of("indices")).into_iter().enumerate();
    let mut want: Vec<i32> = want.map(|(i, row)| (i / selected * rows) as i32 + row as i32).collect();
    want.sort_unstable();
    assert_eq!(got.indices[..batch * selected], want, "{golden}");
}

fn golden_cases_elsewhere() {
    check_elsewhere(2, &["golden_cases"]);
}
